"""Whether a GPU will be used, and for what, in sentences for `env`."""

from collections.abc import Sequence

from zo_gguf.engine.backends import Device

_CUDA_ENGINE = (
    "For an NVIDIA GPU, with the CUDA toolkit installed, these two commands:",
    "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps --no-binary :all: "
    "llama-cpp-python=={version}",
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
