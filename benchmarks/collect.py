"""Record a Minari dataset with random actions, Gymnasium's LunarLander controller, or a policy.

    python benchmarks/collect.py --env LunarLanderContinuous-v3 --policy heuristic --noise 0.9 --steps 100000 \
        --id lunarlander-continuous/medium-v0
    python benchmarks/collect.py --env Hopper-v5 --policy runs/sac/policy.pt --id hopper/mine-v0
    python benchmarks/collect.py --env Hopper-v5 --policy agent.zip --algo ppo --id hopper/ppo-v0
    PYTHONPATH=. python benchmarks/collect.py --env Hopper-v5 --policy my_module:act --id hopper/rule-v0
    python benchmarks/collect.py --replay runs/sac --steps 50000 --id lunarlander-continuous/replay-v0

The policies are, in this order, LunarLander's controller; one of a run (one of your own copy of a script, with another
network, needs --script path/to/copy.py); an agent of Stable-Baselines3 or SB3-Contrib, whose zip and .pkl files can run
any code when they are opened; and a function of your own, from one observation to its action. The last command makes a
dataset of what a run of finetune/cql.py met online, from its first random actions on, as D4RL's "replay" datasets are.

The dataset goes to $MINARI_DATASETS_PATH (default ~/.minari/datasets). It is lossless and has exactly --steps steps:
the last episode is cut there and marked truncated. Exit status: 0 stored, 1 cannot be done, 2 a bad value on the
command line. An error is one line on stderr and stores nothing.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import minari
import numpy as np
from common import (
    MODULE_PATH,
    DataError,
    OptionError,
    Parser,
    check_actions,
    dataset_form,
    fail,
    make_env,
    one_line_errors,
    open_policy,
    prefix,
    reference_scores,
    refuse_masks,
)
from gymnasium.vector.utils import concatenate, create_empty_array
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import NAMESPACE_METADATA_FILENAME, namespace_hierarchy
from minari.storage import get_dataset_path
from tqdm import tqdm

STATEFUL = ("maskableppo", "recurrentppo")  # algorithms of SB3-Contrib: their policies take masks or a state
ROUNDING = 1e-6  # share of the range by which an action may be outside its bounds
N_ENVS = 16  # side by side, so that a network acts for all of them in one call


def storable(space):
    """Whether Minari stores it as arrays: not a text, a sequence, or a kind of the environment's own."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        return all(map(storable, space.spaces.values() if isinstance(space, gym.spaces.Dict) else space.spaces))
    kinds = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
    return isinstance(space, kinds)


def texts(space):
    """The parts of a Dict that are texts, also of a kind of its own, such as MiniGrid's missions. The scripts leave
    them out, too."""
    parts = space.items() if isinstance(space, gym.spaces.Dict) else ()
    return [key for key, part in parts if isinstance(part.sample(), str)]


def stack(space, items):
    """A batch of the items, as vector environments make it."""
    return concatenate(space, items, create_empty_array(space, len(items)))


class Episode:
    """An episode while it is recorded. Its randomness depends only on (seed, index), not on the other episodes."""

    def __init__(self, env, seed, index):
        self.env, self.index, self.rng = env, index, np.random.default_rng((seed, index))
        self.seed = int(self.rng.integers(2**31))  # seed + index would let two seeds share most of their episodes
        self.action_space = deepcopy(env.action_space)  # an environment may share its space with all its copies
        self.action_space.seed(int(self.rng.integers(2**31)))
        self.observations = [deepcopy(env.reset(seed=self.seed)[0])]  # an environment may reuse its arrays
        self.actions, self.rewards, self.terminated, self.truncated = [], [], False, False

    def step(self, action):
        observation, reward, self.terminated, self.truncated, _ = self.env.step(action)
        self.observations.append(deepcopy(observation))
        self.actions.append(action)
        self.rewards.append(reward)

    def complete(self, length):
        return length == len(self.rewards) and (self.terminated or self.truncated)

    def buffer(self, length):
        """The first `length` steps: [length + 1] observations, [length] of the rest; a cut is a truncation."""

        complete, last = self.complete(length), np.arange(length) == length - 1
        return EpisodeBuffer(
            seed=self.seed,
            observations=stack(self.env.observation_space, self.observations[: length + 1]),
            actions=stack(self.env.action_space, self.actions[:length]),
            rewards=np.array(self.rewards[:length], dtype=np.float64),
            terminations=last & (complete and self.terminated),
            truncations=last & (not complete or self.truncated),
        )


