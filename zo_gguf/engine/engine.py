"""The model inside llama.cpp with libzo's hook: losses of examples at perturbed parameters.

Knows token ids and probes; knows nothing of data files, methods or optimizers.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.adapter import EnginePath
from zo_gguf.engine.batch import (
    DecodeBatch,
    Matrix,
    Request,
    Scores,
    Vector,
    build_request,
    lay_out,
    pack,
    reduce_losses,
    repetitions,
)
from zo_gguf.engine.forward import Forward, ForwardOptions
from zo_gguf.engine.hardware.backends import repacking_pays
from zo_gguf.engine.model import Model, Vocabulary, default_threads
from zo_gguf.engine.parameters import Parameters
from zo_gguf.engine.readout import hidden_states
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import AT_THETA, NORMAL, Hook, Probe
from zo_gguf.params.delta import Delta, open_delta
from zo_gguf.params.mask import Mask


class Engine:
    """A GGUF loaded for forward passes, with trainable parameters where a delta puts them.

    Args:
        model: The GGUF file, or its path. An opened one is not hashed again.
        delta: What is trained: a `Delta` (theta starts at what was learned), a `Mask` (theta starts
            at its residuals), a path of either, or None for the plain model.
        n_threads: CPU threads; default: the physical cores this process may use.
        ctx_tokens: Tokens per decode, over all probes in it, and so the longest example.
        n_gpu_layers: As in llama.cpp. With CUDA, graphs are switched off in this process's
            environment, because a hooked graph runs in pieces.
        probes_per_decode: Most probes that share a decode, which reads base weights once for all.
        kv_layout: "unified" (variable lengths side by side in one KV cache) or "split" (every
            sequence in a cache of its own, padded to equal length).
        force_staged: Take the path for device buffers even where tensors are in host memory.
        distribution: What z is drawn from, NORMAL or RADEMACHER.
        path: Where the parameters act: "hook" (libzo beside the products), "adapter" (the tensors
            of a LoRA adapter), or "auto": the adapter if layers are on a device that libzo has no
            kernels for and it can hold them.

    Attributes:
        gguf: The file.
        delta: What is trained, as it was given; None for the plain model.
        vocabulary: The file's own tokenizer and chat template.
        n_ctx_train: Tokens of the longest text that the model was trained on.

    Raises:
        ZoError: The file cannot be loaded, or the delta was made for another one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | GgufFile,
        *,
        delta: Delta | Mask | str | os.PathLike[str] | None = None,
        n_threads: int | None = None,
        ctx_tokens: int = 2048,
        n_gpu_layers: int = 0,
        probes_per_decode: int = 1,
        kv_layout: str = "unified",
        force_staged: bool = False,
        distribution: int = NORMAL,
        path: str = "auto",
    ) -> None:
        if kv_layout not in ("unified", "split"):
            raise ZoError(f"kv_layout is {kv_layout!r}; use 'unified' or 'split'.")
        self._model: Model | None = None
        self._forward: Forward | None = None
        self.gguf = model if isinstance(model, GgufFile) else GgufFile(model)
        self.delta = open_delta(delta, self.gguf)
        self.n_threads = n_threads or default_threads()
        self.ctx_tokens = ctx_tokens
        self.probes_per_decode = probes_per_decode
        self._options = ForwardOptions(
            n_threads=self.n_threads,
            ctx_tokens=ctx_tokens,
            padded=kv_layout == "split",
            n_gpu_layers=n_gpu_layers,
            probes_per_decode=probes_per_decode,
            force_staged=force_staged,
            distribution=distribution,
            path=path,
        )
        loaded = self._load()
        self.vocabulary: Vocabulary = loaded.vocabulary
        self.n_ctx_train = loaded.n_ctx_train

    def _load(self) -> Model:
        """Load the model and all that needs it."""
        edits = self.delta is not None and bool(self.delta.live)  # weights, in place
        if edits and self.probes_per_decode > 1:
            raise ZoError("Weights edited in place have one value per decode: one probe at a time.")
        pays = repacking_pays(self.gguf)
        model = self._open(edits, repack=pays)
        if pays and edits and not self.parameters.are_editable:  # in an unknown layout
            self.close()
            model = self._open(edits, repack=False)
        return model

    def set_delta(self, delta: Delta | Mask | str | os.PathLike[str] | None) -> None:
        """Have other parameters from now on, at their first theta.

        The model stays loaded, unless weights are to be edited in place.

        Raises:
            ZoError: The delta was made for another file, or the parameters cannot be applied.
        """
        self.delta = open_delta(delta, self.gguf)
        if self._model is None or (self.delta is not None and self.delta.live):
            self.close()
            self._load()
            return
        self._passes.free()
        self._forward = Forward(self._model, self.gguf, self.delta, self._options)

    def _open(self, edits: bool, repack: bool) -> Model:
        self._model = model = Model(self.gguf.path, self._options.n_gpu_layers, edits, repack)
        self._forward = Forward(model, self.gguf, self.delta, self._options)
        return model

    # ---- trainable parameters --------------------------------------------------------------------

    @property
    def path(self) -> EnginePath:
        """Where the parameters act: "hook" or "adapter"."""
        return self._passes.path

    @property
    def nnz(self) -> int:
        """Number of trainable parameters."""
        return 0 if self._passes.parameters is None else self._passes.parameters.size

    @property
    def parameters(self) -> Parameters:
        """theta and its noise.

        Raises:
            ZoError: The engine was opened without trainable weights.
        """
        if self._passes.parameters is None:
            raise ZoError("This engine has no trainable weights; open it with a delta or mask.")
        return self._passes.parameters

    def theta(self) -> NDArray[np.float32]:
        """A copy of theta, (nnz,): tensors in file order, indices ascending."""
        return self.parameters.read()

    def set_theta(self, theta: NDArray[np.float32]) -> None:
        """Replace theta, (nnz,).

        Raises:
            ZoError: Wrong length, or values that are not finite.
        """
        self.parameters.write(np.array(theta, np.float32))

    def noise(self, seed: int) -> NDArray[np.float32]:
        """z(seed), (nnz,), standard normal; the same bits on every machine."""
        return self.parameters.noise(seed)

    # ---- losses ----------------------------------------------------------------------------------

    def losses(self, examples: Sequence[Example], probes: Sequence[Probe] = (AT_THETA,)) -> Matrix:
        """Loss of every example at every probe, float64 (n_probes, n_examples).

        The loss is the mean negative log-likelihood of the example's counted tokens; for an
        example with choices, the cross-entropy over the choices' mean log-likelihoods.

        Args:
            examples: Rows.
            probes: Each one for all examples.

        Raises:
            ZoError: An example does not fit a decode, or the engine's graph is not supported.
        """
        return self.score(examples, probes).losses

    def score(self, examples: Sequence[Example], probes: Sequence[Probe] = (AT_THETA,)) -> Scores:
        """Losses and correctness of every example at every probe; see `losses`."""
        request, padded = self.request(examples), self._options.padded
        nll = np.full((len(probes), request.n_targets), np.nan)
        n_tokens = 0
        for group in pack(request.sequences, self.ctx_tokens, request.n_shared):
            most = repetitions(group, self.ctx_tokens, padded, request.n_shared)
            width = min(self.probes_per_decode, most)
            for first in range(0, len(probes), width):
                together = probes[first : first + width]
                batch = lay_out(group, len(together), padded, request.n_shared)
                nll[first + batch.target_branch, batch.slots] = self.decode(batch, together)
                n_tokens += batch.tokens.size
        losses, correct, outcomes = reduce_losses(request, nll)
        return Scores(losses, correct, n_tokens, outcomes, request.targets)

    def widest(self, examples: Sequence[Example]) -> int:
        """How many probes fit into one decode with all of the examples; 1 if not even one does."""
        request = self.request(examples)
        (first, *others) = pack(request.sequences, self.ctx_tokens, request.n_shared)
        if others or self.parameters.one_probe_per_decode:
            return 1
        return repetitions(first, self.ctx_tokens, self._options.padded, request.n_shared)

    def decode(self, batch: DecodeBatch, probes: Sequence[Probe]) -> Vector:
        """Run one decode, with a probe for each of its branches.

        Returns:
            Negative log-likelihood of each target, (n_targets,).

        Raises:
            ZoError: The batch does not fit, or the engine's graph is not supported.
        """
        return self._passes.decode(batch, probes)

    @property
    def hook(self) -> Hook:
        """libzo's hook.

        Raises:
            ZoError: The parameters act through an adapter.
        """
        return self._passes.hook

    @property
    def is_padded(self) -> bool:
        """Whether every sequence has a cache of its own, padded to equal length."""
        return self._options.padded

    def request(self, examples: Sequence[Example]) -> Request:
        """What has to go through the model for the losses of examples; see `build_request`."""
        return build_request(examples, 0 if self._options.padded else self.ctx_tokens)

    def hidden_states(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Mean and last hidden state of texts in the untuned model, (n_texts, 2 * width)."""
        assert self._model is not None
        return hidden_states(self._model.handle, texts, self.n_threads)

    @property
    def _passes(self) -> Forward:
        if self._forward is None:
            raise ZoError("This engine was closed; open another.")
        return self._forward

    def close(self) -> None:
        """Free the model, the context and the native objects."""
        parts = (self._forward, self._model)
        self._forward = self._model = None
        for part in parts:
            if part is not None:
                part.free()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_forward"):
            self.close()
