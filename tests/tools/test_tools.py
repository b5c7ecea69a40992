"""The tools people start with: dev.py's set-up, the task generator, the README's promises."""

import json
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tools import dev, make_task
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


@pytest.fixture
def fake_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that dev.py takes for the repository, with a pip that only takes notes."""
    for name in ("pyproject.toml", "CMakeLists.txt", "tools/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "a.cpp").write_text("int a;\n")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(dev, "STAMPS", tmp_path / ".venv" / "zo-stamps")
    monkeypatch.setattr(dev, "CONSTRAINTS", tmp_path / "tools" / "constraints.txt")
    monkeypatch.setattr(dev, "make_venv", lambda: (tmp_path / ".venv").mkdir(exist_ok=True))
    monkeypatch.setattr(dev, "has_amx", lambda: False)
    return tmp_path


class TestSetup:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
        calls: list[tuple[str, ...]] = []

        def pip(what: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
            flags = (environment or {}).get("CXXFLAGS", "")
            calls.append((*filter(None, [flags]), *arguments))

        monkeypatch.delenv("CXXFLAGS", raising=False)
        monkeypatch.setattr(dev, "pip", pip)
        return calls

    def test_second_call_installs_nothing(
        self, fake_repository: Path, installed: list[tuple[str, ...]]
    ) -> None:
        dev.setup()
        assert len(installed) == 4
        assert installed[-1][-1] == str(fake_repository)
        installed.clear()
        dev.setup()
        assert installed == []

    def test_native_change_builds_only_libzo(
        self, fake_repository: Path, installed: list[tuple[str, ...]]
    ) -> None:
        dev.setup()
        installed.clear()
        (fake_repository / "native" / "a.cpp").write_text("int b;\n")
        dev.setup()
        assert [call[-2:] for call in installed] == [("--editable", str(fake_repository))]

    def test_new_pin_installs_everything(
        self, fake_repository: Path, installed: list[tuple[str, ...]]
    ) -> None:
        dev.setup()
        installed.clear()
        with dev.CONSTRAINTS.open("a") as file:
            file.write("another==1.0\n")
        dev.setup()
        assert len(installed) == 4

    @pytest.mark.parametrize("cached", [True, False])
    def test_amx_is_left_out(
        self,
        cached: bool,
        fake_repository: Path,
        installed: list[tuple[str, ...]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(dev, "has_amx", lambda: True)
        monkeypatch.setattr(dev, "uses_amx", lambda: cached)
        dev.setup()
        engine = [call for call in installed if call[-1] == dev.pinned(dev.ENGINE)]
        assert all(call[0] == "-mno-amx-int8" for call in engine)
        anew = [{"--no-cache-dir", "--force-reinstall"} <= {*call} for call in engine]
        assert anew == ([False, True] if cached else [False])
        installed.clear()
        dev.setup()
        assert installed == []

    def test_failed_step_is_done_again(
        self, fake_repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pip(what: str, *arguments: str, **_: object) -> None:
            raise dev.SetupError("no network")

        monkeypatch.setattr(dev, "pip", pip)
        for _ in range(2):
            with pytest.raises(dev.SetupError, match="no network"):
                dev.setup()

    def test_failure_shows_the_error_and_what_to_do(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text("Collecting x\nERROR: No space left on device\n" + "noise\n" * 50)
        message = dev.explain("torch", log)
        assert "ERROR: No space left on device" in message
        assert "Free some disk space" in message
        assert "noise" not in message

    def test_unknown_command_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["dev.py", "instal"])
        assert dev.main() == 2
        assert "dev.py setup" in capsys.readouterr().out


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
