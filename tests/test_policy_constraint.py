"""TD3+BC, BRAC, BEAR and BCQ: each loss against numbers that the authors' code gave, or against its formula in slow
loops; limits in which a loss is known; what an update trains; and acting."""

import copy
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from algorithms.offline import cql
from algorithms.offline import policy_constraint as script

S, A, B, N = 3, 2, 5, 4  # sizes of states, actions and batches; samples of the divergence
pytestmark = pytest.mark.usefixtures("float64")
AUTHORS = json.loads(Path(__file__).with_name("authors_losses.json").read_text())
SIZES = {"device": "cpu", "policy_hidden_dims": "8-7", "q_hidden_dims": "7-8", "behaviour_hidden_dims": "6-5"}
PLAIN = {"q_scale": 0.0, "policy_noise": 0.0, "target_update_period": 1}  # all methods but TD3+BC
GAUSSIAN = PLAIN | {"policy": "gaussian", "target_policy": False, "n_divergence_samples": N}
KL = GAUSSIAN | {"log_std_max": 0.0, "log_std_tanh": True, "behaviour": "gaussian", "divergence": "kl"}
BEST = {"n_target_actions": 10, "target_min_weight": 0.75, "n_acting_samples": 100, "behaviour": "vae"}
BEAR = GAUSSIAN | BEST | {"divergence": "raw_mmd", "divergence_lagrange": True}
PAPER = {"n_divergence_samples": 5, "target_policy": True, "log_std_min": -20.0, "log_std_max": 20.0}
METHODS = {
    "td3_bc": {},
    "brac_kl": KL,
    "brac_mmd": KL | {"divergence": "mmd"},
    "brac_wasserstein": KL | {"divergence": "wasserstein", "behaviour": "data", "n_divergence_samples": 1},
    "bear": BEAR,  # as in the evaluations of D4RL
    "bear_paper": BEAR | PAPER,  # as in the repository of the paper
    "bcq": PLAIN | BEST | {"policy": "perturbation", "divergence": "none"},
}
BRAC = ("brac_kl", "brac_mmd", "brac_wasserstein")


def make_agent(method, **options):
    """An agent whose parameters are all random, so that values, means and targets differ widely."""
    options = SIZES | METHODS[method] | options
    agent = script.PolicyConstraint(script.TrainConfig(**options), S, A)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        agent.log_multiplier.zero_()
    return agent


def make_batch(batch_size=B):
    observations, next_observations = torch.randn(2, batch_size, S)
    actions, next_actions = torch.empty(2, batch_size, A).uniform_(-1, 1)
    terminals = (torch.arange(batch_size) == 1).to(observations.dtype)
    return script.Batch(observations, actions, torch.randn(batch_size), next_observations, terminals, next_actions)


