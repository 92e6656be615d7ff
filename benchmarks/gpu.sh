#!/usr/bin/env bash
# Measures all that is measured on an NVIDIA GPU, in less than twelve minutes. A step that fails or takes too long does not
# stop the others.
# From the root of the repository:
#   bash benchmarks/gpu.sh ../CORL
# The argument (default: $CORL) is a checkout of https://github.com/corl-team/CORL, the peer of speed.py. It is optional.
# Writes to benchmarks/results/gpu: steps.csv (exit status and seconds of each step, 124: timed out), tests.txt, speed.csv,
# LunarLanderContinuous runs, alone (alone-seed0.csv) and four at once (four-seed<n>.csv), with memory.csv, the GPU's MB
# and share of time in use at each second of these runs; runs of cql_atari.py on random images, alone (atari.csv) and by
# torchrun with one process per GPU (atari-torchrun.csv). What the steps print goes to runs/gpu.
# DEVICE=cpu tries the steps with short settings; then everything goes to runs/gpu.
set -uo pipefail
peer=${1:-${CORL:-}}
export DEVICE=${DEVICE:-cuda} logs=$PWD/runs/gpu WANDB_MODE=disabled
if [[ $DEVICE == cpu ]]; then
    out=$logs factor=5 job="--windows 1 --seconds 0.2 --batch 32" selected=any_type
    export n_steps=2000 n_images=500 n_gpus=2 short="--max_timesteps 200 --eval_freq 100 --n_episodes 2"
    export short_atari="--max_timesteps 6 --eval_freq 3"
elif python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    out=benchmarks/results/gpu factor=1 job="--windows 5 --seconds 1" selected=
    export n_steps=100000 n_images=50000 short= short_atari="--max_timesteps 4000 --eval_freq 1000"
    export n_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
else
    echo "gpu.sh: torch finds no NVIDIA GPU here, so nothing is measured"
    exit 0
fi
rm -rf "$out" "$logs"
mkdir -p "$out" "$logs"
export MINARI_DATASETS_PATH=$logs/minari

step() { # name, seconds at most, command
    local name=$1 status=0 begin=$SECONDS
    timeout --kill-after=5 $(($2 * factor)) "${@:3}" >"$logs/$name.log" 2>&1 || status=$?
    echo "$name,$status,$((SECONDS - begin))" | tee -a "$out/steps.csv"
}

collect() {
    python benchmarks/collect.py --env LunarLanderContinuous-v3 --policy heuristic --noise 0.9 --steps "$n_steps" \
        --id lunarlander-continuous/medium-v0
}

train() { # seed
    python algorithms/offline/cql.py --config_path configs/offline/cql/lunarlander.yaml $short \
        --device "$DEVICE" --seed "$1" --checkpoints_path "$logs" --run_id "seed$1"
}

images() { # episodes of 100 random images
    python -c 'import h5py, sys, numpy as np
path, n = sys.argv[1], int(sys.argv[2])
with h5py.File(path, "w") as file:
    file["observations"] = np.random.default_rng(0).integers(256, size=(n, 84, 84), dtype=np.uint8)
    file["actions"], file["rewards"] = np.arange(n) % 6, np.arange(n) % 7 == 0
    file["terminals"] = np.arange(n) % 100 == 99' "$logs/images.hdf5" "$n_images" &&
        python benchmarks/import_data.py "$logs/images.hdf5" --id random/images-v0
}

atari() { # run_id, command that starts the script
    "${@:2}" algorithms/discrete/cql_atari.py --env random/images-v0 --eval_env none --device "$DEVICE" \
        --checkpoints_path "$logs" --run_id "$1" $short_atari
}
export -f collect train images atari

echo "step,status,seconds" >"$out/steps.csv"
step collect 60 bash -c collect
step tests 170 python -m pytest -q tests/test_gpu.py -k "$selected"
grep -E "passed|failed|^FAILED|^ERROR" "$logs/tests.log" >"$out/tests.txt"
speed="python benchmarks/speed.py --device $DEVICE --output $out/speed.csv $job"
[[ -n $peer ]] || echo "gpu.sh: no checkout of CORL is given, so speed.py has no peer"
step speed 150 $speed ${peer:+--peer "$peer"} --variants compile=False - precision=tf32 \
    precision=bfloat16,cql_backprop_actions=2
step speed-discrete 70 $speed --script discrete/cql_dqn --observation 8 --action 4 --layers 2 --variants compile=False - \
    head=c51
step speed-combo 70 $speed --script offline/combo --variants real_ratio=1 -
step speed-model 50 $speed --script offline/combo --part model --variants dynamics_members=1,dynamics_elites=1 -
step speed-rollouts 30 $speed --script offline/combo --part rollouts
step speed-constraint 70 $speed --script offline/policy_constraint --layers 2 --variants target_update_period=1 \
    policy=perturbation,behaviour=vae,divergence=none,n_target_actions=10,target_update_period=1
step speed-atari 90 $speed --script discrete/cql_atari --batch 32 --variants compile=False - encoder=impala \
    precision=bfloat16
step images 30 bash -c images
step atari 60 bash -c 'atari atari python'
step atari-torchrun 60 bash -c 'atari atari-torchrun torchrun --standalone --nproc_per_node="$n_gpus"'
nvidia-smi --query-gpu=timestamp,memory.used,utilization.gpu --format=csv,nounits -l 1 >"$out/memory.csv" 2>/dev/null &
watcher=$!
step alone 60 bash -c 'train 0'
step four 80 bash -c 'printf "%s\n" 1 2 3 4 | xargs -P 4 -I{} bash -c "train {}"'
kill "$watcher" 2>/dev/null
for seed in 0 1 2 3 4; do
    cp "$logs/seed$seed/metrics.csv" "$out/$([[ $seed == 0 ]] && echo alone || echo four)-seed$seed.csv"
done 2>/dev/null
for run in atari atari-torchrun; do
    cp "$logs/$run/metrics.csv" "$out/$run.csv"
done 2>/dev/null
tail -qn 1 "$logs"/{tests,alone,four}.log
