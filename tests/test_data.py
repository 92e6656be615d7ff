"""Data: episodes, their ends, scaling, held-out episodes, and data that a script must refuse."""

import copy
import gc
import itertools
import json
import math
import sys
import tracemalloc

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import (
    DATASET,
    ONLINE,
    SCRIPTS,
    WORLDS,
    Counter,
    continuous,
    discrete,
    equal,
    kinds,
    once,
    option_names,
    record,
    refusal,
    table,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
BOX = gym.spaces.Box(-1, 1, (1,), np.float32)
ACTIONS = dict.fromkeys(SCRIPTS, BOX) | {"algorithms.discrete.cql_dqn": gym.spaces.MultiDiscrete([3], start=[-1])}
ENDS = {"terminal": (True, False), "time-out": (False, True), "both": (True, True), "neither": (False, False)}


def episode(number, end="terminal", length=4, **columns):
    """Observations (number, t), rewards number + t / 10, and actions -1, 0 and 1."""
    last = np.arange(length) == length - 1
    parts = {
        "observations": np.stack([np.full(length + 1, number), np.arange(length + 1)], axis=1).astype(np.float32),
        "actions": (np.arange(length, dtype=np.float32) % 3 - 1)[:, None],
        "rewards": number + np.arange(length) / 10,
        "terminations": last & ENDS[end][0],
        "truncations": last & ENDS[end][1],
    }
    return EpisodeBuffer(**parts | columns)


@pytest.fixture
def spaces(script):
    """The spaces of `episode`."""
    return {"observation_space": OBSERVATIONS, "action_space": ACTIONS[script.__name__]}


@pytest.fixture
def prepare(script, tiny):
    """Prepares data as training sees them: prepare(env=..., option=value) -> (data, holdout, scaling, task)."""

    def prepare(**options):
        config = tiny(**options)
        data = script.load_dataset(config.env)
        if not WORLDS[script.__name__].pixels:
            task = script.Task(config, data)
            return *script.prepare_data(config, data, task, None), task
        data = script.with_stacks(config, data)
        task = script.Task(config, data)
        data, holdout, *_, scaling = script.prepare_data(config, data, task)
        return data, holdout, scaling, task

    return prepare


# Episodes and their ends


@once
def test_only_terminal_states_do_not_bootstrap_and_no_transition_crosses_an_episode(script, spaces, new_dataset):
    ends = [*ENDS] * 4  # 16 episodes, so that the alphabet would put number 10 before number 2
    lengths = [1, 4, 1, 3, 2, 1, 5, 1] * 2
    name = new_dataset([episode(i, end, length) for i, (end, length) in enumerate(zip(ends, lengths))], **spaces)
    data = script.load_dataset(name)
    assert data["observations"].tolist() == [[i, t] for i, length in enumerate(lengths) for t in range(length)]
    assert np.all(data["next_observations"] - data["observations"] == [0, 1])  # at every end, too
    assert data["rewards"] == pytest.approx(data["observations"] @ [1, 0.1])
    last = np.cumsum(lengths) - 1
    for flag, meant in (("terminals", ("terminal", "both")), ("timeouts", ("time-out", "neither"))):
        assert np.flatnonzero(data[flag]).tolist() == [i for i, end in zip(last, ends) if end in meant]
    assert script.episodes(data)[0].tolist() == data["observations"][:, 0].tolist()
    cut = np.array([False, True, False, False])
    data = script.load_dataset(new_dataset([episode(0, truncations=cut)], "toy/cut-v0", **spaces))
    ends = [np.flatnonzero(data[key]).tolist() for key in ("timeouts", "terminals")]
    assert ends == [[1], [3]] and script.episodes(data)[0].tolist() == [0, 0, 1, 1]  # in the middle, too


@once
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=150)
def test_returns_of_any_data(script, rows):
    rewards, terminals, timeouts = map(np.array, zip(*rows))
    data = {"rewards": rewards, "terminals": terminals, "timeouts": timeouts}
    ends = [i for i in range(len(rows)) if terminals[i] or timeouts[i] or i == len(rows) - 1]
    parts = [rewards[i + 1 : j + 1] for i, j in itertools.pairwise([-1, *ends])]
    numbers, to_go, returns = script.episodes(data, 0.5)
    assert numbers.tolist() == [i for i, part in enumerate(parts) for _ in part]
    cut = not terminals[-1] and len(parts[-1]) < max(map(len, parts))  # it may have been cut by the end of the data
    assert returns.tolist() == [sum(part) for part in parts[: len(parts) - cut]]
    expected = [sum(0.5**k * x for k, x in enumerate(part[i:])) for part in parts for i in range(len(part))]
    assert to_go == pytest.approx(expected)


