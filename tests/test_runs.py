"""Evaluation and the run folder: rows, files, kill and resume, signals, stored policies, full disks, divergence."""

import concurrent.futures
import contextlib
import errno
import io
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from conftest import (
    DATASET,
    METHODS,
    ONLINE,
    SCRIPTS,
    SPEEDS,
    SURPLUS,
    WORLDS,
    Counter,
    constrained,
    contents,
    continuous,
    discrete,
    equal,
    interrupt,
    kinds,
    make_agent,
    observations_of,
    offline,
    once,
    option_names,
    record,
    refusal,
    slow_clock,
    table,
    tiny_arguments,
    tiny_config,
    train_apart,
    weights,
)

FILES = {"config.yaml", "metrics.csv", "checkpoint.pt", "policy.pt"}  # and online.bin if there is an online phase
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def files(script):
    return FILES | {"dynamics.pt"} if "dynamics_path" in option_names(script.__name__) else FILES


def at_call(patch, owner, name, n, action):
    """Calls `action` before the n-th call of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def watched(*args, **options):
        if next(calls) == n:
            action()
        return function(*args, **options)

    patch.setattr(owner, name, watched)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """Folders of runs by their options, each trained once in this file."""
    runs = {}

    def finished(**options):
        if (key := str(options)) not in runs:
            path = tmp_path_factory.mktemp("finished")
            script.train(tiny_config(script, path, **options))
            runs[key] = path / "run"
        return runs[key]

    return finished


@pytest.fixture
def trained_for(finished, tiny):
    """A copy of a run of so many updates, as the run folder of that name in this test; a later start continues it."""

    def trained_for(max_timesteps, run_id="run", **options):
        folder = Path(tiny().checkpoints_path, run_id)
        return Path(shutil.copytree(finished(max_timesteps=max_timesteps, **options), folder))

    return trained_for


# Names, rows and lines


def test_run_folders_are_new_and_named_after_run_and_data(script, tiny, tmp_path):
    for _ in range(2):
        script.train(tiny(run_id=None, name="a/b"))
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"a-b-toy-counter-v0-[0-9a-f]{8}", folder.name)
        assert contents(folder).keys() == files(script)


@pytest.mark.parametrize(("freq", "steps"), [(10, [10, 20, 25]), (100, [25])])
def test_rows(freq, steps, script, run, capsys):
    folder, unit = run(eval_freq=freq), WORLDS[script.__name__].unit
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[:5] == ["step", "eval_return", "eval_return_std", "d4rl_normalized_score", "updates_per_second"]
    assert [row["step"] for row in table(folder)] == [str(step) for step in steps] and len(set(header)) == len(header)
    lines = capsys.readouterr().out.splitlines()
    said = [line.split(":")[0] for line in lines if line.startswith(f"{unit} ")]
    assert said == [f"{unit} {step}" for step in steps]
    (plan,) = [line for line in lines if "0 to 25" in line]
    assert all(word in plan for word in (str(folder), f"every {freq}", "Counter-v0"))
    assert lines.index(plan) < min(i for i, line in enumerate(lines) if line.startswith(f"{unit} "))


def test_last_line_has_score_and_folder_and_row_is_what_stands_in_the_table(
    script, tiny, tmp_path, new_dataset, capsys
):
    name = new_dataset(record("Counter-v0", range(9)), env="Counter-v0", ref_min_score=10, ref_max_score=20)
    row = script.train(tiny(env=name))
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"score {row['d4rl_normalized_score']:.1f}" in line and str(tmp_path / "runs" / "run") in line
    stored = {name: float(value) if value else None for name, value in table(tmp_path / "runs/run")[-1].items()}
    assert {name: value for name, value in row.items() if name not in SPEEDS} == stored


@once
def test_updates_per_second_are_those_of_updates_alone(script, tiny, tmp_path, monkeypatch):
    """The clock moves by one in each update, and by a lot in everything else, also between two starts."""
    clock, takes = slow_clock(monkeypatch, script)
    takes(script.ReplayBuffer, "sample", 1.0)
    for owner, name in ((Counter, "step"), (os, "fsync"), (script.wandb, "init"), (script, "load_dataset")):
        takes(owner, name, 1000.0)
    script.train(tiny(max_timesteps=20))
    clock.now -= 12345.0
    assert interrupt(script, tiny(max_timesteps=40)) == 143
    assert script.train(tiny(max_timesteps=40))["updates_per_second"] == pytest.approx(1)
    rows = (tmp_path / "runs/run/metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("updates_per_second")
    assert [float(row.split(",")[place]) for row in rows[1:]] == pytest.approx([1, 1, 1, 1])


def test_training_metrics_are_means_since_the_last_row(run):
    single, grouped = table(run(eval_freq=1, run_id="single")), table(run(eval_freq=10, run_id="grouped"))
    names = single[0].keys() - ONLINE
    names = [name for name in names if not name.startswith(("step", "eval", "d4rl", "feature", "data"))]
    assert len(names) >= 10
    for row, updates in zip(grouped, (single[:10], single[10:20], single[20:])):
        for name in names:
            assert float(row[name]) == pytest.approx(np.mean([float(x[name]) for x in updates]), rel=1e-4, abs=1e-6)


def test_training_moves_every_parameter_and_metrics_are_finite(script, tiny, run):
    options = {"bc_steps": 5, "cql_lagrange": True, "divergence_lagrange": True, "holdout_fraction": 0.2}
    if "policy_constraint" in script.__name__:
        options |= METHODS["BRAC-p"] | {"behaviour_steps": 0}  # which has all parts
    config = tiny(**options)
    torch.manual_seed(config.seed)
    before = {f"/agent/{name}": x.detach().clone() for name, x in make_agent(script, config).named_parameters()}
    folder = run(**options)
    after = weights(folder, "checkpoint.pt")
    assert len(before) >= 8
    for name, value in before.items():
        assert after[name].isfinite().all() and not torch.equal(after[name], value), name
    empty = {"d4rl_normalized_score", *ONLINE}
    for row in table(folder):
        assert all(math.isfinite(float(value)) for name, value in row.items() if name not in empty)


@continuous
def test_pure_cloning_learns_the_datas_actions_and_has_no_critics(script, run, new_dataset):
    """The data's second action depends on the time; the likelihood is a density in [-1, 1]."""
    clean = record("Counter-v0", range(30), lambda env, observation: np.float32([-1, 0.4 * (observation[1] > 1)]))
    name = new_dataset(clean, env="Counter-v0")
    options = {"env": name, "bc_only": True, "holdout_fraction": 0.2, "policy_lr": 1e-2, "hidden_dim": 32}
    folder = run(max_timesteps=300, eval_freq=100, **options)
    rows, header = table(folder), (folder / "metrics.csv").read_text().splitlines()[0]
    likelihoods = [float(row["holdout_log_prob"]) for row in rows]
    assert not re.search("qf|cql|alpha|holdout_(td|gap|q)", header) and rows[0]["eval_predicted_value"] == ""
    data = script.load_dataset(name)
    actions = script.load_policy(folder / "policy.pt")(data["observations"])
    assert np.abs(actions - data["actions"]).mean() < 0.05 < data["actions"].std(axis=0).max()
    stored = weights(folder, "checkpoint.pt")
    less = run(run_id="less", max_timesteps=1, **options)
    assert min(likelihoods) > float(table(less)[-1]["holdout_log_prob"]) + 1
    untouched = weights(less, "checkpoint.pt")
    names = [name for name in stored if name.startswith("/agent/critic")]
    assert names and all(torch.equal(stored[name], untouched[name]) for name in names)


