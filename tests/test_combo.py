"""algorithms/offline/combo.py: the model, what it imagines, and the losses on data and imagined rows."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SPEEDS, equal, refusal, weights

from algorithms.offline import combo, cql

SMALL = {
    "device": "cpu", "env": "toy/line-v0", "eval_env": "none", "max_timesteps": 20, "eval_freq": 10, "batch_size": 32,
    "hidden_dim": 16, "policy_n_hidden_layers": 1, "q_n_hidden_layers": 1, "cql_n_actions": 2, "run_id": "run",
    "rollout_freq": 5, "rollout_batch_size": 40, "rollout_length": 3, "dynamics_members": 3, "dynamics_elites": 2,
    "dynamics_hidden_dim": 16, "dynamics_n_hidden_layers": 2, "dynamics_max_epochs": 3,
}  # fmt: skip


def line(n=600, seed=0):
    """A point in the plane: s' = s + a / 10 and some noise, r = s_0; it ends above s_0 = 0.3, or after 20 steps."""
    rng, rows, state, t = np.random.default_rng(seed), [], np.zeros(2), 0
    for _ in range(n):
        action = rng.uniform(-1, 1, 2)
        following = state + action / 10 + 0.01 * rng.standard_normal(2)
        t, terminal = t + 1, following[0] > 0.3
        rows.append((state, action, state[0], following, terminal, t == 20 and not terminal))
        state, t = (rng.uniform(-0.3, 0.3, 2), 0) if terminal or t == 20 else (following, t)
    return dict(zip(combo.COLUMNS, map(np.array, zip(*rows))))


def config_of(script=combo, path="runs", **options):
    names = vars(script.TrainConfig(device="cpu"))
    values = SMALL | {"checkpoints_path": str(path)} | options
    return script.TrainConfig(**{name: value for name, value in values.items() if name in names})


@pytest.fixture
def make(tmp_path):
    """Makes the parts of a run, (imagination, agent), with an untrained model."""

    def make(data=None, **options):
        config, data = config_of(path=tmp_path, **options), data or line()
        task = combo.Task(config, data)
        data, _, scaling = combo.prepare_data(config, data, task, None)
        torch.manual_seed(0)
        agent = combo.CQL(config, data["observations"].shape[1], data["actions"].shape[1])
        agent.actor.load_state_dict(scaling, strict=False)
        buffer = combo.ReplayBuffer(data, "cpu")
        return combo.Imagination(config, task, agent, buffer, combo.Run(config, 1)), agent

    return make


# The losses

EQUAL = [
    {}, {"cql_backprop_actions": 2}, {"cql_alpha": 0.0}, {"precision": "bfloat16", "cql_temp": 2.0},
    {"cql_importance_sample": False, "cql_lagrange": True, "cql_clip_diff_max": 1.0},
    {"cql_max_target_backup": True, "backup_entropy": True},
]  # fmt: skip


@pytest.mark.parametrize("options", EQUAL)
def test_data_alone_is_cql_to_the_last_bit(options, tmp_path):
    rows = []
    for script in (cql, combo):
        config = config_of(
            script, tmp_path / script.__name__, **{"real_ratio": 1.0, "policy_lr": 1e-3, "cql_alpha": 2.0} | options
        )
        rows.append(script.train(config, line()))
    first, second = (weights(tmp_path / script.__name__ / "run") for script in (cql, combo))
    assert equal(first, second)
    same = rows[0].keys() & rows[1].keys() - {"updates_per_second"}
    assert len(same) > 10 and all(rows[0][name] == rows[1][name] for name in same)


def batch_of(n=32):
    torch.manual_seed(1)
    columns = torch.randn(n, 3), torch.rand(n, 2) * 2 - 1, torch.randn(n), torch.randn(n, 3), (torch.rand(n) < 0.2)
    return combo.Batch(*[x.to(torch.get_default_dtype()) for x in columns])


