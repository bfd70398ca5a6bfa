"""The whole model: pictures merged into text, masks, outputs, losses, saving.

Shapes: B batch, S sequence, I images, D hidden, V vocabulary, h heads, E experts, K experts per token.
"""

import json

import pytest
import torch
from conftest import IMAGE_TOKEN, tiny_config
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from moevlm import base_moevlm
from moevlm.base_moevlm import attention_mask_for
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration, MoeVlmModel
from moevlm.router_losses_moevlm import router_statistics

# Another order of sums in a model of eight blocks: float32 roundings of logits of size 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def row(length, *image_starts):
    """Random ids `(1, length)` with the four placeholders of a picture from each start on."""
    ids = torch.randint(6, 64, (1, length))
    for start in image_starts:
        ids[:, start : start + 4] = IMAGE_TOKEN
    return ids


def pictures(count):
    return torch.randn(count, 3, 32, 32)


def pad(rows, side, amount=0):
    """Rows of several lengths as one batch: `input_ids` and `attention_mask`, `amount` columns longer than needed."""
    length = max(ids.shape[1] for ids in rows) + amount
    batch = {"input_ids": torch.zeros(len(rows), length, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for number, ids in enumerate(rows):
        place = slice(length - ids.shape[1], None) if side == "left" else slice(ids.shape[1])
        batch["input_ids"][number, place] = ids[0]
        batch["attention_mask"][number, place] = 1
    return batch


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=lambda m, n=name: n + m
        )


# Pictures in text


def test_image_tokens_stand_where_the_placeholders_are_in_order_of_appearance(tiny):
    ids, pixels = torch.cat([row(20, 0, 9), row(20, 16)]), pictures(3)
    features = tiny.model.encode_images(pixels).tokens
    embeds = tiny.get_input_embeddings()(ids).clone()
    embeds[0, 0:4], embeds[0, 9:13], embeds[1, 16:20] = features
    expected = tiny.lm_head(tiny.language_model(inputs_embeds=embeds).last_hidden_state)
    torch.testing.assert_close(tiny(input_ids=ids, pixel_values=pixels).logits, expected, **CLOSE)


def test_a_picture_changes_what_follows_and_nothing_before(tiny):
    ids = row(20, 8)
    first, second = (tiny(input_ids=ids, pixel_values=pictures(1)).logits for _ in range(2))
    torch.testing.assert_close(first[:, :8], second[:, :8], **CLOSE)
    assert (first[:, 8:] - second[:, 8:]).abs().amax(-1).min() > 1e-3


def test_an_image_in_one_row_only_and_none_in_the_other(tiny):
    rows, pixels = [row(16), row(16, 4)], pictures(1)
    together = tiny(input_ids=torch.cat(rows), pixel_values=pixels).logits
    torch.testing.assert_close(together[:1], tiny(input_ids=rows[0]).logits, **CLOSE)
    torch.testing.assert_close(together[1:], tiny(input_ids=rows[1], pixel_values=pixels).logits, **CLOSE)


def test_a_training_batch_without_images_equals_evaluation_and_reaches_the_tower_with_zeros(tiny):
    ids = row(16)
    expected = tiny(input_ids=ids).logits
    tiny.train()
    before = {name: value.clone() for name, value in tiny.vision_tower.named_buffers()}
    torch.testing.assert_close(tiny(input_ids=ids).logits, expected, **CLOSE)
    found = gradients(tiny, input_ids=ids, labels=ids)
    # An idle expert of the zero picture has a zero gradient too: every parameter must take part in DDP's reduction.
    assert found.keys() == dict(tiny.named_parameters()).keys()
    assert all(
        torch.count_nonzero(found[f"model.vision_tower.{n}"]) == 0 for n, _ in tiny.vision_tower.named_parameters()
    )
    for name, value in tiny.vision_tower.named_buffers():
        assert torch.equal(value, before[name]), name
    assert tiny.vision_tower.training


def test_inputs_embeds_equal_input_ids(tiny, batch):
    batch.pop("labels")
    expected = tiny(**batch).logits
    embeds = tiny.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(tiny(inputs_embeds=embeds, **batch).logits, expected, **CLOSE)


# Errors


@pytest.mark.parametrize("images, placeholders", [(1, 8), (3, 8)])
def test_other_numbers_of_pictures_and_placeholders_are_refused(tiny, batch, images, placeholders):
    message = f"input_ids has {placeholders} image placeholders, but {images} pictures give {4 * images} image tokens"
    with pytest.raises(ValueError, match=message):
        tiny(input_ids=batch["input_ids"], pixel_values=pictures(images))


@pytest.mark.parametrize("training", [True, False])
def test_no_pictures_are_as_none(tiny, training):
    ids = torch.arange(6, 14).unsqueeze(0)
    tiny.train(training)
    empty, none = (tiny(input_ids=ids, pixel_values=pixels, labels=ids) for pixels in (pictures(0), None))
    assert torch.equal(empty.loss, none.loss) and empty.expert_load_image is None
    empty.loss.backward()


def test_placeholders_without_pictures_are_refused(tiny, batch):
    with pytest.raises(ValueError, match="input_ids has image placeholders, but there are no pixel_values"):
        tiny(input_ids=batch["input_ids"])


def test_both_ids_and_embeddings_or_neither_are_refused(tiny):
    embeds = torch.randn(1, 4, 32)
    for arguments in ({"input_ids": row(4), "inputs_embeds": embeds}, {}):
        for model in (tiny, tiny.model, tiny.language_model):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                model(**arguments)


def test_pixel_values_of_other_dimensions_are_refused(tiny, batch):
    with pytest.raises(ValueError, match="pixel_values has 5 dimensions, expected 4"):
        tiny(input_ids=batch["input_ids"], pixel_values=pictures(2).unsqueeze(0))


def test_a_checkpoint_of_another_model_type_is_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["vision_config"]["model_type"] = stored["model_type"] = "siglip"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="model_type='siglip'"):
        MoeVlmForConditionalGeneration.from_pretrained(tmp_path)


