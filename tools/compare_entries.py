"""What `compare_methods` compares: one entry per method, estimator, optimizer and mask."""

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
        quants: Regular expression for the quants it applies to.
        rates: Multipliers of the default learning rate that are tried; 1 is one of them.
    """

    label: str
    method: str = "sensitive"
    estimator: str = "spsa"
    optimizer: str = "adam"
    options: dict[str, Any] = field(default_factory=dict)
    mask: str | None = ""
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
_NORMS = {"train": r"norm\.weight$"}
ENTRIES = (
    Entry(REFERENCE, optimizer="sgd", options=_SHUFFLED),
    Entry("sensitive, spsa, adam, shuffled rows", options=_SHUFFLED),
    Entry("sensitive, spsa, sgd", optimizer="sgd"),
    Entry("sensitive, spsa, momentum", optimizer="momentum"),
    Entry("sensitive, spsa, adam"),
    Entry("sensitive, spsa, adam, adjusted", options={"adjust": True}),
    Entry("sensitive, spsa of 4, curvature", options={"curvature": True, "directions": 4}),
    Entry("sensitive, fzoo of 8, sgd", estimator="fzoo", optimizer="sgd"),
    Entry("sensitive, fzoo of 8, adam", estimator="fzoo"),
    Entry("sensitive, grzo, sgd", estimator="grzo", optimizer="sgd"),
    Entry("sensitive, grzo, adam", estimator="grzo"),
    Entry("sensitive, natural, adam", estimator="natural"),
    Entry("sensitive, natural on one side, adam", estimator="natural", options={"sides": 1}),
    Entry("sensitive, natural, momentum", estimator="natural", optimizer="momentum"),
    Entry(
        "sensitive, natural, 16 rows, adam",
        estimator="natural",
        options={"examples_per_step": 16},
    ),
    Entry("random mask, spsa, adam", mask="random"),
    Entry("random mask, natural, adam", estimator="natural", mask="random"),
    Entry("magnitude mask, natural, adam", estimator="natural", mask="magnitude"),
    Entry("fisher mask, natural, adam", estimator="natural", mask="fisher"),
    Entry("norm, spsa, adam", "norm", mask=None),
    Entry("norm, natural, adam", "norm", "natural", mask=None),
    Entry("norms in place, natural, adam", "dense", "natural", options=_NORMS, mask=None),
    Entry("block-scale, spsa, sgd", "block-scale", "spsa", "sgd", mask=None, quants=_QUANTIZED),
    Entry("block-scale, natural, adam", "block-scale", "natural", mask=None, quants=_QUANTIZED),
    Entry("subspace, natural, adam", "subspace", "natural", mask=None),
    Entry("lora, natural, adam", "lora", "natural", mask=None),
    Entry("magnitude, natural, adam", "magnitude", "natural", mask=None, quants="F16"),
    Entry("sensitive+norm, natural, adam", "sensitive+norm", "natural"),
    Entry(
        "sensitive+block-scale, natural, adam",
        "sensitive+block-scale",
        "natural",
        quants=_QUANTIZED,
    ),
)
