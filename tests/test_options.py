"""Command line and YAML: CORL's options, strict parsing, and that every option changes something; and whether README
and docs agree with the scripts."""

import contextlib
import dataclasses
import functools
import importlib
import io
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Optional, get_args

import pyrallis
import pytest
import torch
import yaml
from conftest import (
    DATASET,
    GAUSSIAN,
    METHODS,
    ROOT,
    SCRIPTS,
    constrained,
    continuous,
    kinds,
    once,
    option_names,
    record,
    refusal,
    table,
    tiny_arguments,
    weights,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Name, type and default of CORL's options. Its checkpoints_path None writes nothing, here it is "runs"; its device is
# "cuda"; buffer_size is a limit here.
CORL = {
    "device": (str, "cuda" if torch.cuda.is_available() else "cpu"), "env": (str, "halfcheetah-medium-expert-v2"),
    "seed": (int, 0), "eval_freq": (int, 5000), "n_episodes": (int, 10), "max_timesteps": (int, 1_000_000),
    "checkpoints_path": (Optional[str], "runs"), "load_model": (str, ""), "buffer_size": (int, 2_000_000),
    "batch_size": (int, 256), "discount": (float, 0.99), "alpha_multiplier": (float, 1.0),
    "use_automatic_entropy_tuning": (bool, True), "backup_entropy": (bool, False), "policy_lr": (float, 3e-5),
    "qf_lr": (float, 3e-4), "soft_target_update_rate": (float, 5e-3), "target_update_period": (int, 1),
    "cql_n_actions": (int, 10), "cql_importance_sample": (bool, True), "cql_lagrange": (bool, False),
    "cql_target_action_gap": (float, -1.0), "cql_temp": (float, 1.0), "cql_alpha": (float, 10.0),
    "cql_max_target_backup": (bool, False), "cql_clip_diff_min": (float, -math.inf),
    "cql_clip_diff_max": (float, math.inf), "orthogonal_init": (bool, True), "normalize": (bool, True),
    "normalize_reward": (bool, False), "q_n_hidden_layers": (int, 3), "reward_scale": (float, 5.0),
    "reward_bias": (float, -1.0), "bc_steps": (int, 0), "policy_log_std_multiplier": (float, 1.0),
    "project": (str, "CORL"), "group": (str, "CQL-D4RL"), "name": (str, "CQL"),
}  # fmt: skip
ORIGINAL_PARSER = pyrallis.argparsing.ArgumentParser
properties = settings(max_examples=120, suppress_health_check=[*HealthCheck])


def options_of(script):
    return {field.name: field for field in dataclasses.fields(script.TrainConfig)}


@functools.cache
def cached_parser(**options):  # an option costs pyrallis half a millisecond
    return ORIGINAL_PARSER(**options)


def read(script, *arguments):
    """The configuration of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.pyrallis.argparsing, "ArgumentParser", cached_parser)
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        return script.parse_arguments(script.TrainConfig)


@pytest.fixture
def parse(script, tmp_path):
    """The configuration from command-line arguments and, where given, a YAML text."""

    def parse(*arguments, text=None):
        if text is not None:
            (tmp_path / "options.yaml").write_bytes(text.encode(errors="surrogatepass"))
            arguments = ("--config_path", tmp_path / "options.yaml", *arguments)
        return read(script, *arguments)

    return parse


def known(cases):
    """[(script, case, ...)] for the scripts that have the option of a case."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    names = [re.match(r"(?:--)?(\w+)", case[0])[1] for case in cases]
    return [(script, *case) for script in SCRIPTS for name, case in zip(names, cases) if name in option_names(script)]


def test_an_option_has_one_type_in_all_scripts():
    scripts = [importlib.import_module(name) for name in SCRIPTS]
    for name in set.intersection(*map(option_names, SCRIPTS)):
        assert len({options_of(script)[name].type for script in scripts}) == 1, name


@continuous
def test_options_of_corl_keep_name_type_and_default(script):
    options = options_of(script)
    assert len(CORL) == 38
    for name, (kind, default) in CORL.items():
        assert options[name].type == kind and vars(script.TrainConfig())[name] == default, name


@once
def test_command_line_and_yaml_say_what_they_say(parse):
    for name, text, value in [
        ("normalize", "True", True), ("normalize", "false", False), ("seed", "1e6", 1_000_000), ("seed", "1_000", 1000),
        ("seed", "2.0", 2), ("seed", "010", 10), ("discount", "1", 1.0), ("qf_lr", "1e-05", 1e-5),
        ("reward_bias", "-1e-7", -1e-7), ("reward_clip", ".inf", math.inf), ("checkpoints_path", "None", "runs"),
        ("checkpoints_path", "null", "runs"), ("eval_env", "None", None), ("eval_env", "none", "none"),
        ("run_id", "01234567", "01234567"), ("run_id", "1e5", "1e5"), ("run_id", "true", "true"),
        ("run_id", "None", None),
        ("name", "None", "None"), ("group", "False", "False"), ("env", "0x10", "0x10"), ("load_model", "''", ""),
        ("compile", "None", None), ("compile", "True", True), ("name", "a b", "a b"),
        ("project", "2001-02-03", "2001-02-03"),
    ]:  # fmt: skip
        words = f"--{name}={text}", f"--{name}={text}".replace("''", "")
        for parsed in (parse(words[1]), parse(f"--{name}=3", words[1]), parse(text=f"batch_size: 7\n{name}: {text}")):
            found = vars(parsed)[name]
            assert found == value and type(found) is type(value), (name, text)
    assert vars(parse("--name=[a: b]"))["name"] == "[a: b]" and vars(parse("--name= x "))["name"] == " x "
    config = parse("--seed", "3", "--reward_bias", "-5", "--normalize", "False", "--name", "a b")
    assert (config.seed, config.reward_bias, config.normalize, config.name) == (3, -5.0, False, "a b")
    config = parse("--batch_size=8", text="batch_size: 7\nseed: 1\nseed: 2\ncheckpoints_path:\neval_env: ~\n")
    assert (config.batch_size, config.seed, config.checkpoints_path, config.eval_env) == (8, 2, "runs", None)


BAD_VALUES = [
    "normalize=maybe", "normalize=1", "normalize=None", "normalize=", "seed=1.9", "seed=true", "seed=None", "seed=x",
    "seed=-1", "seed=1e400", "seed=nan", "seed=", "seed=1,000", "eval_seed=-1", "eval_freq=0", "n_episodes=0",
    "batch_size=0", "batch_size=-256", "buffer_size=0", "max_timesteps=-1", "max_timesteps=0", "log_interval=0",
    "discount=1.01", "discount=-0.1", "discount=nan", "discount=none", "policy_lr=-1e-3", "qf_lr=-1", "qf_lr=inf",
    "soft_target_update_rate=1.5", "soft_target_update_rate=-1", "target_update_period=0", "cql_n_actions=0",
    "cql_temp=0", "cql_temp=-1", "cql_alpha=-1", "cql_alpha=inf", "cql_target_action_gap=nan", "hidden_dim=0",
    "policy_n_hidden_layers=0", "q_n_hidden_layers=0", "bc_steps=-1", "alpha_multiplier=-1", "reward_scale=nan",
    "reward_bias=inf", "cql_clip_diff_min=nan", "cql_clip_diff_max=nan", "holdout_fraction=1", "holdout_fraction=-0.1",
    "policy_log_std_multiplier=nan", "device=gpu", "device=cuda:99", "device=", "precision=half", "compile=maybe",
    "keep_policies=2", "cql_backprop_actions=-1", "reward_clip=0", "reward_clip=-1", "reward_clip=nan",
    "max_grad_norm=0", "max_grad_norm=nan", "head=ddqn", "head=", "head=None", "target=mean", "td_error=absolute",
    "n_step=0", "n_step=1.5", "n_atoms=1", "n_quantiles=0", "eval_epsilon=2", "eval_epsilon=-0.1", "v_min=nan",
    "v_max=high", "dr3_coefficient=-1", "offline_iterations=-1",
    "online_iterations=-1", "n_online_envs=0", "utd_ratio=0", "utd_ratio=0.5", "warmup_steps=-1", "mixing_ratio=1.1",
    "mixing_ratio=nan", "cql_alpha_online=-1", "failure_reward=low", "calibrate=2", "is_sparse_reward=maybe",
    "bc_only=maybe", "encoder=resnet", "frame_stack=0", "frames_on_device=maybe",
    "adam_eps=-1", "normalize_features=2", "seed=[1]", "name=[a, b]",
    "seed={a: 1}",
    *(f"{x}_hidden_dims={y}" for x in ("policy", "q", "behaviour") for y in ("256-", "-1", "0-3", "a-b", "", "9 9")),
    "q_hidden_dims=256--3", "q_hidden_dims=²", "q_hidden_dims=None", "q_hidden_dims=1e3", "q_hidden_dims=999999999",
    "policy=sac", "policy=", "behaviour=clone", "divergence=kld", "divergence=None", "kernel=rbf", "kernel_width=0",
    "kernel_width=nan", "max_perturbation=1.5", "max_perturbation=-0.1", "n_acting_samples=0", "policy_noise=-1",
    "noise_clip=-1", "n_target_actions=0", "target_min_weight=1.1", "target_min_weight=-0.1", "behaviour_lr=-1",
    "behaviour_steps=-1", "divergence_weight=-1", "divergence_steps=-1", "n_divergence_samples=0", "constraint_lr=-1",
    "divergence_threshold=nan", "wasserstein_steps=0", "q_scale=-1", "q_scale=nan", "log_std_min=nan",
    "log_std_max=21", "value_penalty=maybe", "divergence_lagrange=2", "target_policy=slow",
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_bad_value_is_one_line_that_names_the_option(script, parse):
    for _, argument in known(BAD_VALUES):
        name, value = argument.split("=")
        if name not in options_of(script):
            continue
        refused = [refusal(parse, text=f"{name}: {value}")]
        if argument != "name=[a, b]":
            refused.append(refusal(parse, f"--{argument}"))
        for status, line in refused:
            collection = value.startswith(("[", "{")) and "options.yaml" in line
            assert status == 2 and (f"--{name} " in line or collection), argument


@pytest.mark.parametrize(
    ("script", "low", "high", "values"),
    known([("v_min", "v_max", (2, 1)), ("v_min", "v_max", (1, 1))]),
    indirect=["script"],
)
def test_limits_in_the_wrong_order_are_one_line(low, high, values, script, tiny):
    options = {"head": "c51", low: float(values[0]), high: float(values[1])}
    status, line = refusal(lambda: script.train(tiny(**options)))
    assert status == 2 and low in line and high in line


@once
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--see=4"], "--see"), (["--no_such_option=4"], "--no_such_option"), (["seed=4"], "seed=4"),
        (["--seed"], "--seed"), (["--normalize"], "--normalize"), (["--config_path=missing.yaml"], "missing.yaml"),
        (["--reward_bias", "-1e-1x"], "--option=value"), (["--config_path=."], "Is a directory"),
    ],
)  # fmt: skip
def test_bad_command_line_is_one_line(arguments, word, parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, line = refusal(parse, *arguments)
    assert status == 2 and word in line


@once
def test_bad_yaml_is_one_line_and_runs_no_code(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = "".join(f"x{i}: &x{i} [{', '.join(9 * [f'*x{i - 1}' if i else 'x'])}]\n" for i in range(20))
    for text in (
        "", "# nothing\n", "- seed\n", "seed", "sed: 1\n", "1: 2\n", "null: 1\n", "{", "a: b: c", "\tseed: 1", "\0",
        "seed: 2001-13-45\n", "\ud800", 8000 * "[", "name: " + 8000 * "[", "seed: " + 9999 * "9", bomb,
        f"name: [{3000 * 'a'}]", "config_path: x\n", "help:\n", "seed: !!python/object/apply:os.mkdir [harm]",
    ):  # fmt: skip
        status, line = refusal(parse, text=text)
        assert status == 2 and ("options.yaml" in line or "--seed" in line) and len(line) < 1000, text[:20]
    line = refusal(parse, text="seed: 2\nno_such_option: 3\n")[1]
    assert "no_such_option" in line and "options.yaml" in line and "seed" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


TEXTS = st.one_of(
    st.text(), st.integers().map(str), st.floats().map(str), st.booleans().map(str), st.just("-"),
    st.sampled_from(["", "None", "null", "maybe", "1e3", "0x10", "1.9", "-0", ".inf", "nan", "[1]", "1_0", "²"]),
)  # fmt: skip


def meant(kind, text):
    """The oracle: what the text of an option of a type means. Raises ValueError or KeyError."""
    optional, kind = bool(get_args(kind)), (get_args(kind) or [kind])[0]
    if optional and text in ("None", "null", ""):
        return None
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    number = text if kind is str else float(text.replace(".inf", "inf"))
    if kind is not str and (math.isnan(number) or kind is int and (math.isinf(number) or number != int(number))):
        raise ValueError(text)
    return kind(number)


@once
@given(data=st.data())
@properties
def test_any_text_is_parsed_to_what_it_says_or_refused_in_a_line(script, parse, data):
    name, text = data.draw(st.sampled_from(sorted(options_of(script)))), data.draw(TEXTS)
    try:
        config = vars(parse(f"--{name}={text}"))
    except script.ConfigError as error:
        assert error.status == 2
        with contextlib.suppress(ValueError, KeyError):  # then it is out of the option's range
            assert type(meant(options_of(script)[name].type, text)) in (int, float, str)
    else:
        value = meant(options_of(script)[name].type, text)
        value = "runs" if name == "checkpoints_path" and not value else value
        assert config[name] == (value or None if name == "run_id" else value)
        assert {**config, name: 0} == {**vars(script.TrainConfig()), name: 0}


VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dates()), st.lists)


