# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""From a sparse model to a smaller one: fewer experts a layer, or dense; what is kept is what the router used.

Shapes: N tokens, D hidden, E experts, F expert width, I width of a dense layer, n experts that together fill it, C
copies of n slices each, c of them kept.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .configuration_moevlm import MoeVlmConfig
from .routing_moevlm import MoeVlmRouter
from .summary_moevlm import CONNECTOR, DECODER, TOWER, sparse_layers

WAYS = ("drop", "merge")
# Stacked tensors of either form of experts; the width runs along dimension 1 but for down_proj.
INTO, OUT, BIAS = ("gate_up_proj", "up_proj", "up_proj_bias"), "down_proj", "down_proj_bias"


@dataclass
class DowncycleArguments:
    """Which model is made smaller, how, and on whose use of the experts."""

    model_name_or_path: str = field(metadata={"help": "Sparse checkpoint of ours."})
    output_dir: str = field(default="outputs/downcycled", metadata={"help": "Checkpoint and downcycling.json."})
    to_experts: int = field(default=0, metadata={"help": "Experts that a decoder layer keeps; 0: no layer has any."})
    way: str = field(default="drop", metadata={"help": "drop, or merge: what becomes of the other experts."})
    data: str = field(default="configs/data/default.yaml", metadata={"help": "Mixture whose eval part is counted on."})
    max_samples: int = field(default=128, metadata={"help": "Most records to count on."})
    batch_size: int = field(default=16, metadata={"help": "Records of a batch."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is ours in output_dir."})

    def __post_init__(self):
        if self.way not in WAYS:
            raise ValueError(f"way={self.way!r} must be one of {', '.join(WAYS)}")
        if self.to_experts < 0:
            raise ValueError(f"to_experts={self.to_experts} is negative; 0 makes decoder and tower dense")
        for name in ("max_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1: experts are chosen by their use")


@dataclass
class Use:
    """How a layer's experts were used."""

    visits: Tensor  # (E,) float64
    weight: Tensor  # (E,) float64, sum of the routing weights
    tokens: int


@torch.no_grad()
def count_use(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[dict[str, Use], float]:
    """The use of every sparse layer's experts on these batches, padding excluded, by name of the block; mean loss.

    Args:
        model: In evaluation mode.
        batches: With `labels`, and with `attention_mask` where there is padding.
    """
    use: dict[str, Use] = {}
    mask: list[Tensor | None] = [None]

    def watch(name):
        def count(router, arguments, routing):
            experts, weights = routing.experts, routing.weights.double()
            if mask[0] is not None and mask[0].numel() == len(experts) and DECODER in name:
                keep = mask[0].flatten().bool()
                experts, weights = experts[keep], weights[keep]
            size = router.weight.shape[0]
            visited = experts < size  # the id E marks a visit that is skipped
            layer = use.setdefault(name, Use(torch.zeros(size).double(), torch.zeros(size).double(), 0))
            layer.visits += torch.bincount(experts[visited], minlength=size)
            layer.weight.index_add_(0, experts[visited], weights[visited])
            layer.tokens += len(experts)

        return count

    routers = {name: module for name, module in model.named_modules() if isinstance(module, MoeVlmRouter)}
    hooks = [module.register_forward_hook(watch(name.removesuffix("gate"))) for name, module in routers.items()]
    loss, labels = 0.0, 0
    try:
        for batch in tqdm(batches, desc="counting visits", unit="batch"):
            mask[0] = batch.get("attention_mask")
            outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
            targets = batch["labels"][:, 1:]
            logits = outputs.logits[:, :-1].float()
            loss += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            labels += int((targets != -100).sum())
    finally:
        for hook in hooks:
            hook.remove()
    return use, loss / max(1, labels)


def blocks_of(config: MoeVlmConfig) -> dict[str, Any]:
    """The sparse layers that have a dense form: name of the block, and its part's config.

    They are the decoder's, and the tower's unless its experts have gates (`expert_form` swiglu), beside layers without.
    """
    parts = [(DECODER, config.text_config)]
    if config.vision_config.expert_form == "mlp":
        parts.append((TOWER, config.vision_config))
    return {
        f"{prefix}layers.{i}.mlp.": part
        for prefix, part in parts
        for i, kind in enumerate(part.mlp_layer_types)
        if kind == "sparse"
    }


def made_smaller(
    state: Mapping[str, Tensor], config: MoeVlmConfig, use: Mapping[str, Use], arguments: DowncycleArguments
) -> tuple[dict[str, Tensor], MoeVlmConfig, list[str]]:
    """State dict and config with fewer experts, or without any, as the arguments say; remarks on what stays.

    Raises:
        ValueError: There is nothing to make smaller, or no picture by which the tower's experts were used; see also
            [`fewer_experts`] and [`collapsed`].
    """
    if not arguments.to_experts and not blocks_of(config).keys() <= use.keys():
        raise ValueError(
            f"data={arguments.data}: no picture among the first {arguments.max_samples} records, so nothing tells how "
            "to weigh the tower's experts; raise max_samples, or give data with pictures"
        )
    if config.text_config.tie_word_embeddings:
        state = {key: tensor for key, tensor in state.items() if key != "lm_head.weight"}
    if arguments.to_experts:
        state, smaller = fewer_experts(state, config, use, arguments.to_experts, arguments.way)
    else:
        state, smaller = collapsed(state, config, use)
    before, after = sparse_layers(config), sparse_layers(smaller)
    if after == before:
        reason = "those of tower or connector that are left have no dense form" if after else "it is dense already"
        raise ValueError(f"model_name_or_path={arguments.model_name_or_path} has no experts to take away: {reason}")
    others = [("tower", "vision."), ("connector", "connector")]
    kept = [part for part, name in others if any(layer.startswith(name) for layer in after)]
    remarks = [f"the {part} keeps its experts" for part in kept]
    name = "router_global_entropy_threshold"
    old, new = (getattr(each.text_config, name) for each in (config, smaller))
    if arguments.to_experts and old != new:
        remarks.append(f"the decoder's {name} is lowered from {old} to ln({arguments.to_experts}) = {new:.4f}")
    return state, smaller, remarks


def slices_of(part: Any) -> int:
    """n, the neighbouring experts that are the routed slices of one copy of a layer, as run_upcycle.py's fine_grained
    mode makes them; 1 where each expert stands for itself.

    That mode alone leaves a factor of n on weights of experts that fill a dense layer by n beside the shared ones.
    """
    slices = part.intermediate_size // part.moe_intermediate_size - part.n_shared_experts
    fits = part.intermediate_size % part.moe_intermediate_size == 0 and slices > 1 and part.num_experts % slices == 0
    return slices if fits and part.routed_scaling_factor == slices else 1


def check_experts(config: MoeVlmConfig, experts: int) -> int:
    """n, the slices of a copy, of which each decoder layer can keep `experts` experts.

    Raises:
        ValueError: Too few experts to drop any, a copy that would be cut, or experts that are bound to groups or
            modalities.
    """
    text = config.text_config
    if "sparse" not in text.mlp_layer_types:
        raise ValueError(
            f"to_experts={experts} is for the decoder, which is dense; to_experts=0 takes the tower's away"
        )
    if not 1 <= experts < text.num_experts:
        raise ValueError(f"to_experts={experts} must be at least 1 and below the {text.num_experts} there are")
    if text.n_group > 1 or text.expert_modalities:
        raise ValueError("experts of groups or modalities are not interchangeable; n_group 1 and no modalities only")
    slices = slices_of(text)
    if experts % slices:
        raise ValueError(
            f"to_experts={experts} is no multiple of the {slices} routed slices of which a copy of the layer is made; "
            f"take one, such as {max(slices, experts // slices * slices)}"
        )
    return slices


def fewer_experts(
    state: Mapping[str, Tensor], config: MoeVlmConfig, use: Mapping[str, Use], experts: int, way: str = "drop"
) -> tuple[dict[str, Tensor], MoeVlmConfig]:
    """State dict and config with the `experts` most visited experts of each decoder layer; slices in whole copies.

    Args:
        use: Of [`count_use`], by name of the block.
        way: "drop" leaves the others out; "merge" adds each of them, weighed by visits, to the kept expert whose
            router row points most nearly the same way; a copy's slices, each to the same slice of the kept copy.

    Raises:
        ValueError: As [`check_experts`].

    Source: merging by routing similarity and use: Li et al. 2023 (arXiv:2310.01334), sec. 3.2, without the alignment
    of hidden units, which copies of one layer do not need.
    """
    text, slices = config.text_config, check_experts(config, experts)
    state = dict(state)
    for block, part in blocks_of(config).items():
        if part is not text:
            continue
        rows = state[f"{block}gate.weight"].float().unflatten(0, (-1, slices)).mean(1)  # (C, D)
        kept, shares = shares_of(use[block].visits.unflatten(0, (-1, slices)), rows, experts // slices, way)
        shares = torch.einsum("cos,st->csot", shares, torch.eye(slices).double())  # slice s of slices s alone
        shares = shares.flatten(2).flatten(0, 1)  # (experts, E)
        chosen = (kept.unsqueeze(1) * slices + torch.arange(slices)).flatten()  # (experts,)
        for key in [key for key in state if key.startswith(f"{block}experts.")]:
            state[key] = mixed(shares, state[key])
        for key in [key for key in state if key.startswith(f"{block}gate.")]:
            state[key] = state[key][chosen].clone()
    fields = config.part_fields()
    top_k = min(text.num_experts_per_tok, experts)
    fields["text_config"] |= {"num_experts": experts, "num_experts_per_tok": top_k}
    if (threshold := text.router_global_entropy_threshold) is not None:
        fields["text_config"]["router_global_entropy_threshold"] = min(threshold, math.log(experts))
    return state, MoeVlmConfig(**fields, image_token_id=config.image_token_id)


def shares_of(visits: Tensor, rows: Tensor, copies: int, way: str) -> tuple[Tensor, Tensor]:
    """Which copies are kept, `(c,)`, and the share of each old copy in each of them, by slice, `(c, C, n)`.

    Args:
        visits: `(C, n)`.
        rows: Router rows `(C, D)`.
    """
    kept = visits.sum(1).argsort(descending=True, stable=True)[:copies].sort().values
    shares = torch.zeros(copies, *visits.shape).double()
    shares[torch.arange(copies), kept] = visits[kept].clamp(min=1)
    if way == "merge":
        likeness = nn.functional.cosine_similarity(rows.unsqueeze(1), rows[kept].unsqueeze(0), dim=-1)  # (C, c)
        for old in set(range(len(rows))) - set(kept.tolist()):
            shares[likeness[old].argmax(), old] = visits[old]
    return kept, shares / shares.sum(1, keepdim=True)


def mixed(shares: Tensor, stacked: Tensor) -> Tensor:
    """Weighted means: shares `(n, E)`, stacked experts `(E, ...)` -> `(n, ...)`; one expert alone keeps its bits."""
    return torch.stack(
        [
            stacked[int(row.argmax())] if int((row > 0).sum()) == 1 else torch.tensordot(row, stacked.double(), 1)
            for row in shares
        ]
    ).to(stacked.dtype)


def collapsed(
    state: Mapping[str, Tensor], config: MoeVlmConfig, use: Mapping[str, Use]
) -> tuple[dict[str, Tensor], MoeVlmConfig]:
    """State dict and config of the dense model that is nearest in weights: decoder and tower without experts.

    Of the tower those of [`blocks_of`] only. The connector's go where they add nothing yet (a last matrix of zeros),
    and stay otherwise: they have no dense form.
    Experts of the dense layer's width become their mean, weighed by use. Narrower ones become the n slices that fill
    it beside the shared expert: slice s is the mean of the experts e with e mod n = s, scaled by the routing weight
    that they got together. That is the parent again where the experts are still those of run_upcycle.py.

    Raises:
        ValueError: Experts that do not fill the dense layer, or a gated shared expert.
    """
    state, fields = dict(state), config.part_fields()
    for block, part in blocks_of(config).items():
        layer = dense_layer(state, block, part, use[block])
        state = {key: tensor for key, tensor in state.items() if not key.startswith(block)} | layer
    for name in ("text_config", "vision_config") if config.vision_config.expert_form == "mlp" else ("text_config",):
        part = fields[name]
        part |= {"mlp_layer_types": ["dense"] * part["num_hidden_layers"], "shared_expert_mix": None}
        part |= {"n_group": 1, "topk_group": 1, "router_global_entropy_threshold": None}  # of experts that are gone
    fields["text_config"] |= {"n_shared_experts": 0, "expert_modalities": None}
    block = f"{CONNECTOR}mlp."
    if not any(tensor.any() for key, tensor in state.items() if key.startswith(block) and OUT in key):
        state = {key: tensor for key, tensor in state.items() if not key.startswith((block, f"{CONNECTOR}norm."))}
        fields["connector_config"]["num_experts"] = 0
    return state, MoeVlmConfig(**fields, image_token_id=config.image_token_id)


def dense_layer(state: Mapping[str, Tensor], block: str, part, use: Use) -> dict[str, Tensor]:
    """One sparse block as a dense layer, by our keys."""
    width, shared = part.moe_intermediate_size, part.n_shared_experts * part.moe_intermediate_size
    mix = part.shared_expert_mix
    beside = shared if mix is None else 0  # a mixed one lies over the routed units
    lanes = (part.intermediate_size - beside) // width
    fits = lanes >= 1 and part.num_experts % lanes == 0 and lanes * width + beside == part.intermediate_size
    if not fits or part.shared_expert_gate or (mix is not None and shared != part.intermediate_size):
        raise ValueError(
            f"{part.num_experts} experts of moe_intermediate_size={width} with {part.n_shared_experts} shared ones do "
            f"not make a dense layer of intermediate_size={part.intermediate_size}; use fewer experts instead"
        )
    weight = use.weight.clamp(min=torch.finfo(torch.float64).tiny).reshape(-1, lanes)  # (E/n, n)
    shares = torch.zeros(lanes, part.num_experts).double()
    for lane in range(lanes):
        shares[lane, lane::lanes] = weight[:, lane] / weight[:, lane].sum()
    mass = weight.sum(0) / use.tokens  # (n,), routing weight that a token gives to a slice
    tensors = {key.removeprefix(f"{block}experts."): state[key] for key in state if key.startswith(f"{block}experts.")}
    made = {name: mixed(shares, tensor).double() for name, tensor in tensors.items()}
    out = (made[OUT] * mass[:, None, None]).transpose(0, 1).flatten(1)  # (D, n * F)
    into = [half for name in INTO if name in made for half in made[name].chunk(2 if name == INTO[0] else 1, dim=1)]
    into = [half.flatten(0, 1) for half in into]  # (n * F, D) or (n * F,)
    if shared:
        always = [state[f"{block}shared_expert.{name}_proj.weight"].double() for name in ("gate", "up", "down")]
        if mix is None:
            into = [torch.cat([mine, other]) for mine, other in zip(always, into)]
            out = torch.cat([always[2], out], dim=1)
        else:
            into = [(1 - mix) * other + mix * mine for mine, other in zip(always, into)]
            out = (1 - mix) * out + mix * always[2]
    dtype = tensors[OUT].dtype
    if BIAS in made:
        bias = (use.weight / use.tokens) @ tensors[BIAS].double()  # (D,)
        named = {"fc1.weight": into[0], "fc1.bias": into[1], "fc2.weight": out, "fc2.bias": bias}
    else:
        named = {"gate_proj.weight": into[0], "up_proj.weight": into[1], "down_proj.weight": out}
    return {block + name: tensor.to(dtype).contiguous() for name, tensor in named.items()}
