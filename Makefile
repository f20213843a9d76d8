# make demo    videos from nothing, on any machine with Python
# make studio  a page on which a video goes on without end and does what you type; PORT=8000 puts it elsewhere
# make test    lint, types, layers, tests
# make check   lint and types alone

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo studio test check clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-studio: $(VENV)/.installed requirements-studio.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-studio.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-studio requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python inference.py --config_path configs/shapes_demo.yaml inference_iter=5
	$(BIN)/python inference.py --config_path configs/shapes_calibrated.yaml
	$(BIN)/python interactive_inference.py --config_path configs/shapes_interactive.yaml
	@echo "The videos, each with a contact sheet (.png) beside it:"
	@ls $(DEMO)/shapes/*.mp4 $(DEMO)/shapes_calibrated/*.mp4 $(DEMO)/shapes_interactive/*.mp4

studio: $(VENV)/.installed-studio
	$(BIN)/python -m studio --config_path configs/shapes_studio.yaml --calibration checkpoints/shapes/calibration.safetensors --open $(if $(PORT),--port $(PORT))

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(VENV) $(DEMO)
