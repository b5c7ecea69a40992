"""llama.cpp's and ggml's own quantizers: whole GGUFs, and single blocks of a matrix.

Types go by their llama.cpp names (Q4_0, Q4_K_M, ...). Whole files are quantized without an
importance matrix. `quantize_chunk` serves types whose blocks have no simple layout; which result is
kept is decided in `merging`.
"""

import ctypes
import difflib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.errors import ZoError
from zo_gguf.system import deferred, require_file

_LOG_LEVEL_ERROR = 4  # as in ggml.h
_LOG_LEVEL_CONTINUE = 5


@cache
def quant_types() -> dict[str, int]:
    """Quantization names that this llama.cpp knows, with its number for each."""
    types: dict[str, int] = {}
    for name in dir(llama_cpp):
        for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
            if name.startswith(prefix):
                types[name.removeprefix(prefix)] = getattr(llama_cpp, name)
    return types


def quant_name(name: str) -> str:
    """The llama.cpp spelling of a quantization name, such as "Q4_K_M" for "q4_k_m".

    Raises:
        ZoError: There is no such quantization; the sentence names the nearest.
    """
    wanted = name.strip().upper().replace("-", "_")
    if wanted in quant_types():
        return wanted
    near = difflib.get_close_matches(wanted, quant_types(), n=4, cutoff=0.4)
    near = near or ["Q4_0", "Q8_0", "Q4_K_M", "F16"]
    raise ZoError(f"There is no quantization {name!r}; the nearest are {', '.join(near)}.")


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    quant: str,
    n_threads: int | None = None,
) -> None:
    """Write `target` as the quantized form of `source`; an existing `target` is replaced whole.

    Args:
        source: A float GGUF (F16, BF16 or F32).
        target: File to write; it appears only when it is complete.
        quant: Name of the quantization, such as "Q4_0".
        n_threads: CPU threads; all cores when None.

    Raises:
        ZoError: Unknown quantization, unreadable source, or llama.cpp refuses the job.
    """
    quant = quant_name(quant)
    source = require_file(source, "GGUF to quantize")
    target = Path(target)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = quant_types()[quant]
    params.nthread = n_threads or 0
    target.parent.mkdir(parents=True, exist_ok=True)
    # llama.cpp opens its output by name, so atomic_write's file object is of no use here.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        temporary = Path(folder) / target.name
        with deferred(), _log_lines(quant) as lines:
            status = llama_cpp.llama_model_quantize(
                os.fsencode(source), os.fsencode(temporary), ctypes.byref(params)
            )
        if status != 0 or not temporary.is_file():
            reason = lines[-1].rpartition(": ")[2].strip(" .!\n") if lines else "no reason given"
            raise ZoError(f"llama.cpp cannot quantize {source.name!r} to {quant}: {reason}.")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)


@contextmanager
def _log_lines(quant: str) -> Iterator[list[str]]:
    """Turn llama.cpp's log into a progress bar meanwhile and collect its error messages."""
    lines: list[str] = []
    level_now = 0
    bar = tqdm(desc=f"quantize {quant}", unit="tensor", disable=None, leave=False)

    def collect(level: int, text: bytes, _user_data: object) -> None:
        nonlocal level_now
        level_now = level_now if level == _LOG_LEVEL_CONTINUE else level
        with suppress(Exception):  # an exception must not cross into C
            if level_now == _LOG_LEVEL_ERROR:
                lines.append(text.decode(errors="replace"))
            elif found := re.match(rb"\[\s*(\d+)/\s*(\d+)\]", text):
                bar.total = int(found[2])
                bar.update(int(found[1]) - bar.n)

    previous = llama_cpp.llama_log_callback()
    user_data = ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(previous, user_data)
        bar.close()


# ---- blocks --------------------------------------------------------------------------------------


# What ggml_quantize_chunk of the pinned llama.cpp knows; anything else would abort the process.
SUPPORTED = frozenset({
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K,
    Type.Q5_K, Type.Q6_K, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ3_XXS, Type.IQ3_S, Type.IQ2_S,
    Type.IQ1_S, Type.IQ1_M, Type.IQ4_NL, Type.IQ4_XS, Type.TQ1_0, Type.TQ2_0, Type.MXFP4,
})  # fmt: skip


@cache
def _quantize_chunk() -> Any:
    # A symbol lookup through libllama's handle also searches its dependencies; opening libggml-base
    # by path would load a second copy.
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    return prototype(("ggml_quantize_chunk", llama_cpp.llama_cpp._lib))


def quantize_blocks(
    values: NDArray[np.float32], kind: Type, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize blocks of weights.

    Args:
        values: (n_blocks, block).
        kind: The type to make; `block` is its block size.
        importance: Weight of each value's squared error, same shape; positive.

    Returns:
        (n_blocks, block_bytes).

    Raises:
        ZoError: ggml cannot make `kind`.
    """
    if kind not in SUPPORTED:
        raise ZoError(f"llama.cpp cannot quantize to {kind.name}; promote the tensor to Q8_0.")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    assert values.ndim == 2
    assert values.shape[1] == block
    values = np.ascontiguousarray(values, dtype=np.float32)
    result = np.zeros((len(values), block_bytes), dtype=np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        assert weights.shape == values.shape
    # One row of all blocks: importances are per column, so this gives every value its own.
    _quantize_chunk()(
        int(kind), values.ctypes.data, result.ctypes.data, 0, 1, values.size,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    return result