# Padding, masks, segments


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [0, 1, 13])
def test_padding_its_side_and_its_amount_change_nothing(tiny, side, amount):
    rows, pixels = [row(9, 2), row(17, 0, 10), row(5)], pictures(3)
    padded = pad(rows, side, amount)
    logits = tiny(**padded, pixel_values=pixels).logits
    singles = (pixels[:1], pixels[1:], None)
    for number, (ids, images) in enumerate(zip(rows, singles)):
        alone = tiny(input_ids=ids, pixel_values=images).logits[0]
        torch.testing.assert_close(logits[number][padded["attention_mask"][number] == 1], alone, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_router_losses_nor_any_gradient(tiny, batch, side):
    labels, pixels = batch["labels"], batch["pixel_values"]
    expected, expected_gradients = tiny(**batch), gradients(tiny, **batch)
    padded = pad(list(batch["input_ids"].split(1)), side, 7)
    padded["labels"] = torch.full_like(padded["input_ids"], -100)
    padded["labels"][padded["attention_mask"] == 1] = labels.flatten()
    found = tiny(**padded, pixel_values=pixels)
    for name in ("loss", "aux_loss", "z_loss", "router_entropy"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    torch.testing.assert_close(torch.cat(found.expert_load), torch.cat(expected.expert_load))
    assert_same_gradients(gradients(tiny, **padded, pixel_values=pixels), expected_gradients)


def test_no_token_sees_a_later_one(tiny):
    ids = row(12)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] - 5) % 50 + 7
    first, second = tiny(input_ids=ids).logits, tiny(input_ids=changed).logits
    torch.testing.assert_close(first[:, :7], second[:, :7], **CLOSE)
    assert (first[:, 7:] - second[:, 7:]).abs().max() > 1e-2


