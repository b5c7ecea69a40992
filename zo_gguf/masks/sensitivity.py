"""Scores of weights from gradients on calibration text, by torch on the Hugging Face model.

A score is the square of the gradient accumulated over all text, as in SensZOQ (2406.02913). Only a
chunk of layers has gradients at a time, each summed up in f32 and freed as soon as backprop has
made it. GGUF is not known here.
"""

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from zo_gguf.errors import DoesNotFitError, ZoError
from zo_gguf.masks.convert import weight_bytes

_GIB = 1 << 30
_HEADROOM = 2 * _GIB  # activations, logits and the largest single gradient


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        ZoError: There is none, or it needs a package that is missing.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises nearly anything here
        raise ZoError(
            f"The tokenizer in {str(folder)!r} cannot be read: {_line(error)}."
        ) from error


def load_model(folder: Path, n_threads: int | None = None) -> Any:
    """The model in its own dtype, on the GPU where torch has one with room for it.

    F16 models are computed in F32 or, short of memory, in BF16: gradients leave F16's range. So are
    BF16 models, on a CPU that has no products in BF16.

    Args:
        folder: Hugging Face model folder.
        n_threads: CPU threads for torch; its own choice when None.

    Raises:
        ZoError: The folder holds no causal language model that transformers knows.
        DoesNotFitError: The weights exceed the free memory.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    n_bytes = weight_bytes(folder)
    free = psutil.virtual_memory().available
    try:
        config = AutoConfig.from_pretrained(folder)
        dtype, n_bytes = _computed_dtype(config.dtype, n_bytes, free)
        if n_bytes > free:
            raise DoesNotFitError(
                f"The weights of {str(folder)!r} take {n_bytes / _GIB:.1f} GiB of memory, but only "
                f"{free / _GIB:.1f} GiB are free."
            )
        model = _model_class(config).from_pretrained(folder, dtype=dtype or "auto")
    except ZoError:
        raise
    except Exception as error:  # transformers raises nearly anything here
        raise ZoError(f"The model in {str(folder)!r} cannot be read: {_line(error)}.") from error
    return prepare_model(model, n_bytes)


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies in BF16 and torch lets it.

    Where it does not, a backward pass takes 5 (AVX-512) to 60 (AVX2) times as long as in F32.
    """
    # Of x86, the second question is also answered by CPUs for which oneDNN emulates the products.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, name, bool)() for name in asked)
    library = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    return bool(library()) and (native or platform.machine().lower() not in ("x86_64", "amd64"))


def _computed_dtype(dtype: Any, n_bytes: int, free: int) -> tuple[Any, int]:
    """What a model of some dtype is computed in, and how many bytes its weights take then."""
    is_slow = not has_bfloat16_products()
    stays = dtype == torch.bfloat16 and (_fits_gpu(n_bytes) or not is_slow)
    if stays or dtype not in (torch.float16, torch.bfloat16):
        return dtype, n_bytes
    if 2 * n_bytes + _HEADROOM < free:
        return torch.float32, 2 * n_bytes
    if is_slow:
        print(
            "This CPU has no products in BF16, so gradients take 5 to 60 times as long as in F32. "
            f"For F32, {(2 * n_bytes + _HEADROOM) / _GIB:.1f} GiB of memory must be free, but "
            f"{free / _GIB:.1f} GiB are; close other programs.",
            file=sys.stderr,
        )
    return torch.bfloat16, n_bytes


