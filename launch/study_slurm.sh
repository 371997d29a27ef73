#!/usr/bin/env bash
# For: a study on a cluster. Every task of the array is a worker; all share the study through a server, which is the queue.
# On: Slurm, one GPU a task, and a PostgreSQL (or MySQL) server that all nodes reach; a file system that they share for
# the runs' folders. Two minutes before its time is up, a worker saves and ends; its task is queued again and goes on.
# How long: as many jobs as it takes. Workers may come and go at any time.
# Usage, in this folder and with the Python environment active:
#   sbatch --array 0-7 --time 4:00:00 launch/study_slurm.sh --trials 50 --data DIR --output DIR \
#       --storage postgresql://USER@HOST/NAME
# NOT TRIED on a Slurm cluster; workers that share a PostgreSQL server, and SIGTERM to them, were tried without one.
#SBATCH --job-name=matchai-study
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch, which this script is for}" # Slurm runs a copy of this file, elsewhere
is_noticed=false
python -m matchai.tune "$@" &
worker=$!
trap 'is_noticed=true; kill -TERM "$worker"' TERM
status=0
wait "$worker" || status=$?
if "$is_noticed"; then # and so that wait ended before the worker
    status=0
    wait "$worker" || status=$?
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
