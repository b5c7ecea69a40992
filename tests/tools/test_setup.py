"""dev.py's set-up: what is installed, what is done again, and what is said where it cannot be."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.stand_in_venv import use_repository
from tools import dev
from tools.gpu import kit
from tools.setup import basics, engine, preflight
from tools.setup.basics import ENGINE, SetupError, pinned
from tools.setup.venv import HINTS, Venv, explain
from zo_gguf.errors import ZoError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that dev.py takes for the repository, with a pip that only takes notes."""
    use_repository(tmp_path, monkeypatch)
    monkeypatch.setattr(preflight, "check", lambda folder: None)
    monkeypatch.setattr(engine, "wheel", lambda venv: Path("engine.whl"))
    return tmp_path


class TestSteps:
    def steps(self) -> list[str]:
        """The last argument of each call of pip since the last time."""
        last = sorted(call[-1] for call in dev.VENV.calls)
        dev.VENV.calls.clear()
        return last

    def test_second_call_installs_nothing(self, repository: Path) -> None:
        dev.setup()
        last = [dev.BUILD_TOOLS[-1], basics.requirements(dev.EXTRAS)[-1], "engine.whl"]
        assert dev.VENV.calls[0][-1] == last[0]
        assert dev.VENV.calls[-1][-1] == str(repository)
        assert self.steps() == sorted([*last, str(repository)])
        dev.setup()
        assert self.steps() == []

    def test_native_change_builds_only_libzo(self, repository: Path) -> None:
        dev.setup()
        self.steps()
        (repository / "native" / "a.cu").write_text("int b;\n")
        dev.setup()
        assert self.steps() == [str(repository)]

    @pytest.mark.parametrize("change", ["pin", "compiler", "venv"])
    def test_other_versions_install_everything(
        self, change: str, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dev.setup()
        self.steps()
        if change == "pin":
            with basics.CONSTRAINTS.open("a") as file:
                file.write("another==1.0\n")
        elif change == "compiler":
            monkeypatch.setenv("CXXFLAGS", "-O1")
        else:
            shutil.rmtree(repository / ".venv")
        dev.setup()
        assert len(self.steps()) == 4

    @pytest.mark.parametrize("step", ["engine.whl", "libzo, compiled, and zo-gguf"])
    def test_failed_step_is_done_again(self, step: str, repository: Path) -> None:
        dev.VENV.fails.add(step)
        for _ in range(2):
            with pytest.raises(SetupError, match="no network"):
                dev.setup()
        self.steps()
        dev.VENV.fails.clear()
        dev.setup()
        assert str(repository) in self.steps()

    def test_failure_beside_the_compiler_is_not_lost(self, repository: Path) -> None:
        dev.VENV.fails.add("torch and the other packages")
        with pytest.raises(SetupError, match="torch and the other packages"):
            dev.setup()

    def test_one_kind_of_gpu_is_compiled_for(
        self, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for gpus, wanted in (([], "80-real"), (["GPU X"], "native")):
            monkeypatch.setattr(dev.cuda, "output_of", lambda *_, gpus=gpus: "\n".join(gpus))
            monkeypatch.setattr(dev.cuda, "find_smi", lambda: "nvidia-smi")
            dev.setup()
            assert dev.VENV.environments[-1] == {"CUDAARCHS": wanted}


class TestCommands:
    def test_unknown_command_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["dev.py", "instal"])
        assert dev.main() == 2
        assert "dev.py setup" in capsys.readouterr().out

    def test_starts_anywhere_with_the_standard_library_alone(self, tmp_path: Path) -> None:
        """-S and -I: no site-packages, nothing of the caller's."""
        command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "dev.py"), "help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "dev.py setup" in done.stdout


class TestPreflight:
    """Each check passes here, and says what to do where something is missing."""

    def test_all_is_well_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "NEEDED_DISK", 1)
        preflight.check(tmp_path)

    def test_old_python(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        monkeypatch.setattr("sys.argv", ["dev.py", "setup"])
        monkeypatch.setattr(preflight, "OLDEST_PYTHON", (99, 1))
        assert dev.main() == 1
        assert "needs Python 99.1 or newer" in capsys.readouterr().err

    def test_python_without_venv(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "find_spec", lambda name: None)
        with pytest.raises(SetupError, match=r"install python3\.\d+-venv"):
            preflight.check_python()

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "NEEDED_DISK", 1 << 60)
        with pytest.raises(SetupError, match=r"GB free and the set-up needs 1152921504\.6"):
            preflight.check_disk(tmp_path)

    def test_closed_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SetupError, match="Nothing can be written to"):
            preflight.check_disk(tmp_path / "missing")

    @pytest.mark.parametrize("variable", ["CC", "CXX"])
    def test_no_compiler(
        self, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, "no-such-compiler -m64")
        with pytest.raises(SetupError, match=f"{variable}=no-such-compiler -m64 not found"):
            preflight.check_compilers()
        monkeypatch.delenv(variable)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SetupError, match="There is no C"):
            preflight.check_compilers()

    def test_broken_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        with pytest.raises(SetupError, match=r"does not compile C \(no headers\)"):
            preflight.check_compilers()


