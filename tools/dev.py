"""One command per chore, with nothing but Python's standard library to start from.

    python3 tools/dev.py setup            make .venv: everything at pinned versions, libzo built
    python3 tools/dev.py demo             the main job, on a model and data that ship with this
    python3 tools/dev.py test [ARGS]      pytest; ARGS go to it
    python3 tools/dev.py check            ruff, mypy --strict, clang-format
    python3 tools/dev.py bench [ARGS]     tools/bench/hook.py; ARGS go to it
    python3 tools/dev.py gpu [STAGE]      all of it on an NVIDIA GPU; see tools/gpu/run.py

Every command sets up first and skips what is already done. Deleting .venv is always safe, and so is
.venv-gpu, which `gpu` uses instead.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
STAMPS = VENV / "zo-stamps"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST_PYTHON = (3, 11)

# Installed first, so that llama-cpp-python and libzo are built by pinned tools, in .venv itself.
BUILD_TOOLS = ["pip", "scikit-build-core", "cmake", "ninja"]
ENGINE = "llama-cpp-python"
EXTRAS = "export,dev"

HINTS = {  # what pip or CMake says -> what to do about it
    "No space left on device": "Free some disk space (3 GB are enough) and run this again.",
    "CMAKE_CXX_COMPILER": "Install a C++ compiler (g++ or clang; Xcode or MSVC elsewhere).",
    "Could not find a version": "Check that pip can reach its package index or mirror.",
    "Temporary failure in name resolution": "Check the network; pip is offline.",
    "Read timed out": "The download stalled: run this again, or set PIP_DEFAULT_TIMEOUT=180.",
    "Killed signal terminated program cc1plus": "Compiling ran out of memory: set "
    "CMAKE_BUILD_PARALLEL_LEVEL=1 and run this again.",
}


class SetupError(Exception):
    """A step of the set-up failed; the message says which and what to do."""


# --- set-up --------------------------------------------------------------------------------------


def setup() -> None:
    """Bring .venv up to date; does nothing where the stamps say that it is."""
    started = time.monotonic()
    make_venv()
    pins = [ROOT / "pyproject.toml", CONSTRAINTS]
    packages = digest(pins, sys.version, *engine_environment().values())
    native = sorted(file for file in (ROOT / "native").rglob("*") if file.is_file())
    library = digest([ROOT / "CMakeLists.txt", *native], packages)
    stamped_packages = read_stamp("packages") == packages
    if stamped_packages and read_stamp("libzo") == library:
        return
    if not stamped_packages:
        pip("build tools", "--upgrade", *BUILD_TOOLS)
        install_engine()
        pip("torch and the other packages", *requirements())
        write_stamp("packages", packages)
    # Editable: edits to zo_gguf/ need no set-up; only a change to the C++ brings us back here.
    pip("zo-gguf, libzo compiled", "--no-build-isolation", "--no-deps", "--editable", str(ROOT))
    write_stamp("libzo", library)
    say(f"set up in {time.monotonic() - started:.0f} s")


def install_engine() -> None:
    """Compile llama-cpp-python, or take what pip has compiled before where that runs here."""
    what = f"{ENGINE} (compiled once, some minutes)"
    options = ["--no-build-isolation", pinned(ENGINE)]
    pip(what, *options, environment=engine_environment())
    if uses_amx():  # compiled before, without those flags
        anew = ["--no-cache-dir", "--force-reinstall", "--no-deps"]
        pip(what, *anew, *options, environment=engine_environment())


def engine_environment() -> dict[str, str]:
    """Environment of the compiler of llama.cpp; zo_gguf/engine/amx.py says why."""
    if not has_amx():
        return {}
    names = ("CFLAGS", "CXXFLAGS")
    return {name: f"{os.environ.get(name, '')} -mno-amx-int8".strip() for name in names}


def has_amx() -> bool:
    """Whether this machine's CPU has AMX; only Linux says."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and " amx_int8" in info.read_text(encoding="utf-8", errors="replace")


def uses_amx() -> bool:
    """Whether llama-cpp-python was compiled with code for AMX, and the CPU has AMX."""
    command = "import llama_cpp; print(llama_cpp.llama_print_system_info())"
    done = subprocess.run([str(PYTHON), "-c", command], capture_output=True, text=True, check=False)
    return has_amx() and "AMX_INT8 = 1" in done.stdout


