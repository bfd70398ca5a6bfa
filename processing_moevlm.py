# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Pictures and text in, tensors out; token ids in, text out.

The processor turns every `<image>` placeholder into `image_seq_length` image tokens and stacks the pictures of the
whole batch, in order of appearance, into one `pixel_values`. It saves the file set that both transformers lines read.
"""

import base64
import json
import os
from collections.abc import Iterable
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import render_jinja_template

try:
    # transformers 5 names its PIL version apart: the old name there is torchvision's, with other numbers.
    from transformers import SiglipImageProcessorPil as SiglipImageProcessor
except ImportError:
    from transformers import SiglipImageProcessor

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", IMAGE_TOKEN)

# Compact on purpose: no newlines and no end of the user's turn, because the next role token says as much.
CHAT_TEMPLATE = """
{%- macro parts(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception('content type ' ~ part['type'] ~ ' is unknown; use image or text') -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role ' ~ message['role'] ~ ' is unknown; use system, user or assistant') -}}{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- parts(message['content']) ~ '<|end|>' -}}{%- endgeneration -%}
{%- else -%}{{- parts(message['content']) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".strip()

# Put before the template of a text-only parent, which wants each content as one string.
PARTS_TO_STRING = """
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set flat.messages = flat.messages + [message] -%}{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message['content'] -%}
{%- set flat.text = flat.text ~ ('<image>' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
""".strip()


class MoeVlmProcessor(ProcessorMixin):
    """Pictures, text and chats to model inputs, and back to text.

    Args:
        image_processor: Resizes, rescales and normalises RGB pictures (SigLIP's, on PIL and numpy).
        tokenizer: Any fast tokenizer that knows `image_token` (`build_processor` adds it where it is missing).
        chat_template: Jinja template; its rendering holds one `image_token` for each picture.
        image_seq_length: Tokens that one picture takes in the text.
        image_token: The placeholder.

    Raises:
        ValueError: `image_token` is not one token of the tokenizer, or `image_seq_length` is below 1.
    """

    attributes = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"
    if not hasattr(ProcessorMixin, "get_attributes"):
        # transformers 5 finds the class by itself and warns where it is named here.
        image_processor_class = "SiglipImageProcessor"
    # Every saved processor carries this file, so that it loads where there is no checkout.
    _auto_class = "AutoProcessor"

    # No keyword-only arguments: transformers reads the names from the positional ones.
    def __init__(self, image_processor, tokenizer, chat_template=None, image_seq_length=16, image_token=IMAGE_TOKEN):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if image_seq_length < 1:
            raise ValueError(f"image_seq_length={image_seq_length} is below 1; a picture takes at least one token")
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"image_token={image_token!r} is not in the tokenizer; build_processor adds it")

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """Model inputs of a batch.

        Args:
            images: None, one picture, a flat list (dealt out in order of the placeholders) or one list per text. A
                picture is a PIL image of any mode and size, a path, an http(s) URL, a data URI, base64 or an array.
            text: One string or a list of them, with one `image_token` for each picture.
            **kwargs: Options of the tokenizer and the image processor (`padding`, `padding_side`, `return_tensors`, …)
                and `return_mm_token_type_ids`: 1 at image tokens. Texts that all have a start token get no other.

        Returns:
            `input_ids` and `attention_mask` (texts, length); with pictures also `pixel_values` (pictures, 3, H, W),
            flat over the batch. `offset_mapping`, where asked for, points into the text as it was passed.

        Raises:
            ValueError: Pictures and placeholders differ in number, a picture does not open, or truncation would cut
                into a picture.
        """
        if videos is not None or audio is not None:
            raise ValueError("videos and audio are not supported; pass images and text")
        if images is None and text is None:
            raise ValueError("neither images nor text was passed; pass at least one of them")
        merged = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)
        tensor_type = merged["text_kwargs"].pop("return_tensors", None)
        features = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str) for entry in texts):
                raise ValueError(f"text is a {type(text).__name__}; pass a string or a list of strings")
            self._check_counts(images, [text.count(self.image_token) for text in texts])
            features = self._encode(texts, **merged["text_kwargs"])
        pictures = [to_rgb(open_image(picture)) for picture in _flatten(images)]
        if pictures:
            # Left to guess, 4.57 takes the height of a picture 1 or 3 pixels high for its channels.
            merged["images_kwargs"]["input_data_format"] = "channels_last"
            features.update(self.image_processor(pictures, **merged["images_kwargs"]))
        return BatchFeature(features, tensor_type=tensor_type)

    def _check_counts(self, images, counts: list[int]) -> None:
        """Raise unless each text gets as many pictures as it has placeholders."""
        if isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images):
            if len(images) != len(counts):
                raise ValueError(f"images holds {len(images)} lists for {len(counts)} texts; pass one list per text")
            pairs = [(f"text {n}", len(_flatten(group)), counts[n]) for n, group in enumerate(images)]
        else:
            name = "the text" if len(counts) == 1 else f"the batch of {len(counts)} texts"
            pairs = [(name, len(_flatten(images)), sum(counts))]
        for name, passed, wanted in pairs:
            if passed != wanted:
                raise ValueError(
                    f"{name} has {wanted} {self.image_token} placeholders but {passed} images; pass one image for each"
                )

    def _encode(
        self, texts: list[str], return_mm_token_type_ids=False, return_text_replacement_offsets=False, **text_kwargs
    ) -> dict:
        """Token ids of the texts, every placeholder expanded; `return_text_replacement_offsets` is never needed."""
        picture = self.replace_image_token({}, 0)
        if start_is_written(self.tokenizer, texts):
            text_kwargs.setdefault("add_special_tokens", False)
        features = dict(self.tokenizer([text.replace(self.image_token, picture) for text in texts], **text_kwargs))
        rows = features["input_ids"]
        found = [list(ids).count(self.image_token_id) for ids in rows]
        expected = [text.count(self.image_token) * self.image_seq_length for text in texts]
        if found != expected:
            raise ValueError(
                f"truncation to max_length={text_kwargs.get('max_length')} cuts into a picture (image tokens {found}, "
                f"needed {expected}); raise max_length or leave truncation off"
            )
        if "offset_mapping" in features:
            features["offset_mapping"] = list(map(self._offsets_in_original, rows, features["offset_mapping"], texts))
        if return_mm_token_type_ids:
            features["mm_token_type_ids"] = [[int(token == self.image_token_id) for token in ids] for ids in rows]
        return features

    def _offsets_in_original(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
        """Offsets moved from the expanded text to the text as passed; ascending, because 4.57 bisects them."""
        moved, image_tokens, empty = [], 0, (0, 0)
        for token, (start, end) in zip(ids, offsets):
            if start == end:  # padding, or a token that the tokenizer added
                moved.append(empty)
                continue
            pictures, copies = divmod(image_tokens, self.image_seq_length)
            gained = (pictures * (self.image_seq_length - 1) + copies) * len(self.image_token)
            moved.append((start - gained, end - gained))
            image_tokens += token == self.image_token_id
            empty = (len(text), len(text))
        return moved

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """Rendered, or with `tokenize=True` encoded, conversations; the same call on both transformers lines.

        Options of `__call__` (`padding`, `padding_side`, …) may stand beside the template's own or in
        `processor_kwargs`; string contents count as one text part. All else as in transformers.
        """
        names = {"text_kwargs", "images_kwargs", *TextKwargs.__annotations__, *ImagesKwargs.__annotations__}
        call_kwargs = {name: kwargs.pop(name) for name in names - {"return_tensors"} if name in kwargs}
        call_kwargs.update(processor_kwargs or {})
        apart = hasattr(ProcessorMixin, "_prepare_processor_kwargs")
        kwargs |= {"processor_kwargs": call_kwargs} if apart else call_kwargs
        return super().apply_chat_template(_with_parts(conversation), chat_template, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one picture (asked for by transformers 5 and vLLM)."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens and patches per picture, from `(height, width)` pairs alone (asked for by vLLM)."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def to_dict(self, **kwargs) -> dict:
        """What processor_config.json holds."""
        # transformers 5 nests the image processor here, and 4.57 then refuses the file.
        return {name: value for name, value in super().to_dict(**kwargs).items() if name != "image_processor"}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list:
        """Write the file set that both transformers lines load, this code included."""
        files = super().save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)
        _make_portable(Path(save_directory) / "tokenizer_config.json")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files


def build_processor(config, tokenizer) -> MoeVlmProcessor:
    """The processor that fits a model.

    Args:
        config: A `MoeVlmConfig`; read are `vision_config.image_size` and `image_seq_length`.
        tokenizer: Gets the image token if it has none: `len(tokenizer)` may grow by 1, resize the embeddings then. Its
            own chat template is kept, and made to take pictures.
    """
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    template = CHAT_TEMPLATE if tokenizer.chat_template is None else template_for_parts(tokenizer)
    tokenizer.chat_template = template  # saved with the processor's: loaded alone it shall render the same chats
    size = config.vision_config.image_size
    image_processor = SiglipImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return MoeVlmProcessor(image_processor, tokenizer, chat_template=template, image_seq_length=config.image_seq_length)


def template_for_parts(tokenizer) -> str:
    """Its chat template if that takes pictures and texts as parts, else one that makes strings of them first."""
    template = tokenizer.get_chat_template()
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
    try:
        (rendered,), _ = render_jinja_template([probe], chat_template=template, **tokenizer.special_tokens_map)
    except Exception:  # a template may fail in any way on a list where it wants a string
        rendered = ""
    whole = "probe" in rendered and "type" not in rendered and rendered.count(IMAGE_TOKEN) == 1
    return template if whole else PARTS_TO_STRING + template


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts; decoding gives back every string exactly.

    Args:
        texts: What to learn from; questions, answers and captions of the training part.
        vocab_size: At most so many tokens, of which 262 are the special tokens and the bytes.

    Source: Sennrich et al. 2016 (arXiv:1508.07909); bytes as in GPT-2 (Radford et al. 2019).
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is below {least}, the special tokens and the bytes; raise it")
    backend = Tokenizer(models.BPE())
    # Single digits: numbers up to any length from ten tokens.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # Untrimmed offsets: a word's offsets take in its leading space, so no character belongs to no token.
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",  # for generation; the collator pads by itself
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB, 8 bits a channel, upright.

    EXIF rotation is applied; transparent parts become white; 16-bit, 32-bit and float greys are scaled from the
    smallest of the ranges 0..1 (floats), 0..255 and 0..65535 that holds them (16-bit modes: always 0..65535).

    Raises:
        ValueError: The file is truncated or broken, or its mode has no RGB form.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode.startswith(("I", "F")):
            return Image.fromarray(_grey_bytes(image)).convert("RGB")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = getattr(image, "filename", "") or "in memory"
        raise ValueError(f"picture {name} (mode {image.mode}) does not open: {error}; replace it") from error


def open_image(source) -> Image.Image:
    """The picture behind a PIL image, a path, an http(s) URL, a data URI, base64 text or an array.

    Arrays are `(H, W)`, `(H, W, C)` or `(C, H, W)`: 8-bit integers, or floats or booleans in 0..1.

    Raises:
        ValueError: There is no such file, or it is not a picture, or the source is of another type.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, torch.Tensor):  # numpy knows no bfloat16
        source = (source.float() if source.is_floating_point() else source).numpy(force=True)
    if isinstance(source, np.ndarray):
        return _image_from_array(source)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"an image is a {type(source).__name__}; pass a PIL image, a path, a URL or an array")
    try:
        if str(source).startswith(("http://", "https://")):
            with urlopen(Request(source, headers={"User-Agent": "MoeVlm"}), timeout=30) as response:
                return Image.open(BytesIO(response.read()))
        if isinstance(source, Path) or os.path.isfile(source) or "." in source[-5:]:  # base64 has no dots
            return Image.open(source)
        encoded = source.partition("base64,")[2] if source.startswith("data:image/") else source
        return Image.open(BytesIO(base64.b64decode("".join(encoded.split()), validate=True)))
    except (OSError, ValueError, HTTPException, Image.DecompressionBombError) as error:
        raise ValueError(f"image {str(source)[:100]!r} is no picture file, URL or base64 text: {error}") from error


def start_is_written(tokenizer, texts: Iterable[str]) -> bool:
    """Whether these texts begin with the start token, as some chat templates write it: none is to be added then."""
    return tokenizer.bos_token is not None and all(text.startswith(tokenizer.bos_token) for text in texts)


def _flatten(images) -> list:
    if not isinstance(images, (list, tuple)):
        return [] if images is None else [images]
    return [picture for entry in images for picture in _flatten(entry)]


def _with_parts(conversation):
    """The conversation (or batch of them) with string contents as one text part: 4.57 reads only lists of parts."""
    if isinstance(conversation, (list, tuple)):
        return [_with_parts(entry) for entry in conversation]
    if isinstance(conversation, dict) and isinstance(conversation.get("content"), str):
        return {**conversation, "content": [{"type": "text", "text": conversation["content"]}]}
    return conversation


def _make_portable(path: Path) -> None:
    """Undo in a tokenizer_config.json what transformers 5 writes and 4.57 cannot read."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _grey_bytes(image: Image.Image) -> np.ndarray:
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    peak = values.max(initial=0)
    top = 1.0 if image.mode == "F" and peak <= 1 else 255
    top = max(65535, peak) if image.mode.startswith("I;16") or peak > 255 else top
    return np.rint(values.clip(0) * (255 / top)).astype(np.uint8)


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"an image array ends up as {array.shape}; pass (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4")
    array = np.rint(array * 255.0) if array.dtype == bool or np.issubdtype(array.dtype, np.floating) else array
    if array.size and not (array.min() >= 0 and array.max() <= 255):
        raise ValueError("an image array leaves the range 0..1 of floats or 0..255 of integers; scale it")
    array = array.astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 and array.ndim == 3 else array)
