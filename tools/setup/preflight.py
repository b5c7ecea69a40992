"""What commonly is missing for a set-up, found in a second instead of after minutes of work."""

from __future__ import annotations  # so that an old Python gets as far as being told

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tools.setup.basics import SetupError

OLDEST_PYTHON = (3, 11)
NEEDED_DISK = 4 << 30  # bytes: 2.5 GB in the end, and what pip unpacks meanwhile
_COMPILERS = {  # environment variable -> what CMake looks for, and a source that must compile
    "CC": (("cc", "gcc", "clang"), ".c", "int main(void) { return 0; }\n"),
    "CXX": (("c++", "g++", "clang++"), ".cpp", "#include <vector>\nint main() {}\n"),
}
_HOW = {
    "linux": "on Debian and Ubuntu `sudo apt install g++`, on Fedora `sudo dnf install gcc-c++`",
    "darwin": "run `xcode-select --install`",
}


def check(folder: Path) -> None:
    """Look for all that is needed to set up in `folder`.

    Raises:
        SetupError: Something is missing; the message says how to get it.
    """
    check_python()
    check_disk(folder)
    if os.name != "nt":  # there, CMake finds MSVC by itself
        check_compilers()


def check_python() -> None:
    """Raise SetupError for a Python that is too old or lacks a part of its standard library."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(str(part) for part in OLDEST_PYTHON)
        raise SetupError(
            f"zo-gguf needs Python {oldest} or newer, this is {sys.version.split()[0]} "
            f"({sys.executable}); start dev.py with a newer one, such as python{oldest}."
        )
    if find_spec("venv") is None or find_spec("ensurepip") is None:  # as on Debian
        raise SetupError(
            "This Python cannot make virtual environments; on Debian and Ubuntu install "
            f"python{sys.version_info[0]}.{sys.version_info[1]}-venv, then run this again."
        )


def check_disk(folder: Path) -> None:
    """Raise SetupError where a folder, or the one for temporary files, is too small or closed."""
    scratch = Path(tempfile.gettempdir())
    for place, needed in ((folder, NEEDED_DISK), (scratch, NEEDED_DISK // 4)):
        try:
            free = shutil.disk_usage(place).free
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise SetupError(f"Nothing can be written to {place}: {error.strerror}.") from error
        if free < needed:
            raise SetupError(
                f"{place} has {free / 1e9:.1f} GB free and the set-up needs {needed / 1e9:.1f}; "
                "make room there" + (" or set TMPDIR." if place is scratch else ".")
            )


def check_compilers() -> None:
    """Raise SetupError unless a C and a C++ compiler compile and link a few lines."""
    for variable, (names, suffix, source) in _COMPILERS.items():
        given = os.environ.get(variable)
        command = shlex.split(given) if given else _first(names)
        language = "C++" if variable == "CXX" else "C"
        how = _HOW.get(sys.platform, "install gcc or clang")
        if not command or shutil.which(command[0]) is None:
            what = f"{variable}={given}" if given else ", ".join(names)
            raise SetupError(f"There is no {language} compiler ({what} not found): {how}.")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, f"main{suffix}")
            file.write_text(source, encoding="utf-8")
            done = subprocess.run(
                [*command, str(file), "-o", str(file.with_suffix(""))],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0][:300]
            raise SetupError(f"{command[0]} does not compile {language} ({reason}): {how}.")


def _first(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if shutil.which(name)][:1]
