"""One row -> one example: token ids, what counts in the loss, and how a long row is cut.

The tokenizer and the chat template are always the GGUF's; `Reader` says what is asked of the
engine. Boundaries between parts, BOS and end tokens are settled here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from zo_gguf.data.chat import ChatTemplate
from zo_gguf.data.rows import Row
from zo_gguf.errors import ZoError


class Tokenizer(Protocol):
    """A model's tokenizer and chat template; -1 stands for a token the model does not have."""

    bos_id: int
    eos_id: int
    eot_id: int
    add_bos: bool
    chat_template: str | None

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids without BOS and EOS."""
        ...

    def token_text(self, token: int) -> str:
        """A token as text, special tokens written out."""
        ...


class Reader(Protocol):
    """What reading data needs from an engine: its tokenizer, and the longest text that it takes."""

    ctx_tokens: int
    n_ctx_train: int

    @property
    def vocabulary(self) -> Tokenizer:
        """The model's tokenizer."""
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


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One row as the model reads it.

    Attributes:
        tokens: The whole sequence, BOS first exactly once when the model wants one; for a row
            with choices, the prompt and the right choice.
        target_mask: Same length; True where predicting tokens[i] counts. Never True at 0.
        choices: Token ids of every choice, without the prompt; () for rows without choices.
        answer: Index of the right choice, -1 without choices.
        n_prompt: Tokens before the first counted one, BOS included.
        source: File and line, such as "train.jsonl:17".
        kind: completion, choices, messages or text.
        n_cut: Tokens that were dropped to make the row fit.
        target: Probability of every choice that training aims at; (): 1 for the right one.
    """

    tokens: list[int]
    target_mask: list[bool]
    choices: tuple[tuple[int, ...], ...] = ()
    answer: int = -1
    n_prompt: int = 0
    source: str = ""
    kind: str = ""
    n_cut: int = 0
    target: tuple[float, ...] = ()


class Encoder:
    """Turns checked rows into examples.

    Args:
        engine: Of the model that is to read the rows.
        max_tokens: Longest example; None: what the engine's context and the model hold.
        train_on: "last-assistant" or "all-assistant".

    Raises:
        ZoError: `max_tokens` does not fit.
    """

    def __init__(self, engine: Reader, max_tokens: int | None, train_on: str) -> None:
        if train_on not in ("last-assistant", "all-assistant"):
            raise ZoError(f"train_on must be last-assistant or all-assistant, not {train_on!r}.")
        self._tokenizer = engine.vocabulary
        self._max_tokens = _limit(engine, max_tokens)
        self._train_on = train_on
        self._template: ChatTemplate | None = None

    def encode(self, row: Row) -> Example:
        """Tokenize a row and cut it to the longest length allowed.

        Raises:
            ZoError: The row cannot be used; names its file and line.
        """
        try:
            return self._encode(row)
        except UnicodeEncodeError as error:
            raise ZoError(f"{row.source}: the text has half a surrogate pair; fix it.") from error
        except ZoError as error:
            raise ZoError(f"{row.source}: {error}") from error

    def _encode(self, row: Row) -> Example:
        if row.kind == "text":
            return self._text(row)
        if row.kind == "choices":
            return self._choices(row)
        if row.kind == "messages":
            return self._messages(row)
        return self._completion(row)

    def _text(self, row: Row) -> Example:
        tokens = with_bos(self._tokenizer, tokenize_parts(self._tokenizer, [row.completion])[0])
        if len(tokens) < 2:
            raise ZoError("the text is a single token, so nothing can be predicted.")
        n_cut = max(0, len(tokens) - self._max_tokens)
        tokens = tokens[: self._max_tokens]
        mask = [False] + [True] * (len(tokens) - 1)
        return Example(tokens, mask, n_prompt=1, source=row.source, kind=row.kind, n_cut=n_cut)

    def _completion(self, row: Row) -> Example:
        prompt, completion = tokenize_parts(self._tokenizer, [row.prompt, row.completion])
        if not completion:
            raise ZoError("the completion has no tokens of its own.")
        end = end_token(self._tokenizer)
        if end >= 0 and completion[-1] not in (self._tokenizer.eos_id, self._tokenizer.eot_id):
            completion = [*completion, end]
        prompt = with_bos(self._tokenizer, prompt)
        mask = [False] * len(prompt) + [True] * len(completion)
        return self._fit(row, prompt + completion, mask)

    def _choices(self, row: Row) -> Example:
        prompt, pieces = tokenize_choices(self._tokenizer, row.prompt, row.choices)
        choices = tuple(tuple(piece) for piece in pieces)
        for text, tokens in zip(row.choices, choices, strict=True):
            if not tokens:
                raise ZoError(f"the choice {text!r} has no tokens of its own.")
            if choices.count(tokens) > 1:
                raise ZoError(f"the choice {text!r} has the same tokens as another one.")
        prompt = with_bos(self._tokenizer, prompt)
        right = choices[row.answer]
        mask = [False] * len(prompt) + [True] * len(right)
        return self._fit(row, prompt + list(right), mask, choices)

    def _messages(self, row: Row) -> Example:
        segments = self._chat().segments(row.messages, row.tools, train_on=self._train_on)
        pieces = tokenize_parts(self._tokenizer, [text for text, _ in segments])
        tokens = with_bos(self._tokenizer, pieces[0])
        mask = [False] * len(tokens)
        for piece, (_, counts) in zip(pieces[1:], segments[1:], strict=True):
            blank = after_end(self._tokenizer, piece) if counts else 0
            tokens += piece
            mask += [counts] * (len(piece) - blank) + [False] * blank
        if not any(mask):
            raise ZoError("the assistant's turn has no tokens of its own.")
        n_used = len(mask) - mask[::-1].index(True)  # nothing after it is ever predicted
        return self._fit(row, tokens[:n_used], mask[:n_used])

    def _fit(
        self,
        row: Row,
        tokens: list[int],
        mask: list[bool],
        choices: tuple[tuple[int, ...], ...] = (),
    ) -> Example:
        """Drop the beginning of the prompt, but not BOS, until the longest sequence fits."""
        n_prompt = mask.index(True)
        if n_prompt == 0:
            raise ZoError("the prompt has no tokens and the model no BOS to predict from.")
        n_counted = max((len(choice) for choice in choices), default=len(tokens) - n_prompt)
        n_cut = max(0, n_prompt + n_counted - self._max_tokens)
        if n_cut >= n_prompt:
            raise ZoError(
                f"its {n_counted} tokens from the first counted one on do not fit into "
                f"{self._max_tokens}; raise --max-seq-length and --ctx-tokens, or shorten the row."
            )
        keep = 1 if tokens[0] == self._tokenizer.bos_id else 0
        return Example(
            tokens[:keep] + tokens[keep + n_cut :],
            mask[n_cut:],
            choices,
            row.answer,
            n_prompt - n_cut,
            row.source,
            row.kind,
            n_cut,
        )

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            source = self._tokenizer.chat_template
            if source is None:
                raise ZoError(
                    "the model has no chat template for `messages`; use `prompt`+`completion` rows."
                )
            ids = (self._tokenizer.bos_id, self._tokenizer.eos_id)
            bos, eos = (self._tokenizer.token_text(i) if i >= 0 else "" for i in ids)
            self._template = ChatTemplate(source, bos, eos)
        return self._template


def _limit(engine: Reader, max_tokens: int | None) -> int:
    holds = min(engine.ctx_tokens, engine.n_ctx_train)
    if max_tokens is not None and max_tokens < 2:
        raise ZoError(f"max_seq_length must be at least 2, not {max_tokens}.")
    if max_tokens is not None and max_tokens > holds:
        raise ZoError(
            f"max_seq_length {max_tokens} is more than fits: the model was trained on "
            f"{engine.n_ctx_train} tokens and --ctx-tokens is {engine.ctx_tokens}."
        )
    return holds if max_tokens is None else max_tokens
