"""Hand-made graphs, run by ggml's scheduler with libzo's hook as llama.cpp runs its own."""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from zo_gguf.libzo import AT_THETA, Feedback, Hook

F32_TYPE, I32_TYPE = 0, 26  # ggml_type
_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_MOST_NODES = 512
Ints = NDArray[np.int32]


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _call(name: str, result: Any, kinds: tuple[Any, ...], *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *kinds)((name, llama_cpp.llama_cpp._lib))(*arguments)


class Graph:
    """Tensors and operations; arrays are (..., n_cols) as in numpy, tensors are pointers.

    Nothing is computed before `run`, and there is one run.
    """

    def __init__(self) -> None:
        self._backend = _call("ggml_backend_cpu_init", c_void_p, ())
        params = _InitParams(1 << 22, None, True)
        self._leaves = _call("ggml_init", c_void_p, (_InitParams,), params)
        self._nodes = _call("ggml_init", c_void_p, (_InitParams,), params)
        self._values: dict[int, NDArray[Any]] = {}
        self._buffer = self._scheduler = None

    def free(self) -> None:
        """Release everything."""
        if self._scheduler:
            _call("ggml_backend_sched_free", None, (c_void_p,), self._scheduler)
        if self._buffer:
            _call("ggml_backend_buffer_free", None, (c_void_p,), self._buffer)
        for context in (self._leaves, self._nodes):
            _call("ggml_free", None, (c_void_p,), context)
        _call("ggml_backend_free", None, (c_void_p,), self._backend)

    def op(self, name: str, *arguments: Any) -> int:
        """ggml_NAME(context, ...): tensors and whole numbers as int, constants as float."""
        kinds = tuple(
            c_float if isinstance(a, float) else c_void_p if a > 1 << 31 else c_int64
            for a in arguments
        )
        return int(_call(f"ggml_{name}", c_void_p, (c_void_p, *kinds), self._nodes, *arguments))

    def tensor(self, values: NDArray[Any], name: str = "", *, is_input: bool = False) -> int:
        """A leaf with these values, f32 or int32."""
        kind = I32_TYPE if values.dtype == np.int32 else F32_TYPE
        made = self._leaf(kind, values.shape[::-1], values, name)
        if is_input:
            _call("ggml_set_input", None, (c_void_p,), made)
        return made

    def raw(self, rows: NDArray[np.uint8], kind: int, shape: tuple[int, ...], name: str) -> int:
        """A leaf of any ggml_type and shape in numpy's order, from the bytes of its rows."""
        return self._leaf(int(kind), shape[::-1], rows, name)

    def _leaf(self, kind: int, ne: tuple[int, ...], values: NDArray[Any], name: str) -> int:
        kinds = (c_void_p, c_int, c_int, POINTER(c_int64))
        sizes = (c_int64 * len(ne))(*ne)
        made = int(_call("ggml_new_tensor", c_void_p, kinds, self._leaves, kind, len(ne), sizes))
        self._values[made] = np.ascontiguousarray(values)
        return self.name(made, name)

    def name(self, tensor: int, name: str) -> int:
        """Name a tensor, and give it back."""
        _call("ggml_set_name", c_void_p, (c_void_p, c_char_p), tensor, name.encode())
        return tensor

    def run(
        self,
        last: int,
        hook: Hook,
        feedback: Feedback,
        n_tokens: int,
        outputs: Ints,
        target_output: Ints,
        target_token: Ints,
    ) -> NDArray[np.float64]:
        """Two decodes, one that shows the graph and one that is gathered.

        Returns:
            The losses of the targets.
        """
        self._place()
        graph = _call("ggml_new_graph", c_void_p, (c_void_p,), self._nodes)
        _call("ggml_build_forward_expand", None, (c_void_p, c_void_p), graph, last)
        zeros = np.zeros(n_tokens, np.int32)
        hook.set_feedback(feedback)
        callback = (c_void_p, c_void_p, c_void_p)
        _call(
            "ggml_backend_sched_set_eval_callback", None, callback,
            self._scheduler, hook.callback, hook.handle,
        )  # fmt: skip
        for expected in (False, True):
            hook.begin([AT_THETA], zeros, zeros[: outputs.size], target_output, target_token)
            feedback.begin(target_output, target_token, n_tokens, outputs)
            compute = (c_void_p, c_void_p)
            _call("ggml_backend_sched_reset", None, (c_void_p,), self._scheduler)
            assert _call(
                "ggml_backend_sched_graph_compute", c_int, compute, self._scheduler, graph
            ) == 0  # fmt: skip
            nll = hook.end(target_output.size)
            assert feedback.end() == expected
        return nll

    def _place(self) -> None:
        """Give the leaves memory and values."""
        kinds = (c_void_p, c_void_p)
        allocate = "ggml_backend_alloc_ctx_tensors"
        self._buffer = _call(allocate, c_void_p, kinds, self._leaves, self._backend)
        _call("ggml_backend_buffer_set_usage", None, (c_void_p, c_int), self._buffer, _WEIGHTS)
        for tensor, values in self._values.items():
            _call(
                "ggml_backend_tensor_set", None, (c_void_p, c_void_p, c_size_t, c_size_t),
                tensor, values.ctypes.data, 0, values.nbytes,
            )  # fmt: skip
        backends = (c_void_p * 1)(self._backend)
        self._scheduler = _call(
            "ggml_backend_sched_new", c_void_p,
            (POINTER(c_void_p), c_void_p, c_int, c_size_t, c_bool, c_bool),
            backends, None, 1, _MOST_NODES, False, False,
        )  # fmt: skip
