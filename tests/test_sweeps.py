"""Configurations and sweeps: the files of configs/, the command lines of benchmarks/commands.py under a real xargs, the
SLURM script under stand-ins for what SLURM gives it, and the real `wandb agent` against a stand-in for its server."""

import contextlib
import functools
import importlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import pytest
import torch.distributed.run as torchrun_options
import yaml
from conftest import ROOT, SCRIPTS, once, suited, table
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import Sweep

from benchmarks import commands

PATHS = sorted(ROOT.glob("configs/sweeps/**/*.yaml"))
TEXTS = {path.relative_to(ROOT / "configs/sweeps").as_posix(): path.read_text() for path in PATHS}
SWEEPS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
GRIDS = [name for name, sweep in SWEEPS.items() if sweep["method"] == "grid"]
BENCHMARKS = [name for name, text in TEXTS.items() if text.startswith("# Benchmark: ")]
CONFIGURATIONS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted({*ROOT.glob("configs/*/**/*.yaml")} - {*PATHS})
}


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@functools.cache
def source(name):
    return inspect.getsource(name)


def parse(program, arguments, patch):
    script = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    patch.setattr(inspect, "getsource", source)  # without the cache it is read for every call
    patch.setattr(sys, "argv", [program, *arguments])
    return script.parse_arguments(script.TrainConfig)


@functools.cache
def expand(name):
    return commands.expand(Path("configs/sweeps", name), {})


def listed(sweep, name):
    """The values of a parameter, or the two ends of its range."""
    parameter = sweep["parameters"].get(name, {})
    return parameter.get("values") or [parameter[key] for key in ("value", "min", "max") if key in parameter]


def study(name):
    """The name of a sweep file without .yaml, or that of its folder, whose files are one study."""
    return "/".join(Path(name).with_suffix("").parts[:3])


def braces(word):
    """The words that a shell makes from a word with {a,b}."""
    start, found, end = re.fullmatch(r"([^{]*)(?:\{([^}]*)\})?(.*)", word).groups()
    return [start + x + y for x in found.split(",") for y in braces(end)] if found else [word]


def datasets(path):
    """The datasets that the comment of a configuration lists, by the form of their names."""
    comment = CONFIGURATIONS[path].split("\nenv:")[0]
    words = [name for word in re.findall(r"[\w{][\w{},./-]*-v\d\b", comment) for name in braces(word)]
    return {name for name in words if not re.match(r"[A-Z][\w-]+$", name)}  # these are environments


# The files


def test_configurations_say_only_what_differs_and_how_to_run_them(monkeypatch):
    bodies = []
    for path, text in CONFIGURATIONS.items():
        _, setting, method, *_ = path.split("/")
        program = f"algorithms/{setting}/{'cql' if setting == 'finetune' else method}.py"
        config, stated = parse(program, ["--config_path", path], monkeypatch), yaml.safe_load(text)
        defaults = type(config)()
        assert "env" in stated and "group" not in stated, path
        assert {x for x in stated if getattr(config, x) == getattr(defaults, x)} <= {"env"}, path
        assert all(isinstance(getattr(config, name), type(value)) for name, value in stated.items()), path
        bodies.append((setting, method, {name: value for name, value in stated.items() if name != "env"}))
        assert bodies.count(bodies[-1]) == 1, f"{path} has the settings of another file"
        assert re.search(rf"python {program} (\\\n# +)?--config_path {path}( |\n)", text), path
        assert (config.env == "none") == (method == "sac") and {config.env} - {"none"} <= datasets(path), path
        if setting == "finetune":
            assert (config.calibrate, config.cql_alpha_online == 0) == (method == "cal_ql", method == "sac"), path
    assert len(bodies) > 35


