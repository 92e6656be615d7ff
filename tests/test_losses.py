"""Each loss of the script against numbers worked out by hand, integrals, or the same formulas written as slow loops."""

import contextlib
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from algorithms.offline import cql

S, A, B, N = 3, 2, 5, 2  # sizes of states, actions and batches, actions a proposal
INF = math.inf
pytestmark = pytest.mark.usefixtures("float64")


class Formulas(nn.Module):
    """A critic for each formula of s [B, 1] and a [B, N], for one-dimensional observations and actions."""

    def __init__(self, *formulas):
        super().__init__()
        self.formulas = formulas

    def forward(self, observations, actions):
        return torch.stack([formula(observations, actions.squeeze(-1)) for formula in self.formulas])


class Values(nn.Module):
    """Critics that answer with given values [E, B, N], whatever the question."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))

    def forward(self, observations, actions):
        assert self.values.shape[1:] == actions.shape[:2]
        return self.values


def make_agent(observation_dim=S, action_dim=A, **options):
    """Small networks with all parameters random, so that values, means and targets differ widely."""
    torch.manual_seed(0)
    options = {"device": "cpu", "hidden_dim": 8, "cql_n_actions": N, "policy_lr": 0.01, "qf_lr": 0.01} | options
    agent = cql.CQL(cql.TrainConfig(**options), observation_dim, action_dim)
    with torch.no_grad():
        for network in (agent.actor, agent.critic, agent.target_critic):
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return agent


def make_batch(observation_dim=S, action_dim=A, batch_size=B):
    observations, next_observations = torch.randn(2, batch_size, observation_dim)
    terminals = (torch.arange(batch_size) == 1).double()
    actions = torch.empty(batch_size, action_dim).uniform_(-1, 1)
    return cql.Batch(observations, actions, torch.randn(batch_size), next_observations, terminals)


def updated(batches=3, change=None, **options):
    """An agent after some updates, and the metrics of the last one."""
    agent = make_agent(**options)
    if change:
        change(agent)
    for i in range(batches):
        torch.manual_seed(i)
        metrics = agent.update(make_batch())
    return agent, metrics


def same(network, other):
    return all(torch.equal(x, y) for x, y in zip(network.parameters(), other.parameters()))


def critic_loss(values, log_prob=None, td_target=None, **options):
    """The file's critic loss where Q is `values` [E, B, 1 + 3N] (data, random, next, current) and log p [B, 3N]."""
    agent = make_agent(**options)
    agent.critic = Values(values)
    _, batch_size, n_actions = agent.critic.values.shape
    batch, proposals = make_batch(batch_size=batch_size), torch.zeros(batch_size, n_actions - 1, A)
    td_target = agent.critic.values[0, :, 0].detach() if td_target is None else torch.tensor(td_target)
    log_prob = torch.zeros(batch_size, n_actions - 1) if log_prob is None else torch.as_tensor(log_prob)
    return agent, *agent.critic_loss(batch, td_target, proposals, log_prob)


def parameters(agent, name):
    return agent.optimizers[name].param_groups[0]["params"]


