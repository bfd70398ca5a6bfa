"""Where a run starts, and that its end harms nothing that was there before."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from moevlm.checkpoints_moevlm import (
    clear,
    finish,
    last_checkpoint,
    read_config,
    starting_model,
    starting_point,
    whole_folder,
)
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import MoeVlmProcessor, build_processor, train_tokenizer
from moevlm.training_moevlm import ModelArguments, MoeVlmTrainer, MoeVlmTrainingArguments, adapt


@pytest.fixture
def model(config):
    """A model whose vocabulary has room for a tokenizer of bytes."""
    config.text_config.vocab_size = 262
    return MoeVlmForConditionalGeneration(config)


def arguments(folder, **settings):
    return MoeVlmTrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, **settings)


def trainer_of(model, folder):
    processor = build_processor(model.config, train_tokenizer(["a"], vocab_size=262))
    return MoeVlmTrainer(model=model, args=arguments(folder, eval_strategy="no"), processing_class=processor)


def checkpoint(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        for name in ("trainer_state.json", "optimizer.pt"):
            (path / name).write_text("{}")
    return str(path)


# The start


def test_the_last_whole_checkpoint_is_found_by_number_and_a_cut_off_one_is_not(tmp_path):
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, whole=False)
    assert last_checkpoint(str(tmp_path)) == whole
    assert starting_point(arguments(tmp_path, resume_from_checkpoint="last")) == whole
    assert starting_point(arguments(tmp_path, resume_from_checkpoint="True")) == whole


def test_a_named_checkpoint_is_taken_as_it_is_if_it_is_there(tmp_path):
    whole = checkpoint(tmp_path, 3)
    assert starting_point(arguments(tmp_path / "new", resume_from_checkpoint=whole)) == whole
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint=gone/checkpoint-3 is no folder; name"):
        starting_point(arguments(tmp_path, resume_from_checkpoint="gone/checkpoint-3"))


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt"])
def test_a_folder_without_the_state_of_optimizer_and_run_is_nothing_to_go_on_from(tmp_path, missing):
    path = checkpoint(tmp_path, 3)
    Path(path, missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} has no state of optimizer and run .*--model_name_or_path"):
        starting_point(arguments(tmp_path, resume_from_checkpoint=path))


def test_going_back_beside_later_checkpoints_is_refused(tmp_path):
    first, last = checkpoint(tmp_path, 3), checkpoint(tmp_path, 12)
    with pytest.raises(FileExistsError, match="checkpoint-12 is later than resume_from_checkpoint=.*checkpoint-3 and"):
        starting_point(arguments(tmp_path, resume_from_checkpoint=first))
    assert starting_point(arguments(tmp_path, resume_from_checkpoint=last)) == last
    assert starting_point(arguments(tmp_path / "new", resume_from_checkpoint=first)) == first


def test_a_folder_named_like_a_checkpoint_is_not_left_to_the_limit(tmp_path):
    (tmp_path / "checkpoint-3-best").mkdir()
    with pytest.raises(FileExistsError, match="checkpoint-3-best would be deleted by save_total_limit=2"):
        starting_point(arguments(tmp_path))
    assert starting_point(arguments(tmp_path, save_total_limit=None)) is None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "checkpoint-7"])
def test_a_run_does_not_replace_another_program_s_model(tmp_path, place, overwrite):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="holds another program's model; choose another output_dir"):
        starting_point(arguments(tmp_path, overwrite_output_dir=overwrite))


def test_a_run_replaces_a_model_that_no_run_made_only_if_told(tmp_path):
    (tmp_path / "upcycling.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a model that run_upcycle.py made; .*--overwrite_output_dir"):
        starting_point(arguments(tmp_path))
    assert starting_point(arguments(tmp_path, overwrite_output_dir=True)) is None


def test_resuming_from_nothing_says_so(tmp_path):
    checkpoint(tmp_path, 3, whole=False)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint; drop the flag"):
        starting_point(arguments(tmp_path, resume_from_checkpoint="last"))


def test_an_unfinished_run_is_not_deleted_by_a_fresh_start_unless_told(tmp_path):
    path = checkpoint(tmp_path, 3)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint last.*--overwrite_output_dir"):
        starting_point(arguments(tmp_path))
    assert os.path.exists(path)
    assert starting_point(arguments(tmp_path, overwrite_output_dir=True)) is None
    assert os.path.exists(path), "nothing is deleted before training can begin"
    clear(arguments(tmp_path))
    assert not os.path.exists(path)


def test_the_checkpoint_to_begin_with_is_not_deleted(tmp_path):
    path = checkpoint(tmp_path, 3)
    with pytest.raises(FileExistsError, match="is a checkpoint in output_dir=.* choose another output_dir"):
        starting_point(arguments(tmp_path, overwrite_output_dir=True), model=path)
    assert starting_point(arguments(tmp_path, overwrite_output_dir=True), model=str(tmp_path)) is None


def test_the_model_to_begin_with_is_not_replaced_unless_told(tmp_path):
    for model in (tmp_path, f"{tmp_path}/../{tmp_path.name}"):
        with pytest.raises(FileExistsError, match="holds the model that training begins with; choose another"):
            starting_point(arguments(tmp_path), model=str(model))
    assert starting_point(arguments(tmp_path, overwrite_output_dir=True), model=str(tmp_path)) is None


def test_a_resumed_run_keeps_the_tokenizer_that_its_weights_know(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.part_fields()))
    fields = ModelArguments(config=str(path), vocab_size=270)
    _, first = starting_model(fields, ["a red circle"] * 9)
    first.save_pretrained(tmp_path / "checkpoint-3")
    model, again = starting_model(fields, ["blue squares"] * 9, str(tmp_path / "checkpoint-3"))
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert model.config.text_config.vocab_size == len(first.tokenizer)
    _, other = starting_model(fields, ["blue squares"] * 9)
    assert other.tokenizer.get_vocab() != first.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"num_expert": 4}}, "text_config has no field 'num_expert'; did you mean 'num_experts'"),
        ({"vison_config": {}}, "the whole has no field 'vison_config'; did you mean 'vision_config'"),
        ({"connector_config": {"zzz": 1}}, "connector_config has no field 'zzz'; take it out"),
        ({"text_config": None}, "text_config is None; make it an object of fields"),
        ([], r"the whole is \[\]; make it an object of fields"),
    ],
)
def test_a_field_that_no_config_has_is_named(tmp_path, fields, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"mine.json: {message}"):
        read_config(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="mine.json: is not valid JSON"):
        read_config(str(path))


def test_a_saved_config_and_those_that_come_along_are_read(tmp_path, config, tiny):
    tiny.save_pretrained(tmp_path)
    assert read_config(str(tmp_path / "config.json")).to_dict() == type(config).from_pretrained(tmp_path).to_dict()
    for path in (Path(__file__).parent.parent / "configs").glob("*.json"):
        read_config(str(path))


def test_a_config_of_either_line_is_read_and_mirrors_of_positions_alone_are_not(tmp_path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": {**rope, "rope_theta": 5e5, "rope_scaling": None}}))
    assert read_config(str(path)).text_config.rope_parameters["rope_theta"] == 5e5
    for alone in ({"rope_theta": 5e5}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}):
        path.write_text(json.dumps({"text_config": alone}))
        with pytest.raises(ValueError, match="has no field 'rope_.*'; did you mean 'rope_parameters'"):
            read_config(str(path))


def test_an_adapter_is_no_model_to_begin_with(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA adapter; give the folder of the merged model"):
        starting_model(ModelArguments(model_name_or_path=str(tmp_path)), [])


def test_the_checkpoints_of_a_finished_run_make_place_but_its_model_stays(tmp_path):
    checkpoint(tmp_path, 3)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("finished")
    assert starting_point(arguments(tmp_path)) is None
    clear(arguments(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "model.safetensors"]


def test_a_second_run_that_was_cut_off_counts_as_unfinished_though_the_first_one_ended(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    os.utime(tmp_path / "metrics.json", (1, 1))
    checkpoint(tmp_path, 3)
    with pytest.raises(FileExistsError):
        starting_point(arguments(tmp_path))


# The end


def test_the_finished_folder_holds_model_processor_and_code_and_no_pickles(tmp_path, model):
    finish(trainer_of(model, tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_moevlm.py", "processing_moevlm.py"} <= names
    assert not names & {"training_args.bin", ".incoming"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moevlm"
    assert MoeVlmProcessor.from_pretrained(tmp_path).image_token_id == 5


def test_a_save_that_fails_leaves_the_older_model(tmp_path, monkeypatch, model):
    trainer = trainer_of(model, tmp_path)
    finish(trainer)
    before = (tmp_path / "model.safetensors").read_bytes()
    trainer.model.lm_head.weight.data.add_(1.0)

    def disk_full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer.processing_class, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="no space"):
        finish(trainer)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_and_adapter_of_an_older_run_do_not_stay_beside_the_new_ones(tmp_path, model):
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "model.safetensors.index.json").write_text("old")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    finish(trainer_of(model, tmp_path))
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / "adapter").exists() and (tmp_path / "notes.txt").exists()


def test_a_lora_run_leaves_the_adapter_and_the_merged_whole(tmp_path, model, batch):
    model.save_pretrained(tmp_path / "base")
    model = adapt(model, ModelArguments(lora=True, lora_rank=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        merged = finish(trainer_of(model, tmp_path / "run")).eval()
        loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
        base = MoeVlmForConditionalGeneration.from_pretrained(tmp_path / "base")
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()(**batch).logits
        assert torch.equal(adapted, trained)
        # W + BA rounded once instead of (Wx + BAx); a routing tie that flips would show as far more.
        torch.testing.assert_close(loaded(**batch).logits, trained, atol=1e-4, rtol=1e-3)
    for name, value in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# A folder that takes another's place

OLD, NEW = {"config.json": '{"model_type": "moevlm"}', "weights": "old"}, {"config.json": "{}", "weights": "new"}


def written(folder, files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def replace(target):
    with whole_folder(str(target), overwrite=True) as folder:
        written(folder, NEW)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(6))
def test_whenever_an_overwrite_is_interrupted_one_of_the_two_is_whole(step, when, tmp_path, monkeypatch):
    target, steps = written(tmp_path / "made", OLD), iter(range(100))

    def interrupted(function):
        def run(*args, **kwargs):
            stop = next(steps) == step
            if stop and when == "before":
                raise KeyboardInterrupt
            function(*args, **kwargs)
            if stop:
                raise KeyboardInterrupt

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted(Path.rename))
        patch.setattr(shutil, "rmtree", interrupted(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            replace(target)
    assert content(target) in (OLD, NEW)
    target.joinpath("config.json").write_text(OLD["config.json"])
    replace(target)
    assert content(target) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_run_killed_between_two_renames_is_put_right_by_the_next(tmp_path):
    written(tmp_path / ".made.old", OLD)
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"), whole_folder(str(tmp_path / "made")):
        pass
    assert content(tmp_path / "made") == OLD


FOREIGN = [
    {"thesis.tex": "years"},
    {"config.json": '{"model_type": "llama"}', "weights": "1"},
    {"config.json": '{"model_type": "llama", "name": "moevlm"}'},
    {"config.json": '{"model_type": "moevlm"'},  # no JSON
    {"config.json": '["moevlm"]'},
    {"trainer_state.json": "{}"},
]


@pytest.mark.parametrize("files", FOREIGN)
def test_a_folder_that_is_not_ours_is_not_replaced(files, tmp_path):
    target = written(tmp_path / "made", files)
    with pytest.raises(FileExistsError, match="no model of ours"):
        replace(target)
    assert content(target) == files


def test_the_folder_that_the_command_runs_in_is_not_replaced(tmp_path, monkeypatch):
    (written(tmp_path / "made", OLD) / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "made" / "inner")
    with pytest.raises(FileExistsError, match="the command runs in it"):
        replace("..")


def test_a_hub_id_whose_organisation_is_the_output_is_no_folder_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = written(tmp_path / "made", OLD)
    with whole_folder("made", True, ["made/model"]) as folder:
        written(folder, NEW)
    assert content(target) == NEW
    (written(target, OLD) / "model").mkdir()
    with pytest.raises(FileExistsError, match="made/model, which is read"), whole_folder("made", True, ["made/model"]):
        pass


LLAMA = {"config.json": '{"model_type": "llama"}'}
ITS_ADAPTER = {"adapter_config.json": '{"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}'}


@pytest.mark.parametrize("files", [LLAMA, ITS_ADAPTER, {"adapter_config.json": '{"auto_mapping": null}'}, {}])
def test_another_program_s_run_is_not_replaced(files, tmp_path):
    target = tmp_path / "made"
    saved = written(Path(checkpoint(target, 10)), files)
    written(target, {"thesis.tex": "years"})
    with pytest.raises(FileExistsError, match="no model of ours"):
        replace(target)
    assert content(saved) == files | {"trainer_state.json": "{}", "optimizer.pt": "{}"}
    assert (target / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["upcycling.json", "downcycling.json"])
def test_what_commands_leave_counts_as_ours(name, tmp_path):
    target = written(tmp_path / "made", {name: "{}"})
    replace(target)
    assert content(target) == NEW


@pytest.mark.parametrize("lora", [False, True])
def test_the_checkpoints_of_an_unfinished_run_count_as_ours(lora, tmp_path, model):
    target = tmp_path / "made"
    trainer = trainer_of(adapt(model, ModelArguments(lora=True, lora_rank=2)) if lora else model, target)
    trainer.save_model(str(target / "checkpoint-3"))
    checkpoint(target, 4, whole=False)  # cut off while saving
    replace(target)
    assert content(target) == NEW


@pytest.mark.parametrize("there", [OLD, None])
def test_a_folder_of_the_user_s_own_is_not_in_the_way_of_moving_aside(there, tmp_path):
    target, mine = tmp_path / "made", written(tmp_path / ".made.old", {"thesis.tex": "years"})
    if there:
        written(target, there)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="made.old.*rename it"), whole_folder(str(target), overwrite):
            pass
    assert content(mine) == {"thesis.tex": "years"} and target.exists() == bool(there)
    mine.rename(tmp_path / "mine")
    replace(target)
    assert content(target) == NEW


def test_an_empty_folder_that_a_killed_run_moved_aside_is_no_hindrance(tmp_path):
    (tmp_path / ".made.old").mkdir()
    replace(tmp_path / "made")
    assert content(tmp_path / "made") == NEW


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-10-best"])
def test_only_numbered_checkpoints_are_a_run_s(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_checkpoint(str(tmp_path)) is None
    assert starting_point(arguments(tmp_path, save_total_limit=None)) is None
    assert (tmp_path / name).exists()
