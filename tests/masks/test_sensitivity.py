"""Gradient scores against plain autograd on a tiny random model."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.models import VOCAB_SIZE, save_llama
from zo_gguf.errors import DoesNotFitError, ZoError
from zo_gguf.masks import sensitivity
from zo_gguf.masks.sensitivity import gradient_scores, load_model, load_tokenizer

N_LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return save_llama(path, layers=N_LAYERS, dtype=torch.float32)


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module")
def blocks() -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB_SIZE, 24) for _ in range(4)]


def layers_of(model: Any) -> list[list[str]]:
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    return [[n for n in names if f".layers.{i}." in n] for i in range(N_LAYERS)]


def reference(model: Any, blocks: list[NDArray[np.int64]]) -> dict[str, Any]:
    """Gradients of all parameters at once, with the library's own loss, in float64."""
    model = model.double().requires_grad_(True)
    gradients: dict[str, list[NDArray[np.float64]]] = {}
    for block in blocks:
        tokens = torch.from_numpy(block)[None]
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            gradients.setdefault(name, []).append(parameter.grad.numpy().copy())
    stacked = {name: np.stack(list_) for name, list_ in gradients.items()}
    return {name: np.square(g.mean(axis=0)) for name, g in stacked.items()}


@pytest.mark.parametrize("chunk_layers", [1, 2, None])
def test_scores_equal_plain_autograd(
    folder: Path, blocks: list[NDArray[np.int64]], chunk_layers: int | None
) -> None:
    model = load_model(folder)
    layers = layers_of(model)
    scores = dict(gradient_scores(model, layers, blocks, chunk_layers=chunk_layers))
    wanted = reference(load_model(folder), blocks)
    assert sorted(scores) == sorted(name for layer in layers for name in layer)
    for name, score in scores.items():
        assert score.dtype == np.float32
        assert score.max() > 0
        np.testing.assert_allclose(score, wanted[name], rtol=2e-3, atol=1e-5 * wanted[name].max())


