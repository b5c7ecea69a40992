"""libzo's kernels against float64 numpy and an independent noise generator; zo.h against ctypes."""

import ctypes
import re
from ctypes import c_double, c_float, c_int32
from pathlib import Path

import numpy as np
import pytest

from zo_gguf import libzo as native
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import NORMAL, ON_CPU, RADEMACHER, Branch, Store, pointer

HEADER = Path(__file__).resolve().parents[2] / "native" / "zo.h"
HANDLES = set(re.findall(r"typedef struct (zo_\w+)\s+\1;", HEADER.read_text()))
C_NAMES = {
    "int32_t": "c_int",
    "int64_t": "c_long",
    "uint8_t": "c_ubyte",
    "uint32_t": "c_uint",
    "uint64_t": "c_ulong",
    "zo_status": "c_int",
    "float": "c_float",
    "double": "c_double",
    "bool": "c_bool",
    "zo_layout": "BlockLayout",
    "zo_branch": "Branch",
    "zo_field": "Field",
    "zo_distribution": "c_int",
}


def noise(seed: int, tensor: int, first: int, n: int) -> np.ndarray:
    z = np.empty(n, np.float32)
    native_library().call("zo_noise", 0, seed, tensor, first, n, pointer(z, c_float))
    return z


def philox(seed: int, tensor: int, index: np.ndarray) -> list[np.ndarray]:
    """Philox 4x32-10 from its paper, in numpy's uint64."""
    low = np.uint64(0xFFFFFFFF)
    c = [index & low, index >> np.uint64(32), np.full_like(index, tensor), np.zeros_like(index)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ key[0],
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ key[1],
            p0 & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c


def box_muller(w0: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In float64 with numpy's own log, cos and sin, from the uniform number as f32 holds it."""
    u = (w0.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    angle = 2 * np.pi * w1.astype(np.float64) / 2**32
    radius = np.sqrt(-2 * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, 0x123456789ABCDEF0])
def test_noise_is_philox_and_box_muller(seed: int) -> None:
    words = philox(seed, 5, np.arange(20_000, dtype=np.uint64))
    expected = np.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])], axis=1)
    np.testing.assert_allclose(noise(seed, 5, 0, 80_000), expected.ravel(), rtol=0, atol=2e-6)


