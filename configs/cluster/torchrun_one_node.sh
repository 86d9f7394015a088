#!/bin/bash
# Training on N ranks of this machine, one for each GPU, or processes where there is none:
#   configs/cluster/torchrun_one_node.sh 8 --config configs/cifar10_dit.yaml [options of fm-stages fit]
# The same command again goes on where the run was stopped; a run that waits for that has <run>/preempted.txt.
set -euo pipefail
ranks=${1:?"give the number of ranks, then options of fm-stages fit"}
shift

exec torchrun --standalone --nproc_per_node "$ranks" \
    -m fm_stages -- fit --ckpt_path last --trainer.devices "$ranks" "$@"
