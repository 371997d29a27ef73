#!/usr/bin/env bash
# For: a study whose trials are too large for one GPU: each trial is trained on all GPUs of this host together.
# On: one host with several GPUs; PROCESSES says how many (default: all).
# How long: trials times the time of a run. The same command resumes after any interruption, on any number of GPUs.
# Usage: launch/study_ddp.sh --trials 50 --data DIR [any setting of `python -m matchai.tune --help-all` but --workers]
# NOT TRIED on GPUs; tried on two CPU processes (ACCELERATE_USE_CPU=1 PROCESSES=2).
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
processes=${PROCESSES:-$gpus}
[ "$processes" -gt 1 ] || {
    echo "error: one GPU or none was found; use launch/study.sh, or set PROCESSES." >&2
    exit 2
}
exec accelerate launch --quiet --multi_gpu --num_processes "$processes" --num_machines 1 --main_process_port 0 \
    -m matchai.tune "$@"
