"""Projected gradients against the directional derivatives of autograd, at the automatic eps."""

import numpy as np
import pytest
import torch

from tests.helpers import models
from tests.helpers.method_formulas import Base, make_base
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.tuning.calibrate import measure_noise
from zo_gguf.tuning.methods import start

N_PROBES, N_ROWS, N_TOKENS = 24, 16, 24
METHODS = ["sensitive", "block-scale", "subspace", "lora", "magnitude", "dense", "norm"]
FIDELITY = [(method, quant) for quant in ("Q8_0", "Q4_0") for method in METHODS]
FIDELITY += [("block-scale", "Q4_K_S"), ("dense", "F16"), ("magnitude", "F16")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder, converted = tmp_path_factory.mktemp("bases"), models.converted("llama")
    quants = ("F16", "Q8_0", "Q4_0", "Q4_K_S")
    return {quant: make_base(converted, quant, folder, 1200) for quant in quants}


@pytest.mark.parametrize(("method", "quant"), FIDELITY)
def test_projected_gradient_is_the_directional_derivative(
    method: str, quant: str, bases: dict[str, Base]
) -> None:
    base, every = bases[quant], quant == "F16"
    config = base.config(method, train="norm" if method == "dense" and not every else None)
    with Engine(base.model, delta=start(config, GgufFile(base.model)), n_threads=1) as engine:
        texts = [engine.vocabulary.tokenize(text)[:N_TOKENS] for text in models.sentences(N_ROWS)]
        rows = [Example(text, [False] + [True] * (len(text) - 1)) for text in texts]
        # Away from B = 0, where the derivatives for A vanish.
        engine.set_theta(engine.theta() + np.float32(0.001 if every else 0.02) * engine.noise(99))
        theta = torch.tensor(engine.theta()).double().requires_grad_()
        base.own.losses(engine.delta, theta, rows).mean().backward()
        exact = [theta.grad.numpy() @ engine.noise(seed) for seed in range(N_PROBES)]
        eps = measure_noise(engine, rows).eps
        probes = [Probe(seed, side * eps) for seed in range(N_PROBES) for side in (1, -1)]
        losses = engine.losses(rows, probes).mean(axis=1).reshape(-1, 2)
    slopes = (losses[:, 0] - losses[:, 1]) / (2 * eps)
    assert np.corrcoef(slopes, exact)[0, 1] >= 0.99
    assert slopes @ exact == pytest.approx(np.dot(exact, exact), rel=0.1)
