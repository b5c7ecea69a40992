"""Evaluation: means, standard errors and perplexity against the standard library."""

import importlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.stand_ins import CHOICES, COMPLETION, FakeEngine, write
from zo_gguf.config import EvalConfig
from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.batch import Scores
from zo_gguf.engine.evaluation import EvalResult, counted_tokens, measure, summarize
from zo_gguf.errors import ZoError
from zo_gguf.verbs.evaluate import evaluate

NAN = float("nan")


def run(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> EvalResult:
    module = importlib.import_module("zo_gguf.verbs.evaluate")
    monkeypatch.setattr(module, "Engine", lambda *_, **__: FakeEngine())
    return evaluate(EvalConfig(model="m.gguf", data=path, **options))


def test_choices_give_accuracy_with_standard_errors() -> None:
    losses, correct = [0.5, 1.25, 2.0, 0.75], [1.0, 0.0, 0.0, 1.0]
    result = summarize(np.array(losses), np.array(correct))
    assert result.n == 4
    assert result.loss == pytest.approx(statistics.mean(losses), rel=1e-15)
    assert result.loss_se == pytest.approx(statistics.stdev(losses) / 2, rel=1e-12)
    assert result.accuracy == 0.5
    assert result.accuracy_se == pytest.approx(statistics.stdev(correct) / 2, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-12)


def test_perplexity_weighs_tokens() -> None:
    rows = [[1.0, 2.0, 3.0], [0.5]]  # negative log-likelihood of every counted token
    losses = np.array([statistics.mean(row) for row in rows])
    result = summarize(losses, np.full(2, NAN), np.array([3, 1]))
    assert result.loss == pytest.approx((2.0 + 0.5) / 2)
    assert result.perplexity == pytest.approx(math.exp(sum(map(sum, rows)) / 4))
    assert (result.accuracy, result.accuracy_se) == (None, None)


def test_accuracy_is_over_rows_with_choices() -> None:
    result = summarize(np.array([1.0, 2.0, 3.0]), np.array([1.0, NAN, 0.0]), np.array([1, 9, 2]))
    assert result.accuracy == 0.5
    assert result.accuracy_se == pytest.approx(0.5)
    assert result.perplexity == pytest.approx(math.exp(2.0))  # rows with choices: of the mean loss


def test_one_row_has_no_standard_error() -> None:
    result = summarize(np.array([1.5]), np.array([1.0]))
    assert (result.loss_se, result.accuracy, result.accuracy_se) == (None, 1.0, None)
    values = json.loads(result.render(as_json=True))
    assert values["loss_se"] is None
    assert values["n"] == 1


def test_no_rows() -> None:
    with pytest.raises(ZoError, match="no rows"):
        summarize(np.array([]), np.array([]))


def test_json_has_no_infinity() -> None:
    result = summarize(np.array([800.0, 801.0]), np.full(2, NAN))
    assert result.perplexity == math.inf
    values = json.loads(result.render(as_json=True))
    assert values["perplexity"] is None
    assert values["accuracy"] is None
    assert set(values) == {"loss", "loss_se", "perplexity", "accuracy", "accuracy_se", "n"}


def test_table_is_for_people() -> None:
    lines = summarize(np.array([1.0, 2.0]), np.array([1.0, 0.0])).render().splitlines()
    assert [line.split() for line in lines] == [
        ["rows", "2"],
        ["loss", "1.5000", "±", "0.5000"],
        ["perplexity", "4.482"],
        ["accuracy", "0.5000", "±", "0.5000"],
    ]
    assert "accuracy" not in summarize(np.array([1.0]), np.array([NAN])).render()


def test_evaluates_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "d.jsonl", *[CHOICES] * 100, COMPLETION)
    result = run(file, monkeypatch)
    lengths = [len(example.tokens) for example in load_examples(file, FakeEngine())]
    assert result.n == 101
    assert result.loss == pytest.approx(statistics.mean(lengths) / 10)
    assert result.accuracy == 0.5
    assert run(file, monkeypatch, rows=3).n == 3
    assert run(file, monkeypatch, rows=3).accuracy == pytest.approx(1 / 3)


def test_folders_give_their_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "test.jsonl", COMPLETION)
    write(tmp_path / "valid.jsonl", COMPLETION, COMPLETION)
    assert run(tmp_path, monkeypatch).n == 1
    assert run(tmp_path, monkeypatch, split="valid").n == 2
    with pytest.raises(ZoError, match=r"no train.jsonl"):
        run(tmp_path, monkeypatch, split="train")


def test_rows_are_scored_in_parts_and_in_order() -> None:
    engine = FakeEngine()
    rows = [Example([0] * n, [False] * (n - 1) + [True], source=f"d:{n}") for n in range(2, 202)]
    result = measure(engine, rows)  # type: ignore[arg-type]
    assert sum(engine.calls) == len(rows)
    assert max(engine.calls) <= 64
    assert result.loss == pytest.approx(statistics.mean(range(2, 202)) / 10)
    assert counted_tokens(rows).tolist() == [1] * 200


def test_a_broken_model_is_an_error() -> None:
    class Broken(FakeEngine):
        def score(self, examples: Any, probes: Any = ()) -> Scores:
            losses = np.array([[1.0, NAN][: len(examples)]])
            return Scores(losses, np.full_like(losses, NAN), 1)

    rows = [Example([0, 1], [False, True], source=f"d.jsonl:{i}") for i in (1, 2)]
    with pytest.raises(ZoError, match=r"The loss of d.jsonl:2 is nan"):
        measure(Broken(), rows)  # type: ignore[arg-type]
