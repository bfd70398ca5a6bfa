"""What transformers' common model tests ask of every model: loading, initialisation, recording, backends."""

import inspect
import json

import pytest
import torch
from accelerate import infer_auto_device_map
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from moevlm.base_moevlm import IS_TRANSFORMERS_5
from moevlm.configuration_moevlm import AUTO_MAP
from moevlm.experts_moevlm import MoeVlmExperts
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration, MoeVlmModel

CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # another kernel or address, another order of sums: float32 roundings


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    return tmp_path


def loaded(folder, **options):
    return MoeVlmForConditionalGeneration.from_pretrained(folder, **options).eval()


# Loading


@pytest.mark.parametrize("tied", [False, True])
def test_no_key_is_missing_or_unexpected(tied, tmp_path):
    MoeVlmForConditionalGeneration(tiny_config(tie_word_embeddings=tied)).save_pretrained(tmp_path)
    _, info = MoeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_the_base_model_leaves_only_the_head_behind(folder):
    _, info = MoeVlmModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_is_obeyed_under_both_names(folder, name, dtype):
    model = loaded(folder, **{name: dtype})
    assert model.dtype == dtype and {parameter.dtype for parameter in model.parameters()} == {dtype}
    # Positions beyond 256 collide in bf16.
    assert model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_device_map_gives_the_same_logits(folder, tiny, batch):
    model = loaded(folder, device_map="cpu")
    assert model.device.type == "cpu"
    torch.testing.assert_close(model(**batch).logits, tiny(**batch).logits, **CLOSE)


