#!/bin/bash
# A run on the GPUs of several nodes under Slurm, which goes on by itself after it was preempted:
#
#     sbatch docs/slurm.sh caid --prompts my-prompts.jsonl
#
# Submit it from a folder that all nodes see. All words go to engine.train; the run folder is runs/JOB.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Before the time limit Slurm sends SIGTERM, as it does when it preempts: every rank ends its step and saves it.
#SBATCH --signal=TERM@120
set -eu
run=${RUN:-runs/$SLURM_JOB_ID}
if [ -e "$run/config.json" ]; then
    words=(--resume "$run")
else
    words=("$@" --out "$run")
fi
# Static rendezvous: its store does not end with the first attempt, so --max-restarts works.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c '
    first=$1; shift
    exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
        --master-addr "$first" --master-port "$((20000 + SLURM_JOB_ID % 10000))" --shutdown-timeout 90 \
        -m engine.train "$@"
' launch "$first" "${words[@]}"
