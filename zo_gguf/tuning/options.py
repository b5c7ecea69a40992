"""Options that follow from other options, and those that nothing reads.

`TuneConfig` knows no method, estimator or optimizer; here they are asked what they need. What can
only be measured is left to `calibrate`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from zo_gguf.config import MASK_SUFFIX, TuneConfig
from zo_gguf.config.option import refuse_unread
from zo_gguf.tuning.estimators import ESTIMATORS, estimator_of
from zo_gguf.tuning.methods import METHODS, check_method
from zo_gguf.tuning.optimizer import check_optimizer


def settle(config: TuneConfig) -> TuneConfig:
    """The options with all that follows from others filled in; settled ones stay as they are.

    Raises:
        ZoError: There is no such method, estimator or optimizer, an option was given that none of
            those chosen reads, or they cannot work with what was given.
    """
    method = config.method or ("sensitive" if config.mask else "lora-fa")
    check_method(method)
    check_optimizer(config.optimizer)
    chosen = method.split("+")
    if not config.estimator:
        name = "feedback" if chosen == ["lora-fa"] else "natural"
        config = dataclasses.replace(config, estimator=name)
    estimator = estimator_of(config)
    of_methods = _readers({name: METHODS[name].reads for name in METHODS})
    of_estimators = _readers(
        {name: [item.name for item in fields(kind)] for name, kind in ESTIMATORS.items()}
    )
    refuse_unread(config, of_methods, chosen, "method")
    refuse_unread(config, of_estimators, [config.estimator], "estimator")
    mask = config.mask
    if not mask and set(chosen) & set(of_methods["mask"]):
        mask = config.model.removesuffix(".gguf") + MASK_SUFFIX
    ranks = [config.rank or METHODS[name].rank for name in chosen if name in of_methods["rank"]]
    every = -(-estimator.iters // 3) if config.valid_every is None else config.valid_every
    settled: dict[str, Any] = {"method": method, "mask": mask, "rank": max(ranks, default=None)}
    if config.targets == "auto" and not estimator.probes:  # soft ones make up for noisy directions
        settled["targets"] = "answers"
    return dataclasses.replace(config, **settled, valid_every=every, **asdict(estimator))


def _readers(reads: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Option -> what reads it, from what each reads."""
    readers: dict[str, list[str]] = {}
    for name, options in reads.items():
        for option in options:
            readers.setdefault(option, []).append(name)
    return readers
