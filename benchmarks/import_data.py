r"""Make a local dataset that the training scripts read. The sources are

D4RL's files by name, downloaded if they are not in $D4RL_DATASET_DIR (default ~/.d4rl/datasets):

    python benchmarks/import_data.py hopper-medium-v2 walker2d-medium-v2
    python benchmarks/import_data.py --all locomotion

an HDF5 file in D4RL's layout (observations, actions, rewards, terminals; timeouts or next_observations if known):

    python benchmarks/import_data.py robot.hdf5 --id mine/robot-v0 --eval_env Hopper-v5

an OGBench file, with the rewards of a task, which OGBench's package computes:

    python benchmarks/import_data.py pointmaze-medium-navigate-v0.npz --id ogbench/pointmaze-medium-v0 \
        --task pointmaze-medium-navigate-singletask-v0

a table of logged data, CSV or Parquet, or a folder of Parquet files, with one row per step; a bandit's log, where each
row is an episode; or that of a plant which never ends:

    python benchmarks/import_data.py shop.csv --id mine/shop-v0 --episode customer --step time \
        --observations 'x_*' country --actions discount --reward profit --terminal left
    python benchmarks/import_data.py clicks.csv --id mine/clicks-v0 --terminal all \
        --observations 'user_*' --actions item --reward click --mask 'allowed_*' --propensity p
    python benchmarks/import_data.py plant.csv --id mine/plant-v0 --terminal none --step time --max_gap 30min \
        --observations 'T*' --actions valve --cost energy

a later table, encoded as that one was:

    python benchmarks/import_data.py june.csv --id mine/june-v0 --like mine/shop-v0 --episode customer --step time \
        --reward profit --terminal left

a run of the DQN-replay layout, or an HDF5 file with images; all transitions, or so many of them in whole episodes:

    python benchmarks/import_data.py Pong/1 --id atari/pong-1-v0 --transitions 500000
    python benchmarks/import_data.py pong.hdf5 --id mine/pong-v0 --eval_env ALE/Pong-v5 --sticky 0

a Minari dataset of images, or a part of a dataset of frames that is here:

    python benchmarks/import_data.py --frames atari/pong/expert-v0 --id atari/pong-expert-v0
    python benchmarks/import_data.py --frames atari/pong-1-v0 --transitions 25000 --seed 1 --id atari/pong-5-v0

or local datasets of equal sizes and encodings, to be joined; all rows of each, or the first --rows:

    python benchmarks/import_data.py --combine hopper-medium-v2 hopper-expert-v2 --rows 900000 100000 --id mine/mix-v0

The dataset goes to $MINARI_DATASETS_PATH (default ~/.minari/datasets), and --list lists what is there. Numbers are
stored as float32. Rows whose next observation is not known are dropped and counted. Exit status: 0 stored, 1 the data
cannot be used, 2 a bad command line. An error is one line on stderr and stores nothing.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from common import (
    DataError,
    Parser,
    as_json,
    d4rl,
    dataset_form,
    fail,
    make_env,
    prefix,
    read_dataset,
    reading,
    reference_scores,
    staged,
    write_array,
    write_metadata,
)
from import_files import extension, find_parts, is_parquet
from import_frames import (
    MAX_GRID,
    holds_images,
    is_replay,
    join,
    read_images,
    read_minari,
    read_replay,
    read_stored,
    store_recording,
)
from import_ogbench import read_ogbench
from import_table import (
    DONE,
    Recording,
    check_choices,
    check_flags,
    check_numbers,
    check_precision,
    is_coarse,
    middle,
    plural,
    read_table,
    refuse_precision,
    shorten,
    show,
)
from tqdm import tqdm

from benchmarks import collect

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
READ_SECONDS = 10  # a server may be silent for so long
MAX_ACTIONS = 100_000  # values of a discrete action; the scripts take no more
TOLERANCE = 1e-3  # share of the range by which an action may be outside its bounds: rounding
NO_ENVIRONMENT = "No environment: runs train without evaluation unless --eval_env names one."
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")  # of a flat dataset
CHOICES = ("masks", "next_masks", "propensities")  # its optional columns, [T, actions] twice and [T]


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


# --------------------------------------------------------------------------------------------------- an HDF5 file


def check_layout(columns, present, images=False):
    """Raises DataError if HDF5 datasets do not have D4RL's layout, before they are read."""
    if missing := {"observations", "actions", "rewards", "terminals"} - columns.keys():
        raise DataError(f"it lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(present)) or 'nothing'}")
    for key, column in columns.items():
        n_axes = {"observations": (2, 3, 4), "next_observations": (2, 3, 4), "actions": (1, 2)}.get(key, (1,))
        n_axes = (0, 1) if key in ("action_low", "action_high") else n_axes
        if column.ndim not in n_axes or 0 in column.shape[1:]:
            axes = " or ".join(map(str, n_axes))
            raise DataError(f"{key} has shape {column.shape}: it must have {axes} axes, the first of rows")
        if column.ndim > 2 and math.prod(column.shape[1:]) > MAX_GRID and not images:
            raise DataError(
                f"{key} has shape {column.shape}, as images have, which are uint8; else vectors and small grids"
            )
        if column.dtype.kind not in "biuf":
            raise DataError(f"{key} has type {column.dtype}: store numbers")
        # its rows are in other files, and read as zeros where those are missing
        if isinstance(column, h5py.Dataset) and (column.is_virtual or column.external):
            raise DataError(f"{key} is a virtual dataset: store the numbers in this file")
    n_bytes = 4 * sum(column.size for key, column in columns.items() if not (images and key.endswith("observations")))
    if n_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise DataError(f"it declares {n_bytes / 1e9:,.0f} GB, more than this machine's memory")
    lengths = {key: len(column) for key, column in columns.items() if not key.startswith("action_")}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"all must have the same number of rows: {', '.join(f'{key} {n}' for key, n in lengths.items())}"
        )
    if not lengths["rewards"]:
        raise DataError("it has no rows")
    if ("action_low" in columns) != ("action_high" in columns):
        raise DataError("action_low and action_high go together")
    sizes = [columns[key].shape for key in ("observations", "next_observations") if key in columns]
    if len(set(sizes)) > 1:
        raise DataError(f"observations and next_observations differ in shape: {sizes[0]} and {sizes[1]}")


