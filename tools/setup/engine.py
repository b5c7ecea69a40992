"""llama-cpp-python for a virtual environment: compiled once per machine, and kept.

What is compiled is the pinned release as it is, without the parts that nothing here uses, and by
engine.cmake in less time; where that does not work, with its own settings. pip's cache is read and
never written: other projects may want those parts.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.setup.basics import ENGINE, SetupError, cache_folder, digest, pinned, say
from tools.setup.venv import Venv

SETTINGS = Path(__file__).with_suffix(".cmake")
_CPU_INFO = Path("/proc/cpuinfo")
_LIBRARIES = "llama_cpp/lib/"  # in a wheel

# Run on a wheel's libllama alone, before anything that llama_cpp imports is there.
_ASK = """
import ctypes, sys
ask = ctypes.CDLL(sys.argv[1]).llama_print_system_info
ask.restype = ctypes.c_char_p
print(ask().decode())
"""


def wheel(venv: Venv) -> Path:
    """The wheel to install: one compiled before that runs here, or one compiled now.

    Raises:
        SetupError: It does not compile.
    """
    folder = cache_folder() / "engine" / recipe()[:16]
    for known in [*folder.glob("*.whl"), *_cached_by_pip(venv)]:
        if runs(known):
            say(f"{ENGINE}: {known} was compiled before")
            return known
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new.") as scratch:
        made = compile_wheel(venv, source_archive(venv), Path(scratch))
        if not runs(made):
            raise SetupError(f"{ENGINE} was compiled, but does not run here; see {SETTINGS}.")
        return made.replace(folder / made.name)


def compile_wheel(venv: Venv, source: Path, folder: Path) -> Path:
    """Compile into a folder, in the quick way or, where that fails, as llama-cpp-python does."""
    what = f"{ENGINE} (compiled once, some minutes)"
    options = ["wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    options += ["--wheel-dir", str(folder), str(source)]
    try:
        venv.pip(what, *options, environment=compiler_flags() | {"CMAKE_ARGS": quick_settings()})
    except SetupError as error:
        if error.is_known:
            raise
        say(f"{error}\nThat was the quick way; compiling {ENGINE} as it comes")
        venv.pip(what, *options, environment=compiler_flags())
    (made,) = folder.glob("*.whl")
    return made


def quick_settings() -> str:
    """$CMAKE_ARGS for a build without what nobody needs here; the user's come last and win."""
    settings = f"-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE={SETTINGS.as_posix()}"
    return f"{settings} {os.environ.get('CMAKE_ARGS', '')}".strip()


def source_archive(venv: Venv) -> Path:
    """llama-cpp-python's sources; where they are kept, `zo-gguf export` finds its converter."""
    archive = cache_folder() / f"{_file_name()}.tar.gz"
    if archive.is_file():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".fetch.") as scratch:
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ENGINE, "--dest", scratch]
        venv.pip(f"sources of {ENGINE}", "download", *options, pinned(ENGINE))
        os.replace(Path(scratch, archive.name), archive)
    return archive


def compiler_flags() -> dict[str, str]:
    """Environment that leaves llama.cpp's AMX code out; zo_gguf/engine/hardware/amx.py says why."""
    if not has_amx():
        return {}
    names = ("CFLAGS", "CXXFLAGS")
    return {name: f"{os.environ.get(name, '')} -mno-amx-int8".strip() for name in names}


def has_amx() -> bool:
    """Whether this machine's CPU has AMX; only Linux says."""
    return " amx_int8" in cpu_flags()


def cpu_flags() -> str:
    """What the CPU can do, in Linux's words; empty elsewhere."""
    if not _CPU_INFO.is_file():
        return ""
    lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def recipe() -> str:
    """SHA-256 over everything that a compiled engine depends on."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or ""
    version = ""
    if compiler:
        done = subprocess.run(
            [*compiler.split(), "--version"], capture_output=True, text=True, check=False
        )
        version = done.stdout
    given = [os.environ.get(name, "") for name in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS", "CC", "CXX")]
    machine = [platform.platform(), platform.machine(), cpu_flags()]
    return digest([SETTINGS], pinned(ENGINE), version, *given, *machine, str(compiler_flags()))


def runs(file: Path) -> bool:
    """Whether a wheel's libllama loads on this CPU and has no code for AMX where the CPU does."""
    names = {"win32": "llama.dll", "darwin": "libllama.dylib"}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with zipfile.ZipFile(file) as archive:
                inside = [name for name in archive.namelist() if name.startswith(_LIBRARIES)]
                archive.extractall(scratch, inside)
        except (OSError, zipfile.BadZipFile):
            return False
        library = Path(scratch, _LIBRARIES, names.get(sys.platform, "libllama.so"))
        command = [sys.executable, "-c", _ASK, str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and not (has_amx() and "AMX_INT8 = 1" in done.stdout)


def _cached_by_pip(venv: Venv) -> list[Path]:
    """Wheels of the pinned release in pip's cache."""
    if os.environ.get("CMAKE_ARGS"):  # for which those were not compiled
        return []
    command = [str(venv.python), "-m", "pip", "cache", "list", "--format=abspath", _file_name()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [Path(line) for line in done.stdout.splitlines() if line.endswith(".whl")]


def _file_name() -> str:
    return ENGINE.replace("-", "_") + "-" + pinned(ENGINE).split("==")[1]
