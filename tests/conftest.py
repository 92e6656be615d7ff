"""Toy environments and datasets, and ways to run a script as its users do: from Python, by command line, and until it
is killed. Tests that take `script` run once per file under algorithms/, in a toy world of its kind of actions.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ |= {"WANDB_MODE": "disabled", "MINARI_REMOTE": "none://none"}  # no test reaches a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from minari.data_collector import EpisodeBuffer

for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
    os.environ.pop(name, None)

# The same examples each time, however slow the machine is.
slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("tests", deadline=None, derandomize=True, database=None, suppress_health_check=slow)
settings.load_profile("tests")

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.glob("algorithms/**/*.py"))]
DATASET = "toy/counter-v0"
SPEEDS = {"updates_per_second", "env_steps_per_second", *(f"{x}_time_share" for x in ("model", "rollout", "update"))}
ONLINE = {"online_return", "online_length", "online_success", "train_regret", "eval_regret"}  # empty offline
LEFTOVERS = pytest.StashKey[str]()
SURPLUS = 99_999  # a multiple of 3, whose episodes report success
TINY = {
    "device": "cpu", "env": DATASET, "max_timesteps": 25, "eval_freq": 10, "n_episodes": 2, "batch_size": 32,
    "hidden_dim": 16, "policy_n_hidden_layers": 1, "q_n_hidden_layers": 1, "cql_n_actions": 2, "run_id": "run",
    "rollout_freq": 10, "rollout_batch_size": 8, "rollout_length": 2, "dynamics_members": 3, "dynamics_elites": 2,
    "dynamics_hidden_dim": 8, "dynamics_n_hidden_layers": 1, "dynamics_max_epochs": 1,
    "policy_hidden_dims": "16", "q_hidden_dims": "16", "behaviour_hidden_dims": "16",
}  # fmt: skip


def pytest_configure(config):
    """Puts temporary files outside tmp_path into a folder of this session: killed runs leave theirs behind, and
    compiled code of an earlier session would hide a compiler that fails."""
    if not hasattr(config, "workerinput"):  # workers inherit it
        config.stash[LEFTOVERS] = folder = tempfile.mkdtemp(prefix="cql-")
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where it was
        os.environ["TMPDIR"] = tempfile.tempdir = folder


def pytest_unconfigure(config):
    if LEFTOVERS in config.stash:
        shutil.rmtree(config.stash[LEFTOVERS], ignore_errors=True)


class Counter(gym.Env):
    """The episode of seed s has 3 + s % 5 steps, observations (s, t, sum of actions), reward s + t in its t-th step.
    It ends in a terminal state if s is even, else by time-out. Multiples of 3 report success on the way.

    The seeds of online episodes are large numbers, which count modulo 97.

    A vector environment resets it without a seed when its episode is over. Those episodes have seed SURPLUS, and
    rewards that would show in any mean."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = None  # that of the World

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.t, self.total = SURPLUS if seed is None else seed if seed < SURPLUS else seed % 97, 0, 0.0
        return self.observe(), {}

    def observe(self):
        return np.array([self.number, self.t, self.total], np.float32)

    def step(self, action):
        assert self.t < self.length(self.number) and self.action_space.contains(action), action
        self.t, self.total = self.t + 1, self.total + float(np.sum(action))
        end, time_out = self.t == self.length(self.number), self.number % 2 == 1
        success = self.number % 3 == 0 and self.t == 2
        return self.observe(), self.number + self.t, end and not time_out, end and time_out, {"success": success}

    @staticmethod
    def length(seed):
        return 3 + seed % 5


class DictCounter(Counter):
    """Counter with observations in parts, whose names are not sorted."""

    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    observation_space = gym.spaces.Dict({"time": box, "goal": gym.spaces.Dict({"z": box, "y": box})})
    observation_space.spaces = dict(reversed(observation_space.spaces.items()))  # Gymnasium sorts them

    def observe(self):
        number, t, total = super().observe().astype(np.float64)[:, None]
        return {"time": t, "goal": {"z": total, "y": number}}


class Plain(Counter):
    """Counter without reports of success."""

    def step(self, action):
        return *super().step(action)[:4], {}


