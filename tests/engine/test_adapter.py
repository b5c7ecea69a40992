"""`--path adapter`: the same losses as beside the products."""

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import WORDS, random_delta, write_llama
from zo_gguf.config import ReplayConfig, TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.adapter import choose_path
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe, Tensors
from zo_gguf.params.delta import Delta
from zo_gguf.params.lora import SparseFactors
from zo_gguf.params.mask import Mask, MaskHeader
from zo_gguf.tuning.methods import start
from zo_gguf.tuning.options import settle
from zo_gguf.verbs.replay import replay
from zo_gguf.verbs.tune import tune

METHODS: dict[str, dict[str, Any]] = {
    "sensitive": {},
    "lora": {"rank": 3},
    "subspace": {"rank": 3, "refresh": 2, "iters": 5},
    "sensitive+subspace": {"rank": 2, "unit": ["sparse=1", "subspace=0.5"]},
}
ROWS = [Example([3, 5, 7, 9, 4], [False, False, True, True, True]), Example([2, 8], [False, True])]
ROWS += [Example([6, 5, 9], [False, False, True], ((9,), (4, 5)), 0, 2)]
PROBES = [Probe(0, 0.0), Probe(11, 0.05), Probe(11, -0.05), Probe(2**63 + 1, 0.2), Probe(0, 0.0)]


def config(folder: Path, method: str, quant: str = "F32", **options: Any) -> TuneConfig:
    """For a random Llama, with entries on six rows and columns of every matrix."""
    path = folder / f"{quant}.gguf"
    if not path.is_file():
        write_llama(path, Type[quant])
        delta = random_delta(GgufFile(path), rank=6, share=0.05, scale=0.05)
        residuals = {name: delta.theta[part] for name, part in delta.slices().items()}
        header = MaskHeader(path.name, delta.header.base_sha256, "random", 0.05)
        mask = Mask(delta.tensors, residuals, delta.shapes, header)
        mask.save(folder / f"{quant}.mask.safetensors")
    files = {"model": str(path), "data": str(folder), "output": str(folder / "run")}
    return settle(TuneConfig(**files | {"method": method, "threads": 1} | options))


def losses(given: TuneConfig, path: str, theta: np.ndarray | None = None) -> np.ndarray:
    delta = start(given, GgufFile(given.model))
    with Engine(given.model, delta=delta, n_threads=1, path=path) as engine:
        assert engine.path == path
        engine.parameters.set_units({"subspace": 0.5})
        if theta is not None:
            engine.parameters.write(theta, 4)  # of 5 steps: in the last subspace
        result = engine.losses(ROWS, PROBES)
        assert np.array_equal(result[0], result[-1])  # probes leave no trace
        return np.asarray(result)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_hook(method: str, tmp_path: Path) -> None:
    given = config(tmp_path, method, **METHODS[method])
    first = start(given, GgufFile(given.model)).theta
    moved = first + 0.05 * np.random.default_rng(0).standard_normal(first.size).astype(np.float32)
    seen = []
    for theta in (None, moved):
        hook, adapter = (losses(given, path, theta) for path in ("hook", "adapter"))
        difference = np.abs(adapter - hook)
        assert np.median(difference) < 1e-5
        assert difference.max() < 2e-3  # a value of the f16 KV cache may round the other way
        seen.append(hook)
    spread = np.ptp(np.concatenate(seen), axis=0)
    assert (spread > 2e-2).all()  # so that this means something


