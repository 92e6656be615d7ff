"""benchmarks/importance.py: obp's numbers, exact values of short episodes, and bad input."""

import itertools

import numpy as np
import pytest

from benchmarks import importance


def bandit_log(n=12_000, n_actions=5):
    """A logger and clicks that depend on the state, another policy, and a noisy model of the clicks."""
    rng, rows = np.random.RandomState(7), np.arange(n)
    x = rng.normal(size=(n, 3))
    p = np.exp(x @ rng.normal(size=(3, n_actions)))
    p /= p.sum(axis=1, keepdims=True)
    actions = (p.cumsum(axis=1) > rng.random_sample((n, 1))).argmax(axis=1)
    q = 1 / (1 + np.exp(1 - x @ rng.normal(size=(3, n_actions))))
    rewards = (rng.random_sample(n) < q[rows, actions]).astype(float)
    model = np.clip(q + rng.normal(scale=0.1, size=q.shape), 0, 1)
    chosen = (x @ rng.normal(size=(3, n_actions))).argmax(axis=1)
    return rewards, p[rows, actions], chosen == actions, model[rows, chosen], model[rows, actions]


# By obp 0.4.1 (pip install obp==0.4.1; numpy 2.4.6), with action_dist one-hot in `chosen`: estimate_policy_value(...),
# and estimate_interval(..., n_bootstrap_samples=10000, random_state=3), of InverseProbabilityWeighting,
# SelfNormalizedInverseProbabilityWeighting and DoublyRobust (estimated_rewards_by_reg_model=model) on the log above.
OBP = {
    "ips": (0.3788891078666796, 0.31596252964613397, 0.45507659405893175),
    "snips": (0.422636362863136, 0.35244416257451733, 0.5076206007085506),
    "dr": (0.4267695127832432, 0.3892480426700425, 0.46400382953112396),
}


# By obp 0.5.5 (its repository; obp 0.4.1 has no clip) in the same way, with lambda_=8 and n_bootstrap_samples=2000.
CLIPPED = {
    "ips": (0.24413750740819032, 0.22340796377534156, 0.2641866686000767),
    "snips": (0.422636362863136, 0.3524419752331217, 0.5106270013591457),
    "dr": (0.43799837326423313, 0.42343632988766067, 0.4522829362558697),
}


def test_values_and_intervals_are_obps():
    found = importance.estimate(*bandit_log(), seed=3)
    for name, values in OBP.items():
        assert found[name] == pytest.approx(values, abs=1e-9), name
    assert found["agreeing"] == bandit_log()[2].sum() and found["clipped"] == 0
    found = importance.estimate(*bandit_log(), seed=3, n_resamples=2000, clip=8.0)
    for name, values in CLIPPED.items():
        assert found[name] == pytest.approx(values, abs=1e-9), name
    assert found["clipped"] == (bandit_log()[2] & (bandit_log()[1] < 1 / 8)).sum()


def test_intervals_do_not_depend_on_how_many_samples_there_are():
    samples = np.random.default_rng(0).normal(size=(3, 500))
    together = importance.intervals(samples, 1, 200)
    assert together.shape == (3, 2)
    np.testing.assert_allclose(together[1:], importance.intervals(samples[1:], 1, 200))
    assert not np.allclose(together, importance.intervals(samples, 2, 200))


def test_weights_are_clipped_in_ips_and_dr():
    """As in obp, which normalises the weights themselves otherwise."""
    rewards, propensities, agrees = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.5, 0.1, 0.5, 1.0]), [1, 1, 0, 1]
    q_policy, q_data = np.array([1.0, 1.0, 3.0, 3.0]), np.array([1.0, 1.0, 2.0, 3.0])
    found = importance.episode_samples(rewards, propensities, agrees, q_policy, q_data, clip=4.0)
    np.testing.assert_allclose(found.ips, [2, 8, 0, 8])
    np.testing.assert_allclose(found.dr, [1, 5, 3, 8])
    np.testing.assert_allclose(found.snips, np.array([2, 20, 0, 8]) / (13 / 4))
    assert (found.agreeing, found.rewarded, found.clipped) == (3, 3, 1)
    assert found.mean_weight == pytest.approx(13 / 4) and found.effective == pytest.approx(13**2 / 105)


