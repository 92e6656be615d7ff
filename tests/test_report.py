"""benchmarks/report.py: its statistics, what it counts and keeps apart, the page, and the tables in the docs."""

import builtins
import dataclasses
import html
import itertools
import os
import re
import shlex
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import CONTINUOUS, DATASET, ROOT, SPEEDS, Counter, contents, continuous, record, store

from benchmarks import report, report_page, report_runs
from benchmarks.common import DataError

METRICS_PNG = "metrics-toy-counter-v0.png"

# Statistics

FIRST = np.array([[10.0, 20, 30], [40, 50, 60], [70, 80, 95], [12, 22, 33], [5, 5, 5]])  # runs x datasets
SECOND = np.array([[15.0, 20, 10], [35, 45, 60], [75, 60, 70], [2, 27, 30], [1, 5, 4]])
TAUS = np.array([0.0, 5, 12, 30, 60, 95])


def strata(scores):
    return list(scores.T)


def test_interquartile_mean_by_hand():
    assert report_runs.iqm(np.arange(8.0)) == (2 + 3 + 4 + 5) / 4
    assert report_runs.iqm(np.array([-1e9, 1, 2, 3, 1e9])) == 2  # a quarter of five is one
    assert report_runs.iqm(np.array([1.0, 5])) == 3
    assert report_runs.iqm(np.arange(12.0) ** 2) == pytest.approx((9 + 16 + 25 + 36 + 49 + 64) / 6)
    assert report_runs.iqm(np.array([[3.0, 1, 2, 100], [0, 0, 0, 0]])).tolist() == [2.5, 0]


def test_profile_and_improvement_by_hand():
    assert report_runs.profile(np.array([1.0, 2, 2, 3]), np.array([0, 2, 3])).tolist() == [1, 0.25, 0]
    assert report_runs.improvement([np.array([1.0, 3])], [np.array([2.0])]) == 0.5
    assert report_runs.improvement([np.array([1.0, 2])], [np.array([2.0, 2])]) == 0.25  # ties count half
    # datasets weigh the same, whatever their number of seeds
    assert report_runs.improvement([np.array([1.0]), np.array([0.0, 0, 0])], [np.array([0.0]), np.array([1.0])]) == 0.5


def test_intervals_draw_seeds_within_datasets():
    far = [np.array([0.0, 1]), np.array([1000.0, 1001])]
    drawn = report_runs.resample(far, 500)
    assert (
        drawn[0].shape == (500, 2) and set(np.unique(drawn[0])) == {0, 1} and set(np.unique(drawn[1])) == {1000, 1001}
    )
    assert not np.array_equal(drawn[0], drawn[1] - 1000)
    low, high = report_runs.iqm_interval(far)
    assert 500 <= low < high <= 501  # over all seeds at once it would reach from 0 to 1001
    assert report_runs.improvement_interval(far, [x - 10 for x in far]).tolist() == [1, 1]
    assert report_runs.iqm_interval(far).tolist() == [low, high]  # the same each time


def test_statistics_are_rliables():
    """The numbers of rliable 1.2.0 (pip install rliable==1.2.0 'pandas<3' 'arch<8'), intervals after np.random.seed(0):

    metrics.aggregate_iqm(FIRST), metrics.probability_of_improvement(FIRST, SECOND),
    library.create_performance_profile({"first": FIRST}, TAUS), and library.get_interval_estimates of the first two with
    reps=200. It draws seeds with that generator, whatever its random_state is; so the same draws are given to ours.
    """
    assert report_runs.iqm(FIRST.ravel()) == pytest.approx(30.77777777777778, abs=1e-12)
    assert report_runs.improvement(strata(FIRST), strata(SECOND)) == pytest.approx(0.56, abs=1e-12)
    expected = [1.0, 0.8, 0.6666666666666666, 0.4666666666666667, 0.2, 0.0]
    assert report_runs.profile(FIRST.ravel(), TAUS) == pytest.approx(expected, abs=1e-12)
    (first,) = draws(FIRST)
    expected = [15.87777777777778, 48.78055555555558]
    assert report_runs.interval(report_runs.iqm(np.concatenate(first, axis=1))) == pytest.approx(expected, abs=1e-12)
    expected = [0.31316666666666665, 0.7668333333333334]
    assert report_runs.interval(report_runs.improvement(*draws(FIRST, SECOND))) == pytest.approx(expected, abs=1e-12)


def draws(*methods, repeats=200):
    """The draws of rliable after np.random.seed(0), as resample would return them: [repeats, runs] per dataset."""
    n_runs, n_datasets = methods[0].shape
    drawn = np.random.RandomState(0).randint(n_runs, size=(repeats, len(methods), n_runs, n_datasets))
    return [[x[drawn[:, i, :, j], j] for j in range(n_datasets)] for i, x in enumerate(methods)]


