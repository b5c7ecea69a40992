"""The tables and the plot of gpu/bench.py, from its results."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
Entries = Mapping[str, Entry]
_GIB = 1 << 30
STEP_TARGET = 1.05  # times two plain forward passes
MEMORY_TARGET = 1.03  # times plain inference
SIZE_TARGETS = {"7B": 5.5, "13B": 9.5}  # GiB


def tables(machine: Mapping[str, str], cases: Entries) -> str:
    """All tables in markdown, those without cases left out."""
    parts = [f"{machine['device']}, {machine['threads']} threads, commit {machine['commit']}"]
    if machine["shapes"]:
        parts[0] += f". Not the full sizes but {machine['shapes']}"
    makers = {
        "Losses of CPU and device, and projected gradients against autograd": _correctness,
        "Peak memory of a process": _memory,
        "A step against two plain forward passes": _step,
        "Two probes in one decode and in two": _batch,
        "A probe in which every token counts": _logits,
        "The same step in PyTorch": _torch,
    }
    for title, maker in makers.items():
        header, *rows = maker(cases)
        if rows:
            lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
            parts.append(f"### {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _of(cases: Entries, stage: str) -> Iterator[tuple[str, Entry, Entry]]:
    """Key, job and result of a stage's cases."""
    for key, case in cases.items():
        if case["stage"] == stage:
            yield key, case["job"], case["result"]


def _failed(first: Sequence[str], result: Entry, n_cells: int) -> list[str]:
    """A row that says why there are no figures."""
    return [*first, result["error"].replace("|", "/"), *[""] * (n_cells - len(first) - 1)]


def _correctness(cases: Entries) -> Iterator[list[str]]:
    header = ["quant", "path", "loss", "max difference", "median", "correlation CPU", "device"]
    header += ["size CPU", "device", "noise floor CPU", "device", "replayed on the CPU"]
    yield header
    for key, job, result in _of(cases, "correctness"):
        if job["job"] != "correctness":
            continue
        if "error" in result:
            yield _failed([job["quant"]], result, len(header))
            continue
        cpu, device, apart = result["cpu"], result["device"], result["difference"]
        yield [
            job["quant"],
            device["path"],
            f"{result['mean_loss']:.4f}",
            f"{apart['max']:.1e}",
            f"{apart['median']:.1e}",
            f"{cpu['correlation']:.5f}",
            f"{device['correlation']:.5f}",
            f"{cpu['ratio']:.3f}",
            f"{device['ratio']:.3f}",
            f"{cpu['floor']:.1e}",
            f"{device['floor']:.1e}",
            _replayed(cases.get(key.replace("correctness", "replay"))),
        ]


def _replayed(entry: Entry | None) -> str:
    if entry is None:
        return "not tried"
    result = entry["result"]
    if "error" in result:
        return str(result["error"]).replace("|", "/")
    return f"{result['steps']} steps, {'the same bytes' if result['identical'] else 'DIFFERENT'}"


def bytes_held(job: Entry, result: Entry) -> tuple[int, str] | None:
    """A job's peak memory and how it was measured: on the GPU, or resident on a CPU."""
    if "memory" in result:
        return result["memory"], f"nvidia-smi, {result['memory_by']}"
    if job["device"] == "cpu" and "peak_rss" in result:
        return result["peak_rss"], "resident"
    return None


def _memory(cases: Entries) -> Iterator[list[str]]:
    header = ["model", "quant", "what", "GiB", "target", "times plain", "target", "measured by"]
    yield header
    for key, job, result in _of(cases, "memory"):
        _, size, quant, *what = key.split()
        held = bytes_held(job, result)
        if "error" in result or held is None:
            no_figure = {"error": "nvidia-smi gave no figures"} | result
            yield _failed([size, quant, " ".join(what)], no_figure, len(header))
            continue
        plain = cases.get(f"memory {size} {quant} plain")
        base = bytes_held(plain["job"], plain["result"]) if plain else None
        times = held[0] / base[0] if base and what != ["plain"] else None
        yield [
            size,
            quant,
            " ".join(what),
            f"{held[0] / _GIB:.3f}",
            f"<= {SIZE_TARGETS[size]}" if job["device"] == "cuda" else "",
            f"{times:.3f}" if times else "",
            f"<= {MEMORY_TARGET}" if times else "",
            held[1],
        ]


