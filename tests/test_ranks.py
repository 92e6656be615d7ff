"""Several processes that train one run with cql_atari.py, as torchrun starts them: here on a CPU, by gloo."""

import contextlib
import fcntl
import importlib
import json
import os
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, equal, execute, fork, refusal, table, weights

SCRIPT = ROOT / "algorithms/discrete/cql_atari.py"
LOST = "another process of this run ended"
OPTIONS = {
    "env": "toy/frames-v0", "encoder": "minatar", "frame_stack": 2, "hidden_dim": 8, "n_quantiles": 3, "qf_lr": 0.01,
    "batch_size": 12, "max_timesteps": 40, "eval_freq": 20, "log_interval": 10, "n_episodes": 2, "device": "cpu",
    "run_id": "run",
}  # fmt: skip
# What a process does besides, if its environment asks for it: at a place, it leaves a file and waits for another one.
MORE = """
SILENCE = int(os.environ["SILENCE"])
RANK, AT, HERE = os.environ["RANK"], os.environ["AT"], Path(os.environ["HERE"])
(HERE / f"{RANK} pid").write_text(str(os.getpid()))


def mark(name):
    (HERE / name).touch()


def hold(place):
    if place == AT:
        mark(f"{RANK} there")
        while not (HERE / "go").exists():
            time.sleep(0.02)


class Flicker(gym.Env):
    observation_space = gym.spaces.Box(0, 1, (10, 10, 2), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.step(0)[0], {}

    def step(self, action):
        self.t += 1
        hold("evaluation")
        observation = (self.np_random.random((10, 10, 2)) < 0.5).astype(np.uint8)
        return observation, float(action), self.t == 4, False, {}


gym.register("Flicker-v0", entry_point=Flicker)


def before(owner, name, function):
    old = getattr(owner, name)

    def new(*arguments, **options):
        function(*arguments, **options)
        return old(*arguments, **options)

    setattr(owner, name, new)


def updating(agent, batch):
    hold(f"update {agent.n_updates} of {RANK}")
    if (AT, agent.n_updates) == (f"NaN on {RANK}", 25):
        torch.nn.init.constant_(agent.critic.last.bias, math.nan)


def started(ranks, agent, run):
    before(Ranks, "finish", lambda _: torch.save({"agent": agent.state_dict()}, HERE / f"weights{RANK}.pt"))


before(DiscreteCQL, "update", updating)
before(Ranks, "start", started)
before(Ranks, "sampler", lambda ranks, buffer, frames: np.save(HERE / f"rows{RANK}", buffer.columns.observations))
before(Ranks, "receive", lambda ranks, number, frame: mark(f"{RANK} signalled"))
before(os, "replace", lambda temporary, path: hold("save") if Path(path).name == "checkpoint.pt" else None)
"""
GRADIENTS = """
CASES = {
    "qr": {"head": "qr"},
    "c51": {"head": "c51", "n_atoms": 5},
    "dr3": {"head": "dqn", "dr3_coefficient": 0.1, "normalize_features": True},
    "var": {"cql_variant": "var"},
    "clipped": {"max_grad_norm": 0.1},
    "channels last": {"encoder": "impala"},
}
torch.set_default_dtype(torch.float64)
first = parse_arguments(TrainConfig)
ranks = Ranks(first)
for name, case in CASES.items():
    config = TrainConfig(**vars(first) | {"cql_alpha": 1.0} | case)
    torch.manual_seed(0)
    rows = torch.randint(2, (2, 12, 4, 10, 10), dtype=torch.uint8)
    batch = Batch(rows[0], torch.randint(3, (12,)), torch.randn(12), rows[1], torch.zeros(12), torch.full((12,), 0.99))
    found = []
    for average, part in ((None, slice(None)), (ranks.average, slice(6 * ranks.rank, 6 * ranks.rank + 6))):
        torch.manual_seed(1)
        agent = DiscreteCQL(config, [4, 10, 10], [3], 1.0)
        agent.critic.atoms.copy_(torch.linspace(-3, 3, agent.critic.n_outputs))
        agent.target_critic.atoms.copy_(agent.critic.atoms)
        agent.average = average
        with torch.no_grad():
            agent.critic.last.weight.mul_(3)
        norm = agent.update(Batch(*[x if x is None else x[part] for x in batch]))["critic_grad_norm"]
        found.append([*(x.grad for x in sum(agent.parameter_groups.values(), [])), norm])
    whole, averaged = found
    assert all(x.abs().max() > 1e-5 for x in whole), name
    for x, y in zip(whole, averaged):
        assert (x - y).abs().max() <= 1e-12, name
        assert x.stride() == y.stride(), name
ranks.finish()
"""


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("algorithms.discrete.cql_atari")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset: 20 episodes of 4 to 7 transitions, the odd ones with a time-out."""
    folder, random = tmp_path_factory.mktemp("minari") / "toy/frames-v0", np.random.default_rng(0)
    folder.mkdir(parents=True)
    lengths = 4 + np.arange(20) % 4
    n, lasts = lengths.sum(), lengths.cumsum() - 1
    terminals, timeouts = np.zeros((2, n), bool)
    terminals[lasts[::2]] = timeouts[lasts[1::2]] = True
    columns = {
        "frames": random.integers(2, size=(n + 20, 2, 10, 10)).astype(np.uint8),
        "starts": np.append(0, (lengths + 1).cumsum()[:-1]),
        "actions": random.integers(3, size=n),
        "rewards": random.random(n).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
    metadata = {"format": 1, "kind": "frames", "action_low": [0], "action_high": [2], "frame_max": 1}
    (folder / "metadata.json").write_text(json.dumps(metadata | {"environment": {"id": "Flicker-v0", "wrappers": []}}))
    return folder.parents[1]


def wait_for(condition, what):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


class Processes:
    """Some processes of one run, in the folder <path>/<rank> each."""

    def __init__(self, path, root, n=2, at="", silence=60, text=None, launcher=(), **options):
        if text is None:
            text = SCRIPT.read_text().replace('\nif __name__ == "__main__":\n', MORE + '\nif __name__ == "__main__":\n')
            assert MORE in text
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [
            f"--{name}={value}" for name, value in (OPTIONS | {"checkpoints_path": path / "runs"} | options).items()
        ]
        environment = dict(os.environ) | {
            "MINARI_DATASETS_PATH": str(root),
            "AT": at,
            "SILENCE": str(silence),
            "HERE": str(path),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
        if launcher:
            (path / "program.py").write_text(text)
            text, words, n = (
                "from torch.distributed.run import main\nmain()",
                [*launcher, str(path / "program.py"), *words],
                1,
            )
        self.path, self.all = path, []
        for name in (
            "go",
            "0 pid",
            "1 pid",
            "2 pid",
            *(f"{rank} {what}" for rank in range(3) for what in ("there", "signalled")),
        ):
            (path / name).unlink(missing_ok=True)
        for rank in range(n):
            folder = path / str(rank) / "work"
            folder.mkdir(parents=True, exist_ok=True)
            more = {} if launcher else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.all.append(fork(execute, text, words, folder, environment | more))

    def kill(self, rank, number=signal.SIGKILL):
        os.kill(self.all[rank].pid, number)

    def wait_for(self, *marks):
        for name in marks:
            path = self.path / name
            wait_for(lambda: path.exists() or not all(x.is_alive() for x in self.all), name)  # noqa: B023
            assert path.exists(), self.text()

    def go(self):
        (self.path / "go").touch()

    def end(self):
        """The exit status of each."""
        for process in self.all:
            process.join(60)
        return [process.exitcode for process in self.all]

    def text(self, name="err"):
        return [(self.path / str(rank) / name).read_text() for rank in range(len(self.all))]


@pytest.fixture
def start(tmp_path, root):
    started = []

    def start(*arguments, path=tmp_path, **options):
        started.append(Processes(path, root, *arguments, **options))
        return started[-1]

    yield start
    for processes in started:
        notes = [
            int(path.read_text()) for path in processes.path.glob("* pid")
        ]  # torchrun's have sessions of their own
        for pid in (*notes, *(process.pid for process in processes.all)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes.all:
            process.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, root):
    """The folder of a run that two processes trained without a stop."""
    path = tmp_path_factory.mktemp("whole")
    processes = Processes(path, root)
    assert processes.end() == [0, 0], processes.text()
    assert processes.text() == ["", ""] and processes.text("out")[1] == ""
    return path


def check_end(path, whole):
    """Equal to the last bit, but for times and the folder's name."""
    first, second = (weights(x / "runs/run", "checkpoint.pt") for x in (path, whole))
    assert equal(first, second) and table(path / "runs/run") == table(whole / "runs/run")


