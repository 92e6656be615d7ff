"""Values of a policy from logged actions and the probabilities (propensities) with which the logger chose them.

    import sys
    sys.path.insert(0, "benchmarks")
    from importance import estimate

    found = estimate(rewards, propensities, policy_actions == logged_actions)
    print(found["ips"])  # (value, lower end, upper end of the 95 % interval)

The policy is deterministic. A row's weight is 1 / propensity where the policy would have done the same, else 0. For
episodes of one step, values and 95 % intervals are those of obp's estimators InverseProbabilityWeighting,
SelfNormalizedInverseProbabilityWeighting and DoublyRobust, given the same seed and number of resamples. Longer episodes
use per-decision importance sampling, its self-normalised form, and the recursion of Jiang and Li (2016),
arxiv.org/abs/1511.03722.
"""

import math
from typing import NamedTuple, Optional

import numpy as np
from common import DataError
from tqdm import tqdm

# Shapes: T rows, N episodes, K sets of samples.


class Samples(NamedTuple):
    """One policy's value of each episode by each estimator, whose means are the estimates, and what they rest on."""

    ips: np.ndarray  # [N], inverse propensities
    snips: np.ndarray  # [N], self-normalised; NaN if no row agrees
    dr: np.ndarray  # [N], doubly robust; NaN without a model
    agreeing: int  # rows in which the policy does what was logged
    rewarded: int  # of these, rows with another reward than 0
    clipped: int  # and rows whose weight was clipped
    effective: float  # effective sample size of the episodes' weights
    mean_weight: float  # mean of the rows' weights before clipping, 1 up to chance if the propensities are right
    mean_weight_error: float  # its standard error


def check_propensities(propensities: np.ndarray, n: int) -> np.ndarray:
    """Returns them as float64 [n]. Raises DataError if there are not n of them, each above 0 and at most 1."""
    found = np.asarray(propensities, np.float64)
    if found.shape != (n,):
        raise DataError(f"propensities have shape {list(found.shape)}, with {n} rows: each row needs one")
    if (wrong := ~((found > 0) & (found <= 1))).any():
        where = f"{wrong.sum():,} of {n:,} are not above 0 and at most 1, first {found[wrong][0]:g} in row"
        raise DataError(f"propensities: {where} {np.flatnonzero(wrong)[0]}; drop the rows in which they are unknown")
    return found


def episode_samples(
    rewards: np.ndarray, propensities: np.ndarray, agrees: np.ndarray, q_policy: Optional[np.ndarray] = None,
    q_data: Optional[np.ndarray] = None, terminals: Optional[np.ndarray] = None,
    timeouts: Optional[np.ndarray] = None, discount: float = 1.0, clip: float = math.inf,
) -> Samples:  # fmt: skip
    """Arrays are [T], episode after episode. agrees: whether the policy would have done the same. q_policy and q_data:
    a model's value of the policy's and the logged action, fitted on other rows. terminals and timeouts mark the last
    rows of episodes; without both, each row is an episode. clip: the largest weight of a row, in ips and dr, as in obp.

    In the last row before a time-out the model's value stands for all that follows, so such data need a model.
    Raises DataError.
    """
    rewards, agrees, n = np.asarray(rewards, np.float64), np.asarray(agrees, bool), len(rewards)
    propensities = check_propensities(propensities, n)
    weights = agrees / propensities
    has_model = q_policy is not None
    q_policy, q_data = (np.asarray(x, np.float64) if has_model else np.full(n, np.nan) for x in (q_policy, q_data))
    cut = np.zeros(n, bool) if timeouts is None else np.asarray(timeouts, bool)
    ends = np.ones(n, bool) if terminals is None and timeouts is None else cut
    if terminals is not None:
        ends, cut = np.asarray(terminals, bool) | cut, cut & ~np.asarray(terminals, bool)
    cut = cut & (discount > 0)  # else nothing that follows counts
    if not clip > 0:
        raise DataError(f"clip is {clip}: it must be above 0")
    if not n or not ends[-1]:
        raise DataError("the last row must end an episode, by a terminal state or a time-out")
    if cut.any() and not has_model:
        raise DataError("episodes that end by a time-out need a model's values of the last states")
    rewarded = int((agrees & (rewards != 0)).sum())
    mean, variance = weights.mean(), weights.var()
    if not agrees.any():  # by chance or not: as of a policy whose actions are as rare as the logged ones
        variance = np.mean(1 / propensities) - 1
    clipped = np.minimum(weights, clip)
    n_clipped = int((clipped < weights).sum())
    # At a time-out the value takes the place of the reward, whatever was done.
    rewards, q_data = np.where(cut, q_policy, rewards), np.where(cut, q_policy, q_data)
    clipped, weights = np.where(cut, 1.0, clipped), np.where(cut, 1.0, weights)
    last = np.flatnonzero(ends)
    first = np.append(0, last[:-1] + 1)
    lengths = last - first + 1
    ips, dr, snips, product = (np.full(len(last), x) for x in (0.0, 0.0, 0.0, 1.0))
    for t in reversed(range(lengths.max())):
        alive = lengths > t
        rows = first[alive] + t
        ips[alive] = clipped[rows] * (rewards[rows] + discount * ips[alive])
        dr[alive] = q_policy[rows] + clipped[rows] * (rewards[rows] + discount * dr[alive] - q_data[rows])
    for t in range(lengths.max()):
        alive = lengths > t
        rows = first[alive] + t
        product[alive] *= weights[rows]
        with np.errstate(invalid="ignore"):
            snips[alive] += discount**t * product[alive] * rewards[rows] / product.mean()
    effective = product.sum() ** 2 / np.square(product).sum() if product.any() else 0.0
    return Samples(ips, snips, dr, int(agrees.sum()), rewarded, n_clipped, effective, mean, (variance / n) ** 0.5)


def intervals(samples: np.ndarray, seed: int = 0, n_resamples: int = 10_000) -> np.ndarray:
    """95 % bootstrap intervals of the means: [K, N] -> [K, 2]. The resamples are those that obp draws for this seed,
    the same ones for all K."""
    samples, n, means = np.asarray(samples, np.float64), np.shape(samples)[1], []
    rng, size = np.random.RandomState(seed), max(1, 1_000_000 // n)
    for start in tqdm(range(0, n_resamples, size), "resampling", disable=None if n * n_resamples > 1e8 else True):
        drawn = [rng.randint(0, n, n) for _ in range(min(size, n_resamples - start))]
        counts = np.stack([np.bincount(rows, minlength=n) for rows in drawn])
        means.append(counts @ samples.T / n)
    return np.quantile(np.concatenate(means), [0.025, 0.975], axis=0).T


def estimate(*arrays: np.ndarray, seed: int = 0, n_resamples: int = 10_000, **options) -> dict[str, tuple]:
    """Returns {"ips": (value, low, high), "snips": ..., "dr": ...} of one policy, and {"agreeing": ...} and so on as
    numbers. Arguments: those of episode_samples. Raises DataError."""
    found = episode_samples(*arrays, **options)._asdict()
    names = ["ips", "snips", "dr"]
    ends = intervals(np.stack([found[name] for name in names]), seed, n_resamples)
    values = {name: (float(found[name].mean()), float(low), float(high)) for name, (low, high) in zip(names, ends)}
    return found | values
