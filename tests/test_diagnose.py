"""benchmarks/diagnose.py: verdicts on made-up histories of each kind, which ignore returns; verdicts on real runs of
each script, and the messages for users' errors."""

import csv
import math
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import contents, finetune, kinds, option_names

from benchmarks import diagnose

CONFIG = {"hidden_dim": 64, "cql_alpha": 5.0, "soft_target_update_rate": 0.005}
N = 20
T = np.linspace(0, 1, N)
STEP = 500 * np.arange(1, N + 1)
NOISE = np.random.default_rng(0).standard_normal((4, N))


def history(q=8 * T, td=1 - 0.5 * T, holdout_td=1 - 0.4 * T, gap=3 - T, step=STEP, **more):
    """Rows of a healthy run, as texts, with some columns replaced."""
    columns = {"step": step, "average_qf": q, "qf_loss": td, "cql_qf_diff": gap, "cql_min_qf_loss": 5 * gap}
    columns |= {"holdout_td_error": holdout_td, "holdout_q": q, "holdout_gap": gap + 0.1}
    columns |= {"eval_return": 100 * NOISE[0], "data_discounted_return": np.full(len(q), 2.0)} | more
    return [dict(zip(columns, map(str, row))) for row in zip(*columns.values())]


def long(n=200, **curves):
    """The same with curves that are functions of the time from 0 to 1."""
    t = np.linspace(0, 1, n)
    defaults = {"q": lambda t: 8 * t, "td": lambda t: 1 - 0.5 * t, "gap": lambda t: 3 - t}
    return history(step=500 * np.arange(1, n + 1), eval_return=t, **{k: f(t) for k, f in (defaults | curves).items()})


def clone(nll=1 - T, holdout=1 - 0.5 * T, **more):
    step = 500 * np.arange(1, len(nll) + 1)
    columns = {"step": step, "policy_loss": nll, "holdout_log_prob": -holdout} | more
    return [dict(zip(columns, map(str, row))) for row in zip(*columns.values())]


