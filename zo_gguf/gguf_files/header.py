"""Strict walk over a GGUF header: where each key, value and tensor lies; counts are checked first.

Values are not decoded here: a key keeps the span of its bytes, so that a copy of the file can carry
them over unchanged. gguf.GGUFReader trusts the counts it reads and can spin for ever on a damaged
file; this does not.
"""

import struct
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MIN_KEY_BYTES = 8 + 4 + 1  # length, value type, the smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, n_dims, one dimension, type, offset

SCALAR_FORMAT = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


class HeaderError(Exception):
    """What is wrong with the file, as the end of a sentence that starts with the file's name."""


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry: bytes [key_start, end) of the file, its value at [start, end)."""

    key: str
    type: GGUFValueType
    key_start: int
    start: int
    end: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor; `dims` in ggml order (columns first), `offset` in bytes from the file's start."""

    name: str
    dims: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Everything that comes before the tensor data."""

    version: int
    alignment: int
    keys: dict[str, KeyValue]
    tensors: dict[str, TensorRecord]


class _Cursor:
    """Reads forward through a buffer and never past its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.left:
            raise HeaderError("is truncated: it ends inside its header")
        self.at += n_bytes

    def number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        start = self.at
        self.skip(layout.size)
        return layout.unpack_from(self.data, start)[0]

    def name(self, what: str) -> str:
        n_bytes = self.number("Q")
        start = self.at
        self.skip(n_bytes)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise HeaderError(f"is damaged: a {what} is not valid UTF-8") from None

    def skip_strings(self, count: int) -> None:
        unpack, data, end = struct.Struct("<Q").unpack_from, self.data, len(self.data)
        at = self.at
        for _ in range(count):
            if at + 8 > end:
                raise HeaderError("is truncated: it ends inside its header")
            at += 8 + unpack(data, at)[0]
        self.skip(at - self.at)


def _value_type(code: int, key: str) -> GGUFValueType:
    try:
        return GGUFValueType(code)
    except ValueError:
        raise HeaderError(f"is damaged: the key {key!r} has the unknown type {code}") from None


def _skip_array(cursor: _Cursor, key: str) -> None:
    item = _value_type(cursor.number("I"), key)
    count = cursor.number("Q")
    if item == GGUFValueType.ARRAY:
        raise HeaderError(f"is not supported: the key {key!r} holds an array of arrays")
    if item == GGUFValueType.STRING:
        if count > cursor.left // 8:
            raise HeaderError("is truncated: it ends inside its header")
        cursor.skip_strings(count)
    else:
        cursor.skip(count * struct.calcsize("<" + SCALAR_FORMAT[item]))


def _read_key(cursor: _Cursor) -> KeyValue:
    key_start = cursor.at
    key = cursor.name("key")
    kind = _value_type(cursor.number("I"), key)
    start = cursor.at
    if kind == GGUFValueType.ARRAY:
        _skip_array(cursor, key)
    elif kind == GGUFValueType.STRING:
        cursor.skip(cursor.number("Q"))
    else:
        cursor.number(SCALAR_FORMAT[kind])
    return KeyValue(key, kind, key_start, start, cursor.at)


def _read_tensor(cursor: _Cursor) -> TensorRecord:
    name = cursor.name("tensor name")
    n_dims = cursor.number("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise HeaderError(f"is damaged: the tensor {name!r} has {n_dims} dimensions")
    dims = tuple(cursor.number("Q") for _ in range(n_dims))
    code = cursor.number("I")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise HeaderError(
            f"is not supported: the tensor {name!r} has the unknown type {code}"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_elements = 1
    for dim in dims:
        n_elements *= dim
    if n_elements == 0 or n_elements >= 1 << 62 or dims[0] % block:
        raise HeaderError(
            f"is damaged: the {kind.name} tensor {name!r} has the impossible shape {dims}"
        )
    return TensorRecord(name, dims, kind, cursor.number("Q"), n_elements // block * block_bytes)


def _check_start(cursor: _Cursor) -> int:
    if bytes(cursor.data[:4]) != MAGIC:
        raise HeaderError("is not a GGUF file")
    cursor.skip(4)
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise HeaderError("is a big-endian GGUF; convert it with gguf-convert-endian first")
    if version not in VERSIONS:
        raise HeaderError(f"has GGUF version {version}; versions 2 and 3 are supported")
    return int(version)


def _alignment(cursor: _Cursor, keys: dict[str, KeyValue]) -> int:
    entry = keys.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.type != GGUFValueType.UINT32:
        raise HeaderError("is damaged: general.alignment is not a 32-bit count")
    alignment = int(struct.unpack_from("<I", cursor.data, entry.start)[0])
    if alignment == 0 or alignment & (alignment - 1):
        raise HeaderError(f"is damaged: general.alignment is {alignment}, not a power of two")
    return alignment


def _place(record: TensorRecord, data_start: int, alignment: int, file_bytes: int) -> TensorRecord:
    if record.offset % alignment:
        raise HeaderError(
            f"is damaged: the tensor {record.name!r} is not aligned to {alignment} bytes"
        )
    start = data_start + record.offset
    if start + record.n_bytes > file_bytes:
        raise HeaderError(
            f"is truncated: the tensor {record.name!r} ends at byte "
            f"{start + record.n_bytes} of {file_bytes}"
        )
    return TensorRecord(record.name, record.dims, record.type, start, record.n_bytes)


def parse_header(data: memoryview) -> Header:
    """Walk the header of a GGUF held in `data`.

    Args:
        data: The whole file (a memory map does).

    Raises:
        HeaderError: The file is not a GGUF, is truncated or contradicts itself.
    """
    cursor = _Cursor(data)
    version = _check_start(cursor)
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    if n_keys > cursor.left // MIN_KEY_BYTES or n_tensors > cursor.left // MIN_TENSOR_BYTES:
        raise HeaderError(f"is truncated: it promises {n_keys} keys and {n_tensors} tensors")
    keys: dict[str, KeyValue] = {}
    for _ in range(n_keys):
        entry = _read_key(cursor)
        if entry.key in keys:
            raise HeaderError(f"is damaged: the key {entry.key!r} stands twice")
        keys[entry.key] = entry
    records: dict[str, TensorRecord] = {}
    for _ in range(n_tensors):
        record = _read_tensor(cursor)
        if record.name in records:
            raise HeaderError(f"is damaged: the tensor {record.name!r} stands twice")
        records[record.name] = record
    alignment = _alignment(cursor, keys)
    data_start = -(-cursor.at // alignment) * alignment
    size = len(cursor.data)
    placed = {name: _place(record, data_start, alignment, size) for name, record in records.items()}
    return Header(version, alignment, keys, placed)


def decode_value(data: memoryview, entry: KeyValue) -> Any:
    """The Python value of a metadata entry; bytes that are not UTF-8 become U+FFFD."""
    cursor = _Cursor(data)
    cursor.at = entry.start
    if entry.type == GGUFValueType.STRING:
        return _decode_string(cursor)
    if entry.type != GGUFValueType.ARRAY:
        return cursor.number(SCALAR_FORMAT[entry.type])
    item = GGUFValueType(cursor.number("I"))
    count = cursor.number("Q")
    if item == GGUFValueType.STRING:
        return [_decode_string(cursor) for _ in range(count)]
    return list(struct.unpack_from(f"<{count}{SCALAR_FORMAT[item]}", cursor.data, cursor.at))


def _decode_string(cursor: _Cursor) -> str:
    n_bytes = cursor.number("Q")
    start = cursor.at
    cursor.skip(n_bytes)
    return str(cursor.data[start : cursor.at], "utf-8", errors="replace")
