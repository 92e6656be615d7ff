"""Evaluation and the run folder: rows, files, kill and resume, signals, stored policies, full disks, W&B."""

import concurrent.futures
import contextlib
import errno
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
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
    WORLDS,
    Counter,
    contents,
    continuous,
    discrete,
    equal,
    make_agent,
    option_names,
    record,
    refusal,
    table,
    tiny_arguments,
    tiny_config,
    train_apart,
    weights,
)

# Names and rows


def test_run_folders_are_new_and_named_after_run_and_data(script, tiny, tmp_path):
    for _ in range(2):
        script.train(tiny(run_id=None, name="a/b"))
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"a-b-toy-counter-v0-[0-9a-f]{8}", folder.name)
        assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.csv", "checkpoint.pt", "policy.pt"}


def test_run_without_id_never_continues_an_existing_folder(script, tiny, monkeypatch, tmp_path):
    numbers, urandom = iter([1, 1, 2, 3, 3]), os.urandom
    monkeypatch.setattr(script.os, "urandom", lambda n: bytes(4 * [next(numbers)]) if n == 4 else urandom(n))
    for seed in range(3):
        script.train(tiny(run_id=None, seed=seed))
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_configuration_is_stored_whole(script, tiny, run):
    options = {"reward_bias": -2.5e-7, "name": "no", "group": "1e3", "project": "null: ü", "seed": 12}
    config = tiny(**options)
    content = yaml.safe_load((run(**options) / "config.yaml").read_text())
    assert script.TrainConfig(**content) == config and content.keys() == vars(config).keys()


@pytest.mark.parametrize(("freq", "steps"), [(10, [10, 20, 25]), (25, [25]), (5, [5, 10, 15, 20, 25]), (100, [25])])
def test_rows(freq, steps, run):
    folder = run(eval_freq=freq)
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[:5] == ["step", "eval_return", "eval_return_std", "d4rl_normalized_score", "updates_per_second"]
    assert [row["step"] for row in table(folder)] == [str(step) for step in steps]
    assert len(set(header)) == len(header)


