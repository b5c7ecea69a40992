"""Packing of examples into decodes: prefixes shared, columns laid out, losses put together."""

import dataclasses

import numpy as np
import pytest

from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import build_request, lay_out, pack, reduce_losses
from zo_gguf.errors import ZoError


def choice_row(prompt: list[int], choices: list[list[int]], answer: int) -> Example:
    right = choices[answer]
    mask = [False] * len(prompt) + [True] * len(right)
    return Example(prompt + right, mask, tuple(map(tuple, choices)), answer, len(prompt))


def test_one_token_choices_share_one_forward_of_the_prompt() -> None:
    request = build_request([choice_row([1, 5, 6], [[10], [11], [12]], 1)])
    (sequence,) = request.sequences
    assert sequence.tokens.tolist() == [1, 5, 6]
    assert sequence.positions.tolist() == [2, 2, 2]
    assert sorted(sequence.targets.tolist()) == [10, 11, 12]
    assert sequence.n_outputs == 1


def test_only_differing_inputs_need_sequences_of_their_own() -> None:
    # [10] and [11, 20] are covered by [11, 21, 30]'s and [11, 20]'s inputs.
    request = build_request([choice_row([1], [[10], [11, 20], [11, 21, 30], [12, 13]], 0)])
    inputs = sorted(s.tokens.tolist() for s in request.sequences)
    assert inputs == [[1, 11, 21], [1, 12]]
    by_slot = {}
    for s in request.sequences:
        for position, target, slot in zip(s.positions, s.targets, s.slots, strict=True):
            by_slot[int(slot)] = (s.tokens[: position + 1].tolist(), int(target))
    assert by_slot == {
        0: ([1], 10),
        1: ([1], 11), 2: ([1, 11], 20),
        3: ([1], 11), 4: ([1, 11], 21), 5: ([1, 11, 21], 30),
        6: ([1], 12), 7: ([1, 12], 13),
    }  # fmt: skip


def test_tokens_after_the_last_counted_one_are_not_run() -> None:
    request = build_request([Example([1, 2, 3, 4, 5], [False, True, False, True, False])])
    assert request.sequences[0].tokens.tolist() == [1, 2, 3]
    assert request.sequences[0].positions.tolist() == [0, 2]


def test_reduce_matches_a_direct_computation() -> None:
    rows = [
        Example([1, 2, 3], [False, True, True]),
        choice_row([1], [[10], [11, 20]], 1),
    ]
    request = build_request(rows)
    nll = np.array([[0.5, 1.5, 2.0, 3.0, 5.0]])
    losses, correct, outcomes = reduce_losses(request, nll)
    scores = np.array([-2.0, -4.0])
    assert losses[0] == pytest.approx([1.0, np.log(np.exp(scores).sum()) + 4.0])
    assert np.isnan(correct[0, 0])
    assert correct[0, 1] == 0
    assert np.array_equal(outcomes[0], [[0.5, 1.5]])


def test_residuals_are_probabilities_minus_the_answer() -> None:
    request = build_request([choice_row([1], [[10], [11], [12]], k) for k in (1, 2)])
    nll = np.array([[0.5, 1.5, 2.0, 3.0, 0.1, 0.7], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]])
    _, _, outcomes = reduce_losses(request, nll)
    chance = np.exp(-nll.reshape(2, 2, 3))
    expected = chance / chance.sum(axis=2, keepdims=True)
    expected[:, 0, 1] -= 1
    expected[:, 1, 2] -= 1
    np.testing.assert_allclose(np.stack(outcomes, axis=1), expected, rtol=1e-12)


def test_loss_towards_soft_targets_is_their_cross_entropy() -> None:
    target = (0.2, 0.1, 0.7)
    row = dataclasses.replace(choice_row([1], [[10], [11], [12]], 1), target=target)
    request = build_request([row])
    scores = np.array([[-0.5, -1.5, -2.0]])
    losses, correct, outcomes = reduce_losses(request, -scores)
    chance = np.exp(scores) / np.exp(scores).sum()
    assert losses[0, 0] == pytest.approx(-(np.log(chance) @ target)[0])
    assert correct[0, 0] == 0  # by the answer, not by the target
    np.testing.assert_allclose(outcomes[0], chance - target)
    assert request.targets[0].tolist() == list(target)


@pytest.mark.parametrize("padded", [False, True])
def test_layout_columns(padded: bool) -> None:
    rows = [Example([1, 2, 3, 4], [False, False, True, True]), Example([1, 9], [False, True])]
    group = build_request(rows).sequences
    batch = lay_out(group, 2, padded)
    width = 6 if padded else 4
    assert batch.tokens.size == 2 * width
    assert batch.token_branch.tolist() == [0] * width + [1] * width
    columns = np.flatnonzero(batch.is_output)
    for target in range(batch.target_token.size):
        column = columns[batch.target_output[target]]
        sequence = group[batch.sequence_ids[column] % 2]
        own = sequence.slots.tolist().index(batch.slots[target])
        assert batch.positions[column] == sequence.positions[own]
        assert batch.tokens[column] == sequence.tokens[sequence.positions[own]]
        assert batch.target_branch[target] == batch.token_branch[column]
        assert batch.output_branch[batch.target_output[target]] == batch.token_branch[column]
    assert (np.diff(batch.target_output) >= 0).all()


def test_pack_keeps_order_and_limits() -> None:
    rows = [Example([1] * n, [False] * (n - 1) + [True]) for n in (5, 4, 6, 3, 9)]
    groups = list(pack(build_request(rows).sequences, 8, max_sequences=2))
    assert [[s.tokens.size for s in g] for g in groups] == [[4, 3], [5, 2], [8]]
    with pytest.raises(ZoError, match="--ctx-tokens"):
        list(pack(build_request(rows).sequences, 7, max_sequences=2))


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(ZoError, match="no token that counts"):
        build_request([Example([1, 2], [False, False])])