def close(actual, expected, tolerance=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


# The TD loss.


def test_td_loss_is_the_squared_error_without_a_half():
    """Errors 1 and 3 of the first critic, 0 and 4 of the second: means 5 and 8."""
    agent, loss, gap, metrics = critic_loss([[[2.0], [3.0]], [[1.0], [4.0]]], td_target=[1.0, 0.0], cql_alpha=0)
    assert loss == 13 and metrics["qf1_loss"] == 5 and metrics["qf2_loss"] == 8 and not gap.any()
    assert metrics["average_qf1"] == metrics["average_qf2"] == 2.5 and metrics["average_target_q"] == 0.5
    loss.backward()
    assert agent.critic.values.grad.flatten().tolist() == [1.0, 3.0, 0.0, 4.0]  # 2 errors / B


def test_only_terminals_stop_the_bootstrap():
    """A time-out is no terminal. Q'(s', a') is the least of 10 s' + a' and 20."""
    data = {
        "observations": np.zeros((3, 1)), "actions": np.zeros((3, 1)), "next_observations": np.array([[1], [2], [1]]),
        "rewards": np.array([1, 2, 3]), "terminals": np.array([0, 1, 0]), "timeouts": np.array([0, 0, 1]),
    }  # fmt: skip
    batch = cql.ReplayBuffer(data, "cpu").rows(slice(None))
    agent = make_agent(1, 1, discount=0.5)
    agent.critic = None  # the target critic's values alone count
    agent.target_critic = Formulas(lambda s, a: 10 * s + a, lambda s, a: 0 * s + 20)
    target = agent.td_target(batch, torch.full((3, 1, 1), 0.5), torch.full((3, 1), 7.0))
    assert target.tolist() == [1 + 0.5 * 10.5, 2, 3 + 0.5 * 10.5]


TWO_CRITICS = [[[1.0, 5.0, 0.0]], [[4.0, 2.0, 3.0]]]  # least values of three actions: 1, 2, 0


def test_max_backup_is_the_largest_of_the_least_values():
    """The critics' own largest values are 5 and 4: the least of these would be 4."""
    agent, batch = make_agent(discount=0.5), make_batch(batch_size=1)
    agent.target_critic = Values(TWO_CRITICS)
    assert close(agent.td_target(batch, torch.zeros(1, 3, A), torch.zeros(1, 3)), batch.rewards + 0.5 * 2)


def test_entropy_in_the_backup_is_that_of_the_chosen_action():
    options = {"discount": 0.5, "backup_entropy": True, "use_automatic_entropy_tuning": False, "alpha_multiplier": 10}
    agent, batch = make_agent(**options), make_batch(batch_size=1)
    agent.target_critic = Values(TWO_CRITICS)
    target = agent.td_target(batch, torch.zeros(1, 3, A), torch.tensor([[0.1, 0.2, 0.3]]))
    assert close(target, batch.rewards + 0.5 * (2 - 10 * 0.2)) and not target.requires_grad


# The penalty.


def log_integral(formula, temperature):
    a = torch.linspace(-1, 1, 200_001)
    return temperature * torch.trapezoid((formula(a) / temperature).exp(), a).log()


@pytest.mark.parametrize("temperature", (1.0, 0.25, 3.0))
def test_estimator_approaches_the_log_integral(temperature):
    """From below, as the number of proposals grows; uniform and tanh-Gaussian ones together, each with its density.
    A formula of (Q - log p) / T would end (1 - T) log 2 and more above."""

    def formula(s, a):
        return torch.sin(3 * a) + s * a

    truth = torch.stack([log_integral(lambda a, s=s: formula(s, a), temperature) for s in (-1.0, 0.0, 2.0)])
    errors = []
    for n in (1, 10, 1000):
        agent = make_agent(1, 1, cql_n_actions=n, cql_temp=temperature)
        agent.critic = agent.target_critic = Formulas(formula, formula)
        states = torch.tensor([-1.0, 0.0, 2.0]).repeat(30_000 // n).unsqueeze(1)
        batch = make_batch(1, 1, len(states))._replace(observations=states)
        mean = torch.tensor([[0.4], [-0.6]]).repeat_interleave(len(states), dim=0)
        _, proposals, log_prob = agent.propose(
            batch, mean, torch.full_like(mean, 0.1), agent.draw_noise(len(batch.rewards))
        )
        _, gap, metrics = agent.critic_loss(batch, batch.rewards, proposals, log_prob)
        log_mean = gap[0] + metrics["average_qf1"] - temperature * math.log(3 * n)
        errors.append((log_mean - truth.mean()).item() / max(1, temperature))
    assert errors[0] < -0.02 and errors[0] < errors[1] < 0.005 and abs(errors[2]) < 0.005


@pytest.mark.parametrize("n, action_dim, expected", ((10, 3, 5.48), (10, 6, 7.56), (10, 24, 20.04), (4, 1, 3.18)))
def test_gap_of_a_constant_q(n, action_dim, expected):
    """d log 2 + log 3N with the density of uniform proposals, and no net gap at any temperature."""
    for temperature in (1.0, 4.0):
        agent = make_agent(1, action_dim, cql_temp=temperature)
        agent.critic = Values(torch.full((2, B, 1 + 3 * n), 7.0))
        densities = torch.full((B, 3 * n), -action_dim * math.log(2))
        _, gap, metrics = agent.critic_loss(
            make_batch(1, action_dim), torch.zeros(B), torch.zeros(B, 3 * n, action_dim), densities
        )
        assert close(gap, temperature * (action_dim * math.log(2) + math.log(3 * n)) * torch.ones(2))
        assert close(metrics["cql_net_gap"], 0.0) and abs(gap[0] / temperature - expected) < 0.006


def test_gap_does_not_see_a_shift_of_q():
    values, log_prob = torch.randn(2, B, 7), torch.randn(B, 6)
    for option in (True, False):
        _, _, gap, _ = critic_loss(values, log_prob, cql_importance_sample=option, cql_temp=2.0)
        _, _, shifted, _ = critic_loss(values + 100, log_prob, cql_importance_sample=option, cql_temp=2.0)
        assert close(gap, shifted)


Q_1, Q_2 = [5.0, *map(math.log, (1, 2, 3))], [6.0, *map(math.log, (4, 4, 5))]  # data action, then a proposal a source
DENSITIES = [list(map(math.log, (0.5, 0.25, 1)))]


def test_importance_sampling_divides_by_the_density():
    """1 / 0.5 + 2 / 0.25 + 3 = 13 for the first critic, 4 / 0.5 + 4 / 0.25 + 5 = 29 for the second."""
    _, loss, gap, metrics = critic_loss([[Q_1], [Q_2]], DENSITIES, [5.0], cql_alpha=10)
    assert close(gap, [math.log(13) - 5, math.log(29) - 6])
    assert close(loss, 1 + 10 * gap.sum())  # the second critic's TD error is 1
    net_gap = (math.log(13) + math.log(29) - 11) / 2 - math.log(3) - A * math.log(2)
    hand = {
        "cql_q1_rand": 0, "cql_q1_next_actions": math.log(2), "cql_q1_current_actions": math.log(3),
        "cql_q2_rand": math.log(4), "cql_q2_next_actions": math.log(4), "cql_q2_current_actions": math.log(5),
        "cql_weight_rand": (2 / 13 + 8 / 29) / 2, "cql_weight_next_actions": (8 / 13 + 16 / 29) / 2,
        "cql_weight_current_actions": (3 / 13 + 5 / 29) / 2, "cql_std_q1": np.std(Q_1, ddof=1),
        "cql_std_q2": np.std(Q_2, ddof=1), "cql_qf1_diff": math.log(13) - 5, "cql_qf2_diff": math.log(29) - 6,
        "cql_min_qf1_loss": 10 * math.log(13) - 50, "cql_min_qf2_loss": 10 * math.log(29) - 60,
        "cql_net_gap": net_gap, "cql_clipped_share": 0, "cql_effective_weight": 10,
        "qf1_loss": 0, "qf2_loss": 1, "average_qf1": 5, "average_qf2": 6, "average_target_q": 5,
    }  # fmt: skip
    assert metrics.keys() == hand.keys()
    assert {name for name in hand if not close(metrics[name], hand[name])} == set()


def test_temperature_divides_q_and_not_the_density():
    """2 log(1 / 0.5 + 2 / 0.25 + 3) where Q = 2 log 1, 2 log 2, 2 log 3."""
    doubled = [2 * x for x in Q_1]
    _, _, gap, _ = critic_loss([[doubled], [doubled]], DENSITIES, cql_temp=2.0)
    assert close(gap, 2 * torch.full((2,), math.log(13) - 5))


def test_without_importance_sampling_the_data_joins_the_sum_and_densities_do_not():
    values = [[list(map(math.log, (4, 1, 2, 3)))]] * 2
    for temperature in (1.0, 2.0):
        scaled = temperature * torch.tensor(values)
        _, _, gap, metrics = critic_loss(scaled, [[math.nan] * 3], cql_importance_sample=False, cql_temp=temperature)
        assert close(gap, temperature * torch.full((2,), math.log(10 / 4)))
        assert close(metrics["cql_weight_rand"], 0.1) and close(metrics["cql_weight_current_actions"], 0.3)
        assert close(metrics["cql_net_gap"], temperature * math.log(10 / 4 / 4))


def test_gradient_of_the_penalty_is_softmax_up_and_data_down():
    """Weights of the descent, for Q = 1, 2, 3 in two states: softmax on proposals, -1 on data; a half each."""
    agent, loss, _, _ = critic_loss([[[0.0, 1.0, 2.0, 3.0]] * 2] * 2, cql_alpha=1)
    loss.backward()
    assert close(2 * agent.critic.values.grad, torch.tensor([-1, 0.09003057, 0.24472847, 0.66524096]), 1e-8)


def test_penalty_is_at_the_state_of_the_batch():
    """Q(s, a) = s a, s = 2: the next state 50 does not show, though next actions are proposals."""
    batch = make_batch(1, 1, 1)._replace(observations=torch.tensor([[2.0]]), next_observations=torch.tensor([[50.0]]))
    batch = batch._replace(actions=torch.tensor([[0.5]]))
    agent = make_agent(1, 1)
    agent.critic = Formulas(lambda s, a: s * a, lambda s, a: s * a)
    proposals = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1)
    _, gap, metrics = agent.critic_loss(batch, torch.zeros(1), proposals, torch.zeros(1, 3))
    assert close(gap[0], math.log(math.exp(0.2) + math.exp(0.4) + math.exp(0.6)) - 1)
    assert close(metrics["average_qf1"], 1.0)


CONSTANT = math.log(3)  # gap of three equal values with log-densities 0, for a data value of 0
CLIP_VALUES = [[[0.0, x, x, x] for x in (-5.0, 0.5, 1.0, 9.0)]] * 2


def test_clip_acts_on_each_state():
    """Gaps -5, 0.5, 1 and 9 (plus log 3), clipped to [0, 4]: the first and the last stop and lose their gradient."""
    options = {"cql_clip_diff_min": 0.0, "cql_clip_diff_max": 4.0, "cql_alpha": 1.0}
    agent, loss, gap, metrics = critic_loss(CLIP_VALUES, **options)
    expected = (0 + 0.5 + 1 + 4 + 2 * CONSTANT) / 4
    assert close(gap, [expected] * 2) and close(metrics["cql_qf1_diff"], expected)
    assert metrics["cql_clipped_share"] == 0.5
    assert close(metrics["cql_net_gap"], (-5 + 0.5 + 1 + 9) / 4 - A * math.log(2))  # net of what is before the clip
    loss.backward()
    assert agent.critic.values.grad.abs().sum(dim=-1).bool().tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("low, high, share", ((-INF, INF, 0), (-INF, 1.7, 0.5), (0.0, INF, 0.25), (-INF, -20.0, 1)))
def test_either_clip_may_be_open(low, high, share):
    agent, _, gap, metrics = critic_loss(CLIP_VALUES, cql_clip_diff_min=low, cql_clip_diff_max=high)
    assert metrics["cql_clipped_share"] == share
    assert close(gap, np.clip(np.array([-5, 0.5, 1, 9]) + CONSTANT, low, high).mean() * torch.ones(2))


def test_proposals_are_constants_in_the_order_random_next_current():
    agent, batch = make_agent(1, A, cql_n_actions=4000, cql_max_target_backup=True, discount=0.5), make_batch(1, A, 1)
    mean = torch.tensor([[0.5, -0.5], [-0.2, 0.7]], requires_grad=True)  # at s, at s'
    log_std = torch.tensor([[-0.5, -1.0], [0.1, -0.3]], requires_grad=True)
    target, proposals, log_prob = agent.propose(batch, mean, log_std, agent.draw_noise(len(batch.rewards)))
    assert proposals.shape == (1, 12000, A) and log_prob.shape == (1, 12000)
    assert not (target.requires_grad or proposals.requires_grad or log_prob.requires_grad)
    random, following, current = proposals[0].chunk(3)
    assert random.min() < -0.99 and random.max() > 0.99 and random.mean(0).abs().max() < 0.03
    assert close(log_prob[0, :4000], torch.full((4000,), math.log(1 / 4)))  # 1 / 2^A
    for i, actions in ((0, current), (1, following)):
        z = actions.atanh()
        assert close(z.mean(0), mean[i], 0.06) and close(z.std(0), log_std[i].exp(), 0.06)
        density = TransformedDistribution(Normal(mean[i], log_std[i].exp()), TanhTransform())
        assert close(log_prob[0, 8000 - 4000 * i :][:4000], density.log_prob(actions).sum(-1), 1e-7)
    best = agent.target_critic(batch.next_observations, following[None]).min(dim=0).values.max()
    assert close(target, batch.rewards + 0.5 * best)


def test_target_is_of_one_sample_of_the_policy():
    """Neither its mean nor the best of the proposals, unless cql_max_target_backup asks for that."""
    agent, batch = make_agent(1, 1, discount=0.5, cql_n_actions=3), make_batch(1, 1, 1)
    agent.target_critic = Formulas(lambda s, a: a, lambda s, a: a)
    target, proposals, _ = agent.propose(
        batch, torch.zeros(2, 1), torch.zeros(2, 1), agent.draw_noise(len(batch.rewards))
    )
    assert close((target - batch.rewards) / 0.5, proposals[:, 3, 0])


def test_penalty_moves_critics_only():
    """After one update neither actor nor entropy coefficient has seen how heavy the penalty is; critics have."""
    (light, _), (heavy, _) = updated(batches=1, cql_alpha=0.1), updated(batches=1, cql_alpha=10)
    assert same(light.actor, heavy.actor) and torch.equal(light.log_alpha, heavy.log_alpha)
    assert all((x.grad != y.grad).any() for x, y in zip(light.critic.parameters(), heavy.critic.parameters()))


def test_without_the_penalty_the_critics_are_those_of_sac():
    """No proposals are drawn, and the loss is the mean squared error to the target alone."""
    agent, batch = make_agent(cql_alpha=0.0), make_batch()
    mean, log_std = torch.zeros(2, 2 * B, A)
    noise = agent.draw_noise(B)
    assert [x.numel() for x in noise] == [2 * B * A, 0, B * A, 0]
    target, proposals, log_prob = agent.propose(batch, mean, log_std, noise)
    assert proposals.shape == (B, 0, A) and log_prob.shape == (B, 0)
    next_actions, _ = cql.sample_actions(mean, log_std, noise.next_and_current)
    next_q = agent.target_critic(batch.next_observations, next_actions[B:]).squeeze(-1).min(dim=0).values
    assert close(target, batch.rewards + 0.99 * (1 - batch.terminals) * next_q)
    loss, gap, metrics = agent.critic_loss(batch, target, proposals, log_prob)
    q = agent.critic(batch.observations, batch.actions.unsqueeze(1)).squeeze(-1)
    assert close(loss, sum(nn.functional.mse_loss(member, target) for member in q)) and not gap.any()
    assert not any(name.startswith("cql") for name in metrics)


# The Lagrange multiplier.


def test_weight_with_a_multiplier_is_alpha_prime_times_cql_alpha():
    """alpha' is e at first: e 10 (gap - 2), with gaps log 13 - 5 and log 29 - 6."""
    options = {"cql_lagrange": True, "cql_target_action_gap": 2.0, "cql_alpha": 10}
    agent, loss, gap, metrics = critic_loss([[Q_1], [Q_2]], DENSITIES, [5.0], **options)
    penalties = math.e * 10 * (torch.tensor([math.log(13) - 5, math.log(29) - 6]) - 2)
    assert close(loss, 1 + penalties.sum()) and close(metrics["cql_min_qf2_loss"], penalties[1])
    assert close(metrics["cql_effective_weight"], math.e * 10)
    assert torch.autograd.grad(loss, agent.log_alpha_prime, allow_unused=True) == (None,)
    assert not gap.requires_grad


@pytest.mark.parametrize("gap, alpha_prime", ((12.0, 1.97), (3.0, 0.58)))
def test_multiplier_grows_while_the_gap_is_above_its_target(gap, alpha_prime):
    """From 1, in 2000 steps of rate 3e-4, for a target of 5."""
    agent = make_agent(cql_lagrange=True, cql_target_action_gap=5.0, qf_lr=3e-4)
    agent.log_alpha_prime.data.zero_()
    loss = agent.alpha_prime_loss(torch.tensor([gap + 1, gap - 1]))
    assert close(torch.autograd.grad(loss, agent.log_alpha_prime)[0], -10 * (gap - 5))
    for _ in range(2000):
        agent.step(
            "alpha_prime",
            torch.autograd.grad(agent.alpha_prime_loss(torch.tensor([gap + 1, gap - 1])), [agent.log_alpha_prime]),
        )
    assert abs(agent.log_alpha_prime.exp() - alpha_prime) < 0.01


@pytest.mark.parametrize("target, change", ((-1e3, 0.0), (1e3, -0.01)))
def test_multiplier_stays_below_a_million_and_comes_down_again(target, change):
    def fill(agent):
        agent.log_alpha_prime.data.fill_(math.log(1e6))

    agent, metrics = updated(batches=1, change=fill, cql_lagrange=True, cql_target_action_gap=target)
    assert close(metrics["alpha_prime"], 1e6) and close(agent.log_alpha_prime, math.log(1e6) + change)


# The policy: density, loss, warm start, entropy.


def test_density_is_exact():
    mean, log_std = torch.randn(4, 3), torch.randn(4, 3).clamp(-1, 1)
    actions, log_prob = cql.sample_actions(mean, log_std, torch.randn(len(mean), 6, mean.shape[1]))
    density = TransformedDistribution(Normal(mean[:, None], log_std.exp()[:, None]), TanhTransform())
    assert actions.shape == (4, 6, 3) and close(log_prob, density.log_prob(actions).sum(-1), 1e-6)


@pytest.mark.parametrize("mean, log_std", ((0.0, 0.0), (1.5, -1.0), (-0.7, 0.7)))
def test_density_integrates_to_one(mean, log_std):
    z = torch.linspace(-15, 15, 300_001)
    mean, log_std = torch.tensor([mean]), torch.tensor([log_std])
    log_prob = cql.tanh_gaussian_log_prob(z[:, None], (z[:, None] - mean) / log_std.exp(), log_std)
    assert close(torch.trapezoid(log_prob.exp(), z.tanh()), 1.0, 1e-6)


@pytest.mark.parametrize("z, log_jacobian", ((8.0, -14.61), (10.0, -18.61), (15.0, -28.61), (-30.0, -58.61)))
def test_density_far_out(z, log_jacobian):
    """In float32, where 1 - tanh(z)^2 is 0: finite with finite gradients, and not that of log(1 - tanh(z)^2 + 1e-6)."""
    pre_tanh = torch.tensor([z], dtype=torch.float32, requires_grad=True)
    log_prob = cql.tanh_gaussian_log_prob(pre_tanh, *torch.zeros(2, 1, dtype=torch.float32))
    assert abs(log_prob.item() + 0.5 * math.log(2 * math.pi) + log_jacobian) < 0.01
    log_prob.backward()
    assert close(pre_tanh.grad, 2 * math.tanh(z), 1e-3)


def test_samples_carry_the_gradient_of_the_policy():
    mean, log_std = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    actions, _ = cql.sample_actions(mean, log_std, torch.randn(len(mean), 1, mean.shape[1]))
    gradients = torch.autograd.grad(actions.sum(), (mean, log_std))
    slope = (1 - actions**2).squeeze()
    assert close(gradients[0], slope) and close(gradients[1], slope * actions.atanh().squeeze())


def test_policy_loss_takes_the_least_value_of_each_state():
    """Least of (1, 5) and (4, 2): 1 and 2. E[10 log pi - Q] with log pi of 0.1 and 0.3, so a half of 1 - 1 + 3 - 2."""
    agent = make_agent(use_automatic_entropy_tuning=False, alpha_multiplier=10)
    agent.critic = Values([[[1.0], [5.0]], [[4.0], [2.0]]])
    assert close(agent.policy_loss(make_batch(batch_size=2), torch.zeros(2, A), torch.tensor([0.1, 0.3])), 0.5)


def test_policy_loss_is_at_the_state_of_the_batch():
    agent, batch = make_agent(1, 1, use_automatic_entropy_tuning=False, alpha_multiplier=0), make_batch(1, 1)
    agent.critic = Formulas(lambda s, a: s + a, lambda s, a: s + a + 1)
    assert close(agent.policy_loss(batch, batch.actions, torch.zeros(B)), -(batch.observations + batch.actions).mean())


@pytest.mark.parametrize("bc_steps", (0, 10))
def test_losses_of_the_policy_move_neither_critics_nor_alpha(bc_steps):
    """After one update the actor has seen another entropy coefficient; the critics and log_alpha have not."""
    (small, _), (large, _) = (
        updated(batches=1, bc_steps=bc_steps, alpha_multiplier=multiplier) for multiplier in (0.1, 10)
    )
    assert same(small.critic, large.critic) and torch.equal(small.log_alpha.grad, large.log_alpha.grad)
    assert not same(small.actor, large.actor)


def test_cloning_loss_is_the_likelihood_of_the_data():
    """E[alpha log pi(a) - log pi(a_data)], of the actions in the data and no others."""
    agent, batch = make_agent(), make_batch()
    mean, log_std = agent.actor(batch.observations)
    density = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    log_prob, data_log_prob = torch.randn(B), density.log_prob(0.9 * batch.actions).sum(-1)
    loss = agent.cloning_loss(batch._replace(actions=0.9 * batch.actions), mean, log_std, log_prob)
    assert close(loss, (agent.alpha * log_prob - data_log_prob).mean())
    assert (agent.cloning_loss(batch, mean, log_std, log_prob) - loss).abs() > 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_cloning_loss_is_finite_at_the_ends(dtype):
    agent = make_agent().to(dtype)
    batch, log_prob = cql.Batch(*(x.to(dtype) for x in make_batch())), torch.zeros(B, dtype=dtype)
    for end in (1, -1):
        mean, log_std = agent.actor(batch.observations)
        losses = [
            agent.cloning_loss(batch._replace(actions=torch.full_like(batch.actions, x)), mean, log_std, log_prob)
            for x in (end, 0.999 * end)
        ]
        assert close(*losses, 1e-3)
        assert all(x.isfinite().all() for x in torch.autograd.grad(losses[0], agent.actor.parameters()))


def test_cloning_raises_the_likelihood_of_the_data():
    """After 100 updates the policy's mean is nearly the function of the state that the data's actions are."""
    agent, batch = make_agent(bc_steps=100, alpha_multiplier=0.0, hidden_dim=32), make_batch(batch_size=32)
    batch = batch._replace(actions=batch.observations[:, :A].sin() * 0.8)
    distance = []
    for _ in range(101):
        distance.append((agent.actor(batch.observations)[0].tanh() - batch.actions).square().mean().item())
        agent.update(batch)
    assert distance[-1] < 0.1 * distance[0]


def test_cloning_lasts_for_the_first_updates_and_critics_train_as_usual():
    def at(n_updates):
        return lambda agent: setattr(agent, "n_updates", n_updates)

    usual, _ = updated(batches=1)
    for n_updates, clones in ((0, True), (6, True), (7, False), (8, False)):
        agent, _ = updated(batches=1, change=at(n_updates), bc_steps=7)
        assert same(agent.actor, usual.actor) != clones and same(agent.critic, usual.critic)
        assert agent.n_updates == n_updates + 1


def test_entropy_coefficient_rises_while_entropy_is_below_minus_a():
    """Entropy is -E[log pi]; the gradient is its excess over -A = -2."""
    agent = make_agent()
    for log_prob, gradient in ((2.5, -0.5), (1.5, 0.5), (2.0, 0.0)):
        loss = agent.alpha_loss(torch.tensor([log_prob - 1, log_prob + 1], requires_grad=True))
        assert torch.autograd.grad(loss, agent.log_alpha) == (gradient,)
    agent.step("alpha", torch.autograd.grad(agent.alpha_loss(torch.tensor([2.5])), [agent.log_alpha]))
    assert close(agent.alpha, math.exp(0.01)) and not agent.alpha.requires_grad


def test_alpha_multiplier_is_a_factor_or_the_coefficient_itself():
    tuned, metrics = updated(alpha_multiplier=3.0)
    assert close(tuned.alpha, 3 * tuned.log_alpha.exp()) and tuned.log_alpha != 0 and "alpha_loss" in metrics
    fixed, metrics = updated(alpha_multiplier=3.0, use_automatic_entropy_tuning=False)
    assert fixed.alpha == metrics["alpha"] == 3 and fixed.log_alpha == 0 and "alpha_loss" not in metrics


# Networks and target critics.


@pytest.mark.parametrize("orthogonal", (True, False))
def test_orthogonal_init_reaches_all_layers_of_all_networks(orthogonal):
    agent = cql.CQL(cql.TrainConfig(device="cpu", hidden_dim=16, orthogonal_init=orthogonal), S, A)
    linear = [layer for layer in agent.actor.hidden if isinstance(layer, nn.Linear)]
    hidden, biases = [layer.weight for layer in linear], [layer.bias for layer in linear] + [agent.actor.head.bias]
    last = [agent.actor.head.weight]
    for critic in (agent.critic, agent.target_critic):
        hidden += [weight[e] for weight in critic.weights[:-1] for e in (0, 1)]
        last += [critic.weights[-1][e] for e in (0, 1)]
        biases += critic.biases
    assert len(hidden) == 3 + 2 * 6
    for gain, weights in ((math.sqrt(2), hidden), (0.01, last)):
        spread = [torch.linalg.svdvals(weight) / gain - 1 for weight in weights]
        assert all((x.abs().max() < 1e-6) == orthogonal for x in spread)
    assert max(weight.abs().max() for weight in last) < 0.02  # a small gain either way
    assert all((bias == 0).all() for bias in biases) == orthogonal
    assert (agent.actor.head.bias == 0).all() and (agent.critic.biases[-1] == 0).all()


def test_depths_and_width_reach_all_networks():
    agent = cql.CQL(cql.TrainConfig(device="cpu", hidden_dim=7, policy_n_hidden_layers=2, q_n_hidden_layers=4), S, A)
    shapes = [tuple(layer.weight.shape) for layer in [*agent.actor.hidden[::2], agent.actor.head]]
    assert shapes == [(7, S), (7, 7), (2 * A, 7)]
    for critic in (agent.critic, agent.target_critic):
        assert [tuple(x.shape) for x in critic.weights] == [(2, S + A, 7)] + [(2, 7, 7)] * 3 + [(2, 7, 1)]


def test_critics_start_apart_and_their_targets_with_them():
    agent = cql.CQL(cql.TrainConfig(device="cpu", hidden_dim=16), S, A)
    assert all((weight[0] != weight[1]).all() for weight in agent.critic.weights)
    assert same(agent.critic, agent.target_critic)
    assert not any(
        x.requires_grad or x is y for x, y in zip(agent.target_critic.parameters(), agent.critic.parameters())
    )


def mlp(critic, member):
    """One critic of the ensemble as a network of its own, (s, a) [..., S + A] -> [..., 1]."""
    layers = []
    for weight, bias in zip(critic.weights, critic.biases):
        layers += [nn.Linear(*weight.shape[1:]), nn.ReLU()]
        layers[-2].weight.data.copy_(weight[member].T)
        layers[-2].bias.data.copy_(bias[member, 0])
    return nn.Sequential(*layers[:-1])


def test_ensemble_is_two_networks():
    agent, batch, actions = make_agent(), make_batch(), torch.randn(B, 4, A)
    q = agent.critic(batch.observations, actions)
    assert q.shape == (2, B, 4)
    for e, b, n in np.ndindex(*q.shape):
        assert close(q[e, b, n], mlp(agent.critic, e)(torch.cat([batch.observations[b], actions[b, n]])).squeeze())


def test_log_std_is_scaled_shifted_and_bounded():
    """multiplier * network - 1, both learned, between -20 and 2; the mean is the network's."""
    agent, plain = make_agent(policy_log_std_multiplier=0.5), make_agent()
    for actor, multiplier in ((agent.actor, 0.5), (plain.actor, 1.0)):
        actor.log_std_multiplier.data.fill_(multiplier)
        actor.log_std_offset.data.fill_(-1)
    observations = 0.1 * torch.randn(B, S)
    assert close(agent.actor(observations)[0], plain.actor(observations)[0])
    assert close(agent.actor(observations)[1] + 1, 0.5 * (plain.actor(observations)[1] + 1))
    for bias, bound in ((100, 2), (-100, -20)):
        plain.actor.head.bias.data[A:] = bias
        assert (plain.actor(observations)[1] == bound).all()
    fresh = cql.CQL(cql.TrainConfig(device="cpu", hidden_dim=8, policy_log_std_multiplier=0.0), S, A)
    assert (fresh.actor(observations)[1] == -1).all()
    fresh.update(make_batch())
    assert fresh.actor.log_std_multiplier != 0 and fresh.actor.log_std_offset != -1


def test_target_critics_follow_by_polyak_averages_every_period():
    agent = make_agent(soft_target_update_rate=0.25, target_update_period=3)
    for i in range(1, 7):
        before = copy.deepcopy(agent.target_critic)
        agent.update(make_batch())
        rate = 0.25 if i % 3 == 0 else 0.0
        for old, new, source in zip(*(x.parameters() for x in (before, agent.target_critic, agent.critic))):
            assert close(new, (1 - rate) * old + rate * source, 1e-12)


def test_predicted_values_are_the_least_of_the_mean_action():
    """Raw observations 5 and 7 are 1 and 2 after scaling; the mean action is tanh(s / 2), the least value 10 s - a."""
    agent, scaling = make_agent(1, 1), {"observation_mean": torch.tensor([3.0]), "observation_std": torch.tensor([2.0])}
    agent.actor.load_state_dict(scaling, strict=False)
    agent.actor.forward = lambda s: (s / 2, torch.zeros_like(s))
    agent.critic = Formulas(lambda s, a: 10 * s + a, lambda s, a: 10 * s - a)
    assert agent.start_values(np.array([[5.0], [7.0]])) == pytest.approx([10 - math.tanh(0.5), 20 - math.tanh(1)])


def test_holdout_metrics_leave_training_as_it_was():
    agent, batch = make_agent(), make_batch()
    state, parameters = torch.get_rng_state(), copy.deepcopy(agent.state_dict())
    first, second = agent.holdout_metrics(batch), agent.holdout_metrics(batch)
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, parameters[name]) for name, value in agent.state_dict().items())
    torch.manual_seed(agent.config.eval_seed)
    proposed = agent.propose(
        batch,
        *agent.actor(torch.cat([batch.observations, batch.next_observations])),
        agent.draw_noise(len(batch.rewards)),
    )
    q = agent.critic(batch.observations, batch.actions.unsqueeze(1)).squeeze(-1)
    assert first == pytest.approx(
        {
            "holdout_td_error": (q - proposed[0]).square().mean().item(),
            "holdout_gap": agent.critic_loss(batch, *proposed)[1].mean().item(),
            "holdout_q": q.mean().item(),
        }
    )


