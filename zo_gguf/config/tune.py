"""The options of `tune` and `plan`, and those that every verb has which reads rows for a model."""
# ruff: noqa: RUF009 - `option` returns a dataclass field, which is made once on purpose

import re
from dataclasses import dataclass
from typing import Any, Literal

from zo_gguf.config.option import Config, option, parse_fields, refuse_unread
from zo_gguf.errors import ZoError

MAX_DIRECTIONS = 1 << 16  # of a step
_MANY = MAX_DIRECTIONS + 1
DATA = "JSONL, JSON or CSV file, or a folder with train/valid/test.jsonl"
GPU = "layers kept on the GPU; -1 means all"
OVERWRITE = "replace an output that is already there"
JSON = "print one JSON object on stdout"
MASK_SUFFIX = ".mask.safetensors"
# Options that only some methods or estimators know.
_OF_METHODS = {
    "rank": ("subspace", "lora"),
    "refresh": ("subspace",),
    "density": ("magnitude",),
    "absolute": ("block-scale",),
    "train": ("magnitude", "block-scale", "subspace", "lora", "dense", "norm"),
}
_OF_ESTIMATORS = {"damping": ("natural",)}
SHORT_RUN = 750  # steps of `natural` up to which half the forward passes outweigh less noise


def threads_option() -> Any:
    """The option of every verb that computes."""
    text, most = "CPU threads (default: the number of physical cores)", 512  # GGML_MAX_N_THREADS
    return option("-t", help=text, default=None, low=1, below=most + 1)


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Config):
    """Options of every verb that reads rows for a model."""

    model: str = option("-m", help="the quantized GGUF model", metavar="GGUF")
    data: str = option(help=DATA, metavar="FILE|DIR")
    ctx_tokens: int = option(
        "-c",
        "--ctx-size",
        help="tokens per forward call, over all rows and branches in it",
        default=2048,
        low=2,
        below=(1 << 20) + 1,
    )
    train_on: Literal["last-assistant", "all-assistant"] = option(
        help="turns of `messages` rows that count in the loss", default="last-assistant"
    )
    field: list[str] = option(
        help="read KEY from column NAME, such as prompt=question; repeatable",
        default=[],
        metavar="KEY=NAME",
    )
    max_seq_length: int | None = option(
        help="longest row in tokens; longer prompts lose their beginning "
        "(default: what the context holds)",
        default=None,
        low=2,
    )

    def check(self) -> None:
        """Checks the column names."""
        parse_fields(self.field)


