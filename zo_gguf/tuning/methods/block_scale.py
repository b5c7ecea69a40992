"""`block-scale`: tune the f16 scales of quantization blocks (QZO, arXiv 2505.13430).

A block's weights are scale * code (and minimum, where the type has one); codes stay. With masters
theta, relative to the scales of the file, a scale is evaluated at d * (1 + theta + eps z), written
into the loaded blocks. The paper's absolute perturbation, eps = 1e-3, is 2.7 times a typical Q8_0
scale; `--absolute` reproduces it. Scales never change their sign. Stored: one f32 master per scale.
Memory: 12 bytes per scale, 8 more within a step, what the optimizer keeps, and no mapping of the
file. The merged file is exact, of the same size and types.
"""

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import matching_matrices
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import Edits, Live
from zo_gguf.params.scales import base_scales
from zo_gguf.tuning.methods.method import Method


def block_scale(config: TuneConfig, gguf: GgufFile) -> Delta:
    """The scales of all quantized attention and MLP matrices, or of those that --train names.

    Raises:
        ZoError: No tensor has scales, or a chosen one has none that can be tuned.
    """
    names = matching_matrices(gguf, config.train)
    names = [name for name in names if not gguf.tensors[name].is_float]
    if not names:
        raise ZoError(
            f"{gguf.path.name!r} has no quantized matrices whose name matches "
            f"{config.train or '.*'!r}; use --method dense for float tensors."
        )
    edits: Edits = {}
    parts = []
    for name in names:
        scales = base_scales(gguf, name)
        parts.append(scales if config.absolute else np.zeros_like(scales))
        edits[name] = Live("scale", scales.size, relative=not config.absolute)
    header = DeltaHeader.of(gguf, "block-scale")
    return Delta({}, {}, np.concatenate(parts), header, edits)


BLOCK_SCALE = Method(block_scale, reads=("absolute", "train"))
