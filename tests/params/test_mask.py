"""Masks: what goes into a file comes out, the same bytes each time, and nothing bad is accepted."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zo_gguf.errors import ZoError
from zo_gguf.params import sparse_file
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask, MaskHeader

HASH = "0123456789abcdef" * 4
HEADER = MaskHeader(
    base_name="model-Q4_0.gguf",
    base_sha256=HASH,
    score="sensitive",
    density=0.25,
    max_rank=3,
    calibration={"source": "text.jsonl", "documents": 7},
)


def make_mask() -> Mask:
    tensors = {  # not in alphabetical order: the base file's order must survive
        "blk.1.ffn_up.weight": np.array([0, 5, 11]),
        "blk.0.attn_q.weight": np.array([2, 3]),
    }
    residuals = {
        "blk.1.ffn_up.weight": np.array([0.5, -0.25, 3.0], dtype=np.float32),
        "blk.0.attn_q.weight": np.array([1e-8, -7.0], dtype=np.float32),
    }
    shapes = {"blk.1.ffn_up.weight": (3, 4), "blk.0.attn_q.weight": (2, 2)}
    return Mask(tensors, residuals, shapes, HEADER)


def gguf_like(sha256: str = HASH, **tensors: tuple[int, int]) -> Any:
    shapes = {"blk.1.ffn_up.weight": (3, 4), "blk.0.attn_q.weight": (2, 2)} | tensors
    return SimpleNamespace(
        path=Path("other.gguf"),
        sha256=lambda: sha256,
        tensors={name: SimpleNamespace(shape=shape) for name, shape in shapes.items()},
    )


def test_round_trip_keeps_everything_and_the_order(tmp_path: Path) -> None:
    mask = make_mask()
    mask.save(tmp_path / "m.safetensors")
    again = Mask.load(tmp_path / "m.safetensors")
    assert list(again.tensors) == list(mask.tensors)
    for name in mask.tensors:
        assert again.tensors[name].dtype == np.int64
        np.testing.assert_array_equal(again.tensors[name], mask.tensors[name])
        np.testing.assert_array_equal(again.residuals[name], mask.residuals[name])
    assert again.shapes == mask.shapes
    assert again.header == mask.header
    assert again.nnz == 5
    np.testing.assert_array_equal(again.theta0(), np.float32([0.5, -0.25, 3.0, 1e-8, -7.0]))
    assert again.slices() == {
        "blk.1.ffn_up.weight": slice(0, 3),
        "blk.0.attn_q.weight": slice(3, 5),
    }


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    for i in range(5):
        make_mask().save(tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(5)}) == 1


def test_indices_are_int32_on_disk_unless_the_matrix_is_too_large(tmp_path: Path) -> None:
    large = {"w": np.array([7, 2**31 + 5])}
    values = {"w": np.zeros(2, dtype=np.float32)}
    Mask(large, values, {"w": (1 << 16, 1 << 16)}, HEADER).save(tmp_path / "large")
    make_mask().save(tmp_path / "small")
    assert load_file(tmp_path / "large")["w.indices"].dtype == np.int64
    assert load_file(tmp_path / "small")["blk.0.attn_q.weight.indices"].dtype == np.int32
    np.testing.assert_array_equal(Mask.load(tmp_path / "large").tensors["w"], large["w"])


def test_rank_is_the_fewest_rows_and_columns() -> None:
    mask = make_mask()
    assert mask.rank("blk.0.attn_q.weight") == 1  # both entries in row 1
    assert mask.rank("blk.1.ffn_up.weight") == 3  # a diagonal


def test_check_base_accepts_its_own_base_only() -> None:
    mask = make_mask()
    mask.check_base(gguf_like())
    with pytest.raises(ZoError) as wrong:
        mask.check_base(gguf_like("f" * 64))
    assert "f" * 64 in str(wrong.value)
    assert HASH in str(wrong.value)
    assert "model-Q4_0.gguf" in str(wrong.value)
    with pytest.raises(ZoError, match=r"blk\.0\.attn_q\.weight"):
        mask.check_base(gguf_like(**{"blk.0.attn_q.weight": (2, 3)}))


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        ([3, 2], [0, 0], "sorted"),
        ([2, 2], [0, 0], "unique"),
        ([2, 4], [0, 0], "outside"),
        ([-1, 2], [0, 0], "outside"),
        ([2, 3], [0, np.nan], "NaN"),
        ([2, 3], [np.inf, 0], "infinite"),
        ([2, 3], [0], "2 indices but 1 values"),
        ([], [], "no entries"),
    ],
)
def test_bad_entries_are_refused(indices: list[int], values: list[float], message: str) -> None:
    with pytest.raises(ZoError, match=message):
        Mask(
            {"w": np.array(indices, dtype=np.int64)},
            {"w": np.array(values, dtype=np.float32)},
            {"w": (2, 2)},
            HEADER,
        )


def test_a_mask_without_tensors_is_refused() -> None:
    with pytest.raises(ZoError, match="selects no weights"):
        Mask({}, {}, {}, HEADER)


def rewrite(path: Path, change: Any) -> None:
    """Change a saved mask's arrays and JSON document, and make its checksum fit again."""
    make_mask().save(path)
    arrays = load_file(path)
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + header_size])["__metadata__"]
    document = json.loads(metadata["zo_gguf"])
    change(arrays, document)
    names = [
        f"{row[0]}.{part}"
        for row in document.get("tensors", [])
        for part in ("indices", "residual")
        if f"{row[0]}.{part}" in arrays
    ]
    document["sha256"] = sparse_file._digest({name: arrays[name] for name in names})
    save_file(arrays, path, metadata={"zo_gguf": json.dumps(document)})


