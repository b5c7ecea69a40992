"""What a model makes of a text before it answers: its last hidden states, mean and final one.

Plain forward passes of the untuned model in a context of their own, in llama.cpp's embedding mode.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.engine.batch import TokenSequence, lay_out
from zo_gguf.engine.model import engine_batch, quiet_engine
from zo_gguf.errors import ZoError

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
