"""CQL's theorems on tabular problems: what the script's own critic loss converges to is the closed form.

A set of transitions is a tabular MDP: its counts are the probabilities P and beta, and its mean rewards are r. The loss
has no 1/2, so the alpha of the theorems is cql_alpha / 2. (For discrete actions: test_discrete.py.)
"""

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.offline import cql

S, A, N_NEXT = 4, 3, 6  # states, actions, next actions per transition
pytestmark = pytest.mark.usefixtures("float64")
EACH = pytest.mark.parametrize("seed, alpha", ((0, 0.1), (1, 1.0), (2, 5.0)))


class Table(nn.Module):
    """Q(s, a) as a table [E, S, A]; observations are one-hot, an action is its number."""

    def __init__(self):
        super().__init__()
        self.values = torch.randn(2, S, A)

    def forward(self, observations, actions):
        return self.values[:, observations.argmax(dim=1, keepdim=True), actions.squeeze(-1).long()]


class Problem:
    """A random MDP, as transitions and in numbers, with a policy pi and another distribution mu of actions."""

    def __init__(self, seed, discount=0.6, reward_shift=0.0):
        rng = np.random.default_rng(seed)
        pairs = np.concatenate([np.arange(S * A), rng.integers(S * A, size=40)])  # numbers of (s, a), each one visited
        rewards = rng.normal(size=len(pairs)) + reward_shift
        next_states = rng.integers(S, size=len(pairs))
        terminals = rng.random(len(pairs)) < 0.1
        n_pi = 1 + rng.multinomial(N_NEXT - A, np.full(A, 1 / A), size=S)  # counts of N_NEXT actions in each state

        counts = np.bincount(pairs)
        transition = np.zeros((S * A, S))
        np.add.at(transition, (pairs, next_states), ~terminals / counts[pairs])
        self.discount, self.pi, self.mu = discount, n_pi / N_NEXT, rng.dirichlet(np.ones(A), size=S)
        self.beta = counts.reshape(S, A) / counts.reshape(S, A).sum(axis=1, keepdims=True)
        self.mean_rewards = np.bincount(pairs, weights=rewards) / counts
        self.transition = (transition[:, :, None] * self.pi).reshape(S * A, S * A)  # P^pi, [(s, a), (s', a')]

        rows = np.repeat(np.arange(len(pairs)), N_NEXT)  # one copy per next action
        next_actions = np.concatenate([np.repeat(np.arange(A), n_pi[state]) for state in next_states])
        columns = np.eye(S)[pairs // A], pairs[:, None] % A, rewards, np.eye(S)[next_states], terminals
        self.batch = cql.Batch(*(torch.tensor(column[rows], dtype=torch.float64) for column in columns))
        self.next_actions = torch.tensor(next_actions).view(-1, 1, 1)

    def backup(self, q):
        """r + gamma P^pi q."""
        return (self.mean_rewards + self.discount * self.transition @ q.ravel()).reshape(S, A)

    def solve(self, rewards):
        """(I - gamma P^pi)^-1 rewards: Q^pi for the mean rewards."""
        return np.linalg.solve(np.eye(S * A) - self.discount * self.transition, rewards.ravel()).reshape(S, A)

    @property
    def q_pi(self):
        return self.solve(self.mean_rewards)

    def value(self, q):
        return (self.pi * q).sum(axis=1)

    def agent(self, **options):
        agent = cql.CQL(cql.TrainConfig(device="cpu", discount=self.discount, **options), S, 1)
        agent.critic, agent.target_critic = Table(), Table()
        return agent


def minimise(agent, problem, mu=None, n_steps=1):
    """Newton steps down the loss, one of which is exact where it is quadratic. Proposals are all actions, with
    weights exp(Q / T) (the integral of CQL(H)), or mu times as much."""
    batch = problem.batch
    log_prob = -torch.tensor(np.ones((S, A)) if mu is None else mu).log()[batch.observations.argmax(dim=1)]
    proposals = torch.arange(A).view(1, A, 1).expand(len(log_prob), A, 1)
    n = A if agent.config.cql_alpha else 0
    td_target = agent.td_target(batch, problem.next_actions, torch.zeros(len(log_prob), 1))
    return newton(agent, n_steps, batch, td_target, proposals[:, :n], log_prob[:, :n])


def newton(agent, n_steps, *arguments):
    """Newton steps down the critic loss of these arguments. Returns Q of the first critic."""
    for _ in range(n_steps):
        values = agent.critic.values = agent.critic.values.detach().requires_grad_()
        loss, _, _ = agent.critic_loss(*arguments)
        (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
        rows = [torch.autograd.grad(gradient[..., a].sum(), values, retain_graph=True)[0] for a in range(A)]
        agent.critic.values = (values - torch.linalg.solve(torch.stack(rows, dim=2), gradient)).detach()
    return agent.critic.values[0].numpy()


def fixed_point(problem, mu=None, **options):
    """The Q at which copying the target and minimising the loss settles, the same for both critics."""
    agent = problem.agent(**options)
    for _ in range(50):
        minimise(agent, problem, mu)
        agent.target_critic.values = agent.critic.values
    assert_equal(agent.critic.values[1], agent.critic.values[0])
    return agent.critic.values[0].numpy()


def pushed_down(problem, mu, alpha):
    """The fixed point for a given mu: weights mu exp(Q / T) are mu in the limit of a large T."""
    return fixed_point(problem, mu, cql_alpha=2 * alpha, cql_temp=1e11)


def chi2(mu, beta):
    return ((mu - beta) ** 2 / beta).sum(axis=1)


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def assert_equal(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-7)


@EACH
def test_pushing_down_alone_bounds_q_in_every_pair(seed, alpha):
    """Theorem 3.1, for any mu. Its penalty mu / beta is (mu - beta) / beta of the loss with rewards lower by alpha."""
    problem = Problem(seed)
    q = pushed_down(Problem(seed, reward_shift=-alpha), problem.mu, alpha)
    assert_equal(q, problem.q_pi - alpha * problem.solve(problem.mu / problem.beta))
    assert (q < problem.q_pi).all()
    assert_equal(fixed_point(problem, cql_alpha=0.0), problem.q_pi)


@EACH
def test_pushing_data_up_too_bounds_the_value(seed, alpha):
    """Theorem 3.2, mu = pi: the value is a lower bound, and tighter than that of theorem 3.1."""
    problem = Problem(seed)
    q = pushed_down(problem, problem.pi, alpha)
    assert_equal(q, problem.q_pi - alpha * problem.solve(problem.pi / problem.beta - 1))
    assert_equal(problem.value(problem.pi / problem.beta - 1), chi2(problem.pi, problem.beta))
    assert (problem.value(q) <= problem.value(problem.q_pi)).all()
    looser = pushed_down(Problem(seed, reward_shift=-alpha), problem.pi, alpha)
    assert (problem.value(q) >= problem.value(looser)).all()


def test_pushing_data_up_too_bounds_neither_q_nor_other_values():
    """Without a future, Q moves by -alpha (pi / beta - 1), up where the data acts more often than pi. And where mu is
    where pi seldom acts although the data does, all values end above the true ones."""
    problem = Problem(0, discount=0.0)
    q = pushed_down(problem, problem.pi, alpha=1.0)
    assert_equal(q - problem.q_pi, 1 - problem.pi / problem.beta)
    assert (q > problem.q_pi).any() and (problem.value(q) <= problem.value(problem.q_pi)).all()
    problem = Problem(0)
    mu = np.where(np.arange(A) == (problem.pi / problem.beta).argmin(axis=1, keepdims=True), 0.98, 0.01)
    assert (problem.value(pushed_down(problem, mu, alpha=1.0)) > problem.value(problem.q_pi)).all()


@EACH
@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_entropy_variant(seed, alpha, temperature):
    """CQL(H): mu is the softmax of Q itself."""
    problem = Problem(seed)
    q = fixed_point(problem, cql_alpha=2 * alpha, cql_temp=temperature)
    assert_equal(q, problem.backup(q) - alpha * (softmax(q / temperature) / problem.beta - 1))


def test_without_importance_sampling_the_data_action_counts_twice():
    """The plain logsumexp takes all actions, and the one in the data again."""
    problem = Problem(0)
    q = fixed_point(problem, cql_alpha=2.0, cql_importance_sample=False)
    doubled = softmax(q[:, None] + np.log1p(np.eye(A)))  # [S, data action, action]
    mu = np.einsum("sd,sda->sa", problem.beta, doubled)
    assert_equal(q, problem.backup(q) - (mu / problem.beta - 1))


class Bandit:
    """Transitions that end, with six actions per state by counts; their mean rewards r. The proposals of CQL(rho) and
    CQL(var) are six actions by counts too: those of a policy, and those of the data, of which the clone is exact."""

    def __init__(self, seed, monkeypatch, variant, **options):
        rng = np.random.default_rng(seed)
        beta, rho = 1 + rng.multinomial(6 - A, np.full(A, 1 / A), size=(2, S))
        self.beta, self.rho, states = beta / 6, rho / 6, np.repeat(np.arange(S), 6)
        actions = np.concatenate([np.repeat(np.arange(A), n) for n in beta])
        rewards = 5 * actions + rng.normal(size=S)[states] + rng.normal(size=S * 6)
        self.rewards = np.bincount(A * states + actions, weights=rewards).reshape(S, A) / beta
        columns = np.eye(S)[states], actions[:, None], rewards, np.eye(S)[states], np.ones(S * 6)
        batch = cql.Batch(*(torch.tensor(column, dtype=torch.float64) for column in columns))
        proposer = np.array([np.repeat(np.arange(A), n) for n in (beta if variant == "var" else rho)])

        def sample(states, _, n):  # the actor and the clone hand on the states
            found = torch.tensor(proposer)[states.argmax(dim=1), :n].unsqueeze(-1)
            assert n in (1, 6) and len(found) == len(states)
            return found, torch.full(found.shape[:2], np.nan)

        monkeypatch.setattr(cql, "sample_actions", sample)
        config = cql.TrainConfig(device="cpu", cql_variant=variant, cql_n_actions=2, **options)
        self.agent = cql.CQL(config, S, 1)
        self.agent.critic, self.agent.target_critic = Table(), Table()
        if variant == "var":
            self.agent.behaviour.forward = lambda states: (states, states)
        both = torch.cat([batch.observations, batch.next_observations])
        self.arguments = batch, *self.agent.td_target_and_proposals(batch, both, both)

    def solve(self):
        return newton(self.agent, 12, *self.arguments)


@EACH
@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_variant_of_the_previous_policy(seed, alpha, temperature, monkeypatch):
    """CQL(rho): mu is the policy's probability times exp(Q / T), normalised."""
    bandit = Bandit(seed, monkeypatch, "rho", cql_alpha=2 * alpha, cql_temp=temperature)
    q = bandit.solve()
    mu = bandit.rho * np.exp(q / temperature)
    mu /= mu.sum(axis=1, keepdims=True)
    assert np.abs(q - (bandit.rewards - alpha * (mu / bandit.beta - 1))).max() < 1e-8


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_variance_variant_shrinks_the_spread_alone(seed, monkeypatch):
    """CQL(var): Q = mean r + s (r - mean r), s = 1 - cql_alpha / (2 std r); the value under the behaviour is unchanged.
    The variance of six samples is that of the distribution times 6 / 5."""
    bandit = Bandit(seed, monkeypatch, "var", cql_alpha=1.0)
    mean = (bandit.beta * bandit.rewards).sum(axis=1, keepdims=True)
    std = np.sqrt((bandit.beta * (bandit.rewards - mean) ** 2).sum(axis=1, keepdims=True))
    shrunk = 1 - np.sqrt(6 / 5) / (2 * std)
    assert ((shrunk > 0.5) & (shrunk < 0.95)).all()
    expected = mean + shrunk * (bandit.rewards - mean)
    bandit.agent.critic.values = torch.tensor(expected) + 0.01 * torch.randn(2, S, A)
    assert np.abs(bandit.solve() - expected).max() < 2e-9


@EACH
def test_every_backup_expands_the_gap_by_alpha_chi2(seed, alpha):
    """Theorem 3.4: E_beta Q - E_mu Q grows beyond that of the plain backup of the same Q_k, for a given mu and for the
    softmax of Q."""
    problem = Problem(seed)
    plain = problem.agent(cql_alpha=0.0)
    for mu, temperature in ((problem.mu, 1e11), (None, 1.0)):
        agent = problem.agent(cql_alpha=2 * alpha, cql_temp=temperature)
        for _ in range(10):
            plain.target_critic.values = agent.target_critic.values
            q, q_plain = minimise(agent, problem, mu, n_steps=1 if mu is not None else 8), minimise(plain, problem)
            weights = softmax(q) if mu is None else mu
            expansion = ((problem.beta - weights) * (q - q_plain)).sum(axis=1)
            assert_equal(expansion, alpha * chi2(weights, problem.beta))
            assert (expansion > 0).all()
            agent.target_critic.values = agent.critic.values


class Trajectories:
    """Episodes of a behaviour in a random MDP, some of which time out, as the columns of a dataset and by numbers."""

    discount = 0.6

    def __init__(self, seed):
        rng, rows = np.random.default_rng(seed), []
        transition, beta = rng.dirichlet(np.ones(S), size=(S, A)), rng.dirichlet(5 * np.ones(A), size=S)
        for _ in range(60):
            state = rng.integers(S)
            for t in range(8):
                action, following = rng.choice(A, p=beta[state]), None
                following = rng.choice(S, p=transition[state, action])
                terminal = rng.random() < 0.1
                rows.append((state, action, rng.normal(), following, terminal, t == 7 and not terminal))
                state = following
                if terminal:
                    break
        self.rows = rows
        states, actions, rewards, following, terminals, timeouts = map(np.array, zip(*rows))
        columns = np.eye(S)[states], actions[:, None], rewards, np.eye(S)[following], terminals, timeouts
        self.data = dict(zip(cql.COLUMNS, columns))

    def q(self):
        """Solves Q(s, a) = mean of r + gamma Q(s', a') over the rows whose next action is known."""
        matrix, sums = np.eye(S * A), np.zeros(S * A)
        known = [(row, later) for row, later in zip(self.rows, [*self.rows[1:], None]) if not row[5]]
        counts = np.bincount([A * row[0] + row[1] for row, _ in known], minlength=S * A)
        for (state, action, reward, _, terminal, _), later in known:
            place = A * state + action
            sums[place] += reward / counts[place]
            if not terminal:
                matrix[place, A * later[0] + later[1]] -= self.discount / counts[place]
        return np.linalg.solve(matrix, sums).reshape(S, A)


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_sarsa_learns_the_value_of_the_behaviour(seed, capsys):
    """Whatever the policy does: its next actions are all the same here."""
    problem = Trajectories(seed)
    data = cql.with_next_actions(problem.data, "none", "--target sarsa")
    n_dropped = sum(row[5] for row in problem.rows)
    assert n_dropped > 5 and f"{n_dropped} of {len(problem.rows)} training transitions" in capsys.readouterr().out
    problem.batch = cql.Batch(*(torch.tensor(data[key], dtype=torch.float64) for key in cql.Batch._fields))
    problem.next_actions = torch.zeros(len(problem.batch.rewards), 1, 1)
    problem.agent = lambda **options: Problem.agent(problem, **options)
    assert_equal(fixed_point(problem, target="sarsa", cql_alpha=0.0), problem.q())
