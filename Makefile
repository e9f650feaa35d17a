# Everything one does with the stack, on this machine and without containers: `make run` first.
# A setting of app/settings.py goes before it (`NGINX_PORT=8090 make run`) or into .env. Other Python: PYTHON=….

VENV ?= .venv
STACK = "$(VENV)/bin/python" -m deploy.native.stack
INSTALLED = @test -x "$(VENV)/bin/python" || { echo "nothing is installed yet: \`make run\` does it" >&2; exit 1; };

.DEFAULT_GOAL := help

.PHONY: help setup run status logs scale restart-rolling down clean
help: ## what there is to run
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing (servers by apt, Python packages into .venv); YES=1 does not ask
	@VENV="$(VENV)" deploy/native/setup.sh

run: setup ## start the stack and give it an example task; again: start what does not run
	@$(STACK) up

status: ## a line a process
	$(INSTALLED) $(STACK) status

logs: ## follow the logs; of some with s=api (worker, nginx, redis, …)
	$(INSTALLED) $(STACK) logs $(if $(s),'$(s)')

scale: ## run more or fewer: make scale api=4 worker=3 (until make down)
	$(INSTALLED) $(STACK) scale $(filter-out VENV=% PYTHON=% YES=%,$(MAKEOVERRIDES))

restart-rolling: ## restart the API, workers and beat one at a time, with the code as it is now, under load
	$(INSTALLED) $(STACK) restart-rolling

down: ## stop everything, keep the data
	$(INSTALLED) $(STACK) down

clean: ## stop everything, remove its data
	$(INSTALLED) $(STACK) clean

# Tests and checks

PYTEST = "$(VENV)/bin/python" -m pytest

.PHONY: dev lint format test test-unit test-docker test-faults lock
dev: setup ## install what tests and checks need besides
	@cmp -s requirements-dev.txt "$(VENV)/requirements-dev.txt" || { \
	    echo "installing Python packages for tests into $(VENV), about a minute"; \
	    "$(VENV)/bin/python" -m pip install -q --disable-pip-version-check --progress-bar off -r requirements-dev.txt \
	    && cp requirements-dev.txt "$(VENV)/"; }

lint: dev ## style, types, direction of imports
	@"$(VENV)/bin/ruff" check
	@"$(VENV)/bin/ruff" format --check
	@"$(VENV)/bin/mypy"
	@"$(VENV)/bin/lint-imports"

format: dev ## put the code into its form
	@"$(VENV)/bin/ruff" check --fix --quiet
	@"$(VENV)/bin/ruff" format

test-unit: dev ## the fast tests, without servers
	@$(PYTEST) tests/unit

test: dev ## all tests but Docker's and the faults, on three native stacks of their own
	@$(PYTEST) -n 3 --dist loadfile -m "not docker and not faults"

test-docker: dev ## build the image, run the compose stack, test it (needs Docker with Compose v2)
	@$(PYTEST) tests/docker

test-faults: dev ## each fault under load, a table of what it did; FAULTS_FACTOR=0.2 is shorter, f='redis' a part
	@$(PYTEST) tests/faults $(if $(f),-k '$(f)')

COMPILE = "$(VENV)/bin/python" -m uv pip compile --quiet --universal --python-version 3.11 --no-header

lock: dev ## resolve the versions in requirements*.txt again
	@"$(VENV)/bin/python" -m pip install -q uv
	@$(COMPILE) pyproject.toml -o requirements.txt
	@$(COMPILE) --extra native -c requirements.txt pyproject.toml -o deploy/native/requirements.txt
	@$(COMPILE) --extra native --extra dev -c deploy/native/requirements.txt pyproject.toml -o requirements-dev.txt