# Evaluation


def outcome(seed, discount, factor=1.0, bias=0.0):
    """Return, length, success and discounted return of Counter's episode, by hand."""
    rewards = np.array([seed + t for t in range(1, Counter.length(seed) + 1)])
    discounted = sum(discount**t * (factor * reward + bias) for t, reward in enumerate(rewards))
    return rewards.sum(), len(rewards), seed % 3 == 0, discounted


@pytest.mark.parametrize(("n_episodes", "eval_seed"), [(1, 0), (35, 100)])
@pytest.mark.parametrize("normalize_reward", [False, True])
@once
def test_evaluation_is_over_one_episode_from_each_seed(n_episodes, eval_seed, normalize_reward, run):
    """Environments go on after their episode until the last one ends; that does not count."""
    options = {"n_episodes": n_episodes, "eval_seed": eval_seed, "normalize_reward": normalize_reward}
    row = table(run(**options, discount=0.8, reward_scale=0.5, reward_bias=0.25, max_timesteps=2))[-1]
    change = (0.5, 0.25) if normalize_reward else (1, 0)
    episodes = np.array([outcome(eval_seed + i, 0.8, *change) for i in range(n_episodes)])
    expected = dict(zip(("eval_return", "eval_length", "eval_success", "eval_discounted_return"), episodes.mean(0)))
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    assert float(row["eval_return_std"]) == pytest.approx(episodes[:, 0].std())


@once
def test_names_of_success_and_none_where_none_is_reported(run, monkeypatch):
    assert table(run(eval_env="Plain-v0"))[-1]["eval_success"] == ""
    step = Counter.step
    for key in ("success", "is_success", "goal_achieved"):
        monkeypatch.setattr(Counter, "step", lambda *x, key=key: (*(y := step(*x))[:4], {key: y[4]["success"]}))
        assert float(table(run(n_episodes=6, run_id=key))[-1]["eval_success"]) == pytest.approx(2 / 6)


@once
def test_predicted_value_is_of_the_start_states(script, run, monkeypatch):
    agent = getattr(script, WORLDS[script.__name__].agent)
    monkeypatch.setattr(agent, "start_values", lambda self, observations: observations @ np.array([1, 100, 100]))
    row = table(run(n_episodes=20, eval_seed=7))[-1]
    assert float(row["eval_predicted_value"]) == pytest.approx(np.mean(range(7, 27)))  # at t = 0, in raw units


@pytest.fixture
def trained(script, tiny, run):
    """An agent whose critics differ widely; observations, raw and scaled, and its actions there."""
    folder = run(policy_lr=1e-2, qf_lr=1e-2)
    agent = make_agent(script, tiny())
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    observations, stored = script.load_dataset(DATASET)["observations"][:20], weights(folder)
    scaled = (torch.tensor(observations) - stored["/weights/observation_mean"]) / stored["/weights/observation_std"]
    return agent, observations, scaled, script.load_policy(folder / "policy.pt")(observations)


@continuous
def test_start_values_are_the_smaller_critics_for_the_deterministic_action(trained):
    agent, observations, scaled, actions = trained
    torch.manual_seed(0)
    for parameter in agent.critic.parameters():  # so that each critic is smaller somewhere
        torch.nn.init.normal_(parameter)
    low, high = Counter.action_space.low, Counter.action_space.high
    with torch.no_grad():
        q = agent.critic(scaled, torch.tensor(2 * (actions - low) / (high - low) - 1).unsqueeze(1))[..., 0]
    values = agent.start_values(observations)
    assert values == pytest.approx(q.min(dim=0).values.numpy(), abs=1e-2)
    assert (q[0] < q[1]).unique().tolist() == [False, True] and np.ptp(values) > 1


@discrete
def test_start_values_are_those_of_the_action_that_is_taken(trained):
    agent, observations, scaled, actions = trained
    with torch.no_grad():
        q = agent.critic(scaled)[..., 0].numpy()
    values = q[range(20), np.ravel_multi_index((actions - Counter.action_space.start).T, Counter.action_space.nvec)]
    assert agent.start_values(observations) == pytest.approx(values, abs=1e-3) and np.ptp(values) > 0.01
    assert np.array_equal(values, q.max(axis=1))


@kinds
def test_policy_acts_on_raw_observations_in_the_units_of_the_environment(script, run, monkeypatch):
    """The evaluation takes the same actions as load_policy, one episode after the other."""
    step, log = Counter.step, []

    def logged(self, action):
        if self.number != SURPLUS:
            log.append((self.number, self.t, *action))
        return step(self, action)

    monkeypatch.setattr(Counter, "step", logged)
    folder = run(n_episodes=20, max_timesteps=10, policy_lr=1e-2, qf_lr=1e-2)
    evaluated, policy = np.array(sorted(log)), script.load_policy(folder / "policy.pt")
    log.clear()
    env = gym.make("Counter-v0")
    for seed in range(20):
        observation, done = env.reset(seed=seed)[0], False
        while not done:
            observation, _, terminated, truncated, _ = env.step(policy(observation))
            done = terminated or truncated
    assert evaluated == pytest.approx(np.array(log), abs=1e-3)
    assert np.ptp(evaluated[:, 2:]) > 0.01


