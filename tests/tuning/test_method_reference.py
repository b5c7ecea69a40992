"""Every method with every estimator against the papers' formulas, written out in float64.

The engine gives z and the rows; perturbed weights, losses, slopes and updates are computed here:
those of the methods by method_formulas, those of the estimators by estimator_formulas.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers import models
from tests.helpers.estimator_formulas import (
    Estimates,
    Loss,
    Vector,
    fzoo,
    natural,
    natural_choices,
    natural_one_sided,
    one_sided_choices,
    spsa,
)
from tests.helpers.method_formulas import Base, make_base
from zo_gguf.data.dataset import Draw, Example, load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import native_library
from zo_gguf.engine.parameters import Parameters
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import RADEMACHER
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.estimators import estimator_of
from zo_gguf.tuning.methods import start
from zo_gguf.tuning.trajectory import Trajectory

tune_module = importlib.import_module("zo_gguf.verbs.tune")
N_STEPS, SEED = 20, 3
CHOICES: dict[str, Any] = {"choices": [" the light", " water", " a cold storm that had taken"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder, converted = tmp_path_factory.mktemp("bases"), models.converted("llama", hidden=64)
    return {quant: make_base(converted, quant, folder, 300) for quant in ("F16", "Q8_0")}


Formula = Callable[[Loss, Vector, list[Vector], float], Estimates]


@dataclass(frozen=True)
class Estimator:
    """Options, and the formula; `reach` multiplies a method's eps."""

    options: dict[str, Any]
    formula: Formula
    reach: float = 1
    of_choices: Formula | None = None  # where it is another one


@dataclass(frozen=True)
class Case:
    """A run."""

    method: str
    quant: str
    eps: float
    options: dict[str, Any]
    estimator: str = "spsa"
    choices: bool = False  # rows of choices, not of text

    def __str__(self) -> str:
        words = [self.method, self.quant, self.estimator, *self.options]
        return "-".join([*words, "choices"] if self.choices else words)


NATURAL: dict[str, Any] = {"estimator": "natural", "directions": 5}
ESTIMATORS = {
    "spsa": Estimator({}, spsa),
    "two-sided": Estimator({**NATURAL, "sides": 2}, natural, 1, natural_choices),
    "one-sided": Estimator({**NATURAL, "sides": 1}, natural_one_sided, 2, one_sided_choices),
    "fzoo": Estimator({"estimator": "fzoo", "directions": 4}, fzoo, 2),
}
# Small steps for `magnitude`: a weight that crosses its threshold earlier or later than in the
# reference goes another way from then on.
METHODS = [
    Case("sensitive", "F16", 0.005, {}),
    Case("subspace", "F16", 0.001, {"refresh": 8}),
    Case("lora", "F16", 0.005, {}),
    Case("norm", "F16", 0.05, {}),
    Case("dense", "F16", 0.001, {}),
    Case("magnitude", "F16", 0.004, {"learning_rate": 7e-5}),
    Case("block-scale", "Q8_0", 0.08, {}),
]
CASES = [replace(case, estimator=estimator) for case in METHODS for estimator in ESTIMATORS]
CASES += [
    Case("subspace", "F16", 0.001, {}),
    Case("lora", "F16", 0.005, {"directions": 3}),
    Case("magnitude", "F16", 0.004, {"learning_rate": 7e-5, "density": 0.6}),
    Case("block-scale", "Q8_0", 4e-5, {"absolute": True}),
    Case("sensitive+block-scale", "Q8_0", 0.03, {"unit": ["sparse=0.5", "scale=6"]}),
    Case("lora+block-scale", "Q8_0", 0.01, {"unit": ["lora=0.5", "scale=4"]}),
    Case("norm", "F16", 0.05, {"targets": "answers"}, "two-sided", choices=True),
    Case("norm", "F16", 0.05, {"targets": "answers"}, "one-sided", choices=True),
    Case("sensitive", "F16", 0.02, {"targets": "answers"}, "one-sided", choices=True),
    Case("norm", "F16", 0.0025, {"unit": ["gain=20"]}),
    Case("block-scale", "Q8_0", 0.004, {"unit": ["scale=20"]}),
]


