"""benchmarks/speed.py on a tiny job; the tests check that it measures, not what it measures."""

import csv
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from algorithms.offline import cql
from benchmarks import speed

SPEEDS = ("discrete", "combo", "model", "rollouts", "constraint", "atari")  # of gpu.sh
TINY = ["--observation=3", "--action=2", "--batch=8", "--layers=1", "--actions=2", "--windows=1", "--seconds=0.05"]


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    def measure(*arguments):
        path = tmp_path / "speed.csv"
        monkeypatch.setattr(sys, "argv", ["speed.py", *TINY, "--device=cpu", f"--output={path}", *arguments])
        speed.main()
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    return measure


@pytest.fixture
def here(monkeypatch):
    """Workers are threads, which start at once."""

    def start(job, kind, variant):
        ours, theirs = multiprocessing.Pipe()

        def work():
            try:
                speed.work(theirs, job, kind, variant)
            finally:
                theirs.close()

        threading.Thread(target=work, daemon=True).start()
        return ours, ours.recv()

    monkeypatch.setattr(speed, "start", start)


def test_a_row_for_each_variant_alone_and_beside_a_busy_process(measure):
    """In real processes, which have their own number of threads."""
    variants = ["-", "OMP_NUM_THREADS=2,precision=bfloat16,cql_backprop_actions=1"]
    rows = measure("--beside", "0", "1", "--variants", *variants)
    assert [(row["variant"], row["beside"]) for row in rows] == [(name, n) for n in "01" for name in variants]
    assert [row["threads"] for row in rows] == [os.environ["OMP_NUM_THREADS"], "2"] * 2
    assert [rows[i]["ratio"] for i in (0, 2)] == ["1.0", "1.0"]  # to the first of its kind
    for row in rows:
        assert float(row["updates_per_second"]) > 0 and float(row["matmul_gflop_per_second"]) > 0


def test_the_rate_of_copies_is_their_sum(measure, monkeypatch):
    """Workers answer 1, 2, 3, ... to the requests of a window: the products in both types, the script, the peer. All
    have as many copies."""
    prepared, answers = (1e9, 0.0, None, 0.0, 1), iter(range(1, 100))
    connection = type("Connection", (), {"send": lambda *_: None, "recv": lambda _: next(answers)})()
    monkeypatch.setattr(speed, "start", lambda *_: (connection, prepared))
    rows = measure("--copies", "1", "3", f"--peer={speed.ROOT}")
    rates = {("-", "1"): 3, ("CORL", "1"): 4, ("-", "3"): 11 + 12 + 13, ("CORL", "3"): 14 + 15 + 16}
    assert {(row["variant"], row["copies"]): float(row["updates_per_second"]) for row in rows} == rates
    assert [row["ratio"] for row in rows] == ["0.75", "1.0", "0.8", "1.0"]
    assert [float(row["utilisation"]) * 1e-9 for row in rows] == pytest.approx([3 / 1, 4 / 1, 36 / 18, 45 / 18])


@pytest.mark.parametrize("part", [None, "model", "rollouts"])
def test_parts_of_combo(part, measure, here):
    variant = "rollout_batch_size=9,rollout_length=2,dynamics_hidden_dim=64,dynamics_members=5"
    (row,) = measure("--script=offline/combo", f"--variants={variant}", *([f"--part={part}"] if part else []))
    assert row["part"] == (part or "") and float(row["updates_per_second"]) > 0 and float(row["gflop_per_update"]) > 0


@pytest.mark.parametrize("variant", ["-", "policy=gaussian,divergence=wasserstein,value_penalty=True"])
def test_policy_constraints(variant, measure, here):
    (row,) = measure("--script=offline/policy_constraint", f"--variants={variant}")
    assert float(row["updates_per_second"]) > 0 and float(row["gflop_per_update"]) > 0


ATARI = "--script=discrete/cql_atari"


@pytest.fixture
def few_frames(monkeypatch):
    monkeypatch.setattr(speed, "N_FRAMES", 40)
    monkeypatch.setattr(speed, "EPISODE", 20)


@pytest.mark.parametrize(
    ("variant", "size"),
    [("hidden_dim=8,head=c51", 4 * 84 * 84), ("encoder=minatar,frame_stack=2,frames_on_device=True", 2 * 4 * 10 * 10)],
)
def test_frames(variant, size, measure, here, few_frames):
    (row,) = measure(ATARI, f"--variants={variant}")
    assert float(row["updates_per_second"]) > 0 and float(row["gflop_per_update"]) > 0
    assert (row["observation"], row["layers"], row["actions"]) == (str(size), "", "")


D3RLPY = """
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

class EncoderFactory:
    pass

class Config:
    def __init__(self, **options):
        self.options = options

    def create(self, device):
        return Agent(self.options)

class Agent:
    def __init__(self, options):
        self.options = options

    def build_with_dataset(self, buffer):
        self.network = self.options["encoder_factory"].create((4, 10, 10))

    def update(self, batch):
        with open({log!r}, "w") as file:
            shape = list(self.network(torch.rand(batch, 4, 10, 10)).shape)
            rows, (quantiles,) = [len(x[0]) for x in episodes], self.options["q_func_factory"]
            print(shape, rows, quantiles, self.options["alpha"], file=file)

def remember(memory, episodes, transition_picker):
    globals().update(episodes=episodes)
    return SimpleNamespace(sample_transition_batch=lambda size: size)

models = SimpleNamespace(EncoderFactory=EncoderFactory, MeanQFunctionFactory=None, QRQFunctionFactory=lambda n: [n])
dataset = SimpleNamespace(Episode=lambda *columns: columns, InfiniteBuffer=lambda: None, ReplayBuffer=remember)
algos, preprocessing = SimpleNamespace(DiscreteCQLConfig=Config), MagicMock()
"""


