# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The vision tower: a pre-norm ViT whose feed-forward layers are dense or sparse.

Key names are our own and the same on both transformers lines, so a checkpoint of one loads on the other.

Shapes: I images, C channels, H x W pixels, P = (H/patch)*(W/patch) patches, D hidden, h heads, d head width.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .base_moevlm import ROUTER_RECORDERS, MoeVlmPreTrainedModel, init, recorded
from .configuration_moevlm import MoeVlmVisionConfig
from .experts_moevlm import MoeVlmExperts, MoeVlmSparseBlock
from .graphs_moevlm import sum_over_experts
from .kernels_moevlm import sort_visits


def repeat_kv(states, groups):
    """Keys or values `(B, h_kv, S, d)` repeated for their query heads, `(B, h_kv * groups, S, d)`."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as written in the paper, with the weights returned (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        module: The attention module; gives `num_key_value_groups` and `training`.
        query: `(B, h, S, d)`.
        key, value: `(B, h_kv, T, d)`.
        attention_mask: Additive `(B, 1, S, T)`, or None.
        scaling: Factor on the scores.
        dropout: Dropout probability on the weights.

    Returns:
        Output `(B, S, h, d)` and weights `(B, h, S, T)`.
    """
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # (B, h, S, T)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MoeVlmStemConv(nn.Conv2d):
    """A convolution of the stem; a class of its own because it has an initialisation of its own."""


class MoeVlmBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics rest while its weight is frozen, whoever trains: they are weights too.

    Weight and bias are read in the statistics' dtype: FSDP2's mixed precision casts parameters alone.
    """

    def forward(self, states):
        mean, training = self.running_mean, self.training and self.weight.requires_grad
        if training:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(states, mean, self.running_var, weight, bias, training, self.momentum, self.eps)


class MoeVlmConvStem(nn.Module):
    """3x3 stride-2 convolutions with BatchNorm and ReLU, then 1x1 to the tower's width.

    Source: Xiao et al. 2021, "Early convolutions help transformers see better" (arXiv:2106.14881), sec. 3.
    """

    def __init__(self, config):
        super().__init__()
        channels = [config.num_channels, *config.stem_channels]
        self.convs = nn.ModuleList(
            MoeVlmStemConv(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            for before, after in zip(channels, channels[1:])
        )
        self.norms = nn.ModuleList(MoeVlmBatchNorm(after) for after in config.stem_channels)
        self.projection = nn.Conv2d(channels[-1], config.hidden_size, kernel_size=1)

    def forward(self, pixel_values):
        """`(I, C, H, W)` -> `(I, D, H/patch, W/patch)`."""
        for conv, norm in zip(self.convs, self.norms):
            pixel_values = F.relu(norm(conv(pixel_values)))
        return self.projection(pixel_values)


class MoeVlmPositionEmbedding(nn.Embedding):
    """Learned positions of a square grid of patches, the class token's first if there is one."""

    def forward(self):
        """All of them, `(positions, D)`; a call, because hooks fetch what `device_map` left on the disk."""
        return self.weight


