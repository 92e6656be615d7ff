"""benchmarks/record.py: the episodes of an evaluation, their videos, and what it says to a user who errs."""

import ctypes.util
import gc
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import DATASET, Counter, contents, continuous, table
from conftest import record as record_episodes

from algorithms.discrete import cql_dqn
from algorithms.offline import cql
from benchmarks import record


class Painted(Counter):
    """Counter, whose picture has a brightness of 20 t."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None, height=32):
        self.render_mode, self.height = render_mode, height

    def render(self):
        return np.full((self.height, 48, 3), 20 * self.t, np.uint8)


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
    if not discrete:
        actor.head.weight.data *= 100
    cql.save(Path(path), {"sizes": list(actor.sizes), "weights": actor.state_dict()})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """With a policy.pt; and what the program changes in its process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name, value in {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy"}.items():
        monkeypatch.setenv(name, value)
    store_policy("policy.pt")
    return tmp_path


@pytest.fixture
def ffmpeg():
    pytest.importorskip("moviepy", reason="requirements-extra.txt is not installed")
    return pytest.importorskip("imageio_ffmpeg", reason="requirements-extra.txt is not installed")


@pytest.fixture
def frames(ffmpeg):
    """Reads a video, [T, H, W, 3], and its frames per second."""

    def frames(path):
        reader = ffmpeg.read_frames(str(path))
        data = next(reader)
        width, height = data["size"]
        return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]), data["fps"]

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
    assert printed.err.count("\n") == 1 and printed.err.startswith("record.py: error: "), printed.err
    return stop.value.code, printed.err


def check_frames(video, length):
    """The start and every step, in order; a repeated last frame is moviepy's."""
    brightness = video.mean(axis=(1, 2, 3))
    assert len(brightness) in (length + 1, length + 2)
    assert brightness[: length + 1] == pytest.approx(20 * np.arange(length + 1), abs=3)


@pytest.mark.parametrize("n_episodes", [2, 18])  # 18: in two waves
def test_plays_the_evaluation_of_a_run_of_any_script(n_episodes, run, new_dataset, capsys, monkeypatch):
    for name in ("moviepy", "imageio_ffmpeg"):  # not needed
        monkeypatch.setitem(sys.modules, name, None)
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


def test_an_episode_is_a_video_from_its_start_to_its_end(frames, capsys):
    play("--episodes", 2, "--seed", 3)
    printed = capsys.readouterr()
    assert sorted(os.listdir("videos")) == ["Painted-v0-seed-3.mp4", "Painted-v0-seed-4.mp4"]
    play("--episodes", 2, "--seed", 3, output=None)
    without = capsys.readouterr().out.splitlines()
    assert printed.err == "" and len(without) == 3 and printed.out.splitlines()[2] == without[2]
    for seed, line, plain in zip((3, 4), printed.out.splitlines(), without):
        path = f"videos/Painted-v0-seed-{seed}.mp4"
        assert line == f"{plain}, {path}"
        video, fps = frames(path)
        assert fps == 10 and video.shape[1:] == (32, 48, 3)
        check_frames(video, Counter.length(seed))


def test_one_file_replaces_an_older_one(frames, capsys, monkeypatch):
    def replace(source, target):
        assert Path(source).parents[1] == Path(target).parent  # on the same disk
        os.rename(source, target)

    monkeypatch.setattr(record.os, "replace", replace)
    Path("deep").mkdir()
    Path("deep/video.mp4").write_text("older")
    play("--seed", 1, output="deep/video.mp4")
    assert os.listdir("deep") == ["video.mp4"] and ", deep/video.mp4\n" in capsys.readouterr().out
    check_frames(frames("deep/video.mp4")[0], 4)