def test_progress_is_a_line_an_evaluation_and_the_last_names_score_and_folder(script, tiny, tmp_path, capsys):
    row = script.train(tiny(eval_env="Hopper-Toy-v0"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("update ")] == [
        "update 10",
        "update 20",
        "update 25",
    ]
    assert f"score {row['d4rl_normalized_score']:.1f}" in lines[-1] and str(tmp_path / "runs" / "run") in lines[-1]
    stored = {name: float(value) if value else None for name, value in table(tmp_path / "runs/run")[-1].items()}
    assert {name: value for name, value in row.items() if name != "updates_per_second"} == stored


def test_training_metrics_are_means_since_the_last_row(run):
    single, grouped = table(run(eval_freq=1, run_id="single")), table(run(eval_freq=10, run_id="grouped"))
    names = [name for name in single[0] if not name.startswith(("step", "eval", "d4rl", "feature"))]
    assert len(names) >= 10
    for row, updates in zip(grouped, (single[:10], single[10:20], single[20:])):
        for name in names:
            assert float(row[name]) == pytest.approx(np.mean([float(x[name]) for x in updates]), rel=1e-5, abs=1e-7)


def test_same_seed_same_run_other_seed_another(run):
    first, again, other = (run(seed=seed, run_id=name) for seed, name in ((3, "a"), (3, "b"), (4, "c")))
    assert table(first) == table(again) != table(other)
    assert equal(weights(first, "checkpoint.pt"), weights(again, "checkpoint.pt"))


def test_training_moves_every_parameter_and_metrics_are_finite(script, tiny, run):
    options = {"bc_steps": 5, "cql_lagrange": True, "holdout_fraction": 0.2}
    config = tiny(**options)
    torch.manual_seed(config.seed)
    before = {f"/agent/networks/{name}": x.clone() for name, x in make_agent(script, config).state_dict().items()}
    folder = run(**options)
    after, scaling = weights(folder, "checkpoint.pt"), ("atoms", "observation_mean", "observation_std", "_low", "_high")
    before = {name: value for name, value in before.items() if not name.endswith(scaling)}
    assert len(before) >= 8
    for name, value in before.items():
        assert after[name].isfinite().all() and not torch.equal(after[name], value), name
    for row in table(folder):
        assert all(math.isfinite(float(value)) for name, value in row.items() if name != "d4rl_normalized_score")


# Evaluation


def outcome(seed, discount, factor=1.0, bias=0.0):
    """Return, length, success and discounted return of Counter's episode, by hand."""
    rewards = np.array([seed + t for t in range(1, Counter.length(seed) + 1)])
    discounted = sum(discount**t * (factor * reward + bias) for t, reward in enumerate(rewards))
    return rewards.sum(), len(rewards), seed % 3 == 0, discounted


@pytest.mark.parametrize(("n_episodes", "eval_seed"), [(1, 0), (16, 5), (35, 100)])
@pytest.mark.parametrize("normalize_reward", [False, True])
def test_evaluation_is_over_one_episode_from_each_seed(n_episodes, eval_seed, normalize_reward, run):
    options = {"n_episodes": n_episodes, "eval_seed": eval_seed, "normalize_reward": normalize_reward}
    row = table(run(**options, discount=0.8, reward_scale=0.5, reward_bias=0.25, max_timesteps=2))[-1]
    change = (0.5, 0.25) if normalize_reward else (1, 0)
    episodes = np.array([outcome(eval_seed + i, 0.8, *change) for i in range(n_episodes)])
    expected = dict(zip(("eval_return", "eval_length", "eval_success", "eval_discounted_return"), episodes.mean(0)))
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    assert float(row["eval_return_std"]) == pytest.approx(episodes[:, 0].std())


def test_success_is_empty_where_the_environment_reports_none(run):
    assert table(run(eval_env="Plain-v0"))[-1]["eval_success"] == ""


@pytest.mark.parametrize("key", ["success", "is_success", "goal_achieved"])
def test_names_of_success(key, run, monkeypatch):
    step = Counter.step
    monkeypatch.setattr(Counter, "step", lambda *x: (*(y := step(*x))[:4], {key: y[4]["success"]}))
    assert float(table(run(n_episodes=6))[-1]["eval_success"]) == pytest.approx(2 / 6)


def test_predicted_value_is_of_the_start_states(script, run, monkeypatch):
    agent = getattr(script, WORLDS[script.__name__].agent)
    monkeypatch.setattr(agent, "start_values", lambda self, observations: observations @ np.array([1, 100, 100]))
    row = table(run(n_episodes=20, eval_seed=7))[-1]
    assert float(row["eval_predicted_value"]) == pytest.approx(np.mean(range(7, 27)))  # at t = 0, in raw units


@continuous
def test_start_values_are_the_smaller_critics_for_the_deterministic_action(script, tiny, run):
    config, folder = tiny(), run(policy_lr=1e-2)
    agent = make_agent(script, config)
    agent.restore(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    torch.manual_seed(0)
    for parameter in agent.critic.parameters():  # so that each critic is the smaller one somewhere
        torch.nn.init.normal_(parameter)
    observations = script.load_dataset(DATASET)["observations"][:20]
    low, high = Counter.action_space.low, Counter.action_space.high
    actions = torch.tensor(2 * (script.load_policy(folder / "policy.pt")(observations) - low) / (high - low) - 1)
    stored = weights(folder)
    scaled = (torch.tensor(observations) - stored["/weights/observation_mean"]) / stored["/weights/observation_std"]
    with torch.no_grad():
        q = agent.critic(scaled, actions.unsqueeze(1))[..., 0]
    values = agent.start_values(observations)
    assert values == pytest.approx(q.min(dim=0).values.numpy(), abs=1e-3)
    assert (q[0] < q[1]).unique().tolist() == [False, True] and np.ptp(values) > 0.01


@discrete
def test_start_values_are_those_of_the_action_that_is_taken(script, tiny, run):
    config, folder = tiny(), run(qf_lr=1e-2)
    agent = make_agent(script, config)
    agent.restore(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    observations = script.load_dataset(DATASET)["observations"][:20]
    stored = weights(folder)
    scaled = (torch.tensor(observations) - stored["/weights/observation_mean"]) / stored["/weights/observation_std"]
    actions = script.load_policy(folder / "policy.pt")(observations) - Counter.action_space.start
    with torch.no_grad():
        q = agent.critic(scaled)[..., 0].numpy()
    values = q[range(20), np.ravel_multi_index(actions.T, Counter.action_space.nvec)]
    assert agent.start_values(observations) == pytest.approx(values, abs=1e-4) and np.ptp(values) > 0.01
    assert np.array_equal(values, q.max(axis=1))


def test_policy_acts_on_raw_observations_in_the_units_of_the_environment(script, run, monkeypatch):
    """The evaluation's actions are those of load_policy, one episode after the other."""
    step, log = Counter.step, []

    def logged(self, action):
        log.append((self.number, self.t, *action))
        return step(self, action)

    monkeypatch.setattr(Counter, "step", logged)
    folder = run(n_episodes=20, max_timesteps=10, policy_lr=1e-2, qf_lr=1e-2)
    policy = script.load_policy(folder / "policy.pt")
    env, expected = gym.make("Counter-v0"), []
    for seed in range(20):
        observation, done = env.reset(seed=seed)[0], False
        while not done:
            action = policy(observation)
            expected.append((seed, env.unwrapped.t, *action))
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    evaluated = np.array(sorted(log[: len(expected)]))
    assert evaluated == pytest.approx(np.array(expected), abs=1e-4)
    assert np.ptp(evaluated[:, 2:]) > 0.01


@continuous
def test_actions_never_leave_the_box(script, tiny):
    """Fine's bound 0.1 is no float32: the nearest is above it."""
    env = gym.make("Fine-v0")
    row = script.evaluate(
        tiny(), script.Task([env]), lambda x: np.full((len(x), 2), np.float32(0.1)), lambda x: np.zeros(len(x))
    )
    assert row["eval_length"] == 3.5


@discrete
@pytest.mark.parametrize("epsilon", [0, 0.3, 1])
def test_share_of_random_actions_in_evaluation(epsilon, script, tiny):
    greedy, log = np.array([-2, 2]), []

    class Logged(Counter):
        def step(self, action):
            log.append(action)
            return super().step(action)

    def evaluate():
        log.clear()
        config = tiny(n_episodes=300, eval_epsilon=epsilon)
        script.rollout(config, script.Task([Logged(), Logged()]), lambda x: np.tile(greedy, (len(x), 1)))
        return np.array(log)

    actions = evaluate()
    assert np.array_equal(actions, evaluate())
    assert np.mean((actions == greedy).all(axis=1)) == pytest.approx(1 - epsilon * 11 / 12, abs=0.04)
    assert len(np.unique(actions, axis=0)) == (12 if epsilon else 1)


def test_environments_are_closed(script, tiny, monkeypatch):
    closed = []
    monkeypatch.setattr(Counter, "close", lambda self: closed.append(self))
    script.train(tiny(n_episodes=20))
    assert len(set(map(id, closed))) == 16


# Files


def test_files_hold_tensors_and_plain_values_only(script, run):
    folder = run()
    policy = torch.load(folder / "policy.pt", weights_only=True)
    assert torch.load(folder / "checkpoint.pt", weights_only=True).keys() >= {"agent", "policy"}
    assert policy.keys() == {"sizes", "weights"}
    expected = script.load_policy(folder / "policy.pt")(np.ones((4, 3)))
    assert np.array_equal(script.load_policy(folder / "checkpoint.pt")(np.ones((4, 3))), expected)


class Command:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("kind", ["nothing", "empty", "text", "cut", "pickle", "foreign", "plain pickle"])
def test_bad_checkpoint_is_one_line(kind, script, tiny, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    good = (run(run_id="good") / "checkpoint.pt").read_bytes()
    if kind in ("pickle", "foreign"):
        torch.save({"policy": Command()} if kind == "pickle" else {"step": 3}, path)
    elif kind != "nothing":
        plain = pickle.dumps(Command())
        path.write_bytes({"empty": b"", "text": b"policy", "cut": good[:-99], "plain pickle": plain}[kind])
    for steps in (25, 0):
        status, line = refusal(script.train, tiny(load_model=str(path), max_timesteps=steps))
        assert status == 1 and str(path) in line
    assert not (tmp_path / "harm").exists() and not (tmp_path / "runs" / "run").exists()
    if kind not in ("nothing", "foreign"):  # as the checkpoint of a run that is resumed
        folder = run(run_id="broken", max_timesteps=10)
        (folder / "checkpoint.pt").write_bytes(path.read_bytes())
        before = contents(folder)
        status, line = refusal(script.train, tiny(run_id="broken", max_timesteps=20))
        assert status == 1 and str(folder / "checkpoint.pt") in line and contents(folder) == before
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{}, [], [1.0], torch.zeros(2), {"agent": {}}, {"policy": 1}], ids=str)
def test_foreign_file_is_one_line(content, script, tiny, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    for steps in (25, 0):
        status, line = refusal(script.train, tiny(load_model=str(tmp_path / "file.pt"), max_timesteps=steps))
        assert status == 1 and "file.pt" in line


@pytest.mark.parametrize("content", ["", "- a", "{", "seed: 0\n"])
def test_bad_config_of_a_resumed_run_is_one_line(content, script, tiny, run):
    folder = run(max_timesteps=10)
    (folder / "config.yaml").write_text(content)
    before = contents(folder)
    refusal(script.train, tiny(max_timesteps=20))
    assert contents(folder) == before


# Kill and resume. train_apart runs in a process that SIGKILL ends at a chosen call.


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory):
    """The options of a run, and the folder in which it ran to its end."""
    options = {"holdout_fraction": 0.2, "bc_steps": 12, "n_episodes": 18, "eval_freq": 7}
    options |= {"head": "c51", "n_step": 2, "target": "sarsa", "target_update_period": 3, "eval_epsilon": 0.2}
    options = {name: value for name, value in options.items() if name in option_names(script.__name__)}
    path = tmp_path_factory.mktemp("runs")
    assert train_apart(tiny_config(script, path, **options)) == 0
    return options, path / "run"


def check_end(folder, expected):
    for name in ("policy.pt", "checkpoint.pt"):
        values, wanted = weights(folder, name), weights(expected, name)
        assert equal(values, wanted)
    assert table(folder) == table(expected)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.csv", "checkpoint.pt", "policy.pt"}


@pytest.mark.parametrize(
    ("event", "places"),
    [
        ("fsync", [0, 2, 3]),  # the temporary file of config.yaml, policy.pt, checkpoint.pt
        ("replace", [1, 2, 3, 4]),
        ("Counter.step", [90, 40]),  # 90 steps an evaluation
        ("ReplayBuffer.sample", [3, 9]),
        (None, [2 * 10**4, 4 * 10**4, 6 * 10**4]),  # anywhere: a whole run has some 10^5 calls
    ],
)
def test_killed_run_goes_on_where_it_was_with_the_same_bits(event, places, script, tiny, uninterrupted):
    options, expected = uninterrupted
    config, lines, codes, rng = tiny(**options), [], [], np.random.default_rng(0)
    folder = Path(config.checkpoints_path, "run")
    for place in places if event else rng.integers(places):
        codes.append(train_apart(config, event, int(place)))
        earlier = lines
        if (folder / "metrics.csv").exists():
            lines = (folder / "metrics.csv").read_text().splitlines()
            assert lines[: len(earlier)] == earlier and table(folder) == table(expected)[: len(lines) - 1]
    assert {*codes} <= {0, -signal.SIGKILL} and codes.count(-signal.SIGKILL) > 1
    assert train_apart(config) == 0
    assert (folder / "metrics.csv").read_text().splitlines()[: len(lines)] == lines
    check_end(folder, expected)


VARIANTS = {
    "algorithms.offline.cql": [
        {"use_automatic_entropy_tuning": False, "cql_max_target_backup": True},
        {"cql_lagrange": True, "target_update_period": 3, "normalize_reward": True},
        {"cql_alpha": 0, "normalize": False},
    ],
    "algorithms.discrete.cql_dqn": [
        {"head": "qr", "normalize_features": True, "dr3_coefficient": 0.1, "max_grad_norm": 1.0},
        {"head": "c51", "target": "max", "normalize_reward": True, "reward_clip": 9.0},
        {"bc_only": True, "soft_target_update_rate": 1.0, "target_update_period": 3},
    ],
}


@pytest.mark.parametrize(
    ("script", "options"), [(name, x) for name, variants in VARIANTS.items() for x in variants], indirect=["script"]
)
def test_every_variant_goes_on_where_it_was(options, run):
    run(max_timesteps=10, **options)
    check_end(run(max_timesteps=20, **options), run(max_timesteps=20, run_id="whole", **options))


def test_training_outside_the_main_thread(run):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # where Python handles no signals
        assert len(table(pool.submit(run).result())) == 3


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def signals(monkeypatch):
    """signals(owner, name, number, n) has this process receive a signal at the n-th call of a function."""

    def arrange(owner, name, number, n):
        function, calls = getattr(owner, name), []

        def signalling(*args, **options):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, signalling)

    def unhandled(number, _):
        pytest.fail(f"signal {number} would have killed the process")

    before = {number: signal.signal(number, unhandled) for number in SIGNALS}
    yield arrange
    restored = [signal.getsignal(number) is unhandled for number in SIGNALS]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert all(restored)


@pytest.mark.parametrize(
    ("number", "name", "n", "updates", "rows"),
    [
        (signal.SIGTERM, "sample", 1, 1, 0),
        (signal.SIGTERM, "sample", 10, 10, 0),  # at a row, which is left to the next start
        (signal.SIGTERM, "sample", 13, 13, 1),
        (signal.SIGUSR1, "sample", 13, 13, 1),
        (signal.SIGINT, "sample", 13, 13, 1),
        (signal.SIGTERM, "sample", 25, 25, 2),  # after the last update
        (signal.SIGTERM, "step", 2, 10, 0),  # in the first evaluation
        (signal.SIGUSR1, "step", 40, 20, 1),
        (signal.SIGTERM, "step", 70, 25, 2),
    ],
)
def test_signal_saves_and_ends_the_run(number, name, n, updates, rows, script, tiny, run, signals):
    expected = run(run_id="whole", n_episodes=7)
    signals(script.ReplayBuffer if name == "sample" else Counter, name, number, n)
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(n_episodes=7))
    folder = expected.with_name("run")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert stop.value.code == 128 + number and state["agent"]["n_updates"] == updates
    lines = (folder / "metrics.csv").read_bytes() if rows else b""
    assert (folder / "metrics.csv").exists() == (rows > 0) and lines.count(b"\n") == (rows and rows + 1)
    script.train(tiny(n_episodes=7))
    assert (folder / "metrics.csv").read_bytes().startswith(lines)
    check_end(folder, expected)


