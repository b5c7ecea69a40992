"""New bytes for the touched blocks of every tuned tensor, by several ways of rounding.

`requantize` alone keeps single weights close; with a sample of inputs, `code_search` then makes the
remaining errors cancel in the outputs. Ways to do so differ little on average, but each leaves an
error of its own, whose effect on the loss only measuring tells; so merge may try more than one.
"""

import math
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.data.dataset import Example
from zo_gguf.engine.model import default_threads
from zo_gguf.engine.readout import MAX_SAMPLES, InputSample, sample_inputs
from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.gguf_files.file import GgufFile, dequantize_rows
from zo_gguf.libzo import Moments
from zo_gguf.merging.code_search import choose_codes, input_moments
from zo_gguf.merging.requantize import (
    TUNED_WEIGHT,
    Patch,
    block_of,
    requantize,
    requantize_whole,
    row_parts,
)
from zo_gguf.params.delta import Delta

_TOGETHER = 1 << 22  # weights of a matrix that are numbers at once
_MAX_BYTES = 1 << 30  # of inputs in memory
_MAX_COLUMNS = 16384  # wider matrices have too large second moments
_MAX_LEVELS = 64  # finer types have no error worth a search
_READ = 2 * MAX_SAMPLES  # tokens; more of them would mostly be read and not be recorded


F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Rounding:
    """One way of rounding.

    Attributes:
        tuned_weights: Squared error of a tuned entry against that of another, for every start.
        ridge: See `choose_codes`.
        counted_share: See `InputSample.scaled`.
    """

    tuned_weights: tuple[float, ...]
    ridge: float
    counted_share: float


# For sparse entries: measured on tiny-llama at Q4_0 and Q4_K_M, see tools/LOG.md.
ROUNDINGS = (
    Rounding((TUNED_WEIGHT,), ridge=0.1, counted_share=0.3),
    Rounding((1.5, 5.0, 30.0, 300.0), ridge=0.03, counted_share=0.3),
    Rounding((3.0, TUNED_WEIGHT), ridge=0.1, counted_share=0.5),
)
# For products, which change outputs by far less than a step and at counted positions most of all:
# measured on SmolLM2 at Q4_1. All weights are tuned, so that their weight is a mere factor.
PRODUCT_ROUNDINGS = (
    Rounding((TUNED_WEIGHT,), ridge=0.003, counted_share=0.9),
    Rounding((TUNED_WEIGHT,), ridge=0.001, counted_share=0.95),
    Rounding((TUNED_WEIGHT,), ridge=0.1, counted_share=0.3),
)


def roundings(delta: Delta) -> tuple[Rounding, ...]:
    """The ways of rounding that suit a delta, in the order in which they are tried."""
    return PRODUCT_ROUNDINGS if delta.low_rank else ROUNDINGS


class PatchFile(Mapping[str, Patch]):
    """Patches by tensor in a file without a name: memory holds one, and a kill leaves nothing.

    Low-rank products touch every block, so all patches of a model are as large as its file.

    Args:
        folder: Where there is room for the file.
        others: The patches of tensors that get none of their own.
    """

    def __init__(self, folder: Path, others: Mapping[str, Patch] | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - as long as the patches
        weakref.finalize(self, self._file.close)
        self._others = others or {}
        self._places: dict[str, tuple[int, int, Patch]] = {}

    def add(self, name: str, patch: Patch) -> None:
        """Store a tensor's patch."""
        place = self._file.seek(0, os.SEEK_END)
        n = len(patch.ids)
        if n and patch.ids[-1] >= n:  # else they are 0, 1, 2, ..., as those of a product
            np.save(self._file, patch.ids)
            n = 0
        np.save(self._file, patch.blocks)
        nothing = replace(patch, ids=patch.ids[:0].copy(), blocks=patch.blocks[:0].copy())
        self._places[name] = place, n, nothing

    def __getitem__(self, name: str) -> Patch:
        if name not in self._places:
            return self._others[name]
        place, n, patch = self._places[name]
        self._file.seek(place)
        ids = np.arange(n) if n else np.load(self._file)
        return replace(patch, ids=ids, blocks=np.load(self._file))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._others, *self._places]))

    def __len__(self) -> int:
        return len({*self._others, *self._places})


def patch_bytes(base: GgufFile, delta: Delta, names: Iterable[str]) -> int:
    """Room that patches of some tuned tensors take at most."""
    total = 0
    for name in names:
        block, block_bytes = block_of(base.tensors[name].type)
        n_blocks = math.prod(delta.changed[name]) // block
        if name not in delta.low_rank:
            n_blocks = min(n_blocks, delta.tensors[name].size)
            block_bytes += 8  # and which they are
        total += n_blocks * block_bytes
    return total


def plain_patches(
    base: GgufFile, delta: Delta, names: Sequence[str], folder: Path, n_threads: int | None
) -> Mapping[str, Patch]:
    """For tuned tensors, the new bytes of their touched blocks within their own types.

    Args:
        base: The GGUF that was tuned.
        delta: What was learned.
        names: The tensors.
        folder: Where a temporary file may lie.
        n_threads: Worker threads.

    Raises:
        ZoError: A tensor's type can neither be searched nor quantized to.
    """
    result = PatchFile(folder)
    with _progress(delta, names, "re-quantizing") as bar:
        for name in names:
            result.add(name, _requantize(base, delta, name, TUNED_WEIGHT, n_threads))
            bar.update(math.prod(delta.changed[name]))
    return result


def _progress(delta: Delta, names: Iterable[str], what: str) -> "tqdm[None]":
    """A bar that counts weights, so that the time left is that of all matrices, large and small."""
    total = sum(math.prod(delta.changed[name]) for name in names)
    return tqdm(total=total, desc=what, unit="weight", unit_scale=True, disable=None, leave=False)


