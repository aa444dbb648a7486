#!/bin/bash
# sbatch docs/launch/slurm.sh RECIPE --data.shards SHARDS --output RUN
#
# Three minutes before its time is over, or when it is pre-empted, the job gets SIGUSR1: the run saves
# and leaves, and the job puts itself back into the queue. A requeued run goes on by itself.
#SBATCH --job-name=mocostream
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

set -u
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
STOPPED=0

srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file docs/launch/4x8-gpus.yaml --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$0" --main_process_port 29500 --max_restarts 3 train.py "$@"
' "$HOST" "$@" &
STEP=$!

# The launcher hands SIGTERM on to its processes; SIGUSR1 would end it alone.
stop() {
    STOPPED=1
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1 TERM

wait "$STEP"
CODE=$?
while kill -0 "$STEP" 2>/dev/null; do  # a trap ends `wait` early
    wait "$STEP"
    CODE=$?
done
if [ "$STOPPED" = 1 ] && [ "$CODE" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
