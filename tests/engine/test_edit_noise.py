"""z of gains and products, through `Parameters`."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import write_llama
from tests.native.test_native_edits import noise
from tests.params.test_kinds import HEADER, NONE, floats
from zo_gguf.engine.model import native_library
from zo_gguf.engine.parameters import Parameters
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import NORMAL
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import Edits, Gain, LowRank, Products

N_ROWS, N_COLS, RANK = 6, 5, 3
EDITS: Edits = {"gain": Gain(7)}
PRODUCTS: Products = {
    "lora": LowRank("lora", N_ROWS, N_COLS, RANK, 2.0, 0, NONE, NONE),
    "sub": LowRank("subspace", N_ROWS, N_COLS, RANK, 1.5, 10, floats(3, RANK, N_ROWS),
                   floats(3, RANK, N_COLS)),
}  # fmt: skip
# What the noise calls the first product and the first gain; above all numbers of the native parts.
FIRST_LOW_RANK, FIRST_GAIN = 1 << 31, 3 << 30
SEED, STEP = 5, 14  # in the second subspace


@pytest.fixture
def parameters(tmp_path: Path) -> Parameters:
    gguf = GgufFile(write_llama(tmp_path / "m.gguf", Type.F32))
    n = sum(edit.size for edit in [*EDITS.values(), *PRODUCTS.values()])
    delta = Delta({}, {}, np.zeros(n, np.float32), HEADER, EDITS, PRODUCTS)
    parameters = Parameters(native_library(), delta, gguf, 1, NORMAL)
    parameters.write(delta.theta, STEP)
    return parameters


def parts(z: np.ndarray) -> tuple[np.ndarray, ...]:
    """The gain; A and B transposed; the three windows' Z."""
    gain, a, b, *windows = np.split(z, np.cumsum([7, RANK * N_COLS, RANK * N_ROWS, 9, 9]))
    return gain, a.reshape(RANK, N_COLS), b.reshape(RANK, N_ROWS), np.array(windows)


def test_z_is_that_of_the_tensors_numbers(parameters: Parameters) -> None:
    gain, a, b, windows = parts(parameters.noise(SEED))
    np.testing.assert_array_equal(gain, noise(NORMAL, SEED, FIRST_GAIN, 0, 7))
    of_lora = noise(NORMAL, SEED, FIRST_LOW_RANK, 0, RANK * (N_COLS + N_ROWS))
    np.testing.assert_array_equal(np.hstack([a.ravel(), b.ravel()]), of_lora)
    assert not windows[[0, 2]].any()  # only one subspace is trained at a time
    np.testing.assert_array_equal(windows[1], noise(NORMAL, SEED, FIRST_LOW_RANK + 1, 9, 9))