def test_returns_of_the_data_are_said_and_logged(script, run, capsys):
    row = table(run(discount=0.5, normalize_reward=True, reward_scale=2.0, reward_bias=3.0))[0]
    lengths = {seed: Counter.length(seed) for seed in range(100, 120)}
    values = []
    for seed, n in lengths.items():
        rewards = [2 * (seed + t) + 3 for t in range(1, n + 1)]
        values += [sum(0.5**k * x for k, x in enumerate(rewards[t:])) for t in range(n)]
    assert float(row["data_discounted_return"]) == pytest.approx(np.mean(values))
    behaviour = np.mean([sum(seed + t for t in range(1, n + 1)) for seed, n in lengths.items()])
    out = capsys.readouterr().out
    assert f"return {behaviour:.1f} ±" in out and f"{np.mean(values):.4g}" in out
    assert "100 transitions" in out and "20 episodes" in out


class Words(gym.Space):
    """Texts in a space of one's own, as MiniGrid's missions are."""

    def __init__(self):
        super().__init__(dtype=str)

    def sample(self):
        return "go"

    def contains(self, x):
        return isinstance(x, str)


@once
def test_observations_of_many_kinds_are_vectors_in_data_and_environment(script, new_dataset, run, spaces):
    """Dict observations in the sorted order of their keys, small grids, Discrete ones one-hot, and no texts."""
    flat = script.load_dataset(new_dataset(record("Counter-v0", range(9)), env="Counter-v0"))
    name = new_dataset(record("DictCounter-v0", range(9)), "toy/dict-v0", env="DictCounter-v0")
    data = script.load_dataset(name)
    order = [0, 2, 1]  # goal/y is the seed, goal/z the sum of actions; then the time
    for key in ("observations", "next_observations"):
        assert np.array_equal(data[key], flat[key][:, order])
    env = gym.make_vec("DictCounter-v0", 2, "sync")
    space = env.single_observation_space
    assert script.flatten(env.reset(seed=[3, 4])[0], space).tolist() == [[3, 0, 0], [4, 0, 0]]
    step = env.step(np.array([[1, 0], [0, 0]], env.single_action_space.dtype))[0]
    assert script.flatten(step, space).tolist() == [[3, 1, 1], [4, 0, 1]]
    assert float(table(run(env=name))[-1]["eval_length"]) == 3.5

    number = gym.spaces.Discrete(3, start=5)
    texts = {"text": gym.spaces.Text(9), "words": Words()}
    grid = {"grid": gym.spaces.Box(0, 255, (2, 3), np.uint8), "number": number} | texts
    columns = {"grid": np.arange(30).reshape(5, 2, 3), "number": np.array([5, 6, 7, 5, 6])}
    columns |= {"text": 5 * ("go",), "words": 5 * ("stay",)}
    expected = np.concatenate([np.arange(30).reshape(5, 6), np.eye(3)[[0, 1, 2, 0, 1]]], axis=1)
    assert np.array_equal(script.flatten(columns, gym.spaces.Dict(grid)), expected)
    refused = script.flatten, {"other": 5 * (object(),)}, gym.spaces.Dict(other=gym.Space())
    assert "observations are" in refusal(*refused)[1]  # neither numbers nor a text
    buffers = [episode(0, observations=columns["number"])]
    name = new_dataset(buffers, "toy/number-v0", **spaces | {"observation_space": number})
    assert script.load_dataset(name)["next_observations"].tolist() == np.eye(3)[[1, 2, 0, 1]].tolist()
    assert weights(run(env=name, run_id="one"))["/weights/observation_mean"].tolist() == [0.5, 0.25, 0.25]


# Actions


@continuous
def test_actions_are_rescaled_to_one_and_back(script, prepare, new_dataset):
    low, high = Counter.action_space.low, Counter.action_space.high
    actions = np.random.default_rng(0).uniform(low, high, (30, 2)).astype(np.float32)
    actions[:2] = low, high
    columns = {"observations": np.zeros((31, 3), np.float32), "actions": actions}
    name = new_dataset([episode(0, length=30, **columns), *record("Counter-v0", [1])], env="Counter-v0")
    data, _, scaling, _ = prepare(env=name)
    scaled = data["actions"][:30]
    assert scaled == pytest.approx(2 * (actions - low) / (high - low) - 1, abs=1e-6)
    assert scaled[:2].tolist() == [[-1, -1], [1, 1]] and scaled.dtype == np.float32

    actor = script.TanhGaussianActor(3, 2, 4, 1)
    actor.load_state_dict(scaling, strict=False)
    pre_tanh = torch.tensor(scaled).atanh()  # infinite at the bounds
    actor.forward = lambda observations: (pre_tanh[: len(observations)], None)
    assert actor.act(np.zeros((30, 3))) == pytest.approx(actions, abs=1e-6)
    assert actor.act(np.zeros((2, 3))).tolist() == [low.tolist(), high.tolist()]


@continuous
def test_no_rounding_takes_an_action_out_of_its_bounds(script):
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.normal(size=(2, 500)).astype(np.float32), axis=0)
    actor = script.TanhGaussianActor(3, 500, 4, 1)
    actor.load_state_dict({"action_low": torch.tensor(low), "action_high": torch.tensor(high)}, strict=False)
    for mean in (-99.0, 99.0):
        actor.forward = lambda observations, mean=mean: (torch.full((1, 500), mean), None)
        actions = actor.act(np.zeros((1, 3)))[0]
        assert np.all((low <= actions) & (actions <= high))
        assert actions == pytest.approx(low if mean < 0 else high, abs=1e-6)


