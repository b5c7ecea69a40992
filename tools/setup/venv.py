"""A virtual environment of ours: how it is made, its pip, and stamps that say what is done."""

from __future__ import annotations  # so that an old Python gets as far as being told

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.setup.basics import CONSTRAINTS, SetupError, say

HINTS = {  # what pip, CMake or a compiler says -> what to do about it
    r"No space left on device|Errno 28": "Free some disk space (4 GB are enough), run this again.",
    r"No CMAKE_C(XX)?_COMPILER could be found": "Install a C and a C++ compiler.",
    r"Could not find a version": "Check that pip can reach its package index or mirror.",
    r"name resolution|unreachable|Connection refused": "Check the network; pip is offline.",
    r"Read timed out": "The download stalled: run this again, or set PIP_DEFAULT_TIMEOUT=180.",
    r"Killed signal terminated program|out of memory|memory exhausted": "Compiling ran out of "
    "memory: set CMAKE_BUILD_PARALLEL_LEVEL=1 and run this again.",
}


@dataclass(frozen=True)
class Venv:
    """A virtual environment.

    Attributes:
        folder: Where it is or will be.
    """

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def runs(self) -> bool:
        """Whether it is there and of the Python that runs this."""
        if not self.python.exists():
            return False
        command = [str(self.python), "-c", "import sys; print(sys.version)"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode == 0 and done.stdout.strip() == sys.version

    def make(self, *options: str) -> None:
        """Make it where it is missing or works no more; `options` go to Python's venv.

        Raises:
            SetupError: Python cannot make one.
        """
        if self.runs():
            return
        if self.folder.exists():
            say(f"{self.folder.name} does not work any more; making it anew")
            shutil.rmtree(self.folder)
        say(f"making {self.folder}")
        command = [sys.executable, "-m", "venv", *options, str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SetupError(
                f"Python could not make a virtual environment:\n{done.stdout}{done.stderr}\n"
                "On Debian and Ubuntu, install python3-venv first."
            )

    def environment(self) -> dict[str, str]:
        """Environment of programs that are to find this environment's programs first."""
        path = f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return dict(os.environ, PATH=path)

    def install(
        self, what: str, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        """Install with the pinned versions; see `pip`."""
        options = ["install", "--constraint", str(CONSTRAINTS)]
        self.pip(what, *options, *arguments, environment=environment)

    def pip(self, what: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """Run its pip.

        Args:
            what: For people; its first word names the log.
            arguments: After `pip`.
            environment: Changes of the environment.

        Raises:
            SetupError: pip failed; with the lines of its log that matter.
        """
        say(f"installing {what} ...")
        started = time.monotonic()
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        log = self.folder / f"zo-{what.split()[0].strip(',')}.log"
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self.environment() | (environment or {}),
                check=False,
            )
        if done.returncode:
            raise explain(what, log)
        say(f"  {what.split(' (')[0]}: done in {time.monotonic() - started:.0f} s")

    def read_stamp(self, name: str) -> str | None:
        """What `write_stamp` wrote, if anything."""
        file = self.folder / "zo-stamps" / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def write_stamp(self, name: str, value: str) -> None:
        """Remember that a part is done, for these inputs."""
        file = self.folder / "zo-stamps" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(value, encoding="utf-8")


def explain(what: str, log: Path) -> SetupError:
    """The error to raise after a failure: the lines of the log that matter, and what to do."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
    hints = [hint for sign, hint in HINTS.items() if re.search(sign, text)]
    shown = "\n".join(f"  {line.strip()[:300]}" for line in lines[-12:])
    advice = hints[0] if hints else "Fix the cause and run the same command again."
    message = f"installing {what} failed:\n{shown}\n{advice}\nThe whole log: {log}"
    return SetupError(message, is_known=bool(hints))
