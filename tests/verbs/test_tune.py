"""A run as a user has it: it learns, survives kills, replays to the bit, and refuses bad files."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zo_gguf.config import ReplayConfig, TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask
from zo_gguf.verbs.replay import replay

tune_module = importlib.import_module("zo_gguf.verbs.tune")
N_STEPS, N_KILLS = 24, 4


def arguments(tiny_export: SimpleNamespace, task_dir: Path, run: Path, **options: Any) -> dict:
    return {
        "model": str(tiny_export.model("Q4_0")),
        "method": "sensitive",
        "data": str(task_dir),
        "output": str(run),
        "iters": N_STEPS,
        "estimator": "spsa",
        "examples_per_step": 4,
        "eps": 0.05,
        "learning_rate": 0.02,
        "valid_every": 8,
        "valid_rows": 8,
        "save_every": 5,
        "threads": 1,
        "seed": 7,
    } | options


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "zo_gguf", *words]


def flags(options: dict) -> list[str]:
    return [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def finished(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run with two directions per step."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    tune_module.tune(TuneConfig(**arguments(tiny_export, task_dir, run, directions=2)))
    return run


def bits(run: Path, name: str = "checkpoints/latest.safetensors") -> bytes:
    return (run / name).read_bytes()


def test_run_directory_is_complete(finished: Path) -> None:
    names = "config.yaml env.json metrics.jsonl trajectory.bin summary.json targets.safetensors"
    assert all((finished / name).stat().st_size > 0 for name in names.split())
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, N_STEPS + 1))
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 8, 16, 24]
    best = min((line for line in lines if "valid_loss" in line), key=lambda x: x["valid_loss"])
    assert Delta.load(finished).header.provenance["step"] == best["step"]
    hashes = json.loads((finished / "env.json").read_text())["sha256"]
    assert {len(value) for value in hashes.values()} == {64}


def test_theta_moved_as_the_trajectory_says(finished: Path, tiny_export: SimpleNamespace) -> None:
    """Adam written out in float64, from the recorded slopes and independent noise calls."""
    from zo_gguf.engine.engine import Engine
    from zo_gguf.tuning.trajectory import Trajectory

    mask = Mask.load(tiny_export.mask("Q4_0"))
    theta, m, v = mask.theta0().astype(np.float64), 0.0, 0.0
    with Engine(tiny_export.model("Q4_0"), delta=mask) as engine:
        for record in Trajectory.load(finished / "trajectory.bin").records():
            g = np.mean(
                [d.projected_grad * engine.noise(d.seed) for d in record.directions], axis=0
            )
            for d in record.directions:
                assert d.projected_grad == (d.loss_plus - d.loss_minus) / 0.1
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            t = record.step
            theta -= record.lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    latest = Delta.load(finished / "checkpoints" / "latest.safetensors")
    np.testing.assert_allclose(latest.theta, theta, atol=1e-5)
    assert np.abs(latest.theta - mask.theta0()).max() > 0.1


def test_same_seed_same_bits_other_seed_other_bits(
    finished: Path, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    for name, seed in (("again", 7), ("other", 8)):
        options = arguments(tiny_export, task_dir, tmp_path / name, directions=2, seed=seed)
        tune_module.tune(TuneConfig(**options))
    assert bits(tmp_path / "again") == bits(finished)
    assert bits(tmp_path / "again", "delta.safetensors") == bits(finished, "delta.safetensors")
    assert bits(tmp_path / "other") != bits(finished)


def test_kill_9_and_resume_gives_the_same_bits(
    finished: Path, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    options = arguments(tiny_export, task_dir, run, directions=2)
    start = time.monotonic()
    subprocess.run(command("tune", *flags(options)), check=True, capture_output=True)
    duration = time.monotonic() - start
    shutil.rmtree(run)
    moments = random.Random(0)
    process = subprocess.Popen(command("tune", *flags(options)), stderr=subprocess.DEVNULL)
    for _ in range(N_KILLS):
        time.sleep(moments.uniform(0.35, 0.95) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (run / "config.yaml").exists():  # killed before there was anything to resume
            process = subprocess.Popen(command("tune", *flags(options)), stderr=subprocess.DEVNULL)
        else:
            process = subprocess.Popen(
                command("tune", "--resume", str(run)), stderr=subprocess.DEVNULL
            )
    assert process.wait(timeout=300) == 0
    for name in ("delta.safetensors", "checkpoints/latest.safetensors", "trajectory.bin"):
        assert bits(run, name) == bits(finished, name), name


@pytest.mark.parametrize("torn", [3, 60])
def test_resume_after_a_torn_record_and_without_checkpoints(
    torn: int, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "torn"
    shutil.copytree(finished, run)
    (run / "delta.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    data = (run / "trajectory.bin").read_bytes()
    (run / "trajectory.bin").write_bytes(data[:-torn])
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics[: len(metrics) // 2])
    tune_module.resume(run)
    assert bits(run, "trajectory.bin") == data
    assert bits(run) == bits(finished)
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == N_STEPS


def test_resume_of_a_finished_run_changes_nothing(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "done"
    shutil.copytree(finished, run)
    tune_module.resume(run)
    assert bits(run, "delta.safetensors") == bits(finished, "delta.safetensors")
    assert bits(run, "trajectory.bin") == bits(finished, "trajectory.bin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_go_on(
    number: int, finished: Path, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "interrupted"
    options = arguments(tiny_export, task_dir, run, directions=2)
    process = subprocess.Popen(command("tune", *flags(options)), stderr=subprocess.PIPE, text=True)
    while not (run / "trajectory.bin").exists() or (run / "trajectory.bin").stat().st_size < 600:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert f"--resume {run}" in text
    assert "Traceback" not in text
    assert (run / "checkpoints" / "state.safetensors").is_file()
    tune_module.resume(run)
    assert bits(run, "delta.safetensors") == bits(finished, "delta.safetensors")


def test_replay_needs_no_model_and_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "replayed.safetensors"
    result = replay(ReplayConfig(run=str(finished), output=str(out)))
    assert result.identical
    assert out.read_bytes() == bits(finished, "delta.safetensors")
    last = replay(ReplayConfig(run=str(finished), step=N_STEPS))
    latest = Delta.load(finished / "checkpoints" / "latest.safetensors")
    assert np.array_equal(last.delta.theta.view(np.uint32), latest.theta.view(np.uint32))
    with pytest.raises(ZoError, match="was not reached"):
        replay(ReplayConfig(run=str(finished), step=N_STEPS + 1))
    with pytest.raises(ZoError, match="--overwrite"):
        replay(ReplayConfig(run=str(finished), output=str(out)))


def test_loss_falls_and_best_is_kept(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    options = arguments(
        tiny_export, task_dir, tmp_path / "learn", iters=150, examples_per_step=16, valid_rows=40
    )
    options |= {"valid_every": 50, "eps": "auto", "learning_rate": None, "threads": os.cpu_count()}
    result = tune_module.tune(TuneConfig(**options))
    assert result.base_loss - result.best_loss > 0.05
    text = (tmp_path / "learn" / "config.yaml").read_text()
    assert "auto" not in text  # the resolved numbers are recorded
    assert f"step {result.best_step}" in result.render()


class TestBadInput:
    """Every mistake gets a sentence with the fix, and costs nothing."""

    def test_folder_with_something_in_it(
        self, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        given = arguments(tiny_export, task_dir, tmp_path)
        with pytest.raises(ZoError, match=r"is not empty; give another -o, or --overwrite"):
            tune_module.tune(TuneConfig(**given))
        options = arguments(tiny_export, task_dir, tmp_path, iters=1, overwrite=True)
        tune_module.tune(TuneConfig(**options))
        with pytest.raises(ZoError, match=r"not empty; go on with .*--resume"):
            tune_module.tune(TuneConfig(**given))
        assert (tmp_path / "mine.txt").read_text() == "keep"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "sensitve"}, "did you mean 'sensitive'"),
            ({"optimizer": "adm"}, "did you mean 'adam'"),
            ({"model": "nowhere.gguf"}, r"nowhere\.gguf"),
            ({"mask": "nowhere.safetensors"}, r"nowhere\.safetensors"),
            ({"data": "nowhere.jsonl"}, r"nowhere\.jsonl"),
            (
                {"method": "norm", "mask": "m"},
                "--mask is for --method sensitive, not norm; leave it out",
            ),
        ],
    )
    def test_options(
        self,
        options: dict,
        message: str,
        tiny_export: SimpleNamespace,
        task_dir: Path,
        tmp_path: Path,
    ) -> None:
        given = TuneConfig(**arguments(tiny_export, task_dir, tmp_path / "r", **options))
        with pytest.raises(ZoError, match=message):
            tune_module.tune(given)
        # A mistake that is found before the first step leaves no folder in the way.
        assert not (tmp_path / "r").exists()

    def test_not_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ZoError, match="not a run folder"):
            tune_module.resume(tmp_path)

    def test_swapped_mask(
        self, finished: Path, tiny_export: SimpleNamespace, tmp_path: Path
    ) -> None:
        run = tmp_path / "swapped"
        shutil.copytree(finished, run)
        mask = Mask.load(tiny_export.mask("Q4_0"))
        changed = {name: value + np.float32(1e-3) for name, value in mask.residuals.items()}
        Mask(mask.tensors, changed, mask.shapes, mask.header).save(tmp_path / "m.safetensors")
        text = (run / "config.yaml").read_text()
        old = str(tiny_export.mask("Q4_0"))
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, str(tmp_path / "m.safetensors")))
        with pytest.raises(ZoError, match="theta0_sha256"):
            tune_module.resume(run)

    @pytest.mark.parametrize("name", ["trajectory.bin", "checkpoints/state.safetensors"])
    def test_damaged_files(self, name: str, finished: Path, tmp_path: Path) -> None:
        run = tmp_path / "damaged"
        shutil.copytree(finished, run)
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 0xFF
        data[10] ^= 0xFF
        (run / name).write_bytes(data)
        with pytest.raises(ZoError, match=r"damaged"):
            tune_module.resume(run)

    def test_loss_that_explodes(
        self, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
    ) -> None:
        options = arguments(tiny_export, task_dir, tmp_path / "r", learning_rate=3e38)
        for start in (lambda _: tune_module.tune(TuneConfig(**options)), tune_module.resume):
            with pytest.raises(ZoError, match="--learning-rate"):
                start(tmp_path / "r")
        assert Delta.load(tmp_path / "r" / "checkpoints" / "best.safetensors")
        assert replay(ReplayConfig(run=str(tmp_path / "r"))).step == 0  # the last good one
