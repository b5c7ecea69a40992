"""What a comparison of methods found: its Markdown table, its JSON and its plot.

Runs nothing; `compare/methods.py` does. Curves are means over seeds, read by linear interpolation.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_gguf.system import atomic_write

Curve = list[tuple[float, float]]  # (forward tokens, validation loss), ascending
_HEAD = (
    "quant",
    "method",
    "parameters",
    "learning rate",
    "tokens",
    "valid loss",
    "valid accuracy",
    "test loss",
    "test accuracy",
    "merged accuracy (valid)",
    "retention",
    "fewer tokens",
)


@dataclass(frozen=True)
class SeedRun:
    """A run over the whole budget.

    Attributes:
        folder: The run folder.
        seed: Its seed.
        curve: Every validation.
        valid: Loss and accuracy of the best validation, whose weights the run leaves.
        test: `zo-gguf eval --json` of these weights on the test rows.
    """

    folder: str
    seed: int
    curve: Curve
    valid: dict[str, Any]
    test: dict[str, Any]


@dataclass
class Outcome:
    """What one entry reached on one quant.

    Attributes:
        quant, label: Which.
        failure: Why there is nothing to show, empty otherwise.
        tokens_per_step: Mean forward tokens of a step.
        steps: Steps of a run over the whole budget.
        search: Multiplier of the default learning rate -> validation loss, or what went wrong.
        multiplier: The one chosen.
        learning_rate: Likewise, as a rate.
        n_parameters: Trained numbers.
        runs: One per seed that came to its end.
        merge: `zo-gguf merge --json` for seed 0, or {"failure": why not}.
        notes: Seeds that failed.
    """

    quant: str
    label: str
    failure: str = ""
    tokens_per_step: float = 0.0
    steps: int = 0
    search: dict[str, float | str] = field(default_factory=dict)
    multiplier: float = 1.0
    learning_rate: float = 0.0
    n_parameters: int | None = None
    runs: list[SeedRun] = field(default_factory=list)
    merge: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond the searched ones might have been better still."""
        tried = sorted(map(float, self.search))
        return len(tried) > 1 and self.multiplier in (tried[0], tried[-1])


