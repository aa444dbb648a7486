#!/bin/bash
# A Slurm of two nodes on one machine, to run docs/launch/slurm.sh for real on CPUs.
#
#     sudo tests/bench/slurm_cluster.sh up FOLDER      (needs Debian's slurm-wlm and munge)
#     export SLURM_CONF=FOLDER/slurm.conf
#     sbatch --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 docs/launch/slurm.sh demo ...
#     sudo tests/bench/slurm_cluster.sh down FOLDER
#
# Each node is a network namespace with an address and a host name of its own, so that it can be lost:
# `ip link set moco2 down`. Eight false GPUs each. Partition `high` pre-empts `low`, whose jobs are
# requeued after GRACE seconds. What was tried with it stands in RESULTS.md.
set -eu
BASE=$(realpath "$2")
NODES=(1 2)

end() { # the daemon whose number a file holds
    [ ! -f "$1" ] || kill "$(cat "$1")" || true
}

down() {
    for node in "${NODES[@]}"; do end "$BASE/slurmd-node$node.pid"; done
    end "$BASE/slurmctld.pid"
    end "$BASE/munge/pid"
    sleep 1
    for node in "${NODES[@]}"; do ip netns del "node$node" || true; done
    ip link del mocobridge || true
}

configure() {
    mkdir -p "$BASE"/{munge,state,log,gpus}
    chmod 755 "$BASE"
    (umask 077 && head -c 1024 /dev/urandom >"$BASE/munge/key")
    for gpu in {0..7}; do [ -e "$BASE/gpus/gpu$gpu" ] || mknod "$BASE/gpus/gpu$gpu" c 1 3; done
    {
        echo "127.0.0.1 localhost"
        echo "10.77.0.1 head"
        for node in "${NODES[@]}"; do echo "10.77.0.1$node node$node"; done
    } >"$BASE/hosts"
    echo "CgroupPlugin=cgroup/v1" >"$BASE/cgroup.conf"
    echo "Name=gpu File=$BASE/gpus/gpu[0-7]" >"$BASE/gres.conf"
    cat >"$BASE/slurm.conf" <<END
ClusterName=moco
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$BASE/munge/socket
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool-%n
SlurmctldPidFile=$BASE/slurmctld.pid
SlurmdPidFile=$BASE/slurmd-%n.pid
SlurmctldLogFile=$BASE/log/slurmctld
SlurmdLogFile=$BASE/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=20
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
GresTypes=gpu
NodeName=node[1-2] Gres=gpu:8 NodeAddr=10.77.0.1[1-2] CPUs=64 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=${GRACE:-0}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
}

up() {
    configure
    export SLURM_CONF=$BASE/slurm.conf
    munged --force --key-file="$BASE/munge/key" --socket="$BASE/munge/socket" \
        --pid-file="$BASE/munge/pid" --seed-file="$BASE/munge/seed" --log-file="$BASE/munge/log"
    ip link add mocobridge type bridge
    ip addr add 10.77.0.1/24 dev mocobridge
    ip link set mocobridge up
    unshare --uts bash -c "hostname head; exec slurmctld -c"
    for node in "${NODES[@]}"; do
        ip netns add "node$node"
        ip link add "moco$node" type veth peer name eth0 netns "node$node"
        ip link set "moco$node" master mocobridge up
        ip -n "node$node" addr add "10.77.0.1$node/24" dev eth0
        ip -n "node$node" link set eth0 up
        ip -n "node$node" link set lo up
        mkdir -p "$BASE/spool-node$node"
        nsenter --net="/run/netns/node$node" unshare --mount --uts bash -c \
            "mount --bind $BASE/hosts /etc/hosts; hostname node$node; exec slurmd -N node$node"
    done
}

case $1 in
    up) up ;;
    down) down ;;
    *) exit 2 ;;
esac
