"""Fixtures shared by all tests: the model that ships with the repository, its exports and a task.

An export takes half a minute, so it is made once and kept in `tests/.cache`, under a name that
changes with the source files it depends on.
"""

import ast
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers import stand_in_gpu
from tools import make_task
from zo_gguf.engine.model import native_library
from zo_gguf.libzo import ON_CPU
from zo_gguf.libzo import library as native

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "zo_gguf"
TINY_LLAMA = TESTS / "assets" / "tiny-llama"
CACHE = TESTS / ".cache"
QUANTS = ["F16", "Q8_0", "Q4_0", "Q4_K_M"]
_A_DAY = 86400


@dataclass(frozen=True)
class TinyExport:
    """The exported files of tiny-llama: density 0.001, calibrated on the generator's sentences."""

    folder: Path

    def model(self, quant: str) -> Path:
        return self.folder / f"tiny-llama-{quant}.gguf"

    def mask(self, quant: str) -> Path:
        return self.folder / f"tiny-llama-{quant}.mask.safetensors"


@pytest.fixture(scope="session")
def tiny_llama_dir() -> Path:
    """The Hugging Face folder of tiny-llama."""
    return TINY_LLAMA


@pytest.fixture(params=["cpu", "stand-in", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Number of the device that kernels run on: the CPU, a GPU's stand-in there, a GPU."""
    if request.param == "stand-in":
        library = stand_in_gpu.build(CACHE)
        monkeypatch.setattr(native, "library_path", lambda: library)
        native.load.cache_clear()
    elif request.param == "cuda":
        need_gpu()
    yield ON_CPU if request.param == "cpu" else 0
    if request.param == "stand-in":
        native.load.cache_clear()


def need_gpu() -> None:
    """Skip a test, aloud, where libzo can use no GPU; fail it if ZO_NEED_GPU says there is one."""
    if native_library().functions.zo_gpu_count() == 0:
        if os.environ.get("ZO_NEED_GPU"):
            pytest.fail("libzo sees no GPU that it has kernels for")
        pytest.skip("needs a CUDA device: python3 tools/dev.py gpu runs it on a machine with one")


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The topic task in small: train.jsonl, valid.jsonl, test.jsonl, calibration.txt."""
    folder = tmp_path_factory.mktemp("task")
    make_task.make_task(folder, n_train=400, n_valid=40, n_test=80, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_export(task_dir: Path) -> TinyExport:
    """Read only: copy a file before changing it."""
    calibration = task_dir / make_task.CALIBRATION
    folder = CACHE / f"export-{export_key(calibration)}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        for old in CACHE.glob("export-*"):
            if time.time() - old.stat().st_mtime > _A_DAY:
                shutil.rmtree(old, ignore_errors=True)
        made = make_export(calibration)
        try:
            os.rename(made, folder)
        except OSError:  # another pytest was faster
            shutil.rmtree(made)
    return TinyExport(folder)


def make_export(calibration: Path) -> Path:
    from zo_gguf.config import ExportConfig
    from zo_gguf.verbs.export import export

    folder = Path(tempfile.mkdtemp(dir=CACHE, prefix=".making."))
    export(
        ExportConfig(
            model=str(TINY_LLAMA),
            name="tiny-llama",
            pre="gpt-2",
            calibration=str(calibration),
            quant=QUANTS,
            density=0.001,
            output=str(folder),
        )
    )
    return folder


def export_key(calibration: Path) -> str:
    """Hash of everything an export depends on: sources, calibration text, model, engine."""
    sha = hashlib.sha256(f"{version('llama_cpp_python')} {version('torch')} {QUANTS}".encode())
    for file in [
        *sorted(imported_by("zo_gguf.verbs.export")),
        *sorted(TINY_LLAMA.iterdir()),
        calibration,
    ]:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:16]


def imported_by(module: str) -> set[Path]:
    """The files of zo_gguf that importing `module` runs, found without running them."""
    files: set[Path] = set()
    waiting = [module]
    while waiting:
        path = PACKAGE.parent.joinpath(*waiting.pop().split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file in files or not file.is_file():
            continue
        files.add(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zo_gguf."):
                waiting.append(str(node.module))
                waiting += [f"{node.module}.{name.name}" for name in node.names]  # of a package
    return files
