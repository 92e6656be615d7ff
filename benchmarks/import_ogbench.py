"""OGBench's .npz files for import_data.py: their layout, and the rewards of a task, by OGBench's own package."""

import contextlib
import difflib
import warnings

import numpy as np
from common import DataError
from import_table import check_flags, check_numbers, plural

PACKAGE = "pip install -r requirements.txt ogbench==1.2.2"  # alone it takes a MuJoCo that our robots do not know
COLUMNS = ("observations", "actions", "terminals")
KEYS = (*COLUMNS, "next_observations", "rewards", "masks", "valids", "timeouts", "qpos", "qvel", "button_states")


def read_ogbench(path, task):
    """The columns of a file in D4RL's layout, sentences for the user, and the id of the task's environment (None
    without a task). Raises DataError.

    In the file `terminals` mark the last row of each trajectory. Its observation is only what the row before it led to:
    nothing tells where its own action led, so that the row is dropped, as OGBench does. A terminal state is where
    `masks` are 0; OGBench's tasks have their success there.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {key: file[key] for key in KEYS if key in file}
    except MemoryError:
        raise
    except Exception as error:  # NumPy and zipfile raise nearly anything for a damaged file
        raise DataError(f"it is damaged or not a .npz file of arrays: {error}") from error
    if missing := [key for key in COLUMNS if key not in columns]:
        raise DataError(f"it lacks {', '.join(missing)}" + f"; it has {', '.join(columns)}" * bool(columns))
    if "timeouts" in columns:
        raise DataError("it has timeouts, which OGBench's layout lacks: store D4RL's layout as HDF5")
    columns = {key: column for key, column in columns.items() if key != "valids" or "next_observations" not in columns}
    lengths = {key: len(column) if column.ndim else 0 for key, column in columns.items()}
    if len({*lengths.values()}) > 1:
        counts = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise DataError(f"all must have the same number of rows: {counts}")
    for key in ("terminals", "masks", "valids"):
        if key in columns:
            if columns[key].ndim > 1:
                raise DataError(f"{key} has shape {columns[key].shape}: it must have one number per row")
            check_flags(columns[key], key)
    columns, notes = to_transitions(columns)
    environment = None
    if "rewards" in columns and task:
        raise DataError("it has rewards: leave out --task, and name the environment with --eval_env")
    if task:
        environment = add_rewards(columns, task)
    elif "rewards" not in columns:
        example = "such as pointmaze-medium-navigate-singletask-v0"
        raise DataError(f"it has no rewards: --task names the task of OGBench whose rewards are added, {example}")
    successes = columns.pop("masks", np.ones(len(columns["rewards"]))) == 0
    counted = f"Terminal: {plural(successes.sum(), 'row')}, where masks are 0; each ends an episode."
    notes.append(counted if successes.any() else "No mask is 0, so no row is terminal.")
    return columns | {"terminals": successes, "timeouts": columns["timeouts"] & ~successes}, notes, environment


def to_transitions(columns):
    """The columns with next_observations, timeouts instead of terminals, and `rows`, the places in the file where rows
    were dropped; and sentences about it. Raises DataError."""
    ends = columns.pop("terminals").astype(bool)
    if "next_observations" in columns:
        return columns | {"timeouts": ends}, ["next_observations are the file's: no row was dropped."]
    last = columns.pop("valids", ~ends) == 0  # OGBench's compact form, whose terminals mark the row before, too
    last[-1:] = True
    if last.all():
        raise DataError("no transition has a known next observation")
    for key in ("actions", "rewards"):  # here rows have their numbers in the file
        if key in columns and columns[key].dtype.kind in "biuf":
            check_numbers(np.where(last, 0, columns[key].T).T, key)
    following = columns["observations"][1:][~last[:-1]]
    columns = {key: column[~last] for key, column in columns.items()} | {"rows": np.flatnonzero(~last)}
    note = (
        f"Dropped: {plural(last.sum(), 'row')}, the last of each trajectory, since nothing tells where its action led."
    )
    return columns | {"next_observations": following, "timeouts": np.append(last[1:], True)[~last]}, [note]


def add_rewards(columns, task):
    """Adds rewards and masks of a task, by its environment or by the name of its data; returns the id of the
    environment. Raises DataError."""
    import gymnasium as gym

    gym.logger.min_level = gym.logger.ERROR
    with warnings.catch_warnings(action="ignore"):  # of a missing screen, of bounds in float64
        try:
            import ogbench
            from ogbench.relabel_utils import relabel_dataset
        except ImportError as error:
            raise DataError(f"--task needs OGBench's package ({error}): {PACKAGE}") from error
        known = [name for name in gym.registry if "-singletask-" in name]
        if "-singletask-" not in task:
            raise DataError(f"--task {task} has no rewards: name one with -singletask-")
        try:
            env = gym.make(task) if task in known else ogbench.make_env_and_datasets(task, env_only=True)
        except gym.error.Error as error:
            near = ", ".join(difflib.get_close_matches(task, known, cutoff=0))
            raise DataError(f"--task {task} is not one of OGBench's; the nearest are {near}") from error
    with contextlib.closing(env):
        shapes = columns["observations"].shape[1:], env.observation_space.shape
        if shapes[0] != shapes[1]:
            raise DataError(f"observations have shape {shapes[0]}, those of --task {task} {shapes[1]}")
        try:
            relabel_dataset(env.spec.id, env, columns)
        except (KeyError, IndexError, ValueError) as error:  # qpos or button_states are missing, or another robot's
            raise DataError(f"the rewards of --task {task} cannot be computed from this file: {error!r}") from error
    return env.spec.id