@once
@given(data=st.data())
@properties
def test_any_yaml_is_a_configuration_or_a_line(script, parse, data):
    names = st.sampled_from(sorted(options_of(script))) | st.text(max_size=3)
    content = data.draw(st.dictionaries(names, VALUES, max_size=3))
    text = data.draw(st.sampled_from([yaml.safe_dump(content), data.draw(st.text())]))
    try:
        config = vars(parse(text=text))
    except script.ConfigError as error:
        assert error.status == 2
    else:
        for name, value in yaml.load(text, Loader=yaml.BaseLoader).items():
            value = meant(options_of(script)[name].type, value)
            assert config[name] == value or (not value and config[name] in (None, "runs"))


def test_help_lists_every_option_with_its_type_and_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        read(script, "--run_id", "x", "--help")
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    text, source = " ".join(out.split()).replace("- ", "-"), Path(script.__file__).read_text()
    for name, field in options_of(script).items():
        comment = re.search(rf"^    {name}: .*?  # (.+)$", source, re.MULTILINE)[1]
        kind = str(field.type).replace("typing.", "") if get_args(field.type) else field.type.__name__
        assert f"--{name} {kind} {' '.join(comment.split())}".replace("- ", "-") in text, name


def test_program_exits_with_0_1_and_2_and_says_why_in_a_line(script, command_line, tmp_path):
    arguments = tiny_arguments(script, checkpoints_path=tmp_path / "runs")
    status, out, err = command_line(*arguments)
    assert (status, err) == (0, "") and str(tmp_path / "runs" / "run") in out.splitlines()[-1]
    for bad, code in (("--seed=x", 2), ("--buffer_size=99", 2), ("--env=toy/nothing-v0", 1), ("--env=two\nlines", 1)):
        status, _, err = command_line(*arguments, "--run_id=bad", bad)
        assert status == code and err.startswith(f"{Path(script.__file__).name}: ")
        assert err.count("\n") == 1 and bad.split("=")[1].split()[-1] in err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