def test_presets_of_published_settings_name_their_code():
    form = r"# Settings: [\w-]+/[\w-]+, [\w/-]+\.(py|sh)( and [\w/-]+\.(py|md))? at commit [0-9a-f]{7}(; .+)?\."
    firsts = {path: text.partition("\n")[0] for path, text in CONFIGURATIONS.items() if "policy_constraint" in path}
    assert {path for path, line in firsts.items() if not re.fullmatch(form, line)} == set() and len(firsts) > 12
    firsts = {path: text.partition("\n")[0] for path, text in CONFIGURATIONS.items() if "cql_atari" in path}
    del firsts["configs/discrete/cql_atari/minatar.yaml"]  # chosen here
    form = r"# Settings: [\w-]+/[\w-]+, .+ at commit [0-9a-f]{7}[.;].*"
    assert {path for path, line in firsts.items() if not re.fullmatch(form, line)} == set() and len(firsts) > 2


def test_there_is_a_configuration_for_every_dataset_of_d4rls_benchmark():
    found = set().union(*(datasets(path) for path in CONFIGURATIONS if path.startswith("configs/offline/cql/")))
    kinds = ["random", "medium", "medium-replay", "medium-expert", "expert", "full-replay"]
    wanted = {f"{task}-{kind}-v2" for task in ("halfcheetah", "hopper", "walker2d") for kind in kinds}
    hands = [(task, kind) for task in ("pen", "door", "hammer", "relocate") for kind in ("human", "cloned", "expert")]
    wanted |= {f"{task}-{kind}-v1" for task, kind in hands} | {f"D4RL/{task}/{kind}-v2" for task, kind in hands}
    wanted |= {f"maze2d-{maze}-v1" for maze in ("umaze", "medium", "large")}
    wanted |= {f"kitchen-{kind}-v0" for kind in ("complete", "partial", "mixed")}
    wanted |= {name for name in common.d4rl() if name.startswith("antmaze-") and name.endswith("-v2")}
    assert wanted <= found and len(wanted) == 54
    assert {name for path in CONFIGURATIONS for name in datasets(path) if "/" not in name} <= common.d4rl().keys()


def test_a_benchmark_lists_all_datasets_of_its_configuration():
    benchmarked = {path: [] for path in CONFIGURATIONS if not re.search("quickstart|bandit", path)}
    for name, sweep in SWEEPS.items():
        for path in listed(sweep, "config_path"):
            envs = listed(sweep, "env")
            assert {*envs} <= datasets(path) or name.startswith("offline/cql/replay/"), name
            if name in BENCHMARKS:
                benchmarked[path] += envs or ["none"]  # online SAC
    assert all(benchmarked.values())
    for path, envs in benchmarked.items():
        if "lunarlander" not in path and "finetune" not in path:  # whose benchmarks take some of the datasets
            assert sorted(envs) == sorted(datasets(path)), path


def test_every_script_has_its_sweeps():
    for script in SCRIPTS:
        _, setting, method = script.split(".")
        program = f"algorithms/{setting}/{method}.py"
        names = {name for name, sweep in SWEEPS.items() if sweep["program"] == program}
        assert names == {name for name in SWEEPS if name.startswith(f"{setting}/{method}/")}
        wanted = {"alpha", "bayes"} | ({"lagrange"} if method == "cql" else set())
        assert {f"{setting}/{method}/{name}.yaml" for name in wanted} <= names
    assert len(SWEEPS) > 30


@pytest.mark.parametrize("name", GRIDS)
def test_the_comment_of_a_grid_counts_its_runs(name):
    comment = TEXTS[name].split("\nprogram:")[0].replace("\n# ", " ")
    n = math.prod(len(listed(SWEEPS[name], x)) for x in SWEEPS[name]["parameters"])
    assert f" {n} runs" in comment and f"wandb sweep configs/sweeps/{name} " in comment
    (pattern,) = re.findall(r"python benchmarks/commands.py (\S+) > commands.txt", comment)
    files = {path.relative_to(ROOT / "configs/sweeps").as_posix() for path in ROOT.glob(pattern)}
    assert files == {x for x in GRIDS if study(x) == study(name)}
    total = sum(len(expand(x)) for x in files)
    assert len(expand(name)) == n and f"sbatch --array=1-{total} " in comment
    assert (len(files) > 1) == (f"all {total} runs of this folder" in comment)


