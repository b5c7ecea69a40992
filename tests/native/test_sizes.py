"""Every call of libzo that fills or reads an array is told its length, and refuses a wrong one."""

import re
from ctypes import c_double, c_float, c_int32
from typing import Any

import numpy as np
import pytest

from tests.native.test_native import HEADER
from zo_gguf.engine.model import native_library
from zo_gguf.errors import ZoError
from zo_gguf.libzo import NORMAL, ON_CPU, Branch, Field, Gain, Hook, InPlace, LowRank, Part, Store
from zo_gguf.libzo.library import pointer
from zo_gguf.libzo.signatures import MAX_BRANCHES

ROOM = np.zeros(64, np.float32)
FLOATS = pointer(ROOM, c_float)


def store() -> Store:
    made = Store(native_library(), 1)
    made.add("w", (3, 4), np.array([1, 5, 7]), np.ones(3, np.float32))
    return made


def in_place() -> InPlace:
    made = InPlace(native_library(), 1)
    made.add("w", Field(3, 4, 1, limit=np.inf), 12, np.ones(3, np.float32))
    return made


def low_rank() -> LowRank:
    made = LowRank(native_library())
    made.add("w", (3, 4))
    return made


def gain() -> Gain:
    made = Gain(native_library())
    made.add("w", 3)
    return made


@pytest.mark.parametrize(
    ("make", "function", "before", "n", "after"),
    [
        (store, "zo_store_read", (), 3, ()),
        (store, "zo_store_write", (), 3, ()),
        (store, "zo_store_noise", (7,), 3, ()),
        (in_place, "zo_inplace_read", (), 3, ()),
        (in_place, "zo_inplace_write", (), 3, ()),
        (in_place, "zo_inplace_noise", (7,), 3, ()),
        (in_place, "zo_inplace_values", (Branch(7, 0.5),), 3, ()),
        (low_rank, "zo_lowrank_set", (0, 0, 2), 6, (8, FLOATS)),
        (low_rank, "zo_lowrank_set", (0, 0, 2, 6, FLOATS), 8, ()),
        (low_rank, "zo_lowrank_train", (0, 2, 1.0, Part.LOWRANK.tensor(0)), 14, ()),
        (gain, "zo_gain_set", (0, 0), 3, ()),
    ],
)
def test_lengths_are_checked(
    make: Any, function: str, before: tuple[Any, ...], n: int, after: tuple[Any, ...]
) -> None:
    part, call = make(), native_library().call
    for wrong in (n - 1, n + 1, 0, -1):
        with pytest.raises(ZoError, match=rf"{function} got an array of {wrong} values instead"):
            call(function, part.handle, *before, wrong, FLOATS, *after)
    with pytest.raises(ZoError, match=f"{function} got a null pointer"):
        call(function, part.handle, *before, n, None, *after)
    with pytest.raises(ZoError, match=r"null pointer|out of range"):
        call(function, None, *before, n, FLOATS, *after)
    call(function, part.handle, *before, n, FLOATS, *after)
    part.free()


LOSSES: dict[str, Any] = {
    "logits": FLOATS,
    "n_vocab": 4,
    "stride": 5,
    "n_outputs": 2,
    "n_targets": 3,
    "target_output": [0, 1, 1],
    "target_token": [3, 0, 2],
    "n_threads": 1,
    "device": ON_CPU,
    "nll": pointer(np.zeros(3), c_double),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"logits": None}, "null pointer"),
        ({"target_output": None}, "null pointer"),
        ({"target_token": None}, "null pointer"),
        ({"nll": None}, "null pointer"),
        ({"n_vocab": 0}, "a size or a number of threads"),
        ({"stride": 3}, "a size or a number of threads"),
        ({"n_outputs": 0}, "a size or a number of threads"),
        ({"n_targets": -1}, "a size or a number of threads"),
        ({"n_threads": 0}, "a size or a number of threads"),
        ({"n_outputs": 1}, "at ascending outputs"),
        ({"target_output": [0, 1, 2]}, "at ascending outputs"),
        ({"target_output": [-1, 1, 1]}, "at ascending outputs"),
        ({"target_output": [1, 0, 1]}, "at ascending outputs"),
        ({"target_token": [3, 0, 4]}, "tokens of the vocabulary"),
        ({"target_token": [3, -1, 0]}, "tokens of the vocabulary"),
    ],
)
def test_losses_check_their_targets(changed: dict[str, Any], message: str) -> None:
    given = LOSSES | changed
    arrays = {name: np.array(v, np.int32) for name, v in given.items() if isinstance(v, list)}
    given |= {name: pointer(array, c_int32) for name, array in arrays.items()}
    if not message:
        native_library().call("zo_losses", *given.values())
        return
    with pytest.raises(ZoError, match=message):
        native_library().call("zo_losses", *given.values())


