"""The additions of finetune/cql.py to the offline script: Cal-QL's bound, the online phase, its metrics and resume."""

import copy
import itertools
import math
import os
import signal
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    DATASET,
    ONLINE,
    Counter,
    contents,
    equal,
    finetune,
    record,
    refusal,
    slow_clock,
    table,
    tiny_config,
    train_apart,
    weights,
)
from torch import nn

from algorithms.finetune import cql
from algorithms.offline import cql as offline_cql
from benchmarks import collect

pytestmark = finetune


@pytest.fixture(autouse=True)
def world(script):
    """Enters the toy world of the script in each test here."""


# Cal-QL's returns and its bound


@pytest.mark.parametrize(
    ("rewards", "ends", "numbers", "options", "expected"),
    [
        ([1, 2, 4], [2], [0, 0, 0], {}, [3, 4, 4]),
        ([1, 2, 4], [], [0, 0, 0], {}, [2.75, 3.5, 3]),  # after a time-out -1 for ever, which is -2
        ([1, 2, 4], [], [0, 0, 0], {"failure": 0.0}, [3, 4, 4]),
        ([1, 2, 4, 8], [1], [4, 4, 7, 7], {}, [2, 2, 7.5, 7]),  # each episode for itself, the last one cut short
        ([8, 4, 2, 1], [3], [0, 0, 1, 1], {}, [9.5, 3, 2.5, 1]),
        ([-1, -1], [1], [0, 0], {}, [-1.5, -1]),
        ([-1, -1], [1], [0, 0], {"sparse": True}, [-2, -2]),
        ([-1, -1, 0, -1, -1], [2], [0, 0, 0, 1, 1], {"sparse": True}, [-1.5, -1, 0, -2, -2]),
        ([0, -1, -1, -3], [2, 3], [0, 0, 0, 1], {"sparse": True}, [-0.75, -1.5, -1, -2]),
        ([-0.1, -0.1], [1], [2, 2], {"failure": -0.1, "sparse": True}, [-0.2, -0.2]),  # in float32
    ],
)
def test_bounds_are_returns_and_no_end_without_a_terminal_state_is_one(rewards, ends, numbers, options, expected):
    data = {"rewards": np.float32(rewards), "terminals": np.isin(np.arange(len(rewards)), ends)}
    config = types.SimpleNamespace(discount=0.5, is_sparse_reward=options.get("sparse", False))
    found = cql.calibration_returns(data, np.array(numbers), options.get("failure", -1.0), config)
    assert found == pytest.approx(expected) and found.dtype == np.float32


@pytest.mark.parametrize(("bias", "chosen"), [(-200.0, None), (0.0, None), (0.0, -7.0)])
def test_bounds_of_the_data_are_of_training_rewards(bias, chosen, tiny):
    """By default, the data's smallest reward follows a time-out, or 0 if that reward is larger."""
    options = {"normalize_reward": True, "reward_bias": bias, "failure_reward": chosen, "discount": 0.5}
    config, data = tiny(calibrate=True, **options), cql.load_dataset(DATASET)
    buffer = cql.prepare(config, data, cql.Run(config, 1))[2]
    rewards, failure = data["rewards"] + bias, min(0.0, (data["rewards"] + bias).min()) if chosen is None else chosen
    following, expected = 0.0, []
    for i in reversed(range(len(rewards))):
        if data["terminals"][i] or data["timeouts"][i]:
            following = 0.0 if data["terminals"][i] else failure / 0.5
        following = rewards[i] + 0.5 * following
        expected.append(following)
    assert buffer.rows(slice(100)).returns.numpy() == pytest.approx(np.array(expected[::-1]), rel=1e-6)


@pytest.mark.parametrize("calibrate", [True, False])
def test_to_calibrate_values_begin_at_the_mean_return_of_the_data(calibrate, tiny):
    """Else returns far above the first values would leave the penalty nothing to push down. What Cal-QL assumes to
    follow a time-out does not count: it may put the first values far below any return."""
    config = tiny(calibrate=calibrate, normalize_reward=True, reward_bias=1000.0, discount=0.5, max_timesteps=9)
    data = cql.load_dataset(DATASET)
    _, agent, *_ = cql.prepare(config, data, cql.Run(config, 1))
    expected = (cql.episodes(data | {"rewards": data["rewards"] + 1000.0}, 0.5)[1]).mean() if calibrate else 0.0
    assert expected > 500 if calibrate else expected == 0
    for critic in (agent.critic, agent.target_critic):
        assert critic.biases[-1].flatten().tolist() == pytest.approx(2 * [expected], rel=1e-6)
    values = agent.start_values(data["observations"])
    assert values == pytest.approx(expected, abs=2)


