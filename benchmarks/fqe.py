"""Fitted Q evaluation (FQE): estimate from a dataset alone what stored policies would return, and rank them.

    python benchmarks/fqe.py runs/<run> runs/<run>/policy.pt --env lunarlander-continuous/medium-v0 --output fqe.csv

POLICY is a policy.pt, policy-<step>.pt or checkpoint.pt of any script, or a run folder, which stands for all its
policy-<step>.pt files (see --keep_policies). Policies of your own copy of a script, with another network, need --script
path/to/copy.py. For each policy networks learn Q(s, a) = r + discount Q(s', policy(s')) on the dataset. Time-outs
bootstrap, terminal states do not. All networks of all policies and seeds train at once, as one.

The program prints one row per policy, best first. `estimate` is the mean of Q(s, policy(s)) over the starts of the
episodes: an estimate of the mean discounted return. After it come its 95 % bootstrap interval over the starts, and its
standard deviation over the seeds of the fit. `bounded` is the share of targets that were limited to what the rewards
allow; it is large where the fit diverges. `off data` says how far the policy's actions are from the data's, in the
states of the data. Two more rows follow: FQE of the behaviour that recorded the data, and the behaviour's own
discounted return. These two must agree. --output writes the same table. docs/choosing.md says when not to trust it.

Exit status: 0 evaluated, 1 cannot be done, 2 a bad command line. An error is one line on stderr and writes nothing.
"""

import argparse
import copy
import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import yaml
from common import DataError, OptionError, Parser, check_encoding, fail, one_line_errors, open_policy, prefix
from torch import Tensor
from tqdm import tqdm

# The fit's own networks and readers; the script of a policy is used by its interface alone.
from algorithms.discrete import cql_dqn
from algorithms.offline import cql