def _fits_gpu(n_bytes: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > n_bytes + _HEADROOM


def _model_class(config: Any) -> Any:
    """What reads a model: those that see images as well are no plain language models."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def prepare_model(model: Any, n_bytes: int) -> Any:
    """Switch off dropout and gradients; move to the GPU where torch has one with room for it."""
    model.eval().requires_grad_(False)
    if _fits_gpu(n_bytes):
        model.to("cuda")
    return model


def embedding_rows(model: Any) -> int:
    """How many tokens a model has embeddings of."""
    return int(model.get_input_embeddings().weight.shape[0])


def parameter_values(parameter: Tensor) -> NDArray[np.float32]:
    """A parameter's values as f32 on the CPU."""
    values: NDArray[np.float32] = parameter.detach().float().cpu().numpy()
    return values


def gradient_scores(
    model: Any,
    layers: Sequence[Sequence[str]],
    blocks: Sequence[NDArray[np.int64]],
    *,
    chunk_layers: int | None = None,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Score weights by their gradients of the language-modelling loss.

    Args:
        model: Causal language model whose parameters require no gradients.
        layers: Parameter names to score, grouped by layer, in the model's order.
        blocks: Token ids, (n_tokens,) each.
        chunk_layers: Layers that have gradients at once; from free memory when None.

    Yields:
        Name and scores, f32 of the parameter's shape, as each chunk is done.

    Raises:
        ZoError: A loss or gradient is not finite.
        DoesNotFitError: The memory does not even hold one layer's gradients.
    """
    step = chunk_layers or _fitting_layers(model, layers)
    chunks = [list(chain(*layers[i : i + step])) for i in range(0, len(layers), step)]
    # The upper chunks first: their backward passes are the shortest, so an error shows early.
    with tqdm(
        total=len(chunks) * len(blocks), desc="gradients", unit="block", disable=None, leave=False
    ) as bar:
        for chunk in reversed(chunks):
            sums = _accumulate(model, chunk, blocks, bar)
            for name in chunk:
                score = parameter_values(sums.pop(name).div_(len(blocks)).square_())
                if not np.isfinite(score).all():
                    raise ZoError(
                        f"The gradient of {name!r} is not finite; check the model and the "
                        "calibration text."
                    )
                yield name, score


def _accumulate(
    model: Any, names: Sequence[str], blocks: Sequence[NDArray[np.int64]], bar: Any
) -> dict[str, Tensor]:
    """Sum gradients of the named parameters over all blocks, in f32."""
    parameters = {name: model.get_parameter(name) for name in names}
    offload = _is_short(model)
    sums: dict[str, Tensor] = {}

    def collect(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        sums[name].add_(gradient.float())

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            sums[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            hook = parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: collect(name, parameter)
            )
            stack.callback(hook.remove)
        for block in blocks:
            _backward(model, block, offload)
            bar.update()
    return sums


def _backward(model: Any, block: NDArray[np.int64], offload: bool) -> None:
    tokens = torch.from_numpy(block)[None].to(model.device)  # (1, n_tokens)
    try:
        with _activations_in_ram(model) if offload else nullcontext():
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]  # (n - 1, n_vocab)
            loss = cross_entropy(logits.float(), tokens[0, 1:])
        if not torch.isfinite(loss):
            raise ZoError("The loss on the calibration text is not finite; check the model.")
        loss.backward()  # type: ignore[no-untyped-call]
    except torch.cuda.OutOfMemoryError as error:
        raise DoesNotFitError(
            "The GPU's memory does not hold the gradients; lower --chunk-layers or --block-size, "
            "or hide the GPU with CUDA_VISIBLE_DEVICES= to compute on the CPU."
        ) from error


def _is_short(model: Any) -> bool:
    """Whether activations had better not stay on the GPU: a block's take up to half the weights."""
    if model.device.type != "cuda":
        return False
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return bool(torch.cuda.mem_get_info()[0] < weights / 2)


def _activations_in_ram(model: Any) -> AbstractContextManager[None]:
    """Keep what the forward pass saves for backprop in host memory, except the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(saved: Tensor) -> Tensor:
        stays = saved.untyped_storage().data_ptr() in weights
        return saved if stays else saved.to("cpu", copy=True)

    context: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
        pack, lambda saved: saved.to(model.device)
    )
    return context


def _fitting_layers(model: Any, layers: Sequence[Sequence[str]]) -> int:
    """How many layers' f32 sums fit into the free memory beside one block's activations."""
    largest = max(4 * sum(model.get_parameter(name).numel() for name in layer) for layer in layers)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available
    # Half of the rest: the scores of finished matrices and the page cache want some, too.
    fitting = int(max(free - _HEADROOM, 0) / 2 // largest)
    if fitting < 1 and free < largest + _HEADROOM / 2:
        raise DoesNotFitError(
            f"One layer's gradients take {largest / _GIB:.1f} GiB, but only {free / _GIB:.1f} GiB "
            "are free; mask fewer matrices with --include, or close other programs."
        )
    return min(max(fitting, 1), len(layers))


def _line(error: Exception) -> str:
    """The first line of an error's text, short enough for one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(" .:")
