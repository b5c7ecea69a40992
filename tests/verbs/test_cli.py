"""The command line: dispatch, merging of flags and files, exit codes, streams, signals."""

import importlib
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import zo_gguf
from zo_gguf.cli import _VERBS, main
from zo_gguf.config import MergeConfig, TuneConfig
from zo_gguf.config.option import Config
from zo_gguf.errors import DoesNotFitError, ZoError

TUNE = ["tune", "-m", "x.gguf", "--data", "d", "-o", "run"]


@dataclass
class Result:
    text: str

    def render(self, as_json: bool) -> str:
        return f"{self.text} {as_json}"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Replaces every verb's function; collects (target, argument)."""
    calls: list[tuple[str, Any]] = []

    def function(target: str) -> Any:
        def verb(argument: Any) -> Result:
            calls.append((target, argument))
            return Result(target)

        return verb

    monkeypatch.setattr("zo_gguf.cli._function", function)
    return calls


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def verb(_: Any) -> None:
        raise error

    monkeypatch.setattr("zo_gguf.cli._function", lambda _: verb)


@pytest.mark.parametrize(
    ("line", "target", "values"),
    [
        (
            ["export", "-m", "hf", "-o", "o", "--quant", "Q8_0"],
            "verbs.export:export",
            {"quant": ["Q8_0"]},
        ),
        (TUNE, "verbs.tune:tune", {"iters": None, "method": ""}),
        ([*TUNE, "--dry-run"], "verbs.plan:plan", {"output": "run"}),
        (["plan", "-m", "x", "--data", "d"], "verbs.plan:plan", {"data": "d"}),
        (["tune", "--dry-run", "-m", "x", "--data", "d"], "verbs.plan:plan", {"data": "d"}),
        (["replay", "RUN"], "verbs.replay:replay", {"run": "RUN", "output": None}),
        (["eval", "-m", "x", "--data", "d"], "verbs.evaluate:evaluate", {"delta": None}),
        (["merge", "RUN", "-o", "y", "--type", "keep"], "verbs.merge:merge", {"lora": False}),
        (
            ["merge", "RUN", "--lora", "y", "--rank", "4"],
            "verbs.merge:merge",
            {"lora": True, "rank": 4},
        ),
        (["data", "check", "D", "-m", "x"], "verbs.data_check:data_check", {"data": "D"}),
        (["data", "check", "--data", "D", "-m", "x"], "verbs.data_check:data_check", {"data": "D"}),
        (["info", "F"], "verbs.info:info", {"path": "F"}),
        (["env"], "verbs.info:env", {"json": False}),
    ],
)
def test_verbs(
    called: list[tuple[str, Any]], line: list[str], target: str, values: dict[str, Any]
) -> None:
    assert main(line) == 0
    ((got, config),) = called
    assert got == target
    assert isinstance(config, Config)
    assert {key: getattr(config, key) for key in values} == values


def test_every_verb_has_its_function() -> None:
    for verb in _VERBS.values():
        module, name = verb.target.split(":")
        function = getattr(importlib.import_module(f"zo_gguf.{module}"), name)
        assert callable(function), verb.target


def test_lora_names_the_output(called: list[tuple[str, Any]], capsys: Any) -> None:
    main(["merge", "RUN", "--lora", "y.gguf"])
    assert called[0][1] == MergeConfig(run="RUN", output="y.gguf", lora=True)
    assert main(["merge", "RUN", "--lora", "y.gguf", "-o", "z.gguf"]) == 2
    assert "leave out -o" in capsys.readouterr().err


def test_results_go_to_stdout(called: list[tuple[str, Any]], capsys: Any) -> None:
    main(["eval", "-m", "x", "--data", "d", "--json"])
    assert capsys.readouterr() == ("verbs.evaluate:evaluate True\n", "")


