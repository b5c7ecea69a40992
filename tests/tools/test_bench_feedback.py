"""bench/feedback.py on a tiny model: its tables."""

import json
from pathlib import Path

import pytest

from tests.helpers.architectures import converted
from tools.bench import feedback


def test_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"red {word}", "completion": " blue"} for word in ("one", "two", "three")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["feedback.py", str(converted("llama").gguf), "--data", str(data)]
    monkeypatch.setattr("sys.argv", [*command, "--rounds", "1", "--threads", "1"])
    assert feedback.main() == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[1:]]
    cosines, costs = lines[2 : len(lines) // 2], lines[len(lines) // 2 + 2 :]
    assert [line[0].strip() for line in cosines] == [line[0].strip() for line in costs]
    for line in cosines:
        assert float(line[3]) > 0.999
    assert float(cosines[-1][2]) < 0.99  # attention is passed by
    for line in costs:
        assert float(line[4].split()[0]) > 0
        assert float(line[6]) > 0.5


def test_refuses_other_architectures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "red", "completion": " blue"}) + "\n")
    command = ["feedback.py", str(converted("gpt2").gguf), "--data", str(data)]
    monkeypatch.setattr("sys.argv", command)
    assert feedback.main() == 2
    assert "need a model of llama's architecture, not 'gpt2'" in capsys.readouterr().err
