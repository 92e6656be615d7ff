"""Datasets of frames: each row of a source is in them, in order and once, or is told in numbers."""

import gzip
import json
import os
import warnings
from pathlib import Path

import common
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import contents
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from import_frames import choose_episodes, store_frames
from minari.data_collector import EpisodeBuffer

from benchmarks import import_data

ID = "test/frames-v0"
COLUMNS = ("frames", "starts", "actions", "rewards", "terminals", "timeouts")
LIMIT = 11  # steps of an episode in these tests


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
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


def read(root, name=ID):
    folder = root / name
    columns = {key: np.load(folder / f"{key}.npy") for key in COLUMNS}
    return columns, json.loads((folder / "metadata.json").read_text())


def episodes(columns):
    """The frames, actions, rewards and whether a terminal ends it, of each episode."""
    found, row = [], 0
    limits = [*columns["starts"].tolist(), len(columns["frames"])]
    for start, stop in zip(limits[:-1], limits[1:]):
        end = row
        while not (columns["terminals"][end] or columns["timeouts"][end]):
            end += 1
        part = slice(row, end + 1)
        frames = columns["frames"][start:stop].tolist()
        found.append((frames, columns["actions"][part].tolist(), columns["rewards"][part].tolist()))
        found[-1] += (bool(columns["terminals"][end]),)
        row = end + 1
    assert row == len(columns["rewards"])
    return found


def refused(result, *words):
    status, _, error = result
    assert status != 0 and error.count("\n") == 1 and all(word in error for word in words), error


# ------------------------------------------------------------------------------------------ the DQN-replay layout


class Logger:
    """A circular replay buffer that writes itself to disk one row before it is full, as the DQN replay was logged."""

    def __init__(self, folder, capacity, seed=0):
        self.folder, self.capacity, self.count, self.logs = Path(folder), capacity, 0, 0
        self.rng, self.begins = np.random.default_rng(seed), True
        self.store = {
            "observation": self.rng.integers(0, 256, (capacity, 3, 2)).astype(np.uint8),  # memory as it comes
            "action": np.full(capacity, -7, np.int32),
            "reward": np.full(capacity, np.nan, np.float32),
            "terminal": np.full(capacity, 9, np.uint8),
        }

    def put(self, *row):
        for column, value in zip(self.store.values(), row):
            column[self.count % self.capacity] = value
        self.count += 1

    def add(self, frame, action, reward, terminal):
        if self.begins:
            for _ in range(3):
                self.put(0, 0, 0, 0)
        self.put(frame, action, reward, terminal)
        self.begins = terminal
        if self.count % self.capacity == self.capacity - 1:
            self.log(self.count)

    def log(self, count):
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, column in self.store.items():
            write_zip(self.folder / f"$store$_{name}_ckpt.{self.logs}.gz", column)
        write_zip(self.folder / f"add_count_ckpt.{self.logs}.gz", np.array(count))
        write_zip(self.folder / f"invalid_range_ckpt.{self.logs}.gz", np.zeros(5))
        self.logs += 1

    def play(self, *lengths):
        for length in lengths:
            for i in range(length):
                frame = self.rng.integers(1, 256, (3, 2))
                self.add(frame, self.rng.integers(4), self.rng.integers(-1, 2), i == length - 1)


def write_zip(path, array):
    with gzip.open(path, "wb") as file:
        np.save(file, array)


def read_zip(path):
    with gzip.open(path) as file:
        return np.load(file)


def logged(folder="Pong/1/replay_logs", capacity=40, lengths=(9, 11, 4, 17, 1, 11, 30, 5, 11, 8, 3), seed=0):
    """A run with rows of padding, stale rows, episodes across files, time-outs and a partial tail."""
    logger = Logger(folder, capacity, seed)
    logger.play(*lengths)
    logger.log(logger.count)  # the end of the run
    return Path(folder)