def test_shards_load_like_one_file(tiny, batch, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(loaded(tmp_path)(**batch).logits, tiny(**batch).logits, **CLOSE)


def test_saving_repairs_a_map_that_names_other_code(tiny, tmp_path):
    tiny.config.auto_map = {"AutoModel": "acme/tiny--_fsdp_init.FSDPMoeVlmModel"}
    tiny.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_buffers_that_no_file_holds_are_refilled_by_loading(folder, tiny):
    expected, found = dict(tiny.named_buffers()), dict(loaded(folder).named_buffers())
    assert any(name.endswith("inv_freq") for name in expected) and found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_weights_that_no_file_holds_are_initialised_as_in_a_fresh_model(folder):
    stored, kept = load_file(folder / "model.safetensors"), "model.language_model.norm.weight"
    save_file({kept: stored[kept]}, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = MoeVlmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    fresh = MoeVlmForConditionalGeneration(model.config).state_dict()
    assert set(info["missing_keys"]) >= {name for name, _ in model.named_parameters()} - {kept}
    for name, value in model.state_dict().items():
        if value.numel() < 2 or fresh[name].std() == 0:
            assert torch.equal(value, fresh[name]), name
        else:  # two draws of at least 16 numbers: their standard deviations lie within a factor of 2.5
            assert 0.4 < (value.std() / fresh[name].std()).item() < 2.5, name


def test_a_stored_weight_is_never_initialised_again(folder):
    stored = load_file(folder / "model.safetensors")
    removed = "model.vision_tower.embeddings.patch_embedding.convs.0.weight"
    kept = {name: value for name, value in stored.items() if name != removed}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    found = loaded(folder).state_dict()
    assert [name for name, value in kept.items() if not torch.equal(found[name], value)] == []


def test_init_on_the_meta_device_has_the_same_parameters(config, tiny):
    with torch.device("meta"):
        model = MoeVlmForConditionalGeneration(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert shapes == {name: value.shape for name, value in tiny.state_dict().items()}


def test_the_same_seed_gives_the_same_model(config):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(MoeVlmForConditionalGeneration(config).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# Names that engines rely on


def test_modules_that_must_not_be_split_exist(tiny):
    names = {type(module).__name__ for module in tiny.modules()}
    assert set(tiny._no_split_modules) <= names
    assert set(tiny.model._no_split_modules) <= names


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_device_map_splits_no_layer_nor_what_adds_or_joins_the_results_of_its_parts(tiny, share):
    size = sum(value.nbytes for value in tiny.state_dict().values())
    room = {0: int(share * size), 1: int(share * size), "cpu": size}
    places = infer_auto_device_map(tiny, max_memory=room, no_split_module_classes=tiny._no_split_modules)
    assert len(set(places.values())) > 1
    for name in ("vision_tower.embeddings", "vision_tower.layers.0", "connector", "language_model.layers.0"):
        assert not any(place.startswith(f"model.{name}.") for place in places), name


def test_the_children_have_the_names_that_engines_look_for(tiny):
    assert [name for name, _ in tiny.named_children()] == ["model", "lm_head"]
    assert [name for name, _ in tiny.model.named_children()] == ["vision_tower", "connector", "language_model"]
    sparse = tiny.model.language_model.layers[0].mlp
    assert [name for name, _ in sparse.named_children()] == ["gate", "experts"]
    for model in (tiny, tiny.model):
        assert model.get_decoder() is model.language_model is tiny.model.language_model
        assert model.vision_tower is tiny.model.vision_tower


def test_the_experts_take_what_engines_pass():
    forward = inspect.unwrap(MoeVlmExperts.forward)
    assert list(inspect.signature(forward).parameters)[1:] == ["hidden_states", "top_k_index", "top_k_weights"]


def test_image_features_have_the_form_of_each_line(tiny, batch):
    features = tiny.get_image_features(batch["pixel_values"])
    tokens = features.pooler_output if IS_TRANSFORMERS_5 else features
    assert tokens.shape == (2, tiny.config.image_seq_length, 32)


# Forward


def test_evaluation_is_deterministic(tiny, batch):
    assert torch.equal(tiny(**batch).logits, tiny(**batch).logits)


@pytest.mark.parametrize("with_head", [True, False])
def test_a_tuple_holds_what_the_output_object_holds(tiny, batch, with_head):
    model = tiny if with_head else tiny.model
    if not with_head:
        batch.pop("labels")
    flags = {"output_hidden_states": True, "output_router_logits": True}
    expected = model(**batch, **flags).to_tuple()
    found = model(**batch, **flags, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(expected)
    flat = [
        [leaf for leaf in torch.utils._pytree.tree_leaves(each) if torch.is_tensor(leaf)] for each in (found, expected)
    ]
    assert len(flat[0]) == len(flat[1]) > 5
    assert all(torch.equal(first, second) for first, second in zip(*flat))


def test_flags_in_the_config_record_as_arguments_do(config, batch):
    config.text_config.output_hidden_states = True
    model = MoeVlmForConditionalGeneration(config).eval()
    assert len(model(**batch).hidden_states) == 4


def test_output_router_logits_in_the_config_records_without_being_asked(batch):
    model = MoeVlmForConditionalGeneration(tiny_config(output_router_logits=True)).eval()
    batch.pop("labels")
    output = model(**batch)
    assert len(output.router_logits) == 4 and output.aux_loss > 0


def test_recorded_hidden_states_chain_from_embeddings_to_the_last_state(tiny, batch):
    output = tiny.model(**{name: batch[name] for name in ("input_ids", "pixel_values")}, output_hidden_states=True)
    text = batch["input_ids"] != tiny.config.image_token_id
    embeds = tiny.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(output.hidden_states[0][text], embeds[text])
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_recording_leaves_no_module_wrapped(tiny, batch):
    for _ in range(2):
        tiny(**batch, output_hidden_states=True, output_router_logits=True)
    # The experts' forward is a dispatcher of transformers 5 from the start.
    wrapped = [name for name, module in tiny.named_modules() if module.forward.__func__ is not type(module).forward]
    assert wrapped == []


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_an_attention_backend_can_be_set_later_and_reaches_every_part(tiny, batch, name):
    expected = tiny(**batch).logits
    tiny.set_attn_implementation(name)
    for part in (tiny, tiny.model, tiny.language_model, tiny.vision_tower):
        assert part.config._attn_implementation == name
    if name != "flex_attention":  # its kernel compiles for half a minute on a CPU
        torch.testing.assert_close(tiny(**batch).logits, expected, **CLOSE)


def test_a_registered_attention_function_is_used_by_decoder_and_tower(tiny, batch):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = set()

    def recording(module, *args, **kwargs):
        seen.add(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    expected = tiny(**batch).logits
    tiny.set_attn_implementation("recording")
    torch.testing.assert_close(tiny(**batch).logits, expected, **CLOSE)
    assert seen == {"MoeVlmAttention", "MoeVlmVisionAttention"}


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="transformers 4.57 has no experts backends")
@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_an_experts_backend_can_be_set_and_changes_nothing(tiny, batch, name):
    expected = tiny(**batch).logits
    tiny.set_experts_implementation(name)
    for part in (tiny.vision_tower, tiny.model.connector, tiny.language_model):
        assert part.config._experts_implementation == name
    torch.testing.assert_close(tiny(**batch).logits, expected, **CLOSE)


# Gradients


def test_every_parameter_gets_a_gradient(tiny, batch):
    tiny.train()
    tiny(**batch).loss.backward()
    assert [name for name, parameter in tiny.named_parameters() if parameter.grad is None] == []
    # An idle expert may have zeros; a whole parameter of zeros would be cut off.
    assert [name for name, parameter in tiny.named_parameters() if not parameter.grad.any()] == []


def test_inputs_can_require_gradients_for_adapters_under_checkpointing(tiny, batch):
    tiny.train().requires_grad_(False)
    tiny.language_model.layers[2].self_attn.q_proj.weight.requires_grad_()
    tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tiny.enable_input_require_grads()
    tiny(**batch).loss.backward()
    assert tiny.language_model.layers[2].self_attn.q_proj.weight.grad.any()
