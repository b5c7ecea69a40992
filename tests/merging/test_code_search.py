"""Codes chosen by their effect on outputs: against float64, and with a model's real inputs."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.helpers.block_codes import read_blocks
from tests.helpers.tiny_gguf import WIDTH, packed, random_delta, write_llama
from zo_gguf.data.dataset import Example
from zo_gguf.engine import readout
from zo_gguf.engine.readout import InputSample, sample_inputs
from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.merging import code_search
from zo_gguf.merging import patches as merge_patches
from zo_gguf.merging.code_search import choose_codes, input_moments
from zo_gguf.merging.patches import ROUNDINGS, plain_patches, rounded_patches
from zo_gguf.merging.requantize import block_of, requantize
from zo_gguf.params.delta import Delta

N_ROWS, N_COLS, N_SAMPLES = 20, 512, 700
RIDGE = 0.05


def correlated_inputs() -> NDArray[np.float32]:
    """As activations are: a strong mean, few strong directions, columns of unequal size."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N_SAMPLES, 12)) @ rng.normal(size=(12, N_COLS))
    x += 0.3 * rng.normal(size=x.shape) + rng.normal(size=N_COLS)
    return (x * rng.uniform(0.2, 2, N_COLS) / np.sqrt(N_SAMPLES)).astype(np.float32)


class Problem:
    """Rows with few, many and no touched blocks."""

    def __init__(self, kind: Type) -> None:
        rng = np.random.default_rng(1)
        layout = layout_of(kind)
        assert layout is not None
        self.kind, self.layout = kind, layout
        self.block, self.block_bytes = block_of(kind)
        weight = rng.normal(0, 0.05, (N_ROWS, N_COLS)).astype(np.float32)
        self.raw = packed(weight, kind)
        self.old = gguf.quants.dequantize(self.raw, kind).reshape(N_ROWS, N_COLS)
        entries = [(row, int(col)) for row in range(12) for col in rng.choice(40, 2, replace=False)]
        entries += [(row, int(col)) for row in (13, 14) for col in rng.choice(N_COLS, 60, False)]
        self.indices = np.unique([row * N_COLS + col for row, col in entries])
        self.theta = rng.normal(0, 0.3, len(self.indices)).astype(np.float32)
        self.target = self.old.astype(np.float64)
        self.target.reshape(-1)[self.indices] += self.theta
        self.starts = [
            requantize(self.raw, kind, self.indices, self.theta, tuned_weight=weight)
            for weight in (100.0, 3.0)
        ]
        self.ids = self.starts[0].ids
        self.inputs = correlated_inputs()

    def solve(self, n_starts: int = 1, n_threads: int = 1) -> tuple[NDArray[np.uint8], float]:
        moments = input_moments(self.inputs, n_threads)
        found = choose_codes(
            self.ids,
            [start.blocks for start in self.starts[:n_starts]],
            self.kind,
            self.target.reshape(-1, self.block)[self.ids].astype(np.float32),
            moments,
            ridge=RIDGE,
        )
        moments.free()
        return found

    def errors(self, blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
        raw = self.raw.copy()
        raw.reshape(-1, self.block_bytes)[self.ids] = blocks
        return gguf.quants.dequantize(raw, self.kind).reshape(N_ROWS, N_COLS) - self.target

    def output_error(self, blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.square(self.errors(blocks) @ self.inputs.T.astype(np.float64)).sum(axis=1)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.IQ4_NL, Type.Q3_K])
def test_outputs_come_closer(kind: Type) -> None:
    problem = Problem(kind)
    blocks, reported = problem.solve()
    before = problem.output_error(problem.starts[0].blocks)
    after = problem.output_error(blocks)
    assert reported == pytest.approx(after.sum(), rel=1e-3)
    assert after.sum() < 0.5 * before.sum()
    # Steps and offsets are those of the start: only codes changed.
    old, new = (read_blocks(part, problem.layout) for part in (problem.starts[0].blocks, blocks))
    np.testing.assert_array_equal(new.step, old.step)
    np.testing.assert_array_equal(new.offset, old.offset)


