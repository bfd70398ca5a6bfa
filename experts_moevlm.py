# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Sparse experts: the router that chooses them, the experts themselves, the block that joins both, the router losses.

Shapes: B batch, S sequence, N = B*S tokens, D hidden, E experts, K experts per token, F expert width, L sparse layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

try:  # transformers 5: lets every engine that knows the interface replace the experts' forward
    from transformers.integrations import use_experts_implementation
except ImportError:  # transformers 4

    def use_experts_implementation(experts_class):
        return experts_class


class Routing(NamedTuple):
    """What a router decided for N tokens."""

    logits: Tensor  # (N, E) float32
    weights: Tensor  # (N, K) in the dtype of the tokens
    experts: Tensor  # (N, K) int64


class MoeVlmSelection(nn.Module):
    """Top-k selection, without parameters. A module of its own, because what a module returns can be recorded."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, logits):
        """Keep the K best experts of every token.

        Args:
            logits: `(N, E)` in float32.

        Returns:
            Experts `(N, K)` and their weights `(N, K)` in float32; rows sum to 1 if `norm_topk_prob`.
        """
        if self.norm_topk_prob:
            # Softmax over the K kept logits equals softmax over all, top-k, renormalise.
            kept, experts = logits.topk(self.top_k, dim=-1)  # (N, K) both
            return experts, kept.softmax(-1)
        weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)  # (N, K) both
        return experts, weights


class MoeVlmRouter(nn.Module):
    """Softmax top-k router; it is the `gate` of a sparse block.

    Source: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3-5, without noise; renormalisation as in Mixtral
    (arXiv:2401.04088, sec. 2.1).
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.selection = MoeVlmSelection(config)

    def forward(self, tokens):
        """Choose K experts for every token.

        Args:
            tokens: States `(N, D)` of any floating dtype.

        Returns:
            A [`Routing`]: logits `(N, E)` in float32, weights `(N, K)` in the dtype of `tokens`, experts `(N, K)`.
        """
        # Float32, autocast off: bf16 softmax flips near-ties, and a flipped tie is another expert
        # (Switch, arXiv:2101.03961, sec. 2.4).
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())  # (N, E)
            experts, weights = self.selection(logits)
        return Routing(logits, weights.to(tokens.dtype), experts)


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


class RouterStatistics(NamedTuple):
    """Router numbers of L sparse layers, per layer, padding excluded."""

    load: Tensor  # (L, E) share of the visits that each expert got; rows sum to 1
    balance: Tensor  # (L,) Switch balance loss; 1.0 = perfect, E / K = collapsed
    z: Tensor  # (L,) router z-loss
    entropy: Tensor  # (L,) mean entropy of the router's distribution, in nats; ln(E) = undecided


def router_statistics(router_logits, router_indices, token_mask=None):
    """Load, balance loss and z-loss of each layer; layers are never pooled, so opposite collapses cannot cancel.

    Args:
        router_logits: L tensors `(N, E)`.
        router_indices: L tensors `(N, K)`, the experts that were visited.
        token_mask: `(N,)`, 1 for a token that counts, 0 for padding; None counts all.

    Returns:
        [`RouterStatistics`]; `balance` and `z` carry gradients.

    Source: balance: Switch (arXiv:2101.03961), eq. 4-6, with f divided by K; z: ST-MoE (arXiv:2202.08906), eq. 5.
    """
    loads, balances, zs, entropies = [], [], [], []
    for logits, experts in zip(router_logits, router_indices):
        logits = logits.float()
        num_experts = logits.shape[-1]
        keep = logits.new_ones(logits.shape[0]) if token_mask is None else token_mask.to(logits).flatten()  # (N,)
        total = keep.sum().clamp(min=1)
        visits = keep.repeat_interleave(experts.shape[-1])  # (N*K,)
        load = logits.new_zeros(num_experts).index_add(0, experts.flatten(), visits)  # (E,)
        load = load / (total * experts.shape[-1])
        log_probabilities = logits.log_softmax(-1)  # (N, E)
        probabilities = log_probabilities.exp()
        probability = (probabilities * keep.unsqueeze(-1)).sum(0) / total  # (E,)
        loads.append(load)
        balances.append(num_experts * (load * probability).sum())
        zs.append((logits.logsumexp(-1).square() * keep).sum() / total)
        entropies.append(-((probabilities * log_probabilities).sum(-1).detach() * keep).sum() / total)
    return RouterStatistics(*(torch.stack(values) for values in (loads, balances, zs, entropies)))


__all__ = ["MoeVlmExperts", "MoeVlmMLP", "MoeVlmRouter", "MoeVlmSelection", "MoeVlmSparseBlock"]
__all__ += ["RouterStatistics", "Routing", "router_statistics"]
