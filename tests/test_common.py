"""benchmarks/common.py: the policy of a copied script with another network, in every program that opens policies."""

import sys
from pathlib import Path

import common
import numpy as np
import pytest
from conftest import DATASET, METHODS, once, suited, table

from benchmarks import collect, export, fqe, record

LAYERS = ("(layer, nn.ReLU())", "(layer, activation)")
OTHER_LAYERS = "(layer, nn.LayerNorm(layer.out_features), nn.ReLU(), nn.Dropout(0.5))"
COPIED = ("offline.cql", "offline.policy_constraint", "finetune.cql", "discrete.cql_dqn")
copied = pytest.mark.parametrize("script", [f"algorithms.{x}" for x in COPIED], indirect=True)


@pytest.fixture
def copy(script, new_dataset, tmp_path, monkeypatch):
    """A copy with layer norm and dropout, under the name of one of Python's own modules, with a policy in runs/run."""
    monkeypatch.chdir(tmp_path)
    text, path = Path(script.__file__).read_text(), Path("my copies/random.py")
    (layers,) = (x for x in LAYERS if x in text)
    path.parent.mkdir()
    path.write_text(text.replace(layers, OTHER_LAYERS))
    module = common.load_script(path)
    method = METHODS["BCQ"] if "constraint" in script.__name__ else {}
    module.train(module.TrainConfig(**suited(script, checkpoints_path="runs", n_episodes=5, **method)))
    return path


@copied
def test_every_program_opens_the_policy_of_a_copy(copy, script, capsys):
    (*_, row), policy, words = table("runs/run"), "runs/run/policy.pt", ["--script", str(copy)]
    module, act = common.open_policy(Path(policy), copy)
    observations = np.random.default_rng(0).normal(size=(9, 3))
    assert np.array_equal(act(observations), act(observations)) and module is not script  # without dropout
    record.main([policy, "--env=Counter-v0", "--episodes=5", "--no_video", *words])
    returned = "return {:.1f} ± {:.1f}".format(*(float(row[x]) for x in ("eval_return", "eval_return_std")))
    assert f"{returned} over 5 episodes" in capsys.readouterr().out
    fqe.main([policy, f"--env={DATASET}", "--updates=2", "--seeds=1", "--device=cpu", *words])
    assert f"  {policy}\n" in capsys.readouterr().out
    collect.main(["--env=Counter-v0", f"--policy={policy}", "--steps=30", "--id=test/copy-v0", *words])
    assert "test/copy-v0: 30 steps" in capsys.readouterr().out
    if script.__name__ == "algorithms.offline.cql":
        pytest.importorskip("onnxscript", reason="requirements-extra.txt is not installed")
        export.main(["runs/run/checkpoint.pt", "--output=copy.onnx", *words])
        assert "[batch, 3] -> action [batch, 2]" in capsys.readouterr().out and Path("copy.onnx").exists()


def line(capsys, *arguments, program=record):
    """The one line of a program that must fail, and its exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program.main([*map(str, arguments)])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "error: " in err, err
    return err, stop.value.code


@once
def test_a_policy_of_another_network_names_the_option_or_the_script(copy, capsys):
    for program, words in ((record, ["--no_video", "--env=Counter-v0"]), (export, []), (fqe, [f"--env={DATASET}"])):
        err, status = line(capsys, "runs/run/policy.pt", *words, program=program)
        assert status == 1 and "runs/run/policy.pt" in err and "--script" in err
    words = ["--policy=runs/run/policy.pt", "--env=Counter-v0", "--id=test/copy-v0"]
    err, status = line(capsys, *words, program=collect)
    assert status == 1 and "runs/run/policy.pt" in err and "--script" in err
    Path("plain.py").write_text(Path(common.ROOT, "algorithms/offline/cql.py").read_text())
    err, status = line(capsys, "runs/run/policy.pt", "--no_video", "--env=Counter-v0", "--script=plain.py")
    assert status == 1 and "--script plain.py: runs/run/policy.pt" in err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.py", "", "has no function load_policy or load_dataset or evaluate"),
        ("part.py", "def load_policy(path): ...\nevaluate = 1", "has no function load_dataset or evaluate"),
        ("missing.py", None, "is not a Python file"),
        ("script.txt", "", "is not a Python file"),
        ("ends.py", "raise SystemExit(0)", "is not a training script"),
    ],
)
def test_a_file_that_is_not_a_training_script_is_one_line(name, text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("policy.pt").touch()
    if text is not None:
        Path(name).write_text(text)
    err, status = line(capsys, "policy.pt", "--env=Counter-v0", "--no_video", f"--script={name}")
    assert status == 2 and f"--script {name} {words}" in err


def test_a_copy_may_import_a_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("load_policy = load_dataset = evaluate = print")
    (tmp_path / "mine.py").write_text("from beside_it import *")
    assert common.load_script(tmp_path / "mine.py").evaluate is print


def test_a_bug_in_a_copy_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("policy.pt").touch()
    Path("broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        record.main(["policy.pt", "--env=Counter-v0", "--no_video", "--script=broken.py"])


def test_a_policy_with_masks_is_not_played():
    def policy(observation, mask=None):
        return 0

    common.refuse_masks("policy.pt", policy)
    policy.encoding = {"observations": [], "actions": [], "masks": ["may_call"]}
    with pytest.raises(common.DataError, match="policy.pt was trained with masks"):
        common.refuse_masks("policy.pt", policy)
