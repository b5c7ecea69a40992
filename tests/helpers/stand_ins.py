"""Stand-ins for the engine: a trivial tokenizer with fake losses, and a real SentencePiece one.

And a few rows with what it takes to read them.
"""

import ctypes
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.batch import Scores
from zo_gguf.libzo import Probe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMPLETION = {"prompt": "ask", "completion": " yes"}
CHOICES = {"prompt": "on", "choices": [" world", " sports"], "answer": 1}
CHAT = {
    "messages": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MERGED = ["the", " world", " sports", "ab", "bc"]
FIRST_CHARACTER = 100


class FakeEngine:
    """Longest match over a few words, else one token per character.

    `score` gives every row the loss len(tokens) / 10 and calls every second row right.
    """

    def __init__(
        self,
        *,
        add_bos: bool = True,
        chat_template: str | None = None,
        ctx_tokens: int = 512,
        n_ctx_train: int = 1024,
        eos_id: int = 1,
    ) -> None:
        self.bos_id, self.eos_id, self.eot_id = 0, eos_id, 3
        self.add_bos = add_bos
        self.chat_template = chat_template
        self.ctx_tokens = ctx_tokens
        self.n_ctx_train = n_ctx_train
        self.calls: list[int] = []
        self.vocabulary = self

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        text.encode()  # the real one needs bytes too
        words = [*(SPECIAL if parse_special else []), *MERGED]
        tokens = []
        while text:
            word = max((w for w in words if text.startswith(w)), key=len, default=text[0])
            tokens.append(self.id(word))
            text = text[len(word) :]
        return tokens

    def id(self, word: str) -> int:
        known = SPECIAL + MERGED
        return known.index(word) if word in known else FIRST_CHARACTER + ord(word)

    def token_text(self, token: int) -> str:
        if token >= FIRST_CHARACTER:
            return chr(token - FIRST_CHARACTER)
        return (SPECIAL + MERGED)[token]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(map(self.token_text, tokens))

    def score(self, examples: Sequence[Example], probes: Sequence[Probe] = ()) -> Scores:
        self.calls.append(len(examples))
        losses = [len(example.tokens) / 10 for example in examples]
        correct = [i % 2 if e.choices else math.nan for i, e in enumerate(examples)]
        return Scores(np.array([losses]), np.array([correct], np.float64), sum(self.calls))

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None: ...


class SentencePiece(FakeEngine):
    """llama.cpp's own SentencePiece tokenizer over a handful of pieces, from a vocabulary GGUF."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        pieces = ["▁", *"abcdeghilmnorstwy", "▁y", "es", "▁yes", "yes", "wo", "▁wo", "ld"]
        pieces += [
            "▁world",
            "world",
            "▁no",
            "or",
            "wor",
            "worl",
            "▁wor",
            "▁worl",
            "ye",
            "▁ye",
            "no",
            "▁n",
        ]
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *pieces])
        writer.add_token_scores([0.0] * 259 + [float(len(p)) for p in pieces])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.bos_id, self.eos_id, self.eot_id = 1, 2, -1

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), buffer, len(buffer), False, parse_special
        )
        return list(buffer[:n])

    def token_text(self, token: int) -> str:
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 64, 0, True)
        return buffer.raw[:n].decode(errors="replace")

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(
    tmp_path: Path, *rows: Any, engine: FakeEngine | None = None, **options: Any
) -> list[Example]:
    return load_examples(write(tmp_path / "d.jsonl", *rows), engine or FakeEngine(), **options)


def marked(example: Example, engine: FakeEngine) -> str:
    """The example as text with {} around counted stretches."""
    text, counting = "", False
    for token, counts in zip(example.tokens, example.target_mask, strict=True):
        text += "{}" * (counts != counting) + engine.token_text(token)
        counting = counts
    return text + "{}" * counting
