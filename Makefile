# make demo    a video from nothing, on any machine with Python
# make test    lint, types, layers, tests
# make check   lint and types alone

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test check clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m tests.small_checkpoints $(DEMO)/checkpoints
	$(BIN)/python inference.py --config_path configs/demo.yaml model_root=$(DEMO)/checkpoints
	@echo "The video:" && ls $(DEMO)/videos/*.mp4

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) $(DEMO)