def slow_reading(folder, limit=LIMIT):
    """The episodes of a run, row by row; and how many rows were padding, stale, or without a next frame."""
    found, counts = [], {"padding": 0, "stale": 0, "cut": 0, "timeouts": 0}
    numbers = sorted(int(path.name.split(".")[1]) for path in folder.glob("add_count*"))
    carried, passes = 0, -1  # steps of an episode that an earlier file began
    for number in numbers:
        files = {key: read_zip(folder / f"$store$_{key}_ckpt.{number}.gz") for key in Logger("", 1).store}
        count = int(read_zip(folder / f"add_count_ckpt.{number}.gz"))
        n = len(files["action"])
        valid = count % n or n  # at a multiple all rows are new
        counts["stale"] += n - valid
        follows, passes = (count - 1) // n == passes + 1, (count - 1) // n
        carried = carried if follows else 0  # a pass between them was not stored
        part, skip = [], 3 if passes == 0 else None
        for row in range(valid):
            frame, action, reward, terminal = (column[row] for column in files.values())
            zero = not (frame.any() or action or reward or terminal)
            if skip and zero or skip is None and zero and row < 3:
                counts["padding"] += 1
                skip = skip and skip - 1
                carried = 0
                continue
            skip = 0
            part.append((frame.tolist(), int(action), float(reward)))
            if terminal:
                late = carried + len(part) == limit
                counts["timeouts"] += late
                found.append((part, not late))
                part, skip, carried = [], 3, 0
        if part:
            counts["cut"] += 1
            found.append((part, False))
            carried += len(part) + n - valid
        else:
            carried = 0  # the lost row may begin an episode; these tests have none of LIMIT steps there
    columns = []
    for part, terminal in found:
        frames, actions, rewards = map(list, zip(*part))
        kept = len(part) if terminal else len(part) - 1
        if kept:
            columns.append((frames, actions[:kept], rewards[:kept], terminal))
    return columns, counts


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("capacity", [13, 25, 40, 41, 500])
def test_a_logged_run_is_read_as_row_by_row(run, root, capacity, seed):
    lengths = np.random.default_rng(seed).integers(1, 24, 20)
    lengths[::5] = LIMIT
    folder = logged(capacity=capacity, lengths=lengths, seed=seed)
    expected, counts = slow_reading(folder)
    arguments = ("--id", ID, "--max_episode_steps", LIMIT, "--eval_env", "none")
    status, output, error = run("Pong", *arguments)
    assert status == 0, error
    columns, metadata = read(root)
    assert episodes(columns) == expected
    assert f"{counts['padding']} rows of padding" in output and f"{counts['stale']:,} stale row" in output
    lost = counts["cut"] + counts["timeouts"]
    assert not lost or f"{lost:,} row{'s' * (lost != 1)} without a known next frame" in output
    n = sum(len(read_zip(path)) for path in folder.glob("$store$_action*"))
    assert len(columns["rewards"]) == n - counts["padding"] - counts["stale"] - lost
    assert metadata["action_high"] == [3] and metadata["frame_max"] == 255 and "Rewards are from -1 to 1" in output


def test_the_counts_of_a_run_by_hand(run, root):
    """Files of 20 rows: 3 zeros, 9 steps, 3 zeros, 4 of 9 steps, and a stale row; 4 steps, 3 zeros, 2 steps; stale."""
    logged(capacity=20, lengths=(9, 9, 2))
    status, output, _ = run("Pong/1", "--id", ID, "--eval_env", "none")
    assert status == 0
    assert output.splitlines()[:5] == [
        "Files: 2, ckpt.0 to ckpt.1, with 40 rows.",
        "Dropped: 9 rows of padding, the zeros before an episode.",
        "Dropped: 12 stale rows, by add_count older than the rest: the last of 1 file, 11 of ckpt.1.",
        "Dropped: 1 row without a known next frame: the last of 1 episode that the end of a file cuts.",
        "Begun anew: 1 episode, begun in an earlier file; the first stacks have zeros for its frames.",
    ]
    assert [len(part[1]) for part in episodes(read(root)[0])] == [9, 3, 4, 2]


def test_zeros_inside_an_episode_are_told(run, root):
    """As of an episode that ended without a terminal."""
    folder = logged(capacity=30, lengths=(9, 9, 9))
    for name in ("observation", "action", "reward", "terminal"):
        change(folder, name, 0, lambda y: np.where((np.arange(30) == 11).reshape(-1, *[1] * (y.ndim - 1)), 0, y))
    status, output, _ = run("Pong", "--id", ID, "--eval_env", "none")
    assert status == 0 and "Kept: rows of zeros in 1 place" in output
    assert "Kept: rows of zeros in 1 place" in read(root)[1]["notes"][-1]


