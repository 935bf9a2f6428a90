#!/usr/bin/env bash
# Runs a job on this machine: a server rank, and client ranks as its GPUs, else its cores, suggest.
#
#     launch/local.sh [--elastic] train|bench|check CONFIG [key=value ...]
#
# With GPUs each client rank gets one, and the server shares the last; without, there are as many ranks as cores.
# There are never more client ranks than clients, and with clients.on_loss=drop at least two. ranks=N decides otherwise.
#
# SIGTERM, SIGHUP or Ctrl-C: the ranks finish the round, write a checkpoint and leave; the same command goes on. Once
# more, 5 seconds later or after that: they leave at once. A third time: they are killed.
#
# --elastic: without torchrun, which ends all ranks when one dies. With clients.on_loss=drop the others go on, and a client
# rank that has died is started again and takes part from the next round on.
#
# Environment:
#   MAX_RESTARTS      how often all ranks, or with --elastic those that died, are started again (3)
#   OMP_NUM_THREADS   threads of each rank (cores / ranks, at least 1)
#   PYTHON            the interpreter (python)
#
# Exit status: 0 done, 2 wrong input, 75 stopped after a checkpoint, 1 anything else. With --elastic: rank 0's.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
elastic=
if [ "${1:-}" = --elastic ]; then
    elastic=yes
    shift
    export RANK=0 # job.py, too, is to see ranks that may outlive each other
fi
command=("$@")
MAX_RESTARTS=${MAX_RESTARTS:-3}
folder='' ranks='' on_loss='' free_port='' # what job.py says
started=() stops=0 asked=()
# shellcheck disable=SC2329 # called by the trap
stop() { # asks the ranks, not torchrun, which would give them 30 seconds
    if [ "${#started[@]}" = 0 ]; then exit 1; fi
    stops=$((stops + 1))
    if [ "$stops" -gt 2 ]; then kill -KILL "${started[@]}" "${asked[@]}" 2>/dev/null || true; fi
    asked=("${started[@]}")
    if [ -z "$elastic" ]; then
        mapfile -t asked < <(pgrep -P "${started[0]}")
        if [ "$stops" = 2 ]; then kill -KILL "${started[0]}" 2>/dev/null || true; fi # it would start them again
    fi
    kill -TERM "${asked[@]:-${started[0]}}" 2>/dev/null || true
}
trap stop TERM INT HUP

# In sessions of their own: Ctrl-C on the terminal reaches this shell alone.
job=$(setsid --wait "$python" "$root/launch/job.py" "$@")
eval "$job"
if [ "$ranks" = 1 ]; then exec "$python" -m fslsage_rpc "$@"; fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
if [ "$1" = train ]; then rm -f "$folder/STOPPED"; fi
export FSLSAGE_LAUNCHED=yes # ranks of a run that has diverged leave with 0, or they would be started again

restarts=0
start_rank() {
    RANK=$1 LOCAL_RANK=$1 setsid "$python" -m fslsage_rpc "${command[@]}" &
    started[$1]=$!
}
if [ -n "$elastic" ]; then
    export WORLD_SIZE="$ranks" LOCAL_WORLD_SIZE="$ranks" MASTER_ADDR=127.0.0.1 MASTER_PORT="$free_port"
    for ((rank = 0; rank < ranks; rank++)); do start_rank "$rank"; done
else
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or most restarts fail: pytorch issue 135712
    # Without --log_dir torchrun leaves a folder in /tmp.
    setsid "$python" -m torch.distributed.run --standalone --local-addr=127.0.0.1 \
        --nproc_per_node="$ranks" --max_restarts="$MAX_RESTARTS" --log_dir=/dev/null -m fslsage_rpc "${command[@]}" &
    started=($!)
fi
main=${started[0]} # rank 0, or torchrun

running() { kill -0 "$@" 2>/dev/null; } # any of these
wait_for() { # SECONDS PID...: until all have ended, at most so long
    local end=$((SECONDS + $1))
    while running "${@:2}" && [ "$SECONDS" -lt "$end" ]; do sleep 0.1 || true; done
}

start_lost_again() {
    local rank status
    for ((rank = 1; rank < ranks; rank++)); do
        if running "${started[rank]}" || [ "$restarts" -ge "$MAX_RESTARTS" ]; then continue; fi
        status=0
        wait "${started[rank]}" || status=$?
        case $status in 0 | 2 | 75) continue ;; esac
        restarts=$((restarts + 1))
        echo "local.sh: rank $rank has ended with status $status and is started again" >&2
        start_rank "$rank"
    done
}

while running "$main"; do
    sleep 0.5 || true
    if [ "$on_loss" = drop ] && [ "$stops" = 0 ]; then start_lost_again; fi
    if [ "${#asked[@]}" -gt 0 ] && ! running "${asked[@]}"; then
        wait_for 5 "$main"
        kill -TERM "$main" 2>/dev/null || true # it starts ranks again that died before they could obey
        break
    fi
done
while running "$main"; do wait "$main" || true; done # which a signal ends early
status=0
wait "$main" || status=$?
wait_for 15 "${started[@]}" "${asked[@]}" # the other ranks see that rank 0 has left
kill -KILL "${started[@]}" "${asked[@]}" 2>/dev/null || true
wait_for 5 "${started[@]}" # it takes a moment to end a process
if [ "$1" = train ] && [ -e "$folder/STOPPED" ]; then status=75; fi
if [ "$1" = train ] && [ "$status" = 0 ] && [ -e "$folder/DIVERGED" ]; then status=1; fi
exit "$status"