def make_venv() -> None:
    if runs(PYTHON):
        return
    if VENV.exists():
        say(".venv does not work any more; making it anew")
        shutil.rmtree(VENV)
    say(f"making {VENV}")
    command = [sys.executable, "-m", "venv", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(
            f"Python could not make a virtual environment:\n{done.stdout}{done.stderr}\n"
            "On Debian and Ubuntu, install python3-venv first."
        )


def runs(python: Path) -> bool:
    if not python.exists():
        return False
    version = "import sys; print(sys.version)"
    done = subprocess.run([str(python), "-c", version], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == sys.version


def requirements() -> list[str]:
    """What pyproject.toml asks for, with the extras that a developer needs."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in EXTRAS.split(","):
        wanted += project["optional-dependencies"][extra]
    return wanted


def pinned(package: str) -> str:
    """The line of the constraints file for `package`, such as "torch==2.13.0"."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.split("==")[0].lower().replace("_", "-") == package:
            return line
    raise SetupError(f"{CONSTRAINTS} has no line for {package}; add the version to use.")


def pip(what: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """Install with the pinned versions; on failure show the lines of the log that matter."""
    say(f"installing {what} ...")
    started = time.monotonic()
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--constraint", str(CONSTRAINTS), *arguments]
    log = VENV / "zo-setup.log"
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            check=False,
        )
    if done.returncode:
        raise SetupError(explain(what, log))
    say(f"  done in {time.monotonic() - started:.0f} s")


def explain(what: str, log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
    hints = [hint for sign, hint in HINTS.items() if sign in text]
    shown = "\n".join(f"  {line.strip()[:300]}" for line in lines[-12:])
    advice = hints[0] if hints else "Fix the cause and run the same command again."
    return f"installing {what} failed:\n{shown}\n{advice}\nThe whole log: {log}"


# --- stamps --------------------------------------------------------------------------------------


def digest(files: list[Path], *more: str) -> str:
    """SHA-256 over the names and contents of `files` and over `more`."""
    sha = hashlib.sha256("\0".join(more).encode())
    for file in files:
        sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def read_stamp(name: str) -> str | None:
    file = STAMPS / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def write_stamp(name: str, value: str) -> None:
    STAMPS.mkdir(exist_ok=True)
    (STAMPS / name).write_text(value, encoding="utf-8")


# --- commands ------------------------------------------------------------------------------------


def say(message: str) -> None:
    print(f"dev.py: {message}", file=sys.stderr, flush=True)


def run(*arguments: str) -> int:
    """Run .venv's Python with `arguments` from the repository's root."""
    return run_program(str(PYTHON), *arguments)


def run_program(program: str, *arguments: str) -> int:
    environment = dict(os.environ, PATH=f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    started = time.monotonic()
    try:
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
        run_program(str(PYTHON.parent / "clang-format"), "--dry-run", "-Werror", *native),
    )


def is_source(file: Path) -> bool:
    return file.suffix in {".c", ".cpp", ".cu", ".h"}


def main() -> int:
    command, *rest = sys.argv[1:] or ["help"]
    if command not in (*COMMANDS, "gpu"):
        print(__doc__)
        return 0 if command in {"help", "-h", "--help"} else 2
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(str(part) for part in OLDEST_PYTHON)
        say(f"zo-gguf needs Python {oldest} or newer, this is {sys.version.split()[0]}")
        return 2
    if rest and command in {"setup", "check"}:
        say(f"{command} takes no further arguments, got {' '.join(rest)!r}")
        return 2
    if command == "gpu":
        sys.path.insert(0, str(ROOT))
        from tools.gpu import run as gpu

        return gpu.main(rest)
    try:
        setup()
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped")
        return 130
    return COMMANDS[command](*rest)


COMMANDS: dict[str, Callable[..., int]] = {
    "setup": lambda: 0,
    "demo": lambda *rest: run("tools/demo.py", *rest),
    "test": lambda *rest: run("-m", "pytest", *rest),
    "check": check,
    "bench": lambda *rest: run("-m", "tools.bench.hook", *rest),
}


if __name__ == "__main__":
    sys.exit(main())
