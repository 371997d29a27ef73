#!/usr/bin/env bash
# For: a study on one host: searches the loss weights, focal gamma, sampler weight and max learning rate.
# On: any machine; one worker for each GPU (at least one), which WORKERS changes.
# How long: trials times the time of a run, divided by the workers, plus 12 confirming runs. It may be stopped or killed
# at any time; the same command resumes.
# Usage: launch/study.sh --trials 50 --data DIR [any setting of `python -m matchai.tune --help-all`]
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
exec python -m matchai.tune --workers "${WORKERS:-$((gpus > 1 ? gpus : 1))}" "$@"
