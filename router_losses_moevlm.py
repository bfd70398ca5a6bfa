# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""How well routers do: loads, balance, entropies, what is dropped, and the losses made of them.

Shapes: N tokens, E experts, K experts per token, L sparse layers, M modalities (text, then image; or one).
"""

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .routing_moevlm import log_probabilities


class BalanceRules(NamedTuple):
    """What router numbers depend on besides the routing; the defaults are those of a plain softmax router."""

    scoring_func: str = "softmax"
    allowed: Optional[tuple] = None  # how many experts text tokens and image tokens may visit; None: all
    per_modality: bool = False  # whether text and image tokens weigh the same in the balance loss, however many
    threshold: Optional[float] = None  # of the entropy of the mean probabilities, in nats; None: ln(allowed)


def rules_of(config):
    """The [`BalanceRules`] of a part's config."""
    allowed = None if config.expert_modalities is None else tuple(map(sum, config.modality_experts))
    return BalanceRules(
        config.scoring_func, allowed, config.router_aux_loss_per_modality, config.router_global_entropy_threshold
    )


PLAIN = BalanceRules()


class RouterStatistics(NamedTuple):
    """Router numbers of L sparse layers, each by itself, unpadded; losses and those of modalities have gradients."""

    load: Tensor  # (L, E) share of the visits that each expert got; rows sum to 1
    balance: Tensor  # (L,) Switch balance loss; 1.0 = perfect, E / K = collapsed
    z: Tensor  # (L,) router z-loss
    entropy: Tensor  # (L,) mean entropy of the router's distribution, in nats; ln(E) = undecided
    counts: Tensor  # (L, E) visits that took place
    chosen: Tensor  # (L, E) visits as chosen, before a capacity dropped any
    width: Tensor  # (L,) visits of a token that took place, their mean
    dropped: Tensor  # (L,) share of the chosen visits that a capacity dropped
    max_logit: Tensor  # (L,) largest logit; minus infinity of no token
    local_entropy: Tensor  # (L,) entropy of a token's probabilities, mean of the modalities' means
    global_entropy: Tensor  # (L,) how far the entropy of the mean probabilities is below its threshold, likewise
    modality_load: Tensor  # (L, M, E) as `load`, of each modality
    modality_balance: Tensor  # (L, M) as `balance`, of each modality; (L, 1) where they are one pool
    modality_entropy: Tensor  # (L, M) mean entropy of the tokens of each modality
    modality_shortfall: Tensor  # (L, M) as `global_entropy`, of each modality
    tokens: Tensor  # (L, M) tokens of each modality


def router_statistics(
    router_logits, router_indices, token_mask=None, *, router_choices=None, image_mask=None, rules=PLAIN
):
    """Router numbers of each layer; layers are never pooled, so opposite collapses cannot cancel.

    Args:
        router_logits: L tensors `(N, E)`; minus infinity where a token may not go.
        router_indices: L tensors `(N, K)`, the experts that were visited; the id E counts as no visit.
        token_mask: `(N,)`, 1 for a token that counts, 0 for padding; None counts all.
        router_choices: L tensors `(N, K)`, as chosen, before a capacity dropped visits; None: as visited. The balance
            loss reads these: what an overfull expert turned away is its load too.
        image_mask: `(N,)`, true for image tokens; None: one modality.
        rules: [`BalanceRules`].

    Returns:
        [`RouterStatistics`]; `balance`, `z` and the local and global entropies carry gradients.

    Source: balance: Switch (arXiv:2101.03961), eq. 4-6, with f divided by K; z: ST-MoE (arXiv:2202.08906), eq. 5;
    entropies: LIMoE (arXiv:2206.02770), with the sign and the constant that make 0 the global one's best.
    """
    layers = []
    for logits, visited, chosen in zip(router_logits, router_indices, router_choices or router_indices):
        logits = logits.float()
        keep = logits.new_ones(logits.shape[0]) if token_mask is None else token_mask.to(logits).flatten()  # (N,)
        groups = keep.unsqueeze(0)  # (M, N)
        if image_mask is not None:
            image = image_mask.to(logits).flatten()  # (N,)
            groups = torch.stack([keep * (1 - image), keep * image])
        layers.append(layer_statistics(logits, visited, chosen, groups, rules))
    return RouterStatistics(*(torch.stack(values) for values in zip(*layers)))


