"""benchmarks/report.py: its statistics, what it counts and keeps apart, the page, and the tables in the docs."""

import builtins
import dataclasses
import itertools
import re
import types

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import CONTINUOUS, DATASET, ROOT, Counter, contents, record, store

from benchmarks import report

# Statistics

FIRST = np.array([[10.0, 20, 30], [40, 50, 60], [70, 80, 95], [12, 22, 33], [5, 5, 5]])  # runs x datasets
SECOND = np.array([[15.0, 20, 10], [35, 45, 60], [75, 60, 70], [2, 27, 30], [1, 5, 4]])
TAUS = np.array([0.0, 5, 12, 30, 60, 95])


def strata(scores):
    return list(scores.T)


def test_interquartile_mean_by_hand():
    assert report.iqm(np.arange(8.0)) == (2 + 3 + 4 + 5) / 4
    assert report.iqm(np.array([-1e9, 1, 2, 3, 1e9])) == 2  # a quarter of five is one
    assert report.iqm(np.array([1.0, 5])) == 3
    assert report.iqm(np.arange(12.0) ** 2) == pytest.approx((9 + 16 + 25 + 36 + 49 + 64) / 6)
    assert report.iqm(np.array([[3.0, 1, 2, 100], [0, 0, 0, 0]])).tolist() == [2.5, 0]


def test_profile_and_improvement_by_hand():
    assert report.profile(np.array([1.0, 2, 2, 3]), np.array([0, 2, 3])).tolist() == [1, 0.25, 0]
    assert report.improvement([np.array([1.0, 3])], [np.array([2.0])]) == 0.5
    assert report.improvement([np.array([1.0, 2])], [np.array([2.0, 2])]) == 0.25  # ties count half
    # datasets weigh the same, whatever their number of seeds
    assert report.improvement([np.array([1.0]), np.array([0.0, 0, 0])], [np.array([0.0]), np.array([1.0])]) == 0.5


def test_intervals_draw_seeds_within_datasets():
    far = [np.array([0.0, 1]), np.array([1000.0, 1001])]
    drawn = report.resample(far, 500)
    assert (
        drawn[0].shape == (500, 2) and set(np.unique(drawn[0])) == {0, 1} and set(np.unique(drawn[1])) == {1000, 1001}
    )
    assert not np.array_equal(drawn[0], drawn[1] - 1000)
    low, high = report.iqm_interval(far)
    assert 500 <= low < high <= 501  # over all seeds at once it would reach from 0 to 1001
    assert report.improvement_interval(far, [x - 10 for x in far]).tolist() == [1, 1]
    assert report.iqm_interval(far).tolist() == [low, high]  # the same each time


def test_statistics_are_rliables():
    """What rliable 1.2.0 gives (pip install rliable==1.2.0 'pandas<3' 'arch<8'), after np.random.seed(0) for intervals:

    metrics.aggregate_iqm(FIRST), metrics.probability_of_improvement(FIRST, SECOND),
    library.create_performance_profile({"first": FIRST}, TAUS), and library.get_interval_estimates of the first two with
    reps=200. It draws seeds with that generator, whatever its random_state is; so the same draws are given to ours.
    """
    assert report.iqm(FIRST.ravel()) == pytest.approx(30.77777777777778, abs=1e-12)
    assert report.improvement(strata(FIRST), strata(SECOND)) == pytest.approx(0.56, abs=1e-12)
    expected = [1.0, 0.8, 0.6666666666666666, 0.4666666666666667, 0.2, 0.0]
    assert report.profile(FIRST.ravel(), TAUS) == pytest.approx(expected, abs=1e-12)
    (first,) = draws(FIRST)
    expected = [15.87777777777778, 48.78055555555558]
    assert report.interval(report.iqm(np.concatenate(first, axis=1))) == pytest.approx(expected, abs=1e-12)
    expected = [0.31316666666666665, 0.7668333333333334]
    assert report.interval(report.improvement(*draws(FIRST, SECOND))) == pytest.approx(expected, abs=1e-12)


def draws(*methods, repeats=200):
    """rliable's after np.random.seed(0): of each method what report.resample would give, [repeats, runs] a dataset."""
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
        assert report.iqm(first.ravel()) == pytest.approx(iqm(first), abs=1e-12)
        assert report.improvement(strata(first), strata(second)) == pytest.approx(improvement(first, second), abs=1e-12)
        profiles, _ = library.create_performance_profile({"x": first}, TAUS, reps=2)
        assert report.profile(first.ravel(), TAUS) == pytest.approx(profiles["x"], abs=1e-12)
        (drawn,) = draws(first)
        ours = report.interval(report.iqm(np.concatenate(drawn, axis=1)))
        assert ours == pytest.approx(ends(first, lambda x: np.array([iqm(x)])), abs=1e-12)
        ours = report.interval(report.improvement(*draws(first, second)))
        both = ends((first, second), lambda x, y: np.array([improvement(x, y)]))
        assert ours == pytest.approx(both, abs=1e-12)
        # Other draws, the same distribution.
        many = ends(first, lambda x: np.array([iqm(x)]), 2000)
        assert report.iqm_interval(strata(first)) == pytest.approx(many, abs=0.1 * np.ptp(many))


