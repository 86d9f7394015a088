#!/bin/bash
# Training on several machines without a scheduler. The same command on each of them, with the name of one and a free port:
#   configs/cluster/torchrun_nodes.sh node1:29400 2 8 --config configs/cifar10_dit.yaml [options of fm-stages fit]
# (2 machines, 8 ranks on each). All need one folder of runs, on a file system that they share. The same commands again
# go on where the run was stopped; a run that waits for that has <run>/preempted.txt.
#
# Where machines have several networks, name the interface: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0.
set -euo pipefail
usage="give HOST:PORT, the number of machines, the ranks on each, then options of fm-stages fit"
endpoint=${1:?$usage} nodes=${2:?$usage} ranks=${3:?$usage}
shift 3

exec torchrun --rdzv_backend c10d --rdzv_endpoint "$endpoint" --nnodes "$nodes" --nproc_per_node "$ranks" \
    -m fm_stages -- fit --ckpt_path last --trainer.num_nodes "$nodes" --trainer.devices "$ranks" "$@"
