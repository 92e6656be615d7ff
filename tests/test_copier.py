"""A script copied alone into an empty folder, by somebody who imports it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import DATASET, TINY, Counter, option_names

# Runs in the copy's folder. Only the script is there, and nothing may come from this repository.
PROGRAM = """
import os, random, sys
import numpy as np
import torch

def state():
    seeds = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    return seeds, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

sys.argv = ["notebook", "--no_such_option", "3"]
random.seed(7), np.random.seed(7), torch.manual_seed(7)
before = state()
import copied
assert state() == before, "importing changes seeds, threads or settings"
assert os.listdir() == ["copied.py"] and not any(name.startswith("algorithms") for name in sys.modules)

options = OPTIONS
row = copied.train(copied.TrainConfig(**options, max_timesteps=20))
assert row["step"] == 20 and sorted(os.listdir()) == ["copied.py", "runs"], os.listdir()

policy = copied.load_policy("runs/run/policy.pt")
low, high = np.array(LOW), np.array(HIGH)
rng = np.random.default_rng(0)
observations = rng.normal(size=(64, 3)) * 10.0 ** rng.integers(-3, 9, size=(64, 1))
actions = policy(observations)
assert actions.shape == (64, 2) and np.all((low <= actions) & (actions <= high)) and np.ptp(actions) > 1e-3
for observation, action in zip(observations, actions):
    alone = policy(observation)
    assert alone.shape == (2,) and np.allclose(alone, action, atol=1e-5)
assert policy(observations[0].tolist()).shape == (2,)

def load_dataset(name):
    assert name == "mine"
    ends = np.arange(40) % 8 == 7
    data = {key: rng.uniform(-1, 1, size=(40, 4)) for key in ("observations", "next_observations")}
    data["actions"] = rng.integers(0, 2, size=(40, 1))
    return data | {"rewards": rng.normal(size=40), "terminals": ends, "timeouts": np.zeros(40, bool)}

copied.load_dataset = load_dataset
options |= {"env": "mine", "eval_env": "none", "run_id": "mine"}
row = copied.train(copied.TrainConfig(**options, max_timesteps=20))
action = copied.load_policy("runs/mine/policy.pt")(np.zeros(4))
assert row["eval_return"] is None and action.size == 1 and abs(action) <= 1
"""


def test_script_alone_in_a_folder_trains_and_acts(script, tmp_path):
    shutil.copy(script.__file__, tmp_path / "copied.py")
    names, bounds = option_names(script.__name__) - {"max_timesteps"}, script.action_bounds(Counter.action_space)
    options = {name: value for name, value in TINY.items() if name in names} | {"eval_env": "none"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    values = {"OPTIONS": options, "LOW": bounds["action_low"].tolist(), "HIGH": bounds["action_high"].tolist()}
    program = PROGRAM
    for name, value in values.items():
        program = program.replace(name, repr(value))
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", program]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert DATASET in process.stdout and str(Path("runs/run")) in process.stdout


def test_script_imports_installed_packages_only(script):
    root = Path(script.__file__).resolve().parents[2]
    local = {path.stem for path in root.rglob("*.py")} | {"algorithms", "benchmarks", "tests"}
    source = Path(script.__file__).read_text()
    imports = [line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert len(imports) > 10 and not local & set(imports)
