"""Every method's weights written out in float64 torch, from the GGUF's dequantized tensors.

Used by test_method_reference and test_fidelity, beside the formulas in estimator_formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from torch.func import functional_call

from tests.helpers import reference
from tests.helpers.models import Converted
from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.quantize import quantize
from zo_gguf.gguf_files.file import GgufFile, dequantize_rows
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import Gain, Live
from zo_gguf.params.mask import Mask, MaskHeader

RANK = 4
# Bytes of a block at which ggml-common.h has the f16 scale, and then the f16 minimum.
SCALE_BYTES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2)}


class Reference:
    """A Llama in float64, and what the methods make of its weights, by GGUF name."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._file = GgufFile(model)
        self._model = reference.torch_model(folder, model).double().requires_grad_(False)
        self.base = {n: torch.tensor(self._file.dequantize(n)).double() for n in self._file.tensors}

    def weights(self, delta: Delta, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights that `theta`, (nnz,), changes."""
        result = {}
        for name, edit, part in delta.parts():
            own, weight = theta[part], result.get(name, self.base[name])
            if isinstance(edit, Gain):
                result[name] = weight * (1 + own)
            elif isinstance(edit, Live) and edit.kind == "weight":
                result[name] = own.reshape(weight.shape)
            elif isinstance(edit, Live):
                result[name] = (self._scaled if edit.relative else self._with_scales)(name, own)
            elif edit.kind == "lora":  # W + (alpha / r) B A with alpha = 2 r; B lies transposed
                n_rows, n_cols = weight.shape
                a, b = own.split([RANK * n_cols, RANK * n_rows])
                result[name] = weight + 2 * b.reshape(RANK, n_rows).T @ a.reshape(RANK, n_cols)
            else:  # W + sqrt(m n) / r U Z V^T for one U, Z and V after the other
                left, right = torch.tensor(edit.left).double(), torch.tensor(edit.right).double()
                for u, z, v in zip(left, own.reshape(-1, RANK, RANK), right, strict=True):
                    weight = weight + weight.numel() ** 0.5 / RANK * u.T @ z @ v
                result[name] = weight
        for name, part in delta.slices().items():
            weight, places = result.get(name, self.base[name]), torch.tensor(delta.tensors[name])
            flat = weight.flatten().index_add(0, places, theta[part])
            result[name] = flat.reshape(weight.shape)
        return result

    def _scaled(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        """d (1 + t) q, or d (1 + t) s q - d_min (1 + t') m where the type has minima."""
        kind, raw = self._file.tensors[name].type, self._file.raw(name)
        places, (size, n_bytes) = SCALE_BYTES[kind.name], GGML_QUANT_SIZES[kind]
        total = torch.zeros(raw.size // n_bytes, size, dtype=torch.float64)
        for kept, factor in zip(places, 1 + theta.reshape(-1, len(places)).T, strict=True):
            blocks = raw.reshape(-1, n_bytes).copy()
            for other in set(places) - {kept}:
                blocks[:, other : other + 2] = 0
            values = dequantize_rows(blocks.reshape(raw.shape), kind)
            total = total + torch.tensor(values).double().reshape(-1, size) * factor[:, None]
        return total.reshape(self.base[name].shape)

    def _with_scales(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """s q for a Q8_0 tensor."""
        codes = self._file.raw(name).reshape(-1, 34)[:, 2:].view(np.int8)
        return (torch.tensor(codes) * scales[:, None]).reshape(self.base[name].shape)

    def losses(self, delta: Delta, theta: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
        """Mean negative log-likelihood of the tokens after the first of every row, (n_rows,)."""
        return torch.stack([tokens.mean() for tokens in self.tokens(delta, theta, rows)])

    def tokens(
        self, delta: Delta, theta: torch.Tensor, rows: Sequence[Example]
    ) -> list[torch.Tensor]:
        """Negative log-likelihoods of the tokens after the first of every row."""
        weights = self.base | self.weights(delta, theta)
        order = {n: reference.rows_to_hf(n, len(w), self._model.config) for n, w in weights.items()}
        named = {reference.hf_name(n): w[order[n]] for n, w in weights.items()}
        width = max(len(row.tokens) for row in rows)
        tokens = torch.tensor([row.tokens + [-1] * (width - len(row.tokens)) for row in rows])
        logits = functional_call(self._model, named, (tokens.clamp(0),)).logits
        logs = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None].clamp(0))[..., 0]
        return [-row[token >= 0] for row, token in zip(logs, tokens[:, 1:], strict=True)]

    def choices(
        self, delta: Delta, theta: torch.Tensor, rows: Sequence[Example]
    ) -> list[torch.Tensor]:
        """Probabilities of every row's choices, the right one at 0."""
        order = [[row.answer, *(set(range(len(row.choices))) - {row.answer})] for row in rows]
        every = [row.choices[i] for row, places in zip(rows, order, strict=True) for i in places]
        prompts = [row.tokens[: row.n_prompt] for row in rows for _ in row.choices]
        whole = [
            Example([*prompt, *choice], [True] * (len(prompt) + len(choice)))
            for prompt, choice in zip(prompts, every, strict=True)
        ]
        found = zip(self.tokens(delta, theta, whole), every, strict=True)
        means = torch.stack([-tokens[-len(choice) :].mean() for tokens, choice in found])
        return [scores.softmax(0) for scores in means.split([len(row.choices) for row in rows])]


@dataclass(frozen=True)
class Base:
    """A random Llama: its GGUF, a mask for it whose residuals are not 0, and the reference."""

    model: Path
    mask: Path
    own: Reference

    def config(self, method: str, **options: Any) -> TuneConfig:
        files = {"model": str(self.model), "data": "none", "output": "none"}
        files["mask"] = str(self.mask) if "sensitive" in method else ""
        if {"subspace", "lora"} & set(method.split("+")):
            options = {"rank": RANK} | options
        return TuneConfig(**files | {"method": method, "threads": 1, "estimator": "spsa"} | options)


def make_base(converted: Converted, quant: str, folder: Path, nnz: int) -> Base:
    """A quantization in `folder`, with `nnz` trainable entries in every matrix of its blocks."""
    model, mask = folder / f"{quant}.gguf", folder / f"{quant}.mask"
    quantize(converted.gguf, model, quant, 1)
    file, rng = GgufFile(model), np.random.default_rng(0)
    shapes = {n: t.shape for n, t in file.tensors.items() if n[:4] == "blk." and t.shape[1:]}
    places = {n: np.sort(rng.permutation(np.prod(s))[:nnz]) for n, s in shapes.items()}
    values = {n: rng.normal(0, 0.02, nnz).astype(np.float32) for n in shapes}
    header = MaskHeader(model.name, file.sha256(), "random", 0.01)
    Mask(places, values, shapes, header).save(mask)
    return Base(model, mask, Reference(converted.folder, model))
