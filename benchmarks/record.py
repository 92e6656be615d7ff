"""Record videos of a stored policy, the policy.pt or checkpoint.pt of a run, and print what its episodes return.

    python benchmarks/record.py runs/<run>/policy.pt --env LunarLanderContinuous-v3 --output videos --episodes 3

writes videos/LunarLanderContinuous-v3-seed-<seed>.mp4 for the seeds 0, 1 and 2; for one episode --output may name the
file. An episode is that of an evaluation with this --eval_seed, so that its return is too.

Needs requirements-extra.txt, no screen, and for MuJoCo a renderer: EGL (Debian: libegl1 libgl1) unless MUJOCO_GL names
another. The frames of an episode stay in memory until its end, 0.7 GB for 1,000 of 480 x 480 pixels. Exit status: 0
recorded, 1 cannot be done, 2 a bad command line; an error is one line on stderr and leaves no part of a video.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import RecordVideo
from minari.storage import get_dataset_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algorithms.offline.cql import (
    DataError,
    Task,
    TrainConfig,
    action_bounds,
    d4rl_files,
    flatten,
    make_environments,
    rollout,
)
from benchmarks.policies import load_policy

ACTION_SPACES = {"TanhGaussianActor": gym.spaces.Box, "QNetwork": (gym.spaces.Discrete, gym.spaces.MultiDiscrete)}


def fail(status, message):
    print(f"record.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def without_renderer(message):
    """The DataError for what may be a missing renderer, which shows in errors of many kinds and of few words."""
    sys.unraisablehook = lambda _: None  # a renderer that was made in part fails again when it is collected
    name = os.environ.get("MUJOCO_GL", "")
    return DataError(f"{message} (MUJOCO_GL is {name!r}; egl needs no screen, but Debian's libegl1 and libgl1)")


def make_environment(name):
    """By a Gymnasium id, or by a dataset's name as in training; without pictures. Raises DataError."""
    dataset = "/" in name or name in d4rl_files() or get_dataset_path(name).exists()
    eval_env = None if dataset and name not in gym.registry and ":" not in name else name
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # of a dataset without one it says that nothing is evaluated
            envs = make_environments(TrainConfig(env=name, eval_env=eval_env, n_episodes=1))
    except Exception as error:
        message = str(error).replace("--eval_env", "--env")
        if not isinstance(error, DataError):
            message = f"--env {name} cannot be made: {message}"
        elif not isinstance(error.__cause__, (AttributeError, RuntimeError)):  # mujoco's, when it is imported
            fail(error.status, message)
        raise without_renderer(message) from error
    if not envs:
        raise DataError(f"--env {name} has no environment that Gymnasium knows: give the id of one")
    return envs[0]


def with_pictures(env):
    """The same environment, made anew so that it renders to arrays [H, W, 3]. Raises DataError."""
    spec, modes = env.spec, env.metadata.get("render_modes", [])
    env.close()
    if "rgb_array" not in modes:
        raise DataError(f"--env {spec.id} renders no rgb_array, only {modes}")
    try:
        env = gym.make(spec, render_mode="rgb_array")
        follow(env)
        env.reset(seed=0)
        frame = env.render()
    except Exception as error:  # of any renderer
        raise without_renderer(f"--env {spec.id} cannot be rendered: {str(error) or repr(error)}") from error
    if np.shape(frame)[2:] != (3,):
        raise DataError(f"--env {spec.id} renders {type(frame).__name__} of shape {np.shape(frame)}, not [H, W, 3]")
    return env


def follow(env):
    """Choose the camera that goes with the robot where its model has one; Gymnasium 1.4 takes one that stays behind."""
    if not {"camera_id", "camera_name"} & env.spec.kwargs.keys():
        with contextlib.suppress(AttributeError, KeyError):  # not of MuJoCo, no such camera
            renderer = getattr(env.unwrapped, "ant_env", env.unwrapped).mujoco_renderer  # an AntMaze has an Ant
            renderer.camera_id = renderer.model.camera("track").id