PROCESS = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from algorithms.offline import policy_constraint
np.save({to!r}, policy_constraint.load_policy({policy!r})(np.load({observations!r})))
"""


@pytest.mark.parametrize("method", ["BRAC-p", "BEAR", "BCQ"])
@constrained
def test_a_policy_is_a_function_of_the_observation(method, script, run, program, tmp_path, monkeypatch):
    """Alone, in any batch, in another process, and in the evaluation, though the critics of training are bfloat16."""
    step, log, rng = Counter.step, [], np.random.default_rng(0)

    def logged(self, action):
        if self.number != SURPLUS:
            log.append((*self.observe(), *action))
        return step(self, action)

    monkeypatch.setattr(Counter, "step", logged)
    options = {"precision": "bfloat16", "qf_lr": 1e-2, "n_episodes": 8, "behaviour_steps": 0, "eval_freq": 99}
    folder = run(**METHODS[method] | options)
    policy, seen = script.load_policy(folder / "policy.pt"), np.array(log)
    observations = np.concatenate([seen[:, :3], rng.normal([110, 3, 0], [5, 2, 2], (200, 3))]).astype(np.float32)
    actions = policy(observations)
    assert seen[:, 3:] == pytest.approx(actions[: len(seen)], abs=1e-6) and np.ptp(actions, axis=0).min() > 1e-3
    for size in (1, 7):
        parts = np.split(observations[:98], range(size, 98, size))
        assert np.concatenate([policy(x) for x in parts]) == pytest.approx(actions[:98], abs=1e-6)
    assert policy(observations[5]) == pytest.approx(actions[5], abs=1e-6)
    paths = {name: str(tmp_path / f"{name}.npy") for name in ("observations", "to")}
    np.save(paths["observations"], observations)
    program(PROCESS.format(root=str(Path(__file__).parents[1]), policy=str(folder / "policy.pt"), **paths)).join()
    assert np.load(paths["to"]) == pytest.approx(actions, abs=1e-6), (tmp_path / "err").read_text()


@discrete
@pytest.mark.parametrize("epsilon", [0, 0.3, 1])
def test_share_of_random_actions_in_evaluation_and_their_seed(epsilon, script, tiny, monkeypatch):
    greedy, log, step = np.array([-2, 2]), [], Counter.step

    def logged(self, action):
        log.append(action)
        return step(self, action)

    monkeypatch.setattr(Counter, "step", logged)

    def evaluate(seed=0):
        log.clear()
        config = tiny(n_episodes=300, eval_epsilon=epsilon, eval_seed=seed)
        task, agent = script.Task(config, script.load_dataset(DATASET)), make_agent(script, config)
        task.data_return = 0.0
        agent.critic.action_low.copy_(torch.tensor([-2, 0]))
        torch.nn.init.zeros_(agent.critic.last.weight)
        agent.critic.last.bias.data = torch.eye(12)[2]  # (-2, 2) is greedy
        task.evaluate(agent, types.SimpleNamespace(rewards=[]))
        return np.array(log)

    actions = evaluate()
    assert np.array_equal(actions, evaluate()) and (epsilon == 0) == np.array_equal(
        actions, evaluate(5)[: len(actions)]
    )
    assert np.mean((actions == greedy).all(axis=1)) == pytest.approx(1 - epsilon * 11 / 12, abs=0.04)
    assert len(np.unique(actions, axis=0)) == (12 if epsilon else 1)


def test_environments_are_closed(script, tiny, monkeypatch):
    closed = []
    monkeypatch.setattr(Counter, "close", lambda self: closed.append(self))
    script.train(tiny(n_episodes=40))
    assert len(set(map(id, closed))) == 20  # two waves


# Files and stored policies


def test_files_hold_tensors_and_plain_values_only(script, run):
    folder = run()
    policy = torch.load(folder / "policy.pt", weights_only=True)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert policy.keys() == {"sizes", "weights", "encoding"} and checkpoint.keys() >= {
        "agent",
        "policy",
        "config",
        "rows",
    }
    assert [str(row["step"]) for row in checkpoint["rows"]] == [row["step"] for row in table(folder)]
    assert script.TrainConfig(**checkpoint["config"]) == script.TrainConfig(
        **yaml.safe_load((folder / "config.yaml").read_text())
    )
    observations = observations_of(script, script.load_dataset(DATASET))
    expected = script.load_policy(folder / "policy.pt")(observations)
    assert np.array_equal(script.load_policy(folder / "checkpoint.pt")(observations), expected)


@once
def test_the_policy_of_each_evaluation_is_kept_where_wanted(run, script):
    folder = run(keep_policies=True, policy_lr=1e-2, qf_lr=1e-2)
    assert contents(folder).keys() == files(script) | {f"policy-{step}.pt" for step in (10, 20, 25)}
    for step in (10, 20):
        alone = run(max_timesteps=step, run_id=f"{step}", policy_lr=1e-2, qf_lr=1e-2)
        assert equal(weights(folder, f"policy-{step}.pt"), weights(alone)) and not equal(
            weights(alone), weights(folder)
        )
    assert equal(weights(folder, "policy-25.pt"), weights(folder))


class Command:
    def __reduce__(self):
        return os.mkdir, ("harm",)


FOREIGN = {
    "nothing": None, "empty": b"", "text": b"policy", "plain pickle": pickle.dumps(Command()),
    "pickle": {"policy": Command()}, "step": {"step": 3}, "list": [1.0], "tensor": torch.zeros(2),
    "agent": {"agent": {}}, "number": {"policy": 1}, "corl": {"actor": {}, "critic1": {}, "total_it": 3},
}  # fmt: skip


@once
@pytest.mark.parametrize("kind", [*FOREIGN, "folder", "cut", "policy"])
def test_bad_checkpoint_is_one_line_and_runs_nothing(kind, script, tiny, trained_for, tmp_path, monkeypatch):
    """As --load_model, and in place of the checkpoint of a run that is resumed."""
    monkeypatch.chdir(tmp_path)
    path, good, broken = tmp_path / "checkpoint.pt", trained_for(10, "good"), trained_for(10, "broken")
    content = FOREIGN.get(kind)
    if isinstance(content, bytes) or kind in ("cut", "policy"):
        rest = {"cut": (good / "checkpoint.pt").read_bytes()[:-99], "policy": (good / "policy.pt").read_bytes()}
        path.write_bytes(rest[kind] if content is None else content)
    elif content is not None:
        torch.save(content, path)
    status, line = refusal(script.train, tiny(load_model=str(tmp_path if kind == "folder" else path)))
    assert status == 1 and str(tmp_path) in line and ("exist" in line if kind == "nothing" else "checkpoint.pt" in line)
    if path.exists():
        (broken / "checkpoint.pt").write_bytes(path.read_bytes())
        before = contents(broken)
        status, line = refusal(script.train, tiny(run_id="broken", max_timesteps=20))
        assert status == 1 and str(broken / "checkpoint.pt") in line and contents(broken) == before
        if kind != "policy":
            assert refusal(script.load_policy, path)[0] == 1
    assert not (tmp_path / "harm").exists() and not (tmp_path / "runs" / "run").exists()


@kinds
def test_policy_only_takes_finite_observations_of_its_size(script, run):
    policy = script.load_policy(run() / "policy.pt")
    nan, inf = [0, math.nan, 0], [[0, 0, 0], [0, math.inf, 0]]
    for wrong in (
        0,
        np.zeros(1),
        np.zeros((3, 2)),
        np.zeros(16),
        nan,
        inf,
        ["a", "b", "c"],
        "text",
        None,
        [[1], [1, 2]],
    ):
        with pytest.raises(ValueError, match="3"):
            policy(wrong)
    assert policy([1, 2, 3]).shape == (2,) and policy(np.zeros((5, 3), np.int64)).shape == (5, 2)


def test_load_model_starts_from_the_weights_and_statistics_of_a_checkpoint(run, new_dataset):
    other = new_dataset(record("Counter-v0", range(5)), env="Counter-v0")
    path = run() / "checkpoint.pt"
    still = {"policy_lr": 0, "qf_lr": 0, "soft_target_update_rate": 0, "max_timesteps": 12}
    folder = run(load_model=str(path), run_id="next", seed=1, env=other, **still)
    assert [row["step"] for row in table(folder)] == ["10", "12"]
    stored, loaded = weights(path.parent, path.name), weights(folder, "checkpoint.pt")
    kept = {name for name in stored if name.startswith(("/policy", "/agent/actor", "/agent/critic", "/agent/target"))}
    assert len(kept) >= 10 and equal(*({name: x[name] for name in kept} for x in (stored, loaded)))
    assert table(folder) == table(run(load_model=str(path), run_id="raw", seed=1, env=other, normalize=False, **still))
    goes_on = run(load_model=str(path), run_id="goes on")
    assert not equal(weights(goes_on), weights(path.parent)) and len(table(goes_on)) == 3


def test_load_model_takes_the_learning_rates_of_the_new_run(script, run):
    path = str(run() / "checkpoint.pt")
    base = weights(run(load_model=path, run_id="base", max_timesteps=3), "checkpoint.pt")
    for name in {"policy_lr", "qf_lr"} & option_names(script.__name__):
        other = weights(run(load_model=path, run_id=name, max_timesteps=3, **{name: 0.01}), "checkpoint.pt")
        assert not equal(base, other)


@discrete
def test_load_model_keeps_the_atoms_but_for_given_ends(run):
    path = run(run_id="old", head="c51", v_min=-3.0) / "checkpoint.pt"
    old = weights(path.parent)["/weights/atoms"]
    for options, ends in (({}, old[[0, -1]].tolist()), ({"v_min": -2.0, "v_max": 9.0}, [-2, 9])):
        atoms = weights(run(run_id=f"{len(options)}", head="c51", load_model=str(path), **options))["/weights/atoms"]
        assert atoms[[0, -1]].tolist() == ends


@kinds
def test_another_network_is_one_line_that_says_so(new_dataset, script, tiny, run, monkeypatch):
    path = str(run(max_timesteps=10) / "checkpoint.pt")
    changes = [{"hidden_dim": 8}]
    if "critic_layer_norm" in option_names(script.__name__):
        changes.append({"critic_layer_norm": True})
    if "head" in option_names(script.__name__):
        buffers = record("Counter-v0", range(6))
        for buffer in buffers:
            buffer.actions[:] = 0
        spaces = {"observation_space": Counter.observation_space, "action_space": gym.spaces.MultiDiscrete([3, 4])}
        changes += [{"head": "qr"}, {"env": new_dataset(buffers, **spaces)}, {"normalize_features": True}]
    for i, environment in enumerate(WORLDS[script.__name__].others):
        changes.append({"env": new_dataset(record(environment, [0]), f"toy/other-v{i}", env=environment)})
    for options in changes:
        status, line = refusal(script.train, tiny(load_model=path, run_id="next", **options))
        assert status == 1 and ("network" in line or "size" in line) and len(line) < 400, line
    interrupt(script, tiny(run_id="half"))
    network = script.Policy.__init__  # on resume, after an edit of the file
    monkeypatch.setattr(
        script.Policy, "__init__", lambda *x: (network(*x), setattr(x[0], "extra", torch.nn.Linear(2, 2)))[0]
    )
    status, line = refusal(script.train, tiny(run_id="half"))
    assert status == 1 and "half" in line and "network" in line and len(line) < 400


@constrained
def test_a_checkpoint_of_another_method_is_refused(script, tiny, run):
    """By the policy's sizes, or else by the other networks; another start of a run by its options."""
    paths = {x: run(**METHODS[x], run_id=x) / "checkpoint.pt" for x in ("TD3+BC", "BRAC-p", "BCQ")}
    for old, new in (("TD3+BC", "BCQ"), ("BCQ", "BEAR"), ("BRAC-p", "BEAR"), ("BRAC-p", "wasserstein")):
        config = tiny(load_model=str(paths[old]), run_id="next", **METHODS[new])
        status, line = refusal(script.train, config)
        assert status == 1 and str(paths[old]) in line and "network" in line and len(line) < 500
        assert not Path(config.checkpoints_path, "next").exists()
    status, line = refusal(script.train, tiny(run_id="TD3+BC", **METHODS["BCQ"]))
    assert status == 2 and "policy was deterministic, is perturbation" in line