def rounded_patches(
    base: GgufFile,
    delta: Delta,
    plain: Mapping[str, Patch],
    examples: Sequence[Example],
    rounding: Rounding,
    folder: Path,
    n_threads: int | None,
) -> Mapping[str, Patch]:
    """The same blocks with codes that suit the tuned model's inputs on some rows.

    Args:
        base: The GGUF that was tuned.
        delta: What was learned.
        plain: From `plain_patches`; kept where the inputs are not known or the type is fine enough.
        examples: The rows.
        rounding: How.
        folder: Where a temporary file may lie.
        n_threads: Worker threads.
    """
    result = PatchFile(folder, plain)
    portions, rows = list(_portions(base, delta)), _enough(examples)
    n_threads = n_threads or default_threads()
    with _progress(delta, chain(*portions), "choosing codes") as bar:
        for names in portions:
            bar.set_description("reading inputs")
            inputs = sample_inputs(base, delta, names, rows, n_threads=n_threads)
            bar.set_description("choosing codes")
            with ExitStack() as stack:
                last: InputSample | None = None
                for name in names:
                    if name in inputs:
                        if inputs[name] is not last:  # else it reads the same as the one before
                            stack.close()
                            last = inputs[name]
                            scaled = last.scaled(rounding.counted_share)
                            moments = input_moments(scaled, n_threads)
                            stack.callback(moments.free)
                        patch = _round(base, delta, name, plain[name], moments, rounding, n_threads)
                        result.add(name, patch)
                    bar.update(math.prod(delta.changed[name]))
    return result


def _enough(examples: Sequence[Example]) -> Sequence[Example]:
    """The first rows, as many as it takes to record the inputs of."""
    ends = np.cumsum([len(example.tokens) for example in examples])
    return examples[: int(np.searchsorted(ends, _READ)) + 1]


def _portions(base: GgufFile, delta: Delta) -> Iterator[list[str]]:
    """Tensors whose inputs are in memory together."""
    portion: list[str] = []
    sizes: dict[str, int] = {}
    for name, (_, n_cols) in delta.changed.items():
        if not can_round(base.tensors[name].type) or n_cols > _MAX_COLUMNS:
            continue
        first = re.sub(r"attn_[kv]\.", "attn_q.", name.replace("ffn_gate.", "ffn_up."))
        size = {first: 4 * MAX_SAMPLES * n_cols}  # these read the same
        if portion and sum((sizes | size).values()) > _MAX_BYTES:
            yield portion
            portion, sizes = [], {}
        portion.append(name)
        sizes |= size
    if portion:
        yield portion


def can_round(kind: GGMLQuantizationType) -> bool:
    """Whether tensors of a type are worth a choice of codes."""
    layout = layout_of(kind)
    return layout is not None and len(layout.levels) <= _MAX_LEVELS


def _requantize(
    base: GgufFile, delta: Delta, name: str, tuned_weight: float, n_threads: int | None
) -> Patch:
    kind, raw = base.tensors[name].type, base.raw(name)
    n_rows, n_cols = delta.changed[name]
    patches = []
    for first, last in row_parts(n_rows, n_cols, _TOGETHER):
        start = first * n_cols
        if name in delta.low_rank:
            target = _tuned_rows(base, delta, name, (first, last))
            patch = requantize_whole(raw[first:last], kind, target, n_threads=n_threads)
        else:
            indices, theta = delta.entries(name, (first, last))
            if not indices.size:
                continue
            patch = requantize(
                raw[first:last],
                kind,
                indices - start,
                theta,
                tuned_weight=tuned_weight,
                n_threads=n_threads,
            )
        patches.append(replace(patch, ids=patch.ids + start // block_of(kind)[0]))
    return Patch(
        np.concatenate([patch.ids for patch in patches]),
        np.concatenate([patch.blocks for patch in patches]),
        sum(patch.tuned_error for patch in patches),
        sum(patch.other_error for patch in patches),
    )


def _tuned_rows(base: GgufFile, delta: Delta, name: str, rows: tuple[int, int]) -> F32:
    """Wanted values of some rows, (n_rows, n_cols)."""
    values = base.dequantize(name, np.arange(*rows))
    delta.add_to(name, rows, values)
    return values


def _round(
    base: GgufFile,
    delta: Delta,
    name: str,
    plain: Patch,
    moments: Moments,
    rounding: Rounding,
    n_threads: int,
) -> Patch:
    starts = [
        plain if weight == TUNED_WEIGHT else _requantize(base, delta, name, weight, n_threads)
        for weight in rounding.tuned_weights
    ]
    blocks, output_error = choose_codes(
        plain.ids,
        [start.blocks for start in starts],
        base.tensors[name].type,
        _targets(base, delta, name, plain.ids),
        moments,
        ridge=rounding.ridge,
    )
    return replace(plain, blocks=blocks, output_error=output_error)


def _targets(base: GgufFile, delta: Delta, name: str, ids: NDArray[np.int64]) -> F32:
    """Wanted values of some blocks, (n, block); of all where the tensor gets a product."""
    block, block_bytes = block_of(base.tensors[name].type)
    n_rows, n_cols = delta.changed[name]
    values = np.empty((len(ids), block), np.float32)
    if name in delta.low_rank:
        whole = values.reshape(n_rows, n_cols)
        for first, last in row_parts(n_rows, n_cols, _TOGETHER):
            whole[first:last] = _tuned_rows(base, delta, name, (first, last))
        return values
    stored = base.raw(name).reshape(-1, block_bytes)
    values[:] = dequantize_rows(stored[ids], base.tensors[name].type)
    indices, theta = delta.entries(name)
    values.reshape(-1)[np.searchsorted(ids, indices // block) * block + indices % block] += theta
    return values
