"""Tuned weights in an existing `llama_cpp.Llama`: exact, without merging, undone by `detach`."""

import contextlib
import ctypes
import os
import weakref
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp import _internals

from zo_gguf.engine.model import native_library, quiet_engine
from zo_gguf.engine.parameters import AT_THETA, Parameters
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Hook
from zo_gguf.params.delta import Delta, open_delta

_ATTRIBUTE = "_zo_gguf_attachment"


class _HookedContext(_internals.LlamaContext):
    """A context whose decodes fail where the hook refused a node; llama_decode itself would not."""

    hook: Hook
    llama: Any  # a proxy of what it belongs to

    def decode(self, batch: Any) -> None:
        """llama_decode.

        Raises:
            ZoError: The graph was not what the tuned weights expect; nothing stays in the cache.
        """
        try:
            try:
                super().decode(batch)
            finally:
                self.hook.check()
        except ZoError:
            if self.memory is not None:
                llama_cpp.llama_memory_clear(self.memory, True)
            self.llama.reset()
            raise


@dataclass
class _Attachment:
    """What must live as long as the hooked context."""

    parameters: Parameters
    hook: Hook

    def free(self) -> None:
        self.hook.free()
        self.parameters.free()


def attach(llama: Any, delta: Delta | str | os.PathLike[str]) -> Any:
    """Let `llama` answer with the tuned weights.

    Its context is replaced by one with the hook, so its prompt cache is empty afterwards; LoRA
    adapters that it was made with stay.

    Args:
        llama: A `llama_cpp.Llama`, loaded from the GGUF that the delta was tuned on.
        delta: A `Delta`, a delta file or a run folder.

    Returns:
        The same object. Whatever runs its model raises ZoError where the weights cannot be applied.

    Raises:
        ZoError: The delta belongs to another GGUF, or its weights cannot be hooked; what was
            attached before stays.
    """
    delta = delta if isinstance(delta, Delta) else Delta.load(delta)
    gguf = GgufFile(llama.model_path)
    open_delta(delta, gguf)
    if delta.live:
        raise ZoError(
            f"Method {delta.header.method!r} edits the weights themselves, which a loaded Llama "
            "shares with its file; use `zo-gguf merge`, and load the result."
        )
    n_threads = llama.n_threads_batch
    parameters = Parameters(native_library(), delta, gguf, n_threads)
    parameters.prepare([AT_THETA])
    attachment = _Attachment(parameters, parameters.hook(n_threads))
    previous = getattr(llama, _ATTRIBUTE, None)
    try:
        _hook(llama, attachment)
        _check(llama, attachment.hook)
    except BaseException:
        _hook(llama, previous)
        attachment.free()
        raise
    setattr(llama, _ATTRIBUTE, attachment)
    if previous is not None:
        previous.free()
    return llama


def detach(llama: Any) -> Any:
    """Undo `attach`; does nothing where nothing is attached. Returns the same object."""
    attachment = getattr(llama, _ATTRIBUTE, None)
    if attachment is not None:
        _hook(llama, None)
        delattr(llama, _ATTRIBUTE)
        attachment.free()
    return llama


def _hook(llama: Any, attachment: _Attachment | None) -> None:
    """A new context with this hook, or with none."""
    hook = attachment.hook if attachment else None
    callback = llama_cpp.ggml_backend_sched_eval_callback(hook.callback if hook else 0)
    llama.context_params.cb_eval = callback
    llama.context_params.cb_eval_user_data = hook.handle if hook else None
    _replace_context(llama, hook)


def _replace_context(llama: Any, hook: Hook | None) -> None:
    kind = _HookedContext if hook else _internals.LlamaContext
    with quiet_engine():
        llama._ctx.close()
        context = kind(model=llama._model, params=llama.context_params, verbose=llama.verbose)
    if isinstance(context, _HookedContext):
        assert hook is not None
        context.hook, context.llama = hook, weakref.proxy(llama)
    llama._ctx = llama._stack.enter_context(contextlib.closing(context))
    adapter: Any = getattr(llama, "_lora_adapter", None)
    if adapter is not None:
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(llama.lora_scale)
        if llama_cpp.llama_set_adapters_lora(context.ctx, adapters, 1, scales):
            raise ZoError("llama.cpp could not set the LoRA adapter of this model again.")
    llama.reset()


def _check(llama: Any, hook: Hook) -> None:
    """Run one token, so that weights which never meet the hook are noticed now."""
    hook.begin_any()
    llama.eval([max(0, llama.token_bos())])
    hook.end(0)
    hook.begin_any()
    llama.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama._ctx.ctx), True)
