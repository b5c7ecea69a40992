"""Options that follow from others, and those that nothing reads."""

from dataclasses import fields
from typing import Any

import pytest

from zo_gguf.config import TuneConfig
from zo_gguf.errors import ZoError
from zo_gguf.tuning.estimators import ESTIMATORS, estimator_of
from zo_gguf.tuning.estimators.natural import Natural
from zo_gguf.tuning.methods import METHODS
from zo_gguf.tuning.optimizer import OPTIMIZERS
from zo_gguf.tuning.options import settle

OPTIONS = {item.name: item for item in fields(TuneConfig)}


def settled(**options: Any) -> TuneConfig:
    return settle(TuneConfig(**{"model": "m.gguf", "data": "d", "output": "o", **options}))


def test_default_mask_lies_beside_the_model() -> None:
    assert settled(model="dir/x.gguf", method="sensitive").mask == "dir/x.mask.safetensors"
    assert settled(model="x.gguf", method="norm+sensitive").mask == "x.mask.safetensors"
    assert settled(method="sensitive", mask="other").mask == "other"


def test_defaults_follow_from_the_method() -> None:
    given = settled()
    assert (given.estimator, given.iters, given.rank, given.targets) == (
        "feedback", 80, 32, "answers",
    )  # fmt: skip
    given = settled(method="lora")
    assert (given.estimator, given.iters, given.rank, given.targets) == ("natural", 500, 8, "auto")
    assert settled(method="lora-fa+norm").estimator == "natural"
    assert settled(iters=31).valid_every == 11


def test_default_method_follows_from_the_mask() -> None:
    assert (settled().method, settled().mask) == ("lora-fa", "")
    assert (settled(mask="m").method, settled(mask="m").mask) == ("sensitive", "m")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_an_estimator_reads_is_filled_in_and_nothing_else(estimator: str) -> None:
    given = settled(estimator=estimator)
    own = {item.name for item in fields(ESTIMATORS[estimator])}
    every = {item.name for kind in ESTIMATORS.values() for item in fields(kind)}
    assert {name for name in every if getattr(given, name) is not None} == own
    assert settle(given) == given
    assert estimator_of(given) == estimator_of(settled(estimator=estimator))


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("norm", "rank", 64),
        ("lora", "refresh", 5),
        ("norm", "density", 0.5),
        ("dense", "absolute", True),
        ("sensitive", "train", "blk.0"),
        ("norm", "mask", "m.mask.safetensors"),
        ("norm", "damping", 7.0),
    ],
)
def test_options_that_nothing_reads_are_refused(method: str, option: str, value: Any) -> None:
    with pytest.raises(ZoError, match=rf"^--{option} is for .*leave it out"):
        settled(method=method, estimator="spsa", **{option: value})
    if option != "damping":
        every = f"{method}+sensitive+magnitude+block-scale+subspace"
        assert getattr(settled(method=every, **{option: value}), option) == value


def test_what_is_read_is_an_option() -> None:
    for kind in ESTIMATORS.values():
        assert {item.name for item in fields(kind)} <= OPTIONS.keys()
    for method in METHODS.values():
        assert set(method.reads) <= OPTIONS.keys()


def test_help_names_all_and_their_defaults() -> None:
    for option, known in (("method", METHODS), ("optimizer", OPTIMIZERS)):
        for name in known:
            assert name in OPTIONS[option].metadata["help"]
    for name, kind in ESTIMATORS.items():
        own = kind.of(TuneConfig(model="m", data="d", output="o"))
        said = f"{name} ({own.examples_per_step} rows"
        said += f", {own.directions} direction" if kind.probes else " a step"
        assert said in OPTIONS["estimator"].metadata["help"]
        assert f" {own.iters}" in OPTIONS["iters"].metadata["help"]
    assert f"(default: {Natural().damping:g})" in OPTIONS["damping"].metadata["help"]
