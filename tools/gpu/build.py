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

from tools.gpu import cuda
from tools.setup import basics, engine
from tools.setup.basics import SetupError, pinned, say
from tools.setup.venv import Venv

KIT = basics.ROOT / "gpu-kit"
VENV = Venv(basics.ROOT / ".venv-gpu")

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
    pins = basics.digest([basics.ROOT / "pyproject.toml", basics.CONSTRAINTS], sys.version)
    settings = [*CMAKE_ARGS, user_cmake_args(), *engine.compiler_flags().values()]
    compiled = basics.digest([], pins, toolkit.version, *sorted(gpus), *settings)
    library = basics.digest(basics.native_sources(), compiled)
    hints: list[str] = []
    if VENV.read_stamp("engine") != compiled:  # now, for what it may find missing
        hints = cuda.cmake_hints(toolkit, site_packages())
    make_venv()
    if VENV.read_stamp("packages") != pins:
        install_packages()
        VENV.write_stamp("packages", pins)
    environment = build_environment(toolkit)
    if VENV.read_stamp("engine") != compiled:
        build_engine(environment, hints)
        VENV.write_stamp("engine", compiled)
    if VENV.read_stamp("libzo") != library:
        options = ["--no-deps", "--no-build-isolation", *build_folder("libzo")]
        for define in ("ZO_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=native"):
            options += ["--config-settings", f"cmake.define.{define}"]
        options += ["--editable", str(basics.ROOT)]
        title = "libzo compiled with CUDA, and zo-gguf"
        VENV.pip(title, "install", *options, environment=environment)
        VENV.write_stamp("libzo", library)
    say(f"{VENV.folder.name} is up to date")


def make_venv() -> None:
    """A virtual environment over the packages of the Python that runs this."""
    if VENV.runs():
        return
    options = ["--system-site-packages"]
    if find_spec("pip") is not None:  # which the new environment sees
        options.append("--without-pip")
    VENV.make(*options)
    # "System" means the Python below a virtual environment: show the environment's packages too.
    (folder,) = VENV.folder.glob("lib/python*/site-packages")
    lines = [str(path) for path in site_packages()]
    (folder / "zo-parent.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def site_packages() -> list[Path]:
    """Folders from which the Python that runs this takes packages."""
    kinds = {"site-packages", "dist-packages"}
    return [Path(path) for path in sys.path if Path(path).name in kinds and os.path.isdir(path)]


def requirements() -> list[str]:
    """Everything that the stages need, such as "numpy>=1.26", llama-cpp-python excepted."""
    wanted = [*basics.requirements(["export"]), *INDIRECT]
    tools = {"scikit-build-core", "cmake", "ninja", "pytest"}
    return wanted + [line for line in basics.requirements(["dev"]) if name_of(line) in tools]


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
        [str(VENV.python), "-c", _VERSIONS, *wanted], capture_output=True, text=True, check=True
    )
    there = json.loads(answer.stdout)
    found = {name: v for name, v in there.items() if satisfies(v, wanted[name])}
    found |= {name: path for name in PROGRAMS - set(found) if (path := shutil.which(name))}
    say("here already: " + ", ".join(f"{name} {found[name]}" for name in sorted(found)))
    missing = sorted(set(wanted) - set(found))
    wheels = {name_of(path.name.split("-")[0]) for path in KIT.glob("wheels/*.whl")}
    from_kit = [pinned(name) for name in missing if name in wheels]
    if from_kit:
        options = ["--no-deps", "--no-index", "--find-links", str(KIT / "wheels"), *from_kit]
        VENV.pip(f"packages of the kit: {', '.join(from_kit)}", "install", *options)
    for name in (name for name in missing if name not in wheels):
        try:
            fetch(name, list(found))
        except SetupError as error:
            sentence = missing_sentence(name, wanted[name])
            if name not in OPTIONAL:
                raise MissingError(sentence) from error
            say(f"{sentence} What needs it will say so.")


def fetch(name: str, present: list[str]) -> None:
    """Install a package and what it requires from pip's index, leaving what the system has."""
    pins = basics.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    constraints = VENV.folder / "zo-constraints.txt"
    kept = [line for line in pins if "==" in line and name_of(line) not in present]
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    options = ["--retries", "1", "--constraint", str(constraints), pinned(name)]
    VENV.pip(name, "install", *options)


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
    jobs = int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", jobs))
    changes = {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "CMAKE_GENERATOR": "Ninja"}
    return changes | {"CUDACXX": str(toolkit.nvcc)} | engine.compiler_flags()


def build_engine(environment: dict[str, str], hints: list[str]) -> None:
    """Compile llama-cpp-python with CUDA, and see that it finds the GPU."""
    source = engine_source()
    given = shlex.join([*CMAKE_ARGS, *hints]) + " " + user_cmake_args()
    wheels = VENV.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", *build_folder("engine")]
    options += ["--wheel-dir", str(wheels), str(source)]
    title = f"{basics.ENGINE} with CUDA (compiled once, some minutes; stopped, it goes on)"
    VENV.pip(title, "wheel", *options, environment=environment | {"CMAKE_ARGS": given})
    (wheel,) = wheels.glob("*.whl")
    options = ["--no-deps", "--force-reinstall", "--no-index", str(wheel)]
    VENV.pip(f"{basics.ENGINE}, the wheel", "install", *options)
    command = [str(VENV.python), "-c", _OFFLOADS]
    tried = subprocess.run(command, cwd=VENV.folder, capture_output=True, text=True, check=False)
    if tried.returncode:
        said = tried.stderr.strip().splitlines()[-1:]
        raise SetupError(
            f"llama-cpp-python was built, but finds no GPU ({''.join(said) or 'no reason given'}); "
            "see that driver and CUDA toolkit are of versions that go together, delete "
            f"{VENV.folder} and run this again."
        )


def engine_source() -> Path:
    """The kit's sources of llama-cpp-python or, without a kit, those from pip's index."""
    if (KIT / "engine").is_dir():
        return KIT / "engine"
    folder = VENV.folder / "engine-source"  # kept, since compiling goes on only in the same place
    if not folder.is_dir():
        unpacked = VENV.folder / "unpacked"
        with tarfile.open(engine.source_archive(VENV)) as tar:
            tar.extractall(unpacked, filter="data")
        next(unpacked.iterdir()).rename(folder)
    return folder


def user_cmake_args() -> str:
    """$CMAKE_ARGS, which comes last and so wins."""
    return os.environ.get("CMAKE_ARGS", "")


def build_folder(name: str) -> list[str]:
    """pip options by which compiling goes on where it was stopped."""
    return ["--config-settings", f"build-dir={VENV.folder / 'build' / name}"]
