"""Training: what learns, at which rate, what is logged, and what survives a kill."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, IterableDataset
from peft import PeftModel
from PIL import Image
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed

from moevlm.checkpoints_moevlm import finish
from moevlm.collating_moevlm import MoeVlmCollator, StagedSampler, encode_record
from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration, MoeVlmOutput
from moevlm.processing_moevlm import build_processor, train_tokenizer
from moevlm.routing_moevlm import MoeVlmRouter
from moevlm.summary_moevlm import part_of, sparse_layers
from moevlm.telemetry_moevlm import routers_of
from moevlm.training_moevlm import (
    ModelArguments,
    MoeVlmTrainer,
    MoeVlmTrainingArguments,
    adapt,
    freeze,
    parameter_groups,
)

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 40, 220), "white": (255, 255, 255)}


def small_model(vision=None, **text_config):
    set_seed(0)
    config = MoeVlmConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "image_size": 32,
            "stem_channels": (8, 8, 8, 16),
            **(vision or {}),
        },
        text_config={
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            **text_config,
        },
    )
    return MoeVlmForConditionalGeneration(config)


@pytest.fixture(scope="module")
def processor():
    words = ["What colour is it?", "Is it dark?", "yes", "no", *COLOURS] * 3
    return build_processor(small_model().config, train_tokenizer(words, vocab_size=300))


@pytest.fixture(scope="module")
def rows(processor):
    """Sixteen encoded pictures of one colour, with a question each."""
    return [row_of(processor, name, COLOURS[name], number) for number in range(4) for name in COLOURS]


def row_of(processor, answer, colour, number):
    question = [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    record = {"messages": messages, "task": "vqa", "id": str(number)}
    return {"images": [Image.new("RGB", (32, 32), colour)], **encode_record(record, processor)}


def text_row(processor):
    question = {"role": "user", "content": [{"type": "text", "text": "Is it dark?"}]}
    record = {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]}
    return {"images": [], **encode_record(record | {"task": "chat", "id": "t"}, processor)}


def mixed_rows(processor, rows):
    """Eight rows with one picture, none or two."""
    pictures = [{"type": "image"}] * 2
    messages = [
        {"role": "user", "content": [*pictures, {"type": "text", "text": "Is it dark?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    encoded = encode_record({"messages": messages, "task": "chat", "id": "two"}, processor)
    return [rows[0], text_row(processor), {"images": rows[1]["images"] * 2, **encoded}, rows[2]] * 2


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("steps", 0.25, "steps", 0.25, True)),
        ({"save_steps": 100}, ("steps", 100, "steps", 100, True)),
        ({"eval_steps": 50}, ("steps", 50, "steps", 50, True)),
        ({"eval_steps": 50, "save_steps": 100}, ("steps", 50, "steps", 100, True)),
        ({"save_strategy": "epoch"}, ("epoch", 0.25, "epoch", 0.25, True)),
        ({"eval_strategy": "epoch"}, ("epoch", 0.25, "epoch", 0.25, True)),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, ("epoch", 0.25, "steps", 0.25, False)),
        ({"eval_strategy": "epoch", "save_steps": 5}, ("epoch", 5, "steps", 5, False)),
        ({"save_strategy": "epoch", "eval_steps": 5}, ("steps", 5, "epoch", 5, False)),
        ({"eval_strategy": "no"}, ("no", 0.25, "steps", 0.25, False)),
        ({"save_strategy": "no"}, ("steps", 0.25, "no", 0.25, False)),
        ({"save_strategy": "best"}, ("steps", 0.25, "best", 0.25, True)),
    ],
)
def test_a_run_is_saved_and_scored_four_times_unless_told_otherwise(tmp_path, given, found):
    args = MoeVlmTrainingArguments(output_dir=str(tmp_path), report_to="none", **given)
    names = ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end")
    assert tuple(getattr(args, name) for name in names) == found


@pytest.mark.parametrize("name", ["save", "eval"])
def test_no_step_is_no_time_to_save_or_score_at(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}_steps=0 must be above 0; {name}_strategy=no is never"):
        MoeVlmTrainingArguments(output_dir=str(tmp_path), report_to="none", **{f"{name}_steps": 0})


def test_a_run_needs_a_place_for_its_result():
    with pytest.raises(ValueError, match="output_dir is missing: name the folder"):
        MoeVlmTrainingArguments()


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def arguments(folder, **settings):
    quiet = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "max_steps": 4,
    }
    return MoeVlmTrainingArguments(**{**quiet, **settings})


def trainer_of(model, rows, processor, args, **settings):
    return MoeVlmTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=MoeVlmCollator(processor),
        processing_class=processor,
        **settings,
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


# The best checkpoint, and a user's own script


def test_the_best_loss_is_the_smallest(rows, processor, tmp_path):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    # No score_fn: the default metric, the score, is not there, and the loss takes its place.
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, learning_rate=1e-1, **steps))
    trainer.train()
    found = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(found) == 4 and trainer.state.best_metric == min(found.values()) < max(found.values())
    assert not arguments(tmp_path, metric_for_best_model="loss", **steps).greater_is_better
    assert arguments(tmp_path, **steps).greater_is_better


def test_arguments_of_another_kind_and_model_init_are_refused(rows, processor, tmp_path):
    with pytest.raises(TypeError, match="args is a TrainingArguments, which lacks flags; pass MoeVlmTrainingArguments"):
        trainer_of(small_model(), rows, processor, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="model_init .* pass a model"):
        trainer_of(None, rows, processor, arguments(tmp_path), model_init=lambda: small_model())


def test_a_stream_of_rows_with_any_number_of_pictures_trains(rows, processor, tmp_path):
    mixed, found = mixed_rows(processor, rows), []
    for data in (mixed, stream_of(mixed)):
        trainer = trainer_of(small_model(), data, processor, arguments(tmp_path, per_device_train_batch_size=2))
        trainer._get_train_sampler = lambda *args: None  # in order, as a stream
        trainer.train()
        found.append(losses(trainer))
    assert len(found[0]) == 4 and found[0] == found[1]


def test_data_seed_orders_the_data(processor, tmp_path):
    data = Dataset.from_dict({"input_ids": [[1] * length for length in range(1, 33)]})
    orders = [
        list(trainer_of(small_model(), data, processor, arguments(tmp_path, **seeds))._get_train_sampler())
        for seeds in ({}, {"seed": 7}, {"data_seed": 7}, {"seed": 7, "data_seed": 42})
    ]
    assert orders[1] == orders[2] != orders[0] == orders[3]


# Logits


def test_logits_are_made_only_for_those_who_ask(rows, processor, tmp_path):
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=2))
    made = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[:-1].numel()))
    trainer.train()
    trainer.evaluate()
    learnt = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    assert len(made) == 3 and max(made) <= 4 * max(learnt)
    logits = trainer.predict(rows[:4]).predictions
    assert logits.shape[:2] == MoeVlmCollator(processor)(rows[:4])["input_ids"].shape


def test_logits_of_batches_with_and_without_pictures_are_gathered(rows, processor, tmp_path):
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, per_device_eval_batch_size=2))
    mixed = [*rows[:2], *(text_row(processor) for _ in range(2))]
    assert trainer.predict(mixed).predictions.shape[0] == 4


def test_a_trainer_gathers_logits_alone():
    names = {field.name for field in dataclasses.fields(MoeVlmOutput)}
    assert sorted(MoeVlmConfig.keys_to_ignore_at_inference) == sorted(names - {"loss", "logits"})


def test_who_computes_with_logits_gets_them(rows, processor, tmp_path):
    inputs = {"labels": torch.zeros(1, 2)}
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path))
    assert trainer._without_logits(inputs)["skip_logits"] and "skip_logits" not in trainer._without_logits({})
    trainer.args.torch_compile = True  # as an argument it would set the environment of all later tests
    assert trainer._without_logits(inputs) == inputs


def test_a_loss_function_of_ones_own_sees_all_logits(rows, processor, tmp_path):
    seen = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs["logits"].shape[:2] == labels.shape)
        return outputs["logits"].square().mean()

    trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=1), compute_loss_func=own_loss).train()
    assert seen == [True]


def test_label_smoothing_which_would_not_shift_is_refused(rows, processor, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 is not for this model"):
        trainer_of(small_model(), rows, processor, arguments(tmp_path, label_smoothing_factor=0.1))


# Arguments


def test_the_command_line_takes_every_group_of_arguments_and_its_own_flags(tmp_path):
    parser = HfArgumentParser((ModelArguments, MoeVlmTrainingArguments))
    flags = f"--lora --lora_rank 4 --router_lr 1e-4 --seed 7 --report_to none --output_dir {tmp_path}"
    model_args, args = parser.parse_args_into_dataclasses(flags.split())
    assert (model_args.lora, model_args.lora_rank, args.router_lr, args.seed) == (True, 4, 1e-4, 7)


def test_warm_up_is_a_share_of_the_steps_unless_steps_are_given(tmp_path):
    assert arguments(tmp_path).get_warmup_steps(200) == 10
    assert arguments(tmp_path, warmup_steps=3).get_warmup_steps(200) == 3
    assert arguments(tmp_path, warmup_ratio=0.0).get_warmup_steps(200) == 0


def test_a_config_beside_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        ModelArguments(model_name_or_path="somewhere", config="configs/tiny.json")


def test_the_accelerate_configs_load_and_name_classes_that_exist():
    blocks = {type(module).__name__ for module in small_model().modules()}
    configs = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "configs/accelerate").glob("*.yaml")}
    assert set(configs) == {"cpu", "gpu", "ddp", "fsdp2", "deepspeed_zero3"}
    fsdp = configs["fsdp2"].fsdp_config
    assert set(fsdp["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= blocks
    assert fsdp["fsdp_cpu_ram_efficient_loading"] is False
    assert configs["deepspeed_zero3"].deepspeed_config["deepspeed_moe_layer_cls_names"] in blocks


# Parts


def test_every_learning_parameter_is_in_exactly_one_group(tmp_path):
    model = small_model()
    freeze(model, ["connector"])
    grouped = [p for group in parameter_groups(model, arguments(tmp_path, router_lr=1e-5)) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {parameter for parameter in model.parameters() if parameter.requires_grad}


def test_each_part_has_its_own_rate_and_the_logged_group_has_the_base_rate(tmp_path):
    model = small_model()
    args = arguments(tmp_path, vision_lr=1e-5, connector_lr=2e-5, router_lr=3e-5)
    groups = parameter_groups(model, args)
    rate = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    wanted = {"vision": 1e-5, "connector": 2e-5, "language": 3e-3}
    for name, parameter in model.named_parameters():
        assert rate[parameter] == (3e-5 if ".gate." in name else wanted[part_of(name)]), name
    assert groups[0]["lr"] == args.learning_rate


def test_norms_biases_embeddings_and_routers_do_not_decay_but_matrices_and_experts_do(tmp_path):
    model = small_model()
    groups = parameter_groups(model, arguments(tmp_path, weight_decay=0.1))
    decayed = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if parameter in decayed}
    still = ("norm", "bias", "embed_tokens", "position_embedding", ".gate.")
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or any(part in name for part in still)
        assert (name in names) != plain, name
    assert "model.language_model.layers.1.mlp.experts.gate_up_proj" in names


def test_tied_embeddings_are_optimised_once_and_without_decay(tmp_path):
    model = small_model(tie_word_embeddings=True)
    groups = parameter_groups(model, arguments(tmp_path, weight_decay=0.1))
    holders = [group for group in groups if any(p is model.lm_head.weight for p in group["params"])]
    assert [group["weight_decay"] for group in holders] == [0.0]


@pytest.mark.parametrize("part", ["vision", "connector", "language", "router"])
def test_a_frozen_part_ends_as_it_began_and_the_rest_learns(tmp_path, processor, rows, part):
    model = small_model()
    freeze(model, [part])
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, rows, processor, arguments(tmp_path, max_steps=2)).train()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # Batch norms are part of the tower: their statistics move with it and rest with it.
    statistics = {name for name in changed if "running_" in name or "num_batches" in name}
    assert bool(statistics) == (part != "vision")
    assert changed - statistics <= learning
    assert {part_of(name) for name in changed} == {"vision", "connector", "language"} - {part}


@pytest.mark.parametrize("only", [["experts"], ["router"], ["experts", "router"]])
@pytest.mark.parametrize("frozen", [[], ["vision"], ["router"]])
def test_only_experts_or_routers_learn_where_they_are_named_and_not_frozen(only, frozen):
    if (only, frozen) == (["router"], ["router"]):
        with pytest.raises(ValueError, match="nothing is left to train: freeze=.'router'., train_only=.'router'."):
            freeze(sparse_everywhere(), frozen, only)
        return
    model = adapt(sparse_everywhere(), ModelArguments(train_only=only, **{f"freeze_{part}": True for part in frozen}))
    for name, parameter in model.named_parameters():
        kind = "router" if ".gate." in name else "experts" if ".experts." in name or ".shared_expert" in name else ""
        wanted = kind in only and kind not in frozen and part_of(name) not in frozen
        assert parameter.requires_grad == wanted, name


def test_a_run_that_trains_only_experts_and_routers_moves_nothing_else(tmp_path, processor, rows):
    model = small_model()
    freeze(model, ["vision"], ["experts", "router"])
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, rows, processor, arguments(tmp_path, max_steps=2)).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed == {name for name in before if ".experts." in name or ".gate." in name}


def sparse_everywhere():
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return MoeVlmForConditionalGeneration(
        MoeVlmConfig(
            vision_config={"hidden_size": 32, "num_hidden_layers": 2, "moe_layers": "all", **sparse},
            connector_config=sparse,
            text_config={**text, "n_shared_experts": 1, "shared_expert_gate": True, **sparse},
        )
    )


def test_train_only_and_lora_exclude_each_other():
    with pytest.raises(ValueError, match="train_only=.'experts'. is not for lora"):
        ModelArguments(train_only=["experts"], lora=True)


def test_freezing_everything_or_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="heads.*train_only takes experts, router"):
        freeze(small_model(), [], ["heads"])
    with pytest.raises(ValueError, match="nothing is left"):
        freeze(small_model(), ["vision", "connector", "language"])
    with pytest.raises(ValueError, match="head"):
        freeze(small_model(), ["head"])


# Router numbers


def test_the_log_names_every_sparse_layer(tmp_path, processor, rows):
    model = small_model(moe_layers="all")
    trainer = trainer_of(model, rows, processor, arguments(tmp_path, max_steps=2, logging_steps=2))
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert list(entry["expert_load"]) == ["decoder.0", "decoder.1"] == list(sparse_layers(model.config))
    assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in entry["expert_load"].values())
    assert entry["aux_loss"] >= 0.9 and entry["z_loss"] > 0


@pytest.mark.parametrize("settings", [{"logging_steps": 2}, {"logging_strategy": "epoch", "max_steps": -1}])
def test_the_logged_gradient_norms_of_the_parts_add_up_to_that_of_all(tmp_path, processor, rows, settings):
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "per_device_train_batch_size": 2, **settings}
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, **settings))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        parts = [entry[f"grad_norm_{part}"] for part in ("vision", "connector", "language", "router")]
        assert all(norm > 0 for norm in parts)
        assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-4)


def test_a_dense_model_logs_gradient_norms_and_nothing_of_routers(tmp_path, processor, rows):
    trainer = trainer_of(small_model(moe_layers="none"), rows, processor, arguments(tmp_path, max_steps=1))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["grad_norm_language"] > 0 and not any("router" in name or "aux" in name for name in entry)


# Loss-free balancing


def biases(model):
    return [router.e_score_correction_bias.clone() for router in routers_of(model)]


def still(folder, **settings):
    """Arguments under which nothing but the biases moves."""
    return arguments(folder, learning_rate=0.0, router_bias_update_rate=0.01, **settings)


def balanced_model(**text_config):
    model = small_model(use_router_bias=True, moe_layers="all", **text_config)
    freeze(model, ["vision"])  # batch norms rest: a row is the same in any micro-batch
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
    ],
    ids=["accumulation", "recomputation", "evaluation"],
)
def test_a_bias_moves_once_a_step_by_the_visits_of_the_whole_batch(tmp_path, processor, rows, monkeypatch, settings):
    seen, move = [], MoeVlmRouter.update_bias

    def spy(router, counts, rate):
        seen.append((counts.tolist(), rate))
        move(router, counts, rate)

    monkeypatch.setattr(MoeVlmRouter, "update_bias", spy)
    model = balanced_model()
    trainer_of(model, rows, processor, still(tmp_path, **settings)).train()
    split, seen[:] = list(seen), []
    whole = balanced_model()
    trainer_of(whole, rows, processor, still(tmp_path)).train()
    assert split == seen and len(seen) == 2 * 4  # layers, steps
    tokens = 4 * len(rows[0]["input_ids"])  # rows of one length: no padding
    assert all(sum(counts) == 2 * tokens and rate == 0.01 for counts, rate in seen)
    assert all(map(torch.equal, biases(model), biases(whole)))
    assert all(bias.abs().max() > 0.005 for bias in biases(model))


def test_the_biases_bring_the_load_toward_balance(tmp_path, processor, rows):
    model = balanced_model()
    for router in routers_of(model):
        # Scores are near 1/4 each: every token visits the first expert, none the last.
        router.e_score_correction_bias.copy_(torch.tensor([0.3, 0.0, 0.0, -0.3]))
    settings = {"max_steps": 60, "per_device_train_batch_size": 16}
    trainer = trainer_of(model, rows, processor, still(tmp_path, **settings))
    trainer.train()
    loads = [entry["expert_load"] for entry in trainer.state.log_history if "expert_load" in entry]
    for layer in ("decoder.0", "decoder.1"):
        assert loads[0][layer][0] == 0.5 and loads[0][layer][3] == 0.0
        late = torch.tensor([load[layer] for load in loads[-20:]]).mean(0)
        assert (late - 0.25).abs().max() < 0.125, layer  # half of where it began


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_a_resumed_run_goes_on_with_the_biases_of_the_checkpoint(tmp_path, processor, rows, lora):
    def run(folder, checkpoint=None):
        model = adapt(balanced_model(), ModelArguments(lora=lora, lora_rank=2))
        args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=3, router_bias_update_rate=0.01)
        trainer = trainer_of(model, rows, processor, args)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight/checkpoint-3"))
    assert losses(resumed) == losses(straight)
    assert all(map(torch.equal, biases(resumed.model), biases(straight.model)))
    assert all(bias.any() for bias in biases(straight.model))


def test_the_finished_checkpoint_holds_the_biases_in_float32(tmp_path, processor, rows):
    model = adapt(balanced_model(), ModelArguments(lora=True, lora_rank=2))
    trainer = trainer_of(model, rows, processor, still(tmp_path))
    trainer.train()
    moved = biases(model)
    finish(trainer)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(bias.any() for bias in moved)
    assert all(map(torch.equal, biases(loaded), moved))


@pytest.mark.parametrize("off", [{"parts": ["router"]}, {"parts": ["language"]}, {"rate": 0.0}])
def test_frozen_routers_and_rate_zero_leave_the_biases_alone(tmp_path, processor, rows, off):
    model = balanced_model()
    freeze(model, off.get("parts", []))
    args = arguments(tmp_path, max_steps=2, router_bias_update_rate=off.get("rate", 0.01))
    trainer_of(model, rows, processor, args).train()
    assert not any(bias.any() for bias in biases(model))


def test_a_rate_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="router_bias_update_rate=-0.1 must be"):
        arguments(tmp_path, router_bias_update_rate=-0.1)


def test_optimizers_of_single_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim_target_modules=\['mlp'\] .* takes no stacked experts; use lora"):
        arguments(tmp_path, optim="galore_adamw", optim_target_modules=["mlp"])


# Accumulation


def gate_after_one_step(folder, rows, processor, **settings):
    """A router's weight after one plain gradient step, led by the balance loss."""
    model = small_model(router_aux_loss_coef=10.0)
    args = arguments(
        folder, max_steps=1, optim="sgd", max_grad_norm=0.0, warmup_ratio=0.0, learning_rate=1.0, **settings
    )
    trainer_of(model, rows, processor, args).train()
    return model.model.language_model.layers[1].mlp.gate.weight.detach()


