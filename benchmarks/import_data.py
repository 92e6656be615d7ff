r"""Make a local Minari dataset, the one format that the training scripts read. The sources are

D4RL's files by name, downloaded if they are not in $D4RL_DATASET_DIR (default ~/.d4rl/datasets):

    python benchmarks/import_data.py hopper-medium-v2 walker2d-medium-v2
    python benchmarks/import_data.py --all locomotion

an HDF5 file in D4RL's layout (observations, actions, rewards, terminals; timeouts or next_observations if known):

    python benchmarks/import_data.py robot.hdf5 --id mine/robot-v0 --eval_env Hopper-v5

a table of logged data, CSV or Parquet, with one row per step:

    python benchmarks/import_data.py shop.csv --id mine/shop-v0 --episode customer --step time \
        --observations 'x_*' country --actions discount --reward profit --terminal left

or local datasets with equal spaces, to be joined; all rows of each, or the first --rows:

    python benchmarks/import_data.py --combine hopper-medium-v2 hopper-expert-v2 --rows 900000 100000 --id mine/mix-v0

The dataset goes to $MINARI_DATASETS_PATH (default ~/.minari/datasets). Numbers are stored as float32. Rows whose next
observation is not known are dropped and counted. --combine leaves numbers as they are. Exit status: 0 stored, 1 the
data cannot be used, 2 a bad command line. An error is one line on stderr and stores nothing.
"""

import argparse
import contextlib
import copy
import difflib
import fnmatch
import math
import os
import shlex
import sys
import textwrap
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
from common import DataError, Parser, d4rl, fail, make_env, reference_scores
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from tqdm import tqdm

from benchmarks import collect

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
READ_SECONDS = 10  # a server may be silent for so long
LARGEST = 1e15  # beyond it squares overflow float32
MAX_GRID = 1024  # numbers of a grid, beyond which it is an image
MAX_ACTIONS = 100_000  # values of a discrete action; the scripts take no more
MAX_CATEGORIES = 1000  # of a text column
TOLERANCE = 1e-3  # share of the range by which an action may be outside its bounds: rounding
NO_ENVIRONMENT = "No environment: runs train without evaluation unless --eval_env names one."
COLUMN_NAMES = ("observation_names", "action_names", "action_categories")  # of a table, in the metadata
OWN_METADATA = {  # not taken over from the datasets that are joined, even if they agree
    "action_space", "author", "author_email", "combined_datasets", "data_format", "dataset_id", "dataset_size",
    "description", "env_spec", "eval_env_spec", "jpeg_encoding", "minari_version", "observation_space",
    "total_episodes", "total_steps",
}  # fmt: skip


@dataclass
class Recording:
    """Steps in order, episode after episode. A column that is not known is None."""

    observations: np.ndarray  # [n, ...]
    actions: np.ndarray  # [n] or [n, A]
    rewards: np.ndarray  # [n]
    terminals: np.ndarray  # [n], the next state is terminal
    timeouts: np.ndarray = None  # [n], the episode ends here all the same
    next_observations: np.ndarray = None  # [n, ...]
    action_low: np.ndarray = None  # [A]
    action_high: np.ndarray = None  # [A]
    rows: np.ndarray = None  # [n], the row of the table that each step comes from
    names: dict = field(default_factory=dict)  # of columns and categories, for the metadata
    notes: list = field(default_factory=list)  # sentences for the user and the metadata

    def note(self, text):
        print(textwrap.shorten(text, 600, placeholder=" ..."))
        self.notes.append(text)


# ---------------------------------------------------------------------------------------------------- D4RL's names


def d4rl_domain(domain):
    """The newest version of each D4RL dataset of a domain."""
    names = sorted(name for name, dataset in d4rl().items() if dataset.domain == domain)
    return list({name.rsplit("-v", 1)[0]: name for name in names}.values())


