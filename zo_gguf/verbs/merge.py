"""`merge`: a delta becomes one complete GGUF, or a LoRA, for stock apps; measures what survived.

The smallest file that keeps enough of the gain on the validation rows is taken; what is reported
was measured on the test rows where the data has some. How bytes change stands in `merging.patches`,
which files are possible in `merging.plan`, what people see in `merging.result`.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zo_gguf
from zo_gguf.config import MergeConfig, takes
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.write import Value, check_disk
from zo_gguf.merging.edits import write_edited
from zo_gguf.merging.measure import Baseline, Rows, find_source, measure_baseline, open_base
from zo_gguf.merging.patches import (
    can_round,
    patch_bytes,
    plain_patches,
    rounded_patches,
    roundings,
)
from zo_gguf.merging.plan import Plan, kept_tensors, missing_growth, plans, write_plan
from zo_gguf.merging.requantize import Patch
from zo_gguf.merging.result import MIN_GAIN, Candidate, MergeResult, retention
from zo_gguf.merging.stock import measure_stock
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import describe
from zo_gguf.params.lora import LoraSummary, check_lora, write_lora
from zo_gguf.system import atomic_write, check_output, is_running

RETENTION_GOAL = 0.98
_DRAFTS = "edited|draft|best"

_Keys = dict[str, Value | None]


@dataclass(frozen=True)
class _Job:
    """What a merge works on.

    `source` is the base with its edits in place, to which `delta` adds; `provenance` is what every
    written file says about its origin.
    """

    config: MergeConfig
    base: GgufFile
    source: GgufFile
    delta: Delta
    output: Path
    baseline: Baseline | None
    provenance: _Keys


@takes(MergeConfig)
def merge(config: MergeConfig) -> MergeResult:
    """Write the merged GGUF or LoRA, and a `.merge.json` with the numbers beside it.

    Args:
        config: See MergeConfig.

    Returns:
        What was written and what survived; its losses are None where no rows are at hand.

    Raises:
        ZoError: The run, base or data cannot be used, the output exists, or no LoRA is possible.
        DoesNotFitError: The disk is too small.
    """
    delta = Delta.load(config.run)
    source = find_source(Path(config.run))
    base = open_base(config, source.run, delta)
    inputs = [base.path, *source.files]
    output = check_output(config.output, overwrite=config.overwrite, inputs=inputs)
    if config.lora:
        check_lora(base, delta, config.rank)
    measured = measure_baseline(config, source.run, base, delta)
    baseline = measured if isinstance(measured, Baseline) else None
    provenance = _provenance(base, delta, source.name)
    in_file = bool(delta.live or delta.gains)
    with _drafts(output, ["edited"]) as (edited,):
        start = write_edited(base, delta, edited) if in_file else base
        rest = delta.products() if in_file else delta
        job = _Job(config, base, start, rest, output, baseline, provenance)
        result = _merge_lora(job) if config.lora else _merge_model(job)
    if isinstance(measured, str):
        result = result.with_notes([measured])
    elif result.retention is None:
        note = (
            f"The tuned weights are not better than the base by {MIN_GAIN:g} on these rows, so "
            "there is no gain of which a share could be kept."
        )
        result = result.with_notes([note])
    with atomic_write(output.with_name(output.name + ".merge.json")) as file:
        file.write(json.dumps(result.to_dict(), indent=2, allow_nan=False).encode() + b"\n")
    return result


def _merge_model(job: _Job) -> MergeResult:
    """Write the first plan that keeps enough, or else the best."""
    config, base, delta = job.config, job.source, job.delta
    keys = job.provenance | _names(job.base, job.provenance["zo_gguf.run"], job.output)
    tried: list[Candidate] = []
    best: Candidate | None = None
    with _drafts(job.output, ["draft", "best"]) as (draft, kept):
        nothing_to_choose = job.baseline is None or delta.is_zero
        kind = "keep" if nothing_to_choose and config.type == "auto" else config.type
        rounded = _Roundings(job, kind)
        todo = plans(base, delta, rounded.by, kind, config.max_growth, rounded.n_ways)
        for plan in todo:
            keys["zo_gguf.merge.types"] = plan.label
            write_plan(base, delta, rounded.by(plan.way), plan, draft, keys)
            candidate = _measured(job, draft, plan)
            tried.append(candidate)
            if candidate.better_than(best):
                best = candidate
                os.replace(draft, kept)
            if candidate.settles(RETENTION_GOAL):
                break
        assert best is not None
        settled = best.settles(RETENTION_GOAL)
        best = _reported(job, kept, best)
        os.replace(kept, job.output)
    result = _result(job, best, tried)
    # Edits in place are exact: what is missing then is the noise of two ways to compute the same.
    if config.type == "auto" and delta.changed and not settled:
        note = (
            f"No file within growth {config.max_growth:g} surely keeps {RETENTION_GOAL:.0%} of the "
            f"gain, so this is the best of {len(tried)}; {missing_growth(base, delta)}."
        )
        return result.with_notes([note])
    return result


class _Roundings:
    """The new bytes by each way of rounding, made when asked for; the first two are kept."""

    def __init__(self, job: _Job, kind: str) -> None:
        base, delta, self._job = job.source, job.delta, job
        names = [] if delta.is_zero else kept_tensors(base, delta, kind)
        helps = job.baseline is not None and kind in ("auto", "keep")
        can = any(can_round(base.tensors[name].type) for name in names)
        self._roundings = roundings(delta)
        self.n_ways = 1 + len(self._roundings) if helps and can else 1
        self._folder = job.output.parent
        n_bytes = patch_bytes(base, delta, names) * min(self.n_ways, 3)
        check_disk(job.output, base.path.stat().st_size + n_bytes)
        if names:
            _say(f"re-quantizing {len(names)} tuned matrices")
        self._plain = plain_patches(base, delta, names, self._folder, job.config.threads)
        self._first: Mapping[str, Patch] | None = None

    def by(self, way: int) -> Mapping[str, Patch]:
        """The new bytes of a way: 0 is plain, the others choose codes by inputs."""
        if way == 0 or self._job.baseline is None:
            return self._plain
        if way == 1 and self._first is not None:
            return self._first
        job, rows, rounding = self._job, self._job.baseline.calibration, self._roundings[way - 1]
        _say("choosing codes by the inputs of the tuned weights")
        made = rounded_patches(
            job.source, job.delta, self._plain, rows, rounding, self._folder, job.config.threads
        )
        if way == 1:
            self._first = made
        return made


def _measured(job: _Job, path: Path, plan: Plan) -> Candidate:
    promoted = {name: kind.name for name, kind in plan.promoted.items()}
    candidate = Candidate(plan.label, promoted, plan.growth, path.stat().st_size)
    if job.baseline is None:
        return candidate
    _say(f"measuring {plan.label} (growth {plan.growth:.2f}) in stock llama-cpp-python")
    return _with_losses(job, candidate, path, job.baseline.choosing)


def _reported(job: _Job, path: Path, chosen: Candidate) -> Candidate:
    """The chosen file with the numbers that people are told: of rows that did not choose it."""
    if job.baseline is None or job.baseline.reporting is None:
        return chosen
    rows = job.baseline.reporting
    _say(f"measuring the chosen file on {len(rows.examples)} {rows.split} rows")
    return _with_losses(job, chosen, path, rows)


def _with_losses(
    job: _Job, candidate: Candidate, model: Path, rows: Rows, lora: Path | None = None
) -> Candidate:
    merged = measure_stock(model, rows.examples, lora=lora, n_threads=job.config.threads)
    return candidate.with_losses(merged, retention(rows.base, rows.tuned, merged))


def _merge_lora(job: _Job) -> MergeResult:
    base, baseline = job.base, job.baseline
    _say(f"factoring {job.delta.nnz} tuned weights")
    keys = {"general.name": job.output.stem, **job.provenance}
    base_bytes = base.path.stat().st_size
    with _drafts(job.output, ["draft"]) as (draft,):
        summary = write_lora(base, job.delta, draft, rank=job.config.rank, keys=keys)
        growth = (base_bytes + summary.n_bytes) / base_bytes
        candidate = Candidate(f"base and LoRA of rank {summary.rank}", {}, growth, summary.n_bytes)
        if baseline is not None:
            _say("measuring the LoRA in stock llama-cpp-python")
            candidate = _with_losses(job, candidate, base.path, baseline.reported, lora=draft)
        os.replace(draft, job.output)
    return _result(job, candidate, [candidate], lora=summary)


def _result(
    job: _Job,
    chosen: Candidate,
    tried: Iterable[Candidate],
    lora: LoraSummary | None = None,
) -> MergeResult:
    return MergeResult(
        output=job.output,
        model=job.base.path,
        rows=job.baseline.reported.split if job.baseline else None,
        base=job.baseline.reported.base.result if job.baseline else None,
        tuned=job.baseline.reported.tuned.result if job.baseline else None,
        chosen=chosen,
        tried=tuple(tried),
        base_bytes=job.base.path.stat().st_size,
        lora=lora,
    )


@contextmanager
def _drafts(output: Path, ends: Sequence[str]) -> Iterator[list[Path]]:
    """Temporary names beside `output`; what is left under them, also by a kill, is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in output.parent.iterdir():
        killed = re.fullmatch(rf"\.{re.escape(output.name)}\.(\d+)\.({_DRAFTS})", path.name)
        if killed and not is_running(int(killed[1])):
            path.unlink(missing_ok=True)
    paths = [output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ends]
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


