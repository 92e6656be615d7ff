"""Each loss of the continuous script against numbers by hand, integrals, and its formula in slow loops."""

import copy
import math
import types

import numpy as np
import pytest
import torch
from conftest import refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from algorithms.offline import cql

S, A, B, N = 3, 2, 5, 2  # sizes of states, actions and batches; actions per proposal
INF = math.inf
pytestmark = pytest.mark.usefixtures("float64")


class Formulas(nn.Module):
    """One critic per formula of s [B, 1] and a [B, N], for one-dimensional observations and actions."""

    def __init__(self, *formulas):
        super().__init__()
        self.formulas = formulas

    def forward(self, observations, actions):
        return torch.stack([formula(observations, actions.squeeze(-1)) for formula in self.formulas])


class Values(nn.Module):
    """Critics that return given values [E, B, N] for any actions."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))

    def forward(self, observations, actions):
        assert self.values.shape[1:] == actions.shape[:2]
        return self.values


def make_agent(observation_dim=S, action_dim=A, fresh=False, **options):
    """An agent whose parameters are all random, so that values, means and targets differ widely."""
    torch.manual_seed(0)
    options = {"device": "cpu", "hidden_dim": 8, "cql_n_actions": N, "policy_lr": 0.01, "qf_lr": 0.01} | options
    agent = cql.CQL(cql.TrainConfig(**options), observation_dim, action_dim)
    with torch.no_grad():
        for network in () if fresh else (agent.actor, agent.critic, agent.target_critic, agent.behaviour):
            for parameter in network.parameters() if network else ():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return agent


def make_batch(observation_dim=S, action_dim=A, batch_size=B):
    observations, next_observations = torch.randn(2, batch_size, observation_dim)
    terminals = (torch.arange(batch_size) == 1).to(observations.dtype)
    actions = torch.empty(batch_size, action_dim).uniform_(-1, 1)
    return cql.Batch(observations, actions, torch.randn(batch_size), next_observations, terminals)


def critic_loss(values, log_prob=None, td_target=None, **options):
    """The script's critic loss for Q = `values` [E, B, 1 + 3N] (data, random, next, current) and log p [B, 3N]."""
    agent = make_agent(**options)
    agent.critic = Values(values)
    _, batch_size, n_actions = agent.critic.values.shape
    batch, proposals = make_batch(batch_size=batch_size), torch.zeros(batch_size, n_actions - 1, A)
    td_target = agent.critic.values[0, :, 0].detach() if td_target is None else torch.tensor(td_target)
    log_prob = torch.zeros(batch_size, n_actions - 1) if log_prob is None else torch.as_tensor(log_prob)
    return agent, *agent.critic_loss(batch, td_target, proposals, log_prob)


def close(actual, expected, tolerance=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def same(network, other):
    return all(torch.equal(x, y) for x, y in zip(network.parameters(), other.parameters()))


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def density(mean, log_std, actions):
    """PyTorch's own log-density of tanh of a Gaussian."""
    return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()).log_prob(actions).sum(-1)


# Checks that hold for each script: test_discrete.py calls these three too.


def check_updates(make_agent, make_batch, others, rates, target_rate, period):
    """An update is a step of Adam at each group's own rate, then one of the targets, every `period` updates; a copy by
    state_dict goes on the same, moments and counter included. others(i): what else the i-th gradients depend on."""
    agent, twin = make_agent(), make_agent()
    adams = {name: torch.optim.Adam(twin.parameter_groups[name], rate) for name, rate in rates.items()}
    learned = {x for group in twin.parameter_groups.values() for x in group}
    assert learned | set(twin.target_critic.parameters()) == set(twin.parameters())
    for i in range(7):
        batch = make_batch()
        torch.manual_seed(i)
        agent.update(batch)
        torch.manual_seed(i)
        gradients, _ = twin.gradients(batch, *others(i))
        for name, adam in adams.items():
            for parameter, gradient in zip(twin.parameter_groups[name], gradients[name]):
                parameter.grad = gradient
            adam.step()
        for target, source in zip(twin.target_critic.parameters(), twin.critic.parameters()):
            target.data += target_rate * ((i + 1) % period == 0) * (source - target)
        assert agent.n_updates == i + 1 and close(flat(agent.parameters()), flat(twin.parameters()))
        if i == 3:
            other = make_agent()
            other.load_state_dict(agent.state_dict())
            agent = other


def check_same(results, tolerance):
    """Checks that gradients and metrics of two calls are close. Returns how far apart the gradients are."""
    (actual, metrics), (expected, others) = results
    assert metrics.keys() == others.keys() and actual.keys() == expected.keys()
    far = {name for name in metrics if (metrics[name] - others[name]).abs() > tolerance * max(1, others[name].abs())}
    distances = [(flat(actual[name]) - flat(expected[name])).norm() / flat(expected[name]).norm() for name in actual]
    assert not far and max(distances) <= tolerance
    return dict(zip(actual, distances))


def check_bfloat16(agents, batch, *inputs):
    """The second agent's hidden layers multiply in bfloat16; the last layer's values have the digits of float32."""
    exact, rounded = agents
    results = []
    for agent in agents:
        torch.manual_seed(2)
        results.append(agent.gradients(batch, *agent.phases()[0]))
    assert check_same(results, 0.1)["critic"] > 0
    (_, _), (gradients, metrics) = results
    assert all(x.dtype == torch.float32 for x in (*rounded.parameters(), *gradients["critic"], *metrics.values()))
    values = rounded.critic(*inputs)
    assert not torch.equal(values, values.bfloat16().float())


