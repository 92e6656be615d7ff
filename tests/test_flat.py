"""Imported datasets: their files, what float32 cannot hold, columns that hardly vary, and encodings, which travel."""

import json
import math
import types

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DATASET, discrete, equal, kinds, once, refusal, table, weights
from minari.data_collector import EpisodeBuffer

from benchmarks import fqe, record
from benchmarks.report_runs import behaviour

ID = "flat/table-v0"
DISCRETE = "algorithms.discrete.cql_dqn"
COUNTRY = {"name": "country", "values": ["AT", "DE", "FR"]}
TIME = {"name": "time", "offset": 1_700_000_000.0}
POWER = {"name": "power", "offset": 433_000_000.0, "low": 433_050_000.0, "high": 434_790_000.0}
FILES = (
    *("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "episode_returns"),
    *("masks", "next_masks", "propensities"),
)
OFFER = {"name": "offer", "values": ["call", "mail", 17], "low": 0}


@pytest.fixture
def write(new_dataset, tmp_path):
    """Stores arrays and metadata as an imported dataset; None leaves a part out."""

    def write(data, name=ID, **metadata):
        folder = tmp_path / "minari" / name
        folder.mkdir(parents=True)
        metadata = {"format": 1, "kind": "transitions"} | metadata
        for key, value in data.items():
            if key in FILES:
                np.save(folder / f"{key}.npy", value)
            else:
                metadata[key] = value.tolist() if isinstance(value, np.ndarray) else value
        (folder / "metadata.json").write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
        return folder

    return write


def encoding(script):
    return {"observations": [TIME, COUNTRY], "actions": [OFFER if script.__name__ == DISCRETE else POWER]}


def arrays(script, n=60):
    """Transitions of a table with `encoding(script)`."""
    rng, terminals = np.random.default_rng(0), np.arange(n) % 6 == 5
    observations = np.concatenate([rng.uniform(-500, 500, (n, 1)), np.eye(3)[rng.integers(0, 3, n)]], axis=1)
    if script.__name__ == DISCRETE:
        actions, low, high = rng.integers(0, 3, (n, 1)), [0], [2]
    else:
        actions, low, high = rng.uniform(6e4, 1.7e6, (n, 1)), [50_000.0], [1_790_000.0]
    flags = {"terminals": terminals, "timeouts": ~terminals & (np.arange(n) == n - 1)}
    following = np.roll(observations, -1, axis=0)
    columns = {"observations": observations, "actions": actions, "rewards": rng.normal(size=n)}
    columns |= {"next_observations": following} | flags | {"action_low": np.array(low), "action_high": np.array(high)}
    return columns | {"encoding": encoding(script)}


def as_stored(data):
    """The columns in the types of the files."""
    narrow = {key: np.float32(data[key]) for key in ("observations", "next_observations", "rewards")}
    actions = data["actions"] if data["actions"].dtype.kind == "i" else np.float32(data["actions"])
    return data | narrow | {"actions": actions}


# Files


@kinds
def test_an_imported_dataset_trains_to_the_same_bits_as_a_recorded_one(script, run, write, tmp_path):
    recorded = run(holdout_fraction=0.2)
    data = script.load_dataset(DATASET)
    script.check_dataset(data, types.SimpleNamespace(env=DATASET, buffer_size=math.inf))
    write(data)
    assert script.load_dataset(ID).keys() == data.keys()
    imported = run(env=ID, run_id="imported", holdout_fraction=0.2)
    assert table(recorded) == table(imported) and equal(weights(recorded), weights(imported))


REFUSED = {
    "a later format": ({"format": 2}, {}, "format (2, "),
    "frames": ({"kind": "frames"}, {}, "frames"),
    "no bounds": ({"action_low": None}, {}, "action_low"),
    "a column is missing": ({}, {"rewards": None}, "rewards.npy"),
    "a column is too long": ({}, {"rewards": np.zeros(61, np.float32)}, "61 transitions"),
    "flags between": ({}, {"terminals": np.full(60, 0.5, np.float32)}, "0 or 1"),
    "two bounds": ({"action_low": [0, 0], "action_high": [1, 1]}, {}, "cannot be read"),
    "metadata of another kind": (["no dict"], {}, "cannot be read"),
    "objects": ({}, {"rewards": np.array([{}] * 60)}, "cannot be read"),
    "NaN": ({}, {"observations": np.full((60, 4), np.nan, np.float32)}, "NaN"),
}


@kinds
@pytest.mark.parametrize("fault", REFUSED)
def test_broken_files_are_refused_in_a_line(fault, script, write, tiny, tmp_path):
    metadata, columns, word = REFUSED[fault]
    data = as_stored(arrays(script))
    folder = write(data | {"action_low": data["action_low"]}, **{})
    if isinstance(metadata, dict):
        content = json.loads((folder / "metadata.json").read_text()) | metadata
        metadata = {key: value for key, value in content.items() if value is not None}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    for key, value in columns.items():
        (folder / f"{key}.npy").unlink(missing_ok=True)
        if value is not None:
            np.save(folder / f"{key}.npy", value, allow_pickle=True)
    status, line = refusal(script.train, tiny(env=ID, eval_env="none"))
    assert status == 1 and ID in line and word in line and not (tmp_path / "runs").exists()


@once
def test_damaged_and_doubled_folders_are_refused(script, write, tiny):
    folder = write(as_stored(arrays(script)))
    (folder / "rewards.npy").write_bytes((folder / "rewards.npy").read_bytes()[:-9])
    assert "cannot be read" in refusal(script.train, tiny(env=ID, eval_env="none"))[1]
    (folder / "metadata.json").write_text("{")
    assert "cannot be read" in refusal(script.train, tiny(env=ID, eval_env="none"))[1]
    (folder / "data").mkdir()
    (folder / "data" / "metadata.json").write_text("{}")
    (folder / "metadata.json").write_text("{}")
    assert "two datasets" in refusal(script.train, tiny(env=ID, eval_env="none"))[1]


@once
def test_a_slip_in_the_reading_keeps_its_traceback(script, write, tiny, monkeypatch):
    write(as_stored(arrays(script)))
    monkeypatch.setattr(script.gym.spaces, "Box", lambda *arguments, **options: arguments[7])
    with pytest.raises(IndexError):
        script.train(tiny(env=ID, eval_env="none"))


@kinds
def test_actions_of_the_other_kind_are_refused(script, write, tiny):
    other = types.SimpleNamespace(__name__="" if script.__name__ == DISCRETE else DISCRETE)
    write(as_stored(arrays(other)))
    status, line = refusal(script.train, tiny(env=ID, eval_env="none"))
    assert status == 1 and "this script takes" in line


@once
def test_returns_before_rows_were_dropped_count(script, write, tiny, run, capsys):
    data = as_stored(arrays(script)) | {"episode_returns": np.array([10.0, 20.0, 60.0])}
    write(data, name="flat/hopper-v0")
    run(env="flat/hopper-v0", eval_env="none")
    assert "return 30.0 ± 21.6" in capsys.readouterr().out
    data = script.load_dataset("flat/hopper-v0")
    task = script.Task(tiny(env="flat/hopper-v0", eval_env="none", normalize_reward=True, reward_scale=1.0), data)
    assert task.factor == pytest.approx(1000 / 50)


# Precision


def column(values, place, script):
    data = arrays(script, len(values))
    shape = data[place].shape[1:]
    wide = np.zeros((len(values), *shape), np.asarray(values).dtype)
    wide.reshape(len(values), -1)[:, -1] = values
    return data | {place: wide, "encoding": None}


GRID = np.arange(60)
MERGED = {
    "seconds since 1970": 1_732_900_000 + GRID,
    "the same as real numbers": 1_732_900_000.5 + GRID,
    "minutes of a year": 1_732_900_000 + 60 * np.arange(60 * 24 * 30),
    "milliseconds": 1_732_900_000_000 + 1000 * GRID,
    "32 bits": (1_732_900_000 + GRID).astype(np.int32),
    "unsigned": (20_000_000 + GRID).astype(np.uint32),
    "negative": -20_000_000 - GRID,
    "hours": 1_732_900_000 + 3600 * GRID,
    "0 means never": np.where(GRID % 2, 0, 1_732_900_000 + GRID),
    "two years": 1_600_000_000 + 60_000_000 * (GRID % 2) + GRID,
    "a place on earth": 52.5200066 + GRID * 1e-6,
}
HELD = {
    "whole multiples of its steps": 1_732_900_096 + 128 * GRID,
    "room temperature": 293.0 + np.random.default_rng(0).uniform(-2, 2, 60),
    "noise of a simulator": 0.35 + np.random.default_rng(0).normal(size=60) * 1e-9,
    "an object that rests": 0.42469 + np.random.default_rng(0).normal(size=60) * 1e-5,
    "a constant": np.full(60, 1_732_900_096),
    "money in cents": 20_000_001 + 12_345_670 * GRID,
    "a wide range": np.random.default_rng(0).normal(size=60) * 1e9,
    "small whole numbers": GRID,
    "float32": np.float32(1_732_900_000 + GRID),
}


@once
@pytest.mark.parametrize("place", ["observations", "next_observations", "rewards"])
@pytest.mark.parametrize("kind", [*MERGED, *HELD])
def test_what_float32_cannot_hold_apart_is_refused(kind, place, script, tiny):
    data = column((MERGED | HELD)[kind], place, script)
    data.pop("encoding")
    if kind in MERGED:
        status, line = refusal(script.Task, tiny(env="mine", eval_env="none"), data)
        assert status == 1 and "float32" in line and place in line and "--env mine" in line
    else:
        script.Task(tiny(env="mine", eval_env="none"), data)


@once
def test_recorded_columns_that_float32_cannot_hold_apart_are_refused(script, tiny, new_dataset):
    times = gym.spaces.Box(0, np.inf, (1,), np.float64)
    for i, space in enumerate((times, gym.spaces.Dict({"a": gym.spaces.Discrete(2), "b": times}))):
        seconds = 1_732_900_000.0 + np.arange(7)[:, None]
        parts = {"a": np.zeros(7, np.int64), "b": seconds}
        flags = {"terminations": np.arange(6) == 5, "truncations": np.zeros(6, bool)}
        observations = parts if isinstance(space, gym.spaces.Dict) else seconds
        buffer = EpisodeBuffer(observations=observations, actions=np.zeros((6, 1)), rewards=np.zeros(6), **flags)
        spaces = {"observation_space": space, "action_space": gym.spaces.Box(-1, 1, (1,))}
        name = new_dataset([buffer], f"toy/times{i}-v0", **spaces)
        assert "float32 has too few digits" in refusal(script.train, tiny(env=name, eval_env="none"))[1]


@once
def test_actions_that_float32_cannot_hold_are_refused(script, tiny, tmp_path):
    """433.92 MHz in Hz; in MHz they are fine."""
    data = arrays(script) | {"actions": np.linspace(433_050_000, 434_790_000, 60)[:, None]}
    data |= {"action_low": np.array([433.05e6]), "action_high": np.array([434.79e6])}
    data.pop("encoding")
    config = tiny(env="mine", eval_env="none")
    line = refusal(script.train, config, data=data)[1]
    assert "float32 has too few digits" in line and "actions" in line
    script.train(config, data=data | {key: data[key] / 1e6 for key in ("actions", "action_low", "action_high")})
    actions = script.load_policy(tmp_path / "runs/run/policy.pt")(data["observations"])
    assert 433.05 - 4e-5 <= actions.min() <= actions.max() <= 434.79 + 4e-5


@pytest.mark.parametrize("start", [20_000_000, -20_000_001, 2**40])
@discrete
def test_large_numbers_of_discrete_actions_stay_whole(start, script, new_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    actions, observations = start + np.arange(6) % 5, np.eye(7, 2, dtype=np.float32)
    flags = {"terminations": np.arange(6) == 5, "truncations": np.zeros(6, bool)}
    buffer = EpisodeBuffer(observations=observations, actions=actions, rewards=np.zeros(6), **flags)
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    name = new_dataset([buffer], observation_space=space, action_space=gym.spaces.Discrete(5, start=start))
    config = script.TrainConfig(env=name, eval_env="none", device="cpu")
    data = script.load_dataset(name)
    task = script.Task(config, data)
    data, _, scaling = script.prepare_data(config, data, task, None)
    assert data["actions"].tolist() == [0, 1, 2, 3, 4, 0]
    network = script.QNetwork(2, [5], 4, 1, "dqn", 1)
    network.load_state_dict(scaling, strict=False)
    for number in range(5):
        network.last.bias.data = 9.0 * torch.nn.functional.one_hot(torch.tensor(number), 5)
        assert network.act(np.zeros(2)) == start + number


# Columns that hardly vary


def slow_scale(values):
    """The rule, for one column."""
    std, spread = float(np.std(values)), float(np.max(values) - np.min(values))
    return 1.0 if spread == 0 else max(std + min(1e-3, std / 10), spread / 100)


COLUMNS = {
    "constant": np.full(1000, 0.1), "flag that is never set": np.zeros(1000), "usual": np.linspace(-1, 1, 1000),
    "tiny but informative": 1e-5 * np.sin(np.arange(1000)), "set in one row": np.arange(1000) == 500,
    "far from zero": 1e4 + np.linspace(0, 1, 1000), "large": 1e8 * np.cos(np.arange(1000)),
}  # fmt: skip


@kinds
def test_columns_that_hardly_vary_are_not_blown_up(script, tiny, capsys):
    data = arrays(script, 1000)
    data |= {"observations": np.stack([*COLUMNS.values()], axis=1).astype(float), "encoding": None}
    data["next_observations"] = data["observations"]
    data.pop("encoding")
    config = tiny(env="mine", eval_env="none")
    _, _, scaling = script.prepare_data(config, data, script.Task(config, data), None)
    expected = [slow_scale(np.float32(x)) for x in COLUMNS.values()]
    assert scaling["observation_std"].numpy() == pytest.approx(expected, rel=1e-4)
    out = capsys.readouterr().out
    assert "constant in the data" in out and "observations[0], observations[1]" in out and "observations[2]" not in out


def test_the_world_model_and_fqe_scale_by_the_same_rule():
    from algorithms.offline import combo, cql

    columns = np.float32(np.stack([*COLUMNS.values()], axis=1))
    expected = [slow_scale(x) for x in columns.T]
    assert cql.scale(columns) == pytest.approx(expected, rel=1e-4)
    once_in_many = np.float32(np.arange(200_000) == 7)[:, None]
    assert cql.scale(once_in_many) == pytest.approx(0.01) and once_in_many.std() < 0.003
    config = combo.TrainConfig(device="cpu", dynamics_members=1, dynamics_elites=1, dynamics_hidden_dim=4)
    dynamics = combo.Dynamics(config, len(COLUMNS) - 1, 1)
    targets = torch.tensor(columns)
    dynamics.standardise(torch.tensor(columns), targets)
    assert dynamics.input_std.numpy() == pytest.approx(expected, rel=1e-3)
    assert dynamics.target_std.numpy() == pytest.approx(expected, rel=1e-3)


@kinds
def test_names_of_constant_columns_are_those_of_the_table(script, tiny, capsys):
    data = arrays(script)
    for key in ("observations", "next_observations"):
        data[key][:, 2] = 0
    config = tiny(env="mine", eval_env="none")
    script.prepare_data(config, data, script.Task(config, data), None)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "constant" in x]
    assert line.endswith(": country=DE")


@once
def test_one_episode_cannot_be_held_out_and_a_line_says_so(script, tiny, capsys):
    data = arrays(script) | {"terminals": np.zeros(60, bool), "timeouts": np.arange(60) == 59}
    row = script.train(tiny(env="mine", eval_env="none", holdout_fraction=0.3), data=data)
    assert "nothing is held out" in capsys.readouterr().out and "holdout_q" not in row


# Encodings

READERS = [f"algorithms.{x}" for x in ("offline.cql", "offline.policy_constraint", "discrete.cql_dqn")]


@pytest.fixture
def policy(script, tiny, tmp_path):
    script.train(tiny(env="mine", eval_env="none"), data=arrays(script))
    return script.load_policy(tmp_path / "runs/run/policy.pt")


@pytest.mark.parametrize("script", READERS, indirect=True)
def test_a_policy_acts_by_name_in_the_tables_own_values(script, policy):
    row = {"country": "DE", "time": 1_700_000_123.5, "unused": "x"}
    action = policy(np.array([123.5, 0, 1, 0]))
    if script.__name__ == DISCRETE:
        name, expected = "offer", OFFER["values"][int(action)]
    else:
        name, expected = "power", float(action[0]) + POWER["offset"]
    for given in (row, pd.Series(row), pd.DataFrame([row]).iloc[0]):
        assert policy(given) == {name: expected}
    assert policy.encoding == encoding(script)
    if script.__name__ != DISCRETE:  # float32 would be 32 away
        assert POWER["low"] <= expected <= POWER["high"] and expected != float(np.float32(expected))


@kinds
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"country": "IT"}, ["country", "'IT'", "AT, DE, FR"]), ({"country": None}, ["country"]),
        ({"country": 1}, ["country"]), ({"time": "soon"}, ["time", "soon"]),
        ({"time": math.nan}, ["time", "finite"]), ({"time": math.inf}, ["time", "finite"]),
        ({"time": None}, ["time"]), 
        ({"country": math.nan}, ["country"]), ({"country": pd.NA}, ["country"]),
        ({"time": ...}, ["time", "missing"]), ({"country": ...}, ["country", "missing"]),
    ],
)  # fmt: skip
def test_a_row_that_the_policy_does_not_know_is_a_value_error(change, words, policy):
    row = {"time": 1_700_000_123.5, "country": "DE"} | change
    row = {key: value for key, value in row.items() if value is not ...}
    for given in (row, pd.Series(row, dtype=object)):
        with pytest.raises(ValueError) as info:
            policy(given)
        assert all(word in str(info.value) for word in words)


