"""benchmarks/import_data.py: every transition is in the dataset, in order, or counted; bad data give one line."""

import functools
import hashlib
import json
import shutil
import socket
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
    assert (f"{dropped} rows were dropped" in out) == (dropped > 0)
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
    file = place() / "returns.npy"
    before = [x for x in complete_returns(episodes) if x is not None]
    assert file.exists() == (before != complete_returns(stored))
    assert not file.exists() or np.load(file).tolist() == before


def test_splits_and_what_is_missing_are_said(run):
    following = np.roll(columns()["observations"], -1, axis=0)
    following[4] = -1
    out = run(write(next_observations=following), "--id", ID)[1]
    assert "1 episodes were split" in out and read()[1] == [5, 7]
    out = run(write(timeouts=None, terminals=flags(12, 2)), "--id", ID, "--force", "--max_episode_steps", 4)[1]
    assert "end after 4 steps" in out and "3 rows were dropped" in out and "1 terminal rows" in out
    assert read()[1] == [3, 3, 3] and "1 terminal rows" in " ".join(metadata()["notes"])


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
    table.to_csv(name, index=False) if name.endswith("csv") else table.to_parquet(name)
    options = OPTIONS | {f"--{key}": value for key, value in changes.items()}
    return run(name, *(word for key, words in options.items() if words is not None for word in (key, *words)))


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_of_logged_data(name, run):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    table = TABLE if name.endswith("csv") else TABLE.assign(time=pd.to_datetime(TABLE.time, format="ISO8601"))
    status, out, err = table_run(run, table, name)
    assert status == 0 and "1 rows were dropped" in out and "0 is call, 1 is mail, 2 is none" in out, err
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
        "actions": [{"name": "offer", "values": ["call", "mail", "none"]}],
    }  # fmt: skip
    assert (stored["action_low"], stored["action_high"], stored["actions"]) == ([0], [2], "discrete")
    assert np.load(place() / "returns.npy").tolist() == [-0.25, 4, 7]  # with the dropped row's reward of -1


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
    (["table.csv", "--id", ID, "--reward", "x"], 2, ["--episode", "--terminal"]),
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
    assert not (place("test/first-v0") / "data").exists() and not (place() / "returns.npy").exists()


def test_combined_flat_datasets_keep_returns_before_dropping(run):
    """Of a, rows 3 and 5 are dropped, time-outs; of b, the last row is cut off by --rows."""
    write("a.hdf5", n=6, timeouts=flags(6, 2), rewards=np.float32([1, 2, 4, 8, 16, 32]))
    write("b.hdf5", n=6, terminals=flags(6, 1, 5), rewards=np.float32([1, 2, 4, 8, 16, 32]))
    assert run("a.hdf5", "--id", "test/first-v0")[0] == run("b.hdf5", "--id", "test/second-v0")[0] == 0
    assert np.load(place("test/first-v0") / "returns.npy").tolist() == [7, 56]
    assert run(*PARTS, "--rows", 4, 6)[0] == 0 and read()[0][2].tolist() == [1, 2, 8, 16, 1, 2, 4, 8, 16, 32]
    assert np.load(place() / "returns.npy").tolist() == [7, 56, 3, 60] and metadata()["episodes"] == 4
    assert run(*PARTS, "--rows", 3, 5, "--force")[0] == 0
    assert np.load(place() / "returns.npy").tolist() == [7, 3] and read()[1] == [2, 1, 2, 3]
    assert [x for x in metadata()["notes"] if x.startswith("test/first-v0: 2 rows were dropped")]
    assert run("--combine", "test/second-v0", "test/first-v0", "--id", ID, "--force")[0] == 0
    assert np.load(place() / "returns.npy").tolist() == [3, 60, 7, 56]


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
        ["space[goal]: Discrete(5) and Discrete(5, start=1)"],
    ),
    "actions": ({"action_space": gym.spaces.Discrete(4)}, ["action_high[0]: 2 and 3"]),
    "names": ({"added": {"observation_names": ["x", "z"]}}, ["import it again"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNEQUAL)
def test_datasets_that_differ_are_not_combined(fault, run):
    options, words = UNEQUAL[fault]
    new_part("test/first-v0")
    new_part("test/second-v0", **options)
    one_line(run(*PARTS), 1, ["test/second-v0", *words])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"country": list("ADADFF")}, ["encoding[observations][2][values][0]: AT and A"]),
        ({"offer": TABLE.offer.str.upper()}, ["encoding[actions][0][values][0]: call and CALL"]),
        ({"offer": list("aabbaa")}, ["action_high[0]: 2 and 1"]),
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
