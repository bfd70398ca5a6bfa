# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token visits: the router with its scores, its choice, its bias and its capacity.

Shapes: N tokens, D hidden, E experts, K experts per token, G groups of experts.
"""

import math
from contextlib import nullcontext
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Routing(NamedTuple):
    """What a router decided for N tokens."""

    logits: Tensor  # (N, E) float32; minus infinity where a token's modality may not go
    weights: Tensor  # (N, K) in the dtype of the tokens; 0 for a visit that does not take place
    experts: Tensor  # (N, K) int64; the id E marks a visit that does not take place


def log_probabilities(logits, scoring_func):
    """Logarithms `(N, E)` of the router's probabilities: its scores divided by their sum.

    Args:
        logits: `(N, E)` in float32; minus infinity gives probability 0.
        scoring_func: "softmax" or "sigmoid"; for the latter `sigmoid(l) / sum sigmoid(l)`, computed as the softmax of
            `log sigmoid(l)`, which does not underflow.
    """
    return (logits if scoring_func == "softmax" else F.logsigmoid(logits)).log_softmax(-1)


class MoeVlmSelection(nn.Module):
    """The choice of K experts, without parameters. A module, because what a module returns can be recorded."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_experts, self.most = config.num_experts, config.max_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scoring_func = config.scoring_func
        self.scaling = config.routed_scaling_factor
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.top_p = config.router_top_p
        self.masked = config.expert_modalities is not None

    @property
    def top_k(self):
        """K, read anew each time: a config changed after loading counts."""
        return self.config.num_experts_per_tok

    def width(self, num_experts_per_tok):
        """K of this call.

        Raises:
            ValueError: the wish is no whole number, below 1, or above what some token can reach.
        """
        width = self.top_k if num_experts_per_tok is None else num_experts_per_tok
        if isinstance(width, bool) or not isinstance(width, Integral) or not 1 <= width <= self.most:
            raise ValueError(
                f"num_experts_per_tok={width!r} must be a whole number from 1 to {self.most}: what a token of "
                f"{self.config.model_type} can reach of num_experts={self.num_experts}"
            )
        return int(width)

    def forward(self, logits, bias=None, num_experts_per_tok=None):
        """Choose the experts of every token.

        Args:
            logits: `(N, E)` in float32, minus infinity for experts that a token may not visit.
            bias: `(E,)` added to the scores for the choice, or None.
            num_experts_per_tok: K of this call, or None for the config's.

        Returns:
            Experts `(N, K)`, the id E beyond the width that `router_top_p` asks for, and weights `(N, K)` in float32.
        """
        # Softmax over the kept logs of scores equals: scores of all, choose, divide by the sum of the chosen.
        log_scores = logits if self.scoring_func == "softmax" else F.logsigmoid(logits)  # (N, E)
        ranking = log_scores if bias is None and self.groups == 1 else self.ranking(logits, bias)  # (N, E)
        kept, experts = ranking.topk(self.width(num_experts_per_tok), dim=-1)  # (N, K) both
        if self.norm_topk_prob:
            weights = kept if ranking is log_scores else log_scores.gather(-1, experts)
        else:
            weights = self.scores(logits).gather(-1, experts)
        if self.top_p is not None:
            skipped = self.beyond_width(logits, experts)
            weights = weights.masked_fill(skipped, -math.inf if self.norm_topk_prob else 0.0)
            experts = experts.masked_fill(skipped, self.num_experts)
        weights = weights.softmax(-1) if self.norm_topk_prob else weights
        return experts, weights if self.scaling == 1.0 else weights * self.scaling

    def scores(self, logits):
        """`(N, E)` -> `(N, E)`, each in 0..1."""
        return logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()

    def ranking(self, logits, bias):
        """Biased scores `(N, E)`, minus infinity outside the best groups and where a token may not go."""
        ranking = self.scores(logits.detach())
        if bias is not None:
            ranking = ranking + bias
        if self.masked:  # a score of 0 plus a bias would beat an allowed expert
            ranking = ranking.masked_fill(logits == -math.inf, -math.inf)
        if self.groups == 1:
            return ranking
        grouped = ranking.unflatten(-1, (self.groups, -1))  # (N, G, E/G)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values  # (N, G, 2 or 1)
        # A group with one allowed expert counts by it alone; one with none stays behind all others.
        group_scores = best.masked_fill(best == -math.inf, 0.0).sum(-1)  # (N, G)
        group_scores = group_scores.masked_fill(best[..., 0] == -math.inf, -math.inf)
        chosen = group_scores.topk(self.kept_groups, dim=-1).indices  # (N, kept groups)
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, chosen, False)  # (N, G)
        return grouped.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)

    def beyond_width(self, logits, experts):
        """Which of the K visits come after `router_top_p` of the probability is reached, `(N, K)`; never the first."""
        shares = log_probabilities(logits.detach(), self.scoring_func).exp().gather(-1, experts)  # (N, K)
        return F.pad(shares.cumsum(-1)[..., :-1], (1, 0)) >= self.top_p