@continuous
def test_environment_of_a_dataset_with_its_arguments(frames, new_dataset, capsys):
    episodes = record_episodes("Painted-v0", range(3))
    made = gym.make("Painted-v0", height=64, max_episode_steps=2).spec
    play(env=new_dataset(episodes, "toy/painted-v0", env=made))
    video, _ = frames("videos/Painted-v0-seed-0.mp4")
    assert video.shape[1:] == (64, 48, 3)
    check_frames(video, 2)
    capsys.readouterr()
    play("--seed", 1, env=new_dataset(episodes, "painted-v0", env=made))  # an id without a namespace
    assert "seed 1: " in capsys.readouterr().out
    spaces = {"observation_space": Painted.observation_space, "action_space": Painted.action_space}
    status, line = refusal(capsys, env=new_dataset(episodes, "toy/nowhere-v0", **spaces))
    assert status == 1 and "--env toy/nowhere-v0" in line and "no environment" in line


@pytest.mark.parametrize("missing", ["end", "frames"])
def test_incomplete_video_is_an_error_and_goes(missing, ffmpeg, capsys, monkeypatch, folder):
    stop_recording = record.RecordVideo.stop_recording

    def stop(self):
        if missing == "frames":
            self.recorded_frames = self.recorded_frames[:-2]
        stop_recording(self)
        if missing == "end":  # ffmpeg stops there on a full disk, and moviepy says nothing
            (video,) = Path(self.video_folder).iterdir()
            video.write_bytes(video.read_bytes()[:-200])

    Path("videos").mkdir()
    before = contents(folder)
    monkeypatch.setattr(record.RecordVideo, "stop_recording", stop)
    status, line = refusal(capsys)
    assert status == 1 and "--output videos" in line and "incomplete" in line
    assert contents(folder) == before and not os.listdir("videos")


@pytest.mark.parametrize("name", ["moviepy", "imageio_ffmpeg"])
def test_missing_package(name, capsys, monkeypatch):
    parts = ["moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip", "imageio_ffmpeg"]
    for part in parts:
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        if part.startswith(name):
            monkeypatch.setitem(sys.modules, part, None)
    status, line = refusal(capsys)
    assert status == 1 and f" {name} " in line and "pip install -r requirements-extra.txt" in line
    assert not Path("videos").exists()


