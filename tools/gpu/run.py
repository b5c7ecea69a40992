"""`dev.py gpu`: every check and benchmark on a machine with an NVIDIA GPU.

    python3 tools/dev.py gpu                 the three stages below, without what is done already
    python3 tools/dev.py gpu build           make .venv-gpu: llama.cpp and libzo for CUDA
    python3 tools/dev.py gpu check [ARGS]    the tests marked cuda, and under compute-sanitizer
    python3 tools/dev.py gpu bench [ARGS]    tools/gpu/bench.py; tables and a plot in gpu-results/

    --out DIR                                for results, instead of gpu-results/
    --budget SECONDS                         once built, stop in time: for machines that are lent

All three together measure what the targets speak of before they check. No network is needed where
tools/gpu/kit.py's archive is unpacked over the checkout; without it pip fetches what is
missing. .venv-gpu sees the packages of the Python that runs this, torch and transformers among
them. Every stage may be stopped, and goes on where it was.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import argparse
import contextlib
import math
import re
import subprocess
import sys
import time
from pathlib import Path

from tools.gpu import cuda
from tools.gpu.build import KIT, VENV, MissingError, build
from tools.setup.basics import ROOT, SetupError, digest, say

RESULTS = ROOT / "gpu-results"
STAGES = ("build", "check", "bench")
_SANITIZED = 86  # exit code by which compute-sanitizer says that it found something
_NO_TESTS = 5  # pytest's
_TIME_IS_UP = 124  # as `timeout` has it
_ON_GPU = re.compile(r"mark\.cuda|\bdevice: int")  # tests marked, and those that any device runs
_UNWATCHABLE = "Device not supported"  # compute-sanitizer, in some virtual machines


def main(arguments: list[str]) -> int:
    """Run one stage or, without arguments, all of them."""
    parser = argparse.ArgumentParser(prog="dev.py gpu", add_help=False, allow_abbrev=False)
    parser.add_argument("stage", nargs="?", default="all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=math.inf)
    options, rest = parser.parse_known_args(arguments)
    stage, end = options.stage, time.monotonic() + options.budget
    if stage not in (*STAGES, "all") or (rest and stage in ("build", "all")):
        print(__doc__)
        return 2
    if sys.platform != "linux":
        say(f"dev.py gpu builds on Linux only, this is {sys.platform}; use WSL on Windows")
        return 2
    try:
        gpus, toolkit = cuda.find_gpus(), cuda.find_toolkit()
        say(f"{'; '.join(gpus)}; CUDA {toolkit.version}, {toolkit.nvcc}")
        build(gpus, toolkit)
    except (cuda.NoCudaError, MissingError) as error:
        say(str(error))
        return 2
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped")
        return 130
    if stage == "build":
        return 0
    if stage == "bench":
        return bench(rest, options.out, end)
    if stage == "check":
        return check(rest, toolkit, options.out, end)
    sources = [file for name in ("tests", "zo_gguf") for file in (ROOT / name).rglob("*.py")]
    tested = digest(sorted(sources), VENV.read_stamp("libzo") or "")
    worst = bench(["--first"], options.out, end)
    if VENV.read_stamp("check") != tested:
        checked = check([], toolkit, options.out, end)
        if checked == 0:
            VENV.write_stamp("check", tested)
        worst = max(worst, checked)
    return max(worst, bench([], options.out, end))


# --- check ---------------------------------------------------------------------------------------


def check(arguments: list[str], toolkit: cuda.Toolkit, results: Path, end: float = math.inf) -> int:
    """Run the tests marked cuda, then those named sanitize again under compute-sanitizer."""
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if _ON_GPU.search(file.read_text(encoding="utf-8"))
    ]
    if not files:
        say("no test is marked cuda; mark those that need a GPU with pytest.mark.cuda")
        return 2
    # Warnings of packages in versions that are not the pinned ones are no failures here.
    pytest = [str(VENV.python), "-m", "pytest", "-W", "default", "-m", "cuda", *files]
    worst = run("tests", [*pytest, *arguments], end=end)
    sanitizer = cuda.find_sanitizer(toolkit)
    if sanitizer is None:
        say("compute-sanitizer is neither on the PATH nor beside nvcc: skipped")
        return worst
    options = cuda.output_of(sanitizer, "--help")
    only = "--kernel-name" if "--kernel-name" in options else "--filter"
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(_SANITIZED)]
        command += [only, "kns=_ZN2zo"]  # our kernels: all of llama.cpp's would take hours
        command += ["--target-processes", "all", *pytest, "-k", "sanitize"]
        worst = max(worst, run(tool, command, results / f"{tool}.txt", end))
    return worst


def run(what: str, command: list[str], log: Path | None = None, end: float = math.inf) -> int:
    """Run a program of the check until `end`; with a log, show only the end of what it says."""
    left = None if math.isinf(end) else max(0.0, end - time.monotonic())
    with contextlib.ExitStack() as stack:
        stream = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(log.open("w", encoding="utf-8"))
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment(), timeout=left, stdout=stream, stderr=stream
            ).returncode
        except subprocess.TimeoutExpired:
            code = _TIME_IS_UP
    text = ""
    if log is not None:
        text = log.read_text(encoding="utf-8", errors="replace")
        print("\n".join(text.splitlines()[-12:]), flush=True)
    if _UNWATCHABLE in text:
        say(f"{what}: compute-sanitizer cannot watch this device: skipped")
        return 0
    verdicts = {0: "ok", _SANITIZED: f"found errors, see {log}", _NO_TESTS: "found no test to run"}
    verdicts[_TIME_IS_UP] = "stopped, as time is up"
    say(f"{what}: {verdicts.get(code, f'failed with exit code {code}')}")
    return code


# --- bench ---------------------------------------------------------------------------------------


def bench(arguments: list[str], results: Path, end: float = math.inf) -> int:
    """Run what is left of the benchmarks; delete the results folder to measure everything anew."""
    command = [str(VENV.python), "-m", "tools.gpu.bench", "--out", str(results), *arguments]
    if not math.isinf(end):
        command += ["--budget", f"{max(1.0, end - time.monotonic()):.0f}"]
    return run("bench", command)


def environment() -> dict[str, str]:
    """Environment of the stages: .venv-gpu's programs first, the kit's copy of the converter.

    Tests that need a GPU fail there where they would be skipped elsewhere.
    """
    changed = dict(VENV.environment(), ZO_NEED_GPU="1", HF_HUB_OFFLINE="1")
    changed["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of the system are not ours
    if (KIT / "cache").is_dir():
        changed["XDG_CACHE_HOME"] = str(KIT / "cache")
    return changed
