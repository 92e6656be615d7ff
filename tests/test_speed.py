"""benchmarks/speed.py on a tiny job; what it measures is not tested, only that it measures."""

import csv
import sys

import pytest

from benchmarks import speed

TINY = ["--observation=3", "--action=2", "--batch=8", "--layers=1", "--actions=2", "--windows=1", "--seconds=0.05"]


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    def measure(*arguments):
        path = tmp_path / "speed.csv"
        monkeypatch.setattr(sys, "argv", ["speed.py", *TINY, "--device=cpu", f"--output={path}", *arguments])
        speed.main()
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    return measure


def test_a_row_for_each_variant(measure):
    first, second = measure("--variants", "-", "precision=bfloat16,cql_backprop_actions=1")
    assert [row["variant"] for row in (first, second)] == ["-", "precision=bfloat16,cql_backprop_actions=1"]
    assert first["ratio"] == "1.0" and first["threads"] == second["threads"] and float(first["updates_per_second"]) > 0
    assert float(second["gflop_per_update"]) > 0 or first["gflop_per_update"] == second["gflop_per_update"] == "0.0"
    assert all(float(row["utilisation"]) >= 0 and float(row["matmul_gflop_per_second"]) > 0 for row in (first, second))


def test_operations_are_those_of_the_products():
    sizes = {"observation": 17, "action": 6, "batch": 256, "layers": 3, "actions": 10}
    job = type("Job", (), sizes | {"script": "offline/cql", "device": "cpu"})
    operations = [speed.prepare_script(job, variant)[1] for variant in ("-", "cql_backprop_actions=2")]
    assert operations[0] == pytest.approx(13.72e9, rel=0.01) and operations[1] < 0.5 * operations[0]


def test_operations_of_the_discrete_script_are_those_of_the_products():
    """Forward and backward passes, and those of both networks on the next observations."""
    sizes = {"observation": 8, "action": 4, "batch": 64, "layers": 2, "actions": 10}
    job = type("Job", (), sizes | {"script": "discrete/cql_dqn", "device": "cpu"})
    operations = speed.prepare_script(job, "-")[1]
    network = 2 * 64 * (8 * 256 + 256 * 256 + 256 * 4)
    assert operations == pytest.approx(5 * network, rel=0.05)


def test_loading_is_measured(measure):
    (row,) = measure("--load=20000")
    assert row["variant"].startswith("loading 20000 transitions") and float(row["ratio"]) > 0


@pytest.mark.parametrize(
    "bad", [["--variants=sped=1"], ["--variants=precision=half"], ["--peer=/nowhere"], ["--no_such"]]
)
def test_bad_arguments_are_refused(bad, measure, capsys):
    with pytest.raises(SystemExit) as stop:
        measure(*bad)
    assert stop.value.code == 2 and bad[0].split("=")[-1].strip("-") in capsys.readouterr().err
