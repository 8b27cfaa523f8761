# `make help` lists the targets. They need Python 3.11 or 3.12 and make; the rest is installed into .venv.

PROFILE ?= demo
# How many notebooks run at once; empty: one a core, at most 8, as memory allows (`scbert preflight --count-jobs`).
JOBS ?=
# How many threads each of them gets; empty: one in the demo, whose arrays are too small for a second to pay, else the
# cores shared out.
THREADS ?=
# Over how many processes the jobs of each benchmark notebook are shared out; JOBS of them run at once.
PARTS ?= 1
# On Linux, PyPI's torch is a CUDA build of some GB: TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids it.
# Empty by default, because an index that cannot be reached slows every install.
TORCH_INDEX ?=
# Anything: run even where `scbert preflight` finds memory, disk or a download short.
ANYWAY ?=
PYTHON ?= $(shell for p in python3.11 python3.12; do $$p -c "print('$$p')" 2>/dev/null && exit; done; echo python3)

BIN := .venv/bin
# Where `scbert run` writes: its environment variable, if set.
RUNS := $(or $(SCBERT_RUNS),runs)
# What is kept of a committed notebook: outputs, counts and ids, but no times and versions.
STRIP := $(BIN)/nbstripout --keep-count --keep-output --keep-id \
	--extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill"

# Threads that wait for work sleep, in JupyterLab's kernels too; `import scbert` sets the same where torch is not loaded.
export OMP_WAIT_POLICY ?= PASSIVE
export KMP_BLOCKTIME ?= 0
export OPENBLAS_THREAD_TIMEOUT ?= 4

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help reproduce report test test-browser lab lint refresh publish docs

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PROFILE=demo|small|large|paper JOBS= THREADS= PARTS=1 TORCH_INDEX= PYTHON=python3.11 ANYWAY="

# One stamp for each extra that was installed, inside .venv, so that removing .venv removes them too.
# An install that was killed can leave half a package behind which pip takes for whole. Its mark stays, and the
# next make starts from an empty .venv. An install that failed by itself (no network, say) keeps what is there.
.venv/%.installed: pyproject.toml requirements.lock
	@test -x $(BIN)/pip && test ! -e .venv/interrupted || $(PYTHON) -m venv --clear .venv
	@echo "Installing scbert-companion[$*] into .venv (minutes, the first time)"
	@touch .venv/interrupted; trap "exit 130" INT TERM; \
	$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock \
		$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -e ".[$*]"; \
	status=$$?; rm .venv/interrupted; exit $$status
	@touch $@

# --nolock: a killed Snakemake leaves its lock behind, and a newcomer would have to know of --unlock. Results are
# written atomically, so that two runs at once cost time but damage nothing.
# The report is made after a failure too: it shows how far each notebook came.
# The greedy scheduler starts those with the largest inputs first, which are the notebooks that take longest.
# Beyond the demo the benchmarks have further rivals.
RIVALS := $(if $(filter-out demo,$(PROFILE)),.venv/baselines.installed .venv/scvi.installed)
COUNT_JOBS = $$($(BIN)/scbert preflight --profile $(PROFILE) --parts $(PARTS) --count-jobs)
SHARE_CORES = $$($(BIN)/python -c "import os; print(max(1, min(8, os.cpu_count()) // $$jobs))")
reproduce: .venv/workflow.installed $(RIVALS)  ## Run the notebooks of a profile, write report/index.html, print the scoreboard
	@jobs=$(or $(JOBS),$(COUNT_JOBS)) && \
	threads=$(or $(THREADS),$(if $(filter demo,$(PROFILE)),1,$(SHARE_CORES))) && \
	$(BIN)/scbert preflight --profile $(PROFILE) --jobs $$jobs --parts $(PARTS) $(if $(ANYWAY),--anyway) || exit 1; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --cores $$((jobs * threads)) --nolock --rerun-incomplete \
		--keep-going --quiet host reason rules --scheduler greedy \
		--config profile=$(PROFILE) threads=$$threads parts=$(PARTS) $(if $(ANYWAY),anyway=1); \
	status=$$?; $(BIN)/scbert report --profile $(PROFILE) && exit $$status

report: .venv/workflow.installed  ## Write report/index.html from the runs there are
	$(BIN)/scbert report --profile $(PROFILE)

# The notebooks' results go to runs/test, to leave your own in place.
# One process a core, with one thread each; what a file holds, a notebook's cells too, is run by one of them, in order.
AT_ONCE := -n $(or $(JOBS),logical --maxprocesses 8) --dist loadscope
test: export SCBERT_RUNS := $(CURDIR)/runs/test
test: export OMP_NUM_THREADS ?= $(or $(THREADS),1)
test: .venv/test.installed  ## Unit tests, then every notebook with its outputs compared
	$(BIN)/python -m pytest -q $(AT_ONCE) tests
	$(BIN)/python -m pytest -q $(AT_ONCE) --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks

test-browser: .venv/browser.installed  ## The report in a browser: needs Chromium (apt-get install chromium)
	$(BIN)/python -m pytest -q -rs tests/test_report.py

lab: .venv/lab.installed  ## JupyterLab on the notebooks; FLAGS="--port 9000" is passed on
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-lab --notebook-dir notebooks $(FLAGS)

lint: .venv/dev.installed  ## Style of code and notebooks
	$(BIN)/ruff check scbert tests notebooks docs
	$(BIN)/ruff format --check scbert tests notebooks docs
	$(STRIP) --verify notebooks/*.ipynb
	$(BIN)/lint-imports --no-cache --no-logo

# Not from runs/demo: papermill adds a cell with the profile, and the execution counts would have a gap.
# nbconvert merges a cell's pieces of output before it executes, hence twice.
refresh: .venv/dev.installed  ## Execute the committed notebooks in place and publish the demo's figures
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-nbconvert --to notebook --inplace --execute \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(BIN)/jupyter-nbconvert --coalesce-streams notebooks/*.ipynb
	$(STRIP) notebooks/*.ipynb
	$(MAKE) publish PROFILE=demo

# Figures, tables and the record of each finished run; no weights, training logs (history.csv) or notebooks.
publish:  ## Copy the figures and numbers of runs/PROFILE to figures/PROFILE
	@ls $(RUNS)/$(PROFILE)/*/record.json >/dev/null 2>&1 || { echo "First: make reproduce PROFILE=$(PROFILE)"; exit 1; }
	@for record in $(RUNS)/$(PROFILE)/*/record.json; do \
		from=$$(dirname "$$record"); to=figures/$(PROFILE)/$$(basename "$$from"); \
		rm -rf "$$to" && mkdir -p "$$to" && cp "$$record" "$$to.json" && \
		find "$$from" -maxdepth 1 \( -name '*.png' -o -name '*.svg' -o -name '*.csv' -o -name predictions.csv.gz \) \
			! -name '*history*.csv' -exec cp {} "$$to" \; && \
		echo "Published $$to" || exit 1; \
	done

# After `make publish`: the tests compare both with what these records give.
docs: .venv/test.installed  ## Fill the results of the README and docs/results.md from the records of figures/
	$(BIN)/python docs/build_results.py
