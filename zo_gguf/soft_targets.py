"""What rows with choices are trained towards (`--targets`): answers, or soft targets.

An answer is a draw from what its text says of the choices, and late in a run most of the variance
between the rows' slopes is that draw. A linear classifier of the untuned model's hidden states (a
linear probe, arXiv 1610.01644) tells the probabilities behind the draws from one forward pass per
row; a loss towards them has nearly the same gradient with much less variance (soft targets, arXiv
1503.02531). No row's own answer is behind its target: the classifier that gives it was fitted to
other rows (cross-fitting, arXiv 1608.00060).
"""

import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from zo_gguf.config import TuneConfig
from zo_gguf.draw import Draw
from zo_gguf.encoding import Example
from zo_gguf.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.files import atomic_write

FOLDS = 5
MOST = 4096  # rows that classifiers are fitted to; more take memory and tell little more
_COMPARED = 256  # rows on which the untuned model's own answers are compared with the classifier's
_PENALTIES = 10.0 ** np.arange(-5, 1.1, 0.5)  # sklearn's C, from the strongest penalty on
_LEAST = 1e-6  # probability
_ROWS, _TARGETS = "rows", "targets"

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]
States = NDArray[np.float32]


@dataclass(frozen=True)
class TargetsReport:
    """How well the classifier tells the answers of rows that it was not fitted to.

    Attributes:
        n_rows: Rows that classifiers were fitted to, and measured on in turn.
        loss: Cross-entropy.
        accuracy: Share of right answers.
        model_loss: Of the untuned model on some of the rows.
        better: Whether the classifier's loss on these is lower.
    """

    n_rows: int
    loss: float
    accuracy: float
    model_loss: float
    better: bool

    def render(self) -> str:
        """One sentence for people."""
        return (
            f"a linear classifier of the hidden states of {self.n_rows} rows: loss "
            f"{self.loss:.3f}, accuracy {self.accuracy:.3f} on rows it was not fitted to (the "
            f"untuned model: loss {self.model_loss:.3f})"
        )


def choose_targets(
    config: TuneConfig, engine: Engine, draw: Draw, path: Path, *, begun: bool
) -> Literal["answers", "soft"]:
    """Have the rows of `draw` aim at what the options say, and say what that is.

    Args:
        config: The run's options.
        engine: The model, at its first theta unless the run has begun.
        draw: Its rows are replaced.
        path: Where the run keeps its soft targets.
        begun: Whether the run has steps, which then had the targets that are in `path`.

    Raises:
        ZoError: Soft targets were asked for and cannot be had, or the file cannot be used.
    """
    if config.targets == "answers" or (begun and config.targets == "auto"):  # which had none
        return "answers"
    seen = draw.seen(config.iters)
    if reason := why_not(draw.examples, seen):
        if config.targets == "soft":
            raise ZoError(f"There can be no soft targets: {reason}; leave --targets soft out.")
        return "answers"
    if begun:
        targets = load_targets(path, seen)
    else:
        targets, report = soft_targets(engine, draw.examples, seen)
        used = report.better or config.targets == "soft"
        aims = "its probabilities" if used else "the answers"
        print(f"{report.render()}; training aims at {aims}", file=sys.stderr)
        if not used:
            return "answers"
        save_targets(path, seen, targets)
    draw.examples = aim(draw.examples, seen, targets)
    return "soft"


def why_not(examples: Sequence[Example], seen: Sequence[int]) -> str:
    """Why there can be no soft targets for the rows that a run will see; "" if there can."""
    if not all(example.choices for example in examples):
        return "rows without choices have no probabilities to aim at"
    if len({frozenset(example.choices) for example in examples}) > 1:
        return "not all rows have the same choices"
    counts = Counter(_answer(examples[seen[k]]) for k in _fitted(len(seen)))
    if len(counts) < len(set(examples[0].choices)) or min(counts.values()) < FOLDS:
        return f"the rows that the run will see have some answers fewer than {FOLDS} times"
    return ""


