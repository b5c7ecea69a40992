"""`zo-gguf tune`: zeroth-order fine-tuning. Read this file first.

A step draws rows, measures the loss near theta along random directions, writes what it measured to
the trajectory, and commits. The loop knows no method or optimizer.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zo_gguf.config import TuneConfig, takes
from zo_gguf.config.tune import parse_units
from zo_gguf.data.dataset import Draw, Example, digest_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.evaluation import EvalResult, measure
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta
from zo_gguf.system import Interrupt, locked, require_file
from zo_gguf.tuning.calibrate import resolve
from zo_gguf.tuning.estimators import estimates, estimator_of
from zo_gguf.tuning.optimizer import Clip, learning_rate
from zo_gguf.tuning.options import settle
from zo_gguf.tuning.report import Progress, TuneResult, finish
from zo_gguf.tuning.rows import load_rows
from zo_gguf.tuning.run import TARGETS_FILE, Run, State, open_trajectory
from zo_gguf.tuning.targets import choose_targets
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import Record, Trajectory

_START_AGAIN = (
    "Start again with a lower --learning-rate or another --eps. The best checkpoint is kept."
)


@dataclass
class Session:
    """Everything the loop needs, opened."""

    run: Run
    trainable: Trainable
    engine: Engine
    draw: Draw
    valid: Sequence[Example]
    trajectory: Trajectory
    state: State
    clip: Clip

    @property
    def config(self) -> TuneConfig:
        """The run's options, resolved."""
        return self.run.config


@takes(TuneConfig)
def tune(config: TuneConfig) -> TuneResult:
    """Fine-tune a quantized GGUF with forward passes only.

    Raises:
        ZoError: An option, file or row cannot be used, or the loss is not finite.
        KeyboardInterrupt: After Ctrl-C, with everything saved.
    """
    config = settle(config)
    paths = {name: getattr(config, name) for name in ("model", "mask", "data", "output")}
    absolute = {name: os.path.abspath(path) for name, path in paths.items() if path}
    config = replace(config, **absolute)
    Run.check_folder(config)
    return _tune(config, config.output, lambda: Run.create(config))


def resume(run: str | os.PathLike[str]) -> TuneResult:
    """Go on with a run that was interrupted or killed; the result is bit for bit the same.

    Raises:
        ZoError: As `tune`; also when the run's files were altered.
    """
    opened = Run.open(run)
    return _tune(opened.config, run, lambda: opened, opened.first_delta())


def _tune(
    config: TuneConfig,
    folder: str | os.PathLike[str],
    open_run: Callable[[], Run],
    first: Delta | None = None,
) -> TuneResult:
    """Open everything, run the loop, report. Nothing is written before all input was read."""
    require_file(config.model, "model")
    trainable = Trainable(config, first)
    with trainable.open_engine() as engine:
        draw, valid = load_rows(config, engine)
        said = trainable.look(engine, draw)
        trainable.set_units(parse_units(config.unit))  # refused before anything is written
        of_rows = {"rows_sha256": digest_examples([*draw.examples, *valid])}
        with locked(folder, "run folder"):
            run = open_run()
            if said:
                run.keep_first(trainable.delta)
                print(said, file=sys.stderr)
            return _train(run, trainable, engine, draw, valid, of_rows)


def _train(
    run: Run,
    trainable: Trainable,
    engine: Engine,
    draw: Draw,
    valid: Sequence[Example],
    of_rows: dict[str, Any],
) -> TuneResult:
    """Bring back what the run's files hold, run the loop from there, report."""
    trajectory = open_trajectory(run, trainable, of_rows)
    try:
        state = run.load_state(trainable, trajectory.n_records)
        if not estimator_of(run.config).probes:
            trajectory.cut(state.step)  # the others are made again, and will be the same
        run.reload_metrics(trajectory.n_records)
        trainable.place(state.step)
        clip = Clip(run.config.clip)
        for record in trajectory.records():
            clip.remember(record.directions)
            if record.step > state.step:
                state.replay(record, trainable)
        session = Session(run, trainable, engine, draw, valid, trajectory, state, clip)
        _resolve(session)
        with Interrupt() as interrupt:
            _loop(session, interrupt)
    finally:
        trajectory.close()
    engine.close()  # deltas are read and written in the memory that it had
    return finish(run, trainable, state)


