"""Copying and writing GGUFs: every key and byte kept, odd alignments, a full disk."""

import importlib
import struct
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.helpers.tiny_gguf import TEMPLATE, key_bytes
from zo_gguf.errors import DoesNotFitError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.write import NewTensor, check_disk, copy_gguf, key_record, write_gguf
from zo_gguf.merging import stock_eval

merge_module = importlib.import_module("zo_gguf.verbs.merge")
STOCK_SCRIPT = Path(stock_eval.__file__)


def test_full_disk(tmp_path: Path) -> None:
    check_disk(tmp_path / "x", 1000)
    with pytest.raises(DoesNotFitError, match="GB are free"):
        check_disk(tmp_path / "not" / "there" / "x", 1 << 60)


# ---- copies --------------------------------------------------------------------------------------


def odd_gguf(path: Path, alignment: int) -> Path:
    """Every value type, an empty string and array, and tokens that are not UTF-8."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    kinds = gguf.GGUFValueType
    for kind, value in ((kinds.UINT8, 3), (kinds.INT8, -3), (kinds.UINT16, 9), (kinds.INT16, -9),
                        (kinds.INT32, -7), (kinds.UINT64, 1 << 60), (kinds.INT64, -(1 << 60)),
                        (kinds.FLOAT64, 0.1), (kinds.BOOL, True)):  # fmt: skip
        writer.add_key_value(f"x.{kind.name}", value, kind)
    writer.add_key_value("x.empty", "", kinds.STRING)
    writer.add_array("tokenizer.ggml.tokens", [b"\xff\xfe", b"ok", b""])
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    writer.add_tensor("w", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("v", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # gguf cannot write an empty array, but files have them.
    file = GgufFile(path)
    empty = struct.pack("<Q6sIIQ", 6, b"x.none", kinds.ARRAY, kinds.STRING, 0)
    tensors = [
        NewTensor(name, info.shape, info.type, partial(file.raw, name))
        for name, info in file.tensors.items()
    ]
    records = [key_bytes(file, key) for key in file.header.keys]
    write_gguf(path, [*records[:3], empty, *records[3:]], tensors, alignment=alignment)
    return path


@pytest.mark.parametrize("alignment", [32, 128])
def test_a_copy_keeps_everything(tmp_path: Path, alignment: int) -> None:
    base = GgufFile(odd_gguf(tmp_path / "a.gguf", alignment))
    copy_gguf(base, tmp_path / "b.gguf", replace={}, keys={})
    copy = GgufFile(tmp_path / "b.gguf")
    assert copy.metadata("x.none") == []
    assert copy.metadata("x.empty") == ""
    assert list(copy.header.keys) == list(base.header.keys)
    for key in base.header.keys:
        assert key_bytes(copy, key) == key_bytes(base, key)
    assert copy.sha256() == base.sha256()
    assert copy.header.alignment == alignment
    assert all(info.offset % alignment == 0 for info in copy.tensors.values())


def test_keys_are_replaced_added_and_left_out(tmp_path: Path) -> None:
    base = GgufFile(odd_gguf(tmp_path / "a.gguf", 32))
    keys = {
        "x.empty": "now",
        "x.UINT8": None,
        "new.i": -5,
        "new.f": 0.5,
        "new.b": False,
        "no": None,
    }
    copy_gguf(base, tmp_path / "b.gguf", replace={}, keys=keys)
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert "x.UINT8" not in reader.fields
    assert "no" not in reader.fields
    for key in ("x.empty", "new.i", "new.f", "new.b"):
        assert reader.fields[key].contents() == keys[key]
    assert reader.fields["x.UINT64"].contents() == 1 << 60
    assert key_record("k", 7)[-4:] == (7).to_bytes(4, "little")


# ---- stock_eval ----------------------------------------------------------------------------------
