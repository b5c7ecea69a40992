"""The delta: what tuning learned about one GGUF, as f32 masters.

Sparse entries are values to add to the dequantized weights; `edits` are values inside the weights'
bytes or low-rank products.

Made by tune, read by evaluate, merge and attach. Files carry no time stamps: the same run gives the
same bytes. How the values were learned is not known here beyond the recorded provenance.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.edits import Edits, Gain, Live, LowRank, describe, fixed_arrays, parse
from zo_gguf.errors import ZoError
from zo_gguf.mask import Mask, check_base
from zo_gguf.sparse_file import (
    FORMAT_VERSION,
    EditArrays,
    SparseEntries,
    check_base_hash,
    check_entries,
    parse_header,
    read_sparse,
    slices_of,
    write_sparse,
)

if TYPE_CHECKING:
    from zo_gguf.gguf_file import GgufFile

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
    """Masters: first those of sparse entries, then those of the edits, tensor by tensor.

    Attributes:
        tensors: GGUF tensor name -> int64 (n,), sorted unique flat indices, row * n_cols + col.
        shapes: Same keys -> (n_rows, n_cols).
        theta: float32 (nnz,); sparse entries in file order of the tensors, indices ascending.
        header: Where the delta comes from.
        edits: GGUF tensor name -> what else is trained there, in the order of theta.

    Raises:
        ZoError: On construction, when the parts do not fit together or theta is not finite.
    """

    tensors: dict[str, NDArray[np.int64]]
    shapes: dict[str, tuple[int, int]]
    theta: NDArray[np.float32]
    header: DeltaHeader
    edits: Edits = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.n_sparse + sum(edit.size for edit in self.edits.values())
        if self.theta.shape != (n,):
            raise ZoError(f"theta has shape {self.theta.shape}, but the delta has {n} positions.")
        if self.theta.dtype != np.float32:
            raise ZoError(f"theta is {self.theta.dtype}, but masters are float32.")
        if self.tensors:
            check_entries(self._entries(), _KIND)
        for name, edit in self.low_rank.items():
            if self.shapes.get(name, shape := (edit.n_rows, edit.n_cols)) != shape:
                raise ZoError(f"The delta has two shapes for {name!r}; make it again.")
        if not np.isfinite(self.theta).all():
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

    def edit_slices(self) -> dict[str, slice]:
        """Where each edit's masters lie in theta."""
        result, first = {}, self.n_sparse
        for name, edit in self.edits.items():
            result[name] = slice(first, first + edit.size)
            first += edit.size
        return result

    @property
    def live(self) -> dict[str, Live]:
        """The edits in place."""
        return {name: edit for name, edit in self.edits.items() if isinstance(edit, Live)}

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """The low-rank products."""
        return {name: edit for name, edit in self.edits.items() if isinstance(edit, LowRank)}

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
        left, right = edit.factors(self.theta[self.edit_slices()[name]])
        values = (left[:, first:last].T @ right).reshape(-1)
        values[indices - first * n_cols] += sparse
        return np.arange(first * n_cols, last * n_cols), values

    @property
    def is_zero(self) -> bool:
        """Whether it changes no matrix by anything; values in place and gains are not looked at."""
        if self.theta[: self.n_sparse].any():
            return False
        slices = self.edit_slices()
        factors = [edit.factors(self.theta[slices[n]]) for n, edit in self.low_rank.items()]
        return not any(left.any() and right.any() for left, right in factors)

    def products(self) -> "Delta":
        """Only what is added to matrices: sparse entries and low-rank products."""
        slices = self.edit_slices()
        parts = [self.theta[: self.n_sparse], *(self.theta[slices[n]] for n in self.low_rank)]
        return replace(self, theta=np.concatenate(parts), edits=dict(self.low_rank))

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
        slices = self.edit_slices()
        arrays = {f"{name}.masters": self.theta[part] for name, part in slices.items()}
        edits = EditArrays(describe(self.edits), arrays | fixed_arrays(self.edits))
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
        edits = parse(extra.rows, extra.arrays, what)
        if entries.tensors or not edits:
            check_entries(entries, what)
        parts = [entries.values[name] for name in entries.tensors]
        for name, edit in edits.items():
            masters = extra.arrays.get(f"{name}.masters")
            if masters is None or masters.shape != (edit.size,) or masters.dtype != np.float32:
                raise ZoError(f"The {what} has no fitting masters for {name!r}; make it again.")
            parts.append(masters)
        return cls(entries.tensors, entries.shapes, np.concatenate(parts), header, edits)

    def _entries(self) -> SparseEntries:
        values = {name: self.theta[part] for name, part in self.slices().items()}
        return SparseEntries(self.tensors, values, self.shapes)


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for candidate in (path / "delta.safetensors", path / "checkpoints" / "latest.safetensors"):
        if candidate.is_file():
            return candidate
    raise ZoError(
        f"The run {str(path)!r} holds no delta.safetensors and no checkpoint; tune it first, or "
        "name a delta file."
    )
