"""Fitted Q evaluation (FQE): what stored policies would return, from a dataset alone, and which of them is best.

    python benchmarks/fqe.py runs/<run> runs/<run>/policy.pt --env lunarlander-continuous/medium-v0 --output fqe.csv

POLICY is a policy.pt, policy-<step>.pt or checkpoint.pt of any script, or a run folder, which stands for its
policy-<step>.pt (see --keep_policies). For each of them networks learn Q(s, a) = r + discount Q(s', policy(s')) on the
dataset; time-outs bootstrap, terminal states do not. All networks of all policies and seeds train at once, as one.

Prints a row a policy, best first: the mean of Q(s, policy(s)) over the starts of the episodes, which estimates the mean
discounted return; its 95 % bootstrap interval over the starts; the standard deviation over the seeds of the fit; the
share of targets that had to be bounded by what the rewards allow, large where the fit diverges; and how far the
policy's actions are from the data's, in the states of the data. Then the behaviour's own discounted return, and FQE of
the behaviour, which must agree with it. The same goes to --output. docs/choosing.md says when not to trust it.

Exit status: 0 evaluated, 1 cannot be done, 2 a bad command line; an error is one line on stderr and writes nothing.
"""

import argparse
import copy
import csv
import inspect
import io
import os
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algorithms.discrete import cql_dqn
from algorithms.offline.cql import ConfigError, DataError, EnsembleCritic, episodes, explain, save
from benchmarks.policies import DataErrors, load_policy

# Chosen by how soon FQE of the behaviour agrees with its returns on LunarLander; no policy's return was used.
HIDDEN_SIZES = (64, 2)  # width and number of hidden layers
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
TARGET_RATE = 0.1  # Polyak rate of the target networks, which also give the estimates
TRUST = 0.1  # largest accepted error of FQE of the behaviour, as a share of the spread of its returns
BEHAVIOUR, RETURNS = "behaviour", "behaviour's returns"  # names of the last two rows


