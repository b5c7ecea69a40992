"""Trajectory files: round trip, torn tails, alterations."""

import struct
from pathlib import Path
from typing import Any

import pytest

from zo_gguf.errors import ZoError
from zo_gguf.tuning.trajectory import MAGIC, Direction, Record, Trajectory

HEADER = {"directions": 2, "optimizer": "adam", "seed": 3}
SIZE = 16 + 2 * 32 + 4


def record(step: int) -> Record:
    pair = (
        Direction(2**64 - step, 1.5, 1.25, 0.125 * step),
        Direction(step, 2.0, 1.0, -7.0),
    )
    return Record(step, 0.01 / step, pair)


def written(path: Path, n: int) -> Path:
    trajectory = Trajectory.create(path, HEADER)
    for step in range(1, n + 1):
        trajectory.append(record(step))
    trajectory.close()
    return path


def goes_on(path: Path, step: int) -> None:
    """The file has the records before a step, and with that one equals a file never disturbed."""
    trajectory = Trajectory.load(path)
    assert trajectory.n_records == step - 1
    trajectory.append(record(step))
    trajectory.close()
    assert path.read_bytes() == written(path.with_name("whole.bin"), step).read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    loaded = Trajectory.load(written(tmp_path / "t.bin", 5))
    assert loaded.header == HEADER
    assert list(loaded.records()) == [record(step) for step in range(1, 6)]
    assert loaded.n_records == 5


@pytest.mark.parametrize("torn", [1, 17, SIZE - 1])
def test_torn_last_record_is_dropped_and_overwritten(tmp_path: Path, torn: int) -> None:
    path = written(tmp_path / "t.bin", 4)
    path.write_bytes(path.read_bytes()[: -SIZE + torn])
    goes_on(path, 4)


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    original = written(tmp_path / "t.bin", 3).read_bytes()
    bad = tmp_path / "bad.bin"
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 0x10
        bad.write_bytes(data)
        with pytest.raises(ZoError):
            Trajectory.load(bad)


def test_swapped_records_are_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "t.bin", 3)
    data = path.read_bytes()
    head, body = data[: -3 * SIZE], data[-3 * SIZE :]
    path.write_bytes(head + body[SIZE : 2 * SIZE] + body[:SIZE] + body[2 * SIZE :])
    with pytest.raises(ZoError, match="Record 1"):
        Trajectory.load(path)


def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    path = written(tmp_path / "t.bin", 2)
    trajectory = Trajectory.load(path)
    trajectory.append(record(3))
    file = trajectory._file

    class Full:
        """A file that takes no more than ten bytes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: bytes) -> int:
            return file.write(data[:10])

    trajectory._file = Full()
    with pytest.raises(OSError, match="No space") as error:
        trajectory.append(record(4))
    assert error.value.filename == str(path)
    trajectory.close()
    goes_on(path, 4)


def test_the_last_record_can_be_taken_back(tmp_path: Path) -> None:
    trajectory = Trajectory.load(written(tmp_path / "t.bin", 2))
    trajectory.append(record(3))
    trajectory.drop_last()
    assert len(list(trajectory.records())) == 2
    trajectory.append(record(3))
    trajectory.close()
    assert trajectory.path.read_bytes() == written(tmp_path / "whole.bin", 3).read_bytes()


@pytest.mark.parametrize(
    "content", [b"x", MAGIC, b"GGUF" * 10, struct.pack("<8sII", MAGIC, 1 << 30, 0)]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(content)
    with pytest.raises(ZoError, match="--overwrite"):
        Trajectory.load(path)
    with pytest.raises(ZoError, match="check the path"):
        Trajectory.load(tmp_path / "none.bin")


@pytest.mark.parametrize("magic", [b"ZOTRAJ1\n", b"ZOTRAJ2\n"])
def test_a_file_of_an_older_version_says_which(tmp_path: Path, magic: bytes) -> None:
    path = written(tmp_path / "t.bin", 2)
    path.write_bytes(magic + path.read_bytes()[len(magic) :])
    with pytest.raises(ZoError, match=r"was written by zo-gguf 0\.1; read it with that version"):
        Trajectory.load(path)
