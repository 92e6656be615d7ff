"""Play the policy of a run, print the return of each episode, and record the episodes as videos.

    python benchmarks/record.py runs/<run>/policy.pt --env LunarLanderContinuous-v3 --episodes 10 --no_video
    python benchmarks/record.py runs/<run>/policy.pt --env LunarLanderContinuous-v3 --episodes 3 --output videos

The first command plays the episodes of a training run's evaluation with --eval_seed 0, and so gets the same return. The
second writes videos/LunarLanderContinuous-v3-seed-<seed>.mp4 for the seeds 0, 1 and 2; for one episode --output may
name the file. If --env names a dataset, the environment of the dataset is played, and its reference scores, if it has
any, give a score.

POLICY is a policy.pt or checkpoint.pt of any script; one of your own copy of a script, with another network, needs
--script path/to/copy.py. Videos need requirements-extra.txt, no screen, and for MuJoCo a renderer: EGL (on Debian the
packages libegl1 and libgl1) unless MUJOCO_GL names another. The frames of an episode stay in memory until it ends:
0.7 GB for 1,000 frames of 480 x 480 pixels. Exit status: 0 played, 1 cannot be done, 2 a bad command line. An error is
one line on stderr and leaves no part of a video.
"""

import contextlib
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
from common import (
    DataError,
    Parser,
    check_encoding,
    fail,
    know_games,
    know_robotics,
    local_dataset,
    make_env,
    one_line_errors,
    open_policy,
    prefix,
    refuse_masks,
)
from gymnasium.wrappers import RecordVideo


def without_renderer(message):
    """The DataError for what may be a missing renderer, which shows in errors of many kinds and of few words."""
    sys.unraisablehook = lambda _: None  # a renderer that was made in part fails again when it is collected
    name = os.environ.get("MUJOCO_GL", "")
    return DataError(f"{message} (MUJOCO_GL is {name!r}; egl needs no screen, but Debian's libegl1 and libgl1)")


def find_environment(name, script):
    """The id and arguments of the environment that --env means, and the data if it is a dataset, else an empty dict.
    Raises DataError."""
    know_games(name)
    if name in gym.registry or ":" in name or "/" not in name and not local_dataset(name):
        return {"id": name} | (getattr(script, "ATARI", {}) if name.startswith("ALE/") else {}), {}
    data = script.load_dataset(name)
    if not (environment := data.get("environment")):
        raise DataError(f"--env {name} names no environment: give the id of one")
    know_games(environment["id"])
    know_robotics(environment["id"])
    if environment["id"] not in gym.registry:  # a name in data could import any module
        cure = "give the id of one; MODULE:ID imports the module that registers it"
        raise DataError(f"--env {name} names {environment['id']}, which Gymnasium does not know: {cure}")
    return environment, data


def make(environment, **more):
    """The environment, without the wrappers of a recording. Raises DataError."""
    arguments = {name: value for name, value in environment.items() if name not in ("id", "wrappers")}
    try:
        return make_env(environment["id"], **arguments | more)
    except DataError as error:
        if isinstance(error.__cause__, (AttributeError, RuntimeError)):  # MuJoCo's, when it is imported
            raise without_renderer(error) from error
        raise


def follow(env):
    """Choose the camera that goes with the robot where its model has one; Gymnasium 1.4 takes one that stays behind."""
    if not {"camera_id", "camera_name"} & env.spec.kwargs.keys():
        with contextlib.suppress(AttributeError, KeyError):  # not MuJoCo, no such camera
            renderer = getattr(env.unwrapped, "ant_env", env.unwrapped).mujoco_renderer  # an AntMaze has an Ant
            renderer.camera_id = renderer.model.camera("track").id
    return env


def check_pictures(environment, modes):
    """Raises DataError where the environment does not render to arrays [H, W, 3]."""
    name = f"--env {environment['id']}"
    if "rgb_array" not in modes:
        raise DataError(f"{name} does not render rgb_array, only {modes}")
    try:
        env = follow(make(environment, render_mode="rgb_array"))
        env.reset(seed=0)
        frame = env.render()
        env.close()
    except Exception as error:  # any renderer's
        raise without_renderer(f"{name} cannot be rendered: {str(error) or repr(error)}") from error
    if np.shape(frame)[2:] != (3,):
        raise DataError(f"{name} renders {type(frame).__name__} of shape {np.shape(frame)}, not [H, W, 3]")