@continuous
@pytest.mark.parametrize("environment", ["none", "Counter-v0"])
def test_actions_a_little_outside_are_clipped_and_others_refused(environment, prepare, new_dataset):
    low, high = Counter.action_space.low, Counter.action_space.high

    def dataset(name, excess):
        actions = np.stack([low - excess * (high - low), high + excess * (high - low)]).astype(np.float32)
        columns = {"observations": np.zeros((3, 3), np.float32), "actions": actions}
        return new_dataset([episode(0, length=2, **columns), *record("Counter-v0", [1])], name, env="Counter-v0")

    data = prepare(env=dataset("toy/near-v0", 0.9e-3), eval_env=environment)[0]
    assert data["actions"][:2].tolist() == [[-1, -1], [1, 1]]
    for name, excess in (("toy/far-v0", 1.1e-3), ("toy/farther-v0", 10)):
        status, line = refusal(prepare, env=dataset(name, excess), eval_env=environment)
        assert status == 1 and name in line and "outside" in line


@continuous
def test_data_without_bounds_are_refused(tiny, script, new_dataset):
    for i, space in enumerate((gym.spaces.Box(-np.inf, np.inf, (1,)), gym.spaces.Box(-1, -1, (1,)))):
        name = new_dataset([episode(0)], f"toy/new-v{i}", observation_space=OBSERVATIONS, action_space=space)
        status, line = refusal(script.train, tiny(env=name))
        assert status == 1 and "bounds" in line


DISCRETE = {
    "Discrete": (gym.spaces.Discrete(3), [0, 2, 1, 0], [0], [2], [0, 2, 1, 0]),
    "Discrete from 3": (gym.spaces.Discrete(3, start=3), [3, 5, 4, 3], [3], [5], [0, 2, 1, 0]),
    "MultiDiscrete": (
        gym.spaces.MultiDiscrete([2, 3]), [[0, 0], [1, 2], [0, 2], [1, 0]], [0, 0], [1, 2], [0, 5, 2, 3],
    ),
    "MultiDiscrete from -1": (
        gym.spaces.MultiDiscrete([2, 3], start=[-1, 4]), [[-1, 4], [0, 6], [-1, 6], [0, 4]], [-1, 4], [0, 6],
        [0, 5, 2, 3],
    ),
}  # fmt: skip


@discrete
@pytest.mark.parametrize("kind", DISCRETE)
def test_actions_are_numbered_from_zero_and_back(kind, script, prepare, run, new_dataset):
    space, actions, low, high, numbers = DISCRETE[kind]
    name = new_dataset([episode(0, actions=np.array(actions))], observation_space=OBSERVATIONS, action_space=space)
    data, _, scaling, _ = prepare(env=name)
    assert data["actions"].tolist() == numbers and data["actions"].dtype == np.int64
    assert (scaling["action_low"].tolist(), scaling["action_high"].tolist()) == (low, high)

    network = script.QNetwork(2, [y - x + 1 for x, y in zip(low, high)], 4, 1, "dqn", 1)
    network.load_state_dict(scaling, strict=False)
    for action, number in zip(actions, numbers):
        network.last.bias.data = 9.0 * torch.nn.functional.one_hot(torch.tensor(number), len(network.last.bias))
        assert network.act(np.zeros(2)).tolist() == action
        assert network.act(np.zeros((7, 2))).tolist() == 7 * [action]
    assert script.load_policy(run(env=name) / "policy.pt")(np.zeros(2)).tolist() in space


@discrete
@pytest.mark.parametrize("environment", ["none", "Counter-v0"])
@pytest.mark.parametrize("action", [[-3, 0], [2, 0], [0, 3], [0.5, 0], [0, 2.001]])
def test_actions_outside_the_bounds_or_between_numbers_are_refused(action, environment, prepare, new_dataset):
    columns = {"observations": np.zeros((3, 3), np.float32), "actions": np.array([[0, 0], action])}
    name = new_dataset([episode(0, length=2, **columns), *record("Counter-v0", [1])], env="Counter-v0")
    status, line = refusal(prepare, env=name, eval_env=environment)
    assert status == 1 and f"--env {name}" in line


@kinds
def test_actions_at_the_bounds_train_without_nan(script, run, new_dataset):
    bounds = script.action_bounds(Counter.action_space, "")
    actions = np.stack([bounds[f"action_{end}"] for end in ("low", "high", "low", "high")])
    observations = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    name = new_dataset([episode(i, actions=actions, observations=observations) for i in range(3)], env="Counter-v0")
    for options in ({"bc_steps": 20}, {"bc_only": True}):
        folder = run(env=name, run_id=str(options), **options)
        assert all(math.isfinite(float(x)) for row in table(folder) for x in row.values() if x)
        assert all(x.isfinite().all() for x in weights(folder, "checkpoint.pt").values())


