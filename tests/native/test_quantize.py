"""Quantized weights chosen anew: steps against all half-precision ones, and wrong arguments."""

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_uint8
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import packed
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.libzo import BlockLayout, Moments, pointer, requantize_blocks
from zo_gguf.merging.native_layout import native_layout

ALONE = [Type.Q4_0, Type.Q5_0, Type.IQ4_NL]  # a step and no offset


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.name)
def test_steps_are_nearly_the_best_of_all(kind: Type) -> None:
    rng = np.random.default_rng(0)
    layout = layout_of(kind)
    assert layout is not None
    old = packed(rng.normal(0, 0.05, (1, 20 * 32)).astype(np.float32), kind)
    target = gguf.quants.dequantize(old, kind).reshape(-1, 32)
    target += rng.normal(0, 0.01, target.shape).astype(np.float32)
    weight = rng.uniform(0.5, 2, target.shape).astype(np.float32)
    raw = old.reshape(len(target), -1)
    found = requantize_blocks(native_library(), native_layout(kind), raw, target, weight, None, 2)
    errors = gguf.quants.dequantize(found, kind).reshape(target.shape) - target.astype(np.float64)
    levels = layout.levels.astype(np.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    steps = np.arange(1, 0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float64)
    best, got = [], []
    for values, weights, error in zip(target.astype(np.float64), weight, errors, strict=True):
        near = np.abs(values).max() / np.abs(levels).max()
        some = steps[(steps > 0.4 * near) & (steps < 1.3 * near)]
        some = np.concatenate([some, -some])[:, None]
        chosen = levels[np.searchsorted(middles, values / some)]
        best.append((weights * np.square(some * chosen - values)).sum(axis=1).min())
        got.append((weights * np.square(error)).sum())
    assert (np.array(got) > np.array(best) * (1 - 1e-4)).all()
    assert sum(got) < 1.03 * sum(best)


def test_only_touched_groups_change() -> None:
    rng = np.random.default_rng(1)
    raw = packed(rng.normal(0, 0.05, (4, 256)).astype(np.float32), Type.Q6_K)
    target = rng.normal(0, 0.05, (4, 256)).astype(np.float32)
    touched = np.zeros((4, 16), np.bool_)
    touched[1, 3] = touched[2] = True
    library, layout = native_library(), native_layout(Type.Q6_K)
    found = requantize_blocks(library, layout, raw, target, None, touched, 1)
    before, after = (
        gguf.quants.dequantize(part, Type.Q6_K).reshape(4, 16, 16) for part in (raw, found)
    )
    np.testing.assert_array_equal((before != after).any(axis=2), touched)


LAYOUT = native_layout(Type.Q4_K)
RAW = np.zeros((2, 144), np.uint8)
TARGET = np.zeros((2, 256), np.float32)
IDS = np.arange(2)
REQUANTIZE: dict[str, Any] = {
    "layout": ctypes.byref(LAYOUT),
    "n_blocks": 2,
    "n_raw": RAW.size,
    "raw": pointer(RAW, c_uint8),
    "n_target": TARGET.size,
    "target": pointer(TARGET, c_float),
    "weight": None,
    "n_touched": 16,
    "touched": pointer(np.ones(16, np.uint8), c_uint8),
    "n_threads": 1,
    "found": pointer(np.zeros_like(RAW), c_uint8),
}
CHOOSE: dict[str, Any] = {
    "layout": ctypes.byref(LAYOUT),
    "ridge": 0.1,
    "sweeps": 2,
    "n_blocks": 2,
    "ids": pointer(IDS, c_int64),
    "n_starts": 1,
    "n_raw": RAW.size,
    "starts": pointer(RAW, c_uint8),
    "n_target": TARGET.size,
    "target": pointer(TARGET, c_float),
    "n_threads": 1,
    "best": pointer(np.zeros_like(RAW), c_uint8),
    "output_error": pointer(np.zeros(1), c_double),
}
OUT_OF_RANGE = "null pointer or a number out of range"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"touched": None, "n_touched": 0}, ""),
        ({"layout": None}, OUT_OF_RANGE),
        ({"n_blocks": -1}, OUT_OF_RANGE),
        ({"n_threads": 0}, OUT_OF_RANGE),
        ({"found": None}, OUT_OF_RANGE),
        ({"raw": None}, "null pointer"),
        ({"target": None}, "null pointer"),
        ({"n_raw": 287}, "array of 287 values instead of 288"),
        ({"n_blocks": 3}, "array of 288 values instead of 432"),
        ({"n_target": 511}, "array of 511 values instead of 512"),
        ({"n_touched": 15}, "array of 15 values instead of 16"),
    ],
)
def test_arguments_of_requantize(changed: dict[str, Any], message: str) -> None:
    check("zo_requantize", (), REQUANTIZE | changed, message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"layout": None}, OUT_OF_RANGE),
        ({"ridge": 0.0}, OUT_OF_RANGE),
        ({"ridge": float("nan")}, OUT_OF_RANGE),
        ({"sweeps": -1}, OUT_OF_RANGE),
        ({"ids": None}, OUT_OF_RANGE),
        ({"best": None}, OUT_OF_RANGE),
        ({"output_error": None}, OUT_OF_RANGE),
        ({"ids": pointer(np.array([1, 1]), c_int64)}, "numbers of blocks must ascend"),
        ({"ids": pointer(np.array([-1, 1]), c_int64)}, "numbers of blocks must ascend"),
        ({"n_starts": 2}, "array of 288 values instead of 576"),
        ({"n_target": 0}, "array of 0 values instead of 512"),
        ({"starts": None}, "null pointer"),
    ],
)
def test_arguments_of_choose(changed: dict[str, Any], message: str) -> None:
    moments = Moments(native_library(), np.ones((3, 256), np.float32), 1)
    check("zo_moments_choose", (moments.handle,), CHOOSE | changed, message)
    moments.free()


