#!/usr/bin/env bash
# Repeats the measurements of docs/policy_constraint.md. From the root of the repository, one part after the other:
#   bash benchmarks/studies/constraints.sh data     # records both datasets of the study
#   bash benchmarks/studies/constraints.sh tuning   # 14 runs with seed 100; runs/report-constraints-tuning
#   bash benchmarks/studies/constraints.sh study    # 60 runs: ten methods, two datasets; runs/report-constraints
#   bash benchmarks/studies/constraints.sh door     # 3 long runs on D4RL's door-human, to be imported first
#   bash benchmarks/studies/constraints.sh hopper   # online SAC, then 3 long runs on all that it met
# A run that is complete is skipped, and one that was stopped continues. Exit status: 0, 2 for another part, or that of
# the first command that failed.
set -euo pipefail
export WANDB_MODE=disabled OMP_NUM_THREADS=1
lander=lunarlander-continuous

cql() { python algorithms/offline/cql.py --config_path "configs/offline/cql/$1.yaml" "${@:2}"; }
constraint() { # method, options
    python algorithms/offline/policy_constraint.py --config_path "configs/offline/policy_constraint/$1/lunarlander.yaml" \
        "${@:2}"
}

data() {
    record() { python benchmarks/collect.py --env LunarLanderContinuous-v3 --steps 100000 --force "$@"; }
    record --policy random --id $lander/random-v0
    record --policy heuristic --noise 0.05 --id $lander/expert-v0
    python benchmarks/import_data.py --combine $lander/{random,expert}-v0 --id $lander/random-expert-v0 --force
    python algorithms/finetune/cql.py --config_path configs/finetune/sac/pendulum.yaml --online_iterations 4000 \
        --compile True --run_id sac-pendulum
    python benchmarks/collect.py --replay runs/sac-pendulum --steps 4000 --id pendulum/replay-v0 --force
}

tuning() { # two values of one option per method, on the lander's data
    tune() { # run_id, command
        "${@:2}" --seed 100 --checkpoints_path runs/constraints-tuning --run_id "$1"
    }
    for x in 2.5 10; do tune td3_bc-$x constraint td3_bc --eval_freq 8000 --q_scale $x; done
    for x in 0.1 1; do
        tune brac_p-$x constraint brac_p --eval_freq 10000 --divergence_weight $x
        tune brac_v-$x constraint brac_v --eval_freq 10000 --divergence_weight $x
    done
    for x in 0.05 0.2; do tune bear-$x constraint bear --eval_freq 8000 --divergence_threshold $x; done
    for x in 0.05 0.15; do tune bcq-$x constraint bcq --eval_freq 8000 --max_perturbation $x; done
    for variant in rho var; do
        for x in 1 5; do
            tune $variant-$x cql quickstart --eval_freq 8000 --name "CQL($variant)" --cql_variant $variant --cql_alpha $x
        done
    done
    python benchmarks/report.py runs/constraints-tuning --out runs/report-constraints-tuning
}

study() { # options other than a preset's were chosen by the tuning
    all() { # dataset, updates, options of all runs
        shared="--checkpoints_path runs/constraints --seed $seed --max_timesteps $2 ${*:3}"
        # shellcheck disable=SC2086
        {
            cql quickstart $shared --run_id "$1-bc-seed$seed" --name BC --bc_only True
            cql quickstart $shared --run_id "$1-sac-seed$seed" --name SAC --cql_alpha 0
            cql quickstart $shared --run_id "$1-cql_h-seed$seed" --name "CQL(H)"
            for variant in rho var; do
                cql quickstart $shared --run_id "$1-cql_$variant-seed$seed" --name "CQL($variant)" \
                    --cql_variant $variant --cql_alpha 1
            done
            for method in td3_bc bear; do constraint $method $shared --run_id "$1-$method-seed$seed"; done
            for method in brac_p brac_v; do # after 2,000 updates of the clone
                constraint $method $shared --max_timesteps $(($2 + 2000)) --run_id "$1-$method-seed$seed"
            done
            constraint bcq $shared --run_id "$1-bcq-seed$seed" $bcq
        }
    }
    for seed in 0 1 2; do
        bcq="--max_perturbation 0.15"
        all lander 8000
        bcq="--max_perturbation 0.05"
        all pendulum 4000 --env pendulum/replay-v0 --eval_freq 1000
    done
    python benchmarks/report.py runs/constraints --out runs/report-constraints
}

door() {
    long() { cql adroit --env door-human-v1 --max_timesteps 100000 --n_episodes 25 "$@"; }
    fast="--cql_backprop_actions 2 --precision bfloat16 --compile True"
    long --run_id door-bc --name BC --bc_only True
    # shellcheck disable=SC2086
    {
        long --run_id door-cql-h --name CQL-H $fast
        long --run_id door-cql-rho --name CQL-rho --cql_variant rho $fast
    }
}

hopper() {
    python algorithms/finetune/cql.py --config_path configs/finetune/sac/hopper.yaml --eval_freq 10000 --compile True \
        --keep_policies True --online_iterations 100000 --run_id sac-hopper
    python benchmarks/collect.py --replay runs/sac-hopper --steps 100000 --id hopper/replay-v0 --force
    long() { "$@" --env hopper/replay-v0 --max_timesteps 100000 --eval_freq 10000; }
    long cql mujoco --run_id hopper-bc --name BC --bc_only True
    long python algorithms/offline/policy_constraint.py --run_id hopper-td3_bc
    long cql mujoco --run_id hopper-cql --cql_backprop_actions 2 --precision bfloat16 --compile True
}

case ${1-} in
data | tuning | study | door | hopper) "$1" ;;
*)
    sed -n 's/^# \{0,1\}//; 2,9p' "$0" >&2
    exit 2
    ;;
esac
