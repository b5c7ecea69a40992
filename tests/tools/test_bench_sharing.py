"""bench/sharing.py: what is fair, what its table says, and a run of one figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import sharing
from tools.bench.sharing import Beside, Way
from tools.gpu.model import Shape, write_model


@pytest.mark.parametrize(
    ("n_cores", "n_loops", "engine", "cores"),
    [
        (2, 0, False, 2.0),
        (2, 1, False, 1.0),
        (2, 2, False, 2 / 3),
        (2, 0, True, 1.0),
        (16, 1, False, 15.0),  # a loop uses one core
        (16, 2, True, 7.0),
    ],
)
def test_fair_share(n_cores: int, n_loops: int, engine: bool, cores: float) -> None:
    assert sharing.fair_share(n_cores, n_loops, engine) == pytest.approx(cores)


@pytest.mark.parametrize(
    ("waiting", "wanted"),
    [
        ("spinning", {}),
        ("sleeping", {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}),
        ("30", {"GOMP_SPINCOUNT": "30"}),
    ],
)
def test_waiting_is_what_was_asked_for(
    waiting: str, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    sharing.wait_as(waiting)
    assert os.environ == wanted


def test_table_gives_rates_and_their_part_of_the_fair_share() -> None:
    ways = [Way(2, "spinning"), Way(2, "sleeping")]
    situations = [Beside("nothing", 0, False), Beside("1 busy process", 1, False)]
    keys = [(beside.name, way) for beside in situations for way in ways]
    rates = dict(zip(keys, (900.0, 1000.0, 100.0, 400.0), strict=True))
    last = sharing.table(rates, situations, ways, 2).splitlines()[-1]
    assert last == "| 1 busy process | 0.50 | 100 (0.20) | 400 (0.80) |"


def test_a_figure_is_measured_beside_neighbours(tmp_path: Path) -> None:
    model = tmp_path / "random.gguf"
    write_model(model, Shape(1, 64, 4, 192, sharing.VOCABULARY), "Q4_0", 512)
    with sharing.neighbours(Beside("both", 1, True), model, 1):
        command = sharing.job(model, Way(1, "sleeping"), 0.1)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(json.loads(done.stdout)) > 0


def test_neighbours_end_with_an_exception(tmp_path: Path) -> None:
    """A loop that went on would disturb everything measured after it."""
    seen: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def watched(command: list[str], **options: int) -> subprocess.Popen[bytes]:
        seen.append(start(command, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing.subprocess, "Popen", watched)
        with (
            pytest.raises(ZeroDivisionError),
            sharing.neighbours(Beside("", 2, False), tmp_path, 1),
        ):
            raise ZeroDivisionError
    assert len(seen) == 2
    assert all(process.poll() is not None for process in seen)
    assert sys.executable in seen[0].args
