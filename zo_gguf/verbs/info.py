"""`info`: what a file or run folder holds and where it comes from. `env`: what this machine runs.

Both only read. Every kind of file is told by its content, never by its name.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import zo_gguf
from zo_gguf.config import EnvConfig, InfoConfig, takes
from zo_gguf.config.option import to_dict
from zo_gguf.engine.hardware.amx import amx_is_left_out, amx_problem
from zo_gguf.engine.hardware.backends import (
    cpu_features,
    engine_version,
    gpu_in_words,
    list_devices,
    supports_offload,
)
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import load
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask
from zo_gguf.params.sparse_file import kind_of
from zo_gguf.system import require_file, usable_cores
from zo_gguf.tuning.run import load_options
from zo_gguf.tuning.trajectory import MAGIC as TRAJECTORY_MAGIC
from zo_gguf.tuning.trajectory import OLDER, Trajectory

_LONGEST = 160  # characters of a value that the table shows
_PACKAGES = ("llama-cpp-python", "gguf", "numpy", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Facts:
    """Facts in the order they are shown; a value that is a dict is a group of facts."""

    values: dict[str, Any]

    def render(self, as_json: bool = False) -> str:
        """One JSON object, or aligned lines."""
        if as_json:
            return json.dumps(_snake_case(self.values), allow_nan=False)
        lines = list(_lines(self.values, ""))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines)


def _snake_case(values: dict[str, Any]) -> dict[str, Any]:
    """The same facts under names without spaces."""
    return {
        name.replace(" ", "_"): _snake_case(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }


def _lines(values: dict[str, Any], indent: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            if value:
                yield indent + name, ""
                yield from _lines(value, indent + "  ")
        elif isinstance(value, list):
            for number, item in enumerate(value):  # sentences and commands, which must be whole
                yield indent + name if number == 0 else "", " ".join(str(item).split())
        elif value is not None:
            yield indent + name, _text(value)


def _text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


@takes(InfoConfig)
def info(config: InfoConfig) -> Facts:
    """Describe a GGUF, mask, delta, LoRA, trajectory or run folder.

    Raises:
        ZoError: There is no such file, or it is damaged or of another kind.
    """
    path = Path(config.path)
    if path.is_dir():
        return Facts(_run(path))
    require_file(path, "file")
    with open(path, "rb") as file:
        start = file.read(len(TRAJECTORY_MAGIC))
    n_bytes = path.stat().st_size
    head: dict[str, Any] = {"file": str(path), "size": _size(n_bytes), "bytes": n_bytes}
    if start[:4] == b"GGUF":
        return Facts(head | _gguf(GgufFile(path)))
    if start == TRAJECTORY_MAGIC or start in OLDER:
        return Facts(head | _trajectory(Trajectory.load(path)))
    match kind_of(path):
        case "mask":
            return Facts(head | _mask(Mask.load(path)))
        case "delta":
            return Facts(head | _delta(Delta.load(path)))
    raise ZoError(
        f"{str(path)!r} is no GGUF, mask, delta, trajectory or run folder, or a part of one is "
        "missing; info knows only these."
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.2f} GB"


def _gguf(file: GgufFile) -> dict[str, Any]:
    is_lora = file.metadata("general.type") == "adapter"
    types, sizes = Counter[str](), Counter[str]()
    for tensor in file.tensors.values():
        types[tensor.type.name] += 1
        sizes[tensor.type.name] += tensor.n_bytes
    facts: dict[str, Any] = {
        "kind": "LoRA adapter (GGUF)" if is_lora else "model (GGUF)",
        "name": file.name,
        "architecture": file.architecture,
        "parameters": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        "tensors": {name: f"{n}, {_size(sizes[name])}" for name, n in types.most_common()},
        "tensors sha256": file.sha256(),
    }
    if is_lora:
        ranks = [t.shape[0] for name, t in file.tensors.items() if name.endswith(".lora_a")]
        facts["rank"] = f"{min(ranks)} to {max(ranks)}" if ranks else None
    else:
        facts |= _model_facts(file)
    ours = {key: file.metadata(key) for key in file.header.keys if key.startswith("zo_gguf.")}
    if ours:
        facts["made by zo-gguf"] = {key.removeprefix("zo_gguf."): v for key, v in ours.items()}
    return facts


def _model_facts(file: GgufFile) -> dict[str, Any]:
    def of_architecture(key: str) -> Any:
        return file.metadata(f"{file.architecture}.{key}")

    tokens = file.metadata("tokenizer.ggml.tokens")
    return {
        "layers": of_architecture("block_count"),
        "width": of_architecture("embedding_length"),
        "context": of_architecture("context_length"),
        "tokenizer": file.metadata("tokenizer.ggml.model"),
        "vocabulary": len(tokens) if tokens else None,
        "chat template": "yes" if file.metadata("tokenizer.chat_template") else "no",
        "base model": file.metadata("general.base_model.0.name"),
        "license": file.metadata("general.license"),
    }


def _entries(source: Mask | Delta) -> dict[str, Any]:
    total = sum(n_rows * n_cols for n_rows, n_cols in source.shapes.values())
    delta = source if isinstance(source, Delta) else None
    n_sparse, parts = (delta.n_sparse, delta.parts()) if delta else (source.nnz, [])
    kinds = Counter({"sparse": len(source.tensors)}) + Counter(edit.kind for _, edit, _ in parts)
    return {
        "weights": source.nnz,
        "share of their tensors": f"{n_sparse / total:.4%}" if total else None,
        "tensors": len({*source.tensors, *(name for name, _, _ in parts)}),
        "kinds": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        "base file": source.header.base_name,
        "base sha256": source.header.base_sha256,
        "method": source.header.method,
    }


def _mask(mask: Mask) -> dict[str, Any]:
    ranks = [mask.rank(name) for name in mask.tensors]
    return {
        "kind": "mask",
        **_entries(mask),
        "score": mask.header.score,
        "density": mask.header.density,
        "rank": f"{max(ranks)} at most (an exact LoRA needs it)",
        "residual rms": float(np.sqrt(np.mean(np.square(mask.theta0(), dtype=np.float64)))),
        "calibration": mask.header.calibration,
    }


def _delta(delta: Delta) -> dict[str, Any]:
    return {
        "kind": "delta",
        **_entries(delta),
        "theta rms": float(np.sqrt(np.mean(np.square(delta.theta, dtype=np.float64)))),
        "theta largest": float(np.abs(delta.theta).max()),
        "provenance": delta.header.provenance,
    }


def _trajectory(trajectory: Trajectory) -> dict[str, Any]:
    first = last = None
    for record in trajectory.records():
        first = first or record
        last = record
    return {
        "kind": "trajectory",
        "steps": trajectory.n_records,
        "loss at the first step": first.loss if first else None,
        "loss at the last step": last.loss if last else None,
        "learning rate at the last step": last.lr if last else None,
        "header": trajectory.header,
    }


def _run(path: Path) -> dict[str, Any]:
    config = load_options(path)
    facts: dict[str, Any] = {"folder": str(path), "kind": "run"}
    trajectory = path / "trajectory.bin"
    if trajectory.is_file():
        steps = _trajectory(Trajectory.load(trajectory))
        facts["steps done"] = steps["steps"]
        facts["last training loss"] = steps["loss at the last step"]
    summary = path / "summary.json"
    facts["finished"] = "yes" if summary.is_file() else f"no; zo-gguf tune --resume {path}"
    if summary.is_file():
        facts["summary"] = _json_file(summary)
    for name in ("delta.safetensors", "checkpoints/latest.safetensors"):
        if (path / name).is_file():
            facts[name] = _delta(Delta.load(path / name))
            break
    facts["config"] = to_dict(config)
    return facts


def _json_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ZoError(f"{str(path)!r} is not valid JSON ({error}); delete it.") from error
    return values if isinstance(values, dict) else {"content": values}


# ---- env -----------------------------------------------------------------------------------------


@takes(EnvConfig)
def env(config: EnvConfig) -> Facts:
    """Versions, what llama.cpp can compute on, and whether a GPU will be used."""
    devices = list_devices()
    libzo, kernels, n_usable = _libzo()
    return Facts(
        {
            "zo-gguf": zo_gguf.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cores": f"{usable_cores()} usable of {os.cpu_count()}",
            "packages": {name: _version(name) for name in _PACKAGES},
            "libzo": libzo,
            "llama.cpp CPU code": amx_problem() or _cpu_code(),
            "devices": [
                f"{device.name}: {device.description} ({device.kind}, {_size(device.memory_total)})"
                for device in devices
            ],
            "GPU": gpu_in_words(devices, supports_offload(), kernels, n_usable, engine_version()),
        }
    )


def _cpu_code() -> str:
    left_out = "; code for this CPU's AMX is left out" if amx_is_left_out() else ""
    return cpu_features() + left_out


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libzo() -> tuple[str, str, int]:
    """In words; what its GPU kernels are for; and how many GPUs those can run on."""
    try:
        functions = load(engine_version())
    except (ZoError, OSError) as error:
        return f"does not work: {error}", "", 0
    kernels = functions.zo_gpu_kernels().decode()
    words = f"built for llama-cpp-python {engine_version()}, which is installed"
    words += f", with kernels for {kernels}" if kernels else ", without GPU kernels"
    return words, kernels, functions.zo_gpu_count()
