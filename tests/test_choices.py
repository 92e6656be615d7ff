"""benchmarks/studies/choices.py: correlations and regrets against numbers made by hand, and rows of real runs."""

import math

import pandas as pd
import pytest
from conftest import once, table

from benchmarks import fqe
from benchmarks.studies import choices


@pytest.fixture
def rows():
    """Two runs of one sweep, of two policies each."""
    columns = {"run": list("aabb"), "seed": [1, 1, 1, 1], "return": [10.0, 40.0, 30.0, 20.0]}
    columns |= {"discounted_return": [1.0, 3.0, 4.0, 2.0], "fqe": [1.0, 2.0, 3.0, 0.0], "promise": [4.0, 1.0, 2.0, 3.0]}
    columns |= {"diagnose": [1, 0, 1, 0], "diagnose_alpha": [0, 0, 1, 1], "last": [0, 1, 0, 1]}
    return pd.DataFrame(columns | {"fqe_off_data": [0.1, 0.2, 0.3, 0.4]})


def test_regrets(rows):
    assert choices.regrets(rows.assign(near=-rows["fqe_off_data"])) == {
        "fqe": 10,
        "promise": 30,
        "near": 30,
        "diagnose": 10,
        "last": 10,
        "any": 15,
    }
    assert choices.regrets(rows[:2].assign(near=[1, 2])) == {
        "fqe": 0,
        "promise": 30,
        "near": 0,
        "diagnose": 30,
        "last": 0,
        "any": 15,
    }
    assert math.isnan(choices.regrets(rows.assign(diagnose_alpha=0, near=0))["diagnose"])


def test_correlations_and_table(rows, tmp_path, capsys):
    assert choices.spearman(rows["fqe"], rows["fqe"] ** 3) == pytest.approx(1)
    assert choices.spearman(rows["fqe"], rows["return"]) == pytest.approx(0.6)  # 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1))
    rows.assign(fqe_rank=[None, 2, 1, 3]).to_csv(tmp_path / "rows.csv", index=False)
    choices.main([str(tmp_path / "rows.csv")])
    printed = capsys.readouterr().out
    assert "4 policies of 2 runs; the best returns 40.0" in printed
    assert "| in all runs of a seed (1) | 10.0 (worst 10.0) | 30.0 (worst 30.0) | 30.0 (worst 30.0) | 10.0" in printed
    cells = ("0.0 (worst 0.0)", "20.0 (worst 30.0)", "15.0 (worst 30.0)", "15.0 (worst 30.0)", "5.0 (worst 10.0)")
    assert f"| in one run (2) | {' | '.join(cells)} |" in printed
    assert printed.endswith("| 1 | 4 | 0.60 | 10.0 | 3 | 0.50 | 10.0 |\n"), printed


@once
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # its returns are all the same
def test_rows_of_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(run(keep_policies=True, run_id=f"alpha-{alpha}", cql_alpha=alpha)) for alpha in (1, 5)]
    fqe.main([*folders, "--env=toy/counter-v0", "--updates=5", "--seeds=1", "--device=cpu", "--output=fqe.csv"])
    choices.main([*folders, "--fqe=fqe.csv", "--output=rows.csv"])
    rows = pd.read_csv("rows.csv")
    assert list(rows["step"]) == [10, 20, 25] * 2 and list(rows["cql_alpha"]) == [1] * 3 + [5] * 3
    estimates = pd.read_csv("fqe.csv").set_index("policy")["estimate"]
    assert rows["fqe"][4] == estimates[f"{folders[1]}/policy-20.pt"]
    assert rows["return"].to_numpy() == pytest.approx(float(table(folders[0])[0]["eval_return"]))  # whatever the policy
    assert list(rows["last"]) == [0, 0, 1] * 2 and rows.groupby("run")["diagnose"].sum().eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs/a"], 2, ["--fqe"]),
        (["missing.csv"], 1, ["missing.csv"]),
        (["empty.csv"], 1, ["empty.csv"]),
        (["other.csv"], 1, ["other.csv", "fqe_off_data"]),
        (["runs/a", "--fqe=other.csv", "--output=new.csv"], 1, ["runs/a", "no such file"]),
    ],
)
def test_user_errors_are_one_line(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("policy,step\nx,1\n")
    with pytest.raises(SystemExit) as stop:
        choices.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == code and printed.out == "" and printed.err.count("\n") == 1
    assert all(word in printed.err for word in words), printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.csv", "other.csv"]
