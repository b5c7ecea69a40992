"""`magnitude`: tune the weights of small magnitude (Sparse-MeZO, arXiv 2402.15751).

Per matrix, a threshold h is fixed before training so that a share (`--density`, 0.25 by default) of
its weights that are not 0 lies at or below it (a pruned matrix has zeros beside these, which move
too; one of zeros alone is left out); z is 0 where |w| > h. On float matrices the mask follows the
weights as they move, is recomputed in every pass and stored nowhere; they are edited in place, as
in `dense`; the default learning rate keeps most weights below it. A quantized matrix shares its
bytes among weights, so there the smallest ones (0.1 % by default) are fixed at the start and tuned
beside it, as in `sensitive`. Many are equally small, so which of them is drawn at random.
"""

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import matching_matrices
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import Edits, Live
from zo_gguf.params.scales import base_weights
from zo_gguf.params.select import top_k
from zo_gguf.tuning.methods.method import Method

_IN_PLACE_SHARE, _SPARSE_SHARE = 0.25, 0.001


def magnitude(config: TuneConfig, gguf: GgufFile) -> Delta:
    """The small weights of all attention and MLP matrices, or of those that --train names.

    Raises:
        ZoError: No matrix is chosen, or all are of zeros.
    """
    names = matching_matrices(gguf, config.train)
    edits: Edits = {}
    tensors, shapes, masters = {}, {}, []
    for number, name in enumerate(names):
        info = gguf.tensors[name]
        if info.is_float:
            weights = base_weights(gguf, name)
            sizes = np.abs(weights[weights != 0])
            if sizes.size == 0:
                continue
            limit = np.quantile(sizes, config.density or _IN_PLACE_SHARE)
            edits[name] = Live("weight", weights.size, limit=float(np.float32(limit)))
            masters.append(weights)
        else:
            weights = np.abs(gguf.dequantize(name).reshape(-1))
            n = max(1, round((config.density or _SPARSE_SHARE) * weights.size))
            random = np.random.Generator(np.random.PCG64([config.seed, number]))
            tensors[name] = top_k(-weights, n, random)
            shapes[name] = (info.shape[0], info.shape[1])
    if not edits and not tensors:
        raise ZoError(f"The matrices of {gguf.path.name!r} are all zero; use another model.")
    n_sparse = sum(indices.size for indices in tensors.values())
    theta = np.concatenate([np.zeros(n_sparse, np.float32), *masters])
    header = DeltaHeader.of(gguf, "magnitude")
    return Delta(tensors, shapes, theta, header, edits)


MAGNITUDE = Method(magnitude, reads=("density", "train"))
