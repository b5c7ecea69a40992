"""Which weights a mask holds: scores in GGUF coordinates -> positions per tensor.

Method: SensZOQ (arXiv 2406.02913), top-k per weight matrix; the limit to few rows and columns is
ours. Scores come from gradients (`sensitivity`, imported when needed: it brings torch), from the
float weights, or at random.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import ExportConfig
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.gguf_files.tensors import layer_of
from zo_gguf.masks.calibration import load_documents, token_blocks
from zo_gguf.masks.placement import Placement, gguf_names, place
from zo_gguf.params.mask import Mask
from zo_gguf.params.select import SelectionPath, smallest_rank, top_k

AUTO_SHARE = 0.99  # of the unlimited mask's score, kept by --max-rank auto

Scores = Iterable[tuple[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Positions:
    """Chosen weights of a model, the same for all its quants.

    Attributes:
        tensors: GGUF tensor name -> sorted flat indices, int64.
        shapes: Same keys -> (n_rows, n_cols).
        score: How they were ranked.
        density: Wanted share of each matrix.
        max_rank: Most rows-or-columns per matrix, None when unlimited.
        kept: Share of the unlimited selection's score that was kept; None when not known.
        calibration: Recipe, as JSON values.
    """

    tensors: dict[str, NDArray[np.int64]]
    shapes: dict[str, tuple[int, int]]
    score: str
    density: float
    max_rank: int | None
    kept: float | None
    calibration: dict[str, Any]


def uses_gradients(config: ExportConfig) -> bool:
    """Whether the export needs the Hugging Face model's gradients."""
    return config.positions is None and config.score == "sensitive"


def calibrate(config: ExportConfig, folder: Path) -> tuple[list[NDArray[np.int64]], dict[str, Any]]:
    """Tokenize the calibration text.

    Returns:
        Blocks of token ids and the recipe for the mask's header.

    Raises:
        ZoError: Text or tokenizer cannot be read.
    """
    documents, recipe = load_documents(config.calibration, config.calibration_docs)
    _require_torch()
    from zo_gguf.masks.sensitivity import load_tokenizer

    blocks = token_blocks(documents, load_tokenizer(folder), config.block_size)
    return blocks, recipe | {"blocks": len(blocks), "block_size": config.block_size}


def choose_positions(
    config: ExportConfig,
    floats: GgufFile,
    names: list[str],
    folder: Path | None,
    calibration: tuple[list[NDArray[np.int64]], dict[str, Any]] | None,
) -> Positions:
    """Score the named matrices and select the best of each.

    Args:
        config: The export's options.
        floats: The model's float GGUF.
        names: Matrices to choose from, see `choose_tensors`.
        folder: The Hugging Face model, for scores that need gradients.
        calibration: Its text, see `calibrate`.

    Raises:
        ZoError: The density selects nothing, or nothing could be scored.
    """
    shapes = {
        name: (floats.tensors[name].shape[0], floats.tensors[name].shape[1]) for name in names
    }
    if all(rows * cols * config.density < 1 for rows, cols in shapes.values()):
        rows, cols = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
        raise ZoError(
            f"density {config.density} leaves no weight even of the largest matrix ({rows} x "
            f"{cols}); raise it to {1 / (rows * cols):.1e} or more."
        )
    if uses_gradients(config):
        assert folder is not None
        assert calibration is not None
        recipe = calibration[1]
        scores: Scores = _gradient_scores(config, floats, names, folder, calibration[0])
        limit = config.max_rank
    else:
        recipe = {"seed": config.seed} if config.score == "random" else {}
        scores = _plain_scores(config, floats, names)
        # The controls are for comparing where entries lie, so nothing moves them unasked.
        limit = "none" if config.max_rank == "auto" else config.max_rank
    chosen, max_rank, kept = select(scores, config.density, limit)
    if not chosen:
        raise ZoError("The calibration text gives no gradient at all; check text and model.")
    return Positions(
        {name: chosen[name] for name in names if name in chosen},
        {name: shape for name, shape in shapes.items() if name in chosen},
        config.score,
        config.density,
        max_rank,
        kept,
        recipe,
    )


