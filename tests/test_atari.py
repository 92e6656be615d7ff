"""The script for pixels: encoders against the published ones, losses against cql_dqn.py's, stacks of frames against a
slow reading, data that it must refuse, policies, and games."""

import copy
import json
import math
import sys
import zlib
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DATASET,
    FRAME,
    SURPLUS,
    Counter,
    observations_of,
    pixels,
    record,
    refusal,
    slow_stacks,
    store,
    table,
    write_frames,
)
from test_discrete import slow_quantile_loss
from test_losses import check_updates, close, flat
from torch import nn

from algorithms.discrete import cql_atari as cql
from algorithms.discrete import cql_dqn
from benchmarks import export, fqe
from benchmarks import record as record_program

A = 3
pytestmark = pixels
HEADS = pytest.mark.parametrize("head", ("dqn", "c51", "qr"))


@pytest.fixture(autouse=True)
def world(script):
    """Counter shows images in all tests here."""


# Encoders


def slow_places(size, kernel, stride):
    """The first and the last pixel under the kernel at each place, as TensorFlow's "same" puts them: pixels outside are
    shared between both ends, an odd one stands at the far end."""
    n = -(-size // stride)
    outside = max((n - 1) * stride + kernel - size, 0)
    return [(i * stride - outside // 2, i * stride - outside // 2 + kernel) for i in range(n)]


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (4, 2), (3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("size", [(84, 5), (9, 10), (11, 21)])
def test_padding_is_the_one_called_same(size, kernel, stride):
    image = torch.randn(1, 1, *size)
    mean = F.avg_pool2d(cql.SamePad(kernel, stride)(image), kernel, stride)[0, 0]
    greatest = F.max_pool2d(cql.SamePad(kernel, stride, -math.inf)(image), kernel, stride)[0, 0]
    rows, columns = (slow_places(x, kernel, stride) for x in size)
    assert mean.shape == (math.ceil(size[0] / stride), math.ceil(size[1] / stride)) == greatest.shape
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            part = image[0, 0, max(top, 0) : bottom, max(left, 0) : right]
            assert torch.isclose(mean[i, j], part.sum() / kernel**2, atol=1e-6) and greatest[i, j] == part.max()


ENCODERS = {  # shape of a stack, width, sides after each part, inputs of the dense layer, parameters by arithmetic
    "nature": ([4, 84, 84], 512, [21, 11, 11], 7744, [8224, 32_832, 36_928, 7744 * 512 + 512]),
    "impala": (
        [4, 84, 84], 256, [42, 21, 11], 3872,
        [592 + 4 * 2320, 4640 + 4 * 9248, 9248 + 4 * 9248, 3872 * 256 + 256],
    ),
    "minatar": ([4, 10, 10], 128, [8], 1024, [592, 1024 * 128 + 128]),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_published_sizes(name):
    shape, width, sides, n_inputs, parameters = ENCODERS[name]
    network = cql.QNetwork(shape, [6], width, name, "qr", 200)
    x, found = torch.zeros(2, *shape), []
    for layer in network.encoder:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d) or isinstance(layer, nn.Conv2d) and name != "impala":
            found.append(x.shape[-1])
            assert x.shape[-1] == x.shape[-2]
    dense = [x for x in network.encoder if isinstance(x, nn.Linear)]
    assert found == sides and [x.in_features for x in dense] == [n_inputs] and x.shape == (2, width)
    assert sum(x.numel() for x in network.encoder.parameters()) == sum(parameters)
    assert sum(x.numel() for x in network.last.parameters()) == (width + 1) * 6 * 200
    assert network(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 6, 200)


@pytest.mark.parametrize("name", ENCODERS)
def test_first_weights_are_uniform_within_1_316_over_the_root_of_the_inputs_and_biases_are_0(name):
    torch.manual_seed(0)
    shape, width, *_ = ENCODERS[name]
    network = cql.QNetwork(shape, [6], width, name, "qr", 200)
    layers = [x for x in network.modules() if isinstance(x, (nn.Conv2d, nn.Linear))]
    assert len(layers) == {"nature": 5, "impala": 17, "minatar": 3}[name]
    for layer in layers:
        bound = 1.316 / math.sqrt(layer.weight[0].numel())
        assert not layer.bias.any() and 0.97 * bound < layer.weight.abs().max() < 1.001 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_pixels_are_divided_by_their_largest_value():
    network = cql.QNetwork([2, 5, 4], [A], 8, "minatar", "dqn", 1, frame_max=3.0)
    stacks = torch.randint(4, (6, 2, 5, 4), dtype=torch.uint8)
    assert torch.equal(network.features(stacks), network.encoder(stacks / 3))


def test_an_impala_network_is_the_same_in_another_order_of_its_memory():
    network = cql.QNetwork([4, 9, 8], [A], 16, "impala", "dqn", 1)
    other, stacks = copy.deepcopy(network), torch.randint(256, (5, 4, 9, 8), dtype=torch.uint8)
    other.memory_format = torch.contiguous_format
    other.encoder.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(network(stacks), other(stacks))


# The loss: that of cql_dqn.py for the same outputs of the networks


@pytest.fixture
def twins(float64):
    """An agent of each script, whose networks compute the same functions of pixels."""

    def twins(**options):
        torch.manual_seed(0)
        options = {"device": "cpu", "hidden_dim": 8, "n_atoms": 5, "n_quantiles": 4, "qf_lr": 0.01} | options
        options |= {"target_update_period": 2, "soft_target_update_rate": 0.3, "eval_epsilon": 0.0}
        options = {"td_error": "huber", "target": "double", "cql_alpha": 1.0, "head": "qr"} | options
        flat_agent = cql_dqn.DiscreteCQL(cql_dqn.TrainConfig(**options, q_n_hidden_layers=1), 18, [A])
        options |= {"encoder": "minatar", "frame_stack": 2, "adam_eps": 1e-8}
        agent = cql.DiscreteCQL(cql.TrainConfig(**options), [2, 3, 3], [A], 255.0)
        with torch.no_grad():
            for parameter in flat_agent.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        for name in ("critic", "target_critic", "behaviour"):
            network, other = getattr(agent, name), getattr(flat_agent, name)
            if network is not None:
                network.encoder = nn.Sequential(nn.Flatten(), copy.deepcopy(other.hidden))
                network.last = copy.deepcopy(other.last)
                for each in (network, other):
                    each.atoms.copy_(torch.linspace(-2, 2, len(each.atoms)))
        for i, (name, parameters) in enumerate(agent.parameter_groups.items()):
            parameters[:] = getattr(agent, name).parameters()
            agent.optimizer.param_groups[i]["params"] = parameters
        return agent, flat_agent

    return twins


def batches(n=7, seed=1):
    """The same transitions for both."""
    torch.manual_seed(seed)
    stacks = torch.randint(256, (2, n, 2, 3, 3), dtype=torch.uint8)
    terminals = (torch.arange(n) % 3 == 1).double()
    columns = torch.randint(A, (n,)), 3 * torch.randn(n)
    more = terminals, 0.9 ** (1 + 2 * (torch.arange(n) % 2)) * (1 - terminals), torch.randint(A, (n,))
    vectors = stacks.flatten(2) / 255.0
    return cql.Batch(stacks[0], *columns, stacks[1], *more), cql_dqn.Batch(vectors[0], *columns, vectors[1], *more)


def ordered(tensors):
    """All numbers; the scripts have their layers, which differ in shape, in another order."""
    return flat(sorted(tensors, key=lambda x: x.shape))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"target": "max", "td_error": "squared"}, {"target": "sarsa", "cql_alpha": 0.0}, {"cql_variant": "rho"},
        {"cql_variant": "var", "cql_alpha": 3.0}, {"bc_only": True}, {"dr3_coefficient": 0.7, "max_grad_norm": 0.1},
        {"dr3_coefficient": 0.7, "normalize_features": True, "target": "max"}, {"weight_decay": 0.3},
    ],
    ids=str,
)  # fmt: skip
@HEADS
def test_targets_losses_gradients_and_updates_are_those_of_cql_dqn(head, options, twins):
    agent, other = twins(head=head, **options)
    batch, same = batches()
    assert close(agent.critic(batch.observations), other.critic(same.observations))
    assert close(agent.td_target(batch), other.td_target(same))
    (gradients, metrics), (expected, others) = agent.gradients(batch), other.gradients(same)
    assert metrics.keys() == others.keys() and gradients.keys() == expected.keys()
    assert {name for name in metrics if not close(metrics[name], others[name])} == set()
    for name in gradients:
        assert close(ordered(gradients[name]), ordered(expected[name])) and flat(gradients[name]).norm() > 0.01
    for found, wanted in ((agent.holdout_metrics(batch), other.holdout_metrics(same)),
                          (agent.feature_metrics(batch), other.feature_metrics(same))):  # fmt: skip
        assert found == pytest.approx(wanted)
    for seed in range(3):
        agent.update(batches(seed=seed)[0]), other.update(batches(seed=seed)[1])
    for name in ("critic", "target_critic", "behaviour"):
        pair = getattr(agent, name), getattr(other, name)
        assert (pair[0] is pair[1] is None) or close(*(ordered(x.parameters()) for x in pair), 1e-7)


def test_the_authors_loss_is_fifty_times_ours_with_fifty_times_our_weight():
    """Theirs sums over 200 quantiles the mean over targets of Huber's error with 1/2."""
    torch.manual_seed(0)
    quantiles, targets, n = 2 * torch.randn(1, 200), 2 * torch.randn(1, 200), 200
    theirs = 0
    for i in range(n):
        u = targets[0] - quantiles[0, i]
        huber = torch.where(u.abs() <= 1, u**2 / 2, u.abs() - 0.5)
        theirs += (abs((i + 0.5) / n - (u < 0).float()) * huber).mean()
    assert torch.isclose(50 * cql.quantile_loss(quantiles, targets, True)[0], theirs, rtol=1e-5)
    assert cql.TrainConfig(device="cpu").cql_alpha == 4 / 50
    assert cql.TrainConfig(device="cpu").adam_eps == pytest.approx(3.125e-4 / 50)
    few = quantiles[:, :9], targets[:, :9]
    assert cql.quantile_loss(*few, True)[0] == pytest.approx(slow_quantile_loss(few[0][0], few[1][0], True).item())


def test_update_is_a_step_of_adam_then_of_the_target(twins):
    options = {"soft_target_update_rate": 0.3, "target_update_period": 3, "qf_lr": 0.03, "adam_eps": 1e-8}
    options |= {"device": "cpu", "hidden_dim": 8, "encoder": "minatar", "frame_stack": 2, "n_quantiles": 4}

    def make_agent():
        torch.manual_seed(0)
        agent = cql.DiscreteCQL(cql.TrainConfig(**options), [2, 3, 3], [A], 255.0)
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        return agent

    check_updates(
        make_agent, lambda: batches(seed=torch.randint(99, ()).item())[0], lambda _: (), {"critic": 0.03}, 0.3, 3
    )


# Stacks of frames

ENDS = ["terminal, frame stored", "terminal", "time-out"]
EPISODES = [
    (4, ENDS[0]),
    (1, ENDS[1]),
    (1, ENDS[2]),
    (5, ENDS[2]),
    (3, ENDS[1]),
    (1, ENDS[0]),
    (6, ENDS[2]),
    (2, ENDS[1]),
]


def make_data(episodes=EPISODES, shape=(5, 4)):
    """Every pixel is drawn; the action of a transition is its number, and so is its reward."""
    lengths, kinds = zip(*episodes)
    n_frames = [length + (kind != "terminal") for length, kind in episodes]
    last = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros((2, sum(lengths)), bool)
    for i, kind in zip(last, kinds):
        (timeouts if kind == "time-out" else terminals)[i] = True
    frames = np.random.default_rng(0).integers(1, 256, (sum(n_frames), *shape), dtype=np.uint8)
    columns = {"actions": np.arange(sum(lengths))[:, None], "rewards": np.arange(sum(lengths), dtype=np.float32)}
    starts = np.cumsum([0, *n_frames[:-1]])
    return columns | {"terminals": terminals, "timeouts": timeouts, "frames": frames, "starts": starts}


class Stop(Exception):
    """Ends `train` where its updates would start."""


@pytest.fixture
def sampled(script, tiny, monkeypatch):
    """Minibatches as `train` would draw them, and the held-out batch: sampled(data, n, option=value)."""

    def sampled(data, n, **options):
        found, holdouts = [], []

        def updater(config, agent, sample, run):
            torch.manual_seed(7)
            found.extend(sample(config.batch_size) for _ in range(n))
            raise Stop

        holdout_batch = script.holdout_batch
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(script, "updater", updater)
            patch.setattr(script, "holdout_batch", lambda *x: holdouts.append(holdout_batch(*x)) or holdouts[0])
            patch.setattr(script.Frames, "fill", watched(script.Frames.fill, holdouts))
            script.train(tiny(env="mine", eval_env="none", discount=0.5, **options), data=data)
        return found, holdouts[0]

    def watched(fill, holdouts):
        def watch(frames, batch):
            filled = fill(frames, batch)
            if holdouts and batch is holdouts[0]:
                holdouts[0] = filled
            return filled

        return watch

    return sampled


def slow_rows(data, config):
    """By action: stack, rewards, stack after them (None if it is not stored), whether they end in a terminal state,
    discount."""
    stacks, rows = slow_stacks(data, config["frame_stack"]), {}
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    for first, end in pairwise([-1, *ends]):
        usable = [*range(first + 1, end + 1)]
        if config.get("target") == "sarsa" and not data["terminals"][end]:
            usable.pop()
        for i in usable:
            used = [j for j in usable if i <= j < i + config["n_step"]]
            reward = sum(0.5 ** (j - i) * float(data["rewards"][j]) for j in used)
            terminal = bool(data["terminals"][used[-1]])
            discount = 0.5 ** len(used) * (not terminal)
            rows[i] = stacks[i][0], reward, stacks[used[-1]][1], terminal, discount
    return rows


def check_rows(batch, rows):
    for stack, action, reward, after, terminal, discount, *_ in zip(*(x for x in batch if x is not None)):
        expected = rows[int(action)]
        assert stack.dtype == torch.uint8 and np.array_equal(stack, expected[0])
        assert (float(reward), bool(terminal), float(discount)) == pytest.approx((expected[1], *expected[3:]))
        assert (expected[2] is None and terminal) or np.array_equal(after, expected[2])


@pytest.mark.parametrize("target", ["max", "sarsa"])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("frame_stack", [1, 3, 4])
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)], ids=["grey", "planes"])
def test_sampled_rows_are_those_of_a_slow_reading(shape, frame_stack, n_step, target, sampled):
    """No stack has a frame of another episode; frames on the device give the same batches."""
    data, options = make_data(shape=shape), {"frame_stack": frame_stack, "n_step": n_step, "target": target}
    rows, before = slow_rows(data, options), copy.deepcopy(data)
    batches, _ = sampled(data, 10, **options)
    for batch in batches:
        check_rows(batch, rows)
    assert {int(x) for batch in batches for x in batch.actions} == rows.keys()
    assert data.keys() == before.keys() and all(np.array_equal(data[x], before[x]) for x in data)
    others, _ = sampled(data, 10, frames_on_device=True, **options)
    for pair in zip(batches, others):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(*pair))


