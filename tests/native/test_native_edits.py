"""libzo beyond normal noise on sparse entries: Rademacher noise and low rank.

Values edited in place have a file of their own.
"""

import itertools
from ctypes import c_float

import numpy as np
import pytest

from tests.native.test_native import philox
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import AT_THETA, NORMAL, ON_CPU, RADEMACHER, LowRank, Probe, pointer


def noise(kind: int, seed: int, tensor: int, first: int, n: int) -> np.ndarray:
    z = np.full(n, np.nan, np.float32)
    native_library().call("zo_noise", kind, seed, tensor, first, n, pointer(z, c_float))
    return z


# ---- Rademacher noise ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, 0x123456789ABCDEF0])
def test_rademacher_is_the_bits_of_philox(seed: int) -> None:
    i = np.arange(10_000, dtype=np.uint64)
    bits = philox(seed, 7, i // np.uint64(32))[0] >> (i % np.uint64(32)) & np.uint64(1)
    expected = np.where(bits == 1, 1.0, -1.0).astype(np.float32)
    np.testing.assert_array_equal(noise(RADEMACHER, seed, 7, 0, i.size), expected)


def test_rademacher_bits_do_not_depend_on_the_split() -> None:
    whole = noise(RADEMACHER, 9, 1, 0, 1000)
    cuts = [0, 1, 1, 31, 32, 33, 95, 96, 160, 999, 1000]
    for a, b in itertools.pairwise(cuts):
        np.testing.assert_array_equal(noise(RADEMACHER, 9, 1, a, b - a), whole[a:b])
    far = 2**40 + 7
    np.testing.assert_array_equal(
        noise(RADEMACHER, 9, 1, far, 100)[50:], noise(RADEMACHER, 9, 1, far + 50, 50)
    )


def test_rademacher_is_balanced_and_uncorrelated() -> None:
    n = 1_000_000
    z = noise(RADEMACHER, 3, 0, 0, n)
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean(dtype=np.float64)) < 5 / np.sqrt(n)
    others = [noise(RADEMACHER, 4, 0, 0, n), noise(RADEMACHER, 3, 1, 0, n)]
    for other in others + [np.roll(z, lag) for lag in (1, 2, 31, 32, 64)]:
        assert abs((z * other).mean(dtype=np.float64)) < 5 / np.sqrt(n)


# ---- low rank ------------------------------------------------------------------------------------


def product(
    part: LowRank,
    branch: int,
    number: int,
    x: np.ndarray,
    y: np.ndarray,
    n_threads: int = 1,
    device: int = ON_CPU,
) -> np.ndarray:
    """zo_lowrank_apply on a copy of y."""
    y = y.copy()
    native_library().call(
        "zo_lowrank_apply", part.handle, branch, number, len(x), pointer(x, c_float), x.shape[1],
        pointer(y, c_float), y.shape[1], n_threads, device,
    )  # fmt: skip
    return y


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_tokens", [1, 2, 37])
@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 300), (300, 64), (129, 31)])
def test_low_rank_against_float64(
    shape: tuple[int, int], rank: int, n_tokens: int, device: int
) -> None:
    n_rows, n_cols = shape
    left, right = floats(rank, n_rows), floats(rank, n_cols, seed=1)
    part = LowRank(native_library())
    part.add("other", (n_cols, n_rows))
    part.add("w", shape)
    part.set(0, 0, right, left)
    part.set(0, 1, left, right)
    # Rows wider than the matrix stand for strided tensors; the gap must stay untouched.
    x, y = floats(n_tokens, n_cols + 3, seed=2), floats(n_tokens, n_rows + 5, seed=3)
    inputs, wide = x[:, :n_cols].astype(np.float64), left.astype(np.float64)
    expected = y[:, :n_rows] + inputs @ right.astype(np.float64).T @ wide
    size = (np.abs(inputs) @ np.abs(right).T @ np.abs(wide)).max()
    tried = (1, 2, 3) if device == ON_CPU else (1, 1)  # twice: the same bits again
    results = [product(part, 0, 1, x, y, n_threads, device) for n_threads in tried]
    part.free()
    np.testing.assert_allclose(results[0][:, :n_rows], expected, rtol=0, atol=1e-6 * size + 1e-6)
    np.testing.assert_array_equal(results[0][:, n_rows:], y[:, n_rows:])
    assert len({result.tobytes() for result in results}) == 1