def record(envs, policy, steps, seed, noise=0.0, epsilon=0.0):
    """Record `steps` steps of `policy`, a function from running episodes to their actions.

    envs: copies of one environment; their number changes only the speed (and, through the batch size, the last bits of
    a network's actions). Returns the episodes as EpisodeBuffers, and the returns of the complete ones.
    """
    space = envs[0].action_space
    free, running, episodes, recorded = list(envs), [], [], 0
    with tqdm(total=steps, unit="step", disable=None) as bar:
        # ends when the episodes up to the first that still runs suffice: no later step can change the dataset
        while recorded < steps or running and sum(len(e.rewards) for e in episodes[: running[0].index + 1]) < steps:
            while free and recorded < steps:
                episodes.append(Episode(free.pop(), seed, len(episodes)))
                running.append(episodes[-1])
            actions = policy(running)
            if noise:
                normal = np.stack([episode.rng.standard_normal(space.shape) for episode in running])
                actions = np.clip(actions + noise * (space.high - space.low) / 2 * normal, space.low, space.high)
            if isinstance(space, gym.spaces.Box):
                actions = np.asarray(actions, dtype=space.dtype)  # before the step: what is stored is what was done
            for episode, action in zip(running, actions):
                uniform = epsilon and episode.rng.random() < epsilon
                episode.step(episode.action_space.sample() if uniform else action)
            recorded += len(running)
            bar.update(min(recorded, steps) - bar.n)
            free += [episode.env for episode in running if episode.complete(len(episode.rewards))]
            running = [episode for episode in running if not episode.complete(len(episode.rewards))]
    buffers, returns = [], []
    while steps:
        episode = episodes[len(buffers)]
        length = min(steps, len(episode.rewards))
        buffers.append(episode.buffer(length))
        if episode.complete(length):
            returns.append(sum(episode.rewards))
        steps -= length
    return buffers, returns


def make_policy(name, env, script=None):
    """'random', 'heuristic', 'module:function' or the path of a policy.pt -> a function from running episodes to their
    actions. Raises a DataError."""
    if name == "random":
        return lambda episodes: [episode.action_space.sample() for episode in episodes]
    if name == "heuristic":
        if env.spec.id not in ("LunarLander-v3", "LunarLanderContinuous-v3"):
            fail(1, f"--policy heuristic is for LunarLander-v3 and LunarLanderContinuous-v3, not for {env.spec.id}")
        from gymnasium.envs.box2d.lunar_lander import heuristic

        return lambda episodes: [heuristic(env, episode.observations[-1].tolist()) for episode in episodes]
    if is_function(name):
        return function_policy(name, env)
    _, policy = open_policy(Path(name), script)
    refuse_masks(name, policy)
    from algorithms.offline.cql import flatten

    def act(observations):
        return policy(flatten(stack(env.observation_space, observations), env.observation_space))

    with prefix(f"--policy {name} cannot act in {env.spec.id}"):
        check_actions(act([env.reset(seed=0)[0]]), env.action_space)
    return lambda episodes: act([episode.observations[-1] for episode in episodes])


def is_function(name):
    return not Path(name).exists() and bool(re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name))


def function_policy(name, env):
    """`module:function`, from an observation to an action, as a function from running episodes to their actions."""
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # one that the module imports
            raise
        raise OptionError(f"--policy {name}: {error} ({MODULE_PATH})") from error
    if not callable(act := getattr(found, function, None)):
        raise OptionError(f"--policy {name}: {module} has no function {function}")

    def actions(observations):
        return [fit(act(deepcopy(x)), env.action_space, name) for x in observations]  # it may write into its argument

    actions([env.reset(seed=0)[0]])
    return lambda episodes: actions([episode.observations[-1] for episode in episodes])


