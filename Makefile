# Every target builds the environment it needs: the only thing to have is Python 3.11, 3.12 or 3.13 with venv.
#
#   make run PROMPT="a red heart, noto style"    writes out.png
#   make test                                    the tests, on TensorFlow and on JAX
#   make lint                                    ruff and pyright
#   make peers                                   the comparison with diffusers, transformers, KerasCV (needs torch)
#   make bench                                   speed and memory side by side with them, plots in build/;
#                                                BENCH="--size tiny" rehearses
#   make serving                                 an export answers where tensorflow-cpu is all there is, no Keras
#   make wheel                                   builds the wheel and generates from it in an empty directory

SHELL := /bin/bash

# The first of these that is a supported Python; `make PYTHON=/path/to/python ...` names another.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c '$(SUPPORTED)' 2>/dev/null && echo "$$name" && break; done)

PROMPT ?= a red heart, noto style
OUTPUT ?= out.png
export PROMPT OUTPUT

# The registry's own build for Linux may bring several GB of CUDA along; another one is named by
#   make peers TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0

VENV := .venv
VENV_PEERS := .venv-peers
VENV_WHEEL := .venv-wheel
VENV_SERVING := .venv-serving
PINNED := requirements.txt pyproject.toml
PIP := -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint requirements.txt

# The same tests run on JAX, less those that touch no array, that of the benchmarks, which measure TensorFlow, and that of
# the command that trains, whose trainings and runs have tests of their own.
NO_ARRAYS := architecture benchmarks cli cli_export data data_images data_order diffusers_directories \
	diffusers_scheduler emoji_recipe evaluation export_tokenizer hub kerascv key_map mutated_files packaging pictures \
	recipes safetensors_files schedule tokenizer train_command
JAX_IGNORES := $(foreach name,$(NO_ARRAYS),--ignore=tests/test_$(name).py)

# A process for each core, since tracing and compiling keep to one, and one thread in each; what shares models stays
# together (tests/conftest.py).
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --no-loadscope-reorder --durations 15
test-tensorflow test-jax peers serving: export TF_CPP_MIN_LOG_LEVEL ?= 2
test-tensorflow test-jax peers: export TF_NUM_INTRAOP_THREADS ?= 1
test-tensorflow test-jax peers: export OMP_NUM_THREADS ?= 1

.PHONY: run test test-tensorflow test-jax lint format peers bench serving wheel clean
.DELETE_ON_ERROR:

run: $(VENV)/.run
	$(VENV)/bin/latentdiff generate "$$PROMPT" --output "$$OUTPUT"

test: test-tensorflow test-jax

test-tensorflow: $(VENV)/.test
	KERAS_BACKEND=tensorflow $(VENV)/bin/python $(PYTEST) tests --ignore=tests/peers

# Most of the time would be XLA's, optimising code that runs once.
test-jax: $(VENV)/.test
	KERAS_BACKEND=jax XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
		$(VENV)/bin/python $(PYTEST) tests --ignore=tests/peers $(JAX_IGNORES)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

peers: $(VENV_PEERS)/.peers
	KERAS_BACKEND=tensorflow $(VENV_PEERS)/bin/python $(PYTEST) tests/peers

bench: $(VENV_PEERS)/.peers
	$(VENV_PEERS)/bin/python -m benchmarks --plots build $(BENCH)

serving: $(VENV)/.run $(VENV_SERVING)/.serving
	folder="$$(mktemp -d)"; trap 'rm -rf "$$folder"' EXIT; \
		$(VENV)/bin/latentdiff export emoji --output "$$folder/emoji/1" --dtype float32 \
		&& $(VENV)/bin/latentdiff generate "$$PROMPT" --dtype float32 --seed 3 --num-steps 4 --guidance-scale 5 \
			--output "$$folder/python.png" \
		&& $(VENV_SERVING)/bin/python -P tests/serve_without_keras.py "$$folder/emoji/1" "$$folder/python.png" \
			"$$PROMPT" 3 4

# Installed by name and run elsewhere with -P, so nothing of the checkout is seen.
wheel: $(VENV)/.run
	rm -rf dist $(VENV_WHEEL)
	$(VENV)/bin/python $(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/python $(INSTALL) --no-compile dist/latentdiff-*.whl
	root="$$PWD"; empty="$$(mktemp -d)"; trap 'rm -rf "$$empty"' EXIT; cd "$$empty" \
		&& "$$root/$(VENV_WHEEL)/bin/latentdiff" generate "a red heart, noto style" --num-steps 4 --seed 0 \
		&& "$$root/$(VENV_WHEEL)/bin/latentdiff" generate --from out.png --output again.png \
		&& cmp out.png again.png
	rm -rf $(VENV_WHEEL)

clean:
	rm -rf $(VENV) $(VENV_PEERS) $(VENV_SERVING) $(VENV_WHEEL) build dist out.png

# Stamps: each remembers that an environment holds what requirements.txt and pyproject.toml said.
$(VENV)/.run: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(INSTALL) --editable .
	touch $@

$(VENV)/.test: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(INSTALL) --editable ".[test]"
	touch $(VENV)/.run $@

$(VENV)/.lint: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(INSTALL) --editable ".[test,lint]"
	touch $(VENV)/.run $(VENV)/.test $@

# The peers lie on top of what the tests use, in an environment of their own, so that `make test` never sees torch.
# torch comes first and alone, so that the build chosen above stays.
$(VENV_PEERS)/.peers: $(VENV)/.test | $(VENV_PEERS)/bin/python
	site() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(site $(VENV))')" > "$$(site $(VENV_PEERS))/tests.pth"
	$(VENV_PEERS)/bin/python $(INSTALL) $(TORCH)
	$(VENV_PEERS)/bin/python $(INSTALL) --editable ".[peers]"
	touch $@

# TensorFlow alone: the version is the pinned one, and the Keras that pip brings along goes again.
$(VENV_SERVING)/.serving: $(PINNED) | $(VENV_SERVING)/bin/python
	$(VENV_SERVING)/bin/python $(INSTALL) "tensorflow-cpu==$$(sed -n 's/^tensorflow==//p' requirements.txt)"
	$(VENV_SERVING)/bin/python $(PIP) uninstall --quiet --yes keras
	touch $@

$(VENV)/bin/python $(VENV_PEERS)/bin/python $(VENV_SERVING)/bin/python:
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { echo "latentdiff needs Python 3.11, 3.12 or 3.13; found:" \
		"$$(python3 --version 2>&1 || echo none). Name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) comes without venv and pip;" \
		"Debian and Ubuntu have them in python3-venv (apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)
