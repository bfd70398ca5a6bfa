"""The training command from end to end, on a handful of pictures."""

import json
import sys

import pytest
import torch
from transformers import AutoProcessor, GPT2Config

import run_finetune
from moevlm.checkpoints_moevlm import starting_model
from moevlm.data_moevlm import DataArguments, load_mixture
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.training_moevlm import ModelArguments

TINY = {
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "stem_channels": [4, 4, 4, 8],
    },
    "text_config": {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 16,
    },
}  # fmt: skip
MIXTURE = """
train: [{source: scenes, size: 6}]
eval: [{source: scenes, size: 2}]
test: [{source: scenes, size: 2}]
"""
RECIPE = """
data: mixture.yaml
num_train_epochs: 1
dataloader_num_workers: 0
disable_tqdm: true
report_to: none
logging_steps: 1
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on the small mixture with more flags; gives its output folder."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run(folder, flags):
        flags = f"{flags} --recipe {tmp_path}/recipe.yaml --output_dir {tmp_path}/{folder}"
        monkeypatch.setattr(sys, "argv", ["run_finetune.py", *flags.split()])
        monkeypatch.setattr(run_finetune, "keep_freed_memory", lambda: run.kept.append(folder))
        run_finetune.main()
        return tmp_path / folder

    run.kept = []

    return run


def test_a_run_from_scratch_and_one_with_lora_on_top_leave_all_they_promise(command, tmp_path, capsys):
    runs = {"first": f"--config {tmp_path}/tiny.json", "second": f"--lora --model_name_or_path {tmp_path}/first"}
    for folder, flags in runs.items():
        output = command(folder, flags)
        printed = capsys.readouterr().out
        assert "vqa_accuracy" in printed and "blind" in printed and "forward FLOPs" in printed
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["vqa"]["n"] == metrics["blind"]["vqa"]["n"] > 0
        assert {"caption", "vqa", "chat"} <= set(metrics) and metrics["training"]["steps"] == 2
        assert metrics["training"]["data"] == f"{tmp_path}/mixture.yaml"
        for picture in ("samples.png", "plots/loss.png", "plots/scores.png", "plots/expert_load.png"):
            assert (output / picture).stat().st_size > 1000, picture
        assert (
            MoeVlmForConditionalGeneration.from_pretrained(output).num_parameters() == metrics["training"]["parameters"]
        )
        assert AutoProcessor.from_pretrained(output).image_seq_length == 16
    assert command.kept == ([] if torch.accelerator.is_available() else ["first", "second"])
    assert (tmp_path / "second/adapter/adapter_model.safetensors").exists()


def test_two_processes_encode_what_one_encodes(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    records = load_mixture(tmp_path / "mixture.yaml", "train", grouped=True)
    _, processor = starting_model(ModelArguments(config=str(tmp_path / "tiny.json")), run_finetune.texts(records))
    one, two = (
        run_finetune.encode(records, processor, DataArguments(preprocessing_num_workers=workers)) for workers in (1, 2)
    )
    assert len(one) == 3 * 6 and one.column_names == two.column_names
    assert all(one[name][:] == two[name][:] for name in one.column_names if name != "images")


def test_no_flag_is_the_demo_recipe(monkeypatch):
    arguments = []
    for flags in ([], ["--recipe", "configs/recipes/demo.yaml"]):
        monkeypatch.setattr(sys, "argv", ["run_finetune.py", *flags])
        arguments.append(run_finetune.read_arguments())
    model_args, data_args, args = arguments[0]
    assert (model_args, data_args) == arguments[1][:2]
    assert model_args.config.endswith("configs/tiny.json") and data_args.data.endswith("configs/data/default.yaml")
    assert args.image_words_steps > 0 and args.output_dir == "outputs/demo"


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a 'gpt2' model; run_upcycle.py"):
        starting_model(ModelArguments(model_name_or_path=str(tmp_path)), words=[])