def read_hdf5(path, images=False):
    """The columns of a file as a Recording; of images as a dict, observations and next_observations unread."""
    keys = (*COLUMNS, "action_low", "action_high")
    try:
        with h5py.File(path) as file:
            columns = {key: file[key] for key in keys if isinstance(file.get(key), h5py.Dataset)}
            check_layout(columns, file, images)
            if images:
                return {
                    key: column.shape if key.endswith("observations") else read_column(key, column)
                    for key, column in columns.items()
                }
            return Recording(**{key: read_column(key, column) for key, column in columns.items()})
    except (DataError, MemoryError):
        raise
    except Exception as error:  # h5py raises nearly anything for a damaged file
        raise DataError(f"it is damaged or not an HDF5 file: {error}") from error


def read_npz(path, task):
    """An OGBench file, and the id of the task's environment."""
    columns, notes, environment = read_ogbench(path, task)
    rows, columns = columns.get("rows"), {key: columns[key] for key in COLUMNS}
    check_layout(columns, columns)
    recording = Recording(rows=rows, **{key: read_column(key, column) for key, column in columns.items()})
    for note in notes:
        recording.note(note)
    return recording, environment


def read_column(key, column):
    """A column of a file: flags, actions in their own precision, and numbers that float32 holds apart."""
    values = column[()]
    if key in ("terminals", "timeouts"):
        check_flags(values, key)
        return values.astype(bool)
    exact = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    check_numbers(np.atleast_1d(exact), key)
    if key.startswith("action"):
        values = values.astype(np.int64 if values.dtype.kind in "biu" else np.float64)
        return values.reshape(len(values), -1) if key == "actions" else values
    check_precision(exact, key)
    values = exact.astype(np.float32, copy=False)
    return values if key == "rewards" else values.reshape(len(values), -1)


# ----------------------------------------------------------------------------------------- from rows to transitions


def find_episodes(recording, limit):
    """Flags of the rows that end an episode, and of those whose next observation is known, [n] each; notes what
    changes."""
    terminals, following, n = recording.terminals, recording.next_observations, len(recording.rewards)
    if following is not None:
        differs = (following[:-1] != recording.observations[1:]).any(axis=1)
        flagged = terminals if recording.timeouts is None else terminals | recording.timeouts
        if splits := (differs & ~flagged[:-1]).sum() * (recording.timeouts is not None):
            recording.note(f"Split: {plural(splits, 'episode')}, where the next observation is not the next row's.")
        return flagged | np.append(differs, True), np.ones(n, bool)
    timeouts = recording.timeouts
    if timeouts is None:
        recording.note(f"No timeouts and no next_observations: episodes are assumed to end after {limit:,} steps.")
        rows = np.arange(n)
        starts = np.maximum.accumulate(np.where(np.append(True, terminals[:-1]), rows, 0))
        timeouts = (rows - starts) % limit == limit - 1
    unknown = timeouts & ~terminals
    unknown[-1] = not terminals[-1]
    if unknown.any():
        dropped = plural(unknown.sum(), "row")
        recording.note(f"Dropped: {dropped} without a known next observation (time-outs and last rows).")
    if terminals.any():
        ended = plural(terminals.sum(), "terminal row")
        recording.note(f"Next observation of {ended}: the row's own, which no target uses.")
    return terminals | unknown, ~unknown


def episode_returns(rewards, terminals, ends):
    """The return of each episode; and whether the last one was cut short, which is so if a longer one is there."""
    numbers = np.append(0, ends.cumsum()[:-1])
    lengths = np.bincount(numbers)
    return np.bincount(numbers, weights=rewards), not terminals[-1] and lengths[-1] < lengths.max()


def transitions(recording, limit):
    """The columns of a flat dataset. Rows without a known next observation are dropped."""
    ends, known = find_episodes(recording, limit)
    if not known.any():
        cure = "where nothing comes after a row, mark it as terminal"
        raise DataError(f"no transition has a known next observation, since each row is a time-out or the last: {cure}")
    observations, terminals, rewards = recording.observations, recording.terminals, recording.rewards
    following = recording.next_observations
    after = np.arange(len(ends)) + (known & ~terminals)
    if following is None:
        following = observations[after]
    before = np.append(~known[1:], False)  # the row after it is dropped, so that its own episode ends
    columns = {
        "observations": observations,
        "actions": recording.actions,
        "rewards": rewards,
        "next_observations": following,
        "terminals": terminals,
        "timeouts": (ends | before) & ~terminals,
    }
    if recording.masks is not None:
        columns |= {"masks": recording.masks, "next_masks": recording.masks[after]}
    if recording.propensities is not None:
        columns["propensities"] = recording.propensities
    if known.all():
        return columns
    columns = {key: column[known] for key, column in columns.items()}
    returns, cut_short = episode_returns(rewards, terminals, ends)
    kept = np.bincount(np.append(0, ends.cumsum()[:-1]), weights=known) > 0  # episodes that still have rows
    kept[-1] &= not cut_short
    stored, cut_short = episode_returns(columns["rewards"], columns["terminals"], episode_ends(columns))
    if not np.array_equal(returns[kept], stored[: len(stored) - cut_short]):
        columns["episode_returns"] = returns[kept]
    return columns


