"""The upper bound: what `zo-gguf tune` trains, trained by backpropagation in torch.

The same dequantized weights, masked entries or gains of norms, starting values, rows and loss, but
exact gradients and Adam. What zeroth-order tuning of the same parameters does not reach is what it
pays for doing without a backward pass.

    .venv/bin/python -m tools.compare.first_order --hf DIR -m MODEL.gguf --data DIR
        [--method NAME] [--json]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.helpers import reference  # the tests' torch model
from zo_gguf.config import MASK_SUFFIX, TuneConfig
from zo_gguf.data.dataset import Draw, Example, load_examples, load_train_valid
from zo_gguf.engine.batch import build_request
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.evaluation import EvalResult, counted_tokens, summarize
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.tuning.methods import start
from zo_gguf.tuning.options import settle

_ROWS_PER_CALL = 64


class MaskedModel:
    """A torch model in which only theta is trainable.

    Args:
        model: From `reference.torch_model`.
        tensors, shapes: Positions, in GGUF coordinates, at which the first values are added.
        theta: Starting values, (nnz,).
        gains: Norms, by their GGUF names, whose weights are multiplied by 1 plus the values after.
    """

    def __init__(
        self,
        model: Any,
        tensors: dict[str, NDArray[np.int64]],
        shapes: dict[str, tuple[int, int]],
        theta: NDArray[np.float32],
        gains: Sequence[str] = (),
    ) -> None:
        self.theta = torch.tensor(theta, requires_grad=True)
        self._body, self._head = model.base_model, model.get_output_embeddings()
        model.requires_grad_(False)
        parameters = dict(self._body.named_parameters())
        self._entries = []  # (parameter's name, its values, rows, columns)
        for name, indices in tensors.items():
            n_rows, n_cols = shapes[name]
            to_hf = np.argsort(reference.rows_to_hf(name, n_rows, model.config))
            rows, cols = np.divmod(indices, n_cols)
            inner = _inner_name(model, name)
            place = (torch.from_numpy(to_hf[rows]), torch.from_numpy(cols))
            self._entries.append((inner, parameters[inner], place))
        inner_names = [_inner_name(model, name) for name in gains]
        self._gains = [(inner, parameters[inner]) for inner in inner_names]

    def losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of every example and whether its answer is right (NaN without choices), (n,)."""
        request = build_request(examples)
        sequences = request.sequences
        longest = max(sequence.tokens.size for sequence in sequences)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            # Filled up on the right, where causal attention hides it.
            row[: sequence.tokens.size] = torch.from_numpy(sequence.tokens)
        row_of = np.repeat(np.arange(len(sequences)), [s.targets.size for s in sequences])
        columns = np.concatenate([s.positions for s in sequences])
        targets = torch.from_numpy(np.concatenate([s.targets for s in sequences])).long()
        slots = torch.from_numpy(np.concatenate([s.slots for s in sequences]))
        hidden = self._hidden(tokens)[row_of, columns]  # (n_targets, width)
        nll = torch.nn.functional.cross_entropy(self._head(hidden), targets, reduction="none")
        in_order = torch.zeros(request.n_targets).index_put((slots,), nll)
        spans = [span for of_example in request.spans for span in of_example]
        lengths = torch.tensor([end - first for first, end in spans])
        span_of = torch.repeat_interleave(torch.arange(len(spans)), lengths)
        means = torch.zeros(len(spans)).index_add(0, span_of, in_order) / lengths
        losses, correct = [], []
        parts = torch.split(means, [len(of_example) for of_example in request.spans])
        for part, answer in zip(parts, request.answers, strict=True):
            losses.append(part[0] if answer < 0 else -(-part).log_softmax(0)[answer])
            correct.append(float("nan") if answer < 0 else float(part.argmin() == answer))
        return torch.stack(losses), torch.tensor(correct)

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last layer's output, (n_sequences, n_tokens, width), with theta added."""
        weights, first = {}, 0
        for name, value, place in self._entries:
            part = self.theta[first : first + place[0].numel()]
            weights[name] = value.index_put(place, part, accumulate=True)
            first += part.numel()
        for name, value in self._gains:
            weights[name] = value * (1 + self.theta[first : first + value.numel()])
            first += value.numel()
        call = {"input_ids": tokens, "use_cache": False}
        output: torch.Tensor = torch.func.functional_call(
            self._body, weights, (), call
        ).last_hidden_state
        return output

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> EvalResult:
        """Means over the examples, as `zo-gguf eval` gives them."""
        parts = [
            self.losses(examples[first : first + _ROWS_PER_CALL])
            for first in range(0, len(examples), _ROWS_PER_CALL)
        ]
        losses, correct = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
        return summarize(losses, correct, counted_tokens(examples))


