r"""Conservative Q-Learning (CQL), offline, from pixels: a deep Q-network (QR-DQN, C51, double DQN) on stacks of frames
whose values are pushed down where they are high and up on the data's actions, by an exact log-sum-exp.
At arxiv.org/abs: CQL 2006.04779, DQN replay 1907.04543, QR-DQN 1710.10044, C51 1707.06887, DR3 2112.04716.

    bash benchmarks/studies/minatar.sh data
    python algorithms/discrete/cql_atari.py --config_path configs/discrete/cql_atari/minatar.yaml --compile True \
        --env minatar/space-invaders-replay-5-v0

returns 24.3 ± 2.3 after 50,000 updates (three seeds; three minutes each on a CPU core) on data that return 18.7.

Differs from the papers
1. The TD error is Huber's doubled, and the quantile loss is the mean over quantiles, doubled, where the authors' code
   sums over 200 quantiles: its weights 4 and 1 are cql_alpha 0.08 and 0.02 here, its eps 3.125e-4 is adam_eps 6.25e-6.
2. One Adam step per minibatch of logged data: the authors' target period of 8,000 environment steps is 2,000 updates.
3. With several processes, each holds other episodes, and an update is that of one process on the whole minibatch.

Known failures: returns jump from one evaluation to the next, and long training may unlearn, so watch the curve. Where
good play fills the data, cloning may be better. Options and metrics: docs/atari.md."""

import atexit
import contextlib
import copy
import csv
import ctypes
import datetime
import fcntl
import functools
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import threading
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
import torch.distributed as dist
import torch.nn.functional as F
import wandb
import yaml
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class TrainConfig:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or cuda:<index>
    env: str = "atari/pong-v0"  # dataset of frames, made by benchmarks/import_data.py or collect_frames.py
    eval_env: Optional[str] = None  # Gymnasium id to evaluate in; None: the dataset's own; none: no evaluation
    seed: int = 0  # seed of networks and minibatches
    eval_seed: int = 0  # evaluation episode i starts from seed eval_seed + i
    eval_freq: int = 62_500  # updates between two evaluations
    eval_epsilon: float = 0.001  # share of random actions in evaluation
    n_episodes: int = 10  # episodes per evaluation
    max_timesteps: int = 2_500_000  # total number of updates
    checkpoints_path: Optional[str] = "runs"  # parent folder of the run folders
    run_id: Optional[str] = None  # name of the run folder; an unfinished one is resumed (default: $WANDB_RUN_ID)
    load_model: str = ""  # checkpoint.pt to take the first networks from; "": new networks
    keep_policies: bool = False  # keep the policy of each evaluation, as policy-<step>.pt
    log_interval: int = 1000  # updates between two W&B records
    compile: Optional[bool] = None  # compile the losses and replay CUDA graphs; None: on a GPU only
    precision: str = "float32"  # of the hidden layers' matrix products: float32, tf32 (NVIDIA GPUs) or bfloat16

    buffer_size: int = 100_000_000  # largest number of transitions accepted; memory follows the data
    frame_stack: int = 4  # frames in an observation; those before an episode's start are zeros
    frames_on_device: Optional[bool] = None  # keep the frames in the device's memory; None: where they fit on a GPU
    batch_size: int = 32  # transitions per minibatch, those of all processes together
    normalize_reward: bool = False  # rescale rewards: return range (locomotion only), then reward_scale, reward_bias
    reward_scale: float = 5.0  # factor on rewards (only with normalize_reward)
    reward_bias: float = -1.0  # added to scaled rewards (only with normalize_reward)
    reward_clip: float = 1.0  # training rewards are clipped to [-reward_clip, reward_clip]
    holdout_fraction: float = 0.0  # share of episodes held out from training, for the holdout metrics

    encoder: str = "nature"  # nature (84 x 84), impala (the same, residual) or minatar (10 x 10 planes)
    head: str = "qr"  # per action, dqn: a value; c51: a distribution over atoms; qr: quantiles
    n_atoms: int = 51  # number of atoms of c51
    v_min: Optional[float] = -10.0  # lowest atom of c51; None: from the data's discounted returns
    v_max: Optional[float] = 10.0  # highest atom of c51; None: from the data's discounted returns
    n_quantiles: int = 200  # number of quantiles of qr
    hidden_dim: int = 512  # width of the hidden layer after the encoder's convolutions
    normalize_features: bool = False  # scale the last hidden layer's output to norm 1

    discount: float = 0.99  # discount factor
    n_step: int = 1  # rewards in a TD target, all from one episode
    target: str = "max"  # next action: double (online network's choice), max (target network's), sarsa (the data's)
    td_error: str = "huber"  # squared, or huber: linear beyond 1
    qf_lr: float = 5e-5  # learning rate
    adam_eps: float = 6.25e-6  # Adam's term for numerical stability
    weight_decay: float = 0.0  # decoupled weight decay (AdamW)
    max_grad_norm: float = math.inf  # gradients with a larger norm are scaled down to it
    soft_target_update_rate: float = 1.0  # Polyak rate of the target network; 1 with a longer period: hard updates
    target_update_period: int = 2000  # updates between two target updates

    cql_variant: str = "H"  # lowers Q's soft maximum over all actions (H) or the policy's (rho), or Q's spread (var)
    cql_rho_epsilon: float = 0.1  # share of random actions in rho, which else is the target network's greedy policy
    cql_alpha: float = 0.08  # weight of the penalty; 0 is offline DQN
    bc_only: bool = False  # behaviour cloning: the penalty alone, cross-entropy with Q as logits
    dr3_coefficient: float = 0.0  # weight of DR3: the dot product of features at states and next states

    project: str = "CORL"  # W&B project
    group: str = "CQL-Atari"  # W&B group
    name: str = "CQL-Atari"  # first part of the run's name

    def __post_init__(self):
        self.device = own_device(self.device)
        check_config(self)


# Shapes: B batch, O observation: a stack of frames [C, Y, X], its frames' channels, height and width; A actions,
# Z atoms or quantiles (1 for dqn), H features.