def test_time_outs_across_files_and_returns(run, root):
    logged(capacity=20, lengths=(9, 11, 2))  # the second one has 4 rows, a lost one, and 6
    status, output, _ = run("Pong/1", "--id", ID, "--eval_env", "none", "--max_episode_steps", 11)
    columns, metadata = read(root)
    assert status == 0 and "Time-outs: 1 of the terminals" in output
    assert [(len(part[1]), part[3]) for part in episodes(columns)] == [(9, True), (3, False), (5, False), (2, True)]
    returns = [sum(part[2]) for part in episodes(columns)]
    assert metadata["episode_returns"] == [returns[0], returns[3]]  # those of whole episodes


BAD_RUNS = {
    "no frames": (lambda x: (x / "$store$_observation_ckpt.1.gz").unlink(), ["no observation of ckpt.1"]),
    "no count": (lambda x: (x / "add_count_ckpt.0.gz").unlink(), ["no add_count of ckpt.0"]),
    "cut": (lambda x: cut(x / "$store$_observation_ckpt.1.gz", -20), ["observation_ckpt.1.gz", "damaged"]),
    "cut rewards": (lambda x: cut(x / "$store$_reward_ckpt.2.gz", -20), ["reward_ckpt.2.gz", "damaged"]),
    "empty": (lambda x: cut(x / "$store$_action_ckpt.0.gz", 0), ["action_ckpt.0.gz", "damaged"]),
    "checksum": (lambda x: flip(x / "$store$_observation_ckpt.0.gz", -6), ["observation_ckpt.0.gz", "damaged"]),
    "unequal": (lambda x: change(x, "reward", 1, lambda y: y[:-1]), ["ckpt.1", "differ", "reward (39,)"]),
    "other frames": (lambda x: change(x, "observation", 1, lambda y: y[:, :2]), ["(2, 2)", "(3, 2)"]),
    "floats": (lambda x: change(x, "observation", 1, np.float32), ["uint8", "float32"]),
    "objects": (lambda x: change(x, "action", 1, lambda y: y.astype("S2")), ["whole numbers"]),
    "no padding": (lambda x: change(x, "action", 0, np.ones_like), ["ckpt.0", "after a terminal and is not zero"]),
    "frames as padding": (lambda x: change(x, "observation", 0, lambda y: y | 1), ["ckpt.0", "is not zero"]),
    "NaN": (lambda x: change(x, "reward", 0, lambda y: y * np.nan), ["ckpt.0", "nan"]),
    "flags": (lambda x: change(x, "terminal", 0, lambda y: y + 2), ["ckpt.0", "must be 0 or 1"]),
    "no steps": (lambda x: [change(x, "add_count", i, lambda _: np.array(0)) for i in range(4)], ["no transition"]),
}


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def change(folder, name, number, function):
    path = folder / f"{name if name == 'add_count' else f'$store$_{name}'}_ckpt.{number}.gz"
    write_zip(path, function(read_zip(path)))


@pytest.mark.parametrize("fault", BAD_RUNS)
def test_damaged_runs_are_refused_in_a_line_and_leave_nothing(run, root, fault):
    folder = logged()
    assert len([*folder.glob("add_count*")]) == 4
    spoil, words = BAD_RUNS[fault]
    spoil(folder)
    refused(run("Pong", "--id", ID, "--eval_env", "none"), *words)
    assert not contents(root)


def test_several_runs_are_refused_by_name(run, root):
    logged()
    logged("Pong/2/replay_logs")
    refused(run("Pong", "--id", ID), "Pong/1/replay_logs", "Pong/2/replay_logs", "name one")
    assert run("Pong/2", "--id", ID, "--eval_env", "none")[0] == 0


def test_the_game_is_guessed_and_told(run, root, monkeypatch):
    logged()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without ale-py
    status, output, error = run("Pong", "--id", ID)
    assert status == 0, error
    assert "ALE/Pong-v5 is guessed" in output and "not checked, since the package ale-py is not installed" in output
    environment = read(root)[1]["environment"]
    assert environment["id"] == "ALE/Pong-v5" and environment["max_num_frames_per_episode"] == 108_000
    assert environment["repeat_action_probability"] == 0.25 and environment["frameskip"] == 1
    assert environment["wrappers"] == [["AtariPreprocessing", {"noop_max": 0, "frame_skip": 4, "screen_size": [2, 3]}]]


