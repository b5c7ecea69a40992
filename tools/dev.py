"""One command per chore, with nothing but Python's standard library to start from.

    python3 tools/dev.py setup            make .venv: everything at pinned versions, libzo built
    python3 tools/dev.py demo             the main job, on a model and data that ship with this
    python3 tools/dev.py test [ARGS]      pytest; ARGS go to it
    python3 tools/dev.py check            ruff, mypy --strict, clang-format, all C++ compilers
    python3 tools/dev.py bench [ARGS]     tools/bench/hook.py; ARGS go to it
    python3 tools/dev.py gpu [STAGE]      all of it on an NVIDIA GPU; see tools/gpu/run.py

Every command sets up first and skips what is already done. Deleting .venv is always safe, and so is
.venv-gpu, which `gpu` uses instead.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # started as a file: Python looks beside it, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.gpu import cuda
from tools.setup import engine, preflight
from tools.setup.basics import (
    CONSTRAINTS,
    ENGINE,
    ROOT,
    SetupError,
    digest,
    native_sources,
    requirements,
    say,
)
from tools.setup.venv import Venv

VENV = Venv(ROOT / ".venv")
EXTRAS = ("export", "dev")
# Installed first, so that llama-cpp-python and libzo are built by pinned tools, in .venv itself.
BUILD_TOOLS = ("pip", "scikit-build-core", "cmake", "ninja")


# --- set-up --------------------------------------------------------------------------------------


def setup() -> None:
    """Bring .venv up to date; does nothing where the stamps say that it is.

    Raises:
        SetupError: A step failed.
    """
    started = time.monotonic()
    packages = digest([ROOT / "pyproject.toml", CONSTRAINTS], sys.version, engine.recipe())
    changes = {"CUDAARCHS": cuda_architectures()}
    library = digest(native_sources(), packages, *changes.values())
    has_packages = VENV.runs() and VENV.read_stamp("packages") == packages
    if has_packages and VENV.read_stamp("libzo") == library:
        return
    if not has_packages:
        preflight.check(ROOT)
        VENV.make()
        install_packages()
        VENV.write_stamp("packages", packages)
    # Editable: edits to zo_gguf/ need no set-up; only a change to the C++ brings us back here.
    options = ["--no-build-isolation", "--no-deps", "--editable", str(ROOT)]
    VENV.install("libzo, compiled, and zo-gguf", *options, environment=changes)
    VENV.write_stamp("libzo", library)
    say(f"set up in {time.monotonic() - started:.0f} s")


def install_packages() -> None:
    """Everything that comes from elsewhere; llama-cpp-python is compiled while pip fetches."""
    VENV.install("build tools", "--upgrade", *BUILD_TOOLS)
    with ThreadPoolExecutor(max_workers=1) as beside:
        # Bytecode is made when a module is first imported: most of torch's never is.
        wanted = ["--no-compile", *requirements(EXTRAS)]
        others = beside.submit(VENV.install, "torch and the other packages", *wanted)
        wheel = engine.wheel(VENV)
        others.result()
    VENV.install(ENGINE, str(wheel))


def cuda_architectures() -> str:
    """$CUDAARCHS for a libzo that only this machine runs: each kind of GPU takes nvcc as long.

    Without a GPU the code is compiled, where there is an nvcc, and never run.
    """
    try:
        cuda.find_gpus()
    except cuda.NoCudaError:
        return os.environ.get("CUDAARCHS", "80-real")
    return os.environ.get("CUDAARCHS", "native")


# --- commands ------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    """Run .venv's Python with `arguments` from the repository's root."""
    return run_program(str(VENV.python), *arguments)


def run_program(program: str, *arguments: str) -> int:
    """Run a program from the repository's root and say how it went."""
    started = time.monotonic()
    try:
        environment = VENV.environment()
        done = subprocess.run([program, *arguments], cwd=ROOT, env=environment, check=False)
    except KeyboardInterrupt:
        return 130
    took = time.monotonic() - started
    verdict = "ok" if done.returncode == 0 else f"failed with exit code {done.returncode}"
    say(f"{' '.join([Path(program).name, *arguments])[:70]}: {verdict} in {took:.1f} s")
    return done.returncode


def check() -> int:
    """Run every check, also after one has failed; return the worst exit code."""
    native = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "native").rglob("*"))
        if is_source(file)
    ]
    return max(
        run("-m", "ruff", "check", "."),
        run("-m", "ruff", "format", "--check", "."),
        run("-m", "mypy", "--strict", "zo_gguf"),
        run_program(str(VENV.python.parent / "clang-format"), "--dry-run", "-Werror", *native),
        run("-m", "tools.compilers"),
    )


def is_source(file: Path) -> bool:
    return file.suffix in {".c", ".cpp", ".cu", ".h"}


def main() -> int:
    """Do what the command line asks for; returns the exit code."""
    command, *rest = sys.argv[1:] or ["help"]
    if command not in COMMANDS:
        print(__doc__)
        return 0 if command in {"help", "-h", "--help"} else 2
    if rest and command in {"setup", "check"}:
        say(f"{command} takes no further arguments, got {' '.join(rest)!r}")
        return 2
    try:
        preflight.check_python()
        if command != "gpu":  # which has an environment of its own
            setup()
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped")
        return 130
    return COMMANDS[command](*rest)


def gpu(*arguments: str) -> int:
    """Everything on an NVIDIA GPU."""
    from tools.gpu import run

    return run.main([*arguments])


COMMANDS: dict[str, Callable[..., int]] = {
    "setup": lambda: 0,
    "demo": lambda *rest: run("tools/demo.py", *rest),
    "test": lambda *rest: run("-m", "pytest", *rest),
    "check": check,
    "bench": lambda *rest: run("-m", "tools.bench.hook", *rest),
    "gpu": gpu,
}


if __name__ == "__main__":
    sys.exit(main())
