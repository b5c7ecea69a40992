"""llama.cpp's AMX code may have been compiled so that it crashes: said in words, not found out."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest

from tests.helpers.tiny_gguf import write_llama
from zo_gguf.config import EnvConfig
from zo_gguf.engine import amx
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.verbs.info import env


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    amx.crashes.cache_clear()
    yield
    amx.crashes.cache_clear()


def dies_of(signal: str, folder: Path) -> str:
    """A program in Python's place that a signal kills."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nkill -{signal} $$\n")
    program.chmod(0o755)
    return str(program)


def test_the_installed_one_runs(tmp_path: Path) -> None:
    amx.write_model(tmp_path / "m.gguf")
    command = [sys.executable, "-P", "-m", "zo_gguf.engine.amx", str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not amx.crashes()


def test_other_users_of_tiles_do_no_harm(tmp_path: Path) -> None:
    """PyTorch's products of bfloat16 use them where the CPU has AMX, in the same thread."""
    amx.write_model(tmp_path / "m.gguf")
    program = (
        "import sys, torch; from pathlib import Path; from zo_gguf.engine.amx import decode\n"
        "decode(Path(sys.argv[1])); a = torch.ones(512, 512, dtype=torch.bfloat16)\n"
        "assert (a @ a)[0, 0] == 512; decode(Path(sys.argv[1])); print('twice')"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "twice"), done.stderr


def test_only_a_signal_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx.sys, "executable", "/bin/false")
    assert not amx.crashes()
    amx.crashes.cache_clear()
    monkeypatch.setattr(amx.sys, "executable", dies_of("SEGV", tmp_path))
    assert amx.crashes()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_is_refused_with_the_way_out(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(amx.sys, "executable", dies_of("SEGV", tmp_path))
        said = f"CPU : AVX2 = 1 | {amx.FEATURE} = {compiled:d} |".encode()
        patch.setattr(llama_cpp, "llama_print_system_info", lambda: said)
        if not compiled:
            Engine(model, n_threads=1).close()
            return
        with pytest.raises(
            ZoError, match=r'export CXXFLAGS="-include (.*)"; pip .*--no-cache'
        ) as caught:
            Engine(model, n_threads=1)
        shown = env(EnvConfig()).render()
        assert all(line in shown for line in amx.amx_problem())
    said = str(caught.value)
    assert llama_cpp.__version__ in said
    assert Path(said.partition("-include ")[2].partition('"')[0]).is_file()