def test_philox_known_answer() -> None:
    # The published test vector for counter 0, key 0.
    words = [int(w[0]) for w in philox(0, 0, np.zeros(1, np.uint64))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_bits_do_not_depend_on_the_split() -> None:
    whole = noise(9, 1, 0, 1000)
    parts = [(0, 1), (1, 3), (3, 4), (4, 103), (103, 107), (107, 1000)]
    joined = np.concatenate([noise(9, 1, a, b - a) for a, b in parts])
    assert np.array_equal(whole.view(np.uint32), joined.view(np.uint32))


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    n = 1_000_000
    z = noise(3, 0, 0, n).astype(np.float64)
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    for other in (noise(4, 0, 0, n), noise(3, 1, 0, n), np.roll(z, 1), np.roll(z, 2)):
        assert abs((z * other).mean()) < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    ("n_rows", "n_cols", "density"), [(40, 14_000, 0.3), (600, 4100, 0.01), (5000, 4096, 0.002)]
)
def test_overlay_on_wide_matrices(n_rows: int, n_cols: int, density: float, device: int) -> None:
    """What a 7B model has: long rows, and more columns than a GPU's block can hold at a time."""
    rng = np.random.default_rng(0)
    dense = rng.random((n_rows, n_cols), np.float32) < density
    indices = np.flatnonzero(dense)
    theta = rng.standard_normal(indices.size).astype(np.float32)
    x = rng.standard_normal((19, n_cols)).astype(np.float32)
    y = np.zeros((19, n_rows), np.float32)
    store = Store(native_library(), 2)
    store.add("w", (n_rows, n_cols), indices, theta)
    native_library().call(
        "zo_store_apply", store.handle, b"w", Branch(0, 0.0), len(x), pointer(x, c_float),
        n_cols, pointer(y, c_float), n_rows, device,
    )  # fmt: skip
    store.free()
    expected = np.zeros(y.shape)
    products = theta.astype(np.float64) * x[:, indices % n_cols]
    np.add.at(expected, (slice(None), indices // n_cols), products)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.sqrt(n_cols))


@pytest.mark.parametrize("kind", [NORMAL, RADEMACHER])
def test_overlay_has_the_bits_of_the_noise(kind: int, device: int) -> None:
    """Through the identity, an entry at a time, 0 + 1 * z: not even the last bit may differ."""
    n_rows, n_cols = 70, 50
    indices = np.arange(3, n_rows * n_cols, 2)
    store = Store(native_library(), 1, kind)
    store.add("w", (n_rows, n_cols), indices, np.zeros(indices.size, np.float32))
    x, y = np.eye(n_cols, dtype=np.float32), np.zeros((n_cols, n_rows), np.float32)
    native_library().call(
        "zo_store_apply", store.handle, b"w", Branch(2**40 + 7, 1.0), len(x),
        pointer(x, c_float), n_cols, pointer(y, c_float), n_rows, device,
    )  # fmt: skip
    z = store.noise(2**40 + 7)
    assert np.array_equal(y.T.ravel()[indices].view(np.uint32), z.view(np.uint32))
    store.free()


@pytest.mark.parametrize("n_tokens", [1, 2, 15, 16, 17, 70])
@pytest.mark.parametrize(
    ("n_rows", "n_cols", "density"),
    [(1, 1, 1.0), (7, 33, 1.0), (64, 300, 0.001), (300, 64, 0.05), (129, 257, 0.4)],
)
def test_overlay_against_float64(
    n_rows: int, n_cols: int, density: float, n_tokens: int, device: int
) -> None:
    rng = np.random.default_rng(0)
    nnz = max(1, int(n_rows * n_cols * density))
    indices = np.sort(rng.choice(n_rows * n_cols, nnz, replace=False)).astype(np.int64)
    theta = rng.standard_normal(nnz).astype(np.float32)
    # Rows wider than the matrix stand for strided tensors; the gap must stay untouched.
    x = rng.standard_normal((n_tokens, n_cols + 3)).astype(np.float32)
    start = rng.standard_normal((n_tokens, n_rows + 5)).astype(np.float32)
    for n_threads in (1, 2, 3) if device == ON_CPU else (1,):
        store = Store(native_library(), n_threads)
        store.add("first", (2, 2), np.array([1, 2]), np.zeros(2, np.float32))
        store.add("w", (n_rows, n_cols), indices, theta)
        z = store.noise(77)[2:].astype(np.float64)
        y = start.copy()
        native_library().call(
            "zo_store_apply", store.handle, b"w", Branch(77, 0.25), n_tokens,
            pointer(x, c_float), x.shape[1], pointer(y, c_float), y.shape[1], device,
        )  # fmt: skip
        store.free()
        dense = np.zeros((n_rows, n_cols))
        dense.flat[indices] = theta.astype(np.float64) + 0.25 * z
        expected = start[:, :n_rows] + x[:, :n_cols].astype(np.float64) @ dense.T
        np.testing.assert_allclose(y[:, :n_rows], expected, rtol=0, atol=1e-5 * np.sqrt(n_cols))
        np.testing.assert_array_equal(y[:, n_rows:], start[:, n_rows:])


def test_overlay_bits_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(1)
    indices = np.sort(rng.choice(100 * 200, 900, replace=False)).astype(np.int64)
    x = rng.standard_normal((75, 200)).astype(np.float32)
    results = []
    for n_threads in (1, 2, 5):
        store = Store(native_library(), n_threads)
        store.add("w", (100, 200), indices, np.ones(900, np.float32))
        y = np.zeros((75, 100), np.float32)
        native_library().call(
            "zo_store_apply", store.handle, b"w", Branch(1, 1.0), 75,
            pointer(x, c_float), 200, pointer(y, c_float), 100, ON_CPU,
        )  # fmt: skip
        results.append((y.tobytes(), store.noise(5).tobytes()))
        store.free()
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("n_vocab", [1, 5, 16, 1000, 1025, 32_003])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_losses_against_float64(n_vocab: int, spread: float, device: int) -> None:
    rng = np.random.default_rng(0)
    logits = (spread * rng.standard_normal((6, n_vocab + 2))).astype(np.float32)
    outputs = np.array([0, 0, 2, 3, 3, 3, 5], np.int32)
    tokens = rng.integers(0, n_vocab, outputs.size).astype(np.int32)
    used = logits[outputs, :n_vocab].astype(np.float64)
    top = used.max(axis=1)
    log_sum = top + np.log(np.exp(used - top[:, None]).sum(axis=1))
    expected = log_sum - used[np.arange(outputs.size), tokens]
    for n_threads in (1, 3) if device == ON_CPU else (1,):
        nll = np.empty(outputs.size)
        native_library().call(
            "zo_losses", pointer(logits, c_float), n_vocab, n_vocab + 2, 6, outputs.size,
            pointer(outputs, c_int32), pointer(tokens, c_int32), n_threads, device,
            pointer(nll, c_double),
        )  # fmt: skip
        np.testing.assert_allclose(nll, expected, rtol=1e-6, atol=1e-6)


def test_losses_pass_nan_on(device: int) -> None:
    logits = np.array([[0.0, np.nan, 1.0]], np.float32)
    zero, nll = np.zeros(1, np.int32), np.empty(1)
    native_library().call(
        "zo_losses", pointer(logits, c_float), 3, 3, 1, 1, pointer(zero, c_int32),
        pointer(zero, c_int32), 1, device, pointer(nll, c_double),
    )  # fmt: skip
    assert np.isnan(nll[0])


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [-1, 2], [3, 12]])
def test_store_refuses_bad_indices(indices: list[int]) -> None:
    store = Store(native_library(), 1)
    with pytest.raises(ZoError, match="not sorted, unique and in range"):
        store.add("w", (3, 4), np.array(indices), np.zeros(2, np.float32))
    store.free()


