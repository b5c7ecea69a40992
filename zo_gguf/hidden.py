"""What a model makes of a text before it answers: its last hidden states, mean and final one.

Plain forward passes of the untuned model in a context of their own, in llama.cpp's embedding mode.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp  # noqa: TID251 - a context of its own, which gives hidden states
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.batch import TokenSequence, lay_out, pack
from zo_gguf.errors import ZoError
from zo_gguf.llama import engine_batch, quiet_engine

_TOKENS = 512  # of a decode: llama.cpp makes the logits of each as well, which take memory
_SEQUENCES = 64

F32 = NDArray[np.float32]


def hidden_states(model: Any, texts: Sequence[Sequence[int]], n_threads: int) -> F32:
    """The hidden states before the output head of each text: their mean, then that of its end.

    Args:
        model: llama.cpp's handle; it needs no free memory beyond a context of 512 tokens, or of the
            longest text.
        texts: Token ids, one or more each.
        n_threads: CPU threads.

    Returns:
        (n_texts, 2 * width).

    Raises:
        ZoError: There is not enough memory, or the model gives no hidden states.
    """
    width = int(llama_cpp.llama_model_n_embd(model))
    found = np.empty((len(texts), 2 * width), np.float32)
    size = max(_TOKENS, *(len(text) for text in texts))
    context = _new_context(model, size, n_threads)
    try:
        with tqdm(total=len(texts), desc="reading rows", disable=None, leave=False) as bar:
            for first, group in _groups(texts, size):
                states = _decode(context, group, width)
                for k, state in enumerate(states):
                    found[first + k] = np.concatenate([state.mean(axis=0), state[-1]])
                bar.update(len(group))
    finally:
        with quiet_engine():
            llama_cpp.llama_free(context)
    if not np.isfinite(found).all():
        raise ZoError("The model's hidden states are not finite; check the model.")
    return found


def _new_context(model: Any, size: int, n_threads: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = size
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
            f"llama.cpp could not make a context of {size} tokens ({'; '.join(messages[:1])}); "
            "close other programs, or take --targets answers."
        )
    return context


def _groups(texts: Sequence[Sequence[int]], size: int) -> Iterator[tuple[int, list[TokenSequence]]]:
    """Decodes, and the number of the first text in each."""
    no_targets, no_slots = np.empty(0, np.int32), np.empty(0, np.int64)
    sequences = []
    for text in texts:
        every = np.arange(len(text), dtype=np.int32)  # position is an output
        sequences.append(TokenSequence(np.array(text, np.int32), every, no_targets, no_slots))
    first = 0
    for group in pack(sequences, size, _SEQUENCES):
        yield first, group
        first += len(group)


def _decode(context: Any, group: Sequence[TokenSequence], width: int) -> list[F32]:
    """The hidden states of every token of each sequence, (n_tokens, width) each."""
    batch = lay_out(group, 1, padded=False)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
    with engine_batch(batch) as native_batch:
        status = llama_cpp.llama_decode(context, native_batch)
    states = llama_cpp.llama_get_embeddings(context) if status == 0 else None
    if not states:
        raise ZoError(
            f"llama.cpp gives no hidden states of this model (status {status}); take "
            "--targets answers."
        )
    flat = np.ctypeslib.as_array(states, (batch.tokens.size, width))
    return np.split(flat, np.cumsum([sequence.tokens.size for sequence in group])[:-1])