@pytest.mark.parametrize("name", SWEEPS)
def test_values_arrive_as_they_stand_in_the_file(name, monkeypatch):
    """W&B's agent writes each value, or both ends of a range; for a grid commands.py writes the same line."""
    sweep = SWEEPS[name]
    assert sweep.keys() <= {"program", "method", "metric", "early_terminate", "run_cap", "parameters"}
    assert listed(sweep, "group") == [study(name).replace("/", "-")]
    lines = [shlex.split(run.line) for run in expand(name)] if name in GRIDS else []
    values = {x: listed(sweep, x) for x in sweep["parameters"]}
    assert all(values.values())
    for i in range(max(len(x) for key, x in values.items() if key != "env")):
        point = {key: x[i % len(x)] for key, x in values.items()}
        arguments = create_sweep_command_args({"args": {key: {"value": x} for key, x in point.items()}})["args"]
        config = parse(sweep["program"], arguments, monkeypatch)
        for key, value in point.items():
            if key != "config_path":
                assert getattr(config, key) == value and type(getattr(config, key)) is type(value), (key, value)
        assert not lines or ["python", sweep["program"], *arguments] in [line[:-1] for line in lines]


def test_ids_are_unique_legible_and_good_names_of_runs():
    runs = [run for name in GRIDS for run in expand(name)]
    ids = [run.run_id for run in runs]
    assert len(ids) == len(set(ids)) > 700
    assert all(re.fullmatch(r"[\w.=+-]{20,128}", x) for x in ids)
    assert all(shlex.split(run.line)[-1] == f"--run_id={run.run_id}" for run in runs)
    for start in (
        "offline-cql-locomotion-mujoco-hopper-random-v2-seed=3-",
        "finetune-cql-adroit-cal_ql-adroit-pen-cloned",
    ):
        assert any(x.startswith(start) for x in ids), start


@pytest.mark.parametrize("name", [name for name in SWEEPS if name not in GRIDS])
def test_searches_stop_at_evaluations_that_happen(name, monkeypatch):
    sweep = SWEEPS[name]
    metric = "eval_return" if name == "discrete/cql_atari/bayes.yaml" else "d4rl_normalized_score"  # MinAtar has none
    assert sweep["metric"] == {"name": metric, "goal": "maximize"} and sweep["run_cap"] <= 100
    fixed = {key: x["value"] for key, x in sweep["parameters"].items() if "value" in x}
    config = vars(parse(sweep["program"], [f"--{key}={x}" for key, x in fixed.items()], monkeypatch))
    n_steps = config.get("max_timesteps") or config["offline_iterations"] + config["online_iterations"]
    stop = sweep["early_terminate"]
    bands = [stop["max_iter"] / stop["eta"] ** (i + 1) for i in range(stop["s"])]
    assert all(3 <= band == int(band) < n_steps / config["eval_freq"] for band in bands)


def test_the_page_names_files_that_exist_and_counts_their_runs(capsys):
    page = (ROOT / "docs/sweeps.md").read_text()
    for pattern in re.findall(r"configs/sweeps/\S+\.yaml", page):
        assert list(ROOT.glob(pattern)), pattern
    arrays = re.findall(r"commands.py (\S+) > commands.txt\n *sbatch --array=1-(\d+)%", page)
    for pattern, n in arrays:
        commands.main([str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)])
        assert len(capsys.readouterr().out.splitlines()) == int(n)
    assert arrays
    for cell in re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE):
        for name in braces(cell):
            assert list(ROOT.glob(f"configs/sweeps/{name}")), cell


# commands.py


