"""Losses in plain llama-cpp-python, retention, and the lines to paste."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import write_llama
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.evaluation import summarize
from zo_gguf.errors import ZoError
from zo_gguf.merging import stock_eval
from zo_gguf.merging.result import Retention, ollama_name, paste_lines, retention
from zo_gguf.merging.stock import Measured, measure_stock

merge_module = importlib.import_module("zo_gguf.verbs.merge")
STOCK_SCRIPT = Path(stock_eval.__file__)


def reference_losses(model: Path, examples: list[Example]) -> list[float]:
    """From the scores that llama-cpp-python itself keeps with logits_all, in float64."""
    llama = llama_cpp.Llama(str(model), n_ctx=256, logits_all=True, n_threads=1, verbose=False)

    def nll(tokens: list[int], counted: list[int]) -> list[float]:
        llama.reset()
        llama.eval(tokens)
        scores = llama.scores[: len(tokens)].astype(np.float64)
        logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return [-logs[i - 1, tokens[i]] for i in counted]

    losses = []
    for example in examples:
        if not example.choices:
            counted = [i for i, counts in enumerate(example.target_mask) if counts]
            losses.append(float(np.mean(nll(example.tokens, counted))))
            continue
        prompt = example.tokens[: example.n_prompt]
        means = [
            -np.mean(nll(prompt + list(c), list(range(len(prompt), len(prompt) + len(c)))))
            for c in example.choices
        ]
        losses.append(float(np.log(np.exp(means).sum()) - means[example.answer]))
    llama.close()
    return losses


def test_stock_eval(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m.gguf", Type.F16)
    prompt = [1, 260, 263, 265, 259]
    choices = ((260,), (261, 262), (263, 264, 265))
    examples = [
        Example([*prompt, 261, 262], [False] * 5 + [True] * 2, choices, 1, 5),
        Example([*prompt, 260], [False] * 5 + [True], choices, 0, 5),
        Example(prompt, [False, False, True, False, True]),
        Example([1, *range(100, 200)] * 6, [False] + [True] * 605),
    ]
    measured = measure_stock(model, examples, n_threads=1)
    reference = reference_losses(model, examples[:3])
    np.testing.assert_allclose(measured.losses[:3], reference, atol=2e-3)
    assert measured.result.n == 4
    np.testing.assert_allclose(measured.losses[3], long_loss(model, examples[3]), atol=2e-3)


def long_loss(model: Path, example: Example) -> float:
    with Engine(model, n_threads=1, ctx_tokens=1024) as engine:
        return float(engine.losses([example])[0, 0])


def test_stock_eval_never_imports_zo_gguf(tmp_path: Path) -> None:
    """A zo_gguf that fails on import stands first on the path."""
    (tmp_path / "zo_gguf").mkdir()
    (tmp_path / "zo_gguf" / "__init__.py").write_text("raise SystemExit('imported')")
    model = write_llama(tmp_path / "m.gguf", Type.Q8_0)
    row = {"tokens": [1, 5, 6], "target_mask": [False, False, True], "choices": [], "answer": -1,
           "n_prompt": 2}  # fmt: skip
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"model": str(model), "lora": None, "n_threads": 1, "examples": [row]})
    )
    done = subprocess.run(
        [sys.executable, "-P", str(STOCK_SCRIPT), str(job)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert {"loss", "loss_se", "perplexity", "accuracy", "accuracy_se", "n"} <= set(answer)
    assert answer["perplexity"] == pytest.approx(np.exp(answer["loss"]))
    assert answer["accuracy"] is None
    assert not re.search(r"^\s*(import|from) zo_gguf", STOCK_SCRIPT.read_text(), re.MULTILINE)


def test_stock_failure_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ZoError, match=r"cannot run .*bad\.gguf"):
        measure_stock(tmp_path / "bad.gguf", [Example([1, 5], [False, True])])


# ---- numbers and lines ---------------------------------------------------------------------------


def measured(losses: list[float]) -> Measured:
    values = np.array(losses)
    return Measured(values, summarize(values, np.full(len(values), np.nan)))


def test_retention() -> None:
    base, tuned = measured([2.0, 1.0, 3.0]), measured([1.0, 0.5, 1.5])
    assert retention(base, tuned, tuned) == Retention(1.0, 0.0)
    half = retention(base, tuned, measured([1.5, 0.75, 2.25]))
    assert half == Retention(pytest.approx(0.5), pytest.approx(0))
    uneven = retention(base, tuned, measured([1.0, 1.0, 2.0]))
    assert uneven is not None
    assert uneven.value == pytest.approx(2 / 3)
    assert uneven.error > 0.1
    assert retention(base, base, tuned) is None
    assert retention(tuned, base, tuned) is None


def test_paste_lines() -> None:
    lines = dict(paste_lines(Path("My models/Tiny Q4.gguf")))
    assert lines["llama.cpp"] == "llama-cli -m 'My models/Tiny Q4.gguf'"
    assert "ollama create tiny-q4 " in lines["Ollama"]
    with_lora = dict(paste_lines(Path("b.gguf"), Path("l.gguf")))
    assert with_lora["llama.cpp"].endswith("--lora l.gguf")
    assert "Ollama" not in with_lora
    assert "lora_path='l.gguf'" in with_lora["Python"]
    assert ollama_name(Path("---.gguf")) == "tuned"
