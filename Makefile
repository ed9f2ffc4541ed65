# What is run again and again; `.ci/run` runs all of it in a new environment.
PYTHON ?= python

.PHONY: check format test extras examples demo from-scratch docs

check:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

format:  ## mend what can be mended
	ruff check --fix .
	ruff format .

test:  ## the whole suite, on all cores
	pytest

extras:  ## the tests that are skipped for want of an extra
	pytest $$(grep -rl --include="*.py" importorskip tests)

examples:  ## all but antibody_cdr3.py, which downloads 100 MB
	for example in $(filter-out %/antibody_cdr3.py %/test_your_structure.py,$(wildcard examples/*.py)); do $(PYTHON) "$$example" || exit 1; done
	pytest examples/test_your_structure.py

OUT ?= unfactor-demo

demo:  ## the models that come with the library
	unfactor demo --out $(OUT) --quiet

from-scratch:  ## the smallest preset, trained
	unfactor demo --from-scratch --preset tiny --out $(OUT)-from-scratch --quiet

docs:  ## the documentation site, in site/
	mkdocs build --strict
