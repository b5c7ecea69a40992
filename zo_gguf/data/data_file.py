"""Data files as raw rows: JSONL, JSON lists and CSV, each row with its file and line.

What the keys of a row mean is not known here (`rows.py`).
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zo_gguf.errors import ZoError
from zo_gguf.files import require_file

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_MAX_CELL = 1 << 30  # bytes, where the csv module has 131072
_BOM = b"\xef\xbb\xbf"
RawRow = tuple[str, dict[str, Any] | ZoError]  # source, row


def read_raw(path: Path) -> Iterator[RawRow]:
    """Yield (source, row) for every row, or the error in place of a row that cannot be read.

    Raises:
        ZoError: The file is missing, empty, of an unknown type, or broken as a whole.
    """
    path = require_file(path, "data file")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _read_csv(path)
    elif suffix in _JSON_SUFFIXES:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(_BOM).lstrip()
        yield from _read_list(path) if start.startswith(b"[") else _read_lines(path)
    else:
        raise ZoError(
            f"The data file {str(path)!r} must end in .jsonl, .json or .csv; convert it to JSONL."
        )


def _read_lines(path: Path) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                source = f"{path.name}:{number}"
                yield source, _decode(source, line)


def _read_list(path: Path) -> Iterator[RawRow]:
    rows = _parse_json(path.name, path.read_bytes().removeprefix(_BOM))
    for number, row in enumerate(rows, start=1):
        source = f"{path.name}#{number}"
        yield source, row if isinstance(row, dict) else _not_an_object(source, row)


def _read_csv(path: Path) -> Iterator[RawRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZoError(f"{path.name}: not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    csv.field_size_limit(_MAX_CELL)
    # newline="" keeps line breaks inside quoted cells.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
    except csv.Error as error:
        raise ZoError(f"{path.name}:1: not valid CSV: {error}.") from error
    if len(set(header)) < len(header):
        raise ZoError(f"{path.name}:1: two columns have the same name; rename one of them.")
    while True:
        source = f"{path.name}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield source, ZoError(f"{source}: not valid CSV: {error}.")
            return  # the reader has lost its place
        if row is None:
            return
        source = f"{path.name}:{reader.line_num}"
        if None in row or None in row.values():
            yield source, ZoError(f"{source}: the row has not {len(header)} cells like the header.")
        else:
            yield source, {key: _csv_value(key, value) for key, value in row.items()}


def _csv_value(key: str, value: str) -> Any:
    """Cells are text, but lists can only be written as JSON."""
    if key in ("choices", "messages", "conversations", "tools") and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # the check of the row says what is wrong
    return value


def _decode(source: str, line: bytes) -> dict[str, Any] | ZoError:
    try:
        row = _parse_json(source, line)
    except ZoError as error:
        return error
    return row if isinstance(row, dict) else _not_an_object(source, row)


def _parse_json(source: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ZoError(f"{source}: not UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in content.strip() else ""
        where = f"{line}column {error.colno}"
        raise ZoError(f"{source}: not valid JSON: {error.msg} at {where}.") from error
    except (ValueError, RecursionError) as error:
        raise ZoError(f"{source}: not usable JSON: {error}.") from error


def _not_an_object(source: str, row: Any) -> ZoError:
    return ZoError(f"{source}: a row must be an object with keys, not {shown(row)}.")


def shown(value: Any) -> str:
    """`repr` of a value from a file, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
