"""Policy constraints, offline, for continuous actions: what CQL is compared with. The critics learn as usual, and the
policy is kept near the behaviour that recorded the data. Five switches make TD3+BC (the defaults), BRAC-p, BRAC-v, BEAR
and BCQ. At arxiv.org/abs: TD3+BC 2106.06860, BRAC 1911.11361, BEAR 1906.00949, BCQ 1812.02900.

    python algorithms/offline/policy_constraint.py \
        --config_path configs/offline/policy_constraint/brac_p/lunarlander.yaml

returns 206.9 ± 24.7 after 10,000 updates (BRAC-p, three seeds; two and a half minutes each on one CPU core) on data
that return -38.5.

Differs from the authors' code
1. All losses of an update use the same parameters; theirs take one step after the other.
2. Q's action is the first of the actions that the divergence is estimated from; BRAC draws it apart.
3. BEAR and BCQ choose among actions drawn by the same noise in every state: a policy is a function of the observation.
4. The last layers start near zero, as in the siblings. Wasserstein's critic takes its steps on one minibatch.
5. Time-outs bootstrap, and no terminal transition is dropped (the evaluation code of D4RL drops them for BRAC).

Known failures: on these data TD3+BC and BEAR end below the data's mean. docs/policy_constraint.md has all results.
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
    env: str = "halfcheetah-medium-expert-v2"  # dataset: a local or public id, or the D4RL name of an imported one
    eval_env: Optional[str] = None  # Gymnasium id to evaluate in; None: the dataset's own; none: no evaluation
    seed: int = 0  # seed of networks, minibatches and sampled actions
    eval_seed: int = 0  # evaluation episode i starts from seed eval_seed + i
    eval_freq: int = 5000  # updates between two evaluations
    n_episodes: int = 10  # episodes per evaluation
    max_timesteps: int = 1_000_000  # total number of updates
    checkpoints_path: Optional[str] = "runs"  # parent folder of the run folders
    run_id: Optional[str] = None  # name of the run folder; an unfinished one is resumed (default: $WANDB_RUN_ID)
    load_model: str = ""  # checkpoint.pt to take the first networks from; "": new networks
    keep_policies: bool = False  # keep the policy of each evaluation, as policy-<step>.pt
    log_interval: int = 1000  # updates between two W&B records
    compile: Optional[bool] = None  # compile the losses and replay CUDA graphs; None: on a GPU only
    precision: str = "float32"  # of the critics' matrix products: float32, tf32 (NVIDIA GPUs) or bfloat16

    buffer_size: int = 2_000_000  # largest number of transitions accepted; memory follows the data
    batch_size: int = 256  # transitions per minibatch
    normalize: bool = True  # shift and scale observations by the data's mean and standard deviation
    normalize_reward: bool = False  # rescale rewards: return range (locomotion only), then reward_scale, reward_bias
    reward_scale: float = 5.0  # factor on rewards (only with normalize_reward)
    reward_bias: float = -1.0  # added to scaled rewards (only with normalize_reward)
    reward_clip: float = math.inf  # training rewards are clipped to [-reward_clip, reward_clip]
    holdout_fraction: float = 0.0  # share of episodes held out from training, for the holdout metrics

    policy: str = "deterministic"  # deterministic, gaussian, or perturbation (of actions that a VAE draws)
    policy_hidden_dims: str = "256-256"  # widths of the policy's hidden layers
    q_hidden_dims: str = "256-256"  # widths of the hidden layers of each critic, and of Wasserstein's
    orthogonal_init: bool = False  # orthogonal initialisation of all networks
    log_std_min: float = -5.0  # smallest log standard deviation of Gaussians before the tanh
    log_std_max: float = 2.0  # largest one
    log_std_tanh: bool = False  # keep it between them by a tanh (BRAC), not by clipping
    max_perturbation: float = 0.05  # largest change of a VAE's action by the policy, of the half range
    n_acting_samples: int = 1  # actions drawn when acting; the first critic chooses the best; 1: the mean action

    discount: float = 0.99  # discount factor
    policy_lr: float = 3e-4  # learning rate of the policy
    qf_lr: float = 3e-4  # learning rate of the critics
    soft_target_update_rate: float = 5e-3  # Polyak rate of the target networks
    target_update_period: int = 2  # updates between two updates of the target networks, and of the policy
    target_policy: bool = True  # next actions come from a slow copy of the policy, not from the policy
    policy_noise: float = 0.2  # standard deviation of noise on next actions
    noise_clip: float = 0.5  # that noise is clipped to [-noise_clip, noise_clip]
    n_target_actions: int = 1  # next actions drawn per state; the TD target takes the best one
    target_min_weight: float = 1.0  # weight of the smaller Q in the TD target; the larger one gets the rest

    behaviour: str = "data"  # what the policy is compared with: the data's actions, a gaussian clone or a vae
    behaviour_hidden_dims: str = "750-750"  # widths of the hidden layers of the clone or VAE
    behaviour_lr: float = 3e-4  # learning rate of the clone or VAE
    behaviour_steps: int = 0  # first updates, of the clone or VAE alone, frozen afterwards; 0: it always learns
    divergence: str = "squared_error"  # none, squared_error, kl, mmd, raw_mmd (BEAR's) or wasserstein
    divergence_weight: float = 1.0  # weight of the divergence in the policy's loss, and in TD targets
    divergence_steps: int = 0  # updates after behaviour_steps in which the policy's loss is the divergence alone
    n_divergence_samples: int = 1  # actions per state that the divergence is estimated from
    kernel: str = "laplacian"  # of the MMD: laplacian exp(-|x - y|_1 / width) or gaussian exp(-|x - y|^2 / width)
    kernel_width: float = 20.0  # width of the kernel
    value_penalty: bool = False  # subtract the divergence at the next state in TD targets (BRAC-v)
    divergence_lagrange: bool = False  # tune a factor on divergence_weight towards divergence_threshold
    divergence_threshold: float = 0.05  # divergence that the factor is tuned for
    constraint_lr: float = 1e-3  # learning rate of that factor, and of Wasserstein's critic
    wasserstein_steps: int = 3  # steps of Wasserstein's critic per update
    q_scale: float = 2.5  # Q in the policy's loss is divided by mean |Q| and multiplied by this; 0: it is left alone

    project: str = "CORL"  # W&B project
    group: str = "policy-constraint-D4RL"  # W&B group
    name: str = "TD3-BC"  # first part of the run's name

    def __post_init__(self):
        check_config(self)
        check_switches(self)


# Shapes: B batch, E critics, N sampled actions, O observation, A action, Z noise. Actions of the networks lie in
# [-1, 1].


class Gaussian(nn.Module):
    """A Gaussian over actions before the tanh, for each observation."""

    def __init__(self, sizes: list[int], log_std_range: tuple[float, float], log_std_tanh: bool, orthogonal: bool):
        """sizes: O, hidden widths, A."""
        super().__init__()
        self.log_std_range, self.log_std_tanh, self.noise_dim = log_std_range, log_std_tanh, sizes[-1]
        self.layers = mlp([*sizes[:-1], 2 * sizes[-1]], orthogonal)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation: [B, O] -> [B, A], [B, A]."""
        mean, log_std = self.layers(observations).chunk(2, dim=-1)
        low, high = self.log_std_range
        if self.log_std_tanh:
            return mean, low + (high - low) / 2 * (log_std.tanh() + 1)
        return mean, log_std.clamp(low, high)

    def decode(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions before the tanh, drawn by noise: [B, O], [B, N, A] -> [B, N, A]."""
        mean, log_std = (x.unsqueeze(1) for x in self(observations))
        return mean + log_std.exp() * noise


class VAE(nn.Module):
    """A conditional variational auto-encoder of the data's actions, with latents of size 2A."""

    log_std_range = (-4.0, 15.0)
    max_latent = 0.5  # latents are clipped to this when actions are drawn, so that they are likely ones

    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: list[int], orthogonal: bool):
        super().__init__()
        self.noise_dim = 2 * action_dim
        self.encoder = mlp([observation_dim + action_dim, *hidden_dims, 2 * self.noise_dim], orthogonal)
        self.decoder = mlp([observation_dim + self.noise_dim, *hidden_dims, action_dim], orthogonal)

    def forward(self, observations: Tensor, actions: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, O], [B, A], noise [B, 2A] -> reconstruction [B, A], mean and log std of the latent [B, 2A]."""
        mean, log_std = self.encoder(torch.cat([observations, actions], dim=-1)).chunk(2, dim=-1)
        log_std = log_std.clamp(*self.log_std_range)
        latents = mean + log_std.exp() * noise
        return self.decoder(torch.cat([observations, latents], dim=-1)).tanh(), mean, log_std

    def decode(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions before the tanh, drawn by noise: [B, O], [B, N, 2A] -> [B, N, A]."""
        observations = observations.unsqueeze(1).expand(-1, noise.shape[1], -1)
        return self.decoder(torch.cat([observations, noise.clamp(-self.max_latent, self.max_latent)], dim=-1))


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