# ------------------------------------------------------------------------------------------------------- parts


def test_episodes_are_drawn_uniformly_until_the_rows_are_there():
    lengths = np.array([5, 1, 8, 3, 7])
    taken = np.zeros(5)
    for seed in range(400):
        kept = choose_episodes(lengths, 11, seed)
        assert kept.sum() == 11 and (kept <= lengths).all() and ((kept > 0) & (kept < lengths)).sum() <= 1
        assert np.array_equal(kept, choose_episodes(lengths, 11, seed))
        taken += kept / lengths
    assert np.allclose(taken / 400, 11 / 24, atol=0.1)
    assert choose_episodes(lengths, 7, first=True).tolist() == [5, 1, 1, 0, 0]
    assert choose_episodes(lengths, 24).tolist() == lengths.tolist()
    with pytest.raises(common.DataError):
        choose_episodes(lengths, 25)


@pytest.mark.parametrize("options", [("--first",), (), ("--seed", "3")])
def test_a_part_has_whole_episodes_but_for_one(run, root, options):
    """The same from the source and from the dataset of all."""
    logged()
    assert run("Pong", "--id", "test/all-v0", "--eval_env", "none")[0] == 0
    whole = episodes(read(root, "test/all-v0")[0])
    status, output, _ = run("Pong", "--id", ID, "--eval_env", "none", "--transitions", 33, *options)
    assert status == 0 and "Taken: 33 of " in output
    columns, _ = read(root)
    assert len(columns["rewards"]) == 33
    place, cuts = 0, 0
    for frames, actions, rewards, terminal in episodes(columns):
        n = len(actions)
        place = next(i for i in range(place, len(whole)) if whole[i][0][0] == frames[0])
        complete = n == len(whole[place][1])
        assert (actions, rewards) == (whole[place][1][:n], whole[place][2][:n])
        assert frames == whole[place][0][: len(frames) if complete else n + 1]
        assert terminal == (complete and whole[place][3])
        cuts += not complete
        place += 1
    assert cuts <= 1
    if "--first" in options:
        assert place == len(episodes(columns))
    again = ("--frames", "test/all-v0", "--id", "test/again-v0", "--transitions", 33, *options)
    assert run(*again)[0] == 0
    assert episodes(read(root, "test/again-v0")[0]) == episodes(columns)


def test_datasets_of_frames_are_joined(run, root):
    logged()
    run("Pong", "--id", "test/one-v0", "--eval_env", "none")
    run("--frames", "test/one-v0", "--id", "test/two-v0", "--transitions", 20)
    assert run("--combine", "test/two-v0", "test/one-v0", "--id", ID)[0] == 0
    parts = [episodes(read(root, name)[0]) for name in ("test/two-v0", "test/one-v0", ID)]
    assert parts[0] + parts[1] == parts[2]
    small = make_frames(np.zeros((6, 3, 3), np.uint8))
    store_frames("test/small-v0", *small, root)
    refused(run("--combine", "test/one-v0", "test/small-v0", "--id", "test/no-v0"), "(3, 2)", "(3, 3)")
    refused(run("--combine", "test/one-v0", "test/two-v0", "--rows", 1, 1, "--id", "test/no-v0"), "--transitions")
    status, output, _ = run("--list")
    assert status == 0 and "test/small-v0: 5 transitions, 1 episode" in output and "frames of 3 x 3" in output


def make_frames(frames):
    """The arguments of store_frames for one episode that is cut short."""
    n = len(frames) - 1
    flags = np.arange(n) == n - 1
    columns = {"starts": [0], "actions": np.zeros(n), "rewards": np.zeros(n), "terminals": ~flags & flags}
    metadata = {"action_low": [0], "action_high": [3], "frame_max": 255, "notes": [], "source": {}}
    return frames.shape, [frames], columns | {"timeouts": flags}, metadata


