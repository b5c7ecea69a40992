"""Packs what `dev.py gpu` needs on a machine without network into one archive.

It holds the tracked files of this repository and, below gpu-kit/, the sources of the pinned
llama-cpp-python as far as a CUDA build reads them, llama.cpp's converter, and small wheels. Unpack
it anywhere, or over a checkout with --strip-components=1, and run `python3 tools/dev.py gpu`.

    .venv/bin/python -m tools.gpu.kit [-o zo-gguf-gpu-kit.tar.xz] [--sdist FILE] [--wheels DIR]
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from tools.gpu.build import TOO_LARGE, name_of, requirements
from tools.setup import basics
from zo_gguf.errors import ZoError
from zo_gguf.masks import convert

NAME = "zo-gguf-gpu-kit"
LIMIT = 40 << 20  # bytes
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17, 12, 5)]
PLATFORMS += [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]

# Of the archive of llama-cpp-python's sources: what CMake and the compilers read for a CUDA build.
ENGINE_FILES = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE.md", "PKG-INFO"}
LLAMA_CPP = PurePosixPath("vendor/llama.cpp")
LLAMA_CPP_PARTS = {"CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "src"}
BACKENDS = {"ggml-cpu", "ggml-cuda"}
# Headers for images and sound, which only the multimodal library includes.
UNREAD = {"miniaudio.h", "stb_image.h"}
_MTIME = 1_600_000_000  # of every file in the archive; before 1980 none could go into a wheel


def is_needed(path: PurePosixPath) -> bool:
    """Whether a CUDA build reads a file of llama-cpp-python's source archive.

    Args:
        path: Relative to the archive's top folder.
    """
    if path.name in UNREAD or ".." in path.parts:
        return False
    if not path.is_relative_to(LLAMA_CPP):
        return path.parts[0] == "llama_cpp" or str(path) in ENGINE_FILES
    inner = path.relative_to(LLAMA_CPP).parts
    if inner[:2] == ("ggml", "src") and len(inner) > 3:
        return inner[2] in BACKENDS
    return inner[0] in LLAMA_CPP_PARTS | {"vendor"}


def unpack_engine(archive: Path, folder: Path) -> None:
    """Extract what a CUDA build needs of llama-cpp-python's source archive.

    Raises:
        ZoError: The archive holds nothing of the kind.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            source = tar.extractfile(member) if member.isfile() and path.parts else None
            if source is None or not is_needed(path):
                continue
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())
    if not (folder / LLAMA_CPP / "ggml/src/ggml-cuda/CMakeLists.txt").is_file():
        raise ZoError(f"{archive.name!r} holds no CUDA sources; give another --sdist or delete it.")


def unpack_converter(archive: Path, cache: Path) -> None:
    """Put llama.cpp's converter where `zo_gguf.masks.convert` looks for it if `cache` is the cache.

    Raises:
        ZoError: The archive is not the pinned one.
    """
    kept = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        beside = convert.cache_folder() / archive.name
        beside.parent.mkdir(parents=True)
        beside.symlink_to(archive.resolve())
        convert.converter_script()
        beside.unlink()
    finally:
        if kept is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = kept


def find_archive(scratch: Path) -> Path:
    """llama-cpp-python's source archive from zo-gguf's cache, or fetched with pip.

    Raises:
        ZoError: It cannot be fetched.
    """
    cached = convert.cache_folder() / convert.ARCHIVE
    return cached if cached.is_file() else convert.download_archive(scratch)


def wheel_pins() -> list[str]:
    """The pinned requirements whose wheels are small enough."""
    names = {name_of(line) for line in requirements()} - TOO_LARGE
    return [basics.pinned(name) for name in sorted(names)]


def download_wheels(folder: Path) -> list[str]:
    """Fetch the wheels for each Python with pip; returns those that cannot be had, in words."""
    lacking = []
    for python in PYTHONS:
        if _download(folder, python, wheel_pins()):
            continue
        for pin in wheel_pins():  # one by one, to see which
            if not _download(folder, python, [pin]):
                lacking.append(f"{pin} for Python {python}")
    return lacking


def _download(folder: Path, python: str, pins: Sequence[str]) -> bool:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return subprocess.run([*command, *pins], capture_output=True, check=False).returncode == 0


