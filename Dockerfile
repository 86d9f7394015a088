# fm-stages in a container. Build it with `make docker`; what stands after the image's name is any command of the README:
#
#   docker run --init fm-stages                      # the demo, three minutes on two CPU cores
#   docker run --init --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" \
#       -v "$PWD/data:/data" -v "$PWD/runs:/fm-stages/runs" -e WANDB_API_KEY \
#       fm-stages fm-stages fit --config configs/cifar10_dit.yaml --trainer.devices 8
#   docker run ... fm-stages torchrun --nproc_per_node 8 -m fm_stages -- fit --config ...
#
# --ipc=host: workers and NCCL share memory, and Docker's 64 MiB of it are too few. --user: files belong to who runs it.
# --init: hands on the signals that process 1 would ignore. On several nodes --network=host as well.
#
# No CUDA in the base: torch's wheels bring the very CUDA libraries that they were built with, so that a CUDA base
# would only carry a second, unused copy of some gigabytes. The driver comes from the host. Any Debian or Ubuntu with
# Python 3.11 or newer will do where a cluster prescribes one: make docker BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
ARG BASE=ubuntu:24.04
FROM ${BASE}

# The compiler and Python's headers are for torch.compile (compile_blocks), also on a GPU: triton compiles its launchers.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    && python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python of the base is older than 3.11: choose another BASE")' \
    && python3 -m venv /opt/venv

# NVIDIA's two are what their own images set: some container runtimes show no GPU without them. HOME and USER hold for
# a --user without an account as well, where torch.compile and others would find neither.
ENV PATH=/opt/venv/bin:$PATH \
    FM_STAGES_DATA=/data \
    HOME=/home/fm \
    USER=fm \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /fm-stages

# From what changes least to what changes most: torch, which is nearly all of the size, the other libraries, the source.
# Behind a package mirror: make docker BUILD_FLAGS='--secret id=pip.conf,src=FILE', and --secret id=ca.pem,src=FILE for
# its certificates (`cert = /run/secrets/ca.pem` in pip.conf). Secrets are there during the step alone, in no layer.
COPY constraints.txt ./
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    pip install --no-cache-dir --disable-pip-version-check --progress-bar off -c constraints.txt torch torchvision

COPY pyproject.toml ./
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb")); print(*project["build-system"]["requires"], *project["project"]["dependencies"], *project["project"]["optional-dependencies"]["eval"], sep="\n")' \
        >/tmp/requirements.txt \
    && PIP_CONFIG_FILE=/run/secrets/pip.conf \
    pip install --no-cache-dir --disable-pip-version-check --progress-bar off -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Editable: the source stands once in the image, and another version of it can be mounted over /fm-stages/fm_stages.
# The folders to write to are open to any user, like /tmp, and what root put there stays as it is.
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check -q --no-index --no-deps --no-build-isolation -e . \
    && python -m compileall -q fm_stages \
    && chmod -R a+rX . \
    && mkdir -p /data /home/fm runs \
    && chmod 1777 /data /home/fm runs . \
    && { getent passwd 1000 >/dev/null || useradd --uid 1000 --home-dir /home/fm --no-create-home fm; }

USER 1000:1000
CMD ["fm-stages", "fit", "--config", "configs/digits_dit.yaml"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="fm-stages" \
    org.opencontainers.image.description="Train flow-matching image models with the exact oracle velocity beside them" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.revision="${REVISION}"
