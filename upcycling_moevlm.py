# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""From a dense model of ours to a sparse one: pure functions from state dict to state dict.

Shapes: D hidden, E experts, F width of an expert, I width of the parent's feed-forward layer, G slices of it that are
routed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from .configuration_moevlm import MoeVlmConfig
from .modeling_moevlm import MoeVlmConnector, MoeVlmForConditionalGeneration, MoeVlmVisionModel
from .sparsity_moevlm import layer_types_from
from .summary_moevlm import CONNECTOR, DECODER, TOWER

MODES = ("copy", "noise", "drop", "fine_grained")
# Those whose model gives the parent's logits before any training.
IDENTITY_MODES = ("copy", "fine_grained")
PARTS = ("decoder", "connector", "tower")
GATES = ("normal", "orthogonal")
DTYPES = ("float32", "bfloat16", "float16")
ROUTER_BIAS = "e_score_correction_bias"


@dataclass
class Recipe:
    """Where experts go, and what they are made of."""

    num_experts: int | None = field(
        default=None, metadata={"help": "E of each sparse layer; 8, or a sparse parent's; 0 adds no experts."}
    )
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "K; 2, or a sparse parent's."})
    parts: list[str] = field(
        default_factory=lambda: ["decoder"], metadata={"help": "Any of decoder, connector, tower."}
    )
    moe_layers: list[str] = field(
        default_factory=lambda: ["alternate"],
        metadata={"help": "alternate, first_half, last_half, all, or indices; for decoder and tower."},
    )
    mode: str = field(
        default="copy",
        metadata={"help": "copy; noise (copies with noise); drop (partly re-initialised); fine_grained (slices)."},
    )
    noise: float = field(default=0.01, metadata={"help": "Of mode noise: share of each matrix's standard deviation."})
    drop_ratio: float = field(default=0.5, metadata={"help": "Of mode drop: share of units drawn anew."})
    granularity: int = field(default=4, metadata={"help": "Of mode fine_grained: slices of a feed-forward layer."})
    n_shared_experts: int | None = field(
        default=None, metadata={"help": "fine_grained: slices that are always on (1); copy: 1 shares a whole copy (0)."}
    )
    gate: str = field(default="normal", metadata={"help": "Rows of a new gate: normal or orthogonal."})
    gate_std: float = field(default=0.02, metadata={"help": "Root mean square of a new gate's entries."})
    use_router_bias: bool = field(default=False, metadata={"help": "A selection bias, for loss-free balancing."})
    upcycle_seed: int = field(default=0, metadata={"help": "Of gates, noise, re-initialised units and new parts."})

    def __post_init__(self):
        # In a recipe file one word stands for a list of one.
        self.parts, self.moe_layers = (
            value.split() if isinstance(value, str) else list(value) for value in (self.parts, self.moe_layers)
        )
        named = (("mode", [self.mode], MODES), ("gate", [self.gate], GATES), ("parts", self.parts, PARTS))
        for name, given, known in named:
            if unknown := set(given) - set(known):
                raise ValueError(f"{name}={getattr(self, name)!r} has {sorted(unknown)}; known are {', '.join(known)}")
        shared, mode = f"n_shared_experts={self.shared}", self.mode
        bound = {"copy": 1, "fine_grained": self.granularity - 1}.get(mode, 0)
        for fits, rule in (
            (0 < self.drop_ratio <= 1, f"drop_ratio={self.drop_ratio} must be above 0 and at most 1"),
            (0 <= self.noise < math.inf, f"noise={self.noise} must be at least 0 and finite"),
            (0 < self.gate_std < math.inf, f"gate_std={self.gate_std} must be above 0 and finite"),
            (0 <= self.shared <= bound, f"{shared} must be at least 0 and at most {bound} in mode {mode}"),
        ):
            if not fits:
                raise ValueError(rule)

    @property
    def shared(self) -> int:
        """Shared experts, with the mode's own default."""
        default = 1 if self.mode == "fine_grained" else 0
        return default if self.n_shared_experts is None else self.n_shared_experts

    @property
    def layers(self) -> str | list[int]:
        """`moe_layers` in the form of [`layer_types_from`]."""
        if all(layer.lstrip("-").isdigit() for layer in self.moe_layers):
            return [int(layer) for layer in self.moe_layers]
        return self.moe_layers[0] if len(self.moe_layers) == 1 else " ".join(self.moe_layers)


class FeedForward(NamedTuple):
    """A dense feed-forward layer of either form, by what its width runs along."""

    into: tuple[Tensor, ...]  # (I, D) or (I,): gate and up, or first layer and its bias
    out: Tensor  # (D, I)
    bias: Tensor | None  # (D,), of the last layer

    @property
    def width(self) -> int:
        return self.out.shape[1]


class Block(NamedTuple):
    """A feed-forward layer that becomes sparse."""

    prefix: str
    part: str


