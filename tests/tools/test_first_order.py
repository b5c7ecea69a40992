"""The bound by backpropagation: its loss and gradient against the row-by-row reference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import reference
from tools.compare import first_order
from zo_gguf.data.dataset import Example

EXAMPLES = (
    Example([1, 5, 6, 7, 9], [False] * 4 + [True], ((9,), (8,), (4,)), 0, 4),
    Example([1, 5, 6, 8, 2], [False] * 3 + [True] * 2, ((9, 3), (8, 2), (8,)), 1, 3),
    Example([1, 4, 4, 4, 7, 8], [False, True, False, True, True, True]),
)


@pytest.fixture
def masked() -> SimpleNamespace:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # Weights far from zero, so that the loss depends on where theta is added.
    config = LlamaConfig(vocab_size=320, initializer_range=0.3, **sizes, **heads)
    model = LlamaForCausalLM(config).eval()
    shapes = {"blk.0.attn_q.weight": (16, 16), "blk.0.ffn_down.weight": (16, 32)}
    tensors = {name: np.arange(3, 200, 7) for name in shapes}
    theta = np.random.default_rng(0).normal(size=58).astype(np.float32)
    return SimpleNamespace(model=model, tensors=tensors, shapes=shapes, theta=theta)


def build(masked: SimpleNamespace) -> first_order.MaskedModel:
    return first_order.MaskedModel(masked.model, masked.tensors, masked.shapes, masked.theta)


def test_losses_and_gradient_are_those_of_the_reference(masked: SimpleNamespace) -> None:
    losses, correct = build(masked).losses(EXAMPLES)
    model = build(masked)
    model.losses(EXAMPLES)[0].mean().backward()
    masked.model.requires_grad_(True)
    reference.add_delta(masked.model, masked.tensors, masked.shapes, masked.theta)
    expected = [reference.torch_loss(masked.model, example) for example in EXAMPLES]
    np.testing.assert_allclose(losses.detach(), torch.stack(expected).detach(), rtol=1e-4)
    assert torch.isnan(correct[2])
    assert set(correct[:2].tolist()) <= {0.0, 1.0}
    noise = np.random.default_rng(1).normal(size=masked.theta.size)
    (slope,) = reference.directional_derivatives(
        masked.model, list(EXAMPLES), masked.tensors, masked.shapes, [noise]
    )
    assert model.theta.grad is not None
    assert float(model.theta.grad.double().numpy() @ noise) == pytest.approx(slope, rel=1e-3)


def test_training_lowers_the_loss_and_moves_only_theta(masked: SimpleNamespace) -> None:
    model = build(masked)
    before = {name: value.clone() for name, value in masked.model.named_parameters()}
    start = model.measure(EXAMPLES)
    first_order.train(model, EXAMPLES, steps=5, n=3, rate=0.05, seed=0)
    assert model.measure(EXAMPLES).loss < start.loss - 0.1
    assert start.n == 3
    for name, value in masked.model.named_parameters():
        assert torch.equal(value, before[name])


def test_gains_multiply_the_norms(masked: SimpleNamespace) -> None:
    """After the sparse entries; the output's norm too."""
    names = ["blk.0.ffn_norm.weight", "output_norm.weight"]
    gains = np.random.default_rng(2).normal(size=(2, 16), scale=0.5).astype(np.float32)
    theta = np.concatenate([masked.theta, gains.ravel()])
    model = first_order.MaskedModel(masked.model, masked.tensors, masked.shapes, theta, names)
    losses, _ = model.losses(EXAMPLES)
    losses.mean().backward()
    assert model.theta.grad is not None
    assert (model.theta.grad[-32:] != 0).all()
    masked.model.requires_grad_(False)
    reference.add_delta(masked.model, masked.tensors, masked.shapes, masked.theta)
    for name, gain in zip(names, gains, strict=True):
        masked.model.get_parameter(reference.hf_name(name)).mul_(torch.from_numpy(1 + gain))
    expected = [reference.torch_loss(masked.model, example) for example in EXAMPLES]
    np.testing.assert_allclose(losses.detach(), torch.stack(expected).detach(), rtol=1e-4)