@pytest.mark.parametrize("on_device", [True, False])
def test_held_out_rows_are_whole_episodes_that_are_not_drawn(on_device, sampled):
    data, options = make_data(), {"frame_stack": 3, "n_step": 2}
    rows, numbers = slow_rows(data, options), np.repeat(range(len(EPISODES)), [x for x, _ in EPISODES])
    batches, holdout = sampled(data, 10, holdout_fraction=0.4, frames_on_device=on_device, **options)
    for batch in (*batches, holdout):
        check_rows(batch, rows)
    held_out, drawn = {*holdout.actions.tolist()}, {int(x) for batch in batches for x in batch.actions}
    assert held_out | drawn == rows.keys() and not held_out & drawn and len(holdout.actions) == len(held_out)
    assert len({*numbers[[*held_out]]}) == 4 and not {*numbers[[*held_out]]} & {*numbers[[*drawn]]}


def test_the_device_holds_the_frames_of_its_own_transitions_alone(script, tiny):
    data, config = make_data(), tiny(env="mine", frame_stack=3, frames_on_device=True)
    frames, n_frames = script.Frames(data, config), len(make_data()["frames"])
    first = np.flatnonzero(data["terminals"] | data["timeouts"])[2] + 1  # of the fourth episode
    columns = data | {"actions": data["actions"][:, 0], "discounts": data["rewards"]}
    buffer = script.ReplayBuffer({key: column[first:] for key, column in columns.items()}, "cpu")
    mapped = frames.fill(buffer.rows(slice(None)))
    frames.load(buffer, config)
    copied = frames.fill(buffer.rows(slice(None)))
    assert frames.first > 0 and len(frames.frames) == n_frames - frames.first
    assert all(torch.equal(x, y) for x, y in zip(mapped[:6], copied[:6]))


