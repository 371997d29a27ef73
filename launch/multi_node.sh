#!/usr/bin/env bash
# For: training on several hosts, by torchrun's rendezvous. UNTESTED on real hosts.
# On: NUM_HOSTS hosts with PROCESSES_PER_HOST GPUs each. Start it on every host with the same settings. All hosts must
# see the same --data, --output and --cache folders (a shared file system), as process 0 writes for all.
# How long: depends on the slices, the settings, the GPUs and the network between the hosts.
# Usage, on every host:
#   NUM_HOSTS=2 PROCESSES_PER_HOST=4 RENDEZVOUS=host0:29500 launch/multi_node.sh --data DIR --output DIR [...]
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NUM_HOSTS:?how many hosts}" "${PROCESSES_PER_HOST:?processes on each host}" "${RENDEZVOUS:?HOST:PORT of one host}"
exec torchrun --nnodes "$NUM_HOSTS" --nproc_per_node "$PROCESSES_PER_HOST" \
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "${RUN_ID:-matchai}" -m matchai.train "$@"