class Values(nn.Module):
    """Critics that return given values [E, B, 1 + 3N]."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, observations, actions):
        return self.values


def make_agent(**options):
    torch.manual_seed(0)
    options = {"device": "cpu", "hidden_dim": 8, "cql_n_actions": 2} | options
    agent = cql.CQL(cql.TrainConfig(**options), 3, 2)
    for parameter in agent.critic.parameters():
        nn.init.normal_(parameter)
    return agent


def make_batch(batch_size=5):
    torch.manual_seed(1)
    observations, next_observations = torch.randn(2, batch_size, 3)
    actions = torch.empty(batch_size, 2).uniform_(-1, 1)
    rewards, returns = torch.randn(2, batch_size)
    return cql.Batch(observations, actions, rewards, next_observations, torch.zeros(batch_size), returns)


# For two critics and two states: values of the data's action, a random, a next and a current one.
Q = [[[5.0, -9, -9, 2], [0, 1, 1, 1]], [[5, 4, 1, -9], [0, 7, 0, 7]]]
RETURNS = [3.0, 0.5]
DENSITIES = [[0.5, 0.25, 2], [1, 1, 1]]


@pytest.mark.parametrize("calibrate", [True, False])
def test_penalty_bounds_the_policys_actions_before_the_density(calibrate, float64):
    """The random action and the data's are not bounded; bounded ones pass no gradient."""
    agent = make_agent(calibrate=calibrate, cql_n_actions=1, cql_alpha=1.0)
    agent.critic = Values(Q)
    batch, log_prob = make_batch(2)._replace(returns=torch.tensor(RETURNS)), torch.tensor(DENSITIES).log()
    loss, gap, metrics = agent.critic_loss(batch, torch.tensor([5.0, 0]), torch.zeros(2, 3, 2), log_prob)
    (gradient,) = torch.autograd.grad(loss, agent.critic.parameters())
    expected, passed = [], np.zeros((2, 2, 4), bool)
    for e, b in itertools.product((0, 1), (0, 1)):
        bounds = [-math.inf, -math.inf, RETURNS[b], RETURNS[b]] if calibrate else 4 * [-math.inf]
        counted = np.maximum(Q[e][b], bounds)
        passed[e, b] = np.array(Q[e][b]) >= bounds
        expected.append(math.log(sum(math.exp(q) / p for q, p in zip(counted[1:], DENSITIES[b]))) - Q[e][b][0])
    assert gap.tolist() == pytest.approx([np.mean(expected[:2]), np.mean(expected[2:])])
    assert np.array_equal(gradient.numpy() != 0, passed)
    rates = {name: value.item() for name, value in metrics.items() if name.startswith("bound_rate")}
    kinds = ("next_actions", "current_actions")
    hand = dict(zip([f"bound_rate_cql_q{i}_{kind}" for i in (1, 2) for kind in kinds], [0.5, 0.5, 1, 0.5]))
    assert rates == (hand if calibrate else {})


def proposed(agent, batch):
    with torch.no_grad():
        return agent.td_target_and_proposals(
            batch, *agent.actor(torch.cat([batch.observations, batch.next_observations]))
        )


def critic_gradient(agent, loss):
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, agent.parameter_groups["critic"])])


@pytest.mark.parametrize("options", [{}, {"cql_importance_sample": False, "cql_temp": 2.0}], ids=str)
def test_drawn_actions_count_bounded_and_pass_no_gradient_where_they_are(options, float64, monkeypatch):
    """On a fine grid of uniform numbers the drawn gradient is its own expectation; the loss is always the same."""
    n, batch = 4000, make_batch()
    agent, cheap = (make_agent(calibrate=True, cql_backprop_actions=k, **options) for k in (0, 1))
    inputs = proposed(agent, batch)
    batch = batch._replace(returns=agent.critic(batch.observations, inputs[1]).detach().mean(dim=(0, 2)))
    loss, _, metrics = agent.critic_loss(batch, *inputs)
    many, inputs = (type(x)(*(y.repeat(n, *[1] * (y.ndim - 1)) for y in x)) if isinstance(x, cql.Batch) else
                    [y.repeat(n, *[1] * (y.ndim - 1)) for y in x] for x in (batch, inputs))  # fmt: skip
    grid = ((torch.arange(n) + 0.5) / n).repeat_interleave(5)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: grid.view(1, -1, 1).expand(size))
    cheap_loss, *_ = cheap.critic_loss(many, *inputs)
    exact, drawn = critic_gradient(agent, loss), critic_gradient(cheap, cheap_loss)
    assert 0.1 < metrics["bound_rate_cql_q1_current_actions"] < 0.9  # some are bounded, some are not
    assert cheap_loss.item() == pytest.approx(loss.item()) and (drawn - exact).norm() < 1e-3 * exact.norm()


def test_where_all_drawn_actions_are_bounded_only_the_data_have_a_gradient(float64):
    agent, batch = make_agent(calibrate=True, cql_backprop_actions=2), make_batch()
    batch = batch._replace(returns=torch.full((5,), 1e3))
    td_target, *rest = proposed(agent, batch)
    found = critic_gradient(agent, agent.critic_loss(batch, td_target, *rest)[0])
    q = agent.critic(batch.observations, batch.actions.unsqueeze(1))[..., 0]
    expected = critic_gradient(agent, ((q - td_target) ** 2 - 10 * q).mean(dim=1).sum())
    assert torch.allclose(found, expected) and found.norm() > 0.1


# The buffer


def transitions(rewards):
    """Rows whose columns all equal their reward."""
    column = np.float32(rewards)
    data = dict.fromkeys(cql.Batch._fields, column)
    return data | {name: column[:, None] for name in ("observations", "actions", "next_observations")}


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0), (0.25, 0.25), (0.3, 0.25), (1.0, 1), (-1.0, 10 / 40)])
def test_share_of_data_in_a_minibatch(ratio, share):
    """Exactly the nearest number of rows; -1 is uniform. Before the first online row, all rows are data."""
    torch.manual_seed(0)
    buffer = cql.ReplayBuffer(transitions(range(10)), "cpu", 50, ratio)
    for buffer.online in (False, True):
        assert set(torch.cat([buffer.sample(8).rewards for _ in range(50)]).tolist()) == set(range(10))
    buffer.add(transitions(range(100, 130)))
    batches = torch.stack([buffer.sample(8).rewards for _ in range(2000)])
    shares, counts = (batches < 50).float().mean(dim=1), torch.bincount(batches.int().flatten(), minlength=130)
    assert shares.mean().item() == pytest.approx(share, abs=0.01) and (ratio < 0) == (len(set(shares.tolist())) > 1)
    for n, some, part in ((10, counts[:10], share), (30, counts[100:], 1 - share)):
        assert (some - 16_000 * part / n).abs().max() < 5 * math.sqrt(16_000 / n)
    batch = buffer.sample(8)
    assert all(torch.equal(column.flatten(), batch.rewards) for column in batch)


@pytest.mark.parametrize("sizes", [[1] * 11, [3, 3, 3, 2], [4, 7], [11], [2, 9]])
def test_oldest_online_rows_make_way_and_data_never_do(sizes):
    buffer, added = cql.ReplayBuffer(transitions(range(5)), "cpu", 4, 0.5), 0
    for size in sizes:
        buffer.add(transitions(range(100 + added, 100 + added + size)))
        added += size
        rows = buffer.rows(slice(None))
        latest = set(range(100 + max(0, added - 4), 100 + added)) | ({0} if added < 4 else set())
        assert rows.rewards[:5].tolist() == [0, 1, 2, 3, 4] and {*rows.rewards[5:].tolist()} == latest
        assert buffer.counts.tolist() == [5, min(4, added)]
        assert all(torch.equal(column.flatten(), rows.rewards) for column in rows)


