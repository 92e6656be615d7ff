"""The real W&B client against a stand-in for its server (fake_wandb.py): what arrives there, and that no fault of
account, network or server changes a run's folder, stops the run, or costs it more than WANDB_SECONDS at each end."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import yaml
from conftest import ROOT, TINY, equal, once, table, weights
from fake_wandb import Server

pytestmark = once

SECONDS, SPARE = 2, 6  # the limit in these tests, and what a busy machine may need beside it
FAULTS = ("refused", "silent", "error", "garbage")
PROGRAM = f"""
import importlib, json, os, signal, sys
import torch._dynamo
script, runs = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
script.WANDB_SECONDS = {SECONDS}
for address, options in runs.items():
    if not os.fork():  # imports are slow
        os.environ["WANDB_BASE_URL"] = address
        for number, name in enumerate(("in", "out", "err")):
            os.dup2(os.open(f"{{options['run_id']}}.{{name}}", os.O_CREAT | os.O_RDWR), number)
        script.train(script.TrainConfig(**options))
        signal.alarm({SPARE})  # what is left to do at exit is little, or else
        sys.exit()
assert not any([os.wait()[1] for _ in runs])
"""
AGENT = "import wandb, wandb.wandb_agent as agents; agents.Agent.POLL_INTERVAL = 1; wandb.agent('e/p/sweep')"


@pytest.fixture
def expected(run):
    """The folder of the run without W&B."""
    return run(run_id="expected")


@pytest.fixture
def alarm():
    """A test that hangs fails after 100 s."""

    def hangs(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 100, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def server(alarm, expected, tmp_path, monkeypatch):
    """Starts a stand-in, which W&B uses from then on; in the end nothing of W&B is left in this process."""
    servers = []

    def start(**options):
        servers.append(Server(**options))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].address)
        return servers[-1]

    wandb.teardown()  # else it stays disabled
    monkeypatch.chdir(tmp_path)  # it writes to ./wandb
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": tmp_path, "WANDB_API_KEY": 40 * "0", "PYTHONPATH": ROOT}.items():
        monkeypatch.setenv(name, str(value))
    yield start
    for each in servers:
        each.close()
    os.environ.pop("WANDB_SERVICE", None)
    wandb.teardown()  # waits for its service process


@pytest.fixture
def limited(script, monkeypatch):
    monkeypatch.setattr(script, "WANDB_SECONDS", SECONDS)


def check_same(folder, expected):
    assert table(folder) == table(expected) and equal(weights(folder), weights(expected))


def arguments(script, **options):
    """Of a tiny run that needs no toy environment, since a process of its own knows none."""
    known = {name: value for name, value in TINY.items() if hasattr(script.TrainConfig, name)}
    return known | {"eval_env": "none", "checkpoints_path": "runs"} | options


def history(told, run="run"):
    """Step and metrics of each row that arrived, without what W&B adds and the metric that two equal runs differ in."""
    extra = {"_step", "_timestamp", "_runtime", "updates_per_second"}
    return [(row["_step"], {key: x for key, x in row.items() if key not in extra}) for row in told.history[run]]


def test_arrives_as_it_stands_in_the_folder(server, run, expected, tiny, capfd):
    told, options = server(), {"log_interval": 10, "project": "p", "group": "g"}
    folder = run(**options)
    check_same(folder, expected)
    rows = [{key: float(x) for key, x in row.items() if x and key != "step"} for row in table(folder)]
    assert [step for step, _ in history(told)] == [10, 20, 25]
    assert history(told)[:2] == [(10, rows[0]), (20, rows[1])]
    about = told.runs["run"]
    assert [about[key] for key in ("project", "groupName", "displayName")] == ["p", "g", "run"]
    config = {key: item["value"] for key, item in json.loads(about["config"]).items() if key != "_wandb"}
    assert config == vars(tiny(**options))
    assert told.exit_codes == {"run": [0]} and "warning" not in capfd.readouterr().err.lower()


def test_resumed_run_tells_nothing_twice(server, run, script, expected, monkeypatch, capfd):
    """The run dies at update 18, when W&B has rows that are newer than the checkpoint of update 10."""
    told, sample, calls = server(), script.ReplayBuffer.sample, itertools.count()
    run(log_interval=4, run_id="whole")

    def dying(*args):
        if next(calls) == 18:
            raise MemoryError
        return sample(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(script.ReplayBuffer, "sample", dying)
        run(log_interval=4)
    assert [step for step, _ in history(told)] == [4, 8, 10, 12, 16]
    check_same(run(log_interval=4), expected)
    assert history(told) == history(told, "whole")
    assert told.exit_codes == {"whole": [0], "run": [1, 0]} and "WARNING" not in capfd.readouterr().err


def test_preempted_run_tells_all(server, run, script, expected, monkeypatch):
    """The signal comes while the policy of update 20 is evaluated."""
    told, rollout, calls = server(), script.rollout, itertools.count()
    run(log_interval=4, run_id="whole")

    def preempted(*args, **options):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rollout(*args, **options)

    monkeypatch.setattr(script, "rollout", preempted)
    with pytest.raises(SystemExit):
        run(log_interval=4)
    assert told.preempted == {"run"}
    check_same(run(log_interval=4), expected)
    rows, whole = dict(history(told)), dict(history(told, "whole"))
    assert {step: row.keys() for step, row in rows.items()} == {step: row.keys() for step, row in whole.items()}
    assert rows[20]["eval_return"] == whole[20]["eval_return"]


def test_no_account(server, run, expected, monkeypatch, capfd):
    told = server()
    monkeypatch.delenv("WANDB_API_KEY")
    capfd.readouterr()
    check_same(run(), expected)
    assert not told.requests and not capfd.readouterr().err and not list(Path("wandb").glob("*run*"))


def test_offline(server, run, expected, monkeypatch):
    told = server()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", "logs")
    Path("logs").mkdir()
    check_same(run(), expected)
    wandb.teardown()  # waits until all is written, as a program's end does
    (log,) = Path("logs").glob("wandb/offline-run-*-run/run-run.wandb")
    assert log.read_bytes().count(b"eval_return_std") >= len(table(expected)) and not told.requests


@pytest.mark.parametrize("fault", FAULTS)
def test_server_fails_from_the_start(fault, server, run, expected, limited, capfd):
    told = server(fault=fault)
    capfd.readouterr()
    started = time.monotonic()
    check_same(run(), expected)
    assert time.monotonic() - started < SECONDS + SPARE
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("wandb: ")]
    assert len(lines) == 1 and lines[0].startswith("warning: W&B is off") and not told.runs


@pytest.mark.parametrize("fault", FAULTS)
def test_server_fails_in_mid_run(fault, server, run, expected, limited, capfd):
    told = server(later=fault)
    capfd.readouterr()
    started = time.monotonic()
    check_same(run(), expected)
    assert time.monotonic() - started < SECONDS + SPARE
    assert all(line.startswith("wandb: ") for line in capfd.readouterr().err.splitlines())
    assert told.runs and not any(told.history.values()) and not told.exit_codes


def test_program_ends_where_the_server_fails(server, script, expected):
    """Beside one another: servers that never answer, or answer HTTP 500, from the start and from mid-run on."""
    faults = [{"fault": "silent"}, {"later": "silent"}, {"later": "error"}]
    runs = {server(**fault).address: arguments(script, run_id=str(i)) for i, fault in enumerate(faults)}
    subprocess.run([sys.executable, "-c", PROGRAM, script.__name__, json.dumps(runs)], check=True)
    for i, fault in enumerate(faults):
        lines = [line for line in Path(f"{i}.err").read_text().splitlines() if not line.startswith("wandb: ")]
        assert len(lines) == ("fault" in fault), lines
        assert len(table(f"runs/{i}")) == len(table(expected)) and equal(weights(f"runs/{i}"), weights(expected))


def test_agent_runs_a_sweep(server, script, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # the agent calls `python`
    common = {key: value for key, value in arguments(script, max_timesteps=5).items() if key != "run_id"}
    trials = {f"trial{seed}": common | {"seed": seed, "policy_lr": 1e-5} for seed in (1, 2)}
    told = server(program=script.__file__, trials=trials)
    subprocess.run([sys.executable, "-c", AGENT], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert told.exit_codes == {run: [0] for run in trials}
    for run, trial in trials.items():
        assert trial.items() <= yaml.safe_load(Path("runs", run, "config.yaml").read_text()).items()
        assert len(table(f"runs/{run}")) == 1 and told.runs[run]["sweep"] == "sweep"
