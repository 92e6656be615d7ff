#!/usr/bin/env bash
# Repeats the measurements of docs/choosing_evidence.md. From the root of the repository, one part after the other:
#   bash benchmarks/studies/choosing.sh verdicts       # 27 runs; benchmarks/results/diagnose
#   bash benchmarks/studies/choosing.sh calibration    # 9 runs that the thresholds were set on
#   bash benchmarks/studies/choosing.sh alphas         # 9 runs with several cql_alpha; benchmarks/results/diagnose/alphas
#   bash benchmarks/studies/choosing.sh fqe            # fitted Q evaluation of these; benchmarks/results/fqe
#   bash benchmarks/studies/choosing.sh support        # 10 discrete runs, and which of them fqe.py ranks
#   bash benchmarks/studies/choosing.sh remedies       # 15 runs that over-fit, and remedies; runs/report-remedies
# A run takes about a minute on one core, and one that is complete is skipped. Exit status: 0, 2 for another part, or
# that of the first command that failed.
set -euo pipefail
export WANDB_MODE=disabled OMP_NUM_THREADS=1
lander="lunarlander-continuous" results=benchmarks/results/diagnose

record() { # dataset, steps, seed, options
    python benchmarks/collect.py --policy heuristic --id "$1" --steps "$2" --seed "$3" --force "${@:4}"
}
record_continuous() { record "$lander/$1-v0" "$2" "$3" --env LunarLanderContinuous-v3 --noise 0.9; }
record_discrete() { record "lunarlander/$1-v0" "$2" "$3" --env LunarLander-v3 --epsilon 0.25; }

continuous() { # name, held-out share, updates, updates between evaluations, options
    python algorithms/offline/cql.py --config_path configs/offline/cql/lunarlander.yaml --batch_size 64 \
        --n_episodes 10 --keep_policies True --run_id "$lander-$1-seed$seed" --seed "$seed" \
        --holdout_fraction "$2" --max_timesteps "$3" --eval_freq "$4" "${@:5}"
}
discrete() {
    python algorithms/discrete/cql_dqn.py --config_path configs/discrete/cql_dqn/lunarlander.yaml \
        --n_episodes 10 --keep_policies True --run_id "lunarlander-$1-seed$seed" --seed "$seed" \
        --holdout_fraction "$2" --max_timesteps "$3" --eval_freq "$4" "${@:5}"
}