def reuse_positions(config: ExportConfig, floats: GgufFile, names: list[str]) -> Positions:
    """The positions of another mask of the same model, as far as they lie in the named matrices.

    Raises:
        ZoError: The mask does not fit the model.
    """
    assert config.positions is not None
    other = Mask.load(config.positions)
    for name, shape in other.shapes.items():
        if name not in floats.tensors or floats.tensors[name].shape != shape:
            raise ZoError(
                f"The mask {config.positions!r} tunes {name!r} of shape {shape}, which the model "
                "has not; use a mask of the same model."
            )
    wanted = [name for name in other.tensors if name in set(names)]
    if not wanted:
        raise ZoError(f"include, exclude and layers leave nothing of {config.positions!r}.")
    return Positions(
        {name: other.tensors[name] for name in wanted},
        {name: other.shapes[name] for name in wanted},
        other.header.score,
        other.header.density,
        other.header.max_rank,
        None,
        other.header.calibration,
    )


def select(
    scores: Scores, density: float, limit: int | str
) -> tuple[dict[str, NDArray[np.int64]], int | None, float]:
    """Select the best entries of each matrix.

    Args:
        scores: Names with scores (n_rows, n_cols), f32, not negative.
        density: Share of each matrix to select, rounded down, but at least one entry.
        limit: "none", "auto" (see `AUTO_SHARE`) or the most rows-or-columns per matrix.

    Returns:
        Sorted flat indices per matrix, the limit in force, and the share of score it keeps.
    """
    chosen: dict[str, NDArray[np.int64]] = {}
    paths: dict[str, SelectionPath] = {}
    for name, score in scores:
        if not score.any():
            _note(f"{name} is left out: no calibration text reaches it.")
            continue
        k = max(1, int(score.size * density + 1e-9))
        if limit == "none":
            chosen[name] = top_k(score.reshape(-1), k)
        else:
            paths[name] = SelectionPath.build(score, k, limit if isinstance(limit, int) else None)
    if not paths:
        return chosen, None, 1.0
    if isinstance(limit, int):
        rank = limit
        kept = sum(path.kept[-1] for path in paths.values()) / sum(p.free for p in paths.values())
    else:
        rank, kept = smallest_rank(list(paths.values()), AUTO_SHARE)
    return {name: path.select(rank) for name, path in paths.items()}, rank, float(kept)


def _gradient_scores(
    config: ExportConfig,
    floats: GgufFile,
    names: list[str],
    folder: Path,
    blocks: list[NDArray[np.int64]],
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Gradient scores of the matrices that the Hugging Face model has, in GGUF coordinates."""
    _require_torch()
    from zo_gguf.masks.sensitivity import (
        embedding_rows,
        gradient_scores,
        load_model,
        parameter_values,
    )

    model = load_model(folder, config.threads)
    largest, n_vocab = max(int(block.max()) for block in blocks), embedding_rows(model)
    if largest >= n_vocab:
        raise ZoError(
            f"The tokenizer in {str(folder)!r} gives token {largest}, but the model knows {n_vocab}"
            "; put the files of one model together."
        )
    parameters = {name: value for name, value in model.named_parameters() if value.dim() == 2}
    known = gguf_names(floats, parameters)
    places: dict[str, Placement] = {}
    problems: list[ZoError] = []
    for name in names:
        try:
            if name not in known:
                raise ZoError(f"{name!r} has no counterpart in the Hugging Face model.")
            weight = parameter_values(parameters[known[name]])
            places[name] = place(weight, floats, name)
        except ZoError as error:
            problems.append(error)
    if not places:
        raise problems[0]
    if problems:
        _note(f"{len(problems)} matrices are left out. The first: {problems[0]}")
    gguf_name = {known[name]: name for name in places}
    layers: dict[int, list[str]] = {}
    for name in places:
        layers.setdefault(layer_of(name), []).append(known[name])
    for parameter, score in gradient_scores(
        model,
        [layers[layer] for layer in sorted(layers)],
        blocks,
        chunk_layers=config.chunk_layers,
    ):
        name = gguf_name[parameter]
        yield name, places[name].apply(score)


def _require_torch() -> None:
    try:
        import_module("zo_gguf.masks.sensitivity")
    except ImportError as error:
        raise ZoError(
            f"Gradients need torch and transformers ({error}); install zo-gguf[export]."
        ) from error


def _plain_scores(
    config: ExportConfig, floats: GgufFile, names: list[str]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The controls: largest magnitude, or random numbers that depend on seed and name only."""
    for name in names:
        if config.score == "magnitude":
            yield name, np.abs(floats.dequantize(name))
        else:
            random = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
            yield name, random.random(floats.tensors[name].shape, dtype=np.float32)


def _note(text: str) -> None:
    print(text, file=sys.stderr)
