"""Conservative Q-Learning (CQL), offline and then online, for continuous actions: like offline/cql.py at first, then
learning in the environment. With --calibrate True it is Cal-QL: values are pushed down no further than the returns, so
that the policy is not unlearned at the start of the online phase. Cal-QL: https://arxiv.org/abs/2303.05479.

    python algorithms/finetune/cql.py --config_path configs/finetune/cal_ql/lunarlander.yaml

scores 93.5 ± 1.1 offline and 88.3 ± 2.4 after 10,000 steps online (three seeds; five minutes per run on one CPU core).
Differs from the papers as offline/cql.py does, and
1. an episode that was cut short counts as going on with the data's smallest reward for ever: no bound is too high;
2. calibration stays on online, and its values begin at the data's mean return; online transitions never replace data.
Known failures: without mixing, a large dataset outnumbers the online data. docs/finetune_cql.md has the rest.
"""

import contextlib
import copy
import csv
import ctypes
import fcntl
import functools
import importlib.util
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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, get_args, get_type_hints

if "OMP_WAIT_POLICY" not in os.environ:  # waiting threads would spin, and a busy neighbour would cost most updates
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
    env: str = "halfcheetah-medium-expert-v2"  # dataset: a local or public id, or a D4RL name; none: online only
    eval_env: Optional[str] = None  # Gymnasium id of the environment to act and evaluate in; None: the dataset's own
    seed: int = 0  # seed of networks, minibatches and sampled actions
    eval_seed: int = 0  # evaluation episode i starts from seed eval_seed + i
    eval_freq: int = 5000  # steps between two evaluations: updates offline, environment steps online
    n_episodes: int = 10  # episodes per evaluation
    offline_iterations: int = 1_000_000  # updates on the dataset, before the online phase
    online_iterations: int = 1_000_000  # environment steps of the online phase
    checkpoints_path: Optional[str] = "runs"  # parent folder of the run folders
    run_id: Optional[str] = None  # name of the run folder; an unfinished one is resumed (default: $WANDB_RUN_ID)
    load_model: str = ""  # checkpoint.pt (also of offline/cql.py) to take the first networks from; "": new ones
    keep_policies: bool = False  # keep the policy of each evaluation, as policy-<step>.pt
    log_interval: int = 1000  # steps between two W&B records
    compile: Optional[bool] = None  # compile the losses and replay CUDA graphs; None: on a GPU only
    precision: str = "float32"  # of the critics' matrix products: float32, tf32 (NVIDIA GPUs) or bfloat16
    n_online_envs: int = 1  # environments side by side online; online_iterations counts the steps of all
    utd_ratio: int = 1  # updates per environment step
    warmup_steps: int = 0  # first online steps without updates; their actions are uniform if nothing was learned before
    mixing_ratio: float = -1.0  # share of the dataset in an online minibatch; -1: uniform over all transitions
    buffer_size: int = 2_000_000  # largest number of transitions kept; memory follows the data and online_iterations
    batch_size: int = 256  # transitions per minibatch
    normalize: bool = True  # shift and scale observations by the data's mean and standard deviation
    normalize_reward: bool = False  # rescale rewards: return range (locomotion only), then reward_scale, reward_bias
    reward_scale: float = 1.0  # factor on rewards (only with normalize_reward)
    reward_bias: float = 0.0  # added to scaled rewards (only with normalize_reward)
    reward_clip: float = math.inf  # training rewards are clipped to [-reward_clip, reward_clip]
    holdout_fraction: float = 0.0  # share of episodes held out from training, for the holdout metrics
    hidden_dim: int = 256  # width of hidden layers
    policy_n_hidden_layers: int = 3  # hidden layers of the actor
    q_n_hidden_layers: int = 2  # hidden layers of each critic
    orthogonal_init: bool = True  # orthogonal initialisation of all networks
    policy_log_std_multiplier: float = 1.0  # initial factor on the actor's log standard deviation (learned)
    discount: float = 0.99  # discount factor
    policy_lr: float = 3e-5  # learning rate of the actor and the entropy coefficient
    qf_lr: float = 3e-4  # learning rate of the critics and alpha_prime
    soft_target_update_rate: float = 5e-3  # Polyak rate of the target critics
    target_update_period: int = 1  # updates between two target updates
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient, or the coefficient itself if it is not tuned
    use_automatic_entropy_tuning: bool = True  # tune the entropy coefficient towards an entropy of -A
    backup_entropy: bool = False  # subtract alpha log pi from the TD target's next value
    bc_steps: int = 0  # number of first updates in which the policy clones the data's actions

    calibrate: bool = False  # Cal-QL: the penalty bounds policy actions' values from below by the data's returns
    failure_reward: Optional[float] = None  # assumed for each step after a time-out; None: the data's smallest, or 0
    is_sparse_reward: bool = False  # an episode that only has failure_reward counts as going on like that for ever
    cql_alpha: float = 10.0  # weight of the penalty; 0 is SAC
    cql_alpha_online: float = 10.0  # weight of the penalty in the online phase
    cql_n_actions: int = 10  # actions sampled from each of the three proposals
    cql_backprop_actions: int = 0  # actions to back-propagate through, drawn by soft-max weight; 0: all (exact)
    cql_importance_sample: bool = True  # True: CQL(H); False: the plain logsumexp known as CQL(rho) in public code
    cql_temp: float = 1.0  # temperature T of T logsumexp(Q / T - log p)
    cql_max_target_backup: bool = False  # the TD target takes the largest value of cql_n_actions next actions
    cql_clip_diff_min: float = -math.inf  # lower limit of each state's gap
    cql_clip_diff_max: float = math.inf  # upper limit of each state's gap
    cql_lagrange: bool = False  # tune alpha_prime, a factor on cql_alpha, towards cql_target_action_gap
    cql_target_action_gap: float = -1.0  # gap that alpha_prime is tuned for
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

    def normalise(self, observations: Tensor) -> Tensor:
        """Raw observations as the networks take them: [..., O] -> [..., O]."""
        return (observations - self.observation_mean) / self.observation_std

    def actions(self, observations: Tensor) -> Tensor:
        """Deterministic actions in the environment's units for raw observations: [..., O] -> [..., A]."""
        mean, _ = self(self.normalise(observations))
        actions = self.action_low + (mean.tanh() + 1) / 2 * (self.action_high - self.action_low)
        return torch.clamp(actions, self.action_low, self.action_high)

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """Same as `actions`, for arrays. Raises ValueError."""
        return self.actions(as_observations(observations, self.observation_mean)).cpu().numpy()


class EnsembleCritic(nn.Module):
    """Q(s, a) of E critics, with one batched product per hidden layer."""

    max_rows = 1000  # states x actions at once, on a CPU without gradients: a layer's activations stay in the cache

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_dims: list[int],
        orthogonal_init: bool = True, dtype: Optional[torch.dtype] = None, n_critics: int = 2,
        layer_norm: bool = False, dropout: float = 0.0,
    ):  # fmt: skip
        """dtype: that of the hidden layers' products. The last layer keeps the parameters': values need digits."""
        super().__init__()
        self.dtype, self.layer_norm, self.dropout = dtype, layer_norm, dropout
        sizes = [observation_dim + action_dim, *hidden_dims, 1]
        members = [linear_layers(sizes, orthogonal_init) for _ in range(n_critics)]
        self.weights = nn.ParameterList(torch.stack([x.weight.T for x in layer]) for layer in zip(*members))
        self.biases = nn.ParameterList(torch.stack([x.bias for x in layer]).unsqueeze(1) for layer in zip(*members))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[B, O] and N actions each [B, N, A], or [(E,) B, O] and those per critic [E, B, N, A] -> [E, B, N]."""
        *leading, n_actions, _ = actions.shape
        size = max(1, self.max_rows // n_actions)  # states
        if observations.is_cpu and leading[-1] > size and not torch.is_grad_enabled():
            return torch.cat([self(*x) for x in zip(observations.split(size, -2), actions.split(size, -3))], dim=1)
        observations = observations.unsqueeze(-2).expand(*leading, n_actions, -1)
        x = torch.cat([observations, actions], dim=-1).flatten(-3, -2)  # [B N, O + A] or [E, B N, O + A]
        x = x.to(self.dtype or x.dtype).expand(len(self.weights[0]), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = torch.baddbmm(bias.to(x.dtype), x, weight.to(x.dtype))  # [E, B N, hidden]
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = F.dropout(x.relu_(), self.dropout, self.training)
        q = (x * self.weights[-1].mT).sum(-1, keepdim=True) + self.biases[-1]  # as a product it is slow on a CPU
        return q.view(len(q), leading[-1], n_actions)


# local: the columns that the losses take
class Batch(NamedTuple):
    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A]
    rewards: Tensor  # [B]
    next_observations: Tensor  # [B, O]
    terminals: Tensor  # [B], 1 where the episode ended in a terminal state, 0 elsewhere and at time-outs
    returns: Tensor  # [B], discounted sum of rewards to the end of the episode: Cal-QL's bound


def tanh_gaussian_log_prob(pre_tanh: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a = tanh(z), z = mean + std * noise, summed over actions: [..., A] -> [...].

    The Jacobian is exact: log(1 - tanh(z)^2) = 2 (log 2 - z - softplus(-2 z)), finite for every z.
    """
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return (log_normal - log_jacobian).sum(dim=-1)