def test_statistics_against_rliable_itself():
    pytest.importorskip("rliable")
    from rliable import library, metrics

    def ends(scores, statistic, repeats=200):
        np.random.seed(0)
        return library.get_interval_estimates({"x": scores}, statistic, reps=repeats)[1]["x"].ravel()

    rng = np.random.default_rng(0)
    iqm, improvement = metrics.aggregate_iqm, metrics.probability_of_improvement
    for n_runs, n_datasets in ((5, 9), (10, 2)):
        first, second = rng.normal(50, 30, size=(2, n_runs, n_datasets)).round()  # rounded: some are equal
        assert report_runs.iqm(first.ravel()) == pytest.approx(iqm(first), abs=1e-12)
        assert report_runs.improvement(strata(first), strata(second)) == pytest.approx(
            improvement(first, second), abs=1e-12
        )
        profiles, _ = library.create_performance_profile({"x": first}, TAUS, reps=2)
        assert report_runs.profile(first.ravel(), TAUS) == pytest.approx(profiles["x"], abs=1e-12)
        (drawn,) = draws(first)
        ours = report_runs.interval(report_runs.iqm(np.concatenate(drawn, axis=1)))
        assert ours == pytest.approx(ends(first, lambda x: np.array([iqm(x)])), abs=1e-12)
        ours = report_runs.interval(report_runs.improvement(*draws(first, second)))
        both = ends((first, second), lambda x, y: np.array([improvement(x, y)]))
        assert ours == pytest.approx(both, abs=1e-12)
        # Other draws, the same distribution.
        many = ends(first, lambda x: np.array([iqm(x)]), 2000)
        assert report_runs.iqm_interval(strata(first)) == pytest.approx(many, abs=0.1 * np.ptp(many))


# Runs


def folder(path, rows, **config):
    """A run folder; rows are lists of return and score, one per evaluation, 10 updates apart."""
    config = {"env": "d4rl/hopper-medium-v2", "seed": 0, "name": "CQL", "n_episodes": 3, "cql_alpha": 10.0} | config
    if "offline_iterations" not in config:
        config = {"max_timesteps": 10 * len(rows)} | config
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    table = pd.DataFrame(rows, columns=[report_runs.RETURN, report_runs.SCORE]).assign(
        eval_return_std=1.0, qf1_loss=0.5
    )
    table = table.assign(eval_predicted_value=3.0, eval_discounted_return=2.0)
    table.insert(0, "step", 10 * np.arange(1, len(rows) + 1))
    table.to_csv(path / "metrics.csv", index=False)
    return path


