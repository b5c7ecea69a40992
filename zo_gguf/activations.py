"""A sample of what goes into a model's weight matrices, recorded while plain llama.cpp reads rows.

Only looks: the callback asks for the matrix products of the wanted weights and copies their inputs.
Which rows are read, and what the sample is good for, is decided in `merge_data` and `code_search`.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: TID251 - a context of its own, with a callback in Python
import numpy as np
from numpy.typing import NDArray

from zo_gguf.dataset import Example
from zo_gguf.errors import ZoError
from zo_gguf.llama import default_threads, load_model, quiet_engine

F32 = NDArray[np.float32]

MAX_SAMPLES = 2048  # tokens recorded
_MAX_ROWS = 64
_MAX_BYTES = 1 << 30  # of the whole sample
_F32 = 0  # ggml_type


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned llama.cpp (ggml.h)."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _Recorder:
    """The evaluation callback and what it has seen.

    Attributes:
        inputs: Name of an input tensor -> recorded columns, one array per row of data.
        input_of: Weight -> name of its input; weights such as q, k and v share one.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.inputs: dict[str, list[F32]] = {}
        self.input_of: dict[str, str] = {}
        self.failure: BaseException | None = None
        self._wanted = frozenset(names)
        self._seen: set[str] = set()
        self._columns: dict[int, NDArray[np.intp]] = {}
        library = llama_cpp.llama_cpp._lib
        copy_type = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
        )
        self._copy = copy_type(("ggml_backend_tensor_get", library))
        kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        self.callback = kind(self._evaluate)

    def begin(self, columns: dict[int, NDArray[np.intp]]) -> None:
        """Expect a decode; `columns` says which columns to keep of a node with that many."""
        self._seen = set()
        self._columns = columns

    def _evaluate(self, address: int, ask: bool, _: int | None) -> bool:
        try:
            node = _Tensor.from_address(address)
            if not node.src[0] or not node.src[1]:
                return False
            # Copies on a device are called CUDA0#name#0.
            name = node.src[0].contents.name.decode(errors="replace")
            name = name.split("#")[1] if "#" in name else name
            if name not in self._wanted:
                return False
            if not ask:
                self._record(name, node.src[1].contents)
            return True
        except BaseException as failure:  # ctypes would only print it
            self.failure = failure
            return False

    def _record(self, weight: str, source: _Tensor) -> None:
        n_cols, n_columns = source.ne[0], source.ne[1]
        key = source.name.decode(errors="replace")
        plain = source.nb[0] == 4 and source.nb[1] == 4 * n_cols and source.type == _F32
        keep = self._columns.get(n_columns)
        if not plain or source.ne[2] * source.ne[3] != 1 or keep is None:
            return
        self.input_of[weight] = key
        if key in self._seen:
            return
        self._seen.add(key)
        values = np.empty((n_columns, n_cols), dtype=np.float32)
        self._copy(ctypes.addressof(source), values.ctypes.data, 0, values.nbytes)
        self.inputs.setdefault(key, []).append(values[keep])


def sample_inputs(
    model: Path,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    counted_share: float,
    n_threads: int | None = None,
) -> dict[str, F32]:
    """Record inputs of weight matrices.

    Args:
        model: The GGUF to run.
        names: The weights.
        examples: Rows to read; the first few are enough.
        counted_share: Weight of the positions whose prediction counts in the loss, against all
            other positions, which reach the loss through attention only.
        n_threads: CPU threads.

    Returns:
        Weight -> (n_samples, n_cols), each sample scaled by the square root of its weight; the
        weights sum to one. Matrices with unusual inputs are missing.

    Raises:
        ZoError: llama.cpp cannot run the model.
    """
    rows = list(examples[:_MAX_ROWS])
    longest = max(len(example.tokens) for example in rows)
    recorder = _Recorder(names)
    counted: list[dict[int, NDArray[np.bool_]]] = []
    n_kept = max(8, MAX_SAMPLES // len(rows))
    with _context(model, longest, recorder, n_threads or default_threads()) as context:
        for example in rows:
            flags = np.array([*example.target_mask[1:], False])  # predicts a counted token
            flags[-1] |= not flags.any()
            keep = _spread(flags, n_kept)
            outputs = np.flatnonzero(flags)
            recorder.begin({len(outputs): np.arange(len(outputs)), len(flags): keep})
            _decode(context, example.tokens, flags)
            if recorder.failure:
                raise recorder.failure
            counted.append({len(keep): flags[keep], len(outputs): flags[outputs]})
    scaled = {
        key: _weighted(parts, counted, counted_share) for key, parts in recorder.inputs.items()
    }
    return {weight: scaled[key] for weight, key in recorder.input_of.items()}


def _spread(flags: NDArray[np.bool_], n_kept: int) -> NDArray[np.intp]:
    """Positions to keep: counted ones first, the rest evenly spaced, at most `n_kept`."""
    counted, others = np.flatnonzero(flags), np.flatnonzero(~flags)
    counted = counted[_evenly(len(counted), max(1, n_kept // 2))]
    others = others[_evenly(len(others), n_kept - len(counted))]
    return np.sort(np.concatenate([counted, others]))


def _evenly(n: int, n_kept: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, n - 1, min(n, n_kept)).astype(np.intp)) if n else np.arange(0)


def _weighted(
    parts: Sequence[F32], counted: Sequence[dict[int, NDArray[np.bool_]]], share: float
) -> F32:
    """All recorded columns of one input, (n_samples, n_cols), scaled by their weights' roots."""
    values = np.concatenate(parts)
    flags = np.concatenate([flags[len(part)] for part, flags in zip(parts, counted, strict=True)])
    weights = np.empty(len(flags))
    shares = (share, 1 - share) if 0 < flags.sum() < len(flags) else (1, 1)
    weights[flags] = shares[0] / max(flags.sum(), 1)
    weights[~flags] = shares[1] / max((~flags).sum(), 1)
    return values * np.sqrt(weights)[:, None].astype(np.float32)


@contextmanager
def _context(model: Path, n_tokens: int, recorder: _Recorder, n_threads: int) -> Iterator[Any]:
    loaded = load_model(model)
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
        params.n_threads = params.n_threads_batch = n_threads
        params.cb_eval = ctypes.cast(recorder.callback, llama_cpp.ggml_backend_sched_eval_callback)
        with quiet_engine():
            context = llama_cpp.llama_init_from_model(loaded, params)
        if not context:
            raise ZoError(f"llama.cpp cannot read rows of {n_tokens} tokens with {str(model)!r}.")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(loaded)


def _decode(context: Any, tokens: Sequence[int], flags: NDArray[np.bool_]) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = i
        batch.seq_id[i][0] = 0
        batch.n_seq_id[i] = 1
        batch.logits[i] = bool(flags[i])
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise ZoError(f"llama_decode failed with status {status} on {len(tokens)} tokens.")