def sample_actions(mean: Tensor, log_std: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Draws N actions per state, by reparametrisation: [B, A] -> actions [B, N, A], log-densities [B, N]."""
    mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)  # [B, 1, A]
    noise = torch.randn_like(mean.repeat(1, n, 1))  # [B, N, A]
    pre_tanh = mean + log_std.exp() * noise  # [B, N, A]
    return pre_tanh.tanh(), tanh_gaussian_log_prob(pre_tanh, noise, log_std)


# local: Cal-QL's bound, and actions to explore by
class CQL(nn.Module):
    """The agent: one method per loss, then `gradients` and `update`, the algorithm. Its state_dict is a checkpoint."""

    max_density_action = 0.999  # data actions are clipped to this before a log-density, which is infinite at 1
    max_log_alpha_prime = math.log(1e6)

    def __init__(self, config: TrainConfig, observation_dim: int, action_dim: int):
        super().__init__()
        self.config, self.cql_alpha = config, config.cql_alpha
        sizes = (observation_dim, action_dim)
        shape = (config.policy_n_hidden_layers, config.policy_log_std_multiplier, config.orthogonal_init)
        self.actor = TanhGaussianActor(*sizes, config.hidden_dim, *shape)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        hidden_dims = [config.hidden_dim] * config.q_n_hidden_layers
        self.critic = EnsembleCritic(*sizes, hidden_dims, config.orthogonal_init, dtype)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.log_alpha_prime = nn.Parameter(torch.tensor(1.0))
        self.target_entropy = -float(action_dim)
        self.to(config.device)
        self.parameter_groups = {"actor": list(self.actor.parameters()), "critic": list(self.critic.parameters())}
        self.parameter_groups |= {"alpha": [self.log_alpha], "alpha_prime": [self.log_alpha_prime]}
        rates = (config.policy_lr, config.qf_lr, config.policy_lr, config.qf_lr)
        groups = [{"params": group, "lr": rate} for group, rate in zip(self.parameter_groups.values(), rates)]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=self.log_alpha.is_cuda)  # for CUDA graphs
        self.n_updates = 0
        self.compute_gradients = self.gradients  # or compiled

    def alpha(self) -> Tensor:
        """Entropy coefficient, a constant in every loss except its own."""
        if not self.config.use_automatic_entropy_tuning:
            return torch.full_like(self.log_alpha, self.config.alpha_multiplier)
        return self.config.alpha_multiplier * self.log_alpha.detach().exp()

    def penalty_weight(self) -> Tensor:
        """cql_alpha, times alpha' if that is tuned; a constant in every loss except that of alpha'."""
        if not self.config.cql_lagrange:
            return torch.full_like(self.log_alpha_prime, self.cql_alpha)
        return self.cql_alpha * self.log_alpha_prime.detach().exp()

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """Raises alpha while the policy's entropy is below the target: [B] -> []."""
        return -self.log_alpha * (log_prob.detach().mean() + self.target_entropy)

    def policy_loss(self, batch: Batch, actions: Tensor, log_prob: Tensor) -> Tensor:
        """E[alpha log pi(a|s) - min Q(s, a)], with gradients through a ~ pi: [B, A], [B] -> []."""
        q = self.critic(batch.observations, actions.unsqueeze(1)).squeeze(-1).min(dim=0).values  # [B]
        return (self.alpha() * log_prob - q).mean()

    def data_log_prob(self, batch: Batch, mean: Tensor, log_std: Tensor) -> Tensor:
        """log pi(a_data|s), the likelihood of the data's actions: [B, A], [B, A] -> [B]."""
        pre_tanh = batch.actions.clamp(-self.max_density_action, self.max_density_action).atanh()
        return tanh_gaussian_log_prob(pre_tanh, (pre_tanh - mean) / log_std.exp(), log_std)

    @torch.no_grad()
    def td_target(self, batch: Batch, next_actions: Tensor, next_log_prob: Tensor) -> Tensor:
        """r + gamma (1 - terminal) max_n min_e Q'(s', a'_n); N = 1 is the usual target: [B, N, A], [B, N] -> [B]."""
        next_q = self.target_critic(batch.next_observations, next_actions).amin(dim=0)  # [B, N]
        next_q, best = next_q.max(dim=1)  # [B]
        if self.config.backup_entropy:
            next_q = next_q - self.alpha() * next_log_prob.gather(1, best.unsqueeze(1)).squeeze(1)
        return batch.rewards + self.config.discount * (1 - batch.terminals) * next_q

    def critic_loss(self, batch: Batch, td_target: Tensor, proposals: Tensor, proposal_log_prob: Tensor) -> tuple:
        """TD loss plus alpha' cql_alpha (gap - target gap). The gap is log_sum_exp - Q(s, a_data) of each state,
        clipped; the target gap is 0 without Lagrange. Offline SAC has neither proposals nor a penalty.
        td_target [B], proposals [B, 3N, A], their log-densities [B, 3N] -> loss [], gap of each critic [E], metrics."""
        config = self.config
        q_data, log_sum_exp, q, scores = self.log_sum_exp(batch, proposals, proposal_log_prob)
        td_loss = (q_data - td_target).square().mean(dim=1)  # [E]
        metrics = per_critic("qf{}_loss", td_loss) | per_critic("average_qf{}", q_data.mean(dim=1))
        metrics["average_target_q"] = td_target.mean()
        if proposals.shape[1] == 0:
            return td_loss.sum(), torch.zeros_like(td_loss), metrics
        state_gap = log_sum_exp - q_data  # [E, B]
        gap = state_gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max).mean(dim=1)  # [E]
        target_gap = config.cql_target_action_gap if config.cql_lagrange else 0.0
        penalty = self.penalty_weight() * (gap - target_gap)  # [E]
        metrics |= per_critic("cql_qf{}_diff", gap) | per_critic("cql_min_qf{}_loss", penalty)
        metrics |= self.penalty_metrics(batch, q, scores, state_gap)
        return (td_loss + penalty).sum(), gap.detach(), metrics

    def log_sum_exp(self, batch: Batch, proposals: Tensor, proposal_log_prob: Tensor) -> tuple[Tensor, ...]:
        """T logsumexp_a(Q(s, a) / T - log p(a|s)) over the proposals: CQL(H)'s integral by importance sampling. Without
        that, T logsumexp_a(Q(s, a) / T) over proposals and the data's action. Returns Q of the data's actions and the
        log-sum-exp [E, B], and for metrics Q of all actions [E, B, 1 + 3N] and the scores [E, B, 3N or 1 + 3N]."""
        actions = torch.cat([batch.actions.unsqueeze(1), proposals], dim=1)  # [B, 1 + 3N, A]
        draw = self.config.cql_backprop_actions > 0 and proposals.shape[1] > 0
        with torch.no_grad() if draw else contextlib.nullcontext():
            q = self.critic(batch.observations, actions)  # [E, B, 1 + 3N]
            scores = self.bound(batch, q) / self.config.cql_temp
            if self.config.cql_importance_sample:
                scores = scores[..., 1:] - proposal_log_prob
            log_sum_exp = self.config.cql_temp * scores.logsumexp(dim=-1)  # [E, B]
        if draw:
            return *self.redraw(batch, actions, scores, log_sum_exp), q, scores
        return q[..., 0], log_sum_exp, q, scores

    # local: Cal-QL's bound
    def bound(self, batch: Batch, q: Tensor, places: Optional[Tensor] = None) -> Tensor:
        """Returns Q as the log-sum-exp takes it: to calibrate, at least the return if the action is the policy's.
        q [E, B, N], of the actions at `places` [..., N] among all, or of all."""
        if not self.config.calibrate:
            return q
        if places is None:
            places = torch.arange(q.shape[-1], device=q.device)
        return torch.where(places > self.config.cql_n_actions, q.maximum(batch.returns.unsqueeze(1)), q)

    def redraw(self, batch: Batch, actions: Tensor, scores: Tensor, log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
        """The same values, with a cheaper gradient of the same expectation. The gradient of T logsumexp(scores) is the
        mean gradient of Q under the soft-max of the scores: k actions are drawn from it for each state and critic.
        actions [B, 1 + 3N, A], scores [E, B, M], log_sum_exp [E, B] -> Q of the data's actions, log_sum_exp: [E, B]."""
        *shape, n_scores = scores.shape
        uniform = torch.rand(*shape, self.config.cql_backprop_actions, dtype=scores.dtype, device=scores.device)
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniform).clamp(max=n_scores - 1)  # [E, B, k], among the scores
        places = F.pad(drawn + actions.shape[1] - n_scores, (1, 0))  # [E, B, 1 + k], among all; first the data's
        actions = actions.unsqueeze(0).take_along_dim(places.unsqueeze(-1), dim=2)  # [E, B, 1 + k, A]
        q = self.critic(batch.observations, actions)  # [E, B, 1 + k]
        q_drawn = self.bound(batch, q[..., 1:], places[..., 1:]).mean(dim=-1)  # [E, B]
        return q[..., 0], log_sum_exp + (q_drawn - q_drawn.detach())

    # local: how often Cal-QL's bound holds
    @torch.no_grad()
    def penalty_metrics(self, batch: Batch, q: Tensor, scores: Tensor, state_gap: Tensor) -> dict[str, Tensor]:
        """Metrics of the penalty: q [E, B, 1 + 3N], scores [E, B, 3N or 1 + 3N], state_gap [E, B] -> scalars."""
        config = self.config
        # Without importance sampling the first score is the data's, and the shares do not add up to 1.
        shares = scores.softmax(dim=-1)[..., 1 - q.shape[-1] :].mean(dim=(0, 1)).chunk(3)
        metrics = per_critic("cql_std_q{}", q.std(dim=-1).mean(dim=1))
        for source, values, share in zip(("rand", "next_actions", "current_actions"), q[..., 1:].chunk(3, -1), shares):
            metrics |= per_critic(f"cql_q{{}}_{source}", values.mean(dim=(1, 2)))
            metrics[f"cql_weight_{source}"] = share.sum()
        log_volume = self.actor.sizes[1] * math.log(2) if config.cql_importance_sample else 0.0
        constant_q_gap = config.cql_temp * (math.log(scores.shape[-1]) + log_volume)
        clipped = (state_gap < config.cql_clip_diff_min) | (state_gap > config.cql_clip_diff_max)
        metrics |= {"cql_net_gap": state_gap.mean() - constant_q_gap, "cql_clipped_share": clipped.float().mean()}
        if config.calibrate:
            below = (q[..., 1:] < batch.returns.unsqueeze(1)).float().chunk(3, dim=-1)
            metrics |= per_critic("bound_rate_cql_q{}_next_actions", below[1].mean(dim=(1, 2)))
            metrics |= per_critic("bound_rate_cql_q{}_current_actions", below[2].mean(dim=(1, 2)))
        return metrics | {"cql_effective_weight": self.penalty_weight()}

    def alpha_prime_loss(self, gap: Tensor) -> Tensor:
        """Raises alpha' while the gap is above cql_target_action_gap: [E], without gradient -> []."""
        excess = gap.mean() - self.config.cql_target_action_gap
        return -self.log_alpha_prime.exp() * self.cql_alpha * excess

    @torch.no_grad()
    def td_target_and_proposals(self, batch: Batch, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mean and log_std [2B, A] of the actor at observations and next observations -> TD target [B], and N random, N
        next and N current actions as proposals [B, 3N, A] with their log-densities [B, 3N]. The next actions are used
        twice: in the target, and as proposals at s, with their density at s' (as in the authors' code)."""
        config = self.config
        n = config.cql_n_actions if self.cql_alpha > 0 or config.cql_max_target_backup else 1
        actions, log_prob = sample_actions(mean, log_std, n)
        (current_actions, next_actions), (current_log_prob, next_log_prob) = actions.chunk(2), log_prob.chunk(2)
        n_backup = n if config.cql_max_target_backup else 1
        td_target = self.td_target(batch, next_actions[:, :n_backup], next_log_prob[:, :n_backup])
        if self.cql_alpha == 0:
            return td_target, current_actions[:, :0], current_log_prob[:, :0]
        random_actions = torch.empty_like(current_actions).uniform_(-1, 1)
        random_log_prob = torch.full_like(current_log_prob, -batch.actions.shape[1] * math.log(2))
        proposals = torch.cat([random_actions, next_actions, current_actions], dim=1)
        return td_target, proposals, torch.cat([random_log_prob, next_log_prob, current_log_prob], dim=1)

    def losses(self, batch: Batch, cloning: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the loss of each group of parameters, all at the same parameters, and metrics."""
        config = self.config
        mean, log_std = self.actor(torch.cat([batch.observations, batch.next_observations]))  # [2B, A]
        proposed = self.td_target_and_proposals(batch, mean, log_std)
        mean, log_std = mean.chunk(2)[0], log_std.chunk(2)[0]  # [B, A], at the observations
        actions, log_prob = (x.squeeze(1) for x in sample_actions(mean, log_std, 1))
        critic_loss, gap, metrics = self.critic_loss(batch, *proposed)
        if cloning:
            policy_loss = (self.alpha() * log_prob - self.data_log_prob(batch, mean, log_std)).mean()
        else:
            policy_loss = self.policy_loss(batch, actions, log_prob)
        losses = {"actor": policy_loss, "critic": critic_loss}
        metrics |= {"policy_loss": policy_loss, "log_pi": log_prob.mean(), "alpha": self.alpha()}
        if config.use_automatic_entropy_tuning:
            metrics["alpha_loss"] = losses["alpha"] = self.alpha_loss(log_prob)
        if config.cql_lagrange:
            metrics["alpha_prime"] = self.log_alpha_prime.exp()
            metrics["alpha_prime_loss"] = losses["alpha_prime"] = self.alpha_prime_loss(gap)
        return losses, metrics

    def gradients(self, batch: Batch, *phase: bool) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
        """Returns gradients of each group's loss in its own parameters only, and metrics. Changes nothing."""
        losses, metrics = self.losses(batch, *phase)
        gradients = {name: torch.autograd.grad(loss, self.parameter_groups[name]) for name, loss in losses.items()}
        for name, metric in (("actor", "policy_grad_norm"), ("critic", "critic_grad_norm")):
            if name in gradients:
                metrics[metric] = nn.utils.get_total_norm(gradients[name])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def phases(self) -> list[tuple]:
        """Further arguments of `gradients`, now and later: whether the policy clones."""
        return [(self.n_updates < self.config.bc_steps,), (False,)]

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a step of the policy, the critics, alpha and alpha', then of the target critics."""
        gradients, metrics = self.compute_gradients(batch, *self.phases()[0])
        for name, values in gradients.items():
            for parameter, gradient in zip(self.parameter_groups[name], values):
                parameter.grad = gradient
        self.optimizer.step()
        self.log_alpha_prime.data.clamp_(max=self.max_log_alpha_prime)
        self.n_updates += 1
        if self.n_updates % self.config.target_update_period == 0:
            with torch.no_grad():
                targets, sources = list(self.target_critic.parameters()), self.parameter_groups["critic"]
                torch._foreach_lerp_(targets, sources, self.config.soft_target_update_rate)
        return metrics

    @torch.no_grad()
    def explore(self, observations: np.ndarray, uniform: bool) -> np.ndarray:
        """Samples actions in [-1, 1] from the policy, or uniformly: raw observations [B, O] -> [B, A]."""
        actor = self.actor.eval()  # a copy may have dropout or batch norm
        observations = actor.normalise(as_observations(observations, actor.observation_mean))
        actions = sample_actions(*actor(observations), 1)[0].squeeze(1)
        actor.train()
        if uniform:
            actions = torch.rand_like(actions) * 2 - 1
        return actions.cpu().numpy()

    @torch.no_grad()
    def start_values(self, observations: np.ndarray) -> np.ndarray:
        """Returns min Q(s, pi(s)), what the critics predict for the deterministic policy: raw [B, O] -> [B]."""
        observations = self.actor.normalise(as_observations(observations, self.actor.observation_mean))
        values = self.critic(observations, self.actor(observations)[0].tanh().unsqueeze(1)).min(dim=0).values
        return values.view(len(observations)).cpu().numpy()

    @torch.no_grad()
    def holdout_metrics(self, batch: Batch) -> dict[str, float]:
        """Likelihood, TD error, gap and data Q on held-out transitions."""
        mean, log_std = self.actor(torch.cat([batch.observations, batch.next_observations]))
        _, gap, metrics = self.critic_loss(batch, *self.td_target_and_proposals(batch, mean, log_std))
        result = {"holdout_td_error": (metrics["qf1_loss"] + metrics["qf2_loss"]) / 2, "holdout_gap": gap.mean()}
        result["holdout_q"] = (metrics["average_qf1"] + metrics["average_qf2"]) / 2
        result["holdout_log_prob"] = self.data_log_prob(batch, mean.chunk(2)[0], log_std.chunk(2)[0]).mean()
        return {name: value.item() for name, value in result.items()}

    def get_extra_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()["state"], "n_updates": self.n_updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.n_updates = state["n_updates"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})