def test_without_data_any_ratio_is_of_online_rows():
    buffer = cql.ReplayBuffer(transitions([]), "cpu", 4, 0.5)
    buffer.online = True
    buffer.add(transitions([7, 8]))
    assert {*buffer.sample(99).rewards.tolist()} == {7, 8}


# The online phase


def read(folder):
    """Rows of online.bin: observation, action, next observation, reward, terminal, time-out, number."""
    return np.fromfile(Path(folder, "online.bin"), np.float32).reshape(-1, 12)


def n_updates(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]["_extra_state"]["n_updates"]


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({}, 13),
        ({"utd_ratio": 3}, 39),
        ({"warmup_steps": 4}, 9),
        ({"warmup_steps": 99}, 0),
        ({"n_online_envs": 3}, 13),  # 3, 3, 3, 3 and 1
        ({"n_online_envs": 3, "utd_ratio": 2, "warmup_steps": 4}, 14),  # after the second round
        ({"n_online_envs": 20}, 13),
    ],
    ids=str,
)
def test_updates_and_transitions_of_the_online_phase(options, updates, run):
    folder = run(max_timesteps=5, online_iterations=13, eval_env="Plain-v0", **options)
    assert len(read(folder)) == 13 and n_updates(folder) == 5 + updates and table(folder)[-1]["step"] == "18"


@pytest.mark.parametrize("learned", ["", "offline", "loaded"])
def test_warm_up_is_uniform_where_nothing_was_learned_before(learned, run, monkeypatch):
    explore, log = cql.CQL.explore, []
    monkeypatch.setattr(cql.CQL, "explore", lambda self, x, uniform: log.append(uniform) or explore(self, x, uniform))
    options = {"offline_iterations": 3 * (learned == "offline"), "online_iterations": 9, "warmup_steps": 4}
    if learned == "loaded":
        options["load_model"] = str(run(run_id="earlier") / "checkpoint.pt")
    run(**options)
    assert log == [not learned] * 4 + [False] * 5


def test_exploration_is_the_policys_or_uniform_in_any_units():
    agent = make_agent()
    nn.init.zeros_(agent.actor.head.weight)
    agent.actor.head.bias.data = torch.tensor([0.5, -0.5, -9.0, -9])  # near its mean
    observations = np.full((5000, 3), 1e3, np.float32)
    policy, uniform = (agent.explore(observations, x) for x in (False, True))
    assert policy == pytest.approx(np.tanh([[0.5, -0.5]] * 5000), abs=1e-3) and policy.std() > 0
    assert np.quantile(uniform, np.linspace(0, 1, 9)) == pytest.approx(np.linspace(-1, 1, 9), abs=0.05)
    agent.actor.load_state_dict(
        {"observation_mean": torch.full((3,), 999.0), "observation_std": torch.full((3,), 0.5)}, strict=False
    )
    agent.actor.forward = lambda x: (x[:, :2], torch.full((len(x), 2), -20.0))
    assert agent.explore(observations[:1], False) == pytest.approx(np.tanh([[2, 2]]), abs=1e-6)


def test_weight_of_the_penalty_is_of_the_phase(run):
    rows = table(run(cql_alpha=3.0, cql_alpha_online=7.0, max_timesteps=10, online_iterations=15, eval_freq=5))
    assert [float(row["cql_effective_weight"]) for row in rows] == [3, 3, 7, 7, 7]
    rows = table(run(cql_alpha_online=0.0, max_timesteps=10, online_iterations=10, run_id="sac"))
    assert rows[0]["cql_qf1_diff"] and not rows[1]["cql_qf1_diff"] and rows[1]["qf1_loss"]
    agent = make_agent(cql_alpha=3.0, cql_alpha_online=7.0, cql_lagrange=True)
    losses = []
    for agent.cql_alpha in (3.0, 7.0):
        losses.append(agent.alpha_prime_loss(torch.tensor([5.0])).item())
    assert losses[1] == pytest.approx(losses[0] * 7 / 3)


@pytest.fixture
def added(monkeypatch):
    """The transitions that go to the buffer, call by call."""
    calls, add = [], cql.ReplayBuffer.add
    monkeypatch.setattr(
        cql.ReplayBuffer, "add", lambda self, data: calls.append(copy.deepcopy(data)) or add(self, data)
    )
    return calls


def of_episodes(rows):
    """The numbers in their order, and the rows of each."""
    return {number: rows[rows[:, -1] == number] for number in sorted({*rows[:, -1]})}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("calibrate", [False, True])
