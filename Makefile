# Everything a newcomer needs: `make demo` and `make test`. Both set up what they use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
comma := ,
EXTRA := $(if $(filter Darwin,$(shell uname -s)),dev,dev$(comma)cpu)

.PHONY: demo test lint docs openblas browser clean

demo: $(READY) openblas
	$(BIN)/python examples/quickstart.py

# Processes side by side, so that each needs but one thread of OpenBLAS.
test: $(READY) openblas
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlxterp needs Python 3.11 or later; say which: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRA)]'
	touch $(READY)

# MLX's CPU back-end is 50 times faster with OpenBLAS; without root or apt it works without.
openblas:
	@if [ "$$(uname -s)" = Linux ] && ! ldconfig -p 2>/dev/null | grep -q libopenblas.so.0 \
	  && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing OpenBLAS"; \
	  (apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libopenblas0-pthread) >/dev/null 2>&1 \
	  || echo "OpenBLAS could not be installed; going on without it"; fi

# Without Chromium and its driver the tests of the dashboard's page are left out.
browser:
	@if [ "$$(uname -s)" = Linux ] && ! command -v chromedriver >/dev/null \
	  && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium"; \
	  (apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver) >/dev/null 2>&1 \
	  || echo "Chromium could not be installed; going on without it"; fi

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