@pytest.mark.parametrize("distribution", [NORMAL, RADEMACHER])
def test_trained_factors_are_moved_by_their_noise(distribution: int, device: int) -> None:
    (n_rows, n_cols), rank, tensor, factor = (37, 65), 3, 9, 2.0
    trained = LowRank(native_library(), 2, distribution)
    fixed = LowRank(native_library())
    x, y = floats(5, n_cols), floats(5, n_rows)
    for part in (trained, fixed):
        part.add("w", (n_rows, n_cols))
    for number, masters in enumerate((floats(rank * 102), floats(rank * 102, seed=4))):
        trained.train(0, rank, factor, tensor, masters)
        probes = [Probe(5, 0.3), AT_THETA, Probe(6, -0.3), Probe(6, 0.3)]
        for branch, probe in [*enumerate(probes), (1, Probe(7, 0.3))]:  # and one that moves on
            z = noise(distribution, probe.seed, tensor, 0, masters.size)
            moved = masters + np.float32(probe.scale) * z
            right, left = np.split(moved, [rank * n_cols])
            fixed.set(branch, 0, factor * left.reshape(rank, -1), right.reshape(rank, -1))
            trained.probe(branch, probe)
            found, expected = (product(p, branch, 0, x, y, 1, device) for p in (trained, fixed))
            assert found.tobytes() == expected.tobytes(), (number, branch)
    assert np.abs(product(trained, 0, 0, x, y) - y).max() > 0.1
    with pytest.raises(ZoError, match="out of range"):
        product(trained, 5, 0, x, y, 1, device)
    trained.free()
    fixed.free()


def test_low_rank_factors_belong_to_a_branch_and_can_be_set_again(device: int) -> None:
    part = LowRank(native_library())
    part.add("w", (4, 6))
    x, y = floats(3, 6), np.zeros((3, 4), np.float32)
    factors = {b: (floats(r, 4, seed=b), floats(r, 6, seed=b)) for b, r in ((0, 2), (4, 3), (1, 1))}
    for branch, (left, right) in factors.items():
        part.set(branch, 0, left, right)
    factors[4] = (floats(1, 4, seed=9), floats(1, 6, seed=9))  # of another rank
    part.set(4, 0, *factors[4])
    for branch, (left, right) in factors.items():
        result = product(part, branch, 0, x, y, device=device)
        np.testing.assert_allclose(result, x @ right.T @ left, atol=1e-5)
    part.free()


def test_low_rank_refuses_what_is_out_of_range() -> None:
    part = LowRank(native_library())
    part.add("w", (4, 6))
    x, y, one = floats(3, 6), np.zeros((3, 4), np.float32), (floats(1, 4), floats(1, 6))
    for branch, number in ((-1, 0), (4097, 0), (0, -1), (0, 1)):
        with pytest.raises(ZoError, match="out of range"):
            part.set(branch, number, *one)
    sized = [value for a in one for value in (a.size, pointer(a, c_float))]
    for rank in (-1, 0, (1 << 16) + 1):
        with pytest.raises(ZoError, match="out of range"):
            native_library().call("zo_lowrank_set", part.handle, 0, 0, rank, *sized)
    with pytest.raises(ZoError, match="out of range"):
        product(part, 0, 0, x, y)  # nothing was set yet
    part.set(0, 0, *one)
    for branch, number in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        with pytest.raises(ZoError, match="out of range"):
            product(part, branch, number, x, y)
    for wrong in ((x[:, :5].copy(), y), (x, y[:, :3].copy())):
        with pytest.raises(ZoError, match="strides are shorter than the rows of w"):
            product(part, 0, 0, *wrong)
    with pytest.raises(ZoError, match="w was added before"):
        part.add("w", (4, 6))
    for shape in ((0, 6), (4, -1), (1 << 31, 6), (4, 1 << 31)):
        with pytest.raises(ZoError, match="name and a shape"):
            part.add("x", shape)
    part.free()