@constrained
def test_metrics_of_a_loaded_policy_do_not_stand_beside_a_clone_that_learns_alone(run, capsys):
    """The line of such a row shows the clone's loss where nothing is played."""
    path = run(**METHODS["BRAC-p"], eval_env="none") / "checkpoint.pt"
    capsys.readouterr()
    first, *_ = table(run(**METHODS["BRAC-p"], eval_env="none", load_model=str(path), run_id="next"))
    assert first["behaviour_loss"] and not first["policy_loss"] and not first["divergence"]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("update 5:")]
    assert line.startswith(f"update 5: behaviour_loss {float(first['behaviour_loss']):.4g}, ")


@constrained
def test_metrics_are_means_of_every_update_though_the_policy_learns_in_some(run):
    """From an odd number of updates of the clone on; an update that a new set of metrics drops would be missing."""
    options = METHODS["BRAC-p"] | {"target_update_period": 2, "max_timesteps": 12}
    single, grouped = table(run(**options, eval_freq=1, run_id="one")), table(run(**options, eval_freq=12))
    assert [row["step"] for row in grouped] == ["5", "12"]
    for name in ("qf1_loss", "policy_loss"):
        assert float(grouped[1][name]) == pytest.approx(np.mean([float(x[name]) for x in single[5:]]), rel=1e-4)