@dataclass
class Report:
    """Everything a comparison found.

    Attributes:
        settings: What was compared on what; JSON values.
        reference: Label of the entry that the others are measured against.
        outcomes: In the order in which they are shown.
        base: Quant -> {"valid": ..., "test": ...} of the untouched model.
        bounds: Method -> quant -> the same for training by backpropagation, if that was asked for.
    """

    settings: dict[str, Any]
    reference: str
    outcomes: list[Outcome] = field(default_factory=list)
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    bounds: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write compare.json, compare.md and compare.png."""
        contents = {
            "compare.json": json.dumps(asdict(self), indent=2) + "\n",
            "compare.md": self.markdown(),
        }
        for name, text in contents.items():
            with atomic_write(folder / name) as file:
                file.write(text.encode())
        plot(self, folder / "compare.png")

    def quants(self) -> list[str]:
        """Those with something to show."""
        bounded = [quant for of_quants in self.bounds.values() for quant in of_quants]
        shown = [*self.base, *bounded, *(o.quant for o in self.outcomes if o.runs)]
        return list(dict.fromkeys(shown))

    def markdown(self) -> str:
        """The table and what has to be known to read it."""
        rows = [_HEAD, ("---",) * len(_HEAD)]
        for quant in self.quants():
            shown = [o for o in self.outcomes if o.quant == quant and o.runs]
            reference = next((o for o in shown if o.label == self.reference), None)
            rows += _plain_rows(quant, "base", self.base)
            rows += [_row(outcome, reference) for outcome in shown]
            for method, measured in self.bounds.items():
                rows += _plain_rows(quant, f"first-order bound, {method}", measured)
        lines = [f"| {' | '.join(row)} |" for row in rows]
        reasons = [
            f"- {outcome.quant}, {outcome.label}: {reason}"
            for outcome in self.outcomes
            for reason in [*filter(None, [outcome.failure]), *outcome.notes]
        ]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        text = (
            f"Settings: {settings}. Means ± standard deviation over seeds. All forwards of the "
            "tuning steps count; the search for eps and for the learning rate, and validations, "
            "do not. Valid loss, test and merge are those of the best validation. * marks a rate "
            "at the edge of the searched grid. Fewer tokens: how many times fewer than "
            f"{self.reference!r} needs to get to its last validation loss."
        )
        return "\n".join([*lines, "", *reasons, *([""] if reasons else []), text, ""])


def _plain_rows(
    quant: str, label: str, measured: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, ...]]:
    """The row of something that was not tuned with forward passes, if it was measured."""
    if quant not in measured:
        return []
    found = measured[quant]
    valid, test = found["valid"], found["test"]
    cells = [str(found.get("parameters", "-")), "-", "-"]
    for part in (valid, test):
        cells += [f"{part['loss']:.4f}", _number(part["accuracy"])]
    cells += ["-", "-", "-"]
    return [(quant, label, *cells)]


def _row(outcome: Outcome, reference: Outcome | None) -> tuple[str, ...]:
    runs, merge = outcome.runs, outcome.merge
    ratio = speedup(outcome, reference)
    rate = f"{outcome.learning_rate:.2g} (x{outcome.multiplier:.2g}{'*' * outcome.at_edge})"
    failed = merge.get("failure")
    kept = failed or _number(merge.get("retention"))
    return (
        outcome.quant,
        outcome.label,
        str(outcome.n_parameters or "-"),
        rate,
        f"{outcome.steps * outcome.tokens_per_step:.3g}",
        _spread([run.valid["loss"] for run in runs], 4),
        _spread([run.valid["accuracy"] for run in runs], 3),
        _spread([run.test["loss"] for run in runs], 4),
        _spread([run.test["accuracy"] for run in runs], 3),
        "-" if failed else _number(merge.get("accuracy_merged")),
        str(kept).replace("|", "/"),
        "-" if ratio is None else f"{ratio:.2f}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± sample standard deviation; the latter needs two values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {statistics.stdev(known):.{digits}f}"


def mean_curve(runs: Sequence[SeedRun]) -> Curve:
    """Mean over seeds at the points that all of them have."""
    curves = [dict(run.curve) for run in runs]
    shared = [x for x in curves[0] if all(x in curve for curve in curves)] if curves else []
    return [(x, statistics.fmean(curve[x] for curve in curves)) for x in sorted(shared)]


def tokens_to(curve: Curve, target: float) -> float | None:
    """Forward tokens after which a curve is first at `target` or below; None if it never is."""
    before: tuple[float, float] | None = None
    for x, loss in curve:
        if loss <= target:
            if before is None:
                return x
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (x, loss)
    return None


def speedup(outcome: Outcome, reference: Outcome | None) -> float | None:
    """How many times fewer tokens than the reference to the reference's last validation loss."""
    if reference is None or not (theirs := mean_curve(reference.runs)):
        return None
    target = theirs[-1][1]
    needed, own = tokens_to(theirs, target), tokens_to(mean_curve(outcome.runs), target)
    return needed / own if needed and own else None  # 0: the reference learned nothing


def plot(report: Report, path: Path) -> None:
    """Draw validation loss against forward tokens, a panel per quant and a line per entry."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quants = [q for q in report.quants() if any(o.runs for o in report.outcomes if o.quant == q)]
    if not quants:
        return
    labels = list(dict.fromkeys(outcome.label for outcome in report.outcomes if outcome.runs))
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    height = max(5.0, 0.21 * (len(labels) + len(report.bounds) + 1))  # as tall as the legend
    figure = Figure(figsize=(3 + 5 * len(quants), height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(quants), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, quant in zip(panels, quants, strict=True):
        axes.set(title=quant, xlabel="forward tokens")
        axes.grid(alpha=0.3)
        for outcome in report.outcomes:
            if outcome.quant != quant or not outcome.runs:
                continue
            number = labels.index(outcome.label)
            (line,) = axes.plot(
                *zip(*mean_curve(outcome.runs), strict=True),
                color=colors[number % len(colors)],
                linestyle="-" if number < len(colors) else ":",
                linewidth=2.2 if outcome.label == report.reference else 1.2,
            )
            handles.setdefault(outcome.label, line)
        for method, style in zip(report.bounds, ("--", ":", "-."), strict=False):
            if quant in report.bounds[method]:
                bound = report.bounds[method][quant]["valid"]["loss"]
                label = f"first-order bound, {method}"
                line = axes.axhline(bound, color="0.3", linestyle=style)
                handles.setdefault(label, line)
    panels[0].set_ylabel("validation loss")
    # From the highest line to the lowest, as they end in the first panel that has them.
    order = sorted(handles, key=lambda label: -float(handles[label].get_ydata()[-1]))
    lines = [handles[label] for label in order]
    figure.legend(lines, order, loc="outside right upper", fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
