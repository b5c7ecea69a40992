"""Chat templates: the GGUF's own Jinja source, rendered in a sandbox, and what counts in the loss.

What an assistant turn adds is found by rendering the messages before it with the generation prompt
and comparing prefixes, never by searching for markers. Token ids are not known here.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zo_gguf.errors import ZoError

# Templates may print today's date. A run that is resumed tomorrow must see the same tokens.
_TODAY = datetime(2024, 7, 26)
_SHOWN = 30  # characters of context in errors

Message = dict[str, Any]
Segment = tuple[str, bool]  # text, whether it counts in the loss


class _Generation(Extension):
    """`{% generation %}` marks assistant text for other tools; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template ready to render.

    Args:
        source: Jinja source, from a GGUF and therefore not trusted.
        bos_token: Text of the BOS token, "" if there is none.
        eos_token: Text of the EOS token, "" if there is none.

    Raises:
        ZoError: The source is not valid Jinja.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _TODAY.strftime
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ZoError(
                f"The model's chat template is not valid Jinja ({_reason(error)}); use "
                "`prompt`+`completion` rows."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool,
    ) -> str:
        """The messages as the text that the model reads.

        Args:
            messages: Each with "role" and "content".
            tools: Tool descriptions, None for none.
            generation_prompt: End with what asks the model for an assistant turn.

        Raises:
            ZoError: The template refuses the messages or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template can raise anything that Python code can
            raise ZoError(f"the chat template fails on this row: {_reason(error)}.") from error

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        train_on: str = "last-assistant",
    ) -> list[Segment]:
        """Cut the rendered chat into parts that count in the loss and parts that do not.

        Args:
            messages: The chat; what follows the last assistant turn is left out.
            tools: Tool descriptions, None for none.
            train_on: "last-assistant" or "all-assistant".

        Returns:
            Alternating (text, False), (text, True) segments, the last one counted; joined, they
            are the rendered chat.

        Raises:
            ZoError: The template fails, or does not render an earlier part of the chat the way
                it renders it inside the whole, so that no prefix can be compared.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last-assistant":
            turns = turns[-1:]
        segments: list[Segment] = []
        done = ""
        for turn in turns:
            prompt = self.render(messages[:turn], tools, generation_prompt=True)
            _check_prefix(
                done,
                prompt,
                "rewrites earlier turns once later ones follow",
                "--train-on last-assistant",
            )
            whole = self.render(messages[: turn + 1], tools, generation_prompt=False)
            _check_prefix(
                prompt,
                whole,
                "writes an answered turn unlike its own generation prompt",
                "`prompt`+`completion` rows",
            )
            if whole == prompt:
                raise ZoError(f"the chat template leaves message {turn + 1} out.")
            segments += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return segments


def _check_prefix(prefix: str, text: str, what: str, remedy: str) -> None:
    if text.startswith(prefix):
        return
    pairs = zip(prefix, text, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(text)))
    raise ZoError(
        f"the chat template {what} ({prefix[same : same + _SHOWN]!r} became "
        f"{text[same : same + _SHOWN]!r} at character {same}), so the counted tokens cannot be "
        f"told apart; use {remedy}."
    )


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML; models were trained on plain JSON."""
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> NoReturn:
    """`raise_exception` of the templates."""
    raise jinja2.TemplateError(message)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
