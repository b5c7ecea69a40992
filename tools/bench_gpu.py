"""Every benchmark on a GPU: correctness, memory, a step's cost, batch sizes, PyTorch beside it.

Each case runs in a process of its own and is written down when it ends, so a run that was stopped
goes on with the next case, and one that crashes is a line in a table. Results for this commit go to
--out: JSON, tables in markdown, and a plot. On a CPU the same code runs on small shapes:

    python3 tools/dev.py gpu bench [--only memory,step] [--again]
    .venv/bin/python tools/bench_gpu.py --device cpu --layers 2 --width 256 --ffn 512 --heads 4 \\
        --vocab 2000 --batch-examples 1,4 --batch-tokens 32 --out /tmp/bench
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_gpu_report as report
import dev
import dev_cuda
from bench_fidelity import QUANTS as TINY_QUANTS
from bench_gpu_model import QUANTS, SHAPES, Shape, write_model
from bench_gpu_watch import run_job

from zo_gguf.llama import default_threads

STAGES = ("correctness", "memory", "step", "batch", "torch")
# A mask on few lines fits beside the products and into an adapter, one anywhere only beside them,
# and gains of norms, what `tune` trains without a mask, beside the norms.
PATHS = (("lines", "hook"), ("lines", "adapter"), ("uniform", "hook"), ("norm", "hook"))
_SIZE_OPTIONS = ("layers", "width", "heads", "ffn", "vocab")


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        stage: One of STAGES.
        key: What it is called in the results.
        job: What the job's process is told.
        script: The file that runs it.
        cuda_graphs: Whether llama.cpp may use them.
    """

    stage: str
    key: str
    job: dict[str, Any]
    script: str = "bench_gpu_jobs.py"
    cuda_graphs: bool = False


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All cases of the stages asked for, in order."""
    makers: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
        "correctness": correctness_cases,
        "memory": memory_cases,
        "step": step_cases,
        "batch": batch_cases,
        "torch": torch_cases,
    }
    for stage in STAGES:
        if stage in options.only:
            yield from makers[stage](options)


def common(options: argparse.Namespace) -> dict[str, Any]:
    """What every job is told."""
    layers = -1 if options.device == "cuda" else 0
    return {"device": options.device, "n_gpu_layers": layers, "threads": options.threads}


def of_model(options: argparse.Namespace, size: str, quant: str) -> dict[str, Any]:
    """What jobs on a model with random weights are told."""
    shape = shape_of(options, size)
    sizes = {"examples": options.examples, "tokens": options.tokens, "rounds": options.rounds}
    name = f"{size}-{'x'.join(str(n) for n in asdict(shape).values())}-{quant}.gguf"
    model = {"model": str(options.work / name), "shape": asdict(shape), "quant": quant}
    return common(options) | model | sizes


def shape_of(options: argparse.Namespace, size: str) -> Shape:
    """A size's shape, with what the command line gives instead."""
    given = {name: getattr(options, name) for name in _SIZE_OPTIONS}
    return replace(SHAPES[size], **{name: n for name, n in given.items() if n is not None})


def correctness_cases(options: argparse.Namespace) -> Iterator[Case]:
    """tiny-llama, at every quantization."""
    job = common(options) | {"folder": str(options.work / "tiny"), "path": options.path}
    for kind in ("correctness", "replay"):
        for quant in TINY_QUANTS:
            key = f"{kind} {quant} {options.path}"
            yield Case("correctness", key, job | {"job": kind, "quant": quant})


def memory_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Peak memory of plain passes, and of steps with each kind of mask and path."""
    for size in options.sizes:
        for quant in options.quants:
            job = of_model(options, size, quant) | {"job": "memory"}
            yield Case("memory", f"memory {size} {quant} plain", job | {"kind": "plain"})
            for mask, path in PATHS:
                tuned = job | {"kind": "tune", "mask": mask, "path": path}
                yield Case("memory", f"memory {size} {quant} {mask} {path}", tuned)


def step_cases(options: argparse.Namespace) -> Iterator[Case]:
    """A step against two plain passes; also with both probes in a decode, and with CUDA graphs."""
    for size in options.sizes:
        for quant in options.quants:
            for mask, path in PATHS:
                job = of_model(options, size, quant) | {"job": "step", "mask": mask, "path": path}
                key = f"step {size} {quant} {mask} {path}"
                yield Case("step", key, job)
                if path == "hook":
                    yield Case("step", f"{key} paired", job | {"probes_per_decode": 2})
                if options.device == "cuda" and (size, quant) == (options.sizes[0], "Q4_0"):
                    yield Case("step", f"{key} graphs", job, cuda_graphs=True)


def batch_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every number of examples at every length."""
    size = options.sizes[0]
    for tokens in options.batch_tokens:
        for examples in options.batch_examples:
            job = of_model(options, size, options.quants[0]) | {
                "job": "batch", "mask": "lines", "path": "hook", "kv_layout": options.kv_layout,
                "examples": examples, "tokens": tokens,
            }  # fmt: skip
            key = f"batch {size} {options.quants[0]} {options.kv_layout} {examples}x{tokens}"
            yield Case("batch", key, job)


