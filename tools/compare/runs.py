"""The runs of one entry of a comparison: search its learning rate, tune, evaluate, merge.

Every run is a `zo-gguf` command line in a process of its own. Runs are told apart by a hash of
their options: a finished one is used again, an interrupted one goes on.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tools.compare.entries import Entry
from tools.compare.plot import Outcome, SeedRun
from zo_gguf.config import MASK_SUFFIX, TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.system import atomic_write
from zo_gguf.tuning.estimators import estimator_of
from zo_gguf.tuning.options import settle
from zo_gguf.tuning.run import Run
from zo_gguf.tuning.trajectory import Trajectory

N_VALIDATIONS = 8  # of a run over the whole budget


class Failed(Exception):
    """An entry or a run has no result; the message says why in one sentence."""


@dataclass(frozen=True)
class Task:
    """What the entries are compared on; `budget` is in forward tokens of one run."""

    models: Path
    name: str
    data: Path
    out: Path
    budget: float
    n_seeds: int
    row_tokens: float

    def model(self, quant: str) -> Path:
        """The GGUF of a quant."""
        return self.models / f"{self.name}-{quant}.gguf"

    def mask(self, quant: str, score: str) -> Path:
        """The mask of a quant: beside the model, or where `export -o SCORE` put it."""
        stem = f"{self.name}-{quant}"
        beside = self.models / f"{stem}{'.' * bool(score)}{score}{MASK_SUFFIX}"
        apart = self.models / score / f"{stem}{MASK_SUFFIX}"
        return apart if apart.is_file() and not beside.is_file() else beside


def tokens_per_step(task: Task, options: dict[str, Any]) -> float:
    """Mean forward tokens of a step, over all probes of all directions.

    For soft targets each row is read as well, once if no row comes twice.
    """
    config = TuneConfig(**options, output="run")
    estimator = estimator_of(config)
    forwards = estimator.n_probes + (config.targets == "soft")
    return task.row_tokens * estimator.examples_per_step * forwards


# --- one command line ----------------------------------------------------------------------------


def call(log: Path, command: Sequence[str]) -> str:
    """Run a command on one thread and return its stdout; its stderr goes to `log`.

    Raises:
        Failed: With the command's last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment, check=False
        )
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise Failed(last.removeprefix("zo-gguf: error: "))
    return done.stdout


def zo(run: Path, verb: str, *words: str) -> str:
    """`zo-gguf VERB WORDS`, logged beside the run it is about."""
    return call(
        run.with_name(f"{run.name}.{verb}.log"), [sys.executable, "-m", "zo_gguf", verb, *words]
    )


