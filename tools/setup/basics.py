"""What every part of the set-up needs: where things are, pinned versions, messages, digests."""

from __future__ import annotations  # so that an old Python gets as far as being told

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
ENGINE = "llama-cpp-python"


class SetupError(Exception):
    """A step of the set-up failed; the message says which and what to do.

    Attributes:
        is_known: Whether the cause was recognized, so that another way will hardly work either.
    """

    def __init__(self, message: str, is_known: bool = True) -> None:
        super().__init__(message)
        self.is_known = is_known


def say(message: str) -> None:
    """A message for people, beside what programs print."""
    print(f"dev.py: {message}", file=sys.stderr, flush=True)


def pinned(package: str) -> str:
    """The line of the constraints file for `package`, such as "torch==2.13.0".

    Raises:
        SetupError: There is none.
    """
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.split("==")[0].lower().replace("_", "-") == package:
            return line
    raise SetupError(f"{CONSTRAINTS} has no line for {package}; add the version to use.")


def requirements(extras: Iterable[str]) -> list[str]:
    """What pyproject.toml asks for with these extras, llama-cpp-python excepted."""
    import tomllib  # not in a Python that is too old

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return [line for line in wanted if not line.startswith(ENGINE)]


def native_sources() -> list[Path]:
    """Everything that libzo is built from."""
    files = sorted(file for file in (ROOT / "native").rglob("*") if file.is_file())
    return [ROOT / "CMakeLists.txt", *files]


def digest(files: Iterable[Path], *more: str) -> str:
    """SHA-256 over the names and contents of `files` and over `more`."""
    sha = hashlib.sha256("\0".join(more).encode())
    for file in files:
        sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def cache_folder() -> Path:
    """Where zo_gguf and the set-up keep what is expensive to get: see zo_gguf/masks/convert.py."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zo-gguf"