def test_eager_equals_sdpa(config, tmp_path):
    MoeVlmForConditionalGeneration(config).save_pretrained(tmp_path)
    eager, sdpa = (
        MoeVlmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    )
    assert eager.vision_tower.config._attn_implementation == "eager"
    assert sdpa.language_model.config._attn_implementation == "sdpa"
    batch, pixels = pad([row(9, 2), row(17, 0, 10)], "left"), pictures(3)
    attended = batch["attention_mask"] == 1
    first, second = (model(**batch, pixel_values=pixels).logits[attended] for model in (eager, sdpa))
    torch.testing.assert_close(first, second, **CLOSE)


def packed_turns():
    """A prefix with a picture and two turns: the packed row, and each turn in a row of its own."""
    prefix, tails = row(8, 2), (row(5), row(7))
    rows = [torch.cat([prefix, tail], dim=1) for tail in tails]
    packed = {
        "input_ids": torch.cat([prefix, *tails], dim=1),
        "segment_ids": torch.tensor([[0] * 8 + [1] * 5 + [2] * 7]),
        "position_ids": torch.tensor([[*range(8), *range(8, 13), *range(8, 15)]]),
    }
    # The first token of a turn is the user's: nothing learns to foretell it.
    labels = [torch.cat([torch.full((1, 9), -100), tail[:, 1:]], dim=1) for tail in tails]
    packed["labels"] = torch.cat([labels[0], labels[1][:, 8:]], dim=1)
    return packed, rows, labels


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_packed_row_equals_its_turns_one_by_one(attention, padding):
    model = MoeVlmForConditionalGeneration(tiny_config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)).eval()
    for part in (model.config.vision_config, model.config.connector_config):
        part.router_aux_loss_coef = part.router_z_loss_coef = 0.0  # they would count the prefix twice
    model.set_attn_implementation(attention)
    packed, rows, labels = packed_turns()
    pixels, valid = pictures(1), 4 + 6
    fill = {"input_ids": 0, "segment_ids": 0, "position_ids": 0, "labels": -100}
    packed = {name: torch.nn.functional.pad(value, (0, padding), value=fill[name]) for name, value in packed.items()}
    packed["attention_mask"] = torch.tensor([[1] * 20 + [0] * padding])
    logits = model(pixel_values=pixels, **packed).logits
    singles = [model(input_ids=ids, pixel_values=pixels).logits for ids in rows]
    torch.testing.assert_close(logits[:, :13], singles[0], **CLOSE)
    torch.testing.assert_close(logits[:, 13:20], singles[1][:, 8:], **CLOSE)
    found = gradients(model, pixel_values=pixels, num_items_in_batch=valid, **packed)
    each = [
        gradients(model, input_ids=ids, labels=label, pixel_values=pixels, num_items_in_batch=valid)
        for ids, label in zip(rows, labels)
    ]
    assert_same_gradients(found, {name: each[0][name] + each[1][name] for name in each[0]})


@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1, 2], [0, 1, 1, 2, 2]]])
@pytest.mark.parametrize("mask", [[[1] * 5] * 2, [[0, 0, 1, 1, 1], [1] * 5], [[1, 1, 1, 0, 0], [1] * 5]])
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_the_direct_mask_is_the_library_s(monkeypatch, config, cache, mask, segments):
    text = config.text_config
    text._attn_implementation, mask, states = "sdpa", torch.tensor(mask), torch.zeros(2, 5, text.hidden_size)
    segments = None if segments is None else torch.tensor(segments)
    if cache == "static" and segments is not None:
        pytest.skip("packed rows are for training")
    caches = {None: lambda: None, "dynamic": DynamicCache, "static": lambda: StaticCache(config=text, max_cache_len=9)}

    def masks():
        """Of the first call and, with a cache, of the next token."""
        past, made = caches[cache](), []
        for start, count in ((0, 5), (5, 1)):
            seen = torch.nn.functional.pad(mask, (0, start + count - 5), value=1)
            places = torch.arange(start, start + count)
            embeds, marks = states[:, :count], segments if start == 0 else None
            given = {"cache_position": places}
            made.append(attention_mask_for(text, embeds, seen, past, places.unsqueeze(0), marks, given))
            if past is None:
                break
            keys = torch.zeros(2, text.num_key_value_heads, count, text.head_dim)
            past.update(keys, keys, 0, given)
        return made

    found = masks()
    monkeypatch.setattr(base_moevlm, "takes_direct_mask", lambda *_: False)
    for one, other in zip(found, masks(), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other.expand_as(one))