def check_traced(script, agent, make_batch, tolerance, monkeypatch):
    """Compiles a loss and its gradients into one graph, but without the C++ compiler, which takes half a minute (and
    test_gpu.py has). The random numbers are the same, and compiling itself uses none."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *x, options, **more: compile(*x, backend="aot_eager", **more))
    data = {key: column.numpy() for key, column in make_batch()._asdict().items() if column is not None}
    state = torch.get_rng_state()
    script.updater(agent.config, agent, script.ReplayBuffer(data, "cpu").sample)
    assert torch.equal(state, torch.get_rng_state()) and agent.compute_gradients != agent.gradients
    results, batch, (others,) = [], make_batch(), {*agent.phases()}
    for compute in (agent.compute_gradients, agent.gradients):
        torch.manual_seed(2)
        results.append(compute(batch, *others))
    check_same(results, tolerance)


# The TD loss and its target.


def test_only_terminals_stop_the_bootstrap():
    """A time-out is not a terminal. Q'(s', a') is the smaller of 10 s' + a' and 20."""
    data = {
        "observations": np.zeros((3, 1)), "actions": np.zeros((3, 1)), "next_observations": np.array([[1], [2], [1]]),
        "rewards": np.array([1.0, 2, 3]), "terminals": np.array([0, 1, 0]) > 0, "timeouts": np.array([0, 0, 1]) > 0,
    }  # fmt: skip
    batch = cql.ReplayBuffer(data, "cpu").rows(slice(None))
    agent = make_agent(1, 1, discount=0.5)
    agent.critic = None  # only the target critic's values count
    agent.target_critic = Formulas(lambda s, a: 10 * s + a, lambda s, a: 0 * s + 20)
    target = agent.td_target(batch, torch.full((3, 1, 1), 0.5), torch.full((3, 1), 7.0))
    assert target.tolist() == [1 + 0.5 * 10.5, 2, 3 + 0.5 * 10.5]


@pytest.mark.parametrize("backup_entropy", (False, True))
def test_max_backup_is_the_largest_of_the_least_values(backup_entropy):
    """The smallest values of three actions are 1, 2 and 0; the smallest of the critics' own maxima would be 4. The
    entropy is that of the chosen action."""
    options = {"discount": 0.5, "use_automatic_entropy_tuning": False, "alpha_multiplier": 10}
    agent, batch = make_agent(backup_entropy=backup_entropy, **options), make_batch(batch_size=1)
    agent.target_critic = Values([[[1.0, 5.0, 0.0]], [[4.0, 2.0, 3.0]]])
    target = agent.td_target(batch, torch.zeros(1, 3, A), torch.tensor([[0.1, 0.2, 0.3]]))
    assert close(target, batch.rewards + 0.5 * (2 - 10 * 0.2 * backup_entropy)) and not target.requires_grad


# The penalty.


@pytest.mark.parametrize("temperature", (1.0, 0.25, 3.0))
def test_estimator_approaches_the_log_integral(temperature):
    """Uniform and tanh-Gaussian proposals together, each with its density. A formula of (Q - log p) / T would end
    (1 - T) log 2 and more above."""

    def formula(s, a):
        return torch.sin(3 * a) + s * a

    n, a, states = 2000, torch.linspace(-1, 1, 20_001), torch.tensor([-1.0, 0.0, 2.0]).repeat(10).unsqueeze(1)
    truth = temperature * torch.trapezoid((formula(states, a) / temperature).exp(), a).log().mean()
    agent = make_agent(1, 1, cql_n_actions=n, cql_temp=temperature)
    agent.critic = agent.target_critic = Formulas(formula, formula)
    batch = make_batch(1, 1, len(states))._replace(observations=states)
    mean = torch.tensor([[0.4], [-0.6]]).repeat_interleave(len(states), dim=0)
    proposed = agent.td_target_and_proposals(batch, mean, torch.full_like(mean, 0.1))
    _, gap, metrics = agent.critic_loss(batch, *proposed)
    log_mean = gap[0] + metrics["average_qf1"] - temperature * math.log(3 * n)
    assert abs(log_mean - truth) < 0.03 * max(1, temperature)


Q_1, Q_2 = (
    [5.0, *map(math.log, (1, 2, 3))],
    [6.0, *map(math.log, (4, 4, 5))],
)  # data, then the proposals
DENSITIES = [list(map(math.log, (0.5, 0.25, 1)))]


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("weight, target_gap", ((1.0, 0.0), (math.e, 2.0)), ids=("fixed", "lagrange"))
def test_penalty_by_hand(weight, target_gap, temperature):
    """Q = T times the above: 1 / 0.5 + 2 / 0.25 + 3 = 13 for the first critic, 4 / 0.5 + 4 / 0.25 + 5 = 29 for the
    second. The temperature divides Q and not the density; with a multiplier, e at first, the target is subtracted."""
    values, options = temperature * np.array([[Q_1], [Q_2]]), {"cql_lagrange": weight > 1, "cql_target_action_gap": 2.0}
    _, loss, gap, metrics = critic_loss(
        values, DENSITIES, [5 * temperature], cql_alpha=10, cql_temp=temperature, **options
    )
    gaps = [temperature * (math.log(13) - 5), temperature * (math.log(29) - 6)]
    penalties = [10 * weight * (x - target_gap) for x in gaps]
    hand = {
        "cql_q1_rand": 0, "cql_q1_next_actions": math.log(2), "cql_q1_current_actions": math.log(3),
        "cql_q2_rand": math.log(4), "cql_q2_next_actions": math.log(4), "cql_q2_current_actions": math.log(5),
        "cql_std_q1": np.std(Q_1, ddof=1), "cql_std_q2": np.std(Q_2, ddof=1),
        "cql_net_gap": (math.log(13) + math.log(29) - 11) / 2 - math.log(3) - A * math.log(2),
        "average_qf1": 5, "average_qf2": 6, "average_target_q": 5, "qf1_loss": 0, "qf2_loss": temperature,
    }  # fmt: skip
    hand = {name: temperature * value for name, value in hand.items()} | {
        "cql_weight_rand": (2 / 13 + 8 / 29) / 2, "cql_weight_next_actions": (8 / 13 + 16 / 29) / 2,
        "cql_weight_current_actions": (3 / 13 + 5 / 29) / 2, "cql_qf1_diff": gaps[0], "cql_qf2_diff": gaps[1],
        "cql_min_qf1_loss": penalties[0], "cql_min_qf2_loss": penalties[1], "cql_clipped_share": 0,
        "cql_effective_weight": 10 * weight,
    }  # fmt: skip
    assert close(gap, gaps) and not gap.requires_grad
    assert close(loss, temperature**2 + sum(penalties))  # the second critic's TD error is T
    assert metrics.keys() == hand.keys() and {name for name in hand if not close(metrics[name], hand[name])} == set()


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_without_importance_sampling_the_data_joins_the_sum_and_densities_do_not(temperature):
    values = temperature * torch.tensor([[list(map(math.log, (4, 1, 2, 3)))]] * 2)
    _, _, gap, metrics = critic_loss(values, [[math.nan] * 3], cql_importance_sample=False, cql_temp=temperature)
    assert close(gap, temperature * torch.full((2,), math.log(10 / 4)))
    assert close(metrics["cql_weight_rand"], 0.1) and close(metrics["cql_weight_current_actions"], 0.3)
    assert close(metrics["cql_net_gap"], temperature * math.log(10 / 4 / 4))


