"""llama.cpp's contexts for an engine: made, and made larger, as decodes need it."""

from typing import Any

import llama_cpp

from zo_gguf.batch import DecodeBatch
from zo_gguf.errors import ZoError
from zo_gguf.handles import Hook
from zo_gguf.llama import engine_batch, quiet_engine

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_KV_PADDING = 256  # llama.cpp rounds a sequence's KV cells up to this


class Context:
    """A context with a hook in it.

    Args:
        model: llama.cpp's handle.
        hook: Its callback sees every node; it must outlive the context.
        n_threads: CPU threads.
        ctx_tokens: KV cells where sequences lie side by side.
        padded: Sequences have caches of their own, all of one length, instead.
    """

    def __init__(
        self, model: Any, hook: Hook, *, n_threads: int, ctx_tokens: int, padded: bool
    ) -> None:
        self._model, self._hook, self._n_threads = model, hook, n_threads
        self._ctx_tokens, self._padded = ctx_tokens, padded
        self._context: Any = None
        self._limits = (0, 0, 0)  # KV cells, sequences, outputs

    def make_room(self, batch: DecodeBatch) -> None:
        """Have a context that holds the batch; sizes only grow, so this settles quickly.

        Raises:
            ZoError: There is not enough memory, or the model keeps no KV cache.
        """
        n_outputs = batch.output_branch.size
        n_sequences = batch.n_sequences
        if self._padded:
            cells = -(-batch.max_length // _KV_PADDING) * _KV_PADDING * n_sequences
        else:
            cells = self._ctx_tokens
        needed = (max(cells, batch.tokens.size), n_sequences, n_outputs)
        # The split layout divides the cells by the number of sequences: it must be exact.
        fits = all(have >= want for have, want in zip(self._limits, needed, strict=True))
        if self._context and fits and not (self._padded and self._limits[:2] != needed[:2]):
            return
        if not self._padded:
            grown = [
                max(have, 1 << (want - 1).bit_length())
                for have, want in zip(self._limits, needed, strict=True)
            ]
            needed = (needed[0], min(grown[1], MAX_SEQUENCES), min(grown[2], needed[0]))
        self.free()
        self._context = self._new(*needed)
        self._limits = needed

    def _new(self, cells: int, n_sequences: int, n_outputs: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = cells
        params.n_seq_max = n_sequences
        params.n_outputs_max = max(n_outputs, n_sequences)
        params.n_threads = params.n_threads_batch = self._n_threads
        params.kv_unified = not self._padded
        params.no_perf = True
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(self._hook.callback)
        params.cb_eval_user_data = self._hook.handle
        with quiet_engine() as messages:
            context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ZoError(
                f"llama.cpp could not make a context of {cells} tokens "
                f"({'; '.join(messages[:1])}); lower --ctx-tokens."
            )
        if llama_cpp.llama_get_memory(context) is None:
            llama_cpp.llama_free(context)
            raise ZoError("Models that are not causal cannot be tuned; use another.")
        return context

    def decode(self, batch: DecodeBatch) -> int:
        """llama_decode after `make_room`, with nothing in the cache before; returns its status."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        with engine_batch(batch) as native_batch:
            return int(llama_cpp.llama_decode(self._context, native_batch))

    def free(self) -> None:
        """Release llama.cpp's context."""
        if self._context:
            with quiet_engine():
                llama_cpp.llama_free(self._context)
        self._context = None
