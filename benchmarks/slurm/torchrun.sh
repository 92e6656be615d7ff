#!/usr/bin/env bash
# Trains one run of algorithms/discrete/cql_atari.py on the GPUs of several machines, one process each:
#   sbatch --nodes=2 --gres=gpu:8 benchmarks/slurm/torchrun.sh algorithms/discrete/cql_atari.py --env atari/pong-v0
# Call sbatch in the root of the repository with the virtual environment activated: the job inherits the environment.
# All machines read $MINARI_DATASETS_PATH, and the first one writes the run folder, which is named after the job unless
# --run_id is given. Options on the command line override those below; your cluster may need --partition and --account.
# Three minutes before the time limit SLURM sends USR1. This script passes it on to the processes, which save and stop,
# and puts the job back into the queue, where it continues. It passes TERM on, too; SLURM itself puts a preempted job
# back into the queue. The processes have 150 seconds for it, in which an evaluation must end. Exit status: srun's.
# Tested with stand-ins for SLURM's variables, signals, srun and scontrol; sbatch itself has not been tried.
#SBATCH --job-name=cql
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail
: "${1:?torchrun.sh: name a script and its options: sbatch benchmarks/slurm/torchrun.sh algorithms/discrete/cql_atari.py}"
job=${SLURM_JOB_ID:?torchrun.sh: start it with sbatch}
n_processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?torchrun.sh: ask for GPUs, or set PROCESSES_PER_NODE}}
threads=$((${SLURM_CPUS_PER_TASK:-1} / n_processes)) received="" n_signals=0 child=""
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
export WANDB_RUN_ID=${WANDB_RUN_ID:-cql-$job} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

receive() { # signal
    received=$1 n_signals=$((n_signals + 1))
    kill -s "$1" $child 2>/dev/null
}
trap 'receive USR1' USR1
trap 'receive TERM' TERM
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$n_processes" \
    --rdzv_backend=c10d --rdzv_endpoint="$host:$((20000 + job % 20000))" --rdzv_id="$job" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 "$@" &
child=$!
[[ -z $received ]] || kill -s "$received" "$child" 2>/dev/null # the signal came before it started
while
    before=$n_signals
    wait "$child"
    status=$?
    ((n_signals > before)) # a signal ended the wait, perhaps not srun
do :; done
if [[ $received == USR1 && $status != 0 ]]; then # torchrun's status does not tell what was saved from what failed
    scontrol requeue "$job"
fi
exit "$status"
