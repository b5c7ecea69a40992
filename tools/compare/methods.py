"""Every method on one task with the same number of forward tokens: which one learns most?

    .venv/bin/python -m tools.compare.methods --models DIR --name tiny-llama --data DIR --out DIR

The folder of models holds NAME-QUANT.gguf with .mask.safetensors, as `zo-gguf export` writes them;
other masks lie beside them as NAME-QUANT.SCORE.mask.safetensors, or in a folder SCORE. Each entry
gets its own learning rate, the best of some over the whole budget with seed 0, and then runs with
the other seeds; after one quant, `--rates` or `--rates-of` saves the search on the next. An
interrupted comparison goes on where it stopped; after a change of a model, mask or the data take a
new --out.

The entries are in `entries.py`, their runs in `runs.py`, table and plot in
`plot.py`, the bound by backpropagation in `first_order.py`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.compare.entries import ENTRIES, REFERENCE, Entry
from tools.compare.plot import Report
from tools.compare.runs import Failed, Task, call, compare, evaluate
from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import load_examples, resolve_split
from zo_gguf.engine.batch import build_request
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.system import atomic_write, require_file

BOUNDS = ("sensitive", "norm")  # methods whose parameters backpropagation trains as well
RATES_HELP = "tried, as multiples of the default one; 1 always is (default: as each entry says)"
RATES_OF_HELP = "compare.json of an earlier comparison: tried are 1 and what each entry took there"
FIRST_ORDER = "tools.compare.first_order"


def row_tokens(model: Path, data: Path) -> float:
    """Mean forward tokens of a training row, over all rows that steps draw from."""
    with Engine(model, n_threads=1) as engine:
        rows = load_examples(data, engine, split="train")
    sequences = build_request(rows, TuneConfig.ctx_tokens).sequences
    return sum(sequence.tokens.size for sequence in sequences) / len(rows)


def measure_base(task: Task, quant: str) -> dict[str, Any]:
    """Validation and test rows of the untouched model."""
    return cached(
        task.out / quant / "base.json",
        lambda log: {
            split: json.loads(evaluate(log, str(task.model(quant)), str(task.data), split))
            for split in ("valid", "test")
        },
    )


def measure_bound(task: Task, quant: str, hf: Path, method: str) -> dict[str, Any]:
    """What a method trains, trained by backpropagation."""
    words = ["--hf", hf, "-m", task.model(quant), "--data", task.data, "-t", 1, "--json"]
    command = [sys.executable, "-m", FIRST_ORDER, "--method", method, *map(str, words)]
    return cached(
        task.out / quant / f"first-order-{method}.json",
        lambda log: dict(json.loads(call(log.with_name(f"{log.name}.log"), command))),
    )


def cached(path: Path, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What stands in `path`, or what `measure` finds, with `path` without suffix for its logs."""
    if not path.is_file():
        found = measure(path.with_suffix(""))
        with atomic_write(path) as file:
            file.write(json.dumps(found).encode())
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def run(
    task: Task, entries: Sequence[Entry], quants: Sequence[str], jobs: int, hf: Path | None
) -> Report:
    """Compare; the report is written anew whenever an entry is done."""
    settings = {
        "model": task.name,
        "data": task.data.name,
        "forward tokens": f"{task.budget:g}",
        "tokens of a row": f"{task.row_tokens:.1f}",
        "seeds": task.n_seeds,
    }
    report = Report(settings, REFERENCE)
    wanted = [(q, e) for q in quants for e in entries if e.applies(q)]
    order = [(quant, entry.label) for quant, entry in wanted]
    # Processes wait for a place in `pool`; an entry waits for its processes in a thread of its own.
    pool, waiting = ThreadPoolExecutor(jobs), ThreadPoolExecutor(jobs)
    try:
        base = {quant: pool.submit(measure_base, task, quant) for quant in quants}
        bounds = {
            method: {q: pool.submit(measure_bound, task, q, hf, method) for q in quants if hf}
            for method in BOUNDS
        }
        futures = [waiting.submit(compare, task, entry, quant, pool) for quant, entry in wanted]
        take(base, report.base, "untouched model")
        for method, of_quants in bounds.items():
            take(of_quants, report.bounds.setdefault(method, {}), f"first-order bound, {method}")
        for future in as_completed(futures):
            outcome = future.result()
            say(f"{outcome.quant}, {outcome.label}: {outcome.failure or 'done'}")
            report.outcomes.append(outcome)
            report.outcomes.sort(key=lambda o: order.index((o.quant, o.label)))
            report.write(task.out)
    finally:
        for executor in (waiting, pool):
            executor.shutdown(wait=False, cancel_futures=True)
    return report


