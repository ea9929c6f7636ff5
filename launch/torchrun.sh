#!/usr/bin/env bash
# Train through `torchrun`. All arguments go to train.py; variables choose the machine:
#   NPROC         ranks on this machine; default: one per GPU, or 2 on the CPU
#   PRECISION     no, bf16 or fp16; default: bf16 on GPUs
#   NNODES, RDZV  number of machines (or MIN:MAX, elastic), and host:port of one of them; the same on all
#   ZERO          a name in configs/deepspeed, or a path: DeepSpeed instead of DDP
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)

if [[ -n ${ZERO:-} ]]; then
    [[ -f $ZERO ]] || ZERO=$root/configs/deepspeed/$ZERO.json
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$ZERO
fi
if ((gpus == 0)); then
    # Without this, each rank on a CPU trains alone.
    [[ -n ${ZERO:-} ]] || export ACCELERATE_USE_CPU=true
    NPROC=${NPROC:-2} PRECISION=${PRECISION:-no}
fi
export ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if [[ ${NNODES:-1} != 1 ]]; then
    # A rendezvous host that restarts must not share its store with the ranks (torch issue 135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${RDZV:?set RDZV to host:port of one machine}")
else
    where=(--standalone)
fi
if [[ -z ${TORCHRUN:-} ]]; then torchrun=("$root/launch/launcher.py" torchrun); else torchrun=("$TORCHRUN"); fi
exec "${torchrun[@]}" "${where[@]}" --nproc-per-node "${NPROC:-$((gpus))}" "$root/launch/train.py" "$@"
