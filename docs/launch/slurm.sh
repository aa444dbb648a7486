#!/bin/bash
# sbatch docs/launch/slurm.sh RECIPE --data.shards SHARDS --output RUN
#
# From the repository's folder, its environment activated; --output on a disk that all machines share.
# One process for each GPU, and Slurm starts them itself: its signals reach every one of them, and
# their exit codes reach this script. Fewer machines or GPUs: the same options to sbatch, for example
# `sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 docs/launch/slurm.sh ...`.
#SBATCH --job-name=mocostream
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time is over; to the processes, not to this script.
#SBATCH --signal=USR1@180

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs may share machines
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun takes it from here alone

# A process that leaves or dies gives the others two minutes to notice it and leave too.
srun --wait=120 --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
    exec python train.py "$@"
' bash "$@"
CODE=$?

# 75: stopped by a signal and saved; 138 and 143: by SIGUSR1 or SIGTERM before it had begun. Others
# than 0, 2 (wrong input) and 130 (Ctrl-C): a process was killed, hung or lost the others; where that
# comes soon after a start, three more are tried.
case $CODE in
    75 | 138 | 143) AGAIN=1 ;;
    0 | 2 | 130) AGAIN=0 ;;
    *) AGAIN=$((SECONDS >= 600 || ${SLURM_RESTART_COUNT:-0} < 3)) ;;
esac
if [ "$AGAIN" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
