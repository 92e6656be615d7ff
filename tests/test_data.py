"""What a script makes of data: episodes, ends, scaling, held-out episodes, and data that it must refuse."""

import copy
import gc
import itertools
import json
import math
import shutil
import sys
import tracemalloc
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import (
    DATASET,
    WORLDS,
    Counter,
    columns_of_a_batch,
    continuous,
    discrete,
    equal,
    record,
    refusal,
    table,
    weights,
)
from minari.data_collector import EpisodeBuffer

OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = {
    "algorithms.offline.cql": gym.spaces.Box(-1, 1, (1,), np.float32),
    "algorithms.discrete.cql_dqn": gym.spaces.MultiDiscrete([3], start=[-1]),
}
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
    """Of the data of `episode`."""
    return {"observation_space": OBSERVATIONS, "action_space": ACTIONS[script.__name__]}


@pytest.fixture
def prepare(script, tiny):
    """What training sees: prepare(env=..., option=value) -> (data, holdout, scaling, task)."""

    def prepare(**options):
        config = tiny(**options)
        return script.prepare_data(config, script.make_environments(config), None)

    return prepare


def test_only_terminal_states_do_not_bootstrap_and_no_transition_crosses_an_episode(script, tiny, spaces, new_dataset):
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
    assert script.episode_numbers(data).tolist() == data["observations"][:, 0].tolist()
    batch = script.ReplayBuffer(columns_of_a_batch(script, tiny(), data), "cpu").rows(slice(None))
    assert np.flatnonzero(batch.terminals).tolist() == np.flatnonzero(data["terminals"]).tolist()


def test_time_out_inside_an_episode_ends_it(script, spaces, new_dataset):
    cut = np.array([False, True, False, False])
    data = script.load_dataset(new_dataset([episode(0, truncations=cut), episode(1)], **spaces))
    assert np.flatnonzero(data["timeouts"]).tolist() == [1]
    assert script.episode_numbers(data).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]


def test_numbers_become_float32(script, spaces, new_dataset):
    columns = {"observations": np.random.default_rng(0).random((5, 2)), "actions": np.ones((4, 1))}
    data = script.load_dataset(new_dataset([episode(0, **columns)], **spaces))
    for key in ("observations", "next_observations", "actions", "rewards"):
        assert data[key].dtype == np.float32
    assert data["observations"].tolist() == columns["observations"][:-1].astype(np.float32).tolist()


def test_parts_of_dict_observations_stand_in_sorted_order_in_data_and_environment(script, new_dataset, run, capsys):
    flat = script.load_dataset(new_dataset(record("Counter-v0", range(9)), env="Counter-v0"))
    name = new_dataset(record("DictCounter-v0", range(9)), "toy/dict-v0", env="DictCounter-v0")
    data = script.load_dataset(name)
    order = [0, 2, 1]  # goal/y is the seed, goal/z the sum of actions; then the time
    for key in ("observations", "next_observations"):
        assert data[key].dtype == np.float32 and np.array_equal(data[key], flat[key][:, order])
    env = gym.make("DictCounter-v0")
    space = env.observation_space
    assert script.flatten(env.reset(seed=3)[0], space).tolist() == [3, 0, 0]
    step = env.step(np.array([1, 0], env.action_space.dtype))[0]
    assert script.flatten(step, space).tolist() == [3, 1, 1]
    assert float(table(run(env=name))[-1]["eval_length"]) == 3.5


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
def test_actions_of_many_dimensions_are_refused_in_one_line_too(prepare, new_dataset):
    space = gym.spaces.Box(-1 / 3, 1, (30,), np.float32)
    buffers = [episode(i, actions=np.full((4, 30), -0.9, np.float32)) for i in range(2)]
    assert refusal(prepare, env=new_dataset(buffers, observation_space=OBSERVATIONS, action_space=space))[0] == 1


