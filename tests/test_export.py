"""benchmarks/export.py: an ONNX file that acts like the policy, and the messages for users' errors."""

import json
import subprocess
import sys
import types
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import contents

from algorithms.discrete import cql_dqn
from algorithms.offline import cql, policy_constraint
from benchmarks import export

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LOW, HIGH = np.array([-2, 0, -0.7], np.float32), np.array([1, 0.5, 0.1], np.float32)  # the last overshoots unclamped


def store_policy(path):
    """A policy whose actions reach everywhere between the bounds, for observations far from mean 0 and std 1."""
    torch.manual_seed(0)
    actor = cql.TanhGaussianActor(4, 3, 16, 2)
    actor.head.weight.data *= 100
    scaling = {"observation_mean": torch.linspace(-50, 50, 4), "action_low": torch.tensor(LOW)}
    scaling |= {"observation_std": torch.logspace(-2, 2, 4), "action_high": torch.tensor(HIGH)}
    actor.load_state_dict(scaling, strict=False)
    cql.save(path, {"sizes": list(actor.sizes), "weights": actor.state_dict()})
    return path


@pytest.fixture
def policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return store_policy(Path("policy.pt"))


@pytest.fixture
def without_packages(monkeypatch):
    """Replaces all functions that need the packages."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(export, "to_onnx", lambda actor: b"model")
    monkeypatch.setattr(export, "largest_difference", lambda model, actor: 1e-7)


@pytest.fixture(scope="module")
def packages():
    for name in PACKAGES:
        pytest.importorskip(name, reason="requirements-extra.txt is not installed")


@pytest.fixture(scope="module")
def exported(packages, tmp_path_factory):
    """The folder of a policy and of its export by the program, and what the program printed."""
    folder = tmp_path_factory.mktemp("export")
    store_policy(folder / "policy.pt")
    process = subprocess.run([sys.executable, export.__file__, "policy.pt"], cwd=folder, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    return folder, process.stdout


def refusal(capsys, *arguments):
    """The exit status and the one line on stderr of a run that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and "error: " in printed.err, printed.err
    return stop.value.code, printed.err


def test_one_valid_file_that_acts_as_the_policy(exported):
    import onnx
    import onnxruntime

    folder, printed = exported
    assert sorted(path.name for path in folder.iterdir()) == ["policy.onnx", "policy.pt"] and printed.count("\n") == 1
    assert all(part in printed for part in ("policy.onnx", "[batch, 4]", "[batch, 3]", "of the action range"))
    onnx.checker.check_model(onnx.load(folder / "policy.onnx"), full_check=True)
    content = (folder / "policy.onnx").read_bytes()  # without this machine in it
    assert str(Path(export.__file__).parent).encode() not in content and b"site-packages" not in content
    policy, session = cql.load_policy(folder / "policy.pt"), onnxruntime.InferenceSession(folder / "policy.onnx")
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("observation", "tensor(float)", ["batch", 4])
    assert (made.name, made.type, made.shape) == ("action", "tensor(float)", ["batch", 3])
    mean, std = np.linspace(-50, 50, 4), np.logspace(-2, 2, 4)
    for batch_size, scale in ((1, 1), (2, 1), (500, 1), (500, 1e8)):
        observations = (mean + std * scale * np.random.default_rng(1).normal(size=(batch_size, 4))).astype(np.float32)
        (actions,) = session.run(None, {"observation": observations})
        assert actions.shape == (batch_size, 3) and actions.dtype == np.float32
        assert np.all((actions >= LOW) & (actions <= HIGH)) and np.abs(actions - policy(observations)).max() < 1e-6
        assert batch_size < 3 or np.all(np.ptp(actions, axis=0) > 0.5 * (HIGH - LOW))


def test_the_encoding_is_in_the_metadata(packages, tmp_path):
    import onnx

    actor = cql.TanhGaussianActor(2, 1, 4, 1)
    actor.encoding = {"observations": [{"name": "x", "offset": 1.5}, {"name": "y", "offset": 0.0}], "actions": []}
    stored = {x.key: json.loads(x.value) for x in onnx.load_from_string(export.to_onnx(actor)).metadata_props}
    assert stored == {"encoding": actor.encoding, "action_low": [-1.0], "action_high": [1.0]}


@pytest.mark.parametrize(("sizes", "head", "n_outputs"), [([4], "dqn", 1), ([4, 3], "c51", 5), ([4], "qr", 5)])
def test_discrete_actions(sizes, head, n_outputs, packages):
    torch.manual_seed(0)
    actor = cql_dqn.QNetwork(3, sizes, 16, 2, head, n_outputs, normalize_features=head == "qr")
    actor.atoms.copy_(torch.linspace(-1, 1, n_outputs))
    actor.action_low.copy_(torch.arange(len(sizes)) - 2)
    actor.last.weight.data *= 100
    assert len(np.unique(actor.act(np.random.default_rng(0).normal(size=(1000, 3))), axis=0)) > 2
    assert export.largest_difference(export.to_onnx(actor), actor) == 0


