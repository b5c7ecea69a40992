"""The stage `build` of `dev.py gpu`: what it installs, from where, and nothing twice."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.stand_in_venv import use_repository
from tools.gpu import build as dev_gpu_build
from tools.gpu import cuda as dev_cuda
from tools.setup import basics
from tools.setup.venv import Venv

TOOLKIT = dev_cuda.Toolkit(Path("/cuda/bin/nvcc"), Path("/cuda"), "13.0")
GPUS = ["GPU X, 24000 MiB, 580.1, 9.0"]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A repository in a folder of its own, with a pip that only takes notes."""
    use_repository(tmp_path, monkeypatch)
    monkeypatch.setattr(dev_gpu_build, "make_venv", dev_gpu_build.VENV.make)
    noted: list[list[str]] = dev_gpu_build.VENV.calls
    return noted


class TestStages:
    @pytest.fixture(autouse=True)
    def engine(self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        """No engine is compiled, no toolkit looked at."""
        monkeypatch.setattr(dev_gpu_build, "install_packages", lambda: calls.append(["packages"]))
        monkeypatch.setattr(dev_gpu_build, "build_engine", lambda *_: calls.append(["engine"]))
        monkeypatch.setattr(dev_cuda, "cmake_hints", lambda *_: [])

    def build(self, calls: list[list[str]], gpus: list[str] = GPUS) -> list[str]:
        calls.clear()
        dev_gpu_build.build(gpus, TOOLKIT)
        return [call[0] for call in calls]

    def test_second_call_does_nothing(self, calls: list[list[str]]) -> None:
        assert self.build(calls) == ["packages", "engine", "install"]
        assert "cmake.define.ZO_CUDA=ON" in calls[-1]
        assert self.build(calls) == []

    def test_native_change_builds_only_libzo(self, calls: list[list[str]]) -> None:
        self.build(calls)
        (basics.ROOT / "native" / "a.cu").write_text("int b;\n")
        assert self.build(calls) == ["install"]

    def test_another_gpu_compiles_the_engine_anew(self, calls: list[list[str]]) -> None:
        self.build(calls)
        assert self.build(calls, ["GPU Y, 80000 MiB, 580.1, 9.0"]) == ["engine", "install"]

    def test_failed_part_is_done_again(
        self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: object) -> None:
            raise basics.SetupError("does not compile")

        with monkeypatch.context() as patched:
            patched.setattr(dev_gpu_build, "build_engine", fails)
            with pytest.raises(basics.SetupError):
                self.build(calls)
        assert self.build(calls) == ["engine", "install"]


class TestPackages:
    @pytest.fixture(autouse=True)
    def wanted(self, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        """pytest is here, gguf in too old a version, diskcache and torch are not."""
        lines = ["pytest>=8.3", "gguf>=999", "diskcache>=999", "torch>=999"]
        monkeypatch.setattr(dev_gpu_build, "requirements", lambda: lines)
        dev_gpu_build.VENV.make()
        (basics.ROOT / "gpu-kit" / "wheels").mkdir(parents=True)

    def test_what_lacks_comes_from_the_kit(self, calls: list[list[str]]) -> None:
        for name in ("gguf-0.19.0-py3-none-any.whl", "diskcache-5.6.3-py3-none-any.whl"):
            (basics.ROOT / "gpu-kit" / "wheels" / name).touch()
        dev_gpu_build.install_packages()
        from_kit, fetched = calls
        assert "--no-index" in from_kit
        assert from_kit[-2:] == [basics.pinned("diskcache"), basics.pinned("gguf")]
        assert fetched[-1] == basics.pinned("torch")
        kept = (dev_gpu_build.VENV.folder / "zo-constraints.txt").read_text()
        assert "pytest==" not in kept  # the system has it; another version would replace it
        assert "gguf==" in kept

    def test_what_is_not_to_be_had_is_said(self, calls: list[list[str]], capsys) -> None:
        (basics.ROOT / "gpu-kit" / "wheels" / "gguf-0.19.0-py3-none-any.whl").touch()

        dev_gpu_build.VENV.fails.add(basics.pinned("diskcache"))
        dev_gpu_build.VENV.fails.add(basics.pinned("torch"))
        with pytest.raises(dev_gpu_build.MissingError, match="diskcache>=999 is not installed"):
            dev_gpu_build.install_packages()
        dev_gpu_build.VENV.fails.remove(basics.pinned("diskcache"))
        dev_gpu_build.install_packages()
        assert "torch>=999 is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "requirement", "does"),
    [
        ("1.26.4", "numpy>=1.26", True),
        ("1.9.0", "numpy>=1.26", False),
        ("2.11.0+cu130", "torch>=2.4", True),
        ("4", "cmake>=3.26", True),
        ("0.1", "types-PyYAML", True),
    ],
)
def test_versions_are_compared_by_number(version: str, requirement: str, does: bool) -> None:
    assert dev_gpu_build.satisfies(version, requirement) is does


def test_every_requirement_is_pinned_and_plain() -> None:
    for line in dev_gpu_build.requirements():
        assert basics.pinned(dev_gpu_build.name_of(line))
        assert not set(line) & set("<~!,;["), f"satisfies() does not read {line}"


def test_environment_sees_the_packages_of_a_virtual_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev_gpu_build, "VENV", Venv(tmp_path / "venv"))
    dev_gpu_build.make_venv()
    code = "import numpy, pip, sys; print(sys.prefix)"
    python = str(tmp_path / "venv/bin/python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / "venv"), done.stderr