def flags(options: dict[str, Any]) -> list[str]:
    """Options as the command line takes them."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


# --- one entry -----------------------------------------------------------------------------------


def base_options(task: Task, entry: Entry, quant: str) -> dict[str, Any]:
    """The options that all runs of an entry share.

    Raises:
        Failed: This version or the folder of models has not got what the entry needs.
    """
    options: dict[str, Any] = {"model": str(task.model(quant)), "data": str(task.data)}
    if entry.mask is not None:
        path = task.mask(quant, entry.mask)
        if not path.is_file():
            raise Failed(f"not available: there is no mask {str(path)!r}.")
        options["mask"] = str(path)
    options |= {"method": entry.method, "estimator": entry.estimator, "targets": entry.targets}
    options |= {"optimizer": entry.optimizer} | entry.options
    unknown = sorted(options.keys() - {item.name for item in fields(TuneConfig)})
    if unknown:
        raise Failed(f"not available: this version has no option {', '.join(unknown)}.")
    try:
        settle(TuneConfig(**options, output="run"))
    except ZoError as error:
        raise Failed(f"not available: {error}") from error
    return options


def tune(folder: Path, options: dict[str, Any]) -> Run:
    """A finished run in `folder`: done before, gone on with, or started.

    Raises:
        Failed: It came to no end, such as by diverging.
    """
    if not (folder / "summary.json").is_file():
        if (folder / "config.yaml").is_file() and (folder / "trajectory.bin").is_file():
            zo(folder, "tune", "--resume", str(folder))
        else:
            zo(folder, "tune", *flags(options), "-o", str(folder), "-t", "1", "--overwrite")
    return Run.open(folder)


def run_folder(task: Task, entry: Entry, kind: str, options: dict[str, Any]) -> Path:
    """Where a run lies; runs with other options get other names."""
    quant = Path(options["model"]).stem.removeprefix(f"{task.name}-")
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    return task.out / quant / entry.slug / f"{kind}-{digest}"


def validations(run: Run) -> dict[int, dict[str, Any]]:
    """The validations of a run by step."""
    lines = {line["step"]: line for line in run.metrics() if "valid_loss" in line}
    return {step: lines[step] for step in sorted(lines)}


def search(
    task: Task, entry: Entry, options: dict[str, Any], outcome: Outcome, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """Run the first seed with every learning rate, and keep the best run as the outcome's first.

    Returns:
        Its learning rate, and the eps that belongs to it, as options for the other seeds.

    Raises:
        Failed: No rate gave a run that came to its end.
    """
    options = options | {"seed": 0}
    per_step = outcome.tokens_per_step
    folder = run_folder(task, entry, "seed0-x1", options)
    runs = {1.0: pool.submit(full_run, folder, options, per_step)}
    found = {1.0: derived(folder, runs[1.0])}
    for multiplier in sorted(set(entry.rates) - {1.0}):
        rate = float(f"{found[1.0]['learning_rate'] * multiplier:.3g}")
        found[multiplier] = found[1.0] | {"learning_rate": rate}
        tried = options | found[multiplier]
        folder = run_folder(task, entry, f"seed0-x{multiplier:.3g}", tried)
        runs[multiplier] = pool.submit(full_run, folder, tried, per_step)
    losses, done = {}, {}
    for multiplier, future in runs.items():
        key = f"{multiplier:.4g}"
        try:
            done[multiplier] = future.result()
            outcome.search[key] = losses[multiplier] = done[multiplier].valid["loss"]
        except Failed as error:
            outcome.search[key] = str(error)
    if not losses:
        raise Failed(f"failed at every learning rate: {outcome.search['1']}")
    # A rate that never helps has the loss of the untouched model; the default wins such a tie.
    best = min(losses, key=lambda m: (losses[m], m != 1.0))
    outcome.multiplier = float(f"{best:.4g}")
    outcome.learning_rate = found[best]["learning_rate"]
    outcome.runs.append(done[best])
    return found[best]


def derived(folder: Path, future: Future[SeedRun]) -> dict[str, Any]:
    """The learning rate and eps that `tune` derived, even if the run diverged afterwards.

    Raises:
        Failed: It did not get as far.
    """
    error = future.exception()
    if error is not None and not isinstance(error, Failed):
        raise error
    if not (folder / "config.yaml").is_file():  # refused before anything was written
        raise Failed(f"not available: {error}")
    config = Run.open(folder).config
    if config.learning_rate is None:
        raise Failed(f"failed: {error}")
    return {"learning_rate": config.learning_rate, "eps": config.eps}


def full_run(folder: Path, options: dict[str, Any], per_step: float) -> SeedRun:
    """Tune over the whole budget and measure the test rows."""
    run = tune(folder, options)
    lines = validations(run)
    best = min(lines.values(), key=lambda line: float(line["valid_loss"]))
    test = folder / "test.json"
    if not test.is_file():
        text = evaluate(folder, options["model"], options["data"], "test", folder)
        with atomic_write(test) as file:
            file.write(text.encode())
    return SeedRun(
        folder=str(folder),
        seed=options["seed"],
        curve=[(step * per_step, line["valid_loss"]) for step, line in lines.items()],
        valid={"loss": best["valid_loss"], "accuracy": best["valid_accuracy"]},
        test=json.loads(test.read_text()),
    )


def evaluate(log: Path, model: str, data: str, split: str, run: Path | None = None) -> str:
    """`zo-gguf eval --json` of a model, or of a run on it."""
    words = ["-m", model, "--data", data, "--split", split, "-t", "1", "--json"]
    words += ["--rows", str(TuneConfig.valid_rows)] if split == "valid" else []
    return zo(log, "eval", *words, *(["--delta", str(run)] if run else []))


def merge(folder: Path) -> dict[str, Any]:
    """What survives in one GGUF, in stock llama-cpp-python on the validation rows."""
    output = folder.with_name(f"{folder.name}.gguf")
    result = output.with_name(f"{output.name}.merge.json")
    if not result.is_file():
        try:
            zo(folder, "merge", str(folder), "-o", str(output), "-t", "1", "--json", "--overwrite")
        except Failed as error:
            return {"failure": textwrap.shorten(str(error), 70, placeholder=" ...")}
    merged: dict[str, Any] = json.loads(result.read_text())
    return merged


def compare(task: Task, entry: Entry, quant: str, pool: ThreadPoolExecutor) -> Outcome:
    """Search the learning rate with the first seed, run the others, merge the first."""
    outcome = Outcome(quant, entry.label)
    try:
        shared = base_options(task, entry, quant)
        outcome.tokens_per_step = tokens_per_step(task, shared)
        outcome.steps = steps = max(1, int(task.budget / outcome.tokens_per_step))
        options = shared | {"iters": steps, "valid_every": -(-steps // N_VALIDATIONS)}
        options |= search(task, entry, options, outcome, pool)
        started: dict[int, Future[SeedRun]] = {}
        for seed in range(1, task.n_seeds):
            folder = run_folder(task, entry, f"seed{seed}", options | {"seed": seed})
            started[seed] = pool.submit(
                full_run, folder, options | {"seed": seed}, outcome.tokens_per_step
            )
        for seed, future in started.items():
            try:
                outcome.runs.append(future.result())
            except Failed as error:
                outcome.notes.append(f"seed {seed} failed: {error}")
        folder = Path(outcome.runs[0].folder)
        outcome.n_parameters = Trajectory.load(folder / "trajectory.bin").header.get("nnz")
        outcome.merge = pool.submit(merge, folder).result()
    except (Failed, ZoError) as error:
        outcome.failure = str(error)
    return outcome
