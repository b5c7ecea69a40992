"""Whether llama.cpp's code for Intel's AMX runs as it was compiled here.

Compilers drop the stores to the tile configuration that llama.cpp loads (GCC 12 does, for one), and
the first product of a quantized matrix then ends the process: llama.cpp issue 20824, pull request
26954. The only way to know is to try, in a process of its own. The cure is to compile llama.cpp
without that code.

    python -m zo_gguf.engine.hardware.amx MODEL.gguf    # some tokens; dies where code is broken
"""

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from zo_gguf.errors import ZoError

FEATURE = "AMX_INT8"  # llama.cpp's word for it
# Each wins over ggml's own -march=native. ggml asks in C what it has, and uses it in C++.
BUILD_FLAGS = "CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8"
_CPU_INFO = Path("/proc/cpuinfo")
_WIDTH, _N_VOCAB, _N_TOKENS = 64, 32, 4
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def require_working_amx() -> None:
    """Raise ZoError, with what to do, if the installed llama.cpp would crash in its AMX code."""
    if problem := amx_problem():
        raise ZoError(" ".join(problem))


def amx_problem() -> list[str]:
    """What is wrong with the installed llama.cpp's AMX code, and the command that helps."""
    if not _is_compiled() or not crashes():
        return []
    return [
        "This llama-cpp-python crashes on every quantized model: its code for AMX was compiled "
        "wrongly, as by GCC 12. To build it without that code:",
        f"{BUILD_FLAGS} pip install --force-reinstall --no-deps --no-cache-dir "
        f"--no-binary llama-cpp-python llama-cpp-python=={llama_cpp.__version__}",
    ]


def amx_is_left_out() -> bool:
    """Whether this CPU has AMX and the installed llama.cpp no code for it; only Linux tells."""
    if _is_compiled() or not _CPU_INFO.is_file():
        return False
    return " amx_int8" in _CPU_INFO.read_text(encoding="utf-8", errors="replace")


def _is_compiled() -> bool:
    return f"{FEATURE} = 1" in llama_cpp.llama_print_system_info().decode()


@cache
def crashes() -> bool:
    """Whether a process that uses the code is killed by a signal."""
    with tempfile.TemporaryDirectory(prefix="zo-gguf-") as folder:
        path = Path(folder, "model.gguf")
        write_model(path)
        command = [sys.executable, "-P", "-m", "zo_gguf.engine.hardware.amx", str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode < 0


def write_model(path: Path) -> None:
    """Write a Llama of one layer, zeros in Q8_0, whose matrices llama.cpp lays out for AMX."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(_N_VOCAB)
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    zeros = np.zeros((_WIDTH, _WIDTH), np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in _MATRICES:
        quantized = gguf.quants.quantize(zeros, kind)
        writer.add_tensor(f"blk.0.{name}.weight", quantized, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.add_tensor("token_embd.weight", zeros[:_N_VOCAB])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(path: Path) -> None:
    """Run some tokens through a model: a single one takes another way."""
    model = llama_cpp.llama_model_load_from_file(
        bytes(path), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads = _WIDTH, 1
    assert model
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    tokens = (llama_cpp.llama_token * _N_TOKENS)(*range(_N_TOKENS))
    batch = llama_cpp.llama_batch_get_one(tokens, _N_TOKENS)
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    decode(Path(sys.argv[1]))