# Scaling of observations, rewards, scores


@once
@pytest.mark.parametrize("holdout_fraction", [0, 0.25])
def test_observations_are_normalised_by_the_training_data(holdout_fraction, script, prepare):
    raw = script.load_dataset(DATASET)
    data, holdout, scaling, _ = prepare(holdout_fraction=holdout_fraction)
    mean, std = scaling["observation_mean"].numpy(), scaling["observation_std"].numpy()
    numbers = set(np.rint(data["observations"][:, 0] * std[0] + mean[0]))
    rows = np.isin(raw["observations"][:, 0], [*numbers])
    assert len(numbers) == 20 * (1 - holdout_fraction) and rows.sum() == len(data["rewards"])
    chosen = raw["observations"][rows].astype(np.float64)
    assert mean == pytest.approx(chosen.mean(0), rel=1e-5) and std == pytest.approx(chosen.std(0) + 1e-3, rel=1e-5)
    for key in ("observations", "next_observations"):
        assert data[key] == pytest.approx((raw[key][rows] - mean) / std, abs=1e-4)
        held_out = np.sort((raw[key][~rows] - mean) / std, axis=0)
        assert np.sort(holdout[key], axis=0) == pytest.approx(held_out, abs=1e-4)


@kinds
@pytest.mark.parametrize("normalize", [True, False])
def test_statistics_are_stored_and_used_to_act(normalize, script, run):
    folder = run(normalize=normalize, policy_lr=1e-2, qf_lr=1e-2, reward_clip=1.0)
    stored = weights(folder)
    mean, std = stored["/weights/observation_mean"].numpy(), stored["/weights/observation_std"].numpy()
    raw = script.load_dataset(DATASET)["observations"]
    assert mean == pytest.approx(raw.mean(0) if normalize else 0, rel=1e-5)
    assert std == pytest.approx(raw.std(0) + 1e-3 if normalize else 1, rel=1e-5)

    policy = torch.load(folder / "policy.pt", weights_only=True)
    actor = script.Policy(*policy["sizes"])
    actor.load_state_dict(policy["weights"] | {"observation_mean": torch.zeros(3), "observation_std": torch.ones(3)})
    expected = actor.act((raw - mean) / std)
    assert np.ptp(expected) > 0.01
    assert script.load_policy(folder / "policy.pt")(raw) == pytest.approx(expected, abs=1e-4)


@once
@pytest.mark.parametrize(
    ("name", "environment", "ranged"),
    [
        ("toy/new-v0", "none", False), ("toy/new-v0", "Counter-v0", False), ("toy/new-v0", "Hopper-Toy-v0", True),
        ("toy/new-v0", "HalfCheetah_Toy-v0", True), ("toy/walker2d-v0", "none", True),
        ("mujoco/hopper/medium-v0", "Counter-v0", True), ("D4RL/HalfCheetah-v0", "none", True),
    ],
)  # fmt: skip
def test_rewards(name, environment, ranged, script, prepare, new_dataset):
    new_dataset(record("Counter-v0", range(7)), name, env="Counter-v0")  # ends by terminal states and time-outs
    options = {"env": name, "eval_env": environment}
    raw = script.load_dataset(name)["rewards"]
    assert np.array_equal(prepare(**options, reward_scale=3, reward_bias=2)[0]["rewards"], raw)
    returns = [sum(s + t for t in range(1, Counter.length(s) + 1)) for s in range(7)]
    factor = 1000 / (max(returns) - min(returns)) if ranged else 1
    for scale, bias, clip in ((5.0, -1.0, math.inf), (0.5, 0.25, 3.0)):
        changes = {"reward_scale": scale, "reward_bias": bias, "reward_clip": clip}
        data, _, _, task = prepare(**options, **changes, normalize_reward=True)
        expected = np.clip(raw * factor * scale + bias, -clip, clip)
        assert data["rewards"] == pytest.approx(expected, rel=1e-5)
        assert task.training_rewards(raw) == pytest.approx(expected, rel=1e-5)


@once
def test_rewards_without_a_range_are_one_line(prepare, spaces, new_dataset):
    name = new_dataset([episode(0), episode(0)], "toy/hopper-v0", **spaces)
    status, line = refusal(prepare, env=name, normalize_reward=True)
    assert status == 1 and "--normalize_reward" in line


@once
def test_reference_scores_come_from_the_dataset(prepare, new_dataset):
    buffers, returns = record("Counter-v0", range(9)), np.array([12.0, 16.0])
    plain = new_dataset(buffers, env="Counter-v0")
    scored = new_dataset(buffers, "toy/hopper-v0", env="Counter-v0", ref_min_score=10, ref_max_score=20)
    for environment in ("Hopper-Toy-v0", "none"):
        for name, score in ((plain, None), (scored, pytest.approx(40))):
            said = prepare(env=name, eval_env=environment)[3].score(returns)
            assert said == {"eval_return": 14, "eval_return_std": 2, "d4rl_normalized_score": score}


