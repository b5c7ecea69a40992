"""The same zeroth-order step in PyTorch, on a model of the same shape in bfloat16.

Two kinds. `sparse`: 0.1 % of each matrix's weights are perturbed in place from a seed, and put back
(SensZOQ, arXiv 2406.02913). `mezo`: all weights are (MeZO, arXiv 2305.17333). A step is perturb by
+eps, forward, by -2 eps, forward, back by +eps, update; noise is drawn anew from the seed each
time, as MeZO does to save memory. Forward passes return only the logits that the loss needs.

    python -m tools.gpu.torch_step '{"kind": "sparse", "shape": {...}, ...}'

The last line printed is RESULT and a JSON object.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

Job = dict[str, Any]
_EPS, _LR = 1e-3, 1e-6
_N_COUNTED = 8  # last tokens of each example, as in bench/hook.py
_DENSITY = 1e-3


def measure(job: Job) -> dict[str, Any]:
    """Seconds of a step, and peak memory as torch counts it."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        return {"error": f"{error.name} is not installed; install torch and transformers."}
    cuda = job["device"] == "cuda"
    if cuda and not torch.cuda.is_available():
        return {"error": "This torch sees no CUDA device; install a build with CUDA."}
    shape = job["shape"]
    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["width"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        max_position_embeddings=max(2048, job["tokens"]),
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(job["device"]):
        model = LlamaForCausalLM(config).eval()
        tokens = torch.randint(3, shape["vocab"], (job["examples"], job["tokens"] + 1))
        weights = list(perturbed(model, job["kind"]))
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        seconds = [step(model, weights, tokens, number) for number in range(job["rounds"] + 1)][1:]
    seconds.sort()
    n_entries = sum(weight.numel() if chosen is None else len(chosen) for weight, chosen in weights)
    found: dict[str, Any] = {"seconds": seconds[len(seconds) // 2], "parameters": n_entries}
    if cuda:
        found["allocated"] = torch.cuda.max_memory_allocated()
    return found | {"torch": torch.__version__}


def perturbed(model: Any, kind: str) -> Iterator[tuple[Any, Any]]:
    """Weights as flat vectors, each with the indices that are perturbed, None for all of them."""
    import torch

    for name, parameter in model.named_parameters():
        if kind == "mezo":
            yield parameter.data.view(-1), None
        elif ".layers." in name and parameter.dim() == 2:
            n = max(1, int(parameter.numel() * _DENSITY))
            yield parameter.data.view(-1), torch.randint(parameter.numel(), (n,)).unique()


def step(model: Any, weights: list[tuple[Any, Any]], tokens: Any, seed: int) -> float:
    """Seconds of one step."""
    import torch

    def synchronize() -> None:
        if tokens.is_cuda:
            torch.cuda.synchronize()

    synchronize()
    started = time.perf_counter()
    move(weights, seed, _EPS)
    up = loss(model, tokens)
    move(weights, seed, -2 * _EPS)
    down = loss(model, tokens)
    move(weights, seed, _EPS)
    move(weights, seed, -_LR * (up - down) / (2 * _EPS))
    synchronize()
    return time.perf_counter() - started


def move(weights: list[tuple[Any, Any]], seed: int, scale: float) -> None:
    """Add scale * z(seed) to the weights, in place."""
    import torch

    generator = torch.Generator(weights[0][0].device).manual_seed(seed)
    for weight, chosen in weights:
        size = weight.numel() if chosen is None else len(chosen)
        z = torch.randn(size, generator=generator, dtype=weight.dtype, device=weight.device)
        if chosen is None:
            weight.add_(z, alpha=scale)
        else:
            weight.index_add_(0, chosen, z, alpha=scale)


def loss(model: Any, tokens: Any) -> float:
    """Mean negative log-likelihood of the counted tokens."""
    import torch

    logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=_N_COUNTED).logits.float()
    targets = tokens[:, -_N_COUNTED:].reshape(-1)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets))


def main() -> int:
    """Measure what the one argument describes."""
    import warnings

    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    try:
        result = measure(job)
    except RuntimeError as error:  # torch's, out of memory among them
        result = {"error": str(error).strip().splitlines()[0][:200]}
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
