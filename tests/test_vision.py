"""The vision tower and the connector.

Shapes: I images, P patches, D hidden, r pixel shuffle factor.
"""

import pytest
import torch
from dumb_experts import output_and_gradients
from torch import nn

from moevlm.configuration_moevlm import MoeVlmConnectorConfig, MoeVlmVisionConfig
from moevlm.modeling_moevlm import MoeVlmConnector
from moevlm.vision_moevlm import MoeVlmBatchNorm, MoeVlmVisionExperts, MoeVlmVisionModel

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# Another kernel or order of sums: a few float32 roundings.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def vision_config(**fields):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    stem = {"image_size": 32, "patch_size": 8, "stem_channels": (4, 8, 8), "initializer_range": 0.2}
    return MoeVlmVisionConfig(**{**sizes, **stem, **SPARSE, **fields})


def vision_tower(**fields):
    return MoeVlmVisionModel(vision_config(**fields)).eval()


def connector(vision_hidden_size=16, **fields):
    config = MoeVlmConnectorConfig(**{"hidden_size": 32, "pixel_shuffle_factor": 2, **fields})
    return MoeVlmConnector(config, vision_hidden_size).eval()


@pytest.mark.parametrize("moe_layers", ["none", "alternate", "all"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("use_class_token", [False, True])
def test_every_kind_of_tower_gives_one_state_a_patch(stem, moe_layers, use_class_token):
    tower = vision_tower(stem=stem, moe_layers=moe_layers, use_class_token=use_class_token)
    states = tower(torch.randn(3, 3, 32, 32)).last_hidden_state
    assert states.shape == (3, 16, 16)
    assert states.isfinite().all()


def test_without_layers_the_stem_stands_alone():
    tower = vision_tower(num_hidden_layers=0, use_post_layernorm=False)
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(tower(pictures).last_hidden_state, tower.embeddings(pictures))


def test_a_patch_depends_on_its_own_pixels_only_before_attention():
    embeddings = vision_tower(stem="patch").embeddings
    picture = torch.randn(1, 3, 32, 32)
    changed = picture.clone()
    changed[:, :, 8:16, 24:32] += 1.0  # row 1, column 3 of the 4 x 4 patches
    moved = (embeddings(picture) != embeddings(changed)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [1 * 4 + 3]


def test_pictures_do_not_see_each_other():
    tower = vision_tower(moe_layers="all")
    pictures = torch.randn(3, 3, 32, 32)
    alone = torch.cat([tower(picture.unsqueeze(0)).last_hidden_state for picture in pictures])
    torch.testing.assert_close(tower(pictures).last_hidden_state, alone, **FLOAT32)


def test_attention_is_bidirectional():
    tower = vision_tower(attn_implementation="eager")
    weights = tower(torch.randn(1, 3, 32, 32), output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (1, 2, 16, 16)
    assert (weights[0] > 0).all()
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, 2, 16))


def test_eager_equals_sdpa():
    eager, sdpa = vision_tower(attn_implementation="eager"), vision_tower(attn_implementation="sdpa")
    sdpa.load_state_dict(eager.state_dict())
    pictures = torch.randn(2, 3, 32, 32)
    expected = eager(pictures).last_hidden_state
    torch.testing.assert_close(sdpa(pictures).last_hidden_state, expected, **FLOAT32)


def test_positions_of_the_own_size_are_the_weights_themselves():
    embeddings = vision_tower(use_class_token=True).embeddings
    assert torch.equal(embeddings.patch_positions(4, 4)[0], embeddings.position_embedding.weight[1:])


def test_positions_interpolate_along_the_right_axes():
    embeddings = vision_tower().embeddings
    with torch.no_grad():
        weight = embeddings.position_embedding.weight
        weight.copy_(torch.arange(4.0).repeat_interleave(4).unsqueeze(-1).expand_as(weight))  # the row's number
    grid = embeddings.patch_positions(8, 6)[0].unflatten(0, (8, 6))
    torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))  # equal along columns
    assert (grid[1:] > grid[:-1]).all()  # rising along rows
    # The bicubic curve of a ramp is the ramp, away from the border: row 3 lies at (3 + 0.5) / 2 - 0.5.
    torch.testing.assert_close(grid[3, 0], torch.full((16,), 1.25), rtol=0, atol=0.05)


