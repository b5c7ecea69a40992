"""Matrices that llama.cpp lays out anew for the CPU: where that pays, and edited as they lie."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.helpers.tiny_gguf import write_llama
from zo_gguf.config import MergeConfig, TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.hardware import backends
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.methods import start
from zo_gguf.verbs.merge import merge

model_module = importlib.import_module("zo_gguf.engine.model")
engine_module = importlib.import_module("zo_gguf.engine.engine")
FEATURES = backends.cpu_features().split(", ")
# What this CPU repacks, of the types that any CPU does.
REPACKED = {Type.Q4_0: "AVX2", Type.IQ4_NL: "AVX2", Type.Q4_K: "AVX2", Type.Q2_K: "AVX512"}
KINDS = [*REPACKED, Type.Q4_1, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.IQ4_XS]


class Loads:
    """Counts how a model is loaded, and decides it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pays, self.seen, load = True, list[bool](), model_module.load_model

        def counting(path: Path, n_gpu_layers: int, writable: bool, repack: bool) -> object:
            self.seen.append(repack)
            return load(path, n_gpu_layers, writable, repack)

        monkeypatch.setattr(model_module, "load_model", counting)
        monkeypatch.setattr(engine_module, "repacking_pays", lambda gguf: self.pays)

    def losses(self, model: Path, delta: Delta | None = None, *, pays: bool = True) -> NDArray:
        self.pays = pays
        self.seen.clear()
        rng = np.random.default_rng(3)
        mask = [False] * 4 + [True] * 8
        rows = [Example(rng.integers(3, 260, 12).tolist(), mask) for _ in range(6)]
        with Engine(model, delta=delta, n_threads=1, ctx_tokens=128) as engine:
            return engine.losses(rows)[0]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


def tuned_scales(base: Path) -> Delta:
    """A delta of all block scales, each changed by some percent."""
    config = TuneConfig(model=str(base), data="", output="", method="block-scale")
    delta = start(config, GgufFile(base))
    noise = np.random.default_rng(4).standard_normal(delta.nnz, np.float32)
    return delta.with_theta(np.float32(0.08) * noise, {})


def merged(delta: Delta, base: Path, folder: Path) -> Path:
    delta.save(folder / "delta")
    output = folder / "merged.gguf"
    run = str(folder / "delta")
    merge(MergeConfig(run=run, output=str(output), model=str(base), threads=1))
    return output


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_scales_are_edited_where_they_lie(kind: Type, loads: Loads, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", kind)
    delta = tuned_scales(base)
    before, edited = loads.losses(base), loads.losses(base, delta)
    assert loads.seen == [True]
    assert np.abs(edited - before).max() > 0.05
    # llama.cpp lays the merged file out by itself.
    output, repacked = merged(delta, base, tmp_path), loads.seen[-1]
    assert np.array_equal(edited, loads.losses(output, pays=repacked))
    as_in_file = loads.losses(base, pays=False)
    if REPACKED.get(kind) in FEATURES:  # or the layout under test is not there
        assert not np.array_equal(before, as_in_file)
    np.testing.assert_allclose(before, as_in_file, atol=0.02)


def test_a_layout_that_cannot_be_told_is_not_used(loads: Loads, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", Type.IQ4_NL)
    info = GgufFile(base).tensors["blk.1.ffn_up.weight"]
    with open(base, "r+b") as file:  # no scale to go by
        file.seek(info.offset)
        file.write(bytes(info.n_bytes))
    delta = tuned_scales(base)
    edited = loads.losses(base, delta)
    if "AVX2" in FEATURES:
        assert loads.seen == [True, False]
    output, repacked = merged(delta, base, tmp_path), loads.seen[-1]
    assert np.array_equal(edited, loads.losses(output, pays=repacked))


@pytest.mark.parametrize(
    ("kind", "features", "pays"),
    [
        (Type.Q4_0, "AVX2, FMA", True),
        (Type.IQ4_NL, "AVX2, AVX512_VNNI", True),
        (Type.Q8_0, "AVX2", True),
        (Type.F16, "AVX2", True),
        (Type.Q4_K, "AVX2, AVX512", False),
        (Type.Q2_K, "AVX2", False),
        (Type.Q4_K, "AVX2, AMX_INT8", True),
        (Type.Q4_K, "NEON, DOTPROD", True),
    ],
)
def test_where_repacking_pays(
    kind: Type, features: str, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "cpu_features", lambda: features)
    base = GgufFile(write_llama(tmp_path / "base.gguf", kind))
    assert backends.repacking_pays(base) == pays


def test_the_larger_part_of_a_file_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_features", lambda: "AVX2")
    for large, small, pays in ((Type.Q4_K, Type.Q4_0, False), (Type.Q4_0, Type.Q4_K, True)):
        mixed = write_llama(tmp_path / "m.gguf", lambda n: large if "ffn" in n else small)  # noqa: B023
        assert backends.repacking_pays(GgufFile(mixed)) == pays
