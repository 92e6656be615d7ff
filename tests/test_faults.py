"""Runs that go wrong on the way: values that diverge, environments that fail."""

import errno
import math
import os
import signal

import pytest
import torch
from conftest import WORLDS, Counter, contents, equal, refusal, table, weights


@pytest.fixture
def diverge(script, monkeypatch):
    """From the given update on, updates report this value of a metric."""

    def diverge(metric, value, first):
        agent = getattr(script, WORLDS[script.__name__].agent)
        update = agent.update

        def changed(self, batch):
            metrics = update(self, batch)
            return metrics | {metric: torch.tensor(value)} if self.n_updates >= first else metrics

        monkeypatch.setattr(agent, "update", changed)

    return diverge


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("critic_grad_norm", math.nan),
        ("critic_grad_norm", math.inf),
        ("critic_grad_norm", -math.inf),
        ("average_target_q", -1e7),
    ],
)
@pytest.mark.parametrize("log_interval", [2, 1000])
def test_diverging_run_stops_and_keeps_what_was_good(metric, value, log_interval, script, tiny, run, diverge):
    options = {"log_interval": log_interval, "run_id": "same"}
    good = contents(run(**options, max_timesteps=20))
    diverge(metric, value, 23)
    status, line = refusal(script.train, tiny(**options, max_timesteps=30))
    step = 24 if log_interval == 2 else 30
    assert status == 1 and f"{metric} is " in line and f"at update {step}" in line and "learning rates" in line
    now = contents(tiny(**options).checkpoints_path + "/same")
    assert {**now, "config.yaml": None} == {**good, "config.yaml": None}


def test_diverging_run_writes_nothing_but_its_configuration(script, tiny, tmp_path, diverge):
    diverge("critic_grad_norm", math.nan, 3)
    refusal(script.train, tiny())
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["config.yaml"]


