"""gpu/bench.py's parts on a CPU: random models, jobs, tables, going on where it was."""

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.gpu import bench as bench_gpu
from tools.gpu import report as bench_gpu_report
from tools.gpu import run as dev_gpu
from tools.gpu import watch as bench_gpu_watch
from tools.gpu.model import SHAPES, Shape, Type, make_mask, write_model
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.gguf_files.file import GgufFile

SMALL = Shape(layers=2, width=256, heads=4, ffn=512, vocab=300)
_GIB = 1 << 30


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """gpu/bench.py's options for a small model on the CPU, with its folders in `tmp_path`."""
    arguments = ["--device", "cpu", "--layers", "2", "--width", "256", "--ffn", "512"]
    arguments += ["--heads", "4", "--vocab", "300", "--examples", "2", "--tokens", "8"]
    arguments += ["--batch-examples", "2", "--batch-tokens", "8", "--rounds", "1"]
    arguments += ["--sizes", "7B", "--quants", "Q4_0", "--threads", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["gpu/bench.py", *arguments])
    return bench_gpu.parse()


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M"])
def test_random_model_gives_plain_losses(tmp_path: Path, quant: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, SMALL, quant, 64)
    tokens = np.random.default_rng(0).integers(3, SMALL.vocab, 32).tolist()
    example = Example(tokens, [False] * 16 + [True] * 16)
    with Engine(path, n_threads=1, ctx_tokens=64) as engine:
        loss = engine.losses([example]).item()
    assert abs(loss - np.log(SMALL.vocab)) < 2  # random weights of a sensible size know nothing
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_random_weights_have_the_spread_of_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", SMALL, "Q4_K_M", 64)
    file = GgufFile(tmp_path / "model.gguf")
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"):
        weights = file.dequantize(name) * np.sqrt(file.tensors[name].shape[1])
        assert weights.std() == pytest.approx(1, abs=0.05), name
        assert abs(weights.mean()) < 0.05, name


def test_types_are_those_that_llama_cpp_chooses() -> None:
    shape = SHAPES["7B"]
    types = {name: shape.type_of(name, "Q4_K_M") for name in shape.matrices()}
    assert types["output.weight"] == Type.Q6_K
    assert types["token_embd.weight"] == types["blk.5.attn_q.weight"] == Type.Q4_K
    for part in ("attn_v", "ffn_down"):
        better = [i for i in range(32) if types[f"blk.{i}.{part}.weight"] == Type.Q6_K]
        assert better == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert set(shape.type_of(name, "Q4_0") for name in shape.matrices()) == {Type.Q4_0}


@pytest.mark.parametrize("kind", ["lines", "uniform"])
def test_masks_hold_a_thousandth(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "model.gguf", SMALL, "Q4_0", 64)
    mask = make_mask(GgufFile(tmp_path / "model.gguf"), kind)
    for name, indices in mask.tensors.items():
        n_rows, n_cols = mask.shapes[name]
        assert indices.size == int(n_rows * n_cols * 1e-3)
        assert np.all(np.diff(indices) > 0)
        assert indices[-1] < n_rows * n_cols


