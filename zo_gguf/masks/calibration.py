"""Calibration text: documents from a file or from C4, cut into blocks of tokens.

Knows the Hugging Face tokenizer only by its call; what is computed on the blocks is not known here.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.system import require_file, sha256_file

C4 = "c4"
_C4_SOURCE = ("allenai/c4", "en", "train")
_MIN_TOKENS = 8  # a shorter rest of the text says nothing


def load_documents(source: str, n_docs: int) -> tuple[list[str], dict[str, Any]]:
    """Read calibration documents.

    Args:
        source: A .jsonl file of {"text"} rows, a .txt file (documents separated by blank lines), or
            "c4" for the start of allenai/c4's English training split.
        n_docs: At most this many documents.

    Returns:
        The documents and the recipe to record with a mask.

    Raises:
        ZoError: The source cannot be read or holds no text.
    """
    if source == C4 and not Path(source).exists():
        documents = _take(_c4(), n_docs)
        recipe: dict[str, Any] = {"source": "/".join(_C4_SOURCE)}
    else:
        path = require_file(source, "calibration file")
        if path.suffix.lower() not in (".jsonl", ".txt"):
            raise ZoError(
                f"The calibration file {str(path)!r} must be .jsonl with a text in each row, or "
                ".txt; or use c4."
            )
        reader = _jsonl if path.suffix.lower() == ".jsonl" else _paragraphs
        documents = _take(reader(path), n_docs)
        recipe = {"source": path.name, "sha256": sha256_file(path)}
    if not documents:
        raise ZoError(f"The calibration source {source!r} holds no text.")
    return documents, recipe | {"documents": len(documents)}


def token_blocks(documents: list[str], tokenizer: Any, block_size: int) -> list[NDArray[np.int64]]:
    """Tokenize documents one after another and cut the stream into blocks.

    Args:
        documents: Texts.
        tokenizer: A Hugging Face tokenizer; it adds its own special tokens to each document.
        block_size: Tokens per block.

    Returns:
        Blocks (block_size,) of token ids; only if the text is shorter than one block, a single
        shorter one.

    Raises:
        ZoError: The text has next to no tokens.
    """
    stream: list[int] = []
    for document in documents:
        stream.extend(tokenizer(document, truncation=False, verbose=False)["input_ids"])
    if len(stream) < min(_MIN_TOKENS, block_size):
        raise ZoError(
            f"The calibration text has only {len(stream)} tokens; give some pages of text."
        )
    tokens = np.array(stream, dtype=np.int64)
    n_blocks = max(1, len(tokens) // block_size)
    return [tokens[i * block_size : (i + 1) * block_size] for i in range(n_blocks)]


def _take(documents: Iterator[str], n_docs: int) -> list[str]:
    taken: list[str] = []
    for document in documents:
        if document.strip():
            taken.append(document)
        if len(taken) == n_docs:
            break
    return taken


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise ZoError(f'Line {number} of {str(path)!r} is no JSON object with a "text" string.')
        yield text


def _paragraphs(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ZoError(f"The calibration file {str(path)!r} is not UTF-8 text: {error}.") from error


def _c4() -> Iterator[str]:
    """Stream allenai/c4, a few hundred kilobytes for the usual number of documents."""
    advice = "give a local .jsonl or .txt file with --calibration"
    if any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in _OFFLINE):
        raise ZoError(f"C4 is read from the Hugging Face hub, but HF_HUB_OFFLINE is set; {advice}.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ZoError(
            f"C4 needs the package datasets; install zo-gguf[hf], or {advice}."
        ) from error
    name, language, split = _C4_SOURCE
    try:
        for row in load_dataset(name, language, split=split, streaming=True):
            yield str(row["text"])
    except Exception as error:  # datasets raises whatever its network layers raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ZoError(f"C4 could not be read ({reason}); go online, or {advice}.") from error


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
