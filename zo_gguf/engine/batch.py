"""Examples -> sequences -> decodes: what has to go through the model to get the losses.

What sequences have in common goes through the model once. Choices that share their input, such as
one-token choices, are scored from one forward pass of the prompt. Longer ones share it too, since
llama.cpp lets a token of a batch belong to several sequences; and so do the rows of a decode that
begin with the same instruction. Pure bookkeeping on token ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.errors import ZoError

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_WORTH_SHARING = 16  # tokens: not for a BOS or a word


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that see only what is before them, and the predictions wanted from them.

    Attributes:
        tokens: int32 (n,), cut after the last position that predicts anything; with tails, the
            shared beginning and then the tails.
        positions: int32 (n_targets,) ascending; the token at place p predicts the one after it.
        targets: int32 (n_targets,) the token ids predicted.
        slots: int64 (n_targets,) where each result goes in the flat list of all targets.
        tails: Lengths of the tails, which see the shared beginning but not each other.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    slots: NDArray[np.int64]
    tails: tuple[int, ...] = ()

    @property
    def n_sequences(self) -> int:
        """How many of llama.cpp's sequences it takes."""
        return len(self.tails) or 1

    def places(self) -> NDArray[np.int32]:
        """Of every token the position in its text, its first sequence, and of how many, (3, n)."""
        n_shared = self.tokens.size - sum(self.tails)
        ends = [np.arange(n_shared, n_shared + length) for length in self.tails]
        numbers = np.repeat(np.arange(len(self.tails)), self.tails)
        shared, ones = np.zeros(n_shared, np.int32), np.ones_like(numbers)
        return np.stack(
            [
                np.concatenate([np.arange(n_shared), *ends]),
                np.concatenate([shared, numbers]),
                np.concatenate([shared + len(self.tails), ones]),
            ]
        ).astype(np.int32)

    @property
    def n_outputs(self) -> int:
        """Number of distinct positions whose logits are needed."""
        return int(np.unique(self.positions).size)


def merge_prefixes(
    completions: list[tuple[list[int], list[int]]], spans: list[tuple[int, int]]
) -> list[TokenSequence]:
    """Sequences for one example; an input that begins another one needs none of its own.

    Args:
        completions: For each choice its tokens, and ascending which of them count.
        spans: The (first, end) target slots of each.
    """
    groups: list[tuple[list[int], list[tuple[int, int, int]]]] = []
    inputs = [(tokens[: counted[-1]], k) for k, (tokens, counted) in enumerate(completions)]
    for tokens, k in sorted(inputs, key=lambda item: -len(item[0])):
        full, counted = completions[k]
        targets = [(i - 1, full[i], spans[k][0] + n) for n, i in enumerate(counted)]
        for longer, found in groups:
            if longer[: len(tokens)] == tokens:
                found.extend(targets)
                break
        else:
            groups.append((tokens, targets))
    sequences = []
    for tokens, found in groups:
        found.sort()
        positions, targets_, slots = zip(*found, strict=True)
        sequences.append(
            TokenSequence(
                np.array(tokens, np.int32),
                np.array(positions, np.int32),
                np.array(targets_, np.int32),
                np.array(slots, np.int64),
            )
        )
    return sequences


def share_prompt(own: Sequence[TokenSequence], max_tokens: int) -> list[TokenSequence]:
    """Join an example's sequences, none of which begins another, where they begin alike.

    As many at a time as a decode of `max_tokens` tokens holds.
    """
    if len(own) == 1:
        return list(own)
    n_shared = _n_equal(own, min(sequence.tokens.size for sequence in own))
    if n_shared == 0:
        return list(own)
    joined: list[TokenSequence] = []
    group: list[TokenSequence] = []
    n_tokens = n_shared
    for sequence in own:
        n_tail = sequence.tokens.size - n_shared
        if group and (n_tokens + n_tail > max_tokens or len(group) == MAX_SEQUENCES):
            joined.append(_join(group, n_shared))
            group, n_tokens = [], n_shared
        group.append(sequence)
        n_tokens += n_tail
    return [*joined, _join(group, n_shared)]