def test_the_router_learns_the_same_with_and_without_gradient_accumulation(tmp_path, processor, rows):
    same = [rows[0]] * 4
    start = small_model(router_aux_loss_coef=10.0).model.language_model.layers[1].mlp.gate.weight.detach()
    whole = gate_after_one_step(tmp_path, same, processor, per_device_train_batch_size=4) - start
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    split = gate_after_one_step(tmp_path, same, processor, **settings) - start
    assert whole.abs().max() > 1e-4
    # Batch norm sees another batch, of equal pictures; sums are rounded in another order.
    assert (split.norm() / whole.norm()).item() == pytest.approx(1.0, abs=1e-3)


def longer(row, unlearnt, learnt):
    """The row with its last token repeated, so often without a label and so often with one."""
    ids, labels = row["input_ids"], row["labels"]
    ids, labels = ids + ids[-1:] * (unlearnt + learnt), labels + [-100] * unlearnt + ids[-1:] * learnt
    return {**row, "input_ids": ids, "labels": labels}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_trainer_weighs_different_micro_batches_by_their_tokens(tmp_path, processor, rows, steps):
    # z-loss alone reaches the router: no weight of a visit depends on it.
    fields = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 10.0, "num_experts_per_tok": 1}
    different = [longer(row, *more) for row, more in zip(rows, ((0, 0), (3, 9), (9, 0), (1, 2)))]
    start, moved = (small_model(**fields) for _ in range(2))
    freeze(moved, ["vision", "connector"])
    settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "learning_rate": 1.0}
    settings |= {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "warmup_ratio": 0.0}
    trainer_of(moved, different, processor, arguments(tmp_path, **settings)).train()
    batch, gate = MoeVlmCollator(processor)(different), routers_of(start)[0].weight
    (expected,) = torch.autograd.grad(10.0 * start.eval()(**batch).z_loss, gate)
    found = start.state_dict()["model.language_model.layers.1.mlp.gate.weight"] - routers_of(moved)[0].weight.detach()
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4  # a difference of float32 weights


