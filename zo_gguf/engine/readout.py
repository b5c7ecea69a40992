"""What a model computes on the way: hidden states of a text, and what goes into weight matrices.

Plain forward passes in contexts of their own: hidden states are the untuned model's, in llama.cpp's
embedding mode; inputs of matrices are recorded by libzo beside the products, in the tuned model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.data.encode import Example
from zo_gguf.engine.batch import DecodeBatch, TokenSequence, lay_out, pack
from zo_gguf.engine.context import Context
from zo_gguf.engine.model import (
    default_threads,
    engine_batch,
    load_model,
    native_library,
    quiet_engine,
)
from zo_gguf.engine.parameters import AT_THETA, Parameters
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Hook, Library, Recorder
from zo_gguf.params.delta import Delta

_TOKENS = 256  # of a decode: llama.cpp makes the logits of each as well, which take memory
_SEQUENCES = 64

F32 = NDArray[np.float32]
Text = Sequence[int]


def hidden_states(model: Any, texts: Sequence[Text], n_threads: int) -> F32:
    """The hidden states before the output head of each text: their mean, then that of its end.

    Args:
        model: llama.cpp's handle; beyond it, this takes a cache for the longest text, and the
            logits and activations of 256 tokens.
        texts: Token ids, one or more each.
        n_threads: CPU threads.

    Returns:
        (n_texts, 2 * width).

    Raises:
        ZoError: There is not enough memory, or the model gives no hidden states.
    """
    width = int(llama_cpp.llama_model_n_embd(model))
    if llama_cpp.llama_model_n_embd_out(model) != width:
        raise ZoError("The model's output has another width than its layers; no states were read.")
    found = np.empty((len(texts), 2 * width), np.float32)
    context = _new_context(model, max(_TOKENS, *map(len, texts)), n_threads)
    try:
        with tqdm(total=len(texts), desc="reading rows", disable=None, leave=False) as bar:
            for first, group in _groups(texts):
                for k, (total, last) in enumerate(_read(context, group, width), first):
                    found[k] = np.concatenate([total / len(texts[k]), last])
                bar.update(len(group))
    finally:
        with quiet_engine():
            llama_cpp.llama_free(context)
    if not np.isfinite(found).all() or not found.any():
        raise ZoError("The model gives no hidden states that can be used.")
    return found


def _new_context(model: Any, size: int, n_threads: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = size
    params.n_batch = params.n_ubatch = _TOKENS
    params.n_seq_max = _SEQUENCES
    params.n_threads = params.n_threads_batch = n_threads
    params.kv_unified = True
    params.embeddings = True
    params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    params.no_perf = True
    with quiet_engine() as messages:
        context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ZoError(
            f"llama.cpp could not make a context to read {size} tokens "
            f"({'; '.join(messages[:1])}); close other programs."
        )
    return context


def _groups(texts: Sequence[Text]) -> Iterator[tuple[int, list[Text]]]:
    """Texts that are read together, or one long text, and the number of the first."""
    group: list[Text] = []
    n_tokens = 0
    for k, text in enumerate(texts):
        if group and (n_tokens + len(text) > _TOKENS or len(group) == _SEQUENCES):
            yield k - len(group), group
            group, n_tokens = [], 0
        group.append(text)
        n_tokens += len(text)
    yield len(texts) - len(group), group


def _read(context: Any, group: Sequence[Text], width: int) -> list[tuple[F32, F32]]:
    """The sum of each text's states, and the last of them, (width,) each."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
    longest = max(map(len, group))
    sums = [np.zeros(width, np.float32) for _ in group]
    for start in range(0, longest, _TOKENS):  # more than one part only for a text on its own
        states = _decode(context, [text[start : start + _TOKENS] for text in group], start, width)
        for total, of_text in zip(sums, states, strict=True):
            total += of_text.sum(axis=0)
    return [(total, of_text[-1]) for total, of_text in zip(sums, states, strict=True)]


