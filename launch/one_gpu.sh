#!/usr/bin/env bash
# For: training on your own slices on one GPU.
# On: one host; the first visible GPU (choose another with CUDA_VISIBLE_DEVICES=1 in front).
# How long: depends on the slices, the settings and the GPU; the progress bar tells the time left.
# Usage: launch/one_gpu.sh --data DIR [any other setting]
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --quiet --config_file accelerate_config.yaml -m matchai.train "$@"
