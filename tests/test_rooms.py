"""Who may import whom, and that remote loading finds every shipped file."""

import ast
import re
import sys
from pathlib import Path

import pytest

from moevlm.base_moevlm import SHIPPED
from moevlm.configuration_moevlm import AUTO_MAP

ROOT = Path(__file__).resolve().parent.parent
# Room: the rooms it may import. Workshop files import shipped ones at most, data what its sources are made of.
SHIPPED_MAY_IMPORT = {
    "sparsity": set(),
    "configuration": {"sparsity"},
    "routing": set(),
    "router_losses": {"routing"},
    "kernels": set(),
    "graphs": {"kernels"},
    "experts": {"graphs", "kernels", "routing"},
    "summary": set(),
    "base": {"experts", "routing", "summary", "configuration"},
    "vision": {"base", "experts", "graphs", "kernels", "configuration"},
    "modeling": {
        "vision",
        "base",
        "experts",
        "graphs",
        "kernels",
        "routing",
        "router_losses",
        "sparsity",
        "summary",
        "configuration",
        "generation",
    },
    "generation": set(),
    "processing": {"configuration"},
}
# The Trainer's guard rails are a file of their own, and stand in every Trainer, whoever builds it. Keys of YAML files
# are checked, and JSON files read, by one function each. A Trainer asks for the order in which rows make batches.
WORKSHOP_EXCEPTIONS = {"data": {"scenes", "dialogues", "records", "sources"}, "dialogues": {"scenes"}}
WORKSHOP_EXCEPTIONS |= {"sources": {"scenes", "dialogues", "records"}, "tasks": {"records"}, "answers": {"records"}}
WORKSHOP_EXCEPTIONS |= {"training": {"telemetry", "grounding", "collating"}, "grounding": {"collating"}}
WORKSHOP_EXCEPTIONS |= {"report": {"evaluation"}}  # which answers are right
WORKSHOP_EXCEPTIONS |= {"peers": {"layouts"}, "parents": {"configmaps"}}  # the errors while opening
WORKSHOP_EXCEPTIONS |= {"carryover": {"configmaps", "parents"}}  # remarks on pictures; what a parent is
WORKSHOP_EXCEPTIONS |= {"checkpoints": {"records", "configmaps"}}  # a config is a JSON file of known fields
WORKSHOP_EXCEPTIONS |= {"publishing": {"sources"}}  # which of a mixture's entries are files of one's own
# Besides the standard library: what each user of a transformers model with pictures has installed.
PACKAGES = {"torch", "transformers", "numpy", "PIL", "tokenizers"}

ROOMS = sorted(path.name.removesuffix("_moevlm.py") for path in ROOT.glob("*_moevlm.py"))
COMMANDS = sorted(path.name for path in ROOT.glob("run_*.py"))
TREES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}


def siblings(tree):
    """The rooms that a file imports relatively."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.removesuffix("_moevlm") for name in names}
    return found


def packages(tree):
    """The packages that a file imports absolutely, outside `try`."""
    guarded = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    found = set()
    for node in set(ast.walk(tree)) - guarded:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_every_shipped_file_has_its_rule():
    assert set(SHIPPED) == set(SHIPPED_MAY_IMPORT) <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room):
    workshop = set(SHIPPED) | WORKSHOP_EXCEPTIONS.get(room, set())
    assert siblings(TREES[f"{room}_moevlm.py"]) <= SHIPPED_MAY_IMPORT.get(room, workshop)


@pytest.mark.parametrize("room", ROOMS)
def test_imported_files_never_use_the_door_or_a_command(room):
    forbidden = {"moevlm"} | {name.removesuffix(".py") for name in COMMANDS}
    assert not packages(TREES[f"{room}_moevlm.py"]) & forbidden


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_go_through_the_door(name):
    assert siblings(TREES[name]) == set()
    assert not {package for package in packages(TREES[name]) if package.endswith("_moevlm")}


@pytest.mark.parametrize("room", SHIPPED)
def test_a_shipped_file_needs_nothing_but_what_each_user_has(room):
    assert packages(TREES[f"{room}_moevlm.py"]) <= PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", SHIPPED)
def test_the_scan_of_transformers_sees_the_imports_that_python_sees(room):
    source = (ROOT / f"{room}_moevlm.py").read_text(encoding="utf-8")
    # transformers.dynamic_module_utils.get_relative_imports, both forms; it reads docstrings too.
    scanned = re.findall(r"^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE)
    scanned += re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    assert sorted(set(scanned)) == sorted(f"{name}_moevlm" for name in siblings(TREES[f"{room}_moevlm.py"]))


@pytest.mark.parametrize(
    "entry", sorted({target.partition("_moevlm")[0] for target in AUTO_MAP.values()} | {"processing"})
)
def test_an_entry_file_names_every_sibling_it_reaches(entry):
    reached, todo = set(), {entry}
    while todo:
        todo = {name for room in todo for name in siblings(TREES[f"{room}_moevlm.py"])} - reached
        reached |= todo
    assert reached == siblings(TREES[f"{entry}_moevlm.py"])


def test_only_commands_run_as_programs():
    programs = {name for name in TREES if 'if __name__ == "__main__":' in (ROOT / name).read_text(encoding="utf-8")}
    assert programs == set(COMMANDS)


@pytest.mark.parametrize("path", sorted((ROOT / "metrics").glob("*/*.py")), ids=lambda path: path.name)
def test_metrics_import_nothing_of_ours(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {file.stem for file in path.parent.glob("*.py")}
    assert siblings(tree) <= own
    assert not {name for name in packages(tree) if name == "moevlm" or name.endswith("_moevlm")}
