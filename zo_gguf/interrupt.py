"""Ctrl-C between steps instead of inside them, and after C code that calls Python back."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

_SIGNALS: tuple[int, ...] = signal.SIGINT, signal.SIGTERM


@contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until C code has returned that calls Python functions.

    Those are where Python would raise KeyboardInterrupt, and ctypes drops it. A second signal ends
    the process.
    """
    waiting: list[int] = []
    previous: dict[int, Any] = {}

    def keep(number: int, frame: FrameType | None) -> None:
        if waiting:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        waiting.append(number)

    for number in _SIGNALS:
        try:
            previous[number] = signal.signal(number, keep)
        except ValueError:  # not the main thread
            break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a request that the loop sees after its step.

    A second one interrupts at once; nothing is lost then either, because every finished step is in
    the trajectory. Outside the main thread, signals stay the host program's business.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in _SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nInterrupted: finishing this step and saving ...", file=sys.stderr)

    def leave(self, run: str | os.PathLike[str]) -> NoReturn:
        """Say how to go on with the run folder, and interrupt."""
        print(f"Saved. Go on with: zo-gguf tune --resume {os.fspath(run)}", file=sys.stderr)
        raise KeyboardInterrupt