def fit(action, space, name):
    """An action of a foreign policy in the type of the space, whose bounds it may miss by rounding. Raises DataError
    for what the space does not contain."""
    fitted = action
    if isinstance(space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)):
        fitted = None
        with contextlib.suppress(RuntimeError, TypeError, ValueError):  # lists of lists, tensors with gradients
            values = np.asarray(action)
            if values.shape == space.shape and values.dtype.kind in "biuf" and np.isfinite(values).all():
                if isinstance(space, gym.spaces.Box) and space.dtype.kind == "f":
                    low, high = np.float64(space.low), np.float64(space.high)
                    inside = np.clip(values, low, high)
                    values = inside if (np.abs(inside - values) <= ROUNDING * (high - low)).all() else values
                converted = values.astype(space.dtype)[()]
                fitted = converted if space.dtype.kind == "f" or (converted == values).all() else None
    if fitted is None or not space.contains(fitted):
        raise DataError(f"--policy {name} acted {str(action)[:200]}, which is not in {space}")
    return fitted


def agent_policy(args, env):
    """The agent of Stable-Baselines3 in the zip file --policy, as a function from running episodes to their actions.
    Raises a DataError."""
    try:
        from stable_baselines3.common.base_class import BaseAlgorithm
        from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
    except ImportError as error:
        fail(1, f"--algo: the package {error.name} is missing: pip install -r requirements-extra.txt")
    known = {}
    for package in ("stable_baselines3", "sb3_contrib"):
        if importlib.util.find_spec(package):
            kinds = vars(importlib.import_module(package)).values()
            known |= {x.__name__.lower(): x for x in kinds if isinstance(x, type) and issubclass(x, BaseAlgorithm)}
    if (algo := args.algo.lower()) in STATEFUL:
        raise OptionError(f"--algo {args.algo} acts on more than an observation, which cannot be given to it")
    if algo not in known:
        packages = "" if "tqc" in known else "; the package sb3_contrib, which has more, is not installed"
        raise OptionError(f"--algo {args.algo} is not one of {', '.join(sorted({*known} - {*STATEFUL}))}{packages}")
    try:
        with warnings.catch_warnings(action="ignore"):
            agent = known[algo].load(args.policy, device="cpu")
    except Exception as error:  # a file of another algorithm or version raises nearly anything
        problem = f"--policy {args.policy} cannot be loaded as --algo {args.algo}"
        raise DataError(f"{problem}: {type(error).__name__}: {error}") from error
    for own, other in ((agent.observation_space, env.observation_space), (agent.action_space, env.action_space)):
        if outline(own) != outline(other):
            raise DataError(f"--policy {args.policy} was trained with {own}, {env.spec.id} has {other}")
    normalise = lambda observations: observations  # noqa: E731
    if args.vecnormalize:
        try:
            statistics = VecNormalize.load(args.vecnormalize, DummyVecEnv([lambda: env]))
        except Exception as error:  # a file of another kind, or other sizes
            problem = f"--vecnormalize {args.vecnormalize} does not fit {env.spec.id}"
            raise DataError(f"{problem}: {type(error).__name__}: {error}") from error
        normalise = statistics.normalize_obs
    agent.set_random_seed(args.seed)  # of drawn actions

    def actions(observations):
        batch = normalise(stack(env.observation_space, observations))
        found, state = agent.predict(batch, deterministic=not args.stochastic)
        if state is not None:  # a recurrent agent under another name
            raise DataError(f"--policy {args.policy} keeps a state, which cannot be given to it")
        return [fit(action, env.action_space, args.policy) for action in found]

    actions([env.reset(seed=0)[0]])
    return lambda episodes: actions([episode.observations[-1] for episode in episodes])


