"""What watches a training: windows over ranks, gradient norms, the layer where numbers break, loss-free balancing."""

import copy
import logging

import pytest
import torch
from conftest import tiny_config
from torch import nn

from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.summary_moevlm import sparse_layers
from moevlm.telemetry_moevlm import (
    DroppedVisits,
    LoadBalancer,
    RouterWindow,
    first_non_finite,
    gradient_norms,
    routers_of,
    warn_of_unreached_routers,
)
from moevlm.training_moevlm import ModelArguments, adapt, freeze

# The window


class Ranks:
    """Stands for an accelerator of two ranks that saw the same, but for larger logits on the other."""

    def reduce(self, sums, reduction):
        return 2 * sums

    def gather(self, peaks):
        return torch.cat([peaks, peaks + 1])


def numbers(counts, entropies, peaks, dropped, widths, aux_loss=1.0):
    """Outputs of a model in as far as the window reads them."""
    return {
        "aux_loss": torch.tensor(aux_loss),
        "z_loss": torch.tensor(2.0),
        "chosen_counts": tuple(torch.tensor(count) for count in counts),
        "router_entropy": torch.tensor(entropies),
        "max_router_logit": torch.tensor(peaks),
        "dropped_tokens": torch.tensor(dropped),
        "experts_per_token": torch.tensor(widths),
    }


def test_the_window_takes_the_tokens_of_all_batches_together():
    window = RouterWindow({"vision.0": 2, "decoder.1": 3})
    # 3 patches and 4 tokens, then a batch without pictures of 6 tokens, of which three visits are dropped.
    window.add(numbers([[6.0, 0.0], [4.0, 2.0, 2.0]], [0.1, 0.3], [4.0, 9.0], [0.25, 0.0], [1.5, 2.0]))
    window.add(numbers([[3.0, 9.0, 0.0]], [0.5], [7.0], [0.25], [1.5], aux_loss=3.0))
    scalars, loads = window.take(Ranks())
    assert scalars["aux_loss"] == 2.0 and scalars["z_loss"] == 2.0
    assert loads == {"vision.0": [1.0, 0.0], "decoder.1": [0.35, 0.55, 0.1]}
    assert scalars["dead_experts_vision.0"] == 1 and scalars["dead_experts_decoder.1"] == 0
    assert scalars["router_entropy_decoder.1"] == pytest.approx(0.42) and scalars["max_load_decoder.1"] == 0.55
    assert scalars["max_router_logit_vision.0"] == 5.0 and scalars["max_router_logit_decoder.1"] == 10.0
    assert scalars["dropped_tokens_vision.0"] == 0.25 and scalars["dropped_tokens_decoder.1"] == 3 / 20
    assert scalars["experts_per_token_vision.0"] == 1.5 and scalars["experts_per_token_decoder.1"] == 1.7
    assert window.take(Ranks()) == ({}, {})


def test_a_layer_that_no_batch_reached_is_left_out_of_the_log():
    window = RouterWindow({"vision.0": 2, "decoder.1": 2})
    window.add(numbers([[5.0, 5.0]], [0.5], [7.0], [0.0], [1.0]))
    scalars, loads = window.take(Ranks())
    assert list(loads) == ["decoder.1"] and not any("vision" in name for name in scalars)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_the_log_tells_what_dynamic_width_and_a_capacity_cost(batch, width):
    config = tiny_config(router_top_p=width)
    config.vision_config.expert_capacity_factor = 0.5
    batch["attention_mask"][0, 20:] = 0
    model = MoeVlmForConditionalGeneration(config).eval()
    output, window = model(**batch, output_router_logits=True), RouterWindow(sparse_layers(config))
    window.add(output)
    scalars, loads = window.take(Ranks())
    real = batch["attention_mask"].flatten().bool()
    visits = [(each < 4).sum(-1).float() for each in output.router_indices]  # (N,) of each layer
    wanted = [each.mean().item() for each in (*visits[:2], *(each[real] for each in visits[2:]))]
    assert [scalars[f"experts_per_token_{name}"] for name in loads] == pytest.approx(wanted)
    assert wanted[0] <= 1.0 and wanted[1] == 2.0 and (wanted[3] == 2.0) == (width == 1.0)
    # 64 choices of 32 patches, 8 visits an expert: even in what is served, not in what is chosen.
    assert scalars["max_load_vision.1"] > 0.26


