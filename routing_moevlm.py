# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token visits: the router, its top-k selection, and the numbers that say whether it does well.

Shapes: N tokens, D hidden, E experts, K experts per token, L sparse layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


__all__ = ["MoeVlmRouter", "MoeVlmSelection", "RouterStatistics", "Routing", "router_statistics"]
