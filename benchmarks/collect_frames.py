"""Train DQN or QR-DQN online from images, and store every transition that it met: the data of a "DQN replay".

    python benchmarks/collect_frames.py --env MinAtar/Breakout-v1 --steps 500000 --id minatar/breakout-replay-v0
    python benchmarks/collect_frames.py --env ALE/Pong-v5 --algo qrdqn --steps 1000000 --id pong/replay-v0

The agents are Stable-Baselines3's DQN and SB3-Contrib's QRDQN. Images below 36 pixels, such as MinAtar's planes, get
MinAtar's network (a convolution of 16 filters, a layer of 128), larger ones the agents' own. ALE's games are played
with Gymnasium's AtariPreprocessing: one grey 84 x 84 frame every fourth frame, sticky actions of 0.25; the agent sees
the last four (zeros before the start) and rewards clipped to -1, 0 or 1. The dataset holds each frame once, and the
rewards as the environment gave them.

The dataset goes to $MINARI_DATASETS_PATH (default ~/.minari/datasets), in the form `frames`, which cql_atari.py reads.
It has exactly --steps transitions in the order in which they were met: the last episode is cut there and marked as a
time-out. The same seed gives the same data on the same machine with the same number of threads. Exit status: 0 stored,
1 cannot be done, 2 a bad value on the command line. An error is one line on stderr and stores nothing.
"""

import csv
import importlib
import math
import shlex
from pathlib import Path

import gymnasium as gym
import numpy as np
from collect import free_place, parse_dataset_id
from common import Parser, fail, make_env, one_line_errors, reference_scores
from import_frames import STEP_LIMIT, atari, store_frames
from tqdm import tqdm

LARGE = 36  # pixels a side that the agents' own network needs
FRAME_STACK = 4
EVERY = 10_000  # steps between two lines of the curve