def set_index(position: int, value: int) -> Any:
    def change(arrays: dict[str, Any], _: Any) -> None:
        arrays["blk.1.ffn_up.weight.indices"][position] = value

    return change


def set_array(part: str, value: Any) -> Any:
    return lambda arrays, _: arrays.update({f"blk.1.ffn_up.weight.{part}": value})


def set_header(**items: Any) -> Any:
    return lambda _, document: document["header"].update(items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_index(1, 0), "sorted or not unique"),
        (set_index(2, 12), "outside"),
        (set_index(0, -1), "outside"),
        (
            lambda a, _: a.update({"blk.1.ffn_up.weight.residual": np.zeros(2, np.float32)}),
            "values",
        ),
        (lambda a, _: a.update({"blk.1.ffn_up.weight.indices": np.zeros(3)}), "float64 indices"),
        (lambda a, _: a.pop("blk.1.ffn_up.weight.residual"), "lists other tensors"),
        (lambda a, _: a.update(extra=np.zeros(1)), "lists other tensors"),
        (lambda _, d: d["tensors"][0].__setitem__(1, 1 << 40), "lists other tensors"),
        (lambda _, d: d["tensors"][0].__setitem__(1, "3"), "lists other tensors"),
        (lambda _, d: d["tensors"].append(d["tensors"][0]), "lists other tensors"),
        (lambda _, d: d.pop("tensors"), "incomplete"),
        (lambda _, d: d.update(header=[]), "malformed"),
        (set_header(format_version=99), "format version 99"),
        (set_header(density="much"), "bad density"),
        (set_header(max_rank=1.5), "bad max_rank"),
        (set_header(base_sha256="short"), "bad base_sha256"),
        (set_header(color="red"), "unknown fields: color"),
        (lambda _, d: d["header"].pop("score"), "missing or unknown fields: score"),
        (lambda _, d: d.update(kind="delta"), "is a delta, but a mask is needed"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    rewrite(path, change)
    with pytest.raises(ZoError, match=message):
        Mask.load(path)


def test_rewriting_without_a_change_is_accepted(tmp_path: Path) -> None:
    rewrite(tmp_path / "same", lambda arrays, document: None)
    assert Mask.load(tmp_path / "same").nnz == 5


def test_every_truncation_and_every_flipped_data_bit_is_noticed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    make_mask().save(good)
    data = good.read_bytes()
    for size in [*range(0, len(data), 13), len(data) - 1]:
        bad.write_bytes(data[:size])
        with pytest.raises(ZoError):
            Mask.load(bad)
    body = 8 + int.from_bytes(data[:8], "little")
    for position in range(body, len(data)):
        bad.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ZoError):
            Mask.load(bad)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZoError, match="is not a file"):
        Mask.load(tmp_path / "none")
    save_file({"a": np.zeros(3)}, tmp_path / "plain")
    with pytest.raises(ZoError, match="not a zo-gguf mask"):
        Mask.load(tmp_path / "plain")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ZoError, match="damaged or not a zo-gguf mask"):
        Mask.load(tmp_path / "text")
    mask = make_mask()
    Delta.from_mask(mask, mask.theta0(), {}).save(tmp_path / "delta")
    with pytest.raises(ZoError, match="is a delta, but a mask is needed"):
        Mask.load(tmp_path / "delta")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    mask = make_mask()
    mask.save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    broken = replace(mask, header=replace(HEADER, calibration={"loss": float("nan")}))
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