@continuous
@pytest.mark.filterwarnings("error:of a renderer")
@pytest.mark.parametrize(
    ("options", "named", "code", "words"),
    [
        (["--episodes", "0"], {}, 2, ["--episodes", "at least 1"]),
        (["--seed", "-1"], {}, 2, ["--seed", "at least 0"]),
        (["--seed", "x"], {}, 2, ["--seed"]),
        (["--episode", "2"], {}, 2, ["--episode"]),
        (["--episodes", "2"], {"output": "video.mp4"}, 2, ["--output", "folder", "--episodes"]),
        (["--no_video"], {}, 2, ["--output", "--no_video"]),
        ([], {"policy": "nowhere.pt"}, 1, ["nowhere.pt", "does not exist"]),
        ([], {"policy": "text"}, 1, ["text", "policy.pt"]),
        ([], {"policy": "wide.pt"}, 1, ["wide.pt", "4, 2", "3, 2", "Painted-v0"]),
        ([], {"policy": "narrow.pt"}, 1, ["narrow.pt", "3, 1", "3, 2"]),
        ([], {"env": "One-v0"}, 1, ["policy.pt", "3, 2", "1, 2"]),  # although the policy would take one number
        ([], {"env": "CartPole-v1"}, 1, ["--env CartPole-v1", "Discrete(2)", "Box"]),
        ([], {"policy": "discrete.pt"}, 1, ["--env Painted-v0", "Box", "Discrete"]),
        ([], {"policy": "discrete.pt", "env": "MountainCar-v0"}, 1, ["discrete.pt", "4, 1", "2, 1"]),
        ([], {"env": "Painte-v0"}, 2, ["--env Painte-v0", "Painted"]),
        ([], {"env": "LunarLander-v2"}, 2, ["--env LunarLander-v2", "LunarLander-v3"]),
        ([], {"env": "no_such_module:Painted-v0"}, 2, ["--env no_such_module:Painted-v0", "no_such_module"]),
        ([], {"env": "toy/missing-v0"}, 1, ["--env toy/missing-v0", "not there"]),
        ([], {"env": "../../etc"}, 1, ["--env ../../etc", "Minari"]),
        ([], {"env": "none", "output": None}, 1, ["--env none", "no environment"]),
        ([], {"env": DATASET}, 1, ["--env Counter-v0", "renders no rgb_array"]),
        ([], {"env": "Flat-v0"}, 1, ["--env Flat-v0", "(32, 48)"]),
        ([], {"env": "NoScreen-v0"}, 1, ["--env NoScreen-v0", "eglQueryString", "MUJOCO_GL", "'egl'", "libegl1"]),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(options, named, code, words, script, capsys, folder):
    Path("text").write_text("no policy")
    store_policy("wide.pt", sizes=(4, 2))
    store_policy("narrow.pt", sizes=(3, 1))
    store_policy("discrete.pt", (4, [2]), discrete=True)
    before = contents(folder)
    status, line = refusal(capsys, *options, **named)
    assert status == code and all(word in line for word in words), line
    assert contents(folder) == before and not Path("videos").exists()


@pytest.mark.parametrize(
    ("error", "words"), [(RuntimeError("of MuJoCo"), ["MUJOCO_GL"]), (ValueError("of another"), [])]
)
def test_renderer_that_fails_when_it_is_imported(error, words, capsys, monkeypatch):
    def make(*arguments, **options):
        raise error

    monkeypatch.setattr(gym, "make_vec", make)
    status, line = refusal(capsys)
    assert status == (1 if words else 2)
    assert "--env Painted-v0" in line and str(error) in line and ("MUJOCO_GL" in line) == bool(words)


@pytest.mark.parametrize(
    ("env", "output", "words"),
    [
        ("Painted-v0", "policy.pt", ["--output policy.pt", "cannot be written"]),
        ("Painted-v0", "policy.pt/video.mp4", ["--output policy.pt/video.mp4", "cannot be written"]),
        ("Painted-v0", "taken.mp4", ["--output taken.mp4", "Is a directory"]),
        ("Failing-v0", "videos", ["--env Failing-v0", "seed 0", "exploded"]),
        ("Failing-v0", None, ["--env Failing-v0", "seed 0", "exploded"]),
    ],
)
def test_failures_leave_no_part_of_a_video(env, output, words, ffmpeg, capsys, folder):
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


def test_settings_for_rendering(capsys, monkeypatch):
    monkeypatch.delenv("SDL_VIDEODRIVER")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    refusal(capsys, policy="nowhere.pt")
    assert (os.environ["SDL_VIDEODRIVER"], os.environ["MUJOCO_GL"]) == ("dummy", "osmesa")
    monkeypatch.delenv("MUJOCO_GL")
    refusal(capsys, policy="nowhere.pt", output=None)
    assert "MUJOCO_GL" not in os.environ
    refusal(capsys, policy="nowhere.pt")
    assert os.environ.get("MUJOCO_GL") == ("egl" if sys.platform == "linux" else None)
    refusal(capsys, env="NoScreen-v0")
    assert sys.unraisablehook("of a renderer that was made in part") is None


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL")
def test_program_renders_mujoco_without_a_screen(frames):
    store_policy("policy.pt", sizes=(4, 1))
    hidden = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, record.__file__, "policy.pt", "--env", "InvertedPendulum-v5", "--output", "video.mp4"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    video, _ = frames("video.mp4")
    length = int(process.stdout.split(" steps, ")[0].rsplit(" ", 1)[1])
    assert len(video) in (length + 1, length + 2)
    assert video[0].std() > 10 and np.abs(video[-1].astype(float) - video[0]).max() > 50
