"""Run `stock_eval.py` on a file: what plain llama-cpp-python makes of it, in a fresh process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.evaluation import EvalResult, counted_tokens, summarize
from zo_gguf.errors import ZoError

_SCRIPT = Path(__file__).with_name("stock_eval.py")
_PROGRESS = "stock llama-cpp-python:"


@dataclass(frozen=True)
class Measured:
    """Rows' losses and what they sum up to.

    Attributes:
        losses: float64 (n,), in nats.
        result: Means and standard errors.
    """

    losses: NDArray[np.float64]
    result: EvalResult


def measure_stock(
    model: Path,
    examples: Sequence[Example],
    *,
    lora: Path | None = None,
    n_threads: int | None = None,
) -> Measured:
    """Measure a GGUF with plain `llama_cpp.Llama` in a process that never imports zo_gguf.

    Args:
        model: The GGUF.
        examples: At least one.
        lora: An adapter to load with it.
        n_threads: CPU threads; default: llama-cpp-python's.

    Raises:
        ZoError: llama-cpp-python cannot load or run the file.
    """
    job = {
        "model": str(model.absolute()),
        "lora": str(lora.absolute()) if lora else None,
        "n_threads": n_threads,
        "examples": [
            {
                "tokens": list(map(int, example.tokens)),
                "target_mask": list(map(bool, example.target_mask)),
                "choices": [list(map(int, choice)) for choice in example.choices],
                "answer": int(example.answer),
                "n_prompt": int(example.n_prompt),
            }
            for example in examples
        ],
    }
    answer = _run(job, model)
    losses = np.array(answer["losses"], dtype=np.float64)
    correct = np.array([np.nan if c is None else c for c in answer["correct"]], dtype=np.float64)
    if not np.isfinite(losses).all():
        raise ZoError(
            f"Stock llama-cpp-python gives losses that are not finite for {str(model)!r}."
        )
    return Measured(losses, summarize(losses, correct, counted_tokens(examples)))


def _run(job: dict[str, Any], model: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="zo-gguf-") as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job), encoding="utf-8")
        with open(Path(folder, "answer.json"), "w+", encoding="utf-8") as answer:
            # -P keeps the script's own folder, which is zo_gguf's, off the import path.
            process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(path)],
                stdout=answer,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            last = _relay(process)
            if process.wait() != 0:
                raise ZoError(f"Stock llama-cpp-python cannot run {str(model)!r}: {last}.")
            answer.seek(0)
            return dict(json.load(answer))


def _relay(process: subprocess.Popen[str]) -> str:
    """Show the script's progress; returns the last other line it wrote, its error if it failed."""
    last = "no reason given"
    stream: IO[str] | None = process.stderr
    assert stream is not None
    try:
        with stream:
            for line in stream:
                if line.startswith(_PROGRESS):
                    print(line, end="", file=sys.stderr, flush=True)
                elif line.strip():
                    last = line.strip().rstrip(".")
    except BaseException:  # such as Ctrl-C: do not leave the other process behind
        process.kill()
        process.wait()
        raise
    return last
