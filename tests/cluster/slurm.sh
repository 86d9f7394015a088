#!/bin/bash
# make test-slurm: a SLURM of one node and two CPUs, in a temporary folder, for check_slurm.py; gone at the end.
#
# Installs SLURM and munge with apt where they are missing (root). Nothing of a SLURM that is configured here is touched.
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)

if ! command -v slurmctld slurmd munged srun >/dev/null; then
    echo "Installing SLURM and munge."
    apt-get update -qq
    # so that no daemon of the packages starts
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq -y --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null
fi

folder=$(mktemp -d /tmp/fm-stages-slurm.XXXXXX)
daemons=()
clean_up() {
    status=$?
    trap '' INT TERM
    if [ ${#daemons[@]} -eq 3 ]; then
        scancel --full --signal=KILL --user "$(id -un)" 2>/dev/null || true
        scancel --user "$(id -un)" 2>/dev/null || true
        for _ in $(seq 40); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep 1; done
    fi
    if [ ${#daemons[@]} -gt 0 ]; then
        kill "${daemons[@]}" 2>/dev/null || true
        wait "${daemons[@]}" 2>/dev/null || true
    fi
    if [ $status -ne 0 ]; then tail -n 15 "$folder"/slurm*.log; fi
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
host=$(hostname -s)
mkdir "$folder/state" "$folder/spool"
chmod 755 "$folder"
export SLURM_CONF=$folder/slurm.conf
# cred_expire: how long a requeued job waits before it starts again
cat >"$SLURM_CONF" <<END
ClusterName=fm-stages-test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
munged --foreground --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munged.pid" --seed-file "$folder/munge.seed" >"$folder/munged.log" 2>&1 &
daemons+=($!)
until [ -S "$folder/munge.socket" ]; do sleep 0.2; kill -0 $! || { cat "$folder/munged.log"; exit 1; }; done
slurmctld -D >/dev/null 2>&1 &
daemons+=($!)
slurmd -D >/dev/null 2>&1 &
daemons+=($!)
for _ in $(seq 100); do
    if sinfo --noheader --format %T 2>/dev/null | grep -q idle; then break; fi
    sleep 0.3
done
if ! sinfo --noheader --format %T | grep -q idle; then
    echo "SLURM did not start:"
    tail -n 20 "$folder"/slurm*.log
    exit 1
fi
echo "$(srun --version) runs on $host."

export PYTHONPATH=$repository OMP_NUM_THREADS=1
cd "$folder"
python "$repository/tests/cluster/check_slurm.py"
