"""Deltas: round trip, the run directory's delta, and refusals. File layout: see test_mask."""

from pathlib import Path

import numpy as np
import pytest

from tests.params.test_mask import HASH, gguf_like, make_mask
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta

THETA = np.float32([1, -2, 3, 4, -5])


def make_delta(step: int = 3) -> Delta:
    return Delta.from_mask(make_mask(), THETA, {"step": step, "valid_loss": 1.25})


def test_round_trip(tmp_path: Path) -> None:
    make_delta().save(tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    np.testing.assert_array_equal(delta.theta, THETA)
    assert delta.theta.dtype == np.float32
    assert list(delta.tensors) == list(make_mask().tensors)
    assert delta.shapes == make_mask().shapes
    assert delta.header.base_sha256 == HASH
    assert delta.header.provenance == {"step": 3, "valid_loss": 1.25}
    assert delta.nnz == 5


def test_equal_deltas_give_equal_bytes(tmp_path: Path) -> None:
    for i in range(5):
        make_delta().save(tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(5)}) == 1


def test_as_rows_places_every_value() -> None:
    delta = make_delta()
    for name, dense in (
        ("blk.1.ffn_up.weight", [[1, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 3]]),
        ("blk.0.attn_q.weight", [[0, 0], [4, -5]]),
    ):
        row, col, value = delta.as_rows(name)
        matrix = np.zeros(delta.shapes[name])
        matrix[row, col] = value
        np.testing.assert_array_equal(matrix, dense)


def test_a_run_directory_gives_its_final_delta_or_its_latest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ZoError, match=r"no delta\.safetensors and no checkpoint"):
        Delta.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    make_delta(1).save(tmp_path / "checkpoints" / "latest.safetensors")
    assert Delta.load(tmp_path).header.provenance["step"] == 1
    make_delta(2).save(tmp_path / "delta.safetensors")
    assert Delta.load(tmp_path).header.provenance["step"] == 2


def test_theta_must_fit_and_be_finite() -> None:
    mask = make_mask()
    with pytest.raises(ZoError, match=r"shape \(4,\).*5 positions"):
        Delta.from_mask(mask, THETA[:4], {})
    with pytest.raises(ZoError, match="NaN or infinite"):
        Delta.from_mask(mask, np.float32([1, 2, np.nan, 4, 5]), {})
    with pytest.raises(ZoError, match="float64"):
        Delta.from_mask(mask, THETA.astype(np.float64), {})  # type: ignore[arg-type]


def test_the_wrong_base_is_refused() -> None:
    make_delta().check_base(gguf_like())
    with pytest.raises(ZoError, match=f"(?s)made for 'model-Q4_0.gguf'.*{HASH}.*{'e' * 64}"):
        make_delta().check_base(gguf_like("e" * 64))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    make_mask().save(tmp_path / "mask")
    with pytest.raises(ZoError, match="is a mask, but a delta is needed"):
        Delta.load(tmp_path / "mask")
    make_delta().save(tmp_path / "d")
    data = (tmp_path / "d").read_bytes()
    (tmp_path / "short").write_bytes(data[:-1])
    with pytest.raises(ZoError, match="damaged"):
        Delta.load(tmp_path / "short")
    (tmp_path / "flipped").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ZoError, match="checksum"):
        Delta.load(tmp_path / "flipped")
    with pytest.raises(ZoError, match="is not a file"):
        Delta.load(tmp_path / "none")