class SamePad(nn.Module):
    """Pads for a layer of this kernel and stride as TensorFlow's "same" does: ceil(size / stride) places come out."""

    def __init__(self, kernel: int, stride: int, value: float = 0.0):
        super().__init__()
        self.kernel, self.stride, self.value = kernel, stride, value

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return F.pad(x, padding, value=self.value)


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def make_encoder(name: str, shape: list[int], hidden_dim: int) -> nn.Sequential:
    """Convolutions and a dense layer: [B, O] -> [B, H]. Those of DQN (nature), IMPALA or MinAtar."""
    channels, layers = shape[0], []
    if name == "nature":
        for width, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            layers += [SamePad(kernel, stride), nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
            channels = width
    elif name == "impala":
        for width in (16, 32, 32):
            pool = [SamePad(3, 2, -math.inf), nn.MaxPool2d(3, 2)]
            layers += [nn.Conv2d(channels, width, 3, padding=1), *pool, Residual(width), Residual(width)]
            channels = width
        layers.append(nn.ReLU())
    else:
        layers += [nn.Conv2d(channels, 16, 3), nn.ReLU()]
    n_outputs = nn.Sequential(*layers)(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(n_outputs, hidden_dim), nn.ReLU())


# local: frames pass an encoder, and need no mean and standard deviation
class QNetwork(nn.Module):
    """Q(s, a) as Z numbers per action, with the numbering of actions that acting needs."""

    def __init__(
        self, shape: list[int], action_sizes: list[int], hidden_dim: int, encoder: str, head: str, n_outputs: int,
        normalize_features: bool = False, frame_stack: int = 1, frame_max: float = 255.0,
        dtype: Optional[torch.dtype] = None,
    ):  # fmt: skip
        """shape: [C, Y, X] of a stack. action_sizes: those of a MultiDiscrete space, or one number. frame_stack: for
        those who play it. frame_max: the largest value of a pixel. dtype: that of the encoder's products."""
        super().__init__()
        self.sizes = (list(shape), action_sizes, hidden_dim, encoder, head, n_outputs, normalize_features)
        self.sizes += (frame_stack, frame_max)
        self.head, self.normalize_features, self.dtype = head, normalize_features, dtype
        self.shape, self.frame_stack, self.frame_max = tuple(shape), frame_stack, frame_max
        self.action_sizes, self.n_outputs, self.epsilon = action_sizes, n_outputs, 0.0  # share of random actions
        self.encoder = make_encoder(encoder, shape, hidden_dim)
        self.last = nn.Linear(hidden_dim, math.prod(action_sizes) * n_outputs)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):  # variance 1 / sqrt(3) / inputs, as in Dopamine
                bound = math.sqrt(math.sqrt(3) / layer.weight[0].numel())
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)
        self.memory_format = torch.channels_last if encoder == "impala" else torch.contiguous_format  # faster on a CPU
        self.encoder.to(memory_format=self.memory_format)
        self.register_buffer("atoms", torch.zeros(n_outputs))  # the values of c51's atoms
        self.register_buffer("action_low", torch.zeros(len(action_sizes), dtype=torch.int64))
        self.register_buffer("action_high", torch.tensor(action_sizes) - 1)

    def features(self, observations: Tensor) -> Tensor:
        """Last hidden layer: [B, O] of whole numbers -> [B, H]."""
        pixels = (observations / self.frame_max).contiguous(memory_format=self.memory_format)
        with torch.autocast(observations.device.type, self.dtype, enabled=self.dtype is not None):
            features = self.encoder(pixels)
        features = features.to(pixels.dtype)
        return F.normalize(features, dim=-1, eps=1e-6) if self.normalize_features else features

    def outputs(self, features: Tensor) -> Tensor:
        """Values (dqn), logits (c51) or quantiles (qr) of each action: [..., H] -> [..., A, Z]."""
        return self.last(features).unflatten(-1, (-1, self.n_outputs))

    def forward(self, observations: Tensor) -> Tensor:
        """[B, O] -> [B, A, Z]."""
        return self.outputs(self.features(observations))

    def values(self, outputs: Tensor) -> Tensor:
        """Expected Q: [..., Z] -> [...]."""
        return outputs.softmax(dim=-1) @ self.atoms if self.head == "c51" else outputs.mean(dim=-1)

    def scores(self, observations: Tensor) -> Tensor:
        """Each action's value: [B, O] -> [B, A]."""
        return self.values(self(observations))

    def actions(self, observations: Tensor) -> Tensor:
        """Greedy actions in the environment's numbers: [B, O] -> [B], or [B, k] for actions of k > 1 parts."""
        scores = self.scores(observations)
        best = scores.argmax(dim=-1)
        if self.epsilon:
            random = torch.rand_like(scores).argmax(dim=-1)
            best = torch.where(torch.rand(best.shape, device=best.device) < self.epsilon, random, best)
        parts = torch.stack(torch.unravel_index(best, self.action_sizes), dim=-1) + self.action_low
        return parts if len(self.action_sizes) > 1 else parts.squeeze(-1)

    @torch.no_grad()
    def act(self, observations: np.ndarray, result: str = "actions") -> np.ndarray:
        """Same as `actions`, or `scores`, for arrays, also for a single observation, [O]. Raises DataError."""
        stacks = as_stacks(observations, self)
        found = getattr(self, result)(stacks).cpu().numpy()
        return found[()] if np.ndim(observations) == stacks.ndim else found[0]


# local: the columns that the losses take
class Batch(NamedTuple):
    observations: Tensor  # [B, O], uint8; or [B], numbers of their last frames
    actions: Tensor  # [B], index of the action
    rewards: Tensor  # [B], discounted sum of n_step rewards, or fewer at the end of the episode
    next_observations: Tensor  # the same, after them
    terminals: Tensor  # [B], 1 if they end in a terminal state, 0 elsewhere and at time-outs
    discounts: Tensor  # [B], factor on the value after them: discount ** (their number), 0 after a terminal state
    next_actions: Optional[Tensor] = None  # [B], index of the data's action after them, with target sarsa
    masks: None = None  # all actions are allowed
    next_masks: None = None


def allowed(values: Tensor, masks: Optional[Tensor]) -> Tensor:
    """The values, -inf where the mask is 0: [..., A], [..., A] -> [..., A]."""
    return values if masks is None else values.masked_fill(masks == 0, -math.inf)


def of_actions(outputs: Tensor, actions: Tensor) -> Tensor:
    """Outputs of one action per state: [B, A, Z] or [B, A], [B] -> [B, Z] or [B]."""
    return outputs[torch.arange(len(actions), device=actions.device), actions]


def quantile_loss(quantiles: Tensor, targets: Tensor, huber: bool) -> Tensor:
    """Twice the mean over pairs of |tau - 1(u < 0)| L(u), u = target - quantile, L the squared or the doubled Huber
    error: [B, Z], [B, Z] -> [B]. With one quantile, tau = 1/2, it is L itself: DQN."""
    n = quantiles.shape[-1]
    tau = (torch.arange(n, device=quantiles.device, dtype=quantiles.dtype) + 0.5) / n
    u = targets.unsqueeze(1) - quantiles.unsqueeze(2)  # [B, Z quantiles, Z targets]
    error = 2 * F.huber_loss(u, torch.zeros_like(u), reduction="none") if huber else u.square()
    return 2 * ((tau.view(-1, 1) - (u < 0).to(u.dtype)).abs() * error).mean(dim=(1, 2))