def test_actions_at_the_bounds_train_without_nan(script, run, new_dataset):
    bounds = script.action_bounds(Counter.action_space)
    actions = np.stack([bounds[f"action_{end}"] for end in ("low", "high", "low", "high")])
    observations = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    name = new_dataset([episode(i, actions=actions, observations=observations) for i in range(3)], env="Counter-v0")
    folder = run(env=name, bc_steps=20)
    assert all(math.isfinite(float(x)) for row in table(folder) for x in row.values() if x)
    assert all(x.isfinite().all() for x in weights(folder, "checkpoint.pt").values())


@pytest.mark.parametrize("holdout_fraction", [0, 0.25])
def test_observations_are_normalised_by_the_training_data(holdout_fraction, script, prepare):
    raw = script.load_dataset(DATASET)
    data, holdout, scaling, _ = prepare(holdout_fraction=holdout_fraction)
    mean, std = scaling["observation_mean"].numpy(), scaling["observation_std"].numpy()
    numbers = set(np.rint(data["observations"][:, 0] * std[0] + mean[0]))
    rows = np.isin(raw["observations"][:, 0], [*numbers])
    assert len(numbers) == 20 * (1 - holdout_fraction) and rows.sum() == len(data["rewards"])
    chosen = raw["observations"][rows].astype(np.float64)
    assert mean == pytest.approx(chosen.mean(0), abs=1e-5) and std == pytest.approx(chosen.std(0) + 1e-3, rel=1e-6)
    for part, of_part in ((data, rows), (holdout, ~rows)):
        for key in ("observations", "next_observations"):
            assert part[key] == pytest.approx((raw[key][of_part] - mean) / std, abs=1e-5)


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
    unscaled = {"observation_mean": torch.zeros(3), "observation_std": torch.ones(3)}
    actor.load_state_dict(policy["weights"] | unscaled)
    expected = actor.act((raw - mean) / std)
    assert np.ptp(expected) > 0.01
    assert script.load_policy(folder / "policy.pt")(raw) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "environment", "ranged"),
    [
        ("toy/new-v0", "none", False),
        ("toy/new-v0", "Counter-v0", False),
        ("toy/new-v0", "Hopper-Toy-v0", True),
        ("toy/new-v0", "HalfCheetah_Toy-v0", True),
        ("toy/walker2d-v0", "none", True),
        ("mujoco/hopper/medium-v0", "Counter-v0", True),
        ("D4RL/HalfCheetah-v0", "none", True),
    ],
)
def test_rewards(name, environment, ranged, script, prepare, new_dataset):
    new_dataset(record("Counter-v0", range(7)), name, env="Counter-v0")  # ends by terminal states and time-outs
    options = {"env": name, "eval_env": environment}
    raw = script.load_dataset(name)["rewards"]
    for change in ({}, {"reward_scale": 3}, {"reward_bias": 2}):
        data, _, _, task = prepare(**options, **change)
        assert np.array_equal(data["rewards"], raw) and task.transform == (1, 0, math.inf)
    returns = [sum(s + t for t in range(1, Counter.length(s) + 1)) for s in range(7)]
    factor = 1000 / (max(returns) - min(returns)) if ranged else 1
    data, _, _, task = prepare(**options, normalize_reward=True)
    assert data["rewards"] == pytest.approx(raw * factor * 5 - 1, rel=1e-5)
    assert task.transform == pytest.approx((factor * 5, -1, math.inf))
    data = prepare(**options, normalize_reward=True, reward_scale=0.5, reward_bias=0.25)[0]
    assert data["rewards"] == pytest.approx(raw * factor * 0.5 + 0.25, rel=1e-5) and data["rewards"].dtype == np.float32


def test_training_rewards_are_clipped_after_the_change(script, prepare):
    raw = script.load_dataset(DATASET)["rewards"]
    data, _, _, task = prepare(normalize_reward=True, reward_scale=0.5, reward_bias=-55.0, reward_clip=2.0)
    assert np.array_equal(data["rewards"], (raw * 0.5 - 55).clip(-2, 2)) and {-2, 2} < {*data["rewards"]}
    assert [task.training_rewards(reward) for reward in (0.0, 111.0, 999.0)] == [-2, 0.5, 2]


