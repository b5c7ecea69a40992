"""libzo's tensors found by name, on a graph made here: originals and their copies on a device.

And one that llama.cpp holds twice, as it does a tied embedding with layers on a GPU.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tests.conftest import CACHE
from tests.helpers import stand_in_gpu
from zo_gguf import libzo
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import AT_THETA, Field, Hook, InPlace, Probe, Tensors

F32, WEIGHTS = 0, 1  # ggml_type, ggml_backend_buffer_usage
N_COLS, N_ROWS = 8, 2
NAME, COPY = "blk.0.ffn_up.weight.lora_a", "Device0#blk.0.ffn_up.weight.lora_a#0"
Pointer = ctypes.c_void_p


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", Pointer), ("no_alloc", ctypes.c_bool))


def ggml(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)((name, llama_cpp.llama_cpp._lib))


class Graph:
    """A product with each of some matrices, in one buffer of host memory."""

    def __init__(self, names: list[str], n_tokens: int = 3) -> None:
        ggml_init = ggml("ggml_init", Pointer, InitParams)
        matrix = ggml(
            "ggml_new_tensor_2d", Pointer, Pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
        )
        product = ggml("ggml_mul_mat", Pointer, Pointer, Pointer, Pointer)
        memory = ggml("ggml_backend_cpu_buffer_type", Pointer)()
        fill = ggml("ggml_backend_alloc_ctx_tensors_from_buft", Pointer, Pointer, Pointer)
        self.context = ggml_init(InitParams(1 << 16, None, True))
        self.matrices = {name: matrix(self.context, F32, N_COLS, N_ROWS) for name in names}
        for name in names:
            self.rename(name, name)
        self.x = matrix(self.context, F32, N_COLS, n_tokens)
        self.buffer = fill(self.context, memory)
        self.nodes = {n: product(self.context, w, self.x) for n, w in self.matrices.items()}

    def rename(self, name: str, to: str) -> None:
        """Give a matrix another name in ggml."""
        set_name = ggml("ggml_set_name", Pointer, Pointer, ctypes.c_char_p)
        set_name(self.matrices[name], to.encode())

    def build(self) -> None:
        """Mark all products as ones that are computed."""
        new = ggml("ggml_new_graph_custom", Pointer, Pointer, ctypes.c_size_t, ctypes.c_bool)
        expand = ggml("ggml_build_forward_expand", None, Pointer, Pointer)
        built = new(self.context, 16, False)
        for node in self.nodes.values():
            expand(built, node)

    def set_input(self, x: np.ndarray) -> None:
        """What the matrices are multiplied by, (n_tokens, N_COLS) f32."""
        put = ggml(
            "ggml_backend_tensor_set", None, Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t
        )
        put(self.x, x.ctypes.data, 0, x.nbytes)

    @property
    def usage(self) -> int:
        return int(ggml("ggml_backend_buffer_get_usage", ctypes.c_int, Pointer)(self.buffer))

    def values(self, name: str) -> np.ndarray:
        result = np.empty((N_ROWS, N_COLS), np.float32)
        get = ggml(
            "ggml_backend_tensor_get", None, Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t
        )
        get(self.matrices[name], result.ctypes.data, 0, result.nbytes)
        return result

    def free(self) -> None:
        ggml("ggml_backend_buffer_free", None, Pointer)(self.buffer)
        ggml("ggml_free", None, Pointer)(self.context)


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph([NAME, COPY, "blk.0.ffn_up.weight"])
    yield made
    made.free()


def look(tensors: Tensors, node: int) -> None:
    evaluate = native_library().functions.zo_tensors_eval
    assert not evaluate(node, True, tensors.handle)  # asks for no node
    assert evaluate(node, False, tensors.handle)  # and never stops the decode


def test_an_original_is_preferred_to_its_copies(graph: Graph) -> None:
    values = np.arange(N_ROWS * N_COLS, dtype=np.float32).reshape(N_ROWS, N_COLS)
    tensors = Tensors(native_library())
    tensors.add(NAME, values.nbytes)
    look(tensors, graph.nodes["blk.0.ffn_up.weight"])
    with pytest.raises(ZoError, match="never read"):
        tensors.set(0, values)
    look(tensors, graph.nodes[COPY])
    assert tensors.missing == 1
    assert graph.usage != WEIGHTS
    with pytest.raises(ZoError, match="to a device for every decode"):
        tensors.set(0, values)
    look(tensors, graph.nodes[NAME])
    assert graph.usage == WEIGHTS  # its products stay where it lies
    look(tensors, graph.nodes[COPY])  # of a later decode
    assert tensors.missing == 0
    tensors.set(0, values)
    assert np.array_equal(graph.values(NAME), values)
    tensors.free()


def all_values(values: np.ndarray) -> InPlace:
    """All values of the matrix NAME."""
    in_place = InPlace(native_library(), 1)
    described = Field(values.size, values.itemsize, 1)  # f32 throughout
    described.limit = np.inf
    in_place.add(NAME, described, values.nbytes, values)
    return in_place


@pytest.mark.parametrize("on_gpu", [False, True])
def test_values_in_place_outlive_their_hook(
    graph: Graph, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's memory held has to be found by the next one: its devices went with the first."""
    if on_gpu:
        library = stand_in_gpu.build(CACHE)
        monkeypatch.setattr(libzo.library, "library_path", lambda: library)
    libzo.load.cache_clear()
    graph.build()
    values = np.arange(N_ROWS * N_COLS, dtype=np.float32)
    in_place = all_values(values)
    hook = Hook(native_library(), None, in_place, None, None, n_threads=1)
    with pytest.raises(ZoError, match="have a hook already"):
        Hook(native_library(), None, in_place, None, None, n_threads=1)
    for expected in (values, values + 1):
        native_library().functions.zo_hook_eval(graph.nodes[NAME], True, hook.handle)
        in_place.write(expected)
        in_place.apply(AT_THETA)
        assert np.array_equal(graph.values(NAME).reshape(-1), expected)
        hook.free()
        if on_gpu:
            with pytest.raises(ZoError, match="is not used by the model"):
                in_place.apply(AT_THETA)
        hook = Hook(native_library(), None, in_place, None, None, n_threads=1)
    hook.free()
    in_place.free()
    libzo.load.cache_clear()


def test_a_weight_that_lies_in_two_places_is_written_to_both(graph: Graph) -> None:
    graph.rename(COPY, NAME)
    graph.build()
    values = np.arange(N_ROWS * N_COLS, dtype=np.float32)
    in_place = all_values(values)
    hook = Hook(native_library(), None, in_place, None, None, n_threads=1)
    evaluate = native_library().functions.zo_hook_eval
    for name in (NAME, COPY, "blk.0.ffn_up.weight", NAME, COPY):
        evaluate(graph.nodes[name], True, hook.handle)
    for moved in (values, values + 1):
        in_place.write(moved)
        in_place.apply(AT_THETA)
        for name in (NAME, COPY):
            assert np.array_equal(graph.values(name).reshape(-1), moved)
    assert in_place.size == values.size
    np.testing.assert_array_equal(in_place.values(), moved)
    z = in_place.noise(3)
    in_place.apply(Probe(3, 0.5))
    for name in (NAME, COPY):
        np.testing.assert_allclose(graph.values(name).reshape(-1), moved + 0.5 * z, rtol=1e-6)
    hook.free()
    in_place.free()
