"""Hugging Face model -> quantized GGUFs, each with the mask of its trainable weights.

The verb `export`: convert, score, quantize, and store what quantization took from the chosen
weights. The parts are in `convert`, `positions` and `quantize`; this file puts them together.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zo_gguf.config import MASK_SUFFIX, ExportConfig, takes
from zo_gguf.engine.model import check_architecture
from zo_gguf.engine.quantize import quant_name, quantize
from zo_gguf.errors import DoesNotFitError, ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import choose_tensors, expert_tensors, require_float
from zo_gguf.masks.convert import convert, model_folder, weight_bytes
from zo_gguf.masks.positions import (
    Positions,
    calibrate,
    choose_positions,
    reuse_positions,
    uses_gradients,
)
from zo_gguf.masks.residuals import make_mask

_GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True)
class ExportedFile:
    """One row of the result.

    Attributes:
        quant: Quantization name; with `onto`, the given file's main tensor type.
        model: The quantized GGUF.
        mask: Its mask.
        n_bytes: Size of the GGUF.
        nnz: Trainable weights.
        residual: Root mean square of the residuals, relative to that of the weights.
    """

    quant: str
    model: Path
    mask: Path
    n_bytes: int
    nnz: int
    residual: float


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        files: One entry per quant.
        max_rank: Most rows-or-columns that the mask uses of any matrix, None when unlimited.
        kept: Share of the unlimited mask's score that this limit keeps; None with `positions`.
    """

    files: list[ExportedFile]
    max_rank: int | None
    kept: float | None


class _Output(NamedTuple):
    """Where one quant goes; without a quant, `model` is the user's and only the mask is made."""

    quant: str | None
    model: Path
    mask: Path


@takes(ExportConfig)
def export(config: ExportConfig) -> ExportResult:
    """Write `OUT/<name>-<QUANT>.gguf` and `.mask.safetensors` for each quant; print a table.

    With `config.onto`, only a mask for that file is written. Nothing appears in the output folder
    before all the long steps have succeeded.

    Raises:
        ZoError: A bad option, model, text or file; or outputs that exist without `overwrite`.
        DoesNotFitError: Disk or memory do not hold the job.
    """
    out = Path(config.output)
    outputs = _outputs(config, out)
    _refuse_existing(outputs, config)
    given = config.onto or config.gguf
    if given is not None:
        check_architecture(GgufFile(given).path)
    quants = [output.quant for output in outputs if output.quant]
    gradients = uses_gradients(config)
    folder = model_folder(config.model) if gradients or config.gguf is None else None
    calibration = calibrate(config, folder) if gradients and folder else None
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export.") as scratch:
        floats_path = _float_gguf(config, folder, quants, Path(scratch))
        if given is None:
            check_architecture(floats_path)  # before the long steps
        floats = GgufFile(floats_path)
        names = _names(config, floats)
        if config.positions is not None:
            positions = reuse_positions(config, floats, names)
        else:
            positions = choose_positions(config, floats, names, folder, calibration)
        made = [_quantized(floats_path, Path(scratch), quant, config) for quant in quants]
        for path, output in zip(made, outputs, strict=False):
            os.replace(path, output.model)
        files = [_write_mask(positions, floats, output) for output in outputs]
    result = ExportResult(files, positions.max_rank, positions.kept)
    print(_table(result, positions))
    return result


def _outputs(config: ExportConfig, out: Path) -> list[_Output]:
    """The files of each quant; with `onto`, the given GGUF and the mask to write."""
    if config.onto is not None:
        base = GgufFile(config.onto).path
        return [_Output(None, base, out / f"{config.name or base.stem}{MASK_SUFFIX}")]
    name = _name(config)
    return [
        _Output(quant, out / f"{name}-{quant}.gguf", out / f"{name}-{quant}{MASK_SUFFIX}")
        for quant in dict.fromkeys(map(quant_name, config.quant))
    ]


def _name(config: ExportConfig) -> str:
    return config.name or Path(config.model).resolve().name


