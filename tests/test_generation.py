"""Decoding: the cache against the full forward, batches against single calls, beams and samples with pictures."""

import copy

import pytest
import torch
from conftest import IMAGE_TOKEN
from transformers import CompileConfig, DynamicCache, StaticCache

CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # another order of sums: float32 roundings of logits of size 1 to 10


@pytest.fixture
def model(tiny):
    """The tiny model, never stopping early."""
    tiny.generation_config.eos_token_id = None
    tiny.generation_config.pad_token_id = 0
    tiny.generation_config.suppress_tokens = [0]
    return tiny


def row(length, *image_starts):
    """Random ids `(1, length)` with the four placeholders of a picture from each start on."""
    ids = torch.randint(6, 64, (1, length))
    for start in image_starts:
        ids[:, start : start + 4] = IMAGE_TOKEN
    return ids


def left_padded(rows):
    length = max(ids.shape[1] for ids in rows)
    ids = [torch.nn.functional.pad(ids, (length - ids.shape[1], 0)) for ids in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(each), (length - each.shape[1], 0)) for each in rows]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}


def prompts():
    """Three rows of different lengths with one, two and no pictures, and all the pictures."""
    return [row(9, 2), row(17, 0, 10), row(5)], torch.randn(3, 3, 32, 32)


def generated(model, **inputs):
    """The new tokens alone, `(B, new)`."""
    return model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]


def one_by_one(model, rows, pixels, **options):
    images = (pixels[:1], pixels[1:], None)
    singles = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    for single, pictures in zip(singles, images):
        if pictures is not None:
            single["pixel_values"] = pictures
    return torch.cat([generated(model, **single, **options) for single in singles])


def new_cache(kind, model):
    if kind == "dynamic":
        return DynamicCache(config=model.config.text_config)
    return StaticCache(config=model.config.text_config, max_cache_len=32)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(model, kind, attention):
    model.set_attn_implementation(attention)
    ids, pixels = torch.cat([row(20, 1), row(20, 3)]), torch.randn(2, 3, 32, 32)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    cache = new_cache(kind, model)
    positions = torch.arange(20)
    first = model(input_ids=ids[:, :9], pixel_values=pixels, past_key_values=cache, use_cache=True)
    steps = [first.logits]
    # Two tokens at once, then one by one.
    for chunk in (positions[9:11], *positions[11:].split(1)):
        output = model(
            input_ids=ids[:, chunk],
            past_key_values=cache,
            use_cache=True,
            cache_position=chunk,
            position_ids=chunk.unsqueeze(0),
        )
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, **CLOSE)


@torch.no_grad()
def test_positions_count_on_from_the_cache(model):
    ids = row(12)
    first = model(input_ids=ids[:, :7], use_cache=True)
    second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), expected, **CLOSE)


def test_generate_equals_greedy_choice_by_full_forwards(model):
    ids, pixels = row(12, 3), torch.randn(1, 3, 32, 32)
    found, wanted = generated(model, input_ids=ids, pixel_values=pixels), ids
    for _ in range(6):
        logits = model(input_ids=wanted, pixel_values=pixels).logits[:, -1]
        logits[:, [0, IMAGE_TOKEN]] = -torch.inf
        wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, wanted[:, 12:])
    assert len(found.unique()) > 1  # a stuck model would agree with anything


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_no_cache_and_a_static_cache_generate_the_same(model, options):
    rows, pixels = prompts()
    batch = {**left_padded(rows), "pixel_values": pixels}
    assert torch.equal(generated(model, **batch, **options), generated(model, **batch))


def test_a_batch_of_different_lengths_generates_what_the_single_calls_do(model):
    rows, pixels = prompts()
    together = generated(model, **left_padded(rows), pixel_values=pixels)
    assert torch.equal(together, one_by_one(model, rows, pixels))


@torch.no_grad()
def test_a_model_without_settings_never_writes_a_placeholder(tiny):
    scores = tiny.generate(row(5), max_new_tokens=2, output_scores=True, return_dict_in_generate=True).scores
    assert all(step[0, IMAGE_TOKEN] == -float("inf") for step in scores)


@pytest.mark.parametrize("prompt", ["lookup", "assistant"])
def test_assisted_generation_equals_greedy_decoding(model, prompt):
    model.generation_config.eos_token_id = 1  # the assistant's settings need one
    ids, pixels = row(14, 3), torch.randn(1, 3, 32, 32)
    expected = generated(model, input_ids=ids, pixel_values=pixels)
    ids[0, 2] = expected[0, 0]  # so that lookup finds the placeholders behind it
    expected = generated(model, input_ids=ids, pixel_values=pixels)
    options = {"prompt_lookup_num_tokens": 5} if prompt == "lookup" else {"assistant_model": copy.deepcopy(model)}
    assert torch.equal(generated(model, input_ids=ids, pixel_values=pixels, **options), expected)


@pytest.mark.parametrize("given", ["all pictures", "the new one"])
def test_a_conversation_goes_on_from_its_cache(model, given):
    pixels, cache = torch.randn(2, 3, 32, 32), DynamicCache(config=model.config.text_config)
    first = model.generate(
        row(14, 3), pixel_values=pixels[:1], past_key_values=cache, do_sample=False, max_new_tokens=4
    )
    ids = torch.cat([first, row(5)], 1)
    fresh = generated(model, input_ids=ids, pixel_values=pixels[:1])
    assert torch.equal(generated(model, input_ids=ids, pixel_values=pixels[:1], past_key_values=cache), fresh)
    ids = torch.cat([ids, fresh, row(9, 2)], 1)
    shown = pixels if given == "all pictures" else pixels[1:]
    fresh = generated(model, input_ids=ids, pixel_values=pixels)
    assert torch.equal(generated(model, input_ids=ids, pixel_values=shown, past_key_values=cache), fresh)