@once
@pytest.mark.parametrize("value", [None, math.nan, np.float64("nan"), pd.NaT])
def test_a_missing_value_is_not_the_text_of_its_name(value, script):
    columns = [{"name": "x", "values": ["None", "nan", "NaT", "a"]}]
    assert script.encode_row({"x": "nan"}, columns).tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="column x is"):
        script.encode_row({"x": value}, columns)


@once
def test_numbers_of_a_list_are_found_in_its_column(script):
    row = {"state": [1.0, [2.0, 3.0]], "x[0]": 4.0, "T [C]": 5.0, "text": "ab"}
    names = ["state[0]", "state[1][0]", "state[1][1]", "x[0]", "T [C]"]
    columns = [{"name": name, "offset": 0.0} for name in names]
    for given in (row, pd.Series(row), row | {"state": np.array([1.0, np.array([2.0, 3.0])], dtype=object)}):
        assert script.encode_row(given, columns).tolist() == [1, 2, 3, 4, 5]
    for name in ("state[2]", "state[1]", "state[1][2]", "state[x]", "x", "y[0]", "text[0]", "T [K]", "[0]"):
        with pytest.raises(ValueError, match="is missing, or has several values"):
            script.encode_row(row, [{"name": name, "offset": 0.0}])


@once
def test_a_whole_table_is_refused(policy):
    with pytest.raises(ValueError, match="give one row at a time"):
        policy(pd.DataFrame({"time": [1.7e9, 1.7e9], "country": ["DE", "DE"]}))


