"""The verb export on tiny random models: scores, positions and residuals against plain numpy."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.models import (
    BLOCK_SIZE,
    DENSITY,
    PRE,
    converted,
    export_config,
    save_llama,
    save_text,
)
from zo_gguf import export as export_function
from zo_gguf.params.mask import Mask
from zo_gguf.verbs.export import ExportResult, export

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "calibration.jsonl")


@pytest.fixture(scope="module")
def plain(text: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The Llama in two quants, masks unlimited."""
    out = tmp_path_factory.mktemp("plain")
    return export(export_config("llama", text, out, quant=["F16", "Q4_0"]))


def gguf_values(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every matrix of a GGUF by the gguf package's own reader."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(path).tensors
        if len(tensor.shape) == 2
    }


def squared_gradients(folder: Path, text: Path) -> dict[str, NDArray[np.float32]]:
    """Square of the gradient over all blocks at once, by Hugging Face name."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()[:20]]
    stream = [token for line in lines for token in tokenizer(line)["input_ids"]]
    tokens = torch.tensor(stream[: len(stream) // BLOCK_SIZE * BLOCK_SIZE]).reshape(-1, BLOCK_SIZE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.square().numpy() for name, p in model.named_parameters()}


def permuted(kind: str, part: str, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Llama's q and k rows as llama.cpp wants them: each head's two halves interleaved."""
    if kind != "llama" or part not in ("attn_q", "attn_k"):
        return matrix
    heads = np.split(matrix, 4 if part == "attn_q" else 2)
    return np.concatenate([np.stack(np.split(h, 2), axis=1).reshape(h.shape) for h in heads])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_masks_hold_the_weights_with_the_largest_squared_gradients(
    kind: str, text: Path, tmp_path: Path, plain: ExportResult
) -> None:
    result = plain if kind == "llama" else export(export_config(kind, text, tmp_path))
    exported = result.files[-1]
    assert exported.quant == "Q4_0"
    mask = Mask.load(exported.mask)
    scores = squared_gradients(converted(kind).folder, text)
    weights = gguf_values(converted(kind).gguf)
    stored = gguf_values(exported.model)
    assert len(mask.tensors) == 2 * len(PARTS)
    for name, chosen in mask.tensors.items():
        _, layer, part, _ = name.split(".")
        score = permuted(kind, part, scores[f"model.layers.{layer}.{PARTS[part]}.weight"])
        assert mask.shapes[name] == score.shape
        k = int(score.size * DENSITY)
        wanted = np.argsort(-score.ravel(), kind="stable")[:k]
        # Rounding may swap neighbours at the border, nothing else.
        assert chosen.size == k
        assert np.intersect1d(chosen, wanted).size >= k - 2, name
        np.testing.assert_array_equal(
            mask.residuals[name], (weights[name] - stored[name]).ravel()[chosen]
        )
    assert any(np.abs(values).max() > 0 for values in mask.residuals.values())


def test_header_order_and_residuals(plain: ExportResult, text: Path) -> None:
    floats, quantized = (Mask.load(file.mask) for file in plain.files)
    assert floats.theta0().any() == np.False_  # F16 from F16 loses nothing
    for name in floats.tensors:
        np.testing.assert_array_equal(floats.tensors[name], quantized.tensors[name])
    order = [tensor.name for tensor in GGUFReader(plain.files[1].model).tensors]
    assert list(quantized.tensors) == [name for name in order if name in quantized.tensors]
    header = quantized.header
    assert header.base_name == plain.files[1].model.name == "llama-Q4_0.gguf"
    assert header.score == "sensitive"
    assert header.density == DENSITY
    assert header.max_rank is None
    assert header.calibration["source"] == text.name
    assert header.calibration["documents"] == 20
    assert plain.files[1].nnz == quantized.nnz
    assert plain.kept == 1.0


def test_a_second_export_gives_the_same_bytes(
    plain: ExportResult, text: Path, tmp_path: Path
) -> None:
    again = export(export_config("llama", text, tmp_path, chunk_layers=1))
    assert again.files[0].model.read_bytes() == plain.files[1].model.read_bytes()
    assert again.files[0].mask.read_bytes() == plain.files[1].mask.read_bytes()


