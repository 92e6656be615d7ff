"""Print the runs of sweep files as command lines, one line per run, for xargs, GNU parallel or a SLURM array.

    python benchmarks/commands.py configs/sweeps/offline/cql/locomotion/*.yaml > commands.txt
    xargs -rL 1 -P 4 env < commands.txt                    # or: parallel -j 4 < commands.txt
    sbatch --array=1-90 benchmarks/slurm/array.sh commands.txt

A sweep file is one that `wandb sweep` takes. Options after -- go into each line and override the file's:

    python benchmarks/commands.py configs/sweeps/offline/cql/alpha.yaml -- --device cuda:1 --max_timesteps 20000

Each line has a --run_id of its own: the file's name, the values that vary, and a hash of the script's path and of all
options but those that a resumed run may change. So the same lines, run again, continue the runs that were stopped and
skip those that are complete. The runs of several files are sorted by seed, so that a study that is stopped early has
the first seeds of everything. (Without -r, an empty file would make xargs call env, which prints the environment and
the keys in it.)

Only grids of given values have lines: in bayes and random searches W&B's server chooses the values of each run (use
wandb sweep and wandb agent). Run this program and its lines in the repository's root. Exit status: 0, or 2 with one
line on stderr.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MACROS = ("${interpreter}", "${program}", "${args}")  # the words of `command` in W&B; its default is ${env} and these
# Options that do not change a run's id: a run may be resumed with other values of them (the scripts' Run.may_change,
# and the options that make a run longer).
FREE = {
    "device", "n_episodes", "keep_policies", "project", "group", "name", "checkpoints_path", "max_timesteps",
    "online_iterations",
}  # fmt: skip


class Run(NamedTuple):
    seed: int  # its index in the file's list of seeds
    run_id: str
    line: str


@functools.cache
def option_names(program: str) -> set[str]:
    """The names of a script's options, the fields of its TrainConfig. Does not import torch. Raises ValueError."""
    for node in ast.parse(Path(program).read_text(), program).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainConfig":
            names = {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
            return names - {"run_id"} | {"config_path"}
    raise ValueError(f"{program} has no TrainConfig")


def parse_extra(words: list[str]) -> dict[str, str]:
    """The options in words of the form --name=value or --name value. Raises ValueError."""
    text = "".join(word + "\0" for word in words)
    if not re.fullmatch(r"(--[^\0=]+[=\0][^\0]*\0)*", text):
        raise ValueError(f"options after -- have the form --name=value or --name value, not {shlex.join(words)}")
    return dict(re.findall(r"--([^\0=]+)[=\0]([^\0]*)\0", text))


def choices(name: str, parameter: Any) -> list[str]:
    """The values of a sweep's parameter, as W&B's agent writes them. Raises ValueError."""
    keys = set(parameter) - {"distribution"} if isinstance(parameter, dict) else set()
    if "parameters" in keys:
        raise ValueError(f"the parameter {name} is nested, but the scripts' options are flat")
    values = parameter["values"] if keys == {"values"} else [parameter["value"]] if keys == {"value"} else None
    if not isinstance(values, list) or not values:
        raise ValueError(f"the parameter {name} needs either `value` or a list of `values`")
    return [str(value) for value in values]


def identity(path: Path, program: str, varied: list[str], options: dict[str, str]) -> str:
    """A run's --run_id: legible, and the same for the same run."""
    _, folder, name = path.resolve().with_suffix("").as_posix().rpartition("/sweeps/")
    words = [name if folder else path.stem]  # configs/sweeps/offline/cql/alpha.yaml: offline-cql-alpha
    for name in sorted(varied):
        value = options[name]
        if name == "config_path":  # configs/finetune/cal_ql/adroit.yaml: cal_ql-adroit
            words += Path(value).with_suffix("").parts[-2:]
        else:
            words.append(value if name == "env" else f"{name}={value}")
    hashed = [program, *(f"{name}={options[name]}" for name in sorted(options.keys() - FREE | set(varied)))]
    digest = hashlib.sha256("\0".join(hashed).encode()).hexdigest()[:8]
    legible = re.sub(r"[^\w.=+-]+", "-", "-".join(words), flags=re.ASCII)
    return f"{legible[: 127 - len(digest)]}-{digest}"  # W&B takes at most 128 characters


def expand(path: Path, extra: dict[str, str]) -> list[Run]:
    """The runs of a sweep file. Raises OSError, SyntaxError, ValueError and yaml.YAMLError."""
    sweep = yaml.safe_load(path.read_text())
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or "program" not in sweep:
        raise ValueError("it is not a sweep file, as it lacks `program` or `parameters`")
    if sweep.get("method") != "grid":
        raise ValueError(f"method {sweep.get('method')} needs W&B (wandb sweep, wandb agent): only grids have lines")
    program, command = str(sweep["program"]), sweep.get("command", list(MACROS))
    macros = [word for word in map(str, command) if "${" in word] if isinstance(command, list) else [command]
    if not {"${args}"} <= set(macros) <= {"${env}", *MACROS}:
        raise ValueError(
            f"`command` must be a list with ${{args}} and no macros but ${{env}}, {', '.join(MACROS)}, not {command}"
        )
    grid = {str(name): choices(name, parameter) for name, parameter in sweep["parameters"].items()}
    varied = [name for name, parameter in sweep["parameters"].items() if "values" in parameter]
    grid |= {name: [value] for name, value in extra.items()}
    for name in grid.keys() - option_names(program):
        raise ValueError(
            f"{name} is not an option of {program}" if name != "run_id" else "run_id is set by commands.py"
        )
    for name in (name for name, values in grid.items() if "\n" in "".join(values)):
        raise ValueError(f"a value of {name} has more than one line")
    for name in grid.get("config_path", []):
        Path(name).open().close()
    runs = []
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values))
        options["run_id"] = identity(path, program, varied, options)
        words = {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"], "${program}": [program]}
        words["${args}"] = [f"--{name}={value}" for name, value in options.items()]
        line = shlex.join(part for word in map(str, command) for part in words.get(word, [word]))
        seed = grid["seed"].index(options["seed"]) if "seed" in grid else 0
        runs.append(Run(seed, options["run_id"], line))
    return runs


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="commands.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"commands.py: error: {' '.join(str(message).split())}\n")
    parser.add_argument(
        "sweeps", nargs="+", type=Path, metavar="SWEEP.yaml", help="sweep files; after --, options for all runs"
    )
    sweeps, runs, path = parser.parse_args(argv[:split]).sweeps, [], None
    try:
        extra = parse_extra(argv[split + 1 :])
        for path in sweeps:
            runs += expand(path, extra)
    except OSError as error:
        parser.error(f"{path}: {error.filename}: {error.strerror} (run it in the repository's root)")
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        parser.error(f"{path}: {error}" if path else error)
    ids = [run.run_id for run in runs]
    if twice := [run_id for run_id in ids if ids.count(run_id) > 1]:
        parser.error(f"two runs have the same run_id, {twice[0]}")
    for run in sorted(runs, key=lambda run: run.seed):  # a stable sort
        print(run.line)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is not an error
    main()
