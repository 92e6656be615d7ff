"""benchmarks/studies/gradient_noise.py against all possible draws of a tiny problem, one by one."""

import csv
import itertools
import sys

import numpy as np
import pytest
import torch
from conftest import continuous

from algorithms.offline import cql
from benchmarks.studies import gradient_noise


def tiny_problem(n_batches=4, batch_size=2, n_proposals=3):
    """An agent with two critics, minibatches, and for each a TD target and proposals with their log-densities."""
    torch.manual_seed(0)
    config = cql.TrainConfig(device="cpu", hidden_dim=4, q_n_hidden_layers=1, policy_n_hidden_layers=1, cql_alpha=3.0)
    agent = cql.CQL(config, 2, 1)
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter.copy_(torch.randn_like(parameter))
    n = batch_size
    batches = [
        cql.Batch(torch.randn(n, 2), torch.rand(n, 1), torch.randn(n), torch.randn(n, 2), torch.zeros(n))
        for _ in range(n_batches)
    ]
    proposed = [(torch.randn(n), torch.rand(n, n_proposals, 1) * 2 - 1, torch.randn(n, n_proposals)) for _ in batches]
    return agent, batches, proposed


def every_draw(agent, batch, td_target, proposals, log_prob):
    """The gradient [P] of each of the outcomes of drawing one action per state and critic, and their probabilities."""
    parameters = agent.parameter_groups["critic"]
    q_data = agent.critic(batch.observations, batch.actions.unsqueeze(1))[..., 0]  # [E, B]
    q = agent.critic(batch.observations, proposals)  # [E, B, N]
    probabilities, outcomes = (q - log_prob).softmax(dim=-1).detach().flatten(0, 1), []
    for draw in itertools.product(range(q.shape[-1]), repeat=len(probabilities)):
        drawn = q.flatten(0, 1)[range(len(draw)), draw].view_as(q_data)
        loss = ((q_data - td_target) ** 2 + agent.config.cql_alpha * (drawn - q_data)).mean(dim=1).sum()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        chance = np.prod([float(probabilities[i, j]) for i, j in enumerate(draw)])
        outcomes.append((torch.cat([x.flatten() for x in gradients]).double().numpy(), chance))
    return map(np.array, zip(*outcomes))


def test_variances_are_those_of_all_draws_one_by_one(monkeypatch):
    agent, batches, proposed = tiny_problem()
    exact, added = [], []
    for batch, given in zip(batches, proposed):
        gradients, chances = every_draw(agent, batch, *given)
        assert chances.sum() == pytest.approx(1)
        exact.append(chances @ gradients)
        added.append(chances @ ((gradients - exact[-1]) ** 2).sum(axis=1))
    remaining = iter(proposed)
    monkeypatch.setattr(agent, "td_target_and_proposals", lambda *_: next(remaining))
    terms, measured = gradient_noise.measure(agent, batches, draws=75)
    assert terms.mean().item() == pytest.approx(np.var(exact, axis=0, ddof=1).sum(), rel=1e-4)
    assert len(terms) == len(measured[1]) == 4
    for k, values in measured.items():
        assert values.numpy() == pytest.approx(np.array(added) / k, rel=0.3)
        assert values.mean().item() == pytest.approx(np.mean(added) / k, rel=0.15)


@continuous
def test_a_row_for_each_checkpoint(run, tmp_path, monkeypatch, capsys):
    folders, output = [run(max_timesteps=n, run_id=f"{n}") for n in (2, 4)], tmp_path / "noise.csv"
    command = ["gradient_noise.py", "--batches=3", "--draws=2", f"--output={output}", "--checkpoints"]
    monkeypatch.setattr(sys, "argv", command + [str(folder / "checkpoint.pt") for folder in folders])
    for _ in range(2):
        gradient_noise.main()
    with open(output, newline="") as file:
        first, second, *again = csv.DictReader(file)
    assert (first["updates"], second["updates"]) == ("2", "4") and again == [first, second]
    assert first["batch_size"] == "32" and float(first["share_1"]) > 0 < float(first["minibatch_variance"])
    monkeypatch.setattr(sys, "argv", command + [str(folders[0] / "policy.pt")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        gradient_noise.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 1 and "without critics" in printed and printed.count("\n") == 1