def lines(texts):
    """Lines that processes print on stderr, without the hosts and ports of gloo."""
    return [text.splitlines() for text in texts]


def test_average_of_gradients_is_that_of_the_whole_minibatch(start):
    text = SCRIPT.read_text()
    processes = start(text=text[: text.index('\nif __name__ == "__main__":\n')] + GRADIENTS, hidden_dim=64)
    assert processes.end() == [0, 0], processes.text()


def test_two_processes_train_one_network_on_different_rows(whole):
    assert sorted(x.name for x in (whole / "runs/run").iterdir() if x.name != ".lock") == [
        "checkpoint.pt", "config.yaml", "metrics.csv", "policy.pt",
    ]  # fmt: skip
    assert [x.name for x in (whole / "runs").iterdir()] == ["run"]
    assert not any(any((whole / f"{rank}/work").iterdir()) for rank in (0, 1))
    first, second = (weights(whole, f"weights{rank}.pt") for rank in (0, 1))
    saved = {key: x for key, x in weights(whole / "runs/run", "checkpoint.pt").items() if key.startswith("/agent")}
    assert equal(first, second) and equal(first, saved) and len(first) > 20
    rows = [np.load(whole / f"rows{rank}.npy") for rank in (0, 1)]
    assert not np.intersect1d(*rows).size and sum(map(len, rows)) == 110 and min(map(len, rows)) > 40
    states = torch.load(whole / "runs/run/checkpoint.pt", weights_only=True)["random"]
    assert len(states) == 2 and not torch.equal(*states)
    assert len(table(whole / "runs/run")) == 2


