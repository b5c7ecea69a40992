"""info on every kind of file, env, and what they say about anything else."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from tests.helpers.tiny_gguf import LINEAR, random_delta, write_llama
from zo_gguf import cli
from zo_gguf.config import EnvConfig, InfoConfig, MergeConfig
from zo_gguf.engine.hardware.backends import Device, gpu_in_words
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.params.mask import Mask, MaskHeader
from zo_gguf.tuning.trajectory import Direction, Record, Trajectory
from zo_gguf.verbs.info import env, info
from zo_gguf.verbs.merge import merge


def facts(path: Path) -> dict[str, object]:
    result = info(InfoConfig(path=str(path)))
    assert result.render()
    return json.loads(result.render(as_json=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf, a mask and a delta for it, and a trajectory."""
    folder = tmp_path_factory.mktemp("info")
    base = GgufFile(write_llama(folder / "base.gguf", Type.Q4_0))
    delta = random_delta(base, rank=6)
    delta.save(folder / "delta.safetensors")
    residuals = {name: delta.theta[part] for name, part in delta.slices().items()}
    header = MaskHeader("base.gguf", base.sha256(), "random", 0.02, calibration={"docs": 3})
    Mask(delta.tensors, residuals, delta.shapes, header).save(folder / "mask.safetensors")
    trajectory = Trajectory.create(folder / "trajectory.bin", {"directions": 1, "seed": 7})
    for step, loss in enumerate((2.0, 1.0), start=1):
        trajectory.append(Record(step, 0.5, (Direction(step, loss, loss, 0.0),)))
    trajectory.close()
    return folder


def test_model(folder: Path) -> None:
    values = facts(folder / "base.gguf")
    base = GgufFile(folder / "base.gguf")
    assert values["kind"] == "model (GGUF)"
    assert values["architecture"] == "llama"
    assert values["tensors_sha256"] == base.sha256()
    assert values["layers"] == 2
    assert values["vocabulary"] == 269
    assert values["chat_template"] == "yes"
    assert values["bytes"] == (folder / "base.gguf").stat().st_size
    assert values["tensors"]["Q4_0"].startswith(f"{2 * len(LINEAR)}, ")
    assert values["parameters"] == sum(base.dequantize(name).size for name in base.tensors)
    assert "made_by_zo-gguf" not in values


def test_mask_and_delta(folder: Path) -> None:
    delta, sha = Delta.load(folder / "delta.safetensors"), GgufFile(folder / "base.gguf").sha256()
    for kind in ("mask", "delta"):
        values = facts(folder / f"{kind}.safetensors")
        assert values["kind"] == kind
        assert values["weights"] == delta.nnz
        assert values["tensors"] == len(delta.tensors)
        assert values["base_sha256"] == sha
    assert values["provenance"] == {"step": 3, "seed": 0}
    assert values["theta_largest"] == pytest.approx(abs(delta.theta).max())
    assert facts(folder / "mask.safetensors")["calibration"] == {"docs": 3}
    assert facts(folder / "mask.safetensors")["rank"].startswith("6 ")


def test_trajectory(folder: Path) -> None:
    values = facts(folder / "trajectory.bin")
    assert values["steps"] == 2
    assert values["loss_at_the_first_step"] == 2
    assert values["loss_at_the_last_step"] == 1
    assert values["header"]["seed"] == 7


def test_run(folder: Path, tmp_path: Path) -> None:
    for name in ("trajectory.bin", "delta.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.yaml").write_text("model: a.gguf\nmask: m\ndata: d\noutput: r\niters: 9\n")
    values = facts(tmp_path)
    assert values["kind"] == "run"
    assert values["steps_done"] == 2
    assert values["finished"].startswith("no")
    assert values["config"]["iters"] == 9
    assert values["delta.safetensors"]["kind"] == "delta"
    (tmp_path / "summary.json").write_text('{"best_step": 2}')
    assert facts(tmp_path)["finished"] == "yes"
    assert facts(tmp_path)["summary"] == {"best_step": 2}
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ZoError, match="not valid JSON"):
        facts(tmp_path)


def test_merged_file_and_lora(folder: Path, tmp_path: Path) -> None:
    for lora in (False, True):
        output = tmp_path / f"{lora}.gguf"
        merge(
            MergeConfig(
                run=str(folder / "delta.safetensors"),
                model=str(folder / "base.gguf"),
                output=str(output),
                lora=lora,
            )
        )
        values = facts(output)
        assert values["made_by_zo-gguf"]["base.file"] == "base.gguf"
        assert values["made_by_zo-gguf"]["base.sha256"] == GgufFile(folder / "base.gguf").sha256()
    assert values["kind"] == "LoRA adapter (GGUF)"
    assert values["rank"] == "6 to 6"


def test_anything_else_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ZoError, match="is not a file"):
        facts(tmp_path / "none")
    with pytest.raises(ZoError, match="not a run folder"):
        facts(tmp_path)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ZoError, match="info knows only these"):
        facts(tmp_path / "x.txt")
    for name in ("base.gguf", "mask.safetensors", "delta.safetensors", "trajectory.bin"):
        whole = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    for name in ("base.gguf", "mask.safetensors", "delta.safetensors"):
        with pytest.raises(ZoError):
            facts(tmp_path / name)


def test_env() -> None:
    result = env(EnvConfig())
    values = json.loads(result.render(as_json=True))
    assert values["packages"]["llama-cpp-python"] == "0.3.36"
    assert values["libzo"].startswith("built for llama-cpp-python 0.3.36")
    assert any("(CPU" in device for device in values["devices"])
    assert "GPU" in result.render()
    if not any("(GPU" in device for device in values["devices"]):
        assert "ill not be used" in values["GPU"][0]


@pytest.mark.parametrize(
    ("names", "offloads", "kernels", "n_usable", "words"),
    [
        (["CUDA0", "CUDA1"], True, "CUDA", 2, ["A and B can be used", "run on the GPU (CUDA"]),
        (["CUDA0"], True, "CUDA", 0, ["can be used", "driver is older", "LoRA", "copies"]),
        (["CUDA0"], True, "", 0, ["can be used", "no kernels", "LoRA", "copies", "CUDA toolkit"]),
        (
            ["CUDA0", "Vulkan0"],
            True,
            "CUDA",
            1,
            ["can be used", "no kernels", "LoRA", "copies", "CUDA toolkit"],
        ),
        (["Vulkan0"], True, "CUDA", 1, ["can be used", "no kernels", "LoRA", "copies"]),
        ([], True, "CUDA", 1, ["finds none"]),
        ([], False, "", 0, ["CPU only", "NVIDIA", "-DGGML_CUDA=on", "zo-gguf"]),
    ],
)
def test_gpu_in_words(
    names: list[str], offloads: bool, kernels: str, n_usable: int, words: list[str]
) -> None:
    devices = [Device("CPU", "cores", "CPU", 0)]
    devices += [Device(name, "AB"[i], "GPU", 1) for i, name in enumerate(names)]
    lines = gpu_in_words(devices, offloads, kernels, n_usable, "0.3.36")
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line
        assert len(line) < 160  # longer ones are cut


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(folder / "mask.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "mask"
    assert cli.main(["env"]) == 0
    assert "llama-cpp-python" in capsys.readouterr().out
    assert cli.main(["info", str(folder / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