def project(probabilities: Tensor, atoms: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
    """C51's projection: each r + gamma z is clipped to the atoms' range, and its mass is split between its two
    neighbours in proportion to their nearness: [B, Z], [Z], [B], [B] -> [B, Z]."""
    moved = (rewards.unsqueeze(1) + discounts.unsqueeze(1) * atoms).clamp(atoms[0], atoms[-1])  # [B, Z]
    distance = (moved.unsqueeze(1) - atoms.unsqueeze(1)).abs() / (atoms[1] - atoms[0])  # [B, Z to, Z from]
    return torch.einsum("bij,bj->bi", (1 - distance).clamp(min=0), probabilities)


# local: one that several processes train
class DiscreteCQL(nn.Module):
    """The agent: the losses, then `gradients` and `update`, the algorithm. Its state_dict is its checkpoint."""

    def __init__(self, config: TrainConfig, shape: list[int], action_sizes: list[int], frame_max: float):
        super().__init__()
        self.config = config
        n_outputs = {"dqn": 1, "c51": config.n_atoms, "qr": config.n_quantiles}[config.head]
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        sizes, more = (shape, action_sizes, config.hidden_dim, config.encoder), (config.frame_stack, frame_max, dtype)
        self.critic = QNetwork(*sizes, config.head, n_outputs, config.normalize_features, *more)
        self.critic.epsilon = config.eval_epsilon
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        has_clone = config.cql_variant == "var" and not config.bc_only  # of the data's actions
        self.behaviour = QNetwork(*sizes, "dqn", 1, False, *more) if has_clone else None
        self.to(config.device)
        self.parameter_groups = {"critic": list(self.critic.parameters())}
        if self.behaviour:
            self.parameter_groups["behaviour"] = list(self.behaviour.parameters())
        groups = [{"params": parameters} for parameters in self.parameter_groups.values()]
        groups[0]["weight_decay"] = config.weight_decay
        on_gpu = "cuda" in config.device  # steps are recorded in CUDA graphs there
        options = {"eps": config.adam_eps, "weight_decay": 0, "fused": True, "capturable": on_gpu}
        self.optimizer = torch.optim.AdamW(groups, config.qf_lr, **options)
        self.n_updates = 0
        self.compute_gradients = self.gradients  # or compiled
        self.average = None  # averages gradients over the processes, if there are several

    @property
    def actor(self) -> QNetwork:
        """The network itself, which acts greedily."""
        return self.critic

    # local: values of all actions, or distributions
    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """r + gamma Z'(s', a') as quantiles, or as probabilities of the atoms (c51): -> [B, Z]."""
        critic, next_outputs = self.critic, self.target_critic(batch.next_observations)  # [B, A, Z]
        next_actions = batch.next_actions  # the data's, with sarsa
        if self.config.target != "sarsa":
            outputs = next_outputs if self.config.target == "max" else critic(batch.next_observations)
            next_actions = allowed(critic.values(outputs), batch.next_masks).argmax(dim=1)
        next_outputs = of_actions(next_outputs, next_actions)  # [B, Z]
        if self.config.head == "c51":
            return project(next_outputs.softmax(dim=1), critic.atoms, batch.rewards, batch.discounts)
        return batch.rewards.unsqueeze(1) + batch.discounts.unsqueeze(1) * next_outputs

    def td_loss(self, outputs: Tensor, td_target: Tensor) -> Tensor:
        """TD loss of the data's actions: [B, Z], [B, Z] -> []."""
        if self.config.head == "c51":
            return -(td_target * outputs.log_softmax(dim=1)).sum(dim=1).mean()
        return quantile_loss(outputs, td_target, self.config.td_error == "huber").mean()

    def gap(self, batch: Batch, q: Tensor) -> Tensor:
        """CQL(H)'s gap log sum_a exp Q(s, a) - Q(s, a_data), a cross-entropy with Q as logits; CQL(rho)'s, with rho as
        weights in the sum; or CQL(var)'s, the standard deviation of Q under the clone: [B, A] -> []."""
        if self.config.bc_only or self.config.cql_variant == "H":
            return F.cross_entropy(q, batch.actions)
        if self.config.cql_variant == "rho":
            return ((q + self.rho(batch).log()).logsumexp(dim=1) - of_actions(q, batch.actions)).mean()
        probabilities = self.behaviour_logits(batch).detach().softmax(dim=1)
        q = q.masked_fill(probabilities == 0, 0)  # not -inf
        deviations = q - (probabilities * q).sum(dim=1, keepdim=True)
        return ((probabilities * deviations.square()).sum(dim=1) + 1e-8).sqrt().mean()  # its gradient is finite at 0

    @torch.no_grad()
    def rho(self, batch: Batch) -> Tensor:
        """The policy of the target network, with cql_rho_epsilon of random allowed actions: -> [B, A]."""
        q = allowed(self.critic.values(self.target_critic(batch.observations)), batch.masks)
        uniform = allowed(torch.zeros_like(q), batch.masks).softmax(dim=1)
        greedy = F.one_hot(q.argmax(dim=1), q.shape[1])
        return (1 - self.config.cql_rho_epsilon) * greedy + self.config.cql_rho_epsilon * uniform

    def behaviour_logits(self, batch: Batch) -> Tensor:
        """The clone's logits, -inf where not allowed: -> [B, A]."""
        return allowed(self.behaviour(batch.observations).squeeze(-1), batch.masks)

    def dr3(self, batch: Batch, features: Tensor) -> Tensor:
        """Mean dot product of the features, which all actions share, at s and n_step steps later: [B, H] -> []."""
        next_features = self.critic.features(batch.next_observations)
        return ((features * next_features).sum(dim=1) * (1 - batch.terminals)).mean()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """TD loss + cql_alpha gap + dr3_coefficient dr3, or only the gap (behaviour cloning), and metrics."""
        config = self.config
        features = self.critic.features(batch.observations)  # [B, H]
        outputs = self.critic.outputs(features)  # [B, A, Z]
        q = allowed(self.critic.values(outputs), batch.masks)  # [B, A]
        gap = self.gap(batch, q)
        metrics = {"cql_qf_diff": gap} | self.action_metrics(q, batch.actions, batch.masks)
        if config.bc_only:
            return gap, metrics
        outputs, td_target = of_actions(outputs, batch.actions), self.td_target(batch)  # [B, Z]
        td_loss = self.td_loss(outputs, td_target)
        metrics |= {"qf_loss": td_loss, "cql_min_qf_loss": config.cql_alpha * gap}
        if config.head == "c51":
            metrics["average_target_q"] = (td_target @ self.critic.atoms).mean()
            metrics["c51_edge_mass"] = (td_target[:, 0] + td_target[:, -1]).mean()
        else:
            metrics["average_target_q"] = td_target.mean()
            errors = td_target.unsqueeze(1) - outputs.unsqueeze(2)
            metrics["td_linear_share"] = (errors.abs() > 1).to(gap.dtype).mean()
        loss = td_loss + config.cql_alpha * gap
        if config.dr3_coefficient > 0:
            metrics["dr3_loss"] = dr3 = self.dr3(batch, features)
            loss = loss + config.dr3_coefficient * dr3
        return loss, metrics

    @torch.no_grad()
    def action_metrics(self, q: Tensor, actions: Tensor, masks: Optional[Tensor] = None) -> dict[str, Tensor]:
        """Metrics of the values, -inf where not allowed: q [B, A], actions [B], masks [B, A] -> scalars."""
        best, q_data = q.max(dim=1), of_actions(q, actions)  # [B]
        if masks is None:
            std = q.std(dim=1, correction=0)
        else:  # of the allowed actions
            n = masks.sum(dim=1, keepdim=True)
            mean = torch.where(masks > 0, q, 0).sum(dim=1, keepdim=True) / n
            std = (torch.where(masks > 0, q - mean, 0).square().sum(dim=1, keepdim=True) / n).sqrt()
        return {
            "average_qf": q_data.mean(),
            "cql_q_greedy": best.values.mean(),
            "cql_std_q": std.mean(),
            "cql_data_probability": (q_data - q.logsumexp(dim=1)).exp().mean(),
            "greedy_is_data": (best.indices == actions).to(q.dtype).mean(),
        }

    # local: one network, one loss
    def gradients(self, batch: Batch) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
        """Returns gradients of the losses of the network and of the clone, and metrics. Changes nothing."""
        loss, metrics = self.loss(batch)
        gradients = {"critic": torch.autograd.grad(loss, self.parameter_groups["critic"])}
        metrics["critic_grad_norm"] = nn.utils.get_total_norm(gradients["critic"])
        if self.behaviour:
            metrics["behaviour_loss"] = loss = F.cross_entropy(self.behaviour_logits(batch), batch.actions)
            gradients["behaviour"] = torch.autograd.grad(loss, self.parameter_groups["behaviour"])
        return gradients, {name: value.detach() for name, value in metrics.items()}

    # local: the policy is the network itself, and clones from the first update on
    def phases(self) -> list[tuple]:
        """Further arguments of `gradients`, now and later."""
        return [()]

    # local: one network, whose gradients are averaged over the processes, then clipped
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a step of the network, then of its target."""
        gradients, metrics = self.compute_gradients(batch)
        if self.average:
            self.average(gradients)
            metrics["critic_grad_norm"] = nn.utils.get_total_norm(gradients["critic"])
        for name, values in gradients.items():
            for parameter, gradient in zip(self.parameter_groups[name], values):
                parameter.grad = gradient
        if self.config.max_grad_norm < math.inf:
            factor = (self.config.max_grad_norm / metrics["critic_grad_norm"]).clamp(max=1)
            torch._foreach_mul_(gradients["critic"], factor)  # in place: the parameters have them
        self.optimizer.step()
        self.n_updates += 1
        if self.n_updates % self.config.target_update_period == 0:
            with torch.no_grad():
                targets, sources = list(self.target_critic.parameters()), self.parameter_groups["critic"]
                torch._foreach_lerp_(targets, sources, self.config.soft_target_update_rate)
        return metrics

    # local: the value of the greedy action
    @torch.no_grad()
    def start_values(self, observations: np.ndarray) -> np.ndarray:
        """Returns what the network predicts: max_a Q(s, a) for raw observations [B, O] -> [B]."""
        values = self.critic.scores(as_stacks(observations, self.critic)).max(dim=1).values
        return values.cpu().numpy()

    # local: the loss has other parts
    @torch.no_grad()
    def holdout_metrics(self, batch: Batch) -> dict[str, float]:
        """Losses and data Q on held-out transitions."""
        _, metrics = self.loss(batch)
        names = {"qf_loss": "holdout_td_error", "cql_qf_diff": "holdout_gap", "average_qf": "holdout_q"}
        return {new: metrics[name].item() for name, new in names.items() if name in metrics}

    @torch.no_grad()
    def feature_metrics(self, batch: Batch) -> dict[str, float]:
        """Metrics of what DR3 acts on. The rank is the number of singular values that make up 99 % of their sum."""
        self.eval()  # without dropout
        features, following = (self.critic.features(x) for x in (batch.observations, batch.next_observations))
        self.train()
        share = torch.linalg.svdvals(features).cumsum(dim=0)
        return {
            "feature_rank": float((share < 0.99 * share[-1]).sum() + 1),
            "feature_norm": features.norm(dim=1).mean().item(),
            "feature_dot": (features * following).sum(dim=1).mean().item(),
            "feature_cosine": F.cosine_similarity(features, following).mean().item(),
        }

    def get_extra_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()["state"], "n_updates": self.n_updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.n_updates = state["n_updates"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})


def train(config: TrainConfig, data: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Trains on `data` (what load_dataset returns; by default that of config.env), evaluates, and returns the last row
    of metrics.csv. If the run folder holds a part of the run, that is continued. Raises ConfigError and DataError."""
    ranks = Ranks(config)
    run = ranks.open_run(config)
    if run.is_complete:
        print(f"{run.path} is complete: {describe(run.rows[-1])}")
        return run.rows[-1]
    data = with_stacks(config, load_dataset(config.env) if data is None else data)
    task = Task(config, data)
    data, holdout, frames, sizes, scaling = prepare_data(config, data, task)
    torch.manual_seed(config.seed)
    agent = DiscreteCQL(config, *ranks.share(sizes))
    if config.head == "c51" and not (run.checkpoint and config.v_min is config.v_max is None):
        scaling["atoms"] = support(data, config)
    buffer = ReplayBuffer(td_columns(ranks.part(data, config.env), config), config.device)
    holdout = frames.fill(holdout_batch(config, td_columns(holdout, config, "held-out")))
    frames.load(buffer, config)
    features = frames.fill(buffer.rows(slice(None, None, 1 + buffer.size // 2048)))  # for their metrics
    run.restore(agent, task)
    agent.actor.load_state_dict(scaling, strict=False)
    ranks.start(agent, run)
    run.begin(task, agent.n_updates)
    try:
        run_until = ranks.together(updater(config, agent, ranks.sampler(buffer, frames), run), agent)
        for step in run.stops():  # where a record or a row of metrics.csv is due
            run_until(step, run.progress)
            if Signals.received:
                task.check(run.means(), agent)  # no checkpoint of a run that diverged
                run.save(agent, random=ranks.random_states(run))
                ranks.finish()
                print(f"signal {Signals.received}: saved in {run.path}")
                raise SystemExit(128 + Signals.received)
            metrics = task.check(run.next_record(step), agent)
            if run.is_row_due(step):
                row = task.evaluate(agent, holdout) | agent.feature_metrics(features) if ranks.is_first else {}
                metrics |= run.add_row(step, task.check(row, agent))
            run.log(metrics, step)
            run.save(agent, step, random=ranks.random_states(run))
        ranks.finish()
    finally:
        ranks.over.set()
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


# local: the frames are stored once, so the columns are those beside them
COLUMNS = ("actions", "rewards", "terminals", "timeouts")
# local: what goes with frames
OPTIONAL = "action_low action_high reference_scores environment episode_returns frames starts frame_max"
MAX_ENVS, MAX_STEPS = 32, 30_000  # evaluation episodes side by side; most steps of one, as a policy may stand still
GRAPH_UPDATES = 10  # updates in one CUDA graph
EVALUATION = (
    "eval_return eval_return_std d4rl_normalized_score updates_per_second "
    "eval_length eval_success eval_predicted_value eval_discounted_return"
)
# local: those of images, too
# Wrappers of a recording in which a policy is played too, and those that change nothing.
WRAPPERS = "AtariPreprocessing GrayscaleObservation ResizeObservation ClipReward StickyAction"
IDLE_WRAPPERS = "RecordEpisodeStatistics RecordVideo OrderEnforcing PassiveEnvChecker"
# How the DQN replay data were recorded: sticky actions, 27,000 steps at most, and each game's own actions.
ATARI = {
    "frameskip": 1, "repeat_action_probability": 0.25, "full_action_space": False,
    "max_num_frames_per_episode": 108_000, "wrappers": [["AtariPreprocessing", {"noop_max": 0, "frame_skip": 4}]],
}  # fmt: skip
GAMES = {"ALE": ("ale_py", "ale-py opencv-python-headless"), "MinAtar": ("minatar.gym", "minatar")}
AGREE_UPDATES = 8  # updates between two questions to the others for signals: too few for a CUDA graph, on purpose
SILENCE = 20  # seconds after which a process that shows no life counts as dead; torchrun kills after 30
JOIN = datetime.timedelta(minutes=10)  # for all processes to start
PATIENCE = datetime.timedelta(hours=2)  # of a living process that waits for others, which may evaluate
# local: the network that acts, and that policy.pt holds
Policy = QNetwork
# local: limits of the options, both ends included, or the words that an option takes
LIMITS = {
    "seed eval_seed qf_lr adam_eps weight_decay cql_alpha dr3_coefficient": (0, 1e12),
    "max_timesteps eval_freq n_episodes batch_size buffer_size log_interval": (1, 1e12),
    "target_update_period hidden_dim n_step n_quantiles": (1, 1e6),
    "frame_stack": (1, 100),
    "n_atoms": (2, 1e6),
    "reward_scale reward_bias v_min v_max": (-1e12, 1e12),
    "discount soft_target_update_rate eval_epsilon cql_rho_epsilon": (0, 1),
    "holdout_fraction": (0, 0.9),
    "reward_clip max_grad_norm": (1e-6, math.inf),
    "precision": ("float32", "tf32", "bfloat16"),
    "encoder": ("nature", "impala", "minatar"),
    "head": ("dqn", "c51", "qr"),
    "target": ("double", "max", "sarsa"),
    "td_error": ("squared", "huber"),
    "cql_variant": ("H", "rho", "var"),
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


# local: stacks of frames stay images
def flatten(observations: Any, space: gym.Space) -> np.ndarray:
    """Stacks as the network takes them: [N, frames, Y, X(, channels)] -> [N, O]. Raises DataError for other kinds."""
    if len(getattr(space, "shape", None) or ()) not in (3, 4) or space.dtype not in (np.uint8, np.bool):
        raise DataError(f"observations are {space}; this script takes images, or planes of flags")
    stacks = np.asarray(observations).astype(np.uint8)
    if stacks.ndim == 5:
        stacks = np.moveaxis(stacks, -1, 2)
    return stacks.reshape(len(stacks), -1, *stacks.shape[-2:])


# local: images, mapped from the disk
def load_dataset(name: str) -> dict[str, Any]:
    """The frames and transitions of an imported dataset, in order. This is the one function to replace for other data.
    Raises DataError.

    frames [F, Y, X] or [F, channels, Y, X], uint8, mapped from the disk, each once; starts [episodes], the number of
    each one's first frame, from which frames go with transitions one by one; actions [T, k] in the environment's
    numbers, rewards [T], and the flags terminals [T] (the next state is terminal: its frame may be missing) and
    timeouts [T] (the episode ends for another reason: one more frame). Optional: action_low, action_high [k], frame_max
    (largest value of a pixel, 255), reference_scores [2] (returns that score 0 and 100), environment (what gym.make
    takes, and `wrappers`: names and arguments) and episode_returns [episodes] (if not the sums of the rewards).
    """
    path = minari.storage.get_dataset_path(name)
    how = "benchmarks/import_data.py imports frames, and --list shows what is there"
    if (path / "data").exists():
        raise DataError(f"--env {name}: {path} is a Minari dataset; import its images (import_data.py --frames {name})")
    with explain(f"--env {name} cannot be read from {path}; {how}"):
        metadata = json.loads((path / "metadata.json").read_text("utf-8"))
        form = metadata["format"], metadata["kind"]
        if form != (1, "frames"):
            other = "; algorithms/discrete/cql_dqn.py reads transitions" if form[1] == "transitions" else ""
            raise DataError(f"--env {name} has format {form[0]} of {form[1]}; this script reads 1 of frames{other}")
        data = {key: np.load(path / f"{key}.npy") for key in (*COLUMNS, "starts")}
        data["frames"] = np.load(path / "frames.npy", mmap_mode="r")
        low, high = (np.ravel(np.array(metadata[f"action_{end}"], np.int64)) for end in ("low", "high"))
    data["actions"] = data["actions"].reshape(len(data["actions"]), -1)
    space = gym.spaces.MultiDiscrete(high - low + 1, start=low)
    told = {key: metadata[key] for key in OPTIONAL.split() if metadata.get(key) is not None}
    if "episode_returns" in told:
        told["episode_returns"] = np.array(told["episode_returns"])
    return told | data | action_bounds(space, f"--env {name}")


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


# local: discrete actions
def action_bounds(space: gym.Space, name: str) -> dict[str, Any]:
    """Lowest and highest number of each part of an action, [k]. Raises DataError."""
    if not isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        kinds = "Discrete and MultiDiscrete ones; algorithms/offline/cql.py takes Box ones"
        raise DataError(f"{name} has actions {space}, this script takes {kinds}")
    low, sizes = np.ravel(space.start), np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))
    return {"action_low": low, "action_high": low + sizes - 1}


# local: discrete actions
def encode_actions(data: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of each action among all combinations of its parts, [T, k] -> [T]; and the bounds of the parts, [k].

    Unknown bounds are taken as 0 and the largest number in the data. Raises DataError.
    """
    actions = data["actions"]
    low, high = data.get("action_low", np.zeros(actions.shape[1])), data.get("action_high", actions.max(axis=0))
    low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
    if (wrong := (actions != np.rint(actions)) | (actions < low) | (actions > high)).any():
        raise DataError(f"--env {name}: an action is {actions[wrong][0]:g}, not a whole number from {low} to {high}")
    sizes = high - low + 1
    if len(sizes) > 32 or np.prod(sizes.astype(np.float64)) > 100_000:
        raise DataError(f"--env {name} has {' x '.join(map(str, sizes))} actions; this script takes up to 100,000")
    indices = np.ravel_multi_index(tuple((actions - low).astype(np.int64).T), sizes)
    return indices, low, high


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


def td_columns(data: dict[str, np.ndarray], config: TrainConfig, part: str = "training") -> dict[str, np.ndarray]:
    """The columns of a Batch, with n-step rewards that end with the episode."""
    if config.target == "sarsa" and not config.bc_only:
        data = with_next_actions(data, config.env, "--target sarsa", part)
    ends = data["terminals"] | data["timeouts"]
    ends[-1:] = True
    rows = np.arange(len(ends))
    last, rewards = rows, data["rewards"].astype(np.float64)
    for i in range(1, config.n_step):
        if not (going := ~ends[last]).any():
            break
        last = last + going
        rewards += going * config.discount**i * data["rewards"][last]
    discounts = config.discount ** (last - rows + 1) * ~data["terminals"][last]
    after = ("next_observations", "terminals", "next_actions", "next_masks")
    data = data | {key: data[key][last] for key in after if key in data and config.n_step > 1}
    return data | {"rewards": rewards, "discounts": discounts}


def support(data: dict[str, np.ndarray], config: TrainConfig) -> Tensor:
    """Atoms of c51, from v_min to v_max: by default the range of the data's discounted returns, which end at time-outs,
    with a quarter of it added on either side."""
    returns = episodes(data, config.discount)[1]
    low, high = returns.min(), returns.max()
    margin = (high - low) / 4 or max(1.0, abs(high) / 100)
    low = low - margin if config.v_min is None else config.v_min
    high = high + margin if config.v_max is None else config.v_max
    if not low < high:
        raise ConfigError(f"--v_min {low:g} is not below --v_max {high:g} (one follows from the data); give both")
    atoms = torch.linspace(float(low), float(high), config.n_atoms)
    if not (atoms.float().diff() > 0).all():
        raise ConfigError(f"--v_min {low:g} and --v_max {high:g} are too close for {config.n_atoms} atoms in float32")
    return atoms


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


class Frames:
    """All frames, each once: mapped from the disk, or on the device. Makes stacks when transitions are sampled."""

    def __init__(self, data: dict[str, Any], config: TrainConfig):
        """Takes the frames out of `data`, and puts the number of each transition's last frame, and of the one after it,
        in as observations and next_observations. Raises DataError."""
        frames, starts = data.pop("frames", np.empty(0)), np.asarray(data.pop("starts", ()))
        ends, rows = data["terminals"] | data["timeouts"], np.arange(len(data["rewards"]))
        ends[-1:] = True
        lasts = np.flatnonzero(ends)
        lengths = np.diff(lasts, prepend=-1)
        if frames.ndim not in (3, 4) or frames.dtype != np.uint8 or starts.shape != lasts.shape or starts[0]:
            shapes = f"frames {frames.dtype} {[*frames.shape]}, {starts.size} starts, {len(lasts)} episodes"
            raise DataError(f"--env {config.env}: {shapes}; frames are uint8 images, with a start for each episode")
        n_frames = np.diff(starts, append=len(frames))
        if (bad := (n_frames < lengths + ~data["terminals"][lasts]) | (n_frames > lengths + 1)).any():
            i = bad.argmax()
            told = f"episode {i} has {lengths[i]} transitions and {n_frames[i]} frames"
            raise DataError(f"--env {config.env}: {told}; it takes one more frame than transitions")
        data["observations"] = rows + np.repeat(starts - (lasts - lengths + 1), lengths)
        # After a terminal state comes nothing: its frame need not exist, and the one before stands for it.
        data["next_observations"] = np.minimum(data["observations"] + 1, np.repeat(starts + n_frames - 1, lengths))
        self.frames, self.first = np.asarray(frames), 0  # number of the first one that is held
        self.starts = torch.tensor(starts, device=config.device)
        self.shape = [config.frame_stack * math.prod(frames.shape[1:-2]), *frames.shape[-2:]]
        self.places = torch.arange(1 - config.frame_stack, 1, device=config.device)

    def load(self, buffer: ReplayBuffer, config: TrainConfig) -> None:
        """Copies the frames of the buffer's transitions to the device, if that is wanted."""
        first, last = int(buffer.columns.observations.min()), int(buffer.columns.next_observations.max())
        size, wanted = (last + 1 - first) * self.frames[0].nbytes, config.frames_on_device
        if wanted is None:
            wanted = "cuda" in config.device and size < 0.8 * torch.cuda.mem_get_info(config.device)[0]
        place = f"copied to {config.device}" if wanted else "read as they are sampled"
        print(f"{config.env}: {size / 1e9:,.2f} GB of frames of shape {[*self.frames.shape[1:]]}, {place}")
        if wanted:
            frames = torch.empty(last + 1 - first, *self.frames.shape[1:], dtype=torch.uint8, device=config.device)
            for i in range(0, len(frames), 10_000):
                frames[i : i + 10_000] = torch.tensor(self.frames[first + i : first + i + 10_000])[: len(frames) - i]
            self.frames, self.first = frames, first

    def fill(self, batch: Batch) -> Batch:
        """Replaces numbers of last frames by stacks: [B] -> [B, O]."""
        after = self.stacks(batch.next_observations)
        return batch._replace(observations=self.stacks(batch.observations), next_observations=after)

    def stacks(self, lasts: Tensor) -> Tensor:
        """Stacks that end with these frames, with zeros before an episode's start: [B] -> [B, O], uint8."""
        starts = self.starts[torch.searchsorted(self.starts, lasts.contiguous(), right=True) - 1]
        numbers = lasts.unsqueeze(1) + self.places
        known = numbers >= starts.unsqueeze(1)
        numbers = torch.maximum(numbers, starts.unsqueeze(1)) - self.first
        if isinstance(self.frames, Tensor):
            stacks = self.frames[numbers]
        else:
            stacks = torch.from_numpy(self.frames[numbers.cpu().numpy()]).to(lasts.device)
        return (stacks * known.view(*known.shape, *[1] * (stacks.ndim - 2))).flatten(1, -3)


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


# local: stacks of as many frames as the policy takes
def evaluate(policy: Callable, env: str, n_episodes: int, seed: int, **arguments: Any) -> dict[str, list]:
    """Plays a policy of load_policy in the Gymnasium environment `env`, made with these arguments (see load_dataset's
    `environment`; by default as Atari's DQN replay data were recorded). Returns what rollout returns. Raises
    DataError."""
    arguments = {"frame_stack": policy.network.frame_stack} | (arguments or (ATARI if "ALE/" in env else {}))
    n = math.ceil(n_episodes / math.ceil(n_episodes / MAX_ENVS))
    with contextlib.closing(make_environments(env, n, env, **arguments)) as envs:
        for key, found in action_bounds(envs.single_action_space, env).items():
            if found.tolist() != (own := getattr(policy.network, key).tolist()):
                raise DataError(f"{key} is {found.tolist()} in {env}, and {own} in the policy")
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


class FreshGame(gym.Wrapper):
    """An episode depends on its seed alone: MinAtar keeps the last action, which may be repeated, when it resets."""

    def reset(self, **options: Any) -> tuple[Any, dict]:
        self.unwrapped.game.last_action = 0
        return self.env.reset(**options)


def with_stacks(config: TrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The data with the environment to evaluate in, its own or the one that is asked for, as it makes stacks."""
    arguments = dict(data.get("environment") or {"id": "none"})
    id = (config.eval_env or arguments["id"]).rpartition(":")[2]
    if id not in (arguments["id"], "none"):
        if arguments["id"] != "none":
            print(f"{id} is made with its defaults; the data were recorded in {arguments}")
        arguments = (ATARI if id.startswith("ALE/") else {}) | {"id": id}
    return data | {"environment": arguments | {"frame_stack": config.frame_stack}}


# local: games of other packages, and stacks of frames
def make_environments(
    eval_env: Optional[str], n: int, /, id: str, wrappers: Any = (), frame_stack: int = 1, **arguments: Any
) -> Optional[gym.vector.SyncVectorEnv]:
    """Returns None if none is wanted, or Gymnasium does not know the dataset's. Raises ConfigError or DataError."""
    kind, makers = ConfigError if eval_env else DataError, []
    problem = f"environment {id} cannot be made; --eval_env takes another, MODULE:ID (local: PYTHONPATH=.), or none"
    package, names = GAMES.get(id.partition("/")[0], (None, None))
    if package and id not in gym.registry:
        logging.disable()  # MinAtar complains that it cannot draw
        try:
            with explain(f"{id} needs: pip install {names} (or --eval_env none)", kind):
                getattr(importlib.import_module(package), "register_envs", list)()
        finally:
            logging.disable(logging.NOTSET)
    if id not in gym.registry and eval_env in (None, "none"):  # a name in data could import any module
        return None
    for name, options in wrappers:
        if name in WRAPPERS.split() and options is not None:
            options = {key: tuple(x) if isinstance(x, list) else x for key, x in options.items()}  # JSON has no tuples
            makers.append(functools.partial(getattr(gym.wrappers, name), **options))
        elif name in IDLE_WRAPPERS.split():
            print(f"{id}: the recording's {name} changes nothing and is left out")
        else:
            raise kind(f"{problem} (it was recorded through {name}, which this script does not know)")
    makers += [FreshGame] if id.startswith("MinAtar/") else []
    stacked = functools.partial(gym.wrappers.FrameStackObservation, stack_size=frame_stack, padding_type="zero")
    with explain(problem, kind):
        return gym.make_vec(id, n, "sync", wrappers=[*makers, stacked, Success], **arguments)


# local: images, and actions by number
def narrow_actions(data: dict[str, Any], envs: gym.vector.SyncVectorEnv, name: str) -> None:
    """Sets unknown bounds of actions in `data` to the environment's. Raises DataError if they differ, or frames do."""
    id, own, space = envs.spec.id, action_bounds(envs.single_action_space, envs.spec.id), envs.single_observation_space
    first, frames = flatten(envs.observation_space.sample(), space), data["frames"]
    sizes = [space.shape[0] * math.prod(frames.shape[1:-2]), *frames.shape[-2:]], data["actions"].shape[1]
    if sizes != (own_sizes := ([*first.shape[1:]], own["action_low"].size)):
        raise DataError(f"{name} has stacks and actions of sizes {sizes}, {id} {own_sizes}: change --eval_env")
    for key in ("action_low", "action_high"):
        if (bound := np.asarray(data.setdefault(key, own[key])).tolist()) != own[key].tolist():
            raise DataError(f"{key} is {bound} in {name}, {own[key].tolist()} in {id}: change --eval_env")


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


# local: frames need no scaling
def prepare_data(config: Any, data: dict[str, Any], task: Task) -> tuple[dict, dict, Frames, tuple, dict]:
    """Transitions to train on and held-out ones, the frames of both, the network's sizes and the range of actions."""
    frames, frame_max = Frames(data, config), float(data.get("frame_max", 255))
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
    columns = (*COLUMNS, "observations", "next_observations")
    holdout, data = ({key: data[key][rows] for key in columns} for rows in (held_out, ~held_out))
    scaling = {"action_low": torch.tensor(low), "action_high": torch.tensor(high)}
    return data, holdout, frames, (frames.shape, (high - low + 1).tolist(), frame_max), scaling


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


# local: a policy takes stacks, and has scores
def load_policy(path: Path | str, device: str = "cpu") -> Callable[..., Any]:
    """The greedy policy of a policy.pt or checkpoint.pt, policy(observation) -> action: from stacks of frames as the
    data have them, uint8 [O] or [B, O], to actions in the environment's numbers, [] or [B], or [k] or [B, k] for
    actions of k > 1 parts. policy.scores(observation) returns each action's value, [A] or [B, A]. Raises DataError."""
    state = load(path, device)
    with explain(f"{path} is not a policy.pt or checkpoint.pt of this script"):
        state = state.get("policy", state)
        actor = Policy(*state["sizes"]).to(device)
        actor.load_state_dict(state["weights"])
    policy = functools.partial(actor.eval().act)
    policy.network, policy.scores = actor, functools.partial(actor.act, result="scores")
    return policy


def as_stacks(observations: Any, network: QNetwork) -> Tensor:
    """Stacks, [O] or [B, O], as a tensor [B, O] on the network's device. Raises DataError."""
    array = np.asarray(observations)
    if array.shape[-3:] != network.shape or array.ndim > 4 or array.dtype not in (np.uint8, np.bool):
        takes = f"uint8 or bool of shape {network.shape}, not {array.dtype} of shape {array.shape}"
        raise DataError(f"an observation is a stack of frames, {takes}")
    return torch.tensor(array.reshape(-1, *network.shape).astype(np.uint8), device=network.atoms.device)


def check_encoding(first: Any, second: Any, problem: str) -> None:
    """Raises DataError if the columns of two tables differ in name, order, categories, offset or bounds."""
    if bool(first) != bool(second):
        print(f"{problem}: only the {'first' if first else 'second'} has names of columns, so they cannot be compared")
    for part in ("observations", "actions", "masks") if first and second else ():
        for own, other in itertools.zip_longest(*(x.get(part, ()) for x in (first, second)), fillvalue="none"):
            if own != other:
                columns = f"{str(own)[:500]} and {str(other)[:500]}"
                raise DataError(f"{problem} differ in {part}: {columns}; import the data with --like <the other>")


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


class Follower(Run):
    """The Run of all processes but the first: it counts as the first one's does, and writes nothing."""

    def __init__(self, config: Any, n_steps: int):
        config.run_id, config.load_model, config.eval_env = None, "", "none"
        super().__init__(config, n_steps)

    def begin(self, task: Task, step: int, unit: str = "update") -> None:
        self.progress = tqdm(disable=True)

    def add_row(self, step: int, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(dict.fromkeys(EVALUATION.split()) | {"step": step})
        return {}

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def save(self, agent: Any, step: Optional[int] = None, **more: Any) -> None: ...

    def end(self, *environments: Any) -> None: ...


def own_device(device: str) -> str:
    """The GPU of this process, if torchrun started several: one each. Raises ConfigError."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device == "cpu" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device not in ("cuda", own):
        raise ConfigError(f"--device {device}: each of several processes takes a GPU of its own; give cuda or cpu")
    return own


class Ranks:
    """The processes that torchrun started, or this one alone. All have the same networks, and each other episodes; an
    update takes the mean of their gradients. The first one evaluates, writes and prints."""

    lost = "another process of this run ended, and its own output may say why; the same command with --run_id goes on"

    def __init__(self, config: TrainConfig):
        """Waits for the others. Raises ConfigError or DataError."""
        self.rank, self.n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_first, self.signal, self.over = self.rank == 0, 0, threading.Event()
        if self.n == 1:
            return
        if config.batch_size % self.n:
            raise ConfigError(f"--batch_size {config.batch_size} is not a multiple of the {self.n} processes")
        backend = "gloo"
        if config.device != "cpu":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(config.device)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.receive)
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
        with explain(f"process {self.rank} does not find the other {self.n - 1}, which torchrun would start"):
            store, *_ = next(dist.rendezvous("env://", timeout=JOIN))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.n, timeout=PATIENCE)
        self.silent = {x: 0 for x in range(self.n) if x != self.rank}  # seconds that each was
        for work, *arguments in ((self.beat, store.clone()), (self.watch,)):
            thread = threading.Thread(target=work, args=arguments, daemon=True)
            thread.start()
            atexit.register(thread.join, 5)  # seconds: one that calls C++ while Python ends would abort it
        atexit.register(self.over.set)  # the last is called first
        self.share(None)  # none may fail, and leave, before all are connected

    def receive(self, number: int, _: Any) -> None:
        """Keeps the first signal until all processes know of it. Any further one may be torchrun's copy."""
        if not Signals.wait:
            os._exit(128 + number)
        self.signal = self.signal or number

    def beat(self, store: dist.Store) -> None:
        """Shows the others that this process lives, and notes when they did."""
        signs: dict[int, bytes] = {}
        with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
            while not self.over.wait(1):
                store.set(f"sign of {self.rank}", str(time.time()))
                for x in self.silent:
                    if store.check([f"sign of {x}"]) and store.get(f"sign of {x}") != signs.get(x):
                        signs[x], self.silent[x] = store.get(f"sign of {x}"), 0

    def watch(self) -> None:
        """Ends this process once another one shows no life: it would wait for it, and a GPU stand idle, for hours."""
        while not self.over.wait(1):
            for x in self.silent:  # by counting, as a clock goes on while a scheduler suspends all of them
                self.silent[x] += 1
            dead = [x for x, seconds in self.silent.items() if seconds > SILENCE]
            if dead and not self.over.is_set():
                told = f"{self.lost} (process {dead[0]} was silent for {SILENCE} s)"
                print(f"{Path(sys.argv[0]).name}: {told}", file=sys.stderr, flush=True)
                os._exit(1)

    def share(self, value: Any) -> Any:
        """The first process's value, tensors and plain values."""
        if self.n == 1:
            return value
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        size = torch.tensor(len(content))
        with explain(self.lost):
            dist.broadcast(size, 0)
            content = content.clone() if self.is_first else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)

    def open_run(self, config: TrainConfig) -> Run:
        """The run's folder and rows, for the first process; the others know only the rows. Raises DataError."""
        run = (Run if self.is_first else Follower)(config, config.max_timesteps)
        run.rows = self.share(run.rows)
        if run.is_complete:
            self.finish()
        return run

    def part(self, data: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        """This process's part of the transitions, in whole episodes that follow each other. Raises DataError."""
        if self.n == 1:
            return data
        ends = data["terminals"] | data["timeouts"]
        ends[-1:] = True
        lasts = np.flatnonzero(ends)
        lengths = np.diff(lasts, prepend=-1)
        owners = ((lasts + 1 - lengths / 2) * self.n / len(ends)).astype(int)  # where an episode's middle lies
        sizes = np.bincount(owners, lengths, self.n).astype(int)
        if not sizes.all():
            raise DataError(
                f"--env {name}: its {len(lasts):,} episodes are too few or too unequal for {self.n} processes"
            )
        print(f"{name}: {self.n} processes hold {sizes.min():,} to {sizes.max():,} transitions each")
        first = sizes[: self.rank].sum()
        return {key: column[first : first + sizes[self.rank]].copy() for key, column in data.items()}

    def sampler(self, buffer: ReplayBuffer, frames: Frames) -> Callable[[int], Batch]:
        """Returns a function that draws this process's part of a minibatch."""
        return lambda batch_size: frames.fill(buffer.sample(batch_size // self.n))

    def start(self, agent: Any, run: Run) -> None:
        """Gives all processes the first one's agent and counts, and each one random numbers of its own."""
        states = self.share(run.checkpoint["random"] if run.resumed else None)
        if self.n > 1:
            agent.load_state_dict(self.share(agent.state_dict()))
            run.done, agent.average = self.share(run.done), self.average
        if states is not None and states.shape == (self.n, len(run.rng.get_rng_state())):
            run.rng.set_rng_state(states[self.rank].cpu().clone())  # torch fails on a part of a tensor
        elif states is not None:
            reason = f"{len(states)} processes are now {self.n}" if len(states) != self.n else "the device is another"
            print(f"{reason}: from here on, minibatches are others than without the stop")
            torch.manual_seed(run.config.seed + self.rank + agent.n_updates)
        elif not self.is_first:
            torch.manual_seed(run.config.seed + self.rank)

    def random_states(self, run: Run) -> Tensor:
        """The states of all processes' random numbers, [processes, bytes]."""
        own = run.rng.get_rng_state()
        states = [torch.empty_like(own) for _ in range(self.n)]
        if self.n == 1:
            return own.unsqueeze(0)
        with explain(self.lost):
            dist.all_gather(states, own)
        return torch.stack(states)

    def average(self, gradients: dict[str, tuple[Tensor, ...]]) -> None:
        """Replaces the gradients by their means over the processes, in place."""
        every = list(itertools.chain(*gradients.values()))
        flat = torch.cat([x.reshape(-1) for x in every])
        with explain(self.lost):
            dist.all_reduce(flat)
        means = (flat / self.n).split([x.numel() for x in every])
        torch._foreach_copy_(every, [mean.view_as(x) for mean, x in zip(means, every)])

    def together(self, run_until: Callable, agent: Any) -> Callable:
        """The same function, which a signal to any process stops in all of them after the same update."""

        def run_together(step: int, progress: Any = None) -> None:
            while agent.n_updates < step and not Signals.received:
                received = torch.tensor(self.signal)
                with explain(self.lost):
                    dist.all_reduce(received, dist.ReduceOp.MAX)
                Signals.received = int(received)
                run_until(min(step, agent.n_updates + AGREE_UPDATES), progress)

        return run_until if self.n == 1 else run_together

    def finish(self) -> None:
        """Waits until all processes are here: one that leaves early is missed by those that still work."""
        self.share(None)
        self.over.set()
        if self.n > 1:
            dist.destroy_process_group()


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