class Policy(nn.Module):
    """Everything that acting needs: the policy's network, the scaling of observations and actions and, where the best
    of several actions is taken, the critics and the noise that draws these. A perturbation also needs the VAE."""

    max_rows = 10_000  # states x actions at once, to limit memory

    def __init__(
        self, observation_dim: int, action_dim: int, kind: str, n_samples: int, max_perturbation: float,
        log_std_range: list[float], log_std_tanh: bool, policy_dims: list[int], vae_dims: list[int], q_dims: list[int],
        orthogonal_init: bool = True,
    ):  # fmt: skip
        """kind: deterministic, gaussian or perturbation. n_samples: actions that acting takes the best of."""
        super().__init__()
        self.sizes = (observation_dim, action_dim, kind, n_samples, max_perturbation, log_std_range, log_std_tanh)
        self.sizes += (policy_dims, vae_dims, q_dims)
        self.kind, self.max_perturbation, self.noise_dim = kind, max_perturbation, action_dim
        self.vae = self.critic = None
        sizes = [observation_dim, *policy_dims, action_dim]
        if kind == "deterministic":
            self.network = mlp(sizes, orthogonal_init)
        elif kind == "gaussian":
            self.network = Gaussian(sizes, log_std_range, log_std_tanh, orthogonal_init)
        else:
            self.network = mlp([observation_dim + action_dim, *sizes[1:]], orthogonal_init)
            self.vae = VAE(observation_dim, action_dim, vae_dims, orthogonal_init)
            self.noise_dim = self.vae.noise_dim
        noise = torch.zeros(1, self.noise_dim)  # the mean action
        if n_samples > 1:
            self.critic = EnsembleCritic(observation_dim, action_dim, q_dims, orthogonal_init)
            noise = torch.randn(n_samples, self.noise_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise)
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_low", -torch.ones(action_dim))
        self.register_buffer("action_high", torch.ones(action_dim))

    def draw(self, observations: Tensor, noise: Tensor, network: Optional[nn.Module] = None) -> tuple[Tensor, ...]:
        """N actions per state: [B, O], [B, N, Z] -> [B, N, A]; for a Gaussian also before the tanh [B, N, A], and
        log-densities [B, N]. A deterministic policy ignores noise. `network`: the policy's own, or its slow copy."""
        network = network or self.network
        if self.kind == "gaussian":
            mean, log_std = (x.unsqueeze(1) for x in network(observations))  # [B, 1, A]
            pre_tanh = mean + log_std.exp() * noise
            return pre_tanh.tanh(), pre_tanh, tanh_gaussian_log_prob(pre_tanh, noise, log_std)
        if self.kind == "deterministic":
            return (network(observations).tanh().unsqueeze(1).expand(-1, noise.shape[1], -1),)
        with torch.no_grad():  # the policy's loss does not train the VAE
            actions = self.vae.decode(observations, noise).tanh()
        observations = observations.unsqueeze(1).expand(-1, noise.shape[1], -1)
        perturbation = network(torch.cat([observations, actions], dim=-1)).tanh()
        return ((actions + self.max_perturbation * perturbation).clamp(-1, 1),)

    def choose(self, observations: Tensor) -> Tensor:
        """The action to take: the best one, by the first critic, of those that the fixed noise draws: [B, O] -> [B, A].
        Where that noise is a single zero, it is the mean action."""
        # `len` and `take_along_dim` would fix the size of the batch when this is exported to ONNX.
        actions = self.draw(observations, self.noise.expand(observations.shape[0], -1, -1))[0]  # [B, N, A]
        if actions.shape[1] == 1:
            return actions.squeeze(1)
        best = self.critic(observations, actions)[0].argmax(dim=-1).view(-1, 1, 1)  # [B, 1, 1]
        return actions.gather(1, best.expand(-1, -1, actions.shape[-1])).squeeze(1)

    def normalise(self, observations: Tensor) -> Tensor:
        """Raw observations as the networks take them: [..., O] -> [..., O]."""
        return (observations - self.observation_mean) / self.observation_std

    def actions(self, observations: Tensor) -> Tensor:
        """Deterministic actions in the environment's units for raw observations: [..., O] -> [..., A]."""
        actions = self.choose(self.normalise(observations).reshape(-1, observations.shape[-1]))
        actions = actions.view(*observations.shape[:-1], len(self.action_low))
        actions = self.action_low + (actions + 1) / 2 * (self.action_high - self.action_low)
        return torch.clamp(actions, self.action_low, self.action_high)

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """Same as `actions`, for arrays, a part of the rows at a time. Raises ValueError."""
        observations = as_observations(observations, self.observation_mean)
        rows = observations.reshape(-1, observations.shape[-1]).split(max(1, self.max_rows // len(self.noise)))
        return (
            torch.cat([self.actions(x) for x in rows])
            .view(*observations.shape[:-1], len(self.action_low))
            .cpu()
            .numpy()
        )


# local: the columns that the losses take
class Batch(NamedTuple):
    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A]
    rewards: Tensor  # [B]
    next_observations: Tensor  # [B, O]
    terminals: Tensor  # [B], 1 where the episode ended in a terminal state, 0 elsewhere and at time-outs
    next_actions: Optional[Tensor] = None  # [B, A], the data's, where they are compared with in TD targets


def mlp(sizes: list[int], orthogonal: bool) -> nn.Sequential:
    """Layers from size to size, with ReLUs between them."""
    *hidden, last = linear_layers(sizes, orthogonal)
    return nn.Sequential(*[module for layer in hidden for module in (layer, nn.ReLU())], last)


def widths(text: str) -> list[int]:
    """Widths of hidden layers from an option such as 400-300."""
    return [int(x) for x in text.split("-")]


def tanh_gaussian_log_prob(pre_tanh: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a = tanh(z), z = mean + std * noise, summed over actions: [..., A] -> [...].

    The Jacobian is exact: log(1 - tanh(z)^2) = 2 (log 2 - z - softplus(-2 z)), finite for every z.
    """
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return (log_normal - log_jacobian).sum(dim=-1)


def squared_mmd(x: Tensor, y: Tensor, kernel: str, width: float) -> Tensor:
    """Squared maximum mean discrepancy of two sets of actions per state, [B, N, A] and [B, M, A] -> [B]. The kernel is
    exp(-|x - y|_1 / width), or exp(-|x - y|_2^2 / width) for gaussian; pairs of an action with itself count."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        difference = a.unsqueeze(2) - b.unsqueeze(1)  # [B, N, M, A]
        distance = difference.square() if kernel == "gaussian" else difference.abs()
        return (-distance.sum(dim=-1) / width).exp().mean(dim=(1, 2))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


class PolicyConstraint(nn.Module):
    """The agent: one method per loss, then `gradients` and `update`, the algorithm. Its state_dict is a checkpoint."""

    max_density_action = 0.999  # actions are clipped to this before a log-density, which is infinite at 1
    log_multiplier_range = (-5.0, 10.0)
    slope_penalty = 5.0  # weight of the penalty on slopes above 1 of Wasserstein's critic

    def __init__(self, config: TrainConfig, observation_dim: int, action_dim: int):
        super().__init__()
        self.config, self.target_entropy, self.n_updates = config, -float(action_dim), 0
        sizes, orthogonal = (observation_dim, action_dim), config.orthogonal_init
        dims, q_dims = widths(config.policy_hidden_dims), widths(config.q_hidden_dims)
        behaviour_dims = widths(config.behaviour_hidden_dims)
        gaussian = [config.log_std_min, config.log_std_max], config.log_std_tanh
        shape = (config.policy, config.n_acting_samples, config.max_perturbation, *gaussian)
        self.actor = Policy(*sizes, *shape, dims, behaviour_dims, q_dims, orthogonal)
        # Shares its weights with the critic that the actor chooses by, which stays in float32.
        self.critic = copy.copy(self.actor.critic) or EnsembleCritic(*sizes, q_dims, orthogonal)
        self.critic.dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        self.behaviour = self.discriminator = self.target_network = None
        if config.behaviour == "vae":
            self.behaviour = self.actor.vae or VAE(*sizes, behaviour_dims, orthogonal)
        elif config.behaviour == "gaussian":
            self.behaviour = Gaussian([observation_dim, *behaviour_dims, action_dim], *gaussian, orthogonal)
        if config.divergence == "wasserstein":
            self.discriminator = EnsembleCritic(*sizes, q_dims, orthogonal, n_critics=1)
        self.log_multiplier = nn.Parameter(torch.tensor(0.0))
        self.clone_alpha = nn.Parameter(torch.tensor(1.0))  # weight of the clone's entropy
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        if config.target_policy:
            self.target_network = copy.deepcopy(self.actor.network).requires_grad_(False)
        self.to(config.device)
        learned = {
            "actor": (self.actor.network, config.policy_lr),
            "critic": (self.critic, config.qf_lr),
            "behaviour": (self.behaviour, config.behaviour_lr),
            "discriminator": (self.discriminator, config.constraint_lr),
        }
        groups = {name: (list(network.parameters()), rate) for name, (network, rate) in learned.items() if network}
        groups["multiplier"] = [self.log_multiplier], config.constraint_lr
        groups["clone_alpha"] = [self.clone_alpha], config.behaviour_lr
        self.parameter_groups = {name: parameters for name, (parameters, _) in groups.items()}
        settings = [{"params": parameters, "lr": rate} for parameters, rate in groups.values()]
        self.optimizer = torch.optim.Adam(settings, fused=True, capturable=self.log_multiplier.is_cuda)
        self.policy_metrics: dict[str, Tensor] = {}  # of the policy's last step
        self.compute_gradients = self.gradients  # or compiled

    def draw(self, observations: Tensor, n: int, network: Optional[nn.Module] = None) -> tuple[Tensor, ...]:
        """N actions of the policy per state, or of its slow copy: [B, O] -> [B, N, A] and more, see Policy.draw."""
        noise = torch.randn(len(observations), n, self.actor.noise_dim, device=observations.device)
        return self.actor.draw(observations, noise, network)

    def divergence_weight(self) -> Tensor:
        """divergence_weight, times its factor if that is tuned; a constant in every loss except the factor's."""
        if not self.config.divergence_lagrange:
            return torch.full_like(self.log_multiplier, self.config.divergence_weight)
        return self.config.divergence_weight * self.log_multiplier.detach().exp()

    def data_log_prob(self, batch: Batch, mean: Tensor, log_std: Tensor) -> Tensor:
        """log pi(a_data|s), the likelihood of the data's actions: [B, A], [B, A] -> [B]."""
        pre_tanh = batch.actions.clamp(-self.max_density_action, self.max_density_action).atanh()
        return tanh_gaussian_log_prob(pre_tanh, (pre_tanh - mean) / log_std.exp(), log_std)

    def behaviour_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of the VAE: squared error of the actions, plus half the KL divergence of its latents from a standard
        normal. Or losses of the Gaussian clone: likelihood and entropy, and the entropy's weight, tuned towards -A."""
        if self.config.behaviour == "vae":
            noise = torch.randn(len(batch.actions), self.behaviour.noise_dim, device=batch.actions.device)
            reconstruction, mean, log_std = self.behaviour(batch.observations, batch.actions, noise)
            divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).mean()
            return {"behaviour": F.mse_loss(reconstruction, batch.actions) + 0.5 * divergence}
        mean, log_std = self.behaviour(batch.observations)  # [B, A]
        noise = torch.randn_like(mean)
        log_prob = tanh_gaussian_log_prob(mean + log_std.exp() * noise, noise, log_std)  # [B]
        loss = (self.clone_alpha.detach() * log_prob - self.data_log_prob(batch, mean, log_std)).mean()
        alpha_loss = -self.clone_alpha * (log_prob.detach().mean() + self.target_entropy)
        return {"behaviour": loss, "clone_alpha": alpha_loss}

    def divergence(self, observations: Tensor, data_actions: Optional[Tensor], drawn: tuple[Tensor, ...]) -> Tensor:
        """Distance of the policy from the behaviour in each state, estimated from actions that the policy drew there
        (see Policy.draw) and the data's action, the clone or the VAE: [B, O], [B, A] -> [B]."""
        config, actions = self.config, drawn[0]  # [B, N, A]
        if config.divergence == "none":
            return actions.new_zeros(len(actions))
        if config.divergence == "squared_error":
            return (actions - data_actions.unsqueeze(1)).square().mean(dim=(1, 2))
        if config.divergence == "wasserstein":
            values = self.discriminator(observations, torch.cat([actions, data_actions.unsqueeze(1)], dim=1))[0]
            return values[:, :-1].mean(dim=1) - values[:, -1]
        _, pre_tanh, log_prob = drawn
        if config.divergence == "kl":
            mean, log_std = (x.unsqueeze(1) for x in self.behaviour(observations))
            limit = math.atanh(self.max_density_action)
            clipped = pre_tanh.clamp(-limit, limit)
            behaviour_log_prob = tanh_gaussian_log_prob(clipped, (clipped - mean) / log_std.exp(), log_std)
            return (log_prob - behaviour_log_prob).mean(dim=1)
        noise = torch.randn(*actions.shape[:2], self.behaviour.noise_dim, device=actions.device)
        with torch.no_grad():  # the policy's loss does not train the behaviour
            samples = self.behaviour.decode(observations, noise)
        if config.divergence == "mmd":
            return squared_mmd(samples.tanh(), actions, config.kernel, config.kernel_width)
        return (squared_mmd(samples, pre_tanh, config.kernel, config.kernel_width) + 1e-6).sqrt()

    def discriminator_loss(self, batch: Batch, actions: Tensor) -> Tensor:
        """Lowers c at the data's actions and raises it at the policy's, [B, A], with slopes of at most 1 between the
        two: -E[c(s, a_pi) - c(s, a_data)] + 5 E[max(|grad_a c(s, a)| - 1, 0)^2] -> []."""
        values = self.discriminator(batch.observations, torch.stack([actions, batch.actions], dim=1))[0]  # [B, 2]
        between = torch.lerp(actions, batch.actions, torch.rand_like(actions[:, :1])).requires_grad_()
        value = self.discriminator(batch.observations, between.unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(value, between, create_graph=True)  # [B, A]
        excess = ((slope.square().sum(dim=-1) + 1e-8).sqrt() - 1).clamp(min=0)
        return (values[:, 1] - values[:, 0]).mean() + self.slope_penalty * excess.square().mean()

    # local: the best of several actions, and BRAC-v's divergence
    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """r + gamma (1 - terminal) (max_n Q'(s', a'_n) - weight D(s')) -> [B]. Q' is the smaller one of the target
        critics, or a mean of the smaller and the larger; D is subtracted only in BRAC-v."""
        config, observations = self.config, batch.next_observations
        n = max(config.n_target_actions, config.n_divergence_samples if config.value_penalty else 1)
        drawn = self.draw(observations, n, self.target_network)
        actions = drawn[0][:, : config.n_target_actions]
        if config.policy_noise > 0:
            noise = (config.policy_noise * torch.randn_like(actions)).clamp(-config.noise_clip, config.noise_clip)
            actions = (actions + noise).clamp(-1, 1)
        q = self.target_critic(observations, actions)  # [E, B, N]
        next_q = torch.lerp(q.amax(dim=0), q.amin(dim=0), config.target_min_weight).amax(dim=1)  # [B]
        if config.value_penalty:
            drawn = tuple(x[:, : config.n_divergence_samples] for x in drawn)
            next_q = next_q - self.divergence_weight() * self.divergence(observations, batch.next_actions, drawn)
        return batch.rewards + config.discount * (1 - batch.terminals) * next_q

    # local: no penalty
    def critic_loss(self, batch: Batch, td_target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared TD errors of the critics, added: [B] -> [], metrics."""
        q = self.critic(batch.observations, batch.actions.unsqueeze(1)).squeeze(-1)  # [E, B]
        td_loss = (q - td_target).square().mean(dim=1)  # [E]
        metrics = per_critic("qf{}_loss", td_loss) | per_critic("average_qf{}", q.mean(dim=1))
        return td_loss.sum(), metrics | {"average_target_q": td_target.mean()}

    # local: a divergence in place of the entropy
    def policy_loss(self, batch: Batch, actions: Tensor, divergence: Tensor, with_q: bool) -> Tensor:
        """E[weight (D(s) - threshold) - Q(s, a)], [B, N, A], [B] -> []. The threshold is 0 unless the weight is tuned.
        Q, perhaps scaled by its mean absolute value, is the smaller one for a Gaussian, else the first critic's."""
        config = self.config
        threshold = config.divergence_threshold if config.divergence_lagrange else 0.0
        loss = self.divergence_weight() * (divergence.mean() - threshold)
        if not with_q:
            return loss
        q = self.critic(batch.observations, actions[:, :1]).squeeze(-1)  # [E, B]
        q = q.amin(dim=0) if config.policy == "gaussian" else q[0]
        if config.q_scale > 0:
            q = q * (config.q_scale / q.detach().abs().mean().clamp(min=1e-6))
        return loss - q.mean()

    # local: what is trained depends on the phase
    def losses(
        self, batch: Batch, behaviour: bool, critic: bool, policy: bool, with_q: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the losses of what is trained, all at the same parameters, and metrics: of the behaviour, the critics
        and the policy (`with_q` or not), and always of Wasserstein's critic, if there is one."""
        config, losses, metrics = self.config, {}, {}
        if behaviour:
            losses |= self.behaviour_losses(batch)
            metrics["behaviour_loss"] = losses["behaviour"]
        if critic:
            losses["critic"], more = self.critic_loss(batch, self.td_target(batch))
            metrics |= more
        if policy or self.discriminator:
            drawn = self.draw(batch.observations, config.n_divergence_samples)
        if policy:
            divergence = self.divergence(batch.observations, batch.actions, drawn)  # [B]
            losses["actor"] = self.policy_loss(batch, drawn[0], divergence, with_q)
            metrics |= {"policy_loss": losses["actor"], "divergence": divergence.mean()}
            metrics["divergence_weight"] = self.divergence_weight()
            if config.divergence_lagrange:
                excess = divergence.detach().mean() - config.divergence_threshold
                losses["multiplier"] = -self.log_multiplier.exp() * config.divergence_weight * excess
        if self.discriminator:
            losses["discriminator"] = self.discriminator_loss(batch, drawn[0][:, 0].detach())
            metrics["discriminator_loss"] = losses["discriminator"]
        return losses, metrics

    def gradients(self, batch: Batch, *phase: bool) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
        """Returns gradients of each group's loss in its own parameters only, and metrics. Changes nothing."""
        losses, metrics = self.losses(batch, *phase)
        gradients = {name: torch.autograd.grad(loss, self.parameter_groups[name]) for name, loss in losses.items()}
        for name, metric in (("actor", "policy_grad_norm"), ("critic", "critic_grad_norm")):
            if name in gradients:
                metrics[metric] = nn.utils.get_total_norm(gradients[name])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def phase(self, step: int) -> tuple[bool, ...]:
        """Returns what an update trains, see `losses`: first the behaviour alone; then the critics, and the policy with
        each update of the targets."""
        config = self.config
        if step < config.behaviour_steps:
            return True, False, False, False
        joint = self.behaviour is not None and config.behaviour_steps == 0
        due = (step - config.behaviour_steps) % config.target_update_period == 0
        return joint, True, due, due and step >= config.behaviour_steps + config.divergence_steps

    # local: its own phases
    def phases(self) -> list[tuple]:
        """Further arguments of `gradients`, now and later."""
        start, period = self.config.behaviour_steps, self.config.target_update_period
        earliest = max(0, self.n_updates - 3)  # three updates of a phase make Adam's moments, before a CUDA graph
        steps = [max(earliest, x) for x in (0, start, start + self.config.divergence_steps)]
        steps = [x + (start - x) % period + i for x in steps for i in range(min(period, 2))]  # with the policy, without
        extra = [(False,) * 4] if self.discriminator and self.config.wasserstein_steps > 1 else []
        return [self.phase(x) for x in (self.n_updates, *steps)] + extra

    def step(self, batch: Batch, *phase: bool) -> dict[str, Tensor]:
        """Takes a step of what the phase trains, and of nothing else."""
        gradients, metrics = self.compute_gradients(batch, *phase)
        self.optimizer.zero_grad()
        for name, values in gradients.items():
            for parameter, gradient in zip(self.parameter_groups[name], values):
                parameter.grad = gradient
        self.optimizer.step()
        self.log_multiplier.data.clamp_(*self.log_multiplier_range)
        self.clone_alpha.data.clamp_(min=0)
        return metrics

    # local: phases, and several steps of Wasserstein's critic
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a step of what the current phase trains, then, if they are due, of the target networks."""
        behaviour, critic, policy, with_q = self.phase(self.n_updates)
        for _ in range(self.config.wasserstein_steps - 1 if self.discriminator else 0):
            self.step(batch, False, False, False, False)
        metrics = self.step(batch, behaviour, critic, policy, with_q)
        if policy:
            names = ("policy_loss", "policy_grad_norm", "divergence", "divergence_weight")
            self.policy_metrics = {name: metrics[name] for name in names}
            with torch.no_grad():
                targets, sources = list(self.target_critic.parameters()), list(self.critic.parameters())
                if self.target_network:
                    targets += self.target_network.parameters()
                    sources += self.actor.network.parameters()
                torch._foreach_lerp_(targets, sources, self.config.soft_target_update_rate)
        self.n_updates += 1
        return self.policy_metrics | metrics if critic else metrics

    # local: what acts may choose
    @torch.no_grad()
    def start_values(self, observations: np.ndarray) -> np.ndarray:
        """Returns min Q(s, pi(s)), what the critics predict for the deterministic policy: raw [B, O] -> [B]."""
        observations = self.actor.normalise(as_observations(observations, self.actor.observation_mean))
        values = self.critic(observations, self.actor.choose(observations).unsqueeze(1)).min(dim=0).values
        return values.view(len(observations)).cpu().numpy()

    # local: no penalty
    @torch.no_grad()
    def holdout_metrics(self, batch: Batch) -> dict[str, float]:
        """TD error, data Q and divergence on held-out transitions."""
        _, metrics = self.critic_loss(batch, self.td_target(batch))
        result = {"holdout_td_error": (metrics["qf1_loss"] + metrics["qf2_loss"]) / 2}
        result["holdout_q"] = (metrics["average_qf1"] + metrics["average_qf2"]) / 2
        drawn = self.draw(batch.observations, self.config.n_divergence_samples)
        result["holdout_divergence"] = self.divergence(batch.observations, batch.actions, drawn).mean()
        return {name: value.item() for name, value in result.items()}

    # local: metrics of the policy's last step
    def get_extra_state(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict()["state"], "n_updates": self.n_updates}
        return state | {"policy_metrics": self.policy_metrics}

    # local: metrics of the policy's last step
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.n_updates, self.policy_metrics = state["n_updates"], state["policy_metrics"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})


def per_critic(name: str, values: Tensor) -> dict[str, Tensor]:
    return {name.format(i + 1): value for i, value in enumerate(values)}


def train(config: TrainConfig, data: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Trains on `data` (what load_dataset returns; by default that of config.env), evaluates, and returns the last row
    of metrics.csv. If the run folder holds a part of the run, that is continued. Raises ConfigError and DataError."""
    run = Run(config, config.max_timesteps, *filter(None, [config.behaviour_steps]))
    if run.is_complete:
        print(f"{run.path} is complete: {describe(run.rows[-1])}")
        return run.rows[-1]
    data = load_dataset(config.env) if data is None else dict(data)
    task = Task(config, data)
    data, holdout, scaling = prepare_data(config, data, task, run.checkpoint)
    torch.manual_seed(config.seed)
    agent = PolicyConstraint(config, data["observations"].shape[1], data["actions"].shape[1])
    if config.value_penalty and config.behaviour == "data":
        data = with_next_actions(data, config.env, "--value_penalty")
        holdout = with_next_actions(holdout, config.env, "--value_penalty", "held-out")
    buffer, holdout = ReplayBuffer(data, config.device), holdout_batch(config, holdout)
    run.restore(agent, task)
    agent.actor.load_state_dict(scaling, strict=False)
    run.begin(task, agent.n_updates)
    try:
        run_until = updater(config, agent, buffer.sample, run)
        for step in run.stops():  # where a record or a row of metrics.csv is due
            run_until(step, run.progress)
            if Signals.received:
                task.check(run.means(), agent)  # no checkpoint of a run that diverged
                run.save(agent)
                print(f"signal {Signals.received}: saved in {run.path}")
                raise SystemExit(128 + Signals.received)
            metrics = task.check(run.next_record(step), agent)
            if run.is_row_due(step):
                metrics |= run.add_row(step, task.check(task.evaluate(agent, holdout), agent))
            run.log(metrics, step)
            run.save(agent, step)
    finally:
        run.end(task.envs)
    print(f"{describe(run.rows[-1])} after {run.n_steps:,} updates, in {run.path}")
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
# local: limits of the options, both ends included, or the words that an option takes
LIMITS = {
    "seed eval_seed policy_lr qf_lr behaviour_lr constraint_lr behaviour_steps divergence_steps": (0, 1e12),
    "policy_noise noise_clip divergence_weight q_scale": (0, 1e12),
    "max_timesteps eval_freq n_episodes batch_size buffer_size log_interval": (1, 1e12),
    "target_update_period n_target_actions n_divergence_samples n_acting_samples wasserstein_steps": (1, 1e6),
    "reward_scale reward_bias divergence_threshold": (-1e12, 1e12),
    "log_std_min log_std_max": (-20, 20),
    "discount soft_target_update_rate max_perturbation target_min_weight": (0, 1),
    "holdout_fraction": (0, 0.9),
    "reward_clip kernel_width": (1e-6, math.inf),
    "precision": ("float32", "tf32", "bfloat16"),
    "policy": ("deterministic", "gaussian", "perturbation"),
    "behaviour": ("data", "gaussian", "vae"),
    "divergence": ("none", "squared_error", "kl", "mmd", "raw_mmd", "wasserstein"),
    "kernel": ("laplacian", "gaussian"),
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


# local: switches that do not go together
def check_switches(config: TrainConfig) -> None:
    """Raises ConfigError for widths that are not numbers, and for switches that do not go together."""
    for name in ("policy_hidden_dims", "behaviour_hidden_dims", "q_hidden_dims"):
        if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})*", getattr(config, name), re.ASCII):
            raise ConfigError(f"--{name} takes widths of layers, such as 256-256, not {getattr(config, name)[:100]!r}")
    behaviours = {"kl": ("gaussian",), "mmd": ("gaussian", "vae"), "raw_mmd": ("gaussian", "vae")}
    behaviours = ("vae",) if config.policy == "perturbation" else behaviours.get(config.divergence, ("data",))
    if config.behaviour not in behaviours:
        what = f"--policy {config.policy} with --divergence {config.divergence}"
        raise ConfigError(f"{what} takes --behaviour {' or '.join(behaviours)}, not {config.behaviour}")
    faults = {
        "--divergence kl, mmd and raw_mmd take --policy gaussian": config.divergence in ("kl", "mmd", "raw_mmd")
        and config.policy != "gaussian",
        "--policy perturbation takes --divergence none: its actions are near the VAE's": config.divergence != "none"
        and config.policy == "perturbation",
        "--policy deterministic takes --n_acting_samples 1": config.policy == "deterministic"
        and config.n_acting_samples > 1,
        "--behaviour_steps needs a clone or a VAE (--behaviour)": config.behaviour_steps > 0
        and config.behaviour == "data",
        "--behaviour_steps and --divergence_steps leave no update with Q: lower them, or raise --max_timesteps": (
            config.behaviour_steps + config.divergence_steps >= config.max_timesteps
        ),
        "--log_std_min takes less than --log_std_max": config.log_std_min >= config.log_std_max,
        "--divergence none takes no --value_penalty, --divergence_lagrange or --divergence_steps": (
            config.divergence == "none"
            and (config.value_penalty or config.divergence_lagrange or config.divergence_steps > 0)
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(fault)


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


def with_next_actions(data: dict[str, np.ndarray], name: str, option: str, part: str = "training") -> dict:
    """Adds the action of the following row, which `option` needs, and drops, and counts, the last rows before a
    time-out: what follows them in the data belongs to another episode, so they only lend their action. Raises
    DataError."""
    ends, n = data["terminals"] | data["timeouts"], len(data["actions"])
    ends[-1:] = True
    known = ~ends | data["terminals"]
    if part == "training" and not known.any():
        raise DataError(f"--env {name} lacks transitions with a known next action, as {option} needs")
    if not known.all():
        told = f"{n - known.sum():,} of {n:,} {part} transitions are dropped"
        print(f"{option}: {told}, since their next action is not known")
    more = {"next_actions": np.roll(data["actions"], -1, axis=0)}
    more["timeouts"] = data["timeouts"] | np.append(~known[1:], False)[:n]
    return {key: column[known] for key, column in (data | more).items()}


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


class ReplayBuffer:
    """All transitions, on the device; on the CPU, memory is shared with the arrays."""

    def __init__(self, data: dict[str, np.ndarray], device: str):
        columns = {key: torch.as_tensor(data[key], device=device) for key in Batch._fields if key in data}
        kept = (torch.int64, torch.uint8)  # discrete actions and masks
        self.columns = Batch(**{key: x if x.dtype in kept else x.float() for key, x in columns.items()})
        self.size = len(columns["rewards"])

    def rows(self, indices: Any) -> Batch:
        return Batch(*[None if x is None else x[indices] for x in self.columns])

    def sample(self, batch_size: int) -> Batch:
        rows = torch.randint(self.size, (batch_size,), device=self.columns[0].device)
        return Batch(*[None if x is None else x.index_select(0, rows) for x in self.columns])  # faster than x[rows]


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
