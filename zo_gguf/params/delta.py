"""The delta: what tuning learned about one GGUF, as f32 masters.

Sparse entries and low-rank products are added to the dequantized weights; edits are values inside
the weights' bytes, or gains of norms. A matrix may have one of each.

Made by tune, read by evaluate, merge and attach. Files carry no time stamps: the same run gives the
same bytes. How the values were learned is not known here beyond the recorded provenance.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.kinds import (
    Edit,
    Edits,
    Gain,
    Live,
    LowRank,
    Products,
    describe,
    fixed_arrays,
    in_order,
    parse,
)
from zo_gguf.params.mask import Mask, check_base
from zo_gguf.params.sparse_file import (
    FORMAT_VERSION,
    EditArrays,
    SparseEntries,
    check_base_hash,
    check_entries,
    kind_of,
    parse_header,
    read_sparse,
    slices_of,
    write_sparse,
)
from zo_gguf.system import all_finite

if TYPE_CHECKING:
    from zo_gguf.gguf_files.file import GgufFile

_KIND = "delta"
_VALUE = "theta"


@dataclass(frozen=True)
class DeltaHeader:
    """Where a delta comes from.

    Attributes:
        base_name: File name of the tuned GGUF.
        base_sha256: `GgufFile.sha256()` of it.
        method: The tuning method.
        provenance: JSON values (finite numbers) such as step, seed and losses; no time stamps.
        format_version: Version of the file layout.
    """

    base_name: str
    base_sha256: str
    method: str = "sensitive"
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, gguf: "GgufFile", method: str) -> "DeltaHeader":
        """For what a method trains in a GGUF."""
        return cls(gguf.path.name, gguf.sha256(), method)


@dataclass(frozen=True)
class Delta:
    """Masters: of sparse entries, then of edits, then of low-rank products, each by tensor.

    Attributes:
        tensors: GGUF tensor name -> int64 (n,), sorted unique flat indices, row * n_cols + col.
        shapes: Same keys -> (n_rows, n_cols).
        theta: float32 (nnz,); sparse entries in file order of the tensors, indices ascending.
        header: Where the delta comes from.
        edits: GGUF tensor name -> what is edited there, in the order of theta.
        low_rank: GGUF tensor name -> the product that is added to it, in the order of theta.

    Raises:
        ZoError: On construction, when the parts do not fit together or theta is not finite.
    """

    tensors: dict[str, NDArray[np.int64]]
    shapes: dict[str, tuple[int, int]]
    theta: NDArray[np.float32]
    header: DeltaHeader
    edits: Edits = field(default_factory=dict)
    low_rank: Products = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.n_sparse + sum(edit.size for _, edit in in_order(self.edits, self.low_rank))
        if self.theta.shape != (n,):
            raise ZoError(f"theta has shape {self.theta.shape}, but the delta has {n} positions.")
        if self.theta.dtype != np.float32:
            raise ZoError(f"theta is {self.theta.dtype}, but masters are float32.")
        if self.tensors:
            check_entries(self._entries(), _KIND)
        for name, edit in self.low_rank.items():
            if self.shapes.get(name, shape := (edit.n_rows, edit.n_cols)) != shape:
                raise ZoError(f"The delta has two shapes for {name!r}; make it again.")
        if not all_finite(self.theta):
            raise ZoError("The delta has values that are NaN or infinite; make it again.")

    @classmethod
    def from_mask(
        cls, mask: Mask, theta: NDArray[np.float32], provenance: dict[str, Any]
    ) -> "Delta":
        """The delta that gives the weights of `mask` the values `theta`, float32 (nnz,)."""
        header = DeltaHeader(
            base_name=mask.header.base_name,
            base_sha256=mask.header.base_sha256,
            method=mask.header.method,
            provenance=provenance,
        )
        return cls(mask.tensors, mask.shapes, theta, header)

    @property
    def nnz(self) -> int:
        """Number of tuned weights."""
        return int(self.theta.size)

    @property
    def n_sparse(self) -> int:
        """Number of sparse entries."""
        return sum(indices.size for indices in self.tensors.values())

    def slices(self) -> dict[str, slice]:
        """Where each tensor's sparse entries lie in theta."""
        return slices_of(self.tensors)

    def parts(self) -> list[tuple[str, Edit, slice]]:
        """Tensor, edit or product, and its masters' place in theta, in the order of theta."""
        result, first = [], self.n_sparse
        for name, edit in in_order(self.edits, self.low_rank):
            result.append((name, edit, slice(first, first + edit.size)))
            first += edit.size
        return result

    def edit_slices(self) -> dict[str, slice]:
        """Where each edit's masters lie in theta."""
        return {name: part for name, _, part in self.parts()[: len(self.edits)]}

    def low_rank_slices(self) -> dict[str, slice]:
        """Where each product's masters lie in theta."""
        return {name: part for name, _, part in self.parts()[len(self.edits) :]}

    @property
    def live(self) -> dict[str, Live]:
        """The edits in place."""
        return {name: edit for name, edit in self.edits.items() if isinstance(edit, Live)}

    @property
    def gains(self) -> dict[str, Gain]:
        """The gains of norms."""
        return {name: edit for name, edit in self.edits.items() if isinstance(edit, Gain)}

    @property
    def changed(self) -> dict[str, tuple[int, int]]:
        """Tensors to whose values something is added, with their shapes (n_rows, n_cols)."""
        low_rank = {name: (edit.n_rows, edit.n_cols) for name, edit in self.low_rank.items()}
        return self.shapes | low_rank

    def entries(
        self, name: str, rows: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What is added to a tensor: sorted flat indices and values, both (n,).

        A low-rank product adds to every weight, so its n is n_rows * n_cols.

        Args:
            name: The tensor.
            rows: First and last + 1 of the rows that are asked for; None: all.
        """
        n_rows, n_cols = self.changed[name]
        first, last = rows or (0, n_rows)
        indices, sparse = np.zeros(0, np.int64), np.zeros(0, np.float32)
        if name in self.tensors:
            indices = self.tensors[name]
            low, high = np.searchsorted(indices, (first * n_cols, last * n_cols))
            indices, sparse = indices[low:high], self.theta[self.slices()[name]][low:high]
        edit = self.low_rank.get(name)
        if edit is None:
            return indices, sparse
        left, right = edit.factors(self.theta[self.low_rank_slices()[name]])
        values = (left[:, first:last].T @ right).reshape(-1)
        values[indices - first * n_cols] += sparse
        return np.arange(first * n_cols, last * n_cols), values

    def add_to(self, name: str, rows: tuple[int, int], values: NDArray[np.float32]) -> None:
        """Add to a tensor's values, (last - first, n_cols), what it gets, in place.

        Args:
            name: The tensor.
            rows: First and last + 1 of the rows that `values` has.
            values: C-contiguous.
        """
        first, last = rows
        edit = self.low_rank.get(name)
        if edit is not None:
            left, right = edit.factors(self.theta[self.low_rank_slices()[name]])
            values += left[:, first:last].T @ right
        if name in self.tensors:
            n_cols = self.changed[name][1]
            indices, part = self.tensors[name], self.theta[self.slices()[name]]
            low, high = np.searchsorted(indices, (first * n_cols, last * n_cols))
            values.reshape(-1)[indices[low:high] - first * n_cols] += part[low:high]

    @property
    def is_zero(self) -> bool:
        """Whether it changes no matrix by anything; values in place and gains are not looked at."""
        if self.theta[: self.n_sparse].any():
            return False
        slices = self.low_rank_slices()
        factors = [edit.factors(self.theta[slices[n]]) for n, edit in self.low_rank.items()]
        return not any(left.any() and right.any() for left, right in factors)

    def products(self) -> "Delta":
        """Only what is added to matrices: sparse entries and low-rank products."""
        parts = [self.theta[part] for part in self.low_rank_slices().values()]
        return replace(self, theta=np.concatenate([self.theta[: self.n_sparse], *parts]), edits={})

    def with_theta(self, theta: NDArray[np.float32], provenance: dict[str, Any]) -> "Delta":
        """The same trainable parameters with other masters, (nnz,)."""
        return replace(self, theta=theta, header=replace(self.header, provenance=provenance))

    def as_rows(
        self, name: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """One tensor's entries as (row, col, value), each (n,), sorted by row, then column."""
        row, col = np.divmod(self.tensors[name], self.shapes[name][1])
        return row, col, self.theta[self.slices()[name]]

    def check_base(self, gguf: "GgufFile") -> None:
        """Raise ZoError unless `gguf` is the file that this delta was made for."""
        header = self.header
        check_base(gguf, header.base_name, header.base_sha256, self.changed, _KIND)
        for name in [*self.live, *self.gains]:
            gguf.info(name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the delta as safetensors, atomically; equal deltas give equal bytes."""
        arrays = {
            _masters(name, edit, self.edits): self.theta[part] for name, edit, part in self.parts()
        }
        arrays |= fixed_arrays(self.low_rank)
        edits = EditArrays(describe(self.edits, self.low_rank), arrays)
        write_sparse(path, _KIND, _VALUE, self.header, self._entries(), edits)

    @classmethod
    def load(cls, run_or_file: str | os.PathLike[str]) -> "Delta":
        """Read and validate a delta file, or the delta of a run directory.

        A run directory gives its `delta.safetensors`, or its latest checkpoint while it runs.

        Raises:
            ZoError: There is no delta, or it is damaged or of an unknown version.
        """
        path = _find(Path(run_or_file))
        raw, entries, extra = read_sparse(path, _KIND, _VALUE)
        header = parse_header(DeltaHeader, raw, path)
        check_base_hash(header.base_sha256, path)
        what = f"{_KIND} {str(path)!r}"
        edits, low_rank = parse(extra.rows, extra.arrays, what)
        if entries.tensors or not (edits or low_rank):
            check_entries(entries, what)
        parts = [entries.values[name] for name in entries.tensors]
        for name, edit in in_order(edits, low_rank):
            masters = extra.arrays.get(_masters(name, edit, edits))
            if masters is None or masters.shape != (edit.size,) or masters.dtype != np.float32:
                raise ZoError(f"The {what} has no fitting masters for {name!r}; make it again.")
            parts.append(masters)
        theta = np.concatenate(parts)
        return cls(entries.tensors, entries.shapes, theta, header, edits, low_rank)

    def _entries(self) -> SparseEntries:
        values = {name: self.theta[part] for name, part in self.slices().items()}
        return SparseEntries(self.tensors, values, self.shapes)


def _masters(name: str, edit: Edit, edits: Edits) -> str:
    """What an array of masters is called in a file."""
    second = isinstance(edit, LowRank) and name in edits
    return f"{name}.{'product' if second else 'masters'}"


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("delta", "checkpoints/latest", "checkpoints/best"):
        candidate = path / f"{name}.safetensors"
        if candidate.is_file():
            return candidate
    raise ZoError(
        f"The run {str(path)!r} holds no delta.safetensors and no checkpoint; tune it first, or "
        "name a delta file."
    )


# ---- opening -------------------------------------------------------------------------------------


def open_delta(
    source: Mask | Delta | str | os.PathLike[str] | None, gguf: GgufFile
) -> Delta | None:
    """Load a mask or delta if `source` is a path, and check that it belongs to `gguf`.

    A mask becomes a delta whose theta are the residuals.

    Raises:
        ZoError: Not a mask or delta, made for another file, or entries in a weight that no plain
            matrix product reads.
    """
    if source is None:
        return None
    if not isinstance(source, Mask | Delta):
        is_delta = os.path.isdir(source) or kind_of(source) == "delta"
        source = Delta.load(source) if is_delta else Mask.load(source)
    source.check_base(gguf)
    delta = source if isinstance(source, Delta) else Delta.from_mask(source, source.theta0(), {})
    for name in [*delta.tensors, *delta.low_rank]:
        refuse_untunable(name, gguf)
    return delta


def refuse_untunable(name: str, gguf: GgufFile) -> None:
    """Raise ZoError for a weight that is more than the matrix of one matrix product."""
    shape = gguf.tensors[name].shape
    if len(shape) != 2:
        raise ZoError(
            f"The weight {name!r} of shape {tuple(shape)} holds mixture-of-experts or batched "
            "matrices, which cannot be tuned; leave it out with --exclude."
        )
    if name.startswith("token_embd"):
        raise ZoError(
            f"The embedding {name!r} is read by row, and by the head too where the two are tied, "
            "so it cannot be tuned; leave it out with --exclude."
        )
