"""A slip of whoever edits a script keeps its traceback: no guard takes it for a fault of data, simulator or package."""

import importlib.util
import sys
import traceback
from pathlib import Path

import pytest
from conftest import WORLDS, suited

# Where, the text, and what a slip makes of it: misspelt attributes and keys, wrong axes and shapes.
SAME = [  # in all scripts
    ("evaluate", 'self.score(np.array(result["return"]))', 'self.score(np.array(result["returns"]))'),
    ("add_row", "self.means(1)", "self.mean(1)"),
]
VECTORS = [  # in all that read vectors
    ("load_dataset", "~episode.terminations\n", "~episode.terminal\n"),
    ("load_dataset", "map(np.concatenate", 'map(data["join"]'),
    ("load_dataset", "len(episode.actions), -1)", "len(episode.actions), 7)"),
    ("load_dataset", "np.append(episode.truncations[:-1], True)", "np.cumsum(episode.rewards, axis=1)"),
    ("load_dataset", "spec.kwargs | named", 'spec.kwargs | named["name"]'),
    ("flatten", "np.reshape(observations, (len(", "np.reshaped(observations, (len("),
    ("start_values", "values.view(len(observations))", "values.view(len(observations), 2)"),
]
CONTINUOUS = [
    (
        "network",
        "torch.cat([observations, actions], dim=-1).flatten",
        "torch.cat([observations, actions], dim=0).flatten",
    ),
    ("network", "q.view(len(q), leading[-1], n_actions)", "q.view(len(q), leading[-1] + 1, n_actions)"),
    ("loss", "- td_target).square()", "- td_target.unsqueeze(1)).square()"),
    ("loss", "self.parameter_groups[name]) for", 'self.parameter_groups[name + "s"]) for'),
    (
        "start_values",
        "unsqueeze(1)).min(dim=0).values\n        return",
        "unsqueeze(1)).min(dim=1).values\n        return",
    ),
    ("actions", "torch.clamp(actions, self", "torch.clamp(actions.sum(dim=7), self"),
    ("holdout", 'metrics["qf1_loss"] +', 'metrics["qf1_los"] +'),
]
CQL = [
    ("network", "self.head(self.hidden(", "self.heads(self.hidden("),
    ("loss", "next_actions).amin(dim=0)", "next_actions).amin(dim=4)"),
    (
        "loss",
        "torch.full_like(self.log_alpha_prime, self.cql_alpha)",
        "torch.full_like(self.log_alpha_prime, self.cql_alfa)",
    ),
    ("loss", "self.config.cql_temp * scores", "self.config.cql_temperature * scores"),
    ("start_values", "self.actor(observations)[0].tanh()", "self.actors(observations)[0].tanh()"),
    ("actions", "self.action_low + (mean.tanh() + 1)", "self.action_lows + (mean.tanh() + 1)"),
    ("actions", "mean, _ = self(self.", "mean, _, _ = self(self."),
]
CONSTRAINED = [
    ("network", "network(observations).tanh().unsqueeze(1)", "network(observations).tanh().unsqueeze(7)"),
    ("loss", "q.amin(dim=0), config.target_min_weight", "q.amin(dim=4), config.target_min_weight"),
    ("loss", "(actions - data_actions.unsqueeze(1)).square()", "(actions - data_actions.unsqueeze(4)).square()"),
    ("loss", "q * (config.q_scale /", "q * (config.q_scales /"),
    ("start_values", "self.actor.choose(observations).unsqueeze(1)", "self.actor.chose(observations).unsqueeze(1)"),
    ("actions", "self.action_low + (actions + 1)", "self.action_lows + (actions + 1)"),
    ("actions", "self.choose(self.normalise(", "self.choose(self.normalize("),
]
DISCRETE = [
    ("network", "self.last(features)", "self.final(features)"),
    ("network", "unflatten(-1, (-1, self.n_outputs))", "unflatten(-1, (-1, self.n_outputs + 4))"),
    ("loss", "self.td_loss(outputs, td_target)", "self.td_los(outputs, td_target)"),
    ("loss", "of_actions(next_outputs, next_actions)", "of_actions(next_outputs.sum(dim=4), next_actions)"),
    ("loss", 'grad(loss, self.parameter_groups["critic"])', 'grad(loss, self.parameter_groups["critics"])'),
    ("start_values", "max(dim=1).values\n        return", "max(dim=2).values\n        return"),
    ("actions", "scores.argmax(dim=-1)\n        if self.eps", "scores.argmax(dim=5)\n        if self.eps"),
    ("actions", "torch.unravel_index(best, self.action_sizes)", "torch.unravel_index(best, self.action_size)"),
    ("holdout", '"qf_loss": "holdout_td_error"', '"qf_loss": {}["holdout_td_error"]'),
]
DQN = [
    (
        "start_values",
        "self.critic.values(self.critic(observations)).max",
        "self.critic.value(self.critic(observations)).max",
    )
]
PIXELS = [
    ("load_dataset", "data | action_bounds(space,", "data | action_bound(space,"),
    ("load_dataset", "gym.spaces.MultiDiscrete(high", "gym.spaces.MultiDiscretes(high"),
    ("flatten", "stacks.reshape(len(stacks), -1, ", "stacks.reshape(len(stacks), -1, 7, "),
    ("frames", "np.repeat(starts + n_frames", "np.repeats(starts + n_frames"),
    ("stacks", "torch.searchsorted(self.starts,", "torch.searchsorted(self.start,"),
    ("stacks", "[1] * (stacks.ndim - 2)", "[1] * (stacks.ndim - 1)"),
    ("network", "self.encoder(pixels)", "self.encoders(pixels)"),
    ("load", "self.frames[0].nbytes", "self.frames[0].nbyte"),
    ("start_values", "self.critic.scores(as_stacks", "self.critic.score(as_stacks"),
]


