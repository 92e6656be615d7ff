"""benchmarks/fqe.py: exact values of small tabular problems, rankings, runs of every script, and bad input."""

import csv
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import yaml
from conftest import DATASET, contents, offline, once, record

from algorithms.discrete import cql_dqn
from algorithms.offline import cql
from benchmarks import fqe

DISCOUNT = 0.8


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Networks and targets that learn tiny problems in seconds."""
    for name, value in {"HIDDEN_SIZES": (32, 1), "BATCH_SIZE": 64, "LEARNING_RATE": 3e-3, "TARGET_RATE": 0.1}.items():
        monkeypatch.setattr(fqe, name, value)
    monkeypatch.chdir(tmp_path)


class Table:
    """Deterministic: action 1 goes round a ring of three states, action 0 stays; with `terminal`, going on from state 2
    ends the episode. Episodes are cut after four steps."""

    rewards = np.array([[0.0, 1.0], [0.5, -1.0], [2.0, 3.0]])  # [state, action]

    def __init__(self, terminal, continuous):
        self.terminal, self.codes = terminal, np.array([[-1.0], [1.0]]) if continuous else np.eye(2, dtype=bool)

    def data(self, n_episodes=150):
        """Random actions, from random states."""
        rng, rows = np.random.default_rng(0), []
        for _ in range(n_episodes):
            state = rng.integers(3)
            for t in range(4):
                action = rng.integers(2)
                following, end = (state + action) % 3, self.terminal and state == 2 and action == 1
                rows.append((state, action, self.rewards[state, action], following, end, t == 3 and not end))
                state = following
                if end:
                    break
        self.states, self.actions, rewards, self.following, ends, timeouts = map(np.array, zip(*rows))
        data = {"observations": np.eye(3)[self.states], "next_observations": np.eye(3)[self.following]}
        data |= {"actions": self.codes[self.actions], "rewards": rewards, "terminals": ends, "timeouts": timeouts}
        self.first = np.flatnonzero(np.append(True, (ends | timeouts)[:-1]))
        return data

    def exact(self, policy):
        """Q [state, action] of a policy [state] -> action, by the linear system."""
        system, rewards = np.eye(6), self.rewards.ravel()
        for state in range(3):
            for action in range(2):
                following = (state + action) % 3
                if not (self.terminal and state == 2 and action == 1):
                    system[2 * state + action, 2 * following + policy[following]] -= DISCOUNT
        return np.linalg.solve(system, rewards).reshape(3, 2)

    def exact_behaviour(self, data):
        """Q [state, action] of the data's own next actions, over the transitions where these are known."""
        system, rewards, counts = np.zeros((6, 6)), np.zeros(6), np.zeros(6)
        pairs = 2 * self.states + self.actions
        for t in np.flatnonzero(~data["timeouts"]):
            counts[pairs[t]] += 1
            rewards[pairs[t]] += data["rewards"][t]
            if not data["terminals"][t]:
                system[pairs[t], pairs[t + 1]] -= DISCOUNT
        return np.linalg.solve(system + np.diag(counts), rewards).reshape(3, 2)

    def chosen(self, policies):
        """Codes of the policies' actions in all next states and at all starts."""
        policies = np.array(policies)
        return self.codes[policies[:, self.following]], self.codes[policies[:, self.states[self.first]]]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("continuous", [True, False])
def test_exact_values(terminal, continuous):
    table = Table(terminal, continuous)
    data, policies = table.data(), [(1, 1, 1), (0, 0, 0), (1, 1, 0)]
    values, bounded, returns = fqe.evaluate(data, *table.chosen(policies), DISCOUNT, 1000, 2)
    starts = table.states[table.first]
    assert values.shape == (4, 2, len(starts)) and bounded.shape == (4,) and returns.shape == starts.shape
    for policy, found in zip(policies, values):
        expected = table.exact(policy)[starts, np.array(policy)[starts]]
        np.testing.assert_allclose(found, np.stack([expected] * 2), atol=0.05)
    expected = table.exact_behaviour(data)
    np.testing.assert_allclose(values[3], np.stack([expected[starts, table.actions[table.first]]] * 2), atol=0.1)
    assert abs(returns.mean() - values[3].mean()) < 0.1 * returns.std() and bounded.max() < 0.1
    # Returns that a time-out cuts would be lower by a third.
    for i in range(len(starts)):
        stop = table.first[i + 1] if i + 1 < len(starts) else len(table.states)
        steps = np.arange(table.first[i], stop)
        amounts = data["rewards"][steps].copy()
        if data["timeouts"][steps[-1]]:
            amounts[-1] = expected[table.states[steps[-1]], table.actions[steps[-1]]]
        np.testing.assert_allclose(returns[i], DISCOUNT ** np.arange(len(steps)) @ amounts, atol=0.1)
