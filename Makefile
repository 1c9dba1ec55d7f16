# Everything a person or a machine does with this repository. Needs make and a Python of 3.11 or newer; the rest
# is installed into .venv. Stamp files in .venv remember what is there, so a second `make serve` only starts.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# One place names torch's version: pyproject.toml. Empty TORCH_INDEX_URL: pip's own index.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
TORCH_INDEX_URL ?=
COMPILED := app/engine/cpu_kernels/*.so

# make train: DATA and BASE are folders or hub ids; empty means what CONFIG says. ARGS: more key=value words.
# BASE_NAME: what the model card calls a BASE that is a folder.
# VERSION: an entry of the store is never overwritten, so by default it is the one after the newest.
CONFIG ?= train/configs/dialogsum-minilm.toml
NAME ?= minilm2minilm-dialogsum
DATA ?=
BASE ?=
BASE_NAME ?=
ARGS ?=
ifndef VERSION
VERSION := $(or $(shell ls model_store/$(NAME) 2>/dev/null | sort -V | awk -F. 'NF == 3 {v = $$1 "." $$2 "." $$3 + 1} END {print v}'),0.1.0)
endif
RUN := runs/$(NAME)
EXPORTED := model_store/$(NAME)/$(VERSION)

# make lock: where uv finds the CPU build of torch, whose needs the lock holds; a folder of wheels, or else its index.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
LOCK := $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	$(if $(UV_FIND_LINKS),,--torch-backend cpu) --no-emit-package torch --custom-compile-command "make lock"

.PHONY: help serve test test-ray test-kubernetes lint train lock supply-chain lint-files lock-check licences audit test-container clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

serve: $(VENV)/.serve ## install what is missing, then start the server (settings: PRECIS_*, see README.md)
	@exec $(BIN)/python -m app

# Two processes, each of whole files, whose fixtures train once for all of their tests; in order, so that those with
# servers of their own begin. Then, alone, the others that talk to real servers: they watch the clock, or load a server.
BESIDE := $(addprefix tests/e2e/test_,clients.py refused_starts.py schema.py)
ALONE := $(filter-out $(BESIDE),$(sort $(wildcard tests/e2e/test_*.py))) tests/container
test: lint ## lint, types, and every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE)

# Ray's own modules warn when they are imported, which for ours is an error.
test-ray: $(VENV)/.ray ## install Ray, then test replicas on a local cluster of two nodes
	$(BIN)/python -m pytest -W ignore tests/ray_serve

test-kubernetes: $(VENV)/.kubernetes ## render deploy/kubernetes and validate it
	$(BIN)/python -m pytest tests/kubernetes

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# glibc gives large blocks back to the system as soon as they are free, and training frees its largest activations
# on every step: keep them.
train: export MALLOC_MMAP_THRESHOLD_ := 4294967296
train: export MALLOC_TRIM_THRESHOLD_ := 17179869184
train: $(VENV)/.train ## fine-tune, export, evaluate: make train DATA=... BASE=... [BASE_NAME= CONFIG= NAME= VERSION= ARGS=]
	@test ! -e $(EXPORTED) || { echo "$(EXPORTED) exists; name another VERSION" >&2; exit 1; }
	$(BIN)/python -m train finetune --config $(CONFIG) name=$(NAME) output_dir=$(RUN) \
		$(if $(BASE),model.encoder=$(BASE) model.decoder=$(BASE)) \
		$(if $(BASE_NAME),model.encoder_name=$(BASE_NAME) model.decoder_name=$(BASE_NAME)) \
		$(if $(DATA),data.path=$(DATA)) $(ARGS)
	$(BIN)/python -m train export --run $(RUN)/best --store model_store --version $(VERSION) $(if $(DATA),--data $(DATA))
	$(BIN)/python -m train evaluate --model $(EXPORTED) --run $(RUN) --split test \
		--output $(RUN)/evaluation.json --report $(RUN)/report
	$(BIN)/python -m train card --model $(EXPORTED) --evaluation $(RUN)/evaluation.json

# A pin that is there already stays: UPGRADE=--upgrade takes the newest of everything, --upgrade-package=NAME of one.
UPGRADE ?=
lock: $(VENV)/.supply-chain ## write requirements/*.txt, what the images install, from pyproject.toml [UPGRADE=--upgrade]
	$(call write-lock,requirements,$(UPGRADE))

define write-lock
	echo "$(TORCH)" > $(1)/torch.txt
	$(LOCK) $(2) --extra otel pyproject.toml --output-file $(1)/serve.txt
	$(LOCK) $(2) --extra otel --extra train pyproject.toml --constraint requirements/serve.txt --output-file $(1)/train.txt
endef

supply-chain: lint-files lock-check licences audit ## what is shipped: its files, lock, SBOM, licences, vulnerabilities

SUPPLY := build/supply-chain
lint-files: $(VENV)/.supply-chain
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint --strict $$(git ls-files '*.yml' '*.yaml')

# The lock written again, from itself, is the lock.
lock-check: $(VENV)/.supply-chain
	mkdir -p $(SUPPLY)/lock && cp requirements/*.txt $(SUPPLY)/lock
	$(call write-lock,$(SUPPLY)/lock)
	for file in torch serve train; do diff requirements/$$file.txt $(SUPPLY)/lock/$$file.txt \
		|| { echo "requirements/$$file.txt is not what pyproject.toml asks for: make lock" >&2; exit 1; }; done

# Installed as the images install it, then described: an SBOM (CycloneDX) for each image, and the licences, which must
# be what is committed and among those allowed. An expression counts as a whole: a new mixture is looked at by a person.
ALLOWED := $(shell sed 's/ *\#.*//; /^$$/d' requirements/licences-allowed.txt | paste -sd';' -)
INSTALL := $(BIN)/uv pip install --quiet --python $(SUPPLY)/venv/bin/python --no-deps
licences: $(VENV)/.supply-chain
	rm -rf $(SUPPLY)/venv && $(BIN)/uv venv --quiet --python $(BIN)/python $(SUPPLY)/venv
	$(INSTALL) $(if $(UV_FIND_LINKS),,--torch-backend cpu) --requirement requirements/torch.txt
	$(INSTALL) --require-hashes --only-binary :all: --requirement requirements/serve.txt
	$(call describe,serve)
	$(INSTALL) --require-hashes --no-build-isolation --requirement requirements/train.txt
	$(call describe,train)

