"""Re-quantization of touched blocks, against float64 arithmetic on gguf's own dequantizer."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.helpers.block_codes import read_numbers, write_numbers
from tests.helpers.tiny_gguf import packed
from zo_gguf.engine.quantize import quantize_blocks
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.merging.requantize import TUNED_WEIGHT, block_of, requantize

FLOATS = [Type.F32, Type.F16, Type.BF16]
SIMPLE = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL]
GROUPED = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS]
LATTICE = [Type.IQ3_S, Type.MXFP4]
N_ROWS, N_COLS = 24, 512
WEIGHT = np.random.default_rng(1).normal(0, 0.05, (N_ROWS, N_COLS)).astype(np.float32)


def name(kind: Type) -> str:
    return kind.name


def some_entries(scale: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """About one entry in 250, some of them neighbours, with changes as tuning makes them."""
    rng = np.random.default_rng(2)
    indices = rng.choice(N_ROWS * N_COLS, 40, replace=False)
    indices = np.unique(np.concatenate([indices, indices[:8] + 1])) % (N_ROWS * N_COLS)
    return np.unique(indices), rng.normal(0, scale, len(np.unique(indices))).astype(np.float32)


def values_of(raw: NDArray[np.uint8], kind: Type) -> NDArray[np.float64]:
    return gguf.quants.dequantize(raw, kind).astype(np.float64).reshape(N_ROWS, N_COLS)


@pytest.mark.parametrize("kind", SIMPLE + GROUPED, ids=name)
def test_layout_reads_and_writes_what_gguf_reads(kind: Type) -> None:
    layout = layout_of(kind)
    assert layout is not None
    raw = packed(WEIGHT, kind).reshape(-1, block_of(kind)[1])
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    codes = read_numbers(bits, layout.code_bits)
    again = bits.copy()
    write_numbers(again, layout.code_bits, codes)
    np.testing.assert_array_equal(again, bits)
    # One code changed changes one weight, by the distance of the levels times the step.
    level = np.argsort(layout.codes)
    write_numbers(
        again, layout.code_bits, np.where(level[codes] > 0, layout.codes[level[codes] - 1], codes)
    )
    changed = np.packbits(again, axis=1, bitorder="little")
    before, after = (
        gguf.quants.dequantize(part, kind).reshape(codes.shape) for part in (raw, changed)
    )
    distance = np.diff(layout.levels, prepend=layout.levels[0])[level[codes]]
    moved = np.where(distance > 0, (before - after) / np.where(distance > 0, distance, 1), np.nan)
    per_group = moved.reshape(len(raw), layout.n_groups, layout.group)
    steps = np.nanmedian(per_group, axis=2, keepdims=True)
    np.testing.assert_allclose(
        np.where(np.isnan(per_group), steps, per_group),
        np.broadcast_to(steps, per_group.shape),
        rtol=1e-3,
    )


@pytest.mark.parametrize("scale", [0.02, 0.15], ids=["small", "large"])
@pytest.mark.parametrize("kind", SIMPLE + GROUPED + LATTICE, ids=name)
def test_requantize(kind: Type, scale: float) -> None:
    block = block_of(kind)[0]
    raw = packed(WEIGHT, kind)
    indices, theta = some_entries(scale)
    patch = requantize(raw, kind, indices, theta, n_threads=2)
    result = patch.apply(raw)
    assert result.shape == raw.shape

    # Only blocks with tuned entries may change.
    touched = np.unique(indices // block)
    np.testing.assert_array_equal(patch.ids, touched)
    same = np.setdiff1d(np.arange(N_ROWS * N_COLS // block), touched)
    stored, written = (part.reshape(-1, block_of(kind)[1]) for part in (raw, result))
    np.testing.assert_array_equal(written[same], stored[same])

    old, new = values_of(raw, kind), values_of(result, kind)
    target = old.copy()
    target.reshape(-1)[indices] += theta.astype(np.float64)
    tuned = np.zeros(old.shape, dtype=bool)
    tuned.reshape(-1)[indices] = True
    square = (new - target) ** 2
    assert patch.tuned_error == pytest.approx(square[tuned].sum(), rel=1e-3, abs=1e-9)
    assert patch.other_error == pytest.approx(square[~tuned].sum(), rel=1e-3, abs=1e-9)

    # Better than plain re-quantization of the same blocks, on the tuned entries and weighted.
    plain_blocks = quantize_blocks(
        target.reshape(-1, block).astype(np.float32),
        kind,
        np.ones((old.size // block, block), np.float32),
    )
    plain = values_of(plain_blocks.reshape(N_ROWS, -1), kind)
    mask = np.zeros(old.size // block, dtype=bool)
    mask[touched] = True
    inside = np.repeat(mask, block).reshape(old.shape)
    plain_square = np.where(inside, (plain - target) ** 2, 0)
    if kind not in LATTICE:  # their coarse lattices leave no choice but the weighted sum
        assert square[tuned].sum() <= plain_square[tuned].sum() + 1e-12
        assert square[tuned].sum() < 0.05 * np.square(theta).sum()
    weight = np.where(tuned, TUNED_WEIGHT, 1.0)
    assert (weight * square).sum() <= (weight * plain_square).sum() + 1e-12


@pytest.mark.parametrize("kind", GROUPED, ids=name)
def test_the_search_leaves_other_groups_alone(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_gguf.merging.requantize._GGML_WEIGHTS", ())
    layout = layout_of(kind)
    assert layout is not None
    raw = packed(WEIGHT, kind)
    old = values_of(raw, kind)
    indices = np.array([3, 3 * N_COLS + 40], dtype=np.int64)
    theta = np.full(2, 0.01, dtype=np.float32)
    new = values_of(requantize(raw, kind, indices, theta).apply(raw), kind)
    changed = np.unique(np.flatnonzero(new != old) // layout.group)
    assert len(changed) > 0
    assert set(changed) <= set(indices // layout.group)


@pytest.mark.parametrize("kind", FLOATS, ids=name)
def test_floats_are_edited_in_place(kind: Type) -> None:
    raw = packed(WEIGHT, kind)
    indices, theta = some_entries(0.1)
    result = requantize(raw, kind, indices, theta).apply(raw)
    old, new = values_of(raw, kind), values_of(result, kind)
    expected = old.copy()
    expected.reshape(-1)[indices] += theta
    rounded = values_of(packed(expected.astype(np.float32), kind), kind)
    np.testing.assert_array_equal(new, rounded)
    assert (new != old).sum() <= len(indices)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K], ids=name)
def test_no_change_keeps_the_bytes(kind: Type) -> None:
    raw = packed(WEIGHT, kind)
    indices, theta = some_entries(0.1)
    patch = requantize(raw, kind, indices, 0 * theta)
    np.testing.assert_array_equal(patch.apply(raw), raw)
    assert patch.tuned_error == patch.other_error == 0


def test_threads_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = packed(WEIGHT, Type.Q4_K)
    indices, theta = some_entries(0.1)
    one = requantize(raw, Type.Q4_K, indices, theta, n_threads=1)
    monkeypatch.setattr("zo_gguf.merging.requantize._CHUNK", 512)
    two = requantize(raw, Type.Q4_K, indices, theta, n_threads=3)
    np.testing.assert_array_equal(one.blocks, two.blocks)
    assert one.tuned_error == pytest.approx(two.tuned_error)


@pytest.mark.parametrize("kind", SIMPLE + GROUPED, ids=name)
def test_extreme_blocks(kind: Type) -> None:
    """All zeros, and changes far beyond the block's range, still land near their targets."""
    zeros = packed(np.zeros((N_ROWS, N_COLS), np.float32), kind)
    indices = np.array([5, N_COLS, 7 * N_COLS + 300], dtype=np.int64)
    theta = np.array([2.0, -3.0, 1e-3], dtype=np.float32)
    for raw in (zeros, packed(WEIGHT, kind)):
        old = values_of(raw, kind)
        new = values_of(requantize(raw, kind, indices, theta).apply(raw), kind)
        assert np.isfinite(new).all()
        wanted = old.reshape(-1)[indices] + theta
        np.testing.assert_allclose(new.reshape(-1)[indices], wanted, rtol=0.1, atol=0.02)


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ZoError, match="NVFP4"):
        requantize(np.zeros((1, 36), np.uint8), Type.NVFP4, np.array([0]), np.ones(1, np.float32))
