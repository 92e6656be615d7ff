"""Play a stored policy, the policy.pt or checkpoint.pt of a run of any script: print what its episodes return, and
record them as videos.

    python benchmarks/record.py runs/<run>/policy.pt --env LunarLanderContinuous-v3 --episodes 10 --no_video
    python benchmarks/record.py runs/<run>/policy.pt --env LunarLanderContinuous-v3 --episodes 3 --output videos

The first plays the episodes of an evaluation with --eval_seed 0, so that its return is too; the second writes
videos/LunarLanderContinuous-v3-seed-<seed>.mp4 for the seeds 0, 1 and 2. For one episode --output may name the file.
Where --env names a dataset, its environment is played, and its reference scores, if it has any, give a score.

Videos need requirements-extra.txt, no screen, and for MuJoCo a renderer: EGL (Debian: libegl1 libgl1) unless MUJOCO_GL
names another. The frames of an episode stay in memory until its end, 0.7 GB for 1,000 of 480 x 480 pixels. Exit status:
0 played, 1 cannot be done, 2 a bad command line; an error is one line on stderr and leaves no part of a video.
"""

import argparse
import contextlib
import inspect
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import RecordVideo
from minari.storage import get_dataset_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algorithms.offline.cql import DataError
from benchmarks.policies import DataErrors, load_policy


def fail(status, message):
    print(f"record.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def without_renderer(message):
    """The DataError for what may be a missing renderer, which shows in errors of many kinds and of few words."""
    sys.unraisablehook = lambda _: None  # a renderer that was made in part fails again when it is collected
    name = os.environ.get("MUJOCO_GL", "")
    return DataError(f"{message} (MUJOCO_GL is {name!r}; egl needs no screen, but Debian's libegl1 and libgl1)")


def make_task(args, policy):
    """What evaluates, in the script of the policy. Raises DataError."""
    script, network = inspect.getmodule(policy), policy.__self__
    paths = [get_dataset_path(prefix + args.env) for prefix in ("", "d4rl/")]
    is_dataset = args.env not in gym.registry and ("/" in args.env or any(path.exists() for path in paths))
    data = script.load_dataset(args.env) if is_dataset else {}
    # One transition of the policy's sizes stands for the data, so that these are compared with the environment's.
    observation, action = np.zeros((1, network.sizes[0])), np.zeros((1, network.action_low.numel()))
    data |= dict.fromkeys(script.COLUMNS, np.zeros(1)) | {"actions": action}
    data |= {"observations": observation, "next_observations": observation}
    options = {"n_episodes": args.episodes, "eval_seed": args.seed, "device": "cpu"}
    options |= {"env": str(args.policy), "eval_env": None if is_dataset else args.env}
    try:
        task = script.Task(script.TrainConfig(**options), data)
    except DataErrors as error:
        message = str(error).replace("; --eval_env takes another, or none", "")
        if isinstance(error.__cause__, (AttributeError, RuntimeError)):  # mujoco's, when it is imported
            raise without_renderer(f"--env {args.env}: {message}") from error
        fail(error.status, f"--env {args.env}: {message}")
    if not task.envs:
        raise DataError(f"--env {args.env} has no environment that Gymnasium knows: give the id of one")
    return task


def with_pictures(task):
    """Makes the task's environment anew, alone and so that it renders to arrays [H, W, 3]. Raises DataError."""
    name, modes = f"--env {task.envs.spec.id}", task.envs.envs[0].metadata.get("render_modes", [])
    task.envs.close()
    if "rgb_array" not in modes:
        raise DataError(f"{name} renders no rgb_array, only {modes}")
    arguments = task.arguments | {"render_mode": "rgb_array"}
    try:
        task.envs = inspect.getmodule(task).make_environments(task.config, 1, **arguments)
        follow(task.envs.envs[0])
        task.envs.reset(seed=0)
        frame = task.envs.envs[0].render()
    except Exception as error:  # of any renderer
        raise without_renderer(f"{name} cannot be rendered: {str(error) or repr(error)}") from error
    if np.shape(frame)[2:] != (3,):
        raise DataError(f"{name} renders {type(frame).__name__} of shape {np.shape(frame)}, not [H, W, 3]")


def follow(env):
    """Choose the camera that goes with the robot where its model has one; Gymnasium 1.4 takes one that stays behind."""
    if not {"camera_id", "camera_name"} & env.spec.kwargs.keys():
        with contextlib.suppress(AttributeError, KeyError):  # not of MuJoCo, no such camera
            renderer = getattr(env.unwrapped, "ant_env", env.unwrapped).mujoco_renderer  # an AntMaze has an Ant
            renderer.camera_id = renderer.model.camera("track").id


def is_whole(video, n_frames):
    import imageio_ffmpeg

    with contextlib.suppress(RuntimeError):  # where it is no video
        return imageio_ffmpeg.count_frames_and_secs(video)[0] >= n_frames  # moviepy may repeat the last
    return False


def play(args, task, policy):
    """The episodes of `task`, as rollout returns them. Raises DataError."""
    try:
        return task.rollout(policy)
    except inspect.getmodule(task).SimulatorError as error:
        raise DataError(f"--env {args.env}: in the episodes from seed {task.config.eval_seed} on {error}") from error


def record(args, task, policy):
    """A video an episode; yields their paths and results."""
    with_pictures(task)
    try:
        import imageio_ffmpeg  # noqa: F401
        import moviepy.video.io.ImageSequenceClip  # noqa: F401, else RecordVideo misses it after the first episode
    except ImportError as error:
        fail(1, f"the package {error.name.partition('.')[0]} is missing: pip install -r requirements-extra.txt")
    folder = args.output.parent if args.one_file else args.output
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".record-", dir=folder) as staging:
        env = RecordVideo(task.envs.envs[0], staging, episode_trigger=lambda _: True)
        task.envs.envs[0] = env
        for seed in range(args.seed, args.seed + args.episodes):
            task.config = replace(task.config, n_episodes=1, eval_seed=seed)
            result = play(args, task, policy)
            env.stop_recording()  # writes the file, as far as it gets: moviepy ignores that ffmpeg failed
            (video,) = Path(staging).iterdir()
            if not is_whole(video, result["length"][0] + 1):
                raise OSError("the video is incomplete: is the disk full?")
            path = args.output if args.one_file else folder / f"{env.spec.id.replace('/', '-')}-seed-{seed}.mp4"
            os.replace(video, path)
            yield f", {path}", result
        env.close()


