#!/usr/bin/env bash
# Train under Slurm, with one torchrun per machine. All arguments go to train.py:
#   sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh --config configs/train/gpt2-small.yaml --out /shared/runs/mine
# Slurm sends SIGTERM two minutes before the time limit: the job saves, and the same command resumes it.
#   ZERO          a name in configs/deepspeed: DeepSpeed instead of DDP
#   NODES         MIN:MAX machines (elastic: the job continues with those that are up); default: all of the job's
#SBATCH --job-name=dist_adamw
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail
# sbatch runs a copy of this file; the job's folder is where it was submitted.
root=${DIST_ADAMW:-${SLURM_SUBMIT_DIR:?run this with sbatch, from the project\'s folder}}
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
export ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# A rendezvous host that restarts must not share its store with the ranks (torch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -n ${ZERO:-} ]]; then
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$root/configs/deepspeed/$ZERO.json
fi

exec srun --kill-on-bad-exit=1 "$root/launch/launcher.py" torchrun \
    --nnodes "${NODES:-$SLURM_JOB_NUM_NODES}" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    "$root/launch/train.py" --resume auto "$@"
