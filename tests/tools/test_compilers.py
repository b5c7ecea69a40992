"""tools/compilers.py: which compilers it takes, and that it sees a warning."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tools import compilers

PROJECT = """cmake_minimum_required(VERSION 3.21)
project(p LANGUAGES CXX)
add_library(p STATIC p.cpp)
target_compile_options(p PRIVATE $<IF:$<CXX_COMPILER_ID:MSVC>,/W4,-Wall>)
"""


def test_a_compiler_with_two_names_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    os.symlink(tmp_path / "one", tmp_path / "alias")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compilers.find_compilers(["one", "alias", "two", "missing", ""])
    assert found == {name: str(tmp_path / name) for name in ("one", "two")}


def test_a_warning_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = Path(sys.executable).parent  # cmake and ninja
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    compiler = shutil.which("c++")
    assert compiler
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    source = tmp_path / "p.cpp"
    source.write_text("int f() { return 1; }\n")
    assert compilers.compile_with(compiler, tmp_path, tmp_path / "build") == ""
    source.write_text("int f() { int unused = 2; return 1; }\n")
    assert "unused" in compilers.compile_with(compiler, tmp_path, tmp_path / "build")


def test_no_compiler_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "NAMES", [])
    monkeypatch.delenv("CXX", raising=False)
    assert compilers.main() == 1