flat = np.ones(N)
rises = np.maximum(1, 4 * T)  # after a quarter of the run
late = np.maximum(1, 4 * T - 2)  # in its last quarter
TEXTBOOK = {"td": 0.12 + 0.04 * T, "holdout_td": 0.18 + 0.5 * T**2, "holdout_gap": 2.5 + 0.5 * T}
HISTORIES = {
    "healthy": history(),
    "healthy, values a little below the data's return": history(1.8 * T),
    "healthy, values fall to a negative data return": history(-330 * T, data_discounted_return=-300 * flat),
    "healthy, both TD errors grow with Q": history(td=rises, holdout_td=1.2 * rises),
    "healthy, held out stays where training falls": history(td=np.exp(-3 * T), holdout_td=flat),
    "healthy, all are flat, but held-out episodes fare worse": history(
        td=flat, holdout_td=flat, gap=3 * flat, holdout_gap=3.1 * flat
    ),
    "healthy, no held-out episodes": history(holdout_td=flat * math.nan, holdout_gap=flat * math.nan),
    "healthy, no penalty": history(gap=flat * math.nan),
    "healthy, in two hundred rows data Q falls by a small part of its size": long(
        q=lambda t: 8 * np.minimum(2 * t, 1) - 0.3 * np.clip(5 * t - 2.5, 0, 1),
        holdout_td=lambda t: 1 - 0.4 * t,
        data_discounted_return=lambda t: 0.1 + 0 * t,
    ),
    "healthy, both gaps rise": history(gap=3 + T, holdout_gap=3.1 + T),
    "healthy, without a penalty the gap is not a loss": history(holdout_gap=3 + T, cql_min_qf_loss=0 * flat),
    "healthy, the held-out gap falls again": history(holdout_gap=3 - T + np.where(abs(T - 0.5) < 0.1, 1, 0)),
    "healthy, held-out losses rise in the last row alone": history(
        holdout_td=np.append(flat[1:], 9), holdout_gap=np.append(3 * flat[1:], 9)
    ),
    "healthy, the cross-entropy of c51 grows with that of training": history(
        td=1 + T, holdout_td=1.1 + T, c51_edge_mass=0 * flat
    ),
    "healthy, all rewards are costs and time-outs cut off what follows": history(
        -50 * T, data_discounted_return=-20 * flat
    ),
    "healthy, all rewards are 0": history(-0.01 * T, data_discounted_return=0 * flat),
    "healthy, tiny errors grow a hundredfold": history(td=np.append(1e-9, np.full(N - 1, 1e-6))[[1, *range(N - 1)]]),
    "healthy, errors are negligible beside values": history(td=1e-9 * flat, holdout_td=1e-9 * rises),
    "healthy, a clone": clone(),
    "over-fitting, data Q": history(8 * np.minimum(2 * T, 1.5 - T)),
    "over-fitting, data Q falls below the data's return": history(8 * np.minimum(2 * T, 1 - 2 * T)),
    "over-fitting, held-out TD error": history(td=1 - 0.5 * T, holdout_td=rises),
    "over-fitting, as in a textbook": history(**TEXTBOOK),
    "over-fitting, whatever the data's return is": history(**TEXTBOOK, data_discounted_return=100 * flat),
    "over-fitting, and data Q falls too": history(8 * np.minimum(2 * T, 1.5 - T), **TEXTBOOK),
    "over-fitting, the held-out gap alone": history(holdout_gap=3 + 0.3 * late),
    "over-fitting, in eight rows": [history(**TEXTBOOK)[i] for i in np.linspace(0, N - 1, 8).astype(int)],
    "over-fitting, in eight rows, held-out TD error falls at first": [
        history(td=0.12 + 0.04 * T, holdout_td=np.interp(T, [0, 0.4, 1], [0.5, 0.18, 0.68]), holdout_gap=3 - T)[i]
        for i in np.linspace(0, N - 1, 8).astype(int)
    ],
    "over-fitting, in two hundred rows": long(
        td=lambda t: 0.12 + 0.04 * t, holdout_td=lambda t: 0.18 + 0.5 * t**2, holdout_gap=lambda t: 2.5 + 0.5 * t
    ),
    "over-fitting, with empty cells": [
        row | ({"holdout_gap": ""} if i % 2 else {}) for i, row in enumerate(history(**TEXTBOOK))
    ],
    "over-fitting, the cross-entropy of c51": history(holdout_td=1.5 + 0.3 * late, c51_edge_mass=0 * flat),
    "over-fitting, a clone": clone(holdout=np.maximum(1 - T, T)),
    "over-fitting, a discrete clone": [
        {name: x for name, x in row.items() if name not in ("qf_loss", "holdout_td_error")}
        for row in history(holdout_gap=3 + T)
    ],
    "under-fitting": history(td=flat, holdout_td=flat, gap=3 * flat, holdout_gap=3 * flat),
    "under-fitting, values far from the data's return": history(T),
    "under-fitting, values rise and fall by a tenth of the data's return": history(0.2 * np.minimum(2 * T, 1.5 - T)),
    "under-fitting, values fall from the first row on": history(-8 * T),
    "diverging": history(8 * 10 ** (4 * T), 10 ** (4 * T), 10 ** (4 * T)),
    "diverging, infinite": history(td=np.append(flat[1:], math.inf)),
    "too short to judge, few rows": history()[:5],
    "too short to judge, few updates": history(step=np.arange(1, N + 1)),
    "too short to judge, one row": history()[:1],
    "too short to judge, empty cells": [row | {"qf_loss": ""} for row in history()[:15]] + history()[15:],
    "too short to judge, a clone without held-out episodes": clone(holdout=flat * math.nan),
    "too short to judge, no metric": [{"step": str(i)} for i in range(20)],
}


@pytest.mark.parametrize("kind", HISTORIES)
def test_verdicts(kind):
    assert diagnose.judge(HISTORIES[kind], CONFIG).name == kind.partition(",")[0]


