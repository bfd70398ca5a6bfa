"""The config: what it refuses, what its rules mean, and what survives a round trip."""

import json
import math
from pathlib import Path

import pytest

from moevlm.configuration_moevlm import (
    AUTO_MAP,
    MoeVlmConfig,
    MoeVlmConnectorConfig,
    MoeVlmTextConfig,
    MoeVlmVisionConfig,
)
from moevlm.sparsity_moevlm import MOE_LAYER_RULES, layer_types_from

ROOT = Path(__file__).resolve().parent.parent


def sparse_layers(moe_layers, num_hidden_layers):
    types = layer_types_from(moe_layers, num_hidden_layers)
    assert len(types) == num_hidden_layers
    return [i for i, kind in enumerate(types) if kind == "sparse"]


@pytest.mark.parametrize(
    "rule, odd, even",
    [
        ("none", [], []),
        ("alternate", [0, 2, 4], [1, 3]),
        ("first_half", [0, 1], [0, 1]),
        ("last_half", [2, 3, 4], [2, 3]),
        ("all", [0, 1, 2, 3, 4], [0, 1, 2, 3]),
    ],
)
def test_each_rule_names_these_layers_of_five_and_of_four(rule, odd, even):
    assert sparse_layers(rule, 5) == odd
    assert sparse_layers(rule, 4) == even


def test_every_rule_works_on_an_empty_stack():
    assert [layer_types_from(rule, 0) for rule in MOE_LAYER_RULES] == [[]] * len(MOE_LAYER_RULES)


def test_a_list_of_indices_names_sparse_layers():
    assert sparse_layers([2, 0], 3) == [0, 2]


def test_mlp_layer_types_win_over_the_rule():
    config = MoeVlmTextConfig(num_hidden_layers=2, moe_layers="all", mlp_layer_types=["dense", "sparse"])
    assert config.mlp_layer_types == ["dense", "sparse"]


