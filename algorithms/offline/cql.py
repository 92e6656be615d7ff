"""Conservative Q-Learning (CQL), offline, for continuous actions: a soft actor-critic (SAC) whose critics are pushed
down on actions that the policy may choose, and up on those in the data, so that it does not trust what it never saw.
CQL: https://arxiv.org/abs/2006.04779; SAC: https://arxiv.org/abs/1812.05905.

    python algorithms/offline/cql.py --config_path configs/offline/cql/lunarlander-continuous/medium.yaml

returns 246.8 ± 12.0 after 5,000 updates (five seeds; 49 s each on 2 CPU cores) on data that return 46.5: see README.md.

Differs from the paper
1. The TD loss is the squared error without 1/2: the paper's alpha is cql_alpha / 2.
2. N uniform, N current and N next-state policy actions estimate log-integral exp Q, without the constant log(3N).
3. The entropy coefficient is tuned, and all losses are taken at the same parameters, as in later public code.

Known failures: scores depend on cql_alpha and the depth of the critics; Adroit and large AntMaze are unreliable in
every public implementation. docs/cql.md explains each option and metric.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import fcntl
import io
import json
import math
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, get_args

# A thread that waits may spin only briefly: beside another busy process an update would take many times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyrallis
import torch
import torch.nn.functional as F
import wandb
import yaml
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class TrainConfig:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or cuda:<index>
    env: str = "halfcheetah-medium-expert-v2"  # dataset: a D4RL name, an HDF5 file of D4RL's layout, or a Minari id
    eval_env: Optional[str] = None  # Gymnasium id to evaluate in; None: the dataset's own; none: no evaluation
    seed: int = 0  # seed of networks, minibatches and sampled actions
    eval_seed: int = 0  # evaluation episode i starts from seed eval_seed + i
    eval_freq: int = 5000  # updates between two evaluations
    n_episodes: int = 10  # episodes an evaluation
    max_timesteps: int = 1_000_000  # updates in all; 0 with load_model: evaluate the stored policy
    checkpoints_path: Optional[str] = "runs"  # folder that run folders go to
    run_id: Optional[str] = None  # name of the run folder; the same name again resumes it (default: $WANDB_RUN_ID)
    load_model: str = ""  # checkpoint.pt to start from, or a policy.pt to evaluate; "" starts afresh
    log_interval: int = 1000  # updates between two W&B records
    compile: Optional[bool] = None  # torch.compile the losses, and replay CUDA graphs; None: on a GPU only
    precision: str = "float32"  # float32, tf32 (NVIDIA GPUs), or bfloat16: of the critics' matrix products

    buffer_size: int = 2_000_000  # most transitions that are accepted; memory follows the data
    batch_size: int = 256  # transitions a minibatch
    normalize: bool = True  # shift and scale observations by the data's mean and standard deviation
    normalize_reward: bool = False  # change rewards: return range (locomotion only), then reward_scale and reward_bias
    reward_scale: float = 5.0  # factor on rewards (only with normalize_reward)
    reward_bias: float = -1.0  # added to scaled rewards (only with normalize_reward)
    reward_clip: float = math.inf  # training rewards are clipped to [-reward_clip, reward_clip]
    holdout_fraction: float = 0.0  # share of episodes kept from training, for the holdout metrics

    hidden_dim: int = 256  # width of hidden layers
    policy_n_hidden_layers: int = 3  # hidden layers of the actor
    q_n_hidden_layers: int = 3  # hidden layers of each critic
    orthogonal_init: bool = True  # orthogonal initialisation of all networks
    policy_log_std_multiplier: float = 1.0  # initial factor on the actor's log standard deviation (learned)

    discount: float = 0.99  # discount factor
    policy_lr: float = 3e-5  # learning rate of the actor and the entropy coefficient
    qf_lr: float = 3e-4  # learning rate of the critics and alpha_prime
    soft_target_update_rate: float = 5e-3  # Polyak rate of the target critics
    target_update_period: int = 1  # updates between two target updates
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient; the coefficient itself where it is not tuned
    use_automatic_entropy_tuning: bool = True  # tune the entropy coefficient for an entropy of -A
    backup_entropy: bool = False  # subtract alpha log pi from the TD target's next value
    bc_steps: int = 0  # first updates in which the policy clones the data's actions

    cql_alpha: float = 10.0  # weight of the penalty; 0 is offline SAC
    cql_n_actions: int = 10  # actions sampled from each of the three proposals
    cql_backprop_actions: int = 0  # actions to back-propagate through, drawn by soft-max weight; 0: all, exactly
    cql_importance_sample: bool = True  # True: CQL(H); False: the plain logsumexp known as CQL(rho) in public code
    cql_temp: float = 1.0  # temperature T of T logsumexp(Q / T - log p)
    cql_max_target_backup: bool = False  # TD target: largest value of cql_n_actions next actions
    cql_clip_diff_min: float = -math.inf  # lower clip of the gap of each state
    cql_clip_diff_max: float = math.inf  # upper clip of the gap of each state
    cql_lagrange: bool = False  # tune alpha_prime, a factor on cql_alpha, for a gap of cql_target_action_gap
    cql_target_action_gap: float = -1.0  # gap that the Lagrange multiplier aims at

    project: str = "CORL"  # W&B project
    group: str = "CQL-D4RL"  # W&B group
    name: str = "CQL"  # first part of the run's name

    def __post_init__(self):
        check_config(self)


# Shapes: B batch, E critics, N sampled actions, O observation, A action. Actions of the networks lie in [-1, 1].


class TanhGaussianActor(nn.Module):
    """pi(a|s) = tanh of a Gaussian, with the scaling of observations and actions that acting needs."""

    log_std_range = (-20.0, 2.0)

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_dim: int, n_hidden_layers: int,
        log_std_multiplier: float = 1.0, orthogonal_init: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.sizes = (observation_dim, action_dim, hidden_dim, n_hidden_layers)
        layers = linear_layers([observation_dim] + [hidden_dim] * n_hidden_layers + [2 * action_dim], orthogonal_init)
        self.hidden = nn.Sequential(*[module for layer in layers[:-1] for module in (layer, nn.ReLU())])
        self.head = layers[-1]
        self.log_std_multiplier = nn.Parameter(torch.tensor(float(log_std_multiplier)))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_low", -torch.ones(action_dim))
        self.register_buffer("action_high", torch.ones(action_dim))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh: [B, O] -> [B, A], [B, A]."""
        mean, log_std = self.head(self.hidden(observations)).chunk(2, dim=-1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return mean, log_std.clamp(*self.log_std_range)

    def actions(self, observations: Tensor) -> Tensor:
        """Deterministic actions in the environment's units for raw observations: [..., O] -> [..., A]."""
        mean, _ = self((observations - self.observation_mean) / self.observation_std)
        actions = self.action_low + (mean.tanh() + 1) / 2 * (self.action_high - self.action_low)
        return torch.clamp(actions, self.action_low, self.action_high)

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """The same for arrays. Raises ValueError."""
        observations = torch.as_tensor(observations, dtype=torch.float32, device=self.observation_mean.device)
        if observations.shape[-1:] != self.observation_mean.shape:
            raise ValueError(f"the policy takes observations of size {self.sizes[0]}, not {list(observations.shape)}")
        return self.actions(observations).cpu().numpy()


# local: the network that acts, and that policy.pt holds
Policy = TanhGaussianActor


class EnsembleCritic(nn.Module):
    """Q(s, a) of E critics, a batched product a layer."""

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_dim: int, n_hidden_layers: int,
        orthogonal_init: bool = True, dtype: Optional[torch.dtype] = None, n_critics: int = 2,
    ):  # fmt: skip
        """dtype: of the hidden layers' matrix products. The last layer's is the parameters': values need digits."""
        super().__init__()
        self.dtype = dtype
        sizes = [observation_dim + action_dim] + [hidden_dim] * n_hidden_layers + [1]
        members = [linear_layers(sizes, orthogonal_init) for _ in range(n_critics)]
        self.weights = nn.ParameterList(torch.stack([x.weight.T for x in layer]) for layer in zip(*members))
        self.biases = nn.ParameterList(torch.stack([x.bias for x in layer]).unsqueeze(1) for layer in zip(*members))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """N actions for each state: [B, O] and [B, N, A], or [E, B, N, A] with a critic's own actions -> [E, B, N]."""
        *leading, n_actions, _ = actions.shape
        observations = observations.unsqueeze(-2).expand(*leading, n_actions, -1)
        x = torch.cat([observations, actions], dim=-1).flatten(-3, -2)  # [B N, O + A] or [E, B N, O + A]
        x = x.to(self.dtype or x.dtype).expand(len(self.weights[0]), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = torch.baddbmm(bias.to(x.dtype), x, weight.to(x.dtype)).relu_()  # [E, B N, hidden]
        q = torch.baddbmm(self.biases[-1], x.to(self.weights[-1].dtype), self.weights[-1])
        return q.view(-1, leading[-1], n_actions)


# local: the columns that the losses take
class Batch(NamedTuple):
    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A]
    rewards: Tensor  # [B]
    next_observations: Tensor  # [B, O]
    terminals: Tensor  # [B], 1 where the episode ended in a terminal state, 0 elsewhere and at time-outs


class Noise(NamedTuple):
    """An update's random numbers, drawn beforehand, so that compiled code sees the same ones."""

    next_and_current: Tensor  # [2B, N, A], normal
    random_actions: Tensor  # [B, N, A], uniform on [-1, 1]; N = 0 without penalty
    policy: Tensor  # [B, 1, A], normal
    choice: Tensor  # [E, B, cql_backprop_actions], uniform on [0, 1]


def linear_layers(sizes: list[int], orthogonal: bool) -> list[nn.Linear]:
    """Layers from size to size; the last starts near zero, so that first values and action means do."""
    layers = [nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:])]
    if orthogonal:
        for layer in layers[:-1]:
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
    init_last = nn.init.orthogonal_ if orthogonal else nn.init.xavier_uniform_
    init_last(layers[-1].weight, gain=1e-2)
    nn.init.zeros_(layers[-1].bias)
    return layers


