"""Measure updates per second of a script on random data, beside what this machine could reach, and beside a peer.

    python benchmarks/speed.py --layers 3 --variants compile=False precision=bfloat16,compile=True --peer ../CORL
    python benchmarks/speed.py --script discrete/cql_dqn --observation 8 --action 4 --batch 64 --layers 2
    python benchmarks/speed.py --script finetune/cql --env Hopper-v5 --layers 2 --variants - n_online_envs=4
    python benchmarks/speed.py --script offline/combo --variants real_ratio=1 real_ratio=0.5
    python benchmarks/speed.py --script offline/combo --part model --variants dynamics_members=1,dynamics_elites=1 -
    python benchmarks/speed.py --script offline/combo --part rollouts
    python benchmarks/speed.py --script offline/policy_constraint --layers 2 --variants - divergence=wasserstein
    OMP_NUM_THREADS=1 python benchmarks/speed.py --script discrete/cql_atari --batch 32 --peer ../d3rlpy
    python benchmarks/speed.py --variants GOMP_SPINCOUNT=10000 GOMP_SPINCOUNT=1000 GOMP_SPINCOUNT=0 --beside 0 1
    OMP_NUM_THREADS=1 python benchmarks/speed.py --copies 1 2 --variants - compile=True --peer ../CORL

A variant is a list of options of the script, of whole-number constants of its classes (`EnsembleCritic.max_rows=500`)
and, in capitals, of environment variables (`-`: none). Each variant runs in a process of its own. Windows of time
alternate between the variants, and the median counts. `--peer` is a checkout of CORL
(https://github.com/corl-team/CORL), whose classes and replay buffer are timed on the same job, with the threads that
the scripts set. The peer of discrete/cql_atari is DiscreteCQL of d3rlpy (https://github.com/takuseno/d3rlpy) with the
encoder, the head, the frames and the minibatch of the first variant; `--peer` is a virtual environment that has it:
    python -m venv ../d3rlpy && ../d3rlpy/bin/pip install torch==2.13.0 d3rlpy==2.8.1
Its packages are used where this environment lacks them, so torch is the same. Its target is always that of
target=double. `--env` also times the online steps of finetune/cql: acting, environment, file and buffer, without
updates. `--part` times one part of offline/combo instead: updates of its model, or imagined transitions. `--copies` is
the number of a variant's processes that run at once, as packed runs on one GPU or CPU do; the peer and the products
that utilisation refers to get as many, and the rates, of online steps too, are sums. `--beside` is the number of busy
processes that run at the same time. If either has several numbers, they are measured in turn. Rows are added to
benchmarks/results/speed.csv.

utilisation: updates per second times the operations of an update, divided by the rate that this machine reaches for the
products of a critic's hidden layer alone (forward and both gradients), in the same type, in the same run. The peer and
the products have the threads of this command's environment.
"""

import contextlib
import csv
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from common import ROOT, Parser
from torch.utils.flop_counter import FlopCounterMode

# The scripts' insides are what is timed.
from algorithms.discrete import cql_atari, cql_dqn
from algorithms.finetune import cql as finetune_cql
from algorithms.offline import combo, cql, policy_constraint

SCRIPTS = {
    "offline/cql": cql, "offline/combo": combo, "offline/policy_constraint": policy_constraint,
    "discrete/cql_dqn": cql_dqn, "discrete/cql_atari": cql_atari, "finetune/cql": finetune_cql,
}  # fmt: skip
N_ROWS = 100_000
N_FRAMES = 10_000
EPISODE = 1000  # transitions
COLUMNS = (
    "script", "variant", "beside", "device", "threads", "observation", "action", "batch", "layers", "actions",
    "updates_per_second", "slowest_window", "fastest_window", "ratio", "gflop_per_update", "matmul_gflop_per_second",
    "utilisation", "peak_memory_mb", "compile_seconds", "launches_per_update", "torch", "machine",
    "env", "env_steps_per_second", "copies", "part",
)  # fmt: skip


