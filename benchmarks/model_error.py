"""How far the model of a run of offline/combo.py errs, by the number of steps that it imagines.

    python benchmarks/collect.py --env Hopper-v5 --policy runs/first/policy.pt --steps 5000 --id mine/learned-v0
    python benchmarks/model_error.py runs/first --env d4rl/hopper-medium-v2 mine/learned-v0

From each recorded state whose episode lasts long enough (--starts of them, drawn) each elite follows the recorded
actions by its mean, without noise. Printed, and added to the file of --output, is a row a dataset and step h, over all
starts and elites:

  observation   1 - mean |s'_h - s_h|^2 / mean |s_h - s_0|^2, in units of the training data's changes a step: 1 is
                exact, 0 as good as "nothing changes"
  reward        1 - mean (r'_h - r_h)^2 / variance of r_h
  reward_bias   mean of r'_h - r_h; above 0 the model promises too much

where ' is imagined. Exit status 1 for a run or data that cannot be used.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
    """First transitions of all stretches of n_steps inside an episode: [n]."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    last = np.append(ends, len(data["rewards"]) - 1)[np.searchsorted(ends, np.arange(len(data["rewards"])))]
    return np.flatnonzero(np.arange(len(last)) + n_steps - 1 <= last)


@torch.no_grad()
def measure(model, data, starts, n_steps):
    """The rows of a dataset; starts [n] as `windows` gives them."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--env", nargs="+", help="Minari datasets to compare with (default: the run's own)")
    parser.add_argument("--steps", type=int, default=10, help="to imagine")
    parser.add_argument("--starts", type=int, default=2000, help="at most, drawn from a dataset's states")
    parser.add_argument("--output", type=Path, help="CSV file to add the rows to")
    options = parser.parse_args()
    if min(options.steps, options.starts) < 1:
        parser.error("--steps and --starts take numbers above 0")
    rows = []
    try:
        for folder in options.runs:
            model, config = load_model(folder)
            for env in options.env or [config.env]:
                data = combo.load_dataset(env)
                data["rewards"] = combo.Task(config, data).training_rewards(data["rewards"])
                data["actions"] = combo.encode_actions(data, env)[0]
                sizes = sum(data[key].shape[1] for key in ("observations", "actions"))
                starts = windows(data, options.steps)
                if not len(starts) or sizes != len(model.input_mean):
                    raise combo.DataError(
                        f"{env} has no episode of {options.steps} steps, or other sizes than {folder}"
                    )
                starts = np.random.default_rng(0).permutation(starts)[: options.starts]
                for row in measure(model, data, starts, options.steps):
                    rows.append({"run": folder.name, "env": env} | row)
                    print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    except combo.DataError as error:
        sys.exit(f"model_error.py: {error}")
    if options.output:
        new = not options.output.exists()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with open(options.output, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writerows([dict(zip(COLUMNS, COLUMNS))] * new + rows)


if __name__ == "__main__":
    main()