define describe
	$(BIN)/uv pip check --quiet --python $(SUPPLY)/venv/bin/python
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file $(SUPPLY)/$(1).cdx.json \
		$(SUPPLY)/venv/bin/python
	$(BIN)/pip-licenses --python $(SUPPLY)/venv/bin/python --with-system --from mixed --format markdown \
		--allow-only "$(ALLOWED)" --output-file $(SUPPLY)/licences-$(1).md
	diff requirements/licences-$(1).md $(SUPPLY)/licences-$(1).md \
		|| { echo "look at the licences above, then: cp $(SUPPLY)/licences-$(1).md requirements/" >&2; exit 1; }
endef

# Where the advisory service cannot be reached: AUDIT=warn says so and goes on. What it finds never passes.
AUDIT ?= fail
audit: $(VENV)/.supply-chain
	$(BIN)/python -m deploy.supply_chain.audit --unreachable $(AUDIT) requirements/torch.txt requirements/serve.txt requirements/train.txt

test-container: $(VENV)/.dev ## tests of the built images, with Docker: after docker compose --profile train build
	PRECIS_CONTAINER_TESTS=1 $(BIN)/python -m pytest tests/container

clean: ## remove .venv and every cache; runs/ and model_store/ stay
	rm -rf $(VENV) build dist *.egg-info $(COMPILED) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find app train tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch first and by itself: its index, where one is given, is for it alone.
$(VENV)/.torch: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python of 3.11 or newer found; name one: make serve PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@touch $@

# Installing compiles the C. Where that fails pip says nothing and goes on: what was compiled before must not stay.
$(VENV)/.sources: $(VENV)/.torch $(wildcard app/engine/cpu_kernels/*.[ch])
	rm -f $(COMPILED)
	@touch $@

$(VENV)/.serve: $(VENV)/.sources
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.ray $(VENV)/.kubernetes: $(VENV)/.dev

$(VENV)/.kubernetes: tests/kubernetes/kubectl.py
	$(BIN)/pip install -e ".[kubernetes]"
	$(BIN)/python -m tests.kubernetes.kubectl $(BIN)
	@touch $@

$(VENV)/.train $(VENV)/.dev $(VENV)/.supply-chain $(VENV)/.ray: $(VENV)/.%: $(VENV)/.sources
	$(BIN)/pip install -e ".[$*]"
	@touch $@ $(VENV)/.serve
