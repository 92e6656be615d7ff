"""benchmarks/collect.py: what it records, how it stores it, and the messages for users' errors."""

import importlib.machinery
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
from conftest import contents

from algorithms.discrete import cql_dqn
from algorithms.offline import cql
from benchmarks import collect

LANDER = "LunarLanderContinuous-v3"


class Corridor(gym.Env):
    """The episode of seed s lasts 3 + s % 4 steps, ends by termination or truncation in turn, and reuses its array."""

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


class Texts(Corridor):
    observation_space = gym.spaces.Dict({"hint": gym.spaces.Text(5)})


class Missions(gym.Space):
    """Texts in a space of its own, as MiniGrid has them."""

    def sample(self):
        return "go"

    def contains(self, x):
        return isinstance(x, str)


class Told(Corridor):
    """Corridor that tells its mission beside the place."""

    observation_space = gym.spaces.Dict(
        {"hint": gym.spaces.Text(5), "mission": Missions(), "place": Corridor.observation_space}
    )

    def reset(self, seed=None, options=None):
        return self.tell(super().reset(seed=seed)[0]), {}

    def tell(self, place):
        return {"hint": "walk", "mission": "go", "place": place}

    def step(self, action):
        place, *rest = super().step(action)
        return self.tell(place), *rest


class Keys(Corridor):
    action_space = gym.spaces.Discrete(3, start=1)


class Broken(Corridor):
    def __init__(self):
        raise RuntimeError("no simulator\nof this version")


for kind in (Corridor, Endless, Sequences, Texts, Told, Keys, Broken):
    gym.register(f"{kind.__name__}-v0", entry_point=f"{__name__}:{kind.__name__}")
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


def seeds(dataset):
    return [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(len(dataset)))]


def test_episodes_have_their_observations_and_ends():
    dataset = run(steps=50)
    lengths, ends = [len(episode) for episode in dataset], [3 + seed % 4 for seed in seeds(dataset)]
    assert lengths[:-1] == ends[:-1] and lengths[-1] <= ends[-1] and dataset.total_steps == sum(lengths) == 50
    for seed, n, end, episode in zip(seeds(dataset), lengths, ends, dataset):
        assert episode.observations.tolist() == [[t] for t in range(n + 1)]
        assert episode.rewards.tolist() == [0.1] * n  # to the last bit of a double
        assert episode.actions.shape == (n, 2) and episode.actions.dtype == np.float32
        terminates = seed % 2 == 0 and n == end
        assert episode.terminations.tolist() == [False] * (n - 1) + [terminates]
        assert episode.truncations.tolist() == [False] * (n - 1) + [not terminates]
    assert len(lengths) > 5 and not set(seeds(dataset)) & set(seeds(run("--seed", 1, id="test/other-v0")))


def test_cut_is_a_truncation_also_where_the_environment_would_terminate():
    seed = next(seed for seed in range(99) if np.random.default_rng((seed, 0)).integers(2**31) % 4 == 0)
    for n, terminations in ((2, [False, False]), (3, [False, False, True])):  # it terminates at its third step
        episode = run("--seed", seed, "--force", steps=n)[0]
        assert episode.terminations.tolist() == terminations and episode.truncations.any() == (n == 2)
    dataset = run("--force", env="Endless-v0", steps=70)
    assert [len(episode) for episode in dataset] == [70] and dataset[0].truncations.tolist() == [False] * 69 + [True]


def recorded(n_envs, seed=0, policy="heuristic", env=LANDER, **options):
    """All numbers of each episode."""
    envs = [gym.make(env) for _ in range(n_envs)]
    buffers, _ = collect.record(envs, collect.make_policy(policy, envs[0]), 600, seed, **options)
    return [[x.observations.tolist(), x.actions.tolist(), x.rewards.tolist(), x.terminations.tolist()] for x in buffers]