def test_killed_run_goes_on_as_if_nothing_had_happened(start, whole, tmp_path):
    first = start(at="update 27 of 1")
    first.wait_for("1 there")
    first.kill(0), first.kill(1)
    assert first.end() == [-9, -9]
    second = start()
    assert second.end() == [0, 0] and "updates 20 to 40" in second.text("out")[0]
    check_end(tmp_path, whole)
    complete = start()
    assert complete.end() == [0, 0] and "is complete" in complete.text("out")[0]
    check_end(tmp_path, whole)


@pytest.mark.parametrize("n", [1, 3])
def test_other_number_of_processes_goes_on_and_says_so(n, start, tmp_path, whole):
    first = start(at="update 27 of 0")
    first.wait_for("0 there")
    first.kill(0), first.kill(1)
    first.end()
    second = start(n)
    assert second.end() == [0] * n, second.text()
    assert f"2 processes are now {n}: from here on" in second.text("out")[0]
    assert len(table(tmp_path / "runs/run")) == 2 and table(tmp_path / "runs/run")[0] == table(whole / "runs/run")[0]
    assert len(torch.load(tmp_path / "runs/run/checkpoint.pt", weights_only=True)["random"]) == n


def updates(path):
    return torch.load(path / "runs/run/checkpoint.pt", weights_only=True)["agent"]["_extra_state"]["n_updates"]


def test_signal_to_one_process_saves_and_stops_all(start, whole, tmp_path):
    first = start(at="update 13 of 1")
    first.wait_for("1 there")
    first.kill(1, signal.SIGTERM)
    first.wait_for("1 signalled")
    first.go()
    assert first.end() == [143, 143] and updates(tmp_path) == 18, "they ask each other after 8 updates"
    assert "signal 15: saved in" in first.text("out")[0]
    assert equal(*(weights(tmp_path, f"weights{rank}.pt") for rank in (0, 1)))
    assert start().end() == [0, 0]
    check_end(tmp_path, whole)


def test_torchrun_passes_a_signal_on(start, whole, tmp_path):
    launcher = "--standalone", "--nproc_per_node=2"
    first = start(at="update 13 of 1", launcher=launcher)
    first.wait_for("1 there")
    first.kill(0, signal.SIGTERM)
    first.wait_for("1 signalled")
    first.go()
    assert first.end() == [1] and updates(tmp_path) == 18 and "signal 15: saved in" in first.text("out")[0]
    assert start().end() == [0, 0]
    check_end(tmp_path, whole)


@pytest.mark.parametrize("place", ["update 25 of 0", "evaluation", "save"])
def test_process_that_dies_ends_the_other(place, start, tmp_path):
    processes = start(at=place, silence=5)
    processes.wait_for("0 there")
    processes.kill(1)
    if place.startswith("update"):
        processes.go()
    assert processes.end() == [1, -9], processes.text()
    (line,) = processes.text()[0].splitlines()
    assert line.startswith("program: " + LOST)
    if place.startswith("update"):
        assert updates(tmp_path) == 20
    else:  # the first row
        assert not (tmp_path / "runs/run/checkpoint.pt").exists() and "was silent for 5 s" in line


