"""Chat templates: rendered as llama-cpp-python does, cut at prefixes, kept in the sandbox."""

from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tests.helpers.stand_ins import CHAT, CHATML
from zo_gguf.data.chat import ChatTemplate
from zo_gguf.errors import ZoError

MESSAGES: list[dict[str, Any]] = CHAT["messages"]
GENERATION = "{% if add_generation_prompt %}<A>{% endif %}"
# Keeps the thoughts of the last turn only, as reasoning models do.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{% if loop.last %}{think}{% endif %}"
    "{{ m.content }}<E>{% else %}<U>{{ m.content }}<E>{% endif %}{% endfor %}" + GENERATION
)
# Opens the thoughts in the generation prompt but drops them from answered turns.
OPENING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<E>{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{think}{% endif %}"
)
LOOPS = (
    "{%- for m in messages -%}\n  {%- if loop.index > 3 %}{% break %}{% endif %}\n"
    "    {% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}\n" + GENERATION
)
TOOLS = "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}" + CHATML
BROKEN = "{{ raise_exception('Roles must alternate') if messages | length > 3 }}" + CHATML


@pytest.mark.parametrize("source", [CHATML, FORGETFUL, OPENING, LOOPS, TOOLS])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_like_llama_cpp_python(source: str, generation_prompt: bool) -> None:
    reference = Jinja2ChatFormatter(source, "</s>", "<s>", generation_prompt)
    tools = [{"type": "function", "function": {"name": "größe <b>", "parameters": {}}}]
    expected = reference(messages=MESSAGES, tools=tools).prompt
    template = ChatTemplate(source, "<s>", "</s>")
    assert template.render(MESSAGES, tools, generation_prompt=generation_prompt) == expected


@pytest.mark.parametrize("train_on", ["last-assistant", "all-assistant"])
def test_segments_are_the_rendered_chat(train_on: str) -> None:
    template = ChatTemplate(CHATML)
    segments = template.segments(MESSAGES, train_on=train_on)
    whole = template.render(MESSAGES, generation_prompt=False)
    assert "".join(text for text, _ in segments) == whole
    assert [counts for _, counts in segments] == [False, True] * (len(segments) // 2)
    answers = ["a1<|im_end|>\n", "a2<|im_end|>\n"]
    counted = [text for text, counts in segments if counts]
    assert counted == (answers[1:] if train_on == "last-assistant" else answers)


def test_answers_that_repeat_the_markers_are_cut_right() -> None:
    # A search for markers would find the ones that the user wrote.
    messages = [
        {"role": "user", "content": "say <|im_start|>assistant\nno"},
        {"role": "assistant", "content": "<|im_start|>assistant\nyes"},
    ]
    segments = ChatTemplate(CHATML).segments(messages)
    assert segments[-1] == ("<|im_start|>assistant\nyes<|im_end|>\n", True)
    assert len(segments) == 2


def test_templates_that_rewrite_earlier_turns() -> None:
    template = ChatTemplate(FORGETFUL)
    assert template.segments(MESSAGES)[-1] == ("{think}a2<E>", True)
    with pytest.raises(ZoError, match=r"rewrites earlier turns .*'\{think\}a1<E>'.*last-assistant"):
        template.segments(MESSAGES, train_on="all-assistant")


def test_templates_that_contradict_their_generation_prompt() -> None:
    with pytest.raises(ZoError, match=r"unlike its own generation prompt .* `prompt`\+`compl"):
        ChatTemplate(OPENING).segments(MESSAGES)


def test_templates_that_ignore_the_answer() -> None:
    with pytest.raises(ZoError, match="leaves message 2 out"):
        ChatTemplate("always the same").segments(MESSAGES[:2])


def test_refusals_are_one_sentence() -> None:
    with pytest.raises(ZoError, match="fails on this row: Roles must alternate"):
        ChatTemplate(BROKEN).segments(MESSAGES)
    assert ChatTemplate(BROKEN).segments(MESSAGES[:2])


def test_messages_are_not_changed_by_the_template() -> None:
    messages = [dict(message) for message in MESSAGES]
    source = "{% set _ = messages[0].update({'content': 'x'}) %}" + CHATML
    with pytest.raises(ZoError, match="unsafe"):
        ChatTemplate(source).segments(messages)
    assert messages == MESSAGES


def test_date_does_not_change_between_runs() -> None:
    text = ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([], generation_prompt=True)
    assert text == "26 Jul 2024"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (raise_exception | attr('__globals__'))['__builtins__'] }}",
        "{{ strftime_now.__self__.__class__.__base__ }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ undefined.attribute }}",
    ],
)
def test_sandbox(attack: str) -> None:
    with pytest.raises(ZoError, match="the chat template fails on this row"):
        ChatTemplate(attack).render(MESSAGES, generation_prompt=True)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% generation %}", "{% unknown %}"])
def test_bad_templates(source: str) -> None:
    with pytest.raises(ZoError, match="chat template is not valid Jinja"):
        ChatTemplate(source)
