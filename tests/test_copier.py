"""A script that is copied alone into an empty folder, imported there, given arrays, and edited."""

import ast
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from common import load_script
from conftest import DATASET, WORLDS, Counter, finetune, kinds, observations_of, refusal, suited, tiny_config

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
row = copied.train(copied.TrainConfig(**options))
assert row["step"] == 20 and sorted(os.listdir()) == ["copied.py", "runs"], os.listdir()

policy = copied.load_policy("runs/run/policy.pt")
low, high = np.array(LOW), np.array(HIGH)
rng, pixels = np.random.default_rng(0), PIXELS
if pixels:
    observations = (255 * (rng.random((64, 2, 6, 6)) < rng.random((64, 1, 6, 6)) ** 4)).astype(np.uint8)
else:
    observations = rng.normal(size=(64, 3)) * 10.0 ** rng.integers(-3, 9, size=(64, 1))
actions = policy(observations)
assert actions.shape == (64, 2) and np.all((low <= actions) & (actions <= high)) and np.ptp(actions) > 1e-3
for observation, action in zip(observations, actions):
    alone = policy(observation)
    assert alone.shape == (2,) and np.allclose(alone, action, atol=1e-4)
assert pixels or policy(observations[0].tolist()).shape == (2,)

ends = np.arange(40) % 8 == 7
data = {key: rng.uniform(-1, 1, size=(40, 4)) for key in ("observations", "next_observations")}
data |= {"actions": rng.integers(0, 2, size=(40, 1)), "rewards": rng.normal(size=40)}
data |= {"terminals": ends, "timeouts": np.zeros(40, bool)}
if pixels:
    data = {key: column for key, column in data.items() if "observations" not in key}
    data |= {"frames": rng.integers(256, size=(40, 6, 6)).astype(np.uint8), "starts": np.arange(0, 40, 8)}
options |= {"env": "mine", "eval_env": "none", "run_id": "arrays"}
arrays = copied.train(copied.TrainConfig(**options), data=data)
action = copied.load_policy("runs/arrays/policy.pt")(np.zeros((2, 6, 6), np.uint8) if pixels else np.zeros(4))
assert arrays["eval_return"] is None and action.size == 1 and abs(action) <= 1
if pixels:

    class Blank(copied.gym.Env):
        observation_space, action_space = copied.gym.spaces.Box(0, 255, (6, 6), np.uint8), copied.gym.spaces.Discrete(2)

        def reset(self, seed=None, options=None):
            self.t = 0
            return self.observation_space.low, {}

        def step(self, action):
            self.t += 1
            return self.observation_space.low, 1.0, self.t == 3, False, {}

    copied.gym.register("Blank-v0", entry_point=Blank)