# ---- metadata ------------------------------------------------------------------------------------


def _provenance(base: GgufFile, delta: Delta, run: str) -> _Keys:
    """What the file came from; no time stamps, so that the same merge gives the same bytes."""
    digest = hashlib.sha256()
    for name, indices in delta.tensors.items():
        digest.update(name.encode() + indices.astype("<i8").tobytes())
    digest.update(json.dumps(describe(delta.edits, delta.low_rank)).encode())
    digest.update(delta.theta.astype("<f4").tobytes())
    return {
        "zo_gguf.version": zo_gguf.__version__,
        "zo_gguf.method": delta.header.method,
        "zo_gguf.run": run,
        "zo_gguf.base.file": base.path.name,
        "zo_gguf.base.sha256": base.sha256(),
        "zo_gguf.delta.sha256": digest.hexdigest(),
        "zo_gguf.delta.nnz": delta.nnz,
        "zo_gguf.provenance": json.dumps(delta.header.provenance, sort_keys=True),
    }


def _names(base: GgufFile, run: Value | None, output: Path) -> _Keys:
    """The model's own name, and the base as what it was made from."""
    base_name = base.name or base.path.stem
    keys: _Keys = {key: None for key in base.header.keys if key.startswith("general.base_model.")}
    keys["general.name"] = output.stem
    keys["general.finetune"] = run
    keys["general.base_model.count"] = 1
    keys["general.base_model.0.name"] = base_name
    for key in ("organization", "repo_url", "author", "version"):
        value = base.metadata(f"general.{key}")
        if isinstance(value, str) and value:
            keys[f"general.base_model.0.{key}"] = value
    return keys


def _say(text: str) -> None:
    print(f"merge: {text}", file=sys.stderr, flush=True)
