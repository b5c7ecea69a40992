"""What gpu/bench.py measures: its cases, and the order in which they run."""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from tools.gpu.model import SHAPES, TINY_QUANTS, Shape

STAGES = ("correctness", "memory", "step", "batch", "logits", "torch")
# A mask on few lines fits beside the products and into an adapter, one anywhere only beside them,
# and gains of norms, what `tune` trains without a mask, beside the norms.
PATHS = (("lines", "hook"), ("lines", "adapter"), ("uniform", "hook"), ("norm", "hook"))
SIZE_OPTIONS = ("layers", "width", "heads", "ffn", "vocab")
# Keys of cases in the order in which they run; each has the place of the first that it matches.
FIRST = (
    r"step 7B Q4_0 (lines|norm) hook$",
    r"memory 7B Q4_0 (plain|(lines|norm) hook)$",
    r"(correctness|replay) Q4_0",
    r"torch 7B sparse",
)
_THEN = (
    r"(step|memory) 7B \S+ (plain|\w+ hook)$|memory 7B \S+ lines hook half",
    r"correctness|replay",
    r"memory 13B \S+ (plain|lines hook)$",
    r"batch .*x(32|128)$",
    r"torch|logits",
    r"(memory|step) 7B",
    r"memory|step",
    r"batch",
)


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
    script: str = "jobs"
    cuda_graphs: bool = False


def cases(options: argparse.Namespace) -> list[Case]:
    """All cases of the stages asked for, as tables show them."""
    makers: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
        "correctness": correctness_cases,
        "memory": memory_cases,
        "step": step_cases,
        "batch": batch_cases,
        "logits": logits_cases,
        "torch": torch_cases,
    }
    wanted = [stage for stage in STAGES if stage in options.only]
    return [case for stage in wanted for case in makers[stage](options)]


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
    given = {name: getattr(options, name) for name in SIZE_OPTIONS}
    return replace(SHAPES[size], **{name: n for name, n in given.items() if n is not None})


def correctness_cases(options: argparse.Namespace) -> Iterator[Case]:
    """tiny-llama, at every quantization."""
    job = common(options) | {"folder": str(options.work / "tiny"), "path": options.path}
    for kind in ("correctness", "replay"):
        for quant in TINY_QUANTS:
            key = f"{kind} {quant} {options.path}"
            yield Case("correctness", key, job | {"job": kind, "quant": quant})


def memory_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Peak memory of plain passes, and of steps with each kind of mask and path.

    A step's rows can also go through the model in two decodes of half the size.
    """
    for size in options.sizes:
        for quant in options.quants:
            job = of_model(options, size, quant) | {"job": "memory"}
            yield Case("memory", f"memory {size} {quant} plain", job | {"kind": "plain"})
            for mask, path in PATHS:
                tuned = job | {"kind": "tune", "mask": mask, "path": path}
                yield Case("memory", f"memory {size} {quant} {mask} {path}", tuned)
            half = {"kind": "tune", "mask": "lines", "path": "hook"}
            half["ctx_tokens"] = options.examples * options.tokens // 2
            yield Case("memory", f"memory {size} {quant} lines hook half", job | half)


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


def logits_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Probes of rows whose tokens all count, their logits left on the device or copied."""
    size, quant = options.sizes[0], options.quants[0]
    for place in ("device", "host"):
        job = of_model(options, size, quant) | {"job": "logits", "mask": "lines", "path": "hook"}
        yield Case("logits", f"logits {size} {quant} {place}", job | {"logits": place})


def torch_cases(options: argparse.Namespace) -> Iterator[Case]:
    """PyTorch's step, with sparse and with full perturbations."""
    for size in options.sizes:
        for kind in ("sparse", "mezo"):
            job = of_model(options, size, "bf16") | {"kind": kind}
            yield Case("torch", f"torch {size} {kind}", job, "torch_step")


def place(case: Case) -> int:
    """Where in the order of running a case stands."""
    patterns = (*FIRST, *_THEN)
    return next(i for i, pattern in enumerate(patterns) if re.match(pattern, case.key))


def is_first(case: Case) -> bool:
    """Whether the targets speak of it."""
    return place(case) < len(FIRST)