def _resolve(session: Session) -> None:
    """Settle what is trained towards and all automatic options, and record them."""
    targets = choose_targets(
        session.config,
        session.engine,
        session.draw,
        session.run.path / TARGETS_FILE,
        begun=session.trajectory.n_records > 0,
    )
    config = replace(session.config, targets=targets)
    config, said = resolve(config, session.trainable, session.engine, session.draw)
    print(*said, sep="\n", file=sys.stderr)
    session.run.save_config(config)


def _loop(session: Session, interrupt: Interrupt) -> None:
    """The step loop."""
    config, state = session.config, session.state
    engine, run = session.engine, session.run
    with Progress(config, state.step) as progress, estimates(engine, config) as estimate:
        while True:
            if _validation_due(session):
                if not estimator_of(config).probes:
                    _save(session)  # the best delta must not be of a step that is made again
                progress.validated(state.step, _validate(session))
            if state.step >= config.n_steps or _out_of_patience(session):
                break
            if interrupt.requested:
                _save(session)
                interrupt.leave(run.path)
            rows = session.draw(state.step)
            measured = estimate(rows, state.step)
            if problem := measured.trouble():
                _save(session)
                raise ZoError(f"{problem} at step {state.step + 1}. {_START_AGAIN}")
            measured = replace(measured, directions=session.clip(measured.directions))
            session.clip.remember(measured.directions)
            rate = learning_rate(config, state.step)
            record = Record(state.step + 1, rate, measured.directions)
            session.trajectory.append(record)
            try:
                # As long as a model: nothing may keep it until the next one is made.
                state.apply(record, measured.gradient(session.trainable.noise), session.trainable)
            except ZoError as error:
                session.trajectory.drop_last()  # so that the steps before it can be replayed
                raise ZoError(f"Step {record.step} failed: {error} {_START_AGAIN}") from error
            progress.stepped(record, measured.scores, run)
            if state.step % config.save_every == 0:
                _save(session)
    _save(session)


def _validation_due(session: Session) -> bool:
    step, config = session.state.step, session.config
    if not session.valid or step in session.run.validations:
        return False
    every = config.valid_every or config.n_steps
    return step % every == 0 or step >= config.n_steps


def _validate(session: Session) -> EvalResult:
    """Measure the validation rows; keep the delta if it is the best so far."""
    run, step = session.run, session.state.step
    result = measure(session.engine, session.valid, label="valid")
    best = run.best_step()
    if best is None or result.loss < run.validations[best]["valid_loss"]:
        # Before the line that makes it official: a kill in between only repeats the measurement.
        _to_delta(session, result).save(run.checkpoint("best"))
    run.log(step=step, valid_loss=result.loss, valid_accuracy=result.accuracy, n=result.n)
    return result


def _to_delta(session: Session, result: EvalResult | None = None) -> Delta:
    provenance: dict[str, Any] = {"step": session.state.step, "seed": session.config.seed}
    if result is not None:
        provenance["valid_loss"] = result.loss
    return session.trainable.to_delta(provenance)


def _out_of_patience(session: Session) -> bool:
    """Whether the last `patience` validations all failed to improve on the best."""
    patience, best = session.config.patience, session.run.best_step()
    if patience == 0 or best is None:
        return False
    return sum(step > best for step in session.run.validations) >= patience


def _save(session: Session) -> None:
    """Checkpoint; the trajectory reaches the disk first, because the checkpoint builds on it."""
    session.trajectory.sync()
    session.run.save_state(session.state)
    _to_delta(session).save(session.run.checkpoint("latest"))
