"""Probabilities of answers from hidden states: logistic regressions, each fitted to other rows."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError

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
