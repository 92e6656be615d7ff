"""benchmarks/fqe.py: exact values of small tabular problems, rankings, runs of every script, and bad input."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, contents, kinds, once, record, vectors

from algorithms.discrete import cql_dqn
from algorithms.offline import cql
from benchmarks import fqe, importance

DISCOUNT = 0.8


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Networks and targets that learn tiny problems in seconds."""
    for name, value in {"HIDDEN_SIZES": [32], "BATCH_SIZE": 64, "LEARNING_RATE": 3e-3, "TARGET_RATE": 0.1}.items():
        monkeypatch.setattr(fqe, name, value)
    monkeypatch.setattr(fqe, "MIN_ROWS", 5)
    monkeypatch.chdir(tmp_path)


class Table:
    """Deterministic: action 1 goes round a ring of three states, action 0 stays; with `terminal`, going on from state 2
    ends the episode. Episodes are cut after four steps."""

    rewards = np.array([[0.0, 1.0], [0.5, -1.0], [2.0, 3.0]])  # [state, action]

    def __init__(self, terminal, continuous):
        self.terminal, self.codes = terminal, np.array([[-1.0], [1.0]]) if continuous else np.eye(2, dtype=bool)

    def data(self, n_episodes=150):
        """Random actions, from random states; the first one of an episode mostly goes on."""
        rng, rows = np.random.default_rng(0), []
        for _ in range(n_episodes):
            state = rng.integers(3)
            for t in range(4):
                action = int(rng.random() < (0.5 if t else 0.8))
                following, end = (state + action) % 3, self.terminal and state == 2 and action == 1
                rows.append((state, action, self.rewards[state, action], following, end, t == 3 and not end))
                state = following
                if end:
                    break
        self.states, self.actions, rewards, self.following, ends, timeouts = map(np.array, zip(*rows))
        data = {"observations": np.eye(3)[self.states], "next_observations": np.eye(3)[self.following]}
        data |= {"actions": self.codes[self.actions], "rewards": rewards, "terminals": ends, "timeouts": timeouts}
        self.first = np.flatnonzero(np.append(True, (ends | timeouts)[:-1]))
        return data

    def exact(self, policy):
        """Q [state, action] of a policy [state] -> action, by the linear system."""
        system, rewards = np.eye(6), self.rewards.ravel()
        for state in range(3):
            for action in range(2):
                following = (state + action) % 3
                if not (self.terminal and state == 2 and action == 1):
                    system[2 * state + action, 2 * following + policy[following]] -= DISCOUNT
        return np.linalg.solve(system, rewards).reshape(3, 2)

    def exact_behaviour(self, data):
        """Q [state, action] of the data's own next actions, over the transitions where these are known."""
        system, rewards, counts = np.zeros((6, 6)), np.zeros(6), np.zeros(6)
        pairs = 2 * self.states + self.actions
        for t in np.flatnonzero(~data["timeouts"]):
            counts[pairs[t]] += 1
            rewards[pairs[t]] += data["rewards"][t]
            if not data["terminals"][t]:
                system[pairs[t], pairs[t + 1]] -= DISCOUNT
        return np.linalg.solve(system + np.diag(counts), rewards).reshape(3, 2)

    def chosen(self, policies):
        """Codes of the policies' actions in all next states and at all starts."""
        policies = np.array(policies)
        return self.codes[policies[:, self.following]], self.codes[policies[:, self.states[self.first]]]


def fit(data, following, first, *options, **more):
    """Values at the starts [P + 1, S, N], the share of bounded targets, and the behaviour's returns."""
    q, bounded = fqe.fit(data, following, *options, **more)
    starts = fqe.episode_rows(data)[0]
    chosen = np.concatenate([first, data["actions"][None, starts]])
    returns = fqe.behaviour_returns(q, data, options[0])
    return q.values(data["observations"][starts], chosen), bounded, returns