def tanh_gaussian_log_prob(pre_tanh: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a = tanh(z), z = mean + std * noise, summed over actions: [..., A] -> [...].

    The Jacobian is exact: log(1 - tanh(z)^2) = 2 (log 2 - z - softplus(-2 z)), finite for every z.
    """
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return (log_normal - log_jacobian).sum(dim=-1)


def sample_actions(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """N actions for each state, by reparametrisation: [B, A], [B, N, A] -> actions [B, N, A], log-densities [B, N]."""
    mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)  # [B, 1, A]
    pre_tanh = mean + log_std.exp() * noise  # [B, N, A]
    return pre_tanh.tanh(), tanh_gaussian_log_prob(pre_tanh, noise, log_std)


class CQL(nn.Module):
    """The agent: a loss a method, then `gradients` and `update`, the algorithm."""

    max_density_action = 0.999  # data actions are clipped to this before a log-density, which is infinite at 1
    max_log_alpha_prime = math.log(1e6)

    def __init__(self, config: TrainConfig, observation_dim: int, action_dim: int):
        super().__init__()
        self.config = config
        sizes = (observation_dim, action_dim, config.hidden_dim)
        self.actor = TanhGaussianActor(
            *sizes, config.policy_n_hidden_layers, config.policy_log_std_multiplier, config.orthogonal_init
        )
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        self.critic = EnsembleCritic(*sizes, config.q_n_hidden_layers, config.orthogonal_init, dtype)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.log_alpha_prime = nn.Parameter(torch.tensor(1.0))
        self.target_entropy = -float(action_dim)
        self.to(config.device)
        on_gpu = self.log_alpha.is_cuda  # where steps are recorded in CUDA graphs
        learned = {
            "actor": (self.actor.parameters(), config.policy_lr),
            "alpha": ([self.log_alpha], config.policy_lr),
            "critic": (self.critic.parameters(), config.qf_lr),
            "alpha_prime": ([self.log_alpha_prime], config.qf_lr),
        }
        self.optimizers = {
            name: torch.optim.Adam(x, lr=rate, fused=True, capturable=on_gpu) for name, (x, rate) in learned.items()
        }
        self.n_updates = 0
        self.compute_gradients = self.gradients  # or compiled

    @property
    def alpha(self) -> Tensor:
        """Entropy coefficient, a constant for every loss but its own."""
        if not self.config.use_automatic_entropy_tuning:
            return torch.full_like(self.log_alpha, self.config.alpha_multiplier)
        return self.config.alpha_multiplier * self.log_alpha.detach().exp()

    @property
    def penalty_weight(self) -> Tensor:
        """cql_alpha, times alpha' where it is tuned; a constant for every loss but the multiplier's own."""
        if not self.config.cql_lagrange:
            return torch.full_like(self.log_alpha_prime, self.config.cql_alpha)
        return self.config.cql_alpha * self.log_alpha_prime.detach().exp()

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """Raises alpha while the policy's entropy is below the target: [B] -> []."""
        return -self.log_alpha * (log_prob.detach().mean() + self.target_entropy)

    def policy_loss(self, batch: Batch, actions: Tensor, log_prob: Tensor) -> Tensor:
        """E[alpha log pi(a|s) - min Q(s, a)], a ~ pi with gradient: [B, A], [B] -> []."""
        q = self.critic(batch.observations, actions.unsqueeze(1)).squeeze(-1).min(dim=0).values  # [B]
        return (self.alpha * log_prob - q).mean()

    def cloning_loss(self, batch: Batch, mean: Tensor, log_std: Tensor, log_prob: Tensor) -> Tensor:
        """Warm start: E[alpha log pi(a|s) - log pi(a_data|s)], the likelihood of the data's own actions."""
        pre_tanh = batch.actions.clamp(-self.max_density_action, self.max_density_action).atanh()
        data_log_prob = tanh_gaussian_log_prob(pre_tanh, (pre_tanh - mean) / log_std.exp(), log_std)  # [B]
        return (self.alpha * log_prob - data_log_prob).mean()

    @torch.no_grad()
    def td_target(self, batch: Batch, next_actions: Tensor, next_log_prob: Tensor) -> Tensor:
        """r + gamma (1 - terminal) max_n min_e Q'(s', a'_n); N = 1 is the usual target: [B, N, A], [B, N] -> [B]."""
        next_q = self.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [B, N]
        next_q, best = next_q.max(dim=1)  # [B]
        if self.config.backup_entropy:
            next_q = next_q - self.alpha * next_log_prob.gather(1, best.unsqueeze(1)).squeeze(1)
        return batch.rewards + self.config.discount * (1 - batch.terminals) * next_q

    def critic_loss(
        self,
        batch: Batch,
        td_target: Tensor,
        proposals: Tensor,
        proposal_log_prob: Tensor,
        choice: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """TD loss plus alpha' cql_alpha (gap - target gap), where the gap is, for each state and clipped,
        T logsumexp_a(Q(s, a) / T - log p(a|s)) - Q(s, a_data), and the target gap is 0 without Lagrange.

        td_target [B]; proposals [B, 3N, A] with their log-densities [B, 3N], in the order random, next, current
        (all constants, and empty for offline SAC). Returns the loss, the mean gap of each critic [E], and metrics.
        """
        config = self.config
        actions = torch.cat([batch.actions.unsqueeze(1), proposals], dim=1)  # [B, 1 + 3N, A]
        draw = config.cql_backprop_actions > 0 and choice is not None and choice.shape[-1] > 0
        with torch.no_grad() if draw else contextlib.nullcontext():
            q = self.critic(batch.observations, actions)  # [E, B, 1 + 3N]
            # Importance sampling estimates the log-integral over all actions; without it the data's action joins.
            temperature, skipped = config.cql_temp, int(config.cql_importance_sample)
            scores = q[..., skipped:] / temperature
            if config.cql_importance_sample:
                scores = scores - proposal_log_prob
            state_gap = temperature * scores.logsumexp(dim=-1) - q[..., 0]  # [E, B]
        q_data = q[..., 0]
        if draw:
            q_data, state_gap = self.redraw_gap(batch, actions[:, skipped:], scores, state_gap, choice)

        td_loss = (q_data - td_target).square().mean(dim=1)  # [E]
        metrics = per_critic("qf{}_loss", td_loss) | per_critic("average_qf{}", q_data.mean(dim=1))
        metrics["average_target_q"] = td_target.mean()
        if not proposals.shape[1]:
            return td_loss.sum(), torch.zeros_like(td_loss), metrics
        gap = state_gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max).mean(dim=1)  # [E]
        target_gap = config.cql_target_action_gap if config.cql_lagrange else 0.0
        penalty = self.penalty_weight * (gap - target_gap)  # [E]
        metrics |= per_critic("cql_qf{}_diff", gap) | per_critic("cql_min_qf{}_loss", penalty)
        return (td_loss + penalty).sum(), gap.detach(), metrics | self.penalty_metrics(q, scores, state_gap)

    def redraw_gap(
        self, batch: Batch, actions: Tensor, scores: Tensor, state_gap: Tensor, choice: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same gap with a cheaper gradient of the same expectation: that of T logsumexp(scores) is the mean of the
        gradients of Q under the soft-max of the scores, so k actions are drawn by it for each state and critic.

        actions [B, M, A], scores [E, B, M], state_gap [E, B], choice [E, B, k] -> Q of the data [E, B], gap [E, B].
        """
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, choice).clamp(max=scores.shape[-1] - 1)  # [E, B, k]
        n_critics, _, k = choice.shape
        actions = actions.expand(n_critics, -1, -1, -1).gather(
            2, drawn.unsqueeze(-1).expand(-1, -1, -1, actions.shape[-1])
        )
        data_actions = batch.actions.unsqueeze(1).expand(n_critics, -1, -1, -1)
        q = self.critic(batch.observations, torch.cat([data_actions, actions], dim=2))  # [E, B, 1 + k]
        q_data, q_drawn = q[..., 0], q[..., 1:].mean(dim=-1)
        estimate = q_drawn - q_data
        return q_data, state_gap + (estimate - estimate.detach())

    @torch.no_grad()
    def penalty_metrics(self, q: Tensor, scores: Tensor, state_gap: Tensor) -> dict[str, Tensor]:
        """What the penalty acts on: q [E, B, 1 + 3N], scores [E, B, 3N or 1 + 3N], state_gap [E, B]."""
        config, n_proposals = self.config, q.shape[-1] - 1
        # Without importance sampling the first score is the data's, so that the shares do not add up to 1.
        shares = scores.softmax(dim=-1)[..., -n_proposals:].mean(dim=(0, 1)).chunk(3)
        metrics = per_critic("cql_std_q{}", q.std(dim=-1).mean(dim=1))
        for i, source in enumerate(("rand", "next_actions", "current_actions")):
            metrics |= per_critic(f"cql_q{{}}_{source}", q[..., 1:].chunk(3, dim=-1)[i].mean(dim=(1, 2)))
            metrics[f"cql_weight_{source}"] = shares[i].sum()
        log_volume = self.actor.sizes[1] * math.log(2) if config.cql_importance_sample else 0.0
        constant_q_gap = config.cql_temp * (math.log(scores.shape[-1]) + log_volume)
        clipped = (state_gap < config.cql_clip_diff_min) | (state_gap > config.cql_clip_diff_max)
        metrics["cql_net_gap"], metrics["cql_clipped_share"] = state_gap.mean() - constant_q_gap, clipped.float().mean()
        return metrics | {"cql_effective_weight": self.penalty_weight}

    def alpha_prime_loss(self, gap: Tensor) -> Tensor:
        """Raises alpha' while the gap is above cql_target_action_gap: [E] (a constant) -> []."""
        excess = gap.mean() - self.config.cql_target_action_gap
        return -self.log_alpha_prime.exp() * self.config.cql_alpha * excess

    @torch.no_grad()
    def draw_noise(self, batch_size: int) -> Noise:
        config, action_dim = self.config, self.actor.sizes[1]
        penalised = config.cql_alpha > 0
        n = config.cql_n_actions if penalised or config.cql_max_target_backup else 1
        like = {"dtype": self.log_alpha.dtype, "device": self.log_alpha.device}
        normal = torch.randn(2 * batch_size, n, action_dim, **like)
        uniform = torch.empty(batch_size, n * penalised, action_dim, **like).uniform_(-1, 1)
        policy = torch.randn(batch_size, 1, action_dim, **like)
        choice = torch.rand(2, batch_size, config.cql_backprop_actions * penalised, **like)
        return Noise(normal, uniform, policy, choice)

    @torch.no_grad()
    def propose(self, batch: Batch, mean: Tensor, log_std: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Samples actions; returns the TD target [B], and proposals [B, 3N, A] with their log-densities [B, 3N].

        mean and log_std [2B, A] are the actor's at the observations and at the next observations. The next actions
        serve twice: in the target, and as proposals at s, with the density that they have at s' (as in the authors'
        code).
        """
        batch_size, action_dim = batch.actions.shape
        actions, log_prob = sample_actions(mean, log_std, noise.next_and_current)
        current_actions, next_actions = actions.split(batch_size)
        current_log_prob, next_log_prob = log_prob.split(batch_size)
        n_backup = None if self.config.cql_max_target_backup else 1
        td_target = self.td_target(batch, next_actions[:, :n_backup], next_log_prob[:, :n_backup])
        if not noise.random_actions.shape[1]:
            return td_target, actions.new_empty(batch_size, 0, action_dim), log_prob.new_empty(batch_size, 0)
        random_log_prob = torch.full_like(current_log_prob, -action_dim * math.log(2))
        proposals = torch.cat([noise.random_actions, next_actions, current_actions], dim=1)
        return td_target, proposals, torch.cat([random_log_prob, next_log_prob, current_log_prob], dim=1)

    def gradients(
        self, batch: Batch, noise: Noise, cloning: bool
    ) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
        """Gradients of all losses at the same parameters, by optimiser, and metrics. It changes nothing."""
        config, batch_size = self.config, len(batch.rewards)
        mean, log_std = self.actor(torch.cat([batch.observations, batch.next_observations]))  # [2B, A]
        td_target, proposals, proposal_log_prob = self.propose(batch, mean, log_std, noise)
        critic_loss, gap, metrics = self.critic_loss(batch, td_target, proposals, proposal_log_prob, noise.choice)

        mean, log_std = mean[:batch_size], log_std[:batch_size]  # [B, A], at the observations
        actions, log_prob = (x.squeeze(1) for x in sample_actions(mean, log_std, noise.policy))
        if cloning:
            policy_loss = self.cloning_loss(batch, mean, log_std, log_prob)
        else:
            policy_loss = self.policy_loss(batch, actions, log_prob)
        metrics |= {"policy_loss": policy_loss, "log_pi": log_prob.mean(), "alpha": self.alpha}

        losses = {"actor": policy_loss, "critic": critic_loss}
        if config.use_automatic_entropy_tuning:
            metrics["alpha_loss"] = losses["alpha"] = self.alpha_loss(log_prob)
        if config.cql_lagrange:
            metrics["alpha_prime"] = self.log_alpha_prime.exp()
            metrics["alpha_prime_loss"] = losses["alpha_prime"] = self.alpha_prime_loss(gap)
        # Each loss reaches the parameters of its own optimiser alone.
        gradients = {
            name: torch.autograd.grad(loss, self.optimizers[name].param_groups[0]["params"])
            for name, loss in losses.items()
        }
        metrics["policy_grad_norm"] = nn.utils.get_total_norm(gradients["actor"])
        metrics["critic_grad_norm"] = nn.utils.get_total_norm(gradients["critic"])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def calls(self, batch: Batch) -> list[tuple]:
        """Arguments of `gradients` for each of its variants."""
        noise = self.draw_noise(len(batch.rewards))
        return [(batch, noise, cloning) for cloning in {self.n_updates < self.config.bc_steps, False}]

    def step(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        """Step of one optimiser."""
        for parameter, gradient in zip(self.optimizers[name].param_groups[0]["params"], gradients):
            parameter.grad = gradient
        self.optimizers[name].step()

    @property
    def changing(self) -> bool:
        """Whether the next updates differ from each other, so that no recording stands for all of them."""
        return self.n_updates < self.config.bc_steps or self.config.target_update_period > 1

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A step of the policy, the critics, alpha and alpha', then of the target critics."""
        noise = self.draw_noise(len(batch.rewards))
        gradients, metrics = self.compute_gradients(batch, noise, self.n_updates < self.config.bc_steps)
        for name, values in gradients.items():
            self.step(name, values)
        self.log_alpha_prime.data.clamp_(max=self.max_log_alpha_prime)
        self.n_updates += 1
        if self.n_updates % self.config.target_update_period == 0:
            for target, source in zip(self.target_critic.parameters(), self.critic.parameters()):
                target.lerp_(source.detach(), self.config.soft_target_update_rate)
        return metrics

    @torch.no_grad()
    def start_values(self, observations: np.ndarray) -> np.ndarray:
        """What the critics promise: min Q(s, pi(s)) with the deterministic action, for raw observations [B, O]."""
        observations = torch.as_tensor(observations, device=self.config.device)
        observations = (observations - self.actor.observation_mean) / self.actor.observation_std
        actions = self.actor(observations)[0].tanh().unsqueeze(1)
        return self.critic(observations, actions).min(dim=0).values.squeeze(1).cpu().numpy()

    @torch.no_grad()
    def holdout_metrics(self, batch: Batch) -> dict[str, float]:
        """TD error, gap and data Q on transitions that are not trained on; leaves the random state as it was."""
        with torch.random.fork_rng([self.config.device] if "cuda" in self.config.device else []):
            torch.manual_seed(self.config.eval_seed)
            mean, log_std = self.actor(torch.cat([batch.observations, batch.next_observations]))
            noise = self.draw_noise(len(batch.rewards))
            _, gap, metrics = self.critic_loss(batch, *self.propose(batch, mean, log_std, noise), noise.choice)
        td_error = (metrics["qf1_loss"] + metrics["qf2_loss"]) / 2
        q = (metrics["average_qf1"] + metrics["average_qf2"]) / 2
        return {"holdout_td_error": td_error.item(), "holdout_gap": gap.mean().item(), "holdout_q": q.item()}

    def checkpoint(self) -> dict[str, Any]:
        """All that training goes on from, as tensors and plain values."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"networks": self.state_dict(), "optimizers": optimizers, "n_updates": self.n_updates}

    def restore(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            own = {key: optimizer.param_groups[0][key] for key in ("lr", "capturable")}
            optimizer.load_state_dict(state["optimizers"][name])
            optimizer.param_groups[0] |= own  # the configuration's and the device's, not the checkpoint's
        self.n_updates = state["n_updates"]


def per_critic(name: str, values: Tensor) -> dict[str, Tensor]:
    return {name.format(i + 1): value for i, value in enumerate(values)}


# Common to all files from here on: configuration, data, evaluation, run folder.


class DataError(ValueError):
    """Data or a file that cannot be used, told in one line; `status` is the program's exit status."""

    status = 1

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class ConfigError(DataError):
    """An option that cannot be."""

    status = 2


class DivergenceError(DataError):
    """A run whose values no longer make sense."""


D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
WANDB_SECONDS = 20  # that W&B may take to start, and to finish
MAX_GRID = 1024  # numbers of a grid, beyond which it is an image
MAX_STEPS = 10_000  # of an evaluation episode, where the environment has no limit
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
CHOICES = {
    "precision": ("float32", "tf32", "bfloat16"),
    "head": ("dqn", "c51", "qr"),
    "target": ("double", "max", "sarsa"),
    "td_error": ("squared", "huber"),
}
RANGES = {
    "max_timesteps bc_steps cql_backprop_actions seed eval_seed policy_lr qf_lr cql_alpha alpha_multiplier": (0, 1e12),
    "dr3_coefficient": (0, 1e12),
    "eval_freq n_episodes batch_size buffer_size log_interval target_update_period cql_n_actions": (1, 1e12),
    "n_step n_quantiles": (1, 10_000),
    "n_atoms": (2, 10_000),
    "hidden_dim": (1, 1e5),
    "policy_n_hidden_layers q_n_hidden_layers": (1, 100),
    "reward_scale reward_bias policy_log_std_multiplier cql_target_action_gap v_min v_max": (-1e12, 1e12),
    "discount soft_target_update_rate eval_epsilon": (0, 1),
    "reward_clip max_grad_norm": (1e-12, math.inf),
    "holdout_fraction": (0, 0.9),
    "cql_temp": (1e-6, 1e12),
}


def check_config(config: Any) -> None:
    """Fills in what depends on the machine. Raises ConfigError for a value out of its range."""
    config.checkpoints_path = config.checkpoints_path or "runs"
    config.run_id = config.run_id or os.environ.get("WANDB_RUN_ID") or None
    options = vars(config)
    for names, (low, high) in RANGES.items():
        for name in set(names.split()) & options.keys():
            if options[name] is not None and not low <= options[name] <= high:
                raise ConfigError(f"--{name} takes a number from {low} to {high:g}, not {options[name]}")
    low, high = options.get("cql_clip_diff_min", 0), options.get("cql_clip_diff_max", 0)
    if not (low <= high and low < math.inf and high > -math.inf):
        raise ConfigError(f"--cql_clip_diff_min {low} and --cql_clip_diff_max {high} leave nothing between")
    low, high = options.get("v_min"), options.get("v_max")
    if None not in (low, high) and not low < high:
        raise ConfigError(f"--v_min {low} must be below --v_max {high}")
    if config.run_id and (config.run_id in (".", "..") or set(config.run_id) & set("/\\")):
        raise ConfigError(f"--run_id is the name of a folder, without / or \\, not {config.run_id}")
    if config.max_timesteps == 0 and not config.load_model:
        raise ConfigError("--max_timesteps 0 evaluates a stored policy: name its file with --load_model")
    try:
        known = torch.empty(0, device=config.device).device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        known = False
    for name in CHOICES.keys() & options.keys():
        if options[name] not in CHOICES[name]:
            raise ConfigError(f"--{name} takes {', '.join(CHOICES[name])}, not {options[name]}")
    if not known:
        raise ConfigError(f"--device {config.device} cannot be used here; try --device cpu")


def convert(name: str, value: Any, kind: Any) -> Any:
    """An option's value from the command line (text) or YAML (typed). Raises ConfigError where it is none."""
    kind, optional = (get_args(kind) or (kind, None))[0], bool(get_args(kind))
    # Others have none: a YAML list of few bytes, or a hexadecimal number, can have a text without end.
    plain = value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 10**300)
    text = str(value) if plain else f"a {type(value).__name__}"
    if optional and text in ("None", "null"):
        return None
    if kind is str and isinstance(value, str) and (value or name == "load_model") and "\0" not in value:
        return value
    if kind is bool and text in ("True", "true", "False", "false"):
        return text in ("True", "true")
    if kind in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = int(text) if text.lstrip("+-").isdigit() else float(text.replace(".inf", "inf"))
            if number == kind(number):
                return kind(number)
    takes = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}[
        kind
    ] + optional * " or None"
    raise ConfigError(f"--{name} takes {takes}, not {repr(value)[:200] if plain else text}")


