"""The options of every verb, one frozen dataclass each; the only place where a default stands,
with `tune.py`.

Flags, YAML keys (`--config`) and Python arguments derive from the fields: `learning_rate` is
`--learning-rate` on the command line and `learning_rate:` in a file. The machinery is in
`option.py` and `config_file.py`.
"""
# ruff: noqa: RUF009 - `option` returns a dataclass field, which is made once on purpose

import re
from dataclasses import dataclass
from typing import Literal

from zo_gguf.config.option import Config, option
from zo_gguf.config.tune import DATA, GPU, JSON, OVERWRITE, RowsConfig, threads_option
from zo_gguf.errors import ZoError


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Options of `export`: a Hugging Face model becomes quantized GGUFs, each with its mask."""

    model: str = option("-m", help="Hugging Face model: a folder or a hub id", metavar="DIR|ID")
    gguf: str | None = option(
        help="F16, BF16 or F32 GGUF of the same model; skips the conversion",
        default=None,
        metavar="FILE",
    )
    onto: str | None = option(
        help="make only a mask, for this quantized GGUF of the same model",
        default=None,
        metavar="FILE",
    )
    calibration: str = option(
        help="text that decides which weights are sensitive: a .jsonl or .txt file, or c4",
        default="c4",
        metavar="FILE|c4",
    )
    quant: list[str] = option(
        help="llama.cpp quantization type; repeatable", default=["Q4_0"], metavar="TYPE"
    )
    density: float = option(
        help="trainable share of each linear weight", default=0.001, above=0, below=1
    )
    output: str = option("-o", help="folder for the GGUFs and masks", metavar="DIR")
    score: Literal["sensitive", "random", "magnitude"] = option(
        help="how weights are ranked: by their squared accumulated gradient, or the controls "
        "random and magnitude",
        default="sensitive",
    )
    include: str | None = option(
        help="mask only GGUF tensors whose name matches", default=None, metavar="REGEX"
    )
    exclude: str | None = option(
        help="leave out GGUF tensors whose name matches", default=None, metavar="REGEX"
    )
    layers: str | None = option(
        help="mask only these layers, such as 4-11 or 0,2,8-11", default=None, metavar="RANGES"
    )
    max_rank: int | Literal["auto", "none"] = option(
        help="limit the mask of a matrix to this many rows or columns, for an exact LoRA of that "
        "rank; auto takes the smallest that keeps 99% of the score",
        default="auto",
        low=1,
    )
    positions: str | None = option(
        help="reuse the positions of another quant's mask, computing only the residuals",
        default=None,
        metavar="MASK",
    )
    chunk_layers: int | None = option(
        help="layers whose scores are in memory at once (default: from free memory)",
        default=None,
        low=1,
    )
    calibration_docs: int = option(help="calibration documents read", default=128, low=1)
    block_size: int = option(help="tokens per calibration block", default=256, low=8)
    pre: str | None = option(
        help="pre-tokenizer name, for BPE tokenizers the converter does not know",
        default=None,
        metavar="NAME",
    )
    seed: int = option(help="seed of the random choices", default=0, low=0, below=2**63)
    name: str | None = option(
        help="name of the files written (default: the model's)", default=None, metavar="NAME"
    )
    threads: int | None = threads_option()
    overwrite: bool = option(help=OVERWRITE, default=False)

    def check(self) -> None:
        """Checks the regular expressions, the layer ranges and the quantization list."""
        for key in ("include", "exclude"):
            try:
                re.compile(getattr(self, key) or "")
            except re.error as error:
                raise ZoError(
                    f"{key} {getattr(self, key)!r} is no regular expression: {error}."
                ) from error
        if self.layers is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.layers):
            raise ZoError(f"layers must look like 4-11 or 0,2,8-11, not {self.layers!r}.")
        if not self.quant:
            raise ZoError("quant must name at least one type, such as Q4_0.")
        if self.name is not None and (not self.name or re.search(r'[/\\:*?"<>|\0]', self.name)):
            raise ZoError(f"name must be usable as a file name, not {self.name!r}.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RowsConfig):
    """Options of `eval`: loss, perplexity and accuracy of a GGUF, with or without a delta."""

    delta: str | None = option(
        help="run folder or delta file whose weights are added", default=None, metavar="RUN|FILE"
    )
    split: Literal["train", "valid", "test"] = option(
        help="file of a data folder that is read", default="test"
    )
    rows: int = option(help="rows used, from the first; 0 means all", default=0, low=0)
    threads: int | None = threads_option()
    n_gpu_layers: int = option("-ngl", help=GPU, default=0, low=-1)
    json: bool = option(help=JSON, default=False)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Config):
    """Options of `merge`: a delta becomes a GGUF that stock apps load."""

    run: str = option(help="run folder or delta file", positional=True, metavar="RUN")
    output: str = option("-o", help="the merged GGUF to write", metavar="OUT.gguf")
    type: Literal["auto", "keep", "q8_0", "f16"] = option(
        help="type of the tuned tensors; auto takes the smallest that keeps 98% of the gain",
        default="auto",
    )
    max_growth: float = option(help="largest allowed growth of the file", default=1.25, low=1)
    model: str | None = option(
        "-m", help="the base GGUF (default: the one the run recorded)", default=None, metavar="GGUF"
    )
    data: str | None = option(
        help="rows for measuring what survived (default: the run's validation rows)",
        default=None,
        metavar="FILE|DIR",
    )
    lora: bool = option(
        help="write a LoRA GGUF to OUT.gguf instead of a merged model (in place of -o)",
        default=False,
        metavar="OUT.gguf",
    )
    rank: int | None = option(
        help="LoRA rank; below the exact rank it approximates", default=None, low=1
    )
    threads: int | None = threads_option()
    overwrite: bool = option(help=OVERWRITE, default=False)
    json: bool = option(help=JSON, default=False)

    def check(self) -> None:
        """Rejects options that would have no effect."""
        if self.rank is not None and not self.lora:
            raise ZoError(f"rank {self.rank} only applies to a LoRA; give --lora OUT.gguf too.")


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(RowsConfig):
    """Options of `data check`: validate rows and show what counts in the loss."""

    data: str = option(help=DATA, positional=True, metavar="DATA")
    row: int = option(help="row to print, counted from 1", default=1, low=1)
    json: bool = option(help=JSON, default=False)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Config):
    """Options of `replay`: rebuild a delta from a run's trajectory alone."""

    run: str = option(help="run folder", positional=True, metavar="RUN")
    output: str | None = option(
        "-o", help="where to write the delta (default: only compare)", default=None, metavar="FILE"
    )
    step: int | None = option(
        help="stop after this step (default: that of the run's delta.safetensors, or the last)",
        default=None,
        low=0,
    )
    overwrite: bool = option(help=OVERWRITE, default=False)
    json: bool = option(help=JSON, default=False)


@dataclass(frozen=True, kw_only=True)
class InfoConfig(Config):
    """Options of `info`: what a GGUF, mask, delta, trajectory or run folder holds."""

    path: str = option(help="file or run folder", positional=True, metavar="FILE|RUN")
    json: bool = option(help=JSON, default=False)


@dataclass(frozen=True, kw_only=True)
class EnvConfig(Config):
    """Options of `env`: versions, backends, and whether a GPU will be used."""

    json: bool = option(help=JSON, default=False)
