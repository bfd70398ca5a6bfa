# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark compares: our sparse block and whole models beside those of the installed transformers.

Shapes: D hidden, F expert width, E experts, K experts per token.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import transformers
from torch import nn

from .base_moevlm import IS_TRANSFORMERS_5
from .configuration_moevlm import MoeVlmConfig, MoeVlmTextConfig
from .experts_moevlm import MoeVlmMLP, MoeVlmSparseBlock
from .layouts_moevlm import qwen3_moe_config, qwen3_moe_keys
from .modeling_moevlm import MoeVlmForConditionalGeneration

OURS, DENSE = "ours", "dense"
# Copies the weights of each visit: beyond this many tokens it would only fill the memory.
SLOW_FROM = {"Qwen3-MoE batched_mm": 64, "Qwen3-VL-MoE": 512, "ours batched_mm": 64}
# Their backward fills a gradient of all experts for each expert: with 64 experts half a minute a step on a CPU, and
# several times the memory of the weights.
SLOW_BACKWARD, MOST_EXPERTS = ("Qwen3-MoE eager", "Qwen3-VL-MoE", "Aria"), 8
# A CUDA graph cannot hold what waits for the routing on the host.
UNCAPTURED = ("eager", "ours grouped", "ours decode", "Mixtral", "Qwen3-MoE", "Qwen3-VL-MoE", "Aria")
# A text stack of 22 million parameters, 8 million of them active; head and embeddings are one tensor.
STACK = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "tie_word_embeddings": True,
}


class Shape(NamedTuple):
    """Sizes of a sparse block."""

    hidden_size: int
    width: int
    experts: int
    top_k: int

    @classmethod
    def parse(cls, text):
        """`"256,512,8,2"` -> a `Shape`.

        Raises:
            ValueError: not four whole numbers above 0, or K above E.
        """
        numbers = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
        if len(numbers) != 4 or min(numbers) < 1 or numbers[3] > numbers[2]:
            raise ValueError(f"shapes: {text!r} must be D,F,E,K, four whole numbers above 0 with K at most E")
        return cls(*numbers)


class Weights(NamedTuple):
    """What all blocks of a comparison compute with."""

    gate: torch.Tensor  # (E, D)
    gate_up: torch.Tensor  # (E, 2F, D)
    down: torch.Tensor  # (E, D, F)


@contextmanager
def made_as(dtype, device):
    """Modules built inside have parameters of this dtype on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def blocks(shape, dtype, device, implementations=("auto",)):
    """Blocks with the same weights: ours, those of transformers, and a dense one of the same active operations.

    Args:
        shape: A [`Shape`].
        dtype: Of the parameters.
        device: Of the parameters.
        implementations: Ours to take; the first is called "ours", further ones "ours <name>".

    Returns:
        Modules by name. Each maps `(B, S, D)` to `(B, S, D)` or to a tuple that begins with it.
    """
    with made_as(dtype, device), torch.no_grad():
        found = {}
        for name in implementations:
            found[OURS if name == implementations[0] else f"{OURS} {name}"] = our_block(shape, name)
        first = found[OURS]
        for parameter in first.parameters():
            nn.init.normal_(parameter, std=0.02)
        weights = Weights(first.gate.weight.data, first.experts.gate_up_proj.data, first.experts.down_proj.data)
        for block in found.values():
            share(block, weights)
        peers = (qwen3_of_5(shape, weights) if IS_TRANSFORMERS_5 else peers_of_4(shape, weights)).items()
        dense = MoeVlmMLP(shape.hidden_size, shape.top_k * shape.width, "silu")
        return {**found, **dict(peers), DENSE: dense}


def contestants(compared, kind, shape, tokens):
    """Those of `compared` (modules by name) that this kind of measurement can wait for, or capture.

    Left out: copies of weights that would fill the memory (and in "growth" the caches) from so many tokens on, backward
    passes that fill gradients of all experts, and, for "graph", what waits for the host.
    """
    growth, graph = kind == "growth", kind == "graph"
    trained = kind in ("training", "memory") and shape.experts > MOST_EXPERTS

    def takes_part(name):
        too_slow = name in SLOW_FROM and (growth or tokens >= SLOW_FROM[name])
        return not (too_slow or (trained and name in SLOW_BACKWARD) or (graph and name.endswith(UNCAPTURED)))

    return {name: block for name, block in compared.items() if takes_part(name)}


def can_compile(name):
    """Whether a model of `text_stacks` or `vlms` can be one graph: a loop over the experts that were hit cannot."""
    return not name.endswith(("eager", "Qwen3-MoE"))


def our_block(shape, implementation):
    config = MoeVlmTextConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.width,
        experts_implementation=implementation,
    )
    return MoeVlmSparseBlock(config)


def share(block, weights):
    """Let a block with stacked experts compute with `weights`."""
    block.gate.weight.data = weights.gate
    block.experts.gate_up_proj.data, block.experts.down_proj.data = weights.gate_up, weights.down
    return block


def qwen3_of_5(shape, weights):
    """Qwen3-MoE's block of transformers 5 with each implementation that it offers on every device."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    found = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        config = transformers.Qwen3MoeConfig(**qwen3_sizes(shape))
        config._experts_implementation = name
        found[f"Qwen3-MoE {name}"] = share(Qwen3MoeSparseMoeBlock(config), weights)
    return found


