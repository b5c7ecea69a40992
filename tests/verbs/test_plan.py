"""`plan`: numbers that add up, nothing written, and a refusal of what cannot fit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from zo_gguf.cli import main
from zo_gguf.config import TuneConfig
from zo_gguf.errors import DoesNotFitError, ZoError
from zo_gguf.tuning.run import Run
from zo_gguf.verbs.plan import plan
from zo_gguf.verbs.tune import tune


def config(tiny_export: SimpleNamespace, task_dir: Path, run: Path) -> TuneConfig:
    return TuneConfig(
        model=str(tiny_export.model("Q4_0")),
        method="sensitive",
        data=str(task_dir),
        output=str(run),
        threads=1,
    )


def test_parts_add_up_and_nothing_is_written(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    result = plan(config(tiny_export, task_dir, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    parts = result.weights + result.engine + result.trainable + result.optimizer + result.passing
    assert result.total == parts
    assert result.trainable == 40 * 6256  # as the head of methods/sensitive.py says
    assert result.optimizer == pytest.approx(8 * 6256, abs=64)  # adam
    assert result.seconds > 500 * result.seconds_per_step
    assert result.tokens_per_step > 32 * 4
    assert result.probes_per_decode == 1
    assert result.fastest in (1, 2, 4, 8, 16, 32)
    assert 0 <= result.saved < 1
    table = result.render()
    assert "not used (-ngl 0)" in table
    assert json.loads(result.render(True))["disk"] == result.disk


PEAK = """
import sys
from zo_gguf.cli import main
assert main(sys.argv[1:]) == 0
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
@pytest.mark.parametrize(("method", "quant"), [("dense", "F16"), ("lora", "Q4_0")])
def test_the_memory_of_many_weights_is_foretold(
    method: str, quant: str, tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    """More than the norms take, so that what Python and the engine take cancels out."""
    foretold, taken = [], []
    fixed = {"estimator": "spsa", "eps": 1e-3, "learning_rate": 1e-6, "iters": 2, "valid_rows": 4}
    fixed |= {"targets": "answers", "examples_per_step": 4}
    for name in ("norm", method):
        given = config(tiny_export, task_dir, tmp_path / name)
        rank = {"rank": 64} if name == "lora" else {}
        model = str(tiny_export.model(quant))
        options = {"model": model, "mask": "", "method": name, "sides": None, "directions": None}
        given = dataclasses.replace(given, **options, **fixed, **rank)
        foretold.append(plan(given).total)
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in (fixed | rank).items()]
        flags += ["-m", model, "--data", str(task_dir), "-t", "1", "-o", str(tmp_path / name)]
        command = [sys.executable, "-c", PEAK, "tune", "--method", name, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken.append(int(done.stdout.split()[-1]) << 10)
    assert foretold[1] - foretold[0] == pytest.approx(taken[1] - taken[0], rel=0.2)


def test_one_width_saves_nothing(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    given = config(tiny_export, task_dir, tmp_path / "run")
    result = plan(dataclasses.replace(given, ctx_tokens=130, max_seq_length=120))
    assert (result.probes_per_decode, result.fastest, result.saved) == (1, 1, 0)
    assert "less time" not in result.render()


def test_bases_of_subspaces_count(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    given = config(tiny_export, task_dir, tmp_path / "run")
    options = {"method": "subspace", "mask": "", "rank": 16, "refresh": 50, "iters": 500}
    given = dataclasses.replace(given, **options, directions=2)
    result = plan(given)
    bases = 8 * 4 * 160 * (4 * (256 + 256) + 3 * (256 + 688))  # bytes of at most so many values
    assert bases < result.trainable < 2.5 * bases  # here, and in libzo
    assert result.disk > 3 * 0.5 * bases


def test_too_large_a_model_is_refused(
    tiny_export: SimpleNamespace,
    task_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = SimpleNamespace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(DoesNotFitError, match="smaller quantization"):
        plan(config(tiny_export, task_dir, tmp_path / "run"))
    flags = ["-m", str(tiny_export.model("Q4_0")), "--data", str(task_dir), "--dry-run"]
    assert main(["tune", *flags]) == 3
    assert "smaller quantization" in capsys.readouterr().err


def test_what_tune_refuses_is_refused(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    given = config(tiny_export, task_dir, tmp_path / "run")
    mask = str(tiny_export.mask("Q4_0"))
    given = dataclasses.replace(given, method="norm", mask=mask)
    for verb in (plan, tune):
        with pytest.raises(ZoError, match="--mask is for --method sensitive, not norm"):
            verb(given)


def test_too_small_a_disk_is_refused(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFitError, match="of disk"):
        plan(config(tiny_export, task_dir, tmp_path / "run"))


def test_tune_measures_how_many_probes_share_a_decode_and_records_it(
    tiny_export: SimpleNamespace,
    task_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = config(tiny_export, task_dir, tmp_path / "run")
    options = {"iters": 1, "directions": 2, "eps": 0.05, "valid_rows": 4}
    tune(dataclasses.replace(given, probes_per_decode="auto", **options))
    chosen = Run.open(tmp_path / "run").config.probes_per_decode
    assert chosen in (1, 2, 4)
    assert f"{chosen} probe" in capsys.readouterr().err
