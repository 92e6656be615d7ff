"""Environments: wrappers of a recording, bounds and kinds of actions, reports of success, and what fails in them."""

import math
import types

import gymnasium as gym
import numpy as np
import pytest
from conftest import Counter, continuous, record, refusal, table, weights
from gymnasium import wrappers

pytestmark = continuous  # the same text in all files


def wrapped(*kinds):
    """Gymnasium's Pendulum as it is recorded; its actions are torques in [-2, 2]."""
    env = gym.make("Pendulum-v1", max_episode_steps=20)
    for kind, options in kinds:
        env = kind(env, **options)
    return env


def dataset(env, new_dataset, name="toy/wrapped-v0"):
    """Random episodes of an environment, with its spec."""
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    env.action_space.seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "make", lambda _: env)
        buffers = record("", [0, 1])
    return new_dataset(buffers, name, env=env.spec, **spaces)


RECORDINGS = {
    "none": [],
    "rescaled": [(wrappers.RescaleAction, {"min_action": -1.0, "max_action": 1.0})],
    "clipped": [(wrappers.RescaleAction, {"min_action": -5.0, "max_action": 5.0}), (wrappers.ClipAction, {})],
    "sticky": [(wrappers.StickyAction, {"repeat_action_probability": 0.5})],
    "observations": [
        (wrappers.RescaleObservation, {"min_obs": -1.0, "max_obs": 1.0}),
        (wrappers.TimeAwareObservation, {}),
        (wrappers.FlattenObservation, {}),
        (wrappers.ClipReward, {"min_reward": -3.0, "max_reward": 0.0}),
    ],
}


@pytest.mark.parametrize("kind", RECORDINGS)
def test_rows_of_a_recording_are_played_again_by_the_environment_that_is_made(kind, script, tiny, new_dataset, capsys):
    env = wrapped(*RECORDINGS[kind], (wrappers.RecordEpisodeStatistics, {}))
    config = tiny(env=dataset(env, new_dataset), n_episodes=1)
    data = script.load_dataset(config.env)
    task = script.Task(config, data)
    assert ("RecordEpisodeStatistics changes nothing" in capsys.readouterr().out) and task.envs.num_envs == 1
    actions = iter(data["actions"])
    seen = []
    policy = lambda observations: (seen.append(observations[0]), next(actions)[None])[1]  # noqa: E731
    result = script.rollout(policy, task.envs, 1, config.eval_seed)
    n = int(result["length"][0])
    assert n == 20 and np.array(seen) == pytest.approx(data["observations"][:n], abs=1e-5)
    assert result["return"][0] == pytest.approx(data["rewards"][:n].sum(), abs=1e-3)


def test_other_wrappers_are_refused_by_name_unless_nothing_is_played(script, tiny, new_dataset, capsys):
    name = dataset(wrapped((wrappers.NormalizeReward, {})), new_dataset)
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and "NormalizeReward" in line and "--eval_env" in line
    assert script.train(tiny(env=name, eval_env="none"))["eval_return"] is None
    gym.register("Toy-Pendulum-v0", entry_point=gym.spec("Pendulum-v1").entry_point, max_episode_steps=20)
    capsys.readouterr()
    assert script.train(tiny(env=name, eval_env="Toy-Pendulum-v0", run_id="named"))["eval_return"] < 0
    assert "'wrappers': [('NormalizeReward'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "used"),
    [
        (([-np.inf, -np.inf], [np.inf, np.inf]), ([-2, 0], [1, 0.5])),
        (([-3.4e38, -1e6], [3.4e38, 1e6]), ([-2, 0], [1, 0.5])),
        (([-5, 0], [0.5, 0.5]), ([-2, 0], [0.5, 0.5])),  # narrower at one end only
        (([-2, 0], [1, 0.5]), None),
    ],
)
def test_an_environments_bounds_narrow_the_datasets_and_are_said(own, used, script, tiny, monkeypatch, capsys):
    data = script.load_dataset("toy/counter-v0")
    data["actions"] = data["actions"] / 4
    low, high = np.float32(own)
    monkeypatch.setattr(Counter, "action_space", gym.spaces.Box(low, high))
    task = script.Task(tiny(), data)
    lines = capsys.readouterr().out
    assert ("action_" in lines) == (used is not None)
    expected = used or ([-2, 0], [1, 0.5])
    assert np.array_equal([data["action_low"], data["action_high"]], np.float32(expected))
    assert task.envs.single_action_space.high[0] == high[0]


