#!/usr/bin/env bash
# Discrete actions, five seeds each, on LunarLander: behaviour cloning, offline double DQN (cql_alpha 0), and CQL with
# each head, with DR3 too; data of random actions, of Gymnasium's controller with a quarter and with 2 % of random
# actions, and of the first two together. Settings were chosen on training seed 0 and evaluation seed 0, which are not
# used here. From the root of the repository, about an hour on 2 cores (a run a core):
#   bash benchmarks/lunarlander.sh && python benchmarks/summarize.py benchmarks/results/lunarlander
set -euo pipefail
domain=lunarlander
out=benchmarks/results/$domain
n_runs=$(nproc) # side by side; nproc heeds OMP_NUM_THREADS
export MINARI_DATASETS_PATH=${MINARI_DATASETS_PATH:-$PWD/runs/minari} WANDB_MODE=disabled OMP_NUM_THREADS=1
mkdir -p "$out"

collect() { python benchmarks/collect.py --env LunarLander-v3 --steps 100000 --force "$@"; }
collect --id $domain/random-v0 --policy random
collect --id $domain/medium-v0 --policy heuristic --epsilon 0.25
collect --id $domain/expert-v0 --policy heuristic --epsilon 0.02
rm -rf "$MINARI_DATASETS_PATH/$domain/random-medium-v0"
minari combine $domain/random-v0 $domain/medium-v0 --dataset-id $domain/random-medium-v0

run() { # dataset, seed, method, its options
    local dataset=$1 seed=$2 method=$3 name=$domain-$1-$3-$2
    rm -rf "runs/$name"
    python algorithms/discrete/cql_dqn.py --config_path configs/discrete/cql_dqn/$domain/$dataset.yaml "${@:4}" \
        --seed "$seed" --eval_seed 1000 --compile True --run_id "$name"
    cp "runs/$name/metrics.csv" "$out/$dataset-$method-seed$seed.csv"
}
export -f run
export domain out
for seed in 1 2 3 4 5; do
    for dataset in random medium expert random-medium; do
        printf "$dataset $seed %s\n" "bc --bc_only=True" "dqn --cql_alpha=0" "cql --head=dqn" "dr3 --dr3_coefficient=0.001" \
            "c51 --head=c51" "qr --head=qr"
    done
done | xargs -P "$n_runs" -L 1 bash -c 'run "$@"' run