@pytest.mark.parametrize("fault", ["length", "type", "shape", "frames", "starts", "both", "open"])
def test_what_does_not_fit_together_is_not_stored(root, fault):
    root.mkdir(parents=True)
    shape, blocks, columns, metadata = make_frames(np.zeros((6, 3, 3), np.uint8))
    if fault == "length":
        columns["actions"] = columns["actions"][1:]
    elif fault == "type":
        blocks = [blocks[0].astype(np.int64)]
    elif fault == "shape":
        blocks = [blocks[0][:, :2]]
    elif fault == "frames":
        blocks = [blocks[0][:5]]
    elif fault == "starts":
        columns["starts"] = [0, 3]
    elif fault == "both":
        columns["terminals"] = columns["timeouts"]
    else:
        columns["timeouts"] = columns["terminals"]
    with pytest.raises(ValueError):
        store_frames(ID, shape, blocks, columns, metadata, root)
    assert not contents(root)


@pytest.mark.parametrize("event", range(10))
def test_an_interruption_leaves_the_old_dataset_or_none(run, root, monkeypatch, event):
    logged()
    assert run("Pong", "--id", "test/old-v0", "--eval_env", "none")[0] == 0
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
    part = ("Pong", "--eval_env", "none", "--transitions", 9, "--id")
    result = run(*part, "test/old-v0", "--force")
    assert result[0] == (130 if event < 9 else 0)
    assert event == 9 or contents(root) == before


def test_places_are_checked_before_a_frame_is_read(run, root):
    folder = logged()
    assert run("Pong", "--id", ID, "--eval_env", "none")[0] == 0
    cut(folder / "$store$_observation_ckpt.0.gz", 0)
    refused(run("Pong", "--id", ID, "--eval_env", "none"), "exists; --force")
    refused(run("Pong", "--id", "../out-v0", "--eval_env", "none"), "--id")
    (root / ID / "data").mkdir()
    refused(run("--frames", ID, "--id", "test/new-v0", "--transitions", 3), "holds two datasets")


# -------------------------------------------------------------------------------------------------- HDF5 files


def write_hdf5(path="game.hdf5", n=20, stacked=None, **changes):
    """Frames of 40 x 30 that tell their row; one terminal after 7 rows, and one time-out after 15."""
    rows = np.arange(n)
    frames = np.random.default_rng(0).integers(1, 256, (n, 40, 30)).astype(np.uint8)
    columns = {
        "observations": frames,
        "actions": rows % 3,
        "rewards": 5.0 * rows,
        "terminals": rows == 6,
        "timeouts": rows == 14,
    }
    if stacked is not None:
        firsts = np.maximum.accumulate(np.where(np.isin(rows, (0, 7, 15)), rows, 0))
        older = [np.where((rows - k >= firsts)[:, None, None], frames[rows - k], 0) for k in (3, 2, 1, 0)]
        columns["observations"] = np.stack(older, axis=stacked).astype(np.uint8)
    with h5py.File(path, "w") as file:
        for key, value in (columns | changes).items():
            if value is not None:
                file[key] = value
    return frames


@pytest.mark.parametrize("stacked", [None, 1, 3])
def test_images_of_an_hdf5_file_are_kept_once(run, root, stacked):
    frames = write_hdf5(stacked=stacked)
    status, output, error = run("game.hdf5", "--id", ID)
    assert status == 0, error
    columns, metadata = read(root)
    assert np.array_equal(columns["frames"], frames) and columns["starts"].tolist() == [0, 7, 15]
    rows = [*range(14), *range(15, 19)]
    assert columns["rewards"].tolist() == [5 * row for row in rows]
    assert columns["actions"].tolist() == [row % 3 for row in rows]
    assert [*np.flatnonzero(columns["terminals"])] == [6] and [*np.flatnonzero(columns["timeouts"])] == [13, 17]
    assert "2 rows without a known next frame" in output
    assert metadata["episode_returns"] == [5 * sum(range(7)), 5 * sum(range(7, 15))]


def test_colours_come_first_and_other_planes_are_refused(run, root):
    colours = np.random.default_rng(0).integers(0, 256, (20, 40, 30, 3)).astype(np.uint8)
    write_hdf5(observations=colours)
    assert run("game.hdf5", "--id", ID)[0] == 0
    assert np.array_equal(read(root)[0]["frames"], np.moveaxis(colours, 3, 1))
    planes = np.random.default_rng(0).integers(1, 256, (20, 40, 30, 4)).astype(np.uint8)
    write_hdf5(observations=planes)
    refused(run("game.hdf5", "--id", "test/planes-v0"), "row 0", "stack")
    write_hdf5(actions=np.zeros((20, 2)))
    refused(run("game.hdf5", "--id", "test/planes-v0"), "2 numbers")
    write_hdf5(observations=colours.astype(np.float32))
    refused(run("game.hdf5", "--id", "test/planes-v0"), "uint8")
    assert not (root / "test/planes-v0").exists()


