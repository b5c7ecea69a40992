"""The rows of a run: which each step sees, and those it is validated with."""

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw, load_train_valid
from zo_gguf.data.encode import Example, Reader
from zo_gguf.tuning.estimators import estimator_of


def load_rows(config: TuneConfig, tokenizer: Reader) -> tuple[Draw, list[Example]]:
    """The rows of every step, and the --valid-rows to validate with.

    Raises:
        ZoError: A file or row cannot be used.
    """
    train, valid = load_train_valid(
        config.data,
        tokenizer,
        val_split=config.val_split,
        max_tokens=config.max_seq_length,
        train_on=config.train_on,
        fields=config.field,
    )
    n_rows = estimator_of(config).examples_per_step
    draw = Draw(train, n_rows, config.seed, balance=config.balance)
    return draw, valid[: config.valid_rows or None]
