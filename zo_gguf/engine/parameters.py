"""All trainable parameters of a model as one vector theta, and how libzo is told of them.

Made from a `Delta`: sparse entries go to a native store, edits of each kind to their own handles.
Needs no model, so that a trajectory can be replayed without one.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import AT_THETA as AT_THETA
from zo_gguf.libzo import FLOATS, NORMAL, Gain, Hook, InPlace, Library, LowRank, Part, Probe, Store
from zo_gguf.params import kinds
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import Edit, Live
from zo_gguf.params.scales import field_of, scale_resolution
from zo_gguf.system import all_finite

Vector = NDArray[np.float32]


class EditNoise:
    """z(seed) of one edit.

    Args:
        library: libzo.
        distribution: NORMAL or RADEMACHER: what z is drawn from.
    """

    def __init__(self, library: Library, distribution: int) -> None:
        self._library, self._distribution = library, distribution

    def of_gain(self, number: int, edit: kinds.Gain, seed: int) -> Vector:
        """z of the number-th gain, (edit.size,)."""
        return self._part(seed, Part.GAIN.tensor(number), slice(0, edit.size))

    def of_low_rank(self, number: int, edit: kinds.LowRank, step: int, seed: int) -> Vector:
        """z of the masters of the number-th product that the step after `step` steps trains."""
        return self._part(seed, Part.LOWRANK.tensor(number), edit.trained(step))

    def _part(self, seed: int, tensor: int, part: slice) -> Vector:
        z, kind = np.empty(part.stop - part.start, np.float32), self._distribution
        self._library.call(
            "zo_noise", kind, seed, tensor, part.start, z.size, z.ctypes.data_as(FLOATS)
        )
        return z


# ---- theta ---------------------------------------------------------------------------------------

SPARSE = "sparse"


class Parameters:
    """theta, z(seed), and the state of libzo at probes.

    Args:
        library: libzo.
        delta: What is trained, and the first theta.
        gguf: The base; only edits in place read it.
        n_threads: CPU threads.
        distribution: NORMAL or RADEMACHER: what z is drawn from.

    Raises:
        ZoError: The delta does not fit the base.
    """

    def __init__(
        self,
        library: Library,
        delta: Delta,
        gguf: GgufFile,
        n_threads: int,
        distribution: int = NORMAL,
    ) -> None:
        self._library, self._noise = library, EditNoise(library, distribution)
        self.delta, self._gguf = delta, gguf
        self._theta = delta.theta  # shared, and never changed here
        self.step: int | None = None  # all subspaces, as after the run
        self._units: dict[str, float] = {}
        self._live_kind = next((edit.kind for edit in delta.live.values()), "")
        self._slices = slices = delta.edit_slices()
        self._low_rank_slices = delta.low_rank_slices()
        self._store = self._in_place = self._low_rank = self._gain = None
        theta = delta.theta
        if delta.tensors:
            self._store = Store(library, n_threads, distribution)
            for name, part in delta.slices().items():
                self._store.add(name, delta.shapes[name], delta.tensors[name], theta[part])
        if delta.live:
            self._in_place = InPlace(library, n_threads, distribution)
            for name, live in delta.live.items():
                field, base = field_of(gguf, name, live)
                n_bytes = gguf.tensors[name].n_bytes
                self._in_place.add(name, field, n_bytes, theta[slices[name]])
                del base  # copied by now
        if delta.low_rank:
            self._low_rank = LowRank(library, n_threads, distribution)
            for name, edit in delta.low_rank.items():
                self._low_rank.add(name, (edit.n_rows, edit.n_cols))
        if delta.gains:
            self._gain = Gain(library)
            for name, gain in delta.gains.items():
                self._gain.add(name, gain.size)
        self._live_slices = [slices[name] for name in delta.live]
        self._factors_are_there = False

    @property
    def kinds(self) -> list[str]:
        """Kinds of parameters in the order of theta: "sparse", "scale", "weight", "gain", ..."""
        edits = [self._kind(edit) for _, edit, _ in self.delta.parts()]
        return list(dict.fromkeys(([SPARSE] if self.delta.tensors else []) + edits))

    def _kind(self, edit: Edit) -> str:
        """Edits in place go by the name of the first of them: they are written in one go."""
        return self._live_kind if isinstance(edit, Live) else edit.kind

    def set_units(self, units: Mapping[str, float]) -> None:
        """Lengths of a unit step per kind of parameter; 1 where nothing is said.

        Probes move a parameter by scale * unit * z. All edits in place share one.
        """
        self._units = dict(units)

    def units(self) -> Vector | None:
        """The unit of every parameter, (size,); None where all are 1."""
        if all(unit == 1 for unit in self._units.values()):
            return None
        result = np.full(self.size, self.unit(SPARSE), np.float32)
        for _, edit, part in self.delta.parts():
            result[part] = self.unit(self._kind(edit))
        return result

    def unit(self, kind: str) -> float:
        """The length of a unit step of a kind."""
        return self._units.get(kind, 1.0)

    @property
    def live_unit(self) -> float:
        """The length of a unit step of all edits in place."""
        return self.unit(self._live_kind)

    @property
    def size(self) -> int:
        """Number of masters."""
        return int(self._theta.size)

    @property
    def one_probe_per_decode(self) -> bool:
        """Whether probes cannot share a decode, because the weights themselves are edited."""
        return self._in_place is not None

    @property
    def are_editable(self) -> bool:
        """Whether all weights to be edited in place were found, and lie where they can be."""
        try:
            if self._in_place is not None:
                self._in_place.check()
        except ZoError:
            return False
        return True

    @property
    def resolution(self) -> float:
        """The smallest perturbation that reaches the model; below it, storage rounds it away."""
        live = self.delta.live
        if not live:
            return 0.0
        if any(edit.kind == "scale" and edit.relative for edit in live.values()):
            own = [scale_resolution(self._gguf, n) for n in live if live[n].kind == "scale"]
            return float(np.median(own))
        relative = {Type.F16: 2.0**-11, Type.BF16: 2.0**-8, Type.F32: 2.0**-24}
        return max(
            float(np.abs(self._theta[self._slices[name]]).mean())
            * relative.get(self._gguf.tensors[name].type, 2.0**-11)
            for name in live
        )

    def hook(self, n_threads: int, force_staged: bool = False) -> Hook:
        """A hook that applies these parameters."""
        return Hook(
            self._library,
            self._store,
            self._in_place,
            self._low_rank,
            self._gain,
            n_threads=n_threads,
            force_staged=force_staged,
        )

    def read(self) -> Vector:
        """A copy of theta, (size,)."""
        return self._theta.copy()

    def write(self, theta: Vector, step: int | None = None) -> None:
        """Replace theta, (size,), and say how many steps led to it.

        The array is shared, not copied: whoever changes it in place must write it again.

        Raises:
            ZoError: Wrong length, or values that are not finite.
        """
        if theta.shape != self._theta.shape:
            raise ZoError(f"theta has shape {theta.shape}, but {self.size} entries are trainable.")
        if not all_finite(theta):
            raise ZoError("theta would have NaN or infinite values.")
        self._theta = theta
        self.step = self.step if step is None else step
        if self._store is not None:
            self._store.write(self._theta[: self._store.size])
        if self._in_place is not None:
            self._in_place.write(self._of_live(theta))
        self._factors_are_there = False

    def _of_live(self, theta: Vector) -> Vector:
        """The masters of all edits in place, a view of theta where they lie side by side."""
        parts = self._live_slices
        if all(part.stop == after.start for part, after in pairwise(parts)):
            return theta[parts[0].start : parts[-1].stop]
        return np.concatenate([theta[part] for part in parts])

    def _write_factors(self) -> None:
        """Hand trained factors to libzo; for decodes alone, which replays and adapters have not."""
        self._factors_are_there = True
        for number, (name, edit) in enumerate(self.delta.low_rank.items()):
            if edit.kind == "lora" and self._low_rank is not None:
                masters, tensor = (
                    self._theta[self._low_rank_slices[name]],
                    Part.LOWRANK.tensor(number),
                )
                self._low_rank.train(number, edit.rank, edit.scale, tensor, masters)

    def noise(self, seed: int) -> Vector:
        """z(seed), (size,), at the current theta and step, in units; the same bits everywhere."""
        if self._store is not None and self._store.size == self.size:
            return self._store.noise(seed)
        z = np.zeros(self.size, np.float32)
        if self._store is not None:
            z[: self._store.size] = self._store.noise(seed)
        if self._in_place is not None:
            live, first = self._in_place.noise(seed), 0
            if live.size == self.size:
                return live
            for part in self._live_slices:
                n = part.stop - part.start
                z[part] = live[first : first + n]
                first += n
        for number, (name, gain) in enumerate(self.delta.gains.items()):
            z[self._slices[name]] = self._noise.of_gain(number, gain, seed)
        step = self.step or 0
        for number, (name, edit) in enumerate(self.delta.low_rank.items()):
            own = z[self._low_rank_slices[name]]
            own[edit.trained(step)] = self._noise.of_low_rank(number, edit, step, seed)
        return z

    def live_values(self) -> dict[str, Vector]:
        """Values of every edit in place at theta, (n_values,), before rounding to the type."""
        if self._in_place is None:
            return {}
        values, result, first = self._in_place.values(), {}, 0
        for name, edit in self.delta.live.items():
            result[name] = values[first : first + edit.size]
            first += edit.size
        return result

    def prepare(self, probes: Sequence[Probe]) -> list[Probe]:
        """Have libzo ready for a decode whose branches are at these probes.

        Returns:
            The branches as the hook needs them, which perturbs sparse entries by itself.

        Raises:
            ZoError: Weights cannot be edited in place; the sentence says which and why.
        """
        if self._in_place is not None:
            (probe,) = probes
            self._in_place.apply(Probe(probe.seed, probe.scale * self.live_unit))
        self.prepare_beside(probes)
        unit = self.unit(SPARSE)
        return [Probe(seed, scale * unit) for seed, scale in probes]

    def prepare_beside(self, probes: Sequence[Probe] = (AT_THETA,)) -> None:
        """As `prepare`, except for what is edited in place, whose memory may not be known yet."""
        if not self._factors_are_there:
            self._write_factors()
        for branch, probe in enumerate(probes):
            if self._gain is not None:
                self._set_gains(self._gain, branch, probe)
            if self._low_rank is not None:
                of_lora = Probe(probe.seed, probe.scale * self.unit("lora"))
                self._low_rank.probe(branch, of_lora)
                self._set_products(self._low_rank, branch, probe)

    def _set_gains(self, gain: Gain, branch: int, probe: Probe) -> None:
        seed, scale = probe
        for number, (name, edit) in enumerate(self.delta.gains.items()):
            masters = self._theta[self._slices[name]]
            if scale != 0:
                z = self._noise.of_gain(number, edit, seed)
                masters = masters + np.float32(scale * self.unit("gain")) * z
            gain.set(branch, number, 1 + masters)

    def _set_products(self, low_rank: LowRank, branch: int, probe: Probe) -> None:
        (seed, scale), step = probe, self.step or 0
        for number, (name, edit) in enumerate(self.delta.low_rank.items()):
            if edit.kind == "lora":
                continue
            masters = self._theta[self._low_rank_slices[name]]
            if scale != 0:
                masters = masters.copy()
                z = self._noise.of_low_rank(number, edit, step, seed)
                masters[edit.trained(step)] += np.float32(scale * self.unit(edit.kind)) * z
            low_rank.set(branch, number, *edit.factors(masters, self.step))

    def free(self) -> None:
        """Release the native objects."""
        for part in (self._store, self._in_place, self._low_rank, self._gain):
            if part is not None:
                part.free()
        self._store = self._in_place = self._low_rank = self._gain = None
