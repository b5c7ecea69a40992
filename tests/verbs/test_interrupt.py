"""Signals while C code runs that calls Python back: ctypes would drop what they raise there."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest

from zo_gguf.engine.model import load_model
from zo_gguf.engine.quantize import quantize
from zo_gguf.system import Interrupt, deferred


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """Shells start jobs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_callback(number: int = signal.SIGINT) -> None:
    """What llama.cpp does when it logs, with a signal meanwhile."""
    ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), number))()


def test_a_signal_comes_in_after_the_c_code() -> None:
    reached = []

    @deferred()
    def work() -> None:
        interrupted_callback()
        reached.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nested_ones_come_in_at_the_end() -> None:
    reached = []

    @deferred()
    def work() -> None:
        with deferred():
            interrupted_callback()
        reached.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["the rest"]


def test_nothing_comes_in_where_nothing_came() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with deferred():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred():
        interrupted_callback()
        interrupted_callback()


def test_the_step_loop_hears_of_it() -> None:
    with Interrupt() as interrupt:
        with deferred():
            interrupted_callback(signal.SIGTERM)
            assert not interrupt.requested
        assert interrupt.requested


def test_a_second_one_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from zo_gguf.system import deferred\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGINT


def test_ctrl_c_while_a_model_loads(
    tiny_export: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, freed = llama_cpp.llama_model_load_from_file, []

    def interrupted(path: bytes, params: Any) -> Any:
        interrupted_callback()
        freed.append(load(path, params))
        return freed[0]

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(Path(tiny_export.model("F16")))
    llama_cpp.llama_model_free(freed[0])


def test_ctrl_c_while_a_model_is_quantized(
    tiny_export: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "llama_model_quantize", lambda *_: interrupted_callback())
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_export.model("F16"), tmp_path / "q.gguf", "Q4_0")
    assert not list(tmp_path.iterdir())
