"""requirements*.txt: a package has one version, and the light set is enough for tables."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("requirements*.txt"))
PROGRAM = """
import sys

blocked = set(sys.argv.pop().split())


class Finder:
    # A finder that does not find the blocked modules.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, *arguments)


sys.meta_path[:] = map(Finder, sys.meta_path)
import numpy as np
import pandas as pd

rng, n = np.random.default_rng(0), 60
columns = {"who": np.arange(n) // 3, "x": rng.normal(size=n), "pay": rng.normal(size=n), "price": rng.uniform(0, 9, n)}
columns |= {"offer": rng.choice(["call", "mail"], n), "end": np.arange(n) % 3 == 2}
pd.DataFrame(columns).to_csv("shop.csv", index=False)
from benchmarks import collect, diagnose, export, fqe, import_data

common = ["--episode", "who", "--observations", "x", "--reward", "pay", "--terminal", "end"]
import_data.main(["shop.csv", "--id", "mine/offer-v0", "--actions", "offer", *common])
import_data.main(["shop.csv", "--id", "mine/price-v0", "--actions", "price", *common])
from algorithms.discrete import cql_dqn
from algorithms.finetune import cql as finetune
from algorithms.offline import combo, cql

options = {"eval_env": "none", "max_timesteps": 4, "eval_freq": 4, "hidden_dim": 8, "batch_size": 8, "device": "cpu"}
cql_dqn.train(cql_dqn.TrainConfig(env="mine/offer-v0", run_id="offer", **options))
cql.train(cql.TrainConfig(env="mine/price-v0", run_id="price", **options))
fqe.main(["runs/offer/policy.pt", "--env", "mine/offer-v0", "--updates", "20"])
diagnose.main(["runs/price"])
collect.main(["--env", "Pendulum-v1", "--policy", "random", "--steps", "5", "--id", "mine/pendulum-v0"])
"""


def requirements(path):
    """The requirements of a file and of those that it names, by package; the extras of a package are joined."""
    found = {}
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if other := re.fullmatch(r"-r (\S+)", line):
            for name, extras in requirements(path.with_name(other[1])).items():
                found.setdefault(name, set()).update(extras)
        elif line:
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    return found


def closure(wanted):
    """Names of the distributions that are installed for the requirements."""
    found, todo = set(), list(wanted.items())
    while todo:
        name, extras = todo.pop()
        if (name, frozenset(extras)) in found:
            continue
        found.add((name, frozenset(extras)))
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if any(requirement.marker is None or requirement.marker.evaluate({"extra": x}) for x in {"", *extras}):
                todo.append((canonicalize_name(requirement.name), requirement.extras))
    return {name for name, _ in found}


def test_a_package_has_one_version_and_every_package_has_one():
    pins = {}
    for path in FILES:
        for name, version in re.findall(r"^([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", path.read_text(), re.MULTILINE):
            pins.setdefault(canonicalize_name(name), set()).add(version)
    assert all(len(versions) == 1 for versions in pins.values()), pins
    assert pins.keys() == {name for path in FILES for name in requirements(path)} and len(pins) > 20
    light, full = (requirements(ROOT / f"requirements{name}.txt") for name in ("-tables", ""))
    assert light.keys() < full.keys() and {"mujoco", "gymnasium-robotics"} <= full.keys() - light.keys()


def test_the_light_set_is_enough_for_tables(tmp_path, monkeypatch):
    light = closure(requirements(ROOT / "requirements-tables.txt"))
    assert {"torch", "pandas", "h5py"} < light and not {"mujoco", "box2d", "gymnasium-robotics", "pygame-ce"} & light
    modules = importlib.metadata.packages_distributions()
    blocked = [
        module
        for module, names in modules.items()
        if not {canonicalize_name(name) for name in names} & light and module not in ("pip", "__pycache__")
    ]
    assert {"mujoco", "Box2D", "gymnasium_robotics", "huggingface_hub"} <= {*blocked}
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'benchmarks'}")
    command = [sys.executable, "-c", PROGRAM, " ".join(blocked)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/offer/policy.pt" in done.stdout and (tmp_path / "runs/price/policy.pt").exists()
