"""Files that are never half written, Ctrl-C that loses nothing, and cores: all, and shared."""

import hashlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

import psutil

from zo_gguf.errors import ZoError

if TYPE_CHECKING:  # `zo-gguf --help` comes by here, and needs no numpy
    import numpy as np
    from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 20


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """Return `path` as a Path.

    Args:
        path: The file to look for.
        what: How the error names it, such as "mask".

    Raises:
        ZoError: `path` is not a readable, non-empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise ZoError(f"The {what} {str(path)!r} is not a file; check the path.")
    if not os.access(path, os.R_OK):
        raise ZoError(f"The {what} {str(path)!r} cannot be read; check its permissions.")
    if path.stat().st_size == 0:
        raise ZoError(f"The {what} {str(path)!r} is empty; make or download it again.")
    return path


def check_output(path: str | os.PathLike[str], *, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """Refuse to write over an input, over any file unless told to, or where nothing can be written.

    Makes the folder.

    Raises:
        ZoError: `path` is one of `inputs`, is a folder, exists without `overwrite`, or its folder
            cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ZoError(f"The output {str(path)!r} is a folder; name a file.")
    if path.exists():
        if any(path.samefile(source) for source in inputs):
            raise ZoError(f"The output {str(path)!r} is an input; choose another name.")
        if not overwrite:
            raise ZoError(f"The output {str(path)!r} exists; use --overwrite or another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = error.strerror or error
        raise ZoError(f"{str(path)!r} cannot be written ({reason}); choose another -o.") from error
    return path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file so that `path` holds either the old bytes or all of the new ones.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed; on any
    exception the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; give the usual permissions instead.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def locked(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be.

    The lock ends with the process, however that ends. On Windows, and on file systems that know no
    locks, there is none.

    Args:
        folder: The folder.
        what: How the error names it, such as "run folder".

    Raises:
        ZoError: Another process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            where = f"the {what} {os.fspath(folder)!r}"
            raise ZoError(f"Another zo-gguf works in {where}; wait for it or stop it.") from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def is_running(pid: int) -> bool:
    """Whether there is such a process; yes where that cannot be asked."""
    if os.name != "posix":  # where signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---- Ctrl-C --------------------------------------------------------------------------------------


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


# ---- long vectors --------------------------------------------------------------------------------


_BLOCK = 1 << 17  # entries whose arrays stay in a core's cache


def in_blocks(n: int, work: Callable[[slice], None]) -> None:
    """Call `work` for slices that together are [0, n); those of a long range in several threads.

    Args:
        n: Length of the vectors.
        work: May run in any thread and order, so it must touch its slice alone. numpy's settings
            for floating-point errors are the caller's there too.
    """
    parts = [slice(first, min(n, first + _BLOCK)) for first in range(0, n, _BLOCK)]
    if len(parts) == 1:
        work(parts[0])
        return
    import numpy as np  # here, so that --help is quick

    settings = np.geterr()  # of this thread

    def with_settings(part: slice) -> None:
        with np.errstate(**settings):
            work(part)

    list(_threads().map(with_settings, parts))


def all_finite(values: "NDArray[np.floating]") -> bool:
    """Whether a long vector, (n,), has neither infinities nor NaN."""
    import numpy as np

    found: list[bool] = []
    in_blocks(values.size, lambda part: found.append(bool(np.isfinite(values[part]).all())))
    return all(found)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="zo-gguf")


# ---- cores, shared with others -------------------------------------------------------------------


# llama.cpp's threads meet at a barrier after every node of a graph. Where another program takes a
# core, one of them comes late, and OpenMP has the others spin meanwhile, up to 3 ms with GCC and
# 200 ms with LLVM, which keeps it from running. Here they give up after 10 us: threads of the same
# speed are less than that apart.
_POLICY = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
_CHOICES = ("OMP_WAIT_POLICY", *_POLICY)  # by which a user decides


def usable_cores() -> int:
    """Cores that this process may run on, hyper-threads included."""
    return len(_cores())


def sleep_at_barriers() -> None:
    """Have OpenMP's threads sleep soon where they wait, unless the environment says how they do.

    For programs of ours, before the first library with OpenMP is loaded: it reads this once.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ.update(_POLICY)


class Neighbours:
    """Says, once, that other programs take the cores that a run computes on.

    Args:
        n_threads: Threads of the run.
        seconds: How long to watch before speaking; shorter bursts do no harm worth a line.
        clock: Seconds that have passed.
        busy: CPU seconds that all programs, and this process, have used on the usable cores.
    """

    def __init__(
        self,
        n_threads: int,
        seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        self._n_threads, self._seconds = n_threads, seconds
        self._clock, self._busy = clock, busy or _busy
        self._since, self._before = clock(), self._busy()

    def look(self) -> str | None:
        """The sentence, where there is something to say now; call this after every step."""
        now = self._clock()
        if now - self._since < self._seconds:
            return None
        total, own = self._busy()
        others = (total - self._before[0] - (own - self._before[1])) / (now - self._since)
        self._since, self._before = now, (total, own)
        n_cores = usable_cores()
        if others < n_cores - self._n_threads + 0.5:
            return None
        self._seconds = float("inf")
        return (
            f"Other programs keep {others:.1f} of {n_cores} cores busy, which slows this run down; "
            "stop them to have it faster."
        )


def _busy() -> tuple[float, float]:
    own = psutil.Process().cpu_times()
    times = psutil.cpu_times(percpu=True)
    on_cores = [times[core] for core in _cores() if core < len(times)]
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests count as user, too
    busy = (sum(t) - sum(getattr(t, name, 0.0) for name in idle) for t in on_cores)
    return sum(busy), own.user + own.system


def _cores() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on macOS and Windows
        return set(range(os.cpu_count() or 1))
