"""Merged files: what may change in them, what survives, and what is refused."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import WORDS, key_bytes, random_delta, write_llama
from zo_gguf.config import MergeConfig
from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.merging import stock_eval
from zo_gguf.merging.patches import roundings
from zo_gguf.merging.result import Candidate, Retention
from zo_gguf.merging.stock import Measured, measure_stock
from zo_gguf.params.delta import Delta
from zo_gguf.verbs.merge import merge

merge_module = importlib.import_module("zo_gguf.verbs.merge")
STOCK_SCRIPT = Path(stock_eval.__file__)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnable_rows(base: Path, delta: Delta, path: Path, *, worst: bool = False) -> Path:
    """Rows with choices whose answers are the tuned model's, so that the delta lowers the loss.

    With `worst`, those that it makes least likely.
    """
    rng = np.random.default_rng(5)
    words = [word.strip() for word in WORDS]
    rows: list[dict[str, object]] = [
        {"prompt": " ".join(rng.choice(words, 4)), "choices": WORDS[:5], "answer": 0}
        for _ in range(24)
    ]
    with Engine(base, delta=delta, n_threads=1, ctx_tokens=256) as engine:
        losses = []
        for answer in range(5):
            trial = write_rows(path, [{**row, "answer": answer} for row in rows])
            losses.append(engine.losses(load_examples(trial, engine))[0])
    answers = (np.argmax if worst else np.argmin)(losses, axis=0)
    best = [{**row, "answer": int(k)} for row, k in zip(rows, answers, strict=True)]
    return write_rows(path, best)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A Q4_0 base, a delta for it and rows on which the delta is better."""
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base.gguf", Type.Q4_0, organization="us", description="")
    delta = random_delta(GgufFile(base), among="blk.1.", scale=1.0)
    delta.save(folder / "delta.safetensors")
    rows = learnable_rows(base, delta, folder / "valid.jsonl")
    return base, folder / "delta.safetensors", rows