# The whole update.


def slow_losses(agent, batch):
    """The losses of the next update from their formulas, in loops over states, critics and actions."""
    config = agent.config
    temperature, low, high = config.cql_temp, config.cql_clip_diff_min, config.cql_clip_diff_max
    alpha = config.alpha_multiplier * (agent.log_alpha.exp().item() if config.use_automatic_entropy_tuning else 1)
    weight = config.cql_alpha * (agent.log_alpha_prime.exp().item() if config.cql_lagrange else 1)
    target_gap = config.cql_target_action_gap if config.cql_lagrange else 0
    noise = torch.randn(2 * B, config.cql_n_actions if config.cql_alpha or config.cql_max_target_backup else 1, A)
    random = torch.empty(B, config.cql_n_actions, A).uniform_(-1, 1) if config.cql_alpha else torch.empty(B, 0, A)
    policy_noise = torch.randn(B, A)

    def act(s, noise):
        mean, log_std = agent.actor(s)
        z = mean + log_std.exp() * noise
        return z.tanh(), (Normal(mean, log_std.exp()).log_prob(z) - (1 - z.tanh() ** 2).log()).sum()

    def q_values(network, s, a):
        return network(s[None], a[None, None]).flatten()  # of both critics

    critic_loss = policy_loss = mean_log_prob = mean_gap = 0
    for b, (s, a, r, next_s, terminal) in enumerate(zip(*batch)):
        with torch.no_grad():
            current, following = [act(s, x) for x in noise[b]], [act(next_s, x) for x in noise[B + b]]
        backups = following if config.cql_max_target_backup else following[:1]
        value, log_prob = max((q_values(agent.target_critic, next_s, x).min(), log_p) for x, log_p in backups)
        value = value - alpha * log_prob if config.backup_entropy else value
        y = r + config.discount * (1 - terminal) * value
        proposals = [(x, torch.tensor(-A * math.log(2))) for x in random[b]] + following + current
        for e in (0, 1):
            q_data = q_values(agent.critic, s, a)[e]
            critic_loss += (q_data - y.detach()) ** 2 / B
            if config.cql_importance_sample:
                terms = [(q_values(agent.critic, s, x)[e] / temperature).exp() / log_p.exp() for x, log_p in proposals]
            else:
                terms = [(q_values(agent.critic, s, x)[e] / temperature).exp() for x in [a] + [x for x, _ in proposals]]
            if config.cql_alpha:
                gap = (temperature * sum(terms).log() - q_data).clamp(low, high)
                critic_loss += weight * (gap - target_gap) / B
                mean_gap += gap.item() / (2 * B)

        action, log_prob = act(s, policy_noise[b])
        objective = q_values(agent.critic, s, action).min()
        if agent.n_updates < config.bc_steps:
            mean, log_std = agent.actor(s)
            density = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
            objective = density.log_prob(a.clamp(-0.999, 0.999)).sum()
        policy_loss += (alpha * log_prob - objective) / B
        mean_log_prob += log_prob.item() / B

    losses = {"critic": critic_loss, "actor": policy_loss}
    if config.use_automatic_entropy_tuning:
        losses["alpha"] = -agent.log_alpha * (mean_log_prob - A)
    if config.cql_lagrange:
        losses["alpha_prime"] = -agent.log_alpha_prime.exp() * config.cql_alpha * (mean_gap - target_gap)
    return losses


