"""A sample of what goes into the tuned weight matrices, recorded while the tuned model reads rows.

A callback in Python stands before libzo's hook: it copies the input of each tuned matrix and hands
the node on. Which rows are read, and what the sample is good for, is decided in `merge_data` and
`code_search`.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.model import default_threads, load_model, native_library, quiet_engine
from zo_gguf.engine.parameters import AT_THETA, Parameters
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Hook, Library
from zo_gguf.params.delta import Delta
from zo_gguf.system import deferred

F32 = NDArray[np.float32]
Flags = NDArray[np.bool_]
Positions = NDArray[np.intp]

MAX_SAMPLES = 4096  # tokens recorded
_MAX_ROWS = 128
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


class _Recorder:
    """The evaluation callback and what it has seen.

    Attributes:
        inputs: Name of an input tensor -> what was recorded, one sample per row of data.
        input_of: Weight -> name of its input; weights such as q, k and v share one.
        failure: What went wrong in the callback.
    """

    def __init__(self, names: Iterable[str], hook: Hook, library: Library) -> None:
        self.inputs: dict[str, list[InputSample]] = {}
        self.input_of: dict[str, str] = {}
        self.failure: BaseException | None = None
        self._wanted = frozenset(names)
        self._hook = hook
        self._tune = library.functions.zo_hook_eval
        self._seen: set[str] = set()
        self._columns: dict[int, tuple[Positions, Flags]] = {}
        copy_type = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
        )
        self._copy = copy_type(("ggml_backend_tensor_get", llama_cpp.llama_cpp._lib))
        kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        self.callback = kind(self._evaluate)

    def begin(self, flags: Flags, n_kept: int) -> None:
        """Expect a decode of as many tokens as `flags`, which marks the output tokens."""
        self._seen = set()
        keep, outputs = _spread(flags, n_kept), np.flatnonzero(flags)
        outputs = outputs[_evenly(len(outputs), n_kept)]
        # Late in the last layer only the output tokens are left.
        of_output = np.cumsum(flags)[outputs] - 1
        self._columns = {
            int(flags.sum()): (of_output, flags[outputs]),
            len(flags): (keep, flags[keep]),
        }

    def _evaluate(self, address: int, ask: bool, _: int | None) -> bool:
        try:
            if not ask:
                self._look(_Tensor.from_address(address))
        except BaseException as failure:  # ctypes would only print it
            self.failure = failure
        return bool(self._tune(address, ask, self._hook.handle))

    def _look(self, node: _Tensor) -> None:
        if not node.src[0] or not node.src[1]:
            return
        # Copies on a device are called CUDA0#name#0.
        name = node.src[0].contents.name.decode(errors="replace")
        name = name.split("#")[1] if name.count("#") > 1 else name
        if name in self._wanted:
            self._record(name, node.src[1].contents)

    def _record(self, weight: str, source: _Tensor) -> None:
        n_cols, n_columns = source.ne[0], source.ne[1]
        key = source.name.decode(errors="replace")
        plain = source.nb[0] == 4 and source.nb[1] == 4 * n_cols and source.type == _F32
        columns = self._columns.get(n_columns)
        if not plain or source.ne[2] * source.ne[3] != 1 or columns is None:
            return
        self.input_of[weight] = key
        if key in self._seen:
            return
        self._seen.add(key)
        values = np.empty((n_columns, n_cols), dtype=np.float32)
        self._copy(ctypes.addressof(source), values.ctypes.data, 0, values.nbytes)
        keep, flags = columns
        self.inputs.setdefault(key, []).append(InputSample(values[keep], flags))


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
    longest = max(len(example.tokens) for example in rows)
    n_kept = max(8, MAX_SAMPLES // len(rows))
    with _tuned_context(base, delta, names, longest, n_threads) as (context, recorder):
        for example in rows:
            flags = np.array([*example.target_mask[1:], False])
            flags[-1] |= not flags.any()  # llama.cpp wants an output
            recorder.begin(flags, n_kept)
            _decode(context, example.tokens, flags)
            if recorder.failure:
                raise recorder.failure
    joined = {key: _joined(recorder.inputs.pop(key)) for key in list(recorder.inputs)}
    return {weight: joined[key] for weight, key in recorder.input_of.items()}


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


@contextmanager
def _tuned_context(
    base: GgufFile, delta: Delta, names: Sequence[str], n_tokens: int, n_threads: int | None
) -> Iterator[tuple[Any, _Recorder]]:
    n_threads = n_threads or default_threads()
    library = native_library()
    with ExitStack() as stack:
        model = load_model(base.path)
        stack.callback(llama_cpp.llama_model_free, model)
        parameters = Parameters(library, delta, base, n_threads)
        stack.callback(parameters.free)
        hook = parameters.hook(n_threads)
        stack.callback(hook.free)
        recorder = _Recorder(names, hook, library)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
        params.n_threads = params.n_threads_batch = n_threads
        params.cb_eval = ctypes.cast(recorder.callback, llama_cpp.ggml_backend_sched_eval_callback)
        with quiet_engine():
            context = llama_cpp.llama_init_from_model(model, params)
            if not context:
                raise ZoError(f"llama.cpp could not make a context of {n_tokens} tokens.")
        stack.callback(_free_quietly, context)
        hook.begin_any()
        parameters.prepare([AT_THETA])
        yield context, recorder


def _free_quietly(context: Any) -> None:
    with quiet_engine():
        llama_cpp.llama_free(context)


def _decode(context: Any, tokens: Sequence[int], flags: Flags) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = i
        batch.seq_id[i][0] = 0
        batch.n_seq_id[i] = 1
        batch.logits[i] = bool(flags[i])
    with deferred():
        status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise ZoError(f"llama_decode failed with status {status} on {len(tokens)} tokens.")
