#!/usr/bin/env bash
# Runs the lines of a file that benchmarks/commands.py wrote as a SLURM array: one line per task, at most 20 at a time,
#   sbatch --array=1-90%20 --gres=gpu:1 benchmarks/slurm/array.sh commands.txt
# or several lines side by side per task, which share its GPU and its cores (90 lines make 23 tasks of four):
#   RUNS_PER_TASK=4 sbatch --array=1-23 --cpus-per-task=4 --gres=gpu:1 benchmarks/slurm/array.sh commands.txt
# Call sbatch in the root of the repository with the virtual environment activated: the tasks inherit the environment.
# Options on the command line override those below; your cluster may need --partition, --account and --mem.
# Two minutes before the time limit SLURM sends USR1. This script passes it on to the runs, which save and exit with
# 138, and puts the task back into the queue, where the same lines continue from their checkpoints. It passes TERM on,
# too; SLURM itself puts a preempted job back into the queue. Exit status: 0, or that of the last line that failed.
# Tested with stand-ins for SLURM's variables, signals and scontrol; sbatch itself has not been tried.
#SBATCH --job-name=cql
#SBATCH --cpus-per-task=2
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
set -uo pipefail
file=${1:?array.sh: name a file of commands: sbatch --array=1-<tasks> benchmarks/slurm/array.sh commands.txt}
task=${SLURM_ARRAY_TASK_ID:?array.sh: start it with sbatch --array=1-<tasks>}
n_runs=${RUNS_PER_TASK:-1} children=() received="" n_signals=0 stopped="" status=0
[[ $n_runs =~ ^[1-9][0-9]*$ ]] || { echo "array.sh: RUNS_PER_TASK must be a number from 1, not $n_runs" >&2 && exit 1; }
threads=$((${SLURM_CPUS_PER_TASK:-1} / n_runs))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

receive() { # signal
    received=$1 n_signals=$((n_signals + 1))
    kill -s "$1" "${children[@]}" 2>/dev/null
}
trap 'receive USR1' USR1
trap 'receive TERM' TERM

first=$(((task - 1) * n_runs + 1))
mapfile -t lines < <(sed -n "$first,$((first + n_runs - 1))p" "$file" 2>/dev/null)
if ((task < 1 || ${#lines[@]} == 0)); then
    echo "array.sh: $file has no line $first for task $task (tasks count from 1)" >&2
    exit 1
fi
for line in "${lines[@]}"; do
    bash -c "exec $line" &
    children+=($!)
    [[ -z $received ]] || kill -s "$received" $! 2>/dev/null # the signal came before this line started
done
for child in "${children[@]}"; do
    while
        before=$n_signals
        wait "$child"
        code=$?
        ((n_signals > before)) # a signal ended the wait, perhaps not the run
    do :; done
    ((code == 0)) || status=$code
    ((code != 138)) || stopped=yes # 128 + USR1: saved but not complete
done
if [[ $received == USR1 && -n $stopped ]]; then
    # By array and task: the last task of an array has the array's own id, which would put back the whole array.
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$task"
fi
exit "$status"