def random_data(job):
    rng = np.random.default_rng(0)
    data = {
        key: rng.standard_normal((N_ROWS, job.observation), dtype=np.float32)
        for key in ("observations", "next_observations")
    }
    data["actions"] = rng.uniform(-1, 1, (N_ROWS, job.action)).astype(np.float32)
    if job.script == "discrete/cql_dqn":
        data["actions"] = rng.integers(job.action, size=N_ROWS)
    data["rewards"] = data["returns"] = rng.standard_normal(N_ROWS, dtype=np.float32)
    return data | {key: np.arange(N_ROWS) % EPISODE == EPISODE - 1 for key in ("terminals", "timeouts")}


def frame_shape(config):
    """Grey images, or four planes for the encoder minatar."""
    return (4, 10, 10) if config.encoder == "minatar" else (84, 84)


def random_frames(job, config):
    """Data as load_dataset of discrete/cql_atari has them, with the indices of actions."""
    rng, rows = np.random.default_rng(0), np.arange(N_FRAMES)
    return {
        "frames": rng.integers(256, size=(N_FRAMES, *frame_shape(config)), dtype=np.uint8),
        "starts": rows[::EPISODE],
        "actions": rng.integers(job.action, size=N_FRAMES),
        "rewards": rng.standard_normal(N_FRAMES, dtype=np.float32),
        "terminals": rows % EPISODE == EPISODE - 1,
        "timeouts": np.zeros(N_FRAMES, bool),
    }


