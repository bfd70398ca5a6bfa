"""Two processes (gloo, CPU): DDP, a rank without pictures, FSDP2. They start once and leave results for all tests."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import IMAGE_TOKEN, tiny_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moevlm.base_moevlm import SHIPPED
from moevlm.configuration_moevlm import AUTO_MAP
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.router_losses_moevlm import count_tokens
from moevlm.routing_moevlm import MoeVlmRouter

RANKS = 2
# Every router loss, a modality mask and a bias.
OPTIONS = {
    "expert_modalities": ["shared", "image", "text", "text"],
    "scoring_func": "sigmoid",
    "use_router_bias": True,
    "router_aux_loss_per_modality": True,
}


def model_with_heavy_router_losses(**text):
    """The same weights in each process; the router losses make the larger part of the router's gradient."""
    torch.manual_seed(0)
    config = tiny_config(**text)
    for part in (config.vision_config, config.connector_config, config.text_config):
        part.router_aux_loss_coef, part.router_z_loss_coef = 10.0, 1.0
        if text:
            part.router_local_entropy_coef, part.router_global_entropy_coef = 5.0, 5.0
    return MoeVlmForConditionalGeneration(config)


def inputs(images):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 64, (2, 16), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if images:
        ids[:, 1:5] = IMAGE_TOKEN
        batch["labels"][:, :5] = -100
        batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    return batch


def different_inputs(rank):
    """Other words and pictures for each rank; the second has fewer tokens and more of them are labels."""
    batch = inputs(images=True)
    batch["input_ids"][:, 5:] = (batch["input_ids"][:, 5:] + 7 * rank).clamp(max=63)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["pixel_values"] = batch["pixel_values"] * (1 + rank)
    if rank:
        batch["attention_mask"][:, 9:] = 0
        batch["labels"][:, 9:] = -100
    else:
        batch["labels"][:, :12] = -100
    return batch


def model_of_means():
    """A model with the router losses that are means over tokens alone."""
    model = model_with_heavy_router_losses(**OPTIONS).eval()
    for part in (model.config.vision_config, model.config.connector_config, model.config.text_config):
        part.router_aux_loss_coef, part.router_global_entropy_coef = 0.0, 0.0
    return model


def gradients(model):
    return {name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()}


def backward_as_trainer(model, batch):
    """Trainer counts over all ranks, and multiplies the loss by their number because DDP averages."""
    labels = (batch["labels"][:, 1:] != -100).sum()
    tokens = count_tokens(batch["input_ids"], IMAGE_TOKEN, batch.get("attention_mask"))
    dist.all_reduce(labels)
    dist.all_reduce(tokens)
    (model(**batch, num_items_in_batch=labels, num_tokens_in_batch=tokens).loss * RANKS).backward()


def routers(model):
    return [module for module in model.modules() if isinstance(module, MoeVlmRouter)]


def balance_by_bias(model, rank):
    """Three steps of loss-free balancing on different data of each rank, counts summed over both."""
    biased = [router for router in routers(model) if router.e_score_correction_bias is not None]
    for step in range(3):
        batch = inputs(images=True)
        batch["input_ids"] = batch["input_ids"].roll(rank + step, dims=0)
        batch["pixel_values"] = batch["pixel_values"] * (1 + rank) + step
        for router, counts in zip(biased, model(**batch).expert_counts[-len(biased) :], strict=True):
            counts = counts.clone()
            dist.all_reduce(counts)
            router.update_bias(counts, 0.01)
    return [router.e_score_correction_bias for router in biased]


