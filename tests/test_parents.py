"""Every parent family, built tiny by transformers itself, upcycled by the command, compared with itself."""

import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_parents import SQUARE, TEXT, VISION
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import run_upcycle
from moevlm import parents_moevlm, proof_moevlm
from moevlm.base_moevlm import IS_TRANSFORMERS_5
from moevlm.configmaps_moevlm import feature_layer_of, is_tied, text_fields
from moevlm.keymaps_moevlm import map_keys
from moevlm.processing_moevlm import train_tokenizer
from moevlm.router_losses_moevlm import router_statistics

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIDE = {**VISION, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}


# Kinds of stretched rotary positions; 32 of the 128 positions are the original ones, a head has 4 frequencies.
SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0, 2.0, 3.0, 4.0],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def rope(parameters):
    """Rotary settings as either line's configs take them."""
    if hasattr(transformers.LlamaConfig(), "rope_scaling"):
        return {"rope_scaling": parameters, "rope_theta": parameters["rope_theta"]}
    return {"rope_parameters": parameters}


TEXT_PARENTS = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "llama3_rope_tied": lambda: transformers.LlamaConfig(**TEXT, tie_word_embeddings=True, **rope(LLAMA3)),
    **{
        f"{name}_rope": lambda fields=fields, name=name: transformers.LlamaConfig(
            **TEXT, **rope({"rope_type": name, "rope_theta": 1e4, **fields})
        )
        for name, fields in SCALED.items()
    },
    "mistral": lambda: transformers.MistralConfig(**TEXT, sliding_window=100),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT),
    "qwen3": lambda: transformers.Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **TEXT, **SPARSE, shared_expert_intermediate_size=32, decoder_sparse_step=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**TEXT, **SPARSE, head_dim=8, norm_topk_prob=True),
    "qwen3_moe_every_other": lambda: transformers.Qwen3MoeConfig(
        **{**TEXT, "num_hidden_layers": 4},
        **SPARSE,
        head_dim=8,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        norm_topk_prob=False,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2),
}
VISION_PARENTS = {
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SQUARE)),
    "siglip_with_text": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=SQUARE, text_config=SIDE)
    ),
    "siglip2": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**VISION, patch_size=8, num_patches=16)
    ),
    "siglip2_with_text": lambda: transformers.Siglip2Model(
        transformers.Siglip2Config(vision_config={**VISION, "patch_size": 8, "num_patches": 16}, text_config=SIDE)
    ),
    "clip_projected": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SQUARE)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SQUARE)),
    "clip_with_text": lambda: transformers.CLIPModel(transformers.CLIPConfig(vision_config=SQUARE, text_config=SIDE)),
}


def llama_text():
    return transformers.LlamaConfig(**TEXT)


def whole_llava(**fields):
    parts = {"vision_config": transformers.CLIPVisionConfig(**SQUARE), "text_config": llama_text()}
    config = transformers.LlavaConfig(**parts | {"image_token_index": 261, **fields})
    return transformers.LlavaForConditionalGeneration(config)


def siglip_llava(layer, strategy="full"):
    tower = transformers.SiglipVisionConfig(**SQUARE)
    return whole_llava(vision_config=tower, vision_feature_layer=layer, vision_feature_select_strategy=strategy)


def whole_shuffled(config_class, model_class):
    text = llama_text().to_dict()
    return model_class(
        config_class(vision_config=SQUARE, text_config=text, scale_factor=2, image_token_id=261, pad_token_id=0)
    )


WHOLE_PARENTS = {
    "smolvlm": lambda: whole_shuffled(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
    "idefics3": lambda: whole_shuffled(transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
    "llava": whole_llava,
    "llava_first_block": lambda: whole_llava(vision_feature_layer=1),
    "llava_last_state": lambda: whole_llava(vision_feature_layer=-1),
    "llava_siglip": lambda: siglip_llava(-2),
    "llava_siglip_last_state": lambda: siglip_llava(-1),
    "llava_mistral_no_bias": lambda: whole_llava(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=100), multimodal_projector_bias=False
    ),
}


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["what do you see? a red circle."], 300)


@pytest.fixture
def parent(tmp_path, tokenizer):
    """Saves a model, its weights drawn anew, with a tokenizer; gives the folder."""

    def save(name, model, with_tokenizer=True):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        model.save_pretrained(tmp_path / name)
        if with_tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def upcycle(tmp_path, monkeypatch):
    """Runs the command; gives its report and the new folder."""

    def run(**flags):
        argv = ["run_upcycle.py", "--output_dir", str(tmp_path / "made")]
        for name, value in flags.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        monkeypatch.setattr(sys, "argv", argv)
        run_upcycle.main()
        return json.loads((tmp_path / "made" / "upcycling.json").read_text()), tmp_path / "made"

    return run


