# One command for each thing a person does here; CI runs the same ones.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test packed kernels interop check wheel bench docs clean

demo: $(VENV)/.demo               ## set up, build a run of the sample model, show it
	$(BIN)/mnemoscope demo

test: $(VENV)/.dev                ## the quick tests; SLOW=1 for all of them
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 $(if $(SLOW),,-m "not slow") $(ARGS)

packed: $(VENV)/.dev              ## the tests that need torchao, which stays out of the environment: transformers would import it always
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target build/torchao torchao
	PYTHONPATH=build/torchao $(BIN)/python -m pytest -W ignore -k torchao tests/test_packed.py

kernels: $(VENV)/.dev             ## the kernel for accelerators, in Triton's interpreter; Triton is large, and of no use in an environment without one
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target build/triton triton
	TRITON_INTERPRET=1 PYTHONPATH=build/triton $(BIN)/python -m pytest -W ignore -k kernel tests/test_device.py

READERS := circuit-tracer automated-interpretability eai-delphi circuitsvis asyncer docstring-parser orjson simple-parsing sniffio
SCRIPTS := d3@7.9.2 d3-collection@1.0.7 d3-jetpack@2.3.0 dagre@0.8.5 pako@2.1.0
interop: $(VENV)/.dev             ## exports read by the programs that they are for, which ask for other versions of what is here
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target build/interop $(READERS)
	! command -v npm >/dev/null || { mkdir -p build/viewer && npm pack -s --pack-destination build/viewer $(SCRIPTS) >/dev/null; }
	PYTHONPATH=build/interop $(BIN)/python -m pytest -W ignore tests/test_interop.py

check: $(VENV)/.dev               ## style, types, import contracts, docs that are generated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

wheel: $(VENV)/.dev               ## what users get: the wheel in an environment of its own, tried out
	.ci/wheel $(VENV)

bench: $(VENV)/.bench             ## speed and memory, as JSON (long)
	$(BIN)/python -m benches

docs: $(VENV)/.dev                ## write the pages that are generated from the code
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[gguf,web]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	touch $@
