# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What an upcycled model takes over beside weights: tokenizer, chat template, settings for pictures and generation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .configmaps_moevlm import picture_remarks
from .configuration_moevlm import MoeVlmConfig
from .parents_moevlm import Parent
from .processing_moevlm import IMAGE_TOKEN, SPECIAL_TOKENS, MoeVlmProcessor, build_processor

# How these families frame a picture in the text.
FRAME = f"<fake_token_around_image><global-img>{IMAGE_TOKEN}<fake_token_around_image>"
IMAGE_FRAMES = {"smolvlm": FRAME, "idefics3": FRAME}
# Settings that only sampling reads, with the values that say nothing.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
SAMPLING |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
PICTURE_SETTINGS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
# What an image processor of CLIP's kind takes where its file names none.
CLIP_PICTURES = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}


def read_tokenizer(parents: Mapping[str, Parent], source: str | None = None):
    """The tokenizer of the whole or the text parent, or the one at `source`; its special tokens as its file says.

    It gets the image token if it has none; without a chat template ours, and the tokens of which that is made.

    Raises:
        FileNotFoundError: The parent has none and `source` is None.
        ValueError: It has several chat templates, and none is called default.
    """
    parent = parents.get("whole") or parents["text"]
    places = {"gguf_file": parent.gguf_file} if parent.gguf_file and source is None else {}
    try:
        tokenizer = load_tokenizer(source or parent.folder, **places)
    except Exception as error:  # every family fails in its own way
        raise FileNotFoundError(
            f"{source or parent.source} has no tokenizer that loads ({type(error).__name__}: {error}); "
            "give one with --tokenizer"
        ) from error
    # On the left, for generation, as our own. Saved are names of `init_kwargs`, not what is set on the tokenizer alone.
    for name, value in {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value
    if places:
        repair_gguf_tokenizer(tokenizer, parent)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = read_chat_template(parents, tokenizer.chat_template)
    wanted = [IMAGE_TOKEN]
    if "enable_thinking" in (tokenizer.chat_template or ""):
        # Qwen3's writes an empty thought before the last answer, not into the prompt: it would be learnt as the answer.
        tokenizer.chat_template = "{%- set enable_thinking = false -%}" + tokenizer.chat_template
        parent.notes.append("the chat template is set to enable_thinking=false: answers are given without a thought")
    if tokenizer.chat_template is None:
        wanted = SPECIAL_TOKENS[1:]  # without the one for padding
        parent.notes.append(f"no chat template found: ours is taken, with the tokens {', '.join(wanted[:-1])}")
    lacking = [token for token in wanted if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in lacking], special_tokens=True)
    return tokenizer


def load_tokenizer(source: str | Path, **places):
    """The tokenizer at a folder or Hub id; one that transformers 5 saved loads on 4.57 too."""
    fields = get_tokenizer_config(source)
    if fields.get("tokenizer_class") != "TokenizersBackend":
        return AutoTokenizer.from_pretrained(source, **places)
    if isinstance(extra := fields.get("extra_special_tokens"), list):
        places |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return PreTrainedTokenizerFast.from_pretrained(source, **places)


def repair_gguf_tokenizer(tokenizer, parent: Parent) -> None:
    """Set what transformers reads wrongly from a GGUF file: end token, chat template, no start token of its own."""
    import gguf  # is there: without it the parent would not be open

    fields = gguf.GGUFReader(parent.folder / parent.gguf_file).fields
    for name, kind in (("eos", "eos_token"), ("bos", "bos_token"), ("padding", "pad_token")):
        if id := fields.get(f"tokenizer.ggml.{name}_token_id"):
            setattr(tokenizer, kind, tokenizer.convert_ids_to_tokens(int(id.contents())))
    parent.config.eos_token_id = tokenizer.eos_token_id
    starts = fields.get("tokenizer.ggml.add_bos_token")
    # Left out it means yes beside a sentencepiece vocabulary ("llama"), no beside a byte-level one (llama.cpp).
    adds = fields["tokenizer.ggml.model"].contents() == "llama" if starts is None else starts.contents()
    if not adds:
        tokenizer.add_bos_token = False
        # A fast tokenizer adds it by its post-processor.
        tokenizer.backend_tokenizer.post_processor = None
    if template := fields.get("tokenizer.chat_template"):
        tokenizer.chat_template = template.contents()


