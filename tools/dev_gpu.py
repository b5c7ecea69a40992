"""`dev.py gpu`: every check and benchmark on a machine with an NVIDIA GPU.

    python3 tools/dev.py gpu                 the three stages below, without what is done already
    python3 tools/dev.py gpu build           make .venv-gpu: llama.cpp and libzo for CUDA
    python3 tools/dev.py gpu check [ARGS]    the tests marked cuda, and under compute-sanitizer
    python3 tools/dev.py gpu bench [ARGS]    tools/bench_gpu.py; tables and a plot in gpu-results/

No network is needed where tools/pack_gpu_kit.py's archive is unpacked over the checkout; without it
pip fetches what is missing. .venv-gpu sees the packages of the Python that runs this, torch and
transformers among them. Every stage may be stopped, and goes on where it was.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import os
import re
import subprocess
import sys
from pathlib import Path

import dev
import dev_cuda
from dev_gpu_build import KIT, PYTHON, MissingError, build, read_stamp, write_stamp

RESULTS = dev.ROOT / "gpu-results"
STAGES = ("build", "check", "bench")
_SANITIZED = 86  # exit code by which compute-sanitizer says that it found something
_NO_TESTS = 5  # pytest's
_ON_GPU = re.compile(r"mark\.cuda|\bdevice: int")  # tests marked, and those that any device runs
_UNWATCHABLE = "Device not supported"  # compute-sanitizer, in some virtual machines


def main(arguments: list[str]) -> int:
    """Run one stage or, without arguments, all of them."""
    stage, *rest = arguments or ["all"]
    if stage not in (*STAGES, "all") or (rest and stage == "build"):
        print(__doc__)
        return 2
    if sys.platform != "linux":
        dev.say(f"dev.py gpu builds on Linux only, this is {sys.platform}; use WSL on Windows")
        return 2
    try:
        gpus, toolkit = dev_cuda.find_gpus(), dev_cuda.find_toolkit()
        dev.say(f"{'; '.join(gpus)}; CUDA {toolkit.version}, {toolkit.nvcc}")
        build(gpus, toolkit)
    except (dev_cuda.NoCudaError, MissingError) as error:
        dev.say(str(error))
        return 2
    except dev.SetupError as error:
        dev.say(str(error))
        return 1
    except KeyboardInterrupt:
        dev.say("interrupted; the same command goes on where it stopped")
        return 130
    if stage == "build":
        return 0
    if stage == "bench":
        return bench(rest)
    if stage == "check":
        return check(rest, toolkit)
    sources = [file for name in ("tests", "zo_gguf") for file in (dev.ROOT / name).rglob("*.py")]
    tested = dev.digest(sorted(sources), read_stamp("libzo") or "")
    checked = 0
    if read_stamp("check") != tested:
        checked = check([], toolkit)
        if checked == 0:
            write_stamp("check", tested)
    return max(checked, bench([]))


# --- check ---------------------------------------------------------------------------------------


def check(arguments: list[str], toolkit: dev_cuda.Toolkit) -> int:
    """Run the tests marked cuda, then those named sanitize again under compute-sanitizer."""
    files = [
        str(file.relative_to(dev.ROOT))
        for file in sorted((dev.ROOT / "tests").glob("test_*.py"))
        if _ON_GPU.search(file.read_text(encoding="utf-8"))
    ]
    if not files:
        dev.say("no test is marked cuda; mark those that need a GPU with pytest.mark.cuda")
        return 2
    # Warnings of packages in versions that are not the pinned ones are no failures here.
    pytest = [str(PYTHON), "-m", "pytest", "-W", "default", "-m", "cuda", *files]
    worst = run("tests", [*pytest, *arguments])
    sanitizer = dev_cuda.find_sanitizer(toolkit)
    if sanitizer is None:
        dev.say("compute-sanitizer is neither on the PATH nor beside nvcc: skipped")
        return worst
    options = dev_cuda.output_of(sanitizer, "--help")
    only = "--kernel-name" if "--kernel-name" in options else "--filter"
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(_SANITIZED)]
        command += [only, "kns=_ZN2zo"]  # our kernels: all of llama.cpp's would take hours
        command += ["--target-processes", "all", *pytest, "-k", "sanitize"]
        worst = max(worst, run(tool, command, RESULTS / f"{tool}.txt"))
    return worst


def run(what: str, command: list[str], log: Path | None = None) -> int:
    """Run a program of the check; with a log, show only the end of what it says."""
    text = ""
    if log is None:
        code = subprocess.run(command, cwd=dev.ROOT, env=environment(), check=False).returncode
    else:
        log.parent.mkdir(exist_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                command, cwd=dev.ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT
            )
        code, text = done.returncode, log.read_text(encoding="utf-8", errors="replace")
        print("\n".join(text.splitlines()[-12:]), flush=True)
    if _UNWATCHABLE in text:
        dev.say(f"{what}: compute-sanitizer cannot watch this device: skipped")
        return 0
    verdicts = {0: "ok", _SANITIZED: f"found errors, see {log}", _NO_TESTS: "found no test to run"}
    dev.say(f"{what}: {verdicts.get(code, f'failed with exit code {code}')}")
    return code


# --- bench ---------------------------------------------------------------------------------------


def bench(arguments: list[str]) -> int:
    """Run what is left of the benchmarks; delete the results folder to measure everything anew."""
    command = [str(PYTHON), "tools/bench_gpu.py", "--out", str(RESULTS), *arguments]
    return run("bench", command)


def environment() -> dict[str, str]:
    """Environment of the stages: .venv-gpu's programs first, the kit's copy of the converter.

    Tests that need a GPU fail there where they would be skipped elsewhere.
    """
    path = f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    changed = dict(os.environ, PATH=path, ZO_NEED_GPU="1")
    if (KIT / "cache").is_dir():
        changed["XDG_CACHE_HOME"] = str(KIT / "cache")
    return changed
