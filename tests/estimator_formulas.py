"""Every estimator's formula in numpy, on losses given as a function; used by test_method_reference.

Each takes loss(theta) -> the rows' losses, the steps z of its directions, and eps.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Loss = Callable[[Vector], Vector]  # of theta, (nnz,): the rows' losses
Estimates = tuple[list[float], list[float], list[float]]  # loss_plus, loss_minus, slope


def spsa(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    plus = [loss(theta + eps * z).mean() for z in steps]
    minus = [loss(theta - eps * z).mean() for z in steps]
    return plus, minus, [(a - b) / (2 * eps) for a, b in zip(plus, minus, strict=True)]


def curvature(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    plus, minus, slopes = spsa(loss, theta, steps, eps)
    here = loss(theta).mean()
    second = [abs(a - 2 * here + b) / eps**2 for a, b in zip(plus, minus, strict=True)]
    assert max(second) > 2  # or all weights could be 1
    return plus, minus, [g / max(1, c**0.1) for g, c in zip(slopes, second, strict=True)]


def natural(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    plus = np.array([loss(theta + eps * z) for z in steps])
    minus = np.array([loss(theta - eps * z) for z in steps])
    slopes = (plus - minus) / (2 * eps)
    information = np.mean([np.outer(s, s) for s in slopes.T], axis=0)
    damped = information + 0.1 * np.trace(information) / len(steps) * np.eye(len(steps))
    step = np.linalg.inv(damped) @ slopes.mean(axis=1)
    return list(plus.mean(axis=1)), list(minus.mean(axis=1)), list(step)


def fzoo(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    assert all((np.abs(z) == 1).all() for z in steps)
    here = float(loss(theta).mean())
    there = [loss(theta + eps * z).mean() for z in steps]
    return there, [here] * len(there), [(a - here) / np.std(there) for a in there]


def grzo(loss: Loss, theta: Vector, steps: list[Vector], eps: float) -> Estimates:
    plus = [loss(theta + eps * z)[row] for row, z in enumerate(steps)]
    minus = [loss(theta - eps * z)[row] for row, z in enumerate(steps)]
    differences = np.subtract(plus, minus)
    return plus, minus, list(differences / differences.std())
