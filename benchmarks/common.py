"""Shared parts of the programs. Importing it makes `algorithms` and `benchmarks` importable from any folder."""

import argparse
import contextlib
import csv
import functools
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn, Optional

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SCRIPTS = (
    "algorithms.discrete.cql_dqn",
    "algorithms.discrete.cql_atari",
    "algorithms.offline.policy_constraint",
    "algorithms.offline.cql",
)  # between them they open the policies of all scripts
READERS = SCRIPTS[0], SCRIPTS[-1]  # of datasets: one for each kind of actions
INTERFACE = ("load_policy", "load_dataset", "evaluate")  # all that programs use of the script of a policy
MODULE_PATH = "PYTHONPATH=. lets Python import a module of the current folder"
LUNAR_LANDER = {"LunarLander": (-180.0, 250.0), "LunarLanderContinuous": (-200.0, 280.0)}  # see reference_scores


class DataError(ValueError):
    """Data or files that cannot be used. Like a script's DataError it has an exit status and is told in one line."""

    status = 1


class OptionError(DataError):
    """A value of an option that cannot be used."""

    status = 2


def fail(status: int, message: object) -> NoReturn:
    """Ends the program with this exit status and one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def prefix(problem: str) -> Iterator[None]:
    """Puts the problem before the message of a DataError, ours or a script's; it keeps its exit status."""
    try:
        yield
    except ValueError as error:
        if not hasattr(error, "status"):  # each script has a DataError of its own, with an exit status
            raise
        longer = DataError(f"{problem}: {error}")
        longer.status = error.status
        raise longer from error


@contextlib.contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the program with one line for a DataError, ours or a script's, and for Ctrl-C. Bugs keep their traceback."""
    try:
        yield
    except ValueError as error:
        if not hasattr(error, "status"):
            raise
        fail(error.status, error)
    except KeyboardInterrupt:
        fail(130, interrupted)


