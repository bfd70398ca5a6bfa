"""Experts made of dense layers, taken back, unpacked, exported: against what anyone can compute by hand."""

import copy
import math

import pytest
import torch
import transformers
from conftest import tiny_config
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moevlm.downcycling_moevlm import DowncycleArguments, count_use, made_smaller
from moevlm.experts_moevlm import MoeVlmExperts
from moevlm.keymaps_moevlm import DenseTwin, in_our_form, map_keys
from moevlm.layouts_moevlm import pack_experts, qwen3_moe_config, qwen3_moe_keys, unpack_experts
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.planning_moevlm import PlanArguments, plan
from moevlm.training_moevlm import ModelArguments, adapt
from moevlm.upcycling_moevlm import (
    FeedForward,
    Recipe,
    binary_shares,
    build,
    fresh_parts,
    kept_outputs,
    shapes_of,
    sliced,
    sparse_config,
    sparsify,
    varied,
)

DENSE = {"moe_layers": "none"}


def dense_model(**text):
    config = tiny_config(**{**DENSE, **text})
    fields = {name: getattr(config, name).to_dict() for name in config.sub_configs}
    fields["vision_config"]["mlp_layer_types"] = ["dense"] * 2
    fields["connector_config"]["num_experts"] = 0
    config = type(config)(**fields, image_token_id=5)
    return MoeVlmForConditionalGeneration(config).eval()


def state_of(model):
    state = model.state_dict()
    if model.config.text_config.tie_word_embeddings:
        state = {key: tensor for key, tensor in state.items() if key != "lm_head.weight"}
    return state


def upcycled(dense, **recipe):
    recipe = Recipe(**recipe)
    config, _ = sparse_config(dense.config, recipe)
    state = sparsify(state_of(dense), dense.config, config, recipe, torch.float32)
    return build(state, config, torch.float32)


@pytest.fixture
def inputs(batch):
    return {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}


def difference(one, other, inputs):
    with torch.no_grad():
        mine, theirs = one(**inputs).logits, other(**inputs).logits
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


PARTS = ["decoder", "connector", "tower"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        {"parts": PARTS},
        {"parts": PARTS, "num_experts": 1, "num_experts_per_tok": 1},
        {"moe_layers": ["all"], "num_experts": 5, "num_experts_per_tok": 3, "gate": "orthogonal"},
        {"moe_layers": ["0", "2"], "n_shared_experts": 1},
        {"parts": PARTS, "use_router_bias": True},
        {"mode": "fine_grained", "num_experts": 9, "num_experts_per_tok": 3},
        {"mode": "fine_grained", "num_experts": 6, "num_experts_per_tok": 6},
        {"mode": "fine_grained", "num_experts": 8, "num_experts_per_tok": 4, "n_shared_experts": 0, "parts": PARTS},
        {"mode": "fine_grained", "granularity": 3, "num_experts": 6, "num_experts_per_tok": 3, "parts": ["tower"]},
    ],
)
def test_identity_modes_change_nothing(recipe, tied, inputs):
    dense = dense_model(tie_word_embeddings=tied)
    assert difference(upcycled(dense, **recipe), dense, inputs) < 1e-5  # float32, sums in another order


def test_one_word_of_a_recipe_file_is_a_list_of_one():
    recipe = Recipe(parts="tower", moe_layers="first_half")
    assert (recipe.parts, recipe.layers) == (["tower"], "first_half")
    assert Recipe(moe_layers="0 2").layers == [0, 2]


def test_a_selection_bias_starts_at_zero_in_float32_whatever_the_dtype():
    dense, recipe = dense_model(), Recipe(use_router_bias=True)
    config, _ = sparse_config(dense.config, recipe)
    state = sparsify(state_of(dense), dense.config, config, recipe, torch.bfloat16)
    biases = [tensor for key, tensor in state.items() if key.endswith("e_score_correction_bias")]
    assert biases and all(bias.dtype == torch.float32 and not bias.any() for bias in biases)


