"""Where a tensor's trainable values lie in its bytes: block scales, or weights of float ones."""

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import FLOATS, Field
from zo_gguf.params.kinds import Live

Vector = NDArray[np.float32]
_STORAGE = {Type.F32: 0, Type.F16: 1, Type.BF16: 2}  # zo_storage
_F16 = 1
_OWN_SCALES = (Type.MXFP4, Type.NVFP4)


def scale_offsets(kind: Type) -> tuple[int, ...]:
    """Bytes at which a block's f16 scales lie: the step, then the minimum where there is one.

    Raises:
        ZoError: The type has no such scales.
    """
    layout = layout_of(kind)
    if kind in _OWN_SCALES:
        raise ZoError(
            f"The scales of {kind.name} are powers of two or 8-bit floats, too coarse to be tuned; "
            "use --method sensitive, or leave these tensors out with --train."
        )
    if layout is None:
        raise ZoError(
            f"Tensors of type {kind.name} have no block scales that can be tuned; use --method "
            "sensitive, or leave them out with --train."
        )
    return (layout.d_byte,) if layout.min_byte is None else (layout.d_byte, layout.min_byte)


def has_scales(kind: Type) -> bool:
    """Whether `block-scale` can tune a type."""
    return kind not in _OWN_SCALES and layout_of(kind) is not None


def base_scales(gguf: GgufFile, name: str) -> Vector:
    """The f16 scales of a quantized tensor as f32, (n_blocks * per_block,), block by block."""
    kind = gguf.tensors[name].type
    blocks = gguf.raw(name).reshape(-1, GGML_QUANT_SIZES[kind][1])
    parts = [np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2") for at in scale_offsets(kind)]
    return np.concatenate(parts, axis=1).astype(np.float32).reshape(-1)


def scale_resolution(gguf: GgufFile, name: str) -> float:
    """The relative change that moves half of a tensor's scales: half a last bit, median.

    f16 has 11 significant bits, but below 6e-5, where most super-block scales of Q6_K lie, fewer.
    """
    base = np.abs(base_scales(gguf, name)).astype(np.float16)
    base = base[base > 0]
    last_bit = np.spacing(base).astype(np.float32) / base.astype(np.float32)
    return max(2.0**-11, float(np.median(last_bit)) / 2) if base.size else 2.0**-11


def base_weights(gguf: GgufFile, name: str) -> Vector:
    """All weights of a float tensor as f32, flat.

    Raises:
        ZoError: The tensor is quantized.
    """
    kind = gguf.tensors[name].type
    if kind not in _STORAGE:
        raise ZoError(
            f"The tensor {name!r} is quantized to {kind.name}, so its weights cannot be edited one "
            "by one; choose float tensors with --train, or another --method."
        )
    return gguf.dequantize(name).reshape(-1).astype(np.float32)


def field_of(gguf: GgufFile, name: str, live: Live) -> tuple[Field, NDArray[np.float32] | None]:
    """The native description of a tensor's values, and the array that it points to.

    Raises:
        ZoError: The tensor's type does not fit, or it has another number of values.
    """
    kind = gguf.tensors[name].type
    block_bytes = GGML_QUANT_SIZES[kind][1]
    base = base_scales(gguf, name) if live.kind == "scale" else None
    if live.kind == "weight" and kind not in _STORAGE:
        base_weights(gguf, name)  # says what is wrong
    offsets = scale_offsets(kind) if live.kind == "scale" else (0,)
    if live.kind == "weight":
        block_bytes = GGML_QUANT_SIZES[kind][1] // GGML_QUANT_SIZES[kind][0]
    if gguf.tensors[name].n_bytes // block_bytes * len(offsets) != live.n_values:
        raise ZoError(f"The delta has {live.n_values} values for {name!r}, which has others.")
    field = Field()
    field.n_values, field.block_bytes, field.n_per_block = live.n_values, block_bytes, len(offsets)
    field.offset[: len(offsets)] = offsets
    field.storage = _F16 if live.kind == "scale" else _STORAGE[kind]
    field.relative, field.limit = live.relative, live.limit
    if base is not None:
        field.base = base.ctypes.data_as(FLOATS)
    return field, base


def live_bytes(gguf: GgufFile, name: str, live: Live, values: Vector) -> NDArray[np.uint8]:
    """The tensor's bytes with other values in it, in the shape of `GgufFile.raw`.

    Args:
        values: float32 (n_values,), as `InPlace.values` gives them.
    """
    kind, raw = gguf.tensors[name].type, gguf.raw(name)
    if live.kind == "weight":
        return float_bytes(values, kind).reshape(raw.shape)
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()
    offsets = scale_offsets(kind)
    scales = values.astype("<f2").reshape(-1, len(offsets))
    for k, at in enumerate(offsets):
        blocks[:, at : at + 2] = np.ascontiguousarray(scales[:, k : k + 1]).view(np.uint8)
    return blocks.reshape(raw.shape)


def float_bytes(values: Vector, kind: Type) -> NDArray[np.uint8]:
    """Values as a float type of ggml stores them: F32, F16 or BF16."""
    if kind != Type.BF16:
        return values.astype("<f4" if kind == Type.F32 else "<f2").view(np.uint8)
    bits: NDArray[np.uint32] = values.astype("<f4").view("<u4")
    odd = np.bitwise_and(bits >> np.uint32(16), np.uint32(1))
    nearest = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)  # ties to even
    return np.asarray(nearest, "<u2").view(np.uint8)
