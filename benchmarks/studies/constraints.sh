#!/usr/bin/env bash
# Repeats the measurements of docs/policy_constraint.md. From the root of the repository, one part after the other:
#   bash benchmarks/studies/constraints.sh tuning   # 32 runs with seed 100; benchmarks/results/policy-constraint/tuning
#   bash benchmarks/studies/constraints.sh study    # 60 runs, ten methods on two datasets; runs/report-constraints
#   bash benchmarks/studies/constraints.sh door     # 3 long runs on D4RL's door-human, to be imported first
#   bash benchmarks/studies/constraints.sh hopper   # online SAC, then 3 long runs on all that it met
# A run that is complete is skipped, and one that was stopped continues. Exit status: 0, 2 for another part, or that of
# the first command that failed.
set -euo pipefail
export WANDB_MODE=disabled OMP_NUM_THREADS=1
presets=configs/offline/policy_constraint

cql() { python algorithms/offline/cql.py --config_path configs/offline/cql/quickstart.yaml "$@"; }
constraint() { python algorithms/offline/policy_constraint.py --config_path "$presets/$1.yaml" "${@:2}"; }

collect() { # data of both datasets
    bash benchmarks/studies/results.sh quickstart-data
}
