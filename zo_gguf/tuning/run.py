"""The run directory: what a run leaves on disk, and how a killed run comes back to life.

    RUN/config.yaml          every option, resolved
    RUN/trajectory.bin       the truth: one record per step, written before theta moves
    RUN/metrics.jsonl        losses and accuracies for people and plots
    RUN/targets.safetensors  what rows with choices aim at, where that is not their answers
    RUN/start.safetensors    the first theta, where the method chose by looking at rows
    RUN/checkpoints/         state.safetensors, latest.safetensors, best.safetensors
    RUN/delta.safetensors, loss.png, summary.json    written at the end, as is
    RUN/env.json             versions, and hashes of base, mask and data

A checkpoint only saves time: state at step n and the records after n give the same bits as an
uninterrupted run.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from zo_gguf.config import TuneConfig, load_config, save_config
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import fixed_arrays
from zo_gguf.params.sparse_file import digest
from zo_gguf.system import atomic_write, require_file
from zo_gguf.tuning.estimators.base import mean_of_directions
from zo_gguf.tuning.optimizer import Optimizer, make_optimizer
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import Record, Trajectory, older_version

TARGETS_FILE = "targets.safetensors"
START_FILE = "start.safetensors"
_STEP_KEY = "step"
_NOTE_KEY = "zo_gguf"


@dataclass
class State:
    """What a step changes: the masters, the optimizer's memory and the step number.

    Attributes:
        theta: Float32 (nnz,), shared with the `Trainable`.
    """

    step: int
    theta: NDArray[np.float32]
    optimizer: Optimizer

    def replay(self, record: Record, trainable: Trainable) -> None:
        """Commit a step that was measured before; as `apply`."""
        self.apply(record, mean_of_directions(record.directions, trainable.noise), trainable)

    def apply(self, record: Record, gradient: NDArray[np.float32], trainable: Trainable) -> None:
        """Commit a step. The only place where theta changes, while tuning and replaying alike.

        Args:
            record: The step's number and learning rate.
            gradient: Its estimate, (nnz,).
            trainable: The parameters.

        Raises:
            ZoError: theta is not finite any more.
        """
        assert record.step == self.step + 1
        if trainable.begins_anew(self.step):  # moments of other directions mean nothing
            self.optimizer.reset()
        with np.errstate(over="ignore", invalid="ignore"):  # `place` refuses it
            units = trainable.units()
            if units is None:
                self.optimizer.update(self.theta, gradient, record.lr)
            else:  # the optimizer works on theta in units
                change = np.zeros_like(self.theta)
                self.optimizer.update(change, gradient, record.lr)
                self.theta += units * change
        trainable.confine()
        self.step = record.step
        trainable.place(self.step)


def first_state(trainable: Trainable, optimizer: str) -> State:
    """The state before the first step of a `Trainable` that has made none.

    Raises:
        ZoError: There is no such optimizer.
    """
    theta = trainable.delta.theta
    return State(0, theta, make_optimizer(optimizer, theta.size, trainable.n_lasting))


@dataclass
class Run:
    """An open run directory.

    Attributes:
        path: The folder.
        config: Its options.
        validations: step -> {"valid_loss", "valid_accuracy", ...}, from metrics.jsonl.
    """

    path: Path
    config: TuneConfig
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def check_folder(cls, config: TuneConfig) -> None:
        """Raise ZoError if the run folder holds something and --overwrite was not given."""
        path = Path(config.output)
        if path.exists() and not path.is_dir():
            raise ZoError(f"The run folder {str(path)!r} is a file; give another -o.")
        if path.is_dir() and any(path.iterdir()) and not config.overwrite:
            go_on = "give another -o, or --overwrite"
            if (path / "config.yaml").is_file():
                go_on = f"go on with `zo-gguf tune --resume {path}`, {go_on}"
            raise ZoError(f"The run folder {str(path)!r} is not empty; {go_on}.")

    @classmethod
    def create(cls, config: TuneConfig) -> "Run":
        """Make a new run directory; with --overwrite, the files of an older run go first.

        Raises:
            ZoError: As `check_folder`.
        """
        cls.check_folder(config)
        path = Path(config.output)
        for name in OWN_FILES:
            (path / name).unlink(missing_ok=True)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        run.save_config(config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Open the directory of a run that was started before.

        Raises:
            ZoError: As `load_options`.
        """
        path = Path(path)
        run = cls(path, load_options(path))
        (path / "checkpoints").mkdir(exist_ok=True)
        return run

    def save_config(self, config: TuneConfig) -> None:
        """Write the options; called again when automatic ones have been resolved."""
        self.config = config
        save_config(config, self.path / "config.yaml")

    @property
    def trajectory_path(self) -> Path:
        """RUN/trajectory.bin."""
        return self.path / "trajectory.bin"

    def first_delta(self) -> Delta | None:
        """What the method chose by looking at rows, at its first theta; None if it did not.

        Raises:
            ZoError: The file is damaged.
        """
        path = self.path / START_FILE
        return Delta.load(path) if path.is_file() else None

    def keep_first(self, delta: Delta) -> None:
        """Write what `first_delta` reads."""
        delta.save(self.path / START_FILE)

    def checkpoint(self, name: str) -> Path:
        """RUN/checkpoints/NAME.safetensors."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    # ---- metrics ---------------------------------------------------------------------------------

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl; validations are kept in memory too."""
        if "valid_loss" in values:
            self.validations[values[_STEP_KEY]] = values
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def reload_metrics(self, last_step: int) -> None:
        """Drop lines that are torn or of steps that the trajectory does not have."""
        kept = [line for line in self.metrics() if line[_STEP_KEY] <= last_step]
        self.validations = {line[_STEP_KEY]: line for line in kept if "valid_loss" in line}
        with atomic_write(self.path / "metrics.jsonl") as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The readable lines of metrics.jsonl."""
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by a kill
            if isinstance(values, dict) and isinstance(values.get(_STEP_KEY), int):
                yield values

    def best_step(self) -> int | None:
        """The step with the lowest validation loss, the earliest of equals; None without any."""
        if not self.validations:
            return None
        return min(self.validations, key=lambda step: (self.validations[step]["valid_loss"], step))

    # ---- state -----------------------------------------------------------------------------------

    def save_state(self, state: State) -> None:
        """Write checkpoints/state.safetensors."""
        arrays = _arrays(state)
        with atomic_write(self.checkpoint("state")) as file:
            # safetensors has no checksum of its own; one entry, so that the bytes are reproducible.
            note = json.dumps({_STEP_KEY: state.step, "sha256": digest(*arrays.values())})
            file.write(serialize(arrays, metadata={_NOTE_KEY: note}))

    def load_state(self, trainable: Trainable, last_step: int) -> State:
        """The newest saved state, or the first one where none was saved.

        Raises:
            ZoError: The checkpoint is damaged, of another mask, or ahead of the trajectory.
        """
        state = first_state(trainable, self.config.optimizer)
        path = self.checkpoint("state")
        if not path.is_file():
            return state
        wanted = _arrays(state)
        fix = f"delete {str(path)!r}: it only saves time, the trajectory has everything"
        try:
            with safe_open(path, framework="numpy") as file:
                note = json.loads((file.metadata() or {})[_NOTE_KEY])
                step = int(note[_STEP_KEY])
                for name, value in wanted.items():
                    loaded = file.get_tensor(name)
                    if loaded.shape != value.shape or loaded.dtype != value.dtype:
                        raise ZoError(f"The checkpoint is of another run ({name}); {fix}.")
                    value[...] = loaded
            if digest(*wanted.values()) != note["sha256"]:
                raise ValueError("its checksum differs")
        except ZoError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ZoError(f"The checkpoint is damaged ({error}); {fix}.") from error
        if not 0 <= step <= last_step:
            raise ZoError(
                f"The checkpoint is at step {step}, but the trajectory ends at {last_step}; {fix}."
            )
        state.step = step
        return state


OWN_FILES = (
    "config.yaml",
    "env.json",
    "trajectory.bin",
    "metrics.jsonl",
    TARGETS_FILE,
    START_FILE,
    "delta.safetensors",
    "loss.png",
    "summary.json",
    *(f"checkpoints/{name}.safetensors" for name in ("state", "latest", "best")),
)


def load_options(folder: Path) -> TuneConfig:
    """The options of a run.

    Raises:
        ZoError: It is no run folder, its config is damaged, or an older zo-gguf has begun it.
    """
    if not (folder / "config.yaml").is_file():
        raise ZoError(
            f"{str(folder)!r} is not a run folder (it has no config.yaml); check the path."
        )
    if version := older_version(folder / "trajectory.bin"):
        raise ZoError(
            f"The run {str(folder)!r} was begun by zo-gguf {version}; resume and replay it with "
            "that version, or begin it anew with --overwrite."
        )
    return load_config(TuneConfig, folder / "config.yaml")


def open_trajectory(
    run: Run, trainable: Trainable, of_rows: Mapping[str, Any] | None = None
) -> Trajectory:
    """The run's trajectory, made if the run has not begun; checked against base and options.

    Args:
        run, trainable: The run, and its parameters.
        of_rows: What the header is to say of the data; a replay, which reads none, has nothing.

    Raises:
        ZoError: It is damaged, or belongs to another base, mask, data or optimizer.
    """
    options = ("directions", "estimator", "optimizer", "method", "seed")
    header = {name: getattr(run.config, name) for name in options} | {
        "base_sha256": trainable.base_sha256,
        "nnz": trainable.delta.nnz,
        "theta0_sha256": trainable.theta0_sha256,
        "bases_sha256": digest(*fixed_arrays(trainable.delta.low_rank).values()),
        **(of_rows or {}),
    }
    if not run.trajectory_path.exists():
        return Trajectory.create(run.trajectory_path, header)
    trajectory = Trajectory.load(run.trajectory_path)
    for name, value in header.items():
        recorded = trajectory.header.get(name)
        if recorded != value:
            raise ZoError(
                f"The trajectory of {str(run.path)!r} has {name} {recorded}, but now it is "
                f"{value}; put the original mask, data and config.yaml back."
            )
    return trajectory


def _arrays(state: State) -> dict[str, NDArray[np.floating]]:
    return {"theta": state.theta} | {
        f"optimizer.{name}": value for name, value in state.optimizer.state.items()
    }


def run_files(folder: Path, config: TuneConfig | None = None) -> list[Path]:
    """The files of a run that are there and, by its options, those it was made from."""
    own = [folder / name for name in OWN_FILES]
    sources = [Path(config.model), Path(config.mask)] if config else []
    return [path for path in (*own, *sources) if path.is_file()]


def require_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory that has a trajectory.

    Raises:
        ZoError: It has none.
    """
    run = Run.open(path)
    require_file(run.trajectory_path, "trajectory")
    return run
