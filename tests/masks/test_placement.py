"""Tensor choice, names and row orders between Hugging Face and GGUF."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.helpers.models import converted
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import choose_tensors, expert_tensors, linear_tensors, require_float
from zo_gguf.masks.placement import gguf_names, place


def gguf_of(*names: str, shape: tuple[int, ...] = (4, 4)) -> Any:
    tensors = {name: SimpleNamespace(shape=shape) for name in names}
    return SimpleNamespace(path=Path("model.gguf"), tensors=tensors, architecture="llama")


def holding(
    values: NDArray[np.float32], kind: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Any:
    """A stand-in for a GGUF that holds one tensor "w"."""
    return SimpleNamespace(
        path=Path("model.gguf"),
        architecture="llama",
        tensors={"w": SimpleNamespace(shape=values.shape, type=kind)},
        dequantize=lambda name: values,
        metadata={"llama.attention.head_count": 2}.get,
    )


def test_linear_tensors_of_many_architectures() -> None:
    linear = [
        "blk.0.attn_q.weight",
        "blk.0.attn_qkv.weight",
        "blk.3.attn_output.weight",
        "blk.3.attn_kv_a_mqa.weight",
        "blk.12.ffn_up.weight",
        "blk.12.ffn_gate_shexp.weight",
    ]
    others = [
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_sub_norm.weight",
        "blk.0.attn_kv_a_norm.weight",
        "blk.0.post_attention_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "blk.0.attn_q.bias",
        "blk.0.ssm_conv1d.weight",
    ]
    experts = ["blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_up_exps.weight"]
    model = gguf_of(*others, *linear, *experts)
    assert linear_tensors(model) == linear
    assert expert_tensors(model) == experts
    assert linear_tensors(gguf_of(*linear, shape=(2, 4, 4))) == []


NAMES = [f"blk.{i}.{part}.weight" for i in range(12) for part in ("attn_q", "ffn_up")]


@pytest.mark.parametrize(
    ("include", "exclude", "layers", "count"),
    [
        (None, None, None, 24),
        ("attn", None, None, 12),
        (None, "attn", "4-6", 3),
        (None, None, "0,2,8-11", 12),
        (r"blk\.1\.", None, None, 2),
        ("attn", "blk.1", None, 9),
    ],
)
def test_choice(include: str | None, exclude: str | None, layers: str | None, count: int) -> None:
    chosen = choose_tensors(gguf_of(*NAMES), include, exclude, layers)
    assert len(chosen) == count
    assert chosen == [name for name in NAMES if name in set(chosen)]


@pytest.mark.parametrize(
    ("include", "exclude", "layers", "message"),
    [
        ("nothing", None, None, r"leave no matrix.*blk\.0\.attn_q"),
        (None, ".", None, "leave no matrix"),
        (None, None, "10-12", "layers 0 to 11"),
        (None, None, "5-4", "layers 0 to 11"),
        (None, None, "4-", "must look like"),
        (None, None, "a", "must look like"),
    ],
)
def test_bad_choices(
    include: str | None, exclude: str | None, layers: str | None, message: str
) -> None:
    with pytest.raises(ZoError, match=message):
        choose_tensors(gguf_of(*NAMES), include, exclude, layers)


def test_experts_are_refused_in_words() -> None:
    model = gguf_of(*NAMES, "blk.0.ffn_up_exps.weight")
    with pytest.raises(ZoError, match="MoE experts only, which cannot be tuned"):
        choose_tensors(model, "_exps", None, None)
    with pytest.raises(ZoError, match="no attention or MLP matrices"):
        choose_tensors(gguf_of("blk.0.ffn_up_exps.weight"), None, None, None)


def interleaved(n_rows: int, n_heads: int) -> NDArray[np.int64]:
    """Row r of a GGUF head holds row r // 2 of the head's first (even r) or second half."""
    size = n_rows // n_heads
    order = [h * size + (r % 2) * (size // 2) + r // 2 for h in range(n_heads) for r in range(size)]
    return np.array(order)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_linear_weight_is_found_and_ordered(kind: str) -> None:
    model = GgufFile(converted(kind).gguf)
    original = AutoModelForCausalLM.from_pretrained(converted(kind).folder)
    parameters = {n: p.detach().numpy() for n, p in original.named_parameters() if p.dim() == 2}
    names = gguf_names(model, parameters)
    linear = linear_tensors(model)
    assert len(linear) == 2 * 7
    for name in linear:
        weight = parameters[names[name]]
        placement = place(weight, model, name)
        assert not placement.transposed
        if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
            n_heads = 4 if "attn_q" in name else 2
            assert placement.order is not None
            np.testing.assert_array_equal(placement.order, interleaved(len(weight), n_heads))
        else:
            assert placement.order is None, name
        half = torch.from_numpy(placement.apply(weight).copy()).half().float().numpy()
        np.testing.assert_array_equal(half, model.dequantize(name))


def test_rows_are_found_by_their_bytes_in_any_order() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 4), dtype=np.float32)
    order = rng.permutation(8)
    placement = place(weight, holding(weight[order]), "w")
    np.testing.assert_array_equal(placement.order, order)
    np.testing.assert_array_equal(placement.apply(weight), weight[order])


def test_a_transposed_weight_is_found() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
    placement = place(weight, holding(weight.T.copy()), "w")
    assert placement.transposed
    np.testing.assert_array_equal(placement.apply(weight), weight.T)


def test_equal_rows_are_resolved_by_the_heads() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)
    weight[3] = weight[5] = 0
    order = interleaved(8, 2)
    np.testing.assert_array_equal(place(weight, holding(weight[order]), "w").order, order)
    assert place(weight, holding(weight), "w").order is None


def test_a_bf16_copy_of_the_weights_is_recognized() -> None:
    exact = np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)
    f16 = exact.astype(np.float16).astype(np.float32)
    copy = torch.from_numpy(f16).bfloat16().float().numpy()
    assert not np.array_equal(copy, f16)
    assert place(copy, holding(f16, GGMLQuantizationType.F16), "w").order is None


@pytest.mark.parametrize("change", [lambda w: w + 1, lambda w: w[:4], lambda w: w.reshape(4, 16)])
def test_transformed_weights_are_refused_by_name(change: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
    with pytest.raises(ZoError, match=r"'w' of 'model\.gguf'.*fused or transformed.*--exclude"):
        place(change(weight), holding(weight), "w")


def test_a_quantized_gguf_is_no_source() -> None:
    model = holding(np.zeros((4, 32), np.float32), GGMLQuantizationType.Q8_0)
    with pytest.raises(ZoError, match=r"holds 'w' as Q8_0.*float GGUF"):
        require_float(model, ["w"])


def test_an_unknown_architecture_is_named() -> None:
    model = gguf_of(*NAMES)
    model.architecture = "brand-new"
    with pytest.raises(ZoError, match="'brand-new'"):
        gguf_names(model, [])