class MoeVlmCapacity(nn.Module):
    """What is left of the chosen visits when each expert takes a limited number; all of them without a limit.

    Source: V-MoE (Riquelme et al. 2021, arXiv:2106.05974), capacity and, in sec. 4.1, batch priority routing.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.factor = config.expert_capacity_factor
        self.by_priority = config.batch_priority_routing
        self.scoring_func = config.scoring_func

    def forward(self, experts, logits):
        """Experts `(N, K)` -> experts `(N, K)`, the id E for a dropped visit.

        Args:
            experts: The choice, best first; the id E for no visit.
            logits: `(N, E)`; under batch priority the tokens of the largest probability are served first.
        """
        if self.factor is None:
            return experts
        tokens, width = experts.shape
        capacity = math.ceil(self.factor * width * tokens / self.num_experts)
        order = torch.arange(tokens, device=experts.device)
        if self.by_priority:
            largest = log_probabilities(logits.detach(), self.scoring_func).amax(-1)  # (N,)
            order = largest.argsort(descending=True, stable=True)
        queue = experts[order].t().flatten()  # (K*N,): all first choices in order, then all second ones
        by_expert = queue.argsort(stable=True)
        sorted_queue = queue[by_expert]
        first = torch.searchsorted(sorted_queue, torch.arange(self.num_experts + 1, device=queue.device))  # (E+1,)
        place = torch.arange(queue.shape[0], device=queue.device) - first[sorted_queue]  # in the expert's own queue
        served = torch.where(place < capacity, sorted_queue, self.num_experts)
        served = torch.empty_like(queue).scatter(0, by_expert, served).unflatten(0, (width, tokens)).t()  # (N, K)
        return torch.empty_like(experts).index_copy(0, order, served)


class MoeVlmRouter(nn.Module):
    """The `gate` of a sparse block: scores each expert for each token and chooses K, as [`SparseConfig`] says.

    Source: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3-5, without its noise.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.selection = MoeVlmSelection(config)
        self.capacity = MoeVlmCapacity(config)
        self.num_experts = config.num_experts
        self.jitter = config.router_jitter_noise
        self.kinds = config.expert_modalities
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.use_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.allowed_rows = config.modality_experts
        # (2, E). None counts as persistent, though never saved: accelerate looks into all that are not.
        self.register_buffer("allowed", self.allowed_experts() if self.kinds else None, persistent=not self.kinds)

    def allowed_experts(self):
        """What text tokens (row 0) and image tokens (row 1) may visit, `(2, E)` bool; also refills a meta buffer."""
        return torch.tensor(self.allowed_rows)

    def forward(self, tokens, image_mask=None, num_experts_per_tok=None):
        """Choose K experts for every token.

        Args:
            tokens: States `(N, D)` of any floating dtype.
            image_mask: `(N,)` bool, true for image tokens; None: all are text. Only `expert_modalities` asks for it.
            num_experts_per_tok: K of this call, or None for the config's.

        Returns:
            A [`Routing`]: logits `(N, E)` in float32, weights `(N, K)` in the dtype of `tokens`, experts `(N, K)`.
        """
        device = tokens.device.type
        # Float32, autocast off: bf16 softmax flips near-ties, and a flipped tie is another expert
        # (Switch, arXiv:2101.03961, sec. 2.4).
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logits = self.logits(tokens, image_mask)
            choice, weights = self.selection(logits, self.e_score_correction_bias, num_experts_per_tok)
            experts = self.capacity(choice, logits)
            if experts is not choice:
                weights = weights.masked_fill(experts == self.num_experts, 0.0)
        return Routing(logits, weights.to(tokens.dtype), experts)

    def logits(self, tokens, image_mask):
        """Logits `(N, E)` in float32, minus infinity where the modality of a token may not go."""
        states = tokens.float()
        if self.training and self.jitter:
            states = states * torch.empty_like(states).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
        logits = F.linear(states, self.weight.float())  # (N, E)
        if self.allowed is None:
            return logits
        allowed = self.allowed[0] if image_mask is None else self.allowed[image_mask.long()]  # (E,) or (N, E)
        return logits.masked_fill(~allowed, -math.inf)

    @torch.no_grad()
    def update_bias(self, counts, rate):
        """Move the bias one step toward even load: `b += rate * sign(mean(counts) - counts)`, then mean 0.

        Under `expert_modalities` experts are compared, and re-centred, with those of their own kind: image-only
        experts of a batch without pictures are not idle by the router's choice.

        Args:
            counts: `(E,)` whole numbers, how often each expert was chosen in the whole global batch: all micro-batches,
                all ranks, before a capacity dropped any.
            rate: Size of a step; the paper takes 0.001.

        Raises:
            ValueError: this router has no bias.

        Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1.
        """
        bias = self.e_score_correction_bias
        if bias is None:
            raise ValueError("this router has no bias to move; set use_router_bias=True in its config")
        counts = counts.to(bias.device).long()  # whole numbers compare exactly on every device; MPS has no float64
        for kind in sorted(set(self.kinds or ["shared"])):
            own = [e for e in range(self.num_experts) if self.kinds is None or self.kinds[e] == kind]
            moved = bias[own] + rate * (counts[own].sum() - len(own) * counts[own]).sign().float()
            bias[own] = moved - moved.mean()

    def _apply(self, fn, recurse=True):
        # bf16 has 8 bits: steps of 1e-3 would vanish in a bias near 1.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.float().to(self.e_score_correction_bias.device)
        return self
