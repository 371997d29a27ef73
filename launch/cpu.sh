#!/usr/bin/env bash
# For: training on your own slices without a GPU, even where there is one.
# On: one CPU host, one process that uses all its cores.
# How long: depends on the slices, the image size and the cores. The recipe (384 x 384, 60 epochs) is meant for a GPU;
# `--image-size 128 --encoder resnet18 --encoder-weights none` makes it smaller.
# Usage: launch/cpu.sh --data DIR [any other setting]
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --quiet --config_file accelerate_config.yaml --cpu -m matchai.train "$@"
