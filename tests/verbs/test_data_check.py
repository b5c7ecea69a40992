"""`data check`: counts against hand-made rows, the marked row, all bad rows at once."""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stand_ins import CHAT, CHATML, CHOICES, COMPLETION, FakeEngine, write
from zo_gguf.config import DataCheckConfig
from zo_gguf.errors import ZoError
from zo_gguf.verbs.data_check import DataCheck, data_check

ENDLESS = "{% for m in messages %}{{ m.content }};{% endfor %}"


def check(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> DataCheck:
    engine = FakeEngine(chat_template=options.pop("chat_template", None))
    module = importlib.import_module("zo_gguf.verbs.data_check")
    monkeypatch.setattr(module, "Engine", lambda *_, **__: engine)
    return data_check(DataCheckConfig(data=path, model="m.gguf", **options))


def test_counts_by_file_and_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"prompt": "x" * 40, "completion": "yes"}
    write(tmp_path / "train.jsonl", COMPLETION, CHOICES, CHOICES, long)
    write(tmp_path / "test.jsonl", {"text": "123"})
    result = check(tmp_path, monkeypatch, max_seq_length=20)
    train, choices, test = result.summaries
    assert (train.file, train.kind, train.rows, train.cut) == ("train.jsonl", "completion", 2, 1)
    # <s> a s k | space y e s </s> = 9; the long row is cut to 20 and counts y e s </s>.
    assert (train.min_length, train.median_length, train.max_length) == (9, 14.5, 20)
    assert (train.counted, train.unended) == (5 + 4, 0)
    assert (choices.kind, choices.rows, choices.counted, choices.cut) == ("choices", 2, 2, 0)
    assert (test.file, test.kind, test.max_length, test.counted) == ("test.jsonl", "text", 4, 3)


def test_marks_counted_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d.jsonl", COMPLETION, CHOICES)
    text = check(tmp_path / "d.jsonl", monkeypatch, row=2).render()
    assert "d.jsonl:2: 4 tokens, 1 BOS" in text
    assert "<s>on« sports»" in text
    assert "choices: ' world', ' sports' (right)" in text
    first = json.loads(check(tmp_path / "d.jsonl", monkeypatch).render(as_json=True))
    assert first["row"]["runs"] == [["<s>ask", False], [" yes</s>", True]]


def test_colour_only_on_a_terminal_that_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "d.jsonl", CHOICES)
    result = check(tmp_path / "d.jsonl", monkeypatch)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "on\x1b[1;32m sports\x1b[0m" in result.render()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "on« sports»" in result.render()


def test_data_cannot_steer_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d.jsonl", {"text": "a\x1b[2Jb\nc"})
    text = check(tmp_path / "d.jsonl", monkeypatch).render()
    assert "\x1b" not in text
    assert "a\\x1b[2Jb\nc" in text


def test_says_that_a_template_writes_no_end_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "d.jsonl", CHAT)
    endless = check(tmp_path / "d.jsonl", monkeypatch, chat_template=ENDLESS)
    assert [s.unended for s in endless.summaries] == [1]
    ended = check(tmp_path / "d.jsonl", monkeypatch, chat_template=CHATML)
    assert [s.unended for s in ended.summaries] == [0]


def test_lists_all_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", COMPLETION, {"prompt": "x"}, "{", *[{}] * 30)
    write(tmp_path / "test.jsonl", {"text": ""})
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ZoError, match="33 of 34 rows cannot be used"),
    ):
        check(tmp_path, monkeypatch)
    assert "train.jsonl:2: needs" in caplog.text
    assert "train.jsonl:3: not valid JSON" in caplog.text
    assert "... and 13 more" in caplog.text


def test_missing_rows_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZoError, match=r"has no train.jsonl"):
        check(tmp_path, monkeypatch)
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(ZoError, match="The data has no rows"):
        check(tmp_path, monkeypatch)
    write(tmp_path / "train.jsonl", COMPLETION)
    with pytest.raises(ZoError, match="row 2 does not exist; the data has 1 rows"):
        check(tmp_path, monkeypatch, row=2)