def lines(*scores):
    return [[10 * score, score] for score in scores]


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Runs the program in tmp_path, without pictures unless asked for; returns exit status, stdout and stderr."""

    def start(*arguments, pictures=False):
        monkeypatch.setattr(report_runs.resample, "__defaults__", (50, 0))  # draws
        if not pictures:
            monkeypatch.setattr(report_page, "draw", lambda *args: [])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["report.py"])
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
        capsys.readouterr()
        status = 0
        try:
            report.main([str(x) for x in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return start


def cells(path, title):
    """The table of table.md under a title: its rows, by the words of their first cell (or two)."""
    rows = path.joinpath("table.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in rows.splitlines() if line.startswith("|")]
    return rows[0], rows[2:]


def column(path, title, name):
    header, rows = cells(path, title)
    return [row[header.index(name)] for row in rows]


def test_versions_of_a_dataset_never_share_a_row(make, tmp_path):
    for i, env in enumerate(
        ("hopper-medium-v0", "d4rl/hopper-medium-v2", "mujoco/hopper/medium-v0", "hopper-medium-v2")
    ):
        folder(tmp_path / f"runs/{i}", lines(i), env=env, seed=i)
    status, _, err = make("runs", "--out", "out")
    found = dict(zip(column(tmp_path / "out", "Scores", "dataset"), column(tmp_path / "out", "Scores", "CQL")))
    assert status == 0 and found == {  # without an interquartile mean of them all
        "d4rl/hopper-medium-v0": "0.0",
        "d4rl/hopper-medium-v2": "2.0 ± 1.0",
        "mujoco/hopper/medium-v0": "2.0",
    }
    assert "note: scores of D4RL v0 and D4RL v2 and Minari's datasets are not pooled" in err


def test_published_scores_stand_beside_the_same_dataset_only(make, tmp_path):
    for env in ("hopper-medium-v2", "hopper-medium-v1", "mujoco/hopper/medium-v0", "walker2d-medium-replay-v0"):
        folder(tmp_path / "runs" / env.replace("/", "-"), lines(1), env=env)
    make("runs", "--out", "out")
    header, rows = cells(tmp_path / "out", "Scores")
    rows = {row[0]: dict(zip(header, row)) for row in rows}
    published = [name for name in header if name.startswith("published")]
    assert rows["d4rl/hopper-medium-v2"]["published CQL, CORL"] == "59.1 ± 3.8"
    assert rows["d4rl/hopper-medium-v2"]["published CQL, CORL (best)"] == "70.8 ± 2.0"
    assert rows["d4rl/walker2d-medium-replay-v0"]["published CQL(H), Kumar et al. 2020"] == "26.7 (suspect)"
    for name in ("d4rl/hopper-medium-v1", "mujoco/hopper/medium-v0"):
        assert {rows[name][x] for x in published} == {"-"}
    assert {rows["d4rl/hopper-medium-v2"][x] for x in published if "Kumar" in x} == {"-"}
    address = "https://github.com/corl-team/CORL/blob/main/docs/benchmarks/offline.md"
    assert f'<a href="{address}">{address}</a>, Last Scores' in (tmp_path / "out/index.html").read_text()


def test_published_returns_stand_beside_runs_and_never_among_scores(make, tmp_path):
    for dataset in ("dqn-replay/pong-500000-v0", "dqn-replay/pong-5000000-v0"):
        folder(tmp_path / "runs" / dataset[11:], lines(1), env=dataset)  # with a score, as if it had references
    make("runs", "--out", "out")
    assert not [name for name in cells(tmp_path / "out", "Scores")[0] if name.startswith("published")]
    header, rows = cells(tmp_path / "out", "Runs")
    found = {tuple(row[:2]): dict(zip(header, row)) for row in rows}
    published = {key: row["last return"] for key, row in found.items() if key[1].startswith("published")}
    methods = {"DiscreteBCQ": "-6.0 ± 6.2", "DiscreteCQL": "3.9 ± 7.3", "NFQ": "-20.7 ± 0.2", "QRDQN": "-20.5 ± 0.3"}
    wanted = {f"published {method}, d3rlpy-benchmarks": value for method, value in methods.items()}
    assert published == {("dqn-replay/pong-500000-v0", label): value for label, value in wanted.items()}
    assert "1771c9b/atari_table.csv</a>, final return" in (tmp_path / "out/index.html").read_text()


def test_best_and_last_scores_are_apart(make, tmp_path):
    for seed, scores in enumerate(((10, 90, 20), (70, 30, 40), (80, 20, 30))):
        folder(tmp_path / f"runs/{seed}", lines(*scores), seed=seed)
    make("runs", "--out", "out")
    (best,), (last,) = (column(tmp_path / "out", "Runs", x) for x in ("best score (over evaluations)", "last score"))
    assert (best, last) == ("80.0 ± 8.2", "30.0 ± 8.2")
    first, pooled = column(tmp_path / "out", "Scores", "CQL")
    assert first == "30.0 ± 8.2" and pooled.startswith("30.0 [2")
    assert column(tmp_path / "out", "Runs", "predicted value") == ["3.0 ± 0.0"]
    assert column(tmp_path / "out", "Runs", "last return") == ["300.0 ± 81.6"]


@pytest.mark.parametrize("n_runs", [2, 3])
def test_nothing_is_pooled_below_three_runs_of_each_method(n_runs, make, tmp_path):
    for name, n in (("A", 3), ("B", n_runs)):
        for seed in range(n):
            folder(tmp_path / f"runs/{name}{seed}", lines(seed), seed=seed, name=name)
    _, _, err = make("runs", "--out", "out", pictures=n_runs == 2)
    texts = (tmp_path / "out/table.md").read_text()
    assert ("fewer than 3 finished runs with a score: B (left out where runs are pooled)" in err) == (n_runs == 2)
    assert ("Probability of improvement" in texts) == (n_runs == 3)
    assert column(tmp_path / "out", "Scores", "B")[1] == "-" if n_runs == 2 else "1.0 [0.0, 2.0]"
    if n_runs == 2:
        (tmp_path / "runs/A2/metrics.csv").unlink()
        make("runs", "--out", "few")
        assert len(cells(tmp_path / "few", "Scores")[1]) == 1
        assert (tmp_path / "out/profile.png").exists()


def test_unfinished_runs_are_named_and_do_not_count(make, tmp_path):
    folder(tmp_path / "runs/a", lines(1, 2, 3), seed=0)
    folder(tmp_path / "runs/b", lines(50, 60), seed=1, max_timesteps=30)
    folder(tmp_path / "runs/c", lines(7), seed=0, max_timesteps=30, name="other")
    status, out, err = make("runs", "--out", "out")
    assert (
        status == 0 and "seed 1 of CQL on d4rl/hopper-medium-v2: unfinished, 20 of 30 steps; it does not count" in err
    )
    assert "seed 0 of other on d4rl/hopper-medium-v2: unfinished, 10 of 30 steps\n" in err
    rows = {row[1]: row for row in cells(tmp_path / "out", "Runs")[1]}
    assert rows["CQL"][2] == "1" and rows["CQL"][4] == "30" and rows["CQL"][-1] == "finished"
    assert rows["other"][4] == "10" and rows["other"][-1] == "unfinished"  # all that there is of it
    assert cells(tmp_path / "out", "Scores")[1][0][2:4] == ["3.0", "7.0 (unfinished)"]


def test_seeds_of_different_length_meet_at_the_last_common_step(make, tmp_path):
    folder(tmp_path / "runs/a", lines(1, 2, 3), seed=0)
    folder(tmp_path / "runs/b", lines(5, 6), seed=1)
    _, _, err = make("runs", "--out", "out")
    assert "have different lengths, and are compared at step 20" in err
    assert column(tmp_path / "out", "Runs", "last score") == ["4.0 ± 2.0"]
    assert column(tmp_path / "out", "Runs", "steps") == ["20"]


def test_evaluations_that_failed_do_not_count(make, tmp_path):
    folder(tmp_path / "runs/a", lines(1, 2), seed=0)
    folder(tmp_path / "runs/b", [*lines(1), [np.nan, np.nan]], seed=1)
    folder(tmp_path / "runs/c", [[np.nan, np.nan]] * 2, seed=0, name="no simulator")
    _, _, err = make("runs", "--out", "out", pictures=True)
    assert "seed 1 of CQL on d4rl/hopper-medium-v2 has no return at step 20, and does not count" in err
    assert "seed 0 of no simulator" not in err  # nobody asked for returns
    assert [row[1:3] for row in cells(tmp_path / "out", "Runs")[1]] == [["CQL", "1"]]
    assert "nan" not in (tmp_path / "out/table.md").read_text()


def test_runs_without_a_simulator_show_what_they_have(make, tmp_path):
    for seed in (0, 1):
        path = folder(tmp_path / f"runs/{seed}", [[np.nan, np.nan]] * 2, seed=seed, env="mine/shop-v0", eval_env="none")
        table = pd.read_csv(path / "metrics.csv").drop(columns=["eval_predicted_value", "eval_discounted_return"])
        table = table.assign(holdout_td_error=[9, 0.25 + seed / 2], cql_qf_diff=12345.678, average_qf=[np.nan, 2e-7])
        table.to_csv(path / "metrics.csv", index=False)
    assert make("runs", "--out", "out", pictures=True)[0] == 0
    header, (row,) = cells(tmp_path / "out", "Runs without returns")
    assert dict(zip(header, row)) == {
        "dataset": "mine/shop-v0", "method": "CQL", "seeds": "2", "steps": "20", "TD error": "0.5 ± 0",
        "TD error, held out": "0.5 ± 0.25", "CQL's gap": "1.235e+04 ± 0", "mean Q of the data": "2e-07 ± 0",
        "state": "finished",
    }  # fmt: skip
    texts = (tmp_path / "out/table.md").read_text()
    assert (
        "## Runs\n" not in texts and "## Scores" not in texts and (tmp_path / "out/metrics-mine-shop-v0.png").exists()
    )


def options_of(script):
    """A whole configuration of a script of this repository, for a run of one row."""
    defaults = report_runs.read_script(ROOT / "algorithms" / script).defaults
    own = {"device": "cpu", "name": "CQL", "env": "d4rl/hopper-medium-v2", "max_timesteps": 10}
    return defaults | {x: value for x, value in own.items() if x in defaults}


def methods_of(tmp_path, *changes, scripts=()):
    """The names of methods of runs of offline/cql.py, or of these scripts, with these changes of options."""
    for i, (options, script) in enumerate(itertools.zip_longest(changes, scripts, fillvalue="offline/cql.py")):
        folder(tmp_path / f"runs/{i:02}", lines(i), **options_of(script) | options)
    runs = report_runs.read([str(tmp_path / "runs")], [])
    known = [report_runs.read_script(path) for path in sorted(ROOT.glob("algorithms/*/*.py"))]
    report_runs.name_methods(runs, None, known)
    return [run.method for run in runs]


def test_names_have_the_options_that_separate_and_no_more(tmp_path):
    found = methods_of(
        tmp_path,
        {},
        {"seed": 1, "cql_alpha": 10, "buffer_size": 7, "group": "x", "device": "cuda"},  # no other method
        {"cql_alpha": 0, "policy_lr": 1e-4, "normalize": False},  # one option is enough
        {"bc_only": True, "policy_lr": 3e-4},
        {"cql_lagrange": True, "cql_target_action_gap": 5.0, "load_model": "runs/a/checkpoint.pt"},
        {"cql_lagrange": True, "cql_target_action_gap": 5.0, "load_model": "runs/b/checkpoint.pt", "seed": 1},
    )
    assert found == ["CQL", "CQL", "CQL cql_alpha=0", "CQL bc_only", *["CQL cql_target_action_gap=5"] * 2]


def test_names_are_those_of_each_value_where_none_is_usual(tmp_path):
    for name, alphas, texts in (
        ("short", [0.1, 1, 5.0, 1e-5], ["0.1", "1", "5", "1e-5"]),
        ("rounded", [1 / 3, 2 / 3e6], ["0.3333", "6.667e-7"]),
        ("close", [0.12345678, 0.12345679], ["0.12345678", "0.12345679"]),
    ):
        found = methods_of(tmp_path / name, *({"cql_alpha": x} for x in alphas))
        assert found == [f"CQL cql_alpha={text}" for text in texts]


def test_a_method_has_one_name_on_all_datasets(tmp_path):
    grid = itertools.product(("a/b-v0", "a/c-v0"), ({}, {"cql_alpha": 0.0, "policy_lr": 1e-4}))
    changes = [{"env": env} | options for env, options in grid]
    found = methods_of(tmp_path, *changes, {"env": "a/b-v0", "bc_only": True})
    assert found == ["CQL", "CQL cql_alpha=0", "CQL", "CQL cql_alpha=0", "CQL bc_only"]


def test_long_names_are_abbreviated(tmp_path):
    names = ["soft_target_update_rate", "policy_n_hidden_layers", "cql_target_action_gap", "cql_clip_diff_min"]
    changes = [dict(zip(names, values)) for values in itertools.product((0.5, 0.25), repeat=4)]
    found = methods_of(tmp_path, *changes)
    assert len(set(found)) == 16 and max(map(len, found)) < 100
    assert found[1].startswith("CQL poli_n_hidd_laye=0.5 soft_targ_upda_rate=0.5 ")


def test_scripts_of_one_name_stay_apart(tmp_path):
    scripts = ["offline/cql.py", "offline/cql.py", "finetune/cql.py", "offline/combo.py", "finetune/cql.py"]
    changes = [{}, {"layer_norm": True}, {}, {}, {"env": "a/b-v0"}]  # a copy; at last the only one on its dataset
    found = methods_of(tmp_path, *changes, scripts=scripts)
    assert found == ["CQL offline/cql", "CQL offline/cql+layer_norm", "CQL finetune/cql", "CQL offline/combo", "CQL"]


def test_by_and_rename(make, tmp_path):
    for i, changes in enumerate(({}, {"cql_alpha": 0.5}, {"bc_only": True}, {"seed": 1, "buffer_size": 7})):
        folder(tmp_path / f"runs/{i}", lines(i), **options_of("offline/cql.py") | changes)
    status, _, err = make("runs", "--out", "out", "--by", "cql_alpha")
    text = "seed 0 of CQL cql_alpha=10 on d4rl/hopper-medium-v2 exists twice: runs/0 and runs/2"
    assert status == 1 and text in err
    make("runs/0", "runs/1", "runs/3", "--out", "out", "--by", "cql_alpha", "--rename", "CQL cql_alpha=10", "mine")
    assert column(tmp_path / "out", "Runs", "method") == ["CQL cql_alpha=0.5", "mine"]
    assert column(tmp_path / "out", "Runs", "seeds") == ["1", "2"]
    assert make("runs", "--out", "out", "--by", "nonsense")[0] == 2
    status, _, err = make("runs", "--out", "out", "--rename", "nobody", "x")
    assert status == 2 and "nobody" in err and err.count("\n") == 1


def test_names_are_text(make, tmp_path):
    env, name = "<script>alert(1)</script>/a&b-v0", "$\\frac$ <b>"  # neither HTML nor mathematics
    folder(tmp_path / "runs/a", lines(1, 2), env=env, name=name)
    assert make("runs", "--out", "out", pictures=True)[0] == 0
    page = (tmp_path / "out/index.html").read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;/a&amp;b-v0" in page


def test_two_runs_of_a_seed(make, tmp_path):
    folder(tmp_path / "runs/a", lines(1, 2))
    folder(tmp_path / "runs/b", lines(1), max_timesteps=20)  # an attempt that was stopped
    folder(tmp_path / "runs/c", lines(1, 9))  # the same run, repeated on another machine
    _, _, err = make("runs", "--out", "out")
    assert "exists twice: runs/a and runs/b; the longer one counts" in err
    assert "exists twice: runs/a and runs/c; the first one counts" in err
    assert column(tmp_path / "out", "Runs", "last score") == ["2.0"]
    assert "twice" not in make("runs/a", "runs/a", "--out", "out")[2]  # the same one twice is one
    make("runs/c", "--out", "other")  # of which nothing says that it had the same options
    status, _, err = make("other", "runs/a", "--out", "out")
    assert status == 1 and "c and runs/a; give one of them" in err and err.count("\n") == 1


def test_datasets_without_reference_are_left_out_of_what_is_pooled(make, tmp_path):
    for method, seed in itertools.product(("A", "B"), (0, 1, 2)):
        folder(tmp_path / f"runs/{method}{seed}", lines(seed + 10 * (method == "A")), seed=seed, name=method)
        folder(tmp_path / f"runs/{method}{seed}x", [[5, np.nan]], seed=seed, name=method, env="mine/shop-v0")
    _, _, err = make("runs", "--out", "out")
    assert "no reference returns, hence no scores: mine/shop-v0 (left out where runs are pooled)" in err
    assert column(tmp_path / "out", "Scores", "dataset") == [
        "d4rl/hopper-medium-v2",
        "interquartile mean of 1 dataset",
    ]
    assert cells(tmp_path / "out", "Probability of improvement")[1] == [["A > B", "1.00", "[1.00, 1.00]"]]


def test_offline_then_online(make, tmp_path):
    path = folder(tmp_path / "runs/a", lines(1, 80, 70, 60, 90, 50), offline_iterations=20, online_iterations=40)
    table = pd.read_csv(path / "metrics.csv").assign(train_regret=0.25, eval_regret=[np.nan, 0.2, 0.3, 0.3, 0.3, 0.375])
    table.to_csv(path / "metrics.csv", index=False)
    for name, source in (("first", "runs"), ("second", "first")):
        make(source, "--out", name)
        (row,) = cells(tmp_path / name, "Offline, then online")[1]
        assert row[2:] == ["1", "80.0", "60.0", "20.0", "50.0", "0.250", "0.375"]


def test_runs_csv_gives_the_same_tables_and_takes_new_runs(make, tmp_path):
    for seed, scores in enumerate(((1, 2.123456789012345), (3, 4), (5,))):
        folder(tmp_path / f"runs/{seed}", lines(*scores), seed=seed, name="007", max_timesteps=20)
    make("runs", "--out", "first")
    _, _, err = make("first/runs.csv", "--out", "second")
    assert "seed 2 of 007 on d4rl/hopper-medium-v2: unfinished, 10 of 20 steps; it does not count" in err
    assert (tmp_path / "first/runs.csv").read_bytes() == (tmp_path / "second/runs.csv").read_bytes()
    methods = cells(tmp_path / "first", "Methods")[1]  # which takes configurations
    assert methods == [["d4rl/hopper-medium-v2", "007", "discrete/cql_atari", "-"]]
    assert (tmp_path / "first/table.md").read_text().startswith((tmp_path / "second/table.md").read_text())
    folder(tmp_path / "new/x", lines(7, 8), seed=4, env="hopper-medium-v2")
    make("first", "new", "--out", "first", "--rename", "CQL", "007")  # new runs join old ones in their folder
    assert column(tmp_path / "first", "Runs", "seeds") == ["3"]


def test_wandb_project(make, tmp_path, monkeypatch):
    history = [{"_step": 5, "qf1_loss": 1.0}, {"_step": 10, "step": 10, report_runs.RETURN: 5.0, report_runs.SCORE: 50}]
    config = options_of("offline/cql.py") | {"env": "a/b-v0", "seed": 3, "n_episodes": 2, "cql_clip_diff_min": -1.5}
    run = types.SimpleNamespace(name="run", config=config, scan_history=lambda: iter(history), url="https://w.b/run")
    other = types.SimpleNamespace(name="other", config={"lr": 1}, scan_history=lambda: iter(history), url="")
    asked = []
    api = types.SimpleNamespace(runs=lambda path, filters: asked.append((path, filters)) or [run, other])
    monkeypatch.setattr("wandb.Api", lambda timeout: api)
    status, _, err = make("wandb:me/CORL/group", "--out", "out")
    assert status == 0 and "note: me/CORL/other: its configuration has no env, name or seed; left out" in err
    assert asked == [("me/CORL", {"group": "group"})]
    assert cells(tmp_path / "out", "Runs")[1][0][:6] == ["a/b-v0", "CQL", "1", "2", "10", "5.0"]
    assert '<a href="https://w.b/run">me/CORL/run</a>' in (tmp_path / "out/index.html").read_text()
    (words,) = commands(tmp_path / "out")  # has no file of options to name
    assert words[1].endswith("algorithms/offline/cql.py") and words[-2:] == ["--run_id", "run-again"]
    own = {"--env=a/b-v0", "--seed=3", "--n_episodes=2", "--cql_clip_diff_min=-1.5", "--max_timesteps=10"}
    assert own == set(words[2:-2]) - {"--device=cpu"}
    assert make("wandb:me", "--out", "out")[0] == 2
    api.runs = lambda path, filters: 1 / 0
    status, _, err = make("wandb:me/CORL", "--out", "out")
    assert status == 1 and "wandb login" in err and err.count("\n") == 1


def test_returns_of_the_data(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Counter, "action_space", CONTINUOUS.action_space)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = record("Counter-v0", range(4))
    returns = [buffer.rewards.sum() for buffer in buffers]
    buffers.append(record("Counter-v0", [8])[0])  # the last one is cut short
    parts = {"rewards": buffers[-1].rewards[:1], "actions": buffers[-1].actions[:1]}
    parts |= {"observations": buffers[-1].observations[:2]}
    ends = {"terminations": np.array([False]), "truncations": np.array([True])}
    buffers[-1] = dataclasses.replace(buffers[-1], **parts, **ends)
    store(DATASET, buffers, env="Counter-v0")
    folder(tmp_path / "runs/a", lines(1), env=DATASET)
    assert make("runs", "--out", "out")[0] == 0
    (row,) = pd.read_csv(tmp_path / "out/behaviour.csv").to_dict("records")
    assert row["return"] == np.mean(returns) and row["std"] == np.std(returns) and row["episodes"] == 4
    assert np.isnan(row["score"])
    monkeypatch.setattr(report_runs, "behaviour", lambda *args: pytest.fail("it stands in behaviour.csv"))
    make("out", "--out", "again")
    assert (tmp_path / "again/behaviour.csv").read_bytes() == (tmp_path / "out/behaviour.csv").read_bytes()
    monkeypatch.undo()
    (tmp_path / "again/behaviour.csv").write_text("dataset,return\nx,much\n")
    next((tmp_path / "minari").rglob("metadata.json")).write_text("{")
    status, _, err = make("again", "--out", "damaged")
    assert status == 0 and "note: again/behaviour.csv cannot be read" in err
    assert (
        f"note: the data of {DATASET} cannot be read, so their returns are missing (" in err
        and "JSONDecodeError" in err
    )


# The page


def commands(path):
    """The commands of a page, split into words."""
    found = re.findall("<code>(.*?)</code>", (path / "index.html").read_text())
    return [shlex.split(html.unescape(text)) for text in found]


@pytest.mark.parametrize("script", ["algorithms.discrete.cql_dqn", "algorithms.finetune.cql"], indirect=True)
def test_page_of_real_runs_needs_nothing_else(script, run, make, tmp_path):
    runs = run(seed=1, run_id="one", holdout_fraction=0.3).parent
    run(seed=1, run_id="two", cql_alpha=0, holdout_fraction=0.3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    status, out, err = make(runs, "--out", "out", pictures=True)
    assert status == 0 and out == "2 runs, 1 dataset, 2 methods: out/index.html\n"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "table.md", "runs.csv", "curves.png", METRICS_PNG, "mine.txt"}
    page = (tmp_path / "out/index.html").read_text()
    sources = re.findall(r"""(?:src|url)\s*[=(]\s*["']?([^"'>)]{1,30})""", page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert re.findall('href="(.*?)"', page) == ["../runs/two", "../runs/one"]
    assert "<script" not in page and "@import" not in page
    for text in ("--out out", DATASET, " cql_alpha=0", "worst seed"):
        assert text in page, text
    assert column(tmp_path / "out", "Runs", "state") == ["finished", "finished"]
    label = "/".join(script.__name__.split(".")[1:])
    assert column(tmp_path / "out", "Methods", "script") == [label, label]


@continuous
def test_the_same_again(script, run, make, command_line, new_dataset, tmp_path):
    path = run(seed=1, run_id="a run", cql_alpha=3.0)
    make("runs", "--out", "out")
    (words,) = commands(tmp_path / "out")
    assert words[0] == "python" and (tmp_path / words[1]).samefile(script.__file__)
    assert words[-2:] == ["--run_id", "a-run-again"]
    assert command_line(*words[2:])[0] == 0
    first, second = (pd.read_csv(tmp_path / f"runs/{x}/metrics.csv") for x in (path.name, "a-run-again"))
    pd.testing.assert_frame_equal(*(x.drop(columns=[*SPEEDS], errors="ignore") for x in (first, second)))
    _, _, err = make("runs", "--out", "out")
    assert "exists twice: runs/a run and runs/a-run-again; the first one counts" in err
    assert [words[-1] for words in commands(tmp_path / "out")] == ["a-run-again-2"]


def test_each_run_gets_a_name_of_its_own(make, tmp_path):
    for i, place in enumerate(("here/CQL", "there/CQL")):
        folder(tmp_path / place, lines(1), **options_of("offline/cql.py") | {"seed": i})
    (tmp_path / "runs/CQL-again").mkdir(parents=True)
    make("here", "there", "--out", "out")
    assert [words[-1] for words in commands(tmp_path / "out")] == ["CQL-again-2", "CQL-again-3"]


def test_copies_of_a_script(make, tmp_path):
    text = (ROOT / "algorithms/offline/cql.py").read_text()
    text = text.replace("    hidden_dim: int", "    layer_norm: bool = False\n    hidden_dim: int", 1)
    (tmp_path / "mine.py").write_text(text)
    folder(tmp_path / "runs/a", lines(1), **options_of("offline/cql.py") | {"layer_norm": True})
    make("runs", "--out", "out")
    assert "no script here has its option layer_norm: --script names" in (tmp_path / "out/index.html").read_text()
    make("runs", "--out", "out", "--script", "mine.py")
    assert commands(tmp_path / "out")[0][:4] == ["python", "mine.py", "--config_path", "runs/a/config.yaml"]
    assert column(tmp_path / "out", "Methods", "script") == ["mine"]
    (tmp_path / "other.py").write_text("x = 1\n")
    status, _, err = make("runs", "--out", "out", "--script", "other.py")
    assert status == 2 and "other.py is not a training script with a class TrainConfig" in err


def figure_of(tmp_path, kind, *changes, n_rows=3):
    """The figure of runs with these changes of options."""
    for i, options in enumerate(changes):
        folder(tmp_path / f"runs/{i:02}", lines(*range(options.pop("n_rows", n_rows))), **options)
    runs = report_runs.read([str(tmp_path / "runs")], [])
    report_runs.name_methods(runs, None, [report_runs.read_script(ROOT / "algorithms/offline/cql.py")])
    results, plt = report_runs.collect(runs, []), report_page.matplotlib_pyplot()
    methods = report_runs.unique(run.method for run in runs)
    if kind == "curves":
        return report_page.curves(plt, results, methods, {})
    ((dataset, found),) = report_page.by_dataset(results).items()
    return report_page.metrics(plt, dataset, found, methods)


@pytest.mark.parametrize("kind", ["curves", "metrics"])
def test_panels_use_the_width_and_nothing_leaves_it(kind, tmp_path):
    name = "a name of many words that nobody would give to a method but a stranger in a hurry " * 4
    changes = [{"name": f"{i} {name}", "env": f"mine/{'long-' * 40}v0"} for i in range(5)]
    figure = figure_of(tmp_path, kind, *changes, changes[0] | {"name": "x" * 300})
    width = figure.get_figwidth() * figure.dpi
    figure.draw_without_rendering()
    axes = [axis.get_position() for axis in figure.axes]
    assert min(x.x0 for x in axes) < 0.1 and max(x.x1 for x in axes) > 0.9
    texts = [*figure.texts, figure.legends[0], *(axis.title for axis in figure.axes)]
    texts = [text.get_window_extent() for text in texts]
    assert all(0 <= x.x0 < x.x1 <= width for x in texts)


@pytest.mark.parametrize("kind", ["curves", "metrics"])
def test_runs_of_very_different_lengths_share_a_logarithmic_axis(kind, tmp_path):
    (tmp_path / "a").mkdir()
    for path, n_rows, scale in ((tmp_path / "a", 29, "linear"), (tmp_path, 30, "symlog")):
        figure = figure_of(path, kind, {"name": "short", "n_rows": 3}, {"name": "long", "n_rows": n_rows})
        assert {axis.get_xscale() for axis in figure.axes} == {scale}
        assert all((scale == "symlog") == ("log scale" in axis.get_xlabel()) for axis in figure.axes)
    assert max(len(line.get_xdata()) for line in figure.axes[0].get_lines()) == 30  # nothing is cut


def test_pictures_of_many_methods_negative_returns_and_divergence(tmp_path, make):
    for i, env in itertools.product(range(12), ("a/b-v0", "a/c-v0")):
        rows = [[-(10.0 ** (i / 2)) * (j + 1), -i - j] for j in range(2)]
        path = folder(
            tmp_path / f"runs/{i}{env[2]}", rows, env=env, name=f"method {i}", max_timesteps=100 if i == 3 else 20
        )
        table = pd.read_csv(path / "metrics.csv")
        table["eval_predicted_value"] = 10.0 ** (np.arange(2) * (i == 3) * 6)
        table.to_csv(path / "metrics.csv", index=False)
    assert make("runs", "--out", "out", pictures=True)[0] == 0
    names = {path.name for path in (tmp_path / "out").glob("*.png")}  # without a profile, since each method ran once
    assert names == {"curves.png", "metrics-a-b-v0.png", "metrics-a-c-v0.png"}
    page = (tmp_path / "out/index.html").read_text()
    assert "<li>" in page and page.count("Means since the last evaluation") == 1  # not for each dataset
    height, width, _ = matplotlib.image.imread(tmp_path / "out/curves.png").shape
    assert height > 450 and width > 1200  # 440 without the legend


BAD = {  # file -> contents of damaged run folders
    "config.yaml": [
        "[", "", "- 1", "env: x", "{env: x, seed: y, name: z}", "{env: x, seed: 1, name: z, n_episodes: []}", None,
        "{env: , seed: 1, name: z}", "{env: x, seed: .inf, name: z}", b"\xff\xfe\x00", "[" * 2000,
    ],
    "metrics.csv": ["", "step,eval_return\n1,much\n", "eval_return\n1\n", "step,eval_return\n,1\n", b"\xff\xfe,\n"],
}  # fmt: skip


def damage(path, name, content):
    """Replaces a file of a run; None: deletes it."""
    path = folder(path, lines(1)) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_damaged_runs_are_named_and_left_out(make, tmp_path, monkeypatch):
    cases = [(name, content) for name, contents in BAD.items() for content in contents]
    for i, case in enumerate(cases):
        damage(tmp_path / f"runs/bad{i:02}", *case)
    folder(tmp_path / "runs/none", lines(1)).joinpath("metrics.csv").unlink()  # killed before its first evaluation
    status, _, err = make("runs", "--out", "out")
    assert (
        status == 1 and err.count("\n") == 1 and err.startswith("report.py: error: there is no run to report: runs/bad")
    )
    folder(tmp_path / "runs/good", lines(1))
    access = os.access  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    damage(tmp_path / "runs/locked", "config.yaml", None)
    (tmp_path / "runs/locked/metrics.csv").unlink()
    status, out, err = make("runs", "--out", "out")
    assert status == 0 and out.startswith("1 run,") and err.count("; left out\n") == len(cases) + 2
    assert "note: runs/locked/config.yaml cannot be read" in err
    for i in range(len(cases)):
        assert len(re.findall(rf"note: runs/bad{i:02}\b.*; left out\n", err)) == 1
    assert "note: runs/none has no evaluation yet; left out" in err
    assert make("runs/bad00", "runs/good", "--out", "out")[0] == 0
    for alone in ("runs/bad00", "runs/none"):
        assert make(alone, "--out", "other")[0] == 1 and not (tmp_path / "other").exists()


def test_what_a_user_may_get_wrong(make, tmp_path):
    folder(tmp_path / "runs/good", lines(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("step,eval_return\n1,1\n")
    for status, *arguments in (
        (2,), (2, "runs"), (2, "--out", "out"), (2, "runs", "--update", "x"), (1, "nowhere", "--out", "out"),
        (1, "runs", "nowhere", "--out", "out"), (1, "empty", "--out", "out"), (1, "empty.csv", "--out", "out"),
        (1, "other.csv", "--out", "out"), (1, "runs", "--out", "empty.csv"), (1, "--update", "nowhere.md"),
        (1, "--update", "empty.csv"), (2, "runs", "--out", "runs"), (2, "runs", "--out", "runs/good"),
        (2, "runs", "--out", "out", "--script", "nowhere.py"),
    ):  # fmt: skip
        found, out, err = make(*arguments)
        assert (found, out) == (status, "") and err.count("\n") == 1 and err.startswith("report.py: error: "), arguments
        assert not (tmp_path / "out").exists()
    status, _, err = make("runs", "empty", "--out", "out")
    assert status == 0 and "note: empty holds neither run folders nor a runs.csv; left out" in err


def test_without_matplotlib_a_line_says_what_to_install(make, tmp_path, monkeypatch):
    folder(tmp_path / "runs/a", lines(1))
    original = builtins.__import__

    def absent(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    status, _, err = make("runs", "--out", "out", pictures=True)
    assert status == 1 and "pip install -r requirements-extra.txt" in err and err.count("\n") == 1
    assert "matplotlib" in (ROOT / "requirements-extra.txt").read_text() and not (tmp_path / "out").exists()


# What the repository holds

PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if "<!-- report:" in path.read_text()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_in_the_docs_are_those_of_the_runs(path):
    assert report.update(path) == path.read_text(), f"stale: python benchmarks/report.py --update {path}"


def test_a_stale_table_is_made_anew(make, tmp_path):
    assert {path.name for path in PAGES} >= {"README.md", "results.md", "finetune_cql.md"}
    text = (ROOT / "docs/finetune_cql.md").read_text()
    (tmp_path / "x.md").write_text(text.replace("93.5 ± 2.8", "300.0 ± 0.1"))
    assert make("--update", "x.md")[:2] == (0, "x.md: written\n") and (tmp_path / "x.md").read_text() == text
    before = contents(tmp_path)["x.md"]
    for change in ("rows: {nobody: x, ", "rows: {[}, ", "rows: x, x: {"):
        (tmp_path / "y.md").write_text(text.replace("rows: {", change, 1))
        status, _, err = make("--update", "x.md", "y.md")
        assert status == 1 and "y.md" in err and err.count("\n") == 1
        assert contents(tmp_path)["x.md"] == before  # all or none


def test_a_table_in_the_docs_leaves_no_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for place in ("good/a", "bad/a"):
        folder(tmp_path / place, lines(1))
    damage(tmp_path / "bad/b", "config.yaml", "[")
    assert list(report.stored("good")[0]) == [("d4rl/hopper-medium-v2", "")]
    with pytest.raises(DataError, match="bad/b/config.yaml cannot be read"):
        report.stored("bad")


def test_published_scores_have_versions_and_sources():
    table = pd.read_csv(ROOT / "benchmarks/published_scores.csv")
    assert len(table) > 400 and not table[["dataset", "method", "score", "last_or_best", "source"]].isna().any(
        axis=None
    )
    numbers = r"(dqn-replay|tianshou)/[a-z]+-\d{4,}-v0"  # a share of a game's data is a number of transitions
    assert table["dataset"].str.fullmatch(rf"d4rl/[a-z0-9-]+-v\d|{numbers}").all()
    assert set(table["last_or_best"]) == {"last", "best", "unstated"} and table["source"].str.contains("https://").all()
    assert not table.duplicated(["dataset", "method", "last_or_best", "source"]).any()
    suspects = table[table["note"].notna()]
    assert set(suspects["dataset"]) == {"d4rl/walker2d-medium-expert-v0", "d4rl/walker2d-medium-replay-v0"}