def outline(space):
    """The part of a space that must be the same for an agent and an environment. Images may have their axes in any
    order."""
    if isinstance(space, gym.spaces.Dict):
        return {key: outline(part) for key, part in space.items()}
    return (
        type(space).__name__,
        sorted(space.shape or ()),
        np.ravel(getattr(space, "nvec", getattr(space, "n", 0))).tolist(),
    )


def free_place(dataset_id, force):
    """Minari's root, if the dataset can be stored there. Raises OSError and DataError."""
    root = get_dataset_path()
    target = root / dataset_id
    if not os.access(root, os.W_OK):
        raise PermissionError(f"no permission to write in {root}")
    for folder in list(target.parents)[: len(Path(dataset_id).parts) - 1]:
        if dataset_form(folder):
            raise FileExistsError(f"{folder} is a dataset, which cannot hold another")
    if target.exists() and not (dataset_form(target) and force):
        raise FileExistsError(f"{target} exists; --force replaces a dataset")
    return root


def store(dataset_id, buffers, root, added=None, **metadata):
    """Write the dataset in a hidden folder of `root`, then move it to its place, so that it is whole or absent there.

    added: metadata that Minari does not store itself, such as reference scores where there is no environment.
    """
    target = root / dataset_id
    replaced = target.with_name(f".{target.name}.replaced")  # hidden from Minari, and there only for a moment
    with tempfile.TemporaryDirectory(prefix=".collect-", dir=root) as staging:
        # Minari's warnings ask for an author and a permalink; its default for images is lossy JPEG
        with patch.dict(os.environ, MINARI_DATASETS_PATH=staging), warnings.catch_warnings(action="ignore"):
            dataset = minari.create_dataset_from_buffers(dataset_id, buffers, jpeg_encoding=False, **metadata)
        dataset.storage.update_metadata(added or {})
        for namespace in namespace_hierarchy(parse_dataset_id(dataset_id)[0]):
            (root / namespace).mkdir(exist_ok=True)
            note = root / namespace / NAMESPACE_METADATA_FILENAME
            if not note.exists():  # where the disk ignores case, d4rl/ is Minari's D4RL/, whose note stays
                note.write_text("{}")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        Path(staging, dataset_id).rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def open_recorded(name):
    """A Minari dataset, downloaded if it is not here, and its environment as load_dataset returns it (or None). Raises
    DataError."""
    path = get_dataset_path(name)
    try:
        if not path.exists():
            minari.download_dataset(name)
        metadata = json.loads((path / "data" / "metadata.json").read_text(encoding="utf-8"))
        # If spaces are missing, Minari makes the environment, by an entry point that could name any code.
        if missing := {"observation_space", "action_space"} - metadata.keys():
            raise DataError(f"{name} cannot be read: its metadata lacks {', '.join(sorted(missing))}")
        dataset = minari.load_dataset(name)
        spec = dataset._eval_env_spec or dataset.env_spec
    except DataError:
        raise
    except Exception as error:  # the network's, h5py's, Minari's
        raise DataError(f"{name} cannot be read from {path}, nor downloaded: {error!r}") from error
    if not spec:
        return dataset, None
    environment = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
    environment["id"] = spec.id
    if spec.max_episode_steps:
        environment["max_episode_steps"] = spec.max_episode_steps
    environment["wrappers"] = [[wrapper.name, wrapper.kwargs] for wrapper in spec.additional_wrappers]
    return dataset, environment


def read_run(folder):
    """The checkpoint.pt of a run folder of finetune/cql.py. Raises DataError."""
    from algorithms.finetune import cql

    with prefix("--replay takes a run folder of finetune/cql.py"):
        return cql.load(Path(folder, "checkpoint.pt"), "cpu", "config", "online", "policy")


