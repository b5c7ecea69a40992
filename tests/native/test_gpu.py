"""The hook on a GPU against the hook on the CPU, in the engine; tests of single kernels are in
test_native and test_native_edits.

"stand-in" runs the kernels on the CPU, so it shows everything but what only a GPU does.
"""

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.conftest import CACHE, need_gpu
from tests.engine.test_adapter import PROBES, ROWS, config
from tests.helpers import stand_in_gpu
from tests.helpers.tiny_gguf import CACHE_ROUNDING, random_delta, write_llama
from zo_gguf import libzo
from zo_gguf.config import TuneConfig
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import NORMAL, RADEMACHER, Probe, pointer
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.methods import start

METHODS: dict[str, dict[str, Any]] = {
    "sensitive": {},
    "norm": {},
    "lora": {"rank": 3},
    "subspace": {"rank": 3, "refresh": 2, "iters": 5},
    "sensitive+norm": {"unit": ["sparse=1", "gain=0.5"]},
}
IN_PLACE = {"block-scale": "Q4_0", "dense": "F16", "magnitude": "F16"}
Losses = Callable[..., np.ndarray]


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.cuda)])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Losses:
    """Losses with the kernels of a GPU; counts as failed where those were not used."""

    def counted(*given: Any, **options: Any) -> np.ndarray:
        before = native_library().functions.zo_gpu_launches()
        found = losses(*given, **options)
        assert native_library().functions.zo_gpu_launches() > before
        return found

    if request.param == "cuda":
        need_gpu()
        return lambda *given, **options: counted(*given, **options, n_gpu_layers=-1)
    library = stand_in_gpu.build(CACHE)

    def on_stand_in(*given: Any, **options: Any) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(libzo.library, "library_path", lambda: library)
            libzo.load.cache_clear()
            found = counted(*given, **options)
        libzo.load.cache_clear()
        return found

    return on_stand_in