def text_parent(parent, name="llama"):
    return parent(name, AutoModelForCausalLM.from_config(TEXT_PARENTS[name]()))


def keys_of(folder):
    from safetensors import safe_open

    with safe_open(f"{folder}/model.safetensors", "pt") as shard:
        return set(shard.keys())


def check(report, folders):
    """Each output within float error; each key of each parent once."""
    for row in report["proof"].values():
        assert row["relative"] < 1e-5  # a hundredth of a float32's 7 digits lost, at most
    for role, folder in folders.items():
        keys = report["keys"][role]
        listed = [*keys["used"], *keys["merged"], *keys["dropped"]]
        assert len(listed) == len(set(listed)) == keys["total"]
        assert set(listed) == keys_of(folder)


@pytest.mark.parametrize("name", TEXT_PARENTS)
def test_a_text_parent_is_kept_and_accounted_for(name, parent, upcycle):
    text, vision = text_parent(parent, name), parent("siglip", VISION_PARENTS["siglip"](), False)
    report, _ = upcycle(text=text, vision=vision)
    assert set(report["proof"]) == {"text", "pictures", "tower"}
    check(report, {"text": text, "vision": vision})


@pytest.mark.parametrize("name", VISION_PARENTS)
@pytest.mark.parametrize("layer", [-1, -2, 2])
def test_a_vision_parent_is_kept_at_any_feature_layer(name, layer, parent, upcycle):
    text, vision = text_parent(parent), parent(name, VISION_PARENTS[name](), False)
    report, _ = upcycle(text=text, vision=vision, vision_feature_layer=layer, parts=["decoder", "tower", "connector"])
    check(report, {"text": text, "vision": vision})


@pytest.mark.parametrize("name", WHOLE_PARENTS)
def test_a_whole_parent_is_kept_with_its_connector(name, parent, upcycle):
    folder = parent(name, WHOLE_PARENTS[name]())
    report, _ = upcycle(model_name_or_path=folder)
    assert set(report["proof"]) == {"text", "pictures"}
    check(report, {"whole": folder})
    assert not [key for key in report["keys"]["new"] if "connector" in key]


def test_a_feature_choice_that_needs_a_class_token_is_refused_without_one(parent, upcycle):
    with pytest.raises(ValueError, match="'default' drops the first patch .* without a class token"):
        upcycle(model_name_or_path=parent("llava", siglip_llava(-2, "default")))


def test_a_sparse_parent_in_shards_is_the_same_as_in_one_file(parent, upcycle, tmp_path):
    model = AutoModelForCausalLM.from_config(TEXT_PARENTS["qwen3_moe"]())
    text, vision = parent("moe", model), parent("siglip", VISION_PARENTS["siglip"](), False)
    _, made = upcycle(text=text, vision=vision)
    whole = (made.rename(tmp_path / "whole") / "model.safetensors").read_bytes()
    (tmp_path / "moe" / "model.safetensors").unlink()
    model.save_pretrained(text, max_shard_size="10KB")
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 4
    report, made = upcycle(text=text, vision=vision)
    assert (made / "model.safetensors").read_bytes() == whole
    assert report["keys"]["text"]["merged"]


PART = "{{ '<image>' if c['type'] == 'image' else c['text'] }}"
TEMPLATE = f"{{% for m in messages %}}NAME: {{% for c in m['content'] %}}{PART}{{% endfor %}}{{% endfor %}}"


def test_a_whole_parent_keeps_its_processors_chat_template(parent, upcycle, tmp_path):
    folder = Path(parent("llava", WHOLE_PARENTS["llava"]()))
    # As before transformers 4.52: the tokenizer's template within its settings, the processor's in a file.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE.replace("NAME", "TOKENIZER")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    chat = [{"role": "user", "content": "hi"}]
    files = {"none": "", "json": json.dumps({"chat_template": TEMPLATE.replace("NAME", "JSON")})}
    files["jinja"] = TEMPLATE.replace("NAME", "JINJA")
    for kind, expected in (("none", "TOKENIZER: hi"), ("json", "JSON: hi"), ("jinja", "JINJA: hi")):
        if kind != "none":
            (folder / f"chat_template.{kind}").write_text(files[kind])
        _, made = upcycle(model_name_or_path=folder, skip_proof=True, overwrite_output_dir=True)
        assert transformers.AutoProcessor.from_pretrained(made).apply_chat_template(chat) == expected


