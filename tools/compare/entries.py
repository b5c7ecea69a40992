"""What `methods.py` compares: one entry per method, estimator, optimizer and mask."""

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
        label: Its name in the table.
        method, estimator, optimizer: As in TuneConfig.
        options: More options of TuneConfig.
        mask: Score of the mask, "" for the one beside the model; None where none is read.
        targets: What rows are trained towards, as in TuneConfig.
        quants: Regular expression for the quants it applies to.
        rates: Multipliers of the default learning rate that are tried; 1 is one of them.
    """

    label: str
    method: str = "sensitive"
    estimator: str = "spsa"
    optimizer: str = "adam"
    options: dict[str, Any] = field(default_factory=dict)
    mask: str | None = ""
    targets: str = "answers"
    quants: str = ".*"
    rates: tuple[float, ...] = (1 / 3, 1.0, 3.0)

    @property
    def slug(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")

    def applies(self, quant: str) -> bool:
        """Whether the entry makes sense for a quant."""
        return re.fullmatch(self.quants, quant) is not None


REFERENCE = "sensitive, spsa, sgd, shuffled rows"
_QUANTIZED = r"(?!F16|BF16|F32).*"
_SHUFFLED = {"balance": False}  # rows as in the papers
_ONE_SIDE: dict[str, Any] = {"estimator": "natural", "options": {"sides": 1}}
_TWO_SIDES: dict[str, Any] = {"estimator": "natural", "options": {"sides": 2}}
ENTRIES = (
    Entry(REFERENCE, optimizer="sgd", options=_SHUFFLED),
    Entry("sensitive, spsa, adam, shuffled rows", options=_SHUFFLED),
    Entry("sensitive, spsa, sgd", optimizer="sgd"),
    Entry("sensitive, spsa, momentum", optimizer="momentum"),
    Entry("sensitive, spsa, adam"),
    Entry("sensitive, fzoo of 8, sgd", estimator="fzoo", optimizer="sgd"),
    Entry("sensitive, fzoo of 8, adam", estimator="fzoo"),
    Entry("sensitive, natural on two sides, adam", **_TWO_SIDES),
    Entry("sensitive, natural on one side, adam", **_ONE_SIDE),
    Entry("sensitive, natural on two sides, momentum", optimizer="momentum", **_TWO_SIDES),
    Entry(
        "sensitive, natural on two sides, 16 rows, adam",
        estimator="natural",
        options={"sides": 2, "examples_per_step": 16},
    ),
    Entry("random mask, spsa, adam", mask="random"),
    Entry("random mask, natural on two sides, adam", mask="random", **_TWO_SIDES),
    Entry("magnitude mask, natural on two sides, adam", mask="magnitude", **_TWO_SIDES),
    Entry("norm, spsa, adam", "norm", mask=None),
    Entry("norm, fzoo of 8, sgd", "norm", "fzoo", "sgd", mask=None),
    Entry("norm, natural on two sides, adam", "norm", mask=None, **_TWO_SIDES),
    Entry("norm, natural on one side, adam", "norm", mask=None, **_ONE_SIDE),
    Entry("norm, natural on one side, adam, soft", "norm", mask=None, targets="soft", **_ONE_SIDE),
    Entry(
        "norms in place, natural on one side, adam",
        "dense",
        "natural",
        options={"sides": 1, "train": r"norm\.weight$"},
        mask=None,
    ),
    Entry("block-scale, spsa, sgd", "block-scale", "spsa", "sgd", mask=None, quants=_QUANTIZED),
    Entry(
        "block-scale, natural on one side, adam",
        "block-scale",
        mask=None,
        quants=_QUANTIZED,
        **_ONE_SIDE,
    ),
    Entry("subspace, natural on one side, adam", "subspace", mask=None, **_ONE_SIDE),
    Entry("lora, natural on one side, adam", "lora", mask=None, **_ONE_SIDE),
    Entry("magnitude, natural on one side, adam", "magnitude", mask=None, **_ONE_SIDE),
    Entry("sensitive+norm, natural on one side, adam", "sensitive+norm", **_ONE_SIDE),
    Entry(
        "sensitive+block-scale, natural on one side, adam",
        "sensitive+block-scale",
        quants=_QUANTIZED,
        **_ONE_SIDE,
    ),
)