@pytest.mark.parametrize("states", ["mix", "model"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_penalty_pushes_down_at_its_states_and_up_at_data_alone(states, ratio, float64):
    agent = combo.CQL(config_of(real_ratio=ratio, push_down_states=states, cql_alpha=3.0, cql_n_actions=4), 3, 2)
    batch, n = batch_of(), int(32 * ratio)
    target, proposals, log_prob = agent.td_target_and_proposals(batch, *agent.actor(torch.cat([batch[0], batch[3]])))
    loss, gap, metrics = agent.critic_loss(batch, target, proposals, log_prob, n)

    actions = torch.cat([batch.actions.unsqueeze(1), proposals], dim=1)
    q = torch.stack([agent.critic(batch.observations[i : i + 1], actions[i : i + 1])[:, 0] for i in range(32)], dim=1)
    down = (q[..., 1:] - log_prob).exp().sum(dim=-1).log()  # of 3N actions
    down = down[:, n:] if states == "model" else down
    by_hand = down.mean(dim=1) - q[:, :n, 0].mean(dim=1)
    td = (q[..., 0] - target).square().mean(dim=1)
    assert torch.allclose(gap, by_hand) and torch.allclose(loss, (td + 3 * by_hand).sum())
    parameters = list(agent.critic.parameters())
    for x, y in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad((td + 3 * by_hand).sum(), parameters)):
        assert torch.allclose(x, y)
    policy_q = q[:, n if states == "model" else 0 :, -4:]
    assert torch.allclose(metrics["average_qf1"], q[0, :n, 0].mean())
    assert torch.allclose(metrics["combo_regulariser"], policy_q.mean() - q[:, :n, 0].mean())


def test_drawn_gradient_has_the_exact_ones_expectation(float64):
    agent, batch = combo.CQL(config_of(real_ratio=0.5, cql_n_actions=4), 3, 2), batch_of(8)
    proposed = agent.td_target_and_proposals(batch, *agent.actor(torch.cat([batch[0], batch[3]])))
    parameters = list(agent.critic.parameters())
    exact, gap, _ = agent.critic_loss(batch, *proposed, 4)
    exact = torch.cat([x.flatten() for x in torch.autograd.grad(exact, parameters)])
    agent.config.cql_backprop_actions, drawn = 3, []
    for _ in range(400):
        loss, same, _ = agent.critic_loss(batch, *proposed, 4)
        assert torch.allclose(gap, same)
        drawn.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)]))
    drawn = torch.stack(drawn)
    error = (drawn.mean(dim=0) - exact).norm() / (drawn.std(dim=0).norm() / 20)
    assert error < 2


def test_minibatch_is_data_first_then_imagined(make):
    imagination, agent = make(real_ratio=0.25)
    imagination.generate(0)
    batch, real = imagination.sample(32), imagination.buffer.columns[0]
    among = (batch.observations.unsqueeze(1) == real).all(dim=-1).any(dim=1)
    assert agent.n_real == 8 and among[:8].all()
    imagined = imagination.rings[2][: int(imagination.counts[0])]
    assert torch.isin(batch.rewards[8:], imagined).all() and not torch.isin(batch.rewards[:8], imagined).any()


# The model


def dynamics(members=3, **options):
    torch.manual_seed(0)
    return combo.Dynamics(config_of(dynamics_members=members, **options), 3, 2)


def member(whole, i):
    """A Dynamics of one member with the weights of the i-th."""
    one = dynamics(1, dynamics_elites=1)
    for x, y in zip(one.parameters(), whole.parameters()):
        x.data.copy_(y[i : i + 1])
    return one


def transitions(members, n=16):
    torch.manual_seed(2)
    ends = (torch.rand(members, n) < 0.3).to(torch.get_default_dtype())
    return torch.randn(members, n, 5), torch.randn(members, n, 4), ends


def test_members_at_once_learn_as_one_by_one(float64):
    whole, batch = dynamics(), transitions(3)
    ones = [member(whole, i) for i in range(3)]
    for _ in range(5):
        whole.update(batch)
        for i, one in enumerate(ones):
            one.update(tuple(x[i : i + 1] for x in batch))
    for i, one in enumerate(ones):
        for x, y in zip(one.parameters(), whole.parameters()):
            assert torch.allclose(x, y[i : i + 1], atol=1e-12)
    for x, y in zip(whole(batch[0][0]), zip(*(one(batch[0][0]) for one in ones))):
        assert torch.allclose(x, torch.cat(y))


