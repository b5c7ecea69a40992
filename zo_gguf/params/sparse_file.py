"""The layout that mask and delta files share: safetensors with, per tensor, indices and values.

`<tensor>.indices` holds sorted flat indices (int32 where they fit, else int64), `<tensor>.<value>`
as many f32 values. A delta may have edits too (see `edits`): `<tensor>.masters`, with `.left` and
`.right` where a subspace is fixed, and `.product` for a low-rank product beside another edit. One
metadata entry holds JSON: kind, header, shapes in base file order, and a SHA-256 of the arrays, so
that a damaged file is noticed. What the values mean is not known here.
"""

import hashlib
import json
import os
import types
import typing
from collections.abc import Container
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from zo_gguf.errors import ZoError
from zo_gguf.system import atomic_write, require_file

FORMAT_VERSION = 1

T = TypeVar("T")

# One single entry: safetensors writes several metadata entries in random order, and these files
# are meant to be bit-reproducible.
_METADATA_KEY = "zo_gguf"
_MAX_NAME = 63  # llama.cpp's limit for tensor names


class SparseEntries(NamedTuple):
    """What a file holds besides its header; all three have the same keys in the same order."""

    tensors: dict[str, NDArray[np.int64]]
    values: dict[str, NDArray[np.float32]]
    shapes: dict[str, tuple[int, int]]


class EditArrays(NamedTuple):
    """The rest of a delta: a row of JSON values per edit, its tensor first, and arrays."""

    rows: list[list[Any]]
    arrays: dict[str, NDArray[Any]]


NO_EDITS = EditArrays([], {})
_EDIT_ARRAYS = ("masters", "product", "left", "right")


def check_entries(entries: SparseEntries, what: str) -> None:
    """Check that every tensor's indices are sorted, unique, within its shape, with finite values.

    Args:
        entries: The content to check.
        what: How errors name it, such as "mask" or a file's name.

    Raises:
        ZoError: Something is wrong; the sentence names the tensor.
    """
    tensors, values, shapes = entries
    if not tensors:
        raise ZoError(f"The {what} selects no weights at all; export it again.")
    if list(tensors) != list(shapes) or list(tensors) != list(values):
        raise ZoError(f"The {what} lists different tensors in its parts; export it again.")
    for name, indices in tensors.items():
        problem = _problem(name, indices, values[name], shapes[name])
        if problem:
            raise ZoError(f"The {what} is not valid: tensor {name!r} {problem}; make it again.")


def _problem(
    name: str, indices: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
) -> str | None:
    n_rows, n_cols = shape
    if not name or len(name.encode()) > _MAX_NAME:
        return f"has a name of {len(name.encode())} bytes (1 to {_MAX_NAME} are possible)"
    if n_rows < 1 or n_cols < 1:
        return f"has the impossible shape {n_rows} x {n_cols}"
    if indices.ndim != 1 or indices.dtype != np.int64:
        return f"has indices of type {indices.dtype} and {indices.ndim} dimensions"
    if values.shape != indices.shape or values.dtype != np.float32:
        return f"has {indices.size} indices but {values.size} values of type {values.dtype}"
    if indices.size == 0:
        return "has no entries"
    if (indices[1:] <= indices[:-1]).any():
        return "has indices that are not sorted or not unique"
    if indices[0] < 0 or indices[-1] >= n_rows * n_cols:
        return f"has indices outside its {n_rows} x {n_cols} weights"
    if not np.isfinite(values).all():
        return "has values that are NaN or infinite"
    return None


