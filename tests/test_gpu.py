"""Compiled updates in CUDA graphs, several types, and runs that change the device. Skipped without a GPU; DEVICE=cpu
runs the same tests on a CPU, without graphs:

    DEVICE=cpu pytest tests/test_gpu.py
"""

import os
import types

import numpy as np
import pytest
import torch
from conftest import DATASET, METHODS, make_agent, observations_of, offline, table, weights

DEVICE = os.environ.get("DEVICE", "cuda")
GRAPHS = "cuda" in DEVICE
pytestmark = pytest.mark.skipif(GRAPHS and not torch.cuda.is_available(), reason="needs a GPU")
CONTINUOUS = [
    {}, {"precision": "bfloat16", "cql_backprop_actions": 2}, {"bc_steps": 5},
    {"precision": "tf32", "cql_lagrange": True, "cql_max_target_backup": True},
]  # fmt: skip
DISCRETE = [{}, {"precision": "bfloat16", "head": "c51"}, {"head": "qr", "max_grad_norm": 0.1}]
CONSTRAINED = [METHODS[x] | {"target_update_period": 1} for x in ("TD3+BC", "BEAR", "BCQ")]
VARIANTS = [("algorithms.offline.cql", x) for x in CONTINUOUS] + [("algorithms.discrete.cql_dqn", x) for x in DISCRETE]
VARIANTS += [("algorithms.offline.policy_constraint", x) for x in CONSTRAINED]
PIXELS = [{}, {"encoder": "impala"}, {"encoder": "nature", "precision": "bfloat16", "head": "c51"}]
VARIANTS += [("algorithms.discrete.cql_atari", x | {"target_update_period": 1}) for x in PIXELS]


def make_frames(script, config):
    """A thousand random transitions between images of Counter's size. Returns what samples them."""
    rng, rows = np.random.default_rng(0), np.arange(1000)
    data = {"frames": rng.integers(256, size=(1000, 6, 6), dtype=np.uint8), "starts": rows[::100]}
    data |= {"actions": rng.integers(12, size=1000), "rewards": rng.standard_normal(1000)}
    data |= {"terminals": rows % 100 == 99, "timeouts": np.zeros(1000, bool)}
    frames = script.Frames(data, config)
    buffer = script.ReplayBuffer(script.td_columns(data, config), DEVICE)
    frames.load(buffer, config)
    return script.Ranks(config).sampler(buffer, frames)


def make_sampler(script, config):
    """Returns what samples a thousand random transitions, in Counter's sizes."""
    if hasattr(script, "Frames"):
        return make_frames(script, config)
    rng = np.random.default_rng(0)
    data = {name: rng.standard_normal((1000, 3)) for name in ("observations", "next_observations")}
    data["returns"] = rng.standard_normal(1000)
    data |= {
        "rewards": rng.standard_normal(1000),
        "timeouts": np.zeros(1000, bool),
        "terminals": rng.random(1000) < 0.1,
    }
    if hasattr(script, "td_columns"):
        columns = script.td_columns(data | {"actions": rng.integers(12, size=1000)}, config)
        return script.ReplayBuffer(columns, DEVICE).sample
    return script.ReplayBuffer(data | {"actions": rng.uniform(-1, 1, (1000, 2))}, DEVICE).sample


def updated(script, tiny, seed=0, **options):
    """Returns all parameters after 60 updates, the numbers of updates done at once, and the mean of each metric."""
    steps = []
    config = tiny(device=DEVICE, hidden_dim=64, **options)
    torch.manual_seed(0)
    agent, run = make_agent(script, config), script.Run(config, 60)
    if options.get("head") == "c51":
        agent.critic.atoms.copy_(torch.linspace(-5, 5, config.n_atoms))
    sample = make_sampler(script, config)
    torch.manual_seed(seed)
    run_until = script.updater(config, agent, sample, run)
    for end in (25, 40, 50, 60):
        run_until(end, types.SimpleNamespace(update=steps.append))
        assert sum(steps) == agent.n_updates == run.sums[0, -1] == end
    return torch.cat([x.detach().flatten().double().cpu() for x in agent.parameters()]), steps, run.means()


@pytest.mark.parametrize(("script", "options"), VARIANTS, indirect=["script"])
def test_compiled_updates_and_graphs_are_eager_updates(options, script, tiny):
    """With the same random numbers, parameters differ by rounding only; with others they would differ far more."""
    eager, _, expected = updated(script, tiny, compile=False, **options)
    fast, steps, means = updated(script, tiny, compile=True, **options)
    others, *_ = updated(script, tiny, seed=1, compile=False, **options)
    rounded = "precision" in options
    assert (fast - eager).norm() < (0.5 if rounded else 0.2) * (others - eager).norm()
    assert means.keys() == expected.keys() and all(np.isfinite(list(means.values())))
    name = next(name for name in means if name.startswith("average_target_q"))
    assert means[name] == pytest.approx(expected[name], rel=0.1 if rounded else 0.01, abs=0.01)
    assert steps.count(script.GRAPH_UPDATES) >= 3 if GRAPHS else set(steps) == {1}


@offline
def test_resumed_run_is_the_uninterrupted_one(script, run, tiny):
    """Except for rounding, since the graphs start elsewhere."""
    options = {"device": DEVICE, "compile": True, "max_timesteps": 60, "eval_freq": 30}
    whole = run(run_id="whole", **options)
    half = run(run_id="half", **options | {"max_timesteps": 30})
    run(run_id="half", **options)
    rows, others = table(whole), table(half)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == ["30", "60"]
    first, second = weights(whole), weights(half)
    fresh = weights(run(run_id="fresh", **options | {"seed": 1}))
    names = [name for name in first if first[name].ndim == 2 and "noise" not in name]
    for name in names:
        distance, other = ((x[name] - first[name]).norm().item() for x in (second, fresh))
        assert distance < 0.05 * other


@offline
@pytest.mark.parametrize(
    ("devices", "precision"), [(("cpu", DEVICE), "float32"), ((DEVICE, "cpu"), "bfloat16"), ((DEVICE, DEVICE), "tf32")]
)
def test_a_run_of_any_type_may_change_the_device(devices, precision, run, script):
    options = {"precision": precision, "compile": False}
    folder = run(device=devices[0], max_timesteps=10, **options)
    rows = table(run(device=devices[1], **options))
    assert [row["step"] for row in rows] == ["10", "20", "25"] and rows[-1]["eval_return"]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values() if value)
    observations = observations_of(script, script.load_dataset(DATASET))
    actions = [script.load_policy(folder / "policy.pt", device)(observations) for device in ("cpu", DEVICE)]
    assert actions[0] == pytest.approx(actions[1], abs=1e-4) and actions[0].dtype == actions[1].dtype