class Paid(Counter):
    """Counter whose rewards are the sums of the actions so far."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(self.total), *rest


class Fine(Counter):
    """Counter with bounds that float32 rounds away from the middle."""

    action_space = gym.spaces.Box(-0.1, 0.1, (2,), np.float64)


class Words(Counter):
    action_space = gym.spaces.Discrete(2)


class Moved(Counter):
    """As many actions as those of Counter with discrete ones, but other numbers."""

    action_space = gym.spaces.MultiDiscrete([4, 3])


class Large(Counter):
    """Counter with images of another size."""

    observation_space = gym.spaces.Box(0, 255, (8, 8), np.uint8)

    def observe(self):
        return np.pad(super().observe(), 1)


FRAME = gym.spaces.Box(0, 255, (6, 6), np.uint8)


def picture(counter):
    """The observation of Counter as an image: two rows show the seed, two the time, and two the sum of actions."""
    numbers = counter.number % 251, 20 * counter.t, 100 + 5 * counter.total
    return np.repeat(np.array(numbers, np.uint8), 2 * FRAME.shape[1]).reshape(FRAME.shape)


class World(NamedTuple):
    """Differences between the scripts."""

    action_space: gym.Space  # of Counter
    foreign: str  # an environment whose actions the script does not take
    others: tuple[str, str]  # environments of other sizes than Counter's
    agent: str
    action_sizes: int | list[int]  # of Counter, as the agent takes them
    unit: str = "update"  # what a run counts
    options: dict = {}  # of a tiny run, besides TINY
    pixels: bool = False  # whether observations are stacks of frames

    def enter(self, patch):
        """Makes Counter one of this world."""
        patch.setattr(Counter, "action_space", self.action_space)
        if self.pixels:
            patch.setattr(Counter, "observation_space", FRAME)
            patch.setattr(Counter, "observe", picture)


CONTINUOUS = World(
    gym.spaces.Box(np.array([-2, 0], np.float32), np.array([1, 0.5], np.float32)), "Words-v0",
    ("Pendulum-v1", "MountainCarContinuous-v0"), "CQL", 2,
)  # fmt: skip
DISCRETE = World(
    gym.spaces.MultiDiscrete([4, 3], start=[-2, 0]), "Fine-v0", ("CartPole-v1", "MountainCar-v0"), "DiscreteCQL", [4, 3]
)
PIXELS = {"encoder": "minatar", "frame_stack": 2, "n_quantiles": 5, "v_min": None, "v_max": None, "qf_lr": 3e-4}
PIXELS |= {"reward_clip": 1e9, "target_update_period": 5}
WORLDS = {
    "algorithms.offline.cql": CONTINUOUS,
    "algorithms.offline.combo": CONTINUOUS,
    "algorithms.offline.policy_constraint": CONTINUOUS._replace(agent="PolicyConstraint"),
    "algorithms.finetune.cql": CONTINUOUS._replace(unit="step"),
    "algorithms.discrete.cql_dqn": DISCRETE,
    "algorithms.discrete.cql_atari": DISCRETE._replace(options=PIXELS, pixels=True, others=("Large-v0", "Words-v0")),
}
# What makes each method of policy_constraint.py, besides TD3+BC, its defaults.
GAUSSIAN = {"policy": "gaussian", "q_scale": 0.0, "policy_noise": 0.0, "target_policy": False}
BEST = {"n_acting_samples": 5, "n_target_actions": 3, "target_min_weight": 0.75, "behaviour": "vae"}
METHODS = {
    "TD3+BC": {},
    "BRAC-p": GAUSSIAN | {"behaviour": "gaussian", "divergence": "kl", "behaviour_steps": 5, "divergence_steps": 4},
    "BRAC-v": GAUSSIAN
    | {"behaviour": "gaussian", "divergence": "mmd", "value_penalty": True, "n_divergence_samples": 2},
    "BEAR": GAUSSIAN | BEST | {"divergence": "raw_mmd", "divergence_lagrange": True, "n_divergence_samples": 2},
    "BCQ": BEST | {"policy": "perturbation", "divergence": "none", "q_scale": 0.0, "policy_noise": 0.0},
    "wasserstein": GAUSSIAN | {"divergence": "wasserstein", "value_penalty": True},
}
continuous = pytest.mark.parametrize("script", ["algorithms.offline.cql"], indirect=True)
constrained = pytest.mark.parametrize("script", ["algorithms.offline.policy_constraint"], indirect=True)
discrete = pytest.mark.parametrize("script", ["algorithms.discrete.cql_dqn"], indirect=True)
finetune = pytest.mark.parametrize("script", ["algorithms.finetune.cql"], indirect=True)
# The scripts whose runs max_timesteps lengthens; one script; and one script of each kind of actions.
offline = pytest.mark.parametrize("script", [x for x in SCRIPTS if "finetune" not in x], indirect=True)
once = continuous  # for tests of text that all files share (see test_house.py)
pixels = pytest.mark.parametrize("script", [x for x in SCRIPTS if WORLDS[x].pixels], indirect=True)
# Evaluation of policies by FQE, which fits networks for vectors, has no use for images.
vectors = pytest.mark.parametrize("script", [x for x in SCRIPTS if not WORLDS[x].pixels], indirect=True)
kinds = pytest.mark.parametrize("script", ["algorithms.offline.cql", "algorithms.discrete.cql_dqn"], indirect=True)

ENVIRONMENTS = {
    "Counter": Counter, "DictCounter": DictCounter, "Plain": Plain, "Paid": Paid, "Fine": Fine, "Words": Words,
    "Moved": Moved, "Large": Large, "Hopper-Toy": Counter, "HalfCheetah_Toy": Counter,
}  # fmt: skip
for name, kind in ENVIRONMENTS.items():
    gym.register(f"{name}-v0", entry_point=f"{__name__}:{kind.__name__}")


def fsync(_):
    """No test cuts the power, so none waits for a disk."""


os.fsync = fsync


def record(env, seeds, policy=None):
    """Records one episode per seed, as EpisodeBuffers; with random actions unless there is a policy."""
    env, buffers = gym.make(env), []
    env.action_space.seed(0)
    for seed in seeds:
        observations, steps, done = [env.reset(seed=seed)[0]], [], False
        while not done:
            action = policy(env, observations[-1]) if policy else env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(observation)
            steps.append((action, reward, terminated, truncated))
            done = terminated or truncated
        actions, rewards, terminations, truncations = map(np.array, zip(*steps))
        buffers.append(
            EpisodeBuffer(None, seed, None, stack(observations), actions, rewards, terminations, truncations)
        )
    return buffers


def stack(observations):
    if isinstance(observations[0], dict):
        return {key: stack([x[key] for x in observations]) for key in observations[0]}
    return np.stack(observations)


def store(name, buffers, **options):
    with warnings.catch_warnings(action="ignore"):  # no author, no link
        minari.create_dataset_from_buffers(name, buffers, jpeg_encoding=False, **options)
    return name


def store_frames(name, buffers, env=None, action_space=None, ref_min_score=None, ref_max_score=None, **_):
    """Stores episodes of images as an import does. Those of odd length that end in a terminal state lack their last
    frame, which nothing needs."""
    frames, columns, starts = [], [], []
    for buffer in buffers:
        terminals, n = np.array(buffer.terminations, bool), len(buffer.rewards)
        timeouts = np.append(buffer.truncations[:-1], True).astype(bool) & ~terminals
        starts.append(sum(map(len, frames)))
        frames.append(buffer.observations[: n + 1 - (n % 2 and terminals[-1])])
        columns.append((np.reshape(buffer.actions, (n, -1)), buffer.rewards, terminals, timeouts))
    actions, rewards, terminals, timeouts = map(np.concatenate, zip(*columns))
    arrays = {"frames": np.concatenate(frames), "starts": np.array(starts), "actions": actions.astype(np.int64)}
    arrays |= {"rewards": rewards.astype(np.float32), "terminals": terminals, "timeouts": timeouts}
    space = action_space or gym.make(env).action_space
    low, sizes = np.ravel(space.start), np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))
    metadata = {"format": 1, "kind": "frames", "frame_max": 255, "environment": env and {"id": env, "wrappers": []}}
    metadata |= {"action_low": low.tolist(), "action_high": (low + sizes - 1).tolist()}
    metadata |= {} if ref_min_score is None else {"reference_scores": [ref_min_score, ref_max_score]}
    return write_frames(name, arrays, metadata)


def write_frames(name, arrays, metadata):
    folder = Path(os.environ["MINARI_DATASETS_PATH"], name)
    folder.mkdir(parents=True)
    for key, array in arrays.items():
        np.save(folder / f"{key}.npy", array)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return name


def slow_stacks(data, n):
    """The stack of n frames at each row and the one after it, which is None where it is not stored: one frame at a
    time, with zeros before the start of an episode."""
    starts, pairs, episode, t = [*data["starts"], len(data["frames"])], [], 0, 0
    for end in data["terminals"] | data["timeouts"]:
        first, after = starts[episode], starts[episode + 1]

        def stack(t, first=first, after=after):
            if first + t >= after:
                return None
            frames = [data["frames"][first + i] if i >= 0 else 0 * data["frames"][0] for i in range(t + 1 - n, t + 1)]
            return np.concatenate([frame.reshape(-1, *frame.shape[-2:]) for frame in frames])

        pairs.append((stack(t), stack(t + 1)))
        episode, t = (episode + 1, 0) if end else (episode, t + 1)
    return pairs


def observations_of(script, data):
    """Returns what a policy takes at each row of the data."""
    if not WORLDS[script.__name__].pixels:
        return data["observations"]
    return np.stack([stack for stack, _ in slow_stacks(data, PIXELS["frame_stack"])])


@pytest.fixture(autouse=True)
def left_behind():
    """Clears what a run leaves behind that ends early: denormal numbers are off, and the signal is stored."""
    yield
    torch.set_flush_denormal(False)
    for name in SCRIPTS:
        if name in sys.modules:
            sys.modules[name].Signals.received = 0


def interrupt(script, config, number=15, **options):
    """The exit status of a run that a signal ends before the next update."""
    script.Signals.received = number
    with pytest.raises(SystemExit) as end:
        script.train(config, **options)
    script.Signals.received = 0
    return end.value.code


@pytest.fixture
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def storing(script):
    return store_frames if WORLDS[script].pixels else store


@pytest.fixture(params=SCRIPTS, scope="session")
def script(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        WORLDS[request.param].enter(patch)
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        storing(request.param)(DATASET, record("Counter-v0", range(100, 120)), env="Counter-v0")
        yield importlib.import_module(request.param)


@pytest.fixture
def new_dataset(script, tmp_path, monkeypatch):
    """Stores buffers under a name in a Minari root of this test only, which has DATASET too."""
    shutil.copytree(os.environ["MINARI_DATASETS_PATH"], tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return lambda buffers, name="toy/new-v0", **options: storing(script.__name__)(name, buffers, **options)


@functools.cache
def option_names(script):
    return {field.name for field in dataclasses.fields(importlib.import_module(script).TrainConfig)}


def suited(script, **options):
    """Options of a tiny run, without those that only other scripts have. If there is an online phase, max_timesteps are
    the updates before it, and it has no steps unless they are given."""
    names, values = option_names(script.__name__), TINY | WORLDS[script.__name__].options | options
    if "online_iterations" in names:
        values = {"offline_iterations": values["max_timesteps"], "online_iterations": 0} | values
    others = set().union(*map(option_names, SCRIPTS)) - names
    return {name: value for name, value in values.items() if name not in others}


def tiny_config(script, path, **options):
    """The configuration of a tiny run in the folder path/run."""
    return script.TrainConfig(**suited(script, **{"checkpoints_path": str(path)} | options))


def make_agent(script, config):
    """An agent for Counter."""
    world = WORLDS[script.__name__]
    size = [config.frame_stack, *FRAME.shape] if world.pixels else 3
    return getattr(script, world.agent)(config, size, world.action_sizes, *([255.0] if world.pixels else []))


def tiny_arguments(script, **options):
    """Options of a tiny run as words of a command line."""
    return [f"--{name}={value}" for name, value in suited(script, **options).items()]


@pytest.fixture
def tiny(script, tmp_path):
    return functools.partial(tiny_config, script, tmp_path / "runs")


@pytest.fixture
def run(script, tiny):
    """Runs tiny(...) and returns its folder."""

    def train(**options):
        config = tiny(**options)
        script.train(config)
        return Path(config.checkpoints_path, config.run_id)

    return train


@pytest.fixture
def signals():
    """Restores the handlers of signals; until then a signal fails the test instead of killing all tests."""
    numbers = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    before = {number: signal.signal(number, lambda number, _: pytest.fail(f"signal {number}")) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command_line(script, monkeypatch, capsys, signals):
    """Runs the file as a program with these arguments; returns exit status, stdout, stderr."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return start


