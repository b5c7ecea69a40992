"""Trainable parameters in the A and B tensors of a stock LoRA adapter (`--path adapter`).

llama.cpp adds an adapter's product on every backend it has. So where libzo has no kernel, a probe
is written into the adapter's tensors between decodes: no callback, one probe per decode. It holds
what is exactly a product of low rank: sparse entries on few rows and columns, lora and subspace.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zo_gguf.engine.model import load_adapter
from zo_gguf.engine.parameters import SPARSE, Parameters
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import NORMAL, Library, Probe, Tensors
from zo_gguf.params.delta import Delta
from zo_gguf.params.lora import SparseFactors, check_lora, write_factors

Vector = NDArray[np.float32]
EnginePath = Literal["hook", "adapter"]


def check_adapter(gguf: GgufFile, delta: Delta) -> None:
    """Refuse parameters that an adapter cannot hold.

    Raises:
        ZoError: Says which, and what to do instead.
    """
    try:
        check_lora(gguf, delta, None)
    except ZoError as error:
        raise ZoError(f"{str(error).split(';')[0]}; use --path hook.") from error


def choose_path(path: str, gguf: GgufFile, delta: Delta | None, staged: bool) -> EnginePath:
    """ "hook" or "adapter": what was asked for, or what is faster.

    Args:
        path: Also "auto".
        gguf: The base.
        delta: What is trained, if anything.
        staged: Whether the hook would have to copy activations to the host and back, and
            nothing else needs it.

    Raises:
        ZoError: There is no such path, or an adapter is asked for and cannot hold the parameters.
    """
    if path not in ("auto", "hook", "adapter"):
        raise ZoError(f"path is {path!r}; use 'auto', 'hook' or 'adapter'.")
    if delta is None or path == "hook" or (path == "auto" and not staged):
        return "hook"
    try:
        check_adapter(gguf, delta)
    except ZoError:
        if path == "auto":
            return "hook"
        raise
    return "adapter"


class AdapterParameters(Parameters):
    """theta in an adapter of the model.

    Args:
        model: llama.cpp's handle; the adapter lives as long as it.
        library, delta, gguf, n_threads, distribution: As for `Parameters`.

    Attributes:
        adapter: llama.cpp's handle.
        tensors: Finds the adapter's tensors in a decode, which must come before the first probe.

    Raises:
        ZoError: llama.cpp refuses the adapter.
    """

    def __init__(
        self,
        model: Any,
        library: Library,
        delta: Delta,
        gguf: GgufFile,
        n_threads: int,
        distribution: int = NORMAL,
    ) -> None:
        super().__init__(library, delta, gguf, n_threads, distribution)
        self._sparse_slices = delta.slices()
        self._layouts = {
            name: SparseFactors(indices, delta.shapes[name])
            for name, indices in delta.tensors.items()
        }
        self._parts = [(SPARSE, part) for part in self._sparse_slices.values()]
        self._parts += [(edit.kind, part) for _, edit, part in delta.parts()]
        factors = {name: self._factors(name, delta.theta) for name in delta.changed}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.gguf"
            write_factors(gguf, factors, path, keys={})
            self.adapter = load_adapter(model, path)
        self.tensors = Tensors(library)
        for name, (a, b) in factors.items():
            self.tensors.add(f"{name}.lora_a", a.nbytes)
            self.tensors.add(f"{name}.lora_b", b.nbytes)

    @property
    def one_probe_per_decode(self) -> bool:
        """True: the adapter holds one set of values."""
        return True

    def prepare(self, probes: Sequence[Probe]) -> list[Probe]:
        """Write the only probe into the adapter; nothing is left for a hook.

        Raises:
            ZoError: The tensors lie where they cannot be written.
        """
        ((seed, scale),) = probes
        live = self.read()
        if scale != 0:
            z = self.noise(seed)
            for kind, part in self._parts:
                live[part] += np.float32(scale * self.unit(kind)) * z[part]
        for number, name in enumerate(self.delta.changed):
            a, b = self._factors(name, live)
            self.tensors.set(2 * number, a)
            self.tensors.set(2 * number + 1, b)
        return []

    def _factors(self, name: str, live: Vector) -> tuple[Vector, Vector]:
        """a (rank, n_cols) and b (n_rows, rank) of a tensor, as `exact_factors` orders them."""
        factors = []
        edit = self.delta.low_rank.get(name)
        if edit is not None:
            left, right = edit.factors(live[self._low_rank_slices[name]])
            factors.append((right, left.T))
        if name in self._layouts:
            factors.append(self._layouts[name].with_values(live[self._sparse_slices[name]]))
        a, b = zip(*factors, strict=True)
        return np.concatenate(a), np.concatenate(b, axis=1)

    def free(self) -> None:
        """Release the native objects."""
        super().free()
        self.tensors.free()
