"""benchmarks/record.py: the episodes of an evaluation, their videos, and the messages for users' errors."""

import ctypes.util
import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import DATASET, Counter, contents, continuous, kinds, table
from conftest import record as record_episodes

from algorithms.discrete import cql_dqn
from algorithms.offline import cql
from benchmarks import record


class Painted(Counter):
    """Counter with pictures, whose brightness is 20 t."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 48, 3), 20 * self.t, np.uint8)


class One(Painted):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def observe(self):
        return super().observe()[:1]


class Flat(Painted):
    def render(self):
        warnings.warn("of a renderer", stacklevel=1)
        return np.zeros((32, 48), np.uint8)


class NoScreen(Painted):
    def render(self):
        raise AttributeError("'NoneType' object has no attribute\n'eglQueryString'")


class Failing(Painted):
    def step(self, action):
        raise RuntimeError("simulation\nexploded")


for kind in (Painted, One, Flat, NoScreen, Failing):
    gym.register(f"{kind.__name__}-v0", entry_point=f"{__name__}:{kind.__name__}")


def store_policy(path, sizes=(3, 2), discrete=False):
    torch.manual_seed(0)
    actor = cql_dqn.QNetwork(*sizes, 16, 1, "dqn", 1) if discrete else cql.TanhGaussianActor(*sizes, 16, 1)
    cql.save(Path(path), {"sizes": list(actor.sizes), "weights": actor.state_dict()})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a policy.pt; what the program changes in its process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name, value in {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy"}.items():
        monkeypatch.setenv(name, value)
    store_policy("policy.pt")
    return tmp_path


@pytest.fixture
def frames():
    """Reads a video, [T, H, W, 3]."""
    pytest.importorskip("moviepy", reason="requirements-extra.txt is not installed")
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="requirements-extra.txt is not installed")

    def frames(path):
        reader = ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])

    return frames


def play(*options, env="Painted-v0", policy="policy.pt", output="videos"):
    output = ["--output", output] if output else ["--no_video"]
    record.main([str(policy), "--env", env, *output, *map(str, options)])


def refusal(capsys, *options, **named):
    """The exit status and the one line on stderr of a run that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        play(*options, **named)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and "error: " in printed.err, printed.err
    return stop.value.code, printed.err


@kinds
def test_plays_the_evaluation_of_a_run(run, new_dataset, capsys, monkeypatch, n_episodes=34):  # in two waves
    for name in ("moviepy", "imageio_ffmpeg"):  # not needed
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("MUJOCO_GL")
    dataset = new_dataset(record_episodes("Counter-v0", range(20)), env="Counter-v0")
    minari.load_dataset(dataset).storage.update_metadata({"ref_min_score": 2.0, "ref_max_score": 51.0})
    path = run(env=dataset, n_episodes=n_episodes, eval_seed=7)
    (*_, row), outcomes = table(path), []
    for env in (dataset, "Counter-v0"):
        capsys.readouterr()
        play("--episodes", n_episodes, "--seed", 7, env=env, policy=path / "policy.pt", output=None)
        *lines, last = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [f"seed {seed}" for seed in range(7, 7 + n_episodes)]
        assert all(f"{Counter.length(seed)} steps" in line for seed, line in enumerate(lines, start=7))
        outcomes.append(last)
    returned = "return {:.1f} ± {:.1f}".format(*(float(row[name]) for name in ("eval_return", "eval_return_std")))
    scored = f"{float(row['d4rl_normalized_score']):.1f}"
    assert outcomes[1] == f"{returned} over {n_episodes} episodes" and outcomes[0] == f"{outcomes[1]}, score {scored}"
    assert "MUJOCO_GL" not in os.environ