@once
def test_too_little_memory_of_a_gpu_is_one_line(script, monkeypatch, signals, capsys):
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        script.main(script.TrainConfig, train)
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1


@once
def test_unknown_environment_is_one_line_in_a_fresh_process(script, program, tmp_path):
    """gymnasium-robotics, which is imported to look for it, prints a notice of its own."""
    text = f"import runpy; runpy.run_path({script.__file__!r}, run_name='__main__')"
    process = program(text, "--env", DATASET, "--eval_env", "NoSuchEnvironment-v0", "--device=cpu")
    process.join()
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 2 and err.count("\n") == 1 and "NoSuchEnvironment-v0" in err, err


def test_waiting_threads_spin_little_unless_the_user_says_otherwise(script, monkeypatch):
    """The runtime reads it when torch is imported, so the lines before that are tried."""
    lines = Path(script.__file__).read_text().split("\nimport gymnasium")[0]
    assert "import torch" not in lines
    for mine, wanted in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)):
        with monkeypatch.context() as patch:
            for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
                patch.setenv(name, mine.get(name, ""))
                if name not in mine:
                    patch.delenv(name)
            exec(lines, {"__name__": "copied"})
            assert script.os.environ.get("GOMP_SPINCOUNT") == wanted


@pytest.mark.parametrize("script", [x for x in SCRIPTS if "cql_lagrange" in option_names(x)], indirect=True)
def test_a_multiplier_with_a_negative_gap_is_pointed_out(run, capsys):
    for options in ({}, {"cql_target_action_gap": 0.0}, {"cql_lagrange": False}):
        run(**{"cql_lagrange": True, "max_timesteps": 1, "run_id": "-".join(["run", *options])} | options)
        text = capsys.readouterr().out
        assert ("above -1;" in text) == ("the authors' code" in text) == (not options)


