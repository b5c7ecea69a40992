"""Gains of norms: the kernel, and the method against the file with edited norms."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers import models
from zo_gguf.config import MergeConfig, TuneConfig
from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.attach import attach, detach
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.merging.edits import write_edited
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.methods import start
from zo_gguf.verbs.merge import merge
from zo_gguf.verbs.tune import tune


@pytest.fixture
def rows(task_dir: Path) -> Callable[[Engine], list]:
    """The first rows of the shipped task, for an engine."""
    return lambda engine: load_examples(task_dir / "train.jsonl", engine)[:8]


@pytest.fixture
def norm_delta(tiny_export: SimpleNamespace) -> Callable[[str], Delta]:
    """A delta with gains of a tenth on all norms, for a quant."""

    def make(quant: str) -> Delta:
        path = tiny_export.model(quant)
        config = TuneConfig(model=str(path), data="", output="", method="norm")
        delta = start(config, GgufFile(path))
        theta = 0.1 * np.random.default_rng(0).standard_normal(delta.nnz)
        return delta.with_theta(theta.astype(np.float32), {})

    return make


def test_norm_takes_every_norm(norm_delta: Callable[[str], Delta]) -> None:
    delta = norm_delta("Q4_0")
    assert set(delta.edits) == set(delta.gains)
    assert {"output_norm.weight", "blk.0.attn_norm.weight"} <= set(delta.gains)
    assert all(name.endswith("norm.weight") for name in delta.gains)


@pytest.mark.parametrize("staged", [False, True])
def test_gains_equal_edited_norms(
    norm_delta: Callable[[str], Delta],
    tiny_export: SimpleNamespace,
    rows: Callable,
    tmp_path: Path,
    staged: bool,
) -> None:
    delta, path = norm_delta("F16"), tiny_export.model("F16")
    edited = write_edited(GgufFile(path), delta, tmp_path / "edited.gguf")
    weights = GgufFile(path).dequantize("blk.1.ffn_norm.weight")
    gains = delta.theta[delta.edit_slices()["blk.1.ffn_norm.weight"]]
    np.testing.assert_allclose(
        edited.dequantize("blk.1.ffn_norm.weight"), weights * (1 + gains), rtol=1e-6
    )
    with Engine(path, delta=delta, force_staged=staged) as engine:
        hooked = engine.losses(rows(engine))
        examples = rows(engine)
    with Engine(path) as engine:
        base = engine.losses(examples)
    with Engine(edited.path) as engine:
        merged = engine.losses(examples)
    assert np.abs(merged - base).max() > 0.01
    np.testing.assert_allclose(hooked, merged, atol=2e-3)  # F16 products round


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_norms_of_heads(n_tokens: int, tmp_path: Path) -> None:
    """Also where a decode has one token, and heads lie where tokens do otherwise."""
    file = GgufFile(models.converted("qwen3").gguf)
    delta = start(TuneConfig(model=str(file.path), data="", output="", method="norm"), file)
    assert {"blk.0.attn_q_norm.weight", "blk.1.attn_k_norm.weight"} <= set(delta.gains)
    theta = 0.6 * np.random.default_rng(0).standard_normal(delta.nnz)
    delta = delta.with_theta(theta.astype(np.float32), {})
    edited = write_edited(file, delta, tmp_path / "edited.gguf")
    row = Example(list(range(5, 6 + n_tokens)), [False] + n_tokens * [True])
    hooked, merged, base = (
        _loss(path, row, mask)
        for path, mask in ((file.path, delta), (edited.path, None), (file.path, None))
    )
    assert abs(merged - base) > 0.004
    assert hooked == pytest.approx(merged, abs=2e-3)  # F16 products round


def _loss(path: Path, row: Example, mask: Delta | None) -> float:
    with Engine(path, delta=mask, n_threads=1) as engine:
        return float(engine.losses([row]).item())


def test_probes_share_a_decode(
    norm_delta: Callable[[str], Delta], tiny_export: SimpleNamespace, rows: Callable
) -> None:
    delta, path = norm_delta("F16"), tiny_export.model("F16")
    probes = [Probe(5, 0.05), Probe(5, -0.05), Probe(9, 0.1), Probe(0, 0.0)]
    with Engine(path, delta=delta) as engine:
        apart = engine.losses(rows(engine), probes)
        z = engine.noise(5)
        engine.set_theta(delta.theta + np.float32(0.05) * z)
        shifted = engine.losses(rows(engine))
    with Engine(path, delta=delta, probes_per_decode=4) as engine:
        together = engine.losses(rows(engine), probes)
    np.testing.assert_allclose(together, apart, atol=2e-3)
    np.testing.assert_allclose(shifted[0], apart[0], atol=1e-6)
    assert np.abs(apart[0] - apart[1]).max() > 1e-3


def test_tune_merge_and_resume(
    tiny_export: SimpleNamespace, task_dir: Path, tmp_path: Path
) -> None:
    """sensitive+norm: units, an exact resume and a merged file."""
    options = {
        "model": str(tiny_export.model("Q4_0")),
        "mask": str(tiny_export.mask("Q4_0")),
        "data": str(task_dir),
        "method": "sensitive+norm",
        "eps": 0.05,
        "learning_rate": 0.02,
        "unit": ["gain=2"],
        "estimator": "spsa",
        "targets": "answers",
        "iters": 12,
        "save_every": 5,
        "valid_rows": 24,
        "threads": 1,
    }
    tune(TuneConfig(**options, output=str(tmp_path / "whole")))
    stopped = tmp_path / "stopped"
    tune(TuneConfig(**(options | {"iters": 7, "schedule": "constant"}), output=str(stopped)))
    whole = tmp_path / "constant"
    tune(TuneConfig(**(options | {"schedule": "constant"}), output=str(whole)))
    config = stopped / "config.yaml"
    config.write_text(config.read_text().replace("iters: 7", "iters: 12"))
    from zo_gguf.verbs.tune import resume

    resume(stopped)
    latest = "checkpoints/latest.safetensors"
    assert (stopped / latest).read_bytes() == (whole / latest).read_bytes()
    assert (stopped / "trajectory.bin").read_bytes() == (whole / "trajectory.bin").read_bytes()
    result = merge(MergeConfig(run=str(whole), output=str(tmp_path / "m.gguf"), threads=1))
    assert result.output.stat().st_size < 1.01 * tiny_export.model("Q4_0").stat().st_size
    assert json.loads((tmp_path / "m.gguf.merge.json").read_text())["growth"] == 1.0
    with pytest.raises(ZoError, match="no LoRA can carry"):
        merge(MergeConfig(run=str(whole), output=str(tmp_path / "l.gguf"), lora=True))


def test_attach_applies_gains(
    norm_delta: Callable[[str], Delta], tiny_export: SimpleNamespace, tmp_path: Path
) -> None:
    from llama_cpp import Llama

    delta, path = norm_delta("F16"), tiny_export.model("F16")
    edited = write_edited(GgufFile(path), delta, tmp_path / "edited.gguf")

    def logits(llama: Llama) -> np.ndarray:
        llama.reset()
        llama.eval([1, 5, 9])
        return np.array(llama._scores[2])

    options = {"n_ctx": 64, "verbose": False, "logits_all": True, "n_threads": 1}
    llama = Llama(model_path=str(path), **options)
    base = logits(llama)
    attach(llama, delta)
    attached = logits(llama)
    detach(llama)
    assert np.array_equal(logits(llama), base)
    merged = logits(Llama(model_path=str(edited.path), **options))
    np.testing.assert_allclose(attached, merged, atol=0.02)
    assert np.abs(merged - base).max() > 0.1
