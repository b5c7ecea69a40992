"""Gradients of the reverse pass against autograd on the same weights, attention detached there."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.architectures import ARCHITECTURES, LAYERS, Architecture, converted
from tests.helpers.reference import fill, torch_loss
from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import Request
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.feedback import FeedbackPass, counted_inputs, reach
from zo_gguf.engine.quantize import quantize
from zo_gguf.errors import ZoError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def examples() -> list[Example]:
    """Completions, a row with gaps between what counts, and choices of different lengths."""
    rng = np.random.default_rng(0)

    def tokens(n: int) -> list[int]:
        return [int(token) for token in rng.integers(3, 300, n)]

    rows = [Example([1, *tokens(n)], [False] * (n - 3) + [True] * 4) for n in (9, 17, 12)]
    rows.append(Example([1, *tokens(15)], [False, True, False, False] * 4))
    prompt = [1, *tokens(11)]
    choices = tuple(tuple(tokens(n)) for n in (1, 3, 2))
    whole = [*prompt, *choices[1]]
    mask = [False] * len(prompt) + [True] * 3
    rows.append(Example(whole, mask, choices=choices, answer=1, n_prompt=len(prompt)))
    return rows


def detach(model: Any, architecture: Architecture) -> None:
    """Take what attention reads, and what embeddings and routers give, as constant."""

    def before(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {key: _constant(value) for key, value in kwargs.items()}
        return tuple(map(_constant, args)), kwargs

    def after(_: Any, __: Any, output: Any) -> Any:
        return tuple(map(_constant, output)) if isinstance(output, tuple) else _constant(output)

    model.get_input_embeddings().register_forward_hook(after)
    for layer in model.get_submodule(architecture.layers):
        layer.get_submodule(architecture.attention).register_forward_pre_hook(
            before, with_kwargs=True
        )
        gate = getattr(getattr(layer, "mlp", None), "gate", None)
        if gate is not None:
            gate.register_forward_hook(after)


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def references(model: Any, architecture: Architecture) -> dict[str, F32]:
    """Gradients by GGUF name, matrices (n_rows, n_cols)."""
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    head = "token_embd.weight" if architecture.is_tied else "output.weight"
    found = {head: model.get_output_embeddings().weight.grad.numpy()}
    for layer in range(LAYERS):
        for part, name in {**architecture.matrices, **architecture.norms}.items():
            grad = grads[f"{architecture.layers}.{layer}.{name}.weight"]
            found[f"blk.{layer}.{part}.weight"] = grad.T if architecture.is_transposed else grad
    return found


def cosine(a: F32, b: F32) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


@pytest.fixture(params=ARCHITECTURES)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


def test_matches_autograd(kind: str) -> None:
    architecture, pair, rows = ARCHITECTURES[kind], converted(kind), examples()
    with Engine(pair.gguf, n_threads=1) as engine:
        found_reach = reach(engine)
        tracked = dict.fromkeys(found_reach.matrices), list(found_reach.norms)
        with FeedbackPass(engine, *tracked, tail=0.0) as feedback:
            found = feedback.gradients(rows)
        plain = engine.losses(rows)[0]
    np.testing.assert_allclose(found.losses, plain, atol=1e-6)
    detach(pair.model, architecture)
    pair.model.zero_grad()
    loss = sum(torch_loss(pair.model, row) for row in rows) / len(rows)
    loss.backward()
    assert np.mean(found.losses) == pytest.approx(loss.item(), abs=2e-3)
    wanted = references(pair.model, architecture)
    parts = {name for name in wanted if name.split(".")[-2] not in architecture.norms}
    assert set(found.matrices) == parts
    assert set(found.gains) >= set(wanted) - parts
    for name, gradient in found.matrices.items():
        assert_same(gradient, wanted[name], name)
    for name in set(wanted) - parts:
        assert_same(found.gains[name], wanted[name] * engine.gguf.dequantize(name), name)


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0"])
def test_quantized(quant: str, tmp_path: Path) -> None:
    """Weights that the engine may hold in another layout are read from the file."""
    architecture, pair, rows = ARCHITECTURES["llama"], converted("llama"), examples()
    path = tmp_path / f"{quant}.gguf"
    quantize(pair.gguf, path, quant)
    with Engine(path, n_threads=1) as engine:
        tracked = dict.fromkeys(reach(engine).matrices)
        with FeedbackPass(engine, tracked) as feedback:
            found = feedback.gradients(rows).matrices
    model = fill(deepcopy(pair.model), path)
    detach(model, architecture)
    model.zero_grad()
    (sum(torch_loss(model, row) for row in rows) / len(rows)).backward()
    wanted = references(model, architecture)
    for name in tracked:
        assert cosine(found[name], wanted[name]) > 0.995, name


def assert_same(found: F32, wanted: F32, name: str) -> None:
    assert cosine(found, wanted) > 0.999, name
    ratio = np.linalg.norm(found) / np.linalg.norm(wanted)
    assert ratio == pytest.approx(1, abs=0.01), name


@pytest.fixture
def llama() -> Iterator[Engine]:
    with Engine(converted("llama").gguf, n_threads=2) as engine:
        yield engine


def test_factors_and_portions(llama: Engine) -> None:
    """Rows in portions, and rows cut themselves, give the same; factors are whole gradients'."""
    rows, name = examples(), "blk.1.ffn_up.weight"
    right = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    with FeedbackPass(llama, {name: None}) as feedback:
        whole = feedback.gradients(rows)
        token_bytes = feedback.token_bytes
    for n_counted in (1, 2, 7):
        most_bytes = n_counted * token_bytes
        with FeedbackPass(llama, {name: right}, most_bytes=most_bytes) as feedback:
            found = feedback.gradients(rows)
        assert (found.n_tokens > whole.n_tokens) == (n_counted < 4)  # of a row
        np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-3)
        assert cosine(found.factors[name], right @ whole.matrices[name].T) > 0.9999