MAX, TUNED = {"cql_max_target_backup": True}, {"cql_lagrange": True, "cql_target_action_gap": 3.0}
CLIPPED, PLAIN = {"cql_clip_diff_min": 2.3, "cql_clip_diff_max": 3.0}, {"cql_importance_sample": False}
ENTROPY, WARM = {"backup_entropy": True}, {"bc_steps": 10}


@pytest.mark.parametrize(
    "options",
    (
        {}, PLAIN, TUNED, MAX, ENTROPY, WARM, CLIPPED, {"cql_temp": 2.0}, {"cql_alpha": 0.0}, {"cql_alpha": 0.0} | MAX,
        {"use_automatic_entropy_tuning": False, "alpha_multiplier": 0.3} | ENTROPY, {"cql_temp": 0.5} | PLAIN | TUNED,
        MAX | TUNED | CLIPPED | ENTROPY | WARM, MAX | ENTROPY | {"alpha_multiplier": 2.0, "cql_temp": 3.0},
    ),
    ids=lambda options: "-".join(options) or "defaults",
)  # fmt: skip
def test_update_is_that_of_the_formulas(options):
    """The same random numbers give the same gradients, and Adam's steps down them the same parameters."""
    agent, _ = updated(**options)
    twin, batch = copy.deepcopy(agent), make_batch()
    torch.manual_seed(1)
    metrics = agent.update(batch)
    torch.manual_seed(1)
    losses = slow_losses(twin, batch)
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters(twin, name), retain_graph=True)
        for parameter, gradient in zip(parameters(twin, name), gradients):
            parameter.grad = gradient
    for name in losses:
        twin.optimizers[name].step()
        for actual, expected in zip(parameters(agent, name), parameters(twin, name)):
            assert close(actual.grad, expected.grad) and close(actual, expected), name
    logged = {"actor": "policy_loss", "alpha": "alpha_loss", "alpha_prime": "alpha_prime_loss"}
    assert {name for name in logged.keys() & losses.keys() if not close(metrics[logged[name]], losses[name])} == set()
    for name, key in (("actor", "policy_grad_norm"), ("critic", "critic_grad_norm")):
        assert close(metrics[key], torch.cat([x.grad.flatten() for x in parameters(twin, name)]).norm())
    if CLIPPED.keys() <= options.keys():
        assert 0 < metrics["cql_clipped_share"] < 1


