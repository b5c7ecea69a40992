"""Merging a delta that touches every block: matrix by matrix, part by part, patches in a file."""

import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.tiny_gguf import packed, random_delta, write_llama
from zo_gguf import merge_patches
from zo_gguf.delta import Delta, DeltaHeader
from zo_gguf.edits import LowRank, Products
from zo_gguf.gguf_file import GgufFile
from zo_gguf.gguf_write import NewTensor, write_gguf
from zo_gguf.merge_patches import PatchFile, plain_patches
from zo_gguf.requantize import Patch, requantize, row_parts

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


@pytest.mark.parametrize("among", ["sparse", "product"])
def test_entries_of_some_rows(tmp_path: Path, among: str) -> None:
    if among == "sparse":
        base = GgufFile(write_llama(tmp_path / "base.gguf"))
        delta = random_delta(base)
    else:
        base = matrices(tmp_path / "base.gguf", 1)
        delta = low_rank(base)
    for name, (n_rows, _) in delta.changed.items():
        edges = [0, 1, n_rows // 3, n_rows // 3, n_rows]
        parts = [delta.entries(name, rows) for rows in pairwise(edges)]
        whole = delta.entries(name)
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole[0])
        joined = np.concatenate([part[1] for part in parts])
        np.testing.assert_allclose(joined, whole[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K, Type.IQ4_XS, Type.F16])
def test_parts_give_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type
) -> None:
    base = GgufFile(write_llama(tmp_path / "base.gguf", kind))
    delta = random_delta(base)
    monkeypatch.setattr(merge_patches, "_TOGETHER", 1 << 13)  # 32 rows, many without entries
    patches = plain_patches(base, delta, tmp_path, 1)
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
        plain_patches(base, delta, folder, 1)
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
    patch_bytes = N_WEIGHTS // 32 * (18 + 8)  # new blocks and where they lie
    assert in_parts < at_once / 4
    assert peak_bytes(larger, tmp_path) < in_parts + patch_bytes / 2


def test_patches_in_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)

    def patch(n: int, error: float | None) -> Patch:
        blocks = rng.integers(0, 256, (n, 18), dtype=np.uint8)
        return Patch(np.arange(n), blocks, 0.5 * n, 2.0, error)

    patches = {"a": patch(3, None), "b": patch(1000, 0.25), "c": patch(1, 0.0)}
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
    if os.name == "posix":
        assert not list(tmp_path.iterdir())  # what a kill would leave


def test_rows_of_parts() -> None:
    assert row_parts(5, 10, 20) == [(0, 2), (2, 4), (4, 5)]
    assert row_parts(2, 10, 3) == [(0, 1), (1, 2)]
    assert row_parts(7, 1, 1 << 20) == [(0, 7)]
