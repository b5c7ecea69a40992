"""libzo compiled with every C++ compiler of this machine, as CMake does it, warnings being errors.

    python3 tools/dev.py check      runs this among other checks

Without kernels for GPUs. What was built before lies in build/compilers, and is built again only
where a source has changed.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "compilers"
# What Debian and others call them; $CXX may name one more.
NAMES = [
    "g++",
    *(f"g++-{n}" for n in range(11, 17)),
    "clang++",
    *(f"clang++-{n}" for n in range(13, 23)),
]


def find_compilers(names: list[str]) -> dict[str, str]:
    """Name -> path of every compiler that is there; one with several names counts once."""
    found: dict[str, str] = {}
    for name in names:
        path = shutil.which(name)
        if path and os.path.realpath(path) not in map(os.path.realpath, found.values()):
            found[name] = path
    return found


def compile_with(compiler: str, source: Path, folder: Path) -> str:
    """Configure and build the CMake project in `source`.

    Returns:
        What went wrong, "" where nothing did.
    """
    settings = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DPython_EXECUTABLE={sys.executable}"]
    settings += ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", "-DZO_CUDA=OFF", "-DZO_HIP=OFF"]
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder), *settings]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            return done.stdout
    return ""


def main() -> int:
    """Compile with all of them; 1 if one failed, or if there is none."""
    compilers = find_compilers([*NAMES, os.environ.get("CXX", "")])
    failed = not compilers
    for name, path in compilers.items():
        started = time.monotonic()
        problem = compile_with(path, ROOT, FOLDER / Path(name).name)
        took = time.monotonic() - started
        verdict = "failed" if problem else "ok"
        print(f"libzo with {name}, {version(path)}: {verdict} in {took:.0f} s", flush=True)
        if problem:
            print(problem)
            failed = True
    if not compilers:
        print("There is no C++ compiler here; install g++ or clang.")
    return int(failed)


def version(compiler: str) -> str:
    """The first line of what a compiler says of itself."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
