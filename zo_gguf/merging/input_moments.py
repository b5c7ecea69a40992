"""Second moments H of the inputs of some weights, and what `code_search` computes with them."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

LARGEST_FACTOR = 4096  # columns; beyond, only coordinate descent, unless whole rows are free
_LITTLE_WORK = 1 << 27  # of m^3 multiplications; up to here matrices are factored together


class InputMoments:
    """Second moments of the inputs of rows' free weights, by falling mean square.

    Args:
        columns: Of the m free weights of each row, (n_rows, m), or of all rows, (1, m).
        moments: Of all inputs, (n_cols, n_cols).
        ridge: See `choose_codes`.
    """

    def __init__(self, columns: I64, moments: F32, ridge: float) -> None:
        self.columns = columns
        self.order = np.argsort(-moments[columns, columns], axis=1, kind="stable")
        used = np.take_along_axis(columns, self.order, axis=1)
        self.values = moments[used[:, :, None], used[:, None, :]].astype(np.float64)
        diagonal = np.einsum("rii->ri", self.values)  # a view
        self.level = ridge * np.maximum(diagonal.mean(axis=1), 1e-30)
        diagonal += self.level[:, None]
        self.are_all = columns.shape == (1, len(moments))  # weights of whole rows are free

    @cached_property
    def factor(self) -> F64:
        """Upper triangular R with R R^T = H."""
        return upper_factor(self.values)


def columns_of(column: I64, block: int) -> I64:
    """Columns of the weights in the rows' blocks, (n_rows, m); (1, m) if all have the same."""
    shared = column[:1] if (column == column[:1]).all() else column
    return (shared[..., None] * block + np.arange(block)).reshape(len(shared), -1)


def columns_among(matrices: F64, part: slice) -> F64:
    """The part of every matrix among these columns, (columns, columns, n_rows or 1)."""
    return np.ascontiguousarray(matrices[:, part, part].transpose(1, 2, 0))


def product(matrices: F64, values: F64) -> F64:
    """Every row's column of `values`, (k, n_rows), times its matrix, (n_rows or 1, k, m)."""
    if len(matrices) == 1:
        return np.asarray(matrices[0].T @ values)
    return np.ascontiguousarray(np.matmul(values.T[:, None], matrices)[:, 0].T)


def upper_factor(moments: F64) -> F64:
    """Upper triangular R with R R^T = H, for each of the matrices (k, m, m)."""
    reverse = moments[:, ::-1, ::-1]
    if moments.shape[1] > LARGEST_FACTOR:  # half the memory, and the ridge keeps it well apart
        return np.linalg.cholesky(reverse.astype(np.float32))[:, ::-1, ::-1]
    if moments.size * moments.shape[1] > _LITTLE_WORK:
        return np.asarray(np.linalg.cholesky(reverse)[:, ::-1, ::-1])
    # All matrices at once: LAPACK takes them one by one, and waits for its threads each time.
    rest = reverse.copy()
    lower = np.zeros_like(rest)
    for j in range(rest.shape[1]):
        column = rest[:, j:, j] / np.sqrt(rest[:, j, j])[:, None]
        lower[:, j:, j] = column
        rest[:, j:, j:] -= column[:, :, None] * column[:, None, :]
    return lower[:, ::-1, ::-1]
