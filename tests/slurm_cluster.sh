#!/bin/bash
# A Slurm cluster of two nodes on this machine, for tests/test_slurm.py: one controller and two node daemons, without cgroups.
# Needs root and Debian's slurm-wlm and munge. FOLDER holds its settings, state and logs.
#
#     tests/slurm_cluster.sh start FOLDER
#     tests/slurm_cluster.sh stop FOLDER
set -euo pipefail
folder=$2
export SLURM_CONF=$folder/slurm.conf
case $1 in
  start)
    mkdir -p "$folder/state" /run/munge
    cat > "$SLURM_CONF" << END
ClusterName=test
SlurmctldHost=$(hostname)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
JobCompType=jobcomp/none
NodeName=node[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
END
    grep -q "node1 node2" /etc/hosts || echo "127.0.0.1 node1 node2" >> /etc/hosts
    chown munge /run/munge
    pgrep munged > /dev/null || runuser -u munge -- munged
    slurmctld -c
    for node in node1 node2; do slurmd -N $node; done
    for attempt in $(seq 60); do
      [ "$(sinfo --noheader --format=%T)" = idle ] && exit 0
      sleep 1
    done
    sinfo >&2
    exit 1 ;;
  stop)
    # Some daemons do not end on SIGTERM after a cancelled job.
    daemons=$(pgrep -f "^(slurmctld -c|slurmd -N node[12])$" || true)
    kill $daemons 2> /dev/null || true
    for attempt in $(seq 20); do
      [ -z "$(pgrep -f "^(slurmctld -c|slurmd -N node[12])$")" ] && break
      sleep 0.5
    done
    kill -9 $daemons 2> /dev/null || true
    sed -i "/node1 node2/d" /etc/hosts 2> /dev/null || { grep -v "node1 node2" /etc/hosts > "$folder/hosts"; cat "$folder/hosts" > /etc/hosts; } ;;
esac