def test_rewards_without_a_range(prepare, spaces, new_dataset):
    name = new_dataset([episode(0), episode(0)], "toy/hopper-v0", **spaces)
    status, line = refusal(prepare, env=name, normalize_reward=True)
    assert status == 1 and "--normalize_reward" in line


@pytest.mark.parametrize("environment", ["Hopper-Toy-v0", "Counter-v0", "none"])
def test_reference_scores_come_from_the_task_else_from_the_dataset(environment, script, prepare, new_dataset):
    episodes = record("Counter-v0", range(9))
    plain = new_dataset(episodes, env="Counter-v0")
    scored = new_dataset(episodes, "toy/scored-v0", env="Counter-v0", ref_min_score=10, ref_max_score=20)
    hopper = script.REFERENCE_SCORES["hopper"]
    for name, own in ((plain, None), (scored, (10, 20))):
        task = prepare(env=name, eval_env=environment)[3]
        assert task.reference == (hopper if environment == "Hopper-Toy-v0" else own)
        low, high = task.reference or (None, None)
        expected = None if low is None else pytest.approx(100 * (12 - low) / (high - low))
        assert task.score(12) == expected


# The data of `broken` is good apart from the change that it names.


def edit(path, change):
    with h5py.File(path / "main_data.hdf5", "r+") as file:
        change(file)


def replace(file, name, shape=None, value=None):
    group, key = file[name].parent, name.rsplit("/")[-1]
    dtype = file[name].dtype
    del file[name]
    if value is None:
        group.create_dataset(key, shape, dtype, chunks=(1024, *shape[1:]))  # declares much, holds nothing
    else:
        group[key] = value


def cut(file_size):
    def change(path):
        content = (path / "main_data.hdf5").read_bytes()
        (path / "main_data.hdf5").write_bytes(content[: int(file_size * len(content)) if file_size < 1 else -10])

    return change


def metadata(**changes):
    def change(path):
        content = json.loads((path / "metadata.json").read_text()) | changes
        (path / "metadata.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def nan(key, place):
    def change(path):
        def set_nan(file):
            file[f"episode_3/{key}"][place] = np.nan

        edit(path, set_nan)

    return change


def longer(path):
    def change(file):
        for number, extra in ((3, 1), (4, -1)):  # so that the columns have equal lengths in all
            name = f"episode_{number}/observations"
            observations = np.arange(2.0 * (len(file[name]) + extra)).reshape(-1, 2)
            replace(file, name, value=observations)

    edit(path, change)


BROKEN = {
    "NaN in a reward": (nan("rewards", 1), "rewards"),
    "NaN in an action": (nan("actions", 1), "actions"),
    "NaN in the last observation": (nan("observations", -1), "next_observations"),
    "infinite observation": (
        lambda path: edit(path, lambda file: file["episode_3/observations"].__setitem__((1, 0), np.inf)),
        "observations",
    ),
    "rewards are too few": (
        lambda path: edit(path, lambda file: replace(file, "episode_3/rewards", value=np.zeros(3))),
        "",
    ),
    "flags are too few": (
        lambda path: edit(path, lambda file: replace(file, "episode_3/terminations", value=np.zeros(3, bool))),
        "",
    ),
    "observations of an episode belong to the next": (longer, ""),
    "observations of another size": (
        lambda path: edit(path, lambda file: replace(file, "episode_3/observations", value=np.zeros((5, 3)))),
        "",
    ),
    "rewards are vectors": (
        lambda path: edit(path, lambda file: [replace(x, "rewards", value=np.zeros((4, 2))) for x in file.values()]),
        "rewards",
    ),
    "a column is missing": (lambda path: edit(path, lambda file: file.__delitem__("episode_3/actions")), "actions"),
    "no episodes": (metadata(total_episodes=0, total_steps=0), ""),
    "more is declared than any memory": (
        lambda path: edit(path, lambda file: replace(file, "episode_3/observations", shape=(10**13, 2))),
        "",
    ),
    "file is empty": (cut(0), ""),
    "file is cut early": (cut(0.01), ""),
    "file is cut in the middle": (cut(0.5), ""),
    "file lacks its end": (cut(1), ""),
    "no file": (lambda path: (path / "main_data.hdf5").unlink(), ""),
    "metadata are no JSON": (lambda path: (path / "metadata.json").write_text("{"), ""),
    "metadata lack the id": (metadata(dataset_id=None), ""),
    "reference scores are no numbers": (metadata(ref_min_score="low", ref_max_score="high"), ""),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_data_is_refused_before_training(fault, script, tiny, spaces, new_dataset, tmp_path):
    name = new_dataset([episode(i) for i in range(6)], **spaces)
    change, word = BROKEN[fault]
    change(tmp_path / "minari" / name / "data")
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and f"--env {name}" in line and word in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({key: np.zeros(0) for key in ("rewards", "terminals", "timeouts")}, "no transition"),
        ({"rewards": np.zeros((4, 1))}, "rewards"),
        ({"actions": np.zeros(4)}, "actions"),
        ({"terminals": np.zeros(3, bool)}, "terminals"),
        ({"next_observations": np.zeros((4, 1))}, "next_observations"),
        ({"observations": np.full((4, 2), np.nan)}, "observations"),
        ({"rewards": np.full(4, -np.inf)}, "rewards"),
    ],
)
def test_bad_arrays_of_a_replaced_load_dataset_are_refused(changes, word, script, tiny, monkeypatch):
    data = {key: np.zeros((4, 2)) for key in ("observations", "actions", "next_observations")}
    data |= {"rewards": np.zeros(4), "terminals": np.zeros(4, bool), "timeouts": np.zeros(4, bool)}
    monkeypatch.setattr(script, "load_dataset", lambda name: data | changes)
    status, line = refusal(script.train, tiny(env="mine", eval_env="none"))
    assert status == 1 and "--env mine" in line and word in line


