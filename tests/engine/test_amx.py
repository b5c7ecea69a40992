"""llama.cpp's AMX code may have been compiled so that it crashes: said in words, not found out."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest

from tests.helpers.tiny_gguf import write_llama
from zo_gguf.config import EnvConfig
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.hardware import amx
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
    command = [sys.executable, "-P", "-m", "zo_gguf.engine.hardware.amx", str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not amx.crashes()


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
        with pytest.raises(ZoError, match=r"crashes on every .* pip .*--no-cache") as caught:
            Engine(model, n_threads=1)
        shown = env(EnvConfig()).render()
        assert all(line in shown for line in amx.amx_problem())
    said = str(caught.value)
    assert said.endswith(f"llama-cpp-python=={llama_cpp.__version__}")
    assert amx.BUILD_FLAGS in said


@pytest.mark.parametrize(
    ("flags", "compiled", "left_out"),
    [("avx2 amx_int8", False, True), ("avx2 amx_int8", True, False), ("avx2", False, False)],
)
def test_amx_that_is_left_out_is_said(
    flags: str, compiled: bool, left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : fpu {flags} avx\n")
    monkeypatch.setattr(amx, "_CPU_INFO", info)
    monkeypatch.setattr(amx, "crashes", lambda: False)
    said = f"CPU : AVX2 = 1 | {amx.FEATURE} = {compiled:d} |".encode()
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: said)
    assert ("AMX is left out" in env(EnvConfig()).render()) == left_out


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of compilers for x86")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("architecture", ["native", "sapphirerapids"])
def test_the_flag_wins_over_the_architecture(compiler: str, architecture: str) -> None:
    if (program := shutil.which(compiler)) is None:
        pytest.skip(f"no {compiler} here")

    def knows_amx(*flags: str) -> bool:
        command = [program, *flags, "-dM", "-E", "-x", "c", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return re.search("__AMX_?INT8__", done.stdout) is not None  # older clang: in one word

    (flag,) = {setting.partition("=")[2] for setting in amx.BUILD_FLAGS.split()}
    march = f"-march={architecture}"
    assert not knows_amx(flag, march)
    assert not knows_amx(march, flag)
    if architecture == "sapphirerapids":
        assert knows_amx(march)