def write(path, method="grid", program="algorithms/offline/cql.py", more=None, **parameters):
    """Writes a sweep file: lists are varied, dicts stay as they are."""
    kinds = {list: lambda x: {"values": x}, dict: lambda x: x}
    parameters = {key: kinds.get(type(x), lambda x: {"value": x})(x) for key, x in parameters.items()}
    sweep = {"program": program, "method": method, "parameters": parameters} | (more or {})
    path.write_text(yaml.dump(sweep, sort_keys=False))
    return path


def lines(capsys, *arguments):
    commands.main([str(x) for x in arguments])
    return capsys.readouterr().out.splitlines()


def ids(*arguments):
    return {shlex.split(line)[-1] for line in lines(*arguments)}


def test_values_are_quoted_and_seeds_come_last_to_change(tmp_path, capsys):
    first = write(tmp_path / "a.yaml", seed=[7, 3], cql_alpha=[1.5, 10], name="it's $HOME; `ls` #", compile=None)
    second = write(tmp_path / "b.yaml", seed=[1], bc_only=True, load_model="")
    found = [line.rsplit(" ", 1)[0] for line in lines(capsys, first, second)]
    start, quoted = "python algorithms/offline/cql.py", """'--name=it'"'"'s $HOME; `ls` #' --compile=None"""
    assert found == [
        f"{start} --seed=7 --cql_alpha=1.5 {quoted}",
        f"{start} --seed=7 --cql_alpha=10 {quoted}",
        f"{start} --seed=1 --bc_only=True --load_model=",
        f"{start} --seed=3 --cql_alpha=1.5 {quoted}",
        f"{start} --seed=3 --cql_alpha=10 {quoted}",
    ]


def test_ids_follow_what_is_run_and_not_how_it_is_written(tmp_path, capsys):
    seen = functools.partial(ids, capsys)
    base = seen(write(tmp_path / "a.yaml", seed=[0, 1], cql_alpha=[1.0, 5.0], batch_size=64))
    assert seen(write(tmp_path / "a.yaml", batch_size=64, cql_alpha=[5.0, 1.0], seed=[1, 0])) == base
    assert seen(os.path.relpath(tmp_path / "a.yaml")) == base
    more = write(tmp_path / "a.yaml", seed=[0, 1, 2], cql_alpha=[1.0, 5.0], batch_size=64)
    assert seen(more) > base, "runs of before go on when the grid grows"
    free = ["--device=cpu", "--max_timesteps", "3", "--checkpoints_path=/x", "--seed", "0"]
    assert seen(more, "--", *free) < base and "--max_timesteps=3 " in lines(capsys, more, "--", *free)[0]
    assert len({*base, *seen(more, "--", "--batch_size", "32"), *seen(more, "--", "--compile", "True")}) == 4 + 6 + 6
    assert not base & seen(write(tmp_path / "b.yaml", seed=[0, 1], cql_alpha=[1.0, 5.0], batch_size=64))
    copied = tmp_path / "edited_cql.py"
    copied.write_text((ROOT / "algorithms/offline/cql.py").read_text())
    options = {"seed": [0, 1], "cql_alpha": [1.0, 5.0], "batch_size": 64}
    assert not base & seen(write(tmp_path / "a.yaml", program=str(copied), **options)), "another script's runs"
    assert len(seen(write(tmp_path / "a.yaml", name=["a b", "a-b", "ä"]))) == 3
    long = {x for run in seen(write(tmp_path / "a.yaml", name=[300 * "a", 300 * "a" + "b"])) for x in run.split("=", 1)}
    assert sorted(map(len, long)) == [len("--run_id"), 128, 128]


@pytest.mark.parametrize("script", SCRIPTS)
def test_free_options_are_those_that_a_resume_may_change(script):
    run = importlib.import_module(script).Run
    assert run.may_change | {"max_timesteps", "online_iterations"} == commands.FREE | {"run_id"}


