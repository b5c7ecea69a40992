"""`norm`: tune the weights of the norms (LayerNorm tuning, arXiv 2312.11420), by forward passes.

z ~ N(0, I) over one gain per norm weight; w * (1 + g + eps z) is applied to the norm's output, so
the file stays mapped and several probes share a decode. Memory: 8 bytes per weight and what the
optimizer keeps; a model has a few thousand of them per layer. The merged file is exact: norms are
float tensors. Norms with a row of weights for every head are left out.
"""

import re

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import is_idle
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import Edits, Gain
from zo_gguf.tuning.methods.method import Method

_NORM = re.compile(r"norm(_\d+)?\.weight$")


def norm(config: TuneConfig, gguf: GgufFile) -> Delta:
    """A gain of 0 for every weight of every norm, or of those that --train names.

    Raises:
        ZoError: The model has no such norms.
    """
    names = [
        name
        for name, info in gguf.tensors.items()
        if _NORM.search(name)
        and re.search(config.train or "", name)
        and len(info.shape) == 1
        and info.is_float
        and not is_idle(gguf, name)
    ]
    if not names:
        raise ZoError(
            f"{gguf.path.name!r} has no norm weights whose name matches {config.train or '.*'!r}; "
            "`zo-gguf info` lists what it has. --method lora trains beside the matrices."
        )
    edits: Edits = {name: Gain(gguf.tensors[name].n_cols) for name in names}
    theta = np.zeros(sum(edit.size for edit in edits.values()), np.float32)
    return Delta({}, {}, theta, DeltaHeader.of(gguf, "norm"), edits)


NORM = Method(norm, reads=("train",))