def test_equal_reference_scores_end_no_run(script, tiny, new_dataset):
    name = new_dataset(record("Counter-v0", range(6)), env="Counter-v0", ref_min_score=1, ref_max_score=1)
    try:
        assert script.train(tiny(env=name))["d4rl_normalized_score"] is None
    except script.DataError:
        assert not Path(tiny().checkpoints_path).exists()  # refused before training


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"env": "toy/countr-v0"}, 1, ["toy/countr-v0", DATASET]),
        ({"env": "no-such-thing"}, 1, ["no-such-thing"]),
        ({"env": "../../etc"}, 1, ["../../etc"]),
        ({"env": "/etc"}, 1, ["/etc"]),
        ({"env": "toy/" + 300 * "x" + "-v0"}, 1, ["xxx"]),
        ({"eval_env": "NoSuchEnvironment-v0"}, 2, ["--eval_env NoSuchEnvironment-v0"]),
        ({"eval_env": "no_such_module:Counter-v0"}, 2, ["--eval_env no_such_module:Counter-v0"]),
        ({"buffer_size": 89}, 2, ["--buffer_size 89", "100"]),
        ({"holdout_fraction": 0.9, "env": "toy/one-v0"}, 2, ["--holdout_fraction"]),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options, status, words, script, tiny, new_dataset, tmp_path):
    new_dataset(record("Counter-v0", [0]), "toy/one-v0", env="Counter-v0")
    code, line = refusal(lambda: script.train(tiny(**options)))
    assert code == status and all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()


def test_environment_of_other_sizes_is_refused_before_training(script, tiny, tmp_path):
    for name in WORLDS[script.__name__].others:
        status, line = refusal(script.train, tiny(eval_env=name))
        sizes = "{'observations': 3, 'actions': 2}"
        assert status == 1 and all(word in line for word in ("--eval_env", name, sizes, "'actions': 1"))
    assert not (tmp_path / "runs").exists()


def test_environment_with_other_actions_is_refused_before_training(script, tiny, tmp_path):
    name = WORLDS[script.__name__].foreign
    status, line = refusal(script.train, tiny(eval_env=name))
    assert status == 1 and all(word in line for word in (name, "Box", "Discrete")) and not (tmp_path / "runs").exists()


