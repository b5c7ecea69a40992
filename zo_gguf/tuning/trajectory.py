"""The trajectory: seeds and projected gradients of every step, enough to replay a run.

Layout: 8 bytes magic, u32 length and u32 CRC of a JSON header, the header, then records of one
size: u64 step, f64 lr, and per direction u64 seed, f64 loss at +eps, f64 loss at -eps, f64
projected gradient, closed by a CRC-32. Little-endian. A record is one write, so a killed run leaves
at most a short last record, which is dropped; anything else that does not check is an error.
"""

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zo_gguf.config.tune import MAX_DIRECTIONS
from zo_gguf.errors import ZoError
from zo_gguf.system import atomic_write, require_file

MAGIC = b"ZOTRAJ3\n"
OLDER = {b"ZOTRAJ1\n": "0.1", b"ZOTRAJ2\n": "0.1"}  # magic -> the zo-gguf that reads it
_PREFIX = struct.Struct("<8sII")
_STEP = struct.Struct("<Qd")
_DIRECTION = struct.Struct("<Qddd")
_CRC = struct.Struct("<I")
_MAX_HEADER = 1 << 16


@dataclass(frozen=True)
class Direction:
    """Losses at theta + eps z(seed) and theta - eps z (theta itself, if one-sided).

    An estimator without directions has one of these, of the gradient that it computed: a CRC-32 of
    its bytes as the seed, the loss at theta twice, and its Euclidean norm.

    The step's gradient estimate is the mean over directions of projected_grad * z, for spsa
    (loss_plus - loss_minus) / (2 eps), after clipping if there was any.
    """

    seed: int
    loss_plus: float
    loss_minus: float
    projected_grad: float


@dataclass(frozen=True)
class Record:
    """One step: what was measured and the learning rate that was used."""

    step: int
    lr: float
    directions: tuple[Direction, ...]

    @property
    def loss(self) -> float:
        """Mean loss over all probes, the estimate of the training loss at this step."""
        return sum(d.loss_plus + d.loss_minus for d in self.directions) / (2 * len(self.directions))


class Trajectory:
    """A trajectory file.

    Attributes:
        path: The file.
        header: JSON values; `directions` (per record) is required, the rest is the caller's.
        n_records: Whole records in the file.
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int, n_records: int) -> None:
        self.path = path
        self.header = header
        self.n_records = n_records
        self._start = start
        self._file: IO[bytes] | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> "Trajectory":
        """Write a new file without records; `directions` sets the record size."""
        text = json.dumps(header, sort_keys=True, allow_nan=False).encode()
        with atomic_write(path) as file:
            file.write(_PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text)
        return cls.load(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """Open a file and check every record.

        Raises:
            ZoError: The file is missing, not a trajectory, or altered.
        """
        path = require_file(path, "trajectory")
        with open(path, "rb") as file:
            header = _read_header(file, path)
            start = file.tell()
        size = record_size(header)
        trajectory = cls(path, header, start, (path.stat().st_size - start) // size)
        for _ in trajectory.records():
            pass
        return trajectory

    def records(self) -> Iterator[Record]:
        """The records in order.

        Raises:
            ZoError: A record's checksum or step number is wrong.
        """
        size = record_size(self.header)
        with open(self.path, "rb") as file:
            file.seek(self._start)
            for number in range(self.n_records):
                record = _unpack(file.read(size))
                if record is None or record.step != number + 1:
                    raise ZoError(
                        f"Record {number + 1} of the trajectory {str(self.path)!r} is damaged; "
                        "restore the file, or start the run again with --overwrite."
                    )
                yield record

    def append(self, record: Record) -> None:
        """Add a record; it is in the file, whole, when this returns.

        Raises:
            OSError: The disk is full.
        """
        if self._file is None:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
            self._cut(self._file)  # drops a torn last record
        assert record.step == self.n_records + 1
        assert len(record.directions) == self.header["directions"]
        data = _pack(record)
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.n_records += 1

    def drop_last(self) -> None:
        """Take back the record that was appended last."""
        assert self._file is not None
        self.n_records -= 1
        self._cut(self._file)

    def cut(self, n_records: int) -> None:
        """Keep the first records only."""
        assert n_records <= self.n_records
        self.n_records = n_records
        with open(self.path, "r+b") as file:
            self._cut(file)

    def _cut(self, file: IO[bytes]) -> None:
        """End the file after the records that count."""
        file.truncate(self._start + self.n_records * record_size(self.header))
        file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Force the records onto the disk, which a checkpoint that builds on them needs."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def older_version(path: Path) -> str | None:
    """Which zo-gguf reads a trajectory, if it is an older one; None without such a file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return OLDER.get(file.read(len(MAGIC)))


def _read_header(file: IO[bytes], path: Path) -> dict[str, Any]:
    damaged = ZoError(
        f"{str(path)!r} is not a zo-gguf trajectory or its header is damaged; restore the file, or "
        "start the run again with --overwrite."
    )
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise damaged
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic in OLDER:
        raise ZoError(
            f"The trajectory {str(path)!r} was written by zo-gguf {OLDER[magic]}; read it with "
            "that version."
        )
    if magic != MAGIC or length > _MAX_HEADER:
        raise damaged
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != crc:
        raise damaged
    header = json.loads(text)
    if not isinstance(header, dict):
        raise damaged
    n = header.get("directions")
    if type(n) is not int or not 1 <= n <= MAX_DIRECTIONS:
        raise damaged
    return header


def record_size(header: dict[str, Any]) -> int:
    """Bytes of a record of a trajectory with this header."""
    return int(_STEP.size + header["directions"] * _DIRECTION.size + _CRC.size)


def _pack(record: Record) -> bytes:
    body = _STEP.pack(record.step, record.lr)
    for d in record.directions:
        body += _DIRECTION.pack(d.seed, d.loss_plus, d.loss_minus, d.projected_grad)
    return body + _CRC.pack(zlib.crc32(body))


def _unpack(data: bytes) -> Record | None:
    body = data[: -_CRC.size]
    if zlib.crc32(body) != _CRC.unpack(data[-_CRC.size :])[0]:
        return None
    step, lr = _STEP.unpack_from(body)
    directions = tuple(
        Direction(*_DIRECTION.unpack_from(body, offset))
        for offset in range(_STEP.size, len(body), _DIRECTION.size)
    )
    return Record(step, lr, directions)