# ---------------------------------------------------------------------------------------------- Minari datasets


def record(name, frames, terminal=(False, True), space=None, env_spec=None):
    """A Minari dataset of two episodes with these observations [2, n + 1, ...]."""
    buffers = []
    for i, observations in enumerate(frames):
        n = len(observations) - 1
        end = np.arange(n) == n - 1
        actions, rewards = np.arange(n) % 4, 2.0 * np.arange(n)
        buffers.append(
            EpisodeBuffer(
                id=i, observations=observations, actions=actions, rewards=rewards,
                terminations=end & terminal[i], truncations=end & ~np.bool_(terminal[i]),
            )
        )  # fmt: skip
    high = 1 if frames[0].dtype == bool else 255
    space = space or gym.spaces.Box(0, high, frames[0].shape[1:], frames[0].dtype)
    spaces = {"observation_space": space, "action_space": gym.spaces.Discrete(4)}
    with warnings.catch_warnings(action="ignore"):
        dataset = minari.create_dataset_from_buffers(name, buffers, jpeg_encoding=False, **spaces)
    if env_spec:
        dataset.storage.update_metadata({"env_spec": env_spec.to_json()})


def images(*shape, kind=np.uint8, high=256, seed=0):
    return [np.random.default_rng(seed + i).integers(0, high, (7 - i, *shape)).astype(kind) for i in range(2)]


class Shown(gym.Env):
    """Shows images, one after the other."""

    def __init__(self, shown):
        self.shown = shown
        self.observation_space = gym.spaces.Box(0, 255, shown.shape[1:], np.uint8)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.step_number = 0
        return self.shown[0], {}

    def step(self, action):
        self.step_number += 1
        return self.shown[self.step_number], 0.0, False, False, {}


def as_evaluated(shown):
    """Images as evaluation makes them."""
    env = gym.wrappers.ResizeObservation(gym.wrappers.GrayscaleObservation(Shown(shown)), (84, 84))
    return np.stack([env.reset()[0], *(env.step(0)[0] for _ in shown[1:])])


def test_colours_of_a_game_become_what_evaluation_sees(run, root):
    pytest.importorskip("cv2")
    frames = images(210, 160, 3)
    kwargs = {"frameskip": 4, "repeat_action_probability": 0.0, "render_mode": "human"}
    record("atari/pong/expert-v0", frames, env_spec=EnvSpec("ALE/Pong-v5", entry_point="evil:Env", kwargs=kwargs))
    status, output, error = run("--frames", "atari/pong/expert-v0", "--id", ID)
    assert status == 0, error
    columns, metadata = read(root)
    expected = np.concatenate([as_evaluated(frames[0]), as_evaluated(frames[1])[:-1]])
    assert np.array_equal(columns["frames"], expected) and columns["starts"].tolist() == [0, 7]
    assert columns["actions"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0]
    assert [*np.flatnonzero(columns["terminals"])] == [10] and [*np.flatnonzero(columns["timeouts"])] == [5]
    wrappers = [["GrayscaleObservation", {}], ["ResizeObservation", {"shape": [84, 84]}]]
    assert metadata["environment"] == {
        "id": "ALE/Pong-v5", "frameskip": 4, "repeat_action_probability": 0.0, "wrappers": wrappers
    }  # fmt: skip
    assert "GrayscaleObservation, ResizeObservation [84, 84]" in output and "evil" not in json.dumps(metadata)
    status, _, error = run("--frames", "atari/pong/expert-v0", "--id", "test/colour-v0", "--grey", "False")
    assert status == 0, error
    assert read(root, "test/colour-v0")[0]["frames"].shape == (12, 3, 210, 160)


