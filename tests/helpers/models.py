"""Tiny random Hugging Face models, saved as folders: seconds to convert, no downloads."""

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zo_gguf.config import ExportConfig
from zo_gguf.masks.convert import convert

WORDS = (
    "the ship left the harbour at dawn and the crew watched the light on the hill fade away while "
    "a cold wind moved over the grey water; nobody spoke of the storm that had taken the last two "
    "boats, but every one of them counted the ropes, the barrels and the days of bread on board"
)
VOCAB_SIZE = 320
BLOCK_SIZE = 32
DENSITY = 0.004
PRE = "gpt-2"  # the pre-tokenizer that `save_tokenizer` makes, under llama.cpp's name


def sentences(n: int = 40) -> list[str]:
    """Some different pieces of plain text, each some tens of tokens long."""
    words = WORDS.split()
    return [
        " ".join(words[(7 * i + j * (1 + i % 3)) % len(words)] for j in range(24)) for i in range(n)
    ]


def save_tokenizer(folder: Path) -> Any:
    """Train a byte-level BPE with <unk>, <s>, </s>, save it as a Hugging Face one; it adds <s>."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def _shape(hidden: int, layers: int, tied: bool, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | options


def _save(model: Any, folder: Path, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A random Llama with grouped-query attention (4 heads over 2), whose q and k GGUF permutes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**_shape(hidden, layers, tied, options)))
    return _save(model, folder, dtype)


def save_qwen3(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A random Qwen3: norms on q and k, a head dimension of its own, nothing permuted in GGUF."""
    options = {"head_dim": hidden // 2} | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**_shape(hidden, layers, tied, options)))
        with torch.no_grad():  # norms away from one, so that leaving them out would show
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return _save(model, folder, dtype)


@dataclass(frozen=True)
class Converted:
    """A tiny model in both forms."""

    folder: Path
    gguf: Path  # F16


@cache
def converted(kind: str, hidden: int = 256) -> Converted:
    """A tiny random F32 model, kind "llama" or "qwen3", and its F16 GGUF; made once per session.

    K-quants need 256 columns.
    """
    scratch = Path(tempfile.mkdtemp(prefix="zo-models-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    save = {"llama": save_llama, "qwen3": save_qwen3}[kind]
    folder = save(scratch / kind, hidden=hidden, dtype=torch.float32)
    convert(folder, scratch / f"{kind}-F16.gguf", pre=PRE, name=kind)
    return Converted(folder, scratch / f"{kind}-F16.gguf")


def save_text(path: Path) -> Path:
    """Calibration text as .jsonl."""
    path.write_text("\n".join(json.dumps({"text": text}) for text in sentences()))
    return path


def export_config(kind: str, text: Path, out: Path, **options: Any) -> ExportConfig:
    """Export options for a `converted` model, which skip the conversion; `options` override."""
    model = converted(kind)
    settings: dict[str, Any] = {
        "model": str(model.folder),
        "gguf": str(model.gguf),
        "calibration": str(text),
        "quant": ["Q4_0"],
        "density": DENSITY,
        "block_size": BLOCK_SIZE,
        "calibration_docs": 20,
        "max_rank": "none",
        "output": str(out),
    }
    return ExportConfig(**settings | options)
