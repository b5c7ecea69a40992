"""Trainable values in a tensor's bytes, for every type: block scales and float weights.

Offsets are written out from ggml-common.h's block structs; values are checked by gguf's own
dequantizer, which shares no code with what is tested.
"""

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import packed, write_llama
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile, dequantize_rows
from zo_gguf.libzo import InPlace
from zo_gguf.params.kinds import Live
from zo_gguf.params.scales import (
    base_scales,
    base_weights,
    field_of,
    has_scales,
    live_bytes,
    scale_offsets,
    scale_resolution,
)

OFFSETS = {
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
}
STORAGE = {Type.F32: 0, Type.F16: 1, Type.BF16: 2}
FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
ROWS, COLS = 5, 512
EXPERTS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    """A tensor of each type, named after it; also NAME.experts with three matrices."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("scales") / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in [*OFFSETS, *FLOATS, Type.MXFP4]:
        values = rng.standard_normal((ROWS, COLS)).astype(np.float32) + np.float32(0.3)
        writer.add_tensor(kind.name, packed(values, kind), raw_dtype=kind)
    for kind in (Type.Q4_1, Type.Q6_K):
        stack = rng.standard_normal((EXPERTS * 2, COLS)).astype(np.float32)
        rows = packed(stack, kind).reshape(EXPERTS, 2, -1)
        writer.add_tensor(f"{kind.name}.experts", rows, raw_dtype=kind)
    lattice = np.zeros((ROWS, COLS // 256 * GGML_QUANT_SIZES[Type.IQ2_S][1]), np.uint8)
    writer.add_tensor("IQ2_S", lattice, raw_dtype=Type.IQ2_S)
    writer.add_tensor("norm", rng.standard_normal(COLS).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def names() -> list[str]:
    return [*(kind.name for kind in OFFSETS), "Q4_1.experts", "Q6_K.experts"]


def kind_of(name: str) -> Type:
    return Type[name.split(".")[0]]


def scale_edit(base: GgufFile, name: str) -> Live:
    n_blocks = base.tensors[name].n_bytes // GGML_QUANT_SIZES[kind_of(name)][1]
    return Live("scale", n_blocks * len(OFFSETS[kind_of(name)]), relative=True)


@pytest.mark.parametrize("name", names())
def test_scales_are_read_block_by_block(base: GgufFile, name: str) -> None:
    kind = kind_of(name)
    assert scale_offsets(kind) == OFFSETS[kind]
    assert has_scales(kind)
    block_bytes = GGML_QUANT_SIZES[kind][1]
    raw, expected = base.raw(name).tobytes(), []
    for start in range(0, len(raw), block_bytes):
        expected += [np.frombuffer(raw, "<f2", 1, start + at)[0] for at in OFFSETS[kind]]
    scales = base_scales(base, name)
    assert scales.dtype == np.float32
    np.testing.assert_array_equal(scales, np.array(expected, np.float32))


@pytest.mark.parametrize("name", names())
def test_unchanged_scales_give_the_same_bytes(base: GgufFile, name: str) -> None:
    raw = base.raw(name)
    same = live_bytes(base, name, scale_edit(base, name), base_scales(base, name))
    assert same.shape == raw.shape
    np.testing.assert_array_equal(same, raw)


@pytest.mark.parametrize("name", names())
def test_doubled_scales_double_the_weights(base: GgufFile, name: str) -> None:
    doubled = live_bytes(base, name, scale_edit(base, name), 2 * base_scales(base, name))
    values = base.dequantize(name)
    assert np.abs(values).max() > 1
    np.testing.assert_array_equal(dequantize_rows(doubled, kind_of(name)), 2 * values)


@pytest.mark.parametrize("name", names())
def test_only_scale_bytes_change(base: GgufFile, name: str) -> None:
    kind, before = kind_of(name), base.raw(name).tobytes()
    values = base_scales(base, name) * np.float32(-1.7)
    values += np.random.default_rng(0).standard_normal(values.size).astype(np.float32)
    after = live_bytes(base, name, scale_edit(base, name), values)
    assert base.raw(name).tobytes() == before
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = after.reshape(-1, block_bytes)
    changed = blocks != np.frombuffer(before, np.uint8).reshape(-1, block_bytes)
    places = {at + k for at in OFFSETS[kind] for k in (0, 1)}
    assert set(np.flatnonzero(changed.any(axis=0))) == places
    stored = [
        np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0] for at in OFFSETS[kind]
    ]
    np.testing.assert_array_equal(np.stack(stored, axis=1).ravel(), values.astype(np.float16))


@pytest.mark.parametrize("kind", [k for k, offsets in OFFSETS.items() if len(offsets) == 2])
def test_a_step_and_its_minimum_are_told_apart(base: GgufFile, kind: Type) -> None:
    scales = base_scales(base, kind.name).reshape(-1, 2)
    edit = scale_edit(base, kind.name)

    def weights(step: float, minimum: float) -> np.ndarray:
        values = (scales * np.float32([step, minimum])).ravel()
        return dequantize_rows(live_bytes(base, kind.name, edit, values), kind).ravel()

    steps, minima = weights(1, 0), weights(0, 1)
    np.testing.assert_allclose(steps + minima, weights(1, 1), rtol=0, atol=1e-6)
    size = GGML_QUANT_SIZES[kind][0]
    assert len(np.unique(steps[:size])) > 2
    shared = 32 if kind in (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K) else 16
    assert (np.ptp(minima.reshape(-1, shared), axis=1) == 0).all()  # codes play no part in it


@pytest.mark.parametrize("name", names())
def test_the_native_field_describes_the_scales(base: GgufFile, name: str) -> None:
    kind, scales = kind_of(name), base_scales(base, name)
    n, edit = scales.size, Live("scale", scales.size, relative=True, limit=0.25)
    field, kept = field_of(base, name, edit)
    assert kept is not None
    assert (field.n_values, field.block_bytes) == (n, GGML_QUANT_SIZES[kind][1])
    assert tuple(field.offset[: field.n_per_block]) == OFFSETS[kind]
    assert (field.storage, field.relative, field.limit) == (STORAGE[Type.F16], True, 0.25)
    np.testing.assert_array_equal(np.ctypeslib.as_array(field.base, (n,)), scales)
    part = InPlace(native_library(), 1)
    part.add(name, field, base.tensors[name].n_bytes, np.ones(n, np.float32))
    np.testing.assert_array_equal(part.values(), 2 * scales)
    part.free()


@pytest.mark.parametrize("name", [*(kind.name for kind in FLOATS), "norm"])
def test_the_native_field_describes_float_weights(base: GgufFile, name: str) -> None:
    info = base.tensors[name]
    field, kept = field_of(base, name, Live("weight", math.prod(info.shape)))
    assert kept is None
    assert not field.base
    assert (field.n_per_block, field.offset[0], field.relative) == (1, 0, False)
    assert field.block_bytes == (4 if info.type == Type.F32 else 2)
    assert field.storage == STORAGE[info.type]
    assert math.isinf(field.limit)
    weights = base_weights(base, name)
    part = InPlace(native_library(), 1)
    part.add(name, field, info.n_bytes, weights)
    np.testing.assert_array_equal(part.values(), base.dequantize(name).ravel())
    part.free()


def float_values(kind: Type) -> np.ndarray:
    """ROWS * COLS values in reach of `kind`, a third of them halfway between two neighbours."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(ROWS * COLS) * 10.0 ** rng.integers(-7, 4, ROWS * COLS)
    third = values.size // 3
    if kind == Type.BF16:
        bits = values[:third].astype("<f4").view("<u4") & 0xFFFF0000 | 0x8000
        values[:third] = bits.view("<f4")
    elif kind == Type.F16:
        near = values[:third].astype(np.float16)
        values[:third] = (near.astype(np.float64) + np.nextafter(near, np.float16(0))) / 2
    values[-4:] = [0.0, -0.0, 1e-8, -65504.0]
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", FLOATS)
def test_float_weights_are_rounded_as_torch_rounds_them(base: GgufFile, kind: Type) -> None:
    values = float_values(kind)
    edit = Live("weight", values.size)
    result = live_bytes(base, kind.name, edit, values)
    assert result.shape == base.raw(kind.name).shape
    expected = torch.from_numpy(values).to(FLOATS[kind]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(result.ravel(), expected)
    same = live_bytes(base, kind.name, edit, base_weights(base, kind.name))
    np.testing.assert_array_equal(same, base.raw(kind.name))


def test_float_weights_of_one_dimension(base: GgufFile) -> None:
    values = np.arange(COLS, dtype=np.float32)
    result = live_bytes(base, "norm", Live("weight", COLS), values)
    assert result.tobytes() == values.tobytes()
    assert result.shape == base.raw("norm").shape


@pytest.mark.parametrize("kind", [Type.MXFP4, Type.NVFP4])
def test_types_with_scales_of_their_own_are_refused(kind: Type) -> None:
    assert not has_scales(kind)
    with pytest.raises(ZoError, match=rf"scales of {kind.name}.*too coarse.*--method sensitive"):
        scale_offsets(kind)


@pytest.mark.parametrize("kind", [*FLOATS, Type.IQ2_S, Type.TQ1_0])
def test_types_without_scales_are_refused(kind: Type) -> None:
    assert not has_scales(kind)
    with pytest.raises(ZoError, match=rf"type {kind.name} have no block scales.*--train"):
        scale_offsets(kind)


@pytest.mark.parametrize(
    "function",
    [
        base_scales,
        lambda base, name: field_of(base, name, Live("scale", 80)),
        lambda base, name: live_bytes(base, name, Live("scale", 80), np.ones(80, np.float32)),
    ],
)
@pytest.mark.parametrize("name", ["MXFP4", "F16", "IQ2_S"])
def test_scales_of_other_tensors_are_refused(
    base: GgufFile, function: Callable[..., object], name: str
) -> None:
    with pytest.raises(ZoError, match=name):
        function(base, name)


def test_single_weights_of_quantized_tensors_are_refused(base: GgufFile) -> None:
    with pytest.raises(ZoError, match=r"'Q4_0' is quantized to Q4_0.*--train"):
        base_weights(base, "Q4_0")
    with pytest.raises(ZoError, match=r"'Q4_0' is quantized to Q4_0.*--train"):
        field_of(base, "Q4_0", Live("weight", ROWS * COLS))


@pytest.mark.parametrize(
    ("name", "kind"), [("Q4_K", "scale"), ("Q8_0", "scale"), ("F16", "weight")]
)
@pytest.mark.parametrize("off", [-1, 1])
def test_another_number_of_values_is_refused(
    base: GgufFile, name: str, kind: str, off: int
) -> None:
    right = scale_edit(base, name).size if kind == "scale" else ROWS * COLS
    field_of(base, name, Live(kind, right))
    with pytest.raises(ZoError, match=rf"{right + off} values for '{name}'"):
        field_of(base, name, Live(kind, right + off))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q6_K])
def test_the_resolution_moves_half_of_the_scales(kind: Type, tmp_path: Path) -> None:
    gguf = GgufFile(write_llama(tmp_path / "m.gguf", kind))
    name = "blk.0.ffn_up.weight"
    base, least = base_scales(gguf, name), scale_resolution(gguf, name)
    assert least > 2.0**-11 if kind == Type.Q6_K else least == 2.0**-11

    def moved(change: float) -> float:
        return float(((base * np.float32(1 + change)).astype(np.float16) != base).mean())

    assert moved(1.1 * least) >= 0.5
    if kind == Type.Q6_K:
        assert moved(0.9 * least) <= 0.5
