"""What quantization took from the chosen weights: positions and two GGUFs -> mask.

Method: SensZOQ (arXiv 2406.02913) keeps the chosen weights unquantized; here they are the
dequantized weight plus a residual. Reads only the rows that hold chosen weights.
"""

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.masks.positions import Positions
from zo_gguf.params.mask import Mask, MaskHeader

_SAME_MODEL = 0.8  # relative error of a 1-bit quant is about 0.6, of an unrelated model 1.4


def make_mask(positions: Positions, floats: GgufFile, base: GgufFile) -> tuple[Mask, float]:
    """The mask of one quantized GGUF: the positions, with what quantization took from them.

    Args:
        positions: Chosen weights.
        floats: The model's float GGUF.
        base: The quantized GGUF.

    Returns:
        The mask, and the residuals' root mean square relative to that of the weights.

    Raises:
        ZoError: `base` is not a quantized form of the same model.
    """
    tensors: dict[str, NDArray[np.int64]] = {}
    residuals: dict[str, NDArray[np.float32]] = {}
    sums = np.zeros(2)  # of squared residuals and weights
    for name in _common(positions, floats, base):
        rows, cols = np.divmod(positions.tensors[name], positions.shapes[name][1])
        rows, at = np.unique(rows, return_inverse=True)
        wanted = floats.dequantize(name, rows)  # (n_touched_rows, n_cols)
        error = wanted - base.dequantize(name, rows)
        if np.linalg.norm(error) > _SAME_MODEL * np.linalg.norm(wanted):
            raise ZoError(
                f"{name!r} of {base.path.name!r} differs too much from the model's weights; "
                "is it a quantized form of this very model?"
            )
        tensors[name] = positions.tensors[name]
        residuals[name] = np.ascontiguousarray(error[at, cols])
        sums += np.square(residuals[name]).sum(), np.square(wanted[at, cols]).sum()
    header = MaskHeader(
        base_name=base.path.name,
        base_sha256=base.sha256(),
        score=positions.score,
        density=positions.density,
        max_rank=positions.max_rank,
        calibration=positions.calibration,
    )
    shapes = {name: positions.shapes[name] for name in tensors}
    relative = float(np.sqrt(sums[0] / sums[1])) if sums[1] > 0 else 0.0
    return Mask(tensors, residuals, shapes, header), relative


def _common(positions: Positions, floats: GgufFile, base: GgufFile) -> list[str]:
    """The chosen tensors in the base's file order, all of which it must have in the same shape."""
    if floats.architecture != base.architecture:
        raise ZoError(
            f"{base.path.name!r} is of architecture {base.architecture!r}, the model of "
            f"{floats.architecture!r}."
        )
    for name, shape in positions.shapes.items():
        if name not in base.tensors or base.tensors[name].shape != shape:
            raise ZoError(
                f"{base.path.name!r} has no {name!r} of shape {shape}; is it of the same model?"
            )
    return [name for name in base.tensors if name in positions.tensors]