played = copied.evaluate(copied.load_policy("runs/arrays/policy.pt"), ENVIRONMENT, 2, 5)
assert len(played["return"]) == 2 and [len(x) for x in played["rewards"]] == played["length"]
copied.load_dataset = lambda name: dict(data) if name == "mine" else None  # the one function to replace
row = copied.train(copied.TrainConfig(**options | {"run_id": "replaced"}))
times = [name for name in row if name.endswith(("_per_second", "_time_share"))]
assert row.keys() == arrays.keys() and all(row[name] == arrays[name] for name in row.keys() - {*times})
"""


def test_script_alone_in_a_folder_trains_and_acts(script, program, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copy(script.__file__, tmp_path / "work/copied.py")
    bounds, text = script.action_bounds(Counter.action_space, ""), PROGRAM
    values = {"OPTIONS": suited(script, max_timesteps=20, eval_env="none")}
    values |= {"LOW": bounds["action_low"].tolist(), "HIGH": bounds["action_high"].tolist()}
    values["ENVIRONMENT"] = "CartPole-v1" if "discrete" in script.__name__ else "InvertedPendulum-v5"  # 4 numbers
    values["PIXELS"] = WORLDS[script.__name__].pixels
    values["ENVIRONMENT"] = "Blank-v0" if values["PIXELS"] else values["ENVIRONMENT"]
    for name, value in values.items():
        text = text.replace(name, repr(value))
    process = program(text)
    process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    out = (tmp_path / "out").read_text()
    assert DATASET in out and str(Path("runs/run")) in out


@kinds
def test_evaluate_plays_episodes_from_seeds_side_by_side(script):
    space, seeds = WORLDS[script.__name__].action_space, range(7, 47)
    seen, low = [], script.action_bounds(space, "")["action_low"]

    def policy(observations):
        seen.append(observations)
        return np.tile(low, (len(observations), 1)).astype(space.dtype)

    result = script.evaluate(policy, "Counter-v0", 40, 7)
    lengths = [Counter.length(seed) for seed in seeds]
    assert len(seen[0]) == 20 and result["length"] == lengths  # two waves
    assert [x.tolist() for x in result["first_observations"]] == [[seed, 0, 0] for seed in seeds]
    for seed, rewards, length in zip(seeds, result["rewards"], lengths):
        assert rewards.tolist() == [seed + t for t in range(1, length + 1)]
    assert result["return"] == [sum(rewards) for rewards in result["rewards"]]
    assert result["success"] == [float(seed % 3 == 0) for seed in seeds]
    environment = {"max_episode_steps": 2, "wrappers": [("TimeAwareObservation", {})]}
    result = script.evaluate(policy, "Counter-v0", 1, 7, **environment)
    assert result["length"] == [2] and seen[-1].tolist() == [[7, 1, low.sum(), 1]]


@kinds
def test_evaluate_refuses_what_does_not_fit(script):
    world = WORLDS[script.__name__]
    foreign = gym.make(world.foreign).action_space
    for env, code, shape, words in (
        ("Counter-v0", 1, (3,), "do not fit"), (world.foreign, 1, foreign.shape, "has actions"),
        ("No-v0", 2, (2,), "No-v0"),
    ):  # fmt: skip
        policy = lambda observations, shape=shape: np.zeros((len(observations), *shape), foreign.dtype)  # noqa: E731
        status, line = refusal(script.evaluate, policy, env, 1, 0)
        assert status == code and words in line


def test_dropout_in_a_copy_trains_in_train_mode_and_acts_in_eval_mode(script, tmp_path, monkeypatch):
    source = Path(script.__file__).read_text()
    edited = source.replace("(layer, nn.ReLU())", "(layer, nn.ReLU(), nn.Dropout(0.5))")
    edited = edited.replace("else nn.ReLU()\n", "else nn.Sequential(nn.ReLU(), nn.Dropout(0.5))\n")
    edited = edited.replace("n_outputs, hidden_dim), nn.ReLU())", "n_outputs, hidden_dim), nn.ReLU(), nn.Dropout(0.5))")
    assert edited.count("nn.Dropout(0.5)") == 1
    (tmp_path / "edited.py").write_text(edited)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited", raising=False)
    import edited

    modes = {"train": set(), "eval": set()}
    dropout, rollout = edited.nn.Dropout.forward, edited.Task.evaluate
    where = ["train"]

    def forward(self, x):
        modes[where[0]].add(self.training)
        return dropout(self, x)

    def evaluate(task, *arguments):
        where[0] = "eval"
        row = rollout(task, *arguments)
        where[0] = "train"
        return row

    monkeypatch.setattr(edited.nn.Dropout, "forward", forward)
    monkeypatch.setattr(edited.Task, "evaluate", evaluate)
    config = tiny_config(script, tmp_path, holdout_fraction=0.2)
    edited.train(edited.TrainConfig(**vars(config)))
    features = {False} if hasattr(edited, "DiscreteCQL") else set()  # metrics of features are without dropout, too
    assert modes == {"train": {True} | features, "eval": {False}}
    policy = edited.load_policy(tmp_path / "run" / "policy.pt")
    observations = observations_of(script, script.load_dataset(DATASET))
    assert np.array_equal(policy(observations), policy(observations))


@finetune
def test_batch_norm_and_dropout_in_a_copy_act_online_in_eval_mode(script, tmp_path, monkeypatch):
    layers = "(layer, nn.BatchNorm1d(layer.out_features), nn.ReLU(), nn.Dropout(0.5))"
    (tmp_path / "my_finetune.py").write_text(Path(script.__file__).read_text().replace("(layer, nn.ReLU())", layers))
    module, modes = load_script(tmp_path / "my_finetune.py"), []
    explore = module.CQL.explore

    def spy(agent, *arguments):
        hooks = [x.register_forward_hook(lambda x, *_: modes.append(x.training)) for x in agent.actor.hidden]
        result = explore(agent, *arguments)
        for hook in hooks:
            hook.remove()
        assert agent.actor.training
        return result

    monkeypatch.setattr(module.CQL, "explore", spy)
    config = tiny_config(script, tmp_path, offline_iterations=10, online_iterations=10)
    row = module.train(module.TrainConfig(**vars(config)))
    assert row["eval_return"] is not None and set(modes) == {False}


def test_script_imports_installed_packages_only(script):
    """Nothing from this repository's own folders; a user may have made others here, such as a .venv."""
    root = Path(script.__file__).resolve().parents[2]
    local = {path.stem for folder in ("algorithms", "benchmarks", "tests") for path in (root / folder).rglob("*.py")}
    nodes = ast.walk(ast.parse(Path(script.__file__).read_text()))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for x in imports for name in [getattr(x, "module", None) or x.names[0].name]}
    assert len(names) > 10 and not names & (local | {"algorithms", "benchmarks", "tests"})
    assert not any(getattr(node, "level", 0) for node in imports)
