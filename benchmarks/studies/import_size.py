"""Measure what it costs to import a dataset and to load it: seconds and peak memory, each in a process of its own.

    python benchmarks/studies/import_size.py

This writes benchmarks/results/import.csv.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CASES = {"long episodes": (2_000_000, 1000), "short episodes": (100_000, 22)}  # rows, rows per episode
COLUMNS = ("case", "rows", "episode_length", "import_seconds", "import_peak_mb", "load_seconds", "load_peak_mb", "mb")


def write(path, n, length):
    """Write a file like D4RL's v2 ones: 17 + 6 numbers, next observations, time-outs."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((n + 1, 17), dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = states[:-1], states[1:]
        file["actions"] = rng.uniform(-1, 1, (n, 6)).astype(np.float32)
        file["rewards"] = rng.standard_normal(n, dtype=np.float32)
        file["timeouts"], file["terminals"] = np.arange(n) % length == length - 1, np.zeros(n, bool)


def measure(*command):
    """The seconds and the peak memory in MB that a Python program takes."""
    started, process = time.perf_counter(), subprocess.Popen([sys.executable, *command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"import_size.py: {command[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main():
    rows, loader = [COLUMNS], "from algorithms.offline.cql import load_dataset"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = f"{folder}/minari"
        for name, case in CASES.items():
            # in another process, since a program's peak includes the memory of the one that starts it
            writer = multiprocessing.get_context("spawn").Process(target=write, args=(f"{folder}/data.hdf5", *case))
            writer.start()
            writer.join()
            imported = measure("benchmarks/import_data.py", f"{folder}/data.hdf5", "--id=size/test-v0", "--force")
            loaded, started = measure("-c", f"{loader}; load_dataset('size/test-v0')"), measure("-c", loader)
            size = sum(file.stat().st_size for file in Path(folder).rglob("main_data.hdf5")) / 1e6
            costs = *imported, loaded[0] - started[0], loaded[1], size
            rows.append((name, *case, *(f"{cost:.1f}" for cost in costs)))
            print(*rows[-1])
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (ROOT / "benchmarks/results/import.csv").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
