"""Configs in YAML files: read with a safe loader, overridden by the command line, written resolved.

Unknown and doubled keys are errors; values are converted by their declared type, because YAML 1.1
reads `1e-5` as text.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from zo_gguf.config.option import Config, coerce, flags, hints, is_required, nearest, to_dict
from zo_gguf.errors import ZoError
from zo_gguf.files import atomic_write, require_file

C = TypeVar("C", bound=Config)
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