def test_dropped_visits_are_counted_where_nobody_sees_the_outputs(batch):
    config = tiny_config()
    config.vision_config.expert_capacity_factor = 0.5
    model = MoeVlmForConditionalGeneration(config).eval()
    visits = DroppedVisits(model)
    first, second = model(**batch, output_router_logits=True), model(**batch, output_router_logits=True)
    assert visits.take() == {"vision.1": pytest.approx(first.dropped_tokens[0].item())}
    assert second.dropped_tokens[0] > 0 and visits.take() == {"vision.1": 0.0}
    assert DroppedVisits(MoeVlmForConditionalGeneration(tiny_config())).take() == {}
    assert DroppedVisits(torch.nn.Linear(2, 2)).take() == {}


# Gradients


def test_each_part_has_the_norm_of_its_gradients_and_routers_are_a_part_of_their_own(tiny, batch):
    assert gradient_norms(tiny) == {}
    freeze(tiny, ["connector"])
    tiny.train()(**batch).loss.backward()
    norms = gradient_norms(tiny)
    squares = dict.fromkeys(("vision", "router", "language"), 0.0)
    for name, parameter in tiny.named_parameters():
        if parameter.grad is not None:
            part = "router" if "gate.weight" in name else "vision" if "vision_tower" in name else "language"
            squares[part] += parameter.grad.double().square().sum().item()
    assert set(norms) == set(squares)
    for part, square in squares.items():
        assert norms[part].item() == pytest.approx(square**0.5, rel=1e-5), part


# Numbers that break


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [
        ("model.language_model.layers.2.mlp.experts", "down_proj"),
        ("model.vision_tower.layers.1.mlp.gate", "weight"),
        ("model.connector.projector.0", "weight"),
        ("lm_head", "weight"),
    ],
)
def test_the_first_layer_whose_output_is_not_finite_is_named_with_its_broken_weight(tiny, batch, layer, parameter):
    assert first_non_finite(tiny, batch) is None
    tiny.get_parameter(f"{layer}.{parameter}").data.fill_(float("nan"))
    kind = type(tiny.get_submodule(layer)).__name__
    assert f"that of {layer} ({kind}), whose own {parameter} is not finite" in first_non_finite(tiny, batch)


@pytest.mark.parametrize("broken", [False, True])
def test_masked_experts_are_no_break_and_hide_none(batch, broken):
    model = MoeVlmForConditionalGeneration(tiny_config(expert_modalities=["shared", "image", "text", "text"])).eval()
    if broken:
        model.lm_head.weight.data.fill_(float("nan"))
    found = first_non_finite(model, {**batch, "output_router_logits": True})
    assert ("that of lm_head (Linear), whose own weight" in found) if broken else found is None


def test_a_layer_that_overflows_with_finite_weights_is_told_from_a_broken_one(tiny, batch):
    tiny.model.language_model.layers[1].mlp.up_proj.weight.data.mul_(1e38)
    tiny.model.language_model.layers[1].post_attention_layernorm.weight.data.mul_(1e3)
    assert "layers.1.mlp.up_proj (Linear), whose weights are finite" in first_non_finite(tiny, batch)


def test_a_broken_input_is_named(tiny, batch):
    batch["pixel_values"][0, 0, 0, 0] = float("inf")
    assert first_non_finite(tiny, batch) == "the input pixel_values is not finite"


def test_looking_for_the_break_leaves_no_hook_behind(tiny, batch):
    before = tiny(**batch).loss  # transformers 5 hooks its own recorders at the first call
    hooks = [len(module._forward_hooks) for module in tiny.modules()]
    first_non_finite(tiny, batch)
    assert [len(module._forward_hooks) for module in tiny.modules()] == hooks
    assert torch.equal(tiny(**batch).loss, before)


# Balancing


def balanced_model():
    config = tiny_config()
    for part in (config.vision_config, config.connector_config, config.text_config):
        part.use_router_bias = True
    return MoeVlmForConditionalGeneration(config)


def biases(model):
    return [router.e_score_correction_bias.clone() for router in routers_of(model)]


def counts_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=generator) for n in sparse_layers(model.config).values()]


def step(balancer):
    balancer.on_optimizer_step(args=None, state=None, control=None)


def test_the_routers_stand_in_the_order_of_the_reported_layers():
    model = balanced_model()
    language = model.model.language_model.layers
    wanted = [model.model.vision_tower.layers[1], model.model.connector, language[0], language[2]]
    assert routers_of(model) == [layer.mlp.gate for layer in wanted]


