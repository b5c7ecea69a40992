"""Examples -> sequences -> decodes: what has to go through the model to get the losses.

Pure bookkeeping on token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.sequences import TokenSequence, count_shared, merge_prefixes, share_prompt
from zo_gguf.errors import ZoError


@dataclass(frozen=True)
class Request:
    """Everything needed to turn target likelihoods back into one loss per example.

    Attributes:
        sequences: What to run.
        n_targets: Length of the flat list of target likelihoods.
        spans: For each example, the (first, end) target slots of its completion, or of each of
            its choices.
        answers: For each example the index of the right choice, -1 where it has no choices.
        targets: For each example the probabilities of its choices that are aimed at, float64
            (n_choices,), (0,) where it has none.
        n_shared: With so many tokens all sequences begin, if rows are to share them.
    """

    sequences: list[TokenSequence]
    n_targets: int
    spans: list[list[tuple[int, int]]]
    answers: list[int]
    targets: list[NDArray[np.float64]]
    n_shared: int = 0


def build_request(examples: Sequence[Example], max_tokens: int = 0) -> Request:
    """Plan the forward passes of some examples.

    Args:
        examples: Rows.
        max_tokens: Where one decode of so many tokens holds them, the choices of a row share the
            tokens that they begin with, and so may rows. 0: only whole inputs are shared, as a
            split KV cache needs.

    Raises:
        ZoError: An example has no counted token.
    """
    sequences: list[TokenSequence] = []
    all_spans: list[list[tuple[int, int]]] = []
    answers: list[int] = []
    targets: list[NDArray[np.float64]] = []
    n_targets = 0
    for number, example in enumerate(examples):
        if example.choices:
            wanted = [
                (example.tokens[: example.n_prompt] + list(choice), example.n_prompt)
                for choice in example.choices
            ]
            completions = [(t, list(range(first, len(t)))) for t, first in wanted]
        else:
            counted = [i for i, counts in enumerate(example.target_mask) if counts]
            completions = [(example.tokens, counted)]
        if any(not counted or counted[0] == 0 for _, counted in completions):
            raise ZoError(f"{example.source or 'An example'} has no token that counts in the loss.")
        spans = []
        for _, counted in completions:
            spans.append((n_targets, n_targets + len(counted)))
            n_targets += len(counted)
        own = merge_prefixes(completions, spans, number)
        sequences.extend(share_prompt(own, max_tokens) if max_tokens else own)
        all_spans.append(spans)
        answers.append(example.answer if example.choices else -1)
        targets.append(_target(example))
    n_shared = count_shared(sequences) if max_tokens and sequences else 0
    return Request(sequences, n_targets, all_spans, answers, targets, n_shared)


def _target(example: Example) -> NDArray[np.float64]:
    """What the choices' probabilities should be, (n_choices,)."""
    if example.target:
        return np.array(example.target, np.float64)
    target = np.zeros(len(example.choices))
    if example.choices:
        target[example.answer] = 1
    return target