def test_batches_are_counted_where_they_have_ids(tmp_path, processor, rows):
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path))
    batch = MoeVlmCollator(processor)(rows[:2])
    blind = {"inputs_embeds": torch.zeros(2, 3, 8), "labels": torch.ones(2, 3, dtype=torch.long)}
    (counted,), _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    text, image = counted["num_tokens_in_batch"].tolist()
    assert text + image == batch["attention_mask"].sum() and image > 0
    (left,), labels = trainer.get_batch_samples(iter([blind]), 1, torch.device("cpu"))
    assert set(left) == set(blind) and labels > 0


def test_a_router_that_no_answer_can_teach_is_warned_of(tmp_path, processor, rows, caplog):
    for norm_topk_prob in (True, False):
        caplog.clear()
        model = small_model(num_experts_per_tok=1, norm_topk_prob=norm_topk_prob)
        trainer_of(model, rows, processor, arguments(tmp_path))
        assert ("num_experts_per_tok=1 with norm_topk_prob=True" in caplog.text) == norm_topk_prob


# The Trainer


def test_the_loss_falls(tmp_path, processor, rows):
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=40, learning_rate=0.01))
    trainer.train()
    curve = losses(trainer)
    assert curve[40] < 0.2 * curve[1]


def test_image_tokens_learn_words_in_the_first_steps_only(tmp_path, processor, rows):
    curves = []
    for steps in (0, 2):
        args = arguments(tmp_path, learning_rate=0.0, max_steps=3, image_words_steps=steps)
        trainer = trainer_of(small_model(), rows, processor, args)
        trainer.train()
        curves.append(losses(trainer))
    plain, helped = curves
    # Untrained image tokens give each of the 300 words about the same score.
    assert [helped[step] - plain[step] for step in (1, 2)] == pytest.approx([5.7, 5.7], abs=0.7)
    assert helped[3] == plain[3]