@kinds
def test_sarsa_trains_with_held_out_episodes(script, run, capsys):
    row = table(run(target="sarsa", holdout_fraction=0.3))[-1]
    assert float(row["holdout_td_error"]) > 0
    out = capsys.readouterr().out
    clone = run(target="sarsa", bc_only=True, run_id="clone")  # it drops nothing
    assert "training transitions are dropped" in out and "are dropped" not in capsys.readouterr().out
    assert equal(weights(clone), weights(run(bc_only=True, run_id="plain")))


@once
def test_options_that_are_younger_than_a_run_have_their_defaults(script, run, tiny, tmp_path):
    interrupt(script, tiny(run_id="half"))
    path = tmp_path / "runs/half/checkpoint.pt"
    state = torch.load(path)
    state["config"].pop("keep_policies"), state["config"].pop("discount")
    torch.save(state, path)
    status, line = refusal(script.train, tiny(run_id="half", discount=0.5))
    assert status == 2 and "discount was 0.99, is 0.5" in line
    run(run_id="half")


# Kill and resume. train_apart runs in a process that SIGKILL ends at a chosen call.


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory):
    """The options of a run, and the folder in which it ran to its end."""
    options = {"holdout_fraction": 0.2, "bc_steps": 12, "n_episodes": 18, "eval_freq": 7, "log_interval": 5}
    options |= {"head": "c51", "n_step": 2, "target": "sarsa", "target_update_period": 3, "eval_epsilon": 0.2}
    options = {name: value for name, value in options.items() if name in option_names(script.__name__)}
    path = tmp_path_factory.mktemp("runs")
    assert train_apart(tiny_config(script, path, **options)) == 0
    return options, path / "run"


def check_end(folder, expected):
    for name in ("policy.pt", "checkpoint.pt"):
        assert equal(weights(folder, name), weights(expected, name))
    assert table(folder) == table(expected)
    assert contents(folder).keys() == contents(expected).keys()


KILLS = [
    (None, [2 * 10**4, 4 * 10**4, 6 * 10**4]),  # anywhere: a whole run has some 10^5 calls
    ("replace", [4, 8]),
    ("fsync", [0, 1, 2, 3]),  # the temporary files of config.yaml and of the first row
    ("replace", [1, 2, 3]),
    ("replace", [11, 2]),  # the last row's
    ("replace", [12]),
    ("Counter.step", [100, 60]),
    ("ReplayBuffer.sample", [3, 9]),
]


@pytest.mark.parametrize(  # the same text writes the other scripts' folders
    ("script", "event", "places"),
    [
        (name, *kill)
        for name in SCRIPTS
        if "finetune" not in name
        for kill in KILLS[: None if "offline.cql" in name else 2]
    ],
    indirect=["script"],
)
def test_killed_run_goes_on_where_it_was_with_the_same_bits(event, places, script, tiny, uninterrupted):
    options, expected = uninterrupted
    config, codes, rng = tiny(**options), [], np.random.default_rng(0)
    folder = Path(config.checkpoints_path, "run")
    for place in places if event else rng.integers(places):
        codes.append(train_apart(config, event, int(place)))
        if (folder / "metrics.csv").exists():
            assert table(folder) == table(expected)[: len(table(folder))]
    assert {*codes} <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes
    assert train_apart(config) == 0
    check_end(folder, expected)


VARIANTS = {
    "algorithms.offline.combo": [
        {"dynamics_max_epochs": 14, "dynamics_lr": 3e-2, "rollout_freq": 3},
        {"cql_lagrange": True, "push_down_states": "model", "model_retain": 2, "rollout_freq": 7},
    ],
    "algorithms.offline.cql": [
        {"use_automatic_entropy_tuning": False, "cql_max_target_backup": True, "keep_policies": True},
        {"cql_lagrange": True, "target_update_period": 3, "normalize_reward": True, "cql_backprop_actions": 1},
        {"cql_alpha": 0, "normalize": False},
        {"bc_only": True, "holdout_fraction": 0.2},
        {"cql_variant": "var", "holdout_fraction": 0.2, "cql_lagrange": True, "cql_target_action_gap": 1.0},
        {"cql_variant": "rho", "holdout_fraction": 0.2, "cql_backprop_actions": 1},
        {"cql_density": "mixture", "holdout_fraction": 0.2},
    ],
    "algorithms.discrete.cql_dqn": [
        {"head": "qr", "normalize_features": True, "dr3_coefficient": 0.1, "max_grad_norm": 1.0},
        {"head": "c51", "target": "max", "normalize_reward": True, "reward_clip": 9.0},
        {"bc_only": True, "soft_target_update_rate": 1.0, "target_update_period": 3},
        {"cql_variant": "var", "head": "c51", "holdout_fraction": 0.2},
        {"cql_variant": "rho", "head": "qr", "holdout_fraction": 0.2},
    ],
    "algorithms.discrete.cql_atari": [
        {"head": "c51", "target": "sarsa", "n_step": 2, "frame_stack": 3, "frames_on_device": True},
        {"cql_variant": "var", "holdout_fraction": 0.2, "max_grad_norm": 1.0, "dr3_coefficient": 0.1},
    ],
}


@pytest.mark.parametrize(
    ("script", "options"), [(name, x) for name, variants in VARIANTS.items() for x in variants], indirect=["script"]
)
def test_every_variant_goes_on_where_it_was(options, run):
    run(max_timesteps=10, **options)
    folder, whole = run(max_timesteps=20, **options), run(max_timesteps=20, run_id="whole", **options)
    assert equal(weights(folder, "checkpoint.pt"), weights(whole, "checkpoint.pt")) and table(folder) == table(whole)


