"""A delta as a LoRA adapter GGUF for stock llama.cpp: exact, or the best of a given rank.

Entries that lie on r rows and columns of a matrix are exactly a rank-r product: each row or column
gives one one-hot vector and one vector of values. Factors are F32, so nothing is rounded. Measuring
the adapter is `merge`'s work.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.write import NewTensor, Value, key_record, write_gguf
from zo_gguf.params.delta import Delta
from zo_gguf.params.select import line_cover

F32 = NDArray[np.float32]

_EXACT_SVD = 1024  # largest smaller side that is decomposed exactly
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6

# Weights that llama.cpp multiplies without looking for an adapter: a LoRA on them loads and does
# nothing. Architectures are matched with "_" written as "-".
_MLA = r"^(output|blk\.\d+\.attn_(q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b|output))\.weight$"
_INEFFECTIVE = (
    (r"deepseek2.*|deepseek32|minicpm3|plm|glm-dsa|glm5-next|hy-v4|dots3note|bailingmoe3", _MLA),
    (r"kimi-k3", r".*"),
    (r"kimi-.*|mistral4", _MLA),
    (r"deepseek4", r"^output\.weight$|attn_output"),
    (r".*rwkv.*", r"time_mix"),
    (r"nemotron-h.*", r"latent"),
    (r"gemma3n", r"altup"),
)


@dataclass(frozen=True)
class Factors:
    """One tensor's delta as b @ a.

    Attributes:
        a: (rank, n_cols).
        b: (n_rows, rank).
        exact_rank: Least rank that would be exact.
        kept: Share of the delta's squared norm that b @ a holds; 1 when exact.
        squared_norm: Of the delta.
    """

    a: F32
    b: F32
    exact_rank: int
    kept: float
    squared_norm: float

    @property
    def rank(self) -> int:
        """Of the product."""
        return len(self.a)


@dataclass(frozen=True)
class LoraSummary:
    """What was written.

    Attributes:
        rank: Largest rank of any tensor.
        exact_rank: Largest rank that any tensor would need to be exact.
        kept: Share of the whole delta's squared norm that the adapter holds; 1 when exact.
        n_tensors: Tensors that the adapter changes.
        n_bytes: Size of the file.
    """

    rank: int
    exact_rank: int
    kept: float
    n_tensors: int
    n_bytes: int


def check_lora(base: GgufFile, delta: Delta, rank: int | None) -> None:
    """Refuse what stock llama.cpp would ignore or crash on, and exact LoRAs of senseless rank.

    Raises:
        ZoError: The adapter would not do what the delta does; names the tensor.
    """
    _check_tensors(base, delta)
    if rank is None:
        _check_rank(delta)


def _check_tensors(base: GgufFile, delta: Delta) -> None:
    architecture = base.architecture.replace("_", "-")
    if delta.live or delta.gains:
        raise ZoError(
            f"Method {delta.header.method!r} changes weights that no LoRA can carry; "
            "merge without --lora."
        )
    for name in delta.changed:
        reason = None
        if name.startswith(("token_embd", "per_layer_token_embd", "position_embd")):
            reason = "llama.cpp cannot apply a LoRA to embeddings that also serve as the head"
        elif not name.endswith(".weight"):
            reason = "llama.cpp takes LoRAs for `.weight` tensors only"
        elif name.removesuffix("weight") + "scale" in base.tensors:
            reason = "its scale tensor would multiply the LoRA too"
        elif any(
            re.fullmatch(pattern, architecture) and re.search(tensors, name)
            for pattern, tensors in _INEFFECTIVE
        ):
            reason = f"llama.cpp ignores LoRAs on it in the architecture {base.architecture!r}"
        if reason:
            raise ZoError(f"No LoRA can carry the changes of {name!r}: {reason}; merge instead.")


def exact_factors(delta: Delta, name: str) -> Factors:
    """The delta of one tensor as a product without loss: of least rank, where it is sparse."""
    n_rows, n_cols = delta.changed[name]
    a, b = np.zeros((0, n_cols), np.float32), np.zeros((n_rows, 0), np.float32)
    if name in delta.low_rank:
        left, a = delta.low_rank[name].factors(delta.theta[delta.low_rank_slices()[name]])
        b = left.T
    if name in delta.tensors:
        values = delta.theta[delta.slices()[name]]
        layout = SparseFactors(delta.tensors[name], delta.shapes[name])
        sparse_a, sparse_b = layout.with_values(values)
        a, b = np.concatenate([a, sparse_a]), np.concatenate([b, sparse_b], axis=1)
    # The squared norm of b @ a without the product itself.
    squared = float(np.sum((b.T @ b).astype(np.float64) * (a @ a.T)))
    return Factors(a, b, len(a), 1.0, squared)


class SparseFactors:
    """Sparse entries as a product of least rank: the values stand in `a` or in `b`.

    Args:
        indices: Flat indices of the entries, (nnz,).
        shape: (n_rows, n_cols) of the matrix.
    """

    def __init__(self, indices: NDArray[np.int64], shape: tuple[int, int]) -> None:
        rows, cols = line_cover(indices, shape)
        n_rows, n_cols = shape
        row, col = np.divmod(indices, n_cols)
        rank = len(rows) + len(cols)
        self._a = np.zeros((rank, n_cols), dtype=np.float32)
        self._b = np.zeros((n_rows, rank), dtype=np.float32)
        self._b[rows, np.arange(len(rows))] = 1
        self._a[len(rows) + np.arange(len(cols)), cols] = 1
        self._on_row = np.isin(row, rows)  # the others are in one of the columns
        at, on_col = self._on_row, ~self._on_row
        self._in_a = np.searchsorted(rows, row[at]) * n_cols + col[at]
        self._in_b = row[on_col] * rank + len(rows) + np.searchsorted(cols, col[on_col])

    def with_values(self, values: F32) -> tuple[F32, F32]:
        """a (rank, n_cols) and b (n_rows, rank) of the entries' values, (nnz,)."""
        a, b = self._a.copy(), self._b.copy()
        a.reshape(-1)[self._in_a] = values[self._on_row]
        b.reshape(-1)[self._in_b] = values[~self._on_row]
        return a, b


