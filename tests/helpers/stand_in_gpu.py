"""libzo with its GPU kernels compiled for the CPU: what a test can say of them without a GPU.

`emulator/gpu_stand_in.h` takes the place of CUDA's runtime. It shows wrong indices, sums, branches
and barriers; races between threads and a device's own memory it cannot show.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import llama_cpp

ROOT = Path(__file__).resolve().parents[2]
NATIVE, EMULATOR = ROOT / "native", ROOT / "tests" / "native" / "emulator"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build(cache: Path) -> Path:
    """The library in `cache`, compiled anew when a source has changed."""
    sources = sorted(
        file for place in (NATIVE, EMULATOR) for file in place.rglob("*") if file.is_file()
    )
    engine = version("llama_cpp_python")
    sha = hashlib.sha256(" ".join([engine, *FLAGS]).encode())
    for source in sources:
        sha.update(source.name.encode() + source.read_bytes())
    library = cache / f"stand-in-{sha.hexdigest()[:16]}" / "libzo.so"
    if not library.is_file():
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "libzo.so"
            compile_to(made, [source for source in sources if source.suffix in (".cpp", ".cu")])
            for old in cache.glob("stand-in-*"):
                shutil.rmtree(old, ignore_errors=True)
            library.parent.mkdir(exist_ok=True)
            os.replace(made, library)
    return library


def compile_to(library: Path, sources: list[Path]) -> None:
    """Compile and link; warnings are errors."""
    package = Path(llama_cpp.__file__).parent
    defines = {
        "ZO_GPU": "1",
        "ZO_GPU_STAND_IN": "1",
        "ZO_GPU_BUFFERS": '"CPU"',
        "ZO_GPU_MOST_VALUES": "20000",  # few, so that small models go beyond
        "ZO_ENGINE_VERSION": f'"{version("llama_cpp_python")}"',
    }
    command = [os.environ.get("CXX", "c++"), "-shared", *FLAGS]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    command += [f"-I{NATIVE}", f"-I{EMULATOR}", "-isystem", str(package.parent / "include")]
    command += ["-x", "c++", *map(str, sources), "-x", "none"]
    command += [str(package / "lib" / "libggml-base.so.0"), "-pthread", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