def test_no_single_code_could_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_search, "_SWEEPS", 100)
    problem = Problem(Type.Q4_0)
    blocks, _ = problem.solve()
    error = problem.errors(blocks)
    moments = problem.inputs.T.astype(np.float64) @ problem.inputs
    read = read_blocks(blocks, problem.layout)
    per_row = N_COLS // 32
    for row in np.unique(problem.ids // per_row):
        mine = np.flatnonzero(problem.ids // per_row == row)
        cols = ((problem.ids[mine] % per_row)[:, None] * 32 + np.arange(32)).reshape(-1)
        h = moments[np.ix_(cols, cols)]
        h = h + RIDGE * np.trace(h) / len(h) * np.eye(len(h))
        slope = h @ error[row, cols]
        step = np.repeat(read.step[mine, 0], 32)
        codes = read.codes[mine].reshape(-1)
        for move in (-1, 1):
            possible = (codes + move >= 0) & (codes + move <= 15)
            change = move * step
            gain = change * (2 * slope + change * np.diag(h))
            assert (gain[possible] >= -1e-9).all()


def test_more_starts_are_never_worse() -> None:
    problem = Problem(Type.Q4_0)

    def losses(blocks: NDArray[np.uint8]) -> float:
        error = problem.errors(blocks)
        total = 0.0
        for row in range(N_ROWS):
            cols = np.flatnonzero(np.isin(np.arange(N_COLS) // 32 + row * 16, problem.ids))
            if len(cols):
                x = problem.inputs[:, cols].astype(np.float64)
                ridge = RIDGE * np.square(x).sum() / len(cols)
                total += np.square(x @ error[row, cols]).sum()
                total += ridge * np.square(error[row, cols]).sum()
        return total

    assert losses(problem.solve(2)[0]) <= losses(problem.solve(1)[0]) * (1 + 1e-9)


def chosen_in_order(
    target: NDArray[np.float64],
    levels: NDArray[np.float32],
    step: NDArray[np.float64],
    offset: NDArray[np.float64],
    h: NDArray[np.float64],
) -> NDArray[np.float64]:
    """One row's levels by GPTQ as it is written in the paper: invert H, and round on."""
    inverse = np.linalg.inv(h)
    wanted, chosen = target.copy(), np.empty_like(target)
    for j in range(len(target)):
        near = np.abs((wanted[j] + offset[j]) / step[j] - levels)
        chosen[j] = levels[near.argmin()]
        error = (step[j] * chosen[j] - offset[j] - wanted[j]) / inverse[j, j]
        wanted[j:] += error * inverse[j, j:]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return chosen


def descended(
    error: NDArray[np.float64],
    chosen: NDArray[np.float64],
    levels: NDArray[np.float32],
    step: NDArray[np.float64],
    h: NDArray[np.float64],
) -> float:
    """e H e after coordinate descent over one row."""
    for _ in range(code_search._SWEEPS):
        for j in range(len(error)):
            gains = step[j] * (levels - chosen[j])
            losses = 2 * gains * (h[j] @ error) + gains**2 * h[j, j]
            best = losses.argmin()
            if losses[best] < -1e-12:
                error[j] += gains[best]
                chosen[j] = levels[best]
    return float(error @ h @ error)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_K, Type.IQ4_NL, Type.Q3_K])
def test_rows_end_as_a_reference_in_float64_does(kind: Type) -> None:
    problem = Problem(kind)
    blocks, _ = problem.solve()
    errors, start = problem.errors(blocks), problem.starts[0].blocks
    read = read_blocks(start, problem.layout)
    values = [np.repeat(part, problem.layout.group, axis=1) for part in (read.step, read.offset)]
    levels, own = problem.layout.levels, problem.layout.levels[read.codes]
    moments = problem.inputs.T.astype(np.float64) @ problem.inputs
    per_row, found, expected = N_COLS // problem.block, [], []
    for row in np.unique(problem.ids // per_row)[::3]:
        mine = np.flatnonzero(problem.ids // per_row == row)
        cols = (problem.ids[mine] % per_row)[:, None] * problem.block + np.arange(problem.block)
        order = np.argsort(-np.diag(moments)[cols.reshape(-1)], kind="stable")
        columns = cols.reshape(-1)[order]
        h = moments[np.ix_(columns, columns)]
        h = h + RIDGE * np.trace(h) / len(h) * np.eye(len(h))
        step, offset = (part[mine].reshape(-1)[order].astype(np.float64) for part in values)
        target = problem.target[row, columns]
        losses = []
        for chosen in (
            own[mine].reshape(-1)[order].astype(np.float64),
            chosen_in_order(target, levels, np.where(step == 0, 1, step), offset, h),
        ):
            error = step * chosen - offset - target
            losses.append(descended(error, chosen, levels, step, h))
        expected.append(min(losses))
        found.append(errors[row, columns] @ h @ errors[row, columns])
    # Ties and nearly equal levels may go either way, after which the ways part.
    ratio = np.array(found) / np.array(expected)
    assert np.median(np.abs(ratio - 1)) < 1e-3
    assert sum(found) == pytest.approx(sum(expected), rel=0.02)


def test_threads_do_not_matter() -> None:
    problem = Problem(Type.Q4_K)
    one, error = problem.solve(2)
    for n_threads in (2, 5):
        blocks, again = problem.solve(2, n_threads)
        np.testing.assert_array_equal(blocks, one)
        assert again == error


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K])
def test_whole_rows(kind: Type) -> None:
    problem = Problem(kind)
    rng = np.random.default_rng(7)
    change = rng.normal(0, 0.02, (N_ROWS, 3)) @ rng.normal(0, 1, (3, N_COLS))
    theta = change.astype(np.float32).reshape(-1)
    target = problem.old.reshape(-1, problem.block) + theta.reshape(-1, problem.block)
    start = requantize(problem.raw, kind, np.arange(theta.size), theta)

    def output_error(blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
        values = gguf.quants.dequantize(blocks.reshape(-1), kind).reshape(target.shape)
        error = (values - target).astype(np.float64).reshape(N_ROWS, N_COLS)
        return np.square(error @ problem.inputs.T.astype(np.float64)).sum(axis=1)

    results = []
    for n_threads in (1, 3):
        moments = input_moments(problem.inputs, n_threads)
        results.append(choose_codes(start.ids, [start.blocks], kind, target, moments, ridge=RIDGE))
        moments.free()
    blocks, error = results[0]
    assert error == pytest.approx(output_error(blocks).sum(), rel=1e-3)
    assert (output_error(blocks) < 0.5 * output_error(start.blocks)).all()
    np.testing.assert_array_equal(results[1][0], blocks)
    assert results[1][1] == error


def test_weights_of_a_sample() -> None:
    sample = InputSample(np.ones((10, 3), np.float32), np.arange(10) < 2)
    weights = np.square(sample.scaled(0.3)[:, 0])
    np.testing.assert_allclose(weights, [0.15] * 2 + [0.7 / 8] * 8, rtol=1e-5)
    everything = InputSample(np.ones((4, 3), np.float32), np.ones(4, bool))
    np.testing.assert_allclose(np.square(everything.scaled(0.3)[:, 0]), 0.25, rtol=1e-5)


# ---- inputs of a real graph ----------------------------------------------------------------------

EXAMPLES = [
    Example([1, 260, 263, 265, 259, 261], [False] * 5 + [True]),
    Example([1, 261, 262, 100, 101, 102, 103], [False] * 4 + [True] * 3),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFile, Delta]:
    base = GgufFile(write_llama(tmp_path_factory.mktemp("a") / "m.gguf", Type.Q4_0))
    return base, random_delta(base)


def test_sample_inputs(tuned: tuple[GgufFile, Delta]) -> None:
    base, delta = tuned
    inputs = sample_inputs(base, delta, list(delta.tensors), EXAMPLES, n_threads=1)
    assert set(inputs) == set(delta.tensors)
    # The first layer's attention reads the normalized embeddings.
    tokens = [token for example in EXAMPLES for token in example.tokens]
    x = base.dequantize("token_embd.weight", np.array(tokens)).astype(np.float64)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5)
    for part in ("attn_q", "attn_k", "attn_v"):
        sample = inputs[f"blk.0.{part}.weight"]
        np.testing.assert_allclose(sample.values, x, atol=1e-4)
        assert sample.counted.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    # After the last attention only positions that predict something are left.
    assert inputs["blk.1.ffn_up.weight"].values.shape == (4, WIDTH)
    assert inputs["blk.1.ffn_up.weight"].counted.all()


def test_inputs_are_the_tuned_models(tuned: tuple[GgufFile, Delta]) -> None:
    base, delta = tuned
    name = "blk.1.attn_q.weight"
    plain = Delta(delta.tensors, delta.shapes, 0 * delta.theta, delta.header)
    with_delta, without = (
        sample_inputs(base, part, [name], EXAMPLES, n_threads=1)[name].values
        for part in (delta, plain)
    )
    first = np.concatenate([[True], np.zeros(12, bool)])
    assert np.abs(with_delta - without)[~first].max() > 0.05


def test_long_rows_are_thinned_out(
    tuned: tuple[GgufFile, Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "MAX_SAMPLES", 16)
    base, delta = tuned
    tokens = [1, *range(100, 160)]
    counted = [False] * 40 + [True] * 21
    name = "blk.0.attn_q.weight"
    inputs = sample_inputs(base, delta, [name], [Example(tokens, counted)] * 2, n_threads=1)
    assert inputs[name].values.shape[0] == 16
    assert inputs[name].counted.sum() == 8


def test_rounded_patches(
    tuned: tuple[GgufFile, Delta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = tuned
    plain = plain_patches(base, delta, list(delta.tensors), tmp_path, 1)
    rounded = rounded_patches(base, delta, plain, EXAMPLES * 8, ROUNDINGS[0], tmp_path, 1)
    monkeypatch.setattr(merge_patches, "_TOGETHER", 7 * WIDTH)
    parts = rounded_patches(base, delta, plain, EXAMPLES * 8, ROUNDINGS[0], tmp_path, 1)
    for name in delta.tensors:
        np.testing.assert_array_equal(rounded[name].ids, plain[name].ids)
        assert rounded[name].output_error is not None
        np.testing.assert_array_equal(rounded[name].blocks, parts[name].blocks)
    assert any((rounded[name].blocks != plain[name].blocks).any() for name in delta.tensors)


def test_matrices_that_read_the_same_share_their_room(
    tuned: tuple[GgufFile, Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = tuned
    names = list(delta.tensors)
    assert list(merge_patches._portions(base, delta)) == [names]
    for n_inputs, expected in ((1, [3, 1, 2, 1] * 2), (2, [4, 2, 1] * 2), (3, [6, 4, 3, 1])):
        monkeypatch.setattr(merge_patches, "_MAX_BYTES", n_inputs * 4 * 4096 * WIDTH)
        portions = list(merge_patches._portions(base, delta))
        assert [len(portion) for portion in portions] == expected
        assert [name for portion in portions for name in portion] == names
