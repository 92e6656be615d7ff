#!/usr/bin/env bash
# Repeats a study of docs/results.md, docs/combo.md or docs/finetune_cql.md: records its data, trains, and writes
# runs/<study>/* and runs/report-<study>. From the root of the repository:
#   bash benchmarks/studies/results.sh STUDY [option of its runs...]
# STUDY (runs; time on 2 cores): quickstart (15, 40 minutes), lunarlander-continuous (30, half an hour),
# lunarlander-cheaper (18, a quarter of an hour), finetune (9, half an hour), combo (18, each with its own model),
# lunarlander (120, an hour), replay (30), hopper-cheaper (6, half an hour; Minari's data), hopper-finetune (9, from
# hopper/medium-v0).
# The same command again skips runs that are complete and continues the others. Exit status: 0, 2 for another STUDY, or
# that of the first command that failed.
set -euo pipefail
export WANDB_MODE=disabled

collect() { python benchmarks/collect.py --steps 100000 --force "$@"; }

combine() { python benchmarks/import_data.py --force --id "$1" --combine "${@:2}"; } # new dataset, parts

lander() { # data of LunarLanderContinuous
    local id=lunarlander-continuous
    collect --env LunarLanderContinuous-v3 --policy heuristic --noise 0.9 --id $id/medium-v0
    collect --env LunarLanderContinuous-v3 --policy random --id $id/random-v0
    combine $id/random-medium-v0 $id/random-v0 $id/medium-v0
}

discrete_lander() {
    collect --env LunarLander-v3 --policy random --id lunarlander/random-v0
    collect --env LunarLander-v3 --policy heuristic --epsilon 0.25 --id lunarlander/medium-v0
    collect --env LunarLander-v3 --policy heuristic --epsilon 0.02 --id lunarlander/expert-v0
    combine lunarlander/random-medium-v0 lunarlander/random-v0 lunarlander/medium-v0
}

replay() { # configuration of online SAC, its steps, dataset
    python algorithms/finetune/cql.py --config_path "configs/finetune/sac/$1.yaml" --online_iterations "$2" \
        --compile True --run_id "sac-$1"
    python benchmarks/collect.py --replay "runs/sac-$1" --steps "$2" --id "$3" --force
}

study=${1-} options=("${@:2}")
train() { # sweep files
    python benchmarks/commands.py "$@" -- --checkpoints_path "runs/$study" ${options[@]+"${options[@]}"} |
        OMP_NUM_THREADS=1 xargs -rL 1 -P "$(nproc)" env
    python benchmarks/report.py "runs/$study"/* --out "runs/report-$study"
}

case $study in # no `&&` between the steps: bash would pass over a failure inside the first
quickstart)
    collect --env LunarLanderContinuous-v3 --policy random --id lunarlander-continuous/random-v0
    collect --env LunarLanderContinuous-v3 --policy heuristic --noise 0.05 --id lunarlander-continuous/expert-v0
    combine lunarlander-continuous/random-expert-v0 lunarlander-continuous/{random,expert}-v0
    train configs/sweeps/offline/cql/quickstart/*.yaml
    ;;
lunarlander-continuous) lander; train configs/sweeps/offline/cql/lunarlander-continuous/*.yaml ;;
lunarlander-cheaper) lander; train configs/sweeps/offline/cql/lunarlander-cheaper/*.yaml ;;
finetune) lander; train configs/sweeps/finetune/cql/lunarlander-continuous/*.yaml ;;
combo) lander; train configs/sweeps/offline/combo/lunarlander-continuous/*.yaml ;;
lunarlander) discrete_lander; train configs/sweeps/discrete/cql_dqn/lunarlander/*.yaml ;;
replay)
    replay pendulum 4000 pendulum/replay-v0
    replay lunarlander 70000 lunarlander-continuous/replay-v0
    train configs/sweeps/offline/cql/replay/*.yaml
    ;;
hopper-cheaper) train configs/sweeps/offline/cql/hopper-cheaper/*.yaml ;;
hopper-finetune)
    options=(--precision bfloat16 --compile True ${options[@]+"${options[@]}"})
    train configs/sweeps/finetune/cql/hopper/*.yaml
    ;;
*)
    sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2
    exit 2
    ;;
esac