def episode_ends(columns):
    return columns["terminals"] | columns["timeouts"]


def evaluation(env_id, limit, size):
    """The environment, with this step limit if there is one, as load_dataset returns it; and its action space. The id
    is stored without its module: a run imports one only if its user names it."""
    from algorithms.offline.cql import flatten

    cure = "name another --eval_env, or none"
    try:
        env = make_env(env_id, "--eval_env")
        spec = gym.spec(env.spec.id)
        environment = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
        environment |= {"id": spec.id, "max_episode_steps": limit or spec.max_episode_steps}
        environment["wrappers"] = [[wrapper.name, wrapper.kwargs] for wrapper in spec.additional_wrappers]
        as_json(environment)
        space = env.observation_space
        wanted = flatten(collect.stack(space, [space.sample()]), space).shape[1]
    except (DataError, TypeError, ValueError) as error:
        raise DataError(f"{error}; {cure}") from error
    env.close()
    if size != wanted:
        raise DataError(f"observations have {size} numbers, those of {env_id} have {wanted}: {cure}")
    return environment, env.action_space


# --------------------------------------------------------------------------------------------------------- actions


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
    """Converts the actions to int64 or float32. Returns their bounds as stored, [A] each. Completes the encoding; an
    HDF5 file gets one where its actions are numbered anew."""
    actions, table = recording.actions, recording.encoding is not None
    entries = recording.encoding["actions"] if table else [{"name": f"actions[{i}]"} for i in range(actions.shape[1])]

    def refuse(bad, reason):
        row, column = np.argwhere(bad)[0]
        place = row if recording.rows is None else recording.rows[row]
        raise DataError(f"{entries[column]['name']} is {actions[row, column]:.10g} in row {place} (from 0): {reason}")

    given = args.action_low or recording.action_low, args.action_high or recording.action_high
    given = None if given[0] is None else given
    texts = [entry["name"] for entry in entries if "values" in entry and not args.like]
    if texts and (args.action_low or space or args.action_kind == "continuous"):
        cure = "for bounds, an environment or --action_kind continuous, store the numbers of the actions"
        raise DataError(f"column {texts[0]} holds text or truth values: {cure}")
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
    cure = f"{source}; --action_low and --action_high set the bounds"
    if args.like:
        source = cure = f"those of {args.like}"
    elif recording.masks is not None and given and not args.action_low:
        source = cure = "one per mask"
    spans = [[f"{x:.10g}" for x in bound] for bound in (low, high)]
    span = " to ".join(x[0] if len({*x}) == 1 else f"[{shorten(x)}]" for x in spans)
    margin = 0 if discrete else TOLERANCE * (high - low)
    if (outside := (actions < low - margin) | (actions > high + margin)).any():
        refuse(outside, f"it is outside {span} ({cure})")
    kind = "real numbers"
    if discrete:
        kind = "whole numbers (Discrete)" if len(low) == 1 else "whole numbers (MultiDiscrete)"
        if texts:
            source = f"categories of {shorten(texts)}"
        elif not (space or args.action_kind or args.like or recording.masks is not None):
            source += "; --action_kind continuous takes them as real numbers"
    recording.note(f"Actions: {len(low)} column{'s' * (len(low) > 1)} of {kind}, {span} ({source}).")
    if not discrete:
        return shift_actions(recording, entries, low, high, table)
    low, high = number_actions(recording, entries, low, high, free=given is None and space is None)
    if table or any("values" in entry for entry in entries):
        recording.encoding = recording.encoding or {"observations": [], "actions": entries}
        for i, entry in enumerate(entries):
            entry.setdefault("values", [*range(low[i], high[i] + 1)])
            entry["low"] = int(low[i])  # the number of the first value
    return low.tolist(), high.tolist()


def number_actions(recording, entries, low, high, free):
    """Converts the actions to int64. Numbers the values of a column anew, from 0, if they are free and have holes."""
    recording.actions = actions = recording.actions.astype(np.int64)
    low, high = low.astype(np.int64), high.astype(np.int64)
    for i, entry in enumerate(entries):
        values, why = np.unique(actions[:, i]), ""
        if free and len(values) <= high[i] - low[i]:
            why = ", numbered anew since whole numbers between them are missing"
            actions[:, i] = np.searchsorted(values, actions[:, i])
            low[i], high[i], entry["values"] = 0, len(values) - 1, values.tolist()
        if "values" in entry and entry["values"] != [*range(low[i], high[i] + 1)]:
            numbers = shorten(f"{low[i] + k} is {show(value)}" for k, value in enumerate(entry["values"]))
            recording.note(f"Actions of {entry['name']}{why}: {numbers}.")
    if np.prod(high - low + 1.0) > MAX_ACTIONS:
        raise DataError(f"there are more than {MAX_ACTIONS:,} actions in all: give --action_kind continuous")
    return low, high


