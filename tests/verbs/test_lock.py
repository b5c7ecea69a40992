"""A run folder has one user at a time, and is free again however that one ends."""

import dataclasses
import importlib
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.system import locked

tune_module = importlib.import_module("zo_gguf.verbs.tune")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")


def test_a_run_in_progress_is_left_alone(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = TuneConfig(
        model=str(tiny_export.model("Q4_0")),
        data=str(task_dir),
        output=str(run),
        iters=2,
        eps=0.05,
        learning_rate=0.02,
        valid_rows=4,
        threads=1,
    )
    tune_module.tune(config)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with locked(run, "run folder"):
        with pytest.raises(ZoError, match=r"Another zo-gguf works in the run folder '.*run'; wait"):
            tune_module.resume(run)
        with pytest.raises(ZoError, match="Another zo-gguf works"):
            tune_module.tune(dataclasses.replace(config, overwrite=True))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    tune_module.resume(run)  # free again


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom zo_gguf.system import locked\n"
        "with locked(sys.argv[1], 'folder'):\n    print('has it', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        with pytest.raises(ZoError, match="Another zo-gguf works"), locked(tmp_path, "folder"):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path, "folder"):
        pass