def test_the_same_however_many_run_side_by_side():
    options = {"noise": 0.5, "epsilon": 0.2}
    alone = recorded(1, **options)
    assert alone == recorded(16, **options) == recorded(5, **options) != recorded(16, seed=1, **options)
    for env in (LANDER, "Corridor-v0"):  # all Corridors share one action space
        assert recorded(1, env=env, policy="random") == recorded(16, env=env, policy="random")
    plain, uniform = (recorded(1, env="LunarLander-v3", epsilon=epsilon) for epsilon in (0, 1))
    assert plain != uniform and min(np.bincount(sum((actions for _, actions, *_ in uniform), []), minlength=4)) > 80


def test_noise_and_epsilon():
    def actions(**options):
        envs = [gym.make("Corridor-v0") for _ in range(4)]
        policy = lambda episodes: np.zeros((len(episodes), 2))  # noqa: E731
        return np.concatenate([b.actions for b in collect.record(envs, policy, 4000, 0, **options)[0]])

    low, high = Corridor.action_space.low, Corridor.action_space.high
    assert not actions().any()
    # the box is [-3, 1] x [0, 0.5]: half ranges 2 and 0.25; 0 lies at its lower end on the second axis
    noisy = actions(noise=0.1)
    assert np.all((low <= noisy) & (noisy <= high))
    assert noisy[:, 0].std() == pytest.approx(0.2, rel=0.05) and noisy[:, 1].max() < 0.15
    assert np.mean(noisy[:, 1] == 0) == pytest.approx(0.5, abs=0.05)
    clipped = actions(noise=10)
    assert clipped.min(0).tolist() == low.tolist() and clipped.max(0).tolist() == high.tolist()
    uniform = actions(epsilon=0.25)
    drawn = uniform[uniform.any(1)]
    assert len(drawn) / 4000 == pytest.approx(0.25, abs=0.03)
    assert np.ptp(drawn, axis=0) == pytest.approx([4, 0.5], rel=0.1)
    assert drawn.mean(0) == pytest.approx((low + high) / 2, abs=0.15)


def test_existing_dataset_is_kept_without_force_and_replaced_with_it(capsys, root, monkeypatch):
    run(steps=20)
    run(id="test/group-v0/corridor-v0")
    before = contents(root)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(collect, "record", lambda *_: pytest.fail("recorded before the id was checked"))
        code, line = refusal(capsys, steps=30)
        assert code == 1 and "--id test/corridor-v0" in line and "--force" in line
        assert refusal(capsys, "--force", id="test/group-v0")[0] == 1  # a folder, but not a dataset
    assert contents(root) == before
    assert run("--force", steps=30).total_steps == 30
    assert set(contents(root)) == set(before)
    assert set(minari.list_local_datasets()) == {"test/corridor-v0", "test/group-v0/corridor-v0"}


@pytest.mark.parametrize("broken", ["step", "create_dataset_from_buffers"])
def test_interruption_leaves_what_was_there(broken, capsys, root, monkeypatch):
    run(steps=20)
    before, calls = contents(root), []
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
        assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err and contents(root) == before
        assert sorted(path.name for path in root.rglob("*") if path.is_dir()) == ["corridor-v0", "data", "test"]


@pytest.mark.parametrize(
    ("env", "given", "stored"),
    [
        ("Corridor-v0", [], (None, None)), ("Corridor-v0", ["-5.5", "20"], (-5.5, 20)), (LANDER, [], (-200, 280)),
        (LANDER, ["-1", "1"], (-1, 1)), ("Hopper-v5", [], (-20.272305, 3234.3)),
    ],
)  # fmt: skip
def test_reference_scores_and_how_it_was_made(env, given, stored):
    options = [f"--ref_{end}_score={score}" for end, score in zip(("min", "max"), given)]
    metadata = run("--noise", 0.9, "--epsilon", 0.1, "--seed", 7, *options, env=env).storage.metadata
    assert tuple(metadata.get(f"ref_{end}_score") for end in ("min", "max")) == stored
    assert metadata["algorithm_name"] == "random, noise 0.9, epsilon 0.1" and not metadata["jpeg_encoding"]
    made = {f"--env={env}", "--policy=random", "--steps=50", "--noise=0.9", "--epsilon=0.1", "--seed=7"}
    assert made <= set(metadata["description"].split()) and json.loads(metadata["env_spec"])["id"] == env


