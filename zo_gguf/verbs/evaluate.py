"""`zo-gguf eval`: loss, perplexity and accuracy of a GGUF on a data file."""

from zo_gguf.config import EvalConfig, takes
from zo_gguf.data.dataset import load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.evaluation import EvalResult, measure
from zo_gguf.params.delta import Delta


@takes(EvalConfig)
def evaluate(config: EvalConfig) -> EvalResult:
    """Measure a model, or a model with a delta, on a data file.

    Raises:
        ZoError: The model, delta or data cannot be used, or they do not belong together.
    """
    delta = Delta.load(config.delta) if config.delta is not None else None
    with Engine(
        config.model,
        delta=delta,
        n_threads=config.threads,
        ctx_tokens=config.ctx_tokens,
        n_gpu_layers=config.n_gpu_layers,
    ) as engine:
        examples = load_examples(
            config.data,
            engine,
            max_tokens=config.max_seq_length,
            train_on=config.train_on,
            fields=config.field,
            split=config.split,
        )
        return measure(engine, examples[: config.rows or None])