def need(module):
    """The module of an optional package."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        fail(1, f"the package {error.name.partition('.')[0]} is missing: pip install -r requirements-extra.txt")


class Planes(gym.ObservationWrapper):
    """Images as uint8 [H, W] or [C, H, W], from booleans or uint8, [H, W] or [H, W, C]."""

    def __init__(self, env):
        super().__init__(env)
        space = env.observation_space
        if not (isinstance(space, gym.spaces.Box) and space.dtype in (bool, np.uint8) and len(space.shape) in (2, 3)):
            fail(1, f"--env {env.spec.id} has no observations of images, uint8 or bool, [H, W] or [H, W, C]: {space}")
        if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
            fail(1, f"--env {env.spec.id} has actions that are not numbered from 0: {env.action_space}")
        self.high = 1 if space.dtype == bool else 255
        shape = self.observation(np.zeros(space.shape, space.dtype)).shape
        self.observation_space = gym.spaces.Box(0, self.high, shape, np.uint8)

    def observation(self, observation):
        return np.moveaxis(observation, -1, 0).astype(np.uint8) if observation.ndim == 3 else observation


class Recorder(gym.Wrapper):
    """Keeps the first n_steps transitions of an environment of uint8 images in arrays that are made once."""

    def __init__(self, env, n_steps):
        super().__init__(env)
        # a frame a row, and one more after each time-out: memory that is never written is never taken
        self.frames = np.empty((2 * n_steps + 1, *env.observation_space.shape), np.uint8)
        self.actions, self.rewards = np.empty(n_steps, np.int64), np.empty(n_steps, np.float32)
        self.terminals, self.timeouts = np.zeros((2, n_steps), bool)
        self.n_frames = self.n_rows = 0
        self.starts, self.ends, self.returns = [], [], []  # first frames and ends in rows of episodes; their returns
        self.total = 0.0

    @property
    def full(self):
        return self.n_rows == len(self.rewards)

    def keep(self, frame):
        self.frames[self.n_frames] = frame
        self.n_frames += 1

    def reset(self, **options):
        observation, info = self.env.reset(**options)
        if not self.full:
            self.starts.append(self.n_frames)
            self.keep(observation)
            self.total = 0.0
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not self.full:
            row = self.n_rows
            self.actions[row], self.rewards[row] = action, reward
            self.terminals[row], self.timeouts[row] = terminated, truncated and not terminated
            self.n_rows += 1
            self.total += float(reward)
            if not terminated:
                self.keep(observation)
            if terminated or truncated:
                self.ends.append(self.n_rows)
                self.returns.append(self.total)
        return observation, reward, terminated, truncated, info

    def columns(self):
        """The columns of the dataset, once it is full: frames uint8 [F, ...], starts int64 [E], the rest [T]."""
        self.timeouts[-1] = not self.terminals[-1]
        return {
            "frames": self.frames[: self.n_frames],
            "starts": np.array(self.starts, np.int64),
            "actions": self.actions,
            "rewards": self.rewards,
            "terminals": self.terminals,
            "timeouts": self.timeouts,
        }


def make_images(env_id):
    """An environment of single uint8 images, and how the metadata describe it."""
    arguments, wrappers = {}, []
    if env_id.startswith("MinAtar/"):
        need("minatar.gym").register_envs()
    elif env_id.startswith("ALE/"):
        gym.register_envs(need("ale_py"))
        arguments = atari(env_id, (84, 84), 0.25, STEP_LIMIT)
        wrappers = arguments.pop("wrappers")
        del arguments["id"]
    env = make_env(env_id, **arguments)
    for name, options in wrappers:
        env = getattr(gym.wrappers, name)(env, **options)
    return Planes(env), {"id": env.spec.id, **arguments, "wrappers": wrappers}


def make_agent(args, recorder):
    """The agent, in the environment as it sees it."""
    from torch import nn

    package, name = {"dqn": ("stable_baselines3", "DQN"), "qrdqn": ("sb3_contrib", "QRDQN")}[args.algo]
    algorithm = getattr(need(package), name)
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class MinAtarNetwork(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 128)
            channels, height, width = space.shape
            size = 16 * (height - 2) * (width - 2)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(size, 128), nn.ReLU()
            )

        def forward(self, images):
            return self.layers(images)

    env, policy = recorder, {"net_arch": []}
    if len(env.observation_space.shape) == 2:
        env = gym.wrappers.FrameStackObservation(env, FRAME_STACK, padding_type="zero")
    if args.env.startswith("ALE/"):
        env = gym.wrappers.TransformReward(env, np.sign)
    if min(env.observation_space.shape[1:]) < LARGE:
        policy["features_extractor_class"] = MinAtarNetwork
    policy["normalize_images"] = recorder.env.high == 255
    return algorithm(
        "CnnPolicy",
        env,
        learning_rate=args.learning_rate,
        buffer_size=min(args.steps, 100_000),
        learning_starts=min(args.steps // 10, 5_000),
        batch_size=32,
        gamma=0.99,
        train_freq=args.train_freq,
        gradient_steps=1,
        target_update_interval=1_000,
        exploration_fraction=0.2,
        exploration_final_eps=args.epsilon,
        seed=args.seed,
        policy_kwargs=policy,
    )


def curve(ends, returns, n_steps):
    """Rows of the learning curve: step, episodes, mean_return, mean_length of the episodes that ended in the last
    EVERY steps."""
    ends, returns = np.array(ends, np.int64), np.array(returns)
    lengths = np.diff(ends, prepend=0)
    rows = []
    for first in range(0, n_steps, EVERY):
        last = min(first + EVERY, n_steps)
        own = (ends > first) & (ends <= last)
        means = [float(values[own].mean()) if own.any() else math.nan for values in (returns, lengths)]
        rows.append([last, int(own.sum()), *means])
    return rows


def collect(args):
    """Raises OSError."""
    root = free_place(args.id, args.force)
    env, environment = make_images(args.env)
    recorder = Recorder(env, args.steps)
    agent = make_agent(args, recorder)
    from stable_baselines3.common.callbacks import BaseCallback

    class Progress(BaseCallback):
        def _on_training_start(self):
            self.bar = tqdm(total=args.steps, unit="step", disable=None)

        def _on_step(self):
            self.bar.update(recorder.n_rows - self.bar.n)
            if recorder.full or recorder.n_rows % EVERY == 0:
                step, episodes, mean, length = curve(recorder.ends, recorder.returns, recorder.n_rows)[-1]
                self.bar.write(f"step {step}: {episodes} episodes, mean return {mean:.2f}, mean length {length:.1f}")
            return not recorder.full

        def _on_training_end(self):
            self.bar.close()

    agent.learn(args.steps, callback=Progress())
    outcome, last = "no complete episode", recorder.returns[-100:]
    words = f"everything that {args.algo.upper()} met online in {args.steps} steps of {args.env}, seed {args.seed}"
    if last:
        outcome = f"the last {len(last)} of {len(recorder.returns)} complete episodes return {np.mean(last):.2f}"
    options = {
        name: value for name, value in vars(args).items() if value is not None and name not in ("force", "curve")
    }
    metadata = {
        "action_low": [0],
        "action_high": [int(env.action_space.n) - 1],
        "frame_max": env.high,
        "environment": environment,
        "notes": [f"{words}; {outcome}"],
        "source": shlex.join(["collect_frames.py", *(f"--{name}={value}" for name, value in options.items())]),
    }
    if scores := reference_scores(args.env):
        metadata["reference_scores"] = list(scores)
    columns = recorder.columns()
    frames = columns.pop("frames")
    store_frames(args.id, frames.shape, [frames], columns, metadata, root, args.force)
    if args.curve:
        with open(args.curve, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["dataset", "step", "episodes", "mean_return", "mean_length"])
            for step, episodes, *means in curve(recorder.ends, recorder.returns, args.steps):
                rows.writerow([args.id, step, episodes, *(f"{mean:.3f}" for mean in means)])
    print(f"{args.id}: {words}; {outcome}; in {root / args.id}")


def parse_arguments(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--env", required=True, metavar="GYM_ID", help="Gymnasium id of an environment of images and discrete actions")
    add("--id", required=True, metavar="DATASET_ID", help="id of the new dataset: namespace/name-v0")
    add("--algo", choices=["dqn", "qrdqn"], default="dqn", help="the agent (default %(default)s)")
    add("--steps", type=int, default=500_000, help="size of the dataset (default %(default)s)")
    add("--train_freq", type=int, default=2, help="steps between two updates of the agent (default %(default)s)")
    add("--learning_rate", type=float, default=5e-4, help="Adam's (default %(default)s)")
    add("--epsilon", type=float, default=0.01, help="share of random actions after a fifth of the steps, before which "
        "it falls from 1 (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of environment and agent (default %(default)s)")
    add("--curve", type=Path, metavar="FILE.csv", help="a row per 10,000 steps: mean return and length of episodes")
    add("--force", action="store_true", help="replace an existing dataset")
    args = parser.parse_args(argv)
    parser.require({
        "--steps must be at least 1": args.steps >= 1,
        "--train_freq must be at least 1": args.train_freq >= 1,
        "--learning_rate must be a finite number above 0": 0 < args.learning_rate < math.inf,
        "--epsilon must be a probability, from 0 to 1": 0 <= args.epsilon <= 1,
        "--seed must be at least 0": args.seed >= 0,
    })  # fmt: skip
    try:
        parse_dataset_id(args.id)
    except (ValueError, TypeError):  # TypeError: without a version, minari 0.5.4
        parser.error(f"--id {args.id} is not an id, which looks like namespace/name-v0, two letters or more each")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    try:
        with one_line_errors("interrupted: nothing was stored"):
            collect(args)
    except OSError as error:
        fail(1, f"--id {args.id} cannot be stored: {error}")


if __name__ == "__main__":
    main()
