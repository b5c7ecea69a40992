"""A random Llama in a GGUF of any type, small enough to build in a test, that llama.cpp can run."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.engine.quantize import quantize_blocks
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta, DeltaHeader

N_LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 2, 256, 4, 2, 512
WORDS = [" yes", " no", " red", " green", " blue", " one", " two", "ab", "cd"]
LINEAR = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // HEADS * KV_HEADS, WIDTH),
    "attn_v": (WIDTH // HEADS * KV_HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (FFN, WIDTH),
    "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}
# How far a row's loss may move where nothing but the order of sums differs and weights are F32:
# values of the f16 KV cache that lie between two halves are rounded the other way. Seen: up to
# 1.5e-4, on CPUs with AVX2 and with AVX-512.
CACHE_ROUNDING = 1e-3
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def packed(values: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    """Rows of `kind`, by ggml's own quantizer where it is no float."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        return gguf.quants.quantize(values, kind).view(np.uint8)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    weights = np.ones((values.size // block, block), dtype=np.float32)
    blocks = quantize_blocks(values.reshape(-1, block), kind, weights)
    return blocks.reshape(len(values), -1)


def write_llama(
    path: Path, kind: Type | Callable[[str], Type] = Type.Q4_0, seed: int = 0, **general: str
) -> Path:
    """Write the model; `kind` is the type of every linear weight, or gives it by name.

    Embeddings and output are of the same type where that is a float, so that nothing is rounded to
    8 bits, else Q8_0.
    """
    kind_of = kind if callable(kind) else lambda name: kind
    outer = kind if kind in (Type.F32, Type.F16) else Type.Q8_0
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(N_LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    pieces = [word.replace(" ", "▁") for word in WORDS] + ["▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [float(len(piece)) for piece in pieces])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def weight(name: str, shape: tuple[int, int], kind: Type) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1]))
        if name == "token_embd.weight":
            values *= 16
        writer.add_tensor(name, packed(values, kind), raw_dtype=kind)

    weight("token_embd.weight", (len(tokens), WIDTH), outer)
    for layer in range(N_LAYERS):
        for part, shape in LINEAR.items():
            name = f"blk.{layer}.{part}.weight"
            weight(name, shape, kind_of(name))
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    weight("output.weight", (len(tokens), WIDTH), outer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_delta(
    base: GgufFile,
    *,
    rank: int | None = 6,
    share: float = 0.004,
    scale: float = 0.6,
    seed: int = 0,
    among: str = "blk.",
) -> Delta:
    """A delta on the linear weights whose names begin with `among`.

    Its entries lie on `rank` rows and columns of each.
    """
    rng = np.random.default_rng(seed)
    tensors, thetas, shapes = {}, [], {}
    for name, info in base.tensors.items():
        if name.split(".")[-2] not in LINEAR or not name.startswith(among):
            continue
        n_rows, n_cols = info.shape
        allowed = np.ones((n_rows, n_cols), dtype=bool)
        if rank is not None:
            allowed[:] = False
            allowed[rng.choice(n_rows, rank // 2, replace=False)] = True
            allowed[:, rng.choice(n_cols, rank - rank // 2, replace=False)] = True
        candidates = np.flatnonzero(allowed)
        count = min(len(candidates), max(8, int(share * allowed.size)))
        tensors[name] = np.sort(rng.choice(candidates, count, replace=False)).astype(np.int64)
        thetas.append(rng.normal(0, scale, count).astype(np.float32))
        shapes[name] = (n_rows, n_cols)
    header = DeltaHeader(base.path.name, base.sha256(), provenance={"step": 3, "seed": seed})
    return Delta(tensors, shapes, np.concatenate(thetas), header)


def key_bytes(file: GgufFile, key: str) -> bytes:
    entry = file.header.keys[key]
    return file.data[entry.key_start : entry.end].tobytes()
