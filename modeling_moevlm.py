# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""MoeVlm: a vision tower, a connector and a decoder whose feed-forward layers are sparse mixtures of experts.

Shapes: B batch, S sequence, T keys, I images, P patches, V vocabulary, D hidden, h heads, d head width, E experts,
K experts per token, L sparse layers.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .base_moevlm import IS_TRANSFORMERS_5, ROUTER_RECORDERS, MoeVlmPreTrainedModel, attention_mask_for, init, recorded
from .configuration_moevlm import MoeVlmConnectorConfig, MoeVlmTextConfig
from .experts_moevlm import MoeVlmMLP, MoeVlmSparseBlock
from .generation_moevlm import MoeVlmGenerationMixin
from .graphs_moevlm import opaque_experts  # noqa: F401 (transformers 4.57 copies only the files named here)
from .kernels_moevlm import grouped_experts  # noqa: F401
from .router_losses_moevlm import router_losses
from .routing_moevlm import MoeVlmRouter
from .sparsity_moevlm import SparseConfig  # noqa: F401
from .summary_moevlm import MoeSummary
from .vision_moevlm import MoeVlmVisionModel, MoeVlmVisionOutput, eager_attention_forward


@dataclass
class MoeVlmModelOutput(ModelOutput):
    """Outputs of the decoder, and of the whole model without its head.

    Args:
        last_hidden_state: `(B, S, D)`.
        past_key_values: The cache, if used.
        hidden_states: Decoder layers + 1 tensors `(B, S, D)`, when asked for.
        attentions: Per decoder layer `(B, h, S, T)`, when asked for.
        router_logits: L tensors `(tokens, E)` in float32: tower first, then connector, then decoder.
        router_indices: L tensors `(tokens, K)`, the experts visited, in the same order; the id E marks a visit that
            `router_top_p` spared or a capacity dropped.
        image_hidden_states: `(I, image tokens, D)`, what the connector gave the decoder.
        router_layers: Sparse layers of (tower, connector, decoder), which splits the three tuples.
        router_choices: As `router_indices`, before a capacity dropped visits.
        image_mask: `(B, S)`, true for image tokens; None without pictures.
    """

    last_hidden_state: Optional[torch.FloatTensor] = None
    past_key_values: Optional[Cache] = None
    hidden_states: Optional[tuple[torch.FloatTensor, ...]] = None
    attentions: Optional[tuple[torch.FloatTensor, ...]] = None
    router_logits: Optional[tuple[torch.FloatTensor, ...]] = None
    router_indices: Optional[tuple[torch.LongTensor, ...]] = None
    image_hidden_states: Optional[torch.FloatTensor] = None
    router_layers: Optional[tuple[int, int, int]] = None
    router_choices: Optional[tuple[torch.LongTensor, ...]] = None
    image_mask: Optional[torch.BoolTensor] = None


