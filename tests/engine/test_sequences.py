"""Choices of several tokens, and rows, that share the forward pass of what they begin with."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.engine.test_batch import choice_row
from tests.helpers.tiny_gguf import random_delta, write_llama
from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import (
    MAX_SEQUENCES,
    Scores,
    TokenSequence,
    build_request,
    lay_out,
    pack,
    repetitions,
)
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe

PROMPT = list(range(1, 8))
FIELDS = ("losses", "correct")
CHOICES = [[10], [11, 20], [11, 21, 30], [12, 13], [14, 15, 16, 17]]


def predictions(
    sequences: Iterable[TokenSequence], n_shared: int = 0
) -> dict[int, tuple[list[int], int]]:
    """By slot: the tokens that llama.cpp lets a prediction see, in a decode of all, and its target.

    A token sees those of its first sequence that are not after it.
    """
    batch, found = lay_out(list(sequences), 1, False, n_shared), {}
    assert (np.diff(batch.target_output) >= 0).all()
    columns = np.flatnonzero(batch.is_output)[batch.target_output]
    for column, target, slot in zip(columns, batch.target_token, batch.slots, strict=True):
        own = batch.sequence_ids[column] - batch.sequence_ids
        seen = (own >= 0) & (own < batch.sequence_counts)
        seen &= batch.positions <= batch.positions[column]
        assert batch.positions[seen].tolist() == list(range(seen.sum()))
        found[int(slot)] = (batch.tokens[seen].tolist(), int(target))
    return found


def rows() -> list[Example]:
    return [
        choice_row(PROMPT, CHOICES, 1),
        Example([1, 2, 3], [False, True, True]),
        choice_row([1], CHOICES[1:], 0),
        choice_row(PROMPT, [[40], [41]], 0),
    ]


@pytest.mark.parametrize("max_tokens", [9, 10, 11, 13, 100])
def test_predictions_see_what_they_saw(max_tokens: int) -> None:
    alone, shared = build_request(rows()), build_request(rows(), max_tokens)
    assert predictions(shared.sequences) == predictions(alone.sequences)
    assert all(sequence.tokens.size <= max(max_tokens, 10) for sequence in shared.sequences)
    n_alone, n_shared = (sum(s.tokens.size for s in r.sequences) for r in (alone, shared))
    assert n_shared <= n_alone - (max_tokens > 10) * len(PROMPT)


def test_a_prompt_is_read_once() -> None:
    (sequence,) = build_request([choice_row(PROMPT, CHOICES, 1)], 100).sequences
    assert sequence.tokens.tolist() == [*PROMPT, 14, 15, 16, 11, 21, 12]
    assert sequence.tails == (3, 2, 1)
    batch = lay_out([sequence], 2, padded=False)
    assert batch.n_sequences == 6
    assert batch.sequence_ids.tolist() == [0] * 7 + [0, 0, 0, 1, 1, 2] + [3] * 10 + [4, 4, 5]
    assert batch.sequence_counts.tolist() == ([3] * 7 + [1] * 6) * 2
    assert batch.positions.tolist() == [*range(7), 7, 8, 9, 7, 8, 7] * 2


def test_more_choices_than_sequences() -> None:
    n = MAX_SEQUENCES + 3
    row = choice_row([1, 2], [[10 + k, 3] for k in range(n)], 0)
    first, second = build_request([row], 10_000).sequences
    assert (first.n_sequences, second.n_sequences) == (MAX_SEQUENCES, 3)
    assert repetitions([second], 24, padded=False) == 24 // 5
    assert repetitions([first], 10_000, padded=False) == 1
    assert list(pack([second, first, second], 10_000)) == [[second], [first], [second]]


INSTRUCTION = list(range(50, 66))


def instructed() -> list[Example]:
    """Rows that begin alike: with choices of both kinds, and one whose beginning counts, too."""
    counted = [False] * 5 + [True] * 14
    return [
        choice_row([*INSTRUCTION, 1, 2], CHOICES, 1),
        Example([*INSTRUCTION, 4, 5, 6], counted),
        choice_row([*INSTRUCTION, 3], [[40], [41]], 0),
        choice_row([*INSTRUCTION, 3, 4, 5], CHOICES[1:], 0),
    ]


def test_rows_that_begin_alike_share_it() -> None:
    alone, request = build_request(instructed()), build_request(instructed(), 1000)
    n_shared = len(INSTRUCTION)
    assert request.n_shared == n_shared
    assert predictions(request.sequences, n_shared) == predictions(alone.sequences)
    batch = lay_out(request.sequences, 2, False, n_shared)
    sizes = [s.tokens.size - n_shared for s in request.sequences]
    assert batch.tokens.size == 2 * (n_shared + sum(sizes))
    assert batch.n_sequences == 2 * (3 + 1 + 1 + 3)
    assert batch.sequence_counts[:n_shared].tolist() == [8] * n_shared
    # Two rows fit where one and a half would without the shared tokens.
    limit = n_shared + sizes[0] + sizes[1]
    groups = list(pack(request.sequences, limit, n_shared))
    assert [len(group) for group in groups] == [2, 2]
    assert repetitions(groups[0], 2 * limit, False, n_shared) == 2
    with pytest.raises(ZoError, match=f"needs {n_shared + sizes[0]} tokens but a decode holds 20"):
        list(pack(request.sequences, 20, n_shared))


def test_little_is_not_shared_among_rows() -> None:
    short = [choice_row([*INSTRUCTION[:15], k], [[40], [41]], 0) for k in range(3)]
    assert build_request(short, 1000).n_shared == 0
    assert build_request(instructed()).n_shared == 0  # not asked for
    assert build_request(instructed()[:1], 1000).n_shared == 0  # one row
    # All but its tails, or its last token, may be shared.
    same = [choice_row([*INSTRUCTION, 1], [[40], [41]], 0)] * 2
    assert build_request(same, 1000).n_shared == len(INSTRUCTION)
    tails = [choice_row(INSTRUCTION, CHOICES, 0)] * 2
    assert build_request(tails, 1000).n_shared == len(INSTRUCTION)


@pytest.mark.parametrize("make", [rows, instructed])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0])
def test_losses_are_those_of_single_texts(
    kind: Type, make: Callable[[], list[Example]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path / "m.gguf", kind)
    delta = random_delta(GgufFile(path))
    probes = [Probe(0, 0.0), Probe(3, 0.1), Probe(3, -0.1)]

    def score(*, one_by_one: bool = False, **options: Any) -> Scores:
        with Engine(path, delta=delta, n_threads=1, ctx_tokens=512, **options) as engine:
            if not one_by_one:
                return engine.score(make(), probes)
            each = [engine.score([row], probes) for row in make()]
        losses, correct = (np.hstack([getattr(s, name) for s in each]) for name in FIELDS)
        return Scores(losses, correct, sum(s.n_tokens for s in each), [])

    shared = [score(), score(probes_per_decode=3)]
    split = score(kv_layout="split")
    monkeypatch.setattr(Engine, "request", lambda _, examples: build_request(examples))
    # From 64 tokens on, llama.cpp's attention has another order of sums: like is held against like.
    alone = [score(one_by_one=True), score(probes_per_decode=3)]
    assert np.abs(alone[0].losses[1] - alone[0].losses[2]).max() > 0.05
    assert split.n_tokens > alone[0].n_tokens  # filled up
    for one, other in zip(shared, alone, strict=True):
        assert one.n_tokens < 0.7 * other.n_tokens
        assert np.array_equal(one.correct, other.correct, equal_nan=True)
        bound = 1e-4 if kind == Type.F32 else 0.05  # activations are rounded to 8 bits
        np.testing.assert_allclose(one.losses, other.losses, atol=bound)