def _decode(context: Any, parts: Sequence[Text], start: int, width: int) -> list[F32]:
    """The hidden states of every token of parts of texts, (n_tokens, width) each."""
    sequences = []
    for part in parts:
        every = np.arange(len(part), dtype=np.int32)  # position is an output, its target is ignored
        slots = every.astype(np.int64)
        sequences.append(TokenSequence(np.array(part, np.int32), every, every, slots))
    batch = lay_out(sequences, 1, padded=False)
    batch = replace(batch, positions=batch.positions + np.int32(start))
    with engine_batch(batch) as native_batch:
        status = llama_cpp.llama_decode(context, native_batch)
    states = llama_cpp.llama_get_embeddings(context) if status == 0 else None
    if not states:
        raise ZoError(f"llama.cpp could not read hidden states (status {status}).")
    flat = np.ctypeslib.as_array(states, (batch.tokens.size, width)).copy()
    return np.split(flat, np.cumsum([len(part) for part in parts])[:-1])


# ---- inputs of matrices --------------------------------------------------------------------------


MAX_SAMPLES = 4096  # tokens recorded
_MAX_ROWS = 512
_DECODE = 512  # tokens of a decode that records, more for a longer row

Flags = NDArray[np.bool_]
Positions = NDArray[np.intp]


@dataclass(frozen=True)
class InputSample:
    """Recorded inputs of one matrix.

    Attributes:
        values: (n_samples, n_cols).
        counted: (n_samples,), whether the position predicts a token that counts in the loss. Other
            positions reach the loss through attention only.
    """

    values: F32
    counted: Flags

    def scaled(self, counted_share: float) -> F32:
        """The samples scaled by the square roots of weights that sum to one.

        Args:
            counted_share: Weight of all counted positions together.
        """
        n_counted = int(self.counted.sum())
        n_others = len(self.counted) - n_counted
        share = counted_share if n_counted and n_others else float(n_counted > 0)
        weights = np.where(self.counted, share / max(n_counted, 1), (1 - share) / max(n_others, 1))
        return self.values * np.sqrt(weights)[:, None].astype(np.float32)


