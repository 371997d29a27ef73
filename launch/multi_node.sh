#!/usr/bin/env bash
# For: training on several hosts, by torchrun's rendezvous.
# On: NUM_HOSTS hosts with PROCESSES_PER_HOST GPUs each, which all see the same --data, --output and --cache folders (a
# shared file system), as process 0 writes for all, and reach one another on every port. HOST is one of them, by a name
# or an address; start it first, or within a minute of the others, and all within ten minutes.
# Tried on two network namespaces of one Linux host, on CPUs, by address and by name; UNTESTED on two real hosts and
# with NCCL.
# How long: depends on the slices, the settings, the GPUs and the network between the hosts.
# Usage, the same on every host (with ACCELERATE_USE_CPU=1 in front, on CPUs):
#   NUM_HOSTS=2 PROCESSES_PER_HOST=4 RENDEZVOUS=HOST:29500 launch/multi_node.sh --data DIR --output DIR [...]
# With MAX_RESTARTS=3 the training resumes by itself, up to three times, after a process died or a host other than HOST
# was started again. It is 0 else, as torchrun would repeat the user's mistakes too, and one host could then wait ten
# minutes for another. LOCAL_ADDR, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME come from the route to HOST, unless set.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NUM_HOSTS:?how many hosts}" "${PROCESSES_PER_HOST:?processes on each host}" "${RENDEZVOUS:?HOST:PORT of one host}"

fail() {
    echo "error: $1" >&2
    exit 2
}

if [ "${MAX_RESTARTS:=0}" -gt 0 ] && [[ " $* " == *" --restart "* ]]; then
    fail "leave --restart or MAX_RESTARTS out: each restart of the processes would start over."
fi

host=${RENDEZVOUS%:*}
host=${host#[} host=${host%]}
address=$(getent ahosts "$host" | awk 'NR == 1 { print $1 }') || fail "the name $host of RENDEZVOUS is unknown here."
route=$(ip -o route get "$address") || fail "there is no route to $host ($address) of RENDEZVOUS."
# torch would ask the host's name, which on many hosts is that of a loopback address, and then nobody is the host
is_host=false
case $route in local*) is_host=true ;; esac
if [ "$NUM_HOSTS" -gt 1 ] && [[ $route == *" dev lo src 127."* || $route == *" dev lo src ::1 "* ]]; then
    # here the name means the loopback, as Debian has it; others come by the default route's address (none is contacted)
    route=$(ip -o route get 192.0.2.1) || fail "$host is a loopback address here; set RENDEZVOUS to another of its own."
fi
LOCAL_ADDR=${LOCAL_ADDR:-$(sed 's/.* src \([^ ]*\).*/\1/' <<<"$route")}
# by its address, as the route from a host to itself names the loopback
interface=$(ip -o addr show to "$LOCAL_ADDR" | awk 'NR == 1 { print $2 }')
[ -n "$interface" ] || fail "no interface has the address $LOCAL_ADDR; set LOCAL_ADDR to one of this host."
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$interface}" # NCCL takes a bare name for the beginning of one
# else SIGUSR1 would kill torchrun and leave its processes behind; a torch that cannot handle it passes this over
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
# else a host that was started again would wait for an address that torchrun tells in the first round only (torch 2.15)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
echo "$(hostname): $LOCAL_ADDR on $GLOO_SOCKET_IFNAME, rendezvous at $RENDEZVOUS (here: $is_host)" >&2

exec torchrun --nnodes "$NUM_HOSTS" --nproc_per_node "$PROCESSES_PER_HOST" --local_addr "$LOCAL_ADDR" \
    --max_restarts "$MAX_RESTARTS" --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" \
    --rdzv_conf "is_host=$is_host" --rdzv_id "${RUN_ID:-matchai}" -m matchai.train "$@"
