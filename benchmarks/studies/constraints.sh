#!/usr/bin/env bash
# Repeats the measurements of docs/policy_constraint.md. From the root of the repository, one part after the other:
#   bash benchmarks/studies/constraints.sh data     # records both datasets of the study
#   bash benchmarks/studies/constraints.sh tuning   # 14 runs with seed 100; runs/constraints-tuning
#   bash benchmarks/studies/constraints.sh study    # 60 runs: ten methods, two datasets; runs/report-constraints
#   bash benchmarks/studies/constraints.sh door     # 3 long runs on D4RL's door-human, to be imported first
#   bash benchmarks/studies/constraints.sh hopper   # online SAC, then 3 long runs on all that it met
# A run that is complete is skipped, and one that was stopped continues. Exit status: 0, 2 for another part, or that of
# the first command that failed.
set -euo pipefail
export WANDB_MODE=disabled OMP_NUM_THREADS=1
lander=lunarlander-continuous pendulum="--env pendulum/replay-v0 --eval_freq 1000"

offline() { python algorithms/offline/cql.py "$@"; }
constraint() { # preset, options
    python algorithms/offline/policy_constraint.py --config_path "configs/offline/policy_constraint/$1.yaml" "${@:2}"
}

data() {
    for policy in "random" "heuristic --noise 0.05"; do
        id=$lander/$([[ $policy = random ]] && echo random || echo expert)-v0
        # shellcheck disable=SC2086
        python benchmarks/collect.py --env LunarLanderContinuous-v3 --policy $policy --steps 100000 --id "$id" --force
    done
    python benchmarks/import_data.py --id $lander/random-expert-v0 --combine $lander/{random,expert}-v0 --force
    python algorithms/finetune/cql.py --config_path configs/finetune/sac/pendulum.yaml --online_iterations 4000 \
        --compile True --run_id sac-pendulum
    python benchmarks/collect.py --replay runs/sac-pendulum --steps 4000 --id pendulum/replay-v0 --force
}
