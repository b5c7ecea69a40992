"""What may be trained besides sparse entries: values inside weights, low-rank products, gains.

Only shapes and fixed data; the masters lie in a `Delta`'s theta, and how the engine is told of them
stands in `parameters`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError

Vector = NDArray[np.float32]
_LEAST_SHARE, _LEAST_STEP = 2.0**-10, 1e-7  # of a scale, as in native/inplace.h


@dataclass(frozen=True)
class Live:
    """Values inside a weight's bytes, edited in place.

    Attributes:
        kind: "scale" (the f16 scales of quantization blocks, and minima where the type has them) or
            "weight" (every weight of a float tensor).
        n_values: How many masters it has.
        relative: Masters are relative changes of the base's scales; else they are the values.
        limit: Masters of larger magnitude are not perturbed (Sparse-MeZO, arXiv 2402.15751).
    """

    kind: str
    n_values: int
    relative: bool = False
    limit: float = math.inf

    @property
    def size(self) -> int:
        """Number of masters."""
        return self.n_values

    def confine(self, masters: Vector, signs: NDArray[np.int8] | None) -> None:
        """Keep masters of scales, in place, at values that libzo would write (native/inplace.h).

        Args:
            masters: (n_values,).
            signs: Of the file's scales, (n_values,); unused where masters are relative.
        """
        if self.relative:
            np.maximum(masters, np.float32(_LEAST_SHARE - 1), out=masters)
            return
        assert signs is not None
        least = np.float32(_LEAST_STEP)
        np.maximum(masters, least, out=masters, where=signs > 0)
        np.minimum(masters, -least, out=masters, where=signs < 0)


@dataclass(frozen=True)
class Gain:
    """Relative changes of a norm's weight: the masters g make it w * (1 + g)."""

    n_values: int
    kind: str = "gain"

    @property
    def size(self) -> int:
        """Number of masters."""
        return self.n_values


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product added to a weight of shape (n_rows, n_cols).

    With `kind` "lora" the masters are A (rank, n_cols) and then B transposed (rank, n_rows), and
    the product is scale * B @ A. With "lora-fa" they are B transposed alone, and A is fixed
    (LoRA-FA, arXiv 2308.03303). With "subspace" they are one Z (rank, rank) per window, and the
    product is scale * the sum of left.T @ Z @ right over the windows (SubZero, arXiv 2410.08989).

    Attributes:
        left: float32 (n_windows, rank, n_rows) for "subspace"; else empty.
        right: float32 (n_windows, rank, n_cols) for "subspace", A as (1, rank, n_cols) for
            "lora-fa", empty for "lora".
        refresh: Steps until the next window is trained; 0 means never.
    """

    kind: str
    n_rows: int
    n_cols: int
    rank: int
    scale: float
    refresh: int
    left: Vector
    right: Vector

    @property
    def size(self) -> int:
        """Number of masters."""
        if self.kind == "subspace":
            return self.n_windows * self.rank**2
        return self.rank * (self.n_rows + (self.n_cols if self.kind == "lora" else 0))

    @property
    def n_windows(self) -> int:
        """Number of subspaces, one after another in the run."""
        return int(self.left.shape[0]) if self.kind == "subspace" else 1

    def window(self, step: int) -> int:
        """The subspace that the step after `step` steps trains."""
        return min(step // self.refresh, self.n_windows - 1) if self.refresh else 0

    def trained(self, step: int) -> slice:
        """The masters that the step after `step` steps perturbs."""
        if self.kind != "subspace":
            return slice(0, self.size)
        square = self.rank**2
        return slice(self.window(step) * square, (self.window(step) + 1) * square)

    def factors(self, masters: Vector, step: int | None = None) -> tuple[Vector, Vector]:
        """The product as left.T @ right.

        Args:
            masters: (size,).
            step: Leaves out subspaces that are all zero because their turn has not come.

        Returns:
            left (r, n_rows) and right (r, n_cols), r the rank or that of all windows together.
        """
        scale = np.float32(self.scale)
        if self.kind == "lora":
            a, b = np.split(masters, [self.rank * self.n_cols])
            return scale * b.reshape(self.rank, self.n_rows), a.reshape(self.rank, self.n_cols)
        if self.kind == "lora-fa":
            return scale * masters.reshape(self.rank, self.n_rows), self.right[0]
        n = self.n_windows if step is None else self.window(step) + 1
        z = masters.reshape(-1, self.rank, self.rank)[:n]
        left = scale * np.matmul(z.transpose(0, 2, 1), self.left[:n])
        return left.reshape(-1, self.n_rows), self.right[:n].reshape(-1, self.n_cols)


Edit = Live | LowRank | Gain
Edits = dict[str, Live | Gain]
Products = dict[str, LowRank]


def in_order(edits: Edits, low_rank: Products) -> list[tuple[str, Edit]]:
    """Edits and products by tensor, in the order of their masters."""
    return [*edits.items(), *low_rank.items()]


def describe(edits: Edits, low_rank: Products) -> list[list[Any]]:
    """The edits and products as JSON values, without arrays."""
    return [[name, *_described(edit)] for name, edit in in_order(edits, low_rank)]


def _described(edit: Edit) -> list[Any]:
    if isinstance(edit, Gain):
        return ["gain", edit.kind, edit.n_values]
    if isinstance(edit, Live):
        return ["live", edit.kind, edit.n_values, edit.relative, _finite(edit.limit)]
    shape = [edit.n_rows, edit.n_cols, edit.rank, edit.n_windows]
    return ["low-rank", edit.kind, *shape, edit.scale, edit.refresh]


def parse(rows: Any, arrays: dict[str, NDArray[Any]], what: str) -> tuple[Edits, Products]:
    """Rebuild what `describe` gave, with the fixed arrays found under NAME.left and NAME.right.

    Raises:
        ZoError: The rows are not what `describe` gives, or an array has another shape.
    """
    edits: Edits = {}
    low_rank: Products = {}
    try:
        for name, form, kind, *numbers in rows:
            if name in (low_rank if form == "low-rank" else edits):
                raise ValueError(f"two rows for {name}")
            if form == "live" and kind in ("scale", "weight"):
                n_values, relative, limit = numbers
                if type(relative) is not bool or (limit is not None and _number(limit) < 0):
                    raise ValueError(f"relative {relative!r}, limit {limit!r}")
                limit = math.inf if limit is None else float(limit)
                edits[name] = Live(kind, _count(n_values), relative, limit)
            elif form == kind == "gain":
                (n_values,) = numbers
                edits[name] = Gain(_count(n_values))
            elif form == "low-rank" and kind in ("lora", "lora-fa", "subspace"):
                *sizes, scale, refresh = numbers
                n_rows, n_cols, rank, n_windows = map(_count, sizes)
                if type(refresh) is not int or refresh < 0:
                    raise ValueError(f"the refresh {refresh!r}")
                lefts = n_windows if kind == "subspace" else 0
                rights = 0 if kind == "lora" else n_windows
                left = _array(arrays, f"{name}.left", (lefts, rank, n_rows))
                right = _array(arrays, f"{name}.right", (rights, rank, n_cols))
                scale = _number(scale)
                low_rank[name] = LowRank(kind, n_rows, n_cols, rank, scale, refresh, left, right)
            else:
                raise ValueError(f"{form} {kind}")
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ZoError(f"The {what} is damaged ({error}); make it again.") from error
    return edits, low_rank


def fixed_arrays(low_rank: Products) -> dict[str, NDArray[Any]]:
    """The arrays that are not trained, by their names in a file."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, edit in low_rank.items():
        fixed = {f"{name}.left": edit.left, f"{name}.right": edit.right}
        arrays |= {key: array for key, array in fixed.items() if array.size}
    return arrays


def _array(arrays: dict[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> Vector:
    array = arrays[name] if shape[0] else np.zeros(shape, np.float32)
    if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
        raise ValueError(f"{name} is not a finite float32 array of shape {shape}")
    return array


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 40:
        raise ValueError(f"the size {value!r}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"the number {value!r}")
    return float(value)


def _finite(limit: float) -> float | None:
    return None if math.isinf(limit) else limit