@continuous
@pytest.mark.parametrize("output", [None, "video.mp4"])
def test_environment_of_a_dataset_with_its_arguments(output, new_dataset, capsys, request):
    if output:
        request.getfixturevalue("frames")  # or it is skipped
    episodes, short = record_episodes("Painted-v0", range(3)), gym.make("Painted-v0", max_episode_steps=2).spec
    for name in ("toy/painted-v0", "painted-v0"):  # an id without a namespace
        capsys.readouterr()
        play("--seed", 1, env=new_dataset(episodes, name, env=short), output=output)
        assert ", 2 steps" in capsys.readouterr().out
    spaces = {"observation_space": Painted.observation_space, "action_space": Painted.action_space}
    status, line = refusal(capsys, env=new_dataset(episodes, "toy/nowhere-v0", **spaces))
    assert status == 1 and "--env toy/nowhere-v0" in line and "no environment" in line
    gym.register("Gone-v0", entry_point=f"{__name__}:Painted")
    name = new_dataset(episodes, "toy/gone-v0", env="Gone-v0")
    gym.registry.pop("Gone-v0")  # by a module, which no file imports
    status, line = refusal(capsys, env=name)
    assert status == 1 and "--env toy/gone-v0 names Gone-v0" in line and "MODULE:ID" in line
    play("--seed", 1, env=f"{__name__}:Painted-v0", output=None)
    assert f"{Counter.length(1)} steps" in capsys.readouterr().out


def test_an_episode_is_a_video_from_its_start_to_its_end(frames, capsys):
    Path("video.mp4").write_text("older")
    play("--episodes", 2, "--seed", 3)
    play("--seed", 5, output="video.mp4")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed")]
    play("--episodes", 3, "--seed", 3, output=None)
    without = capsys.readouterr().out.splitlines()
    names = ["videos/Painted-v0-seed-3.mp4", "videos/Painted-v0-seed-4.mp4", "video.mp4"]
    assert lines == [f"{line}, {name}" for line, name in zip(without, names)]
    assert sorted(os.listdir()) == ["policy.pt", "video.mp4", "videos"] and len(os.listdir("videos")) == 2
    for seed, name in enumerate(names, start=3):
        brightness, length = frames(name).mean(axis=(1, 2, 3)), Counter.length(seed)
        assert len(brightness) in (length + 1, length + 2)  # a repeated last frame is moviepy's
        assert brightness[: length + 1] == pytest.approx(20 * np.arange(length + 1), abs=3)


def test_incomplete_video_is_an_error_and_goes(frames, capsys, monkeypatch):
    stop_recording = record.RecordVideo.stop_recording

    def stop(self):
        stop_recording(self)
        (video,) = Path(self.video_folder).iterdir()  # ffmpeg stops there on a full disk, and moviepy says nothing
        video.write_bytes(video.read_bytes()[:-200])

    monkeypatch.setattr(record.RecordVideo, "stop_recording", stop)
    status, line = refusal(capsys)
    assert status == 1 and "--output videos" in line and "incomplete" in line and not Path("videos").exists()


def test_missing_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    status, line = refusal(capsys)
    assert status == 1 and " imageio_ffmpeg " in line and "pip install -r requirements-extra.txt" in line
    assert not Path("videos").exists()