def test_slopes_are_the_callers(llama: Engine) -> None:
    """Any weighted sum of log-likelihoods: here that of two rows' targets, one of them upwards."""
    rows, name = examples()[:2], "blk.2.attn_output.weight"
    with FeedbackPass(llama, {name: None}) as feedback:
        alone = [feedback.gradients([row]).matrices[name] for row in rows]
        signs = np.array([1.0, -3.0])

        def slopes(request: Request, nll: F64) -> F64:
            assert nll.shape == (8,)
            return np.repeat(signs / 4, 4)

        found = feedback.gradients(rows, slopes).matrices[name]
    wanted = (signs[0] * alone[0] + signs[1] * alone[1]) / 2
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


def test_inputs_at_counted_positions(llama: Engine) -> None:
    """Those that whole gradients are made of; matrices that read the same share them."""
    rows = examples()
    gate, up, down, head = (
        "blk.1.ffn_gate.weight",
        "blk.1.ffn_up.weight",
        "blk.1.ffn_down.weight",
        "output.weight",
    )
    portions = list(counted_inputs(llama, (gate, down, up, head), rows, most_bytes=8 << 10))
    assert len(portions) > 1
    assert all(found[gate] is found[up] for found in portions)
    inputs = {name: np.concatenate([found[name] for found in portions]) for name in portions[0]}
    assert all(len(found) == len(inputs[head]) < 30 for found in inputs.values())
    with FeedbackPass(llama, {gate: None, down: None}) as feedback:
        found = feedback.gradients(rows).matrices
    for name in (gate, down):  # the gradient's rows are sums of inputs
        _, _, basis = np.linalg.svd(inputs[name], full_matrices=False)
        rest = found[name] - found[name] @ basis.T @ basis
        assert np.linalg.norm(rest) < 1e-2 * np.linalg.norm(found[name])


def test_refuses_what_gradients_do_not_reach(llama: Engine) -> None:
    with pytest.raises(ZoError, match=r"No gradient reaches blk\.0\.attn_q\.weight past attention"):
        FeedbackPass(llama, {"blk.0.attn_q.weight": None})
    assert llama.losses(examples()).shape == (1, 5)  # nothing is left on the hook