@discrete
def test_whole_numbers_that_do_not_begin_at_0_answer_as_they_are(script, tiny, tmp_path):
    entry = {"name": "offer", "values": [5, 6, 7], "low": 5}
    data = arrays(script) | {"encoding": {"observations": [TIME, COUNTRY], "actions": [entry]}}
    data |= {"actions": data["actions"] + 5, "action_low": np.array([5]), "action_high": np.array([7])}
    script.train(tiny(env="mine", eval_env="none"), data=data)
    policy, row = script.load_policy(tmp_path / "runs/run/policy.pt"), {"time": 1.7e9, "country": "AT"}
    assert policy(row)["offer"] == policy(np.array([0.0, 1, 0, 0])) >= 5


MASKS = ["may_call", "may_mail", "may_17"]


@discrete
def test_masks_and_scores_by_name(script, tiny, tmp_path, write):
    """Policies of an imported dataset read the masks of a row."""
    data, rng = as_stored(arrays(script)), np.random.default_rng(1)
    masks = (rng.random((60, 3)) < 0.5) | (data["actions"] == np.arange(3))
    data |= {"masks": masks, "next_masks": np.roll(masks, -1, axis=0), "propensities": rng.random(60)}
    data["encoding"] = data["encoding"] | {"masks": MASKS}
    write(data)
    script.train(tiny(env=ID, holdout_fraction=0.2, n_step=2))
    policy = script.load_policy(tmp_path / "runs/run/policy.pt")
    row, array = {"time": 1_700_000_123.5, "country": "DE"}, np.array([123.5, 0, 1, 0])
    names, values = OFFER["values"], policy.scores(array)
    assert values.shape == (3,) and policy.scores(np.stack([array] * 2)).tolist() == [values.tolist()] * 2
    for flags in ((1, 1, 1), (1, 0, 1), (0, 0, 1), (False, True, False)):
        masked = np.where(flags, values, -np.inf)
        for given in (row | dict(zip(MASKS, flags)), pd.Series(row | dict(zip(MASKS, flags)))):
            assert policy(given) == {"offer": names[masked.argmax()]} == {"offer": names[int(policy(array, flags))]}
            assert policy.scores(given) == dict(zip(names, masked.tolist()))
    assert policy(row, mask=[0, 1, 0]) == {"offer": "mail"}
    wrong = {"may_mail": [None, 2, "yes", math.nan, ...], "may_17": [[1, 1]], "may_call": [...]}
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        given = {x: y for x, y in (row | dict.fromkeys(MASKS, 1) | {name: value}).items() if y is not ...}
        with pytest.raises(ValueError, match=name if value != 2 else "mask"):
            policy(given)
    with pytest.raises(ValueError, match="mask"):
        policy(row | dict.fromkeys(MASKS, 0))


