#!/usr/bin/env bash
# Repeats the measurements of docs/atari.md on two games of MinAtar. From the root of the repository, in this order:
#   bash benchmarks/studies/minatar.sh data     # trains DQN on both games and stores what it met; 5 % of it, too
#   bash benchmarks/studies/minatar.sh tuning   # 4 runs with seed 100 on one dataset; runs/report-minatar-tuning
#   bash benchmarks/studies/minatar.sh study    # 36 runs: three methods, two games, two sizes; runs/report-minatar
#   bash benchmarks/studies/minatar.sh weight   # 6 runs of CQL with four times the weight; runs/report-minatar-weight
#   bash benchmarks/studies/minatar.sh long     # 2 runs of four times as many updates; runs/report-minatar-long
# The data took 19 minutes per game on one busy core. A run that is complete is skipped, and one that was stopped
# continues. Exit status: 0, 2 for another part, or that of the first command that failed.
set -euo pipefail
export WANDB_MODE=disabled OMP_NUM_THREADS=1

data() {
    collect() { # game, its name in ids
        python benchmarks/collect_frames.py --env "MinAtar/$1-v1" --steps 500000 --id "minatar/$2-replay-v0" \
            --curve "benchmarks/results/minatar/$2-online.csv" --force
        python benchmarks/import_data.py --frames "minatar/$2-replay-v0" --transitions 25000 \
            --id "minatar/$2-replay-5-v0" --force
    }
    collect Breakout breakout
    collect SpaceInvaders space-invaders
}

train() { # run_id, dataset, seed, options
    python algorithms/discrete/cql_atari.py --config_path configs/discrete/cql_atari/minatar.yaml --compile True \
        --run_id "$1" --env "minatar/$2-v0" --seed "$3" "${@:4}"
}

tuning() { # chose cql_alpha 0.5
    for alpha in 0.02 0.1 0.5 2; do
        train "alpha-$alpha" breakout-replay-5 100 --checkpoints_path runs/minatar-tuning --max_timesteps 20000 \
            --cql_alpha $alpha
    done
    python benchmarks/report.py runs/minatar-tuning --out runs/report-minatar-tuning
}

study() {
    method() { # name, options
        train "$dataset-$1-seed$seed" "$dataset" "$seed" --checkpoints_path runs/minatar --name "$1" "${@:2}"
    }
    for seed in 0 1 2; do
        for dataset in {breakout,space-invaders}-replay{,-5}; do
            method BC --bc_only True
            method QR-DQN --cql_alpha 0
            method CQL
        done
    done
    python benchmarks/report.py runs/minatar --out runs/report-minatar
}

weight() {
    for seed in 0 1 2; do
        for dataset in space-invaders-replay{,-5}; do
            train "$dataset-CQL-2-seed$seed" "$dataset" $seed --checkpoints_path runs/minatar-weight --name CQL-2 \
                --cql_alpha 2
        done
    done
    python benchmarks/report.py runs/minatar-weight --out runs/report-minatar-weight
}

long() {
    for dataset in {breakout,space-invaders}-replay; do
        train "$dataset-CQL-seed0" "$dataset" 0 --checkpoints_path runs/minatar-long --name CQL --max_timesteps 200000
    done
    python benchmarks/report.py runs/minatar-long --out runs/report-minatar-long
}

case ${1-} in
data | tuning | study | weight | long) "$1" ;;
*)
    sed -n 's/^# \{0,1\}//; 2,9p' "$0" >&2
    exit 2
    ;;
esac
