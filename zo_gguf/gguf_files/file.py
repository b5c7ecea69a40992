"""A GGUF model file, memory mapped: its metadata, its tensors' bytes and their float values.

Read only. Writing is `gguf_write`; changing quantized bytes is `requantize`.
"""

import hashlib
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.header import Header, HeaderError, decode_value, parse_header
from zo_gguf.system import require_file

_HASH_CHUNK = 1 << 24  # bytes
_DEQUANTIZED = 1 << 15  # weights at once, so that what lies between fits into the cache


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `shape` in numpy order (rows first), `offset` from the file's start, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def n_cols(self) -> int:
        """Values per row."""
        return self.shape[-1]

    @property
    def is_float(self) -> bool:
        """Whether every value has bytes of its own that libzo can read and write."""
        return self.type.name in ("F32", "F16", "BF16")

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes


def dequantize_rows(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Float values of quantized rows.

    Args:
        raw: Bytes, (..., bytes_per_row).
        kind: Their type.

    Returns:
        f32 of shape (..., n_cols).

    Raises:
        ZoError: gguf has no dequantizer for `kind`.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    flat = np.ascontiguousarray(raw).reshape(1, -1)
    n_blocks, step = flat.size // block_bytes, max(1, _DEQUANTIZED // block)
    values = np.empty((n_blocks, block), np.float32)
    try:
        with np.errstate(all="ignore"):
            for first in range(0, n_blocks, step):
                # One row for gguf, which else takes 16 at a time, however short they are.
                part = flat[:, first * block_bytes : (first + step) * block_bytes]
                values[first : first + step] = gguf.quants.dequantize(part, kind).reshape(-1, block)
    except NotImplementedError:
        raise ZoError(
            f"Weights of type {kind.name} cannot be read here; "
            "use a GGUF with Q4_0, Q8_0, K-quants or floats."
        ) from None
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // block_bytes * block)


class GgufFile:
    """A GGUF, opened for reading.

    Args:
        path: The file.

    Raises:
        ZoError: The file is missing, is no GGUF, is truncated, or is one shard of several.
    """

    path: Path
    tensors: dict[str, TensorInfo]  # in file order

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = require_file(path, "GGUF file")
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, dtype=np.uint8)  # (file_bytes,)
        try:
            self.header: Header = parse_header(memoryview(self._map))
        except HeaderError as problem:
            raise ZoError(f"The file {str(self.path)!r} {problem}.") from None
        self.tensors = {
            name: TensorInfo(name, record.dims[::-1], record.type, record.offset, record.n_bytes)
            for name, record in self.header.tensors.items()
        }
        if (shards := self.metadata("split.count", 1)) not in (0, 1):
            raise ZoError(
                f"The file {str(self.path)!r} is one of {shards} shards; "
                "join them with `llama-gguf-split --merge` first."
            )

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama"."""
        return str(self.metadata("general.architecture", ""))

    @property
    def name(self) -> str | None:
        """The model's own name, if its metadata gives one."""
        value = self.metadata("general.name")
        return None if value is None else str(value)

    def metadata(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key as a Python value (str, int, float, bool or a list of them)."""
        entry = self.header.keys.get(key)
        return default if entry is None else decode_value(memoryview(self._map), entry)

    def info(self, name: str) -> TensorInfo:
        """The record of tensor `name`.

        Raises:
            ZoError: The file has no such tensor.
        """
        if name not in self.tensors:
            raise ZoError(
                f"The file {str(self.path)!r} has no tensor {name!r}; was it made for it?"
            )
        return self.tensors[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Read-only view of a tensor's bytes: (n_rows, bytes_per_row), or (expert, row, byte)."""
        info = self.info(name)
        span = self.data[info.offset : info.offset + info.n_bytes]
        return span.reshape(*info.shape[:-1], info.row_bytes)

    def dequantize(
        self, name: str, rows: NDArray[np.integer[Any]] | None = None
    ) -> NDArray[np.float32]:
        """Float values of a tensor.

        Args:
            name: The tensor.
            rows: Only these rows (first axis), in this order; no other row's bytes are read.

        Returns:
            f32 of the tensor's shape, or (len(rows), n_cols).

        Raises:
            ZoError: No such tensor, or its type cannot be read.
        """
        raw = self.raw(name)
        return dequantize_rows(raw if rows is None else raw[rows], self.tensors[name].type)

    def sha256(self) -> str:
        """SHA-256, hex, over every tensor's name, shape, type and bytes in file order.

        Edits of the metadata do not change it.
        """
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        # Read, not mapped: mapped pages would count as this process's memory beside the engine's.
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_CHUNK))
        with open(self.path, "rb", buffering=0) as file:
            self._update(digest, file, buffer)
        return digest.hexdigest()

    def _update(self, digest: Any, file: IO[bytes], buffer: memoryview) -> None:
        for info in self.tensors.values():
            shape = "x".join(str(size) for size in info.shape)
            digest.update(f"{info.name}\n{shape}\n{info.type.name}\n{info.n_bytes}\n".encode())
            file.seek(info.offset)
            left = info.n_bytes
            while left:
                n_read = file.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
                if not n_read:
                    raise ZoError(f"{str(self.path)!r} shrank while it was read; copy it again.")
                digest.update(buffer[:n_read])
                left -= n_read

    @cached_property
    def reader(self) -> gguf.GGUFReader:
        """The file through gguf's own reader; made on first use: large vocabularies take long."""
        return gguf.GGUFReader(self.path)
