#!/usr/bin/env bash
# Train through torchrun, and go on when ranks or machines fail, leave or join. All arguments go to train.py:
#   launch/elastic.sh --out runs/mine --run.save_every 1600
#   NNODES=1:4 RDZV=10.0.0.1:29500 ADDRESS=10.0.0.2 launch/elastic.sh --out /shared/runs/mine ...   # on each machine
# The global batch must be a multiple of recipe.micro_batch times each number of ranks that may come about.
# Variables, besides torchrun.sh's NPROC, PRECISION, ZERO, NNODES (MIN:MAX) and RDZV:
#   ADDRESS       this machine's own, as the others reach it; the one named in RDZV keeps the list of machines and
#                 must stay. Default: torch finds out, by the machine's name
#   MAX_RESTARTS  how many failures a machine puts up with; machines that join do not count
#   REJOINS       how often a machine that has lost the others tries to join again
#   WAIT          seconds to wait for more machines, once there are MIN of them
#   GONE          seconds of silence after which a machine is taken for gone
#   TIMEOUT       seconds after which a rank gives up another that is cut off (run.timeout)
# gloo finds the others through the machine's name; where that does not do, set GLOO_SOCKET_IFNAME.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gone=${GONE:-15}

# Ranks would find the addresses of those that died in a store that they share with the launcher.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun takes its options from these too.
export PET_MAX_RESTARTS=${MAX_RESTARTS:-10}
export PET_RDZV_CONF=last_call_timeout=${WAIT:-15},keep_alive_interval=$(((gone + 2) / 3)),keep_alive_max_attempt=3
if [[ -n ${ADDRESS:-} ]]; then
    export PET_LOCAL_ADDR=$ADDRESS
    # torch would compare host names, which several machines may share.
    PET_RDZV_CONF+=,is_host=$([[ ${RDZV:-} == "$ADDRESS":* ]] && echo 1 || echo 0)
fi

export TORCHRUN=$here/rejoin.py
exec "$here/torchrun.sh" --resume auto --run.timeout "${TIMEOUT:-300}" "$@"