def sparse_config(dense: MoeVlmConfig, recipe: Recipe) -> tuple[MoeVlmConfig, list[str]]:
    """The config of the upcycled model, and remarks on what the recipe could not be applied to.

    Raises:
        ValueError: Numbers that do not go together; each names its field.
    """
    parts, notes = dense.part_fields(), []
    text, vision = parts["text_config"], parts["vision_config"]
    # With 0 the recipe asks for no experts of its own, and the parent's stay.
    added = () if recipe.num_experts == 0 else recipe.parts
    if "sparse" in text["mlp_layer_types"]:
        for name in ("num_experts", "num_experts_per_tok"):
            if "decoder" in added and getattr(recipe, name) not in (None, text[name]):
                raise ValueError(
                    f"{name}={getattr(recipe, name)}, but the parent's decoder is sparse with {text[name]}; leave it "
                    "out to adopt the parent's experts"
                )
        notes.append(f"the decoder's experts are the parent's own ({text['num_experts']}), adopted as they are")
    elif "decoder" in added:
        text |= {"mlp_layer_types": layers_of(recipe, "decoder", text["num_hidden_layers"])}
        text |= experts_of(recipe, dense.text_config.intermediate_size, recipe.shared)
    if "tower" in added:
        if "sparse" in vision["mlp_layer_types"]:
            raise ValueError("parts names the tower, but the parent's tower has experts already; leave it out")
        vision |= {"mlp_layer_types": layers_of(recipe, "tower", vision["num_hidden_layers"])}
        # A dense layer of the tower has no gate that a slice could share: its slices are all routed.
        vision |= experts_of(recipe, dense.vision_config.intermediate_size, 0) | {"expert_form": "mlp"}
    if "connector" in added:
        if parts["connector_config"]["num_experts"]:
            raise ValueError("parts names the connector, but the parent's connector has experts already; leave it out")
        width = dense.text_config.hidden_size
        parts["connector_config"] |= experts_of(replace(recipe, mode="copy", n_shared_experts=0), width, 0)
    return MoeVlmConfig(**parts, image_token_id=dense.image_token_id), notes


def layers_of(recipe: Recipe, part: str, layers: int) -> list[str]:
    """The `mlp_layer_types` of a part; raises `ValueError` where the recipe takes none of its layers."""
    types = layer_types_from(recipe.layers, layers)
    if "sparse" not in types:
        raise ValueError(
            f"moe_layers={recipe.layers!r} takes none of the {part}'s {layers} layers; name some, or leave out the part"
        )
    return types


def experts_of(recipe: Recipe, width: int, shared: int) -> dict[str, Any]:
    """Fields of a part's experts, for a feed-forward layer of `width`.

    Raises:
        ValueError: The width does not cut, or E or K are no multiples of the routed slices.
    """
    experts = recipe.num_experts or 8
    top_k = 2 if recipe.num_experts_per_tok is None else recipe.num_experts_per_tok
    slices = 1
    if recipe.mode == "fine_grained":
        slices = recipe.granularity - shared
        if width % recipe.granularity:
            raise ValueError(f"granularity={recipe.granularity} does not divide the parent's intermediate_size={width}")
        for name, value in (("num_experts", experts), ("num_experts_per_tok", top_k)):
            if value % slices:
                raise ValueError(
                    f"{name}={value} is no multiple of the {slices} routed slices (granularity={recipe.granularity}, "
                    f"{shared} shared), so whole copies of the parent's layer would not come out"
                )
        width //= recipe.granularity
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "use_router_bias": recipe.use_router_bias,
        "routed_scaling_factor": float(slices),
        "n_shared_experts": shared,
        # A whole shared copy beside whole routed copies: half and half keeps the parent's output.
        "shared_expert_mix": 0.5 if shared and recipe.mode == "copy" else None,
    }


def new_blocks(dense: MoeVlmConfig, sparse: MoeVlmConfig) -> Iterator[Block]:
    """The layers that are sparse in one config and not in the other."""
    for part, name, before, after in (
        ("tower", TOWER, dense.vision_config, sparse.vision_config),
        ("decoder", DECODER, dense.text_config, sparse.text_config),
    ):
        for i, (old, new) in enumerate(zip(before.mlp_layer_types, after.mlp_layer_types)):
            if (old, new) == ("dense", "sparse"):
                yield Block(f"{name}layers.{i}.mlp.", part)
    if sparse.connector_config.num_experts and not dense.connector_config.num_experts:
        yield Block(f"{CONNECTOR}mlp.", "connector")


