#!/usr/bin/env bash
# Two machines of eight cards under Slurm, started again when a process or a machine dies:
#
#     sbatch configs/slurm/train.sh pretrain.py --config configs/pretrain/wiki.yaml
#     sbatch --nodes 4 --gpus-per-node 4 configs/slurm/train.sh sft.py --dataset csl
#
# Submitted from the repository's root, which lies on a disk that all machines see, with the
# environment active that has the requirements. Two minutes before its time is over the job saves
# and ends; the same command, submitted again, goes on.
#SBATCH --job-name=babyllama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# exec: so that Slurm's signal reaches the supervisor, which hands it on to all processes.
exec python -m babyllama.analysis.supervise --retries 10 -- \
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:29500" "$@"