def test_segments_really_hide_the_other_turn(tiny):
    packed, _, _ = packed_turns()
    pixels, segments = pictures(1), packed.pop("segment_ids")
    hidden = tiny(pixel_values=pixels, segment_ids=segments, **packed).logits
    seen = tiny(pixel_values=pixels, segment_ids=torch.zeros_like(segments), **packed).logits
    torch.testing.assert_close(hidden[:, :13], seen[:, :13], **CLOSE)
    assert (hidden[:, 13:] - seen[:, 13:]).abs().max() > 1e-2


def test_segments_are_refused_beside_a_mask_that_is_ready(tiny):
    packed = packed_turns()[0]
    length = packed["input_ids"].shape[1]
    mask = torch.zeros(1, 1, length, length)
    with pytest.raises(ValueError, match="segment_ids are not read beside a 4-D attention_mask; pass a 2-D one"):
        tiny(pixel_values=pictures(1), **packed | {"attention_mask": mask})


def test_segments_are_refused_beside_a_cache_that_holds_or_reserves_tokens(tiny):
    packed, pixels = packed_turns()[0], pictures(1)
    static = StaticCache(config=tiny.config.text_config, max_cache_len=32)
    used = tiny(pixel_values=pixels, use_cache=True, **packed).past_key_values
    for cache in (static, used):
        with pytest.raises(ValueError, match="segment_ids are of a whole row; pass past_key_values=None"):
            tiny(pixel_values=pixels, past_key_values=cache, use_cache=True, **packed)


# Outputs


def test_hidden_states_attentions_and_router_logits_have_these_counts_and_shapes(config, batch):
    model = MoeVlmForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    flags = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    output = model(**batch, **flags)
    assert [states.shape for states in output.hidden_states] == [(2, 24, 32)] * (3 + 1)
    assert [weights.shape for weights in output.attentions] == [(2, 4, 24, 24)] * 3
    # One sparse layer in the tower (2 pictures of 16 patches), one in the connector, two in the decoder.
    tokens = [2 * 16, 2 * 4, 2 * 24, 2 * 24]
    assert [logits.shape for logits in output.router_logits] == [(count, 4) for count in tokens]
    assert [indices.shape for indices in output.router_indices] == [(count, 2) for count in tokens]
    assert [load.shape for load in output.expert_load] == [(4,)] * 4
    assert output.router_entropy.shape == (4,)
    assert output.image_hidden_states.shape == (2, 4, 32)


def test_nothing_is_recorded_unless_asked_for(tiny, batch):
    batch.pop("labels")
    output = tiny(**batch)
    for name in ("loss", "hidden_states", "attentions", "router_logits", "aux_loss", "z_loss", "expert_load"):
        assert output[name] is None if name in output else True, name


def test_labels_report_router_numbers_even_with_coefficients_of_zero(batch):
    config = tiny_config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    for part in (config.vision_config, config.connector_config):
        part.router_aux_loss_coef = part.router_z_loss_coef = 0.0
    output = MoeVlmForConditionalGeneration(config).eval()(**batch)
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, labels))
    assert output.aux_loss >= 1.0 - 1e-3 and output.z_loss > 0


