"""What `methods.py` takes on its command line, and what it refuses."""

import json
from pathlib import Path

import pytest

from tools.compare import methods as compare_methods
from tools.compare.entries import Entry


def test_rates_of_an_earlier_comparison(tmp_path: Path) -> None:
    outcomes = [
        {"label": "a", "multiplier": 3.0, "failure": ""},
        {"label": "b", "multiplier": 1.0, "failure": ""},
    ]
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({"outcomes": outcomes}))
    found = compare_methods.with_rates_of([Entry("b"), Entry("a"), Entry("new")], path)
    assert [entry.label for entry in found] == ["b", "a", "new"]
    assert [entry.rates for entry in found] == [(1.0,), (1.0, 3.0), Entry("new").rates]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--rates", "1", "0"], "--rates must be greater than 0"),
        (["--rates-of", "no-such.json"], "The comparison 'no-such.json' is not a file"),
        (["--rates-of", __file__], "is no compare.json of an earlier comparison"),
        (["--rates-of", "EMPTY"], "has no result of any entry"),
        (["--only", "("], "no regular expression"),
        (["--only", "nothing-like-it"], "matches none of: sensitive, spsa, sgd, shuffled rows;"),
        ([], "no-such-data"),
    ],
)
def test_bad_options_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--models", str(tmp_path), "--name", "m", "--out", str(tmp_path / "out")]
    empty = tmp_path / "compare.json"
    empty.write_text('{"outcomes": []}')
    words = [str(empty) if word == "EMPTY" else word for word in words]
    data = ["--data", str(tmp_path / "no-such-data")]
    assert compare_methods.main([*paths, *data, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