class ConfigParser(pyrallis.argparsing.ArgumentParser):
    """pyrallis without its silent conversions (`--flag=maybe` to True, `--seed=1.9` to 1, `--see` to --seed)."""

    def __init__(self, config_class: type):
        super().__init__(config_class=config_class, allow_abbrev=False)
        for action in self._actions:
            action.type = str  # each text to `convert`, beside --help too

    def error(self, message: str) -> None:
        raise ConfigError(f"{message} (as --option=value); --help lists the options")

    def _postprocessing(self, namespace: Any) -> Any:
        values = vars(namespace)
        if (path := values.pop("config_path", None)) is not None:
            values = read_yaml(Path(path), "--config_path ") | values
        kinds = {field.name: field.type for field in dataclasses.fields(self.config_class)}
        if unknown := [str(name) for name in values if name not in kinds]:
            raise ConfigError(f"{path} has unknown options: {', '.join(unknown)}; --help lists the known ones")
        return self.config_class(**{name: convert(name, value, kinds[name]) for name, value in values.items()})


def read_yaml(path: Path, option: str = "") -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{option}{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{option}{path} holds no lines of the form `option: value`")
    return content


def is_text(space: gym.Space) -> bool:
    return getattr(space.dtype, "kind", "") == "U"


def flatten(observation: Any, space: gym.Space, n_leading: int = 0) -> np.ndarray:
    """A float32 vector an observation: parts of Dict ones (goal environments) in sorted order of keys and without
    text, Discrete ones one-hot."""
    if isinstance(space, gym.spaces.Dict):
        parts = [key for key, part in sorted(space.items()) if not is_text(part)]
        return np.concatenate([flatten(observation[key], space[key], n_leading) for key in parts], axis=-1)
    if isinstance(space, gym.spaces.Discrete):
        return (np.asarray(observation)[..., None] == space.start + np.arange(space.n)).astype(np.float32)
    observation = np.asarray(observation, dtype=np.float32)
    return observation.reshape(*observation.shape[:n_leading], -1)


def check_spaces(observation_space: gym.Space, action_space: gym.Space, name: str) -> None:
    """Raises DataError for what this script cannot learn from."""
    if not isinstance(action_space, ACTION_SPACES):
        kinds = " or ".join(kind.__name__ for kind in ACTION_SPACES)
        raise DataError(f"{name} has actions {action_space}; this script takes {kinds} ones")
    shape, numbers = observation_space.shape or (), ("Box", "Discrete", "MultiDiscrete", "MultiBinary")
    if isinstance(observation_space, gym.spaces.Dict):
        for part in observation_space.values():
            check_spaces(part, action_space, name)
    elif type(observation_space).__name__ not in numbers and not is_text(observation_space):
        raise DataError(f"{name} has observations {observation_space}; this script takes vectors, and Dicts of them")
    elif len(shape) > 1 and math.prod(shape) > MAX_GRID:
        raise DataError(f"{name} has images of shape {shape}; this script takes vectors and small grids")


def action_bounds(space: gym.Space) -> dict[str, np.ndarray]:
    """Lowest and highest action; of MultiDiscrete and Discrete spaces too."""
    if isinstance(space, gym.spaces.Box):
        return {"action_low": space.low.ravel(), "action_high": space.high.ravel()}
    low, sizes = np.ravel(space.start), np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))
    return {"action_low": low, "action_high": low + sizes - 1}


