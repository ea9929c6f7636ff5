#!/usr/bin/env bash
# Train through `accelerate launch`. All arguments go to train.py; variables choose the machine:
#   CONFIG        a name in configs/accelerate, or a path; default: gpu_1, gpu_8 or cpu_2, by the number of GPUs
#   NPROC         ranks of all machines; default: those of CONFIG (or one per GPU)
#   MACHINE_RANK, MAIN_IP   this machine's number and the address of machine 0, for CONFIG=multi_node
#   MAX_RESTARTS  how often to restart ranks that failed; pass --resume auto too. See also elastic.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)

if [[ -z ${CONFIG:-} ]]; then
    case $((gpus)) in
        0) CONFIG=cpu_2 ;;
        1) CONFIG=gpu_1 ;;
        *) CONFIG=gpu_8 NPROC=${NPROC:-$((gpus))} ;;
    esac
fi
[[ -f $CONFIG ]] || CONFIG=$root/configs/accelerate/$CONFIG.yaml

# Without this, each rank on a CPU trains alone. With it, Accelerate does not use DeepSpeed.
if grep -q '^distributed_type: DEEPSPEED' "$CONFIG"; then
    cd "$root" # the path of DeepSpeed's file in configs/accelerate is relative to it
elif ((gpus == 0)) || [[ $(basename "$CONFIG") == cpu_* ]]; then
    export ACCELERATE_USE_CPU=true
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

again=()
if [[ -n ${MAX_RESTARTS:-} ]]; then
    again=(--max_restarts "$MAX_RESTARTS" --rdzv_backend c10d)
    # If ranks shared the launcher's store, they would find the addresses of ranks that have died.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # On the default port, two jobs on one machine would join each other.
    [[ -n ${MAIN_IP:-} ]] || export PET_RDZV_ENDPOINT=localhost:0
fi

exec "$root/launch/launcher.py" accelerate launch --config_file "$CONFIG" "${again[@]}" \
    ${NPROC:+--num_processes "$NPROC"} \
    ${MACHINE_RANK:+--machine_rank "$MACHINE_RANK"} \
    ${MAIN_IP:+--main_process_ip "$MAIN_IP"} \
    "$root/launch/train.py" "$@"
