"""Decodes of a loaded model at probes: the context, the parameters, and what brings them together.

Parameters reach the products in one of two ways: through libzo's hook, or through the tensors of a
LoRA adapter (`adapter.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.engine.adapter import AdapterParameters, EnginePath, choose_path
from zo_gguf.engine.batch import DecodeBatch, build_request, lay_out
from zo_gguf.engine.context import Context
from zo_gguf.engine.hardware.backends import kernels_run
from zo_gguf.engine.model import Model, native_library
from zo_gguf.engine.parameters import Parameters
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Hook, Probe, Tensors
from zo_gguf.params.delta import Delta


@dataclass(frozen=True)
class ForwardOptions:
    """How decodes are run.

    Attributes:
        n_threads: CPU threads.
        ctx_tokens: Tokens per decode.
        padded: Sequences have KV caches of their own, all of one length.
        n_gpu_layers: As in llama.cpp.
        probes_per_decode: Most probes that share a decode.
        force_staged: Take the path for device buffers even where tensors are in host memory.
        distribution: What z is drawn from.
        path: "hook", "adapter" or "auto".
    """

    n_threads: int
    ctx_tokens: int
    padded: bool
    n_gpu_layers: int
    probes_per_decode: int
    force_staged: bool
    distribution: int
    path: str


class Forward:
    """Forward passes at probes.

    Args:
        model: Outlives this.
        gguf: Its file.
        delta: What is trained, or None.
        options: How.

    Attributes:
        parameters: theta; None where nothing is trained.
        path: How they reach the products.

    Raises:
        ZoError: The parameters do not fit the model, or go by no such path.
    """

    def __init__(
        self, model: Model, gguf: GgufFile, delta: Delta | None, options: ForwardOptions
    ) -> None:
        self._library, self._model, self._options = native_library(), model, options
        self._hook: Hook | None = None
        self._context: Context | None = None
        self.parameters: Parameters | None = None
        self._offloads = options.n_gpu_layers != 0 and model.supports_gpu
        staged = self._offloads and options.probes_per_decode == 1
        staged = staged and not kernels_run(self._library)
        self.path: EnginePath = choose_path(options.path, gguf, delta, staged)
        try:
            self._open(delta, gguf)
        except BaseException:
            self.free()
            raise

    def _open(self, delta: Delta | None, gguf: GgufFile) -> None:
        """Make everything, the context last, and have weights found that are edited in place."""
        options = self._options
        if delta is None:
            force = options.force_staged
            self._hook = Hook(self._library, n_threads=options.n_threads, force_staged=force)
        else:
            self._take(delta, gguf)
        self._context = self._new_context(self._hook, getattr(self.parameters, "adapter", None))
        if delta is not None and delta.live:
            self._find_weights()

    def _take(self, delta: Delta, gguf: GgufFile) -> None:
        """Make the parameters, and a hook unless an adapter holds them."""
        options = self._options
        given = (self._library, delta, gguf, options.n_threads, options.distribution)
        if self.path == "adapter":
            if options.probes_per_decode > 1:
                raise ZoError("An adapter has one value per decode: one probe at a time.")
            self.parameters = adapter = AdapterParameters(self._model.handle, *given)
            if self._find_adapter(adapter) or options.path == "adapter":
                return
            adapter.free()
            self.path = "hook"
        self.parameters = Parameters(*given)
        self._hook = self.parameters.hook(options.n_threads, options.force_staged)

    def _new_context(self, watcher: Hook | Tensors | None, adapter: Any) -> Context:
        return Context(
            self._model.handle,
            watcher,
            adapter=adapter,
            n_threads=self._options.n_threads,
            ctx_tokens=self._options.ctx_tokens,
            padded=self._options.padded,
            discards=self._library if self._hook and self._offloads else None,
        )

    # ---- where tensors lie is known after a decode -----------------------------------------------

    def _find_adapter(self, parameters: AdapterParameters) -> bool:
        """Whether all of an adapter's tensors were found where they can be rewritten."""
        for _ in range(2):  # the second decode leaves them in place: see keep_in_place in libzo
            context = self._new_context(parameters.tensors, parameters.adapter)
            try:
                batch = self._one_token()
                context.make_room(batch)
                context.decode(batch)
            finally:
                context.free()
            if parameters.tensors.missing == 0:
                return True
        return False

    def _find_weights(self) -> None:
        """Run one token, so that libzo sees the weights that it is to edit in place."""
        assert self._context is not None
        assert self._hook is not None
        assert self.parameters is not None
        batch = self._one_token()
        self._context.make_room(batch)
        self.parameters.prepare_beside()
        self._hook.begin_any()
        self._context.decode(batch)
        self._hook.end(0)

    def _one_token(self) -> DecodeBatch:
        first = Example([max(self._model.vocabulary.bos_id, 0)] * 2, [False, True])
        return lay_out(build_request([first], 0).sequences, 1, self._options.padded)

    @property
    def hook(self) -> Hook:
        """libzo's hook.

        Raises:
            ZoError: The parameters act through an adapter.
        """
        if self._hook is None:
            raise ZoError(
                "The parameters are an adapter's tensors, without a hook; use --path hook."
            )
        return self._hook

    # ---- decodes ---------------------------------------------------------------------------------

    def decode(self, batch: DecodeBatch, probes: Sequence[Probe]) -> NDArray[np.float64]:
        """Negative log-likelihood of each target of a batch, (n_targets,).

        Args:
            batch: Laid out for as many branches as there are probes.
            probes: One per branch.

        Raises:
            ZoError: The batch does not fit, or the engine's graph is not supported.
        """
        assert self._context is not None
        branches = probes if self.parameters is None else self.parameters.prepare(probes)
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

    def free(self) -> None:
        """Release everything but the model."""
        parts: tuple[Any, ...] = (self._context, self._hook, self.parameters)
        for part in parts:
            if part is not None:
                part.free()
        self._context = self._hook = self.parameters = None