@dataclass
class MoeVlmOutput(ModelOutput):
    """Outputs of [`MoeVlmForConditionalGeneration`].

    Args:
        loss: Language modelling loss plus weighted router losses, when labels were given.
        logits: `(B, S, V)`; None under `skip_logits`.
        aux_loss, z_loss, local_entropy_loss, global_entropy_loss: Means over all L sparse layers of the balance loss
            (1.0 = perfect balance), the router z-loss and LIMoE's two.
        expert_load: L tensors `(E,)`, each expert's share of its layer's visits, in the order of `router_logits`.
        router_entropy: `(L,)`, mean entropy of the router's distribution over experts, in nats.
        past_key_values, hidden_states, attentions, router_logits, router_indices, image_hidden_states: As in
            [`MoeVlmModelOutput`].
        expert_counts, chosen_counts: L tensors `(E,)`, visits of unpadded tokens, after and before any are dropped.
        experts_per_token: `(L,)`, visits of an unpadded token that took place, their mean.
        expert_load_text, expert_load_image: As `expert_load`, of the decoder's text tokens and image tokens alone;
            None without pictures.
        dropped_tokens: `(L,)`, share of the chosen visits that a capacity dropped.
        max_router_logit: `(L,)`, the largest logit of an unpadded token.
    """

    loss: Optional[torch.FloatTensor] = None
    logits: Optional[torch.FloatTensor] = None
    aux_loss: Optional[torch.FloatTensor] = None
    z_loss: Optional[torch.FloatTensor] = None
    expert_load: Optional[tuple[torch.FloatTensor, ...]] = None
    router_entropy: Optional[torch.FloatTensor] = None
    past_key_values: Optional[Cache] = None
    hidden_states: Optional[tuple[torch.FloatTensor, ...]] = None
    attentions: Optional[tuple[torch.FloatTensor, ...]] = None
    router_logits: Optional[tuple[torch.FloatTensor, ...]] = None
    router_indices: Optional[tuple[torch.LongTensor, ...]] = None
    image_hidden_states: Optional[torch.FloatTensor] = None
    expert_counts: Optional[tuple[torch.FloatTensor, ...]] = None
    expert_load_text: Optional[tuple[torch.FloatTensor, ...]] = None
    expert_load_image: Optional[tuple[torch.FloatTensor, ...]] = None
    dropped_tokens: Optional[torch.FloatTensor] = None
    max_router_logit: Optional[torch.FloatTensor] = None
    local_entropy_loss: Optional[torch.FloatTensor] = None
    global_entropy_loss: Optional[torch.FloatTensor] = None
    chosen_counts: Optional[tuple[torch.FloatTensor, ...]] = None
    experts_per_token: Optional[torch.FloatTensor] = None


class MoeVlmRMSNorm(nn.Module):
    """Root mean square norm in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        """`(..., D)` -> `(..., D)`, same dtype."""
        states = hidden_states.float()
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * states.to(hidden_states.dtype)


class MoeVlmRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34), with transformers' variants."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            self.rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = self.rope_init_fn(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, seq_len=None, **kwargs):
        """Inverse frequencies `(d/2,)` and the attention factor 1.0."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states, position_ids):
        """Positions `(B, S)` -> cosines and sines, `(B, S, d)` both, in the dtype of `hidden_states`."""
        with torch.autocast(hidden_states.device.type, enabled=False):  # bf16 positions collide beyond 256
            angles = position_ids.unsqueeze(-1).float() * self.inv_freq.float().to(hidden_states.device)  # (B, S, d/2)
            angles = torch.cat([angles, angles], dim=-1)
            cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cosines.to(hidden_states.dtype), sines.to(hidden_states.dtype)


