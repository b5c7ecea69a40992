"""libzo's recorder on products made here: which rows it keeps, what it shares, what it refuses.

That it finds the inputs of a real model is tested in tests/merging/test_code_search.py.
"""

from collections.abc import Iterator
from ctypes import c_float, c_int32

import numpy as np
import pytest

from tests.native.test_native_tensors import N_COLS, Graph
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import Hook, Recorder, pointer

N_TOKENS = 5
QUERY, KEY, OTHER = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up.weight"
ON_DEVICE = f"CUDA0#{KEY}#0"  # what llama.cpp calls a copy of it


@pytest.fixture
def attention() -> Iterator[Graph]:
    yield from graph([QUERY, ON_DEVICE])


@pytest.fixture
def ffn() -> Iterator[Graph]:
    yield from graph([OTHER])


def graph(names: list[str]) -> Iterator[Graph]:
    made = Graph(names, N_TOKENS)
    made.build()
    yield made
    made.free()


@pytest.fixture(params=[False, True], ids=["host", "staged"])
def hook(request: pytest.FixtureRequest) -> Iterator[Hook]:
    made = Hook(native_library(), n_threads=1, force_staged=request.param)
    yield made
    made.free()


@pytest.fixture
def recorder(hook: Hook) -> Iterator[Recorder]:
    made = Recorder(native_library())
    for name in (QUERY, KEY, OTHER):
        made.add(name, N_COLS)
    hook.set_recorder(made)
    yield made
    hook.set_recorder(None)
    made.free()


def decode(hook: Hook, *graphs: Graph) -> list[int]:
    """Show nodes to the hook as the engine does; returns those that it asks for."""
    evaluate, asked = native_library().functions.zo_hook_eval, []
    for node in (node for graph in graphs for node in graph.nodes.values()):
        if evaluate(node, True, hook.handle):
            asked.append(node)
            evaluate(node, False, hook.handle)
    return asked


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_chosen_tokens_are_kept_and_inputs_shared(
    hook: Hook, recorder: Recorder, attention: Graph, ffn: Graph
) -> None:
    rng = np.random.default_rng(0)
    for kept in (tokens(0, 1, 4), tokens(3), np.arange(N_TOKENS, dtype=np.int32)):
        x, h = (rng.standard_normal((N_TOKENS, N_COLS)).astype(np.float32) for _ in range(2))
        attention.set_input(x)
        ffn.set_input(h)
        recorder.begin(N_TOKENS, kept, tokens(4))
        assert len(decode(hook, attention, ffn)) == 3
        assert recorder.input_of(0) == recorder.input_of(1) != recorder.input_of(2)
        for number, expected in ((0, x), (1, x), (2, h)):
            found, values = recorder.read(number)
            assert found.tolist() == kept.tolist()
            assert np.array_equal(values, expected[kept])
        assert decode(hook, attention, ffn) == []  # a second use changes nothing
    hook.check()


def test_only_outputs_are_left_in_the_last_layer(
    hook: Hook, recorder: Recorder, ffn: Graph
) -> None:
    x = np.arange(N_TOKENS * N_COLS, dtype=np.float32).reshape(N_TOKENS, N_COLS)
    ffn.set_input(x)
    recorder.begin(9, tokens(1, 2, 5, 8), tokens(0, 2, 3, 7, 8))
    decode(hook, ffn)
    found, values = recorder.read(2)
    assert found.tolist() == [2, 8]
    assert np.array_equal(values, x[[1, 4]])
    recorder.begin(9, tokens(1), tokens(0, 2, 3, 7, 8))
    decode(hook, ffn)
    found, values = recorder.read(2)
    assert found.size == values.size == 0


def test_what_was_not_recorded_is_said(hook: Hook, recorder: Recorder, ffn: Graph) -> None:
    assert decode(hook, ffn) == []  # nothing was announced
    recorder.add("blk.1.ffn_up.weight", N_COLS + 1)
    ffn.rename(OTHER, "blk.1.ffn_up.weight")
    recorder.begin(N_TOKENS, tokens(0), tokens(0))
    assert decode(hook, ffn) == []
    assert recorder.input_of(2) == recorder.input_of(3) == -1
    with pytest.raises(ZoError, match=r"ffn_up.weight was never multiplied by"):
        recorder.read(2)
    with pytest.raises(ZoError, match=r"something of an unexpected shape or type"):
        recorder.read(3)


def test_a_decode_in_parts_is_refused(hook: Hook, recorder: Recorder, ffn: Graph) -> None:
    hook.begin_any()
    recorder.begin(N_TOKENS + 1, tokens(0), tokens(0))
    decode(hook, ffn)
    with pytest.raises(ZoError, match=r"split the batch: blk.0.ffn_up.weight got 5 columns"):
        hook.check()
    hook.check()  # said once


@pytest.mark.parametrize(
    ("n", "kept", "outputs"),
    [
        (5, [], [0]),
        (5, [0], []),
        (5, [1, 0], [0]),
        (5, [0, 0], [0]),
        (5, [5], [0]),
        (5, [-1], [0]),
        (5, [0], [2, 1]),
        (5, [0], [7]),
        (0, [0], [0]),
    ],
)
def test_tokens_must_be_ascending_ones_of_the_decode(
    n: int, kept: list[int], outputs: list[int], recorder: Recorder
) -> None:
    with pytest.raises(ZoError, match="must be ascending tokens of a decode"):
        recorder.begin(n, tokens(*kept), tokens(*outputs))


def test_sizes_and_numbers_are_checked(hook: Hook, recorder: Recorder, ffn: Graph) -> None:
    recorder.begin(N_TOKENS, tokens(0, 1), tokens(0))
    decode(hook, ffn)
    which, x = np.empty(9, np.int32), np.empty(99, np.float32)
    arrays = pointer(which, c_int32), pointer(x, c_float)
    for number, n_rows, n_cols in ((2, 1, N_COLS), (2, 2, N_COLS + 1), (2, -1, N_COLS)):
        with pytest.raises(ZoError, match="has another size"):
            native_library().call(
                "zo_recorder_read", recorder.handle, number, n_rows, n_cols, *arrays
            )
    for number in (3, -1):
        with pytest.raises(ZoError, match="a number it does not know"):
            recorder.input_of(number)
    with pytest.raises(ZoError, match="null pointer"):
        native_library().call("zo_recorder_read", recorder.handle, 2, 2, N_COLS, None, None)
    for name in (QUERY, "new"):
        with pytest.raises(ZoError, match=r"added before|needs a name"):
            recorder.add(name, N_COLS if name == QUERY else 0)