@pytest.mark.parametrize(
    ("method", "updates"),
    [("TD3+BC", 7), ("BRAC-p", 3), ("BRAC-p", 8), *((x, 8) for x in ("BRAC-v", "BEAR", "BCQ", "wasserstein"))],
)
@constrained
def test_every_method_goes_on_where_it_was(method, updates, script, tiny, run):
    """TD3+BC trains its policy every other update; BRAC-p stops while its clone learns alone, and later."""
    options = METHODS[method] | {"max_timesteps": 12, "eval_freq": 6, "log_interval": 5, "holdout_fraction": 0.2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_call(patch, script.ReplayBuffer, "sample", updates, lambda: setattr(script.Signals, "received", 15))
        script.train(tiny(**options))
    script.Signals.received = 0
    folder, whole = Path(tiny().checkpoints_path, "run"), run(**options, run_id="whole")
    assert torch.load(folder / "checkpoint.pt")["agent"]["_extra_state"]["n_updates"] == updates
    script.train(tiny(**options))
    check_end(folder, whole)


STOPS = [
    ("sample", 13, 13, 1),
    ("step", 60, 20, 2),  # in an evaluation, which is finished
    ("sample", 1, 1, 0),
    ("sample", 10, 10, 0),  # at a row, which is left to the next start
    ("sample", 25, 25, 2),  # after the last update
    ("step", 2, 10, 1),
    ("step", 100, 25, 3),  # in the last evaluation: the run is complete
]


@pytest.mark.parametrize(
    ("script", "name", "n", "updates", "rows"),
    [(name, *stop) for name in SCRIPTS for stop in STOPS[: None if "offline.cql" in name else 2]],
    indirect=["script"],
)
def test_signal_saves_between_updates_and_ends_the_run(name, n, updates, rows, script, tiny, finished):
    expected = finished(n_episodes=7)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        at_call(
            patch,
            script.ReplayBuffer if name == "sample" else Counter,
            name,
            n,
            lambda: setattr(script.Signals, "received", 15),
        )
        end = stack.enter_context(pytest.raises(SystemExit)) if rows < 3 else None
        script.train(tiny(n_episodes=7))
    script.Signals.received = 0
    folder = Path(tiny().checkpoints_path, "run")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (end is None or end.value.code == 143) and len(state["rows"]) == rows
    assert state["agent"]["_extra_state"]["n_updates"] == updates
    assert not rows or table(folder) == table(expected)[:rows]
    script.train(tiny(n_episodes=7))
    check_end(folder, expected)


# Signals of a scheduler, to programs.

PROGRAM = """
import os, signal, subprocess, sys, time
sys.path += {paths!r}
import conftest, pytest
from test_runs import at_call
from {package} import {module} as script

patch = pytest.MonkeyPatch()
{plan}
script.main(script.TrainConfig, script.train)
"""


@pytest.fixture
def start(script, program):
    """Starts the script as a program, after the lines of a plan."""

    def start(plan, **options):
        package, module = script.__name__.rsplit(".", 1)
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        text = PROGRAM.format(paths=paths, package=package, module=module, plan=plan)
        return program(text, *tiny_arguments(script, eval_env="none", **options))

    return start


@pytest.mark.parametrize("number", SIGNALS)
@once
def test_program_saves_at_a_signal_and_exits_with_128_and_its_number(number, start, run, tmp_path):
    plan = f"at_call(patch, script.ReplayBuffer, 'sample', 5, lambda: os.kill(os.getpid(), {int(number)}))"
    folder = tmp_path / "runs/0042"
    process = start(plan, max_timesteps=20, run_id="0042", checkpoints_path=folder.parent)
    process.join()
    assert process.exitcode == 128 + number and str(folder) in (tmp_path / "out").read_text().splitlines()[-1]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["agent"]["_extra_state"]["n_updates"] == 5
    options = {"max_timesteps": 20, "eval_env": "none"}
    check_end(run(run_id="0042", **options), run(run_id="whole", **options))


@once
def test_process_group_that_is_signalled_while_it_compiles_ends(start):
    """Torch would wait for answers of processes that the signal ended, and lose an exception."""
    plan = """
def compile(*_, **__):
    while True:
        try:
            os.killpg(0, signal.SIGTERM)
            time.sleep(1000)
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

script.torch.compile = compile
"""
    process = start(plan, compile=True)
    process.join(600)  # it would sleep for longer
    assert process.exitcode == 143


@once
def test_lines_reach_a_log_at_once_and_a_closed_output_is_no_error(script, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["program", "--device=cpu"])
    log, seen = io.TextIOWrapper(io.BytesIO()), []
    for output in (log, None):
        monkeypatch.setattr(sys, "stdout", output)
        script.main(script.TrainConfig, lambda config: (print("a line"), seen.append(log.buffer.getvalue())))
    assert seen == [b"a line\n", b"a line\n"]


@once
def test_run_folder_belongs_to_one_process_until_that_is_killed(start, script, tiny, run, tmp_path):
    """Whatever children it leaves."""
    plan = """
def stay():
    children = [subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, close_fds=False).pid, os.fork()]
    if children[-1]:
        print(*children, flush=True)
    time.sleep(1000)

at_call(patch, script.ReplayBuffer, "sample", 15, stay)
"""
    options = {"eval_env": "none"}
    process, children = start(plan, checkpoints_path=tmp_path / "runs"), None
    while not children:
        assert process.is_alive()
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):
            children = re.search(r"^(\d+) (\d+)$", (tmp_path / "out").read_text(), re.MULTILINE)
    before = contents(tmp_path / "runs")
    status, line = refusal(script.train, tiny(**options))
    assert status == 1 and "another process" in line and str(tmp_path / "runs/run") in line
    assert contents(tmp_path / "runs") == before
    process.kill()
    process.join()
    folder = run(**options)
    for child in map(int, children.groups()):
        os.kill(child, signal.SIGKILL)  # it lived
    check_end(folder, run(run_id="whole", **options))