def check_sizes(policy, env, path):
    """Raises DataError for a policy of another environment."""
    network, space = policy.__self__, env.action_space
    if not isinstance(space, ACTION_SPACES[type(network).__name__]):
        raise DataError(f"--env {env.spec.id} has actions {space}, which are not of the policy's kind")
    own = network.sizes[0], network.action_low.numel()  # an observation of size 1 would pass through any policy
    sizes = flatten(env.observation_space.sample(), env.observation_space).size, action_bounds(space)["action_low"].size
    if own != sizes:
        raise DataError(f"{path} has (observation, action) sizes {own}, but --env {env.spec.id} has {sizes}")


def is_whole(video, n_frames):
    import imageio_ffmpeg

    with contextlib.suppress(RuntimeError):  # where it is no video
        return imageio_ffmpeg.count_frames_and_secs(video)[0] >= n_frames  # moviepy may repeat the last
    return False


def record(args):
    policy = load_policy(args.policy)
    env = make_environment(args.env)
    check_sizes(policy, env, args.policy)
    env = with_pictures(env)
    try:
        import imageio_ffmpeg  # noqa: F401
        import moviepy.video.io.ImageSequenceClip  # noqa: F401, else RecordVideo misses it after the first episode
    except ImportError as error:
        fail(1, f"the package {error.name.partition('.')[0]} is missing: pip install -r requirements-extra.txt")
    folder = args.output.parent if args.one_file else args.output
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".record-", dir=folder) as staging:
        env = RecordVideo(env, staging, episode_trigger=lambda _: True)
        for seed in range(args.seed, args.seed + args.episodes):
            config = TrainConfig(n_episodes=1, eval_seed=seed)
            try:
                episode = rollout(config, Task([env]), policy)
            except Exception as error:  # of the simulator
                raise DataError(f"--env {args.env} failed in the episode from seed {seed}: {error!r}") from error
            total, length = float(episode["return"][0]), int(episode["length"][0])
            env.stop_recording()  # writes the file, as far as it gets: moviepy ignores that ffmpeg failed
            (video,) = Path(staging).iterdir()
            if not is_whole(video, length + 1):
                raise OSError("the video is incomplete: is the disk full?")
            path = args.output if args.one_file else folder / f"{env.spec.id.replace('/', '-')}-seed-{seed}.mp4"
            os.replace(video, path)
            print(f"seed {seed}: return {total:.1f}, {length} steps, {path}")
        env.close()


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="record.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail(2, message)
    add = parser.add_argument
    add("policy", type=Path, metavar="POLICY", help="policy.pt or checkpoint.pt of a run")
    add("--env", required=True, metavar="ID", help="Gymnasium id, or the name of a dataset, which has one")
    add("--output", type=Path, required=True, metavar="PATH", help="folder for the videos; for one episode: or an .mp4")
    add("--episodes", type=int, default=1, help="videos, one an episode (default %(default)s)")
    add("--seed", type=int, default=0, help="episode i starts from seed + i (default %(default)s)")
    args = parser.parse_args(argv)
    args.one_file = args.output.suffix == ".mp4"
    rules = {
        "--episodes must be at least 1": args.episodes >= 1,
        "--seed must be at least 0": args.seed >= 0,
        "--output must be a folder where there are several --episodes": args.episodes == 1 or not args.one_file,
    }
    for rule, kept in rules.items():
        if not kept:
            parser.error(rule)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    # Rendering without a screen, by MuJoCo and by pygame; both read these when they are imported, which is later.
    if sys.platform == "linux":  # MuJoCo refuses the value elsewhere
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    warnings.simplefilter("ignore")  # an error is one line, without warnings above it or at the exit
    try:
        record(args)
    except DataError as error:
        fail(error.status, error)
    except OSError as error:  # moviepy's, when ffmpeg stops, hold all that ffmpeg said
        fail(1, f"--output {args.output} cannot be written: {error.strerror or str(error)[:300]}")
    except KeyboardInterrupt:
        fail(130, "interrupted")


if __name__ == "__main__":
    main()
