"""The sparse block against a loop that anyone believes, and the router numbers against numbers made by hand.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, L layers.
"""

import pytest
import torch
from dumb_experts import output_and_gradients, swiglu
from peft import LoraConfig, get_peft_model

from moevlm.base_moevlm import IS_TRANSFORMERS_5
from moevlm.configuration_moevlm import MoeVlmTextConfig
from moevlm.experts_moevlm import Implementations, MoeVlmSparseBlock
from moevlm.modeling_moevlm import MoeVlmConnector, MoeVlmForConditionalGeneration, MoeVlmTextModel
from moevlm.vision_moevlm import MoeVlmVisionModel

OURS = ["auto", "grouped", "decode", "dense", "eager", "batched_mm"]
# In float32 the grouped product of PyTorch needs transformers 5, which falls back to a loop.
IMPLEMENTATIONS = [*OURS, "grouped_mm"] if IS_TRANSFORMERS_5 else OURS
# Sums of 16 terms, in another order: a few float32 roundings.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def sparse_block(implementation="eager", dtype=torch.float32, **fields):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = MoeVlmTextConfig(**{**sizes, "moe_intermediate_size": 8, **fields})
    config._experts_implementation = implementation
    block = MoeVlmSparseBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block.to(dtype)


def dumb_block(block, tokens):
    """Each token alone, each expert alone, as the formula reads; `(N, D)` -> `(N, D)`."""
    outputs, selection = [], block.gate.selection
    for token in tokens:
        probabilities = (block.gate.weight.float() @ token.float()).softmax(0)
        kept, experts = probabilities.topk(selection.top_k)
        if selection.norm_topk_prob:
            kept = kept / kept.sum()
        output = torch.zeros_like(token)
        for weight, expert in zip(kept.to(token.dtype), experts):
            gate, up = block.experts.gate_up_proj[expert].chunk(2)
            output = output + weight * swiglu(token, gate, up, block.experts.down_proj[expert])
        if block.shared_expert is not None:
            shared = block.shared_expert
            output = output + swiglu(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        outputs.append(output)
    return torch.stack(outputs)


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("fields", [{}, {"norm_topk_prob": False}, {"n_shared_experts": 2}, {"num_experts_per_tok": 1}])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_block_equals_the_dumb_loop_in_outputs_and_every_gradient(implementation, fields):
    block = sparse_block(implementation, **fields)
    tokens = torch.randn(33, 16)
    expected = output_and_gradients(block, lambda states: dumb_block(block, states), tokens)
    assert_same(output_and_gradients(block, block, tokens), expected, **FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_block_equals_the_dumb_loop_in_bfloat16(implementation):
    block = sparse_block(implementation, torch.bfloat16)
    tokens = torch.randn(33, 16, dtype=torch.bfloat16)
    expected = output_and_gradients(block, lambda states: dumb_block(block, states), tokens)
    # bf16 keeps 8 bits: 2^-8 a rounding, and some ten of them behind one another.
    assert_same(output_and_gradients(block, block, tokens), expected, rtol=0.05, atol=0.15)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_equals_the_dumb_loop(implementation):
    block = sparse_block(implementation)
    tokens = torch.randn(1, 16)
    torch.testing.assert_close(block(tokens), dumb_block(block, tokens), **FLOAT32)


@pytest.mark.parametrize("implementation", ["auto", "grouped", "eager", "dense"])
def test_no_token_gives_no_output_and_zero_gradients(implementation):
    block = sparse_block(implementation)
    found = output_and_gradients(block, block, torch.empty(0, 16))
    assert found["output"].shape == (0, 16)
    for name, parameter in block.named_parameters():
        assert torch.count_nonzero(found[name]) == 0, name
        assert found[name].shape == parameter.shape


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_gets_a_zero_gradient_and_the_others_theirs(implementation):
    block = sparse_block(implementation)
    with torch.no_grad():
        block.gate.weight[3] = -100.0  # positive tokens never choose it
    found = output_and_gradients(block, block, torch.rand(20, 16) + 0.1)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert torch.count_nonzero(found[name][3]) == 0
        assert torch.count_nonzero(found[name][:3].flatten(1).sum(1)) == 3


def test_ties_choose_distinct_experts_with_equal_weights():
    block = sparse_block()
    torch.nn.init.zeros_(block.gate.weight)
    tokens = torch.randn(5, 16)
    routing = block.gate(tokens)
    assert (routing.experts[:, 0] != routing.experts[:, 1]).all()
    torch.testing.assert_close(routing.weights, torch.full((5, 2), 0.5))
    torch.testing.assert_close(block(tokens), dumb_block(block, tokens), **FLOAT32)


def test_a_batch_of_sequences_is_routed_token_by_token():
    block = sparse_block()
    states = torch.randn(2, 3, 16)
    torch.testing.assert_close(block(states).flatten(0, 1), block(states.flatten(0, 1)))


@pytest.mark.parametrize("implementation", OURS)
def test_visits_to_the_id_num_experts_are_skipped(implementation):
    block = sparse_block(implementation)
    block.experts._is_expert_parallel = True  # how transformers tells its own that such ids may come
    tokens, weights = torch.randn(3, 16), torch.rand(3, 2)
    experts = torch.tensor([[0, 4], [4, 4], [2, 1]])
    silenced = weights.masked_fill(experts == 4, 0.0)
    expected = block.experts(tokens, experts.clamp(max=3), silenced)
    torch.testing.assert_close(block.experts(tokens, experts, weights), expected, **FLOAT32)


def test_the_shared_expert_is_added_for_every_token():
    block = sparse_block(n_shared_experts=2)
    tokens = torch.randn(7, 16)
    together, shared = block(tokens), block.shared_expert
    assert shared.gate_proj.weight.shape == (2 * 8, 16)
    block.shared_expert = None
    torch.testing.assert_close(together, block(tokens) + shared(tokens))


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_the_router_is_float32_under_autocast(implementation):
    block = sparse_block(implementation)
    tokens = torch.randn(20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = block.gate(tokens).logits
        output = block(tokens)
    assert torch.equal(logits, block.gate(tokens).logits)
    # Only the experts' products are bf16: one wrong choice of expert would be an error of the outputs' own size.
    torch.testing.assert_close(output.float(), block(tokens), rtol=0.05, atol=0.15)


# The choice of an implementation


def implementations_of(model):
    return {type(each.config).__name__: each.config.experts_implementation for each in model.modules() if is_part(each)}


def is_part(module):
    return isinstance(module, (MoeVlmVisionModel, MoeVlmTextModel, MoeVlmConnector))


def test_a_model_chooses_by_itself_unless_told(tiny):
    assert set(implementations_of(tiny).values()) <= {None, "auto"}


def test_loading_takes_a_choice_that_is_never_stored(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "one")
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path / "one", experts_implementation="dense")
    assert set(implementations_of(loaded).values()) == {"dense"}
    loaded.save_pretrained(tmp_path / "two")
    assert "experts_implementation" not in (tmp_path / "two" / "config.json").read_text()
    again = MoeVlmForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert set(implementations_of(again).values()) <= {None, "auto"}


@pytest.mark.parametrize("name", OURS)
def test_a_choice_can_be_changed_and_changes_no_number(tiny, batch, name):
    expected = tiny(**batch).logits
    tiny.set_experts_implementation(name)
    assert set(implementations_of(tiny).values()) == {name}
    torch.testing.assert_close(tiny(**batch).logits, expected, rtol=1e-4, atol=2e-5)


def test_each_part_can_have_its_own_choice(tiny):
    tiny.set_experts_implementation({"text_config": "grouped", "vision_config": "eager"})
    found = implementations_of(tiny)
    assert (found["MoeVlmTextConfig"], found["MoeVlmVisionConfig"]) == ("grouped", "eager")
    assert found["MoeVlmConnectorConfig"] in (None, "auto")


def test_the_choice_decides_what_runs(tiny, batch, monkeypatch):
    calls = []
    run = Implementations.ours["dense"]
    monkeypatch.setitem(Implementations.ours, "dense", lambda *inputs: calls.append(1) or run(*inputs))
    tiny.set_experts_implementation({"text_config": "dense"})
    tiny(**batch)
    assert len(calls) == tiny.config.text_config.mlp_layer_types.count("sparse")


def test_an_unknown_choice_is_refused_with_the_known_ones(tiny, config):
    with pytest.raises(ValueError, match="experts_implementation=.*fastest.*"):
        tiny.set_experts_implementation("fastest")
    config.experts_implementation = "fastest"
    with pytest.raises(ValueError, match="grouped"):
        MoeVlmForConditionalGeneration(config)


@pytest.mark.parametrize("implementation", ["auto", "dense"])
def test_adapters_on_the_stacked_experts_learn_as_with_eager(implementation):
    grads = {}
    for name in ("eager", implementation):
        torch.manual_seed(0)
        wrapped = torch.nn.ModuleDict({"block": sparse_block(name)})
        lora = LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"], lora_dropout=0.0)
        adapted = get_peft_model(wrapped, lora)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.base_model.model["block"](torch.randn(9, 16)).square().sum().backward()
        grads[name] = {key: each.grad for key, each in adapted.named_parameters() if each.requires_grad}
    assert grads["eager"] and all(each.any() for each in grads["eager"].values())
    assert_same(grads[implementation], grads["eager"], rtol=1e-3, atol=1e-4)
