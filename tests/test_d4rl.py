"""Files of D4RL's layout: names, downloads, environments, episodes, and files that must be refused."""

import functools
import http.server
import math
import threading
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import DATASET, WORLDS, Counter, discrete, refusal, table, weights
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
NAMES = {
    "halfcheetah-medium-expert-v2": "gym_mujoco_v2/halfcheetah_medium_expert-v2",
    "walker2d-full-replay-v1": "gym_mujoco_v1/walker2d_full_replay-v1",
    "hopper-medium-replay-v0": "gym_mujoco/hopper_mixed",
    "walker2d-medium-replay-v0": "gym_mujoco/walker_mixed",
    "ant-random-v0": "gym_mujoco/ant_random",
    "bullet-hopper-medium-replay-v0": "bullet/bullet-hopper_medium_replay",
    "pen-human-v0": "hand_dapg/pen-v0_demos_clipped",
    "door-cloned-v0": "hand_dapg/door-demos-v0-bc-combined",
    "hammer-expert-v0": "hand_dapg/hammer-v0_expert_clipped",
    "relocate-human-v1": "hand_dapg_v1/relocate-human-v1",
    "antmaze-umaze-v0": "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse",
    "antmaze-umaze-diverse-v2": "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
    "antmaze-medium-play-v2": "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed",
    "antmaze-large-diverse-v2": "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
    "maze2d-open-v0": "maze2d/maze2d-open-sparse",
    "maze2d-open-dense-v0": "maze2d/maze2d-open-dense",
    "maze2d-umaze-v1": "maze2d/maze2d-umaze-sparse-v1",
    "maze2d-eval-large-dense-v1": "maze2d/maze2d-eval-large-dense-v1",
    "bullet-maze2d-open-v0": "bullet/bullet-maze2d-open-sparse",
    "bullet-maze2d-large-v0": "bullet/bullet-maze2d-large-sparse",
    "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0",
    "flow-merge-controller-v0": "flow/flow-merge-v0-idm",
    "carla-town-v0": "carla/carla_town_subsamp_flat-v0",
}
SIZES = {
    "halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "ant": (27, 8), "pen": (45, 24), "door": (39, 28),
    "hammer": (46, 26), "relocate": (39, 30),
}  # fmt: skip