@discrete
def test_scores_of_actions_of_several_parts(script, tiny, tmp_path):
    columns = [OFFER, {"name": "price", "offset": 0.0, "low": 5, "high": 6}]
    data = arrays(script) | {"encoding": {"observations": [TIME, COUNTRY], "actions": columns}}
    data["actions"] = np.concatenate([data["actions"], np.arange(60)[:, None] % 2 + 5], axis=1)
    data |= {"action_low": np.array([0, 5]), "action_high": np.array([2, 6])}
    script.train(tiny(env="mine", eval_env="none"), data=data)
    policy, row = script.load_policy(tmp_path / "runs/run/policy.pt"), {"time": 1.7e9, "country": "AT"}
    scores = policy.scores(row)
    assert list(scores) == [(offer, price) for offer in OFFER["values"] for price in (5, 6)]
    assert tuple(policy(row).values()) == max(scores, key=scores.get)


@kinds
def test_masks_where_they_cannot_act_are_refused(script, tiny):
    data = arrays(script)
    masks = {"masks": np.ones((60, 3)), "next_masks": np.ones((60, 3))}
    if script.__name__ == DISCRETE:
        status, line = refusal(script.train, tiny(env="mine", eval_env="Counter-v0"), data=data | masks)
        assert status == 2 and "masks of mine" in line
    else:
        status, line = refusal(script.train, tiny(env="mine", eval_env="none"), data=data | masks)
        assert status == 1 and "unknown columns ['masks', 'next_masks']" in line