@pytest.mark.parametrize("use_class_token", [False, True])
def test_pictures_of_another_size_and_shape_are_encoded(use_class_token):
    tower = vision_tower(use_class_token=use_class_token)
    assert tower(torch.randn(1, 3, 48, 64)).last_hidden_state.shape == (1, 6 * 8, 16)


def test_a_picture_below_one_patch_is_refused():
    with pytest.raises(ValueError, match="4x32 pixels are below patch_size=8"):
        vision_tower()(torch.randn(1, 3, 4, 32))


def test_the_class_token_is_seen_by_patches_and_not_returned():
    tower = vision_tower(use_class_token=True)
    pictures = torch.randn(1, 3, 32, 32)
    assert tower.embeddings(pictures).shape == (1, 17, 16)
    before = tower(pictures).last_hidden_state
    with torch.no_grad():
        tower.embeddings.class_embedding += 1.0
    assert not torch.equal(tower(pictures).last_hidden_state, before)


@pytest.mark.parametrize("moe_layers, sparse", [("none", []), ("last_half", [1]), ("all", [0, 1])])
def test_sparse_layers_stand_where_the_config_says_and_are_recorded(moe_layers, sparse):
    tower = vision_tower(moe_layers=moe_layers)
    assert [i for i, layer in enumerate(tower.layers) if hasattr(layer.mlp, "experts")] == sparse
    output = tower(torch.randn(3, 3, 32, 32), output_router_logits=True, output_router_indices=True)
    assert [logits.shape for logits in output.router_logits or ()] == [(3 * 16, 4)] * len(sparse)
    assert [indices.shape for indices in output.router_indices or ()] == [(3 * 16, 2)] * len(sparse)


