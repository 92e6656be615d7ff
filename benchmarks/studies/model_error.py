"""Measure how far the model of a run of offline/combo.py errs after each number of imagined steps.

    python benchmarks/collect.py --env Hopper-v5 --policy runs/first/policy.pt --steps 5000 --id mine/learned-v0
    python benchmarks/studies/model_error.py runs/first --env d4rl/hopper-medium-v2 mine/learned-v0

The model starts from recorded states whose episode lasts long enough (--starts of them, drawn at random). From each one
every elite follows the recorded actions by its mean, without noise. The program prints one row per dataset and step h,
over all starts and elites, and adds it to the file of --output:

  observation   1 - mean |s'_h - s_h|^2 / mean |s_h - s_0|^2, in units of the training data's changes per step: 1 is
                exact, 0 is as good as "nothing changes"
  reward        1 - mean (r'_h - r_h)^2 / variance of r_h
  reward_bias   mean of r'_h - r_h; above 0 the model predicts too much

where ' marks what is imagined. Exit status 1 for a run or data that cannot be used.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DataError, Parser, one_line_errors

# The study measures the model alone, and so uses the inside of the script.
from algorithms.offline import combo

COLUMNS = ("run", "env", "step", "starts", "observation", "reward", "reward_bias")


def load_model(folder):
    """The model of a run, and the run's configuration. Raises DataError."""
    config = combo.load(folder / "checkpoint.pt", "cpu", "config")["config"]
    with combo.explain(f"{folder} holds no model of offline/combo.py that has learned"):
        config = combo.TrainConfig(**config | {"device": "cpu", "eval_env": "none"})
        state = combo.load(folder / "dynamics.pt", "cpu", "status", "best")
        observation_dim = state["best"]["min_log_var"].shape[-1] - 1
        model = combo.Dynamics(config, observation_dim, state["best"]["weights.0"].shape[1] - observation_dim)
        model.load_state_dict(state["best"])
        model.elites.copy_(torch.tensor(state["status"]["errors"]).argsort()[: len(model.elites)])
    return model, config


def windows(data, n_steps):
    """The first transition of each stretch of n_steps inside one episode: [n]."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    last = np.append(ends, len(data["rewards"]) - 1)[np.searchsorted(ends, np.arange(len(data["rewards"])))]
    return np.flatnonzero(np.arange(len(last)) + n_steps - 1 <= last)


@torch.no_grad()
def measure(model, data, starts, n_steps):
    """The rows of a dataset, for the starts [n] that `windows` returned."""
    observations, following, actions, rewards = (
        torch.as_tensor(data[key]) for key in ("observations", "next_observations", "actions", "rewards")
    )
    scale, first, rows = model.target_std[:-1], observations[starts], []
    imagined = first.expand(len(model.elites), -1, -1)  # [elites, n, O]
    for h in range(n_steps):
        taken = actions[starts + h].expand(len(model.elites), -1, -1)
        inputs = torch.zeros(len(model.min_log_var), len(starts), len(model.input_mean))
        inputs[model.elites] = (torch.cat([imagined, taken], dim=-1) - model.input_mean) / model.input_std
        mean = model.target_mean + model.target_std * model(inputs)[0][model.elites]
        imagined, true = imagined + mean[..., :-1], following[starts + h]
        error = ((imagined - true) / scale).square().sum(dim=-1).mean()
        change = ((true - first) / scale).square().sum(dim=-1).mean()
        excess, reward = mean[..., -1] - rewards[starts + h], rewards[starts + h]
        variance = reward.var(correction=0).clamp(min=1e-12)
        numbers = (1 - error / change.clamp(min=1e-12), 1 - excess.square().mean() / variance, excess.mean())
        rows.append(dict(zip(COLUMNS[2:], (h + 1, len(starts), *(round(x.item(), 4) for x in numbers)))))
    return rows


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs")
    add("--env", nargs="+", help="datasets to compare with (default: that of the run)")
    add("--steps", type=int, default=10, help="number of imagined steps (default %(default)s)")
    add("--starts", type=int, default=2000, help="most states of a dataset to start from (default %(default)s)")
    add("--output", type=Path, help="CSV file to add the rows to")
    options = parser.parse_args(argv)
    parser.require({"--steps and --starts must be at least 1": min(options.steps, options.starts) >= 1})
    rows = []
    with one_line_errors():
        for folder in options.runs:
            model, config = load_model(folder)
            for env in options.env or [config.env]:
                data = combo.load_dataset(env)
                data["rewards"] = combo.Task(config, data).training_rewards(data["rewards"])
                data["actions"] = combo.encode_actions(data, env)[0]
                sizes = sum(data[key].shape[1] for key in ("observations", "actions"))
                starts = windows(data, options.steps)
                if not len(starts) or sizes != len(model.input_mean):
                    raise DataError(f"{env} has no episode of {options.steps} steps, or other sizes than {folder}")
                starts = np.random.default_rng(0).permutation(starts)[: options.starts]
                for row in measure(model, data, starts, options.steps):
                    rows.append({"run": folder.name, "env": env} | row)
                    print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.output:
        new = not options.output.exists()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with open(options.output, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writerows([dict(zip(COLUMNS, COLUMNS))] * new + rows)


if __name__ == "__main__":
    main()