def test_wrappers_of_a_recording_come_first(run, root):
    frames = images(20, 30, 3)
    clip = WrapperSpec("ClipReward", "gymnasium.wrappers:ClipReward", {"max_reward": 1})
    record("test/images-v0", frames, env_spec=EnvSpec("Some-v0", additional_wrappers=(clip,), max_episode_steps=9))
    assert run("--frames", "test/images-v0", "--id", ID, "--grey", "True")[0] == 0
    environment = read(root)[1]["environment"]
    wrappers = [["ClipReward", {"max_reward": 1}], ["GrayscaleObservation", {}]]
    assert environment == {"id": "Some-v0", "max_episode_steps": 9, "wrappers": wrappers}


@pytest.mark.parametrize(
    ("shape", "kind", "stored"),
    [((6, 6, 4), bool, (4, 6, 6)), ((20, 30, 3), np.uint8, (3, 20, 30)), ((3, 20, 30), np.uint8, (3, 20, 30)),
     ((20, 30), np.uint8, (20, 30)), ((20, 30, 1), np.uint8, (1, 20, 30))],
)  # fmt: skip
def test_planes_come_first(run, root, shape, kind, stored):
    frames = images(*shape, kind=kind, high=2 if kind is bool else 256)
    record("test/images-v0", frames, terminal=(False, False))
    status, _, error = run("--frames", "test/images-v0", "--id", ID)
    assert status == 0, error
    columns, metadata = read(root)
    expected = np.concatenate(frames)
    expected = np.moveaxis(expected, 3, 1) if stored != shape else expected
    assert columns["frames"].shape[1:] == stored and np.array_equal(columns["frames"], expected)
    assert metadata["frame_max"] == (1 if kind is bool else 255) and "environment" not in metadata


def test_other_minari_datasets_are_refused(run, root):
    record("test/floats-v0", images(6, 6, 3, kind=np.float32), space=gym.spaces.Box(0, 255, (6, 6, 3), np.float32))
    refused(run("--frames", "test/floats-v0", "--id", ID), "uint8 or boolean")
    record("test/vectors-v0", images(6))
    refused(run("--frames", "test/vectors-v0", "--id", ID), "uint8 or boolean")
    record("test/grey-v0", images(6, 6))
    refused(run("--frames", "test/grey-v0", "--id", ID, "--grey", "True"), "GrayscaleObservation")
    refused(run("--frames", "test/absent-v0", "--id", ID), "test/absent-v0")
    assert not (root / ID).exists()


# ----------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("Pong",), "--id"),
        (("Pong", "--id", ID, "--transitions", 0), "at least 1"),
        (("Pong", "--id", ID, "--transitions", 1000), "--transitions 1000"),
        (("Pong", "--id", ID, "--seed", 1), "--transitions"),
        (("Pong", "--id", ID, "--first"), "--transitions"),
        (("Pong", "--id", ID, "--first", "--seed", 1, "--transitions", 9), "exclude"),
        (("Pong", "--id", ID, "--grey", "True"), "--frames"),
        (("Pong", "--id", ID, "--reward", "x"), "tables"),
        (("Pong", "--id", ID, "--sticky", 2), "probability"),
        (("Pong", "--id", ID, "--action_low", 0, "--action_high", 1, "--eval_env", "none"), "0 to 1"),
        (("Pong", "--id", ID, "--action_low", 1, "--action_high", 9, "--eval_env", "none"), "--action_low takes 0"),
        (("Pong", "--id", ID, "--action_low", 0, "--action_high", 9.7, "--eval_env", "none"), "a whole number"),
        (("Pong", "--id", ID, "--action_low", 0, "--action_high", "inf", "--eval_env", "none"), "a whole number"),
        (("--frames", "test/all-v0", "--id", "test/b-v0"), "--transitions"),
        (("--frames", "test/all-v0", "--id", "test/b-v0", "--transitions", 3, "--grey", "True"), "--grey"),
        (("--frames", "test/all-v0", "--id", "test/b-v0", "--eval_env", "none"), "--eval_env"),
        (("--frames", "test/all-v0", "--transitions", 9), "--id"),
    ],
)
def test_bad_command_lines(run, root, arguments, word):
    logged()
    assert run("Pong", "--id", "test/all-v0", "--eval_env", "none")[0] == 0
    refused(run(*arguments), word)
    assert not (root / ID).exists() and not (root / "test/b-v0").exists()
