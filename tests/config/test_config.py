"""Configs: one mechanism for Python, YAML and flags; every bad value has its sentence."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml

from zo_gguf import config as configs
from zo_gguf.config import (
    EvalConfig,
    ExportConfig,
    MergeConfig,
    TuneConfig,
    build,
    config_hash,
    load_config,
    save_config,
    takes,
    to_dict,
)
from zo_gguf.config.option import Config, add_arguments, flags, parse_fields
from zo_gguf.errors import ZoError

NEEDED = {"model": "m.gguf", "data": "d", "output": "o"}
VERBS = [c for n, c in vars(configs).items() if n.endswith("Config") and c is not Config]


def tune(**options: object) -> TuneConfig:
    return TuneConfig(**{**NEEDED, **options})


def test_values_are_converted_by_declared_type() -> None:
    config = tune(eps="1e-2", iters="2e3", seed=np.int64(3), learning_rate="1e-5", model=Path("m"))
    assert (config.eps, config.iters, config.seed, config.learning_rate) == (0.01, 2000, 3, 1e-5)
    assert type(config.iters) is int
    assert type(config.seed) is int
    assert config.model == "m"
    assert tune(eps="auto").eps == "auto"
    assert tune(field="prompt=q").field == ["prompt=q"]


def test_list_defaults_are_not_shared() -> None:
    first = ExportConfig(model="m", output="o")
    first.quant.append("Q8_0")
    assert ExportConfig(model="m", output="o").quant == ["Q4_0"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"iters": 0}, "iters must be at least 1, not 0"),
        ({"iters": 1.5}, "iters must be a whole number, not 1.5"),
        ({"iters": True}, "iters must be a whole number, not True"),
        ({"iters": "many"}, "iters must be a whole number, not 'many'"),
        ({"iters": "9" * 5000}, "iters must be a whole number"),
        ({"iters": "inf"}, "iters must be a whole number"),
        ({"eps": 0}, "eps must be greater than 0"),
        ({"eps": -1.0}, "eps must be greater than 0"),
        ({"eps": float("nan")}, "eps must be a number or 'auto', not nan"),
        ({"eps": "automatic"}, "eps must be a number or 'auto', not 'automatic'"),
        ({"learning_rate": "inf"}, "learning_rate must be a number"),
        ({"examples_per_step": 0}, "examples_per_step must be at least 1"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"schedule": "step"}, "schedule must be 'linear' or 'constant' or 'cosine', not 'step'"),
        ({"val_split": 1}, "val_split must be less than 1"),
        ({"seed": 2**63}, "seed must be less than"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"n_gpu_layers": -2}, "n_gpu_layers must be at least -1"),
        ({"overwrite": "maybe"}, "overwrite must be true or false"),
        ({"model": None}, "model must be text, not None"),
        ({"train_on": "user"}, "train_on must be"),
        ({"field": ["prompt"]}, "field must look like prompt=question, not 'prompt'"),
        ({"field": ["a=b", "a=c"]}, "field 'a' is given twice"),
    ],
)
def test_bad_tune_values(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ZoError, match="^" + sentence.replace("(", r"\(")):
        tune(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0},
        {"density": 1},
        {"include": "("},
        {"layers": "4-"},
        {"layers": "a"},
        {"quant": []},
        {"max_rank": 0},
        {"max_rank": "some"},
        {"score": "gradient"},
        {"name": "a/b"},
        {"chunk_layers": 0},
    ],
)
def test_bad_export_values(options: dict[str, object]) -> None:
    with pytest.raises(ZoError, match=next(iter(options))):
        ExportConfig(model="m", output="o", **options)


def test_good_export_values() -> None:
    config = ExportConfig(model="m", output="o", max_rank="16", layers=4, include=r"attn_[qk]")
    assert (config.max_rank, config.layers) == (16, "4")
    assert ExportConfig(model="m", output="o", max_rank="none").max_rank == "none"


def test_rank_without_lora_is_refused() -> None:
    with pytest.raises(ZoError, match="--lora"):
        MergeConfig(run="r", output="o", rank=4)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = tune(eps=1e-5, learning_rate=3e-7, field=["prompt=frage"], threads=2)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TuneConfig, tmp_path / "config.yaml") == config
    # Any YAML 1.1 reader must see the same numbers.
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == to_dict(config)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("eps: 1e-2\nlearning-rate: 1e-5\niters: 3\nthreads: null\nfield: prompt=q\n")
    assert yaml.safe_load("1e-5") == "1e-5"  # the trap
    config = build(TuneConfig, NEEDED, str(file))
    assert (config.eps, config.learning_rate, config.iters) == (0.01, 1e-5, 3)
    assert config.threads is None
    assert config.field == ["prompt=q"]


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("iters: 3\nseed: 5\n")
    config = build(TuneConfig, {**NEEDED, "iters": "7"}, str(file), {"seed": 1, "patience": 9})
    assert (config.iters, config.seed, config.patience) == (7, 5, 9)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("itres: 3\n", "unknown option 'itres'; did you mean 'iters'?"),
        ("zzz: 3\n", "unknown option 'zzz'."),
        ("iters: three\n", "iters must be a whole number, not 'three'"),
        ("iters: 3\niters: 4\n", "gives one option twice"),
        ("- iters\n", "must hold `option: value` lines"),
        ("3: 4\n", "must hold `option: value` lines"),
        ("iters: [\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("iters: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("&a [*a, *a]\n", "must hold"),
        ("iters: \x00\n", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("", "is empty"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ZoError) as caught:
        build(TuneConfig, NEEDED, str(file))
    assert sentence in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_yaml_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"iters: \xff\xfe")
    with pytest.raises(ZoError, match="not valid YAML"):
        build(TuneConfig, NEEDED, str(file))
    with pytest.raises(ZoError, match="not a file"):
        build(TuneConfig, NEEDED, str(tmp_path / "none.yaml"))
    file.write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(ZoError, match="larger than 1 MiB"):
        build(TuneConfig, NEEDED, str(file))


def test_comments_alone_are_an_empty_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert build(TuneConfig, NEEDED, str(file)) == tune()


def test_missing_options_are_named_together() -> None:
    with pytest.raises(ZoError, match="-m/--model, --data, -o/--output"):
        build(TuneConfig, {})
    with pytest.raises(ZoError, match="RUN, -o/--output"):
        build(MergeConfig, {})


def test_a_verb_takes_a_config_or_its_options() -> None:
    verb = takes(TuneConfig)(lambda config: config)
    assert verb(tune(iters=5)) == verb(**NEEDED, iters=5) == tune(iters=5)
    with pytest.raises(ZoError, match="unknown option 'itres'; did you mean 'iters'"):
        verb(**NEEDED, itres=5)
    with pytest.raises(ZoError, match="missing -m/--model"):
        verb(iters=5)
    with pytest.raises(ZoError, match="TuneConfig and iters were given"):
        verb(tune(), iters=5)


def test_config_hash_depends_on_values_only() -> None:
    assert config_hash(tune(iters=5)) == config_hash(tune(iters="5"))
    assert config_hash(tune(iters=5)) != config_hash(tune(iters=6))


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tune().iters = 3  # type: ignore[misc]


@pytest.mark.parametrize("cls", VERBS)
def test_every_field_has_a_flag_and_help(cls: type[Config]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, cls)
    text = parser.format_help()
    for item in dataclasses.fields(cls):
        assert flags(item)[-1] == "--" + item.name.replace("_", "-")
        assert item.metadata["help"]
        assert flags(item)[-1] in text or item.metadata["positional"]
    assert vars(parser.parse_args([])) == {}  # defaults stand in the dataclass alone


def test_flags_reach_the_config() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EvalConfig)
    line = ["-m", "a", "-t", "2", "--ctx-size=64", "-ngl", "-1", "--data", "x", "--json"]
    line += ["--field", "a=b", "--field", "c=d"]
    config = build(EvalConfig, vars(parser.parse_args(line)))
    assert (config.threads, config.ctx_tokens, config.n_gpu_layers) == (2, 64, -1)
    assert parse_fields(config.field) == {"a": "b", "c": "d"}
    assert config.json is True
