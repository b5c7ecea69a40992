"""Hand-made graphs in the loaded ggml, shown to libzo's hook as llama.cpp shows its own."""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from zo_gguf.engine.model import native_library
from zo_gguf.libzo import AT_THETA, Feedback, Hook

F32_TYPE, I32_TYPE = 0, 26  # ggml_type


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _call(name: str, result: Any, kinds: tuple[Any, ...], *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *kinds)((name, llama_cpp.llama_cpp._lib))(*arguments)


class Graph:
    """Tensors and operations; arrays are (..., n_cols) as in numpy, tensors pointers."""

    def __init__(self, megabytes: int = 64) -> None:
        params = _InitParams(megabytes << 20, None, False)
        self.context = _call("ggml_init", c_void_p, (_InitParams,), params)

    def free(self) -> None:
        """Release the memory of all tensors."""
        _call("ggml_free", None, (c_void_p,), self.context)

    def op(self, name: str, *arguments: Any) -> int:
        """ggml_NAME(context, ...): tensors and whole numbers as int, constants as float."""
        kinds = tuple(
            c_float if isinstance(a, float) else c_bool if isinstance(a, bool) else
            c_void_p if a is None or a > 1 << 31 else c_int64
            for a in arguments
        )  # fmt: skip
        return int(_call(f"ggml_{name}", c_void_p, (c_void_p, *kinds), self.context, *arguments))

    def tensor(self, values: NDArray[Any], name: str = "", *, is_input: bool = False) -> int:
        """A leaf with these values, f32 or int32."""
        kind = I32_TYPE if values.dtype == np.int32 else F32_TYPE
        shape = (c_int64 * values.ndim)(*values.shape[::-1])
        kinds = (c_void_p, c_int, c_int, POINTER(c_int64))
        made = int(
            _call("ggml_new_tensor", c_void_p, kinds, self.context, kind, values.ndim, shape)
        )
        ctypes.memmove(self.data(made), np.ascontiguousarray(values).ctypes.data, values.nbytes)
        if name:
            self.name(made, name)
        if is_input:
            _call("ggml_set_input", None, (c_void_p,), made)
        return made

    def raw(self, rows: NDArray[np.uint8], kind: int, n_cols: int, name: str) -> int:
        """A leaf of any ggml_type, from the bytes of its rows."""
        kinds = (c_void_p, c_int, c_int64, c_int64)
        made = int(
            _call("ggml_new_tensor_2d", c_void_p, kinds, self.context, int(kind), n_cols, len(rows))
        )
        ctypes.memmove(self.data(made), np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
        return self.name(made, name)

    def name(self, tensor: int, name: str) -> int:
        """Name a tensor, and give it back."""
        _call("ggml_set_name", c_void_p, (c_void_p, c_char_p), tensor, name.encode())
        return tensor

    def data(self, tensor: int) -> int:
        """Where a tensor's bytes lie."""
        return int(_call("ggml_get_data", c_void_p, (c_void_p,), tensor))

    def compute(self, last: int) -> list[int]:
        """Compute all that `last` needs; its nodes, in order."""
        graph = _call("ggml_new_graph", c_void_p, (c_void_p,), self.context)
        _call("ggml_build_forward_expand", None, (c_void_p, c_void_p), graph, last)
        kinds = (c_void_p, c_void_p, c_int)
        status = _call("ggml_graph_compute_with_ctx", c_int, kinds, self.context, graph, 1)
        assert status == 0
        n = _call("ggml_graph_n_nodes", c_int, (c_void_p,), graph)
        return [
            int(_call("ggml_graph_node", c_void_p, (c_void_p, c_int), graph, i)) for i in range(n)
        ]


def gather(
    nodes: list[int], hook: Hook, feedback: Feedback, n_tokens: int, outputs: NDArray[np.int32],
    target_output: NDArray[np.int32], target_token: NDArray[np.int32],
) -> NDArray[np.float64]:  # fmt: skip
    """Show computed nodes to a hook as two decodes do; the losses of the targets."""
    library = native_library().functions
    zeros = np.zeros(n_tokens, np.int32)
    hook.set_feedback(feedback)
    for expected in (False, True):
        hook.begin([AT_THETA], zeros, zeros[: outputs.size], target_output, target_token)
        feedback.begin(target_output, target_token, n_tokens, outputs)
        for node in nodes:
            if library.zo_hook_eval(node, True, hook.handle):
                assert library.zo_hook_eval(node, False, hook.handle)
        nll = hook.end(target_output.size)
        assert feedback.end() == expected
    return nll
