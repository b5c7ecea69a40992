"""kill -9 at random moments, resume, and compare every byte with an uninterrupted run.

.venv/bin/python -m tools.bench.kill -m MODEL.gguf --data DIR [--kills 20] [--iters 450]
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPARED = ("delta.safetensors", "checkpoints/latest.safetensors", "trajectory.bin")


def main() -> None:
    """Run once in peace, once with kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iters", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        base = [sys.executable, "-m", "zo_gguf", "tune", "-m", options.model]
        base += ["--data", options.data, "--iters", str(options.iters), "--save-every", "7"]
        base += ["--valid-every", "20", "--valid-rows", "32"]
        # A given eps leaves more of the kills to the steps than its search would.
        base += ["--eps", "0.04", "--learning-rate", "0.01", "--directions", "4"]
        started = time.monotonic()
        subprocess.run([*base, "-o", str(whole)], check=True, capture_output=True)
        print(f"uninterrupted: {time.monotonic() - started:.0f} s")
        n_steps: list[int] = []
        while len(n_steps) < options.kills:
            resumable = (killed / "config.yaml").exists()
            command = (
                [*base[:4], "--resume", str(killed)] if resumable else [*base, "-o", str(killed)]
            )
            process = subprocess.Popen(
                command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            time.sleep(moments.uniform(1.0, 5.0))
            if process.poll() is not None:
                sys.exit(f"the run ended after {len(n_steps)} kills; raise --iters")
            process.send_signal(signal.SIGKILL)
            process.wait()
            trajectory = killed / "trajectory.bin"
            n_steps.append(trajectory.stat().st_size if trajectory.exists() else 0)
        subprocess.run([*base[:4], "--resume", str(killed)], check=True, capture_output=True)
        for name in COMPARED:
            same = (whole / name).read_bytes() == (killed / name).read_bytes()
            print(f"{name:<34}{'identical' if same else 'DIFFERENT'}")
            if not same:
                sys.exit(1)
        moved = sum(after > before for before, after in zip([0, *n_steps], n_steps, strict=False))
        print(f"{len(n_steps)} kills, {moved} after further steps; trajectory bytes {n_steps}")


if __name__ == "__main__":
    main()