def soft_targets(
    engine: Engine, examples: Sequence[Example], seen: Sequence[int]
) -> tuple[Matrix, TargetsReport]:
    """Probabilities of every choice of the rows that a run will see, in each row's own order.

    Args:
        engine: The model, at its first theta.
        examples: The rows to train on, all with the same choices.
        seen: Which of them to read; `why_not` has nothing against them.

    Returns:
        float64 (n_seen, n_choices), and how good they are.

    Raises:
        ZoError: The model gives no hidden states.
    """
    rows = [examples[k] for k in seen]
    classes = sorted(set(rows[0].choices))
    of_classes = np.empty((len(rows), len(classes)))
    fitted = _fitted(len(rows))
    labels = np.array([classes.index(_answer(rows[k])) for k in fitted])
    states = _read(engine, rows, fitted)
    of_classes[fitted], penalty = cross_fit(states, labels)
    others = np.setdiff1d(np.arange(len(rows)), fitted)
    if others.size:
        classifier = _classifier(penalty).fit(states, labels)
        for part in np.array_split(others, -(-others.size // MOST)):  # memory for so many
            of_classes[part] = _chances(classifier.predict_proba(_read(engine, rows, part)))
    losses = -np.log(of_classes[fitted, labels])
    compared = slice(0, _COMPARED)
    model_loss = float(engine.losses([rows[k] for k in fitted[compared]]).mean())
    report = TargetsReport(
        n_rows=labels.size,
        loss=float(losses.mean()),
        accuracy=float((of_classes[fitted].argmax(axis=1) == labels).mean()),
        model_loss=model_loss,
        better=bool(losses[compared].mean() < model_loss),
    )
    own = np.array([[classes.index(choice) for choice in row.choices] for row in rows])
    return np.take_along_axis(of_classes, own, axis=1), report


def _fitted(n_rows: int) -> Indices:
    """Which rows classifiers are fitted to, ascending."""
    if n_rows <= MOST:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(0).permutation(n_rows)[:MOST])


def _read(engine: Engine, rows: Sequence[Example], which: Indices) -> States:
    return engine.hidden_states([rows[k].tokens[: rows[k].n_prompt] for k in which])


def cross_fit(states: States, labels: Indices) -> tuple[Matrix, float]:
    """Probabilities of every class for each row, from logistic regressions on the other folds.

    Args:
        states: (n_rows, n_features).
        labels: (n_rows,) from 0 on, each class at least `FOLDS` times.

    Returns:
        float64 (n_rows, n_classes), each row's sum 1, and the penalty whose loss is lowest.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict  # takes a second

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    best, best_penalty, best_loss = np.empty(0), 0.0, np.inf
    for penalty in _PENALTIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the weakest penalties may not converge, and lose
            found = _chances(
                cross_val_predict(
                    _classifier(penalty), states, labels, cv=folds, method="predict_proba"
                )
            )
        loss = -np.log(found[np.arange(labels.size), labels]).mean()
        if loss >= best_loss:  # with weaker ones it only grows
            break
        best, best_penalty, best_loss = found, float(penalty), loss
    return best, best_penalty


def _classifier(penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=200))


def _chances(found: NDArray[np.floating]) -> Matrix:
    """Probabilities, none of them 0, (n, n_classes)."""
    chances = np.clip(np.asarray(found, np.float64), _LEAST, None)
    return np.asarray(chances / chances.sum(axis=1, keepdims=True))


def aim(examples: Sequence[Example], seen: Sequence[int], targets: Matrix) -> list[Example]:
    """The rows, those that are seen with targets, (n_seen, n_choices)."""
    aimed = list(examples)
    for k, target in zip(seen, targets, strict=True):
        aimed[k] = dataclasses.replace(aimed[k], target=tuple(map(float, target)))
    return aimed


def save_targets(path: Path, seen: Sequence[int], targets: Matrix) -> None:
    """Write them down, so that a resumed run has the same to the last bit."""
    with atomic_write(path) as file:
        file.write(save({_ROWS: np.array(seen, np.int64), _TARGETS: targets}))


def load_targets(path: Path, seen: Sequence[int]) -> Matrix:
    """What `save_targets` wrote.

    Raises:
        ZoError: The file is missing, damaged or of other rows.
    """
    try:
        tensors = load(path.read_bytes())
        if np.array_equal(tensors[_ROWS], np.array(seen, np.int64)):
            return np.asarray(tensors[_TARGETS], np.float64)
        reason = "it is of other rows"
    except (OSError, SafetensorError, KeyError) as error:
        reason = str(error)
    raise ZoError(f"{str(path)!r} cannot be used ({reason}); begin the run anew with --overwrite.")


def _answer(example: Example) -> tuple[int, ...]:
    return example.choices[example.answer]
