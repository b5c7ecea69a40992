"""Data and evaluation with a real GGUF: against Hugging Face's tokenizer and stock llama.cpp."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.conftest import PACKAGE, TinyExport
from zo_gguf.cli import main
from zo_gguf.config import EvalConfig
from zo_gguf.data.dataset import load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask
from zo_gguf.verbs.evaluate import evaluate


@pytest.fixture(scope="module")
def engine(tiny_export: TinyExport) -> Iterator[Engine]:
    with Engine(tiny_export.model("F16"), n_threads=1) as engine:
        yield engine


def test_tokens_are_those_of_the_original_tokenizer(
    engine: Engine, task_dir: Path, tiny_llama_dir: Path
) -> None:
    reference = Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
    file = task_dir / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, example in zip(rows, load_examples(file, engine), strict=True):
        encode = [
            reference.encode(row["prompt"] + choice, add_special_tokens=False).ids
            for choice in ["", *row["choices"]]
        ]
        n = len(encode[0])
        assert example.n_prompt == n + 1
        assert example.tokens == [engine.vocabulary.bos_id, *encode[1 + row["answer"]]]
        assert example.choices == tuple(tuple(ids[n:]) for ids in encode[1:])


def test_eval_agrees_with_stock_llama_cpp(
    engine: Engine, tiny_export: TinyExport, task_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    model = str(tiny_export.model("F16"))
    file = task_dir / "test.jsonl"
    assert main(["eval", "-m", model, "--data", str(task_dir), "-t", "1", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    examples = [dataclasses.asdict(example) for example in load_examples(file, engine)]
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"model": model, "lora": None, "n_threads": 1, "examples": examples}))
    command = [sys.executable, str(PACKAGE / "merging" / "stock_eval.py"), str(job)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    stock = json.loads(done.stdout)
    assert ours["n"] == stock["n"] == len(examples)
    for key in ("loss", "loss_se", "perplexity"):
        assert ours[key] == pytest.approx(stock[key], rel=1e-3)
    assert ours["accuracy"] == pytest.approx(stock["accuracy"], abs=1.5 / len(examples))


def test_eval_adds_the_delta(tiny_export: TinyExport, task_dir: Path, tmp_path: Path) -> None:
    mask = Mask.load(tiny_export.mask("Q4_0"))
    theta = np.full(mask.nnz, 0.05, np.float32)
    Delta.from_mask(mask, theta, {}).save(tmp_path / "run" / "delta.safetensors")

    def loss(quant: str = "Q4_0", **options: Any) -> float:
        config = EvalConfig(
            model=tiny_export.model(quant), data=task_dir, rows=16, threads=1, **options
        )
        return evaluate(config).loss

    with Engine(tiny_export.model("Q4_0"), delta=mask, n_threads=1) as engine:
        engine.set_theta(theta)
        examples = load_examples(task_dir, engine, split="test")[:16]
        expected = float(engine.losses(examples).mean())
    assert loss(delta=tmp_path / "run") == pytest.approx(expected, abs=1e-9)
    assert abs(loss() - expected) > 1e-3
    with pytest.raises(ZoError, match="made for"):
        loss("Q8_0", delta=tmp_path / "run")


def test_data_check(tiny_export: TinyExport, task_dir: Path, capsys: Any) -> None:
    model = str(tiny_export.model("Q4_0"))
    assert main(["data", "check", str(task_dir), "-m", model, "--row", "2"]) == 0
    text = capsys.readouterr().out
    assert "train.jsonl:2: " in text
    assert ", 1 BOS" in text
    assert text.count("«") == text.count("»") == 1