@pytest.mark.parametrize(
    ("capabilities", "precision", "said"),
    [
        ({"avx2": True, "avx512_bf16": False}, "bfloat16", True), ({}, "bfloat16", True), ({}, "float32", False),
        ({"amx_bf16": True}, "bfloat16", False), ({"neon": True, "bf16": True}, "bfloat16", False),
    ],
)  # fmt: skip
@kinds
def test_slow_bfloat16_is_pointed_out(capabilities, precision, said, run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    run(precision=precision, max_timesteps=1)
    assert ("lacks instructions for bfloat16" in capsys.readouterr().err) == said


@once
def test_stored_configuration_is_a_config_file(script, parse, tiny, run):
    options = {"name": "1e3", "group": "no", "reward_bias": -1e-7, "reward_clip": 3.5, "project": "null: ü"}
    folder, config = run(**options), tiny(**options)
    assert parse("--config_path", str(folder / "config.yaml")) == config
    assert yaml.safe_load((folder / "config.yaml").read_text()).keys() == vars(config).keys()


# Our file: a dataset of it, and what CORL's file for that dataset says beyond the defaults of both.
CORL_FILES = {
    "mujoco": ("walker2d-full-replay-v2", ""),
    "hopper-medium": ("hopper-medium-v2", "normalize_reward: true"),
    "adroit": ("relocate-human-v1", "{cql_alpha: 1.0, policy_lr: 1.0e-04}"),
    "maze2d": ("maze2d-umaze-v1", "{cql_lagrange: true, cql_target_action_gap: 5.0, n_episodes: 100}"),
    "antmaze": (
        "antmaze-large-diverse-v2",
        """{cql_alpha: 5.0, cql_clip_diff_min: -200, cql_lagrange: true, cql_max_target_backup: true, n_episodes: 100,
        cql_target_action_gap: 0.8, eval_freq: 50000, normalize: false, normalize_reward: true, policy_lr: 0.0001,
        q_n_hidden_layers: 5, reward_bias: -5.0, reward_scale: 10.0}""",
    ),
}


@pytest.mark.parametrize("file", CORL_FILES)
@continuous
def test_file_of_corl_means_what_our_configuration_does(file, script, parse):
    """Written as CORL writes its files: every key, null, .inf, -.inf, 3.0e-05, '' and a device."""
    text = """
        alpha_multiplier: 1.0
        backup_entropy: false
        batch_size: 256
        bc_steps: 0
        buffer_size: 10000000
        checkpoints_path: null
        cql_alpha: 10.0
        cql_clip_diff_max: .inf
        cql_clip_diff_min: -.inf
        cql_importance_sample: true
        cql_lagrange: false
        cql_max_target_backup: false
        cql_n_actions: 10
        cql_target_action_gap: -1.0
        cql_temp: 1.0
        device: cpu
        discount: 0.99
        eval_freq: 5000
        load_model: ''
        max_timesteps: 1000000
        n_episodes: 10
        name: CQL
        normalize: true
        normalize_reward: false
        orthogonal_init: true
        policy_lr: 3.0e-05
        project: CORL
        q_n_hidden_layers: 3
        qf_lr: 0.0003
        reward_bias: 0.0
        reward_scale: 1.0
        seed: 0
        soft_target_update_rate: 0.005
        target_update_period: 1
        use_automatic_entropy_tuning: true
    """
    name, changes = CORL_FILES[file]
    content = yaml.safe_load(text) | (yaml.safe_load(changes) or {})
    content |= {"env": name, "group": f"cql-{name}-multiseed-v0"}
    theirs = vars(parse(text=yaml.safe_dump(content)))
    ours = vars(parse("--config_path", f"{ROOT}/configs/offline/cql/{file}.yaml", "--env", name))
    free = {"group", "device", "buffer_size"}
    free |= {"reward_scale", "reward_bias"} if not theirs["normalize_reward"] else set()  # which then do nothing
    assert {key: theirs[key] for key in theirs.keys() - free} == {key: ours[key] for key in ours.keys() - free}
    assert (theirs["buffer_size"], theirs["checkpoints_path"]) == (10**7, "runs")


# Every option changes something: for each one, a configuration in which it acts, and another value.

ACTS = {
    "device": ({}, "cuda:99"), "env": ({}, "toy/new-v0"), "eval_env": ({}, "Plain-v0"), "seed": ({}, 1),
    "eval_seed": ({}, 1), "eval_freq": ({}, 5), "n_episodes": ({}, 3), "max_timesteps": ({}, 11),
    "checkpoints_path": ({}, "elsewhere"), "run_id": ({}, "other"), "load_model": ({}, "checkpoint.pt"),
    "keep_policies": ({}, True), "log_interval": ({}, 3), "compile": ({}, True), "precision": ({}, "bfloat16"),
    "buffer_size": ({}, 99), "batch_size": ({}, 33), "normalize": ({}, False),
    "normalize_reward": ({"reward_scale": 3.0}, True),
    "reward_scale": ({"normalize_reward": True}, 4.0), "reward_bias": ({"normalize_reward": True}, 2.0),
    "reward_clip": ({}, 110.0), "holdout_fraction": ({}, 0.1), "hidden_dim": ({}, 17), "q_n_hidden_layers": ({}, 2),
    "orthogonal_init": ({"orthogonal_init": False}, True), "discount": ({}, 0.9), "qf_lr": ({}, 1e-4),
    "bc_only": ({}, True), "soft_target_update_rate": ({}, 0.1), "target_update_period": ({}, 3),
    "cql_alpha": ({}, 5.0), "weight_decay": ({}, 1.0), "dropout": ({}, 0.5), "critic_layer_norm": ({}, True),
    "project": ({}, "other"), "group": ({}, "other"), "name": ({"run_id": None}, "other"),
    # of algorithms/offline/cql.py
    "policy_n_hidden_layers": ({}, 2), "policy_log_std_multiplier": ({}, 0.5), "policy_lr": ({}, 2e-4),
    "alpha_multiplier": ({}, 0.5), "use_automatic_entropy_tuning": ({}, False), "backup_entropy": ({}, True),
    "bc_steps": ({}, 4), "cql_n_actions": ({}, 3), "cql_backprop_actions": ({}, 1),
    "cql_importance_sample": ({}, False), "cql_temp": ({}, 0.5), "cql_max_target_backup": ({}, True),
    "cql_clip_diff_min": ({}, 3.0), "cql_clip_diff_max": ({}, 2.0), "cql_lagrange": ({}, True),
    "cql_target_action_gap": ({"cql_lagrange": True}, 2.0), "cql_variant": ({}, "rho"),
    "cql_density": ({}, "mixture"), "cql_rho_epsilon": ({"cql_variant": "rho"}, 0.5),
    # of algorithms/finetune/cql.py
    "offline_iterations": ({}, 11), "online_iterations": ({}, 3), "n_online_envs": ({"online_iterations": 8}, 2),
    "utd_ratio": ({"online_iterations": 8}, 2), "warmup_steps": ({"online_iterations": 8}, 3),
    "mixing_ratio": ({"online_iterations": 8}, 0.5), "cql_alpha_online": ({"online_iterations": 8}, 5.0),
    "calibrate": ({}, True), "failure_reward": ({"calibrate": True}, -9.0),
    "is_sparse_reward": ({"calibrate": True, "failure_reward": 999.0}, True),
    # of algorithms/offline/combo.py
    "real_ratio": ({}, 0.25), "push_down_states": ({}, "model"), "mopo_penalty": ({}, 1.0), "rollout_freq": ({}, 5),
    "rollout_batch_size": ({}, 9), "rollout_length": ({}, 3), "rollout_actions": ({}, "uniform"),
    "model_retain": ({"rollout_freq": 5}, 1), "termination": ({}, "never"), "dynamics_members": ({}, 4),
    "dynamics_elites": ({}, 1), "dynamics_hidden_dim": ({}, 9), "dynamics_n_hidden_layers": ({}, 2),
    "dynamics_lr": ({}, 1e-2), "dynamics_max_epochs": ({"dynamics_lr": 1e-2}, 2), "dynamics_path": ({}, "dynamics.pt"),
    # of algorithms/discrete/cql_dqn.py
    "eval_epsilon": ({"eval_env": "Paid-v0"}, 0.5), "head": ({"head": "dqn"}, "qr"), "n_atoms": ({"head": "c51"}, 11),
    "v_min": ({"head": "c51"}, -500.0), "v_max": ({"head": "c51"}, 5000.0), "n_quantiles": ({"head": "qr"}, 11),
    "normalize_features": ({}, True), "n_step": ({}, 2), "target": ({}, "sarsa"), "td_error": ({}, "squared"),
    "max_grad_norm": ({}, 0.1), "dr3_coefficient": ({}, 0.1),
    # of algorithms/discrete/cql_atari.py
    "encoder": ({}, "nature"), "frame_stack": ({}, 3), "frames_on_device": ({}, True), "adam_eps": ({}, 1e-3),
    # of algorithms/offline/policy_constraint.py
    "policy": ({}, "gaussian"), "policy_hidden_dims": ({}, "17"), "q_hidden_dims": ({}, "16-8"),
    "behaviour_hidden_dims": (METHODS["BRAC-v"], "17"), "log_std_min": (GAUSSIAN, 1.0), "log_std_max": (GAUSSIAN, -1.0),
    "log_std_tanh": (GAUSSIAN, True), "max_perturbation": (METHODS["BCQ"], 0.5), "n_acting_samples": (GAUSSIAN, 3),
    "target_policy": ({}, False), "policy_noise": ({}, 0.1), "noise_clip": ({}, 0.1), "n_target_actions": (GAUSSIAN, 2),
    "target_min_weight": ({}, 0.75), "behaviour": (METHODS["BRAC-v"], "vae"), "behaviour_lr": (METHODS["BRAC-v"], 0.01),
    "behaviour_steps": (METHODS["BRAC-v"], 4), "divergence": ({}, "none"), "divergence_weight": ({}, 2.0),
    "divergence_steps": ({}, 4), "n_divergence_samples": (METHODS["BRAC-v"], 3),
    "kernel": (METHODS["BRAC-v"], "gaussian"), "kernel_width": (METHODS["BRAC-v"], 1.0),
    "value_penalty": ({}, True), "divergence_lagrange": ({}, True),
    "divergence_threshold": ({"divergence_lagrange": True}, 1.0), "constraint_lr": ({"divergence_lagrange": True}, 0.1),
    "wasserstein_steps": (METHODS["wasserstein"], 2), "q_scale": ({}, 1.0),
}  # fmt: skip


class Recorder:
    """A stand-in for W&B that records what it is told."""

    Settings, starting_step = dict, 0

    def __init__(self):
        self.told = []

    def login(self, **_):
        return True

    def init(self, config=None, **options):
        self.told.append(options)
        return self

    def log(self, metrics, step):
        self.told.append((step, sorted(metrics)))

    def finish(self, **_):
        pass


@pytest.fixture
def observe(script, tiny, tmp_path, monkeypatch):
    """Returns all that a run does: what it tells W&B, its files, tensors and rows; or how it is refused."""

    def observe(place, **options):
        monkeypatch.setattr(script, "wandb", recorder := Recorder())
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                script.train(tiny(**{"max_timesteps": 10, "checkpoints_path": "runs"} | options))
        except script.DataError as error:
            return type(error)
        (folder,) = [path.parent for path in Path().rglob("checkpoint.pt")]
        tensors = {key: x.tolist() for key, x in weights(folder, "checkpoint.pt").items()}
        names = [re.sub("[0-9a-f]{8}/", "/", str(path)) for path in sorted(folder.iterdir())]
        told = [re.sub("[0-9a-f]{8}'", "", repr(x)) for x in recorder.told]
        return {"wandb": told, "files": names, "tensors": tensors, "rows": table(folder)}

    return observe


BASES = {}  # results of a script in the context of an option


def halved(gradients, metrics):
    if isinstance(gradients, tuple):
        return tuple(x / 2 for x in gradients), metrics
    return {name: [x / 2 for x in values] for name, values in gradients.items()}, metrics


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_the_table_has_every_option_of_a_script(script):
    assert options_of(script).keys() <= ACTS.keys()
    elsewhere = {x for name in SCRIPTS for x in acting(name)}
    assert option_names(script.__name__) <= elsewhere  # each one is tried somewhere


def acting(script):
    """All options of offline/cql.py, and others in the first file that has them. What other files only read in the text
    that all share acts there alike. So does the offline phase of the file that fine-tunes, bit for bit
    (test_finetune.py). What offline/cql.py or the file's own part reads is tried in each, so that no file forgets it.
    """
    names = option_names(script)
    if "offline.cql" in script:
        return [x for x in ACTS if x in names]
    names = names - option_names("algorithms.offline.cql") if "finetune" in script else names
    texts = [Path(importlib.import_module(x).__file__).read_text() for x in (script, "algorithms.offline.cql")]
    own = "".join(text[text.index("# Shapes: ") : text.index("# Common to all files")] for text in texts)
    others = "algorithms.offline.cql", *SCRIPTS[: SCRIPTS.index(script)]
    first = names.difference(*map(option_names, others))
    return [x for x in ACTS if x in first or x in names and re.search(rf"\bconfig\.{x}\b", own)]


@pytest.mark.parametrize(("script", "option"), [(x, y) for x in SCRIPTS for y in acting(x)], indirect=["script"])
def test_every_option_changes_something(option, script, observe, run, new_dataset, monkeypatch):
    context, value = ACTS[option]
    if (key := f"{script.__name__} {context}") not in BASES:
        BASES[key] = observe("base", **context)
        assert BASES[key] == observe("again", **context) and isinstance(BASES[key], dict)
    if option == "env":
        new_dataset(record("Counter-v0", range(9)), env="Counter-v0")
    if option == "compile":  # numbers may stay the same, so this compiler halves all gradients
        monkeypatch.setattr(script.torch, "compile", lambda function, **_: lambda *x: halved(*function(*x)))
    if option == "frames_on_device":  # numbers stay the same, so this device inverts the frames
        load = script.Frames.load

        def inverted(frames, *arguments):
            load(frames, *arguments)
            frames.frames = 255 - frames.frames

        monkeypatch.setattr(script.Frames, "load", inverted)
    if option in ("load_model", "dynamics_path"):
        value = str(run(run_id="earlier", seed=3) / value)
    assert observe("other", **context | {option: value}) != BASES[key]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "mmd"}, "--policy deterministic with --divergence mmd takes --behaviour gaussian or vae"),
        ({"divergence": "mmd", "behaviour": "vae"}, "--divergence kl, mmd and raw_mmd take --policy gaussian"),
        ({"divergence": "kl", "behaviour": "gaussian"}, "--divergence kl, mmd and raw_mmd take --policy gaussian"),
        (METHODS["BRAC-p"] | {"behaviour": "vae"}, "takes --behaviour gaussian, not vae"),
        (METHODS["BEAR"] | {"behaviour": "data"}, "takes --behaviour gaussian or vae, not data"),
        (METHODS["wasserstein"] | {"behaviour": "vae"}, "takes --behaviour data, not vae"),
        ({"behaviour": "vae"}, "takes --behaviour data, not vae"),
        (METHODS["BCQ"] | {"behaviour": "gaussian"}, "takes --behaviour vae, not gaussian"),
        (METHODS["BCQ"] | {"divergence": "squared_error"}, "--policy perturbation takes --divergence none"),
        (METHODS["BCQ"] | {"divergence_steps": 3}, "--divergence none takes no --value_penalty, "),
        ({"divergence": "none", "value_penalty": True}, "--divergence none takes no --value_penalty, "),
        ({"divergence": "none", "divergence_lagrange": True}, "--divergence none takes no --value_penalty, "),
        ({"n_acting_samples": 2}, "--policy deterministic takes --n_acting_samples 1"),
        ({"behaviour_steps": 3}, "--behaviour_steps needs a clone or a VAE"),
        (METHODS["BRAC-p"] | {"behaviour_steps": 25}, "leave no update with Q"),
        (METHODS["BRAC-p"] | {"behaviour_steps": 5, "divergence_steps": 20}, "leave no update with Q"),
        (GAUSSIAN | {"log_std_min": 1.0, "log_std_max": 1.0}, "--log_std_min takes less than --log_std_max"),
    ],
)
@constrained
def test_switches_that_do_not_go_together_are_one_line(options, words, script, tmp_path):
    arguments = tiny_arguments(script, checkpoints_path=tmp_path / "runs", **options)
    status, line = refusal(lambda: script.train(read(script, *arguments)))
    assert status == 2 and words in line and len(line) < 200 and not [*tmp_path.iterdir()]


