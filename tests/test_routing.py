"""The router's choices without options.

Shapes: N tokens, D hidden, E experts, K experts per token.
"""

import pytest
import torch
from torch.nn import functional as F

from moevlm.configuration_moevlm import MoeVlmTextConfig
from moevlm.routing_moevlm import MoeVlmRouter


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