def test_transitions_in_file_and_buffer_are_what_was_played(n, calibrate, run, added, monkeypatch):
    reset, seeds = Counter.reset, []
    monkeypatch.setattr(Counter, "reset", lambda self, seed=None, options=None: seeds.append(seed) or reset(self, seed))
    options = {"normalize_reward": True, "reward_scale": 0.5, "failure_reward": -1.0, "discount": 0.5}
    folder = run(max_timesteps=2, online_iterations=50, n_online_envs=n, calibrate=calibrate, eval_freq=99, **options)
    rows, episodes = read(folder), of_episodes(read(folder))
    assert len(rows) == 50 and len(episodes) > 8
    for i in range(n):
        own = [number for number in episodes if number % n == i]
        assert own == [*range(i, i + n * len(own), n)]
    online = [seed for seed in seeds if seed is not None and seed > 1000]
    assert len(online) >= len(episodes) and len({*online}) == len(online)
    ends, finished = {"terminal": 0, "time-out": 0}, []
    for number, episode in episodes.items():
        start, following = episode[:, :3], episode[:, 5:8]
        seed, length = int(start[0, 0]), len(episode)
        assert start[:, 1].tolist() == [*range(length)] and np.array_equal(start[1:], following[:-1])
        assert np.allclose(following[:, 2] - start[:, 2], episode[:, 3:5].sum(axis=1), atol=1e-5)
        assert np.array_equal(episode[:, 8], seed + np.arange(1, length + 1))
        over = length == Counter.length(seed)
        kind = np.array([over and seed % 2 == 0, over and seed % 2 == 1])
        assert np.array_equal(episode[-1, 9:11] > 0, kind) and not episode[:-1, 9:11].any()
        ends["terminal"], ends["time-out"] = ends["terminal"] + kind[0], ends["time-out"] + kind[1]
        assert over or number + n not in episodes
        finished += [number] if over else []
    assert min(ends.values()) > 1
    low, high = Counter.action_space.low, Counter.action_space.high
    assert np.all((low <= rows[:, 3:5]) & (rows[:, 3:5] <= high)) and rows[:, 3:5].std() > 0.1

    stored, mean = weights(folder), weights(folder)["/weights/observation_mean"].numpy()
    std = stored["/weights/observation_std"].numpy()
    found = {key: np.concatenate([data[key] for data in added]) for key in added[0]}
    if not calibrate:
        expected, returns = rows, np.zeros(50)
    else:  # episodes in the order of their ends, each one whole
        order = sorted(finished, key=lambda x: np.flatnonzero(rows[:, -1] == x)[-1])
        assert len(added) > 1 and np.concatenate([data["rewards"] for data in added]).size == len(found["rewards"])
        expected, returns = np.concatenate([episodes[x] for x in order]), []
        for number in order:
            following = 0.0 if episodes[number][-1, 9] else -1.0 / 0.5
            backwards = [following := 0.5 * x + 0.5 * following for x in episodes[number][::-1, 8]]
            returns += backwards[::-1]
    assert found["returns"] == pytest.approx(np.array(returns), rel=1e-6)
    assert found["rewards"] == pytest.approx(0.5 * expected[:, 8])
    assert np.array_equal(found["terminals"], expected[:, 9] > 0)
    assert found["observations"] == pytest.approx((expected[:, :3] - mean) / std, abs=1e-4)
    assert found["next_observations"] == pytest.approx((expected[:, 5:8] - mean) / std, abs=1e-4)
    assert found["actions"] == pytest.approx((expected[:, 3:5] - low) / (high - low) * 2 - 1, abs=1e-5)


def test_an_episode_that_lasts_is_not_trained_on_before_its_end(run, added, monkeypatch):
    monkeypatch.setattr(Counter, "length", staticmethod(lambda seed: 30 if seed < 97 else 3))
    options = {"max_timesteps": 2, "calibrate": True, "eval_freq": 99, "n_episodes": 1}
    run(online_iterations=29, **options)
    assert not added
    run(online_iterations=30, run_id="longer", **options)
    assert [len(data["rewards"]) for data in added] == [30]


class Whole(Counter):
    action_space = gym.spaces.Box(0, 10, (2,), np.int64)


def test_whole_numbers_are_stored_as_they_were_played(run, added):
    gym.register("Whole-v0", entry_point=Whole)
    rows = read(run(**SAC | {"eval_env": "Whole-v0", "warmup_steps": 9}))
    actions = rows[:, 3:5]
    assert np.array_equal(actions, actions.round()) and len(np.unique(actions)) > 3
    assert np.array_equal(rows[:, 7] - rows[:, 2], actions.sum(axis=1))
    found = np.concatenate([data["actions"] for data in added])
    assert found == pytest.approx(actions / 5 - 1, abs=1e-6)


def test_online_actions_are_in_the_units_of_a_recording_through_a_wrapper(tiny, new_dataset):
    """In each row of the buffer, recorded or online, the action moves the environment's sum by its own value."""
    env = gym.wrappers.RescaleAction(gym.make("Counter-v0"), -1.0, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "make", lambda _: env)
        buffers = record("", range(9))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    config = tiny(env=new_dataset(buffers, env=env.spec, **spaces), online_iterations=30, normalize=False)
    run = cql.Run(config, 30)
    task, agent, buffer, _, failure_reward = cql.prepare(config, None, run)
    collector = cql.Collector(config, task, agent, buffer, run, failure_reward)
    for _ in range(30):
        collector.step()
    batch, (low, high) = buffer.rows(slice(None)), (Counter.action_space.low, Counter.action_space.high)
    moved = batch.next_observations[:, 2] - batch.observations[:, 2]
    stands_for = low + (batch.actions.numpy() + 1) / 2 * (high - low)
    assert len(moved) == buffer.size + 30 and stands_for.sum(axis=1) == pytest.approx(moved.numpy(), abs=1e-5)


# Rows and metrics


@pytest.mark.parametrize("report", [None, math.nan, "yes", np.array([True])], ids=repr)
def test_no_report_of_success_ends_a_run(report, run, monkeypatch):
    step = Counter.step
    monkeypatch.setattr(Counter, "step", lambda *x: (*step(*x)[:4], {"success": report}))
    row = table(run(max_timesteps=2, online_iterations=30, eval_freq=99))[-1]
    assert row["online_return"] and row["online_success"] == ("1.0" if isinstance(report, np.ndarray) else "")


@pytest.mark.parametrize(
    ("offline", "online", "n", "steps"),
    [
        (7, 18, 1, [7, 10, 20, 25]),
        (7, 18, 3, [7, 10, 22, 25]),  # after 19 transitions come 22
        (0, 15, 1, [0, 10, 15]),
        (10, 10, 1, [10, 20]),
        (12, 0, 1, [10, 12]),
        (0, 0, 1, [0]),
        (5, 1, 1, [5, 6]),
        (7, 60, 25, [7, 32, 57, 67]),
    ],
)
def test_rows_are_at_the_switch_at_multiples_and_at_the_end(offline, online, n, steps, run, capsys):
    folder = run(offline_iterations=offline, online_iterations=online, n_online_envs=n)
    assert [int(row["step"]) for row in table(folder)] == steps
    assert (folder / "online.bin").exists() or not online
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"after {steps[-1]:,} steps, in {folder}")


