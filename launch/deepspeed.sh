#!/usr/bin/env bash
# Train through the `deepspeed` launcher. All arguments go to train.py; variables choose the machine:
#   NPROC         ranks on this machine; default: one per GPU, or 2 on the CPU
#   ZERO          a name in configs/deepspeed, or a path; default: zero2
#   PRECISION     no, bf16 or fp16; default: bf16 on GPUs
#   HOSTFILE      DeepSpeed's list of machines ("address slots=8" per line), for several
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)

if ((gpus == 0)); then NPROC=${NPROC:-2} PRECISION=${PRECISION:-no}; fi
ZERO=${ZERO:-zero2}
[[ -f $ZERO ]] || ZERO=$root/configs/deepspeed/$ZERO.json
# The variables that accelerate launch would set.
export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$ZERO
export ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if [[ -n ${HOSTFILE:-} ]]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--num_accelerators "${NPROC:-$((gpus))}")
fi
exec "$root/launch/launcher.py" deepspeed "${where[@]}" --no_local_rank "$root/launch/train.py" "$@"
