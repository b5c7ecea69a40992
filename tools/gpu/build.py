"""The stage `build` of `dev.py gpu`: .venv-gpu, with llama.cpp and libzo compiled for CUDA.

It is a virtual environment over the Python that runs this and sees all of its packages. What is
there in a version that will do is used; the rest comes from a kit made by gpu/kit.py where one
is unpacked over the checkout, else from pip's index. Compiling that was stopped goes on.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

from tools import dev
from tools.gpu import cuda

KIT = dev.ROOT / "gpu-kit"
VENV = dev.ROOT / ".venv-gpu"
PYTHON = VENV / "bin" / "python"

# Not in any kit, for their size; only what needs them says so where they are missing.
TOO_LARGE = {"numpy", "cmake", "matplotlib", "scikit-learn", "torch", "transformers"}
OPTIONAL = {"matplotlib", "scikit-learn", "torch", "transformers", "sentencepiece", "protobuf"}
# What our requirements require in turn: a kit is installed without asking pip for that.
INDIRECT = ["pathspec>=1.0", "packaging>=24", "typing-extensions>=4.5", "diskcache>=5.6.1"]
INDIRECT += ["MarkupSafe>=2.0", "iniconfig>=2", "pluggy>=1.6", "Pygments>=2.15"]
PROGRAMS = {"cmake", "ninja"}  # also good where they are on the PATH

# Code for this GPU alone, one kind of KV cache, no multi-GPU library, nothing for images.
CMAKE_ARGS = ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native", "-DGGML_NATIVE=ON"]
CMAKE_ARGS += ["-DGGML_CUDA_FA_QUANTS=f16-f16", "-DGGML_CUDA_NCCL=OFF", "-DLLAMA_OPENSSL=OFF"]
CMAKE_ARGS += ["-DLLAVA_BUILD=OFF"]
_MEMORY_PER_JOB = 3 << 30  # bytes; nvcc takes up to this much for a file

# Run by .venv-gpu's Python: which of the distributions there are, in which versions.
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_OFFLOADS = "import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())"


class MissingError(Exception):
    """A package that is needed is neither here, nor in the kit, nor to be had by pip."""


def build(gpus: list[str], toolkit: cuda.Toolkit) -> None:
    """Bring .venv-gpu up to date; does nothing where the stamps say that it is."""
    pins = dev.digest([dev.ROOT / "pyproject.toml", dev.CONSTRAINTS], sys.version)
    engine = dev.digest([], pins, toolkit.version, *sorted(gpus), *CMAKE_ARGS, user_cmake_args())
    native = sorted(path for path in (dev.ROOT / "native").rglob("*") if path.is_file())
    library = dev.digest([dev.ROOT / "CMakeLists.txt", *native], engine)
    hints: list[str] = []
    if read_stamp("engine") != engine:  # now, for what it may find missing
        hints = cuda.cmake_hints(toolkit, site_packages())
    make_venv()
    if read_stamp("packages") != pins:
        install_packages()
        write_stamp("packages", pins)
    environment = build_environment(toolkit)
    if read_stamp("engine") != engine:
        build_engine(environment, hints)
        write_stamp("engine", engine)
    if read_stamp("libzo") != library:
        options = ["--no-deps", "--no-build-isolation", *build_folder("libzo")]
        for define in ("ZO_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=native"):
            options += ["--config-settings", f"cmake.define.{define}"]
        options += ["--editable", str(dev.ROOT)]
        pip("zo-gguf, libzo compiled with CUDA", ["install", *options], environment)
        write_stamp("libzo", library)
    dev.say(f"{VENV.name} is up to date")


def make_venv() -> None:
    """A virtual environment over the packages of the Python that runs this."""
    if dev.runs(PYTHON):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    dev.say(f"making {VENV}")
    command = [sys.executable, "-m", "venv", "--system-site-packages", str(VENV)]
    if find_spec("pip") is not None:  # which the new environment sees
        command.append("--without-pip")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise dev.SetupError(f"Python could not make {VENV}:\n{done.stdout}{done.stderr}")
    # "System" means the Python below a virtual environment: show the environment's packages too.
    (folder,) = VENV.glob("lib/python*/site-packages")
    lines = [str(path) for path in site_packages()]
    (folder / "zo-parent.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def site_packages() -> list[Path]:
    """Folders from which the Python that runs this takes packages."""
    kinds = {"site-packages", "dist-packages"}
    return [Path(path) for path in sys.path if Path(path).name in kinds and os.path.isdir(path)]


def requirements() -> list[str]:
    """Everything that the stages need, such as "numpy>=1.26", llama-cpp-python excepted."""
    import tomllib

    project = tomllib.loads((dev.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["export"], *INDIRECT]
    tools = {"scikit-build-core", "cmake", "ninja", "pytest"}
    wanted += [line for line in extras["dev"] if name_of(line) in tools]
    return [line for line in wanted if name_of(line) != dev.ENGINE]


def name_of(requirement: str) -> str:
    """Normalized name of a requirement or of a wheel's file name up to its version."""
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version is one that a requirement of the form name>=version, or name, allows."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]

    _, at_least, oldest = requirement.partition(">=")
    return not at_least or numbers(version) >= numbers(oldest)


