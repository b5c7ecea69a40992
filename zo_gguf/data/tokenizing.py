"""Text -> token ids with the GGUF's own tokenizer: boundaries between parts, BOS, end tokens.

Knows nothing of rows. The engine is the tokenizer; `Tokenizer` says what is asked of it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What reading data needs from an engine; -1 stands for a token the model does not have."""

    bos_id: int
    eos_id: int
    eot_id: int
    add_bos: bool
    chat_template: str | None
    ctx_tokens: int
    n_ctx_train: int

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids without BOS and EOS."""
        ...

    def token_text(self, token: int) -> str:
        """A token as text, special tokens written out."""
        ...


def tokenize_parts(tokenizer: Tokenizer, parts: Sequence[str]) -> list[list[int]]:
    """Tokens of every part of a text, so that each boundary lies where inference puts it.

    An app tokenizes the prompt and lets the model go on from there. So, if the tokens of what
    precedes are a prefix of the tokens of both together, the part is what the joint tokenization
    adds. Otherwise a token would straddle the boundary, which no prompt could reproduce; then the
    part is tokenized by itself, without the space that some tokenizers put before a text.

    Special tokens written out in the text are read as tokens, as llama.cpp apps do with prompts.
    """
    encode = _encoder(tokenizer)
    pieces = [encode(parts[0])]
    text, tokens = parts[0], pieces[0]
    for part in parts[1:]:
        joint = encode(text + part)
        if joint[: len(tokens)] == tokens:
            pieces.append(joint[len(tokens) :])
            text, tokens = text + part, joint
        else:
            encode = _continuation(_encoder(tokenizer))
            text, tokens = part, encode(part)
            pieces.append(tokens)
    return pieces


def tokenize_choices(
    tokenizer: Tokenizer, prompt: str, choices: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt and of every choice after it; boundaries as in `tokenize_parts`."""
    encode = _encoder(tokenizer)
    tokens = encode(prompt)
    pieces = []
    for choice in choices:
        joint = encode(prompt + choice)
        if joint[: len(tokens)] == tokens:
            pieces.append(joint[len(tokens) :])
        else:
            pieces.append(_continuation(encode)(choice))
    return tokens, pieces


def with_bos(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """`tokens` with BOS exactly once, if the model wants one or the text itself begins with it."""
    bos = tokenizer.bos_id
    rest = tokens
    while bos >= 0 and rest[:1] == [bos]:
        rest = rest[1:]
    return [bos, *rest] if tokenizer.add_bos or len(rest) < len(tokens) else tokens


def end_token(tokenizer: Tokenizer) -> int:
    """The token that ends a completion: end of turn for chat models, else EOS; -1 if neither."""
    if tokenizer.chat_template is not None and tokenizer.eot_id >= 0:
        return tokenizer.eot_id
    return tokenizer.eos_id


def after_end(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Number of blank tokens that a chat template writes after the end of a turn.

    A model stops at the end token, so it would learn them for nothing.
    """
    ends = {tokenizer.eos_id, tokenizer.eot_id} - {-1}
    for n, token in enumerate(reversed(tokens)):
        if token in ends:
            return n
        if tokenizer.token_text(token).strip():
            break
    return 0


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.tokenize(text, parse_special=True)


def _continuation(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """An `encode` for text that goes on: SentencePiece vocabularies put a space before a text."""

    def encode_further(text: str) -> list[int]:
        anchor, joint = encode("\n"), encode("\n" + text)
        return joint[len(anchor) :] if joint[: len(anchor)] == anchor else encode(text)

    return encode_further
