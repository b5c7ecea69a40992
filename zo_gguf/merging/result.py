"""What a merge wrote and what survived: numbers, JSON, the table, and lines to paste for apps."""

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zo_gguf.engine.evaluation import EvalResult
from zo_gguf.merging.stock import Measured
from zo_gguf.params.lora import LoraSummary

MIN_GAIN = 1e-3  # nats; below it a share of the gain says nothing


@dataclass(frozen=True)
class Retention:
    """Share of the gain in loss that a file keeps, and its standard error over the rows."""

    value: float
    error: float


def retention(base: Measured, tuned: Measured, merged: Measured) -> Retention | None:
    """(loss_base - loss_merged) / (loss_base - loss_tuned), on the same rows.

    Returns:
        None where tuning did not lower the loss by MIN_GAIN.
    """
    wanted, got = base.losses - tuned.losses, base.losses - merged.losses  # (n,)
    gain = float(wanted.mean())
    if gain < MIN_GAIN:
        return None
    value = float(got.mean()) / gain
    spread = got - value * wanted  # paired: rows that are hard for all three cancel
    error = float(spread.std(ddof=1) / np.sqrt(spread.size)) / gain if spread.size > 1 else 0.0
    return Retention(value, error)


@dataclass(frozen=True)
class Candidate:
    """One file that was tried.

    Attributes:
        label: Which types it has.
        promoted: Tensors whose type changed -> the new type's name.
        growth: Size of its tensors over the base's.
        n_bytes: Size of the file.
        measured: Its losses in stock llama-cpp-python, None without rows.
        retention: What it keeps, None without rows or without a gain to keep.
    """

    label: str
    promoted: dict[str, str]
    growth: float
    n_bytes: int
    measured: Measured | None = None
    retention: Retention | None = None

    def with_losses(self, measured: Measured, kept: Retention | None) -> "Candidate":
        """The same with what was measured."""
        return replace(self, measured=measured, retention=kept)

    def settles(self, goal: float) -> bool:
        """Whether no larger file needs to be tried: it keeps `goal` and a standard error more."""
        return self.retention is None or self.retention.value - self.retention.error >= goal

    def better_than(self, other: "Candidate | None") -> bool:
        """Whether it keeps more than `other`."""
        if other is None:
            return True
        if self.retention is None or other.retention is None:
            return False
        return self.retention.value > other.retention.value