# Held-out episodes, and minibatches


def distance(script):
    """The held-out metric of the policy's or the soft-max's distance from the data."""
    return "holdout_gap" if "cql_alpha" in option_names(script.__name__) else "holdout_divergence"


def test_held_out_episodes_are_whole_and_not_trained_on(script, prepare, run, new_dataset):
    data, holdout, scaling, _ = prepare(holdout_fraction=0.22)
    if WORLDS[script.__name__].pixels:
        kept, held_out = (script.load_dataset(DATASET)["frames"][x["observations"], 0, 0] for x in (data, holdout))
    else:
        mean, std = scaling["observation_mean"].numpy(), scaling["observation_std"].numpy()
        kept, held_out = (np.rint(part["observations"][:, 0] * std[0] + mean[0]) for part in (data, holdout))
    assert len(set(held_out)) == 5 and len(set(kept)) == 15 and not set(kept) & set(held_out)  # 0.22 of 20, and more
    assert len(kept) + len(held_out) == 100 and len(prepare()[1]["rewards"]) == 0
    assert not np.array_equal(prepare(holdout_fraction=0.22, seed=1)[0]["rewards"], data["rewards"])

    # to the last bit the same as training on the other episodes only
    folder = run(holdout_fraction=0.22, run_id="holdout")
    rest = new_dataset([x for x in record("Counter-v0", range(100, 120)) if x.seed in kept], env="Counter-v0")
    alone = run(env=rest, run_id="alone")
    assert equal(weights(folder), weights(alone))
    rows, expected = table(folder), table(alone)
    assert {"holdout_td_error", "holdout_q", distance(script)} <= rows[0].keys() - expected[0].keys()
    names = expected[0].keys() - {"data_discounted_return"}
    assert [{key: row[key] for key in names} for row in rows] == [{key: row[key] for key in names} for row in expected]


@pytest.mark.parametrize(
    ("script", "options"),
    [(name, {}) for name in SCRIPTS] + [("algorithms.offline.cql", {"bc_only": True})],
    indirect=["script"],
)
def test_evaluation_and_holdout_metrics_take_none_of_trainings_random_numbers(options, script, run):
    options = options | {"holdout_fraction": 0.2}
    often, seldom = (run(**options, eval_freq=freq, run_id=f"run{freq}") for freq in (1, 25))
    assert len(table(often)) == 25 and len(table(seldom)) == 1
    assert equal(weights(often), weights(seldom))
    last = {key: value for key, value in table(often)[-1].items() if key.startswith(("eval", "hold"))}
    assert last.items() <= table(seldom)[-1].items() and ("holdout_log_prob" in last) == hasattr(
        script, "TanhGaussianActor"
    )


def test_minibatches_cover_all_rows_and_keep_them_together(script):
    n, rows = 50, np.arange(50, dtype=np.float32)
    data = dict.fromkeys(script.Batch._fields, rows) | {"timeouts": rows}
    data |= {key: np.stack([rows, rows], axis=1) for key in ("observations", "actions", "next_observations")}
    torch.manual_seed(0)
    batch = script.ReplayBuffer(data, "cpu").sample(100 * n)
    assert batch.observations.shape == (100 * n, 2) and batch.rewards.shape == batch.terminals.shape == (100 * n,)
    for column in (*batch.observations.T, *batch.actions.T, *batch.next_observations.T, batch.terminals):
        assert torch.equal(column, batch.rewards)
    counts = np.bincount(batch.rewards.int())
    assert len(counts) == n and 60 < counts.min() <= counts.max() < 140
    assert all(column.dtype == torch.float32 for column in batch)


# Bad data: one line before training. The data are good apart from the change that is named.


def edit(change):
    def edited(path):
        with h5py.File(path / "main_data.hdf5", "r+") as file:
            change(file)

    return edited


def replaced(name, value):
    def replace(file):
        del file[name]
        file[name] = value

    return edit(replace)


def one(name, place, value):
    return edit(lambda file: file[name].__setitem__(place, value))


def cut(share):
    def change(path):
        content = (path / "main_data.hdf5").read_bytes()
        (path / "main_data.hdf5").write_bytes(content[: int(share * len(content)) if share < 1 else -10])

    return change