@pytest.mark.parametrize("env", ["Corridor-v0", "CartPole-v1", "PointMaze_UMaze-v3"])
def test_policy_of_a_run(env, capsys, monkeypatch):
    torch.manual_seed(0)
    if env == "CartPole-v1":
        network, script = cql_dqn.QNetwork(4, [2], 16, 1, "dqn", 1), cql_dqn
    else:
        network, script = cql.TanhGaussianActor(8 if env.startswith("Point") else 1, 2, 16, 1), cql
        network.head.weight.data *= 100
    if env == "Corridor-v0":
        network.action_low.copy_(torch.tensor(Corridor.action_space.low))
        network.action_high.copy_(torch.tensor(Corridor.action_space.high))
    script.save(Path("policy.pt"), {"sizes": list(network.sizes), "weights": network.state_dict()})
    batches, act = [], type(network).act
    monkeypatch.setattr(type(network), "act", lambda self, x, *more: batches.append(len(x)) or act(self, x, *more))
    dataset = run(policy="policy.pt", env=env, steps=200)
    assert dataset.storage.metadata["algorithm_name"] == "policy.pt"
    assert collect.N_ENVS in batches and len(batches) < 310  # one call a step for all
    for episode in dataset:
        parts = episode.observations
        observations = np.hstack([parts[key] for key in sorted(parts)]) if isinstance(parts, dict) else parts
        assert episode.actions == pytest.approx(network.act(np.float32(observations[:-1])), abs=1e-5)
    capsys.readouterr()
    code, line = refusal(capsys, env="InvertedPendulum-v5", policy="policy.pt", id="test/pendulum-v0")
    assert code == 1 and "--policy policy.pt" in line and "InvertedPendulum-v5" in line
    assert env != "CartPole-v1" or "int64" in line


def test_texts_are_left_out_and_said(capsys):
    dataset = run(env="Told-v0", steps=30)
    assert "they are texts: hint, mission" in capsys.readouterr().out
    assert dataset.observation_space == gym.spaces.Dict({"place": Corridor.observation_space})
    data = cql.load_dataset("test/corridor-v0")
    assert data["environment"]["id"] == "Told-v0" and data["environment"]["wrappers"] == []
    assert data["observations"].shape == (30, 1) and data["observations"][:3].tolist() == [[0], [1], [2]]


POLICIES = """
import numpy as np

def half(observation):
    observation[:] = 99  # its own copy
    return [-2, 0.25]

def place(observation): return 1.0 + (observation[0] > 1)  # 1 or 2
def few(observation): return [0.0]
def outside(observation): return [-2, 0.6]
def nan(observation): return np.array([np.nan, 0])
def nothing(observation): pass
def ragged(observation): return [0, [0.1]]
def words(observation): return "left"
def between(observation): return 1.5
def beyond(observation): return 4
def later(observation): return [-2, 0.25 if observation[0] < 2 else 9]
def broken(observation): return 1 / 0
def rounded(observation): return [-3 - 1e-6, 0.5 + 1e-7]

number = 3
"""


@pytest.fixture
def policies(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "policy_module.py").write_text(POLICIES)
    (tmp_path / "modules" / "needy_module.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    sys.modules.pop("policy_module", None)


def test_a_function_of_ones_own_acts(policies):
    dataset = run(policy="policy_module:half")
    assert dataset.storage.metadata["algorithm_name"] == "policy_module:half"
    for episode in dataset:
        assert episode.actions.dtype == np.float32 and episode.actions.tolist() == [[-2, 0.25]] * len(episode)
        assert episode.observations.tolist() == [[t] for t in range(len(episode) + 1)]
    for episode in run("--force", env="Keys-v0", policy="policy_module:place"):
        assert episode.actions.tolist() == [1, 1, 2, 2, 2, 2][: len(episode)]
    for episode in run("--force", policy="policy_module:rounded"):
        assert episode.actions.tolist() == [[-3, 0.5]] * len(episode)
    noisy = run("--force", "--epsilon", 0.5, env="Keys-v0", policy="policy_module:place")
    assert {x for episode in noisy for x in episode.actions.tolist()} == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "env", "status", "words"),
    [
        *((name, "Corridor-v0", 1, [f"--policy policy_module:{name} acted", "Box("]) for name in (
            "few", "outside", "nan", "nothing", "ragged", "words", "later")),
        ("between", "Keys-v0", 1, ["acted 1.5", "Discrete(3, start=1)"]),
        ("beyond", "Keys-v0", 1, ["acted 4", "Discrete(3, start=1)"]),
        ("number", "Corridor-v0", 2, ["policy_module has no function number"]),
        ("missing", "Corridor-v0", 2, ["policy_module has no function missing"]),
    ],
)  # fmt: skip
def test_a_function_that_returns_no_action_is_one_line(name, env, status, words, policies, capsys, root):
    code, line = refusal(capsys, env=env, policy=f"policy_module:{name}")
    assert code == status and all(word in line for word in words), line
    assert not any(root.glob("test/*"))


