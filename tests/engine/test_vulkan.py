"""On a Vulkan device: the same losses as on the CPU, on both paths, and what a run does there.

Needs a Vulkan build of llama-cpp-python. Mesa's software driver is device enough; llama.cpp leaves
it out until it is asked for by number:

    CMAKE_ARGS=-DGGML_VULKAN=on pip install --no-binary llama-cpp-python --force-reinstall \
        --no-deps llama-cpp-python==0.3.36
    GGML_VK_VISIBLE_DEVICES=0 python -m pytest tests/test_vulkan.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from tests.engine.test_adapter import METHODS, PROBES, ROWS, config, rows_file
from zo_gguf.config import ReplayConfig, TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.attach import attach
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.hardware.backends import list_devices
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.methods import start
from zo_gguf.verbs.replay import replay
from zo_gguf.verbs.tune import tune

pytestmark = pytest.mark.vulkan
ALL = -1
IN_PLACE: dict[str, tuple[str, dict[str, Any]]] = {
    "norm": ("F32", {}),
    "dense": ("F32", {"train": "norm|attn_q"}),
    "block-scale": ("Q4_0", {}),
    "sensitive+norm": ("F32", {}),
}
# At least as many tokens as llama.cpp moves to a device with weights that stay on the CPU.
LONG = [Example([k % 200 + 3 for k in range(40)], [False] * 32 + [True] * 8)]


@pytest.fixture(autouse=True)
def _device() -> None:
    if not any(device.name.startswith("Vulkan") for device in list_devices()):
        pytest.skip("llama.cpp finds no Vulkan device; the head of this file says how to have one")


def losses(given: TuneConfig, n_gpu_layers: int, path: str, **options: Any) -> np.ndarray:
    rows = options.pop("rows", ROWS)
    probes = options.pop("probes", PROBES)
    delta = start(given, GgufFile(given.model))
    with Engine(
        given.model, delta=delta, n_threads=1, n_gpu_layers=n_gpu_layers, path=path, **options
    ) as engine:
        return np.asarray(engine.losses(rows, probes))


def check(
    found: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-2, trace: float = 0.0
) -> None:
    """Losses of PROBES agree as far as 16-bit products on the device let them."""
    assert np.abs(found[0] - found[-1]).max() <= trace  # probes leave none
    assert np.abs(found - wanted).max() < tolerance
    moved, meant = (a[1:-1] - a[0] for a in (found, wanted))
    assert np.abs(meant).max() > 2e-2  # so that this means something
    assert np.corrcoef(moved.ravel(), meant.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("n_gpu_layers", [ALL, 1])
@pytest.mark.parametrize("path", ["hook", "adapter"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_cpu(
    method: str, path: str, n_gpu_layers: int, tmp_path: Path
) -> None:
    given = config(tmp_path, method, **METHODS[method])
    check(losses(given, n_gpu_layers, path), losses(given, 0, "hook"))


@pytest.mark.parametrize("n_gpu_layers", [ALL, 1])
@pytest.mark.parametrize("method", IN_PLACE)
def test_what_no_adapter_holds(method: str, n_gpu_layers: int, tmp_path: Path) -> None:
    quant, options = IN_PLACE[method]
    given = config(tmp_path, method, quant, **options)
    # 8-bit activations on the CPU only
    tolerance = 0.05 if quant == "Q4_0" else 2e-2
    check(losses(given, n_gpu_layers, "auto"), losses(given, 0, "auto"), tolerance)


@pytest.mark.parametrize("method", [*METHODS, *IN_PLACE])
def test_weights_that_are_copied_to_the_device_for_every_decode(
    method: str, tmp_path: Path
) -> None:
    quant, options = IN_PLACE.get(method, ("F32", METHODS.get(method, {})))
    given = config(tmp_path, method, quant, **options)
    wanted = losses(given, ALL, "hook", rows=LONG)
    check(losses(given, 0, "hook", rows=LONG), wanted)
    if method in METHODS:
        check(losses(given, 0, "adapter", rows=LONG), wanted)


def test_adapter_that_is_out_of_reach(tmp_path: Path) -> None:
    """The products of the last layer on the CPU are computed on the device, with copies."""
    given = config(tmp_path, "lora", train="blk.1.ffn_down")
    check(losses(given, 1, "auto"), losses(given, 0, "hook"))
    with pytest.raises(ZoError, match="to a device for every decode"):
        losses(given, 1, "adapter")


@pytest.mark.parametrize("options", [{"probes_per_decode": 4}, {"kv_layout": "split"}])
def test_shapes_of_decodes(options: dict[str, Any], tmp_path: Path) -> None:
    given = config(tmp_path, "sensitive+subspace", **METHODS["sensitive+subspace"])
    found = losses(given, ALL, "hook", **options)
    # The last probe is alone in its decode, whose products are rounded in another way.
    check(found, losses(given, 0, "hook"), trace=5e-3)


def test_a_direction_per_example(tmp_path: Path) -> None:
    given = config(tmp_path, "sensitive")
    probes = [[Probe(1, 0.1, k + 1) for k in range(3)], [Probe(1, -0.1, k + 1) for k in range(3)]]
    found, wanted = (losses(given, n, "hook", probes=probes) for n in (ALL, 0))
    np.testing.assert_allclose(found, wanted, atol=2e-2)
    assert np.abs(wanted[0] - wanted[1]).min() > 2e-2


def test_attach(tmp_path: Path) -> None:
    given = config(tmp_path, "sensitive")
    delta = start(given, GgufFile(given.model))
    seen = []
    for n_gpu_layers in (0, ALL):
        llama = Llama(
            given.model, n_gpu_layers=n_gpu_layers, n_ctx=64, logits_all=True, verbose=False
        )
        for tuned in (False, True):
            if tuned:
                attach(llama, delta)
            llama.reset()
            llama.eval([3, 5, 7, 9])
            seen.append(np.array(llama._scores[3]))
        llama.close()
    base, tuned, *on_device = seen
    np.testing.assert_allclose(on_device, [base, tuned], atol=0.05)
    assert np.abs(tuned - base).max() > 0.5


def test_a_run(tmp_path: Path) -> None:
    rows_file(tmp_path)
    options = {"iters": 4, "eps": 0.05, "learning_rate": 0.01, "directions": 2, "save_every": 2}
    run = str(tmp_path / "run")
    tune(TuneConfig(**vars(config(tmp_path, "sensitive", n_gpu_layers=ALL, output=run)) | options))
    assert "path: adapter" in (Path(run) / "config.yaml").read_text()
    learned = Delta.load(f"{run}/checkpoints/latest.safetensors").theta
    assert np.array_equal(replay(ReplayConfig(run=run, step=4)).delta.theta, learned)
