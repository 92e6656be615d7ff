"""benchmarks/import_data.py: every transition is in the dataset, in order, or counted; bad data give one line."""

import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import warnings
from pathlib import Path

import common
import gymnasium as gym
import h5py
import minari
import numpy as np
import pandas as pd
import pytest
from conftest import contents, store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

from benchmarks import import_data

ID = "test/new-v0"
FILES = {  # some of every rule by which D4RL named its files
    "halfcheetah-medium-expert-v2": "gym_mujoco_v2/halfcheetah_medium_expert-v2",
    "walker2d-full-replay-v1": "gym_mujoco_v1/walker2d_full_replay-v1",
    "hopper-medium-replay-v0": "gym_mujoco/hopper_mixed",
    "walker2d-medium-replay-v0": "gym_mujoco/walker_mixed",
    "bullet-hopper-medium-replay-v0": "bullet/bullet-hopper_medium_replay",
    "pen-human-v0": "hand_dapg/pen-v0_demos_clipped",
    "door-cloned-v0": "hand_dapg/door-demos-v0-bc-combined",
    "hammer-expert-v0": "hand_dapg/hammer-v0_expert_clipped",
    "relocate-human-v1": "hand_dapg_v1/relocate-human-v1",
    "antmaze-umaze-v0": "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse",
    "antmaze-large-diverse-v2": "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
    "maze2d-open-dense-v0": "maze2d/maze2d-open-dense",
    "maze2d-eval-large-dense-v1": "maze2d/maze2d-eval-large-dense-v1",
    "bullet-maze2d-large-v0": "bullet/bullet-maze2d-large-sparse",
    "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0",
    "carla-town-v0": "carla/carla_town_subsamp_flat-v0",
}
SCORES = {
    "hopper-full-replay-v2": (-20.272305, 3234.3), "halfcheetah-random-v0": (-280.178953, 12135.0),
    "walker2d-medium-v1": (1.629008, 4592.3), "ant-expert-v2": (-325.6, 3879.7), "antmaze-umaze-v2": (0, 1),
    "maze2d-large-v1": (6.7, 273.99), "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
    "maze2d-eval-large-v1": None, "carla-town-full-v0": None, "bullet-ant-expert-v0": (373.705955, 2650.495),
    "kitchen-mixed-v0": (0, 4), "pen-human-v1": (96.262799, 3076.8331017826877),
}  # fmt: skip
ENVIRONMENTS = {
    "halfcheetah-medium-v2": ("HalfCheetah-v5", 17, 6, 1000), "hopper-medium-v2": ("Hopper-v5", 11, 3, 1000),
    "walker2d-medium-v2": ("Walker2d-v4", 17, 6, 1000), "ant-medium-v2": ("Ant-v4", 27, 8, 1000),
    "pen-human-v1": ("AdroitHandPen-v1", 45, 24, 100), "door-human-v1": ("AdroitHandDoor-v1", 39, 28, 200),
    "hammer-human-v1": ("AdroitHandHammer-v1", 46, 26, 200),
    "relocate-human-v1": ("AdroitHandRelocate-v1", 39, 30, 200), "maze2d-umaze-v1": (None, 4, 2, None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr(import_data, "D4RL_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    return tmp_path / "minari"


@pytest.fixture
def run(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = 0
        try:
            import_data.main([*map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def columns(n=12, **changes):
    """n rows whose observations and rewards tell the row's number; None leaves a column out."""
    rows = np.arange(n, dtype=np.float32)
    made = {
        "observations": np.stack([rows, 10 * rows, rows / 7], axis=1),
        "actions": np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rows,
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def write(path="data.hdf5", n=12, **changes):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in columns(n, **changes).items():
            file[key] = value
        file["infos/action_log_probs"] = np.zeros(n)
    return path


def flags(n, *places):
    return np.isin(np.arange(n), places)


def place(name=ID):
    return minari.storage.get_dataset_path(name)


def read(name=ID):
    """(observations, actions, rewards, next_observations, terminals, timeouts), with the episodes' lengths."""
    columns = {path.stem: np.load(path) for path in place(name).glob("*.npy")}
    ends = columns["terminals"] | columns["timeouts"]
    assert ends[-1] and not (columns["terminals"] & columns["timeouts"]).any()
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return [columns[key] for key in keys], np.diff(np.flatnonzero(ends), prepend=-1).tolist()


def metadata(name=ID):
    return json.loads((place(name) / "metadata.json").read_text())


@given(data=st.data(), n=st.integers(2, 25), following=st.booleans(), flagged=st.booleans(), limit=st.integers(1, 8))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_transitions_are_those_of_a_slow_reading(run, data, n, following, flagged, limit):
    """Works out row by row which next states are known, what they are, and where an episode ends."""
    some = st.lists(st.integers(0, 3).map(lambda x: x == 0), min_size=n, max_size=n)
    terminals, timeouts, breaks = (np.array(data.draw(some)) for _ in range(3))
    table = columns(n, terminals=terminals, timeouts=timeouts if flagged else None)
    jumps = terminals | timeouts | breaks | flags(n, n - 1)
    if following:
        table["next_observations"] = np.where(jumps[:, None], -7, np.roll(table["observations"], -1, axis=0))
    episodes, dropped, since = [[]], 0, 0  # of (row, next observation, terminal) or, for a dropped row, (row,)
    for i in range(n):
        since += 1
        out = jumps[i] if following else timeouts[i] if flagged else since == limit
        ended = terminals[i] or out or i == n - 1
        known = following or terminals[i] or not ended
        state = table["next_observations" if following else "observations"][
            i if following or terminals[i] else (i + 1) % n
        ]
        episodes[-1].append((i, *state, terminals[i]) if known else (i,))
        dropped += not known
        if ended:
            since = 0
            episodes.append([])
    episodes.pop()
    stored = [kept for rows in episodes if (kept := [row for row in rows if len(row) > 1])]
    expected = [row for rows in stored for row in rows]

    write(**{"n": n, "timeouts": None} | table)
    status, out, err = run("data.hdf5", "--id", ID, "--force", f"--max_episode_steps={limit}")
    assert status == (0 if expected else 1), err
    assert (f"Dropped: {import_data.plural(dropped, 'row')}" in out) == (dropped > 0)
    if expected:
        (observations, actions, rewards, next_observations, terminations, timeouts), found = read()
        rows = [int(row[0]) for row in expected]
        assert found == [len(rows) for rows in stored]
        assert rewards.tolist() == rows and observations.tolist() == table["observations"][rows].tolist()
        assert actions.tolist() == table["actions"][rows].tolist()
        assert np.column_stack([rewards, next_observations, terminations]).tolist() == [
            [*map(float, x)] for x in expected
        ]
        assert {x.dtype for x in (observations, actions, rewards, next_observations)} == {np.dtype(np.float32)}
        assert (metadata()["transitions"], metadata()["episodes"]) == (len(rows), len(found))
        check_returns(episodes, stored)


def complete_returns(episodes):
    """Without the last one, if a longer one shows that it was cut short; None in place of one that has no rows left."""
    returns = [sum(row[0] for row in rows) if any(len(row) > 1 for row in rows) else None for rows in episodes]
    last = episodes[-1][-1]
    cut_short = not (len(last) > 1 and last[-1]) and len(episodes[-1]) < max(map(len, episodes))
    return returns[: len(returns) - cut_short]


def check_returns(episodes, stored):
    """The returns before rows were dropped are stored where they are not those of the stored rows."""
    file = place() / "episode_returns.npy"
    before = [x for x in complete_returns(episodes) if x is not None]
    assert file.exists() == (before != complete_returns(stored))
    assert not file.exists() or np.load(file).tolist() == before


def test_splits_and_what_is_missing_are_said(run):
    following = np.roll(columns()["observations"], -1, axis=0)
    following[4] = -1
    out = run(write(next_observations=following), "--id", ID)[1]
    assert "Split: 1 episode, where" in out and read()[1] == [5, 7]
    out = run(write(timeouts=None, terminals=flags(12, 2)), "--id", ID, "--force", "--max_episode_steps", 4)[1]
    assert "end after 4 steps" in out and "Dropped: 3 rows" in out and "of 1 terminal row:" in out
    assert read()[1] == [3, 3, 3] and "of 1 terminal row:" in " ".join(metadata()["notes"])


@pytest.mark.parametrize(
    ("options", "changes", "low", "high", "source"),
    [
        ([], {}, [-1, -1], [1, 1], "the data fit these bounds"),
        (["--action_low=-3", "--action_high", "3", "4"], {}, [-3, -3], [3, 4], "as given"),
        ([], {"action_low": -2.0, "action_high": [2.0, 5.0]}, [-2, -2], [2, 5], "as given"),
        ([], {"actions": np.float32([-5, 20])[np.arange(12) % 2] + 0.5}, [-4.5], [20.5], "the data's range"),
        (["--eval_env=Pendulum-v1"], {"actions": np.full(12, 1.5)}, [-2], [2], "the environment's"),
        (["--eval_env=CartPole-v1"], {"actions": np.ones(12), "observations": np.zeros((12, 4))}, [0], [1],
         "the environment's"),
        ([], {"actions": np.arange(12) % 3 + 4}, [4], [6], "the data's range"),
        ([], {"actions": np.arange(12.0)[:, None] % 3}, [0], [2], "--action_kind continuous"),
        (["--action_low=0", "--action_high=9"], {"actions": np.arange(12) % 3}, [0], [9], "--action_kind continuous"),
        (["--action_kind=continuous"], {"actions": np.arange(12) % 3}, [0.0], [2.0], "the data's range"),
        ([], {"actions": np.stack([np.arange(12) % 2 - 1, np.arange(12) % 3], axis=1)}, [-1, 0], [0, 2],
         "MultiDiscrete"),
        ([], {"actions": np.arange(12) % 5 + 20_000_000}, [20_000_000], [20_000_004], "20000000 to 20000004"),
    ],
)  # fmt: skip
def test_bounds_and_kinds_of_actions(options, changes, low, high, source, run):
    status, out, err = run(write(**changes), "--id", ID, *options)
    assert status == 0 and source in out, err
    stored = metadata()
    assert (stored["action_low"], stored["action_high"]) == (low, high) and source in " ".join(stored["notes"])
    actions, expected = read()[0][1], columns(**changes)["actions"][:11]
    assert actions.dtype == (np.int64 if stored["actions"] == "discrete" else np.float32)
    assert actions.shape == (11, len(low)) and np.array_equal(actions.ravel(), expected.ravel())
    assert "encoding" not in stored


def test_environment_and_scores_of_a_file(run):
    name = write(terminals=flags(12, 5), actions=np.linspace(-1, 1, 12))
    assert run(name, "--id", ID)[0] == 0
    assert not metadata().keys() & {"environment", "reference_scores"}
    scores = ["--ref_min_score=-1", "--ref_max_score=2.5"]
    assert run(name, "--id", ID, "--force", "--eval_env=Pendulum-v1", "--max_episode_steps=7", *scores)[0] == 0
    assert metadata()["environment"] == {"id": "Pendulum-v1", "max_episode_steps": 7, "wrappers": []}
    assert metadata()["reference_scores"] == [-1, 2.5]
    assert run(name, "--id", ID, "--force", *scores)[0] == 0 and metadata()["reference_scores"] == [-1, 2.5]
    source = metadata()["source"]
    assert source["files"] == [name] and source["sha256"] == hashlib.sha256(Path(name).read_bytes()).hexdigest()
    assert source["command"].startswith("import_data.py data.hdf5 --id")


def test_an_environment_of_a_module_is_stored_without_the_module(run, tmp_path, monkeypatch):
    Path("pendulum_module.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Mine-v0', gym.spec('Pendulum-v1').entry_point, max_episode_steps=9, kwargs={'g': 2.0})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = write(actions=np.linspace(-1, 1, 12))
    status, out, err = run(name, "--id", ID, "--eval_env=pendulum_module:Mine-v0")
    gym.registry.pop("Mine-v0")
    assert status == 0 and "--eval_env pendulum_module:Mine-v0." in out, err
    environment = {"g": 2.0, "id": "Mine-v0", "max_episode_steps": 9, "wrappers": []}
    assert metadata()["environment"] == environment and metadata()["action_low"] == [-2]
    status, out, err = run(name, "--id", ID, "--force", "--eval_env=no_such_module:Mine-v0")
    assert status == 1 and "no_such_module" in err and "PYTHONPATH=." in err and err.count("\n") == 1
    status, out, err = run(name, "--id", ID, "--force", "--eval_env=Mine-v0")
    assert status == 1 and "--eval_env MODULE:Mine-v0" in err and err.count("\n") == 1


def test_names_of_d4rl():
    known = common.d4rl()
    assert len(known) == len({dataset.file for dataset in known.values()}) == 154
    assert {name: known[name].file for name in FILES} == FILES
    assert {name: known[name].scores for name in SCORES} == SCORES
    assert len({dataset.scores for dataset in known.values()} - {None}) == 31
    assert [known[name].max_episode_steps for name in ("hopper-medium-v2", "maze2d-eval-large-v1")] == [1000, 800]
    assert import_data.d4rl_domain("locomotion")[:2] == ["ant-expert-v2", "ant-full-replay-v2"]
    assert len(import_data.d4rl_domain("locomotion")) == 24


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_name_of_d4rl(name, run, tmp_path):
    env_id, n_observations, n_actions, steps = ENVIRONMENTS[name]
    file = common.d4rl()[name].file.split("/")[1]
    changes = {"observations": np.ones((12, n_observations)), "actions": np.full((12, n_actions), 0.5)}
    write(tmp_path / "d4rl" / f"{file}.hdf5", **changes)
    assert run(name)[0] == 0
    dataset = f"d4rl/{name}"
    environment = metadata(dataset).get("environment", {"id": None, "max_episode_steps": None})
    assert (environment["id"], environment["max_episode_steps"]) == (env_id, steps)
    assert metadata(dataset)["reference_scores"] == [*common.d4rl()[name].scores]
    status, _, err = run(name)
    assert status == 1 and "--force" in err and run(name, "--force", "--eval_env=none")[0] == 0
    assert "environment" not in metadata(dataset) and "reference_scores" in metadata(dataset)


def test_minaris_own_namespace_keeps_its_note(run, root, tmp_path):
    (root / "d4rl").mkdir(parents=True)  # as Minari's D4RL/ looks on a disk that ignores case
    note = root / "d4rl" / "namespace_metadata.json"
    note.write_text('{"description": "theirs"}')
    write(tmp_path / "d4rl" / "maze2d-umaze-sparse-v1.hdf5")
    assert run("maze2d-umaze-v1")[0] == 0 and json.loads(note.read_text()) == {"description": "theirs"}
    assert run(write(), "--id", "aa/bb/cc-v0")[0] == 0 and (root / "aa/bb/cc-v0/metadata.json").exists()
    assert minari.list_local_datasets() == {}  # Minari's tools pass over the folders


def test_missing_files_are_downloaded_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(import_data, "D4RL_URL", (tmp_path / "server").as_uri())
    (tmp_path / "server").mkdir()
    names = import_data.d4rl_domain("maze2d")
    for name in names:
        write(tmp_path / "server" / f"{common.d4rl()[name].file}.hdf5", observations=np.ones((12, 4)))
    assert run("--all", "maze2d")[0] == 0
    assert {path.parent.name for path in (tmp_path / "minari").rglob("metadata.json")} == {*names}
    shutil.rmtree("server")
    assert run("--all", "maze2d")[0] == run("maze2d-umaze-v1", "--force")[0] == 0
    assert {path.suffix for path in (tmp_path / "d4rl").iterdir()} == {".hdf5"}


@pytest.mark.parametrize("fault", ["short", "page", "empty", "missing", "silent", "nobody"])
def test_failed_download_leaves_nothing_and_says_what_to_do(fault, run, root, tmp_path, monkeypatch):
    assert import_data.READ_SECONDS == 10
    monkeypatch.setattr(import_data, "READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"silent": silent.getsockname()[1], "nobody": 9}
        url = f"http://127.0.0.1:{ports[fault]}" if fault in ports else (tmp_path / "server").as_uri()
        monkeypatch.setattr(import_data, "D4RL_URL", url)
        path = write(tmp_path / "server" / f"{common.d4rl()['hopper-medium-v2'].file}.hdf5", n=5000)
        body = path.read_bytes()
        path.write_bytes({"short": body[:-1], "page": b"<html>moved</html>", "empty": b""}.get(fault, body))
        if fault == "missing":
            path.unlink()
        result = run("hopper-medium-v2")
    place = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    refused(result, 1, [str(place), url, "hopper-medium-v2"], root)
    assert [*place.parent.iterdir()] == []


# ------------------------------------------------------------------------------------------------------ tables

TABLE = pd.DataFrame({
    "customer": ["b", "a", "b", "a", "b", "c"],
    "time": ["2024-01-02", "2024-01-09 10:00", "2024-01-01", "2024-01-09 09:00", "2024-01-10", "2023-05-05"],
    "x_spend": [1.0, 3.0, 0.0, 2.0, 2.5, 9.0],
    "x_visits": [11, 13, 10, 12, 14, 19],
    "country": ["DE", "FR", "DE", "FR", "AT", "AT"],
    "vip": [True, False, False, True, True, False],
    "offer": ["mail", "none", "none", "call", "mail", "none"],
    "profit": [0.5, 1.5, 0.25, 2.5, -1.0, 7.0],
    "left": [0, 1, 0, 0, 0, 1],
})  # fmt: skip
OPTIONS = {
    "--id": [ID], "--episode": ["customer"], "--step": ["time"], "--observations": ["x_*", "country", "vip"],
    "--actions": ["offer"], "--reward": ["profit"], "--terminal": ["left"],
}  # fmt: skip


def table_run(run, table=TABLE, name="table.csv", **changes):
    if name.endswith("csv"):
        table.to_csv(name, index=False)
    else:
        pytest.importorskip("pyarrow")
        table.to_parquet(name)
    options = OPTIONS | {f"--{key}": value for key, value in changes.items()}
    return run(name, *(word for key, words in options.items() if words is not None for word in (key, *words)))


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_of_logged_data(name, run):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    table = TABLE if name.endswith("csv") else TABLE.assign(time=pd.to_datetime(TABLE.time, format="ISO8601"))
    status, out, err = table_run(run, table, name)
    assert status == 0 and "Dropped: 1 row without" in out and "0 is call, 1 is mail, 2 is none" in out, err
    (observations, actions, rewards, following, terminals, timeouts), lengths = read()
    assert "typically" in out
    rows = {i: [*TABLE[["x_spend", "x_visits"]].loc[i], *(TABLE.country[i] == x for x in ("AT", "DE", "FR")),
                not TABLE.vip[i], TABLE.vip[i]] for i in TABLE.index}  # fmt: skip
    assert lengths == [2, 2, 1]  # of b, whose last row is not known to be its end, a, and c
    assert observations.tolist() == [rows[i] for i in (2, 0, 3, 1, 5)]
    assert following.tolist() == [rows[i] for i in (0, 4, 1, 1, 5)]
    assert actions.tolist() == [[2], [1], [0], [2], [2]] and rewards.tolist() == [0.25, 0.5, 2.5, 1.5, 7]
    assert terminals.tolist() == [0, 0, 0, 1, 1] and timeouts.tolist() == [0, 1, 0, 0, 0]
    stored = metadata()
    assert stored["encoding"] == {
        "observations": [
            {"name": "x_spend", "offset": 0.0}, {"name": "x_visits", "offset": 0.0},
            {"name": "country", "values": ["AT", "DE", "FR"]}, {"name": "vip", "values": ["False", "True"]},
        ],
        "actions": [{"name": "offer", "values": ["call", "mail", "none"], "low": 0}],
    }  # fmt: skip
    assert (stored["action_low"], stored["action_high"], stored["actions"]) == ([0], [2], "discrete")
    assert np.load(place() / "episode_returns.npy").tolist() == [-0.25, 4, 7]  # with the dropped row's reward of -1


def test_a_table_with_numbers_as_actions(run):
    table = TABLE.assign(time=[2, 10, 1, 9, 3, 1], a_0=np.linspace(0, 50, 6), a_1=0.5, end=[0, 0, 1, 0, 0, 0])
    bounds = {"action_low": ["0"], "action_high": ["50", "1"], "observations": ["*"], "timeout": ["end"]}
    status, _, err = table_run(run, table, actions=["a_*"], **bounds)
    assert status == 0, err
    (observations, actions, *_), lengths = read()
    assert lengths == [1, 2, 1] and actions.tolist() == [[0, 0.5], [30, 0.5], [10, 0.5], [50, 0.5]]
    assert (metadata()["action_low"], metadata()["action_high"]) == ([0, 0], [50, 1]) and observations.shape == (4, 10)
    entry = {"name": "a_1", "offset": 0.0, "low": 0.0, "high": 1.0}
    assert metadata()["encoding"]["actions"][1] == entry
    assert [x["name"] for x in metadata()["encoding"]["observations"]][:2] == ["x_spend", "x_visits"]
    assert table_run(run, table, step=None, force=[])[0] == 0 and read()[0][2].tolist() == [0.5, 0.25, 1.5, 7]


SIX = np.array([0, 1, 2, 3, 4, 6])
EXACT = {  # values of x_spend, and what is stored
    "seconds since 1970": (1_700_000_000 + 3600 * np.arange(6), 1_700_010_000.0, 3600 * np.arange(6) - 10_000),
    "fractions of seconds": (1_700_000_000.5 + np.arange(6), 1_700_000_003.0, np.arange(6) - 2.5),
    "a far sensor": (1e6 + SIX + 0.3, 1_000_003.0, SIX - 2.7),
    "two blocks of seconds": (1_600_000_000 + 2 * 10**7 * (SIX % 2) + SIX, 1_610_000_000.0,
                              2 * 10**7 * (SIX % 2) + SIX - 10**7),
    "a narrow band": (433.92 + 1e-5 * SIX, 433.92003, 1e-5 * SIX - 3e-5),
    "a constant": ([1_700_000_001] * 6, 1_700_000_001.0, [0] * 6),
    "numbers that float32 holds": (2**30 + 256 * np.arange(6), 0.0, 2**30 + 256 * np.arange(6)),
    "a wide range": (10**9 * np.arange(1, 7) + 1, 0.0, np.float32(10**9 * np.arange(1, 7) + 1)),
    "a tiny constant range": (0.1 + 1e-12 * np.arange(6), 0.0, np.float32([0.1] * 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_offsets_keep_numbers_apart_that_float32_would_merge(case, run):
    values, offset, stored = EXACT[case]
    table = TABLE.assign(x_spend=values, customer="a", left=[0] * 5 + [1])
    status, out, err = table_run(run, table, observations=["x_spend"], step=None)
    assert status == 0 and (f"x_spend is stored minus {offset:.15g}" in out) == (offset != 0), err
    assert metadata()["encoding"]["observations"] == [{"name": "x_spend", "offset": offset}]
    found = np.float64(read()[0][0].ravel())
    assert found == pytest.approx(np.float64(stored), rel=1e-6, abs=1e-12)
    if offset:
        assert found + offset == pytest.approx(np.float64(values), rel=0, abs=1e-6 * np.ptp(values))


def test_whole_numbers_that_no_offset_keeps_apart_are_refused(run, root):
    """The time of the last visit, where 0 means never."""
    table = TABLE.assign(x_spend=[0, 1_700_000_000, 1_700_000_001, 1_700_000_002, 1_700_000_003, 0])
    refused(table_run(run, table), 1, ["column x_spend", "makes numbers equal"], root)


def test_truth_values_as_actions_stay_truth_values(run):
    assert table_run(run, actions=["vip"], observations=["x_*"])[0] == 0
    (entry,) = metadata()["encoding"]["actions"]
    assert entry == {"name": "vip", "values": [False, True], "low": 0} and entry["values"][1] is True
    other = ["--id", "test/like-v0"]
    assert table_run(run, actions=None, observations=None, like=[ID], id=other[1:])[0] == 0
    assert metadata(other[1])["encoding"]["actions"] == [entry]


def test_an_offset_and_an_environment_exclude_each_other(run, root):
    """The environment would be shown numbers that the policy has never met, or do what it did not say."""
    table = TABLE.assign(a=[-2, 0.5, 1, 1, 1, 2], y=1.0)
    options = {"observations": ["x_spend", "x_visits", "y"], "actions": ["a"], "eval_env": ["Pendulum-v1"]}
    assert table_run(run, table, **options)[0] == 0 and metadata()["environment"]["id"] == "Pendulum-v1"
    shutil.rmtree(root)
    table["y"] = 1_700_000_000 + np.arange(6)
    refused(table_run(run, table, **options), 1, ["column y needs an offset", "Pendulum-v1", "--eval_env none"], root)


HZ = 433_050_000 + 290_001 * np.arange(6)
SET_POINTS = {  # actions, options, offset
    "Hz": (HZ + 0.5, {}, 434_000_000.0),
    "Hz, whole": (HZ, {"action_kind": ["continuous"]}, 434_000_000.0),
    "Hz, bounds": (HZ + 0.5, {"action_low": ["433050000"], "action_high": ["434790000"]}, 434_000_000.0),
    "Hz, one value": ([433_920_000.5] * 6, {"action_low": ["433050000"], "action_high": ["434790000"]}, 434_000_000.0),
    "Hz, narrow": (433_920_000.5 + np.arange(6), {}, 433_920_003.0),
    "MHz": (HZ / 1e6, {}, 0.0),
    "MHz, bounds": (HZ / 1e6, {"action_low": ["433.05"], "action_high": ["434.79"]}, 0.0),
    "MHz, narrow": (433.92 + 1e-6 * SIX, {}, 433.920003),
}


@pytest.mark.parametrize("case", SET_POINTS)
def test_set_points_are_actions(case, run):
    actions, options, offset = SET_POINTS[case]
    table = TABLE.assign(a=actions, customer="a", left=[0] * 5 + [1])
    status, out, err = table_run(run, table, actions=["a"], step=None, **options)
    assert status == 0 and (f"a is stored minus {offset:.10g}" in out) == (offset != 0), err
    (entry,), stored = metadata()["encoding"]["actions"], np.float64(read()[0][1].ravel())
    low, high = (
        float(options.get(key, [x])[0]) for key, x in (("action_low", min(actions)), ("action_high", max(actions)))
    )
    assert entry == {"name": "a", "offset": pytest.approx(offset, rel=1e-14), "low": low, "high": high}
    assert metadata()["action_low"][0] == np.float32(low - entry["offset"]) < metadata()["action_high"][0]
    assert stored + entry["offset"] == pytest.approx(
        np.float64(actions), rel=0, abs=1e-6 * (high - low) if offset else 4e-5
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observations": np.stack([np.arange(12), 1.7e9 + np.arange(12)], axis=1)}, ["observations[1]", "1700000011"]),
        ({"observations": np.stack([np.arange(12), 1_700_000_000 + np.arange(12)], axis=1)}, ["observations[1]"]),
        ({"next_observations": np.full((12, 3), 1.7e9) + np.arange(12)[:, None]}, ["next_observations[0]"]),
        ({"rewards": 1.7e9 + np.arange(12)}, ["rewards"]),
        ({"actions": 433_050_000 + 1000.5 * np.arange(12)}, ["actions[0]", "subtract"]),
        ({"actions": 433.92 + 1e-6 * np.arange(12)}, ["actions[0]", "subtract"]),
        ({"actions": np.full(12, 433e6), "action_low": 433e6, "action_high": 434e6 + 1}, ["actions[0]", "subtract"]),
    ],
)
def test_an_hdf5_file_with_numbers_that_float32_merges_is_refused(changes, words, run, root):
    refused(run(write(**changes), "--id", ID), 1, ["float32 has too few digits", *words], root)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, np.uint8, bool])
def test_an_hdf5_file_has_numbers_of_any_type(kind, run):
    values = np.arange(12).reshape(6, 2) % 2
    assert run(write(n=6, observations=values.astype(kind)), "--id", ID)[0] == 0
    assert read()[0][0].tolist() == values[:5].tolist()
    assert run(write(n=6, actions=433.05 + np.arange(6) / 5, action_low=433.05, action_high=434.79), "--id", ID,
               "--force")[0] == 0  # fmt: skip


SPARSE = {  # columns of actions, their numbers, the tables of values
    "three": ([[1001, 4711, 250000] * 2], [[0, 1, 2] * 2], [[1001, 4711, 250000]]),
    "two": ([[1, 90000] * 3], [[0, 1] * 3], [[1, 90000]]),
    "signs": ([[-1.0, 1.0] * 3], [[0, 1] * 3], [[-1, 1]]),
    "no holes": ([[5, 7, 6] * 2], [[5, 7, 6] * 2], [[5, 6, 7]]),
    "two columns": ([[1, 90000] * 3, [4, 5, 6] * 2], [[0, 1] * 3, [4, 5, 6] * 2], [[1, 90000], [4, 5, 6]]),
}


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_codes_of_actions_are_numbered(case, run):
    columns, stored, tables = SPARSE[case]
    columns, names = np.transpose(columns), [f"a_{i}" for i in range(len(stored))]
    table = TABLE.assign(**dict(zip(names, columns.T)), customer="a", left=[0] * 5 + [1])
    numbered = columns.tolist() != np.transpose(stored).tolist()
    out = table_run(run, table, actions=["a_*"], step=None)[1]
    assert ("numbered" in out) == numbered and "--action_kind continuous" in out
    low = [min(x) for x in stored]
    assert metadata()["encoding"]["actions"] == [
        {"name": x, "values": y, "low": z} for x, y, z in zip(names, tables, low)
    ]
    assert read()[0][1].T.tolist() == stored and read()[0][1].dtype == np.int64
    assert metadata()["action_low"] == low
    assert run(write(n=6, actions=columns, terminals=flags(6, 5)), "--id", ID, "--force")[0] == 0
    entries = [{"name": f"actions[{i}]", "values": y, "low": low[i]} for i, y in enumerate(tables)]
    assert metadata().get("encoding") == ({"observations": [], "actions": entries} if numbered else None)
    assert read()[0][1].T.tolist() == stored
    bounds = ["--action_low=-1", f"--action_high={columns.max()}", "--action_kind=discrete"]
    too_many = case in ("three", "two columns")
    assert run("data.hdf5", "--id", ID, "--force", *bounds)[0] == too_many
    assert too_many or "encoding" not in metadata() and read()[0][1].tolist() == columns.tolist()


DATES = {  # times of four rows; the order that they give, or words of the error
    "ISO 8601": ("2024-02-01 2024-01-03 2024-01-02T10:00 2024-01-02", [3, 2, 1, 0], ""),
    "months first": ("01/13/2024 01/02/2024 02/01/2024 03/01/2024", [1, 0, 2, 3], "is read month-first: '01/13/2024'"),
    "days first": ("02/01/2024 01/02/2024 13/01/2024 01/03/2024", [0, 2, 1, 3], "is read day-first: '13/01/2024' in"),
    "dots": ("02.01.2024 01.02.2024 13.01.2024 01.03.2024", [0, 2, 1, 3], "is read day-first"),
    "dashes": ("02-01-2024_10:00 02-01-2024_09:00 13-01-2024_00:00 01-02-2024_00:00", [1, 0, 2, 3], "day-first"),
    "short": ("2/1/2024 1/2/2024 13/1/2024 1/3/2024", [0, 2, 1, 3], "is read day-first"),
    "years first": ("2024.02.01 2024.01.03 2024.03.02 2024.04.04", [1, 0, 2, 3], ""),
    "years first, hours": ("2024-02-01_9h 2024-01-03_9h 2024-03-02_9h 2024-04-04_9h", [1, 0, 2, 3], ""),
    "names of months": ("2_Jan_2024 1_Feb_2024 3_Jan_2024 1_Mar_2024", [0, 2, 1, 3], ""),
    "either": ("01/01/2024 02/02/2024 01/01/2024 03/03/2024", [0, 2, 1, 3], "gives the same order"),
    "both": ("02/01/2024 01/02/2024 03/03/2024 04/04/2024", None, ["day-first and month-first", "--day_first True"]),
    "both, dots": ("2.1.2024 1.2.2024 3.3.2024 4.4.2024", None, ["--day_first True"]),
    "neither": ("13/01/2024 01/13/2024 03/03/2024 04/04/2024", None, ["'01/13/2024' in row 1"]),
    "two-digit years": ("02/01/24 01/02/24 13/01/24 01/03/24", None, ["'02/01/24' in row 0", "2024-01-31"]),
    "some ISO": ("02/01/2024 13/01/2024 2024-01-15 04/04/2024", None, ["'2024-01-15' in row 2"]),
    "some others": ("2024-01-15 2024-01-16 2024-01-15 04/04/2024", None, ["'04/04/2024' in row 3"]),
    "some numbers": ("2024-01-15 2024-01-16 17 2024-01-18", None, ["text among numbers, '2024-01-15' in row 0"]),
    "some years": ("2024-01-15 2024-01-16 2024 2024-01-18", None, ["text among numbers"]),
    "no such day": ("30/01/2024 31/02/2024 01/02/2024 01/03/2024", None, ["'31/02/2024' in row 1"]),
    "zones": ("2024-01-02T10:00Z 2024-01-02T10:30+01:00 2024-01-02T11:00Z 2024-01-02T12:00+02:00", [1, 0, 3, 2], ""),
    "some zones": ("2024-01-02T10:00Z 2024-01-02T10:30 2024-01-02T11:00Z 2024-01-03", None, ["without a time zone"]),
    "decimal commas": ("0,5 1,5 2,5 3,5", None, ["column time holds '0,5' in row 0"]),
    "asked": ("02/01/2024 01/02/2024 03/03/2024 04/04/2024 --day_first=True", [0, 1, 2, 3], ""),
    "asked otherwise": ("02/01/2024 01/02/2024 03/03/2024 04/04/2024 --day_first=False", [1, 0, 2, 3], ""),
    "asked in vain": ("02/01/2024 13/01/2024 03/03/2024 04/04/2024 --day_first=False", None, ["'13/01/2024' in row 1"]),
    "asked of ISO 8601": ("2024-01-02 2024-01-03 2024-01-04 2024-01-05 --day_first=True", None, ["begin with"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
@pytest.mark.parametrize("case", DATES)
def test_steps_that_are_texts(case, name, run, root):
    """Those that can be read in two ways, in different orders, are refused."""
    times, order, words = DATES[case]
    times, _, day_first = times.partition(" --day_first=")
    times = [time.replace("_", " ") for time in times.split()]
    table = TABLE[:4].assign(time=times, customer="a", left=0, x_spend=range(4))
    result = table_run(run, table, name, observations=["x_spend"], **({"day_first": [day_first]} if day_first else {}))
    if order is None:
        return refused(result, 1, [name, *words], root)
    assert result[0] == 0 and words in result[1], result
    assert [*read()[0][0].ravel(), read()[0][3][-1, 0]] == order


def test_day_first_is_for_texts(run, root):
    table = TABLE.assign(time=range(6))
    refused(table_run(run, table, day_first=["True"]), 1, ["--day_first", "time holds integer"], root)
    refused(run(write(), "--id", ID, "--day_first", "True"), 2, ["--day_first", "tables"], root)
    refused(table_run(run, step=None, day_first=["True"]), 2, ["--day_first goes with --step"], root)


def test_steps_of_other_types(run, root):
    """Dates, times with a zone and durations of Parquet files; what is not a time is one line."""
    pytest.importorskip("pyarrow")
    days = pd.to_datetime(["2024-01-03", "2024-01-02", "2024-02-01", "2024-01-13"])
    kinds = [days, days.tz_localize("Europe/Berlin"), days.date, days - days[0], days.strftime("%Y%m%d").astype(int)]
    for kind in kinds:
        table = TABLE[:4].assign(time=kind, customer="a", left=0, x_spend=range(4))
        assert table_run(run, table, "table.parquet", observations=["x_spend"], force=[])[0] == 0
        assert [*read()[0][0].ravel(), read()[0][3][-1, 0]] == [1, 0, 3, 2]
    shutil.rmtree(root)
    for kind, words in (
        (days.time, "time"),
        ([{"a": 1}] * 4, "mixed"),
        ([True] * 4, "boolean"),
        (days.to_period("D"), "period"),
    ):
        table = TABLE[:4].assign(time=kind)
        refused(table_run(run, table, "table.parquet"), 1, ["neither numbers nor times", words], root)


def test_distances_between_steps_are_told(run):
    table = TABLE.assign(customer="a", left=0, time=[0, 1, 2, 2, 4, 104])
    out = table_run(run, table)[1]
    assert "Same step as the row before: 1 row," in out
    assert "Steps are typically 1 apart; 1 of 5 distances are more than twice that, the largest is 100." in out
    table = table.assign(time=pd.date_range("2024-01-01", periods=6, freq="36h").astype(str))
    assert "typically 1 days 12:00:00 apart; 0 of 5" in table_run(run, table, force=[])[1]
    assert "1 of 4 distances" in log_run(run, "--terminal end --step t")[1]  # none between two episodes


def test_series_that_are_merged_are_refused(run, root):
    """Rows of several plants lie between each other, though some are missing; an episode of each is well."""
    table = pd.concat([LOG.assign(plant=plant, gain=float(i)) for i, plant in enumerate("uvw")]).sort_values("t")
    options = "--terminal none --step t"
    refused(log_run(run, options, table), 1, ["18 of 18 rows have the same t", "--episode; else give a finer"], root)
    two = table[table.plant != "w"].drop_duplicates(["t", "plant"])[2:-1]
    for some in (two, two.assign(end=0)):
        refused(log_run(run, f"{options} --timeout end", some), 1, ["have the same t", "--episode;"], root)
    table["site"] = "a"
    refused(log_run(run, f"{options} --episode site", table), 1, ["as --episode too; else"], root)
    assert log_run(run, f"{options} --episode plant", table)[0] == 0 and read()[1] == [5, 5, 5]
    assert log_run(run, "--terminal all --step t", table)[0] == 0
    few = LOG.assign(t=[0, 0, 1, 2, 3, 4])
    assert "Same step as the row before: 1 row, left in the file's order." in log_run(run, options, few)[1]
    assert log_run(run, "--terminal end --step t", LOG.assign(t=0, end=1))[0] == 0


def test_distances_that_depend_on_the_reading_of_dates_are_refused_as_gaps(run, root):
    """Both readings give one order, but other gaps."""
    times = ["01/02/2024 10:00", "01/02/2024 10:10", "02/02/2024 10:00", "02/02/2024 10:10", "05/05/2024 9:00"]
    table = LOG[:5].assign(t=times)
    options = "--terminal none --step t"
    assert "same order day-first and month-first" in log_run(run, options, table)[1]
    shutil.rmtree(root)
    words = ["with different distances, which --max_gap compares", "--day_first True"]
    refused(log_run(run, f"{options} --max_gap 3d", table), 1, words, root)
    for reading, lengths in (("True", [3]), ("False", [1, 1])):
        assert log_run(run, f"{options} --max_gap 3d --day_first {reading}", table)[0] == 0 and read()[1] == lengths
    one_day = table.assign(t=[f"01/02/2024 1{i}:00" for i in range(5)])
    assert log_run(run, f"{options} --max_gap 2h", one_day)[0] == 0 and read()[1] == [4]


def csv_run(run, text, **changes):
    Path("table.csv").write_text(text)
    options = {"episode": "e", "observations": "x", "actions": "a", "reward": "r", "terminal": "d"} | changes
    return run("table.csv", "--id", ID, "--force", *(f"--{key}={value}" for key, value in options.items()))


ROWS = "e,x,a,r,d\n1,{},u,0.5,0\n1,{},v,0.25,1\n"
CSV = {  # text; observations or words of the error; options
    "numbers": (ROWS.format("1.5", "-2e3"), [[1.5], [-2000]], {}),
    "texts that pandas takes for empty": (ROWS.format("NA", "None"), [[1, 0], [0, 1]], {}),
    "more of them": (ROWS.format("null", "nan"), [[0, 1], [1, 0]], {}),
    "NA among numbers": (ROWS.format("1.5", "NA"), ["text among numbers, 'NA' in row 1"], {}),
    "nan among numbers": (ROWS.format("nan", "1.5"), ["text among numbers, 'nan' in row 0"], {}),
    "an empty field": (ROWS.format("", "1"), ["x is empty in row 0"], {}),
    "semicolons": (ROWS.replace(",", ";").format("1.5", "2"), [[1.5], [2]], {}),
    "tabs": (ROWS.replace(",", "\t").format("1.5", "2"), [[1.5], [2]], {}),
    "decimal commas": (ROWS.replace(",", ";").format("1,5", "2"), ["x holds '1,5' in row 0", "--decimal ,"], {}),
    "decimal commas alone": (ROWS.replace(",", ";").format("1,5", "2,5"), ["x holds '1,5'", "--decimal ,"], {}),
    "decimal commas, tabs": (ROWS.replace(",", "\t").format("2", "1,5"), ["x holds '1,5' in row 1", "--decimal ,"], {}),
    "taken": (ROWS.replace(",", ";").format("1,5", "2").replace(".", ","), [[1.5], [2]], {"decimal": ","}),
    "in quotes": (ROWS.format('"1,5"', '"2,5"').replace("0.5", "1").replace("0.25", "2"), [[1.5], [2.5]],
                  {"decimal": ","}),
    "no quotes": (ROWS.format("1,5", "2,5"), ["more fields"], {}),
    "no quotes in one row": (ROWS.format("1.5", "2,5"), ["line 3"], {}),
    "points, too": (ROWS.replace(",", ";").format("1.5", "2"), ["x holds '1.5'", "with --decimal ,"], {"decimal": ","}),
    "thousands": (ROWS.format('"1,234.5"', "2"), ["x holds '1,234.5'", "separators of thousands"], {}),
    "thousands alone": (ROWS.format('"1,234"', '"5,678"'), ["x holds '1,234'", "separators of thousands"], {}),
    "thousands, points": (ROWS.replace(",", ";").format("1.234,5", "2").replace("0.", "0,"), ["x holds '1.234,5'"],
                          {"decimal": ","}),
    "thousands, spaces": (ROWS.format("1 234", "2 345"), ["x holds '1 234'", "separators of thousands"], {}),
    "twenty digits": (ROWS.format("12345678901234567890123", "1"), ["x holds '12345678901234567890123'"], {}),
    "actions with commas": (ROWS.replace(",", ";").replace("u", "1,5").replace("v", "2,5").format("1", "2"),
                            ["a holds '1,5'", "--decimal ,"], {}),
    "two columns of one name": (ROWS.replace("e,x,a", "x,x,a").format("1", "2"), ["several columns are named x"],
                                {"episode": "a"}),
    "a line for spreadsheets": ("sep=;\n" + ROWS.replace(",", ";").format("1", "2"), ["'sep='", "remove it"], {}),
    "that line, commas": ("sep=,\n" + ROWS.format("1", "2"), ["'sep='", "remove it"], {}),
    "bars": (ROWS.replace(",", "|").format("1", "2"), ["'e|x|a|r|d', has one column", "semicolons or tabs"], {}),
    "spaces": (ROWS.replace(",", " ").format("1", "2"), ["'e x a r d', has one column"], {}),
    "an index": ("," + ROWS.format("1", "2").replace("\n1", "\n0,1"), [[1], [2]], {}),
    "episodes as observations": (ROWS.format("1", "2"), [[1], [1]], {"observations": "e"}),
    "thousands in one row": (ROWS.format('"1,000"', "950"), ["x holds '1,000'", "separators of thousands"], {}),
    "percent": (ROWS.format("10%", "5%"), ["x holds '10%' in row 0", "no signs but + and -"], {}),
    "money": (ROWS.format("1.50", "€ 2"), ["x holds '€ 2' in row 1", "no signs but + and -"], {}),
    "a typographer's minus": (ROWS.format("1.5", "\u22122"), ["x holds '\u22122' in row 1"], {}),
    "leading zeros": (ROWS.format("0012", "12"), ["column x has leading zeros, '0012' in row 0"], {}),
    "leading zeros of actions": (ROWS.format("1", "2").replace("u", "001").replace("v", "2"),
                                 ["column a has leading zeros, '001' in row 0"], {}),
    "a zero and fractions": (ROWS.format("0", "0.5"), [[0], [0.5]], {}),
    "codes of episodes": (ROWS.format("1", "2").replace("\n1,2", "\n01,2"), [[2]], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CSV)
def test_fields_of_a_csv_file(case, run, root):
    text, expected, options = CSV[case]
    result = csv_run(run, text, **options)
    if isinstance(expected[0], str):
        return refused(result, 1, ["table.csv", *expected], root)
    assert result[0] == 0 and read()[0][0].tolist() == expected, result


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("table.csv", ROWS.encode("utf-16"), "UTF-8"), ("table.csv", "e,x\nä,ö\n".encode("latin-1"), "UTF-8"),
     ("table.xlsx", b"PK", "export the sheet as CSV")],
)  # fmt: skip
def test_files_that_are_no_utf8_text_are_one_line(name, content, words, run, root):
    Path(name).write_bytes(content)
    options = ["--episode=e", "--observations", "x", "--actions=a", "--reward=r", "--terminal=d"]
    refused(run(name, "--id", ID, *options), 1, [name, words], root)


def test_the_last_digit_of_a_csv_file_is_read(run):
    """pandas' quickest reading of such numbers is wrong in it."""
    lowest = "438.36775542618835"
    assert csv_run(run, ROWS.format("1", "2").replace("u", lowest).replace("v", "463.69616873214545"))[0] == 0
    assert repr(metadata()["encoding"]["actions"][0]["low"]) == lowest


def test_a_late_text_is_seen_in_a_long_csv_file(run, root):
    """pandas reads long files in parts, whose columns may be of different types."""
    n = 20_000
    rows = {"e": range(n), "x": [*range(n - 1), "NA"], "y": ["True"] * (n - 1) + ["maybe"], "a": "u", "r": 0.5, "d": 1}
    rows |= {f"z_{i}": 1 for i in range(60)}  # parts of a wide file have fewer rows
    text = pd.DataFrame(rows).to_csv(index=False)
    refused(csv_run(run, text), 1, [f"x has text among numbers, 'NA' in row {n - 1}"], root)
    refused(csv_run(run, text.replace("NA", "1,5")), 1, [f"line {n + 1}"], root)
    assert csv_run(run, text, observations="y")[0] == 0
    assert metadata()["encoding"]["observations"] == [{"name": "y", "values": ["True", "maybe"]}]


LIKE = {"id": ["test/like-v0"], "like": [ID], "observations": None, "actions": None}
LIKE_TABLES = {  # changes of the later table; observations of the first stored row, or words of the error
    "the same": ({}, {}, [0, 10, 0, 1, 0, 1, 0]),
    "fewer categories": ({"country": "FR", "offer": "none"}, {}, [0, 10, 0, 0, 1, 1, 0]),
    "columns named again": ({}, {"observations": ["vip", "x_*", "country"], "actions": ["offer"]},
                            [0, 10, 0, 1, 0, 1, 0]),
    "other columns": ({}, {"observations": ["x_*"]}, ["--observations names x_spend, x_visits"]),
    "a missing column": ({"country": None}, {}, ["lacks country"]),
    "a missing action": ({"offer": None}, {}, ["lacks offer, actions"]),
    "a new category": ({"country": list("AABAAA")}, {}, ["country holds 'A' (5 rows), 'B' (1 row)", "--unseen other"]),
    "a new category, taken": ({"country": "CH"}, {"unseen": ["other"]}, [0, 10, 0, 0, 0, 1, 0]),
    "numbers for categories": ({"country": 7}, {}, ["country holds '7' (6 rows)"]),
    "text for numbers": ({"x_spend": list("abcdef")}, {}, ["x_spend holds text"]),
    "far numbers": ({"x_spend": 1_700_000_000 + np.arange(6)}, {}, ["x_spend runs from"]),
    "a far number": ({"x_spend": 1_700_000_001}, {}, ["x_spend runs from"]),
    "a new action": ({"offer": "fax"}, {"unseen": ["other"]}, ["offer holds 'fax' (6 rows)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LIKE_TABLES)
def test_a_table_is_encoded_like_another(case, run, root):
    changes, options, expected = LIKE_TABLES[case]
    assert table_run(run)[0] == 0
    table = TABLE.assign(**changes).drop(columns=[key for key, value in changes.items() if value is None])
    result = table_run(run, table, "new.csv", **LIKE | options)
    if isinstance(expected[0], str):
        one_line(result, 1, ["new.csv", *expected])
        assert not place("test/like-v0").exists()
        return
    assert result[0] == 0, result
    stored = metadata("test/like-v0")
    same = ("encoding", "action_low", "action_high", "actions")
    assert {key: stored[key] for key in same} == {key: metadata()[key] for key in same}
    assert read("test/like-v0")[0][0][0].tolist() == expected
    assert ("'CH' (6 rows)" in result[1]) == ("unseen" in options)


def test_unseen_categories_become_other_where_the_dataset_has_it(run):
    assert table_run(run, TABLE.assign(country=["DE", "DE", "DE", "other", "AT", "AT"]))[0] == 0
    assert table_run(run, TABLE.assign(country=["CH", "DE", "DE", "DE", "AT", "US"]), **LIKE, unseen=["other"])[0] == 0
    observations = read("test/like-v0")[0][0]
    assert observations[:, 2:5].tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_actions_are_encoded_like_others(run, root):
    """Codes keep their numbers, set-points their offset and bounds; what the other dataset does not know is refused."""
    new = "test/like-v0"
    assert table_run(run, TABLE.assign(offer=[9, 5, 5, 7, 9, 5], left=1))[0] == 0
    assert table_run(run, TABLE.assign(offer=[5.0, 9, 9, 5, 5, 9], left=1), step=None, **LIKE)[0] == 0
    assert read(new)[0][1].ravel().tolist() == [0, 2, 0, 2, 0, 2] and metadata(new)["action_high"] == [2]
    one_line(table_run(run, TABLE.assign(offer=6), **LIKE, force=[]), 1, ["offer holds '6' (6 rows)", ID])
    assert table_run(run, TABLE.assign(offer=[5, 6, 7, 5, 6, 7], left=1), force=[])[0] == 0
    assert table_run(run, TABLE.assign(offer=6, left=1), **LIKE, force=[])[0] == 0
    assert read(new)[0][1].ravel().tolist() == [6] * 6 and metadata(new)["action_low"] == [5]
    one_line(table_run(run, TABLE.assign(offer=5.5), **LIKE, force=[]), 1, ["offer holds '5.5' (6 rows)"])
    hertz = {"action_low": ["433050000"], "action_high": ["434790000"], "force": []}
    assert table_run(run, TABLE.assign(offer=HZ + 0.5, left=1), **hertz)[0] == 0
    assert table_run(run, TABLE.assign(offer=434_000_003, left=1), **LIKE, force=[])[0] == 0
    assert read(new)[0][1].ravel().tolist() == [3] * 6 and metadata(new)["encoding"] == metadata()["encoding"]
    assert metadata(new)["action_low"] == [-950_000]
    one_line(table_run(run, TABLE.assign(offer=435_000_000), **LIKE, force=[]), 1, ["offer is 435000000 in row", ID])
    one_line(table_run(run, **LIKE, force=[]), 1, ["offer holds text"])
    one_line(run(write(), "--id", new, "--like", ID), 2, ["--like", "tables"])
    assert run(write(), "--id", ID, "--force")[0] == 0
    one_line(table_run(run, **LIKE, force=[]), 1, [ID, "no encoding"])
    new_part("test/first-v0")
    one_line(table_run(run, **LIKE | {"like": ["test/first-v0"]}, force=[]), 1, ["test/first-v0", "no encoding"])


BAD_TABLES = {
    "no such column": ({"reward": ["revenue"]}, {}, ["--reward revenue", "profit"]),
    "a pattern for one column": ({"reward": ["pro*"]}, {}, ["--reward pro*"]),
    "an empty pattern": ({"observations": ["y_*"]}, {}, ["--observations y_*", "x_spend"]),
    "the reward as observation": ({"observations": ["x_*", "profit"]}, {}, ["profit cannot be an observation"]),
    "a missing value": ({}, {"x_spend": [1, 2, None, 4, 5, 6]}, ["x_spend is empty in row 2"]),
    "infinity": ({}, {"x_spend": [1, 2, 3, np.inf, 5, 6]}, ["x_spend is inf in row 3"]),
    "text among numbers": ({}, {"x_spend": [1, 2, 3, 4, "five", 6]}, ["x_spend has text", "'five' in row 4"]),
    "text as reward": ({"reward": ["country"], "observations": ["x_*"]}, {}, ["country holds text"]),
    "a flag of 2": ({}, {"left": [0, 0, 0, 2, 0, 1]}, ["left is 2 in row 3", "0 or 1"]),
    "a flag of text": ({}, {"left": list("nnnnny")}, ["left is 'n'", "0 or 1"]),
    "steps of text": ({}, {"time": list("uvwxyz")}, ["time is neither numbers nor times"]),
    "times as observations": ({"observations": ["time"]}, {}, ["time holds times"]),
    "text and real actions": ({"actions": ["offer", "x_spend"], "observations": ["vip"]}, {}, ["mix text"]),
    "actions out of bounds": (
        {"actions": ["x_spend"], "observations": ["vip"], "action_low": ["0"], "action_high": ["5"]}, {},
        ["x_spend is 9 in row 5", "0 to 5"],
    ),
    "numbers that no offset keeps apart": (
        {}, {"x_spend": 1_700_000_000_000 + np.array([0, 1, 2, 3, 4, 3 * 10**9])},
        ["x_spend runs from 1700000000000 to 1703000000000", "coarser numbers"],
    ),
    "coarse rewards": ({}, {"profit": 1_700_000_000 + np.arange(6)}, ["column profit has numbers from", "subtract"]),
    "text actions and bounds": ({"action_low": ["0"], "action_high": ["2"]}, {}, ["column offer holds text"]),
    "text actions as real numbers": ({"action_kind": ["continuous"]}, {}, ["column offer holds text"]),
    "no known next observation": ({}, {"customer": range(6), "left": 0}, ["no transition"]),
    "no rows": ({}, TABLE.iloc[:0], ["no rows"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_bad_tables_are_one_line(fault, run, root):
    options, changes, words = BAD_TABLES[fault]
    table = changes if isinstance(changes, pd.DataFrame) else TABLE.assign(**changes)
    refused(table_run(run, table, **options), 1, ["table.csv", *words], root)


def one_line(result, expected, words):
    status, _, err = result
    assert status == expected and "error: " in err and err.count("\n") == 1, err
    assert all(word in err for word in words) and "Traceback" not in err, err


def refused(result, expected, words, root):
    one_line(result, expected, words)
    assert not [*root.rglob("*.json")]


# ------------------------------------------------------------------------------------- where episodes end

LOG = pd.DataFrame({
    "user": ["a", "a", "b", "b", "b", "a"], "visit": [1, 1, 1, 1, 2, 2], "t": [0, 1, 2, 3, 10, 11], "x": np.arange(6.0),
    "offer": ["u", "v", "u", "v", "u", "v"], "gain": [1.0, 2, 4, 8, 16, 32], "end": [0, 0, 1, 0, 0, 1],
    "cut": [0, 1, 0, 0, 0, 0], "next.done": [0, 1, 1, 0, 0, 1],
})  # fmt: skip
ENDS = {  # options; x of each stored episode, which of them end in a terminal row, words
    "a bandit": (
        "--terminal all",
        [[0], [1], [2], [3], [4], [5]],
        "tttttt",
        "6 rows, each an episode of its own (--terminal all), in the order of the file.",
    ),
    "a bandit's users": (
        "--terminal all --episode user --step t",
        [[0], [1], [5], [2], [3], [4]],
        "tttttt",
        "in the order of user, t.",
    ),
    "a plant": ("--terminal none", [[0, 1, 2, 3, 4]], "-", "6 rows, 1 episode, none terminal; steps: the file's order"),
    "a plant, sorted": ("--terminal none --step gain", [[0, 1, 2, 3, 4]], "-", "steps: 1.0 to 32.0"),
    "a plant that stopped": ("--terminal none --timeout cut", [[0], [2, 3, 4]], "--", "2 episodes ended by cut"),
    "flags alone": ("--terminal end", [[0, 1, 2], [3, 4, 5]], "tt", "2 episodes ended by end"),
    "flags of both kinds": (
        "--terminal end --timeout cut",
        [[0], [2], [3, 4, 5]],
        "-tt",
        "3 episodes ended by end or cut",
    ),
    "episodes without an end": ("--terminal none --episode user", [[0, 1], [2, 3]], "--", "2 episodes by user"),
    "two columns": ("--terminal none --episode user visit", [[0], [2]], "--", "4 episodes by user, visit"),
    "two columns, flags": (
        "--terminal end --episode visit user",
        [[0], [2], [5]],
        "-tt",
        "1 terminal row before the last",
    ),
    "gaps": ("--terminal none --step t --max_gap 5", [[0, 1, 2], [4]], "--", "Episodes end at 1 gap above 5."),
    "gaps of episodes": (
        "--terminal end --step t --episode user --max_gap 6",
        [[0], [5], [2]],
        "-tt",
        "at 2 gaps above 6",
    ),
    "done, without time-outs": (
        "--terminal next.done --timeout none",
        [[0, 1], [2], [3, 4, 5]],
        "ttt",
        "ended by next.done",
    ),
    "done, with time-outs": (
        "--terminal next.done --timeout cut",
        [[0], [2], [3, 4, 5]],
        "-tt",
        "1 row flagged by both next.done and cut: taken as time-outs",
    ),
    "done, cut": ("--terminal none --timeout next.done", [[0], [3, 4]], "--", "3 episodes ended by next.done"),
    "both flags": (
        "--terminal end --timeout next.done",
        [[0], [2], [3, 4, 5]],
        "-tt",
        "2 rows flagged by both end and next.done",
    ),
}


def log_run(run, options, table=LOG, name="log.csv", role="--reward gain"):
    table.to_csv(name, index=False)
    options = f"{role} {options}".split()
    return run(name, "--id", ID, "--force", "--observations", "x", "--actions", "offer", *options)


@pytest.mark.parametrize("case", ENDS)
def test_where_episodes_end(case, run):
    options, episodes, kinds, words = ENDS[case]
    status, out, err = log_run(run, options)
    assert status == 0 and words in out, (out, err)
    (observations, _, _, _, terminals, _), lengths = read()
    ends = np.cumsum(lengths)
    assert [part.ravel().tolist() for part in np.split(observations, ends[:-1])] == episodes
    assert "".join("-t"[int(i)] for i in terminals[ends - 1]) == kinds and terminals.sum() == kinds.count("t")


def test_costs_are_minus_rewards(run):
    assert log_run(run, "--terminal end", role="--cost gain")[0] == 0
    assert read()[0][2].tolist() == [-1, -2, -4, -8, -16, -32] and "Rewards are minus gain." in metadata()["notes"]
    assert log_run(run, "--terminal end", LOG.assign(gain=0.0), role="--cost gain")[0] == 0
    assert not np.signbit(read()[0][2]).any()


BAD_ENDS = {
    "no way to end": ("--reward gain", 2, ["--terminal (", "all, if each row", "none, if the process"]),
    "no reward": ("--terminal all", 2, ["a table needs --reward or --cost"]),
    "rewards and costs": ("--terminal all --reward gain --cost gain", 2, ["exclude each other"]),
    "done": ("--terminal next.done", 2, ["--timeout none", "--timeout next.done --terminal none", "next.success"]),
    "Dones": ("--terminal Dones", 2, ["--timeout none", "--timeout Dones --terminal none"]),
    "one column twice": ("--terminal end --timeout end", 2, ["the same column"]),
    "time-outs of a bandit": ("--terminal all --timeout cut", 2, ["--terminal all leaves nothing to --timeout"]),
    "gaps of a bandit": ("--terminal all --step t --max_gap 3", 2, ["--max_gap"]),
    "gaps without steps": ("--terminal none --max_gap 3", 2, ["--max_gap goes with --step"]),
    "a gap of 0": ("--terminal none --step t --max_gap 0", 1, ["steps are numbers, so give a number above 0"]),
    "a duration for numbers": ("--terminal none --step t --max_gap 2h", 1, ["--max_gap 2h: the steps are numbers"]),
    "a number for times": ("--terminal none --step user --max_gap 3", 1, ["user is neither numbers nor times"]),
    "a pattern for episodes": ("--terminal none --episode user vis*", 1, ["--episode vis*: there is no such column"]),
    "no column": ("--terminal left", 1, ["--terminal left: there is no such column"]),
    "not a flag": ("--terminal t", 1, ["column t is 2 in row 2"]),
    "all rows end at once": ("--terminal none --episode t", 1, ["no transition has a known next observation"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ENDS)
def test_ends_that_make_no_sense_are_one_line(case, run, root):
    options, status, words = BAD_ENDS[case]
    result = log_run(run, options, role="" if "reward" in case or "--reward" in options else "--reward gain")
    refused(result, status, words, root)


def test_the_words_for_ends_and_columns_of_that_name_exclude_each_other(run, root):
    for word in ("all", "none"):
        refused(
            log_run(run, f"--terminal {word}", LOG.assign(**{word: 0})),
            1,
            [f"`{word}` is a word of --terminal and also"],
            root,
        )
    refused(
        log_run(run, "--terminal end --timeout none", LOG.assign(none=0)), 1, ["`none` is a word of --timeout"], root
    )


def test_gaps_between_times_are_durations(run, root):
    table = LOG.assign(t=pd.to_datetime("2024-01-01") + pd.to_timedelta(LOG.t, "h"))
    for text in ("3", "x", "0h", "-2h", "nan"):
        refused(log_run(run, f"--terminal none --step t --max_gap={text}", table), 1, [f"--max_gap {text}", "2h"], root)
    out = log_run(run, "--terminal none --step t", table)[1]
    assert "the largest is 0 days 07:00:00. --max_gap ends episodes" in out and read()[1] == [5]
    assert "1 gap above 90min" in log_run(run, "--terminal none --step t --max_gap 90min", table)[1]
    assert read()[1] == [3, 1]


# ----------------------------------------------------------------------------------- masks and propensities

NAMES = ["call", "fax", "mail", "none"]
HATS = ["a_hat", "a_cap", "a_bag", "a_map"]
ALLOWED = np.array([[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 1, 1]], bool)
TAKEN = ["mail", "none", "call", "none", "mail", "call"]  # nobody took fax


def masked(names=NAMES, taken=TAKEN, allowed=ALLOWED, order=(2, 0, 3, 1), **changes):
    """LOG with mask columns, which do not stand in the order of the actions."""
    columns = {f"may_{names[i]}": allowed[:, i].astype(int) for i in order}
    return LOG.assign(**{"offer": taken, "p": [0.5, 0.25, 1, 1e-9, 0.125, 1 / 3]} | columns | changes)


def stored(key, name=ID):
    return np.load(place(name) / f"{key}.npy")


def test_masks_and_propensities_go_with_their_rows(run):
    status, out, err = log_run(run, "--terminal end --episode user --mask may_* --propensity p", masked())
    assert status == 0 and "offer that no row took, known from the masks: fax" in out, err
    assert "may_call is for call, may_fax is for fax" in out and "On average 2.333 of 4 actions are allowed" in out
    rows, following = [0, 1, 5, 2, 3], [1, 5, 5, 2, 4]  # at a terminal row its own
    assert read()[0][0].ravel().tolist() == rows and read()[0][1].ravel().tolist() == [2, 3, 0, 0, 3]
    assert stored("masks").tolist() == ALLOWED[rows].tolist() and stored("masks").dtype == bool
    assert stored("next_masks").tolist() == ALLOWED[following].tolist()
    assert stored("propensities").tolist() == masked().p[rows].tolist()
    assert metadata()["encoding"]["masks"] == [f"may_{name}" for name in NAMES]
    assert metadata()["encoding"]["actions"] == [{"name": "offer", "values": NAMES, "low": 0}]
    assert (metadata()["action_low"], metadata()["action_high"]) == ([0], [3])


def numbered(*names, **changes):
    """Masks for actions 0 to 3 of which 2 is never taken."""
    return masked([str(x) for x in names], **{"taken": [0, 3, 1, 3, 0, 1], "allowed": np.ones((6, 4), bool)} | changes)


KINDS_OF_MASKS = {  # table; the pattern; names of the columns and values of the actions in their order
    "numbers": (numbered(0, 1, 2, 3), "may_*", ["may_0", "may_1", "may_2", "may_3"], [0, 1, 2, 3]),
    "real numbers": (
        numbered(0, 1, 2, 3, taken=[0.0, 3, 1, 3, 0, 1]),
        "may_*",
        ["may_0", "may_1", "may_2", "may_3"],
        [0, 1, 2, 3],
    ),
    "padded": (numbered("00", "01", "02", "03"), "may_*", ["may_00", "may_01", "may_02", "may_03"], [0, 1, 2, 3]),
    "codes": (
        numbered(9, 11, 4711, 5, taken=[9, 5, 9, 5, 9, 11]),
        "may_*",
        ["may_5", "may_9", "may_11", "may_4711"],
        [5, 9, 11, 4711],
    ),
    "from 1": (
        numbered(1, 2, 3, 4, taken=[2, 1, 2, 1, 2, 3]),
        "may_*",
        ["may_1", "may_2", "may_3", "may_4"],
        [1, 2, 3, 4],
    ),
    "named one by one": (masked(), "may_none may_mail may_fax may_call", [f"may_{x}" for x in NAMES], NAMES),
    "columns named as the actions are": (
        masked(HATS, [*HATS, *HATS[:2]], np.ones((6, 4), bool)).rename(columns=lambda x: x.removeprefix("may_")),
        "a_hat a_cap a_bag a_map",
        sorted(HATS),
        sorted(HATS),
    ),
    "short patterns": (numbered("x2", "x0", "x1", "x3"), "m*", ["may_x0", "may_x1", "may_x2", "may_x3"], [0, 1, 2, 3]),
    "a pattern within numbers": (
        numbered(10, 12, 11, 13, taken=[10, 11, 12, 13, 10, 11]),
        "may_1*",
        ["may_10", "may_11", "may_12", "may_13"],
        [10, 11, 12, 13],
    ),
    "numbers without a pattern": (
        numbered("x2", "x0", "x1", "x3"),
        "may_x2 may_x0 may_x3 may_x1",
        ["may_x0", "may_x1", "may_x2", "may_x3"],
        [0, 1, 2, 3],
    ),
    "negative numbers": (
        numbered(-1, 0, 1, 2, taken=[-1, 0, 1, 2, -1, 0]),
        "may_*",
        ["may_-1", "may_0", "may_1", "may_2"],
        [-1, 0, 1, 2],
    ),
    "words with bounds": (
        numbered("a", "b", "c", "d", taken=[1, 2, 1, 2, 1, 2]),
        "may_a may_b may_c may_d --action_low 1 --action_high 4",
        ["may_a", "may_b", "may_c", "may_d"],
        [1, 2, 3, 4],
    ),
    "words for numbers": (
        numbered("a", "b", "c", "d", taken=[0, 1, 2, 3, 0, 1]),
        "may_*",
        ["may_c", "may_a", "may_d", "may_b"],
        [0, 1, 2, 3],
    ),
    "truth values": (
        masked(["False", "True"], TAKEN, ALLOWED | True, (1, 0)).assign(offer=[True, False] * 3),
        "may_*",
        ["may_False", "may_True"],
        [False, True],
    ),
}


@pytest.mark.parametrize("case", KINDS_OF_MASKS)
def test_names_of_masks_tell_the_actions(case, run):
    table, pattern, names, values = KINDS_OF_MASKS[case]
    status, out, err = log_run(run, f"--terminal all --mask {pattern}", table)
    assert status == 0 and f"{names[1]} is for {values[1]}" in out, err
    (entry,) = metadata()["encoding"]["actions"]
    assert metadata()["encoding"]["masks"] == names and entry["values"] == values
    taken = [values[i - entry["low"]] for i in read()[0][1].ravel()]
    assert taken == table.offer.tolist() and stored("masks").tolist() == table[names].astype(bool).values.tolist()
    assert metadata()["action_high"][0] - metadata()["action_low"][0] == len(names) - 1


BAD_MASKS = {
    "no action": (masked(allowed=ALLOWED & (np.arange(6) != 4)[:, None]), "may_*", ["no action in row 4"]),
    "another action": (
        masked(taken=["mail", "none", "mail", "none", "mail", "call"]),
        "may_*",
        ["the action is mail, which may_mail forbids in row 2"],
    ),
    "one is missing": (masked(order=(0, 1, 3)), "may_*", ["action mail of offer has no column", "call, fax, none"]),
    "from 0 for from 1": (numbered(0, 1, 2, 3, taken=[1, 2, 3, 4, 1, 2]), "may_*", ["action 4 of offer has no column"]),
    "other texts": (numbered("a", "b", "c", "d", taken=list("uvwzuv")), "may_*", ["action u of offer has no column"]),
    "other numbers": (numbered(9, 10, 11, 12), "may_*", ["action 0 of offer has no column", "stand for 11, 9, 12, 10"]),
    "numbers for texts": (
        numbered(0, 1, 2, 3, taken=list("uvwzuv")),
        "may_*",
        ["action u of offer has no column", "the mask of a text needs that text in its name"],
    ),
    "full names": (
        masked(HATS, [*HATS, *HATS[:2]]),
        "may_a_hat may_a_cap",
        ["action a_bag of offer has no column", "give --mask 'may_*'"],
    ),
    "names in one word": (
        masked(HATS, [x[2:] for x in [*HATS, *HATS[:2]]]).rename(columns=lambda x: x.replace("_a_", "")),
        "mayhat maycap maybag maymap",
        ["give --mask 'may*'"],
    ),
    "a long pattern": (
        masked(HATS, [*HATS, *HATS[:2]]),
        "may_a*",
        ["give --mask 'may_*'"],
    ),
    "a space": (masked(taken=[" mail", *TAKEN[1:]]), "may_*", ["action ' mail' of offer has no column"]),
    "too few": (numbered("a", "b", "c", "d"), "may_a may_b", ["2 columns", "0 to 3", "--action_low and --action_high"]),
    "too many": (
        numbered("a", "b", "c", "d", taken=[1, 2, 3, 1, 2, 3]),
        "may_*",
        ["4 columns", "1 to 3", "--action_low and --action_high"],
    ),
    "too many bounds": (
        numbered("a", "b", "c", "d"),
        "may_* --action_low 0 --action_high 4",
        ["4 columns, but offer has 5 actions"],
    ),
    "a word among numbers": (numbered(0, 1, 3, "other"), "may_*", ["may_other does not tell", "use a pattern"]),
    "two numbers": (numbered("0_1", "0_2", "0_3", "0_0"), "m*", ["may_0_3 does not tell", "use a pattern"]),
    "a long number": (numbered(0, 1, 3, "9" * 20), "may_*", ["does not tell which"]),
    "places of a list": (numbered("[1]", "[0]", "[3]", "[4]"), "may*", ["some places of a list", "from 0 on"]),
    "two for one": (numbered(0, 1, 2, 3, can_1=1), "may_* can_*", ["several columns for action 1: may_1, can_1"]),
    "not flags": (masked(may_fax=2), "may_*", ["column may_fax is 2 in row 0", "0 or 1"]),
    "empty": (masked(may_fax=[1, None, 1, 1, 1, 1]), "may_*", ["may_fax is empty in row 1"]),
    "no such column": (masked(), "can_*", ["--mask can_*: there is no such column"]),
    "real actions": (masked(taken=[0.5, 1, 2, 3, 4, 5]), "may_*", ["offer holds real numbers"]),
    "set-points": (numbered(0, 1, 2, 3), "may_* --action_kind continuous", ["one column of discrete actions"]),
    "two columns of actions": (masked(), "may_* --actions offer user", ["one column of discrete actions"]),
    "other bounds": (
        numbered(0, 1, 2, 3),
        "may_* --action_low 1 --action_high 4",
        ["names of the masks tell the actions"],
    ),
    "an environment": (
        numbered(0, 1, 2, 3, y=1),
        "may_* --eval_env MountainCar-v0 --observations x y",
        ["does not know masks"],
    ),
    "propensity 0": (masked(p=[1, 1, 0, 1, 1, 1]), "may_* --propensity p", ["p is 0 in row 2", "above 0"]),
    "propensity below 0": (masked(p=-0.5), "may_* --propensity p", ["p is -0.5 in row 0"]),
    "propensity above 1": (masked(p=[1, 1, 1, 1, 1, 3]), "may_* --propensity p", ["p is 3 in row 5", "at most 1"]),
    "propensity NaN": (masked(p=["nan", 1, 1, 1, 1, 1]), "may_* --propensity p", ["'nan' in row 0"]),
    "propensity missing": (masked(p=[1, None, 1, 1, 1, 1]), "may_* --propensity p", ["p is empty in row 1"]),
    "propensity infinite": (masked(p=np.inf), "may_* --propensity p", ["p is inf in row 0"]),
    "propensity of text": (masked(), "may_* --propensity user", ["user holds text"]),
    "propensity seen": (masked(), "may_* --propensity p --observations x p", ["p cannot be an observation"]),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_masks_and_propensities_that_do_not_fit_are_one_line(case, run, root):
    table, options, words = BAD_MASKS[case]
    refused(log_run(run, f"--terminal all --mask {options}", table), 1, ["log.csv", *words], root)


def test_propensities_are_for_one_discrete_action(run, root):
    for actions in ("offer user", "x"):
        options = f"--terminal all --propensity p --observations t --actions {actions}"
        refused(
            log_run(run, options, masked(x=LOG.x + 0.5)),
            1,
            ["--propensity is for one column of discrete actions"],
            root,
        )


def test_a_pattern_leaves_masks_and_propensities_to_their_roles(run):
    assert log_run(run, "--terminal all --mask may_* --propensity p --observations * --actions off*", masked())[0] == 0
    names = [entry["name"] for entry in metadata()["encoding"]["observations"]]
    assert names == ["user", "visit", "t", "x", "end", "cut", "next.done"]


def test_a_pattern_whose_columns_are_taken_says_by_which_option(run, root):
    for options, words in (
        ("--observations may_*", ["--observations may_*: its columns are taken by --mask", "name them in full"]),
        ("--observations off*", ["--observations off*: its columns are taken by --actions"]),
        ("--observations x --actions ga*", ["--actions ga*: its columns are taken by --cost"]),
        ("--observations may_* user --episode user --terminal none", ["taken by --mask"]),
    ):
        refused(log_run(run, f"--terminal all --mask may_* {options}", masked(), role="--cost gain"), 1, words, root)
    options = "--terminal all --mask may_* --observations may_mail x"
    assert log_run(run, options, masked())[0] == 0


def test_a_later_log_has_the_masks_of_the_first(run):
    assert log_run(run, "--terminal all --mask may_*", masked())[0] == 0
    like = ["--id", "test/like-v0", "--like", ID, "--reward", "gain", "--terminal", "all", "--force"]
    later = masked(order=(0, 1, 2, 3), taken="mail", allowed=ALLOWED | [0, 0, 1, 0])
    later.to_csv("later.csv", index=False)
    for words in ([], ["--mask", "may_*"]):
        assert run("later.csv", *like, *words)[0] == 0
        assert metadata("test/like-v0")["encoding"] == metadata()["encoding"]
        assert read("test/like-v0")[0][1].ravel().tolist() == [2] * 6
        assert stored("masks", "test/like-v0").tolist() == (ALLOWED | [False, False, True, False]).tolist()
    one_line(
        run("later.csv", *like, "--mask", "may_fax"), 1, ["--mask names may_fax; those of test/new-v0 are may_call"]
    )
    later.drop(columns="may_fax").to_csv("later.csv", index=False)
    one_line(run("later.csv", *like), 1, ["lacks may_fax, masks of test/new-v0"])
    assert log_run(run, "--terminal all", masked())[0] == 0
    one_line(run("log.csv", *like, "--mask", "may_*"), 1, ["--mask names", "test/new-v0 are none"])


def test_combined_logs_keep_masks_and_propensities(run):
    both = "--terminal none --episode user --mask may_* --propensity p --id"
    assert (
        log_run(run, f"{both} test/first-v0", masked())[0] == log_run(run, f"{both} test/second-v0", masked())[0] == 0
    )
    assert run(*PARTS, "--rows", 3, 4)[0] == 0
    parts = [
        stored(key, f"test/{name}-v0")
        for key in ("masks", "next_masks", "propensities")
        for name in ("first", "second")
    ]
    for key, first, second in zip(("masks", "next_masks", "propensities"), parts[::2], parts[1::2]):
        assert stored(key).tolist() == [*first[:3].tolist(), *second.tolist()] and stored(key).dtype == first.dtype
    assert metadata()["encoding"]["masks"] == [f"may_{name}" for name in NAMES]
    one = "--terminal none --mask may_* --id test/second-v0"
    assert log_run(run, one, masked())[0] == 0
    one_line(run(*PARTS, "--force"), 1, ["test/first-v0 has propensities, test/second-v0 has none"])
    one_line(
        run(*PARTS[:1], *PARTS[2:0:-1], *PARTS[3:], "--force"),
        1,
        ["first-v0 has propensities, test/second-v0 has none"],
    )
    assert log_run(run, "--terminal none --propensity p --id test/second-v0", masked())[0] == 0
    one_line(run(*PARTS, "--force"), 1, ["test/first-v0 has masks, test/second-v0 has none"])
    (place("test/first-v0") / "next_masks.npy").unlink()
    one_line(run(*PARTS, "--force"), 1, ["test/first-v0 cannot be read", "go together"])


# ------------------------------------------------------------------------------ formats, folders and lists


@pytest.mark.parametrize("name", ["t.tsv", "t.CSV", "t.csv.gz", "t.CSV.GZ", "t.tsv.bz2", "t.Tsv.xz", "t.v1.csv.zip"])
def test_files_of_other_names_are_tables(name, run):
    separator = "\t" if "tsv" in name.lower() else ","
    LOG.to_csv(name, index=False, sep=separator)
    options = ["--observations", "x", "--actions", "offer", "--reward", "gain", "--terminal", "all"]
    assert run(name, "--id", ID, *options)[0] == 0 and read()[0][2].tolist() == LOG.gain.tolist()
    content = Path(name).read_bytes()
    assert metadata()["source"]["sha256"] == hashlib.sha256(content).hexdigest()
    if "tsv" not in name.lower() and name != "t.CSV":
        Path(name).write_bytes(content[: len(content) // 2])
        one_line(run(name, "--id", ID, "--force", *options), 1, [name, "damaged"])


def test_commas_in_a_tsv_file_are_one_line(run, root):
    LOG.to_csv("t.tsv", index=False)
    refused(run("t.tsv", *FROM_PARTS, "--terminal", "all"), 1, ["has one column: separate columns by tabs"], root)


@pytest.mark.parametrize("name", ["ratings.txt", "ratings.dat", "ratings.json", "ratings.txt.gz", "ratings"])
def test_tables_of_other_names_are_one_line(name, run, root):
    LOG.to_csv(name, index=False)
    for options in ([], FROM_PARTS[2:]):
        refused(run(name, "--id", ID, *options), 2, [f"{name} is not an HDF5 file: rename it to .csv"], root)
    shutil.move(write(), name)
    assert run(name, "--id", ID)[0] == 0


@pytest.mark.parametrize("cut", [["1,u,0.5,0,c", "2,v,1,1"], ["1,u,0.5,0", "2,v,1,1,c"], ["1,u,0.5,0,c", "2,v,1,1,"]])
def test_rows_without_their_last_field_are_counted(cut, run, root):
    """If the last column is used they are refused, as empty."""
    Path("t.csv").write_text("\n".join(["x,a,r,d,comment", *cut, "3,v,1,1,c"]))
    options = ["t.csv", "--id", ID, "--force", "--actions", "a", "--reward", "r", "--terminal", "d"]
    row = 0 if cut[0].endswith("0") else 1
    refused(run(*options, "--observations", "x", "comment"), 1, [f"column comment is empty in row {row}"], root)
    out = run(*options, "--observations", "x")[1]
    assert f"The last column, comment, is empty in 1 of 3 rows, first in row {row} (from 0)" in out
    Path("t.csv").write_text("\n".join(["x,a,r,d,comment", "1,u,1,0,c", "2,u,1,1,c"]))
    assert "last column" not in run(*options, "--observations", "x")[1]


def test_spaces_around_a_category_are_shown(run):
    table = masked(["call", "fax", " mail", "none"], [" mail", *TAKEN[1:4], " mail", "call"]).assign(
        user=list("abcab ")
    )
    out = log_run(run, "--terminal all --mask may_* --observations user", table)[1]
    assert "user=' ', user=a, user=b, user=c" in out and "0 is ' mail', 1 is call" in out
    assert "may_ mail is for ' mail'" in out


def test_a_comma_in_a_name_of_a_tsv_file_is_no_separator(run):
    Path("t.tsv").write_text("x, of a, and, b, or c\ta\tr\n1\tu\t2\n")
    options = ["--observations", "x, of*", "--actions", "a", "--reward", "r", "--terminal", "all"]
    assert run("t.tsv", "--id", ID, *options)[0] == 0


def parts(folder, tables, **others):
    """Writes Parquet files; others: contents of files that are none."""
    pytest.importorskip("pyarrow")
    for name, table in tables.items():
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(Path(folder) / name)
    for name, text in others.items():
        (Path(folder) / name.replace("__", ".")).write_text(text)
    return folder


FROM_PARTS = ["--id", ID, "--force", "--observations", "x", "--actions", "offer", "--reward", "gain"]


def test_the_parts_of_a_folder_are_read_in_natural_order(run):
    """As Spark writes them; one has no rows, one has other types and another order of the columns."""
    names = [f"part-{i}-ab.c000.snappy.parquet" for i in (10, 2, 9)]
    tables = dict(zip(names, (LOG[4:], LOG[:2].assign(visit="one"), LOG[2:4].astype({"x": int})[[*LOG][::-1]])))
    folder = parts("log.parquet", tables | {"part-1.parquet": LOG[:0]}, _SUCCESS="", _metadata="junk", notes__txt="")
    status, out, err = run(folder, *FROM_PARTS, "--terminal", "none")
    assert status == 0 and "4, part-1.parquet to part-10-ab.c000.snappy.parquet; 1 of other kinds" in out, err
    assert read()[0][0].ravel().tolist() == [0, 1, 2, 3, 4] and metadata()["source"]["files"] == [folder]
    first = metadata()["source"]["sha256"]
    parts(folder, {names[0]: LOG[4:].assign(gain=0)})
    assert run(folder, *FROM_PARTS, "--terminal", "none")[0] == 0 and metadata()["source"]["sha256"] != first


def test_names_of_folders_are_columns(run):
    """Hive's layout. Numbers stay numbers, other values are texts."""
    tables = {f"user={user}/hour={hour}/a.parquet": LOG.drop(columns="user").assign(x=hour, t=range(6))
              for user in ("a%2Fb", "c") for hour in (7, 10)}  # fmt: skip
    options = ["--episode", "user", "hour", "--step", "t", "--terminal", "none", "--observations", "x", "hour", "user"]
    assert run(parts("logs", tables), *FROM_PARTS, *options)[0] == 0 and read()[1] == [5] * 4
    observations = read()[0][0]
    assert (observations[:, 0] == observations[:, 1]).all() and set(observations[:, 1]) == {7, 10}
    assert metadata()["encoding"]["observations"][1:] == [
        {"name": "hour", "offset": 0.0}, {"name": "user", "values": ["a/b", "c"]}
    ]  # fmt: skip
    parts("logs", {"user=c/hour=__HIVE_DEFAULT_PARTITION__/a.parquet": LOG.drop(columns="user")})
    one_line(run("logs", *FROM_PARTS, *options), 1, ["column hour is empty in row 24"])
    parts("logs", {"b.parquet": LOG})
    one_line(run("logs", *FROM_PARTS, *options), 1, ["a.parquet differs from b.parquet: it adds hour"])


BAD_PARTS = {
    "another column": ({"b.parquet": LOG.assign(y=1)}, ["b.parquet differs from a.parquet: it adds y"]),
    "a missing column": ({"b.parquet": LOG.drop(columns="x")}, ["b.parquet differs from a.parquet: it lacks x"]),
    "another type": ({"b.parquet": LOG.assign(x="u")}, ["Field x has incompatible types: double vs string"]),
    "damage": ({}, ["c.parquet is damaged or not a Parquet file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_differ_are_one_line(case, run, root):
    tables, words = BAD_PARTS[case]
    folder = parts("logs", {"a.parquet": LOG} | tables, **({"c__parquet": "text"} if case == "damage" else {}))
    refused(run(folder, *FROM_PARTS, "--terminal", "none"), 1, ["logs", *words], root)


def test_other_folders_are_one_line(run, root):
    Path("logs").mkdir()
    LOG.to_csv("logs/a.csv")
    refused(run("logs", *FROM_PARTS, "--terminal", "none"), 1, ["logs: the folder holds no Parquet files"], root)
    refused(run("logs", "--id", ID), 2, ["a table needs --terminal"], root)


def robot(path, version):
    """Three episodes in LeRobot's layout: in three files or, since version 3, in one, with lists of a fixed length."""
    pa = pytest.importorskip("pyarrow")
    rng, tables, rows = np.random.default_rng(0), [], []
    for episode, n in enumerate((3, 4, 2)):
        state, action = rng.normal(size=(n, 3)).astype(np.float32), rng.uniform(-1, 1, (n, 2)).astype(np.float32)
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]) for x in (state, action)]
        if version == 2:
            lists = [pa.array(x.tolist(), pa.list_(pa.float32())) for x in (state, action)]
        last = np.arange(n) == n - 1
        images = [{"bytes": b"png", "path": "a.png"}] * n
        values = [*lists, [episode] * n, range(n), np.arange(n) / 10, rng.normal(size=n).astype(np.float32), last]
        names = ["observation.state", "action", "episode_index", "frame_index", "timestamp", "next.reward", "next.done"]
        values += [last & (episode == 1), images]
        tables.append(pa.table(values, [*names, "next.success", "observation.images.top"]))
        rows.append((state, action, tables[-1]["next.reward"].to_numpy()))
    for name in ("data/chunk-000", "meta/episodes"):
        (path / name).mkdir(parents=True)
    (path / "meta/info.json").write_text("{}")
    pa.parquet.write_table(pa.table({"task_index": [0]}), path / "meta/tasks.parquet")
    for i, table in enumerate(tables if version == 2 else [pa.concat_tables(tables)]):
        pa.parquet.write_table(table, path / f"data/chunk-000/file-{i}.parquet")
    return rows


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_of_lerobot(version, run, tmp_path, root):
    pytest.importorskip("pyarrow.parquet")
    rows = robot(tmp_path / "robot", version)
    options = ["robot", "--id", ID, "--episode", "episode_index", "--step", "frame_index"]
    options += ["--observations", "observation.state", "--actions", "action", "--reward", "next.reward", "--terminal"]
    refused(run(*options, "next.done"), 2, ["--terminal next.done", "--timeout none"], root)
    refused(run(*options, "none", "--observations", "observation.*"), 1, ["observation.images.top", "images"], root)
    assert run(*options, "next.success")[0] == 0
    (observations, actions, rewards, following, terminals, _), lengths = read()
    assert lengths == [2, 4, 1] and terminals.tolist() == [0, 0, 0, 0, 0, 1, 0]
    kept = [np.concatenate([part[i][: len(part[i]) - (e != 1)] for e, part in enumerate(rows)]) for i in range(3)]
    assert all(map(np.array_equal, kept, (observations, actions, rewards))) and np.array_equal(
        following[0], rows[0][0][1]
    )
    assert [x["name"] for x in metadata()["encoding"]["actions"]] == ["action[0]", "action[1]"]
    assert run(*options, "next.done", "--timeout", "none", "--force")[0] == 0 and read()[1] == [3, 4, 2]
    like = ["robot", "--id", "test/like-v0", "--like", ID, "--reward", "next.reward", "--terminal", "none"]
    assert run(*like, "--timeout", "next.done")[0] == 0 and read("test/like-v0")[1] == [2, 3, 1]
    assert metadata("test/like-v0")["encoding"] == metadata()["encoding"]


LISTS = {  # a column of six rows; names and numbers of the first row, or words of the error
    "nested": ([[[1.0, 2.0], [3.0, 4.0]]] * 6, ["[0][0]", "[0][1]", "[1][0]", "[1][1]"], [1, 2, 3, 4]),
    "uneven inside": ([[[1.0], [2.0, 3.0]]] * 6, ["[0][0]", "[1][0]", "[1][1]"], [1, 2, 3]),
    "one place": ([[i] for i in range(6)], ["[0]"], [0]),
    "texts": ([["a", "b"]] * 3 + [["c", "b"]] * 3, ["[0]", "[1]"], [1, 0, 1]),
    "ragged": ([[1.0]] * 4 + [[1.0, 2.0]] * 2, ["z has lists of different lengths, 1 in row 0 and 2 in row 4"], None),
    "ragged inside": ([[[1.0], [2.0]]] * 5 + [[[1.0], [2.0, 3.0]]], ["z[1] has lists of diff", "2 in row 5"], None),
    "empty": ([[]] * 6, ["z holds records, images, or lists that are empty"], None),
    "long": ([[1.0] * 1025] * 6, ["lists that are empty or long"], None),
    "missing": ([[1.0]] * 3 + [None] + [[1.0]] * 2, ["z is empty in row 3"], None),
    "missing first": ([None] + [[1.0]] * 5, ["z is empty in row 0"], None),
    "missing inside": ([[1.0, 2.0]] * 3 + [[1.0, None]] * 3, ["z[1] is empty in row 3"], None),
    "records": ([{"a": 1.0}] * 6, ["z holds records"], None),
    "images": ([b"png"] * 6, ["z holds records, images"], None),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_lists_become_columns(case, run, root):
    values, names, numbers = LISTS[case]
    parts(".", {"log.parquet": LOG.assign(z=values)})
    result = run("log.parquet", *FROM_PARTS, "--terminal", "none", "--observations", "z")
    if numbers is None:
        return refused(result, 1, ["log.parquet", *names], root)
    assert result[0] == 0, result
    assert [x["name"] for x in metadata()["encoding"]["observations"]] == [f"z{name}" for name in names]
    assert read()[0][0][0].tolist() == numbers


def test_a_list_holds_the_masks_in_the_order_of_the_actions(run, root):
    """Which actions they are, the bounds tell, or data that span as many."""
    options = ["log.parquet", *FROM_PARTS, "--terminal", "all", "--mask", "ok"]
    table = LOG.assign(offer=[0, 3, 1, 0, 3, 1], ok=[[True, True, False, True]] * 6)
    parts(".", {"log.parquet": table})
    assert run(*options)[0] == 0 and metadata()["action_high"] == [3]
    assert stored("masks").tolist() == [[True, True, False, True]] * 6
    assert metadata()["encoding"]["masks"] == [f"ok[{i}]" for i in range(4)]
    out = run(*options, "--mask", "ok[3]", "ok[1]", "ok[2]", "ok[0]")[1]
    assert "ok[0] is for 0" in out and stored("masks").tolist() == [[True, True, False, True]] * 6
    parts(".", {"log.parquet": table.assign(offer=[1, 2, 4, 1, 2, 4])})
    assert "ok[0] is for 1" in (out := run(*options)[1]) and "ok[3] is for 4" in out
    table = table.assign(offer=[1, 2, 2, 1, 2, 1])
    parts(".", {"log.parquet": table})
    assert "ok[0] is for 1" in run(*options, "--action_low", 1, "--action_high", 4)[1]
    assert "ok[0] is for 0" in run(*options, "--action_low", 0, "--action_high", 3, "--mask", "ok")[1]
    shutil.rmtree(root)
    refused(run(*options), 1, ["ok", "4 columns", "1 to 2", "--action_low and --action_high"], root)
    parts(".", {"log.parquet": table.assign(offer=list("uvwzuv"), ok=[[True] * 4] * 6)})
    refused(run(*options), 1, ["action u of offer has no column", "ok[0], ok[1]", "needs that text in its name"], root)


def test_a_column_of_one_place_has_any_role(run):
    table = LOG.assign(gain=[[x] for x in LOG.gain], end=[[x] for x in LOG.end])
    parts(".", {"log.parquet": table})
    assert run("log.parquet", *FROM_PARTS, "--terminal", "end")[0] == 0 and read()[0][2].tolist() == LOG.gain.tolist()
    parts(".", {"log.parquet": LOG.assign(gain=[[1.0, 2.0]] * 6)})
    one_line(
        run("log.parquet", *FROM_PARTS, "--terminal", "end"), 1, ["--reward gain: it takes one column, such as gain[0]"]
    )


BAD_FILES = {
    "lacks actions": ({"actions": None}, ["lacks actions", "it has"]),
    "lacks terminals": ({"terminals": None}, ["lacks terminals"]),
    "NaN": ({"observations": np.where(np.eye(12, 3, -4), np.nan, 0)}, ["observations[0] is nan in row 4"]),
    "infinity": ({"rewards": np.where(np.arange(12) == 7, -np.inf, 0)}, ["rewards is -inf in row 7"]),
    "beyond float32": ({"rewards": np.full(12, 1e300)}, ["rewards"]),
    "squares overflow": ({"observations": np.full((12, 3), 3e38)}, ["observations[0]"]),
    "short column": ({"actions": np.zeros((11, 2))}, ["actions 11"]),
    "wide rewards": ({"rewards": np.zeros((12, 2))}, ["rewards has shape (12, 2)"]),
    "flags in a column": ({"terminals": np.zeros((12, 1), bool)}, ["terminals has shape"]),
    "flags of 2": ({"terminals": np.full(12, 2.0)}, ["terminals is 2.0 in row 0"]),
    "flags of NaN": ({"timeouts": np.full(12, np.nan)}, ["timeouts is nan in row 0"]),
    "words": ({"rewards": np.array([b"one"] * 12)}, ["rewards", "store numbers"]),
    "no rows": ({"n": 0}, ["no rows"]),
    "one row": ({"n": 1}, ["no transition"]),
    "time-outs alone": ({"timeouts": np.ones(12, bool)}, ["no transition"]),
    "no columns": ({"actions": np.zeros((12, 0))}, ["actions has shape"]),
    "images": ({"observations": np.zeros((12, 84, 84, 3), np.uint8)}, ["images"]),
    "wide next observations": ({"next_observations": np.zeros((12, 2))}, ["differ in shape"]),
    "one-hot actions": ({"actions": np.eye(12)}, ["one-hot: store the number"]),
    "far actions": ({"actions": np.full((12, 2), 9.5), "action_low": -1.0, "action_high": 1.0},
                    ["actions[0] is 9.5 in row 0", "-1 to 1"]),
    "actions of one value": ({"actions": np.full((12, 2), 9.5)}, ["--action_low"]),
    "bounds between numbers": (
        {"actions": np.arange(12) % 2, "action_low": -0.5, "action_high": 1.5}, ["whole bounds"],
    ),
    "a lower bound alone": ({"action_low": -1.0}, ["action_low and action_high go together"]),
    "three bounds": ({"action_low": np.zeros(3), "action_high": np.ones(3)}, ["3 bounds"]),
    "too many numbers": (
        {"n": 200_001, "actions": np.arange(200_001) // 2 * 7}, ["100,000 actions", "--action_kind continuous"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_one_line(fault, run, root):
    changes, words = BAD_FILES[fault]
    refused(run(write(**changes), "--id", ID), 1, ["data.hdf5", *words], root)


def huge(file):
    for key in ("observations", "actions", "rewards", "terminals"):
        del file[key]
        shape = (10**13, 2) if key in ("observations", "actions") else (10**13,)
        file.create_dataset(key, shape, np.float32, chunks=(1024, 2)[: len(shape)])


def virtual(file):
    """A virtual dataset reads as zeros if the file that it names is missing."""
    del file["rewards"]
    layout = h5py.VirtualLayout((12,), np.float32)
    layout[:] = h5py.VirtualSource("missing.hdf5", "rewards", (12,))
    file.create_virtual_dataset("rewards", layout)


@pytest.mark.parametrize(("change", "word"), [(huge, "memory"), (virtual, "virtual")])
def test_declared_numbers_must_be_there(change, word, run, root):
    with h5py.File(write(), "r+") as file:
        change(file)
    refused(run("data.hdf5", "--id", ID), 1, [word], root)


def test_what_is_no_file_of_its_kind_is_one_line(run, root):
    content = Path(write()).read_bytes()
    bodies = {"cut.hdf5": content[: len(content) // 2], "text.hdf5": b"text", "empty.h5": b"", "none.hdf5": None}
    for name, body in bodies.items():
        if body is not None:
            Path(name).write_bytes(body)
        refused(run(name, "--id", ID), 1, [name], root)
    for name, body in {"empty.csv": b"", "none.csv": None, "text.parquet": b"text", "odd.csv": b'a\n"\0\n1,2'}.items():
        if body is not None:
            Path(name).write_bytes(body)
        words = [word for key, words in OPTIONS.items() for word in (key, *words)]
        refused(run(name, *words), 1, [name], root)


@functools.cache
def body(path):
    return Path(write(path, n=40, timeouts=flags(40, 9, 19, 29))).read_bytes()


@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_refused_or_read_as_numbers(flips, run):
    content = bytearray(body("whole.hdf5"))
    for place, change in flips:
        content[int(place * len(content))] ^= change
    Path("flips.hdf5").write_bytes(content)
    status, _, err = run("flips.hdf5", "--id", ID, "--force")
    assert status in (0, 1) and err.count("\n") == status
    assert status or all(np.isfinite(column).all() for column in read()[0])


BAD_COMMANDS = [
    (["hopper-medum-v2"], 2, ["hopper-medium-v2"]),
    ([], 2, ["--all"]),
    (["--all", "everything"], 2, ["locomotion"]),
    (["data.hdf5"], 2, ["--id"]),
    (["hopper-medium-v2", "--id", ID], 2, ["--id"]),
    (["data.hdf5", "hopper-medium-v2", "--id", ID], 2, ["alone"]),
    (["data.hdf5", "--id", "../escape-v0"], 2, ["namespace/name-v0"]),
    (["data.hdf5", "--id", "no-version"], 2, ["namespace/name-v0"]),
    (["data.hdf5", "--id", ID, "--reward", "x"], 2, ["--reward"]),
    (["table.csv", "--id", ID, "--reward", "x"], 2, ["--terminal", "all, if each row is an episode"]),
    (["data.hdf5", "--id", ID, "--action_low", "0"], 2, ["--action_high"]),
    (["data.hdf5", "--id", ID, "--ref_min_score", "0"], 2, ["--ref_max_score"]),
    (["data.hdf5", "--id", ID, "--max_episode_steps", "0"], 2, ["--max_episode_steps"]),
    (["data.hdf5", "--id", ID, "--frobnicate"], 2, ["--frobnicate"]),
    (["--combine", "test/first-v0", "--id", ID], 2, ["two"]),
    (["--combine", "test/first-v0", "test/second-v0"], 2, ["--id"]),
    (["--combine", "test/first-v0", "test/second-v0", "--id", ID, "--rows", "3"], 2, ["--rows"]),
    (["--combine", "test/first-v0", "test/second-v0", "--id", ID, "--rows", "3", "0"], 2, ["--rows"]),
    (["data.hdf5", "--id", ID, "--rows", "3"], 2, ["--rows"]),
    (["data.hdf5", "--combine", "test/first-v0", "test/second-v0", "--id", ID], 2, ["--combine"]),
    (["--combine", "test/first-v0", "test/second-v0", "--id", ID, "--ref_min_score=0"], 2, ["go with --combine"]),
    (["--combine", "test/first-v0", "test/second-v0", "--id", ID], 1, ["test/first-v0", "--list"]),
    (["--combine", "hopper-medium-v2", "test/second-v0", "--id", ID], 1,
     ["d4rl/hopper-medium-v2 is not in", "import_data.py hopper-medium-v2"]),
    (["data.hdf5", "--id", ID, "--eval_env", "Nothing-v0"], 1, ["Nothing-v0", "--eval_env"]),
    (["data.hdf5", "--id", ID, "--eval_env", "CartPole-v1"], 1, ["3 numbers", "CartPole-v1 have 4"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "status", "said"), BAD_COMMANDS)
def test_what_cannot_be_is_one_line(words, status, said, run, root):
    write()
    refused(run(*words), status, said, root)


def test_an_existing_dataset_stays_whatever_fails(run, root):
    write()
    assert run("data.hdf5", "--id", ID)[0] == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert run("data.hdf5", "--id", ID)[0] == run(write(rewards=np.full(12, np.nan)), "--id", ID, "--force")[0] == 1
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert run(write(n=5), "--id", ID, "--force")[0] == 0 and read()[1] == [4]


@pytest.mark.parametrize("event", range(10))
def test_an_interrupted_import_leaves_the_old_dataset_or_none(event, run, root, monkeypatch):
    """Eight files are synchronised; the old dataset is moved away, the new one to its place."""
    assert run(write(), "--id", "test/old-v0")[0] == 0
    before, events = contents(root), []

    def interrupting(function):
        def changed(*arguments):
            events.append(function)
            if len(events) == event + 1:
                raise KeyboardInterrupt
            return function(*arguments)

        return changed

    for owner, name in ((os, "fsync"), (Path, "rename")):
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    assert run(write(n=8), "--id", "test/old-v0", "--force")[0] == 130 and contents(root) == before
    events.clear()
    assert run(write(n=8), "--id", "other/new-v0")[0] == (130 if event < 9 else 0)
    assert event == 9 or contents(root) == before


def test_a_full_disk_is_one_line(run, root, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(run(write(), "--id", ID), 1, [ID, "No space left on device"], root)
    assert [*root.iterdir()] == []


def test_places_that_are_taken_are_refused(run, root, monkeypatch):
    new_part("test/first-v0")
    assert run(write(), "--id", "test/first-v0", "--force")[0] == 0 and not (place("test/first-v0") / "data").exists()
    one_line(run("data.hdf5", "--id", "test/first-v0/part-v0"), 1, ["is a dataset, which cannot hold another"])
    (place("test/first-v0") / "data").mkdir()
    both = [str(place("test/first-v0")), "flat", "Minari"]
    one_line(run("data.hdf5", "--id", "test/first-v0", "--force"), 1, both)
    one_line(run("--combine", "test/first-v0", "test/second-v0", "--id", ID), 1, both)
    one_line(run("--list"), 1, both)
    (place("test/first-v0") / "data").rmdir()
    original = import_data.find_episodes

    def meanwhile(*arguments):
        shutil.copytree(place("test/first-v0"), place())
        return original(*arguments)

    monkeypatch.setattr(import_data, "find_episodes", meanwhile)
    before = contents(root)
    assert run(write(n=7), "--id", ID)[0] == 1  # somebody else stored it in the meantime
    assert contents(place()) == contents(place("test/first-v0")) and len(contents(root)) > len(before)


def test_list_shows_both_forms_and_names_what_is_damaged(run, root):
    new_part("test/first-v0", env="CartPole-v1")
    new_part("test/second-v0")
    assert table_run(run)[0] == run(write(), "--id", "deep/er/set-v0", "--eval_env=none")[0] == 0
    for name in ("cut-v0", "lost-v0", "later-v0", "uneven-v0", "poor-v0"):
        shutil.copytree(place(), place(f"test/{name}"))
    with open(place("test/cut-v0") / "rewards.npy", "r+b") as file:
        file.truncate(140)
    np.save(place("test/uneven-v0") / "rewards.npy", np.zeros(4, np.float32))
    poor = {key: value for key, value in metadata().items() if key != "episodes"}
    (place("test/poor-v0") / "metadata.json").write_text(json.dumps(poor))
    (place("test/lost-v0") / "metadata.json").unlink()
    (place("test/later-v0") / "metadata.json").write_text(json.dumps(metadata() | {"format": 2}))
    (place("test/second-v0") / "data/metadata.json").write_text("{")
    place("test/new-v0.123.tmp").mkdir()
    shutil.copytree(place(), place("test/gone-v0.12.old"))
    status, out, err = run("--list")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert status == 0 and not err
    assert lines == {
        "deep/er/set-v0": "11 transitions, 1 episode, continuous actions, no environment, flat form",
        "test/first-v0": "7 transitions, 2 episodes, discrete actions, CartPole-v1, Minari form",
        "test/new-v0": "5 transitions, 3 episodes, discrete actions, no environment, flat form",
        **{key: line for key, line in lines.items() if "damaged" in line},
        "test/new-v0.123.tmp": "left by an import that was killed (or still runs), delete it",
        "test/gone-v0.12.old": "the dataset before an import that was killed, rename it",
    }
    for name in ("cut", "lost", "later", "uneven", "poor"):
        assert lines[f"test/{name}-v0"].startswith(f"flat form, damaged: test/{name}-v0 cannot be read")
    assert lines["test/second-v0"].startswith("Minari form, damaged: test/second-v0 cannot be read")
    shutil.rmtree(place("test/second-v0"))
    with warnings.catch_warnings(action="error"):
        assert minari.list_local_datasets().keys() == {"test/first-v0"}


# ------------------------------------------------------------------------------------------------ datasets into one

SPACES = {
    "observation_space": gym.spaces.Dict(place=gym.spaces.Box(-9, 9, (2,), np.float64), goal=gym.spaces.Discrete(5)),
    "action_space": gym.spaces.Discrete(3),
}
PARTS = ["--combine", "test/first-v0", "test/second-v0", "--id", ID]


def new_part(name, lengths=(3, 4), added=None, **options):
    """Episodes of random numbers that float32 would round, which end by turns in a terminal state and by time-out."""
    rng, buffers = np.random.default_rng(len(name)), []
    for seed, n in enumerate(lengths):
        observations = {"place": rng.uniform(-9, 9, (n + 1, 2)), "goal": rng.integers(0, 5, n + 1)}
        flag, actions, rewards = flags(n, n - 1), rng.integers(0, 3, n), rng.normal(size=n)
        ends = (flag, flags(n)) if seed % 2 == 0 else (flags(n), flag)
        infos = {"speed": rng.normal(size=n + 1)}
        buffers.append(EpisodeBuffer(None, seed, {"wind": seed}, observations, actions, rewards, *ends, infos))
    store(name, buffers, **SPACES | options)
    minari.load_dataset(name).storage.update_metadata(added or {})
    return buffers


def rows_of(buffers, lengths):
    """The first rows of some episodes, flattened as the scripts do."""
    parts = []
    for buffer, n in zip(buffers, lengths, strict=True):
        place, goal = (buffer.observations[key][: n + 1] for key in ("place", "goal"))
        observations = np.float32(np.column_stack([np.eye(5)[goal], place]))
        parts.append((observations[:-1], buffer.actions[:n, None], np.float32(buffer.rewards[:n]), observations[1:]))
    return [np.concatenate(column).tolist() for column in zip(*parts)]


def test_combined_are_the_first_rows_of_each(run):
    first, second = new_part("test/first-v0"), new_part("test/second-v0", [2, 5])
    status, out, err = run(*PARTS, "--rows", 5, 7)
    assert status == 0 and "5 of 7 rows, 2 of 2 episodes; the last one is cut after 2 of its 4 rows" in out, err
    assert "12 transitions, 4 episodes" in out and metadata()["source"]["files"] == PARTS[1:3]
    columns, lengths = read()
    assert lengths == [3, 2, 2, 5] and [x.tolist() for x in columns[:4]] == rows_of(first + second, lengths)
    assert np.flatnonzero(columns[4]).tolist() == [2, 6] and np.flatnonzero(columns[5]).tolist() == [4, 11]
    assert columns[1].dtype == np.int64 and (metadata()["action_low"], metadata()["action_high"]) == ([0], [2])
    assert "Infos, seeds and options are not kept" in " ".join(metadata()["notes"])
    assert run(*PARTS[:-1], "test/first-v0")[0] == 1  # it exists
    assert run(*PARTS[:-1], "test/first-v0", "--force")[0] == 0  # of itself and another
    columns, lengths = read("test/first-v0")
    assert lengths == [3, 4, 2, 5] and [x.tolist() for x in columns[:4]] == rows_of(first + second, lengths)
    assert not (place("test/first-v0") / "data").exists() and not (place() / "episode_returns.npy").exists()


def test_combined_flat_datasets_keep_returns_before_dropping(run):
    """Rows 2 and 5 of a are time-outs, which are dropped. --rows cuts the last episode of b."""
    write("a.hdf5", n=6, timeouts=flags(6, 2), rewards=np.float32([1, 2, 4, 8, 16, 32]))
    write("b.hdf5", n=6, terminals=flags(6, 1, 5), rewards=np.float32([1, 2, 4, 8, 16, 32]))
    assert run("a.hdf5", "--id", "test/first-v0")[0] == run("b.hdf5", "--id", "test/second-v0")[0] == 0
    assert np.load(place("test/first-v0") / "episode_returns.npy").tolist() == [7, 56]
    assert run(*PARTS, "--rows", 4, 6)[0] == 0 and read()[0][2].tolist() == [1, 2, 8, 16, 1, 2, 4, 8, 16, 32]
    assert np.load(place() / "episode_returns.npy").tolist() == [7, 56, 3, 60] and metadata()["episodes"] == 4
    assert run(*PARTS, "--rows", 3, 5, "--force")[0] == 0
    assert np.load(place() / "episode_returns.npy").tolist() == [7, 3] and read()[1] == [2, 1, 2, 3]
    assert [x for x in metadata()["notes"] if x.startswith("test/first-v0: Dropped: 2 rows without")]
    assert run("--combine", "test/second-v0", "test/first-v0", "--id", ID, "--force")[0] == 0
    assert np.load(place() / "episode_returns.npy").tolist() == [3, 60, 7, 56]


def test_combined_metadata_are_what_all_share(run):
    """Environments are compared as runs use them: the one of the evaluation, else that of the recording."""
    score = {"ref_min_score": -1.0, "ref_max_score": 2.5}
    new_part("test/first-v0", env="CartPole-v1", added=score)
    new_part("test/second-v0", eval_env="CartPole-v1", added=score)
    out, environment = run(*PARTS)[1], {"id": "CartPole-v1", "max_episode_steps": 500, "wrappers": []}
    assert "Left out" not in out and "CartPole-v1, at most 500 steps, score 0 at -1 and 100 at 2.5" in out
    assert metadata()["environment"].items() >= environment.items() and metadata()["reference_scores"] == [-1, 2.5]
    new_part("test/third-v0", env="Acrobot-v1", eval_env="CartPole-v1", added=score | {"ref_min_score": -2.0})
    assert run("--combine", ID, "test/third-v0", "--id", "test/last-v0")[0] == 0  # a flat one and a Minari one
    assert metadata("test/last-v0").keys() & {"environment", "reference_scores"} == {"environment"}
    new_part("test/fourth-v0", env="CartPole-v1", eval_env="Acrobot-v1")
    out = run("--combine", "test/first-v0", "test/fourth-v0", "--id", ID, "--force")[1]
    assert "environment (CartPole-v1, at most 500 steps" in out and "Acrobot-v1" in out
    assert "reference_scores ([-1.0, 2.5]; None)" in out
    assert not metadata().keys() & {"environment", "reference_scores"}


UNEQUAL = {
    "a part of the observation": (
        {"observation_space": gym.spaces.Dict({**SPACES["observation_space"], "goal": gym.spaces.Discrete(6)})},
        ["observations: 7 numbers and 8 numbers"],
    ),
    "equal sizes": (
        {"observation_space": gym.spaces.Dict(place=SPACES["observation_space"]["place"],
                                              goal=gym.spaces.Discrete(5, start=1))},
        ["observation_space[subspaces][goal][start]: 0 and 1"],
    ),
    "actions": ({"action_space": gym.spaces.Discrete(4)}, ["action_high[0]: 2 and 3"]),
    "no episodes": ({"lengths": []}, ["0 transitions"]),
    "names": ({"added": {"observation_names": ["x", "z"]}}, ["import it again"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNEQUAL)
def test_datasets_that_differ_are_not_combined(fault, run):
    options, words = UNEQUAL[fault]
    new_part("test/first-v0")
    new_part("test/second-v0", **options)
    one_line(run(*PARTS), 1, ["test/second-v0", *words])


def test_images_are_not_combined(run):
    space, flag = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8), flags(3, 2)
    images = EpisodeBuffer(
        None, 0, None, np.zeros((4, 40, 40, 3), np.uint8), np.zeros(3, int), np.zeros(3), flag, ~flag
    )
    for name in ("test/first-v0", "test/second-v0"):
        store(name, [images], observation_space=space, action_space=gym.spaces.Discrete(3))
    one_line(run(*PARTS), 1, ["test/first-v0", "(40, 40, 3)", "vectors"])


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (1.7e9 + np.arange(4), "digits for observations [1]"),
        ([0, 1, np.nan, 2], "observations hold NaN"),
    ],
)
def test_numbers_that_cannot_be_stored_are_not_combined(column, words, run):
    space, flag = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64), flags(3, 2)
    observations = np.stack([np.arange(4), column], axis=1)
    episode = EpisodeBuffer(None, 0, None, observations, np.zeros(3, int), np.zeros(3), flag, flags(3))
    for name in ("test/first-v0", "test/second-v0"):
        store(name, [episode], observation_space=space, action_space=gym.spaces.Discrete(3))
    one_line(run(*PARTS), 1, ["test/first-v0", words])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"country": list("ADADFF")}, ["encoding[observations][2][values][0]: AT and A"]),
        ({"offer": TABLE.offer.str.upper()}, ["encoding[actions][0][values][0]: call and CALL"]),
        ({"offer": list("aabbaa")}, ["encoding[actions][0][values][0]: call and a"]),
        ({"offer": [1.5, 2, 3, 4, 5, 6]}, ["actions: 1 whole numbers and 1 real numbers"]),
        ({"vip": [1, 0, 0, 1, 1, 0]}, ["observations: 7 numbers and 6 numbers"]),
        ({"x_spend": TABLE.x_spend / 1e6 + 1e9}, ["encoding[observations][0][offset]: 0.0 and 1000000000.0"]),
    ],
)
def test_tables_that_differ_are_not_combined(changes, words, run):
    assert table_run(run, **{"id": ["test/first-v0"]})[0] == 0
    assert table_run(run, TABLE.assign(**changes), **{"id": ["test/second-v0"]})[0] == 0
    one_line(run(*PARTS), 1, ["test/first-v0 and test/second-v0 differ in", *words])
    assert table_run(run, **{"id": ["test/second-v0"], "force": []})[0] == run(*PARTS)[0] == 0
    assert metadata()["encoding"] == metadata("test/first-v0")["encoding"]


def test_what_cannot_be_combined_leaves_all_as_it_was(run, root):
    new_part("test/first-v0")
    new_part("test/second-v0")
    assert run(*PARTS)[0] == 0
    with h5py.File(root / "test/second-v0/data/main_data.hdf5", "r+") as file:
        del file["episode_1/rewards"]  # met when the rest is written
    before = contents(root)
    one_line(run("--combine", ID, "test/first-v0", *PARTS[3:-1], "test/last-v0", "--rows", 8, 8), 1,
             ["test/first-v0 has 7 rows", "--rows 8"])  # fmt: skip
    one_line(run(*PARTS, "--force"), 1, ["test/second-v0 cannot be read"])
    one_line(run("--combine", ID, ID, *PARTS[3:], "--force"), 1, [ID, "once"])
    one_line(run("--combine", ID, "test/first-v0", *PARTS[3:]), 1, [ID, "--force"])
    assert contents(root) == before
