"""benchmarks/import_ogbench.py: OGBench's files become transitions, their tasks rewards, and runs play in the task."""

import importlib
import json
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import continuous, table

from benchmarks import import_data

PACKAGE = '''
import gymnasium as gym
import numpy as np


class Line(gym.Env):
    """A robot at [place, 1] that moves by its action; reward 0 and the end where it is at `goal` or beyond."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, goal=9.0):
        self.goal = goal

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0.0
        return self.observe(), {}

    def observe(self):
        return np.array([self.place, 1], np.float32)

    def step(self, action):
        success = self.place >= self.goal
        self.place += float(action[0])
        return self.observe(), float(success) - 1, success, False, {"success": success}


gym.register("line-singletask-v0", entry_point=Line, max_episode_steps=7, kwargs={"goal": 2.0})


def make_env_and_datasets(name, env_only):
    return gym.make(name.replace("-walk", ""))
'''
RELABEL = """
def relabel_dataset(env_name, env, dataset):
    successes = dataset["qpos"][:, 0] >= env.unwrapped.goal
    dataset["rewards"], dataset["masks"] = successes - 1.0, 1.0 - successes
"""
ID = "ogbench/line-v0"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of OGBench's name and functions, which registers its task when it is imported."""
    folder = tmp_path / "packages" / "ogbench"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "relabel_utils.py").write_text(RELABEL)
    monkeypatch.syspath_prepend(str(folder.parent))
    forget = lambda: [sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "ogbench"]  # noqa: E731
    forget()
    importlib.invalidate_caches()
    yield forget
    forget()
    gym.registry.pop("line-singletask-v0", None)


@pytest.fixture
def run(capsys):
    def run(*arguments, id=ID):
        capsys.readouterr()
        status = 0
        try:
            import_data.main([*map(str, arguments), "--id", id])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def write(name="line-walk-v0.npz", **changes):
    """Trajectories of 4, 3 and 1 rows, whose robot moves by 1: rows 0 1 2 3, 4 5 6 and 7, which leads nowhere."""
    places = np.float32([0, 1, 2, 3, 0, 1, 2, 5])
    arrays = {
        "observations": np.stack([places, np.ones(8, np.float32)], axis=1),
        "actions": np.ones((8, 1), np.float32) - np.arange(8, dtype=np.float32)[:, None] / 100,
        "terminals": np.isin(np.arange(8), (3, 6, 7)),
        "qpos": np.stack([places, places], axis=1),
        "qvel": np.zeros((8, 2)),
    }
    np.savez_compressed(name, **{key: x for key, x in (arrays | changes).items() if x is not None})
    return name


def stored(id=ID):
    path = minari.storage.get_dataset_path(id)
    columns = {file.stem: np.load(file).tolist() for file in path.glob("*.npy")}
    return columns, json.loads((path / "metadata.json").read_text())


@pytest.mark.parametrize("task", ["line-singletask-v0", "line-walk-singletask-v0"])
def test_the_last_row_of_a_trajectory_is_the_next_observation_only(task, package, run):
    status, out, err = run(write(), "--task", task)
    assert status == 0, err
    columns, metadata = stored()
    assert [x for x, _ in columns["observations"]] == [0, 1, 2, 0, 1]
    assert [x for x, _ in columns["next_observations"]] == [1, 2, 3, 1, 2]
    assert np.ravel(columns["actions"]) == pytest.approx([1, 0.99, 0.98, 0.96, 0.95])
    assert columns["rewards"] == [-1, -1, 0, -1, -1]  # of the state, before the action: success is a place of 2
    assert columns["terminals"] == [False, False, True, False, False]
    assert columns["timeouts"] == [False, False, False, False, True]
    assert "Dropped: 3 rows, the last of" in out and "Terminal: 1 row, where" in out and "split" not in out and not err
    assert "--eval_env ogbench:line-singletask-v0" in out
    environment = {"goal": 2.0, "id": "line-singletask-v0", "max_episode_steps": 7, "wrappers": []}
    assert metadata["environment"] == environment and "reference_scores" not in metadata


