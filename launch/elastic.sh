#!/usr/bin/env bash
# Train through torchrun, and continue when ranks or machines fail, leave or join. All arguments go to train.py:
#   launch/elastic.sh --out runs/mine --run.save_every 1600
#   NNODES=1:4 RDZV=10.0.0.1:29500 ADDRESS=10.0.0.2 launch/elastic.sh --out /shared/runs/mine ...   # on each machine
# The global batch must be a multiple of recipe.micro_batch times every number of ranks that can occur.
# Variables, besides torchrun.sh's NPROC, PRECISION, ZERO, NNODES (MIN:MAX) and RDZV:
#   ADDRESS       this machine's address for the others; the one in RDZV is the rendezvous host and must stay up.
#                 Default: torch looks it up by the machine's name
#   MAX_RESTARTS  number of failures that a machine tolerates; joining machines do not count
#   REJOINS       how often a machine that lost the others tries to join again
#   WAIT          seconds to wait for more machines, once there are MIN of them
#   GONE          seconds of silence after which a machine counts as failed
#   TIMEOUT       seconds that a rank waits for another that is cut off (run.timeout)
# gloo finds the others through the machine's name; if that does not work, set GLOO_SOCKET_IFNAME.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gone=${GONE:-15}

# If ranks shared the launcher's store, they would find the addresses of ranks that have died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun reads these as options.
export PET_MAX_RESTARTS=${MAX_RESTARTS:-10}
export PET_RDZV_CONF=last_call_timeout=${WAIT:-15},keep_alive_interval=$(((gone + 2) / 3)),keep_alive_max_attempt=3
if [[ -n ${ADDRESS:-} ]]; then
    export PET_LOCAL_ADDR=$ADDRESS
    # By default torch compares host names, which several machines may share.
    PET_RDZV_CONF+=,is_host=$([[ ${RDZV:-} == "$ADDRESS":* ]] && echo 1 || echo 0)
fi

export TORCHRUN=$here/rejoin.py
exec "$here/torchrun.sh" --resume auto --run.timeout "${TIMEOUT:-300}" "$@"
