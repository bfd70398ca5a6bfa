# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What training a model will take: memory a device under each way of spreading it, operations, steps a day.

Everything is computed from shapes on the meta device; nothing is allocated.

Letters: N devices, P parameters, B sequences a device, S tokens a sequence, D hidden, F expert width, K experts per
token, V vocabulary, L layers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from .configuration_moevlm import MoeVlmConfig
from .modeling_moevlm import MoeVlmForConditionalGeneration
from .summary_moevlm import PARTS, MoeSummary, PartSummary, matrix_entries, part_configs, part_of, visited

# Bytes a parameter: float32 weights; gradient and the two moments of Adam where it learns.
WEIGHT, LEARNING = 4, 4 + 8
# The decoder's attention, and all experts: where LoRA goes.
ADAPTED = re.compile(r".*(language_model\..*\.[qkvo]_proj\.weight|\.experts\.\w+_proj)")
# What autocast and the gathered shards of a layer work in.
HALF = 2
GIB = 2**30


@dataclass
class PlanArguments:
    """The machine and the run that a model is planned for."""

    devices: int = field(default=8, metadata={"help": "N, devices."})
    batch_size: int = field(default=8, metadata={"help": "B, sequences a device and step, one picture each."})
    sequence_length: int = field(default=1024, metadata={"help": "S, tokens of a sequence, image tokens included."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Any of vision, connector, language."})
    lora_rank: int = field(default=0, metadata={"help": "Of LoRA, which then learns alone; 0: no LoRA."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Keep one state a layer, compute again."})
    peak_tflops: float = field(default=989.0, metadata={"help": "Dense bf16 TFLOP/s of a device (H100 SXM: 989)."})
    utilisation: float = field(default=0.35, metadata={"help": "Share of the peak that a run reaches."})

    def __post_init__(self):
        if unknown := set(self.freeze) - set(PARTS):
            raise ValueError(f"freeze holds {sorted(unknown)}; it takes {', '.join(PARTS)}")
        if set(self.freeze) == set(PARTS) and not self.lora_rank:
            raise ValueError(f"freeze={self.freeze} leaves nothing to learn; free one part")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} is negative; 0 plans without LoRA")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation={self.utilisation} must lie above 0 and at most 1")
        if not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops={self.peak_tflops} must be above 0 and finite")
        for name in ("devices", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Memory(NamedTuple):
    """Bytes on one device under one way of spreading the model."""

    way: str
    states: int  # weights, gradients, moments
    gathered: int  # of layers whose shards are together for a while
    activations: int

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations


class Plan(NamedTuple):
    """What [`plan`] found."""

    summary: MoeSummary
    memory: list[Memory]
    flops_per_token: int  # forward and backward, each decoder token, its share of the picture included
    steps_per_day: float
    tokens_per_step: int


def plan(config: MoeVlmConfig, arguments: PlanArguments) -> Plan:
    """Parameters, memory, operations and speed of training a model of this config.

    Memory of states: 16 bytes a learning parameter (float32 weight, gradient and two moments), 4 a frozen one; LoRA
    freezes all and adds its own matrices.
    DDP holds all of it; FSDP2 and ZeRO-3 an N-th, and for a while the largest layer, whole and in half precision, twice
    (the next one is fetched meanwhile) and, in the backward, its gradients; expert parallelism as [`spread_experts`].
    Activations: see [`activation_bytes`], under LoRA [`adapted_bytes`] too; buffers of communication and fragmentation
    are left out.

    Operations: forward of [`MoeSummary`], at a context of half the sequence on average, of each part times its
    [`passes`], under LoRA with the gradients of adapted experts; those of LoRA's own matrices are left out.
    """
    positions = config.text_config.max_position_embeddings
    if not config.image_seq_length < arguments.sequence_length <= positions:
        raise ValueError(
            f"sequence_length={arguments.sequence_length} must be above the {config.image_seq_length} tokens of a "
            f"picture, and at most the decoder's max_position_embeddings={positions}"
        )
    with torch.device("meta"):
        model = MoeVlmForConditionalGeneration(config)
    adapters = adapter_sizes(model, arguments.lora_rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in arguments.freeze and not adapters)
    summary = model.moe_summary()
    states = {name: state_bytes(parameter) for name, parameter in model.named_parameters()}
    for name, size in adapters.items():
        states[name] += size * (WEIGHT + LEARNING)
    learning = {part_of(name) for name in adapters} or set(PARTS) - set(arguments.freeze)
    counts = passes(learning, arguments)
    total = sum(states.values())
    stacks = {name: prod(model.get_parameter(name).shape) for name in adapters if ".experts." in name}
    devices, activations = arguments.devices, activation_bytes(config, arguments, counts)
    activations += adapted_bytes(stacks, arguments)
    gathered = 3 * HALF * largest_layer(model) if devices > 1 else 0
    memory = [
        Memory("DDP", total, 0, activations),
        Memory("FSDP2", -(-total // devices), gathered, activations),
        Memory("ZeRO-3", -(-total // devices), gathered, activations),
        Memory("expert parallel", spread_experts(states, config, devices), 0, activations),
    ]
    sequence = arguments.sequence_length
    connector = 2 * matrix_entries(model)["connector"] * summary.image_tokens
    forward = {"vision": summary.picture_flops - connector, "connector": connector}
    forward["language"] = summary.flops_per_token(sequence // 2) * sequence
    flops = sum(forward[part] * counts[part] for part in PARTS)
    rows = {"vision": patches_of(config), "connector": summary.image_tokens, "language": sequence}
    # PEFT adds an adapter to its stack before the product, whose backward then gives the whole stack's gradient.
    flops += sum(2 * visited(name, size, part_configs(config)) * rows[part_of(name)] for name, size in stacks.items())
    flops //= sequence
    tokens = devices * arguments.batch_size * sequence
    speed = devices * arguments.peak_tflops * 1e12 * arguments.utilisation / (flops * tokens)
    if size := sum(adapters.values()):
        summary = replace(summary, parts=(*summary.parts, PartSummary("adapters", "", size, size, size)))
    return Plan(summary, memory, flops, speed * 86400, tokens)


def spread_experts(states: Mapping[str, int], config: MoeVlmConfig, devices: int) -> int:
    """Bytes on the fullest device under expert parallelism: an N-th of each layer's experts, whole ones, and all else.

    Args:
        states: Bytes by name of the parameter.
    """
    counts = {part: each.num_experts for part, each in part_configs(config).items()}
    held = 0
    for name, size in states.items():
        count = counts[part_of(name)] if ".experts." in name else 1
        held += size // count * -(-count // devices)
    return held


def adapter_sizes(model: nn.Module, rank: int) -> dict[str, int]:
    """Parameters of LoRA's two matrices beside each adapted one, `rank * (in + out)` for each matrix of a stack."""
    if not rank:
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if ADAPTED.fullmatch(name)}
    return {name: rank * prod(shape[:-2]) * sum(shape[-2:]) for name, shape in shapes.items()}


def passes(learning: set[str], arguments: PlanArguments) -> dict[str, int]:
    """How often a step does each part's forward operations, by part.

    Once forward; once for the gradient of its input where it or a part before it learns, and then once more where
    activations are computed again; once for the gradient of its weights where they learn all.
    """
    reached = {part for i, part in enumerate(PARTS) if learning & set(PARTS[: i + 1])}
    own_gradients = set() if arguments.lora_rank else learning
    backward = 1 + arguments.gradient_checkpointing
    return {part: 1 + backward * (part in reached) + (part in own_gradients) for part in PARTS}


def adapted_bytes(stacks: Mapping[str, int], arguments: PlanArguments) -> int:
    """Bytes of stacked experts with their adapters added, kept for the backward, and of the largest layer's gradients.

    Both are as large as the stacks themselves, in float32, and counted whole for each device. With checkpointing there
    is one layer's sum at a time.

    Args:
        stacks: Sizes of adapted stacks by name.

    Source: PEFT's `ParamWrapper` (0.21), which parametrizes the stack by `baddbmm(W, B, A)`.
    """
    layers: dict[str, int] = {}
    for name, size in stacks.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + size
    largest = max(layers.values(), default=0)
    return WEIGHT * (largest + (largest if arguments.gradient_checkpointing else sum(layers.values())))


def state_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter with what its training keeps."""
    return prod(parameter.shape) * (WEIGHT + LEARNING * parameter.requires_grad)


def largest_layer(model: MoeVlmForConditionalGeneration) -> int:
    """Parameters of the largest unit that sharding gathers: a layer of tower or decoder, or the embeddings."""
    layers = [*model.model.language_model.layers, *model.model.vision_tower.layers, model.lm_head]
    return max(sum(prod(parameter.shape) for parameter in layer.parameters()) for layer in layers)


def patches_of(config: MoeVlmConfig) -> int:
    """Positions of the tower for one picture, the class token included."""
    return config.vision_config.patches_per_side**2 + int(config.vision_config.use_class_token)


def activation_bytes(config: MoeVlmConfig, arguments: PlanArguments, counts: Mapping[str, int]) -> int:
    """Bytes that the backward needs from the forward, on one device.

    In half precision, a decoder layer keeps for each token: 6 D (two norms' inputs and outputs, two sums), the heads'
    queries, keys, values and outputs, and for each visited expert 3 F (gate, up, product) + D. A layer of the tower
    likewise; none where [`passes`], by part, are 1 and no backward comes. With checkpointing, D a layer and one whole
    layer. On top the logits, 8 bytes each (float32 and gradient), as if every position were learnt.
    Attention weights are never stored (sdpa, flash). Autocast over float32 weights keeps the states between layers in
    float32, 2 bytes more for each of their D numbers, which is left out.
    """
    text, vision = config.text_config, config.vision_config
    tokens = arguments.batch_size * arguments.sequence_length
    patches = arguments.batch_size * patches_of(config)
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    layers = [
        (tokens, text.hidden_size, 6 * text.hidden_size + heads + feed_forward(text, kind))
        for kind in text.mlp_layer_types
    ]
    layers += [
        (patches, vision.hidden_size, 10 * vision.hidden_size + feed_forward(vision, kind))
        for kind in vision.mlp_layer_types
        if counts["vision"] > 1
    ]
    logits = 8 * tokens * text.vocab_size
    if not arguments.gradient_checkpointing:
        return logits + HALF * sum(rows * inner for rows, _, inner in layers)
    kept = sum(rows * width for rows, width, _ in layers)
    return logits + HALF * (kept + max(rows * inner for rows, _, inner in layers))


def feed_forward(part, kind: str) -> int:
    """Numbers that a feed-forward layer keeps for each token."""
    if kind == "dense":
        return 3 * part.intermediate_size
    visits = part.num_experts_per_tok * (3 * part.moe_intermediate_size + part.hidden_size)
    return visits + 3 * part.n_shared_experts * part.moe_intermediate_size


def plan_table(plan_: Plan, arguments: PlanArguments) -> str:
    """The printed form of a plan."""
    lines = [str(plan_.summary), ""]
    head = f"one of {arguments.devices} devices"
    lines.append(f"{head:<16} {'states':>10} {'gathered':>10} {'activations':>12} {'sum':>10}")
    for row in plan_.memory:
        sizes = [f"{size / GIB:.1f} GiB" for size in (row.states, row.gathered, row.activations, row.total)]
        lines.append(f"{row.way:<16} {sizes[0]:>10} {sizes[1]:>10} {sizes[2]:>12} {sizes[3]:>10}")
    lines.append("")
    lines.append(f"training FLOPs a token: {plan_.flops_per_token:,} (picture included)")
    lines.append(
        f"steps a day: {plan_.steps_per_day:,.0f} of {plan_.tokens_per_step:,} tokens each, at "
        f"{arguments.utilisation:.0%} of {arguments.peak_tflops:g} TFLOP/s"
    )
    return "\n".join(lines)
