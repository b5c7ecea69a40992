"""GgufFile against gguf's own reader and quantizers, and every kind of bad file."""

import hashlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile

RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((6, 256)).astype(np.float32)
NUMPY_TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
# gguf cannot quantize to these in numpy; any bytes with small scales are a valid tensor of them.
OTHER_TYPES = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS]


def tensor_bytes(kind: Type) -> np.ndarray:
    if kind in OTHER_TYPES:
        n_bytes = gguf.GGML_QUANT_SIZES[kind][1] * 256 // gguf.GGML_QUANT_SIZES[kind][0]
        return RNG.integers(0, 60, (6, n_bytes), dtype=np.uint8)
    return gguf.quants.quantize(WEIGHT, kind)


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, Type]], **extra: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.5])
    for key, value in extra.items():
        writer.add_string(f"general.{key}", value)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tensors = {"b.weight": (tensor_bytes(Type.Q4_0), Type.Q4_0), "a.bias": (WEIGHT[0], Type.F32)}
    return write_gguf(tmp_path / "small.gguf", tensors)


def test_metadata_and_tensors(small: Path) -> None:
    file = GgufFile(small)
    assert file.architecture == "llama"
    assert file.name == "tiny"
    assert file.metadata("llama.block_count") == 3
    assert file.metadata("tokenizer.ggml.tokens") == ["a", "bé", ""]
    assert file.metadata("tokenizer.ggml.scores") == [0.5, -1.5]
    assert file.metadata("absent", "x") == "x"
    assert list(file.tensors) == ["b.weight", "a.bias"]
    assert file.tensors["b.weight"].shape == (6, 256)
    assert file.raw("b.weight").shape == (6, 144)
    for theirs in gguf.GGUFReader(small).tensors:
        ours = file.tensors[theirs.name]
        assert (ours.offset, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
    assert file.reader.tensors[0].name == "b.weight"
    with pytest.raises(ZoError, match="no tensor 'c'"):
        file.raw("c")


@pytest.mark.parametrize("kind", NUMPY_TYPES + OTHER_TYPES, ids=lambda kind: kind.name)
def test_dequantize(tmp_path: Path, kind: Type) -> None:
    raw = tensor_bytes(kind)
    file = GgufFile(write_gguf(tmp_path / "x.gguf", {"w": (raw, kind)}))
    assert file.tensors["w"].type == kind
    np.testing.assert_array_equal(file.raw("w"), raw.view(np.uint8))
    values = file.dequantize("w")
    assert values.dtype == np.float32
    assert values.shape == (6, 256)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, kind))
    rows = np.array([4, 1])
    np.testing.assert_array_equal(file.dequantize("w", rows), values[rows])
    if kind in NUMPY_TYPES:
        assert np.abs(values - WEIGHT).max() < 0.5


def test_dequantize_unknown_type(tmp_path: Path) -> None:
    file = GgufFile(
        write_gguf(tmp_path / "x.gguf", {"w": (np.zeros((2, 40), np.uint8), Type.Q8_1)})
    )
    with pytest.raises(ZoError, match="Q8_1"):
        file.dequantize("w")


def test_sha256_sees_tensors_only(tmp_path: Path, small: Path) -> None:
    raw = GgufFile(small).raw("b.weight").copy()
    bias = (WEIGHT[0], Type.F32)
    same = {"b.weight": (raw, Type.Q4_0), "a.bias": bias}
    other = write_gguf(tmp_path / "renamed.gguf", same, author="somebody")
    assert GgufFile(other).sha256() == GgufFile(small).sha256()
    digest = hashlib.sha256()
    for name, shape, kind, data in (
        ("b.weight", "6x256", "Q4_0", raw),
        ("a.bias", "256", "F32", WEIGHT[0]),
    ):
        digest.update(f"{name}\n{shape}\n{kind}\n{data.nbytes}\n".encode() + data.tobytes())
    assert GgufFile(small).sha256() == digest.hexdigest()
    flipped = raw.copy()
    flipped[3, 77] ^= 1
    for tensors in (
        {"b.weight": (flipped, Type.Q4_0), "a.bias": bias},
        {"c.weight": (raw, Type.Q4_0), "a.bias": bias},
        {"a.bias": bias, "b.weight": (raw, Type.Q4_0)},
    ):
        changed = GgufFile(write_gguf(tmp_path / "changed.gguf", tensors))
        assert changed.sha256() != GgufFile(small).sha256()


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    broken = tmp_path / "broken.gguf"
    end = max(info.offset + info.n_bytes for info in GgufFile(small).tensors.values())
    for size in [*range(1, 420, 3), end - 1]:
        broken.write_bytes(whole[:size])
        with pytest.raises(ZoError, match=r"broken\.gguf"):
            GgufFile(broken)


def test_random_damage_never_escapes_as_another_error(small: Path, tmp_path: Path) -> None:
    whole = bytearray(small.read_bytes())
    rng = np.random.default_rng(3)
    broken = tmp_path / "broken.gguf"
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        at = int(rng.integers(0, 400))
        data[at : at + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
        broken.write_bytes(data)
        try:
            file = GgufFile(broken)
            _ = [file.metadata(key) for key in file.header.keys], file.name
        except ZoError:
            refused += 1
    assert refused > 200


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def test_bad_files(small: Path, tmp_path: Path) -> None:
    def refuse(path: Path, words: str) -> None:
        with pytest.raises(ZoError, match=words) as caught:
            GgufFile(path)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "none.gguf", "is not a file")
    refuse(tmp_path, "is not a file")
    (tmp_path / "empty.gguf").touch()
    refuse(tmp_path / "empty.gguf", "is empty")
    (tmp_path / "text.gguf").write_text("hello there, no model here")
    refuse(tmp_path / "text.gguf", "is not a GGUF file")
    start = struct.pack("<4sI", b"GGUF", 3)
    for new, words in (
        (struct.pack("<4sI", b"GGUF", 1), "version 1"),
        (struct.pack(">4sI", b"GGUF", 3), "big-endian"),
    ):
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(small.read_bytes())
        refuse(patched(copy, start, new), words)
    copy.write_bytes(start + struct.pack("<QQ", 1 << 60, 1 << 60))
    refuse(copy, "promises")
    # An array of 2**60 bytes would keep gguf's own reader busy for ever.
    key = struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 1 << 60)
    copy.write_bytes(start + struct.pack("<QQ", 0, 1) + key)
    refuse(copy, "truncated")
    copy.write_bytes(small.read_bytes())
    refuse(patched(copy, struct.pack("<QI", 256, 0), struct.pack("<QI", 256, 99)), "type 99")


def test_shards_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("w", WEIGHT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ZoError, match="one of 3 shards"):
        GgufFile(tmp_path / "s.gguf")


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    pair = {"w.one": (WEIGHT, Type.F32), "w.two": (WEIGHT, Type.F32)}
    path = write_gguf(tmp_path / "x.gguf", pair)
    with pytest.raises(ZoError, match="stands twice"):
        GgufFile(patched(path, b"w.two", b"w.one"))
