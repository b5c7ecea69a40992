"""Every estimator's formula in numpy, on losses given as a function; used by test_method_reference.

Each takes the loss, theta, the steps z of its directions, and eps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Loss = Callable[[Vector], list[Vector]]  # of theta, (nnz,): each row's tokens' losses
Estimates = tuple[list[float], list[float], list[float]]  # loss_plus, loss_minus, slope


def rows(loss: Loss, theta: Vector) -> Vector:
    """Mean over the tokens of each row."""
    return np.array([tokens.mean() for tokens in loss(theta)])


def spsa(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    plus = [rows(loss, theta + eps * z).mean() for z in steps]
    minus = [rows(loss, theta - eps * z).mean() for z in steps]
    return plus, minus, [(a - b) / (2 * eps) for a, b in zip(plus, minus, strict=True)]


def damped(information: Vector, slopes: Any) -> list[float]:
    """Slopes multiplied by the inverse of the information with its mean added to the diagonal."""
    n = len(information)
    return list(np.linalg.inv(information + np.trace(information) / n * np.eye(n)) @ slopes)


def natural(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    plus, minus, slopes = spsa(loss, theta, steps, eps)
    sides = [(loss(theta + eps * z), loss(theta - eps * z)) for z in steps]
    information = np.zeros((len(steps), len(steps)))
    n_rows = len(sides[0][0])
    for row in range(n_rows):
        tokens = np.array([(a[row] - b[row]) / (2 * eps) for a, b in sides])
        for token in tokens.T:
            information += np.outer(token, token) / tokens.shape[1] / n_rows
    return plus, minus, damped(information, slopes)


def natural_one_sided(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    here, there = loss(theta), [loss(theta + eps * z) for z in steps]
    means = [np.mean([row.mean() for row in found]) for found in (here, *there)]
    n = len(here)
    slopes, information = np.zeros(len(steps)), np.zeros((len(steps), len(steps)))
    for row in range(n):
        likelihoods = [np.exp(-found[row]) for found in (here, *there)]
        tokens = np.array([(1 - later / likelihoods[0]) / eps for later in likelihoods[1:]])
        slopes += tokens.mean(axis=1) / n
        information += tokens @ tokens.T / tokens.shape[1] / n
    return means[1:], [means[0]] * len(steps), damped(information, slopes)


def natural_choices(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    """Here and below, `loss` gives the probabilities of every row's choices, the right one at 0."""
    sides = [(loss(theta + eps * z), loss(theta - eps * z)) for z in steps]
    plus, minus = ([-np.mean([np.log(p[0]) for p in s[k]]) for s in sides] for k in (0, 1))
    slopes = [(a - b) / (2 * eps) for a, b in zip(plus, minus, strict=True)]
    information = np.zeros((len(steps), len(steps)))
    n_rows = len(sides[0][0])
    for row in range(n_rows):
        change = np.array([(a[row] - b[row]) / (2 * eps) for a, b in sides])
        middle = np.array([(a[row] + b[row]) / 2 for a, b in sides])
        response = change / np.sqrt(middle)
        information += response @ response.T / n_rows
    return plus, minus, damped(information, slopes)


def one_sided_choices(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    here, there = loss(theta), [loss(theta + eps * z) for z in steps]
    means = [-float(np.mean([np.log(p[0]) for p in found])) for found in (here, *there)]
    slopes, information = np.zeros(len(steps)), np.zeros((len(steps), len(steps)))
    for row, p in enumerate(here):  # the logits move along tangents
        score = np.array([np.log(later[row] / p) / eps for later in there])
        score -= score @ p[:, None]
        slopes -= score[:, 0] / len(here)
        information += (score * p) @ score.T / len(here)
    return means[1:], [means[0]] * len(steps), damped(information, slopes)


def fzoo(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    assert all(set(np.abs(z)) - {0} == {1} for z in steps)  # 0: what this step does not train
    here = float(rows(loss, theta).mean())
    there = [rows(loss, theta + eps * z).mean() for z in steps]
    return there, [here] * len(there), [(a - here) / np.std(there) for a in there]