def test_modules_that_are_missing_are_said_and_bugs_keep_their_traceback(policies, capsys, monkeypatch):
    code, line = refusal(capsys, policy="no.such_module:act")
    assert code == 2 and "--policy no.such_module:act" in line and "PYTHONPATH=." in line
    code, line = refusal(capsys, env="no_such_module:Corridor-v0")
    assert code == 2 and "PYTHONPATH=." in line
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)  # not everybody has it
    code, line = refusal(capsys, env="Corrido-v0")
    assert code == 2 and "Corridor" in line and "--env MODULE:Corrido-v0 imports the module" in line
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        run(policy="needy_module:act")
    with pytest.raises(ZeroDivisionError):
        run(policy="policy_module:broken")


class Agent:
    """The part of an agent of Stable-Baselines3 that collect.py uses. Its file holds the name of its class."""

    def __init__(self, spaces):
        self.observation_space, self.action_space = spaces
        self.seed = None

    @classmethod
    def load(cls, path, device):
        name, _, state = Path(path).read_text().partition(" ")
        if name != cls.__name__:
            raise AttributeError("it has no network\nof this kind")
        agent = cls((Corridor.observation_space, Corridor.action_space))
        agent.state = state or None
        return agent

    def set_random_seed(self, seed):
        self.seed = seed

    def predict(self, observations, deterministic):
        drawn = np.random.default_rng(self.seed).uniform(0.1, 0.4)
        second = np.full(len(observations), 0.25 if deterministic else drawn)
        return np.stack([-observations[:, 0] / 4, second], axis=1), self.state


class PPO(Agent):
    pass


class RecurrentPPO(Agent):
    pass


class VecNormalize:
    @staticmethod
    def load(path, venv):
        if Path(path).read_text() != "statistics":
            raise AssertionError("spaces must have the same shape")
        return types.SimpleNamespace(normalize_obs=lambda observations: observations / 2)


@pytest.fixture
def agents(monkeypatch):
    """Modules with the names of Stable-Baselines3's."""
    modules = {"stable_baselines3": {"PPO": PPO, "Logger": str}, "sb3_contrib": {"RecurrentPPO": RecurrentPPO}}
    modules |= {"stable_baselines3.common": {}, "stable_baselines3.common.base_class": {"BaseAlgorithm": Agent}}
    modules["stable_baselines3.common.vec_env"] = {"VecNormalize": VecNormalize, "DummyVecEnv": list}
    for name, values in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    Path("agent.zip").write_text("PPO")
    Path("recurrent.zip").write_text("PPO with a state")
    Path("statistics.pkl").write_text("statistics")


def test_an_agent_of_stable_baselines_acts(agents):
    agent = "--algo", "ppo"
    dataset = run(*agent, policy="agent.zip")
    assert dataset.storage.metadata["algorithm_name"] == "agent.zip, ppo"
    assert "--algo=ppo" in dataset.storage.metadata["description"] and "stochastic" not in str(dataset.storage.metadata)
    for episode in dataset:
        assert episode.actions == pytest.approx(
            np.stack([-episode.observations[:-1, 0] / 4, 0.25 + 0 * episode.rewards], 1)
        )
    halved = run(*agent, "--vecnormalize", "statistics.pkl", "--force", policy="agent.zip")
    for episode in halved:
        assert episode.actions[:, 0] == pytest.approx(-episode.observations[:-1, 0] / 8)
    drawn = [
        run("--algo", "PPO", "--stochastic", "--seed", seed, "--force", policy="agent.zip")[0] for seed in (0, 0, 1)
    ]
    seconds = [episode.actions[0, 1] for episode in drawn]
    assert seconds[0] == seconds[1] != seconds[2] and 0.25 not in seconds
    assert run(*agent, "--noise", 0.1, "--force", policy="agent.zip")[0].actions[0, 0] != 0