def test_activations_moved_to_host_memory_change_nothing(
    model: Any, blocks: list[NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of(model)
    wanted = dict(gradient_scores(model, layers, blocks))
    moved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def watching(pack: Any, unpack: Any) -> Any:
        def watch(saved: torch.Tensor) -> torch.Tensor:
            packed: torch.Tensor = pack(saved)
            if packed is not saved:
                moved.append(packed)
            return packed

        return hooks(watch, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watching)
    monkeypatch.setattr(sensitivity, "_is_short", lambda model: True)
    scores = dict(gradient_scores(model, layers, blocks))
    for name, score in scores.items():
        np.testing.assert_array_equal(score, wanted[name])
    assert moved
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not any(saved.untyped_storage().data_ptr() in weights for saved in moved)


def test_a_bf16_model_stays_bf16_and_gives_nearly_the_same(
    folder: Path,
    blocks: list[NDArray[np.int64]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensitivity, "has_bfloat16_products", lambda: True)
    narrow = load_model(save_llama(tmp_path, layers=N_LAYERS, dtype=torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    layers = layers_of(narrow)
    scores = dict(gradient_scores(narrow, layers, blocks))
    wanted = dict(gradient_scores(load_model(folder), layers, blocks))
    for name, score in scores.items():
        assert np.corrcoef(score.ravel(), wanted[name].ravel())[0, 1] > 0.95, name


def test_an_f16_model_is_not_computed_in_f16(
    tmp_path: Path, blocks: list[NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path, dtype=torch.float16)
    assert load_model(tmp_path).dtype == torch.float32
    monkeypatch.setattr(sensitivity, "_HEADROOM", 1 << 60)
    assert load_model(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_bf16_computes_in_f32_where_memory_allows(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sensitivity, "has_bfloat16_products", lambda: False)
    n_bytes = sensitivity.weight_bytes(save_llama(tmp_path, dtype=dtype))
    monkeypatch.setattr(sensitivity, "_HEADROOM", 1000)
    memory(monkeypatch, 2 * n_bytes + 1001)
    assert load_model(tmp_path).dtype == torch.float32
    assert capsys.readouterr().err == ""
    memory(monkeypatch, 2 * n_bytes + 999)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert "no products in BF16" in capsys.readouterr().err


def test_a_gpu_computes_in_bf16_whatever_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    wanted = (torch.bfloat16, 1000)
    assert sensitivity._computed_dtype(torch.bfloat16, 1000, 1 << 40) == wanted
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 10, 1 << 40))
    wanted = (torch.float32, 2000)
    assert sensitivity._computed_dtype(torch.bfloat16, 1000, 1 << 40) == wanted


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "library", "has"),
    [
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("x86_64", False, False, True, False),  # oneDNN emulates them with AVX-512
        ("x86_64", True, True, False, False),
        ("aarch64", False, False, True, True),
        ("arm64", False, False, False, False),
    ],
)
def test_what_says_that_a_cpu_has_bf16(
    machine: str,
    avx512: bool,
    amx: bool,
    library: bool,
    has: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensitivity.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
    assert sensitivity.has_bfloat16_products() == has


def test_only_one_chunk_has_gradients_at_a_time(
    model: Any, blocks: list[NDArray[np.int64]]
) -> None:
    seen: set[frozenset[str]] = set()

    def watch(*_: Any) -> None:
        parameters = dict(model.named_parameters())
        assert all(parameter.grad is None for parameter in parameters.values())
        seen.add(frozenset(n for n, p in parameters.items() if p.requires_grad))

    handle = model.register_forward_pre_hook(watch)
    layers = layers_of(model)
    for _ in gradient_scores(model, layers, blocks, chunk_layers=1):
        pass
    handle.remove()
    assert seen == {frozenset(layer) for layer in layers}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_one_matrix_of_a_layer_may_be_scored_alone(
    model: Any, blocks: list[NDArray[np.int64]]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    every = dict(gradient_scores(model, layers_of(model), blocks))
    ((only, score),) = gradient_scores(model, [[name]], blocks)
    assert only == name
    np.testing.assert_allclose(score, every[name], rtol=1e-4, atol=1e-12)


def test_what_is_not_finite_is_refused(model: Any, blocks: list[NDArray[np.int64]]) -> None:
    layers = layers_of(model)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ZoError, match=r"loss .* is not finite"):
        list(gradient_scores(model, layers, blocks))


def test_an_infinite_gradient_names_its_weight(
    model: Any, blocks: list[NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def backward(model: Any, block: Any, offload: bool) -> None:
        parameter = model.get_parameter(name)
        (parameter.sum() * float("inf")).backward()

    monkeypatch.setattr(sensitivity, "_backward", backward)
    with pytest.raises(ZoError, match=name):
        list(gradient_scores(model, [[name]], blocks))


def memory(monkeypatch: pytest.MonkeyPatch, n_bytes: float) -> None:
    class Free:
        available = n_bytes

    monkeypatch.setattr(psutil, "virtual_memory", Free)


@pytest.fixture
def headroom(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sensitivity, "_HEADROOM", 1000)
    return 1000


def test_chunks_follow_the_free_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch, headroom: int
) -> None:
    layers = layers_of(model)
    layer = sum(4 * model.get_parameter(name).numel() for name in layers[0])
    for free, fitting in ((4.5, 2), (2.5, 1), (1.5, 1), (100, N_LAYERS)):
        memory(monkeypatch, headroom + free * layer)
        assert sensitivity._fitting_layers(model, layers) == fitting
    memory(monkeypatch, 0.5 * layer)
    with pytest.raises(DoesNotFitError, match="One layer's gradients"):
        sensitivity._fitting_layers(model, layers)


def test_a_model_larger_than_the_memory_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 1000)
    with pytest.raises(DoesNotFitError, match="GiB are free"):
        load_model(folder)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ZoError, match="cannot be read"):
        load_model(tmp_path)
    with pytest.raises(ZoError, match="tokenizer"):
        load_tokenizer(tmp_path)