def _step(cases: Entries) -> Iterator[list[str]]:
    header = ["model", "quant", "trained", "path", "probes a decode", "CUDA graphs", "step, ms"]
    header += ["a forward, ms"]
    header += ["ratio", "quartiles", "target", "parameters"]
    yield header
    for key, _, result in _of(cases, "step"):
        _, size, quant, mask, path, *more = key.split()
        first = [size, quant, mask, path, "2" if "paired" in more else "1"]
        first.append("on" if "graphs" in more else "off")
        if "error" in result:
            yield _failed(first, result, len(header))
            continue
        low, middle, high = result["ratio"]
        yield [
            *first,
            f"{1e3 * result['step'][1]:.1f}",
            f"{1e3 * result['forward'][1]:.1f}",
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"<= {STEP_TARGET}",
            f"{result['parameters']:,}",
        ]


def _batch(cases: Entries) -> Iterator[list[str]]:
    header = ["model", "KV cache", "examples", "tokens", "one decode, ms", "two decodes, ms"]
    header += ["planner's choice", "within 5 % of the best"]
    yield header
    for key, job, result in _of(cases, "batch"):
        _, size, quant, layout, _ = key.split()
        first = [f"{size} {quant}", layout, str(job["examples"]), str(job["tokens"])]
        if "error" in result:
            yield _failed(first, result, len(header))
            continue
        seconds = result["seconds"]
        yield [
            *first,
            f"{1e3 * seconds['2']:.1f}" if "2" in seconds else "does not fit",
            f"{1e3 * seconds['1']:.1f}",
            f"{'one decode' if result['chosen'] == 2 else 'two decodes'}",
            "yes" if result["within"] else "NO",
        ]


def _logits(cases: Entries) -> Iterator[list[str]]:
    header = ["model", "logits", "counted tokens", "ms", "quartiles"]
    yield header
    for key, _, result in _of(cases, "logits"):
        _, size, quant, place = key.split()
        where = {"device": "stay on the device", "host": "are copied to the host"}[place]
        if "error" in result:
            yield _failed([f"{size} {quant}", where], result, len(header))
            continue
        low, middle, high = (1e3 * seconds for seconds in result["seconds"])
        counted, quartiles = str(result["counted"]), f"{low:.1f} to {high:.1f}"
        yield [f"{size} {quant}", where, counted, f"{middle:.1f}", quartiles]


def _torch(cases: Entries) -> Iterator[list[str]]:
    header = ["model", "what", "seconds a step", "GiB by torch", "GiB", "zo-gguf's step"]
    header += ["times as fast", "zo-gguf's GiB"]
    yield header
    for key, job, result in _of(cases, "torch"):
        _, size, kind = key.split()
        what = {"sparse": "sparse 0.1 %, bf16", "mezo": "all weights, bf16"}[kind]
        if "error" in result:
            yield _failed([size, what], result, len(header))
            continue
        held, ours = bytes_held(job, result), _fastest(cases, size)
        yield [
            size,
            what,
            f"{result['seconds']:.4f}",
            f"{result['allocated'] / _GIB:.2f}" if "allocated" in result else "",
            f"{held[0] / _GIB:.2f}" if held else "",
            *(ours[1] if ours else ["not measured"]),
            f"{result['seconds'] / ours[0]:.2f}" if ours else "",
            _held_by_ours(cases, ours[2]) if ours else "",
        ]


def _fastest(cases: Entries, size: str) -> tuple[float, list[str], str] | None:
    """Seconds of our fastest step for a size without CUDA graphs, in words, and its key."""
    found = [
        (result["step"][1], key)
        for key, _, result in _of(cases, "step")
        if key.split()[1] == size and "step" in result and not key.endswith("graphs")
    ]
    if not found:
        return None
    seconds, key = min(found)
    return seconds, [f"{seconds:.4f} ({' '.join(key.split()[2:])})"], key


def _held_by_ours(cases: Entries, step_key: str) -> str:
    entry = cases.get(step_key.replace("step", "memory", 1).removesuffix(" paired"))
    held = bytes_held(entry["job"], entry["result"]) if entry else None
    return f"{held[0] / _GIB:.2f}" if held else ""


def plot(cases: Entries, path: Path) -> str:
    """Draw seconds of a step's two passes against the number of examples; says how it went."""
    found = [(job, result) for _, job, result in _of(cases, "batch") if "seconds" in result]
    if not found:
        return "no plot: no batch sizes were measured"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed"
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    lengths = sorted({job["tokens"] for job, _ in found})
    for colour, tokens in enumerate(lengths):
        for width, style, name in (("2", "-o", "one decode"), ("1", "--s", "two decodes")):
            points = sorted(
                (job["examples"], result["seconds"][width])
                for job, result in found
                if job["tokens"] == tokens and width in result["seconds"]
            )
            if points:
                label = f"{tokens} tokens, {name}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="examples", ylabel="seconds for both probes")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path}"
