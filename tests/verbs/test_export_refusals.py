"""What export refuses, in words, and that it then leaves every file as it was."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from tests.helpers.models import converted, export_config, save_llama, save_text
from zo_gguf.errors import DoesNotFitError, ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.masks import positions
from zo_gguf.params.mask import Mask
from zo_gguf.verbs.export import ExportResult, export


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "calibration.jsonl")


@pytest.fixture(scope="module")
def plain(text: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The Llama in two quants, weights chosen at random."""
    out = tmp_path_factory.mktemp("plain")
    return export(export_config("llama", text, out, quant=["F16", "Q4_0"], score="random"))


def test_existing_outputs_are_refused_unless_asked(text: Path, tmp_path: Path) -> None:
    config = export_config("llama", text, tmp_path, score="random")
    precious = tmp_path / "llama-Q4_0.mask.safetensors"
    precious.write_bytes(b"precious")
    with pytest.raises(ZoError, match=r"llama-Q4_0\.mask\.safetensors' exists; pass --overwrite"):
        export(config)
    assert precious.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == [precious.name]
    export(replace(config, overwrite=True))
    assert Mask.load(precious).nnz > 0


def test_an_input_is_never_overwritten(plain: ExportResult, text: Path) -> None:
    model = plain.files[0].model
    before = model.read_bytes()
    config = export_config("llama", text, model.parent, gguf=str(model), quant=["F16"])
    with pytest.raises(ZoError, match="also an input"):
        export(replace(config, overwrite=True))
    assert model.read_bytes() == before


def test_bad_requests(plain: ExportResult, text: Path, tmp_path: Path) -> None:
    config = export_config("llama", text, tmp_path)
    quantized = str(plain.files[1].model)
    qwen = str(converted("qwen3").gguf)
    save_llama(tmp_path / "stranger", hidden=256, seed=5, dtype=torch.float32)
    for changes, message in (
        ({"quant": ["Q4_9"]}, "no quantization 'Q4_9'"),
        ({"density": 1e-7}, "density 1e-07 leaves no weight"),
        ({"gguf": quantized}, "holds .* as Q4_0.*float GGUF"),
        ({"gguf": qwen, "score": "random", "onto": quantized}, "architecture 'llama'.*'qwen3'"),
        ({"model": str(tmp_path / "stranger")}, "GGUF is of another model"),
        ({"model": str(tmp_path / "none")}, "neither a folder nor a hub id"),
        ({"calibration": str(tmp_path / "none.txt")}, "calibration file .* is not a file"),
        ({"include": "nothing"}, "leave no matrix"),
        ({"gguf": qwen, "positions": str(plain.files[1].mask)}, "use a mask of the same model"),
        ({"positions": str(plain.files[1].mask), "layers": "1", "exclude": "."}, "no matrix"),
        ({"onto": str(text)}, "calibration.jsonl"),
    ):
        with pytest.raises(ZoError, match=message):
            export(replace(config, **changes))
        assert os.listdir(tmp_path) == ["stranger"], message


def test_onto_an_unrelated_model_of_the_same_shape(
    plain: ExportResult, text: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(0)
    stranger = tmp_path / "stranger.gguf"
    data = bytearray(plain.files[0].model.read_bytes())
    for tensor in GGUFReader(plain.files[0].model).tensors:
        if tensor.name.startswith("blk.0.attn_q.w"):
            noise = values.normal(0, 0.02, tensor.n_elements).astype(np.float16).tobytes()
            data[tensor.data_offset : tensor.data_offset + len(noise)] = noise
    stranger.write_bytes(data)
    config = export_config("llama", text, tmp_path, score="random", onto=str(stranger))
    with pytest.raises(ZoError, match=r"'blk\.0\.attn_q\.weight'.*differs too much"):
        export(config)


def test_a_full_disk_is_noticed_first(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 19}))
    with pytest.raises(DoesNotFitError, match=r"needs about .* GiB"):
        export(export_config("llama", text, tmp_path))


def test_a_failure_on_the_way_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["zo_gguf.verbs.export"]
    monkeypatch.setattr(module, "quantize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(export_config("llama", text, tmp_path, score="random"))
    assert os.listdir(tmp_path) == []


def test_without_torch_the_controls_work_and_gradients_say_what_is_missing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "zo_gguf.masks.sensitivity", raising=False)
    monkeypatch.setattr("zo_gguf.masks.sensitivity", None, raising=False)
    monkeypatch.delattr("zo_gguf.masks.sensitivity", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ZoError, match=r"zo-gguf\[export\]"):
        export(export_config("llama", text, tmp_path))
    result = export(export_config("llama", text, tmp_path, score="random"))
    assert result.files[0].mask.is_file()


def test_a_tokenizer_of_another_model_is_noticed(text: Path, tmp_path: Path) -> None:
    config = export_config("llama", text, tmp_path)
    floats, folder = GgufFile(str(config.gguf)), Path(config.model)
    scores = positions._gradient_scores(config, floats, [], folder, [np.array([3, 10**6])])
    with pytest.raises(ZoError, match=r"gives token 1000000, but the model knows \d+; put"):
        next(scores)


def test_recurrent_models_are_refused_before_the_long_steps(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "floats.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(64)
    writer.add_ssm_state_size(16)
    writer.add_ssm_time_step_rank(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_token_scores([0.0] * 3)
    writer.add_token_types([2, 3, 3])
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = export_config("llama", text, tmp_path / "out")
    for given in ({"gguf": str(path)}, {"onto": str(path)}):
        with pytest.raises(ZoError, match=r"'floats.gguf' has recurrent layers"):
            export(replace(config, **given))
    assert not (tmp_path / "out").exists()
