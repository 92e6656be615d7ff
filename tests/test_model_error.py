"""benchmarks/studies/model_error.py on a model that is right, on one that is wrong in a known way, and on real runs."""

import csv
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_combo import line

from algorithms.offline import combo
from benchmarks.studies import model_error


class Line(torch.nn.Module):
    """The rule of `line` without its noise: s' = s + a / 10, r = s_0; of three members two are elites, one adds 0.5."""

    def __init__(self):
        super().__init__()
        self.elites, self.min_log_var = torch.tensor([0, 1]), torch.zeros(3, 1, 3)
        self.input_mean, self.input_std = torch.zeros(4), torch.ones(4)
        self.target_mean, self.target_std = torch.zeros(3), torch.ones(3)

    def forward(self, inputs):
        assert inputs.shape[0] == 3
        mean = torch.cat([inputs[..., 2:] / 10, inputs[..., :1]], dim=-1)
        mean[1, :, -1] += 0.5
        return mean, None, None


def floats(data):
    return data | {key: np.float32(data[key]) for key in ("observations", "next_observations", "actions", "rewards")}


def test_an_exact_model_errs_by_the_noise_alone():
    data = floats(line(3000))
    starts = model_error.windows(data, 5)
    rows = model_error.measure(Line(), data, starts, 5)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and {row["starts"] for row in rows} == {len(starts)}
    for h, row in enumerate(rows, 1):
        noise = 1 - row["observation"]  # two dimensions of variance h / 10,000, and changes of h / 300
        assert noise == pytest.approx(0.03, rel=0.25), h
    assert [row["reward_bias"] for row in rows] == pytest.approx(5 * [0.25], abs=0.01)
    assert rows[0]["reward"] == pytest.approx(1 - 0.125 / data["rewards"][starts].var(), rel=0.01)


def test_windows_stay_inside_an_episode():
    data = {"rewards": np.zeros(9), "terminals": np.zeros(9, bool), "timeouts": np.zeros(9, bool)}
    data["terminals"][2] = data["timeouts"][4] = True
    assert model_error.windows(data, 1).tolist() == list(range(9))
    assert model_error.windows(data, 3).tolist() == [0, 5, 6] and model_error.windows(data, 5).tolist() == []


@pytest.mark.parametrize("script", ["algorithms.offline.combo"], indirect=True)
def test_real_runs_and_bad_ones(script, monkeypatch, tmp_path, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["model_error.py", *map(str, arguments)])
        model_error.main()

    config = tiny_config(combo, tmp_path, eval_env="none", max_timesteps=10)
    combo.train(config)
    out = tmp_path / "new/errors.csv"
    for _ in range(2):
        call(tmp_path / "run", "--steps", 2, "--starts", 7, "--output", out)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "1", "2"] and rows[0] == rows[2] and rows[0]["starts"] == "7"
    for wrong in ([tmp_path], [tmp_path / "run", "--steps", 10**6], [tmp_path / "run", "--env", "no/such-v0"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*wrong)
        assert stop.value.code == 1 and capsys.readouterr().err.count("\n") == 1
