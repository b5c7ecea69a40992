"""`lora`: tune the factors of a LoRA adapter (MeZO's LoRA variant, arXiv 2305.17333).

Each matrix W (m, n) gets W + (alpha / r) B A beside it, A (r, n) starting at seeded Gaussians of
variance 1 / (3 n), as a uniform Kaiming start has, and B (m, r) at zero; both are perturbed
at once. alpha = 2 r. Memory: 12 r (m + n) bytes per matrix. The result is a LoRA GGUF as it stands.
"""

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import check_rank, matching_matrices
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import LowRank, Products
from zo_gguf.tuning.methods.method import Method

RANK = 8
_SCALE = 2.0  # alpha / rank


def lora(config: TuneConfig, gguf: GgufFile) -> Delta:
    """A and B of all attention and MLP matrices, or of those that --train names.

    Raises:
        ZoError: No matrix is chosen, or one cannot have this rank.
    """
    names = matching_matrices(gguf, config.train)
    rank = config.rank or RANK
    check_rank(gguf, names, rank)
    products: Products = {}
    masters = []
    none = np.zeros((0, 0, 0), np.float32)
    for number, name in enumerate(names):
        n_rows, n_cols = gguf.tensors[name].shape
        random = np.random.Generator(np.random.PCG64([config.seed, number]))
        a = random.standard_normal((rank, n_cols)) / np.sqrt(3 * n_cols)
        masters += [a.astype(np.float32).reshape(-1), np.zeros(rank * n_rows, np.float32)]
        products[name] = LowRank("lora", n_rows, n_cols, rank, _SCALE, 0, none, none)
    header = DeltaHeader.of(gguf, "lora")
    return Delta({}, {}, np.concatenate(masters), header, low_rank=products)


LORA = Method(lora, reads=("rank", "train"), rank=RANK)
