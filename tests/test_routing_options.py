"""Every routing option against a loop that anyone believes, outputs and all gradients; then what each one promises.

Shapes: N tokens, D hidden, E experts, K experts per token, B batch, S sequence, L layers.
"""

import math

import numpy as np
import pytest
import torch
from conftest import IMAGE_TOKEN, tiny_config
from dumb_experts import output_and_gradients, swiglu
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from moevlm.configuration_moevlm import MoeVlmTextConfig, MoeVlmVisionConfig
from moevlm.experts_moevlm import MoeVlmSparseBlock
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.router_losses_moevlm import router_statistics
from moevlm.routing_moevlm import MoeVlmRouter

# What runs on a CPU, on both lines; the default comes first.
IMPLEMENTATIONS = ["auto", "grouped", "decode", "dense", "eager", "batched_mm", "grouped_mm"]
# Sums of 16 terms, in another order: a few float32 roundings.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
# bf16 keeps 8 bits: 2^-8 a rounding, and some ten of them behind one another.
BFLOAT16 = {"rtol": 0.05, "atol": 0.15}

KINDS = ["shared", "shared", "image", "image", "image", "text", "text", "text"]
# Groups of two with one expert, or none, for a kind of token.
SMALL = ["shared", "image", "shared", "text", "text", "text", "shared", "shared"]
OPTIONS = {
    "plain": {},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sigmoid, not renormalised": {"scoring_func": "sigmoid", "norm_topk_prob": False},
    "scaled": {"routed_scaling_factor": 2.5, "norm_topk_prob": False},
    "scaled, renormalised": {"routed_scaling_factor": 1.5},
    "bias": {"use_router_bias": True},
    "bias, sigmoid": {"use_router_bias": True, "scoring_func": "sigmoid"},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "groups, bias, sigmoid": {"n_group": 2, "topk_group": 1, "use_router_bias": True, "scoring_func": "sigmoid"},
    "groups of one": {"n_group": 8, "topk_group": 4},
    "top p": {"router_top_p": 0.5, "num_experts_per_tok": 4},
    "top p, not renormalised": {"router_top_p": 0.6, "num_experts_per_tok": 4, "norm_topk_prob": False},
    "top p, sigmoid, bias": {"router_top_p": 0.3, "scoring_func": "sigmoid", "use_router_bias": True},
    "modalities": {"expert_modalities": KINDS, "num_experts_per_tok": 3},
    "modalities, bias": {"expert_modalities": KINDS, "use_router_bias": True, "scoring_func": "sigmoid"},
    "modalities, small groups": {"expert_modalities": SMALL, "n_group": 4, "topk_group": 2},
    "modalities, groups": {"expert_modalities": ["shared", "image", "text", "shared"] * 2, "n_group": 2},
    "jitter": {"router_jitter_noise": 0.3},
    "shared expert": {"n_shared_experts": 1},
    "shared expert, gated": {"n_shared_experts": 1, "shared_expert_gate": True},
    "shared expert, gated and mixed": {"n_shared_experts": 1, "shared_expert_gate": True, "shared_expert_mix": 0.25},
    "shared expert, mixed": {"n_shared_experts": 2, "shared_expert_mix": 0.25},
    "capacity": {"expert_capacity_factor": 0.6},
    "capacity, batch priority": {"expert_capacity_factor": 0.6, "batch_priority_routing": True},
    "capacity, priority, sigmoid": {
        "expert_capacity_factor": 0.6,
        "batch_priority_routing": True,
        "scoring_func": "sigmoid",
    },
    "capacity, priority, top p": {"expert_capacity_factor": 0.5, "batch_priority_routing": True, "router_top_p": 0.4},
}


def config_of(**fields):
    """Sixteen wide, eight experts; a capacity is the tower's."""
    config_class = MoeVlmVisionConfig if "expert_capacity_factor" in fields else MoeVlmTextConfig
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    return config_class(moe_layers="all", **{**sizes, "moe_intermediate_size": 8, **fields})


