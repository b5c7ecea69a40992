"""llama.cpp's contexts for an engine: made, and made larger, as decodes need it.

llama_decode copies the logits of all outputs to host memory, except for sequences that have a
sampler inside the graph (llama.h, llama_set_sampler). `Discard` samples nothing: it leaves them on
the device, where a hook has made losses of them.
"""

import ctypes
from contextlib import nullcontext
from ctypes import c_double, c_int32
from typing import Any

import llama_cpp
import numpy as np
import psutil
from numpy.typing import NDArray

from zo_gguf.engine.batch import MAX_SEQUENCES, DecodeBatch
from zo_gguf.engine.model import engine_batch, quiet_engine, use_adapter
from zo_gguf.errors import ZoError
from zo_gguf.libzo import ON_CPU, Hook, Library, Tensors, address, pointer

# llama.cpp reserves host memory for all that a sampler could give: so much, and of what is free at
# most one part in _SHARE, is worth it.
_BYTES_PER_LOGIT = 16
_MOST_BYTES = 1 << 30
_SHARE = 8


def worth_discarding(n_logits: int) -> bool:
    """Whether the copies that are saved are worth what llama.cpp reserves for samplers."""
    most = min(_MOST_BYTES, int(psutil.virtual_memory().available) // _SHARE)
    return n_logits * _BYTES_PER_LOGIT <= most


class Discard:
    """Samplers that have nothing copied, for the sequences of one context.

    Args:
        library: libzo.
        n_sequences: Of the context; each needs a sampler of its own.

    Attributes:
        configs: What llama_context_params.samplers takes.
    """

    def __init__(self, library: Library, n_sequences: int) -> None:
        functions = library.functions
        self._interface = llama_cpp.llama_sampler_i()  # that the samplers point to
        for field, function in (
            ("backend_init", functions.zo_discard_init),
            ("backend_apply", functions.zo_discard_apply),
        ):
            kind = type(getattr(self._interface, field))
            setattr(self._interface, field, kind(address(function)))
        self._chains = [self._chain() for _ in range(n_sequences)]
        self.configs = (llama_cpp.llama_sampler_seq_config * n_sequences)()
        for number, (config, chain) in enumerate(zip(self.configs, self._chains, strict=True)):
            config.seq_id, config.sampler = number, ctypes.cast(chain, ctypes.c_void_p)

    def _chain(self) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(
            chain, llama_cpp.llama_sampler_init(self._interface, None)
        )
        return chain

    def free(self) -> None:
        """Release the samplers; the context must be gone."""
        for chain in self._chains:
            llama_cpp.llama_sampler_free(chain)
        self._chains = []


# ---- contexts ------------------------------------------------------------------------------------


_KV_PADDING = 256  # llama.cpp rounds a sequence's KV cells up to this


class Context:
    """A context of a model, whose sizes follow the batches.

    Args:
        model: llama.cpp's handle.
        watcher: Its callback sees every node; it must outlive the context. None: nothing does.
        adapter: llama.cpp's handle of a LoRA adapter, or None.
        n_threads: CPU threads.
        discards: libzo, if logits need not be copied to the host: the watcher makes the losses.
        ctx_tokens: KV cells where sequences lie side by side.
        padded: Sequences have caches of their own, all of one length, instead.
    """

    def __init__(
        self,
        model: Any,
        watcher: Hook | Tensors | None,
        *,
        adapter: Any = None,
        n_threads: int,
        ctx_tokens: int,
        padded: bool,
        discards: Library | None = None,
    ) -> None:
        self._model, self._watcher, self._adapter = model, watcher, adapter
        self._n_threads, self._ctx_tokens, self._padded = n_threads, ctx_tokens, padded
        self._discards = discards
        self._samplers: Discard | None = None
        self._context: Any = None
        self._limits = (0, 0, 0)  # KV cells, sequences, outputs
        self._settled = True
        self.is_clean = True  # no NaN of the last decode is left in the cache

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
        if self._watcher is not None:
            callback = self._watcher.callback
            params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(callback)
            params.cb_eval_user_data = self._watcher.handle
        if self._discards and worth_discarding(params.n_outputs_max * self._n_vocab):
            self._samplers = Discard(self._discards, n_sequences)
            params.samplers, params.n_samplers = self._samplers.configs, n_sequences
            params.n_outputs_max_per_seq = params.n_outputs_max
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
        if self._adapter is not None:
            use_adapter(context, self._adapter)
            self._settled = False
        return context

    def decode(self, batch: DecodeBatch) -> int:
        """llama_decode after `make_room`, with nothing in the cache before; returns its status."""
        # Attention weighs masked cells by 0, but 0 * NaN is NaN: after one, the cache is erased.
        memory, erase = llama_cpp.llama_get_memory(self._context), not self.is_clean
        llama_cpp.llama_memory_clear(memory, erase)
        self.is_clean = False  # as long as nobody has looked at the results
        # With an adapter, llama.cpp reserves its buffers, and talks of it, in the first decode.
        silence = nullcontext() if self._settled else quiet_engine()
        self._settled = True
        with engine_batch(batch) as native_batch, silence:
            return int(llama_cpp.llama_decode(self._context, native_batch))

    def losses(self, batch: DecodeBatch, library: Library) -> NDArray[np.float64]:
        """Negative log-likelihood of each target of the last decode, from its logits."""
        n_vocab = self._n_vocab
        nll = np.empty(batch.target_token.size, np.float64)
        library.call(
            "zo_losses",
            llama_cpp.llama_get_logits(self._context),
            n_vocab,
            n_vocab,
            batch.output_branch.size,
            nll.size,
            pointer(batch.target_output, c_int32),
            pointer(batch.target_token, c_int32),
            self._n_threads,
            ON_CPU,
            pointer(nll, c_double),
        )
        return nll

    @property
    def _n_vocab(self) -> int:
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        return int(llama_cpp.llama_vocab_n_tokens(vocabulary))

    def free(self) -> None:
        """Release llama.cpp's context."""
        if self._context:
            with quiet_engine():
                llama_cpp.llama_free(self._context)
        if self._samplers:
            self._samplers.free()
        self._context = self._samplers = None