def test_a_picture_of_smolvlm_keeps_its_frame_in_the_chat(parent, upcycle):
    _, made = upcycle(model_name_or_path=parent("smolvlm", WHOLE_PARENTS["smolvlm"]()))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = transformers.AutoProcessor.from_pretrained(made).apply_chat_template(chat)
    assert "<fake_token_around_image><global-img><image><fake_token_around_image>what?" in text


def test_a_model_of_ours_is_a_parent_whole_or_in_part(parent, upcycle, tmp_path):
    text, vision = text_parent(parent), parent("clip", VISION_PARENTS["clip"](), False)
    upcycle(text=text, vision=vision, num_experts=0)
    dense = (tmp_path / "made").rename(tmp_path / "dense")
    report, made = upcycle(model_name_or_path=dense, parts=["decoder", "tower", "connector"])
    check(report, {"whole": dense})
    made.rename(tmp_path / "sparse")
    report, _ = upcycle(text=tmp_path / "sparse", vision=dense)
    check(report, {"text": tmp_path / "sparse", "vision": dense})
    assert "another parent fills this part" in report["keys"]["vision"]["dropped"].values()


def test_a_window_of_the_parent_bounds_the_positions(parent, upcycle):
    report, made = upcycle(
        text=text_parent(parent, "mistral"), vision=parent("siglip", VISION_PARENTS["siglip"](), False)
    )
    assert json.loads((made / "config.json").read_text())["text_config"]["max_position_embeddings"] == 100
    assert any("100 tokens back" in note for note in report["notes"])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_config_that_transformers_5_saved_is_read_by_both_lines(parent, upcycle, name):
    folder = text_parent(parent, name)
    path = Path(folder, "config.json")
    fields = json.loads(path.read_text())
    for older in ("rope_theta", "rope_scaling", "num_experts"):
        fields.pop(older, None)
    fields |= {"rope_parameters": LLAMA3, "num_local_experts": SPARSE["num_experts"]}
    path.write_text(json.dumps(fields))
    report, _ = upcycle(text=folder, vision=parent("siglip", VISION_PARENTS["siglip"](), False))
    check(report, {"text": folder})


def test_flags_of_a_new_connector_are_refused_beside_a_whole_parent():
    with pytest.raises(ValueError, match="projector, vision_feature_layer say how two .*=outputs/demo is whole; leave"):
        parents_moevlm.Sources(model_name_or_path="outputs/demo", projector="linear", vision_feature_layer=-2)
    assert parents_moevlm.Sources(text="a", vision="b", vision_feature_layer=-2).joint["feature_layer"] == -2


def test_an_adopted_router_is_pushed_to_balance_as_hard_as_the_parents():
    parent = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=3, router_aux_loss_coef=0.5)
    logits = torch.randn(20, 4)
    theirs = load_balancing_loss_func((logits,), num_experts=4, top_k=3)
    (ours,) = router_statistics((logits,), (logits.topk(3).indices,)).balance
    torch.testing.assert_close(text_fields(parent, [])["router_aux_loss_coef"] * ours, 0.5 * theirs)


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=20, max_window_layers=2),
        lambda: transformers.LlamaConfig(**TEXT, sliding_window=16),
    ],
)
def test_a_window_that_no_layer_looks_through_bounds_nothing(config):
    notes = []
    fields = text_fields(config(), notes)
    assert fields["max_position_embeddings"] == config().max_position_embeddings and not notes


def test_a_dense_model_of_ours_is_compared_at_every_position(parent, upcycle, monkeypatch, tmp_path):
    vision = parent("siglip", VISION_PARENTS["siglip"](), False)
    upcycle(text=text_parent(parent), vision=vision, num_experts=0)
    dense = (tmp_path / "made").rename(tmp_path / "dense")
    spy = Mock(wraps=proof_moevlm.compare)
    monkeypatch.setattr(proof_moevlm, "compare", spy)
    upcycle(model_name_or_path=dense)
    sparse = (tmp_path / "made").rename(tmp_path / "sparse")
    upcycle(model_name_or_path=sparse)
    assert [call.kwargs["routed"] for call in spy.call_args_list] == [False, True]