def qwen3_sizes(shape):
    return {
        "hidden_size": shape.hidden_size,
        "moe_intermediate_size": shape.width,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
    }


def peers_of_4(shape, weights):
    """The blocks of transformers 4.57: Mixtral, Qwen3-MoE, Qwen3-VL-MoE, Aria without its shared expert."""
    from transformers.models.aria.modeling_aria import AriaTextConfig, AriaTextMoELayer
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
        Qwen3VLMoeTextConfig,
        Qwen3VLMoeTextSparseMoeBlock,
    )

    hidden_size, width, experts, top_k = shape
    config = transformers.MixtralConfig(
        hidden_size=hidden_size, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    mixtral = fill(MixtralSparseMoeBlock(config), ("w1", "w3", "w2"), weights)
    config = transformers.Qwen3MoeConfig(**qwen3_sizes(shape))
    qwen3 = fill(Qwen3MoeSparseMoeBlock(config), ("gate_proj", "up_proj", "down_proj"), weights)
    turned = Weights(weights.gate, *(each.transpose(1, 2).contiguous() for each in weights[1:]))
    qwen3_vl = share(Qwen3VLMoeTextSparseMoeBlock(Qwen3VLMoeTextConfig(**qwen3_sizes(shape))), turned)
    config = AriaTextConfig(hidden_size=hidden_size, intermediate_size=width, moe_num_experts=experts, moe_topk=top_k)
    aria = AriaTextMoELayer(config)
    aria.shared_experts = NoSharedExpert()
    aria.router.weight.data = weights.gate
    aria.experts.fc1.weight.data, aria.experts.fc2.weight.data = turned.gate_up, turned.down
    return {"Mixtral": mixtral, "Qwen3-MoE": qwen3, "Qwen3-VL-MoE": qwen3_vl, "Aria": aria}


def fill(block, names, weights):
    """Let a block with a list of experts compute with `weights`."""
    block.gate.weight.data = weights.gate
    for expert, both, down in zip(block.experts, weights.gate_up, weights.down):
        gate, up = both.chunk(2)
        for name, values in zip(names, (gate, up, down)):
            getattr(expert, name).weight.data = values
    return block


class NoSharedExpert(nn.Module):
    def forward(self, states):
        return 0.0


def first_tensor(output):
    """The states that a block gives, whatever it gives beside them."""
    return output[0] if isinstance(output, tuple) else output


def text_stacks(dtype, device):
    """Whole models of the sizes and the weights of one: ours, and Qwen3-MoE with each implementation of transformers.

    The weights are the same tensors: a token goes to the same experts in each, and finds them as near.
    """
    text = {**STACK, "intermediate_size": STACK["moe_intermediate_size"], "moe_layers": "all", "use_qk_norm": True}
    with made_as(dtype, device):
        found = {OURS: MoeVlmForConditionalGeneration(MoeVlmConfig(text_config=text))}
        weights, fields = found[OURS].state_dict(), qwen3_moe_config(found[OURS].config)
        for name in ("eager", "grouped_mm", "batched_mm") if IS_TRANSFORMERS_5 else ("",):
            config = transformers.Qwen3MoeConfig(**fields)
            if name:
                config._experts_implementation = name
            model = found[f"Qwen3-MoE {name}".strip()] = transformers.Qwen3MoeForCausalLM(config)
            state = qwen3_moe_keys(weights, stacked=IS_TRANSFORMERS_5) | {"lm_head.weight": weights["lm_head.weight"]}
            model.load_state_dict(state, assign=True)
    return {name: model.eval() for name, model in found.items()}


def vlms(config, dtype, device):
    """One MoeVlm of `config` with our implementation and others, of the same weights, by name."""
    found = {}
    for name in ("auto", "eager", "grouped_mm", "batched_mm") if IS_TRANSFORMERS_5 else ("auto", "eager"):
        made = MoeVlmConfig.from_dict(config.to_dict())
        made.experts_implementation = name
        with made_as(dtype, device):
            model = found[OURS if name == "auto" else name] = MoeVlmForConditionalGeneration(made).eval()
            model.load_state_dict(found[OURS].state_dict(), assign=True)
    return found