def sharded_model():
    model, mesh = model_with_heavy_router_losses(), init_device_mesh("cpu", (RANKS,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank, folder):
    """What each process does: identical data, then a text-only rank, then sharded training and saving."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    # Evaluation mode for the first: BatchNorm would average over a rank, which is another question.
    model = DistributedDataParallel(model_with_heavy_router_losses().eval())
    backward_as_trainer(model, inputs(images=True))
    if rank == 0:
        torch.save(gradients(model), f"{folder}/ddp.pt")
    model = DistributedDataParallel(model_with_heavy_router_losses(**OPTIONS).eval())
    backward_as_trainer(model, inputs(images=True))
    if rank == 0:
        torch.save(gradients(model), f"{folder}/ddp-options.pt")
    torch.save(balance_by_bias(model, rank), f"{folder}/bias-{rank}.pt")
    model = DistributedDataParallel(model_of_means())
    backward_as_trainer(model, different_inputs(rank))
    if rank == 0:
        torch.save(gradients(model), f"{folder}/ddp-different.pt")
    model = DistributedDataParallel(model_with_heavy_router_losses().train())
    for _ in range(2):
        backward_as_trainer(model, inputs(images=rank == 0))
    torch.save(gradients(model), f"{folder}/mixed-{rank}.pt")
    # As people do who publish; with transformers' own method, saving a sharded model then names torch's class and file.
    MoeVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    model = sharded_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(**inputs(images=rank == 0)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()(**inputs(images=rank == 0))  # the text-only rank must run the tower along
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, f"{folder}/sharded.pt")
    model.save_pretrained(f"{folder}/saved", state_dict=whole, is_main_process=rank == 0)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    yield folder


@pytest.mark.parametrize("name, options", [("ddp", {}), ("ddp-options", OPTIONS)])
def test_two_ranks_with_identical_data_change_no_gradient(results, name, options):
    model, batch = model_with_heavy_router_losses(**options).eval(), inputs(images=True)
    model(**batch).loss.backward()
    found = torch.load(results / f"{name}.pt")
    for name, expected in gradients(model).items():
        ratio = (found[name].norm() / expected.norm()).item() if expected.norm() else 1.0
        assert ratio == pytest.approx(1.0, abs=1e-5), name


def test_two_ranks_with_different_data_learn_what_one_learns_of_all(results):
    model, both = model_of_means(), [different_inputs(rank) for rank in range(RANKS)]
    model(**{name: torch.cat([batch[name] for batch in both]) for name in both[0]}).loss.backward()
    found = torch.load(results / "ddp-different.pt")
    for name, expected in gradients(model).items():
        # A bias of keys moves no attention weight: its gradient is rounding alone.
        difference = (found[name] - expected).norm() / expected.norm().clamp(min=1e-4)
        assert difference.item() < 1e-5, (name, difference)


def test_the_bias_moves_and_agrees_bit_for_bit_across_ranks(results):
    first, second = (torch.load(results / f"bias-{rank}.pt") for rank in range(RANKS))
    assert len(first) == 2 and all(bias.any() for bias in first)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_text_only_rank_beside_an_image_rank_shares_its_gradients(results):
    first, second = (torch.load(results / f"mixed-{rank}.pt") for rank in range(RANKS))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
    assert torch.count_nonzero(first["model.vision_tower.embeddings.position_embedding.weight"])


def test_a_sharded_model_saves_the_canonical_code_and_nothing_of_torchs(results):
    stored = json.loads((results / "saved" / "config.json").read_text())
    assert stored["auto_map"] == AUTO_MAP
    assert stored["architectures"] == ["MoeVlmForConditionalGeneration"]
    code = {path.name for path in (results / "saved").glob("*.py")}
    assert code == {f"{name}_moevlm.py" for name in SHIPPED}


def test_a_sharded_model_reloads_with_the_weights_it_was_trained_to(results):
    loaded = MoeVlmForConditionalGeneration.from_pretrained(results / "saved").state_dict()
    trained, fresh = torch.load(results / "sharded.pt"), model_with_heavy_router_losses().state_dict()
    for name, value in trained.items():
        assert torch.equal(loaded[name], value), name
    assert not torch.equal(trained["lm_head.weight"], fresh["lm_head.weight"])