CONSTANT = math.log(3)  # gap of three equal values with log-densities 0, for a data value of 0


@pytest.mark.parametrize(
    "low, high, moves",
    ((0.0, 4.0, [0, 1, 1, 0]), (-INF, INF, [1] * 4), (-INF, 1.7, [1, 1, 0, 0]), (0.0, INF, [0, 1, 1, 1])),
)
def test_clip_acts_on_each_state(low, high, moves):
    """Gaps are -5, 0.5, 1 and 9, plus log 3; clipped ones have no gradient. The net gap is that before clipping."""
    values = [[[0.0, x, x, x] for x in (-5.0, 0.5, 1.0, 9.0)]] * 2
    agent, loss, gap, metrics = critic_loss(values, cql_clip_diff_min=low, cql_clip_diff_max=high, cql_alpha=1.0)
    assert close(gap, np.clip(np.array([-5, 0.5, 1, 9]) + CONSTANT, low, high).mean() * torch.ones(2))
    assert close(metrics["cql_net_gap"], 5.5 / 4 - A * math.log(2))
    assert metrics["cql_clipped_share"] == 1 - sum(moves) / 4
    loss.backward()
    assert close(4 * agent.critic.values.grad, torch.tensor(moves).view(4, 1) * torch.tensor([-1, *[1 / 3] * 3]))


# CQL(rho), CQL(var), and the mixture density.


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_gap_of_rho_is_a_mean_over_samples_of_the_policy(temperature):
    """Its gradient is the soft-max's mean gradient of the samples, minus that of the data; no constant is left out, so
    the net gap is the gap. One sample is the paper's equation 2 with mu = pi."""
    values, options = torch.randn(2, B, 7), {"cql_variant": "rho", "cql_temp": temperature, "cql_alpha": 1.0}
    agent, loss, gap, metrics = critic_loss(values, torch.full((B, 6), math.log(6)), **options)
    log_mean = temperature * (values[..., 1:] / temperature).exp().mean(dim=2).log()
    assert close(gap, (log_mean - values[..., 0]).mean(dim=1)) and close(metrics["cql_net_gap"], gap.mean())
    td_loss = (agent.critic.values[..., 0] - values[0, :, 0]).square().mean(dim=1).sum()
    (gradient,) = torch.autograd.grad(loss - td_loss, agent.critic.values)
    weights = (values[..., 1:] / temperature).softmax(dim=2)
    assert close(B * gradient, torch.cat([-torch.ones(2, B, 1), weights], dim=2))
    penalty = {x for x in metrics if x.startswith("cql_q1_") or x.startswith("cql_weight")}
    assert penalty == {"cql_q1_current_actions"} and close(metrics["cql_q1_current_actions"], values[0, :, 1:].mean())
    _, _, gap, metrics = critic_loss(values[..., :2], torch.zeros(B, 1), **options)
    assert close(gap, (values[..., 1] - values[..., 0]).mean(dim=1)) and close(metrics["cql_net_gap"], gap.mean())


def penalty(formula, states, **options):
    """Metrics of a minibatch for Q = formula(s, a [B, N, A]), and its data's actions."""
    agent, batch = make_agent(1, A, **options), make_batch(1, A, len(states))
    agent.critic.forward = agent.target_critic.forward = lambda s, a: formula(s, a).expand(2, -1, -1)
    proposed = agent.td_target_and_proposals(batch, *agent.actor(torch.cat([states, states])))
    return agent.critic_loss(batch._replace(observations=states), *proposed)[2], batch.actions


@pytest.mark.parametrize("temperature", (0.5, 1.0))
def test_a_constant_q_has_no_gap(temperature):
    for options in ({"cql_variant": "rho", "cql_temp": temperature}, {"cql_variant": "var"}):
        metrics, _ = penalty(lambda s, a: 5 + 0 * a[..., 0], torch.randn(B, 1), **options)
        tolerance = 1e-4 if options["cql_variant"] == "var" else 1e-12  # the root of what is added to the variance
        assert abs(metrics["cql_net_gap"]) <= 1.001 * tolerance and metrics["cql_qf1_diff"] == metrics["cql_net_gap"]