@discrete
def test_narrower_bounds_do_not_shift_the_names(script, tiny, tmp_path):
    data = arrays(script) | {"actions": np.random.default_rng(0).integers(1, 3, (60, 1))}
    data["action_low"] = np.array([1])  # as an environment narrows them
    script.train(tiny(env="mine", eval_env="none"), data=data)
    policy, row = script.load_policy(tmp_path / "runs/run/policy.pt"), {"time": 1.7e9, "country": "AT"}
    assert policy(row)["offer"] == OFFER["values"][int(policy(np.array([0.0, 1, 0, 0])))]


@once
def test_numbers_of_numpy_in_an_encoding_are_stored_as_plain_ones(script, tiny, tmp_path):
    data = arrays(script)
    data["encoding"]["observations"][0] = {"name": "time", "offset": np.float64(1.7e9)}
    script.train(tiny(env="mine", eval_env="none"), data=data)
    assert script.load_policy(tmp_path / "runs/run/policy.pt").encoding == encoding(script)


@once
def test_without_names_a_row_by_name_is_refused(script, run):
    policy = script.load_policy(run() / "policy.pt")
    with pytest.raises(ValueError, match="3 finite numbers"):
        policy({"x": 1})
    assert np.array_equal(policy(pd.Series([1.0, 2.0, 3.0])), policy(np.array([1.0, 2.0, 3.0])))