def test_hidden_states_are_recorded_before_each_layer_and_at_the_end():
    tower = vision_tower()
    output = tower(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [(2, 16, 16)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_parameter_of_a_sparse_tower_gets_a_gradient(stem):
    tower = vision_tower(stem=stem, moe_layers="all", use_class_token=True, use_pre_layernorm=True).train()
    tower(torch.randn(2, 3, 32, 32)).last_hidden_state.square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def dumb_two_layers(experts, tokens, chosen, weights):
    """Each visit alone; the id E is skipped."""
    outputs = [torch.zeros(0, tokens.shape[1])]
    for token, ids, shares in zip(tokens, chosen.tolist(), weights):
        output = torch.zeros_like(token)
        for e, share in zip(ids, shares):
            if e < experts.num_experts:
                hidden = experts.act_fn(experts.up_proj[e] @ token + experts.up_proj_bias[e])
                output = output + share * (experts.down_proj[e] @ hidden + experts.down_proj_bias[e])
        outputs.append(output.unsqueeze(0))
    return torch.cat(outputs)


@pytest.mark.parametrize("form", ["chosen_experts", "every_expert"])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_two_layer_experts_equal_the_dumb_loop_in_outputs_and_every_gradient(form, count):
    experts = MoeVlmVisionExperts(vision_config(expert_form="mlp", moe_layers="all"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    # Of four experts the last gets no visit; the id 4 is skipped.
    chosen, weights = torch.tensor([[0, 1], [4, 2], [2, 0]]).repeat(3, 1)[:count], torch.rand(count, 2)
    tokens = torch.randn(count, 16)
    run = getattr(experts, form)
    expected = output_and_gradients(experts, lambda x: dumb_two_layers(experts, x, chosen, weights), tokens)
    found = output_and_gradients(experts, lambda x: run(x, chosen, weights), tokens)
    for name, value in expected.items():
        like = tokens if name == "tokens" else dict(experts.named_parameters()).get(name, value)
        values = (torch.zeros_like(like) if each is None else each for each in (found[name], value))
        torch.testing.assert_close(*values, **FLOAT32)


@pytest.mark.parametrize("expert_form", ["swiglu", "mlp"])
def test_a_sparse_tower_is_one_graph_and_exports(expert_form):
    torch.compiler.reset()
    tower, pictures = vision_tower(moe_layers="all", expert_form=expert_form), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tower(pictures).last_hidden_state
        compiled = torch.compile(tower, fullgraph=True, backend="eager")(pictures).last_hidden_state
        exported = torch.export.export(tower, (pictures,)).module()(pictures).last_hidden_state
    torch.testing.assert_close(compiled, expected, **FLOAT32)
    torch.testing.assert_close(exported, expected, **FLOAT32)


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_of_a_batch_norm_move_with_its_weight_only(frozen):
    ours, theirs = MoeVlmBatchNorm(3).requires_grad_(not frozen), nn.BatchNorm2d(3).train(not frozen)
    states = torch.randn(4, 3, 5, 5) * 2 + 1
    torch.testing.assert_close(ours.train()(states), theirs(states))
    assert all(map(torch.equal, ours.buffers(), theirs.buffers()))
    assert torch.equal(ours.running_mean, torch.zeros(3)) == frozen
    torch.testing.assert_close(ours.eval()(states), theirs.eval()(states))


def test_a_batch_norm_takes_parameters_of_another_dtype_than_its_statistics():
    norm = MoeVlmBatchNorm(3).eval()
    norm.weight.data, norm.bias.data = norm.weight.bfloat16(), norm.bias.bfloat16()  # as FSDP2's mixed precision
    assert norm(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_a_fresh_convolutional_stem_is_initialised_for_relu():
    stem = vision_tower(patch_size=16, stem_channels=(32, 64, 96, 128), image_size=64).embeddings.patch_embedding
    for conv in stem.convs:
        # He et al. 2015, eq. 14: sqrt(2 / (9 * channels)); 10 %, because the first has 864 weights only.
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.1)


# The connector


def dumb_pixel_shuffle(features, side, r):
    """Square by square, row by row, patch by patch."""
    tokens = []
    for row in range(0, side, r):
        for column in range(0, side, r):
            square = [features[:, (row + y) * side + column + x] for y in range(r) for x in range(r)]
            tokens.append(torch.cat(square, dim=-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("side, r", [(4, 1), (4, 2), (6, 3), (4, 4)])
def test_pixel_shuffle_equals_the_dumb_loop(side, r):
    features = torch.randn(2, side * side, 16)
    shuffled = connector(pixel_shuffle_factor=r).pixel_shuffle(features)
    assert torch.equal(shuffled, dumb_pixel_shuffle(features, side, r))


@pytest.mark.parametrize("patches, r", [(15, 1), (9, 2)])
def test_patches_that_form_no_fitting_square_are_refused(patches, r):
    with pytest.raises(ValueError, match=f"{patches} patches a picture .* pixel_shuffle_factor={r}"):
        connector(pixel_shuffle_factor=r).pixel_shuffle(torch.randn(1, patches, 16))


def test_a_linear_projector_is_one_product():
    bridge, features = connector(projector="linear", projector_bias=False), torch.randn(2, 16, 16)
    expected = dumb_pixel_shuffle(features, 4, 2) @ bridge.projector.weight.T
    torch.testing.assert_close(bridge(features).last_hidden_state, expected, **FLOAT32)


def test_an_mlp_projector_is_two_layers_with_an_activation_between():
    bridge, features = connector(projector="mlp"), torch.randn(2, 16, 16)
    first, _, second = bridge.projector
    hidden = torch.nn.functional.gelu(first(dumb_pixel_shuffle(features, 4, 2)))
    torch.testing.assert_close(bridge(features).last_hidden_state, second(hidden), **FLOAT32)


def test_a_sparse_connector_adds_its_block_to_the_projection():
    bridge, features = connector(initializer_range=0.2, **SPARSE), torch.randn(2, 16, 16)
    tokens = bridge.projector(bridge.pixel_shuffle(features))
    output = bridge(features, output_router_logits=True, output_router_indices=True)
    torch.testing.assert_close(output.last_hidden_state, tokens + bridge.mlp(bridge.norm(tokens)), **FLOAT32)
    assert not torch.allclose(output.last_hidden_state, tokens, atol=1e-3)
    assert [logits.shape for logits in output.router_logits] == [(2 * 4, 4)]
    assert [indices.shape for indices in output.router_indices] == [(2 * 4, 2)]
