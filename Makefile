# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Byte code makes every later start faster; progress bars do not belong in logs.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo lab test notebooks readme docs bench fuzz clean

.venv/ready: settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: run make PYTHON=/path/to/python3.10"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/finetune-nb demo

lab: .venv/ready
	$(BIN)/jupyter lab nbs/index.ipynb

# One thread a worker: two test processes on two cores would otherwise fight for them.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Export, run every notebook, store its outputs, write README.md.
notebooks: .venv/ready
	$(BIN)/nbdev_export
	$(BIN)/python tests/refresh.py

readme: .venv/ready
	$(BIN)/python tests/refresh.py --readme

# The site in _docs/. Without Quarto it says what is missing; no other file changes.
docs: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/docs.py

bench: .venv/ready
	for file in tests/bench/bench_*.py; do $(BIN)/python $$file || exit 1; done

fuzz: .venv/ready
	FINETUNE_NB_FUZZ=1 $(BIN)/python -m pytest tests/test_properties.py

clean:
	rm -rf .venv _docs _proc runs build .pytest_cache .hypothesis *.egg-info nbs/nbdev.yml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