class MoeVlmVisionEmbeddings(nn.Module):
    """Patches plus learned positions; positions are interpolated for pictures of another size."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.patches_per_side
        if config.stem == "conv":
            self.patch_embedding = MoeVlmConvStem(config)
        else:
            self.patch_embedding = nn.Conv2d(
                config.num_channels,
                config.hidden_size,
                kernel_size=config.patch_size,
                stride=config.patch_size,
                bias=config.patch_bias,
            )
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.use_class_token else None
        positions = self.side**2 + int(config.use_class_token)
        self.position_embedding = MoeVlmPositionEmbedding(positions, config.hidden_size)

    def patch_positions(self, rows, columns):
        """Position embeddings of a `rows x columns` grid, `(1, rows*columns, D)`."""
        weight = self.position_embedding()[-(self.side**2) :]  # the class token's comes first
        if rows != self.side or columns != self.side:
            grid = weight.unflatten(0, (self.side, self.side)).permute(2, 0, 1).unsqueeze(0)  # (1, D, side, side)
            grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
            weight = grid.to(weight.dtype).flatten(2).transpose(1, 2).squeeze(0)  # (rows*columns, D)
        return weight.unsqueeze(0)

    def forward(self, pixel_values):
        """`(I, C, H, W)` -> `(I, P, D)`, or `(I, 1 + P, D)` with a class token in front."""
        height, width = pixel_values.shape[-2:]
        if height < self.patch_size or width < self.patch_size:
            raise ValueError(f"pictures of {height}x{width} pixels are below patch_size={self.patch_size}; enlarge")
        patches = self.patch_embedding(pixel_values)  # (I, D, H/patch, W/patch)
        positions = self.patch_positions(*patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2) + positions  # (I, P, D)
        if self.class_embedding is None:
            return patches
        first = self.class_embedding + self.position_embedding()[0]
        return torch.cat([first.expand(patches.shape[0], 1, -1), patches], dim=1)


class MoeVlmVisionAttention(nn.Module):
    """Bidirectional multi-head attention over the patches of one picture."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        """`(I, P, D)` -> `(I, P, D)` and the attention weights `(I, h, P, P)`, None unless eager."""
        heads = (-1, self.head_dim)
        query, key, value = (
            projection(hidden_states).unflatten(-1, heads).transpose(1, 2)  # (I, h, P, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            query,
            key,
            value,
            None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return self.out_proj(output.flatten(2)), weights


class MoeVlmVisionMLP(nn.Module):
    """The ViT's two-layer feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        """`(..., D)` -> `(..., D)`."""
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class MoeVlmVisionExperts(nn.Module):
    """E two-layer experts with biases, stacked: each can hold a copy of a dense layer of the tower."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, width = config.num_experts, config.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, config.hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """As [`MoeVlmExperts.forward`]: tokens `(N, D)`, experts and weights `(N, K)` -> `(N, D)`."""
        run = self.every_expert if torch.compiler.is_compiling() or torch.jit.is_tracing() else self.chosen_experts
        return run(hidden_states, top_k_index, top_k_weights).to(hidden_states.dtype)

    def every_expert(self, tokens, experts, weights):
        """All experts on all tokens: E/K times the work, and fit for graphs, as no shape depends on the routing."""
        rows = tokens.expand(self.num_experts, -1, -1)  # (E, N, D)
        hidden = self.act_fn(torch.baddbmm(self.up_proj_bias.unsqueeze(1), rows, self.up_proj.transpose(1, 2)))
        outputs = torch.baddbmm(self.down_proj_bias.unsqueeze(1), hidden, self.down_proj.transpose(1, 2))
        return sum_over_experts(outputs, experts, weights)

    def chosen_experts(self, tokens, experts, weights):
        """One expert after the other, on the tokens that chose it."""
        visits = sort_visits(experts, self.num_experts)
        rows = tokens[visits.tokens].split(visits.counts)
        stacked = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
        outputs = [  # unbind, not weight[e]: each index would build a zero gradient of all E experts
            F.linear(self.act_fn(F.linear(row, up, up_bias)), down, down_bias)
            for row, up, up_bias, down, down_bias in zip(rows, *(weight.unbind(0) for weight in stacked))
        ]
        outputs.append(outputs[0].new_zeros(1, tokens.shape[-1]))  # for choices that are skipped
        outputs = torch.cat(outputs)  # (visits + 1, D)
        outputs = outputs.index_select(0, visits.places.flatten()).unflatten(0, experts.shape)  # (N, K, D)
        return (outputs * weights.unsqueeze(-1)).sum(1)


class MoeVlmVisionLayer(GradientCheckpointingLayer):
    """One ViT block; its feed-forward is dense or sparse as `mlp_layer_types` says."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MoeVlmVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        experts_class = MoeVlmVisionExperts if config.expert_form == "mlp" else MoeVlmExperts
        self.mlp = MoeVlmSparseBlock(config, experts_class) if self.sparse else MoeVlmVisionMLP(config)

    def forward(self, hidden_states, num_experts_per_tok=None, **kwargs):
        """`(I, P, D)` -> `(I, P, D)`."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        routing = {"num_experts_per_tok": num_experts_per_tok} if self.sparse else {}
        return hidden_states + self.mlp(self.layer_norm2(hidden_states), **routing)


@dataclass
class MoeVlmVisionOutput(ModelOutput):
    """Outputs of the tower, and of the connector; all but the last hidden state per layer, when asked for.

    T tokens of a picture: in the tower its P patches and a class token if there is one, in the connector what pixel
    shuffle leaves. `last_hidden_state` is `(I, P, D)`, the connector's `(I, T, D)`; so is the last of `hidden_states`,
    the others are `(I, T, D)`. `router_logits` are L tensors `(I*T, E)` in float32, `router_indices` and
    `router_choices` L tensors `(I*T, K)` for E experts and K visits.
    """

    last_hidden_state: Optional[torch.FloatTensor] = None
    hidden_states: Optional[tuple[torch.FloatTensor, ...]] = None
    attentions: Optional[tuple[torch.FloatTensor, ...]] = None
    router_logits: Optional[tuple[torch.FloatTensor, ...]] = None
    router_indices: Optional[tuple[torch.LongTensor, ...]] = None
    router_choices: Optional[tuple[torch.LongTensor, ...]] = None


class MoeVlmVisionModel(MoeVlmPreTrainedModel):
    """The vision tower."""

    config_class = MoeVlmVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {
        "hidden_states": MoeVlmVisionLayer,
        "attentions": MoeVlmVisionAttention,
        **ROUTER_RECORDERS,
    }

    def __init__(self, config):
        super().__init__(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = MoeVlmVisionEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(width, eps=eps) if config.use_pre_layernorm else nn.Identity()
        self.layers = nn.ModuleList(MoeVlmVisionLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=eps) if config.use_post_layernorm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MoeVlmVisionEmbeddings) and module.class_embedding is not None:
            init.normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MoeVlmPositionEmbedding):
            init.normal_(module.weight, mean=0.0, std=self.config.position_initializer_range)
        elif isinstance(module, MoeVlmVisionExperts):
            init.normal_(module.up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, MoeVlmStemConv):  # a deep ReLU stack: He et al. 2015 (arXiv:1502.01852)
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @recorded
    def forward(self, pixel_values, **kwargs):
        """Encode pictures.

        Args:
            pixel_values: `(I, C, H, W)`, normalised as the processor does.
            num_experts_per_tok (in `kwargs`): K of this call instead of the config's.

        Returns:
            [`MoeVlmVisionOutput`] without the class token: `last_hidden_state` is `(I, P, D)`.
        """
        hidden_states = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.post_layernorm(hidden_states)
        return MoeVlmVisionOutput(last_hidden_state=hidden_states[:, int(self.config.use_class_token) :])