def small(base: Base, delta: Delta, theta: Vector, density: float) -> NDArray[np.bool_]:
    """Which weights lie at or below their matrix's threshold, that of the base's weights."""
    parts = []
    for name, part in delta.edit_slices().items():
        limit = np.quantile(np.abs(base.own.base[name].numpy()), density)
        parts.append(np.abs(theta[part]) <= np.float32(limit))
    return np.concatenate(parts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_against_float64(case: Case, bases: dict[str, Base], tmp_path: Path) -> None:
    base, data = bases[case.quant], tmp_path / "rows.jsonl"
    texts = [text[:60] for text in models.sentences(10)]
    rows = [{"text": text} for text in texts]
    if case.choices:
        rows = [CHOICES | {"prompt": t, "answer": i % 3} for i, t in enumerate(texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    estimator = ESTIMATORS[case.estimator]
    formula = estimator.of_choices if case.choices else estimator.formula
    assert formula is not None
    config = base.config(
        case.method, data=str(data), output=str(tmp_path / "run"), seed=SEED, iters=N_STEPS,
        examples_per_step=4, eps=case.eps * estimator.reach, optimizer="sgd", schedule="constant",
        val_split=0, **estimator.options, **case.options,
    )  # fmt: skip
    tune_module.tune(config)
    run = Delta.load(tmp_path / "run")
    with Engine(base.model, n_threads=1) as engine:
        draw = Draw(load_examples(data, engine), 4, SEED)
    file = GgufFile(base.model)
    delta = start(config, file)
    theta, units = delta.theta.astype(np.float64), np.ones(delta.nnz)
    for kind, unit in (item.split("=") for item in config.unit):
        for _, edit, part in delta.parts():
            units[part] = unit if edit.kind == kind else units[part]
        units[: delta.n_sparse] = unit if kind == "sparse" else units[: delta.n_sparse]
    for name, weight in base.own.weights(delta, torch.tensor(theta)).items():
        if name not in delta.tensors:  # these start at their residuals
            torch.testing.assert_close(weight, base.own.base[name], atol=1e-9, rtol=1e-6)
    free = delta.edits | {name: replace(live, limit=np.inf) for name, live in delta.live.items()}
    free, distribution = replace(delta, edits=free), estimator_of(config).distribution
    z_of = Parameters(native_library(), free, file, 1, distribution)
    seeds, errors, losses = set(), [], []
    for record in Trajectory.load(tmp_path / "run" / "trajectory.bin").records():
        examples = draw(record.step - 1)
        z_of.write(delta.theta, record.step - 1)  # the step decides which subspace is trained
        steps = [units * z_of.noise(d.seed) for d in record.directions]
        if distribution == RADEMACHER and case.method != "subspace":
            assert all(z.all() for z in steps)
        if case.method == "magnitude":
            trained = small(base, delta, theta, config.density or 0.25)
            steps = [z * trained for z in steps]

        def loss(at: Vector, examples: Sequence[Example] = examples) -> list[Vector]:
            found = base.own.choices if case.choices else base.own.tokens
            return [row.numpy() for row in found(delta, torch.tensor(at), examples)]

        plus, minus, slopes = formula(loss, theta, steps, float(config.eps))
        wanted = [(d.loss_plus, d.loss_minus) for d in record.directions]
        errors.append(np.abs(np.transpose([plus, minus]) - wanted).max())
        theta -= record.lr * np.mean([g * z for g, z in zip(slopes, steps, strict=True)], axis=0)
        seeds.update(d.seed for d in record.directions)
        losses += plus
    way = np.linalg.norm(run.theta - delta.theta)
    near, astray = (1e-3, 0.03) if case.quant == "F16" else (2e-3, 0.08)  # 8-bit activations
    assert len(seeds) == N_STEPS * len(steps)
    assert np.ptp(losses) > 10 * near
    assert max(errors) < near
    assert np.linalg.norm(run.theta - theta) < astray * way
