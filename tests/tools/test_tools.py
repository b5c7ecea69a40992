"""The task generator, the README's promises, rules that files keep."""

import json
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tools import make_task
from zo_gguf.cli import _make_parser

ROOT = Path(__file__).resolve().parents[2]
SMALL_WORDS = {"with", "from", "over", "second", "last", "that", "into", "this", "first", "near"}


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def meaningful_words(split: str) -> set[str]:
    text = " ".join(" ".join(topic[split]) for topic in make_task.WORDS.values()).lower()
    found = {word.rstrip("s") for word in re.findall(r"[a-z]{4,}", text)}
    return found - SMALL_WORDS


class TestTask:
    def test_same_seed_same_files_other_seed_other_files(self, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            make_task.make_task(tmp_path / name, 30, 5, 5, seed)
        files = ["train.jsonl", "valid.jsonl", "test.jsonl", make_task.CALIBRATION]
        for file in files:
            a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
            assert a == b
            assert a != c

    def test_rows_are_whole_distinct_and_balanced(self, task_dir: Path) -> None:
        train = rows(task_dir / "train.jsonl")
        prompts = [row["prompt"] for row in train]
        assert len(set(prompts)) == len(train) == 400
        assert not any("{" in prompt or "  " in prompt for prompt in prompts)
        assert not any(re.search(r"\ba [aeiou]", prompt) for prompt in prompts)
        share = [n / len(train) for n in Counter(row["answer"] for row in train).values()]
        assert len(share) == len(train[0]["choices"])
        assert min(share) > 0.1

    def test_train_and_test_share_no_word_and_no_pattern(self) -> None:
        assert not meaningful_words("train") & meaningful_words("test")
        assert not set(make_task.PATTERNS["train"]) & set(make_task.PATTERNS["test"])
        assert len(meaningful_words("train")) > 300

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_no_text_names_its_topic(self, split: str) -> None:
        text = " ".join(" ".join(topic[split]) for topic in make_task.WORDS.values())
        for topic in make_task.WORDS:
            assert not re.search(rf"\b{topic.rstrip('s')}s?\b", text)

    def test_calibration_text_holds_no_answers(self, task_dir: Path) -> None:
        text = (task_dir / make_task.CALIBRATION).read_text(encoding="utf-8")
        question = make_task.PROMPT.partition("{text}")[2].strip()
        assert question not in text
        assert len(text.split()) > 3000


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    wanted = list(project["build-system"]["requires"]) + list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in wanted:
        name = re.split(r"[<>=!~\[; ]", requirement.lower().replace("_", "-"))[0]
        assert name in pins, requirement
        if "==" in requirement:
            assert requirement.split("==")[1] == pins[name]


class TestReadme:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_command_lines_are_understood(self) -> None:
        lines = re.findall(r"(?:^|`)zo-gguf ([^`#\n]+)", self.text, flags=re.MULTILINE)
        lines = [line for line in lines if line.split()[0] != "VERB"]
        assert len(lines) > 8
        for line in lines:
            _, unknown = _make_parser().parse_known_args(shlex.split(line))
            assert not unknown, line

    def test_tree_names_every_room_and_no_other(self) -> None:
        tree = self.text.split("## What lies where")[1].split("```")[1]
        listed = set(re.findall(r"\b([a-z_]+)/", tree))
        tops = {"native", "zo_gguf", "tools", "tests"}
        rooms = {file.parent.name for file in (ROOT / "zo_gguf").glob("*/__init__.py")}
        assert listed == tops | rooms | {"assets"}
