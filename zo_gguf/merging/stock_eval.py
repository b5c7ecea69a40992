"""Loss and accuracy of a GGUF in stock llama-cpp-python, as any app would run it.

A script of its own, started by path in a fresh process: it imports neither zo_gguf nor anything
that could change what `llama_cpp.Llama` computes.

    python stock_eval.py JOB.json

JOB.json holds {"model", "lora", "n_threads", "examples": [{"tokens", "target_mask", "choices",
"answer", "n_prompt"}, ...]}; one JSON object goes to stdout, progress to stderr. The loss of an
example is the mean negative log-likelihood of its counted tokens; for an example with choices, the
cross-entropy over the choices' mean log-likelihoods (MeZO, arXiv 2305.17333).
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

N_BATCH = 512  # tokens per decode: llama-cpp-python's default
PROGRESS_SECONDS = 5.0


class StockModel:
    """A plain `llama_cpp.Llama`, asked for logits only where a token is counted."""

    def __init__(self, model: str, lora: str | None, n_threads: int | None, n_ctx: int) -> None:
        self.llama = llama_cpp.Llama(
            model_path=model,
            lora_path=lora,
            n_ctx=n_ctx,
            n_batch=min(N_BATCH, n_ctx),
            n_threads=n_threads,
            n_threads_batch=n_threads,
            verbose=False,
        )
        self.context = self.llama.ctx
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_vocab = self.llama.n_vocab()
        self.capacity = min(N_BATCH, n_ctx)
        self.batch = llama_cpp.llama_batch_init(self.capacity, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        self.llama.close()

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def forget_from(self, position: int) -> bool:
        """Drop the cache from a position on; False where the architecture cannot."""
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, 0, position, -1))

    def log_probs(
        self, tokens: Sequence[int], start: int, wanted: dict[int, list[int]]
    ) -> dict[tuple[int, int], float]:
        """Run tokens at positions start, start + 1, ... and read log-probabilities.

        Args:
            tokens: Token ids.
            start: Position of the first.
            wanted: Position -> token ids whose log-probability after that position is asked for.

        Returns:
            (position, token id) -> natural log-probability.
        """
        result: dict[tuple[int, int], float] = {}
        for first in range(0, len(tokens), self.capacity):
            part = tokens[first : first + self.capacity]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self.batch.token[i] = token
                self.batch.pos[i] = start + first + i
                self.batch.seq_id[i][0] = 0
                self.batch.n_seq_id[i] = 1
                self.batch.logits[i] = (start + first + i) in wanted
            if llama_cpp.llama_decode(self.context, self.batch) != 0:
                raise RuntimeError(f"llama_decode failed on {len(part)} tokens")
            for i in range(len(part)):
                position = start + first + i
                if position in wanted:
                    row = self._log_softmax(i)
                    result.update({(position, t): float(row[t]) for t in wanted[position]})
        return result

    def _log_softmax(self, i: int) -> Any:
        pointer = llama_cpp.llama_get_logits_ith(self.context, i)
        logits = np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).astype(np.float64)
        top = logits.max()
        return logits - (top + math.log(np.exp(logits - top).sum()))


def plain_loss(model: StockModel, example: dict[str, Any]) -> tuple[float, float, int]:
    """Mean negative log-likelihood of the counted tokens, NaN for correctness, their number."""
    tokens, counted = example["tokens"], example["target_mask"]
    targets = [i for i in range(1, len(tokens)) if counted[i]]
    model.clear()
    found = model.log_probs(tokens, 0, {i - 1: [tokens[i]] for i in targets})
    return -sum(found.values()) / len(targets), math.nan, len(targets)


def choice_loss(model: StockModel, example: dict[str, Any]) -> tuple[float, float, int]:
    """Cross-entropy over the choices, 1 or 0 for correctness, and 1."""
    n_prompt, choices = example["n_prompt"], example["choices"]
    prompt, last = example["tokens"][:n_prompt], n_prompt - 1
    model.clear()
    firsts = {last: [choice[0] for choice in choices]}
    found = model.log_probs(prompt, 0, firsts)
    means = []
    for choice in choices:
        total = found[last, choice[0]]
        if len(choice) > 1:
            wanted = {n_prompt + i: [choice[i + 1]] for i in range(len(choice) - 1)}
            head = list(choice[:-1])
            if model.forget_from(n_prompt):
                rest = model.log_probs(head, n_prompt, wanted)
            else:
                model.clear()
                rest = model.log_probs(prompt + head, 0, wanted)
            total += sum(rest.values())
        means.append(total / len(choice))
    scores = np.array(means)
    top = scores.max()
    loss = float(top + math.log(np.exp(scores - top).sum()) - scores[example["answer"]])
    return loss, float(scores.argmax() == example["answer"]), 1


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """The result object for a job."""
    examples = job["examples"]
    longest = max(
        max([len(e["tokens"])] + [e["n_prompt"] + len(c) for c in e["choices"]]) for e in examples
    )
    model = StockModel(job["model"], job.get("lora"), job.get("n_threads"), longest)
    rows = []
    shown = time.monotonic()
    for i, example in enumerate(examples):
        rows.append((choice_loss if example["choices"] else plain_loss)(model, example))
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"stock llama-cpp-python: {i + 1} of {len(examples)} rows", file=sys.stderr)
    model.close()
    return summary(rows)


def summary(rows: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Means and standard errors of (loss, correctness, counted tokens) per example."""
    losses, correct, counts = (
        np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)
    )
    judged = correct[~np.isnan(correct)]
    has_choices = ~np.isnan(correct)
    weights = counts if not has_choices.any() else np.ones_like(counts)
    return {
        "loss": float(losses.mean()),
        "loss_se": standard_error(losses),
        "perplexity": float(np.exp((losses * weights).sum() / weights.sum())),
        "accuracy": float(judged.mean()) if judged.size else None,
        "accuracy_se": standard_error(judged) if judged.size else None,
        "n": len(rows),
        "losses": losses.tolist(),
        "correct": [None if math.isnan(c) else c for c in correct],
    }


def standard_error(values: Any) -> float:
    """Of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(json.dumps(evaluate(json.load(file))))