@pytest.mark.parametrize("kind", ["scored", "success", "neither"])
@pytest.mark.parametrize("n", [1, 3])
def test_online_metrics_and_regrets_by_hand(kind, n, run, new_dataset):
    """Returns of 10 and 20 are scores of 0 and 100; success is reported by multiples of 3."""
    scores = {"ref_min_score": 10.0, "ref_max_score": 20.0} if kind == "scored" else {}
    name = new_dataset(record("Counter-v0", range(9)), env="Counter-v0", **scores)
    options = {"env": name, "eval_env": "Plain-v0" if kind == "neither" else "Counter-v0", "n_episodes": 4}
    folder = run(max_timesteps=4, online_iterations=46, eval_seed=1, n_online_envs=n, **options)
    rows, transitions, last, regrets = table(folder), read(folder), 0, []
    assert all(rows[0][name] == "" for name in ONLINE - {"eval_regret"}) and len(rows) == 6
    evaluated = 1 - np.mean([sum(s + t for t in range(1, 4 + s)) - 10 for s in range(1, 5)]) / 10 if scores else 0.75
    for row in rows:
        n_rows, outcomes = int(row["step"]) - 4, []
        for i in range(last, n_rows):
            if transitions[i, 9:11].any():
                episode = transitions[transitions[:, -1] == transitions[i, -1]]
                outcomes.append((episode[:, 8].sum(), len(episode), episode[0, 0] % 3 == 0))
                regrets.append(1 - ((episode[:, 8].sum() - 10) / 10 if scores else outcomes[-1][2]))
        last = n_rows
        names = ("online_return", "online_length", "online_success")
        hand = dict(zip(names, np.mean(outcomes, axis=0))) if outcomes else {}
        hand |= {"train_regret": np.mean(regrets)} if regrets else {}
        hand["eval_regret"] = evaluated
        for name in ("online_success", "train_regret", "eval_regret") if kind == "neither" else ():
            hand.pop(name, None)
        assert {x: float(row[x]) for x in ONLINE if row[x]} == pytest.approx(hand)
    assert len(regrets) > 5


def test_regret_leaves_out_evaluations_that_fail_and_those_before_the_switch(run, monkeypatch):
    rollout, successes = cql.rollout, iter([1.0, None, 1.0, 0.0, 0.5])

    def changed(*arguments):
        success = next(successes)
        if success is None:
            raise cql.SimulatorError("the simulator failed")
        return rollout(*arguments) | {"success": [success] * 2}

    monkeypatch.setattr(cql, "rollout", changed)
    rows = table(run(max_timesteps=15, online_iterations=20))
    assert [(row["step"], row["eval_regret"]) for row in rows] == [
        ("10", ""), ("15", ""), ("20", "0.0"), ("30", "0.5"), ("35", "0.5"),
    ]  # fmt: skip


def test_speeds_are_those_of_updates_and_of_playing(run, monkeypatch):
    """The clock moves in minibatches and steps of the environment, and by a lot in everything else."""
    _, takes = slow_clock(monkeypatch, cql)
    takes(cql.ReplayBuffer, "sample", 1.0)
    takes(cql.CQL, "explore", 4.0)
    for owner, name in ((cql, "rollout"), (os, "fsync"), (cql.wandb, "init"), (cql, "load_dataset")):
        takes(owner, name, 1000.0)
    folder = run(max_timesteps=10, online_iterations=20, utd_ratio=2)
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    found = [[row[header.index(x)] for x in ("updates_per_second", "env_steps_per_second")] for row in rows]
    assert found == [["1.0", ""], ["1.0", "0.25"], ["1.0", "0.25"]]


# Resume


def check_end(folder, expected):
    """The same rows, tensors and transitions."""
    assert table(folder) == table(expected) and np.array_equal(read(folder), read(expected), equal_nan=True)
    assert equal(weights(folder, "checkpoint.pt"), weights(expected, "checkpoint.pt"))


KINDS = {
    "one": {"mixing_ratio": 0.5, "cql_alpha_online": 2.0},
    "three": {"n_online_envs": 3, "utd_ratio": 2, "warmup_steps": 6},
    "calibrated": {"calibrate": True, "failure_reward": -1.0, "utd_ratio": 2, "buffer_size": 112},
    "calibrated three": {"calibrate": True, "n_online_envs": 3, "mixing_ratio": 0.5, "holdout_fraction": 0.2},
}
COMMON = {"max_timesteps": 6, "online_iterations": 44, "eval_freq": 11, "n_episodes": 2}


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tmp_path_factory, script):
    """The options of a run, and the folder in which it ran to its end."""
    options = COMMON | KINDS[request.param]
    config = tiny_config(script, tmp_path_factory.mktemp("runs"), **options)
    script.train(config)
    return options, Path(config.checkpoints_path, "run")


@pytest.mark.parametrize("uninterrupted", ["one", "calibrated three"], indirect=True)
def test_killed_run_goes_on_with_the_same_bits(uninterrupted, tiny):
    """Killed in the middle of a round, an update, an evaluation and the files of a row, and after those files."""
    options, expected = uninterrupted
    config, codes = tiny(**options), []
    places = [("Collector.step", 2), ("ReplayBuffer.sample", 12), ("Counter.step", 15), ("fsync", 3), ("replace", 3)]
    for event, place in places:
        codes.append(train_apart(config, event, place))
    assert codes == 5 * [-signal.SIGKILL] and 0 < len(table(Path(config.checkpoints_path, "run"))) < 6
    assert train_apart(config) == 0
    check_end(Path(config.checkpoints_path, "run"), expected)


def signalled(config, n, owner=cql.Collector, name="step"):
    """The exit status of a run that receives a signal in the n-th online round, or in that call of another function; 0
    if it is over before."""
    function, calls, code = getattr(owner, name), itertools.count(1), 0

    def receiving(*arguments):
        if next(calls) == n:
            cql.Signals.received = signal.SIGTERM
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, receiving)
        try:
            cql.train(config)
        except SystemExit as end:
            code = end.code
    cql.Signals.received = 0
    return code


def stopped(tiny, *place, **options):
    """The folder of a run that a signal ended there."""
    assert signalled(tiny(**options), *place) == 128 + signal.SIGTERM
    return Path(tiny(**options).checkpoints_path, options.get("run_id", "run"))


