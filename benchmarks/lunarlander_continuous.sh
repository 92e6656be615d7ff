#!/usr/bin/env bash
# CQL, offline SAC (cql_alpha 0) and behaviour cloning, five seeds each, on LunarLanderContinuous: a noisy controller's data, and the same mixed
# with random data. From the root of the repository, about half an hour on 2 cores (a run a core):
#   bash benchmarks/lunarlander_continuous.sh && python benchmarks/summarize.py benchmarks/results/lunarlander-continuous
set -euo pipefail
domain=lunarlander-continuous
out=benchmarks/results/$domain
n_runs=$(nproc) # side by side; nproc heeds OMP_NUM_THREADS
export MINARI_DATASETS_PATH=${MINARI_DATASETS_PATH:-$PWD/runs/minari} WANDB_MODE=disabled OMP_NUM_THREADS=1
mkdir -p "$out"

collect() { python benchmarks/collect.py --env LunarLanderContinuous-v3 --steps 100000 --force "$@"; }
collect --id $domain/medium-v0 --policy heuristic --noise 0.9
collect --id $domain/random-v0 --policy random
rm -rf "$MINARI_DATASETS_PATH/$domain/random-medium-v0"
minari combine $domain/random-v0 $domain/medium-v0 --dataset-id $domain/random-medium-v0

run() { # dataset, method, its option, seed
    local name=$domain-$1-$2-$4
    rm -rf "runs/$name"
    python algorithms/offline/cql.py --config_path configs/offline/cql/$domain/$1.yaml "$3" --seed "$4" --run_id "$name"
    cp "runs/$name/metrics.csv" "$out/$1-$2-seed$4.csv"
}
export -f run
export domain out
for dataset in medium random-medium; do
    for seed in 0 1 2 3 4; do
        printf '%s\n' "$dataset cql --cql_alpha=5 $seed" "$dataset sac --cql_alpha=0 $seed" "$dataset bc --bc_only=True $seed"
    done
done | xargs -P "$n_runs" -L 1 bash -c 'run "$@"' run