REWARDS, MASKS = np.arange(8.0), np.float32([1, 1, 0, 1, 1, 0, 1, 0])


def test_rewards_of_the_file_need_neither_a_task_nor_a_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    assert run(write(rewards=REWARDS, masks=MASKS))[0] == 0
    columns, metadata = stored()
    assert columns["rewards"] == [0, 1, 2, 4, 5] and "environment" not in metadata
    assert columns["terminals"] == [False, False, True, False, True] and not any(columns["timeouts"])
    status, out, _ = run(write(rewards=REWARDS), "--force")
    columns, _ = stored()
    assert (
        status == 0
        and "No mask is 0, so no row is terminal." in out
        and "split" not in out
        and not any(columns["terminals"])
    )
    assert columns["timeouts"] == [False, False, True, False, True]


def test_what_ogbenchs_loader_made_and_a_user_saved_means_the_same(run):
    run(write(rewards=REWARDS, masks=MASKS))
    expected, _ = stored()
    compact = np.isin(np.arange(8), (2, 3, 5, 6, 7))
    valids = 1.0 - np.isin(np.arange(8), (3, 6, 7))
    status, _, err = run(write(rewards=REWARDS, masks=MASKS, terminals=compact, valids=valids), "--force")
    assert status == 0 and stored()[0] == expected, err
    kept = np.array([0, 1, 2, 4, 5])
    whole = {key: np.array(expected[key], np.float32) for key in ("observations", "actions", "next_observations")}
    whole |= {"rewards": REWARDS[kept], "masks": MASKS[kept], "terminals": np.isin(kept, (2, 5)), "qpos": None}
    status, out, err = run(write(qvel=None, **whole), "--force")
    assert status == 0 and stored()[0] == expected and "no row was dropped" in out, err


def test_what_stands_in_dropped_rows_and_other_arrays_is_ignored(run):
    actions = np.ones((8, 1))
    actions[[3, 6, 7]] = np.nan
    status, _, err = run(
        write(rewards=np.where(np.isfinite(actions[:, 0]), 1, np.inf), actions=actions, note=np.zeros(3))
    )
    assert status == 0 and stored()[0]["rewards"] == [1] * 5, err


@continuous
@pytest.mark.parametrize("known", [True, False])
def test_runs_play_in_the_task_where_its_module_is_named(known, script, package, tmp_path, tiny, run, capsys):
    assert run(write(), "--task", "line-singletask-v0")[0] == 0
    package()  # another process has not imported it
    gym.registry.pop("line-singletask-v0")
    options = {"eval_env": "ogbench:line-singletask-v0"} if known else {}
    script.train(tiny(env=ID, max_timesteps=1, n_episodes=3, **options))
    out, rows = capsys.readouterr().out, table(tmp_path / "runs" / "run")
    if not known:
        assert "Gymnasium does not know line-singletask-v0; --eval_env MODULE:line-singletask-v0" in out
        assert "ogbench" not in sys.modules and rows[0]["eval_return"] == ""
    else:
        assert "evaluated in ogbench:line-singletask-v0" in out and "with its defaults" not in out
        assert float(rows[0]["eval_length"]) <= 7 and rows[0]["eval_success"] in ("0.0", "1.0")


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, [], ["no rewards", "--task", "singletask"]),
        ({}, ["--task", "line-v0"], ["--task line-v0", "-singletask-"]),
        ({}, ["--task", "lin-singletask-v0"], ["--task lin-singletask-v0", "nearest", "line-singletask-v0"]),
        ({"qpos": None}, ["--task", "line-singletask-v0"], ["--task line-singletask-v0", "'qpos'"]),
        ({"observations": np.ones((8, 3))}, ["--task", "line-singletask-v0"], ["(3,)", "(2,)"]),
        ({"rewards": REWARDS}, ["--task", "line-singletask-v0"], ["has rewards", "--eval_env"]),
        ({"rewards": REWARDS, "timeouts": MASKS}, [], ["timeouts", "HDF5"]),
        ({"terminals": None}, [], ["lacks terminals", "observations"]),
        ({"terminals": np.full(8, 2.0)}, [], ["terminals is 2.0 in row 0"]),
        ({"terminals": np.ones((8, 1))}, [], ["terminals", "(8, 1)"]),
        ({"terminals": np.ones(8)}, [], ["no transition"]),
        ({"rewards": REWARDS, "masks": MASKS / 2}, [], ["masks is 0.5 in row 0"]),
        ({"rewards": np.append(REWARDS, 0)}, [], ["same number of rows", "rewards 9"]),
        ({"rewards": np.where(REWARDS == 4, np.nan, 0)}, [], ["rewards is nan in row 4"]),
        ({"rewards": REWARDS, "actions": np.where(REWARDS == 4, 2, 0)[:, None]}, ["--action_low=-1", "--action_high=1"],
            ["actions[0] is 2 in row 4"]),
        ({"rewards": REWARDS, "actions": np.full((8, 1), None)}, [], ["not a .npz file of arrays"]),
        ({"rewards": REWARDS, "observations": np.zeros((8, 64, 64, 3), np.uint8)}, [], ["images"]),
        ({key: np.zeros((0, 2)) for key in ("observations", "qpos", "qvel", "actions")}
            | {"terminals": np.zeros(0)}, [], ["no transition"]),
    ],
)  # fmt: skip
def test_bad_files_and_tasks_are_one_line_and_store_nothing(changes, options, words, package, run, tmp_path):
    status, out, err = run(write(**changes), *options)
    assert status == 1 and err.count("\n") == 1, out + err
    assert "line-walk-v0.npz" in err and all(word in err for word in words), err
    assert not (tmp_path / "minari" / ID).exists()


