"""load_policy for a policy.pt or checkpoint.pt of any script."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algorithms.discrete import cql_dqn
from algorithms.offline import cql

DataErrors = (cql.DataError, cql_dqn.DataError)


def load_policy(path: Path | str, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """policy(observation) -> action, a method of the script's network. Raises the DataError of offline/cql.py."""
    try:
        return cql_dqn.load_policy(path, device)
    except cql_dqn.DataError:
        return cql.load_policy(path, device)