def test_two_conversations_go_on_from_one_cache(model):
    pixels, cache = torch.randn(5, 3, 32, 32), DynamicCache(config=model.config.text_config)
    first = torch.cat([row(14, 3), row(14, 9)])
    first = model.generate(first, pixel_values=pixels[[0, 2]], past_key_values=cache, do_sample=False, max_new_tokens=2)
    ids = torch.cat([first, torch.cat([row(12, 2), row(12, 1, 7)])], 1)
    fresh = generated(model, input_ids=ids, pixel_values=pixels)
    assert torch.equal(generated(model, input_ids=ids, pixel_values=pixels, past_key_values=cache), fresh)


def test_beams_of_pictures_of_another_size(model):
    ids, pixels = torch.randint(6, 64, (1, 24)), torch.randn(1, 3, 64, 64)
    ids[:, 2:18] = IMAGE_TOKEN
    beams = generated(model, input_ids=ids, pixel_values=pixels, num_beams=2, num_return_sequences=2)
    assert beams.shape == (2, 6)
    with pytest.raises(ValueError, match="input_ids has 0 image placeholders, but 1 pictures"):
        generated(model, input_ids=row(14), pixel_values=pixels[..., :32, :32], num_beams=2)


def test_beams_of_no_picture_are_those_of_text(model):
    ids = row(14)
    without = generated(model, input_ids=ids, num_beams=2)
    assert torch.equal(generated(model, input_ids=ids, pixel_values=torch.randn(0, 3, 32, 32), num_beams=2), without)


def test_beams_keep_each_rows_pictures(model):
    rows, pixels = prompts()
    together = generated(model, **left_padded(rows), pixel_values=pixels, num_beams=3, num_return_sequences=2)
    assert together.shape == (6, 6)
    assert torch.equal(together, one_by_one(model, rows, pixels, num_beams=3, num_return_sequences=2))


def test_samples_keep_each_rows_pictures(model):
    rows, pixels = prompts()
    batch = {**left_padded(rows), "pixel_values": pixels}
    options = {"do_sample": True, "top_k": 1, "max_new_tokens": 6, "num_return_sequences": 2}  # one choice: greedy
    found = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(found, generated(model, **batch).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_from_embeddings_equals_generation_from_ids(model, options):
    ids, pixels = row(12, 3), torch.randn(1, 3, 32, 32)
    expected = generated(model, input_ids=ids, pixel_values=pixels, **options)
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, pixel_values=pixels, do_sample=False, max_new_tokens=6, **options)
    assert torch.equal(found, expected)


def test_the_tower_runs_once_a_generation(model):
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generated(model, input_ids=row(12, 3), pixel_values=torch.randn(1, 3, 32, 32))
    assert len(calls) == 1


# Captured graphs


@pytest.mark.slow
@torch.no_grad()
def test_decoding_with_a_static_cache_is_one_graph_and_changes_nothing(model):
    torch.compiler.reset()
    ids = row(9)
    compiled = torch.compile(lambda **inputs: model(**inputs).logits, fullgraph=True, backend="aot_eager")
    cache, steps = new_cache("static", model), []
    for chunk in torch.arange(9).split([6, 1, 1, 1]):
        inputs = {"cache_position": chunk, "position_ids": chunk.unsqueeze(0), "use_cache": True}
        steps.append(compiled(input_ids=ids[:, chunk], past_key_values=cache, **inputs))
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids=ids).logits, **CLOSE)


@pytest.mark.slow
def test_generation_compiled_by_the_library_gives_the_same_tokens(model):
    torch.compiler.reset()
    ids, pixels = row(12, 3), torch.randn(1, 3, 32, 32)
    expected = generated(model, input_ids=ids, pixel_values=pixels)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    found = generated(model, **inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_training_step_compiles_to_one_graph_with_the_same_gradients(model, batch):
    torch.compiler.reset()
    model.train()
    batch.pop("pixel_values")
    batch["input_ids"] = torch.randint(6, 64, batch["input_ids"].shape)
    expected = torch.autograd.grad(model(**batch).loss, list(model.language_model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**batch).loss, list(model.language_model.parameters()))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Logits(torch.nn.Module):
    """The forward that is exported: ids and pictures in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values):
        return self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_forward_exports_for_any_length(model, dtype):
    forward, pixels = Logits(model.to(dtype)), torch.randn(1, 3, 32, 32, dtype=dtype)
    length = {1: torch.export.Dim("length", min=6, max=64)}
    shapes = {"input_ids": length, "pixel_values": None}
    exported = torch.export.export(forward, (row(9, 2), pixels), strict=False, dynamic_shapes=shapes)
    for ids in (row(9, 2), row(23, 11)):
        # bf16: a different order of sums, 2^-8 each, on logits of size 1 to 10.
        close = CLOSE if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
        torch.testing.assert_close(exported.module()(ids, pixels), forward(ids, pixels), **close)