def test_what_a_finetune_run_needs_longer():
    advice = diagnose.judge(HISTORIES["too short to judge, few rows"], CONFIG | {"offline_iterations": 2500}).advice
    assert "--offline_iterations" in advice and "--max_timesteps" not in advice


@pytest.mark.parametrize("n", [8, 20, 200])
def test_noise_around_a_flat_curve_is_no_over_fitting(n):
    names = []
    for seed in range(200):
        q, td, holdout_td, gap, holdout_gap = np.random.default_rng(seed).standard_normal((5, n))
        losses = np.exp(0.2 * td), np.exp(0.2 * holdout_td), 3 + 0.1 * gap
        step = 500 * np.arange(1, n + 1)
        rows = history(8 + q, *losses, step, holdout_gap=3 + 0.1 * holdout_gap, eval_return=step)
        names.append(diagnose.judge(rows, CONFIG).name)
    assert set(names) <= {"healthy", "under-fitting", "over-fitting"} and names.count("over-fitting") <= 4


def test_which_checkpoint():
    """The last policy, or the one before the signs; of two signs, the later."""
    last = 500 * N
    assert diagnose.judge(HISTORIES["healthy"], CONFIG).step == last
    assert diagnose.judge(HISTORIES["under-fitting"], CONFIG).step == last
    peak = 500 * (1 + np.argmax(8 * np.minimum(2 * T, 1.5 - T)))
    assert abs(diagnose.judge(HISTORIES["over-fitting, data Q"], CONFIG).step - peak) <= 500
    over = history(td=1 - 0.5 * T, holdout_td=rises)  # the held-out error is 1 up to row 5, and data Q is 2 there
    assert diagnose.judge(over, CONFIG).step == 500 * 6
    assert diagnose.judge(history(T, 1 - 0.5 * T, rises), CONFIG).step == 500 * 6  # though values are low
    both = history(td=1 - 0.5 * T, holdout_td=rises, holdout_gap=3 + 0.3 * late)  # the gap is lowest up to row 15
    assert diagnose.judge(both, CONFIG).step in (500 * 14, 500 * 15)
    assert diagnose.judge(HISTORIES["over-fitting, and data Q falls too"], CONFIG).step < peak
    assert diagnose.judge(HISTORIES["over-fitting, as in a textbook"], CONFIG).step <= 500 * 5
    early = history(holdout_td=1 + 3 * T, holdout_gap=3 + T)
    assert "--eval_freq" in diagnose.judge(early[1:], CONFIG).advice and diagnose.judge(early[1:], CONFIG).step == 1500
    assert "--eval_freq" not in diagnose.judge(over, CONFIG).advice
    assert diagnose.judge(HISTORIES["over-fitting, a clone"], CONFIG).step in (500 * 10, 500 * 11)
    assert diagnose.judge(HISTORIES["diverging"], CONFIG).step <= last / 2
    shuffled = random.Random(0).sample(over, N)
    assert diagnose.judge(shuffled, CONFIG) == diagnose.judge(over, CONFIG)


@pytest.mark.parametrize("kind", HISTORIES)
def test_returns_change_nothing(kind):
    rows = HISTORIES[kind]
    expected = diagnose.judge(rows, CONFIG)
    without = [{name: x for name, x in row.items() if not name.startswith("eval_")} for row in rows]
    better = [row | {"eval_return": str(i), "d4rl_normalized_score": str(-i)} for i, row in enumerate(rows)]
    assert diagnose.judge(without, CONFIG) == diagnose.judge(better, CONFIG) == expected
    assert not any(x.startswith(("eval", "d4rl")) for names in diagnose.CURVES.values() for x in names.split())


def test_values_and_texts_are_alike():
    for rows in HISTORIES.values():
        values = [{name: float(x) if x else None for name, x in row.items()} for row in rows]
        assert diagnose.judge(values, CONFIG) == diagnose.judge(rows, CONFIG)


