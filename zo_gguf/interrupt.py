"""Ctrl-C between steps instead of inside them."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, NoReturn

from zo_gguf.run import Run


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a request that the loop sees after its step.

    A second one interrupts at once; nothing is lost then either, because every finished step is in
    the trajectory. Outside the main thread, signals stay the host program's business.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
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

    def leave(self, run: Run) -> NoReturn:
        """Say how to go on, and interrupt."""
        print(f"Saved. Go on with: zo-gguf tune --resume {run.path}", file=sys.stderr)
        raise KeyboardInterrupt
