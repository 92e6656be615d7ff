"""Weights & Biases: scripts tell it everything, and no fault of account, network or server stops a run or changes its
folder. First with a recorder in its place, then with the real client and a stand-in for its server on this machine."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import wandb
from conftest import ROOT, SPEEDS, equal, interrupt, once, table, weights
from wandb_server import Server

# A recorder in place of W&B


def check_same(folder, expected):
    assert table(folder) == table(expected) and equal(weights(folder), weights(expected))


class Wandb:
    """Records what a script tells W&B; the calls in `broken` fail."""

    Settings = dict

    def __init__(self, step=0, broken=()):
        self.calls, self.rows, self.starting_step, self.broken, self.id = [], [], step, broken, "id"

    def __getattr__(self, name):
        def call(*args, **options):
            if name in self.broken and options.get("mode") != "disabled":
                raise RuntimeError("no network\ntoday")
            self.calls.append((name, options))
            if name == "log":
                self.rows.append((options["step"], args[0]))
            return self if name == "init" else True

        return call


@pytest.fixture
def recorder(script, monkeypatch):
    def replace(**options):
        monkeypatch.setattr(script, "wandb", recorder := Wandb(**options))
        return recorder

    monkeypatch.delenv("WANDB_MODE")
    return replace


def test_wandb_gets_names_configuration_and_metrics(recorder, script, tiny, run, monkeypatch):
    wandb = recorder()
    folder = run(log_interval=4, project="p", group="g")
    options = dict(wandb.calls)["init"]
    wanted = {"project": "p", "group": "g", "name": "run", "id": "run", "resume": "allow"}
    assert wanted.items() <= options.items() and options["config"] == vars(tiny(log_interval=4, project="p", group="g"))
    assert {"init_timeout", "finish_timeout"} <= options["settings"].keys()
    steps = [step for step, _ in wandb.rows]
    assert sorted({*steps}) == [4, 8, 10, 12, 16, 20, 24, 25] and steps == sorted(steps)
    logged = {step: {} for step in steps}
    for step, metrics in wandb.rows:
        logged[step] |= metrics
    for row in table(folder):
        assert logged[int(row["step"])]["eval_return"] == float(row["eval_return"])
    written = {name for row in table(folder) for name, value in row.items() if value}
    assert {name for metrics in logged.values() for name in metrics} - SPEEDS == written - SPEEDS
    single = table(run(eval_freq=1, run_id="single"))
    for end, start in ((8, 4), (16, 12)):
        name = "average_target_q"
        assert logged[end][name] == pytest.approx(np.mean([float(x[name]) for x in single[start:end]]))
    assert wandb.calls[-1] == ("finish", {"exit_code": 0})


@once
@pytest.mark.parametrize("reason", ["login", "WANDB_MODE", "WANDB_SWEEP_ID", None])
def test_wandb_runs_where_it_is_wanted(reason, recorder, run, monkeypatch):
    wandb = recorder(broken=() if reason == "login" else ("login",))
    if reason and reason != "login":
        monkeypatch.setenv(reason, "offline")
    run(max_timesteps=1)
    modes = [options.get("mode") for name, options in wandb.calls if name == "init"]
    assert modes == [None if reason else "disabled"]


@once
@pytest.mark.parametrize("broken", ["init", "login", "log", "finish"])
def test_wandb_never_stops_a_run(broken, recorder, script, tiny, run, capsys):
    expected = run(run_id="whole")
    recorder(broken=(broken,))
    capsys.readouterr()
    script.train(tiny(log_interval=3))
    check_same(expected.with_name("run"), expected)
    assert capsys.readouterr().err.count("\n") <= 1  # one line of warning


@once
@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGTERM, True), (signal.SIGUSR1, True), (signal.SIGINT, False)]
)
def test_wandb_requeues_a_run_that_a_scheduler_ended(number, requeued, recorder, script, tiny):
    wandb = recorder()
    assert interrupt(script, tiny(), number) == 128 + number
    names = [name for name, _ in wandb.calls]
    assert names[-1] == "finish" and ("mark_preempting" in names) == requeued
    assert wandb.calls[-1][1] == {"exit_code": 1}


@once
def test_resumed_run_tells_wandb_nothing_twice(recorder, run):
    recorder()
    run(max_timesteps=10, log_interval=4)
    wandb = recorder(step=17)
    run(log_interval=4)
    assert [step for step, _ in wandb.rows] == [20, 24, 25]


# The real client


SECONDS = 2  # of waiting for a server that will not answer, in these tests


@pytest.fixture
def expected(run):
    """The folder of the run without W&B."""
    return run(run_id="expected")


@pytest.fixture
def alarm():
    """A test that hangs fails after ten minutes."""

    def hangs(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 600, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def server(alarm, expected, tmp_path, monkeypatch):
    """Starts a stand-in, which W&B uses from then on; at the end nothing of W&B is left in this process."""
    servers = []

    def start(**options):
        servers.append(Server(**options))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].address)
        return servers[-1]

    wandb.teardown()  # otherwise it stays disabled
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
def wait(monkeypatch):
    """Limits the start and the end of a record; what will succeed may take its time on a busy machine."""
    settings = wandb.Settings

    def wait(start=300, end=300):
        limits = {"init_timeout": start, "finish_timeout": end}
        monkeypatch.setattr(wandb, "Settings", lambda **given: settings(**given | limits))

    return wait


def history(told, run="run"):
    """Step and metrics of each row that arrived, without what W&B adds and what differs between equal runs."""
    extra = {"_step", "_timestamp", "_runtime", "step", "updates_per_second"}
    return [(row["_step"], {key: x for key, x in row.items() if key not in extra}) for row in told.history[run]]


@once
def test_arrives_as_it_stands_in_the_folder(server, run, expected, wait, tiny, capfd):
    wait()
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


@once
def test_no_account(server, run, expected, monkeypatch, capfd):
    told = server()
    monkeypatch.delenv("WANDB_API_KEY")
    capfd.readouterr()
    check_same(run(), expected)
    assert not told.requests and not capfd.readouterr().err and not list(Path("wandb").glob("*run*"))


@once
def test_offline(server, run, expected, wait, monkeypatch):
    wait()
    told = server()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", "logs")
    Path("logs").mkdir()
    check_same(run(), expected)
    wandb.teardown()  # waits until all is written, as a program's end does
    (log,) = Path("logs").glob("wandb/offline-run-*-run/run-run.wandb")
    assert log.read_bytes().count(b"eval_return_std") >= len(table(expected)) and not told.requests


@pytest.mark.parametrize("fault", ["refused", "silent", "garbage"])
@once
def test_server_fails_from_the_start(fault, server, run, expected, wait, capfd):
    wait(start=SECONDS)
    told = server(fault=fault)
    capfd.readouterr()
    check_same(run(), expected)
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("wandb: ")]
    assert len(lines) == 1 and lines[0].startswith("warning: W&B is off") and not told.runs


@pytest.mark.parametrize("fault", ["refused", "silent", "error"])
@once
def test_server_fails_in_mid_run(fault, server, run, expected, wait, capfd):
    wait(end=SECONDS)
    told = server(later=fault)
    capfd.readouterr()
    check_same(run(), expected)
    assert all(line.startswith("wandb: ") for line in capfd.readouterr().err.splitlines())
    assert told.runs and not any(told.history.values()) and not told.exit_codes