def slow_clock(patch, script):
    """Gives the script a clock that only moves in calls of the functions that `takes(owner, name, seconds)` names."""
    clock = types.SimpleNamespace(now=0.0)
    patch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*args, **options):
            clock.now += seconds
            return function(*args, **options)

        patch.setattr(owner, name, slow)

    return clock, takes


def refusal(function, *arguments, **options):
    """The exit status and the line of a call that must fail, as `main` prints it."""
    with pytest.raises(ValueError) as info:
        function(*arguments, **options)
    assert hasattr(info.value, "status"), f"a program would end in a traceback: {info.value!r}"
    line = " ".join(str(info.value).split())
    assert line and len(line) < 2000
    return info.value.status, line


def table(folder):
    """Rows of metrics.csv as strings, without the columns in which two equal runs differ."""
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return [{key: value for key, value in row.items() if key not in SPEEDS} for row in csv.DictReader(file)]


def weights(folder, name="policy.pt"):
    """All tensors of a file of a run, by their place in it; policy.pt holds everything that acts."""
    found, todo = {}, [("", torch.load(Path(folder, name), weights_only=True))]
    while todo:
        place, item = todo.pop()
        if isinstance(item, torch.Tensor):
            found[place] = item
        elif isinstance(item, (dict, list)):
            todo += [(f"{place}/{key}", x) for key, x in (item.items() if isinstance(item, dict) else enumerate(item))]
    return found


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def contents(folder):
    """Bytes and time of writing of every file below a folder, except for the lock of a run."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def train_until(script, root, options, event, place):
    """Trains in a process of its own, which SIGKILL ends at the place-th call of a function (of any function if event
    is None)."""
    calls = itertools.count()

    def watch(frame, kind, function):
        if kind in ("call", "c_call"):
            name = frame.f_code.co_qualname if kind == "call" else function.__qualname__
            if event in (None, name) and next(calls) == place:
                os.kill(os.getpid(), signal.SIGKILL)

    WORLDS[script].enter(pytest.MonkeyPatch())
    os.environ["MINARI_DATASETS_PATH"] = root
    module = importlib.import_module(script)
    config = module.TrainConfig(**options)
    if place is not None:
        sys.setprofile(watch)
    module.train(config)


def fork(function, *arguments):
    """A started process that calls the function: a fork of one that has imported torch, which takes seconds, but has
    never used it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gymnasium", "minari", "pyrallis", "pytest", "torch._dynamo", "wandb"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def train_apart(config, event=None, place=None):
    """The exit status of train_until: -9 if it was killed, 0 if the run ended, as it does without a place."""
    root = os.environ["MINARI_DATASETS_PATH"]
    with contextlib.closing(fork(train_until, type(config).__module__, root, vars(config), event, place)) as process:
        process.join()
        return process.exitcode


def execute(text, arguments, folder, environment):
    """Runs the text as a program in a folder, which sees nothing of this repository, in a session of its own. What it
    prints goes to the files out and err beside the folder."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder).with_name(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv, sys.dont_write_bytecode = ["program", *arguments], True
    sys.path[:] = [str(folder), *(x for x in sys.path if x not in ("", str(ROOT), str(ROOT / "tests")))]
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})


@pytest.fixture
def program(tmp_path):
    """Starts a program in the empty folder tmp_path/work, or in one that is given; what it prints goes to the files
    tmp_path/out and err."""
    processes = []

    def start(text, *arguments, folder=tmp_path / "work"):
        folder.mkdir(exist_ok=True)
        processes.append(fork(execute, text, arguments, folder, dict(os.environ)))
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        process.close()
