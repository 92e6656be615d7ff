"""benchmarks/collect.py: what it records, how it stores it, and what it says to a user who errs."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

from algorithms.discrete import cql_dqn

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "collect.py"
spec = importlib.util.spec_from_file_location("collect", PROGRAM)
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)

LANDER = "LunarLanderContinuous-v3"


class Corridor(gym.Env):
    """Episode of seed s lasts 3 + s % 4 steps, ends by termination or truncation in turn, and reuses its array."""

    observation_space = gym.spaces.Box(0.0, 10.0, (1,))
    action_space = gym.spaces.Box(np.array([-3.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32))
    positions = np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.time_out = 3 + seed % 4, seed % 2 == 1
        self.positions = np.zeros(1, np.float32)
        return self.positions, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.positions += 1
        end = self.positions[0] == self.length
        return self.positions, 0.1, bool(end and not self.time_out), bool(end and self.time_out), {}


class Endless(Corridor):
    def step(self, action):
        self.positions += 1
        assert self.positions[0] < 1000, "the recording never stops"
        return self.positions, 0.1, False, False, {}


class Sequences(Corridor):
    action_space = gym.spaces.Sequence(gym.spaces.Discrete(2))


class Broken(Corridor):
    def __init__(self):
        raise RuntimeError("no simulator\nof this version")


class Texts(Corridor):
    observation_space = gym.spaces.Dict({"hint": gym.spaces.Text(5)})


for name in ("Corridor", "Endless", "Sequences", "Texts", "Broken"):
    gym.register(f"{name}-v0", entry_point=f"{__name__}:{name}")
gym.register("Callable-v0", entry_point=Corridor)  # what Minari cannot store


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A Minari root of its own for each test; MuJoCo writes its log to the current folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "minari"


def run(*options, env="Corridor-v0", policy="random", id="test/corridor-v0", steps=50):
    collect.main(["--env", env, "--policy", policy, "--id", id, "--steps", str(steps), *map(str, options)])
    return minari.load_dataset(id)


def refusal(capsys, *options, **named):
    """The exit status and the one line on stderr of a run that must fail."""
    with pytest.raises(SystemExit) as stop:
        run(*options, **named)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n"), printed.err
    return stop.value.code, printed.err


def files(folder):
    """Every file below `folder`, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrays(episode):
    observations = episode.observations
    parts = [observations[k] for k in sorted(observations)] if isinstance(observations, dict) else [observations]
    return [*parts, episode.actions, episode.rewards, episode.terminations, episode.truncations]


def equal(first, second):
    return len(first) == len(second) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for a, b in zip(first, second) for x, y in zip(arrays(a), arrays(b))
    )


def test_episodes_have_their_observations_and_ends():
    dataset = run(steps=50)
    lengths = [len(episode) for episode in dataset]
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(len(lengths)))]
    assert lengths[:-1] == [3 + seed % 4 for seed in seeds[:-1]] and lengths[-1] <= 3 + seeds[-1] % 4
    assert dataset.total_steps == sum(lengths) == 50
    for i, episode in enumerate(dataset):
        assert episode.observations.tolist() == [[t] for t in range(lengths[i] + 1)]
        assert episode.rewards.tolist() == [0.1] * lengths[i]  # to the last bit of a double
        assert episode.actions.shape == (lengths[i], 2) and episode.actions.dtype == np.float32
        terminates = seeds[i] % 2 == 0 and lengths[i] == 3 + seeds[i] % 4
        assert episode.terminations.tolist() == [False] * (lengths[i] - 1) + [terminates]
        assert episode.truncations.tolist() == [False] * (lengths[i] - 1) + [not terminates]


def test_seeds_share_no_episode():
    first, second = (
        {metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(len(dataset)))}
        for dataset in (run(), run("--seed", 1, id="test/other-v0"))
    )
    assert len(first) > 5 and not first & second


def test_cut_is_a_truncation_also_where_the_environment_would_terminate():
    seed = next(seed for seed in range(99) if np.random.default_rng((seed, 0)).integers(2**31) % 4 == 0)
    episode = run("--seed", seed, steps=2)[0]  # the first episode terminates at its third step
    assert episode.terminations.tolist() == [False, False] and episode.truncations.tolist() == [False, True]
    episode = run("--seed", seed, steps=3, id="test/whole-v0")[0]
    assert episode.terminations.tolist() == [False, False, True] and not episode.truncations.any()