def test_rows_must_be_whole_blocks() -> None:
    moments = Moments(native_library(), np.ones((3, 128), np.float32), 1)
    check("zo_moments_choose", (moments.handle,), CHOOSE, "no whole number of blocks")
    moments.free()


def check(function: str, before: tuple[Any, ...], given: dict[str, Any], message: str) -> None:
    if not message:
        native_library().call(function, *before, *given.values())
        return
    with pytest.raises(ZoError, match=message):
        native_library().call(function, *before, *given.values())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block", 0, "sizes out of range"),
        ("block", 512, "sizes out of range"),
        ("group", 24, "sizes out of range"),
        ("d_byte", 143, "scale outside of the block"),
        ("min_byte", 143, "scale outside of the block"),
        ("min_byte", -1, "sub-minima without a minimum"),
        ("levels", None, "needs levels and their codes"),
        ("code_bits", None, "one to eight places of bits"),
        ("n_code_bits", 9, "one to eight places of bits"),
        ("n_levels", 8, "a meaning for every code"),
        ("block_bytes", 140, "bits outside of the block"),
        ("scale_codes", None, "codes of its sub-scales"),
        ("codes", pointer(np.full(16, 3, np.int32), c_int32), "a code twice"),
        ("levels", pointer(np.zeros(16, np.float32), c_float), "do not ascend"),
    ],
)
def test_layouts_are_checked(field: str, value: Any, message: str) -> None:
    layout = BlockLayout.from_buffer_copy(LAYOUT)
    setattr(layout, field, value)
    check("zo_requantize", (), REQUANTIZE | {"layout": ctypes.byref(layout)}, message)


def test_moments_are_checked() -> None:
    library, x = native_library(), np.ones(6, np.float32)
    handle = ctypes.c_void_p()
    for sizes in ((0, 3), (2, 0), (-2, -3)):
        with pytest.raises(ZoError, match=OUT_OF_RANGE):
            library.call("zo_moments_init", ctypes.byref(handle), *sizes, 6, pointer(x, c_float), 1)
    with pytest.raises(ZoError, match="array of 5 values instead of 6"):
        library.call("zo_moments_init", ctypes.byref(handle), 2, 3, 5, pointer(x, c_float), 1)
    assert not handle
