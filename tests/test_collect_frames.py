"""collect_frames.py: everything that an agent met is stored once, as it was met."""

import csv
import json
import sys

import gymnasium as gym
import numpy as np
import pytest

from algorithms.discrete import cql_atari
from benchmarks import collect_frames
from benchmarks.collect_frames import Planes, Recorder, curve, main


class Noise(gym.Env):
    """Random images; episodes end by chance, by a terminal, a time-out or both. It writes down what it did."""

    log = []  # of the environment that was made last: an episode is a list of (frame, action, reward, next frame, ends)

    def __init__(self, shape=(6, 5, 3), dtype=bool, n_actions=3):
        self.observation_space = gym.spaces.Box(0, 1 if dtype is bool else 255, shape, dtype)
        self.action_space = gym.spaces.Discrete(n_actions)
        Noise.log = []

    def draw(self):
        self.frame = self.observation_space.sample()
        return self.frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        Noise.log.append([])
        return self.draw(), {}

    def step(self, action):
        before, reward = self.frame.copy(), round(float(self.np_random.normal()), 2)
        terminated, truncated = self.np_random.random(2) < 0.1
        Noise.log[-1].append((before, int(action), reward, self.draw().copy(), bool(terminated), bool(truncated)))
        return self.frame, reward, bool(terminated), bool(truncated), {}


gym.register("Noise-v0", Noise)
gym.register("Noise/Grey-v0", Noise, kwargs={"shape": (7, 6), "dtype": np.uint8})
gym.register("Noise/Large-v0", Noise, kwargs={"shape": (40, 36, 2)})


def first(frame):
    """[H, W, C] -> [C, H, W]."""
    return np.stack([frame[:, :, c] for c in range(frame.shape[2])]) if frame.ndim == 3 else frame


def check(columns, n_steps):
    """The columns are the first n_steps steps of Noise.log."""
    ends = columns["terminals"] | columns["timeouts"]
    episodes = np.split(np.arange(n_steps), np.flatnonzero(ends)[:-1] + 1)
    assert [len(columns[name]) for name in ("actions", "rewards", "terminals", "timeouts")] == [n_steps] * 4
    assert len(columns["starts"]) == len(episodes)
    row = n_frames = 0
    for number, rows in enumerate(episodes):
        start, met = columns["starts"][number], Noise.log[number]
        assert start == n_frames
        for place, (frame, action, reward, after, terminated, truncated) in enumerate(met[: len(rows)]):
            np.testing.assert_array_equal(columns["frames"][start + place], first(frame))
            assert columns["actions"][row] == action and columns["rewards"][row] == np.float32(reward)
            assert columns["terminals"][row] == terminated
            cut = row == n_steps - 1
            assert columns["timeouts"][row] == (not terminated and (truncated or cut))
            if not terminated:
                np.testing.assert_array_equal(columns["frames"][start + place + 1], first(after))
            row += 1
        assert len(rows) == len(met) or number == len(episodes) - 1
        n_frames = start + len(rows) + (not met[len(rows) - 1][4])
    assert row == n_steps and n_frames == len(columns["frames"])
    assert columns["frames"].dtype == np.uint8