def metadata(**changes):
    def change(path):
        content = json.loads((path / "metadata.json").read_text()) | changes
        (path / "metadata.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


BROKEN = {
    "NaN in a reward": (one("episode_3/rewards", 1, np.nan), "rewards hold NaN"),
    "huge reward": (one("episode_3/rewards", 1, 1e30), "in transition 13"),
    "NaN in an observation": (one("episode_3/observations", 1, np.nan), "observations hold NaN"),
    "infinite observation": (one("episode_3/observations", (1, 0), np.inf), "observations hold NaN"),
    "rewards are too few": (replaced("episode_3/rewards", np.zeros(3)), ""),
    "observations are too many": (replaced("episode_3/observations", np.zeros((6, 2))), ""),
    "a column is missing": (edit(lambda file: file.__delitem__("episode_3/actions")), "actions"),
    "no episodes": (metadata(total_episodes=0, total_steps=0), ""),
    "file is empty": (cut(0), ""),
    "file is cut in the middle": (cut(0.5), ""),
    "file lacks its end": (cut(1), ""),
    "no file": (lambda path: (path / "main_data.hdf5").unlink(), ""),
    "metadata are not JSON": (lambda path: (path / "metadata.json").write_text("{"), ""),
    "metadata lack the id": (metadata(dataset_id=None), ""),
}  # fmt: skip


@once
@pytest.mark.parametrize("fault", BROKEN)
def test_broken_data_is_refused_before_training(fault, script, tiny, spaces, new_dataset, tmp_path):
    name = new_dataset([episode(i) for i in range(6)], **spaces)
    change, word = BROKEN[fault]
    change(tmp_path / "minari" / name / "data")
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and f"--env {name}" in line and word in line
    assert not (tmp_path / "runs").exists()


@once
@pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
def test_damaged_bytes_are_refused_or_read_as_numbers(file, script, prepare, new_dataset, tmp_path):
    name = new_dataset(record("Counter-v0", range(6)), env="Counter-v0")
    path = tmp_path / "minari" / name / "data" / file
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(40):
        content = np.frombuffer(good, np.uint8).copy()
        content[rng.integers(len(good), size=rng.integers(1, 20))] ^= rng.integers(1, 256, dtype=np.uint8)
        path.write_bytes(content.tobytes())
        try:
            data = prepare(env=name, eval_env="none")[0]
        except script.DataError:
            refused += 1
        else:
            assert all(np.isfinite(data[key]).all() for key in script.COLUMNS)
    assert refused > 5


@once
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({key: np.zeros(0) for key in ("rewards", "terminals", "timeouts")}, "transition"),
        ({"rewards": np.zeros((4, 1))}, "rewards"), ({"actions": np.zeros(4)}, "actions"),
        ({"terminals": np.zeros(3, bool)}, "terminals"), ({"next_observations": np.zeros(4)}, "next_observations"),
        ({"observations": np.full((4, 2), np.nan)}, "observations"), ({"rewards": np.full(4, -np.inf)}, "rewards"),
        ({"timeouts": None}, "timeouts"),
    ],
)  # fmt: skip
def test_bad_arrays_are_refused(changes, word, script, tiny):
    data = {key: np.zeros((4, 2)) for key in ("observations", "actions", "next_observations")}
    data |= {"rewards": np.zeros(4), "terminals": np.zeros(4, bool), "timeouts": np.zeros(4, bool)}
    data = {key: value for key, value in (data | changes).items() if value is not None}
    status, line = refusal(script.train, tiny(env="mine", eval_env="none"), data=data)
    assert status == 1 and "--env mine" in line and word in line


