"""A GGUF with other scales, float weights or norms than the base, and all else byte for byte."""

from functools import partial
from pathlib import Path

from zo_gguf.engine.model import default_threads, native_library
from zo_gguf.engine.parameters import Parameters
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.write import NewTensor, copy_gguf
from zo_gguf.params.delta import Delta
from zo_gguf.params.scales import float_bytes, live_bytes


def write_edited(base: GgufFile, delta: Delta, path: Path) -> GgufFile:
    """Write the base as the engine saw it at theta, and open it.

    Args:
        base: The GGUF that was tuned.
        delta: With edits in place or gains.
        path: File to write, atomically.

    Raises:
        DoesNotFitError: The disk is too small.
    """
    parameters = Parameters(native_library(), delta, base, default_threads())
    try:
        values = parameters.live_values()
    finally:
        parameters.free()
    replace = {}
    for name, live in delta.live.items():
        info = base.tensors[name]
        make = partial(live_bytes, base, name, live, values[name])
        replace[name] = NewTensor(name, info.shape, info.type, make)
    slices = delta.edit_slices()
    for name in delta.gains:
        info = base.tensors[name]
        weights = base.dequantize(name) * (1 + delta.theta[slices[name]])
        make = partial(float_bytes, weights, info.type)
        replace[name] = NewTensor(name, info.shape, info.type, make)
    copy_gguf(base, path, replace=replace, keys={})
    return GgufFile(path)