@pytest.mark.parametrize("bound", [np.inf, 3.4e38, 2e6])
def test_bounds_that_mean_nothing_are_refused(bound, script):
    data = {"actions": np.float32([[0.5], [-0.5]]), "action_low": np.float32([-bound]), "action_high": np.float32([1])}
    assert "bounds" in refusal(script.encode_actions, data, "toy")[1]
    large = {"actions": np.float32([[1.9e6], [-0.5]])} | {"action_low": [-2e6], "action_high": [2e6]}
    assert script.encode_actions(large, "toy")[0].max() == pytest.approx(0.95)


def test_whole_numbers_are_rounded_where_a_box_has_them(script):
    space = gym.spaces.Box(0, 10, (2,), np.int64)
    assert script.to_space(np.float32([2.6, 3.4]), space).tolist() == [3, 3]
    assert script.to_space(np.float32([[2.6]]), gym.spaces.Box(0, 10, (1, 1))).tolist() == [[pytest.approx(2.6)]]


REPORTS = [None, math.nan, "yes", np.array([True]), np.array([1.0, 0.0]), 1, True, np.float32(1), {"a": 1}]


@pytest.mark.parametrize("value", REPORTS, ids=repr)
@pytest.mark.parametrize("always", [True, False])
def test_success_is_read_where_it_is_a_number_and_the_return_counts(always, value, run, monkeypatch):
    step = Counter.step

    def reporting(self, action):
        *result, info = step(self, action)
        return *result, {"success": value if info["success"] or always else None}

    monkeypatch.setattr(Counter, "step", reporting)
    row = table(run(n_episodes=6, max_timesteps=1))[-1]
    number = isinstance(value, (int, float, np.float32)) and not math.isnan(value) or getattr(value, "size", 2) == 1
    expected = (1 if always else 2 / 6) if number else None
    assert row["eval_return"] and (float(row["eval_success"]) if row["eval_success"] else None) == expected


@pytest.mark.parametrize("value", [None, "no", np.zeros(2), False])
def test_what_a_reset_reports_is_not_success(value, run, monkeypatch):
    """A vector environment resets those whose episodes are over while others continue."""
    reset, step = Counter.reset, Counter.step
    monkeypatch.setattr(Counter, "reset", lambda self, **options: (reset(self, **options)[0], {"success": value}))
    monkeypatch.setattr(Counter, "step", lambda self, action: (*step(self, action)[:4], {}))
    row = table(run(n_episodes=6, max_timesteps=1))[-1]
    assert row["eval_return"] and row["eval_success"] == ""


@pytest.mark.parametrize("scores", [(5.0, 5.0), (math.nan, 1.0), (0.0, math.nan), (3.0, 1.0), (0.0, math.inf)])
def test_reference_scores_that_cannot_be_0_and_100_give_no_score_and_a_line(scores, script, tiny, capsys):
    data = script.load_dataset("toy/counter-v0") | {"reference_scores": np.array(scores)}
    row = script.train(tiny(max_timesteps=1), data=data)
    assert row["d4rl_normalized_score"] is None and row["eval_return"] is not None
    assert len([line for line in capsys.readouterr().out.splitlines() if "no scores" in line]) == 1


@pytest.mark.parametrize(
    ("name", "ranged"), [("mine/shopper-v0", False), ("mine/hopper-v0", True), ("hopper_medium-v0", True)]
)
def test_return_ranges_are_of_tasks_by_whole_words(name, ranged, script, tiny):
    data = script.load_dataset("toy/counter-v0")
    task = script.Task(tiny(env=name, normalize_reward=True, reward_scale=1.0, reward_bias=0.0), data)
    assert (task.factor != 1) == ranged


def test_a_simulator_that_fails_costs_one_evaluation_and_its_traceback_is_printed_once(run, monkeypatch, capsys):
    step, calls = Counter.step, types.SimpleNamespace(n=0)

    def dividing(self, action):
        calls.n += self.number == 0
        if calls.n in (5, 9):
            return 1 / 0
        return step(self, action)

    monkeypatch.setattr(Counter, "step", dividing)
    folder = run(eval_freq=5)
    err = capsys.readouterr().err
    rows = table(folder)
    assert [bool(row["eval_return"]) for row in rows].count(False) == 2 and len(rows) == 5
    assert err.count("Traceback") == 1 and err.count("return 1 / 0") == 1
    lines = [line for line in err.splitlines() if line.startswith("warning")]
    assert len(lines) == 2 and all("ZeroDivisionError" in x and "test_environments.py:" in x for x in lines)
    assert weights(folder)