def test_prototypes_match_the_header() -> None:
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    found = {}
    for result, name, arguments in re.findall(
        r"ZO_API\s+([\w \*]+?)\s*\b(zo_\w+)\(([^)]*)\)", text
    ):
        parameters = [a.strip() for a in arguments.split(",") if a.strip() != "void"]
        found[name] = (c_name(result), [c_name(re.sub(r"\w+$", "", p)) for p in parameters])
    declared = {
        name: (python_name(result), [python_name(a) for a in arguments])
        for name, (result, arguments) in native.PROTOTYPES.items()
    }
    assert declared == found


def c_name(declaration: str) -> str:
    """What ctypes calls a C type, with pointers to handles and structs as it has them here."""
    words = declaration.replace("const", "").replace("struct", "").split()
    stars = "".join(words).count("*")
    base = words[0].replace("*", "")
    if base == "void":
        return "c_void_p" if stars else "None"
    if base == "char":
        return "c_char_p"
    if base in HANDLES:
        return "c_void_p" if stars == 1 else "LP_c_void_p"
    if base.startswith(("ggml_", "llama_")):
        return "c_void_p"
    if base == "zo_batch":
        return "LP_Batch"
    name = C_NAMES.get(base, f"c_{base}")
    return f"LP_{name}" if stars else name


def python_name(kind: object) -> str:
    return "None" if kind is None else kind.__name__  # type: ignore[attr-defined]


def test_wrong_engine_version_is_refused() -> None:
    native_library()
    with pytest.raises(ZoError, match=r"pip install llama-cpp-python=="):
        native.load("0.0.1")


def test_tensor_layout_probe_passes() -> None:
    assert native_library().functions.zo_check_engine() == 0
    assert ctypes.sizeof(Branch) == 16
