"""COMBO: CQL whose critics also learn from transitions that a model of the environment imagines, and are pushed down at
those states, so that the policy may leave the data where the model knows the way. MOPO and MBPO are special cases.
COMBO: https://arxiv.org/abs/2102.08363; MOPO: https://arxiv.org/abs/2005.13239; CQL: https://arxiv.org/abs/2006.04779.

    python algorithms/offline/combo.py --config_path configs/offline/combo/lunarlander-continuous/medium.yaml

returns 250.2 ± 7.4 after 5,000 updates (three seeds; a run takes 7 minutes on a CPU core) on data that return 46.5.
`--real_ratio 1` is CQL to the last bit; `--cql_alpha 0` is MBPO, and with `--mopo_penalty` above 0 MOPO.

Differs from the papers
1. The model also learns whether an episode ends, where the task's own rule is not known; imagined episodes end there.
2. Changes and rewards are standardised too, so that limits of log-variances mean the same in any units.
3. Imagined observations and rewards stay within those of the data, TD targets below what such rewards can add up to.
4. The TD loss is the squared error without 1/2, as in offline/cql.py, so cql_alpha is twice the paper's beta.

Known failures: a model of few data is believed all the same. docs/combo.md explains each option and metric.
"""

import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Optional, get_args

if "OMP_WAIT_POLICY" not in os.environ:  # else waiting threads spin so long that a busy neighbour costs most updates
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import gymnasium as gym
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
    env: str = "halfcheetah-medium-expert-v2"  # dataset: a Minari id, or a D4RL name that import_data.py imported
    eval_env: Optional[str] = None  # Gymnasium id to evaluate in; None: the dataset's own; none: no evaluation
    seed: int = 0  # seed of networks, minibatches and sampled actions
    eval_seed: int = 0  # evaluation episode i starts from seed eval_seed + i
    eval_freq: int = 5000  # updates between two evaluations
    n_episodes: int = 10  # episodes an evaluation
    max_timesteps: int = 1_000_000  # updates in all
    checkpoints_path: Optional[str] = "runs"  # folder that run folders go to
    run_id: Optional[str] = None  # name of the run folder; the same name again resumes it (default: $WANDB_RUN_ID)
    load_model: str = ""  # checkpoint.pt whose networks to start from; "" starts afresh
    keep_policies: bool = False  # keep the policy of each evaluation, as policy-<step>.pt
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
    policy_lr: float = 1e-4  # learning rate of the actor and the entropy coefficient
    qf_lr: float = 3e-4  # learning rate of the critics and alpha_prime
    soft_target_update_rate: float = 5e-3  # Polyak rate of the target critics
    target_update_period: int = 1  # updates between two target updates
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient; the coefficient itself where it is not tuned
    use_automatic_entropy_tuning: bool = True  # tune the entropy coefficient for an entropy of -A
    backup_entropy: bool = False  # subtract alpha log pi from the TD target's next value

    cql_alpha: float = 10.0  # weight of the penalty; 0 is MBPO, or MOPO
    cql_n_actions: int = 10  # actions sampled from each of the three proposals
    cql_backprop_actions: int = 0  # actions to back-propagate through, drawn by soft-max weight; 0: all, exactly
    cql_importance_sample: bool = True  # True: CQL(H); False: the plain logsumexp known as CQL(rho) in public code
    cql_temp: float = 1.0  # temperature T of T logsumexp(Q / T - log p)
    cql_max_target_backup: bool = False  # TD target: largest value of cql_n_actions next actions
    cql_clip_diff_min: float = -math.inf  # lower clip of the gap of each state
    cql_clip_diff_max: float = math.inf  # upper clip of the gap of each state
    cql_lagrange: bool = False  # tune alpha_prime, a factor on cql_alpha, for a gap of cql_target_action_gap
    cql_target_action_gap: float = -1.0  # gap that the Lagrange multiplier aims at

    real_ratio: float = 0.5  # share of a minibatch that is data, the rest is imagined; 1: CQL, without a model
    push_down_states: str = "mix"  # where the penalty pushes down: mix (the whole minibatch), model (imagined states)
    mopo_penalty: float = 0.0  # times the largest predicted standard deviation, subtracted from imagined rewards
    rollout_freq: int = 1000  # updates between two generations of imagined rollouts
    rollout_batch_size: int = 50_000  # states of the data that a generation starts from
    rollout_length: int = 5  # steps of a rollout
    rollout_actions: str = "policy"  # policy: sampled from it as it is then; uniform
    model_retain: int = 5  # generations that are kept
    termination: str = "auto"  # ends of imagined episodes: auto (the task's rule, where known), learned, or never
    dynamics_members: int = 7  # networks of the model
    dynamics_elites: int = 5  # of those, how many imagine
    dynamics_hidden_dim: int = 200  # width of their hidden layers
    dynamics_n_hidden_layers: int = 4  # hidden layers of each
    dynamics_lr: float = 1e-3  # learning rate of the model
    dynamics_max_epochs: int = 200  # passes over the data, at most; it stops where none of the members improves
    dynamics_path: str = ""  # dynamics.pt of a run on the same data, to use instead of training a model

    project: str = "CORL"  # W&B project
    group: str = "COMBO-D4RL"  # W&B group
    name: str = "COMBO"  # first part of the run's name

    def __post_init__(self):
        check_config(self)


# Shapes: B batch, E critics, N sampled actions, M members of the model, O observation, A action.
# Actions of the networks lie in [-1, 1]. The first R rows of a minibatch are data, the rest is imagined.


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
        return self.actions(as_observations(observations, self.observation_mean)).cpu().numpy()


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


