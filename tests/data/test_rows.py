"""Data files: formats, splits, and every kind of bad row and file."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stand_ins import CHAT, CHOICES, COMPLETION, FakeEngine, load, marked, write
from zo_gguf.data.dataset import load_examples, load_train_valid, resolve_split
from zo_gguf.errors import ZoError


def test_json_list_and_byte_order_mark(tmp_path: Path) -> None:
    expected = load(tmp_path, COMPLETION, CHOICES)
    file = tmp_path / "d.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([COMPLETION, CHOICES], indent=1).encode())
    rows = load_examples(file, FakeEngine())
    assert [r.tokens for r in rows] == [r.tokens for r in expected]
    assert rows[1].source == "d.json#2"
    file = tmp_path / "bom.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(COMPLETION).encode())
    assert load_examples(file, FakeEngine())[0].tokens == expected[0].tokens


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    with open(file, "w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "choices", "answer"])
        writer.writerow(["two\nlines", json.dumps(CHOICES["choices"]), "1"])
        writer.writerow(["on", json.dumps(CHOICES["choices"]), " world"])
    engine = FakeEngine()
    rows = load_examples(file, engine)
    assert [r.answer for r in rows] == [1, 0]
    assert marked(rows[0], engine) == "<s>two\nlines{} sports{}"
    assert rows[1].source == "d.csv:4"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1\n", "d.csv:2: the row has not 2 cells"),
        ("a,b\n1,2,3\n", "d.csv:2: the row has not 2 cells"),
        ("prompt,prompt\n1,2\n", "d.csv:1: two columns have the same name"),
        ('prompt,completion\n"1"x,2\n', "d.csv:2: not valid CSV"),
        ("prompt,choices,answer\np,[1,0\n", "d.csv:2: "),
        ("prompt,completion\n", "has no rows"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "d.csv"
    file.write_text(content)
    with pytest.raises(ZoError) as caught:
        load_examples(file, FakeEngine())
    assert sentence in str(caught.value)


def test_long_cells_and_the_line_of_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"text\n{'a ' * 100_000}\n")
    assert len(load_examples(tmp_path / "d.csv", FakeEngine())) == 1
    (tmp_path / "d.json").write_text('[{"text": "a"},\n {"text": b}]')
    with pytest.raises(ZoError, match=r"d\.json: .*Expecting value at line 2, column 11"):
        load_examples(tmp_path / "d.json", FakeEngine())


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"prompt": "a" "b"}', "not valid JSON: Expecting ',' delimiter at column 16"),
        ('{"prompt": "a', "not valid JSON"),
        ('"text"', "a row must be an object with keys, not 'text'"),
        ("[" * 5000 + "]" * 5000, "not"),
        ('{"text": ' + "9" * 5000 + "}", "not usable JSON"),
        ({}, "has nothing"),
        ({"Text": "x"}, "but has 'Text'; name the columns with --field"),
        ({"prompt": "x"}, "but has 'prompt'"),
        ({"text": ""}, "text is empty"),
        ({"text": 3}, "text must be text, not 3"),
        ({"text": "\ud800"}, "half a surrogate pair"),
        ({"completion": "x"}, "the key 'prompt' is missing"),
        ({"prompt": "", "completion": "x"}, "prompt is empty"),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": None, "completion": "x"}, "prompt must be text, not None"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preference rows"),
        ({**CHOICES, "choices": " world"}, "choices must list two or more texts"),
        ({**CHOICES, "choices": [" world"]}, "choices must list two or more texts"),
        ({**CHOICES, "choices": ["a", 2]}, "every choice must be a text, not 2"),
        ({**CHOICES, "choices": ["a", ""]}, "every choice must be a text, not ''"),
        ({**CHOICES, "choices": ["a", "b", "a"]}, "the choice 'a' is listed twice"),
        ({"prompt": "x", "choices": ["a", "b"]}, "the key 'answer' is missing"),
        ({**CHOICES, "answer": 2}, "answer must be an index from 0 to 1"),
        ({**CHOICES, "answer": -1}, "answer must be an index from 0 to 1"),
        ({**CHOICES, "answer": True}, "answer must be an index from 0 to 1"),
        ({**CHOICES, "answer": 1.0}, "answer must be an index from 0 to 1"),
        ({**CHOICES, "answer": "politics"}, "or the text of a choice, not 'politics'"),
        ({**CHOICES, "answer": "9" * 5000}, "answer must be an index"),
        ({"instruction": "x"}, "the key 'output' is missing"),
        ({"messages": []}, "messages must be a list of turns"),
        ({"messages": ["hi"]}, "message 1 needs a `role`"),
        ({"messages": [{"content": "hi"}]}, "message 1 needs a `role`"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no turn has the role assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "message 1 (assistant) is empty"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "message 1 needs text content"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "message 1 has parts that are not text",
        ),
        ({**CHAT, "tools": "search"}, "tools must be a list of objects"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown speaker 'alien'"),
        ({"conversations": "x"}, "conversations must list turns"),
        ({"prompt": CHAT["messages"][:1], "completion": "x"}, "`prompt` must be a list"),
        (CHAT, "the model has no chat template"),
        ({"text": "x" * 3}, ""),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: Any, sentence: str) -> None:
    if not sentence:  # the control: the good row before the bad one is good
        assert len(load(tmp_path, COMPLETION, row)) == 2
        return
    with pytest.raises(ZoError) as caught:
        load(tmp_path, COMPLETION, row)
    assert str(caught.value).startswith("d.jsonl:2: ")
    assert sentence in str(caught.value)


def test_choices_that_the_tokenizer_cannot_tell_apart(tmp_path: Path) -> None:
    class Deaf(FakeEngine):
        def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
            return super().tokenize(text.replace("é", "e").replace("~", ""))

    with pytest.raises(ZoError, match=r"d.jsonl:1: the choice 'é' has the same tokens"):
        load(tmp_path, {"prompt": "p", "choices": ["é", "e"], "answer": 0}, engine=Deaf())
    with pytest.raises(ZoError, match="the choice '~' has no tokens of its own"):
        load(tmp_path, {"prompt": "p", "choices": ["~", "e"], "answer": 0}, engine=Deaf())
    with pytest.raises(ZoError, match="the completion has no tokens of its own"):
        load(tmp_path, {"prompt": "p", "completion": "~"}, engine=Deaf())
    with pytest.raises(ZoError, match="the prompt has no tokens"):
        load(tmp_path, {"prompt": "~", "completion": "x"}, engine=Deaf(add_bos=False))
    with pytest.raises(ZoError, match="single token"):
        load(tmp_path, {"text": "x"}, engine=Deaf(add_bos=False))


def test_bad_files(tmp_path: Path) -> None:
    engine = FakeEngine()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9t\xe9"}\n')
    (tmp_path / "list.json").write_text('[{"text": "ab"}')
    cases = {
        "none.jsonl": "is not a file",
        "empty.jsonl": "is empty",
        "blank.jsonl": "has no rows",
        "d.parquet": "must end in .jsonl, .json or .csv",
        "latin.jsonl": "latin.jsonl:1: not UTF-8",
        "list.json": "list.json: not valid JSON",
    }
    for name, sentence in cases.items():
        with pytest.raises(ZoError) as caught:
            load_examples(tmp_path / name, engine)
        assert sentence in str(caught.value)


# ---- splits --------------------------------------------------------------------------------------


def test_folders_hold_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", COMPLETION)
    write(tmp_path / "valid.json", COMPLETION)
    assert resolve_split(tmp_path, "train").name == "train.jsonl"
    assert resolve_split(tmp_path, "valid").name == "valid.json"
    assert resolve_split(tmp_path / "train.jsonl", "valid").name == "train.jsonl"
    assert len(load_examples(tmp_path, FakeEngine(), split="train")) == 1
    with pytest.raises(ZoError, match=r"no test.jsonl; its data files: train.jsonl, valid.json"):
        resolve_split(tmp_path, "test")
    with pytest.raises(ZoError, match="is a folder"):
        load_examples(tmp_path, FakeEngine())


def test_valid_file_goes_before_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[COMPLETION] * 10)
    assert [len(x) for x in load_train_valid(tmp_path, FakeEngine(), val_split=0.2)] == [8, 2]
    write(tmp_path / "valid.jsonl", *[COMPLETION] * 3)
    assert [len(x) for x in load_train_valid(tmp_path, FakeEngine(), val_split=0.2)] == [10, 3]


def test_split_of_one_file_is_stable_and_complete(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:03d}", "completion": "x"} for i in range(200)]
    file = write(tmp_path / "d.jsonl", *rows)
    train, valid = load_train_valid(file, FakeEngine(), val_split=0.1)
    again = load_train_valid(file, FakeEngine(), val_split=0.1)
    assert (train, valid) == again
    assert len(valid) == 20
    lines = sorted(int(e.source.split(":")[1]) for e in train + valid)
    assert lines == list(range(1, 201))
    # Files often cycle through their classes: validation rows must not follow any period.
    held = [int(e.source.split(":")[1]) for e in valid]
    assert all(len({line % period for line in held}) == period for period in (2, 3, 4, 5))


def test_split_of_few_rows(tmp_path: Path) -> None:
    two = write(tmp_path / "two.jsonl", COMPLETION, COMPLETION)
    assert [len(x) for x in load_train_valid(two, FakeEngine(), val_split=0.01)] == [1, 1]
    assert [len(x) for x in load_train_valid(two, FakeEngine(), val_split=0.99)] == [1, 1]
    assert [len(x) for x in load_train_valid(two, FakeEngine(), val_split=0)] == [2, 0]
    one = write(tmp_path / "one.jsonl", COMPLETION)
    with pytest.raises(ZoError, match="set --val-split 0"):
        load_train_valid(one, FakeEngine(), val_split=0.05)


def test_warnings_are_silent_where_nothing_was_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load(tmp_path, COMPLETION, CHOICES)
    assert caplog.text == ""
