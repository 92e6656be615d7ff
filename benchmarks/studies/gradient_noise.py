"""Measure how much noise cql_backprop_actions adds to the gradient of the critics, beside that of the minibatches.

    python benchmarks/studies/gradient_noise.py --env local/hopper/medium-v0 --checkpoints runs/*/checkpoint.pt

For minibatches b = 1 .. n of the dataset, each with its targets and proposed actions, let g(b) be the exact gradient of
the critics' loss (cql_backprop_actions=0) and g(b, k, r) the gradient when k actions are drawn for the r-th time. Then

    minibatch variance  V    = 1 / (n - 1)  sum_b |g(b) - mean_b g(b)|^2
    added variance      D(k) = 1 / (n R)    sum_b sum_r |g(b, k, r) - g(b)|^2
    share               D(k) / V

so that a step with k drawn actions is as noisy as an exact step with a minibatch of batch_size / (1 + share). Both are
sums over all parameters of the critics, in float32, at the checkpoint's parameters. Drawing is unbiased: the mean of
g(b, k, r) is g(b), and D(k) = D(1) / k up to chance. `relative_error` is that of D(1) / V, from the spread of the terms
of both sums over minibatches.

The program adds one row per checkpoint to benchmarks/results/gradient_noise.csv. The rows in the repository come from
two runs (docs/results.md names the data), each continued under its --run_id with --max_timesteps 300, 1000, 3000 and
6000. Its checkpoint.pt was copied at each stop:

    python algorithms/offline/cql.py --env local/hopper/medium-v0 --policy_lr 1e-4 --q_n_hidden_layers 2 \
        --eval_env none --eval_freq 20000 --precision bfloat16 --compile True --run_id noise --max_timesteps 300
"""

import csv
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, Parser, one_line_errors

# The study measures the agent's own loss, and so uses the inside of the script.
from algorithms.offline import cql

DRAWN = (1, 2, 4, 8)
COLUMNS = (
    "env", "updates", "q_n_hidden_layers", "batch_size", "batches", "draws", "minibatch_variance",
    *(f"share_{k}" for k in DRAWN), "relative_error",
)  # fmt: skip


def prepare(path, env=None):
    """The agent of a checkpoint, and a buffer of the data that it was trained on. Raises DataError."""
    start = cql.load(path, "cpu")
    if "agent" not in start:
        raise cql.DataError(f"{path} holds a policy without critics: give a checkpoint.pt")
    options = {"device": "cpu", "precision": "float32", "compile": False, "eval_env": "none", "load_model": ""}
    config = cql.TrainConfig(**start["config"] | options | ({"env": env} if env else {}))
    data = cql.load_dataset(config.env)
    data, *_ = cql.prepare_data(config, data, cql.Task(config, data), start)
    agent = cql.CQL(config, data["observations"].shape[1], data["actions"].shape[1])
    agent.load_state_dict(start["agent"])
    return agent, cql.ReplayBuffer(data, "cpu")


def critic_gradient(agent, batch, proposed, k):
    """The gradient of the critics' loss as one vector [P], with k drawn actions, or exact (k = 0)."""
    agent.config.cql_backprop_actions = k
    loss, *_ = agent.critic_loss(batch, *proposed)
    return torch.cat(
        [gradient.flatten() for gradient in torch.autograd.grad(loss, agent.parameter_groups["critic"])]
    ).double()


def measure(agent, batches, draws):
    """The terms of each minibatch, [n], whose means are V and, for each k of DRAWN, D(k)."""
    exact, added = [], {k: [] for k in DRAWN}
    for batch in batches:
        with torch.no_grad():
            mean, log_std = agent.actor(torch.cat([batch.observations, batch.next_observations]))
        proposed = agent.td_target_and_proposals(batch, mean, log_std)
        exact.append(critic_gradient(agent, batch, proposed, 0))
        for k in DRAWN:
            errors = [critic_gradient(agent, batch, proposed, k) - exact[-1] for _ in range(draws)]
            added[k].append(sum(error.square().sum() for error in errors) / draws)
    exact = torch.stack(exact)
    deviations = (exact - exact.mean(dim=0)).square().sum(dim=1) * len(exact) / (len(exact) - 1)
    return deviations, {k: torch.stack(values) for k, values in added.items()}


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--env", help="dataset (default: that of the checkpoint)")
    add("--checkpoints", type=Path, nargs="+", required=True, help="checkpoint.pt files of offline/cql.py")
    add("--batches", type=int, default=100, help="number of minibatches, 2 or more (default %(default)s)")
    add("--draws", type=int, default=2, help="how often actions are drawn for each (default %(default)s)")
    add("--output", type=Path, default=ROOT / "benchmarks/results/gradient_noise.csv")
    args = parser.parse_args(argv)
    parser.require({"--batches must be at least 2, and --draws at least 1": args.batches >= 2 and args.draws >= 1})
    new = not args.output.exists()
    with one_line_errors(), open(args.output, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for path in args.checkpoints:
            agent, buffer = prepare(path, args.env)
            torch.manual_seed(0)
            config = agent.config
            batches = (buffer.sample(config.batch_size) for _ in range(args.batches))
            deviations, added = measure(agent, batches, args.draws)
            variance = deviations.mean().item()
            errors = [values.std() / values.mean() / args.batches**0.5 for values in (deviations, added[1])]
            row = {name: getattr(config, name) for name in ("env", "q_n_hidden_layers", "batch_size")}
            row |= {"updates": agent.n_updates, "batches": args.batches, "draws": args.draws}
            row |= {f"share_{k}": f"{values.mean().item() / variance:.3f}" for k, values in added.items()}
            row |= {"minibatch_variance": f"{variance:.4g}", "relative_error": f"{math.hypot(*errors):.2f}"}
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS))
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
