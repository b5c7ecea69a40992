"""Rows of a data file (JSONL, JSON lists, CSV), checked before any tokenizer is involved.

A row is recognized by its keys. A bad row becomes a `ZoError` that names file and line, so that one
pass can report all of them.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_gguf.errors import ZoError
from zo_gguf.system import require_file

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


# ---- rows ----------------------------------------------------------------------------------------


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
_SHAPES = (
    "`prompt`+`completion`, `prompt`+`choices`+`answer`, `messages`, `text`, "
    "`instruction`+`output` or `conversations`"
)


@dataclass(frozen=True)
class Row:
    """One checked row.

    Attributes:
        source: File and line, such as "train.jsonl:17" (rows of a JSON list: "train.json#17").
        kind: completion, choices, messages or text.
        prompt: What comes before the counted part; "" for messages and text.
        completion: The counted text of a completion row; the whole text of a text row.
        choices: The choices of a choices row.
        answer: Index of the right choice, -1 without choices.
        messages: Chat messages, each with "role" and mostly "content".
        tools: Tool descriptions for the chat template.
        converted: Name of the shape that was converted, "" if none was.
    """

    source: str
    kind: str
    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    converted: str = ""


def read_rows(
    path: Path, fields: Mapping[str, str] | None = None, chat: bool = False
) -> Iterator[Row | ZoError]:
    """Yield every row of a file, or the error that makes it unusable.

    Args:
        path: A .jsonl, .json or .csv file.
        fields: Key to read -> column that holds it.
        chat: Whether the model has a chat template; instruction rows then become messages.

    Raises:
        ZoError: The file is missing, empty, or of an unknown type.
    """
    for source, raw in read_raw(path):
        if isinstance(raw, ZoError):
            yield raw
            continue
        try:
            yield _parse(source, _rename(source, raw, fields or {}), chat)
        except ZoError as error:
            yield error


def _rename(source: str, raw: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    row = dict(raw)
    for key, column in fields.items():
        if column not in raw:
            have = ", ".join(map(repr, raw)) or "nothing"
            raise ZoError(f"{source}: no column {column!r} for {key!r}; the row has {have}.")
        row[key] = raw[column]
    return row


def _parse(source: str, row: dict[str, Any], chat: bool) -> Row:
    if "messages" in row:
        return _messages(source, row, row["messages"])
    if "conversations" in row:
        return _conversation(source, row)
    if "choices" in row:
        return _choices(source, row)
    if "prompt" in row and ("chosen" in row or "rejected" in row):
        raise ZoError(f"{source}: preference rows cannot be used; give `prompt`+`completion` rows.")
    if "completion" in row:
        return _completion(source, row)
    if "instruction" in row:
        return _instruction(source, row, chat)
    if "text" in row:
        return Row(source, "text", completion=_text(source, row, "text"))
    have = ", ".join(map(repr, row)) or "nothing"
    raise ZoError(
        f"{source}: needs {_SHAPES}, but has {have}; name the columns with --field KEY=NAME."
    )


def _completion(source: str, row: dict[str, Any]) -> Row:
    prompt, completion = _need(source, row, "prompt"), row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt, completion = _text(source, row, "prompt"), _text(source, row, "completion")
        return Row(source, "completion", prompt=prompt, completion=completion)
    if not (isinstance(prompt, list) and isinstance(completion, list) and len(completion) == 1):
        raise ZoError(
            f"{source}: with messages, `prompt` must be a list of them and `completion` a list "
            "with one; put longer chats into `messages`."
        )
    parsed = _messages(source, row, prompt + completion)
    if parsed.messages[-1]["role"] != "assistant":
        raise ZoError(f"{source}: the message in `completion` must have the role assistant.")
    return parsed


def _choices(source: str, row: dict[str, Any]) -> Row:
    prompt, choices = _text(source, row, "prompt"), row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ZoError(f"{source}: choices must list two or more texts, not {shown(choices)}.")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ZoError(f"{source}: every choice must be a text, not {shown(choice)}.")
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise ZoError(f"{source}: the choice {twice!r} is listed twice; choices must differ.")
    answer = _answer(source, choices, _need(source, row, "answer"))
    return Row(source, "choices", prompt=prompt, choices=tuple(choices), answer=answer)


def _answer(source: str, choices: list[str], answer: Any) -> int:
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if answer.isascii() and answer.isdigit():
            answer = int(answer[:9])
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ZoError(
        f"{source}: answer must be an index from 0 to {len(choices) - 1} or the text of a choice, "
        f"not {shown(answer)}."
    )


def _instruction(source: str, row: dict[str, Any], chat: bool) -> Row:
    prompt, output = _text(source, row, "instruction"), _text(source, row, "output")
    if row.get("input"):
        prompt += "\n\n" + _text(source, row, "input")
    if not chat:
        return Row(
            source, "completion", prompt + "\n\n", output, converted="instruction/input/output"
        )
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": output})
    return Row(source, "messages", messages=turns, converted="instruction/input/output")


def _conversation(source: str, row: dict[str, Any]) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ZoError(f"{source}: conversations must list turns, not {shown(turns)}.")
    messages = []
    for turn in turns:
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
            raise ZoError(f"{source}: unknown speaker {shown(speaker)}; use human, gpt or system.")
        content = turn.get("value", turn.get("content"))
        messages.append({"role": _ROLES[speaker.lower()], "content": content})
    return _messages(source, row, messages, converted="conversations")


def _messages(source: str, row: dict[str, Any], turns: Any, converted: str = "") -> Row:
    if not isinstance(turns, list) or not turns:
        raise ZoError(f"{source}: messages must be a list of turns, not {shown(turns)}.")
    messages = tuple(_message(source, number, turn) for number, turn in enumerate(turns, start=1))
    if not any(message["role"] == "assistant" for message in messages):
        raise ZoError(f"{source}: no turn has the role assistant, so nothing could be learned.")
    tools = row.get("tools") or None
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise ZoError(f"{source}: tools must be a list of objects, not {shown(tools)}.")
    return Row(
        source,
        "messages",
        messages=messages,
        tools=tuple(tools) if tools else None,
        converted=converted,
    )


def _message(source: str, number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not turn["role"]:
        raise ZoError(f"{source}: message {number} needs a `role`, but is {shown(turn)}.")
    content = turn.get("content")
    if isinstance(content, list):  # OpenAI's list of parts
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise ZoError(f"{source}: message {number} has parts that are not text.")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ZoError(f"{source}: message {number} needs text content, not {shown(content)}.")
    if not content and not turn.get("tool_calls"):
        raise ZoError(f"{source}: message {number} ({turn['role']}) is empty.")
    # Data sets fill absent keys with null, which templates would take for a tool call.
    given = {key: value for key, value in turn.items() if value is not None or key == "content"}
    return {**given, "content": content} if "content" in turn else given


def _need(source: str, row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise ZoError(f"{source}: the key {key!r} is missing.")
    return row[key]


def _text(source: str, row: dict[str, Any], key: str) -> str:
    value = _need(source, row, key)
    if not isinstance(value, str):
        raise ZoError(f"{source}: {key} must be text, not {shown(value)}.")
    if not value:
        raise ZoError(f"{source}: {key} is empty.")
    return value