@pytest.mark.parametrize(("terminal", "continuous"), [(True, False), (False, True)])
def test_exact_values(terminal, continuous):
    table = Table(terminal, continuous)
    data, policies = table.data(), [(1, 1, 1), (0, 0, 0), (1, 1, 0)]
    values, bounded, returns = fit(data, *table.chosen(policies), DISCOUNT, 1000, 2)
    starts = table.states[table.first]
    assert values.shape == (4, 2, len(starts)) and bounded.shape == (4,) and returns.shape == starts.shape
    for policy, found in zip(policies, values):
        expected = table.exact(policy)[starts, np.array(policy)[starts]]
        np.testing.assert_allclose(found, np.stack([expected] * 2), atol=0.05)
    expected = table.exact_behaviour(data)
    np.testing.assert_allclose(values[3].mean(axis=0), expected[starts, table.actions[table.first]], atol=0.15)
    assert abs(returns.mean() - values[3].mean()) < 0.1 * returns.std() and bounded.max() < 0.1
    # A time-out does not end what the behaviour earns.
    for i in range(len(starts)):
        stop = table.first[i + 1] if i + 1 < len(starts) else len(table.states)
        steps = np.arange(table.first[i], stop)
        amounts = data["rewards"][steps].copy()
        if data["timeouts"][steps[-1]]:
            amounts[-1] = expected[table.states[steps[-1]], table.actions[steps[-1]]]
        np.testing.assert_allclose(returns[i], DISCOUNT ** np.arange(len(steps)) @ amounts, atol=0.1)


def test_policies_do_not_touch_each_other():
    table = Table(terminal=True, continuous=True)
    data, (following, first) = table.data(30), table.chosen([(1, 1, 1), (0, 0, 0)])
    both, _, returns = fit(data, following, first, DISCOUNT, 50, 2)
    one, _, _ = fit(data, following[1:], first[1:], DISCOUNT, 50, 2)
    np.testing.assert_allclose(both[1:], one, rtol=1e-4, atol=1e-4)
    twin, _, _ = fit(data, following[[1, 1]], first[[1, 1]], DISCOUNT, 50, 2)
    np.testing.assert_allclose(twin[0], twin[1], rtol=1e-4, atol=1e-4)  # no policy is luckier than another
    assert np.abs(both[0] - both[1]).min() > 0.1 and np.abs(both[:, 0] - both[:, 1]).max() > 1e-3
    assert not np.allclose(both, fit(data, following, first, DISCOUNT, 50, 2, seed=1)[0], atol=1e-3)


def test_bounds():
    data = {"rewards": np.array([1.0, -2.0, 50.0, -3.0]), "terminals": np.array([False, False, True, True])}
    np.testing.assert_allclose(fqe.value_bounds(data, 0.9), (-20, 50))
    data = {"rewards": np.array([-1.0, -1.0]), "terminals": np.array([False, True])}
    np.testing.assert_allclose(fqe.value_bounds(data, 0.9), (-10, -1))