def bare(folder):
    """The checkpoint with its tower's keys as transformers 5 writes them."""
    file = f"{folder}/model.safetensors"
    save_file({key.replace("vision_model.", ""): value for key, value in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("name", ["siglip", "siglip2", "clip"])
def test_a_tower_that_transformers_5_saved_is_a_parent_on_either_line(name, parent, upcycle):
    folders = {"text": text_parent(parent), "vision": bare(parent(name, VISION_PARENTS[name](), False))}
    report, _ = upcycle(**folders)
    check(report, folders)


def test_a_llava_that_transformers_5_saved_is_a_parent_on_either_line(parent, upcycle):
    whole = bare(parent("llava", WHOLE_PARENTS["llava"]()))
    report, _ = upcycle(model_name_or_path=whole)
    check(report, {"whole": whole})


@pytest.mark.skipif(IS_TRANSFORMERS_5, reason="it finds all names that we do")
def test_a_parent_whose_weights_are_not_found_is_not_compared_with(parent, upcycle, monkeypatch):
    monkeypatch.setattr(parents_moevlm, "PREFIXED", {})
    text, vision = text_parent(parent), bare(parent("siglip", VISION_PARENTS["siglip"](), False))
    with pytest.raises(ValueError, match="does not find .*, which another version saved; .* with --skip_proof"):
        upcycle(text=text, vision=vision)
    upcycle(text=text, vision=vision, skip_proof=True)


def test_a_window_below_a_picture_is_refused(parent, upcycle):
    text = parent("text", AutoModelForCausalLM.from_config(transformers.MistralConfig(**TEXT, sliding_window=4)))
    vision = parent("siglip", VISION_PARENTS["siglip"](), False)
    with pytest.raises(ValueError, match="a picture takes 4 tokens, but the text parent sees 4 .*pixel_shuffle_factor"):
        upcycle(text=text, vision=vision, skip_proof=True)
    # A smaller picture fits.
    report, _ = upcycle(text=text, vision=vision, pixel_shuffle_factor=4)
    check(report, {"text": text, "vision": vision})


@pytest.mark.parametrize("key", ["norm.weight", "layers.0.mlp.experts.1.down_proj.weight"])
def test_two_keys_for_one_place_are_both_named(key):
    ours = ["model.language_model.norm.weight", "model.language_model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=f"both model.{key} and {key} for model.language_model"):
        map_keys([f"model.{key}", key], "text", ours)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300), "known are llama, mistral"),
        (lambda: transformers.LlamaConfig(**TEXT, mlp_bias=True), "mlp_bias=True"),
        (lambda: transformers.LlamaConfig(**TEXT, attention_bias=True), "o_proj.bias"),
        (lambda: transformers.OlmoeConfig(**TEXT, clip_qkv=1.0), "clip_qkv=1.0"),
    ],
)
def test_a_text_parent_that_does_not_fit_is_refused_by_name(config, message, parent, upcycle, tmp_path):
    text = parent("text", AutoModelForCausalLM.from_config(config()))
    vision = parent("siglip", VISION_PARENTS["siglip"](), False)
    with pytest.raises(ValueError, match=message):
        upcycle(text=text, vision=vision)
    assert not [path for path in tmp_path.iterdir() if "made" in path.name]


def test_an_unknown_vision_family_lists_the_known_ones(parent, upcycle):
    vit = transformers.ViTModel(transformers.ViTConfig(**SQUARE))
    with pytest.raises(ValueError, match="known are siglip, siglip2, clip"):
        upcycle(text=text_parent(parent), vision=parent("vit", vit, False))


def test_one_feature_layer_in_a_list_is_that_layer():
    assert feature_layer_of(transformers.LlavaConfig(vision_feature_layer=[-2])) == -2
    assert feature_layer_of(transformers.LlavaConfig(vision_feature_layer=[-2, -1])) == [-2, -1]
    assert feature_layer_of(transformers.Idefics3Config()) == -1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("said", [("text",), ("whole",), ("text", "whole")])
def test_a_plan_counts_the_head_that_transformers_builds(said, tied):
    says = {place: {"tie_word_embeddings": tied} for place in said}
    text = {"model_type": "llama", **TEXT, **says.get("text", {})}
    vision = {"model_type": "clip_vision_model", **SQUARE}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, **says.get("whole", {}))
    model = transformers.AutoModelForImageTextToText.from_config(config)
    assert is_tied(config) == (model.lm_head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("biases", [True, False])
def test_the_query_biases_of_a_qwen2_moe_may_be_left_out(biases):
    assert text_fields(transformers.Qwen2MoeConfig(qkv_bias=biases), [])["attention_bias"] == biases
