"""What a CUDA build needs of the machine, found with Python's standard library alone.

The GPU and its driver, the compiler, and the two libraries that llama.cpp's CUDA backend links. Of
a toolkit in one piece CMake finds them by itself; where they came as Python packages or with the
driver, CMake is told the paths.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OLDEST_TOOLKIT = 12
_SMI = ("/usr/bin/nvidia-smi", "/usr/local/nvidia/bin/nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")
_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
_SYSTEM_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
)


class NoCudaError(Exception):
    """Something that CUDA needs is missing here; the message says what, and the fix."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and where its toolkit lies.

    Attributes:
        nvcc: The compiler.
        root: The toolkit's folder, with bin, include and lib64.
        version: Such as "13.0".
    """

    nvcc: Path
    root: Path
    version: str


def output_of(*command: str) -> str:
    """What a program prints, or "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_smi() -> str | None:
    """Path of nvidia-smi, which comes with the driver."""
    return shutil.which("nvidia-smi") or next((p for p in _SMI if os.path.exists(p)), None)


def find_gpus() -> list[str]:
    """A line for each GPU: name, memory, driver, compute capability.

    Raises:
        NoCudaError: None answers.
    """
    smi = find_smi()
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    lines = output_of(smi, query, "--format=csv,noheader").splitlines() if smi else []
    if not lines:
        why = "nvidia-smi finds none" if smi else "there is no nvidia-smi"
        raise NoCudaError(
            f"No NVIDIA GPU answers here ({why}); run this on a machine with one and its driver."
        )
    return [line.strip() for line in lines]


def find_toolkit() -> Toolkit:
    """The CUDA compiler of $CUDACXX, of $CUDA_HOME, on the PATH, or in the usual places.

    Raises:
        NoCudaError: There is none, or it is too old.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    usual = ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    wanted = [
        os.environ.get("CUDACXX"),
        *(os.path.join(home, "bin", "nvcc") for home in homes if home),
        "nvcc",
        *(os.path.join(home, "bin", "nvcc") for home in [*usual, "/opt/cuda"]),
    ]
    found = next((path for name in wanted if name and (path := shutil.which(name))), None)
    version = re.search(r"release (\d+)\.(\d+)", output_of(found, "--version")) if found else None
    if found is None or version is None:
        raise NoCudaError(
            "nvcc was not found on the PATH, in $CUDA_HOME or in /usr/local/cuda; install NVIDIA's "
            f"CUDA toolkit, {OLDEST_TOOLKIT} or newer, or set CUDACXX to its nvcc."
        )
    if int(version[1]) < OLDEST_TOOLKIT:
        raise NoCudaError(
            f"{found} is of CUDA {version[1]}.{version[2]}; install CUDA {OLDEST_TOOLKIT} or newer "
            "and set CUDACXX to its nvcc."
        )
    return Toolkit(Path(found), toolkit_root(Path(found)), f"{version[1]}.{version[2]}")


def toolkit_root(nvcc: Path) -> Path:
    """The folder above the real nvcc, which what is on the PATH may only be a link or script to."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        top = re.search(r"#\$ (?:TOP|_HERE_)=(\S+)", done.stderr + done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        top = None
    here = Path(top[1]) if top else nvcc.resolve().parent
    root = here if (here / "include").is_dir() else here.parent
    return root.resolve()


def find_sanitizer(toolkit: Toolkit) -> str | None:
    """compute-sanitizer, on the PATH or beside nvcc."""
    names = ["compute-sanitizer", str(toolkit.root / "bin" / "compute-sanitizer")]
    names.append(str(toolkit.root / "compute-sanitizer" / "compute-sanitizer"))
    return next((path for name in names if (path := shutil.which(name))), None)


def cmake_hints(toolkit: Toolkit, packages: Iterable[Path]) -> list[str]:
    """What CMake must be told to find cuBLAS and the driver's library: nothing, in most places.

    Args:
        toolkit: The compiler's.
        packages: Folders of Python packages, where NVIDIA's may hold cuBLAS.

    Raises:
        NoCudaError: There is no cuBLAS.
    """
    return [*_cublas_hints(toolkit, packages), *_driver_hints(toolkit), *_runtime_hints(toolkit)]


def _runtime_hints(toolkit: Toolkit) -> list[str]:
    """Where the loader finds cudart, which not every machine has told it."""
    folders = [toolkit.root / folder for folder in _LIBRARY_FOLDERS]
    found = [str(folder) for folder in folders if (folder / "libcudart.so").exists()]
    return [f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,{folder}" for folder in found[:1]]


def _cublas_hints(toolkit: Toolkit, packages: Iterable[Path]) -> list[str]:
    own = [*(toolkit.root / folder for folder in _LIBRARY_FOLDERS), *map(Path, _SYSTEM_FOLDERS)]
    if any((folder / "libcublas.so").exists() for folder in own):
        return []
    major = toolkit.version.split(".")[0]
    below = [folder for site in packages for folder in sorted(site.glob("nvidia/*/lib"))]
    for folder in [*own, *below]:
        cublas, light = folder / f"libcublas.so.{major}", folder / f"libcublasLt.so.{major}"
        headers = [folder.parent / "include", toolkit.root / "include"]
        header = next((path for path in headers if (path / "cublas_v2.h").is_file()), None)
        if cublas.exists() and header is not None:
            return [
                f"-DCUDA_cublas_LIBRARY={cublas}",
                f"-DCUDA_cublasLt_LIBRARY={light}",
                f"-DCMAKE_CUDA_FLAGS=-isystem={header}",  # after the toolkit's own headers
            ]
    raise NoCudaError(
        f"cuBLAS {major} was found neither in {toolkit.root} nor among the Python packages; "
        "install libcublas-dev of your CUDA toolkit, or pip install nvidia-cublas."
    )


def _driver_hints(toolkit: Toolkit) -> list[str]:
    """libcuda: the toolkit has a stub to link against; else the driver's own does."""
    folders = [toolkit.root / folder for folder in _LIBRARY_FOLDERS]
    if any((folder / "stubs" / "libcuda.so").exists() for folder in folders):
        return []
    for name in ("libcuda.so", "libcuda.so.1"):
        for folder in _SYSTEM_FOLDERS:
            if (found := Path(folder) / name).exists():
                return [f"-DCUDA_cuda_driver_LIBRARY={found}"]
    # Without virtual memory management, ggml calls nothing of the driver's library.
    return ["-DGGML_CUDA_NO_VMM=ON"]
