"""`sensitive`: tune a fixed, sparse set of weights beside the quantized ones (SensZOQ, 2406.02913).

z ~ N(0, I) over the mask's entries of all matrices at once; the model is evaluated at
W + S(theta + eps z), with W as stored in the GGUF and S the scatter to the mask's positions, added
to each matrix product's output. Stored: one f32 master per entry, starting at the quantization
residual, so that the tuned entries start at full precision. Memory: some 40 bytes per entry, and
what the optimizer keeps. Limits: 2-D weights of plain matrix products; the embedding is not tuned.
"""

from zo_gguf.config import TuneConfig
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask
from zo_gguf.tuning.methods.method import Method


def sensitive(config: TuneConfig, gguf: GgufFile) -> Delta:
    """The entries of the run's mask, at its residuals.

    Raises:
        ZoError: The mask is missing, damaged, or of another base.
    """
    mask = Mask.load(config.mask)
    mask.check_base(gguf)
    return Delta.from_mask(mask, mask.theta0(), {})


SENSITIVE = Method(sensitive, reads=("mask",))