class Dynamics(nn.Module):
    """p(s', r, end | s, a) of M members, each a Gaussian over the change of the observation and the reward, and the
    probability that the episode ends; a batched product a layer. Raw observations, actions in [-1, 1]."""

    decay = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # weight decay from the first layer to the last

    def __init__(self, config: TrainConfig, observation_dim: int, action_dim: int):
        super().__init__()
        n, n_out = config.dynamics_members, observation_dim + 1
        sizes = [observation_dim + action_dim]
        sizes += [config.dynamics_hidden_dim] * config.dynamics_n_hidden_layers + [2 * n_out + 1]
        weights = [torch.empty(n, *size) for size in zip(sizes, sizes[1:])]
        for weight in weights:
            std = 1 / (2 * math.sqrt(weight.shape[1]))
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(torch.zeros(n, 1, size) for size in sizes[1:])
        self.min_log_var = nn.Parameter(torch.full((n, 1, n_out), -10.0))
        self.max_log_var = nn.Parameter(torch.full((n, 1, n_out), 0.5))
        for name, size in (("input", sizes[0]), ("target", n_out)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("elites", torch.arange(config.dynamics_elites), persistent=False)
        self.to(config.device)
        decay = np.interp(np.linspace(0, 1, len(weights)), np.linspace(0, 1, len(self.decay)), self.decay)
        groups = [{"params": [x], "weight_decay": float(rate)} for x, rate in zip(self.weights, decay)]
        groups += [{"params": [*self.biases, self.min_log_var, self.max_log_var]}]
        self.learned = [x for group in groups for x in group["params"]]
        self.optimizer = torch.optim.Adam(groups, config.dynamics_lr, fused=True, capturable=self.elites.is_cuda)
        self.n_updates = 0
        self.compute_gradients = self.gradients  # or compiled

    def standardise(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Takes their means and standard deviations for its own: [T, O + A], [T, O + 1] -> the same, standardised."""
        for name, columns in (("input", inputs), ("target", targets)):
            std, mean = torch.std_mean(columns, dim=0, correction=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std <= 1e-6 * columns.abs().amax(dim=0), 1, std))
        return (inputs - self.input_mean) / self.input_std, (targets - self.target_mean) / self.target_std

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised [B, O + A], or [M, B, O + A] with a minibatch a member -> mean and log-variance of the
        standardised change and reward [M, B, O + 1], logit of the end [M, B]."""
        x = inputs.expand(len(self.min_log_var), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.silu(torch.baddbmm(bias, x, weight))
        n_out = self.min_log_var.shape[-1]
        mean, log_var, end = torch.baddbmm(self.biases[-1], x, self.weights[-1]).split([n_out, n_out, 1], dim=-1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var), end.squeeze(-1)

    def loss(self, inputs: Tensor, targets: Tensor, ends: Tensor) -> Tensor:
        """Of each member: negative log-likelihood (without factor and constants), cross-entropy of the ends, and a pull
        on the limits of the log-variances: [M, B, O + A], [M, B, O + 1], [M, B] -> [M]."""
        mean, log_var, end = self(inputs)
        likelihood = ((mean - targets).square() * (-log_var).exp() + log_var).mean(dim=(1, 2))
        cross_entropy = F.binary_cross_entropy_with_logits(end, ends, reduction="none").mean(dim=1)
        return likelihood + cross_entropy + 0.01 * (self.max_log_var - self.min_log_var).sum(dim=(1, 2))

    def gradients(self, batch: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        loss = self.loss(*batch).sum()  # members share no parameter
        return torch.autograd.grad(loss, self.learned), {"model_loss": loss.detach()}

    def variants(self) -> set[tuple]:
        return {()}

    def update(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        gradients, metrics = self.compute_gradients(batch)
        for parameter, gradient in zip(self.learned, gradients):
            parameter.grad = gradient
        self.optimizer.step()
        self.n_updates += 1
        return metrics

    @torch.no_grad()
    def step(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws next raw observations [B, O] and rewards [B], of an elite a row, drawn too; the probability of an end
        [B], and the largest norm of the members' standard deviations (raw) [B], which MOPO subtracts."""
        inputs = (torch.cat([observations, actions], dim=-1) - self.input_mean) / self.input_std
        mean, log_var, end = self(inputs)
        std, rows = (log_var / 2).exp(), torch.arange(len(actions), device=actions.device)
        member = self.elites[torch.randint(len(self.elites), rows.shape, device=rows.device)]
        sample = self.target_mean + self.target_std * torch.normal(mean[member, rows], std[member, rows])
        uncertainty = (std * self.target_std).norm(dim=-1).max(dim=0).values
        return observations + sample[:, :-1], sample[:, -1], end[member, rows].sigmoid(), uncertainty


# local: the columns that the losses take
class Batch(NamedTuple):
    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A]
    rewards: Tensor  # [B]
    next_observations: Tensor  # [B, O]
    terminals: Tensor  # [B], 1 where the episode ended in a terminal state, 0 elsewhere and at time-outs


def tanh_gaussian_log_prob(pre_tanh: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a = tanh(z), z = mean + std * noise, summed over actions: [..., A] -> [...].

    The Jacobian is exact: log(1 - tanh(z)^2) = 2 (log 2 - z - softplus(-2 z)), finite for every z.
    """
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return (log_normal - log_jacobian).sum(dim=-1)


def sample_actions(mean: Tensor, log_std: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """N actions for each state, by reparametrisation: [B, A] -> actions [B, N, A], log-densities [B, N]."""
    mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)  # [B, 1, A]
    noise = torch.randn(len(mean), n, mean.shape[-1], dtype=mean.dtype, device=mean.device)
    pre_tanh = mean + log_std.exp() * noise  # [B, N, A]
    return pre_tanh.tanh(), tanh_gaussian_log_prob(pre_tanh, noise, log_std)


# local: penalty and TD loss on data and imagined rows
class CQL(nn.Module):
    """The agent: a loss a method, then `gradients` and `update`, the algorithm. Its state_dict is its checkpoint."""

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
        self.n_real = max(1, round(config.real_ratio * config.batch_size))
        self.largest_value = math.inf  # of a TD target; WorldModel knows it
        self.to(config.device)
        self.learned = {"actor": list(self.actor.parameters()), "critic": list(self.critic.parameters())}
        self.learned |= {"alpha": [self.log_alpha], "alpha_prime": [self.log_alpha_prime]}
        rates = (config.policy_lr, config.qf_lr, config.policy_lr, config.qf_lr)
        groups = [{"params": parameters, "lr": rate} for parameters, rate in zip(self.learned.values(), rates)]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=self.log_alpha.is_cuda)  # for CUDA graphs
        self.n_updates = 0
        self.compute_gradients = self.gradients  # or compiled

    @property
    def alpha(self) -> Tensor:
        """Entropy coefficient, a constant for every loss but its own."""
        return self.config.alpha_multiplier * (self.log_alpha.detach() * self.config.use_automatic_entropy_tuning).exp()

    @property
    def penalty_weight(self) -> Tensor:
        """cql_alpha, times alpha' where it is tuned; a constant for every loss but the multiplier's own."""
        return self.config.cql_alpha * (self.log_alpha_prime.detach() * self.config.cql_lagrange).exp()

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """Raises alpha while the policy's entropy is below the target: [B] -> []."""
        return -self.log_alpha * (log_prob.detach().mean() + self.target_entropy)

    def policy_loss(self, batch: Batch, actions: Tensor, log_prob: Tensor) -> Tensor:
        """E[alpha log pi(a|s) - min Q(s, a)], a ~ pi with gradient: [B, A], [B] -> []."""
        q = self.critic(batch.observations, actions.unsqueeze(1)).squeeze(-1).min(dim=0).values  # [B]
        return (self.alpha * log_prob - q).mean()

    def data_log_prob(self, batch: Batch, mean: Tensor, log_std: Tensor) -> Tensor:
        """log pi(a_data|s), the likelihood of the data: [B, A], [B, A] -> [B]."""
        pre_tanh = batch.actions.clamp(-self.max_density_action, self.max_density_action).atanh()
        return tanh_gaussian_log_prob(pre_tanh, (pre_tanh - mean) / log_std.exp(), log_std)

    @torch.no_grad()
    def td_target(self, batch: Batch, next_actions: Tensor, next_log_prob: Tensor) -> Tensor:
        """r + gamma (1 - terminal) max_n min_e Q'(s', a'_n); N = 1 is the usual target: [B, N, A], [B, N] -> [B]."""
        next_q = self.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [B, N]
        next_q, best = next_q.max(dim=1)  # [B]
        if self.config.backup_entropy:
            next_q = next_q - self.alpha * next_log_prob.gather(1, best.unsqueeze(1)).squeeze(1)
        target = batch.rewards + self.config.discount * (1 - batch.terminals) * next_q
        return target.clamp(max=self.largest_value)

    def critic_loss(
        self, batch: Batch, td_target: Tensor, proposals: Tensor, proposal_log_prob: Tensor, n_real: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """TD loss plus alpha' cql_alpha (gap - target gap), where the gap is, for each state and clipped,
        T logsumexp_a(Q(s, a) / T - log p(a|s)) - Q(s, a_data), and the target gap is 0 without Lagrange. An imagined
        state has no action in the data, and the mean Q of the data's stands for it: so Q is pushed up at data alone.

        td_target [B]; proposals [B, 3N, A] with their log-densities [B, 3N], in the order random, next, current
        (all constants, and empty without penalty); n_real is R. Returns the loss, the mean gap of each critic [E], and
        metrics.
        """
        config, model_only = self.config, self.config.push_down_states == "model" and n_real < len(td_target)
        actions = torch.cat([batch.actions.unsqueeze(1), proposals], dim=1)  # [B, 1 + 3N, A]
        draw = config.cql_backprop_actions > 0 and proposals.shape[1] > 0
        with torch.no_grad() if draw else contextlib.nullcontext():
            q = self.critic(batch.observations, actions)  # [E, B, 1 + 3N]
            # Importance sampling estimates the log-integral over all actions; without it the data's action joins.
            temperature, skipped = config.cql_temp, int(config.cql_importance_sample)
            scores = q[..., skipped:] / temperature
            if config.cql_importance_sample:
                scores = scores - proposal_log_prob
            log_sum = temperature * scores.logsumexp(dim=-1)  # [E, B]
        q_taken = q[..., 0]
        if draw:
            q_taken, log_sum = self.redraw(batch, actions[:, skipped:], scores, log_sum)
        q_data = q_taken[:, :n_real]
        # What each state's log-sum is compared with: [E, B].
        q_up = torch.cat([q_data, q_data.mean(dim=1, keepdim=True).expand(-1, len(td_target) - n_real)], dim=1)
        state_gap = (log_sum - q_up)[:, n_real if model_only else 0 :]

        td_loss = (q_taken - td_target).square().mean(dim=1)  # [E]
        metrics = per_critic("qf{}_loss", td_loss) | per_critic("average_qf{}", q_data.mean(dim=1))
        metrics["average_target_q"] = td_target.mean()
        if not proposals.shape[1]:
            return td_loss.sum(), torch.zeros_like(td_loss), metrics
        gap = state_gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max).mean(dim=1)  # [E]
        target_gap = config.cql_target_action_gap if config.cql_lagrange else 0.0
        penalty = self.penalty_weight * (gap - target_gap)  # [E]
        metrics |= per_critic("cql_qf{}_diff", gap) | per_critic("cql_min_qf{}_loss", penalty)
        policy_q = q[:, -state_gap.shape[1] :, -config.cql_n_actions :]  # of the states that are pushed down
        metrics["combo_regulariser"] = policy_q.mean() - q_data.mean()
        return (td_loss + penalty).sum(), gap.detach(), metrics | self.penalty_metrics(q, scores, state_gap)

    def redraw(self, batch: Batch, actions: Tensor, scores: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """The same with a cheaper gradient of the same expectation: that of T logsumexp(scores) is the mean of the
        gradients of Q under the soft-max of the scores, so k actions are drawn by it for each state and critic.

        actions [B, K, A], scores [E, B, K], log_sum [E, B] -> Q of the actions taken [E, B], log_sum [E, B].
        """
        n_critics, batch_size, n_actions = scores.shape
        k = self.config.cql_backprop_actions
        uniform = torch.rand(n_critics, batch_size, k, dtype=scores.dtype, device=scores.device)
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniform).clamp(max=n_actions - 1)  # [E, B, k]
        drawn = drawn.unsqueeze(-1).expand(-1, -1, -1, actions.shape[-1])
        actions = actions.expand(n_critics, -1, -1, -1).gather(2, drawn)  # [E, B, k, A]
        taken = batch.actions.unsqueeze(1).expand(n_critics, -1, -1, -1)
        q = self.critic(batch.observations, torch.cat([taken, actions], dim=2))  # [E, B, 1 + k]
        q_drawn = q[..., 1:].mean(dim=-1)
        return q[..., 0], log_sum + (q_drawn - q_drawn.detach())

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
    def propose(self, batch: Batch, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples actions; returns the TD target [B], and proposals [B, 3N, A] with their log-densities [B, 3N].

        mean and log_std [2B, A] are the actor's at the observations and at the next observations. The next actions
        serve twice: in the target, and as proposals at s, with the density that they have at s' (as in the authors'
        code).
        """
        config, (batch_size, action_dim) = self.config, batch.actions.shape
        n = config.cql_n_actions if config.cql_alpha > 0 or config.cql_max_target_backup else 1
        actions, log_prob = sample_actions(mean, log_std, n)
        current_actions, next_actions = actions.split(batch_size)
        current_log_prob, next_log_prob = log_prob.split(batch_size)
        n_backup = None if config.cql_max_target_backup else 1
        td_target = self.td_target(batch, next_actions[:, :n_backup], next_log_prob[:, :n_backup])
        if config.cql_alpha == 0:
            return td_target, actions.new_empty(batch_size, 0, action_dim), log_prob.new_empty(batch_size, 0)
        random_actions = torch.empty_like(current_actions).uniform_(-1, 1)
        random_log_prob = torch.full_like(current_log_prob, -action_dim * math.log(2))
        proposals = torch.cat([random_actions, next_actions, current_actions], dim=1)
        return td_target, proposals, torch.cat([random_log_prob, next_log_prob, current_log_prob], dim=1)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss of each group of parameters, all at the same parameters, and metrics."""
        config, batch_size = self.config, len(batch.rewards)
        mean, log_std = self.actor(torch.cat([batch.observations, batch.next_observations]))  # [2B, A]
        proposed = self.propose(batch, mean, log_std)
        actions, log_prob = (x.squeeze(1) for x in sample_actions(mean[:batch_size], log_std[:batch_size], 1))
        critic_loss, gap, metrics = self.critic_loss(batch, *proposed, self.n_real)
        policy_loss = self.policy_loss(batch, actions, log_prob)
        metrics |= {"policy_loss": policy_loss, "log_pi": log_prob.mean(), "alpha": self.alpha}
        losses = {"actor": policy_loss, "critic": critic_loss}
        if config.use_automatic_entropy_tuning:
            metrics["alpha_loss"] = losses["alpha"] = self.alpha_loss(log_prob)
        if config.cql_lagrange:
            metrics["alpha_prime"] = self.log_alpha_prime.exp()
            metrics["alpha_prime_loss"] = losses["alpha_prime"] = self.alpha_prime_loss(gap)
        return losses, metrics

    def gradients(self, batch: Batch) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
        """Gradients of each group's loss in its own parameters alone, and metrics. It changes nothing."""
        losses, metrics = self.losses(batch)
        gradients = {name: torch.autograd.grad(loss, self.learned[name]) for name, loss in losses.items()}
        for name, metric in (("actor", "policy_grad_norm"), ("critic", "critic_grad_norm")):
            metrics[metric] = nn.utils.get_total_norm(gradients[name])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def variants(self) -> set[tuple]:
        """What else `gradients` will be called with, beside a batch."""
        return {()}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A step of the policy, the critics, alpha and alpha', then of the target critics."""
        gradients, metrics = self.compute_gradients(batch)
        for name, values in gradients.items():
            for parameter, gradient in zip(self.learned[name], values):
                parameter.grad = gradient
        self.optimizer.step()
        self.log_alpha_prime.data.clamp_(max=self.max_log_alpha_prime)
        self.n_updates += 1
        if self.n_updates % self.config.target_update_period == 0:
            with torch.no_grad():
                targets, sources = list(self.target_critic.parameters()), list(self.critic.parameters())
                torch._foreach_lerp_(targets, sources, self.config.soft_target_update_rate)
        return metrics

    @torch.no_grad()
    def start_values(self, observations: np.ndarray) -> np.ndarray:
        """What the critics promise: min Q(s, pi(s)) with the deterministic action, for raw observations [B, O]."""
        observations = as_observations(observations, self.actor.observation_mean)
        observations = (observations - self.actor.observation_mean) / self.actor.observation_std
        values = self.critic(observations, self.actor(observations)[0].tanh().unsqueeze(1)).min(dim=0).values
        return values.squeeze(1).cpu().numpy()

    @torch.no_grad()
    def holdout_metrics(self, batch: Batch) -> dict[str, float]:
        """Likelihood, TD error, gap and data Q on transitions that are not trained on."""
        mean, log_std = self.actor(torch.cat([batch.observations, batch.next_observations]))
        log_prob = self.data_log_prob(batch, *(x[: len(batch.rewards)] for x in (mean, log_std)))
        _, gap, metrics = self.critic_loss(batch, *self.propose(batch, mean, log_std), len(batch.rewards))
        result = {"holdout_td_error": (metrics["qf1_loss"] + metrics["qf2_loss"]) / 2, "holdout_gap": gap.mean()}
        result["holdout_q"] = (metrics["average_qf1"] + metrics["average_qf2"]) / 2
        result["holdout_log_prob"] = log_prob.mean()
        return {name: value.item() for name, value in result.items()}

    def get_extra_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()["state"], "n_updates": self.n_updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.n_updates = state["n_updates"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})


def per_critic(name: str, values: Tensor) -> dict[str, Tensor]:
    return {name.format(i + 1): value for i, value in enumerate(values)}


def never(observations: Tensor) -> Tensor:
    return torch.zeros(len(observations), dtype=torch.bool, device=observations.device)


# Whether an episode of the task ends in a raw observation [B, O], as its environment has it.
ENDS = {
    "ant": lambda s: ~((s[:, 0] >= 0.2) & (s[:, 0] <= 1.0)),
    "hopper": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "humanoid": lambda s: ~((s[:, 0] > 1.0) & (s[:, 0] < 2.0)),
    "walker2d": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2.0) & (s[:, 1].abs() < 1.0)),
}


class WorldModel:
    """A model of the environment, and the transitions that it imagines: generations of rollouts from states of the data
    with the policy as it is then. dynamics.pt in the run folder holds the model."""

    patience, min_improvement = 5, 0.01  # epochs without a member whose held-out error falls by this share
    chunk = 10_000  # rollouts at once, for the memory

    def __init__(self, config: TrainConfig, task: Any, agent: CQL, buffer: Any, run: Any):
        """buffer: the data's. Raises ConfigError and DataError."""
        self.config, self.agent, self.buffer, self.run = config, agent, buffer, run
        self.generations, self.metrics, self.state = [], {}, {}  # state: all of the model that a resume needs
        self.seconds = {"model": 0.0, "rollout": 0.0, "update": 0.0}
        self.n_imagined = config.batch_size - agent.n_real
        if config.push_down_states == "model" and not self.n_imagined:
            raise ConfigError("--push_down_states model needs imagined states: a smaller --real_ratio")
        if config.dynamics_elites > config.dynamics_members:
            raise ConfigError(f"--dynamics_elites {config.dynamics_elites} of {config.dynamics_members} members")
        if not self.n_imagined:
            return
        batch, device = Batch(*buffer.columns), config.device
        self.mean, self.std = agent.actor.observation_mean, agent.actor.observation_std
        observations, following = (x * self.std + self.mean for x in (batch.observations, batch.next_observations))
        inputs = torch.cat([observations, batch.actions], dim=1)
        targets = torch.cat([following - observations, batch.rewards.unsqueeze(1)], dim=1)
        with seeded(config, 0):  # the first weights, and what is held out
            self.dynamics = Dynamics(config, *(x.shape[1] for x in batch[:2]))
            order = torch.randperm(buffer.size, device=device)
        self.columns = self.dynamics.standardise(inputs, targets) + (batch.terminals,)
        n_held_out = max(1, min(buffer.size // 5, 5000))
        self.held_out, rest = order[:n_held_out].clone(), order[n_held_out:]  # a view would be stored whole
        with seeded(config, 1):  # a bootstrap sample a member
            self.resampled = rest[torch.randint(len(rest), (config.dynamics_members, len(rest)), device=device)]
        (self.low, self.high), self.reward_range = following.aminmax(dim=0), batch.rewards.aminmax()
        agent.largest_value = max(0.0, self.reward_range[1].item()) / max(1 - config.discount, 1e-9)
        self.ends = self.choose_ends(f"{config.env} {task.arguments['id']}".lower(), following, batch.terminals)
        self.slot_size = config.rollout_batch_size * config.rollout_length  # most rows of a generation
        self.rings = [x.new_zeros(config.model_retain * self.slot_size, *x.shape[1:]) for x in batch]
        self.counts = torch.zeros(config.model_retain, dtype=torch.float64, device=device)
        self.best = copy.deepcopy(self.dynamics.state_dict())
        data = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in batch)).hexdigest()
        self.status = {"data": data, "epoch": 0, "stale": 0, "over": False, "errors": [math.inf] * len(self.resampled)}
        self.keep()
        if run.resumed or config.dynamics_path:
            self.restore()

    def choose_ends(self, names: str, observations: Tensor, terminals: Tensor) -> Optional[Callable]:
        """The task's rule where it is known and right on the data; None: what the model learns."""
        name, kind = next((x for x in ENDS if re.search(rf"\b{x}\b", names)), ""), self.config.termination
        rule = ENDS.get(name, never)
        right = (rule(observations) == terminals.bool()).float()
        agreement = min(right[terminals == x].mean().item() for x in terminals.unique()) * bool(name)
        if kind == "auto":
            kind = name if agreement >= 0.999 else "learned" if terminals.any() else "never"
        print(f"ends of imagined episodes: {kind}" + f" (the rule of {name} is right in {agreement:.1%})" * bool(name))
        return {"learned": None, "never": never}.get(kind, rule)

    def keep(self) -> None:
        """Copies what goes on with the next epoch, so that a signal in the midst of one does no harm."""
        state = {"status": self.status, "best": self.best, "held_out": self.held_out}
        if not self.status["over"]:
            state |= {"now": self.dynamics.state_dict(), "optimizer": self.dynamics.optimizer.state_dict()["state"]}
        self.state = copy.deepcopy(state)

    def restore(self) -> None:
        """From the run's checkpoint, else from dynamics_path. Raises DataError."""
        run, path = self.run, self.run.source if self.run.resumed else self.config.dynamics_path
        with blame(f"{path} holds no model of these data and sizes; --dynamics_path takes a run's dynamics.pt"):
            state = run.start["model"] if run.resumed else load(path, self.config.device)
            if state["status"]["data"] != self.status["data"]:
                raise ValueError("it learned from other transitions, rewards or held-out episodes")
            self.dynamics.load_state_dict(state["best"])
            if "now" in state:
                self.dynamics.load_state_dict(state["now"])
                moments = self.dynamics.optimizer.state_dict() | {"state": state["optimizer"]}
                self.dynamics.optimizer.load_state_dict(moments)
            self.status, self.best, self.held_out = (state[x] for x in ("status", "best", "held_out"))
        self.keep()

    def sample_transitions(self, batch_size: int) -> tuple[Tensor, ...]:
        """A minibatch for each member, from its own bootstrap sample."""
        places = torch.randint(self.resampled.shape[1], (len(self.resampled), batch_size), device=self.resampled.device)
        rows = self.resampled.gather(1, places)  # [M, B]
        return tuple(column[rows] for column in self.columns)

    def learn(self, save_run: Callable, stop: Any) -> None:
        """Trains the model until no member gets better on held-out transitions; each keeps its best weights."""
        if not self.n_imagined:
            return
        config, dynamics, status, started = self.config, self.dynamics, self.status, time.perf_counter()
        bar = tqdm(total=config.dynamics_max_epochs, initial=status["epoch"], unit="epoch", disable=None)
        if not status["over"]:
            advance = updater(config, dynamics, types.SimpleNamespace(sample=self.sample_transitions))
        while not status["over"] and not stop:
            with seeded(config, 2, status["epoch"]):  # minibatches
                left = math.ceil(self.resampled.shape[1] / config.batch_size)
                while left and not stop:
                    left -= advance(left)
            if not left:
                self.judge()
                self.keep()
                save_run(0)
                if bar.disable and status["epoch"] == 1:
                    print(f"model: {time.perf_counter() - started:.0f} s an epoch, at most {bar.total}", flush=True)
                bar.update()
                bar.set_postfix_str(f"held-out error {min(status['errors']):.4g}")
        bar.close()
        if stop:
            return
        dynamics.load_state_dict(self.best)
        dynamics.elites.copy_(torch.tensor(status["errors"]).argsort()[: len(dynamics.elites)])
        if not (self.run.resumed and (self.run.path / "dynamics.pt").exists()):
            save(self.run.path / "dynamics.pt", self.state)
        self.seconds["model"], self.metrics = time.perf_counter() - started, self.describe_dynamics()
        errors = ", ".join(f"{x:.3g}" for x in status["errors"])
        print(f"model: {status['epoch']} epochs, {self.seconds['model']:.0f} s, held-out errors {errors}")
        print(", ".join(f"{name} {value:.3g}" for name, value in self.metrics.items()))

    @torch.no_grad()
    def judge(self) -> None:
        """After an epoch: keeps the weights of the members whose held-out error [M] fell."""
        inputs, targets, _ = (column[self.held_out] for column in self.columns)
        errors, status = (self.dynamics(inputs)[0] - targets).square().mean(dim=(1, 2)), self.status
        best = torch.tensor(status["errors"], device=errors.device)
        better = errors < best * (1 - self.min_improvement)
        for name, parameter in self.dynamics.named_parameters():
            self.best[name][better] = parameter[better]
        status["errors"] = torch.where(better, errors, best).tolist()
        status["epoch"], status["stale"] = status["epoch"] + 1, 0 if better.any() else status["stale"] + 1
        status["over"] = status["stale"] == self.patience or status["epoch"] == self.config.dynamics_max_epochs
        if not math.isfinite(min(status["errors"])):
            raise DataError("training diverged: the model's held-out error is no number; try a smaller --dynamics_lr")

    @torch.no_grad()
    def describe_dynamics(self) -> dict[str, float]:
        """Of the elites on held-out transitions: error, R^2, share of targets in the 90 % interval, and how often ends
        are foreseen, and that there is none (mean of both shares), by more than the average probability."""
        inputs, targets, ends = (column[self.held_out] for column in self.columns)
        mean, log_var, end = (x[self.dynamics.elites] for x in self.dynamics(inputs))
        errors = (mean - targets).square()  # [elites, held out, O + 1]
        parts = [(errors[..., i].mean(), targets[:, i].var(correction=0).clamp(min=1e-6)) for i in (slice(-1), -1)]
        result = {"model_error": errors.mean().item()}
        result["model_r2_observation"], result["model_r2_reward"] = (1 - (x / y).item() for x, y in parts)
        result["model_coverage"] = (errors.sqrt() <= 1.6449 * (log_var / 2).exp()).float().mean().item()
        if self.ends is None:
            average = self.columns[2].mean().clamp(1e-4, 0.5)  # where no transition ends, or nearly all do
            foreseen = ((end.sigmoid() > average) == ends.bool()).float().mean(dim=0)
            shares = [foreseen[ends == kind].mean().item() for kind in ends.unique()]
            result["model_end_accuracy"] = sum(shares) / len(shares)
        return result

    @torch.no_grad()
    def imagine(self, observations: Tensor, actor: TanhGaussianActor) -> Batch:
        """Rollouts from normalised observations [B, O]; those that end go no further."""
        config, parts = self.config, []
        for _ in range(config.rollout_length):
            actions = sample_actions(*actor(observations), 1)[0].squeeze(1)
            if config.rollout_actions == "uniform":
                actions.uniform_(-1, 1)
            following, rewards, end, uncertainty = self.dynamics.step(observations * self.std + self.mean, actions)
            ended = torch.rand_like(end) < end if self.ends is None else self.ends(following)
            rewards = rewards.clamp(*self.reward_range) - config.mopo_penalty * uncertainty
            following = (following.clamp(self.low, self.high) - self.mean) / self.std
            parts.append(Batch(observations, actions, rewards, following, ended.float()))
            observations = following[~ended]
        return Batch(*map(torch.cat, zip(*parts)))

    def generate(self, step: int, weights: Optional[dict[str, Tensor]] = None) -> float:
        """A generation of rollouts takes the place of the oldest. It follows from the policy's weights (or those of
        now), the step and the seed: a resumed run imagines the same again. Returns the seconds that it took."""
        if not self.n_imagined:
            return 0.0
        self.counts.sum().item()  # waits for the device's updates, which are no part of this time
        started, config, actor = time.perf_counter(), self.config, copy.deepcopy(self.agent.actor)
        actor.load_state_dict(weights or actor.state_dict())
        self.generations = [*self.generations, {"step": step, "weights": actor.state_dict()}][-config.model_retain :]
        with seeded(config, 3, step):  # first states, actions, transitions
            rows = torch.randint(self.buffer.size, (config.rollout_batch_size,), device=self.counts.device)
            parts = [self.imagine(self.buffer.columns[0][part], actor) for part in rows.split(self.chunk)]
        slot, n = step // config.rollout_freq % config.model_retain, sum(len(x.rewards) for x in parts)
        for ring, column in zip(self.rings, zip(*parts)):
            ring[slot * self.slot_size : slot * self.slot_size + n] = torch.cat(column)
        self.counts[slot] = n
        self.metrics["rollout_length"] = n / config.rollout_batch_size
        self.metrics["rollout_reward"] = torch.cat([x.rewards for x in parts]).mean().item()
        seconds = time.perf_counter() - started
        self.seconds["rollout"] += seconds
        return seconds

    def time_shares(self) -> dict[str, float]:
        return {f"{name}_time_share": x / sum(self.seconds.values()) for name, x in self.seconds.items()}

    def sample(self, batch_size: int) -> Batch:
        """First the data's rows, then imagined ones."""
        if not self.n_imagined:
            return self.buffer.sample(batch_size)
        place = torch.rand(self.n_imagined, dtype=torch.float64, device=self.counts.device) * self.counts.sum()
        edges = self.counts.cumsum(dim=0)
        slot = torch.searchsorted(edges, place, right=True).clamp(max=len(edges) - 1)
        rows = slot * self.slot_size + (place - (edges - self.counts)[slot]).long()
        real = self.buffer.sample(self.agent.n_real)
        return Batch(*[torch.cat([x, ring[rows]]) for x, ring in zip(real, self.rings)])


@contextlib.contextmanager
def seeded(config: Any, *numbers: int) -> Iterator[None]:
    """Random numbers inside follow from the seed and these numbers, and those outside do not notice."""
    with torch.random.fork_rng([config.device] if "cuda" in config.device else []):
        torch.manual_seed(int(np.random.SeedSequence([config.seed, *numbers]).generate_state(1)[0]))
        yield


# Common to all files from here on: configuration, data, evaluation, run folder.


class DataError(ValueError):
    status = 1  # exit status of the program for data and files that cannot be used


class ConfigError(DataError):
    status = 2  # and for options


@contextlib.contextmanager
def blame(cause: str, kind: type = DataError) -> Iterator[None]:
    """Whatever fails inside is told in one line: the cause, and what was raised."""
    try:
        yield
    except Exception as error:
        detail, kind = str(error)[:200] or type(error).__name__, type(error) if isinstance(error, DataError) else kind
        raise kind(f"{cause} ({detail})") from error


COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
MAX_ENVS, MAX_STEPS = 16, 30_000  # evaluation episodes side by side; steps of one, where a policy stands still
GRAPH_UPDATES = 10  # in a CUDA graph
# local: the network that acts, and that policy.pt holds
Policy = TanhGaussianActor
# local: limits of the options, both ends included, or the words that one takes
LIMITS = {
    "seed eval_seed cql_backprop_actions policy_lr qf_lr cql_alpha alpha_multiplier": (0, 1e12),
    "max_timesteps eval_freq n_episodes batch_size buffer_size log_interval": (1, 1e12),
    "target_update_period cql_n_actions hidden_dim policy_n_hidden_layers q_n_hidden_layers": (1, 1e6),
    "reward_scale reward_bias policy_log_std_multiplier cql_target_action_gap": (-1e12, 1e12),
    "discount soft_target_update_rate": (0, 1),
    "real_ratio": (1e-6, 1),
    "rollout_freq rollout_batch_size rollout_length model_retain dynamics_max_epochs": (1, 1e12),
    "dynamics_members dynamics_elites dynamics_hidden_dim dynamics_n_hidden_layers": (1, 1e6),
    "mopo_penalty dynamics_lr": (0, 1e12),
    "push_down_states": ("mix", "model"),
    "rollout_actions": ("policy", "uniform"),
    "termination": ("auto", "learned", "never"),
    "holdout_fraction": (0, 0.9),
    "reward_clip cql_temp": (1e-6, math.inf),
    "cql_clip_diff_min": (-math.inf, 1e12),
    "cql_clip_diff_max": (-1e12, math.inf),
    "precision": ("float32", "tf32", "bfloat16"),
}


def check_config(config: Any) -> None:
    """Fills in what depends on the machine. Raises ConfigError for a value out of its limits."""
    config.checkpoints_path = config.checkpoints_path or "runs"
    config.run_id = config.run_id or os.environ.get("WANDB_RUN_ID") or None
    for names, limits in LIMITS.items():
        for name in names.split():
            value, words = getattr(config, name), isinstance(limits[0], str)
            if value not in limits if words else value is not None and not limits[0] <= value <= limits[1]:
                takes = ", ".join(limits) if words else f"a number from {limits[0]:g} to {limits[1]:g}"
                raise ConfigError(f"--{name} takes {takes}, not {value}")
    with blame(f"--device {config.device} cannot be used here; try --device cpu", ConfigError):
        torch.empty(0, device=config.device)


def convert(name: str, text: str, kind: Any) -> Any:
    """An option's value from its text on the command line or in YAML. Raises ConfigError where it is none."""
    kind, optional = (get_args(kind) or (kind, None))[0], bool(get_args(kind))
    if optional and text in ("None", "null", "~", ""):
        return None
    with contextlib.suppress(AttributeError, KeyError, OverflowError, ValueError):  # argparse makes a list of --
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = text.encode().decode() if kind is str else float(text.replace(".inf", "inf"))
        if kind(value) == value:
            return kind(value)
    takes = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}[kind]
    raise ConfigError(f"--{name} takes {takes}{' or None' * optional}, not {text[:100]!r}")


def parse_arguments(config_class: type) -> Any:
    """The configuration of the command line, and of the YAML file that --config_path names: pyrallis without its silent
    conversions (`--flag=maybe` to True, `--seed=1.9` to 1, `--see` to --seed). Raises ConfigError."""

    def fail(message: str) -> None:
        raise ConfigError(f"{message} (as --option=value); --help lists the options")

    kinds = {field.name: field.type for field in fields(config_class)}
    getsource, inspect.getsource = inspect.getsource, functools.cache(inspect.getsource)  # else read for each option
    parser = pyrallis.argparsing.ArgumentParser(config_class=config_class, allow_abbrev=False)
    inspect.getsource = getsource
    parser.error, parser._postprocessing = fail, vars
    for action in parser._actions:
        if kind := kinds.get(action.dest):
            action.type, action.metavar = str, str(getattr(kind, "__name__", kind)).replace("typing.", "")
    options = parser.parse_args()
    if path := options.pop("config_path", None):
        with blame(f"--config_path {path} is no YAML of lines `option: value`", ConfigError):
            content = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader)  # texts, as on the command line
            options = parser.parse_args([f"--{name}=" + value for name, value in content.items()]) | options
    return config_class(**{name: convert(name, text, kinds[name]) for name, text in options.items()})


def flatten(observations: Any, space: gym.Space) -> np.ndarray:
    """A float32 vector an observation, [N, ...] -> [N, O]: parts of Dict ones (goal environments) in sorted order of
    keys and without texts, Discrete ones one-hot. Raises DataError for other kinds, and for images."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(observations[key], part) for key, part in sorted(space.items())], axis=-1)
    if isinstance(space, gym.spaces.Discrete):
        return (np.asarray(observations)[..., None] == space.start + np.arange(space.n)).astype(np.float32)
    if isinstance(space, gym.spaces.Text):
        return np.empty((len(observations), 0), dtype=np.float32)
    if not space.shape or len(space.shape) > 1 and math.prod(space.shape) > 1024:
        raise DataError(f"observations are {space}; this script takes vectors, small grids, and Dicts of them")
    return np.asarray(observations, dtype=np.float32).reshape(len(observations), -1)


def load_dataset(name: str) -> dict[str, Any]:
    """The transitions of a Minari dataset, local or else downloaded, in order; a name of D4RL stands for d4rl/<name>.
    It is the one function to replace for other data. Raises DataError.

    observations [T, O], actions [T, A] in the environment's units, rewards [T], next_observations [T, O], and the flags
    terminals [T] (the next state is terminal) and timeouts [T] (the episode ends here all the same). Optional:
    action_low, action_high [A], reference_scores [2] (returns that score 0 and 100), environment (what gym.make takes).
    """
    path = minari.storage.get_dataset_path(name)
    if "/" not in name and not path.exists():
        name, path = f"d4rl/{name}", path.parent / "d4rl" / name
    with blame(f"--env {name} cannot be read from {path}; `minari list local` lists others"):
        if not path.exists() and name.startswith("d4rl/"):
            raise FileNotFoundError(f"import it by: python benchmarks/import_data.py {name[5:]}")
        if not path.exists():
            hub = importlib.import_module("huggingface_hub")  # whose client would try to connect for 23 seconds
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
            minari.download_dataset(name)
        # Where spaces are missing Minari makes the environment, by an entry point that could name any code.
        if not {"observation_space", "action_space"} <= json.loads((path / "data/metadata.json").read_text()).keys():
            raise KeyError("its metadata lacks the spaces")
        dataset, parts = minari.load_dataset(name), []
        data = action_bounds(dataset.action_space, f"--env {name}")
        for episode in dataset.iterate_episodes():
            observations, n = flatten(episode.observations, dataset.observation_space), len(episode.rewards)
            # The next observation is known at time-outs too, so that they bootstrap.
            timeouts = (episode.truncations | (np.arange(n) == n - 1)) & ~episode.terminations
            actions, rewards = np.float32(episode.actions).reshape(n, -1), np.float32(episode.rewards)
            parts.append((observations[:-1], actions, rewards, observations[1:], episode.terminations, timeouts))
        data |= dict(zip(COLUMNS, map(np.concatenate, zip(*parts))))
    scores = [dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    if None not in scores:
        data["reference_scores"] = np.array(scores)
    if spec := dataset._eval_env_spec or dataset.env_spec:  # an entry point in it is ignored: it could be any code
        spec.kwargs.pop("render_mode", None)  # the recording may have had a window
        data["environment"] = {"id": spec.id, "max_episode_steps": spec.max_episode_steps, **spec.kwargs}
    return data


def check_dataset(data: dict[str, Any], config: Any) -> None:
    """Makes its columns float32, and flags bool. Raises DataError for data that cannot be trained on."""
    n = len(data.get("rewards", ()))
    for key in COLUMNS:
        column = np.asarray(data.get(key, ()), dtype=np.float32)
        if column.ndim != 1 + key.endswith(("observations", "actions")) or len(column) != n or not column.size:
            raise DataError(f"--env {config.env}: {key} have shape {list(column.shape)}, with {n} transitions")
        if (bad := ~(np.abs(column) < 1e15)).any():
            fault = f"NaN, infinity or huge numbers, first in transition {np.argwhere(bad)[0, 0]}"
            raise DataError(f"--env {config.env}: {key} hold {fault}")
        data[key] = column.astype(bool) if key in ("terminals", "timeouts") else column
    if n > config.buffer_size:
        raise ConfigError(f"--buffer_size {config.buffer_size} is less than the data's {n} transitions")


def episodes(data: dict[str, Any], discount: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each transition the number of its episode and the discounted return from there, [T]; and the return of each
    episode, but for a last one that is cut short."""
    ends, to_go, following = data["terminals"] | data["timeouts"], [], 0.0
    numbers = np.append(0, ends.cumsum()[:-1])
    for reward, end in zip(data["rewards"][::-1].tolist(), ends[::-1].tolist()):
        following = reward + discount * following * (not end)
        to_go.append(following)
    returns, lengths = np.bincount(numbers, weights=data["rewards"]), np.bincount(numbers)
    cut_short = not data["terminals"][-1] and lengths[-1] < lengths.max()
    return numbers, np.array(to_go[::-1]), returns[: len(returns) - cut_short]


# local: continuous actions
def action_bounds(space: gym.Space, name: str) -> dict[str, Any]:
    """Lowest and highest action. Raises DataError."""
    if not isinstance(space, gym.spaces.Box):
        raise DataError(f"{name} has actions {space}, this script takes Box ones; see algorithms/discrete/cql_dqn.py")
    return {"action_low": space.low.ravel(), "action_high": space.high.ravel()}


# local: continuous actions
def encode_actions(data: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the box of action_low and action_high (-1 and 1 where not known) to [-1, 1]; and the box, [A]. Raises
    DataError for actions outside by more than 1e-3 of the range; others are clipped."""
    actions, size = data["actions"], data["actions"].shape[1:]
    low, high = (np.broadcast_to(data.get(key, x), size) for key, x in (("action_low", -1.0), ("action_high", 1.0)))
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise DataError(f"--env {name}: actions need finite bounds, not {low} to {high}")
    scaled = (actions.astype(np.float64) - low) * (2 / (high.astype(np.float64) - low)) - 1
    if np.abs(scaled).max() > 1 + 2e-3:
        raise DataError(f"--env {name}: actions from {actions.min()} to {actions.max()} are outside {low} to {high}")
    return scaled.clip(-1, 1).astype(np.float32), low, high


def linear_layers(sizes: list[int], orthogonal: bool) -> list[nn.Linear]:
    """Layers from size to size; the last starts near zero, so that first values and action means do."""
    layers = [nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:])]
    for layer in layers[:-1] if orthogonal else ():
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
        nn.init.zeros_(layer.bias)
    init_last = nn.init.orthogonal_ if orthogonal else nn.init.xavier_uniform_
    init_last(layers[-1].weight, gain=1e-2)
    nn.init.zeros_(layers[-1].bias)
    return layers


class ReplayBuffer:
    """All transitions, on the device; memory of the CPU is shared with the arrays."""

    def __init__(self, data: dict[str, np.ndarray], device: str):
        kinds = {torch.int64: torch.int64}  # indices of discrete actions
        columns = [torch.as_tensor(data[key]) for key in Batch._fields]
        self.columns = [column.to(device, kinds.get(column.dtype, torch.float32)) for column in columns]
        self.size = len(columns[0])

    def rows(self, indices: Any) -> Batch:
        return Batch(*[column[indices] for column in self.columns])

    def sample(self, batch_size: int) -> Batch:
        return self.rows(torch.randint(self.size, (batch_size,), device=self.columns[0].device))


class Task:
    """The rewards to train on, and the environments to evaluate in (None without a simulator)."""

    def __init__(self, config: Any, data: dict[str, Any]):
        """Takes the bounds of actions from the environment, where there is one. Raises ConfigError or DataError."""
        check_dataset(data, config)
        self.config, self.reference = config, data.get("reference_scores")
        self.arguments = {"id": config.eval_env} if config.eval_env else data.get("environment", {"id": "none"})
        n_envs = math.ceil(config.n_episodes / math.ceil(config.n_episodes / MAX_ENVS))
        self.envs = make_environments(config, n_envs, **self.arguments)
        self.factor, self.offset = (config.reward_scale, config.reward_bias) if config.normalize_reward else (1.0, 0.0)
        name = f"{config.env} {self.arguments['id']}".lower()
        if (
            config.normalize_reward
            and config.env != "none"
            and any(task in name for task in ("halfcheetah", "hopper", "walker2d"))
        ):
            with blame(f"--normalize_reward: all episodes of {config.env} have the same return"):
                self.factor *= 1000 / float(np.ptp(episodes(data)[2]))
        # A hundred times the largest possible return: conservative values may well be below any return.
        largest_reward = max(1.0, float(np.abs(self.training_rewards(data["rewards"])).max()))
        self.value_limit = 100 * largest_reward / max(1 - config.discount, 1e-4)
        if self.envs:
            data |= action_bounds(self.envs.single_action_space, self.envs.spec.id)
            start = flatten(self.envs.observation_space.sample(), self.envs.single_observation_space)
            own, sizes = [data[x].shape[1] for x in COLUMNS[:2]], [start.shape[1], data["action_low"].size]
            if own != sizes:
                raise DataError(f"{config.env} has sizes {own} of observation and action, {self.envs.spec.id} {sizes}")

    def training_rewards(self, rewards: np.ndarray) -> np.ndarray:
        return np.clip(rewards * self.factor + self.offset, -self.config.reward_clip, self.config.reward_clip)

    def score(self, returns: np.ndarray) -> dict[str, Optional[float]]:
        """Of episodes; the score is 0 and 100 at the reference returns, where those are known."""
        mean, std, score = float(returns.mean()), float(returns.std()), None
        if self.reference is not None:
            score = float(100 * (mean - self.reference[0]) / (self.reference[1] - self.reference[0]))
        return {"eval_return": mean, "eval_return_std": std, "d4rl_normalized_score": score}

    def check(self, metrics: dict[str, Any], agent: Any) -> dict[str, Any]:
        """The metrics. Raises DataError for what is no finite number, and for mean values beyond any possible one."""
        norm = nn.utils.get_total_norm(agent.parameters()).item()
        for name, value in (metrics | {"the norm of all weights": norm}).items():
            limit = self.value_limit if name.startswith(("average_", "eval_predicted")) else sys.float_info.max
            if value is not None and not abs(value) <= limit:
                place = f"{name} is {value:.4g} at update {agent.n_updates:,}; what was saved before is intact"
                raise DataError(f"training diverged: {place}; try smaller learning rates or a larger cql_alpha")
        return metrics

    def rollout(self, policy: Callable, stop: Any = ()) -> dict[str, np.ndarray]:
        """One episode from each reset seed eval_seed + i, as many side by side as there are environments.

        Returns arrays over the n_episodes: start observation, return, length, discounted return of the training
        rewards, and success where the environment reports it; cut short once `stop` holds a signal.
        """
        envs, discount, starts = self.envs, self.config.discount, []
        waves = np.arange(math.ceil(self.config.n_episodes / envs.num_envs) * envs.num_envs).reshape(-1, envs.num_envs)
        result = {key: np.zeros(waves.shape) for key in ("return", "length", "discounted_return")}
        for i, numbers in enumerate(waves):
            observations, running = envs.reset(seed=(self.config.eval_seed + numbers).tolist())[0], True
            starts.append(flatten(observations, envs.single_observation_space))
            while np.any(running) and result["length"][i].max() < MAX_STEPS and not stop:
                actions = policy(flatten(observations, envs.single_observation_space))
                actions = np.reshape(actions, envs.action_space.shape).astype(envs.action_space.dtype)
                observations, rewards, terminated, truncated, infos = envs.step(actions)
                discounted = discount ** result["length"][i] * self.training_rewards(rewards)
                for key, value in (("return", rewards), ("length", 1), ("discounted_return", discounted)):
                    result[key][i] += np.where(running, value, 0)
                for key in {"success", "is_success", "goal_achieved"} & infos.keys():
                    successes = result.setdefault("success", np.zeros(waves.shape))
                    successes[i] = np.maximum(successes[i], np.where(running, infos[key], 0))
                running &= ~(terminated | truncated)  # what an environment plays after its episode does not count
        if not np.isfinite(result["return"]).all():
            raise ValueError("a reward is NaN or infinite")
        result = {key: value.reshape(-1) for key, value in result.items()} | {"start": np.concatenate(starts)}
        return {key: value[: self.config.n_episodes] for key, value in result.items()}

    def evaluate(self, agent: Any, holdout: Any, stop: Any) -> dict[str, Any]:
        """The evaluation's columns of metrics.csv; empty without an environment and, with a warning, where it fails."""
        row = dict.fromkeys(("eval_return", "eval_return_std", "d4rl_normalized_score", "updates_per_second"))
        row |= dict.fromkeys(("eval_length", "eval_success", "eval_predicted_value", "eval_discounted_return"))
        row["data_discounted_return"] = self.data_return
        agent.eval()
        with torch.random.fork_rng([self.config.device] if "cuda" in self.config.device else []):
            torch.manual_seed(self.config.eval_seed)
            try:
                if self.envs:
                    result = self.rollout(agent.actor.act, stop)
                    result["predicted_value"] = agent.start_values(result.pop("start"))
                    row |= {f"eval_{name}": float(x.mean()) for name, x in result.items() if not np.isnan(x).any()}
                    row |= self.score(result["return"])
            except Exception as error:
                tqdm.write(f"warning: no evaluation at update {agent.n_updates:,}: {error!r}", file=sys.stderr)
            row |= agent.holdout_metrics(holdout) if len(holdout.rewards) else {}
        agent.train()
        return row


def make_environments(config: Any, n: int, id: str, **arguments: Any) -> Optional[gym.vector.SyncVectorEnv]:
    """None where none is wanted, or Gymnasium does not know the dataset's. Raises ConfigError or DataError."""
    kind = ConfigError if config.eval_env else DataError
    with blame(f"the environment {id} cannot be made; --eval_env takes another, or none", kind):
        if id not in gym.registry and id != "none":
            with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
                gym.register_envs(importlib.import_module("gymnasium_robotics"))
        if id not in gym.registry and config.eval_env in (None, "none"):  # a name in data could import any module
            return None
        return gym.make_vec(id, n, "sync", **arguments)


def describe(row: dict[str, Any]) -> str:
    """The score, else held-out metrics, else those of training."""
    if row["eval_return"] is not None:
        text, score = f"return {row['eval_return']:.1f} ± {row['eval_return_std']:.1f}", row["d4rl_normalized_score"]
        return text if score is None else f"score {score:.1f} ({text})"
    shown = [name for name in row if name.startswith("holdout_")]
    shown = shown or ["qf1_loss", "qf_loss", "cql_qf1_diff", "cql_qf_diff", "average_qf1", "average_qf", "policy_loss"]
    return ", ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)


def prepare_data(config: Any, data: dict[str, Any], task: Task, start: Any) -> tuple[dict, dict, dict[str, Tensor]]:
    """Transitions to train on and held-out ones, as the networks see them, and the scaling of observations (that of the
    checkpoint `start`, where there is one) and actions. Arrays in `data` are replaced one by one, to spare memory."""
    numbers, _, returns = episodes(data)
    data["actions"], low, high = encode_actions(data, config.env)
    data["rewards"] = task.training_rewards(data["rewards"])
    task.data_return, n_episodes = float(episodes(data, config.discount)[1].mean()), numbers[-1] + 1
    sizes, behaviour = f"{len(numbers):,} transitions, {n_episodes:,} episodes", describe(task.score(returns))
    print(f"{config.env}: {sizes}, behaviour {behaviour}, mean discounted return {task.data_return:.4g}")
    n_held_out = min(math.ceil(config.holdout_fraction * n_episodes), n_episodes - 1)
    held_out = np.isin(numbers, np.random.default_rng(config.seed).permutation(n_episodes)[:n_held_out])
    holdout = {key: data[key][held_out] for key in COLUMNS}
    data = {key: data.pop(key)[~held_out] if n_held_out else data.pop(key) for key in COLUMNS}
    mean, std = np.zeros_like(data["observations"][0]), np.ones_like(data["observations"][0])
    if start:
        mean, std = (start["policy"]["weights"][f"observation_{x}"].cpu().numpy() for x in ("mean", "std"))
    elif config.normalize:
        mean = data["observations"].mean(0, dtype=np.float64).astype(np.float32)
        std = np.float32([column.std(dtype=np.float64) + 1e-3 for column in data["observations"].T])
    if mean.shape != data["observations"].shape[1:]:
        raise DataError(f"{config.env} has observations of another size than the checkpoint's {mean.size}")
    for part, key in itertools.product((data, holdout), ("observations", "next_observations")):
        part[key] = part[key] - mean
        part[key] /= std
    scaling = {"observation_mean": mean, "observation_std": std, "action_low": low, "action_high": high}
    return data, holdout, {name: torch.tensor(x, dtype=torch.float32) for name, x in scaling.items()}


def save(path: Path, content: str | dict[str, Any]) -> None:
    """Text, or tensors and plain values. The file holds the old content or the new, whenever the process is killed or
    the disk is full. Raises DataError."""
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    buffer.write(content.encode()) if isinstance(content, str) else torch.save(content, buffer)
    with blame(f"{path} cannot be written; what was saved before is intact"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load(path: Path | str, device: str, *keys: str) -> dict[str, Any]:
    """A file of a run that holds these keys: tensors and plain values, nothing that could run. Raises DataError."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        return content | {key: content[key] for key in keys}
    except Exception as error:  # torch's are pages of advice
        kind = "checkpoint.pt" if keys else "checkpoint.pt or policy.pt"
        fault = f"is no {kind} of a run, or is damaged" if os.path.exists(path) else "does not exist"
        raise DataError(f"{path} {fault}") from error


def load_policy(path: Path | str, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """The deterministic policy of a policy.pt or checkpoint.pt, policy(observation) -> action: raw observations in,
    [O] or [B, O], actions in the environment's units out, [A] or [B, A]. Raises DataError."""
    state = load(path, device)
    with blame(f"{path} is no policy.pt or checkpoint.pt of this script"):
        state = state.get("policy", state)
        actor = Policy(*state["sizes"]).to(device)
        actor.load_state_dict(state["weights"])
    return actor.eval().act


def as_observations(observations: Any, like: Tensor) -> Tensor:
    """Raw observations, [O] or [B, O], as a tensor beside that of their means. Raises ValueError."""
    with blame(f"an observation is {len(like)} finite numbers"):
        array = np.asarray(observations, dtype=np.float32)
        if array.shape[-1:] != like.shape or not np.isfinite(array).all():
            raise ValueError(f"it has NaN, infinity or shape {array.shape}")
        return torch.tensor(array, device=like.device)


class RunningMean:
    """Means of metrics, summed on the device so that no update waits for it."""

    def __init__(self):
        self.names, self.sums = [], None

    def add(self, names: list[str], values: Tensor) -> None:
        """values: [M + 1], with a 1 at the end, which counts."""
        if names != self.names:
            self.names, self.sums = names, torch.zeros_like(values)
        self.sums += values  # in place, as a CUDA graph needs it

    def reset(self) -> None:
        if self.sums is not None:
            self.sums.zero_()

    def read(self) -> dict[str, float]:
        *sums, n = [0] if self.sums is None else self.sums.tolist()
        return {name: x / n for name, x in zip(self.names, sums)} if n else {}


def updater(config: Any, agent: Any, buffer: ReplayBuffer, *means: RunningMean) -> Callable[[int], int]:
    """Compiles the losses, and returns a function of the number of updates that are due: it does one, or on a GPU
    GRAPH_UPDATES as a CUDA graph, a single launch for all their kernels, and returns how many."""
    on_gpu, graph, eager_until = "cuda" in config.device, None, math.inf
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what an update frees, for the next one
        for parameter, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(parameter, value)
    if config.compile or (config.compile is None and on_gpu):
        torch._dynamo.config.trace_autograd_ops = True  # losses and their gradients in one graph
        compiled = torch.compile(agent.gradients, fullgraph=True, options={"fallback_random": True})  # eager's numbers
        try:
            with torch.random.fork_rng([config.device] if on_gpu else []):
                for others in agent.variants():
                    compiled(buffer.sample(config.batch_size), *others)
            agent.compute_gradients = compiled
            if on_gpu and config.target_update_period == 1:  # so that all updates of a graph are alike
                eager_until = max(agent.n_updates + 3, getattr(config, "bc_steps", 0))  # 3 make Adam's moments
        except Exception as error:  # no compiler, no Triton, a GPU that is too old
            reason = (str(error) or repr(error)).strip().splitlines()[0]
            print(f"warning: updates are not compiled, and slower ({reason}); --compile False says so", file=sys.stderr)

    def update() -> None:
        metrics = agent.update(buffer.sample(config.batch_size))
        values = F.pad(torch.stack(list(metrics.values())).double(), (0, 1), value=1.0)
        for mean in means:
            mean.add(list(metrics), values)

    def advance(left: int) -> int:
        nonlocal graph, eager_until
        step = agent.n_updates
        graphed = step >= eager_until and left >= GRAPH_UPDATES
        if graphed and not graph:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):  # which runs nothing on the device
                    for _ in range(GRAPH_UPDATES):
                        update()
            except Exception as error:
                print(f"warning: no CUDA graph, slower: {error!r}", file=sys.stderr)
                graphed, eager_until = False, math.inf
            agent.n_updates = step
        if graphed:
            graph.replay()
            agent.n_updates = step + GRAPH_UPDATES
        elif left:
            update()
        return agent.n_updates - step

    return advance


class Run:
    """A run's folder and W&B record. checkpoint.pt is all that a resume reads; the other files are for people."""

    free = {"device", "n_episodes", "keep_policies", "project", "group", "name", "run_id", "checkpoints_path"}

    def __init__(self, config: Any, n_steps: int):
        """Reads what the run starts from, and writes nothing. Raises ConfigError or DataError."""
        name = config.run_id or f"{config.name}-{config.env}-{os.urandom(4).hex()}".replace("/", "-")
        self.config, self.n_steps, self.rows, self.start = config, n_steps, [], None
        self.path = Path(config.checkpoints_path, name)
        self.resumed = (self.path / "checkpoint.pt").exists()
        self.source = self.path / "checkpoint.pt" if self.resumed else config.load_model
        self.rng = torch.cuda if "cuda" in config.device else torch
        if "cuda" in config.device:
            torch.cuda.set_device(torch.device(config.device).index or 0)
        if self.source:
            self.start = load(self.source, config.device, "agent", "policy", "config", "rows")
        if self.resumed:
            self.rows, old, new = self.start["rows"], self.start["config"], vars(config)
            names = [x for x in old.keys() & new.keys() - self.free if old[x] != new[x]]
            longer = {x for x in ("max_timesteps", "online_iterations") if new.get(x, 0) > old.get(x, 0)}
            changed = [f"{x} was {old[x]}, is {new[x]}" for x in names if x not in longer]
            changed += [f"{x} is not an option of both" for x in old.keys() ^ new.keys()]
            if changed:
                raise ConfigError(f"{self.path} holds a run with another configuration: {'; '.join(sorted(changed))}")

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def restore(self, agent: Any, means: tuple[RunningMean, ...]) -> None:
        """Sets the agent to where the run starts, and of a resumed run all the rest. Raises DataError."""
        with blame(f"{self.source} holds another network than this run's"):
            if self.start["policy"]["sizes"] != list(agent.actor.sizes):
                raise ValueError(f"{self.start['policy']['sizes']} there, {list(agent.actor.sizes)} here")
            agent.load_state_dict(self.start["agent"])
        if not self.resumed:
            agent.n_updates = 0
            return
        for mean, state in zip(means, self.start["means"]):
            vars(mean).update(state)
        if len(self.start["random"]) == len(self.rng.get_rng_state()):  # else it was on the other kind of device
            self.rng.set_rng_state(self.start["random"].cpu())

    def save(self, agent: Any, means: tuple[RunningMean, ...], step: int, **more: Any) -> None:
        """Raises DataError."""
        policy, text = {"sizes": list(agent.actor.sizes), "weights": agent.actor.state_dict()}, io.StringIO()
        state = {"config": vars(self.config), "rows": self.rows, "agent": agent.state_dict(), "policy": policy}
        state |= {"means": [vars(mean) for mean in means], "random": self.rng.get_rng_state()} | more
        save(self.path / "policy.pt", policy)
        if self.config.keep_policies and self.rows and step == self.last_step:
            save(self.path / f"policy-{step}.pt", policy)
        if self.rows:
            writer = csv.DictWriter(text, dict.fromkeys(x for row in self.rows for x in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            save(self.path / "metrics.csv", text.getvalue())
        save(self.path / "checkpoint.pt", state)  # last: what it says is done, is written

    def begin(self, task: Task, span: str) -> None:
        """Says what will happen, and starts a W&B record where the user is logged in, an agent started this or
        WANDB_MODE asks for it. W&B never stops or delays training: the run folder has everything."""
        config, where = self.config, f"evaluated in {task.envs.spec.id}" if task.envs else "no evaluation (--eval_env)"
        print(f"{self.path}: {span} to {self.n_steps:,}, a row every {config.eval_freq:,}, {where}")
        save(self.path / "config.yaml", pyrallis.dump(config))
        options = {"project": config.project, "group": config.group, "name": self.path.name, "id": config.run_id}
        limits = wandb.Settings(init_timeout=20, finish_timeout=20)  # seconds
        # Else it takes up to 15 s more to ask who is logged in, and 14 s to report its own use.
        os.environ |= {"WANDB_X_DISABLE_VIEWER": "true", "WANDB_ERROR_REPORTING": "false"}
        try:
            asked = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_SWEEP_ID")
            mode = None if asked or wandb.login(prompt=False, verify=False) else "disabled"
            self.wandb = wandb.init(**options, config=vars(config), resume="allow", settings=limits, mode=mode)
        except Exception as error:  # no account, no network, no disk
            print(f"warning: W&B is off for this run: {' '.join(str(error).split())}", file=sys.stderr)
            self.wandb = wandb.init(mode="disabled")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        with contextlib.suppress(Exception):  # W&B's failures are not the run's
            if step >= self.wandb.starting_step:  # a resumed run repeats steps that W&B holds already
                self.wandb.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def end(self, stop: Any) -> None:
        with contextlib.suppress(Exception):
            if stop and stop[0] != signal.SIGINT:
                self.wandb.mark_preempting()  # W&B requeues the run
            self.wandb.finish(exit_code=int(self.last_step < self.n_steps))


def main(config_class: type, train: Callable) -> None:
    """The program: an error is a line and an exit status; signals are handed to `train`, which saves and ends."""
    signals = []

    def receive(number: int, _: Any) -> None:
        if signals:
            raise SystemExit(128 + number)  # the second one does not wait
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, receive)
    try:
        train(parse_arguments(config_class), stop=signals)
    except (DataError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join((str(error) or repr(error)).split())}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))


def train(config: TrainConfig, data: Optional[dict[str, Any]] = None, stop: Any = ()) -> dict[str, Any]:
    """Trains on `data` (what load_dataset returns; by default that of config.env), evaluates, and returns the last row
    of metrics.csv. A run folder that holds part of the run is continued.

    Raises ConfigError and DataError, and SystemExit(128 + signal), with everything saved, once `stop` holds a signal.
    """
    run = Run(config, config.max_timesteps)
    if run.last_step == run.n_steps:
        print(f"{run.path} is complete: {describe(run.rows[-1])}")
        return run.rows[-1]
    data = load_dataset(config.env) if data is None else dict(data)
    task = Task(config, data)
    data, holdout, scaling = prepare_data(config, data, task, run.start)
    torch.manual_seed(config.seed)
    agent = CQL(config, data["observations"].shape[1], data["actions"].shape[1])
    buffer, holdout = ReplayBuffer(data, config.device), ReplayBuffer(holdout, config.device)
    # The holdout metrics are over the same ten minibatches at each evaluation, or less.
    holdout = holdout.rows(np.random.default_rng(config.seed).permutation(holdout.size)[: 10 * config.batch_size])
    means = total, recent = RunningMean(), RunningMean()  # since the last row, and since the last W&B record
    if run.start:
        run.restore(agent, means)
    agent.actor.load_state_dict(scaling, strict=False)
    model = WorldModel(config, task, agent, buffer, run)

    def save_run(step: int) -> None:
        run.save(agent, means, step, generations=model.generations, model=model.state)

    run.begin(task, f"updates {agent.n_updates:,}")
    torch.set_flush_denormal(True)  # a CPU is several times slower with the tiny soft-max weights of bad actions
    progress = tqdm(total=run.n_steps, initial=agent.n_updates, unit="update", disable=None)
    try:
        model.learn(save_run, stop)
        for generation in run.start["generations"] if run.resumed else ():
            model.generate(**generation)
        advance = updater(config, agent, model, *means)
        n, begun = 0, (agent.n_updates, time.perf_counter())
        since = begun
        while run.last_step < run.n_steps:
            step = agent.n_updates
            due = step > run.last_step and (step % config.eval_freq == 0 or step == run.n_steps)
            if due and not stop:
                averages = task.check(total.read(), agent)  # waits for the device
                seconds = time.perf_counter() - since[1]
                speed, model.seconds["update"] = (step - since[0]) / seconds, model.seconds["update"] + seconds
                row = {"step": step} | task.evaluate(agent, holdout, stop) | {"updates_per_second": speed}
                row |= model.metrics | model.time_shares()
                if not stop:  # else the evaluation was cut short, and is made when the run goes on
                    run.rows.append(task.check(row, agent) | averages)
                    run.log(row | recent.read(), step)
                    progress.set_postfix_str(describe(run.rows[-1]))
                    progress.write(f"update {step:,}: {describe(run.rows[-1])}, {speed:.0f} updates/s")
                    for mean in means:
                        mean.reset()
                    save_run(step)
                    since = (step, time.perf_counter())
            elif step > begun[0] and step % config.log_interval == 0 and not stop:
                run.log(task.check(recent.read(), agent), step)
                recent.reset()
            if progress.disable and step - n < begun[0] + 100 <= step:
                rate = (step - begun[0]) / (time.perf_counter() - begun[1])
                left = tqdm.format_interval((run.n_steps - step) / rate)
                print(f"update {step:,}: {rate:.0f} updates/s, the end in about {left}", flush=True)
            if stop:
                task.check(total.read(), agent)  # no checkpoint of a run that diverged
                save_run(step)
                progress.write(f"signal {stop[0]} at update {step:,}: saved in {run.path}")
                raise SystemExit(128 + stop[0])
            if step % config.rollout_freq == 0 and step < run.n_steps:
                since = (since[0], since[1] + model.generate(step))  # which no update takes
            ends = (step + n - step % n for n in (config.eval_freq, config.log_interval, config.rollout_freq))
            n = advance(min(run.n_steps, *ends) - step)
            progress.update(n)
    finally:
        torch.set_flush_denormal(False)
        progress.close()
        run.end(stop)
        if task.envs:
            task.envs.close()
    print(f"{describe(run.rows[-1])} after {run.n_steps:,} updates, in {run.path}")
    return run.rows[-1]


if __name__ == "__main__":
    main(TrainConfig, train)
