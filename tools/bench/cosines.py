"""Feedback's gradients against torch's, on a GGUF's dequantized weights; a part of `feedback.py`.

Only for models of llama's architecture. Attention is detached in torch by taking what it reads as
constant.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray

from tests.helpers.reference import fill, hf_name, torch_loss
from tools.bench.layers import layer_of, n_layers, tops
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.feedback import FeedbackPass, reach
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile

WRITERS = ("attn_output", "ffn_down")  # matrices whose outputs are added to the stream
Gradients = dict[str, NDArray[np.float32]]


def print_cosines(engine: Engine, rows: Sequence[Example]) -> None:
    """Of the engine's gradients with torch's, joint over the layers from some layer on."""
    names = [name for name in reach(engine).matrices if name.startswith("blk.")]
    with FeedbackPass(engine, dict.fromkeys(names)) as feedback:
        found = feedback.gradients(rows).matrices
    model = torch_llama(engine.gguf)
    whole = torch_gradients(model, rows, names)
    detach_attention(model)
    detached = torch_gradients(model, rows, names)
    print("| layers | writers, whole | all, whole | all, detached | worst matrix, detached |")
    print("|---|---|---|---|---|")
    for n_top, label in tops(engine).items():
        inside = [name for name in names if layer_of(name) >= n_layers(engine) - n_top]
        writers = [name for name in inside if name.split(".")[2] in WRITERS]
        worst = min(inside, key=lambda name: cosine(found, detached, [name]))
        print(
            f"| {label} | {cosine(found, whole, writers):.4f} | {cosine(found, whole, inside):.4f} "
            f"| {cosine(found, detached, inside):.4f} "
            f"| {cosine(found, detached, [worst]):.4f} ({worst}) |",
            flush=True,
        )


def torch_llama(gguf: GgufFile) -> Any:
    """The model in torch, with dequantized weights.

    Raises:
        ZoError: Another architecture than llama's.
    """
    if gguf.architecture != "llama":
        raise ZoError(f"Cosines need a model of llama's architecture, not {gguf.architecture!r}.")

    def read(key: str) -> Any:
        return gguf.metadata(f"llama.{key}")

    n_heads = read("attention.head_count")
    config = transformers.LlamaConfig(
        vocab_size=gguf.info("token_embd.weight").shape[0],
        hidden_size=read("embedding_length"),
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=read("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=read("attention.head_count_kv") or n_heads,
        rms_norm_eps=read("attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(read("rope.freq_base") or 1e4),
        },
        max_position_embeddings=read("context_length"),
        tie_word_embeddings="output.weight" not in gguf.tensors,
    )
    return fill(transformers.LlamaForCausalLM(config).float(), gguf.path)


def detach_attention(model: Any) -> None:
    """Take what attention reads as constant."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)


def torch_gradients(model: Any, rows: Sequence[Example], names: Sequence[str]) -> Gradients:
    """Of the mean loss with respect to matrices, by their GGUF names."""
    model.zero_grad()
    for row in rows:
        (torch_loss(model, row) / len(rows)).backward()
    parameters = dict(model.named_parameters())
    return {name: parameters[hf_name(name)].grad.numpy().copy() for name in names}


def cosine(a: Gradients, b: Gradients, names: Sequence[str]) -> float:
    """Of the gradients of some matrices together."""
    dot, squares_a, squares_b = (
        sum(float(np.vdot(x[name], y[name])) for name in names) for x, y in ((a, b), (a, a), (b, b))
    )
    return float(dot / np.sqrt(squares_a * squares_b))
