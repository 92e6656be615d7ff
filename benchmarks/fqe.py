"""Fitted Q evaluation (FQE): estimate from a dataset alone what stored policies would return, and rank them.

    python benchmarks/fqe.py runs/<run> runs/<run>/policy.pt --env lunarlander-continuous/medium-v0 --output fqe.csv

POLICY is a policy.pt, policy-<step>.pt or checkpoint.pt of any script, or a run folder, which stands for all its
policy-<step>.pt files (see --keep_policies). Policies of your own copy of a script, with another network, need --script
path/to/copy.py. For each policy networks learn Q(s, a) = r + discount Q(s', policy(s')) on the dataset. Time-outs
bootstrap, terminal states do not. All networks of all policies and seeds train at once, as one. They are fitted on one
part of the episodes, and everything that is printed refers to the other part (--fit_share).

The program prints one row per policy, best first. `estimate` is the mean of Q(s, policy(s)) over the starts of the
episodes: an estimate of the mean discounted return. After it come its 95 % bootstrap interval over the starts, and its
standard deviation over the seeds of the fit. `bounded` is the share of targets that lay well beyond what the rewards
allow; it is large where the fit diverges. `off data` says how far the policy's actions are from the data's, in the
states of the data. For discrete actions, `support` says for how many steps the data can follow the policy. If the
dataset has propensities, a second line has estimates by importance sampling and a doubly robust one. Two more rows
follow: FQE of the behaviour that recorded the data, and the behaviour's own discounted return. These two must agree.
A policy has a rank only if its fit is bounded and supported, and none has one if the fit disagrees with the returns.
--output writes the same table. docs/choosing.md says when not to trust it.

Exit status: 0 evaluated, 1 cannot be done, 2 a bad command line. An error is one line on stderr and writes nothing.
"""

import argparse
import contextlib
import copy
import csv
import inspect
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import yaml
from common import DataError, OptionError, Parser, check_encoding, fail, one_line_errors, open_policy, prefix
from importance import check_propensities, episode_samples, intervals
from torch import Tensor, nn
from tqdm import tqdm

# The fit's own networks and readers; the script of a policy is used by its interface alone.
from algorithms.discrete import cql_dqn
from algorithms.offline import cql

# Chosen by how soon FQE of the behaviour agrees with its returns on LunarLander; no policy's return was used.
HIDDEN_SIZES = [64, 64]  # widths of the hidden layers
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
TARGET_RATE = 0.1  # Polyak rate of the target networks, which also give the estimates
TRUST = 0.1  # largest accepted error of FQE of the behaviour, as a share of the spread of its returns
FEW_EPISODES = 20  # below this number of episodes, the data are cut into as many pieces
FEW_STARTS = 10  # estimates over fewer starts get a warning
# Support: see `support`. The share was set on LunarLander medium, seed 2 of choosing_evidence.md.
MIN_ROWS, HORIZON_SHARE = 30, 1 / 8
ESTIMATORS = {"ips": "IPS", "snips": "self-normalised", "dr": "doubly robust"}
BEHAVIOUR, RETURNS = "behaviour", "behaviour's returns"  # names of the last two rows
EXTRA = ("propensities", "masks", "next_masks")  # columns that a dataset of discrete actions may have


# Shapes: T transitions, N episodes, P policies (+ 1: the behaviour, last), S seeds of the fit, B batch, O observation,
# A action as the networks see it: numbers of the size of 1, or one-hot.