def test_rho_of_uniform_actions_is_the_entropy_variant_less_the_volume(monkeypatch):
    """The policy's samples are a grid here: log of the integral of exp Q, minus Q of the data, minus A log 2."""

    def formula(s, a):
        return torch.sin(3 * a[..., 0]) + s * a[..., 1]

    n, sample, states = 300, cql.sample_actions, torch.tensor([[-1.0], [0.0], [2.0]])
    line = (torch.arange(n) + 0.5) * 2 / n - 1
    grid = torch.cartesian_prod(line, line).expand(len(states), -1, -1)
    monkeypatch.setattr(
        cql, "sample_actions", lambda *x: (grid, torch.zeros(len(x[0]), n**2)) if x[2] > 1 else sample(*x)
    )
    metrics, actions = penalty(formula, states, cql_variant="rho", cql_n_actions=n**2 // 3)
    q_data = formula(states, actions.unsqueeze(1)).squeeze(1)
    a = torch.linspace(-1, 1, 20_001)
    integrals = torch.trapezoid(torch.sin(3 * a).exp(), a), torch.trapezoid((states * a).exp(), a)
    expected = integrals[0].log() + integrals[1].log() - q_data - A * math.log(2)
    assert close(metrics["cql_net_gap"], expected.mean(), 1e-4)


@pytest.mark.parametrize("action_dim", (3, 6))
def test_mixture_density_finds_the_integral_that_own_densities_miss(action_dim):
    """With a narrow policy, whose samples see a small part of the box. Scored by their own density they miss the
    integral, in nearly all minibatches: two of three proposals count for nothing, and log 3 is lost. The mixture's
    terms are bounded, and their mean is the integral."""

    def formula(s, a):
        return -1.18 * a.square().sum(dim=-1) + 0 * s

    grid = torch.linspace(-1, 1, 20_001)
    truth = action_dim * torch.trapezoid((-1.18 * grid.square()).exp(), grid).log()
    found, states, log_std = {}, torch.zeros(20_000, 1), torch.full((40_000, action_dim), math.log(0.05))
    for density in ("own", "mixture"):
        agent = make_agent(1, action_dim, cql_n_actions=10, cql_density=density)
        agent.critic.forward = agent.target_critic.forward = lambda s, a: formula(s, a).expand(2, -1, -1)
        batch = make_batch(1, action_dim, len(states))._replace(observations=states)
        _, *proposed = agent.td_target_and_proposals(batch, torch.full_like(log_std, 0.3), log_std)
        assert proposed[0].shape[1] == (20 if density == "mixture" else 30)
        found[density] = agent.log_sum_exp(batch, *proposed)[1][0] - math.log(proposed[0].shape[1])
    assert abs(truth / action_dim - 1.07 / 3) < 0.01
    assert abs(found["own"].mean() - (truth - math.log(3))) < 0.1 and abs(found["mixture"].mean() - truth) < 0.06
    integrals = found["mixture"].exp()
    assert abs(integrals.mean() - truth.exp()) < 5 * integrals.std() / math.sqrt(len(integrals)) < 0.01 * truth.exp()


def test_mixture_density_is_finite_at_the_ends(monkeypatch):
    """In float32, where a uniform action may be -1 and the policy's density there is infinite."""
    torch.set_default_dtype(torch.float32)
    agent, batch = make_agent(cql_density="mixture"), make_batch()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, low, high: x.fill_(low))
    gradients, metrics = agent.gradients(batch, False)
    assert all(x.isfinite().all() for x in (*gradients["critic"], *metrics.values()))


def test_clone_of_var_follows_the_data_and_not_the_policy():
    agent, batch = make_agent(fresh=True, hidden_dim=32, cql_variant="var"), make_batch(batch_size=256)
    wanted = (0.8 * batch.observations[:, :A].sin()).atanh()
    batch = batch._replace(actions=(wanted + 0.2 * torch.randn_like(wanted)).tanh())
    losses = [agent.update(batch)["behaviour_loss"] for _ in range(200)]
    mean, log_std = agent.behaviour(batch.observations)
    assert (mean.tanh() - wanted.tanh()).square().mean() < 0.1 * wanted.tanh().square().mean()
    assert abs(log_std.mean() - math.log(0.2)) < 0.7 and losses[-1] < losses[0] - 1


ALONE = [{"cql_variant": "rho"}, {"cql_variant": "var"}, {"cql_density": "mixture"}, {"cql_importance_sample": False}]


@pytest.mark.parametrize(
    "options, names",
    [
        *(({**x, **y}, "--cql_variant --cql_density --cql_importance_sample") for x in ALONE[:2] for y in ALONE[2:]),
        ({**ALONE[2], **ALONE[3]}, "--cql_density --cql_importance_sample"),
        ({"cql_variant": "var", "cql_n_actions": 1}, "--cql_n_actions"),
        ({"cql_variant": "var", "cql_backprop_actions": 1}, "--cql_backprop_actions"),
        ({"cql_variant": "var", "cql_temp": 2.0}, "--cql_temp"),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, names):
    status, message = refusal(make_agent, **options)
    assert status == 2 and all(name in message for name in names.split())


# The policy: density and cloning.


@pytest.mark.parametrize("z, log_jacobian", ((8.0, -14.61), (10.0, -18.61), (15.0, -28.61), (-30.0, -58.61)))
def test_density_far_out(z, log_jacobian):
    """In float32, where 1 - tanh(z)^2 is 0: finite with finite gradients, and not that of log(1 - tanh(z)^2 + 1e-6)."""
    pre_tanh = torch.tensor([z], dtype=torch.float32, requires_grad=True)
    log_prob = cql.tanh_gaussian_log_prob(pre_tanh, *torch.zeros(2, 1, dtype=torch.float32))
    assert abs(log_prob.item() + 0.5 * math.log(2 * math.pi) + log_jacobian) < 0.01
    log_prob.backward()
    assert close(pre_tanh.grad, 2 * math.tanh(z), 1e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_likelihood_of_the_data_is_finite_at_the_ends(dtype):
    """It is that of the data's actions, clipped to 0.999."""
    torch.set_default_dtype(dtype)
    agent, batch = make_agent(), make_batch()
    for actions in (batch.actions, torch.ones(B, A), -torch.ones(B, A)):
        mean, log_std = agent.actor(batch.observations)
        log_prob = agent.data_log_prob(batch._replace(actions=actions), mean, log_std)
        assert close(log_prob, density(mean, log_std, actions.clamp(-0.999, 0.999)), 1e-3)
        assert flat(torch.autograd.grad(log_prob.sum(), agent.actor.parameters())).isfinite().all()


@pytest.mark.parametrize("options", ({"bc_only": True}, {"bc_steps": 200, "alpha_multiplier": 0.0}), ids=str)
def test_cloning_learns_the_data_s_actions(options):
    """Noisy actions, so that the likelihood has a best standard deviation. Pure cloning only moves the actor."""
    agent, batch = make_agent(fresh=True, hidden_dim=32, **options), make_batch(batch_size=256)
    wanted = (0.8 * batch.observations[:, :A].sin()).atanh()
    batch = batch._replace(actions=(wanted + 0.2 * torch.randn_like(wanted)).tanh())
    before, likelihood = copy.deepcopy(agent), agent.holdout_metrics(batch)["holdout_log_prob"]
    for _ in range(200):
        metrics = agent.update(batch)
    mean, log_std = agent.actor(batch.observations)
    assert (mean.tanh() - wanted.tanh()).square().mean() < 0.1 * wanted.tanh().square().mean()
    assert abs(log_std.mean() - math.log(0.2)) < 0.7
    assert agent.holdout_metrics(batch)["holdout_log_prob"] > likelihood + 1
    if "bc_only" in options:
        assert metrics.keys() == {"policy_loss", "policy_grad_norm"}
        assert agent.holdout_metrics(batch).keys() == {"holdout_log_prob"}
        for name in ("critic", "target_critic"):
            assert same(getattr(agent, name), getattr(before, name))
        assert agent.log_alpha == before.log_alpha and agent.log_alpha_prime == before.log_alpha_prime


# Regularisation.


def test_weight_decay_shrinks_the_critics_alone():
    agents = [make_agent(weight_decay=decay) for decay in (0.0, 0.3)]
    before, batch = copy.deepcopy(agents[0]), make_batch()
    for agent in agents:
        torch.manual_seed(1)
        agent.update(batch)
    plain, decayed = agents
    assert same(plain.actor, decayed.actor) and plain.log_alpha == decayed.log_alpha
    for old, new, other in zip(*(agent.critic.parameters() for agent in (before, plain, decayed))):
        assert close(other, new - 0.01 * 0.3 * old)


def test_layer_norm_is_that_of_each_critic_and_layer():
    critic, (observations, actions) = (
        cql.EnsembleCritic(2, 1, [5, 5], layer_norm=True),
        (torch.randn(7, 2), torch.randn(7, 3, 1)),
    )
    values = critic(observations, actions)
    for e in range(2):
        x = torch.cat([observations.unsqueeze(1).expand(-1, 3, -1), actions], dim=-1)
        for weight, bias in zip(critic.weights[:-1], critic.biases[:-1]):
            x = x @ weight[e] + bias[e]
            x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = x.clamp(min=0)
        assert close(values[e], (x @ critic.weights[-1][e] + critic.biases[-1][e]).squeeze(-1))


def test_dropout_acts_in_training_alone():
    agent, batch = make_agent(dropout=0.5, hidden_dim=64), make_batch()
    plain = make_agent(hidden_dim=64)
    assert same(agent.critic, plain.critic)
    inputs = batch.observations, batch.actions.unsqueeze(1)
    first, second = agent.critic(*inputs), agent.critic(*inputs)
    assert (first != second).any() and (agent.target_critic(*inputs) != agent.target_critic(*inputs)).any()
    agent.eval()
    assert torch.equal(agent.critic(*inputs), plain.critic(*inputs))
    assert (agent.start_values(np.ones((2, S))) == plain.start_values(np.ones((2, S)))).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target": "sarsa", "backup_entropy": True}, "--target sarsa"),
        ({"target": "sarsa", "cql_max_target_backup": True}, "--target sarsa"),
        ({"dropout": 0.1, "cql_backprop_actions": 2}, "--dropout"),
        ({"dropout": 1.0}, "--dropout"),
        ({"target": "max"}, "--target takes policy, sarsa"),
    ],
)
def test_options_that_exclude_each_other(options, words):
    status, line = refusal(make_agent, **options)
    assert status == 2 and words in line


