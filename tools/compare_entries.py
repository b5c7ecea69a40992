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


REFERENCE = "sensitive, sgd, shuffled rows"
_QUANTIZED = r"(?!F16|BF16|F32).*"
_PLAIN = {"balance": False}  # rows as in the papers
ENTRIES = (
    Entry(REFERENCE, optimizer="sgd", options=_PLAIN),
    Entry("sensitive, adam, shuffled rows", options=_PLAIN),
    Entry("sensitive, adam, adjusted", options={"adjust": True}),
    Entry("sensitive, sgd", optimizer="sgd"),
    Entry("sensitive, momentum", optimizer="momentum"),
    Entry("sensitive, adam"),
    Entry("sensitive, adam, 4 directions", options={"directions": 4}),
    Entry("sensitive, fzoo of 8, sgd", "sensitive", "fzoo", "sgd", {"directions": 8}),
    Entry("sensitive, fzoo of 8, adam", "sensitive", "fzoo", "adam", {"directions": 8}),
    Entry("sensitive, grzo, sgd", estimator="grzo", optimizer="sgd"),
    Entry("sensitive, grzo, adam", estimator="grzo"),
    Entry("sensitive, curvature", options={"curvature": True, "directions": 4}),
    Entry("random mask, adam", mask="random"),
    Entry("magnitude mask, adam", mask="magnitude"),
    Entry("fisher mask, adam", mask="fisher"),
    Entry("block-scale, adam", "block-scale", mask=None, quants=_QUANTIZED),
    Entry("block-scale, sgd", "block-scale", optimizer="sgd", mask=None, quants=_QUANTIZED),
    Entry("subspace, adam", "subspace", mask=None),
    Entry("lora, adam", "lora", mask=None),
    Entry("norm, adam", "norm", mask=None),
    Entry("norms in place, adam", "dense", options={"train": r"norm\.weight$"}, mask=None),
    Entry("sensitive+norm, adam", "sensitive+norm"),
    Entry("magnitude, adam", "magnitude", mask=None, quants="F16"),
    Entry("sensitive+block-scale, adam", "sensitive+block-scale", quants=_QUANTIZED),
)