def count_shared(sequences: Sequence[TokenSequence]) -> int:
    """With how many tokens all begin, if that is worth sharing among rows, else 0.

    At least one token of each stays its own, and all of its tails.
    """
    own = min(s.tokens.size - (sum(s.tails) or 1) for s in sequences)
    n_shared = _n_equal(sequences, own) if len(sequences) > 1 else 0
    return n_shared if n_shared >= _WORTH_SHARING else 0


def _n_equal(sequences: Sequence[TokenSequence], most: int) -> int:
    heads = np.stack([sequence.tokens[:most] for sequence in sequences])
    return int(np.logical_and.accumulate((heads == heads[0]).all(axis=0)).sum())


def _join(group: Sequence[TokenSequence], n_shared: int) -> TokenSequence:
    if len(group) == 1:
        return group[0]
    tails = [sequence.tokens[n_shared:] for sequence in group]
    lengths = [tail.size for tail in tails]
    moved = np.cumsum([0, *lengths[:-1]])  # how far each tail lies behind the shared beginning
    places = np.concatenate(
        [s.positions + by * (s.positions >= n_shared) for s, by in zip(group, moved, strict=True)]
    )
    order = np.argsort(places, kind="stable")
    return TokenSequence(
        np.concatenate([group[0].tokens[:n_shared], *tails]),
        places[order].astype(np.int32),
        np.concatenate([sequence.targets for sequence in group])[order],
        np.concatenate([sequence.slots for sequence in group])[order],
        tuple(lengths),
    )


def pack(
    sequences: Sequence[TokenSequence],
    max_tokens: int,
    n_shared: int = 0,
    max_sequences: int = MAX_SEQUENCES,
) -> Iterator[list[TokenSequence]]:
    """Cut sequences into decodes of at most `max_tokens` tokens, in order.

    Args:
        sequences: In order.
        max_tokens: Of a decode.
        n_shared: With so many equal tokens all begin, which a decode has once.
        max_sequences: Of a decode.

    Raises:
        ZoError: A single sequence is longer than a decode.
    """
    group: list[TokenSequence] = []
    n_tokens, n_sequences = n_shared, 0
    for sequence in sequences:
        length = sequence.tokens.size - n_shared
        if n_shared + length > max_tokens:
            raise ZoError(
                f"An example needs {n_shared + length} tokens but a decode holds {max_tokens}; "
                "raise --ctx-tokens or lower --max-seq-length."
            )
        wanted = n_sequences + sequence.n_sequences
        if group and (n_tokens + length > max_tokens or wanted > max_sequences):
            yield group
            group, n_tokens, n_sequences = [], n_shared, 0
        group.append(sequence)
        n_tokens += length
        n_sequences += sequence.n_sequences
    if group:
        yield group


