"""Thin layer over llama_cpp's low-level calls: loading, logging, batches, the vocabulary.

Everything here is what llama-cpp-python's `Llama` does for itself, without its defaults.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
from llama_cpp._logger import llama_log_callback
from numpy.typing import NDArray

from zo_gguf.engine.batch import DecodeBatch
from zo_gguf.engine.hardware.amx import require_working_amx
from zo_gguf.errors import ZoError
from zo_gguf.libzo import Library
from zo_gguf.system import deferred, usable_cores

_ERROR = 4  # ggml_log_level


def default_threads() -> int:
    """Physical cores that this process may use; hyper-threads do not help matrix products."""
    usable = usable_cores()
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def native_library() -> Library:
    """libzo, bound to the ggml that llama_cpp has loaded."""
    return Library(llama_cpp.__version__)


@contextmanager
def quiet_engine() -> Iterator[list[str]]:
    """Keep llama.cpp's log off the terminal, and Ctrl-C until it is done; yields its errors."""
    messages: list[str] = []

    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            line = text.decode(errors="replace").strip()
            messages.append(line.partition(": ")[2] or line)  # without the function's name

    callback = llama_cpp.llama_log_callback(collect)
    with deferred():
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        try:
            yield messages
        finally:
            llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def load_model(
    path: Path, n_gpu_layers: int = 0, writable: bool = False, repack: bool = True
) -> Any:
    """Load a GGUF's weights.

    Args:
        path: The file.
        n_gpu_layers: As in llama.cpp.
        writable: Into memory that may be edited, not mapped from the file.
        repack: Let llama.cpp lay quantized matrices out anew for this CPU.

    Raises:
        ZoError: llama.cpp refuses the file; the sentence ends with its reason. Or it would crash.
    """
    if repack:
        require_working_amx()
    choose_cuda_graphs()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    if writable:
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = repack
    return _load(path, params)


def check_architecture(path: Path) -> None:
    """Raise ZoError if the engine cannot tune models such as this one; reads no weights."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    llama_cpp.llama_model_free(_load(path, params))


def _load(path: Path, params: Any) -> Any:
    with quiet_engine() as messages:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        reason = messages[0] if messages else "no reason given"
        raise ZoError(f"llama.cpp cannot load {str(path)!r}: {reason}")
    if llama_cpp.llama_model_has_encoder(model):
        llama_cpp.llama_model_free(model)
        raise ZoError(f"{path.name!r} has an encoder (as T5 has); take a decoder-only model.")
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        llama_cpp.llama_model_free(model)
        raise ZoError(
            f"{path.name!r} has recurrent layers (as Mamba, RWKV and linear attention), for which "
            "llama.cpp splits batches in ways that cannot be followed; take a model with attention."
        )
    return model


def choose_cuda_graphs() -> None:
    """No CUDA graphs, unless GGML_CUDA_DISABLE_GRAPHS is 0.

    A hooked graph runs in hundreds of pieces; to capture each of them costs more than it saves. A
    GPU also does large products of layers that were left on the CPU.
    """
    name = "GGML_CUDA_DISABLE_GRAPHS"
    if os.environ.get(name) == "0":
        os.unsetenv(name)  # for llama.cpp: any value, this one too, would switch them off
    else:
        os.environ[name] = "1"


def load_adapter(model: Any, path: Path) -> Any:
    """Load a LoRA adapter, which llama.cpp frees with the model.

    Raises:
        ZoError: llama.cpp refuses it; the sentence ends with its reason.
    """
    with quiet_engine() as messages:
        adapter = llama_cpp.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise ZoError(f"llama.cpp refuses a LoRA for this model: {'; '.join(messages[:1])}")
    return adapter


def use_adapter(context: Any, adapter: Any) -> None:
    """Have all decodes of a context go through an adapter."""
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    with quiet_engine():
        llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))


@contextmanager
def engine_batch(batch: DecodeBatch) -> Iterator[Any]:
    """A llama_batch over the arrays of `batch`, valid inside the with block."""
    n = batch.tokens.size
    positions = np.ascontiguousarray(batch.positions)
    ids = np.arange(batch.n_sequences, dtype=np.int32)
    n_ids = np.ascontiguousarray(batch.sequence_counts)
    id_pointers = ids.ctypes.data + ids.itemsize * batch.sequence_ids.astype(np.uintp)
    flags = batch.is_output.astype(np.int8)
    native = llama_cpp.llama_batch()
    native.n_tokens = n
    arrays: dict[str, NDArray[Any]] = {
        "token": batch.tokens,
        "pos": positions,
        "n_seq_id": n_ids,
        "seq_id": id_pointers,
        "logits": flags,
    }
    kinds: dict[str, Any] = {field[0]: field[1] for field in llama_cpp.llama_batch._fields_}
    for name, array in arrays.items():
        setattr(native, name, ctypes.cast(array.ctypes.data, kinds[name]))
    yield native


class Vocabulary:
    """The GGUF's own tokenizer.

    Attributes:
        bos_id, eos_id, eot_id: Token ids, -1 where the model has none.
        add_bos: Whether the model expects a sequence to begin with BOS.
        chat_template: Jinja source from the GGUF, None where it has none.
        n_vocab: Number of tokens.
    """

    def __init__(self, model: Any) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.bos_id = int(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos_id = int(llama_cpp.llama_vocab_eos(self._vocab))
        self.eot_id = int(llama_cpp.llama_vocab_eot(self._vocab))
        self.add_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab)) and self.bos_id >= 0
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        template = llama_cpp.llama_model_chat_template(model, None)
        self.chat_template = template.decode() if template else None

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS or EOS.

        Args:
            text: Any text.
            parse_special: Read special tokens written out, as chat templates do, as tokens.
        """
        data = text.encode()
        capacity = len(data) + 8  # a token is at least a byte; spaces may be put in front
        for _ in range(2):
            buffer = (llama_cpp.llama_token * capacity)()
            n = llama_cpp.llama_tokenize(
                self._vocab, data, len(data), buffer, capacity, False, parse_special
            )
            if n >= 0:
                return list(buffer[:n])
            capacity = -n
        raise ZoError(f"The tokenizer of the model failed on {text[:40]!r}.")

    def token_text(self, token: int) -> str:
        """A token as text, special tokens written out."""
        buffer = ctypes.create_string_buffer(512)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)].decode(errors="replace")


class Model:
    """A GGUF's weights inside llama.cpp; contexts of it must be gone before `free`.

    Args:
        path, n_gpu_layers, writable, repack: As for `load_model`.

    Attributes:
        handle: llama.cpp's.
        vocabulary: Its tokenizer.
        n_ctx_train: Tokens of the longest text that it was trained on.
        supports_gpu: Whether this build of llama.cpp can offload to any device.

    Raises:
        ZoError: As `load_model`.
    """

    def __init__(self, path: Path, n_gpu_layers: int, writable: bool, repack: bool) -> None:
        self.handle = load_model(path, n_gpu_layers, writable, repack)
        self.vocabulary = Vocabulary(self.handle)
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self.handle))
        self.supports_gpu = bool(llama_cpp.llama_supports_gpu_offload())

    def free(self) -> None:
        """Release the weights."""
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
        self.handle = None