def kept_outputs(dense: MoeVlmConfig, sparse: MoeVlmConfig, recipe: Recipe) -> set[str]:
    """Names of the outputs of a proof that the recipe leaves the parent's: those without a varied layer before them.

    New experts of the connector add nothing in any mode.
    """
    parts = set() if recipe.mode in IDENTITY_MODES else {block.part for block in new_blocks(dense, sparse)}
    touched = {"decoder": {"text", "pictures"}, "tower": {"tower", "pictures"}, "connector": set()}
    return {"text", "pictures", "tower"} - set().union(*(touched[part] for part in parts))


def shapes_of(config: MoeVlmConfig) -> dict[str, Size]:
    """Shape of every tensor of a checkpoint, a tied head left out; nothing is allocated."""
    with torch.device("meta"):
        model = MoeVlmForConditionalGeneration(config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def fresh_parts(config: MoeVlmConfig, tower: bool, seed: int) -> dict[str, Tensor]:
    """New weights for a connector, and for a tower too where there is no vision parent."""
    torch.manual_seed(seed)
    width = config.vision_config.hidden_size
    parts = {CONNECTOR: MoeVlmConnector._from_config(config.connector_config, vision_hidden_size=width)}
    if tower:
        parts[TOWER] = MoeVlmVisionModel._from_config(config.vision_config)
    return {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.state_dict().items()}


def sparsify(
    twin: Mapping[str, Tensor], dense: MoeVlmConfig, sparse: MoeVlmConfig, recipe: Recipe, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The upcycled state dict.

    Args:
        twin: The dense model's tensors, read one at a time; never all of them are held beside the result.
        dense: Its config.
        sparse: What [`sparse_config`] made of it.
        dtype: Of the result's floating tensors.

    Source: copies: Komatsuzaki et al. 2022 (arXiv:2212.05055), with the renormalised weights that make step 0 the
    parent; noise and re-initialisation: see [`varied`]; slices: see [`sliced`].
    """
    blocks = list(new_blocks(dense, sparse))
    prefixes = tuple(block.prefix for block in blocks)
    state = {key: cast(key, twin[key], dtype) for key in twin if not key.startswith(prefixes)}
    generator = torch.Generator().manual_seed(recipe.upcycle_seed)
    for block in blocks:
        if block.part == "connector":
            tensors = connector_block(sparse, generator)
            state[f"{CONNECTOR}norm.weight"] = torch.ones(sparse.text_config.hidden_size, dtype=dtype)
        else:
            tensors = experts_from(read_layer(twin, block), block.part, sparse, recipe, generator)
        tensors["gate.weight"] = gate_rows(sparse, block.part, recipe, generator)
        if recipe.use_router_bias:
            tensors[f"gate.{ROUTER_BIAS}"] = torch.zeros(len(tensors["gate.weight"]))
        state |= {block.prefix + name: cast(block.prefix + name, tensor, dtype) for name, tensor in tensors.items()}
    return state


def cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; whole numbers stay, and so does a router's bias, whose steps half precision would lose."""
    return tensor.to(dtype) if tensor.is_floating_point() and not key.endswith(ROUTER_BIAS) else tensor


def read_layer(twin: Mapping[str, Tensor], block: Block) -> FeedForward:
    """The dense layer that a block is made of."""
    if block.part == "tower":
        into = (twin[f"{block.prefix}fc1.weight"], twin[f"{block.prefix}fc1.bias"])
        return FeedForward(into, twin[f"{block.prefix}fc2.weight"], twin[f"{block.prefix}fc2.bias"])
    gate, up, down = (twin[f"{block.prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return FeedForward((gate, up), down, None)


def connector_block(config: MoeVlmConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Experts behind the projector whose last layer is zero: they add nothing until they are trained."""
    part, width = config.connector_config, config.text_config.hidden_size
    experts, size = part.num_experts, part.moe_intermediate_size
    gate_up = torch.randn(experts, 2 * size, width, generator=generator) * part.initializer_range
    return {"experts.gate_up_proj": gate_up, "experts.down_proj": torch.zeros(experts, width, size)}


def gate_rows(config: MoeVlmConfig, part: str, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A new gate, `(E, D)`; the slices of one copy get equal rows, so that they are always visited together.

    Source: virtual groups, He et al. 2024 (arXiv:2410.07524), sec. 3.2.
    """
    fields = {"tower": config.vision_config, "connector": config.connector_config, "decoder": config.text_config}[part]
    repeats = int(fields.routed_scaling_factor)
    rows = torch.empty(fields.num_experts // repeats, fields.hidden_size)
    if recipe.gate == "orthogonal":
        # Where rows are more than D, the columns are orthogonal; either way the longer side gives the gain.
        nn.init.orthogonal_(rows, gain=recipe.gate_std * max(rows.shape) ** 0.5, generator=generator)
    else:
        nn.init.normal_(rows, std=recipe.gate_std, generator=generator)
    return rows.repeat_interleave(repeats, dim=0)


def experts_from(
    layer: FeedForward, part: str, config: MoeVlmConfig, recipe: Recipe, generator: torch.Generator
) -> dict[str, Tensor]:
    """Tensors of a sparse block, without its gate, made of one dense layer."""
    fields = config.vision_config if part == "tower" else config.text_config
    experts, shared = fields.num_experts, fields.n_shared_experts
    if recipe.mode == "fine_grained":
        made = [sliced(layer, shared + e % (recipe.granularity - shared), recipe.granularity) for e in range(experts)]
        if layer.bias is not None:
            shares = binary_shares(recipe.granularity) * (experts // recipe.granularity)
            made = [slice_._replace(bias=layer.bias * share) for slice_, share in zip(made, shares)]
        always = [sliced(layer, i, recipe.granularity) for i in range(shared)]
    else:
        made = [varied(layer, recipe, generator) for _ in range(experts)]
        always = [layer] * shared
    block = stacked(made)
    if always:
        gate, up = (torch.cat(tensors) for tensors in zip(*(expert.into for expert in always)))
        block |= {"shared_expert.gate_proj.weight": gate, "shared_expert.up_proj.weight": up}
        block["shared_expert.down_proj.weight"] = torch.cat([expert.out for expert in always], dim=1)
    return block


def sliced(layer: FeedForward, index: int, slices: int) -> FeedForward:
    """Slice `index` of `slices`; all of them, bias apart, sum to the layer.

    Source: DeepSeekMoE (arXiv:2401.06066), sec. 3.1, for the cut and its granularity.
    """
    width = layer.width // slices
    units = slice(index * width, (index + 1) * width)
    return FeedForward(tuple(tensor[units] for tensor in layer.into), layer.out[:, units], layer.bias)


def binary_shares(count: int) -> list[float]:
    """Powers of two that sum to 1: a bias shared out by them is rounded in no dtype, as thirds of it would be."""
    level = 1 << (count.bit_length() - 1)  # the largest power of two up to count
    return [1 / level] * (2 * level - count) + [0.5 / level] * (2 * (count - level))


def varied(layer: FeedForward, recipe: Recipe, generator: torch.Generator) -> FeedForward:
    """One expert: the layer itself, with noise, or with a share of its units drawn anew.

    Drawn anew are the same units in all matrices, from a normal distribution with the mean and the standard deviation
    of what they replace.

    Raises:
        ValueError: So small a `drop_ratio` that no unit is drawn anew.

    Source: Drop-Upcycling (arXiv:2502.19261), sec. 3.2.
    """
    if recipe.mode == "copy":
        return layer
    units = torch.ones(layer.width, dtype=torch.bool)
    if recipe.mode == "drop":
        count = round(recipe.drop_ratio * layer.width)
        if not count:
            raise ValueError(
                f"drop_ratio={recipe.drop_ratio} draws none of a layer's {layer.width} units anew; take at least "
                f"{1 / layer.width:.2g}"
            )
        chosen = torch.randperm(layer.width, generator=generator)[:count]
        units = torch.zeros(layer.width, dtype=torch.bool).index_fill(0, chosen, True)

    def vary(tensor: Tensor) -> Tensor:
        """`(I, ...)` with its chosen rows varied."""
        old = tensor[units].float()
        drawn = torch.randn(old.shape, generator=generator) * old.std(correction=0)  # 0 of one bias, not NaN
        new = tensor.clone()
        new[units] = (old + recipe.noise * drawn if recipe.mode == "noise" else old.mean() + drawn).to(tensor.dtype)
        return new

    return FeedForward(tuple(vary(tensor) for tensor in layer.into), vary(layer.out.t()).t(), layer.bias)


def stacked(experts: list[FeedForward]) -> dict[str, Tensor]:
    """Experts in the stacked form of a sparse block."""
    out = torch.stack([expert.out for expert in experts])  # (E, D, F)
    first, second = (torch.stack(tensors) for tensors in zip(*(expert.into for expert in experts)))
    if experts[0].bias is None:
        return {"experts.gate_up_proj": torch.cat([first, second], dim=1), "experts.down_proj": out}  # (E, 2F, D)
    bias = torch.stack([expert.bias for expert in experts])  # (E, D)
    names = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    return {f"experts.{name}": tensor for name, tensor in zip(names, (first, second, out, bias))}


def build(state: Mapping[str, Tensor], config: MoeVlmConfig, dtype: torch.dtype) -> MoeVlmForConditionalGeneration:
    """The model of a state dict, whose tensors it takes over without a copy.

    Raises:
        ValueError: A tensor too many or too few, or of another shape.
    """
    shapes = shapes_of(config)
    wrong = {key for key in shapes.keys() | state.keys() if key not in state or state[key].shape != shapes.get(key)}
    if wrong:
        raise ValueError(f"state dict and config do not fit: {', '.join(sorted(wrong)[:8])}")
    return MoeVlmForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype
    ).eval()
