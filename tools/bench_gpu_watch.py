"""Runs a job of bench_gpu.py in a process of its own and watches the GPU's memory meanwhile.

nvidia-smi samples every 50 ms. Where it shows processes, the figure is what it shows for the job;
in containers, where process ids are hidden, it is by how much all used memory grew.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dev_cuda import find_smi

TOOLS = Path(__file__).resolve().parent
_EVERY = "50"  # ms
_FORMAT = "--format=csv,noheader,nounits"
_SETTLE = 1.0  # seconds until the first samples are in
_MIB = 1 << 20


@dataclass
class Watch:
    """Samples of one job.

    Attributes:
        by_process: (pid, bytes) as nvidia-smi shows them.
        in_use: Bytes in use on the GPU.
        before: Bytes in use before the job.
    """

    by_process: list[tuple[int, int]] = field(default_factory=list)
    in_use: list[int] = field(default_factory=list)
    before: int = 0

    def peak(self, pid: int) -> tuple[int, str] | None:
        """Most bytes that the job held, and how that was measured; None without samples."""
        own = [size for process, size in self.by_process if process == pid]
        if own:
            return max(own), "process"
        if self.in_use:
            return max(self.in_use) - self.before, "difference"
        return None


def first_gpu() -> str:
    """The one GPU that jobs use: the first that CUDA may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


@contextlib.contextmanager
def watching(enabled: bool) -> Iterator[Watch]:
    """Sample as long as the with block lasts."""
    watch = Watch()
    smi = find_smi() if enabled else None
    if smi is None:
        yield watch
        return
    queries = ["--query-compute-apps=pid,used_memory", "--query-gpu=memory.used"]
    programs = [
        subprocess.Popen(
            [smi, query, f"--id={first_gpu()}", _FORMAT, f"--loop-ms={_EVERY}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for query in queries
    ]
    readers = [
        threading.Thread(target=_read_processes, args=(programs[0].stdout, watch.by_process)),
        threading.Thread(target=_read_sizes, args=(programs[1].stdout, watch.in_use)),
    ]
    for reader in readers:
        reader.start()
    try:
        time.sleep(_SETTLE)
        watch.before = min(watch.in_use, default=0)
        yield watch
    finally:
        for program in programs:
            program.kill()
            program.wait()
        for reader in readers:
            reader.join()
        for program in programs:
            assert program.stdout is not None
            program.stdout.close()


def _read_processes(stream: IO[str], samples: list[tuple[int, int]]) -> None:
    for line in stream:
        pid, _, size = line.partition(",")
        with contextlib.suppress(ValueError):  # "[N/A]" where the driver does not say
            samples.append((int(pid), int(size) * _MIB))


def _read_sizes(stream: IO[str], samples: list[int]) -> None:
    for line in stream:
        with contextlib.suppress(ValueError):
            samples.append(int(line) * _MIB)


def run_job(script: str, job: dict[str, Any], cuda_graphs: bool = False) -> dict[str, Any]:
    """Run a job; its result, with "memory" (bytes) and "memory_by" where a GPU was watched.

    A job that crashes gives {"error": ...} like one that fails in words.

    Args:
        script: File in this folder.
        job: Its one argument; "device" is cuda or cpu.
        cuda_graphs: Whether llama.cpp may use CUDA graphs: a callback cuts a decode into hundreds
            of pieces, and each would be recorded as a graph of its own.
    """
    command = [sys.executable, str(TOOLS / script), json.dumps(job)]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=first_gpu())
    environment.pop("GGML_CUDA_DISABLE_GRAPHS", None)  # any value counts as set
    if not cuda_graphs:
        environment["GGML_CUDA_DISABLE_GRAPHS"] = "1"
    with watching(job["device"] == "cuda") as watch:
        started = time.monotonic()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        ) as process:
            out, err = process.communicate()
        result = _result(out, err, process.returncode)
        peak = watch.peak(process.pid)
    if peak is not None:
        result["memory"], result["memory_by"] = peak
    return result | {"took": round(time.monotonic() - started, 1)}


def _result(out: str, err: str, code: int) -> dict[str, Any]:
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if code == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
        return result
    said = [line.strip() for line in err.splitlines() if line.strip()] or ["no output"]
    telling = [line for line in said if "rror" in line or "ASSERT" in line or "out of" in line]
    return {"error": f"The process ended with code {code}: {(telling or said)[-1][:200]}"}