def layer_statistics(logits, visited, chosen, groups, rules):
    """One layer's [`RouterStatistics`] without the L axis; `groups` `(M, N)` has 1 where a token is a modality's."""
    num_experts, keep, tokens = logits.shape[-1], groups.sum(0), groups.sum(-1)  # (N,), (M,)
    total = keep.sum().clamp(min=1)
    present = (tokens > 0).to(tokens)
    even = present / present.sum().clamp(min=1)  # (M,)
    sizes = (rules.allowed or (num_experts,) * len(groups))[: len(groups)]

    logs = log_probabilities(logits, rules.scoring_func)  # (N, E)
    probabilities = logs.exp()
    entropies = -(probabilities * logs.masked_fill(logs == -math.inf, 0.0)).sum(-1)  # (N,)
    sums = (probabilities * groups.unsqueeze(-1)).sum(1)  # (M, E)
    means = sums / tokens.clamp(min=1).unsqueeze(-1)
    modality_entropy = (entropies * groups).sum(-1) / tokens.clamp(min=1)  # (M,)

    shortfall = entropy_shortfall(means, sizes, rules.threshold) * present  # (M,)

    wanted = visits(chosen, groups, num_experts)  # (M, E)
    taken = wanted if visited is chosen else visits(visited, groups, num_experts)
    counts = taken.sum(0)
    balance = balance_losses(wanted, sums, tokens, sizes, rules)  # (M,) or (1,)
    weights = even if rules.per_modality else share(tokens)  # (M,)
    peaks = logits.detach().masked_fill((keep == 0).unsqueeze(-1), -math.inf).flatten()
    return RouterStatistics(
        load=share(counts),
        balance=balance[0] if len(balance) == 1 else (balance * weights).sum(),
        z=(logits.logsumexp(-1).square() * keep).sum() / total,
        entropy=(entropies.detach() * keep).sum() / total,
        counts=counts,
        chosen=wanted.sum(0),
        width=counts.sum() / total,
        dropped=(wanted.sum() - counts.sum()) / wanted.sum().clamp(min=1),
        max_logit=torch.cat([peaks, peaks.new_full((1,), -math.inf)]).amax(),
        local_entropy=(modality_entropy * even).sum(),
        global_entropy=(shortfall * even).sum(),
        modality_load=share(taken),
        modality_balance=balance,
        modality_entropy=modality_entropy,
        modality_shortfall=shortfall,
        tokens=tokens,
    )


def visits(experts, groups, num_experts):
    """How often each modality visits each expert: `(N, K)` and `(M, N)` -> `(M, E)`; the id E counts nowhere."""
    weights = groups.repeat_interleave(experts.shape[-1], dim=-1)  # (M, N*K)
    counts = groups.new_zeros(groups.shape[0], num_experts + 1)
    return counts.index_add(1, experts.flatten(), weights)[:, :num_experts]


