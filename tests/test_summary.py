"""The summary of a model against counts that anyone believes."""

import copy

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.layouts_moevlm import unpack_experts
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.summary_moevlm import sparse_layers
from moevlm.training_moevlm import ModelArguments, adapt, freeze


def part(model, name):
    return next(part for part in model.moe_summary().parts if part.name == name)


def test_parameters_are_those_of_the_model_and_a_tied_head_counts_once():
    for tied in (False, True):
        model = MoeVlmForConditionalGeneration(tiny_config(tie_word_embeddings=tied))
        assert model.moe_summary().parameters == sum(parameter.numel() for parameter in model.parameters())


def test_active_parameters_are_those_of_the_model_with_only_as_many_experts_as_a_token_visits(config, tiny):
    small = copy.deepcopy(config)
    for part_config in (small.vision_config, small.connector_config, small.text_config):
        part_config.num_experts = part_config.num_experts_per_tok
    smaller = MoeVlmForConditionalGeneration(small)
    gates = sum(p.numel() for name, p in tiny.named_parameters() if ".gate." in name)
    fewer_gates = sum(p.numel() for name, p in smaller.named_parameters() if ".gate." in name)
    # The router itself is met whole, whatever it chooses.
    expected = sum(p.numel() for p in smaller.parameters()) - fewer_gates + gates
    assert tiny.moe_summary().active_parameters == expected


def test_unpacking_the_experts_changes_no_count(tiny):
    before = tiny.moe_summary()
    after = unpack_experts(copy.deepcopy(tiny)).moe_summary()
    names = ("parameters", "active_parameters", "weight_flops")
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]


def test_fewer_experts_per_token_lower_the_active_parameters_without_a_new_model(tiny):
    before = part(tiny, "language")
    tiny.config.text_config.num_experts_per_tok = 1
    after = part(tiny, "language")
    assert after.parameters == before.parameters and after.active < before.active


def counted(function, *args, **kwargs):
    """FLOPs of matrix products and convolutions as torch counts them in a run."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_layers": "last_half",
}  # fmt: skip


@pytest.mark.parametrize(
    "vision",
    [{"stem_channels": (4, 8, 8)}, {"stem": "patch", "use_class_token": True}],
    ids=["convolutional stem", "patches and class token"],
)
def test_flops_are_those_that_torch_counts_while_the_model_runs(vision):
    base = tiny_config()
    config = MoeVlmConfig(
        vision_config={**VISION, **vision},
        connector_config={**base.connector_config.to_dict(), "n_shared_experts": 1},
        text_config={**base.text_config.to_dict(), "num_key_value_heads": 1, "n_shared_experts": 1},
        image_token_id=base.image_token_id,
    )
    # Eager attention is two plain matrix products, over all keys, which the counter sees.
    model = MoeVlmForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation"):  # transformers 5
        model.set_experts_implementation("eager")
    summary, tokens = model.moe_summary(), 24
    text = counted(model, input_ids=torch.randint(6, 64, (1, tokens)))
    assert text == tokens * summary.flops_per_token(context=tokens)
    assert counted(model.model.encode_images, torch.randn(1, 3, 32, 32)) == summary.picture_flops


def test_the_summary_of_a_model_without_memory_is_the_same(config, tiny):
    with torch.device("meta"):
        ghost = MoeVlmForConditionalGeneration(config)
    assert str(ghost.moe_summary()) == str(tiny.moe_summary())


def test_bytes_are_counted_by_dtype(tiny):
    floats = sum(t.numel() for t in (*tiny.parameters(), *tiny.buffers()) if t.is_floating_point())
    assert tiny.moe_summary().bytes["float32"] == 4 * floats
    tiny.model.vision_tower.to(torch.bfloat16)
    assert tiny.moe_summary().bytes["bfloat16"] > 0


def test_adapters_stand_in_a_line_of_their_own_and_alone_learn():
    model = MoeVlmForConditionalGeneration(tiny_config())
    plain = model.moe_summary()
    summary = adapt(model, ModelArguments(lora=True, lora_rank=2)).moe_summary()
    adapters = summary.parts[-1]
    assert adapters.name == "adapters" and adapters.learning == adapters.parameters > 0
    assert [p[1:4] for p in summary.parts[:-1]] == [p[1:4] for p in plain.parts]
    assert not any(p.learning for p in summary.parts[:-1])
    assert summary.flops_per_token(64) == plain.flops_per_token(64) and summary.picture_flops == plain.picture_flops


def test_the_table_says_where_the_experts_sit_and_what_learns(tiny):
    freeze(tiny, ["vision"])
    lines = str(tiny.moe_summary()).splitlines()
    assert lines[0].split() == ["part", "experts", "parameters", "active", "learning"]
    assert lines[1].startswith("vision") and "2 of 4 in layers 1 of 2" in lines[1] and lines[1].endswith(" 0")
    assert lines[2].startswith("connector") and "2 of 4" in lines[2]
    assert lines[3].startswith("language") and "2 of 4 in layers 0, 2 of 3" in lines[3]
    assert f"{tiny.num_parameters():,}" in lines[4]
    assert "forward FLOPs" in lines[5] and "float32" in lines[6]


def test_a_part_alone_is_refused(tiny):
    with pytest.raises(ValueError, match="whole model"):
        tiny.model.connector.moe_summary()


def test_sparse_layers_are_named_in_the_order_in_which_the_model_reports_them(config, tiny, batch):
    layers = sparse_layers(config)
    assert list(layers) == ["vision.1", "connector", "decoder.0", "decoder.2"]
    assert [len(load) for load in tiny(**batch).expert_load] == list(layers.values())