def test_other_files_and_a_missing_package_are_said(run, monkeypatch):
    Path("text.npz").write_text("text")
    np.save("one.npy", REWARDS)
    Path("one.npy").rename("one.npz")  # which NumPy opens
    whole = Path(write(rewards=REWARDS)).read_bytes()
    Path("cut.npz").write_bytes(whole[:-100])
    Path("changed.npz").write_bytes(whole[:100] + b"changed" + whole[107:])
    for name in ("text", "one", "cut", "changed"):
        status, _, err = run(f"{name}.npz")
        assert status == 1 and "not a .npz file" in err and err.count("\n") == 1
    np.savez("other.npz", pictures=REWARDS)
    status, _, err = run("other.npz")
    assert status == 1 and err.endswith("it lacks observations, actions, terminals\n")
    Path("rows.hdf5").touch()
    status, _, err = run("rows.hdf5", "--task", "line-singletask-v0")
    assert status == 2 and "--task goes with a .npz file" in err
    monkeypatch.setitem(sys.modules, "ogbench", None)
    status, _, err = run(write(), "--task", "line-singletask-v0")
    assert status == 1 and "pip install -r requirements.txt ogbench" in err and err.count("\n") == 1


def test_ogbenchs_own_loader_and_rewards(run):
    ogbench = pytest.importorskip("ogbench", reason="an optional package")
    rng, n = np.random.default_rng(0), 300
    places = rng.uniform(0, 20, (n, 2)).astype(np.float32)
    arrays = {"observations": places, "qpos": places, "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32)}
    for end in ("", "-val"):
        np.savez(f"maze{end}.npz", terminals=np.arange(n) % 30 == 29, **arrays)
    name = "pointmaze-medium-navigate-singletask-v0"
    _, expected, _ = ogbench.make_env_and_datasets(name, dataset_path="maze.npz")
    assert run("maze.npz", "--task", name)[0] == 0
    columns, metadata = stored()
    for key in ("observations", "actions", "rewards", "next_observations"):
        assert np.array_equal(np.float32(columns[key]), expected[key])
    assert (expected["masks"] == 0).tolist() == columns["terminals"] and 0 < sum(columns["terminals"]) < 50
    ends = np.array(columns["terminals"]) | columns["timeouts"]
    assert np.array_equal(ends, (expected["terminals"] == 1) | (expected["masks"] == 0))
    assert metadata["environment"]["id"] == "pointmaze-medium-singletask-v0"