def test_each_optimiser_has_its_learning_rate():
    """Adam's first step is as long as the rate."""
    agent = make_agent(policy_lr=0.03, qf_lr=0.02, cql_lagrange=True)
    start = copy.deepcopy(agent)
    agent.update(make_batch())
    for name, rate in (("actor", 0.03), ("alpha", 0.03), ("critic", 0.02), ("alpha_prime", 0.02)):
        steps = [(x - y).abs().max().item() for x, y in zip(parameters(agent, name), parameters(start, name))]
        assert max(steps) == pytest.approx(rate, rel=1e-4), name


# A value other than the default, and the other options without which it has no effect.
ACTS = {
    "hidden_dim": (9, {}), "policy_n_hidden_layers": (2, {}), "q_n_hidden_layers": (2, {}),
    "orthogonal_init": (False, {}), "policy_log_std_multiplier": (0.5, {}), "discount": (0.9, {}),
    "policy_lr": (1e-3, {}), "qf_lr": (1e-3, {}), "soft_target_update_rate": (0.1, {}),
    "target_update_period": (2, {}), "alpha_multiplier": (2.0, {}), "use_automatic_entropy_tuning": (False, {}),
    "backup_entropy": (True, {}), "bc_steps": (1, {}), "cql_alpha": (1.0, {}), "cql_n_actions": (3, {}),
    "cql_backprop_actions": (2, {}), "cql_importance_sample": (False, {}), "cql_temp": (2.0, {}),
    "cql_max_target_backup": (True, {}),
    "cql_clip_diff_min": (3.0, {}), "cql_clip_diff_max": (3.0, {}), "cql_lagrange": (True, {}),
    "cql_target_action_gap": (5.0, {"cql_lagrange": True}),
}  # fmt: skip