class FittedQ:
    """Q of P policies and of the behaviour, S networks each, as one ensemble of S (P + 1) critics. Policies differ only
    in their actions: the networks of one seed start alike and see the same minibatches."""

    def __init__(
        self, data: dict[str, np.ndarray], next_actions: np.ndarray, discount: float, n_seeds: int, seed: int,
        device: str,
    ):  # fmt: skip
        """data: observations and next_observations [T, O], actions [T, A], rewards [T], flags terminals and timeouts
        [T], one of which ends the last episode too. next_actions: the policies' in the next states, [P, T, A]."""

        def tensor(array: np.ndarray, dtype: Optional[torch.dtype] = torch.float32) -> Tensor:
            return torch.as_tensor(array, dtype=dtype, device=device)

        self.shape, self.generator = (n_seeds, len(next_actions) + 1), torch.Generator(device)
        self.generator.manual_seed(seed)
        # Values are learned in units of the data's returns, Q = centre + scale network; the rewards follow from that.
        to_go, discounts = cql.episodes(data, discount)[1], discount * ~data["terminals"]
        largest, self.limits = np.abs(to_go).max(), value_bounds(data, discount)
        self.centre, self.scale = to_go.mean(), to_go.std()
        if np.ptp(self.limits) <= 1e-6 * np.abs(self.limits).max():  # all values are equal, up to rounding
            self.centre, self.scale = self.limits[0], 0.0
        if self.scale <= 1e-6 * largest:
            self.scale = largest or 1.0
        self.bounds = [(limit - self.centre) / self.scale for limit in self.limits]
        self.rewards = tensor((data["rewards"] - self.centre * (1 - discounts)) / self.scale)
        self.discounts = tensor(discounts)
        self.known = tensor((discounts == 0) | ~data["timeouts"])  # whether the behaviour's next action is
        self.mean = data["observations"].mean(axis=0, dtype=np.float64).astype(np.float32)
        self.std = cql.scale(data["observations"])
        self.observations = tensor(self.normalise(data["observations"]))
        self.next_observations = tensor(self.normalise(data["next_observations"]))
        own = np.roll(data["actions"], -1, axis=0)[None]  # the next step's; another episode's where there is none
        self.actions = tensor(data["actions"], None)
        self.next_actions = tensor(np.concatenate([next_actions, own]), None)

        torch.manual_seed(seed)
        sizes = self.observations.shape[1], self.actions.shape[1]
        self.critic = cql.EnsembleCritic(*sizes, HIDDEN_SIZES, n_critics=n_seeds)
        for parameter in self.critic.parameters():
            parameter.data = parameter.data.repeat_interleave(self.shape[1], dim=0).to(device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), LEARNING_RATE, fused=True)

    def normalise(self, observations: np.ndarray) -> np.ndarray:
        return (observations - self.mean) / self.std

    def q(self, critic: cql.EnsembleCritic, observations: Tensor, actions: Tensor) -> Tensor:
        """[S, B, O] and [P + 1, S, B, A], or [1, S, B, A] for all policies -> [S, P + 1, B]."""
        observations = observations.unsqueeze(1).expand(*self.shape, -1, -1).flatten(0, 1)
        actions = actions.transpose(0, 1).expand(*self.shape, -1, -1).flatten(0, 1).unsqueeze(2)
        return critic(observations, actions.float()).view(*self.shape, -1)

    def update(self) -> Tensor:
        """One step of all networks. Targets are limited to what the rewards allow. Returns the share of them that lay
        beyond that by more than the check tolerates, [P + 1]."""
        size, device = (self.shape[0], BATCH_SIZE), self.rewards.device
        rows = torch.randint(len(self.rewards), size, generator=self.generator, device=device)
        with torch.no_grad():
            next_q = self.q(self.target, self.next_observations[rows], self.next_actions[:, rows])  # [S, P + 1, B]
            free = self.rewards[rows].unsqueeze(1) + self.discounts[rows].unsqueeze(1) * next_q
            td_target = free.clamp(*self.bounds)
            beyond = (free - td_target).abs() > TRUST
        error = (self.q(self.critic, self.observations[rows], self.actions[None, rows]) - td_target).square()
        error[:, -1] *= self.known[rows]
        self.optimizer.zero_grad()
        error.mean(dim=2).sum().backward()  # networks share no weights
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), TARGET_RATE)
        return beyond.float().mean(dim=(0, 2))

    @torch.no_grad()
    def values(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Values in these states: [N, O], [P + 1, N, A] -> [P + 1, S, N], limited to what the rewards allow. They come
        from the target networks, which are averages over many updates. Raises DataError."""
        device, parts = self.rewards.device, []
        for part in np.array_split(np.arange(len(observations)), len(observations) // 1000 + 1):
            states = torch.as_tensor(self.normalise(observations[part]), device=device).expand(self.shape[0], -1, -1)
            chosen = torch.as_tensor(actions[:, None, part], device=device).expand(-1, self.shape[0], -1, -1)
            parts.append(self.q(self.target, states, chosen).transpose(0, 1).cpu().numpy().astype(np.float64))
        values = self.centre + self.scale * np.concatenate(parts, axis=2)
        if not np.isfinite(values).all():
            raise DataError("the fit diverged, although its targets were bounded")
        return values.clip(*self.limits)


def value_bounds(data: dict[str, np.ndarray], discount: float) -> tuple[float, float]:
    """The lowest and highest value that the rewards allow: each for ever, or once if the next state is terminal."""
    values = data["rewards"] / (1 - discount * ~data["terminals"])
    return float(values.min()), float(values.max())


def episode_rows(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """First and last transition of each episode, [N]."""
    last = np.flatnonzero(data["terminals"] | data["timeouts"])
    return np.append(0, last[:-1] + 1), last


def rows_of(data: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The chosen transitions."""
    return {key: data[key][chosen] for key in (*cql.COLUMNS, *EXTRA) if key in data}


def split(data: dict[str, np.ndarray], share: float, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Chooses episodes to fit on and to report on: [T], [T], and words. With share 1 both are all episodes.

    If there are few episodes, long ones are cut into pieces, by time-outs in `data`, and the fit gets the first ones: a
    plant that never ends is fitted on its past and reported on what came later. Raises DataError.
    """
    n, (first, last) = len(data["rewards"]), episode_rows(data)
    found, words = len(first), ""
    if found < FEW_EPISODES:
        length = max(2, math.ceil(n / FEW_EPISODES))
        steps = np.arange(n) - np.repeat(first, last - first + 1)
        cuts = steps % length == length - 1
        cuts[last] = False
        data["timeouts"] = data["timeouts"] | cuts
        first, last = episode_rows(data)
        if len(first) > found:
            words = f"{found} episode{'s' * (found > 1)} cut into {len(first)} pieces of at most {length} steps, "
            words += "so values are those at the starts of pieces; "
    if share == 1:
        all_rows = np.ones(n, bool)
        return all_rows, all_rows, words + "fitted and reported on the same episodes (--fit_share 1)"
    if len(first) < 2:
        raise DataError("one episode is too little to fit on one part and report on the other; --fit_share 1 does both")
    order = np.arange(len(first)) if found < FEW_EPISODES else np.random.default_rng(seed).permutation(len(first))
    n_fitted = min(max(round(share * len(first)), 1), len(first) - 1)
    fitted = np.repeat(np.isin(np.arange(len(first)), order[:n_fitted]), last - first + 1)
    kind, which = ("pieces" if words else "episodes"), "the first " * (found < FEW_EPISODES)
    words += f"fitted on {which}{n_fitted:,} of {len(first):,} {kind} ({fitted.sum():,} transitions)"
    return fitted, ~fitted, words + ", reported on the others"


def fit(
    data: dict[str, np.ndarray], next_actions: np.ndarray, discount: float, n_updates: int, n_seeds: int,
    seed: int = 0, device: str = "cpu",
) -> tuple[FittedQ, np.ndarray]:  # fmt: skip
    """Fits Q of P policies, given by their actions in the data's next states [P, T, A], and of the behaviour. data: see
    FittedQ. Returns it, and the share of bounded targets in the second half of the updates [P + 1]. Raises
    DataError."""
    if discount > 0 and (data["timeouts"] & ~data["terminals"]).all():
        raise DataError("no two steps of the data follow each other: the fit could not be checked")
    q, bounded = FittedQ(data, next_actions, discount, n_seeds, seed, device), []
    for _ in tqdm(range(n_updates), unit="update", disable=None):
        bounded.append(q.update())
    return q, torch.stack(bounded[n_updates // 2 :]).mean(dim=0).cpu().numpy()


def behaviour_returns(q: FittedQ, data: dict[str, np.ndarray], discount: float) -> np.ndarray:
    """The discounted return of each episode [N]. At a time-out the value of the last step, by the behaviour's Q, takes
    the place of its reward. Raises DataError."""
    first, last = episode_rows(data)
    actions = np.broadcast_to(data["actions"][last], (q.shape[1], *data["actions"][last].shape))
    last_values = q.values(data["observations"][last], actions)[-1].mean(axis=0)
    beyond = (last_values - data["rewards"][last]) * (~data["terminals"][last] & (discount > 0))
    return cql.episodes(data, discount)[1][first] + discount ** (last - first) * beyond


def behaviour_model(data: dict[str, np.ndarray], sizes: list[int], n_updates: int, seed: int, device: str) -> Callable:
    """Fits how probable each action is in a state. The last tenth of the rows says which update was the best one.
    Parts of an action, of these sizes, are taken as independent. Returns a function of the data and one-hot actions
    [T, A] that gives the logarithms of their probabilities [T]."""
    mean, std = data["observations"].mean(axis=0, dtype=np.float64).astype(np.float32), cql.scale(data["observations"])
    torch.manual_seed(seed)
    *hidden, last = cql.linear_layers([len(mean), *HIDDEN_SIZES, sum(sizes)], True)
    network = nn.Sequential(*[module for layer in hidden for module in (layer, nn.ReLU())], last).to(device)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)

    def log_probabilities(data: dict[str, np.ndarray], actions: np.ndarray) -> Tensor:
        logits = network(torch.as_tensor((data["observations"] - mean) / std, device=device))
        if "masks" in data:
            logits = logits.masked_fill(~torch.as_tensor(data["masks"], device=device), -1e9)
        found = torch.cat([part.log_softmax(dim=-1) for part in logits.split(sizes, dim=-1)], dim=-1)
        return (found * torch.as_tensor(actions, device=device)).sum(dim=-1)

    rng, n = np.random.default_rng(seed), len(data["rewards"])
    n_test = math.ceil(n / 10)
    test, best, weights = rows_of(data, np.arange(n - n_test, n)), math.inf, None
    for i in range(n_updates):
        batch = rows_of(data, rng.integers(max(n - n_test, 1), size=BATCH_SIZE))
        loss = -log_probabilities(batch, batch["actions"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % 50 == 0 or i + 1 == n_updates:
            with torch.no_grad():
                error = -log_probabilities(test, test["actions"]).mean().item()
            if error < best:
                best, weights = error, copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    return lambda data, actions: log_probabilities(data, actions).detach().cpu().numpy().astype(np.float64)


def support(share: float, n: int) -> float:
    """For how many steps n rows hold MIN_ROWS stretches in which the behaviour acts as a policy does, if this share of
    them is left after each step."""
    if n < MIN_ROWS:
        return 0.0
    return math.inf if share >= 1 else math.log(n / MIN_ROWS) / -math.log(share)


def find_policies(paths: list[Path]) -> list[Path]:
    """The files; a folder stands for its policy-<step>.pt, in the order of steps. Raises DataError."""
    found = []
    for path in paths:
        kept = sorted(path.glob("policy-*.pt"), key=lambda file: (len(file.name), file.name))
        if path.is_dir() and not kept:
            raise DataError(f"{path} holds no policy-<step>.pt (--keep_policies True makes them): name its policy.pt")
        found += kept or [path]
    return found


def training_discount(paths: list[Path]) -> float:
    """The discount of the config.yaml files beside the policies; 0.99 if there are none. Raises DataError."""
    found = {}
    for file in {path.parent / "config.yaml" for path in paths}:
        if file.exists():
            with cql.explain(f"{file} is not the config.yaml of a run; --discount does without it"):
                found[float(yaml.safe_load(file.read_text())["discount"])] = file
    if len(found) > 1:
        raise OptionError(f"{' and '.join(map(str, found.values()))} have different discounts: give --discount")
    return next(iter(found), 0.99)


class Opened(NamedTuple):
    path: Path
    script: Any  # a module with the interface of a script
    act: Callable[..., np.ndarray]  # of observations, and masks where the data have them


def read_data(args: argparse.Namespace, first: Opened) -> dict[str, Any]:
    """The dataset, as the script of the first policy reads it. Raises a DataError."""
    with prefix(f"{first.path} is a policy of {Path(first.script.__file__).name}, which reads the data"):
        data = first.script.load_dataset(args.env)
        if "frames" in data:
            cure = "play policies of pixels by record.py, or by --eval_env of algorithms/discrete/cql_atari.py"
            raise DataError(f"--env {args.env} has frames, and FQE takes vectors; {cure}")
        extra = {key: np.asarray(data.pop(key)) for key in EXTRA if key in data}
        cql.check_dataset(data, SimpleNamespace(env=args.env, buffer_size=np.inf))
    n, size = data["actions"].shape
    if extra and (size > 1 or not is_discrete(data["actions"])):
        raise DataError(f"--env {args.env}: {' and '.join(extra)} go with discrete actions of one column only")
    if "propensities" in extra:
        with prefix(f"--env {args.env}"):
            extra["propensities"] = check_propensities(extra["propensities"], n)
    return data | extra


def encode(actions: np.ndarray, data: dict[str, Any], discrete: bool, name: str) -> np.ndarray:
    """Actions as the networks see them, [N, k] -> [N, A]: in [-1, 1], or each part one-hot. Raises a DataError."""
    limits, script = {key: data[key] for key in ("action_low", "action_high")}, cql_dqn if discrete else cql
    encoded, low, high = script.encode_actions({"actions": actions} | limits, name)
    if not discrete:
        return encoded
    parts = [column[:, None] == np.arange(*ends) for column, *ends in zip(actions.T, low, high + 1)]
    return np.concatenate(parts, axis=1)


def answers(policy: Opened, *arrays: np.ndarray) -> np.ndarray:
    """Its actions for these observations [N, O], and masks [N, A] if there are any: [N, ...]. Raises a DataError."""
    n = len(arrays[0]) // 10_000 + 1
    return np.concatenate([policy.act(*parts) for parts in zip(*(np.array_split(x, n) for x in arrays))])


def act(policy: Opened, states: list[np.ndarray], data: dict[str, Any], discrete: bool, env: str) -> np.ndarray:
    """Its encoded actions in states, which are observations [N, O], or these and masks: [N, A]. Raises DataError."""
    with prefix(f"{policy.path} does not fit --env {env}"):
        actions = answers(policy, *states)
        kinds, actions = [is_discrete(actions), discrete], actions.reshape(len(actions), -1)
        sizes = [x.shape[1] for x in (actions, data["actions"])]
        if kinds[0] != kinds[1] or sizes[0] != sizes[1]:
            words = [f"{('continuous', 'discrete')[kind]} ones of size {size}" for kind, size in zip(kinds, sizes)]
            raise DataError(f"its actions are {words[0]}, the data's {words[1]}")
        if not np.isfinite(actions).all():
            raise DataError("its actions are NaN")
        encoded = encode(actions, data, discrete, env)
        if len(states) > 1 and (wrong := (encoded & ~states[1]).any(axis=1)).any():
            raise DataError(f"it takes action {actions[wrong][0, 0]:g} where the mask does not allow it")
        return encoded


def is_discrete(actions: np.ndarray) -> bool:
    return actions.dtype.kind in "iu"


def supports(
    args: argparse.Namespace, parts: list[dict[str, np.ndarray]], actions: np.ndarray, sizes: list[int]
) -> tuple[list[float], float]:
    """The support of each policy, by its actions in the reported part [P, T, A], and the support that a rank needs.

    As in the effective sample size of importance weights, 1 / mean(1 / probability of the policy's action) of the rows
    is left after a step."""
    fitted, reported = parts
    n, length = len(fitted["rewards"]), len(fitted["rewards"]) / len(episode_rows(fitted)[0])
    model = behaviour_model(fitted, sizes, args.updates, args.seed, args.device)
    likely = [np.exp(model(reported, chosen)) for chosen in actions]
    shares = [1 / np.mean(1 / np.maximum(x, 1 / n)) for x in likely]  # rarer than once in n rows is unknown
    return [support(share, n) for share in shares], max(1.0, HORIZON_SHARE * min(1 / (1 - args.discount), length))


def weighted(
    args: argparse.Namespace, q: FittedQ, data: dict[str, np.ndarray], actions: np.ndarray
) -> list[dict[str, float]]:
    """Columns of the estimates that use propensities, for each policy, by its actions in the data's states [P, T, A].
    Raises DataError."""
    logged = np.broadcast_to(data["actions"], (len(actions) + 1, *data["actions"].shape))
    q_policy = q.values(data["observations"], np.concatenate([actions, logged[:1]])).mean(axis=1)
    q_data = q.values(data["observations"], logged).mean(axis=1)
    agrees, columns = (actions == data["actions"]).all(axis=2), []
    known = data["rewards"], data["propensities"]
    ends = data["terminals"], data["timeouts"], args.discount, args.clip
    found = [episode_samples(*known, *policy, *ends) for policy in zip(agrees, q_policy, q_data)]
    samples = np.concatenate([np.stack([getattr(x, name) for x in found]) for name in ESTIMATORS])
    limits = intervals(samples, args.seed, args.resamples).reshape(len(ESTIMATORS), len(found), 2)
    for i, one in enumerate(found):
        row = {}
        for name, ends in zip(ESTIMATORS, limits[:, i]):
            row |= {name: getattr(one, name).mean(), f"{name}_low": ends[0], f"{name}_high": ends[1]}
        rest = "agreeing rewarded clipped effective mean_weight mean_weight_error"
        columns.append(row | {name: getattr(one, name) for name in rest.split()})
    return columns


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table: policies, best first, then the behaviour and its returns; and lines of text: the checks and
    the best policy. Raises a DataError."""
    policies = [Opened(path, *open_policy(path, args.script)) for path in find_policies(args.policies)]
    args.discount = training_discount([x.path for x in policies]) if args.discount is None else args.discount
    data = read_data(args, policies[0])
    for policy in policies:
        check_encoding(policy.path, policy.act, args.env, data.get("encoding"))
        if "masks" in data and len(inspect.signature(policy.act).parameters) < 2:
            raise DataError(f"{policy.path} takes no masks, and --env {args.env} has some: take its script from here")
    n, n_parts, masks = len(data["rewards"]), data["actions"].shape[1], ["masks"] * ("masks" in data)
    fitted, reported, words = split(data, args.fit_share, args.seed)
    print(f"{args.env}: {n:,} transitions, {words}")
    updates = f"{args.updates:,} updates of {args.seeds} network{'s' * (args.seeds > 1)} each"
    clip = f"; weights up to {args.clip:g} (--clip)" if "propensities" in data else ""
    print(f"discount {args.discount:g}; {updates}; intervals of {args.resamples:,} resamples; --seed {args.seed}{clip}")
    with prefix(f"{policies[0].path} does not fit --env {args.env}"):  # its script reads such data
        discrete = is_discrete(answers(policies[0], *(data[key][:1] for key in ["observations", *masks])))
    _, data["action_low"], data["action_high"] = (cql_dqn if discrete else cql).encode_actions(data, args.env)
    for key in data.keys() & {"masks", "next_masks"}:
        data[key] = data[key].astype(bool)

    def chosen(rows: np.ndarray, following: str = "") -> np.ndarray:
        states = [data[following + key][rows] for key in ["observations", *masks]]
        return np.stack([act(x, states, data, discrete, args.env) for x in policies])

    next_actions, actions = chosen(fitted, "next_"), chosen(reported)
    data["actions"] = encode(data["actions"], data, discrete, args.env)
    parts = [rows_of(data, fitted), rows_of(data, reported)]
    q, bounded = fit(parts[0], next_actions, args.discount, args.updates, args.seeds, args.seed, args.device)
    first, _ = episode_rows(parts[1])
    starts = np.concatenate([actions[:, first], parts[1]["actions"][None, first]])
    values, returns = q.values(parts[1]["observations"][first], starts), behaviour_returns(q, parts[1], args.discount)
    stds = values.mean(axis=2).std(axis=1) if args.seeds > 1 else [np.nan] * len(values)  # one fit has no spread
    off_data = [np.abs(x - 1.0 * parts[1]["actions"]).sum(axis=1).mean() / 2 / n_parts for x in actions]
    means = np.stack([*values.mean(axis=1), returns])
    ends = intervals(means, args.seed, args.resamples)
    rows = [
        {"rank": "", "policy": str(name), "estimate": mean.mean(), "low": low, "high": high}
        for name, mean, (low, high) in zip([*(x.path for x in policies), BEHAVIOUR, RETURNS], means, ends)
    ]
    for row, std, share, off in zip(rows, stds, bounded, [*off_data, 0.0]):
        row |= {"seed_std": std, "bounded": share, "off_data": off}
    needed = None
    if discrete:
        sizes = (data["action_high"] - data["action_low"] + 1).tolist()
        found, needed = supports(args, parts, actions, sizes)
        for row, steps in zip(rows, found):
            row["support"] = steps
    if discrete and "propensities" in data:
        for row, more in zip(rows, weighted(args, q, parts[1], actions)):
            row |= more
    for row in rows:
        row |= {"fitted_episodes": len(episode_rows(parts[0])[0]), "reported_episodes": len(first)}
    one_step = len(first) == len(parts[1]["rewards"])
    returns = np.append(returns, behaviour_returns(q, parts[0], args.discount))
    rows, lines = judge(rows, returns, one_step, needed)
    seen = trained_on([x.path for x in policies], args.env)
    if seen and (one_step or "propensities" in data):
        what = f"{seen} of {len(policies)} policies were trained on these rows, on which they look too good"
        lines.insert(-1, f"WARNING: {what}: train on one part of the log, and give another to --env")
    return rows, lines


def judge(
    rows: list[dict[str, Any]], returns: np.ndarray, one_step: bool, needed: Optional[float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Ranks the rows of policies, and says why some have no rank. Returns rows, and lines of text.

    returns: the behaviour's, of both parts. one_step: whether all episodes are. needed: the support that a rank needs
    (None: not known).
    """
    *policies, behaviour, last = rows
    error, n = behaviour["estimate"] - last["estimate"], last["reported_episodes"]
    chance = 2 * returns.std() * (1 / n + 1 / last["fitted_episodes"]) ** 0.5  # as the returns of both parts scatter
    # In logs of single steps, chance makes most of the spread, and a tenth of that may be more than the mean.
    spread = 0.0 if one_step else returns.std()
    allowed = TRUST * max(spread, abs(last["estimate"])) + chance
    agree = abs(error) <= allowed
    lines = [
        f"check: FQE of the behaviour is off by {error:.3g}; {allowed:.3g} is allowed, {chance:.2g} of it for chance"
    ]
    if not agree:
        cure = "try more --updates, or fewer if the log is small"
        lines.append(f"WARNING: FQE does not know what the data return, so trust none of its estimates; {cure}")
    if n < FEW_STARTS:
        lines.append(f"WARNING: intervals and check rest on {n} start{'s' * (n > 1)} only")
    unbounded = [row for row in policies if row["bounded"] > 0.01]
    if unbounded:
        worst = max(row["bounded"] for row in unbounded)
        what = f"the fits of {len(unbounded)} of {len(policies)} policies diverge: up to {worst:.0%} of their targets"
        lines.append(f"WARNING: {what} were bounded, and their values are unknown")
    unsupported = [row for row in policies if needed is not None and row["support"] < needed]
    if needed is not None:
        ends = [f"{f([row['support'] for row in policies]):.3g}" for f in (min, max)]
        what = f"the data follow the policies for {' to '.join(dict.fromkeys(ends))} steps; a rank needs {needed:.3g}"
        lines.append(f"support: {what}")
    if unsupported:
        few = f"{len(unsupported)} of {len(policies)} policies take actions that the data hold too rarely"
        cure = "try policies nearer to the data (a larger --cql_alpha), or more data"
        lines.append(f"WARNING: {few}, so their values are guesses and get no rank; {cure}")
    ranked = [row for row in policies if agree and row not in unbounded + unsupported]
    ranked.sort(key=lambda row: -row["estimate"])
    rest = sorted((row for row in policies if row not in ranked), key=lambda row: -row["estimate"])
    equal = len(ranked) > 1 and len({row["estimate"] for row in ranked}) == 1
    for i, row in enumerate(ranked):
        row["rank"] = "" if equal else i + 1
    if "ips" in policies[0]:
        lines += judge_weights(policies)
    if not agree:
        lines.append("best: none, since the check failed")
    elif not ranked:
        lines.append("best: none, since no policy has a fit that is bounded and supported")
    elif equal:
        lines.append("best: none, since all estimates are equal")
    else:
        best, *others = ranked
        n_close = sum(best["estimate"] - row["estimate"] <= 2 * best["seed_std"] for row in others)
        close = f"; {n_close} more within two standard deviations of its fits" * bool(n_close)
        lines.append(f"best: {best['policy']}{f' of the {len(ranked)} ranked' * bool(rest)}{close}")
    return [*ranked, *rest, behaviour, last], lines


def trained_on(paths: list[Path], env: str) -> int:
    """The number of policies that were trained on this dataset, by the config.yaml files beside them."""
    n = 0
    for path in paths:
        with contextlib.suppress(OSError, yaml.YAMLError):
            config = yaml.safe_load((path.parent / "config.yaml").read_text())
            n += isinstance(config, dict) and config.get("env") == env
    return n


def judge_weights(rows: list[dict[str, Any]]) -> list[str]:
    """Lines on what the estimates by propensities rest on."""
    clipped, agreeing = sum(row["clipped"] for row in rows), sum(row["agreeing"] for row in rows)
    means = [row["mean_weight"] for row in rows]
    what = f"their means are {min(means):.3g} to {max(means):.3g} (1 is right); "
    lines = [f"weights: {what}{clipped:,} of {agreeing:,} are clipped (--clip)"]
    wrong = [row for row in rows if abs(row["mean_weight"] - 1) > 4 * row["mean_weight_error"]]
    if wrong:
        why = "wrong propensities, actions that the logger never takes, or policies trained on these very rows"
        lines.append(f"WARNING: {len(wrong)} of {len(rows)} means are far from 1. Causes are {why}")
    outside = sum(not row["dr_low"] <= row["estimate"] <= row["dr_high"] for row in rows)
    lines.append(f"doubly robust: its interval holds the estimate of {len(rows) - outside} of {len(rows)} policies")
    return lines


def report(rows: list[dict[str, Any]]) -> str:
    """The table."""
    head = {"estimate": 9, "95 % over starts": 20, "std of fits": 11, "bounded": 7, "off data": 8}
    formats = {"seed_std": ".3g", "bounded": ".1%", "off_data": ".1%"}
    if "support" in rows[0]:
        head["support"], formats["support"] = 7, ".3g"
    line = "  ".join(["{:>4}", *(f"{{:>{width}}}" for width in head.values()), "{}"]).format
    lines = [line("rank", *head, "policy")]
    for row in rows:
        cells = [f"{row['estimate']:.4g}", f"{row['low']:.4g} to {row['high']:.4g}"]
        cells += [f"{row[name]:{form}}" if name in row else "" for name, form in formats.items()]
        lines.append(line(row["rank"], *cells, row["policy"]))
        if "ips" in row:
            cells = [
                f"{words} {row[name]:.3g} ({row[f'{name}_low']:.3g} to {row[f'{name}_high']:.3g})"
                for name, words in ESTIMATORS.items()
            ]
            rest = f"{row['agreeing']:,} rows agree, {row['rewarded']:,} with a reward; worth {row['effective']:.0f}"
            lines.append(f"      {', '.join(cells)}; {rest}")
    return "\n".join(lines)


def writable(path: Path) -> bool:
    """Whether the file can be written, before the fit, which takes minutes."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return path.suffix == ".csv" and not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)


def parse_arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser, cuda = Parser(__doc__), torch.cuda.is_available()
    add = parser.add_argument
    add("policies", type=Path, nargs="+", metavar="POLICY", help="policy.pt, checkpoint.pt or run folder of any script")
    add("--env", required=True, metavar="DATASET", help="dataset to evaluate with: a Minari id or a name of D4RL")
    add("--discount", type=float, help="discount factor (default: that of the policies' config.yaml, else 0.99)")
    add("--updates", type=int, default=3000, help="updates of each network (default %(default)s)")
    add("--seeds", type=int, default=3, help="networks per policy (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of networks, minibatches and bootstrap (default %(default)s)")
    words = "share of the episodes to fit on; the rest is reported on; 1: all, for both (default %(default)s)"
    add("--fit_share", type=float, default=0.5, metavar="SHARE", help=words)
    words = "largest weight of a row in IPS and doubly robust estimates (default %(default)s: none is clipped)"
    add("--clip", type=float, default=math.inf, metavar="WEIGHT", help=words)
    add("--resamples", type=int, default=10_000, help="bootstrap resamples of each interval (default %(default)s)")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or cuda:<index> (default %(default)s)")
    add("--output", type=Path, metavar="FILE.csv", help="write the table to this file, too")
    parser.add_script()
    args = parser.parse_args(argv)
    parser.require({
        "--discount must be at least 0 and below 1": args.discount is None or 0 <= args.discount < 1,
        "--updates must be at least 1": args.updates >= 1,
        "--seeds must be at least 1": args.seeds >= 1,
        "--seed must be from 0 to 4294967295": 0 <= args.seed < 2**32,
        "--fit_share must be above 0 and at most 1": 0 < args.fit_share <= 1,
        "--clip must be above 0": args.clip > 0,
        "--resamples must be at least 1": args.resamples >= 1,
        f"--output {args.output} is not a .csv file that can be written": args.output is None or writable(args.output),
    })  # fmt: skip
    return args


def main(argv: Optional[list[str]] = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors("interrupted: nothing was written"):
        try:
            with cql.explain(f"--device {args.device} cannot be used here; try --device cpu", cql.ConfigError):
                torch.empty(0, device=args.device)
            (rows, lines), text = run(args), io.StringIO()
        except (MemoryError, torch.OutOfMemoryError):
            fail(1, "out of memory: evaluate fewer policies at once, or with fewer --seeds")
        print(report(rows))
        print("\n".join(lines))
        if args.output:
            writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            cql.save(args.output, text.getvalue())


if __name__ == "__main__":
    main()