def changed(encoding, kind):
    observations, actions = encoding["observations"], encoding["actions"]
    if kind == "categories":
        observations = [TIME, {"name": "country", "values": ["DE", "FR", "IT"]}]
    elif kind == "order":
        observations = [COUNTRY, TIME]
    elif kind == "offset":
        observations = [TIME | {"offset": 0.0}, COUNTRY]
    elif kind == "masks":
        return encoding | {"masks": ["may_call", "may_mail", "may_17"]}
    elif kind == "bounds":
        actions = [actions[0] | ({"values": ["mail", "call", 17]} if "values" in actions[0] else {"low": 0.0})]
    return {"observations": observations, "actions": actions}


@kinds
@pytest.mark.parametrize("kind", ["categories", "order", "offset", "bounds", "masks", None])
def test_a_checkpoint_refuses_data_that_are_encoded_otherwise(kind, script, tiny, policy, tmp_path, capsys):
    """By --load_model, and where the data were imported anew before a run was resumed."""
    data = arrays(script) | {"encoding": changed(encoding(script), kind)}
    source = {"load_model": str(tmp_path / "runs/run/checkpoint.pt"), "run_id": "next"}
    for options in (source, {"max_timesteps": 30}):
        config = tiny(env="mine", eval_env="none", **options)
        if kind:
            status, line = refusal(script.train, config, data=data)
            assert status == 1 and "checkpoint.pt" in line and "--like" in line
            assert not (tmp_path / "runs/next").exists()
        else:
            script.train(config, data=data)
    if not kind:
        data.pop("encoding")
        capsys.readouterr()
        script.train(tiny(env="mine", eval_env="none", **source | {"run_id": "unnamed"}), data=data)
        assert "cannot be compared" in capsys.readouterr().out


