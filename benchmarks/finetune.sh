#!/usr/bin/env bash
# Offline training, then online, three seeds each: CQL, CQL with half of each online minibatch from the data, and Cal-QL (which mixes so, too).
# From the root of the repository; LunarLanderContinuous takes half an hour on 2 cores (a run a core):
#   bash benchmarks/finetune.sh lunarlander-continuous && python benchmarks/summarize.py benchmarks/results/finetune
# Hopper needs a recorded dataset hopper/medium-v0: bash benchmarks/finetune.sh hopper --precision bfloat16 --compile True
set -euo pipefail
out=benchmarks/results/finetune
domain=$1
shift
export MINARI_DATASETS_PATH=${MINARI_DATASETS_PATH:-$PWD/runs/minari} WANDB_MODE=disabled OMP_NUM_THREADS=1
mkdir -p "$out"
[ "$domain" != lunarlander-continuous ] || python benchmarks/collect.py --env LunarLanderContinuous-v3 --steps 100000 --force \
    --id $domain/medium-v0 --policy heuristic --noise 0.9

run() { # method, folder of the configuration, seed, options
    local name=$domain-$1-$3
    rm -rf "runs/$name"
    python algorithms/finetune/cql.py --config_path "configs/finetune/$2/$domain/medium.yaml" --seed "$3" --run_id "$name" "${@:4}"
    cp "runs/$name/metrics.csv" "$out/$domain-$1-seed$3.csv"
}
export -f run
export out domain
for seed in 0 1 2; do
    printf '%s\n' "cql cql $seed $*" "mixed cql $seed --mixing_ratio=0.5 $*" "calql cal_ql $seed $*"
done | xargs -P "$(nproc)" -L 1 bash -c 'run "$@"' run
