"""The devices that the loaded llama.cpp can compute on."""

import ctypes
from dataclasses import dataclass
from typing import Any

import llama_cpp  # noqa: TID251 - only asked what it was built with
from gguf import GGMLQuantizationType as Type

from zo_gguf.engine.model import quiet_engine
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.native import Library

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
