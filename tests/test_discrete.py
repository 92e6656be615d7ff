"""The method of the discrete script against closed forms, numbers worked out by hand, and slow loops."""

import copy
import math
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import check_bfloat16, check_traced, check_updates, close, flat
from torch import nn

from algorithms.discrete import cql_dqn as cql

S, A, B = 4, 3, 6  # states or size of observations, actions, transitions per batch
pytestmark = pytest.mark.usefixtures("float64")
HEADS = pytest.mark.parametrize("head", ("dqn", "c51", "qr"))


def make_agent(observation_dim=S, sizes=(A,), **options):
    """Small networks with all parameters random, so that online and target values differ widely."""
    torch.manual_seed(0)
    options = {"device": "cpu", "hidden_dim": 8, "n_atoms": 5, "n_quantiles": 4, "qf_lr": 0.01} | options
    agent = cql.DiscreteCQL(cql.TrainConfig(**options), observation_dim, list(sizes))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if agent.config.head == "c51":
            agent.critic.atoms.copy_(torch.linspace(-2, 2, len(agent.critic.atoms)))
    return agent


def make_batch(batch_size=B, masked=False):
    """With masks every action is forbidden somewhere, but none that was taken."""
    observations, next_observations = torch.randn(2, batch_size, S)
    actions, next_actions = torch.randint(A, (2, batch_size))
    terminals = (torch.arange(batch_size) % 3 == 1).to(observations.dtype)
    rewards, discounts = torch.randn(batch_size), 0.9 * (1 - terminals)
    batch = cql.Batch(observations, actions, rewards, next_observations, terminals, discounts, next_actions)
    if not masked:
        return batch
    masks = [(torch.rand(batch_size, A) < 0.4) | F.one_hot(x, A).bool() for x in (actions, next_actions)]
    return batch._replace(masks=masks[0].to(torch.uint8), next_masks=masks[1].to(torch.uint8))


def set_table(network, outputs):
    """Makes a network return outputs [S, A, Z] at one-hot observations, which are its features."""
    network.hidden = nn.Identity()
    network.last = nn.Linear(len(outputs), outputs[0].numel(), bias=False)
    network.last.weight = nn.Parameter(outputs.flatten(1).T.clone())


def set_tables(agent, outputs):
    """Sets the outputs of both networks; those of the online one are learned."""
    set_table(agent.critic, outputs)
    set_table(agent.target_critic, outputs)
    agent.parameter_groups["critic"] = list(agent.critic.parameters())
    agent.optimizer = torch.optim.Adam(agent.parameter_groups["critic"], agent.config.qf_lr)
    return agent


def tabular_agent(head, q, **options):
    """An agent whose networks have expected values q [S, A] at one-hot observations, with two quantiles or with atoms 0
    to 10 (then q are whole numbers)."""
    agent = make_agent(len(q), [len(q[0])], head=head, n_quantiles=2, n_atoms=11, **options)
    agent.critic.atoms.copy_(torch.arange(len(agent.critic.atoms)))
    q = torch.as_tensor(q, dtype=torch.float64)
    outputs = {"dqn": q.unsqueeze(-1), "c51": 100 * F.one_hot(q.long(), 11).double()}
    outputs = outputs.get(head, torch.stack([q - 1, q + 1], dim=-1))
    return set_tables(agent, outputs)


def tabular_batch(actions, rewards, discounts):
    """One transition from each state to itself."""
    states, discounts = torch.eye(len(actions)), torch.tensor(discounts)
    columns = torch.tensor(actions), torch.tensor(rewards), states, (discounts == 0).double(), discounts
    return cql.Batch(states, *columns, torch.tensor(actions))


# Closed forms. With errors that are squared without 1/2 the alpha of the theorems is cql_alpha / 2.


