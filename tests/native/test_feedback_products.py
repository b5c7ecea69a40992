"""The reverse pass through products: quantized weights, overlays, experts, what is tracked."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.helpers.graphs import Graph
from tests.helpers.tiny_gguf import packed
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import Feedback, Gain, Hook, LowRank, Store

F32 = NDArray[np.float32]
N_TOKENS, N_IN, WIDTH, N_ROWS, N_VOCAB = 9, 8, 512, 70, 11
OUTPUTS = np.arange(1, 9, dtype=np.int32)
TARGET_OUTPUT = np.array([0, 1, 2, 2, 4, 5, 7], np.int32)
TARGET_TOKEN = np.array([3, 0, 7, 1, 10, 4, 4], np.int32)
COUNTED = OUTPUTS[np.unique(TARGET_OUTPUT)]
WEIGHTS = np.linspace(-1, 2, TARGET_OUTPUT.size).astype(np.float32)
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


def random(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@dataclass
class Chain:
    """input -> a.weight -> w.weight of a type -> output.weight: what is tracked of it.

    w's input is first multiplied by a norm's weight. The way back runs once for each of `factors`.
    """

    kind: Type = Type.F32
    n_threads: int = 1
    store: Store | None = None
    low_rank: LowRank | None = None
    gain: Gain | None = None
    tail: float = 0.0
    staged: bool = False
    right: dict[str, F32] = field(default_factory=dict)
    gains: tuple[str, ...] = ()
    factors: tuple[float, ...] = (1,)

    def run(self) -> Feedback:
        """Both decodes, and the way back; the caller frees the feedback."""
        library, self.graph = native_library(), Graph()
        hook = Hook(
            library, self.store, None, self.low_rank, self.gain, n_threads=1,
        )  # fmt: skip
        feedback = Feedback(library, self.n_threads, self.tail, self.staged)
        for name, shape in SHAPES.items():
            feedback.track(name, shape, self.right.get(name))
        for name in self.gains:
            feedback.track_gain(name, WIDTH)
        batch = (N_TOKENS, OUTPUTS, TARGET_OUTPUT, TARGET_TOKEN)
        self.nll = self.graph.run(self._logits(), hook, feedback, *batch)
        for factor in self.factors:
            feedback.run(factor * WEIGHTS)
        hook.free()
        self.graph.free()
        return feedback

    def _logits(self) -> int:
        graph = self.graph
        x = graph.op("scale", graph.tensor(X, is_input=True), 1.0)
        h = graph.op("mul_mat", graph.tensor(A, "a.weight"), x)
        h = graph.op("mul", h, graph.tensor(NORM, "n.weight"))
        weight = graph.raw(packed(W, self.kind), self.kind, W.shape, "w.weight")
        y = graph.op("mul_mat", weight, h)
        ids = graph.tensor(OUTPUTS, "out_ids", is_input=True)
        head = graph.tensor(HEAD, "output.weight")
        logits = graph.op("mul_mat", head, graph.op("get_rows", y, ids))
        return graph.name(logits, "result_output")


X, A = random(N_TOKENS, N_IN), random(WIDTH, N_IN, seed=1) / 3
W, HEAD = random(N_ROWS, WIDTH, seed=2) / 20, random(N_VOCAB, N_ROWS, seed=3) / 3
NORM = np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)
SHAPES = {
    "a.weight": (WIDTH, N_IN), "w.weight": (N_ROWS, WIDTH), "output.weight": (N_VOCAB, N_ROWS),
}  # fmt: skip
A_NUMBER, W_NUMBER, HEAD_NUMBER = range(3)
N_COUNTED = COUNTED.size


def dequantized(kind: Type) -> NDArray[np.float64]:
    return gguf.quants.dequantize(packed(W, kind), kind).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_product(kind: str) -> None:
    chain = Chain(Type[kind])
    feedback = chain.run()
    _, dy = feedback.pairs(W_NUMBER, N_COUNTED)
    _, dx = feedback.pairs(A_NUMBER, N_COUNTED)
    feedback.free()
    wanted = dy.astype(np.float64) @ dequantized(chain.kind) * NORM
    np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_gradient_at_the_logits() -> None:
    feedback = Chain().run()
    x, dy = feedback.pairs(HEAD_NUMBER, N_COUNTED)
    _, at_w = feedback.pairs(W_NUMBER, N_COUNTED)
    feedback.free()
    logits = x.astype(np.float64) @ HEAD.T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    column = np.searchsorted(np.unique(TARGET_OUTPUT), TARGET_OUTPUT)
    wanted = np.zeros_like(p)
    for c, token, weight in zip(column, TARGET_TOKEN, WEIGHTS, strict=True):
        wanted[c] += weight * p[c]
        wanted[c, token] -= weight
    np.testing.assert_allclose(dy, wanted, atol=1e-5)
    np.testing.assert_allclose(at_w, wanted @ HEAD, atol=1e-5)


def test_factors_add_up_what_pairs_show() -> None:
    right = {name: random(5, shape[1], seed=7) for name, shape in SHAPES.items()}
    pairs, factors = Chain().run(), Chain(right=right, factors=(1, 2)).run()
    for number, name in enumerate(SHAPES):
        x, dy = pairs.pairs(number, N_COUNTED)
        wanted = 3 * (right[name].astype(np.float64) @ x.T) @ dy
        np.testing.assert_allclose(
            factors.gradient(number), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()
        )
    factors.clear()
    assert not factors.gradient(W_NUMBER).any()
    pairs.free()
    factors.free()


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_bits_do_not_depend_on_threads(kind: str) -> None:
    right = {name: random(5, shape[1], seed=7) for name, shape in SHAPES.items()}
    found = []
    for n_threads, staged in ((1, False), (2, False), (5, False), (1, True)):
        feedback = Chain(Type[kind], n_threads, staged=staged, right=right).run()
        found.append(b"".join(feedback.gradient(i).tobytes() for i in range(3)))
        feedback.free()
    assert len(set(found)) == 1


@pytest.fixture
def low_rank() -> Iterator[LowRank]:
    made = LowRank(native_library())
    yield made
    made.free()


def test_low_rank_overlays_belong_to_the_matrices(low_rank: LowRank) -> None:
    names = ("w.weight", "output.weight")
    left = [random(3, SHAPES[name][0], seed=5) / 5 for name in names]
    right = [random(3, SHAPES[name][1], seed=6) / 5 for name in names]
    for number, name in enumerate(names):
        low_rank.add(name, SHAPES[name])
        low_rank.set(0, number, left[number], right[number])
    chain = Chain(low_rank=low_rank)
    feedback = chain.run()
    _check_chain(feedback, W + left[0].T @ right[0], HEAD + left[1].T @ right[1])
    feedback.free()


def test_sparse_overlays_belong_to_the_matrices() -> None:
    store, whole = Store(native_library(), 1), []
    for name, base in (("w.weight", W), ("output.weight", HEAD)):
        rng = np.random.default_rng(base.size)
        indices = np.sort(rng.choice(base.size, base.size // 9, replace=False)).astype(np.int64)
        theta = rng.standard_normal(indices.size).astype(np.float32) / 5
        store.add(name, base.shape, indices, theta)
        whole.append(base.copy())
        whole[-1].flat[indices] += theta
    feedback = Chain(store=store).run()
    _check_chain(feedback, *whole)
    feedback.free()
    store.free()


def _check_chain(feedback: Feedback, w: F32, head: F32) -> None:
    """The pairs are those of the chain with these weights."""
    x, at_head = feedback.pairs(HEAD_NUMBER, N_COUNTED)
    x_w, at_w = feedback.pairs(W_NUMBER, N_COUNTED)
    _, at_a = feedback.pairs(A_NUMBER, N_COUNTED)
    np.testing.assert_allclose(x, x_w @ w.T, atol=1e-4)
    np.testing.assert_allclose(at_w, at_head @ head, atol=1e-5)
    np.testing.assert_allclose(at_a, at_w @ w * NORM, atol=1e-5)


def test_gains_belong_to_norms() -> None:
    factors = np.linspace(1.5, 0.2, WIDTH, dtype=np.float32)
    gain = Gain(native_library())
    gain.add("n.weight", WIDTH)
    gain.set(0, 0, factors)
    feedback = Chain(gain=gain, gains=("n.weight",)).run()
    x, _ = feedback.pairs(A_NUMBER, N_COUNTED)
    h, at_w = feedback.pairs(W_NUMBER, N_COUNTED)
    _, at_a = feedback.pairs(A_NUMBER, N_COUNTED)
    before = x @ A.T
    np.testing.assert_allclose(h, before * NORM * factors, atol=1e-4)
    np.testing.assert_allclose(at_a, at_w @ W * NORM * factors, atol=1e-5)
    wanted = (at_w @ W * before * NORM).sum(axis=0)
    np.testing.assert_allclose(feedback.gain_gradient(0), wanted, atol=1e-4)
    feedback.free()
    gain.free()


def test_tail_is_a_bound() -> None:
    """What is left out of the gradient at the logits is at most that part of it."""
    exact = Chain().run().pairs(HEAD_NUMBER, N_COUNTED)[1].astype(np.float64)
    left_out = []
    for tail in (0.01, 0.2, 0.5):
        found = Chain(tail=tail).run().pairs(HEAD_NUMBER, N_COUNTED)[1]
        error, size = np.abs(found - exact).sum(axis=1), np.abs(exact).sum(axis=1)
        assert (error <= tail * size * (1 + 1e-5)).all()
        left_out.append((found == 0).sum())
    assert left_out[0] < left_out[1] < left_out[2]


def test_wrong_lengths() -> None:
    feedback = Chain(right={"w.weight": random(2, WIDTH)}).run()
    call, values = native_library().call, (ctypes.c_float * 9000)()
    head = WIDTH * N_COUNTED
    for name, *arguments in (
        ("track", b"new", 4, 5, 2, 9, values),
        ("track", b"new", 4, 5, 0, 1, None),
        ("run", WEIGHTS.size - 1, values),
        ("gradient", W_NUMBER, 2 * N_ROWS - 1, values),
        ("pairs", A_NUMBER, N_IN * N_COUNTED + 1, values, head, values),
        ("pairs", A_NUMBER, N_IN * N_COUNTED, values, head + 1, values),
    ):
        with pytest.raises(ZoError, match=rf"zo_feedback_{name} got an array of \d+ values"):
            call(f"zo_feedback_{name}", feedback.handle, *arguments)
    feedback.free()


def test_refusals() -> None:
    feedback = Feedback(native_library(), 1)
    with pytest.raises(ZoError, match="no gathered decode"):
        feedback.run(np.ones(0, np.float32))
    feedback.track("a", (2, 3))
    with pytest.raises(ZoError, match="a is tracked already"):
        feedback.track_gain("a", 3)
    with pytest.raises(ZoError, match="an output is a token that does not exist"):
        feedback.begin(np.array([0], np.int32), np.array([0], np.int32), 1, np.array([1], np.int32))
    feedback.begin(np.array([0], np.int32), np.array([0], np.int32), 1, np.array([0], np.int32))
    with pytest.raises(ZoError, match="no decode went through"):
        feedback.end()
    feedback.free()
    with pytest.raises(ZoError, match="at least one thread"):
        Feedback(native_library(), 0)