@pytest.mark.parametrize("settings", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_the_words_loss_does_not_grow_with_accumulation(tmp_path, processor, rows, settings):
    args = arguments(tmp_path, learning_rate=0.0, max_steps=1, image_words_steps=1, **settings)
    trainer = trainer_of(small_model(), [rows[0]] * 4, processor, args)
    trainer.train()
    plain = trainer_of(small_model(), [rows[0]] * 4, processor, arguments(tmp_path, learning_rate=0.0, max_steps=1))
    plain.train()
    assert losses(trainer)[1] - losses(plain)[1] == pytest.approx(5.7, abs=0.7)


def test_the_generated_answers_score_decides_which_checkpoint_is_best(tmp_path, processor, rows):
    scores, seen = iter([10.0, 90.0, 20.0]), []

    def score_fn(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"eval_score": next(scores)}

    args = arguments(
        tmp_path, max_steps=-1, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = trainer_of(small_model(), rows, processor, args, score_fn=score_fn)
    trainer.train()
    assert trainer.state.best_metric == 90.0 and trainer.state.best_global_step == 8
    assert [entry["eval_score"] for entry in trainer.state.log_history if "eval_score" in entry] == [10.0, 90.0, 20.0]
    assert all(torch.equal(value, seen[1][name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"save_strategy": "best", "eval_steps": 1}, 4),  # the score tells when to save
        ({"save_strategy": "steps", "eval_steps": 1, "save_steps": 3}, 6),  # steps 3 and 6 alone are saved
    ],
)
def test_the_best_of_the_saved_checkpoints_is_the_result(tmp_path, processor, rows, settings, best):
    scores, seen = iter([10.0, 90.0, 20.0, 95.0, 30.0, 70.0]), [None]

    def score_fn(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"eval_score": next(scores)}

    args = arguments(tmp_path, max_steps=6, eval_strategy="steps", load_best_model_at_end=True, **settings)
    trainer = trainer_of(small_model(), rows, processor, args, score_fn=score_fn)
    trainer.train()
    assert trainer.state.best_global_step == best
    assert all(torch.equal(value, seen[best][name]) for name, value in trainer.model.state_dict().items())


def test_the_last_step_is_evaluated_and_saved_though_it_is_no_multiple(tmp_path, processor, rows):
    scores = iter([10.0, 20.0, 30.0])
    args = arguments(
        tmp_path, max_steps=5, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = trainer_of(small_model(), rows, processor, args, score_fn=lambda model: {"eval_score": next(scores)})
    trainer.train()
    assert trainer.state.best_metric == 30.0 and trainer.state.best_global_step == 5


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path, processor, rows):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(float("nan"))

    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    trainer = trainer_of(small_model(), rows, processor, args, callbacks=[Poison()])
    with pytest.raises(
        FloatingPointError, match=r"nan at step 4.*--resume_from_checkpoint last.*learning_rate=0.003"
    ) as error:
        trainer.train()
    assert "that of lm_head (Linear), whose own weight is not finite (rank 0)" in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "place", [lambda model: model.lm_head.weight[0], lambda model: next(model.buffers())], ids=["weight", "buffer"]
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path, processor, rows, place):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            place(model).data[0] = float("inf")

    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = trainer_of(small_model(), rows, processor, args, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        finish(trainer)
    assert not list(tmp_path.rglob("*.safetensors"))


KILLED_RUN = """
import os, signal, sys
import torch
from transformers import TrainerCallback
sys.path[:0] = [{root!r}, {tests!r}]
import test_training as t

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
processor, rows = t.run_parts()
t.trainer_of(t.small_model(), rows, processor, t.resumable({folder!r}), callbacks=[Kill()]).train()
"""


def run_parts():
    """The processor and the rows, where there are no fixtures."""
    processor = build_processor(small_model().config, train_tokenizer(["What colour is it?", *COLOURS] * 3, 300))
    return processor, [row_of(processor, name, COLOURS[name], number) for number in range(4) for name in COLOURS]


def resumable(folder, **settings):
    return arguments(folder, max_steps=10, save_strategy="steps", save_steps=3, **settings)


def test_a_killed_run_resumes_to_the_same_losses(tmp_path):
    processor, rows = run_parts()
    straight = trainer_of(small_model(), rows, processor, resumable(tmp_path / "straight"))
    straight.train()
    code = KILLED_RUN.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed/checkpoint-9").exists()
    resumed = trainer_of(small_model(), rows, processor, resumable(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed/checkpoint-6"))
    assert losses(resumed) == losses(straight)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name


@pytest.mark.parametrize("changed", [{"router_lr": 1e-3}, {"vision_lr": 1e-3, "connector_lr": 1e-4}])
def test_resuming_with_other_rates_of_parts_is_refused_by_name(tmp_path, processor, rows, changed):
    trainer_of(small_model(), rows, processor, resumable(tmp_path)).train()
    again = trainer_of(small_model(), rows, processor, resumable(tmp_path, **changed))
    with pytest.raises(ValueError, match=r"state in .*checkpoint-9 does not fit .*resume with .* \*_lr, or begin"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("steps", [8, 10], ids=["at the end of an epoch", "within one"])
def test_a_finished_run_that_is_resumed_learns_nothing_more(tmp_path, processor, rows, steps):
    def run(checkpoint=None):
        settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
        trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=steps, **settings))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    finished = run()
    resumed = run(str(tmp_path / f"checkpoint-{steps}"))
    assert resumed.state.global_step == steps
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, finished.model.state_dict()[name]), name


# LoRA


def test_lora_reaches_attention_and_experts_and_nothing_else():
    model = adapt(small_model(), ModelArguments(lora=True, lora_rank=2))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all("lora_" in name and "language_model" in name for name in learning)
    for target in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.experts"):
        assert any(f".{target}." in name for name in learning), target
    assert not any("gate." in name.split("lora_")[0].split("experts")[0] for name in learning)


@pytest.mark.parametrize("form", ["mlp", "swiglu"])
def test_lora_reaches_both_halves_of_the_towers_experts_and_merges_to_the_same_logits(processor, rows, form):
    vision = {"moe_layers": "all", "num_experts": 4, "moe_intermediate_size": 16, "expert_form": form}
    start = small_model(vision=vision)
    model, batch = adapt(copy.deepcopy(start), ModelArguments(lora=True, lora_rank=2)), MoeVlmCollator(processor)(rows)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    targets = [name for name, _ in start.named_parameters() if name.endswith(("up_proj", "down_proj"))]
    assert len([name for name in targets if "vision" in name]) == 2 * start.config.vision_config.num_hidden_layers
    assert len([name for name in learning if ".experts." in name]) == 2 * len(targets)  # A and B of each
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        adapted = model.eval()(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, adapted, atol=1e-4, rtol=1e-3)
    weights = dict(merged.named_parameters())
    changed = [name for name, value in start.named_parameters() if not torch.equal(value, weights[name])]
    assert set(targets) <= set(changed)


@pytest.mark.parametrize("part", ["vision", "connector", "language"])
def test_a_frozen_part_has_no_adapter_that_learns(part):
    model = small_model({"moe_layers": "all", "num_experts": 2})
    flags = {f"freeze_{part}": True}
    learning = {part_of(name) for name, one in adapt(model, ModelArguments(lora=True, **flags)).named_parameters()
                if one.requires_grad}  # fmt: skip
    assert learning and part not in learning


def test_a_lora_target_that_the_decoder_lacks_is_named():
    with pytest.raises(ValueError, match="the decoder has no 'qproj'; name layers such as q_proj"):
        adapt(small_model(), ModelArguments(lora=True, lora_targets=["q_proj", "qproj"]))


def test_a_dense_model_takes_lora_without_experts():
    adapt(small_model(moe_layers="none"), ModelArguments(lora=True))


def test_a_trained_adapter_reloads_and_merges_to_the_same_logits(tmp_path, processor, rows):
    model = adapt(small_model(), ModelArguments(lora=True, lora_rank=2))
    trainer_of(model, rows, processor, arguments(tmp_path, max_steps=5, learning_rate=0.05)).train()
    batch = MoeVlmCollator(processor)(rows[:4])

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits

    trained = logits(model)
    assert (trained - logits(small_model())).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(small_model(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)
    # W + BA rounded once instead of (Wx + BAx).
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_image_words_are_refused_where_the_head_is_in_parts(tmp_path, processor, rows, monkeypatch, engine):
    made = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        Trainer, "create_accelerator_and_postprocess", lambda self: (made(self), setattr(self, engine, True))
    )
    with pytest.raises(ValueError, match="image_words_steps=2 .* train with DDP"):
        trainer_of(small_model(), rows, processor, arguments(tmp_path, image_words_steps=2))


# Ranks


TWO_RANKS = """
import sys
import torch
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback
sys.path[:0] = [{root!r}, {tests!r}]
import test_training as t
from moevlm.collating_moevlm import MoeVlmCollator
from moevlm.telemetry_moevlm import first_non_finite, gradient_norms

class PoisonOneRank(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.process_index == 1:
            model.lm_head.weight.data.fill_(float("nan"))

processor, rows = t.run_parts()
gate = t.gate_after_one_step({folder!r}, [rows[0]] * 4, processor, per_device_train_batch_size=2)
args = t.arguments({folder!r}, max_steps=2, per_device_train_batch_size=2)
trainer = t.trainer_of(t.small_model(), rows, processor, args)
trainer.train()
balanced = t.balanced_model()
t.trainer_of(balanced, rows, processor, t.still({folder!r}, per_device_train_batch_size=2)).train()
stream = t.trainer_of(t.small_model(), t.stream_of(t.mixed_rows(processor, rows)), processor, args)
stream.train()
try:
    t.trainer_of(t.small_model(), rows, processor, args, callbacks=[PoisonOneRank()]).train()
except FloatingPointError as error:
    message = str(error)
result = {{"gate": gate, "history": trainer.state.log_history, "biases": t.biases(balanced), "message": message}}
result["stream"] = t.losses(stream)
batch = MoeVlmCollator(processor)(rows[:4])
for name, model in (("whole", t.small_model().eval()), ("sharded", t.small_model().eval())):
    if name == "sharded":
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
    model(**batch).loss.backward()
    result[name] = {{part: norm.item() for part, norm in gradient_norms(model).items()}}
    model.get_parameter("lm_head.weight").data.fill_(float("nan"))
    result[name]["place"] = first_non_finite(model, batch)
torch.save(result, {folder!r} + f"/rank-{{args.process_index}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks (gloo) found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "two_ranks.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def test_two_ranks_learn_and_log_the_same_as_one(tmp_path, two_ranks):
    two = two_ranks[0]
    processor, rows = run_parts()
    start = small_model(router_aux_loss_coef=10.0).model.language_model.layers[1].mlp.gate.weight.detach()
    one = gate_after_one_step(tmp_path, [rows[0]] * 4, processor, per_device_train_batch_size=4)
    assert ((two["gate"] - start).norm() / (one - start).norm()).item() == pytest.approx(1.0, abs=1e-3)
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=2))
    trainer.train()
    names = ["loss", "aux_loss", "router_entropy_decoder.1", "max_router_logit_decoder.1", "grad_norm_language"]
    for single, double in zip(trainer.state.log_history[:2], two["history"][:2], strict=True):
        for name in names:
            # Batch norm sees half a batch on each rank, so the numbers are near, not equal.
            assert double[name] == pytest.approx(single[name], rel=0.05), name


def test_two_ranks_share_a_stream(tmp_path, two_ranks):
    processor, rows = run_parts()
    trainer = trainer_of(small_model(), mixed_rows(processor, rows), processor, arguments(tmp_path, max_steps=2))
    trainer._get_train_sampler = lambda *args: None  # in order, as a stream
    trainer.train()
    assert two_ranks[0]["stream"] == two_ranks[1]["stream"] == pytest.approx(losses(trainer), rel=0.05)


def test_biases_agree_bit_for_bit_over_ranks_and_with_one_process(tmp_path, two_ranks):
    processor, rows = run_parts()
    model = balanced_model()
    trainer_of(model, rows, processor, still(tmp_path)).train()
    for rank in two_ranks:
        assert all(map(torch.equal, rank["biases"], biases(model)))
    assert all(bias.any() for bias in biases(model))


def test_sharded_gradients_and_weights_are_judged_whole(two_ranks):
    for rank in two_ranks:
        whole, sharded = rank["whole"], rank["sharded"]
        assert "lm_head" in whole.pop("place") and "lm_head" in sharded.pop("place")
        assert sharded == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_breaks_on_one_rank_stops_both_with_the_rank_and_its_layer(two_ranks):
    for rank in two_ranks:
        assert "lm_head (Linear), whose own weight is not finite (rank 1)" in rank["message"]
        assert "(rank 0)" not in rank["message"]


def sampled(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_first_epoch_visits_lower_stages_first_and_later_ones_mix_them():
    stages = [1, 0] * 500
    sampler = StagedSampler([1] * 1000, stages, batch_size=2, seed=0)
    first, second = sampled(sampler, 0), sampled(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert [stages[row] for row in first] == [0] * 500 + [1] * 500
    assert 200 < sum(stages[row] for row in second[:500]) < 300  # 250 expected, standard deviation 11
    assert sampled(sampler, 0) == first != second


def test_rows_of_one_batch_have_like_lengths():
    lengths = torch.randint(10, 200, (4000,)).tolist()
    order = sampled(StagedSampler(lengths, [1] * 4000, batch_size=16, seed=0), 0)
    batches = [[lengths[row] for row in order[i : i + 16]] for i in range(0, 4000, 16)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)  # batches drawn without sorting need 1.8 times