# Networks.


@pytest.mark.parametrize("orthogonal", (True, False))
def test_options_of_networks_reach_all_of_them(orthogonal):
    """Depths and width too; only the biases of last layers are 0 without orthogonal_init, whose gain is small."""
    options = {"hidden_dim": 16, "policy_n_hidden_layers": 2, "q_n_hidden_layers": 4, "orthogonal_init": orthogonal}
    agent = make_agent(fresh=True, **options)
    linear = [*agent.actor.hidden[::2], agent.actor.head]
    assert [tuple(layer.weight.shape) for layer in linear] == [(16, S), (16, 16), (2 * A, 16)]
    networks = [[(layer.weight, layer.bias) for layer in linear]]
    for critic in (agent.critic, agent.target_critic):
        assert [tuple(x.shape) for x in critic.weights] == [(2, S + A, 16)] + [(2, 16, 16)] * 3 + [(2, 16, 1)]
        networks += [[(w[e], b[e]) for w, b in zip(critic.weights, critic.biases)] for e in (0, 1)]
    for *hidden, last in networks:
        for gain, layers in ((math.sqrt(2), hidden), (0.01, [last])):
            spread = [(torch.linalg.svdvals(weight) / gain - 1).abs().max() for weight, _ in layers]
            assert all((x < 1e-6) == orthogonal for x in spread)
        assert last[0].abs().max() < 0.02 and not last[1].any()
        assert all((not bias.any()) == orthogonal for _, bias in hidden)


def test_ensemble_is_two_networks_that_start_apart_and_targets_with_them():
    fresh = make_agent(fresh=True)
    assert all((weight[0] != weight[1]).all() for weight in fresh.critic.weights)
    assert same(fresh.critic, fresh.target_critic)
    pairs = zip(fresh.critic.parameters(), fresh.target_critic.parameters())
    assert not any(y.requires_grad or x.data_ptr() == y.data_ptr() for x, y in pairs)
    critic, batch, actions = make_agent().critic, make_batch(), torch.randn(2, B, 4, A)
    for some in (actions[0], actions):
        q = critic(batch.observations, some)
        assert q.shape == (2, B, 4)
        for e, b, n in np.ndindex(*q.shape):
            x = torch.cat([batch.observations[b], some.expand(2, B, 4, A)[e, b, n]])
            for weight, bias in zip(critic.weights[:-1], critic.biases[:-1]):
                x = (x @ weight[e] + bias[e, 0]).clamp(min=0)
            assert close(q[e, b, n], x @ critic.weights[-1][e, :, 0] + critic.biases[-1][e, 0, 0])


@pytest.mark.parametrize("max_rows, largest", ((1, 7), (7, 7), (30, 28), (1000, 77)))
@pytest.mark.parametrize("own_actions, own_states", ((False, False), (True, False), (True, True)))
def test_without_gradients_critics_see_states_in_pieces(own_states, own_actions, max_rows, largest, monkeypatch):
    """The values are the same, whether the pieces come out even or not, also with states or actions of each critic's
    own. A state is never split."""
    critic, product, rows = make_agent().critic, torch.baddbmm, []
    monkeypatch.setattr(torch, "baddbmm", lambda bias, x, weight: rows.append(x.shape[1]) or product(bias, x, weight))
    monkeypatch.setattr(cql.EnsembleCritic, "max_rows", max_rows)
    observations = torch.randn(*(2,) * own_states, 11, S)
    actions = torch.rand(*(2,) * own_actions, 11, 7, A) * 2 - 1
    whole = critic(observations, actions)
    assert set(rows) == {77}
    rows.clear()
    with torch.no_grad():
        assert close(critic(observations, actions), whole.detach(), 1e-12)
    assert max(rows) == largest