class TestFailures:
    @pytest.mark.parametrize(
        ("said", "advice"),
        [
            ("ERROR: [Errno 28] No space left on device", "Free some disk space"),
            ("g++: fatal error: Killed signal terminated program cc1plus", "PARALLEL_LEVEL=1"),
            ("ERROR: Could not find a version that satisfies x==1", "package index"),
            ("CMake Error: something else", "Fix the cause"),
        ],
    )
    def test_shows_the_error_and_what_to_do(self, said: str, advice: str, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text(f"Collecting x\n{said}\n" + "noise\n" * 50)
        error = explain("torch", log)
        assert said in str(error)
        assert advice in str(error)
        assert "noise" not in str(error)
        assert error.is_known == any(hint in str(error) for hint in HINTS.values())

    def test_pip_that_fails_is_explained(self, tmp_path: Path) -> None:
        venv = Venv(tmp_path / "venv")
        venv.make("--without-pip")
        with pytest.raises(SetupError, match="No module named pip"):
            venv.install("build tools", "nothing")
        assert (tmp_path / "venv" / "zo-build.log").is_file()

    def test_broken_environment_is_made_anew(self, tmp_path: Path, capsys) -> None:
        venv = Venv(tmp_path / "venv")
        venv.make("--without-pip")
        assert venv.runs()
        os.truncate(venv.folder / "pyvenv.cfg", 0)
        venv.python.unlink()
        assert not venv.runs()
        venv.make("--without-pip")
        assert venv.runs()
        assert "does not work any more" in capsys.readouterr().err


def fake_wheel(file: Path, says: str) -> Path:
    """A wheel whose libllama, compiled here, says `says` of itself."""
    source = file.with_suffix(".c")
    source.write_text(f'const char * llama_print_system_info(void) {{ return "{says}"; }}\n')
    library = file.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(library, "llama_cpp/lib/libllama.so")
        archive.writestr("llama_cpp/__init__.py", "")
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in library is one for Linux")
class TestEngine:
    """Which llama-cpp-python is installed, and how it is compiled."""

    @pytest.fixture(autouse=True)
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A CPU with AMX, empty caches, no settings of the user's."""
        use_repository(tmp_path, monkeypatch)
        dev.VENV.make()
        (tmp_path / "cpuinfo").write_text("flags : fpu amx_tile amx_int8 avx2\n")
        monkeypatch.setattr(engine, "_CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(engine, "_cached_by_pip", lambda venv: [])
        for name in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS"):
            monkeypatch.delenv(name, raising=False)
        archive = basics.cache_folder() / f"{engine._file_name()}.tar.gz"
        archive.parent.mkdir(parents=True)
        archive.touch()

    def compiles_to(self, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have pip make such a wheel."""
        made = fake_wheel(folder / "engine.whl", says)

        def pip(
            self: Venv, what: str, *arguments: str, environment: dict[str, str] | None = None
        ) -> None:
            self.calls.append([*arguments])
            self.environments.append(environment or {})
            if "CMAKE_ARGS" in self.fails and "CMAKE_ARGS" in (environment or {}):
                raise SetupError("does not compile so", is_known=False)
            shutil.copy(made, arguments[arguments.index("--wheel-dir") + 1])

        monkeypatch.setattr(type(dev.VENV), "pip", pip)

    def test_compiled_once_without_amx(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.compiles_to("CPU : AVX2 = 1 |", tmp_path, monkeypatch)
        first = engine.wheel(dev.VENV)
        (changes,) = dev.VENV.environments
        assert changes["CFLAGS"] == changes["CXXFLAGS"] == "-mno-amx-int8"
        assert "-DLLAVA_BUILD=OFF" in changes["CMAKE_ARGS"]
        assert "--no-cache-dir" in dev.VENV.calls[0]
        assert engine.wheel(dev.VENV) == first
        assert len(dev.VENV.calls) == 1
        monkeypatch.setenv("CXXFLAGS", "-O1")  # another engine
        assert engine.wheel(dev.VENV) != first
        assert dev.VENV.environments[-1]["CXXFLAGS"] == "-O1 -mno-amx-int8"

    def test_other_cpus_keep_their_flags(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cpuinfo").write_text("flags : fpu avx2\n")
        self.compiles_to("CPU : AVX2 = 1 |", tmp_path, monkeypatch)
        engine.wheel(dev.VENV)
        assert set(dev.VENV.environments[0]) == {"CMAKE_ARGS"}

    def test_quick_way_that_fails_gives_way_to_the_usual_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        self.compiles_to("CPU : AVX2 = 1 |", tmp_path, monkeypatch)
        dev.VENV.fails.add("CMAKE_ARGS")
        assert engine.wheel(dev.VENV).is_file()
        assert len(dev.VENV.calls) == 2
        assert "as it comes" in capsys.readouterr().err

    def test_known_cause_is_not_tried_again(self) -> None:
        dev.VENV.fails.add("--no-cache-dir")  # the stand-in's failures are known ones
        with pytest.raises(SetupError, match="no network"):
            engine.wheel(dev.VENV)
        assert len(dev.VENV.calls) == 1

    @pytest.mark.parametrize(
        ("says", "is_taken"),
        [("CPU : AVX2 = 1 |", True), ("CPU : AVX2 = 1 | AMX_INT8 = 1 |", False)],
    )
    def test_wheel_of_pips_cache_is_taken_where_it_runs(
        self, says: str, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cached = fake_wheel(tmp_path / "cached.whl", says)
        monkeypatch.setattr(engine, "_cached_by_pip", lambda venv: [cached])
        self.compiles_to("CPU : AVX2 = 1 |", tmp_path, monkeypatch)
        assert (engine.wheel(dev.VENV) == cached) == is_taken
        assert cached.is_file()

    def test_engine_with_amx_is_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.compiles_to("CPU : AMX_INT8 = 1 |", tmp_path, monkeypatch)
        with pytest.raises(SetupError, match="does not run here"):
            engine.wheel(dev.VENV)
        assert not list(basics.cache_folder().rglob("*.whl"))

    def test_damaged_wheel_does_not_run(self, tmp_path: Path) -> None:
        file = tmp_path / "damaged.whl"
        for data in (b"", b"PK no archive"):
            file.write_bytes(data)
            assert not engine.runs(file)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("llama_cpp/lib/libllama.so", "no library")
        assert not engine.runs(file)

    def test_cache_of_pip_is_asked_for_the_pinned_release(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        asked: list[list[str]] = []

        def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            said = "/cache/llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl\nNo more.\n"
            return subprocess.CompletedProcess(command, 0, stdout=said)

        monkeypatch.setattr(engine.subprocess, "run", pip)
        monkeypatch.delenv("CMAKE_ARGS", raising=False)
        (found,) = engine._cached_by_pip(Venv(Path("venv")))
        assert found.name.endswith(".whl")
        assert asked[0][-1].replace("_", "-") == pinned(ENGINE).replace("==", "-").replace("_", "-")


@pytest.mark.slow
def test_real_sources_configure_in_the_quick_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out is left out, and libllama's own files are compiled together."""
    try:
        archive = kit.find_archive(tmp_path)
    except ZoError as error:
        pytest.skip(str(error))
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    command = ["cmake", "-G", "Ninja", "-S", str(tmp_path / engine._file_name())]
    command += ["-B", str(tmp_path / "build"), "-DCMAKE_BUILD_TYPE=Release"]
    for quick in (True, False):
        shutil.rmtree(tmp_path / "build", ignore_errors=True)
        settings = shlex.split(engine.quick_settings()) if quick else []
        subprocess.run([*command, *settings], check=True, capture_output=True)
        rules = (tmp_path / "build" / "build.ninja").read_text()
        compiled = set(re.findall(r"^build (\S+\.o):", rules, flags=re.MULTILINE))
        assert any("ggml-cpu/ops.cpp" in name for name in compiled)
        for part in ("common/", "mtmd.cpp"):
            assert quick != any(part in name for name in compiled), part
        alone = any(name.endswith("llama.dir/llama-context.cpp.o") for name in compiled)
        assert alone == (not quick or (os.cpu_count() or 1) > 8)


class TestRooms:
    """tools/ as its README shows it, without circles of imports."""

    def imports(self, file: Path) -> set[str]:
        """Names below tools/ that a file imports, inside functions too."""
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tools":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
                found.add(str(node.module))
        return found

    def test_imports_make_no_circle(self) -> None:
        modules = {
            ".".join(file.relative_to(ROOT).with_suffix("").parts): file
            for file in (ROOT / "tools").rglob("*.py")
        }
        uses = {name: self.imports(file) & set(modules) for name, file in modules.items()}
        assert uses["tools.dev"]
        assert list(TopologicalSorter(uses).static_order())  # raises CycleError

    def test_old_python_reads_what_tells_it_so(self) -> None:
        files = [ROOT / "tools" / name for name in ("dev.py", "gpu/cuda.py", "setup/__init__.py")]
        for file in [*files, *(ROOT / "tools" / "setup").glob("*.py")]:
            source = file.read_text(encoding="utf-8")
            ast.parse(source, feature_version=(3, 8))
            assert "import annotations" in source or file.name == "__init__.py"

    def test_set_up_needs_nothing_else(self) -> None:
        for file in (ROOT / "tools" / "setup").glob("*.py"):
            assert all(name.startswith("tools.setup") for name in self.imports(file)), file

    def test_readme_names_every_entry(self) -> None:
        text = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
        hidden = {"__init__.py", "__pycache__", "README.md"}
        entries = {entry.name for entry in (ROOT / "tools").iterdir()} - hidden
        table = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
        named = set(re.findall(r"`([\w.]+)/?`", " ".join(table)))
        assert entries == named
        assert len(entries) + 2 <= 14
