# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What a model is made of: where its experts sit, total and active parameters, operations, bytes.

Letters: E experts, K experts per token, T keys, P patches with the class token, D hidden, h heads, d head width.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import nn

PARTS = ("vision", "connector", "language")
# How the keys of a whole model's state dict begin, part by part.
TOWER, CONNECTOR, DECODER = "model.vision_tower.", "model.connector.", "model.language_model."
# How PEFT names what it adds, and the copy of a module that it keeps but no longer calls.
ADAPTER, UNUSED_COPY = ".lora_", ".original_module."


def part_of(name):
    """The part, "vision", "connector" or "language", that a parameter of this name belongs to."""
    for part, marker in (("vision", "vision_tower."), ("connector", "connector.")):
        if marker in name:
            return part
    return "language"


def is_router(name):
    """Whether the parameter of this name belongs to a router."""
    return ".gate." in name


def sparse_layers(config):
    """Name and number of experts of each sparse layer, in the order in which the model reports them."""
    vision, connector, text = config.vision_config, config.connector_config, config.text_config
    layers = {f"vision.{i}": vision.num_experts for i, kind in enumerate(vision.mlp_layer_types) if kind == "sparse"}
    if connector.num_experts:
        layers["connector"] = connector.num_experts
    decoder = {f"decoder.{i}": text.num_experts for i, kind in enumerate(text.mlp_layer_types) if kind == "sparse"}
    return layers | decoder


class PartSummary(NamedTuple):
    """One line of the table."""

    name: str
    experts: str  # where they sit and how many a token visits
    parameters: int
    active: int  # what one token meets: all but the experts that it does not visit
    learning: int  # what has gradients now


@dataclass(frozen=True)
class MoeSummary:
    """What [`summarize`] found; `print` shows it as a table.

    Args:
        parts: Tower, connector, decoder with its head, and adapters if there are any.
        weight_flops: Forward operations of one decoder token in products with weights, the head included.
        key_flops: Those that each key adds which the token attends to.
        picture_flops: Forward operations of tower and connector for one picture of the configured size.
        image_tokens: Decoder tokens of one picture.
        bytes: Of parameters and buffers, by name of the dtype.
    """

    parts: tuple
    weight_flops: int
    key_flops: int
    picture_flops: int
    image_tokens: int
    bytes: dict

    @property
    def parameters(self):
        """All parameters, a tied one once."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self):
        """Those that a token with its picture meets: all but the experts that it does not visit."""
        return sum(part.active for part in self.parts)

    def flops_per_token(self, context=0):
        """Forward operations of one decoder token that attends to `context` keys, its own included."""
        return self.weight_flops + context * self.key_flops

    def __str__(self):
        lines = [("part", "experts", "parameters", "active", "learning")]
        lines += [(part.name, part.experts, *(f"{number:,}" for number in part[2:])) for part in self.parts]
        learning = sum(part.learning for part in self.parts)
        lines.append(("all", "", f"{self.parameters:,}", f"{self.active_parameters:,}", f"{learning:,}"))
        widths = [max(map(len, column)) for column in zip(*lines)]
        text = []
        for line in lines:
            words = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
            text.append("  ".join(words + [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]))
        whole = sum(self.bytes.values())
        shown = {name: number for name, number in self.bytes.items() if 1000 * number >= whole}  # no mere counters
        memory = ", ".join(f"{number / 2**20:,.1f} MiB {name}" for name, number in sorted(shown.items()))
        text.append(
            f"forward FLOPs: {self.weight_flops:,} a token and {self.key_flops:,} for each token it attends to; "
            f"{self.picture_flops:,} a picture, which becomes {self.image_tokens} tokens"
        )
        text.append(f"memory: {memory}")
        return "\n".join(text)


def summarize(model):
    """Where the experts sit, total and active parameters, operations and bytes of a whole model, as [`MoeSummary`].

    Only names, shapes and the config are read: it works on the meta device, sharded and under PEFT, whose adapters get
    a line of their own and no operations, since they can be merged.

    FLOPs count 2 for each multiply-add of a matrix product or convolution in the forward; norms, activations, rotary
    positions and the choice of experts are left out. A token visits exactly K experts here: with a dynamic width or a
    capacity the numbers are the most that is possible. With W_part the active matrix entries of a part:

    - one decoder token with T keys: `2 * W_language + T * 4 * h * d * layers`, the head included;
    - one picture: `2 * W_vision * P + 4 * D * P**2 * layers` and the convolutions `2 * weights * output pixels` in the
      tower, `2 * W_connector * image tokens` in the connector.

    Raises:
        ValueError: `model` is a part of a MoeVlm, not a whole one.

    Source: Kaplan et al. 2020 (arXiv:2001.08361), table 1, with the experts of Mixtral (arXiv:2401.04088, sec. 2.1).
    """
    config = model.config
    if config.model_type != "moevlm":
        raise ValueError(f"moe_summary of a {config.model_type!r} is not possible; ask the whole model")
    vision, text, image_tokens = config.vision_config, config.text_config, config.image_seq_length
    entries = matrix_entries(model)
    patches = vision.patches_per_side**2 + int(vision.use_class_token)
    tower = 2 * entries["vision"] * patches + 4 * vision.hidden_size * patches**2 * vision.num_hidden_layers
    tower += convolution_flops(model, vision.image_size)
    return MoeSummary(
        parts=part_summaries(model),
        weight_flops=2 * entries["language"],
        key_flops=4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers,
        picture_flops=tower + 2 * entries["connector"] * image_tokens,
        image_tokens=image_tokens,
        bytes=bytes_by_dtype(model),
    )


def part_configs(config):
    """The config of each part in `PARTS`."""
    return dict(zip(PARTS, (config.vision_config, config.connector_config, config.text_config)))


def shape_of(parameter):
    """The whole shape; DeepSpeed ZeRO-3 leaves an empty tensor in a parameter's place and keeps the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def visited(name, size, configs):
    """How many of the `size` entries of a parameter one token meets: K of E experts, else all."""
    if ".experts." not in name:
        return size
    config = configs[part_of(name)]
    return size * config.num_experts_per_tok // config.num_experts


