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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw
from zo_gguf.data.encode import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.params.sparse_file import digest
from zo_gguf.system import atomic_write

FOLDS = 5
_PENALTIES = 10.0 ** np.arange(-5, 1.1, 0.5)  # sklearn's C, from the strongest penalty on
_LEAST = 1e-6  # probability

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]
States = NDArray[np.float32]


def cross_fit(states: States, labels: Indices) -> tuple[Matrix, float]:
    """Probabilities of every class for each row, from logistic regressions on the other folds.

    Args:
        states: (n_rows, n_features).
        labels: (n_rows,) from 0 on, each class at least `FOLDS` times.

    Returns:
        float64 (n_rows, n_classes), each row's sum 1, and the penalty whose loss is lowest.
    """
    try:
        from sklearn.model_selection import StratifiedKFold, cross_val_predict  # takes a second
    except ImportError as error:
        raise ZoError(
            "Soft targets need scikit-learn; run `pip install scikit-learn`, or take "
            "--targets answers."
        ) from error

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    best, best_penalty, best_loss = np.empty(0), 0.0, np.inf
    for penalty in _PENALTIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the weakest penalties may not converge, and lose
            found = chances_of(
                cross_val_predict(
                    classifier(penalty), states, labels, cv=folds, method="predict_proba"
                )
            )
        loss = losses_of(found, labels).mean()
        if loss >= best_loss:  # with weaker ones it only grows
            break
        best, best_penalty, best_loss = found, float(penalty), loss
    return best, best_penalty


def classifier(penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=200))


def chances_of(found: NDArray[np.floating]) -> Matrix:
    """Probabilities, none of them 0, (n, n_classes)."""
    chances = np.clip(np.asarray(found, np.float64), _LEAST, None)
    return np.asarray(chances / chances.sum(axis=1, keepdims=True))


def losses_of(chances: Matrix, labels: Indices) -> Matrix:
    """Cross-entropy of every row, (n,), of probabilities (n, n_classes)."""
    return np.asarray(-np.log(chances[np.arange(labels.size), labels]))


# ---- targets -------------------------------------------------------------------------------------


MOST = 4096  # rows that classifiers are fitted to; more take memory and tell little more
_COMPARED = 256  # rows on which the untuned model's own answers are compared with the classifier's
_ROWS, _TARGETS, _CHECKSUM = "rows", "targets", "sha256"