def shift_actions(recording, entries, low, high, table):
    """Converts the actions to float32, less an offset where a table's numbers need one."""
    for i, (entry, *bounds) in enumerate(zip(entries, low.tolist(), high.tolist())):
        coarse = is_coarse(*bounds) or np.float32(bounds[0]) == np.float32(bounds[1])
        numbers = np.append(recording.actions[:, i], bounds)
        if coarse and not table and (np.float32(numbers) != numbers).any():
            refuse_precision(entry["name"], *bounds)
        entry.setdefault("offset", middle(*bounds) if coarse and table else 0.0)
        entry |= dict(zip(("low", "high"), bounds))
        if entry["offset"]:
            recording.note(
                f"{entry['name']} is stored minus {entry['offset']:.15g}: float32 has too few digits for it."
            )
    offsets = np.array([entry["offset"] for entry in entries])
    recording.actions = np.float32(recording.actions - offsets)
    return np.float32(low - offsets).tolist(), np.float32(high - offsets).tolist()


# --------------------------------------------------------------------------------------------------- a dataset


def import_dataset(source, dataset_id, args):
    root, path, task = collect.free_place(dataset_id, args.force), Path(source), d4rl().get(source)
    env_id, limit = args.eval_env, args.max_episode_steps
    if task:
        path, env_id, limit = d4rl_file(source), env_id or task.environment or None, limit or task.max_episode_steps
    if not path.exists():
        raise DataError("there is no such file")
    if extension(path) in (".xlsx", ".xls", ".ods"):
        raise DataError("a spreadsheet cannot be read: export the sheet as CSV UTF-8")
    like = read_like(args.like) if args.like else None
    environment, space = None, None
    if is_replay(path) or holds_images(path):
        return import_frames(path, dataset_id, args, root)
    if extension(path) == ".npz":
        recording, of_task = read_npz(path, args.task)
        env_id = env_id or of_task and f"ogbench:{of_task}"
    else:
        recording = read_table(path, args, like) if is_table(path) else read_hdf5(path)
    if env_id not in (None, "none"):
        environment, space = evaluation(env_id, limit, recording.observations.shape[1])
    if environment and recording.masks is not None:
        raise DataError(f"{env_id} does not know masks: leave out --mask, or give --eval_env none")
    low, high = fit_actions(recording, args, None if like else space)
    check_choices(recording, low, high)
    encoding = recording.encoding or {"observations": [], "actions": []}
    offsets = [x["name"] for role in ("observations", "actions") for x in encoding[role] if x.get("offset")]
    if environment and offsets:
        raise DataError(f"column {offsets[0]} needs an offset, which {env_id} does not know: give --eval_env none")
    columns = transitions(recording, limit or 1000)
    scores = args.ref_min_score, args.ref_max_score
    if None in scores:
        scores = task and task.scores or environment and reference_scores(environment["id"])
    if environment is None:
        recording.note(NO_ENVIRONMENT)
    elif ":" in env_id:
        recording.note(f"Runs import the module of the environment only where it is named: --eval_env {env_id}.")
    metadata = {
        "action_low": low,
        "action_high": high,
        "reference_scores": scores,
        "environment": environment,
        "encoding": recording.encoding,
        "notes": recording.notes,
        "source": {"command": args.command, "files": [str(path)], "sha256": checksum(path)},
    }
    store_flat(dataset_id, columns, metadata, root, args.force)


def import_frames(source, dataset_id, args, root):
    """Stores a dataset of frames, from a path, or from the id of a dataset."""
    if args.frames:
        recording = read_frames(source, args)
    elif is_replay(source):
        recording = read_replay(source, args)
    else:
        columns = read_hdf5(source, images=True)
        recording = read_images(source, columns.pop("observations"), columns, args)
        recording.source["sha256"] = checksum(source)
    metadata = store_recording(recording, dataset_id, args, root)
    print(f"{dataset_id}: {counts_text(metadata)}, in {root / dataset_id}")


def read_frames(name, args):
    """The Recording of a dataset of frames, or of a Minari one, which may have to be downloaded."""
    path = collect.get_dataset_path(name)
    if dataset_form(path) != "flat":
        return read_minari(name, args)
    if (args.grey, args.resize) != (None, None):
        raise DataError("its frames are stored: --grey and --resize are for Minari datasets")
    if not args.transitions:
        raise DataError("it is a dataset of frames already: name the --transitions to take of it")
    return read_stored(name, path)


