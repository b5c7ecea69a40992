"""The methods: what is trained, and how the engine is perturbed. One file and one line each."""

from zo_gguf.errors import ZoError
from zo_gguf.methods.base import Method
from zo_gguf.methods.sensitive import Sensitive
from zo_gguf.options import nearest

METHODS: dict[str, type[Method]] = {
    "sensitive": Sensitive,
}


def find_method(name: str) -> type[Method]:
    """The method called `name`.

    Raises:
        ZoError: There is none.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ZoError(f"There is no method {name!r}{nearest(name, METHODS)} Known: {known}.")
    return METHODS[name]
