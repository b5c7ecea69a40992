"""A repository and a virtual environment for tools/dev.py in which pip only takes notes."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools import dev
from tools.gpu import build, run
from tools.setup import basics
from tools.setup.venv import Venv

FILES = ("pyproject.toml", "CMakeLists.txt", "tools/constraints.txt")


@dataclass(frozen=True)
class NotingVenv(Venv):
    """Installs nothing.

    Attributes:
        calls: What pip was called with.
        environments: What it was to change in the environment, by call.
        fails: Words of calls that fail.
    """

    calls: list[list[str]] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)

    @property
    def python(self) -> Path:
        """The Python that runs the tests."""
        return Path(sys.executable)

    def make(self, *options: str) -> None:
        """Only the folder."""
        self.folder.mkdir(exist_ok=True)

    def runs(self) -> bool:
        """Whether the folder is there."""
        return self.folder.is_dir()

    def pip(self, what: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """Note the call."""
        self.calls.append([*arguments])
        self.environments.append(environment or {})
        if self.fails & {what, *arguments}:
            raise basics.SetupError(f"{what}: no network")


def use_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a repository of a few files, and have all tools take it for theirs."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((basics.ROOT / name).read_bytes())
    (folder / "native").mkdir()
    (folder / "native" / "a.cu").write_text("int a;\n")
    for module in (basics, dev, run):
        monkeypatch.setattr(module, "ROOT", folder)
    for module in (basics, dev):
        monkeypatch.setattr(module, "CONSTRAINTS", folder / "tools" / "constraints.txt")
    monkeypatch.setattr(dev, "VENV", NotingVenv(folder / ".venv"))
    monkeypatch.setattr(build, "VENV", NotingVenv(folder / ".venv-gpu"))
    monkeypatch.setattr(build, "KIT", folder / "gpu-kit")
