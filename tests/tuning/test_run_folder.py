"""What a run's folder says of its files, and that it notices when they change."""

import dataclasses
import hashlib
import importlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zo_gguf.cli import main
from zo_gguf.config import InfoConfig, MergeConfig, ReplayConfig, TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.methods import METHODS, start
from zo_gguf.tuning.options import settle
from zo_gguf.tuning.run import Run
from zo_gguf.verbs.info import info
from zo_gguf.verbs.merge import merge
from zo_gguf.verbs.replay import replay
from zo_gguf.verbs.tune import resume, tune

N_STEPS = 4
STARTED = [name for name, method in METHODS.items() if method.start]


def options(tiny_export: SimpleNamespace, data: Path, run: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(tiny_export.model("Q4_0")),
        "data": str(data),
        "output": str(run),
        "method": "norm",
        "iters": N_STEPS,
        "directions": 2,
        "eps": 0.05,
        "learning_rate": 0.02,
        "valid_every": 2,
        "valid_rows": 4,
        "threads": 1,
    } | more


@pytest.fixture(scope="module")
def finished(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run, started in a folder that holds rows of something else."""
    run = tmp_path_factory.mktemp("runs") / "run"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "unrelated.jsonl").write_text("{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        tune(TuneConfig(**options(tiny_export, task_dir, run)))
    return run


def test_a_damaged_delta_is_made_anew_by_replay(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, out = tmp_path / "run", tmp_path / "again.safetensors"
    shutil.copytree(finished, run)
    good = Delta.load(finished)
    damaged = bytearray((run / "delta.safetensors").read_bytes())
    damaged[-3] ^= 1
    (run / "delta.safetensors").write_bytes(damaged)
    assert main(["replay", str(run)]) == 0
    assert "its checksum differs" in caplog.text
    assert main(["replay", str(run), "-o", str(out)]) == 0
    again = Delta.load(out)
    np.testing.assert_array_equal(again.theta, good.theta)
    assert again.header.provenance["step"] == good.header.provenance["step"]


def test_hashes_are_those_of_the_files_that_made_the_run(
    finished: Path, tiny_export: SimpleNamespace, task_dir: Path
) -> None:
    hashes = json.loads((finished / "env.json").read_text())["sha256"]
    files = [tiny_export.model("Q4_0"), task_dir / "train.jsonl", task_dir / "valid.jsonl"]
    expected = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert hashes == expected


def test_its_files_are_not_written_over(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("trajectory.bin", "config.yaml", "checkpoints/best.safetensors"):
        with pytest.raises(ZoError, match="is an input"):
            replay(ReplayConfig(run=str(run), output=str(run / name), overwrite=True))
        for source in (run, run / "delta.safetensors"):
            with pytest.raises(ZoError, match="is an input"):
                merge(MergeConfig(run=str(source), output=str(run / name), overwrite=True))
    with pytest.raises(ZoError, match="is an input"):
        merge(MergeConfig(run=str(run), output=str(run / "delta.safetensors"), overwrite=True))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    delta = run / "delta.safetensors"
    delta.unlink()
    replay(ReplayConfig(run=str(run), output=str(delta)))
    replay(ReplayConfig(run=str(run), output=str(delta), overwrite=True))
    np.testing.assert_array_equal(Delta.load(run).theta, Delta.load(finished).theta)


def test_other_bases_of_subspaces_are_noticed(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    tune(TuneConfig(**options(tiny_export, task_dir, run, method="subspace", refresh=2)))
    assert replay(ReplayConfig(run=str(run))).identical
    delta, file = Delta.load(run), run / "delta.safetensors"
    name, product = next(iter(delta.low_rank.items()))
    other = dataclasses.replace(product, left=np.nextafter(product.left, np.float32(9)))
    dataclasses.replace(delta, low_rank=delta.low_rank | {name: other}).save(file)
    assert replay(ReplayConfig(run=str(run))).identical is False
    subspace_module = importlib.import_module("zo_gguf.tuning.methods.subspace")
    basis = subspace_module._basis
    monkeypatch.setattr(subspace_module, "_basis", lambda *given: -basis(*given))
    for again in (lambda: replay(ReplayConfig(run=str(run))), lambda: resume(run)):
        with pytest.raises(ZoError, match="bases_sha256"):
            again()


def test_best_is_taken_where_nothing_else_is_left(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    best = Delta.load(run / "checkpoints" / "best.safetensors")
    for name in ("delta", "checkpoints/latest"):
        (run / f"{name}.safetensors").unlink()
    np.testing.assert_array_equal(Delta.load(run).theta, best.theta)


@pytest.mark.parametrize("method", [*STARTED, "sensitive+norm", "block-scale+lora"])
def test_info_on_a_delta_of_every_method(
    method: str, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    dense = {"train": "norm"} if method == "dense" else {}
    config = settle(TuneConfig(**options(tiny_export, task_dir, tmp_path, method=method, **dense)))
    delta: Delta = start(config, GgufFile(config.model))
    delta.save(tmp_path / "d.safetensors")
    result = info(InfoConfig(path=str(tmp_path / "d.safetensors")))
    facts = json.loads(result.render(as_json=True))
    assert facts["weights"] == delta.nnz
    assert facts["tensors"] == len({*delta.tensors, *delta.edits, *delta.low_rank}) > 0
    assert ("sparse" in facts["kinds"]) == bool(delta.tensors)
    assert result.render()


def test_info_on_a_run(finished: Path) -> None:
    facts = json.loads(info(InfoConfig(path=str(finished))).render(as_json=True))
    assert facts["steps_done"] == N_STEPS
    assert facts["delta.safetensors"]["weights"] > 0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_changed_rows_are_noticed(
    split: str, finished: Path, task_dir: Path, tmp_path: Path
) -> None:
    run, rows = tmp_path / "run", tmp_path / "task"
    shutil.copytree(finished, run)
    shutil.copytree(task_dir, rows)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(task_dir), str(rows)))
    resume(run)  # the same rows at another place
    lines = (rows / f"{split}.jsonl").read_text().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    (rows / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ZoError, match=r"rows_sha256.*put the original mask, data"):
        resume(run)


@pytest.fixture
def older(finished: Path, tmp_path: Path) -> Path:
    """A run folder as zo-gguf 0.1 left it: another magic number, and options that are gone."""
    run = tmp_path / "older"
    shutil.copytree(finished, run)
    trajectory = run / "trajectory.bin"
    trajectory.write_bytes(b"ZOTRAJ2\n" + trajectory.read_bytes()[8:])
    config = run / "config.yaml"
    config.write_text(config.read_text() + "curvature: false\nadjust: false\n")
    return run


def test_a_run_of_an_older_version_says_which(older: Path) -> None:
    before = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    for read in (
        lambda: resume(older),
        lambda: replay(ReplayConfig(run=str(older))),
        lambda: info(InfoConfig(path=str(older))),
    ):
        with pytest.raises(ZoError, match=r"was begun by zo-gguf 0\.1; resume and replay it with"):
            read()
    with pytest.raises(ZoError, match=r"was written by zo-gguf 0\.1"):
        info(InfoConfig(path=str(older / "trajectory.bin")))
    assert before == {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}


def test_the_delta_of_an_older_run_is_merged(
    older: Path, tiny_export: SimpleNamespace, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"run": str(older), "threads": 1}
    merged, base = str(tmp_path / "m.gguf"), str(tiny_export.model("Q4_0"))
    with pytest.raises(ZoError, match="is not recorded; give it with -m"):
        merge(MergeConfig(**given, output=merged))
    assert merge(MergeConfig(**given, output=merged, model=base)).output.is_file()
    own = str(older / "metrics.jsonl")
    with pytest.raises(ZoError, match="input"):
        merge(MergeConfig(**given, output=own, model=base, overwrite=True))


def test_units_of_what_is_not_trained_are_refused(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    given = options(tiny_export, task_dir, tmp_path / "r", method="sensitive+norm", unit=["norm=2"])
    with pytest.raises(ZoError, match=r"unit 'norm' is no kind.*those: sparse, gain"):
        tune(TuneConfig(**given))
    assert not (tmp_path / "r").exists()


def test_a_run_without_validation_rows_merges_unmeasured(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged.gguf"
    tune(TuneConfig(**options(tiny_export, task_dir / "train.jsonl", run, val_split=0.0)))
    result = merge(MergeConfig(run=str(run), output=str(merged), threads=1))
    assert "Nothing was measured" in result.render()
    assert GgufFile(merged).tensors.keys() == GgufFile(tiny_export.model("Q4_0")).tensors.keys()


def test_what_verbs_print_as_json(
    finished: Path,
    tiny_export: SimpleNamespace,
    task_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["replay", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    assert main(["tune", "--resume", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == N_STEPS
    files = ["-m", str(tiny_export.model("Q4_0")), "--data", str(task_dir), "-t", "1"]
    assert main(["plan", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_step"] > 0
    assert main(["plan", *files, "--method", "norm", "--mask", "m"]) == 2
    assert "--mask is for --method sensitive, not norm" in capsys.readouterr().err


def test_validations_in_a_log_have_their_step(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tune(TuneConfig(**options(tiny_export, task_dir, tmp_path / "r")))
    text = capfd.readouterr().err
    for step in range(0, N_STEPS + 1, 2):
        assert f"step {step}: valid loss " in text


def test_models_with_recurrent_layers_are_refused(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    for kind in ("recurrent", "hybrid"):
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, f"llama_model_is_{kind}", lambda model: True)
            with pytest.raises(ZoError, match="has recurrent layers"):
                tune(TuneConfig(**options(tiny_export, task_dir, tmp_path / "r")))
    assert np.isfinite(tune(TuneConfig(**options(tiny_export, task_dir, tmp_path / "r"))).best_loss)


def test_the_default_rate_does_not_depend_on_eps(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    rates = set()
    for eps in (0.001, "auto"):
        run = tmp_path / str(eps)
        more = {"eps": eps, "learning_rate": None, "iters": 1, "max_seq_length": 16}
        tune(TuneConfig(**options(tiny_export, task_dir, run, **more)))
        config = Run.open(run).config
        rates.add(config.learning_rate)
        assert config.eps == eps or eps == "auto"
    assert len(rates) == 1


def test_patience_stops_early(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_module, losses = importlib.import_module("zo_gguf.verbs.tune"), itertools.count(1)
    measure = tune_module.measure

    def ever_worse(*rows: Any, **given: Any) -> Any:
        return dataclasses.replace(measure(*rows, **given), loss=float(next(losses)))

    monkeypatch.setattr(tune_module, "measure", ever_worse)
    run = tmp_path / "run"
    result = tune(TuneConfig(**options(tiny_export, task_dir, run, iters=20, patience=2)))
    assert (result.best_step, result.steps) == (0, 4)
    assert resume(run).steps == 4


def test_weights_beyond_what_products_can_hold(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    given = options(tiny_export, task_dir, tmp_path / "r", method="sensitive", learning_rate=1e30)
    with pytest.raises(ZoError, match="No probe changes the loss of any row at step 2"):
        tune(TuneConfig(**given))