@pytest.mark.parametrize("frame_stack", [1, 4])
def test_stacks_in_evaluation_are_those_of_the_data(frame_stack, script, tiny):
    """The recorded episodes, played again. The first stacks have zeros before the start."""
    data, config = script.load_dataset(DATASET), tiny(frame_stack=frame_stack, n_episodes=1)
    task = script.Task(config, script.with_stacks(config, data))
    expected = np.stack([stack for stack, _ in slow_stacks(data, frame_stack)])
    actions, seen = iter(data["actions"]), []
    for i in range(20):
        result = script.rollout(lambda x: (seen.append(x[0]), next(actions)[None])[1], task.envs, 1, 100 + i)
        assert result["length"] == [Counter.length(100 + i)]
    assert np.array_equal(seen, expected) and seen[0].dtype == np.uint8
    assert frame_stack == 1 or not seen[0][:-1].any() and seen[0][-1].any()


def test_planes_of_an_environment_come_first_as_those_of_the_data_do(script):
    space = gym.spaces.Box(0, 1, (4, 10, 10, 6), bool)  # four frames of MinAtar
    stacks = np.random.default_rng(0).random((2, *space.shape)) < 0.5
    flat_stacks = script.flatten(stacks, space)
    assert flat_stacks.shape == (2, 24, 10, 10) and flat_stacks.dtype == np.uint8
    for frame in range(4):
        for plane in range(6):
            assert np.array_equal(flat_stacks[:, 6 * frame + plane], stacks[:, frame, :, :, plane])
    for wrong in (gym.spaces.Box(-1, 1, (4, 5), np.float32), gym.spaces.Box(0, 1, (4, 8, 8), np.float32)):
        assert "this script takes images" in refusal(script.flatten, np.zeros((1, *wrong.shape)), wrong)[1]


