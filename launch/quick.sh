#!/usr/bin/env bash
# For: a first look. Trains the `quick` preset on the built-in synthetic phantom, with no download.
# On: any machine; the GPU if there is one, else the CPU.
# How long: meant for about two minutes on two free CPU cores; the run prints its own pace as it goes.
# Usage: launch/quick.sh [any setting of `python -m matchai.train --help-all`]
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --quiet --config_file accelerate_config.yaml -m matchai.train --preset quick "$@"