@once
@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"env": "no-such-thing"}, 1, ["no-such-thing"]), ({"env": ""}, 1, ["--env"]),
        ({"env": "../../etc"}, 1, ["../../etc"]), ({"env": "/etc"}, 1, ["/etc"]), ({"env": "a b"}, 1, ["a b"]),
        ({"eval_env": "NoSuchEnvironment-v0"}, 2, ["--eval_env", "NoSuchEnvironment-v0"]),
        ({"eval_env": "no_such_module:Counter-v0"}, 2, ["--eval_env", "no_such_module"]),
        ({"buffer_size": 89}, 2, ["--buffer_size 89", "100"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(options, status, words, script, tiny, tmp_path):
    code, line = refusal(lambda: script.train(tiny(**options)))
    assert code == status and all(word in line for word in words) and "remove" not in line, line
    assert not (tmp_path / "runs").exists()


@kinds
def test_environments_and_data_of_another_kind_are_refused_before_training(script, tiny, tmp_path, new_dataset):
    world = WORLDS[script.__name__]
    for name in world.others:
        status, line = refusal(script.train, tiny(eval_env=name))
        assert status == 1 and name in line and DATASET in line and "3, 2" in line
    status, line = refusal(script.train, tiny(eval_env=world.foreign))
    assert status == 1 and all(word in line for word in (world.foreign, "Box", "Discrete"))
    name = new_dataset(record(world.foreign, range(3)), env=world.foreign)
    status, line = refusal(script.train, tiny(env=name, eval_env="none"))
    assert status == 1 and "--env toy/new-v0" in line and "algorithms/" in line  # the script that takes them
    assert not (tmp_path / "runs").exists()


@once
def test_a_name_of_d4rl_means_its_import(script, tiny, new_dataset, monkeypatch):
    monkeypatch.setattr(script.minari, "download_dataset", lambda *_, **__: pytest.fail("downloaded"))
    status, line = refusal(script.train, tiny(env="hopper-medium-v2"))
    assert status == 1 and "python benchmarks/import_data.py hopper-medium-v2" in line
    new_dataset(record("Counter-v0", range(5)), "d4rl/hopper-medium-v2", env="Counter-v0")
    assert len(script.load_dataset("hopper-medium-v2")["rewards"]) == 25
    new_dataset(record("Counter-v0", range(4)), "hopper-medium-v2", env="Counter-v0")  # a dataset of that very name
    assert len(script.load_dataset("hopper-medium-v2")["rewards"]) == 18


@once
def test_without_network_the_line_says_where_the_data_belong(script, tiny, new_dataset, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", unreachable)
    monkeypatch.setattr(script.minari, "download_dataset", unreachable)
    status, line = refusal(script.train, tiny(env="mujoco/hopper/medium-v0"))
    assert status == 1 and "Name or service" in line and str(tmp_path / "minari" / "mujoco/hopper/medium-v0") in line


@once
def test_images_and_observations_that_are_not_arrays_are_refused(script, tiny, spaces, new_dataset):
    image = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
    pixels, nested = np.zeros((5, 40, 40, 3), np.uint8), gym.spaces.Dict({"pixels": image})
    observations = [pixels, {"pixels": pixels}, {"camera": {"pixels": pixels}}]
    for i, space in enumerate((image, nested, gym.spaces.Dict({"camera": nested}))):
        buffers = [episode(0, observations=observations[i])]
        name = new_dataset(buffers, f"toy/image-v{i}", **spaces | {"observation_space": space})
        status, line = refusal(script.train, tiny(env=name))
        assert status == 1 and "(40, 40, 3)" in line
    parts = gym.spaces.Tuple([gym.spaces.Discrete(2), gym.spaces.Discrete(3)])
    for space, value in ((parts, (0, 1)), (gym.spaces.Dict({"cards": parts}), {"cards": (0, 1)})):
        assert "observations are" in refusal(script.flatten, value, space)[1]


# Environments of datasets

ENTRY = '{"id": "%s", "entry_point": "evil:Env", "reward_threshold": null, "nondeterministic": false, '
ENTRY += '"max_episode_steps": null, "disable_env_checker": false, "kwargs": {}, "additional_wrappers": '
ENTRY += '[{"name": "RecordVideo", "entry_point": "evil:Env", "kwargs": {}}], "vector_entry_point": "evil:Env"}'


@pytest.mark.parametrize(
    ("environment", "evaluates", "spaces"),
    [
        ("Counter-v0", True, True),  # known: Gymnasium's own entry is made
        ("Unknown-v0", False, True), ("evil:Unknown-v0", False, True), ("evil:Counter-v0", False, True),
        ("Unknown-v0", False, False),  # Minari itself would make the environment to learn its spaces
        ("Counter-v0", True, False),
    ],
)  # fmt: skip
@once
@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
def test_entry_points_in_a_dataset_are_never_imported(
    key, environment, evaluates, spaces, script, tiny, new_dataset, tmp_path, monkeypatch, capsys
):
    name = new_dataset(record("Counter-v0", range(6)), env="Counter-v0")
    changes = {key: ENTRY % environment} | ({} if spaces else {"observation_space": None, "action_space": None})
    metadata(**changes)(tmp_path / "minari" / name / "data")
    (tmp_path / "evil.py").write_text("from conftest import Counter as Env")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    if spaces:
        row = script.train(tiny(env=name))
        assert (row["eval_return"] is not None) == evaluates
        assert evaluates == ("evaluated in Counter-v0" in capsys.readouterr().out)
    else:
        assert "spaces" in refusal(script.train, tiny(env=name))[1]
    assert "evil" not in sys.modules


@once
def test_arguments_of_the_environment_come_from_the_dataset(script, tiny, new_dataset):
    spec = copy.deepcopy(gym.spec("Counter-v0"))
    spec.max_episode_steps, spec.kwargs = 2, {"render_mode": "human"}
    name = new_dataset(record("Counter-v0", range(6)), env="Counter-v0", eval_env=spec)
    assert script.train(tiny(env=name))["eval_length"] == 2


@once
def test_an_episode_without_end_ends_in_evaluation(script, run, monkeypatch):
    monkeypatch.setattr(script, "MAX_STEPS", 30)
    monkeypatch.setattr(Counter, "length", staticmethod(lambda seed: 10**9))
    assert float(table(run(max_timesteps=10))[-1]["eval_length"]) == 30
    assert float(table(run(max_timesteps=10, eval_env="conftest:Counter-v0", run_id="module"))[-1]["eval_length"]) == 30


@pytest.mark.parametrize("wanted", ["dataset has none", "none"])
def test_without_environment_a_run_trains_and_says_what_it_can(wanted, script, run, new_dataset, monkeypatch, capsys):
    """The line of a row shows held-out values, or else those of training."""
    monkeypatch.setattr(script.gym, "make_vec", lambda *_, **__: pytest.fail("an environment was made"))
    options = {"eval_env": "none"}
    if wanted != "none":
        bounds = {"observation_space": Counter.observation_space, "action_space": Counter.action_space}
        options = {"env": new_dataset(record("Counter-v0", range(6)), **bounds)}
    folder = run(**options)
    rows, lines, unit = table(folder), capsys.readouterr().out.splitlines(), WORLDS[script.__name__].unit
    assert {key for key, value in rows[0].items() if not value} == {
        key for key in rows[0] if key.startswith("eval_") or key in ONLINE
    } | {"d4rl_normalized_score"}
    assert any("25" in line and "no evaluation" in line for line in lines)
    first = {key: x for key, x in rows[0].items() if key in ("qf1_loss", "qf_loss", "average_qf1", "average_qf")}
    (line,) = [line for line in lines if line.startswith(f"{unit} 10")]
    assert len(first) == 2 and all(f"{key} {float(x):.4g}" in line for key, x in first.items())
    assert ("cql_qf" in line) == ("cql_alpha" in option_names(script.__name__)) and "None" not in line
    capsys.readouterr()
    row = table(run(**options, holdout_fraction=0.3, run_id="holdout"))[0]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{unit} 10")]
    for key in ("holdout_td_error", "holdout_q", distance(script)):
        assert f"{key} {float(row[key]):.4g}" in line
    stored, bounds = weights(folder), script.action_bounds(Counter.action_space, "")
    assert {key: stored[f"/weights/{key}"].tolist() for key in ("action_low", "action_high")} == {
        key: bounds[key].tolist() for key in ("action_low", "action_high")
    }


@pytest.mark.parametrize(("bounded", "scored"), [(False, True), (True, False)])
def test_arrays_are_enough(bounded, scored, script, tiny, tmp_path):
    """Bounds and reference scores are optional, and the caller's arrays stay as they are."""
    rng = np.random.default_rng(0)
    terminals = np.arange(60) % 6 == 5
    data = {
        "observations": rng.normal(size=(60, 3)),
        "actions": rng.integers(0, 2, size=(60, 2)),
        "rewards": rng.normal(size=60),
        "next_observations": rng.normal(size=(60, 3)),
        "terminals": terminals,
        "timeouts": ~terminals & (np.arange(60) == 58),
    }
    if WORLDS[script.__name__].pixels:
        data = {key: data[key] for key in ("actions", "rewards", "terminals", "timeouts")}
        starts = np.flatnonzero(np.append(True, (data["terminals"] | data["timeouts"])[:-1]))
        starts = starts + (starts > 58)  # a time-out has a frame after it
        data |= {"frames": rng.integers(256, size=(61, 6, 6)).astype(np.uint8), "starts": starts}
    if bounded:
        data |= {"action_low": np.full(2, -1.0), "action_high": np.array([1.0, 2.0])}
        if WORLDS[script.__name__].pixels:  # it does not narrow them
            data["action_low"] = np.array([-2.0, 0.0])
    if scored:
        data["reference_scores"] = np.array([0.0, 1.0])
    before = copy.deepcopy(data)
    script.train(tiny(env="my own data", eval_env="none"), data=data)
    assert weights(tmp_path / "runs/run")["/weights/action_high"].tolist() == ([1, 2] if bounded else [1, 1])
    data["actions"] = before["actions"] = data["actions"] * 0
    row = script.train(tiny(env="my own data", eval_env="Counter-v0", run_id="evaluated"), data=data)
    high = script.action_bounds(Counter.action_space, "")["action_high"]  # the environment's bounds narrow the data's
    assert weights(tmp_path / "runs/evaluated")["/weights/action_high"].tolist() == high.tolist()
    assert (row["d4rl_normalized_score"] is not None) == scored and row["eval_return"] is not None
    assert data.keys() == before.keys() and all(np.array_equal(data[key], before[key]) for key in data)


@kinds
def test_loading_needs_less_than_twice_the_data(script, tiny, new_dataset):
    n, rng = 50_000, np.random.default_rng(0)
    observations = rng.standard_normal((1001, 20), dtype=np.float32)
    columns = {"actions": rng.integers(0, 2, (1000, 4)).astype(np.float32), "rewards": np.zeros(1000, np.float32)}
    columns |= {"terminations": np.arange(1000) == 999, "truncations": np.zeros(1000, bool)}
    numbered = isinstance(ACTIONS[script.__name__], gym.spaces.MultiDiscrete)
    actions = gym.spaces.MultiDiscrete([2, 2, 2, 2]) if numbered else gym.spaces.Box(-1, 1, (4,), np.float32)
    space = gym.spaces.Box(-np.inf, np.inf, (20,), np.float32)
    buffers = [EpisodeBuffer(observations=observations, **columns) for _ in range(n // 1000)]
    name = new_dataset(buffers, observation_space=space, action_space=actions)
    size = 4 * n * (2 * 20 + 4 + 2)
    gc.collect()
    tracemalloc.start()
    try:
        config = tiny(env=name, eval_env="none")
        data = script.load_dataset(name)
        data, *_ = script.prepare_data(config, data, script.Task(config, data), None)
        assert tracemalloc.get_traced_memory()[1] < 2 * size and len(data["rewards"]) == n
    finally:
        tracemalloc.stop()