# Data that are refused


def changed(**changes):
    """Arrays of a good dataset, each changed by a function."""

    def change():
        data = make_data(shape=FRAME.shape)
        return data | {key: function(data[key]) for key, function in changes.items()}

    return change


WRONG = {
    "no start at 0": (changed(starts=lambda x: x + 1, frames=lambda x: np.concatenate([x[:1], x])), "starts"),
    "too few frames": (changed(frames=lambda x: x[:-1]), "episode 7 has 2 transitions and 1 frames"),
    "too many frames": (changed(frames=lambda x: np.concatenate([x, x])), "episode 7 has 2 transitions and "),
    "float frames": (changed(frames=lambda x: x / 255), "frames are uint8 images"),
    "vectors for frames": (changed(frames=lambda x: x[:, 0]), "frames are uint8 images"),
    "starts beside the ends": (changed(starts=lambda x: x + (np.arange(len(x)) == 3)), "1 transitions and 3"),
    "a start is missing": (changed(starts=lambda x: x[:-1]), "7 starts, 8 episodes"),
    "no frame after a time-out": (
        changed(frames=lambda x: np.delete(x, 8, axis=0), starts=lambda x: x - (x > 7)), "1 transitions and 1",
    ),
    "flags": (changed(terminals=lambda x: x + 0.5), "terminals are 0 or 1"),
    "rewards": (changed(rewards=lambda x: x * np.nan), "rewards hold NaN"),
    "action above": (changed(actions=lambda x: x + 1), "an action is 23"),
    "too few actions": (changed(actions=lambda x: x[:-1]), "actions have shape"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_arrays_are_one_line_before_training(fault, script, new_dataset, tiny, tmp_path):
    make, words = WRONG[fault]
    metadata = {"format": 1, "kind": "frames", "frame_max": 255, "action_low": [0], "action_high": [22]}
    name = write_frames("toy/wrong-v0", make(), metadata)
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and f"--env {name}" in line and words in line, line
    assert not (tmp_path / "runs").exists()


def test_other_forms_of_data_are_one_line(script, new_dataset, tiny, tmp_path):
    def refused(name, **options):
        status, line = refusal(script.train, tiny(env=name, **options))
        assert status == 1 and name in line and not (tmp_path / "runs").exists()
        return line

    assert "Minari dataset" in refused(store("toy/minari-v0", record("Counter-v0", [1]), env="Counter-v0"))
    for kind, words in (("transitions", "cql_dqn.py reads"), ("videos", "this script reads 1 of frames")):
        metadata = {"format": 1, "kind": kind, "action_low": [0], "action_high": [22]}
        assert words in refused(write_frames(f"toy/{kind}-v0", make_data(), metadata))
    folder = tmp_path / "minari" / write_frames("toy/new-v2", make_data(), metadata | {"kind": "frames"})
    content = (folder / "frames.npy").read_bytes()
    for broken in (content[:100], content[:-20], b""):
        (folder / "frames.npy").write_bytes(broken)
        assert "cannot be read" in refused("toy/new-v2")
    (folder / "starts.npy").unlink()
    assert "cannot be read" in refused("toy/new-v2")
    assert "cannot be read" in refused("toy/missing-v0")


def test_environments_that_do_not_fit_are_one_line(script, tiny, tmp_path):
    for name, words in (
        ("Large-v0", "sizes ([2, 6, 6], 2), Large-v0 ([2, 8, 8], 2)"),
        ("Words-v0", "Words-v0 ([2, 6, 6], 1)"), ("Fine-v0", "Discrete"),
        ("Moved-v0", "action_low is [-2, 0] in"), ("CartPole-v1", "this script takes images"), ("No-v0", "--eval_env"),
    ):  # fmt: skip
        status, line = refusal(lambda name=name: script.train(tiny(eval_env=name)))
        assert status in (1, 2) and name.removesuffix("CartPole-v1") in line and words in line, line
    assert not (tmp_path / "runs").exists()


# Policies


def test_returns_of_whole_episodes_may_stand_in_the_metadata(script, new_dataset, run, capsys):
    """As an import writes them that dropped rows."""
    data = script.load_dataset(DATASET)
    arrays = {key: data[key] for key in ("frames", "starts", "actions", "rewards", "terminals", "timeouts")}
    metadata = {"format": 1, "kind": "frames", "action_low": [-2, 0], "action_high": [1, 2]}
    name = write_frames("toy/returns-v0", arrays, metadata | {"episode_returns": [100, 300], "frames": [1, 6, 6]})
    run(env=name, max_timesteps=1)
    assert "behaviour return 200.0 ± 100.0" in capsys.readouterr().out


def test_programs_play_a_policy_of_pixels_or_refuse_it(cloned, capsys):
    folder = cloned(n_episodes=5, eval_epsilon=0.0)
    record_program.main([str(folder / "policy.pt"), "--env=toy/time-v0", "--episodes=5", "--no_video"])
    (row,) = table(folder)
    returned = "return {:.1f} ± {:.1f}".format(*(float(row[x]) for x in ("eval_return", "eval_return_std")))
    assert f"{returned} over 5 episodes" in capsys.readouterr().out
    for program, options, words in (
        (fqe, ["--env=toy/time-v0", "--device=cpu"], "has frames, and FQE takes vectors"),
        (export, [], "the policy takes stacks of frames"),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main([str(folder / "policy.pt"), *options])
        err = capsys.readouterr().err
        assert stop.value.code == 1 and err.count("\n") == 1 and words in err


@pytest.fixture
def cloned(run, new_dataset):
    """Trains a clone of actions that follow the time, which the images show: cloned(option=value) -> folder."""

    def act(env, image):
        t = int(image[2, 0]) // 20
        return np.array([t % 4 - 2, t % 3])

    name = new_dataset(record("Counter-v0", range(30), act), "toy/time-v0", env="Counter-v0")
    return lambda **options: run(env=name, bc_only=True, qf_lr=1e-2, max_timesteps=60, eval_freq=60, **options)


def test_a_policy_takes_a_stack_or_many_and_nothing_else(script, cloned):
    policy = script.load_policy(cloned() / "policy.pt")
    stacks = observations_of(script, script.load_dataset(DATASET))
    actions, scores = policy(stacks), policy.scores(stacks)
    assert actions.shape == (100, 2) and scores.shape == (100, 12) and np.ptp(actions) > 0
    assert [policy(x).tolist() for x in stacks[:9]] == actions[:9].tolist()
    assert policy.scores(stacks[3]) == pytest.approx(scores[3], abs=1e-5)
    best = np.stack(np.unravel_index(scores.argmax(axis=1), (4, 3)), axis=1) + [-2, 0]
    assert np.array_equal(actions, best)
    assert np.array_equal(policy(stacks > 100), policy((stacks > 100).astype(np.uint8)))  # planes of flags
    float_stacks, wider = stacks / 255, np.zeros((2, 6, 7), np.uint8)
    for wrong in (stacks[0, 0], stacks[None], float_stacks, wider, stacks[:, :1], stacks[0].tolist(), None, "stack", 3):
        with pytest.raises(script.DataError, match=r"uint8 or bool of shape \(2, 6, 6\), not"):
            policy(wrong)


def test_a_policy_acts_as_it_did_in_evaluation(script, cloned, monkeypatch):
    """load_policy's takes the same actions in stacks that are made here."""
    step, log = Counter.step, []

    def logged(self, action):
        if self.number != SURPLUS:
            log.append((self.number, self.t, *action))
        return step(self, action)

    monkeypatch.setattr(Counter, "step", logged)
    folder = cloned(n_episodes=12, frame_stack=3, eval_epsilon=0.0)
    evaluated, policy = sorted(log), script.load_policy(folder / "policy.pt")
    log.clear()
    env = gym.make("Counter-v0")
    for seed in range(12):
        frames, done = [*np.zeros((2, *FRAME.shape), np.uint8), env.reset(seed=seed)[0]], False
        while not done:
            frame, _, terminated, truncated, _ = env.step(policy(np.stack(frames[-3:])))
            frames.append(frame)
            done = terminated or truncated
    assert evaluated == log and len({x[2:] for x in log}) > 3
    log.clear()
    played = script.evaluate(policy, "Counter-v0", 12, 0)
    assert sorted(log) == evaluated and played["length"] == [Counter.length(x) for x in range(12)]
    assert "action_low is [0] in Words-v0, and [-2, 0]" in refusal(script.evaluate, policy, "Words-v0", 1, 0)[1]


def test_a_policy_divides_pixels_as_its_training_did(script, new_dataset, tiny, run, monkeypatch):
    """By frame_max of the data; a network that divides by another number does not continue its training."""
    data = script.load_dataset(DATASET)
    arrays = {key: data[key] for key in ("frames", "starts", "actions", "rewards", "terminals", "timeouts")}
    metadata = {"format": 1, "kind": "frames", "action_low": [-2, 0], "action_high": [1, 2]}
    name = write_frames("toy/new-v0", arrays | {"frames": data["frames"] // 128}, metadata | {"frame_max": 1})
    agents, update = [], script.DiscreteCQL.update
    monkeypatch.setattr(script.DiscreteCQL, "update", lambda self, batch: (agents.append(self), update(self, batch))[1])
    folder = run(env=name, cql_variant="var", max_timesteps=1)
    networks = agents[0].critic, agents[0].target_critic, agents[0].behaviour
    assert [x.frame_max for x in (*networks, script.load_policy(folder / "policy.pt").network)] == 4 * [1]
    status, line = refusal(
        script.train, tiny(load_model=str(folder / "checkpoint.pt"), cql_variant="var", run_id="next")
    )
    assert status == 1 and "holds a network of sizes" in line


# Games


class Screen(gym.Env):
    """A light on the left or the right. An action earns 1 where the light was one frame before."""

    observation_space, action_space = gym.spaces.Box(0, 255, (6, 6), np.uint8), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sides = 0, self.np_random.integers(2, size=11)
        return self.observe(), {}

    def observe(self):
        half = self.observation_space.shape[1] // 2
        image = np.zeros(self.observation_space.shape, np.uint8)
        image[:, self.sides[self.t] * half :][:, :half] = 250
        return image

    def step(self, action):
        reward = float(self.t > 0 and action == self.sides[self.t - 1])
        self.t += 1
        return self.observe(), reward, False, self.t == 10, {}


class Colors(Screen):
    """The same in three colors and twice the size."""

    observation_space = gym.spaces.Box(0, 255, (12, 12, 3), np.uint8)

    def observe(self):
        return super().observe() // np.array([1, 2, 5], np.uint8)


for kind in (Screen, Colors):
    gym.register(f"{kind.__name__}-v0", entry_point=kind)


@pytest.mark.parametrize("head", ["qr", "c51"])
def test_learns_more_than_the_behaviour_did(head, script, new_dataset, tiny):
    """The frame before the last shows which action earns."""
    episodes = record("Screen-v0", range(60))
    options = {"env": new_dataset(episodes, env="Screen-v0"), "head": head, "hidden_dim": 32, "qf_lr": 1e-3}
    options |= {"max_timesteps": 200, "eval_freq": 200, "n_episodes": 10, "eval_seed": 1000, "discount": 0.5}
    row = script.train(tiny(**options, cql_alpha=0.1, v_min=-1.0, v_max=3.0, n_atoms=11))
    assert np.mean([x.rewards.sum() for x in episodes]) < 5.5 and row["eval_return"] > 8.5


def image_wrappers(env):
    return gym.wrappers.ResizeObservation(gym.wrappers.GrayscaleObservation(env), (6, 6))


IMAGE_WRAPPERS = [["GrayscaleObservation", {}], ["ResizeObservation", {"shape": [6, 6]}], ["RecordVideo", {}]]


def test_frames_of_an_environment_pass_the_recordings_wrappers(
    script, new_dataset, tiny, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("cv2")
    make = gym.make
    with monkeypatch.context() as patch:
        patch.setattr(gym, "make", lambda id: image_wrappers(make(id)))
        episodes = record("Colors-v0", range(3))
    name = new_dataset(episodes, action_space=Colors.action_space)
    path = tmp_path / "minari" / name / "metadata.json"
    metadata = json.loads(path.read_text()) | {"environment": {"id": "Colors-v0", "wrappers": IMAGE_WRAPPERS}}
    path.write_text(json.dumps(metadata))
    data, config = script.load_dataset(name), tiny(env=name, n_episodes=1)
    task = script.Task(config, script.with_stacks(config, data))
    assert "RecordVideo changes nothing" in capsys.readouterr().out
    actions, seen = iter(data["actions"]), []
    for seed in range(3):
        script.rollout(lambda x: (seen.append(x[0]), next(actions)[0][None])[1], task.envs, 1, seed)
    assert np.array_equal(seen, observations_of(script, data)) and len(np.unique(seen)) == 2
    path.write_text(json.dumps(metadata | {"environment": {"id": "Colors-v0", "wrappers": [["MaxAndSkip", {}]]}}))
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and "recorded through MaxAndSkip" in line
    path.write_text(json.dumps(metadata))
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, line = refusal(script.train, tiny(env=name))
    assert status == 1 and "cannot be made" in line and "opencv" in line


@pytest.mark.parametrize(
    ("id", "modules", "cure"),
    [
        ("ALE/Pong-v5", ["ale_py"], "pip install ale-py opencv-python-headless"),
        ("MinAtar/Breakout-v1", ["minatar", "minatar.gym"], "pip install minatar"),
    ],
)
def test_a_missing_package_of_games_is_one_line(id, modules, cure, script, tiny, monkeypatch):
    monkeypatch.setattr(gym.envs.registration, "registry", {x: y for x, y in gym.registry.items() if id[:3] not in x})
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    data = script.load_dataset(DATASET) | {"environment": {"id": id, "wrappers": []}}
    for options, code in (({}, 1), ({"eval_env": id}, 2)):
        status, line = refusal(script.train, tiny(**options), data=data)
        assert status == code and id in line and cure in line and "--eval_env none" in line
    assert script.train(tiny(eval_env="none", max_timesteps=1), data=data)["eval_return"] is None


def test_episodes_of_minatar_depend_on_their_seed_alone(script):
    pytest.importorskip("minatar")
    envs = script.make_environments("MinAtar/Breakout-v1", 1, id="MinAtar/Breakout-v1", frame_stack=2)

    def play(seed):
        seen = []
        policy = lambda x: (seen.append(x[0]), np.array([zlib.crc32(x.tobytes()) % 3]))[1]  # noqa: E731
        rewards = script.rollout(policy, envs, 1, seed)["rewards"][0].tolist()
        return rewards, [x.tobytes() for x in seen], seen[0]

    first = [play(seed) for seed in range(60)]
    for seed in reversed(range(60)):
        assert play(seed)[:2] == first[seed][:2]
    assert len({tuple(x[1]) for x in first}) > 5
    stack = first[0][2]
    assert stack.shape == (8, 10, 10) and stack.dtype == np.uint8 and not stack[:4].any() and stack[4:].max() == 1
    envs.close()


def test_episodes_of_atari_are_those_of_the_dqn_replay_data(script):
    """Stacks of 84 x 84, sticky actions, the game's own actions, and 27,000 steps of four frames at most."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")

    def make(**options):
        arguments = {"id": "ALE/Pong-v5", "frame_stack": 4} | script.ATARI | options
        return script.make_environments("ALE/Pong-v5", 1, **arguments)

    envs = make()
    ale = envs.envs[0].unwrapped.ale
    assert envs.observation_space.shape == (1, 4, 84, 84) and envs.single_action_space.n == 6
    assert ale.getFloat("repeat_action_probability") == 0.25 and ale.getInt("frame_skip") in (0, 1)
    assert ale.getInt("max_num_frames_per_episode") == 4 * 27_000
    envs.close()
    envs, seen = make(max_num_frames_per_episode=80), []
    result = script.rollout(lambda x: (seen.append(x[0]), np.array([2]))[1], envs, 1, 0)
    assert result["length"] == [20] and len(seen) == 20 and not seen[0][:3].any() and seen[0][3].any()
    assert np.array_equal(seen[5][:3], seen[4][1:])
    envs.close()
