#!/usr/bin/env bash
# Train through `accelerate launch`. All arguments go to train.py; variables choose the machine:
#   CONFIG        a name in configs/accelerate, or a path; default: gpu_1, gpu_8 or cpu_2, as there are GPUs
#   NPROC         ranks, of all machines together; default: those of CONFIG (or one per GPU)
#   MACHINE_RANK, MAIN_IP   this machine's number and the address of machine 0, for CONFIG=multi_node
#   MAX_RESTARTS  how often ranks that died are started again; pass --resume auto, too. More: elastic.sh
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

# Without this, ranks on a CPU are single processes that know nothing of one another. DeepSpeed is not used with it.
if grep -q '^distributed_type: DEEPSPEED' "$CONFIG"; then
    cd "$root" # configs/accelerate names DeepSpeed's file from there
elif ((gpus == 0)) || [[ $(basename "$CONFIG") == cpu_* ]]; then
    export ACCELERATE_USE_CPU=true
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

again=()
if [[ -n ${MAX_RESTARTS:-} ]]; then
    again=(--max_restarts "$MAX_RESTARTS" --rdzv_backend c10d)
    # Ranks would find the addresses of those that died in a store that they share with the launcher.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Two jobs on one machine would take each other's ranks for their own.
    [[ -n ${MAIN_IP:-} ]] || export PET_RDZV_ENDPOINT=localhost:0
fi

exec accelerate launch --config_file "$CONFIG" "${again[@]}" \
    ${NPROC:+--num_processes "$NPROC"} \
    ${MACHINE_RANK:+--machine_rank "$MACHINE_RANK"} \
    ${MAIN_IP:+--main_process_ip "$MAIN_IP"} \
    "$root/launch/train.py" "$@"
