"""How to run a finished GGUF elsewhere: lines to paste for llama.cpp, Ollama, LM Studio, Python."""

import re
import shlex
from pathlib import Path


def paste_lines(model: Path, lora: Path | None = None) -> list[tuple[str, str]]:
    """(app, what to paste) for each app that can load the files.

    Args:
        model: A complete GGUF.
        lora: An adapter for it. Ollama and LM Studio take none.
    """
    path = shlex.quote(str(model))
    extra = f" --lora {shlex.quote(str(lora))}" if lora else ""
    lora_argument = f", lora_path={str(lora)!r}" if lora else ""
    lines = [("llama.cpp", f"llama-cli -m {path}{extra}")]
    if lora is None:
        name = ollama_name(model)
        modelfile = f"printf 'FROM %s\\n' {shlex.quote(str(model.absolute()))} > Modelfile"
        lines += [
            ("Ollama", f"{modelfile} && ollama create {name} -f Modelfile && ollama run {name}"),
            ("LM Studio", f"lms import --user-repo zo-gguf/{name} -L {path}"),
        ]
    python = f"from llama_cpp import Llama; llm = Llama(model_path={str(model)!r}{lora_argument})"
    return [*lines, ("Python", python)]


def ollama_name(model: Path) -> str:
    """A model name that Ollama accepts, from the file's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", model.stem.lower()).strip("-._") or "tuned"
