"""LoRA adapters: exact products of least rank, the best of a given rank, and what stock apps make
of them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import CACHE_ROUNDING, random_delta, write_llama
from zo_gguf.config import MergeConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.merging.stock import measure_stock
from zo_gguf.params import lora
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.lora import best_factors, check_lora, exact_factors, write_lora
from zo_gguf.params.select import line_cover
from zo_gguf.verbs.merge import merge

HEADER = DeltaHeader("base.gguf", "0" * 64)


def delta_of(dense: np.ndarray, name: str = "blk.0.attn_q.weight") -> Delta:
    indices = np.flatnonzero(dense).astype(np.int64)
    theta = dense.reshape(-1)[indices].astype(np.float32)
    return Delta({name: indices}, {name: dense.shape}, theta, HEADER)


def lines(n_rows: int, n_cols: int, rows: list[int], cols: list[int]) -> np.ndarray:
    rng = np.random.default_rng(4)
    dense = np.zeros((n_rows, n_cols), dtype=np.float32)
    for row in rows:
        dense[row, rng.choice(n_cols, 9, replace=False)] = rng.normal(size=9)
    for col in cols:
        dense[rng.choice(n_rows, 9, replace=False), col] = rng.normal(size=9)
    return dense


@pytest.mark.parametrize(
    ("rows", "cols"), [([3, 7], [1, 2, 30]), ([], [5]), ([0, 39], []), ([3], [3])]
)
def test_exact_factors(rows: list[int], cols: list[int]) -> None:
    dense = lines(40, 56, rows, cols)
    factors = exact_factors(delta_of(dense), "blk.0.attn_q.weight")
    np.testing.assert_array_equal(factors.b @ factors.a, dense)
    assert factors.rank == len(rows) + len(cols)
    assert factors.kept == 1


def test_an_entry_on_a_row_and_a_column_counts_once() -> None:
    dense = lines(30, 30, [4], [6])
    dense[4, 6] = 5
    factors = exact_factors(delta_of(dense), "blk.0.attn_q.weight")
    np.testing.assert_array_equal(factors.b @ factors.a, dense)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("exact_svd", [1024, 8], ids=["exact", "iterative"])
def test_best_factors(rank: int, exact_svd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_EXACT_SVD", exact_svd)
    monkeypatch.setattr(lora, "_OVERSAMPLING", 4)
    dense = np.where(np.random.default_rng(0).random((48, 64)) < 0.1, 1.0, 0.0)
    dense *= np.random.default_rng(1).normal(size=dense.shape)
    factors = best_factors(delta_of(dense), "blk.0.attn_q.weight", rank)
    u, s, v = np.linalg.svd(dense)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert factors.rank == rank
    error = np.linalg.norm(factors.b @ factors.a - dense)
    assert error == pytest.approx(np.linalg.norm(best - dense), rel=2e-3)
    assert factors.kept == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=2e-3)
    assert factors.exact_rank > rank


def test_enough_rank_is_exact() -> None:
    dense = lines(40, 56, [3], [1, 2])
    factors = best_factors(delta_of(dense), "blk.0.attn_q.weight", 8)
    assert factors.rank == 3
    np.testing.assert_array_equal(factors.b @ factors.a, dense)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(write_llama(tmp_path_factory.mktemp("lora") / "base.gguf", Type.F32))


EXAMPLES = [
    Example([1, *range(100 + i, 112 + i)], [False] * 4 + [True] * 9) for i in range(0, 120, 10)
]


def test_file_and_stock_loss(base: GgufFile, tmp_path: Path) -> None:
    delta = random_delta(base, rank=6)
    path = tmp_path / "adapter.gguf"
    summary = write_lora(base, delta, path, rank=None, keys={"zo_gguf.note": "x"})
    assert summary.kept == 1
    ranks = {
        name: sum(map(len, line_cover(delta.tensors[name], delta.shapes[name])))
        for name in delta.tensors
    }
    assert summary.rank == summary.exact_rank == max(ranks.values()) <= 6
    reader = gguf.GGUFReader(path)
    fields = {key: reader.fields[key].contents() for key in reader.fields if "." in key}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in delta.tensors:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape == (ranks[name], delta.shapes[name][1])
        row, col, value = delta.as_rows(name)
        np.testing.assert_array_equal((b @ a)[row, col], value)

    with Engine(base.path, delta=delta, n_threads=1, ctx_tokens=256) as engine:
        tuned = engine.losses(EXAMPLES)[0]
        engine.set_theta(0 * engine.theta())
        plain = engine.losses(EXAMPLES)[0]
    stock = measure_stock(base.path, EXAMPLES, lora=path, n_threads=1)
    assert abs(tuned - plain).max() > 0.1
    np.testing.assert_allclose(stock.losses, tuned, atol=CACHE_ROUNDING)
    assert stock.losses.mean() == pytest.approx(tuned.mean(), abs=CACHE_ROUNDING / 3)


def test_ranks_may_differ_between_tensors(base: GgufFile, tmp_path: Path) -> None:
    """alpha 0 must switch alpha / rank off in llama.cpp, or this could not be exact."""
    wide = random_delta(base, rank=6)
    keep = wide.tensors["blk.0.attn_q.weight"][:1]
    tensors = {**wide.tensors, "blk.0.attn_q.weight": keep}
    parts = {name: wide.theta[part] for name, part in wide.slices().items()}
    parts["blk.0.attn_q.weight"] = np.array([3.0], dtype=np.float32)
    theta = np.concatenate([parts[name] for name in tensors])
    delta = Delta(tensors, wide.shapes, theta, wide.header)
    write_lora(base, delta, tmp_path / "a.gguf", rank=None, keys={})
    with Engine(base.path, delta=delta, n_threads=1, ctx_tokens=256) as engine:
        tuned = engine.losses(EXAMPLES)[0]
    stock = measure_stock(base.path, EXAMPLES, lora=tmp_path / "a.gguf", n_threads=1)
    assert stock.losses.mean() == pytest.approx(tuned.mean(), abs=CACHE_ROUNDING / 3)


def test_merge_with_lora(base: GgufFile, tmp_path: Path) -> None:
    delta = random_delta(base, rank=8, scale=0.5)
    delta.save(tmp_path / "d.safetensors")
    rows = [{"prompt": f"ab {word}", "completion": " yes"} for word in ("one", "two", "red", "cd")]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"run": str(tmp_path / "d.safetensors"), "model": str(base.path), "lora": True,
              "threads": 1}  # fmt: skip
    output = tmp_path / "lora.gguf"
    result = merge(MergeConfig(output=str(output), data=str(tmp_path), **shared))
    assert result.lora is not None
    assert result.lora.kept == 1
    assert result.merged is not None
    assert result.tuned is not None
    assert result.merged.loss == pytest.approx(result.tuned.loss, abs=CACHE_ROUNDING)
    assert result.growth == 1 + output.stat().st_size / base.path.stat().st_size
    assert "(exact)" in result.render()
    assert "--lora" in result.render()
    assert GgufFile(output).metadata("zo_gguf.base.sha256") == base.sha256()

    result = merge(MergeConfig(output=str(tmp_path / "l2.gguf"), rank=2, **shared))
    assert result.lora is not None
    assert result.lora.rank == 2
    assert 0 < result.lora.kept < 1
    assert f"{result.lora.kept:.2%}" in result.render()
    assert json.loads(result.render(as_json=True))["lora"]["exact_rank"] == result.lora.exact_rank


def test_senseless_rank_is_refused(base: GgufFile, tmp_path: Path) -> None:
    delta = random_delta(base, rank=None, share=0.05)
    with pytest.raises(ZoError, match=r"would need rank \d+ .*--rank R"):
        write_lora(base, delta, tmp_path / "a.gguf", rank=None, keys={})
    assert not (tmp_path / "a.gguf").exists()
    assert write_lora(base, delta, tmp_path / "a.gguf", rank=4, keys={}).rank == 4


@pytest.mark.parametrize(
    ("architecture", "name", "words"),
    [
        ("llama", "token_embd.weight", "embeddings"),
        ("llama", "blk.0.attn_q.bias", "weight"),
        ("deepseek2", "blk.0.attn_kv_b.weight", "ignores"),
        ("minicpm3", "output.weight", "ignores"),
        ("rwkv6", "blk.0.time_mix_key.weight", "ignores"),
        ("kimi-linear", "blk.3.attn_q.weight", "ignores"),
        ("llama", "blk.0.ffn_up.weight", "scale"),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused(
    tmp_path: Path, architecture: str, name: str, words: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", architecture)
    writer.add_tensor(name, np.ones((8, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up.scale", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = delta_of(np.eye(8, 32, dtype=np.float32)[:1].repeat(8, axis=0), name)
    with pytest.raises(ZoError, match=words):
        check_lora(GgufFile(tmp_path / "b.gguf"), delta, None)


def test_ordinary_tensors_are_not_refused(base: GgufFile) -> None:
    check_lora(base, random_delta(base, rank=4), None)