def n_rows(folder):
    return len(table(folder)) if (folder / "metrics.csv").exists() else 0


def test_program_ends_by_signal_and_goes_on(script, run, tmp_path):
    """As a scheduler does it, with an agent's run id; W&B records offline and does not disturb."""
    options = {"max_timesteps": 300, "eval_freq": 100, "eval_env": "none"}
    expected, folder = run(run_id="whole", **options), tmp_path / "runs" / "0042"
    arguments = [word for word in tiny_arguments(script, **options) if not word.startswith("--run_id")]
    process = subprocess.Popen(
        [sys.executable, script.__file__, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"WANDB_RUN_ID": "0042", "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    while process.poll() is None and not (folder / "metrics.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == 143 and "runs/0042" in out.splitlines()[-1]
    assert 1 <= len(table(folder)) < 3 and len(list((tmp_path / "wandb").glob("offline-run-*-0042"))) == 1
    run(run_id="0042", **options)
    check_end(folder, expected)


def test_finished_run_ends_at_once_and_touches_nothing(script, run, monkeypatch, capsys):
    folder = run()
    before = contents(folder)
    monkeypatch.setattr(script, "load_dataset", lambda name: pytest.fail("data were loaded"))
    monkeypatch.setattr(script, "make_environments", lambda config: pytest.fail("environments were made"))
    assert run() == folder and contents(folder) == before
    assert str(folder) in capsys.readouterr().out


def test_resume_with_other_options_lists_them_and_changes_nothing(script, tiny, run):
    folder = run()
    before = contents(folder)
    status, line = refusal(script.train, tiny(seed=7, max_timesteps=24, cql_alpha=2.5, eval_env="Plain-v0"))
    assert status == 2 and contents(folder) == before
    for words in ("seed was 0, is 7", "max_timesteps was 25, is 24", "cql_alpha was ", ", is 2.5", "eval_env was None"):
        assert words in line
    assert "hidden_dim" not in line
    free = {"n_episodes", "device", "project", "group", "name", "run_id", "checkpoints_path"}
    for name in vars(tiny()).keys() - free:
        config = tiny()
        setattr(config, name, 3 if vars(config)[name] != 3 else 4)
        status, line = refusal(script.train, config) if name != "max_timesteps" else (2, "max_timesteps was")
        assert status == 2 and f"{name} was" in line and contents(folder) == before


def test_max_timesteps_may_grow_and_names_may_differ(script, run, tmp_path):
    folder, whole = run(max_timesteps=20), run(max_timesteps=30, run_id="whole")
    before = (folder / "metrics.csv").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "moved")
    folder, whole = tmp_path / "moved/run", tmp_path / "moved/whole"
    run(max_timesteps=30, name="n", project="p", group="g", n_episodes=3, checkpoints_path=str(tmp_path / "moved"))
    assert (folder / "metrics.csv").read_bytes().startswith(before)
    check_equal = [key for key in table(folder)[0] if not key.startswith("eval")]
    assert [[row[key] for key in check_equal] for row in table(folder)] == [
        [row[key] for key in check_equal] for row in table(whole)
    ]
    assert equal(weights(folder), weights(whole))
    assert float(table(folder)[-1]["eval_length"]) == 4 != float(table(whole)[-1]["eval_length"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_timesteps"] == 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_device_may_differ(devices, run):
    run(device=devices[0], max_timesteps=10)
    assert len(table(run(device=devices[1]))) == 3


def test_run_id_of_an_agent(script, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "3e5")
    script.train(tiny(run_id=None, max_timesteps=10))
    script.train(tiny(run_id=None))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["3e5"]
    assert [row["step"] for row in table(tmp_path / "runs/3e5")] == ["10", "20", "25"]
    script.train(tiny(run_id="mine", max_timesteps=1))
    assert (tmp_path / "runs/mine").exists()


# Stored policies


def test_load_model_starts_from_the_weights_and_statistics_of_a_checkpoint(run, new_dataset):
    other = new_dataset(record("Counter-v0", range(5)), env="Counter-v0")
    path = run() / "checkpoint.pt"
    still = {"policy_lr": 0, "qf_lr": 0, "soft_target_update_rate": 0, "max_timesteps": 12}
    folder = run(load_model=str(path), run_id="next", seed=1, env=other, **still)
    assert [row["step"] for row in table(folder)] == ["10", "12"]
    stored, loaded = weights(path.parent, path.name), weights(folder, "checkpoint.pt")
    kept = {name for name in stored if name.startswith(("/policy", "/agent/networks"))}
    assert len(kept) >= 10 and equal(*({name: x[name] for name in kept} for x in (stored, loaded)))
    assert table(folder) == table(run(load_model=str(path), run_id="raw", seed=1, env=other, normalize=False, **still))
    assert not equal(weights(run(load_model=str(path), run_id="goes on")), weights(path.parent))
    assert equal(weights(run(load_model=str(path), run_id="goes on")), weights(folder.with_name("goes on")))


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


def test_load_model_of_another_size_is_one_line(new_dataset, script, tiny, run):
    path = str(run() / "checkpoint.pt")
    status, line = refusal(script.train, tiny(load_model=path, run_id="next", hidden_dim=8))
    assert status == 1 and path in line
    assert refusal(script.train, tiny(load_model=path.replace("checkpoint", "policy"), run_id="next"))[0] == 1
    for i, environment in enumerate(WORLDS[script.__name__].others):
        name = new_dataset(record(environment, [0]), f"toy/other-v{i}", env=environment)
        status, line = refusal(script.train, tiny(env=name, load_model=path, run_id="next"))
        assert status == 1 and path in line


@discrete
def test_load_model_of_another_network_with_the_same_shapes_is_one_line(script, tiny, run, new_dataset):
    path = str(run(head="c51") / "checkpoint.pt")
    turned = gym.spaces.MultiDiscrete([3, 4])
    buffers = record("Counter-v0", range(6))
    for episode in buffers:
        episode.actions[:] = 0
    name = new_dataset(buffers, observation_space=Counter.observation_space, action_space=turned)
    for options in ({"head": "qr"}, {"head": "c51", "env": name}, {"head": "c51", "normalize_features": True}):
        status, line = refusal(script.train, tiny(load_model=path, run_id="next", **options))
        assert status == 1 and path in line and "its network is" in line


@discrete
def test_stored_policy_with_other_actions_than_the_environment_is_one_line(script, tiny, tmp_path):
    path = tmp_path / "policy.pt"
    policy = script.QNetwork(4, [5], 4, 1, "dqn", 1)
    policy.last.bias.data[4] = 9.0
    torch.save({"sizes": list(policy.sizes), "weights": policy.state_dict()}, path)
    status, line = refusal(script.train, tiny(max_timesteps=0, load_model=str(path), eval_env="CartPole-v1"))
    assert status == 1 and "CartPole-v1" in line


@pytest.mark.parametrize("name", ["checkpoint.pt", "policy.pt"])
@pytest.mark.parametrize("eval_env", [None, "Paid-v0"])
def test_stored_policy_is_evaluated_without_training(name, eval_env, script, tiny, run, new_dataset, capsys):
    name_of_data = new_dataset(record("Paid-v0", range(9)), env="Paid-v0", ref_min_score=0, ref_max_score=10)
    options = {"n_episodes": 18, "normalize_reward": True, "eval_seed": 3, "eval_env": eval_env, "env": name_of_data}
    folder = run(**options)
    before = contents(folder)
    config = tiny(
        **options | {"run_id": "stored", "max_timesteps": 0, "load_model": str(folder / name), "hidden_dim": 256}
    )
    row, expected = script.train(config), table(folder)[-1]
    for key in ("eval_return", "eval_return_std", "eval_length", "eval_success", "d4rl_normalized_score"):
        assert row[key] == float(expected[key])
    assert contents(folder) == before
    assert [x["step"] for x in table(folder.with_name("stored"))] == ["0"]
    assert f"return {float(expected['eval_return']):.1f}" in capsys.readouterr().out.splitlines()[-1]


def test_policy_of_another_environment_is_one_line(script, tiny, run):
    path = str(run() / "policy.pt")
    world = WORLDS[script.__name__]
    for environment in (*world.others, world.foreign):
        config = tiny(max_timesteps=0, load_model=path, eval_env=environment, run_id="stored")
        status, line = refusal(script.train, config)
        assert status == 1 and environment in line
    assert refusal(script.train, tiny(max_timesteps=0, load_model=path, eval_env="none", run_id="stored"))[0] == 2


@pytest.mark.parametrize(
    ("script", "sizes", "environment"),
    [
        ("algorithms.offline.cql", (2, 1, 4, 1), "MountainCar-v0"),
        ("algorithms.discrete.cql_dqn", (2, [3], 4, 1, "dqn", 1), "MountainCarContinuous-v0"),
    ],
    indirect=["script"],
)
def test_policy_of_the_other_kind_of_actions_is_one_line_where_all_sizes_fit(
    sizes, environment, script, tiny, tmp_path
):
    path, policy = str(tmp_path / "policy.pt"), script.Policy(*sizes)
    torch.save({"sizes": list(sizes), "weights": policy.state_dict()}, path)
    config = tiny(max_timesteps=0, load_model=path, eval_env=environment, run_id="car")
    status, line = refusal(script.train, config)
    assert status == 1 and environment in line


def test_evaluation_of_a_stored_policy_is_not_repeated(script, tiny, run):
    config = tiny(max_timesteps=0, load_model=str(run(run_id="trained") / "policy.pt"))
    assert script.train(config) == script.train(config)
    assert len(table(Path(config.checkpoints_path, "run"))) == 1


# Full disks


def check_full_disk(script, tiny, folder, full):
    """Training fails in one line while `full` lasts, leaves every file as it was, and later goes on."""
    before = {name: content for name, (content, _) in contents(folder).items()}
    with full:
        status, line = refusal(script.train, tiny(max_timesteps=30, checkpoints_path=str(folder.parent)))
    assert status == 1 and str(folder) in line and "No space left on device" in line
    after = {name: content for name, (content, _) in contents(folder).items()}
    assert after.keys() == before.keys()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]["n_updates"] == 20
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["metrics.csv"].startswith(before["metrics.csv"])
    script.train(tiny(max_timesteps=30, checkpoints_path=str(folder.parent)))


@pytest.mark.parametrize("place", ["open", "fsync", "replace"])
@pytest.mark.parametrize("n", range(4))  # config.yaml, metrics.csv, policy.pt, checkpoint.pt
def test_failing_write_leaves_the_old_files(place, n, script, tiny, run):
    whole, folder, calls = run(max_timesteps=30, run_id="whole"), run(max_timesteps=20), []

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


@pytest.mark.parametrize("left", [0, 20])
def test_full_disk_leaves_the_old_files(left, script, tiny, run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        folder = run(max_timesteps=20, checkpoints_path=str(disk))

        @contextlib.contextmanager
        def full():
            with open(disk / "filler", "wb", buffering=0) as file:
                with contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                file.truncate(file.tell() - 1024 * left)
                yield
            (disk / "filler").unlink()

        check_full_disk(script, tiny, folder, full())
        assert table(folder) == table(run(max_timesteps=30, run_id="whole"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folder_that_cannot_be_made_is_one_line(script, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    status, line = refusal(script.train, tiny(checkpoints_path=str(tmp_path / "file" / "runs")))
    assert status == 1 and str(tmp_path / "file") in line
    for options in ({"run_id": 300 * "x"}, {"run_id": None, "name": 300 * "x"}):
        refusal(script.train, tiny(**options))


# Weights & Biases, replaced by a recorder


class Wandb:
    """Records what a script tells W&B; fails where `broken` says so."""

    Run, Settings = object, dict

    def __init__(self, step=0, broken=()):
        self.calls, self.rows, self.starting_step, self.broken, self.id = [], [], step, broken, "id"

    def __getattr__(self, name):
        def call(*args, **options):
            if name in self.broken and options.get("mode") != "disabled":
                raise RuntimeError("no network\ntoday")
            self.calls.append((name, options))
            if name == "log":
                self.rows.append((options["step"], args[0]))
            return self if name == "init" else True

        return call


@pytest.fixture
def recorder(script, monkeypatch):
    def replace(**options):
        monkeypatch.setattr(script, "wandb", recorder := Wandb(**options))
        return recorder

    monkeypatch.delenv("WANDB_MODE")
    return replace


def test_wandb_gets_names_configuration_and_metrics(recorder, script, tiny, run, monkeypatch):
    wandb = recorder()
    folder = run(log_interval=4, project="p", group="g")
    options = dict(wandb.calls)["init"]
    wanted = {"project": "p", "group": "g", "name": "run", "id": "run", "resume": "allow"}
    assert wanted.items() <= options.items() and options["config"] == vars(tiny(log_interval=4, project="p", group="g"))
    assert {"init_timeout", "finish_timeout"} <= options["settings"].keys()
    steps = [step for step, _ in wandb.rows]
    assert sorted({*steps}) == [4, 8, 10, 12, 16, 20, 24, 25] and steps == sorted(steps)
    logged = {step: {} for step in steps}
    for step, metrics in wandb.rows:
        logged[step] |= metrics
    for row in table(folder):
        assert logged[int(row["step"])]["eval_return"] == float(row["eval_return"])
    assert {name for metrics in logged.values() for name in metrics} == {
        name for name, value in table(folder)[0].items() if value and name != "step"
    } | {"updates_per_second"}
    single = table(run(eval_freq=1, run_id="single"))
    for end, start in ((8, 4), (16, 12)):
        name = "average_target_q"
        assert logged[end][name] == pytest.approx(np.mean([float(x[name]) for x in single[start:end]]))
    assert wandb.calls[-1] == ("finish", {"exit_code": 0})


@pytest.mark.parametrize("reason", ["login", "WANDB_MODE", "WANDB_SWEEP_ID", None])
def test_wandb_runs_where_it_is_wanted(reason, recorder, run, monkeypatch):
    wandb = recorder(broken=() if reason == "login" else ("login",))
    if reason and reason != "login":
        monkeypatch.setenv(reason, "offline")
    run(max_timesteps=1)
    modes = [options.get("mode") for name, options in wandb.calls if name == "init"]
    assert modes == [None if reason else "disabled"]


@pytest.mark.parametrize("broken", ["init", "login", "log", "finish"])
def test_wandb_never_stops_a_run(broken, recorder, script, tiny, run, capsys):
    expected = run(run_id="whole")
    recorder(broken=(broken,))
    capsys.readouterr()
    script.train(tiny(log_interval=3))
    check_end(expected.with_name("run"), expected)
    assert capsys.readouterr().err.count("\n") <= 1  # a warning, in a line


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGTERM, True), (signal.SIGUSR1, True), (signal.SIGINT, False)]
)
def test_wandb_requeues_a_run_that_a_scheduler_ended(number, requeued, recorder, script, tiny, signals):
    wandb = recorder()
    signals(script.ReplayBuffer, "sample", number, 3)
    with pytest.raises(SystemExit):
        script.train(tiny())
    assert [name for name, _ in wandb.calls[-2:]] == ["mark_preempting" if requeued else "init", "finish"]
    assert wandb.calls[-1][1] == {"exit_code": 1}


def test_resumed_run_tells_wandb_nothing_twice(recorder, run):
    recorder()
    run(max_timesteps=10, log_interval=4)
    wandb = recorder(step=17)
    run(log_interval=4)
    assert [step for step, _ in wandb.rows] == [20, 24, 25]


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


def test_run_in_another_thread_than_the_main_one(tiny, script, tmp_path):
    """Where Python allows no signal handlers."""
    rows = []
    thread = threading.Thread(target=lambda: rows.append(script.train(tiny())))
    thread.start()
    thread.join()
    assert rows and rows[0]["step"] == 25


@pytest.mark.parametrize("known", [True, False])
def test_freed_memory_is_kept_where_the_c_library_can(known, script, run, monkeypatch):
    asked = []
    library = types.SimpleNamespace(**({"mallopt": lambda *arguments: asked.append(arguments)} if known else {}))
    monkeypatch.setattr(script.ctypes, "CDLL", lambda name: library)
    run()
    assert sorted(asked) == ([(-3, 2**25), (-1, 2**31 - 1)] if known else [])


@discrete
def test_random_actions_of_an_evaluation_come_from_its_seed(run):
    def returned(name, **options):
        return table(run(eval_env="Paid-v0", eval_epsilon=1.0, run_id=name, **options))[-1]["eval_return"]

    assert returned("first") == returned("second") != returned("third", eval_seed=2)
