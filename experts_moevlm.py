# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The experts themselves, and the block that joins them with their router.

Shapes: B batch, S sequence, N = B*S tokens, D hidden, E experts, K experts per token, F expert width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .routing_moevlm import MoeVlmRouter

try:  # transformers 5: lets every engine that knows the interface replace the experts' forward
    from transformers.integrations import use_experts_implementation
except ImportError:  # transformers 4

    def use_experts_implementation(experts_class):
        return experts_class


@use_experts_implementation
class MoeVlmExperts(nn.Module):
    """E SwiGLU experts, stacked: the same tensors on disk, in memory and on both transformers lines."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.expert_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """The weighted sum of each token's experts: sort the visits by expert once, then one product per expert.

        Args:
            hidden_states: Tokens `(N, D)`.
            top_k_index: Experts `(N, K)`; the id `num_experts` marks a visit to skip (expert parallelism).
            top_k_weights: Weights `(N, K)`.

        Returns:
            `(N, D)` in the dtype of `hidden_states`.
        """
        top_k = top_k_index.shape[-1]
        visits = top_k_index.flatten()  # (N*K,)
        order = visits.argsort(stable=True)
        counts = torch.bincount(visits, minlength=self.num_experts + 1)[: self.num_experts].tolist()
        order = order[: sum(counts)]
        rows = hidden_states[order // top_k]  # (visits, D), grouped by expert
        # unbind, not weight[e]: each index would build a zero gradient of all E experts.
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        outputs = []
        for expert, tokens in enumerate(rows.split(counts)):
            if counts[expert]:
                gate, up = F.linear(tokens, gate_up[expert]).chunk(2, dim=-1)  # (visits of this expert, F) both
                outputs.append(F.linear(self.act_fn(gate) * up, down[expert]))
        if not outputs:
            # No token at all: zero, yet connected, so that every rank of a distributed run has gradients.
            return hidden_states * (0.0 * (self.gate_up_proj.sum() + self.down_proj.sum() + top_k_weights.sum()))
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order].unsqueeze(-1)  # (visits, D)
        summed = torch.zeros_like(hidden_states, dtype=weighted.dtype)
        return summed.index_add(0, order // top_k, weighted).to(hidden_states.dtype)


class MoeVlmMLP(nn.Module):
    """A dense SwiGLU layer (Shazeer 2020, arXiv:2002.05202), also the shared expert of a sparse block."""

    def __init__(self, hidden_size, intermediate_size, activation):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_states):
        """`(..., D)` -> `(..., D)`."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoeVlmSparseBlock(nn.Module):
    """A feed-forward layer of routed experts, plus a shared one if `n_shared_experts` > 0.

    The shared expert follows DeepSeekMoE (arXiv:2401.06066, eq. 9): its output is added to the routed sum.
    """

    def __init__(self, config):
        super().__init__()
        self.gate = MoeVlmRouter(config)
        self.experts = MoeVlmExperts(config)
        self.shared_expert = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_expert = MoeVlmMLP(config.hidden_size, width, config.expert_act)

    def forward(self, hidden_states):
        """`(..., D)` -> `(..., D)`: one tensor, so that an engine can fuse the block; routing is recorded beside it."""
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        routing = self.gate(tokens)
        output = self.experts(tokens, routing.experts, routing.weights).reshape(hidden_states.shape)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)
        return output


__all__ = ["MoeVlmExperts", "MoeVlmMLP", "MoeVlmSparseBlock"]