def test_config_file_under_flags(called: list[tuple[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: y.gguf\ndata: d\noutput: r\niters: 5\neps: 1e-2\noverwrite: true\n")
    assert main(["tune", "--config", str(file), "--iters", "7", "--no-overwrite"]) == 0
    expected = TuneConfig(model="y.gguf", data="d", output="r", iters=7, eps=0.01)
    assert called == [("verbs.tune:tune", expected)]
    file.write_text("itres: 5\n")
    assert main(["tune", "--config", str(file)]) == 2


def test_resume_needs_and_takes_no_other_option(called: list[tuple[str, Any]], capsys: Any) -> None:
    assert main(["tune", "--resume", "RUN"]) == 0
    assert called == [("verbs.tune:resume", "RUN")]
    for extra in (["--iters", "5"], ["--config", "x.yaml"], ["--dry-run"], ["-m", "x"]):
        assert main(["tune", "--resume", "RUN", *extra]) == 2
        assert "leave out --" in capsys.readouterr().err
    assert len(called) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["tune"], "missing -m/--model, --data, -o/--output"),
        (["merge", "-o", "x"], "missing RUN"),
        ([*TUNE, "--itres", "5"], "unknown argument '--itres'; did you mean '--iters'?"),
        ([*TUNE, "--iter", "5"], "unknown argument '--iter'"),  # no abbreviations
        ([*TUNE, "--iters"], "argument --iters: expected one argument"),
        ([*TUNE, "--iters", "0"], "iters must be at least 1, not 0"),
        ([*TUNE, "--iters", "1e308"], "iters must be less than 1000000000"),
        ([*TUNE, "--threads", "513"], "threads must be less than 513"),
        ([*TUNE, "--ctx-size", "1e12"], "ctx_tokens must be less than 1048577"),
        ([*TUNE, "--directions", "65537"], "directions must be less than 65537"),
        ([*TUNE, "--examples-per-step", "65537"], "examples_per_step must be less than 65537"),
        ([*TUNE, "--eps", "1e6"], "eps must be less than 1000000.0"),
        ([*TUNE, "--eps", "small"], "eps must be a number or 'auto', not 'small'"),
        (["tnue"], "invalid choice: 'tnue'"),
        (["data"], "VERB"),
        ([*TUNE, "--config", "/none.yaml"], "config file '/none.yaml' is not a file"),
    ],
)
def test_usage_errors(line: list[str], sentence: str, capsys: Any) -> None:
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zo-gguf: error: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            ZoError("The mask is broken; export it again."),
            2,
            "The mask is broken; export it again.",
        ),
        (DoesNotFitError("Needs 9 GiB."), 3, "Needs 9 GiB."),
        (ZoError("two\nlines"), 2, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 3, "out of memory"),
        (OSError(28, "No space left on device", "run/x"), 2, "device: run/x."),
        (NotADirectoryError(20, "Not a directory", "f/run"), 2, "Not a directory: f/run."),
        (RuntimeError("surprise"), 1, "internal error, RuntimeError: surprise"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: BaseException, code: int, sentence: str
) -> None:
    fails(monkeypatch, error)
    assert main(["env"]) == code
    err = capsys.readouterr().err
    assert err.startswith("zo-gguf: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_a_full_disk_ends_no_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fails(monkeypatch, OSError(28, "No space left on device", "run/x"))
    assert main(["tune", "-m", "m.gguf", "--data", "d.jsonl", "-o", "run"]) == 2
    assert "device: run/x; a run's steps are kept" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fails(monkeypatch, RuntimeError("surprise"))
    monkeypatch.setenv("ZO_GGUF_DEBUG", "1")
    assert main(["env"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_is_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def verb(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("zo_gguf.cli._function", lambda _: verb)
    assert main(["env"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_verb_shows_help(capsys: Any) -> None:
    assert main([]) == 2
    assert "usage: zo-gguf" in capsys.readouterr().err


def test_help_and_version(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zo-gguf {zo_gguf.__version__}\n"
    for name in _VERBS:
        assert main([*name.split(), "--help"]) == 0
        assert "--config" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from zo_gguf.cli import main; main(['tune', '--help']); "
        "print(sorted({'numpy', 'llama_cpp', 'torch', 'jinja2', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_can_be_run() -> None:
    command = [sys.executable, "-m", "zo_gguf", "tune", "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("zo-gguf: error: argument --resume")


def test_public_names() -> None:
    for name in zo_gguf.__all__:
        assert getattr(zo_gguf, name) is not None, name
    assert set(zo_gguf.__all__) <= set(dir(zo_gguf))
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        _ = zo_gguf.tuna  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["evaluate", "export", "merge", "tune"])
def test_verbs_stay_functions_when_their_module_is_imported(name: str) -> None:
    code = f"import zo_gguf, zo_gguf.verbs.{name} as m; assert zo_gguf.{name} is m.{name}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not isinstance(getattr(zo_gguf, name), types.ModuleType)
