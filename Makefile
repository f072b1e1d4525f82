# The commands people type. Each sets up what it needs; nothing is installed twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PORT ?= 30000
HOST ?= 127.0.0.1
MODEL ?= $(shell $(BIN)/python -m sglang_dllm demo-path)
ALGORITHM ?= FullAttnMultiBlock
BIN := .venv/bin


.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test,lint]'
	touch $@

serve: .venv/.ready
	@$(BIN)/python -m sglang_dllm doctor
	@echo
	@echo "Starting on http://$(HOST):$(PORT). When it says 'ready to roll', ask it:"
	@echo "  curl -s http://$(HOST):$(PORT)/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"demo\", \"max_tokens\": 64, \"messages\": [{\"role\": \"user\", \"content\": \"Tom has 23 apples. He buys 15 more. How many apples does Tom have?\"}]}'"
	@echo
	$(BIN)/python -m sglang.launch_server --model-path $(MODEL) --served-model-name demo \
		--dllm-algorithm $(ALGORITHM) --host $(HOST) --port $(PORT)

test: .venv/.ready
	$(BIN)/python -m pytest test

test-unit: .venv/.ready
	$(BIN)/python -m pytest test/decoding


lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m sglang_dllm.patches

bench: .venv/.ready
	$(BIN)/python -m benchmark.goals

doctor: .venv/.ready
	$(BIN)/python -m sglang_dllm doctor

clean:
	rm -rf .venv build dist *.egg-info python/*.egg-info
