# Every target makes the environment it needs by itself: .venv in this checkout.
# It needs Python >= 3.11 with venv, and the network the first time only.
# Outputs of the demo and of bench go to out/.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --quiet
ARGS ?=

# A stamp is named after the content of pyproject.toml and of the native sources, so that neither a
# fresh checkout's file times nor a pull that leaves the dependencies alone make it stale.
PROJECT := $(shell cat pyproject.toml CMakeLists.txt */native/* | cksum | cut -d" " -f1)
STAMP := $(VENV)/.dualpath
DEV := $(STAMP)-dev-$(PROJECT)
RUN := $(STAMP)-run-$(PROJECT)
MODEL := $(STAMP)-model-$(PROJECT)

# For a build without CUDA from PyTorch's own index:
#   make demo-model TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# Most tests wait: for deadlines, peers that are silent, processes.
WORKERS ?= 2
PROTOS := $(wildcard proto/dualpath/proto/v*/*.proto)

.PHONY: help demo demo-model test test-rdma lint format bench bench-store bench-peers soak proto env clean distclean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | \
		awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	echo
	echo '  ARGS="..." is handed to demo, demo-model, bench-store, bench-peers, soak and test.'

demo: $(RUN) ## Two paths against one, measured on this machine (under 90 s): out/demo.json, .png
	@mkdir -p out
	$(VENV)/bin/dualpath demo --json out/demo.json --plot out/demo.png $(ARGS)

demo-model: $(RUN) ## A real model's KV through the store and back (installs torch for CPU)
	@mkdir -p out
	if [ ! -e '$(MODEL)' ]; then
		echo 'installing $(TORCH) and transformers into $(VENV) (about 1.2 GB)' >&2
		if ! { $(PIP) $(TORCH) && $(PIP) 'transformers>=4.50'; } 2>out/demo-model-install.log; then
			tail -n 3 out/demo-model-install.log
			echo 'skipped: $(TORCH) or transformers could not be installed (reason above)'
			exit 0
		fi
		rm -f $(STAMP)-model-*
		touch '$(MODEL)'
	fi
	$(VENV)/bin/dualpath demo-model $(ARGS)

test: $(DEV) ## The default tests (under 10 minutes)
	@$(PY) -m pytest -m 'not slow and not root' -n $(WORKERS) --dist loadfile $(ARGS)

test-rdma: $(DEV) ## The RDMA transport over real verbs, in a virtual machine (about a minute)
	@status=0
	$(PY) tests/transfer/rdma_vm/boot.py $(ARGS) || status=$$?
	if [ "$$status" -eq 75 ]; then exit 0; fi
	exit "$$status"

lint: $(DEV) ## ruff, mypy --strict and the import contract
	@set -x
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .
	$(VENV)/bin/lint-imports --no-logo

format: $(DEV) ## Let ruff rewrite the sources
	@$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(RUN) ## The headline runs: 1P1D and 1P2D at load, and lone loads; JSON in out/
	@mkdir -p out
	bench() { $(VENV)/bin/dualpath demo --json "out/bench-$$1.json" --plot "out/bench-$$1.png" "$${@:2}"; }
	bench 1p1d --prefill 1 --decode 1
	bench 1p2d --prefill 1 --decode 2
	bench lone-1p1d --prefill 1 --decode 1 --concurrency 1
	bench lone --prefill 1 --decode 2 --concurrency 1
	bench lone-narrow --prefill 1 --decode 2 --concurrency 1 --compute-ratio 1

bench-store: $(RUN) ## The store against fio, memcpy and sockets; exit 0 only if the targets hold
	@mkdir -p out
	$(VENV)/bin/dualpath bench store --data out --json out/bench-store.json --plot out/bench-store.png \
		--markdown out/bench-store.md $(ARGS)

bench-peers: $(RUN) ## Other KV stores and this one, the same work (installs them in .venv-peers)
	@mkdir -p out
	$(VENV)/bin/dualpath bench peers --install --data out --json out/bench-peers.json \
		--plot out/bench-peers.png --markdown out/bench-peers.md $(ARGS)

soak: $(RUN) ## 500 kills, 500 power losses, 10,000 flipped bytes, 30 minutes of load (about an hour)
	@mkdir -p out
	$(VENV)/bin/dualpath bench soak --json out/soak.json $(ARGS)

proto: $(DEV) ## Generate the gRPC stubs again (pinned tools)
	@PATH='$(CURDIR)/$(VENV)/bin':$$PATH $(PY) -m grpc_tools.protoc -Iproto \
		--python_out=proto --grpc_python_out=proto \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

env: $(DEV) ## Only make the environment

clean: ## Remove outputs and caches
	@rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environments too
	@rm -rf '$(VENV)' .venv-peers

# --- the environment -------------------------------------------------------------------------

$(PY):
	@found=
	for name in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python; do
		if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			found=$$(command -v "$$name"); break
		fi
	done
	if [ -z "$$found" ]; then
		echo 'error: no Python >= 3.11 found (looked for python3, python3.11 ... python3.14).' >&2
		echo '       Debian or Ubuntu: apt install python3 python3-venv; or: make PYTHON=/path/to/python3.11' >&2
		exit 1
	fi
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then
		version=$$("$$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
		echo "error: $$found has no venv module. Debian or Ubuntu: apt install python$$version-venv" >&2
		exit 1
	fi
	echo "making $(VENV) with $$found (the first time takes a minute)" >&2
	"$$found" -m venv '$(VENV)' || { rm -rf '$(VENV)'; exit 1; }

$(RUN): | $(PY)
	@$(PIP) --editable '.[bench]'
	rm -f $(STAMP)-run-*
	touch '$@'

$(DEV): | $(PY)
	@$(PIP) --editable '.[bench,dev]'
	rm -f $(STAMP)-dev-* $(STAMP)-run-*
	touch '$@' '$(RUN)'