def install_packages() -> None:
    """Take what the system has where its version will do, and the rest from the kit or from pip.

    Raises:
        MissingError: Something that every stage needs cannot be had.
    """
    wanted = {name_of(line): line for line in requirements()}
    answer = subprocess.run(
        [str(PYTHON), "-c", _VERSIONS, *wanted], capture_output=True, text=True, check=True
    )
    there = json.loads(answer.stdout)
    found = {name: v for name, v in there.items() if satisfies(v, wanted[name])}
    found |= {name: path for name in PROGRAMS - set(found) if (path := shutil.which(name))}
    dev.say("here already: " + ", ".join(f"{name} {found[name]}" for name in sorted(found)))
    missing = sorted(set(wanted) - set(found))
    wheels = {name_of(path.name.split("-")[0]) for path in KIT.glob("wheels/*.whl")}
    from_kit = [dev.pinned(name) for name in missing if name in wheels]
    if from_kit:
        options = ["--no-deps", "--no-index", "--find-links", str(KIT / "wheels"), *from_kit]
        pip(f"from the kit: {', '.join(from_kit)}", ["install", *options])
    for name in (name for name in missing if name not in wheels):
        try:
            fetch(name, list(found))
        except dev.SetupError as error:
            sentence = missing_sentence(name, wanted[name])
            if name not in OPTIONAL:
                raise MissingError(sentence) from error
            dev.say(f"{sentence} What needs it will say so.")


def fetch(name: str, present: list[str]) -> None:
    """Install a package and what it requires from pip's index, leaving what the system has."""
    pins = dev.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    constraints = VENV / "zo-constraints.txt"
    kept = [line for line in pins if "==" in line and name_of(line) not in present]
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    options = ["--retries", "1", "--constraint", str(constraints), dev.pinned(name)]
    pip(name, ["install", *options])


def missing_sentence(name: str, requirement: str) -> str:
    """What to do about a package that is not to be had."""
    what = f"{requirement} is not installed for {sys.executable}"
    where = "in the kit" if KIT.is_dir() else "to be had by pip"
    how = f"or put {name} on the PATH" if name in PROGRAMS else "where there is a network"
    return f"{what} and not {where}; run {Path(sys.executable).name} -m pip install {name}, {how}."


def build_environment(toolkit: cuda.Toolkit) -> dict[str, str]:
    """Environment of compilers: Ninja, as many jobs as cores and memory allow, this nvcc."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(len(os.sched_getaffinity(0)), memory // _MEMORY_PER_JOB))
    environment = dict(os.environ, PATH=f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(jobs))
    environment |= dev.engine_environment()
    return environment | {"CMAKE_GENERATOR": "Ninja", "CUDACXX": str(toolkit.nvcc)}


def build_engine(environment: dict[str, str], hints: list[str]) -> None:
    """Compile llama-cpp-python with CUDA, and see that it finds the GPU."""
    source = engine_source()
    given = shlex.join([*CMAKE_ARGS, *hints]) + " " + user_cmake_args()
    wheels = VENV / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", *build_folder("engine")]
    options += ["--wheel-dir", str(wheels), str(source)]
    title = f"{dev.ENGINE} with CUDA (compiled once, some minutes; stopped, it goes on)"
    pip(title, ["wheel", *options], environment | {"CMAKE_ARGS": given})
    (wheel,) = wheels.glob("*.whl")
    pip("the engine", ["install", "--no-deps", "--force-reinstall", "--no-index", str(wheel)])
    command = [str(PYTHON), "-c", _OFFLOADS]
    tried = subprocess.run(command, cwd=VENV, capture_output=True, text=True, check=False)
    if tried.returncode:
        said = tried.stderr.strip().splitlines()[-1:]
        raise dev.SetupError(
            f"llama-cpp-python was built, but finds no GPU ({''.join(said) or 'no reason given'}); "
            "see that driver and CUDA toolkit are of versions that go together, delete "
            f"{VENV} and run this again."
        )


def engine_source() -> Path:
    """The kit's sources of llama-cpp-python or, without a kit, those from pip's index."""
    if (KIT / "engine").is_dir():
        return KIT / "engine"
    folder = VENV / "engine-source"  # kept, since compiling goes on only in the same place
    if not folder.is_dir():
        options = ["--no-deps", "--no-build-isolation", "--no-binary", dev.ENGINE]
        options += ["--dest", str(VENV), dev.pinned(dev.ENGINE)]
        pip(f"(fetching) the sources of {dev.ENGINE}", ["download", *options])
        (archive,) = VENV.glob("llama_cpp_python-*.tar.gz")
        unpacked = VENV / "unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        next(unpacked.iterdir()).rename(folder)
    return folder


def user_cmake_args() -> str:
    """$CMAKE_ARGS, which comes last and so wins."""
    return os.environ.get("CMAKE_ARGS", "")


def build_folder(name: str) -> list[str]:
    """pip options by which compiling goes on where it was stopped."""
    return ["--config-settings", f"build-dir={VENV / 'build' / name}"]


def pip(what: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run pip in .venv-gpu; on failure show the lines of its log that matter."""
    dev.say(f"installing {what} ...")
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    log = VENV / "zo-setup.log"
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        raise dev.SetupError(dev.explain(what, log))


# --- stamps --------------------------------------------------------------------------------------


def read_stamp(name: str) -> str | None:
    """What `write_stamp` wrote, if anything."""
    file = VENV / "zo-stamps" / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def write_stamp(name: str, value: str) -> None:
    """Remember that a part is done, for these inputs."""
    file = VENV / "zo-stamps" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(value, encoding="utf-8")