def test_without_network_the_line_says_where_the_file_belongs(script, tiny, new_dataset, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(script.minari, "download_dataset", unreachable)
    status, line = refusal(script.train, tiny(env="mujoco/hopper/medium-v0"))
    assert status == 1 and "Name or service" in line and str(tmp_path / "minari" / "mujoco/hopper/medium-v0") in line


def test_no_dataset_outside_the_minari_root_is_read(script, tiny, new_dataset, tmp_path):
    shutil.copytree(tmp_path / "minari" / DATASET, tmp_path / "outside-v0")
    for name in ("../outside-v0", str(tmp_path / "outside-v0"), "toy/../../outside-v0"):
        status, line = refusal(script.train, tiny(env=name))
        assert status == 1 and name in line


def test_other_folders_in_the_minari_root_do_no_harm(script, tiny, spaces, new_dataset, tmp_path):
    new_dataset([episode(0)], **spaces)
    (tmp_path / "minari" / "notes" / "data").mkdir(parents=True)
    status, line = refusal(script.train, tiny(env="toy/newer-v0"))
    assert status == 1 and "toy/newer-v0" in line


def test_data_with_other_actions_are_refused(script, tiny, new_dataset):
    name = WORLDS[script.__name__].foreign
    status, line = refusal(script.train, tiny(env=new_dataset(record(name, range(3)), env=name), eval_env="none"))
    assert status == 1 and "--env toy/new-v0" in line and "Box" in line and "Discrete" in line


@continuous
def test_data_without_bounds_are_refused(tiny, script, new_dataset):
    endless = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    name = new_dataset([episode(0), episode(1)], observation_space=OBSERVATIONS, action_space=endless)
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and "bounds" in line


def test_images_are_refused(script, tiny, spaces, new_dataset):
    image = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
    pixels, nested = np.zeros((5, 40, 40, 3), np.uint8), gym.spaces.Dict({"pixels": image})
    observations = [pixels, {"pixels": pixels}, {"camera": {"pixels": pixels}}]
    for i, space in enumerate((image, nested, gym.spaces.Dict({"camera": nested}))):
        buffers = [episode(0, observations=observations[i])]
        name = new_dataset(buffers, f"toy/image-v{i}", **spaces | {"observation_space": space})
        status, line = refusal(script.train, tiny(env=name))
        assert status == 1 and f"--env {name}" in line and "(40, 40, 3)" in line


def test_observations_that_are_no_arrays_are_refused(script, tiny, monkeypatch):
    parts = gym.spaces.Tuple([gym.spaces.Discrete(2), gym.spaces.Discrete(3)])
    for space in (parts, gym.spaces.Dict({"cards": parts}), gym.spaces.Sequence(gym.spaces.Discrete(2))):
        status, line = refusal(script.check_spaces, space, Counter.action_space, "--env toy")
        assert status == 1 and "--env toy has observations" in line


def test_an_episode_without_end_ends_in_evaluation(script, run, monkeypatch):
    monkeypatch.setattr(script, "MAX_STEPS", 30)
    monkeypatch.setattr(Counter, "length", staticmethod(lambda seed: 10**9))
    assert float(table(run(max_timesteps=10))[-1]["eval_length"]) == 30
    assert float(table(run(max_timesteps=10, eval_env="conftest:Counter-v0", run_id="module"))[-1]["eval_length"]) == 30
    spec = gym.spec("Counter-v0")
    monkeypatch.setattr(spec, "max_episode_steps", 40)  # the environment's own limit counts
    assert float(table(run(max_timesteps=10, eval_env="Counter-v0", run_id="own"))[-1]["eval_length"]) == 40


def test_a_policy_takes_observations_of_its_size_alone(script, run):
    policy = script.load_policy(run() / "policy.pt")
    for wrong in (0, np.zeros(1), np.zeros((3, 2)), np.zeros(16)):
        with pytest.raises(ValueError, match="size 3"):
            policy(wrong)


def test_small_grids_become_vectors_and_discrete_observations_one_hot(script, run, spaces, new_dataset):
    grid, number = gym.spaces.Box(0, 255, (2, 3), np.uint8), gym.spaces.Discrete(3, start=5)
    parts = {"grid": grid, "number": number, "text": gym.spaces.Text(9)}
    space = gym.spaces.Dict(parts)
    observation = {"grid": np.arange(6).reshape(2, 3), "number": 6, "text": "go"}
    assert script.flatten(observation, space).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0]
    columns = {"grid": np.arange(30).reshape(5, 2, 3), "number": np.array([5, 6, 7, 5, 6])}
    expected = np.concatenate([np.arange(30).reshape(5, 6), np.eye(3)[[0, 1, 2, 0, 1]]], axis=1)
    assert np.array_equal(script.flatten(columns, gym.spaces.Dict(grid=grid, number=number), n_leading=1), expected)
    name = new_dataset([episode(0, observations=columns["number"])], **spaces | {"observation_space": number})
    assert script.load_dataset(name)["next_observations"].tolist() == np.eye(3)[[1, 2, 0, 1]].tolist()
    assert weights(run(env=name))["/weights/observation_mean"].tolist() == [0.5, 0.25, 0.25]


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
    options = {"observation_space": OBSERVATIONS, "action_space": space}
    name = new_dataset([episode(0, actions=np.array(actions))], **options)
    data, _, scaling, _ = prepare(env=name)
    assert data["actions"].tolist() == numbers and data["actions"].dtype == np.int64
    assert (scaling["action_low"].tolist(), scaling["action_high"].tolist()) == (low, high)
    assert script.ReplayBuffer(script.td_columns(data, script.TrainConfig()), "cpu").columns[1].dtype == torch.int64

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
    wrong = next(f"{x:g}" for x in action if x)
    assert status == 1 and f"--env {name}: an action is {wrong}" in line