@pytest.mark.slow
def test_every_stage_runs_and_a_second_call_measures_nothing(
    options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    sys.argv += ["--only", "memory,step,batch,logits,torch"]
    assert bench_gpu.main() == 0
    text = capsys.readouterr().out
    assert text.count("###") == 5
    assert "Not the full sizes" in text
    assert not list(options.work.glob("*.gguf"))
    assert {file.suffix for file in options.out.iterdir()} == {".json", ".md", ".png"}
    monkeypatch.setattr(bench_gpu, "run_job", lambda *_: pytest.fail("measures again"))
    assert bench_gpu.main() == 0


class TestGoingOn:
    def test_failed_case_is_a_line_and_is_tried_again(
        self, options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        sys.argv += ["--only", "torch"]
        tried = []

        def crash(script: str, job: dict[str, Any], *_: object) -> dict[str, Any]:
            tried.append(job["kind"])
            return {"error": "it | crashed"}

        monkeypatch.setattr(bench_gpu, "run_job", crash)
        assert bench_gpu.main() == 1
        assert "it / crashed" in capsys.readouterr().out
        assert bench_gpu.main() == 1
        assert tried == ["sparse", "mezo"] * 2

    def test_time_is_up(self, options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        """What the targets speak of is done by then, and tables are there."""
        sys.argv += ["--only", "memory,step,batch,torch", "--budget", "1000"]
        now, ran = [0.0], []

        def job(script: str, job: dict[str, Any], graphs: bool, seconds: float) -> dict[str, Any]:
            ran.append((job.get("job", "torch"), job.get("mask", job.get("kind")), seconds))
            now[0] += 300
            return {"error": "only an example"}

        monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(bench_gpu, "run_job", job)
        monkeypatch.setattr(bench_gpu, "write_model", lambda *_: None)
        assert bench_gpu.main() == 1
        expected = [("step", "lines"), ("step", "norm"), ("memory", "plain"), ("memory", "lines")]
        assert [(what, mask) for what, mask, _ in ran] == expected
        assert [seconds for *_, seconds in ran] == [1000, 700, 400, 100]
        assert "time is up with" in capsys.readouterr().out
        (table,) = options.out.glob("*.md")
        assert table.read_text().count("only an example") == 4

    def test_job_is_killed_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "job.py").write_text("import time; time.sleep(60)")
        monkeypatch.setattr(bench_gpu_watch, "PACKAGE", "")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        result = bench_gpu_watch.run_job("job", {"device": "cpu"}, False, 0.5)
        assert "not done in the 0 s that were left" in result["error"]

    def test_every_case_has_its_place(self, options: Namespace) -> None:
        options.sizes, options.quants, options.device = ["7B", "13B"], ["Q4_0", "Q4_K_M"], "cuda"
        places = {case.key: bench_gpu.place(case) for case in bench_gpu.cases(options)}
        assert len(places) > 60
        last = max(places["step 7B Q4_0 norm hook"], places["memory 7B Q4_0 lines hook"])
        assert last < min(n for key, n in places.items() if "13B" in key or "Q4_K_M" in key)

    def test_other_shapes_are_measured_anew(self, options: Namespace, tmp_path: Path) -> None:
        found = {case.key: {"job": case.job} for case in bench_gpu.cases(options)}
        file = tmp_path / "known.json"
        file.write_text(json.dumps({"cases": found}))
        assert bench_gpu.still_good(file, options) == found
        options.layers = 3
        tiny = {key for key in found if found[key]["job"].get("folder")}
        assert set(bench_gpu.still_good(file, options)) == tiny

    def test_without_a_gpu_it_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("sys.argv", ["gpu/bench.py", "--out", str(tmp_path / "out")])
        monkeypatch.setattr(bench_gpu.cuda, "find_smi", lambda: None)
        assert bench_gpu.main() == 2
        assert "No NVIDIA GPU answers" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestJobs:
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> dict[str, Any]:
        (tmp_path / "job.py").write_text(code)
        monkeypatch.setattr(bench_gpu_watch, "PACKAGE", "")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return bench_gpu_watch.run_job("job", {"device": "cpu"})

    def test_result_is_the_last_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "import os; print('noise')\nprint('RESULT {\"a\": 1}')\n"
        assert self.run(tmp_path, monkeypatch, code)["a"] == 1

    def test_graphs_are_off_in_jobs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "import json, os; print('RESULT ' + json.dumps(dict(os.environ)))"
        found = self.run(tmp_path, monkeypatch, code)
        assert found["GGML_CUDA_DISABLE_GRAPHS"] == "1"

    def test_crash_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = (
            "import os, sys; print('GGML_ASSERT(x) failed', file=sys.stderr); sys.stderr.flush()\n"
        )
        error = self.run(tmp_path, monkeypatch, code + "os.abort()")["error"]
        assert "GGML_ASSERT(x)" in error
        assert "-6" in error


def test_check_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(dev_gpu, "ROOT", tmp_path)
    slow, started = ["sleep", "60"], time.monotonic()
    assert dev_gpu.run("tests", slow, end=started + 0.2) == 124
    assert dev_gpu.run("memcheck", slow, tmp_path / "log" / "m.txt", started) == 124
    assert time.monotonic() - started < 30
    assert "time is up" in capsys.readouterr().err


class TestWatch:
    def test_own_process_counts_before_the_difference(self) -> None:
        watch = bench_gpu_watch.Watch([(7, 5 * _GIB), (8, 9 * _GIB)], [_GIB, 6 * _GIB], _GIB)
        assert watch.peak(7) == (5 * _GIB, "process")
        assert watch.peak(99) == (5 * _GIB, "difference")
        assert bench_gpu_watch.Watch().peak(7) is None

    def test_samples_are_read_from_nvidia_smi(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        smi = tmp_path / "nvidia-smi"
        lines = (
            'case "$*" in *compute-apps*) echo "12, 300";; *) echo 100; sleep .2; echo 900;; esac'
        )
        smi.write_text(f"#!/bin/sh\n{lines}\necho '[N/A]'\nexec sleep 60\n")
        smi.chmod(0o755)
        monkeypatch.setattr(bench_gpu_watch, "find_smi", lambda: str(smi))
        with bench_gpu_watch.watching(True) as watch:
            time.sleep(0.5)
        assert watch.peak(12) == (300 << 20, "process")
        assert watch.peak(1) == (800 << 20, "difference")

    def test_nvidia_smi_without_a_loop_is_called_again_and_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(
            '#!/bin/sh\ncase "$*" in *loop*) exec sleep 60;; *apps*) echo "12, 300";; esac\n'
        )
        smi.chmod(0o755)
        monkeypatch.setattr(bench_gpu_watch, "find_smi", lambda: str(smi))
        monkeypatch.setattr(bench_gpu_watch, "_PATIENCE", 0.1)
        with bench_gpu_watch.watching(True) as watch:
            time.sleep(0.5)
        assert len(watch.by_process) > 2
        assert watch.peak(12) == (300 << 20, "process")


def test_tables_tell_targets_and_failures() -> None:
    job = {"device": "cuda"}
    cases = {
        "memory 7B Q4_0 plain": {"memory": 5 * _GIB, "memory_by": "process"},
        "memory 7B Q4_0 lines hook": {"memory": 6 * _GIB, "memory_by": "process"},
        "memory 7B Q4_0 lines adapter": {"error": "out of memory"},
        "step 7B Q4_0 lines hook": {
            "ratio": [1.0, 1.04, 1.1],
            "step": [0.1, 0.2, 0.3],
            "forward": [0.1, 0.1, 0.1],
            "parameters": 1234,
        },
        "torch 7B mezo": {"seconds": 0.8, "allocated": 13 * _GIB},
    }
    entries = {
        key: {"stage": key.split()[0], "job": job, "result": result}
        for key, result in cases.items()
    }
    machine = {"device": "GPU X", "threads": "4", "commit": "abc", "shapes": ""}
    text = bench_gpu_report.tables(machine, entries)
    assert "| 7B | Q4_0 | lines hook | 6.000 | <= 5.5 | 1.200 | <= 1.03 |" in text
    assert "| out of memory |" in text
    assert "| 1.040 | 1.000 to 1.100 | <= 1.05 | 1,234 |" in text
    assert "| 0.2000 (Q4_0 lines hook) | 4.00 | 6.00 |" in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(rows[:5]) == {9}