@pytest.mark.parametrize("waits", [True, False])
@once
def test_second_signal_and_one_before_training_end_the_program_at_once(waits, script, monkeypatch, signals):
    def leave(code):
        raise SystemExit(code)

    def stuck(config):
        script.Signals.wait = waits
        for n in (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert waits and script.Signals.received == signal.SIGTERM and n == 1

    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        script.main(script.TrainConfig, stuck)
    assert end.value.code == 143


@pytest.mark.parametrize(("seconds", "expected"), [(0, [4, 8, 9]), (10, [2, 9])])
@once
def test_checkpoint_at_a_record_where_the_last_is_old_and_writing_takes_little(
    seconds, expected, script, tiny, monkeypatch
):
    """The clock moves by 25 s in an update, and by a while in writing a file, such as config.yaml at the start."""
    saved, save = [], script.save
    _, takes = slow_clock(monkeypatch, script)
    takes(script.ReplayBuffer, "sample", 25.0)
    takes(script.os, "fsync", seconds)

    def watched(path, content):
        if path.name == "checkpoint.pt":
            saved.append(content["agent"]["_extra_state"]["n_updates"])
        return save(path, content)

    monkeypatch.setattr(script, "save", watched)
    script.train(tiny(log_interval=2, eval_freq=1000, max_timesteps=9))
    assert saved == expected


def test_run_goes_on_from_a_checkpoint_at_a_record(script, tiny, run):
    def crash():
        raise InterruptedError

    whole = run(log_interval=3, run_id="whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        _, takes = slow_clock(patch, script)
        takes(script.ReplayBuffer, "sample", 100.0)
        at_call(patch, script.Run, "add", 17, crash)
        script.train(tiny(log_interval=3))
    state = torch.load(whole.with_name("run") / "checkpoint.pt", weights_only=True)
    assert state["agent"]["_extra_state"]["n_updates"] == 15 and len(state["rows"]) == 1
    check_end(run(log_interval=3), whole)


@once
def test_runs_outside_the_main_thread(run):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # where Python handles no signals
        assert len(table(pool.submit(run).result())) == 3


def test_finished_run_ends_at_once(script, run, monkeypatch, capsys):
    folder = run()
    before = contents(folder)
    monkeypatch.setattr(script, "load_dataset", lambda name: pytest.fail("data were loaded"))
    assert run() == folder and {name: x for name, (x, _) in contents(folder).items()} == {
        name: x for name, (x, _) in before.items()
    }
    assert str(folder) in capsys.readouterr().out


@once
@pytest.mark.parametrize("content", [None, b"", b"step,eval_return\nten,\xff\n", b"1," * 999])
def test_no_other_file_than_the_checkpoint_matters_to_a_resume(content, run, finished, trained_for):
    whole, folder = finished(), trained_for(10)
    for name in FILES - {"checkpoint.pt"}:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    run()
    check_end(folder, whole)
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_timesteps"] == 25


@kinds
def test_resume_with_other_options_lists_them_and_changes_nothing(script, tiny, run):
    folder = run()
    before = contents(folder)
    status, line = refusal(script.train, tiny(seed=7, max_timesteps=24, cql_alpha=2.5, eval_env="Plain-v0"))
    assert status == 2 and contents(folder) == before
    for words in ("seed was 0, is 7", "max_timesteps was 25, is 24", "cql_alpha was ", ", is 2.5", "eval_env was None"):
        assert words in line
    assert "hidden_dim" not in line
    free = {"n_episodes", "device", "project", "group", "name", "run_id", "checkpoints_path", "keep_policies"}
    for name in vars(tiny()).keys() - free:
        config = tiny()
        setattr(config, name, 3 if vars(config)[name] != 3 else 4)
        if name != "max_timesteps":
            status, line = refusal(script.train, config)
            assert status == 2 and f"{name} was" in line and contents(folder) == before


@offline
def test_max_timesteps_may_grow_and_names_may_differ(run, tmp_path):
    whole = run(max_timesteps=30, run_id="whole")
    before = (run(max_timesteps=20) / "metrics.csv").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "moved")
    folder, whole = tmp_path / "moved/run", tmp_path / "moved/whole"
    free = {"name": "n", "project": "p", "group": "g", "n_episodes": 3, "keep_policies": True}
    run(max_timesteps=30, checkpoints_path=str(tmp_path / "moved"), **free)
    assert (folder / "metrics.csv").read_bytes().startswith(before)
    names = [key for key in table(folder)[0] if not key.startswith("eval")]
    assert [[row[key] for key in names] for row in table(folder)] == [
        [row[key] for key in names] for row in table(whole)
    ]
    assert equal(weights(folder), weights(whole))
    assert float(table(folder)[-1]["eval_length"]) == 4 != float(table(whole)[-1]["eval_length"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_timesteps"] == 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_device_may_differ(devices, run):
    run(device=devices[0], max_timesteps=10)
    assert len(table(run(device=devices[1]))) == 3


@once
def test_run_id_of_an_agent(script, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "3e5")
    script.train(tiny(run_id=None, max_timesteps=10))
    script.train(tiny(run_id=None))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["3e5"]
    assert [row["step"] for row in table(tmp_path / "runs/3e5")] == ["10", "20", "25"]
    script.train(tiny(run_id="mine", max_timesteps=1))
    assert (tmp_path / "runs/mine").exists()


# Full disks


def check_full_disk(script, tiny, folder, full):
    """Training fails in one line while `full` lasts, leaves every file whole, and later continues."""
    before = {name: content for name, (content, _) in contents(folder).items()}
    with full:
        status, line = refusal(script.train, tiny(max_timesteps=30, checkpoints_path=str(folder.parent)))
    assert status == 1 and str(folder) in line and "No space left on device" in line
    after = {name: content for name, (content, _) in contents(folder).items()}
    assert {name for name in after if not name.endswith(".tmp")} == before.keys() and after["metrics.csv"].startswith(
        before["metrics.csv"]
    )
    assert torch.load(folder / "checkpoint.pt", weights_only=True) and script.load_policy(folder / "policy.pt")
    script.train(tiny(max_timesteps=30, checkpoints_path=str(folder.parent)))


@pytest.mark.parametrize("place", ["open", "fsync", "replace"])
@pytest.mark.parametrize("n", range(4))  # config.yaml, and the three files of the row
@once
def test_failing_write_leaves_whole_files(place, n, script, tiny, finished, trained_for):
    whole, folder, calls = finished(max_timesteps=30), trained_for(20), []

    def failing(function):
        def call(*arguments):
            if place != "open" or str(arguments[0]).endswith(".tmp"):
                calls.append(1)
                if len(calls) == n + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return call

    patch = pytest.MonkeyPatch()
    owner = script if place == "open" else script.os
    patch.setattr(owner, place, failing(getattr(owner, place, open)), raising=False)
    check_full_disk(script, tiny, folder, contextlib.closing(types.SimpleNamespace(close=patch.undo)))
    assert len(calls) == n + 1
    check_end(folder, whole)


@once
def test_folder_that_cannot_be_made_is_one_line(script, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    status, line = refusal(script.train, tiny(checkpoints_path=str(tmp_path / "file" / "runs")))
    assert status == 1 and str(tmp_path / "file") in line
    refusal(script.train, tiny(run_id=300 * "x"))


# Divergence, and environments that fail


@pytest.fixture
def diverge(script, monkeypatch):
    """Makes updates report this value of a metric from the given update on."""

    def diverge(metric, value, first):
        agent = getattr(script, WORLDS[script.__name__].agent)
        update = agent.update

        def changed(self, batch):
            metrics = update(self, batch)
            return metrics | {metric: torch.tensor(value)} if self.n_updates >= first else metrics

        monkeypatch.setattr(agent, "update", changed)

    return diverge


FAULTS = [("critic_grad_norm", math.nan, 2), ("critic_grad_norm", -math.inf, 1000), ("average_target_q", -1e7, 2)]


@pytest.mark.parametrize(  # each file's `train` asks; the answers are those of the same text
    ("script", "metric", "value", "log_interval"),
    [(x, *fault) for x in SCRIPTS if "finetune" not in x for fault in FAULTS[: None if "offline.cql" in x else 1]],
    indirect=["script"],
)
def test_diverging_run_stops_and_keeps_what_was_good(metric, value, log_interval, script, tiny, trained_for, diverge):
    options = {"log_interval": log_interval}
    good = contents(trained_for(20, **options))
    diverge(metric, value, 23)
    status, line = refusal(script.train, tiny(**options, max_timesteps=30))
    step = 24 if log_interval == 2 else 30
    assert status == 1 and f"{metric} is " in line and f"at update {step}" in line and "learning rates" in line
    weight = "cql_alpha" if "cql_alpha" in option_names(script.__name__) else "divergence_weight"
    assert line.endswith(f"or a larger {weight}")
    now = contents(tiny(**options).checkpoints_path + "/run")
    for files in (now, good):  # a resume writes the configuration again, and a model with the same content
        files["config.yaml"] = None
        if "dynamics.pt" in files:
            files["dynamics.pt"] = files["dynamics.pt"][0]
    assert now == good


def test_signal_saves_no_checkpoint_of_a_run_that_diverged(script, tiny, diverge, monkeypatch, capsys, tmp_path):
    diverge("critic_grad_norm", math.nan, 12)
    at_call(monkeypatch, script.ReplayBuffer, "sample", 15, lambda: setattr(script.Signals, "received", 15))
    assert "at update 15" in refusal(script.train, tiny())[1]
    assert "saved in" not in capsys.readouterr().out
    saved = script.load(tmp_path / "runs/run/checkpoint.pt", "cpu", "agent")["agent"]
    assert saved["_extra_state"]["n_updates"] == 10


def test_row_of_absurd_predictions_is_not_written(script, tiny, tmp_path, monkeypatch):
    agent = getattr(script, WORLDS[script.__name__].agent)
    monkeypatch.setattr(agent, "start_values", lambda self, observations: np.full(len(observations), np.inf))
    assert "eval_predicted_value is inf at update 10" in refusal(script.train, tiny())[1]
    assert not (tmp_path / "runs/run/metrics.csv").exists()


@once
def test_weights_that_are_no_numbers_end_a_run_before_any_metric_shows_them(script, tiny, monkeypatch, tmp_path):
    update = script.CQL.update

    def changed(self, batch):
        metrics = update(self, batch)
        self.actor.log_std_offset.data.fill_(math.nan)  # which the deterministic policy does not use
        return metrics

    monkeypatch.setattr(script.CQL, "update", changed)
    assert "the norm of all weights is nan" in refusal(script.train, tiny(max_timesteps=1))[1]
    assert not (tmp_path / "runs/run/checkpoint.pt").exists()


@kinds
@pytest.mark.parametrize("options", [{"qf_lr": 1e4}, {"qf_lr": 1e11, "policy_lr": 1e11}])
def test_rates_that_are_far_too_large_end_a_run(options, script, tiny, tmp_path):
    status, line = refusal(script.train, tiny(**options, log_interval=5, max_timesteps=200))
    assert status == 1 and "diverged" in line
    assert "diverged" in refusal(script.train, tiny(qf_lr=1e12, max_timesteps=1, run_id="last"))[1]
    assert not (tmp_path / "runs" / "last" / "metrics.csv").exists()


@pytest.mark.parametrize("place", ["step", "reset", "reward", "observation"])
@once
def test_environment_that_fails_costs_an_evaluation(place, run, finished, monkeypatch, capsys):
    expected = finished()
    name, calls = {"reset": "reset", "observation": "observe"}.get(place, "step"), itertools.count(1)
    original, resets = getattr(Counter, name), []

    def fail(self, *arguments, **options):
        if name != "step" or self.number == 0:
            n = next(calls) if name != "observe" or self.number == 0 and self.t == 1 else 0
        else:
            n = 0
        resets.append(n)
        if n != {"reset": 6, "observe": 2}.get(name, 5):  # in the second evaluation
            return original(self, *arguments, **options)
        if place == "observation":
            return original(self) + np.float32(math.nan)
        if place == "reward":
            return (*original(self, *arguments)[:1], math.nan, False, False, {})
        raise RuntimeError("the simulator\nexploded")

    monkeypatch.setattr(Counter, name, fail)
    capsys.readouterr()
    folder = run()
    err = capsys.readouterr().err
    rows, whole = table(folder), table(expected)
    assert [row["step"] for row in rows] == ["10", "20", "25"] and (rows[0], rows[2]) == (whole[0], whole[2])
    assert {key for key in rows[1] if rows[1][key] != whole[1][key]} == {
        key for key in whole[1] if key.startswith("eval") and whole[1][key]
    }
    assert all(rows[1][key] == "" for key in rows[1] if key.startswith("eval"))
    assert equal(weights(folder, "checkpoint.pt"), weights(expected, "checkpoint.pt"))
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "update 20" in warnings[0]
    assert err.count("\n") == 1 or place in ("step", "reset")


@pytest.mark.parametrize("known", [True, False])
@once
def test_freed_memory_is_kept_where_the_c_library_can(known, script, run, monkeypatch):
    asked = []
    library = types.SimpleNamespace(**({"mallopt": lambda *arguments: asked.append(arguments)} if known else {}))
    monkeypatch.setattr(script.ctypes, "CDLL", lambda name: library)
    run()
    assert set(asked) == ({(-3, 2**25), (-1, 2**31 - 1)} if known else set())


# Learning


@continuous
def test_learns_to_balance_far_longer_than_the_controller_that_recorded_the_data(
    script, tiny, new_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    rng = np.random.default_rng(0)

    def noisy(_, observation):
        action = observation @ [1, 10, 1, 1.5] + 2 * rng.standard_normal(1)
        return np.clip(action, -3, 3).astype(np.float32)

    episodes = record("InvertedPendulum-v5", range(60), noisy)
    name = new_dataset(episodes, env="InvertedPendulum-v5")
    options = {"hidden_dim": 32, "q_n_hidden_layers": 2, "batch_size": 128, "policy_lr": 3e-3, "qf_lr": 3e-3}
    row = script.train(tiny(env=name, eval_seed=1000, max_timesteps=300, eval_freq=300, cql_alpha=5, **options))
    behaviour = np.mean([len(episode.rewards) for episode in episodes])
    assert behaviour < 40 and row["eval_return"] > 80
    assert row["eval_predicted_value"] < row["eval_discounted_return"]  # conservative


@pytest.mark.parametrize("message", ["no compiler found\nand more", ""])
@once
def test_run_goes_on_where_updates_cannot_be_compiled(message, run, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError(message)

    expected = table(run(run_id="eager", compile=False))
    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    assert table(run(run_id="fallback", compile=True)) == expected
    (line,) = {*capsys.readouterr().err.strip().splitlines()}
    assert line.startswith("warning: ") and "--compile False" in line and message[:8] in line