def test_a_hook_ends_with_as_many_losses_as_it_was_asked_for() -> None:
    hook = Hook(native_library(), n_threads=1)
    hook.begin_any()
    with pytest.raises(ZoError, match="array of 1 values instead of 0"):
        hook.end(1)
    with pytest.raises(ZoError, match="null pointer"):
        native_library().call("zo_hook_end", hook.handle, 0, None)
    assert hook.end(0).size == 0
    hook.free()


def test_batches_are_checked() -> None:
    hook, zero = Hook(native_library(), n_threads=1), np.zeros(1, np.int32)
    none = np.zeros(0, np.int32)
    with pytest.raises(ZoError, match="needs tokens, outputs, branches and targets"):
        hook.begin([], zero, zero, zero, zero)
    with pytest.raises(ZoError, match="needs tokens, outputs, branches and targets"):
        hook.begin([(0, 0.0)] * (MAX_BRANCHES + 1), zero, zero, zero, zero)
    with pytest.raises(ZoError, match="needs tokens, outputs, branches and targets"):
        hook.begin([(0, 0.0)], zero, zero, none, none)
    for wrong in (np.ones(1, np.int32), np.full(1, -1, np.int32)):
        for place in range(3):
            arrays = [wrong if k == place else zero for k in range(4)]
            with pytest.raises(ZoError, match="a branch, output or token that does not exist"):
                hook.begin([(0, 0.0)], *arrays)
    with pytest.raises(ZoError, match="a branch, output or token that does not exist"):
        hook.begin([(0, 0.0)], zero, zero, zero, -np.ones(1, np.int32))
    hook.free()


def test_null_and_doubled_names() -> None:
    assert native_library().functions.zo_tensors_missing(None) == -1
    part = in_place()
    with pytest.raises(ZoError, match="w was added before"):
        part.add("w", Field(3, 4, 1, limit=np.inf), 12, np.ones(3, np.float32))
    assert part.size == 3
    part.free()
    trained = low_rank()
    trained.train(0, 2, 1.0, Part.LOWRANK.tensor(0), ROOM[:14])
    with pytest.raises(ZoError, match="factors of w are trained, and cannot be set"):
        trained.set(0, 0, ROOM[:3].reshape(1, 3), ROOM[:4].reshape(1, 4))
    trained.free()


def test_a_distribution_must_be_known() -> None:
    for make in (Store, InPlace, LowRank):
        with pytest.raises(ZoError, match="a distribution"):
            make(native_library(), 1, 2)
    with pytest.raises(ZoError, match="a distribution"):
        native_library().call("zo_noise", 2, 0, 0, 0, 1, FLOATS)
    native_library().call("zo_noise", NORMAL, 0, 0, 0, 1, FLOATS)


def test_numbers_match_the_header() -> None:
    text = HEADER.read_text()
    enum = re.search(r"typedef enum zo_part \{(.*?)\}", text, re.DOTALL)
    assert enum is not None
    found = {name: int(value) for name, value in re.findall(r"ZO_(\w+)\s*=\s*(\d+)", enum[1])}
    assert found == {part.name: part.value for part in Part}
    limit = re.search(r"#define ZO_MAX_BRANCHES (\d+)", text)
    assert limit is not None
    assert int(limit[1]) == MAX_BRANCHES
    # Runs of earlier versions are replayed with these numbers.
    assert [part.tensor(5) for part in Part] == [5, 2**30 + 5, 2**31 + 5, 3 * 2**30 + 5]
