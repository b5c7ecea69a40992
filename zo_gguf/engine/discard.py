"""Have llama.cpp leave logits on the device, where a hook has made losses of them.

llama_decode copies the logits of all outputs to host memory, except for sequences that have a
sampler inside the graph (llama.h, llama_set_sampler). Ours samples nothing.
"""

import ctypes
from typing import Any

import llama_cpp
import psutil

from zo_gguf.handles import address
from zo_gguf.native import Library

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
