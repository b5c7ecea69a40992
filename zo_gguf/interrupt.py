"""Ctrl-C between steps instead of inside them, and after C code that calls Python back."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], None]
_SIGNALS: tuple[int, ...] = signal.SIGINT, signal.SIGTERM


@contextmanager
def handling(handler: Handler, numbers: Sequence[int] = _SIGNALS) -> Iterator[None]:
    """Have signals handled in another way meanwhile.

    Outside the main thread, signals stay the host program's business.
    """
    previous: dict[int, Any] = {}
    for number in numbers:
        try:
            previous[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread
            break
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until C code has returned that calls Python functions.

    Those are where Python would raise KeyboardInterrupt, and ctypes drops it. A second signal ends
    the process.
    """
    waiting: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if waiting:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        waiting.append(number)

    heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    try:
        with handling(keep, heard):
            yield
    finally:
        for number in waiting:
            signal.raise_signal(number)


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a request that the loop sees after its step.

    A second one interrupts at once; nothing is lost then either, because every finished step is in
    the trajectory.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handling = handling(self._on_signal)

    def __enter__(self) -> "Interrupt":
        self._handling.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._handling.__exit__(*raised)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nInterrupted: finishing this step and saving ...", file=sys.stderr)

    def leave(self, run: str | os.PathLike[str]) -> NoReturn:
        """Say how to go on with the run folder, and interrupt."""
        print(f"Saved. Go on with: zo-gguf tune --resume {os.fspath(run)}", file=sys.stderr)
        raise KeyboardInterrupt