def test_environment_without_an_end():
    dataset = run(env="Endless-v0", steps=70)
    assert [len(episode) for episode in dataset] == [70] and dataset[0].truncations.tolist() == [False] * 69 + [True]


def recorded(n_envs, seed=0, policy="heuristic", env=LANDER, **options):
    envs = [gym.make(env) for _ in range(n_envs)]
    return collect.record(envs, collect.make_policy(policy, envs[0]), 1500, seed, **options)[0]


def test_the_same_however_many_run_side_by_side():
    options = {"noise": 0.5, "epsilon": 0.2}
    alone = recorded(1, **options)
    assert equal(alone, recorded(16, **options)) and equal(alone, recorded(5, **options))
    for env in (LANDER, "Corridor-v0"):  # all Corridors share one action space
        assert equal(recorded(1, env=env, policy="random"), recorded(16, env=env, policy="random"))
    assert not equal(alone, recorded(16, seed=1, **options))


def test_noise_and_epsilon():
    def actions(**options):
        return np.concatenate([buffer.actions for buffer in recorded(16, **options)])

    plain, noisy = actions(), actions(noise=0.5)
    assert 0.2 < np.abs(noisy).mean() <= np.abs(noisy).max() <= 1
    assert not np.array_equal(plain, noisy)

    def zeros(episodes):
        return np.zeros((len(episodes), 2))

    def zeros_with(**options):
        envs = [gym.make("Corridor-v0") for _ in range(4)]
        return np.concatenate([b.actions for b in collect.record(envs, zeros, 4000, 0, **options)[0]])

    low, high = Corridor.action_space.low, Corridor.action_space.high
    assert not zeros_with().any()
    # the box is [-3, 1] x [0, 0.5]: half ranges 2 and 0.25; 0 lies at its lower end on the second axis
    noisy = zeros_with(noise=0.1)
    assert np.all((low <= noisy) & (noisy <= high))
    assert noisy[:, 0].std() == pytest.approx(0.2, rel=0.05) and noisy[:, 1].max() < 0.15
    assert np.mean(noisy[:, 1] == 0) == pytest.approx(0.5, abs=0.05)
    clipped = zeros_with(noise=10)
    assert clipped.min(0).tolist() == low.tolist() and clipped.max(0).tolist() == high.tolist()
    uniform = zeros_with(epsilon=0.25)
    drawn = uniform[uniform.any(1)]
    assert len(drawn) / 4000 == pytest.approx(0.25, abs=0.03)
    assert np.ptp(drawn, axis=0) == pytest.approx([4, 0.5], rel=0.1)
    assert drawn.mean(0) == pytest.approx((low + high) / 2, abs=0.15)


def test_epsilon_on_discrete_actions():
    dataset = run("--epsilon", 1, env="LunarLander-v3", policy="heuristic", steps=400)
    actions = np.concatenate([episode.actions for episode in dataset])
    assert actions.shape == (400,) and actions.dtype == np.int64
    assert np.bincount(actions, minlength=4).min() > 60
    assert equal(dataset, run("--epsilon", 1, env="LunarLander-v3", policy="heuristic", steps=400, id="test/again-v0"))
    assert not equal(dataset, run(env="LunarLander-v3", policy="heuristic", steps=400, id="test/plain-v0"))


def test_dict_observations():
    dataset = run(env="PointMaze_UMaze-v3", steps=350)
    assert [len(episode) for episode in dataset] == [300, 50]
    observations = dataset[1].observations
    assert {key: value.shape for key, value in observations.items()} == {
        "achieved_goal": (51, 2),
        "desired_goal": (51, 2),
        "observation": (51, 4),
    }
    assert np.array_equal(observations["achieved_goal"], observations["observation"][:, :2])
    assert np.unique(observations["observation"], axis=0).shape[0] > 40  # not one array stored 51 times


def test_existing_dataset_is_kept_without_force_and_replaced_with_it(capsys, root, monkeypatch):
    run(steps=20)
    before = files(root)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(collect, "record", lambda *_: pytest.fail("recorded before the id was checked"))
        code, line = refusal(capsys, steps=30)
    assert code == 1 and "--id test/corridor-v0" in line and "--force" in line
    assert files(root) == before
    assert run("--force", steps=30).total_steps == 30
    assert set(files(root)) == set(before)
    assert list(minari.list_local_datasets()) == ["test/corridor-v0"]
    assert minari.namespace.list_local_namespaces() == ["test"]