def per_critic(name: str, values: Tensor) -> dict[str, Tensor]:
    return {name.format(i + 1): value for i, value in enumerate(values)}


# local: room for online transitions, and minibatches of both kinds
class ReplayBuffer:
    """All transitions of the data, on the device, followed by the latest `room` ones of the online phase."""

    def __init__(self, data: dict[str, np.ndarray], device: str, room: int = 0, mixing_ratio: float = -1.0):
        columns = [torch.as_tensor(data[key], dtype=torch.float32) for key in Batch._fields]
        columns = [torch.cat([x, x.new_zeros(room, *x.shape[1:])]) if room else x for x in columns]
        self.columns, self.size = [column.to(device) for column in columns], len(data["rewards"])
        self.room, self.n_added, self.mixing_ratio, self.online = room, 0, mixing_ratio, False
        # Numbers of data and online transitions; on the device, so that a CUDA graph sees them grow.
        self.counts = torch.tensor([self.size, 0], dtype=torch.float64, device=device)

    def add(self, data: dict[str, np.ndarray]) -> None:
        """Overwrites the oldest online transitions, never the data."""
        numbers = self.n_added + np.arange(len(data["rewards"]))[-self.room :]
        for column, key in zip(self.columns, Batch._fields):
            values = torch.as_tensor(data[key][-self.room :], dtype=torch.float32, device=column.device)
            column[self.size + numbers % self.room] = values
        self.n_added += len(data["rewards"])
        self.counts[1] = min(self.n_added, self.room)

    def rows(self, indices: Any) -> Batch:
        return Batch(*[column[indices] for column in self.columns])

    def sample(self, batch_size: int) -> Batch:
        if not self.online:
            return self.rows(torch.randint(self.size, (batch_size,), device=self.counts.device))
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.counts.device)
        n_data, n_online = self.counts
        indices = uniform * (n_data + n_online)
        if self.mixing_ratio >= 0 and self.size:
            from_data = torch.arange(batch_size, device=uniform.device) < round(self.mixing_ratio * batch_size)
            from_data |= n_online == 0
            indices = torch.where(from_data, uniform * n_data, n_data + (uniform * n_online).floor())
        return self.rows(indices.long())


def calibration_returns(data: dict[str, Any], numbers: np.ndarray, failure_reward: float, config: Any) -> np.ndarray:
    """Cal-QL's bounds: the discounted sum of training rewards from each transition to the end of its episode, [T]. An
    episode that was cut short counts as going on with failure_reward for ever. numbers: those of the episodes, [T]."""
    forever, ends = failure_reward / max(1 - config.discount, 1e-6), np.append(numbers[1:] != numbers[:-1], True)
    beyond = config.discount * forever * (ends & ~data["terminals"])
    whole = {"rewards": data["rewards"] + beyond, "terminals": data["terminals"], "timeouts": ends}
    returns = episodes(whole, config.discount)[1].astype(np.float32)
    if config.is_sparse_reward:
        best = np.full(numbers.max() + 1, -np.inf)
        np.maximum.at(best, numbers, data["rewards"])
        returns[best[numbers] <= failure_reward + 1e-6 * max(1.0, abs(failure_reward))] = forever
    return returns


