"""Soft targets: what they are, when there are any, and their file."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.reference import torch_model
from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw, Example
from zo_gguf.engine.batch import Scores
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.tuning.targets import (
    aim,
    choose_targets,
    cross_fit,
    load_targets,
    save_targets,
    soft_targets,
    wants_soft,
)

N, N_FEATURES = 600, 4
CHOICES = ((10,), (11,), (12,))


def drawn_answers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, the probabilities that they give the classes, and answers drawn from these."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((N, N_FEATURES)).astype(np.float32)
    powers = np.exp(states @ rng.standard_normal((N_FEATURES, len(CHOICES))))
    chance = powers / powers.sum(axis=1, keepdims=True)
    return states, chance, np.array([rng.choice(len(CHOICES), p=p) for p in chance])


def row(answer: int, choices: tuple[tuple[int, ...], ...] = CHOICES, text: int = 5) -> Example:
    tokens = [1, text, *choices[answer]]
    return Example(tokens, [False, False, True], choices, answer, 2)


def config(**options: Any) -> TuneConfig:
    given = {"model": "m.gguf", "data": "d", "output": "o", "iters": N, "examples_per_step": 1}
    result = TuneConfig(**(given | options))
    result.check()
    return result


class Reader:
    """An engine that knows the hidden states of texts by their second token.

    Its own answers: it gives `sure` to one choice, which is right for a share of the texts.
    """

    def __init__(self, states: np.ndarray, *, sure: float = 0.5, right: float = 0.4) -> None:
        self.states, self.sure = states, sure
        random = np.random.default_rng(5)
        self.knows = random.random(len(states)) < right
        self.misses_by = random.integers(1, len(CHOICES), len(states))
        self.read = 0

    def hidden_states(self, texts: list[list[int]]) -> np.ndarray:
        self.read += len(texts)
        return self.states[[text[1] for text in texts]]

    def score(self, rows: list[Example]) -> Scores:
        losses, correct, outcomes, targets = [], [], [], []
        for row in rows:
            n, text = len(row.choices), row.tokens[1]
            known = self.knows[text]
            chance = np.full(n, (1 - self.sure) / (n - 1))
            chance[(row.answer + (0 if known else self.misses_by[text])) % n] = self.sure
            targets.append(np.eye(n)[row.answer])
            outcomes.append((chance - targets[-1])[None])
            losses.append(-np.log(chance[row.answer]))
            correct.append(float(known))
        return Scores(np.array([losses]), np.array([correct]), 1, outcomes, targets)


def test_probabilities_are_those_that_answers_were_drawn_from() -> None:
    states, chance, answers = drawn_answers()
    found, _ = cross_fit(states, answers)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    labels = np.eye(len(CHOICES))[answers]
    # Nearer to the truth than the answers are, by far.
    assert np.square(found - chance).mean() < 0.05 * np.square(labels - chance).mean()


def test_no_row_is_behind_its_own_target() -> None:
    """States without meaning: a classifier that saw a row's answer would lean towards it."""
    rng = np.random.default_rng(1)
    states = rng.standard_normal((200, 400)).astype(np.float32)
    answers = np.arange(200) % 2
    found, _ = cross_fit(states, answers)
    own = found[np.arange(200), answers]
    assert abs(own.mean() - 0.5) < 0.05


def test_targets_are_in_the_order_of_each_rows_choices() -> None:
    states, chance, answers = drawn_answers()
    orders = [tuple(np.random.default_rng(k).permutation(len(CHOICES))) for k in range(N)]
    rows = []
    for k, (order, answer) in enumerate(zip(orders, answers, strict=True)):
        choices = tuple(CHOICES[c] for c in order)
        rows.append(row(order.index(answer), choices, text=k))
    engine: Any = Reader(states)
    targets, report = soft_targets(engine, rows, range(N))
    own = np.array([chance[k][list(order)] for k, order in enumerate(orders)])
    assert np.abs(targets - own).mean() < 0.05
    assert report.better
    assert report.n_rows == engine.read == N
    of_answers = np.array([t[r.answer] for t, r in zip(targets, rows, strict=True)])
    assert report.loss == pytest.approx(-np.log(of_answers).mean(), abs=0.1)  # of 256 of them


def test_rows_beyond_those_fitted_get_targets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_gguf.tuning.targets.MOST", 250)
    states, chance, answers = drawn_answers()
    engine: Any = Reader(states)
    rows = [row(answer, text=k) for k, answer in enumerate(answers)]
    targets, report = soft_targets(engine, rows, range(N))
    assert report.n_rows == 250
    assert engine.read == N  # each once
    assert np.square(targets - chance).mean() < 0.1 * np.square(np.eye(3)[answers] - chance).mean()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row(k % 3) for k in range(30)], ""),
        ([row(k % 3) for k in range(12)], "fewer than 5 times"),
        ([row(k % 2) for k in range(30)], "fewer than 5 times"),
        ([row(k % 3) for k in range(30)] + [row(0, ((10,), (13,)))], "same choices"),
        ([row(k % 3) for k in range(30)] + [Example([1, 2], [False, True])], "without choices"),
    ],
)
def test_when_there_are_soft_targets(rows: list[Example], reason: str) -> None:
    seen = range(len(rows))
    assert wants_soft(config(), rows, seen) == (not reason)
    assert not wants_soft(config(targets="answers"), rows, seen)
    if reason:
        with pytest.raises(ZoError, match=f"{reason}.*; leave --targets soft out"):
            wants_soft(config(targets="soft"), rows, seen)


