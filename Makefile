# Two commands do all the set-up on a fresh machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
# Without a GPU the kernels run in Triton's interpreter; with one they run on it.
INTERPRET := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 0 || echo 1)
READY := $(basename $(notdir $(wildcard specs/*.yaml)))

.PHONY: demo test package docs fuzz lint goldens generated clean

$(VENV)/.ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(VENV)/.ready
	$(RUN) -m nsagen build $(READY)
	$(RUN) -m nsagen verify tiny
	$(RUN) -m nsagen compile tiny
	$(RUN) examples/demo.py

test: $(VENV)/.ready lint
	TRITON_INTERPRET=$(INTERPRET) $(RUN) -m pytest -n 2 --dist worksteal

# sdist and wheel, installed into empty environments; the part without torch on every Python that is here.
package: $(VENV)/.ready
	$(RUN) -m pytest --override-ini=addopts=-q -m package tests/package

docs:
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --disable-pip-version-check "mkdocs>=1.6"
	$(VENV)-docs/bin/mkdocs build --strict

fuzz: $(VENV)/.ready
	TRITON_INTERPRET=$(INTERPRET) NSAGEN_FUZZ=300 $(RUN) -m pytest -n 2 --dist worksteal -m fuzz -o timeout=7200

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(RUN) -m nsagen build --check $(READY)

goldens: $(VENV)/.ready
	$(RUN) -m nsagen build $(READY)
	$(RUN) -m pytest tests/unit/test_golden.py --update-goldens

clean:
	rm -rf $(VENV) $(VENV)-docs site .pytest_cache .ruff_cache .hypothesis build dist
