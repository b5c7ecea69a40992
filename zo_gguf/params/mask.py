"""The mask: which weights of a quantized GGUF are trainable, and what quantization took from them.

A mask belongs to one base GGUF (by the hash of its tensors). Its residuals, the float weight minus
the dequantized one, are the initial theta: adding them gives the unquantized value back.
Choosing the weights is done elsewhere (sensitivity, cover, export). Method: SensZOQ, 2406.02913.
"""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.params.select import line_cover
from zo_gguf.params.sparse_file import (
    FORMAT_VERSION,
    SparseEntries,
    check_base_hash,
    check_entries,
    parse_header,
    read_sparse,
    slices_of,
    write_sparse,
)

if TYPE_CHECKING:
    from zo_gguf.gguf_files.file import GgufFile

_KIND = "mask"
_VALUE = "residual"


@dataclass(frozen=True)
class MaskHeader:
    """Where a mask comes from.

    Attributes:
        base_name: File name of the quantized GGUF that the residuals were computed against.
        base_sha256: `GgufFile.sha256()` of it.
        score: sensitive, magnitude or random.
        density: Wanted share of each matrix's weights, 0 < density <= 1.
        max_rank: Largest number of rows-or-columns per matrix, None when unlimited.
        calibration: Recipe of the calibration text (JSON values).
        method: The tuning method that reads the mask.
        format_version: Version of the file layout.
    """

    base_name: str
    base_sha256: str
    score: str
    density: float
    max_rank: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    method: str = "sensitive"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Mask:
    """Trainable weights of one GGUF.

    Attributes:
        tensors: GGUF tensor name -> int64 (n,), sorted unique flat indices, row * n_cols + col.
            Tensors stand in base file order.
        residuals: Same keys -> float32 (n,), float weight minus dequantized weight.
        shapes: Same keys -> (n_rows, n_cols).
        header: Where the mask comes from.

    Raises:
        ZoError: On construction, when the parts do not fit together.
    """

    tensors: dict[str, NDArray[np.int64]]
    residuals: dict[str, NDArray[np.float32]]
    shapes: dict[str, tuple[int, int]]
    header: MaskHeader

    def __post_init__(self) -> None:
        check_entries(SparseEntries(self.tensors, self.residuals, self.shapes), _KIND)

    @property
    def nnz(self) -> int:
        """Number of trainable weights."""
        return sum(indices.size for indices in self.tensors.values())

    def theta0(self) -> NDArray[np.float32]:
        """The initial theta, (nnz,): residuals, tensors in file order, indices ascending."""
        return np.concatenate([self.residuals[name] for name in self.tensors])

    def slices(self) -> dict[str, slice]:
        """Where each tensor's entries lie in theta."""
        return slices_of(self.tensors)

    def rank(self, name: str) -> int:
        """Least number of rows and columns that hold all entries of a tensor.

        A delta on this mask is exactly a LoRA of that rank for the tensor.
        """
        rows, cols = line_cover(self.tensors[name], self.shapes[name])
        return len(rows) + len(cols)

    def check_base(self, gguf: "GgufFile") -> None:
        """Raise ZoError unless `gguf` is the file that this mask was made for."""
        check_base(gguf, self.header.base_name, self.header.base_sha256, self.shapes, _KIND)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as safetensors, atomically; equal masks give equal bytes."""
        entries = SparseEntries(self.tensors, self.residuals, self.shapes)
        write_sparse(path, _KIND, _VALUE, self.header, entries)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Mask":
        """Read and validate a mask file.

        Raises:
            ZoError: The file is missing, damaged, not a mask, or of an unknown version.
        """
        raw, entries, _ = read_sparse(path, _KIND, _VALUE)
        header = parse_header(MaskHeader, raw, path)
        check_base_hash(header.base_sha256, path)
        check_entries(entries, f"{_KIND} {os.fspath(path)!r}")
        return cls(entries.tensors, entries.values, entries.shapes, header)


def check_base(
    gguf: "GgufFile",
    base_name: str,
    base_sha256: str,
    shapes: dict[str, tuple[int, int]],
    kind: str,
) -> None:
    """Check that a mask or delta belongs to `gguf`.

    Args:
        gguf: The opened base.
        base_name: File name that the mask or delta was made for.
        base_sha256: Hash that it was made for.
        shapes: Its tensors.
        kind: "mask" or "delta", for the error.

    Raises:
        ZoError: Another base, or a tensor that is missing or shaped differently.
    """
    actual = gguf.sha256()
    if actual != base_sha256:
        raise ZoError(
            f"The {kind} was made for {base_name!r} (tensors {base_sha256}), but "
            f"{gguf.path.name!r} has other weights (tensors {actual}); use the {kind} with its own "
            "base, or export a mask for this file with --onto."
        )
    for name, shape in shapes.items():
        if name not in gguf.tensors or tuple(gguf.tensors[name].shape) != shape:
            raise ZoError(
                f"The {kind} tunes {name!r} of shape {shape}, which {gguf.path.name!r} has not."
            )