@pytest.mark.parametrize(
    ("uninterrupted", "place"),
    [*((kind, (3,)) for kind in KINDS), ("calibrated", (7, cql.ReplayBuffer, "sample"))],
    indirect=["uninterrupted"],
)
def test_run_that_is_stopped_again_and_again_goes_on_with_the_same_bits(place, uninterrupted, tiny):
    options, expected = uninterrupted
    config, codes = tiny(**options), []
    while code := signalled(config, *place):
        codes.append(code)
    assert len(codes) > 4 and {*codes} == {128 + signal.SIGTERM}
    check_end(Path(config.checkpoints_path, "run"), expected)


def test_updates_that_were_due_at_a_stop_are_made_first(run, tiny):
    options = {"max_timesteps": 5, "online_iterations": 20, "utd_ratio": 4, "eval_freq": 99}
    expected, n = run(run_id="whole", **options), 5 + 3 * 4 + 2  # the second of four, after the fourth step
    folder = stopped(tiny, n, cql.ReplayBuffer, "sample", **options)
    assert n_updates(folder) == n and len(read(folder)) == 4
    check_end(run(**options), expected)


@pytest.mark.parametrize("place", [(10, cql.ReplayBuffer, "sample"), (1, cql, "rollout")], ids=["before", "at"])
def test_row_at_the_switch_is_the_same_after_a_stop(place, run, tiny):
    """There is no penalty online, but the held-out metrics of that row still have one."""
    options = {"max_timesteps": 10, "online_iterations": 6, "holdout_fraction": 0.2, "cql_alpha_online": 0.0}
    expected = run(run_id="whole", **options)
    assert n_updates(stopped(tiny, *place, **options)) == 10
    check_end(run(**options), expected)


@pytest.mark.parametrize("options", [{}, {"calibrate": True, "n_online_envs": 2}], ids=str)
def test_an_episode_that_plays_differently_on_resume_is_dropped(options, run, tiny, added, monkeypatch, capsys):
    options = options | {"max_timesteps": 5, "online_iterations": 40, "eval_freq": 99}
    folder = stopped(tiny, 9, **options)
    before = read(folder)
    n, unfinished = options.get("n_online_envs", 1), []
    for number, episode in of_episodes(before).items():
        unfinished += [] if episode[-1, 9:11].any() else [number]
    assert unfinished
    observe = Counter.observe
    monkeypatch.setattr(Counter, "observe", lambda self: observe(self) + np.float32([0, 0, 0.5 * (self.t > 0)]))
    capsys.readouterr()
    added.clear()
    run(**options)
    lines, rows = capsys.readouterr().err.strip().splitlines(), read(folder)
    assert len(lines) == len(unfinished) and all("dropped" in line and "online.bin" in line for line in lines)
    assert np.array_equal(rows[: len(before)], before) and len(rows) == 40 and table(folder)[-1]["step"] == "45"
    assert {*rows[len(before) :, -1]}.isdisjoint(unfinished)
    if "calibrate" in options:  # only whole episodes
        whole = [x for x in of_episodes(rows).values() if x[-1, 9:11].any()]
        assert sum(len(data["rewards"]) for data in added) == sum(map(len, whole))
    assert n == 1 or len(of_episodes(rows)) > len(unfinished)


@pytest.mark.parametrize("lost", [None, 50, 2 * 12 * 4])
def test_lost_transitions_are_one_line(lost, tiny):
    options = {"max_timesteps": 5, "online_iterations": 40}
    path = stopped(tiny, 9, **options) / "online.bin"
    content = path.read_bytes()
    path.unlink()
    if lost:
        path.write_bytes(content[:-lost])
    status, line = refusal(cql.train, tiny(**options))
    assert status == 1 and str(path) in line


def test_what_a_killed_run_wrote_after_its_checkpoint_does_not_count(tiny, run):
    options = {"max_timesteps": 5, "online_iterations": 40}
    expected, folder = run(run_id="whole", **options), stopped(tiny, 9, **options)
    with open(folder / "online.bin", "ab") as file:
        file.write(np.random.default_rng(0).bytes(12 * 4 * 60 + 3))
    check_end(run(**options), expected)


def test_online_iterations_may_grow_and_others_may_not(run, tiny):
    options = {"max_timesteps": 5, "online_iterations": 20}
    expected = run(run_id="whole", **options | {"online_iterations": 40})
    folder = run(**options)
    for changes in ({"max_timesteps": 6}, {"online_iterations": 19}, {"calibrate": True}, {"n_online_envs": 2}):
        status, line = refusal(cql.train, tiny(**options | changes))
        assert status == 2 and " was " in line
    run(**options | {"online_iterations": 40})
    names = [key for key in table(expected)[-1] if key.startswith("eval")]
    assert [[row[key] for key in names] for row in table(folder)][-1] == [table(expected)[-1][key] for key in names]
    assert np.array_equal(read(folder), read(expected))


def test_a_run_that_diverges_online_keeps_what_was_good(run, tiny, monkeypatch):
    options = {"max_timesteps": 5, "eval_freq": 10}
    good, update = contents(run(online_iterations=15, **options)), cql.CQL.update
    monkeypatch.setattr(cql.CQL, "update", lambda *x: update(*x) | {"critic_grad_norm": torch.tensor(math.nan)})
    status, line = refusal(cql.train, tiny(online_iterations=40, **options))
    assert status == 1 and "diverged" in line and "critic_grad_norm" in line
    monkeypatch.undo()
    kept = {"checkpoint.pt", "metrics.csv", "policy.pt"}
    now = contents(Path(tiny().checkpoints_path, "run"))
    assert {x: now[x] for x in kept} == {x: good[x] for x in kept}


def test_values_may_be_larger_where_online_rewards_are(run, added, monkeypatch):
    """Those of the data are a thousandth here."""
    load, check, limits = cql.load_dataset, cql.Task.check, []
    monkeypatch.setattr(cql, "load_dataset", lambda name: load(name) | {"rewards": load(name)["rewards"] / 1000})
    monkeypatch.setattr(cql.Task, "check", lambda self, *x: limits.append(self.value_limit) or check(self, *x))
    run(max_timesteps=2, online_iterations=20, discount=0.5)
    largest = max(np.abs(data["rewards"]).max(initial=0) for data in added)
    assert limits[0] == pytest.approx(200) and limits[-1] == pytest.approx(200 * largest) and largest > 2


