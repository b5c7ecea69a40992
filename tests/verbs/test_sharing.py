"""The machine is shared: threads that wait let others run, and busy neighbours are spoken of."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.verbs.test_tune import arguments
from zo_gguf import system
from zo_gguf.config import TuneConfig
from zo_gguf.system import Neighbours, sleep_at_barriers, usable_cores
from zo_gguf.verbs.tune import tune


class TestBarriers:
    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}),
            ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
            ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ],
    )
    def test_what_the_user_says_counts(
        self, given: dict[str, str], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(system.os, "environ", dict(given))
        sleep_at_barriers()
        assert system.os.environ == wanted

    def test_the_command_line_decides_before_openmp_is_loaded(self) -> None:
        program = (
            "import os, sys; from zo_gguf.cli import main\n"
            "loaded = [m for m in ('llama_cpp', 'torch', 'sklearn') if m in sys.modules]\n"
            "assert not loaded, loaded\n"
            "os.environ.clear(); main(['--version']); print(os.environ['GOMP_SPINCOUNT'])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.split()[-1] == "1000", done.stderr


class TestNeighbours:
    def watch(self, n_threads: int, loads: list[float]) -> list[str | None]:
        """What is said when others keep `loads` cores busy, a second apart."""
        passed, total = 0.0, 5.0
        watch = Neighbours(
            n_threads, 1.0, lambda: passed, lambda: (total, 3.0 + passed * n_threads)
        )
        said = []
        for load in loads:
            passed += 1
            total += load + n_threads
            said.append(watch.look())
        return said

    @pytest.fixture(autouse=True)
    def two_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "_cores", lambda: {0, 1})

    def test_said_once_where_cores_are_taken(self) -> None:
        first, second, third = self.watch(2, [0.1, 0.9, 0.9])
        assert first is None
        assert second is not None
        assert "0.9 of 2 cores" in second
        assert third is None

    def test_not_where_a_core_is_left_for_others(self) -> None:
        assert self.watch(1, [1.0, 1.2]) == [None, None]
        assert self.watch(1, [1.9])[0] is not None

    def test_short_bursts_are_not_looked_at(self) -> None:
        passed, total = 0.0, 0.0
        watch = Neighbours(2, 30.0, lambda: passed, lambda: (total, 0.0))
        passed, total = 10.0, 20.0
        assert watch.look() is None
        passed = 31.0  # 20 CPU seconds in all that time
        assert watch.look() is not None

    def test_a_run_speaks_of_them(
        self,
        tiny_export: SimpleNamespace,
        task_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(Neighbours, "look", lambda self: "They are busy.")
        options = arguments(tiny_export, task_dir, tmp_path / "run", iters=1)
        tune(TuneConfig(**options))
        assert "They are busy." in capsys.readouterr().err


def test_busy_time_is_that_of_all_programs_on_these_cores() -> None:
    """A child that computes counts for the machine and not for this process."""
    program = "import time; end = time.process_time() + .3\nwhile time.process_time() < end: pass"
    before, own_before = system._busy()
    subprocess.run([sys.executable, "-c", program], check=True)
    after, own = system._busy()
    assert after - before >= 0.28
    assert own - own_before < 0.25


def test_usable_cores_are_those_of_the_process() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system binds no process to cores")
    every = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(every)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, every)
    assert usable_cores() == len(every) <= (psutil.cpu_count() or 1)