@pytest.mark.parametrize(("kind", "n_samples"), [("gaussian", 100), ("perturbation", 100)])
def test_policies_that_choose_among_actions(kind, n_samples, packages):
    """With batches of 1 and 1,000; the critics split large ones outside the file."""
    torch.manual_seed(0)
    sizes = (kind, n_samples, 0.05, [-5.0, 2.0], False, [16], [8, 16], [16, 8])
    actor = policy_constraint.Policy(4, 3, *sizes).eval()
    actor.action_low.copy_(torch.tensor(LOW))
    actor.action_high.copy_(torch.tensor(HIGH))
    for parameter in actor.parameters():
        parameter.data *= 5
    assert np.ptp(actor.act(np.random.default_rng(0).normal(size=(1000, 4))), axis=0).min() > 0.1
    assert export.largest_difference(export.to_onnx(actor), actor) < 1e-6


def test_policy_and_checkpoint_of_a_run_go_to_any_place(policy, without_packages, capsys, monkeypatch):
    def weights(actor):
        assert not actor.training
        return b"".join(tensor.numpy().tobytes() for tensor in actor.state_dict().values())

    monkeypatch.setattr(export, "to_onnx", weights)
    cql.save(Path("checkpoint.pt"), {"policy": torch.load(policy), "agent": {}})
    export.main(["checkpoint.pt"])
    export.main(["policy.pt", "--output", "new/folder/best"])
    first, second = Path("checkpoint.onnx"), Path("new/folder/best")
    assert first.read_bytes() == second.read_bytes() and len(first.read_bytes()) > 500
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(first), str(second)]


def test_policies_of_all_scripts_act_in_eval_mode(tmp_path):
    for script, network in (
        (cql, cql.TanhGaussianActor(3, 2, 8, 1)),
        (
            policy_constraint,
            policy_constraint.Policy(3, 2, "perturbation", 5, 0.05, [-5.0, 2.0], False, [8], [8], [8]),
        ),
        (cql_dqn, cql_dqn.QNetwork(3, [2], 8, 1, "dqn", 1)),
    ):
        script.save(tmp_path / "policy.pt", {"sizes": list(network.sizes), "weights": network.train().state_dict()})
        loaded = common.open_policy(tmp_path / "policy.pt")[1].network
        assert type(loaded) is type(network) and not loaded.training


def test_masks_and_scores_of_discrete_actions(packages, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = cql_dqn.QNetwork(3, [4], 8, 1, "dqn", 1)
    state = {"sizes": list(network.sizes), "weights": network.state_dict()}
    state["encoding"] = {"observations": [], "actions": [], "masks": ["a", "b", "c", "d"]}
    cql_dqn.save(tmp_path / "policy.pt", state)
    export.main([str(tmp_path / "policy.pt")])
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    observations, masks = np.float32(np.random.default_rng(0).normal(size=(16, 3))), np.eye(4)[np.arange(16) % 4] == 0
    actions, scores = session.run(["action", "scores"], {"observation": observations, "mask": masks})
    policy = cql_dqn.load_policy(tmp_path / "policy.pt")
    assert actions.tolist() == policy(observations, masks).tolist() == scores.argmax(axis=1).tolist()
    assert np.isneginf(scores[~masks]).all() and scores[masks] == pytest.approx(
        policy.scores(observations)[masks], abs=1e-6
    )


@pytest.mark.parametrize("damage", [0.8e-4, np.nan])
def test_a_file_that_acts_otherwise_is_not_written(damage, exported, policy, capsys, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", lambda actor: (exported[0] / "policy.onnx").read_bytes())
    Path("policy.onnx").write_text("older")
    state = torch.load(policy)
    state["weights"]["action_low"][2] += damage  # of a range of 0.8
    cql.save(policy, state)
    status, line = refusal(capsys, policy)
    assert status == 1 and "differ" in line and "policy.onnx" in line
    assert sorted(contents(".")) == ["policy.onnx", "policy.pt"] and Path("policy.onnx").read_text() == "older"


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package(name, policy, without_packages, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    status, line = refusal(capsys, policy)
    assert status == 1 and f" {name} " in line and "pip install -r requirements-extra.txt" in line
    assert list(contents(".")) == ["policy.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["POLICY"]),
        (["policy.pt", "--out", "x.onnx"], 2, ["--out"]),
        (["nowhere.pt"], 1, ["nowhere.pt", "does not exist"]),
        (["text"], 1, ["text", "policy.pt"]),
        (["."], 2, ["POLICY"]),
        (["foreign.pt"], 1, ["foreign.pt", "policy"]),
        (["policy.pt", "--output", "./policy.pt"], 2, ["--output", "the policy itself"]),
        (["policy.pt", "--output", "folder"], 2, ["--output folder", "not a regular file"]),
        (["policy.pt", "--output", "text/policy.onnx"], 1, ["--output text/policy.onnx", "cannot be written"]),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(arguments, code, words, policy, without_packages, capsys):
    Path("text").write_text("no policy")
    Path("folder").mkdir()
    torch.save({"sizes": [4, 3, 16], "weights": {}}, "foreign.pt")
    before = contents(".")
    status, line = refusal(capsys, *arguments)
    assert status == code and all(word in line for word in words), line
    assert contents(".") == before


def test_failed_write_leaves_the_older_file(policy, without_packages, capsys, monkeypatch):
    Path("policy.onnx").write_text("older")

    def full(temporary, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "replace", full)
    status, line = refusal(capsys, policy)
    assert status == 1 and "policy.onnx cannot be written: No space left on device" in line
    assert sorted(contents(".")) == ["policy.onnx", "policy.pt"] and Path("policy.onnx").read_text() == "older"