def test_an_environment_that_fails_online_is_one_line(run, tiny, monkeypatch):
    options = {"max_timesteps": 5, "online_iterations": 40}
    expected, step, calls = run(run_id="whole", **options), Counter.step, itertools.count(1)

    def fails(self, action):
        if next(calls) == 60:
            raise RuntimeError("the simulator\nexploded")
        return step(self, action)

    monkeypatch.setattr(Counter, "step", fails)
    status, line = refusal(cql.train, tiny(**options))
    assert status == 1 and "Counter-v0" in line and "exploded" in line
    monkeypatch.setattr(Counter, "step", step)
    check_end(run(**options), expected)


# Beside the offline script


@pytest.mark.parametrize(
    "options",
    [
        {}, {"cql_lagrange": True, "bc_steps": 5, "holdout_fraction": 0.2, "cql_max_target_backup": True},
        {"cql_backprop_actions": 2, "backup_entropy": True, "target_update_period": 3},
        {"cql_importance_sample": False, "cql_temp": 0.5, "cql_clip_diff_max": 3.0, "cql_alpha": 1.0},
        {"cql_alpha": 0, "use_automatic_entropy_tuning": False, "normalize": False},
    ],
    ids=str,
)  # fmt: skip
def test_offline_phase_is_the_offline_script_bit_for_bit(options, run, tmp_path):
    folder = run(**options)
    config = tiny_config(offline_cql, tmp_path / "other", **options)
    offline_cql.train(config)
    other = Path(config.checkpoints_path, "run")
    first, second = weights(folder, "checkpoint.pt"), weights(other, "checkpoint.pt")
    assert equal(first, second) and equal(weights(folder), weights(other)) and len(first) > 30
    assert [{x: row[x] for x in row.keys() - ONLINE} for row in table(folder)] == table(other)


@pytest.mark.parametrize("options", [{}, {"bc_only": True}])
def test_fine_tuning_starts_from_a_checkpoint_of_the_offline_script(options, run, tmp_path):
    config = tiny_config(offline_cql, tmp_path / "other", **options)
    offline_cql.train(config)
    path = Path(config.checkpoints_path, "run", "checkpoint.pt")
    still = {"policy_lr": 0, "qf_lr": 0, "soft_target_update_rate": 0}
    folder = run(load_model=str(path), offline_iterations=0, online_iterations=15, seed=1, **still)
    stored, loaded = weights(path.parent, path.name), weights(folder, "checkpoint.pt")
    kept = {name for name in stored if name.startswith(("/policy", "/agent/actor", "/agent/critic"))}
    assert len(kept) >= 10 and equal(*({name: x[name] for name in kept} for x in (stored, loaded)))
    assert [row["step"] for row in table(folder)] == ["0", "10", "15"]
    assert not equal(weights(run(load_model=str(path), online_iterations=5, run_id="learning")), weights(folder))


def test_a_run_folder_of_the_offline_script_is_not_resumed(tiny, tmp_path):
    """Not even if all options that both scripts have are the same."""
    config = tiny_config(offline_cql, tmp_path / "runs", reward_scale=1.0, reward_bias=0.0)
    offline_cql.train(config)
    before = contents(tmp_path / "runs")
    status, line = refusal(cql.train, tiny(online_iterations=9))
    assert status in (1, 2) and "run" in line and contents(tmp_path / "runs") == before


# Learning online only, and options that do not fit

SAC = {
    "env": "none", "eval_env": "Counter-v0", "normalize": False, "offline_iterations": 0, "online_iterations": 30,
    "cql_alpha_online": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"n_online_envs": 3, "warmup_steps": 9}, {"calibrate": True, "failure_reward": 0.0}], ids=str
)
def test_online_only(options, run):
    """Learns only from what was played; to calibrate, only from whole episodes."""
    folder = run(**SAC | options)
    rows = table(folder)
    assert [row["step"] for row in rows][0] == "0" and rows[-1]["step"] == "30" and float(rows[-1]["qf1_loss"]) > 0
    assert not any(row["d4rl_normalized_score"] for row in rows) and len(read(folder)) == 30
    first_end = np.flatnonzero(read(folder)[:, 9:11].any(axis=1))[0]
    skipped = {"warmup_steps": 9, "calibrate": first_end}
    assert n_updates(folder) == 30 - sum(skipped[name] for name in options if name in skipped)
    stored = weights(folder)
    assert stored["/weights/action_low"].tolist() == Counter.action_space.low.tolist()


class Faint(Counter):
    """Counter with numbers below float32's normal ones, which a run rounds to 0, which only reports successes."""

    def observe(self):
        return np.array([self.number, self.t, 1e-40 * self.t], np.float32)

    def step(self, action):
        *step, info = super().step(action)
        return *step, {key: value for key, value in info.items() if value}


def test_faint_numbers_and_rare_success(run, monkeypatch, capsys):
    """A resumed run replays what it played; episodes without a report of success count as failures."""
    gym.register("Faint-v0", entry_point=Faint)
    monkeypatch.setattr(Faint, "action_space", Counter.action_space)
    options = SAC | {"eval_env": "Faint-v0", "n_episodes": 3}
    whole = run(run_id="whole", **options)
    for n in range(3, 30, 4):
        run(run_id="parts", **options | {"online_iterations": n})
    parts = run(run_id="parts", **options)
    assert "dropped" not in capsys.readouterr().err and np.array_equal(read(whole), read(parts))
    row = table(whole)[-1]
    assert 0 < float(row["train_regret"]) < 1 and 0 <= float(row["online_success"]) <= 1 and row["eval_success"]