@pytest.mark.parametrize("shape, dtype", [((6, 5, 3), bool), ((6, 5), np.uint8), ((6, 5, 3), np.uint8)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorder_keeps_each_frame_once(shape, dtype, seed):
    recorder = Recorder(Planes(gym.make("Noise-v0", shape=shape, dtype=dtype, disable_env_checker=True)), 150)
    steps, seen, rng = 0, [], np.random.default_rng(seed)
    recorder.reset(seed=seed)
    while steps < 150 + 10 * seed:  # what comes after the last row is left out
        *_, terminated, truncated, _ = recorder.step(rng.integers(3))
        steps += 1
        seen.append((terminated, truncated))
        if terminated or truncated:
            recorder.reset()
    assert {(True, False), (False, True)} < {*seen}
    check(recorder.columns(), 150)


@pytest.mark.parametrize("terminated", [True, False])
def test_an_episode_that_ends_with_the_last_row_leaves_no_start(terminated):
    recorder = Recorder(Planes(gym.make("Noise-v0", disable_env_checker=True)), 3)
    recorder.reset(seed=0)
    noise = recorder.unwrapped
    noise.np_random = type("Chance", (), {"normal": lambda self: 1.0, "random": lambda self, n: np.ones(n)})()
    recorder.step(0)
    recorder.step(1)
    flags = np.array([terminated, not terminated])
    noise.np_random = type("End", (), {"normal": lambda self: 2.5, "random": lambda self, n: 1.0 - flags})()
    recorder.step(2)
    recorder.reset()
    columns = recorder.columns()
    check(columns, 3)
    assert len(columns["starts"]) == 1 and len(columns["frames"]) == 4 - terminated
    assert recorder.returns == [4.5] and columns["timeouts"].tolist() == [False, False, not terminated]


def test_the_curve_counts_an_episode_where_it_ends(monkeypatch):
    monkeypatch.setattr(collect_frames, "EVERY", 10)
    rows = curve([4, 10, 11, 25], [1.0, 3.0, 5.0, 7.0], 25)
    assert rows == [[10, 2, 2.0, 5.0], [20, 1, 5.0, 1.0], [25, 1, 7.0, 14.0]]
    assert np.isnan(curve([], [], 3)[0][2])


@pytest.mark.parametrize(
    "algo, env", [("dqn", "Noise-v0"), ("qrdqn", "Noise-v0"), ("dqn", "Noise/Grey-v0"), ("dqn", "Noise/Large-v0")]
)
def test_what_an_agent_met_is_stored(algo, env, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sb3_contrib")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    options = [
        "--env",
        env,
        "--algo",
        algo,
        "--id",
        "test/noise-v0",
        "--steps",
        "101",
        "--curve",
        str(tmp_path / "c.csv"),
    ]
    main(options)
    folder = tmp_path / "test/noise-v0"
    names = ("frames", "starts", "actions", "rewards", "terminals", "timeouts")
    columns = {name: np.load(folder / f"{name}.npy") for name in names}
    check(columns, 101)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["kind"] == "frames" and metadata["format"] == 1 and metadata["transitions"] == 101
    assert (metadata["action_low"], metadata["action_high"]) == ([0], [2])
    assert metadata["frame_max"] == (255 if "Grey" in env else 1)
    assert metadata["environment"] == {"id": env, "wrappers": []}
    complete = [episode for episode in Noise.log if episode and True in episode[-1][4:]]
    returns = [sum(step[2] for step in episode) for episode in complete][: len(columns["starts"])]
    (note,) = metadata["notes"]
    assert f"{algo.upper()} met online in 101 steps of {env}, seed 0" in note
    assert f"of {len(returns)} complete episodes return {np.mean(returns[-100:]):.2f}" in note
    (row,) = csv.DictReader((tmp_path / "c.csv").read_text().splitlines())
    assert (row["dataset"], row["step"]) == ("test/noise-v0", "101")
    assert int(row["episodes"]) == len(returns) and abs(float(row["mean_return"]) - np.mean(returns)) < 1e-3
    loaded = cql_atari.load_dataset("test/noise-v0")
    for name in names:
        np.testing.assert_array_equal(np.squeeze(loaded[name]), columns[name])
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 1 and "--force" in capsys.readouterr().err
    main([*options, "--force"])
    for name in names:
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), columns[name])
    main([*options, "--force", "--seed", "1"])
    assert not np.array_equal(np.load(folder / "actions.npy"), columns["actions"])


def test_atari_frames_are_preprocessed_once(tmp_path, monkeypatch):
    for package in ("stable_baselines3", "ale_py", "cv2"):
        pytest.importorskip(package)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    main(["--env", "ALE/Pong-v5", "--id", "test/pong-v0", "--steps", "40"])
    frames = np.load(tmp_path / "test/pong-v0/frames.npy")
    assert frames.shape == (41, 84, 84) and frames.max() > 1
    environment = json.loads((tmp_path / "test/pong-v0/metadata.json").read_text())["environment"]
    assert environment["repeat_action_probability"] == 0.25 and environment["frameskip"] == 1
    assert environment["wrappers"] == [["AtariPreprocessing", {"noop_max": 0, "frame_skip": 4}]]


@pytest.mark.parametrize(
    "missing, options",
    [
        ("minatar", ["--env", "MinAtar/Breakout-v1"]),
        ("ale_py", ["--env", "ALE/Pong-v5"]),
        ("stable_baselines3", ["--env", "Noise-v0"]),
        ("sb3_contrib", ["--env", "Noise-v0", "--algo", "qrdqn"]),
    ],
)
def test_a_missing_package_is_one_line(missing, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name in [missing, *(x for x in sys.modules if x.startswith(f"{missing}."))]:  # another test may have it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as end:
        main([*options, "--id", "test/any-v0", "--steps", "5"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert f"the package {missing} is missing: pip install -r requirements-extra.txt" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "options, status, words",
    [
        (["--env", "CartPole-v1"], 1, "no observations of images"),
        (["--env", "Nowhere-v0"], 2, "--env Nowhere-v0"),
        (["--env", "Noise-v0", "--steps", "0"], 2, "--steps must be at least 1"),
        (["--env", "Noise-v0", "--epsilon", "1.5"], 2, "--epsilon must be a probability"),
        (["--env", "Noise-v0", "--id", "noise"], 2, "--id noise is not an id"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main(["--id", "test/any-v0", *options])
    error = capsys.readouterr().err
    assert end.value.code == status and words in error and error.count("\n") == 1