@dataclass(frozen=True)
class MergeResult:
    """What was written and what survived.

    Attributes:
        output: The merged GGUF, or the LoRA.
        rows: Which rows the numbers are of, "valid" or "test"; None where nothing was measured.
            A file is chosen by the valid rows, so that those of test rows are fair.
        model: The base GGUF.
        growth: Size of the tensors written (for a LoRA: base and LoRA) over the base's.
        retention: Share of the gain in loss that the file keeps, None where it is not known.
        retention_se: Its standard error.
        base: The base, in stock llama-cpp-python.
        tuned: The tuned weights, by the engine's hooks.
        merged: The file, in stock llama-cpp-python.
        chosen: The candidate that was taken.
        tried: All that were measured, smallest first.
        base_bytes: Size of the base file.
        lora: Ranks and what they hold, None for a merged GGUF.
        notes: Sentences that the user should see.
    """

    output: Path
    model: Path
    rows: str | None
    base: EvalResult | None
    tuned: EvalResult | None
    chosen: Candidate
    tried: Sequence[Candidate]
    base_bytes: int
    lora: LoraSummary | None = None
    notes: tuple[str, ...] = ()

    @property
    def growth(self) -> float:
        """See the class."""
        return self.chosen.growth

    @property
    def merged(self) -> EvalResult | None:
        """See the class."""
        return self.chosen.measured.result if self.chosen.measured else None

    @property
    def retention(self) -> float | None:
        """See the class."""
        return self.chosen.retention.value if self.chosen.retention else None

    @property
    def retention_se(self) -> float | None:
        """See the class."""
        return self.chosen.retention.error if self.chosen.retention else None

    def with_notes(self, notes: Sequence[str]) -> "MergeResult":
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        losses = {"base": self.base, "tuned": self.tuned, "merged": self.merged}
        return {
            "output": str(self.output),
            "model": str(self.model),
            "type": self.chosen.label,
            "promoted": self.chosen.promoted,
            "retention": self.retention,
            "retention_se": self.retention_se,
            "growth": self.growth,
            "rows": self.rows,
            "n": self.merged.n if self.merged else 0,
            **{f"loss_{name}": part.loss if part else None for name, part in losses.items()},
            **{
                f"accuracy_{name}": part.accuracy if part else None for name, part in losses.items()
            },
            **{name: part.to_dict() if part else None for name, part in losses.items()},
            "bytes_base": self.base_bytes,
            "bytes_merged": self.chosen.n_bytes,
            "candidates": [_candidate(candidate) for candidate in self.tried],
            "lora": dataclasses.asdict(self.lora) if self.lora else None,
            "notes": list(self.notes),
        }

    def render(self, as_json: bool = False) -> str:
        """One JSON object, or the table, what survived, and lines to paste."""
        if as_json:
            return json.dumps(self.to_dict(), allow_nan=False)
        lines = [*self._table(), "", *self._summary(), *self.notes, ""]
        model, adapter = (self.model, self.output) if self.lora else (self.output, None)
        lines += [f"{app + ':':<11}{text}" for app, text in paste_lines(model, adapter)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        total = self.chosen.n_bytes + (self.base_bytes if self.lora else 0)
        what = "with LoRA" if self.lora else "merged"
        rows = [
            ("base", self.base, self.base_bytes, "stock llama-cpp-python"),
            ("tuned", self.tuned, self.base_bytes, "zo-gguf hooks"),
            (what, self.merged, total, "stock llama-cpp-python"),
        ]
        lines = [f"{'':<11}{'loss':>9}{'accuracy':>10}{'size':>12}  measured by"]
        for name, result, n_bytes, how in rows:
            loss = f"{result.loss:.4f}" if result else "-"
            accuracy = f"{result.accuracy:.3f}" if result and result.accuracy is not None else "-"
            size = f"{n_bytes / 1e6:.2f} MB"
            lines.append(f"{name:<11}{loss:>9}{accuracy:>10}{size:>12}  {how if result else '-'}")
        return lines

    def _summary(self) -> list[str]:
        lines = []
        if self.chosen.retention:
            r = self.chosen.retention
            n = self.merged.n if self.merged else 0
            chosen = ", which also chose the file" if self.rows == "valid" and not self.lora else ""
            lines.append(
                f"retention  {r.value:.3f} ± {r.error:.3f} of the gain, "
                f"over {n} {self.rows} rows{chosen}"
            )
        lines.append(f"growth     {self.growth:.2f} ({self.chosen.label})")
        if self.lora:
            if self.lora.kept < 1:
                lines.append(
                    f"rank       {self.lora.rank} of {self.lora.exact_rank}; keeps "
                    f"{self.lora.kept:.2%} of the change's squared norm"
                )
            else:
                lines.append(f"rank       {self.lora.rank} (exact)")
        lines.append(f"written    {self.output}")
        return lines


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "type": candidate.label,
        "growth": candidate.growth,
        "retention": candidate.retention.value if candidate.retention else None,
        "loss": candidate.measured.result.loss if candidate.measured else None,
    }


# ---- lines to paste ------------------------------------------------------------------------------


def paste_lines(model: Path, lora: Path | None = None) -> list[tuple[str, str]]:
    """(app, what to paste) for each app that can load the files.

    Args:
        model: A complete GGUF.
        lora: An adapter for it. Ollama and LM Studio take none.
    """
    path = shlex.quote(str(model))
    extra = f" --lora {shlex.quote(str(lora))}" if lora else ""
    lora_argument = f", lora_path={str(lora)!r}" if lora else ""
    lines = [("llama.cpp", f"llama-cli -m {path}{extra}")]
    if lora is None:
        name = ollama_name(model)
        modelfile = f"printf 'FROM %s\\n' {shlex.quote(str(model.absolute()))} > Modelfile"
        lines += [
            ("Ollama", f"{modelfile} && ollama create {name} -f Modelfile && ollama run {name}"),
            ("LM Studio", f"lms import --user-repo zo-gguf/{name} -L {path}"),
        ]
    python = f"from llama_cpp import Llama; llm = Llama(model_path={str(model)!r}{lora_argument})"
    return [*lines, ("Python", python)]


def ollama_name(model: Path) -> str:
    """A model name that Ollama accepts, from the file's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", model.stem.lower()).strip("-._") or "tuned"
