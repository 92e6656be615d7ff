#!/usr/bin/env bash
# Learning curves of exact updates in float32, and of cheaper ones (bfloat16, back-propagation through two drawn actions),
# on Hopper data: two critic layers, 10,000 updates, three seeds each. From the root of the repository, about half an
# hour on 2 cores; DATA is any Minari id of Hopper data (default: Minari's own medium data, which are downloaded):
#   DATA=... bash benchmarks/hopper_cheaper.sh && python benchmarks/summarize.py benchmarks/results/hopper-cheaper
set -euo pipefail
export DATA=${DATA:-mujoco/hopper/medium-v0} WANDB_MODE=disabled
out=benchmarks/results/hopper-cheaper
n_runs=$(nproc) # side by side; nproc heeds OMP_NUM_THREADS
export OMP_NUM_THREADS=1
mkdir -p "$out"

run() { # name, seed, precision, cql_backprop_actions
    rm -rf "runs/hopper-$1-$2"
    python algorithms/offline/cql.py --env "$DATA" --policy_lr 1e-4 --q_n_hidden_layers 2 --max_timesteps 10000 \
        --eval_freq 2000 --seed "$2" --run_id "hopper-$1-$2" --precision "$3" --cql_backprop_actions "$4"
    cp "runs/hopper-$1-$2/metrics.csv" "$out/hopper-medium-$1-seed$2.csv"
}
export -f run
export out
for seed in 0 1 2; do
    printf '%s\n' "float32 $seed float32 0" "bfloat16k2 $seed bfloat16 2"
done | xargs -P "$n_runs" -L 1 bash -c 'run "$@"' run
