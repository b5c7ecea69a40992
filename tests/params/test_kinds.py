"""Deltas with edits: round trip, products against float64. Damaged files: test_edit_refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import Edit, Edits, Gain, Live, LowRank, Products

HASH = "0123456789abcdef" * 4
HEADER = DeltaHeader("model-Q4_0.gguf", HASH, "some+method", {"step": 3})
NONE = np.zeros((0, 0, 0), np.float32)
N_ROWS, N_COLS, RANK = 4, 5, 2


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(np.float32)


def subspace(n_windows: int = 3, refresh: int = 10) -> LowRank:
    left, right = floats(n_windows, RANK, N_ROWS), floats(n_windows, RANK, N_COLS)
    return LowRank("subspace", N_ROWS, N_COLS, RANK, 1.5, refresh, left, right)


def lora() -> LowRank:
    return LowRank("lora", N_ROWS, N_COLS, RANK, 2.0, 0, NONE, NONE)


EDITS: Edits = {  # not in alphabetical order: the order of theta must survive
    "scales": Live("scale", 6, relative=True),
    "absolute": Live("scale", 3),
    "float": Live("weight", 7, limit=0.25),
    "norm": Gain(4),
}
PRODUCTS: Products = {"sub": subspace(), "scales": lora(), "lora": lora()}  # two on "scales"
SIZES = [6, 3, 7, 4, 12, 18, 18]
SPARSE = {"w": np.array([0, 7, 8]), "lora": np.array([0, 9, 19])}
SHAPES = {"w": (3, 3), "lora": (N_ROWS, N_COLS)}


def make_delta(names: Sequence[str] = (*EDITS, *PRODUCTS), *, sparse: bool = True) -> Delta:
    tensors, shapes = (SPARSE, SHAPES) if sparse else ({}, {})
    edits = {name: edit for name, edit in EDITS.items() if name in names}
    products = {name: product for name, product in PRODUCTS.items() if name in names}
    n = sum(edit.size for edit in [*edits.values(), *products.values()]) + 6 * sparse
    return Delta(tensors, shapes, floats(n), HEADER, edits, products)


def described(edit: Edit) -> list[Any]:
    return [value if np.isscalar(value) else value.tolist() for value in vars(edit).values()]


# ---- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "names", [[*EDITS, *PRODUCTS], ["scales"], ["sub"], ["lora"], ["float"], ["norm"]]
)
def test_round_trip_with_equal_bytes(tmp_path: Path, names: list[str], sparse: bool) -> None:
    delta = make_delta(names, sparse=sparse)
    delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d")
    assert again.theta.tobytes() == delta.theta.tobytes()
    for mine, theirs in zip(again.parts(), delta.parts(), strict=True):
        assert (mine[0], type(mine[1]), mine[2]) == (theirs[0], type(theirs[1]), theirs[2])
        assert described(mine[1]) == described(theirs[1])
    assert again.header == HEADER
    assert again.shapes == delta.shapes
    assert list(again.tensors) == list(delta.tensors)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()


def test_a_run_goes_on_from_the_loaded_delta(tmp_path: Path) -> None:
    make_delta().with_theta(2 * make_delta().theta, {"step": 9}).save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    np.testing.assert_array_equal(loaded.theta, 2 * make_delta().theta)
    assert loaded.header.provenance == {"step": 9}
    assert (list(loaded.edits), list(loaded.low_rank)) == (list(EDITS), list(PRODUCTS))


def test_parts_of_theta() -> None:
    delta = make_delta()
    assert [edit.size for _, edit, _ in delta.parts()] == SIZES
    assert (delta.nnz, delta.n_sparse) == (6 + sum(SIZES), 6)
    covered = [*delta.slices().values(), *delta.edit_slices().values()]
    covered += delta.low_rank_slices().values()
    assert covered[2:] == [part for _, _, part in delta.parts()]
    assert [i for part in covered for i in range(part.start, part.stop)] == list(range(delta.nnz))
    assert list(delta.live) == ["scales", "absolute", "float"]
    assert list(delta.gains) == ["norm"]
    shape = (N_ROWS, N_COLS)
    assert delta.changed == {"w": (3, 3), "lora": shape, "sub": shape, "scales": shape}


@pytest.mark.parametrize("sparse", [True, False])
def test_products_are_what_is_added_to_matrices(tmp_path: Path, sparse: bool) -> None:
    delta = make_delta(sparse=sparse)
    rest = delta.products()
    assert (rest.edits, rest.low_rank) == ({}, PRODUCTS)
    assert rest.n_sparse == delta.n_sparse
    for name, part in rest.low_rank_slices().items():
        theirs = delta.theta[delta.low_rank_slices()[name]]
        np.testing.assert_array_equal(rest.theta[part], theirs)
    for name in rest.changed:
        for mine, theirs in zip(rest.entries(name), delta.entries(name), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    rest.save(tmp_path / "d")
    assert Delta.load(tmp_path / "d").theta.tobytes() == rest.theta.tobytes()


# ---- products ------------------------------------------------------------------------------------


def expected_product(
    edit: LowRank, masters: np.ndarray, windows: range | None = None
) -> np.ndarray:
    """What the docstring of LowRank says, in float64."""
    masters = masters.astype(np.float64)
    if edit.kind == "lora":
        a = masters[: RANK * N_COLS].reshape(RANK, N_COLS)
        b = masters[RANK * N_COLS :].reshape(RANK, N_ROWS).T
        return edit.scale * b @ a
    total = np.zeros((N_ROWS, N_COLS))
    for k in windows or range(len(edit.left)):
        z = masters[k * RANK**2 : (k + 1) * RANK**2].reshape(RANK, RANK)
        total += edit.left[k].astype(np.float64).T @ z @ edit.right[k].astype(np.float64)
    return edit.scale * total


@pytest.mark.parametrize("edit", [lora(), subspace(1, 0), subspace(1), subspace(3), subspace(3, 0)])
def test_factors_against_float64(edit: LowRank) -> None:
    masters = floats(edit.size)
    left, right = edit.factors(masters)
    rank = RANK if edit.kind == "lora" else RANK * len(edit.left)
    assert (left.shape, right.shape) == ((rank, N_ROWS), (rank, N_COLS))
    assert (left.dtype, right.dtype) == (np.float32, np.float32)
    product = left.astype(np.float64).T @ right
    np.testing.assert_allclose(product, expected_product(edit, masters), rtol=0, atol=1e-5)


def test_a_step_leaves_out_the_windows_after_it() -> None:
    edit = subspace(3, 10)
    masters = floats(edit.size)
    for step, n in ((0, 1), (9, 1), (10, 2), (19, 2), (20, 3), (29, 3), (1000, 3)):
        left, right = edit.factors(masters, step)
        assert len(left) == len(right) == n * RANK
        expected = expected_product(edit, masters, range(n))
        np.testing.assert_allclose(left.T @ right, expected, rtol=0, atol=1e-5)
        assert edit.window(step) == n - 1
        assert edit.trained(step) == slice((n - 1) * RANK**2, n * RANK**2)
    # Later windows are zero while their turn has not come, so that nothing is lost.
    masters[RANK**2 :] = 0
    whole, first = edit.factors(masters), edit.factors(masters, 5)
    np.testing.assert_array_equal(whole[0].T @ whole[1], first[0].T @ first[1])


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_what_never_refreshes_is_trained_whole(step: int) -> None:
    assert subspace(1, 0).window(step) == 0
    assert subspace(1, 0).trained(step) == slice(0, RANK**2)
    assert lora().trained(step) == slice(0, lora().size)
    masters = floats(lora().size)
    for mine, whole in zip(lora().factors(masters, step), lora().factors(masters), strict=True):
        np.testing.assert_array_equal(mine, whole)


def test_entries_of_products_and_of_sparse_weights() -> None:
    delta = make_delta()
    indices, values = delta.entries("w")
    np.testing.assert_array_equal(indices, SPARSE["w"])
    np.testing.assert_array_equal(values, delta.theta[:3])
    slices = delta.low_rank_slices()
    for name in PRODUCTS:
        edit = delta.low_rank[name]
        expected = expected_product(edit, delta.theta[slices[name]]).ravel()
        if name == "lora":  # entries of its own beside the product
            expected[SPARSE["lora"]] += delta.theta[3:6]
        indices, values = delta.entries(name)
        np.testing.assert_array_equal(indices, np.arange(N_ROWS * N_COLS))
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------


def test_theta_must_fit_and_be_finite() -> None:
    delta = make_delta()
    with pytest.raises(ZoError, match=r"shape \(73,\).*74 positions"):
        replace(delta, theta=delta.theta[:-1])
    bad = delta.theta.copy()
    bad[-1] = np.nan
    with pytest.raises(ZoError, match="NaN or infinite"):
        replace(delta, theta=bad)


def test_the_wrong_base_is_refused() -> None:
    tensors = dict.fromkeys(PRODUCTS, (N_ROWS, N_COLS)) | {"w": (3, 3)}

    def base(tensors: dict[str, Any]) -> Any:
        def info(name: str) -> None:
            raise ZoError(f"no tensor {name!r}")

        known = {name: SimpleNamespace(shape=shape) for name, shape in tensors.items()}
        return SimpleNamespace(path=Path("x"), sha256=lambda: HASH, tensors=known, info=info)

    make_delta().products().check_base(base(tensors))
    with pytest.raises(ZoError, match=r"'sub' of shape \(4, 5\)"):
        make_delta().check_base(base(tensors | {"sub": (5, 4)}))
    for name in ("absolute", "norm"):
        with pytest.raises(ZoError, match=f"no tensor '{name}'"):
            make_delta([name]).check_base(base(tensors))
