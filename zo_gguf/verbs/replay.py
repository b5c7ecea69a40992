"""`zo-gguf replay`: rebuild a run's delta from its trajectory, without any forward pass."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from zo_gguf.config import ReplayConfig, takes
from zo_gguf.config.tune import parse_units
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import fixed_arrays
from zo_gguf.system import check_output
from zo_gguf.tuning.estimators import estimator_of
from zo_gguf.tuning.run import Run, first_state, open_trajectory, require_run, run_files
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import Trajectory

_log = logging.getLogger(__name__)
_DELTA = "delta.safetensors"


@dataclass(frozen=True)
class ReplayResult:
    """A rebuilt delta and, where the run has one of that step, whether its bits are the same."""

    delta: Delta
    step: int
    identical: bool | None
    output: str | None

    def render(self, as_json: bool = False) -> str:
        """One or two sentences, or JSON."""
        if as_json:
            facts = {"step": self.step, "identical": self.identical, "output": self.output}
            return json.dumps({"weights": self.delta.nnz} | facts)
        comparison = {
            None: "The run has no delta of this step to compare with.",
            True: "Every bit equals the run's delta.safetensors.",
            False: "It differs from the run's delta.safetensors.",
        }[self.identical]
        written = f" Written to {self.output}." if self.output else ""
        return f"Replayed {self.step} steps, {self.delta.nnz} weights. {comparison}{written}"


@takes(ReplayConfig)
def replay(config: ReplayConfig) -> ReplayResult:
    """Rebuild the delta of a run.

    Args:
        config: Without `step`, the step of the run's delta.safetensors, or the last one while
            there is none.

    Raises:
        ZoError: The run's files are missing or damaged, or the step lies beyond the trajectory.
    """
    run = require_run(config.run)
    if config.output:
        inputs = [path for path in run_files(run.path, run.config) if path.name != _DELTA]
        check_output(config.output, overwrite=config.overwrite, inputs=inputs)
    if not estimator_of(run.config).probes:
        raise ZoError(
            f"The gradients of --estimator {run.config.estimator} are too long to be recorded, so "
            "there is nothing to replay; `zo-gguf tune` with the same options and --threads makes "
            "the same bits again."
        )
    trainable = Trainable(run.config, run.first_delta())
    trajectory = open_trajectory(run, trainable)
    known, step = _known(run), config.step
    if step is None:
        step = known.header.provenance["step"] if known else _step_of_delta(run, trajectory)
    if step > trajectory.n_records:
        raise ZoError(f"Step {step} was not reached; the trajectory has {trajectory.n_records}.")
    state = first_state(trainable, run.config.optimizer)
    trainable.place(0)
    trainable.set_units(parse_units(run.config.unit))
    with tqdm(total=step, desc="replay", unit="step", disable=None, leave=False) as bar:
        for record in trajectory.records():
            if record.step > step:
                break
            state.replay(record, trainable)
            bar.update(1)
    delta = trainable.to_delta({"step": step, "replayed": True})
    identical = None
    if known is not None and known.header.provenance["step"] == step:
        identical = _same_bits(known, delta)
        delta = trainable.to_delta(known.header.provenance)
    if config.output:
        delta.save(Path(config.output))
    return ReplayResult(delta, step, identical, config.output)


def _same_bits(known: Delta, made: Delta) -> bool:
    """Whether masters and, where there are any, bases of subspaces are the same."""
    arrays, others = (
        {"theta": delta.theta, **fixed_arrays(delta.low_rank)} for delta in (known, made)
    )
    return arrays.keys() == others.keys() and all(
        array.tobytes() == others[name].tobytes() for name, array in arrays.items()
    )


def _known(run: Run) -> Delta | None:
    """The run's delta, if it has one that can be read."""
    path = run.path / _DELTA
    try:
        return Delta.load(path) if path.is_file() else None
    except ZoError as error:
        _log.warning("%s Replaying without it; -o FILE saves the result.", error)
        return None


def _step_of_delta(run: Run, trajectory: Trajectory) -> int:
    """The step of a delta that was there and cannot be read, or else the last one."""
    run.validations = {line["step"]: line for line in run.metrics() if "valid_loss" in line}
    best = run.best_step() if (run.path / _DELTA).is_file() else None
    return trajectory.n_records if best is None else best
