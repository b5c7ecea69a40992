"""Gradients from forward passes: libzo's reverse pass over single tokens, on examples.

After a forward pass the gradient of the loss at the logits is known, and every block only adds to
the residual stream, so it can be sent down the stream token by token: exactly through norms and
feed-forward parts, past attention as if that were constant. The idea of feedback on a fixed path
instead of exact backpropagation is direct feedback alignment's (arXiv 1609.01596); here the path is
the model's own residual stream. A matrix W gets the gradient of `left` in W + left.T @ right with
`right` fixed, as in LoRA-FA (arXiv 2308.03303), or its whole gradient.

Only positions that count in the loss are looked at, and nothing is kept of the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import (
    DecodeBatch,
    Request,
    lay_out,
    loss_slopes,
    pack,
    reduce_losses,
)
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import native_library
from zo_gguf.engine.readout import recording
from zo_gguf.errors import ZoError
from zo_gguf.libzo import AT_THETA, Feedback

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Slopes = Callable[[Request, F64], F64]
TAIL = 2.0**-8  # relative error of the gradient at the logits
MOST_BYTES = 300 << 20  # gathered at a time


@dataclass(frozen=True)
class Reach:
    """What gradients reach in a model.

    Attributes:
        matrices: Name -> (n_rows, n_cols), the head first, then the last layer.
        norms: Name -> length, in the same order.
        stops: Where gradients do not go on, in words.
    """

    matrices: dict[str, tuple[int, int]]
    norms: dict[str, int]
    stops: list[str]


@dataclass
class Gradients:
    """What passes over examples give: losses, and gradients of their mean.

    Attributes:
        losses: float64 (n_examples,).
        correct: float64 (n_examples,), 1 or 0; NaN where an example has no choices.
        n_tokens: Tokens that went through the model.
        factors: Tracked matrix with a `right` -> gradient of `left`, (rank, n_rows).
        matrices: Tracked matrix without one -> its gradient, (n_rows, n_cols).
        gains: Tracked norm -> gradient of its gains, (n,).
    """

    losses: F64
    correct: F64
    n_tokens: int = 0
    factors: dict[str, F32] = field(default_factory=dict)
    matrices: dict[str, F32] = field(default_factory=dict)
    gains: dict[str, F32] = field(default_factory=dict)


class FeedbackPass:
    """Forward passes of an engine that give gradients too, at its theta.

    What the engine's parameters add to matrices and norms belongs to them on the way back. One
    pass at a time can be open on an engine; `close`, or leaving a `with` block, detaches it.

    Args:
        engine: A loaded model, whose parameters act through the hook.
        factors: For each matrix to track its `right`, (rank, n_cols), or None for its whole
            gradient, which takes memory for as many values as the matrix has.
        gains: Norms to track: the gradient of g where the norm is multiplied by 1 + g.
        tail: Largest relative error of the gradient at the logits, in sums of magnitudes.
        most_bytes: Of values gathered at a time; rows go through in portions that fit, and a row
            that does not fit alone more than once.

    Raises:
        ZoError: A matrix or norm is not reached, or the model's graph cannot be followed.
    """

    def __init__(
        self,
        engine: Engine,
        factors: Mapping[str, F32 | None],
        gains: Sequence[str] = (),
        *,
        tail: float = TAIL,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._engine, self._hook, self._most_bytes = engine, engine.hook, most_bytes
        self._matrices = {name: right is None for name, right in factors.items()}
        self._gains = list(gains)
        self._native = Feedback(native_library(), engine.n_threads, tail)
        for name, info in engine.gguf.tensors.items():
            address = engine.gguf.data.ctypes.data + info.offset
            self._native.lend(name, int(info.type), address, info.n_bytes)
        for name, right in factors.items():
            n_rows, n_cols = engine.gguf.info(name).shape
            self._native.track(name, (n_rows, n_cols), right)
        for name in gains:
            self._native.track_gain(name, engine.gguf.info(name).n_cols)
        self._hook.set_feedback(self._native)
        try:
            self.reach = self._learn_graph()
        except BaseException:
            self.close()
            raise

    def _learn_graph(self) -> Reach:
        """Decode a few tokens, fewer of them outputs, so that the graph is known."""
        start = max(self._engine.vocabulary.bos_id, 0)
        request = self._engine.request([Example([start] * 4, [False, True, True, False])])
        self._decode(_batches(self._engine, request)[0], slice(None))
        native = self._native
        reach = Reach(native.matrices(), native.norms(), native.stops())
        missing = [name for name in self._matrices if name not in reach.matrices]
        missing += [name for name in self._gains if name not in reach.norms]
        if missing:
            raise ZoError(
                f"No gradient reaches {', '.join(missing)} past attention; leave them out."
            )
        return reach

    @property
    def token_bytes(self) -> int:
        """Memory for the values gathered at each position that counts, and for gradients."""
        return self._native.token_bytes

    def gradients(self, examples: Sequence[Example], slopes: Slopes = loss_slopes) -> Gradients:
        """Losses, and gradients of the mean over the examples.

        Args:
            examples: Rows.
            slopes: Says, of some examples, how the sum of what is to be lowered changes with each
                target's negative log-likelihood; by default, the sum of their losses. Targets of an
                example come together where a decode holds them all.

        Raises:
            ZoError: An example does not fit a decode, or the engine's graph is not supported.
        """
        self._native.clear()
        found = Gradients(np.empty(len(examples)), np.empty(len(examples)))
        for name, is_whole in self._matrices.items():
            if is_whole:
                found.matrices[name] = np.zeros(self._engine.gguf.info(name).shape, np.float32)
        for first, request in _portions(self._engine, examples, self._most_counted):
            nll = self._add(request, len(examples), slopes, found)
            losses, correct, _ = reduce_losses(request, nll[np.newaxis])
            part = slice(first, first + losses.size)
            found.losses[part], found.correct[part] = losses[0], correct[0]
        for number, (name, is_whole) in enumerate(self._matrices.items()):
            if not is_whole:
                found.factors[name] = self._native.gradient(number)
        for number, name in enumerate(self._gains):
            found.gains[name] = self._native.gain_gradient(number)
        return found

    def _add(self, request: Request, n_examples: int, slopes: Slopes, to: Gradients) -> F64:
        """Add the gradients of a portion; the negative log-likelihoods of its targets."""
        batches = _batches(self._engine, request)
        nll = np.full(request.n_targets, np.nan)
        if _are_split(request, batches):  # the slopes of a loss need all that it depends on
            for batch in batches:
                nll[batch.slots] = self._engine.decode(batch, [AT_THETA])
                to.n_tokens += batch.tokens.size
        for batch, part in self._parts(batches):
            nll[batch.slots] = self._decode(batch, part)
            to.n_tokens += batch.tokens.size
            weights = slopes(request, nll)[batch.slots[part]] / n_examples
            self._native.run(weights.astype(np.float32))
            self._add_pairs(np.unique(batch.target_output[part]).size, to)
        return nll

    def _parts(self, batches: Sequence[DecodeBatch]) -> Iterator[tuple[DecodeBatch, slice]]:
        """Decodes, one for every so many positions that count, and which targets those have."""
        for batch in batches:
            _, first = np.unique(batch.target_output, return_index=True)
            starts = first[:: self._most_counted]
            for start, end in zip(starts, [*starts[1:], batch.target_output.size], strict=True):
                yield batch, slice(start, end)

    @property
    def _most_counted(self) -> int:
        """Positions whose values fit."""
        return max(1, self._most_bytes // max(1, self.token_bytes))

    def _add_pairs(self, n_counted: int, to: Gradients) -> None:
        for number, (name, is_whole) in enumerate(self._matrices.items()):
            if is_whole:
                x, dy = self._native.pairs(number, n_counted)
                to.matrices[name] += dy.T @ x

    def _decode(self, batch: DecodeBatch, part: slice) -> F64:
        """Decode until the values for some targets are gathered: a new graph is only looked at."""
        output_token = np.flatnonzero(batch.is_output).astype(np.int32)
        for _ in range(3):
            targets = batch.target_output[part], batch.target_token[part]
            self._native.begin(*targets, batch.tokens.size, output_token)
            nll = self._engine.decode(batch, [AT_THETA])
            if self._native.end():
                return nll
        raise ZoError("llama.cpp's graph is another one in every decode; it cannot be followed.")

    def close(self) -> None:
        """Detach from the engine, and release the native object."""
        self._hook.set_feedback(None)
        self._native.free()

    def __enter__(self) -> "FeedbackPass":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reach(engine: Engine) -> Reach:
    """What gradients reach in an engine's model, from one decode of a few tokens.

    Raises:
        ZoError: The parameters act through an adapter, or the model's graph cannot be followed.
    """
    with FeedbackPass(engine, {}) as feedback:
        return feedback.reach


def counted_inputs(
    engine: Engine,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    most_bytes: int = MOST_BYTES,
) -> Iterator[dict[str, F32]]:
    """What matrices are multiplied by at the positions that count, at the engine's theta.

    Args:
        engine: A loaded model, whose parameters act through the hook.
        names: The matrices.
        examples: Rows.
        most_bytes: Of values recorded at a time, rows longer than that aside.

    Yields:
        For every decode, matrix -> inputs (n_counted, n_cols); one and the same array for matrices
        that read the same.

    Raises:
        ZoError: A matrix is not used in a plain product, or an example does not fit a decode.
    """
    widths = {name: engine.gguf.info(name).n_cols for name in names}
    most = max(1, most_bytes // (sum(widths.values()) * np.float32().itemsize))
    with recording(native_library(), engine.hook, widths) as recorder:
        for _, request in _portions(engine, examples, most):
            for batch in _batches(engine, request):
                outputs = np.flatnonzero(batch.is_output).astype(np.int32)
                recorder.begin(batch.tokens.size, outputs, outputs)
                engine.decode(batch, [AT_THETA])
                same: dict[int, F32] = {}
                for number in range(len(widths)):
                    key = recorder.input_of(number)
                    if key not in same:
                        same[key] = recorder.read(number)[1]
                yield {name: same[recorder.input_of(k)] for k, name in enumerate(widths)}


# ---- decodes -------------------------------------------------------------------------------------


def _portions(
    engine: Engine, examples: Sequence[Example], most: int
) -> Iterator[tuple[int, Request]]:
    """Examples with at most so many positions that count, or one; and the number of the first."""
    first = n_outputs = 0
    for number, example in enumerate(examples):
        own = sum(s.n_outputs for s in engine.request([example]).sequences)
        if number > first and n_outputs + own > most:
            yield first, engine.request(examples[first:number])
            first, n_outputs = number, 0
        n_outputs += own
    if examples:
        yield first, engine.request(examples[first:])


def _batches(engine: Engine, request: Request) -> list[DecodeBatch]:
    groups = pack(request.sequences, engine.ctx_tokens, request.n_shared)
    return [lay_out(group, 1, engine.is_padded, request.n_shared) for group in groups]


def _are_split(request: Request, batches: Sequence[DecodeBatch]) -> bool:
    """Whether an example has targets in several decodes."""
    owner = np.empty(request.n_targets, np.int64)
    for example, spans in enumerate(request.spans):
        for first, end in spans:
            owner[first:end] = example
    return sum(np.unique(owner[batch.slots]).size for batch in batches) > len(request.spans)