def run(args):
    policy = load_policy(args.policy)
    task, returns = make_task(args, policy), []
    for path, result in [("", play(args, task, policy))] if args.no_video else record(args, task, policy):
        for total, length in zip(result["return"], result["length"]):
            print(f"seed {args.seed + len(returns)}: return {total:.1f}, {length:.0f} steps{path}")
            returns.append(total)
    row = task.score(np.array(returns))
    score = row["d4rl_normalized_score"]
    scored = "" if score is None else f", score {score:.1f}"
    print(f"return {row['eval_return']:.1f} ± {row['eval_return_std']:.1f} over {len(returns)} episodes{scored}")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="record.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail(2, message)
    add = parser.add_argument
    add("policy", type=Path, metavar="POLICY", help="policy.pt or checkpoint.pt of a run")
    add("--env", required=True, metavar="ID", help="Gymnasium id, or the name of a dataset, which has one")
    add("--output", type=Path, metavar="PATH", help="folder for the videos; for one episode: or an .mp4")
    add("--no_video", action="store_true", help="only print what the episodes return")
    add("--episodes", type=int, default=1, help="how many are played (default %(default)s)")
    add("--seed", type=int, default=0, help="episode i starts from seed + i (default %(default)s)")
    args = parser.parse_args(argv)
    args.one_file = args.output is not None and args.output.suffix == ".mp4"
    rules = {
        "--episodes must be at least 1": args.episodes >= 1,
        "--seed must be at least 0": args.seed >= 0,
        "give either --output, for videos, or --no_video": (args.output is None) == args.no_video,
        "--output must be a folder where there are several --episodes": args.episodes == 1 or not args.one_file,
    }
    for rule, kept in rules.items():
        if not kept:
            parser.error(rule)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    # Rendering without a screen, by MuJoCo and by pygame; both read these when they are imported, which is later.
    if sys.platform == "linux" and not args.no_video:  # MuJoCo refuses the value elsewhere
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    warnings.simplefilter("ignore")  # an error is one line, without warnings above it or at the exit
    try:
        run(args)
    except DataErrors as error:
        fail(error.status, error)
    except OSError as error:  # moviepy's, when ffmpeg stops, hold all that ffmpeg said
        fail(1, f"--output {args.output} cannot be written: {error.strerror or str(error)[:300]}")
    except KeyboardInterrupt:
        fail(130, "interrupted")


if __name__ == "__main__":
    main()
