"""benchmarks/fqe.py: exact values of small tabular problems, rankings, runs of every script, and bad input."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, contents, kinds, once, record

from algorithms.discrete import cql_dqn
from algorithms.offline import cql
from benchmarks import fqe

DISCOUNT = 0.8


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Networks and targets that learn tiny problems in seconds."""
    for name, value in {"HIDDEN_SIZES": (32, 1), "BATCH_SIZE": 64, "LEARNING_RATE": 3e-3, "TARGET_RATE": 0.1}.items():
        monkeypatch.setattr(fqe, name, value)
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


@pytest.mark.parametrize(("terminal", "continuous"), [(True, False), (False, True)])
def test_exact_values(terminal, continuous):
    table = Table(terminal, continuous)
    data, policies = table.data(), [(1, 1, 1), (0, 0, 0), (1, 1, 0)]
    values, bounded, returns = fqe.fit(data, *table.chosen(policies), DISCOUNT, 1000, 2)
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
    both, _, returns = fqe.fit(data, following, first, DISCOUNT, 50, 2)
    one, _, _ = fqe.fit(data, following[1:], first[1:], DISCOUNT, 50, 2)
    np.testing.assert_allclose(both[1:], one, rtol=1e-4, atol=1e-4)
    twin, _, _ = fqe.fit(data, following[[1, 1]], first[[1, 1]], DISCOUNT, 50, 2)
    np.testing.assert_allclose(twin[0], twin[1], rtol=1e-4, atol=1e-4)  # no policy is luckier than another
    assert np.abs(both[0] - both[1]).min() > 0.1 and np.abs(both[:, 0] - both[:, 1]).max() > 1e-3
    assert not np.allclose(both, fqe.fit(data, following, first, DISCOUNT, 50, 2, seed=1)[0], atol=1e-3)


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
    values, bounded, _ = fqe.fit(data, *actions, 0.99, 400, 1)
    low, high = fqe.value_bounds(data, 0.99)
    assert bounded[0] > 0.05 and np.abs(values[0]).max() < 2 * max(-low, high)
    rows = [{"rank": 1, "policy": "far.pt", "estimate": 1.0, "low": 0.0, "high": 2.0}]
    rows[0] |= {"seed_std": 0.1, "bounded": bounded[0], "off_data": 1.0}
    rows += [rows[0] | {"policy": fqe.BEHAVIOUR, "bounded": 0.0}, rows[0] | {"policy": fqe.RETURNS, "spread": 0.1}]
    assert f"WARNING: {bounded[0]:.0%} of" in fqe.report(rows)


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
    assert capsys.readouterr().out.splitlines()[2].split()[5] == "nan"  # one fit has no spread


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
    status, line = refusal(capsys, "good.pt", env=new_dataset([dataclasses.replace(whole, **last)], env="Counter-v0"))
    assert status == 1 and "no two steps" in line
