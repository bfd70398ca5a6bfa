"""The sparse block against a loop that anyone believes, and the router numbers against numbers made by hand.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, L layers.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from moevlm.base_moevlm import IS_TRANSFORMERS_5
from moevlm.configuration_moevlm import MoeVlmTextConfig
from moevlm.experts_moevlm import MoeVlmSparseBlock, router_statistics

# The decorator of transformers 5 replaces our loop by its own; 4.57 always runs ours.
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"] if IS_TRANSFORMERS_5 else ["eager"]
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


def swiglu(token, gate, up, down):
    return down @ (F.silu(gate @ token) * (up @ token))


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


def output_and_gradients(block, forward, tokens):
    """The output, then the gradients of the tokens and of every parameter, named."""
    block.zero_grad()
    tokens = tokens.clone().requires_grad_()
    output = forward(tokens)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)  # no symmetric sum that hides a swap
    (output.float() * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"output": output, "tokens": tokens.grad, **gradients}


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


def test_no_token_gives_no_output_and_zero_gradients():
    block = sparse_block()
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


def test_visits_to_the_id_num_experts_are_skipped():
    block = sparse_block()
    tokens, weights = torch.randn(3, 16), torch.rand(3, 2)
    experts = torch.tensor([[0, 4], [4, 4], [2, 1]])
    silenced = weights.masked_fill(experts == 4, 0.0)
    expected = block.experts(tokens, experts.clamp(max=3), silenced)
    torch.testing.assert_close(block.experts(tokens, experts, weights), expected, **FLOAT32)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_norm_topk_prob_decides_whether_weights_sum_to_one(norm_topk_prob):
    block = sparse_block(norm_topk_prob=norm_topk_prob)
    sums = block.gate(torch.randn(50, 16)).weights.sum(-1)
    if norm_topk_prob:
        torch.testing.assert_close(sums, torch.ones(50))
    else:
        assert (sums < 0.999).any() and (sums <= 1).all()


def test_renormalising_does_not_change_the_choice():
    tokens = torch.randn(50, 16)
    block = sparse_block()
    chosen = block.gate(tokens).experts
    block.gate.selection.norm_topk_prob = False
    assert torch.equal(block.gate(tokens).experts, chosen)


def test_the_shared_expert_is_added_for_every_token():
    block = sparse_block(n_shared_experts=2)
    tokens = torch.randn(7, 16)
    together, shared = block(tokens), block.shared_expert
    assert shared.gate_proj.weight.shape == (2 * 8, 16)
    block.shared_expert = None
    torch.testing.assert_close(together, block(tokens) + shared(tokens))


def test_the_router_is_float32_in_a_bfloat16_model():
    block = sparse_block(dtype=torch.bfloat16)
    tokens = torch.randn(20, 16, dtype=torch.bfloat16)
    routing = block.gate(tokens)
    assert routing.logits.dtype == torch.float32 and routing.weights.dtype == torch.bfloat16
    assert torch.equal(routing.logits, F.linear(tokens.float(), block.gate.weight.float()))


def test_the_router_is_float32_under_autocast():
    block = sparse_block()
    tokens = torch.randn(20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = block.gate(tokens).logits
        output = block(tokens)
    assert torch.equal(logits, block.gate(tokens).logits)
    # Only the experts' products are bf16: one wrong choice of expert would be an error of the outputs' own size.
    torch.testing.assert_close(output.float(), block(tokens), rtol=0.05, atol=0.15)


# Router statistics, by hand


def one_hot_logits(choices, num_experts, height=30.0):
    """Logits `(N, E)` of a router that is sure of its choice: the others' probability is e^-30."""
    return F.one_hot(torch.tensor(choices), num_experts).float() * height


def statistics_of(choices, num_experts, token_mask=None):
    """Statistics of one layer with K = 1 and a sure router."""
    indices = torch.tensor(choices).unsqueeze(-1)
    return router_statistics([one_hot_logits(choices, num_experts)], [indices], token_mask)


