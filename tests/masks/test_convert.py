"""Fetching llama.cpp's converter safely, its refusals in one sentence, and quantization."""

import io
import os
import tarfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from tests.helpers.models import PRE, converted, save_llama
from zo_gguf.engine.quantize import quant_name, quantize
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.masks import convert as convert_module
from zo_gguf.masks.convert import RELEASE, cache_folder, convert, converter_script, model_folder
from zo_gguf.system import sha256_file

ROOT = f"llama_cpp_python-{RELEASE}/vendor/llama.cpp"


def make_archive(path: Path, members: dict[str, bytes], link: str | None = None) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if link is not None:
            member = tarfile.TarInfo(link)
            member.type = tarfile.SYMTYPE
            member.linkname = "/etc/passwd"
            tar.addfile(member)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_folder().mkdir(parents=True)
    return cache_folder()


def test_without_network_and_cache_it_says_what_to_do(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache))
    with pytest.raises(ZoError, match=r"could not be fetched with pip.*--gguf"):
        converter_script()
    assert list(empty_cache.iterdir()) == []


def test_an_archive_with_another_hash_is_refused(empty_cache: Path) -> None:
    archive = empty_cache / f"llama_cpp_python-{RELEASE}.tar.gz"
    make_archive(archive, {f"{ROOT}/convert_hf_to_gguf.py": b"print('other')"})
    with pytest.raises(ZoError, match=f"SHA-256 {sha256_file(archive)}"):
        converter_script()
    assert not any(path.name.startswith("llama.cpp") for path in empty_cache.iterdir())


def test_only_the_converter_is_unpacked(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = empty_cache / f"llama_cpp_python-{RELEASE}.tar.gz"
    wanted = {
        f"{ROOT}/convert_hf_to_gguf.py": b"script",
        f"{ROOT}/conversion/base.py": b"base",
        f"{ROOT}/gguf-py/gguf/__init__.py": b"gguf",
    }
    unwanted = {
        f"{ROOT}/src/llama.cpp": b"x",
        f"{ROOT}/conversion/../../../../../escaped.py": b"x",
        "/tmp/absolute.py": b"x",
        "conversion/elsewhere.py": b"x",
    }
    make_archive(archive, wanted | unwanted, link=f"{ROOT}/conversion/link.py")
    monkeypatch.setattr(convert_module, "_SHA256", sha256_file(archive))
    script = converter_script()
    folder = script.parent
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {name.removeprefix(f"{ROOT}/"): data for name, data in wanted.items()}
    assert not list(tmp_path.rglob("escaped.py"))
    archive.unlink()
    assert converter_script() == script  # from the cache


def test_an_oversized_or_empty_archive_is_refused(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = empty_cache / f"llama_cpp_python-{RELEASE}.tar.gz"
    make_archive(archive, {f"{ROOT}/convert_hf_to_gguf.py": b"0123456789"})
    monkeypatch.setattr(convert_module, "_SHA256", sha256_file(archive))
    monkeypatch.setattr(convert_module, "_MAX_UNPACKED", 9)
    with pytest.raises(ZoError, match="more than expected"):
        converter_script()
    make_archive(archive, {"other.py": b""})
    monkeypatch.setattr(convert_module, "_SHA256", sha256_file(archive))
    with pytest.raises(ZoError, match=r"no convert_hf_to_gguf\.py"):
        converter_script()


def test_the_real_converter_comes_through_pip() -> None:
    assert (converter_script().parent / "conversion" / "base.py").is_file()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_converted_models_give_the_logits_of_the_original(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = converted(kind)
    tokens = [1, 40, 7, 300, 12, 99, 5, 210, 33, 64]
    original = AutoModelForCausalLM.from_pretrained(model.folder)
    with torch.no_grad():
        wanted = original(torch.tensor([tokens])).logits[0].numpy()
    llama = llama_cpp.Llama(str(model.gguf), n_ctx=64, logits_all=True, verbose=False)
    llama.eval(tokens)
    logits = llama.scores[: len(tokens)].copy()
    llama.close()
    assert np.abs(logits - wanted).max() < 2e-3 * np.abs(wanted).max() + 2e-3


def test_the_name_and_pre_tokenizer_reach_the_metadata() -> None:
    model = GgufFile(converted("llama").gguf)
    assert model.metadata("tokenizer.ggml.pre") == "gpt-2"
    assert model.name is not None
    assert model.name.lower() == "llama"


def test_an_unknown_pre_tokenizer_asks_for_pre(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    with pytest.raises(ZoError, match=r"--pre \(for example gpt-2, llama-bpe or qwen2\)"):
        convert(tmp_path / "model", tmp_path / "out" / "x.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_truncated_weights_are_the_models_fault(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_llama(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(ZoError, match=f"refused '{folder}'") as caught:
        convert(folder, tmp_path / "out.gguf", pre=PRE)
    assert "Writing" not in str(caught.value)
    assert os.listdir(tmp_path) == ["hf"]


def test_model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZoError, match=r"no config\.json"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ZoError, match="no weights"):
        model_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert model_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ZoError, match="neither a folder nor a hub id"):
        model_folder(str(tmp_path / "none"))


def test_a_hub_model_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ZoError, match=r"'some/model'.*\(offline\)"):
        model_folder("some/model")


def test_quant_names() -> None:
    assert quant_name("q4_k_m") == "Q4_K_M"
    assert quant_name(" q8-0") == "Q8_0"
    with pytest.raises(ZoError, match=r"no quantization 'Q4_9'.*Q4_0"):
        quant_name("Q4_9")


def test_quantize_writes_the_wanted_type(tmp_path: Path) -> None:
    quantize(converted("llama").gguf, tmp_path / "q.gguf", "Q8_0", n_threads=1)
    model = GgufFile(tmp_path / "q.gguf")
    floats = GgufFile(converted("llama").gguf)
    assert sorted(model.tensors) == sorted(floats.tensors)
    name = "blk.1.ffn_down.weight"
    assert model.tensors[name].type == gguf.GGMLQuantizationType.Q8_0
    error = model.dequantize(name) - floats.dequantize(name)
    assert 0 < np.abs(error).max() < 0.01 * np.abs(floats.dequantize(name)).max()
    assert model.metadata("tokenizer.ggml.tokens") == floats.metadata("tokenizer.ggml.tokens")


def test_quantize_fails_in_one_sentence_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(ZoError, match=r"cannot quantize .* to IQ1_S: .*imatrix"):
        quantize(converted("llama").gguf, target, "IQ1_S")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ZoError, match=r"cannot quantize 'bad\.gguf'"):
        quantize(tmp_path / "bad.gguf", target, "Q4_0")
    with pytest.raises(ZoError, match="is not a file"):
        quantize(tmp_path / "none.gguf", target, "Q4_0")
    assert target.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["bad.gguf", "q.gguf"]