def d4rl_file(name):
    """The file of a D4RL name in $D4RL_DATASET_DIR, downloaded from D4RL's server if it is missing."""
    url = f"{D4RL_URL}/{d4rl()[name].file}.hdf5"
    folder = os.path.expanduser(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    path = Path(folder, url.rsplit("/", 1)[-1])
    if os.path.exists(path):
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    print(f"{path} does not exist: downloading {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(url, partial)
        os.replace(partial, path)
    except Exception as error:  # the network's, the disk's, h5py's
        raise DataError(f"{url} cannot be downloaded ({error}); put the file at {path}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def download(url, path):
    with urllib.request.urlopen(url, timeout=READ_SECONDS) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    h5py.File(path).close()  # raises where a part is missing


# --------------------------------------------------------------------------------------------------- reading a file


def check_numbers(values, column):
    """Raises DataError for NaN, infinity and numbers beyond LARGEST."""
    if values.size and not (values.min() > -LARGEST and values.max() < LARGEST):
        row, *place = np.argwhere(~(np.abs(values) < LARGEST))[0].tolist()
        column += "".join(f"[{i}]" for i in place)
        raise DataError(f"{column} is {values[row, *place]:g} in row {row} (from 0): correct or remove such rows")


def check_flags(values, column):
    if (bad := ~np.isin(values, (0, 1))).any():
        row = bad.argmax()
        raise DataError(f"{column} is {values[row]} in row {row} (from 0): it must be 0 or 1")


def check_layout(columns, present):
    """Raises DataError if HDF5 datasets do not have D4RL's layout, before they are read."""
    if missing := {"observations", "actions", "rewards", "terminals"} - columns.keys():
        raise DataError(f"it lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(present)) or 'nothing'}")
    for key, column in columns.items():
        n_axes = {"observations": (2, 3, 4), "next_observations": (2, 3, 4), "actions": (1, 2)}.get(key, (1,))
        n_axes = (0, 1) if key in ("action_low", "action_high") else n_axes
        if column.ndim not in n_axes or 0 in column.shape[1:]:
            axes = " or ".join(map(str, n_axes))
            raise DataError(f"{key} has shape {column.shape}: it must have {axes} axes, the first of rows")
        if column.ndim > 2 and math.prod(column.shape[1:]) > MAX_GRID:
            raise DataError(f"{key} has shape {column.shape}, as images have: the scripts take vectors and small grids")
        if column.dtype.kind not in "biuf":
            raise DataError(f"{key} has type {column.dtype}: store numbers")
        if (
            column.is_virtual or column.external
        ):  # its rows are in other files, and read as zeros where those are missing
            raise DataError(f"{key} is a virtual dataset: store the numbers in this file")
    n_bytes = 4 * sum(column.size for column in columns.values())
    if n_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise DataError(f"it declares {n_bytes / 1e9:,.0f} GB, more than this machine's memory")
    lengths = {key: len(column) for key, column in columns.items() if not key.startswith("action_")}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"all must have the same number of rows: {', '.join(f'{key} {n}' for key, n in lengths.items())}"
        )
    sizes = [columns[key].shape for key in ("observations", "next_observations") if key in columns]
    if len(set(sizes)) > 1:
        raise DataError(f"observations and next_observations differ in shape: {sizes[0]} and {sizes[1]}")


def read_hdf5(path):
    keys = [key for key in Recording.__annotations__ if key not in ("rows", "names", "notes")]
    try:
        with h5py.File(path) as file:
            columns = {key: file[key] for key in keys if isinstance(file.get(key), h5py.Dataset)}
            check_layout(columns, file)
            for key, column in columns.items():
                whole = key == "actions" and column.dtype.kind in "biu"
                columns[key] = column.astype(np.int64 if whole else np.float32)[()]
    except DataError:
        raise
    except Exception as error:  # h5py raises nearly anything for a damaged file
        raise DataError(f"it is damaged or not an HDF5 file: {error}") from error
    for key, column in columns.items():
        if key in ("terminals", "timeouts"):
            check_flags(column, key)
            columns[key] = column.astype(bool)
        else:
            check_numbers(np.atleast_1d(column), key)
    return Recording(**columns)


def pick(patterns, columns, role, taken=()):
    """The columns that names and glob patterns stand for, in their order; a pattern skips those that are taken."""
    picked = []
    for pattern in patterns:
        found = [pattern] if pattern in columns else [x for x in fnmatch.filter(columns, pattern) if x not in taken]
        if not found or role not in ("observations", "actions") and found != [pattern]:
            has = textwrap.shorten(", ".join(columns), 300, placeholder=" ...")
            raise DataError(f"--{role} {pattern}: there is no such column; the table has {has}")
        picked += found
    return list(dict.fromkeys(picked))


def open_table(path):
    """The names of a table's columns, and a function that reads some of them."""
    import pandas

    if not {".parquet", ".pq"} & set(path.suffixes):
        names = list(pandas.read_csv(path, nrows=0).columns)
        return names, lambda columns: pandas.read_csv(path, usecols=columns, low_memory=False)
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install -r requirements-extra.txt, or store it as CSV") from error
    names = pyarrow.parquet.read_schema(path).names
    return names, lambda columns: pandas.read_parquet(path, columns=columns)


def read_table(path, args):
    roles = {role: getattr(args, role) for role in ("episode", "step", "reward", "terminal", "timeout")}
    roles = {role: name for role, name in roles.items() if name is not None}
    try:
        names, read = open_table(path)
        for role, name in roles.items():
            pick([name], names, role)
        actions = pick(args.actions, names, "actions", roles.values())
        observations = pick(args.observations, names, "observations", [*roles.values(), *actions])
        table = read(list(dict.fromkeys([*roles.values(), *actions, *observations])))
    except DataError:
        raise
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise DataError(f"it is damaged or not a table: {error}") from error
    told = {name for role, name in roles.items() if role not in ("episode", "step")} | {*actions}
    if known := [name for name in observations if name in told]:
        raise DataError(f"column {known[0]} cannot be an observation: it is an action, the reward or a flag")
    for name in table:
        if (empty := table[name].isna().to_numpy()).any():
            raise DataError(f"column {name} is empty in row {empty.argmax()} (from 0): fill or remove such rows")
    return order_table(table, roles, actions, observations)


def order_table(table, roles, action_names, observation_names):
    """A Recording of the rows, sorted by episode, in the order of their first rows, and by step."""
    import pandas

    observations, labels = encode_observations(table[observation_names])
    actions, categories = encode_actions(table[action_names])
    rewards, texts = read_column(table[roles["reward"]])
    if texts:
        raise DataError(f"column {roles['reward']} holds text or truth values: rewards are numbers")
    flags = {role: read_flags(table[roles[role]]) for role in ("terminal", "timeout") if role in roles}
    episodes = pandas.factorize(table[roles["episode"]])[0]
    steps, span = read_steps(table[roles["step"]]) if "step" in roles else (np.arange(len(table)), "the file's order")
    order = np.lexsort((steps, episodes))
    episodes, steps, terminals = episodes[order], steps[order], flags["terminal"][order]
    recording = Recording(observations[order], actions[order], np.float32(rewards)[order], terminals, rows=order)
    goes_on = np.append(episodes[1:] == episodes[:-1], False)[: len(table)]
    recording.timeouts = ~goes_on & ~terminals
    if "timeout" in flags:
        recording.timeouts |= flags["timeout"][order]
    recording.names = {"observation_names": labels, "action_names": action_names, "action_categories": categories}
    recording.note(f"{len(table):,} rows, {(~goes_on).sum():,} episodes by {roles['episode']}; steps: {span}.")
    if ties := (goes_on[:-1] & (steps[1:] == steps[:-1])).sum():
        recording.note(f"{ties:,} rows have the same step as the row before; they keep the file's order.")
    if early := (terminals & goes_on).sum():
        recording.note(f"{early:,} terminal rows are not the last of their episode: the episode is split there.")
    recording.note(f"Observations ({len(labels)}): {', '.join(labels)}.")
    for name, texts in categories.items():
        recording.note(f"Actions of {name}: {', '.join(f'{i} is {text}' for i, text in enumerate(texts))}.")
    return recording


def encode_observations(table):
    """Observations [n, O], with text and truth values one-hot, and a label for each number."""
    columns, labels = [], []
    for name in table:
        values, texts = read_column(table[name])
        columns.append(np.float32(values)[:, None] if texts is None else np.eye(len(texts), dtype=np.float32)[values])
        labels += [name] if texts is None else [f"{name}={text}" for text in texts]
    return np.concatenate(columns, axis=1), labels


def encode_actions(table):
    """Actions [n, A], integers if all columns are integers or categories, and the categories of each text column."""
    columns = {name: read_column(table[name]) for name in table}
    categories = {name: texts for name, (_, texts) in columns.items() if texts is not None}
    actions = np.stack([values for values, _ in columns.values()], axis=1)
    if categories and actions.dtype.kind == "f":
        raise DataError(f"actions {', '.join(columns)} mix text and real numbers: scripts take one kind")
    return actions if actions.dtype.kind == "i" else np.float32(actions), categories


def read_column(column):
    """The numbers, and None; for text and truth values the index of each category, and the categories."""
    import pandas

    name, kind = f"column {column.name}", pandas.api.types.infer_dtype(column)
    if kind == "decimal":
        column = column.astype(float)
    if pandas.api.types.is_numeric_dtype(column) and kind != "boolean":
        values = column.to_numpy(np.int64 if kind == "integer" else np.float64)
        check_numbers(values, name)
        return values, None
    if kind not in ("string", "boolean", "categorical", "empty"):
        raise DataError(
            f"{name} holds {kind}: store text or numbers (for times, such as the hours since the episode began)"
        )
    texts = column.astype(str)
    stray = pandas.to_numeric(texts, errors="coerce").isna().to_numpy()
    if stray.any() and not stray.all():
        row = stray.argmax()
        raise DataError(f"{name} has text among numbers, {texts.iloc[row]!r} in row {row} (from 0): correct such rows")
    codes, categories = pandas.factorize(texts, sort=True)
    if stray.any() and pandas.to_datetime(categories, format="ISO8601", errors="coerce", utc=True).notna().all():
        raise DataError(f"{name} holds times: store numbers, such as the hours since the episode began")
    if len(categories) > MAX_CATEGORIES:
        raise DataError(f"{name} has {len(categories):,} different texts: leave it out, or store numbers")
    return codes.astype(np.int64), list(categories)


def read_flags(column):
    values, texts = read_column(column)
    if texts is None:
        check_flags(values, f"column {column.name}")
        return values.astype(bool)
    if not set(texts) <= {"False", "True"}:
        raise DataError(f"column {column.name} is {str(column.iloc[0])!r} in row 0: it must be 0 or 1")
    return (np.array(texts) == "True")[values]


def read_steps(column):
    """The rank of each row by a column of numbers, times, or texts that are times; and the column's range in words."""
    import pandas

    if pandas.api.types.is_object_dtype(column) or pandas.api.types.is_string_dtype(column):
        try:
            with warnings.catch_warnings(action="error"):  # about a format that pandas would guess row by row
                try:
                    column = pandas.to_datetime(column, format="ISO8601", utc=True)
                except ValueError:
                    column = pandas.to_datetime(column, utc=True)
        except (ValueError, TypeError, UserWarning) as error:
            raise DataError(f"column {column.name} is neither numbers nor times: {error}") from error
    return pandas.factorize(column, sort=True)[0], f"{column.min()} to {column.max()}"


# ----------------------------------------------------------------------------------- from rows to a Minari dataset


def find_episodes(recording, limit):
    """Flags of the rows that end an episode, and of those whose next observation is known, [n] each; notes what
    changes."""
    terminals, following, n = recording.terminals, recording.next_observations, len(recording.rewards)
    if following is not None:
        differs = (following[:-1] != recording.observations[1:]).any(axis=tuple(range(1, following.ndim)))
        flagged = terminals if recording.timeouts is None else terminals | recording.timeouts
        if splits := (differs & ~flagged[:-1]).sum() * (recording.timeouts is not None):
            recording.note(f"{splits:,} episodes were split where the next observation is not that of the next row.")
        return flagged | np.append(differs, True), np.ones(n, bool)
    if recording.timeouts is None:
        recording.note(f"No timeouts and no next_observations: episodes are assumed to end after {limit:,} steps.")
        rows = np.arange(n)
        starts = np.maximum.accumulate(np.where(np.append(True, terminals[:-1]), rows, 0))
        recording.timeouts = (rows - starts) % limit == limit - 1
    unknown = recording.timeouts & ~terminals
    unknown[-1] = not terminals[-1]
    if unknown.any():
        recording.note(f"{unknown.sum():,} rows were dropped: time-outs and last rows without a next observation.")
    if terminals.any():
        recording.note(f"{terminals.sum():,} terminal rows have no next observation: their own is repeated.")
    return terminals | unknown, ~unknown


def make_buffers(recording, ends, known):
    """The episodes, one at a time: [T + 1] observations, [T] of the rest."""
    following = recording.observations if recording.next_observations is None else recording.next_observations
    timeouts, start = np.zeros_like(ends) if recording.timeouts is None else recording.timeouts, 0
    with tqdm(total=len(ends), unit="row", unit_scale=True, disable=None) as bar:
        for last in np.flatnonzero(ends):
            rows = slice(start, last + known[last])
            bar.update(last + 1 - start)
            start = last + 1
            if rows.start == rows.stop:
                continue
            truncations = timeouts[rows].copy()
            truncations[-1] |= not recording.terminals[rows][-1]
            yield EpisodeBuffer(
                observations=np.concatenate([recording.observations[rows], following[last : last + 1]]),
                actions=recording.actions[rows],
                rewards=recording.rewards[rows],
                terminations=recording.terminals[rows],
                truncations=truncations,
            )


def n_numbers(space):
    """How many numbers an observation has when a script flattens it."""
    if isinstance(space, gym.spaces.Dict):
        return sum(map(n_numbers, space.values()))
    if isinstance(space, (gym.spaces.Discrete, gym.spaces.Text)):
        return int(getattr(space, "n", 0))
    return math.prod(space.shape or ())


def evaluation(env_id, limit, recording):
    """The environment's specification, with this step limit if there is one, and its action space."""
    cure = "name another --eval_env, or none"
    try:
        env = make_env(env_id, "--eval_env")
        spec = copy.deepcopy(gym.spec(env_id))
        spec.max_episode_steps = limit or spec.max_episode_steps
        spec.to_json()  # Minari stores it, and fails where the entry point is not a text
    except (DataError, TypeError, ValueError) as error:
        raise DataError(f"{error}; {cure}") from error
    env.close()
    sizes = math.prod(recording.observations.shape[1:]), n_numbers(env.observation_space)
    if sizes[0] != sizes[1]:
        raise DataError(f"observations have {sizes[0]} numbers, those of {env_id} have {sizes[1]}: {cure}")
    return spec, env.action_space


def bounds_of(space):
    """Lowest and highest action, [A] each; None if the space has no bounds."""
    if isinstance(space, gym.spaces.Box) and space.is_bounded():
        return space.low.ravel(), space.high.ravel()
    if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        low = np.ravel(space.start)
        return low, low + np.ravel(getattr(space, "nvec", getattr(space, "n", 0))) - 1
    return None


def choose_bounds(actions, given, space, discrete):
    """Lowest and highest action, [A] each, and where they come from, in words."""
    low, high = actions.min(axis=0), actions.max(axis=0)
    if given is not None:
        bounds, source = given, "as given"
    elif (bounds := bounds_of(space)) is not None:
        source = "the environment's"
    elif not discrete and max(high.max(), -low.min()) <= 1 + 2 * TOLERANCE:
        bounds, source = (-1, 1), "the data fit these bounds; --action_low and --action_high name others"
    else:
        bounds, source = (low, high), "the data's range; --action_low and --action_high name others"
        if discrete:
            source += "; --action_kind continuous takes them as real numbers"
    bounds = [np.ravel(bound).astype(np.float64) for bound in bounds]
    if wrong := [bound.size for bound in bounds if bound.size not in (1, len(low))]:
        raise DataError(
            f"actions have {len(low)} columns but {wrong[0]} bounds: action_low and action_high need one per column"
        )
    bounds = [np.broadcast_to(bound, low.shape) for bound in bounds]
    if discrete and (np.rint(bounds) != bounds).any():
        raise DataError(f"discrete actions need whole bounds, not {bounds[0]} to {bounds[1]}")
    if not (np.isfinite(bounds).all() and (bounds[0] < bounds[1] + discrete).all()):
        raise DataError(f"actions from {bounds[0]} to {bounds[1]} have no range: give --action_low and --action_high")
    return *bounds, source


def fit_actions(recording, args, space):
    """The space of the actions: Discrete or MultiDiscrete for whole numbers, else a Box. Converts the actions to it."""
    actions = recording.actions.reshape(len(recording.actions), -1)  # [n, A]
    columns = recording.names.get("action_names") or [f"actions[{i}]" for i in range(actions.shape[1])]

    def refuse(bad, reason):
        row, column = np.argwhere(bad)[0]
        place = row if recording.rows is None else recording.rows[row]
        raise DataError(f"{columns[column]} is {actions[row, column]:g} in row {place} (from 0): {reason}")

    given = args.action_low or recording.action_low, args.action_high or recording.action_high
    given = None if given[0] is None else given
    integers, fractions = actions.dtype.kind == "i", actions != np.rint(actions)
    discrete = not fractions.any() and (integers or given is None)
    if space is not None:
        discrete = not isinstance(space, gym.spaces.Box)
    if args.action_kind:
        discrete = args.action_kind == "discrete"
    if discrete and fractions.any():
        refuse(fractions, "discrete actions are whole numbers")
    one_hot = actions.shape[1] > 1 and actions.min() >= 0 and (actions.sum(axis=1) == 1).all()
    if discrete and one_hot and given is None and space is None:
        raise DataError("actions are one-hot: store the number of each action (or give action_low and action_high)")
    low, high, source = choose_bounds(actions, given, space, discrete)
    span = " to ".join(f"{x[0]:g}" if len({*x}) == 1 else str(x) for x in (low, high))
    margin = 0 if discrete else TOLERANCE * (high - low)
    if (actions.min(axis=0) < low - margin).any() or (actions.max(axis=0) > high + margin).any():
        outside = (actions < low - margin) | (actions > high + margin)
        refuse(outside, f"it is outside {span} ({source}); --action_low and --action_high set the bounds")
    if discrete and np.prod(high - low + 1) > MAX_ACTIONS:
        raise DataError(f"actions {span} are more than {MAX_ACTIONS:,} in all: give --action_kind continuous")
    kind = "whole numbers" if discrete else "real numbers"
    recording.note(f"Actions: {len(low)} column{'s' * (len(low) > 1)} of {kind}, {span} ({source}).")
    if not discrete:
        recording.actions = np.float32(actions)
        return gym.spaces.Box(np.float32(low), np.float32(high))
    recording.actions = actions.astype(np.int64)
    low, sizes = low.astype(np.int64), (high - low + 1).astype(np.int64)
    if len(low) > 1:
        return gym.spaces.MultiDiscrete(sizes, start=low)
    recording.actions = recording.actions[:, 0]
    return gym.spaces.Discrete(sizes[0], start=low[0])


def import_dataset(source, dataset_id, args):
    root, path, task = collect.free_place(dataset_id, args.force), Path(source), d4rl().get(source)
    env_id, limit = args.eval_env, args.max_episode_steps
    if task:
        path, env_id, limit = d4rl_file(source), env_id or task.environment or None, limit or task.max_episode_steps
    if not path.is_file():
        raise DataError("there is no such file")
    recording = read_table(path, args) if is_table(path) else read_hdf5(path)
    if len(recording.rewards) == 0:
        raise DataError("it has no rows")
    spec, space = evaluation(env_id, limit, recording) if env_id not in (None, "none") else (None, None)
    action_space = fit_actions(recording, args, space)
    ends, known = find_episodes(recording, limit or 1000)
    if not known.any():
        raise DataError("no transition has a known next observation")
    scores = args.ref_min_score, args.ref_max_score
    if None in scores:
        scores = task and task.scores or spec and reference_scores(spec.id)
    if spec is None:
        recording.note(NO_ENVIRONMENT)
    collect.store(
        dataset_id,
        make_buffers(recording, ends, known),
        root,
        added=recording.names | dict(zip(("ref_min_score", "ref_max_score"), scores or ())),
        eval_env=spec,
        observation_space=gym.spaces.Box(-np.inf, np.inf, recording.observations.shape[1:]),
        action_space=action_space,
        description=f"{args.command}: {' '.join(recording.notes)}",
    )
    tell_stored(root, dataset_id, known.sum(), ends.sum(), spec, scores)


def environment_text(spec):
    """A specification in words; equal texts are equal environments."""
    if spec is None:
        return "none"
    arguments = [f"{key}={value!r}" for key, value in sorted(spec.kwargs.items()) if key != "render_mode"]
    wrappers = map(str, spec.additional_wrappers)
    return ", ".join([spec.id, f"at most {spec.max_episode_steps} steps", *arguments, *wrappers])


def tell_stored(root, dataset_id, n_rows, n_episodes, spec, scores):
    evaluated = f", evaluated in {environment_text(spec)}" if spec else ""
    scored = f", score 0 at {scores[0]:g} and 100 at {scores[1]:g}" if scores else ""
    print(f"{dataset_id}: {n_rows:,} transitions, {n_episodes:,} episodes{evaluated}{scored}, in {root / dataset_id}")


# ----------------------------------------------------------------------------------------------- datasets into one


@contextlib.contextmanager
def reading(name):
    """Stands around calls of Minari, h5py and pyarrow alone, which raise any of these for damaged files."""
    try:
        yield
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{name} cannot be read: {error!r}") from error


def find_dataset(name):
    """The id of a local dataset; a D4RL name stands for d4rl/<name>."""
    root = collect.get_dataset_path()
    if "/" not in name and not (root / name).exists():
        name = f"d4rl/{name}"
    if not (root / name / "data").is_dir():
        cure, task = "`minari list local` lists the datasets there", name.removeprefix("d4rl/")
        if task in d4rl():
            cure = f"import it by: python benchmarks/import_data.py {task}"
        raise DataError(f"{name} is not in {root}: {cure}")
    return name


def open_dataset(name):
    with reading(name):
        # Where spaces are missing Minari makes the environment, by an entry point that could name any code.
        metadata = MinariStorage.read_raw_metadata(collect.get_dataset_path(name) / "data")
        if not {"observation_space", "action_space"} <= metadata.keys():
            raise KeyError("its metadata lacks the spaces")
        return minari.load_dataset(name)


def meaning(dataset):
    """All that must agree for the numbers of two datasets to mean the same."""
    spaces = {"observations": dataset.observation_space, "actions": dataset.action_space}
    return spaces | {key: dataset.storage.metadata.get(key) or {} for key in COLUMN_NAMES}


def difference(first, second, place=""):
    """The first difference of two meanings, in words."""
    parts = [dict(enumerate(x)) if isinstance(x, list) else x for x in (first, second)]
    if not all(isinstance(part, Mapping) for part in parts):
        return f"{place}: {first} and {second}"
    key = next(key for key in (*parts[0], *parts[1]) if parts[0].get(key) != parts[1].get(key))
    return difference(parts[0].get(key), parts[1].get(key), f"{place}[{key}]" if place else key)


def agreement(datasets):
    """Their common environment, or None; the other metadata that they share; and the differences in words."""
    metadata, specs = [x.storage.metadata for x in datasets], [x._eval_env_spec or x.env_spec for x in datasets]
    keys = dict.fromkeys(key for x in metadata for key in x if key not in OWN_METADATA)
    values = {"environment": [environment_text(spec) for spec in specs]}
    values |= {key: [x.get(key, "none") for x in metadata] for key in keys}
    shared = {key: x[0] for key, x in values.items() if x.count(x[0]) == len(x)}
    unlike = [
        f"{key} ({'; '.join(textwrap.shorten(str(value), 100, placeholder=' ...') for value in values[key])})"
        for key in values.keys() - shared.keys()
    ]
    spec, recorded = specs[0] if shared.pop("environment", None) else None, {x.get("env_spec") for x in metadata}
    if spec and len(recorded - {None}) == len(recorded) == 1:
        shared["env_spec"] = recorded.pop()
    for key in ("author", "author_email"):
        if people := set().union(*(x.get(key, ()) for x in metadata)):
            shared[key] = people
    return spec, shared, sorted(unlike)


class Part(NamedTuple):
    """The first episodes of a dataset, of which the last one loses `surplus` rows."""

    name: str
    dataset: minari.MinariDataset
    n_rows: int
    n_episodes: int
    surplus: int
    text: str


def first_rows(name, dataset, rows):
    """The Part with this number of rows, or with all if it is None."""
    with reading(name):
        lengths = [int(x["total_steps"]) for x in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    total = sum(lengths)
    if not total or rows and rows > total:
        raise DataError(f"{name} has {total:,} rows{f', not --rows {rows}' if rows else ''}")
    rows = rows or total
    ends = np.cumsum(lengths)
    n = int(np.searchsorted(ends, rows)) + 1
    surplus, length = int(ends[n - 1]) - rows, lengths[n - 1]
    text = f"{name}: {rows:,} of {total:,} rows, {n:,} of {len(lengths):,} episodes"
    if surplus:
        text += f"; the last one is cut after {length - surplus:,} of its {length:,} rows, which counts as a time-out"
    return Part(name, dataset, rows, n, surplus, f"{text}.")


def without_last(n, columns):
    """The columns of an episode, or of a part of a Dict or Tuple, without their last n rows."""
    if isinstance(columns, dict):
        return {key: without_last(n, column) for key, column in columns.items()}
    if isinstance(columns, tuple):
        return tuple(without_last(n, column) for column in columns)
    return columns[: len(columns) - n] if np.ndim(columns) else columns


def read_episodes(part):
    """Yields the episodes of a part and the metadata of each."""
    with reading(part.name):
        numbers = range(part.n_episodes)
        yield from zip(part.dataset.iterate_episodes(numbers), part.dataset.storage.get_episode_metadata(numbers))


def join(parts):
    """Yields the episodes of all parts, one at a time."""
    with tqdm(total=sum(part.n_rows for part in parts), unit="row", unit_scale=True, disable=None) as bar:
        for part in parts:
            for episode, metadata in read_episodes(part):
                columns = {key: column for key, column in vars(episode).items() if key != "id"}
                if part.surplus and episode.id == part.n_episodes - 1:
                    columns = without_last(part.surplus, columns)
                    columns["truncations"] = columns["truncations"].copy()
                    columns["truncations"][-1] |= not columns["terminations"][-1]
                bar.update(len(columns["rewards"]))
                yield EpisodeBuffer(seed=metadata.get("seed"), options=metadata.get("options"), **columns)


def combine(dataset_id, args):
    root, names = collect.free_place(dataset_id, args.force), [find_dataset(name) for name in args.combine]
    if len({*names}) < len(names):
        raise DataError(f"{', '.join(names)}: name each dataset once")
    datasets = [open_dataset(name) for name in names]
    meanings = [meaning(dataset) for dataset in datasets]
    for name, other in zip(names, meanings):
        if other != meanings[0]:
            raise DataError(f"{names[0]} and {name} differ in {difference(meanings[0], other)}")
    parts = [first_rows(*x) for x in zip(names, datasets, args.rows or [None] * len(names))]
    spec, shared, unlike = agreement(datasets)
    notes = [part.text for part in parts]
    if unlike:
        notes.append(f"Left out because they differ: {', '.join(unlike)}.")
    if spec is None:
        notes.append(NO_ENVIRONMENT)
    print("\n".join(notes))
    notes += [f"{part.name}: {part.dataset.storage.metadata.get('description')}" for part in parts]
    collect.store(
        dataset_id,
        join(parts),
        root,
        added=shared | {"combined_datasets": names},
        eval_env=spec,
        observation_space=datasets[0].observation_space,
        action_space=datasets[0].action_space,
        description=f"{args.command}: {' '.join(notes)}",
    )
    scores = shared.get("ref_min_score"), shared.get("ref_max_score")
    counts = sum(part.n_rows for part in parts), sum(part.n_episodes for part in parts)
    tell_stored(root, dataset_id, *counts, spec, None if None in scores else scores)


# ------------------------------------------------------------------------------------------------ command line


def is_table(source):
    return bool({".csv", ".parquet", ".pq"} & set(Path(source).suffixes))


def is_file(source):
    return is_table(source) or Path(source).suffix in (".hdf5", ".h5") or os.path.exists(source)


def parse_arguments(argv):
    parser = Parser("", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    domains = list(dict.fromkeys(dataset.domain for dataset in d4rl().values()))
    add = parser.add_argument
    add("sources", nargs="*", metavar="source", help="D4RL names, or one .hdf5, .csv or .parquet file")
    add("--all", choices=domains, help="newest version of each dataset of a D4RL domain, except those imported before")
    add("--combine", nargs="+", metavar="DATASET_ID", help="two or more local datasets, to be joined in this order")
    add("--rows", type=int, nargs="+", metavar="N", help="rows to take from the start of each one (default: all)")
    add("--id", metavar="DATASET_ID", help="the new Minari id, namespace/name-v0 (D4RL names become d4rl/<name>)")
    add("--force", action="store_true", help="replace an existing dataset")
    add("--eval_env", metavar="GYM_ID", help="Gymnasium environment to evaluate in, or none")
    add("--max_episode_steps", type=int, help="step limit of evaluations, and of episodes if no end is marked")
    add("--ref_min_score", type=float, help="return that scores 0 (D4RL's tasks have a default)")
    add("--ref_max_score", type=float, help="return that scores 100; give both or neither")
    add("--action_kind", choices=("continuous", "discrete"), help="default: as in the environment, else by type")
    add("--action_low", type=float, nargs="+", help="lowest action: one number, or one per column")
    add("--action_high", type=float, nargs="+", help="highest action: one number, or one per column")
    group = parser.add_argument_group("tables", "one row per step; the rows of an episode need not follow each other")
    table = group.add_argument
    table("--episode", metavar="COLUMN", help="value that the rows of an episode share")
    table("--step", metavar="COLUMN", help="numbers or times to sort the rows by (default: the order of the file)")
    table("--observations", nargs="+", metavar="COLUMN", help="names or patterns such as 'x_*'; text becomes one-hot")
    table("--actions", nargs="+", metavar="COLUMN", help="names or patterns; text and whole numbers are discrete")
    table("--reward", metavar="COLUMN", help="numbers")
    table("--terminal", metavar="COLUMN", help="1 if the task ends after the row")
    table("--timeout", metavar="COLUMN", help="1 if the recording ends after the row, but not the task")
    args = parser.parse_args(argv)
    args.command = shlex.join(["import_data.py", *(sys.argv[1:] if argv is None else argv)])
    check_arguments(args, parser)
    return args


def check_arguments(args, parser):
    files = [source for source in args.sources if source not in d4rl() and is_file(source)]
    needed = ("episode", "observations", "actions", "reward", "terminal")
    given = [name for name in (*needed, "step", "timeout") if getattr(args, name) is not None]
    missing = [f"--{name}" for name in needed if name not in given]
    inputs = [value for value in (args.sources, args.all, args.combine) if value]
    joining = ("sources", "all", "combine", "rows", "id", "force", "command")
    others = [f"--{name}" for name, value in vars(args).items() if value is not None and name not in joining]
    counted = args.rows is None or len(args.rows) == len(args.combine or ()) and min(args.rows) >= 1
    low, high = args.ref_min_score, args.ref_max_score
    unknown = [source for source in args.sources if source not in d4rl() and source not in files]
    near = ", ".join(difflib.get_close_matches(unknown[0], d4rl(), cutoff=0)) if unknown else ""
    parser.require({
        f"{unknown[0] if unknown else None} is neither a file nor a D4RL name; the nearest are {near}": not unknown,
        "name D4RL datasets or a file, or give --all with a domain, or --combine with datasets": len(inputs) == 1,
        "--combine takes two datasets or more": args.combine is None or len(args.combine) > 1,
        f"{', '.join(others)}: these do not go with --combine": not args.combine or not others,
        "--rows takes a number of at least 1 for each dataset of --combine": counted,
        "name a file alone": not files or len(args.sources) == 1,
        "a file and --combine need --id; D4RL names take none": bool(files or args.combine) == (args.id is not None),
        f"{', '.join(f'--{name}' for name in given)}: for tables alone": not given or files and is_table(files[0]),
        f"a table needs {', '.join(missing)}": not missing or not files or not is_table(files[0]),
        "--max_episode_steps must be at least 1": args.max_episode_steps is None or args.max_episode_steps >= 1,
        "--action_low and --action_high go together": (args.action_low is None) == (args.action_high is None),
        "--ref_min_score and --ref_max_score go together: give both or neither": (low is None) == (high is None),
        "--ref_min_score must be below --ref_max_score": None in (low, high) or -math.inf < low < high < math.inf,
    })  # fmt: skip
    try:
        parse_dataset_id(args.id or "d4rl/any-v0")
    except (ValueError, TypeError):  # TypeError: without a version, minari 0.5.4
        parser.error(f"--id {args.id} is not a Minari id, which looks like namespace/name-v0, two letters or more each")


def main(argv=None):
    args = parse_arguments(argv)
    for source in ["--combine"] if args.combine else args.sources or d4rl_domain(args.all):
        dataset_id = args.id or f"d4rl/{source}"
        try:
            if args.all and not args.force and (collect.get_dataset_path(dataset_id) / "data").is_dir():
                print(f"{dataset_id} is here already")
                continue
            if args.combine:
                combine(dataset_id, args)
            else:
                import_dataset(source, dataset_id, args)
        except DataError as error:
            fail(1, f"{source}: {error}")
        except OSError as error:
            fail(1, f"{dataset_id} cannot be stored: {error}")
        except MemoryError:
            fail(1, f"{source}: not enough memory")
        except KeyboardInterrupt:
            fail(130, "interrupted: nothing was stored")


if __name__ == "__main__":
    main()
