#!/usr/bin/env bash
# For: training under Slurm, on one node or several. Two minutes before the job's time is up it saves, ends and is
# queued again, and then goes on by the same command; so it does after a pre-emption or the failure of a node.
# On: nodes with the same number of GPUs that see one file system; one torchrun a node, through launch/multi_node.sh.
# NOT TRIED on a Slurm cluster. Tried without one, on CPUs: this script with stand-ins for srun and scontrol, on one
# host and on two network namespaces, and SIGUSR1 and SIGTERM to torchrun with two processes. Each time the state was
# saved and the same command went on.
# How long: as many jobs as it takes.
# Usage, in this folder and with the Python environment active; what stands before the script wins over its #SBATCH:
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 --time 4:00:00 launch/slurm.sh --data DIR --output DIR [...]
#SBATCH --job-name=matchai
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch, which this script is for}" # Slurm runs a copy of this file, elsewhere

fail() {
    echo "error: $1" >&2
    exit 2
}

[ -f launch/multi_node.sh ] || fail "submit this in the folder that holds launch/, not in $PWD."
torchrun --help | grep -e --signals-to-handle >/dev/null || fail "this torchrun dies of SIGUSR1; update torch."
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${SLURM_GPUS_PER_NODE:-} # as in 4 or a100:4
export NUM_HOSTS=$SLURM_JOB_NUM_NODES PROCESSES_PER_HOST="${PROCESSES_PER_HOST:-${gpus##*:}}"
[ -n "$PROCESSES_PER_HOST" ] || fail "give sbatch --gpus-per-node, or set PROCESSES_PER_HOST."
# of the job's own, as two jobs may share a node
export RENDEZVOUS=$first_node:$((20000 + SLURM_JOB_ID % 10000)) RUN_ID=$SLURM_JOB_ID
# srun takes it from here alone
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# 30 s, torchrun's own choice, may be less than a step and the save after it take
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-110}"

is_noticed=false
srun launch/multi_node.sh "$@" &
step=$!
# SIGUSR1, as srun hands it on to every torchrun; at SIGTERM it would kill them
trap 'is_noticed=true; kill -USR1 "$step"' USR1
status=0
wait "$step" || status=$?
if "$is_noticed"; then # and so that wait ended before the step
    status=0
    wait "$step" || status=$?
    # a stopped torchrun ends with 1, and with 0 only where the training was finished
    [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