# Chosen by how soon FQE of the behaviour agrees with its returns on LunarLander; no policy's return was used.
HIDDEN_SIZES = (64, 2)  # width and number of hidden layers
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
TARGET_RATE = 0.1  # Polyak rate of the target networks, which also give the estimates
TRUST = 0.1  # largest accepted error of FQE of the behaviour, as a share of the spread of its returns
BEHAVIOUR, RETURNS = "behaviour", "behaviour's returns"  # names of the last two rows


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
        self.centre, self.scale = to_go.mean(), to_go.std() or 1.0
        self.bounds = [(bound - self.centre) / self.scale for bound in value_bounds(data, discount)]
        self.rewards = tensor((data["rewards"] - self.centre * (1 - discounts)) / self.scale)
        self.discounts, self.known = tensor(discounts), tensor(data["terminals"] | ~data["timeouts"])
        mean = data["observations"].mean(axis=0, dtype=np.float64).astype(np.float32)
        std = cql.scale(data["observations"])
        self.observations = tensor((data["observations"] - mean) / std)
        self.next_observations = tensor((data["next_observations"] - mean) / std)
        own = np.roll(data["actions"], -1, axis=0)[None]  # the next step's; another episode's where there is none
        self.actions = tensor(data["actions"], None)
        self.next_actions = tensor(np.concatenate([next_actions, own]), None)

        torch.manual_seed(seed)
        sizes = self.observations.shape[1], self.actions.shape[1], *HIDDEN_SIZES
        self.critic = cql.EnsembleCritic(*sizes, n_critics=n_seeds)
        for parameter in self.critic.parameters():
            parameter.data = parameter.data.repeat_interleave(self.shape[1], dim=0).to(device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), LEARNING_RATE, fused=True)

    def q(self, critic: cql.EnsembleCritic, observations: Tensor, actions: Tensor) -> Tensor:
        """[S, B, O] and [P + 1, S, B, A], or [1, S, B, A] for all policies -> [S, P + 1, B]."""
        observations = observations.unsqueeze(1).expand(*self.shape, -1, -1).flatten(0, 1)
        actions = actions.transpose(0, 1).expand(*self.shape, -1, -1).flatten(0, 1).unsqueeze(2)
        return critic(observations, actions.float()).view(*self.shape, -1)

    def update(self) -> Tensor:
        """One step of all networks. Returns the share of targets that were bounded, [P + 1]."""
        size, device = (self.shape[0], BATCH_SIZE), self.rewards.device
        rows = torch.randint(len(self.rewards), size, generator=self.generator, device=device)
        with torch.no_grad():
            next_q = self.q(self.target, self.next_observations[rows], self.next_actions[:, rows])  # [S, P + 1, B]
            free = self.rewards[rows].unsqueeze(1) + self.discounts[rows].unsqueeze(1) * next_q
            td_target = free.clamp(*self.bounds)
        error = (self.q(self.critic, self.observations[rows], self.actions[None, rows]) - td_target).square()
        error[:, -1] *= self.known[rows]
        self.optimizer.zero_grad()
        error.mean(dim=2).sum().backward()  # networks share no weights
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), TARGET_RATE)
        return (free != td_target).float().mean(dim=(0, 2))

    @torch.no_grad()
    def values(self, rows: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Values in the states of these transitions: [N], [P + 1, N, A] -> [P + 1, S, N]. They come from the target
        networks, which are averages over many updates."""
        device, parts = self.rewards.device, []
        for part in np.array_split(np.arange(len(rows)), len(rows) // 1000 + 1):
            states = self.observations[torch.as_tensor(rows[part], device=device)].expand(self.shape[0], -1, -1)
            chosen = torch.as_tensor(actions[:, None, part], device=device).expand(-1, self.shape[0], -1, -1)
            parts.append(self.q(self.target, states, chosen).transpose(0, 1).cpu().numpy().astype(np.float64))
        return self.centre + self.scale * np.concatenate(parts, axis=2)


def value_bounds(data: dict[str, np.ndarray], discount: float) -> tuple[float, float]:
    """The lowest and highest value that the rewards allow: each for ever, or once if the next state is terminal."""
    values = data["rewards"] / (1 - discount * ~data["terminals"])
    return float(values.min()), float(values.max())


def episode_rows(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """First and last transition of each episode, [N]."""
    last = np.flatnonzero(data["terminals"] | data["timeouts"])
    return np.append(0, last[:-1] + 1), last


def fit(
    data: dict[str, np.ndarray], next_actions: np.ndarray, first_actions: np.ndarray, discount: float,
    n_updates: int, n_seeds: int, seed: int = 0, device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Fits Q of P policies, given by their actions in the data's next states [P, T, A] and in the first state of each
    episode [P, N, A], and of the behaviour. data: see FittedQ. Raises DataError.

    Returns values at the starts [P + 1, S, N]; the share of bounded targets in the second half of the updates [P + 1];
    and the behaviour's discounted returns [N], in which a value stands for what a time-out cut off.
    """
    first, last = episode_rows(data)
    if (data["timeouts"] & ~data["terminals"]).all():
        raise DataError("no two steps of the data follow each other: the fit could not be checked")
    q, bounded = FittedQ(data, next_actions, discount, n_seeds, seed, device), []
    for _ in tqdm(range(n_updates), unit="update", disable=None):
        bounded.append(q.update())
    values = q.values(first, np.concatenate([first_actions, data["actions"][None, first]]))
    if not np.isfinite(values).all():
        raise DataError("the fit diverged, although its targets were bounded")
    # The last step before a time-out: its value, by the behaviour's Q, takes the place of its reward.
    last_values = q.values(last, np.stack([data["actions"][last]] * len(values)))[-1].mean(axis=0)
    beyond = (last_values - data["rewards"][last]) * ~data["terminals"][last]
    returns = cql.episodes(data, discount)[1][first] + discount ** (last - first) * beyond
    return values, torch.stack(bounded[n_updates // 2 :]).mean(dim=0).cpu().numpy(), returns


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
    act: Callable[[np.ndarray], np.ndarray]


def read_data(args: argparse.Namespace, first: Opened) -> dict[str, Any]:
    """The dataset, as the script of the first policy reads it. Raises a DataError."""
    with prefix(f"{first.path} is a policy of {Path(first.script.__file__).name}, which reads the data"):
        data = first.script.load_dataset(args.env)
        cql.check_dataset(data, SimpleNamespace(env=args.env, buffer_size=np.inf))
    return data


def encode(actions: np.ndarray, data: dict[str, Any], discrete: bool, name: str) -> np.ndarray:
    """Actions as the networks see them, [N, k] -> [N, A]: in [-1, 1], or each part one-hot. Raises a DataError."""
    limits, script = {key: data[key] for key in ("action_low", "action_high")}, cql_dqn if discrete else cql
    encoded, low, high = script.encode_actions({"actions": actions} | limits, name)
    if not discrete:
        return encoded
    parts = [column[:, None] == np.arange(*ends) for column, *ends in zip(actions.T, low, high + 1)]
    return np.concatenate(parts, axis=1)


def answers(policy: Opened, observations: np.ndarray) -> np.ndarray:
    """Its actions in these states, [N, ...]. Raises a DataError."""
    return np.concatenate([policy.act(part) for part in np.array_split(observations, len(observations) // 10_000 + 1)])


def act(policy: Opened, observations: np.ndarray, data: dict[str, Any], discrete: bool, env: str) -> np.ndarray:
    """Its encoded actions, [N, A]. Raises DataError."""
    with prefix(f"{policy.path} does not fit --env {env}"):
        actions = answers(policy, observations)
        kinds, actions = [is_discrete(actions), discrete], actions.reshape(len(actions), -1)
        sizes = [x.shape[1] for x in (actions, data["actions"])]
        if kinds[0] != kinds[1] or sizes[0] != sizes[1]:
            words = [f"{('continuous', 'discrete')[kind]} ones of size {size}" for kind, size in zip(kinds, sizes)]
            raise DataError(f"its actions are {words[0]}, the data's {words[1]}")
        if not np.isfinite(actions).all():
            raise DataError("its actions are NaN")
        return encode(actions, data, discrete, env)


def is_discrete(actions: np.ndarray) -> bool:
    return actions.dtype.kind in "iu"


def summary(name: Path | str, values: np.ndarray, seed: int, **more: float) -> dict[str, Any]:
    """One row of the table: the mean of the episodes' values [N], and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    low, high = np.quantile([rng.choice(values, len(values)).mean() for _ in range(1000)], [0.025, 0.975])
    return {"rank": "", "policy": str(name), "estimate": values.mean(), "low": low, "high": high} | more


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: policies, best first, then the behaviour and its returns. Raises a DataError."""
    policies = [Opened(path, *open_policy(path, args.script)) for path in find_policies(args.policies)]
    args.discount = training_discount([x.path for x in policies]) if args.discount is None else args.discount
    data = read_data(args, policies[0])
    for policy in policies:
        check_encoding(policy.path, policy.act, args.env, data.get("encoding"))
    following, n_parts = ~(data["terminals"] | data["timeouts"]), data["actions"].shape[1]
    states = data["next_observations"], data["observations"][episode_rows(data)[0]]
    with prefix(f"{policies[0].path} does not fit --env {args.env}"):
        discrete = is_discrete(answers(policies[0], data["observations"][:1]))  # its script reads such data
    _, data["action_low"], data["action_high"] = (cql_dqn if discrete else cql).encode_actions(data, args.env)
    next_actions, first_actions = (np.stack([act(x, y, data, discrete, args.env) for x in policies]) for y in states)
    data["actions"] = encode(data["actions"], data, discrete, args.env)
    n_episodes, updates = len(states[1]), f"{args.updates:,} updates of {args.seeds} networks each"
    print(f"{args.env}: {len(following):,} transitions, {n_episodes:,} episodes; discount {args.discount:g}; {updates}")
    options = args.discount, args.updates, args.seeds, args.seed, args.device
    values, bounded, returns = fit(data, next_actions, first_actions, *options)
    stds = values.mean(axis=2).std(axis=1) if args.seeds > 1 else [np.nan] * len(values)  # one fit has no spread
    off_data = next_actions[:, following] - 1.0 * np.roll(data["actions"], -1, axis=0)[following]
    off_data = np.append(np.abs(off_data).sum(axis=2).mean(axis=1) / 2 / n_parts, 0.0)
    names = [policy.path for policy in policies]
    rows = [
        summary(name, value.mean(axis=0), args.seed, seed_std=std, bounded=share, off_data=off)
        for name, value, std, share, off in zip([*names, BEHAVIOUR], values, stds, bounded, off_data)
    ]
    ranked = sorted(rows[:-1], key=lambda row: -row["estimate"])
    for i, row in enumerate(ranked):
        row["rank"] = i + 1
    return [*ranked, rows[-1], summary(RETURNS, returns, args.seed, spread=returns.std())]


def report(rows: list[dict[str, Any]]) -> str:
    """The table, whether the fit agrees with the data, and the best policy."""
    line = "{:>4}  {:>9}  {:>20}  {:>11}  {:>7}  {:>8}  {}".format
    lines = [line("rank", "estimate", "95 % over starts", "std of fits", "bounded", "off data", "policy")]
    for row in rows:
        cells = [f"{row['estimate']:.4g}", f"{row['low']:.4g} to {row['high']:.4g}"]
        formats = {"seed_std": ".3g", "bounded": ".1%", "off_data": ".1%"}
        cells += [f"{row[name]:{form}}" if name in row else "" for name, form in formats.items()]
        lines.append(line(row["rank"], *cells, row["policy"]))
    best, *others, behaviour, returns = rows
    error, spread = behaviour["estimate"] - returns["estimate"], max(returns["spread"], abs(returns["estimate"]))
    verdict = "" if abs(error) <= TRUST * spread else "; WARNING: trust no row and try more --updates"
    lines.append(f"check: FQE of the behaviour is off by {error:.3g}; {TRUST * spread:.3g} is allowed{verdict}")
    if (worst := max(row["bounded"] for row in rows[:-1])) > 0.01:
        lines.append(
            f"WARNING: {worst:.0%} of one policy's targets were bounded: its fit diverges and its value is unknown"
        )
    n_close = sum(best["estimate"] - row["estimate"] < 2 * best["seed_std"] for row in others)
    lines.append(
        f"best: {best['policy']}" + f"; {n_close} more within two standard deviations of its fits" * bool(n_close)
    )
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
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or cuda:<index> (default %(default)s)")
    add("--output", type=Path, metavar="FILE.csv", help="write the table to this file, too")
    parser.add_script()
    args = parser.parse_args(argv)
    parser.require({
        "--discount must be at least 0 and below 1": args.discount is None or 0 <= args.discount < 1,
        "--updates must be at least 1": args.updates >= 1,
        "--seeds must be at least 1": args.seeds >= 1,
        "--seed must be at least 0": args.seed >= 0,
        f"--output {args.output} is not a .csv file that can be written": args.output is None or writable(args.output),
    })  # fmt: skip
    return args


def main(argv: Optional[list[str]] = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors("interrupted: nothing was written"):
        try:
            with cql.explain(f"--device {args.device} cannot be used here; try --device cpu", cql.ConfigError):
                torch.empty(0, device=args.device)
            rows, text = run(args), io.StringIO()
        except (MemoryError, torch.OutOfMemoryError):
            fail(1, "out of memory: evaluate fewer policies at once, or with fewer --seeds")
        print(report(rows))
        if args.output:
            names = [name for name in rows[0] if name != "spread"]
            writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            cql.save(args.output, text.getvalue())


if __name__ == "__main__":
    main()