class Collector:
    """Plays episodes with the learning policy, in environments of its own, and hands their transitions to the buffer.

    They are the rows of online.bin in the run folder: float32, with actions in the environment's units. Environment i
    of n plays the episodes i, i + n, i + 2 n, ..., each from its own seed: a resumed run replays the rows of unfinished
    episodes, and continues in the same state.
    """

    def __init__(self, config: Any, task: Any, agent: CQL, buffer: ReplayBuffer, run: Any, failure_reward: float):
        """Raises DataError."""
        self.config, self.task, self.agent, self.buffer, self.failure = config, task, agent, buffer, failure_reward
        names = "observation_mean", "observation_std", "action_low", "action_high"
        self.mean, self.std, self.low, self.high = (getattr(agent.actor, x).cpu().numpy() for x in names)
        parts = {"observation": self.mean.shape, "action": self.low.shape, "next_observation": self.mean.shape}
        parts |= dict.fromkeys(("reward", "terminal", "timeout", "episode"), ())
        self.row_type = np.dtype([(name, np.float32, shape) for name, shape in parts.items()])
        self.state = {"n_rows": 0, "n_finished": 0, "regret": 0.0, "reports_success": False}
        self.state["n_updates"] = config.offline_iterations  # plus those that are due online
        self.state["wrappers"] = [name for name, _ in task.arguments.get("wrappers", ()) if name in WRAPPERS.split()]
        self.begin_row()
        self.state |= run.checkpoint["online"] if run.resumed else {}
        self.path, self.envs, n = run.path / "online.bin", None, config.n_online_envs
        if not config.online_iterations:
            return
        self.envs = make_environments(config.eval_env, n, **task.arguments)
        self.one = gym.vector.utils.create_empty_array(self.envs.single_observation_space, 1)
        self.numbers, self.played = list(range(n)), np.zeros((n, 3))  # of each one's episode; return, length, success
        self.observations, self.unfinished = np.zeros((n, len(self.mean)), np.float32), [[] for _ in range(n)]
        size = self.state["n_rows"] * self.row_type.itemsize
        with explain(f"{self.path} cannot be read or written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "r+b" if size else "w+b")  # noqa: SIM115, open for the whole run
            content = self.file.read(size)
            self.file.truncate()  # what a killed run wrote after its checkpoint
        if len(content) != size:
            raise DataError(f"{self.path} has fewer than the checkpoint's {self.state['n_rows']} transitions")
        rows = np.frombuffer(content, self.row_type)
        torch.set_flush_denormal(True)  # as when they were played
        for i in range(n):
            own = rows[rows["episode"] % n == i]
            self.replay(i, own[own["episode"] == own["episode"][-1:]])
        self.absorb(rows)

    def begin_row(self) -> None:
        """Clears what the next row counts: return, length and success of episodes, steps and seconds of playing."""
        self.state |= {"finished": [], "steps": 0, "seconds": 0.0}

    @property
    def position(self) -> int:
        """Steps of the run so far: offline updates, then online transitions."""
        offline = self.config.offline_iterations
        return offline + self.state["n_rows"] if self.agent.n_updates >= offline else self.agent.n_updates

    def reset(self, i: int) -> None:
        seed = np.random.SeedSequence([self.config.seed, self.numbers[i]]).generate_state(1)[0] // 2
        with explain(f"the environment {self.envs.spec.id} failed"):
            observation, _ = self.envs.envs[i].reset(seed=int(seed))
        self.observations[i], self.played[i] = self.flat(observation), 0

    def flat(self, observation: Any) -> np.ndarray:
        batch = gym.vector.utils.concatenate(self.envs.single_observation_space, [observation], self.one)
        return flatten(batch, self.envs.single_observation_space)[0]

    def play(self, i: int, action: np.ndarray) -> np.ndarray:
        """Takes one step in environment i with an action [A] in its units. Returns the row."""
        action = to_space(action, self.envs.single_action_space)
        with explain(f"the environment {self.envs.spec.id} failed"):
            next_observation, reward, terminal, timeout, info = self.envs.envs[i].step(action)
        self.state["reports_success"] |= not math.isnan(info["success"])
        total, length, success = self.played[i]
        self.played[i] = total + reward, length + 1, np.fmax(success, info["success"])
        observation, self.observations[i] = self.observations[i].copy(), self.flat(next_observation)
        end = (reward, terminal, timeout and not terminal, self.numbers[i])
        row = np.array((observation, action.ravel(), self.observations[i], *end), self.row_type)
        if not np.isfinite([reward, *self.observations[i]]).all():
            raise DataError(f"the environment {self.envs.spec.id} failed: it returned NaN or infinity")
        return row

    def replay(self, i: int, rows: np.ndarray) -> None:
        """Brings environment i back to where it was: in the episode of these rows, or at the start of the next one."""
        if len(rows):
            self.numbers[i] = int(rows[-1]["episode"])
            if rows[-1]["terminal"] or rows[-1]["timeout"]:
                self.numbers[i] += len(self.numbers)
        self.reset(i)
        for row in rows[rows["episode"] == self.numbers[i]]:
            if self.play(i, row["action"]) != row:
                print(f"warning: an episode in {self.path} plays differently now and is dropped", file=sys.stderr)
                self.numbers[i] += len(self.numbers)
                return self.reset(i)

    def step(self) -> int:
        """Takes one step in every environment. Returns the number of steps."""
        config, started, rows = self.config, time.perf_counter(), []
        warming_up = self.state["n_rows"] < config.warmup_steps
        uniform = warming_up and config.offline_iterations == 0 and not config.load_model
        actions = self.low + (self.agent.explore(self.observations, uniform) + 1) / 2 * (self.high - self.low)
        if not np.isfinite(actions).all():
            raise DataError("training diverged: actions are NaN; what was saved before is intact")
        for i, action in enumerate(actions[: config.online_iterations - self.state["n_rows"]]):
            rows.append(self.play(i, action.clip(self.low, self.high)))
            if rows[-1]["terminal"] or rows[-1]["timeout"]:
                self.finish(i)
        rows = np.stack(rows)
        with explain(f"{self.path} cannot be written"):
            self.file.write(rows.tobytes())
        self.absorb(rows)
        self.state["n_rows"] += len(rows)
        self.state["steps"] += len(rows)
        self.state["seconds"] += time.perf_counter() - started
        if not warming_up and self.buffer.counts.any():
            self.state["n_updates"] += len(rows) * config.utd_ratio
        return len(rows)

    def finish(self, i: int) -> None:
        """Counts the episode of environment i as finished, and begins its next one."""
        self.state["n_finished"] += 1
        self.state["finished"].append(self.played[i].tolist())
        score = self.task.score(self.played[i, :1])["d4rl_normalized_score"]
        self.state["regret"] += float(1 - (self.played[i, 2] if score is None else score / 100))
        self.numbers[i] += len(self.numbers)
        self.reset(i)

    def absorb(self, rows: np.ndarray) -> None:
        """Adds rows to the buffer in the order of time; to calibrate, only once their episode is over."""
        if self.config.calibrate:
            whole = []
            for row in rows:
                own = self.unfinished[int(row["episode"]) % len(self.unfinished)]
                if own and own[0]["episode"] != row["episode"]:  # an episode that was dropped
                    own.clear()
                own.append(row)
                if row["terminal"] or row["timeout"]:
                    whole += own
                    own.clear()
            if not whole:
                return
            rows = np.array(whole, self.row_type)
        data = {"rewards": self.task.training_rewards(rows["reward"]), "terminals": rows["terminal"] > 0}
        largest = float(np.abs(data["rewards"]).max(initial=0)) / max(1 - self.config.discount, 1e-4)
        self.task.value_limit, data["returns"] = max(self.task.value_limit, 100 * largest), np.zeros(len(rows))
        if self.config.calibrate:
            data["returns"] = calibration_returns(data, rows["episode"].astype(int), self.failure, self.config)
        data["observations"] = (rows["observation"] - self.mean) / self.std
        data["next_observations"] = (rows["next_observation"] - self.mean) / self.std
        data["actions"] = ((rows["action"] - self.low) * 2 / (self.high - self.low) - 1).clip(-1, 1)
        self.buffer.add(data)

    def metrics(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of the episodes since the last row, which are then cleared, and regrets: that of all online episodes,
        and that of the evaluations online in `rows`."""
        state, nan = self.state, np.nan
        played = np.mean(state["finished"] or [3 * [nan]], axis=0)
        result = dict(zip(("online_return", "online_length", "online_success"), played))
        result["train_regret"] = state["regret"] / state["n_finished"] if state["n_finished"] else nan
        if not state["reports_success"]:
            result["online_success"] = nan
            if self.task.reference is None:
                result["train_regret"] = nan
        scores = []
        for row in rows:
            score = row["eval_success"]
            if row["d4rl_normalized_score"] is not None:
                score = row["d4rl_normalized_score"] / 100
            if row["step"] >= self.config.offline_iterations and score is not None:
                scores.append(score)
        result["eval_regret"] = 1 - np.mean(scores or nan)
        result["env_steps_per_second"] = state["steps"] / state["seconds"] if state["seconds"] else nan
        self.begin_row()
        return {name: None if np.isnan(x) else float(x) for name, x in result.items()}

    def sync(self) -> dict[str, Any]:
        """Writes the file to the disk. Returns what a checkpoint holds."""
        if self.envs:
            with explain(f"{self.path} cannot be written"):
                self.file.flush()
                os.fsync(self.file.fileno())
        return self.state


def prepare(config: TrainConfig, data: Any, run: Any) -> tuple[Any, CQL, ReplayBuffer, Batch, float]:
    """Returns task, agent, buffer, held-out rows, and the reward that Cal-QL's returns assume after a time-out.
    Raises ConfigError and DataError."""
    alone = config.env == "none"
    if alone and (config.eval_env in (None, "none") or config.normalize or config.offline_iterations):
        needed = "--eval_env <id> --offline_iterations 0 --normalize False"
        raise ConfigError(f"--env none learns online only, and needs {needed}")
    if alone and config.calibrate and config.failure_reward is None:
        raise ConfigError("--env none has no smallest reward: --calibrate True needs --failure_reward")
    if -1 < config.mixing_ratio < 0:
        raise ConfigError(f"--mixing_ratio takes -1, or a number from 0 to 1, not {config.mixing_ratio}")
    if (config.mixing_ratio >= 0 or config.is_sparse_reward) and not config.calibrate:
        print("this run is CQL (with mixing_ratio); Cal-QL, which is_sparse_reward is for, needs --calibrate True")
    if alone:
        data = no_data(config)
    data = load_dataset(config.env) if data is None else dict(data)
    task = Task(config, data)
    if config.online_iterations and not task.envs:
        raise ConfigError(f"--online_iterations {config.online_iterations} needs an environment; --eval_env takes one")
    if alone:
        _, low, high = encode_actions(data, config.eval_env)
        scaling, holdout = {"action_low": torch.tensor(low), "action_high": torch.tensor(high)}, dict(data)
    else:
        data, holdout, scaling = prepare_data(config, data, task, run.checkpoint)
    failure_reward, n = config.failure_reward, len(data["rewards"])
    if failure_reward is None:
        failure_reward = data["rewards"].min(initial=0.0)
    room = min(config.online_iterations, config.buffer_size - n)
    if config.online_iterations and room < 1:
        raise ConfigError(f"--buffer_size {config.buffer_size} leaves no room for online ones beside {n} transitions")
    for part in (data, holdout):
        part["returns"] = np.zeros_like(part["rewards"])
        if config.calibrate and len(part["rewards"]):
            part["returns"] = calibration_returns(part, episodes(part)[0], failure_reward, config)
    torch.manual_seed(config.seed)
    agent = CQL(config, data["observations"].shape[1], data["actions"].shape[1])
    if config.calibrate and n:  # Cal-QL pushes down no value that is below the returns
        for critic in (agent.critic, agent.target_critic):
            nn.init.constant_(critic.biases[-1], task.data_return)
    run.restore(agent, task)
    agent.actor.load_state_dict(scaling, strict=False)
    buffer = ReplayBuffer(data, config.device, room, config.mixing_ratio)
    return task, agent, buffer, holdout_batch(config, holdout), failure_reward


def no_data(config: TrainConfig) -> dict[str, np.ndarray]:
    """Columns without rows, in the environment's sizes. Raises ConfigError and DataError."""
    envs = make_environments(config.eval_env, 1, config.eval_env)
    observations = flatten(envs.observation_space.sample(), envs.single_observation_space)[:0]
    actions = action_bounds(envs.single_action_space, config.eval_env)["action_low"][None][:0]
    envs.close()
    columns = {"observations": observations, "next_observations": observations, "actions": actions}
    return dict.fromkeys(COLUMNS, np.zeros(0)) | columns


def train(config: TrainConfig, data: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Trains on `data` (what load_dataset returns; by default that of config.env), then online, evaluates, and returns
    the last row of metrics.csv. If the run folder holds a part of the run, that is continued. An offline step is an
    update; an online step is a transition, with utd_ratio updates. Raises ConfigError and DataError."""
    run = Run(config, config.offline_iterations + config.online_iterations, config.offline_iterations)
    if run.is_complete:
        print(f"{run.path} is complete: {describe(run.rows[-1])}")
        return run.rows[-1]
    task, agent, buffer, holdout, failure_reward = prepare(config, data, run)
    collector = Collector(config, task, agent, buffer, run, failure_reward)
    run.begin(task, collector.position, "step")
    run_until = None
    try:
        for step in run.stops():  # where a record or a row of metrics.csv is due
            goes_online = run.last_step >= config.offline_iterations and not buffer.online  # after its row
            if goes_online:
                agent.cql_alpha, buffer.online = config.cql_alpha_online, True
            if goes_online or not run_until:
                run_until = updater(config, agent, buffer.sample, run)  # with the losses of this phase
            if buffer.online:
                run_until(collector.state["n_updates"])  # those left undone at a signal
                while collector.position < step and not Signals.received:
                    run.progress.update(collector.step())
                    run_until(collector.state["n_updates"])
                step = collector.position
            else:
                run_until(step, run.progress)
            if Signals.received:
                task.check(run.means(), agent)  # no checkpoint of a run that diverged
                run.save(agent, online=collector.sync())
                print(f"signal {Signals.received}: saved in {run.path}")
                raise SystemExit(128 + Signals.received)
            metrics = task.check(run.next_record(step), agent)
            if run.is_row_due(step):
                row = {"step": step} | task.evaluate(agent, holdout)
                row |= collector.metrics([*run.rows, row])
                metrics |= run.add_row(step, task.check(row, agent))
            run.log(metrics, step)
            run.save(agent, step, online=collector.sync())
    finally:
        run.end(task.envs, collector.envs)
    print(f"{describe(run.rows[-1])} after {run.n_steps:,} steps, in {run.path}")
    return run.rows[-1]


# Common to all files from here on: options, dataset, replay buffer, environments, updates, run folder.


class DataError(ValueError):
    status = 1  # exit status of the program if data or files cannot be used


class ConfigError(DataError):
    status = 2  # and if an option cannot


class SimulatorError(DataError):
    """An environment failed: an evaluation is skipped."""


def name_error(error: BaseException) -> str:
    """Type, message, file and line of an exception, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"{message}, {Path(frame.filename).name}:{frame.lineno}"


@contextlib.contextmanager
def explain(problem: str, kind: type = DataError) -> Iterator[None]:
    """Turns what a file, package or device raises into one line. Our own code stays outside: bugs keep tracebacks."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise kind(f"{problem} ({name_error(error)})") from error


COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
OPTIONAL = "action_low action_high reference_scores environment episode_returns encoding"
MAX_ENVS, MAX_STEPS = 32, 30_000  # evaluation episodes side by side; most steps of one, as a policy may stand still
GRAPH_UPDATES = 10  # updates in one CUDA graph
EVALUATION = (
    "eval_return eval_return_std d4rl_normalized_score updates_per_second "
    "eval_length eval_success eval_predicted_value eval_discounted_return"
)
# Wrappers of a recording in which a policy is played too, and those that change nothing.
WRAPPERS = "RescaleAction ClipAction RescaleObservation FlattenObservation ClipReward TimeAwareObservation StickyAction"
IDLE_WRAPPERS = "RecordEpisodeStatistics RecordVideo OrderEnforcing PassiveEnvChecker"
# local: the network that acts, and that policy.pt holds
Policy = TanhGaussianActor
# local: limits of the options, both ends included, or the words that an option takes
LIMITS = {
    "seed eval_seed bc_steps cql_backprop_actions policy_lr qf_lr cql_alpha alpha_multiplier": (0, 1e12),
    "offline_iterations online_iterations warmup_steps cql_alpha_online": (0, 1e12),
    "eval_freq n_episodes batch_size buffer_size log_interval n_online_envs utd_ratio": (1, 1e12),
    "mixing_ratio": (-1, 1),
    "target_update_period cql_n_actions hidden_dim policy_n_hidden_layers q_n_hidden_layers": (1, 1e6),
    "reward_scale reward_bias policy_log_std_multiplier cql_target_action_gap failure_reward": (-1e12, 1e12),
    "discount soft_target_update_rate": (0, 1),
    "holdout_fraction": (0, 0.9),
    "reward_clip cql_temp": (1e-6, math.inf),
    "cql_clip_diff_min": (-math.inf, 1e12),
    "cql_clip_diff_max": (-1e12, math.inf),
    "precision": ("float32", "tf32", "bfloat16"),
}


def check_config(config: Any) -> None:
    """Fills in what depends on the machine. Raises ConfigError for a value outside its limits."""
    config.checkpoints_path = config.checkpoints_path or "runs"
    config.run_id = config.run_id or os.environ.get("WANDB_RUN_ID") or None
    for names, limits in LIMITS.items():
        for name in names.split():
            value = getattr(config, name)
            if isinstance(limits[0], str):
                valid, takes = value in limits, ", ".join(limits)
            else:
                valid = value is None or limits[0] <= value <= limits[1]
                takes = f"a number from {limits[0]:g} to {limits[1]:g}"
            if not valid:
                raise ConfigError(f"--{name} takes {takes}, not {value}")
    with explain(f"--device {config.device} cannot be used here; try --device cpu", ConfigError):
        torch.empty(0, device=config.device)


def convert(name: str, text: str, kind: Any) -> Any:
    """An option's value from its text on the command line or in YAML. Raises ConfigError for any other text."""
    kind, *optional = get_args(kind) or (kind,)
    if optional and text in ("None", "null", "~", ""):
        return None
    with contextlib.suppress(OverflowError, ValueError):
        if kind is bool:
            return ["false", "true"].index(text.lower()) == 1
        value = text if kind is str else float(text.replace(".inf", "inf"))
        if kind(value) == value:
            return kind(value)
    takes = {str: "text", bool: "True or False", int: "a whole number", float: "a number"}[kind]
    raise ConfigError(f"--{name} takes {takes}{' or None' if optional else ''}, not {text[:100]!r}")


def parse_arguments(config_class: type) -> Any:
    """The configuration from the command line and the YAML file that --config_path names: pyrallis without its silent
    conversions (`--flag=maybe` to True, `--seed=1.9` to 1, `--see` to --seed). Raises ConfigError."""
    place = ""

    def fail(message: str) -> None:
        raise ConfigError(f"{place}{message[:500]} (write --option=value); --help lists the options")

    kinds = get_type_hints(config_class)
    getsource, inspect.getsource = inspect.getsource, functools.cache(inspect.getsource)  # else it runs once per option
    parser = pyrallis.argparsing.ArgumentParser(config_class=config_class, allow_abbrev=False)
    inspect.getsource = getsource
    parser.error, parser._postprocessing = fail, vars
    for action in parser._actions:
        if kind := kinds.get(action.dest):
            action.type, action.metavar = str, inspect.formatannotation(kind)
    options = parser.parse_args()
    if path := options.pop("config_path", None):
        with explain(f"--config_path {path} cannot be read as a YAML file of lines `option: value`", ConfigError):
            content = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader)  # strings, as on the command line
            words = ["--" + name + "=" + value for name, value in content.items()]
        place = f"--config_path {path}: "
        if content.keys() & {"config_path", "help"}:
            fail("config_path and help are options of the command line alone")
        options = parser.parse_args(words) | options
    return config_class(**{name: convert(name, text, kinds[name]) for name, text in options.items()})


def flatten(observations: Any, space: gym.Space) -> np.ndarray:
    """One vector per observation, [N, ...] -> [N, O]: parts of Dicts (goal environments) in the sorted order of their
    keys, without texts (of any space); Discrete ones one-hot. Raises DataError for other kinds and for images."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(observations[key], part) for key, part in sorted(space.items())], axis=-1)
    if isinstance(space, gym.spaces.Discrete):
        return (np.asarray(observations)[..., None] == space.start + np.arange(space.n)).astype(np.float32)
    if isinstance(observations[0], str):
        return np.empty((len(observations), 0), dtype=np.float32)
    if not space.shape or len(space.shape) > 1 and math.prod(space.shape) > 1024:
        raise DataError(f"observations are {space}; this script takes vectors, small grids, and Dicts of them")
    return np.reshape(observations, (len(observations), -1))


def load_dataset(name: str) -> dict[str, Any]:
    """The transitions of a dataset in order: an imported one, or a Minari one, local or else downloaded; a name of D4RL
    stands for d4rl/<name>. This is the one function to replace for other data. Raises DataError.

    observations [T, O], actions [T, A] in the environment's units, rewards [T], next_observations [T, O], and the flags
    terminals [T] (the next state is terminal) and timeouts [T] (the episode ends for another reason). Optional:
    action_low, action_high [A], reference_scores [2] (returns that score 0 and 100), environment (what gym.make takes,
    and `wrappers`: names and arguments), episode_returns [episodes] (where they are not the sums of the rewards) and
    encoding (names, categories and offsets of a table's columns, see docs/data.md). Of discrete actions also masks and
    next_masks [T, number of actions] and propensities [T].
    """
    path = minari.storage.get_dataset_path(name)
    if "/" not in name and not path.exists():
        name, path = f"d4rl/{name}", path.parent / "d4rl" / name
    if name.startswith("d4rl/") and not path.exists():
        raise DataError(f"--env {name}: import it to {path} by: python benchmarks/import_data.py {name[5:]}")
    problem = (
        f"--env {name} cannot be read from {path}; record or import it (import_data.py --list shows what is there)"
    )
    with explain(problem):
        if not path.exists():
            minari.download_dataset(name)
        imported = (path / "metadata.json").exists()
        metadata = json.loads((path / ("" if imported else "data") / "metadata.json").read_text("utf-8"))
    if imported and (path / "data").exists():
        raise DataError(f"--env {name}: {path} holds two datasets, metadata.json and data: remove one")
    if imported:
        return load_flat(name, path, metadata, problem)
    # If spaces are missing, Minari makes the environment, by an entry point that could name any code.
    if not {"observation_space", "action_space"} <= metadata.keys():
        raise DataError(f"{problem} (its metadata lacks the spaces)")
    with explain(problem):
        dataset = minari.load_dataset(name)
    data, parts = action_bounds(dataset.action_space, f"--env {name}"), []
    for i in range(len(dataset)):
        with explain(problem):
            episode = dataset[i]
        observations = flatten(episode.observations, dataset.observation_space)
        actions = np.reshape(episode.actions, (len(episode.actions), -1))
        # The next observation is known at time-outs too, so that they bootstrap.
        timeouts = np.append(episode.truncations[:-1], True) & ~episode.terminations
        parts.append((observations[:-1], actions, episode.rewards, observations[1:], episode.terminations, timeouts))
    data |= dict(zip(COLUMNS, map(np.concatenate, zip(*parts))))
    scores = [metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    if None not in scores:
        data["reference_scores"] = scores
    if spec := dataset._eval_env_spec or dataset.env_spec:  # an entry point in it is ignored: it could be any code
        spec.kwargs.pop("render_mode", None)  # the recording may have had a window
        wrappers = [(wrapper.name, wrapper.kwargs) for wrapper in spec.additional_wrappers]
        named = {"id": spec.id, "max_episode_steps": spec.max_episode_steps, "wrappers": wrappers}
        data["environment"] = spec.kwargs | named
    return data


def load_flat(name: str, path: Path, metadata: dict[str, Any], problem: str) -> dict[str, Any]:
    """Reads an imported dataset: one .npy file per column, and the rest in metadata.json. Raises DataError."""
    with explain(problem):
        form = metadata["format"], metadata["kind"]
        if form != (1, "transitions"):
            raise DataError(f"--env {name} has format {form}, not (1, 'transitions'); cql_atari.py reads frames")
        data = {key: np.load(path / f"{key}.npy") for key in COLUMNS}
        data |= {key: np.load(path / f"{key}.npy") for key in OPTIONAL.split() if (path / f"{key}.npy").exists()}
        kind, shape = np.int64 if data["actions"].dtype.kind == "i" else np.float64, data["actions"].shape[1:]
        low, high = (np.array(metadata[f"action_{end}"], kind).reshape(shape) for end in ("low", "high"))
    data |= {key: metadata[key] for key in OPTIONAL.split() if metadata.get(key) is not None}
    if kind == np.int64:
        space = gym.spaces.MultiDiscrete(high - low + 1, start=low)
    else:
        space = gym.spaces.Box(low, high, dtype=kind)
    return data | action_bounds(space, f"--env {name}")


def check_dataset(data: dict[str, Any], config: Any) -> None:
    """Converts columns to float32, flags to bool, and whole numbers of actions to int64. Raises DataError for data that
    cannot be trained on."""
    known = {*COLUMNS, *OPTIONAL.split()}
    if unknown := data.keys() - known:
        raise DataError(f"--env {config.env}: unknown columns {sorted(unknown)}; known are {sorted(known)}")
    n = len(data.get("rewards", ()))
    for key in COLUMNS:
        wide = np.asarray(data.get(key, ()))
        column = wide.astype(np.int64 if key == "actions" and wide.dtype.kind in "iu" else np.float32, copy=False)
        if (
            column.ndim != 1 + key.endswith(("observations", "actions"))
            or len(column) != n
            or not (column.size or config.env == "none")
        ):
            raise DataError(f"--env {config.env}: {key} have shape {list(column.shape)}, with {n} transitions")
        if (bad := ~(np.abs(column) < 1e15)).any():
            fault = f"NaN, infinity or huge numbers, first in transition {np.argwhere(bad)[0, 0]}"
            raise DataError(f"--env {config.env}: {key} hold {fault}")
        if key in ("terminals", "timeouts") and not np.isin(column, (0, 1)).all():
            raise DataError(f"--env {config.env}: {key} are 0 or 1, not {column.min():g} to {column.max():g}")
        if coarse := coarse_columns(wide, column):
            cure = "subtract a constant (the import of a table does), or use a larger unit"
            raise DataError(f"--env {config.env}: float32 has too few digits for {key} {coarse}: {cure}")
        data[key] = column.astype(bool) if key in ("terminals", "timeouts") else column
    if n > config.buffer_size:
        raise ConfigError(f"--buffer_size {config.buffer_size} is less than the data's {n} transitions; raise it")


def coarse_columns(wide: np.ndarray, narrow: np.ndarray) -> list[int]:
    """Returns the columns [T(, A)] that float32 changes, since they hold large numbers in a small range, or in which it
    makes whole numbers equal (such as times, where 0 means never)."""
    coarse = []
    for i, (x, y) in enumerate(zip(np.atleast_2d(wide.T), np.atleast_2d(narrow.T))):
        if (x == y).all():
            continue
        step, spread = np.spacing(np.abs(y).max()), float(x.max()) - float(x.min())
        merged = (x == np.rint(x)).all() and len(np.unique(y)) < len(np.unique(x))
        if spread > 1e-5 and step > 1e-3 * spread or step >= 1 and step > 1.5e-7 * spread or merged:
            coarse.append(i)
    return coarse


def episodes(data: dict[str, Any], discount: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each transition's episode number and its discounted return to the end of the episode, [T], and the return
    of each episode (the dataset's own, if it has them), except for a last one that was cut short."""
    ends, to_go, following = data["terminals"] | data["timeouts"], [], 0.0
    numbers = np.append(0, ends.cumsum()[:-1])
    for reward, end in zip(data["rewards"][::-1].tolist(), ends[::-1].tolist()):
        following = reward + discount * following * (not end)
        to_go.append(following)
    returns, lengths = np.bincount(numbers, weights=data["rewards"]), np.bincount(numbers)
    cut_short = not data["terminals"][-1] and lengths[-1] < lengths.max()
    return numbers, np.array(to_go[::-1]), data.get("episode_returns", returns[: len(returns) - cut_short])


# local: continuous actions
def action_bounds(space: gym.Space, name: str) -> dict[str, Any]:
    """Lowest and highest action, [A]. Raises DataError."""
    if not isinstance(space, gym.spaces.Box):
        raise DataError(f"{name} has actions {space}, this script takes Box ones; see algorithms/discrete/cql_dqn.py")
    return {"action_low": space.low.ravel(), "action_high": space.high.ravel()}


# local: continuous actions
def encode_actions(data: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales actions [T, A] from the box of action_low and action_high (-1 and 1 if unknown) to [-1, 1]; returns
    the box too, [A]. Raises DataError for actions outside it by more than 1e-3 of the range; others are clipped."""
    actions, size = data["actions"], data["actions"].shape[1:]
    low, high = np.broadcast_to(data.get("action_low", -1.0), size), np.broadcast_to(data.get("action_high", 1.0), size)
    largest = np.maximum(1e6, 1000 * np.abs(actions).max(axis=0, initial=0))  # a larger bound means no bound
    if not ((-largest < low) & (low < high) & (high < largest)).all():
        raise DataError(f"--env {name}: actions need bounds of about their own size, not {low} to {high}")
    scaled = (actions.astype(np.float64) - low) * (2 / (high.astype(np.float64) - low)) - 1
    if np.abs(scaled).max(initial=0) > 1 + 2e-3:
        raise DataError(f"--env {name}: actions from {actions.min()} to {actions.max()} are outside {low} to {high}")
    return scaled.clip(-1, 1).astype(np.float32), low, high


def linear_layers(sizes: list[int], orthogonal: bool) -> list[nn.Linear]:
    """Layers from size to size. The last one starts near zero, and so do values and mean actions."""
    layers = [nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:])]
    for layer in layers[:-1] if orthogonal else ():
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
        nn.init.zeros_(layer.bias)
    init_last = nn.init.orthogonal_ if orthogonal else nn.init.xavier_uniform_
    init_last(layers[-1].weight, gain=1e-2)
    nn.init.zeros_(layers[-1].bias)
    return layers


def holdout_batch(config: Any, data: dict[str, np.ndarray]) -> Batch:
    """The same held-out transitions for each evaluation: at most ten minibatches."""
    rows = np.random.default_rng(config.seed).permutation(len(data["rewards"]))[: 10 * config.batch_size]
    return ReplayBuffer(data, config.device).rows(rows)


class Task:
    """The rewards to train on, and the environments to evaluate in (None without a simulator)."""

    data_return, failed = None, False  # mean discounted return of the data; whether an evaluation failed

    def __init__(self, config: Any, data: dict[str, Any]):
        """Narrows the bounds of actions in `data` to the environment's. Raises ConfigError or DataError."""
        check_dataset(data, config)
        self.config, self.reference = config, data.get("reference_scores")
        if self.reference is not None and not -math.inf < self.reference[0] < self.reference[1] < math.inf:
            print(f"{config.env}: no scores, as {self.reference[0]} and {self.reference[1]} cannot score 0 and 100")
            self.reference = None
        self.arguments = recorded = data.get("environment", {"id": "none"})
        id = config.eval_env or recorded["id"]
        if id.rpartition(":")[2] != recorded["id"]:  # MODULE:ID may name the recorded one
            self.arguments = {}
            if "none" not in (id, recorded["id"]):
                print(f"{id} is made with its defaults; the data were recorded in {recorded}")
        self.arguments = self.arguments | {"id": id}
        n = math.ceil(config.n_episodes / math.ceil(config.n_episodes / MAX_ENVS))  # so that all waves are alike
        self.envs = make_environments(config.eval_env, n, **self.arguments)
        self.factor, self.offset = (config.reward_scale, config.reward_bias) if config.normalize_reward else (1.0, 0.0)
        words = set(re.split("[^a-z0-9]+", f"{config.env} {self.arguments['id']}".lower()))
        if config.normalize_reward and words & {"halfcheetah", "hopper", "walker2d"} and config.env != "none":
            spread = float(np.ptp(episodes(data)[2]))
            if spread == 0:
                raise DataError(f"--normalize_reward: all episodes of {config.env} have the same return")
            self.factor *= 1000 / spread
        # A hundred times the largest possible return: conservative values may well be below any return.
        largest_reward = float(np.abs(self.training_rewards(data["rewards"])).max(initial=1))
        self.value_limit = 100 * largest_reward / max(1 - config.discount, 1e-4)
        self.encoding = json.loads(json.dumps(data.get("encoding")))
        if self.envs:
            columns = self.encoding["observations"] + self.encoding["actions"] if self.encoding else []
            if "masks" in data or any(x.get("offset") for x in columns):
                unknown = "masks" if "masks" in data else "offsets"
                raise ConfigError(f"an environment does not know the {unknown} of {config.env}: give --eval_env none")
            narrow_actions(data, self.envs, config.env)

    def training_rewards(self, rewards: np.ndarray) -> np.ndarray:
        return np.clip(rewards * self.factor + self.offset, -self.config.reward_clip, self.config.reward_clip)

    def score(self, returns: np.ndarray) -> dict[str, Optional[float]]:
        """Mean, spread and score of episodes; the reference returns, if known, score 0 and 100."""
        mean, std, score = float(returns.mean()), float(returns.std()), None
        if self.reference is not None:
            score = float(100 * (mean - self.reference[0]) / np.ptp(self.reference))
        return {"eval_return": mean, "eval_return_std": std, "d4rl_normalized_score": score}

    def check(self, metrics: dict[str, Any], agent: Any) -> dict[str, Any]:
        """Returns the metrics. Raises DataError for NaN and infinity, and for mean values beyond any possible one."""
        norm = nn.utils.get_total_norm(agent.parameters()).item()
        for name, value in (metrics | {"the norm of all weights": norm}).items():
            limit = self.value_limit if name.startswith(("average_", "eval_predicted")) else sys.float_info.max
            if value is not None and not abs(value) <= limit:
                place = f"{name} is {value:.4g} at update {agent.n_updates:,}; what was saved before is intact"
                weight = "cql_alpha" if hasattr(self.config, "cql_alpha") else "divergence_weight"
                raise DataError(f"training diverged: {place}; try smaller learning rates or a larger {weight}")
        return metrics

    def evaluate(self, agent: Any, holdout: Any) -> dict[str, Any]:
        """The evaluation's columns of metrics.csv: empty without an environment and, with a warning, if it fails."""
        row, config = dict.fromkeys(EVALUATION.split()) | {"data_discounted_return": self.data_return}, self.config
        agent.eval()
        with torch.random.fork_rng([config.device] if "cuda" in config.device else []):
            torch.manual_seed(config.eval_seed)
            result = {}
            try:
                if self.envs:
                    result = rollout(agent.actor.act, self.envs, config.n_episodes, config.eval_seed)
            except SimulatorError as error:
                tqdm.write(f"warning: no evaluation at update {agent.n_updates:,}: {error}", file=sys.stderr)
                if error.__cause__ and not self.failed:
                    traceback.print_exception(error.__cause__)
                self.failed = True
            if result:
                starts = result.pop("first_observations")
                if not getattr(config, "bc_only", False):  # a clone has no values
                    result["predicted_value"] = agent.start_values(starts)
                rewards = map(self.training_rewards, result.pop("rewards"))
                result["discounted_return"] = [(x * config.discount ** np.arange(len(x))).cumsum()[-1] for x in rewards]
                if not np.isnan(result["success"]).all():  # else the environment reports none
                    result["success"] = np.nan_to_num(result["success"])
                row |= {f"eval_{name}": float(np.mean(x)) for name, x in result.items() if not np.isnan(x).any()}
                row |= self.score(np.array(result["return"]))
            row |= agent.holdout_metrics(holdout) if len(holdout.rewards) else {}
        agent.train()
        return row


def evaluate(policy: Callable, env: str, n_episodes: int, seed: int, **arguments: Any) -> dict[str, list]:
    """Plays a policy in the Gymnasium environment `env`, made with these arguments (see load_dataset's `environment`).
    Returns what rollout returns. Raises DataError."""
    n = math.ceil(n_episodes / math.ceil(n_episodes / MAX_ENVS))
    with contextlib.closing(make_environments(env, n, env, **arguments)) as envs:
        action_bounds(envs.single_action_space, env)  # refuses actions of another kind
        return rollout(policy, envs, n_episodes, seed)


def rollout(policy: Callable, envs: Any, n_episodes: int, seed: int) -> dict[str, list]:
    """Plays one episode from each reset seed `seed` + i. Returns lists over the episodes: first_observations [O],
    rewards [length], return, length, and success, NaN where none is reported. Raises SimulatorError."""
    space, problem, episodes = envs.single_observation_space, f"{envs.spec.id} failed", []
    for first_seed in range(seed, seed + n_episodes, envs.num_envs):
        running, steps = np.full(envs.num_envs, True), []
        with explain(problem, SimulatorError):
            observations, _ = envs.reset(seed=first_seed)
        observations = starts = flatten(observations, space)
        while running.any() and len(steps) < MAX_STEPS:
            if not np.isfinite(observations).all():
                raise SimulatorError(f"{problem} (an observation is NaN or infinite)")
            actions = to_space(policy(observations), envs.action_space)
            with explain(problem, SimulatorError):
                observations, rewards, terminated, truncated, infos = envs.step(actions)
            observations = flatten(observations, space)
            if not np.isfinite(rewards).all():
                raise SimulatorError(f"{problem} (a reward is NaN or infinite)")
            steps.append((rewards, infos["success"], running))
            running = running & ~(terminated | truncated)
        for start, (rewards, successes, ran) in zip(starts, np.transpose(steps)):  # [T] each
            rewards = rewards[ran > 0]  # what an environment plays after its episode does not count
            result = {"return": rewards.cumsum()[-1], "length": len(rewards), "rewards": rewards}
            episodes.append(result | {"first_observations": start, "success": np.fmax.reduce(successes[ran > 0])})
    return {name: [episode[name] for episode in episodes[:n_episodes]] for name in episodes[0]}


class Success(gym.Wrapper):
    """Replaces `info` by the success: a number, NaN if the environment reports none."""

    def reset(self, **options: Any) -> tuple[Any, dict]:
        return self.env.reset(**options)[0], {}

    def step(self, action: Any) -> tuple:
        *result, info = self.env.step(action)
        reported = [math.nan]
        for key in {"success", "is_success", "goal_achieved"} & info.keys():
            with contextlib.suppress(TypeError, ValueError):  # None, a string, several numbers
                reported.append(float(np.asarray(info[key]).item()))
        return *result, {"success": float(np.fmax.reduce(reported))}


def make_environments(
    eval_env: Optional[str], n: int, /, id: str, wrappers: Any = (), **arguments: Any
) -> Optional[gym.vector.SyncVectorEnv]:
    """Returns None if none is wanted, or Gymnasium does not know the dataset's. Raises ConfigError or DataError."""
    kind = ConfigError if eval_env else DataError
    problem = f"environment {id} cannot be made; --eval_env takes another, MODULE:ID (local: PYTHONPATH=.), or none"
    if id not in gym.registry and id != "none" and importlib.util.find_spec("gymnasium_robotics"):
        with explain(problem, kind), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
    if id not in gym.registry and eval_env in (None, "none"):  # a name in data could import any module
        return None
    makers = []
    for name, options in wrappers:
        if name in WRAPPERS.split() and options is not None:
            makers.append(functools.partial(getattr(gym.wrappers, name), **options))
        elif name in IDLE_WRAPPERS.split():
            print(f"{id}: the recording's {name} changes nothing and is left out")
        else:
            raise kind(f"{problem} (it was recorded through {name}, which this script does not know)")
    with explain(problem, kind):
        return gym.make_vec(id, n, "sync", wrappers=[*makers, Success], **arguments)


def narrow_actions(data: dict[str, Any], envs: gym.vector.SyncVectorEnv, name: str) -> None:
    """Narrows the bounds of actions in `data` to the environment's. Raises DataError."""
    id, own = envs.spec.id, action_bounds(envs.single_action_space, envs.spec.id)
    first = flatten(envs.observation_space.sample(), envs.single_observation_space)
    sizes, own_sizes = [data[x].shape[1] for x in COLUMNS[:2]], [first.shape[1], own["action_low"].size]
    if sizes != own_sizes:
        raise DataError(f"{name} has observations and actions of sizes {sizes}, {id} {own_sizes}: change --eval_env")
    for key, narrower in (("action_low", np.maximum), ("action_high", np.minimum)):
        bound = data.get(key, own[key])
        data[key] = narrower(bound, own[key])
        if not np.allclose(bound, own[key]):
            print(f"{key}: {bound} in {name}, {own[key]} in {id}; {data[key]} is used")


def to_space(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """Actions in shape and type of a space, rounded if it takes whole numbers. Raises DataError for another size."""
    if np.issubdtype(space.dtype, np.integer):
        actions = np.rint(actions)
    with explain(f"actions do not fit the environment's, {space}"):
        return np.reshape(actions, space.shape).astype(space.dtype)


def describe(row: dict[str, Any]) -> str:
    """The score as text; without one, held-out metrics, or else those of training."""
    if row["eval_return"] is not None:
        text, score = f"return {row['eval_return']:.1f} ± {row['eval_return_std']:.1f}", row["d4rl_normalized_score"]
        return text if score is None else f"score {score:.1f} ({text})"
    others = ["qf1_loss", "qf_loss", "cql_qf1_diff", "cql_qf_diff", "average_qf1", "average_qf"]
    others += ["policy_loss", "behaviour_loss"]
    shown = [name for name in row if name.startswith("holdout_")] or others
    return ", ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)


def prepare_data(config: Any, data: dict[str, Any], task: Task, checkpoint: Any) -> tuple[dict, dict, dict]:
    """Transitions to train on and held-out ones, as the networks see them, and the scaling of actions and observations
    (the checkpoint's, if there is one). Arrays in `data` are replaced one by one, to save memory."""
    numbers, _, returns = episodes(data)
    data["actions"], low, high = encode_actions(data, config.env)
    data["rewards"] = task.training_rewards(data["rewards"])
    task.data_return, n_episodes = float(episodes(data, config.discount)[1].mean()), numbers[-1] + 1
    sizes, behaviour = f"{len(numbers):,} transitions, {n_episodes:,} episodes", describe(task.score(returns))
    print(f"{config.env}: {sizes}, behaviour {behaviour}, mean discounted return {task.data_return:.4g}")
    n_held_out = min(math.ceil(config.holdout_fraction * n_episodes), n_episodes - 1)
    if config.holdout_fraction and not n_held_out:
        print(f"{config.env}: the data are one episode, so nothing is held out and there are no holdout metrics")
    held_out = np.isin(numbers, np.random.default_rng(config.seed).permutation(n_episodes)[:n_held_out])
    columns = [key for key in (*COLUMNS, "masks", "next_masks") if key in data]
    holdout = {key: data[key][held_out] for key in columns}
    data = {key: data.pop(key)[~held_out] if n_held_out else data.pop(key) for key in columns}
    size = data["observations"].shape[1]
    mean, std = np.zeros(size, np.float32), np.ones(size, np.float32)
    if checkpoint:
        mean, std = (checkpoint["policy"]["weights"][f"observation_{x}"].cpu().numpy() for x in ("mean", "std"))
    elif config.normalize:
        mean, std = data["observations"].mean(0, dtype=np.float64).astype(np.float32), scale(data["observations"])
        constant = np.flatnonzero(np.ptp(data["observations"], axis=0) == 0)
        if constant.size:
            names = number_names(task.encoding, size)
            told = ", ".join(names[i] for i in constant)[:500]
            print(f"{config.env}: constant in the data, so divided by 1: {told}")
    if len(mean) != size:
        raise DataError(f"{config.env} has observations that are not of the checkpoint's size {len(mean)}")
    for part, key in itertools.product((data, holdout), ("observations", "next_observations")):
        part[key] = part[key] - mean
        part[key] /= std
    scaling = {"observation_mean": mean, "observation_std": std, "action_low": low, "action_high": high}
    return data, holdout, {name: torch.tensor(x) for name, x in scaling.items()}


def scale(columns: np.ndarray) -> np.ndarray:
    """Returns what to divide columns by, [T, O] -> [O]: their standard deviation, or more, so that rare values do not
    become huge; 1 where a column is constant."""
    std, spread = np.array([x.std(dtype=np.float64) for x in columns.T]), np.ptp(columns, axis=0)
    return np.where(spread > 0, np.maximum(std + np.minimum(1e-3, std / 10), spread / 100), 1.0).astype(np.float32)


def save(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text, or tensors and plain values. The file holds the old or the new content, even if the process dies or
    the disk is full. Raises DataError."""
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    buffer.write(content.encode()) if isinstance(content, str) else torch.save(content, buffer)
    with explain(f"{path} cannot be written; what was saved before is intact"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load(path: Path | str, device: str, *keys: str) -> dict[str, Any]:
    """Reads a file of a run with these keys: tensors and plain values, nothing that could run. Raises DataError."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        return content | {key: content[key] for key in keys}
    except Exception as error:  # torch's messages are pages of advice
        kind = "checkpoint.pt" if keys else "checkpoint.pt or policy.pt"
        fault = f"is not a {kind} of a run, or is damaged" if os.path.exists(path) else "does not exist"
        raise DataError(f"{path} {fault}") from error


def load_policy(path: Path | str, device: str = "cpu") -> Callable[[Any], Any]:
    """The deterministic policy of a policy.pt or checkpoint.pt, policy(observation) -> action: from raw observations,
    [O] or [B, O], to actions in the environment's units, [A] or [B, A]. If the data are a table, it also takes a row by
    name, a dict or a pandas row in the table's own values, and returns a dict. Raises DataError."""
    state = load(path, device)
    with explain(f"{path} is not a policy.pt or checkpoint.pt of this script"):
        state = state.get("policy", state)
        actor = Policy(*state["sizes"]).to(device)
        actor.load_state_dict(state["weights"])
    policy = functools.partial(act, actor.eval())
    policy.network, policy.encoding = actor, state.get("encoding")
    actor.encoding = policy.encoding
    return policy


def as_observations(observations: Any, like: Tensor) -> Tensor:
    """Raw observations, [O] or [B, O], as a tensor on the device of `like`, their means. Raises DataError."""
    with explain(f"an observation is {len(like)} finite numbers"):
        array = np.asarray(observations, dtype=np.float32)
    if array.shape[-1:] != like.shape or not np.isfinite(array).all():
        raise DataError(f"an observation takes {len(like)} finite numbers (not NaN, infinity or shape {array.shape})")
    return torch.tensor(array, device=like.device)


def number_names(encoding: Optional[dict[str, Any]], size: int) -> list[str]:
    """Names of the numbers of an observation, [O]."""
    names = []
    for column in (encoding or {}).get("observations") or [{"name": f"observations[{i}]"} for i in range(size)]:
        names += [f"{column['name']}={value}" for value in column.get("values", ())] or [column["name"]]
    return names


def check_encoding(first: Any, second: Any, problem: str) -> None:
    """Raises DataError if the columns of two tables differ in name, order, categories, offset or bounds."""
    if bool(first) != bool(second):
        print(f"{problem}: only the {'first' if first else 'second'} has names of columns, so they cannot be compared")
    for part in ("observations", "actions", "masks") if first and second else ():
        for own, other in itertools.zip_longest(*(x.get(part, ()) for x in (first, second)), fillvalue="none"):
            if own != other:
                columns = f"{str(own)[:500]} and {str(other)[:500]}"
                raise DataError(f"{problem} differ in {part}: {columns}; import the data with --like <the other>")


def find_value(row: Any, name: str) -> Any:
    """The value of a column of a row; state[0] may be the first one of a list in the column state. [] if missing."""
    base, bracket, place = name.rpartition("[")
    if name in row or not bracket:
        return row.get(name, [])
    values, place = find_value(row, base), place.removesuffix("]")
    known = isinstance(values, (list, tuple, np.ndarray)) and place.isdecimal() and int(place) < len(values)
    return values[int(place)] if known else []


def encode_row(row: Any, columns: list[dict[str, Any]]) -> np.ndarray:
    """The observation of a row by name, a dict or pandas row in the table's own values: -> [O]. Raises DataError."""
    numbers = []
    for name, column in ((x["name"], x) for x in columns):
        value = find_value(row, name)
        if np.ndim(value):
            raise DataError(f"column {name} is missing, or has several values: give one row at a time")
        known = [str(x) for x in column.get("values", ())]
        problem = f"column {name} is {value!r}, but takes {', '.join(known)[:500] or 'a finite number'}"
        with explain(problem):
            missing = value is None or bool(value != value)
            coded = [str(value) == x for x in known] or [float(value) - column["offset"]]
        if missing or not np.isfinite(coded).all() or known and not any(coded):
            raise DataError(problem)
        numbers += coded
    return np.array(numbers, dtype=np.float64)


def act(actor: Any, observations: Any) -> Any:
    """Actions for observations; for a row by name, the action by name, in the table's own values. Raises DataError."""
    columns = (actor.encoding or {}).get("observations")
    if not columns or not hasattr(observations, "keys"):
        return actor.act(observations)
    return name_action(actor.act(encode_row(observations, columns)), actor.encoding["actions"])


def name_action(action: np.ndarray, columns: list[dict[str, Any]]) -> dict[str, Any]:
    """An action, [A], by name and in the table's own values."""
    named = {}
    for column, x in zip(columns, np.ravel(action).tolist()):
        if "values" in column:
            named[column["name"]] = column["values"][x - column["low"]]
        else:
            named[column["name"]] = min(max(x + column["offset"], column["low"]), column["high"])
    return named


class Signals:
    """The first signal waits until `run_until` ends between two updates, so that the run is saved. The second one ends
    the program at once, and so does the first while nothing is trained (wait is False)."""

    wait, received = False, 0

    @classmethod
    def receive(cls, number: int, _: Any) -> None:
        if cls.received or not cls.wait:
            os._exit(128 + number)  # an exception could get lost in the compiler
        cls.received = number


def updater(config: Any, agent: Any, sample: Callable, run: Any = None) -> Callable[[int], None]:
    """Compiles the losses, and returns a function that updates the agent up to a number of updates, or a signal. On a
    GPU, GRAPH_UPDATES of them form one CUDA graph: a single launch for all their kernels."""
    on_gpu, graph, eager_until = "cuda" in config.device, None, math.inf
    torch.set_flush_denormal(True)  # a CPU is several times slower on the tiny soft-max weights of bad actions
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what an update frees for the next one
        for parameter, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(parameter, value)
    if (config.compile or (config.compile is None and on_gpu)) and not Signals.received:
        Signals.wait = False  # a signal to the whole group ends the compiler's processes: nobody would answer
        torch._dynamo.config.trace_autograd_ops = True  # losses and gradients in one graph
        compiled = torch.compile(agent.gradients, fullgraph=True, options={"fallback_random": True})  # eager's numbers
        with torch.random.fork_rng([config.device] if on_gpu else []):
            batch, phases = sample(config.batch_size), {*agent.phases()}
            for phase in phases:
                agent.gradients(batch, *phase)  # a bug shows here, not as the compiler's failure
            try:
                for phase in phases:
                    compiled(batch, *phase)
                agent.compute_gradients = compiled
                if on_gpu and config.target_update_period == 1:  # so that all updates of a graph are alike
                    eager_until = agent.n_updates + 3  # 3 make Adam's moments
            except Exception as error:  # no compiler, no Triton, too old a GPU
                reason = f"--compile False avoids this ({name_error(error)})"
                print(f"warning: not compiled, so slower; {reason}", file=sys.stderr)
    Signals.wait = True

    def update() -> None:
        metrics = agent.update(sample(config.batch_size))
        if run:
            run.add(metrics)

    def run_until(step: int, progress: Any = None) -> None:
        nonlocal graph, eager_until
        started = time.perf_counter()
        while agent.n_updates < step and not Signals.received:
            before, alike = agent.n_updates, len({*agent.phases()}) == 1
            graphed = alike and before >= eager_until and step - before >= GRAPH_UPDATES
            if graphed and not graph:
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(graph):  # which runs nothing on the device
                        for _ in range(GRAPH_UPDATES):
                            update()
                except Exception as error:
                    print(f"warning: no CUDA graph, so slower ({name_error(error)})", file=sys.stderr)
                    graphed, eager_until = False, math.inf
                agent.n_updates = before
            if graphed:
                graph.replay()
                agent.n_updates = before + GRAPH_UPDATES
            else:
                update()
            if progress is not None:
                progress.update(agent.n_updates - before)
        if run:
            run.seconds += time.perf_counter() - started

    return run_until


class Run:
    """A run's folder, means of metrics and W&B record. A resume reads checkpoint.pt; the other files are for people."""

    log_failed = False
    may_change = {"device", "n_episodes", "keep_policies", "project", "group", "name", "run_id", "checkpoints_path"}

    def __init__(self, config: Any, n_steps: int, *switches: int):
        """Reads what the run starts from, and writes nothing. Rows are due at switches too. Raises DataError."""
        name = config.run_id or f"{config.name}-{config.env}-{os.urandom(4).hex()}".replace("/", "-")
        self.config, self.n_steps, self.switches = config, n_steps, {n_steps, *switches}
        self.path, self.lock_file, self.checkpoint = Path(config.checkpoints_path, name), None, None
        self.rows, self.names, self.sums = [], [], torch.zeros(2, 1)  # [2, M + 1]: since the last record, and row
        self.done, self.seconds = 0, 0.0  # step of the last record; seconds of updates since the last row
        self.saved, self.save_seconds = time.perf_counter(), 0.0
        with contextlib.suppress(OSError):  # the folder does not exist yet or, of a finished run, is read-only
            self.lock()
        self.source, self.rng = self.path / "checkpoint.pt", torch
        self.resumed = self.source.exists()
        if not self.resumed:
            self.source = config.load_model
        if "cuda" in config.device:
            self.rng = torch.cuda
            torch.cuda.set_device(torch.device(config.device).index or 0)
        if self.source:
            keys = ("agent", "policy", "config", "rows", "means", "random")
            self.checkpoint = load(self.source, config.device, *keys)
        if self.resumed:
            self.rows, old, new = self.checkpoint["rows"], self.checkpoint["config"], vars(config)
            longer = {x for x in ("max_timesteps", "online_iterations") if new.get(x, 0) > old.get(x, 0)}
            names = sorted(new.keys() - self.may_change - longer)
            old = {x: old.get(x, getattr(type(config), x, None)) for x in names}  # options may be younger than the run
            changed = [f"{x} was {old[x]}, is {new[x]}" for x in names if old[x] != new[x]]
            if changed:
                raise ConfigError(f"{self.path} has other options, so give another --run_id: {'; '.join(changed)}")

    def lock(self) -> None:
        """Takes the folder for this process until it ends. Raises DataError."""
        self.lock_file = open(self.path / ".lock", "a")  # noqa: SIM115, open for the whole run
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is working in {self.path}; --run_id takes another name") from None
        except OSError:  # a file system without locks
            pass

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def is_complete(self) -> bool:
        return bool(self.rows) and self.last_step >= self.n_steps

    def stops(self, *freqs: int) -> Iterator[int]:
        """Yields the steps after the last record at which a record or a row is due, and multiples of `freqs`."""
        freqs = (self.config.eval_freq, self.config.log_interval, *freqs)
        if 0 in self.switches and not self.rows:
            yield 0
        while self.done < self.n_steps:
            yield min(*(x for x in self.switches if x > self.done), *(self.done - self.done % x + x for x in freqs))

    def is_row_due(self, step: int) -> bool:
        freq = self.config.eval_freq
        return step in self.switches or step // freq > self.last_step // freq

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Sums the metrics of an update on the device, so that no update waits for it."""
        values = F.pad(torch.stack(list(metrics.values())).double(), (0, 1), value=1.0)  # the last one counts
        if self.names != list(metrics):
            self.names, self.sums = list(metrics), values.new_zeros(2, len(values))
        self.sums[0].add_(values)  # in place, as a CUDA graph needs it

    def means(self, i: int = 0) -> dict[str, float]:
        *sums, n = self.sums[i].tolist()
        return {name: x / n for name, x in zip(self.names, sums)} if n else {}

    def next_record(self, step: int) -> dict[str, float]:
        """Returns the means since the last record, and begins the next one."""
        started = time.perf_counter()
        means, self.done = self.means(), step  # waits for the device
        self.seconds += time.perf_counter() - started
        self.sums[1].add_(self.sums[0])
        self.sums[0].zero_()
        return means

    def add_row(self, step: int, row: dict[str, Any]) -> dict[str, Any]:
        """Adds a row with the speed and the means since the last one, weighted by the counts of its records."""
        speed = self.sums[1, -1].item() / self.seconds if self.seconds else 0.0
        row = {"step": step} | row | {"updates_per_second": speed} | self.means(1)
        self.rows.append(row)
        self.progress.set_postfix_str(describe(row))
        self.progress.write(f"{self.unit} {step:,}: {describe(row)}, {speed:.0f} updates/s")
        self.seconds = 0.0
        self.sums[1].zero_()
        return row

    def restore(self, agent: Any, task: Task) -> None:
        """Sets the agent to where the run starts; a resumed run gets all the rest too. Raises DataError."""
        if not self.checkpoint:
            return
        encoding = self.checkpoint["policy"].get("encoding")
        check_encoding(encoding, task.encoding, f"{self.source} and --env {self.config.env}")
        configs = (self.checkpoint["config"], vars(self.config))
        norms = [x.get("critic_layer_norm", False) for x in configs]  # it has no weights that would tell
        sizes, own = ([*x, norm] for x, norm in zip((self.checkpoint["policy"]["sizes"], agent.actor.sizes), norms))
        if sizes != own:
            raise DataError(f"{self.source} holds a network of sizes {sizes}, and this run's has {own}")
        with explain(f"{self.source} does not hold this run's network"):
            agent.load_state_dict(self.checkpoint["agent"])
        if not self.resumed:
            agent.n_updates = 0
            return
        self.names, self.sums, self.done, self.seconds = self.checkpoint["means"]
        if len(self.checkpoint["random"]) == len(self.rng.get_rng_state()):  # else the device is of another kind
            self.rng.set_rng_state(self.checkpoint["random"].cpu())

    def save(self, agent: Any, step: Optional[int] = None, **more: Any) -> None:
        """Saves always at a row and without a step, at a record only if that costs little. Raises DataError."""
        started = time.perf_counter()
        if step not in (None, self.last_step) and started - self.saved < max(60, 20 * self.save_seconds):
            return
        policy = {"sizes": list(agent.actor.sizes), "weights": agent.actor.state_dict(), "encoding": self.encoding}
        state = {"config": vars(self.config), "rows": self.rows, "agent": agent.state_dict(), "policy": policy}
        state |= {"means": [self.names, self.sums, self.done, self.seconds], "random": self.rng.get_rng_state()} | more
        save(self.path / "policy.pt", policy)
        if self.config.keep_policies and self.rows and self.done == self.last_step:
            save(self.path / f"policy-{self.last_step}.pt", policy)
        if self.rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, dict.fromkeys(x for row in self.rows for x in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            save(self.path / "metrics.csv", text.getvalue())
        save(self.path / "checkpoint.pt", state)  # last: what it counts as done has been written
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - started

    def begin(self, task: Task, step: int, unit: str = "update") -> None:
        """Says what will happen, and starts a W&B record if the user is logged in, an agent started this or
        WANDB_MODE asks for it. W&B never stops or delays training: the run folder has everything."""
        if not self.lock_file:
            with explain(f"{self.path} cannot be written"):
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock()
        self.unit, self.encoding = unit, task.encoding
        config, id = self.config, task.arguments["id"]
        where = f"evaluated in {id}" if task.envs else "no evaluation, as no environment is named (--eval_env)"
        if not task.envs and id != "none":
            cure = f"--eval_env MODULE:{id} imports the module that registers it"
            where = f"no evaluation: Gymnasium does not know {id}; {cure}"
        print(f"{self.path}: {unit}s {step:,} to {self.n_steps:,}, a row every {config.eval_freq:,}, {where}")
        if getattr(config, "cql_lagrange", False) and config.cql_target_action_gap < 0:
            meaning = f"alpha_prime grows while the gap is above {config.cql_target_action_gap:g}"
            print(f"--cql_lagrange: {meaning}; in the authors' code a negative target gap means no multiplier")
        bfloat16 = any(found for name, found in torch.cpu.get_capabilities().items() if "bf16" in name)
        if config.precision == "bfloat16" and config.device == "cpu" and not bfloat16:
            print("warning: this processor lacks instructions for bfloat16; float32 is faster here", file=sys.stderr)
        save(self.path / "config.yaml", pyrallis.dump(config))
        # Otherwise W&B takes up to 15 s more to ask who is logged in, and 14 s to report its own use.
        os.environ |= {"WANDB_X_DISABLE_VIEWER": "true", "WANDB_ERROR_REPORTING": "false"}
        asked = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_SWEEP_ID")
        try:
            mode = None if asked or wandb.login(prompt=False, verify=False) else "disabled"
            self.wandb = wandb.init(
                project=config.project,
                group=config.group,
                name=self.path.name,
                id=config.run_id,
                config=vars(config),
                resume="allow",
                settings=wandb.Settings(init_timeout=20, finish_timeout=20),  # seconds
                mode=mode,
            )
        except Exception as error:  # no account, no network, no disk
            print(f"warning: W&B is off for this run ({name_error(error)})", file=sys.stderr)
            self.wandb = wandb.init(mode="disabled")
        self.progress = tqdm(total=self.n_steps, initial=step, unit=unit, disable=None)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        try:
            if step >= self.wandb.starting_step:  # a resumed run repeats steps that W&B holds already
                self.wandb.log({name: value for name, value in metrics.items() if value is not None}, step=step)
        except Exception as error:  # a failure of W&B does not end the run
            if not self.log_failed:
                print(f"warning: W&B lacks step {step:,} ({name_error(error)})", file=sys.stderr)
            self.log_failed = True

    def end(self, *environments: Any) -> None:
        self.progress.close()
        self.lock_file.close()
        torch.set_flush_denormal(False)
        with contextlib.suppress(Exception):
            if Signals.received not in (0, signal.SIGINT):
                self.wandb.mark_preempting()  # W&B requeues the run
            self.wandb.finish(exit_code=int(not self.is_complete))
        for envs in filter(None, environments):
            envs.close()


def main(config_class: type, train: Callable) -> None:
    """The program: errors of people become one line and an exit status."""
    if sys.stdout:  # else it is closed
        sys.stdout.reconfigure(line_buffering=True)  # in a file too
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, Signals.receive)
    try:
        train(parse_arguments(config_class))
    except (DataError, MemoryError, torch.OutOfMemoryError) as error:
        text = str(error) if isinstance(error, DataError) else name_error(error)
        print(f"{Path(sys.argv[0]).name}: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))


if __name__ == "__main__":
    main(TrainConfig, train)
