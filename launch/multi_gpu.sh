#!/usr/bin/env bash
# For: training on your own slices on several GPUs of one host, one process for each.
# On: one host; all its visible GPUs, or NUM_PROCESSES of them.
# How long: depends on the slices, the settings and the GPUs. A step still takes `batch_size` slices over all GPUs.
# Usage: [NUM_PROCESSES=N] launch/multi_gpu.sh --data DIR [any other setting]
set -euo pipefail
cd "$(dirname "$0")/.."
num_processes=${NUM_PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$num_processes" -lt 2 ]; then
    echo "error: $num_processes GPU visible; launch/one_gpu.sh is the script for one." >&2
    exit 2
fi
exec accelerate launch --quiet --config_file accelerate_config.yaml \
    --multi_gpu --num_processes "$num_processes" -m matchai.train "$@"
