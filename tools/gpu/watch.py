"""Runs a job of gpu/bench.py in a process of its own and watches the GPU's memory meanwhile.

nvidia-smi samples every 50 ms. Where it shows processes, the figure is what it shows for the job;
in containers, where process ids are hidden, it is by how much all used memory grew.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tools.gpu.cuda import find_smi, output_of

PACKAGE = "tools.gpu."  # of the jobs
_EVERY = "50"  # ms
_PATIENCE = 6.0  # seconds until the first sample; without another user the driver starts slowly
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
    end = threading.Event()
    queries = [
        ("--query-compute-apps=pid,used_memory", lambda line: _add_process(watch, line)),
        ("--query-gpu=memory.used", lambda line: _add_size(watch, line)),
    ]
    command = [smi, f"--id={first_gpu()}", "--format=csv,noheader,nounits"]
    loops = [
        subprocess.Popen(
            [*command, query, f"--loop-ms={_EVERY}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for query, _ in queries
    ]
    threads = [
        threading.Thread(target=_read, args=(program, add))
        for program, (_, add) in zip(loops, queries, strict=True)
    ]
    for thread in threads:
        thread.start()
    if not _first_sample(watch):  # it keeps back what it prints: call it for each sample instead
        threads.append(threading.Thread(target=_poll, args=(command, queries, end)))
        threads[-1].start()
        _first_sample(watch)
    try:
        watch.before = min(watch.in_use, default=0)
        yield watch
    finally:
        end.set()
        for program in loops:
            program.kill()
        for thread in threads:
            thread.join()
        for program in loops:
            program.wait()
            assert program.stdout is not None
            program.stdout.close()


def _first_sample(watch: Watch) -> bool:
    """Wait for it; False where none comes."""
    started = time.monotonic()
    while not watch.in_use and time.monotonic() - started < _PATIENCE:
        time.sleep(0.05)
    return bool(watch.in_use)


def _read(program: "subprocess.Popen[str]", add: Callable[[str], None]) -> None:
    assert program.stdout is not None
    for line in program.stdout:
        add(line)


def _poll(
    command: list[str], queries: list[tuple[str, Callable[[str], None]]], end: threading.Event
) -> None:
    while not end.is_set():
        for query, add in queries:
            for line in output_of(*command, query).splitlines():
                add(line)


def _add_process(watch: Watch, line: str) -> None:
    pid, _, size = line.partition(",")
    with contextlib.suppress(ValueError):  # "[N/A]" where the driver does not say
        watch.by_process.append((int(pid), int(size) * _MIB))


def _add_size(watch: Watch, line: str) -> None:
    with contextlib.suppress(ValueError):
        watch.in_use.append(int(line) * _MIB)


def run_job(
    script: str, job: dict[str, Any], cuda_graphs: bool = False, seconds: float = math.inf
) -> dict[str, Any]:
    """Run a job; its result, with "memory" (bytes) and "memory_by" where a GPU was watched.

    A job that crashes gives {"error": ...} like one that fails in words.

    Args:
        script: File in this folder.
        job: Its one argument; "device" is cuda or cpu. A GPU is watched for the job "memory", or
            where "watched" is true: asking for the memory takes time on it, so not where steps are
            timed.
        cuda_graphs: Whether llama.cpp may use CUDA graphs: a callback cuts a decode into hundreds
            of pieces, and each would be recorded as a graph of its own.
        seconds: After which it is killed.
    """
    command = [sys.executable, "-m", f"{PACKAGE}{script}", json.dumps(job)]
    # CUDA's numbers are to be nvidia-smi's.
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=first_gpu(), CUDA_DEVICE_ORDER="PCI_BUS_ID")
    environment["GGML_CUDA_DISABLE_GRAPHS"] = (
        "0" if cuda_graphs else "1"
    )  # see zo_gguf.engine.model
    # Layers left on the CPU stay there: else its losses, too, would be the GPU's.
    environment["GGML_OP_OFFLOAD_MIN_BATCH"] = str(1 << 30)
    watched = job.get("job") == "memory" or job.get("watched", False)
    with watching(job["device"] == "cuda" and watched) as watch:
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
            try:
                out, err = process.communicate(timeout=None if math.isinf(seconds) else seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err += f"\nerror: not done in the {seconds:.0f} s that were left"
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
