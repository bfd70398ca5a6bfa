# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The processor: placeholders, chats, pictures of every kind, files that both transformers lines read."""

import base64
import json
import logging
from http.client import HTTPException
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moevlm import processing_moevlm
from moevlm.processing_moevlm import (
    CHAT_TEMPLATE,
    MoeVlmProcessor,
    build_processor,
    open_image,
    to_rgb,
    train_tokenizer,
)

TEXTS = ["What is the color of the circle?", "a red square left of 12 blue circles.", "Is it green? yes", "no"] * 10
SIZE, LENGTH = 8, 3
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=SIZE), image_seq_length=LENGTH)
RED, BLUE = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (5, 5), "blue")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def processor():
    return build_processor(CONFIG, train_tokenizer(TEXTS, 320))


def user(*parts):
    return {"role": "user", "content": [part_of(part) for part in parts]}


def assistant(text):
    return {"role": "assistant", "content": [part_of(text)]}


def part_of(part):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def parent_tokenizer():
    """A tokenizer as a text-only parent has it: no image token, no padding token, strings in its chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.model = models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)


# Placeholders and batches


def test_each_placeholder_becomes_the_picture_tokens(processor):
    batch = processor(images=[RED, BLUE], text="<image> and <image>?")
    (ids,) = batch["input_ids"]
    assert processor.decode(ids) == "<image>" * LENGTH + " and " + "<image>" * LENGTH + "?"
    assert ids.count(processor.image_token_id) == 2 * LENGTH


def test_a_start_token_that_a_chat_template_wrote_gets_no_second_one():
    tokenizer = parent_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=ids)
    processor = build_processor(CONFIG, tokenizer)
    starts = [processor(text=text)["input_ids"][0].count(ids[0][1]) for text in ("who?", "<s>who?", ["<s>a", "<s>b"])]
    assert starts == [1, 1, 1]
    assert processor(text="<s>who?", add_special_tokens=True)["input_ids"][0].count(ids[0][1]) == 2


def test_pictures_are_stacked_flat_in_order_of_appearance(processor):
    batch = processor(images=[[RED], [BLUE, RED], []], text=["<image>a", "<image>b<image>", "c"], padding=True)
    assert np.shape(batch["pixel_values"]) == (3, 3, SIZE, SIZE)
    # Mean and deviation 0.5 take 0..255 to -1..1.
    assert [tuple(np.asarray(image)[:, 0, 0]) for image in batch["pixel_values"]] == [
        (1, -1, -1),
        (-1, -1, 1),
        (1, -1, -1),
    ]


def test_flat_and_nested_lists_give_the_same_batch(processor):
    texts = ["<image>a", "b", "<image><image>c"]
    flat = processor(images=[RED, BLUE, RED], text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[[RED], [], (BLUE, RED)], text=texts, padding=True, return_tensors="pt")
    assert flat.keys() == nested.keys()
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


def test_text_alone_has_no_pixel_values(processor):
    batch = processor(text=["yes", "no"], return_tensors="pt", padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"]


def test_empty_image_lists_count_as_text_alone(processor):
    assert "pixel_values" not in processor(images=[[], []], text=["yes", "no"])


def test_pictures_alone_have_no_text(processor):
    batch = processor(images=RED, return_tensors="pt")
    assert list(batch) == ["pixel_values"] and batch["pixel_values"].shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_the_side_asked_for_and_changes_no_token(processor, side):
    texts = ["<image>What is it?", "no"]
    batch = processor(images=[RED], text=texts, padding=True, padding_side=side, return_tensors="pt")
    for row, text in enumerate(texts):
        (alone,) = processor(images=[RED] if "<image>" in text else None, text=text)["input_ids"]
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == alone
        assert mask[0 if side == "right" else -1]


def test_mm_token_type_ids_mark_the_picture_tokens(processor):
    batch = processor(
        images=[RED], text=["<image>a", "b"], padding=True, return_tensors="pt", return_mm_token_type_ids=True
    )
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())


def test_offsets_point_into_the_text_as_passed(processor):
    text = "<image>red <image>12"
    batch = processor(images=[RED, BLUE], text=text, return_offsets_mapping=True)
    for token, (start, end) in zip(batch["input_ids"][0], batch["offset_mapping"][0]):
        assert processor.decode([token]) == text[start:end]


@pytest.mark.parametrize(
    "images, text, message",
    [
        (None, "<image>a", "the text has 1 <image> placeholders but 0 images"),
        ([RED, BLUE], "<image>a", "the text has 1 <image> placeholders but 2 images"),
        ([RED], ["<image>a", "<image>b"], "the batch of 2 texts has 2 <image> placeholders but 1 images"),
        ([[RED, BLUE], []], ["<image>a", "<image>b"], "text 0 has 1 <image> placeholders but 2 images"),
        ([[RED], []], ["<image>a", "<image>b"], "text 1 has 1 <image> placeholders but 0 images"),
        ([[RED]], ["<image>a", "b"], "1 lists for 2 texts"),
        ([RED], [1], "pass a string or a list of strings"),
        ([3], "<image>", "an image is a int"),
        (["/no/such/file.png"], "<image>", "/no/such/file.png"),
        (None, None, "neither images nor text"),
    ],
)
def test_bad_input_is_named(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_video_is_refused(processor):
    with pytest.raises(ValueError, match="videos and audio are not supported"):
        processor(text="a", videos=[RED])


def test_truncation_never_cuts_into_a_picture(processor):
    with pytest.raises(ValueError, match="max_length=2 cuts into a picture"):
        processor(images=[RED], text="<image>What is it?", truncation=True, max_length=2)
    kept = processor(images=[RED], text="<image>What is it?", truncation=True, max_length=LENGTH + 1)
    assert len(kept["input_ids"][0]) == LENGTH + 1


def test_engines_learn_the_token_count_without_pictures(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (300, 5)])
    assert counts["num_image_tokens"] == [LENGTH, LENGTH] and counts["num_image_patches"] == [1, 1]
    assert processor.replace_image_token({}, 0) == "<image>" * LENGTH


def test_model_input_names(processor):
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}


# Chats

CHAT = [
    {"role": "system", "content": "be short"},
    user(RED, BLUE, "What is it?"),
    assistant(" a red square"),
    user(BLUE, "and 12?"),
    assistant("12 blue circles"),
]


def test_the_chat_template_is_compact(processor):
    assert processor.apply_chat_template(CHAT) == (
        "<|system|>be short<|user|><image><image>What is it?<|assistant|> a red square<|end|>"
        "<|user|><image>and 12?<|assistant|>12 blue circles<|end|>"
    )
    assert processor.apply_chat_template([user("a")], add_generation_prompt=True) == "<|user|>a<|assistant|>"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["pt", None])
def test_the_assistant_mask_is_exactly_the_answers(processor, side, tensors):
    batch = processor.apply_chat_template(
        [CHAT, CHAT[1:3], CHAT[3:]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        padding_side=side,
        return_tensors=tensors,
    )
    answers = [
        [token for token, marked in zip(ids, mask) if marked]
        for ids, mask in zip(torch.as_tensor(batch["input_ids"]).tolist(), torch.as_tensor(batch["assistant_masks"]))
    ]
    assert [processor.decode(answer) for answer in answers] == [
        " a red square<|end|>12 blue circles<|end|>",
        " a red square<|end|>",
        "12 blue circles<|end|>",
    ]
    assert len(batch["pixel_values"]) == 6


def test_options_may_stand_flat_or_in_processor_kwargs_without_a_warning(processor, caplog):
    options = {"padding": True, "padding_side": "left"}
    common = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    chats = [[user(RED, "What is it?")], [user("no")]]
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        flat = processor.apply_chat_template(chats, **common, **options)
        apart = processor.apply_chat_template(chats, **common, processor_kwargs=options)
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert all(torch.equal(flat[name], apart[name]) for name in flat)
    assert flat["attention_mask"][1, 0] == 0
    assert caplog.records == []


def test_string_contents_may_be_tokenized(processor):
    batch = processor.apply_chat_template([{"role": "user", "content": "What is it?"}], tokenize=True, return_dict=True)
    assert processor.decode(batch["input_ids"][0]) == "<|user|>What is it?"


def test_the_conversation_is_left_as_it_was(processor):
    chat = [{"role": "user", "content": "a"}, assistant("b")]
    processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert chat == [{"role": "user", "content": "a"}, assistant("b")]


def test_a_picture_in_a_chat_may_be_a_path_or_base64(processor, tmp_path):
    RED.save(tmp_path / "red.png")
    encoded = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    forms = [
        {"type": "image", "image": RED},
        {"type": "image", "path": str(tmp_path / "red.png")},
        {"type": "image", "url": str(tmp_path / "red.png")},
        {"type": "image", "base64": encoded},
        {"type": "image", "base64": base64.encodebytes((tmp_path / "red.png").read_bytes()).decode()},
        {"type": "image", "url": f"data:image/png;base64,{encoded}"},
    ]
    chats = [[{"role": "user", "content": [form]}] for form in forms]
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt")
    assert len(batch["pixel_values"]) == len(forms)
    assert all(torch.equal(pixels, batch["pixel_values"][0]) for pixels in batch["pixel_values"])


@pytest.mark.parametrize(
    "message, error",
    [
        ({"role": "tool", "content": "a"}, "role tool is unknown"),
        ({"role": "user", "content": [{"type": "smell", "text": "a"}]}, "content type smell is unknown"),
    ],
)
def test_an_unknown_role_or_content_is_named(processor, message, error):
    with pytest.raises(Exception, match=error):
        processor.apply_chat_template([message])


# Pictures


def shades(mode):
    """A picture of this mode: top half black, bottom half white."""
    image = Image.new("L", (4, 4), 0)
    image.paste(255, (0, 2, 4, 4))
    if mode.startswith("I"):
        return Image.fromarray(
            (np.asarray(image).astype(np.uint16) * 257).astype(np.int32 if mode == "I" else np.uint16)
        )
    if mode == "F":
        return Image.fromarray(np.asarray(image).astype(np.float32) / 255)
    if mode == "CMYK":
        return image.convert("RGB").convert("CMYK")
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_black_and_white_survive_in_every_mode(mode):
    image = shades(mode)
    assert image.mode == mode
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    pixels = np.asarray(rgb)
    assert pixels[0].max() <= 1 and pixels[-1].min() >= 254  # YCbCr rounds by 1


def test_sixteen_bit_greys_keep_their_proportion():
    image = Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparent_parts_become_white(mode):
    clear = Image.new("LA", (2, 1), (0, 0))
    clear.putpixel((1, 0), (0, 255))
    rgb = to_rgb(clear.convert("RGBA").convert(mode))
    assert np.asarray(rgb)[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_in_a_file_becomes_white(mode, tmp_path):
    image = Image.new("L", (2, 1), 0)
    image.putpixel((1, 0), 200)
    image.convert(mode).save(tmp_path / "clear.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert np.asarray(to_rgb(Image.open(tmp_path / "clear.png")))[0].tolist() == [[255] * 3, [200] * 3]


def test_a_rotated_photo_is_set_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn anticlockwise
    image.save(tmp_path / "photo.png", exif=exif)
    upright = to_rgb(Image.open(tmp_path / "photo.png"))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 35)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP"])
def test_a_truncated_file_is_an_error_that_names_it(processor, tmp_path, format):
    buffer = BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, format)
    path = tmp_path / f"half.{format.lower()}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match="half"):
        processor(images=[path], text="<image>")


def test_a_file_that_is_no_picture_is_an_error_that_names_it(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ValueError, match="notes.png"):
        open_image(tmp_path / "notes.png")


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (3, 200), (SIZE, SIZE), (640, 480)])
def test_pictures_of_any_size_come_out_alike(processor, size):
    batch = processor(images=Image.new("RGB", size, "red"), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, SIZE, SIZE)
    assert batch["pixel_values"][0].mean((1, 2)).tolist() == pytest.approx([1, -1, -1], abs=1e-5)


def test_arrays_count_as_pictures(processor):
    array = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    forms = [Image.fromarray(array), array, np.moveaxis(array, -1, 0), torch.from_numpy(array), array / 255.0]
    pixels = processor(images=forms, return_tensors="pt")["pixel_values"]
    assert all(torch.equal(each, pixels[0]) for each in pixels)


@pytest.mark.parametrize("mask", [np.eye(8, dtype=bool), torch.eye(8, dtype=torch.bfloat16, requires_grad=True)])
def test_masks_and_tensors_of_any_type_count_as_pictures(mask):
    assert np.array_equal(np.array(open_image(mask)), np.eye(8, dtype=np.uint8) * 255)


@pytest.mark.parametrize("error", [HTTPException("cut off"), OSError("refused"), ValueError("unknown")])
def test_a_url_that_gives_no_picture_is_named(monkeypatch, error):
    def fail(request, timeout):
        assert request.get_header("User-agent") == "MoeVlm"
        raise error

    monkeypatch.setattr(processing_moevlm, "urlopen", fail)
    with pytest.raises(ValueError, match=f"http://a/b.png' is no picture file, URL or base64 text: {error}"):
        open_image("http://a/b.png")


def test_a_picture_too_large_to_open_is_named(tmp_path, monkeypatch):
    RED.save(tmp_path / "red.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="red.png' is no picture file.* exceeds limit"):
        open_image(tmp_path / "red.png")


@pytest.mark.parametrize(
    "array", [np.full((4, 4, 3), 300), np.full((4, 4, 3), 1.5), np.zeros((2, 4, 4, 3)), np.zeros((5, 5, 6))]
)
def test_a_bad_array_is_an_error(array):
    with pytest.raises(ValueError, match="an image array"):
        open_image(array)


@pytest.mark.parametrize(
    ("written", "own"), [("<image>", True), ("[IMG]", False), ("", False)], ids=["image", "other", "none"]
)
def test_a_template_that_writes_pictures_in_its_own_way_gets_them_as_text(config, written, own):
    tokenizer = train_tokenizer(["a red circle"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        f"{{% if c.type == 'image' %}}{written}{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
        "{% endfor %}"
    )
    theirs = tokenizer.chat_template
    processor = build_processor(config, tokenizer)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert processor.apply_chat_template(chat) == "<image>what?"
    assert (processor.chat_template == theirs) == own


# Tokenizer


def test_special_tokens_have_fixed_places():
    tokenizer = train_tokenizer(TEXTS, 300)
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"]
    assert tokenizer.convert_ids_to_tokens(range(6)) == specials
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 1, "left")
    assert list(tokenizer("yes")) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("text", ["a red square", " leading,  double  spaces\n", "naïve 猫 🐈 don't 1234", "\x00\t"])
def test_decoding_gives_back_the_string(text):
    tokenizer = train_tokenizer(TEXTS, 300)
    ids = tokenizer(f"<|user|>{text}<|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == f"<|user|>{text}<|end|>"


def test_training_twice_gives_the_same_tokenizer():
    first, second = train_tokenizer(TEXTS, 320), train_tokenizer(iter(TEXTS), 320)
    assert first.get_vocab() == second.get_vocab()


def test_every_digit_is_a_token():
    tokenizer = train_tokenizer(["1234 1234 1234 12"] * 50, 300)
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_a_vocabulary_below_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocab_size=100 is below 262"):
        train_tokenizer(TEXTS, 100)


def test_batch_decode_leaves_out_the_special_tokens(processor):
    batch = processor(images=[RED], text=["<|user|><image>yes<|end|>", "no"], padding=True)
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["yes", "no"]


# A parent's tokenizer


def test_a_parents_tokenizer_gets_the_image_token_and_keeps_its_chat_template():
    tokenizer = parent_tokenizer()
    size = len(tokenizer)
    processor = build_processor(CONFIG, tokenizer)
    assert len(tokenizer) == size + 1 and processor.image_token_id == size
    assert processor.apply_chat_template([user(RED, "Hi"), {"role": "assistant", "content": "Yo"}]) == (
        "<|im_start|>user\n<image>Hi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    )
    batch = processor.apply_chat_template([user(RED, "Hi", BLUE)], tokenize=True, return_dict=True, return_tensors="pt")
    assert (batch["input_ids"] == size).sum() == 2 * LENGTH and len(batch["pixel_values"]) == 2


def test_a_template_that_takes_parts_is_left_alone():
    tokenizer = train_tokenizer(TEXTS, 300)
    template = tokenizer.chat_template
    assert build_processor(CONFIG, tokenizer).chat_template == template
    again = build_processor(CONFIG, parent_tokenizer())
    assert build_processor(CONFIG, again.tokenizer).chat_template == again.chat_template


def test_a_template_that_begins_with_the_start_token_is_asked_with_it():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token + 'Chat: ' }}" + tokenizer.chat_template
    assert build_processor(CONFIG, tokenizer).chat_template == "{{ bos_token + 'Chat: ' }}" + CHAT_TEMPLATE


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match="image_token='<image>' is not in the tokenizer"):
        MoeVlmProcessor(processor.image_processor, parent_tokenizer())
    with pytest.raises(ValueError, match="image_seq_length=0 is below 1"):
        MoeVlmProcessor(processor.image_processor, processor.tokenizer, image_seq_length=0)


# Files


@pytest.mark.parametrize("tokenizer", [lambda: train_tokenizer(TEXTS, 320), parent_tokenizer])
def test_a_reloaded_processor_gives_the_same_inputs(tokenizer, tmp_path):
    processor = build_processor(CONFIG, tokenizer())
    processor.save_pretrained(tmp_path)
    again = MoeVlmProcessor.from_pretrained(tmp_path)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    before = processor.apply_chat_template(CHAT, **options)
    after = again.apply_chat_template(CHAT, **options)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.image_seq_length == LENGTH and again.chat_template == processor.chat_template
    assert list(again.tokenizer("a")) == list(processor.tokenizer("a"))


def test_the_saved_files_are_those_that_the_older_line_reads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    written = {path.name: path for path in tmp_path.iterdir()}
    assert written.keys() >= {
        "preprocessor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "processing_moevlm.py",
    }
    assert json.loads(written["processor_config.json"].read_text()) == {
        "auto_map": {"AutoProcessor": "processing_moevlm.MoeVlmProcessor"},
        "image_seq_length": LENGTH,
        "image_token": "<image>",
        "processor_class": "MoeVlmProcessor",
    }
    assert json.loads(written["preprocessor_config.json"].read_text())["size"] == {"height": SIZE, "width": SIZE}
    tokenizer = json.loads(written["tokenizer_config.json"].read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_further_special_tokens_survive_saving(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    build_processor(CONFIG, tokenizer).save_pretrained(tmp_path)
    again = MoeVlmProcessor.from_pretrained(tmp_path).tokenizer
    assert "<|tool|>" in again.all_special_tokens
    assert not isinstance(
        json.loads((tmp_path / "tokenizer_config.json").read_text()).get("extra_special_tokens"), list
    )
