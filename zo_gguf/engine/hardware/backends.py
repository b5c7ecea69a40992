"""The devices that the loaded llama.cpp can compute on; in words, whether a GPU will be used."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
from gguf import GGMLQuantizationType as Type

from zo_gguf.engine.model import quiet_engine
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Library

_KINDS = ("CPU", "GPU", "integrated GPU", "accelerator", "several devices")  # ggml_backend_dev_type

# What llama.cpp repacks on x86; of these the K-quants have faster products as they lie in the file.
_FASTER_REPACKED = (Type.Q4_0, Type.IQ4_NL, Type.MXFP4)
_FASTER_PLAIN = (Type.Q2_K, Type.Q4_K)


@dataclass(frozen=True)
class Device:
    """One device of ggml.

    Attributes:
        name: ggml's name, such as "CUDA0".
        description: The hardware's name.
        kind: CPU, GPU, integrated GPU, accelerator.
        memory_total: Bytes; 0 where ggml does not know.
    """

    name: str
    description: str
    kind: str
    memory_total: int

    @property
    def is_gpu(self) -> bool:
        """Whether layers can be offloaded to it."""
        return self.kind in ("GPU", "integrated GPU")


def list_devices() -> list[Device]:
    """All devices, in ggml's order."""
    count = _function("ggml_backend_dev_count", ctypes.c_size_t)
    get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    with quiet_engine():  # backends talk of the devices they find
        llama_cpp.llama_backend_init()
        return [_describe(get(i)) for i in range(count())]


def kernels_run(library: Library) -> bool:
    """Whether libzo has kernels for every GPU that llama.cpp would put layers on."""
    prefix = library.functions.zo_gpu_kernels().decode()
    gpus = [device.name for device in list_devices() if device.is_gpu]
    ours = prefix != "" and gpus != [] and all(name.startswith(prefix) for name in gpus)
    return ours and library.functions.zo_gpu_count() > 0  # only now: it starts the driver


def supports_offload() -> bool:
    """Whether llama.cpp would move layers off the CPU if asked to."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def engine_version() -> str:
    """Version of the llama_cpp package."""
    return str(llama_cpp.__version__)


def cpu_features() -> str:
    """What llama.cpp's CPU code was compiled for, such as "AVX2, FMA"."""
    text = llama_cpp.llama_print_system_info().decode(errors="replace")
    pairs = (part.strip().rpartition(":")[2].partition("=") for part in text.split("|"))
    return ", ".join(name.strip() for name, _, value in pairs if value.strip() == "1")


def repacking_pays(gguf: GgufFile) -> bool:
    """Whether long batches are faster on the CPU if llama.cpp may lay matrices out anew.

    Left to itself it does so where it can, although on x86 its products of K-quants in tiles,
    which take them as they are in the file, are faster. Where that was not measured (AMX, ARM), its
    own choice stands.
    """
    features = cpu_features().split(", ")
    if "AVX2" not in features or "AMX_INT8" in features:
        return True
    sizes = {"repacked": 0, "plain": 0}
    for tensor in gguf.tensors.values():
        sizes["repacked"] += tensor.n_bytes * (tensor.type in _FASTER_REPACKED)
        sizes["plain"] += tensor.n_bytes * (tensor.type in _FASTER_PLAIN)
    return sizes["repacked"] >= sizes["plain"]


def _describe(device: int) -> Device:
    name = _function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description = _function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    kind = _function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)(device)
    pointer = ctypes.POINTER(ctypes.c_size_t)
    memory = _function("ggml_backend_dev_memory", None, ctypes.c_void_p, pointer, pointer)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory(device, ctypes.byref(free), ctypes.byref(total))
    return Device(
        name(device).decode(errors="replace"),
        description(device).decode(errors="replace"),
        _KINDS[kind] if 0 <= kind < len(_KINDS) else "unknown",
        total.value,
    )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    # Through libllama's handle: see ggml_quant.
    return ctypes.CFUNCTYPE(result, *arguments)((name, llama_cpp.llama_cpp._lib))


# ---- in words ------------------------------------------------------------------------------------


_CUDA_ENGINE = (
    "For an NVIDIA GPU, with the CUDA toolkit installed, these two commands:",
    "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps --no-cache-dir "
    "--no-binary llama-cpp-python llama-cpp-python=={version}",
    "pip install --force-reinstall --no-deps zo-gguf",
)
_KERNELS = (
    "Hook, losses and edits in place run on the GPU ({kernels} kernels); logits stay there where "
    "only losses are wanted."
)
_NO_KERNELS = (
    "libzo {why}.",
    "Masks of few rows and columns, lora and subspace go into a LoRA adapter, rewritten per probe.",
    "Other parameters are applied to copies in host memory, which is slow.",
)


def gpu_in_words(
    devices: Sequence[Device], offloads: bool, kernels: str, n_usable: int, version: str
) -> list[str]:
    """What happens with layers on a GPU, and how to get more of it.

    Args:
        devices: llama.cpp's.
        offloads: Whether this build of llama.cpp can move layers to a device at all.
        kernels: What libzo was compiled for: "CUDA", "ROCm" or "".
        n_usable: GPUs that its kernels can run on here.
        version: Of llama-cpp-python.
    """
    gpus = [device for device in devices if device.is_gpu]
    if not offloads:
        cpu_only = "Will not be used: the installed llama-cpp-python was built for the CPU only."
        return [cpu_only, *(line.format(version=version) for line in _CUDA_ENGINE)]
    if not gpus:
        return ["Will not be used: llama-cpp-python was built for GPUs, but llama.cpp finds none."]
    names = " and ".join(gpu.description for gpu in gpus)
    first = f"{names} can be used: --n-gpu-layers -1 puts the whole model there."
    if kernels and all(gpu.name.startswith(kernels) for gpu in gpus):
        if n_usable:
            return [first, _KERNELS.format(kernels=kernels)]
        why = f"has {kernels} kernels, but the driver is older than they need; update it"
        return [first, *(line.format(why=why) for line in _NO_KERNELS)]
    known = next((kind for kind in ("CUDA", "ROCm") if gpus[0].name.startswith(kind)), None)
    lines = [first, *(line.format(why="has no kernels for it") for line in _NO_KERNELS)]
    if known:
        toolkit = f"With the {known} toolkit installed, libzo gets them by itself"
        lines.append(f"{toolkit}: pip install --force-reinstall --no-deps zo-gguf")
    return lines
