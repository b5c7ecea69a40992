"""Llama-shaped GGUFs with random quantized weights, and masks for them, of any size.

Blocks are random codes with a scale that gives weights of standard deviation 1/sqrt(columns), so
that activations stay in range. Written matrix by matrix: a 13B file takes little memory to make.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.mask import Mask, MaskHeader

DENSITY = 1e-3
QUANTS = ("Q4_0", "Q4_K_M")
TINY_QUANTS = ("F16", "Q8_0", "Q4_0", "Q4_K_M")  # of tiny-llama, against autograd
_MOST_RANDOM = 1 << 26  # bytes of a matrix that are drawn; then they repeat
Type = gguf.GGMLQuantizationType
# type -> bytes of a block, weights in it, where its f16 scales lie, and those for a spread of 1:
# codes -8..7 of Q4_0 have a standard deviation of 4.6; Q4_K has two 6-bit factors in between, and
# 7.5 times the first scale as the second centres it; Q6_K has codes -32..31 and an 8-bit factor.
_BLOCKS: dict[Type, tuple[int, int, int, list[float]]] = {
    Type.Q4_0: (18, 32, 0, [1 / 4.6]),
    Type.Q4_K: (144, 256, 0, [1 / 258, 7.5 / 258]),
    Type.Q6_K: (210, 256, 208, [1 / 1367]),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama without grouped heads."""

    layers: int
    width: int
    heads: int
    ffn: int
    vocab: int = 32000

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every matrix, by its name in a GGUF."""
        found = {"token_embd": (self.vocab, self.width), "output": (self.vocab, self.width)}
        for layer in range(self.layers):
            for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
                found[f"blk.{layer}.{part}"] = (self.width, self.width)
            found[f"blk.{layer}.ffn_gate"] = found[f"blk.{layer}.ffn_up"] = (self.ffn, self.width)
            found[f"blk.{layer}.ffn_down"] = (self.width, self.ffn)
        return {f"{name}.weight": sizes for name, sizes in found.items()}

    def type_of(self, name: str, quant: str) -> Type:
        """A matrix's type in a file of a quantization, as llama.cpp chooses it, or of one type."""
        if quant != "Q4_K_M":
            return Type[quant]
        parts = name.split(".")
        if parts[0] == "output":
            return Type.Q6_K
        if parts[0] != "blk" or parts[2] not in ("attn_v", "ffn_down"):
            return Type.Q4_K
        layer, eighth = int(parts[1]), self.layers // 8
        better = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        return Type.Q6_K if better else Type.Q4_K


SHAPES = {
    "7B": Shape(layers=32, width=4096, heads=32, ffn=11008),
    "13B": Shape(layers=40, width=5120, heads=40, ffn=13824),
}


def write_model(path: Path, shape: Shape, quant: str, n_ctx: int) -> None:
    """Write a GGUF with random weights and no tokenizer; it appears when it is complete."""
    rng = np.random.default_rng(0)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    norms = [f"blk.{i}.{part}" for i in range(shape.layers) for part in ("attn_norm", "ffn_norm")]
    norms = [f"{name}.weight" for name in [*norms, "output_norm"]]
    matrices = shape.matrices()
    for name, sizes in matrices.items():
        kind = shape.type_of(name, quant)
        stored = _stored_shape(kind, sizes)
        n_bytes = int(np.prod(stored))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, kind)
    ones = np.ones(shape.width, np.float32)
    for name in norms:
        writer.add_tensor_info(name, ones.shape, ones.dtype, ones.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sizes in matrices.items():
        writer.write_tensor_data(random_blocks(rng, shape.type_of(name, quant), sizes))
    for _ in norms:
        writer.write_tensor_data(ones)
    writer.close()
    os.replace(unfinished, path)


def _stored_shape(kind: Type, sizes: tuple[int, int]) -> tuple[int, int]:
    """(rows, bytes of a row)."""
    block_bytes, block_size, _, _ = _BLOCKS[kind]
    return sizes[0], sizes[1] // block_size * block_bytes


def random_blocks(
    rng: np.random.Generator, kind: Type, sizes: tuple[int, int]
) -> NDArray[np.uint8]:
    """A quantized matrix with random codes, uint8 (rows, bytes of a row)."""
    block_bytes, _, offset, scales = _BLOCKS[kind]
    n_bytes = int(np.prod(_stored_shape(kind, sizes)))
    drawn = np.frombuffer(rng.bytes(min(n_bytes, _MOST_RANDOM)), np.uint8)
    blocks = np.resize(drawn, n_bytes).reshape(-1, block_bytes)
    scale = (np.array(scales) / np.sqrt(sizes[1])).astype(np.float16)
    blocks[:, offset : offset + scale.nbytes] = scale.view(np.uint8)
    return blocks.reshape(_stored_shape(kind, sizes))


def open_random(path: Path) -> GgufFile:
    """A file that `write_model` wrote, with its name for a hash: reading gigabytes takes longer."""
    file = GgufFile(path)
    vars(file)["_sha256"] = hashlib.sha256(path.name.encode()).hexdigest()  # as once computed
    return file


def make_mask(gguf_file: GgufFile, kind: str) -> Mask:
    """0.1 % of every matrix in the layers, at random.

    Args:
        gguf_file: The model.
        kind: "lines", on 8 rows and columns of each matrix, as `export` makes masks by default;
            or "uniform", anywhere, which no adapter of low rank holds.
    """
    rng = np.random.default_rng(1)
    tensors, shapes = {}, {}
    for name, info in gguf_file.tensors.items():
        if not name.startswith("blk.") or len(info.shape) != 2:
            continue
        n_rows, n_cols = info.shape
        n = max(1, int(n_rows * n_cols * DENSITY))
        if kind == "lines":
            rows = np.sort(rng.choice(n_rows, 4, replace=False))
            cols = np.sort(rng.choice(n_cols, 4, replace=False))
            along = (rows[:, None] * n_cols + np.arange(n_cols)).ravel()
            down = (np.arange(n_rows)[:, None] * n_cols + cols).ravel()
            candidates = np.union1d(along, down)
        else:  # a few more than needed, for those that come twice
            candidates = np.unique(rng.integers(0, n_rows * n_cols, n + n // 50 + 8))
        chosen = rng.choice(candidates, min(n, candidates.size), replace=False)
        tensors[name], shapes[name] = np.sort(chosen).astype(np.int64), (n_rows, n_cols)
    zeros = {name: np.zeros(indices.size, np.float32) for name, indices in tensors.items()}
    header = MaskHeader(gguf_file.path.name, gguf_file.sha256(), kind, DENSITY)
    return Mask(tensors, zeros, shapes, header)
