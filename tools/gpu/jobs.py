"""The jobs of gpu/bench.py that run in llama.cpp, each in a process of its own.

    python -m tools.gpu.jobs '{"job": "memory", ...}'

The last line printed is RESULT and a JSON object. Nothing here measures the GPU's memory: that is
done from outside, see watch.py.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Result = dict[str, Any]
TINY_LLAMA = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-llama"
_LR = 1e-4
_LOSS_SEEDS = 8
_LOSS_EPS = 1e-2
_TUNE_STEPS = 20
_ENOUGH = 20.0  # seconds of one measurement after which fewer rounds will do
_LEAST_ROUNDS = 3


def export_tiny(job: Job) -> Result:
    """tiny-llama at every quantization with masks, and the topic task, into a folder."""
    from tools import make_task
    from tools.gpu.model import TINY_QUANTS
    from zo_gguf.config import ExportConfig
    from zo_gguf.verbs.export import export

    folder = Path(job["folder"])
    make_task.make_task(folder / "task", n_train=400, n_valid=40, n_test=80, seed=0)
    calibration = str(folder / "task" / make_task.CALIBRATION)
    config = ExportConfig(
        model=str(TINY_LLAMA), name="tiny-llama", pre="gpt-2", calibration=calibration,
        quant=list(TINY_QUANTS), density=0.001, output=str(folder), overwrite=True,
    )  # fmt: skip
    export(config)
    return {}


def correctness(job: Job) -> Result:
    """Losses of CPU and device at the same probes, and projected gradients against autograd."""
    from tools.bench.fidelity import load_rows, measure
    from zo_gguf.engine.engine import Engine
    from zo_gguf.libzo import Probe

    model = Path(job["folder"]) / f"tiny-llama-{job['quant']}.gguf"
    mask = str(model).removesuffix(".gguf") + ".mask.safetensors"
    probes = [Probe(seed, sign * _LOSS_EPS) for seed in range(_LOSS_SEEDS) for sign in (1, -1)]
    losses, found = [], {}
    for place, layers in (("cpu", 0), ("device", job["n_gpu_layers"])):
        path = job["path"] if layers else "auto"
        with Engine(
            model, delta=mask, n_gpu_layers=layers, n_threads=job["threads"], path=path
        ) as engine:
            rows = load_rows(Path(job["folder"]) / "task", engine)
            losses.append(engine.losses(rows, probes))
            found[place] = asdict(measure(engine, rows, TINY_LLAMA)) | {"path": engine.path}
    difference = np.abs(losses[1] - losses[0])
    spread = {"max": float(difference.max()), "median": float(np.median(difference))}
    return {"difference": spread, "mean_loss": float(losses[0].mean()), **found}


def replay(job: Job) -> Result:
    """A run recorded on the device, replayed without it: are the files the same, byte for byte?"""
    folder = Path(job["folder"])
    run, copy = folder / f"run-{job['quant']}", folder / f"replayed-{job['quant']}.safetensors"
    model = folder / f"tiny-llama-{job['quant']}.gguf"
    tune = ["tune", "-m", str(model), "--data", str(folder / "task"), "-o", str(run), "--overwrite"]
    method = "sensitive" if job["path"] == "adapter" else "sensitive+norm"
    tune += ["--method", method, "--iters", str(_TUNE_STEPS)]
    tune += ["-ngl", str(job["n_gpu_layers"]), "--path", job["path"]]
    tune += ["-t", str(job["threads"]), "--valid-rows", "20"]
    for arguments in (tune, ["replay", str(run), "-o", str(copy), "--overwrite"]):
        command = [sys.executable, "-m", "zo_gguf", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"zo-gguf {arguments[0]}: {done.stderr.strip()[-300:]}")
    identical = (run / "delta.safetensors").read_bytes() == copy.read_bytes()
    return {"identical": identical, "steps": _TUNE_STEPS}


def memory(job: Job) -> Result:
    """Two plain forward passes, or two tune steps: what is held at most is seen from outside."""
    if job["kind"] == "plain":
        plain = _plain(job)
        for _ in range(2):
            plain.forward()
        return {"peak_rss": _peak_rss()}
    engine, step = _tuner(job)
    for number in range(2):
        step(number)
    found = {"path": engine.path, "parameters": engine.nnz, "peak_rss": _peak_rss()}
    engine.close()
    return found


def step(job: Job) -> Result:
    """Tune steps in turn with two plain forward passes each, and the ratios pair by pair."""
    engine, tune_step = _tuner(job)
    plain = _plain(job, engine)
    tune_step(0)
    plain.forward()
    ratios, steps, forwards = [], [], []
    for number in range(1, job["rounds"] + 1):
        before = _seconds(plain.forward)
        tuned = _seconds(tune_step, number)
        after = _seconds(plain.forward)
        ratios.append(tuned / (before + after))
        steps.append(tuned)
        forwards += [before, after]
    found = {"path": engine.path, "parameters": engine.nnz, "ratio": _quartiles(ratios)}
    engine.close()
    return found | {"step": _quartiles(steps), "forward": _quartiles(forwards)}


def batch(job: Job) -> Result:
    """Seconds of two probes in one decode and in two, and what the planner would choose."""
    from tools.bench.hook import make_examples
    from zo_gguf.libzo import Probe
    from zo_gguf.tuning.calibrate import choose_width

    engine, _ = _tuner(job | {"ctx_tokens": 2 * job["examples"] * job["tokens"]})
    examples = make_examples(job["examples"], job["tokens"] + 1, job["shape"]["vocab"])
    widths = [width for width in (1, 2) if width <= engine.widest(examples)]
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    probes = [Probe(7, 1e-3), Probe(7, -1e-3)]
    started = time.monotonic()
    for attempt in range(job["rounds"] + 1):  # the first one warms up
        if attempt > _LEAST_ROUNDS and time.monotonic() - started > _ENOUGH:
            break
        for width in widths:
            engine.probes_per_decode = width
            took = _seconds(engine.losses, examples, probes)
            if attempt:
                seconds[width].append(took)
    chosen = next(iter(choose_width(engine, examples, len(probes))))
    medians = {str(width): float(np.median(times)) for width, times in seconds.items()}
    within = medians[str(chosen)] <= 1.05 * min(medians.values())
    found = {"path": engine.path, "seconds": medians, "chosen": chosen, "within": within}
    engine.close()
    return found


def logits(job: Job) -> Result:
    """Seconds of a probe in which every token counts; where its logits go is up to the job."""
    from zo_gguf.data.dataset import Example
    from zo_gguf.engine import context as discard
    from zo_gguf.libzo import Probe

    discard._MOST_BYTES = 1 << 40 if job["logits"] == "device" else 0
    discard._SHARE = 1
    engine, _ = _tuner(job)
    rng, n = np.random.default_rng(2), job["tokens"] + 1
    rows = [rng.integers(3, job["shape"]["vocab"], n).tolist() for _ in range(job["examples"])]
    examples = [Example(row, [False] + [True] * (n - 1)) for row in rows]
    engine.losses(examples, [Probe(7, 1e-3)])
    seconds = [_seconds(engine.losses, examples, [Probe(7, 1e-3)]) for _ in range(job["rounds"])]
    engine.close()
    return {"seconds": _quartiles(seconds), "counted": job["examples"] * (n - 1)}


def _tuner(job: Job) -> tuple[Any, Callable[[int], None]]:
    """An engine with something to train, and a function that makes an spsa step with adam."""
    from tools.bench.hook import make_examples
    from tools.gpu.model import open_random
    from zo_gguf.engine.engine import Engine
    from zo_gguf.tuning.estimators.spsa import Spsa
    from zo_gguf.tuning.optimizer import Adam

    file = open_random(Path(job["model"]))
    width = job.get("probes_per_decode", 1)
    engine = Engine(
        file, delta=_trained(file, job["mask"]), n_threads=job["threads"], path=job["path"],
        ctx_tokens=job.get("ctx_tokens", width * job["examples"] * job["tokens"]),
        probes_per_decode=width,
        n_gpu_layers=job["n_gpu_layers"], kv_layout=job.get("kv_layout", "unified"),
    )  # fmt: skip
    examples = make_examples(job["examples"], job["tokens"] + 1, job["shape"]["vocab"])
    optimizer, theta = Adam(engine.nnz), engine.theta()

    def make_step(number: int) -> None:
        measured = Spsa().estimate(engine, examples, [number], 1e-3)
        optimizer.update(theta, measured.gradient(engine.parameters.noise), _LR)
        engine.set_theta(theta)

    return engine, make_step


def _trained(file: Any, kind: str) -> Any:
    """A mask on random weights, or the gains of all norms."""
    from tools.gpu.model import make_mask
    from zo_gguf.config import TuneConfig
    from zo_gguf.tuning.methods import start

    if kind == "norm":
        config = TuneConfig(model=str(file.path), data="none", output="none", method=kind)
        return start(config, file)
    return make_mask(file, kind)


def _plain(job: Job, engine: Any = None) -> Any:
    """Plain passes, through the engine's weights where there is one."""
    from tools.bench.hook import Plain, make_examples

    examples = make_examples(job["examples"], job["tokens"] + 1, job["shape"]["vocab"])
    model = engine._model.handle if engine else None
    return Plain(Path(job["model"]), examples, job["threads"], job["n_gpu_layers"], model)


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def _quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def _peak_rss() -> int:
    """Peak resident bytes of this process; not getrusage, where a child has its parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


JOBS: dict[str, Callable[[Job], Result]] = {
    "export": export_tiny,
    "correctness": correctness,
    "replay": replay,
    "memory": memory,
    "step": step,
    "batch": batch,
    "logits": logits,
}


def main() -> int:
    """Run the job that the one argument describes."""
    from zo_gguf.errors import ZoError

    job = json.loads(sys.argv[1])
    try:
        result = JOBS[job["job"]](job)
    except (ZoError, RuntimeError) as error:
        result = {"error": str(error)}
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