def test_what_diverges_is_bounded_and_said():
    """The data always brake, and the policy always accelerates: the data do not say what follows."""
    rng, n = np.random.default_rng(0), 400
    data = {"observations": rng.normal(size=(n, 1)), "actions": rng.uniform(-1, -0.9, (n, 1)).astype(np.float32)}
    data |= {"next_observations": 3 * data["observations"], "rewards": data["observations"][:, 0]}
    data |= {"terminals": np.zeros(n, bool), "timeouts": np.arange(n) % 4 == 3}
    actions = np.ones((1, n, 1), np.float32), np.ones((1, n // 4, 1), np.float32)
    values, bounded, _ = fit(data, *actions, 0.99, 400, 1)
    low, high = fqe.value_bounds(data, 0.99)
    assert bounded[0] > 0.05 and low <= values[0].min() and values[0].max() <= high
    far = row("far.pt", 1.0, bounded=bounded[0])
    rows, lines = judge([far, row("near.pt", 0.5)])
    assert any(f"1 of 2 policies diverge: up to {bounded[0]:.0%} of" in line for line in lines), lines
    assert [x["policy"] for x in rows[:2]] == ["near.pt", "far.pt"] and [x["rank"] for x in rows[:2]] == [1, ""]


def row(policy, estimate, **more):
    """A row of the table."""
    numbers = {"rank": "", "estimate": estimate, "low": 0.0, "high": 1.0, "seed_std": 0.01, "bounded": 0.0}
    return numbers | {"policy": policy, "off_data": 0.0, "fitted_episodes": 50, "reported_episodes": 50} | more


def judge(policies, behaviour=1.0, returns=1.0, spread=1.0, one_step=False, needed=None):
    both = np.repeat([returns - spread, returns + spread], 50)
    rows = [*policies, row(fqe.BEHAVIOUR, behaviour), row(fqe.RETURNS, returns)]
    return fqe.judge(rows, both, one_step, needed)


def test_only_what_can_be_trusted_has_a_rank():
    supported, guessed = row("a.pt", 1.0, support=3.0), row("b.pt", 9.0, support=2.9)
    rows, lines = judge([supported, guessed], needed=3.0)
    assert [(x["policy"], x["rank"]) for x in rows[:2]] == [("a.pt", 1), ("b.pt", "")]
    assert (
        lines[-1] == "best: a.pt of the 1 ranked"
        and "1 of 2 policies take actions that the data hold too rarely" in lines[-2]
    )
    # A tenth of the spread and, for chance, two standard errors of the difference between both parts: 2 x 1 / 5.
    for error, trusted in ((0.49, True), (0.51, False)):
        rows, lines = judge([row("a.pt", 1.0)], behaviour=1.0 + error)
        assert rows[0]["rank"] == (1 if trusted else "") and ("check failed" in lines[-1]) != trusted
    # In a log of single steps the spread says nothing of how well the mean is known.
    rows, lines = judge([row("a.pt", 0.01)], behaviour=0.51, returns=0.01, one_step=True)
    assert lines[-1] == "best: none, since the check failed"
    assert judge([row("a.pt", 0.01)], behaviour=0.41, returns=0.01, one_step=True)[1][-1] == "best: a.pt"
    assert judge([row("a.pt", 1.0), row("b.pt", 1.0)])[1][-1] == "best: none, since all estimates are equal"
    assert "1 more within two" in judge([row("a.pt", 1.0), row("b.pt", 0.99), row("c.pt", 0.9)])[1][-1]


def store_policy(script, path, action):
    """A policy that always does the same. Actions of Counter have two parts; `action` sets the first."""
    if script is cql_dqn:
        actor = cql_dqn.QNetwork(3, [4, 3], 8, 1, "dqn", 1)
        actor.action_low.copy_(torch.tensor([-2.0, 0.0]))
        actor.last.bias.data[3 * (action + 2) + 1] = 1e6
    else:
        actor = cql.TanhGaussianActor(3, 2, 8, 1)
        actor.action_low.copy_(torch.tensor([-2.0, 0.0]))
        actor.action_high.copy_(torch.tensor([1.0, 0.5]))
        actor.head.bias.data[0] = 4.0 * action
    script.save(Path(path), {"sizes": list(actor.sizes), "weights": actor.state_dict()})


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def evaluate(*arguments, env=DATASET, updates=300, seeds=2, device="cpu"):
    fqe.main([*map(str, arguments), f"--env={env}", f"--updates={updates}", f"--seeds={seeds}", f"--device={device}"])


@kinds
def test_ranks_policies_by_what_they_return(script, new_dataset, capsys):
    """In Paid-v0 a step pays the sum of all actions so far."""
    env = new_dataset(record("Paid-v0", range(60)), env="Paid-v0")
    for action, name in enumerate(("low", "middle", "high")):
        store_policy(script, f"{name}.pt", action - 1)
    evaluate("middle.pt", "high.pt", "low.pt", "--discount", 0.8, "--output", "fqe.csv", env=env, updates=600)
    rows, printed = rows_of("fqe.csv"), capsys.readouterr().out
    assert [row["policy"] for row in rows] == ["high.pt", "middle.pt", "low.pt", fqe.BEHAVIOUR, fqe.RETURNS]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "", ""]
    for row in rows:
        low, value, high = (float(row[name]) for name in ("low", "estimate", "high"))
        assert low < value < high
    assert float(rows[0]["off_data"]) > 0.2 and float(rows[3]["off_data"]) == 0
    assert "check: FQE of the behaviour is off by" in printed and "WARNING" not in printed, printed
    assert printed.splitlines()[-1].startswith("best: high.pt") and all(row["policy"] in printed for row in rows)


@vectors
def test_runs_of_every_script(run, capsys):
    folder = run(keep_policies=True, eval_env="none", discount=0.7)
    (folder / "policy-9.pt").write_bytes((folder / "policy-10.pt").read_bytes())
    before = contents(folder)
    evaluate(folder, folder / "checkpoint.pt", folder / "policy.pt", "--output", "new/fqe.csv", updates=20)
    assert contents(folder) == before and "discount 0.7;" in capsys.readouterr().out
    estimates = {row["policy"]: row for row in rows_of("new/fqe.csv")}
    names = [folder / f"policy-{step}.pt" for step in (9, 10, 20, 25)] + [
        folder / "checkpoint.pt",
        folder / "policy.pt",
    ]
    assert list(estimates)[-2:] == [fqe.BEHAVIOUR, fqe.RETURNS] and set(estimates) - set(list(estimates)[-2:]) == set(
        map(str, names)
    )
    for same in (names[:2], names[3:]):
        assert np.ptp([float(estimates[str(name)]["estimate"]) for name in same]) < 1e-3
    first = Path("new/fqe.csv").read_bytes()
    evaluate(folder, folder / "checkpoint.pt", folder / "policy.pt", "--output", "new/fqe.csv", updates=20)
    assert Path("new/fqe.csv").read_bytes() == first
    assert [path.name for path in Path("new").iterdir()] == ["fqe.csv"]
    capsys.readouterr()
    evaluate(folder / "policy.pt", updates=2, seeds=1)
    assert "nan" in capsys.readouterr().out.splitlines()[3].split()  # one fit has no spread


def refusal(capsys, *arguments, **options):
    """The exit status and the one line on stderr of a call that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments, **options)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "error: " in err, err
    return stop.value.code, err


@once
@pytest.mark.parametrize(
    ("arguments", "options", "code", "words"),
    [
        (["good.pt"], {"updates": 0}, 2, ["--updates", "at least 1"]),
        (["good.pt"], {"seeds": 0}, 2, ["--seeds", "at least 1"]),
        (["good.pt", "--discount", 1], {}, 2, ["--discount", "below 1"]),
        (["good.pt", "--discount", "nan"], {}, 2, ["--discount", "below 1"]),
        (["good.pt", "--fit_share", 0], {}, 2, ["--fit_share", "above 0 and at most 1"]),
        (["good.pt", "--clip", 0], {}, 2, ["--clip", "above 0"]),
        (["good.pt", "--clip", "nan"], {}, 2, ["--clip", "above 0"]),
        (["good.pt", "--resamples", 0], {}, 2, ["--resamples", "at least 1"]),
        (["good.pt", "--output", "good.pt"], {}, 2, ["--output good.pt", ".csv"]),
        (["good.pt", "--output", "folder.csv"], {}, 2, ["--output folder.csv", ".csv"]),
        (["good.pt", "--output", "text.pt/new.csv"], {}, 2, ["--output text.pt/new.csv", "written"]),
        (["good.pt"], {"device": "cuda:99"}, 2, ["--device cuda:99", "--device cpu"]),
        (["good.pt"], {"env": "toy/missing-v0"}, 1, ["--env toy/missing-v0", "cannot be read"]),
        (["missing.pt"], {}, 1, ["missing.pt", "does not exist"]),
        (["text.pt"], {}, 1, ["text.pt", "policy.pt"]),
        (["folder.csv"], {}, 1, ["folder.csv", "policy-<step>.pt", "--keep_policies"]),
        (["good.pt", "wide.pt"], {}, 1, ["wide.pt", "4 finite numbers", "3)"]),
        (["good.pt", "discrete.pt"], {}, 1, ["discrete.pt", "discrete", "continuous"]),
        (["discrete.pt"], {}, 1, ["discrete.pt is a policy of cql_dqn.py", f"--env {DATASET}", "Box"]),
        (["nan.pt"], {}, 1, ["nan.pt", "NaN"]),
        (["bold.pt"], {}, 1, ["bold.pt", "outside"]),
        (["a/policy.pt", "b/policy.pt"], {}, 2, ["a/config.yaml", "b/config.yaml", "--discount"]),
        (["c/policy.pt"], {}, 1, ["c/config.yaml", "--discount"]),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(arguments, options, code, words, script, capsys, tmp_path):
    Path("text.pt").write_text("no policy")
    Path("folder.csv").mkdir()
    store_policy(cql, "good.pt", 0)
    store_policy(cql_dqn, "discrete.pt", 0)
    for name, sizes, high in (("wide", (4, 2), 1.0), ("nan", (3, 2), np.nan), ("bold", (3, 2), 2.0)):
        actor = cql.TanhGaussianActor(*sizes, 8, 1)
        actor.action_high += high
        actor.head.bias.data += 9
        cql.save(Path(f"{name}.pt"), {"sizes": list(actor.sizes), "weights": actor.state_dict()})
    for name, text in (("a", "discount: 0.9"), ("b", "discount: 0.8"), ("c", "- discount")):
        store_policy(cql, f"{name}/policy.pt", 0)
        Path(name, "config.yaml").write_text(text)
    before = contents(".")
    status, line = refusal(capsys, *arguments, *([] if "--output" in arguments else ["--output", "new.csv"]), **options)
    assert status == code and all(word in line for word in words), line
    assert contents(".") == before


@once
def test_data_that_cannot_be_checked(script, new_dataset, capsys):
    store_policy(cql, "good.pt", 0)
    (whole,) = record("Counter-v0", [101])  # ends by a time-out
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    last = {name: getattr(whole, name)[-2 if name == "observations" else -1 :] for name in names}
    env = new_dataset([dataclasses.replace(whole, **last)], env="Counter-v0")
    status, line = refusal(capsys, "good.pt", env=env)
    assert status == 1 and "one episode is too little" in line and "--fit_share" in line
    status, line = refusal(capsys, "good.pt", "--fit_share", 1, env=env)
    assert status == 1 and "no two steps" in line


def constant_policy(path, action, n_actions=3, size=2):
    """A policy for logs of one column of actions from 0. The actions after its own come next in its order."""
    actor = cql_dqn.QNetwork(size, [n_actions], 8, 1, "dqn", 1)
    actor.last.bias.data[:] = 1e6 - 1e5 * ((torch.arange(n_actions) - action) % n_actions)
    cql_dqn.save(Path(path), {"sizes": list(actor.sizes), "weights": actor.state_dict()})


def log_of(n=400, length=1, terminal=True, rewards=None, n_actions=3, **more):
    """Episodes of equal length with random actions, which pay the action unless there are other rewards."""
    rng = np.random.default_rng(0)
    actions, ends = rng.integers(n_actions, size=(n, 1)), np.arange(n) % length == length - 1
    observations = rng.normal(size=(n, 2)).astype(np.float32)
    data = {"observations": observations, "next_observations": np.roll(observations, -1, axis=0), "actions": actions}
    data |= {"rewards": actions[:, 0].astype(np.float64) if rewards is None else np.full(n, rewards)}
    data |= {"terminals": ends & terminal, "timeouts": ends & (not terminal)}
    return data | {"action_low": np.array([0]), "action_high": np.array([n_actions - 1])} | more


@pytest.fixture
def log(monkeypatch):
    """Takes a log as the dataset of the discrete script."""

    def use(**options):
        data = log_of(**options)
        monkeypatch.setattr(cql_dqn, "load_dataset", lambda name: dict(data))
        return data

    for action in range(3):
        constant_policy(f"always{action}.pt", action)
    return use


@pytest.mark.parametrize(
    ("options", "discount", "value"),
    [
        ({"rewards": 0.0}, 0.9, 0.0),
        ({"rewards": 0.0, "length": 8, "terminal": False}, 0.9, 0.0),
        ({"rewards": 0.1}, 0.9, 0.1),
        ({"rewards": 0.1, "length": 4}, 0.0, 0.1),
        ({"rewards": 0.1, "length": 4, "terminal": False}, 0.0, 0.1),
        ({"rewards": -0.3, "length": 8, "terminal": False}, 0.9, -3.0),
        ({"rewards": -0.3, "length": 400, "terminal": False}, 0.9, -3.0),
    ],
)
def test_exact_answers_are_exact(options, discount, value, log, capsys):
    log(**options)
    evaluate("always0.pt", "always2.pt", "--discount", discount, "--output", "out.csv", env="any", updates=30)
    rows, printed = rows_of("out.csv"), capsys.readouterr().out
    for row in rows:
        assert [float(row[x]) for x in ("estimate", "low", "high")] == pytest.approx([value] * 3, abs=1e-6)
    assert {row["bounded"] for row in rows[:3]} == {"0.0"} and "trust" not in printed and "diverge" not in printed
    assert rows[0]["estimate"] == rows[1]["estimate"] and printed.endswith(
        "best: none, since all estimates are equal\n"
    )


@pytest.mark.parametrize(("terminal", "discount"), [(True, 0.99), (False, 0)])
def test_logs_of_single_steps(terminal, discount, log, capsys):
    """`off data` is the share of the reported rows in which the policy acts otherwise; values are the mean rewards."""
    data, policies = log(terminal=terminal), [f"always{action}.pt" for action in range(3)]
    evaluate(*policies, "--discount", discount, "--output", "out.csv", env="any", updates=600)
    rows = rows_of("out.csv")
    _, reported, _ = fqe.split(dict(data), 0.5, 0)
    assert [row["policy"] for row in rows[:3]] == ["always2.pt", "always1.pt", "always0.pt"]
    for action, row in zip((2, 1, 0), rows):
        assert float(row["off_data"]) == pytest.approx((data["actions"][reported] != action).mean())
        assert float(row["estimate"]) == pytest.approx(action, abs=0.05)
    assert float(rows[4]["estimate"]) == pytest.approx(data["rewards"][reported].mean())
    assert float(rows[3]["estimate"]) == pytest.approx(float(rows[4]["estimate"]), abs=0.05)
    assert {(row["fitted_episodes"], row["reported_episodes"]) for row in rows} == {("200", "200")}
    assert "fitted on 200 of 400 episodes (200 transitions), reported on the others" in capsys.readouterr().out


def test_continuous_logs_of_single_steps(monkeypatch):
    data = log_of() | {"actions": np.full((400, 2), [1.0, 0.5], np.float32)}
    data |= {"action_low": np.array([-2.0, 0.0]), "action_high": np.array([1.0, 0.5])}
    data["observations"] = data["next_observations"] = np.zeros((400, 3), np.float32)
    monkeypatch.setattr(cql, "load_dataset", lambda name: dict(data))
    store_policy(cql, "high.pt", 9)  # the highest action in the first part, the middle in the second
    evaluate("high.pt", "--output", "out.csv", env="any", updates=30)
    assert float(rows_of("out.csv")[0]["off_data"]) == pytest.approx(0.25, abs=1e-3)
    assert "support" not in rows_of("out.csv")[0]


def test_episodes_are_split_whole_and_reproducibly():
    data = log_of(n=300, length=3)
    fitted, reported, words = fqe.split(data, 0.3, seed=1)
    assert fitted.sum() == 90 and (fitted ^ reported).all() and (fitted.reshape(-1, 3).all(axis=1)).sum() == 30
    assert "fitted on 30 of 100 episodes (90 transitions)" in words
    assert (fqe.split(data, 0.3, seed=1)[0] == fitted).all() and (fqe.split(data, 0.3, seed=2)[0] != fitted).any()
    both = fqe.split(data, 1, seed=1)
    assert both[0].all() and both[1].all() and "--fit_share 1" in both[2]


def test_a_plant_that_never_ends_is_cut():
    data = log_of(n=1000, length=1000, terminal=False)
    fitted, reported, words = fqe.split(data, 0.5, seed=0)
    assert fitted[:500].all() and reported[500:].all() and not (fitted & reported).any()
    assert (np.flatnonzero(data["timeouts"]) == np.arange(49, 1000, 50)).all() and not data["terminals"].any()
    assert words.startswith("1 episode cut into 20 pieces of at most 50 steps, so values are those at the starts of p")
    assert "; fitted on the first 10 of 20 pieces" in words
    data = log_of(n=12, length=3)  # too short to gain from it
    fitted, _, words = fqe.split(data, 0.5, seed=0)
    assert fitted.sum() == 6 and data["terminals"].sum() == 4 and "cut into 8 pieces of at most 2" in words
    data = log_of(n=4)
    assert fqe.split(data, 0.9, seed=0)[0].tolist() == [True] * 3 + [False] and not data["timeouts"].any()


def test_support_counts_the_steps_that_data_follow():
    assert fqe.support(0.5, 5 * 8) == pytest.approx(3)  # half of the rows are left after a step, 5 after three
    assert fqe.support(1.0, 5) == np.inf and fqe.support(1.0, 4) == 0
    data, rng = log_of(n=4000), np.random.default_rng(1)
    wide = data["observations"][:, 0] > 0
    data["actions"] = np.where(wide, rng.integers(3, size=4000), rng.random(4000) < 0.2)  # 2 only on one side
    data["actions"] = np.eye(3, dtype=bool)[data["actions"]]
    model = fqe.behaviour_model(data, [3], 1000, 0, "cpu")
    states = log_of(n=500) | {"observations": np.tile([[1.0, 0.0], [-1.0, 0.0]], (250, 1)).astype(np.float32)}
    found = [np.exp(model(states, np.eye(3, dtype=bool)[np.full(500, action)])) for action in range(3)]
    np.testing.assert_allclose(np.transpose(found)[:2], [[1 / 3] * 3, [0.8, 0.2, 0.0]], atol=0.08)
    few = log_of(n=60) | {"actions": np.eye(3, dtype=bool)[rng.integers(3, size=60)]}
    fresh = fqe.behaviour_model(few, [3], 1000, 0, "cpu")(data, data["actions"])  # knows that it knows nothing
    assert -1.5 < fresh.mean() < -1
    masked = model(states | {"masks": np.tile([True, True, False], (500, 1))}, np.eye(3, dtype=bool)[np.ones(500, int)])
    assert np.exp(masked[0]) == pytest.approx(0.5, abs=0.08)


def test_what_the_data_never_do_gets_no_rank(log, capsys):
    data = log()
    data["actions"][:] %= 2
    evaluate("always0.pt", "always2.pt", "--output", "out.csv", env="any", updates=300)
    rows, printed = rows_of("out.csv"), capsys.readouterr().out
    assert [(row["policy"], row["rank"]) for row in rows[:2]] == [("always0.pt", "1"), ("always2.pt", "")]
    assert float(rows[1]["support"]) < 1 < float(rows[0]["support"])
    assert "1 of 2 policies take actions that the data hold too rarely" in printed
    evaluate("always2.pt", env="any", updates=300)
    assert capsys.readouterr().out.endswith("best: none, since no policy has a fit that is bounded and supported\n")


def test_policies_are_asked_with_masks(log, monkeypatch, capsys):
    """Action 2 is allowed in no state, so a policy that prefers it takes the next one, 0."""
    masks = np.tile([True, True, False], (400, 1))
    data = log(masks=masks, next_masks=masks)
    data["actions"][:] %= 2
    evaluate("always0.pt", "always2.pt", "--output", "out.csv", env="any", updates=100)
    rows = rows_of("out.csv")
    assert len({row["off_data"] for row in rows[:2]}) == 1 and rows[0]["estimate"] == rows[1]["estimate"]
    for ignorant, words in (
        (lambda observations, masks=None: np.full(len(observations), 2), "takes action 2 where the mask"),
        (lambda observations: np.full(len(observations), 0), "always0.pt takes no masks"),
    ):
        monkeypatch.setattr(cql_dqn, "load_policy", lambda path, policy=ignorant: policy)
        status, line = refusal(capsys, "always0.pt", env="any", updates=5)
        assert status == 1 and words in line, line


def test_estimates_by_propensities(log, capsys):
    """The reward of each action is known, and so are all values."""
    data = log(n=2000, propensities=np.full(2000, 1 / 3))
    Path("config.yaml").write_text("env: other\ndiscount: 0.5")
    evaluate("always1.pt", "always2.pt", "--clip", 2.5, "--output", "out.csv", env="any", updates=300)
    printed, (row, other, *_) = capsys.readouterr().out, rows_of("out.csv")
    _, reported, _ = fqe.split(dict(data), 0.5, 0)
    agree = data["actions"][reported, 0] == 2
    assert row["policy"] == "always2.pt" and int(row["agreeing"]) == int(row["rewarded"]) == agree.sum()
    assert int(row["clipped"]) == agree.sum() and float(row["effective"]) == pytest.approx(agree.sum())
    assert float(row["mean_weight"]) == pytest.approx(3 * agree.mean())
    assert float(row["ips"]) == pytest.approx(2.5 * 2 * agree.mean()) and float(row["snips"]) == pytest.approx(2)
    assert float(row["dr"]) == pytest.approx(2, abs=0.05) and float(row["dr_low"]) < 2 < float(row["dr_high"]) + 0.05
    assert f"{int(row['agreeing']) + int(other['agreeing']):,} are clipped (--clip)" in printed
    assert f"{agree.sum():,} rows agree" in printed and "WARNING" not in printed, printed
    Path("config.yaml").write_text("env: any\ndiscount: 0.5")
    data["propensities"][:] = 1
    evaluate("always1.pt", "always2.pt", env="any", updates=300)
    printed = capsys.readouterr().out
    assert "2 of 2 means are far from 1" in printed and "2 of 2 policies were trained on these rows" in printed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.where(np.arange(400) == 7, 0, 0.5), ["1 of 400 are not above 0", "first 0 in row 7"]),
        (np.where(np.arange(400) == 7, np.nan, 0.5), ["1 of 400 are not above 0", "first nan in row 7"]),
        (np.full(400, 1.1), ["400 of 400", "at most 1"]),
        (np.full(399, 0.5), ["[399]", "400 rows"]),
        (np.full((400, 1), 0.5), ["[400, 1]", "400 rows"]),
    ],
)
def test_propensities_that_cannot_be(values, words, log, capsys):
    log(propensities=values)
    status, line = refusal(capsys, "always0.pt", "--output", "out.csv", env="any")
    assert status == 1 and all(word in line for word in words), line
    assert not Path("out.csv").exists()
    with pytest.raises(importance.DataError):
        importance.estimate(np.zeros(400), values, np.ones(400, bool))