def open_minari(name: str, download: bool = True) -> minari.MinariDataset:
    """A Minari dataset of the local root, else downloaded. Raises DataError."""
    try:
        minari.dataset.minari_dataset.parse_dataset_id(name)  # Minari itself would join a path such as ../..
        path = minari.storage.get_dataset_path(name)
        if download and not path.exists():
            if os.environ.get("MINARI_REMOTE", "hf://").startswith("hf://"):  # whose client would retry for 23 seconds
                import huggingface_hub

                huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
            minari.download_dataset(name)
        # Where spaces are missing Minari makes the environment, by an entry point that could name any code.
        if not {"observation_space", "action_space"} <= json.loads((path / "data/metadata.json").read_text()).keys():
            raise ValueError("its metadata lacks the spaces")
        return minari.load_dataset(name)
    except Exception as error:  # of the id, the file, the network, the hub's client
        known = list(d4rl_files())
        place = Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets", name)
        if os.path.exists(os.path.expanduser(place)) and "/" in name:
            raise DataError(
                f"--env {name}: {place} is damaged ({str(error)[:200]}); remove it to download it again"
            ) from error
        with (
            contextlib.suppress(Exception),
            warnings.catch_warnings(action="ignore"),
        ):  # other folders may be no datasets
            known += minari.list_local_datasets()
        near = ", ".join(difflib.get_close_matches(name, known, cutoff=0))
        message = f"--env {name} is no file, D4RL name, or Minari dataset here or online ({str(error)[:200]})"
        raise DataError(f"{message}; Minari's would stand in {place}; nearest names: {near}") from error


def stored_scores(dataset: minari.MinariDataset) -> dict[str, np.ndarray]:
    scores = [dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    if None in scores:
        return {}
    scores = np.array(scores, dtype=np.float64)
    return {"reference_scores": scores} if np.isfinite(scores).all() and scores[0] != scores[1] else {}


def d4rl_files() -> dict[str, str]:
    """Name of each D4RL dataset -> its file below D4RL_URL, without .hdf5."""
    files = {}
    for task in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"):
            file = f"{task}_{kind}".replace("-", "_")
            files |= {f"{task}-{kind}-v{i}": f"gym_mujoco_v{i}/{file}-v{i}" for i in (1, 2)}
            if kind != "full-replay":
                old_file = file.replace("medium_replay", "mixed").replace("walker2d_mixed", "walker_mixed")
                files |= {
                    f"{task}-{kind}-v0": f"gym_mujoco/{old_file}",
                    f"bullet-{task}-{kind}-v0": f"bullet/bullet-{file}",
                }
    adroit = {"human": "-v0_demos_clipped", "cloned": "-demos-v0-bc-combined", "expert": "-v0_expert_clipped"}
    for task in ("pen", "hammer", "relocate", "door"):
        for kind, end in adroit.items():
            files |= {f"{task}-{kind}-v0": f"hand_dapg/{task}{end}"}
            files |= {f"{task}-{kind}-v1": f"hand_dapg_v1/{task}-{kind}-v1"}
    for maze, starts, goals in (
        ("umaze", False, False), ("umaze-diverse", True, True), ("medium-play", True, False),
        ("medium-diverse", True, True), ("large-play", True, False), ("large-diverse", True, True),
    ):  # fmt: skip
        size = {"umaze": "u", "medium": "big", "large": "hardest"}[maze.split("-")[0]]
        file = f"Ant_maze_{size}-maze_noisy_multistart_{starts}_multigoal_{goals}_sparse"
        files |= {f"antmaze-{maze}-v0": f"ant_maze_new/{file}", f"antmaze-{maze}-v2": f"ant_maze_v2/{file}_fixed"}
    for maze, version in (("open", ""), ("umaze", "-v1"), ("medium", "-v1"), ("large", "-v1")):
        files[f"bullet-maze2d-{maze}-v0"] = f"bullet/bullet-maze2d-{maze}-sparse"
        for name in (maze, f"eval-{maze}")[: 2 if version else 1]:
            files[f"maze2d-{name}{version or '-v0'}"] = f"maze2d/maze2d-{name}-sparse{version}"
            files[f"maze2d-{name}-dense{version or '-v0'}"] = f"maze2d/maze2d-{name}-dense{version}"
    return files | {
        "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0",
        "kitchen-partial-v0": "kitchen/kitchen_microwave_kettle_light_slider-v0",
        "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0",
        "carla-lane-v0": "carla/carla_lane_follow_flat-v0",
        "carla-town-v0": "carla/carla_town_subsamp_flat-v0",
        "carla-town-full-v0": "carla/carla_town_flat-v0",
        "flow-ring-random-v0": "flow/flow-ring-v0-random",
        "flow-ring-controller-v0": "flow/flow-ring-v0-idm",
        "flow-merge-random-v0": "flow/flow-merge-v0-random",
        "flow-merge-controller-v0": "flow/flow-merge-v0-idm",
        "minigrid-fourrooms-v0": "minigrid/minigrid4rooms",
        "minigrid-fourrooms-random-v0": "minigrid/minigrid4rooms_random",
    }


def is_file(name: str) -> bool:
    return name.endswith(".hdf5") or os.path.isfile(name)


def d4rl_task(name: str) -> Optional[str]:
    """The task of a D4RL name, as REFERENCE_SCORES calls it; None for other names."""
    tasks = [task for task in REFERENCE_SCORES if name.startswith(f"{task}-") and name in d4rl_files()]
    return max(tasks, key=len, default=None)


def download_d4rl(name: str) -> Path:
    """The file of a D4RL name in $D4RL_DATASET_DIR, from D4RL's server where it is missing. Raises DataError."""
    url = f"{D4RL_URL}/{d4rl_files()[name]}.hdf5"
    folder = os.path.expanduser(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    path = Path(folder, url.rsplit("/")[-1])
    if os.path.exists(path):
        return path
    partial, seconds = path.with_name(f"{path.name}.{os.getpid()}.part"), socket.getdefaulttimeout()
    print(f"{path} is not there: downloading {url}")
    try:
        socket.setdefaulttimeout(10)  # of each read, so that a dead server ends the wait
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial))
        h5py.File(partial).close()  # raises where a part is missing
        os.replace(partial, path)
    except Exception as error:  # of the network, the disk, h5py
        raise DataError(f"--env {name}: {url} cannot be downloaded ({error}); put the file at {path}") from error
    finally:
        socket.setdefaulttimeout(seconds)
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def load_d4rl(path: Path, time_limit: int) -> dict[str, np.ndarray]:
    """Transitions of an HDF5 file of D4RL's layout. Raises nearly anything for a damaged file.

    Where the file has no timeouts, an episode ends where the next observation is not the next row's, or, without next
    observations, after time_limit steps. Time-outs whose next observation is unknown are dropped.
    """
    with h5py.File(path) as file:
        columns = {key: file[key] for key in COLUMNS if isinstance(file.get(key), h5py.Dataset)}
        if missing := {"observations", "actions", "rewards", "terminals"} - columns.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        for key, column in columns.items():
            n_axes = {"observations": (2, 3, 4), "next_observations": (2, 3, 4), "actions": (1, 2)}.get(key, (1,))
            if column.ndim not in n_axes or column.ndim > 2 and math.prod(column.shape[1:]) > MAX_GRID:
                raise ValueError(f"its {key} have shape {column.shape}{', of images' * (column.ndim > 2)}")
            if column.is_virtual:  # whose rows may be elsewhere, and zeros where they are not
                raise ValueError(f"its {key} are a virtual dataset")
        n_bytes = 4 * sum(column.size for column in columns.values())
        if n_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise ValueError(f"it declares {n_bytes / 1e9:,.0f} GB, more than this machine's memory")
        if len(lengths := {len(column) for column in columns.values()}) > 1:
            raise ValueError(f"its columns have {', '.join(map(str, sorted(lengths)))} rows")
        data = {key: column.astype(np.float32)[()] for key, column in columns.items()}
    for key in {"observations", "next_observations", "actions"} & data.keys():
        if data[key].ndim != 2:  # grids, and actions of a Discrete space
            data[key] = data[key].reshape(len(data[key]), math.prod(data[key].shape[1:]))
    for key in {"terminals", "timeouts"} & data.keys():
        if not np.isin(data[key], (0, 1)).all():
            raise ValueError(f"its {key} are not 0 or 1")
        data[key] = data[key].astype(bool)
    rows, terminals = np.arange(len(data["rewards"])), data["terminals"]
    if "timeouts" not in data and "next_observations" in data:
        data["timeouts"] = np.append((data["next_observations"][:-1] != data["observations"][1:]).any(axis=1), True)
    elif "timeouts" not in data:
        print(f"{path} has neither timeouts nor next_observations: its episodes are taken to end at {time_limit} steps")
        starts = np.maximum.accumulate(np.where(np.append(True, terminals[:-1]), rows, 0))
        data["timeouts"] = (rows - starts) % time_limit == time_limit - 1
    data["timeouts"] &= ~terminals
    data["timeouts"][-1:] = ~terminals[-1:]
    if "next_observations" in data:
        return data
    # At a terminal the next row is another episode's; the state itself stands in, and no target uses its value.
    data["next_observations"] = data["observations"][np.where(terminals, rows, np.minimum(rows + 1, rows[-1:]))]
    known = ~data["timeouts"]
    data["timeouts"] = np.append(~known[1:], False) & ~terminals  # the episode ends a row earlier than recorded
    return {key: data.pop(key)[known] for key in COLUMNS}  # one by one: memory never holds the data twice