@pytest.fixture
def edited(script, tmp_path, monkeypatch):
    """A copy of the script with one text replaced, and the line of it."""

    def edit(old, new):
        text = Path(script.__file__).read_text()
        assert text.count(old) == 1, (text.count(old), old)
        path = tmp_path / "edited.py"
        path.write_text(text.replace(old, new, 1))
        spec = importlib.util.spec_from_file_location("edited", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", module)
        spec.loader.exec_module(module)
        return module, text[: text.index(old)].count("\n") + 1

    return edit


def slips(name):
    if WORLDS[name].pixels:
        return SAME + DISCRETE + PIXELS
    if "discrete" in name:
        return SAME + VECTORS + DISCRETE + DQN
    return SAME + VECTORS + CONTINUOUS + (CONSTRAINED if "constraint" in name else CQL)


@pytest.mark.parametrize(
    ("script", "place", "old", "new"),
    [(name, *slip) for name in WORLDS for slip in slips(name)],
    indirect=["script"],
)
def test_a_slip_keeps_its_traceback(place, old, new, script, edited, tmp_path, capsys):
    module, line = edited(old, new)
    options = suited(script, holdout_fraction=0.2, n_episodes=3, checkpoints_path=str(tmp_path / "runs"))
    with pytest.raises(Exception) as info:
        module.train(module.TrainConfig(**options))
    assert not isinstance(info.value, module.DataError), info.value
    lines = {frame.lineno for frame in traceback.extract_tb(info.tb) if frame.filename == module.__file__}
    assert lines & {line, line + 1}, (line, lines, info.value)  # a slip in the last of two lines shows in the next
    assert "warning" not in capsys.readouterr().err


def test_a_key_that_nothing_reads_is_refused_by_name(script, tmp_path):
    data = script.load_dataset("toy/counter-v0")
    data["enviroment"] = data.pop("environment")
    options = suited(script, checkpoints_path=str(tmp_path / "runs"))
    with pytest.raises(script.DataError, match="enviroment"):
        script.train(script.TrainConfig(**options), data=data)