def test_without_logits_loss_and_gradients_are_the_same(tiny, batch):
    results = []
    for skip in (False, True):
        tiny.zero_grad()
        output = tiny(**batch, skip_logits=skip, num_items_in_batch=7)
        output.loss.backward()
        assert (output.logits is None) == skip
        results.append([output.loss, *(parameter.grad for parameter in tiny.parameters())])
    assert (batch["labels"] == -100).any()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_the_head_sees_learnt_positions_alone(tiny, batch):
    seen = []
    tiny.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1]))
    tiny(**batch, skip_logits=True)
    assert seen == [((batch["labels"][:, 1:] != -100).sum(),)]


def test_a_row_without_labels_gives_a_gradient_of_zero(tiny, batch):
    batch["labels"][:] = -100
    tiny(**batch, skip_logits=True, num_items_in_batch=7).loss.backward()
    assert torch.equal(tiny.lm_head.weight.grad, torch.zeros_like(tiny.lm_head.weight))


def test_labels_shifted_by_the_caller_give_the_same_loss(tiny, batch):
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = tiny(**batch, num_items_in_batch=7).loss
    for skip in (False, True):
        found = tiny(**batch, shift_labels=shifted, skip_logits=skip, num_items_in_batch=7).loss
        torch.testing.assert_close(found, expected, **CLOSE)
    shifted[:, -4:] = -100
    found = [tiny(**batch, shift_labels=shifted, skip_logits=skip).loss for skip in (False, True)]
    torch.testing.assert_close(*found, **CLOSE)
    assert not torch.allclose(found[0], tiny(**batch).loss)


def test_a_loss_alone_needs_labels(tiny, batch):
    batch.pop("labels")
    with pytest.raises(ValueError, match="skip_logits=True .* needs labels"):
        tiny(**batch, skip_logits=True)


def test_the_recorded_indices_are_the_largest_logits(tiny, batch):
    output = tiny(**batch, output_router_logits=True)
    for logits, indices in zip(output.router_logits, output.router_indices):
        assert torch.equal(logits.topk(2).indices, indices)


def test_a_dense_model_has_a_loss_and_no_router_numbers(batch):
    config = tiny_config(moe_layers="none")
    config.vision_config.mlp_layer_types = ["dense", "dense"]
    config.connector_config.num_experts = 0
    output = MoeVlmForConditionalGeneration(config).eval()(**batch, output_router_logits=True)
    assert output.loss.isfinite() and output.get("aux_loss") is None


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep_cuts_the_logits_only(tiny, batch, keep):
    batch.pop("labels")
    everything = tiny(**batch).logits
    wanted = everything[:, -keep:] if isinstance(keep, int) else everything[:, keep]
    torch.testing.assert_close(tiny(**batch, logits_to_keep=keep).logits, wanted, **CLOSE)


def test_the_base_model_gives_the_states_that_the_head_reads(tiny, batch):
    batch.pop("labels")
    states = tiny.model(**batch).last_hidden_state
    torch.testing.assert_close(tiny.lm_head(states), tiny(**batch).logits)


# Gradients


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}}])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(config, batch, kwargs):
    tiny = with_heavy_router_losses(config)
    expected = gradients(tiny, **batch)
    tiny.gradient_checkpointing_enable(**kwargs)
    tiny.language_model.train(), tiny.vision_tower.layers.train()  # else nothing is made again
    assert tiny.language_model.layers[0].gradient_checkpointing and tiny.vision_tower.layers[0].gradient_checkpointing
    assert_same_gradients(gradients(tiny, **batch), expected)


def test_reentrant_checkpointing_is_refused(tiny):
    with pytest.raises(ValueError, match="use_reentrant=True would lose gradients of the router losses"):
        tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_batch_without_pictures_leaves_frozen_batch_norms_as_they_are(tiny, batch):
    tiny.train()
    tiny.vision_tower.embeddings.eval()
    tiny(input_ids=batch["input_ids"].clamp(min=6), labels=batch["labels"])
    assert tiny.vision_tower.layers.training and not tiny.vision_tower.embeddings.training


