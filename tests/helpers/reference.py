"""Independent references: the same model and loss in torch, with the GGUF's dequantized weights.

The mapping from GGUF to Hugging Face tensors is written out by hand here, so that it does not share
a mistake with the exporter, which finds it by comparing weights.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from zo_gguf.data.dataset import Example
from zo_gguf.gguf_files.file import GgufFile

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def hf_name(name: str) -> str:
    """GGUF tensor name -> Hugging Face parameter name, for Llama and Qwen3."""
    plain = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in plain:
        return plain[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def rows_to_hf(name: str, n_rows: int, config: object) -> NDArray[np.int64]:
    """For each row of the Hugging Face matrix, the row of the GGUF matrix that holds it.

    llama.cpp rotates adjacent pairs of a Llama head's rows where transformers rotates the two
    halves of the head, so the rows of q and k are interleaved on conversion.
    """
    rows = np.arange(n_rows)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if config.model_type != "llama" or part not in heads:
        return rows
    n_heads = getattr(config, heads[part])
    head = rows.reshape(n_heads, n_rows // n_heads // 2, 2)  # as in the GGUF
    return head.swapaxes(1, 2).reshape(n_rows)


def torch_model(hf_dir: Path, gguf_path: Path) -> torch.nn.Module:
    """The Hugging Face model in float32 with every weight read from the GGUF."""
    return fill(AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32), gguf_path)


def fill(model: torch.nn.Module, gguf_path: Path) -> torch.nn.Module:
    """Give a float32 model the values of a GGUF, all of them."""
    file = GgufFile(gguf_path)
    parameters = dict(model.named_parameters())
    seen = set()
    with torch.no_grad():
        for name in file.tensors:
            target = parameters[hf_name(name)]
            value = file.dequantize(name)
            value = value[rows_to_hf(name, value.shape[0], model.config)]
            target.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(target.shape))
            seen.add(hf_name(name))
    missing = set(parameters) - seen
    assert not missing, f"not in the GGUF: {missing}"
    return model.eval()


def torch_loss(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """Mean negative log-likelihood of the counted tokens, or choice cross-entropy."""

    def log_probs(tokens: list[int], counted: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        return torch.stack([logits[i - 1, tokens[i]] for i in counted]).mean()

    if not example.choices:
        counted = [i for i, counts in enumerate(example.target_mask) if counts]
        return -log_probs(example.tokens, counted)
    prompt = example.tokens[: example.n_prompt]
    scores = torch.stack(
        [
            log_probs(prompt + list(choice), list(range(len(prompt), len(prompt) + len(choice))))
            for choice in example.choices
        ]
    )
    return -scores.log_softmax(-1)[example.answer]


def directional_derivatives(
    model: torch.nn.Module,
    examples: list[Example],
    tensors: dict[str, NDArray[np.int64]],
    shapes: dict[str, tuple[int, int]],
    noises: list[NDArray[np.float32]],
) -> NDArray[np.float64]:
    """d/dt loss(weights + t * z) at t = 0 for each z in mask order, by backprop.

    Args:
        model: From `torch_model`.
        examples: The loss is the mean over them.
        tensors, shapes: The mask's positions in GGUF coordinates.
        noises: Each (nnz,).
    """
    model.zero_grad()
    for example in examples:
        (torch_loss(model, example) / len(examples)).backward()
    parameters = dict(model.named_parameters())
    gradient = []
    for name, indices in tensors.items():
        n_rows, n_cols = shapes[name]
        grad = parameters[hf_name(name)].grad.double().numpy()
        to_hf = np.argsort(rows_to_hf(name, n_rows, model.config))  # GGUF row -> HF row
        rows, cols = np.divmod(indices, n_cols)
        gradient.append(grad[to_hf[rows], cols])
    flat = np.concatenate(gradient)
    return np.array([flat @ z.astype(np.float64) for z in noises])


def add_delta(
    model: torch.nn.Module,
    tensors: dict[str, NDArray[np.int64]],
    shapes: dict[str, tuple[int, int]],
    theta: NDArray[np.float32],
) -> None:
    """Add theta (mask order, GGUF coordinates) to the model's weights."""
    parameters = dict(model.named_parameters())
    first = 0
    with torch.no_grad():
        for name, indices in tensors.items():
            n_rows, n_cols = shapes[name]
            to_hf = np.argsort(rows_to_hf(name, n_rows, model.config))
            rows, cols = np.divmod(indices, n_cols)
            part = torch.from_numpy(theta[first : first + indices.size].copy())
            parameters[hf_name(name)].index_put_(
                (torch.from_numpy(to_hf[rows]), torch.from_numpy(cols)), part, accumulate=True
            )
            first += indices.size


__all__ = [
    "add_delta",
    "directional_derivatives",
    "fill",
    "hf_name",
    "torch_loss",
    "torch_model",
]
