"""Every benchmark on a GPU: correctness, memory, a step's cost, batch sizes, PyTorch beside it.

Each case runs in a process of its own and is written down when it ends, so a run that was stopped
goes on with the next case, and one that crashes is a line in a table. What the targets speak of
comes first, for machines that are lent by the minute. Results for this commit go to --out: JSON,
tables in markdown, and a plot. On a CPU the same code runs on small shapes:

    python3 tools/dev.py gpu bench [--only memory,step] [--again] [--budget SECONDS]
    .venv/bin/python -m tools.gpu.bench --device cpu --layers 2 --width 256 --ffn 512 --heads 4 \\
        --vocab 2000 --batch-examples 1,4 --batch-tokens 32 --out /tmp/bench
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.gpu import cuda
from tools.gpu import report as report
from tools.gpu.cases import SIZE_OPTIONS, STAGES, Case, cases, is_first, place, shape_of
from tools.gpu.model import QUANTS, SHAPES, Shape, write_model
from tools.gpu.watch import run_job
from tools.setup.basics import ROOT
from zo_gguf.engine.model import default_threads

_LEAST = 20.0  # seconds without which no case is begun


def still_good(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Results of earlier runs, without those of other shapes or settings under the same name."""
    options = argparse.Namespace(**vars(options) | {"only": STAGES})
    jobs = {case.key: case.job for case in cases(options)}
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"]
    return {
        key: entry for key, entry in known.items() if entry["job"] == jobs.get(key, entry["job"])
    }


def run(case: Case, seconds: float = math.inf) -> dict[str, Any]:
    """Make what the case needs, and run it for at most so many seconds."""
    job, end = case.job, time.monotonic() + seconds
    if "folder" in job:
        tiny = Path(job["folder"])
        if not (tiny / "done").is_file():
            shutil.rmtree(tiny, ignore_errors=True)
            export = job | {"job": "export", "device": "cpu"}
            made = run_job("jobs", export, seconds=seconds)
            if "error" in made:
                return {"error": f"export: {made['error']}"}
            (tiny / "done").touch()
    elif case.script == "jobs" and not os.path.exists(job["model"]):
        write_model(Path(job["model"]), Shape(**job["shape"]), job["quant"], 1 << 16)
    result = run_job(case.script, job, case.cuda_graphs, max(0.0, end - time.monotonic()))
    if case.stage == "torch" and job["device"] == "cuda" and "error" not in result:
        once = job | {"rounds": 1, "watched": True}
        watched = run_job(case.script, once, seconds=max(0.0, end - time.monotonic()))
        result |= {key: watched[key] for key in ("memory", "memory_by") if key in watched}
    return result


def parse() -> argparse.Namespace:
    """The command line."""

    def one_of(*allowed: str) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            if unknown := [part for part in text.split(",") if part not in allowed]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
            return text.split(",")

        return split

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "gpu-results", help="results folder")
    add("--work", type=Path, default=ROOT / "build" / "gpu-bench", help="for the models")
    add("--keep-models", action="store_true", help="up to 8 GB each")
    add("--only", type=one_of(*STAGES), default=list(STAGES), help="stages, with commas")
    add("--first", action="store_true", help="only what the targets speak of")
    add("--again", action="store_true", help="measure what is measured already")
    add("--budget", type=float, help="seconds after which nothing more is begun (no limit)")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--sizes", type=one_of(*SHAPES), default=list(SHAPES), help="with commas")
    add("--quants", type=one_of(*QUANTS), default=list(QUANTS), help="with commas")
    for name in SIZE_OPTIONS:
        add(f"--{name}", type=int, help="instead of the sizes' own")
    add("--examples", type=int, default=16, help="of a step (%(default)s)")
    add("--tokens", type=int, default=128, help="of an example (%(default)s)")
    add("--batch-examples", type=numbers, default=[1, 4, 16, 64])
    add("--batch-tokens", type=numbers, default=[32, 128, 512])
    add("--kv-layout", choices=["unified", "split"], default="unified", help="for the batch sizes")
    add("--path", default="auto", help="of the correctness runs: auto, hook or adapter")
    add("--rounds", type=int, default=9, help="repetitions (%(default)s)")
    add("--threads", type=int, default=default_threads())
    return parser.parse_args()


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What the figures were taken on."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = cuda.output_of(*command).strip()
    manifest = ROOT / "gpu-kit" / "manifest.json"
    if not (ROOT / ".git").exists() and manifest.is_file():
        commit = json.loads(manifest.read_text(encoding="utf-8"))["commit"]
    gpu = "; ".join(cuda.find_gpus()) if options.device == "cuda" else "CPU only"
    shapes = {size: shape_of(options, size) for size in options.sizes}
    words = [f"{size}: {shape}" for size, shape in shapes.items() if shape != SHAPES[size]]
    here = {"device": gpu, "threads": str(options.threads), "commit": commit or "unknown"}
    return here | {"shapes": "; ".join(words)}


def main() -> int:
    """Run the cases that are left, and write the tables; 1 where a case failed."""
    options = parse()
    try:
        here = machine(options)
    except cuda.NoCudaError as error:
        print(f"tools.gpu.bench: {error} (--device cpu tries it on a CPU)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.out / f"bench-{options.device}-{here['commit']}.json"
    every = cases(options)
    wanted = sorted((case for case in every if is_first(case) or not options.first), key=place)
    known = {} if options.again or not file.is_file() else still_good(file, options)
    left = [case for case in wanted if failed(known, case)]
    end = time.monotonic() + (options.budget or math.inf)
    while left and (seconds := end - time.monotonic()) >= _LEAST:
        case, number = left.pop(0), len(wanted) - len(left)
        print(f"[{number}/{len(wanted)}] {case.key} ...", file=sys.stderr, flush=True)
        known[case.key] = {"stage": case.stage, "job": case.job, "result": run(case, seconds)}
        in_order = [key for key in (*(case.key for case in every), *known) if key in known]
        known = {key: known[key] for key in in_order}
        save(file, here, known)
    print(report.tables(here, known))
    print(report.plot(known, file.with_suffix(".png")), file=sys.stderr)
    if left:
        print(f"tools.gpu.bench: time is up with {len(left)} cases left; the same command goes on")
        return 1
    if not options.keep_models and not options.first:
        for model in options.work.glob("*.gguf"):
            model.unlink()
    return int(any(failed(known, case) for case in wanted))


def failed(known: dict[str, Any], case: Case) -> bool:
    """Whether a case has no result, or one that says why there is none."""
    return case.key not in known or "error" in known[case.key]["result"]


def save(file: Path, here: dict[str, str], known: dict[str, Any]) -> None:
    """Write down what is known so far, and its tables."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"machine": here, "cases": known}, indent=1) + "\n")
    os.replace(unfinished, file)
    file.with_suffix(".md").write_text(report.tables(here, known), encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("tools.gpu.bench: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