@discrete
def test_one_hot_actions_without_a_space_are_refused(script):
    for n in (2, 70):
        status, line = refusal(script.encode_actions, np.eye(n, dtype=np.float32), None, None, "logged.hdf5")
        assert status == 1 and "one-hot" in line
    assert script.encode_actions(np.float32([[0, 1], [1, 1]]), None, None, "")[0].tolist() == [1, 3]


@discrete
def test_too_many_actions_are_refused(script, tiny, new_dataset):
    space = gym.spaces.MultiDiscrete(30 * [10])
    buffers = [episode(i, actions=np.full((4, 30), 9)) for i in range(2)]
    name = new_dataset(buffers, observation_space=OBSERVATIONS, action_space=space)
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and "100,000" in line


def test_buffer_size_of_the_data_is_enough(run):
    assert table(run(buffer_size=100))


def test_held_out_episodes_are_whole_and_not_trained_on(script, prepare, run, new_dataset):
    data, holdout, scaling, _ = prepare(holdout_fraction=0.22)
    mean, std = scaling["observation_mean"].numpy(), scaling["observation_std"].numpy()
    kept, held_out = (np.rint(part["observations"][:, 0] * std[0] + mean[0]) for part in (data, holdout))
    assert len(set(held_out)) == 5 and len(set(kept)) == 15 and not set(kept) & set(held_out)  # 0.22 of 20, and more
    assert len(kept) + len(held_out) == 100 and len(prepare()[1]["rewards"]) == 0
    other = prepare(holdout_fraction=0.22, seed=1)
    assert not np.array_equal(other[0]["rewards"], data["rewards"])

    # training is, to the last bit, training on the other episodes alone
    folder = run(holdout_fraction=0.22, run_id="holdout")
    rest = new_dataset([x for x in record("Counter-v0", range(100, 120)) if x.seed in kept], env="Counter-v0")
    alone = run(env=rest, run_id="alone")
    assert equal(weights(folder), weights(alone))
    rows, expected = table(folder), table(alone)
    assert {"holdout_td_error", "holdout_gap", "holdout_q"} == rows[0].keys() - expected[0].keys()
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected


def test_evaluation_and_holdout_metrics_take_none_of_trainings_random_numbers(run):
    often, seldom = (run(holdout_fraction=0.2, eval_freq=freq, run_id=f"run{freq}") for freq in (1, 25))
    assert len(table(often)) == 25 and len(table(seldom)) == 1
    assert equal(weights(often), weights(seldom))
    assert {k: v for k, v in table(often)[-1].items() if k.startswith(("eval", "hold"))}.items() <= (
        table(seldom)[-1].items()
    )


def test_minibatches_cover_all_rows_and_keep_them_together(script):
    n = 50
    rows = np.arange(n, dtype=np.float32)
    data = {key: rows for key in ("rewards", "terminals", "timeouts")}
    data |= {key: np.stack([rows, rows], axis=1) for key in ("observations", "actions", "next_observations")}
    data |= {key: rows for key in script.Batch._fields if key not in data}
    buffer = script.ReplayBuffer(data, "cpu")
    torch.manual_seed(0)
    batch = buffer.sample(100 * n)
    assert batch.observations.shape == (100 * n, 2) and batch.rewards.shape == batch.terminals.shape == (100 * n,)
    for column in (*batch.observations.T, *batch.actions.T, *batch.next_observations.T, batch.terminals):
        assert torch.equal(column, batch.rewards)
    counts = np.bincount(batch.rewards.int())
    assert len(counts) == n and 60 < counts.min() <= counts.max() < 140
    assert all(column.dtype == torch.float32 for column in batch)


ENTRY = '{"id": "%s", "entry_point": "evil:Env", "reward_threshold": null, "nondeterministic": false, '
ENTRY += '"max_episode_steps": null, "disable_env_checker": false, "kwargs": {}, "additional_wrappers": '
ENTRY += '[{"name": "Evil", "entry_point": "evil:Env", "kwargs": {}}], "vector_entry_point": "evil:Env"}'


@pytest.mark.parametrize(
    ("environment", "evaluates", "spaces"),
    [
        ("Counter-v0", True, True),  # known: Gymnasium's own entry is made
        ("Unknown-v0", False, True),
        ("evil:Unknown-v0", False, True),
        ("evil:Counter-v0", False, True),
        ("Unknown-v0", False, False),  # Minari itself would make the environment to learn its spaces
        ("Counter-v0", True, False),
    ],
)
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
    try:
        row = script.train(tiny(env=name))
        assert (row["eval_return"] is not None) == evaluates
        assert evaluates or environment in capsys.readouterr().out
    except script.DataError:
        assert not spaces  # which such a dataset may be refused for
    assert "evil" not in sys.modules


def test_arguments_of_the_environment_come_from_the_dataset(script, tiny, new_dataset):
    spec = copy.deepcopy(gym.spec("Counter-v0"))
    spec.max_episode_steps = 2
    name = new_dataset(record("Counter-v0", range(6)), env="Counter-v0", eval_env=spec)
    assert script.train(tiny(env=name))["eval_length"] == 2


def test_data_without_environment_train_without_evaluation_and_say_so(script, tiny, new_dataset, capsys):
    episodes = record("Counter-v0", range(6))
    name = new_dataset(episodes, observation_space=Counter.observation_space, action_space=Counter.action_space)
    row = script.train(tiny(env=name))
    assert "no evaluation" in capsys.readouterr().out
    offline = {key for key, value in row.items() if value is None}
    assert offline == {key for key in row if key.startswith("eval_")} | {"d4rl_normalized_score"}
    assert script.train(tiny(env=name, eval_env="Counter-v0", run_id="named"))["eval_return"] > 0


def test_no_simulator_where_none_is_wanted(script, run, monkeypatch):
    monkeypatch.setattr(script.gym, "make", lambda *_, **__: pytest.fail("an environment was made"))
    folder = run(eval_env="none")
    assert [row["eval_return"] for row in table(folder)] == ["", "", ""]
    stored, bounds = weights(folder), script.action_bounds(Counter.action_space)
    assert {key: stored[f"/weights/{key}"].tolist() for key in bounds} == {k: x.tolist() for k, x in bounds.items()}
    assert script.load_policy(folder / "policy.pt")(np.zeros(3)).shape == (2,)