def load_dataset(name: str) -> dict[str, np.ndarray]:
    """The transitions of a dataset, in order: the one function to replace for other data. Raises DataError.

    observations [T, O], actions [T, A] in the environment's units, rewards [T], next_observations [T, O], and the flags
    terminals [T] (the next state is terminal) and timeouts [T] (the episode ends here all the same). Optional:
    action_low, action_high [A], reference_scores [2] (returns of a random policy and of an expert).
    """
    if is_file(name) or name in d4rl_files():
        path = Path(name) if is_file(name) else download_d4rl(name)
        try:
            return load_d4rl(path, d4rl_steps(name))
        except FileNotFoundError as error:
            raise DataError(f"--env {name}: {path} does not exist") from error
        except Exception as error:  # a damaged HDF5 file raises nearly anything
            raise DataError(f"--env {name}: {path} is damaged or not of D4RL's layout: {error}") from error
    dataset = open_minari(name)
    check_spaces(dataset.observation_space, dataset.action_space, f"--env {name}")
    columns = {key: [] for key in COLUMNS}
    try:
        for episode in dataset.iterate_episodes():
            observations = flatten(episode.observations, dataset.observation_space, n_leading=1)  # [T + 1, O]
            if not len(observations) - 1 == len(episode.actions) == len(episode.rewards):
                raise ValueError(
                    f"episode {episode.id} has {len(observations)} observations, {len(episode.rewards)} rewards"
                )
            ends = np.asarray(episode.truncations, dtype=bool) | (
                np.arange(len(episode.rewards)) == len(episode.rewards) - 1
            )
            columns["observations"].append(observations[:-1])
            columns["next_observations"].append(observations[1:])  # known at time-outs too, so that they bootstrap
            actions = np.asarray(episode.actions, dtype=np.float32)
            columns["actions"].append(actions.reshape(len(actions), -1))
            columns["rewards"].append(np.asarray(episode.rewards, dtype=np.float32))
            columns["terminals"].append(np.asarray(episode.terminations, dtype=bool))
            columns["timeouts"].append(ends & ~columns["terminals"][-1])
        data = {key: np.concatenate(columns.pop(key)) for key in list(columns)} | stored_scores(dataset)
    except Exception as error:  # a damaged HDF5 file raises nearly anything
        raise DataError(f"--env {name} is damaged: {error}") from error
    return data | action_bounds(dataset.action_space)


def check_dataset(data: dict[str, np.ndarray], name: str) -> None:
    """Raises DataError for data that cannot be trained on."""
    if missing := [key for key in COLUMNS if key not in data]:
        raise DataError(f"--env {name} lacks {', '.join(missing)}")
    n_transitions = len(data["rewards"])
    if n_transitions == 0:
        raise DataError(f"--env {name} holds no transition with a known next observation")
    for key in COLUMNS:
        n_axes = 2 if key in ("observations", "actions", "next_observations") else 1
        if data[key].ndim != n_axes or len(data[key]) != n_transitions:
            raise DataError(f"--env {name}: {key} have shape {data[key].shape}, rewards {n_transitions} rows")
        if 0 in data[key].shape:
            raise DataError(f"--env {name}: {key} have no columns")
        if not (np.abs(data[key]) < 1e15).all():
            raise DataError(f"--env {name}: {key} hold NaN, infinity or numbers beyond 1e15")
    if data["observations"].shape != data["next_observations"].shape:
        raise DataError(f"--env {name}: observations and next_observations differ in size")


def episode_numbers(data: dict[str, np.ndarray]) -> np.ndarray:
    """Number of the episode of each transition, [T]."""
    return np.append(0, np.cumsum(np.logical_or(data["terminals"], data["timeouts"]))[:-1])


def episode_returns(data: dict[str, np.ndarray]) -> np.ndarray:
    """Return of each episode, but for a last one that the end of the recording cut short."""
    numbers = episode_numbers(data)
    returns, lengths = np.bincount(numbers, weights=data["rewards"]), np.bincount(numbers)
    return returns[:-1] if not data["terminals"][-1] and lengths[-1] < lengths.max() else returns


# local: continuous actions
ACTION_SPACES = (gym.spaces.Box,)


