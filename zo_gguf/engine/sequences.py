"""Sequences of tokens: what goes through the model for an example, and how many fit a decode.

What sequences have in common goes through the model once. Choices that share their input, such as
one-token choices, are scored from one forward pass of the prompt. Longer ones share it too, since
llama.cpp lets a token of a batch belong to several sequences; and so do the rows of a decode that
begin with the same instruction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError

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
        example: Number of the example that it belongs to.
        tails: Lengths of the tails, which see the shared beginning but not each other.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    slots: NDArray[np.int64]
    example: int = 0
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
    completions: list[tuple[list[int], list[int]]], spans: list[tuple[int, int]], example: int
) -> list[TokenSequence]:
    """Sequences for one example; an input that begins another one needs none of its own.

    Args:
        completions: For each choice its tokens, and ascending which of them count.
        spans: The (first, end) target slots of each.
        example: Its number.
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
                example,
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
        group[0].example,
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