class Problem:
    """Transitions as a tabular MDP: their counts are the probabilities P and beta, their mean rewards r."""

    def __init__(self, seed, scale=1.0, noise=1.0, discount=0.8):
        rng = np.random.default_rng(seed)
        self.pairs = np.concatenate([np.arange(S * A), rng.integers(S * A, size=40)])  # each (s, a) is visited
        n = len(self.pairs)
        self.rewards = scale * (rng.normal(size=S * A)[self.pairs] + noise * rng.normal(size=n))
        self.next_states, self.next_actions = rng.integers(S, size=n), rng.integers(A, size=n)
        self.terminals = rng.random(n) < 0.1
        self.discounts = discount * ~self.terminals
        self.counts = np.bincount(self.pairs)
        self.beta = self.counts.reshape(S, A) / self.counts.reshape(S, A).sum(axis=1, keepdims=True)

    @property
    def batch(self):
        columns = self.rewards, np.eye(S)[self.next_states], self.terminals.astype(float), self.discounts
        columns = np.eye(S)[self.pairs // A], self.pairs % A, *columns, self.next_actions
        return cql.Batch(*map(torch.as_tensor, columns))

    def excess(self, q):
        """softmax(Q) / beta - 1."""
        weights = np.exp(q - q.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True) / self.beta - 1

    def fixed_point(self, alpha, target="max"):
        """Solves Q = B Q - alpha (softmax(Q) / beta - 1) by small steps."""
        q = np.zeros((S, A))
        for _ in range(2000):
            following = q[self.next_states, self.next_actions] if target == "sarsa" else q.max(axis=1)[self.next_states]
            backup = np.bincount(self.pairs, weights=self.rewards + self.discounts * following) / self.counts
            q += 0.1 * (backup.reshape(S, A) - alpha * self.excess(q) - q)
        return q

    def agent(self, outputs, **options):
        """Makes an agent whose networks have these outputs."""
        return set_tables(make_agent(n_quantiles=outputs.shape[2], **options), torch.as_tensor(outputs))

    def gradient(self, outputs, **options):
        gradients, metrics = self.agent(outputs, **options).gradients(self.batch)
        return gradients["critic"][0], metrics


ERRORS = pytest.mark.parametrize("td_error, cql_alpha, scale", (("squared", 2.0, 3.0), ("huber", 0.1, 0.2)))


@ERRORS
@pytest.mark.parametrize("target", ("double", "max", "sarsa"))
@pytest.mark.parametrize("head", ("dqn", "qr"))
def test_gradient_vanishes_at_the_closed_form(head, target, td_error, cql_alpha, scale):
    """A Huber error within 1 is the squared one; a single quantile is the mean."""
    problem = Problem(0, scale)
    q = problem.fixed_point(cql_alpha / 2, target)[:, :, None]
    options = {"head": head, "target": target, "td_error": td_error, "cql_alpha": cql_alpha}
    gradient, metrics = problem.gradient(q, **options)
    assert gradient.abs().max() < 1e-10
    assert (metrics["td_linear_share"] == 0) == (td_error == "huber")


@pytest.mark.parametrize("head", ("dqn", "qr"))
def test_updates_lead_to_the_closed_form(head):
    problem = Problem(3, discount=0.5)
    agent = problem.agent(
        torch.randn(S, A, 1), head=head, td_error="squared", target="sarsa", soft_target_update_rate=1
    )
    for rate in [0.03] * 600 + [0.003] * 200:
        agent.optimizer.param_groups[0]["lr"] = rate
        agent.update(problem.batch)
    assert close(agent.critic.last.weight.T.reshape(S, A), problem.fixed_point(0.5, "sarsa"), 1e-3)


@ERRORS
def test_gradient_vanishes_at_the_closed_form_of_quantiles(td_error, cql_alpha, scale):
    """Without a future, and with one reward per pair, 4 |tau_i - 1(theta_i > r)| (r - theta_i) = cql_alpha excess."""
    n, problem = 5, Problem(1, scale, noise=0.0, discount=0.0)
    tau = (np.arange(n) + 0.5) / n
    x = problem.excess(problem.fixed_point(cql_alpha / 4 * (1 / tau).mean()))[:, :, None]
    rewards = problem.rewards[: S * A].reshape(S, A, 1)
    theta = rewards - cql_alpha / 4 * x / np.where(x > 0, tau, 1 - tau)
    gradient, metrics = problem.gradient(theta, head="qr", td_error=td_error, cql_alpha=cql_alpha, target="max")
    assert gradient.abs().max() < 1e-10 and (td_error == "squared" or metrics["td_linear_share"] == 0)


@pytest.mark.parametrize("td_error", ("squared", "huber"))
def test_cql_alpha_is_as_strong_for_quantiles(td_error):
    """Tied quantiles that move together feel what a single value does, errors beyond 1 included."""
    problem, q, options = Problem(2, 2.0), torch.randn(S, A, 1).numpy(), {"td_error": td_error, "cql_alpha": 0.7}
    single, metrics = problem.gradient(q, head="dqn", **options)
    tied, _ = problem.gradient(q.repeat(7, axis=2), head="qr", **options)
    assert close(tied.unflatten(0, (A, 7)).sum(dim=1), single) and 0 < metrics["td_linear_share"] < 1


# The whole loss.


def slow_project(probabilities, atoms, reward, discount):
    """The paper's loop."""
    mass, step, n = [0.0] * len(atoms), (atoms[-1] - atoms[0]) / (len(atoms) - 1), len(atoms)
    for p, z in zip(probabilities, atoms):
        place = (min(max(reward + discount * z, atoms[0]), atoms[-1]) - atoms[0]) / step
        low, high = min(math.floor(place), n - 1), min(math.ceil(place), n - 1)
        mass[low] = mass[low] + p * (1 if low == high else high - place)
        mass[high] = mass[high] + p * (place - low)
    return mass


def slow_quantile_loss(quantiles, targets, huber):
    total, n = 0, len(quantiles)
    for i, quantile in enumerate(quantiles):
        for target in targets:
            u = target - quantile
            error = 2 * abs(u) - 1 if huber and abs(u) > 1 else u**2
            total = total + 2 / n**2 * abs((i + 0.5) / n - (1 if u < 0 else 0)) * error
    return total


def expected(critic, output):
    if critic.head == "c51":
        weights = [x.exp() for x in output]
        return sum(w * z for w, z in zip(weights, critic.atoms)) / sum(weights)
    return sum(output) / len(output)


def slow_loss(agent, batch):
    """One transition, action and output at a time."""
    config, critic, total, zero = agent.config, agent.critic, 0, torch.zeros(())
    masks = [torch.ones(len(batch.rewards), A) if mask is None else mask for mask in (batch.masks, batch.next_masks)]
    for s, a, reward, s_next, terminal, discount, a_next, mask, next_mask in zip(*batch[:7], *masks):
        features, following = critic.features(s), critic.features(s_next)
        output, next_output = critic.outputs(features), agent.target_critic(s_next).detach()
        q = [expected(critic, x) for x in output]
        may = [i for i in range(A) if mask[i]]
        if config.cql_variant == "var":
            logits = [agent.behaviour(s)[i, 0].detach() for i in may]
            weights = [(x - max(logits)).exp() / sum((y - max(logits)).exp() for y in logits) for x in logits]
            mean = sum(w * q[i] for w, i in zip(weights, may))
            gap = (sum(w * (q[i] - mean) ** 2 for w, i in zip(weights, may)) + 1e-8).sqrt()
        else:
            target_q = [expected(critic, x).item() for x in agent.target_critic(s)]
            rho = [config.cql_rho_epsilon / len(may) for _ in range(A)]
            rho[max(may, key=lambda i: target_q[i])] += 1 - config.cql_rho_epsilon
            gap = sum((q[i].exp() * (1 if config.cql_variant == "H" else rho[i]) for i in may), zero).log() - q[a]
        total = total + config.cql_alpha * gap
        chooser = {"double": critic(s_next), "max": next_output}.get(config.target)
        if chooser is not None:
            a_next = max(next_mask.nonzero().flatten(), key=lambda i: expected(critic, chooser[i]).item())
        if config.head == "c51":
            mass = slow_project(next_output[a_next].softmax(0), critic.atoms, reward, discount)
            total = total - sum(m * (x - output[a].logsumexp(0)) for m, x in zip(mass, output[a]))
        else:
            targets = reward + discount * next_output[a_next]
            total = total + slow_quantile_loss(output[a], targets, config.td_error == "huber")
        if not terminal:
            total = total + config.dr3_coefficient * sum(x * y for x, y in zip(features, following))
    return total / len(batch.rewards)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"td_error": "squared", "target": "max", "cql_alpha": 0.3},
        {"dr3_coefficient": 0.7, "target": "sarsa", "cql_alpha": 0.0},
        {"dr3_coefficient": 0.7, "normalize_features": True},
        {"cql_variant": "rho"},
        {"cql_variant": "rho", "cql_rho_epsilon": 0.0},
        {"cql_variant": "var", "cql_alpha": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", (False, True))
@HEADS
def test_loss_and_gradient_are_those_of_slow_loops(head, masked, options):
    """An update scales gradients larger than the limit down to it, and no others; the metric is their norm before."""
    agent, batch = make_agent(head=head, **options), make_batch(masked=masked)
    batch = batch._replace(rewards=3 * batch.rewards)
    before, slow = copy.deepcopy(agent), slow_loss(agent, batch)
    assert close(agent.loss(batch)[0], slow)
    expected = flat(torch.autograd.grad(slow, list(agent.critic.parameters())))
    gradients, metrics = agent.gradients(batch)
    assert gradients.keys() == agent.parameter_groups.keys() and close(flat(gradients["critic"]), expected)
    assert ("dr3_loss" in metrics) == ("dr3_coefficient" in options)
    if head != "c51":
        pairs = (
            agent.td_target(batch).unsqueeze(1)
            - cql.of_actions(agent.critic(batch.observations), batch.actions)[..., None]
        )
        assert close(metrics["td_linear_share"], (pairs.abs() > 1).double().mean())
    assert all(x.isfinite() and not x.requires_grad for x in metrics.values())
    assert torch.equal(flat(agent.parameters()), flat(before.parameters()))
    for factor in (0.5, 2.0):
        limit = factor * expected.norm().item()
        clipped = make_agent(head=head, max_grad_norm=limit, **options)
        metrics = clipped.update(batch)
        assert close(flat([x.grad for x in clipped.critic.parameters()]), min(factor, 1) * expected)
        assert close(metrics["critic_grad_norm"], expected.norm())


# The penalty.


@HEADS
def test_gap_is_of_expected_values_over_the_actions_of_each_state(head):
    """In states with values 1, 3 and 2, 1 of two actions, of which the data have the first. The gap over the batch, or
    of logits or quantiles, would be another."""
    agent = tabular_agent(head, [[1, 3], [2, 1]], discount=0.0)
    loss, metrics = agent.loss(tabular_batch([0, 0], [1.0, 10.0], [0.0, 0.0]))
    hand = {
        "cql_qf_diff": (math.log(math.e + math.e**3) - 1 + math.log(math.e**2 + math.e) - 2) / 2,
        "average_qf": 1.5, "cql_q_greedy": 2.5, "cql_std_q": 0.75, "greedy_is_data": 0.5, "average_target_q": 5.5,
        "cql_data_probability": (1 / (1 + math.e**2) + 1 / (1 + math.exp(-1))) / 2,
        {"c51": "c51_edge_mass"}.get(head, "td_linear_share"): 0.5,
    }  # fmt: skip
    assert {name for name in hand if not close(metrics[name], hand[name])} == set()
    assert hand.keys() | {"qf_loss", "cql_min_qf_loss"} == metrics.keys()
    assert close(metrics["cql_min_qf_loss"], hand["cql_qf_diff"])
    assert close(loss, metrics["qf_loss"] + hand["cql_qf_diff"])


@HEADS
def test_large_values_overflow_nothing(head):
    """The data have the second of two actions, with values 1e4 and 0."""
    agent = tabular_agent(head, [[10, 0]])
    (agent.critic.atoms if head == "c51" else agent.critic.last.weight.data).mul_(1e3)
    gradients, metrics = agent.gradients(tabular_batch([1], [0.0], [0.5]))
    assert close(metrics["cql_qf_diff"], 1e4)
    assert all(x.isfinite().all() for x in (*gradients["critic"], *metrics.values()))


@HEADS
def test_clone_is_cross_entropy_alone(head):
    agent, batch = make_agent(head=head, bc_only=True), make_batch()
    batch = batch._replace(rewards=batch.rewards * math.nan, discounts=batch.discounts * math.nan)
    loss, metrics = agent.loss(batch)
    q = agent.critic.values(agent.critic(batch.observations))
    assert close(loss, -q.softmax(dim=1)[torch.arange(B), batch.actions].log().mean())
    assert metrics.keys() == {"cql_qf_diff", *agent.action_metrics(q, batch.actions)}
    assert agent.holdout_metrics(batch).keys() == {"holdout_gap", "holdout_q"}


# CQL(rho) and CQL(var).


@pytest.mark.parametrize("masked", (False, True))
@HEADS
def test_limits_of_rho(head, masked):
    """All random: CQL(H), less the log of the number of allowed actions. None: the target network's best of them minus
    the data's. The gap of a constant Q is 0, with the entropy variant that number."""
    batch, gaps = make_batch(masked=masked), {}
    for name, options in (("H", {}), (1, {"cql_variant": "rho"}), (0, {"cql_variant": "rho"})):
        agent = make_agent(head=head, **options, **({"cql_rho_epsilon": float(name)} if options else {}))
        gaps[name] = agent.loss(batch)[1]["cql_qf_diff"]
    n_allowed = torch.full((B,), A) if batch.masks is None else batch.masks.sum(dim=1)
    assert close(gaps[1], gaps["H"] - n_allowed.log().mean())
    q, target_q = (agent.critic.values(x(batch.observations)) for x in (agent.critic, agent.target_critic))
    best = cql.allowed(target_q, batch.masks).argmax(dim=1)
    assert (best != cql.allowed(q, batch.masks).argmax(dim=1)).any()  # another network's best would show
    rows = torch.arange(B)
    assert close(gaps[0], (q[rows, best] - q[rows, batch.actions]).mean())


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("variant, gap", (("rho", 0.0), ("var", 1e-4)))
@HEADS
def test_a_constant_q_has_no_gap(head, variant, gap, masked):
    """But for the root of what is added to the variance."""
    batch, agent = make_batch(masked=masked), make_agent(head=head, cql_variant=variant)
    for network in (agent.critic, agent.target_critic):
        nn.init.zeros_(network.last.weight)
        nn.init.constant_(network.last.bias, 0.3)
    assert abs(agent.loss(batch)[1]["cql_qf_diff"] - gap) < 1e-12


@pytest.mark.parametrize("head", ("dqn", "qr"))
@pytest.mark.parametrize("variant", ("rho", "var"))
def test_gradient_vanishes_at_the_closed_form_of_a_bandit(variant, head):
    """CQL(rho): Q = r - alpha (mu / beta - 1) with mu = rho exp Q, normalised. CQL(var), where the clone is exact:
    Q = mean r + s (r - mean r), s = 1 - alpha / std r, the same value under the behaviour. Without a future the target
    network's values, which rho comes from, are any."""
    problem, alpha, target_q = Problem(0, scale=3.0, discount=0.0), 0.3, torch.randn(S, A, 1)
    rewards = (np.bincount(problem.pairs, weights=problem.rewards) / problem.counts).reshape(S, A)
    mean = (problem.beta * rewards).sum(axis=1, keepdims=True)
    std = np.sqrt((problem.beta * (rewards - mean) ** 2).sum(axis=1, keepdims=True))
    rho = 0.2 / A + 0.8 * np.eye(A)[target_q[:, :, 0].argmax(dim=1)]
    q = mean + (1 - alpha / std) * (rewards - mean)
    assert (std > 2 * alpha).all()
    for _ in range(2000 if variant == "rho" else 0):
        mu = rho * np.exp(q)
        q = q + 0.1 * (rewards - alpha * (mu / mu.sum(axis=1, keepdims=True) / problem.beta - 1) - q)
    options = {"head": head, "td_error": "squared", "cql_alpha": 2 * alpha, "cql_rho_epsilon": 0.2}
    agent = problem.agent(q[:, :, None], cql_variant=variant, **options)
    set_table(agent.target_critic, target_q)
    if variant == "var":
        set_table(agent.behaviour, torch.tensor(problem.beta).log().unsqueeze(-1))
        agent.parameter_groups["behaviour"] = list(agent.behaviour.parameters())
    gradients, metrics = agent.gradients(problem.batch)
    assert gradients["critic"][0].abs().max() < (1e-8 if variant == "var" else 1e-10)
    if variant == "var":
        assert gradients["behaviour"][0].abs().max() < 1e-10
        assert close(metrics["average_qf"], problem.rewards.mean())


def test_clone_of_var_follows_the_data():
    """It alone follows its loss. The norm that gradients are scaled down to is the network's own."""
    agents, batch = (
        [make_agent(cql_variant="var", hidden_dim=32, max_grad_norm=x) for x in (1e-6, math.inf)],
        make_batch(256),
    )
    batch = batch._replace(actions=(batch.observations[:, 0] > 0).long())
    parameters = agents[0].parameter_groups["behaviour"]
    assert {*torch.autograd.grad(agents[0].loss(batch)[0], parameters, allow_unused=True)} == {None}
    losses = [[agent.update(batch)["behaviour_loss"] for _ in range(100)] for agent in agents]
    assert losses[0] == losses[1] and losses[0][-1] < 0.2 < losses[0][0]


# Features.


@pytest.mark.parametrize("head", ("dqn", "qr"))
def test_features_of_norm_1_are_finite_where_they_vanish(head):
    agent, batch = make_agent(head=head, normalize_features=True, dr3_coefficient=0.1), make_batch()
    features = agent.critic.features(batch.observations)
    assert close(features.norm(dim=1), torch.ones(B))
    nn.init.constant_(agent.critic.hidden[-2].bias, -1e3)  # below what ReLU lets through
    assert not agent.critic.features(batch.observations).any()
    gradients, metrics = agent.gradients(batch)
    assert all(x.isfinite().all() for x in (*gradients["critic"], *metrics.values()))


def test_metrics_of_features():
    """Singular values 3, 4 and 0.01; the last one is less than a hundredth of all."""
    agent, batch = tabular_agent("dqn", [[0]] * 3), make_batch(4)
    observations = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.01], [0.0, 0.0, 0.0]])
    following = torch.tensor([[3.0, 4.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    batch = batch._replace(observations=observations, next_observations=following)
    hand = {"feature_rank": 2, "feature_norm": 7.01 / 4, "feature_dot": 1.01 / 4, "feature_cosine": 0.6 / 4}
    metrics = agent.feature_metrics(batch)
    assert metrics.keys() == hand.keys() and all(close(metrics[name], hand[name]) for name in hand)
    assert agent.feature_metrics(batch._replace(observations=0 * observations))["feature_rank"] == 1


# Columns of a batch, and the range of atoms.

KINDS = ("terminal", "timeout", "both", "open")
# Lengths and ends of episodes; the recording may cut the last one short.
EPISODES = st.tuples(
    st.lists(st.tuples(st.integers(1, 7), st.sampled_from(KINDS[:3])), max_size=5),
    st.tuples(st.integers(1, 7), st.sampled_from(KINDS)),
).map(lambda parts: [*parts[0], parts[1]])


def make_data(episodes):
    """Observation t of episode e is 100 e + t, and no two actions or masks are the same."""
    lengths, n = [length for length, _ in episodes], sum(length for length, _ in episodes)
    observations = np.concatenate([100.0 * e + np.arange(length) for e, length in enumerate(lengths)])
    terminals, timeouts = np.zeros((2, n), dtype=bool)
    for (_, kind), last in zip(episodes, accumulate(lengths)):
        terminals[last - 1], timeouts[last - 1] = kind in ("terminal", "both"), kind in ("timeout", "both")
    return {
        "observations": observations[:, None], "actions": np.arange(n), "rewards": np.arange(n, dtype=np.float32) ** 2,
        "next_observations": observations[:, None] + 1, "terminals": terminals, "timeouts": timeouts,
        "masks": np.arange(n)[:, None], "next_masks": np.arange(n)[:, None],
    }  # fmt: skip


def slow_rows(episodes, data, config):
    first, gamma = 0, config.discount
    for length, kind in episodes:
        terminal = kind in ("terminal", "both")
        usable = length - (config.target == "sarsa" and not terminal)  # rows that an action or the end follows
        for t in range(usable):
            end = min(t + config.n_step, usable)
            ends = terminal and end == length
            reward = sum(gamma**i * float(data["rewards"][first + t + i]) for i in range(end - t))
            after = None if config.target != "sarsa" or ends else first + end
            observation = data["observations"][first, 0]
            factor, masks = gamma ** (end - t) * (not ends), (first + t, first + end - 1)
            yield observation + t, first + t, reward, observation + end, ends, factor, *masks, after
        first += length


@pytest.mark.parametrize("n_step", (1, 2, 5, 20))
@pytest.mark.parametrize("target", ("double", "sarsa"))
@settings(max_examples=60)
@given(episodes=EPISODES)
def test_columns_are_those_of_a_slow_loop(target, n_step, episodes):
    """Rewards, observations and actions never come from another episode."""
    config = cql.TrainConfig(device="cpu", target=target, n_step=n_step, discount=0.5)
    data = make_data(episodes)
    rows = list(slow_rows(episodes, data, config))
    if not rows:
        assert refusal(cql.td_columns, data, config)[0] == 1
        return
    columns = cql.td_columns(data, config)
    next_actions = columns.pop("next_actions", columns["actions"])
    columns = [columns[key].reshape(-1) for key in cql.Batch._fields if key in columns]
    *expected, after = zip(*rows)
    assert all(x.tolist() == list(y) for x, y in zip(columns, expected)), (columns, expected)
    assert next_actions.dtype == columns[1].dtype == int and len(next_actions) == len(rows)
    assert all(y is None or x == y for x, y in zip(next_actions, after))


@settings(max_examples=60)
@given(episodes=EPISODES, discount=st.sampled_from((0.0, 0.5, 1.0)))
def test_atoms_span_the_discounted_returns(episodes, discount):
    data, returns, first = make_data(episodes), [], 0
    for length, _ in episodes:
        rewards = data["rewards"][first : first + length].tolist()
        returns += [sum(discount**i * r for i, r in enumerate(rewards[t:])) for t in range(length)]
        first += length
    atoms = cql.support(data, cql.TrainConfig(device="cpu", discount=discount, n_atoms=7))
    margin = (max(returns) - min(returns)) / 4 or max(1, max(returns) / 100)
    assert close(atoms, torch.linspace(min(returns) - margin, max(returns) + margin, 7))


def test_given_ends_of_the_atoms_count():
    """Returns are 5, 5 and 4."""
    data = make_data([(3, "terminal")])

    def ends(**options):
        return cql.support(data, cql.TrainConfig(device="cpu", discount=1.0, n_atoms=3, **options)).tolist()

    assert ends() == [4 - 0.25, 4.5, 5 + 0.25]
    assert ends(v_min=-1.0) == [-1, 2.125, 5.25] and ends(v_max=7.0) == [3.75, 5.375, 7]
    assert ends(v_min=100.0, v_max=101.0) == [100, 100.5, 101]
    for options in ({"v_min": 6.0}, {"v_max": 3.0}, {"v_min": 5.25}, {"v_min": 1e9, "v_max": 1e9 + 1e-3}):
        status, message = refusal(ends, **options)
        assert status == 2 and "--v_min" in message and "--v_max" in message


# The update.


@pytest.mark.parametrize("rate, period, variant", ((1.0, 3, "H"), (0.3, 1, "H"), (0.3, 3, "var")))
def test_update_is_a_step_of_adam_then_of_the_target(rate, period, variant):
    options = {"soft_target_update_rate": rate, "target_update_period": period, "qf_lr": 0.03, "cql_variant": variant}
    rates = {"critic": 0.03} | ({"behaviour": 0.03} if variant == "var" else {})
    check_updates(lambda: make_agent(**options), make_batch, lambda _: (), rates, rate, period)


@HEADS
def test_regularisation(head):
    """Weight decay shrinks all weights, layers are normalised without gain, and dropout acts in training alone."""
    agents = [make_agent(head=head, weight_decay=decay) for decay in (0.0, 0.3)]
    before, batch = copy.deepcopy(agents[0]), make_batch()
    for agent in agents:
        agent.update(batch)
    for old, new, other in zip(*(agent.critic.parameters() for agent in (before, *agents))):
        assert close(other, new - 0.01 * 0.3 * old)
    network, x = make_agent(head=head, critic_layer_norm=True).critic, batch.observations
    for layer in (network.hidden[0], network.hidden[2]):
        x = layer(x)
        x = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x.clamp(min=0)
    assert close(network.features(batch.observations), x)
    agent, plain = make_agent(head=head, dropout=0.5, dr3_coefficient=0.1), make_agent(head=head)
    assert (agent.critic(batch.observations) != agent.critic(batch.observations)).any()
    assert agent.feature_metrics(batch) == plain.feature_metrics(batch) and agent.training
    agent.eval()
    assert torch.equal(agent.critic(batch.observations), plain.critic(batch.observations))


# Precision and compilation.


@HEADS
def test_bfloat16_is_near(head):
    torch.set_default_dtype(torch.float32)
    agents = [make_agent(head=head, precision=precision, hidden_dim=64) for precision in ("float32", "bfloat16")]
    batch = make_batch(64)
    check_bfloat16(agents, batch, batch.observations)


TRACED = [
    {"head": "c51", "dr3_coefficient": 0.1},
    {"head": "qr", "precision": "bfloat16", "max_grad_norm": 1.0},
    {"head": "c51", "cql_variant": "rho"},
    {"cql_variant": "var"},
]


@pytest.mark.parametrize("options", TRACED, ids=str)
def test_traced_gradients_are_the_same(options, monkeypatch):
    torch.set_default_dtype(torch.float32)
    agent = make_agent(compile=True, batch_size=B, q_n_hidden_layers=1, **options)
    tolerance = 1e-2 if "precision" in options else 1e-4
    check_traced(cql, agent, lambda: make_batch(masked="precision" not in options), tolerance, monkeypatch)


# Acting.


def test_actions_are_the_parts_of_the_best_combination():
    """Parts 0, 1 and 1, 2, 3; observations are shifted and scaled: elsewhere a greater number would stand at another
    action."""
    network, mean, std = cql.QNetwork(6, [2, 3], 8, 1, "dqn", 1), 10 * np.arange(6), 4.0 ** np.arange(6)
    set_table(network, torch.eye(6).unsqueeze(-1))
    scaling = {"action_low": np.array([0.0, 1.0]), "observation_mean": mean, "observation_std": std}
    network.load_state_dict({name: torch.tensor(x) for name, x in scaling.items()}, strict=False)
    raw = (np.eye(6) + np.eye(6, k=1) / 2) * std + mean
    assert network.act(raw).tolist() == [[i, j] for i in (0, 1) for j in (1, 2, 3)]
    assert network.act(raw[4]).tolist() == [1, 2]


def test_masks_forbid_actions():
    """Values are 0, 1, 2 and 3. Random actions are allowed ones too; a mask has the shape of the values."""
    network = cql.QNetwork(1, [4], 8, 1, "dqn", 1)
    set_table(network, torch.arange(4.0)[None, :, None])
    network.load_state_dict({"action_low": torch.tensor([5])}, strict=False)
    masks = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert network.act(np.ones((3, 1)), masks).tolist() == [8, 6, 5] and network.act([1.0], masks[1] > 0) == 6
    assert network.act(np.ones((2, 1)), masks[1:], "scores").tolist() == [[0, 1, *[-np.inf] * 2], [0, *[-np.inf] * 3]]
    network.epsilon = 1.0
    actions = network.act(np.ones((1000, 1)), np.tile([0, 1, 0, 1], (1000, 1))).tolist()
    assert set(actions) == {6, 8} and 400 < actions.count(6) < 600
    assert {*network.act(np.ones((200, 1))).tolist()} == {5, 6, 7, 8}
    for wrong in (masks[:2], masks[:, :3], masks[0], 2 * masks, masks * np.nan, "1111"):
        with pytest.raises(ValueError, match=r"a mask takes flags 0 and 1 of shape \(3, 4\)"):
            network.act(np.ones((3, 1)), wrong)
    with pytest.raises(ValueError, match="a mask allows no action"):
        network.act(np.ones((3, 1)), masks * [[1], [1], [0]])


def test_masks_that_cannot_be_are_refused():
    """Masks of a state that follows a terminal one are never used."""
    actions, name = np.array([0, 2]), "mine/shop-v0"
    good = {"masks": np.array([[1, 0, 0], [0, 1, 1]]), "next_masks": np.array([[0, 0, 1], [0, 0, 0]])}
    good["terminals"] = np.array([False, True])
    data = dict(good)
    cql.check_masks(data, actions, 3, name)
    assert all((data[key] == good[key]).all() for key in good) and data["masks"].dtype == np.uint8
    names = {"observations": [{"name": "x", "offset": 0.0}], "masks": ["a", "b"]}
    wrong = {
        "lacks masks": {"masks": None}, "lacks next_masks": {"next_masks": None},
        "masks take 3 flags 0 or 1 per transition (shape [2, 2])": {"masks": good["masks"][:, :2]},
        "next_masks take 3 flags": {"next_masks": good["masks"][:1]}, "masks take": {"masks": 0.5 * good["masks"]},
        "masks forbid all actions, or the one taken, in transition 1": {"masks": np.array([[1, 0, 0], [0, 1, 0]])},
        "next_masks forbid all actions, or the one taken, in transition 0": {"next_masks": np.eye(3)[:2] * [[0], [1]]},
        "names of the 3 mask columns": {"encoding": names},
    }  # fmt: skip
    for words, change in wrong.items():
        data = {key: value for key, value in (good | change).items() if value is not None}
        status, line = refusal(cql.check_masks, data, actions, 3, name)
        assert status == 1 and words in line and name in line, line


def test_a_policy_with_layer_normalisation_acts_as_it_was_trained(tmp_path):
    network = cql.QNetwork(3, [4], 8, 2, "dqn", 1, layer_norm=True)
    cql.save(tmp_path / "policy.pt", {"sizes": list(network.sizes), "weights": network.state_dict()})
    observations = np.random.default_rng(0).normal(size=(20, 3))
    scores = cql.load_policy(tmp_path / "policy.pt").scores(observations)
    plain = cql.QNetwork(*network.sizes[:7])
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(scores, network.act(observations, None, "scores"))
    assert not close(torch.tensor(scores), torch.tensor(plain.act(observations, None, "scores")))


@HEADS
def test_spread_of_the_allowed_actions(head):
    """Values 1, 3 and 9, of which the last is forbidden."""
    agent = tabular_agent(head, [[1, 3, 9]])
    batch = tabular_batch([0], [0.0], [0.0])
    batch = batch._replace(observations=torch.ones(1, 1), masks=torch.tensor([[1, 1, 0]]), next_masks=torch.ones(1, 3))
    metrics = agent.loss(batch)[1]
    assert close(metrics["cql_std_q"], 1.0) and close(metrics["cql_q_greedy"], 3.0)
    assert close(metrics["cql_qf_diff"], math.log(1 + math.exp(2)))