def sparse_block(implementation="eager", dtype=torch.float32, **fields):
    """A block in training with weights and biases large enough that each option changes choices."""
    config = config_of(**fields)
    config._experts_implementation = implementation
    block = MoeVlmSparseBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if config.use_router_bias:
        block.gate.e_score_correction_bias.normal_(std=0.2)
    return block.to(dtype)


def router(**fields):
    gate = MoeVlmRouter(config_of(**fields)).eval()
    torch.nn.init.normal_(gate.weight, std=0.5)
    return gate


# The loop that anyone believes


def dumb_scores(config, logits, allowed):
    """Score of each allowed expert, by its id."""
    if config.scoring_func == "sigmoid":
        return {e: 1 / (1 + torch.exp(-logits[e])) for e in allowed}
    total = sum(torch.exp(logits[e]) for e in allowed)
    return {e: torch.exp(logits[e]) / total for e in allowed}


def dumb_choice(config, scores, bias):
    """Ids of the chosen experts, best first."""
    ranks = {e: score.item() + bias[e] for e, score in scores.items()}
    size, values = config.num_experts // config.n_group, {}
    for e in ranks:
        values.setdefault(e // size, []).append(ranks[e])
    values = {group: sum(sorted(found)[-2:]) for group, found in values.items()}
    best = sorted(values, key=values.get, reverse=True)[: config.topk_group]
    return sorted((e for e in ranks if e // size in best), key=ranks.get, reverse=True)


def dumb_route(config, gate, states, is_image):
    """Ids and weights of one token's visits, and its largest probability."""
    kinds = config.expert_modalities or ["shared"] * config.num_experts
    allowed = [e for e, kind in enumerate(kinds) if kind in ("shared", "image" if is_image else "text")]
    logits = [row @ states.float() for row in gate.weight.float()]
    scores = dumb_scores(config, logits, allowed)
    bias = [0.0] * len(logits) if gate.e_score_correction_bias is None else gate.e_score_correction_bias.tolist()
    total = sum(score.item() for score in scores.values())
    chosen, reached = [], 0.0
    for e in dumb_choice(config, scores, bias)[: config.num_experts_per_tok]:
        if config.router_top_p is not None and reached >= config.router_top_p:
            break
        chosen.append(e)
        reached += scores[e].item() / total
    weights = [scores[e] for e in chosen]
    if config.norm_topk_prob:
        weights = [weight / sum(weights) for weight in weights]
    weights = [weight * config.routed_scaling_factor for weight in weights]
    return list(zip(chosen, weights)), max(score.item() for score in scores.values()) / total


def dumb_capacity(config, routes, priorities):
    """The visits that are served: all first choices before all second ones, each in the order of the tokens."""
    if config.expert_capacity_factor is None:
        return routes
    limit = math.ceil(config.expert_capacity_factor * config.num_experts_per_tok * len(routes) / config.num_experts)
    order, used, served = list(range(len(routes))), [0] * config.num_experts, [[] for _ in routes]
    if config.batch_priority_routing:
        order.sort(key=lambda token: -priorities[token])
    for rank in range(config.num_experts_per_tok):
        for token in order:
            if rank < len(routes[token]) and used[routes[token][rank][0]] < limit:
                used[routes[token][rank][0]] += 1
                served[token].append(routes[token][rank])
    return served


def dumb_block(block, config, tokens, image_mask, noise):
    """Each token alone, each expert alone, as the formulas read; `(N, D)` -> `(N, D)`."""
    noisy = tokens.float() * noise
    routed = [dumb_route(config, block.gate, states, image) for states, image in zip(noisy, image_mask)]
    served = dumb_capacity(config, [visits for visits, _ in routed], [priority for _, priority in routed])
    outputs = [torch.zeros(0, tokens.shape[1], dtype=tokens.dtype)]
    for token, visits in zip(tokens, served):
        output = torch.zeros_like(token)
        for expert, weight in visits:
            gate, up = block.experts.gate_up_proj[expert].chunk(2)
            output = output + weight.to(token.dtype) * swiglu(token, gate, up, block.experts.down_proj[expert])
        if block.shared_expert is not None:
            shared, mix = block.shared_expert, config.shared_expert_mix
            always = swiglu(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
            if block.shared_expert_gate is not None:
                always = always / (1 + torch.exp(-(block.shared_expert_gate.weight[0] @ token)))
            output = output + always if mix is None else (1 - mix) * output + mix * always
        outputs.append(output.unsqueeze(0))
    return torch.cat(outputs)


def compare(name, implementation, tokens, dtype=torch.float32, change=None, **tolerance):
    """Hold the block with the options `name` against the dumb loop."""
    block = sparse_block(implementation, dtype, **OPTIONS[name])
    if change is not None:
        change(block)
    config, tokens = block.gate.selection.config, tokens.to(dtype)
    image_mask = torch.rand(len(tokens)) < 0.5
    noise, eps = torch.ones(len(tokens), 16), config.router_jitter_noise
    if eps:
        torch.manual_seed(5)
        noise = torch.empty(len(tokens), 16).uniform_(1 - eps, 1 + eps)
    expected = output_and_gradients(block, lambda x: dumb_block(block, config, x, image_mask, noise), tokens)
    torch.manual_seed(5)
    found = output_and_gradients(block, lambda x: block(x, image_mask), tokens)
    leaves = {"output": expected["output"], "tokens": tokens, **dict(block.named_parameters())}
    # The loop does not touch what nobody visits; the block may give such a parameter zeros or nothing.
    found, expected = (
        {key: torch.zeros_like(leaf) if values[key] is None else values[key] for key, leaf in leaves.items()}
        for values in (found, expected)
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, n=key: f"{n}: {text}")
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_many_tokens_equal_the_dumb_loop_in_outputs_and_every_gradient(name, implementation):
    found = compare(name, implementation, torch.randn(33, 16), **FLOAT32)
    assert found["output"].any() and found["gate.weight"].any()


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_equals_the_dumb_loop(name, implementation):
    compare(name, implementation, torch.randn(17, 16), torch.bfloat16, **BFLOAT16)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_token_and_one_token_equal_the_dumb_loop(name, implementation, count):
    compare(name, implementation, torch.randn(count, 16), **FLOAT32)


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_expert_that_gets_none_equals_the_dumb_loop_with_a_zero_gradient(name, implementation):
    def shun(block):
        with torch.no_grad():
            block.gate.weight[1] = -50.0  # positive tokens never choose it
            if block.gate.e_score_correction_bias is not None:
                block.gate.e_score_correction_bias[1] = -9.0

    found = compare(name, implementation, torch.rand(20, 16) + 0.1, change=shun, **FLOAT32)
    assert not found["experts.gate_up_proj"][1].any() and not found["experts.down_proj"][1].any()


@pytest.mark.parametrize("name", [name for name in OPTIONS if "capacity" not in name and "top p" not in name])
def test_ties_visit_k_different_experts_with_equal_weights(name):
    block = sparse_block(**{**OPTIONS[name], "router_jitter_noise": 0.0})
    torch.nn.init.zeros_(block.gate.weight)
    if block.gate.e_score_correction_bias is not None:
        block.gate.e_score_correction_bias.zero_()
    config = block.gate.selection.config
    routing = block.gate(torch.randn(9, 16), torch.arange(9) % 2 == 0)
    assert all(len(set(row)) == config.num_experts_per_tok for row in routing.experts.tolist())
    torch.testing.assert_close(routing.weights, routing.weights[:1, :1].expand_as(routing.weights))


@pytest.mark.parametrize("name", OPTIONS)
def test_huge_logits_give_finite_outputs_and_gradients(name):
    block = sparse_block(**OPTIONS[name])
    with torch.no_grad():
        block.gate.weight.mul_(1e4)
    found = output_and_gradients(block, lambda x: block(x, torch.arange(12) % 2 == 0), torch.randn(12, 16))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_router_is_one_graph_without_breaks(name):
    torch.compiler.reset()  # else the other options count toward the limit of recompilations
    gate = sparse_block(**OPTIONS[name]).gate.eval()
    tokens, image_mask = torch.randn(12, 16), torch.arange(12) % 2 == 0
    compiled = torch.compile(gate, fullgraph=True, backend="eager")
    assert all(torch.equal(*pair) for pair in zip(compiled(tokens, image_mask), gate(tokens, image_mask)))


# Scores, bias, groups, width: by hand


def choose(probabilities, **fields):
    """Experts and weights of one token whose softmax router gives these probabilities."""
    gate = router(hidden_size=len(probabilities), num_experts=len(probabilities), **fields)
    with torch.no_grad():
        gate.weight.copy_(torch.diag(torch.tensor(probabilities).log()))
    return gate, gate(torch.ones(1, len(probabilities)))


def test_the_bias_decides_who_is_visited_and_never_how_much():
    gate, plain = choose([0.1, 0.2, 0.3, 0.4], use_router_bias=True)
    assert plain.experts.tolist() == [[3, 2]]
    gate.e_score_correction_bias[0] = 1.0
    biased = gate(torch.ones(1, 4))
    assert biased.experts.tolist() == [[0, 3]]
    torch.testing.assert_close(biased.weights, torch.tensor([[0.1, 0.4]]) / 0.5)


def test_the_best_expert_of_a_losing_group_is_not_visited():
    # Groups (0, 1), (2, 3): 0.4 + 0.02 lose against 0.3 + 0.28.
    _, routing = choose([0.4, 0.02, 0.3, 0.28], n_group=2, topk_group=1)
    assert routing.experts.tolist() == [[2, 3]]


@pytest.mark.parametrize("top_p, width", [(0.3, 1), (0.45, 1), (0.55, 2), (0.75, 2), (0.85, 3), (1.0, 3)])
def test_as_many_experts_as_needed_for_the_probability_and_k_at_most(top_p, width):
    _, routing = choose([0.1, 0.3, 0.1, 0.5], router_top_p=top_p, num_experts_per_tok=3)
    assert routing.experts[0, :width].tolist() == [3, 1, routing.experts[0, 2]][:width]
    assert routing.experts[0, width:].tolist() == [4] * (3 - width) and not routing.weights[0, width:].any()
    torch.testing.assert_close(routing.weights.sum(), torch.tensor(1.0))


def test_sigmoid_scores_do_not_depend_on_the_other_experts():
    gate = router(scoring_func="sigmoid", norm_topk_prob=False)
    tokens = torch.randn(20, 16)
    before = gate(tokens)
    with torch.no_grad():
        gate.weight[before.experts[0, 1]] -= 0.01 * tokens[0]  # the second choice of token 0 a little lower
    after = gate(tokens)
    assert torch.equal(before.weights[0, 0], after.weights[0, 0]) and after.weights[0, 1] < before.weights[0, 1]


# The dial


def model_of(*, vision=None, connector=None, **text):
    """The tiny model with fields set in each part; biases, where there are any, differ from zero."""
    config = tiny_config(**text)
    for part, fields in ((config.vision_config, vision), (config.connector_config, connector)):
        for name, value in (fields or {}).items():
            setattr(part, name, value)
    torch.manual_seed(2)
    model = MoeVlmForConditionalGeneration(config).eval()
    for module in model.modules():
        if isinstance(module, MoeVlmRouter) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [0, IMAGE_TOKEN]
    return model


def with_width(width):
    return model_of(
        vision={"num_experts_per_tok": width}, connector={"num_experts_per_tok": width}, num_experts_per_tok=width
    )


@pytest.mark.parametrize("width", [1, 3, 4])
def test_the_dial_equals_a_model_built_with_this_width(batch, width):
    built, dialled = with_width(width), with_width(2)
    expected = built(**batch, output_router_logits=True)
    found = dialled(**batch, output_router_logits=True, num_experts_per_tok=width)
    assert [each.shape[1] for each in found.router_indices] == [width] * 4
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert [each.shape[1] for each in dialled(**batch, output_router_logits=True).router_indices] == [2] * 4


def test_generate_turns_the_dial_at_every_step(batch):
    prompt = {"input_ids": batch["input_ids"][:1, :12], "pixel_values": batch["pixel_values"][:1]}
    options = {"do_sample": False, "max_new_tokens": 8}
    found = with_width(2).generate(**prompt, **options, num_experts_per_tok=1)
    assert torch.equal(found, with_width(1).generate(**prompt, **options))
    assert not torch.equal(found, with_width(2).generate(**prompt, **options))


def test_a_config_changed_after_loading_counts(batch, tmp_path):
    with_width(2).save_pretrained(tmp_path)
    model = MoeVlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    model.config.text_config.num_experts_per_tok = 1
    model.config.vision_config.num_experts_per_tok = 3
    found = model(**batch, output_router_logits=True)
    assert [each.shape[1] for each in found.router_indices] == [3, 2, 1, 1]
    expected = model_of(vision={"num_experts_per_tok": 3}, num_experts_per_tok=1)(**batch)
    torch.testing.assert_close(found.logits, expected.logits, **FLOAT32)


@pytest.mark.slow
def test_the_dial_turns_with_a_static_cache_and_a_compiled_step_too(batch):
    ids, pixels = batch["input_ids"][:1, :12], batch["pixel_values"][:1]
    prompt = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    options = {"do_sample": False, "max_new_tokens": 8, "num_experts_per_tok": 1}
    expected = with_width(1).generate(**prompt, do_sample=False, max_new_tokens=8)
    assert torch.equal(with_width(2).generate(**prompt, **options, cache_implementation="static"), expected)
    torch.compiler.reset()
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    model = with_width(2)
    found = model.generate(**prompt, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    again = model.generate(**prompt, **{**options, "num_experts_per_tok": 3}, cache_implementation="static")
    assert torch.equal(again, with_width(3).generate(**prompt, do_sample=False, max_new_tokens=8))


@pytest.mark.parametrize("kind", [np.int64, np.int32, int])
def test_the_dial_takes_whole_numbers_of_numpy(tiny, batch, kind):
    assert torch.equal(tiny(**batch, num_experts_per_tok=kind(3)).logits, tiny(**batch, num_experts_per_tok=3).logits)


def test_a_part_with_fewer_experts_bounds_the_dial_of_a_call_and_is_named(batch):
    model = model_of(num_experts=6)
    with pytest.raises(ValueError, match="num_experts_per_tok=5 must .* from 1 to 4: .* moevlm_vision"):
        model(**batch, num_experts_per_tok=5)
    model.config.text_config.num_experts_per_tok = 5
    assert model(**batch, output_router_logits=True).router_indices[-1].shape[1] == 5


@pytest.mark.parametrize("width", [0, 5, -1, 1.5, "2", True, np.float64(2)])
def test_a_dial_outside_the_experts_is_refused_by_name(tiny, batch, width):
    with pytest.raises(ValueError, match=r"num_experts_per_tok=.* must be a whole number from 1 to 4"):
        tiny(**batch, num_experts_per_tok=width)


def test_a_dial_beyond_the_groups_is_refused():
    gate = router(n_group=4, topk_group=2)
    with pytest.raises(ValueError, match="num_experts_per_tok=5 must be a whole number from 1 to 4"):
        gate(torch.randn(3, 16), num_experts_per_tok=5)


# Modalities


MODALITIES = {"expert_modalities": ["shared", "image", "text", "text"], "num_experts": 4}


def test_each_modality_visits_its_own_and_the_shared_experts_only(batch):
    output = model_of(**MODALITIES)(**batch, output_router_logits=True)
    image = (batch["input_ids"] == IMAGE_TOKEN).flatten()
    for logits, experts in zip(output.router_logits[2:], output.router_indices[2:]):
        assert set(experts[image].flatten().tolist()) == {0, 1}
        assert set(experts[~image].flatten().tolist()) == {0, 2, 3}
        assert (logits[image][:, 2:] == -math.inf).all() and (logits[~image][:, 1] == -math.inf).all()
    assert output.loss.isfinite()


def test_modalities_that_share_every_expert_change_nothing(batch):
    shared = model_of(expert_modalities=["shared"] * 4)
    assert torch.equal(shared(**batch).logits, model_of()(**batch).logits)


@torch.no_grad()
def test_decoding_under_a_modality_mask_equals_the_full_forward(batch):
    model = model_of(**MODALITIES, use_router_bias=True, scoring_func="sigmoid", router_top_p=0.7)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    first = model(input_ids=ids[:, :9], pixel_values=pixels, use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for chunk in (ids[:, 9:11], *ids[:, 11:].split(1, dim=1)):
        steps.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=2e-5)


def test_pictures_given_as_embeddings_are_image_tokens_too(batch):
    model = model_of(**MODALITIES)
    batch.pop("labels")
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_pictures_merged_before_are_image_tokens_where_a_mask_says_so(batch, options):
    model = model_of(**MODALITIES)
    labels, ids, pixels = batch.pop("labels"), batch["input_ids"], batch["pixel_values"]
    image_mask, embeds = ids == IMAGE_TOKEN, model.get_input_embeddings()(ids)
    merged = model.model.merge(embeds, image_mask, model.model.encode_images(pixels).tokens)
    known = {"inputs_embeds": merged, "image_mask": image_mask}
    second = torch.tensor([[False], [True]])  # this row's picture is still to be merged
    half = {"inputs_embeds": torch.where(second.unsqueeze(-1), embeds, merged), "image_mask": image_mask & ~second}
    expected = model(**batch, labels=labels)
    for inputs in (known, half | {"pixel_values": pixels[1:]}):
        found = model(**inputs, labels=labels)
        torch.testing.assert_close(found.logits, expected.logits)
        assert all(map(torch.equal, found.expert_load_image[-2:], expected.expert_load_image[-2:]))
    assert not torch.equal(model(inputs_embeds=merged).logits, expected.logits)
    options = {**options, "do_sample": False, "max_new_tokens": 5}
    expected = model.generate(**batch, **options)[:, ids.shape[1] :]
    assert torch.equal(model.generate(**known, **options), expected)
    with pytest.raises(ValueError, match=r"image_mask is \(2, 3\); give one value for each token, \(2, 24\)"):
        model(inputs_embeds=merged[:2], image_mask=image_mask[:2, :3])


def test_every_gradient_under_a_modality_mask_is_finite(batch):
    model = model_of(**MODALITIES, router_local_entropy_coef=0.1, router_global_entropy_coef=0.1).train()
    model(**batch).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_mask_survives_saving_and_casting(batch, tmp_path):
    model = model_of(**MODALITIES)
    model.save_pretrained(tmp_path)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for gate in (loaded.model.language_model.layers[0].mlp.gate, model.language_model.layers[2].mlp.gate):
        assert gate.allowed.tolist() == [[True, False, True, True], [True, True, False, False]]
    assert not any("allowed" in name for name in loaded.state_dict())
    assert loaded(**batch).loss.isfinite()


# The bias


def biases(model):
    return {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_the_bias_stays_float32_and_exact_when_the_model_is_cast(cast):
    model = model_of(use_router_bias=True)
    before = {name: value.clone() for name, value in biases(model).items()}
    after = biases(cast(model))
    assert len(after) == 2 and model.lm_head.weight.dtype != torch.float32
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_bias_survives_saving_and_loading_in_any_dtype(batch, tmp_path, dtype, stored):
    model = model_of(use_router_bias=True).to(stored)
    model.save_pretrained(tmp_path)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.dtype == dtype
    for name, value in biases(model).items():
        assert torch.equal(biases(loaded)[name], value), name


def test_a_checkpoint_without_bias_gets_zeros_and_keeps_its_routers(batch, tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        config = model_of(use_router_bias=True).config
        loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path, config=config, dtype=dtype).eval()
        assert all(value.dtype == torch.float32 and not value.any() for value in biases(loaded).values())
        if dtype == torch.float32:
            torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **FLOAT32)


def test_one_step_of_the_bias_by_hand():
    gate = router(num_experts=4, use_router_bias=True)
    gate.update_bias(torch.tensor([6, 2, 4, 4]), 0.1)  # the mean is 4
    torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    gate.update_bias(torch.tensor([9, 1, 1, 1]), 0.1)  # -1 + 3 steps, so the mean moved by 0.05 and is taken back
    torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor([-0.25, 0.15, 0.05, 0.05]))
    torch.testing.assert_close(gate.e_score_correction_bias.mean(), torch.tensor(0.0))


class NoFloat64(TorchDispatchMode):
    """As MPS: a tensor in float64 is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_bias_moves_exactly_and_without_float64(dtype):
    gate = router(num_experts=4, use_router_bias=True)
    with NoFloat64():
        # Beyond 2^24, where a float32 mean would not tell one visit.
        counts = torch.tensor([2**24, 2**24 - 1, 2**24 - 1, 2**24 - 2], dtype=dtype)
        gate.update_bias(counts, 0.1)
    torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor([-0.1, 0.0, 0.0, 0.1]))


def test_experts_are_compared_with_those_of_their_own_kind():
    gate = router(num_experts=4, use_router_bias=True, expert_modalities=["image", "image", "text", "text"])
    gate.update_bias(torch.tensor([0, 0, 7, 1]), 0.1)  # a batch without pictures
    torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor([0.0, 0.0, -0.1, 0.1]))


def test_a_router_without_bias_refuses_to_move_it():
    with pytest.raises(ValueError, match="set use_router_bias=True"):
        router().update_bias(torch.zeros(8), 0.1)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_bias_moves_a_lopsided_load_to_balance(scoring_func):
    gate = router(use_router_bias=True, scoring_func=scoring_func)
    with torch.no_grad():
        gate.weight[0] += 0.3  # tokens with positive sums love expert 0
    loads = []
    for step in range(300):
        tokens = torch.randn(256, 16, generator=torch.Generator().manual_seed(step)) + 0.5
        counts = gate(tokens).experts.flatten().bincount(minlength=8)
        loads.append(counts / counts.sum())
        gate.update_bias(counts, 0.005)
    first, last = loads[0].max().item(), torch.stack(loads[-30:]).mean(0).max().item()
    assert first > 2.0 / 8 and last < 1.1 / 8, (first, last)


# Capacity


def capped(choices, **fields):
    """What is left of choices `(N, 1)` of two experts, tokens surer the later they come."""
    gate = router(num_experts=2, num_experts_per_tok=1, **fields)
    height = torch.linspace(1, 5, len(choices))
    logits = F.one_hot(torch.tensor(choices), 2) * height.unsqueeze(-1)
    return gate.capacity(torch.tensor(choices).unsqueeze(-1), logits).flatten().tolist()


def test_an_expert_takes_its_capacity_in_order_or_the_surest_first():
    # ceil(1.0 * 1 * 6 / 2) = 3 tokens an expert
    choices = [0, 0, 1, 0, 0, 0]
    assert capped(choices, expert_capacity_factor=1.0) == [0, 0, 1, 0, 2, 2]
    assert capped(choices, expert_capacity_factor=1.0, batch_priority_routing=True) == [2, 2, 1, 0, 0, 0]


def test_first_choices_come_before_second_choices():
    gate = router(num_experts=2, expert_capacity_factor=0.5)
    choices = torch.tensor([[1, 0], [0, 1]])  # ceil(0.5 * 2 * 2 / 2) = 1 visit an expert
    assert gate.capacity(choices, torch.zeros(2, 2)).tolist() == [[1, 2], [0, 2]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_priority", [True, False])
def test_dropped_visits_are_counted_and_reported_in_training_and_inference(batch, training, batch_priority):
    model = model_of(vision={"expert_capacity_factor": 0.5, "batch_priority_routing": batch_priority}).train(training)
    output = model(**batch, output_router_logits=True)
    # One sparse layer in the tower: 32 patches, K = 2, E = 4, so at most 8 visits an expert of 64.
    gone = output.router_indices[0] == 4
    assert output.expert_counts[0].max() <= 8 and gone.sum() >= 64 - 32
    torch.testing.assert_close(output.dropped_tokens, torch.tensor([gone.float().mean(), 0.0, 0.0, 0.0]))
    assert output.expert_counts[0].sum() == 64 - gone.sum()
    torch.testing.assert_close(output.expert_load[0].sum(), torch.tensor(1.0))


def test_the_balance_loss_sees_what_an_overfull_expert_turned_away():
    # Six of eight tokens choose expert 0, which serves two: served, both have the same.
    choices, logits = torch.tensor([[0]] * 6 + [[1]] * 2), torch.tensor([[30.0, 0.0]] * 6 + [[0.0, 30.0]] * 2)
    visited = choices.masked_fill((choices == 0) & (torch.arange(8).unsqueeze(-1) >= 2), 2)
    statistics = router_statistics([logits], [visited], router_choices=[choices])
    torch.testing.assert_close(statistics.balance, torch.tensor([2 * (0.75**2 + 0.25**2)]))
    torch.testing.assert_close(statistics.dropped, torch.tensor([0.5]))
    assert statistics.counts.tolist() == [[2.0, 2.0]]


def test_visits_spared_by_the_dynamic_width_are_not_called_dropped(batch):
    model = model_of(router_top_p=0.5)
    output = model(**batch, output_router_logits=True)
    assert (output.router_indices[-1] == 4).any() and not output.dropped_tokens.any()
    assert output.expert_counts[-1].sum() == (output.router_indices[-1] < 4).sum()


def test_experts_spread_over_ranks_get_existing_ids_with_weight_zero():
    block = sparse_block(**OPTIONS["top p"])
    tokens, passed = torch.randn(9, 16), {}

    def take(hidden_states, top_k_index, top_k_weights):
        passed.update(experts=top_k_index, weights=top_k_weights)
        return hidden_states

    block.experts.forward, block.experts.num_experts = take, 4  # what expert parallelism does on one of two ranks
    block(tokens)
    wanted = block.gate(tokens)
    assert (wanted.experts == 8).any() and passed["experts"].max() == 7
    assert not passed["weights"][wanted.experts == 8].any()


# Jitter and the shared expert


def test_jitter_is_noise_of_the_routers_input_in_training_only():
    block, tokens = sparse_block(router_jitter_noise=0.2), torch.randn(40, 16)
    first, second = block.gate(tokens), block.gate(tokens)
    assert not torch.equal(first.logits, second.logits)
    block.eval()
    exact = block.gate(tokens).logits
    assert torch.equal(exact, tokens @ block.gate.weight.t()) or torch.allclose(exact, tokens @ block.gate.weight.t())
    largest = 0.2 * tokens.abs() @ block.gate.weight.abs().t()
    assert ((first.logits - exact).abs() <= largest + 1e-5).all()


def test_a_half_and_half_mix_of_copies_of_a_dense_layer_keeps_its_scale():
    block, tokens = sparse_block(n_shared_experts=1, shared_expert_mix=0.5), torch.randn(10, 16)
    shared = block.shared_expert
    with torch.no_grad():
        gate_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
        block.experts.gate_up_proj.copy_(gate_up.expand(8, -1, -1))
        block.experts.down_proj.copy_(shared.down_proj.weight.expand(8, -1, -1))
    torch.testing.assert_close(block(tokens), shared(tokens), **FLOAT32)


# The whole model


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_sees_the_same_jitter_and_modalities_again(batch):
    model = model_of(**MODALITIES, router_jitter_noise=0.3, vision={"router_jitter_noise": 0.3}).train()
    torch.manual_seed(3)
    expected = gradients(model, **batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    found = gradients(model, **batch)
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-6) for name, value in expected.items())


@pytest.mark.slow
def test_the_whole_forward_exports_with_every_kind_of_option(batch):
    options = {**MODALITIES, "use_router_bias": True, "scoring_func": "sigmoid", "router_top_p": 0.8}
    model = model_of(vision={"expert_capacity_factor": 0.8, "batch_priority_routing": True}, **options)
    batch.pop("labels")
    exported = torch.export.export(model, (), {**batch, "use_cache": False}).module()
    found = exported(**batch, use_cache=False).logits
    torch.testing.assert_close(found, model(**batch, use_cache=False).logits, rtol=1e-4, atol=2e-5)