def stop_at_answers_end(settings: GenerationConfig, processor: MoeVlmProcessor, notes: list[str]) -> None:
    """Let generation stop at the token that ends an answer in the chat template, too: it is what a training teaches.

    Parents that were not made for chats (Qwen2.5's base model) name another one; where the template ends an answer
    with none (LLaVA 1.5), a remark says so.
    """
    chat = [{"role": role, "content": [{"type": "text", "text": "probe"}]} for role in ("user", "assistant")]
    tail = processor.apply_chat_template(chat).rpartition("probe")[2]
    tokens = processor.tokenizer.added_tokens_decoder
    ends = [id for id in processor.tokenizer(tail, add_special_tokens=False).input_ids if id in tokens]
    if not ends:
        notes.append("the chat template writes no token after an answer, so a training teaches none to stop at")
        return
    known = settings.eos_token_id
    known = [known] if isinstance(known, int) else known or []
    if ends[0] not in known:
        settings.eos_token_id = [*known, ends[0]]
        notes.append(f"generation stops at {tokens[ends[0]].content}, which ends an answer in the chat template, too")


def read_generation_config(parent: Parent) -> GenerationConfig:
    """The parent's generation settings, or those that its config implies.

    Sampling fields without `do_sample: true`, which transformers reads as greedy and 4.57 refuses to save, go.
    """
    path = parent.folder / "generation_config.json"
    if parent.gguf_file is None and path.exists():
        settings = GenerationConfig.from_pretrained(parent.folder)
        fields = json.loads(path.read_text(encoding="utf-8"))
        unread = [name for name, nothing in SAMPLING.items() if fields.get(name) not in (None, nothing)]
        if unread and not fields.get("do_sample"):
            for name in unread:
                setattr(settings, name, getattr(GenerationConfig(), name))
            parent.notes.append(f"generation_config.json has no do_sample=true: {', '.join(unread)} is left out")
        return settings
    config = parent.config.get_text_config()
    return GenerationConfig(eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id)


def read_processor(parents: Mapping[str, Parent], tokenizer, config: MoeVlmConfig) -> MoeVlmProcessor:
    """The processor of the new model: the parent's tokenizer, chat template, and picture normalisation."""
    parent, template = parents.get("whole") or parents["vision"], tokenizer.chat_template
    if parent.family in IMAGE_FRAMES and template:
        tokenizer.chat_template = template.replace(IMAGE_TOKEN, IMAGE_FRAMES[parent.family])
    processor = build_processor(config, tokenizer)
    for name, value in read_image_settings(parent).items():
        setattr(processor.image_processor, name, value)
    return processor


def read_chat_template(parents: Mapping[str, Parent], template: str | dict[str, str] | None) -> str | None:
    """A whole parent's own chat template, else its tokenizer's, `template`; the default one of several.

    Raises:
        ValueError: There are several, and none is called default.
    """
    parent = parents.get("whole") or parents["text"]
    if "whole" in parents:
        # Both belong to the processor; the second is the form that transformers wrote before 4.52.
        jinja, older = parent.folder / "chat_template.jinja", parent.folder / "chat_template.json"
        if jinja.exists():
            template = jinja.read_text(encoding="utf-8")
        elif older.exists():
            template = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    if isinstance(template, list):  # as files hold named ones
        template = {entry["name"]: entry["template"] for entry in template}
    if not isinstance(template, dict):
        return template
    names = ", ".join(sorted(template))
    if "default" not in template:
        raise ValueError(f"{parent.source} has the chat templates {names}, none called default; rename the one to keep")
    parent.notes.append(f"of the chat templates {names} the default one is kept")
    return template["default"]


def read_image_settings(parent: Parent) -> dict[str, Any]:
    """How the parent's image processor scales and resamples pictures; empty without one.

    Size and cropping are ours: one square of the tower's size. A remark says where the parent's differ.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = parent.folder / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        settings = settings.get("image_processor", settings)  # transformers 5 nests it
        kind = settings.get("image_processor_type", settings.get("feature_extractor_type", ""))
        if kind or "image_mean" in settings:
            parent.notes += picture_remarks(settings)
            unsaid = CLIP_PICTURES if kind.startswith("CLIP") else {}
            return unsaid | {key: settings[key] for key in PICTURE_SETTINGS if key in settings}
    if parent.family != "scratch":
        parent.notes.append("no image processor found: pictures are scaled to -1..1, as SigLIP's")
    return {}