@pytest.fixture(autouse=True)
def two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain re-quantization and the first choice of codes."""
    monkeypatch.setattr(merge_module, "roundings", lambda delta: roundings(delta)[:1])


def config(made: tuple[Path, Path, Path], output: Path, **options: object) -> MergeConfig:
    base, delta, rows = made
    defaults = {"model": str(base), "data": str(rows), "threads": 1}
    return MergeConfig(run=str(delta), output=str(output), **{**defaults, **options})


# ---- the merged file -----------------------------------------------------------------------------


def test_same_types(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "tuned.gguf"
    result = merge(config(made, output, type="keep"))
    base, merged, delta = GgufFile(made[0]), GgufFile(output), Delta.load(made[1])
    assert list(merged.tensors) == list(base.tensors)
    for name, info in base.tensors.items():
        assert (merged.tensors[name].type, merged.tensors[name].shape) == (info.type, info.shape)
        changed = (base.raw(name) != merged.raw(name)).reshape(-1, info.row_bytes)
        if name not in delta.tensors:
            assert not changed.any()
            continue
        blocks = np.flatnonzero(changed.reshape(-1, 18).any(axis=1))
        assert set(blocks) <= set(delta.tensors[name] // 32)
        row, col, theta = delta.as_rows(name)
        wanted = base.dequantize(name)[row, col] + theta
        error = merged.dequantize(name)[row, col] - wanted
        assert np.square(error).sum() < 0.01 * np.square(theta).sum()

    keys = [key for key in base.header.keys if not key.startswith("general.")]
    assert any(key.startswith("tokenizer.") for key in keys)
    for key in keys:
        assert key_bytes(merged, key) == key_bytes(base, key)
    assert list(merged.header.keys)[: len(base.header.keys)] == list(base.header.keys)
    assert merged.metadata("general.name") == "tuned"
    assert merged.metadata("general.base_model.0.name") == "tiny"
    assert merged.metadata("general.base_model.0.organization") == "us"
    assert merged.metadata("zo_gguf.base.sha256") == base.sha256()
    assert json.loads(merged.metadata("zo_gguf.provenance")) == {"step": 3, "seed": 0}
    assert result.growth == 1.0
    assert result.chosen.promoted == {}


def test_what_survives_is_measured(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "tuned.gguf"
    result = merge(config(made, output))
    assert result.base is not None
    assert result.tuned is not None
    assert result.merged is not None
    assert result.tuned.loss < result.base.loss - 0.05
    gain = result.base.loss - result.tuned.loss
    assert result.retention == pytest.approx((result.base.loss - result.merged.loss) / gain)
    assert result.retention > 0.7
    assert result.merged.n == 24
    with Engine(made[0], delta=Delta.load(made[1]), n_threads=1, ctx_tokens=256) as engine:
        examples = load_examples(made[2], engine)
        assert result.tuned.loss == pytest.approx(engine.losses(examples).mean(), abs=2e-3)
    assert result.merged.loss == pytest.approx(measure_stock(output, examples).result.loss)

    written = json.loads((tmp_path / "tuned.gguf.merge.json").read_text())
    assert json.loads(result.render(as_json=True)) == written
    for name in ("base", "tuned", "merged"):
        assert written[f"loss_{name}"] == getattr(result, name).loss
        assert written[name]["n"] == written["n"] == 24
    assert written["retention"] == result.retention
    text = result.render()
    for part in ("base", "tuned", "merged", "retention", "growth", "llama-cli -m", "ollama create"):
        assert part in text
    assert sorted(os.listdir(tmp_path)) == ["tuned.gguf", "tuned.gguf.merge.json"]


def test_the_same_merge_gives_the_same_bytes(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "x.gguf", tmp_path / "b" / "x.gguf"
    for output in (one, two):
        merge(config(made, output))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("kind", "type_"), [("q8_0", Type.Q8_0), ("f16", Type.F16)])
def test_promotion(made: tuple[Path, Path, Path], tmp_path: Path, kind: str, type_: Type) -> None:
    result = merge(config(made, tmp_path / "x.gguf", type=kind))
    base, merged, delta = GgufFile(made[0]), GgufFile(tmp_path / "x.gguf"), Delta.load(made[1])
    for name, info in base.tensors.items():
        tuned = name in delta.tensors
        assert merged.tensors[name].type == (type_ if tuned else info.type)
        wanted = base.dequantize(name)
        if tuned:
            row, col, theta = delta.as_rows(name)
            wanted[row, col] += theta
        np.testing.assert_allclose(merged.dequantize(name), wanted, atol=0.03)
    sizes = [sum(info.n_bytes for info in file.tensors.values()) for file in (merged, base)]
    assert result.growth == pytest.approx(sizes[0] / sizes[1])
    assert result.growth > 1.3
    assert result.retention == pytest.approx(1, abs=0.05)


def test_auto_grows_only_as_far_as_it_must(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "RETENTION_GOAL", 2.0)  # out of reach: everything is tried
    result = merge(config(made, tmp_path / "x.gguf", max_growth=1.2))
    growths = [candidate.growth for candidate in result.tried]
    assert growths == sorted(growths)
    assert growths[0] == 1.0
    assert len(growths) == 3  # two ways of rounding, then promotions
    assert growths[-1] <= 1.2
    retentions = [candidate.retention.value for candidate in result.tried]
    assert result.retention == max(retentions)
    assert result.chosen.n_bytes == (tmp_path / "x.gguf").stat().st_size
    assert "No file within growth 1.2" in result.render()
    assert "--max-growth 1." in result.render()
    merged = GgufFile(tmp_path / "x.gguf")
    for name, kind in result.chosen.promoted.items():
        assert merged.tensors[name].type.name == kind


def test_without_rows_nothing_is_measured(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    result = merge(config(made, tmp_path / "x.gguf", data=None))
    assert result.retention is None
    assert result.base is result.tuned is result.merged is None
    assert result.growth == 1.0
    assert "Nothing was measured" in result.render()
    assert json.loads(result.render(as_json=True))["loss_merged"] is None


def test_no_gain_is_said(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data = learnable_rows(made[0], Delta.load(made[1]), tmp_path / "worse.jsonl", worst=True)
    result = merge(config(made, tmp_path / "x.gguf", data=str(data)))
    assert result.retention is None
    assert len(result.tried) == 1
    assert "not better than the base" in result.render()


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q8_0, Type.IQ4_NL], ids=lambda kind: kind.name)
def test_other_types_load(tmp_path: Path, kind: Type) -> None:
    base = write_llama(tmp_path / "base.gguf", kind)
    random_delta(GgufFile(base)).save(tmp_path / "d.safetensors")
    output = tmp_path / "x.gguf"
    merge(MergeConfig(run=str(tmp_path / "d.safetensors"), output=str(output), model=str(base)))
    assert GgufFile(output).path.stat().st_size == pytest.approx(base.stat().st_size, abs=2000)
    example = Example([1, 5, 6], [False, True, True])
    assert np.isfinite(measure_stock(output, [example], n_threads=1).losses).all()


def test_a_run_knows_its_base_and_rows(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    Delta.load(made[1]).save(run / "delta.safetensors")
    (run / "metrics.jsonl").touch()
    settings = f"model: {made[0]}\nmask: m\ndata: {made[2]}\noutput: {run}\nvalid_rows: 10\n"
    (run / "config.yaml").write_text(settings + "val_split: 0.5\n")
    result = merge(MergeConfig(run=str(run), output=str(tmp_path / "x.gguf"), threads=1))
    assert result.merged is not None
    assert result.merged.n == 10
    merged = GgufFile(tmp_path / "x.gguf")
    assert merged.metadata("general.finetune") == merged.metadata("zo_gguf.run") == "my-run"


def test_valid_rows_choose_and_test_rows_report(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = made[2].read_text().splitlines(keepends=True)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "valid.jsonl").write_text("".join(lines[:6]))
    (folder / "test.jsonl").write_text("".join(lines[6:10]))
    measured: list[tuple[int, float]] = []

    def stock(model: Path, examples: list[Example], **options: Any) -> Measured:
        result = measure_stock(model, examples, **options)
        if model != made[0]:
            measured.append((len(examples), result.result.loss))
        return result

    monkeypatch.setattr(merge_module, "measure_stock", stock)
    result = merge(config(made, tmp_path / "x.gguf", data=str(folder)))
    *chosen, (n_reported, loss) = measured
    assert [n for n, _ in chosen] == [6] * len(result.tried)
    assert n_reported == 4
    assert (result.rows, result.merged and result.merged.loss) == ("test", loss)
    tried = [candidate.measured for candidate in result.tried]
    assert [value and value.result.loss for value in tried] == [loss for _, loss in chosen]
    assert "over 4 test rows\n" in result.render() or result.retention is None
    assert json.loads((tmp_path / "x.gguf.merge.json").read_text())["rows"] == "test"

    alone = merge(config(made, tmp_path / "y.gguf", data=str(folder / "valid.jsonl")))
    assert alone.rows == "valid"
    assert alone.merged is not None
    assert alone.merged.n == 6


def test_a_file_settles_only_beyond_its_error() -> None:
    close = Candidate("c", {}, 1.0, 1, retention=Retention(0.99, 0.02))
    assert not close.settles(0.98)
    assert replace(close, retention=Retention(0.99, 0.005)).settles(0.98)


# ---- refusals ------------------------------------------------------------------------------------


def test_refusals(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, _ = made
    before = base.read_bytes()
    with pytest.raises(ZoError, match="is an input"):
        merge(config(made, base, overwrite=True))
    link = tmp_path / "link.gguf"
    link.symlink_to(base)
    with pytest.raises(ZoError, match="is an input"):
        merge(config(made, link, overwrite=True))
    taken = tmp_path / "taken.gguf"
    taken.write_text("precious")
    with pytest.raises(ZoError, match="exists"):
        merge(config(made, taken))
    assert taken.read_text() == "precious"
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(made[1].read_bytes())
    with pytest.raises(ZoError, match="is an input"):
        merge(config((base, lone, made[2]), lone, overwrite=True))
    with pytest.raises(ZoError, match=r"cannot be written .*choose another -o"):
        merge(config(made, taken / "x.gguf"))
    with pytest.raises(ZoError, match="is a folder"):
        merge(config(made, tmp_path))
    with pytest.raises(ZoError, match="give it with -m"):
        merge(config(made, tmp_path / "x.gguf", model=None))
    other = write_llama(tmp_path / "other.gguf", Type.Q4_0, seed=1)
    with pytest.raises(ZoError, match="was made for"):
        merge(config(made, tmp_path / "x.gguf", model=str(other)))
    with pytest.raises(ZoError):
        merge(config(made, tmp_path / "x.gguf", data=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "x.gguf").exists()
    assert base.read_bytes() == before
    merge(config(made, taken, overwrite=True, data=None))
    assert GgufFile(taken).architecture == "llama"


def test_a_failure_leaves_nothing_behind(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "x.gguf"

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "_measured", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(config(made, output))
    assert list(output.parent.iterdir()) == []


def test_drafts_of_killed_merges_are_removed(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    dead, alive = f".x.gguf.{killed.pid}.draft", f".x.gguf.{os.getppid()}.best"
    others = {f"x.gguf.{killed.pid}.draft", f".y.gguf.{killed.pid}.draft"}
    for name in (dead, alive, *others):
        (tmp_path / name).touch()
    merge(config(made, tmp_path / "x.gguf", data=None))
    left = {path.name for path in tmp_path.iterdir()}
    assert dead not in left
    assert {alive, "x.gguf"} | others < left
