"""The comparison of methods: equal budgets, the search for a rate, reuse, the table and the plot.

The runs are faked: a stand-in for the command line writes what `tune` would leave.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.compare import methods as compare_methods
from tools.compare import runs as compare_runs
from tools.compare.entries import ENTRIES, REFERENCE, Entry
from tools.compare.plot import Outcome, Report, SeedRun, speedup, tokens_to
from tools.compare.runs import Failed, Task, base_options, flags, tokens_per_step
from zo_gguf.data.dataset import Example
from zo_gguf.tuning.trajectory import Trajectory

RATE, EPS = 0.02, 0.05
BASE_LOSS = 1.3
BUDGET, ROW_TOKENS = 64_000.0, 50.0


@pytest.fixture
def task(tmp_path: Path) -> Task:
    models, data = tmp_path / "models", tmp_path / "data"
    for folder in (models, data):
        folder.mkdir()
    for name in ("m-Q4_0.gguf", "m-Q4_0.mask.safetensors", "m-Q4_0.random.mask.safetensors"):
        (models / name).touch()
    return Task(models, "m", data, tmp_path / "out", BUDGET, 2, ROW_TOKENS)


class FakeZo:
    """`zo-gguf` without a model: the loss depends on the rate, and x3 diverges."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.best = RATE / 3  # the rate that learns most
        self.merges = True

    def __call__(self, run: Path, verb: str, *words: str) -> str:
        self.calls.append((verb, *words))
        return {"tune": self.tune, "eval": self.eval, "merge": self.merge}[verb](run, words)

    def tune(self, run: Path, words: tuple[str, ...]) -> str:
        if words[0] == "--resume":
            raise Failed("The loss is not finite at step 2.")
        pairs = dict(zip(words[::2], words[1::2], strict=False))
        given = {key[2:].replace("-", "_"): v for key, v in pairs.items() if key.startswith("--")}
        given.pop("overwrite", None)
        options = {"learning_rate": RATE, "eps": EPS, "output": str(run)} | given
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(options))
        header = {"directions": 1, "nnz": 12}
        Trajectory.create(run / "trajectory.bin", header)
        rate, iters = float(options["learning_rate"]), int(options["iters"])
        if rate > 2 * RATE:
            raise Failed("The loss is not finite at step 2.")
        loss = 1.0 + abs(rate - self.best) + 0.1 * int(options["seed"])
        lines = [(0, BASE_LOSS), (iters, loss)]
        metrics = [{"step": s, "valid_loss": x, "valid_accuracy": 0.5} for s, x in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
        (run / "summary.json").write_text("{}")
        return ""

    def eval(self, run: Path, words: tuple[str, ...]) -> str:
        return json.dumps({"loss": 1.25, "accuracy": 0.6, "n": 9})

    def merge(self, run: Path, words: tuple[str, ...]) -> str:
        if not self.merges:
            raise Failed("this delta is of no kind that a GGUF can hold; " * 4)
        result = {"retention": 0.987, "accuracy_merged": 0.61, "loss_merged": 1.1}
        Path(words[2] + ".merge.json").write_text(json.dumps(result))
        return ""


@pytest.fixture
def zo(monkeypatch: pytest.MonkeyPatch) -> FakeZo:
    fake = FakeZo()
    monkeypatch.setattr(compare_runs, "zo", fake)
    return fake


def compare(task: Task, *entries: Entry, jobs: int = 2) -> Report:
    return compare_methods.run(task, entries, ["Q4_0"], jobs, None)


class TestEntries:
    def test_labels_and_folders_are_distinct_and_the_reference_is_there(self) -> None:
        assert len({entry.slug for entry in ENTRIES}) == len(ENTRIES)
        assert REFERENCE in [entry.label for entry in ENTRIES]
        assert all(1.0 in entry.rates for entry in ENTRIES)

    def test_quants(self) -> None:
        for_f16 = {e.label for e in ENTRIES if e.applies("F16")}
        for_q4 = {e.label for e in ENTRIES if e.applies("Q4_0")}
        assert for_f16 <= for_q4
        assert all("block-scale" in label for label in for_q4 - for_f16)
        assert REFERENCE in for_f16 & for_q4

    @pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
    def test_this_version_has_what_an_entry_asks_for(self, entry: Entry, task: Task) -> None:
        (task.models / f"m-Q4_0.{entry.mask}.mask.safetensors").touch()
        assert tokens_per_step(task, base_options(task, entry, "Q4_0")) > 0

    @pytest.mark.parametrize(
        ("entry", "forwards"),
        [
            (Entry("a"), 2),
            (Entry("a", options={"directions": 4}), 8),
            (Entry("a", estimator="fzoo", options={"directions": 8}), 9),
            (Entry("a", estimator="natural", options={"sides": 1}), 17 / 4),
            (Entry("a", estimator="natural", options={"sides": 2}), 32 / 4),
        ],
    )
    def test_forwards_of_a_step(self, entry: Entry, forwards: float, task: Task) -> None:
        tokens = tokens_per_step(task, base_options(task, entry, "Q4_0"))
        assert tokens == ROW_TOKENS * 16 * forwards

    def test_row_tokens_are_those_of_the_forward_pass(
        self, task: Task, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        short = Example([0, 5, 6, 9], [False] * 3 + [True], ((9,), (8,)), 0, 3)
        long = Example([0] * 7, [False] * 5 + [True, True])
        monkeypatch.setattr(compare_methods, "Engine", FakeContext)
        monkeypatch.setattr(compare_methods, "load_examples", lambda *_, **__: [short, long])
        assert compare_methods.row_tokens(task.model("Q4_0"), task.data) == (3 + 6) / 2


class FakeContext:
    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class TestRuns:
    def test_the_rate_with_the_lowest_loss_is_used_by_every_seed(
        self, task: Task, zo: FakeZo
    ) -> None:
        (outcome,) = compare(task, Entry("a")).outcomes
        assert outcome.multiplier == pytest.approx(1 / 3, abs=1e-3)
        assert outcome.search["3"] == "The loss is not finite at step 2."
        assert outcome.at_edge
        assert outcome.n_parameters == 12
        steps = int(BUDGET / (2 * 16 * ROW_TOKENS))
        tuned = [dict(zip(c[1::2], c[2::2], strict=False)) for c in zo.calls if c[0] == "tune"]
        searched = {(None, "0"), ("0.00667", "0"), ("0.06", "0")}
        assert {(t.get("--learning-rate"), t["--seed"]) for t in tuned} == searched | {
            ("0.00667", "1")
        }
        assert {t["--iters"] for t in tuned} == {str(steps)}
        assert {t["--eps"] for t in tuned if "--learning-rate" in t} == {str(EPS)}
        assert [run.curve[-1][0] for run in outcome.runs] == [BUDGET, BUDGET]

    def test_finished_runs_are_used_again_and_interrupted_ones_resumed(
        self, task: Task, zo: FakeZo
    ) -> None:
        compare(task, Entry("a"))
        zo.calls.clear()
        (outcome,) = compare(task, Entry("a")).outcomes
        assert len(outcome.runs) == 2
        assert [c[:2] for c in zo.calls] == [("tune", "--resume")]  # the one that diverged

    def test_other_options_are_other_runs(self, task: Task, zo: FakeZo) -> None:
        compare(task, Entry("a"))
        zo.calls.clear()
        compare(task, Entry("a", options={"examples_per_step": 8}))
        assert sum(call[0] == "tune" for call in zo.calls) == 4

    def test_what_this_version_or_folder_lacks_is_said_and_the_rest_goes_on(
        self, task: Task, zo: FakeZo
    ) -> None:
        report = compare(
            task,
            Entry("option", options={"no_such_option": 1}),
            Entry("method", "no-such-method", mask=None),
            Entry("optimizer", optimizer="no-such"),
            Entry("value", options={"directions": 0}),
            Entry("mask", mask="other"),
            Entry("random", mask="random"),
        )
        reasons = {outcome.label: outcome.failure for outcome in report.outcomes}
        assert reasons.pop("random") == ""
        words = ("no_such_option", "no-such-method", "no-such", "directions", "other")
        for (label, reason), word in zip(reasons.items(), words, strict=True):
            assert reason.startswith("not available: "), label
            assert word in reason
            assert f"- Q4_0, {label}: {reason}" in report.markdown()

    def test_a_failed_merge_is_a_cell(self, task: Task, zo: FakeZo) -> None:
        zo.merges = False
        text = compare(task, Entry("a")).markdown()
        assert "this delta is of no kind" in next(x for x in text.splitlines() if "| a |" in x)

    def test_options_become_flags(self) -> None:
        options = {"absolute": True, "clip": "adaptive", "eps": 0.1, "json": False}
        assert flags(options) == ["--absolute", "--clip", "adaptive", "--eps", "0.1", "--no-json"]

    def test_masks_beside_the_model_or_in_a_folder_of_their_own(self, task: Task) -> None:
        apart = task.models / "other" / "m-Q4_0.mask.safetensors"
        apart.parent.mkdir()
        apart.touch()
        names = {"": "m-Q4_0", "random": "m-Q4_0.random"}
        for score, stem in names.items():
            expected = str(task.models / f"{stem}.mask.safetensors")
            assert base_options(task, Entry("a", mask=score), "Q4_0")["mask"] == expected
        assert task.mask("Q4_0", "other") == apart
        assert "mask" not in base_options(task, Entry("a", mask=None), "Q4_0")

    def test_a_real_failure_says_its_last_line(self, task: Task) -> None:
        with pytest.raises(Failed, match="no-such"):
            compare_runs.call(task.out / "log", ["python3", "/no-such-file.py"])


def outcome(label: str, *curves: list[tuple[float, float]], **options: Any) -> Outcome:
    runs = [
        SeedRun("run", seed, curve, *({"loss": x, "accuracy": 0.5} for x in (curve[-1][1], 1.0)))
        for seed, curve in enumerate(curves)
    ]
    return Outcome("Q4_0", label, runs=runs, **options)


class TestReport:
    @pytest.mark.parametrize(
        ("target", "tokens"), [(1.5, 50), (1.0, 100), (0.9, 250), (0.8, 300), (0.79, None), (3, 0)]
    )
    def test_interpolation(self, target: float, tokens: float | None) -> None:
        curve = [(0, 2.0), (100, 1.0), (200, 1.0), (300, 0.8)]
        assert tokens_to(curve, target) == (pytest.approx(tokens) if tokens else tokens)

    def test_speedup_is_of_the_means_over_seeds(self) -> None:
        slow = outcome(REFERENCE, [(0, 2.0), (100, 1.0)], [(0, 2.0), (100, 0.8)])
        fast = outcome("fast", [(0, 2.0), (50, 0.9), (100, 0.5)])
        assert speedup(fast, slow) == pytest.approx(2)
        assert speedup(slow, slow) == 1
        assert speedup(slow, fast) is None
        assert speedup(slow, outcome("flat", [(0, 2.0), (100, 2.0)])) is None

    def test_files(self, tmp_path: Path) -> None:
        report = Report({"tokens": 100}, REFERENCE)
        report.outcomes = [
            outcome(REFERENCE, [(0, 2.0), (100, 1.0)], [(0, 2.0), (100, 1.1)]),
            outcome("b", [(0, 2.0), (100, 0.9)], merge={"failure": "no | way"}),
        ]
        measured = {"loss": 2.0, "accuracy": None}
        report.base["Q4_0"] = {"valid": measured, "test": measured}
        report.bounds["norm"] = {"Q4_0": report.base["Q4_0"]}
        report.write(tmp_path)
        table = [x for x in (tmp_path / "compare.md").read_text().splitlines() if x[:1] == "|"]
        assert len(table) == 6
        assert len({line.count("|") for line in table}) == 1
        assert "1.0500 ± 0.0707" in table[3]
        assert "no / way" in table[4]
        assert json.loads((tmp_path / "compare.json").read_text())["outcomes"][1]["label"] == "b"
        assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_rates_take_the_place_of_those_of_the_entries(
    task: Task, zo: FakeZo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_methods, "row_tokens", lambda *_: ROW_TOKENS)
    for split in ("train", "valid", "test"):
        (task.data / f"{split}.jsonl").touch()
    task.model("Q4_0").write_bytes(b"GGUF")
    paths = {"models": task.models, "data": task.data, "out": task.out}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    words += f"--name m --tokens {BUDGET} --seeds 2".split()
    words += ["--only", "^sensitive, spsa, adam$"]
    assert compare_methods.main([*words, "--rates", "1"]) == 0
    assert sum(call[0] == "tune" for call in zo.calls) == 2  # one search, one more seed
    assert "(x1)" in capsys.readouterr().out
