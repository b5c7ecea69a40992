"""Merging a delta that touches every block: matrix by matrix, part by part, patches in a file."""

import os
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import packed, random_delta, write_llama
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.write import NewTensor, write_gguf
from zo_gguf.merging import patches as merge_patches
from zo_gguf.merging import plan as merge_plan
from zo_gguf.merging.patches import PatchFile, patch_bytes, plain_patches
from zo_gguf.merging.plan import plan_keep, write_plan
from zo_gguf.merging.requantize import Patch, requantize, row_parts
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import LowRank, Products

N_ROWS, N_COLS, RANK = 256, 512, 4
N_WEIGHTS = N_ROWS * N_COLS


def matrices(path: Path, n: int, kind: Type = Type.Q4_0) -> GgufFile:
    """A file of n random matrices."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.02, (N_ROWS, N_COLS)).astype(np.float32)
    raw = packed(values, kind)
    tensors = [NewTensor(f"w{i}.weight", (N_ROWS, N_COLS), kind, lambda: raw) for i in range(n)]
    write_gguf(path, [], tensors)
    return GgufFile(path)


def low_rank(base: GgufFile) -> Delta:
    """A LoRA on every matrix."""
    none = np.zeros((0, 0, 0), np.float32)
    products: Products = {
        name: LowRank("lora", N_ROWS, N_COLS, RANK, 2.0, 0, none, none) for name in base.tensors
    }
    n = sum(product.size for product in products.values())
    theta = np.random.default_rng(1).normal(0, 0.02, n).astype(np.float32)
    return Delta({}, {}, theta, DeltaHeader.of(base, "lora"), low_rank=products)


def with_sparse(delta: Delta) -> Delta:
    """The same with sparse entries beside the products."""
    rng = np.random.default_rng(3)
    tensors = {n: np.sort(rng.choice(N_WEIGHTS, 99, replace=False)) for n in delta.low_rank}
    sparse = rng.normal(0, 0.3, 99 * len(tensors)).astype(np.float32)
    shapes = dict.fromkeys(tensors, (N_ROWS, N_COLS))
    theta = np.concatenate([sparse, delta.theta])
    return replace(delta, tensors=tensors, shapes=shapes, theta=theta)


@pytest.mark.parametrize("kind", ["sparse", "product", "both"])
def test_entries_of_some_rows(tmp_path: Path, kind: str) -> None:
    if kind == "sparse":
        delta = random_delta(GgufFile(write_llama(tmp_path / "base.gguf")))
    else:
        delta = low_rank(matrices(tmp_path / "base.gguf", 1))
        delta = with_sparse(delta) if kind == "both" else delta
    for name, (n_rows, _) in delta.changed.items():
        edges = [0, 1, n_rows // 3, n_rows // 3, n_rows]
        parts = [delta.entries(name, rows) for rows in pairwise(edges)]
        whole = delta.entries(name)
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole[0])
        joined = np.concatenate([part[1] for part in parts])
        np.testing.assert_allclose(joined, whole[1], rtol=1e-5, atol=1e-7)


def test_promotion_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = matrices(tmp_path / "base.gguf", 1)
    delta = with_sparse(low_rank(base))
    (name,) = base.tensors
    monkeypatch.setattr(merge_plan, "_TOGETHER", 5 * N_COLS)
    plan = merge_plan.plan_all(base, delta, Type.F16)
    write_plan(base, delta, {}, plan, tmp_path / "out.gguf", {})
    expected = base.dequantize(name).astype(np.float64)
    indices, theta = delta.entries(name)
    expected.reshape(-1)[indices] += theta
    found = GgufFile(tmp_path / "out.gguf").dequantize(name)
    np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K, Type.IQ4_XS, Type.F16])
def test_parts_give_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type
) -> None:
    base = GgufFile(write_llama(tmp_path / "base.gguf", kind))
    delta = random_delta(base)
    monkeypatch.setattr(merge_patches, "_TOGETHER", 1 << 13)  # 32 rows, many without entries
    patches = plain_patches(base, delta, list(delta.tensors), tmp_path, 1)
    assert list(patches) == list(delta.tensors)
    for name, patch in patches.items():
        whole = requantize(
            base.raw(name), kind, *delta.entries(name), tuned_weight=100.0, n_threads=1
        )
        np.testing.assert_array_equal(patch.ids, whole.ids)
        np.testing.assert_array_equal(patch.apply(base.raw(name)), whole.apply(base.raw(name)))
        assert patch.tuned_error == pytest.approx(whole.tuned_error)
        assert patch.other_error == pytest.approx(whole.other_error)


def peak_bytes(base: GgufFile, folder: Path) -> int:
    """The most that numpy held while a LoRA was written into a model."""
    delta = low_rank(base)
    tracemalloc.start()
    try:
        patches = plain_patches(base, delta, list(base.tensors), folder, 1)
        write_plan(base, delta, patches, plan_keep(base), folder / "out", {})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, larger = (matrices(tmp_path / f"{n}.gguf", n) for n in (1, 8))
    at_once = peak_bytes(base, tmp_path)
    monkeypatch.setattr(merge_patches, "_TOGETHER", N_WEIGHTS // 8)
    in_parts = peak_bytes(base, tmp_path)
    assert in_parts < at_once / 4
    assert peak_bytes(larger, tmp_path) < in_parts + N_WEIGHTS // 32 * 18  # a matrix's blocks


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K])
def test_products_are_merged_within_the_room_that_is_asked_for(tmp_path: Path, kind: Type) -> None:
    base = matrices(tmp_path / "base.gguf", 3, kind)
    delta = low_rank(base)
    names = list(base.tensors)[1:]
    patches = plain_patches(base, delta, names, tmp_path, 1)
    assert list(patches) == names
    stored = patches._file.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
    room = patch_bytes(base, delta, names)
    assert room <= stored < room + 1000  # numpy's headers
    assert room == 2 * base.raw(names[0]).nbytes


def test_patches_in_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)

    def patch(ids: list[int], error: float | None) -> Patch:
        blocks = rng.integers(0, 256, (len(ids), 18), dtype=np.uint8)
        return Patch(np.array(ids), blocks, 0.5, 2.0, error)

    patches = {
        "a": patch([0, 1, 3], None), "b": patch([*range(1000)], 0.25), "c": patch([7], 0.0)
    }  # fmt: skip
    file = PatchFile(tmp_path)
    for name, given in patches.items():
        file.add(name, given)
    assert (list(file), len(file)) == (["a", "b", "c"], 3)
    for name in ("c", "a", "b", "a"):
        found, given = file[name], patches[name]
        np.testing.assert_array_equal(found.ids, given.ids)
        np.testing.assert_array_equal(found.blocks, given.blocks)
        assert found.blocks.dtype == np.uint8
        assert (found.tuned_error, found.other_error) == (given.tuned_error, given.other_error)
        assert found.output_error == given.output_error
    later = PatchFile(tmp_path, file)
    later.add("b", patches["c"])
    assert (list(later), len(later)) == (["a", "b", "c"], 3)
    assert [len(later[name].blocks) for name in later] == [3, 1, 1]
    assert not list(tmp_path.iterdir())  # what a kill would leave


def test_rows_of_parts() -> None:
    assert row_parts(5, 10, 20) == [(0, 2), (2, 4), (4, 5)]
    assert row_parts(2, 10, 3) == [(0, 1), (1, 2)]
    assert row_parts(7, 1, 1 << 20) == [(0, 7)]