def parse_units(units: list[str]) -> dict[str, float]:
    """["gain=2.5"] -> {"gain": 2.5}.

    Raises:
        ZoError: An item has another form, or its length is not positive.
    """
    result = {}
    for item in units:
        kind, _, length = item.partition("=")
        try:
            result[kind] = float(length)
        except ValueError:
            result[kind] = 0.0
        if not kind or not 0 < result[kind] < float("inf"):
            raise ZoError(f"unit must look like gain=2.5, not {item!r}.")
    return result


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RowsConfig):
    """Options of `tune` and `plan`: zeroth-order fine-tuning of a quantized GGUF."""

    mask: str = option(
        help="sensitive: trainable weights, as written by export "
        f"(default: MODEL with {MASK_SUFFIX} for .gguf)",
        default="",
        metavar="MASK",
    )
    output: str = option("-o", help="run folder to write", metavar="RUN")
    method: str = option(
        help="what is trained: norm, sensitive, magnitude, block-scale, subspace, lora, dense, or "
        "two of them joined by + (default: norm; with --mask: sensitive)",
        default="",
        metavar="NAME",
    )
    estimator: Literal["spsa", "natural", "fzoo"] = option(
        help="how losses become a gradient estimate: probes on both sides of theta (spsa), probes "
        "combined to the natural gradient of their span (natural), or probes on one side (fzoo)",
        default="natural",
    )
    optimizer: str = option(
        help="how a gradient estimate becomes an update", default="adam", metavar="NAME"
    )
    iters: int = option(help="steps", default=500, low=1, below=10**9)
    examples_per_step: int | None = option(
        help="rows per step (default: 16; natural: 4)", default=None, low=1, below=_MANY
    )
    balance: bool = option(
        help="spread rows with equal answers evenly over an epoch, instead of shuffling alone",
        default=True,
    )
    learning_rate: float | None = option(
        "--lr",
        help="step size (default: a share of how far the loss is found to be linear; see the first "
        "lines of the run)",
        default=None,
        above=0,
    )
    eps: float | Literal["auto"] = option(
        help="perturbation size; auto chooses it from the measured noise floor",
        default="auto",
        above=0,
        below=1e6,
    )
    directions: int | None = option(
        help="random directions a step (default: 1; natural: 16; fzoo: 8)",
        default=None,
        low=1,
        below=_MANY,
    )
    probes_per_decode: int | Literal["auto"] | None = option(
        help="probes that share a decode, as far as --ctx-size holds them; auto measures what is "
        "fastest, so that two runs may differ in their last bits (default: 1; auto with layers on "
        "a GPU, which small decodes leave idle)",
        default=None,
        low=1,
        below=257,
    )
    sides: int | None = option(
        help="natural: sides of theta that are probed; 1 takes half the forward passes, 2 see less "
        f"noise (default: 1 up to {SHORT_RUN} steps, then 2); the other estimators have no choice",
        default=None,
        low=1,
        below=3,
    )
    damping: float = option(
        help="natural: added to the Fisher matrix, as a share of its mean diagonal",
        default=1.0,
        above=0,
    )
    path: Literal["auto", "hook", "adapter"] = option(
        help="where the parameters act: beside the products through libzo, or in a LoRA adapter "
        "that is rewritten for every probe (auto: the adapter where layers are on a GPU)",
        default="auto",
    )
    clip: float | Literal["adaptive"] | None = option(
        help="largest coefficient of a direction, for spsa its projected gradient; adaptive: three "
        "times the median of the last 100",
        default=None,
        above=0,
    )
    targets: Literal["auto", "answers", "soft"] = option(
        help="what rows with choices are trained towards: their answers, or soft, the "
        "probabilities that a linear classifier of the untuned model's hidden states gives them, "
        "which vary less (auto: soft where all rows have the same choices and it beats the model)",
        default="auto",
    )
    unit: list[str] = option(
        help="length of a unit step for one kind of parameter (sparse, gain, scale, weight, lora, "
        "subspace), such as gain=2.5, 1 for those not named; repeatable (default: measured where "
        "several kinds are trained)",
        default=[],
        metavar="KIND=LENGTH",
    )
    train: str | None = option(
        help="tensors that are trained, by methods without a mask", default=None, metavar="REGEX"
    )
    rank: int = option(help="rank of subspace and lora", default=8, low=1)
    refresh: int = option(help="steps between new bases of subspace; 0: never", default=0, low=0)
    density: float | None = option(
        help="share of each matrix trained by magnitude (default: 0.25 of a float one, 0.001 of a "
        "quantized one)",
        default=None,
        above=0,
        below=1,
    )
    absolute: bool = option(
        help="block-scale: perturb scales by eps itself, not by eps times the scale", default=False
    )
    schedule: Literal["linear", "constant", "cosine"] = option(
        help="course of the learning rate", default="linear"
    )
    seed: int = option(help="seed of directions and row order", default=0, low=0, below=2**63)
    threads: int | None = threads_option()
    n_gpu_layers: int = option("-ngl", help=GPU, default=0, low=-1)
    valid_every: int = option(
        help="steps between validations; 0: only at the start and the end", default=200, low=0
    )
    valid_rows: int = option(help="validation rows used; 0 means all", default=500, low=0)
    patience: int = option(
        help="stop after this many validations without a better loss; 0: never", default=0, low=0
    )
    save_every: int = option(help="steps between checkpoints", default=100, low=1)
    val_split: float = option(
        help="share of a single data file kept for validation", default=0.05, low=0, below=1
    )
    overwrite: bool = option(help=OVERWRITE, default=False)
    json: bool = option(help=JSON, default=False)

    def check(self) -> None:
        """Checks the options that depend on each other; fills in those that follow from others."""
        super().check()
        self._fill_in_method()
        try:
            re.compile(self.train or "")
        except re.error as error:
            raise ZoError(f"train {self.train!r} is no regular expression: {error}.") from error
        parse_units(self.unit)
        if self.probes_per_decode is None:
            width = "auto" if self.n_gpu_layers != 0 else 1
            object.__setattr__(self, "probes_per_decode", width)
        if self.examples_per_step is None:
            object.__setattr__(self, "examples_per_step", 4 if self.estimator == "natural" else 16)
        refuse_unread(self, _OF_METHODS, self.method.split("+"), "method")
        refuse_unread(self, _OF_ESTIMATORS, [self.estimator], "estimator")
        given_sides = self.sides
        of_natural = given_sides or (1 if self.iters <= SHORT_RUN else 2)
        sides = {"fzoo": 1, "natural": of_natural}.get(self.estimator, 2)
        if given_sides not in (None, sides):
            raise ZoError(f"{self.estimator} probes {sides} side(s); leave --sides out.")
        object.__setattr__(self, "sides", sides)
        if self.directions is None:
            default = {"spsa": 1, "natural": 16, "fzoo": 8}[self.estimator]
            object.__setattr__(self, "directions", default)
        if self.estimator == "fzoo" and self.directions == 1:
            raise ZoError("fzoo divides by the deviation of several losses; raise --directions.")

    def _fill_in_method(self) -> None:
        if not self.method:
            object.__setattr__(self, "method", "sensitive" if self.mask else "norm")
        if self.reads_mask and not self.mask:
            object.__setattr__(self, "mask", self.model.removesuffix(".gguf") + MASK_SUFFIX)

    @property
    def reads_mask(self) -> bool:
        """Whether the method trains the entries of a mask."""
        return "sensitive" in self.method.split("+")

    @property
    def n_rows(self) -> int:
        """Rows per step."""
        assert self.examples_per_step is not None  # since `check`
        return self.examples_per_step

    @property
    def n_directions(self) -> int:
        """Directions per step."""
        assert self.directions is not None  # since `check`
        return self.directions

    @property
    def slopes_per_step(self) -> int:
        """Slopes of single rows that a step measures."""
        return self.n_rows * self.n_directions

    @property
    def forwards_per_step(self) -> int:
        """How often a step sends its rows through the model."""
        return self.n_directions + 1 if self.sides == 1 else 2 * self.n_directions