def losses(
    delta: Delta,
    model: str | Path,
    probes: Sequence[Any] = PROBES,
    theta: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """Losses of ROWS at the probes, (n_probes, n_rows)."""
    with Engine(model, delta=delta, n_threads=1, path="hook", **options) as engine:
        if theta is not None:
            engine.losses(ROWS[:1], [Probe(5, 0.1)])  # at another theta: nothing of it may stay
            engine.parameters.write(theta, 4)  # of 5 steps: in the last subspace
        return engine.losses(ROWS, probes)


def prepare(folder: Path, method: str, quant: str) -> tuple[TuneConfig, Delta, np.ndarray]:
    """A random Llama, what a method trains in it, and a theta away from its start."""
    options = METHODS.get(method, {}) | ({"train": "ffn"} if method == "dense" else {})
    given = config(folder, method, quant, **options)
    delta = start(given, GgufFile(given.model))
    z = np.random.default_rng(0).standard_normal(delta.nnz).astype(np.float32)
    return given, delta, delta.theta + np.float32(0.05) * z


def beside(request: pytest.FixtureRequest, *given: Any, **options: Any) -> np.ndarray:
    """The same forward passes with the CPU's overlays: on a GPU, through copies in host memory."""
    staged = {"n_gpu_layers": -1, "force_staged": True} if on_cuda(request) else {}
    return losses(*given, **options, **staged)


def on_cuda(request: pytest.FixtureRequest) -> bool:
    return "stand-in" not in request.node.name


def agree(gpu: np.ndarray, cpu: np.ndarray, exact: bool, least: float = 0.999) -> None:
    """Equal up to the order of sums, which rounding to 8 bits or TF32 may blow up."""
    difference = np.abs(gpu - cpu)
    if exact:
        assert difference.max() < CACHE_ROUNDING
    effects = [found - found[0] for found in (gpu, cpu)]
    assert np.abs(effects[1]).max() > 0.05  # so that the next line means something
    assert np.corrcoef(effects[0].ravel(), effects[1].ravel())[0, 1] > least
    assert difference.max() < 0.1


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_cpu(
    method: str, quant: str, on_gpu: Losses, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given, delta, theta = prepare(tmp_path, method, quant)
    for width, distribution in ((1, NORMAL), (3, RADEMACHER)):
        options: dict[str, Any] = {
            "theta": theta,
            "distribution": distribution,
            "probes_per_decode": width,
        }
        gpu = on_gpu(delta, given.model, **options)
        exact = quant == "F32" and not on_cuda(request)
        agree(gpu, beside(request, delta, given.model, **options), exact)
        if on_cuda(request):  # where llama.cpp's own arithmetic is another than the CPU's
            agree(gpu, losses(delta, given.model, **options), exact=False, least=0.97)
        again = on_gpu(delta, given.model, **options)
        assert gpu.tobytes() == again.tobytes()


@pytest.mark.parametrize("method", IN_PLACE)
def test_values_in_place_are_the_bits_of_the_cpu(
    method: str, on_gpu: Losses, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given, delta, theta = prepare(tmp_path, method, IN_PLACE[method])
    probes = [Probe(0, 0.0), Probe(7, 0.02), Probe(7, -0.02), Probe(0, 0.0)]
    gpu = on_gpu(delta, given.model, probes, theta)
    cpu = beside(request, delta, given.model, probes, theta)
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=1e-6)  # the same pass with the same weights
    assert gpu[0].tobytes() == gpu[3].tobytes()
    assert np.abs(gpu[1] - gpu[2]).max() > 1e-3


@pytest.mark.parametrize("shared", [2048, 8192, 65536])
@pytest.mark.parametrize("rank", [None, 4])
def test_entries_in_chunks_and_long_rows(
    rank: int | None,
    shared: int,
    on_gpu: Losses,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("ZO_STAND_IN_SHARED", str(shared))  # bytes: fewer columns at a time
    path = write_llama(tmp_path / "m.gguf", Type.F32)
    delta = random_delta(GgufFile(path), rank=rank, share=0.2 if rank is None else 1.0, scale=0.05)
    cpu = beside(request, delta, path)
    agree(on_gpu(delta, path), cpu, exact=False)
    bound = 5e-3 if on_cuda(request) else 1e-3  # a GPU multiplies F32 as TF32
    assert np.median(np.abs(on_gpu(delta, path) - cpu)) < bound


def test_branches_in_turns(on_gpu: Losses, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """More values than are kept at a time: 8 M on a GPU, fewer on its stand-in."""
    path = write_llama(tmp_path / "m.gguf", Type.F32)
    base = random_delta(GgufFile(path), rank=None, share=1.0, scale=0.02, among="blk.1.ffn_up")
    n_probes = 66 if on_cuda(request) else 4
    probes = [Probe(seed, 0.01) for seed in range(n_probes)]
    gpu = on_gpu(base, path, probes, probes_per_decode=n_probes)
    agree(gpu, beside(request, base, path, probes), exact=False)


@pytest.mark.cuda
def test_large_products_of_layers_on_the_cpu(tmp_path: Path) -> None:
    """llama.cpp lends their weights to the GPU, under other names."""
    need_gpu()
    for method in METHODS:
        given, delta, theta = prepare(tmp_path, method, "F32")
        launches = native_library().functions.zo_gpu_launches
        with Engine(given.model, delta=delta, n_threads=1, path="hook") as engine:
            engine.parameters.write(theta, 4)
            rows, before = list(ROWS) * 8, launches()  # 64 tokens; from 32 on they move
            moved, after = engine.losses(rows, PROBES), launches()
            here = np.hstack([engine.losses([row], PROBES) for row in rows])
            assert launches() == after > before, method
        agree(moved, here, exact=False, least=0.97)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_rounding_to_half_is_ggmls(name: str, tmp_path: Path) -> None:
    source = tmp_path / "half.cpp"
    source.write_text(
        '#include "core/half.h"\n'
        'extern "C" void to(const float * x, uint16_t * y, long n) {\n'
        f"    for (long i = 0; i < n; ++i) y[i] = zo::to_{name}(x[i]);\n}}\n"
    )
    library = tmp_path / "half.so"
    command = ["c++", "-O2", "-shared", "-fPIC", "-std=c++17", f"-I{stand_in_gpu.NATIVE}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4_000_000, dtype=np.uint32)
    halves = np.arange(2**16, dtype=np.uint32) << 16  # every exponent, and ties of bf16
    near = (np.arange(2**16, dtype=np.uint32)[:, None] * 2**16 + [0x7FFF, 0x8000, 0x8001]).ravel()
    ties = np.arange(2**16).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    between = (ties[:, None] + np.array([0, 0xFFF, 0x1000, 0x1001], np.uint32)).ravel()
    x = np.concatenate([bits, halves, near.astype(np.uint32), between]).view(np.float32)
    x = x[~np.isnan(x)]
    found, expected = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    function = ctypes.CDLL(str(library)).to
    function(*(ctypes.c_void_p(a.ctypes.data) for a in (x, found)), ctypes.c_long(x.size))
    if name == "f16":
        with np.errstate(over="ignore"):
            expected = x.astype(np.float16).view(np.uint16)
    else:
        ggml = ctypes.CDLL("libggml-base.so.0").ggml_fp32_to_bf16_row_ref
        ggml(*(ctypes.c_void_p(a.ctypes.data) for a in (x, expected)), ctypes.c_int64(x.size))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.cuda
def test_sanitize_every_kernel(tmp_path: Path) -> None:
    """Small, for compute-sanitizer."""
    need_gpu()
    for method in (*METHODS, *IN_PLACE):
        given, delta, theta = prepare(tmp_path, method, IN_PLACE.get(method, "F32"))
        probes = [Probe(1, 0.01), Probe(1, -0.01)]
        found = losses(delta, given.model, probes, theta, n_gpu_layers=-1)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("vocabulary_fits", [True, False])
def test_logits_stay_where_they_are(
    vocabulary_fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers offloaded; here llama.cpp is only told so, and its logits are looked for."""
    given, delta, _ = prepare(tmp_path, "sensitive", "F32")
    plain = losses(delta, given.model)
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    if not vocabulary_fits:
        monkeypatch.setattr("zo_gguf.engine.context._MOST_BYTES", 1000)
    with Engine(given.model, delta=delta, n_threads=1, path="hook", n_gpu_layers=-1) as engine:
        found = engine.losses(ROWS, PROBES)
        assert engine._forward is not None
        logits = llama_cpp.llama_get_logits(engine._forward._context._context)
        assert (np.ctypeslib.as_array(logits, (100,)) == 0).all() == vocabulary_fits
        longer = engine.losses(list(ROWS) * 3, PROBES)  # a larger context, with more sequences
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_allclose(longer, np.tile(plain, 3), atol=2e-3)


def test_hip_has_a_name_for_every_call() -> None:
    runtime = (stand_in_gpu.NATIVE / "gpu" / "gpu_runtime.h").read_text()
    known = set(re.findall(r"#define (cuda\w+) hip\w+", runtime))
    code = runtime.split("#else", 1)[1]
    for source in stand_in_gpu.NATIVE.rglob("*.cu"):
        code += source.read_text()
    used = set(re.findall(r"\b(cuda[A-Z]\w+)", code))
    assert used == known


def test_a_library_without_a_gpu_says_so() -> None:
    functions = native_library().functions
    if functions.zo_gpu_count() > 0:
        pytest.skip("there is a GPU")
    zero, logit = np.zeros(1, np.int32), np.zeros(1, np.float32)
    index = pointer(zero, ctypes.c_int32)
    arguments = [pointer(logit, ctypes.c_float), 1, 1, 1, 1, index, index, 1, 0]
    with pytest.raises(ZoError, match="no GPU number 0"):
        native_library().call("zo_losses", *arguments, pointer(np.zeros(1), ctypes.c_double))
