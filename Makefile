# The verbs, for people and CI alike. Each sets up what it needs: git, make and Python 3.11 are enough to start.

PYTHON ?= python3
# More arguments for a verb: make test ARGS="tests/serving -k ranks"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The parts are what pyproject.toml maps into the namespace.
PARTS := $(shell sed -n 's/^"okavango\.\([a-z]*\)" = "\1"/\1/p' pyproject.toml)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

.PHONY: demo
demo: setup debian-demo ## train the emoji adapter, serve it, ask it about pictures it has not seen
	$(BIN)/python examples/emoji_demo.py $(ARGS)

.PHONY: test
test: setup debian-test starter ## run the tests (ARGS="tests/serving -k ranks" for some of them)
	$(BIN)/pytest $(ARGS)

.PHONY: check
check: setup debian-check typing-links ## check format, lint and types, and what would otherwise rot (tests/guards)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/guards

.PHONY: bench
bench: setup debian-bench starter ## measure beside transformers and PEFT; writes benchmarks/results/
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/media.py $(MEDIA_ARGS)
	$(BIN)/python benchmarks/data.py $(DATA_ARGS)
	$(BIN)/python benchmarks/training.py $(TRAINING_ARGS)
	$(BIN)/python benchmarks/beside_training.py $(BESIDE_ARGS)

.PHONY: bench-gpu
bench-gpu: setup ## measure on a GPU, beside transformers and PEFT; no other verb needs one
	$(BIN)/python benchmarks/gpu.py $(ARGS)

.PHONY: format
format: setup ## format the code and mend what the linter can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: revision
revision: export OKAVANGO_HOME := build/revision
revision: export OKAVANGO_DATABASE_URL :=
revision: setup ## write the migration for a changed schema (MESSAGE="add quotas")
	@test -n "$(MESSAGE)" || { echo 'What does it do? make revision MESSAGE="add quotas"'; exit 1; }
	rm -rf build/revision
	$(BIN)/okavango db upgrade
	$(BIN)/alembic revision --autogenerate --message "$(MESSAGE)" \
		--rev-id $$(ls migrations/versions/[0-9]*.py | awk 'END {printf "%04d", NR + 1}')
	$(BIN)/ruff check --quiet --fix-only migrations
	$(BIN)/ruff format migrations

.PHONY: lock
lock: ## write requirements.lock anew from what is installed in .venv
	$(BIN)/python .ci/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock

.PHONY: clean
clean: ## remove caches and build products (not .venv, not the bases)
	rm -rf build dist *.egg-info .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis requirements.lock.new
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: setup
setup: $(VENV)/stamp ## make .venv as requirements.lock says (every verb does)

# Without --no-deps on the first line: a Python or system other than the one that wrote the lock may need more.
# Without build isolation: setuptools is in the lock, so nothing is fetched that the lock does not name.
$(VENV)/stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: starter
starter: setup ## build the starter base (instant when it is there)
	$(BIN)/okavango base build starter

.PHONY: typing-links
typing-links: ## link the parts into .typing/okavango, for mypy, or as PYTHONPATH=.typing
	@mkdir -p .typing/okavango
	@for part in $(PARTS); do ln -sfn ../../$$part .typing/okavango/$$part; done

.PHONY: debian-bench debian-check debian-demo debian-test
debian-bench debian-check debian-demo debian-test: debian-%:
	@sh .ci/debian.sh $*