def share(counts):
    """`(..., E)` counts as shares that sum to 1, zeros where nothing was counted."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def balance_losses(wanted, sums, tokens, sizes, rules):
    """The balance loss of each modality in one layer, `(M,)`, or of their one pool, `(1,)`.

    Args:
        wanted: `(M, E)`, visits as chosen.
        sums: `(M, E)`, summed probabilities.
        tokens: `(M,)`.
        sizes: For each modality, how many experts it may visit.
        rules: Where it neither has experts of its own nor counts by itself, modalities are one pool.
    """
    if len(tokens) > 1 and not rules.per_modality and rules.allowed is None:
        wanted, sums, tokens = (value.sum(0, keepdim=True) for value in (wanted, sums, tokens))
    means = sums / tokens.clamp(min=1).unsqueeze(-1)  # (M, E)
    return torch.stack([size * each.sum() for size, each in zip(sizes, share(wanted) * means)])


def entropy_shortfall(means, sizes, threshold):
    """`max(0, threshold - H(mean probabilities))` of each modality, `(M, E)` -> `(M,)`, in nats."""
    tiny = torch.finfo(means.dtype).tiny
    entropies = -(means * means.clamp(min=tiny).log()).sum(-1)  # (M,)
    thresholds = [math.log(size) if threshold is None else threshold for size in sizes]
    return torch.stack([(wanted - found).clamp(min=0) for wanted, found in zip(thresholds, entropies)])


class RouterLosses(NamedTuple):
    """Router losses of the whole model and what they were made of; tower first, then connector, then decoder."""

    weighted: Tensor  # scalar, with the coefficients of each part and this micro-batch's share of the global batch
    aux_loss: Tensor  # scalar, mean over all layers
    z_loss: Tensor  # scalar, mean over all layers
    local_entropy_loss: Tensor  # scalar, mean over all layers
    global_entropy_loss: Tensor  # scalar, mean over all layers
    expert_load: tuple  # L tensors (E,)
    expert_counts: tuple  # L tensors (E,)
    chosen_counts: tuple  # L tensors (E,)
    expert_load_text: Optional[tuple]  # of each decoder layer (E,); None without pictures
    expert_load_image: Optional[tuple]
    router_entropy: Tensor  # (L,)
    experts_per_token: Tensor  # (L,)
    dropped_tokens: Tensor  # (L,)
    max_router_logit: Tensor  # (L,)

    def reported(self):
        """Those that [`MoeVlmOutput`] shows, by its names."""
        return {name: value for name, value in self._asdict().items() if name != "weighted"}


def count_tokens(input_ids, image_token_id, attention_mask=None):
    """Unpadded text tokens and image tokens of a batch, `(2,)` int64.

    Summed over the micro-batches and ranks of one optimizer step, this is the `num_tokens_in_batch` of
    [`MoeVlmForConditionalGeneration`].

    Args:
        input_ids: `(B, S)`.
        image_token_id: Of the config.
        attention_mask: `(B, S)`, 1 for a real token; None, or one of more dimensions, counts all.
    """
    image = input_ids == image_token_id
    plain = attention_mask is not None and attention_mask.ndim == 2
    keep = attention_mask.bool() if plain else torch.ones_like(image)
    return torch.stack([(keep & ~image).sum(), (keep & image).sum()])


def batch_shares(here, totals=None):
    """What a mean over this micro-batch weighs in the mean over the global batch.

    Args:
        here: `(M,)`, tokens of each modality in this micro-batch.
        totals: The same of the global batch, which may have a modality more; None: this micro-batch is all there is.

    Returns:
        The weight of a mean over all tokens, a scalar, and those of the modalities' own means `(M,)` where modalities
        count the same.
    """
    totals = here if totals is None else totals.to(here)
    present = (totals > 0).to(here)
    each = here / totals.clamp(min=1)[: len(here)]
    return here.sum() / totals.sum().clamp(min=1), each * (present / present.sum().clamp(min=1))[: len(here)]


def router_losses(config, outputs, attention_mask=None, num_tokens_in_batch=None):
    """The router losses of every sparse layer, padding excluded.

    Args:
        config: [`MoeVlmConfig`].
        outputs: [`MoeVlmModelOutput`] with router logits.
        attention_mask: `(B, T)`, 1 for a real token; without a 2-D mask every token counts.
        num_tokens_in_batch: `(2,)`, text tokens and image tokens of the global batch ([`count_tokens`]): the sum of
            `weighted` over its micro-batches then has the z-loss and the local entropy of the batch as a whole, and
            weighs modalities as it does. Tower and connector weigh by image tokens, that is, by pictures. None: this
            micro-batch is all there is.

    Returns:
        [`RouterLosses`], or None if no layer is sparse.
    """
    if not outputs.router_logits:
        return None
    if attention_mask is not None:
        tokens = outputs.last_hidden_state.shape[1]  # the mask covers the cache too
        plain = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2  # flex attention has no tensor
        attention_mask = attention_mask[:, -tokens:] if plain else None
    masks = (None, None, attention_mask), (None, None, outputs.image_mask)
    totals = num_tokens_in_batch
    weighted, parts, start = 0.0, [], 0
    device = outputs.last_hidden_state.device  # `device_map` may have spread the layers
    for part_config, layers, mask, image_mask in zip(
        (config.vision_config, config.connector_config, config.text_config), outputs.router_layers, *masks
    ):
        if not layers:
            continue
        logits, indices, choices = (
            tuple(value.to(device) for value in values[start : start + layers])
            for values in (outputs.router_logits, outputs.router_indices, outputs.router_choices)
        )
        rules = rules_of(part_config)
        part = router_statistics(logits, indices, mask, router_choices=choices, image_mask=image_mask, rules=rules)
        if part_config is config.text_config:
            shares = batch_shares(part.tokens[0], totals)
        else:
            image_tokens = part.tokens.new_full((1,), outputs.image_hidden_states.shape[:-1].numel())
            shares = batch_shares(image_tokens, None if totals is None else totals[1:])
        weighted = weighted + weighted_sum(part, part_config, *shares)
        parts.append(part)
        start += layers
    return join(parts, weighted)


def weighted_sum(part, config, weight, modality_weights):
    """The losses of one part, each mean over its layers, by its config's coefficients and by [`batch_shares`]."""
    balance = part.balance * weight
    if config.router_aux_loss_per_modality:
        balance = (part.modality_balance * modality_weights).sum(-1)
    terms = (
        (config.router_aux_loss_coef, balance),
        (config.router_z_loss_coef, part.z * weight),
        (config.router_local_entropy_coef, (part.modality_entropy * modality_weights).sum(-1)),
        (config.router_global_entropy_coef, (part.modality_shortfall * modality_weights).sum(-1)),
    )
    return sum(coefficient * values.mean() for coefficient, values in terms if coefficient)


def join(parts, weighted):
    """The [`RouterStatistics`] of several parts as one [`RouterLosses`]; the parts differ in E."""
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in SCALARS}
    # Of the decoder, which comes last: tower and connector see one modality.
    text, image = (None, None) if parts[-1].modality_load.shape[1] == 1 else parts[-1].modality_load.unbind(1)
    return RouterLosses(
        weighted=weighted,
        aux_loss=together["balance"].mean(),
        z_loss=together["z"].mean(),
        local_entropy_loss=together["local_entropy"].mean(),
        global_entropy_loss=together["global_entropy"].mean(),
        expert_load=tuple(load for part in parts for load in part.load),
        expert_counts=tuple(counts for part in parts for counts in part.counts),
        chosen_counts=tuple(counts for part in parts for counts in part.chosen),
        expert_load_text=None if text is None else tuple(text),
        expert_load_image=None if image is None else tuple(image),
        router_entropy=together["entropy"],
        experts_per_token=together["width"],
        dropped_tokens=together["dropped"],
        max_router_logit=together["max_logit"],
    )


# Fields of [`RouterStatistics`] with one number a layer.
SCALARS = ("balance", "z", "local_entropy", "global_entropy", "entropy", "width", "dropped", "max_logit")