def test_segments_are_not_dropped_by_flash_attention(config):
    config.text_config._attn_implementation = "flash_attention_2"
    segments = torch.tensor([[0, 0, 1, 1]])
    given = (torch.zeros(1, 4, 32), torch.ones(1, 4).long(), None, torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="flash_attention_2 knows no segments.*use sdpa or flex_attention"):
        attention_mask_for(config.text_config, *given, segments, {"cache_position": torch.arange(4)})
    attention_mask_for(config.text_config, *given, 0 * segments, {"cache_position": torch.arange(4)})


@pytest.mark.parametrize("class_token", [False, True])
def test_a_tower_may_lie_on_the_disk(tiny, batch, tmp_path, class_token):
    config = tiny.config
    config.vision_config.use_class_token = class_token
    model = MoeVlmForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "disk", "model.connector": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    loaded = MoeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **CLOSE)


def with_heavy_router_losses(config):
    """Coefficients that make the router losses the larger part of the router's gradient."""
    for part in (config.vision_config, config.connector_config, config.text_config):
        part.router_aux_loss_coef, part.router_z_loss_coef = 10.0, 1.0
    return MoeVlmForConditionalGeneration(config).eval()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gradient_accumulation_on_identical_data_changes_no_gradient(config, batch, steps):
    model = with_heavy_router_losses(config)
    expected = gradients(model, **batch)
    valid = (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    for _ in range(steps):
        model(**batch, num_items_in_batch=valid * steps).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            assert (parameter.grad.norm() / expected[name].norm()).item() == pytest.approx(1.0, abs=1e-5), name
    assert_same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@pytest.mark.parametrize("part, layers", [("vision", slice(0, 2)), ("connector", slice(2, 3)), ("text", slice(3, 5))])
def test_each_parts_coefficients_weigh_its_own_layers(config, batch, part, layers):
    config.vision_config.mlp_layer_types = ["sparse", "sparse"]
    for name in ("vision", "connector", "text"):
        heavy = float(name == part)
        getattr(config, f"{name}_config").router_aux_loss_coef = heavy
        getattr(config, f"{name}_config").router_z_loss_coef = 10 * heavy
    output = MoeVlmForConditionalGeneration(config).eval()(**batch, output_router_logits=True)
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    numbers = [
        router_statistics([each], [indices]) for each, indices in zip(output.router_logits, output.router_indices)
    ]
    expected = torch.stack([each.balance[0] + 10 * each.z[0] for each in numbers[layers]]).mean()
    found = output.loss - torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_micro_batches_weigh_by_their_labels(config, batch):
    model = with_heavy_router_losses(config)
    few = {**batch, "labels": batch["labels"].clone()}
    few["labels"][:, 15:] = -100  # columns 12 to 14: 3 labels a row instead of 12
    lighter, whole = model(**few, num_items_in_batch=2 * 15), model(**batch, num_items_in_batch=2 * 15)
    token_losses = [
        torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum"
        )
        for output, inputs in ((lighter, few), (whole, batch))
    ]
    router = [output.loss - loss / 30 for output, loss in zip((lighter, whole), token_losses)]
    torch.testing.assert_close(router[1] / router[0], torch.tensor(12 / 3), rtol=1e-4, atol=0)


def test_the_loss_falls_on_one_batch(config, batch):
    model = MoeVlmForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


# Saving


def assert_same_weights(first, second):
    """Bit for bit. Outputs are equal up to rounding only: loaded weights lie at other addresses, and the products of a
    CPU add up in another order where an address is odd."""
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


