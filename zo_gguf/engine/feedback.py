"""Gradients from forward passes: libzo's reverse pass over single tokens, on examples.

After a forward pass the gradient of the loss at the logits is known, and every block only adds to
the residual stream, so it can be sent down the stream token by token: exactly through norms and
feed-forward parts, past attention as if that were constant. The idea of feedback on a fixed path
instead of exact backpropagation is direct feedback alignment's (arXiv 1609.01596); here the path is
the model's own residual stream. A matrix W gets the gradient of `left` in W + left.T @ right with
`right` fixed, as in LoRA-FA (arXiv 2308.03303).

Only positions that count in the loss are looked at, and nothing is kept of the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import (
    DecodeBatch,
    Request,
    build_request,
    lay_out,
    loss_slopes,
    pack,
    reduce_losses,
)
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import AT_THETA, Feedback

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
TAIL = 2.0**-10  # relative error of the gradient at the logits
MOST_BYTES = 300 << 20  # gathered at a time


@dataclass(frozen=True)
class Gradients:
    """What a pass over examples gives.

    Attributes:
        losses: float64 (n_examples,).
        n_tokens: Tokens that went through the model.
        factors: For each tracked matrix the gradient of `left`, (rank, n_rows).
        gains: For each tracked norm the gradient of its gains, (n,).
    """

    losses: F64
    n_tokens: int
    factors: dict[str, F32]
    gains: dict[str, F32]


class FeedbackPass:
    """Forward passes of an engine that give gradients too.

    Args:
        engine: A loaded model, whose parameters act through the hook.
        factors: For each matrix to track its `right`, (rank, n_cols).
        gains: Norms to track.
        tail: Largest relative error of the gradient at the logits, in sums of magnitudes.
        most_bytes: Of values gathered at a time; rows go through in portions that fit.

    Raises:
        ZoError: A matrix or norm is not reached, or the model's graph cannot be followed.
    """

    def __init__(
        self,
        engine: Engine,
        factors: Mapping[str, F32],
        gains: Sequence[str] = (),
        *,
        tail: float = TAIL,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._engine, self._hook, self._most_bytes = engine, engine.hook, most_bytes
        self._factors, self._gains = list(factors), list(gains)
        self.native = Feedback(native_library(), engine.n_threads, tail)
        for name, info in engine.gguf.tensors.items():
            address = engine.gguf.data.ctypes.data + info.offset
            self.native.lend(name, int(info.type), address, info.n_bytes)
        for name, right in factors.items():
            n_rows, n_cols = engine.gguf.info(name).shape
            self.native.track(name, (n_rows, n_cols), right)
        for name in gains:
            self.native.track_gain(name, engine.gguf.info(name).n_cols)
        self._hook.set_feedback(self.native)
        try:
            self._learn_graph()
        except BaseException:
            self.close()
            raise

    def _learn_graph(self) -> None:
        """Decode a few tokens, fewer of them outputs, so that the graph is known."""
        start = max(self._engine.vocabulary.bos_id, 0)
        request = build_request([Example([start] * 4, [False, True, True, False])])
        self._decode(lay_out(request.sequences, 1, self._engine.is_padded))
        reached = {**self.native.matrices(), **self.native.norms()}
        missing = [name for name in (*self._factors, *self._gains) if name not in reached]
        if missing:
            raise ZoError(
                f"No gradient reaches {', '.join(missing)} past attention; leave them out."
            )

    def gradients(self, examples: Sequence[Example]) -> Gradients:
        """Losses, and gradients of their mean.

        Raises:
            ZoError: An example does not fit a decode, or the engine's graph is not supported.
        """
        self.native.clear()
        losses, n_tokens = np.empty(len(examples)), 0
        for first, request in self._portions(examples):
            losses_of, n = self._add(request, len(examples))
            losses[first : first + losses_of.size] = losses_of
            n_tokens += n
        factors = {name: self.native.gradient(i) for i, name in enumerate(self._factors)}
        gains = {name: self.native.gain_gradient(i) for i, name in enumerate(self._gains)}
        return Gradients(losses, n_tokens, factors, gains)

    def _portions(self, examples: Sequence[Example]) -> Iterator[tuple[int, Request]]:
        """Examples whose gathered values fit, and the number of the first."""
        most = max(1, self._most_bytes // max(1, self.native.token_bytes))
        first = n_outputs = 0
        for number, example in enumerate(examples):
            own = sum(s.n_outputs for s in self._request([example]).sequences)
            if number > first and n_outputs + own > most:
                yield first, self._request(examples[first:number])
                first, n_outputs = number, 0
            n_outputs += own
        if examples:
            yield first, self._request(examples[first:])

    def _request(self, examples: Sequence[Example]) -> Request:
        return build_request(examples, 0 if self._engine.is_padded else self._engine.ctx_tokens)

    def _add(self, request: Request, n_examples: int) -> tuple[F64, int]:
        """Add the gradients of a portion; its losses, and how many tokens it took."""
        groups = list(pack(request.sequences, self._engine.ctx_tokens, request.n_shared))
        batches = [lay_out(group, 1, self._engine.is_padded, request.n_shared) for group in groups]
        nll, n_tokens = np.full(request.n_targets, np.nan), 0
        if _are_split(request, batches):  # the slopes of a loss need all that it depends on
            for batch in batches:
                nll[batch.slots] = self._engine.decode(batch, [AT_THETA])
                n_tokens += batch.tokens.size
        for batch in batches:
            nll[batch.slots] = self._decode(batch)
            n_tokens += batch.tokens.size
            slopes = loss_slopes(request, nll) / n_examples
            self.native.run(slopes[batch.slots].astype(np.float32))
        losses, _, _ = reduce_losses(request, nll[None])
        return losses[0], n_tokens

    def _decode(self, batch: DecodeBatch) -> F64:
        """Decode until the values are gathered: another graph than before is only looked at."""
        output_token = np.flatnonzero(batch.is_output).astype(np.int32)
        for _ in range(3):
            self.native.begin(
                batch.target_output, batch.target_token, batch.tokens.size, output_token
            )
            nll = self._engine.decode(batch, [AT_THETA])
            if self.native.end():
                return nll
        raise ZoError("llama.cpp's graph is another one in every decode; it cannot be followed.")

    def close(self) -> None:
        """Release the native object."""
        self._hook.set_feedback(None)
        self.native.free()


def _are_split(request: Request, batches: Sequence[DecodeBatch]) -> bool:
    """Whether an example has targets in several decodes."""
    owner = np.empty(request.n_targets, np.int64)
    for example, spans in enumerate(request.spans):
        for first, end in spans:
            owner[first:end] = example
    return sum(np.unique(owner[batch.slots]).size for batch in batches) > len(request.spans)