@pytest.mark.parametrize("optional", list(itertools.product([0, 1], [0, 1])))
def test_load_dataset_may_be_replaced(optional, script, run, monkeypatch):
    """Plain arrays are enough; bounds and reference scores are optional."""
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
    if optional[0]:
        data |= {"action_low": np.full(2, -1.0), "action_high": np.array([1.0, 2.0])}
    if optional[1]:
        data["reference_scores"] = np.array([0.0, 1.0])
    monkeypatch.setattr(script, "load_dataset", lambda name: dict(data))
    folder = run(env="my own data", eval_env="none")
    assert weights(folder)["/weights/action_high"].tolist() == ([1, 2] if optional[0] else [1, 1])
    data["actions"] = data["actions"] * 0
    folder = run(env="my own data", eval_env="Counter-v0", run_id="evaluated")  # whose bounds count
    high = script.action_bounds(Counter.action_space)["action_high"]
    assert weights(folder)["/weights/action_high"].tolist() == high.tolist()
    assert (table(folder)[-1]["d4rl_normalized_score"] != "") == bool(optional[1])


@pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
def test_damaged_bytes_are_refused_or_read_as_numbers(file, script, prepare, new_dataset, tmp_path):
    name = new_dataset(record("Counter-v0", range(6)), env="Counter-v0")
    path = tmp_path / "minari" / name / "data" / file
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        content = np.frombuffer(good, np.uint8).copy()
        content[rng.integers(len(good), size=rng.integers(1, 20))] ^= rng.integers(1, 256, dtype=np.uint8)
        path.write_bytes(content.tobytes())
        try:
            data = prepare(env=name, eval_env="none")[0]
        except script.DataError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert all(np.isfinite(data[key]).all() for key in script.COLUMNS)
    assert refused > 10


@pytest.mark.parametrize("layout", ["D4RL", "D4RL without next observations", "Minari"])
def test_loading_needs_less_than_twice_the_data(layout, script, tiny, new_dataset, tmp_path):
    n, rng = 50_000, np.random.default_rng(0)
    columns = {
        "observations": rng.standard_normal((n, 20), dtype=np.float32),
        "actions": rng.integers(0, 2, (n, 4)).astype(np.float32),
        "rewards": rng.standard_normal(n, dtype=np.float32),
    }
    name = str(tmp_path / "large.hdf5")
    if layout == "Minari":
        space = gym.spaces.Box(-np.inf, np.inf, (20,), np.float32)
        ends = {"terminations": np.arange(1000) == 999, "truncations": np.zeros(1000, bool)}
        episodes = [
            EpisodeBuffer(observations=columns["observations"][i : i + 1001], actions=columns["actions"][i : i + 1000],
                          rewards=columns["rewards"][i : i + 1000], **ends)
            for i in range(0, n - 1000, 1000)
        ]  # fmt: skip
        kinds = {gym.spaces.Box: gym.spaces.Box(-1, 1, (4,), np.float32)}
        actions = kinds.get(script.ACTION_SPACES[0], gym.spaces.MultiDiscrete([2, 2, 2, 2]))
        name = new_dataset(episodes, observation_space=space, action_space=actions)
        del episodes
    else:
        with h5py.File(name, "w") as file:
            for key, column in columns.items():
                file[key] = column
            if layout == "D4RL":
                file["next_observations"] = columns["observations"]
            file["terminals"] = file["timeouts"] = np.arange(n) % 1000 == 999
    size = 4 * n * (2 * 20 + 4 + 2)
    del columns
    gc.collect()
    tracemalloc.start()
    try:
        config = tiny(env=name, eval_env="none")
        data, *_ = script.prepare_data(config, [], None)
        buffer = script.ReplayBuffer(columns_of_a_batch(script, config, data), "cpu")
        assert tracemalloc.get_traced_memory()[1] < 2 * size and len(buffer.columns[0]) > 0.9 * n
    finally:
        tracemalloc.stop()
