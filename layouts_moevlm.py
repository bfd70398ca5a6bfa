# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Other layouts of the same experts: single linear layers for tools that know no stacked tensors, and back.

Shapes: N tokens, D hidden, E experts, F expert width, K experts per token.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_moevlm import MoeVlmConfig, MoeVlmTextConfig
from .experts_moevlm import MoeVlmExperts
from .summary_moevlm import DECODER
from .vision_moevlm import MoeVlmVisionExperts

SPARSE_KEY = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer around these very values, without drawing any first; it learns where they do."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


class UnpackedExpert(nn.Module):
    """One expert of linear layers: gated (`gate_proj`, `up_proj`, `down_proj`), or plain (`gate_proj` None)."""

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, act_fn: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn

    def forward(self, tokens: Tensor) -> Tensor:
        """`(N, D)` -> `(N, D)`."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(tokens)))
        return self.down_proj(self.act_fn(self.gate_proj(tokens)) * self.up_proj(tokens))


class UnpackedExperts(nn.ModuleList):
    """The experts of a sparse block as modules of linear layers; same call, same weights."""

    @torch.enable_grad()  # without, a view of a parameter that learns says that it does not
    def __init__(self, packed: MoeVlmExperts | MoeVlmVisionExperts):
        act_fn = packed.act_fn
        if isinstance(packed, MoeVlmVisionExperts):
            rows = zip(packed.up_proj, packed.up_proj_bias, packed.down_proj, packed.down_proj_bias)
            experts = [UnpackedExpert(None, linear(up, b1), linear(down, b2), act_fn) for up, b1, down, b2 in rows]
        else:
            rows = zip(packed.gate_up_proj, packed.down_proj)
            experts = [
                UnpackedExpert(*(linear(half) for half in gate_up.chunk(2)), linear(down), act_fn)
                for gate_up, down in rows
            ]
        super().__init__(experts)
        self.num_experts = packed.num_experts
        # In a tuple, so that its emptied parameters are nobody's.
        self.emptied = (packed.to("meta"),)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As [`MoeVlmExperts.forward`]: tokens `(N, D)`, experts and weights `(N, K)` -> `(N, D)`."""
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            tokens, rank = (top_k_index == index).nonzero(as_tuple=True)  # (visits,) both
            if len(tokens):
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, rank].unsqueeze(-1)
                output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def unpack_experts(model: nn.Module) -> nn.Module:
    """Replace all stacked experts by linear layers, in place: quantizers and other tools then find them.

    What is frozen stays frozen. Nothing is rounded: [`pack_experts`] gives back the same bits. Pack before
    `save_pretrained`: `from_pretrained` builds stacked experts, and finds none in a checkpoint of linear layers.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (MoeVlmExperts, MoeVlmVisionExperts)):
                setattr(parent, name, UnpackedExperts(child))
    return model


def pack_experts(model: nn.Module) -> nn.Module:
    """Undo [`unpack_experts`], in place.

    Raises:
        TypeError: A layer is no plain linear layer any more (quantized, or with an adapter).
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, UnpackedExperts):
                setattr(parent, name, packed_again(child))
    return model


@torch.enable_grad()  # as above: a stack learns where one of its experts does
def packed_again(experts: UnpackedExperts) -> nn.Module:
    for name, layer in experts.named_modules():
        if name.endswith("_proj") and type(layer) is not nn.Linear:
            raise TypeError(f"{name} has become a {type(layer).__name__}; only nn.Linear layers can be stacked again")
    (packed,) = experts.emptied
    tensors = {"down_proj": torch.stack([expert.down_proj.weight for expert in experts])}  # (E, D, F)
    up = torch.stack([expert.up_proj.weight for expert in experts])  # (E, F, D)
    if isinstance(packed, MoeVlmVisionExperts):
        tensors["up_proj"] = up
        for name in ("up_proj", "down_proj"):
            tensors[f"{name}_bias"] = torch.stack([getattr(expert, name).bias for expert in experts])
    else:
        gate = torch.stack([expert.gate_proj.weight for expert in experts])
        tensors["gate_up_proj"] = torch.cat([gate, up], dim=1)  # (E, 2F, D)
    for name, tensor in tensors.items():
        setattr(packed, name, nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))
    return packed


def qwen3_moe_config(config: MoeVlmConfig) -> dict[str, Any]:
    """Fields of a `Qwen3MoeConfig` that runs the decoder of this model.

    Raises:
        ValueError: The decoder has something that Qwen3-MoE has not; each field is named.
    """
    text = config.text_config
    wanted = {"use_qk_norm": True, "qk_norm_per_head": True, "attention_bias": False, "n_shared_experts": 0}
    wanted |= {"scoring_func": "softmax", "routed_scaling_factor": 1.0, "use_router_bias": False, "n_group": 1}
    wanted |= {"router_top_p": None, "expert_modalities": None}
    other = [f"{name}={getattr(text, name)!r}" for name, value in wanted.items() if getattr(text, name) != value]
    if other:
        raise ValueError(f"Qwen3-MoE has no {', '.join(other)}; export the experts' names alone")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps")
    names += ("tie_word_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    names += ("pad_token_id", "bos_token_id", "eos_token_id")
    dense = [i for i, kind in enumerate(text.mlp_layer_types) if kind == "dense"]
    return {name: getattr(text, name) for name in names} | rope_fields(text) | {"mlp_only_layers": dense}


def rope_fields(text: MoeVlmTextConfig) -> dict[str, Any]:
    """Rotary settings, in the form of the installed transformers line."""
    if hasattr(text, "rope_theta"):
        return {"rope_theta": text.rope_theta, "rope_scaling": text.rope_scaling}
    return {"rope_parameters": text.rope_parameters}


def qwen3_moe_keys(state: Mapping[str, Tensor], stacked: bool = False) -> dict[str, Tensor]:
    """The decoder of a state dict of ours in Qwen3-MoE's naming, every expert by itself; the tensors are views.

    A tied head is left out, as in any checkpoint. With `stacked`, experts stay stacked, as transformers 5 holds them in
    memory.
    """
    out, words = {}, state[f"{DECODER}embed_tokens.weight"]
    for key, tensor in state.items():
        tied = key == "lm_head.weight" and not tensor.is_meta and tensor.data_ptr() == words.data_ptr()
        if tied or not key.startswith((DECODER, "lm_head.")):
            continue
        name = key.replace(DECODER, "model.", 1)
        found = SPARSE_KEY.fullmatch(name)
        if found is None or stacked:
            out[name] = tensor
            continue
        parts = [("down_proj", tensor)]
        if found[2] == "gate_up_proj":
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1))  # (E, F, D) both
        for part, weights in parts:
            out |= {f"{found[1]}{e}.{part}.weight": weight for e, weight in enumerate(weights)}
    return out