class TestChoice:
    @pytest.fixture
    def draw(self) -> Draw:
        answers = drawn_answers()[2]
        return Draw([row(answer, text=k) for k, answer in enumerate(answers)], 1, seed=0)

    def choose(
        self, draw: Draw, path: Path, engine: Any = None, begun: bool = False, **options: Any
    ) -> str:
        engine = engine or Reader(drawn_answers()[0])
        return choose_targets(config(**options), engine, draw, path / "t", begun=begun)

    def test_only_rows_that_the_run_sees_are_read(self, draw: Draw, tmp_path: Path) -> None:
        engine = Reader(drawn_answers()[0])
        assert self.choose(draw, tmp_path, engine, iters=100) == "soft"
        assert engine.read == 100
        assert all(example.target for step in range(100) for example in draw(step))
        assert sum(bool(example.target) for example in draw.examples) == 100

    def test_answers_where_the_model_knows_better(
        self, draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine = Reader(drawn_answers()[0], sure=0.99, right=1.0)
        assert self.choose(draw, tmp_path, engine) == "answers"
        assert "training aims at the answers" in capsys.readouterr().err
        assert not any(example.target for example in draw.examples)
        assert self.choose(draw, tmp_path, engine, targets="soft") == "soft"

    def test_a_model_that_is_merely_too_sure_is_not_beaten(
        self, draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """States that tell nothing give a lower loss than an overconfident model, and no news."""
        noise = np.random.default_rng(3).standard_normal((N, N_FEATURES)).astype(np.float32)
        engine = Reader(noise, sure=0.98, right=0.6)
        assert engine.score(draw.examples).losses.mean() > np.log(len(CHOICES))
        assert self.choose(draw, tmp_path, engine) == "answers"
        assert "training aims at the answers" in capsys.readouterr().err

    def test_a_model_without_states_is_trained_on_answers(
        self, draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(_: object) -> None:
            raise ZoError("No states.")

        engine = SimpleNamespace(hidden_states=refuse)
        assert self.choose(draw, tmp_path, engine) == "answers"
        assert "No states. Training aims at the answers" in capsys.readouterr().err
        with pytest.raises(ZoError, match="No states"):
            self.choose(draw, tmp_path, engine, targets="soft")

    def test_rows_beyond_a_longer_runs_targets_aim_at_answers(
        self, draw: Draw, tmp_path: Path
    ) -> None:
        self.choose(draw, tmp_path, iters=100)
        first = draw.examples
        nobody: Any = SimpleNamespace()
        assert self.choose(draw, tmp_path, nobody, begun=True, targets="soft", iters=200) == "soft"
        assert draw.examples == first
        assert sum(bool(example.target) for step in range(200) for example in draw(step)) == 100

    def test_a_run_that_goes_on_has_what_it_had(self, draw: Draw, tmp_path: Path) -> None:
        rows = draw.examples
        self.choose(draw, tmp_path)
        first, draw.examples = draw.examples, rows
        nobody: Any = SimpleNamespace()
        assert self.choose(draw, tmp_path, nobody, begun=True, targets="soft") == "soft"
        assert draw.examples == first
        draw.examples = rows
        assert self.choose(draw, tmp_path, nobody, begun=True) == "answers"  # it is older
        assert self.choose(draw, tmp_path, nobody, targets="answers") == "answers"
        assert draw.examples == rows

    def test_what_cannot_be_is_refused_in_words(self, tmp_path: Path) -> None:
        few = Draw([row(k % 3) for k in range(6)], 1, seed=0)
        assert self.choose(few, tmp_path) == "answers"
        with pytest.raises(ZoError, match=r"no soft targets: .* fewer than 5 times; leave"):
            self.choose(few, tmp_path, targets="soft")


@pytest.mark.parametrize("damage", ["missing", "torn", "altered", "other rows", "other choices"])
def test_bad_files_are_refused_in_words(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "targets.safetensors"
    rows = [row(k % 3) for k in range(6)]
    targets = np.full((3, 3), 1 / 3)
    if damage != "missing":
        save_targets(path, [1, 2, 5], targets)
        numbers, found = load_targets(path, rows)
        assert numbers == [1, 2, 5]
        assert np.array_equal(found, targets)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "altered":
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    elif damage == "other rows":
        rows = rows[:5]
    elif damage == "other choices":
        rows = [row(0, CHOICES[:2])] * 6
    with pytest.raises(ZoError, match=r"targets\.safetensors.*put the original back"):
        load_targets(path, rows)


def test_aim_leaves_other_rows_alone() -> None:
    rows = [row(0), row(1), row(2)]
    aimed = aim(rows, [1], np.array([[0.2, 0.3, 0.5]]))
    assert aimed[::2] == rows[::2]
    assert aimed[1] == dataclasses.replace(rows[1], target=(0.2, 0.3, 0.5))


def test_hidden_states_are_those_of_torch(
    tiny_export: SimpleNamespace, tiny_llama_dir: Path
) -> None:
    path = tiny_export.model("F16")
    # More than fit a decode together, and one alone that is longer than those.
    texts = [list(range(1, n)) for n in (2, 3, 40, 7)] + [[5] * 300, [6] * 300, list(range(2, 600))]
    with Engine(path) as engine:
        found = engine.hidden_states(texts)
    model = torch_model(tiny_llama_dir, path)
    for text, states in zip(texts, found, strict=True):
        with torch.no_grad():
            exact = model.base_model(torch.tensor([text])).last_hidden_state[0].numpy()
        expected = np.concatenate([exact.mean(axis=0), exact[-1]])
        np.testing.assert_allclose(states, expected, atol=0.02 * np.abs(expected).max())
