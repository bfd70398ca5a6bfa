"""Training: what learns, at which rate, what is logged, and what survives a kill."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from PIL import Image
from transformers import HfArgumentParser, TrainerCallback, set_seed

from moevlm.collating_moevlm import MoeVlmCollator, encode_record
from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer
from moevlm.training_moevlm import (
    ModelArguments,
    MoeVlmTrainer,
    MoeVlmTrainingArguments,
    RouterWindow,
    StagedSampler,
    adapt,
    freeze,
    parameter_groups,
    part_of,
    sparse_layers,
)

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 40, 220), "white": (255, 255, 255)}


def small_model(**text_config):
    set_seed(0)
    config = MoeVlmConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "image_size": 32,
            "stem_channels": (8, 8, 8, 16),
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


def test_freezing_everything_or_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="nothing is left"):
        freeze(small_model(), ["vision", "connector", "language"])
    with pytest.raises(ValueError, match="head"):
        freeze(small_model(), ["head"])


# Router numbers


class Ranks:
    """Stands for an accelerator of two ranks that saw the same."""

    def reduce(self, sums, reduction):
        return 2 * sums


def test_the_window_averages_each_layer_over_the_batches_that_visited_it():
    window = RouterWindow({"vision.0": 2, "decoder.1": 3})
    both = (torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25, 0.25]))
    numbers = {"aux_loss": torch.tensor(1.0), "z_loss": torch.tensor(2.0), "router_entropy": torch.tensor([0.1, 0.3])}
    window.add({**numbers, "expert_load": both})
    text_only = {"expert_load": (torch.tensor([0.1, 0.9, 0.0]),), "router_entropy": torch.tensor([0.5])}
    window.add({**numbers, "aux_loss": torch.tensor(3.0), **text_only})
    scalars, loads = window.take(Ranks())
    assert scalars["aux_loss"] == 2.0 and scalars["z_loss"] == 2.0
    assert loads == {"vision.0": [1.0, 0.0], "decoder.1": [0.3, 0.575, 0.125]}
    assert scalars["dead_experts_vision.0"] == 1 and scalars["dead_experts_decoder.1"] == 0
    assert scalars["router_entropy_decoder.1"] == pytest.approx(0.4) and scalars["max_load_decoder.1"] > 0.57
    assert window.take(Ranks()) == ({}, {})


def test_the_log_names_every_sparse_layer(tmp_path, processor, rows):
    model = small_model(moe_layers="all")
    trainer = trainer_of(model, rows, processor, arguments(tmp_path, max_steps=2, logging_steps=2))
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert list(entry["expert_load"]) == ["decoder.0", "decoder.1"] == list(sparse_layers(model.config))
    assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in entry["expert_load"].values())
    assert entry["aux_loss"] >= 0.9 and entry["z_loss"] > 0


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


# The Trainer


def test_the_loss_falls(tmp_path, processor, rows):
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=40, learning_rate=0.01))
    trainer.train()
    curve = losses(trainer)
    assert curve[40] < 0.2 * curve[1]


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


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path, processor, rows):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(float("nan"))

    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    trainer = trainer_of(small_model(), rows, processor, args, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"nan at step 4.*learning_rate=0.003.*--resume_from_checkpoint last"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, processor, rows):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data[0, 0] = float("inf")

    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = trainer_of(small_model(), rows, processor, args, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


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


def resumable(folder):
    return arguments(folder, max_steps=10, save_strategy="steps", save_steps=3)


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


# LoRA


def test_lora_reaches_attention_and_experts_and_nothing_else():
    model = adapt(small_model(), ModelArguments(lora=True, lora_rank=2))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all("lora_" in name and "language_model" in name for name in learning)
    for target in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.experts"):
        assert any(f".{target}." in name for name in learning), target
    assert not any("gate." in name.split("lora_")[0].split("experts")[0] for name in learning)


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


# Ranks


TWO_RANKS = """
import sys
import torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_training as t

processor, rows = t.run_parts()
gate = t.gate_after_one_step({folder!r}, [rows[0]] * 4, processor, per_device_train_batch_size=2)
args = t.arguments({folder!r}, max_steps=2, per_device_train_batch_size=2)
trainer = t.trainer_of(t.small_model(), rows, processor, args)
trainer.train()
if trainer.is_world_process_zero():
    torch.save({{"gate": gate, "history": trainer.state.log_history}}, {folder!r} + "/two.pt")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_learn_and_log_the_same_as_one(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    two = torch.load(tmp_path / "two.pt")
    processor, rows = run_parts()
    start = small_model(router_aux_loss_coef=10.0).model.language_model.layers[1].mlp.gate.weight.detach()
    one = gate_after_one_step(tmp_path, [rows[0]] * 4, processor, per_device_train_batch_size=4)
    assert ((two["gate"] - start).norm() / (one - start).norm()).item() == pytest.approx(1.0, abs=1e-3)
    trainer = trainer_of(small_model(), rows, processor, arguments(tmp_path, max_steps=2))
    trainer.train()
    for single, double in zip(trainer.state.log_history[:2], two["history"][:2], strict=True):
        # Batch norm sees half a batch on each rank, so the numbers are near, not equal.
        assert double["loss"] == pytest.approx(single["loss"], rel=0.02)
        assert double["aux_loss"] == pytest.approx(single["aux_loss"], rel=0.05)


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