def test_likelihood_by_hand(float64):
    model, (inputs, targets, ends) = dynamics(1, dynamics_elites=1), transitions(1)
    mean, log_var, end = model(inputs)
    assert (log_var > model.min_log_var).all() and (log_var < model.max_log_var).all()
    normal = torch.distributions.Normal(mean, (log_var / 2).exp())
    likelihood = -2 * normal.log_prob(targets).mean() - np.log(2 * np.pi)
    cross_entropy = -torch.where(ends > 0, end.sigmoid(), 1 - end.sigmoid()).log().mean()
    assert model.loss(inputs, targets, ends).item() == pytest.approx(
        (likelihood + cross_entropy + 0.01 * 4 * 10.5).item()
    )
    parameter, (gradients, _) = model.weights[0], model.gradients((inputs, targets, ends))
    value, step = model.loss(inputs, targets, ends).item(), 1e-6
    parameter.data[0, 1, 2] += step
    slope = (model.loss(inputs, targets, ends).item() - value) / step
    assert slope == pytest.approx(gradients[0][0, 1, 2].item(), rel=1e-3, abs=1e-6)


def test_first_weights_and_their_decay():
    model = combo.Dynamics(config_of(dynamics_hidden_dim=400, dynamics_n_hidden_layers=4), 3, 2)
    for weight in list(model.weights)[1:]:  # a normal distribution, cut off at two of its standard deviations
        std = 0.5 / weight.shape[1] ** 0.5
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.03) and weight.abs().max() <= 2 * std
    *groups, others = model.optimizer.param_groups
    assert [group["params"][0].shape[1:] for group in groups] == [weight.shape[1:] for weight in model.weights]
    assert [group["weight_decay"] for group in groups] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4])
    assert others["weight_decay"] == 0 and len(others["params"]) == 7


def test_log_variances_have_limits_and_a_gradient_towards_them(float64):
    model, (inputs, *_) = dynamics(1, dynamics_elites=1), transitions(1)
    for bias, low, high in ((1e3, 0.49, 0.51), (-1e3, -10.01, -9.99)):
        model.biases[-1].data.fill_(bias)
        _, log_var, _ = model(inputs)
        assert (log_var > low).all() and (log_var < high).all()


def test_inputs_and_targets_are_standardised(make):
    imagination, data = make(line(5000))[0], line(5000)
    model, batch = imagination.model, combo.Batch(*imagination.buffer.columns)
    change = torch.as_tensor(data["next_observations"] - data["observations"], dtype=torch.float32)
    targets = torch.cat([change, batch.rewards.unsqueeze(1)], dim=1)
    inputs, standard, ends = model.columns
    assert torch.equal(ends, batch.terminals)
    for columns in (inputs, standard):
        assert columns.mean(dim=0).abs().max() < 1e-4 and (columns.std(dim=0) - 0.98).abs().max() < 0.03
    assert torch.allclose(standard * model.dynamics.target_std + model.dynamics.target_mean, targets, atol=1e-5)
    constant, _ = model.dynamics.standardise(torch.full((9, 4), 7.0), torch.zeros(9, 3))
    assert (constant == 0).all()