class Parser(argparse.ArgumentParser):
    """Describes a program by the first paragraph of its docstring, takes options in full only, and tells an error in
    one line with exit status 2."""

    def __init__(self, doc: str, **options: Any):
        super().__init__(**{"description": " ".join(doc.partition("\n\n")[0].split())} | options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(2, message)

    def require(self, rules: dict[str, Any]) -> None:
        """Ends the program with the first rule that is not kept."""
        for rule, kept in rules.items():
            if not kept:
                self.error(rule)

    def add_script(self) -> None:
        """Adds --script, for open_policy."""
        words = (
            "your own copy of a training script, if the policy comes from one (default: the scripts of this project)"
        )
        self.add_argument("--script", type=Path, metavar="FILE.py", help=words)


def load_script(path: Path) -> ModuleType:
    """A copied training script as a module, under a name that hides no other module. Raises OptionError."""
    if path.suffix != ".py" or not path.is_file():
        raise OptionError(f"--script {path} is not a Python file: give the path of your training script")
    name = f"--script {path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for the module of a class
        sys.path.append(str(path.resolve().parent))  # for files beside it; last, so that they hide no package
        try:
            spec.loader.exec_module(sys.modules[name])
        except SystemExit:
            why = 'it ends the program when it is imported: start it below `if __name__ == "__main__":`'
            raise OptionError(f"--script {path} is not a training script, since {why}") from None
    if missing := [x for x in INTERFACE if not callable(getattr(sys.modules[name], x, None))]:
        needed = "a training script has load_policy, load_dataset and evaluate"
        raise OptionError(f"--script {path} has no function {' or '.join(missing)}: {needed}")
    return sys.modules[name]


def open_policy(path: Path, script: Optional[Path] = None) -> tuple[ModuleType, Callable]:
    """The script that opens a policy.pt or checkpoint.pt, and policy(observations [B, O]) -> actions. Raises the
    DataError of this module or of the script."""
    if not path.is_file():
        raise DataError(f"{path} is a folder: name its policy.pt" if path.is_dir() else f"{path} does not exist")
    if script:
        module = load_script(script)
        with prefix(f"--script {script}"):
            return module, module.load_policy(path)
    for name in SCRIPTS:
        module = importlib.import_module(name)
        try:
            return module, module.load_policy(path)
        except module.DataError as error:
            reason = error
    cure = "if it comes from your own copy of a script, name the copy with --script"
    raise DataError(f"{path} is not a policy.pt or checkpoint.pt of this project's scripts; {cure} ({reason})")


def local_dataset(name: str) -> Optional[Path]:
    """The folder of a local dataset, where a name without a slash also stands for d4rl/<name>; None without one."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()
    names = [name] if "/" in name else [name, f"d4rl/{name}"]
    return next((root / x for x in names if (root / x).exists()), None)


def read_dataset(name: str, readers: Iterable[str] = READERS) -> dict[str, Any]:
    """Returns what load_dataset does, by the script that takes such data, in columns that it has checked. Raises
    DataError."""
    reasons = []
    for module in map(importlib.import_module, readers):
        try:
            data = module.load_dataset(name)
            module.check_dataset(data, SimpleNamespace(env=name, buffer_size=math.inf))
            return data
        except module.DataError as error:
            reasons.append(str(error))
    raise DataError(next((x for x in reasons if "this script takes" not in x), reasons[0]))  # that is the other's kind


def encoding_of(policy: Callable) -> Optional[dict[str, Any]]:
    """Names, categories, offsets and bounds of the columns that a policy was trained on, if its data were a table."""
    return getattr(policy, "encoding", None)


def check_encoding(path: Path, policy: Callable, env: str, encoding: Optional[dict[str, Any]]) -> None:
    """Raises DataError if a policy was trained on columns that differ from those of the dataset `env`."""
    importlib.import_module(SCRIPTS[0]).check_encoding(encoding_of(policy), encoding, f"{path} and --env {env}")


def refuse_masks(path: Path | str, policy: Callable) -> None:
    """Raises DataError if a policy was trained with masks: an environment does not say which actions are allowed."""
    if "masks" in (encoding_of(policy) or {}):
        raise DataError(f"{path} was trained with masks, which an environment does not know")


def check_actions(actions: Any, space: Any) -> None:
    """Raises DataError if the actions [B, ...] of a policy have another shape or kind of numbers than the space."""
    if actions.shape[1:] != space.shape or (actions.dtype.kind == "f") != (space.dtype.kind == "f"):
        kinds = [f"{x.dtype} of shape {shape}" for x, shape in ((actions, actions.shape[1:]), (space, space.shape))]
        raise DataError(f"the policy's actions are {kinds[0]}, the environment's {kinds[1]}")


def know_robotics(env_id: str) -> None:
    """Makes the environments of Gymnasium-Robotics known, if it is installed and the id is not one of Gymnasium's."""
    import gymnasium as gym

    if env_id not in gym.registry and importlib.util.find_spec("gymnasium_robotics"):
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice
            gym.register_envs(importlib.import_module("gymnasium_robotics"))


def know_games(env_id: str) -> None:
    """Makes the games of ale-py and of MinAtar known, if they are installed."""
    import gymnasium as gym

    if env_id in gym.registry:
        return
    if env_id.startswith("ALE/") and importlib.util.find_spec("ale_py"):
        ale_py = importlib.import_module("ale_py")
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # it greets on stderr
        gym.register_envs(ale_py)
    if env_id.startswith("MinAtar/") and importlib.util.find_spec("minatar"):
        logging.disable()  # it complains that it cannot draw
        importlib.import_module("minatar.gym").register_envs()
        logging.disable(logging.NOTSET)


def make_env(env_id: str, option: str = "--env", /, **arguments: Any) -> Any:
    """The Gymnasium environment that an option names; MODULE:ID imports the module first. Raises OptionError."""
    import gymnasium as gym

    gym.logger.min_level = gym.logger.ERROR  # an error is one line, without warnings above it
    try:
        know_games(env_id)
        know_robotics(env_id)
        with warnings.catch_warnings(action="ignore"):
            return gym.make(env_id, disable_env_checker=True, **arguments)
    except Exception as error:  # Gymnasium's own errors, a missing package, a simulator of another version
        cure = ""
        if isinstance(error, gym.error.UnregisteredEnv) and ":" not in env_id:
            cure = f" ({option} MODULE:{env_id} imports the module that registers it)"
        elif isinstance(error, ModuleNotFoundError) and ":" in env_id:
            cure = f" ({MODULE_PATH})"
        raise OptionError(f"{option} {env_id} cannot be used: {str(error) or repr(error)}{cure}") from error


def dataset_form(path: Path) -> Optional[str]:
    """The form of the dataset in a folder, "flat" or "Minari"; None if there is none. Raises DataError for both."""
    flat = any((path / name).exists() for name in ("metadata.json", "observations.npy"))
    minari = (path / "data").exists()
    if flat and minari:
        raise DataError(
            f"{path} holds two datasets, a flat one (metadata.json, *.npy) and a Minari one (data): move one"
        )
    return "flat" if flat else "Minari" if minari else None


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Stands around calls of Minari, h5py, numpy and json alone, which raise any of these for damaged files."""
    try:
        yield
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{name} cannot be read: {error!r}") from error


@contextlib.contextmanager
def staged(dataset_id: str, root: Path, force: bool) -> Iterator[Path]:
    """A folder beside a dataset's place in which to write it, moved there at the end: the dataset is whole or absent.
    force: replace one that is there. Raises OSError."""
    target = root / dataset_id
    staging, replaced = (target.with_name(f"{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        staging.mkdir(parents=True)
        yield staging
        if force and target.exists():
            target.rename(replaced)
        staging.rename(target)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for folder in (staging, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # namespaces that are still empty
            for folder in list(target.parents)[: len(Path(dataset_id).parts) - 1]:
                folder.rmdir()


def write_array(path: Path, values: Any) -> None:
    """An array as a .npy file. Raises OSError."""
    import numpy as np

    values = np.ascontiguousarray(values)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(values.data)  # np.save does not say that a disk is full
        sync(file)


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """The last file of a dataset, metadata.json; what is None is left out. Raises OSError."""
    with open(folder / "metadata.json", "w", encoding="utf-8") as file:
        file.write(as_json({key: value for key, value in metadata.items() if value is not None}))
        sync(file)


def as_json(value: Any) -> str:
    """The text of metadata. Raises ValueError for what JSON does not have, such as a function."""
    import numpy as np

    return json.dumps(value, indent=1, ensure_ascii=False, default=lambda x: np.asarray(x).tolist())


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class D4RL(NamedTuple):
    """A row of d4rl.csv: a dataset of D4RL."""

    domain: str
    file: str  # below D4RL's address, without .hdf5
    environment: str  # the one of Gymnasium that has the same observations; "" if there is none
    max_episode_steps: int  # of D4RL's longest episodes
    scores: Optional[tuple[float, float]]  # returns that score 0 and 100


@functools.cache
def d4rl() -> dict[str, D4RL]:
    """The datasets of D4RL by name. Walker2d-v4 and Ant-v4 stand there because v5 changed the friction of a foot, and
    the observations. Gymnasium-Robotics' mazes have other coordinates than D4RL's, its kitchen other observations."""
    found = {}
    with open(Path(__file__).with_name("d4rl.csv"), newline="") as file:
        for row in csv.DictReader(file):
            scores = (float(row["ref_min_score"]), float(row["ref_max_score"])) if row["ref_min_score"] else None
            steps = int(row["max_episode_steps"])
            found[row["name"]] = D4RL(row["domain"], row["file"], row["environment"], steps, scores)
    return found


def reference_scores(env_id: str) -> Optional[tuple[float, float]]:
    """Returns that score 0 and 100 in a Gymnasium environment, of any version: LunarLander, and those of D4RL."""

    def task(name: str) -> str:
        return name.rsplit("-v", 1)[0]

    known = {task(dataset.environment): dataset.scores for dataset in d4rl().values() if dataset.environment}
    return (LUNAR_LANDER | known).get(task(env_id))
