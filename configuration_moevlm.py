# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Every architectural number of MoeVlm, its default and its bound."""

from transformers import PretrainedConfig

from .sparsity_moevlm import ExpertsConfig, SparseConfig, check_activations, check_positive, layer_types_from

# One map for both transformers lines: 4.57 loads by the old name, 5.x by the new ones.
AUTO_MAP = {
    "AutoConfig": "configuration_moevlm.MoeVlmConfig",
    "AutoModel": "modeling_moevlm.MoeVlmModel",
    "AutoModelForVision2Seq": "modeling_moevlm.MoeVlmForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_moevlm.MoeVlmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_moevlm.MoeVlmForConditionalGeneration",
}


class MoeVlmVisionConfig(SparseConfig):
    r"""
    The vision tower: a pre-norm ViT whose feed-forward layers are dense or sparse.

    Args:
        hidden_size: Width D of the tower.
        intermediate_size: Width of a dense feed-forward layer.
        num_hidden_layers: Number of ViT blocks; 0 leaves the stem alone.
        num_attention_heads: Heads; must divide `hidden_size`.
        num_channels: Channels of a picture.
        image_size: Side of the square picture, in pixels, that the position embeddings are made for.
        patch_size: Side of the square, in pixels, that becomes one token.
        stem: "patch" (one convolution, as SigLIP and CLIP) or "conv" (3x3 stride-2 convolutions with BatchNorm,
            which makes small towers trainable from scratch; Xiao et al. 2021, arXiv:2106.14881).
        stem_channels: Channels of each convolution of the "conv" stem; `patch_size` is 2 to the power of their number.
        hidden_act: Activation of the dense layers (SigLIP "gelu_pytorch_tanh", CLIP "quick_gelu").
        expert_act: Activation of the experts' gate.
        expert_form: "swiglu", or "mlp": two layers with biases and `hidden_act`, so that an expert can be a copy of a
            dense layer.
        layer_norm_eps: Epsilon of the layer norms.
        attention_dropout: Dropout on attention weights while training.
        patch_bias: Whether the patch convolution has a bias (SigLIP yes, CLIP no).
        use_class_token: Whether a class token leads the patches (CLIP); the connector never sees it.
        use_pre_layernorm: Whether a norm follows the embeddings (CLIP).
        use_post_layernorm: Whether a norm follows the last block.
        position_initializer_range: Standard deviation of initial position embeddings. At `initializer_range` they would
            be lost beside the patches, and small models take long to tell left from right.
        moe_layers: Rule or indices for `mlp_layer_types`, see [`layer_types_from`].
        mlp_layer_types: "dense" or "sparse" for each block; wins over `moe_layers`.
        **kwargs: Fields of [`SparseConfig`].
    """

    model_type = "moevlm_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_channels=3,
        image_size=64,
        patch_size=16,
        stem="conv",
        stem_channels=(32, 64, 96, 128),
        hidden_act="gelu_pytorch_tanh",
        expert_act="silu",
        expert_form="swiglu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
        patch_bias=True,
        use_class_token=False,
        use_pre_layernorm=False,
        use_post_layernorm=True,
        position_initializer_range=0.5,
        moe_layers="none",
        mlp_layer_types=None,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.stem = stem
        self.stem_channels = list(stem_channels)
        self.hidden_act = hidden_act
        self.expert_act = expert_act
        self.expert_form = expert_form
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.patch_bias = patch_bias
        self.use_class_token = use_class_token
        self.use_pre_layernorm = use_pre_layernorm
        self.use_post_layernorm = use_post_layernorm
        self.position_initializer_range = position_initializer_range
        self.mlp_layer_types = mlp_layer_types or layer_types_from(moe_layers, num_hidden_layers)
        super().__init__(**kwargs)
        self._check()

    def _check(self):
        check_positive(self, ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"))
        check_activations(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.image_size < self.patch_size or (self.stem == "conv" and self.image_size % self.patch_size):
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.expert_form not in ("swiglu", "mlp"):
            raise ValueError(f"expert_form={self.expert_form!r} must be 'swiglu' or 'mlp'")
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"stem={self.stem!r} must be 'patch' or 'conv'")
        if self.stem == "conv" and 2 ** len(self.stem_channels) != self.patch_size:
            raise ValueError(
                f"stem_channels={self.stem_channels} shrinks a picture {2 ** len(self.stem_channels)} times, but "
                f"patch_size={self.patch_size}; give log2(patch_size) channels or change patch_size"
            )
        for name in ("expert_modalities", "router_aux_loss_per_modality"):
            self.refuse(name, "its tokens are all image tokens")
        self.check_layer_types()
        if "sparse" in self.mlp_layer_types:
            self.check_sparse()

    @property
    def patches_per_side(self):
        """Patches along one side of a picture of `image_size` pixels (a remainder is dropped, as in SigLIP)."""
        return self.image_size // self.patch_size


class MoeVlmConnectorConfig(SparseConfig):
    r"""
    The connector: pixel shuffle, a projector, and optionally a sparse block behind it.

    Args:
        pixel_shuffle_factor: r; squares of r x r patches become one token of r*r times the width.
        projector: "linear" (as SmolVLM) or "mlp" (two layers, as LLaVA).
        projector_act: Activation of the "mlp" projector.
        projector_bias: Whether the projector's layers have biases.
        hidden_size: Width behind the projector, which is the decoder's; set by [`MoeVlmConfig`].
        expert_act: Activation of the experts' gate.
        rms_norm_eps: Epsilon of the norm in front of the sparse block.
        **kwargs: Fields of [`SparseConfig`]; `num_experts` 0 (the default here) leaves the sparse block out.
    """

    model_type = "moevlm_connector"
    base_config_key = "connector_config"

    def __init__(
        self,
        pixel_shuffle_factor=1,
        projector="mlp",
        projector_act="gelu",
        projector_bias=True,
        hidden_size=128,
        expert_act="silu",
        rms_norm_eps=1e-6,
        **kwargs,
    ):
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.projector = projector
        self.projector_act = projector_act
        self.projector_bias = projector_bias
        self.hidden_size = hidden_size
        self.expert_act = expert_act
        self.rms_norm_eps = rms_norm_eps
        super().__init__(**{"num_experts": 0, **kwargs})
        self._check()

    def _check(self):
        check_positive(self, ("pixel_shuffle_factor", "hidden_size"))
        check_activations(self)
        if self.projector not in ("linear", "mlp"):
            raise ValueError(f"projector={self.projector!r} must be 'linear' or 'mlp'")
        for name in ("expert_modalities", "router_aux_loss_per_modality"):
            self.refuse(name, "its tokens are all image tokens")
        self.refuse("expert_capacity_factor", "only the vision tower may drop tokens")
        if self.num_experts:
            self.check_sparse()


class MoeVlmTextConfig(SparseConfig):
    r"""
    The decoder: pre-norm blocks with RMSNorm, RoPE, grouped-query attention and SwiGLU, dense or sparse.

    Args:
        vocab_size: Number of token embeddings.
        hidden_size: Width D.
        intermediate_size: Width of a dense feed-forward layer.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; must divide `num_attention_heads`.
        head_dim: Width of a head; `hidden_size // num_attention_heads` when None.
        hidden_act: Activation of dense layers and of the experts' gate.
        max_position_embeddings: Longest sequence that the positions are made for.
        rms_norm_eps: Epsilon of the norms.
        attention_bias: Whether q, k and v have biases (Qwen2).
        use_qk_norm: Whether q and k are normalised before rotation.
        qk_norm_per_head: Whether each head is normalised by itself (Qwen3), or all heads as one vector (OLMoE).
        attention_dropout: Dropout on attention weights while training.
        rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0, ...}`, transformers' form.
        tie_word_embeddings: Whether the head reuses the token embeddings.
        use_cache: Whether keys and values are cached by default.
        embedding_initializer_range: Standard deviation of initial token embeddings; `initializer_range` when None.
        moe_layers: Rule or indices for `mlp_layer_types`, see [`layer_types_from`].
        mlp_layer_types: "dense" or "sparse" for each layer; wins over `moe_layers`.
        pad_token_id, bos_token_id, eos_token_id: Token ids.
        **kwargs: Fields of [`SparseConfig`].
    """

    model_type = "moevlm_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        attention_bias=False,
        use_qk_norm=False,
        qk_norm_per_head=True,
        attention_dropout=0.0,
        rope_parameters=None,
        tie_word_embeddings=False,
        use_cache=True,
        embedding_initializer_range=None,
        moe_layers="alternate",
        mlp_layer_types=None,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.use_qk_norm = use_qk_norm
        self.qk_norm_per_head = qk_norm_per_head
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        self.embedding_initializer_range = embedding_initializer_range
        self.mlp_layer_types = mlp_layer_types or layer_types_from(moe_layers, num_hidden_layers)
        self._take_positions(rope_parameters, kwargs)
        # transformers 5 drops these four from the base class, 4.57 sets them there: both ways they must arrive.
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
        self._check()

    def _take_positions(self, rope_parameters, kwargs):
        """To be called before the base class: transformers 5 fills in what is missing, which changes the meaning."""
        rope = self.rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})
        if not {"rope_type", "rope_theta"} <= rope.keys():
            raise ValueError(f"rope_parameters={rope} must have both rope_type and rope_theta")
        if {**kwargs, **rope}.get("partial_rotary_factor", 1) != 1:
            raise ValueError("partial_rotary_factor must be 1: positions turn whole heads; leave it out")
        # 4.57 reads the two attributes, 5.x the dict (and would warn about the attributes).
        mirrors = {name: kwargs.pop(name, None) for name in ("rope_theta", "rope_scaling")}
        if rope_parameters is None and any(mirrors.values()):
            raise ValueError(f"{mirrors} are read from rope_parameters alone; write them in there")
        if not hasattr(PretrainedConfig, "rope_scaling"):  # transformers 4
            self.rope_theta = rope["rope_theta"]
            self.rope_scaling = None if rope["rope_type"] == "default" else rope

    def _check(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_positive(self, (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"))
        check_activations(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, but positions turn pairs of numbers; make it even")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
        self.refuse("expert_capacity_factor", "a token would be dropped because of tokens that come later")
        self.check_layer_types()
        if "sparse" in self.mlp_layer_types:
            self.check_sparse()

    @property
    def expert_act(self):
        """The experts' activation, under the name that tower and connector use."""
        return self.hidden_act


class MoeVlmConfig(ExpertsConfig):
    r"""
    The whole model: a vision tower, a connector and a decoder.

    Args:
        vision_config: [`MoeVlmVisionConfig`] or its dict.
        text_config: [`MoeVlmTextConfig`] or its dict.
        connector_config: [`MoeVlmConnectorConfig`] or its dict.
        image_token_id: Id of the token that stands for one image token in `input_ids`.
        tie_word_embeddings: Same as the decoder's; kept equal.

    Example:

    ```python
    >>> config = MoeVlmConfig(text_config={"num_experts": 4})
    >>> config.image_seq_length
    16
    ```
    """

    model_type = "moevlm"
    sub_configs = {
        "vision_config": MoeVlmVisionConfig,
        "connector_config": MoeVlmConnectorConfig,
        "text_config": MoeVlmTextConfig,
    }
    # All outputs but loss and logits: a Trainer would gather them for its metrics.
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "attentions", "image_hidden_states", "z_loss",
                                   "aux_loss", "local_entropy_loss", "global_entropy_loss", "expert_load",
                                   "expert_counts", "expert_load_text", "expert_load_image", "chosen_counts",
                                   "experts_per_token", "dropped_tokens", "router_entropy", "max_router_logit",
                                   "router_logits", "router_indices"]  # fmt: skip

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        connector_config=None,
        image_token_id=5,
        **kwargs,
    ):
        self.vision_config = self._part("vision_config", vision_config)
        self.connector_config = self._part("connector_config", connector_config)
        self.text_config = self._part("text_config", text_config)
        self.image_token_id = image_token_id
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        # transformers 4.57 reads this flag from the text config, 5.x from here; token ids are read from both.
        for name in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
            if name in kwargs:
                setattr(self.text_config, name, kwargs[name])
            kwargs[name] = getattr(self.text_config, name)
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The config of a stored dict; one of another model is refused, where transformers warns and takes defaults."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"model_type={found!r} is another model's, not {cls.model_type!r}; load it with its own class"
            )
        return super().from_dict(config_dict, **kwargs)

    def _part(self, name, value):
        config_class = self.sub_configs[name]
        if value is None:
            return config_class()
        if isinstance(value, dict):
            return config_class(**value)
        if getattr(value, "model_type", None) != config_class.model_type:
            raise TypeError(f"{name} must be a dict or a {config_class.__name__}, got {type(value).__name__}")
        return value

    def _check(self):
        self.connector_config.hidden_size = self.text_config.hidden_size
        side, factor = self.vision_config.patches_per_side, self.connector_config.pixel_shuffle_factor
        if side % factor:
            raise ValueError(
                f"pixel_shuffle_factor={factor} does not divide the {side} patches of a side "
                f"(image_size={self.vision_config.image_size}, patch_size={self.vision_config.patch_size})"
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside the vocabulary of "
                f"vocab_size={self.text_config.vocab_size} tokens"
            )

    def part_fields(self):
        """The `own_fields` of tower, connector and decoder, by their names here."""
        return {name: getattr(self, name).own_fields() for name in self.sub_configs}

    @property
    def image_seq_length(self):
        """Image tokens that one picture of `image_size` becomes in the decoder."""
        return (self.vision_config.patches_per_side // self.connector_config.pixel_shuffle_factor) ** 2


__all__ = ["AUTO_MAP", "MoeVlmConfig", "MoeVlmConnectorConfig", "MoeVlmTextConfig", "MoeVlmVisionConfig"]
