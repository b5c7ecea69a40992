"""New bytes for the touched blocks of every tuned tensor, by several ways of rounding.

`requantize` alone keeps single weights close; with a sample of inputs, `code_search` then makes the
remaining errors cancel in the outputs. The ways differ little on average, but each leaves an error
of its own, whose effect on the loss only measuring tells; so merge may try more than one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.activations import MAX_SAMPLES, InputSample, sample_inputs
from zo_gguf.code_search import choose_codes
from zo_gguf.dataset import Example
from zo_gguf.delta import Delta
from zo_gguf.gguf_file import GgufFile, dequantize_rows
from zo_gguf.quant_layout import layout_of
from zo_gguf.requantize import TUNED_WEIGHT, Patch, block_of, requantize

_MAX_BYTES = 1 << 30  # of inputs in memory
_MAX_COLUMNS = 16384  # wider matrices have too large second moments
_MAX_LEVELS = 64  # finer types have no error worth a search


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


# Measured on tiny-llama at Q4_0 and Q4_K_M: see tools/LOG.md.
ROUNDINGS = (
    Rounding((TUNED_WEIGHT,), ridge=0.1, counted_share=0.3),
    Rounding((1.5, 5.0, 30.0, 300.0), ridge=0.03, counted_share=0.3),
    Rounding((3.0, TUNED_WEIGHT), ridge=0.1, counted_share=0.5),
)


def plain_patches(base: GgufFile, delta: Delta, n_threads: int | None) -> dict[str, Patch]:
    """For every tuned tensor, the new bytes of its touched blocks within its own type.

    Raises:
        ZoError: A tensor's type can neither be searched nor quantized to.
    """
    return {name: _requantize(base, delta, name, TUNED_WEIGHT, n_threads) for name in delta.changed}


def rounded_patches(
    base: GgufFile,
    delta: Delta,
    plain: Mapping[str, Patch],
    examples: Sequence[Example],
    rounding: Rounding,
    n_threads: int | None,
) -> dict[str, Patch]:
    """The same blocks with codes that suit the tuned model's inputs on some rows.

    Args:
        base: The GGUF that was tuned.
        delta: What was learned.
        plain: From `plain_patches`; kept where the inputs are not known or the type is fine enough.
        examples: The rows.
        rounding: How.
        n_threads: Worker threads.
    """
    result = dict(plain)
    portions = list(_portions(base, delta))
    n = sum(map(len, portions))
    with tqdm(total=n, desc="choosing codes", unit="matrix", disable=None, leave=False) as bar:
        for names in portions:
            inputs = sample_inputs(base, delta, names, examples, n_threads=n_threads)
            for name in names:
                if name in inputs:
                    result[name] = _round(
                        base, delta, name, plain[name], inputs[name], rounding, n_threads
                    )
                bar.update(1)
    return result


def _portions(base: GgufFile, delta: Delta) -> Iterator[list[str]]:
    """Tensors whose inputs are in memory together."""
    portion: list[str] = []
    n_bytes = 0
    for name, (_, n_cols) in delta.changed.items():
        if not can_round(base.tensors[name].type) or n_cols > _MAX_COLUMNS:
            continue
        size = 4 * MAX_SAMPLES * n_cols
        if portion and n_bytes + size > _MAX_BYTES:
            yield portion
            portion, n_bytes = [], 0
        portion.append(name)
        n_bytes += size
    if portion:
        yield portion


def can_round(kind: GGMLQuantizationType) -> bool:
    """Whether tensors of a type are worth a choice of codes."""
    layout = layout_of(kind)
    return layout is not None and len(layout.levels) <= _MAX_LEVELS


def _requantize(
    base: GgufFile, delta: Delta, name: str, tuned_weight: float, n_threads: int | None
) -> Patch:
    return requantize(
        base.raw(name),
        base.tensors[name].type,
        *delta.entries(name),
        tuned_weight=tuned_weight,
        n_threads=n_threads,
    )


def _round(
    base: GgufFile,
    delta: Delta,
    name: str,
    plain: Patch,
    inputs: InputSample,
    rounding: Rounding,
    n_threads: int | None,
) -> Patch:
    layout = layout_of(base.tensors[name].type)
    assert layout is not None
    starts = [
        plain if weight == TUNED_WEIGHT else _requantize(base, delta, name, weight, n_threads)
        for weight in rounding.tuned_weights
    ]
    target = _targets(base, delta, name, plain.ids)
    blocks, output_error = choose_codes(
        plain.ids,
        [start.blocks for start in starts],
        layout,
        target,
        inputs.scaled(rounding.counted_share),
        ridge=rounding.ridge,
    )
    return replace(plain, blocks=blocks, output_error=output_error)


def _targets(
    base: GgufFile, delta: Delta, name: str, ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Wanted values of some blocks, (n, block)."""
    kind = base.tensors[name].type
    block, block_bytes = block_of(kind)
    values = dequantize_rows(base.raw(name).reshape(-1, block_bytes)[ids], kind)
    indices, theta = delta.entries(name)
    position = np.searchsorted(ids, indices // block) * block + indices % block
    values.reshape(-1)[position] += theta
    return values