def _refuse_existing(outputs: list[_Output], config: ExportConfig) -> None:
    inputs = [Path(path) for path in (config.gguf, config.onto, config.positions) if path]
    for output in outputs:
        for path in (output.model, output.mask) if output.quant else (output.mask,):
            if not path.exists():
                continue
            if any(source.exists() and path.samefile(source) for source in inputs):
                raise ZoError(f"The output {str(path)!r} is also an input; change --output.")
            if not config.overwrite:
                raise ZoError(f"{str(path)!r} exists; pass --overwrite to replace it.")


def _float_gguf(
    config: ExportConfig, folder: Path | None, quants: list[str], scratch: Path
) -> Path:
    """The model as a float GGUF: the user's, or one converted into `scratch`."""
    if config.gguf is not None:
        path = GgufFile(config.gguf).path
        _require_disk(scratch, path.stat().st_size, quants)
        return path
    assert folder is not None
    _require_disk(scratch, weight_bytes(folder), ["F16", *quants])
    name, kind = _name(config), _float_type(quants)
    path = scratch / f"{name}.gguf"
    convert(folder, path, out_type=kind, pre=config.pre or _pre_tokenizer(config.onto), name=name)
    return path


def _pre_tokenizer(onto: str | None) -> str | None:
    """The pre-tokenizer that an existing GGUF names, which spares the user --pre."""
    return None if onto is None else GgufFile(onto).metadata("tokenizer.ggml.pre")


def _float_type(quants: list[str]) -> str:
    wide = [quant for quant in ("F32", "BF16") if quant in quants]
    return wide[0].lower() if wide else "f16"


def _require_disk(folder: Path, size_f16: int, quants: list[str]) -> None:
    """Check that the new files fit, by the bits in the quants' names and one more for scales."""
    bits = {"F32": 32.0, "F16": 16.0, "BF16": 16.0}
    digits = {quant: next((int(c) for c in quant if c.isdigit()), 8) for quant in quants}
    needed = sum(size_f16 * bits.get(quant, digits[quant] + 1.0) / 16 for quant in quants)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFitError(
            f"The export needs about {needed / _GIB:.1f} GiB on the disk of {str(folder.parent)!r},"
            f" but {free / _GIB:.1f} GiB are free; free some, or choose another --output."
        )


def _names(config: ExportConfig, floats: GgufFile) -> list[str]:
    names = choose_tensors(floats, config.include, config.exclude, config.layers)
    require_float(floats, names)
    if experts := expert_tensors(floats):
        print(f"{len(experts)} MoE expert tensors are left out: not tunable.", file=sys.stderr)
    return names


def _quantized(source: Path, scratch: Path, quant: str, config: ExportConfig) -> Path:
    """One quant in `scratch`; a converted float GGUF of that very type needs no second copy."""
    target = scratch / f"{quant}.gguf"
    if source.parent == scratch and quant == main_type(GgufFile(source)):
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    else:
        quantize(source, target, quant, config.threads)
    return target


def main_type(model: GgufFile) -> str:
    """The most frequent type of a GGUF's matrices."""
    kinds = [info.type.name for info in model.tensors.values() if len(info.shape) > 1]
    return max(kinds, key=kinds.count)


def _write_mask(positions: Positions, floats: GgufFile, output: _Output) -> ExportedFile:
    base = GgufFile(output.model)
    mask, residual = make_mask(positions, floats, base)
    mask.save(output.mask)
    return ExportedFile(
        quant=output.quant or main_type(base),
        model=output.model,
        mask=output.mask,
        n_bytes=output.model.stat().st_size,
        nnz=mask.nnz,
        residual=residual,
    )


def _table(result: ExportResult, positions: Positions) -> str:
    """The result in words, for people."""
    head = ("quant", "MiB", "weights", "residual", "model", "mask")
    rows = [
        (
            file.quant,
            f"{file.n_bytes / _MIB:.1f}",
            str(file.nnz),
            f"{file.residual:.3f}",
            str(file.model),
            str(file.mask),
        )
        for file in result.files
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    limit = "any number of" if result.max_rank is None else f"at most {result.max_rank}"
    known = result.max_rank is not None and result.kept is not None
    share = f", which keep {result.kept:.2%} of the score" if known else ""
    lines.append(
        f"{len(positions.tensors)} matrices, {limit} rows or columns each{share}; residual is "
        "relative to the weights."
    )
    return "\n".join(lines)