def lacking_wheels(folder: Path) -> list[str]:
    """Pins of which a folder has no wheel at all."""
    there = {name_of(path.name.split("-")[0]) for path in folder.glob("*.whl")}
    return [pin for pin in wheel_pins() if name_of(pin) not in there]


def tracked_files() -> list[Path]:
    """The repository's own files, relative to its root, as git knows them.

    Raises:
        ZoError: This is no git checkout.
    """
    listed = _git("ls-files", "-z")
    if listed is None:
        raise ZoError(f"{basics.ROOT} is no git checkout; pack the kit in a clone.")
    files = [Path(name) for name in listed.split("\0") if name]
    return [file for file in files if (basics.ROOT / file).is_file()]


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(basics.ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def write_archive(target: Path, repository: Sequence[Path], parts: Path) -> None:
    """Write the kit: the repository's files, and `parts` as gpu-kit/. The same bytes each time.

    Raises:
        ZoError: It would be larger than the limit; nothing is left then.
    """
    files = [(basics.ROOT / file, file.as_posix()) for file in repository]
    files += [
        (file, f"gpu-kit/{file.relative_to(parts).as_posix()}")
        for file in parts.rglob("*")
        if file.is_file()
    ]
    kind: Literal["w:gz", "w:xz"] = "w:gz" if target.suffix == ".gz" else "w:xz"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kit.") as scratch:
        unfinished = Path(scratch) / target.name
        with tarfile.open(unfinished, kind) as tar:
            for source, name in sorted(files, key=lambda item: (Path(item[1]).suffix, item[1])):
                info = tarfile.TarInfo(f"{NAME}/{name}")
                info.mode = 0o755 if os.access(source, os.X_OK) else 0o644
                info.mtime = _MTIME
                data = source.read_bytes()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        size = unfinished.stat().st_size
        if size > LIMIT:
            raise ZoError(
                f"The kit would take {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f} MiB; "
                "leave out wheels (TOO_LARGE in tools/gpu/build.py) or engine files (is_needed "
                "in tools/gpu/kit.py)."
            )
        os.replace(unfinished, target)


def pack(target: Path, sdist: Path | None = None, wheels: Path | None = None) -> list[str]:
    """Make the kit.

    Args:
        target: Archive to write, .tar.xz or .tar.gz.
        sdist: llama-cpp-python's source archive; None fetches it with pip.
        wheels: A folder of wheels; None fetches them with pip.

    Returns:
        The wheels that the kit lacks, in words.

    Raises:
        ZoError: Something cannot be fetched, is not what is pinned, or is too large.
    """
    if not target.name.endswith((".tar.xz", ".tar.gz")):
        raise ZoError(f"The kit's name {target.name!r} must end in .tar.xz or .tar.gz.")
    repository = tracked_files()
    with tempfile.TemporaryDirectory() as scratch:
        parts, fetched = Path(scratch) / "parts", Path(scratch) / "fetched"
        fetched.mkdir()
        archive = sdist or find_archive(fetched)
        unpack_converter(archive, parts / "cache")
        unpack_engine(archive, parts / "engine")
        (parts / "wheels").mkdir()
        if wheels is None:
            lacking = download_wheels(parts / "wheels")
        else:
            lacking = lacking_wheels(wheels)
            for wheel in wheels.glob("*.whl"):
                shutil.copy(wheel, parts / "wheels")
        commit = (_git("describe", "--always", "--dirty", "--abbrev=7") or "unknown").strip()
        manifest = {"commit": commit, "engine": basics.pinned(basics.ENGINE), "lacking": lacking}
        (parts / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        write_archive(target, repository, parts)
    return lacking


def main() -> int:
    """Pack the kit; 2 and one sentence where that is not possible."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, default=Path(f"{NAME}.tar.xz"))
    parser.add_argument("--sdist", type=Path, help="llama-cpp-python's source archive")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, instead of fetching them")
    options = parser.parse_args()
    try:
        for given in filter(None, (options.sdist, options.wheels)):
            if not given.exists():
                raise ZoError(f"{str(given)!r} does not exist; check the path.")
        lacking = pack(options.output.absolute(), options.sdist, options.wheels)
    except (ZoError, basics.SetupError) as error:
        print(f"tools.gpu.kit: {error}", file=sys.stderr)
        return 2
    for wheel in lacking:
        print(f"tools.gpu.kit: no wheel of {wheel}; the machine must have it", file=sys.stderr)
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
