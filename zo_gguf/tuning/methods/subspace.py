"""`subspace`: tune a small matrix Z between fixed random bases (SubZero, arXiv 2410.08989).

Each matrix W (m, n) gets W + c U Z V^T beside it, with U (m, r) and V (n, r) orthonormal, from QR
of seeded Gaussians, Z (r, r) the masters, and c = sqrt(m n) / r, which gives a perturbation the
size of a dense one. After `--refresh` steps new bases follow and the earlier products stay, so the
rank grows; 0 keeps one subspace. Memory: 8 r (m + n) bytes per matrix and window. The result is an
exact LoRA.
"""

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import check_rank, matching_matrices
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import LowRank, Products, Vector
from zo_gguf.tuning.methods.method import Method

RANK = 8
_MAX_RANK = 512  # of all windows of a matrix together


def subspace(config: TuneConfig, gguf: GgufFile) -> Delta:
    """Z = 0 for all attention and MLP matrices, or for those that --train names.

    Raises:
        ZoError: No matrix is chosen, or the windows of a whole run need too high a rank.
    """
    names = matching_matrices(gguf, config.train)
    n_windows = -(-config.n_steps // config.refresh) if config.refresh else 1
    rank = config.rank or RANK
    check_rank(gguf, names, rank)
    if n_windows * rank > _MAX_RANK:
        raise ZoError(
            f"{n_windows} subspaces of rank {rank} need rank {n_windows * rank}, but "
            f"at most {_MAX_RANK} is possible; lower --rank, or raise --refresh (0: one subspace "
            "for the whole run)."
        )
    products: Products = {}
    for number, name in enumerate(names):
        n_rows, n_cols = gguf.tensors[name].shape
        left, right = (
            [_basis([config.seed, number, k, side], n, rank) for k in range(n_windows)]
            for side, n in enumerate((n_rows, n_cols))
        )
        products[name] = LowRank(
            "subspace",
            n_rows,
            n_cols,
            rank,
            float(np.sqrt(n_rows * n_cols) / rank),
            config.refresh,
            np.stack(left),
            np.stack(right),
        )
    theta = np.zeros(sum(product.size for product in products.values()), np.float32)
    header = DeltaHeader.of(gguf, "subspace")
    return Delta({}, {}, theta, header, low_rank=products)


SUBSPACE = Method(subspace, reads=("rank", "refresh", "train"), rank=RANK)


def _basis(seed: list[int], n: int, rank: int) -> Vector:
    """Orthonormal vectors as rows, float32 (rank, n)."""
    random = np.random.Generator(np.random.PCG64(seed))
    basis = np.linalg.qr(random.standard_normal((n, rank)))[0]
    return np.ascontiguousarray(basis.T, dtype=np.float32)