def test_table_names_every_option_of_the_method():
    names = [field.name for field in dataclasses.fields(cql.TrainConfig)]
    first, last = names.index("hidden_dim"), names.index("cql_target_action_gap")
    assert set(names[first : last + 1]) == ACTS.keys()


@pytest.mark.parametrize("name", ACTS)
def test_every_option_changes_what_is_learned(name):
    value, needed = ACTS[name]
    assert value != getattr(cql.TrainConfig(device="cpu"), name)
    (usual, _), (changed, _) = updated(**needed), updated(**needed | {name: value})
    usual, changed = usual.state_dict(), changed.state_dict()
    assert usual.keys() != changed.keys() or any(
        usual[key].shape != changed[key].shape or (usual[key] != changed[key]).any() for key in usual
    )


# The cheap gradient: through k actions, drawn by their soft-max weight.

CHEAP = [{}, PLAIN, TUNED, {"cql_temp": 2.0}, {"cql_temp": 0.5} | PLAIN | TUNED, CLIPPED]


def gradients(agent, batch, noise):
    return {
        name: torch.cat([x.flatten() for x in grads]) for name, grads in agent.gradients(batch, noise, False)[0].items()
    }


def cheap(k, **options):
    """An agent that back-propagates through all actions, and its twin that does through k."""
    agent, _ = updated(**options)
    twin = make_agent(cql_backprop_actions=k, **options)
    twin.load_state_dict(agent.state_dict())
    return agent, twin