def checksum(path):
    """The SHA-256 of a file; of a folder, that of the lines that sha256sum prints for its Parquet files, in order."""

    def digest(part):
        with open(part, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if path.is_file():
        return digest(path)
    lines = "".join(f"{digest(part)}  {part}\n" for part in find_parts(path)[0])
    return hashlib.sha256(lines.encode()).hexdigest()


def store_flat(dataset_id, columns, metadata, root, force):
    """Writes a dataset so that it is whole or absent. metadata: what the columns do not tell; what is None is left out.
    Raises OSError."""
    episodes, kind = int(episode_ends(columns).sum()), columns["actions"].dtype.kind
    metadata = {"format": 1, "kind": "transitions"} | metadata
    metadata |= {"transitions": len(columns["rewards"]), "episodes": episodes}
    metadata["actions"] = "continuous" if kind == "f" else "discrete"
    with staged(dataset_id, root, force) as folder:
        for name, values in columns.items():
            write_array(folder / f"{name}.npy", values)
        write_metadata(folder, metadata)
    print(f"{dataset_id}: {counts_text(metadata)}, in {root / dataset_id}")


def counts_text(metadata):
    environment, scores = metadata.get("environment"), metadata.get("reference_scores")
    evaluated = f", evaluated in {environment_text(environment)}" if environment else ""
    scored = f", score 0 at {scores[0]:g} and 100 at {scores[1]:g}" if scores else ""
    return (
        f"{plural(metadata['transitions'], 'transition')}, {plural(metadata['episodes'], 'episode')}{evaluated}{scored}"
    )


def environment_text(environment):
    if environment is None:
        return "none"
    known = ("id", "max_episode_steps", "wrappers")
    words = [environment["id"]]
    if environment.get("max_episode_steps"):
        words.append(f"at most {environment['max_episode_steps']} steps")
    words += [f"{key}={value!r}" for key, value in sorted(environment.items()) if key not in known]
    return ", ".join([*words, *(name for name, _ in environment["wrappers"])])


# ------------------------------------------------------------------------------------------------ datasets read


def find_dataset(name):
    """The id of a local dataset, and its form; a D4RL name stands for d4rl/<name>."""
    root = collect.get_dataset_path()
    if "/" not in name and not (root / name).exists():
        name = f"d4rl/{name}"
    if not (form := dataset_form(root / name)):
        cure, task = "`import_data.py --list` lists the datasets there", name.removeprefix("d4rl/")
        if task in d4rl():
            cure = f"import it by: python benchmarks/import_data.py {task}"
        raise DataError(f"{name} is not in {root}: {cure}")
    return name, form


def holds_frames(name):
    """Whether an imported dataset has frames."""
    with reading(name):
        text = (collect.get_dataset_path(name) / "metadata.json").read_text(encoding="utf-8")
        return json.loads(text)["kind"] == "frames"


def read_flat(name):
    """The metadata of a flat dataset, and its columns, mapped from the disk."""
    path = collect.get_dataset_path(name)
    with reading(name):
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        if metadata["format"] != 1 or metadata["kind"] != "transitions":
            raise ValueError(f"it has format {metadata['format']} and kind {metadata['kind']}")
        if missing := {"transitions", "episodes", "actions", "action_low", "action_high", "notes"} - metadata.keys():
            raise KeyError(*missing)
        there = [key for key in CHOICES if (path / f"{key}.npy").exists()]
        if ("masks" in there) != ("next_masks" in there):
            raise ValueError("masks.npy and next_masks.npy go together")
        columns = {key: np.load(path / f"{key}.npy", mmap_mode="r") for key in (*COLUMNS, *there)}
        if {len(column) for column in columns.values()} != {metadata["transitions"]}:
            raise ValueError(f"its columns do not have {metadata['transitions']} rows each")
        if (path / "episode_returns.npy").exists():
            columns["episode_returns"] = np.load(path / "episode_returns.npy")
    return metadata, columns


def read_like(name):
    name, form = find_dataset(name)
    metadata = read_flat(name)[0] if form == "flat" and not holds_frames(name) else {}
    if not metadata.get("encoding", {}).get("observations"):
        raise DataError(f"--like {name} has no encoding of a table: import its table again")
    return metadata


def read_recorded(name):
    """The metadata of a Minari dataset. Spaces and specifications are JSON texts in it."""
    with reading(name):
        metadata = json.loads((collect.get_dataset_path(name) / "data" / "metadata.json").read_text(encoding="utf-8"))
        for key in ("observation_space", "action_space"):
            metadata[key] = json.loads(metadata[key])
        spec = metadata.get("eval_env_spec") or metadata.get("env_spec")
        counts = [int(metadata["total_steps"]), int(metadata["total_episodes"])]
        return metadata | {"environment": json.loads(spec)["id"] if spec else None, "counts": counts}


def list_datasets():
    """Prints a line per local dataset, and per leftover of a killed import. Raises DataError for two in a folder."""
    root, errors = collect.get_dataset_path(), []
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        name = Path(folder).relative_to(root).as_posix()
        subfolders[:] = sorted(x for x in subfolders if not x.startswith("."))
        if re.search(r"\.\d+\.(tmp|old)$", name):
            words = "left by an import that was killed (or still runs), delete it"
            if name.endswith(".old") and not (root / name.split(".")[0]).exists():
                words = "the dataset before an import that was killed, rename it"
            print(f"{name}: {words}")
            subfolders.clear()
            continue
        try:
            if form := dataset_form(Path(folder)):
                subfolders.clear()
                print(f"{name}: {summary(name, form)}")
        except DataError as error:
            subfolders.clear()
            errors.append(str(error))
    if errors:
        raise DataError("; ".join(errors))


def summary(name, form):
    """A dataset in words, or what is wrong with it."""
    try:
        if form == "flat" and holds_frames(name):
            stored = read_stored(name, collect.get_dataset_path(name))
            counts, kind = [len(stored.rewards), len(stored.episodes.row)], "discrete"
            environment = (stored.environment or {}).get("id")
            form = f"frames of {' x '.join(map(str, stored.frame))}, flat"
        elif form == "flat":
            metadata, _ = read_flat(name)
            counts, kind = [metadata["transitions"], metadata["episodes"]], metadata["actions"]
            environment = metadata.get("environment", {}).get("id")
        else:
            metadata = read_recorded(name)
            counts, environment = metadata["counts"], metadata["environment"]
            kind = "continuous" if metadata["action_space"]["type"] == "Box" else "discrete"
    except DataError as error:
        return f"{form} form, damaged: {error}"
    where = environment or "no environment"
    return f"{plural(counts[0], 'transition')}, {plural(counts[1], 'episode')}, {kind} actions, {where}, {form} form"


# ----------------------------------------------------------------------------------------------- datasets into one


def read_part(name):
    """A dataset of either form as load_dataset returns it, with `notes`; in Minari's form, with `observation_space`."""
    name, form = find_dataset(name)
    if form == "flat":
        metadata, columns = read_flat(name)
        return metadata | columns
    recorded = read_recorded(name)
    if "observation_names" in recorded:
        raise DataError(f"{name} is a table without an encoding, which an earlier version stored: import it again")
    with prefix(name):
        data = read_dataset(name)
    data["observation_space"] = recorded["observation_space"]
    data["notes"] = [str(recorded.get("description")), "Infos, seeds and options are not kept."]
    try:
        as_json(data.get("environment"))
    except ValueError as error:
        data["notes"].append(f"The environment is left out: {error}.")
        del data["environment"]
    return data


def meaning(part, other):
    """All that must agree for the numbers of two datasets to mean the same."""
    kind = "real" if part["actions"].dtype.kind == "f" else "whole"
    found = {"observations": f"{part['observations'].shape[1]} numbers"}
    found |= {"actions": f"{part['actions'].shape[1]} {kind} numbers", "encoding": part.get("encoding") or {}}
    found |= {key: np.asarray(part[key]).tolist() for key in ("action_low", "action_high")}
    return found | (
        {"observation_space": part["observation_space"]}
        if "observation_space" in part and "observation_space" in other
        else {}
    )


def difference(first, second, place=""):
    """The first difference of two meanings, in words."""
    parts = [dict(enumerate(x)) if isinstance(x, list) else x for x in (first, second)]
    if not all(isinstance(part, Mapping) for part in parts):
        return f"{place}: {first} and {second}"
    key = next(key for key in (*parts[0], *parts[1]) if parts[0].get(key) != parts[1].get(key))
    return difference(parts[0].get(key), parts[1].get(key), f"{place}[{key}]" if place else key)


def first_rows(name, part, rows):
    """The columns of a dataset's first rows, or of all if `rows` is None, with the returns of the complete episodes. An
    episode that is cut ends by time-out."""
    ends, total = np.flatnonzero(episode_ends(part)), len(part["rewards"])
    if rows and rows > total:
        raise DataError(f"{name} has {total:,} rows, not --rows {rows}")
    rows = rows or total
    n = int(np.searchsorted(ends, rows - 1)) + 1
    surplus, length = int(ends[n - 1]) + 1 - rows, int(np.diff(ends, prepend=-1)[n - 1])
    text = f"{name}: {rows:,} of {plural(total, 'row')}, {n:,} of {plural(len(ends), 'episode')}"
    if surplus:
        kept = f"{length - surplus:,} of its {plural(length, 'row')}"
        text += f"; the last one is cut after {kept}, which counts as a time-out"
    columns = {key: part[key][:rows] for key in (*COLUMNS, *CHOICES) if key in part}
    columns["timeouts"] = columns["timeouts"] | ((np.arange(rows) == rows - 1) & ~columns["terminals"])
    returns = part.get("episode_returns")
    if returns is None:
        returns, cut_short = episode_returns(part["rewards"], part["terminals"], episode_ends(part))
        returns = returns[: len(returns) - cut_short]
    return columns | {"episode_returns": returns[: n - (surplus > 0)]}, f"{text}."


def combine(dataset_id, args):
    root, names = collect.free_place(dataset_id, args.force), [find_dataset(name)[0] for name in args.combine]
    if len({*names}) < len(names):
        raise DataError(f"{', '.join(names)}: name each dataset once")
    framed = [dataset_form(root / name) == "flat" and holds_frames(name) for name in names]
    if all(framed):
        if args.rows:
            raise DataError("--rows is not for frames: take --transitions of one by --frames, then join the parts")
        recording = join(names, [read_stored(name, root / name) for name in names])
        metadata = store_recording(recording, dataset_id, args, root)
        return print(f"{dataset_id}: {counts_text(metadata)}, in {root / dataset_id}")
    if any(framed):
        raise DataError(f"{names[framed.index(True)]} has frames, {names[framed.index(False)]} has none")
    parts = [read_part(name) for name in names]
    for name, part in zip(names, parts):
        for key in ("masks", "propensities"):
            if (key in part) != (key in parts[0]):
                with_, without = (name, names[0]) if key in part else (names[0], name)
                raise DataError(f"{with_} has {key}, {without} has none: import both with them, or both without")
        pair = meaning(parts[0], part), meaning(part, parts[0])
        if pair[0] != pair[1]:
            raise DataError(f"{names[0]} and {name} differ in {difference(*pair)}")
    taken = [first_rows(*x) for x in zip(names, parts, args.rows or [None] * len(names))]
    notes, shared = [text for _, text in taken], {}
    for key, words in (("environment", environment_text), ("reference_scores", str)):
        values = [json.loads(as_json(part.get(key))) for part in parts]
        if values.count(values[0]) == len(values):
            shared[key] = values[0]
        else:
            notes.append(f"Left out because they differ: {key} ({'; '.join(map(words, values))}).")
    if not shared.get("environment"):
        notes.append(NO_ENVIRONMENT)
    print("\n".join(notes))
    notes += [f"{name}: {note}" for name, part in zip(names, parts) for note in part["notes"]]
    columns = {key: np.concatenate([columns[key] for columns, _ in taken]) for key in taken[0][0]}
    if not any("episode_returns" in part for part in parts):
        del columns["episode_returns"]
    metadata = meaning(parts[0], {}) | shared | {"notes": notes, "source": {"command": args.command, "files": names}}
    keys = ("action_low", "action_high", "reference_scores", "environment", "encoding", "notes", "source")
    store_flat(dataset_id, columns, {key: metadata.get(key) or None for key in keys}, root, args.force)


# ------------------------------------------------------------------------------------------------ command line


def is_table(source):
    if is_replay(Path(source)):
        return False
    return is_parquet(source) or extension(source) in (".csv", ".tsv", ".xlsx", ".xls", ".ods")


def is_file(source):
    return is_table(source) or extension(source) in (".hdf5", ".h5", ".npz") or os.path.exists(source)


def parse_arguments(argv):
    parser = Parser("", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    domains = list(dict.fromkeys(dataset.domain for dataset in d4rl().values()))
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="source",
        help="D4RL names, or one .hdf5, .npz, .csv, .tsv or .parquet file or folder",
    )
    add("--all", choices=domains, help="newest version of each dataset of a D4RL domain, except those imported before")
    add("--combine", nargs="+", metavar="DATASET_ID", help="two or more local datasets, to be joined in this order")
    add("--frames", metavar="DATASET_ID", help="a dataset of images: a Minari one, or one of frames to take a part of")
    add("--rows", type=int, nargs="+", metavar="N", help="rows to take from the start of each one (default: all)")
    add("--list", action="store_true", help="list the local datasets instead")
    add("--id", metavar="DATASET_ID", help="the new id, namespace/name-v0 (D4RL names become d4rl/<name>)")
    add("--force", action="store_true", help="replace an existing dataset")
    add("--eval_env", metavar="GYM_ID", help="Gymnasium environment to evaluate in, or none")
    add(
        "--task",
        metavar="NAME",
        help="task of OGBench whose rewards a .npz file is given, evaluated in its environment",
    )
    add("--max_episode_steps", type=int, help="step limit of evaluations, and of episodes if no end is marked")
    add("--ref_min_score", type=float, help="return that scores 0 (D4RL's tasks have a default)")
    add("--ref_max_score", type=float, help="return that scores 100; give both or neither")
    group = parser.add_argument_group("frames", "images, for algorithms/discrete/cql_atari.py")
    frames = group.add_argument
    frames(
        "--transitions", type=int, metavar="N", help="take so many, in whole episodes drawn uniformly (default: all)"
    )
    frames("--first", action="store_true", help="with --transitions: take the first ones")
    frames("--seed", type=int, help="with --transitions: which episodes are drawn (default: 0)")
    frames("--sticky", type=float, metavar="P", help="probability that a game repeats an action (default: 0.25)")
    words = "of a Minari dataset: make images grey, as Gymnasium does (default: those of atari/)"
    frames("--grey", choices=("True", "False"), help=words)
    words = "of a Minari dataset: the size of frames, as Gymnasium makes it (default: of atari/ 84 84)"
    frames("--resize", type=int, nargs=2, metavar=("H", "W"), help=words)
    add("--action_kind", choices=("continuous", "discrete"), help="default: as in the environment, else by type")
    add("--action_low", type=float, nargs="+", help="lowest action: one number, or one per column")
    add("--action_high", type=float, nargs="+", help="highest action: one number, or one per column")
    group = parser.add_argument_group("tables", "one row per step; the rows of an episode need not follow each other")
    table = group.add_argument
    words = "values that the rows of an episode share (default: all rows, in order, until --terminal)"
    table("--episode", nargs="+", metavar="COLUMN", help=words)
    table("--step", metavar="COLUMN", help="numbers or times to sort the rows by (default: the order of the file)")
    table("--observations", nargs="+", metavar="COLUMN", help="names or patterns such as 'x_*'; text becomes one-hot")
    table("--actions", nargs="+", metavar="COLUMN", help="names or patterns; text and whole numbers are discrete")
    table("--reward", metavar="COLUMN", help="numbers")
    table("--cost", metavar="COLUMN", help="instead of --reward: the reward is minus this column")
    words = (
        "1 if the task ends after the row; or all (every row, as in a bandit's log), or none (no row, as in a plant)"
    )
    table("--terminal", metavar="COLUMN|all|none", help=words)
    words = "1 if the recording ends after the row, but not the task; none: say that a `done` flag marks no such row"
    table("--timeout", metavar="COLUMN|none", help=words)
    words = "an episode ends where its next step is further away: a number or, for times, a duration such as 30min"
    table("--max_gap", metavar="GAP", help=words)
    words = "one column per action, 1 where it is allowed, with the action in its name, such as 'allowed_*'"
    table("--mask", nargs="+", metavar="COLUMN", help=words)
    table("--propensity", metavar="COLUMN", help="probability with which the logged action was chosen")
    table("--day_first", choices=("True", "False"), help="whether 02/01/2024 in --step is 2 January")
    table("--decimal", choices=(",", "."), help="the decimal mark of a CSV file (default: a point)")
    table("--like", metavar="DATASET_ID", help="encode as this dataset is: its observations, actions, bounds and masks")
    table(
        "--unseen",
        choices=("other",),
        help="with --like: count new categories as `other` where that is one, else as none",
    )
    args = parser.parse_args(argv)
    args.command = shlex.join(["import_data.py", *(sys.argv[1:] if argv is None else argv)])
    check_arguments(args, parser)
    return args


def check_arguments(args, parser):
    files = [source for source in args.sources if source not in d4rl() and is_file(source)]
    needed = ("terminal",) + (() if args.like else ("observations", "actions"))
    options = ("episode", "step", "reward", "cost", "timeout", "max_gap", "mask", "propensity")
    options += ("day_first", "decimal", "like", "unseen")
    given = [name for name in (*needed, *options) if getattr(args, name) is not None]
    missing = [f"--{name}" for name in needed if name not in given]
    missing += ["--reward or --cost"] * ({"reward", "cost"}.isdisjoint(given))
    if "--terminal" in missing:
        missing[missing.index("--terminal")] += (
            " (a column that is 1 where nothing can come after the row; all, if each row is an episode; none, if the "
            "process never ends)"
        )
    done = args.terminal if args.terminal and DONE.search(args.terminal) and args.timeout is None else None
    table = bool(files) and is_table(files[0])
    known = [
        x
        for x in files
        if is_table(x) or is_replay(Path(x)) or extension(x) in (".hdf5", ".h5", ".npz") or h5py.is_hdf5(x)
    ]
    inputs = [value for value in (args.sources, args.all, args.combine, args.frames, args.list) if value]
    joining = ("sources", "all", "combine", "frames", "rows", "id", "force", "list", "command", "first")
    others = [f"--{name}" for name, value in vars(args).items() if value is not None and name not in joining]
    taking = ("--transitions", "--seed", "--grey", "--resize")
    images = bool(files) and (is_replay(Path(files[0])) or holds_images(files[0]))
    counted = args.rows is None or len(args.rows) == len(args.combine or ()) and min(args.rows) >= 1
    low, high = args.ref_min_score, args.ref_max_score
    unknown = [source for source in args.sources if source not in d4rl() and source not in files]
    near = ", ".join(difflib.get_close_matches(unknown[0], d4rl(), cutoff=0)) if unknown else ""
    parser.require({
        f"{unknown[0] if unknown else None} is neither a file nor a D4RL name; the nearest are {near}": not unknown,
        "name D4RL datasets or a file, or give --all with a domain, --combine with datasets or --frames with one":
            len(inputs) == 1,
        "--list stands alone": not args.list or not (others or args.id or args.rows or args.force),
        "--combine takes two datasets or more": args.combine is None or len(args.combine) > 1,
        f"{', '.join(others)}: these do not go with --combine": not args.combine or not others,
        "--rows takes a number of at least 1 for each dataset of --combine": counted,
        f"{', '.join(x for x in others if x not in taking)}: these do not go with --frames":
            not args.frames or {*others} <= {*taking},
        "--transitions is for images": args.transitions is None or images or args.frames,
        "--sticky is for images": args.sticky is None or images,
        "--transitions must be at least 1": args.transitions is None or args.transitions >= 1,
        "--sticky is a probability": args.sticky is None or 0 <= args.sticky <= 1,
        "--first and --seed go with --transitions, and exclude each other":
            not args.first and args.seed is None or args.transitions and not (args.first and args.seed is not None),
        "--seed must be at least 0": args.seed is None or args.seed >= 0,
        "--grey and --resize go with --frames": args.frames or args.grey is None and args.resize is None,
        "--resize takes two numbers of at least 1": args.resize is None or min(args.resize) >= 1,
        "name a file alone": not files or len(args.sources) == 1,
        "a file, --combine and --frames need --id; D4RL names take none":
            bool(files or args.combine or args.frames) == (args.id is not None),
        f"{files[0] if files else None} is not an HDF5 file: rename it to .csv if it is a table": known == files,
        f"{', '.join(f'--{name}' for name in given)}: only for tables": not given or table,
        f"a table needs {', '.join(missing)}": not missing or not table,
        "--reward and --cost exclude each other": args.reward is None or args.cost is None,
        f"--terminal {done}: such flags are often 1 at time-outs too. Add --timeout none if this one is 1 only where "
        f"the task ends; else give --timeout {done} --terminal none, or a --terminal such as next.success":
            done is None,
        "--terminal all leaves nothing to --timeout and --max_gap: each row is an episode that ends":
            args.terminal != "all" or args.timeout in (None, "none") and args.max_gap is None,
        "--terminal and --timeout are the same column": args.terminal != args.timeout or args.timeout in (None, "none"),
        "--max_gap goes with --step": args.max_gap is None or args.step is not None,
        "--task goes with a .npz file": args.task is None or bool(files) and extension(files[0]) == ".npz",
        "--day_first goes with --step": args.day_first is None or args.step is not None,
        "--decimal is for CSV files": args.decimal is None or not files or not is_parquet(files[0]),
        "--unseen goes with --like": args.unseen is None or args.like is not None,
        "--action_kind, --action_low and --action_high do not go with --like, which knows them":
            not args.like or (args.action_kind, args.action_low, args.action_high) == (None, None, None),
        "--max_episode_steps must be at least 1": args.max_episode_steps is None or args.max_episode_steps >= 1,
        "--action_low and --action_high go together": (args.action_low is None) == (args.action_high is None),
        "--ref_min_score and --ref_max_score go together: give both or neither": (low is None) == (high is None),
        "--ref_min_score must be below --ref_max_score": None in (low, high) or -math.inf < low < high < math.inf,
    })  # fmt: skip
    try:
        collect.parse_dataset_id(args.id or "d4rl/any-v0")
    except (ValueError, TypeError):  # TypeError: without a version, minari 0.5.4
        parser.error(f"--id {args.id} is not an id, which looks like namespace/name-v0, two letters or more each")


def main(argv=None):
    args = parse_arguments(argv)
    alone = "--combine" if args.combine else "--list" if args.list else args.frames
    for source in [alone] if alone else args.sources or d4rl_domain(args.all):
        dataset_id = args.id or f"d4rl/{source}"
        try:
            if args.all and not args.force and dataset_form(collect.get_dataset_path(dataset_id)):
                print(f"{dataset_id} is here already")
            elif args.list:
                list_datasets()
            elif args.combine:
                combine(dataset_id, args)
            elif args.frames:
                import_frames(args.frames, dataset_id, args, collect.free_place(dataset_id, args.force))
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
