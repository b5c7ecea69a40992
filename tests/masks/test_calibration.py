"""Calibration text: files of both kinds, the C4 stream, and how tokens become blocks."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from zo_gguf.errors import ZoError
from zo_gguf.masks.calibration import load_documents, token_blocks


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    """One token per character, with a 1 in front, as a real tokenizer puts its BOS."""
    return {"input_ids": [1, *map(ord, text)]}


def test_jsonl_and_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    rows = [{"text": "one"}, {"text": "  "}, {"text": "two", "id": 7}, {"text": "three"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
    documents, recipe = load_documents(str(path), 2)
    assert documents == ["one", "two"]
    assert recipe["source"] == "text.jsonl"
    assert recipe["documents"] == 2
    assert len(recipe["sha256"]) == 64


def test_txt_documents_are_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\nline\n\n\n  \ntwo\n\nthree")
    assert load_documents(str(path), 9)[0] == ["one\nline\n", "two\n", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}', r"Line 2 of .*a\.jsonl"),
        ("a.jsonl", '{"text": 5}', "Line 1"),
        ("a.jsonl", "[1]", "Line 1"),
        ("a.jsonl", "{", "Line 1"),
        ("a.txt", "\n \n", "holds no text"),
        ("a.csv", "x", r"\.jsonl.*\.txt"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ZoError, match=message):
        load_documents(str(path), 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZoError, match=r"none\.jsonl"):
        load_documents(str(tmp_path / "none.jsonl"), 3)


def fake_datasets(rows: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    module: Any = ModuleType("datasets")
    module.load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or rows()
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    return calls


def test_c4_is_streamed_and_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield from ({"text": "a"}, {"text": "b"})
        raise AssertionError("read too far")

    calls = fake_datasets(rows, monkeypatch)
    documents, recipe = load_documents("c4", 2)
    assert documents == ["a", "b"]
    assert recipe == {"source": "allenai/c4/en/train", "documents": 2}
    assert calls == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_c4_offline_or_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        raise ConnectionError("no route\nto host")

    fake_datasets(rows, monkeypatch)
    with pytest.raises(ZoError, match=r"ConnectionError: no route\); go online.*--calibration"):
        load_documents("c4", 2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ZoError, match=r"zo-gguf\[hf\]"):
        load_documents("c4", 2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ZoError, match="HF_HUB_OFFLINE"):
        load_documents("c4", 2)


def test_blocks_cut_the_stream_of_all_documents() -> None:
    blocks = token_blocks(["abcdefg", "hij"], tokenizer, 5)
    stream = [1, *map(ord, "abcdefg"), 1, *map(ord, "hij")]
    assert [block.tolist() for block in blocks] == [stream[0:5], stream[5:10]]
    assert blocks[0].dtype == np.int64


def test_text_shorter_than_a_block_is_one_block() -> None:
    assert [len(block) for block in token_blocks(["abcdefghi"], tokenizer, 256)] == [10]
    with pytest.raises(ZoError, match="only 4 tokens"):
        token_blocks(["abc"], tokenizer, 256)