@pytest.mark.parametrize(
    "config_class, arguments, message",
    [
        (MoeVlmTextConfig, {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 exceeds num_experts=2"),
        (MoeVlmTextConfig, {"num_experts": 0}, "num_experts=0 must be a whole number of at least 1"),
        (MoeVlmTextConfig, {"num_experts_per_tok": 1.5}, "num_experts_per_tok=1.5 must be a whole number"),
        (MoeVlmTextConfig, {"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
        (MoeVlmTextConfig, {"vocab_size": 0}, "vocab_size=0"),
        (
            MoeVlmTextConfig,
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads=3 does not divide",
        ),
        (MoeVlmTextConfig, {"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        (MoeVlmTextConfig, {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 must be at least 0"),
        (MoeVlmTextConfig, {"router_z_loss_coef": -0.1}, "router_z_loss_coef=-0.1 must be at least 0"),
        (MoeVlmTextConfig, {"moe_layers": "most"}, "moe_layers='most' is no rule"),
        (MoeVlmTextConfig, {"moe_layers": [3]}, r"moe_layers names \[3\], but there are layers 0..2"),
        (MoeVlmTextConfig, {"mlp_layer_types": ["dense"]}, "mlp_layer_types has 1 entries for num_hidden_layers=3"),
        (MoeVlmTextConfig, {"mlp_layer_types": ["dense", "moe", "dense"]}, r"mlp_layer_types holds \['moe'\]"),
        (MoeVlmTextConfig, {"rope_parameters": {"rope_type": "default"}}, "must have both rope_type and rope_theta"),
        (MoeVlmTextConfig, {"rope_theta": 1e6}, "'rope_theta': 1000000.0, .* are read from rope_parameters alone"),
        (
            MoeVlmTextConfig,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1",
        ),
        (MoeVlmVisionConfig, {"hidden_size": 10, "num_attention_heads": 4}, "num_attention_heads=4 does not divide"),
        (MoeVlmTextConfig, {"hidden_act": "bogus"}, "hidden_act='bogus' is unknown; transformers has gelu, "),
        (MoeVlmTextConfig, {"head_dim": 7}, "head_dim=7 is odd"),
        (MoeVlmVisionConfig, {"expert_act": "bogus"}, "expert_act='bogus' is unknown"),
        (MoeVlmConnectorConfig, {"projector_act": "bogus"}, "projector_act='bogus' is unknown"),
        (MoeVlmVisionConfig, {"image_size": 8}, "image_size=8 must be a multiple of patch_size=16"),
        (MoeVlmVisionConfig, {"image_size": 72, "stem": "conv"}, "image_size=72 must be a multiple"),
        (MoeVlmVisionConfig, {"stem": "fold"}, "stem='fold' must be 'patch' or 'conv'"),
        (MoeVlmVisionConfig, {"stem_channels": (8, 8)}, "shrinks a picture 4 times, but patch_size=16"),
        (MoeVlmVisionConfig, {"moe_layers": "all", "num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds"),
        (MoeVlmConnectorConfig, {"projector": "conv"}, "projector='conv' must be 'linear' or 'mlp'"),
        (MoeVlmConnectorConfig, {"pixel_shuffle_factor": 0}, "pixel_shuffle_factor=0"),
        (MoeVlmConnectorConfig, {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 exceeds"),
        (MoeVlmConfig, {"image_token_id": 512}, "image_token_id=512 is outside the vocabulary of vocab_size=512"),
        (
            MoeVlmConfig,
            {"connector_config": {"pixel_shuffle_factor": 3}},
            "pixel_shuffle_factor=3 does not divide the 4",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(config_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        config_class(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scoring_func": "tanh"}, "scoring_func='tanh' must be 'softmax' or 'sigmoid'"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor=0 must lie between"),
        ({"n_group": 3}, "n_group=3 must divide num_experts=8"),
        ({"n_group": 2, "topk_group": 4}, "n_group=2 must .* be at least topk_group=4"),
        ({"n_group": 0}, "n_group=0 must be a whole number of at least 1"),
        ({"n_group": 8, "topk_group": 1}, "num_experts_per_tok=2 exceeds the 1 experts that some token can reach"),
        ({"router_top_p": 0.0}, "router_top_p=0.0 must lie between"),
        ({"router_top_p": 1.5}, "router_top_p=1.5 must lie between"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1 must lie between 0 and 1"),
        ({"shared_expert_mix": 0.5}, "shared_expert_mix=0.5 needs n_shared_experts"),
        ({"shared_expert_mix": 1.5, "n_shared_experts": 1}, "shared_expert_mix=1.5 must lie between 0 and 1"),
        ({"router_local_entropy_coef": -1}, "router_local_entropy_coef=-1 must be at least 0"),
        ({"router_global_entropy_coef": -1}, "router_global_entropy_coef=-1 must be at least 0"),
        ({"router_global_entropy_threshold": -1}, "router_global_entropy_threshold=-1 must lie between"),
        ({"expert_modalities": ["shared"] * 7}, "expert_modalities=.* for each of the num_experts=8 experts"),
        ({"expert_modalities": ["shared"] * 7 + ["sound"]}, "must hold 'shared', 'image' or 'text'"),
        ({"expert_modalities": ["text"] * 7 + ["image"]}, "exceeds the 1 experts that some token can reach"),
        ({"expert_modalities": ["text"] * 8}, "exceeds the 0 experts that some token can reach"),
        # Two groups of four; image tokens find one expert of theirs in the first and may be sent there.
        (
            {"expert_modalities": ["image"] + ["text"] * 3 + ["shared"] * 4, "n_group": 2},
            "exceeds the 1 experts that some token can reach",
        ),
        ({"expert_capacity_factor": 1.0}, "expert_capacity_factor=1.0 is not for moevlm_text"),
        ({"batch_priority_routing": True}, "batch_priority_routing=True needs an expert_capacity_factor"),
        ({"shared_expert_mix": 0.0}, "shared_expert_mix=0.0 needs n_shared_experts of at least 1"),
        ({"shared_expert_gate": True}, "shared_expert_gate=True needs n_shared_experts of at least 1"),
        ({"router_global_entropy_threshold": 2.1}, r"threshold=2.1 exceeds ln\(8 experts allowed\) = 2.0794"),
        (
            {"router_global_entropy_threshold": 2.0, "expert_modalities": ["text"] * 4 + ["image"] * 4},
            r"threshold=2.0 exceeds ln\(4 experts allowed\) = 1.3863",
        ),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan must be at least 0 and finite"),
    ],
)
def test_a_wrong_routing_value_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoeVlmTextConfig(**arguments)


@pytest.mark.parametrize(
    "config_class, arguments, message",
    [
        (
            MoeVlmVisionConfig,
            {"expert_modalities": ["shared"] * 8},
            "is not for moevlm_vision: its tokens are all image",
        ),
        (MoeVlmConnectorConfig, {"expert_modalities": ["shared"] * 8}, "is not for moevlm_connector"),
        (MoeVlmVisionConfig, {"router_aux_loss_per_modality": True}, "is not for moevlm_vision: its tokens are all"),
        (MoeVlmConnectorConfig, {"router_aux_loss_per_modality": True}, "is not for moevlm_connector"),
        (MoeVlmConnectorConfig, {"expert_capacity_factor": 1.0}, "only the vision tower may drop tokens"),
        (MoeVlmVisionConfig, {"moe_layers": "all", "expert_capacity_factor": -1.0}, "expert_capacity_factor=-1.0 must"),
    ],
)
def test_a_routing_option_of_another_part_is_refused_by_name(config_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        config_class(**arguments)


@pytest.mark.parametrize(
    "fields, most",
    [
        ({}, 8),
        ({"n_group": 4, "topk_group": 2}, 4),
        ({"expert_modalities": ["shared"] * 3 + ["image"] * 4 + ["text"]}, 4),
        ({"expert_modalities": ["shared", "text", "text", "image"] * 2, "n_group": 2}, 2),
    ],
)
def test_the_most_experts_that_every_token_can_reach(fields, most):
    assert MoeVlmTextConfig(**fields).max_experts_per_tok == most


def test_a_part_of_another_class_is_refused():
    with pytest.raises(TypeError, match="vision_config must be a dict or a MoeVlmVisionConfig, got MoeVlmTextConfig"):
        MoeVlmConfig(vision_config=MoeVlmTextConfig())


def test_dense_layers_ask_for_no_experts():
    assert "sparse" not in MoeVlmTextConfig(moe_layers="none", num_experts=0).mlp_layer_types


def test_a_part_may_be_a_config_or_its_dict():
    text = MoeVlmTextConfig(hidden_size=64)
    assert MoeVlmConfig(text_config=text).to_dict() == MoeVlmConfig(text_config={"hidden_size": 64}).to_dict()


def test_the_connector_ends_in_the_width_of_the_decoder():
    assert MoeVlmConfig(text_config={"hidden_size": 64}).connector_config.hidden_size == 64


def test_image_seq_length_counts_shuffled_patches(config):
    assert config.vision_config.patches_per_side == 4
    assert config.image_seq_length == (4 // 2) ** 2


@pytest.mark.parametrize("name, value", [("tie_word_embeddings", True), ("pad_token_id", 3), ("eos_token_id", [1, 2])])
def test_shared_fields_are_equal_on_top_and_in_the_decoder(name, value):
    from_text, from_top = MoeVlmConfig(text_config={name: value}), MoeVlmConfig(**{name: value})
    for config in (from_text, from_top):
        assert getattr(config, name) == getattr(config.text_config, name) == value


def test_every_field_survives_save_and_load(config, tmp_path):
    config.text_config.router_aux_loss_coef = 0.25
    config.save_pretrained(tmp_path)
    loaded = MoeVlmConfig.from_pretrained(tmp_path)
    assert json.loads(loaded.to_json_string(use_diff=False)) == json.loads(config.to_json_string(use_diff=False))
    assert loaded.text_config.router_aux_loss_coef == 0.25


def test_routing_options_survive_save_and_load(tmp_path):
    text = {"scoring_func": "sigmoid", "n_group": 2, "topk_group": 2, "router_top_p": 0.9, "use_router_bias": True}
    text |= {"expert_modalities": ["shared", "shared", "text", "image"] * 2, "router_global_entropy_threshold": 1.5}
    vision = {"expert_capacity_factor": 1.05, "batch_priority_routing": True}
    MoeVlmConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    loaded = MoeVlmConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded.text_config, name) for name in text} == text
    assert {name: getattr(loaded.vision_config, name) for name in vision} == vision


def test_ln_of_all_experts_is_a_threshold_that_may_be_asked_for():
    assert MoeVlmTextConfig(router_global_entropy_threshold=math.log(8)).router_global_entropy_threshold > 2.07


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid(path):
    assert MoeVlmConfig.from_json_file(path).text_config.num_experts >= 1


def test_output_router_logits_survives_save_and_load(tmp_path):
    MoeVlmConfig(text_config={"output_router_logits": True}).save_pretrained(tmp_path)
    assert MoeVlmConfig.from_pretrained(tmp_path).text_config.output_router_logits is True


def test_auto_map_survives_two_round_trips(config, tmp_path):
    config.save_pretrained(tmp_path / "first")
    MoeVlmConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_rope_theta_survives_save_and_load(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    MoeVlmConfig(text_config={"rope_parameters": rope}).save_pretrained(tmp_path)
    assert MoeVlmConfig.from_pretrained(tmp_path).text_config.rope_parameters == rope


def test_the_default_is_valid_and_tiny():
    config = MoeVlmConfig()
    assert config.text_config.hidden_size <= 128
    assert config.text_config.mlp_layer_types == ["sparse", "dense", "sparse"]