def test_force_never_replaces_a_folder_that_is_no_dataset(capsys, root):
    run(id="test/group-v0/corridor-v0")
    capsys.readouterr()
    before = files(root)
    assert refusal(capsys, "--force", id="test/group-v0")[0] == 1
    assert files(root) == before


@pytest.mark.parametrize("broken", ["step", "create_dataset_from_buffers"])
def test_interruption_leaves_what_was_there(broken, capsys, root, monkeypatch):
    run(steps=20)
    before, calls = files(root), []
    owner = minari if broken == "create_dataset_from_buffers" else collect.Episode
    works = getattr(owner, broken)

    def interrupted(*args, **options):
        works(*args, **options)
        calls.append(1)
        if owner is minari or len(calls) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, broken, interrupted)
    for options in (["--force"], ["--id", "test/new-v0"]):
        calls.clear()
        with pytest.raises(SystemExit) as stop:
            run(*options)
        assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
        assert files(root) == before
        assert sorted(path.name for path in root.rglob("*") if path.is_dir()) == ["corridor-v0", "data", "test"]


def test_reference_scores(root):
    assert {"ref_min_score", "ref_max_score"}.isdisjoint(run().storage.metadata)
    given = run("--ref_min_score", -5.5, "--ref_max_score", 20, id="test/given-v0")
    assert minari.get_normalized_score(given, np.array([-5.5, 20])).tolist() == [0, 1]
    lander = run(env=LANDER, policy="heuristic", id="test/lander-v0").storage.metadata
    assert (lander["ref_min_score"], lander["ref_max_score"]) == (-200, 280)
    overridden = run("--ref_min_score=-1", "--ref_max_score=1", env=LANDER, id="test/own-v0").storage.metadata
    assert (overridden["ref_min_score"], overridden["ref_max_score"]) == (-1, 1)
    hopper = run(env="Hopper-v5", id="test/hopper-v0").storage.metadata
    assert (hopper["ref_min_score"], hopper["ref_max_score"]) == (-20.272305, 3234.3)


def test_metadata_tells_how_it_was_made():
    metadata = run("--noise", 0.9, "--epsilon", 0.1, "--seed", 7, env=LANDER, policy="heuristic").storage.metadata
    assert metadata["algorithm_name"] == "heuristic, noise 0.9, epsilon 0.1"
    for option in (f"--env={LANDER}", "--policy=heuristic", "--steps=50", "--noise=0.9", "--epsilon=0.1", "--seed=7"):
        assert option in metadata["description"].split()
    assert json.loads(metadata["env_spec"])["id"] == LANDER
    assert "author" not in metadata and not metadata["jpeg_encoding"]


def test_policy_of_a_run(monkeypatch, capsys, tmp_path):
    batches = []

    def load_policy(path):
        assert Path(path).read_text() == "weights"

        def policy(observations):
            batches.append(observations.shape)
            return np.stack([observations[:, 0] / -10, observations[:, 0] / 20], axis=1)

        return policy

    monkeypatch.setitem(sys.modules, "benchmarks.policies", types.SimpleNamespace(load_policy=load_policy))
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("policy.pt").write_text("weights")
    dataset = run(policy="policy.pt", steps=200)
    assert dataset.storage.metadata["algorithm_name"] == "policy.pt"
    for episode in dataset:
        positions = episode.observations[:-1, 0]
        assert episode.actions == pytest.approx(np.stack([positions / -10, positions / 20], axis=1))
    assert (collect.N_ENVS, 1) in batches and len(batches) < 30  # one call a step for all

    capsys.readouterr()
    code, line = refusal(capsys, env="CartPole-v1", policy="policy.pt", id="test/cartpole-v0")
    assert code == 1 and "--policy policy.pt" in line and "CartPole-v1" in line


