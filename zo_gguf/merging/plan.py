"""The files that a merge may write: which tuned tensors keep their type and which are promoted.

Sizes are known without writing. Which plan is taken is decided in `merge`, by measuring.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.engine.quantize import quantize_blocks
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile, TensorInfo
from zo_gguf.gguf_files.write import NewTensor, Value, copy_gguf
from zo_gguf.merging.requantize import TUNED_WEIGHT, Patch, row_parts
from zo_gguf.params.delta import Delta

_TARGETS = ("q8_0", "f16")
_FLOATS = (Type.F16, Type.F32, Type.BF16, Type.F64)
_TOGETHER = 1 << 20  # weights that are numbers at once when a whole tensor is written anew


@dataclass(frozen=True)
class Plan:
    """One possible output.

    Attributes:
        label: How people are told about it.
        promoted: Tuned tensors that get a finer type; all others keep theirs.
        n_bytes: Tensor data of the whole file.
        growth: n_bytes over the base's.
        way: How the tensors that keep their type are rounded: 0 is plain re-quantization, a higher
            one chooses codes by the inputs, see `merging.patches`.
    """

    label: str
    promoted: Mapping[str, Type]
    n_bytes: int
    growth: float
    way: int = 0


def plan_keep(base: GgufFile, way: int = 0) -> Plan:
    """Same types, same size."""
    labels = ["same types", "same types, codes by inputs"]
    label = labels[way] if way < len(labels) else f"{labels[1]}, way {way}"
    return Plan(label, {}, _data_bytes(base, {}), 1.0, way)


def plan_all(base: GgufFile, delta: Delta, target: Type) -> Plan:
    """Every tuned tensor that is coarser than `target` promoted to it."""
    promoted = {
        name: kind
        for name in delta.changed
        if (kind := _finer_type(base.tensors[name], target)) is not None
    }
    return _plan(base, f"all tuned tensors at {target.name}", promoted)


def plan_some(
    base: GgufFile, patches: Mapping[str, Patch], everything: Plan, max_growth: float
) -> Plan:
    """As many promotions of `everything` as `max_growth` allows, those that gain most per byte."""
    gain_per_byte = {}
    for name, kind in everything.promoted.items():
        error = _error(patches[name])
        extra = _bytes_at(base.tensors[name], kind) - base.tensors[name].n_bytes
        gain_per_byte[name] = error / max(extra, 1)
    limit = max_growth * _data_bytes(base, {})
    chosen: dict[str, Type] = {}
    for name in sorted(gain_per_byte, key=lambda name: -gain_per_byte[name]):
        trial = {**chosen, name: everything.promoted[name]}
        if _data_bytes(base, trial) <= limit:
            chosen = trial
    kinds = "/".join(sorted({kind.name for kind in chosen.values()}))
    return _plan(base, f"{len(chosen)} of {len(patches)} tuned tensors at {kinds}", chosen)


def _error(patch: Patch) -> float:
    if patch.output_error is not None:
        return patch.output_error
    return TUNED_WEIGHT * patch.tuned_error + patch.other_error


def plans(
    base: GgufFile,
    delta: Delta,
    patches: Callable[[int], Mapping[str, Patch]],
    kind: str,
    max_growth: float,
    n_ways: int,
) -> Iterator[Plan]:
    """Possible outputs, smallest first, those of one size by the time that they take.

    Args:
        base: The file that was tuned.
        delta: What was learned.
        patches: New bytes of the tensors that may keep their type, by a way of rounding.
        kind: "keep", "q8_0" or "f16" for that one, "auto" for all within `max_growth`.
        max_growth: Only limits "auto".
        n_ways: Ways of rounding that may be tried.
    """
    if kind in _TARGETS:
        yield plan_all(base, delta, Type[kind.upper()])
        return
    for way in range(n_ways):
        yield plan_keep(base, way)
    if kind == "keep":
        return
    way = min(1, n_ways - 1)
    for target in (Type.Q8_0, Type.F16):
        everything = plan_all(base, delta, target)
        if everything.growth > max_growth:
            some = plan_some(base, patches(way), everything, max_growth)
            if some.promoted:
                yield replace(some, way=way)
            return
        if everything.promoted:
            yield replace(everything, way=way)


def kept_tensors(base: GgufFile, delta: Delta, kind: str) -> list[str]:
    """The tuned tensors that keep their types in some plan of a kind."""
    promoted = plan_all(base, delta, Type[kind.upper()]).promoted if kind in _TARGETS else {}
    return [name for name in delta.changed if name not in promoted]


def missing_growth(base: GgufFile, delta: Delta) -> str:
    """What it would take to promote everything, as a clause for the user."""
    everything = plan_all(base, delta, Type.Q8_0)
    if not everything.promoted:
        everything = plan_all(base, delta, Type.F16)
    if not everything.promoted:
        return "there is no finer type to promote the tuned tensors to"
    return f"{everything.label} would take --max-growth {np.ceil(everything.growth * 100) / 100:g}"


def write_plan(
    base: GgufFile,
    delta: Delta,
    patches: Mapping[str, Patch],
    plan: Plan,
    path: Path,
    keys: Mapping[str, Value | None],
) -> None:
    """Write the output of a plan, atomically; one tensor is in memory at a time.

    Tensors that have no patch and are not promoted keep their bytes.

    Raises:
        DoesNotFitError: The disk is too small.
    """
    new = {}
    for name in delta.changed:
        info = base.tensors[name]
        kind = plan.promoted.get(name)
        if kind is not None:
            make = _Promotion(base, name, kind, delta)
            new[name] = NewTensor(name, info.shape, kind, make)
        elif name in patches:
            same = partial(_patched, base, name, patches)
            new[name] = NewTensor(name, info.shape, info.type, same)
    if any(kind not in _FLOATS for kind in plan.promoted.values()):
        keys = {"general.quantization_version": 2, **keys}
    copy_gguf(base, path, replace=new, keys=keys)


def _patched(base: GgufFile, name: str, patches: Mapping[str, Patch]) -> NDArray[np.uint8]:
    return patches[name].apply(base.raw(name))


@dataclass(frozen=True)
class _Promotion:
    """Makes a tensor's bytes at a finer type: dequantized, theta added, quantized again."""

    base: GgufFile
    name: str
    kind: Type
    delta: Delta

    def __call__(self) -> NDArray[np.uint8]:
        n_rows, n_cols = self.base.tensors[self.name].shape
        parts = row_parts(n_rows, n_cols, _TOGETHER)
        return np.concatenate([self._rows(first, last, n_cols) for first, last in parts])

    def _rows(self, first: int, last: int, n_cols: int) -> NDArray[np.uint8]:
        values = self.base.dequantize(self.name, np.arange(first, last))
        self.delta.add_to(self.name, (first, last), values)
        if self.kind == Type.F16:
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise ZoError(
                    f"The values of {self.name!r} are too large for F16; use --type keep."
                )
            return values.astype("<f2").view(np.uint8)
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        blocks = quantize_blocks(values.reshape(-1, block), self.kind)
        return blocks.reshape(last - first, n_cols // block * block_bytes)


def _bits_per_weight(kind: Type) -> float:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * block_bytes / block)


def _finer_type(info: TensorInfo, target: Type) -> Type | None:
    """The type that `target` asks for, None where the tensor is as fine already."""
    if info.type in _FLOATS:
        return None
    if info.n_cols % GGML_QUANT_SIZES[target][0]:
        target = Type.F16  # rows that do not divide into blocks
    return target if _bits_per_weight(target) > _bits_per_weight(info.type) else None


def _bytes_at(info: TensorInfo, kind: Type) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(info.shape, dtype=np.int64)) // block * block_bytes


def _data_bytes(base: GgufFile, promoted: Mapping[str, Type]) -> int:
    return sum(
        _bytes_at(info, promoted[name]) if name in promoted else info.n_bytes
        for name, info in base.tensors.items()
    )


def _plan(base: GgufFile, label: str, promoted: Mapping[str, Type]) -> Plan:
    if not promoted:
        return plan_keep(base)
    total = _data_bytes(base, promoted)
    return Plan(label, promoted, total, total / _data_bytes(base, {}))
