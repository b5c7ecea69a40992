"""The way to a GPU: the kit for machines without network, and the stages of `dev.py gpu`."""

import io
import json
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path, PurePosixPath

import pytest

from tools import dev
from tools.gpu import cuda as dev_cuda
from tools.gpu import kit as pack_gpu_kit
from tools.gpu import run as dev_gpu
from tools.setup import basics
from tools.setup.venv import Venv
from zo_gguf.errors import ZoError
from zo_gguf.masks import convert

LLAMA = "vendor/llama.cpp"
NEEDED = [
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "llama_cpp/__init__.py",
    f"{LLAMA}/CMakeLists.txt",
    f"{LLAMA}/cmake/common.cmake",
    f"{LLAMA}/common/common.cpp",
    f"{LLAMA}/ggml/CMakeLists.txt",
    f"{LLAMA}/ggml/include/ggml-vulkan.h",  # CMake installs every header
    f"{LLAMA}/ggml/src/ggml.c",
    f"{LLAMA}/ggml/src/ggml-cpu/ops.cpp",
    f"{LLAMA}/ggml/src/ggml-cuda/CMakeLists.txt",
    f"{LLAMA}/ggml/src/ggml-cuda/template-instances/mmq.cu",
    f"{LLAMA}/src/llama.cpp",
    f"{LLAMA}/vendor/nlohmann/json.hpp",
]
UNNEEDED = [
    ".git/HEAD",
    "docs/index.md",
    "examples/chat.py",
    "tests/test_llama.py",
    f"{LLAMA}/docs/build.md",
    f"{LLAMA}/ggml/src/ggml-vulkan/ggml-vulkan.cpp",
    f"{LLAMA}/ggml/src/ggml-metal/ggml-metal.m",
    f"{LLAMA}/media/logo.png",
    f"{LLAMA}/models/vocab.gguf",
    f"{LLAMA}/tools/server/webui/index.html",
    f"{LLAMA}/vendor/miniaudio/miniaudio.h",
]
CONVERTER = [f"{LLAMA}/convert_hf_to_gguf.py", f"{LLAMA}/conversion/base.py"]


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive laid out like llama-cpp-python's, which convert.py takes for the real one."""
    path = tmp_path / convert.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name in NEEDED + UNNEEDED + CONVERTER:
            info = tarfile.TarInfo(f"llama_cpp_python-{convert.RELEASE}/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    monkeypatch.setattr(convert, "_SHA256", sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(pack_gpu_kit, "tracked_files", lambda: [Path("tools/dev.py")])
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A wheel of everything that belongs into a kit."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for pin in pack_gpu_kit.wheel_pins():
        name, _, version = pin.partition("==")
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_text("wheel")
    return folder


class TestKit:
    def test_holds_what_a_build_needs_and_no_more(
        self, tmp_path: Path, sdist: Path, wheels: Path
    ) -> None:
        kit = tmp_path / "kit.tar.xz"
        assert pack_gpu_kit.pack(kit, sdist, wheels) == []
        with tarfile.open(kit) as tar:
            tar.extractall(tmp_path / "out", filter="data")
        top = tmp_path / "out" / pack_gpu_kit.NAME
        assert (top / "tools/dev.py").read_bytes() == Path(dev.__file__).read_bytes()
        for name in NEEDED:
            assert (top / "gpu-kit/engine" / name).read_text() == name
        for name in UNNEEDED:
            assert not (top / "gpu-kit/engine" / name).exists(), name
        assert len(list((top / "gpu-kit/wheels").iterdir())) == len(pack_gpu_kit.wheel_pins())
        manifest = json.loads((top / "gpu-kit/manifest.json").read_text())
        assert manifest["engine"] == basics.pinned(basics.ENGINE)

    def test_converter_is_found_there_without_network(
        self, tmp_path: Path, sdist: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pack_gpu_kit.pack(tmp_path / "kit.tar.gz", sdist, wheels)
        with tarfile.open(tmp_path / "kit.tar.gz") as tar:
            tar.extractall(tmp_path / "out", filter="data")
        monkeypatch.setattr(dev_gpu, "KIT", tmp_path / "out" / pack_gpu_kit.NAME / "gpu-kit")
        monkeypatch.setenv("XDG_CACHE_HOME", dev_gpu.environment()["XDG_CACHE_HOME"])
        monkeypatch.setattr(convert, "download_archive", lambda scratch: pytest.fail("downloads"))
        assert convert.converter_script().read_text() == CONVERTER[0]

    def test_same_bytes_each_time(self, tmp_path: Path, sdist: Path, wheels: Path) -> None:
        for name in ("a.tar.xz", "b.tar.xz"):
            pack_gpu_kit.pack(tmp_path / name, sdist, wheels)
        assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()

    def test_another_archive_is_refused(self, tmp_path: Path, sdist: Path, wheels: Path) -> None:
        with sdist.open("ab") as file:
            file.write(b"\0")
        with pytest.raises(ZoError, match="has SHA-256"):
            pack_gpu_kit.pack(tmp_path / "kit.tar.xz", sdist, wheels)

    def test_too_large_is_refused_and_leaves_nothing(
        self, tmp_path: Path, sdist: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pack_gpu_kit, "LIMIT", 1000)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ZoError, match="leave out wheels"):
            pack_gpu_kit.pack(tmp_path / "kit.tar.xz", sdist, wheels)
        assert sorted(tmp_path.iterdir()) == before

    def test_lacking_wheels_are_named(self, tmp_path: Path, sdist: Path, wheels: Path) -> None:
        next(wheels.glob("gguf-*")).unlink()
        lacking = pack_gpu_kit.pack(tmp_path / "kit.tar.xz", sdist, wheels)
        assert lacking == [basics.pinned("gguf")]

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            (["--sdist", "nowhere.tar.gz"], "nowhere.tar.gz"),
            (["-o", "kit.zip"], ".tar.xz"),
        ],
    )
    def test_bad_arguments_are_refused(
        self, arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        monkeypatch.setattr("sys.argv", ["gpu/kit.py", *arguments])
        assert pack_gpu_kit.main() == 2
        assert word in capsys.readouterr().err

    def test_no_checkout_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(basics, "ROOT", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        with pytest.raises(ZoError, match="no git checkout"):
            pack_gpu_kit.tracked_files()

    @pytest.mark.slow
    def test_real_sources_still_configure(self, tmp_path: Path) -> None:
        try:
            archive = pack_gpu_kit.find_archive(tmp_path)
        except ZoError as error:
            pytest.skip(str(error))
        pack_gpu_kit.unpack_engine(archive, tmp_path / "engine")
        with tarfile.open(archive) as tar:
            names = [PurePosixPath(*PurePosixPath(name).parts[1:]) for name in tar.getnames()]
        kernels = [name for name in names if name.match("ggml-cuda/**/*.cu")]
        assert len(kernels) > 20
        assert all((tmp_path / "engine" / name).is_file() for name in kernels)
        bin_folder = Path(sys.executable).parent
        command = [str(bin_folder / "cmake"), "-G", "Ninja", "-S", str(tmp_path / "engine")]
        command += ["-B", str(tmp_path / "build"), "-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF"]
        command += [f"-DCMAKE_MAKE_PROGRAM={bin_folder / 'ninja'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def fake_program(path: Path, output: str) -> Path:
    """A program that prints `output`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing but a folder of programs on its PATH."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.setattr(dev_cuda, "_SMI", ())
    fake_program(tmp_path / "bin/nvidia-smi", "GPU X, 24000 MiB, 580.1, 9.0")
    return tmp_path


class TestMachine:
    @pytest.mark.parametrize("lack", ["nvidia-smi", "answer"])
    def test_no_gpu_is_one_sentence(self, machine: Path, lack: str, capsys) -> None:
        fake_program(machine / "bin/nvidia-smi", "")
        (machine / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        if lack == "nvidia-smi":
            (machine / "bin/nvidia-smi").unlink()
        assert dev_gpu.main(["build"]) == 2
        assert capsys.readouterr().err.startswith("dev.py: No NVIDIA GPU answers here")

    def test_no_compiler_is_one_sentence(
        self, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        monkeypatch.setattr(dev_cuda.shutil, "which", which_only(machine))
        monkeypatch.setattr(dev_gpu, "build", lambda *_: pytest.fail("builds"))
        assert dev_gpu.main([]) == 2
        assert "install NVIDIA's CUDA toolkit" in capsys.readouterr().err

    def test_old_compiler_is_refused(self, machine: Path) -> None:
        fake_program(machine / "bin/nvcc", "Cuda compilation tools, release 11.8, V11.8.89")
        with pytest.raises(dev_cuda.NoCudaError, match=r"CUDA 11\.8; install CUDA 12"):
            dev_cuda.find_toolkit()

    def test_unknown_stage_shows_the_stages(self, capsys) -> None:
        assert dev_gpu.main(["biuld"]) == 2
        assert "dev.py gpu build" in capsys.readouterr().out

    def test_cublas_of_a_python_package_is_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dev_cuda, "_SYSTEM_FOLDERS", ())
        toolkit = dev_cuda.Toolkit(tmp_path / "nvcc", tmp_path / "cuda", "13.0")
        with pytest.raises(dev_cuda.NoCudaError, match="cuBLAS 13 was found neither"):
            dev_cuda.cmake_hints(toolkit, [tmp_path])
        home = tmp_path / "nvidia/cu13"
        for name in ("lib/libcublas.so.13", "lib/libcublasLt.so.13", "include/cublas_v2.h"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).touch()
        hints = dev_cuda.cmake_hints(toolkit, [tmp_path])
        assert f"-DCUDA_cublas_LIBRARY={home / 'lib/libcublas.so.13'}" in hints
        assert "-DGGML_CUDA_NO_VMM=ON" in hints  # there is no libcuda either
        (tmp_path / "cuda/lib64/stubs").mkdir(parents=True)
        for name in ("libcublas.so", "stubs/libcuda.so"):
            (tmp_path / "cuda/lib64" / name).touch()
        assert dev_cuda.cmake_hints(toolkit, [tmp_path]) == []
        (tmp_path / "cuda/lib64/libcudart.so").touch()
        (hint,) = dev_cuda.cmake_hints(toolkit, [tmp_path])
        assert hint.endswith(f"-rpath,{tmp_path / 'cuda/lib64'}")


class TestCheck:
    @pytest.fixture(autouse=True)
    def repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One test file with the marker, and a pytest that says how it was called."""
        monkeypatch.setattr(dev_gpu, "ROOT", tmp_path)
        monkeypatch.setattr(dev_gpu, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(dev_gpu, "VENV", Venv(tmp_path))
        fake_program(tmp_path / "bin/python", "tests ran")
        texts = {"test_a.py": "pytest.mark.cuda", "test_b.py": "", "test_c.py": "f(device: int)"}
        for name, text in texts.items():
            (tmp_path / "tests").mkdir(exist_ok=True)
            (tmp_path / "tests" / name).write_text(text)

    def check(self, monkeypatch: pytest.MonkeyPatch, script: str) -> int:
        sanitizer = dev_gpu.ROOT / "compute-sanitizer"
        sanitizer.write_text(f"#!/bin/sh\n{script}\n")
        sanitizer.chmod(0o755)
        monkeypatch.setattr(dev_cuda, "find_sanitizer", lambda _: str(sanitizer))
        toolkit = dev_cuda.Toolkit(Path("nvcc"), Path("cuda"), "13.0")
        return dev_gpu.check([], toolkit, dev_gpu.RESULTS)

    def test_marked_files_run_under_both_tools(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.check(monkeypatch, 'echo "$@"') == 0
        for tool in ("memcheck", "racecheck"):
            called = (dev_gpu.RESULTS / f"{tool}.txt").read_text()
            assert f"--tool {tool}" in called
            assert "tests/test_a.py tests/test_c.py -k sanitize" in called
            assert "test_b" not in called

    @pytest.mark.parametrize(
        ("script", "code", "word"),
        [
            ("exit 86", 86, "found errors"),
            ("exit 5", 5, "found no test"),
            ("echo 'Error: Device not supported'; exit 1", 0, "cannot watch this device"),
        ],
    )
    def test_verdicts(
        self, script: str, code: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        assert self.check(monkeypatch, script) == code
        assert word in capsys.readouterr().err

    def test_no_marked_test_is_said(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        for name in ("test_a.py", "test_c.py"):
            (dev_gpu.ROOT / "tests" / name).write_text("")
        assert self.check(monkeypatch, "exit 0") == 2
        assert "no test is marked cuda" in capsys.readouterr().err


def which_only(machine: Path):
    def which(name: str) -> str | None:
        path = machine / "bin" / name
        return str(path) if path.is_file() and path.parent == machine / "bin" else None

    return which