def test_perfect_balance_scores_one():
    statistics = statistics_of([0, 1, 2, 3] * 5, 4)
    torch.testing.assert_close(statistics.balance, torch.ones(1))
    torch.testing.assert_close(statistics.load, torch.full((1, 4), 0.25))


def test_an_undecided_router_scores_one_whatever_the_choice():
    statistics = router_statistics([torch.zeros(6, 4)], [torch.zeros(6, 2, dtype=torch.long)])
    torch.testing.assert_close(statistics.balance, torch.ones(1))
    torch.testing.assert_close(statistics.entropy, torch.tensor([math.log(4)]))


@pytest.mark.parametrize("num_experts, top_k", [(4, 1), (8, 2), (6, 3)])
def test_a_collapsed_router_scores_experts_over_experts_per_token(num_experts, top_k):
    logits = torch.full((10, num_experts), -30.0)
    logits[:, :top_k] = 30.0
    statistics = router_statistics([logits], [torch.arange(top_k).expand(10, top_k)])
    torch.testing.assert_close(statistics.balance, torch.tensor([num_experts / top_k]))
    torch.testing.assert_close(statistics.load[0, :top_k], torch.full((top_k,), 1 / top_k))


def test_opposite_collapses_in_four_layers_do_not_cancel():
    logits = [one_hot_logits([expert] * 10, 4) for expert in range(4)]
    indices = [torch.full((10, 1), expert) for expert in range(4)]
    torch.testing.assert_close(router_statistics(logits, indices).balance, torch.full((4,), 4.0))


def test_padding_counts_in_no_router_number():
    real, padding = [0, 1, 1, 2], [0, 3, 3]
    mask = torch.tensor([1] * 4 + [0] * 3)
    for padded, alone in zip(statistics_of(real + padding, 4, mask), statistics_of(real, 4)):
        torch.testing.assert_close(padded, alone)


def test_padding_gets_no_gradient_from_the_router_losses():
    logits = torch.randn(6, 4, requires_grad=True)
    mask = torch.tensor([0, 0, 1, 1, 1, 1])
    statistics = router_statistics([logits], [logits.topk(2).indices], mask)
    (statistics.balance + statistics.z).sum().backward()
    assert torch.count_nonzero(logits.grad[:2]) == 0
    assert torch.count_nonzero(logits.grad[2:].abs().sum(-1)) == 4


def test_a_mask_of_nothing_gives_zeros_not_nans():
    statistics = statistics_of([0, 1], 4, torch.zeros(2))
    assert all(torch.count_nonzero(value) == 0 for value in statistics)


def test_z_by_hand():
    # logsumexp(ln 1, ln 2, ln 3, ln 4) = ln 10, of four equal logits a: a + ln 4
    logits = torch.stack([torch.tensor([1.0, 2.0, 3.0, 4.0]).log(), torch.ones(4)])
    expected = (math.log(10) ** 2 + (1 + math.log(4)) ** 2) / 2
    statistics = router_statistics([logits], [logits.topk(2).indices])
    torch.testing.assert_close(statistics.z, torch.tensor([expected]))


def test_load_counts_visits_by_hand():
    indices = torch.tensor([[0, 1], [0, 2], [0, 1]])
    statistics = router_statistics([torch.randn(3, 4)], [indices])
    torch.testing.assert_close(statistics.load, torch.tensor([[3.0, 2.0, 1.0, 0.0]]) / 6)


def test_the_balance_loss_pulls_the_busy_expert_down():
    logits = torch.zeros(4, 4, requires_grad=True)
    indices = torch.tensor([[0], [0], [0], [1]])
    router_statistics([logits], [indices]).balance.sum().backward()
    per_expert = logits.grad.sum(0)
    assert per_expert[0] > per_expert[1] > per_expert[2] == per_expert[3]
