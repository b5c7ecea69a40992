"""Element by element work on long vectors, on all cores: numpy itself uses one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

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
    settings = np.geterr()  # of this thread

    def with_settings(part: slice) -> None:
        with np.errstate(**settings):
            work(part)

    list(_threads().map(with_settings, parts))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="zo-gguf")
