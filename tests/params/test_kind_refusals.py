"""Delta files with edits: anything damaged is refused with a sentence, never another error."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.params.test_kinds import (
    EDITS,
    HEADER,
    N_COLS,
    N_ROWS,
    PRODUCTS,
    SPARSE,
    lora,
    make_delta,
)
from zo_gguf.errors import ZoError
from zo_gguf.params import sparse_file
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import Live

Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def rewrite(path: Path, change: Change) -> None:
    """Save a delta with its arrays and JSON document changed, and a checksum that fits again."""
    make_delta().save(path)
    arrays = load_file(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    document = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["zo_gguf"])
    change(arrays, document)
    order = [f"{name}.{part}" for name in SPARSE for part in ("indices", "theta")]
    rows = document["edits"] if isinstance(document.get("edits"), list) else []
    for row in rows:
        if isinstance(row, list) and row:
            order += [f"{row[0]}.{part}" for part in ("masters", "product", "left", "right")]
    document["sha256"] = sparse_file._digest({n: arrays[n] for n in order if n in arrays})
    save_file(arrays, path, metadata={"zo_gguf": json.dumps(document)})


def array(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda arrays, _: arrays.update({name: function(arrays[name])})


def edit_rows(value: Any) -> Change:
    return lambda _, document: document.update(edits=value)


def cell(edit: str, column: int, value: Any) -> Change:
    row = [*EDITS, *PRODUCTS].index(edit)
    return lambda _, document: document["edits"][row].__setitem__(column, value)


def cut(edit: str, n: int) -> Change:
    row = [*EDITS, *PRODUCTS].index(edit)
    return lambda _, document: document["edits"].__setitem__(row, document["edits"][row][:n])


def test_rewriting_without_a_change_is_accepted(tmp_path: Path) -> None:
    rewrite(tmp_path / "d", lambda arrays, document: None)
    assert Delta.load(tmp_path / "d").theta.tobytes() == make_delta().theta.tobytes()


ARRAYS = [
    "scales.masters",
    "norm.masters",
    "sub.masters",
    "lora.masters",
    "scales.product",
    "sub.left",
    "sub.right",
]
BREAKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shape": lambda a: a.reshape(-1, 1),
    "length": lambda a: a.reshape(-1)[:-1].copy(),
    "empty": lambda a: a.reshape(-1)[:0],
    "NaN": lambda a: np.full_like(a, np.nan),
    "infinite": lambda a: np.full_like(a, -np.inf),
    "float64": lambda a: a.astype(np.float64),
    "int32": lambda a: a.astype(np.int32),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("how", [*BREAKS, "missing"])
def test_damaged_arrays_are_refused(tmp_path: Path, name: str, how: str) -> None:
    change = array(name, BREAKS[how]) if how in BREAKS else lambda arrays, _: arrays.pop(name)
    rewrite(tmp_path / "d", change)
    with pytest.raises(ZoError, match="make it again"):
        Delta.load(tmp_path / "d")


BAD_COUNTS = [-1, 0, 1.5, True, None, "3", [], 1 << 41, 10**400, math.nan, math.inf]
DAMAGE: dict[str, Change] = {
    **{f"{n} values": cell("scales", 3, n) for n in (*BAD_COUNTS, 5)},
    **{f"{n} gains": cell("norm", 3, n) for n in (*BAD_COUNTS, 5)},
    **{f"{n} rows": cell("lora", 3, n) for n in (*BAD_COUNTS, 3)},
    **{f"{n} columns": cell("sub", 4, n) for n in (*BAD_COUNTS, 3)},
    **{f"rank {n}": cell("sub", 5, n) for n in (*BAD_COUNTS, 3)},
    **{f"{n} windows": cell("sub", 6, n) for n in (*BAD_COUNTS, 2)},
    **{f"name {n}": cell("sub", 0, n) for n in (None, 3, [], {}, "other", "lora", "")},
    **{f"form {n}": cell("lora", 1, n) for n in ("live", "other", None, [], {})},
    **{f"kind {n}": cell("lora", 2, n) for n in ("subspace", "other", None, [], {})},
    **{f"live kind {n}": cell("float", 2, n) for n in ("lora", "other", None)},
    **{f"gain kind {n}": cell("norm", 2, n) for n in ("lora", "scale", None, [])},
    **{f"edits {n}": edit_rows(n) for n in (None, 3, "abc", {}, {"a": 1}, [None], [1], ["abc"])},
    **{f"live row of {n}": cut("float", n) for n in range(1, 6)},
    **{f"gain row of {n}": cut("norm", n) for n in range(1, 4)},
    **{f"low-rank row of {n}": cut("sub", n) for n in range(1, 7)},
    **{f"a size of {n!r}": cell("norm", 3, n) for n in ("4", 4.0, 4.5)},
    "scale text": cell("lora", 7, "much"),
    "refresh text": cell("sub", 8, "often"),
    "a longer live row": lambda _, d: d["edits"][0].append(1),
    "a longer gain row": lambda _, d: d["edits"][[*EDITS].index("norm")].append(1),
    "no edits": lambda _, d: d.pop("edits"),
    "an edit less": lambda _, d: d["edits"].pop(1),
    "an edit twice": lambda _, d: d["edits"].append(d["edits"][1]),
    "an array more": lambda a, _: a.update({"x.masters": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_rows_are_refused(tmp_path: Path, case: str) -> None:
    rewrite(tmp_path / "d", DAMAGE[case])
    with pytest.raises(ZoError) as error:
        Delta.load(tmp_path / "d")
    assert "checksum" not in str(error.value)  # which `rewrite` has made fit


def test_every_flipped_data_bit_is_noticed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    make_delta().save(good)
    data = good.read_bytes()
    for position in range(8 + int.from_bytes(data[:8], "little"), len(data), 3):
        bad.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ZoError, match="checksum"):
            Delta.load(bad)


# ---- rows that could be taken for good ones ------------------------------------------------------

LIKE_GOOD: dict[str, Change] = {
    "an empty row": edit_rows([[]]),
    "low-rank row of 7": cut("sub", 7),
    "low-rank row of 8": cut("sub", 8),
    "refresh infinite": cell("sub", 8, math.inf),
    "scale 10**400": cell("lora", 7, 10**400),
    "scale NaN": cell("lora", 7, math.nan),
    "scale infinite": cell("lora", 7, math.inf),
    "refresh -1": cell("sub", 8, -1),
    "refresh 1.5": cell("sub", 8, 1.5),
    "a longer low-rank row": lambda _, d: d["edits"][[*EDITS, *PRODUCTS].index("sub")].append(1),
    "relative text": cell("scales", 4, "false"),
    **{f"limit {n}": cell("float", 5, n) for n in ("much", [], math.nan, -1, True)},
}


@pytest.mark.parametrize("case", LIKE_GOOD)
def test_more_damaged_rows_are_refused(tmp_path: Path, case: str) -> None:
    rewrite(tmp_path / "d", LIKE_GOOD[case])
    with pytest.raises(ZoError):
        Delta.load(tmp_path / "d")


def test_theta_must_be_float32_without_sparse_entries() -> None:
    with pytest.raises(ZoError, match="float64"):
        Delta({}, {}, np.zeros(6), HEADER, {"scales": Live("scale", 6)})  # type: ignore[arg-type]


def test_two_shapes_for_one_tensor_are_refused() -> None:
    theta = np.zeros(2 + lora().size, np.float32)
    shape = (N_ROWS, N_COLS + 1)
    tensors = {"lora": np.array([0, N_ROWS * N_COLS + 1])}
    with pytest.raises(ZoError, match="lora"):
        Delta(tensors, {"lora": shape}, theta, HEADER, low_rank={"lora": lora()})
