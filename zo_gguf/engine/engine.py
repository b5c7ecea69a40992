"""The model inside llama.cpp with libzo's hook: losses of examples at perturbed parameters.

Knows token ids and probes; knows nothing of data files, methods or optimizers.
"""

import os
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.adapter import AdapterParameters, EnginePath, choose_path
from zo_gguf.engine.backends import kernels_run, repacking_pays
from zo_gguf.engine.batch import (
    DecodeBatch,
    Request,
    build_request,
    lay_out,
    pack,
    reduce_losses,
    repetitions,
)
from zo_gguf.engine.context import Context
from zo_gguf.engine.model import Vocabulary, default_threads, load_model, native_library
from zo_gguf.engine.parameters import Parameters
from zo_gguf.engine.probe import AT_THETA, Matrix
from zo_gguf.engine.probe import Probe as Probe
from zo_gguf.engine.probe import Scores as Scores
from zo_gguf.engine.readout import hidden_states
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import NORMAL, Hook, Tensors
from zo_gguf.params.delta import Delta, open_entries
from zo_gguf.params.mask import Mask

Vector = NDArray[np.float64]


class Engine(Vocabulary):
    """A GGUF loaded for forward passes, with trainable entries where a mask puts them.

    Args:
        model: The GGUF file, or its path. An opened one is not hashed again.
        mask: A `Mask` (theta starts at its residuals), a `Delta` (theta starts at what was
            learned), a path of either, or None for the plain model.
        n_threads: CPU threads; default: the physical cores this process may use.
        ctx_tokens: Tokens per decode, over all probes in it, and so the longest example.
        n_gpu_layers: As in llama.cpp.
        probes_per_decode: Most probes that share a decode, which reads base weights once for all.
        kv_layout: "unified" (variable lengths side by side in one KV cache) or "split" (every
            sequence in a cache of its own, padded to equal length).
        force_staged: Take the path for device buffers even where tensors are in host memory.
        distribution: What z is drawn from, NORMAL or RADEMACHER.
        path: Where the parameters act: "hook" (libzo beside the products), "adapter" (the tensors
            of a LoRA adapter), or "auto": the adapter if layers are on a device that libzo has no
            kernels for and it can hold them.

    Raises:
        ZoError: The file cannot be loaded, or the mask was made for another one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | GgufFile,
        *,
        mask: Mask | Delta | str | os.PathLike[str] | None = None,
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
        self._parameters: Parameters | None = None
        self._hook: Hook | None = None
        self._context: Context | None = None
        self._model: Any = None
        self.gguf = model if isinstance(model, GgufFile) else GgufFile(model)
        self.mask = open_entries(mask, self.gguf)
        self.n_threads = n_threads or default_threads()
        self.ctx_tokens = ctx_tokens
        self.probes_per_decode = probes_per_decode
        self._padded = kv_layout == "split"
        self._library = native_library()
        self._edits = bool(self.mask and self.mask.live)  # weights, in place
        if self._edits and probes_per_decode > 1:
            raise ZoError("Weights edited in place have one value per decode: one probe at a time.")
        options = n_gpu_layers, path, distribution, force_staged
        repack = repacking_pays(self.gguf)
        self._start(repack, *options)
        if repack and self._edits and not self.parameters.are_editable:  # in an unknown layout
            self.close()
            self._start(False, *options)

    def _start(
        self, repack: bool, n_gpu_layers: int, path: str, distribution: int, force_staged: bool
    ) -> None:
        """Load the model, and make all that needs it."""
        super().__init__(load_model(self.gguf.path, n_gpu_layers, self._edits, repack))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self._model))
        self._offloads = n_gpu_layers != 0 and self.supports_gpu
        staged = self._offloads and self.probes_per_decode == 1 and not kernels_run(self._library)
        self.path: EnginePath = choose_path(path, self.gguf, self.mask, staged)
        if self.mask is None:
            self._hook = Hook(self._library, n_threads=self.n_threads, force_staged=force_staged)
        else:
            self._open(self.mask, distribution, force_staged, path == "auto")
        self._context = self._new_context(self._hook, getattr(self._parameters, "adapter", None))
        if self._edits:
            self._locate()

    def _open(self, delta: Delta, distribution: int, force_staged: bool, may_change: bool) -> None:
        """Make the parameters, and a hook unless an adapter holds them; the path `may_change`."""
        given = (self._library, delta, self.gguf, self.n_threads, distribution)
        if self.path == "adapter":
            if self.probes_per_decode > 1:
                raise ZoError("An adapter has one value per decode: one probe at a time.")
            self._parameters = parameters = AdapterParameters(self._model, *given)
            if self._reach(parameters) or not may_change:
                return
            parameters.free()
            self.path = "hook"
        self._parameters = Parameters(*given)
        self._hook = self._parameters.hook(self.n_threads, force_staged)

    def _reach(self, parameters: AdapterParameters) -> bool:
        """Whether all of an adapter's tensors were found where they can be rewritten."""
        for _ in range(2):  # the second decode leaves them in place: see keep_in_place in libzo
            self._context = self._new_context(parameters.tensors, parameters.adapter)
            self._locate()
            self._context.free()
            if parameters.tensors.missing == 0:
                return True
        return False

    def _new_context(self, watcher: Hook | Tensors | None, adapter: Any) -> Context:
        return Context(
            self._model,
            watcher,
            adapter=adapter,
            n_threads=self.n_threads,
            ctx_tokens=self.ctx_tokens,
            padded=self._padded,
            discards=self._library if self._hook and self._offloads else None,
        )

    # ---- trainable parameters --------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Number of trainable parameters."""
        return self._parameters.size if self._parameters else 0

    @property
    def parameters(self) -> Parameters:
        """theta and its noise.

        Raises:
            ZoError: The engine was opened without trainable weights.
        """
        if self._parameters is None:
            raise ZoError("This engine has no trainable weights; open it with a mask.")
        return self._parameters

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
        request = self._request(examples)
        nll = np.full((len(probes), request.n_targets), np.nan)
        n_tokens = 0
        for group in pack(request.sequences, self.ctx_tokens, request.n_shared):
            most = repetitions(group, self.ctx_tokens, self._padded, request.n_shared)
            width = min(self.probes_per_decode, most)
            for first in range(0, len(probes), width):
                together = probes[first : first + width]
                batch = lay_out(group, len(together), self._padded, request.n_shared)
                nll[first + batch.target_branch, batch.slots] = self._decode(batch, together)
                n_tokens += batch.tokens.size
        losses, correct, outcomes = reduce_losses(request, nll)
        return Scores(losses, correct, n_tokens, outcomes, request.targets)

    def widest(self, examples: Sequence[Example]) -> int:
        """How many probes fit into one decode with all of the examples; 1 if not even one does."""
        request = self._request(examples)
        (first, *others) = pack(request.sequences, self.ctx_tokens, request.n_shared)
        if others or self.parameters.one_probe_per_decode:
            return 1
        return repetitions(first, self.ctx_tokens, self._padded, request.n_shared)

    def _request(self, examples: Sequence[Example]) -> Request:
        return build_request(examples, 0 if self._padded else self.ctx_tokens)

    def _decode(self, batch: DecodeBatch, probes: Sequence[Probe]) -> Vector:
        assert self._context is not None
        branches = probes if self._parameters is None else self._parameters.prepare(probes)
        self._context.make_room(batch)
        if self._hook is not None:
            targets = batch.target_output, batch.target_token
            self._hook.begin(branches, batch.token_branch, batch.output_branch, *targets)
        status = self._context.decode(batch)
        # The hook's error explains more than the status.
        nll = None if self._hook is None else self._hook.end(batch.target_token.size)
        if status != 0:
            n = batch.tokens.size
            raise ZoError(f"llama_decode failed ({status}) on {n} tokens; lower --ctx-tokens.")
        nll = self._context.losses(batch, self._library) if nll is None else nll
        self._context.is_clean = bool(np.isfinite(nll).all())
        return nll

    def _locate(self) -> None:
        """Run one token, so that it is known where the tensors lie that are rewritten."""
        assert self._context is not None
        first = Example([max(self.bos_id, 0)] * 2, [False, True])
        batch = lay_out(self._request([first]).sequences, 1, self._padded)
        self._context.make_room(batch)
        if self._hook is None:
            self._context.decode(batch)
            return
        self.parameters.prepare_beside()
        self._hook.begin_any()
        self._context.decode(batch)
        self._hook.end(0)

    def hidden_states(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Mean and last hidden state of texts in the untuned model, (n_texts, 2 * width)."""
        return hidden_states(self._model, texts, self.n_threads)

    def close(self) -> None:
        """Free the model, the context and the native objects."""
        parts: tuple[Any, ...] = (self._context, self._hook, self._parameters)
        for part in parts:
            if part is not None:
                part.free()
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._hook = self._parameters = self._model = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self.close()