def test_one_move_a_step_from_the_sum_of_all_micro_batches():
    model, by_hand = balanced_model(), balanced_model()
    balancer = LoadBalancer(model, rate=0.01)
    batches = [counts_of(model, seed) for seed in range(3)]
    for counts in batches:
        balancer.add({"chosen_counts": counts})
    assert all(not bias.any() for bias in biases(model))
    step(balancer)
    for router, counts in zip(routers_of(by_hand), zip(*batches)):
        router.update_bias(sum(counts).double(), 0.01)
    assert all(map(torch.equal, biases(model), biases(by_hand)))
    assert all(bias.any() for bias in biases(model))
    moved = biases(model)
    step(balancer)  # nothing was counted since
    assert all(map(torch.equal, biases(model), moved))


def test_a_batch_without_pictures_moves_the_decoder_only():
    model = balanced_model()
    balancer = LoadBalancer(model, rate=0.01)
    balancer.add({"chosen_counts": counts_of(model, 0)[2:]})
    step(balancer)
    assert [bool(bias.any()) for bias in biases(model)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("frozen", "moved"),
    [(["router"], [False] * 4), (["vision"], [False, True, True, True]), (["language"], [True, True, False, False])],
)
def test_a_frozen_router_keeps_its_bias(frozen, moved):
    model = balanced_model()
    freeze(model, frozen)
    balancer = LoadBalancer(model, rate=0.01)
    balancer.add({"chosen_counts": counts_of(model, 0)})
    step(balancer)
    assert [bool(bias.any()) for bias in biases(model)] == moved
    assert balancer.active == any(moved)


def test_without_a_bias_or_with_rate_zero_nothing_is_counted(tiny):
    for balancer in (LoadBalancer(tiny, rate=0.01), LoadBalancer(balanced_model(), rate=0.0)):
        balancer.add({"chosen_counts": counts_of(tiny, 0)})
        assert not balancer.active and balancer.counts is None


def test_a_capacity_does_not_hide_an_uneven_choice_from_the_bias(batch):
    config = tiny_config()
    config.vision_config.use_router_bias, config.vision_config.expert_capacity_factor = True, 0.25
    model = MoeVlmForConditionalGeneration(config).eval()
    router = routers_of(model)[0]
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([0.3, 0.1, -0.1, -0.3]))
    before, output = router.e_score_correction_bias.clone(), model(**batch)
    # 32 patches, K = 2, E = 4: at most 4 of 64 visits an expert, and each of the first two is asked for more.
    assert output.expert_counts[0][:2].tolist() == [4.0, 4.0] and output.chosen_counts[0].sum() == 64
    balancer = LoadBalancer(model, rate=0.01)
    balancer.add(output)
    step(balancer)
    moves = (output.chosen_counts[0].mean() - output.chosen_counts[0]).sign() * 0.01
    torch.testing.assert_close(router.e_score_correction_bias, before + moves - moves.mean())
    assert moves.any()


# One expert a token


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_answers_teach_a_router_of_one_expert_only_without_renormalisation(
    batch, caplog, norm_topk_prob, scoring_func
):
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    one = {"num_experts_per_tok": 1, "norm_topk_prob": norm_topk_prob, "scoring_func": scoring_func}
    model = MoeVlmForConditionalGeneration(tiny_config(**one, **off))
    model(**batch).loss.backward()
    gradients = [router.weight.grad for router in routers_of(model)[2:]]
    assert all(bool(gradient.any()) != norm_topk_prob for gradient in gradients)
    with caplog.at_level(logging.WARNING):
        warn_of_unreached_routers(model)
    assert ("the routers of decoder.0, decoder.2 learn nothing from the answers" in caplog.text) == norm_topk_prob


def test_neither_a_frozen_router_nor_a_larger_k_is_warned_of(tiny, caplog):
    warn_of_unreached_routers(tiny)
    one = MoeVlmForConditionalGeneration(tiny_config(num_experts_per_tok=1))
    freeze(one, ["router"])
    warn_of_unreached_routers(one)
    assert not caplog.text


def test_under_lora_the_biases_move_and_travel_with_the_adapter(tmp_path):
    from peft import PeftModel

    start = balanced_model()
    model = adapt(copy.deepcopy(start), ModelArguments(lora=True, lora_rank=2, freeze_vision=True))
    balancer = LoadBalancer(model, rate=0.01)
    balancer.add({"chosen_counts": counts_of(start, 0)})
    step(balancer)
    moved = biases(model)
    assert [bool(bias.any()) for bias in moved] == [False, True, True, True]
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
    assert all(map(torch.equal, biases(reloaded), moved))
    merged = reloaded.merge_and_unload()
    assert all(map(torch.equal, biases(merged), moved))
    assert not any(isinstance(module, nn.ModuleDict) for module in merged.modules())
