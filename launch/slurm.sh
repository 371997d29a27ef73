#!/usr/bin/env bash
# For: training under Slurm, on one node or several; with `tune` as the first word, a study, of which every task of a job
# array is a worker. Two minutes before the job's time is up it saves, ends and is queued again, and then resumes by the
# same command; so it does after a pre-emption or the failure of a node.
# On: for training, nodes with the same number of GPUs that see one file system; one torchrun a node, through
# launch/multi_node.sh. For a study, one GPU a task, a PostgreSQL (or MySQL) server that all nodes reach, and a file system
# that they share for the runs' folders; workers may come and go at any time.
# NOT TRIED on a Slurm cluster. Tried without one, on CPUs: this script with stand-ins for srun and scontrol, on one
# host and on two network namespaces, and SIGUSR1 and SIGTERM to torchrun with two processes. Each time the state was
# saved and the same command resumed. Workers that share a PostgreSQL server, and SIGTERM to them, were tried, too.
# How long: as many jobs as it takes.
# Usage, in this folder and with the Python environment active; what stands before the script wins over its #SBATCH:
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 --time 4:00:00 launch/slurm.sh --data DIR --output DIR [...]
#   sbatch --array 0-7 --gpus 1 --time 4:00:00 launch/slurm.sh tune --trials 50 --data DIR --output DIR \
#       --storage postgresql://USER@HOST/NAME
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

is_noticed=false
pass_on() {
    is_noticed=true
    kill "-$notice" "$work"
}

if [ "${1:-}" = tune ]; then
    shift
    notice=TERM
    python -m matchai.tune "$@" &
    trap pass_on TERM
else
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
    # as srun hands it on to every torchrun; at SIGTERM it would kill them
    notice=USR1
    srun launch/multi_node.sh "$@" &
fi
work=$!
trap pass_on USR1
status=0
wait "$work" || status=$?
if "$is_noticed"; then # and so that wait ended before the work
    status=0
    wait "$work" || status=$?
    # a stopped torchrun ends with 1, and with 0 only where the training was finished; a stopped worker ends with 0
    [ "$notice" = USR1 ] && [ "$status" -eq 0 ] ||
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