@pytest.mark.parametrize("mode", ["noise", "drop"])
def test_other_modes_change_only_the_experts_and_differ_between_them(mode):
    dense = dense_model()
    model = upcycled(dense, mode=mode, num_experts=3)
    before, after = state_of(dense), state_of(model)
    kept = [key for key in before if key in after]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    experts = after["model.language_model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])


def test_drop_draws_the_same_units_of_all_matrices_anew_with_their_mean_and_deviation():
    layer = FeedForward((torch.randn(4000, 8) + 3, torch.randn(4000, 8) * 5), torch.randn(8, 4000) - 2, None)
    expert = varied(layer, Recipe(mode="drop", drop_ratio=0.25), torch.Generator().manual_seed(0))
    changed = (expert.into[0] != layer.into[0]).all(1)
    assert changed.sum() == 1000
    for new, old in zip((*expert.into, expert.out.t()), (*layer.into, layer.out.t())):
        assert torch.equal((new != old).any(1), changed)
        # 8,000 draws: mean within 5 standard errors, deviation within 5 %
        assert abs(new[changed].mean() - old[changed].mean()) < 5 * old[changed].std() / 8000**0.5
        assert abs(new[changed].std() / old[changed].std() - 1) < 0.05


def test_drop_of_one_unit_keeps_numbers_and_of_none_is_refused():
    layer = FeedForward((torch.randn(64, 8), torch.randn(64)), torch.randn(8, 64), torch.randn(8))
    expert = varied(layer, Recipe(mode="drop", drop_ratio=1 / 64), torch.Generator().manual_seed(0))
    assert (expert.into[0] != layer.into[0]).any(1).sum() == 1
    assert all(tensor.isfinite().all() for tensor in (*expert.into, expert.out))
    with pytest.raises(ValueError, match="drop_ratio=0.005 draws none of a layer's 64 units anew; take at least 0.016"):
        varied(layer, Recipe(mode="drop", drop_ratio=0.005), torch.Generator().manual_seed(0))


def test_slices_sum_to_the_layer():
    gate, up, down, x = torch.randn(12, 4), torch.randn(12, 4), torch.randn(4, 12), torch.randn(5, 4)

    def run(part):
        return F.linear(F.silu(F.linear(x, part.into[0])) * F.linear(x, part.into[1]), part.out)

    layer = FeedForward((gate, up), down, None)
    torch.testing.assert_close(sum(run(sliced(layer, i, 3)) for i in range(3)), run(layer))


def test_shares_of_a_bias_are_powers_of_two_that_sum_to_one():
    for count in range(1, 40):
        shares = binary_shares(count)
        assert len(shares) == count and sum(shares) == 1
        assert all(torch.tensor(share).log2() % 1 == 0 for share in shares)


def test_slices_of_the_tower_keep_its_bias_in_half_precision_to_the_bit():
    dense = dense_model()
    recipe = Recipe(parts=["tower"], mode="fine_grained", granularity=3, num_experts=6, num_experts_per_tok=3)
    config, _ = sparse_config(dense.config, recipe)
    key = "model.vision_tower.layers.1.mlp."
    source = state_of(dense)
    source[f"{key}fc2.bias"].normal_()
    made = sparsify(source, dense.config, config, recipe, torch.bfloat16)[f"{key}experts.down_proj_bias"]
    wanted = source[f"{key}fc2.bias"].bfloat16().double()
    assert all(torch.equal(copy.double().sum(0), wanted) for copy in made.split(3))


@pytest.mark.parametrize(("mode", "repeats"), [("copy", 1), ("fine_grained", 3)])
def test_slices_of_a_copy_share_a_row_and_the_others_do_not(mode, repeats):
    model = upcycled(dense_model(), mode=mode, num_experts=6, num_experts_per_tok=3)
    rows = model.state_dict()["model.language_model.layers.0.mlp.gate.weight"]
    for start in range(0, 6, repeats):
        assert all(torch.equal(rows[start], row) for row in rows[start : start + repeats])
        assert not any(torch.equal(rows[start], row) for row in rows[start + repeats :])


@pytest.mark.parametrize("experts", [8, 40])  # fewer and more rows than the 32 entries of each
def test_orthogonal_rows_of_a_gate_have_the_size_asked_for(experts):
    model = upcycled(dense_model(), gate="orthogonal", gate_std=0.05, num_experts=experts)
    rows = model.state_dict()["model.language_model.layers.0.mlp.gate.weight"]
    assert rows.square().mean().sqrt() == pytest.approx(0.05, rel=1e-5)
    products = rows @ rows.t() if experts < 32 else rows.t() @ rows
    torch.testing.assert_close(products, products.diagonal().mean() * torch.eye(len(products)), rtol=0, atol=1e-6)


def test_rows_of_a_normal_gate_have_the_size_asked_for():
    model = upcycled(dense_model(), gate_std=0.05, num_experts=40)
    rows = model.state_dict()["model.language_model.layers.0.mlp.gate.weight"]
    assert rows.square().mean().sqrt() == pytest.approx(0.05, rel=0.1)  # 1,280 draws: 2 % in the mean


def test_noise_is_a_share_of_each_matrix_own_deviation():
    layer = FeedForward((torch.randn(400, 50), torch.randn(400, 50) * 5), torch.randn(50, 400) / 7, None)
    expert = varied(layer, Recipe(mode="noise", noise=0.03), torch.Generator().manual_seed(0))
    for new, old in zip((*expert.into, expert.out), (*layer.into, layer.out)):
        assert (new - old).std().item() == pytest.approx(
            0.03 * old.std().item(), rel=0.03
        )  # 20,000 draws: 0.5 % in the mean
        assert abs((new - old).mean()) < 5 * 0.03 * old.std() / 20_000**0.5


def sparse_parent(**text):
    """A model whose decoder has experts, as one of a Mixtral or a Qwen3-MoE."""
    return dense_model(moe_layers="all", **text)


@pytest.mark.parametrize("numbers", [{}, {"num_experts": 0}, {"num_experts": 4, "num_experts_per_tok": 2}])
def test_experts_of_a_parent_are_adopted(numbers, inputs):
    parent = sparse_parent()
    recipe = Recipe(mode="noise", **numbers)
    config, notes = sparse_config(parent.config, recipe)
    assert config.text_config.num_experts == 4 and "adopted as they are" in notes[0]
    assert difference(upcycled(parent, mode="noise", **numbers), parent, inputs) == 0
    assert kept_outputs(parent.config, config, recipe) == {"text", "pictures", "tower"}


def test_experts_of_a_parent_leave_other_parts_their_own_number():
    config, _ = sparse_config(sparse_parent().config, Recipe(parts=["tower", "connector"], num_experts=6))
    assert (config.text_config.num_experts, config.vision_config.num_experts) == (4, 6)


@pytest.mark.parametrize("numbers", [{}, {"num_experts": 3}])
@pytest.mark.parametrize("part", ["tower", "connector"])
def test_a_part_with_experts_gets_no_others(part, numbers):
    parent = upcycled(dense_model(), parts=[part], num_experts=8, num_experts_per_tok=1)
    with pytest.raises(ValueError, match=f"the parent's {part} has experts already"):
        sparse_config(parent.config, Recipe(parts=["decoder", part], **numbers))
    assert sparse_config(parent.config, Recipe(**numbers))[0].text_config.num_experts == numbers.get("num_experts", 8)


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        ({"mode": "copy", "parts": PARTS}, {"text", "pictures", "tower"}),
        ({"mode": "noise"}, {"tower"}),
        ({"mode": "noise", "parts": ["connector"]}, {"text", "pictures", "tower"}),
        ({"mode": "drop", "parts": ["tower"]}, {"text"}),
        ({"mode": "drop", "parts": PARTS}, set()),
    ],
)
def test_outputs_before_every_varied_layer_are_the_parents(recipe, kept):
    config, recipe = dense_model().config, Recipe(**recipe)
    assert kept_outputs(config, sparse_config(config, recipe)[0], recipe) == kept


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"mode": "clone"}, r"mode='clone' has \['clone'\]; known are copy"),
        ({"parts": ["head"]}, "parts=.* known are decoder, connector, tower"),
        ({"gate_std": -0.1}, "gate_std=-0.1 must be above 0"),
        ({"gate_std": float("nan")}, "gate_std=nan must be above 0"),
        ({"moe_layers": ["none"]}, "moe_layers='none' takes none of the decoder's 3 layers"),
        ({"moe_layers": ["none"], "parts": ["tower"]}, "takes none of the tower's 2 layers"),
        ({"mode": "fine_grained", "n_shared_experts": 4}, "n_shared_experts=4 .* at most 3 in mode fine_grained"),
        ({"mode": "copy", "n_shared_experts": 2}, "n_shared_experts=2 .* at most 1 in mode copy"),
        ({"mode": "drop", "n_shared_experts": 1}, "n_shared_experts=1 .* at most 0 in mode drop"),
        ({"mode": "fine_grained", "granularity": 7}, "granularity=7 does not divide"),
        ({"mode": "fine_grained", "num_experts": 8}, "num_experts=8 is no multiple of the 3 routed slices"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 exceeds num_experts=2"),
        ({"moe_layers": ["7"]}, "moe_layers names"),
        ({"moe_layers": ["odd"]}, "moe_layers='odd' is no rule"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_name(recipe, message):
    with pytest.raises(ValueError, match=message):
        sparse_config(dense_model().config, Recipe(**recipe))


def test_a_shape_that_does_not_fit_names_both_sides():
    dense = dense_model()
    shapes, weights = shapes_of(dense.config), dict(state_of(dense))
    weights["model.language_model.norm.weight"] = torch.ones(7)
    twin = DenseTwin(shapes, [(weights, map_keys(weights, "own", shapes))], {})
    with pytest.raises(ValueError, match=r"norm.weight of the parent is \(7,\), but .* takes \(32,\)"):
        twin["model.language_model.norm.weight"]


def test_missing_and_unknown_keys_are_named():
    shapes = shapes_of(dense_model().config)
    with pytest.raises(ValueError, match="no parent fills model.vision_tower"):
        DenseTwin(shapes, [], {})
    with pytest.raises(ValueError, match="layers.0.mlp.bonus.weight"):
        map_keys(["model.layers.0.mlp.bonus.weight"], "text", shapes)
    with pytest.raises(ValueError, match="text_model.bonus"):  # the text side is a vision parent's to drop
        map_keys(["text_model.bonus"], "whole", shapes)


def test_new_tokens_are_the_mean_and_never_win():
    old = torch.randn(10, 4)
    new = in_our_form("lm_head.weight", old, torch.Size([12, 4]))
    torch.testing.assert_close(new[10:], old.mean(0).expand(2, 4))
    logits = torch.randn(100, 4) @ new.t()
    assert (logits.argmax(-1) < 10).all()


def test_fresh_parts_are_the_same_for_a_seed():
    config = dense_model().config
    one, other = fresh_parts(config, True, 3), fresh_parts(config, True, 3)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {key.split(".")[1] for key in one} == {"connector", "vision_tower"}


def smaller(model, batches, **arguments):
    use, _ = count_use(model, batches)
    arguments = DowncycleArguments(model_name_or_path="model", **arguments)
    state, config, _ = made_smaller(model.state_dict(), model.config, use, arguments)
    return build(state, config, torch.float32)


@pytest.mark.parametrize(
    "recipe",
    [
        {"parts": PARTS},
        {"parts": ["connector"]},
        {"n_shared_experts": 1},
        {"mode": "fine_grained", "num_experts": 9, "num_experts_per_tok": 3},
        {
            "mode": "fine_grained",
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "n_shared_experts": 0,
            "parts": PARTS,
        },
        {"mode": "fine_grained", "granularity": 3, "num_experts": 6, "num_experts_per_tok": 6, "parts": ["tower"]},
    ],
)
def test_collapsing_an_untrained_model_gives_the_parent_back(recipe, batch, inputs):
    dense = dense_model()
    again = smaller(upcycled(dense, **recipe), [batch])
    assert set(state_of(again)) == set(state_of(dense))
    assert difference(again, dense, inputs) < 1e-5


@pytest.mark.parametrize("way", ["drop", "merge"])
def test_fewer_copies_are_still_the_parent(way, batch, inputs):
    dense = dense_model()
    model = upcycled(dense, num_experts=4)
    fewer = smaller(model, [batch], to_experts=2, way=way)
    assert fewer.config.text_config.num_experts == 2
    assert difference(fewer, dense, inputs) < 1e-5


SLICES = {"mode": "fine_grained", "num_experts": 9, "num_experts_per_tok": 3}  # three copies of three routed slices


@pytest.mark.parametrize("way", ["drop", "merge"])
@pytest.mark.parametrize("drift", [0.0, 0.02])  # in training the router rows of a copy's slices part
def test_fewer_slices_are_whole_copies_of_like_slices(way, drift, batch, inputs):
    dense = dense_model()
    model = upcycled(dense, **SLICES)
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            parameter.data += drift * torch.randn_like(parameter)
    fewer = smaller(model, [batch], to_experts=3, way=way)  # one copy, of which each token visits all
    assert fewer.config.text_config.num_experts == 3
    block = "model.language_model.layers.0.mlp.experts."
    for name in ("gate_up_proj", "down_proj"):
        torch.testing.assert_close(fewer.state_dict()[block + name], model.state_dict()[block + name][:3])
    assert difference(fewer, dense, inputs) < (1e-5 if drift == 0 else 0.2)


def test_the_copy_of_most_visits_is_kept_whole(batch):
    model = upcycled(dense_model(), **SLICES, moe_layers=["1"])
    use, _ = count_use(model, [batch])
    block = "model.language_model.layers.1.mlp."
    use[block].visits = torch.tensor([0.0, 9, 9, 7, 7, 7, 20, 0, 0]).double()  # slice 6 alone is the most visited one
    arguments = DowncycleArguments(model_name_or_path="model", to_experts=6)
    state, _, _ = made_smaller(model.state_dict(), model.config, use, arguments)
    assert torch.equal(state[f"{block}gate.weight"], model.state_dict()[f"{block}gate.weight"][3:])
    assert torch.equal(state[f"{block}experts.down_proj"], model.state_dict()[f"{block}experts.down_proj"][3:])


@pytest.mark.parametrize("experts", [2, 4])
def test_a_copy_is_not_cut(experts, batch):
    with pytest.raises(ValueError, match=rf"to_experts={experts} is no multiple of the 3 routed slices .* such as 3"):
        smaller(upcycled(dense_model(), **SLICES), [batch], to_experts=experts)


def test_a_sparse_tower_needs_pictures_to_be_weighed(batch):
    model = upcycled(dense_model(), parts=PARTS)
    words = {"input_ids": torch.tensor([[11, 12, 13]]), "labels": torch.tensor([[11, 12, 13]])}
    with pytest.raises(ValueError, match="data=.*: no picture among the first 7 records.*raise max_samples"):
        smaller(model, [words], max_samples=7)
    assert smaller(model, [words], to_experts=2).config.text_config.num_experts == 2


def test_experts_with_gates_stay_in_a_tower_whose_layers_have_none():
    model = MoeVlmForConditionalGeneration(tiny_config(intermediate_size=16)).eval()
    words = {"input_ids": torch.tensor([[11, 12, 13]]), "labels": torch.tensor([[11, 12, 13]])}
    use, _ = count_use(model, [words])  # what stays needs no pictures
    arguments = DowncycleArguments(model_name_or_path="model", to_experts=0)
    state, config, remarks = made_smaller(model.state_dict(), model.config, use, arguments)
    assert "the tower keeps its experts" in remarks
    assert config.vision_config.mlp_layer_types == model.config.vision_config.mlp_layer_types
    assert set(config.text_config.mlp_layer_types) == {"dense"}
    build(state, config, torch.float32)


def test_a_model_made_dense_takes_any_number_of_experts_again(batch):
    options = {"expert_modalities": ["shared", "image", "shared", "text"], "n_group": 2, "topk_group": 2}
    options |= {"intermediate_size": 16, "router_global_entropy_threshold": 0.9}
    model = MoeVlmForConditionalGeneration(tiny_config(**options)).eval()
    made = smaller(model, [batch], to_experts=0)
    assert upcycled(made, num_experts=2).config.text_config.num_experts == 2


@pytest.mark.parametrize(
    ("fields", "message"), [({"noise": -1.0}, "noise=-1.0 must be"), ({"noise": math.nan}, "noise=nan must be")]
)
def test_noise_outside_its_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(mode="noise", **fields)


def test_no_expert_a_token_is_refused_and_not_taken_for_the_default():
    with pytest.raises(ValueError, match="num_experts_per_tok=0"):
        upcycled(dense_model(), num_experts_per_tok=0)


@pytest.mark.parametrize("name", ["max_samples", "batch_size"])
def test_a_use_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        DowncycleArguments(model_name_or_path="model", **{name: 0})


def test_a_factor_on_the_weights_alone_makes_no_slices(batch):
    model = MoeVlmForConditionalGeneration(tiny_config(routed_scaling_factor=2.0)).eval()
    assert smaller(model, [batch], to_experts=3).config.text_config.num_experts == 3


def test_experts_of_the_connector_that_have_learned_stay_and_this_is_said(batch):
    model = upcycled(dense_model(), parts=PARTS)
    down = "model.connector.mlp.experts.down_proj"
    model.state_dict()[down].normal_()
    use, _ = count_use(model, [batch])
    for experts, left in ((0, ["connector"]), (2, ["tower", "connector"])):
        arguments = DowncycleArguments(model_name_or_path="model", to_experts=experts)
        state, config, remarks = made_smaller(model.state_dict(), model.config, use, arguments)
        assert remarks == [f"the {part} keeps its experts" for part in left]
        assert torch.equal(state[down], model.state_dict()[down])
        build(state, config, torch.float32)


@pytest.mark.parametrize(("threshold", "experts", "left"), [(1.3, 2, math.log(2)), (0.5, 2, 0.5), (1.3, 0, None)])
def test_an_entropy_that_fewer_experts_cannot_reach_is_lowered_and_this_is_said(threshold, experts, left, batch):
    model = upcycled(dense_model(), num_experts=4)
    model.config.text_config.router_global_entropy_threshold = threshold
    use, _ = count_use(model, [batch])
    arguments = DowncycleArguments(model_name_or_path="model", to_experts=experts)
    _, config, remarks = made_smaller(model.state_dict(), model.config, use, arguments)
    assert config.text_config.router_global_entropy_threshold == left
    lowered = "the decoder's router_global_entropy_threshold is lowered from 1.3 to ln(2) = 0.6931"
    assert remarks == ([lowered] if experts and left != threshold else [])


@pytest.mark.parametrize(
    ("parts", "experts", "message"),
    [
        ([], 0, "no experts to take away: it is dense already"),
        (["connector"], 0, "no experts to take away: those of tower or connector that are left"),
        (["connector", "tower"], 2, "to_experts=2 is for the decoder, which is dense"),
    ],
)
def test_nothing_to_take_away_is_refused_with_its_reason(parts, experts, message, batch):
    model = upcycled(dense_model(), parts=parts)
    if parts:
        model.state_dict()["model.connector.mlp.experts.down_proj"].normal_()
    with pytest.raises(ValueError, match=message):
        smaller(model, [batch], to_experts=experts)


def test_the_most_visited_experts_are_kept(batch):
    model = upcycled(dense_model(), mode="noise", noise=1.0, num_experts=4, moe_layers=["1"])
    use, _ = count_use(model, [batch])
    block = "model.language_model.layers.1.mlp."
    wanted = sorted(use[block].visits.topk(3).indices.tolist())
    fewer = smaller(model, [batch], to_experts=3)
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert torch.equal(fewer.state_dict()[block + name], model.state_dict()[block + name][wanted])


def test_use_counts_visits_and_weights_without_padding(batch):
    model = upcycled(dense_model(), num_experts=4, moe_layers=["1"])
    batch = {**batch, "attention_mask": batch["attention_mask"].clone()}
    batch["attention_mask"][0, 20:] = 0
    use, loss = count_use(model, [batch])
    (layer,) = use.values()
    assert layer.visits.sum() == 2 * (2 * 24 - 4)
    torch.testing.assert_close(layer.weight.sum(), torch.tensor(44.0).double())
    with torch.no_grad():
        expected = model(**{**batch, "output_router_logits": False})
    logits, targets = expected.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


@pytest.mark.parametrize("learns", [False, True])
def test_unpacked_and_packed_experts_learn_as_before(tiny, learns):
    for name, parameter in tiny.named_parameters():
        parameter.requires_grad_(learns == ("language_model" in name))
    wanted = {name: parameter.requires_grad for name, parameter in tiny.named_parameters()}
    with torch.no_grad():
        unpacked = unpack_experts(tiny)
    for name, parameter in unpacked.named_parameters():
        assert parameter.requires_grad == (learns == ("language_model" in name)), name
    with torch.no_grad():
        packed = pack_experts(unpacked)
    assert {name: parameter.requires_grad for name, parameter in packed.named_parameters()} == wanted


@pytest.mark.parametrize("tower", [False, True])
def test_unpacked_experts_answer_alike_and_pack_to_the_same_bits(tiny, inputs, tower):
    model = upcycled(dense_model(), parts=PARTS, mode="noise") if tower else tiny
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    unpacked = unpack_experts(model)
    assert not [module for module in unpacked.modules() if isinstance(module, MoeVlmExperts)]
    assert sum(p.numel() for p in unpacked.parameters()) == sum(p.numel() for p in twin.parameters())
    assert difference(unpacked, twin, inputs) < 1e-5
    after = pack_experts(unpacked).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_changed_linear_layer_is_not_packed(tiny):
    class Quantized(torch.nn.Linear):
        pass

    unpack_experts(tiny)
    expert = next(module for name, module in tiny.named_modules() if name.endswith("experts.0"))
    expert.up_proj = Quantized(2, 2)
    with pytest.raises(TypeError, match="has become a Quantized"):
        pack_experts(tiny)


@pytest.mark.parametrize("moe_layers", ["all", "alternate"])
def test_the_exported_decoder_runs_as_qwen3_moe(moe_layers, inputs):
    dense = dense_model(use_qk_norm=True, head_dim=8)
    model = upcycled(dense, mode="noise", noise=0.5, moe_layers=[moe_layers])
    exported = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**qwen3_moe_config(model.config))).eval()
    state = qwen3_moe_keys(model.state_dict())
    if any(key.endswith("experts.gate_up_proj") for key in exported.state_dict()):  # transformers 5 stacks in memory
        state = stacked(state)
    exported.load_state_dict(state)
    ids = inputs["input_ids"].clamp(min=6)
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_a_checkpoint_that_transformers_loads(tied, inputs, tmp_path):
    model = upcycled(dense_model(use_qk_norm=True, head_dim=8, tie_word_embeddings=tied), mode="noise", noise=0.5)
    transformers.Qwen3MoeConfig(**qwen3_moe_config(model.config)).save_pretrained(tmp_path)
    save_file(qwen3_moe_keys(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    exported, info = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = inputs["input_ids"].clamp(min=6)
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=2e-5)


def stacked(state):
    """What transformers 5 makes of per-expert keys while loading."""
    blocks = sorted({key.partition("experts.")[0] for key in state if ".experts." in key})
    out = {key: tensor for key, tensor in state.items() if ".experts." not in key}
    for block in blocks:
        count = len([key for key in state if key.startswith(block) and key.endswith("down_proj.weight")])
        parts = {
            name: torch.stack([state[f"{block}experts.{e}.{name}_proj.weight"] for e in range(count)])
            for name in ("gate", "up", "down")
        }
        out[f"{block}experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        out[f"{block}experts.down_proj"] = parts["down"]
    return out


def test_a_decoder_that_qwen3_moe_cannot_run_is_refused(tiny):
    with pytest.raises(ValueError, match="use_qk_norm=False"):
        qwen3_moe_config(tiny.config)


def test_planned_states_are_what_adam_keeps(tiny, batch):
    arguments = PlanArguments(devices=1, batch_size=2, sequence_length=24, freeze=["vision"])
    found = plan(tiny.config, arguments)
    for name, parameter in tiny.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    optimizer = torch.optim.AdamW([p for p in tiny.parameters() if p.requires_grad])
    tiny.train()(**batch).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim > 0]
    gradients = [p.grad for p in tiny.parameters() if p.grad is not None]
    kept = sum(t.numel() * t.element_size() for t in [*tiny.parameters(), *gradients, *moments])
    assert found.memory[0].states == kept


def test_spreading_divides_what_it_says(config):
    rows = {row.way: row for row in plan(config, PlanArguments(devices=4)).memory}
    assert rows["FSDP2"].states == -(-rows["DDP"].states // 4)
    model = MoeVlmForConditionalGeneration(config)
    experts = 16 * sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert rows["DDP"].states - rows["expert parallel"].states == experts * 3 // 4
    for devices, held in ((3, 2), (64, 1)):  # of a layer's 4 experts, by the fullest device
        more = {row.way: row for row in plan(config, PlanArguments(devices=devices)).memory}
        assert more["DDP"].states - more["expert parallel"].states == experts * (4 - held) // 4


@pytest.mark.parametrize("length", [4, 5000])
def test_a_plan_for_sequences_that_hold_no_picture_or_pass_the_positions_is_refused(config, length):
    with pytest.raises(ValueError, match=f"sequence_length={length} must be above the .* max_position_embeddings="):
        plan(config, PlanArguments(sequence_length=length))


def test_checkpointing_keeps_less_and_computes_more(config):
    kept = plan(config, PlanArguments(gradient_checkpointing=True, batch_size=64))
    stored = plan(config, PlanArguments(gradient_checkpointing=False, batch_size=64))
    assert kept.memory[0].activations < stored.memory[0].activations
    assert kept.flops_per_token * 3 == stored.flops_per_token * 4


def counted(config, **arguments):
    """A plan's training FLOPs of one sequence with its picture."""
    arguments = PlanArguments(devices=1, batch_size=1, sequence_length=100, **arguments)
    return plan(config, arguments).flops_per_token * 100


@pytest.mark.parametrize(
    ("freeze", "tower", "connector", "decoder"),
    [
        ([], 3, 3, 3),
        (["vision"], 1, 3, 3),
        (["vision", "language"], 1, 3, 2),  # stage 1: the gradient passes through the decoder
        (["vision", "connector"], 1, 1, 3),
        (["language"], 3, 3, 2),
        (["connector", "language"], 3, 2, 2),
    ],
)
def test_a_frozen_part_costs_its_forward_and_what_passes_through_it(config, freeze, tower, connector, decoder):
    model = MoeVlmForConditionalGeneration(config)
    summary, side, factor = model.moe_summary(), config.vision_config.patches_per_side, 2
    names = [(name, p) for name, p in model.named_parameters() if "connector" in name and p.ndim > 1]
    active = sum(p.numel() // (2 if ".experts." in name else 1) for name, p in names)  # two of four experts
    projected = 2 * active * (side // factor) ** 2
    seen, read = summary.picture_flops - projected, summary.flops_per_token(50) * 100
    wanted = tower * seen + connector * projected + decoder * read
    assert counted(config, freeze=freeze, gradient_checkpointing=False) == pytest.approx(wanted, abs=100)
    again = wanted + (tower > 1) * seen + (connector > 1) * projected + (decoder > 1) * read
    assert counted(config, freeze=freeze) == pytest.approx(again, abs=100)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_keeps_no_activations_and_one_that_learns_does(config, checkpointing):
    def kept(**arguments):
        return plan(config, PlanArguments(gradient_checkpointing=checkpointing, **arguments)).memory[0].activations

    assert kept(freeze=["vision"]) == kept(freeze=["vision", "connector"]) < kept() == kept(freeze=["language"])


def lora_step(rank, experts=True):
    """FLOPs of a step under LoRA, bytes kept for its backward in the shape of stacked experts, and its model's config.

    Tower and connector are dense, so that the decoder alone has a backward.
    """
    model = dense_model(moe_layers="alternate")
    config = model.config
    model.set_experts_implementation("eager")  # plain matrix products, which the counter sees
    shapes = {p.shape for name, p in model.named_parameters() if ".experts." in name}
    adapted = adapt(model, ModelArguments(lora=True, lora_rank=rank, lora_experts=experts)).train()
    parameters, kept = {p.data_ptr() for p in adapted.parameters()}, {}

    def keep(tensor):
        # One expert's matrix is a view of its stack.
        whole = tensor if tensor._base is None else tensor._base
        if whole.shape in shapes and whole.data_ptr() not in parameters:
            kept[whole.data_ptr()] = whole
        return tensor

    ids = torch.randint(6, 64, (1, 100))
    ids[0, 1:5] = config.image_token_id
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids).loss.backward()
    return counter.get_total_flops(), sum(tensor.nbytes for tensor in kept.values()), config


def test_adapted_experts_cost_the_gradients_of_whole_stacks_as_in_peft():
    (once, kept, config), (twice, _, _) = lora_step(1), lora_step(2)
    # LoRA's own products grow with the rank; what is left at rank 0 is the model's.
    without = 2 * lora_step(1, experts=False)[0] - lora_step(2, experts=False)[0]
    summary = MoeVlmForConditionalGeneration(config).moe_summary()
    frozen = summary.picture_flops + 2 * summary.flops_per_token(50) * 100
    planned = counted(config, lora_rank=1, gradient_checkpointing=False) - frozen
    assert planned == pytest.approx(2 * once - twice - without, abs=100) and planned > 0

    def activations(**arguments):
        return plan(config, PlanArguments(freeze=["vision"], **arguments)).memory[0].activations

    layers = config.text_config.mlp_layer_types.count("sparse")
    for checkpointing, sums in ((False, layers), (True, 1)):
        more = activations(lora_rank=1, gradient_checkpointing=checkpointing)
        more -= activations(gradient_checkpointing=checkpointing)
        assert more == kept // layers * (sums + 1)  # and the gradient of one layer's


def test_adapted_experts_of_every_part_get_gradients(config):
    model = MoeVlmForConditionalGeneration(config)
    summary, side = model.moe_summary(), config.vision_config.patches_per_side
    rows = {"vision_tower": side**2, "connector": (side // 2) ** 2, "language_model": 100}
    gradients = sum(
        p.numel() // 2 * 2 * count  # two of four experts
        for part, count in rows.items()
        for name, p in model.named_parameters()
        if part in name and name.endswith(("experts.gate_up_proj", "experts.up_proj", "experts.down_proj"))
    )
    wanted = 2 * (summary.picture_flops + summary.flops_per_token(50) * 100) + gradients
    assert counted(config, lora_rank=3, gradient_checkpointing=False) == pytest.approx(wanted, abs=100)


def test_planned_adapters_are_those_that_peft_makes(config):
    model = MoeVlmForConditionalGeneration(config)
    adapted = adapt(model, ModelArguments(lora=True, lora_rank=3))
    made = sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad)
    found = plan(config, PlanArguments(devices=1, lora_rank=3))
    line = found.summary.parts[-1]
    assert line.name == "adapters" and line.learning == made
    assert found.summary.parameters == MoeVlmForConditionalGeneration(config).num_parameters() + made
    assert found.memory[0].states == 4 * (found.summary.parameters - made) + 16 * made
    assert [part.learning for part in found.summary.parts[:-1]] == [0, 0, 0]


@pytest.mark.parametrize(
    "field",
    [{"utilisation": 0}, {"freeze": ["head"]}, {"freeze": ["vision", "connector", "language"]}, {"devices": 0}]
    + [{"lora_rank": -1}],
)
def test_a_plan_that_cannot_be_is_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        PlanArguments(**field)
