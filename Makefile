# make book   make test   make notebooks [NB=04_mlp_adam_vs_sgd] [FORCE=1] [TEXT=1]   make help
PYTHON ?= python3
PY := .venv/bin/python
PORT ?= 8000
export REPOSITORY
# PyTorch's threads sleep while they wait. Else those of one process keep the cores from another's.
export OMP_WAIT_POLICY := passive

.PHONY: help env book serve test check faults mutants audit test-versions gpu-test notebooks proof lint bench lock clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py

book: env ## build the HTML from the stored outputs  [REPOSITORY=https://...]
	@$(PY) -m tools.book

serve: book ## show the book on http://127.0.0.1:8000  [PORT=...]
	@$(PY) -m tools.serve $(PORT)

# Full-size models of random weights, made once in the cache folder (4 GB).
CHECKPOINTS := gpt2-large Qwen2-0.5B

test: env ## prove it: the helpers, every notebook again, the built book
	@$(PY) -m helpers.models $(CHECKPOINTS) >/dev/null
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env \
		notebooks tests

# No page, no notebook, no model of full size: what tells most of an edit in a minute.
QUICK := allocator autocast catalogue cli cluster edges environment explain files fit imports kept_estimates \
	patches placement precision private_names pytest_plugin units
check: env ## what one runs after each edit: style, types and the quick tests, in a minute
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy
	@$(PY) -m pytest -n 2 --dist loadfile -q $(QUICK:%=tests/test_%.py)

faults: env ## kill it, fill the disk, take the network away: what it promises on its worst day
	@$(PY) -m pytest -m slow tests/faults

# cosmic-ray and coverage, with the packages of .venv.
mutants: env ## change the engine's core in 600 places: which change does no test notice? (an hour)  [MUTANTS="tracker --count 50"]
	@PYTHONPATH=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		OMP_NUM_THREADS=1 $(PY) -m uv tool run --quiet --python $(PY) --from cosmic-ray==8.7.0 \
		--with coverage==7.17.5 python -m tools.mutants $(MUTANTS)

audit: env ## look for known vulnerabilities in what requirements.lock pins; needs PyPI's database
	@$(PY) -m uv tool run --quiet pip-audit@2.10.1 --strict --progress-spinner off --disable-pip \
		--require-hashes --requirement requirements.lock

test-versions: env ## the engine's tests and a dry run of the record with the oldest and the newest PyTorch (6 GB each)
	@$(PY) -m tools.versions

gpu-test: env ## run every notebook on this machine's CUDA GPU, and compare with the stored bytes
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu-test needs a CUDA GPU, and torch.cuda.is_available() is False: make test replays without one")'
	@$(PY) -m helpers.models $(CHECKPOINTS) >/dev/null
	@$(PY) -m pytest -p no:xdist --nbval --nbval-current-env notebooks

notebooks: env ## make and execute the notebooks from their sources  [NB=one] [FORCE=1] [TEXT=1]
	@$(if $(filter-out 07_% 08_%,$(NB))$(TEXT),,$(PY) -m helpers.models $(CHECKPOINTS) >/dev/null)
	@$(PY) -m tools.notebooks $(NB) $(if $(FORCE),--force) $(if $(TEXT),--text)

proof: env ## replay everything that was measured on a card, beside what was measured
	@$(PY) -m benchmarks.proof

lint: env ## check style and types, of Python, pages and workflows
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/biome lint --error-on-warnings
	@$(PY) -m djlint --lint --quiet --extension html book/_ext book/_templates
	@$(PY) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@.venv/bin/zizmor --offline --quiet .github

bench: env ## speed and accuracy beside a peer
	@$(PY) -m benchmarks.training_step
	@$(PY) -m benchmarks.accuracy
	@$(PY) -m benchmarks.speed

lock: env ## bring requirements.lock and its licences up to date with requirements.txt and pyproject.toml
	@$(PY) -m uv pip compile requirements.txt --group dev --universal --python-version 3.11 \
		--generate-hashes --custom-compile-command "make lock" --quiet -o requirements.lock
	@$(PY) -m tools.licences

clean: ## remove what was built; the environment, .venv, stays
	rm -rf _build build dist mutants .hypothesis .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