@dataclass(frozen=True)
class DecodeBatch:
    """One llama_decode: token columns and what is asked of them.

    Attributes:
        tokens, positions, is_output: (n_tokens,) each.
        sequence_ids: int32 (n_tokens,) the first sequence that a token belongs to.
        sequence_counts: int32 (n_tokens,) and to how many, numbered from there on.
        token_branch: int32 (n_tokens,) branch of each token.
        output_branch: int32 (n_outputs,) branch of each output column.
        target_output, target_token: int32 (n_targets,) sorted by output column.
        slots: int64 (n_targets,) slot of each target within its branch.
        target_branch: int32 (n_targets,).
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequence_ids: NDArray[np.int32]
    sequence_counts: NDArray[np.int32]
    is_output: NDArray[np.bool_]
    token_branch: NDArray[np.int32]
    output_branch: NDArray[np.int32]
    target_output: NDArray[np.int32]
    target_token: NDArray[np.int32]
    slots: NDArray[np.int64]
    target_branch: NDArray[np.int32]
    n_sequences: int
    max_length: int


def lay_out(
    group: Sequence[TokenSequence], n_branches: int, padded: bool, n_shared: int = 0
) -> DecodeBatch:
    """Lay sequences out as the columns of one decode, all of branch 0 first, then branch 1, ...

    Args:
        group: Sequences of one branch.
        n_branches: How often they are repeated, one branch each.
        padded: Fill every sequence up to the longest one on the right, as the split KV layout
            needs (the engine would otherwise cut the decode); causal attention hides the filling.
            None may have tails.
        n_shared: With so many equal tokens all begin: a branch has them once.
    """
    lengths = [sequence.tokens.size - n_shared for sequence in group]
    longest = max(lengths)
    widths = [longest] * len(group) if padded else lengths
    starts = n_shared + np.concatenate([[0], np.cumsum(widths)[:-1]])
    n = n_shared + int(sum(widths))  # columns of one branch
    tokens = np.zeros(n, np.int32)
    positions = np.zeros(n, np.int32)
    ids = np.zeros(n, np.int32)
    counts = np.ones(n, np.int32)
    is_output = np.zeros(n, np.bool_)
    found = []  # the columns of each sequence's targets
    n_sequences = sum(sequence.n_sequences for sequence in group)
    tokens[:n_shared] = group[0].tokens[:n_shared]
    positions[:n_shared] = np.arange(n_shared)
    counts[:n_shared] = n_sequences
    number = 0  # of the next sequence
    for i, (sequence, start, width) in enumerate(zip(group, starts, widths, strict=True)):
        end = int(start) + width
        tokens[start:end] = sequence.tokens[0]
        tokens[start : start + lengths[i]] = sequence.tokens[n_shared:]
        positions[start:end] = np.arange(n_shared, n_shared + width)
        if sequence.tails:
            place = slice(start, end)
            positions[place], ids[place], counts[place] = sequence.places()[:, n_shared:]
        ids[start:end] += number
        number += sequence.n_sequences
        own = sequence.positions >= n_shared
        found.append(np.where(own, start - n_shared, 0) + sequence.positions)
    columns = np.concatenate(found)
    is_output[columns] = True
    in_order = np.argsort(columns, kind="stable")
    output_of_column = np.cumsum(is_output) - 1
    n_outputs = int(is_output.sum())
    target_output = output_of_column[columns[in_order]]
    targets = np.concatenate([sequence.targets for sequence in group])[in_order]
    slots = np.concatenate([sequence.slots for sequence in group])[in_order]
    branch = np.arange(n_branches, dtype=np.int32)
    return DecodeBatch(
        tokens=np.tile(tokens, n_branches),
        positions=np.tile(positions, n_branches),
        sequence_ids=(ids + n_sequences * branch[:, None]).ravel().astype(np.int32),
        sequence_counts=np.tile(counts, n_branches),
        is_output=np.tile(is_output, n_branches),
        token_branch=np.repeat(branch, n),
        output_branch=np.repeat(branch, n_outputs),
        target_output=(target_output + n_outputs * branch[:, None]).ravel().astype(np.int32),
        target_token=np.tile(targets, n_branches),
        slots=np.tile(slots, n_branches),
        target_branch=np.repeat(branch, targets.size),
        n_sequences=n_sequences * n_branches,
        max_length=longest,
    )


def branch_per_example(
    batch: DecodeBatch, group: Sequence[TokenSequence]
) -> tuple[DecodeBatch, list[int]]:
    """The same decode with a branch for each example in it instead of one branch.

    Args:
        batch: Of one branch.
        group: Its sequences.

    Returns:
        The batch, and the example of each branch.
    """
    present = list(dict.fromkeys(sequence.example for sequence in group))
    branch_of = {example: branch for branch, example in enumerate(present)}
    of_sequence = np.repeat(
        np.array([branch_of[sequence.example] for sequence in group], np.int32),
        [sequence.n_sequences for sequence in group],
    )
    token_branch = of_sequence[batch.sequence_ids]
    output_branch = token_branch[batch.is_output]
    return (
        replace(
            batch,
            token_branch=token_branch,
            output_branch=output_branch,
            target_branch=output_branch[batch.target_output],
        ),
        present,
    )


def reduce_losses(
    request: Request, nll: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[NDArray[np.float64]]]:
    """Turn target likelihoods into losses.

    Args:
        request: As built from the examples.
        nll: (n_branches, n_targets) negative log-likelihoods.

    Returns:
        losses (n_branches, n_examples): mean negative log-likelihood of the counted tokens, or,
        for rows with choices, cross-entropy over the choices' mean log-likelihoods (MeZO,
        arXiv 2305.17333) towards the targets; correct, same shape: 1 or 0, NaN for rows
        without choices; and the outcomes of every example, see `Scores`.
    """
    # A running sum would carry rounding from one example to the next; the spans are short.
    losses = np.empty((nll.shape[0], len(request.spans)))
    correct = np.full_like(losses, np.nan)
    outcomes = []
    rows = zip(request.spans, request.answers, request.targets, strict=True)
    for i, (spans, answer, target) in enumerate(rows):
        means = np.stack([nll[:, first:end].mean(axis=1) for first, end in spans], axis=1)
        if answer < 0:
            losses[:, i] = means[:, 0]
            outcomes.append(nll[:, slice(*spans[0])])
            continue
        scores = -means  # (n_branches, n_choices)
        top = scores.max(axis=1)
        total = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        losses[:, i] = total - scores @ target
        correct[:, i] = scores.argmax(axis=1) == answer
        outcomes.append(np.exp(scores - total[:, None]) - target)
    return losses, correct, outcomes