verdicts() {
    record_continuous medium 100000 0
    record_continuous small 5000 5000
    record_continuous scarce 3000 7000
    record_discrete medium 100000 0
    record_discrete small 5000 5000
    for seed in 0 1 2; do
        continuous medium-cql 0.1 6000 300
        continuous medium-tiny 0.1 6000 300 --hidden_dim 4
        continuous medium-few 0.1 500 50
        continuous scarce-cql 0.3 6000 300 --qf_lr 1e-3 --env $lander/scarce-v0
        discrete medium-cql 0.1 10000 500
        discrete medium-tiny 0.1 10000 500 --hidden_dim 4
        discrete medium-few 0.1 500 50
    done
    for seed in 1 2; do
        discrete small-cql 0.2 10000 500 --env lunarlander/small-v0
    done
    for seed in 0 1; do
        continuous scarce-bc 0.3 6000 300 --bc_only True --env $lander/scarce-v0
    done
    seed=0
    continuous small-cql 0.2 6000 300 --env $lander/small-v0
    discrete small-bc 0.2 5000 250 --bc_only True --env lunarlander/small-v0
    for run in runs/lunarlander*-seed[012]; do cp "$run/metrics.csv" "$results/${run#runs/}.csv"; done
    python benchmarks/diagnose.py $results/*.csv >$results/verdicts.txt
    python benchmarks/diagnose.py $results/lunarlander-{medium-cql,medium-tiny,small-cql}-seed1.csv \
        $results/$lander-{medium-cql,medium-tiny,scarce-cql}-seed0.csv --output $results/curves.png
}

calibration() {
    record_continuous calibration 5000 6000
    record_continuous scarce-calibration 3000 8000
    record_discrete calibration 5000 6000
    seed=10
    continuous calibration-cql 0.2 6000 300 --env $lander/calibration-v0
    continuous calibration-bc 0.2 6000 300 --env $lander/calibration-v0 --bc_only True
    continuous calibration-scarce 0.3 6000 300 --qf_lr 1e-3 --env $lander/scarce-calibration-v0
    continuous medium-tiny 0.1 6000 300 --hidden_dim 4
    discrete medium-cql 0.1 10000 500
    discrete medium-tiny 0.1 10000 500 --hidden_dim 4
    discrete medium-few 0.1 500 50
    discrete calibration-cql 0.2 20000 1000 --env lunarlander/calibration-v0
    discrete calibration-bc 0.2 5000 250 --env lunarlander/calibration-v0 --bc_only True
}

alphas() {
    local shared="--seed 1 --eval_seed 1000 --keep_policies True --holdout_fraction 0.1"
    for alpha in 0 1 5 25; do
        python algorithms/offline/cql.py --config_path configs/offline/cql/lunarlander.yaml --cql_alpha $alpha $shared \
            --run_id continuous-alpha$alpha-seed1
        cp runs/continuous-alpha$alpha-seed1/metrics.csv $results/alphas/$lander-medium-alpha$alpha-seed1.csv
    done
    for alpha in 0 0.01 0.1 1 10; do
        python algorithms/discrete/cql_dqn.py --config_path configs/discrete/cql_dqn/lunarlander.yaml \
            --cql_alpha $alpha $shared --eval_freq 1000 --compile True --run_id discrete-alpha$alpha-seed1
        cp runs/discrete-alpha$alpha-seed1/metrics.csv $results/alphas/lunarlander-medium-alpha$alpha-seed1.csv
    done
    for kind in $lander lunarlander; do python benchmarks/diagnose.py $results/alphas/$kind-medium-*.csv; done
}

fqe() {
    local out=benchmarks/results/fqe
    python benchmarks/fqe.py runs/continuous-alpha{0,1,5,25}-seed1 --env $lander/medium-v0 --fit_share 1 \
        --output runs/c1.csv
    python benchmarks/fqe.py runs/discrete-alpha{0,0.1,1}-seed1 --env lunarlander/medium-v0 --fit_share 1 \
        --output runs/d1.csv
    python benchmarks/fqe.py runs/discrete-alpha10-seed1 --env lunarlander/medium-v0 --fit_share 1 --output runs/d2.csv
    python benchmarks/fqe.py runs/discrete-alpha0.01-seed1 --env lunarlander/medium-v0 --fit_share 1 --output runs/d3.csv
    python benchmarks/studies/choices.py runs/continuous-alpha{0,1,5,25}-seed1 --fqe runs/c1.csv --output $out/$lander.csv
    python benchmarks/studies/choices.py runs/discrete-alpha{0,0.01,0.1,1,10}-seed1 --fqe runs/d{1,2,3}.csv \
        --output $out/lunarlander.csv
}

support() {
    local seed alpha
    record_discrete medium 100000 0
    for seed in 4 5; do
        for alpha in 0 0.01 0.1 1 10; do
            python algorithms/discrete/cql_dqn.py --config_path configs/discrete/cql_dqn/lunarlander.yaml \
                --cql_alpha $alpha --seed $seed --eval_seed 1000 --keep_policies True --eval_freq 2500 \
                --run_id medium-alpha$alpha-seed$seed
        done
        python benchmarks/fqe.py runs/medium-alpha*-seed$seed --env lunarlander/medium-v0 --output runs/s$seed.csv
    done
    python benchmarks/studies/choices.py runs/medium-alpha*-seed[45] --fqe runs/s[45].csv \
        --output benchmarks/results/fqe/lunarlander-support.csv
    python benchmarks/collect.py --policy random --env LunarLander-v3 --id lunarlander/random-v0 --steps 100000 \
        --seed 0 --force
    python benchmarks/fqe.py runs/medium-alpha*-seed4 --env lunarlander/random-v0 --output runs/r4.csv
    python benchmarks/studies/choices.py runs/medium-alpha*-seed4 --fqe runs/r4.csv \
        --output benchmarks/results/fqe/lunarlander-support-random.csv
}

remedies() {
    record lunarlander/noisy-v0 5000 9000 --env LunarLander-v3 --epsilon 0.5
    remedy() { # name, options; the options were chosen on training seed 0 and evaluation seed 0
        for seed in 1 2 3; do
            discrete "noisy-$1" 0.2 10000 500 --env lunarlander/noisy-v0 --cql_alpha 10 --batch_size 128 --qf_lr 3e-3 \
                --eval_seed 1000 --n_episodes 20 --name "$1" --checkpoints_path runs/remedies "${@:2}"
        done
    }
    remedy unchanged
    remedy decay --weight_decay 0.3
    remedy dropout --dropout 0.2
    remedy norm --critic_layer_norm True
    remedy small --hidden_dim 32
    python benchmarks/report.py runs/remedies/* --out runs/report-remedies
    python benchmarks/diagnose.py runs/remedies/*-{unchanged,decay,dropout}-seed1 --output runs/report-remedies/diagnose.png
}

case ${1-} in
verdicts | calibration | alphas | fqe | support | remedies) "$1" ;;
*)
    sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2
    exit 2
    ;;
esac