def is_whole(video, n_frames):
    import imageio_ffmpeg

    with contextlib.suppress(RuntimeError):  # where it is not a video
        return imageio_ffmpeg.count_frames_and_secs(video)[0] >= n_frames  # moviepy may repeat the last
    return False


def film(args, environment, play):
    """Plays one episode per seed and writes its video; yields paths and results. Raises DataError and OSError."""
    try:
        import imageio_ffmpeg  # noqa: F401
        import moviepy.video.io.ImageSequenceClip  # noqa: F401, else RecordVideo misses it after the first episode
    except ImportError as error:
        fail(1, f"the package {error.name.partition('.')[0]} is missing: pip install -r requirements-extra.txt")
    folder, name = args.output.parent if args.one_file else args.output, re.split("[/:]", environment["id"])[-1]
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".record-", dir=folder) as staging:

            def filmed():
                return RecordVideo(follow(make(environment, render_mode="rgb_array")), staging, lambda _: True)

            gym.register(f"filmed/{name}", entry_point=filmed, disable_env_checker=True)
            for seed in range(args.seed, args.seed + args.episodes):
                result = play({"id": f"filmed/{name}", "wrappers": environment.get("wrappers", ())}, 1, seed)
                (video,) = Path(staging).iterdir()  # written when the environment was closed
                if not is_whole(video, result["length"][0] + 1):  # moviepy ignores that ffmpeg failed
                    raise OSError("the video is incomplete: is the disk full?")
                path = args.output if args.one_file else folder / f"{name}-seed-{seed}.mp4"
                os.replace(video, path)
                yield f", {path}", result
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds videos
                path.rmdir()


def run(args):
    script, policy = open_policy(args.policy, args.script)
    refuse_masks(args.policy, policy)
    environment, data = find_environment(args.env, script)
    if data:
        check_encoding(args.policy, policy, args.env, data.get("encoding"))
    reference = data.get("reference_scores")

    def play(environment, n_episodes, seed):
        arguments = dict(environment)
        with prefix(f"{args.policy} could not be played in --env {args.env} from seed {seed} on"):
            return script.evaluate(policy, arguments.pop("id"), n_episodes, seed, **arguments)

    env, returns = make(environment), []
    env.close()
    if args.no_video:
        results = [("", play(environment, args.episodes, args.seed))]
    else:
        check_pictures(environment, env.metadata.get("render_modes", []))
        results = film(args, environment, play)
    for path, result in results:
        for total, length in zip(result["return"], result["length"]):
            print(f"seed {args.seed + len(returns)}: return {total:.1f}, {length} steps{path}")
            returns.append(total)
    scored = ""
    if reference is not None and reference[0] < reference[1]:
        scored = f", score {100 * (np.mean(returns) - reference[0]) / (reference[1] - reference[0]):.1f}"
    print(f"return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes{scored}")


def parse_arguments(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("policy", type=Path, metavar="POLICY", help="policy.pt or checkpoint.pt of a run")
    add("--env", required=True, metavar="ID", help="Gymnasium id or MODULE:ID, or a dataset, for its environment")
    add("--output", type=Path, metavar="PATH", help="folder for the videos, or a .mp4 file if there is one episode")
    add("--no_video", action="store_true", help="print the returns only")
    add("--episodes", type=int, default=1, help="number of episodes (default %(default)s)")
    add("--seed", type=int, default=0, help="episode i starts from seed + i (default %(default)s)")
    parser.add_script()
    args = parser.parse_args(argv)
    args.one_file = args.output is not None and args.output.suffix == ".mp4"
    parser.require({
        "--episodes must be at least 1": args.episodes >= 1,
        "--seed must be at least 0": args.seed >= 0,
        "give either --output, for videos, or --no_video": (args.output is None) == args.no_video,
        "--output must be a folder if there are several --episodes": args.episodes == 1 or not args.one_file,
    })  # fmt: skip
    return args


def main(argv=None):
    args = parse_arguments(argv)
    # Rendering without a screen, by MuJoCo and by pygame; both read these when they are imported, which is later.
    if sys.platform == "linux" and not args.no_video:  # MuJoCo refuses the value elsewhere
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    warnings.simplefilter("ignore")  # an error is one line, without warnings above it or at the exit
    try:
        with one_line_errors():
            run(args)
    except OSError as error:  # moviepy's, when ffmpeg stops, hold all that ffmpeg said
        fail(1, f"--output {args.output} cannot be written: {error.strerror or str(error)[:300]}")


if __name__ == "__main__":
    main()