def test_columns_of_both_critics_count_and_online_rows_do_not():
    rows = [
        {
            "qf1_loss": float(x["qf_loss"]) * 2,
            "qf2_loss": 0,
            "average_qf1": 0,
            "average_qf2": 2 * float(x["average_qf"]),
        }
        | {name: x[name] for name in ("step", "holdout_td_error", "data_discounted_return")}
        for x in HISTORIES["over-fitting, held-out TD error"]
    ]
    verdict = diagnose.judge(HISTORIES["over-fitting, held-out TD error"], CONFIG)
    assert diagnose.judge(rows, CONFIG) == verdict
    online = [row | {"step": 10**6 + i, "env_steps_per_second": 5, "qf1_loss": 1e9} for i, row in enumerate(rows)]
    assert diagnose.judge(rows + online, CONFIG) == verdict
    with pytest.raises(ValueError, match="no row of offline training"):
        diagnose.judge(online, CONFIG)


@pytest.mark.parametrize("script", ["discrete", "offline", "combo"])
def test_remedies_are_options_of_the_script(script):
    """A configuration lists the options of its script; of those, the ones that are off are named."""
    options = {"weight_decay": 0.0, "dropout": 0.0, "critic_layer_norm": False} if script != "combo" else {}
    config = CONFIG | options | ({} if script == "discrete" else {"policy_lr": 1e-4})

    def named(rows, **more):
        verdict = diagnose.judge(rows, config | more)
        assert verdict.name == "over-fitting" and "--hidden_dim 32" in verdict.advice
        return [x for x in ("weight_decay", "dropout", "critic_layer_norm") if f"--{x} " in verdict.advice]

    rows, cloned = HISTORIES["over-fitting, as in a textbook"], HISTORIES["over-fitting, a clone"]
    assert named(rows) == list(options)
    assert named(rows, dropout=0.1, critic_layer_norm=True) == [x for x in options if x == "weight_decay"]
    assert named(rows, cql_backprop_actions=2) == [x for x in options if x != "dropout"]
    assert named(cloned, bc_only=True) == [x for x in options if script == "discrete"]


def test_a_single_episode_cannot_be_held_out():
    rows = HISTORIES["healthy, no held-out episodes"]
    assert "--holdout_fraction 0.1" in diagnose.judge(rows, CONFIG).advice
    advice = diagnose.judge(rows, CONFIG | {"holdout_fraction": 0.1}).advice
    assert "several episodes" in advice and "--holdout_fraction" not in advice


# Which cql_alpha


def test_no_advice_is_a_cql_alpha_below_0():
    rows = history(T, gap=np.ones(N) * math.nan)
    assert "cql_alpha" in diagnose.judge(rows, {}).advice
    assert "cql_alpha" not in diagnose.judge(rows, {"cql_alpha": 0.0, "hidden_dim": 256}).advice
    healthy = history(gap=np.ones(N) * math.nan)
    assert "data_discounted_return" in diagnose.judge(healthy, {"cql_alpha": 0.0, "target": "sarsa"}).advice
    assert diagnose.judge(healthy, {"cql_alpha": 0.0, "target": "double"}).advice.startswith("--cql_alpha above 0")


def sweep(alphas, td, gap, **config):
    return [(history(td=x * flat, gap=y * flat), {"cql_alpha": a} | config) for a, x, y in zip(alphas, td, gap)]


@pytest.mark.parametrize("offset", [0, -10])
def test_alpha(offset):
    """A sum of logarithms counts, so the scale of rewards and the offset of the gap do not matter."""
    for scale in (1, 100):
        td, gap = scale * np.array([1, 1.2, 1.5, 4, 9]), offset + np.array([3, 2.4, 1.5, 1.2, 1.0])
        choice = diagnose.choose_alpha(sweep((0.2, 1, 5, 25, 125), td, gap))
        assert (choice.alpha, choice.step) == (5, 500 * N) and [row[0] for row in choice.table] == [0.2, 1, 5, 25, 125]
        assert choice.table[2][1:] == pytest.approx((1, td[2], gap[2], math.exp(0.5)))