def rotate(states, cosines, sines):
    """Queries or keys `(B, h, S, d)` turned by their positions' `(B, S, d)` cosines and sines."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sines.unsqueeze(1)


class MoeVlmAttention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.normed = (-1, config.head_dim) if config.qk_norm_per_head else (1, -1)
        self.q_norm, self.k_norm = (
            MoeVlmRMSNorm(config.head_dim if config.qk_norm_per_head else size, config.rms_norm_eps)
            if config.use_qk_norm
            else nn.Identity()
            for size in (query_size, key_size)
        )

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        """Attend.

        Args:
            hidden_states: `(B, S, D)`.
            position_embeddings: Cosines and sines `(B, S, d)`.
            attention_mask: What [`attention_mask_for`] made.
            past_key_values: Cache to read and extend, or None.

        Returns:
            `(B, S, D)` and the attention weights `(B, h, S, T)`, None unless eager.
        """
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, self.normed))
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, self.normed))
        query = query.flatten(-2).unflatten(-1, heads).transpose(1, 2)  # (B, h, S, d)
        key = key.flatten(-2).unflatten(-1, heads).transpose(1, 2)  # (B, h_kv, S, d)
        value = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)  # (B, h_kv, S, d)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            cache_kwargs = {"cache_position": kwargs.get("cache_position")}
            key, value = past_key_values.update(key, value, self.layer_idx, cache_kwargs)  # (B, h_kv, T, d)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class MoeVlmDecoderLayer(GradientCheckpointingLayer):
    """One decoder block; its feed-forward is dense or sparse as `mlp_layer_types` says."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = MoeVlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MoeVlmAttention(config, layer_idx)
        self.post_attention_layernorm = MoeVlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = config.mlp_layer_types[layer_idx] == "sparse"
        dense = config.hidden_size, config.intermediate_size, config.hidden_act
        self.mlp = MoeVlmSparseBlock(config) if self.sparse else MoeVlmMLP(*dense)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        image_mask=None,
        num_experts_per_tok=None,
        **kwargs,
    ):
        """`(B, S, D)` -> `(B, S, D)`."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        routing = {"image_mask": image_mask, "num_experts_per_tok": num_experts_per_tok} if self.sparse else {}
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), **routing)


class MoeVlmTextModel(MoeVlmPreTrainedModel):
    """The decoder without its head."""

    config_class = MoeVlmTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": MoeVlmDecoderLayer, "attentions": MoeVlmAttention, **ROUTER_RECORDERS}

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoeVlmDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MoeVlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MoeVlmRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_initializer_range:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_initializer_range)

    @recorded
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        segment_ids=None,
        **kwargs,
    ):
        """Run the decoder layers.

        Args:
            input_ids: `(B, S)`; or `inputs_embeds` `(B, S, D)`.
            attention_mask: `(B, T)`, 1 for a real token; or a prepared 4-D mask.
            position_ids: `(B, S)`; counted on from the cache when None.
            past_key_values: Cache to go on from.
            use_cache: Whether to return a cache.
            segment_ids: `(B, S)`, see [`attention_mask_for`].
            image_mask (in `kwargs`): `(B, S)` bool, true for image tokens, for `expert_modalities`; None: all text.
            num_experts_per_tok (in `kwargs`): K of this call instead of the config's.

        Returns:
            [`MoeVlmModelOutput`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if kwargs.get("cache_position") is None and not IS_TRANSFORMERS_5:
            kwargs["cache_position"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = attention_mask_for(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids, segment_ids, kwargs
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        cache = past_key_values if use_cache else None
        return MoeVlmModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=cache)


class MoeVlmConnector(MoeVlmPreTrainedModel):
    """Pixel shuffle, a projector, and a sparse block behind it if the config has experts."""

    config_class = MoeVlmConnectorConfig
    input_modalities = ("image",)
    _can_record_outputs = ROUTER_RECORDERS

    def __init__(self, config, vision_hidden_size):
        super().__init__(config)
        self.factor = config.pixel_shuffle_factor
        width, bias = vision_hidden_size * self.factor**2, config.projector_bias
        if config.projector == "linear":
            self.projector = nn.Linear(width, config.hidden_size, bias=bias)
        else:
            self.projector = nn.Sequential(
                nn.Linear(width, config.hidden_size, bias=bias),
                ACT2FN[config.projector_act],
                nn.Linear(config.hidden_size, config.hidden_size, bias=bias),
            )
        self.norm = MoeVlmRMSNorm(config.hidden_size, config.rms_norm_eps) if config.num_experts else None
        self.mlp = MoeVlmSparseBlock(config) if config.num_experts else None
        self.post_init()

    def pixel_shuffle(self, features):
        """`(I, P, D)` -> `(I, P / r^2, r^2 * D)`: each r x r square of patches becomes one token, row by row.

        Source: Shi et al. 2016 (arXiv:1609.05158), sec. 3.2, in its inverse direction, as Idefics3 (arXiv:2408.12637).
        """
        side = int(features.shape[1] ** 0.5)
        if side**2 != features.shape[1] or side % self.factor:
            raise ValueError(
                f"{features.shape[1]} patches a picture do not form a square that pixel_shuffle_factor={self.factor} "
                "divides; resize the pictures to squares of a fitting size"
            )
        grid = features.unflatten(1, (side // self.factor, self.factor, side // self.factor, self.factor))
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)  # (I, side/r, side/r, r, r, D) before flattening

    @recorded
    def forward(self, features, num_experts_per_tok=None, **kwargs):
        """Turn the tower's patches `(I, P, D_vision)` into the decoder's image tokens.

        Returns:
            [`MoeVlmVisionOutput`]; `last_hidden_state` is `(I, P / r^2, D)`.
        """
        tokens = self.projector(self.pixel_shuffle(features))
        if self.mlp is not None:
            tokens = tokens + self.mlp(self.norm(tokens), num_experts_per_tok=num_experts_per_tok)
        return MoeVlmVisionOutput(last_hidden_state=tokens)


class EncodedImages(NamedTuple):
    """Pictures on their way into the decoder."""

    tokens: torch.Tensor  # (I, image tokens, D)
    routing: dict[str, tuple[torch.Tensor, ...]]  # by name of the record: tower's, then connector's
    tower_layers: int  # how many of them are the tower's


class MoeVlmModel(MoeVlmPreTrainedModel):
    """Tower, connector and decoder joined: pictures become tokens of one sequence with the text."""

    input_modalities = ("image", "text")

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = MoeVlmVisionModel._from_config(config.vision_config)
        self.connector = MoeVlmConnector._from_config(
            config.connector_config, vision_hidden_size=config.vision_config.hidden_size
        )
        self.language_model = MoeVlmTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_decoder(self):
        return self.language_model

    def encode_images(self, pixel_values, output_router_logits=False, num_experts_per_tok=None):
        """Pictures `(I, C, H, W)` -> [`EncodedImages`]."""
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values has {pixel_values.ndim} dimensions, expected 4: (pictures, C, H, W)")
        if pixel_values.shape[-2] != pixel_values.shape[-1]:
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}; resize the pictures to squares")
        options = {**self.recording(output_router_logits), "num_experts_per_tok": num_experts_per_tok}
        features = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **options)
        tokens = self.connector(features.last_hidden_state, **options)
        routing = {name: (*features.get(name, ()), *tokens.get(name, ())) for name in ROUTER_RECORDERS}
        return EncodedImages(tokens.last_hidden_state, routing, len(features.router_logits or ()))

    def get_image_features(self, pixel_values, **kwargs):
        """What the decoder sees of pictures `(I, C, H, W)`: image tokens `(I, image tokens, D)`.

        transformers 5 expects them as the `pooler_output` of an output object, 4.57 as a tensor.
        """
        tokens = self.encode_images(pixel_values, num_experts_per_tok=kwargs.get("num_experts_per_tok")).tokens
        return BaseModelOutputWithPooling(pooler_output=tokens) if IS_TRANSFORMERS_5 else tokens

    def merge(self, inputs_embeds, image_positions, image_tokens):
        """Put image tokens `(I, image tokens, D)` where `image_positions` `(B, S)` is true, in order of appearance.

        Raises:
            ValueError: the number of placeholders is not the number of image tokens.
        """
        if not torch.compiler.is_compiling():
            wanted, given = int(image_positions.sum()), image_tokens.shape[:-1].numel()
            if wanted != given:
                raise ValueError(
                    f"input_ids has {wanted} image placeholders, but {image_tokens.shape[0]} pictures give {given} "
                    f"image tokens ({image_tokens.shape[1]} each); build both with the processor, and pass them whole "
                    "(without prefill_chunk_size)"
                )
        positions = image_positions.to(inputs_embeds.device).unsqueeze(-1).expand_as(inputs_embeds)
        return inputs_embeds.masked_scatter(positions, image_tokens.to(inputs_embeds))

    def refuse_placeholders(self, input_ids):
        """Raise `ValueError` if a call without pictures has placeholders in its ids `(B, S)`; not asked in decoding."""
        unasked = input_ids is None or input_ids.shape[1] == 1 < self.config.image_seq_length  # decoding
        if unasked or torch.compiler.is_compiling():
            return
        if (input_ids == self.config.image_token_id).any():
            raise ValueError("input_ids has image placeholders, but there are no pixel_values; pass the pictures too")

    def is_sharded(self):
        """Whether FSDP2 spreads part of tower or connector over ranks, which then run it together in evaluation too."""
        tower, connector = self.vision_tower, self.connector
        parts = (tower, *tower.layers, *tower.children(), connector, *connector.children())
        return any(hasattr(part, "set_requires_gradient_sync") for part in parts)

    def visit_unused_tower(self, inputs_embeds):
        """`inputs_embeds` `(B, S, D)` plus a zero that depends on tower and connector, for a batch without pictures.

        Every rank must run the same modules: FSDP2 would wait and DDP would raise on a text-only rank beside an image
        rank. BatchNorm statistics stay as they are.
        """
        config = self.config.vision_config
        modes = [(module, module.training) for module in self.vision_tower.modules()]
        blank = inputs_embeds.new_zeros(1, config.num_channels, config.image_size, config.image_size)
        self.vision_tower.eval()
        tokens = self.encode_images(blank).tokens
        for module, training in modes:
            module.training = training
        return inputs_embeds + (0.0 * tokens).sum().to(inputs_embeds.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        segment_ids=None,
        image_mask=None,
        output_router_logits=None,
        num_experts_per_tok=None,
        **kwargs,
    ):
        """Encode the pictures, merge them into the text, run the decoder.

        Args:
            input_ids: `(B, S)` with `image_token_id` where image tokens go; or `inputs_embeds` `(B, S, D)`.
            pixel_values: `(I, C, H, W)`, all pictures of the batch in order of appearance; I = 0 is as None.
            segment_ids: `(B, S)`: tokens of one row that see segment 0 and their own segment only (several questions
                about one picture in one row).
            image_mask: `(B, S)` bool, where `inputs_embeds` hold image tokens that were merged before, such as those of
                [`get_image_features`] for several questions; those of `pixel_values` are found without it.
            output_router_logits: Whether to return `router_logits`, `router_indices` and `router_choices`.
            num_experts_per_tok: K of this call in tower, connector and decoder, instead of each config's: a dial
                between speed and quality on any checkpoint.
            attention_mask, position_ids, past_key_values, use_cache: As in [`MoeVlmTextModel.forward`].

        Returns:
            [`MoeVlmModelOutput`].
        """
        inputs_embeds = self.embed(input_ids, inputs_embeds, image_mask)
        encoded = None
        if pixel_values is not None and len(pixel_values):
            encoded = self.encode_images(pixel_values, output_router_logits, num_experts_per_tok)
            positions = self.image_positions(input_ids, inputs_embeds)
            inputs_embeds = self.merge(inputs_embeds, positions, encoded.tokens)
            image_mask = positions if image_mask is None else image_mask | positions
        else:
            self.refuse_placeholders(input_ids)
            if self.training or self.is_sharded():
                inputs_embeds = self.visit_unused_tower(inputs_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            image_mask=image_mask,
            num_experts_per_tok=num_experts_per_tok,
            **self.recording(output_router_logits),
            **kwargs,
        )
        outputs.image_mask = image_mask
        return self.with_image_routing(outputs, encoded)

    def embed(self, input_ids, inputs_embeds, image_mask):
        """The tokens' embeddings `(B, S, D)`; `ValueError` for ids beside embeddings, or a mask of another shape."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_mask is not None and image_mask.shape != inputs_embeds.shape[:2]:
            expected = tuple(inputs_embeds.shape[:2])
            raise ValueError(f"image_mask is {tuple(image_mask.shape)}; give one value for each token, {expected}")
        return inputs_embeds

    def image_positions(self, input_ids, inputs_embeds):
        """Where image tokens go, `(B, S)` bool; found by the placeholder's embedding when there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = self.get_input_embeddings()(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    def with_image_routing(self, outputs, encoded):
        """The decoder's outputs with the tower's and the connector's in front."""
        decoder_layers = len(outputs.router_logits or ())
        if encoded is None:
            outputs.router_layers = (0, 0, decoder_layers)
            return outputs
        outputs.image_hidden_states = encoded.tokens
        connector_layers = len(encoded.routing["router_logits"]) - encoded.tower_layers
        outputs.router_layers = (encoded.tower_layers, connector_layers, decoder_layers)
        for name, values in encoded.routing.items():
            if values:
                outputs[name] = (*values, *outputs.get(name, ()))
        return outputs


# Outputs of the model that stand unchanged in those of the model with a head.
HANDED_ON = ("past_key_values", "hidden_states", "attentions", "image_hidden_states")


class MoeVlmForConditionalGeneration(MoeVlmPreTrainedModel, MoeVlmGenerationMixin):
    """MoeVlm with a language modelling head: captions, answers, dialogue."""

    input_modalities = ("image", "text")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = MoeVlmModel(config)
        self.vocab_size = config.text_config.vocab_size
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def language_model(self):
        return self.model.language_model

    @property
    def vision_tower(self):
        return self.model.vision_tower

    def get_image_features(self, pixel_values, **kwargs):
        """As [`MoeVlmModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def score_tokens(self, states, labels, logits_to_keep, skip_logits, shift_labels=None, **kwargs):
        """States `(B, S, D)` -> logits `(B, kept, V)`; or `(n, V)`, and the n next tokens that are learnt by name."""
        if not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return self.lm_head(states[:, keep]), {}
        if labels is None:
            raise ValueError("skip_logits=True leaves the loss, which needs labels: pass them, or skip_logits=False")
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # (B, S)
        learnt = shift_labels != -100
        return self.lm_head(states[learnt]), {"shift_labels": shift_labels[learnt]}

    def total_loss(self, logits, labels, losses, num_items_in_batch=None, num_tokens_in_batch=None, **kwargs):
        """Token loss plus weighted router losses (`losses`, [`RouterLosses`] or None), a scalar.

        With `num_items_in_batch`, the labels of the global batch, the token loss is a sum over this number. The router
        losses weigh by `num_tokens_in_batch` ([`router_losses`]), else as the share of the labels: neither grows.
        """
        loss = self.loss_function(
            logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch, **kwargs
        )
        if losses is None:
            return loss
        if num_items_in_batch is None or num_tokens_in_batch is not None:
            return loss + losses.weighted
        return loss + (labels[:, 1:] != -100).sum() / num_items_in_batch * losses.weighted

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        segment_ids=None,
        output_router_logits=None,
        num_experts_per_tok=None,
        logits_to_keep=0,
        skip_logits=False,
        num_items_in_batch=None,
        num_tokens_in_batch=None,
        **kwargs,
    ):
        """Predict the next token everywhere, and the loss if there are labels.

        Args:
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                segment_ids, num_experts_per_tok, image_mask (in `kwargs`): As in [`MoeVlmModel.forward`].
            labels: `(B, S)` token ids, -100 where nothing is to be learnt; shifted inside.
            output_router_logits: Whether to return router logits and, without labels too, the router losses.
            logits_to_keep: 0 for logits of all positions, n for the last n, or a tensor of positions.
            skip_logits: Whether the loss is all that is wanted: the head then sees only positions that are learnt.
            num_items_in_batch, num_tokens_in_batch: Labels, and text and image tokens `(2,)`, of the global batch.

        Returns:
            [`MoeVlmOutput`].
        """
        if output_router_logits is None:
            output_router_logits = self.config.text_config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_router_logits=output_router_logits or labels is not None,
            num_experts_per_tok=num_experts_per_tok,
            **kwargs,
        )
        logits, learnt = self.score_tokens(outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **kwargs)
        losses = router_losses(self.config, outputs, attention_mask, num_tokens_in_batch)
        sizes = {"num_items_in_batch": num_items_in_batch, "num_tokens_in_batch": num_tokens_in_batch}
        loss = None if labels is None else self.total_loss(logits, labels, losses, **sizes, **(kwargs | learnt))
        return MoeVlmOutput(
            loss=loss,
            logits=None if skip_logits else logits,
            **(losses.reported() if losses else {}),
            router_logits=outputs.router_logits if output_router_logits else None,
            router_indices=outputs.router_indices if output_router_logits else None,
            **{name: getattr(outputs, name) for name in HANDED_ON},
        )


__all__ = ["MoeSummary", "MoeVlmConnector", "MoeVlmForConditionalGeneration", "MoeVlmModel", "MoeVlmPreTrainedModel"]
__all__ += ["MoeVlmRouter", "MoeVlmTextModel", "MoeVlmVisionModel"]
