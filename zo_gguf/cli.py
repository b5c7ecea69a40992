"""The command line: verbs, options derived from the configs, exit codes; no work of its own.

A verb's module is imported when the verb runs, so that --help needs neither numpy nor llama.cpp.
Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failure, 2 usage or bad
input, 3 does not fit, 130 interrupted.
"""

import argparse
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import zo_gguf
from zo_gguf.config import (
    DataCheckConfig,
    EnvConfig,
    EvalConfig,
    ExportConfig,
    InfoConfig,
    MergeConfig,
    ReplayConfig,
    TuneConfig,
    build,
)
from zo_gguf.config.option import Config, add_arguments, nearest
from zo_gguf.errors import ZoError
from zo_gguf.system import handling, sleep_at_barriers

_DEBUG = "ZO_GGUF_DEBUG"


@dataclass(frozen=True)
class _Verb:
    config: type[Config]
    target: str  # module:function
    help: str


_VERBS = {
    "export": _Verb(
        ExportConfig, "verbs.export:export", "make quantized GGUFs and masks of a HF model"
    ),
    "plan": _Verb(
        TuneConfig, "verbs.plan:plan", "memory, time and disk of a tune, without training"
    ),
    "tune": _Verb(TuneConfig, "verbs.tune:tune", "fine-tune a quantized GGUF with forward passes"),
    "replay": _Verb(
        ReplayConfig, "verbs.replay:replay", "rebuild a run's delta from its trajectory"
    ),
    "eval": _Verb(
        EvalConfig, "verbs.evaluate:evaluate", "loss, perplexity and accuracy on a data file"
    ),
    "merge": _Verb(MergeConfig, "verbs.merge:merge", "make a GGUF that every llama.cpp app loads"),
    "data check": _Verb(
        DataCheckConfig, "verbs.data_check:data_check", "check rows, show what counts"
    ),
    "info": _Verb(InfoConfig, "verbs.info:info", "what a file or run folder holds"),
    "env": _Verb(EnvConfig, "verbs.info:env", "versions, backends, and whether a GPU will be used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, without the program's name; returns the exit code."""
    sleep_at_barriers()
    given = list(sys.argv[1:] if argv is None else argv)
    with _terminate_like_ctrl_c():
        try:
            return _run(given)
        except ZoError as error:
            return _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            return _fail("interrupted.", 130)
        except BrokenPipeError:  # `zo-gguf info FILE | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except MemoryError:
            return _fail("out of memory; lower --ctx-tokens or close other programs.", 3)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and given[:1] == ["tune"]:
                where += "; a run's steps are kept, `zo-gguf tune --resume` goes on"
            return _fail(f"{error.strerror or error}{where}.", 2)
        except Exception as error:  # a bug of ours: users still get one line
            if os.environ.get(_DEBUG):
                traceback.print_exc()
            hint = f"set {_DEBUG}=1 for the traceback, and please report it"
            return _fail(f"internal error, {type(error).__name__}: {error} ({hint}).", 1)


def _run(argv: list[str]) -> int:
    parser = _make_parser()
    try:
        options, unknown = parser.parse_known_args(argv)
    except SystemExit as exit_:  # --help and --version
        return int(exit_.code or 0)
    values = vars(options)
    verb, command = values.pop("verb", None), values.pop("parser", parser)
    if verb is None:
        parser.print_help(sys.stderr)
        return 2
    if unknown:
        known = [flag for action in command._actions for flag in action.option_strings]
        raise ZoError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], known)}")
    if "resume" in values:
        return _resume(values)
    target = _VERBS[verb].target
    if values.pop("dry_run", False):
        verb, target = "plan", _VERBS["plan"].target
    config = _configure(verb, values)
    _report(_function(target)(config), getattr(config, "json", False))
    return 0


def _resume(values: dict[str, Any]) -> int:
    run, as_json = values.pop("resume"), values.pop("json", False)
    if values:
        flags = ", ".join("--" + name.replace("_", "-") for name in values)
        raise ZoError(f"--resume goes on with the settings of the run; leave out {flags}.")
    _report(_function("verbs.tune:resume")(run), as_json)
    return 0


def _configure(verb: str, values: dict[str, Any]) -> Config:
    config_file = values.pop("config", None)
    defaults = {"output": "run"} if verb == "plan" else {}  # nothing will be written there
    if isinstance(values.get("lora"), str):
        if "output" in values:
            raise ZoError("--lora OUT.gguf names the file to write; leave out -o, or merge twice.")
        values = {**values, "output": values["lora"], "lora": True}
    return build(_VERBS[verb].config, values, config_file, defaults)


def _function(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(f"zo_gguf.{module}"), name)


def _report(result: Any, as_json: bool) -> None:
    """Print results that know how to show themselves."""
    render = getattr(result, "render", None)
    if render is not None:
        print(render(as_json), flush=True)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ZoError(f"{message}; see `{self.prog} --help`.")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zo-gguf",
        description="Fine-tune the quantized GGUF model you already run, with forward passes only.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zo-gguf {zo_gguf.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", title="verbs")
    data: Any = None
    for name, verb in _VERBS.items():
        group, _, word = name.rpartition(" ")
        if group:
            data = verbs.add_parser(group, help="check the rows of a data file", allow_abbrev=False)
            place = data.add_subparsers(metavar="VERB", title="verbs", required=True)
        else:
            place = verbs
        child = place.add_parser(
            word,
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            allow_abbrev=False,
        )
        child.set_defaults(verb=name, parser=child)
        add_arguments(child, verb.config)
        child.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="options as YAML"
        )
        if name == "tune":
            _add_tune_flags(child)
    return parser


def _add_tune_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="go on with an interrupted run; needs no other option",
    )
    parser.add_argument(
        "--dry-run", action="store_true", default=argparse.SUPPRESS, help="the same as `plan`"
    )


def _fail(message: str, exit_code: int) -> int:
    print("zo-gguf: error:", " ".join(message.split()), file=sys.stderr)
    return exit_code


@contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does: with a checkpoint."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handling(interrupt, [signal.SIGTERM]):
        yield