def write_sparse(
    path: str | os.PathLike[str],
    kind: str,
    value_name: str,
    header: Any,
    entries: SparseEntries,
    edits: EditArrays = NO_EDITS,
) -> None:
    """Write a file atomically; the same content always gives the same bytes.

    Args:
        path: File to write.
        kind: "mask" or "delta".
        value_name: Suffix of the value arrays.
        header: A dataclass of JSON values.
        entries: Checked content.
        edits: More of it.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, indices in entries.tensors.items():
        n_rows, n_cols = entries.shapes[name]
        dtype = np.int32 if n_rows * n_cols <= np.iinfo(np.int32).max else np.int64
        arrays[f"{name}.indices"] = np.ascontiguousarray(indices, dtype=dtype)
        arrays[f"{name}.{value_name}"] = np.ascontiguousarray(entries.values[name])
    for name in _edit_names(edits.rows, edits.arrays):
        arrays[name] = np.ascontiguousarray(edits.arrays[name])
    document = {
        "kind": kind,
        "header": asdict(header),
        "tensors": [[name, *shape] for name, shape in entries.shapes.items()],
        "sha256": _digest(arrays),
    }
    if edits.rows:
        document["edits"] = edits.rows
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    with atomic_write(path) as file:
        file.write(serialize(arrays, metadata={_METADATA_KEY: text}))


def read_sparse(
    path: str | os.PathLike[str], kind: str, value_name: str
) -> tuple[dict[str, Any], SparseEntries, EditArrays]:
    """Read a file written by `write_sparse`.

    Returns:
        The header as a dict of JSON values (see `parse_header`), the entries and the edits, whose
        layout and checksum are verified; `check_entries` is left to the caller.

    Raises:
        ZoError: The file is missing, damaged, of another kind or of an unknown format version.
    """
    path = require_file(path, kind)
    try:
        with safe_open(path, framework="numpy") as file:
            document = _document(path, kind, file.metadata())
            names = _expected_arrays(document["tensors"], value_name)
            rows = document.get("edits", [])
            if names is not None:
                names += _edit_names(rows, file.keys())
            if names is None or sorted(names) != sorted(file.keys()):
                raise ZoError(f"The {kind} {str(path)!r} lists other tensors than it holds.")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, ZoError):
            raise
        raise ZoError(
            f"The {kind} {str(path)!r} is damaged or not a zo-gguf {kind} ({error}); make it again."
        ) from error
    if _digest(arrays) != document["sha256"]:
        raise ZoError(f"The {kind} {str(path)!r} is damaged: its checksum differs; make it again.")
    entries = SparseEntries({}, {}, {})
    for name, n_rows, n_cols in document["tensors"]:
        indices = arrays[f"{name}.indices"]
        if indices.dtype not in (np.int32, np.int64):
            raise ZoError(f"The {kind} {str(path)!r} has {indices.dtype} indices for {name!r}.")
        entries.tensors[name] = indices.astype(np.int64, copy=False)
        entries.values[name] = arrays[f"{name}.{value_name}"]
        entries.shapes[name] = (n_rows, n_cols)
    return document["header"], entries, EditArrays(rows, arrays)


def _edit_names(rows: list[list[Any]], present: Container[str]) -> list[str]:
    if any(not isinstance(row, list) or not row or type(row[0]) is not str for row in rows):
        raise ValueError("a row of its edits has no name")
    tensors = dict.fromkeys(row[0] for row in rows)  # a tensor may have two
    names = [f"{tensor}.{suffix}" for tensor in tensors for suffix in _EDIT_ARRAYS]
    return [name for name in names if name in present]


def parse_header(header_type: type[T], raw: dict[str, Any], path: str | os.PathLike[str]) -> T:
    """Build a header dataclass from untrusted JSON values.

    Raises:
        ZoError: A field is missing, unknown or of the wrong type.
    """
    hints = typing.get_type_hints(header_type)
    names = {field.name for field in fields(header_type)}  # type: ignore[arg-type]
    if set(raw) != names:
        odd = ", ".join(sorted(set(raw) ^ names))
        raise ZoError(f"The header of {str(path)!r} has missing or unknown fields: {odd}.")
    for name in names:
        if not _has_type(raw[name], hints[name]):
            raise ZoError(f"The header of {str(path)!r} has the bad {name} {raw[name]!r}.")
    return header_type(**raw)


def check_base_hash(sha256: str, path: str | os.PathLike[str]) -> None:
    """Raise ZoError unless `sha256` looks like a SHA-256 in hex."""
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ZoError(f"The header of {str(path)!r} has the bad base_sha256 {sha256!r}.")


def slices_of(tensors: dict[str, NDArray[np.int64]]) -> dict[str, slice]:
    """Where each tensor's entries lie in a vector that holds all tensors one after another."""
    result: dict[str, slice] = {}
    start = 0
    for name, indices in tensors.items():
        result[name] = slice(start, start + indices.size)
        start += indices.size
    return result


def _document(path: Path, kind: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or _METADATA_KEY not in metadata:
        raise ZoError(f"{str(path)!r} is a safetensors file, but not a zo-gguf {kind}.")
    document = json.loads(metadata[_METADATA_KEY])
    keys = {"kind", "header", "tensors", "sha256"}
    if not isinstance(document, dict) or set(document) - {"edits"} != keys:
        raise ValueError("its header is incomplete")
    if document["kind"] != kind:
        raise ZoError(f"{str(path)!r} is a {document['kind']}, but a {kind} is needed here.")
    if not isinstance(document["header"], dict) or not isinstance(document["tensors"], list):
        raise ValueError("its header is malformed")
    version = document["header"].get("format_version")
    if version != FORMAT_VERSION:
        raise ZoError(
            f"The {kind} {str(path)!r} has format version {version!r}, this zo-gguf reads version "
            f"{FORMAT_VERSION}; use a matching zo-gguf."
        )
    return document


def _expected_arrays(rows: list[Any], value_name: str) -> list[str] | None:
    names: list[str] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
            return None
        if any(type(n) is not int or not 0 < n < 1 << 31 for n in row[1:]):
            return None
        names += [f"{row[0]}.indices", f"{row[0]}.{value_name}"]
    return names if len(set(names)) == len(names) else None


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256 of the arrays' bytes, as hex."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _has_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    expected = typing.get_origin(hint) or hint
    if expected is float:
        return type(value) in (int, float)
    return type(value) is expected


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Which kind of file this is, "mask" or "delta"; None when it is neither.

    Raises:
        ZoError: There is no such file.
    """
    path = require_file(path, "mask or delta")
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})[_METADATA_KEY])
            return str(document["kind"])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None