def columns(n, **changes):
    """n rows with observations (row, ...) and rewards of the row's number, for the Counter environment."""
    rows, space = np.arange(n, dtype=np.float32), Counter.action_space
    space.seed(0)
    made = {
        "observations": np.stack([rows, 10 * rows, rows / 10], axis=1),
        "actions": np.array([space.sample() for _ in range(n)]).reshape(n, 2),
        "rewards": rows,
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def flags(n, places):
    return np.isin(np.arange(n), places)


@pytest.fixture
def write(tmp_path):
    def write(path=tmp_path / "data.hdf5", n=12, **changes):
        with h5py.File(path, "w") as file:
            for key, value in columns(n, **changes).items():
                file[key] = value
            file["metadata/algorithm"] = b"SAC"
            file["infos/action_log_probs"] = np.zeros(n)
        return str(path)

    return write


@pytest.fixture
def server(tmp_path, script, monkeypatch):
    """D4RL's server: answers with `server.answer(path)` -> (status, declared length or None, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, length, body = server.answer(self.path)
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = asked
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(script, "D4RL_URL", f"http://127.0.0.1:{server.server_port}/offline_rl")
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
        yield server
        server.shutdown()


def test_names_lead_to_the_files_of_d4rls_server(script):
    files = script.d4rl_files()
    assert FOLDER.startswith(script.D4RL_URL) and len(files) == 154 and len({*files.values()}) == 154
    assert {name: files[name] for name in NAMES} == NAMES
    for absent in ("halfcheetah-mixed-v0", "hopper-random-expert-v0", "maze2d-eval-open-v0", "hopper-full-replay-v0"):
        assert absent not in files


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("hopper-full-replay-v2", (-20.272305, 3234.3)),
        ("antmaze-umaze-v2", (0, 1)),
        ("ant-expert-v2", (-325.6, 3879.7)),
        ("maze2d-large-v1", (6.7, 273.99)),
        ("maze2d-large-dense-v1", (30.569041, 303.4857382709002)),
        ("maze2d-eval-large-v1", None),
        ("bullet-ant-expert-v0", (373.705955, 2650.495)),
        ("pen-human-v1", (96.262799, 3076.8331017826877)),
        ("kitchen-mixed-v0", (0, 4)),
        ("hopper-of-mine-v0", None),
        ("hopper-medium-v2.hdf5", None),
    ],
)
def test_scores_are_those_of_the_task(name, reference, script):
    assert script.reference_scores(name, [], {}) == reference


@pytest.mark.parametrize("task", SIZES)
def test_environments_have_the_sizes_of_the_data(task, script, tiny, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    kind = "medium" if task in ("halfcheetah", "hopper", "walker2d", "ant") else "human"
    name = next(x for x in script.d4rl_files() if x.startswith(f"{task}-{kind}-v"))
    (env,) = script.make_environments(tiny(env=name, n_episodes=1))
    assert (env.observation_space.shape[0], env.action_space.shape[0]) == SIZES[task]
    assert env.spec.max_episode_steps == {"pen": 100}.get(task, 1000 if kind == "medium" else 200)
    assert script.reference_scores("", [env], {}) == script.reference_scores(name, [], {})
    assert not [x for x in recwarn if "out of date" in str(x.message)]
    env.close()


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "kitchen-mixed-v0", "maze2d-umaze-v1", "data.hdf5"])
def test_where_no_environment_fits_the_run_says_so(name, script, tiny, capsys):
    assert script.make_environments(tiny(env=name)) == []
    assert f"{name} has no environment" in capsys.readouterr().out


def test_known_next_observations_are_used_and_time_outs_kept(script, write):
    following = columns(12)["observations"] + 100
    name = write(next_observations=following, terminals=flags(12, [3]), timeouts=flags(12, [3, 7]))
    data = script.load_dataset(name)
    assert np.array_equal(data["next_observations"], following)
    assert data["rewards"].tolist() == [*range(12)]
    assert np.flatnonzero(data["terminals"]).tolist() == [3] and np.flatnonzero(data["timeouts"]).tolist() == [7, 11]
    assert {key: column.dtype for key, column in data.items()} == {
        key: bool if key in ("terminals", "timeouts") else np.float32 for key in script.COLUMNS
    }


def test_without_next_observations_rows_are_paired_within_episodes(script, write):
    data = script.load_dataset(write(terminals=flags(12, [3, 11]), timeouts=flags(12, [7, 8])))
    rows = [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
    assert data["rewards"].tolist() == rows  # 7 and 8 ended by time-outs
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 3, 5, 6, 7, 10, 11, 11]
    assert data["rewards"][data["terminals"]].tolist() == [3, 11]
    assert data["rewards"][data["timeouts"]].tolist() == [6]
    assert script.episode_numbers(data).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


@given(data=st.data(), n=st.integers(1, 30), stored=st.booleans(), flagged=st.booleans(), limit=st.integers(1, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_episodes_are_those_of_a_slow_reading(script, data, n, stored, flagged, limit):
    """Row by row: where the next state is known, which, and where an episode ends."""
    some = st.lists(st.booleans(), min_size=n, max_size=n)
    terminals, timeouts = np.array(data.draw(some)), np.array(data.draw(some))
    observations = columns(n)["observations"]
    jumps = np.append((terminals | timeouts)[:-1], True)
    following = np.where(jumps[:, None], -7, np.append(observations[1:], observations[:1], axis=0))

    expected, episode, since = [], 0, 0
    for i in range(n):
        since += 1
        out = timeouts[i] if flagged else jumps[i] if stored else since == limit
        ended = terminals[i] or out or i == n - 1
        if stored:
            expected.append((i, -7 if jumps[i] else i + 1, terminals[i], episode))
        elif terminals[i] or not ended:
            expected.append((i, i if terminals[i] else i + 1, terminals[i], episode))
        episode, since = episode + ended, 0 if ended else since

    path = Path("memory.hdf5")
    changes = {"terminals": terminals, "timeouts": timeouts if flagged else None}
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        for key, value in columns(n, **changes, next_observations=following if stored else None).items():
            file[key] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script.h5py, "File", lambda _: file)
            read = script.load_d4rl(path, limit)
    found = zip(read["rewards"], read["next_observations"][:, 0], read["terminals"], script.episode_numbers(read))
    assert not (read["terminals"] & read["timeouts"]).any()
    numbers = {number: i for i, number in enumerate(dict.fromkeys(x[3] for x in expected))}
    assert [*found] == [(*x[:3], numbers[x[3]]) for x in expected]


def test_a_run_on_a_file(script, tiny, run, write, capsys):
    name = write(n=60, timeouts=flags(60, range(9, 60, 10)))
    with pytest.raises(script.DataError, match=r"sizes"):
        script.train(tiny(env=name, eval_env=WORLDS[script.__name__].others[0]))
    folder = run(env=name, eval_env="Counter-v0")
    row = table(folder)[-1]
    assert math.isfinite(float(row["eval_return"])) and row["d4rl_normalized_score"] == ""
    assert "54 transitions, 6 episodes" in capsys.readouterr().out
    assert table(run(env=name, eval_env="Hopper-Toy-v0", run_id="hopper"))[-1]["d4rl_normalized_score"] != ""


def test_grids_of_a_file_become_vectors_and_images_are_refused(script, tiny, write):
    grids = np.arange(12 * 12).reshape(12, 2, 2, 3)
    for following in (None, grids):
        data = script.load_dataset(write(observations=grids, next_observations=following))
        assert data["observations"][:11].tolist() == grids.reshape(12, 12)[:11].tolist()
        assert data["next_observations"].shape == data["observations"].shape
    name = write(observations=np.zeros((12, 20, 20, 3)))
    assert "observations have shape (12, 20, 20, 3)" in refusal(script.train, tiny(env=name, eval_env="none"))[1]


@discrete
def test_actions_of_a_file_may_have_one_axis(script, run, write):
    name = write(n=60, actions=np.arange(60) % 3)
    assert script.load_dataset(name)["actions"][:4].tolist() == [[0], [1], [2], [0]]
    assert weights(run(env=name, eval_env="none"))["/weights/action_high"].tolist() == [2]


def test_a_file_in_the_dataset_folder_is_read(script, write, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write(tmp_path / "hopper_medium-v2.hdf5", timeouts=None)
    assert len(script.load_dataset("hopper-medium-v2")["rewards"]) == 11
    write(tmp_path / "pen-human-v1.hdf5", n=250, timeouts=None)  # 100 steps an episode
    data = script.load_dataset("pen-human-v1")
    assert data["rewards"].tolist() == [i for i in range(249) if i not in (99, 199)]


def test_missing_file_is_downloaded_once(script, server, write, tmp_path, capsys):
    body = Path(write()).read_bytes()
    server.answer = lambda path: (200, len(body), body)
    data = script.load_dataset("hopper-medium-v2")
    assert len(data["rewards"]) == 11 and server.asked == ["/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5"]
    out, err = capsys.readouterr()
    assert "downloading" in out and "100%" in err
    script.load_dataset("hopper-medium-v2")
    assert len(server.asked) == 1
    assert [(x.name, x.read_bytes()) for x in (tmp_path / "d4rl").iterdir()] == [("hopper_medium-v2.hdf5", body)]


@pytest.mark.parametrize("fault", ["cut", "short", "page", "empty", "404", "500", "silent", "nobody"])
def test_failed_download_leaves_nothing_and_says_what_to_do(fault, script, server, write, tiny, tmp_path, monkeypatch):
    body = Path(write(n=5000)).read_bytes()
    forever = threading.Event()

    def answer(path):
        if fault == "silent":
            forever.wait(20)
        status = int(fault) if fault.isdigit() else 200
        content = {"cut": body[:-5000], "short": body[:-1], "page": b"<html>moved</html>", "empty": b""}.get(
            fault, body
        )
        return status, len(body) if fault == "cut" else None, content

    server.answer = answer
    if fault == "silent":
        waits = []
        timeout = lambda seconds: waits.append(seconds) or original(0.5 if seconds else None)  # noqa: E731
        original = script.socket.setdefaulttimeout
        monkeypatch.setattr(script.socket, "setdefaulttimeout", timeout)
    if fault == "nobody":
        server.shutdown()
        server.server_close()
    status, line = refusal(script.train, tiny(env="hopper-medium-v2"))
    forever.set()
    path = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    assert status == 1 and str(path) in line and script.D4RL_URL in line and "hopper-medium-v2" in line
    assert [*path.parent.iterdir()] == [] and not (tmp_path / "runs").exists()
    assert script.socket.getdefaulttimeout() is None
    if fault == "silent":
        assert waits[0] <= 20 and waits[-1] is None


BAD = {
    "lacks actions": ({"actions": None}, "actions"),
    "lacks rewards": ({"rewards": None}, "rewards"),
    "lacks terminals": ({"terminals": None}, "terminals"),
    "NaN": ({"rewards": np.full(12, np.nan)}, "rewards"),
    "infinity": ({"observations": np.full((12, 3), np.inf)}, "observations"),
    "beyond float32": ({"rewards": np.full(12, 1e300)}, "rewards"),
    "short column": ({"actions": np.zeros((11, 2))}, "11"),
    "flat actions": ({"actions": np.zeros(12)}, "actions"),
    "wide rewards": ({"rewards": np.zeros((12, 2))}, "rewards"),
    "flags of 2": ({"terminals": np.full(12, 2.0)}, "terminals"),
    "flags of NaN": ({"timeouts": np.full(12, np.nan)}, "timeouts"),
    "words": ({"rewards": np.array([b"one"] * 12)}, ""),
    "far actions": ({"actions": np.full((12, 2), 9.0)}, "9"),
    "no rows": ({"n": 0}, "no transition"),
    "one row": ({"n": 1}, "no transition"),
    "flags in a column": ({"terminals": np.zeros((12, 1), bool)}, "terminals"),
    "no actions": ({"actions": np.zeros((12, 0))}, "actions"),
    "numbers that overflow later": ({"observations": np.full((12, 3), 3e38)}, "observations"),
    "time-outs alone": ({"timeouts": np.ones(12, bool)}, "no transition"),
    "next observations of another size": ({"next_observations": np.zeros((12, 2))}, "next_observations"),
    "next observations of another size, no flags": (
        {"next_observations": np.zeros((12, 2)), "timeouts": None},
        "",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_file_is_one_line(fault, script, tiny, write, tmp_path):
    changes, word = BAD[fault]
    name = write(**changes)
    status, line = refusal(script.train, tiny(env=name, eval_env="Counter-v0"))
    assert status == 1 and f"--env {name}" in line and word in line
    assert not (tmp_path / "runs").exists()


def test_what_is_no_hdf5_file_is_one_line(script, tiny, write, tmp_path):
    content = Path(write()).read_bytes()
    bad = {"none.hdf5": None, "empty.hdf5": b"", "text.hdf5": b"text", "cut.hdf5": content[: len(content) // 2]}
    for name, body in (bad | {"end.hdf5": content[:-10], "no_suffix": b"PK"}).items():
        if body is not None:
            (tmp_path / name).write_bytes(body)
        status, line = refusal(script.train, tiny(env=str(tmp_path / name), eval_env="none"))
        assert status == 1 and str(tmp_path / name) in line
    (tmp_path / "folder.hdf5").mkdir()
    refusal(script.train, tiny(env=str(tmp_path / "folder.hdf5"), eval_env="none"))
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:
        for key in columns(1):
            file.create_group(key)
    refusal(script.train, tiny(env=str(tmp_path / "groups.hdf5"), eval_env="none"))


def test_file_that_declares_more_than_memory_is_refused(script, tiny, write):
    name = write()
    for n in (10**11, 10**14):
        with h5py.File(name, "w") as file:
            for key, column in columns(1).items():
                file.create_dataset(key, (n, *column.shape[1:]), column.dtype, chunks=(1024, *column.shape[1:]))
        assert Path(name).stat().st_size < 10**5
        status, line = refusal(script.train, tiny(env=name, eval_env="none"))
        assert status == 1 and "memory" in line


def test_virtual_dataset_is_refused(script, tiny, write, tmp_path):
    """Its rows would be zeros where the file that it names is missing."""
    name = write()
    with h5py.File(name, "r+") as file:
        del file["rewards"]
        layout = h5py.VirtualLayout((12,), np.float32)
        layout[:] = h5py.VirtualSource("missing.hdf5", "rewards", (12,))
        file.create_virtual_dataset("rewards", layout)
    assert "rewards are a virtual dataset" in refusal(script.train, tiny(env=name, eval_env="none"))[1]


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/no", "/dev/null/x", "~nobody-at-all/x", "/tmp/" + 300 * "x"])
def test_dataset_folder_that_cannot_be_is_one_line(folder, script, tiny, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", folder)
    monkeypatch.setattr(script, "D4RL_URL", "http://127.0.0.1:9")
    assert "hopper_medium-v2.hdf5" in refusal(script.train, tiny(env="hopper-medium-v2"))[1]
    monkeypatch.setenv("MINARI_DATASETS_PATH", folder)
    refusal(script.train, tiny())


def test_nearest_names_are_told(script, tiny):
    for name, near in (("hopper-medum-v2", "hopper-medium-v2"), ("toy/countr-v0", DATASET)):
        status, line = refusal(script.train, tiny(env=name))
        assert status == 1 and near in line


@functools.cache
def body(script):
    with h5py.File("flips.hdf5", "w", driver="core", backing_store=False) as file:
        for key, value in columns(40, timeouts=flags(40, [9, 19, 29])).items():
            file[key] = value
        file.flush()
        return file.id.get_file_image()


@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damaged_bytes_are_refused_or_read_as_numbers(script, flips, tmp_path_factory):
    content = bytearray(body(script))
    for place, change in flips:
        content[int(place * len(content))] ^= change
    path = tmp_path_factory.getbasetemp() / "flips.hdf5"
    path.write_bytes(content)
    try:
        data = script.load_dataset(str(path))
        script.check_dataset(data, str(path))
        bounds = script.action_bounds(Counter.action_space)
        data["actions"] = script.encode_actions(data["actions"], *bounds.values(), str(path))[0]
    except script.DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.isfinite(data[key]).all() for key in script.COLUMNS)


def test_environment_ids_of_the_table_are_registered(script):
    for name in script.D4RL_ENVIRONMENTS.values():
        assert name in gym.registry or name.startswith("AdroitHand")