def test_signal_saves_no_checkpoint_of_a_run_that_diverged(script, tiny, run, diverge, monkeypatch):
    good = contents(run(max_timesteps=10))
    diverge("critic_grad_norm", math.nan, 12)
    sample = script.ReplayBuffer.sample

    def stop(buffer, *arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(buffer, *arguments)

    calls = []
    monkeypatch.setattr(script.ReplayBuffer, "sample", stop)
    assert "at update 15" in refusal(script.train, tiny(max_timesteps=20))[1]
    now = contents(tiny().checkpoints_path + "/run")
    assert {**now, "config.yaml": None} == {**good, "config.yaml": None}


@pytest.mark.parametrize("options", [{"qf_lr": 1e4}, {"qf_lr": 1e11, "policy_lr": 1e11}])
def test_rates_that_are_far_too_large_end_a_run(options, script, tiny):
    status, line = refusal(script.train, tiny(**options, log_interval=5, max_timesteps=200))
    assert status == 1 and "diverged" in line


def test_values_may_be_far_below_any_return(script, run, diverge):
    diverge("average_target_q", -1e4, 0)  # the largest reward is 125, so that returns may be 12,500
    assert len(table(run())) == 3


@pytest.mark.parametrize("place", ["step", "reset", "reward"])
def test_environment_that_fails_costs_an_evaluation(place, run, monkeypatch, capsys):
    expected = run(run_id="expected")
    original, calls = getattr(Counter, "reset" if place == "reset" else "step"), []

    def fail(self, *arguments, **options):
        calls.append(1)
        if len(calls) == (4 if place == "reset" else 10):  # in the second evaluation
            if place != "reward":
                raise RuntimeError("the simulator\nexploded")
            return (*original(self, *arguments)[:1], math.nan, False, False, {})
        return original(self, *arguments, **options)

    monkeypatch.setattr(Counter, original.__name__, fail)
    capsys.readouterr()
    folder = run()
    out, err = capsys.readouterr()
    rows, whole = table(folder), table(expected)
    assert [row["step"] for row in rows] == ["10", "20", "25"] and (rows[0], rows[2]) == (whole[0], whole[2])
    assert {key for key in rows[1] if rows[1][key] != whole[1][key]} == {
        key for key in whole[1] if key.startswith("eval") and whole[1][key]
    }
    assert all(rows[1][key] == "" for key in rows[1] if key.startswith("eval"))
    assert equal(weights(folder, "checkpoint.pt"), weights(expected, "checkpoint.pt"))
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "update 20" in warnings[0] and "not evaluated" in out


def test_stored_policy_in_an_environment_that_fails_is_one_line(script, tiny, run, monkeypatch):
    folder = run()
    monkeypatch.setattr(Counter, "step", lambda *_: 1 / 0)
    options = {"max_timesteps": 0, "load_model": str(folder / "policy.pt"), "run_id": "stored"}
    status, line = refusal(script.train, tiny(**options))
    assert status == 1 and "division" in line and not folder.with_name("stored").exists()


def test_environment_that_cannot_be_closed_hides_no_result(script, tiny, monkeypatch):
    monkeypatch.setattr(Counter, "close", lambda *_: 1 / 0)
    assert script.train(tiny())["step"] == 25


@pytest.mark.parametrize("place", ["reset", "step"])
def test_observation_that_is_no_number_is_no_evaluation(place, script, tiny, monkeypatch, capsys):
    observe = Counter.observe
    first = 0 if place == "reset" else 1
    monkeypatch.setattr(Counter, "observe", lambda self: observe(self) + (math.nan if self.t >= first else 0))
    assert script.train(tiny(max_timesteps=10))["eval_return"] is None
    assert capsys.readouterr().err.count("warning") == 1


def test_folder_in_use_is_left_alone(script, tiny, run):
    folder = run(max_timesteps=10)
    other = script.RunFolder(tiny())
    other.open(tiny())
    good = contents(folder)
    status, line = refusal(script.train, tiny())
    assert status == 1 and "in use" in line and contents(folder) == good
    other.close()
    assert script.train(tiny())["step"] == 25


def test_file_system_without_locks_does_no_harm(script, tiny, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(script.fcntl, "flock", missing)
    assert script.train(tiny())["step"] == 25


DAMAGES = {
    "text for a number": ("metrics.csv", lambda content: content.replace(b"10,", b"ten,", 1)),
    "no step": ("metrics.csv", lambda content: content.replace(b"step", b"stop")),
    "long row": ("metrics.csv", lambda content: content + b"1," * 90 + b"\n"),
    "other bytes": ("metrics.csv", lambda content: content + b"\xff\xfe\n"),
    "no end": ("config.yaml", lambda content: content.replace(b"max_timesteps: 10", b"max_timesteps: abc")),
    "no mapping": ("config.yaml", lambda content: b"- 1"),
    "cut": ("checkpoint.pt", lambda content: content[:-100]),
    "nothing": ("checkpoint.pt", lambda content: b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_is_refused_in_a_line(damage, script, tiny, run):
    folder, (name, change) = run(max_timesteps=10), DAMAGES[damage]
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    bad = contents(folder)
    line = refusal(script.train, tiny())[1]
    assert str(folder) in line and contents(folder) == bad


@pytest.mark.parametrize("part", ["agent", "means", "random", "optimizer", "networks"])
def test_checkpoint_without_a_part_is_refused_in_a_line(part, script, tiny, run):
    path = run(max_timesteps=10) / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    if part in content:
        del content[part]
    else:
        content["agent"] = {key: {} if key.startswith(part) else x for key, x in content["agent"].items()}
    torch.save(content, path)
    assert str(path.parent) in refusal(script.train, tiny())[1]


def test_run_without_its_configuration_is_not_resumed(script, tiny, run):
    (run(max_timesteps=10) / "config.yaml").unlink()
    assert "config.yaml" in refusal(script.train, tiny(seed=1))[1]


def test_folder_of_an_evaluation_takes_no_training(script, tiny, run):
    policy = run() / "policy.pt"
    script.train(tiny(run_id="stored", max_timesteps=0, load_model=str(policy)))
    refusal(script.train, tiny(run_id="stored", load_model=str(policy.with_name("checkpoint.pt"))))


def test_the_last_update_may_diverge_too(script, tiny, tmp_path):
    assert "diverged" in refusal(script.train, tiny(qf_lr=1e12, max_timesteps=1, eval_freq=1))[1]
    assert not (tmp_path / "runs" / "run" / "policy.pt").exists()