def test_conversion_included(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_llama(tmp_path / "My.Model", hidden=256)
    out = tmp_path / "out"
    options = {"model": str(folder), "gguf": None, "pre": PRE, "max_rank": "auto"}
    result = export(export_config("llama", text, out, quant=["f16", "q8_0", "Q8_0"], **options))
    names = ["My.Model-F16", "My.Model-Q8_0"]
    assert sorted(os.listdir(out)) == sorted(
        f"{name}{suffix}" for name in names for suffix in (".gguf", ".mask.safetensors")
    )
    assert result.max_rank is not None
    assert result.kept is not None
    assert result.kept >= 0.99
    table = capfd.readouterr().out
    assert all(name in table for name in names)
    assert f"at most {result.max_rank} rows or columns" in table
    mask = Mask.load(result.files[1].mask)
    assert mask.header.max_rank == result.max_rank
    assert max(mask.rank(name) for name in mask.tensors) <= result.max_rank


def test_a_rank_limit_is_kept(text: Path, tmp_path: Path, plain: ExportResult) -> None:
    free = Mask.load(plain.files[1].mask)
    assert max(free.rank(name) for name in free.tensors) > 4
    result = export(export_config("llama", text, tmp_path, max_rank=4))
    mask = Mask.load(result.files[0].mask)
    assert result.max_rank == mask.header.max_rank == 4
    assert max(mask.rank(name) for name in mask.tensors) <= 4
    assert result.kept is not None
    assert 0.1 < result.kept < 1.0
    assert mask.nnz == free.nnz  # the lines are long enough to fill up


@pytest.mark.parametrize("converts", [False, True])  # which needs the pre-tokenizer's name
def test_onto_makes_only_the_mask_and_the_same_one(
    converts: bool, plain: ExportResult, text: Path, tmp_path: Path
) -> None:
    config = export_config("llama", text, tmp_path, onto=str(plain.files[1].model))
    result = export(replace(config, gguf=None) if converts else config)
    assert os.listdir(tmp_path) == ["llama-Q4_0.mask.safetensors"]
    assert result.files[0].mask.read_bytes() == plain.files[1].mask.read_bytes()
    assert result.files[0].quant == "Q4_0"


def test_positions_carry_over_to_another_quant(
    plain: ExportResult, text: Path, tmp_path: Path
) -> None:
    source = str(plain.files[1].mask)
    # No text is read: the file does not even exist.
    config = export_config("llama", tmp_path / "none.jsonl", tmp_path, quant=["Q8_0"])
    result = export(replace(config, positions=source, include="ffn", density=0.5))
    mask, other = Mask.load(result.files[0].mask), Mask.load(source)
    assert sorted(mask.tensors) == sorted(name for name in other.tensors if "ffn" in name)
    for name in mask.tensors:
        np.testing.assert_array_equal(mask.tensors[name], other.tensors[name])
        assert not np.array_equal(mask.residuals[name], other.residuals[name])
    assert mask.header.density == DENSITY
    assert mask.header.base_sha256 != other.header.base_sha256


def test_controls(text: Path, tmp_path: Path) -> None:
    def positions(name: str, **options: Any) -> dict[str, NDArray[np.int64]]:
        settings = {"max_rank": "auto", "quant": ["F16"], "name": name} | options
        config = export_config("llama", tmp_path / "none.jsonl", tmp_path, **settings)
        return Mask.load(export(config).files[0].mask).tensors

    weights = gguf_values(converted("llama").gguf)
    for name, chosen in positions("magnitude", score="magnitude").items():
        magnitude = np.abs(weights[name]).ravel()
        rest = np.delete(magnitude, chosen)
        assert chosen.size == int(magnitude.size * DENSITY)
        assert magnitude[chosen].min() >= rest.max()
    first = positions("a", score="random")
    again = positions("b", score="random", include="ffn_up")
    other = positions("c", score="random", seed=1)
    name = "blk.1.ffn_up.weight"
    np.testing.assert_array_equal(first[name], again[name])
    assert np.intersect1d(first[name], other[name]).size < first[name].size / 4
    columns = np.bincount(first[name] % 256, minlength=256)
    assert columns.max() < 15  # spread evenly, on no few lines


def test_the_package_gives_the_function() -> None:
    assert export_function is export