def test_command_of_the_file(tmp_path, capsys):
    words = ["${env}", "OMP_NUM_THREADS=1", "${interpreter}", "-u", "${program}", "${args}", "--n_episodes", 3]
    (line,) = lines(capsys, write(tmp_path / "a.yaml", seed=0, more={"command": words}))
    wanted = "/usr/bin/env OMP_NUM_THREADS=1 python -u algorithms/offline/cql.py --seed=0 --run_id=.* --n_episodes 3"
    assert re.fullmatch(wanted, line)


BAD = {  # arguments of write -> words of the error
    "random": ({"method": "random", "seed": [0]}, "method random"),
    "bayes": ({"method": "bayes", "seed": {"min": 0, "max": 3}}, "method bayes"),
    "no method": ({"method": None, "seed": [0]}, "method None"),
    "range": ({"seed": {"min": 0, "max": 3}}, "seed"),
    "distribution": ({"qf_lr": {"distribution": "uniform", "min": 0.0, "max": 1.0}}, "qf_lr"),
    "value and values": ({"seed": {"value": 0, "values": [0]}}, "seed"),
    "no value": ({"seed": {}}, "seed"),
    "empty values": ({"seed": []}, "seed"),
    "values no list": ({"seed": {"values": 3}}, "seed"),
    "bare": ({"more": {"parameters": {"seed": 3}}}, "seed"),
    "nested": ({"seed": {"parameters": {"a": {"value": 1}}}}, "nested"),
    "two lines": ({"name": "a\nb"}, "name"),
    "unknown option": ({"sed": [0]}, "sed is not an option"),
    "another script's option": ({"head": ["c51"]}, "head is not an option"),
    "run_id": ({"run_id": "mine"}, "run_id"),
    "missing configuration": ({"config_path": ["configs/no.yaml"]}, "configs/no.yaml"),
    "missing program": ({"program": "algorithms/no.py", "seed": 0}, "algorithms/no.py"),
    "program no script": ({"program": "tests/conftest.py", "seed": 0}, "TrainConfig"),
    "program no Python": ({"program": "README.md", "seed": 0}, "README.md"),
    "no parameters": ({"more": {"parameters": None}}, "parameters"),
    "macro": ({"seed": 0, "more": {"command": ["${program}", "${args_json}"]}}, "args_json"),
    "macro inside": ({"seed": 0, "more": {"command": ["--x=${envvar:X}", "${args}"]}}, "envvar"),
    "command without options": ({"seed": 0, "more": {"command": ["${interpreter}", "${program}"]}}, "${args}"),
    "command a text": ({"seed": 0, "more": {"command": "python x.py"}}, "command"),
    "twice": ({"seed": [0, 0]}, "the same run_id, a-seed=0-"),
    "twice as text": ({"seed": [0, "0"]}, "the same run_id, a-seed=0-"),
}


