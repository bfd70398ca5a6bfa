"""The router's choices, and the router numbers against numbers made by hand.

Shapes: N tokens, D hidden, E experts, K experts per token, L layers.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from moevlm.configuration_moevlm import MoeVlmTextConfig
from moevlm.routing_moevlm import MoeVlmRouter, router_statistics


def router(**fields):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    gate = MoeVlmRouter(MoeVlmTextConfig(**{**sizes, "moe_intermediate_size": 8, **fields}))
    torch.nn.init.normal_(gate.weight, std=0.5)
    return gate


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_norm_topk_prob_decides_whether_weights_sum_to_one(norm_topk_prob):
    gate = router(norm_topk_prob=norm_topk_prob)
    sums = gate(torch.randn(50, 16)).weights.sum(-1)
    if norm_topk_prob:
        torch.testing.assert_close(sums, torch.ones(50))
    else:
        assert (sums < 0.999).any() and (sums <= 1).all()


def test_renormalising_does_not_change_the_choice():
    tokens = torch.randn(50, 16)
    gate = router()
    chosen = gate(tokens).experts
    gate.selection.norm_topk_prob = False
    assert torch.equal(gate(tokens).experts, chosen)


def test_the_router_is_float32_in_a_bfloat16_model():
    gate = router().to(torch.bfloat16)
    tokens = torch.randn(20, 16, dtype=torch.bfloat16)
    routing = gate(tokens)
    assert routing.logits.dtype == torch.float32 and routing.weights.dtype == torch.bfloat16
    assert torch.equal(routing.logits, F.linear(tokens.float(), gate.weight.float()))


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