def test_episodes_of_several_steps_have_exact_values():
    """All sequences of two actions, each once, are what a logger that tosses a coin does; rewards depend on both. The
    policy takes 1, then 0."""
    gamma, first, second = 0.5, {0: 1.0, 1: 3.0}, {(0, 0): 5.0, (0, 1): 7.0, (1, 0): 11.0, (1, 1): 13.0}
    rows = [[(a, first[a], a == 1, 0), (b, second[a, b], b == 0, 1)] for a, b in itertools.product((0, 1), repeat=2)]
    _, rewards, agrees, ends = map(np.array, zip(*itertools.chain(*rows)))
    model = np.random.default_rng(0).normal(size=(2, len(rewards)))
    model[0, 1::2] = np.repeat(model[0, [1, 5]], 2)  # a value of the policy depends on the state alone
    model[0, ::2] = model[0, 0]
    model[1] = np.where(agrees, model[0], model[1])
    found = importance.episode_samples(
        rewards, np.full(8, 0.5), agrees, *model, terminals=ends, timeouts=0 * ends, discount=gamma
    )
    for name in ("ips", "snips", "dr"):
        assert getattr(found, name).mean() == pytest.approx(3 + gamma * 11), name
    assert found.effective == pytest.approx(1)
    # A time-out hands over to the model, whatever was done: the value of the policy in the last state.
    cut = importance.episode_samples(
        rewards, np.full(8, 0.5), agrees, *model, terminals=0 * ends, timeouts=ends, discount=gamma
    )
    for name in ("ips", "snips", "dr"):
        assert getattr(cut, name).mean() == pytest.approx(3 + gamma * model[0, 5]), name
    assert cut.effective == pytest.approx(2)  # the episodes that begin with 1
    with pytest.raises(importance.DataError, match="need a model"):
        importance.episode_samples(rewards, np.full(8, 0.5), agrees, terminals=0 * ends, timeouts=ends)


def test_what_cannot_be_known_is_nan():
    none = importance.estimate(np.ones(50), np.full(50, 0.1), np.zeros(50, bool), n_resamples=20)
    assert none["ips"] == (0, 0, 0) and np.isnan(none["snips"]).all() and np.isnan(none["dr"]).all()
    assert none["agreeing"] == none["effective"] == none["mean_weight"] == 0
    assert none["mean_weight_error"] == pytest.approx(np.sqrt(9 / 50))  # a weight of 10 in one row of ten


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, np.nan, np.inf])
def test_propensities_that_cannot_be(wrong):
    with pytest.raises(importance.DataError, match="1 of 3 are not above 0"):
        importance.estimate(np.ones(3), np.array([0.5, wrong, 0.5]), np.ones(3, bool))
    with pytest.raises(importance.DataError, match="each row needs one"):
        importance.estimate(np.ones(3), np.full(2, 0.5), np.ones(3, bool))


def test_what_follows_does_not_count_with_discount_0():
    """So steps that end by a time-out are like those that end in a terminal state."""
    rng, n = np.random.default_rng(0), 50
    known = rng.normal(size=n), rng.uniform(0.1, 1, n), rng.random(n) < 0.5, rng.normal(size=n), rng.normal(size=n)
    ends = [np.ones(n, bool), np.zeros(n, bool)]
    found = [importance.episode_samples(*known, *pair, discount=0.0) for pair in (ends, ends[::-1])]
    for first, second in zip(*found):
        assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "options", [{"terminals": np.array([0, 1, 0])}, {"terminals": np.zeros(3)}, {"clip": -1.0}, {"clip": np.nan}]
)
def test_rows_without_an_end_and_clips_that_are_none_are_refused(options):
    with pytest.raises(importance.DataError, match="must"):
        importance.episode_samples(np.ones(3), np.full(3, 0.5), np.ones(3), **options)
