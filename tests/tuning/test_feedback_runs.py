"""Method lora-fa with estimator feedback: what is trained, its gradient, and whole runs."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import N_LAYERS, write_llama
from zo_gguf.config import EvalConfig, MergeConfig, ReplayConfig, TuneConfig
from zo_gguf.data.dataset import Draw, Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.estimators import estimate
from zo_gguf.tuning.line_search import LineSearch
from zo_gguf.tuning.methods import look
from zo_gguf.tuning.methods.lora_fa import leading_directions
from zo_gguf.tuning.options import settle
from zo_gguf.verbs.evaluate import evaluate
from zo_gguf.verbs.merge import merge
from zo_gguf.verbs.plan import plan
from zo_gguf.verbs.replay import replay
from zo_gguf.verbs.tune import resume, tune

tune_module = importlib.import_module("zo_gguf.verbs.tune")


def rows(n: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    mask = [False] * 5 + [True] * 4
    return [Example([1, *rng.integers(3, 260, 8).tolist()], mask) for _ in range(n)]


def config(model: Path, **options: Any) -> TuneConfig:
    return settle(TuneConfig(model=str(model), data="none", output="none", threads=1, **options))


# ---- what is trained -----------------------------------------------------------------------------


def test_directions_are_leading_singular_vectors() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 6)) @ rng.standard_normal((6, 100))).astype(np.float32)
    found, kept = leading_directions(x, 4)
    _, values, wanted = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    assert found.shape == (4, 100)
    np.testing.assert_allclose(np.abs((found * wanted[:4]).sum(axis=1)), 1, rtol=1e-5)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
    assert kept == pytest.approx((values[:4] ** 2).sum() / (values**2).sum(), rel=1e-6)
    assert leading_directions(x, 32)[0].shape == (6, 100)  # they span no more
    with pytest.raises(ZoError, match="zeros alone"):
        leading_directions(np.zeros((3, 5), np.float32), 2)
    with pytest.raises(ZoError, match="not finite"):
        leading_directions(np.full((3, 5), np.nan, np.float32), 2)


def test_top_and_train_choose_matrices(tmp_path: Path) -> None:
    model, draw = write_llama(tmp_path / "m.gguf"), Draw(rows(20), 4, 0)
    with Engine(model, n_threads=1) as engine:

        def chosen(**options: Any) -> set[str]:
            return set(look(config(model, **options), engine, draw).delta.low_rank)

        last, first = ({f"blk.{k}.{part}.weight" for part in PARTS} for k in (1, 0))
        assert chosen() == last  # the upper half
        assert chosen(top=N_LAYERS) == last | first
        assert chosen(top=99, train="down") == {f"blk.{k}.ffn_down.weight" for k in range(2)}
        with pytest.raises(
            ZoError, match="No gradient reaches a matrix whose name matches 'attn_q'"
        ):
            chosen(train="attn_q")
        delta = look(config(model, rank=3), engine, draw).delta
        assert {edit.rank for edit in delta.low_rank.values()} == {3}
        up, gate = (delta.low_rank[f"blk.1.ffn_{part}.weight"].right for part in ("up", "gate"))
        assert np.array_equal(up, gate)  # they read the same


PARTS = ("attn_output", "ffn_down", "ffn_up", "ffn_gate")


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
def test_the_gradient_is_the_slope_where_no_attention_follows(kind: Type, tmp_path: Path) -> None:
    """In the last layer it is exact, at any theta; finite differences are the reference."""
    model, examples = write_llama(tmp_path / "m.gguf", kind), rows(8)
    options = config(model, top=1, rank=4)
    with Engine(model, n_threads=1) as engine:
        delta = look(options, engine, Draw(examples, 4, 0)).delta
        engine.set_delta(delta)
        rng = np.random.default_rng(1)
        engine.set_theta(0.02 * rng.standard_normal(delta.nnz))
        gradient = estimate(engine, examples, options, 0).gradient(engine.noise)
        seeds, eps = range(12), 2e-3 if kind == Type.F32 else 0.02
        slopes = [
            (engine.losses(examples, [Probe(seed, sign * eps)]).mean() * sign)
            for seed in seeds
            for sign in (1, -1)
        ]
        found = np.array(slopes).reshape(-1, 2).sum(axis=1) / (2 * eps)
        wanted = [gradient @ engine.noise(seed) for seed in seeds]
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    # The head leaves out a tail; with Q8_0 activations are rounded, and the loss is a staircase.
    assert error < (0.01 if kind == Type.F32 else 0.1)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m.gguf")
    with pytest.raises(ZoError, match="--directions is for estimators of random directions"):
        config(model, directions=4)
    with pytest.raises(ZoError, match="--clip is for estimators"):
        config(model, clip=1.0)
    with pytest.raises(ZoError, match="--top is for --method lora-fa"):
        config(model, method="norm", top=3)


# ---- the learning rate ---------------------------------------------------------------------------


def test_the_lowest_point_of_a_parabola_in_log_rate() -> None:
    rates = [0.0, 1e-4, 3e-4, 9e-4, 2.7e-3]
    losses = [1.0, *(0.2 + 0.1 * np.log(np.array(rates[1:]) / 5e-4) ** 2)]
    found = LineSearch(rates, losses)
    assert found.lowest == pytest.approx(5e-4)
    assert found.rate == 2.5e-4
    assert "at rate 0.0005, by 0.77 from 1" in found.render()


def test_a_lowest_point_at_the_end_is_taken_as_it_is() -> None:
    assert LineSearch([0.0, 1e-4, 3e-4], [1.0, 0.9, 0.8]).lowest == 3e-4
    assert LineSearch([0.0, 1e-4, 3e-4], [1.0, 0.9, 1.3]).lowest == 1e-4
    assert LineSearch([0.0, 1e-4, 3e-4], [1.0, 1.1, 1.3]).lowest == 0


def test_values_that_are_not_finite_end_the_search() -> None:
    assert LineSearch([0.0, 1e-4, 3e-4, 9e-4], [1.0, 0.9, 0.8, np.inf]).lowest == 3e-4


# ---- runs ----------------------------------------------------------------------------------------


N_STEPS = 16


@pytest.fixture(scope="module")
def options(tiny_export: SimpleNamespace, task_dir: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_export.model("Q4_0")),
        "data": str(task_dir),
        "iters": N_STEPS,
        "valid_every": 6,
        "valid_rows": 48,
        "threads": 1,
    }


@pytest.fixture(scope="module")
def finished(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    tune(**options, output=str(run))
    return run


def test_the_default_learns(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["best_loss"] < 0.5 * summary["base_loss"]
    assert "method: lora-fa" in (text := (finished / "config.yaml").read_text())
    assert "estimator: feedback" in text


def test_a_killed_run_goes_on_to_the_same_bits(
    finished: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save, seen = tmp_path / "run", tune_module._save, []

    def killed_at_ten(session: Any) -> None:
        seen.append(session.state.step)
        save(session)

    monkeypatch.setattr(tune_module, "_save", killed_at_ten)
    step = tune_module.State.apply

    def apply(self: Any, *given: Any) -> None:
        if self.step == 10 and len(seen) < 4:
            raise KeyboardInterrupt  # without saving, as a kill
        step(self, *given)

    monkeypatch.setattr(tune_module.State, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        tune(**options, output=str(run))
    assert seen == [0, 6]
    monkeypatch.undo()
    resume(run)
    for name in ("delta.safetensors", "trajectory.bin", "checkpoints/latest.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_there_is_nothing_to_replay(finished: Path) -> None:
    with pytest.raises(ZoError, match="too long to be recorded"):
        replay(ReplayConfig(run=str(finished)))


def test_probes_train_the_same_parameters(options: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = {"method": "lora-fa", "estimator": "natural", "iters": 3, "directions": 2}
    tune(**{**options, **given, "valid_rows": 4}, eps=0.01, learning_rate=1e-3, output=str(run))
    found = replay(ReplayConfig(run=str(run), step=3)).delta
    latest = Delta.load(run / "checkpoints" / "latest.safetensors")
    assert np.array_equal(found.theta, latest.theta)


def test_plan_says_what_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    result = plan(**options, output=str(tmp_path / "run"))
    assert "keeps" in result.render()
    assert result.trainable > 0
    assert not (tmp_path / "run").exists()


def test_it_is_a_lora_as_it_stands(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.lora.gguf"
    result = merge(MergeConfig(run=str(finished), output=str(output), lora=True, threads=1))
    assert result.retention == pytest.approx(1, abs=0.03)  # 8-bit activations round otherwise


def test_merged_files_are_better(finished: Path, options: dict[str, Any], tmp_path: Path) -> None:
    data = {"data": str(Path(options["data"]) / "test.jsonl"), "rows": 48, "threads": 1}
    base = evaluate(EvalConfig(model=options["model"], **data)).loss
    tuned = evaluate(EvalConfig(model=options["model"], delta=str(finished), **data)).loss
    output = tmp_path / "merged.gguf"
    merge(MergeConfig(run=str(finished), output=str(output), threads=1))
    merged = evaluate(EvalConfig(model=str(output), **data)).loss
    assert GgufFile(output).tensors.keys() == GgufFile(options["model"]).tensors.keys()
    assert merged - tuned < 0.1 * (base - tuned)
