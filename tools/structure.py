"""The house in numbers: how full its rooms are, what is long, which way imports go.

    .venv/bin/python -m tools.structure            # all of it; the tests hold the limits
    .venv/bin/python -m tools.structure --paths    # and the modules that a row, and theta, pass

The paths are traced: a tiny model is tuned for a step, and the result merged.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "zo_gguf"
MAX_ENTRIES, MAX_LINES, MAX_FUNCTION = 14, 500, 60
# A module may import from its own room and from those before it; `params` and `data` stand beside
# each other.
ORDER = ["errors", "system", "libzo", "config", "gguf_files", "params", "data", "engine", "masks",
         "tuning", "merging", "verbs", "cli", "__main__", "__init__"]  # fmt: skip
BESIDE = {("params", "data"), ("data", "params")}
NOT_COUNTED = {"__init__.py", "__main__.py", "py.typed"}  # what packaging asks for


def tracked() -> list[Path]:
    """The files of the repository, relative to its root."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def entries(files: list[Path]) -> dict[str, int]:
    """Entries of every folder of code; the root, whose files tools demand, is left out."""
    found: dict[str, set[str]] = {}
    for file in files:
        for depth in range(1, len(file.parts)):
            name = file.parts[depth]
            if file.parts[0].startswith(".") or name in NOT_COUNTED:
                continue
            found.setdefault("/".join(file.parts[:depth]), set()).add(name)
    return {folder: len(names) for folder, names in sorted(found.items())}


def lines(files: list[Path]) -> dict[str, int]:
    """Lines of every source file."""
    kinds = {".py", ".cpp", ".cu", ".h"}
    return {
        str(file): len((ROOT / file).read_bytes().splitlines())
        for file in files
        if file.suffix in kinds
    }


def functions(files: list[Path]) -> dict[str, int]:
    """Lines of every Python function."""
    found = {}
    for file in files:
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                found[f"{file}:{node.name}"] = node.end_lineno - node.lineno + 1
    return found


def upward_imports() -> list[str]:
    """Imports from a room that comes later in ORDER."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_bytes())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            package, _, rest = node.module.partition(".")
            other = rest.split(".")[0]
            if package != "zo_gguf" or not other or other == room:
                continue
            if ORDER.index(other) > ORDER.index(room) or (room, other) in BESIDE:
                found.append(f"{file.relative_to(ROOT)} imports {node.module}")
    return found


def lint_exceptions(package: str) -> list[str]:
    """The modules or rooms of zo_gguf in which `package` may be imported."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    excepted = settings["tool"]["ruff"]["lint"]["per-file-ignores"]
    users = []
    for pattern, rules in excepted.items():
        place = PACKAGE.parent / pattern.removesuffix("/**")
        files = place.rglob("*.py") if place.is_dir() else iter([place])
        if "TID251" in rules and pattern.startswith("zo_gguf") and _imports(files, package):
            users.append(pattern)
    return users


def _imports(files: Iterator[Path], package: str) -> bool:
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return package in names


# ---- paths ---------------------------------------------------------------------------------------


def traced(work: Callable[[], Any]) -> list[str]:
    """The modules of zo_gguf of which a function ran while `work` did."""
    seen: set[str] = set()
    prefix = str(PACKAGE) + os.sep

    def look(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and frame.f_code.co_name != "<module>" and file.startswith(prefix):
            seen.add(file.removeprefix(prefix))

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return sorted(seen)


def paths() -> dict[str, list[str]]:
    """Modules that run between a data file and a step, and between a delta and a merged file."""
    from gguf import GGMLQuantizationType as Type

    from tests.helpers.tiny_gguf import WORDS, random_delta, write_llama
    from zo_gguf.config import MergeConfig, TuneConfig
    from zo_gguf.gguf_files.file import GgufFile
    from zo_gguf.verbs.merge import merge
    from zo_gguf.verbs.tune import tune

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_llama(folder / "m.gguf", Type.Q4_0)
        row = json.dumps({"prompt": WORDS[0], "completion": WORDS[1]}) + "\n"
        (folder / "train.jsonl").write_text(row * 8)
        (folder / "valid.jsonl").write_text(row * 2)
        delta = random_delta(GgufFile(model))
        delta.save(folder / "d.safetensors")
        run = TuneConfig(
            model=str(model), data=name, output=f"{name}/run", iters=1, eps=0.01, learning_rate=0.01
        )
        job = MergeConfig(
            run=f"{name}/d.safetensors", model=str(model), data=name, output=f"{name}/merged.gguf"
        )
        return {
            "a row, from its file to a step": traced(lambda: tune(run)),
            "theta, from its delta to a merged file": traced(lambda: merge(job)),
        }


# ---- what is printed -----------------------------------------------------------------------------


def largest(sizes: dict[str, int], n: int = 3) -> str:
    """The largest few, with their sizes."""
    first = sorted(sizes, key=lambda name: -sizes[name])[:n]
    return ", ".join(f"{name} {sizes[name]}" for name in first)


def main() -> int:
    """Print the numbers; 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--paths", action="store_true", help="trace a row and theta as well")
    options = parser.parse_args()
    files = tracked()
    rooms, sizes, long = entries(files), lines(files), functions(files)
    upward, engine = upward_imports(), lint_exceptions("llama_cpp")
    print(f"entries of a folder (at most {MAX_ENTRIES}): {largest(rooms)}")
    print(f"lines of a file (at most {MAX_LINES}): {largest(sizes)}")
    print(f"lines of a function (at most {MAX_FUNCTION}): {largest(long)}")
    print(f"imports against the order: {len(upward)} {' '.join(upward)}")
    print(f"places that may import llama_cpp: {', '.join(engine)}")
    if options.paths:
        for what, modules in paths().items():
            print(f"{what}: {len(modules)} modules: {' '.join(modules)}")
    broken = max(rooms.values()) > MAX_ENTRIES or max(sizes.values()) > MAX_LINES
    return int(broken or max(long.values()) > MAX_FUNCTION or bool(upward))


if __name__ == "__main__":
    sys.exit(main())