def close(actual, expected, tolerance=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return torch.allclose(actual.reshape(expected.shape), expected, rtol=tolerance, atol=tolerance)


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


@pytest.fixture
def draws(monkeypatch):
    """draws(x, ...) are the next random numbers that the script draws, in this order. It must draw all of them."""
    queue = []

    def take(*shape, **_):
        return queue.pop(0).reshape(shape)

    def put(*tensors):
        assert not queue
        queue.extend(tensors)
        monkeypatch.setattr(torch, "randn", take)
        for name in ("randn_like", "rand_like"):
            monkeypatch.setattr(torch, name, lambda x: take(*x.shape))

    yield put
    assert not queue


# The authors' numbers, see the head of authors_losses.json.


def tensor(shape, scale, k):
    return (scale * torch.sin(k * torch.arange(1.0, math.prod(shape) + 1))).reshape(shape)


def head(values, i, n):
    return values.chunk(n)[i]


def member(values, i):
    return values[i].T.squeeze(-1)  # a weight [inputs, outputs] or a bias [1, outputs] of the i-th critic


def parts(network, *layers):
    """Where the authors' tensors stand in the script's network: name -> (parameter, view of a part of it). Each of
    `layers` has names for a layer, one per head, or for a critic, one per layer."""
    found = {}
    if isinstance(network, script.EnsembleCritic):
        for i, names in enumerate(layers):
            for name, *pair in zip(names.split(), network.weights, network.biases):
                found[name] = pair, functools.partial(member, i=i)
    else:
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, names in zip(linear, layers, strict=True):
            for i, name in enumerate(names.split()):
                found[name] = (layer.weight, layer.bias), functools.partial(head, i=i, n=len(names.split()))
    return {f"{x}.{kind}": (y, view) for x, (pair, view) in found.items() for kind, y in zip(("weight", "bias"), pair)}


def places(agent, method):
    """All `parts` of an agent, by the names of that method's code."""

    def under(prefix, *layers):
        return [" ".join(f"{prefix}.{name}" for name in names.split()) for names in layers]

    if method == "bear":
        policy, actors = ("fc0", "fc1", "last_fc last_fc_log_std"), ["policy"]
        critics = [
            [*under(f"{q}1", "fc0 fc1 last_fc"), *under(f"{q}2", "fc0 fc1 last_fc")] for q in ("qf", "target_qf")
        ]
    else:
        policy, actors = ("l1", "l2", "mean log_std" if method == "bear_paper" else "l3"), ["actor", "actor_target"]
        critics = [under(prefix, "l1 l2 l3", "l4 l5 l6") for prefix in ("critic", "critic_target")]
    found = parts(agent.critic, *critics[0]) | parts(agent.target_critic, *critics[1])
    for network, prefix in zip((agent.actor.network, agent.target_network), actors):
        found |= parts(getattr(network, "layers", network), *under(prefix, *policy))
    if agent.behaviour:
        found |= parts(agent.behaviour.encoder, *under("vae", "e1", "e2", "mean log_std"))
        found |= parts(agent.behaviour.decoder, *under("vae", "d1", "d2", "d3"))
    return found


def authors(method, **options):
    """An agent with the authors' weights, where these stand, the batch, the noise, and what the authors' code gave."""
    given = AUTHORS[method]
    dims = "6-5" if method == "bear" else "5-4"
    options = {"policy_hidden_dims": dims, "q_hidden_dims": dims} | options
    agent = make_agent(method, **options)
    found = places(agent, method)
    assert found.keys() == given["weights"].keys()
    for name, (parameter, place) in found.items():
        place(parameter.data).copy_(tensor(*given["weights"][name]))
    found |= dict.fromkeys(("log_alpha", "log_lagrange"), (agent.log_multiplier, torch.clone))
    inputs = {name: tensor(*x) for name, x in AUTHORS["inputs"].items() if name != "terminals"}
    batch = script.Batch(terminals=torch.tensor(AUTHORS["inputs"]["terminals"]), **inputs)
    return agent, found, batch, [tensor(*x) for x in given["noise"].values()], given


def check_gradients(loss, found, expected, *prefixes):
    """Compares those gradients of a loss whose names start so."""
    names = [name for name in expected if name.startswith(prefixes)]
    assert names and all(any(name.startswith(x) for name in names) for x in prefixes)
    for name in names:
        parameter, place = found[name]
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        gradient = place(gradient).flatten()
        value = (gradient * torch.sin(torch.arange(1.0, len(gradient) + 1))).sum()
        assert close(value, expected[name]), name


def test_td3_bc_is_the_authors(draws):
    agent, found, batch, (noise,), given = authors("td3_bc")
    unused = torch.zeros_like(noise)  # a deterministic policy has no noise of its own
    draws(unused, noise, unused)
    losses, metrics = agent.losses(batch, False, True, True, True)
    draws(unused, noise)
    result = given["results"]
    assert close(agent.td_target(batch), result["target_q"])
    assert close(losses["critic"], result["critic_loss"]) and close(losses["actor"], result["actor_loss"])
    assert close(metrics["qf1_loss"] + metrics["qf2_loss"], result["critic_loss"])
    check_gradients(losses["critic"], found, given["gradients"], "critic.")
    check_gradients(losses["actor"], found, given["gradients"], "actor.")
    assert close(agent.actor.actions(batch.observations), result["selected_action"])
    distance = (agent.actor.actions(batch.observations) - batch.actions).square().mean()
    assert close((result["actor_loss"] - distance) / -np.mean(result["actor_q1"]), result["lambda"])


def test_bcq_is_the_authors(draws):
    agent, found, batch, (encoder, next_latents, latents, acting), given = authors("bcq")
    draws(encoder, next_latents, latents)
    losses, _ = agent.losses(batch, True, True, True, True)
    draws(next_latents)
    result = given["results"]
    assert close(agent.td_target(batch), result["target_q"])
    for name, group in (("vae", "behaviour"), ("critic", "critic"), ("actor", "actor")):
        assert close(losses[group], result[f"{name}_loss"]), name
        check_gradients(losses[group], found, given["gradients"], f"{name}.")
    draws(latents)
    assert close(agent.draw(batch.observations, 1)[0], result["perturbed_actions"])
    agent.actor.noise = acting
    assert close(agent.actor.actions(batch.observations), result["selected_action"])


@pytest.mark.parametrize("when", ["warm_up", "later"])
@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
@pytest.mark.parametrize("method", ["bear", "bear_paper"])
def test_bear_is_the_authors(draws, method, kernel, when):
    width = 2 * AUTHORS[method]["settings"]["mmd_sigma"]
    agent, found, batch, normals, given = authors(method, kernel=kernel, kernel_width=width)
    encoder, next_noise, latents, noise, *acting = normals
    if method == "bear_paper":
        noise = noise.clamp(-0.5, 0.5)  # in the policy's loss
    agent.log_multiplier.data.fill_(0.3)
    draws(encoder, next_noise, noise, latents)
    losses, metrics = agent.losses(batch, True, True, True, when == "later")
    draws(next_noise)
    result, later = given["results"], given[f"{kernel}, {when}"]
    assert close(agent.td_target(batch), result["target_q"]) and close(losses["behaviour"], result["vae_loss"])
    assert close(losses["critic"], result.get("critic_loss") or result["q1_loss"] + result["q2_loss"])
    draws(noise, latents)
    drawn = agent.draw(batch.observations, agent.config.n_divergence_samples)
    assert close(drawn[1], result["raw_policy"])
    assert close(agent.divergence(batch.observations, None, drawn), later["mmd"])
    assert close(metrics["divergence"], np.mean(later["mmd"]))
    check_gradients(losses["behaviour"], found, given["gradients"], "vae.")
    check_gradients(losses["critic"], found, given["gradients"], "qf1" if method == "bear" else "critic.")
    check_gradients(losses["multiplier"], found, later["gradients"], "log_")
    if method == "bear":
        assert close(losses["actor"], later["actor_loss"])
        check_gradients(losses["actor"], found, later["gradients"], "policy.")
        agent.actor.noise = acting[0]
        assert close(agent.actor.actions(batch.observations), result["selected_action"])
    elif when == "warm_up":  # later, the paper's code takes the mean Q of all samples, D4RL's that of the first one
        threshold = math.exp(0.3) * agent.config.divergence_threshold  # which the paper's code leaves out: a constant
        assert close(losses["actor"], later["actor_loss"] - threshold)
        check_gradients(losses["actor"], found, later["gradients"], "actor.")


# BRAC by slow loops, and limits in which a loss is known.


def gaussian(network, observation):
    """Mean and log standard deviation of BRAC's Gaussians at one observation [O], as NumPy."""
    mean, log_std = network.layers(observation).detach().numpy().reshape(2, A)
    return mean, -5 + 2.5 * (np.tanh(log_std) + 1)


def log_density(mean, log_std, action):
    """Log-density of an action [A] under the tanh of a Gaussian."""
    z = np.arctanh(action)
    log_normal = -0.5 * ((z - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.sum(log_normal - np.log(1 - action**2))


def slow_kl(agent, observations, noise):
    """mean_n log pi(a_n|s) - log b(clip(a_n)|s) of each state."""
    result = []
    for observation, draws in zip(observations, noise.numpy()):
        mean, log_std = gaussian(agent.actor.network, observation)
        terms = []
        for draw in draws:
            action = np.tanh(mean + np.exp(log_std) * draw)
            clipped = np.clip(action, -1 + 1e-3, 1 - 1e-3)
            behaviour = log_density(*gaussian(agent.behaviour, observation), clipped)
            terms.append(log_density(mean, log_std, action) - behaviour)
        result.append(np.mean(terms))
    return result


def slow_mmd(agent, observations, noise, behaviour_noise, sigma):
    """k_xx + k_yy - 2 k_xy of each state, of actions after the tanh, without a root; k = exp(-|.|_1 / sigma)."""
    result = []
    for observation, *draws in zip(observations, noise.numpy(), behaviour_noise.numpy()):
        x, y = [], []
        for actions, network, rows in zip((x, y), (agent.actor.network, agent.behaviour), draws):
            mean, log_std = gaussian(network, observation)
            actions += [np.tanh(mean + np.exp(log_std) * row) for row in rows]
        k = [np.mean([np.exp(-np.abs(a - b).sum() / sigma) for a in p for b in q]) for p, q in ((x, x), (y, y), (x, y))]
        result.append(k[0] + k[1] - 2 * k[2])
    return result


def critic_value(critic, observation, action):
    """The values of all critics for one state [O] and action [A]."""
    return critic(observation[None], torch.as_tensor(action)[None, None]).detach().flatten().numpy()


def slow_wasserstein(agent, observations, actions, data_actions):
    """c(s, a_pi) - c(s, a_data) of each state."""
    rows = zip(observations, actions.detach(), data_actions)
    return [critic_value(agent.discriminator, s, a)[0] - critic_value(agent.discriminator, s, b)[0] for s, a, b in rows]


def slow_divergence(agent, observations, data_actions, noise, behaviour_noise):
    """The divergence of each state, and the random numbers that the script draws for it, first the policy's."""
    name = agent.config.divergence
    if name == "kl":
        return slow_kl(agent, observations, noise), [noise]
    if name == "mmd":
        return slow_mmd(agent, observations, noise, behaviour_noise, 20.0), [noise, behaviour_noise]
    mean, log_std = agent.actor.network(observations)
    actions = torch.tanh(mean + log_std.exp() * noise[:, 0])
    return slow_wasserstein(agent, observations, actions, data_actions), [noise[:, :1]]


def brac(method, **options):
    """An agent, a batch, normal numbers [B, N, A] for policy and clone, and slow_divergence at s and at s'."""
    agent, batch = make_agent(method, **options), make_batch()
    agent.actor.network.layers[-1].bias.data[0] += 4  # some actions beyond 0.999, where the density is clipped
    noise, behaviour_noise = torch.randn(2, B, N, A)
    here, there = (
        slow_divergence(agent, *rows, noise, behaviour_noise)
        for rows in ((batch.observations, batch.actions), (batch.next_observations, batch.next_actions))
    )
    return agent, batch, noise, behaviour_noise, here, there


@pytest.mark.parametrize("method", BRAC)
def test_brac_policy_loss(draws, method):
    """Q's action is the first of those that the divergence is estimated from."""
    agent, batch, noise, behaviour_noise, (divergence, drawn), _ = brac(method, divergence_weight=0.7)
    q = []
    for observation, draw in zip(batch.observations, noise[:, 0].numpy()):
        mean, log_std = gaussian(agent.actor.network, observation)
        q.append(critic_value(agent.critic, observation, np.tanh(mean + np.exp(log_std) * draw)).min())
    for with_q in (True, False):
        draws(*drawn, *([torch.rand(B)] if agent.discriminator else []))
        losses, metrics = agent.losses(batch, False, False, True, with_q)
        assert close(losses["actor"], 0.7 * np.mean(divergence) - with_q * np.mean(q))
        assert close(metrics["divergence"], np.mean(divergence)) and metrics["divergence_weight"] == 0.7
    assert np.std(divergence) > 1e-3


@pytest.mark.parametrize("method", BRAC)
def test_brac_gradient(draws, method):
    """The policy's gradient along a random direction is that of the slow divergence."""
    agent, batch, noise, behaviour_noise, (_, drawn), _ = brac(method)
    parameters = agent.parameter_groups["actor"]
    direction, uniform = [torch.randn_like(x) for x in parameters], torch.rand(B)
    draws(*drawn, *([uniform] if agent.discriminator else []))
    losses, _ = agent.losses(batch, False, False, True, False)
    gradient = torch.autograd.grad(losses["actor"], parameters)
    values = []
    for change in (1e-6, -2e-6):
        torch._foreach_add_([x.data for x in parameters], direction, alpha=change)
        values.append(np.mean(slow_divergence(agent, batch.observations, batch.actions, noise, behaviour_noise)[0]))
    slope = (flat(gradient) * flat(direction)).sum()
    assert close(slope, (values[0] - values[1]) / 2e-6, 1e-6) and abs(slope) > 1e-3


@pytest.mark.parametrize("method", BRAC)
def test_brac_td_targets(draws, method):
    """-p has r + gamma (1 - terminal) min Q', and -v takes off gamma (1 - terminal) alpha D(s')."""
    agent, batch, noise, _, _, (divergence, drawn) = brac(method, divergence_weight=0.7)
    draws(noise[:, :1])
    plain = agent.td_target(batch)
    next_q = []
    for observation, draw in zip(batch.next_observations, noise[:, 0].numpy()):
        mean, log_std = gaussian(agent.actor.network, observation)
        next_q.append(critic_value(agent.target_critic, observation, np.tanh(mean + np.exp(log_std) * draw)).min())
    expected = batch.rewards + 0.99 * (1 - batch.terminals) * torch.tensor(next_q)
    assert close(plain, expected)
    agent.config.value_penalty = True
    draws(*drawn)
    difference = agent.td_target(batch) - plain
    assert close(difference, -0.99 * (1 - batch.terminals) * 0.7 * torch.tensor(divergence))
    assert difference[1] == 0 and (difference.abs() > 1e-4).sum() == B - 1


def test_brac_clone(draws):
    """Likelihood of the clipped actions, and the weighted log-density of a sample; its weight aims at entropy -A."""
    agent, batch = make_agent("brac_kl"), make_batch()
    batch.actions[0] = 1.0
    noise, likelihood, log_prob = torch.randn(B, A), [], []
    for observation, action, draw in zip(batch.observations, batch.actions.numpy(), noise.numpy()):
        mean, log_std = gaussian(agent.behaviour, observation)
        likelihood.append(log_density(mean, log_std, np.clip(action, -0.999, 0.999)))
        log_prob.append(log_density(mean, log_std, np.tanh(mean + np.exp(log_std) * draw)))
    agent.clone_alpha.data.fill_(0.6)
    draws(noise)
    losses, _ = agent.losses(batch, True, False, False, False)
    assert losses.keys() == {"behaviour", "clone_alpha"}
    assert close(losses["behaviour"], 0.6 * np.mean(log_prob) - np.mean(likelihood))
    assert close(losses["clone_alpha"], 0.6 * (-np.mean(log_prob) + A))  # alpha (entropy - target)
    (gradient,) = torch.autograd.grad(losses["clone_alpha"], agent.clone_alpha)
    assert close(gradient, A - np.mean(log_prob))


def test_wasserstein_critic(draws):
    """-D + 5 max(slope - 1, 0)^2, with slopes by finite differences between the policy's action and the data's."""
    agent, batch = make_agent("brac_wasserstein"), make_batch()
    for weight in agent.discriminator.weights:
        weight.data *= 3  # slopes above 1
    actions, uniform = torch.empty(B, A).uniform_(-1, 1), torch.rand(B, 1)
    excess, steps = [], 1e-6 * np.eye(A)
    for s, a, b, u in zip(batch.observations, actions.numpy(), batch.actions.numpy(), uniform.numpy()):
        point = a + u * (b - a)
        c = [[critic_value(agent.discriminator, s, point + sign * step)[0] for sign in (1, -1)] for step in steps]
        slope = np.sqrt(1e-8 + sum(((high - low) / 2e-6) ** 2 for high, low in c))
        excess.append(max(slope - 1, 0))
    assert min(excess) == 0 and max(excess) > 0.1
    divergence = slow_wasserstein(agent, batch.observations, actions, batch.actions)
    draws(uniform)
    loss = agent.discriminator_loss(batch, actions)
    assert close(loss, -np.mean(divergence) + 5 * np.mean(np.square(excess)), 1e-6)


def test_kl_of_known_gaussians():
    """The tanh leaves the KL divergence of two Gaussians as it is; equal ones have 0, whatever the sample."""
    agent, observations = make_agent("brac_kl", policy_hidden_dims="6-5"), torch.randn(B, S)  # widths of the clone
    networks = agent.actor.network, agent.behaviour
    for network in networks:
        network.layers[-1].weight.data *= 0.3  # actions that the clip at 0.999 rarely reaches
    gaussians = [Normal(mean, log_std.exp()) for mean, log_std in (network(observations) for network in networks)]
    expected = kl_divergence(*gaussians).sum(dim=-1)
    actual = agent.divergence(observations, None, agent.draw(observations, 20_000))
    assert close(actual, expected, 0.03) and expected.min() > 0.1
    agent.behaviour.load_state_dict(agent.actor.network.state_dict())
    assert close(agent.divergence(observations, None, agent.draw(observations, N)), torch.zeros(B))


@pytest.mark.parametrize("method, expected", [("brac_mmd", 0.0), ("bear", 1e-3)])
def test_mmd_of_equal_samples(draws, method, expected):
    """BEAR's has a root, and 1e-6 under it."""
    options = {"policy_hidden_dims": "6-5", "behaviour": "gaussian"}
    agent, observations, noise = make_agent(method, **options), torch.randn(B, S), torch.randn(B, N, A)
    agent.behaviour.load_state_dict(agent.actor.network.state_dict())
    draws(noise, noise.flip(1))  # in any order
    divergence = agent.divergence(observations, None, agent.draw(observations, N))
    assert close(divergence, torch.full((B,), expected), 1e-6)


def test_no_weight_is_the_plain_actor_critic(draws):
    """With weight 0, BRAC's losses are those of offline SAC in offline/cql.py without its entropy bonus."""
    agent = make_agent("brac_kl", divergence_weight=0.0, value_penalty=True, log_std_tanh=False, log_std_max=2.0)
    options = {"device": "cpu", "hidden_dim": 8, "cql_alpha": 0.0, "alpha_multiplier": 0.0}
    sac = cql.CQL(cql.TrainConfig(use_automatic_entropy_tuning=False, **options), S, A)
    sac.critic, sac.target_critic = agent.critic, agent.target_critic
    batch, noise = make_batch(), torch.randn(2, B, N, A)
    mean, log_std = agent.actor.network(torch.cat([batch.observations, batch.next_observations]))
    actions = (mean + log_std.exp() * noise[:, :, 0].flatten(0, 1)).tanh()
    td_target = sac.td_target(batch, actions[B:].unsqueeze(1), torch.zeros(B, 1))
    policy_loss = sac.policy_loss(batch, actions[:B], torch.zeros(B))
    draws(noise[1], noise[0])
    losses, metrics = agent.losses(batch, False, True, True, True)
    assert close(losses["actor"], policy_loss)
    assert close(losses["critic"], sac.critic_loss(batch, td_target, torch.zeros(B, 0, A), torch.zeros(B, 0))[0])
    assert close(metrics["average_target_q"], td_target.mean())


def test_bcq_without_perturbation_acts_by_the_decoder_alone():
    """An action is one of the decoder's, that of the highest first critic."""
    agent, observations = make_agent("bcq", max_perturbation=0.0, n_acting_samples=7), torch.randn(B, S)
    choices = []
    for observation, action in zip(observations, agent.actor.actions(observations)):
        latents = agent.actor.noise.clamp(-0.5, 0.5)
        rows = torch.cat([observation.expand(7, -1), latents], dim=1)
        decoded = agent.behaviour.decoder(rows).tanh()
        values = [critic_value(agent.critic, observation, x.detach().numpy())[0] for x in decoded]
        choices.append(int(np.argmax(values)))
        assert close(action, decoded[choices[-1]])
    assert len(set(choices)) > 1


def test_perturbations_are_small_and_within_bounds():
    """A perturbed action is at most 0.05 away from the decoder's, and in [-1, 1]."""
    agent, observations, noise = make_agent("bcq"), torch.randn(B, S), torch.randn(B, 50, 2 * A)
    for layer in (agent.behaviour.decoder[-1], agent.actor.network[-1]):
        layer.weight.data *= 20  # actions close to 1 or -1, and full perturbations
    decoded = agent.behaviour.decode(observations, noise).tanh()
    (actions,) = agent.actor.draw(observations, noise)
    distance = (actions - decoded).abs()
    assert 0.049 < distance.max() <= 0.05 + 1e-9 and actions.abs().max() == 1


def test_td3_bc_gradient_by_hand():
    """d loss / d a = -lambda / B dQ1 / da + 2 (a - a_data) / (B A), by differences of Q1, then through the tanh."""
    agent, batch, step = make_agent("td3_bc"), make_batch(), 1e-6
    actions = agent.actor.actions(batch.observations).detach()
    q = [critic_value(agent.critic, s, a)[0] for s, a in zip(batch.observations, actions)]
    weight, expected = 2.5 / np.mean(np.abs(q)), np.zeros(A)
    for s, a, data in zip(batch.observations, actions.numpy(), batch.actions.numpy()):
        for i in range(A):
            high, low = (critic_value(agent.critic, s, a + sign * step * np.eye(A)[i])[0] for sign in (1, -1))
            slope = -weight / B * (high - low) / (2 * step) + 2 * (a[i] - data[i]) / (B * A)
            expected[i] += slope * (1 - a[i] ** 2)
    losses, _ = agent.losses(batch, False, False, True, True)
    (gradient,) = torch.autograd.grad(losses["actor"], agent.actor.network[-1].bias)
    assert close(gradient, expected, 1e-6)


@pytest.mark.parametrize("log_std_tanh", [False, True])
def test_limits_of_the_standard_deviation(log_std_tanh):
    agent = make_agent("brac_kl", log_std_min=-3.0, log_std_max=1.0, log_std_tanh=log_std_tanh)
    agent.actor.network.layers[-1].weight.data.zero_()
    for raw, clipped, squeezed in ((-50.0, -3.0, -3.0), (0.5, 0.5, -1 + 2 * math.tanh(0.5)), (50.0, 1.0, 1.0)):
        agent.actor.network.layers[-1].bias.data.fill_(raw)
        mean, log_std = agent.actor.network(torch.zeros(1, S))
        assert close(log_std, torch.full((1, A), squeezed if log_std_tanh else clipped)) and (mean == raw).all()


# What an update trains.


def snapshot(agent):
    groups = agent.parameter_groups | {"target_critic": agent.target_critic.parameters()}
    if agent.target_network:
        groups["target_network"] = agent.target_network.parameters()
    return {name: flat(parameters) for name, parameters in groups.items()}


def changed(agent):
    """Names of what an update changes."""
    before = snapshot(agent)
    agent.update(make_batch())
    return {name for name, values in snapshot(agent).items() if not torch.equal(values, before[name])}


ALL = {"actor", "critic", "target_critic"}
TRAINED = {
    "td3_bc": ({}, [ALL | {"target_network"}, {"critic"}, ALL | {"target_network"}]),
    "brac_kl": ({"behaviour_steps": 2}, [{"behaviour", "clone_alpha"}] * 2 + [ALL] * 2),
    "brac_mmd": ({"behaviour_steps": 1}, [{"behaviour", "clone_alpha"}, ALL, ALL]),
    "brac_wasserstein": ({}, [ALL | {"discriminator"}] * 2),
    "bear": ({}, [ALL | {"behaviour", "multiplier"}] * 2),
    "bcq": ({}, [ALL | {"behaviour", "target_network"}] * 2),
}


@pytest.mark.parametrize("method", TRAINED)
def test_what_updates_train(method):
    options, expected = TRAINED[method]
    agent = make_agent(method, **options)
    assert [changed(agent) for _ in expected] == expected


@pytest.mark.parametrize("method", TRAINED)
def test_rates(method):
    """The first step of Adam moves each parameter by its group's rate, and targets go a part of the way."""
    rates = {"actor": 0.01, "critic": 0.02, "behaviour": 0.03, "clone_alpha": 0.03}
    rates |= {"multiplier": 0.04, "discriminator": 0.04}
    options = {"policy_lr": 0.01, "qf_lr": 0.02, "behaviour_lr": 0.03, "constraint_lr": 0.04, "wasserstein_steps": 1}
    agent = make_agent(method, soft_target_update_rate=0.1, **options)
    if agent.target_network:  # a first copy that differs
        agent.target_network.load_state_dict({k: x + 1 for k, x in agent.target_network.state_dict().items()})
    before = snapshot(agent)
    agent.update(make_batch())
    after = snapshot(agent)
    for name in agent.parameter_groups:
        learned = {"multiplier": agent.config.divergence_lagrange, "clone_alpha": agent.config.behaviour == "gaussian"}
        assert close((after[name] - before[name]).abs().max(), rates[name] * learned.get(name, True), 1e-4), name
    assert close(after["target_critic"], 0.9 * before["target_critic"] + 0.1 * after["critic"])
    if agent.target_network:
        assert close(after["target_network"], 0.9 * before["target_network"] + 0.1 * after["actor"])


@pytest.mark.parametrize("behaviour_steps", [0, 2])
def test_warm_up(behaviour_steps):
    """For divergence_steps updates, the policy's loss has no Q; the first update after them has it."""
    agent = make_agent("brac_kl", behaviour_steps=behaviour_steps, divergence_steps=3)
    with_q = []
    for _ in range(behaviour_steps + 5):
        twin, batch, losses = copy.deepcopy(agent), make_batch(), []
        twin.critic.biases[-1].data += 1  # changes every Q by 1, and so the loss
        for x in (agent, twin):
            torch.manual_seed(1)
            losses.append(x.update(batch).get("policy_loss"))
        if losses[0] is not None:
            with_q.append(not close(*losses))
    assert with_q == [False] * 3 + [True] * 2


def test_multiplier():
    """It rises while the divergence is above the threshold, falls below it, and its logarithm stays in [-5, 10]."""
    for threshold, sign, limit in ((-10.0, 1, 10.0), (10.0, -1, -5.0)):
        agent = make_agent("bear", divergence_threshold=threshold, constraint_lr=0.5)
        for start in (0.0, limit):
            agent.log_multiplier.data.fill_(start)
            agent.update(make_batch())
            assert close(agent.log_multiplier, limit if start else sign * 0.5, 1e-6)


def test_wasserstein_critic_takes_more_steps():
    agent = make_agent("brac_wasserstein", wasserstein_steps=3)
    for _ in range(2):
        agent.update(make_batch())
    steps = {
        name: agent.optimizer.state[group[0]]["step"]
        for name, group in agent.parameter_groups.items()
        if group[0] in agent.optimizer.state
    }
    assert steps == {"actor": 2, "critic": 2, "discriminator": 6}


def test_the_target_estimates_the_divergence_from_as_many_actions_as_the_loss(monkeypatch):
    agent, shapes = make_agent("brac_mmd", value_penalty=True, n_target_actions=10), []

    def divergence(observations, data_actions, drawn):
        shapes.append(drawn[0].shape)
        return observations.new_zeros(len(observations))

    monkeypatch.setattr(agent, "divergence", divergence)
    agent.td_target(make_batch())
    assert shapes == [(B, N, A)]


def test_three_updates_of_a_new_phase_come_before_a_cuda_graph():
    """They make the moments of Adam; a graph needs phases that are all alike."""
    agent = make_agent("brac_kl", behaviour_steps=7)
    found = []
    for agent.n_updates in range(12):
        found.append(len({*agent.phases()}) == 1)
    assert found == [False] * 10 + [True] * 2


# Acting.


@pytest.mark.parametrize("method", ["td3_bc", "brac_kl", "bear", "bcq"])
def test_no_observations_have_no_actions(method):
    assert make_agent(method).actor.act(np.zeros((0, S))).shape == (0, A)


@pytest.fixture
def trained(tmp_path):
    """Trains for 30 updates on episodes of 10 steps, in single precision; returns run folder and observations."""
    torch.set_default_dtype(torch.float32)
    rng, ends = np.random.default_rng(0), np.arange(200) % 10 == 9
    observations = rng.normal(5, 3, (200, S))
    data = {"observations": observations, "next_observations": observations + rng.normal(size=(200, S))}
    data |= {"actions": rng.uniform([-2, 0], [1, 0.5], (200, A)), "rewards": rng.normal(size=200)}
    data |= {"terminals": ends & (observations[:, 0] > 5), "timeouts": ends & (observations[:, 0] <= 5)}
    data |= {"action_low": np.array([-2.0, 0.0]), "action_high": np.array([1.0, 0.5])}

    def train(method, **options):
        options = (
            SIZES
            | METHODS[method]
            | options
            | {"max_timesteps": 30, "eval_freq": 30, "batch_size": 16, "policy_lr": 0.01, "behaviour_lr": 0.01}
        )
        options |= {"eval_env": "none", "checkpoints_path": str(tmp_path), "run_id": "run"}
        script.train(script.TrainConfig(**options), data=data)
        return tmp_path / "run", observations

    return train


@pytest.mark.parametrize("method", ["td3_bc", "brac_kl", "bear", "bcq"])
def test_acting_is_a_function_of_the_observation(trained, method):
    """The same observation gives the same action: again, alone or among others, and after saving and loading."""
    folder, observations = trained(method)
    policy = script.load_policy(folder / "policy.pt")
    actions = policy(observations)
    assert np.ptp(actions, axis=0).min() > 1e-3 and np.array_equal(policy(observations), actions)
    for rows in (slice(None, None, -1), slice(5), slice(7, 8)):
        assert np.allclose(policy(observations[rows]), actions[rows], atol=1e-5)
    torch.manual_seed(5)
    alone = [script.load_policy(folder / "checkpoint.pt")(x) for x in observations[:3]]
    assert np.allclose(alone, actions[:3], atol=1e-5)
    # The agent itself, whose critic and VAE the policy's are.
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    agent = script.PolicyConstraint(script.TrainConfig(**checkpoint["config"]), S, A)
    agent.load_state_dict(checkpoint["agent"])
    assert np.allclose(agent.actor.act(observations), actions, atol=1e-5)
    if agent.config.n_acting_samples > 1:
        assert torch.equal(flat(policy.network.critic.parameters()), flat(agent.critic.parameters()))
        assert not torch.equal(flat(agent.critic.parameters()), flat(agent.target_critic.parameters()))
        assert len(agent.actor.noise) == 100 and len(torch.unique(agent.actor.noise)) > 100


@pytest.mark.parametrize("method", ["bear", "bcq"])
def test_the_best_action_is_taken(trained, method):
    """No other of the drawn actions has a higher value by the first critic, whatever the second one says."""
    folder, observations = trained(method)
    policy = script.load_policy(folder / "policy.pt").network
    observations = policy.normalise(torch.tensor(observations, dtype=torch.float32))
    with torch.no_grad():
        drawn = policy.draw(observations, policy.noise.expand(len(observations), -1, -1))[0]
        first, second = policy.critic(observations, drawn)
        best = policy.critic(observations, policy.choose(observations).unsqueeze(1))[0, :, 0]
    assert torch.allclose(best, first.amax(dim=1), atol=1e-5)
    assert (first.argmax(dim=1) != second.argmax(dim=1)).any()
