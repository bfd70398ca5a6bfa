"""Recipe files: flags as data, with the command line on top."""

import dataclasses
from pathlib import Path

import pytest
import torch

from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.data_moevlm import DataArguments
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.recipes_moevlm import parse
from moevlm.training_moevlm import ATTENTION, ModelArguments, MoeVlmTrainingArguments

GROUPS = (ModelArguments, DataArguments, MoeVlmTrainingArguments)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_precision_left_behind(monkeypatch):
    """Arguments with bf16 set a variable of the process; monkeypatch takes it back."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def read(tmp_path):
    """The three groups from a recipe of this text and a command line."""

    def run(text, flags=""):
        (tmp_path / "recipe.yaml").write_text(text)
        flags = f"{'' if 'output_dir' in text else '--output_dir out'} {flags}"
        return parse(GROUPS, ["--recipe", str(tmp_path / "recipe.yaml"), *flags.split()])

    return run


def test_a_recipe_gives_what_the_same_flags_on_the_command_line_give(read, tmp_path):
    text = """
        output_dir: out
        learning_rate: 6e-4
        num_train_epochs: 2
        eval_strategy: no
        bf16: true
        lora_experts: false
        lora_targets: [q_proj, v_proj]
        gradient_checkpointing_kwargs: '{"use_reentrant": false}'
    """
    flags = "--output_dir out --learning_rate 6e-4 --num_train_epochs 2 --eval_strategy no --bf16 --no_lora_experts "
    flags += '--lora_targets q_proj v_proj --gradient_checkpointing_kwargs {"use_reentrant":false}'
    for from_file, from_line in zip(read(text), parse(GROUPS, flags.split()), strict=True):
        file_values, line_values = dataclasses.asdict(from_file), dataclasses.asdict(from_line)
        different = {name for name in file_values if file_values[name] != line_values[name]}
        assert different <= {"logging_dir", "accelerator_config"}  # a time stamp; equal in each field


def test_the_command_line_wins_over_the_recipe(read):
    model_args, data_args, args = read("learning_rate: 1e-3\nlora: true\ndata: a.yaml", "--learning_rate 2e-3 --data b")
    assert (args.learning_rate, model_args.lora, data_args.data) == (2e-3, True, "b")


def test_no_recipe_leaves_the_defaults():
    model_args, data_args, args = parse(GROUPS, ["--output_dir", "out"])
    assert (model_args.config, data_args.data) == (None, None)
    assert args.learning_rate == MoeVlmTrainingArguments.__dataclass_fields__["learning_rate"].default


def test_data_and_config_are_relative_to_the_recipe_and_outputs_to_the_place_of_the_run(read, tmp_path):
    model_args, data_args, args = read("data: data/mine.yaml\nconfig: /abs/mine.json\noutput_dir: outputs/mine")
    assert Path(data_args.data) == tmp_path / "data/mine.yaml"
    assert (model_args.config, args.output_dir) == ("/abs/mine.json", "outputs/mine")


def test_null_is_no_value_and_of_several_the_default(read):
    assert read("eval_max_samples: null")[1].eval_max_samples is None
    model_args = read("train_only: null\nlora_targets: null")[0]
    assert (model_args.train_only, model_args.lora_targets) == ([], list(ATTENTION))


def test_one_word_is_a_list_of_one_for_a_flag_that_takes_several(read):
    model_args = read("lora_targets: q_proj\ntrain_only: router")[0]
    assert (model_args.lora_targets, model_args.train_only) == (["q_proj"], ["router"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", r"recipe.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ("recipe: other.yaml", r"recipe.yaml: unknown key 'recipe'"),
        ("learning_rate: fast", r"recipe.yaml: learning_rate=fast is not a value of this flag"),
        ("bf16: perhaps", r"recipe.yaml: bf16=perhaps is not a value"),
        ("learning_rate: [1, 2]", r"recipe.yaml: learning_rate=.* is a list"),
        ("optim: steepest", r"recipe.yaml: optim=steepest must be one of"),
        ("gradient_checkpointing_kwargs: {a: b}", "recipe.yaml: gradient_checkpointing_kwargs=.* as JSON"),
        ("just words", "recipe.yaml holds no flags"),
        ("a: [", "recipe.yaml is not YAML"),
    ],
)
def test_a_broken_recipe_is_an_error_that_names_file_and_key(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse(GROUPS, ["--recipe", "nowhere.yaml"])


@pytest.mark.parametrize("name", ["demo", "easy_vqa", "scenes"])
def test_the_documented_training_recipes_read_and_name_files_that_exist(name):
    model_args, data_args, _ = parse(GROUPS, ["--recipe", str(ROOT / f"configs/recipes/{name}.yaml")])
    assert all(Path(file).is_file() for file in (model_args.config, data_args.data) if file)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_architecture_builds(path):
    with torch.device("meta"):
        assert MoeVlmForConditionalGeneration(MoeVlmConfig.from_json_file(path)).num_parameters() > 1e6