def test_log_std_is_scaled_shifted_and_bounded():
    """multiplier * network - 1, both learned, between -20 and 2; the mean is the network's."""
    actor = make_agent(fresh=True, policy_log_std_multiplier=0.5).actor
    observations = torch.randn(B, S)
    mean, log_std = actor.head(actor.hidden(observations)).chunk(2, dim=1)
    assert all(close(*pair) for pair in zip(actor(observations), (mean, 0.5 * log_std - 1)))
    gradients = torch.autograd.grad(actor(observations)[1].sum(), (actor.log_std_multiplier, actor.log_std_offset))
    assert close(gradients[0], log_std.sum()) and gradients[1] == B * A
    for bias, bound in ((100, 2), (-100, -20)):
        actor.head.bias.data[A:] = bias
        assert (actor(observations)[1] == bound).all()


def test_predicted_values_are_the_least_of_the_mean_action():
    """Raw observations 5 and 7 are 1 and 2 after scaling; the mean action is tanh(s / 2), the least value 10 s - a."""
    agent, scaling = make_agent(1, 1), {"observation_mean": torch.tensor([3.0]), "observation_std": torch.tensor([2.0])}
    agent.actor.load_state_dict(scaling, strict=False)
    agent.actor.forward = lambda s: (s / 2, torch.zeros_like(s))
    agent.critic = Formulas(lambda s, a: 10 * s + a, lambda s, a: 10 * s - a)
    assert agent.start_values(np.array([[5.0], [7.0]])) == pytest.approx([10 - math.tanh(0.5), 20 - math.tanh(1)])


@pytest.mark.parametrize("variant", ("H", "rho", "var"))
def test_holdout_metrics_are_those_of_the_losses(variant):
    agent, batch = make_agent(cql_variant=variant), make_batch()
    before = copy.deepcopy(agent)
    torch.manual_seed(3)
    metrics = agent.holdout_metrics(batch)
    assert same(agent, before)
    torch.manual_seed(3)
    target, *proposed = agent.td_target_and_proposals(
        batch, *agent.actor(torch.cat([batch.observations, batch.next_observations]))
    )
    q = agent.critic(batch.observations, batch.actions.unsqueeze(1)).squeeze(-1)
    hand = {
        "holdout_td_error": (q - target).square().mean(), "holdout_q": q.mean(),
        "holdout_gap": agent.critic_loss(batch, target, *proposed)[1].mean(),
        "holdout_log_prob": density(*agent.actor(batch.observations), batch.actions.clamp(-0.999, 0.999)).mean(),
    }  # fmt: skip
    assert metrics == pytest.approx({name: value.item() for name, value in hand.items()})


# The whole update.


def slow_losses(agent, batch, cloning):
    """The losses from their formulas, in loops over states, critics and actions."""
    config = agent.config
    temperature, low, high = config.cql_temp, config.cql_clip_diff_min, config.cql_clip_diff_max
    alpha = config.alpha_multiplier * (agent.log_alpha.exp().item() if config.use_automatic_entropy_tuning else 1)
    weight = config.cql_alpha * (agent.log_alpha_prime.exp().item() if config.cql_lagrange else 1)
    target_gap = config.cql_target_action_gap if config.cql_lagrange else 0
    is_h = config.cql_alpha > 0 and config.cql_variant == "H"
    noise = torch.randn(2 * B, config.cql_n_actions if is_h or config.cql_max_target_backup else 1, A)
    sampled = torch.randn(B, 3 * config.cql_n_actions if config.cql_alpha and not is_h else 0, A)
    random = torch.empty(B, config.cql_n_actions if is_h else 0, A).uniform_(-1, 1)
    policy_noise = torch.randn(B, A)
    proposer = agent.behaviour if config.cql_variant == "var" else agent.actor

    def act(s, noise, actor=agent.actor):
        mean, log_std = actor(s)
        z = mean + log_std.exp() * noise
        return z.tanh(), (Normal(mean, log_std.exp()).log_prob(z) - (1 - z.tanh() ** 2).log()).sum()

    def q_values(network, s, a):
        return network(s[None], a[None, None]).flatten()  # of both critics

    critic_loss = policy_loss = mean_log_prob = mean_gap = 0
    for b, (s, a, r, next_s, terminal) in enumerate(zip(*batch[:5])):
        with torch.no_grad():
            current, following = [act(s, x) for x in noise[b]], [act(next_s, x) for x in noise[B + b]]
        backups = following if config.cql_max_target_backup else following[:1]
        value, log_prob = max((q_values(agent.target_critic, next_s, x).min(), log_p) for x, log_p in backups)
        value = value - alpha * log_prob if config.backup_entropy else value
        y = r + config.discount * (1 - terminal) * value
        proposals = [(x, torch.tensor(-A * math.log(2))) for x in random[b]] + following + current
        if config.cql_density == "mixture":
            both = [x for x, _ in proposals[:N] + current]
            proposals = [(x, (density(*agent.actor(s), x).exp() / 2 + 0.5**A / 2).log().detach()) for x in both]
        if not is_h:
            proposals = [(act(s, x, proposer)[0].detach(), torch.tensor(len(sampled[b])).log()) for x in sampled[b]]
        for e in (0, 1):
            q_data = q_values(agent.critic, s, a)[e]
            critic_loss += (q_data - y.detach()) ** 2 / B
            if config.cql_importance_sample:
                terms = [(q_values(agent.critic, s, x)[e] / temperature).exp() / log_p.exp() for x, log_p in proposals]
            else:
                terms = [(q_values(agent.critic, s, x)[e] / temperature).exp() for x in [a] + [x for x, _ in proposals]]
            if config.cql_alpha:
                gap = temperature * sum(terms).log() - q_data
                if config.cql_variant == "var":
                    values = [q_values(agent.critic, s, x)[e] for x, _ in proposals]
                    mean = sum(values) / len(values)
                    gap = (sum((x - mean) ** 2 for x in values) / (len(values) - 1) + 1e-8).sqrt()
                gap = gap.clamp(low, high)
                critic_loss += weight * (gap - target_gap) / B
                mean_gap += gap.item() / (2 * B)

        action, log_prob = act(s, policy_noise[b])
        objective = q_values(agent.critic, s, action).min()
        if cloning:
            objective = density(*agent.actor(s), a.clamp(-0.999, 0.999))
        policy_loss += (alpha * log_prob - objective) / B
        mean_log_prob += log_prob.item() / B

    losses = {"actor": policy_loss, "critic": critic_loss}
    if config.use_automatic_entropy_tuning:
        losses["alpha"] = -agent.log_alpha * (mean_log_prob - A)
    if config.cql_lagrange:
        losses["alpha_prime"] = -agent.log_alpha_prime.exp() * config.cql_alpha * (mean_gap - target_gap)
    if config.cql_variant == "var" and config.cql_alpha:
        likelihoods = [density(*agent.behaviour(s), a.clamp(-0.999, 0.999)) for s, a in zip(*batch[:2])]
        losses["behaviour"] = -sum(likelihoods) / B
    return losses


