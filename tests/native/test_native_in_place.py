"""libzo's values inside weights, without a model: masters -> live values, noise, refusals."""

import ctypes
import math
from ctypes import c_float

import numpy as np
import pytest

from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import FLOATS, NORMAL, RADEMACHER, Branch, Field, InPlace, Probe, Store, pointer

F32, F16, BF16 = 0, 1, 2  # zo_storage
FIRST = 1 << 30  # the noise's tensor number of the first tensor edited in place
LEAST = 2.0**-10  # of a relative scale's base
LEAST_STEP = np.float32(1e-7)  # of an absolute scale
SIZES = (1, 4096, 4097, 10_000)  # around the pieces in which libzo works


def field(
    n_values: int,
    block_bytes: int = 4,
    offsets: tuple[int, ...] = (0,),
    storage: int = F32,
    *,
    relative: bool = False,
    limit: float = math.inf,
    base: np.ndarray | None = None,
) -> Field:
    """A zo_field, by default that of a float32 tensor; `base` must be kept by the caller."""
    result = Field(n_values, block_bytes, len(offsets), (ctypes.c_int32 * 2)(*offsets[:2]))
    result.storage, result.relative, result.limit = storage, relative, limit
    if base is not None:
        assert base.dtype == np.float32
        result.base = base.ctypes.data_as(FLOATS)
    return result


def scales(theta: np.ndarray, base: np.ndarray, *, relative: bool, n_threads: int = 1) -> InPlace:
    """Two tensors with the same f16 steps and minima, as in Q4_K: 144 bytes for two of them."""
    part = InPlace(native_library(), n_threads)
    for name in ("a", "b"):
        own = base.copy()
        described = field(theta.size, 144, (0, 2), F16, relative=relative, base=own)
        part.add(name, described, theta.size // 2 * 144, theta)
        own[:] = np.nan  # libzo has a copy
    return part


def noise(kind: int, seed: int, tensor: int, n: int) -> np.ndarray:
    z = np.empty(n, np.float32)
    native_library().call("zo_noise", kind, seed, tensor, 0, n, pointer(z, c_float))
    return z


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, n]).standard_normal(n).astype(np.float32)


def weights(
    sizes: tuple[int, ...], n_threads: int = 1, kind: int = NORMAL, limit: float = math.inf
) -> tuple[InPlace, np.ndarray]:
    """Float tensors, and all their masters."""
    part, theta = InPlace(native_library(), n_threads, kind), normal(sum(sizes))
    for k, own in enumerate(np.split(theta, np.cumsum(sizes)[:-1])):
        part.add(f"w{k}", field(own.size, limit=limit), 4 * own.size, own)
    return part, theta


@pytest.mark.parametrize("kind", [NORMAL, RADEMACHER])
def test_every_tensor_has_noise_of_its_own(kind: int) -> None:
    part, _ = weights(SIZES, kind=kind)
    expected = np.concatenate([noise(kind, 11, FIRST + k, n) for k, n in enumerate(SIZES)])
    np.testing.assert_array_equal(part.noise(11), expected)
    part.free()


@pytest.mark.parametrize("kind", [NORMAL, RADEMACHER])
def test_bits_do_not_depend_on_threads(kind: int) -> None:
    results = []
    for n_threads in (1, 2, 3):
        part, _ = weights(SIZES, n_threads, kind, limit=0.8)
        results.append((part.noise(2).tobytes(), part.values(Probe(2, 0.3)).tobytes()))
        part.free()
    assert results[0] == results[1] == results[2]


def test_noise_is_not_that_of_sparse_entries() -> None:
    n = 10_000
    part, _ = weights((n,))
    store = Store(native_library(), 1)
    store.add("w0", (1, n), np.arange(n), np.zeros(n, np.float32))
    assert abs(np.corrcoef(part.noise(3), store.noise(3))[0, 1]) < 5 / np.sqrt(n)
    part.free()
    store.free()


def test_plain_values_are_masters_plus_scaled_noise() -> None:
    part, theta = weights(SIZES)
    assert part.size == theta.size
    np.testing.assert_array_equal(part.read(), theta)
    np.testing.assert_array_equal(part.values(), theta)
    for seed, scale in ((1, 0.5), (1, -0.5), (2, 1e-3)):
        expected = theta + np.float64(np.float32(scale)) * part.noise(seed)
        np.testing.assert_allclose(part.values(Probe(seed, scale)), expected, rtol=1e-6, atol=1e-6)
    part.write(theta[::-1])
    np.testing.assert_array_equal(part.read(), theta[::-1])
    np.testing.assert_array_equal(part.values(), theta[::-1])
    part.free()


def test_relative_scales() -> None:
    n = 10_000
    theta, base = 0.7 * normal(n), normal(n, seed=1)
    theta[:6] = [0, -1, -1 + 2.0**-10, -1 + 2.0**-9, -5, 3]
    base[7] = 0
    part = scales(theta, base, relative=True)
    shares = [1, LEAST, LEAST, 2 * LEAST, LEAST, 4]
    np.testing.assert_array_equal(part.values()[:6], base[:6] * np.float32(shares))
    for scale in (0.0, 0.4, -0.4):
        masters = np.tile(theta, 2) + np.float64(np.float32(scale)) * part.noise(5)
        share = np.maximum(1 + masters, LEAST)
        values = part.values(Probe(5, scale))
        np.testing.assert_allclose(values, np.tile(base, 2) * share, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.sign(values), np.sign(np.tile(base, 2)))
        assert (share == LEAST).sum() > n // 50
    part.free()