def repetitions(
    group: Sequence[TokenSequence], max_tokens: int, padded: bool, n_shared: int = 0
) -> int:
    """How often the sequences of a decode can be repeated in it, once per probe; 1 at least."""
    lengths = [sequence.tokens.size - n_shared for sequence in group]
    n_tokens = len(lengths) * max(lengths) if padded else n_shared + sum(lengths)
    n_sequences = sum(sequence.n_sequences for sequence in group)
    return max(1, min(max_tokens // n_tokens, MAX_SEQUENCES // n_sequences))


# ---- decodes -------------------------------------------------------------------------------------


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
        n_shared: Length of the beginning that all sequences have in common and that goes through
            the model once; 0 where nothing is shared.
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
        max_tokens: Tokens of a decode. Choices of a row that fit into one share the tokens they
            begin with, and so may rows. 0: only whole inputs are shared, as a split KV cache needs.

    Raises:
        ZoError: An example has no counted token.
    """
    sequences: list[TokenSequence] = []
    all_spans: list[list[tuple[int, int]]] = []
    answers: list[int] = []
    targets: list[NDArray[np.float64]] = []
    n_targets = 0
    for example in examples:
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
        own = merge_prefixes(completions, spans)
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
    longest = max(sequence.tokens.size for sequence in group) - n_shared
    columns, found = _columns(group, longest if padded else None, n_shared)
    n = columns.tokens.size
    n_sequences = sum(sequence.n_sequences for sequence in group)
    is_output = np.zeros(n, np.bool_)
    is_output[found] = True
    in_order = np.argsort(found, kind="stable")
    n_outputs = int(is_output.sum())
    target_output = (np.cumsum(is_output) - 1)[found[in_order]]
    targets = np.concatenate([sequence.targets for sequence in group])[in_order]
    slots = np.concatenate([sequence.slots for sequence in group])[in_order]
    branch = np.arange(n_branches, dtype=np.int32)
    return DecodeBatch(
        tokens=np.tile(columns.tokens, n_branches),
        positions=np.tile(columns.positions, n_branches),
        sequence_ids=(columns.ids + n_sequences * branch[:, None]).ravel().astype(np.int32),
        sequence_counts=np.tile(columns.counts, n_branches),
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


class _Columns(NamedTuple):
    """The columns of one branch, (n,) each; see `DecodeBatch`."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    ids: NDArray[np.int32]
    counts: NDArray[np.int32]


def _columns(
    group: Sequence[TokenSequence], width: int | None, n_shared: int
) -> tuple[_Columns, NDArray[np.int64]]:
    """One branch's columns, `width` for every sequence if given, and where its targets are."""
    lengths = [sequence.tokens.size - n_shared for sequence in group]
    widths = lengths if width is None else [width] * len(group)
    starts = n_shared + np.concatenate([[0], np.cumsum(widths)[:-1]])
    n = n_shared + int(sum(widths))
    tokens, positions, ids = (np.zeros(n, np.int32) for _ in range(3))
    counts = np.ones(n, np.int32)
    tokens[:n_shared] = group[0].tokens[:n_shared]
    positions[:n_shared] = np.arange(n_shared)
    counts[:n_shared] = sum(sequence.n_sequences for sequence in group)
    found = []
    number = 0  # of the next sequence
    for sequence, start, length, room in zip(group, starts, lengths, widths, strict=True):
        place = slice(int(start), int(start) + room)
        tokens[place] = sequence.tokens[0]
        tokens[start : start + length] = sequence.tokens[n_shared:]
        positions[place] = np.arange(n_shared, n_shared + room)
        if sequence.tails:
            positions[place], ids[place], counts[place] = sequence.places()[:, n_shared:]
        ids[place] += number
        number += sequence.n_sequences
        own = sequence.positions >= n_shared
        found.append(np.where(own, start - n_shared, 0) + sequence.positions)
    return _Columns(tokens, positions, ids, counts), np.concatenate(found)


@dataclass(frozen=True)
class Scores:
    """What a forward pass over examples gives.

    Attributes:
        losses: float64 (n_probes, n_examples).
        correct: float64 (n_probes, n_examples), 1 or 0; NaN where an example has no choices.
        n_tokens: Tokens that went through the model, over all probes.
        outcomes: One float64 (n_probes, n) per example: the negative log-likelihood of each counted
            token or, where an example has choices, its residuals: the probability of each choice
            minus the one that is aimed at, 1 for the right choice unless the example says other.
        targets: For every example with choices what is aimed at, (n_choices,); else (0,).
    """

    losses: Matrix
    correct: Matrix
    n_tokens: int
    outcomes: Sequence[Matrix] = ()
    targets: Sequence[Vector] = ()


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


def loss_slopes(request: Request, nll: NDArray[np.float64]) -> NDArray[np.float64]:
    """How the sum of the examples' losses changes with each target's negative log-likelihood.

    Args:
        request: As built from the examples.
        nll: (n_targets,), NaN where not known yet.

    Returns:
        (n_targets,), NaN for examples with an unknown target.
    """
    slopes = np.empty_like(nll)
    rows = zip(request.spans, request.answers, request.targets, strict=True)
    for spans, answer, target in rows:
        of_means = np.ones(1)
        if answer >= 0:
            scores = -np.array([nll[first:end].mean() for first, end in spans])
            share = np.exp(scores - scores.max())
            of_means = target - share / share.sum()
        for (first, end), slope in zip(spans, of_means, strict=True):
            slopes[first:end] = slope / (end - first)
    return slopes