def _inner_name(model: Any, name: str) -> str:
    """Of a GGUF tensor, in the body of the torch model."""
    return reference.hf_name(name).removeprefix(f"{model.base_model_prefix}.")


@dataclass(frozen=True)
class Bound:
    """What backpropagation reaches, on the rows that `tune` validates with and on the test rows."""

    steps: int
    n_parameters: int
    valid: EvalResult
    test: EvalResult

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "steps": self.steps,
            "parameters": self.n_parameters,
            "valid": self.valid.to_dict(),
            "test": self.test.to_dict(),
        }


def train(
    model: MaskedModel, rows: Sequence[Example], steps: int, n: int, rate: float, seed: int
) -> None:
    """Adam on theta, at a constant rate, on the rows that `tune` would draw with n rows a step."""
    draw = Draw(rows, n, seed)
    optimizer = torch.optim.Adam([model.theta], lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.losses(draw(step))[0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", file=sys.stderr, flush=True)


def first_order(options: argparse.Namespace) -> Bound:
    """Train a method's parameters by backpropagation and measure them.

    Raises:
        ZoError: The model, mask or data cannot be used, the Hugging Face folder is missing, or the
            method trains other things than masked entries and norms.
    """
    if not (options.hf / "config.json").is_file():
        raise ZoError(f"{str(options.hf)!r} is no Hugging Face folder: it has no config.json.")
    files = {"model": str(options.model), "data": str(options.data), "output": "none"}
    config = settle(TuneConfig(**files, method=options.method, mask=str(options.mask or "")))
    delta = start(config, GgufFile(options.model))
    if other := {edit.kind for _, edit, _ in delta.parts()} - {"gain"}:
        raise ZoError(f"There is no bound for {', '.join(other)}; take --method sensitive or norm.")
    with Engine(options.model, n_threads=1) as engine:
        rows, valid = load_train_valid(options.data, engine, val_split=TuneConfig.val_split)
        test = load_examples(options.data, engine, split="test")
    torch_model = reference.torch_model(options.hf, options.model)
    model = MaskedModel(torch_model, delta.tensors, delta.shapes, delta.theta, list(delta.edits))
    train(model, rows, options.steps, options.rows, options.lr, options.seed)
    valid = valid[: TuneConfig.valid_rows]
    return Bound(options.steps, delta.nnz, model.measure(valid), model.measure(test))


def main() -> int:
    """Print validation and test loss and accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder of the model")
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF of the same model")
    parser.add_argument("--method", default="sensitive", help="or norm, or both with a plus")
    parser.add_argument("--mask", type=Path, help=f"default: MODEL with {MASK_SUFFIX} for .gguf")
    parser.add_argument("--data", type=Path, required=True, help="folder: train, valid, test.jsonl")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=32, help="rows per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="Adam's (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the row order (%(default)s)")
    parser.add_argument("-t", "--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        bound = first_order(options)
    except ZoError as error:
        print(f"tools.compare.first_order: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(bound.to_dict()))
        return 0
    print(f"{bound.n_parameters} weights, {bound.steps} Adam steps of {options.rows} rows")
    for name, result in (("valid", bound.valid), ("test", bound.test)):
        print(f"\n{name}\n{result.render()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