INERT = {
    "algorithms.offline.cql": [
        ({}, {"reward_scale": 4.0, "reward_bias": 4.0, "cql_target_action_gap": 4.0, "buffer_size": 100}),
        ({"cql_alpha": 0}, {"cql_temp": 0.5, "cql_n_actions": 5}),
        ({"cql_alpha": 0}, {"cql_variant": "rho"}),
        ({"cql_alpha": 0}, {"cql_variant": "var"}),
        ({"cql_alpha": 0}, {"cql_density": "mixture"}),
        ({"bc_only": True, "cql_alpha": 0}, {"cql_variant": "var"}),
        ({"bc_only": True}, {"cql_alpha": 5.0, "qf_lr": 0.1, "discount": 0.99, "cql_lagrange": True}),
    ],
    "algorithms.offline.combo": [
        ({"real_ratio": 1.0}, {"rollout_length": 9, "mopo_penalty": 1.0, "dynamics_lr": 1e-2, "termination": "never"}),
        ({"cql_alpha": 0}, {"push_down_states": "model", "cql_temp": 0.5, "cql_n_actions": 5}),
    ],
    "algorithms.offline.policy_constraint": [
        (
            {},
            {
                "reward_scale": 4.0,
                "reward_bias": 4.0,
                "buffer_size": 100,
                "log_std_min": 0.1,
                "log_std_max": 0.2,
                "log_std_tanh": True,
                "max_perturbation": 0.5,
                "behaviour_hidden_dims": "17",
                "behaviour_lr": 0.1,
                "kernel": "gaussian",
                "kernel_width": 1.0,
                "divergence_threshold": 1.0,
                "constraint_lr": 0.1,
                "wasserstein_steps": 9,
            },
        ),
        ({"policy_noise": 0.0}, {"noise_clip": 0.1}),
        (METHODS["BCQ"], {"kernel_width": 1.0, "divergence_threshold": 1.0, "log_std_max": 0.2}),
        (METHODS["BRAC-v"], {"max_perturbation": 0.5, "divergence_threshold": 1.0, "constraint_lr": 0.1}),
    ],
    "algorithms.finetune.cql": [
        ({}, {"reward_scale": 4.0, "reward_bias": 4.0, "cql_target_action_gap": 4.0, "buffer_size": 100}),
        ({}, {"cql_alpha_online": 5.0, "warmup_steps": 3, "utd_ratio": 2, "n_online_envs": 2, "mixing_ratio": 0.5}),
        ({"online_iterations": 8}, {"failure_reward": -9.0, "is_sparse_reward": True}),
    ],
    "algorithms.discrete.cql_dqn": [
        ({}, {"n_atoms": 11, "v_min": 0.0}),
        ({"head": "c51"}, {"td_error": "squared", "n_quantiles": 11}),
        ({"bc_only": True}, {"cql_alpha": 5.0, "td_error": "squared"}),
        ({}, {"cql_rho_epsilon": 0.5}),
        ({"bc_only": True}, {"cql_variant": "rho"}),
        ({"bc_only": True}, {"cql_variant": "var"}),
    ],
    "algorithms.discrete.cql_atari": [
        ({}, {"n_atoms": 11, "v_min": 0.0, "cql_rho_epsilon": 0.5, "reward_scale": 4.0, "frames_on_device": True}),
        ({"head": "c51"}, {"td_error": "squared", "n_quantiles": 11}),
        ({"bc_only": True}, {"cql_alpha": 5.0, "td_error": "squared", "cql_variant": "var"}),
    ],
}