def test_losses_on_quantized_weights(tmp_path: Path) -> None:
    given = config(tmp_path, "sensitive", "Q4_0")
    hook, adapter = (losses(given, path) for path in ("hook", "adapter"))
    np.testing.assert_allclose(adapter, hook, atol=0.05)  # 8-bit activations flip
    slopes = [found[1] - found[2] for found in (hook, adapter)]
    assert np.corrcoef(slopes)[0, 1] > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_factors_of_sparse_entries(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (7, 11)
    indices = np.sort(rng.choice(77, 20, replace=False))
    layout = SparseFactors(indices, shape)
    for _ in range(2):  # the same layout for other values
        values = rng.standard_normal(20).astype(np.float32)
        a, b = layout.with_values(values)
        dense = np.zeros(77, np.float32)
        dense[indices] = values
        assert np.array_equal(b @ a, dense.reshape(shape))


def rows_file(folder: Path) -> None:
    words = [word for word in WORDS if word.isalpha()][:8]
    rows = [
        {"prompt": f"{a} {b}", "choices": [f" {words[0]}", f" {words[1]}"], "answer": k % 2}
        for k, (a, b) in enumerate(zip(words, reversed(words), strict=True))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(text)


@pytest.mark.parametrize("method", ["sensitive", "subspace"])
def test_a_run_goes_the_same_way_and_replays(method: str, tmp_path: Path) -> None:
    rows_file(tmp_path)
    options = {"iters": 6, "eps": 0.05, "learning_rate": 0.01, "directions": 3, "save_every": 2}
    options |= {"refresh": 3} if method == "subspace" else {}  # Adam's first steps are signs
    thetas = []
    for path in ("hook", "adapter"):
        run = str(tmp_path / path)
        given = config(tmp_path, method, **METHODS[method] | options)
        tune(TuneConfig(**vars(given) | {"path": path, "output": run}))
        replayed = replay(ReplayConfig(run=run, step=6)).delta.theta
        assert np.array_equal(replayed, Delta.load(f"{run}/checkpoints/latest.safetensors").theta)
        thetas.append(replayed)
        assert f"path: {path}" in (Path(run) / "config.yaml").read_text()
    way = np.linalg.norm(thetas[0] - start(given, GgufFile(given.model)).theta)
    assert 0 < np.linalg.norm(thetas[0] - thetas[1]) < 0.05 * way


@pytest.mark.parametrize("method", ["norm", "dense"])
def test_what_no_adapter_holds_is_refused(method: str, tmp_path: Path) -> None:
    given = config(tmp_path, method, train="norm" if method == "dense" else None)
    gguf = GgufFile(given.model)
    delta = start(given, gguf)
    with pytest.raises(ZoError, match="no LoRA can carry; use --path hook"):
        Engine(given.model, delta=delta, n_threads=1, path="adapter")
    assert choose_path("auto", gguf, delta, staged=True) == "hook"


def test_choice_of_the_path(tmp_path: Path) -> None:
    given = config(tmp_path, "sensitive")
    gguf = GgufFile(given.model)
    delta = start(given, gguf)
    assert choose_path("auto", gguf, delta, staged=True) == "adapter"
    assert choose_path("auto", gguf, delta, staged=False) == "hook"
    assert choose_path("auto", gguf, None, staged=True) == "hook"
    assert choose_path("adapter", gguf, delta, staged=False) == "adapter"
    with pytest.raises(ZoError, match="'auto', 'hook' or 'adapter'"):
        choose_path("wire", gguf, delta, staged=False)


def test_adapter_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, "sensitive")
    delta = start(given, GgufFile(given.model))
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)

    def path(**options: Any) -> str:
        with Engine(given.model, delta=delta, n_threads=1, n_gpu_layers=-1, **options) as engine:
            assert np.isfinite(engine.losses(ROWS, PROBES)).all()
            return engine.path

    assert path() == "adapter"
    assert path(probes_per_decode=2) == "hook"  # an adapter has one value per decode
    # As where llama.cpp computes with copies of the adapter on a device.
    monkeypatch.setattr(Tensors, "missing", property(lambda _: 1))
    assert path() == "hook"
    assert path(path="adapter") == "adapter"


def test_one_probe_in_a_decode(tmp_path: Path) -> None:
    given = config(tmp_path, "sensitive")
    delta = start(given, GgufFile(given.model))
    with pytest.raises(ZoError, match="one probe at a time"):
        Engine(given.model, delta=delta, n_threads=1, path="adapter", probes_per_decode=2)
    with Engine(given.model, delta=delta, n_threads=1, path="adapter") as engine:
        assert engine.widest(ROWS) == 1