@pytest.mark.parametrize("all_members", (True, False))
def test_a_step_draws_an_elite_and_noise_for_each_row(all_members):
    model = dynamics(4, dynamics_elites=2)
    model.elites.copy_(torch.tensor([1, 3]))
    means = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(4, 1, 1)
    zeros = torch.zeros(4, 1, 1)
    seen = []
    model.forward = lambda x: (
        seen.append(x) or (means + zeros).expand(4, x.shape[-2], 4),
        zeros.expand(4, x.shape[-2], 4) - 4,
        means[..., 0] + x[..., 0],
    )
    following, rewards, _, uncertainty = model.predict(torch.full((2000, 3), 7.0), torch.zeros(2000, 2), all_members)
    drawn = torch.cat([following - 7, rewards.unsqueeze(1)], dim=1)  # the model predicts the change
    first = (drawn - 10).abs().max(dim=1).values < 5
    assert (drawn[~first] - 30).abs().max() < 5 and 850 < first.sum() < 1150
    noise = drawn - torch.where(first, 10.0, 30.0).unsqueeze(1)
    assert torch.allclose(noise.std(dim=0), torch.tensor(-2.0).exp(), rtol=0.1)
    assert np.corrcoef(noise.T.numpy())[np.triu_indices(4, 1)] == pytest.approx(0, abs=0.1)
    if all_members:
        assert torch.allclose(uncertainty, 2 * torch.tensor(-2.0).exp())
    else:  # the elites' rows only, each in one place
        assert uncertainty == 0.0 and seen[0].shape == (4, max(first.sum(), 2000 - first.sum()), 5)
        assert seen[0].any(dim=-1).sum(dim=1).tolist() == [0, first.sum(), 0, 2000 - first.sum()]


@pytest.mark.parametrize("n_rows", (0, 1, 2, 500))
def test_a_row_that_its_elite_alone_sees_is_predicted_as_by_all(n_rows):
    """Rewards, next observations and ends are the same, also where an elite gets no row."""
    model = dynamics(5, dynamics_elites=3)
    model.elites.copy_(torch.tensor([4, 0, 3]))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    observations, actions = torch.randn(n_rows, 3), torch.rand(n_rows, 2)
    with torch.random.fork_rng():
        *expected, uncertainty = model.predict(observations, actions, True)
    *found, none = model.predict(observations, actions, False)
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(found, expected))
    assert (uncertainty > 0).all() and none == 0


def test_each_member_keeps_its_best_weights_and_learning_stops(make, monkeypatch):
    model = make(dynamics_max_epochs=100)[0].model
    targets = model.columns[1][model.held_out]
    plan = [[1.0, 1.0, 1.0], [1.1, 0.9, 0.995], [1.2, 0.95, 0.9]] + 9 * [[1.0, 0.95, 0.895]]  # 1 % better counts
    for epoch, errors in enumerate(plan):
        for x in model.dynamics.parameters():
            x.data.fill_(epoch)
        offset = torch.tensor(errors).sqrt().view(3, 1, 1)
        monkeypatch.setattr(model.dynamics, "forward", lambda inputs: (targets + offset, None, None))  # noqa: B023
        model.judge()
        if model.status["over"]:
            break
    assert epoch == 2 + model.patience and model.status["epoch"] == epoch + 1
    assert model.status["errors"] == pytest.approx([1.0, 0.9, 0.9], rel=1e-4)
    for x in (model.best[name] for name, _ in model.dynamics.named_parameters()):
        assert [x[i].unique().tolist() for i in range(3)] == [[0.0], [1.0], [2.0]]
    monkeypatch.undo()
    model.fit(lambda: None)
    assert sorted(model.dynamics.elites.tolist()) == [1, 2]
    assert all(torch.equal(x, model.best[name]) for name, x in model.dynamics.named_parameters())


def test_each_member_has_a_bootstrap_sample_without_what_is_held_out(make):
    model = make()[0].model
    assert len(model.held_out) == 120 and not torch.isin(model.resampled, model.held_out).any()
    assert model.resampled.shape == (3, 480) and not torch.equal(model.resampled[0], model.resampled[1])
    for rows in model.resampled:
        assert len(rows.unique()) / 480 == pytest.approx(1 - np.exp(-1), abs=0.06)
    inputs, *_ = model.sample(32)
    assert not torch.equal(inputs[0], inputs[1])
    for i in range(3):
        own = model.columns[0][model.resampled[i]]
        assert (inputs[i].unsqueeze(1) == own).all(dim=-1).any(dim=1).all()