def test_online_transitions_become_a_dataset(run, script, new_dataset, capsys):
    """benchmarks/collect.py --replay keeps every transition of the first steps of 3 environments that take turns."""
    folder, n = run(**SAC, n_online_envs=3), 20
    for options in ([], ["--env", "Counter-v0"]):
        collect.main(["--replay", str(folder), "--steps", str(n), "--id", "toy/replay-v0", "--force", *options])
    data, rows = script.load_dataset("toy/replay-v0"), read(folder)[:n]
    rows = rows[np.argsort(rows[:, -1], kind="stable")]
    names = ("observations", "actions", "next_observations", "rewards", "terminals")
    stored = np.concatenate([np.float32(data[name]).reshape(n, -1) for name in names], axis=1)
    assert np.array_equal(stored, rows[:, :10]) and script.episodes(data)[0][-1] + 1 == len(set(rows[:, -1]))
    assert (data["timeouts"] >= (rows[:, 10] > 0)).all() and data["environment"]["id"] == "Counter-v0"
    for options in (["--steps", "31"], ["--env", "Pendulum-v1"], ["--policy", "random"], ["--noise", "0.1"]):
        with pytest.raises(SystemExit) as stop:
            collect.main(["--replay", str(folder), "--steps", "20", "--id", "toy/other-v0", *options])
        line = capsys.readouterr().err.strip()
        assert stop.value.code in (1, 2) and "--replay" in line and "\n" not in line


@pytest.mark.parametrize(
    "changes",
    [{"eval_env": None}, {"eval_env": "none"}, {"normalize": True}, {"offline_iterations": 5}, {"eval_env": "Words-v0"},
     {"eval_env": "NoSuchEnvironment-v0"}],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_fit_online_only_are_one_line(changes, tiny, tmp_path):
    status, line = refusal(lambda: cql.train(tiny(**SAC | changes)))
    assert status == (1 if "Words-v0" in changes.values() else 2) and "--e" in line or "Words-v0" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"buffer_size": 100}, ["--buffer_size 100", "100 transitions"]),
        ({"eval_env": "none"}, ["--online_iterations 9", "--eval_env"]),
        ({"mixing_ratio": 1.5}, ["--mixing_ratio"]),
        ({"mixing_ratio": -0.5}, ["--mixing_ratio"]),
        ({"n_online_envs": 0}, ["--n_online_envs"]),
    ],
)
def test_no_room_and_no_environment_are_one_line(options, words, tiny, tmp_path):
    status, line = refusal(lambda: cql.train(tiny(online_iterations=9, **options)))
    assert status == 2 and all(word in line for word in words) and not (tmp_path / "runs").exists()


def test_a_buffer_with_little_room_keeps_the_latest(run, added):
    folder = run(max_timesteps=3, online_iterations=30, buffer_size=104)
    assert len(read(folder)) == 30 and sum(len(data["rewards"]) for data in added) == 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, False), ({"mixing_ratio": 0.5}, True), ({"is_sparse_reward": True}, True), ({"mixing_ratio": -1.0}, False),
        ({"mixing_ratio": 0.5, "is_sparse_reward": True, "calibrate": True}, False), ({"mixing_ratio": 0.0}, True),
    ],
)  # fmt: skip
def test_options_of_cal_ql_without_it_are_said(options, said, run, capsys):
    run(max_timesteps=1, n_episodes=1, **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if "--calibrate True" in line]
    assert len(lines) == said and (not said or "mixing_ratio" in lines[0] and "is_sparse_reward" in lines[0])


# Keys and values of CORL's files for Cal-QL, for AntMaze and Adroit's pen.
ANTMAZE = """
alpha_multiplier: 1.0
backup_entropy: false
batch_size: 256
bc_steps: 0
buffer_size: 10000000
checkpoints_path: null
cql_alpha: 5.0
cql_alpha_online: 5.0
cql_clip_diff_max: .inf
cql_clip_diff_min: -200
cql_importance_sample: true
cql_lagrange: true
cql_max_target_backup: true
cql_n_actions: 10
cql_target_action_gap: 0.8
cql_temp: 1.0
device: cpu
discount: 0.99
env: antmaze-medium-play-v2
eval_freq: 50000
group: antmaze
is_sparse_reward: true
load_model: ''
mixing_ratio: 0.5
n_episodes: 100
name: Cal-QL
normalize: false
normalize_reward: true
offline_iterations: 1000000
online_iterations: 1000000
orthogonal_init: true
policy_lr: 0.0001
project: CORL
q_n_hidden_layers: 5
qf_lr: 0.0003
reward_bias: -5.0
reward_scale: 10.0
seed: 0
soft_target_update_rate: 0.005
target_update_period: 1
use_automatic_entropy_tuning: true
"""
PEN = {
    "cql_alpha: 5.0": "cql_alpha: 1.0", "cql_alpha_online: 5.0": "cql_alpha_online: 1.0", "is_sparse_reward: true": "",
    "cql_lagrange: true": "cql_lagrange: false", "antmaze-medium-play-v2": "pen-cloned-v1", "50000": "5000",
    "normalize_reward: true": "normalize_reward: false", "reward_bias: -5.0": "reward_bias: 0.0",
    "reward_scale: 10.0": "reward_scale: 1.0", "n_episodes: 100": "n_episodes: 10", "mixing_ratio: 0.5": "",
    "q_n_hidden_layers: 5": "q_n_hidden_layers: 3",
}  # fmt: skip


def test_files_of_corl_are_configurations(tmp_path, monkeypatch):
    text = ANTMAZE
    for old, new in PEN.items():
        assert old in text
        text = text.replace(old, new)
    for content in (ANTMAZE, text):
        (tmp_path / "corl.yaml").write_text(content)
        monkeypatch.setattr("sys.argv", ["program", f"--config_path={tmp_path}/corl.yaml"])
        config, stated = (
            vars(cql.parse_arguments(cql.TrainConfig)),
            dict(x.split(": ") for x in content.split("\n") if x),
        )
        for name, value in stated.items():
            said = {"null": "runs", "''": "", ".inf": "inf"}.get(value, value)
            assert str(config[name]).lower() == said.lower() or float(said) == config[name], name
        assert not config["calibrate"] and config["mixing_ratio"] == (0.5 if content is ANTMAZE else -1)