def count_operations(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def make_config(job, variant):
    """The script's configuration for the job, environment variables, and constants of classes as (class, name, value).
    Raises ValueError for an unknown name."""
    script = SCRIPTS[job.script]
    options = dict(option.partition("=")[::2] for option in variant.split(",") if variant != "-")
    variables = {name: options.pop(name) for name in list(options) if name.isupper()}
    constants = []
    for name in [name for name in options if name.count(".") == 1]:
        owner, attribute = name.split(".")
        kind = getattr(script, owner, None)
        known = isinstance(kind, type) and kind is not script.TrainConfig
        if not known or type(getattr(kind, attribute, None)) is not int:
            raise ValueError(f"no such whole-number constant of a class: {name}")
        constants.append((kind, attribute, int(options.pop(name))))
    kinds = {field.name: field.type for field in fields(script.TrainConfig)}
    if unknown := options.keys() - kinds.keys():
        raise ValueError(f"no such option: {', '.join(sorted(unknown))}")
    options = {name: script.convert(name, value, kinds[name]) for name, value in options.items()}
    never = dict.fromkeys(("eval_freq", "log_interval", "max_timesteps"), 10**9)
    sizes = {"batch_size": job.batch, "cql_n_actions": job.actions, "q_n_hidden_layers": job.layers}
    sizes["q_hidden_dims"] = "-".join(job.layers * ["256"])
    defaults = {name: value for name, value in (never | sizes).items() if name in kinds}
    return script.TrainConfig(device=job.device, **defaults | options), variables, constants


def apply_variant(job, variant):
    """Sets the constants. Returns the configuration."""
    config, _, constants = make_config(job, variant)
    for owner, name, value in constants:
        setattr(owner, name, value)
    return config


def prepare_script(job, variant):
    """Prepares the script's own agent and loop, with the job's sizes. Returns a function that runs updates and returns
    their number, the operations of one update, and the seconds of compilation."""
    script, config = SCRIPTS[job.script], apply_variant(job, variant)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if script is cql_atari:
        return prepare_frames(job, config)
    data = random_data(job)
    if script is cql_dqn:
        agent, data = script.DiscreteCQL(config, job.observation, [job.action]), script.td_columns(data, config)
        if config.head == "c51":
            agent.critic.atoms.copy_(torch.linspace(-10, 10, config.n_atoms))
    elif script is policy_constraint:
        agent = script.PolicyConstraint(config, job.observation, job.action)
        if config.value_penalty and config.behaviour == "data":
            data["next_actions"] = data["actions"]
    else:
        agent = script.CQL(config, job.observation, job.action)
    buffer, run = script.ReplayBuffer(data, job.device), script.Run(config, 10**9)
    if script is combo:
        return prepare_combo(job, config, agent, buffer, run)
    return prepare_updates(script, config, agent, buffer.sample, run)


def prepare_frames(job, config):
    """Does the same for discrete/cql_atari."""
    data = random_frames(job, config)
    frames = cql_atari.Frames(data, config)
    agent = cql_atari.DiscreteCQL(config, frames.shape, [job.action], 255.0)
    if config.head == "c51":
        agent.critic.atoms.copy_(torch.linspace(config.v_min, config.v_max, config.n_atoms))
    buffer = cql_atari.ReplayBuffer(cql_atari.td_columns(data, config), job.device)
    with contextlib.redirect_stdout(None):
        frames.load(buffer, config)
    sample = cql_atari.Ranks(config).sampler(buffer, frames)
    return prepare_updates(cql_atari, config, agent, sample, cql_atari.Run(config, 10**9))


def prepare_combo(job, config, agent, buffer, run):
    """Does the same for updates of the agent with imagined transitions, for updates of the model, or for imagined
    transitions."""
    imagination = combo.Imagination(config, types.SimpleNamespace(arguments={"id": "none"}), agent, buffer, run)
    steps = itertools.count(0, config.rollout_freq)

    def generate():
        step = next(steps)
        imagination.generate(step)
        return int(imagination.counts[step // config.rollout_freq % config.model_retain])

    if job.part == "rollouts":
        return generate, count_operations(generate) / generate(), 0.0
    if job.part == "model":
        return prepare_updates(combo, config, imagination.model.dynamics, imagination.model.sample)
    imagination.refresh(0)
    return prepare_updates(combo, config, agent, imagination.sample, run)


def prepare_updates(script, config, agent, sample, run=None):
    """Does the same for updates as a run makes them: the run, if any, adds up their metrics, but is not begun."""
    operations = count_operations(lambda: agent.update(sample(config.batch_size)))
    started = time.perf_counter()
    run_until = script.updater(config, agent, sample, run)

    def update():
        run_until(agent.n_updates + script.GRAPH_UPDATES)
        return script.GRAPH_UPDATES

    return update, operations, time.perf_counter() - started


def prepare_online(job, variant):
    """Does the same for online steps of finetune/cql: the function makes one step in each environment."""
    config = apply_variant(job, variant)
    options = {"env": "none", "eval_env": job.env, "offline_iterations": 0, "online_iterations": 10**9}
    options |= {"failure_reward": config.failure_reward or 0.0, "normalize": False, "buffer_size": 10**5}
    # The open file stays until the process ends.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        config = replace(config, checkpoints_path=folder, **options)
        run = finetune_cql.Run(config, config.online_iterations)
        task, agent, buffer, _, failure_reward = finetune_cql.prepare(config, None, run)
        collector = finetune_cql.Collector(config, task, agent, buffer, run, failure_reward)
    return collector.step, 1, 0.0


def prepare_peer(job, path):
    """Does the same for CORL's classes, with d4rl and gym replaced by empty modules: an update does not use them."""
    for name in ("d4rl", "gym"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].Env = object
    spec = importlib.util.spec_from_file_location("peer", Path(path) / "algorithms/offline/cql.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    torch.manual_seed(0)
    critics = [peer.FullyConnectedQFunction(job.observation, job.action, True, job.layers) for _ in range(2)]
    actor = peer.TanhGaussianPolicy(job.observation, job.action, 1.0, orthogonal_init=True)
    adam = {net: torch.optim.Adam(net.to(job.device).parameters(), 3e-4) for net in (*critics, actor)}
    trainer = peer.ContinuousCQL(
        *(x for critic in critics for x in (critic, adam[critic])), actor, adam[actor],
        target_entropy=-float(job.action), cql_n_actions=job.actions, cql_alpha=10.0, device=job.device,
    )  # fmt: skip
    buffer = peer.ReplayBuffer(job.observation, job.action, N_ROWS, job.device)
    buffer.load_d4rl_dataset(random_data(job))

    def update():
        trainer.train([x.to(job.device) for x in buffer.sample(job.batch)])
        return 1

    return update, count_operations(update), 0.0


def packages_of(path):
    """The folder of packages of a virtual environment that has this Python's version."""
    return Path(path) / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def prepare_d3rlpy(job, path):
    """Does the same for d3rlpy's DiscreteCQL on the job of the first variant, as its `fit` updates it, without its log.
    Its network has the script's own encoder."""
    sys.path.append(str(packages_of(path)))
    with contextlib.redirect_stderr(io.StringIO()):  # of gym, which d3rlpy imports
        import d3rlpy

    class Factory(d3rlpy.models.EncoderFactory):
        def create(self, observation_shape):
            return cql_atari.make_encoder(config.encoder, list(observation_shape), config.hidden_dim)

    config = apply_variant(job, job.variants[0])
    torch.manual_seed(0)
    data = random_frames(job, config)
    frames = data["frames"].reshape(N_FRAMES, -1, *data["frames"].shape[-2:])  # [T, C, Y, X]
    columns = [x.reshape(-1, EPISODE, *x.shape[1:]) for x in (frames, data["actions"], data["rewards"])]
    episodes = [d3rlpy.dataset.Episode(x, a[:, None], r[:, None], True) for x, a, r in zip(*columns)]
    stacker = d3rlpy.dataset.FrameStackTransitionPicker(config.frame_stack) if config.frame_stack > 1 else None
    heads = d3rlpy.models
    head = heads.QRQFunctionFactory(config.n_quantiles) if config.head == "qr" else heads.MeanQFunctionFactory()
    with contextlib.redirect_stdout(io.StringIO()):
        memory = d3rlpy.dataset.InfiniteBuffer()
        buffer = d3rlpy.dataset.ReplayBuffer(memory, episodes=episodes, transition_picker=stacker)
        agent = d3rlpy.algos.DiscreteCQLConfig(
            batch_size=config.batch_size, learning_rate=config.qf_lr, alpha=config.cql_alpha, q_func_factory=head,
            encoder_factory=Factory(), target_update_interval=config.target_update_period,
            observation_scaler=d3rlpy.preprocessing.PixelObservationScaler(), compile_graph="cuda" in job.device,
        ).create(job.device)  # fmt: skip
        agent.build_with_dataset(buffer)

    def update():
        agent.update(buffer.sample_transition_batch(config.batch_size))
        return 1

    return update, count_operations(update), 0.0


def prepare_limit(job, dtype):
    """Does the same for the products of a critic's hidden layer: forward, and the gradients of input and weights. For
    frames they have the size of a convolution's: about a thousand rows of 512 numbers."""
    cql.updater(cql.TrainConfig(compile=False), None, None)  # so that freed memory is kept, as in a run
    critics, actions = (1, 1) if job.script == "discrete/cql_dqn" else (2, 1 + 3 * job.actions)
    rows, width = job.batch * actions, 256
    if job.script == "discrete/cql_atari":
        critics, rows, width = 1, 32 * job.batch, 512
    x, y = (torch.randn(critics, rows, width, device=job.device).to(getattr(torch, dtype)) for _ in range(2))
    weight = torch.randn(critics, width, width, device=job.device).to(x.dtype)

    def products():
        torch.bmm(x, weight), torch.bmm(y, weight.mT), torch.bmm(x.mT, y)
        return 3 * critics * 2 * rows * width * width

    return products, 1, 0.0


def count_launches(function, device):
    """Launches (of kernels and graphs) per update on a GPU; None on a CPU."""
    if "cuda" not in device:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        n = sum(function() for _ in range(10))
    return sum(event.count for event in profiler.key_averages() if "Launch" in event.key) / n


def print_profile(variant, function):
    """Where the CPU's time goes: microseconds and calls per update of the costliest operations, without what they call.
    What is missing from the time of an update is Python's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        n = sum(function() for _ in range(5))
    for event in sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:15]:
        times = f"{event.self_cpu_time_total / n:9.1f} us {event.count / n:7.1f} calls of {event.key[:40]}"
        print(f"{variant}: {times}", flush=True)


def peak_memory(device):
    """The peak memory of the device, or of the process, in MB."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def cpu_name():
    """The name of the CPU and, if Linux tells them, its instructions for matrix products."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = [line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")]
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in text]
    return " ".join([names[0] if names else platform.machine(), *features])


def work(connection, job, kind, variant):
    """Runs in a process of its own: prepares, then runs one window for each number of seconds that it receives."""
    warnings.simplefilter("ignore")
    before = peak_memory(job.device)
    peer = prepare_d3rlpy if job.script == "discrete/cql_atari" else prepare_peer
    kinds = {"script": prepare_script, "online": prepare_online, "peer": peer, "limit": prepare_limit}
    function, operations, seconds = kinds[kind](job, variant)
    for _ in range(5):  # on a GPU updates are recorded in the fourth call
        function()
    if job.profile and kind == "script":
        print_profile(variant, function)
    launches = count_launches(function, job.device)
    connection.send((operations, seconds, launches, peak_memory(job.device) - before, torch.get_num_threads()))
    while duration := connection.recv():
        if "cuda" in job.device:
            torch.cuda.synchronize()
        n, started = 0, time.perf_counter()
        while time.perf_counter() - started < duration:
            n += function()
        if "cuda" in job.device:
            torch.cuda.synchronize()
        connection.send(n / (time.perf_counter() - started))


@contextlib.contextmanager
def beside(n):
    """Keeps n processes busy for as long as the context lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def start(job, kind, variant):
    """Starts a process and waits until it is ready. Returns its connection and what it measured so far."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    variables = make_config(job, variant)[1] if kind in ("script", "online") else {}
    with patch.dict(os.environ, variables):
        context.Process(target=work, args=(theirs, job, kind, variant), daemon=True).start()
    theirs.close()  # so that the wait ends if the process fails
    return connection, connection.recv()


def compare(job):
    """One row per variant, and one for the peer, for each number of busy processes and of copies."""
    specs = [("limit", "float32"), ("limit", "bfloat16")] + [("script", variant) for variant in job.variants]
    specs += [("peer", job.peer)] if job.peer else []
    online = [("online", variant) for variant in job.variants if job.env]
    # Started one after the other, since compiling uses all cores.
    workers = [[start(job, *spec) for _ in range(max(job.copies))] for spec in specs + online]
    rows = []
    for n_beside, copies in itertools.product(job.beside, job.copies):
        rates = [[] for _ in workers]
        with beside(n_beside):
            for _ in range(job.windows):
                for group, found in zip(workers, rates):
                    for connection, _ in group[:copies]:
                        connection.send(job.seconds)
                    found.append(sum(connection.recv() for connection, _ in group[:copies]))
        limits = dict(zip(("float32", "bfloat16"), map(statistics.median, rates)))
        base = statistics.median(rates[len(specs) - 1 if job.peer else 2])
        steps = {variant: statistics.median(found) for (_, variant), found in zip(online, rates[len(specs) :])}
        for (kind, variant), group, found in list(zip(specs, workers, rates))[2:]:
            limit = limits["bfloat16" if "bfloat16" in variant else "float32"]
            name = job.peer_name if kind == "peer" else variant
            rows.append(make_row(job, name, n_beside, group[0][1], found, base, limit))
            rows[-1] |= {"copies": len(group[:copies]), "part": job.part}
            if job.script == "discrete/cql_atari":
                config = make_config(job, job.variants[0] if kind == "peer" else variant)[0]
                size = math.prod(frame_shape(config)) * config.frame_stack
                rows[-1] |= {"observation": size, "layers": None, "actions": None}
            if name in steps:
                rows[-1] |= {"env": job.env, "env_steps_per_second": round(steps[name], 1)}
    for connection, _ in itertools.chain(*workers):
        connection.send(None)
    return rows


def make_row(job, name, n_beside, prepared, rates, base, limit):
    (operations, seconds, launches, memory, threads), rate = prepared, statistics.median(rates)
    return {
        "script": job.script, "variant": name, "beside": n_beside, "device": job.device, "threads": threads,
        **{name: getattr(job, name) for name in ("observation", "action", "batch", "layers", "actions")},
        "updates_per_second": round(rate, 2), "slowest_window": round(min(rates), 2),
        "fastest_window": round(max(rates), 2), "ratio": round(rate / base, 2),
        "gflop_per_update": round(operations / 1e9, 4), "matmul_gflop_per_second": round(limit / 1e9, 1),
        "utilisation": round(rate * operations / limit, 3), "peak_memory_mb": round(memory),
        "compile_seconds": round(seconds, 1), "launches_per_update": launches, "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if "cuda" in job.device else cpu_name(),
    }  # fmt: skip


def check_peer(job, parser):
    """Sets its name, if a peer is given. Ends the program if it cannot be this job's."""
    if not job.peer:
        return
    if job.script not in ("offline/cql", "discrete/cql_atari"):
        parser.error(f"--peer {job.peer} is for --script offline/cql or discrete/cql_atari")
    job.peer_name, lacks = "CORL", Path(job.peer) / "algorithms/offline/cql.py"
    if job.script == "discrete/cql_atari":
        options = make_config(job, job.variants[0])[0]
        if options.head == "c51":
            parser.error(f"--peer {job.peer}: d3rlpy does not have the head c51 of the first variant")
        job.peer_name, lacks = f"d3rlpy {job.variants[0]}", packages_of(job.peer) / "d3rlpy"
    if not lacks.exists():
        parser.error(f"--peer {job.peer} does not have {job.peer_name.split()[0]}: it lacks {lacks}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--variants", nargs="+", default=["-"], help="options of the script, as name=value,name=value")
    add("--script", choices=SCRIPTS, default="offline/cql", help="script below algorithms/ (default %(default)s)")
    add("--peer", help="checkout of CORL, to compare offline/cql with; or d3rlpy's environment, for discrete/cql_atari")
    add("--part", choices=("model", "rollouts"), help="part of offline/combo to time instead of its agent's updates")
    add("--env", metavar="GYM_ID", help="environment of finetune/cql's online steps")
    add("--observation", type=int, default=17, help="numbers per observation (default %(default)s)")
    add("--action", type=int, default=6, help="numbers per action, or discrete actions (default %(default)s)")
    add("--batch", type=int, default=256, help="transitions per minibatch (default %(default)s)")
    add("--layers", type=int, default=3, help="hidden layers of each network (default %(default)s)")
    add("--actions", type=int, default=10, help="cql_n_actions (default %(default)s)")
    add("--beside", type=int, nargs="+", default=[0], metavar="N", help="number of busy processes meanwhile")
    add("--copies", type=int, nargs="+", default=[1], metavar="N", help="number of processes of a variant at once")
    add("--profile", action="store_true", help="print the costliest operations of each variant")
    add("--windows", type=int, default=7, help="windows per variant (default %(default)s)")
    add("--seconds", type=float, default=3.0, help="length of a window (default %(default)s)")
    add("--device", default=cql.TrainConfig().device, help="cpu or cuda (default %(default)s)")
    add("--output", type=Path, default=ROOT / "benchmarks/results/speed.csv", help="table (default %(default)s)")
    job = parser.parse_args()
    for variant in job.variants:
        try:
            make_config(job, variant)
        except ValueError as error:
            parser.error(f"--variants {variant}: {error}")
    if min(job.beside) < 0:
        parser.error(f"--beside takes numbers of at least 0, not {min(job.beside)}")
    if min(job.copies) < 1:
        parser.error(f"--copies takes numbers of at least 1, not {min(job.copies)}")
    if job.env and job.script != "finetune/cql":
        parser.error(f"--env {job.env} is for --script finetune/cql")
    if job.part and job.script != "offline/combo":
        parser.error(f"--part {job.part} is for --script offline/combo")
    check_peer(job, parser)

    rows = compare(job)
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items() if value not in (None, "")))
    new = not job.output.exists()
    with open(job.output, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