def test_first_process_dies_or_stands_still(start, tmp_path):
    processes = start(3, at="update 25 of 0")
    processes.wait_for("0 there")
    processes.kill(0)
    assert processes.end() == [-9, 1, 1]
    assert all(LOST in line for text in processes.text()[1:] for line in text.splitlines())
    processes = start(at="update 25 of 0", silence=5)
    processes.wait_for("0 there")
    processes.kill(0, signal.SIGSTOP)
    wait_for(lambda: not processes.all[1].is_alive(), "the end")
    assert processes.all[1].exitcode == 1 and LOST in processes.text()[1]


def test_processes_that_were_suspended_together_go_on(start):
    processes = start(at="update 25 of 0", silence=4)
    processes.wait_for("0 there")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        processes.kill(0, number), processes.kill(1, number)
        time.sleep(6 if number == signal.SIGSTOP else 0)
    processes.go()
    assert processes.end() == [0, 0], processes.text()


def test_torchrun_ends_the_first_process_in_an_evaluation(start, tmp_path):
    processes = start(at="evaluation", silence=5, launcher=("--standalone", "--nproc_per_node=2"))
    processes.wait_for("0 there")
    os.kill(int((tmp_path / "1 pid").read_text()), signal.SIGKILL)
    assert processes.end() == [1]
    assert f"program.py: {LOST}" in processes.text()[0] and not (tmp_path / "runs/run/checkpoint.pt").exists()


def test_divergence_of_one_process_ends_all(start, tmp_path):
    processes = start(at="NaN on 1", log_interval=1)
    assert processes.end() == [1, 1]
    assert "training diverged" in processes.text()[1] and updates(tmp_path) == 20


def test_errors_of_the_first_process_are_told_once(start, whole, tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    with open(tmp_path / "runs/run/.lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        processes = start()
        statuses = processes.end()
    (first,), (other,) = lines(processes.text())
    assert statuses == [1, 1] and "another process is working in" in first and LOST in other
    processes = start(path=whole, hidden_dim=9)
    assert processes.end() == [2, 1]
    (first,), (other,) = lines(processes.text())
    assert "hidden_dim was 8, is 9" in first and LOST in other


def test_refusals(script, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    status, line = refusal(script.Ranks, script.TrainConfig(device="cpu", batch_size=10))
    assert status == 2 and "--batch_size 10 is not a multiple of the 3 processes" in line
    status, line = refusal(script.TrainConfig, device="cuda:0")
    assert status == 2 and "a GPU of its own" in line
    assert script.own_device("cuda") == script.own_device("cuda:2") == "cuda:2" and script.own_device("cpu") == "cpu"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)
        status, line = refusal(script.Ranks, script.TrainConfig(device="cpu", batch_size=12))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert status == 1 and "process 1 does not find the other 2" in line and "MASTER_ADDR" in line


def test_parts_are_whole_episodes_and_all_of_them(script, capsys):
    def parts(lengths, n):
        ends = np.zeros(sum(lengths), bool)
        ends[np.cumsum(lengths) - 1] = True
        ends[-1] = False  # a run of which the last episode is cut
        data = {"terminals": ends, "timeouts": np.zeros_like(ends), "rows": np.arange(len(ends))}
        found = []
        for rank in range(n):
            ranks = script.Ranks.__new__(script.Ranks)
            ranks.rank, ranks.n = rank, n
            found.append(ranks.part(data, "toy")["rows"])
        return [len(x) for x in found], np.concatenate(found).tolist() == list(range(sum(lengths)))

    assert parts([5, 3, 4, 4, 2, 6], 1) == ([24], True)
    assert parts([5, 3, 4, 4, 2, 6], 3) == ([8, 8, 8], True)
    assert parts([10, 1, 1], 2) == ([10, 2], True) and "2 processes hold 2 to 10 transitions" in capsys.readouterr().out
    for lengths in ([5, 5], [1, 1, 10]):
        status, line = refusal(parts, lengths, 3)
        assert status == 1 and f"its {len(lengths)} episodes are too few or too unequal for 3 processes" in line