def read_replay(folder, state, n_steps, env):
    """The first n_steps online steps of the run (see Collector in finetune/cql.py) as EpisodeBuffers, in the order of
    their starts, and the returns of the complete ones. Raises OSError and ValueError."""
    space = env.observation_space
    size, action_size = state["policy"]["sizes"][:2]
    if not isinstance(space, gym.spaces.Box) or math.prod(space.shape) != size:
        raise ValueError(f"{folder} has observations of {size} numbers, {env.spec.id} {space}")
    if math.prod(env.action_space.shape) != action_size:
        raise ValueError(f"{folder} has actions of {action_size} numbers, {env.spec.id} {env.action_space}")
    if wrappers := state["online"].get("wrappers"):
        raise ValueError(f"it acted through {', '.join(wrappers)}, which the new dataset cannot record")
    rows = np.fromfile(Path(folder, "online.bin"), np.float32).reshape(-1, 2 * size + action_size + 4)
    if n_steps > state["online"]["n_rows"]:
        raise ValueError(f"{folder} has {state['online']['n_rows']} online steps, fewer than --steps {n_steps}")
    rows, buffers, returns = rows[:n_steps], [], []
    for number in np.unique(rows[:, -1]):
        own = rows[rows[:, -1] == number]
        observations = np.concatenate([own[:, :size], own[-1:, size + action_size : -4]])
        terminations, truncations = own[:, -3] > 0, own[:, -2] > 0
        if terminations[-1] or truncations[-1]:
            returns.append(own[:, -4].sum(dtype=np.float64))
        truncations[-1] = not terminations[-1]  # the end of the recording, too
        buffers.append(
            EpisodeBuffer(
                observations=observations.reshape(-1, *space.shape).astype(space.dtype),
                actions=own[:, size : size + action_size].reshape(-1, *env.action_space.shape),
                rewards=own[:, -4].astype(np.float64),
                terminations=terminations,
                truncations=truncations,
            )
        )
    return buffers, returns