CHOICES = {
    "cql_importance_sample": [False], "cql_lagrange": [True], "cql_target_action_gap": [3.0], "cql_temp": [0.5, 2.0],
    "cql_max_target_backup": [True], "backup_entropy": [True], "cql_clip_diff_min": [2.3], "cql_clip_diff_max": [3.0],
    "cql_alpha": [0.0, 3.0], "use_automatic_entropy_tuning": [False], "alpha_multiplier": [0.3], "cql_n_actions": [1],
    "discount": [0.9],
}  # fmt: skip


@settings(max_examples=50)
@example(options={}, cloning=False)
@example(options={"cql_lagrange": True, "cql_target_action_gap": 3.0}, cloning=False)
@example(options={"cql_variant": "rho"}, cloning=False)
@example(options={"cql_variant": "rho", "cql_temp": 2.0, "cql_lagrange": True, "cql_clip_diff_max": 0.1}, cloning=True)
@example(options={"cql_variant": "rho", "cql_max_target_backup": True, "backup_entropy": True}, cloning=False)
@example(options={"cql_variant": "rho", "cql_alpha": 0.0}, cloning=False)
@example(options={"cql_variant": "var"}, cloning=False)
@example(options={"cql_variant": "var", "cql_lagrange": True, "cql_target_action_gap": 0.2}, cloning=True)
@example(options={"cql_variant": "var", "cql_alpha": 0.0, "cql_max_target_backup": True}, cloning=False)
@example(options={"cql_density": "mixture"}, cloning=False)
@example(options={"cql_density": "mixture", "cql_temp": 0.5, "cql_max_target_backup": True}, cloning=False)
@given(
    options=st.fixed_dictionaries({}, optional={name: st.sampled_from(x) for name, x in CHOICES.items()}),
    cloning=st.booleans(),
)
def test_losses_and_gradients_are_those_of_the_formulas(options, cloning):
    """With any options and the same random numbers. The loss of a group has gradients in its own parameters only."""
    agent, batch = make_agent(**options), make_batch()
    agent.log_alpha.data.fill_(0.3)
    agent.log_alpha_prime.data.fill_(0.7)
    before = copy.deepcopy(agent)
    torch.manual_seed(1)
    gradients, metrics = agent.gradients(batch, cloning)
    torch.manual_seed(1)
    losses = slow_losses(agent, batch, cloning)
    assert gradients.keys() == losses.keys() and same(agent, before)
    for name, loss in losses.items():
        expected = torch.autograd.grad(loss, agent.parameter_groups[name], retain_graph=True)
        assert all(close(*pair) for pair in zip(gradients[name], expected)), name
    logged = {"actor": "policy_loss", "alpha": "alpha_loss", "alpha_prime": "alpha_prime_loss"}
    logged["behaviour"] = "behaviour_loss"
    assert {name for name in logged.keys() & losses.keys() if not close(metrics[logged[name]], losses[name])} == set()
    for name, key in (("actor", "policy_grad_norm"), ("critic", "critic_grad_norm")):
        assert close(metrics[key], flat(gradients[name]).norm())
    assert all(x.isfinite().all() and not x.requires_grad for x in metrics.values())


@pytest.mark.parametrize("cloning", (False, True))
@pytest.mark.parametrize(
    "options", ({"cql_backprop_actions": 1}, {"cql_variant": "rho"}, {"cql_variant": "var"}, {"cql_density": "mixture"})
)
def test_other_parameters_are_constants_of_each_loss(options, cloning):
    """The multiplier sees the gap as a constant, the critics the multiplier and what the actor proposes, all of them
    the target critics and the clone. Only the policy's loss has a gradient, which nobody asks for, in the critics."""
    agent = make_agent(cql_lagrange=True, backup_entropy=True, **options)
    agent.target_critic.requires_grad_(True)
    losses, metrics = agent.losses(make_batch(), cloning)
    groups = agent.parameter_groups | {"target": list(agent.target_critic.parameters())}
    reached = {
        (loss, group)
        for loss in losses
        for group, parameters in groups.items()
        if any(
            x is not None
            for x in torch.autograd.grad(losses[loss], parameters, retain_graph=True, allow_unused=True)
        )
    }  # fmt: skip
    assert reached == {(name, name) for name in losses} | (set() if cloning else {("actor", "critic")})
    light, heavy = (make_agent(cql_alpha=x, **options).gradients(make_batch(), cloning)[0] for x in (0.1, 10))
    assert close(flat(light["actor"]), flat(heavy["actor"])) and close(flat(light["alpha"]), flat(heavy["alpha"]))
    assert (flat(light["critic"]) - flat(heavy["critic"])).norm() > 0.05 * flat(heavy["critic"]).norm()


@pytest.mark.parametrize("variant", ("H", "var"))
def test_update_is_a_step_of_adam_then_of_the_targets(variant):
    """It clones in the first updates."""
    options = {"policy_lr": 0.03, "qf_lr": 0.02, "cql_lagrange": True, "bc_steps": 2, "cql_variant": variant}
    options |= {"soft_target_update_rate": 0.25, "target_update_period": 3}
    rates = {"actor": 0.03, "alpha": 0.03, "critic": 0.02, "alpha_prime": 0.02}
    rates |= {"behaviour": 0.02} if variant == "var" else {}
    check_updates(lambda: make_agent(**options), make_batch, lambda i: (i < 2,), rates, 0.25, 3)


