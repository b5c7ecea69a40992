"""The options of `tune` and `plan`, and those that every verb has which reads rows for a model."""
# ruff: noqa: RUF009 - `option` returns a dataclass field, which is made once on purpose

import re
from dataclasses import dataclass
from typing import Any, Literal

from zo_gguf.config.option import Config, option, parse_fields
from zo_gguf.errors import ZoError

MAX_DIRECTIONS = 1 << 16  # of a step
_MANY = MAX_DIRECTIONS + 1
DATA = "JSONL, JSON or CSV file, or a folder with train/valid/test.jsonl"
GPU = "layers kept on the GPU; -1 means all"
OVERWRITE = "replace an output that is already there"
JSON = "print one JSON object on stdout"
MASK_SUFFIX = ".mask.safetensors"


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
        help="what is trained: lora-fa, norm, sensitive, magnitude, block-scale, subspace, lora, "
        "dense, or two of them joined by + (default: lora-fa; with --mask: sensitive)",
        default="",
        metavar="NAME",
    )
    estimator: str = option(
        help="where gradients come from: feedback (8 rows a step), or random directions: "
        "natural (4 rows, 16 directions a step), spsa (16 rows, 1 direction) or fzoo (16 rows, "
        "8 directions) (default: feedback for lora-fa, else natural)",
        default="",
        metavar="NAME",
    )
    optimizer: str = option(
        help="how a gradient estimate becomes an update: adam, momentum or sgd",
        default="adam",
        metavar="NAME",
    )
    iters: int | None = option(
        help="steps (default: 80 with feedback, 500 with random directions)",
        default=None,
        low=1,
        below=10**9,
    )
    examples_per_step: int | None = option(
        help="rows per step (default: the estimator's)", default=None, low=1, below=_MANY
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
        help="random directions a step (default: the estimator's)",
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
        "noise (default: 1 in short runs, else 2)",
        default=None,
        low=1,
        below=3,
    )
    damping: float | None = option(
        help="natural: added to the Fisher matrix, as a share of its mean diagonal (default: 1)",
        default=None,
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
    rank: int | None = option(
        help="rank of lora-fa, lora and subspace (default: 32, 8 and 8)", default=None, low=1
    )
    top: int | None = option(
        help="lora-fa: layers that are trained, counted from the head (default: the upper half)",
        default=None,
        low=1,
    )
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
    valid_every: int | None = option(
        help="steps between validations; 0: only at the start and the end (default: a third of "
        "the run)",
        default=None,
        low=0,
    )
    valid_rows: int = option(help="validation rows used; 0 means all", default=200, low=0)
    patience: int = option(
        help="stop after this many validations without a better loss; 0: never", default=0, low=0
    )
    save_every: int = option(help="steps between checkpoints", default=100, low=1)
    val_split: float = option(
        help="share of a single data file kept for validation", default=0.05, low=0, below=1
    )
    overwrite: bool = option(help=OVERWRITE, default=False)
    json: bool = option(help=JSON, default=False)

    @property
    def n_steps(self) -> int:
        """The steps of a run whose options are settled."""
        assert self.iters is not None
        return self.iters

    def check(self) -> None:
        """Checks what needs no method or estimator; `settle` in tuning/options.py does the rest."""
        super().check()
        try:
            re.compile(self.train or "")
        except re.error as error:
            raise ZoError(f"train {self.train!r} is no regular expression: {error}.") from error
        parse_units(self.unit)
        if self.probes_per_decode is None:
            width = "auto" if self.n_gpu_layers != 0 else 1
            object.__setattr__(self, "probes_per_decode", width)
