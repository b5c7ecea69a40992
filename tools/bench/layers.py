"""Layers of a model, counted from the head."""

from zo_gguf.engine.engine import Engine


def n_layers(engine: Engine) -> int:
    """Of the model."""
    return int(engine.gguf.metadata(f"{engine.gguf.architecture}.block_count"))


def layer_of(name: str) -> int:
    """The layer of a tensor "blk.LAYER.part.weight"."""
    return int(name.split(".")[1])


def tops(engine: Engine) -> dict[int, str]:
    """How many of the last layers are looked at, and in words."""
    n = n_layers(engine)
    return {1: "last", max(1, round(n / 4)): "top quarter", n // 2: "top half", n: "all"}