@pytest.mark.parametrize("options", CHEAP, ids=str)
def test_expected_gradient_is_that_through_all_actions(options):
    """By enumeration: for one state, each action's gradient times its probability."""
    agent, twin = cheap(1, **options)
    for i in range(3):
        torch.manual_seed(i)
        batch, noise = make_batch(batch_size=1), agent.draw_noise(1)
        mean, log_std = agent.actor(torch.cat([batch.observations, batch.next_observations]))
        _, proposals, log_prob = agent.propose(batch, mean, log_std, noise)
        actions = torch.cat([batch.actions.unsqueeze(1), proposals], dim=1)
        scores = agent.critic(batch.observations, actions)[:, 0] / agent.config.cql_temp  # [E, 1 + 3N]
        if agent.config.cql_importance_sample:
            scores = scores[:, 1:] - log_prob
        ends = scores.softmax(dim=1).cumsum(dim=1)
        starts = ends - scores.softmax(dim=1)
        expected = 0
        for n in range(scores.shape[1]):
            choice = ((starts + ends) / 2)[:, n].view(2, 1, 1)
            found = twin.gradients(batch, noise._replace(choice=choice), False)[0]["critic"]
            weight = (ends - starts)[:, n]  # of each critic; the first axis of its parameters
            expected += torch.cat([(x * weight.view(2, *[1] * (x.dim() - 1))).flatten() for x in found])
        assert close(expected, gradients(agent, batch, noise)["critic"])