@kinds
def test_an_environment_does_not_know_offsets(script, tiny):
    data = arrays(script)
    status, line = refusal(script.train, tiny(env="mine", eval_env="Counter-v0"), data=data)
    assert status == 2 and "--eval_env none" in line


# Programs


def refused_by(program, capsys, *arguments):
    """The exit status and what a program says on stderr."""
    with pytest.raises(SystemExit) as stop:
        program.main([*map(str, arguments)])
    return stop.value.code, capsys.readouterr().err


@kinds
@pytest.mark.parametrize("kind", ["categories", "order", "offset", "bounds"])
def test_programs_refuse_data_that_are_encoded_otherwise(kind, script, write, policy, tmp_path, capsys):
    data = as_stored(arrays(script)) | {"environment": {"id": "Counter-v0"}}
    write(data | {"encoding": changed(encoding(script), kind)}, name="flat/other-v0")
    path = tmp_path / "runs/run/policy.pt"
    for program, *options in ((fqe, "--updates", 5, "--seeds", 1), (record, "--no_video")):
        status, err = refused_by(program, capsys, path, "--env", "flat/other-v0", *options)
        assert status == 1 and err.count("\n") == 1 and "differ in" in err and "--like" in err


@pytest.mark.parametrize("script", READERS, indirect=True)
def test_fqe_takes_data_that_are_encoded_alike(script, write, policy, tmp_path, capsys):
    write(as_stored(arrays(script)))
    fqe.main([str(tmp_path / "runs/run/policy.pt"), "--env", ID, "--updates", "5", "--seeds", "1"])
    assert "cannot be compared" not in capsys.readouterr().out
    write({key: value for key, value in as_stored(arrays(script)).items() if key != "encoding"}, name="flat/bare-v0")
    fqe.main([str(tmp_path / "runs/run/policy.pt"), "--env", "flat/bare-v0", "--updates", "5", "--seeds", "1"])
    assert "cannot be compared" in capsys.readouterr().out


@once
def test_a_report_reads_the_returns_of_an_imported_dataset(script, write):
    write(as_stored(arrays(script)) | {"reference_scores": [0.0, 10.0], "episode_returns": np.array([4.0, 6.0])})
    assert behaviour(ID, []) == {"return": 5.0, "std": 1.0, "episodes": 2, "score": 50.0}
    notes = []
    assert behaviour("flat/missing-v0", notes) is None and not notes