@pytest.mark.parametrize(
    ("options", "named", "code", "words"),
    [
        ([], {}, 2, ["--policy agent.zip", "--algo ppo"]),
        (["--algo", "ppo"], {"policy": "random"}, 2, ["--algo", "agent.zip"]),
        (["--algo", "ppo"], {"policy": "nowhere.zip"}, 2, ["--policy", "file"]),
        (["--stochastic"], {"policy": "random"}, 2, ["--stochastic", "--algo"]),
        (["--vecnormalize", "statistics.pkl"], {"policy": "random"}, 2, ["--vecnormalize", "--algo"]),
        (["--algo", "dqn"], {}, 2, ["--algo dqn is not one of ppo"]),
        (["--algo", "RecurrentPPO"], {}, 2, ["--algo RecurrentPPO acts on more than an observation"]),
        (["--algo", "ppo"], {"policy": "recurrent.zip"}, 1, ["--policy recurrent.zip keeps a state"]),
        (["--script", "agent.zip"], {"policy": "json:loads"}, 2, ["--script goes with a policy.pt"]),
        (["--algo", "ppo"], {"policy": "other.zip"}, 1, ["--policy other.zip", "--algo ppo", "no network of this"]),
        (["--algo", "ppo"], {"env": "Keys-v0"}, 1, ["--policy agent.zip was trained with Box(", "Discrete(3"]),
        (["--algo", "ppo"], {"env": "Told-v0"}, 1, ["--policy agent.zip was trained with Box(", "Dict("]),
        (["--algo", "ppo", "--vecnormalize", "agent.zip"], {}, 1, ["--vecnormalize agent.zip", "same shape"]),
    ],
)
def test_agents_that_do_not_fit_are_one_line(options, named, code, words, agents, capsys, root):
    Path("other.zip").write_text("DQN")
    status, line = refusal(capsys, *options, **{"policy": "agent.zip"} | named)
    assert status == code and all(word in line for word in words), line
    assert not any(root.glob("test/*"))


def test_without_stable_baselines_the_line_says_what_to_install(capsys, monkeypatch):
    Path("agent.zip").touch()
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    status, line = refusal(capsys, "--algo", "ppo", policy="agent.zip")
    assert status == 1 and "stable_baselines3" in line and "requirements-extra.txt" in line


def test_outlines_know_pictures_and_kinds():
    box, outline = gym.spaces.Box, collect.outline
    assert outline(box(0, 255, (3, 8, 9), np.uint8)) == outline(box(0, 255, (8, 9, 3), np.uint8))
    assert outline(box(0, 1, (2,))) != outline(box(0, 1, (3,))) and outline(gym.spaces.Discrete(2)) != outline(
        box(0, 1, (2,))
    )
    assert outline(gym.spaces.Discrete(2)) != outline(gym.spaces.Discrete(3))
    assert outline(gym.spaces.Dict(a=box(0, 1, (2,)))) != outline(gym.spaces.Dict(b=box(0, 1, (2,))))


@pytest.mark.parametrize(("kind", "env"), [("PPO", "CartPole-v1"), ("DQN", "CartPole-v1"), ("SAC", "Pendulum-v1")])
def test_real_agents(kind, env, capsys):
    agents = pytest.importorskip("stable_baselines3", reason="requirements-extra.txt is not installed")
    agent = getattr(agents, kind)("MlpPolicy", env, device="cpu", seed=0)
    agent.save("agent.zip")
    for episode in run("--algo", kind.lower(), env=env, policy="agent.zip", steps=40):
        expected, _ = agent.predict(episode.observations[:-1], deterministic=True)
        assert episode.actions == pytest.approx(expected, abs=1e-5)
    capsys.readouterr()
    other = "sac" if kind != "SAC" else "ppo"
    status, line = refusal(capsys, "--algo", other, "--force", env=env, policy="agent.zip")
    assert status == 1 and f"cannot be loaded as --algo {other}" in line


