#!/usr/bin/env bash
# Learning curves of what makes updates cheaper, on LunarLanderContinuous medium, three seeds each: products in bfloat16,
# and back-propagation through k drawn actions. From the root of the repository, about a quarter of an hour on 2 cores:
#   bash benchmarks/lunarlander_cheaper.sh && python benchmarks/summarize.py benchmarks/results/lunarlander-cheaper
set -euo pipefail
domain=lunarlander-continuous
out=benchmarks/results/lunarlander-cheaper
n_runs=$(nproc) # side by side; nproc heeds OMP_NUM_THREADS
export MINARI_DATASETS_PATH=${MINARI_DATASETS_PATH:-$PWD/runs/minari} WANDB_MODE=disabled OMP_NUM_THREADS=1
mkdir -p "$out"
python benchmarks/collect.py --env LunarLanderContinuous-v3 --steps 100000 --force --id $domain/medium-v0 \
    --policy heuristic --noise 0.9

run() { # name, seed, precision, cql_backprop_actions
    rm -rf "runs/$1-$2"
    python algorithms/offline/cql.py --config_path configs/offline/cql/$domain/medium.yaml --seed "$2" --run_id "$1-$2" \
        --precision "$3" --cql_backprop_actions "$4"
    cp "runs/$1-$2/metrics.csv" "$out/medium-$1-seed$2.csv"
}
export -f run
export domain out
for seed in 0 1 2; do
    printf '%s\n' "float32 $seed float32 0" "bfloat16 $seed bfloat16 0" "k1 $seed float32 1" "k2 $seed float32 2" \
        "k4 $seed float32 4" "bfloat16k2 $seed bfloat16 2"
done | xargs -P "$n_runs" -L 1 bash -c 'run "$@"' run