@pytest.fixture
def refusal(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            commands.main([str(x) for x in arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and not printed.out and printed.err.count("\n") == 1, printed
        assert printed.err.startswith("commands.py: error: ")
        return printed.err

    return call


@pytest.mark.parametrize("name", BAD)
def test_bad_sweeps(name, refusal, tmp_path):
    arguments, named = BAD[name]
    assert named in refusal(write(tmp_path / "a.yaml", **arguments))


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "program: algorithms/offline/cql.py", "\x00"])
def test_bad_files(text, refusal, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    assert "bad.yaml" in refusal(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff")
    assert "bad.yaml" in refusal(tmp_path / "bad.yaml")


def test_bad_command_lines(refusal, tmp_path):
    good = write(tmp_path / "a.yaml", seed=[0])
    assert "no.yaml" in refusal("no.yaml") and str(tmp_path) in refusal(tmp_path) and "SWEEP" in refusal()
    for words in (["cpu"], ["--device"], ["-x", "1"], ["--=1"], ["--a=1", "b"]):
        assert "--name=value" in refusal(good, "--", *words)
    assert "devise" in refusal(good, "--", "--devise=cpu") and "run_id" in refusal(good, "--", "--run_id=x")
    assert "more than one line" in refusal(good, "--", "--name", "a\nb")
    assert "unrecognized" in refusal(good, "--device=cpu") and "same run_id" in refusal(good, good)


# Runs


@pytest.fixture
def start(monkeypatch):
    """Starts a program in a session of its own. Its output and that of its children go to one pipe."""
    processes = []
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # its python has the packages

    def popen(*arguments, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(arguments, start_new_session=True, **pipes | options))
        return processes[-1]

    yield popen
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, what, pause=0.05):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(pause)


def rows(folder):
    """The rows of metrics.csv; none before the file exists."""
    with contextlib.suppress(FileNotFoundError):
        return table(folder)
    return []


def last_step(folder):
    return int(rows(folder)[-1]["step"]) if rows(folder) else 0


PROGRAM = """
import json, sys
from pathlib import Path

class TrainConfig:
    env: str
    name: str
    seed: int

options = [word.removeprefix("--").split("=", 1) for word in sys.argv[1:]]
path = Path(dict(options)["run_id"])
path.write_text(json.dumps(options))
"""


def test_values_pass_through_xargs_unchanged_and_the_same_lines_mean_the_same_runs(
    start, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("a program.py").write_text(PROGRAM)
    names = ["it's $HOME; `ls` #", 'a "b" \\', " -x ", "", [1, 2], "ä", None]
    envs = ["mine/my data-v0", "D4RL/pen/human-v2"]
    path = write(Path("odd.yaml"), program="a program.py", env=envs, name=names, seed=[1])
    found = []
    for _ in range(2):
        Path("commands.txt").write_text("\n".join(lines(capsys, path)) + "\n")
        with open("commands.txt") as file:
            assert start("xargs", "-rL", "1", "env", stdin=file).communicate() == ("", None)
        found.append({x.name: json.loads(x.read_text()) for x in tmp_path.iterdir() if not x.suffix})
    assert found[0] == found[1] and len(found[0]) == len(names) * len(envs)
    wanted = sorted([["env", env], ["name", str(name)], ["seed", "1"]] for env in envs for name in names)
    assert sorted(options[:-1] for options in found[0].values()) == wanted


RUN = """
trap '[ "$2" = slow ] && { until [ -e "run 4.saved" ]; do sleep 0.1; done; sleep 1; }; touch "$1.saved"; exit 138' USR1
trap 'exit 143' TERM
echo "$OMP_NUM_THREADS" >"$1.started"
[ ! -e "$1.saved" ] && [[ "$2" = [ls]* ]] && while :; do sleep 0.02; done
trap '' USR1
touch "$1.done"
[ "$2" != fails ]
"""


@pytest.fixture
def slurm(start, tmp_path, monkeypatch):
    """Starts array.sh as a task with 6 cores and lines `bash run.sh <name> <kind>`; scontrol notes its arguments."""
    (tmp_path / "run.sh").write_text(RUN)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)

    def task(number, *kinds, **variables):
        monkeypatch.chdir(tmp_path)
        Path("commands.txt").write_text("".join(f"bash run.sh 'run {i}' {kind}\n" for i, kind in enumerate(kinds, 1)))
        given = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_JOB_ID": 77, "SLURM_CPUS_PER_TASK": 6} | variables
        environment = {key: x for key, x in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {key: str(x) for key, x in given.items()} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return start("bash", ROOT / "benchmarks/slurm/array.sh", "commands.txt", env=environment)

    return task


def made(kind):
    return sorted(path.stem for path in Path.cwd().glob(f"*.{kind}"))


def test_slurm_task_runs_its_lines(slurm):
    assert slurm(2, "", "", "").communicate() == ("", None) and made("done") == ["run 2"]
    assert slurm(2, *5 * [""], RUNS_PER_TASK=3).wait() == 0 and made("done") == ["run 2", "run 4", "run 5"]
    threads = {name: Path(f"{name}.started").read_text().strip() for name in made("started")}
    assert threads == {"run 2": "6", "run 4": "2", "run 5": "2"}
    assert slurm(1, "", SLURM_CPUS_PER_TASK=1, RUNS_PER_TASK=2).wait() == 0
    assert Path("run 1.started").read_text() == "1\n" and not Path("requeued").exists()


def test_slurm_time_limit_saves_and_requeues_what_is_not_complete(slurm):
    kinds = "slow", "", "fails", "long"
    process = slurm(1, *kinds, RUNS_PER_TASK=4)
    wait_for(lambda: len(made("started")) == 4 and len(made("done")) == 2, "the runs")
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 138 and made("saved") == ["run 1", "run 4"] and made("done") == ["run 2", "run 3"]
    assert Path("requeued").read_text() == "requeue 77_1\n"
    assert slurm(1, *kinds, RUNS_PER_TASK=4).wait() == 1, "the status of the one that fails"
    assert made("done") == ["run 1", "run 2", "run 3", "run 4"] and Path("requeued").read_text().count("\n") == 1


def test_slurm_ends_that_do_not_requeue(slurm):
    process = slurm(1, "long")
    wait_for(lambda: made("started"), "the run")
    process.send_signal(signal.SIGTERM)  # SLURM itself requeues what it preempts, but not what its user cancels
    assert process.wait() == 143
    assert slurm(1, "fails").wait() == 1 and not Path("requeued").exists()
    for number, lacks in ((3, "line 3 for task 3"), (0, "line 0 for task 0")):
        printed, _ = slurm(number, "", "").communicate()
        assert lacks in printed and printed.count("\n") == 1
    assert "sbatch" in slurm("", "").communicate()[0]
    assert "RUNS_PER_TASK" in slurm(1, "", RUNS_PER_TASK=0).communicate()[0]


SRUN = """#!/usr/bin/env bash
trap 'echo USR1 >>signals; exit 1' USR1
trap 'echo TERM >>signals; exit 1' TERM
printf '%s\\n' "$@" >words
echo "$OMP_NUM_THREADS $WANDB_RUN_ID" >started
[ ! -e signals ] && [ -e long ] && while :; do sleep 0.02; done
[ ! -e fails ]
"""


@pytest.fixture
def nodes(start, tmp_path, monkeypatch):
    """Starts torchrun.sh as a job on two machines with four GPUs and 16 cores each."""
    control = f'[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" >>{tmp_path}/requeued'
    for name, text in (("srun", SRUN), ("scontrol", f"#!/bin/sh\n{control}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def job(*words, **variables):
        given = {"SLURM_JOB_ID": 20077, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": 2}
        given |= {"SLURM_GPUS_ON_NODE": 4, "SLURM_CPUS_PER_TASK": 16} | variables
        environment = {key: x for key, x in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {key: str(x) for key, x in given.items()} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return start("bash", ROOT / "benchmarks/slurm/torchrun.sh", *words, env=environment)

    return job


def test_slurm_job_on_several_machines(nodes):
    assert nodes("a.py", "--name=a b").communicate() == ("", None)
    *words, script, option = Path("words").read_text().splitlines()
    assert (script, option) == ("a.py", "--name=a b") and Path("started").read_text() == "4 cql-20077\n"
    wanted = {"--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d", "--rdzv_endpoint=node7:20077"}
    assert wanted < {*words} and not Path("requeued").exists()
    known = torchrun_options.get_args_parser()  # refuses what it does not know
    assert known.parse_args([*words[words.index("torchrun") + 1 :], script]).signals_to_handle.endswith(",SIGUSR1")
    assert nodes("a.py", PROCESSES_PER_NODE=8, WANDB_RUN_ID="mine").wait() == 0
    assert Path("started").read_text() == "2 mine\n" and "--nproc_per_node=8" in Path("words").read_text()


def test_slurm_job_is_put_back_when_its_time_is_over(nodes):
    Path("long").touch()
    for name, requeued in (("USR1", True), ("TERM", False)):
        Path("started").unlink(missing_ok=True)
        process = nodes("a.py")
        wait_for(lambda: Path("started").exists(), "srun")
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.wait() == 1 and Path("signals").read_text() == f"{name}\n"
        assert Path("requeued").exists() == requeued
        Path("signals").unlink(), Path("requeued").unlink(missing_ok=True)
    Path("long").unlink(), Path("fails").touch()
    assert nodes("a.py").wait() == 1 and not Path("requeued").exists()
    for words, variables, lacks in (([], {}, "name a script"), (["a.py"], {"SLURM_GPUS_ON_NODE": ""}, "GPUs")):
        printed, _ = nodes(*words, **variables).communicate()
        assert lacks in printed and printed.count("\n") == 1


# W&B's agent

AGENT = """
from wandb.cli.cli import cli
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.5  # seconds instead of 5
cli()
"""


@once
def test_agents_finish_a_sweep_through_preemption_and_a_dead_server(script, tiny, start, tmp_path):
    """The first of two runs is preempted with its agent. Another agent takes the second run, and then the first one
    again; the server dies while it trains."""
    options = {"eval_env": "none", "eval_freq": 50, "checkpoints_path": str(tmp_path / "runs")}
    fixed = {key: x for key, x in suited(script, **options).items() if key != "run_id"}
    path = write(tmp_path / "toy.yaml", **fixed | {"max_timesteps": [800, 20]})
    environment = {key: x for key, x in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_API_KEY": 40 * "0", "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
    folders = {f"run{i}": tmp_path / "runs" / f"run{i}" for i in range(2)}
    agents = []
    with contextlib.closing(Sweep(yaml.safe_load(path.read_text()))) as server:

        def start_agent():
            arguments = sys.executable, "-c", AGENT, "agent", "--forward-signals", "e/p/s"
            where = environment | {"WANDB_BASE_URL": server.address}
            with open(tmp_path / f"agent{len(agents)}.txt", "w") as log:
                agents.append(start(*arguments, env=where, stdout=log))

        start_agent()
        first = folders["run0"]
        wait_for(lambda: rows(first), "a row")
        agents[0].terminate()
        wait_for(lambda: server.exit_codes["run0"], "its end")
        before = table(first)
        assert 0 < last_step(first) < 800 and server.exit_codes["run0"] == [1]
        start_agent()  # as a scheduler would
        wait_for(lambda: len(server.handed) == 3, "its second start")
        server.later = "refused"
        wait_for(lambda: server.fault, "the server's death")
    ends = {folder: server.grid[run]["max_timesteps"] for run, folder in folders.items()}
    wait_for(lambda: all(last_step(folder) == end for folder, end in ends.items()), "the end of all")
    for agent in agents:
        wait_for(lambda: agent.poll() is not None or agent.terminate(), "the agents", pause=0.5)  # noqa: B023
    assert server.handed == [("0", "run0"), ("1", "run1"), ("1", "run0")]
    for name, folder in folders.items():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert server.grid[name].items() <= config.items() and config["run_id"] == name
    assert server.exit_codes["run0"] == [1], "the server died too late"
    steps = [row["_step"] for row in server.history["run0"]]
    assert steps and steps == sorted(set(steps))
    logs = "".join(path.read_text() for path in tmp_path.glob("agent*.txt"))
    starts = [int(step) for step in re.findall(rf"{first}: updates (\d+) to 800", logs)]
    assert len(starts) == 2 and max(starts) >= int(before[-1]["step"]) and table(first)[: len(before)] == before
