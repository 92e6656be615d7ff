#!/usr/bin/env bash
# CQL, offline SAC (cql_alpha 0) and behaviour cloning, five seeds each, on replay data: all transitions of a run of online SAC from its first
# random action until it acts at medium level. From the root of the repository, a run a core:
#   bash benchmarks/replay.sh && python benchmarks/summarize.py benchmarks/results/replay
set -euo pipefail
out=benchmarks/results/replay
n_runs=$(nproc) # side by side; nproc heeds OMP_NUM_THREADS
export MINARI_DATASETS_PATH=${MINARI_DATASETS_PATH:-$PWD/runs/minari} WANDB_MODE=disabled OMP_NUM_THREADS=1
mkdir -p "$out"

record() { # domain, online steps, after which its policy is of medium level
    python algorithms/finetune/cql.py --config_path "configs/finetune/sac/$1.yaml" --online_iterations "$2" --compile True --run_id "sac-$1"
    cp "runs/sac-$1/metrics.csv" "$out/online-$1.csv"
    python benchmarks/collect.py --replay "runs/sac-$1" --steps "$2" --id "$1/replay-v0" --force
}
record pendulum 4000
record lunarlander-continuous 70000

run() { # domain, method, its option, seed
    local name=$1-replay-$2-$4
    rm -rf "runs/$name"
    python algorithms/offline/cql.py --config_path configs/offline/cql/lunarlander-continuous/medium.yaml --env "$1/replay-v0" \
        --max_timesteps 10000 --eval_freq 2000 "$3" --seed "$4" --run_id "$name"
    cp "runs/$name/metrics.csv" "$out/$1-replay-$2-seed$4.csv"
}
export -f run
export out
for domain in pendulum lunarlander-continuous; do
    for seed in 0 1 2 3 4; do
        printf '%s\n' "$domain cql --cql_alpha=5 $seed" "$domain sac --cql_alpha=0 $seed" "$domain bc --bc_only=True $seed"
    done
done | xargs -P "$n_runs" -L 1 bash -c 'run "$@"' run
