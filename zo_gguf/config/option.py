"""Options: the one mechanism behind config dataclasses, command line flags and YAML files.

A field of a `Config` carries its help, flags and range as metadata (`option`). Flags, YAML values
and Python arguments all pass through `coerce`, so every default and every check stands once. YAML
is read with a safe loader; unknown and doubled keys are errors, and numbers are converted by their
declared type, because YAML 1.1 reads `1e-5` as text.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, Union

from zo_gguf.errors import ZoError
from zo_gguf.system import atomic_write, require_file


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
                f"--{name.replace('_', '-')} is for --{what} {' or '.join(known)}, "
                f"not {'+'.join(chosen)}; "
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


# ---- YAML files ----------------------------------------------------------------------------------


C = TypeVar("C", bound=Config)
C_contra = TypeVar("C_contra", bound=Config, contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
_MAX_BYTES = 1 << 20


def build(
    cls: type[C],
    values: Mapping[str, Any],
    config_file: str | None = None,
    fallback: Mapping[str, Any] | None = None,
) -> C:
    """Make a config from options.

    Args:
        cls: The config.
        values: The options given; they override those of the file.
        config_file: A YAML file of options.
        fallback: Values for options that neither gives.

    Raises:
        ZoError: An unknown key, a bad value or a required option that is missing.
    """
    from_file = _read_yaml(cls, config_file) if config_file else {}
    merged = {**(fallback or {}), **from_file, **values}
    _reject_unknown(cls, merged, "")
    missing = [
        item.name.upper() if item.metadata["positional"] else "/".join(flags(item))
        for item in dataclasses.fields(cls)
        if is_required(item) and item.name not in merged
    ]
    if missing:
        raise ZoError(f"missing {', '.join(missing)}; give it as an option or in --config FILE.")
    return cls(**merged)


class Verb(Protocol[C_contra, R_co]):
    """A function of one config, or of its options as keywords."""

    def __call__(self, config: C_contra | None = None, /, **options: Any) -> R_co:
        """Run it."""
        ...


def takes(cls: type[C]) -> Callable[[Callable[[C], R]], Verb[C, R]]:
    """Let a function of a config be called with the config's options instead.

    Called so, it also raises ZoError for options that are unknown, missing or of a bad value.
    """

    def decorate(function: Callable[[C], R]) -> Verb[C, R]:
        @functools.wraps(function)
        def called(config: C | None = None, /, **options: Any) -> R:
            if config is None:
                config = build(cls, options)
            elif options:
                given = ", ".join(options)
                raise ZoError(f"{cls.__name__} and {given} were given; put all into one of them.")
            return function(config)

        return called

    return decorate


def load_config(cls: type[C], path: str | os.PathLike[str]) -> C:
    """Read a YAML file, such as RUN/config.yaml, into a config.

    Raises:
        ZoError: The file is missing, is not YAML, or holds unknown keys or bad values.
    """
    return build(cls, {}, os.fspath(path))


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML; the old file stays whole until the new one is."""
    import yaml

    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def _read_yaml(cls: type[Config], path: str) -> dict[str, Any]:
    import yaml

    file = require_file(path, "config file")
    if file.stat().st_size > _MAX_BYTES:
        raise ZoError(f"The config file {path!r} is larger than 1 MiB; give a file of options.")
    try:
        # Not safe_load: it takes the last of two equal keys without a word.
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = {} if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ZoError(
            f"The config file {path!r} is not valid YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ZoError(f"The config file {path!r} must hold `option: value` lines.")
    if node is not None and len(node.value) != len(content):
        raise ZoError(f"The config file {path!r} gives one option twice; keep one of the lines.")
    values = {key.replace("-", "_"): value for key, value in content.items()}
    _reject_unknown(cls, values, f"{path}: ")
    declared = hints(cls)
    try:
        return {key: coerce(value, declared[key], key) for key, value in values.items()}
    except ZoError as error:
        raise ZoError(f"{path}: {error}") from error


def _reject_unknown(cls: type[Config], values: Mapping[str, Any], origin: str) -> None:
    known = [item.name for item in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ZoError(f"{origin}unknown option {key!r}{nearest(key, known)}")