@pytest.mark.parametrize(
    ("script", "context", "options"),
    [(name, *case) for name, cases in INERT.items() for case in cases],
    indirect=["script"],
)
def test_options_that_a_configuration_switches_off_change_nothing(context, options, script, observe):
    base, other = observe("base", **context), observe("other", **context | options)
    assert base == other and isinstance(base, dict)


# Docs and README


def section(page, title):
    return (ROOT / "docs" / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def documented(page):
    """The names in the first cells of the table below "## Metrics", or another title that follows a #."""
    page, _, title = page.partition("#")
    cells = re.findall(r"^\| (`.*?) \|", section(page, title or "Metrics"), re.MULTILINE)
    names = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    assert len(names) == len(set(names))
    return set(names)


# Pages of a script (its own, and one it builds on), and configurations that together write all its metrics.
PAGES = {
    "algorithms.offline.cql": (
        ["cql.md", "cql.md#Variants"],
        [
            {},
            {"cql_lagrange": True, "holdout_fraction": 0.2, "bc_steps": 3},
            {"cql_alpha": 0},
            {"use_automatic_entropy_tuning": False, "eval_env": "none"},
            {"cql_importance_sample": False},
            {"cql_variant": "rho"},
            {"cql_variant": "var"},
            {"cql_density": "mixture"},
            {"bc_only": True, "holdout_fraction": 0.2},
        ],
    ),
    "algorithms.finetune.cql": (
        ["finetune_cql.md", "cql.md"],
        [
            {"calibrate": True, "online_iterations": 10},
            {"cql_lagrange": True, "holdout_fraction": 0.2, "bc_steps": 3},
            {"cql_alpha": 0},
            {"use_automatic_entropy_tuning": False, "eval_env": "none"},
            {"cql_importance_sample": False},
        ],
    ),
    "algorithms.offline.policy_constraint": (
        ["policy_constraint.md"],
        [{"holdout_fraction": 0.2}, METHODS["wasserstein"], METHODS["BRAC-p"]],
    ),
    "algorithms.offline.combo": (
        ["combo.md", "cql.md"],
        [{}, {"cql_lagrange": True, "holdout_fraction": 0.2, "mopo_penalty": 1.0}],
    ),
    "algorithms.discrete.cql_dqn": (
        ["discrete_cql.md"],
        [
            {},
            {"head": "c51", "holdout_fraction": 0.2},
            {"head": "qr", "dr3_coefficient": 0.1},
            {"bc_only": True},
            {"cql_variant": "rho"},
            {"cql_variant": "var"},
        ],
    ),
    "algorithms.discrete.cql_atari": (
        ["atari.md", "discrete_cql.md"],
        [
            {"head": "dqn"},
            {"head": "c51", "holdout_fraction": 0.2},
            {"dr3_coefficient": 0.1},
            {"bc_only": True},
            {"cql_variant": "rho"},
            {"cql_variant": "var"},
        ],
    ),
}


def test_documented_metrics_are_those_that_are_written(script, run):
    pages, variants = PAGES[script.__name__]
    folders = [run(**options, run_id=f"{i}") for i, options in enumerate(variants)]
    written = {name for folder in folders for name in (folder / "metrics.csv").read_text().split("\n")[0].split(",")}
    assert set.union(*map(documented, pages)) == written


def test_options_that_a_page_explains_exist(script):
    """Its section on options holds what --help does not say; names of options there are the script's own."""
    text = section(PAGES[script.__name__][0][0], "Options")
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    explained = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    assert explained and set(explained) <= options_of(script).keys() and len(explained) == len(set(explained))


def blocks(text):
    return [
        block.replace("\\\n", " ").strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    ]


def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    """Those of the first block, with few steps; pip has done its part before tests run."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    few = {
        "collect.py": ["--steps", "300"],
        "import_data.py": [],
        "cql.py": ["--max_timesteps=20", "--eval_freq=20", "--n_episodes=1", "--device=cpu", "--run_id=readme"],
    }
    programs, lines = [], blocks((ROOT / "README.md").read_text())[0]
    assert "pip install -r requirements.txt" in lines and not any("git clone" in line for line in lines)
    for line in lines:
        if line.startswith("python "):
            program, *arguments = shlex.split(line)[1:]
            programs.append(Path(program).name)
            arguments += few[programs[-1]] + ([f"--checkpoints_path={tmp_path}"] if programs[-1] == "cql.py" else [])
            process = subprocess.run([sys.executable, program, *arguments], cwd=ROOT, capture_output=True, text=True)
            assert process.returncode == 0, process.stderr
    assert programs == ["collect.py", "collect.py", "import_data.py", "cql.py"]
    assert (tmp_path / "readme" / "policy.pt").exists()


def test_second_block_of_the_readme_runs_the_tests():
    lines = blocks((ROOT / "README.md").read_text())[1]
    assert "pip install -r requirements-dev.txt" in lines and lines[-1].startswith("python -m pytest")
    assert (ROOT / "requirements-dev.txt").exists()


def test_every_option_that_the_readme_names_exists():
    text = "".join(path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
    commands = re.findall(r"^ *(python algorithms/.*)", text.replace("\\\n", " "), re.MULTILINE)
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        given = {word[2:].split("=")[0] for word in words[2:] if word.startswith("--")}
        assert given <= {*options_of(script), "config_path", "help"}, line
