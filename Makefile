# make demo      M3-nano through stock commands: questions, a tool call, a needle, a picture
# make test      everything that needs no torch, on the newest mlx-lm and mlx-vlm, and on 0.31.3 and 0.6.4
# make test-live a small live comparison with transformers (installs torch), with fresh seeds
# make test-full the full counts of every acceptance list
# make test-hosts third-party servers in environments of their own, with the plugin and without
# make commands  runs every stock command with the plugin and without, and writes docs/commands.md
# make peers     upstream's own tests, with the plugin and without (needs the network)
# make lint      ruff and mypy

PYTHON ?= python3
CHECKPOINT ?= m3-nano

# mlx has no default build for Linux; these extras are mlx-lm's own names for them.
ifeq ($(shell uname -s),Darwin)
DEMO_EXTRAS := [vlm]
TEST_EXTRAS := [test]
LINT_EXTRAS := [vlm,test,lint]
PIN_MLX := mlx
else
DEMO_EXTRAS := [cpu,vlm]
TEST_EXTRAS := [cpu,test]
LINT_EXTRAS := [cpu,vlm,test,lint]
PIN_MLX := mlx[cpu]
endif

NEWEST := .envs/newest/bin/python
OLDEST := .envs/floor/bin/python
BETWEEN := .envs/between/bin/python
# What versions of the libraries cannot change (parsers, nano's texts, what commands say) is not run on the floor.
# Three cases of each test are, and but for --full nothing of the toolbox or of what serves chats.
FLOOR := tests $(foreach name,live third_party nano soak chat checkpoints test_cli.py test_pages.py test_gpu_cost.py test_needs_a_mac.py test_import_rule.py test_conftest.py,--ignore tests/$(name))
FLOOR_SHARE := --most 3 $(foreach name,toolbox distributed upstream,--ignore tests/$(name)) \
	$(foreach name,doctor chat_mlx_lm chat_mlx_vlm chat_histories chat_requests chat_schemas chat_clients vlm_commands commands layouts_table converted_opens quickstart nano_commands,--ignore tests/end_to_end/test_$(name).py)
PROCESSES := tests/distributed tests/end_to_end tests/nano tests/upstream
HOSTS := tests/hosts tests/vlm tests/drafts tests/offload
APART := tests/live tests/third_party tests/soak
PIP := -m pip install --quiet --disable-pip-version-check

# The matrices of the tests are too small for a BLAS with threads, and two test runs may be side by side.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo environments test test-newest test-newest-processes test-newest-hosts test-newest-rest test-floor test-live test-hosts test-full commands peers lint golden clean

demo: .venv/.ready
	@.venv/bin/mlx-m3 doctor | head -1
	@.venv/bin/python examples/demo.py $(CHECKPOINT)

test: test-newest test-floor

# In parts, so that make -j has work for two cores to the end: what starts processes, the hosts, and the rest.
test-newest: test-newest-processes test-newest-hosts test-newest-rest

test-newest-processes: .envs/newest/.ready
	$(NEWEST) -m pytest -q $(PROCESSES) $(FULL) $(and $(FULL),tests/soak)

test-newest-hosts: .envs/newest/.ready
	$(NEWEST) -m pytest -q $(HOSTS) $(FULL)

test-newest-rest: .envs/newest/.ready
	$(NEWEST) -m pytest -q $(foreach directory,$(APART) $(PROCESSES) $(HOSTS),--ignore $(directory)) $(FULL)

test-floor: .envs/newest/.ready .envs/floor/.ready
	M3_NEWEST_PYTHON=$(CURDIR)/$(NEWEST) $(OLDEST) -m pytest -q $(FLOOR) $(or $(FULL),$(FLOOR_SHARE))

test-live: .envs/newest/.torch
	$(NEWEST) -m pytest -q tests/live --seeds 1

test-hosts: .envs/newest/.ready
	$(NEWEST) -m pytest -q tests/third_party

test-full: FULL := --full
test-full: lint test .envs/newest/.torch .envs/between/.ready
	$(BETWEEN) -m pytest -q tests/vlm --full
	$(NEWEST) -m pytest -q tests/live --seeds 20

commands: .envs/newest/.ready .envs/floor/.ready
	$(NEWEST) -m tests.end_to_end.commands newest=$(NEWEST) oldest=$(OLDEST) > docs/commands.md

peers: .envs/newest/.ready
	$(NEWEST) tests/upstream/peers.py

lint: .envs/newest/.ready
	$(NEWEST) -m ruff check .
	$(NEWEST) -m ruff format --check .
	$(NEWEST) -m mypy

golden: .envs/newest/.torch
	$(NEWEST) tests/golden/make_golden.py

environments: .envs/newest/.ready .envs/floor/.ready

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e "$(CURDIR)$(DEMO_EXTRAS)" openai
	@touch $@

.envs/newest/.ready: pyproject.toml
	$(PYTHON) -m venv .envs/newest
	$(NEWEST) $(PIP) -e "$(CURDIR)$(LINT_EXTRAS)"
	@touch $@

# The last mlx-lm before it had an M3 class of its own, with the mlx of its time, and the first
# mlx-vlm that had one.
.envs/floor/.ready: pyproject.toml
	$(PYTHON) -m venv .envs/floor
	$(OLDEST) $(PIP) -e "$(CURDIR)$(TEST_EXTRAS)" mlx-lm==0.31.3 "$(PIN_MLX)==0.31.2" mlx-vlm==0.6.4
	@touch $@

# The first mlx-vlm with component adapters for its prefix cache, and with expert offload.
.envs/between/.ready: pyproject.toml
	$(PYTHON) -m venv .envs/between
	$(BETWEEN) $(PIP) -e "$(CURDIR)$(TEST_EXTRAS)" mlx-vlm==0.7.0
	@touch $@

# torch 2.13.0: the reference is transformers' model, which needs it.
.envs/newest/.torch: .envs/newest/.ready
	$(NEWEST) $(PIP) torch==2.13.0
	@touch $@

clean:
	rm -rf .venv .envs $(CHECKPOINT)
