"""The main job from end to end: export, tune, merge, and the result in plain llama-cpp-python.

Every step is the command line that a user would type; it is printed before it runs. The model is
tests/assets/tiny-llama, the task and the calibration text come from tools/make_task.py; only
llama.cpp's converter is fetched, once, through pip. Start it with `python3 tools/dev.py demo`.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from zo_gguf.data.dataset import load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.merging.result import paste_lines

ROOT = Path(__file__).resolve().parent.parent
TINY_LLAMA = Path("tests/assets/tiny-llama")
NAME = "tiny-llama-topics-Q4_0"
ITERS = 80
LEAST_GAIN = 0.1  # accuracy that tuning must add before the demo counts as passed
LEAST_KEPT = 0.9  # share of the drop in loss that the merged file must keep


class DemoError(Exception):
    """A step failed, or the result is not what the demo promises."""


def say(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def zo(*arguments: str, capture: bool = False) -> str:
    """Run a `zo-gguf` command line; with `capture`, return its stdout instead of showing it."""
    print(f"$ zo-gguf {shlex.join(arguments)}", flush=True)
    return call([sys.executable, "-m", "zo_gguf", *arguments], capture)


def call(command: list[str], capture: bool = False) -> str:
    pipe = subprocess.PIPE if capture else None
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=pipe, text=True, check=False)
    if done.returncode:
        raise DemoError(f"exit code {done.returncode} from: {shlex.join(command)}")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return done.stdout or ""


def evaluate(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(zo("eval", *arguments, "--json", capture=True))
    return result


def stock(model: Path, tokens_from: Path, data: Path, job: Path) -> dict[str, Any]:
    """Loss and accuracy of `model` in a process that imports llama_cpp and never zo_gguf."""
    with Engine(tokens_from) as engine:
        examples = load_examples(data, engine)
    rows = [
        {
            "tokens": example.tokens,
            "target_mask": example.target_mask,
            "choices": example.choices,
            "answer": example.answer,
            "n_prompt": example.n_prompt,
        }
        for example in examples
    ]
    job.write_text(
        json.dumps({"model": str(model), "lora": None, "n_threads": None, "examples": rows})
    )
    print(f"$ python zo_gguf/merging/stock_eval.py {job}", flush=True)
    result: dict[str, Any] = json.loads(
        call([sys.executable, "zo_gguf/merging/stock_eval.py", str(job)], capture=True)
    )
    return result


def table(rows: list[tuple[str, dict[str, Any], Path, str]]) -> str:
    """(label, result, file, where it was measured) -> the before/after table."""
    lines = [f"{'':<8} {'loss':>15} {'accuracy':>15} {'file':>12}   measured"]
    for label, result, file, where in rows:
        loss = f"{result['loss']:.3f} ± {result['loss_se']:.3f}"
        accuracy = f"{result['accuracy']:.3f} ± {result['accuracy_se']:.3f}"
        size = f"{file.stat().st_size:,}"
        lines.append(f"{label:<8} {loss:>15} {accuracy:>15} {size:>12}   {where}")
    return "\n".join(lines)


def demo(out: Path, iters: int) -> None:
    task, models, run = out / "task", out / "models", out / "run"
    base = models / "tiny-llama-Q4_0.gguf"
    merged = out / f"{NAME}.gguf"

    say("1. A task: which of five topics is a text about? Test rows use words never trained on")
    call([sys.executable, "tools/make_task.py", str(task)])

    say("2. Export: Hugging Face model -> Q4_0 GGUF (and a mask, for --method sensitive)")
    # With a model of your own, leave --calibration at c4 and --pre away.
    zo(
        *("export", "--model", str(TINY_LLAMA), "--pre", "gpt-2", "--quant", "Q4_0"),
        *("--calibration", str(task / "calibration.txt"), "-o", str(models)),
    )

    say("3. Tune: forward passes only, on the quantized model")
    zo(*("tune", "-m", str(base), "--data", str(task), "-o", str(run), "--iters", str(iters)))

    say("4. Merge: one complete GGUF for any llama.cpp app")
    zo("merge", str(run), "-o", str(merged))

    say("5. The test rows: before, tuned, and the merged file in plain llama-cpp-python")
    before = evaluate("-m", str(base), "--data", str(task))
    tuned = evaluate("-m", str(base), "--data", str(task), "--delta", str(run))
    after = stock(merged, base, task / "test.jsonl", out / "stock-job.json")

    say("Result")
    print(
        table(
            [
                ("base", before, base, "zo-gguf eval"),
                ("tuned", tuned, base, "zo-gguf eval --delta"),
                ("merged", after, merged, "plain llama_cpp.Llama, process without zo_gguf"),
            ]
        )
    )
    gain = before["loss"] - tuned["loss"]
    kept = (before["loss"] - after["loss"]) / gain if gain > 0 else 0.0
    print(f"\nThe merged file keeps {kept:.1%} of what tuning gained on these rows.")
    print(f"Loss curve: {run / 'loss.png'}")
    print("\nTo use the merged file:")
    for app, line in paste_lines(merged):
        print(f"  {app + ':':<11} {line}")
    if tuned["accuracy"] < before["accuracy"] + LEAST_GAIN or kept < LEAST_KEPT:
        raise DemoError(
            f"tuning should add {LEAST_GAIN} of accuracy and the file keep {LEAST_KEPT:.0%} of it; "
            "something is broken"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="default: ./demo")
    parser.add_argument("--iters", type=int, default=ITERS, help="tuning steps (%(default)s)")
    args = parser.parse_args()
    started = time.monotonic()
    if args.output.exists():
        if not (args.output / "task" / "test.jsonl").exists():
            print(
                f"demo.py: {args.output} is not a demo's folder; not replacing it", file=sys.stderr
            )
            return 2
        shutil.rmtree(args.output)
    args.output.mkdir(parents=True)
    try:
        demo(args.output, args.iters)
    except DemoError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