# local: continuous actions
def encode_actions(
    actions: np.ndarray, low: Optional[np.ndarray], high: Optional[np.ndarray], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the box [low, high] (where it is not known, -1 to 1) to [-1, 1]; with the box, [A].

    Raises DataError for actions outside by more than 1e-3 of the range.
    """
    low, high = (
        np.broadcast_to(x if bound is None else bound, actions.shape[1:]) for bound, x in ((low, -1.0), (high, 1.0))
    )
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise DataError(f"--env {name}: actions need finite bounds, not {low} to {high}")
    scaled = actions.astype(np.float64)
    scaled -= low
    scaled *= 2 / (high.astype(np.float64) - low)
    scaled -= 1
    if max(scaled.max(), -scaled.min()) > 1 + 2e-3:
        raise DataError(f"--env {name}: actions from {actions.min()} to {actions.max()} are outside {low} to {high}")
    return scaled.clip(-1, 1, out=scaled).astype(np.float32), low, high


# local: continuous actions
def environment_action(config: TrainConfig, action: np.ndarray, space: gym.Space, rng: Any) -> np.ndarray:
    """As the environment takes it."""
    return action.reshape(space.shape).astype(space.dtype).clip(space.low, space.high)


class ReplayBuffer:
    """All transitions, on the device; memory of the CPU is shared with the arrays."""

    def __init__(self, data: dict[str, np.ndarray], device: str):
        kinds = {"i": torch.int64}  # discrete actions; else float32
        self.columns = [
            torch.as_tensor(data[key], dtype=kinds.get(data[key].dtype.kind, torch.float32), device=device)
            for key in Batch._fields
        ]

    def sample(self, batch_size: int) -> Batch:
        rewards = self.columns[2]
        return self.rows(torch.randint(len(rewards), (batch_size,), device=rewards.device))

    def rows(self, indices: Tensor | slice) -> Batch:
        return Batch(*[column[indices] for column in self.columns])


# D4RL's returns of a random policy and of an expert, by task. Other data have those of their dataset, or none.
REFERENCE_SCORES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
    "antmaze": (0.0, 1.0),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "bullet-halfcheetah": (-1275.766996, 2381.6725),
    "bullet-hopper": (20.058972, 1441.8059623430963),
    "bullet-walker2d": (16.523877, 1623.6476303317536),
    "bullet-ant": (373.705955, 2650.495),
    "bullet-maze2d-open": (8.75, 64.15),
    "bullet-maze2d-umaze": (32.46, 153.99),
    "bullet-maze2d-medium": (14.87, 238.05),
    "bullet-maze2d-large": (1.82, 285.92),
    "flow-ring": (-165.22, 24.42),
    "flow-merge": (118.67993, 330.03179),
    "carla-lane": (-0.8503839912088142, 1023.5784385429523),
    "carla-town": (-114.81579500772153, 2440.1772022247314),
    "minigrid-fourrooms": (0.01442, 2.89685),
}
# The Gymnasium environment of the same observations. D4RL's mazes have other coordinates than Gymnasium-Robotics', and
# its kitchen other observations.
D4RL_ENVIRONMENTS = {
    "halfcheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v4",  # v5 changed the friction of a foot
    "ant": "Ant-v4",  # v5 observes contact forces
    "pen": "AdroitHandPen-v1",
    "hammer": "AdroitHandHammer-v1",
    "door": "AdroitHandDoor-v1",
    "relocate": "AdroitHandRelocate-v1",
}
# D4RL's longest episodes, by the start of a name; 1000 steps elsewhere.
D4RL_STEPS = {
    "pen": 100, "hammer": 200, "door": 200, "relocate": 200, "kitchen": 280, "antmaze-umaze": 700, "maze2d-open": 150,
    "maze2d-umaze": 300, "maze2d-medium": 600, "maze2d-large": 800, "minigrid": 50, "flow-ring": 500,
    "flow-merge": 750, "carla-lane": 250,
}  # fmt: skip


def d4rl_steps(name: str) -> int:
    task = name.replace("bullet-", "").replace("eval-", "") if name in d4rl_files() else ""
    return next((steps for start, steps in D4RL_STEPS.items() if task.startswith(start)), 1000)


def make_environments(config: Any) -> list[gym.Env]:
    """Up to 16 evaluation environments; none where there is no simulator. Raises ConfigError or DataError."""
    if config.eval_env == "none":
        return []
    name, arguments, task = config.eval_env, {}, d4rl_task(config.env)
    if name is None and (is_file(config.env) or config.env in d4rl_files()):
        if is_file(config.env) or task not in D4RL_ENVIRONMENTS:
            print(f"{config.env} has no environment in Gymnasium: no evaluation (--eval_env names one)")
            return []
        name, arguments["max_episode_steps"] = D4RL_ENVIRONMENTS[task], d4rl_steps(config.env)
    elif name is None:
        dataset = open_minari(config.env)
        spec = dataset._eval_env_spec or dataset.env_spec
        if spec is None:
            print(f"{config.env} names no environment: no evaluation (--eval_env names one)")
            return []
        # Only the id counts: an entry point that stands in a file could be any code.
        name, arguments = spec.id, dict(spec.kwargs, max_episode_steps=spec.max_episode_steps)
        arguments.pop("render_mode", None)  # the recording may have had a window
    try:
        if name not in gym.registry:
            with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
                import gymnasium_robotics
            gym.register_envs(gymnasium_robotics)
        if name not in gym.registry and config.eval_env is None:
            print(f"{config.env} was recorded in {name}, unknown to Gymnasium: no evaluation (--eval_env names one)")
            return []
        with warnings.catch_warnings(action="ignore"):  # that there are later versions
            envs = [gym.make(name, **arguments) for _ in range(min(config.n_episodes, 16))]
        # Without a limit of steps a greedy policy may stand still for ever.
        return [env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, MAX_STEPS) for env in envs]
    except Exception as error:  # Gymnasium's own, a missing simulator or renderer, arguments that it does not take
        if config.eval_env is None:
            message = f"--env {config.env}: its environment {name} cannot be made ({error})"
            raise DataError(f"{message}; --eval_env names another, --eval_env none trains without") from error
        raise ConfigError(f"--eval_env {name} cannot be made: {error}") from error


class Task(NamedTuple):
    envs: list[gym.Env]  # to evaluate in, may be empty
    transform: tuple[float, float, float] = (1.0, 0.0, math.inf)  # factor, offset and limit of the training rewards
    reference: Optional[tuple[float, float]] = None  # returns that score 0 and 100
    value_limit: float = math.inf  # mean values beyond it have diverged

    def training_rewards(self, rewards: Any) -> Any:
        factor, offset, limit = self.transform
        return np.clip(rewards * factor + offset, -limit, limit)

    def score(self, mean_return: float) -> Optional[float]:
        low, high = self.reference or (0, 0)
        return 100 * (mean_return - low) / (high - low) if self.reference else None


def reference_scores(name: str, envs: list[gym.Env], data: dict[str, np.ndarray]) -> Optional[tuple[float, float]]:
    """By D4RL name, else by environment, else the dataset's."""
    tasks = {environment.split("-")[0]: task for task, environment in D4RL_ENVIRONMENTS.items()}
    tasks |= {"FrankaKitchen": "kitchen", "AntMaze": "antmaze"}
    task = d4rl_task(name) or tasks.get(envs[0].spec.id.replace("_", "-").split("-")[0] if envs else "")
    reference = REFERENCE_SCORES.get(task, data.get("reference_scores"))
    return None if reference is None else (float(reference[0]), float(reference[1]))


def reward_transform(config: Any, data: dict[str, np.ndarray], envs: list[gym.Env]) -> tuple[float, float, float]:
    """Factor, offset and limit of the training rewards; (1, 0, limit) unless normalize_reward. Raises DataError."""
    if not config.normalize_reward:
        return 1.0, 0.0, config.reward_clip
    factor = config.reward_scale
    name = Path(config.env).name if is_file(config.env) else config.env
    task = f"{name} {envs[0].spec.id if envs else ''}".lower()
    if any(name in task for name in ("halfcheetah", "hopper", "walker2d")):
        returns = episode_returns(data)
        if returns.min() == returns.max():
            raise DataError(
                f"--normalize_reward: all episodes of {config.env} have the same return, so there is no range"
            )
        factor *= 1000 / (returns.max() - returns.min())
    return float(factor), config.reward_bias, config.reward_clip


def rollout(
    config: Any, task: Task, policy: Callable[[np.ndarray], np.ndarray], stop: Callable[[], bool] = lambda: False
) -> Optional[dict[str, np.ndarray]]:
    """One episode from each reset seed eval_seed + i, as many side by side as there are environments.

    Returns arrays over the n_episodes: start observation, return, length, success (NaN where the environment reports
    none) and discounted return of the training rewards; None once `stop` says so.
    """
    starts, result = [], {key: np.zeros(config.n_episodes) for key in ("return", "length", "discounted_return")}
    result["success"] = np.full(config.n_episodes, np.nan)
    for first in range(0, config.n_episodes, len(task.envs)):
        running = dict(zip(range(first, config.n_episodes), task.envs))
        observations, rngs = {}, {i: np.random.default_rng((config.eval_seed, i)) for i in running}
        for i, env in running.items():
            observations[i] = flatten(env.reset(seed=config.eval_seed + i)[0], env.observation_space)
        starts.extend(observations.values())
        if not np.isfinite(starts).all():
            raise ValueError("an episode starts at NaN or infinity")
        while observations:
            if stop():
                return None
            actions = policy(np.stack(list(observations.values())))
            for i, action in zip(list(observations), actions):
                action = environment_action(config, action, running[i].action_space, rngs[i])
                observation, reward, terminated, truncated, info = running[i].step(action)
                observations[i] = flatten(observation, running[i].observation_space)
                if not (math.isfinite(reward + result["return"][i]) and np.isfinite(observations[i]).all()):
                    raise ValueError(f"NaN or infinity at step {result['length'][i] + 1:.0f} of episode {i}")
                trained_on = task.training_rewards(reward)
                result["discounted_return"][i] += config.discount ** result["length"][i] * trained_on
                result["return"][i] += reward
                result["length"][i] += 1
                for key in ("success", "is_success", "goal_achieved"):
                    if key in info:
                        result["success"][i] = np.fmax(result["success"][i], float(info[key]))
                if terminated or truncated:
                    del observations[i]
    if not np.isnan(result["success"]).all():  # some environments report nothing but a success
        result["success"] = np.nan_to_num(result["success"])
    return result | {"start": np.stack(starts)}


def evaluate(
    config: Any,
    task: Task,
    policy: Callable[[np.ndarray], np.ndarray],
    value: Callable[[np.ndarray], np.ndarray],
    stop: Callable[[], bool] = lambda: False,
) -> Optional[dict[str, Optional[float]]]:
    """The evaluation's columns of metrics.csv, all None without an environment; None once `stop` says so."""
    row = dict.fromkeys(("eval_return", "eval_return_std", "d4rl_normalized_score", "updates_per_second"))
    row |= dict.fromkeys(("eval_length", "eval_success", "eval_predicted_value", "eval_discounted_return"))
    if not task.envs:
        return row
    episodes = rollout(config, task, policy, stop)
    if episodes is None:
        return None
    episodes["predicted_value"] = value(episodes.pop("start"))
    means = {f"eval_{name}": float(x.mean()) for name, x in episodes.items() if not np.isnan(x).all()}
    row |= means | {"eval_return_std": float(episodes["return"].std())}
    return row | {"d4rl_normalized_score": task.score(row["eval_return"])}


def try_evaluate(step: int, config: Any, task: Task, *arguments: Callable) -> Optional[dict[str, Optional[float]]]:
    """`evaluate`, or its empty columns and a warning where the simulator fails."""
    try:
        return evaluate(config, task, *arguments)
    except Exception as error:
        tqdm.write(f"warning: no evaluation at update {step:,}: {error!r}", file=sys.stderr)
        return evaluate(config, Task([]), *arguments)


def describe(row: dict[str, Any]) -> str:
    if row.get("eval_return") is None:
        return "not evaluated"
    text, score = f"return {row['eval_return']:.1f} ± {row['eval_return_std']:.1f}", row["d4rl_normalized_score"]
    return text if score is None else f"score {score:.1f} ({text})"


def save(path: Path, content: str | dict[str, Any]) -> None:
    """Text, or tensors and plain values. The file holds the old content or the new, whenever the process is killed or
    the disk is full. Raises DataError."""
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    buffer.write(content.encode()) if isinstance(content, str) else torch.save(content, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(f"{path} cannot be written ({error.strerror}); what was saved before is intact") from error


def load(path: Path | str, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint.pt or policy.pt: tensors and plain values, nothing that could run. Raises DataError."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        policy = content.get("policy", content)
        policy["sizes"], policy["weights"]["observation_mean"].shape, policy["weights"]["observation_std"].shape
        return content
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise DataError(f"{path} is damaged, or no checkpoint.pt or policy.pt of this project") from error


def load_policy(path: Path | str, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """The deterministic policy of a policy.pt or checkpoint.pt, policy(observation) -> action: raw observations in,
    [O] or [B, O], actions in the environment's units out, [A] or [B, A]. Raises DataError."""
    content = load(path, device)
    state = content.get("policy", content)
    try:
        actor = Policy(*state["sizes"]).to(device)
        actor.load_state_dict(state["weights"])
    except (TypeError, RuntimeError) as error:
        raise DataError(f"{path} holds no policy of this script") from error
    return actor.act


class Means:
    """Means of metrics since the last row, summed on the device so that no update waits for it."""

    def __init__(self):
        self.names, self.total, self.count, self.seconds, self.mark = [], None, 0, 0.0, (0.0, 0)

    def add(self, metrics: dict[str, Tensor]) -> None:
        values = torch.stack(list(metrics.values())).double()
        self.names, self.count = list(metrics), self.count + 1
        if self.total is None:
            self.total = torch.zeros_like(values)
        self.total += values  # in place, as a CUDA graph needs it

    def read(self, since_mark: bool = False) -> dict[str, float]:
        """Since the last row, or since the last call of set_mark."""
        total, count = self.mark if since_mark else (0.0, 0)
        return dict(zip(self.names, ((self.total - total) / (self.count - count)).tolist()))

    def set_mark(self) -> None:
        self.mark = (self.total.clone(), self.count)

    def reset(self) -> None:
        self.total.zero_()
        self.count, self.seconds, self.mark = 0, 0.0, (0.0, 0)


def compiled(function: Callable, calls: list[tuple]) -> Callable:
    """torch.compile of a function without effects, ready for such calls; the function itself where that fails."""
    torch._dynamo.config.trace_autograd_ops = True  # losses and their gradients in one graph
    try:
        fast = torch.compile(function, fullgraph=True)
        for arguments in calls:
            fast(*arguments)
        return fast
    except Exception as error:  # no compiler, no Triton, a GPU that is too old
        reason = str(error).strip().splitlines()[0]
        print(f"warning: updates are not compiled, and slower ({reason}); --compile False says so", file=sys.stderr)
        return function


def keep_freed_memory() -> None:
    """Tells glibc to keep what an update frees for the next one, instead of giving it back and taking it again."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        for parameter, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(parameter, value)


class Updates:
    """Runs updates one by one or, on a GPU, many at a time as a CUDA graph: one launch for all their kernels."""

    block = 10

    def __init__(self, config: Any, agent: Any, buffer: ReplayBuffer, means: Means):
        """Compiles the losses where the configuration says so, and leaves the random state as it was."""
        keep_freed_memory()
        self.config, self.agent, self.buffer, self.means = config, agent, buffer, means
        on_gpu, self.graph, self.record_at = "cuda" in config.device, None, math.inf
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
        if config.compile or (config.compile is None and on_gpu):
            with torch.random.fork_rng([config.device] if on_gpu else []):
                calls = agent.calls(buffer.sample(config.batch_size))
            agent.compute_gradients = compiled(agent.gradients, calls)
            if on_gpu:
                self.record_at = agent.n_updates + 3  # after updates that make what lasts, such as Adam's moments

    def one(self) -> None:
        self.means.add(self.agent.update(self.buffer.sample(self.config.batch_size)))

    def __call__(self) -> int:
        """Runs updates, at least one, but none beyond the next evaluation, record or end. Returns how many."""
        config, step = self.config, self.agent.n_updates
        left = min(*(n - step % n for n in (config.eval_freq, config.log_interval)), config.max_timesteps - step)
        if step >= self.record_at and left >= self.block and not self.agent.changing:
            if self.graph is None:
                self.record()
            if self.graph:
                self.graph.replay()
                self.agent.n_updates += self.block
                self.means.count += self.block
                return self.block
        self.one()
        return 1

    def record(self) -> None:
        """Recording runs nothing on the device; what Python counts meanwhile is set back."""
        n_updates, count, graph = self.agent.n_updates, self.means.count, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(self.block):
                    self.one()
            self.graph = graph
        except Exception as error:
            print(f"warning: no CUDA graph, slower: {error!r}", file=sys.stderr)
            self.record_at = math.inf
        self.agent.n_updates, self.means.count = n_updates, count


def check_convergence(metrics: dict[str, float], step: int, value_limit: float) -> None:
    """Raises DivergenceError for what is no finite number, and for mean values beyond value_limit."""
    for name, value in metrics.items():
        limited = name.startswith(("average_", "eval_predicted"))
        if not abs(value) <= (value_limit if limited else sys.float_info.max):
            raise DivergenceError(
                f"training diverged: {name} is {value:.4g} at update {step:,}; rows and checkpoint are as they were "
                "before; try another run with smaller learning rates or a larger cql_alpha"
            )


class RunFolder:
    """config.yaml, metrics.csv, checkpoint.pt and policy.pt of one run. Raises ConfigError or DataError."""

    def __init__(self, config: Any):
        """Reads what stands in the folder, and writes nothing."""
        root, name = Path(config.checkpoints_path), f"{config.name}-{config.env}".replace("/", "-")
        self.path = root / (config.run_id or f"{name}-{os.urandom(4).hex()}")
        while not config.run_id and os.path.exists(self.path):
            self.path = root / f"{name}-{os.urandom(4).hex()}"
        self.rows, self.checkpoint, self.written = [], None, self.last_written()
        try:
            if os.path.exists(self.path / "config.yaml"):
                self.check_same(config)
            elif self.written:
                raise ValueError("it lacks config.yaml")
            if os.path.exists(self.path / "metrics.csv"):
                self.rows = list(csv.DictReader((self.path / "metrics.csv").read_text().splitlines()))
                [float(value) for row in self.rows for value in (row["step"], *row.values()) if value != ""]
            if os.path.exists(self.path / "checkpoint.pt"):
                self.checkpoint = load(self.path / "checkpoint.pt", config.device)
                self.checkpoint["agent"], self.checkpoint["means"], self.checkpoint["random"]
        except DataError:
            raise
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            raise DataError(f"{self.path} holds a damaged run ({error}); give another --run_id") from error

    def last_written(self) -> list[int]:
        paths = [self.path / name for name in ("metrics.csv", "checkpoint.pt")]
        return [path.stat().st_mtime_ns for path in paths if os.path.exists(path)]

    def open(self, config: Any) -> None:
        """Stores the configuration, and keeps other processes out until `close` or the process's end."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            message = f"{self.path} cannot be made ({error.strerror}); give another --checkpoints_path"
            raise DataError(message) from error
        try:
            with contextlib.suppress(OSError):  # some file systems of clusters know no locks
                self.lock()
            if self.last_written() != self.written:
                raise DataError(f"another process wrote to {self.path} just now; start again")
            save(self.path / "config.yaml", pyrallis.dump(config))
        except DataError:
            self.close()
            raise

    def lock(self) -> None:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self.path} is in use by another process; give another --run_id") from error

    def close(self) -> None:
        os.close(self.handle)

    def check_same(self, config: Any) -> None:
        """A resumed run keeps its configuration, except for a later end and what cannot change its result."""
        old, new = read_yaml(self.path / "config.yaml"), yaml.safe_load(pyrallis.dump(config))
        free = {"device", "n_episodes", "project", "group", "name", "run_id", "checkpoints_path"}
        if new["max_timesteps"] >= (old["max_timesteps"] or math.inf):
            free.add("max_timesteps")
        changed = [f"{key} was {old.get(key)}, is {new[key]}" for key in new.keys() - free if old.get(key) != new[key]]
        if changed:
            raise ConfigError(f"{self.path} holds a run with another configuration: {'; '.join(sorted(changed))}")

    def add_row(self, row: dict[str, Any]) -> None:
        """Appends to metrics.csv; the rows that stand in it stay as they are."""
        row, text = {key: "" if value is None else str(value) for key, value in row.items()}, io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0] if self.rows else row), lineterminator="\n")
        if unknown := row.keys() - set(writer.fieldnames):
            raise DataError(f"{self.path}/metrics.csv lacks {', '.join(sorted(unknown))}; give another --run_id")
        writer.writeheader()
        writer.writerows([*self.rows, row])
        save(self.path / "metrics.csv", text.getvalue())
        self.rows.append(row)

    def save(self, agent: Any, means: Means, random_state: Tensor) -> None:
        policy = {"sizes": list(agent.actor.sizes), "weights": agent.actor.state_dict()}
        state = {"agent": agent.checkpoint(), "means": vars(means), "random": random_state, "policy": policy}
        save(self.path / "policy.pt", policy)
        save(self.path / "checkpoint.pt", state)

    @property
    def last_row(self) -> dict[str, Any]:
        """As numbers, None where empty; step 0 before the first row."""
        return {key: float(value) if value else None for key, value in (self.rows or [{"step": "0"}])[-1].items()}


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yields a list that receives the signals that ask a run to end; they take effect between two updates."""
    received, previous = [], {}
    with contextlib.suppress(ValueError):  # Python allows handlers in the main thread only
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start_wandb(config: Any, folder: Path) -> wandb.Run:
    """A W&B run where the user is logged in, an agent started this or WANDB_MODE asks for it, else one that does
    nothing. It never stops or delays training: the run folder has everything."""
    options = {"project": config.project, "group": config.group, "name": folder.name, "id": config.run_id}
    limits = wandb.Settings(init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS)
    # Else it takes up to 15 s more to ask who is logged in, and 14 s to report its own use.
    os.environ |= {"WANDB_X_DISABLE_VIEWER": "true", "WANDB_ERROR_REPORTING": "false"}
    try:
        asked = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_SWEEP_ID")
        if asked or wandb.login(prompt=False, verify=False):
            return wandb.init(**options, config=dataclasses.asdict(config), resume="allow", settings=limits)
    except Exception as error:  # no account, no network, no disk
        print(f"warning: W&B is off for this run: {' '.join(str(error).split())}", file=sys.stderr)
    return wandb.init(mode="disabled")


def log_wandb(run: wandb.Run, metrics: dict[str, Any], step: int) -> None:
    with contextlib.suppress(Exception):
        if step >= run.starting_step:  # a resumed run repeats steps that W&B holds already
            run.log({name: value for name, value in metrics.items() if value is not None}, step=step)


def prepare_data(
    config: Any, envs: list[gym.Env], statistics: Optional[list[np.ndarray]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Tensor], Task]:
    """Transitions for training and held out, as the networks see them, the scaling that led there (`statistics`, the
    mean and std of observations, where given), and the task."""
    data = load_dataset(config.env)
    check_dataset(data, config.env)
    n_transitions, numbers = len(data["rewards"]), episode_numbers(data)
    if n_transitions > config.buffer_size:
        raise ConfigError(
            f"--buffer_size {config.buffer_size} is less than the {n_transitions} transitions of the data"
        )
    if envs:
        env, sizes = envs[0], {key: data[key].shape[1] for key in ("observations", "actions")}
        space = env.observation_space
        check_spaces(space, env.action_space, env.spec.id)
        data |= action_bounds(env.action_space)
        try:
            env_sizes = {"observations": flatten(space.sample(), space).size, "actions": data["action_low"].size}
        except (TypeError, ValueError) as error:
            raise DataError(f"{env.spec.id} has observations {env.observation_space}, which are no numbers") from error
        if sizes != env_sizes:
            raise DataError(
                f"--env {config.env} has sizes {sizes}, but {env.spec.id} {env_sizes}: name another --eval_env"
            )

    transform = reward_transform(config, data, envs)
    # A hundred times the largest possible return (that of rewards below 1 counts as 1's): conservative values may well
    # be below any return.
    task = Task(envs, transform, reference_scores(config.env, envs, data))
    largest_reward = max(1.0, float(np.abs(task.training_rewards(data["rewards"])).max()))
    task = task._replace(value_limit=100 * largest_reward / max(1 - config.discount, 1e-4))
    n_episodes, returns = numbers[-1] + 1, episode_returns(data)
    behaviour = {"eval_return": returns.mean(), "eval_return_std": returns.std()}
    text = describe(behaviour | {"d4rl_normalized_score": task.score(returns.mean())})
    print(f"{config.env}: {n_transitions:,} transitions, {n_episodes:,} episodes, behaviour {text}")

    bounds = (data.get("action_low"), data.get("action_high"))
    data["actions"], low, high = encode_actions(data["actions"], *bounds, config.env)
    data["rewards"] = task.training_rewards(data["rewards"])
    n_held_out = math.ceil(config.holdout_fraction * n_episodes)
    if n_held_out == n_episodes:
        raise ConfigError(f"--holdout_fraction {config.holdout_fraction} leaves none of {n_episodes} episodes")
    held_out = np.isin(numbers, np.random.default_rng(config.seed).permutation(n_episodes)[:n_held_out])
    holdout = {key: data[key][held_out] for key in COLUMNS}
    if n_held_out:
        data = {key: data.pop(key)[~held_out] for key in COLUMNS}
    mean, std = np.zeros_like(data["observations"][0]), np.ones_like(data["observations"][0])
    if config.normalize:
        mean = data["observations"].mean(0, dtype=np.float64)
        std = np.array([column.std(dtype=np.float64) for column in data["observations"].T]) + 1e-3
    mean, std = (x.astype(np.float32) for x in (statistics or (mean, std)))
    if mean.shape != data["observations"].shape[1:]:
        raise DataError(f"--load_model {config.load_model} takes observations of size {mean.size}")
    for part in (data, holdout):
        for key in ("observations", "next_observations"):
            part[key] = part[key] - mean
            part[key] /= std
    scaling = {"observation_mean": mean, "observation_std": std, "action_low": low, "action_high": high}
    return data, holdout, {name: torch.tensor(x, dtype=torch.float32) for name, x in scaling.items()}, task


def evaluate_stored(config: Any) -> dict[str, Any]:
    """The return of the policy in load_model, as a row in a new run folder."""
    policy, folder = load_policy(config.load_model, config.device), RunFolder(config)
    if folder.rows:
        print(f"{folder.path} is complete: {describe(folder.last_row)}")
        return folder.last_row
    envs = make_environments(config)
    if not envs:
        raise ConfigError("--max_timesteps 0 needs an environment to evaluate in: name one with --eval_env")
    space = envs[0].observation_space
    check_spaces(space, envs[0].action_space, envs[0].spec.id)
    sizes = policy.__self__.sizes[0], flatten(space.sample(), space).size
    if sizes[0] != sizes[1]:  # one of size 1 would pass through any policy
        raise DataError(
            f"--load_model {config.load_model} takes {sizes[0]} observations, {envs[0].spec.id} has {sizes[1]}"
        )
    data = {}
    with contextlib.suppress(DataError):  # the scores' dataset may not be here
        data = stored_scores(open_minari(config.env, download=False))
    task = Task(envs, reference=reference_scores(config.env, envs, data))
    try:
        row = evaluate(config, task, policy, value=lambda starts: np.full(len(starts), np.nan))
    except Exception as error:  # of the networks, or of the environment
        raise DataError(f"--load_model {config.load_model} does not fit {envs[0].spec.id}: {error}") from error
    folder.open(config)
    folder.add_row({"step": 0, **row, "eval_discounted_return": None})  # the rewards that it trained on are not known
    folder.close()
    print(f"{describe(folder.last_row)} over {config.n_episodes} episodes, in {folder.path}")
    return folder.last_row


def evaluates(config: Any, step: int) -> bool:
    return step % config.eval_freq == 0 or step == config.max_timesteps


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains and evaluates; returns the last row of metrics.csv. A run folder that holds part of the run is continued.

    Raises ConfigError, DataError, and SystemExit(128 + signal) after a signal, with everything saved.
    """
    if config.max_timesteps == 0:
        return evaluate_stored(config)
    folder = RunFolder(config)
    if folder.checkpoint and folder.last_row["step"] == folder.checkpoint["agent"]["n_updates"] == config.max_timesteps:
        print(f"{folder.path} is complete: {describe(folder.last_row)}")
        return folder.last_row
    start = folder.checkpoint or (load(config.load_model, config.device) if config.load_model else None)
    if start and "agent" not in start:
        raise DataError(f"--load_model {config.load_model} holds a policy alone; training starts from a checkpoint.pt")

    envs = make_environments(config)
    statistics = start and [start["policy"]["weights"][f"observation_{x}"].cpu().numpy() for x in ("mean", "std")]
    data, holdout, scaling, task = prepare_data(config, envs, statistics)
    if "cuda" in config.device:
        torch.cuda.set_device(config.device)
    torch.manual_seed(config.seed)
    agent = CQL(config, data["observations"].shape[1], data["actions"].shape[1])
    buffer, means, rng = ReplayBuffer(data, config.device), Means(), torch.cuda if "cuda" in config.device else torch
    # The holdout metrics are over the same ten minibatches at each evaluation, or less.
    shown = np.random.default_rng(config.seed).permutation(len(holdout["rewards"]))[: 10 * config.batch_size]
    holdout = ReplayBuffer({key: column[shown] for key, column in holdout.items()}, config.device).rows(slice(None))
    if start:
        try:
            agent.restore(start["agent"])
            if folder.checkpoint:
                vars(means).update(start["means"])
                if len(start["random"]) == len(rng.get_rng_state()):  # else it was on the other kind of device
                    rng.set_rng_state(start["random"].cpu())
        except Exception as error:  # of other networks, or of a damaged file
            source = folder.path / "checkpoint.pt" if folder.checkpoint else f"--load_model {config.load_model}"
            raise DataError(f"{source} does not fit this run, or is damaged: {error!r}"[:300]) from error
    agent.actor.load_state_dict(scaling, strict=False)
    agent.n_updates = agent.n_updates if folder.checkpoint else 0

    updates = Updates(config, agent, buffer, means)

    def read_means(since_mark: bool = False) -> dict[str, float]:
        averages = means.read(since_mark)
        norm = nn.utils.get_total_norm(agent.parameters()).item()
        check_convergence(averages | {"the norm of all weights": norm}, agent.n_updates, task.value_limit)
        return averages

    def record(step: int) -> None:
        """Evaluates and writes row, policy and checkpoint, unless a signal comes in between."""
        started = time.perf_counter()
        averages = read_means()  # waits for the device
        means.seconds += time.perf_counter() - started
        if folder.last_row["step"] < step:  # else the row was written just before a kill
            row = try_evaluate(step, config, task, agent.actor.act, agent.start_values, lambda: bool(received))
            if row is None:
                return
            check_convergence({"eval_predicted_value": row["eval_predicted_value"] or 0.0}, step, task.value_limit)
            row["updates_per_second"] = means.count / means.seconds
            row |= agent.holdout_metrics(holdout) if len(holdout.rewards) else {}
            folder.add_row({"step": step} | row | averages)
            log_wandb(run, row | read_means(since_mark=True), step)
            progress.write(f"update {step:,}: {describe(row)}, {row['updates_per_second']:.0f} updates/s")
        progress.set_postfix_str(describe(folder.last_row))
        means.reset()
        folder.save(agent, means, rng.get_rng_state())

    folder.open(config)
    run = start_wandb(config, folder.path)
    progress = tqdm(total=config.max_timesteps, initial=agent.n_updates, unit="update", disable=None)
    torch.set_flush_denormal(True)  # a CPU is several times slower with the tiny soft-max weights of bad actions
    try:
        with catch_signals() as received, progress:
            while True:
                step = agent.n_updates
                if means.count and evaluates(config, step):
                    record(step)
                if received:
                    if means.count:
                        read_means()  # no checkpoint of a run that diverged
                    folder.save(agent, means, rng.get_rng_state())
                    progress.write(f"signal {received[0]} at update {step:,}: saved in {folder.path}")
                    if received[0] != signal.SIGINT:
                        with contextlib.suppress(Exception):
                            run.mark_preempting()  # W&B requeues the run
                    raise SystemExit(128 + received[0])
                if step == config.max_timesteps:
                    break
                started = time.perf_counter()
                progress.update(updates())
                means.seconds += time.perf_counter() - started
                # W&B takes a step once: what is known before an evaluation must wait for it, lest a signal parts them.
                if agent.n_updates % config.log_interval == 0 and not evaluates(config, agent.n_updates):
                    log_wandb(run, read_means(since_mark=True), agent.n_updates)
                    means.set_mark()
    finally:
        torch.set_flush_denormal(False)
        folder.close()
        with contextlib.suppress(Exception):  # W&B's failures are not the run's
            run.finish(exit_code=int(folder.last_row["step"] < config.max_timesteps))
        for env in envs:
            with contextlib.suppress(Exception):
                env.close()
    print(f"{describe(folder.last_row)} after {config.max_timesteps:,} updates, in {folder.path}")
    return folder.last_row


if __name__ == "__main__":
    try:
        train(ConfigParser(TrainConfig).parse_args())
    except DataError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        advice = "not enough memory: a smaller --batch_size, --hidden_dim or --cql_n_actions helps"
        print(f"{Path(__file__).name}: {advice}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