def test_alpha_at_an_end_none_and_ties():
    ends = diagnose.choose_alpha(sweep((1, 5), (1, 5), (1, 0.9)))
    assert ends.alpha == 1 and "smaller" in ends.advice
    assert "larger" in diagnose.choose_alpha(sweep((1, 5), (1, 1), (3, 1))).advice
    none = diagnose.choose_alpha(sweep((1, 5), (1, 9), (9, 1)))
    assert none.alpha is None and "larger network" in none.advice
    assert diagnose.choose_alpha(sweep((1, 2, 5), (1, 1, 1), (1, 1, 1))).alpha == 5


def test_alpha_is_compared_at_the_same_updates_over_seeds():
    short = sweep((1, 5), (2, 1), (1, 1))
    longer = [(rows + history(td=9 * flat, step=10**5 * np.arange(1, N + 1)), config) for rows, config in short]
    mixed = [short[0], longer[1], *sweep((1,), (8,), (1,))]
    choice = diagnose.choose_alpha(mixed)
    assert choice.step == 500 * N
    assert [row[:3] for row in choice.table] == [(1, 2, pytest.approx(4)), (5, 1, pytest.approx(1))]  # a geometric mean
    with pytest.raises(ValueError, match="two cql_alpha"):
        diagnose.choose_alpha([short[0], (history(step=7 + 10**6 * np.arange(1, N + 1)), {"cql_alpha": 5})])


def test_alpha_without_a_configuration_comes_from_the_metrics():
    assert diagnose.alpha_of(history(), {}) == 5
    assert diagnose.alpha_of(HISTORIES["healthy, no penalty"], {}) == 0
    assert math.isnan(diagnose.alpha_of(clone(), {})) and math.isnan(
        diagnose.alpha_of(history(), {"cql_lagrange": True})
    )


# The program


def diagnosed(capsys, *arguments):
    capsys.readouterr()
    diagnose.main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    assert not err
    return out


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        diagnose.main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    assert not out and "error: " in err and err.count("\n") == 1
    return stop.value.code, err


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


LONG = {
    "max_timesteps": 40,
    "eval_freq": 4,
    "eval_env": "none",
    "holdout_fraction": 0.2,
    "soft_target_update_rate": 0.2,
    "target_update_period": 1,
}


def test_real_runs_of_each_script(run, capsys, tmp_path):
    folder = run(**LONG, keep_policies=True)
    out = diagnosed(capsys, folder, "--output", tmp_path / "new/curves.png")
    name = out.splitlines()[0].removeprefix(f"{folder}: ")
    assert name in ("healthy", "under-fitting", "over-fitting")
    policy = Path(out.split("policy:")[1].split()[0])
    assert policy.parent == folder and policy.exists()
    height, width, _ = matplotlib.image.imread(tmp_path / "new/curves.png").shape
    assert (height, width) == (750, 440)
    # A table alone does not tell the rate of the target network, nor where policies are.
    moved = tmp_path / "other.csv"
    moved.write_bytes((folder / "metrics.csv").read_bytes())
    out = diagnosed(capsys, moved)
    assert f"{moved}: too short to judge\n" in out and "1,000 updates" in out and "that of step 40\n" in out


@kinds
def test_a_run_without_held_out_episodes_or_policies_and_a_clone(run, capsys, script):
    folder = run(**LONG | {"holdout_fraction": 0}, run_id="all")
    out = diagnosed(capsys, folder)
    assert ": under-fitting" in out and "held out" not in out and f"{folder}/policy.pt" in out
    if "bc_only" not in option_names(script.__name__):
        return
    out = diagnosed(capsys, run(**LONG, run_id="clone", bc_only=True))
    assert "likelihood of the data's actions" in out
    assert "policy.pt" in out or "--keep_policies True" in out


@finetune
def test_of_a_finetuned_run_the_offline_phase_is_judged(run, capsys):
    options = LONG | {"eval_env": None, "online_iterations": 8, "warmup_steps": 4, "n_episodes": 1}
    out = diagnosed(capsys, run(**options))
    assert "only the offline phase" in out and ("that of step" in out or "policy-" in out) and "policy.pt" not in out


