"""Every method: probes leave no trace, runs replay and resume, losses fall, merges are exact.

The model is random and the task is one word. Formulas are checked in test_method_reference.
"""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.helpers.tiny_gguf import WORDS, random_delta, write_llama
from zo_gguf.config import MergeConfig, ReplayConfig, TuneConfig
from zo_gguf.data.dataset import load_examples
from zo_gguf.engine.attach import attach
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.merging.stock import measure_stock
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask, MaskHeader
from zo_gguf.tuning.methods import METHODS, start
from zo_gguf.tuning.trajectory import Record, Trajectory
from zo_gguf.verbs.merge import merge
from zo_gguf.verbs.replay import replay

tune_module = importlib.import_module("zo_gguf.verbs.tune")
N_STEPS, SAVED_AT, KILLED_AT = 40, 10, 17  # the last checkpoint before the kill is SAVED_AT's
SCALE_BYTES = {Type.Q4_0: [0, 1], Type.Q8_0: [0, 1], Type.Q4_K: [0, 1, 2, 3]}  # of a block
# Name: eps, a third of which is the learning rate, and other options.
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "sensitive-Q4_0": (0.03, {}),
    "magnitude-Q4_0": (0.08, {}),
    "magnitude-F16": (0.006, {}),
    "norm-Q4_0": (0.1, {}),
    "block-scale-Q4_0": (0.08, {}),
    "block-scale-Q8_0": (0.08, {}),
    "block-scale-Q4_K": (0.03, {}),
    "subspace-Q4_0": (0.004, {"rank": 4, "refresh": 7}),
    "lora-Q4_0": (0.015, {"rank": 4}),
    "sensitive+lora-Q4_0": (0.02, {"unit": ["sparse=1", "lora=0.5"]}),
    "dense-F16": (0.004, {}),
    "dense-Q4_0": (0.1, {"train": "norm"}),
    "sensitive+block-scale-Q8_0": (0.02, {"unit": ["sparse=1", "scale=3"]}),
    "lora+block-scale-Q8_0": (0.02, {"rank": 4, "unit": ["scale=2", "lora=0.5"]}),
    "block-scale+norm-Q8_0": (0.05, {"unit": ["scale=1", "gain=1"]}),
    "sensitive+dense-Q4_0": (0.02, {"unit": ["sparse=1", "weight=4"]}),
}
IN_PLACE = [name for name in CASES if re.match("block|dense|norm|magnitude-F16", name)]
PRODUCTS = [name for name in CASES if name not in IN_PLACE]
every_case = pytest.mark.parametrize("case", CASES)


@dataclass(frozen=True)
class Done:
    """A finished run, and its folder as a kill right after KILLED_AT would have left it."""

    base: Path
    rows: Path
    run: Path
    killed: Path
    delta: Delta


Runs = Callable[[str], Done]


def config(folder: Path, method: str, quant: str, output: Path, **options: Any) -> TuneConfig:
    defaults = {
        "model": str(base_of(folder, quant)),
        "mask": str(folder / f"{quant}.mask") if "sensitive" in method else "",
        "data": str(folder), "output": str(output), "method": method, "iters": N_STEPS,
        "directions": None if "estimator" in options else 4, "valid_every": 20, "threads": 1,
        "save_every": SAVED_AT, "seed": 7, "ctx_tokens": 256, "eps": 0.01, "learning_rate": 0.01,
    }  # fmt: skip
    return TuneConfig(**defaults | options)