def sample_inputs(
    base: GgufFile,
    delta: Delta,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    n_threads: int | None = None,
) -> dict[str, InputSample]:
    """Record inputs of tuned matrices, in the tuned model.

    Args:
        base: The GGUF that was tuned.
        delta: What was learned.
        names: Which of its matrices.
        examples: Rows to read; the first few are enough.
        n_threads: CPU threads.

    Returns:
        Weight -> sample. Matrices with unusual inputs are missing.

    Raises:
        ZoError: llama.cpp cannot run the model.
    """
    rows = list(examples[:_MAX_ROWS])
    n_threads = n_threads or default_threads()
    library = native_library()
    with ExitStack() as stack:
        model = load_model(base.path)
        stack.callback(llama_cpp.llama_model_free, model)
        parameters = Parameters(library, delta, base, n_threads)
        stack.callback(parameters.free)
        hook = parameters.hook(n_threads)
        stack.callback(hook.free)
        size = max(_DECODE, *(len(example.tokens) for example in rows))
        context = Context(model, hook, n_threads=n_threads, ctx_tokens=size, padded=False)
        stack.callback(context.free)
        parameters.prepare([AT_THETA])
        widths = {name: delta.changed[name][1] for name in names}
        n_kept = max(8, MAX_SAMPLES // len(rows))
        return record_inputs(library, context, hook, widths, rows, n_kept, size)


def record_inputs(
    library: Library,
    context: Context,
    hook: Hook,
    widths: Mapping[str, int],
    examples: Sequence[Example],
    n_kept: int,
    max_tokens: int,
) -> dict[str, InputSample]:
    """Record what some matrices are multiplied by while rows go through a model.

    Args:
        library: libzo.
        context: With sequences side by side; `hook` is its watcher.
        hook: Its parameters must be at the theta that is wanted.
        widths: The matrices, and the number of their columns.
        examples: Rows.
        n_kept: Tokens to keep of each row, at most: half of them counted ones where there are more.
        max_tokens: Of a decode.

    Returns:
        Weight -> sample, in the order of the rows; the same one for weights that read the same.
        Matrices that are not used in a plain product are missing.

    Raises:
        ZoError: A row is longer than a decode, or the engine's graph is not supported.
    """
    parts: dict[str, list[InputSample]] = {}
    same: dict[str, str] = {}  # weight -> the first one that reads the same
    with recording(library, hook, widths) as recorder:
        for group in pack([_whole(example) for example in examples], max_tokens):
            batch = lay_out(group, 1, padded=False)
            outputs = np.flatnonzero(batch.is_output).astype(np.int32)
            recorder.begin(batch.tokens.size, _kept(batch, group, n_kept), outputs)
            _run(context, hook, batch)
            same |= _shared(recorder, list(widths))
            for number, name in enumerate(widths):
                if same.get(name) == name:
                    tokens, values = recorder.read(number)
                    sample = InputSample(values, batch.is_output[tokens])
                    parts.setdefault(name, []).append(sample)
    joined = {name: _joined(parts.pop(name)) for name in list(parts)}
    return {name: joined[first] for name, first in same.items()}


@contextmanager
def recording(library: Library, hook: Hook, widths: Mapping[str, int]) -> Iterator[Recorder]:
    """Have a hook record what some matrices are multiplied by, in decodes that are announced.

    Args:
        library: libzo.
        hook: Of the context that decodes.
        widths: The matrices, and the number of their columns.
    """
    recorder = Recorder(library)
    try:
        for name, width in widths.items():
            recorder.add(name, width)
        hook.set_recorder(recorder)
        yield recorder
    finally:
        hook.set_recorder(None)
        recorder.free()


def _shared(recorder: Recorder, names: Sequence[str]) -> dict[str, str]:
    """Every recorded weight, and the first of those that read the same in the last decode."""
    first: dict[int, str] = {}
    inputs = {name: recorder.input_of(number) for number, name in enumerate(names)}
    return {name: first.setdefault(k, name) for name, k in inputs.items() if k >= 0}


def _run(context: Context, hook: Hook, batch: DecodeBatch) -> None:
    context.make_room(batch)
    hook.begin_any()
    status = context.decode(batch)
    hook.check()
    if status != 0:
        raise ZoError(f"llama_decode failed with status {status} on {batch.tokens.size} tokens.")


def _whole(example: Example) -> TokenSequence:
    """All tokens of a row; those that predict a counted one are outputs, or else the last one."""
    flags = np.array([*example.target_mask[1:], False])
    flags[-1] |= not flags.any()  # llama.cpp wants an output
    outputs = np.flatnonzero(flags).astype(np.int32)
    ignored = np.zeros_like(outputs)  # losses are not asked for
    tokens, slots = np.array(example.tokens, np.int32), ignored.astype(np.int64)
    return TokenSequence(tokens, outputs, ignored, slots)


def _kept(batch: DecodeBatch, group: Sequence[TokenSequence], n_kept: int) -> NDArray[np.int32]:
    """Columns of a decode to keep, `n_kept` of every row at most."""
    ends = np.cumsum([sequence.tokens.size for sequence in group])
    starts = [0, *ends[:-1]]
    kept = [
        start + _spread(batch.is_output[start:end], n_kept)
        for start, end in zip(starts, ends, strict=True)
    ]
    return np.concatenate(kept).astype(np.int32)


def _joined(parts: Sequence[InputSample]) -> InputSample:
    return InputSample(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.counted for part in parts]),
    )


def _spread(flags: Flags, n_kept: int) -> Positions:
    """Positions to keep: counted ones first, the rest evenly spaced, at most `n_kept`."""
    counted, others = np.flatnonzero(flags), np.flatnonzero(~flags)
    counted = counted[_evenly(len(counted), max(1, n_kept // 2))]
    others = others[_evenly(len(others), n_kept - len(counted))]
    return np.sort(np.concatenate([counted, others]))


def _evenly(n: int, n_kept: int) -> Positions:
    return np.unique(np.linspace(0, n - 1, min(n, n_kept)).astype(np.intp)) if n else np.arange(0)