def test_metrics_of_the_elites(make, monkeypatch):
    """Two elites are off by 1.6 and 1.7 standard deviations, and a third member by much more."""
    model = make()[0].model
    model.dynamics.elites.copy_(torch.tensor([0, 2]))
    _, targets, ends = (x[model.held_out] for x in model.columns)
    scale = torch.tensor([1.6, 99.0, 1.7]).view(3, 1, 1)
    foreseen = torch.where(ends == 1, 3.0, -9.0).expand(3, -1)
    forward = (targets + 0.1 * scale, torch.full_like(targets, 2 * np.log(0.1)).expand(3, -1, -1), foreseen)
    monkeypatch.setattr(model.dynamics, "forward", lambda inputs: forward)
    said, error = model.describe(), (0.16**2 + 0.17**2) / 2
    assert said["model_coverage"] == 0.5 and said["model_error"] == pytest.approx(error, rel=1e-3)
    for name, part in (("reward", targets[:, -1]), ("observation", targets[:, :-1])):
        assert said[f"model_r2_{name}"] == pytest.approx(1 - error / part.var(correction=0).item(), rel=1e-3)
    assert said["model_end_accuracy"] == 1
    forward = (*forward[:2], torch.full_like(foreseen, -9.0))
    assert model.describe()["model_end_accuracy"] == 0.5


def test_model_learns_the_line(make):
    model = make(line(6000), dynamics_max_epochs=100, dynamics_hidden_dim=32, dynamics_lr=3e-3)[0].model
    model.fit(lambda: None)
    assert model.metrics["model_r2_observation"] > 0.95 and model.metrics["model_r2_reward"] > 0.99
    assert 0.8 < model.metrics["model_coverage"] < 0.97 and model.metrics["model_end_accuracy"] > 0.5
    observations, actions = torch.zeros(20_000, 2), torch.tensor([[0.5, -1.0]]).expand(20_000, 2)
    following, rewards, end, _ = model.dynamics.predict(observations, actions, False)
    assert torch.allclose(following.mean(dim=0), torch.tensor([0.05, -0.1]), atol=0.01)
    assert torch.allclose(following.std(dim=0), torch.tensor(0.01), atol=0.005)
    assert rewards.mean().abs() < 0.02 and end.mean() < 0.1


# Rollouts


