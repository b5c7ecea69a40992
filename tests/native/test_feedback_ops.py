"""Every operation of the reverse pass, in graphs of its own, against autograd in float64."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tests.helpers.graphs import Graph
from zo_gguf.engine.model import native_library
from zo_gguf.libzo import Feedback, Hook

N_TOKENS, N_OUTPUTS, N_IN, WIDTH, N_VOCAB = 5, 3, 8, 12, 11
OUTPUTS = np.array([1, 2, 4], np.int32)  # their token columns
TARGET_OUTPUT, TARGET_TOKEN = np.array([0, 2, 2], np.int32), np.array([3, 0, 7], np.int32)
WEIGHTS = np.array([0.7, -0.4, 1.3], np.float32)
COUNTED = [1, 4]  # token columns of outputs with targets
Tensor = torch.Tensor
Ggml = Callable[[Graph, list[int]], int]
Torch = Callable[[list[Tensor]], Tensor]

rng = np.random.default_rng(0)
NORM = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
BIAS = rng.standard_normal(WIDTH).astype(np.float32)
HALF, HEADS = WIDTH // 2, 3


def norm_weight(graph: Graph) -> int:
    return graph.tensor(NORM, "norm.weight")


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def heads(x: Tensor) -> Tensor:
    return x.reshape(len(x), HEADS, -1)


def oai(x: Tensor, g: Tensor) -> Tensor:
    x, g = x.clamp(max=0.8), g.clamp(-0.8, 0.8)
    return x * torch.sigmoid(1.7 * x) * (g + 1)


def clamped(x: Tensor, g: Tensor) -> Tensor:
    return functional.silu(x.clamp(max=0.8)) * g.clamp(-0.8, 0.8)


def reshape(graph: Graph, x: int, *shape: int) -> int:
    return graph.op(f"reshape_{len(shape)}d", x, *shape)


def per_head(graph: Graph, h: list[int]) -> int:
    """RMS norms of heads, with a weight for each of their values."""
    split = reshape(graph, h[0], WIDTH // HEADS, HEADS, N_OUTPUTS)
    weight = graph.tensor(NORM[: WIDTH // HEADS], "heads.weight")
    return reshape(graph, graph.op("mul", graph.op("rms_norm", split, 1e-3), weight), WIDTH, 3)


def part(graph: Graph, h: list[int], first: int) -> int:
    """Some values of every head."""
    split = reshape(graph, h[0], 4, HEADS, N_OUTPUTS)
    view = graph.op("view_3d", split, 2, HEADS, N_OUTPUTS, 16, 16 * HEADS, 4 * first)
    return reshape(graph, graph.op("cont", view), HALF, N_OUTPUTS)


def doubled(graph: Graph, h: list[int]) -> int:
    """Width 2 * WIDTH by a weight, for units in one tensor."""
    return graph.op("mul_mat", graph.tensor(WIDE, "wide.weight"), h[0])


def chosen(graph: Graph) -> int:
    """The experts of each output, (HEADS, N_OUTPUTS), as a node."""
    ids = graph.tensor(EXPERT_IDS, "ids", is_input=True)
    return graph.op("view_2d", ids, HEADS, N_OUTPUTS, 4 * HEADS, 0)


def experts(graph: Graph, h: list[int]) -> int:
    """Each of a token's experts reads its own part, then all of them read all of the first one."""
    parts = reshape(graph, h[0], WIDTH // HEADS, HEADS, N_OUTPUTS)
    down = graph.tensor(EXPERTS_DOWN, "down_exps.weight")
    own = graph.op("mul_mat_id", down, parts, chosen(graph))
    own = graph.op("add_id", own, graph.tensor(EXPERTS_BIAS, "down_exps.bias"), chosen(graph))
    up = graph.tensor(EXPERTS_UP, "up_exps.weight")
    shared = graph.op("mul_mat_id", up, reshape(graph, h[1], WIDTH, 1, N_OUTPUTS), chosen(graph))
    return reshape(graph, graph.op("mul", own, shared), WIDTH, N_OUTPUTS)


def experts_torch(h: list[Tensor]) -> Tensor:
    down, bias, up = (
        torch.from_numpy(w[EXPERT_IDS]).double() for w in (EXPERTS_DOWN, EXPERTS_BIAS, EXPERTS_UP)
    )
    own = torch.einsum("tkij,tkj->tki", down, heads(h[0])) + bias
    return (own * torch.einsum("tkij,tj->tki", up, h[1])).flatten(1)


EXPERT_IDS = np.array([[0, 4, 2], [3, 1, 0], [2, 0, 4]], np.int32)
EXPERTS_DOWN = rng.standard_normal((5, 4, 4)).astype(np.float32)
EXPERTS_BIAS = rng.standard_normal((5, 4)).astype(np.float32)
EXPERTS_UP = rng.standard_normal((5, 4, WIDTH)).astype(np.float32)


WIDE = (rng.standard_normal((2 * WIDTH, WIDTH)) / 2).astype(np.float32)


def wide(h: list[Tensor]) -> list[Tensor]:
    return list((h[0] @ torch.from_numpy(WIDE).double().T).chunk(2, dim=-1))


CASES: dict[str, tuple[Ggml, Torch]] = {
    "nothing": (lambda g, h: h[0], lambda h: h[0]),
    "rms_norm": (lambda g, h: g.op("rms_norm", h[0], 1e-3), lambda h: rms(h[0])),
    "norm": (
        lambda g, h: g.op("norm", h[0], 1e-3),
        lambda h: functional.layer_norm(h[0], (WIDTH,), eps=1e-3),
    ),
    "l2_norm": (
        lambda g, h: g.op("l2_norm", h[0], 1e-6),
        lambda h: functional.normalize(h[0], dim=-1),
    ),
    "mul by a weight": (
        lambda g, h: g.op("mul", g.op("rms_norm", h[0], 1e-3), norm_weight(g)),
        lambda h: rms(h[0]) * torch.from_numpy(NORM),
    ),
    "norm of heads": (
        per_head,
        lambda h: (rms(heads(h[0])) * torch.from_numpy(NORM[: WIDTH // HEADS])).flatten(1),
    ),
    "add a weight": (
        lambda g, h: g.op("add", h[0], g.tensor(BIAS, "b.bias")),
        lambda h: h[0] + torch.from_numpy(BIAS),
    ),
    "div by a weight": (
        lambda g, h: g.op("div", h[0], norm_weight(g)),
        lambda h: h[0] / torch.from_numpy(NORM),
    ),
    "mul by a scalar": (
        lambda g, h: g.op("mul", h[0], g.tensor(NORM[:1], "w.scale")),
        lambda h: h[0] * NORM[0].item(),
    ),
    "add": (lambda g, h: g.op("add", h[0], h[1]), lambda h: h[0] + h[1]),
    "sub": (lambda g, h: g.op("sub", h[0], h[1]), lambda h: h[0] - h[1]),
    "mul": (lambda g, h: g.op("mul", h[0], h[1]), lambda h: h[0] * h[1]),
    "div": (
        lambda g, h: g.op("div", h[0], g.op("scale", h[1], 1.0)),
        lambda h: h[0] / h[1],
    ),
    "mul of a value with itself": (
        lambda g, h: g.op("mul", h[0], h[0]),
        lambda h: h[0].square(),
    ),
    "mul by one value of a token": (
        lambda g, h: g.op("mul", h[0], g.op("view_2d", h[1], 1, N_OUTPUTS, 4 * WIDTH, 8)),
        lambda h: h[0] * h[1][:, 2:3],
    ),
    "residual": (
        lambda g, h: g.op("add", g.op("silu", h[0]), h[0]),
        lambda h: functional.silu(h[0]) + h[0],
    ),
    "scale": (lambda g, h: g.op("scale", h[0], -1.7), lambda h: -1.7 * h[0]),
    "clamp": (
        lambda g, h: g.op("clamp", h[0], -0.5, 0.7),
        lambda h: h[0].clamp(-0.5, 0.7),
    ),
    "sqr of relu": (
        lambda g, h: g.op("sqr", g.op("relu", h[0])),
        lambda h: functional.relu(h[0]).square(),
    ),
    "soft cap": (
        lambda g, h: g.op("scale", g.op("tanh", g.op("scale", h[0], 0.5)), 2.0),
        lambda h: 2 * torch.tanh(h[0] / 2),
    ),
    "relu": (lambda g, h: g.op("relu", h[0]), lambda h: functional.relu(h[0])),
    "silu": (lambda g, h: g.op("silu", h[0]), lambda h: functional.silu(h[0])),
    "gelu": (
        lambda g, h: g.op("gelu", h[0]),
        lambda h: functional.gelu(h[0], approximate="tanh"),
    ),
    "gelu_erf": (lambda g, h: g.op("gelu_erf", h[0]), lambda h: functional.gelu(h[0])),
    "gelu_quick": (
        lambda g, h: g.op("gelu_quick", h[0]),
        lambda h: h[0] * torch.sigmoid(1.702 * h[0]),
    ),
    "sigmoid": (lambda g, h: g.op("sigmoid", h[0]), lambda h: torch.sigmoid(h[0])),
    "tanh": (lambda g, h: g.op("tanh", h[0]), lambda h: torch.tanh(h[0])),
    "neg": (lambda g, h: g.op("neg", h[0]), lambda h: -h[0]),
    "swiglu_split": (
        lambda g, h: g.op("swiglu_split", h[0], h[1]),
        lambda h: functional.silu(h[0]) * h[1],
    ),
    "geglu_split": (
        lambda g, h: g.op("geglu_split", h[0], h[1]),
        lambda h: functional.gelu(h[0], approximate="tanh") * h[1],
    ),
    "reglu_split": (
        lambda g, h: g.op("reglu_split", h[0], h[1]),
        lambda h: functional.relu(h[0]) * h[1],
    ),
    "geglu_erf_split": (
        lambda g, h: g.op("geglu_erf_split", h[0], h[1]),
        lambda h: functional.gelu(h[0]) * h[1],
    ),
    "geglu_quick_split": (
        lambda g, h: g.op("geglu_quick_split", h[0], h[1]),
        lambda h: h[0] * torch.sigmoid(1.702 * h[0]) * h[1],
    ),
    "swiglu_oai": (
        lambda g, h: g.op("swiglu_oai", h[0], h[1], 1.7, 0.8),
        lambda h: oai(h[0], h[1]),
    ),
    "swiglu_clamp": (
        lambda g, h: g.op("swiglu_clamp", h[0], h[1], 0.8),
        lambda h: clamped(h[0], h[1]),
    ),
    "swiglu": (
        lambda g, h: g.op("swiglu", doubled(g, h)),
        lambda h: functional.silu(wide(h)[0]) * wide(h)[1],
    ),
    "swiglu_swapped": (
        lambda g, h: g.op("swiglu_swapped", doubled(g, h)),
        lambda h: functional.silu(wide(h)[1]) * wide(h)[0],
    ),
    "experts": (experts, experts_torch),
    "parts of heads": (
        lambda g, h: g.op("mul_mat", g.tensor(NARROW, "narrow.weight"), part(g, h, 1)),
        lambda h: heads(h[0])[:, :, 1:3].flatten(1) @ torch.from_numpy(NARROW).double().T,
    ),
}
NARROW = rng.standard_normal((WIDTH, HALF)).astype(np.float32)


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph()
    yield made
    made.free()


def run(graph: Graph, build: Ggml) -> list[tuple[NDArray[np.float32], ...]]:
    """Pairs of the two products that feed the operation."""
    x = graph.tensor(X, is_input=True)
    ids = graph.tensor(OUTPUTS, "out_ids", is_input=True)
    inner = graph.op("scale", x, 1.0)
    products = [
        graph.op("mul_mat", graph.tensor(weight, name), inner) for name, weight in INNER.items()
    ]
    rows = [graph.op("get_rows", product, ids) for product in products]
    head = graph.op("mul_mat", graph.tensor(HEAD, "output.weight"), build(graph, rows))
    logits = graph.name(graph.op("scale", head, 2.0), "result_output")
    library = native_library()
    hook, feedback = Hook(library, n_threads=1), Feedback(library, n_threads=2)
    for name, weight in INNER.items():
        feedback.track(name, weight.shape)
    batch = (N_TOKENS, OUTPUTS, TARGET_OUTPUT, TARGET_TOKEN)
    nll = graph.run(logits, hook, feedback, *batch)
    feedback.run(WEIGHTS)
    reached = feedback.matrices()
    pairs = [feedback.pairs(i, 2) if n in reached else () for i, n in enumerate(INNER)]
    hook.free()
    feedback.free()
    return [*pairs, (nll,)]


X = rng.standard_normal((N_TOKENS, N_IN)).astype(np.float32)
INNER = {
    name: (rng.standard_normal((WIDTH, N_IN)) / 2).astype(np.float32)
    for name in ("a.weight", "b.weight")
}
HEAD = (rng.standard_normal((N_VOCAB, WIDTH)) / 3).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_against_autograd(case: str, graph: Graph) -> None:
    build, evaluate = CASES[case]
    *pairs, (nll,) = run(graph, build)
    h = [
        (torch.from_numpy(X).double() @ torch.from_numpy(weight).double().T).requires_grad_()
        for weight in INNER.values()
    ]
    out = evaluate([value[OUTPUTS.tolist()] for value in h])
    logits = 2 * out @ torch.from_numpy(HEAD).double().T
    losses = -logits.log_softmax(-1)[TARGET_OUTPUT.tolist(), TARGET_TOKEN.tolist()]
    np.testing.assert_allclose(nll, losses.detach().numpy(), rtol=1e-3)  # gelu is a table
    (losses * torch.from_numpy(WEIGHTS)).sum().backward()
    assert pairs[0]
    for pair, value in zip(pairs, h, strict=True):
        if value.grad is None:
            assert not pair or not pair[1].any()
            continue
        np.testing.assert_array_equal(pair[0], X[COUNTED])
        wanted = value.grad.numpy()[COUNTED]
        np.testing.assert_allclose(pair[1], wanted, rtol=2e-3, atol=2e-4 * np.abs(wanted).max())