def test_policy_of_discrete_actions(capsys):
    torch.manual_seed(0)
    network = cql_dqn.QNetwork(4, [2], 16, 1, "dqn", 1)
    cql_dqn.save(Path("policy.pt"), {"sizes": list(network.sizes), "weights": network.state_dict()})
    dataset = run(policy="policy.pt", env="CartPole-v1", steps=60)
    for episode in dataset:
        assert episode.actions.tolist() == network.act(episode.observations[:-1]).tolist()
    capsys.readouterr()
    code, line = refusal(capsys, policy="policy.pt", env="InvertedPendulum-v5", id="test/pendulum-v0")
    assert code == 1 and "InvertedPendulum-v5" in line and "int64" in line


@pytest.mark.parametrize(
    ("options", "named", "code", "words"),
    [
        (["--steps", "0"], {}, 2, ["--steps", "at least 1"]),
        (["--steps", "1e5"], {}, 2, ["--steps", "1e5"]),
        (["--noise", "-0.1"], {}, 2, ["--noise", "at least 0"]),
        (["--noise", "nan"], {}, 2, ["--noise"]),
        (["--noise", "0.1"], {"env": "CartPole-v1"}, 2, ["--noise", "CartPole-v1", "--epsilon"]),
        (["--epsilon", "1.1"], {}, 2, ["--epsilon", "0 to 1"]),
        (["--epsilon", "nan"], {}, 2, ["--epsilon"]),
        (["--seed", "-1"], {}, 2, ["--seed"]),
        (["--see", "1"], {}, 2, ["--see"]),
        (["--policy"], {}, 2, ["--policy"]),
        (["--ref_min_score", "1"], {}, 2, ["--ref_min_score", "--ref_max_score", "both"]),
        (["--ref_max_score", "1"], {}, 2, ["--ref_min_score", "--ref_max_score", "both"]),
        (["--ref_min_score", "1", "--ref_max_score", "1"], {}, 2, ["--ref_min_score", "below"]),
        (["--ref_min_score", "nan", "--ref_max_score", "1"], {}, 2, ["--ref_min_score"]),
        ([], {"id": "test/corridor"}, 2, ["--id test/corridor", "namespace/name-v0"]),
        ([], {"id": "../corridor-v0"}, 2, ["--id ../corridor-v0", "namespace/name-v0"]),
        ([], {"id": "/etc/corridor-v0"}, 2, ["--id /etc/corridor-v0"]),
        ([], {"env": "LunarLandr-v3"}, 2, ["--env LunarLandr-v3", "LunarLander"]),
        ([], {"env": "no_such_module:Some-v0"}, 2, ["--env no_such_module:Some-v0", "no_such_module"]),
        ([], {"env": "Broken-v0"}, 2, ["--env Broken-v0", "no simulator of this version"]),
        ([], {"env": "Callable-v0"}, 2, ["--env Callable-v0", "Callable"]),
        ([], {"env": "Sequences-v0"}, 1, ["--env Sequences-v0", "space"]),
        ([], {"env": "Texts-v0"}, 1, ["--env Texts-v0", "space"]),
        ([], {"policy": "heuristic"}, 1, ["--policy heuristic", "LunarLander-v3", "Corridor-v0"]),
        ([], {"policy": "nowhere/policy.pt"}, 2, ["--policy", "random", "heuristic", "file"]),
    ],
)
def test_user_errors_are_one_line_and_store_nothing(options, named, code, words, capsys, root):
    status, line = refusal(capsys, *options, **named)
    assert status == code
    assert all(word in line for word in words), line
    assert not root.exists() or not any(root.iterdir())


def test_unwritable_root_is_one_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    code, line = refusal(capsys)
    assert code == 1 and "cannot be stored" in line


def program(*options):
    return subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True)


def test_as_a_program(root):
    made = ["--env", LANDER, "--policy", "heuristic", "--noise", "0.9", "--steps", "2000"]
    done = program(*made, "--id", "lander/medium-v0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lander/medium-v0: 2000 steps, ") and done.stdout.count("\n") == 1
    assert " ± " in done.stdout and str(root / "lander" / "medium-v0") in done.stdout
    assert not done.stderr  # the progress bar is for a terminal
    assert minari.load_dataset("lander/medium-v0").total_steps == 2000


def test_an_error_of_the_program_is_one_line():
    outdated = program("--env", "LunarLander-v2", "--policy", "random", "--id", "test/lander-v0")
    assert outdated.returncode == 2
    assert outdated.stderr.count("\n") == 1 and "--env LunarLander-v2" in outdated.stderr, outdated.stderr
