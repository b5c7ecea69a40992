"""Tiny random models of many architectures, in transformers and as F16 GGUFs with equal values.

What stands between the residual stream and the loss differs: norms before or after a block, fused
or parallel parts, biases, multipliers, soft caps, experts.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers

from tests.helpers.models import PRE, VOCAB_SIZE, save_tokenizer, sentences
from zo_gguf.masks.convert import convert

HIDDEN, LAYERS = 64, 3
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "architectures"
_LLAMA = {
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        config_class, model_class: Names in transformers.
        config: Beside the sizes of the vocabulary and special tokens.
        converter_keys: What the converter reads in config.json and transformers does not write.
        matrices: Part of a GGUF name -> of the Hugging Face parameter, for what feedback reaches.
        layers: Where the layers are in the Hugging Face model, and the attention in a layer.
        tokenizer: Its class, or "sentencepiece" where the converter wants a tokenizer.model.
        is_transposed: The Hugging Face matrices are (n_cols, n_rows).
        is_tied: The head is the embedding.
        norms: As `matrices`, for norms; a GGUF norm is the parameter plus `norm_offset`.
    """

    config_class: str
    model_class: str
    config: Mapping[str, Any]
    matrices: Mapping[str, str]
    norms: Mapping[str, str]
    layers: str = "model.layers"
    attention: str = "self_attn"
    is_transposed: bool = False
    norm_offset: float = 0.0
    is_tied: bool = False
    tokenizer: str = "PreTrainedTokenizerFast"
    converter_keys: Mapping[str, Any] = field(default_factory=dict)


_PRE_NORM = {"ffn_norm": "post_attention_layernorm"}
ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", _SIZES, _LLAMA, _PRE_NORM),
    "qwen3": Architecture(
        "Qwen3Config", "Qwen3ForCausalLM", {**_SIZES, "head_dim": 32}, _LLAMA, _PRE_NORM
    ),
    "gemma2": Architecture(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_SIZES,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 20.0,
        },
        _LLAMA,
        {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        is_tied=True,
        tokenizer="sentencepiece",
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_SIZES, "head_dim": 16, "query_pre_attn_scalar": 16},
        _LLAMA,
        {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
    "phi3": Architecture(
        "Phi3Config",
        "Phi3ForCausalLM",
        _SIZES,
        {
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _PRE_NORM,
        tokenizer="GPT2Tokenizer",
    ),
    "olmo2": Architecture(
        "Olmo2Config",
        "Olmo2ForCausalLM",
        _SIZES,
        _LLAMA,
        {
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "gpt2": Architecture(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 512},
        {"attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        {"ffn_norm": "ln_2"},
        layers="transformer.h",
        attention="attn",
        converter_keys={"n_ctx": 512},
        is_transposed=True,
    ),
    "granite": Architecture(
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            **_SIZES,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.5,
            "attention_multiplier": 0.2,
        },
        _LLAMA,
        _PRE_NORM,
    ),
    "stablelm": Architecture("StableLmConfig", "StableLmForCausalLM", _SIZES, _LLAMA, _PRE_NORM),
    "stablelm-parallel": Architecture(
        "StableLmConfig",
        "StableLmForCausalLM",
        {**_SIZES, "use_parallel_residual": True},
        _LLAMA,
        {},
    ),
    "gptneox": Architecture(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
        },
        {
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {"ffn_norm": "post_attention_layernorm"},
        layers="gpt_neox.layers",
        attention="attention",
        converter_keys={"rotary_pct": 0.25},
    ),
    "nemotron": Architecture(
        "NemotronConfig",
        "NemotronForCausalLM",
        {**_SIZES, "hidden_act": "relu2"},
        {"attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        _PRE_NORM,
        norm_offset=1.0,
        tokenizer="sentencepiece",
    ),
    "qwen3moe": Architecture(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_SIZES,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        {"attn_output": "self_attn.o_proj"},
        _PRE_NORM,
    ),
}


def _save_sentencepiece(folder: Path) -> None:
    """A tokenizer.model of bytes and a few words, which some converters insist on."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@dataclass(frozen=True)
class Pair:
    """A tiny model in both forms."""

    model: Any  # float32, in evaluation mode
    gguf: Path


@cache
def converted(kind: str) -> Pair:
    """A random model of a kind of ARCHITECTURES; its GGUF is kept in `tests/.cache`."""
    architecture = ARCHITECTURES[kind]
    model = _random_model(architecture)
    gguf = _CACHE / f"{kind}-{_key(model)}.gguf"
    if not gguf.is_file():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE, prefix=".making.") as scratch:
            _convert(architecture, model, Path(scratch)).replace(gguf)
    return Pair(model.eval(), gguf)


def _random_model(architecture: Architecture) -> Any:
    sizes = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, architecture.config_class)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = config(**sizes, tie_word_embeddings=architecture.is_tied, **architecture.config)
        made._attn_implementation = "eager"  # the others leave soft caps out
        model = getattr(transformers, architecture.model_class)(made)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases away from what would hide them
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.mul_(3)
                parameter.copy_(parameter.half().float())
    return model


def _key(model: Any) -> str:
    """Hash of the values and of this file, which says how they are converted."""
    sha = hashlib.sha256(Path(__file__).read_bytes())
    for parameter in model.parameters():
        sha.update(parameter.detach().numpy().tobytes())
    return sha.hexdigest()[:16]


def _convert(architecture: Architecture, model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    if architecture.tokenizer == "sentencepiece":
        _save_sentencepiece(folder)
    else:
        save_tokenizer(folder)
        path = folder / "tokenizer_config.json"
        keys = {"tokenizer_class": architecture.tokenizer}
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **architecture.converter_keys}))
    convert(folder, folder / "model.gguf", pre=PRE, name="tiny")
    return folder / "model.gguf"
