"""`dense`: tune every weight of float tensors (MeZO, arXiv 2305.17333).

z ~ N(0, I) over all weights of the chosen tensors; w + eps z is rounded to the tensor's type and
written into the loaded weights, from f32 masters. On a quantized GGUF the norms and biases are
float: the cheapest thing to tune. Memory: 8 bytes per weight, 8 more within a step, what the
optimizer keeps, and no mapping of the file. The merged file is the same with these tensors edited.
"""

import re

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import is_idle
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import Edits, Live
from zo_gguf.params.scales import base_weights
from zo_gguf.tuning.methods.method import Method

_TRAINABLE = re.compile(r"\.(weight|bias)$")
_NOT_WEIGHTS = re.compile(r"^rope_|_scale\.|inv_freq")


def dense(config: TuneConfig, gguf: GgufFile) -> Delta:
    """All float tensors, or those that --train names.

    Raises:
        ZoError: There is none, or a named one is quantized.
    """
    names = [n for n in gguf.tensors if _TRAINABLE.search(n) and not _NOT_WEIGHTS.search(n)]
    names = [n for n in names if not is_idle(gguf, n)]
    if config.train is not None:
        names = [n for n in names if re.search(config.train, n)]
    else:
        names = [n for n in names if gguf.tensors[n].is_float]
    if not names:
        raise ZoError(
            f"{gguf.path.name!r} has no float tensors whose name matches "
            f"{config.train or '.*'!r}; `zo-gguf info` lists what it has."
        )
    weights = {name: base_weights(gguf, name) for name in names}
    edits: Edits = {name: Live("weight", value.size) for name, value in weights.items()}
    header = DeltaHeader.of(gguf, "dense")
    return Delta({}, {}, np.concatenate(list(weights.values())), header, edits)


DENSE = Method(dense, reads=("train",))