@continuous
@pytest.mark.filterwarnings("error:of a renderer")
@pytest.mark.parametrize(
    ("options", "named", "code", "words"),
    [
        (["--episodes", "0"], {}, 2, ["--episodes", "at least 1"]),
        (["--seed", "-1"], {}, 2, ["--seed", "at least 0"]),
        (["--episode", "2"], {}, 2, ["--episode"]),
        (["--episodes", "2"], {"output": "video.mp4"}, 2, ["--output", "folder", "--episodes"]),
        (["--no_video"], {}, 2, ["--output", "--no_video"]),
        ([], {"policy": "nowhere.pt"}, 1, ["nowhere.pt", "does not exist"]),
        ([], {"policy": "text"}, 1, ["text", "policy.pt"]),
        ([], {"policy": "wide.pt", "output": None}, 1, ["wide.pt", "4 finite numbers", "3)", "Painted-v0"]),
        # the policy could broadcast the one number to its three
        ([], {"env": "One-v0", "output": None}, 1, ["policy.pt", "3 finite numbers", "1)"]),
        ([], {"env": "CartPole-v1", "output": None}, 1, ["--env CartPole-v1", "Discrete(2)", "Box"]),
        ([], {"policy": "discrete.pt", "output": None}, 1, ["--env Painted-v0", "Box", "Discrete"]),
        ([], {"policy": "discrete.pt", "env": "MountainCar-v0", "output": None}, 1, ["discrete.pt", "finite", "2)"]),
        ([], {"env": "Pendulum-v1", "output": None}, 1, ["policy.pt", "Pendulum-v1", "do not fit"]),
        ([], {"env": "Painte-v0"}, 2, ["--env Painte-v0", "Painted"]),
        ([], {"env": "no_such_module:Painted-v0"}, 2, ["--env no_such_module:Painted-v0", "no_such_module"]),
        ([], {"env": "no_such_module:toy/Painted-v0"}, 2, ["no_such_module:toy/Painted-v0", "PYTHONPATH"]),
        ([], {"env": "toy/missing-v0"}, 1, ["--env toy/missing-v0", "cannot be read"]),
        ([], {"env": "../../etc"}, 1, ["--env ../../etc", "cannot be read"]),
        ([], {"env": "none", "output": None}, 2, ["--env none", "cannot be used"]),
        ([], {"env": DATASET}, 1, ["--env Counter-v0", "does not render rgb_array"]),
        ([], {"env": "Flat-v0"}, 1, ["--env Flat-v0", "(32, 48)"]),
        ([], {"env": "NoScreen-v0"}, 1, ["--env NoScreen-v0", "eglQueryString", "MUJOCO_GL", "'egl'", "libegl1"]),
        ([], {"env": "Failing-v0", "output": None}, 1, ["--env Failing-v0", "seed 0", "exploded"]),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(options, named, code, words, script, capsys, folder):
    Path("text").write_text("no policy")
    store_policy("wide.pt", sizes=(4, 2))
    store_policy("discrete.pt", (4, [2]), discrete=True)
    before = contents(folder)
    status, line = refusal(capsys, *options, **named)
    assert status == code and all(word in line for word in words), line
    assert contents(folder) == before and not Path("videos").exists()


def test_a_policy_with_masks_is_not_played(capsys):
    store_policy("masked.pt", (4, [2]), discrete=True)
    state = torch.load("masked.pt") | {"encoding": {"observations": [], "actions": [], "masks": ["a", "b"]}}
    torch.save(state, "masked.pt")
    code, line = refusal(capsys, env="CartPole-v1", policy="masked.pt", output=None)
    assert code == 1 and "masked.pt was trained with masks" in line


@pytest.mark.parametrize(
    ("env", "output", "words"),
    [
        ("Painted-v0", "policy.pt", ["--output policy.pt", "cannot be written"]),
        ("Painted-v0", "taken.mp4", ["--output taken.mp4", "Is a directory"]),
        ("Failing-v0", "videos", ["--env Failing-v0", "seed 0", "exploded"]),
    ],
)
def test_failures_leave_no_part_of_a_video(env, output, words, frames, capsys, folder):
    Path("taken.mp4").mkdir()
    before = contents(folder)
    status, line = refusal(capsys, env=env, output=output)
    assert status == 1 and all(word in line for word in words), line
    assert contents(folder) == before and not list(folder.rglob(".record-*"))
    gc.collect()  # RecordVideo warns of the frames that it holds


def test_camera_goes_with_the_robot():
    for options, camera in (({}, 0), ({"camera_id": -1}, -1)):
        env = gym.make("HalfCheetah-v5", **options)
        record.follow(env)
        assert env.unwrapped.mujoco_renderer.camera_id == camera
    record.follow(gym.make("Painted-v0"))  # has none


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL")
def test_program_renders_mujoco_without_a_screen(frames):
    store_policy("policy.pt", sizes=(4, 1))
    hidden = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, record.__file__, "policy.pt", "--env", "InvertedPendulum-v5", "--output", "video.mp4"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    video, length = frames("video.mp4"), int(process.stdout.split(" steps, ")[0].rsplit(" ", 1)[1])
    assert len(video) in (length + 1, length + 2)
    assert video[0].std() > 10 and np.abs(video[-1].astype(float) - video[0]).max() > 50
