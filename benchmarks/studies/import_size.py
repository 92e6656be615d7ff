"""Measure what it costs to import a dataset and to load it: CPU-seconds, seconds and peak memory, each in a process of
its own. The seconds of loading are those of load_dataset; the peaks are those of the whole process.

    python benchmarks/studies/import_size.py

This writes benchmarks/results/import.csv. On a machine that does other work, too, compare the CPU-seconds.
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
CASES = {  # kind of file, rows, rows per episode
    "long episodes": ("hdf5", 2_000_000, 1000),
    "short episodes": ("hdf5", 100_000, 22),
    "decisions": ("csv", 20_000, 5),
    "bandit log": ("csv", 4_000, 1),
    "large bandit log": ("csv", 1_000_000, 1),
}
COLUMNS = (
    "case", "file", "rows", "episode_length", "import_cpu_seconds", "import_seconds", "import_peak_mb",
    "load_cpu_seconds", "load_seconds", "load_peak_mb", "mb",
)  # fmt: skip
TABLE = [
    "--episode=user", "--step=step", "--observations", "x_*", "country", "--actions=offer", "--reward=profit",
    "--terminal=left",
]  # fmt: skip
LOADERS = {"hdf5": "algorithms.offline.cql", "csv": "algorithms.discrete.cql_dqn"}
LOAD = """
import time

from {} import load_dataset

before = time.process_time(), time.perf_counter()
load_dataset("size/test-v0")
print(*(after - x for after, x in zip((time.process_time(), time.perf_counter()), before)))
"""


def write(path, n, length):
    """Writes a file: like D4RL's v2 ones, of 17 + 6 numbers, next observations and time-outs; or a table of 10 numbers,
    5 countries and 3 offers."""
    rng, rows = np.random.default_rng(0), np.arange(n)
    if path.endswith("csv"):
        import pandas

        table = pandas.DataFrame({"user": rows // length, "step": rows % length})
        table["user"] = "u" + table.user.astype(str)
        for i in range(10):
            table[f"x_{i}"] = rng.standard_normal(n)
        table["country"], table["offer"] = rng.choice(list("ABCDE"), n), rng.choice(["call", "mail", "none"], n)
        table["profit"], table["left"] = rng.standard_normal(n), (rows % length == length - 1).astype(int)
        table.to_csv(path, index=False)
        return
    states = rng.standard_normal((n + 1, 17), dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = states[:-1], states[1:]
        file["actions"] = rng.uniform(-1, 1, (n, 6)).astype(np.float32)
        file["rewards"] = rng.standard_normal(n, dtype=np.float32)
        file["timeouts"], file["terminals"] = rows % length == length - 1, np.zeros(n, bool)


def measure(*command):
    """The CPU-seconds, the seconds and the peak memory in MB that a Python program takes, and what it prints."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"import_size.py: {command[0]} failed")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1024, text


def main():
    rows = [COLUMNS]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = f"{folder}/minari"
        for name, (kind, *case) in CASES.items():
            path = f"{folder}/data.{kind}"
            # in another process, since a program's peak includes the memory of the one that starts it
            writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, *case))
            writer.start()
            writer.join()
            options = TABLE if kind == "csv" else []
            imported = measure("benchmarks/import_data.py", path, "--id=size/test-v0", "--force", *options)
            _, _, peak, text = measure("-c", LOAD.format(LOADERS[kind]))
            size = sum(file.stat().st_size for file in Path(folder, "minari").rglob("*.*")) / 1e6
            costs = *imported[:3], *map(float, text.split()), peak, size
            rows.append((name, kind, *case, *(f"{cost:.2f}" for cost in costs)))
            print(*rows[-1])
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (ROOT / "benchmarks/results/import.csv").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
