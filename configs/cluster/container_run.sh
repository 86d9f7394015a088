#!/bin/bash
# A command in a container of the image that `make docker` builds, with all GPUs, the data read-only, and ./runs:
#   configs/cluster/container_run.sh fm-stages torchrun --standalone --nproc_per_node 8 \
#       -m fm_stages -- fit --ckpt_path last --trainer.devices 8 --config configs/cifar10_dit.yaml
# FM_STAGES_DATA names the data (./data without it), ENGINE=podman another engine, GPUS= (empty) none.
# `docker stop` lets the run write a checkpoint first.
set -euo pipefail
image=${1:?"give the image, then a command to run in it"}
shift
data=$(realpath "${FM_STAGES_DATA:-data}")
mkdir -p runs

# --ipc: workers and NCCL share memory, and an engine's 64 MiB of it are too few. --init: hands signals on.
# shellcheck disable=SC2086 # GPUS is options
exec "${ENGINE:-docker}" run --rm --init --stop-timeout 120 ${GPUS---gpus all} --network host --ipc host \
    --user "$(id -u):$(id -g)" -v "$data:/data:ro" -v "$PWD/runs:/fm-stages/runs" -e WANDB_API_KEY \
    "$image" "$@"
