"""Options: the one mechanism behind config dataclasses, command line flags and YAML files.

A field of a `Config` carries its help, flags and range as metadata (`option`). Flags, YAML values
and Python arguments all pass through `coerce`, so every default and every check stands once. The
options themselves are in `config.py`, YAML in `config_file.py`.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from zo_gguf.errors import ZoError


def option(
    *flags: str,
    help: str,
    default: Any = dataclasses.MISSING,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is also an option.

    Args:
        flags: Flags besides the long one, which is derived from the field's name.
        help: Shown by `--help`; the default is appended.
        default: The only place where the default stands; without it the option is required.
        low: Smallest allowed number.
        above: Numbers must be greater than this.
        below: Numbers must be less than this.
        positional: The value may also stand without a flag.
        metavar: How `--help` names the value.
    """
    metadata = {
        "flags": flags,
        "help": help,
        "low": low,
        "above": above,
        "below": below,
        "positional": positional,
        "metavar": metavar,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configs: converts every field to its declared type and checks its range.

    Raises:
        ZoError: A value has the wrong type or lies outside its range.
    """

    def __post_init__(self) -> None:
        declared = hints(type(self))
        for item in dataclasses.fields(self):
            value = coerce(getattr(self, item.name), declared[item.name], item.name)
            _check_range(value, item.name, item.metadata)
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Checks across fields; subclasses override it."""


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Convert `value` (from Python, YAML or the command line) to the declared type `hint`.

    Raises:
        ZoError: It cannot be converted; names the option, the value and what is allowed.
    """
    members = _members(hint)
    for member in members:
        try:
            return _convert(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    allowed = " or ".join(_describe(member) for member in members if member is not types.NoneType)
    raise ZoError(f"{name} must be {allowed}, not {value!r}.")


def add_arguments(parser: argparse.ArgumentParser, cls: type[Config]) -> None:
    """Give `parser` a flag for every field of `cls`; options that are not given leave no trace."""
    declared = hints(cls)
    for item in sorted(dataclasses.fields(cls), key=lambda item: not is_required(item)):
        members = _members(declared[item.name])
        metavar = item.metadata["metavar"] or _metavar(members)
        shared: dict[str, Any] = {"help": _help_text(item), "default": argparse.SUPPRESS}
        if item.metadata["positional"]:
            parser.add_argument(item.name, nargs="?", metavar=metavar, **shared)
            shared["help"] = argparse.SUPPRESS
        if bool in members and not item.metadata["metavar"]:
            shared["action"] = argparse.BooleanOptionalAction
        else:
            shared["metavar"] = metavar
        if any(typing.get_origin(member) is list for member in members):
            shared["action"] = "append"
        parser.add_argument(*flags(item), dest=item.name, **shared)


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain numbers, strings and lists, in field order."""
    return dataclasses.asdict(config)


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved config, as hex; equal configs give equal hashes."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _convert(value: Any, hint: Any) -> Any:
    """Convert to one type of a union; TypeError or ValueError when it does not fit."""
    if hint is types.NoneType:
        if value is not None:
            raise TypeError
        return None
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [_convert(item, typing.get_args(hint)[0]) for item in items]
    return {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}[hint](value)


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # 1e4 is a fine way to write ten thousand
    number = _to_float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # YAML reads `layers: 4` as a number
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return text


def _check_range(value: Any, name: str, metadata: Mapping[str, Any]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    low, above, below = (metadata.get(key) for key in ("low", "above", "below"))
    if low is not None and value < low:
        raise ZoError(f"{name} must be at least {low}, not {value}.")
    if above is not None and value <= above:
        raise ZoError(f"{name} must be greater than {above}, not {value}.")
    if below is not None and value >= below:
        raise ZoError(f"{name} must be less than {below}, not {value}.")


def parse_fields(pairs: list[str]) -> dict[str, str]:
    """`["prompt=question"]` -> `{"prompt": "question"}`.

    Raises:
        ZoError: A pair is not of the form KEY=NAME, or a key comes twice.
    """
    renamed: dict[str, str] = {}
    for pair in pairs:
        key, equals, column = pair.partition("=")
        if not (key and equals and column):
            raise ZoError(f"field must look like prompt=question, not {pair!r}.")
        if key in renamed:
            raise ZoError(f"field {key!r} is given twice; keep one.")
        renamed[key] = column
    return renamed


def hints(cls: type[Config]) -> dict[str, Any]:
    """Declared type of every option."""
    return typing.get_type_hints(cls)


def is_required(item: "dataclasses.Field[Any]") -> bool:
    """True for an option without a default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def refuse_unread(
    config: Config, readers: Mapping[str, Sequence[str]], chosen: Sequence[str], what: str
) -> None:
    """Raise ZoError for an option that was given although nothing that was chosen reads it.

    Args:
        config: The options.
        readers: Option -> what reads it.
        chosen: What was chosen, such as the parts of "sensitive+norm".
        what: The option by which.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    for name, known in readers.items():
        if getattr(config, name) != defaults[name] and not set(known) & set(chosen):
            raise ZoError(
                f"--{name} is for --{what} {' or '.join(known)}, not {'+'.join(chosen)}; "
                "leave it out."
            )


def flags(item: "dataclasses.Field[Any]") -> list[str]:
    """The option's flags, short ones first."""
    short = sorted(item.metadata["flags"], key=len)
    return [*short, "--" + item.name.replace("_", "-")]


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _describe(member: Any) -> str:
    if typing.get_origin(member) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(member))
    if typing.get_origin(member) is list:
        return "a list"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[member]


def _metavar(members: tuple[Any, ...]) -> str:
    names: list[str] = []
    for member in members:
        if typing.get_origin(member) is Literal:
            names += typing.get_args(member)
        elif member in (int, float):
            names.append("N")
    return "|".join(names) or "TEXT"


def _help_text(item: "dataclasses.Field[Any]") -> str:
    default = item.default
    if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
        default = ", ".join(item.default_factory())
    text = str(item.metadata["help"])
    if default not in (dataclasses.MISSING, None, "") and default is not False:
        text += f" (default: {default})"
    return text.replace("%", "%%")