@cache
def base_of(folder: Path, quant: str) -> Path:
    """A random Llama and a random mask."""
    path = write_llama(folder / f"{quant}.gguf", Type[quant])
    delta = random_delta(GgufFile(path), rank=None, share=0.015, scale=0.01)
    residuals = {name: delta.theta[part] for name, part in delta.slices().items()}
    header = MaskHeader(path.name, delta.header.base_sha256, "random", 0.015)
    Mask(delta.tensors, residuals, delta.shapes, header).save(folder / f"{quant}.mask")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and rows of three random words after which " yes" is to follow."""
    folder, rng = tmp_path_factory.mktemp("methods"), np.random.default_rng(0)
    for split, n in (("train", 32), ("valid", 8)):
        prompts = ["".join(rng.choice(WORDS[:7], 3)) for _ in range(n)]
        rows = [json.dumps({"prompt": prompt, "completion": " yes"}) for prompt in prompts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> Runs:
    """The run of a case, made when it is first asked for."""

    @cache
    def make(case: str) -> Done:
        run, killed, append = folder / case, folder / f"{case}-killed", Trajectory.append

        def append_and_copy(self: Trajectory, record: Record) -> None:
            append(self, record)
            if record.step == KILLED_AT:
                shutil.copytree(run, killed)

        (method, quant), (eps, options) = case.rsplit("-", 1), CASES[case]
        options = {"eps": eps, "learning_rate": eps / 3} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trajectory, "append", append_and_copy)
            tune_module.tune(config(folder, method, quant, run, **options))
        return Done(base_of(folder, quant), folder / "valid.jsonl", run, killed, Delta.load(run))

    return make


def losses(model: Path, rows: Path, delta: Delta | None = None) -> NDArray[np.float64]:
    with Engine(model, delta=delta, n_threads=1, ctx_tokens=256) as engine:
        return engine.losses(load_examples(rows, engine))[0]


def test_every_method_has_a_case() -> None:
    assert {part for case in CASES for part in case.rsplit("-", 1)[0].split("+")} == {
        name for name, method in METHODS.items() if method.start
    }


@every_case
def test_probes_leave_no_trace(case: str, done: Runs) -> None:
    made = done(case)
    with Engine(made.base, delta=made.delta, n_threads=1, ctx_tokens=256) as engine:
        rows, theta, eps = load_examples(made.rows, engine), engine.theta(), CASES[case][0]
        before = engine.losses(rows)[0]
        probes = [Probe(1, eps), Probe(1, -eps), Probe(0, 0.0), Probe(2, eps)]
        plus, minus, between, other = engine.losses(rows, probes)
        assert np.array_equal(between, before)
        assert np.array_equal(engine.losses(rows)[0], before)
        assert np.array_equal(engine.losses(rows, probes), [plus, minus, between, other])
        assert np.array_equal(engine.theta(), theta)
    for one, two in ((plus, before), (minus, before), (plus, minus), (plus, other)):
        assert np.abs(one - two).max() > 1e-3


@every_case
def test_replay_and_round_trip(case: str, done: Runs, tmp_path: Path) -> None:
    made = done(case)
    latest = Delta.load(made.run / "checkpoints" / "latest.safetensors")
    last = replay(ReplayConfig(run=str(made.run), step=N_STEPS))
    assert np.array_equal(last.delta.theta.view(np.uint32), latest.theta.view(np.uint32))
    assert replay(ReplayConfig(run=str(made.run), output=str(tmp_path / "replayed"))).identical
    loaded = Delta.load(tmp_path / "replayed")
    assert loaded.live == last.delta.live
    loaded.save(tmp_path / "saved")
    for name in ("replayed", "saved"):
        assert (tmp_path / name).read_bytes() == (made.run / "delta.safetensors").read_bytes()


@every_case
def test_loss_falls(case: str, done: Runs) -> None:
    summary = json.loads((done(case).run / "summary.json").read_text())
    assert summary["base_loss"] - summary["best_loss"] > 0.1
    assert summary["best_step"] == N_STEPS


@every_case
def test_resume_after_a_kill_gives_the_same_bits(case: str, done: Runs) -> None:
    made = done(case)
    assert Trajectory.load(made.killed / "trajectory.bin").n_records == KILLED_AT
    tune_module.resume(made.killed)
    for name in ("trajectory.bin", "delta.safetensors", "checkpoints/latest.safetensors"):
        assert (made.killed / name).read_bytes() == (made.run / name).read_bytes(), name


# ---- merges --------------------------------------------------------------------------------------


def merged(delta: Delta, base: Path, folder: Path, **options: Any) -> Path:
    """Merged without measuring anything, which a delta outside of its run gives."""
    run, output = folder / "delta", folder / "out.gguf"
    delta.save(run)
    files = {"run": str(run), "output": str(output), "model": str(base)}
    merge(MergeConfig(**files | {"threads": 1} | options))
    return output


@pytest.mark.parametrize("case", IN_PLACE)
def test_merge_in_place_changes_nothing_else(case: str, done: Runs, tmp_path: Path) -> None:
    made = done(case)
    delta, old = made.delta, GgufFile(made.base)
    new = GgufFile(merged(delta, made.base, tmp_path))
    types = [[(t.name, t.type, t.shape) for t in file.tensors.values()] for file in (old, new)]
    assert types[0] == types[1]  # and so the sizes
    masters = {name: delta.theta[part] for name, part in delta.edit_slices().items()}
    for name, info in old.tensors.items():
        before, after = old.raw(name), new.raw(name)
        assert np.array_equal(before, after) == (name not in delta.edits), name
        kind = delta.edits[name].kind if name in delta.edits else ""
        if kind == "scale":
            size = GGML_QUANT_SIZES[info.type][1]
            here = np.isin(np.arange(size), SCALE_BYTES[info.type])
            before, after = before.reshape(-1, size), after.reshape(-1, size)
            assert np.array_equal(before[:, ~here], after[:, ~here])
            scales = before[:, here].copy().view("<f2").astype(np.float32)
            scales *= np.maximum(1 + masters[name].reshape(scales.shape), np.float32(2**-10))
            assert np.array_equal(after[:, here].copy().view("<f2"), scales.astype("<f2"))
        elif kind == "gain":
            assert np.array_equal(new.dequantize(name), old.dequantize(name) * (1 + masters[name]))
        elif kind == "weight":
            weights = after.copy().view("<f2" if info.type == Type.F16 else "<f4").ravel()
            assert np.array_equal(weights, masters[name].astype(weights.dtype))
            if case.startswith("magnitude"):
                first = old.dequantize(name).ravel()
                large = np.abs(first) > np.quantile(np.abs(first), 0.25)
                assert np.array_equal(weights[large], first[large])
                assert (weights[~large] != first[~large]).mean() > 0.9
    hooked, plain = losses(made.base, made.rows, delta), losses(new.path, made.rows)
    assert np.array_equal(hooked, plain)
    assert np.abs(hooked - losses(made.base, made.rows)).max() > 0.1


@pytest.mark.parametrize("case", PRODUCTS)
def test_merge_of_products(case: str, done: Runs, tmp_path: Path) -> None:
    made = done(case)
    tuned, base = losses(made.base, made.rows, made.delta), losses(made.base, made.rows)
    after = losses(merged(made.delta, made.base, tmp_path, type="f16"), made.rows)
    np.testing.assert_allclose(after, tuned, atol=0.2 * np.abs(base - tuned).max())


@pytest.mark.parametrize("method", ["subspace", "lora"])
def test_lora_in_stock(method: str, folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, "F16")
    options = {"rank": 4} | ({"refresh": 14} if method == "subspace" else {})
    first = start(config(folder, method, "F16", tmp_path, **options), GgufFile(base))
    noise = np.random.default_rng(5).standard_normal(first.nnz, np.float32)
    delta = first.with_theta(first.theta + np.float32(0.05) * noise, {})
    adapter = merged(delta, base, tmp_path, lora=True)
    with Engine(base, delta=delta, n_threads=1, ctx_tokens=512) as engine:
        tuned = engine.losses(rows := load_examples(folder / "train.jsonl", engine))[0]
    stock = measure_stock(base, rows, lora=adapter, n_threads=1).losses
    np.testing.assert_allclose(stock, tuned, atol=5e-3)
    assert stock.mean() == pytest.approx(tuned.mean(), abs=1e-3)
    assert np.abs(tuned - losses(base, folder / "train.jsonl")).mean() > 0.1


# ---- refusals ------------------------------------------------------------------------------------

TWICE = ["dense+magnitude", "subspace+lora", "sensitive+dense", "lora+dense"]
TOO_HIGH = "--rank 129 is more than the smallest matrix has, 128"
REFUSALS = [
    ("block-scale", "F16", {}, "no quantized matrices.*--method dense"),
    ("dense", "Q4_0", {"train": "attn_q"}, "'blk.0.attn_q.weight' is quantized to Q4_0"),
    ("norm", "Q4_0", {"train": "attn_q"}, "no norm weights"),
    ("subspace", "Q4_0", {"rank": 32, "refresh": 2}, "20 subspaces of rank 32 need rank 640"),
    *((name, "Q4_0", {"rank": 129}, TOO_HIGH) for name in ("lora", "subspace")),
    *((name, "F16", {}, "train the same weights twice") for name in TWICE),
    ("sensitive+magnitude", "Q4_0", {}, "train the same weights twice"),
    ("dense", "F16", {"probes_per_decode": 2}, "one probe at a time"),
]


@pytest.mark.parametrize(("method", "quant", "options", "message"), REFUSALS)
def test_refusals_cost_nothing(
    method: str, quant: str, options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ZoError, match=message):
        tune_module.tune(config(folder, method, quant, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", IN_PLACE)
def test_only_merges_carry(case: str, done: Runs, tmp_path: Path) -> None:
    base, delta = done(case).base, done(case).delta
    with pytest.raises(ZoError, match="no LoRA can carry"):
        merged(delta, base, tmp_path, lora=True)
    if not case.startswith("norm"):  # gains are not in the weights
        with pytest.raises(ZoError, match="use `zo-gguf merge`"):
            attach(SimpleNamespace(model_path=str(base)), delta)
        with pytest.raises(ZoError, match="one probe at a time"):
            Engine(base, delta=delta, probes_per_decode=2)