def parse_arguments(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--env", metavar="GYM_ID", help="Gymnasium id; MODULE:ID imports the module that registers it")
    add("--policy", help="random, heuristic (LunarLander's controller), a policy.pt, an agent.zip, or module:function")
    add("--algo", metavar="NAME", help="algorithm of an agent.zip of Stable-Baselines3 or SB3-Contrib, such as ppo")
    add(
        "--vecnormalize",
        type=Path,
        metavar="FILE.pkl",
        help="VecNormalize's statistics that the agent was trained with",
    )
    add(
        "--stochastic",
        action="store_true",
        default=None,
        help="draw the agent's actions instead of taking the likeliest",
    )
    add(
        "--replay", metavar="RUN_FOLDER", help="instead of --policy: the first online steps of a run of finetune/cql.py"
    )
    add("--id", required=True, metavar="DATASET_ID", help="Minari id of the new dataset: namespace/name-v0")
    add("--steps", type=int, default=100_000, help="size of the dataset (default %(default)s)")
    add("--noise", type=float, default=0.0, metavar="STD", help="Gaussian noise added to actions scaled to [-1, 1]")
    add("--epsilon", type=float, default=0.0, metavar="P", help="probability that an action is a uniformly random one")
    add("--seed", type=int, default=0, help="seed of episodes, noise and epsilon (default %(default)s)")
    add("--ref_min_score", type=float, help="return that scores 0 (default: known for LunarLander and D4RL's tasks)")
    add("--ref_max_score", type=float, help="return that scores 100; give both or neither")
    add("--force", action="store_true", help="replace an existing dataset")
    parser.add_script()
    args = parser.parse_args(argv)
    known, low, high = args.policy in ("random", "heuristic"), args.ref_min_score, args.ref_max_score
    stored = args.policy is not None and not known
    parser.require({
        "--env and --policy are needed, or --replay": args.replay or args.env and args.policy,
        "--policy, --noise and --epsilon do not go with --replay": not (
            args.replay and (args.policy or args.noise or args.epsilon)
        ),
        "--policy must be random, heuristic, a file or module:function": not stored or Path(args.policy).is_file() or
            is_function(args.policy),
        "--script goes with a policy.pt": args.script is None or
            stored and not args.algo and not is_function(args.policy),
        "--algo goes with an agent.zip as --policy": not args.algo or stored and Path(args.policy).is_file(),
        f"--policy {args.policy} needs its algorithm, such as --algo ppo": args.algo or not stored or
            Path(args.policy).suffix != ".zip",
        "--stochastic and --vecnormalize go with --algo": args.algo or not (args.stochastic or args.vecnormalize),
        "--steps must be at least 1": args.steps >= 1,
        "--noise must be a finite number of at least 0": 0 <= args.noise < math.inf,
        "--epsilon must be a probability, from 0 to 1": 0 <= args.epsilon <= 1,
        "--seed must be at least 0": args.seed >= 0,
        "--ref_min_score and --ref_max_score go together: give both or neither": (low is None) == (high is None),
        "--ref_min_score must be below --ref_max_score": None in (low, high) or -math.inf < low < high < math.inf,
    })  # fmt: skip
    try:
        parse_dataset_id(args.id)
    except (ValueError, TypeError):  # TypeError: without a version, minari 0.5.4
        parser.error(f"--id {args.id} is not a Minari id, which looks like namespace/name-v0, two letters or more each")
    return args


def collect(args):
    """Raises a DataError and OSError."""
    root = free_place(args.id, args.force)
    if args.replay:
        run = read_run(args.replay)
        args.env = args.env or run["config"]["eval_env"]
        if not args.env:
            fail(2, f"--replay {args.replay} acted in its dataset's environment: give it as --env")
    envs = [make_env(args.env) for _ in range(N_ENVS)]
    if left_out := texts(envs[0].observation_space):
        kept = [key for key in envs[0].observation_space if key not in left_out]
        envs = [gym.wrappers.FilterObservation(env, kept) for env in envs] if kept else envs
    env_id, space = envs[0].spec.id, envs[0].action_space
    try:
        gym.spec(env_id).to_json()  # Minari stores it, and fails where the entry point is not a text
    except Exception as error:
        fail(2, f"--env {args.env} cannot be stored: {error}")
    for kind in (space, envs[0].observation_space):
        if not storable(kind):
            fail(1, f"--env {env_id} has a space that cannot be stored as arrays: {kind}")
    if args.noise and not (isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and space.is_bounded()):
        fail(2, f"--noise {args.noise:g} needs bounded actions of real numbers, which {env_id} lacks: use --epsilon")
    if args.replay:
        policy = None
    elif args.algo:
        policy = agent_policy(args, envs[0])
    else:
        policy = make_policy(args.policy, envs[0], args.script)
    if left_out:
        print(f"{env_id}: left out of the observations, since they are texts: {', '.join(left_out)}")
    if args.ref_min_score is None:
        args.ref_min_score, args.ref_max_score = reference_scores(env_id) or (None, None)
    scores = {"ref_min_score": args.ref_min_score, "ref_max_score": args.ref_max_score}
    options = {name: value for name, value in vars(args).items() if value is not None and name != "force"}
    extras = [f"{name} {options[name]:g}" for name in ("noise", "epsilon") if options[name]]
    if args.replay:
        try:
            buffers, returns = read_replay(args.replay, run, args.steps, envs[0])
        except (OSError, ValueError) as error:
            fail(1, f"--replay {args.replay} cannot be used: {error}")
    else:
        buffers, returns = record(envs, policy, args.steps, args.seed, args.noise, args.epsilon)
    store(
        args.id,
        buffers,
        root,
        added=scores if args.ref_min_score is not None else None,
        env=gym.spec(env_id),
        observation_space=envs[0].observation_space,
        action_space=space,
        algorithm_name=", ".join(
            [args.policy or f"replay of {Path(args.replay).name}", *filter(None, [args.algo]), *extras]
        ),
        description=shlex.join(["collect.py", *(f"--{name}={value}" for name, value in options.items())]),
    )
    for env in envs:
        env.close()
    outcome = f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}" if returns else "no complete episode"
    print(f"{args.id}: {args.steps} steps, {len(buffers)} episodes, {outcome}, stored in {root / args.id}")


def main(argv=None):
    args = parse_arguments(argv)
    try:
        with one_line_errors("interrupted: nothing was stored"):
            collect(args)
    except OSError as error:
        fail(1, f"--id {args.id} cannot be stored: {error}")


if __name__ == "__main__":
    main()