def test_an_unchanged_relative_scale_keeps_its_bits() -> None:
    base = normal(5000, seed=3).astype(np.float16).astype(np.float32)
    base[:2] = [0, -0.0]
    part = scales(np.zeros(base.size, np.float32), base, relative=True)
    assert part.values().tobytes() == np.tile(base, 2).tobytes()
    part.free()


def test_absolute_scales() -> None:
    n = 10_000
    base = normal(n, seed=1)
    theta = base.copy()
    base[:8] = [1, 1, 1, -1, -1, -1, 0, -0.0]
    theta[:8] = [0.5, 1e-8, -3, -0.5, -1e-8, 3, 2, -2]
    part = scales(theta, base, relative=False)
    expected = [0.5, LEAST_STEP, LEAST_STEP, -0.5, -LEAST_STEP, -LEAST_STEP, 0, 0]
    np.testing.assert_array_equal(part.values()[:8], np.float32(expected))
    np.testing.assert_array_equal(part.values()[8:n], theta[8:])
    base, theta = np.tile(base, 2), np.tile(theta, 2)
    for scale in (0.4, -0.4):
        moved = theta + np.float64(np.float32(scale)) * part.noise(5)
        kept = np.where(base > 0, np.maximum(moved, LEAST_STEP), np.minimum(moved, -LEAST_STEP))
        kept[base == 0] = 0
        values = part.values(Probe(5, scale))
        np.testing.assert_allclose(values, kept, rtol=1e-6, atol=1e-6)
        at_floor = np.abs(kept) == LEAST_STEP
        assert at_floor.sum() > n // 50
        np.testing.assert_allclose(values[at_floor], kept[at_floor], rtol=1e-6)
    part.free()


def test_limit_leaves_large_masters_alone() -> None:
    limit = float(np.float32(0.7))
    part, theta = weights(SIZES, limit=limit)
    theta[:2] = [limit, -limit]
    theta[2:4] = np.nextafter(np.float32(limit), np.float32(1)) * np.float32([1, -1])
    part.write(theta)
    free, _ = weights(SIZES)
    small = np.abs(theta) <= limit
    assert small[:4].tolist() == [True, True, False, False]
    np.testing.assert_array_equal(part.noise(4), np.where(small, free.noise(4), 0))
    values = part.values(Probe(4, 0.5))
    np.testing.assert_array_equal(values[~small], theta[~small])
    assert (values[small] != theta[small]).all()
    part.write(theta / 100)  # the mask follows the masters
    np.testing.assert_array_equal(part.noise(4), free.noise(4))
    part.free()
    free.free()


BASE = np.ones(100, np.float32)
BAD_FIELDS = {
    "no values": (field(0), 0),
    "fewer values than bytes": (field(9), 40),
    "more values than bytes": (field(11), 40),
    "bytes that are no whole blocks": (field(10), 41),
    "negative bytes": (field(10, -4), -40),
    "no block": (field(10, 0), 40),
    "no value per block": (field(10, 4, ()), 40),
    "three values per block": (field(30, 12, (0, 4, 8)), 120),
    "half a block": (field(9, 8, (0, 4)), 36),
    "half a value pair": (field(9, 8, (0, 4)), 32),
    "an offset before the block": (field(10, 18, (-2,), F16, base=BASE), 180),
    "an f32 across the end of its block": (field(10, 4, (1,)), 40),
    "an f16 across the end of its block": (field(10, 18, (17,), F16, base=BASE), 180),
    "a second value outside": (field(20, 18, (0, 17), F16, base=BASE), 180),
    "f32 in blocks of f16": (field(10, 2), 20),
    "an unknown storage": (field(10, 4, (0,), 3), 40),
    "a negative storage": (field(10, 4, (0,), -1), 40),
    "relative to nothing": (field(10, 18, (0,), F16, relative=True), 180),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_field_that_does_not_fit_is_refused(case: str) -> None:
    part = InPlace(native_library(), 1)
    part.add("good", field(3), 12, np.ones(3, np.float32))
    described, n_bytes = BAD_FIELDS[case]
    with pytest.raises(ZoError, match="the values of bad do not fit into its bytes"):
        part.add("bad", described, n_bytes, np.zeros(described.n_values, np.float32))
    assert part.size == 3
    np.testing.assert_array_equal(part.values(), 1)
    part.free()


@pytest.mark.parametrize(
    ("block_bytes", "offsets", "storage"),
    [(2, (0,), F16), (2, (0,), BF16), (18, (16,), F16), (84, (80, 82), F16), (8, (4, 0), F32)],
)
def test_a_field_that_just_fits_is_accepted(
    block_bytes: int, offsets: tuple[int, ...], storage: int
) -> None:
    part, theta = InPlace(native_library(), 1), normal(6)
    part.add("w", field(6, block_bytes, offsets, storage), 6 // len(offsets) * block_bytes, theta)
    np.testing.assert_array_equal(part.values(), theta)
    part.free()


def test_nothing_is_written_before_a_decode() -> None:
    part, _ = weights((3, 5))
    with pytest.raises(ZoError, match=r"the tensor w0 is not used by the model\."):
        part.apply(Probe(1, 0.5))
    part.free()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ZoError, match="at least one thread"):
        InPlace(native_library(), 0)
    part = InPlace(native_library(), 1)
    for function, arguments in (
        ("zo_inplace_add", (b"w", None, 4, None)),
        ("zo_inplace_read", (0, None)),
        ("zo_inplace_write", (0, None)),
        ("zo_inplace_noise", (1, 0, None)),
        ("zo_inplace_values", (Branch(1, 0.5), 0, None)),
    ):
        with pytest.raises(ZoError, match=f"{function} got a null pointer"):
            native_library().call(function, part.handle, *arguments)
    part.free()
