# Everything a newcomer runs. `make help` lists the commands.

PYTHON ?= python3
RUN := .venv/bin/python
STAMP := .venv/.stamp
TORCH := $(shell grep '^torch==' constraints.txt)

# This environment's own ninja; and the operations that DeepSpeed compiles are kept with the torch that they fit.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
PYTEST := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(RUN) -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv test test-fast test-slow test-nvme test-gpu test-faults test-signals test-transformers \
	test-slurm test-multinode docs lint format quickstart clean \
	bench bench-checkpoint bench-adapters bench-quality bench-rules bench-rounding bench-plan \
	bench-checkpoint-memory bench-wire bench-zeroth-order gpu-check

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the pinned versions

# torch comes first: DeepSpeed's setup asks the installed torch what it can build.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("error: the pinned versions need Python 3.11 or later, and $(PYTHON) is " \
		+ sys.version.split()[0] + ": name another one, make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -c constraints.txt setuptools wheel
	$(RUN) -m pip install -c constraints.txt '$(TORCH)'
	$(RUN) -m pip install -c constraints.txt --no-build-isolation -e '.[test,quickstart,bench,docs]'
	touch $@

# Two files of tests at a time: ranks that wait for each other leave a core idle.
test: $(STAMP)  ## run the default tests on CPU ranks, the cheapest first
	$(PYTEST) -n 2 --dist loadgroup

test-fast: $(STAMP)  ## run the tests that start no ranks
	$(PYTEST) -m 'not ranks and not slow and not async_io and not cluster'

test-slow: $(STAMP)  ## run the tests that are too slow for every change, those of test-nvme included
	$(PYTEST) -m 'slow or async_io'

test-nvme: $(STAMP)  ## run the tests of gradients in a file; builds DeepSpeed's async_io op (libaio), once, in minutes
	$(PYTEST) -m async_io tests/zero3/apply

test-transformers: $(STAMP)  ## run transformers' own tests of Trainer with DeepSpeed, fetched from GitHub, with LOMO
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(RUN) -m tests.transformers_own.run $(if $(SOURCE),--source $(SOURCE))

test-signals: $(STAMP)  ## send every signal in every phase of a run: the table of docs/reliability.md
	$(PYTEST) -m 'slow or not slow' -rP tests/launch/test_signals.py

test-slurm: $(STAMP)  ## run launch/slurm.sbatch on a Slurm of two nodes on this machine; needs root on Debian
	which slurmctld munged || apt-get install -y --no-install-recommends slurm-wlm munge
	$(PYTEST) -m cluster tests/launch/test_slurm.py

test-multinode: $(STAMP)  ## train on two nodes that are network namespaces of this machine; needs root on Linux
	which ip || apt-get install -y --no-install-recommends iproute2
	$(PYTEST) -m cluster tests/launch/test_multinode.py

test-gpu: $(STAMP)  ## run the tests that need a GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m gpu tests/gpu

test-faults: $(STAMP)  ## inject 300 faults into runs and fuzz 2,600 inputs; writes docs/benchmarks/faults.md
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(RUN) -m tests.faults.campaign --out docs/benchmarks
	LOMO_DS_FUZZ_FACTOR=10 $(PYTEST) tests/fuzz

lint: $(STAMP)  ## check style, formatting, types and shell scripts
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/shellcheck launch/*.sh launch/*.sbatch .ci/run

docs: $(STAMP)  ## build the documentation as a site in build/site; it loads nothing from the network
	DS_ACCELERATOR=cpu $(RUN) -m mkdocs build --strict

format: $(STAMP)  ## fix style and formatting
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

quickstart: $(STAMP)  ## fine-tune a real pretrained model with LOMO on two CPU ranks
	$(RUN) recipes/prepare_quickstart.py
	.venv/bin/lomo-ds train recipes/quickstart.yaml --num-ranks 2
	@cat recipes/after_quickstart.md

bench: $(STAMP)  ## memory, step time, bytes sent and growth, with ZeRO-3, plain torch and lomo-optim
	$(RUN) -m benchmarks.bench.run

bench-checkpoint: $(STAMP)  ## bytes and time of saving and loading, with ZeRO-3 and SGD
	$(RUN) -m benchmarks.checkpoint.run

bench-checkpoint-memory: $(STAMP)  ## host memory of loading a model into shards and of exporting it
	$(RUN) -m benchmarks.checkpoint_memory.run

bench-plan: $(STAMP)  ## the tables of docs/benchmarks/plan.md: large models, the floor, Table 1, runs with data
	$(RUN) -m benchmarks.plan.run models floor table1 truth

bench-wire: $(STAMP)  ## bytes on the wire of one clipped step
	$(RUN) -m benchmarks.wire.run --ranks 2

bench-zeroth-order: $(STAMP)  ## memory, bytes on the wire and time of a ZO-SGD step, and of a forward
	$(RUN) -m benchmarks.zeroth_order.run

bench-adapters: $(STAMP)  ## LoRA alone, LOMO + LoRA and LOMO alone on the quickstart task, three seeds
	$(RUN) recipes/prepare_quickstart.py
	$(RUN) -m benchmarks.adapters.run

bench-quality: $(STAMP)  ## six ways to train on SST-2 and RTE, three seeds: make bench-quality DATA=folder
	@test -n "$(DATA)" || { echo "error: name the folder of SST-2 and SuperGLUE: make bench-quality DATA=..."; exit 2; }
	$(RUN) recipes/prepare_quickstart.py
	$(RUN) -m benchmarks.quality.run --data $(DATA)

bench-rules: $(STAMP)  ## all rules by held-out loss on three tasks, five seeds: make bench-rules DATA=folder
	@test -n "$(DATA)" || { echo "error: name the folder of SST-2 and the instructions: make bench-rules DATA=..."; exit 2; }
	$(RUN) recipes/prepare_quickstart.py
	$(RUN) -m benchmarks.rules.run --data $(DATA)

bench-rounding: $(STAMP)  ## AdaLomo in fp32 and in bf16, stochastic and nearest rounding, 200 steps
	$(RUN) recipes/prepare_quickstart.py
	$(RUN) -m benchmarks.rounding.run

# Without a GPU it ends here, before anything is installed.
gpu-check:  ## on a GPU, in ten minutes: equality, streams, memory, time, kernels; writes docs/benchmarks/gpu.md
	@$(PYTHON) -m benchmarks.gpu.card
	@$(MAKE) --no-print-directory $(STAMP)
	$(RUN) -m benchmarks.gpu.run

clean:  ## remove caches and build outputs; .venv, runs and downloads stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
