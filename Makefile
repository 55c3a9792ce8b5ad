# make demo   install what is missing and run a payload in a VM
# make test   install what is missing and run every test
# make bench  medians and ratios against crun and runc
# make endure ten thousand starts right after create; the cost beside 500 containers
# make man    write the manual pages to packaging/man
# make golden  write tests/golden anew; read the difference before committing
# make mutate take each defence out of a copy of the tree and see its test fail
# make faults kill and fail the native engine at every system call

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench faults mutate endure golden man docs clean

# Runtime packages for the demo, test packages for the tests; nothing is asked.
debian-%:
	@sh packaging/debian-install.sh packaging/debian-$*-packages.txt

PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# pip's own chatter is shown only where it fails.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing the Python packages into $(VENV)"
	@{ $(PIP) --upgrade pip wheel setuptools && $(PIP) --editable '.[images,systemd,dev]'; } \
		>$(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

demo: debian-demo $(STAMP)
	$(BIN)/python tests/demo.py

test: debian-test $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: debian-test $(STAMP)
	$(BIN)/python tests/bench/runtime.py
	$(BIN)/python tests/bench/runtime.py --idle 0.1 --only run life create exec
	$(BIN)/python tests/bench/builtin.py
	$(BIN)/python tests/bench/images.py
	$(BIN)/python tests/bench/network.py

faults: debian-test $(STAMP)
	$(BIN)/python tests/faults/every_call.py

endure: debian-test $(STAMP)
	$(BIN)/python tests/bench/native.py

mutate: debian-test $(STAMP)
	$(BIN)/python tests/security/mutations.py

golden: $(STAMP)
	KRUN_WRITE_GOLDEN=1 $(BIN)/python -m pytest -q tests/golden tests/unit/test_plan.py

man: $(STAMP)
	$(BIN)/python -c "from pathlib import Path; from krun import man; man.write(Path('packaging/man'))"

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info