def test_nothing_is_imagined_after_an_end(make):
    imagination, agent = make(rollout_length=4)
    for ends, lengths in ((lambda s: torch.ones(len(s), dtype=torch.bool), {1}), (combo.ENDS["never"], {4})):
        imagination.ends = ends
        starts = imagination.buffer.columns[0][:10]
        batch = imagination.imagine(starts, agent.actor)
        assert {len(batch.rewards) // 10} == lengths and len(batch.rewards) % 10 == 0
        assert (batch.terminals == (1 in lengths)).all()
    imagination.ends = lambda s: s[:, 0] > 0
    batch = imagination.imagine(starts, agent.actor)
    alive, rows = starts, 0
    while rows < len(batch.rewards):
        step = [x[rows : rows + len(alive)] for x in batch]
        assert torch.equal(step[0], alive)
        alive, rows = step[3][step[4] == 0], rows + len(alive)


def test_actions_and_learned_ends_are_drawn(make):
    imagination, agent = make(rollout_length=1, termination="learned")
    step = imagination.model.dynamics.predict
    imagination.model.dynamics.predict = lambda s, a, x: (*step(s, a, x)[:2], torch.full((len(s),), 0.3), 0.0)
    same = imagination.buffer.columns[0][:1].expand(1000, -1)
    batch = imagination.imagine(same, agent.actor)
    assert batch.terminals.mean().item() == pytest.approx(0.3, abs=0.05)
    log_std = agent.actor(same[:1])[1]
    assert torch.allclose(batch.actions.atanh().std(dim=0), log_std.exp()[0], rtol=0.1)


def test_imagined_numbers_stay_in_the_datas_box_and_ends_are_seen_before(make):
    imagination, agent = make(rollout_length=2, mopo_penalty=0.0)
    far = torch.full((10, 2), 1e3)
    imagination.model.dynamics.predict = lambda s, a, _: (
        s + far[: len(s)],
        s[:, 0] + 1e3,
        torch.zeros(len(s)),
        torch.ones(len(s)),
    )
    imagination.ends = lambda s: s[:, 0] > 500
    batch = imagination.imagine(imagination.buffer.columns[0][:10], agent.actor)
    assert len(batch.rewards) == 10 and (batch.terminals == 1).all()
    low, high = imagination.buffer.columns[3].aminmax(dim=0)
    assert (batch.next_observations >= low - 1e-5).all() and (batch.next_observations <= high + 1e-5).all()
    assert torch.allclose(batch.rewards, imagination.buffer.columns[2].max())


def test_mopo_subtracts_the_largest_norm_of_the_standard_deviations(make):
    imagination, agent = make(rollout_length=1, rollout_actions="uniform")
    batches = []
    for penalty in (0.0, 3.0):
        imagination.config.mopo_penalty = penalty
        torch.manual_seed(3)
        batches.append(imagination.imagine(imagination.buffer.columns[0][:10], agent.actor))
    first, second = batches
    raw = first.observations * agent.actor.observation_std + agent.actor.observation_mean
    inputs = (
        torch.cat([raw, first.actions], dim=1) - imagination.model.dynamics.input_mean
    ) / imagination.model.dynamics.input_std
    std = (imagination.model.dynamics(inputs)[1] / 2).exp() * imagination.model.dynamics.target_std  # [M, B, O + 1]
    largest = torch.stack([std[i].square().sum(dim=-1).sqrt() for i in range(3)]).max(dim=0).values
    assert torch.allclose(first.rewards - second.rewards, 3 * largest, atol=1e-5)
    assert (second.rewards < imagination.reward_range[0]).any()  # the penalty comes after the clamp
    assert first.actions.min() < -0.5 and first.actions.max() > 0.5


def test_rollout_penalty_is_the_mean_that_rewards_lost(make):
    imagination, rewards = make(rollout_batch_size=40)[0], []
    imagination.chunk = 15
    for penalty in (0.0, 3.0, 3.0):  # of the last generation alone
        assert "rollout_penalty" not in imagination.metrics or penalty
        imagination.config.mopo_penalty = penalty
        imagination.generate(0)
        rewards.append(imagination.metrics["rollout_reward"])
    assert imagination.metrics["rollout_penalty"] == pytest.approx(rewards[0] - rewards[1], rel=1e-4)
    assert rewards[0] - rewards[1] > 0.1 and rewards[1] == rewards[2]


def test_ring_holds_the_last_generations(make):
    imagination, _ = make(model_retain=2, rollout_length=1, rollout_batch_size=40)
    for step in (0, 5, 10, 15, 20):
        imagination.generate(step)
    assert [x["step"] for x in imagination.generations] == [15, 20] and imagination.counts.tolist() == [40, 40]
    rings, imagination.counts = [x.clone() for x in imagination.rings], torch.tensor([10.0, 40.0], dtype=torch.float64)
    counts = torch.zeros(80)
    imagination.rings[2] = torch.arange(80.0)
    for _ in range(300):
        counts += torch.bincount(imagination.sample(32).rewards[16:].long().clamp(0, 79), minlength=80)
    drawn = (torch.arange(80) < 10) | (torch.arange(80) >= 40)
    assert (counts[~drawn] == 0).all() and (counts[drawn] > 0).all()  # rows outside all rollouts are never drawn
    assert counts[drawn].std() < 3 * counts[drawn].mean().sqrt()
    assert not torch.equal(rings[0][:40], rings[0][40:])  # each generation has its own starts
    for seed in (0, 1):  # a resumed run has another policy by then
        again, agent = make(model_retain=2, rollout_length=1, rollout_batch_size=40, seed=seed)
        again.model.dynamics.load_state_dict(imagination.model.dynamics.state_dict())
        agent.actor.head.bias.data.add_(1)
        for generation in imagination.generations:
            again.generate(**generation)
        assert all(torch.equal(x, y) for x, y in zip(rings, again.rings)) == (seed == 0)


# Ends


@pytest.mark.parametrize("name", ["Ant", "Hopper", "Walker2d", "Humanoid"])
def test_rules_are_those_of_the_environments(name):
    env, rng, seen = gym.make(f"{name}-v5").unwrapped, np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(300):
        env.set_state(env.init_qpos + rng.normal(0, 0.5, env.model.nq), rng.normal(0, 1, env.model.nv))
        observation = torch.tensor(env._get_obs()[None], dtype=torch.float32)
        seen.append((combo.ENDS[name.lower()](observation).item(), not env.is_healthy))
    assert all(ours == theirs for ours, theirs in seen) and 20 < sum(ours for ours, _ in seen) < len(seen) - 20


def test_hopper_ends_at_large_negative_numbers():
    alive = torch.tensor([[1.25, 0.0] + [0.0] * 9])
    rule = combo.ENDS["hopper"]
    for i, value in itertools.product(range(1, 11), (-101.0, 101.0)):
        state = alive.clone()
        state[0, i] = value
        assert rule(state).item(), i
    assert not rule(alive).item()


def test_ends_are_the_tasks_where_its_rule_is_right_else_learned(make, capsys):
    assert make()[0].ends is None  # no rule is known
    states = torch.tensor([[1.25, 0.0] + [0.0] * 9]).repeat(1000, 1)
    states[::10, 0] = 0.5
    ends = (states[:, 0] < 0.7).float()
    for name in ("hopper-v5", "hopper-medium-v2 none", "local/hopper/medium-v0 none"):
        assert combo.termination_rule("auto", name, states, ends) is combo.ENDS["hopper"]
        assert combo.termination_rule("auto", name, states, 1 - ends) is None
        assert "learned (the rule of hopper is right in 0.0%)" in capsys.readouterr().out
    for name in ("hopper-v5", "hoppermaze-v0"):
        assert combo.termination_rule("auto", name, states, 0 * ends) is combo.ENDS["never"]
        assert combo.termination_rule("never", name, states, ends) is combo.ENDS["never"]
        assert combo.termination_rule("learned", name, states, ends) is None


# Runs


def test_dynamics_path_takes_the_model_of_another_run(tmp_path, capsys):
    combo.train(config_of(path=tmp_path, run_id="first"), line())
    path = tmp_path / "first/dynamics.pt"
    assert weights(path.parent, path.name)["/held_out"].untyped_storage().nbytes() == 120 * 8
    combo.train(config_of(path=tmp_path, run_id="second", seed=1, cql_alpha=3.0, dynamics_path=str(path)), line())
    assert equal(weights(path.parent, path.name), weights(tmp_path / "second", path.name))
    changed = [line() | {key: line(seed=1)[key]} for key in ("observations", "rewards", "terminals")]
    sizes = [{name: 4} for name in ("dynamics_hidden_dim", "dynamics_members", "dynamics_n_hidden_layers")]
    for data, options in [(data, {}) for data in changed] + [(line(), size) for size in sizes]:
        config = config_of(path=tmp_path, run_id="third", dynamics_path=str(path), **options)
        status, text = refusal(combo.train, config, data)
        assert status == 1 and "not hold a model of these data and sizes" in text
    status, text = refusal(combo.train, config_of(path=tmp_path, run_id="4", dynamics_path=str(path) + "x"), line())
    assert status == 1 and "does not exist" in text


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run, and its last row."""
    path = tmp_path_factory.mktemp("whole")
    return path / "run", combo.train(config_of(path=path), line())


@pytest.mark.parametrize("kill", [True, False])
@pytest.mark.parametrize("n", [1, 15, 23, 45])  # of 3 epochs of 15 minibatches
def test_stopped_while_the_model_learns_it_goes_on_with_the_same_bits(n, kill, tmp_path, monkeypatch, uninterrupted):
    sample, calls = combo.WorldModel.sample, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == n:
            if kill:
                raise Killed
            combo.Signals.received = 15
        return sample(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed if kill else SystemExit):
        patch.setattr(combo.WorldModel, "sample", stopping)
        combo.train(config_of(path=tmp_path), line())
    combo.Signals.received, folder = 0, tmp_path / "run"
    path = folder / "checkpoint.pt"
    done = torch.load(path, weights_only=True)["model"]["status"]["epoch"] if path.exists() else 0
    assert done == (n - 1) // 15 and (path.exists() or kill) and not (folder / "metrics.csv").exists()
    row = combo.train(config_of(path=tmp_path), line())
    whole, expected = uninterrupted
    assert all(row[name] == expected[name] for name in row.keys() - SPEEDS)
    for name in ("checkpoint.pt", "dynamics.pt"):
        assert equal(weights(folder, name), weights(whole, name))


@pytest.mark.parametrize("options", [{"push_down_states": "model", "real_ratio": 1.0}, {"dynamics_elites": 4}])
def test_options_that_leave_nothing_to_imagine_are_refused(options, tmp_path):
    assert refusal(combo.train, config_of(path=tmp_path, **options), line())[0] == 2


def test_a_model_that_diverges_is_one_line(tmp_path):
    assert "dynamics_lr" in refusal(combo.train, config_of(path=tmp_path, dynamics_lr=1e12), line())[1]


def test_few_data_do_not_lead_to_high_predictions(tmp_path):
    """With a model of 60 transitions, long rollouts, and rates at which values would rise without end."""
    data = line(60)
    data |= {"terminals": np.zeros(60, bool), "rewards": 1 + 0.1 * data["observations"][:, 0]}
    options = {"rollout_length": 10, "rollout_freq": 50, "rollout_batch_size": 100, "cql_alpha": 0.5, "discount": 0.97}
    options |= {"soft_target_update_rate": 1.0, "qf_lr": 1e-2, "policy_lr": 3e-3, "hidden_dim": 32}
    config = config_of(path=tmp_path, max_timesteps=400, eval_freq=400, **options)
    combo.train(config, data)
    agent = combo.CQL(config, 2, 2)
    agent.load_state_dict(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["agent"])
    assert agent.start_values(data["observations"]).max() < 1.1 * data["rewards"].max() / (1 - 0.97)


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_no_target_is_above_what_rewards_can_add_up_to(discount, make):
    imagination, agent = make(discount=discount)
    largest = imagination.buffer.columns[2].max().item()
    assert agent.largest_reward == largest and make(real_ratio=1.0)[1].largest_reward == np.inf
    batch = imagination.buffer.sample(32)
    agent.target_critic.biases[-1].data.fill_(1e30)
    target, *_ = agent.td_target_and_proposals(
        batch, *agent.actor(torch.cat([batch.observations, batch.next_observations]))
    )
    following = discount * (1 - batch.terminals) * largest / max(1 - discount, 1e-9)
    assert torch.allclose(target, batch.rewards + following)


@pytest.mark.parametrize("reward", [-3.0, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("n", [1, 4])
def test_bound_has_room_for_the_entropy_and_no_more(reward, n, float64):
    """With the largest reward and the largest mean of -log pi in each step, targets converge to the soft value."""
    options = {"backup_entropy": True, "use_automatic_entropy_tuning": False, "alpha_multiplier": 0.9}
    agent, batch = combo.CQL(config_of(discount=0.9, **options), 3, 2), batch_of()
    batch = batch._replace(rewards=torch.full((32,), reward), terminals=torch.zeros(32))
    agent.largest_reward, largest = reward, 2 * np.log(2) + np.log(n)  # of a uniform policy; the best of n is rare

    def target_of(next_value):
        agent.target_critic.forward = lambda *_: torch.full((2, 32, n), next_value)
        (target,) = agent.td_target(batch, torch.zeros(32, n, 2), torch.full((32, n), -largest)).unique().tolist()
        return target

    target, bonus = -100.0, 0.9 * largest
    for _ in range(300):
        target = target_of(target)
    assert target == pytest.approx((reward + 0.9 * bonus) / (1 - 0.9))
    assert target_of(reward) == pytest.approx(reward + 0.9 * (reward + bonus))  # of a next step that ends the episode
    assert target_of(1e30) == pytest.approx(reward + 0.9 * (max(0, reward + bonus) / (1 - 0.9) + bonus))
