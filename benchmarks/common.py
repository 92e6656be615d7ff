"""What the programs of this folder share; importing it makes `algorithms` and `benchmarks` importable from any folder."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn, Optional

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SCRIPTS = (
    "algorithms.discrete.cql_dqn",
    "algorithms.offline.cql",
)  # between them they open the policies of all scripts
INTERFACE = ("load_policy", "load_dataset", "evaluate")  # all that programs use of a script whose policy they open


class DataError(ValueError):
    """Data or files that cannot be used. Like the scripts' own DataError it is told in one line."""

    status = 1


def fail(status: int, message: object) -> NoReturn:
    """Ends the program with this exit status and one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the program with one line for a DataError, here or of any script, and for Ctrl-C. Bugs keep their
    traceback."""
    try:
        yield
    except ValueError as error:
        if not hasattr(error, "status"):  # each script has a DataError of its own, with its exit status
            raise
        fail(error.status, error)
    except KeyboardInterrupt:
        fail(130, interrupted)


class Parser(argparse.ArgumentParser):
    """Describes a program by the first paragraph of its docstring, takes options in full only, and tells an error in
    one line with exit status 2."""

    def __init__(self, doc: str, **options):
        super().__init__(**{"description": " ".join(doc.partition("\n\n")[0].split())} | options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(2, message)

    def require(self, rules: dict[str, bool]) -> None:
        """Ends the program with the first rule that is not kept."""
        for rule, kept in rules.items():
            if not kept:
                self.error(rule)

    def add_script(self) -> None:
        """Adds --script, for open_policy."""
        text = "your own copy of a training script, where the policy comes from one (default: the scripts here)"
        self.add_argument("--script", type=Path, metavar="FILE.py", help=text)


def load_script(path: Path) -> ModuleType:
    """A copied training script as a module, under a name that hides no other module. Raises DataError."""
    if path.suffix != ".py" or not path.is_file():
        raise DataError(f"--script {path} is not a Python file: give the path of your training script")
    spec = importlib.util.spec_from_file_location(f"--script {path.resolve()}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of a class
    spec.loader.exec_module(module)
    if missing := [name for name in INTERFACE if not callable(getattr(module, name, None))]:
        raise DataError(f"--script {path} is not a training script: it has no function {' or '.join(missing)}")
    return module


def open_policy(path: Path, script: Optional[Path] = None) -> tuple[ModuleType, Callable[[np.ndarray], np.ndarray]]:
    """The script that opens a policy.pt or checkpoint.pt, and policy(observations [B, O]) -> actions. Raises a
    DataError."""
    if script:
        module = load_script(script)
        return module, module.load_policy(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    for name in SCRIPTS:
        module = importlib.import_module(name)
        try:
            return module, module.load_policy(path)
        except module.DataError as error:
            reason = error
    cure = "--script names your own script, if the policy comes from one"
    raise DataError(f"{path} is not a policy.pt or checkpoint.pt of the scripts here; {cure} ({reason})")