# Runs


def folder(path, rows, **config):
    """A run folder; rows are lists of return and score, one an evaluation, each 10 updates."""
    config = {"env": "d4rl/hopper-medium-v2", "seed": 0, "name": "CQL", "n_episodes": 3, "cql_alpha": 10.0} | config
    config = {"max_timesteps": 10 * len(rows)} | config
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    table = pd.DataFrame(rows, columns=[report.RETURN, report.SCORE]).assign(eval_return_std=1.0, qf1_loss=0.5)
    table = table.assign(eval_predicted_value=3.0, eval_discounted_return=2.0)
    table.insert(0, "step", 10 * np.arange(1, len(rows) + 1))
    table.to_csv(path / "metrics.csv", index=False)
    return path


def lines(*scores):
    return [[10 * score, score] for score in scores]


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Runs the program in tmp_path without pictures; returns exit status, stdout and stderr."""

    def start(*arguments, pictures=False):
        monkeypatch.setattr(report.resample, "__defaults__", (50, 0))  # draws
        if not pictures:
            monkeypatch.setattr(report, "draw", lambda *args: {})
        monkeypatch.chdir(tmp_path)
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


def test_best_and_last_scores_are_apart(make, tmp_path):
    folder(tmp_path / "runs/a", lines(10, 90, 20), seed=0)
    folder(tmp_path / "runs/b", lines(70, 30, 40), seed=1)
    make("runs", "--out", "out")
    (best,), (last,) = (column(tmp_path / "out", "Runs", x) for x in ("best score (over evaluations)", "last score"))
    assert (best, last) == ("80.0 ± 10.0", "30.0 ± 10.0")
    assert column(tmp_path / "out", "Scores", "CQL") == ["30.0 ± 10.0", column(tmp_path / "out", "Scores", "CQL")[1]]
    assert column(tmp_path / "out", "Scores", "CQL")[1].startswith("30.0 [20.0, 40.0]")
    assert column(tmp_path / "out", "Runs", "promised value") == ["3.0 ± 0.0"]
    assert column(tmp_path / "out", "Runs", "last return") == ["300.0 ± 100.0"]


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
    assert cells(tmp_path / "out", "Scores")[1][1][2:4] == ["3.0", "-"]  # pooled


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
    assert "no simulator" not in err  # nobody asked for returns
    rows = {row[1]: row for row in cells(tmp_path / "out", "Runs")[1]}
    assert rows["CQL"][2] == "1" and rows["no simulator"][5:9] == ["-"] * 4
    assert not any("nan" in cell for row in rows.values() for cell in row)


def test_labels_say_what_differs_and_no_more(make, tmp_path):
    options = {"buffer_size": 5, "bc_only": False, "eval_seed": 0, "dynamics_path": "a"}
    for i, changes in enumerate(
        ({}, {"cql_alpha": 0.5}, {"bc_only": True}, {"seed": 1, "buffer_size": 7, "eval_seed": 3, "dynamics_path": "b"})
    ):
        folder(tmp_path / f"runs/{i}", lines(i), **options | changes)
    folder(tmp_path / "runs/online", lines(5, 6), online_iterations=10, offline_iterations=10)
    folder(tmp_path / "runs/with_model", lines(5), real_ratio=1.0)
    make("runs", "--out", "out")
    assert column(tmp_path / "out", "Runs", "method") == [
        "CQL offline/cql.py cql_alpha=10",
        "CQL offline/cql.py cql_alpha=0.5",
        "CQL offline/cql.py bc_only cql_alpha=10",
        "CQL finetune/cql.py",
        "CQL offline/combo.py",
    ]
    name = "CQL offline/cql.py cql_alpha=10"
    status, _, err = make("runs", "--out", "out", "--by", "cql_alpha")
    assert status == 1 and f"seed 0 of {name} on d4rl/hopper-medium-v2 is there twice: runs/0 and runs/2" in err
    make("runs/0", "runs/1", "runs/3", "--out", "out", "--by", "cql_alpha", "--rename", "CQL cql_alpha=10", "mine")
    assert column(tmp_path / "out", "Runs", "method") == ["mine", "CQL cql_alpha=0.5"]
    assert column(tmp_path / "out", "Runs", "seeds") == ["2", "1"]
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
    _, _, err = make("runs", "--out", "out")
    assert "is there twice: runs/a and runs/b; the longer one counts" in err
    assert column(tmp_path / "out", "Runs", "last score") == ["2.0"]
    folder(tmp_path / "runs/c", lines(1, 9))
    status, _, err = make("runs", "--out", "out")
    assert status == 1 and "runs/a and runs/c; give one of them" in err and err.count("\n") == 1
    assert make("runs/a", "runs/a", "--out", "out")[0] == 0  # the same one twice is one


def test_datasets_without_reference_are_left_out_of_what_is_pooled(make, tmp_path):
    for method, seed in itertools.product(("A", "B"), (0, 1)):
        folder(tmp_path / f"runs/{method}{seed}", lines(seed + 10 * (method == "A")), seed=seed, name=method)
        folder(tmp_path / f"runs/{method}{seed}x", [[5, np.nan]], seed=seed, name=method, env="mine/shop-v0")
    _, _, err = make("runs", "--out", "out")
    assert "no reference returns, hence no scores: mine/shop-v0 (left out where datasets are pooled)" in err
    assert column(tmp_path / "out", "Scores", "dataset") == [
        "d4rl/hopper-medium-v2",
        "interquartile mean of 1 dataset(s)",
    ]
    assert cells(tmp_path / "out", "Probability of improvement")[1] == [["A > B", "1.00", "[1.00, 1.00]"]]


def test_offline_then_online(make, tmp_path):
    path = folder(tmp_path / "runs/a", lines(1, 80, 70, 60, 90, 50), offline_iterations=20, online_iterations=40)
    table = pd.read_csv(path / "metrics.csv").assign(train_regret=0.25, eval_regret=[np.nan, 0.2, 0.3, 0.3, 0.3, 0.375])
    table.to_csv(path / "metrics.csv", index=False)
    make("runs", "--out", "out")
    (row,) = cells(tmp_path / "out", "Offline, then online")[1]
    assert row[2:] == ["1", "80.0", "60.0", "20.0", "50.0", "0.250", "0.375"]
    (tmp_path / "old").mkdir()  # the same from a CSV file alone
    table.to_csv(tmp_path / "old/data-method-seed0.csv", index=False)
    make("old", "--out", "out")
    assert cells(tmp_path / "out", "Offline, then online")[1][0][3:] == row[3:]


def test_csv_files_and_runs_csv_give_the_same_tables(make, tmp_path):
    (tmp_path / "old").mkdir()
    for seed, scores in enumerate(((1, 2.123456789012345), (3, 4), (5,))):
        path = folder(tmp_path / f"runs/{seed}", lines(*scores), seed=seed)
        (path / "metrics.csv").rename(tmp_path / f"old/hopper-medium-cql-seed{seed}.csv")
    _, _, err = make("old", "--out", "first")
    assert "seed 2 of cql on hopper-medium: unfinished, 10 of 20 steps; it does not count" in err
    make("first/runs.csv", "--out", "second")
    for name in ("runs.csv", "table.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    # new runs join old ones in the old folder
    folder(tmp_path / "new/x", lines(7, 8), seed=4, env="hopper-medium-v2")
    make(
        "first", "new", "--out", "first", "--rename", "CQL", "cql", "--rename", "d4rl/hopper-medium-v2", "hopper-medium"
    )
    assert column(tmp_path / "first", "Runs", "seeds") == ["3"]


def test_wandb_project(make, tmp_path, monkeypatch):
    history = [{"_step": 5, "qf1_loss": 1.0}, {"_step": 10, "step": 10, report.RETURN: 5.0, report.SCORE: 50.0}]
    config = {"env": "a/b-v0", "seed": 3, "name": "CQL", "max_timesteps": 10, "n_episodes": 2}
    run = types.SimpleNamespace(name="run", config=config, scan_history=lambda: iter(history))
    asked = []
    api = types.SimpleNamespace(runs=lambda path, filters: asked.append((path, filters)) or [run])
    monkeypatch.setattr("wandb.Api", lambda timeout: api)
    assert make("wandb:me/CORL/group", "--out", "out")[0] == 0
    assert asked == [("me/CORL", {"group": "group"})]
    assert cells(tmp_path / "out", "Runs")[1][0][:6] == ["a/b-v0", "CQL", "1", "2", "10", "5.0"]
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
    monkeypatch.setattr(report, "behaviour", lambda name: pytest.fail("it stands in behaviour.csv"))
    make("out", "--out", "again")
    assert (tmp_path / "again/behaviour.csv").read_bytes() == (tmp_path / "out/behaviour.csv").read_bytes()


# The page


def test_page_of_real_runs_needs_nothing_else(script, run, make, tmp_path):
    runs = run(seed=1, run_id="one", holdout_fraction=0.3).parent
    run(seed=2, run_id="two", holdout_fraction=0.3)
    run(seed=1, run_id="three", cql_alpha=0, holdout_fraction=0.3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    status, out, err = make(runs, "--out", "out", pictures=True)
    assert status == 0 and out == "3 runs, 1 datasets, 2 methods: out/index.html\n"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"index.html", "table.md", "runs.csv", "curves.png", "values.png", "metrics.png", "mine.txt"}
    assert not any(name.endswith(".tmp") for name in names)
    page = (tmp_path / "out/index.html").read_text()
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>)]{1,30})""", page)
    assert len(sources) >= 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page and "@import" not in page
    for text in ("--out out", "torch 2", DATASET, "cql_alpha=0", "--config_path", "best score (over evaluations)"):
        assert text in page, text
    assert column(tmp_path / "out", "Runs", "seeds") == ["2", "1"] if "cql_alpha=0" in page else True
    assert column(tmp_path / "out", "Runs", "state") == ["finished", "finished"]