def take(
    futures: dict[str, Future[dict[str, Any]]], into: dict[str, dict[str, Any]], what: str
) -> None:
    """Collect what was measured, and say what could not be."""
    for quant, future in futures.items():
        try:
            into[quant] = future.result()
        except Failed as error:
            say(f"{quant}, {what}: {error}")


def say(line: str) -> None:
    print(f"tools.compare.methods: {line}", file=sys.stderr, flush=True)


def prepare(options: argparse.Namespace) -> tuple[Task, list[Entry]]:
    """The task, and the entries to compare.

    Raises:
        ZoError: A file is missing or an option makes no sense.
    """
    for name in ("tokens", "seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ZoError(f"--{name} must be at least 1, not {getattr(options, name):g}.")
    if options.rates and min(options.rates) <= 0:
        raise ZoError(f"--rates must be greater than 0, not {min(options.rates):g}.")
    try:
        entries = [entry for entry in ENTRIES if re.search(options.only, entry.label)]
    except re.error as error:
        raise ZoError(f"--only {options.only!r} is no regular expression: {error}.") from error
    if not entries:
        known = "; ".join(entry.label for entry in ENTRIES)
        raise ZoError(f"--only {options.only!r} matches none of: {known}.")
    if options.rates:
        entries = [replace(entry, rates=tuple(options.rates)) for entry in entries]
    if options.rates_of:
        entries = with_rates_of(entries, options.rates_of)
    if not options.data.is_dir():
        raise ZoError(f"--data {str(options.data)!r} is no folder with train, valid and test rows.")
    for split in ("train", "valid", "test"):
        resolve_split(options.data, split)
    paths = {name: getattr(options, name).resolve() for name in ("models", "data", "out")}
    task = Task(
        **paths, name=options.name, budget=options.tokens, n_seeds=options.seeds, row_tokens=0.0
    )
    for quant in options.quant:
        require_file(task.model(quant), "model")
    mean = row_tokens(task.model(options.quant[0]), task.data)
    return replace(task, row_tokens=mean), entries


def with_rates_of(entries: Sequence[Entry], path: Path) -> list[Entry]:
    """The entries, to try the rates that an earlier comparison chose, and 1.

    Those that it does not have, such as methods for float files only, keep their own.

    Raises:
        ZoError: The file is none of a comparison, or has no result of any entry.
    """
    require_file(path, "comparison")
    try:
        outcomes = json.loads(path.read_text())["outcomes"]
        found = {o["label"]: float(o["multiplier"]) for o in outcomes if not o["failure"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ZoError(f"{str(path)!r} is no compare.json of an earlier comparison.") from error
    if not any(entry.label in found for entry in entries):
        raise ZoError(f"{str(path)!r} has no result of any entry that is to be compared.")
    return [
        replace(entry, rates=tuple(sorted({1.0, found[entry.label]})))
        if entry.label in found
        else entry
        for entry in entries
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of GGUFs and masks")
    parser.add_argument("--name", required=True, help="file name before -QUANT.gguf")
    parser.add_argument("--data", type=Path, required=True, help="folder: train, valid, test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--quant", nargs="+", default=["Q4_0"], help="default: Q4_0")
    parser.add_argument("--tokens", type=float, default=1.6e6, help="budget per run (%(default)g)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="REGEX", help="entries whose label matches")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rates", type=float, nargs="+", metavar="X", help=RATES_HELP)
    rates.add_argument("--rates-of", type=Path, metavar="JSON", help=RATES_OF_HELP)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (%(default)s)")
    parser.add_argument("--hf", type=Path, help="Hugging Face folder, for the first-order bound")
    options = parser.parse_args(argv)
    try:
        task, entries = prepare(options)
        report = run(task, entries, options.quant, options.jobs, options.hf)
    except ZoError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped.")
        return 130
    print(report.markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
