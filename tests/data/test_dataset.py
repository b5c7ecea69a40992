"""Rows -> examples: shapes, token boundaries, BOS, end tokens and cuts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stand_ins import (
    CHAT,
    CHATML,
    CHOICES,
    COMPLETION,
    FakeEngine,
    SentencePiece,
    load,
    marked,
)
from zo_gguf.errors import ZoError

MARKED = "<s><|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n{}a1<|im_end|>{}\n<|im_start|>"


@pytest.fixture
def sentence_piece(tmp_path: Path) -> Iterator[SentencePiece]:
    engine = SentencePiece(tmp_path / "vocab.gguf")
    yield engine
    engine.close()


# ---- shapes --------------------------------------------------------------------------------------


def test_completion_counts_completion_and_end_token(tmp_path: Path) -> None:
    engine = FakeEngine()
    (example,) = load(tmp_path, COMPLETION, engine=engine)
    assert marked(example, engine) == "<s>ask{} yes</s>{}"
    assert (example.n_prompt, example.source, example.choices) == (4, "d.jsonl:1", ())


def test_completion_of_a_chat_model_ends_the_turn(tmp_path: Path) -> None:
    engine = FakeEngine(chat_template=CHATML)
    (example,) = load(tmp_path, COMPLETION, engine=engine)
    assert marked(example, engine) == "<s>ask{} yes<|im_end|>{}"


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_end_token_is_not_doubled(tmp_path: Path, end: str) -> None:
    engine = FakeEngine()
    (example,) = load(tmp_path, {"prompt": "ask", "completion": "x" + end}, engine=engine)
    assert engine.text(example.tokens) == "<s>askx" + end


def test_model_without_end_token(tmp_path: Path) -> None:
    engine = FakeEngine(eos_id=-1)
    (example,) = load(tmp_path, COMPLETION, engine=engine)
    assert marked(example, engine) == "<s>ask{} yes{}"


@pytest.mark.parametrize("answer", [1, " sports", "1"])
def test_choices(tmp_path: Path, answer: Any) -> None:
    engine = FakeEngine()
    (example,) = load(tmp_path, {**CHOICES, "answer": answer}, engine=engine)
    assert marked(example, engine) == "<s>on{} sports{}"
    assert example.choices == ((engine.id(" world"),), (engine.id(" sports"),))
    assert (example.answer, example.n_prompt) == (1, 3)


def test_text_of_a_choice_comes_before_its_index(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"prompt": "p", "choices": ["1", "0"], "answer": "0"})
    assert example.answer == 1


def test_text_counts_all_but_the_first_token(tmp_path: Path) -> None:
    for add_bos, expected in ((True, "<s>{}ab c{}"), (False, "ab{} c{}")):
        engine = FakeEngine(add_bos=add_bos)
        (example,) = load(tmp_path, {"text": "ab c"}, engine=engine)
        assert marked(example, engine) == expected
        assert example.target_mask[0] is False


def test_messages_count_the_last_turn(tmp_path: Path) -> None:
    engine = FakeEngine(chat_template=CHATML)
    (example,) = load(tmp_path, CHAT, engine=engine)
    text = MARKED.replace("{}", "") + "user\nq2<|im_end|>\n<|im_start|>assistant\n{}a2<|im_end|>{}"
    assert marked(example, engine) == text
    # Nothing after the last assistant turn is ever predicted.
    longer = {"messages": [*CHAT["messages"], {"role": "user", "content": "q3"}]}
    assert load(tmp_path, longer, engine=engine)[0].tokens == example.tokens


def test_messages_count_all_turns(tmp_path: Path) -> None:
    engine = FakeEngine(chat_template=CHATML)
    (example,) = load(tmp_path, CHAT, engine=engine, train_on="all-assistant")
    text = MARKED + "user\nq2<|im_end|>\n<|im_start|>assistant\n{}a2<|im_end|>{}"
    assert marked(example, engine) == text


def test_tool_calls_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{{ tools[0].name }};{% for m in messages %}{% if m.tool_calls is defined %}"
        "call {{ m.tool_calls[0].name }} {{ m.content is none }}{% else %}{{ m.content }}"
        "{% endif %};{% endfor %}"
    )
    engine = FakeEngine(chat_template=template)
    asking = {"role": "user", "content": [{"type": "text", "text": "now?"}], "tool_calls": None}
    calling = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    row = {"messages": [asking, calling], "tools": [{"name": "clock"}]}
    (example,) = load(tmp_path, row, engine=engine)
    assert marked(example, engine) == "<s>clock;now?;{}call clock True;{}"


def test_instruction_rows_become_what_the_model_speaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"instruction": "do", "input": "it", "output": "done"}
    engine = FakeEngine()
    (example,) = load(tmp_path, row, engine=engine)
    assert marked(example, engine) == "<s>do\n\nit\n\n{}done</s>{}"
    engine = FakeEngine(chat_template=CHATML)
    (example,) = load(tmp_path, row, engine=engine)
    prompt = "<s><|im_start|>user\ndo\n\nit<|im_end|>\n<|im_start|>assistant\n"
    assert marked(example, engine) == prompt + "{}done<|im_end|>{}"
    assert "converted 1 rows from `instruction/input/output`" in caplog.text


def test_conversations_are_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(chat_template=CHATML)
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[m["role"]], "value": m["content"]} for m in CHAT["messages"]]
    converted = load(tmp_path, {"conversations": turns}, engine=engine)[0]
    assert converted.tokens == load(tmp_path, CHAT, engine=engine)[0].tokens
    assert "converted 1 rows from `conversations`" in caplog.text


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    engine = FakeEngine(chat_template=CHATML)
    messages = CHAT["messages"]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert (
        load(tmp_path, row, engine=engine)[0].tokens
        == load(tmp_path, CHAT, engine=engine)[0].tokens
    )


def test_columns_are_renamed(tmp_path: Path) -> None:
    row = {"question": "on", "options": [" world", " sports"], "label": 0, "prompt": "wrong"}
    names = {"prompt": "question", "choices": "options", "answer": "label"}
    expected = load(tmp_path, {**CHOICES, "answer": 0})[0].tokens
    assert load(tmp_path, row, fields=names)[0].tokens == expected
    pairs = [f"{key}={name}" for key, name in names.items()]
    assert load(tmp_path, row, fields=pairs)[0].tokens == expected
    with pytest.raises(ZoError, match=r"d.jsonl:1: no column 'q' for 'prompt'; the row has 'quest"):
        load(tmp_path, row, fields={"prompt": "q"})


def test_mixed_kinds_in_one_file(tmp_path: Path) -> None:
    rows = load(tmp_path, COMPLETION, "", CHOICES, {"text": "abc"})
    assert [(r.kind, r.source) for r in rows] == [
        ("completion", "d.jsonl:1"),
        ("choices", "d.jsonl:3"),
        ("text", "d.jsonl:4"),
    ]


# ---- BOS and boundaries --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["ask", "<s>ask", "<s><s>ask"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_exactly_once(tmp_path: Path, prompt: str, add_bos: bool) -> None:
    engine = FakeEngine(add_bos=add_bos)
    (example,) = load(tmp_path, {**COMPLETION, "prompt": prompt}, engine=engine)
    expected = 1 if add_bos or prompt.startswith("<s>") else 0
    assert example.tokens.count(engine.bos_id) == expected
    assert engine.text(example.tokens) == "<s>" * expected + "ask yes</s>"
    assert sum(example.target_mask) == 5


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_written_by_the_chat_template(tmp_path: Path, add_bos: bool) -> None:
    engine = FakeEngine(add_bos=add_bos, chat_template="{{ bos_token }}" + CHATML)
    (example,) = load(tmp_path, CHAT, engine=engine, train_on="all-assistant")
    assert example.tokens.count(engine.bos_id) == 1
    assert marked(example, engine).startswith(MARKED)


def test_no_token_straddles_the_prompt_boundary(tmp_path: Path) -> None:
    # "a" + "bc" joins to "ab", "c", which a prompt ending in "a" could never produce.
    engine = FakeEngine()
    (example,) = load(tmp_path, {"prompt": "xa", "completion": "bc"}, engine=engine)
    words = [engine.token_text(token) for token in example.tokens]
    assert words == ["<s>", "x", "a", "bc", "</s>"]
    (example,) = load(
        tmp_path, {"prompt": "xa", "choices": ["bc", " world"], "answer": 1}, engine=engine
    )
    assert example.choices == ((engine.id("bc"),), (engine.id(" world"),))


def test_sentence_piece_boundaries(tmp_path: Path, sentence_piece: SentencePiece) -> None:
    engine = sentence_piece

    def pieces(prompt: str, completion: str) -> list[list[str]]:
        row = {"prompt": prompt, "completion": completion}
        (example,) = load(tmp_path, row, engine=engine)
        cut = example.n_prompt
        assert example.tokens[0] == engine.bos_id
        assert example.tokens[1:cut] == engine.tokenize(prompt)  # what an app feeds the model
        assert example.tokens[-1] == engine.eos_id
        return [
            [engine.token_text(t) for t in p]
            for p in (example.tokens[1:cut], example.tokens[cut:-1])
        ]

    assert [engine.token_text(t) for t in engine.tokenize("yes")] == [" yes"]  # the trap
    assert pieces("hello", " world")[1] == [" world"]
    assert pieces("hello", "y")[1] == ["y"]
    # The space at the end of the prompt stays there; the completion gets no second one.
    prompt, completion = pieces("hello ", "yes")
    assert prompt[-1] == " "
    assert completion == ["yes"]


# ---- length --------------------------------------------------------------------------------------


def test_long_prompts_lose_their_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    rows = load(
        tmp_path,
        {"prompt": "123456789", "completion": "xyz"},
        COMPLETION,
        engine=engine,
        max_tokens=9,
    )
    assert marked(rows[0], engine) == "<s>6789{}xyz</s>{}"
    assert (rows[0].n_prompt, rows[0].n_cut, rows[1].n_cut) == (5, 5, 0)
    assert "1 of 2 rows were too long and were cut" in caplog.text


def test_models_without_bos_keep_one_prompt_token(tmp_path: Path) -> None:
    engine = FakeEngine(add_bos=False)
    row = {"prompt": "123456789", "completion": "xyz"}
    (example,) = load(tmp_path, row, engine=engine, max_tokens=5)
    assert marked(example, engine) == "9{}xyz</s>{}"
    with pytest.raises(ZoError, match=r"d.jsonl:1: its 4 tokens from the first counted one on"):
        load(tmp_path, row, engine=engine, max_tokens=4)


def test_the_longest_choice_must_fit(tmp_path: Path) -> None:
    engine = FakeEngine()
    row = {"prompt": "123456789", "choices": ["a", "defgh"], "answer": 0}
    (example,) = load(tmp_path, row, engine=engine, max_tokens=8)
    assert marked(example, engine) == "<s>89{}a{}"
    assert example.n_prompt + max(map(len, example.choices)) == 8
    with pytest.raises(ZoError, match="do not fit"):
        load(tmp_path, row, engine=engine, max_tokens=5)


def test_counted_turns_are_never_cut(tmp_path: Path) -> None:
    engine = FakeEngine(chat_template=CHATML)
    whole = load(tmp_path, CHAT, engine=engine, train_on="all-assistant")[0]
    need = len(whole.tokens) - whole.n_prompt
    short = load(tmp_path, CHAT, engine=engine, train_on="all-assistant", max_tokens=need + 1)[0]
    assert short.tokens == [engine.bos_id, *whole.tokens[whole.n_prompt :]]
    with pytest.raises(ZoError, match=f"its {need} tokens"):
        load(tmp_path, CHAT, engine=engine, train_on="all-assistant", max_tokens=need)


def test_text_is_cut_at_its_end(tmp_path: Path) -> None:
    engine = FakeEngine()
    (example,) = load(tmp_path, {"text": "123456789"}, engine=engine, max_tokens=4)
    assert marked(example, engine) == "<s>{}123{}"
    assert example.n_cut == 6


def test_default_length_is_what_context_and_model_hold(tmp_path: Path) -> None:
    row = {"text": "x" * 100}
    for limits in ({"ctx_tokens": 20}, {"n_ctx_train": 20}):
        engine = FakeEngine(**limits)
        assert len(load(tmp_path, row, engine=engine)[0].tokens) == 20
        with pytest.raises(ZoError, match="max_seq_length 21 is more than fits"):
            load(tmp_path, row, engine=engine, max_tokens=21)
    with pytest.raises(ZoError, match="max_seq_length must be at least 2"):
        load(tmp_path, row, max_tokens=1)
