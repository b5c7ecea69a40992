"""A mask or delta for one GGUF, with everything refused that the hook cannot tune."""

import os

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask
from zo_gguf.params.sparse_file import kind_of


def open_entries(
    source: Mask | Delta | str | os.PathLike[str] | None, gguf: GgufFile
) -> Delta | None:
    """Load a mask or delta if `source` is a path, and check that it belongs to `gguf`.

    A mask becomes a delta whose theta are the residuals.

    Raises:
        ZoError: Not a mask or delta, made for another file, or entries in a weight that no plain
            matrix product reads.
    """
    if source is None:
        return None
    if not isinstance(source, Mask | Delta):
        is_delta = os.path.isdir(source) or kind_of(source) == "delta"
        source = Delta.load(source) if is_delta else Mask.load(source)
    source.check_base(gguf)
    delta = source if isinstance(source, Delta) else Delta.from_mask(source, source.theta0(), {})
    for name in [*delta.tensors, *delta.low_rank]:
        refuse_untunable(name, gguf)
    return delta


def refuse_untunable(name: str, gguf: GgufFile) -> None:
    """Raise ZoError for a weight that is more than the matrix of one matrix product."""
    shape = gguf.tensors[name].shape
    if len(shape) != 2:
        raise ZoError(
            f"The weight {name!r} of shape {tuple(shape)} holds mixture-of-experts or batched "
            "matrices, which cannot be tuned; leave it out with --exclude."
        )
    if name.startswith("token_embd"):
        raise ZoError(
            f"The embedding {name!r} is read by row, and by the head too where the two are tied, "
            "so it cannot be tuned; leave it out with --exclude."
        )