def test_save_and_reload_give_identical_weights_and_the_same_logits(tiny, batch, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_same_weights(loaded, tiny)
    torch.testing.assert_close(loaded(**batch).logits, tiny(**batch).logits, **CLOSE)


def test_the_base_model_loads_from_a_checkpoint_with_head(tiny, batch, tmp_path):
    tiny.save_pretrained(tmp_path)
    batch.pop("labels")
    states = MoeVlmModel.from_pretrained(tmp_path).eval()(**batch).last_hidden_state
    torch.testing.assert_close(states, tiny.model(**batch).last_hidden_state, **CLOSE)


def test_tied_embeddings_are_one_tensor_before_and_after_saving(batch, tmp_path):
    model = MoeVlmForConditionalGeneration(tiny_config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    for each in (model, loaded):
        assert each.lm_head.weight is each.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **CLOSE)


def test_untied_embeddings_stay_two_tensors(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_keep_old_logits_and_survive_saving(batch, tied, tmp_path):
    model = MoeVlmForConditionalGeneration(tiny_config(tie_word_embeddings=tied)).eval()
    before = model(**batch).logits
    model.resize_token_embeddings(70)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 70
    torch.testing.assert_close(model(**batch).logits[..., :64], before, **CLOSE)
    model.save_pretrained(tmp_path)
    loaded = MoeVlmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **CLOSE)


def test_experts_lie_on_disk_as_in_memory(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "model.language_model.layers.0.mlp"
    assert stored[f"{prefix}.experts.gate_up_proj"].shape == (4, 2 * 16, 32)
    assert stored[f"{prefix}.experts.down_proj"].shape == (4, 32, 16)
    assert stored[f"{prefix}.gate.weight"].shape == (4, 32)
    assert stored.keys() == tiny.state_dict().keys()


def test_a_bfloat16_model_is_finite_forward_and_backward(config, batch):
    model = MoeVlmForConditionalGeneration(config).to(torch.bfloat16).train()
    output = model(**batch, output_router_logits=True)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_recording_routing_leaves_no_module_wrapped(tiny, batch):
    for _ in range(3):
        tiny(**batch)  # labels make it record logits and indices of every router
    wrapped = [name for name, module in tiny.named_modules() if module.forward.__func__ is not type(module).forward]
    assert not wrapped


def test_pictures_that_are_not_square_are_refused_even_where_their_patches_could_form_a_square(tiny):
    with pytest.raises(ValueError, match=r"pixel_values is \(1, 3, 16, 64\); resize the pictures to squares"):
        tiny.model.encode_images(torch.randn(1, 3, 16, 64))


def test_a_blank_picture_beyond_float16_leaves_text_only_training_finite(tiny, batch):
    model = tiny.half().train()
    # 16 tokens of 32 such numbers sum to more than 65,504.
    model.model.connector.projector[2].bias.data.fill_(600.0)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, 9)
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_a_saved_part_does_not_mark_its_config_as_the_whole_models(tiny, tmp_path):
    tiny.model.vision_tower.save_pretrained(tmp_path / "tower")
    assert "auto_map" not in json.loads((tmp_path / "tower" / "config.json").read_text())
    tiny.save_pretrained(tmp_path / "whole")
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "auto_map" in saved and "auto_map" not in saved["vision_config"]


@pytest.mark.parametrize("kinds", [None, ["shared", "image", "text", "shared"]])
def test_no_buffer_that_is_left_out_of_checkpoints_is_empty(kinds):
    # accelerate's offload_buffers looks into each of them.
    model = MoeVlmForConditionalGeneration(tiny_config(expert_modalities=kinds))
    for module in model.modules():
        assert all(module._buffers[name] is not None for name in module._non_persistent_buffers_set)
    assert not any("allowed" in name for name in model.state_dict())


@pytest.mark.parametrize("part", ["vision_tower.layers.0", "vision_tower.embeddings", "connector", "connector.mlp"])
def test_a_part_spread_by_fsdp2_runs_in_evaluation_too(part, tiny, batch, monkeypatch):
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, 9)
    calls = []
    monkeypatch.setattr(tiny.model, "visit_unused_tower", lambda states: calls.append(1) or states)
    tiny.eval()(input_ids=ids)
    assert not calls
    tiny.model.get_submodule(part).set_requires_gradient_sync = None  # what FSDP2 gives each of its modules
    tiny(input_ids=ids)
    assert calls