def torch_cases(options: argparse.Namespace) -> Iterator[Case]:
    """PyTorch's step, with sparse and with full perturbations."""
    for size in options.sizes:
        for kind in ("sparse", "mezo"):
            job = of_model(options, size, "bf16") | {"kind": kind}
            yield Case("torch", f"torch {size} {kind}", job, "bench_gpu_torch.py")


def still_good(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Results of earlier runs, without those of other shapes or settings under the same name."""
    options = argparse.Namespace(**vars(options) | {"only": STAGES})
    jobs = {case.key: case.job for case in cases(options)}
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"]
    return {
        key: entry for key, entry in known.items() if entry["job"] == jobs.get(key, entry["job"])
    }


def run(case: Case) -> dict[str, Any]:
    """Make what the case needs, and run it."""
    job = case.job
    if "folder" in job:
        tiny = Path(job["folder"])
        if not (tiny / "done").is_file():
            shutil.rmtree(tiny, ignore_errors=True)
            made = run_job("bench_gpu_jobs.py", job | {"job": "export", "device": "cpu"})
            if "error" in made:
                return {"error": f"export: {made['error']}"}
            (tiny / "done").touch()
    elif case.script == "bench_gpu_jobs.py" and not os.path.exists(job["model"]):
        write_model(Path(job["model"]), Shape(**job["shape"]), job["quant"], 1 << 16)
    result = run_job(case.script, job, case.cuda_graphs)
    if case.stage == "torch" and job["device"] == "cuda" and "error" not in result:
        watched = run_job(case.script, job | {"rounds": 1, "watched": True})
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
    add("--out", type=Path, default=dev.ROOT / "gpu-results", help="results folder")
    add("--work", type=Path, default=dev.ROOT / "build" / "gpu-bench", help="for the models")
    add("--keep-models", action="store_true", help="up to 8 GB each")
    add("--only", type=one_of(*STAGES), default=list(STAGES), help="stages, with commas")
    add("--again", action="store_true", help="measure what is measured already")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--sizes", type=one_of(*SHAPES), default=list(SHAPES), help="with commas")
    add("--quants", type=one_of(*QUANTS), default=list(QUANTS), help="with commas")
    for name in _SIZE_OPTIONS:
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
    command = ["git", "-C", str(dev.ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = dev_cuda.output_of(*command).strip()
    manifest = dev.ROOT / "gpu-kit" / "manifest.json"
    if not (dev.ROOT / ".git").exists() and manifest.is_file():
        commit = json.loads(manifest.read_text(encoding="utf-8"))["commit"]
    gpu = "; ".join(dev_cuda.find_gpus()) if options.device == "cuda" else "CPU only"
    shapes = {size: shape_of(options, size) for size in options.sizes}
    words = [f"{size}: {shape}" for size, shape in shapes.items() if shape != SHAPES[size]]
    here = {"device": gpu, "threads": str(options.threads), "commit": commit or "unknown"}
    return here | {"shapes": "; ".join(words)}


def main() -> int:
    """Run the cases that are left, and write the tables; 1 where a case failed."""
    options = parse()
    try:
        here = machine(options)
    except dev_cuda.NoCudaError as error:
        print(f"bench_gpu.py: {error} (--device cpu tries it on a CPU)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.out / f"bench-{options.device}-{here['commit']}.json"
    wanted = list(cases(options))
    known = {} if options.again or not file.is_file() else still_good(file, options)
    for number, case in enumerate(wanted, 1):
        if case.key in known and "error" not in known[case.key]["result"]:
            continue
        print(f"[{number}/{len(wanted)}] {case.key} ...", file=sys.stderr, flush=True)
        known[case.key] = {"stage": case.stage, "job": case.job, "result": run(case)}
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps({"machine": here, "cases": known}, indent=1) + "\n")
        os.replace(unfinished, file)
    tables = report.tables(here, known)
    file.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(tables)
    print(report.plot(known, file.with_suffix(".png")), file=sys.stderr)
    if not options.keep_models:
        for model in options.work.glob("*.gguf"):
            model.unlink()
    return int(any("error" in known[case.key]["result"] for case in wanted))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("bench_gpu.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
