# Two commands do everything on a fresh machine with Python 3.11, pip, make and a compiler:
#   make demo    virtual environment, install, embedded models, `addenda demo` with them
#   make test    the whole test suite
#   make newest  the fast tests with the newest releases that pyproject.toml admits, in an environment of their own
#   make oldest  some of them with the lowest versions that it admits, in another
# TORCH_INDEX: a pip index for another build of torch, e.g. make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
OUT ?= runs/demo
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick newest oldest lint setup count clean

setup: $(VENV)/.installed

# torch first and alone, so that nothing pulls another build of it; then the rest, held by constraints.txt (by torch's
# pin alone where CONSTRAINTS is empty)
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) $(if $(CONSTRAINTS),-c $(CONSTRAINTS),"$$(grep '^torch==' constraints.txt)") -e '.[dev,peft,libraries]'
	touch $@

demo: setup
	$(BIN)/addenda demo --out $(OUT)

test: setup
	$(BIN)/addenda setup-demo
	$(BIN)/python -m pytest -n auto --dist worksteal

quick: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

# every time as new: what pip takes today. torch is the pinned one, so that nothing pulls another build of it
newest:
	rm -rf $(NEWEST)
	$(MAKE) --no-print-directory $(NEWEST)/.installed VENV=$(NEWEST) CONSTRAINTS=
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | grep -iE '^(torch|transformers|accelerate|datasets|peft|numpy|safetensors|tokenizers|huggingface.hub)=='
	$(NEWEST)/bin/python -m pytest -n auto --dist worksteal -m "not slow"

# the lowest torch too where TORCH_INDEX has it; else the pinned one: PyPI's older wheels for Linux want gigabytes of CUDA.
# Warnings of what is to go are no errors: old packages give them about the newer ones that they stand on
oldest:
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/lowest.py $(if $(TORCH_INDEX),,"$$(grep '^torch==' constraints.txt)") > $(OLDEST)/lowest.txt
	cat $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(grep '^torch==' $(OLDEST)/lowest.txt)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/lowest.txt -e '.[dev,peft]'
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal -m "not slow" -W ignore::DeprecationWarning \
		tests/core/disk tests/core/file tests/core/packed tests/core/site/test_targets.py tests/models \
		tests/methods/test_lora.py tests/methods/test_svft.py tests/methods/test_shira.py \
		tests/train/test_card.py tests/train/test_tune.py tests/test_golden.py tests/cli/test_places.py

lint: setup
	$(BIN)/ruff check src tests bench recipes
	$(BIN)/ruff format --check src tests bench recipes
	$(BIN)/pyright

# lines that are neither blank nor comment, file by file
count:
	@for f in $$(find src/addenda -name '*.py' | sort); do \
		awk -v f=$$f '!/^[[:space:]]*(#|$$)/ {n++} END {printf "%5d %s\n", n, f}' $$f; done

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) runs
