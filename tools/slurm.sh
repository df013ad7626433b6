#!/bin/bash
# Trains on several nodes under Slurm, from the project's folder, which all nodes see:
#
#     sbatch --nodes=2 tools/slurm.sh config/oec.py --micro_batch_size=10
#
# Five minutes before its time is over it saves a checkpoint and requeues itself; Slurm does the same when a node fails.
# tests/test_slurm.py runs it under Slurm 22.05 on two CPU nodes. It has not been run on GPUs.
#SBATCH --job-name=nanooec --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --exclusive
#SBATCH --time=24:00:00 --signal=B:TERM@300 --requeue --open-mode=append --output=slurm-%j.log
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --rdzv_backend=c10d \
  --rdzv_endpoint="$head_node:29500" --rdzv_id="$SLURM_JOB_ID" train.py "$@" &
trap 'is_stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM  # to the job's steps; srun itself would kill them
wait $!
status=$?
if [ "${is_stopping-}" ]; then  # the trap has ended the first wait
  wait $!
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