def matrix_entries(model):
    """Active entries of the matrices that multiply each position, by part; a tied head counts where it multiplies."""
    configs, entries = part_configs(model.config), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = shape_of(parameter)
        stacked = ".experts." in name and not name.endswith(".weight")  # with biases of two dimensions
        matrix = len(shape) == (3 if stacked else 2)
        lookup = "embed_tokens." in name or "position_embedding." in name
        if matrix and not lookup and ADAPTER not in name and UNUSED_COPY not in name:
            entries[part_of(name)] += visited(name, prod(shape), configs)
    return entries


def convolution_flops(model, side):
    """Operations of the tower's convolutions, one behind the other, on one picture of `side` x `side` pixels."""
    flops = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            side = (side + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
            flops += 2 * prod(shape_of(module.weight)) * side**2
    return flops


def part_summaries(model):
    """A [`PartSummary`] of each part, and of the adapters if there are any."""
    configs = part_configs(model.config)
    numbers = {part: [0, 0, 0] for part in (*PARTS, "adapters")}
    for name, parameter in model.named_parameters():
        if UNUSED_COPY in name:
            continue
        adapter, size = ADAPTER in name, prod(shape_of(parameter))
        active = size if adapter else visited(name, size, configs)
        row = numbers["adapters" if adapter else part_of(name)]
        row[:] = row[0] + size, row[1] + active, row[2] + size * parameter.requires_grad
    places = {part: expert_places(config) for part, config in configs.items()} | {"adapters": ""}
    return tuple(PartSummary(part, places[part], *row) for part, row in numbers.items() if part in PARTS or row[0])


def expert_places(config):
    """Where the experts of a part sit, in words, such as "2 of 8 in layers 1, 3 of 4"."""
    chosen = f"{config.num_experts_per_tok} of {config.num_experts}"
    chosen += f" + {config.n_shared_experts} shared" if config.n_shared_experts else ""
    if not hasattr(config, "mlp_layer_types"):  # the connector has one place for experts
        return chosen if config.num_experts else "dense"
    sparse = [str(i) for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    return f"{chosen} in layers {', '.join(sparse)} of {config.num_hidden_layers}" if sparse else "dense"


def bytes_by_dtype(model):
    """Bytes of parameters and buffers, by name of the dtype, such as "float32"."""
    found = {}
    for tensor in (*model.parameters(), *model.buffers()):
        name = str(tensor.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + prod(shape_of(tensor)) * tensor.element_size()
    return found