@pytest.mark.parametrize(
    ("options", "named", "code", "words"),
    [
        (["--steps", "0"], {}, 2, ["--steps", "at least 1"]),
        (["--noise", "nan"], {}, 2, ["--noise"]),
        (["--noise", "0.1"], {"env": "CartPole-v1"}, 2, ["--noise", "CartPole-v1", "--epsilon"]),
        (["--epsilon", "nan"], {}, 2, ["--epsilon"]),
        (["--seed", "-1"], {}, 2, ["--seed"]),
        (["--see", "1"], {}, 2, ["--see"]),
        (["--ref_max_score", "1"], {}, 2, ["--ref_min_score", "--ref_max_score", "both"]),
        (["--ref_min_score", "1", "--ref_max_score", "1"], {}, 2, ["--ref_min_score", "below"]),
        (["--ref_min_score", "nan", "--ref_max_score", "1"], {}, 2, ["--ref_min_score"]),
        ([], {"id": "test/corridor"}, 2, ["--id test/corridor", "namespace/name-v0"]),
        ([], {"id": "../corridor-v0"}, 2, ["--id ../corridor-v0", "namespace/name-v0"]),
        ([], {"env": "LunarLandr-v3"}, 2, ["--env LunarLandr-v3", "LunarLander"]),
        ([], {"env": "LunarLander-v2"}, 2, ["--env LunarLander-v2"]),  # outdated
        ([], {"env": "no_such_module:Some-v0"}, 2, ["--env no_such_module:Some-v0", "no_such_module"]),
        ([], {"env": "Broken-v0"}, 2, ["--env Broken-v0", "no simulator of this version"]),
        ([], {"env": "Callable-v0"}, 2, ["--env Callable-v0", "Callable"]),
        ([], {"env": "Sequences-v0"}, 1, ["--env Sequences-v0", "space"]),
        ([], {"env": "Texts-v0"}, 1, ["--env Texts-v0", "space"]),
        ([], {"policy": "heuristic"}, 1, ["--policy heuristic", "LunarLander-v3", "Corridor-v0"]),
        ([], {}, 1, ["cannot be stored"]),  # with a root that no user can write to
        ([], {"policy": "nowhere/policy.pt"}, 2, ["--policy", "random", "heuristic", "file"]),
    ],
)
def test_user_errors_are_one_line_and_store_nothing(options, named, code, words, capsys, root, monkeypatch):
    if words == ["cannot be stored"]:
        (root.parent / "file").touch()
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(root.parent / "file/minari"))
    status, line = refusal(capsys, *options, **named)
    assert status == code
    assert all(word in line for word in words), line
    assert not root.exists() or not any(root.iterdir())


def test_as_a_program(root):
    command = [sys.executable, collect.__file__, "--env", LANDER, "--policy", "heuristic", "--id", "lander/medium-v0"]
    done = subprocess.run([*command, "--noise", "0.9", "--steps", "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lander/medium-v0: 2000 steps, ") and done.stdout.count("\n") == 1
    assert " ± " in done.stdout and str(root / "lander" / "medium-v0") in done.stdout
    assert not done.stderr  # the progress bar is for a terminal
    assert minari.load_dataset("lander/medium-v0").total_steps == 2000


def test_a_policy_with_masks_records_nothing(capsys):
    network = cql_dqn.QNetwork(4, [2], 16, 1, "dqn", 1)
    state = {"sizes": list(network.sizes), "weights": network.state_dict()}
    cql_dqn.save(Path("policy.pt"), state | {"encoding": {"observations": [], "actions": [], "masks": ["a", "b"]}})
    code, line = refusal(capsys, env="CartPole-v1", policy="policy.pt", id="test/masks-v0")
    assert code == 1 and "policy.pt was trained with masks" in line