def test_several_alphas(tmp_path, capsys):
    paths = []
    for alpha, td, gap in ((1, 1, 9), (5, 1.2, 2), (25, 9, 1)):
        rows = history(td=td * flat, gap=gap * flat, cql_min_qf_loss=alpha * gap * flat)
        paths.append(write(tmp_path / f"toy-alpha{alpha}-seed0.csv", rows))
        folder = write(tmp_path / f"runs/{alpha}/metrics.csv", history(td=td * flat, gap=gap * flat)).parent
        (folder / "config.yaml").write_text(f"cql_alpha: {alpha}.0\nenv: toy\nseed: {alpha}\n")
    for words in (paths, [tmp_path / f"runs/{x}" for x in (1, 5, 25)]):
        out = diagnosed(capsys, *words)
        assert "cql_alpha of 3 runs" in out and "take: 5 (both are small there)" in out
    (tmp_path / "runs/1/config.yaml").write_text("cql_alpha: 1.0\nenv: other\n")  # of other data
    assert "cql_alpha of 2 runs" in diagnosed(capsys, *(tmp_path / f"runs/{x}" for x in (1, 5, 25)))
    assert "cql_alpha of" not in diagnosed(capsys, tmp_path / "runs/5", tmp_path / "runs/5")


def test_as_a_program(tmp_path):
    program, path = Path(diagnose.__file__), write(tmp_path / "a.csv", history()[:1])
    result = subprocess.run([sys.executable, program, path], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and "too short to judge" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "RUN"),
        (("good.csv", "--no_such"), 2, "--no_such"),
        (("good.csv", "--output", "curves.pdf"), 2, ".png"),
        (("missing",), 1, "missing: there is no such"),
        (("empty_folder",), 1, "empty_folder: it has no metrics.csv"),
        (("empty.csv",), 1, "not a metrics.csv: it has no row"),
        (("other.csv",), 1, "no column step"),
        (("binary.csv",), 1, "binary.csv"),
        (("online.csv",), 1, "no row of offline training"),
        (("broken",), 1, "config.yaml"),
        (("good.csv", "other.csv"), 1, "other.csv"),
        (("good.csv", "--output", "good.csv/curves.png"), 1, "cannot be written"),
    ],
)
def test_refusals(arguments, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("good.csv"), history())
    write(Path("other.csv"), [{"a": 1}])
    write(Path("online.csv"), [{"step": 1, "env_steps_per_second": 3}])
    write(Path("broken/metrics.csv"), history())
    Path("broken/config.yaml").write_text("a: [")
    Path("empty_folder").mkdir()
    Path("empty.csv").write_text("")
    Path("binary.csv").write_bytes(bytes(range(256)))
    before = contents(".")
    if "cannot" in words:
        monkeypatch.setattr(diagnose, "report", lambda *_: None)  # which comes first
    code, line = refusal(capsys, *arguments)
    assert code == status and words in line
    assert contents(".") == before


def test_a_failed_picture_leaves_the_older_one(tmp_path, monkeypatch, capsys):
    path, output = write(tmp_path / "good.csv", history()), tmp_path / "curves.png"
    output.write_text("older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diagnose.os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        diagnose.main([str(path), "--output", str(output)])
    assert stop.value.code == 1 and "curves.png cannot be written: No space left" in capsys.readouterr().err
    assert output.read_text() == "older" and sorted(x.name for x in tmp_path.iterdir()) == ["curves.png", "good.csv"]


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "good.csv", history())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        diagnose.main([str(path), "--output", str(tmp_path / "curves.png")])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and "matplotlib is missing: pip install" in err and ": healthy" in out


def test_another_program_imports_it_beside_a_module_of_its_own_named_common(tmp_path):
    (tmp_path / "common.py").write_text("")
    (tmp_path / "mine.py").write_text(
        f"import sys, common; sys.path.append({str(Path(__file__).parents[1])!r})\n"
        f"from benchmarks.diagnose import judge; print(judge({history()!r}, {CONFIG!r}).name)"
    )
    output = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert output.stdout == "healthy\n", output.stderr
