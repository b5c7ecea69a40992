"""How far parameters may go: thresholds, signs of scales, subspaces that follow one another."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import write_llama
from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import is_idle, matching_matrices
from zo_gguf.params.kinds import Live
from zo_gguf.params.lora import check_lora, write_lora
from zo_gguf.tuning.methods import start
from zo_gguf.tuning.optimizer import Adam, default_learning_rate
from zo_gguf.tuning.report import TuneResult
from zo_gguf.tuning.run import first_state
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import Direction, Record

LEAST = 2.0**-10 - 1  # of a relative master: 1/1024 of the scale is left


def config(folder: Path, method: str, kind: Type = Type.Q4_0, **options: Any) -> TuneConfig:
    path = folder / f"{kind.name}.gguf"
    if not path.exists():
        write_llama(path, kind)
    return TuneConfig(
        model=str(path), data="none", output="none", method=method, threads=1, **options
    )


def record(step: int, slope: float, lr: float) -> Record:
    return Record(step, lr, (Direction(step, 1.0, 0.0, slope),))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0])
def test_smallest_weights_are_drawn_from_all_rows(kind: Type, tmp_path: Path) -> None:
    """A quantized matrix has far more zeros than are wanted: its first ones are all in one row."""
    given = config(tmp_path, "magnitude", kind, density=0.004)
    base = GgufFile(given.model)
    delta = start(given, base)
    for name, chosen in delta.tensors.items():
        n_rows, n_cols = delta.shapes[name]
        weights = np.abs(base.dequantize(name)).reshape(-1)
        assert chosen.size == round(0.004 * weights.size)
        assert np.all(np.diff(chosen) > 0)
        assert weights[chosen].max() <= np.delete(weights, chosen).min()
        rows = np.unique(chosen // n_cols).size
        expected = n_rows * (1 - (1 - 1 / n_rows) ** chosen.size)  # with replacement
        assert rows > 0.8 * expected
    again = start(given, base)
    assert all(np.array_equal(delta.tensors[name], again.tensors[name]) for name in delta.tensors)


def pruned(folder: Path, zeros: slice | None) -> TuneConfig:
    """`magnitude` on F16 with these rows of the first matrix 0, or everything (None)."""
    given = config(folder, "magnitude", Type.F16)
    base = GgufFile(given.model)
    data = bytearray(Path(given.model).read_bytes())
    for name in matching_matrices(base, None):
        first, raw = base.tensors[name].offset, base.raw(name)
        if zeros is None or name == "blk.0.attn_q.weight":
            rows = raw[zeros or slice(None)]
            data[first : first + rows.nbytes] = bytes(rows.nbytes)
    Path(given.model).write_bytes(data)
    return given


def test_zeros_of_a_pruned_matrix_do_not_count(tmp_path: Path) -> None:
    whole = start(config(tmp_path, "magnitude", Type.F16), GgufFile(tmp_path / "F16.gguf")).live
    given = pruned(tmp_path, slice(0, 128))
    limits = {name: edit.limit for name, edit in Trainable(given).delta.live.items()}
    name = "blk.0.attn_q.weight"
    assert limits[name] == pytest.approx(whole.pop(name).limit, rel=0.05)
    assert all(limits[other] == edit.limit for other, edit in whole.items())
    assert Trainable(given).farthest > 0


def test_matrices_of_zeros_are_left_out(tmp_path: Path) -> None:
    given = pruned(tmp_path, slice(0, 256))
    live = Trainable(given).delta.live
    assert len(live) == len(matching_matrices(GgufFile(given.model), None)) - 1
    assert "blk.0.attn_q.weight" not in live
    with pytest.raises(ZoError, match="all zero"):
        Trainable(pruned(tmp_path, None))


def test_masters_of_scales_stop_where_their_scales_do(tmp_path: Path) -> None:
    trainable = Trainable(config(tmp_path, "block-scale"))
    state = first_state(trainable, "sgd")
    state.replay(record(1, 1.0, 5.0), trainable)  # far beyond
    assert state.theta.min() == np.float32(LEAST)
    at_rest = state.theta == np.float32(LEAST)
    assert 0.2 < at_rest.mean() < 0.7
    before = state.theta.copy()
    state.replay(record(2, 1.0, 1e-3), trainable)
    moved = at_rest & (state.theta > before)  # none has a debt to pay back first
    assert 0.3 < moved.sum() / at_rest.sum() < 0.7


def test_absolute_masters_keep_the_signs_of_their_scales() -> None:
    base = np.array([1e-3, 2e-3, -1e-3, -2e-3, 0, 1e-3], np.float32)
    masters = np.array([-1, 3e-3, 1, -1e-3, 0, 1e-9], np.float32)
    Live("scale", 6).confine(masters, np.sign(base).astype(np.int8))
    floor = np.float32(1e-7)
    np.testing.assert_array_equal(masters, np.float32([floor, 3e-3, -floor, -1e-3, 0, floor]))


def test_adam_begins_anew_with_every_subspace(tmp_path: Path) -> None:
    trainable = Trainable(config(tmp_path, "subspace", rank=4, refresh=2, iters=6))
    state = first_state(trainable, "adam")
    assert isinstance(state.optimizer, Adam)
    counts = []
    for step in range(1, 7):
        state.replay(record(step, 1.0, 1e-3), trainable)
        counts.append(round(math.log(state.optimizer.state["decay"][0], Adam.beta1)))
    assert counts == [1, 2, 1, 2, 1, 2]
    windows = state.theta.reshape(-1, 3, 16)  # every window took steps of the same size
    sizes = np.sqrt((windows**2).mean(axis=(0, 2)))
    np.testing.assert_allclose(sizes, sizes[0], rtol=0.05)


def test_a_new_subspace_leaves_the_moments_of_others(tmp_path: Path) -> None:
    both = Trainable(config(tmp_path, "norm+subspace", rank=4, refresh=2, iters=6))
    alone = Trainable(config(tmp_path, "norm"))
    together, apart = first_state(both, "adam"), first_state(alone, "adam")
    n = apart.theta.size
    for step in range(1, 7):
        for state, trainable in ((together, both), (apart, alone)):
            state.replay(record(step, 1.0, 1e-3), trainable)
        np.testing.assert_array_equal(together.theta[:n], apart.theta)
        for name, value in apart.optimizer.state.items():
            np.testing.assert_array_equal(together.optimizer.state[f"first.{name}"], value)
        t = math.log(together.optimizer.state["second.decay"][0], Adam.beta1)
        assert round(t) == 2 - step % 2


def test_default_rates_keep_weights_below_their_threshold(tmp_path: Path) -> None:
    given = config(tmp_path, "magnitude", Type.F16)
    limits = [edit.limit for edit in start(given, GgufFile(given.model)).live.values()]
    trainable = Trainable(given)
    assert trainable.farthest == pytest.approx(min(limits) / 2)
    assert Trainable(config(tmp_path, "norm")).farthest == math.inf
    rate = default_learning_rate("adam", 1.0, 1.0, 100, 16, farthest=0.5)
    assert rate * math.sqrt(100) == pytest.approx(0.5)
    assert default_learning_rate("sgd", 1.0, 4.0, 100, 16, farthest=0.5) == pytest.approx(
        rate / 4, rel=0.05
    )
    assert default_learning_rate("adam", 1.0, 1.0, 100, 16) > rate


def test_weights_beside_scales_go_by_the_unit_of_both(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", lambda n: Type.F16 if "attn_q" in n else Type.Q4_0)
    given = {"model": str(path), "data": "none", "output": "none", "threads": 1}
    trainable = Trainable(TuneConfig(method="block-scale+magnitude", **given))
    assert trainable.kinds == ["sparse", "scale"]  # all edits in place are written in one go
    limits = [edit.limit for edit in trainable.delta.live.values() if edit.kind == "weight"]
    assert trainable.farthest == pytest.approx(min(limits) / 2)
    trainable.set_units({"scale": 8.0})
    assert trainable.farthest == pytest.approx(min(limits) / 16)


def test_a_trained_lora_is_exact_at_any_rank(tmp_path: Path) -> None:
    given = config(tmp_path, "lora", rank=80)  # of 128 rows
    base = GgufFile(given.model)
    delta = start(given, base)
    check_lora(base, delta, None)
    summary = write_lora(base, delta, tmp_path / "lora.gguf", rank=None, keys={})
    assert summary.rank == summary.exact_rank == 80


def test_probes_share_decodes_by_measurement_on_a_gpu() -> None:
    given = {"model": "m.gguf", "data": "d", "output": "o"}
    assert TuneConfig(**given).probes_per_decode == 1
    assert TuneConfig(**given, n_gpu_layers=-1).probes_per_decode == "auto"
    assert TuneConfig(**given, n_gpu_layers=-1, probes_per_decode=3).probes_per_decode == 3


def test_layers_that_share_keys_and_values_have_idle_tensors() -> None:
    keys = {"gemma3n.block_count": 6, "gemma3n.attention.shared_kv_layers": 2}
    base: Any = SimpleNamespace(architecture="gemma3n", metadata=keys.get)
    names = ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight", "attn_q.weight", "ffn_up.bias"]
    idle = {(i, name) for i in range(6) for name in names if is_idle(base, f"blk.{i}.{name}")}
    assert idle == {(i, name) for i in (4, 5) for name in names[:3]}
    base.architecture = "llama"
    assert not is_idle(base, "blk.5.attn_k.weight")


def test_bases_of_subspaces_are_orthonormal(tmp_path: Path) -> None:
    given = config(tmp_path, "subspace", rank=16, refresh=3, iters=6)
    edits = start(given, GgufFile(given.model)).low_rank.values()
    bases = [basis for edit in edits for side in (edit.left, edit.right) for basis in side]
    squares = np.array([basis @ basis.T for basis in bases], np.float64)
    assert len(bases) == 4 * len(edits)  # two windows, two sides
    assert len({basis.tobytes() for basis in bases}) == len(bases)
    np.testing.assert_allclose(squares, [np.eye(16)] * len(bases), atol=1e-6)


def test_a_delta_of_nothing_is_told(tmp_path: Path) -> None:
    given = config(tmp_path, "lora", rank=2)
    delta = start(given, GgufFile(given.model))  # B is 0, A is not
    assert delta.is_zero
    assert not delta.with_theta(delta.theta + np.float32(0.1), {}).is_zero
    table = TuneResult("run", 5, 0, 1.0, None, 1.0, None).render()
    assert "Nothing was learned" in table
    assert "Nothing was learned" not in TuneResult("run", 5, 5, 1.0, None, 0.9, None).render()


@pytest.mark.parametrize("method", ["norm", "dense", "block-scale", "lora", "norm+lora"])
def test_theta_has_one_owner(method: str, tmp_path: Path) -> None:
    trainable = Trainable(config(tmp_path, method, Type.F16 if method == "dense" else Type.Q4_0))
    state, first = first_state(trainable, "sgd"), trainable.delta.theta.copy()
    with trainable.open_engine() as engine:
        state.replay(record(1, 1.0, 1e-2), trainable)
        assert state.theta is trainable.delta.theta is trainable.to_delta({}).theta
        assert np.shares_memory(engine.parameters._theta, state.theta)
        assert np.array_equal(engine.theta(), state.theta)
        assert not np.array_equal(engine.theta(), first)
        engine.theta()[:] = 9  # a copy
        assert np.array_equal(engine.theta(), state.theta)
        own = first.copy()
        engine.set_theta(own)  # as is this
        own[:] = 9
        assert np.array_equal(engine.theta(), first)
