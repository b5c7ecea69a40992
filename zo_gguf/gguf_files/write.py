"""Write GGUF files: a copy of one with some tensors and keys replaced, or a small new one.

Everything that is not replaced keeps its bytes: keys in their order with their exact values (tokens
that are not UTF-8 included), tensors in their order. gguf.GGUFWriter is not used because it decodes
every value and leaves out empty ones.
"""

import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from zo_gguf.errors import DoesNotFitError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.header import DEFAULT_ALIGNMENT, MAGIC
from zo_gguf.system import atomic_write

Value = str | bool | int | float
Bytes = NDArray[np.uint8]

_VERSION = 3
_CHUNK = 1 << 24  # bytes
_SPARE_DISK = 1 << 20  # bytes left free beyond the file itself


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: `make` gives its bytes when their turn comes, so few are held at once.

    `shape` is in numpy order, rows first.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], Bytes]

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        n_elements = 1
        for size in self.shape:
            n_elements *= size
        return n_elements // block * block_bytes


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def key_record(key: str, value: Value) -> bytes:
    """A metadata entry as it stands in a file; integers become uint32, or int64 where they must."""
    if isinstance(value, str):
        kind, data = GGUFValueType.STRING, _string(value)
    elif isinstance(value, bool):
        kind, data = GGUFValueType.BOOL, struct.pack("<?", value)
    elif isinstance(value, float):
        kind, data = GGUFValueType.FLOAT32, struct.pack("<f", value)
    elif 0 <= value < 1 << 32:
        kind, data = GGUFValueType.UINT32, struct.pack("<I", value)
    else:
        kind, data = GGUFValueType.INT64, struct.pack("<q", value)
    return _string(key) + struct.pack("<I", kind) + data


def check_disk(path: Path, n_bytes: int) -> None:
    """Raise DoesNotFitError unless the disk under `path` has room for `n_bytes` more."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_DISK:
        raise DoesNotFitError(
            f"{str(path)!r} needs {n_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in "
            f"{str(folder)!r}; free some or write elsewhere."
        )


def write_gguf(
    path: Path,
    keys: Sequence[bytes],
    tensors: Sequence[NewTensor],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a complete GGUF, atomically.

    Args:
        path: The file.
        keys: Metadata records (see key_record); must hold general.alignment unless it is 32.
        tensors: In file order.
        alignment: Of every tensor's start, in bytes.

    Raises:
        DoesNotFitError: The disk is too small.
    """
    head = [struct.pack("<4sIQQ", MAGIC, _VERSION, len(tensors), len(keys)), *keys]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        head.append(_string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        head.append(struct.pack("<IQ", tensor.type, offset))
        offset += -(-tensor.n_bytes // alignment) * alignment
    check_disk(path, sum(map(len, head)) + alignment + offset)
    with atomic_write(path) as file:
        file.writelines(head)
        _pad(file, alignment)
        for tensor in tensors:
            _write_data(file, tensor)
            _pad(file, alignment)


def _write_data(file: IO[bytes], tensor: NewTensor) -> None:
    data = tensor.make().reshape(-1)
    assert data.dtype == np.uint8
    assert data.nbytes == tensor.n_bytes, (tensor.name, data.nbytes, tensor.n_bytes)
    for start in range(0, data.nbytes, _CHUNK):
        file.write(data[start : start + _CHUNK].data)


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def copy_gguf(
    base: GgufFile,
    path: Path,
    *,
    replace: Mapping[str, NewTensor],
    keys: Mapping[str, Value | None],
) -> None:
    """Write `base` again with some tensors and metadata replaced or added.

    Args:
        base: The file to copy; must not be `path`.
        path: The file to write, atomically.
        replace: New tensors by name; shapes as in `base`.
        keys: New values; keys that `base` lacks are added at the end, None leaves a key out.

    Raises:
        DoesNotFitError: The disk is too small.
    """
    records = []
    for key, entry in base.header.keys.items():
        value = keys.get(key)
        if value is not None:
            records.append(key_record(key, value))
        elif key not in keys:
            records.append(base.data[entry.key_start : entry.end].tobytes())
    for key, value in keys.items():
        if key not in base.header.keys and value is not None:
            records.append(key_record(key, value))
    tensors = [replace[name] if name in replace else _kept(base, name) for name in base.tensors]
    for tensor in tensors:
        assert tensor.shape == base.tensors[tensor.name].shape
    write_gguf(path, records, tensors, alignment=base.header.alignment)


def _kept(base: GgufFile, name: str) -> NewTensor:
    info = base.tensors[name]
    return NewTensor(name, info.shape, info.type, lambda: base.raw(name))
