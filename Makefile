PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := oracle oracle_gpu stages targets steering monitor lightning_overhead training_step scaling sampling encode latents neighbours checkpointing guards

# `make install TORCH=2.11` takes that release in place of the pinned one, and later calls stay with it until
# `make install TORCH=pinned`.
override TORCH := $(patsubst %.*,%,$(or $(TORCH),$(shell cat $(VENV)/torch 2>/dev/null),pinned))
STAMP := $(VENV)/.installed-$(TORCH)
OTHER_TORCH := $(if $(filter-out pinned,$(TORCH)),-e 's/^torch==.*/torch==$(TORCH).*/' -e '/^torchvision==/d')

.PHONY: help install demo test test-all coverage test-faults test-slurm test-two-hosts test-path lint format bench reproduce docs docs-serve docker test-docker clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## Make .venv with everything in it (PYTHON=python3.12, TORCH=2.11 choose others)

# The stamp is touched last and removed first: an install that broke half-way is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	        echo "fm-stages needs Python 3.11 or newer and '$(PYTHON)' is not: try 'make install PYTHON=python3.12'." >&2; \
	        exit 1; \
	    }; \
	    echo "Making $(VENV) with $$($(PYTHON) --version)."; \
	    $(PYTHON) -m venv --clear $(VENV); \
	}
	@rm -f $(VENV)/.installed-*
	@echo $(TORCH) >$(VENV)/torch
	@sed -e '/^#/d' $(OTHER_TORCH) constraints.txt >$(VENV)/constraints.txt
	@echo "Installing fm-stages and what it needs. torch alone is some gigabytes: the first time takes minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
	@echo "Installed: $$($(BIN)/python --version), torch $$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')."

demo: $(STAMP)  ## Train a small model on the digits data, on the CPU
	$(BIN)/fm-stages fit --config configs/digits_dit.yaml
	@echo "The results are in $$(ls -td runs/*/ | head -n 1)"

# Two processes share the tests: each takes a gigabyte, and those that start two ranks use two cores alone.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(STAMP)  ## Run the tests, without the slow ones
	$(PYTEST)

test-all: $(STAMP)  ## Run all tests
	$(PYTEST) -m ""

coverage: $(STAMP)  ## Run the tests as make test does, and show which lines of fm_stages none of them reaches
	$(PYTEST) --cov

test-slurm: $(STAMP)  ## Train on a real SLURM, which this installs and starts (root)
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/cluster/slurm.sh

test-two-hosts: $(STAMP)  ## Train on two network namespaces, as on two machines (root)
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/cluster/two_hosts.sh

test-path: $(STAMP)  ## Encode, profile, train, kill, resume and sample, 20 000 images on two ranks
	PYTHONPATH=. $(BIN)/python tests/end_to_end/whole_path.py

test-faults: $(STAMP)  ## Kill commands at 60 moments, go on with each and compare; fuzz what is read of strangers
	PYTHONPATH=. $(BIN)/python tests/faults/kills.py
	$(BIN)/python -m pytest -m "" -s tests/fuzz

lint: $(STAMP)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fm_stages

format: $(STAMP)  ## Put the code into the format that lint asks for
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Run the benchmarks, each of which prints a table
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

reproduce: $(STAMP)  ## Make the pages of docs/results again from the training data: some hours on one CPU core
	$(BIN)/python benchmarks/reproduce.py

DOCS := $(VENV)/.installed-docs-$(TORCH)
$(DOCS): $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS)  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(DOCS)  ## Show the documentation while its pages are written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# Its options stand in BUILD_FLAGS, those before `build` in BUILDER: make docker BUILDER='buildah --storage-driver vfs'
# BUILD_FLAGS='--isolation chroot'. An older Docker needs to be told of BuildKit, buildah to keep layers for the next time.
BUILDER ?= docker
IMAGE ?= fm-stages
docker:  ## Build the container image (BUILDER=podman, BASE=..., IMAGE=fm-stages:tag and BUILD_FLAGS=... choose others)
	@command -v $(firstword $(BUILDER)) >/dev/null || { \
	    echo "'$(firstword $(BUILDER))' is not installed here: install it, or try 'make docker BUILDER=podman'." >&2; \
	    exit 1; \
	}
	DOCKER_BUILDKIT=1 BUILDAH_LAYERS=true $(BUILDER) build $(if $(BASE),--build-arg BASE=$(BASE)) \
	    --build-arg REVISION=$$(git describe --always --dirty 2>/dev/null || echo unknown) $(BUILD_FLAGS) -t $(IMAGE) .

test-docker:  ## Build the image and run the demo in it (without a Docker engine: as root, with buildah)
	tests/container/build_and_run.sh

clean:  ## Remove caches and build outputs; runs/ stays
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find . \( -path ./$(VENV) -o -path ./.git -o -path ./runs -o -path ./wandb \) -prune -o \
	    -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too; runs/ stays
	rm -rf $(VENV)