def fail(status, message):
    print(f"fqe.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


# Shapes: T transitions, N episodes, P policies (+ 1: the behaviour, last), S seeds of the fit, B batch, O observation,
# A action as the networks see it: numbers of the size of 1, or one-hot.


class FittedQ:
    """Q of P policies and of the behaviour, S networks each, as one ensemble of S (P + 1) critics. Policies differ in
    nothing but their actions: the networks of a seed start alike and see the same minibatches."""

    def __init__(
        self, data: dict[str, np.ndarray], next_actions: np.ndarray, discount: float, n_seeds: int, seed: int,
        device: str,
    ):  # fmt: skip
        """data: observations and next_observations [T, O], actions [T, A], rewards [T], flags terminals and timeouts
        [T], one of which ends the last episode too. next_actions: of the policies in the next states, [P, T, A]."""

        def tensor(array: np.ndarray, dtype: Optional[torch.dtype] = torch.float32) -> Tensor:
            return torch.as_tensor(array, dtype=dtype, device=device)

        self.shape, self.generator = (n_seeds, len(next_actions) + 1), torch.Generator(device)
        self.generator.manual_seed(seed)
        # Values are learned in units of the data's returns, Q = centre + scale network; the rewards follow from that.
        to_go, discounts = episodes(data, discount)[1], discount * ~data["terminals"]
        self.centre, self.scale = to_go.mean(), to_go.std() or 1.0
        self.bounds = [(bound - self.centre) / self.scale for bound in value_bounds(data, discount)]
        self.rewards = tensor((data["rewards"] - self.centre * (1 - discounts)) / self.scale)
        self.discounts, self.known = tensor(discounts), tensor(data["terminals"] | ~data["timeouts"])
        mean, std = data["observations"].mean(axis=0), data["observations"].std(axis=0) + 1e-3
        self.observations = tensor((data["observations"] - mean) / std)
        self.next_observations = tensor((data["next_observations"] - mean) / std)
        own = np.roll(data["actions"], -1, axis=0)[None]  # the next step's, of another episode where it is not known
        self.actions, self.next_actions = (
            tensor(data["actions"], None),
            tensor(np.concatenate([next_actions, own]), None),
        )

        torch.manual_seed(seed)
        sizes = self.observations.shape[1], self.actions.shape[1], *HIDDEN_SIZES
        self.critic = EnsembleCritic(*sizes, n_critics=n_seeds)
        for parameter in self.critic.parameters():
            parameter.data = parameter.data.repeat_interleave(self.shape[1], dim=0).to(device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), LEARNING_RATE, fused=True)

    def q(self, critic: EnsembleCritic, observations: Tensor, actions: Tensor) -> Tensor:
        """[S, B, O] and [P + 1, S, B, A], or [1, S, B, A] for all policies -> [S, P + 1, B]."""
        observations = observations.unsqueeze(1).expand(*self.shape, -1, -1).flatten(0, 1)
        actions = actions.transpose(0, 1).expand(*self.shape, -1, -1).flatten(0, 1).unsqueeze(2)
        return critic(observations, actions.float()).view(*self.shape, -1)

    def update(self) -> Tensor:
        """A step of all networks. Returns the share of targets that were bounded, [P + 1]."""
        size, device = (self.shape[0], BATCH_SIZE), self.rewards.device
        rows = torch.randint(len(self.rewards), size, generator=self.generator, device=device)
        with torch.no_grad():
            next_q = self.q(self.target, self.next_observations[rows], self.next_actions[:, rows])  # [S, P + 1, B]
            free = self.rewards[rows].unsqueeze(1) + self.discounts[rows].unsqueeze(1) * next_q
            td_target = free.clamp(*self.bounds)
        error = (self.q(self.critic, self.observations[rows], self.actions[None, rows]) - td_target).square()
        error[:, -1] *= self.known[rows]
        self.optimizer.zero_grad()
        error.mean(dim=2).sum().backward()  # no two networks have a weight in common
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), TARGET_RATE)
        return (free != td_target).float().mean(dim=(0, 2))

    @torch.no_grad()
    def values(self, rows: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """In the states of these transitions: [N], [P + 1, N, A] -> [P + 1, S, N]. By the target networks, which are
        averages over many updates."""
        device, parts = self.rewards.device, []
        for part in np.array_split(np.arange(len(rows)), len(rows) // 1000 + 1):
            states = self.observations[torch.as_tensor(rows[part], device=device)].expand(self.shape[0], -1, -1)
            chosen = torch.as_tensor(actions[:, None, part], device=device).expand(-1, self.shape[0], -1, -1)
            parts.append(self.q(self.target, states, chosen).transpose(0, 1).cpu().numpy().astype(np.float64))
        return self.centre + self.scale * np.concatenate(parts, axis=2)


def value_bounds(data: dict[str, np.ndarray], discount: float) -> tuple[float, float]:
    """The lowest and highest value that rewards allow: each for ever, or once where it came with a terminal state."""
    values = data["rewards"] / (1 - discount * ~data["terminals"])
    return float(values.min()), float(values.max())


def episode_rows(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """First and last transition of each episode, [N]."""
    last = np.flatnonzero(data["terminals"] | data["timeouts"])
    return np.append(0, last[:-1] + 1), last


def evaluate(
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
        raise DataError("no two steps follow each other in the data, so that no fit could be checked")
    fit, bounded = FittedQ(data, next_actions, discount, n_seeds, seed, device), []
    for _ in tqdm(range(n_updates), unit="update", disable=None):
        bounded.append(fit.update())
    values = fit.values(first, np.concatenate([first_actions, data["actions"][None, first]]))
    if not np.isfinite(values).all():
        raise DataError("the fit diverged, although its targets were bounded")
    # The last step before a time-out: its value, by the behaviour's Q, takes the place of its reward.
    last_values = fit.values(last, np.stack([data["actions"][last]] * len(values)))[-1].mean(axis=0)
    beyond = (last_values - data["rewards"][last]) * ~data["terminals"][last]
    returns = episodes(data, discount)[1][first] + discount ** (last - first) * beyond
    return values, torch.stack(bounded[n_updates // 2 :]).mean(dim=0).cpu().numpy(), returns


def find_policies(paths: list[Path]) -> list[Path]:
    """A folder stands for its policy-<step>.pt, in the order of their steps. Raises DataError."""
    found = []
    for path in paths:
        kept = sorted(path.glob("policy-*.pt"), key=lambda file: (len(file.name), file.name))
        if path.is_dir() and not kept:
            raise DataError(f"{path} holds no policy-<step>.pt, which --keep_policies True makes: name its policy.pt")
        found += kept or [path]
    return found


def training_discount(paths: list[Path]) -> float:
    """By the config.yaml beside each policy, as far as there are any; else 0.99. Raises ConfigError or DataError."""
    found = {}
    for file in {path.parent / "config.yaml" for path in paths}:
        if file.exists():
            with explain(f"{file} is no config.yaml of a run; --discount does without"):
                found[float(yaml.safe_load(file.read_text())["discount"])] = file
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(map(str, found.values()))} have different discounts: give --discount")
    return next(iter(found), 0.99)


def read_data(args: argparse.Namespace, policies: dict[Path, Any]) -> tuple[dict[str, Any], Any]:
    """The dataset, and the script that reads it, which is that of the policies. Raises DataErrors."""
    script = inspect.getmodule(next(iter(policies.values())))
    config = script.TrainConfig(env=args.env, device=args.device, discount=args.discount, buffer_size=10**12)
    try:
        data = script.load_dataset(args.env)
        script.check_dataset(data, config)
    except script.DataError as error:
        raise type(error)(f"{next(iter(policies))} is a policy of {Path(script.__file__).name}, but {error}") from None
    sizes = data["observations"].shape[1], data["actions"].shape[1]
    for path, policy in policies.items():
        own = policy.__self__.sizes[0], policy.__self__.action_low.numel()
        if inspect.getmodule(policy) is not script or own != sizes:
            kinds = ["discrete" if x is cql_dqn else "continuous" for x in (inspect.getmodule(policy), script)]
            cause = f"{path} has sizes {own} of observation and {kinds[0]} action"
            raise DataError(f"{cause}, --env {args.env} {sizes} and {kinds[1]} ones")
    return data, script


def encode(actions: np.ndarray, data: dict[str, Any], script: Any, name: str) -> np.ndarray:
    """Actions as the networks see them, [N, k] -> [N, A]: in [-1, 1], or each part one-hot. Raises DataError."""
    limits = {key: data[key] for key in ("action_low", "action_high")}
    encoded, low, high = script.encode_actions({"actions": np.float32(actions)} | limits, name)
    if encoded.ndim == 2:
        return encoded
    parts = [column[:, None] == np.arange(*ends) for column, *ends in zip(actions.T, low, high + 1)]
    return np.concatenate(parts, axis=1)


def act(path: Path, policy: Any, observations: np.ndarray, data: dict[str, Any], script: Any) -> np.ndarray:
    """Encoded actions, [N, A]. Raises DataError."""
    parts = [policy(part) for part in np.array_split(observations, len(observations) // 10_000 + 1)]
    actions = np.concatenate(parts).reshape(len(observations), -1)
    problem = f"{path} does not act as the dataset's actions are"
    if not np.isfinite(actions).all():
        raise DataError(f"{problem} (its actions are NaN)")
    try:
        return encode(actions, data, script, "")
    except script.DataError as error:
        raise DataError(f"{problem} ({error})") from None


def summary(name: Path | str, values: np.ndarray, seed: int, **more: float) -> dict[str, Any]:
    """A row of the table: mean of the episodes' values [N], and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    low, high = np.quantile([rng.choice(values, len(values)).mean() for _ in range(1000)], [0.025, 0.975])
    return {"rank": "", "policy": str(name), "estimate": values.mean(), "low": low, "high": high} | more


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: policies, best first, then the behaviour and its returns. Raises DataErrors."""
    policies = {path: load_policy(path) for path in find_policies(args.policies)}
    args.discount = training_discount(list(policies)) if args.discount is None else args.discount
    data, script = read_data(args, policies)
    following, n_parts = ~(data["terminals"] | data["timeouts"]), data["actions"].shape[1]
    states = data["next_observations"], data["observations"][episode_rows(data)[0]]
    next_actions, first_actions = (np.stack([act(*x, y, data, script) for x in policies.items()]) for y in states)
    data["actions"] = encode(data["actions"], data, script, args.env)
    n_episodes, updates = len(states[1]), f"{args.updates:,} updates of {args.seeds} networks each"
    print(f"{args.env}: {len(following):,} transitions, {n_episodes:,} episodes; discount {args.discount:g}; {updates}")
    options = args.discount, args.updates, args.seeds, args.seed, args.device
    values, bounded, returns = evaluate(data, next_actions, first_actions, *options)
    fits = values.mean(axis=2).std(axis=1) if args.seeds > 1 else [np.nan] * len(values)  # one fit has no spread
    off_data = next_actions[:, following] - 1.0 * np.roll(data["actions"], -1, axis=0)[following]
    off_data = np.append(np.abs(off_data).sum(axis=2).mean(axis=1) / 2 / n_parts, 0.0)
    rows = [
        summary(name, value.mean(axis=0), args.seed, seed_std=std, bounded=share, off_data=off)
        for name, value, std, share, off in zip([*policies, BEHAVIOUR], values, fits, bounded, off_data)
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
    verdict = "" if abs(error) <= TRUST * spread else "; WARNING: trust no row, and try more --updates"
    lines.append(f"check: FQE of the behaviour is off by {error:.3g}, of {TRUST * spread:.3g} allowed{verdict}")
    if (worst := max(row["bounded"] for row in rows[:-1])) > 0.01:
        lines.append(f"WARNING: {worst:.0%} of a policy's targets were bounded: its fit diverges, its value is unknown")
    n_close = sum(best["estimate"] - row["estimate"] < 2 * best["seed_std"] for row in others)
    lines.append(f"best: {best['policy']}" + f", with {n_close} more within two std of its fits" * bool(n_close))
    return "\n".join(lines)


def writable(path: Path) -> bool:
    """Known before the fit, which takes minutes."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return path.suffix == ".csv" and not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)


def parse_arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fqe.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail(2, message)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add(
        "policies", type=Path, nargs="+", metavar="POLICY", help="policy.pt, checkpoint.pt, or run folder of any script"
    )
    add("--env", required=True, metavar="DATASET", help="Minari id, or D4RL's name, of the dataset to evaluate with")
    add("--discount", type=float, help="default: that of the policies' config.yaml, else 0.99")
    add("--updates", type=int, default=3000, help="of each network (default %(default)s)")
    add("--seeds", type=int, default=3, help="networks a policy (default %(default)s)")
    add("--seed", type=int, default=0, help="of networks, minibatches and bootstrap (default %(default)s)")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or cuda:<index> (default %(default)s)")
    add("--output", type=Path, metavar="FILE.csv", help="the table as a CSV file")
    args = parser.parse_args(argv)
    rules = {
        "--discount must be at least 0 and below 1": args.discount is None or 0 <= args.discount < 1,
        "--updates must be at least 1": args.updates >= 1,
        "--seeds must be at least 1": args.seeds >= 1,
        "--seed must be at least 0": args.seed >= 0,
        f"--output {args.output} is no .csv file that can be written": args.output is None or writable(args.output),
    }
    for rule, kept in rules.items():
        if not kept:
            parser.error(rule)
    return args


def main(argv: Optional[list[str]] = None) -> None:
    args = parse_arguments(argv)
    try:
        rows, text = run(args), io.StringIO()
        print(report(rows))
        if args.output:
            names = [name for name in rows[0] if name != "spread"]
            writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            save(args.output, text.getvalue())
    except DataErrors as error:
        fail(error.status, error)
    except (MemoryError, torch.OutOfMemoryError):
        fail(1, "out of memory: evaluate fewer policies at once, or with fewer --seeds")
    except KeyboardInterrupt:
        fail(130, "interrupted: nothing was written")


if __name__ == "__main__":
    main()