@pytest.mark.parametrize("target, change", ((-1e3, 0.0), (1e3, -0.01)))
def test_multiplier_stays_below_a_million_and_comes_down_again(target, change):
    """It grows while the gap is above its target."""
    agent = make_agent(cql_lagrange=True, cql_target_action_gap=target)
    agent.log_alpha_prime.data.fill_(math.log(1e6))
    assert close(agent.update(make_batch())["alpha_prime"], 1e6, 1e-6)
    assert close(agent.log_alpha_prime, math.log(1e6) + change)


# The cheap gradient: through k actions, drawn by their soft-max weight.


@pytest.mark.parametrize("k", (1, 3))
@pytest.mark.parametrize(
    "options",
    (
        {}, {"cql_temp": 0.5, "cql_importance_sample": False, "cql_lagrange": True}, {"cql_temp": 2.0},
        {"cql_clip_diff_min": 2.3, "cql_clip_diff_max": 3.0}, {"cql_variant": "rho", "cql_temp": 0.5},
        {"cql_density": "mixture"},
    ),
    ids=str,
)  # fmt: skip
def test_expected_gradient_is_that_through_all_actions(options, k):
    """Over 30 times 300 draws, within six standard errors; the loss and the metrics are the same in each draw."""
    agent, cheap, batch = make_agent(**options), make_agent(cql_backprop_actions=k, **options), make_batch()
    mean, log_std = agent.actor(torch.cat([batch.observations, batch.next_observations]))
    proposed = agent.td_target_and_proposals(batch, mean, log_std)
    loss, gap, metrics = agent.critic_loss(batch, *proposed)
    exact, found = flat(torch.autograd.grad(loss, agent.parameter_groups["critic"])), []
    many, proposed = cql.Batch(*(x.repeat_interleave(300, dim=0) for x in batch[:5])), [
        x.repeat_interleave(300, dim=0) for x in proposed
    ]  # fmt: skip
    for _ in range(30):
        cheap_loss, cheap_gap, cheap_metrics = cheap.critic_loss(many, *proposed)
        found.append(flat(torch.autograd.grad(cheap_loss, cheap.parameter_groups["critic"])))
    found = torch.stack(found)
    error = found.std(dim=0) / math.sqrt(30)
    assert ((found.mean(dim=0) - exact).abs() <= 6 * error + 1e-9).all()
    assert 0 < error.norm() < 0.03 * exact.norm()  # so that another gradient would show
    assert close(loss, cheap_loss) and close(gap, cheap_gap) and metrics.keys() == cheap_metrics.keys()
    assert {name for name in metrics if not close(metrics[name], cheap_metrics[name])} == set()
    assert "cql_clip_diff_min" not in options or 0 < metrics["cql_clipped_share"] < 1


def test_clipped_states_contribute_nothing_to_the_drawn_gradient():
    agent, batch = make_agent(cql_backprop_actions=2, cql_clip_diff_max=-1e3), make_batch()
    td_target, proposals, log_prob = agent.td_target_and_proposals(batch, *torch.zeros(2, 2 * B, A))
    clipped, _, _ = agent.critic_loss(batch, td_target, proposals, log_prob)
    td_loss, _, _ = agent.critic_loss(batch, td_target, proposals[:, :0], log_prob[:, :0])
    gradients = [flat(torch.autograd.grad(x, agent.parameter_groups["critic"])) for x in (clipped, td_loss)]
    assert close(*gradients) and gradients[0].norm() > 0.1


def test_drawn_numbers_beyond_the_rounded_sum_of_the_weights_are_the_last_action(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, 1.5))
    gradients, _ = make_agent(cql_backprop_actions=2).gradients(make_batch(), False)
    assert flat(gradients["critic"]).isfinite().all()


# Precision and compilation.


def test_bfloat16_is_near(monkeypatch):
    torch.set_default_dtype(torch.float32)
    agents = [make_agent(precision=precision, hidden_dim=64) for precision in ("float32", "bfloat16")]
    batch = make_batch(batch_size=64)
    check_bfloat16(agents, batch, batch.observations, batch.actions.unsqueeze(1))
    whole = agents[1].critic(batch.observations, batch.actions.unsqueeze(1))
    monkeypatch.setattr(cql.EnsembleCritic, "max_rows", 30)
    with torch.no_grad():
        pieces = agents[1].critic(batch.observations, batch.actions.unsqueeze(1))
    assert pieces.dtype == torch.float32 and torch.allclose(pieces, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    (
        {"cql_backprop_actions": 2, "cql_lagrange": True}, {"precision": "bfloat16"}, {"cql_variant": "var"},
        {"cql_variant": "rho", "cql_backprop_actions": 2}, {"cql_density": "mixture"},
    ),
    ids=str,
)  # fmt: skip
def test_traced_gradients_are_the_same(options, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(cql.EnsembleCritic, "max_rows", 20)  # so that there are pieces
    agent = make_agent(compile=True, batch_size=B, q_n_hidden_layers=1, policy_n_hidden_layers=1, **options)
    check_traced(cql, agent, make_batch, 1e-2 if "precision" in options else 1e-4, monkeypatch)


def test_compiler_gives_the_same_gradients_and_random_numbers():
    """By a small loss, since updates are the same text in all files."""
    torch.set_default_dtype(torch.float32)
    weight = nn.Parameter(torch.randn(4))

    def gradients(batch):
        loss = (weight * torch.randn_like(batch.rewards)).square().sum()
        return torch.autograd.grad(loss, [weight])[0], loss.detach()

    config, batch = cql.TrainConfig(device="cpu", compile=True), make_batch(batch_size=4)
    agent = types.SimpleNamespace(gradients=gradients, phases=lambda: [()], n_updates=0)
    cql.updater(config, agent, lambda n: batch)
    results = []
    for compute in (agent.compute_gradients, gradients):
        torch.manual_seed(2)
        results.append(torch.cat([x.flatten() for x in compute(batch)]))
    assert agent.compute_gradients != gradients and torch.allclose(*results) and results[0].abs().max() > 0.1


def test_phases_name_what_gradients_are_called_with():
    agent = make_agent(bc_steps=1)
    assert agent.phases() == [(True,), (False,)] and make_agent().phases() == [(False,), (False,)]
    agent.update(make_batch())
    assert agent.phases() == [(False,), (False,)]