def test_pictures_of_many_methods_negative_returns_and_divergence(tmp_path, make):
    for i, env in itertools.product(range(12), ("a/b-v0", "a/c-v0")):
        rows = [[-(10.0 ** (i / 2)) * (j + 1), -i - j] for j in range(4)]
        path = folder(
            tmp_path / f"runs/{i}{env[2]}", rows, env=env, name=f"method {i}", max_timesteps=100 if i == 3 else 40
        )
        table = pd.read_csv(path / "metrics.csv")
        table["eval_predicted_value"] = 10.0 ** (np.arange(4) * (i == 3) * 2)
        table.to_csv(path / "metrics.csv", index=False)
    assert make("runs", "--out", "out", pictures=True)[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "curves.png", "aggregates.png", "values.png", "metrics.png",
    }  # fmt: skip
    assert "<li>" in (tmp_path / "out/index.html").read_text()


def test_what_a_user_may_get_wrong(make, tmp_path):
    good = folder(tmp_path / "runs/good", lines(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "data-method-seed0.csv").write_text("")
    (tmp_path / "data-words-seed0.csv").write_text("step,eval_return\n1,much\n")
    (tmp_path / "data-nothing-seed0.csv").write_text("eval_return\n1\n")
    (tmp_path / "data-header-seed0.csv").write_text("step,eval_return\n")
    bad = {"a": "[", "b": "- 1", "c": "env: x", "d": "{env: x, seed: y, name: z}"}
    bad |= {"e": "{env: x, seed: 1, name: z, max_timesteps: many}"}
    for name, text in bad.items():
        (folder(tmp_path / f"bad{name}", lines(1)) / "config.yaml").write_text(text)
    for status, *arguments in (
        (2,), (2, "runs"), (2, "--out", "out"), (2, "runs", "--update", "x"), (1, "nowhere", "--out", "out"),
        (1, "empty", "--out", "out"), (1, "empty.csv", "--out", "out"), (1, "data-method-seed0.csv", "--out", "out"),
        (1, "data-words-seed0.csv", "--out", "out"), (1, "data-nothing-seed0.csv", "--out", "out"),
        (1, "data-header-seed0.csv", "--out", "out"), (1, "bada", "--out", "out"), (1, "badb", "--out", "out"),
        (1, "badc", "--out", "out"), (1, "badd", "--out", "out"), (1, "bade", "--out", "out"),
        (1, "runs", "--out", "empty.csv"), (1, "--update", "nowhere.md"),
        (1, "--update", "empty.csv"),
    ):  # fmt: skip
        found, out, err = make(*arguments)
        assert (found, out) == (status, "") and err.count("\n") == 1 and err.startswith("report.py: error: "), arguments
        assert not (tmp_path / "out").exists()
    (good / "metrics.csv").unlink()
    folder(tmp_path / "runs/other", lines(1), seed=1)
    status, _, err = make("runs", "--out", "out")
    assert status == 0 and "note: runs/good has no evaluation yet, and is left out" in err


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


def test_published_scores_have_versions_and_sources():
    table = pd.read_csv(ROOT / "benchmarks/published_scores.csv")
    assert len(table) > 400 and not table[["dataset", "method", "score", "last_or_best", "source"]].isna().any(
        axis=None
    )
    assert table["dataset"].str.fullmatch(r"d4rl/[a-z0-9-]+-v\d").all()
    assert set(table["last_or_best"]) == {"last", "best", "unstated"} and table["source"].str.contains("https://").all()
    assert not table.duplicated(["dataset", "method", "last_or_best", "source"]).any()
    suspects = table[table["note"].notna()]
    assert set(suspects["dataset"]) == {"d4rl/walker2d-medium-expert-v0", "d4rl/walker2d-medium-replay-v0"}