def test_d3rlpy_gets_the_job_of_the_first_variant(measure, here, few_frames, tmp_path, monkeypatch):
    """A stand-in for d3rlpy, in a virtual environment, notes what it is given."""
    place = speed.packages_of(tmp_path / "peer") / "d3rlpy"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(D3RLPY.format(log=str(tmp_path / "log")))
    monkeypatch.setattr(sys, "path", [*sys.path])
    first = "encoder=minatar,frame_stack=1,n_quantiles=7,hidden_dim=9,cql_alpha=0.3"
    rows = measure(ATARI, f"--peer={tmp_path / 'peer'}", "--variants", first, f"{first},target=double")
    assert [row["variant"] for row in rows] == [first, f"{first},target=double", f"d3rlpy {first}"]
    assert [row["observation"] for row in rows] == ["400"] * 3 and rows[2]["ratio"] == "1.0"
    assert (tmp_path / "log").read_text() == "[8, 9] [20, 20] 7 0.3\n"


def test_profile_counts_the_products_of_an_update(measure, here, capsys):
    """With one hidden layer: two layers, of the network at states and next states and of the target at next states."""
    measure("--script=discrete/cql_dqn", "--profile")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.endswith("calls of aten::addmm"))
    assert line.split()[:3:2] == ["-:", "us"] and line.split()[3] == "6.0" and float(line.split()[1]) > 0


def test_a_variant_is_options_constants_and_environment_variables():
    job = type("Job", (), {"script": "offline/cql", "device": "cpu", "batch": 8, "layers": 1, "actions": 2})
    variant = "GOMP_SPINCOUNT=0,cql_alpha=2,EnsembleCritic.max_rows=7"
    config, variables, constants = speed.make_config(job, variant)
    assert variables == {"GOMP_SPINCOUNT": "0"} and (config.cql_alpha, config.batch_size) == (2, 8)
    assert constants == [(cql.EnsembleCritic, "max_rows", 7)]


def test_constants_of_a_variant_reach_the_script(measure, here, monkeypatch):
    monkeypatch.setattr(cql.EnsembleCritic, "max_rows", 1000)
    measure("--variants=EnsembleCritic.max_rows=7")
    assert cql.EnsembleCritic.max_rows == 7


def test_busy_processes_end():
    with speed.beside(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert [process.wait(10) for process in processes] == [-9, -9]


@pytest.mark.parametrize(("variant", "share"), [("-", 1), ("cql_backprop_actions=2", 0.47)])
def test_operations_are_those_of_the_products(variant, share):
    sizes = {"observation": 17, "action": 6, "batch": 32, "layers": 3, "actions": 10}
    job = type("Job", (), sizes | {"script": "offline/cql", "device": "cpu"})
    assert speed.prepare_script(job, variant)[1] == pytest.approx(share * 13.72e9 / 8, rel=0.01)


def test_operations_of_the_discrete_script_are_those_of_the_products():
    """Forward and backward passes, and those of both networks on the next observations."""
    sizes = {"observation": 8, "action": 4, "batch": 64, "layers": 2, "actions": 10}
    job = type("Job", (), sizes | {"script": "discrete/cql_dqn", "device": "cpu"})
    network = 2 * 64 * (8 * 256 + 256 * 256 + 256 * 4)
    assert speed.prepare_script(job, "-")[1] == pytest.approx(5 * network, rel=0.05)


@pytest.mark.parametrize(
    "bad",
    [
        ["--variants=sped=1"],
        ["--variants=precision=half"],
        ["--variants=EnsembleCritic.no_such=3"],
        ["--variants=NoClass.max_rows=3"],
        ["--variants=EnsembleCritic.forward=3"],
        ["--variants=EnsembleCritic.max_rows=many"],
        ["--variants=TrainConfig.batch_size=3"],
        ["--peer=/nowhere"],
        ["--peer=/nowhere", "--script=discrete/cql_atari"],
        ["--peer=/c51", "--script=discrete/cql_atari", "--variants=head=c51"],
        ["--peer=/nowhere", "--script=discrete/cql_dqn"],
        ["--beside=-1"],
        ["--copies=0"],
        ["--part=model"],
        ["--no_such"],
    ],
)
def test_bad_arguments_are_refused(bad, measure, capsys):
    with pytest.raises(SystemExit) as stop:
        measure(*bad)
    assert stop.value.code == 2 and bad[0].split("=")[-1].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpu_script_goes_on_after_a_step_that_fails(device, tmp_path):
    """Runs with a Python that always fails, and finds no GPU."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text("#!/bin/sh\necho called; [ $1 != -c ] && exit 3; exit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
    command = ["bash", Path(speed.__file__).with_name("gpu.sh"), "/nowhere"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    if device == "cuda":
        assert "no NVIDIA GPU" in process.stdout and not (tmp_path / "runs").exists()
        return
    with open(tmp_path / "runs/gpu/steps.csv", newline="") as file:
        rows = {row["step"]: row["status"] for row in csv.DictReader(file)}
    names = {"collect", "tests", "alone", "atari", "atari-torchrun", "speed", *(f"speed-{x}" for x in SPEEDS)}
    assert rows == dict.fromkeys(names, "3") | {"four": "123", "images": "1"}