def best_factors(delta: Delta, name: str, rank: int) -> Factors:
    """The delta of one tensor as the closest product of at most `rank`, by singular values."""
    exact = exact_factors(delta, name)
    if exact.rank <= rank:
        return exact
    n_rows, n_cols = delta.changed[name]
    indices, value = delta.entries(name)
    row, col = np.divmod(indices, n_cols)
    # Rows and columns without entries have no part in it.
    row_ids, row_at = np.unique(row, return_inverse=True)
    col_ids, col_at = np.unique(col, return_inverse=True)
    dense = np.zeros((len(row_ids), len(col_ids)), dtype=np.float64)
    dense[row_at, col_at] = value
    u, s, v = _leading_singular(dense, rank)
    a = np.zeros((rank, n_cols), dtype=np.float32)
    b = np.zeros((n_rows, rank), dtype=np.float32)
    root = np.sqrt(s)
    a[: len(s), col_ids] = root[:, None] * v
    b[row_ids, : len(s)] = u * root
    total = _square_sum(value)
    kept = float(np.square(s).sum()) / total if total else 1.0
    return Factors(a, b, exact.rank, min(kept, 1.0), total)


def _square_sum(values: F32) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _leading_singular(
    matrix: NDArray[np.float64], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The first `rank` singular vectors and values, largest first."""
    if min(matrix.shape) <= _EXACT_SVD:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
    else:  # subspace iteration from a fixed start, so that the same delta gives the same file
        start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _OVERSAMPLING))
        basis = np.linalg.qr(matrix @ start)[0]
        for _ in range(_POWER_ITERATIONS):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
        inner, s, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ inner
    return u[:, :rank], s[:rank], v[:rank]


def _check_rank(delta: Delta) -> None:
    """Refuse an exact LoRA that would be larger than the matrices it changes."""
    ranks = {name: _exact_rank(delta, name) for name in delta.tensors}
    if not ranks:  # what was trained is a LoRA, whatever its rank
        return
    worst = max(ranks, key=lambda name: ranks[name] / min(delta.changed[name]))
    if ranks[worst] > min(delta.changed[worst]) // 2:
        n_rows, n_cols = delta.changed[worst]
        raise ZoError(
            f"An exact LoRA would need rank {max(ranks.values())} ({ranks[worst]} for {worst!r} of "
            f"{n_rows} x {n_cols} weights), more than a LoRA is good for; merge without --lora, or "
            "give --rank R for the best approximation of rank R."
        )


def _exact_rank(delta: Delta, name: str) -> int:
    edit = delta.low_rank.get(name)
    product = edit.rank * edit.n_windows if edit else 0
    if name not in delta.tensors:
        return product
    return product + sum(map(len, line_cover(delta.tensors[name], delta.shapes[name])))


def write_lora(
    base: GgufFile, delta: Delta, path: Path, *, rank: int | None, keys: Mapping[str, Value | None]
) -> LoraSummary:
    """Write the adapter.

    Args:
        base: The GGUF that the delta belongs to.
        delta: What was learned.
        path: File to write, atomically.
        rank: Largest rank; below the exact one the adapter approximates. None: always exact.
        keys: Further metadata, such as provenance.

    Raises:
        ZoError: llama.cpp could not apply it, or it is exact only at a rank that makes no sense.
    """
    check_lora(base, delta, rank)
    if rank is None:
        factors = {name: exact_factors(delta, name) for name in delta.changed}
    else:
        factors = {name: best_factors(delta, name, rank) for name in delta.changed}
    write_factors(base, {name: (part.a, part.b) for name, part in factors.items()}, path, keys)
    total = sum(part.squared_norm for part in factors.values())
    kept = sum(part.kept * part.squared_norm for part in factors.values())
    return LoraSummary(
        rank=max(part.rank for part in factors.values()),
        exact_rank=max(part.exact_rank for part in factors.values()),
        kept=kept / total if total else 1.0,
        n_tensors=len(factors),
        n_bytes=path.stat().st_size,
    )


def write_factors(
    base: GgufFile,
    factors: Mapping[str, tuple[F32, F32]],
    path: Path,
    keys: Mapping[str, Value | None],
) -> None:
    """Write the adapter that adds b @ a to each weight; checks nothing.

    Args:
        base: The GGUF that it belongs to.
        factors: Weight -> a (rank, n_cols) and b (n_rows, rank).
        path: File to write, atomically.
        keys: Further metadata.
    """
    head: dict[str, Value | None] = {
        "general.architecture": base.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        # 0 switches llama.cpp's alpha / rank off: the product counts as it is, whatever its rank.
        "adapter.lora.alpha": 0.0,
    }
    tensors = []
    for name, (a, b) in factors.items():
        tensors += [_tensor(f"{name}.lora_a", a), _tensor(f"{name}.lora_b", b)]
    records = [
        key_record(key, value) for key, value in {**head, **keys}.items() if value is not None
    ]
    write_gguf(path, records, tensors)


def _tensor(name: str, values: F32) -> NewTensor:
    data = np.ascontiguousarray(values).view(np.uint8)
    return NewTensor(name, values.shape, GGMLQuantizationType.F32, lambda: data)