@pytest.mark.parametrize("options", CHEAP, ids=str)
def test_losses_are_the_same_whatever_is_drawn(options):
    agent, twin = cheap(2, **options)
    batch, noise = make_batch(), twin.draw_noise(B)
    (gradient, metrics), (other, cheap_metrics) = (x.gradients(batch, noise, False) for x in (agent, twin))
    assert noise.choice.shape == (2, B, 2) and metrics.keys() == cheap_metrics.keys()
    assert {key for key in metrics if not close(metrics[key], cheap_metrics[key])} == {"critic_grad_norm"}
    for name in gradient.keys() - {"critic"}:
        assert all(torch.equal(x, y) for x, y in zip(gradient[name], other[name]))


def test_share_of_each_action_is_its_weight():
    """Over many draws, at the borders of the cumulative weights too."""
    agent = make_agent(cql_backprop_actions=1000)
    agent.critic = Values([[[1.0, 5.0, 6.0, 7.0]] * 2, [[1.0, 3.0, 2.0, 1.0]] * 2])
    agent.critic.forward = lambda observations, actions: (
        agent.critic.values if actions.dim() == 3 else chosen.append(actions) or torch.zeros(actions.shape[:3])
    )
    chosen, proposals = [], torch.arange(3.0).view(1, 3, 1).expand(2, 3, A)
    choice = torch.cat([torch.rand(2, 2, 998), torch.tensor([0.0, 1.0]).expand(2, 2, 2)], dim=2)
    batch = make_batch(batch_size=2)
    agent.critic_loss(batch, torch.zeros(2), proposals, torch.zeros(2, 3), choice)
    drawn = chosen[0][:, :, 1:, 0]
    assert torch.equal(chosen[0][:, :, 0], batch.actions.expand(2, -1, -1))
    for e, values in enumerate(([5.0, 6.0, 7.0], [3.0, 2.0, 1.0])):
        shares = torch.stack([(drawn[e] == i).double().mean() for i in range(3)])
        assert close(shares, torch.tensor(values).softmax(dim=0), 0.05)


# Precision and compilation.


@pytest.mark.parametrize("options", [{}, {"cql_backprop_actions": 2}], ids=str)
def test_bfloat16_is_of_the_hidden_products_alone(options):
    torch.set_default_dtype(torch.float32)
    agents = [make_agent(precision=precision, hidden_dim=64, **options) for precision in ("float32", "bfloat16")]
    agents[1].load_state_dict(agents[0].state_dict())
    batch = cql.Batch(*[x.float() for x in make_batch(batch_size=64)])
    noise = agents[0].draw_noise(64)
    (exact, metrics), (rounded, other) = (agent.gradients(batch, noise, False) for agent in agents)
    assert all(x.dtype == torch.float32 for parts in rounded.values() for x in parts)
    assert all(x.dtype == torch.float32 for x in (*other.values(), *agents[1].parameters()))
    assert metrics["log_pi"] == other["log_pi"] and metrics["qf1_loss"] != other["qf1_loss"]
    for key in ("qf1_loss", "cql_qf1_diff", "cql_q1_rand", "policy_loss"):
        assert abs(metrics[key] - other[key]) < 0.02 * max(1, abs(metrics[key])), key
    for name in ("critic", "actor"):
        x, y = (torch.cat([part.flatten() for part in parts[name]]) for parts in (exact, rounded))
        assert 0 < (x - y).norm() < 0.1 * x.norm()


COMPILED = [{}, {"cql_backprop_actions": 2, "precision": "bfloat16", "cql_lagrange": True, "bc_steps": 1}]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiled_gradients_are_the_same(options):
    torch.set_default_dtype(torch.float32)
    agent, batch = make_agent(**options), cql.Batch(*[x.float() for x in make_batch()])
    data = {key: getattr(batch, key).numpy() for key in cql.COLUMNS[:5]}
    twin = copy.deepcopy(agent)
    config = cql.TrainConfig(**vars(agent.config) | {"compile": True, "batch_size": B})
    state = torch.get_rng_state()
    cql.Updates(config, agent, cql.ReplayBuffer(data, "cpu"), cql.Means())
    assert torch.equal(state, torch.get_rng_state()) and agent.compute_gradients != agent.gradients
    for _ in range(3):  # past the end of the warm start
        torch.manual_seed(2)
        metrics = agent.update(batch)
        torch.manual_seed(2)
        expected = twin.update(batch)
        for name, value in expected.items():
            assert close(metrics[name], value, 2e-2 if "precision" in options else 1e-4), name
    for x, y in zip(agent.parameters(), twin.parameters()):
        assert close(x, y, 2e-2 if "precision" in options else 1e-4)


def test_without_a_compiler_updates_are_eager_after_one_warning(monkeypatch, capsys):
    def missing(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", missing)
    agent, batch = make_agent(compile=True, batch_size=B), make_batch()
    data = {key: getattr(batch, key).numpy() for key in cql.COLUMNS[:5]}
    cql.Updates(agent.config, agent, cql.ReplayBuffer(data, "cpu"), cql.Means())
    assert agent.compute_gradients == agent.gradients
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no compiler" in err and "--compile" in err


class Recording:
    """A CUDA graph that a CPU can play: what `replay` does is counted."""

    replays = 0

    def replay(self):
        Recording.replays += 1


@pytest.mark.parametrize("fails", [False, True])
def test_updates_are_replayed_in_blocks_that_cross_no_evaluation(fails, monkeypatch, capsys):
    config = cql.TrainConfig(device="cpu", eval_freq=25, log_interval=40, max_timesteps=60)
    agent = make_agent()
    agent.update = lambda batch: setattr(agent, "n_updates", agent.n_updates + 1) or {"loss": torch.tensor(1.0)}
    data = {key: getattr(make_batch(), key).numpy() for key in cql.COLUMNS[:5]}
    updates = cql.Updates(config, agent, cql.ReplayBuffer(data, "cpu"), cql.Means())
    updates.record_at = 3
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext() if not fails else 1 / 0)
    monkeypatch.setattr(Recording, "replays", 0)
    stops = [0]
    while agent.n_updates < 60:
        done = updates()
        stops.append(stops[-1] + done)
        assert agent.n_updates == stops[-1] == updates.means.count
    assert {25, 40, 50, 60} <= set(stops)
    assert Recording.replays == (0 if fails else 5) and capsys.readouterr().err.count("warning") == fails
    assert [b - a for a, b in zip(stops, stops[1:])].count(10) == (0 if fails else 5)


def test_nothing_is_recorded_while_updates_differ():
    assert make_agent(bc_steps=1).changing and make_agent(target_update_period=2).changing
    assert not make_agent().changing and not updated(bc_steps=2)[0].changing
