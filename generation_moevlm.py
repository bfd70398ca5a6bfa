# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Pictures in `generate`: each is encoded once, stays beside its row, and is never asked for by the model itself."""

import math

import torch
from transformers import GenerationMixin, LogitsProcessor


class NoPlaceholder(LogitsProcessor):
    """Bars the image token: sampled, or copied by prompt lookup, it would want a picture.

    The setting `suppress_tokens` would look for it among all V tokens at each step.
    """

    def __init__(self, image_token_id):
        self.image_token_id = image_token_id

    def __call__(self, input_ids, scores):
        """Scores `(B, V)` with that of the image token at -inf."""
        scores = scores.clone()
        scores[:, self.image_token_id] = -math.inf
        return scores


class MoeVlmGenerationMixin(GenerationMixin):
    """What `generate` must know of pictures; the rest is the library's.

    Shapes: B rows, S tokens of the whole sequence, s tokens of a step, I pictures.
    """

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.insert(0, NoPlaceholder(self.config.image_token_id))  # before top-k may leave it alone
        return processors

    # generate() takes inputs_embeds only where they are named here.
    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, inputs_embeds=None, image_mask=None, **kwargs
    ):
        """As in transformers, with the pictures that the cache does not hold yet."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        step = inputs.get("input_ids")
        if pixel_values is not None and step is not None:
            cache = kwargs.get("past_key_values")
            pixel_values = self.pictures_of_step(pixel_values, input_ids, step, cache)
        inputs["pixel_values"] = pixel_values
        inputs["image_mask"] = image_mask if step is None else None  # it is about the embeddings
        return inputs

    def pictures_of_step(self, pixel_values, input_ids, step, cache):
        """The pictures whose placeholders are in this step, or None.

        Args:
            pixel_values: `(I, C, H, W)`, the pictures of the whole sequence, or of this step alone.
            input_ids: `(B, S)`, the whole sequence.
            step: `(B, s)`, its tokens that are not in the cache.
            cache: Of the tokens before, or None.
        """
        # Decoding; asking the cache would wait for the device.
        if step.shape[1] == 1 < min(input_ids.shape[1], self.config.image_seq_length):
            return None
        if cache is None or not cache.get_seq_length():
            return pixel_values
        new, known = ((ids == self.config.image_token_id).sum(1) for ids in (step, input_ids))  # (B,)
        if not new.any():
            return None
        vision, connector = self.config.vision_config, self.config.connector_config
        each = (pixel_values.shape[-1] // vision.patch_size // connector.pixel_shuffle_factor) ** 2
        if torch.equal(new, known) or len(pixel_values) * each == new.sum():
            return pixel_values
        rows = zip(pixel_values.split((known // each).tolist()), (new // each).tolist())
        return torch.cat([pictures[len(pictures) - count :] for pictures, count in rows])

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat each row for beams or samples, and the pictures of each row with it, in the row's order."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and len(pixel_values) and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            positions = self.model.image_positions(input_ids if embeds is None else None, embeds).sum(1)  # (B,)
            each = int(positions.sum()) // len(pixel_values)
            if each and not (positions % each).any():  # else the first forward says what is wrong
                rows = pixel_values.split((positions // each).tolist())
                pixel_values = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
