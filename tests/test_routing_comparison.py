"""The comparison of routers: each option is a model that differs as it says; the table says what the runs reached."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.summary_moevlm import sparse_layers

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("routing_options", ROOT / "benchmarks/routing_options.py")
comparison = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(comparison)


@pytest.mark.parametrize("recipe", ["demo", "scenes"])
@pytest.mark.parametrize("option", comparison.OPTIONS)
def test_an_option_is_a_valid_architecture_that_holds_its_fields(option, recipe):
    made = comparison.architecture(ROOT / f"configs/recipes/{recipe}.yaml", comparison.OPTIONS[option])
    config = MoeVlmConfig.from_dict(made)
    for name, value in comparison.OPTIONS[option].items():
        assert name == "moe_layers" or getattr(config.text_config, name) == value
    assert bool(sparse_layers(config)) == (option != "dense")


def run(folder, vqa, load):
    folder.mkdir(parents=True)
    metrics = {"vqa": {"vqa_accuracy": vqa, "per_answer_type": {"position": 60.0}}}
    metrics |= {"caption": {"CIDEr": 1.0}, "chat": {"turn_accuracy": 50.0}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    entries = [{"expert_load": {"decoder.0": load}, "router_entropy_decoder.0": 1.5}, {"loss": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """A function that compares runs of "softmax", none of which may be trained: its line of the table, the results."""

    def called(*flags):
        command = f"routing_options.py --options softmax --seconds 0 --output_dir {tmp_path}"
        monkeypatch.setattr(sys, "argv", [*command.split(), *flags])
        monkeypatch.setattr(comparison, "train", None)
        comparison.main()
        line = (tmp_path / "routing.md").read_text().splitlines()[2]
        return line, json.loads((tmp_path / "routing.json").read_text())

    return called


def test_runs_that_are_there_are_read_and_not_trained_again(tmp_path, compare, capsys):
    run(tmp_path / "softmax-0", 90.0, [0.5, 0.25, 0.25, 0.0])
    run(tmp_path / "softmax-1", 92.0, [0.25, 0.25, 0.25, 0.25])
    line, stored = compare("--seeds", "0", "1")
    milliseconds = 1e3 * stored["step_seconds"]["softmax"]
    assert milliseconds > 0
    assert line == (
        "| softmax | 2 | 91.00 (90.00 .. 92.00) | 60.00 (60.00 .. 60.00) | 1.00 (1.00 .. 1.00) "
        "| 50.00 (50.00 .. 50.00) | 1.50 (1.00 .. 2.00) | 1.50 (1.50 .. 1.50) "
        f"| {milliseconds:.0f} |"
    )
    assert line in capsys.readouterr().out
    assert [(each["seed"], each["VQA"]) for each in stored["runs"]["softmax"]] == [(0, 90.0), (1, 92.0)]


def test_a_recorded_run_is_taken_as_it_is(tmp_path, compare):
    recorded = {"seed": 1, "cpu": "another", "VQA": 92.0, "largest load": None}
    other = {"seed": 3, "cpu": "another", "VQA": 10.0, "largest load": 8.0}
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"runs": {"softmax": [other, recorded]}}))
    run(tmp_path / "softmax-0", 90.0, [0.5, 0.25, 0.25, 0.0])
    line, stored = compare("--seeds", "1", "0", "--record", str(record))
    assert line.startswith("| softmax | 2 | 91.00 (90.00 .. 92.00) | 2.00 (2.00 .. 2.00) |")
    first, second = stored["runs"]["softmax"]
    assert first == recorded
    assert second["VQA"] == 90.0
    assert second["cpu"] not in ("", "another")


def test_the_record_of_the_demo_holds_each_run_once():
    runs = json.loads((ROOT / "benchmarks/routing-demo.json").read_text())["runs"]
    assert set(runs) <= set(comparison.OPTIONS)
    for found in runs.values():
        seeds = [run["seed"] for run in found]
        assert seeds == sorted(set(seeds)) and all(0 < run["VQA"] < 100 and run["cpu"] for run in found)


def test_an_unknown_option_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["routing_options.py", "--options", "soft"])
    with pytest.raises(ValueError, match=r"options=\['soft'\] are unknown; take any of softmax, "):
        comparison.main()
