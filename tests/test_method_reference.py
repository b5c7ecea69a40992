"""Every method and estimator against the papers' formulas, written out in float64 torch.

The engine gives z and the rows; perturbed weights, losses, slopes and updates are computed here
from the GGUF's dequantized tensors.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from estimator_formulas import (
    Estimates,
    Loss,
    Vector,
    curvature,
    fzoo,
    grzo,
    natural,
    natural_one_sided,
    spsa,
)
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray
from torch.func import functional_call

from zo_gguf.config import TuneConfig
from zo_gguf.dataset import Example, load_examples
from zo_gguf.delta import Delta
from zo_gguf.draw import Draw
from zo_gguf.edits import Gain, Live
from zo_gguf.engine import Engine, Probe
from zo_gguf.estimator import distribution_of
from zo_gguf.gguf_file import GgufFile, dequantize_rows
from zo_gguf.llama import native_library
from zo_gguf.mask import Mask, MaskHeader
from zo_gguf.methods import start
from zo_gguf.noise import choose_eps
from zo_gguf.parameters import Parameters
from zo_gguf.quantize import quantize
from zo_gguf.trajectory import Trajectory

tune_module = importlib.import_module("zo_gguf.tune")  # as an attribute, it is the function
N_STEPS, RANK, SEED = 20, 4, 3
N_PROBES, N_ROWS, N_TOKENS = 24, 16, 24
# Bytes of a block at which ggml-common.h has the f16 scale, and then the f16 minimum.
SCALE_BYTES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2)}


class Reference:
    """A Llama in float64, and what the methods make of its weights, by GGUF name."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._file = GgufFile(model)
        self._model = reference.torch_model(folder, model).double().requires_grad_(False)
        self.base = {n: torch.tensor(self._file.dequantize(n)).double() for n in self._file.tensors}

    def weights(self, delta: Delta, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights that `theta`, (nnz,), changes."""
        result = {}
        for name, part in delta.edit_slices().items():
            edit, own, weight = delta.edits[name], theta[part], self.base[name]
            if isinstance(edit, Gain):
                result[name] = weight * (1 + own)
            elif isinstance(edit, Live) and edit.kind == "weight":
                result[name] = own.reshape(weight.shape)
            elif isinstance(edit, Live):
                result[name] = (self._scaled if edit.relative else self._with_scales)(name, own)
            elif edit.kind == "lora":  # W + (alpha / r) B A with alpha = 2 r; B lies transposed
                n_rows, n_cols = weight.shape
                a, b = own.split([RANK * n_cols, RANK * n_rows])
                result[name] = weight + 2 * b.reshape(RANK, n_rows).T @ a.reshape(RANK, n_cols)
            else:  # W + sqrt(m n) / r U Z V^T for one U, Z and V after the other
                left, right = torch.tensor(edit.left).double(), torch.tensor(edit.right).double()
                for u, z, v in zip(left, own.reshape(-1, RANK, RANK), right, strict=True):
                    weight = weight + weight.numel() ** 0.5 / RANK * u.T @ z @ v
                result[name] = weight
        for name, part in delta.slices().items():
            weight, places = result.get(name, self.base[name]), torch.tensor(delta.tensors[name])
            flat = weight.flatten().index_add(0, places, theta[part])
            result[name] = flat.reshape(weight.shape)
        return result

    def _scaled(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        """d (1 + t) q, or d (1 + t) s q - d_min (1 + t') m where the type has minima."""
        kind, raw = self._file.tensors[name].type, self._file.raw(name)
        places, (size, n_bytes) = SCALE_BYTES[kind.name], GGML_QUANT_SIZES[kind]
        total = torch.zeros(raw.size // n_bytes, size, dtype=torch.float64)
        for kept, factor in zip(places, 1 + theta.reshape(-1, len(places)).T, strict=True):
            blocks = raw.reshape(-1, n_bytes).copy()
            for other in set(places) - {kept}:
                blocks[:, other : other + 2] = 0
            values = dequantize_rows(blocks.reshape(raw.shape), kind)
            total = total + torch.tensor(values).double().reshape(-1, size) * factor[:, None]
        return total.reshape(self.base[name].shape)

    def _with_scales(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """s q for a Q8_0 tensor."""
        codes = self._file.raw(name).reshape(-1, 34)[:, 2:].view(np.int8)
        return (torch.tensor(codes) * scales[:, None]).reshape(self.base[name].shape)

    def losses(self, delta: Delta, theta: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
        """Mean negative log-likelihood of the tokens after the first of every row, (n_rows,)."""
        return torch.stack([tokens.mean() for tokens in self.tokens(delta, theta, rows)])

    def tokens(
        self, delta: Delta, theta: torch.Tensor, rows: Sequence[Example]
    ) -> list[torch.Tensor]:
        """Negative log-likelihoods of the tokens after the first of every row."""
        weights = self.base | self.weights(delta, theta)
        order = {n: reference.rows_to_hf(n, len(w), self._model.config) for n, w in weights.items()}
        named = {reference.hf_name(n): w[order[n]] for n, w in weights.items()}
        width = max(len(row.tokens) for row in rows)
        tokens = torch.tensor([row.tokens + [-1] * (width - len(row.tokens)) for row in rows])
        logits = functional_call(self._model, named, (tokens.clamp(0),)).logits
        logs = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None].clamp(0))[..., 0]
        return [-row[token >= 0] for row, token in zip(logs, tokens[:, 1:], strict=True)]


@dataclass(frozen=True)
class Base:
    """A random Llama: its GGUF, a mask for it whose residuals are not 0, and the reference."""

    model: Path
    mask: Path
    own: Reference

    def config(self, method: str, **options: Any) -> TuneConfig:
        files = {"model": str(self.model), "data": "none", "output": "none"}
        files["mask"] = str(self.mask) if "sensitive" in method else ""
        if {"subspace", "lora"} & set(method.split("+")):
            options = {"rank": RANK} | options
        return TuneConfig(**files | {"method": method, "threads": 1, "estimator": "spsa"} | options)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """One for each quantization, with 1200 trainable entries in every matrix."""
    folder, made = tmp_path_factory.mktemp("bases"), {}
    converted = models.converted("llama")
    for quant in ("F16", "Q8_0", "Q4_0", "Q4_K_S"):
        model, mask = folder / f"{quant}.gguf", folder / f"{quant}.mask"
        quantize(converted.gguf, model, quant, 1)
        file, rng = GgufFile(model), np.random.default_rng(0)
        shapes = {n: t.shape for n, t in file.tensors.items() if n[:4] == "blk." and t.shape[1:]}
        places = {n: np.sort(rng.permutation(np.prod(s))[:1200]) for n, s in shapes.items()}
        values = {n: rng.normal(0, 0.02, 1200).astype(np.float32) for n in shapes}
        header = MaskHeader(model.name, file.sha256(), "random", 0.01)
        Mask(places, values, shapes, header).save(mask)
        made[quant] = Base(model, mask, Reference(converted.folder, model))
    return made


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run."""

    method: str
    quant: str
    eps: float
    options: dict[str, Any]
    estimate: Callable[[Loss, Vector, list[Vector], float], Estimates] = spsa

    def __str__(self) -> str:
        return "-".join([self.method, self.quant, *self.options])


# Small steps for `magnitude`: a weight that crosses its threshold earlier or later than in the
# reference goes another way from then on.
CASES = [
    Case("sensitive", "F16", 0.005, {}),
    Case("subspace", "F16", 0.001, {"refresh": 8}),
    Case("subspace", "F16", 0.001, {"factors": "gaussian"}),
    Case("lora", "F16", 0.005, {}),
    Case("norm", "F16", 0.05, {}),
    Case("dense", "F16", 0.001, {}),
    Case("magnitude", "F16", 0.004, {"learning_rate": 7e-5}),
    Case("magnitude", "F16", 0.004, {"learning_rate": 7e-5, "density": 0.6}),
    Case("block-scale", "Q8_0", 0.08, {}),
    Case("block-scale", "Q8_0", 4e-5, {"absolute": True}),
    Case("sensitive+block-scale", "Q8_0", 0.01, {"unit": ["sparse=0.5", "scale=6"]}),
    Case("sensitive", "F16", 0.02, {"curvature": True, "directions": 3}, curvature),
    Case("sensitive", "F16", 0.005, {"estimator": "natural", "directions": 5, "sides": 2}, natural),
    Case(
        "sensitive",
        "F16",
        0.005,
        {"estimator": "natural", "directions": 5, "sides": 1},
        natural_one_sided,
    ),
    Case("sensitive", "F16", 0.005, {"estimator": "fzoo", "directions": 4}, fzoo),
    Case("sensitive", "F16", 0.005, {"estimator": "grzo"}, grzo),
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
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = base.config(
        case.method, data=str(data), output=str(tmp_path / "run"), seed=SEED, iters=N_STEPS,
        examples_per_step=4, eps=case.eps, optimizer="sgd", schedule="constant", val_split=0,
        **case.options,
    )  # fmt: skip
    tune_module.tune(config)
    run = Delta.load(tmp_path / "run")
    with Engine(base.model, n_threads=1) as engine:
        draw = Draw(load_examples(data, engine), 4, SEED)
    file = GgufFile(base.model)
    delta = start(config, file)
    theta, units = delta.theta.astype(np.float64), np.ones(delta.nnz)
    if config.unit:
        units[: delta.n_sparse], units[delta.n_sparse :] = 0.5, 6
    for name, weight in base.own.weights(delta, torch.tensor(theta)).items():
        if name not in delta.tensors:  # these start at their residuals
            torch.testing.assert_close(weight, base.own.base[name], atol=1e-9, rtol=1e-6)
    free = delta.edits | {name: replace(live, limit=np.inf) for name, live in delta.live.items()}
    free, kind = replace(delta, edits=free), distribution_of(config)
    z_of = Parameters(native_library(), free, file, 1, kind)
    seeds, errors, losses = set(), [], []
    for record in Trajectory.load(tmp_path / "run" / "trajectory.bin").records():
        rows = draw(record.step - 1)
        z_of.write(delta.theta, record.step - 1)  # the step decides which subspace is trained
        steps = [units * z_of.noise(d.seed, d.signs) for d in record.directions]
        if case.method == "magnitude":
            trained = small(base, delta, theta, config.density or 0.25)
            steps = [z * trained for z in steps]

        def loss(at: Vector, rows: Sequence[Example] = rows) -> list[Vector]:
            return [row.numpy() for row in base.own.tokens(delta, torch.tensor(at), rows)]

        plus, minus, slopes = case.estimate(loss, theta, steps, case.eps)
        wanted = [(d.loss_plus, d.loss_minus) for d in record.directions]
        errors.append(np.abs(np.transpose([plus, minus]) - wanted).max())
        theta -= record.lr * np.mean([g * z for g, z in zip(slopes, steps, strict=True)], axis=0)
        seeds.update((d.seed, d.signs) for d in record.directions)
        losses += plus
    way = np.linalg.norm(run.theta - delta.theta)
    near, astray = (1e-3, 0.03) if case.quant == "F16" else (4e-3, 0.08)  # 8-bit activations
    assert len(seeds) == N_STEPS * len(steps)
    assert np.ptp(losses) > 10 * near
    assert max(errors) < near
    assert np.linalg.norm(run.theta - theta) < astray * way


# ---- fidelity ------------------------------------------------------------------------------------

METHODS = ["sensitive", "block-scale", "subspace", "lora", "magnitude", "dense", "norm"]
FIDELITY = [(method, quant) for quant in ("Q8_0", "Q4_0") for method in METHODS]
FIDELITY += [("block-scale", "Q4_K_S"), ("dense", "F16"), ("magnitude", "F16")]


@pytest.mark.parametrize(("method", "quant"), FIDELITY)
def test_projected_gradient_is_the_directional_derivative(
    method: str, quant: str, bases: dict[str, Base]
) -> None:
    base, every = bases[quant], quant == "F16"
    config = base.config(method, train="norm" if method == "dense" and not every else None)
    with Engine(base.model, mask=start(config, GgufFile(base.model)), n_threads=1) as engine:
        texts = [engine.tokenize(text)[:N_TOKENS] for text in models.sentences(N_ROWS)]
        rows = [Example(text, [False] + [True] * (len(text) - 1)) for text in texts]
        # Away from B = 0, where the derivatives for A vanish.
        engine.set_theta(engine.theta() + np.float32(0.001 if every else 0.02) * engine.noise(99))
        theta = torch.tensor(engine.theta()).double().requires_grad_()
        base.own.losses(engine.mask, theta, rows).mean().backward()
        exact = [theta.grad.numpy() @ engine.noise(seed) for seed in range(N_PROBES)]
        eps = choose_eps(engine, rows)
        probes = [Probe(seed, side * eps) for seed in range(N_PROBES) for side in (1, -1)]
        losses = engine.losses(rows, probes).mean(axis=1).reshape(-1, 2)
    slopes = (losses[:, 0] - losses[:, 1]) / (2 * eps)
    assert np.corrcoef(slopes, exact)[0, 1] >= 0.99
    assert slopes @ exact == pytest.approx(np.dot(exact, exact), rel=0.1)