@dataclass(frozen=True)
class TargetsReport:
    """How well the classifier tells the answers of rows that it was not fitted to.

    Measured on up to 256 of the rows, as is the untuned model, whose scores are calibrated by
    another such classifier where that helps: what a bias alone costs, tuning soon makes good.

    Attributes:
        n_rows: Rows that classifiers were fitted to.
        loss, model_loss: Cross-entropies.
        accuracy, model_accuracy: Shares of right answers.
        error: Standard error of the difference of the losses.
    """

    n_rows: int
    loss: float
    model_loss: float
    accuracy: float
    model_accuracy: float
    error: float

    @property
    def better(self) -> bool:
        """Whether the classifier tells clearly more than the untuned model."""
        clear = self.model_loss - self.loss > 2 * self.error
        return clear and self.accuracy >= self.model_accuracy

    def render(self) -> str:
        """One sentence for people."""
        return (
            f"a linear classifier of the hidden states of {self.n_rows} rows: loss "
            f"{self.loss:.3f}, accuracy {self.accuracy:.3f} on rows it was not fitted to (the "
            f"untuned model, calibrated: {self.model_loss:.3f}, {self.model_accuracy:.3f})"
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
    if begun and config.targets != "soft":
        return "answers"
    if begun:
        draw.examples = aim(draw.examples, *load_targets(path, draw.examples))
        return "soft"
    seen = draw.seen(config.n_steps)
    if not wants_soft(config, draw.examples, seen):
        if config.targets == "auto" and draw.examples[0].choices:
            print(f"training aims at the answers: {_why_not(draw.examples, seen)}", file=sys.stderr)
        return "answers"
    try:
        targets, report = soft_targets(engine, draw.examples, seen)
    except ZoError as error:
        if config.targets == "soft":
            raise
        print(f"{error} Training aims at the answers.", file=sys.stderr)
        return "answers"
    used = report.better or config.targets == "soft"
    aims = "its probabilities" if used else "the answers"
    print(f"{report.render()}; training aims at {aims}", file=sys.stderr)
    if not used:
        return "answers"
    save_targets(path, seen, targets)
    draw.examples = aim(draw.examples, seen, targets)
    return "soft"


def wants_soft(config: TuneConfig, examples: Sequence[Example], seen: Sequence[int]) -> bool:
    """Whether to look for soft targets of the rows that a run will see.

    Raises:
        ZoError: They were asked for and there can be none.
    """
    if config.targets == "answers":
        return False
    reason = _why_not(examples, seen)
    if reason and config.targets == "soft":
        raise ZoError(f"There can be no soft targets: {reason}; leave --targets soft out.")
    return not reason


def _why_not(examples: Sequence[Example], seen: Sequence[int]) -> str:
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
        seen: Which of them to read; `wants_soft` has nothing against them.

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
        fit = classifier(penalty).fit(states, labels)
        for part in np.array_split(others, -(-others.size // MOST)):  # memory for so many
            of_classes[part] = chances_of(fit.predict_proba(_read(engine, rows, part)))
    own = np.array([[classes.index(choice) for choice in row.choices] for row in rows])
    report = _compare(engine, [rows[k] for k in fitted], own[fitted], labels, of_classes[fitted])
    return np.take_along_axis(of_classes, own, axis=1), report


def _compare(
    engine: Engine, rows: Sequence[Example], own: Indices, labels: Indices, found: Matrix
) -> TargetsReport:
    """Classifier against model; `own` has the class of every choice, (n_rows, n_classes)."""
    chosen = np.random.default_rng(1).permutation(labels.size)[:_COMPARED]  # rows may be sorted
    labels, found = labels[chosen], found[chosen]
    scores = engine.score([rows[k] for k in chosen])
    chances = np.empty_like(found)  # residuals and what is taken off for them
    of_choices = np.stack([residual[0] for residual in scores.outcomes]) + scores.targets
    np.put_along_axis(chances, own[chosen], chances_of(of_choices), axis=1)
    of_model = chances
    if np.bincount(labels, minlength=found.shape[1]).min() >= FOLDS:
        calibrated, _ = cross_fit(np.log(chances).astype(np.float32), labels)
        of_model = min(chances, calibrated, key=lambda p: losses_of(p, labels).mean())
    losses = losses_of(of_model, labels)
    of_classifier = losses_of(found, labels)
    return TargetsReport(
        n_rows=len(rows),
        loss=float(of_classifier.mean()),
        model_loss=float(losses.mean()),
        accuracy=float((found.argmax(axis=1) == labels).mean()),
        model_accuracy=float((of_model.argmax(axis=1) == labels).mean()),
        error=float((losses - of_classifier).std() / np.sqrt(labels.size)),
    )


def _fitted(n_rows: int) -> Indices:
    """Which rows classifiers are fitted to, ascending."""
    if n_rows <= MOST:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(0).permutation(n_rows)[:MOST])


def _read(engine: Engine, rows: Sequence[Example], which: Indices) -> States:
    return engine.hidden_states([rows[k].tokens[: rows[k].n_prompt] for k in which])


def aim(examples: Sequence[Example], seen: Sequence[int], targets: Matrix) -> list[Example]:
    """The rows, those that are seen with targets, (n_seen, n_choices)."""
    aimed = list(examples)
    for k, target in zip(seen, targets, strict=True):
        aimed[k] = dataclasses.replace(aimed[k], target=tuple(map(float, target)))
    return aimed


def save_targets(path: Path, seen: Sequence[int], targets: Matrix) -> None:
    """Write them down, so that a resumed run has the same to the last bit."""
    tensors: dict[str, NDArray[Any]] = {_ROWS: np.array(seen, np.int64), _TARGETS: targets}
    with atomic_write(path) as file:
        file.write(save(tensors, {_CHECKSUM: _checksum(tensors)}))


def load_targets(path: Path, examples: Sequence[Example]) -> tuple[list[int], Matrix]:
    """What `save_targets` wrote. Rows that a longer run sees beyond them aim at their answers.

    Raises:
        ZoError: The file is missing, damaged or of other rows.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in (_ROWS, _TARGETS)}
            if (file.metadata() or {}).get(_CHECKSUM) != _checksum(tensors):
                raise ValueError("its checksum differs")
        rows = tensors[_ROWS].tolist()
        shape = (len(rows), len(examples[0].choices))
        if tensors[_TARGETS].shape != shape or max(rows) >= len(examples):
            raise ValueError("it is of other rows")
    except (OSError, SafetensorError, ValueError) as error:
        raise ZoError(
            f"{str(path)!r} cannot be used ({error}); put the original back, or begin the run anew "
            "with --overwrite."
        ) from error
    return rows, tensors[_TARGETS]


def _checksum(tensors: dict[str, NDArray[Any]]) -> str:
    return digest(tensors[_ROWS], tensors[_TARGETS])


def _answer(example: Example) -> tuple[int, ...]:
    return example.choices[example.answer]
