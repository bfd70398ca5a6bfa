"""A saved folder on somebody else's machine: no checkout, an empty modules cache, another working directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import load_file

from moevlm.base_moevlm import IS_TRANSFORMERS_5, SHIPPED
from moevlm.configuration_moevlm import AUTO_MAP
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REVISION = "0123456789abcdef0123456789abcdef01234567"
PROMPT = "<|user|>What is <image> in the picture?<|assistant|>"
# transformers 5 removed the old name.
HEADS = ["AutoModelForImageTextToText"] + ([] if IS_TRANSFORMERS_5 else ["AutoModelForVision2Seq"])

# What the stranger runs: loads every class from argv[1], notes what it sees, and saves the model again to argv[2].
STRANGER = """
import importlib.util, json, sys
import torch, transformers
from PIL import Image

torch.set_num_threads(1)
source, target, prompt, heads = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
report = {"path": sys.path, "checkout": importlib.util.find_spec("moevlm") is not None, "refused": {}, "logits": {}}
for name in ["AutoConfig", "AutoModel", "AutoProcessor", *heads]:
    for trust in (False, None):
        try:
            getattr(transformers, name).from_pretrained(source, trust_remote_code=trust)
        except ValueError as error:
            report["refused"][f"{name} {trust}"] = "trust_remote_code" in str(error)
        except Exception as error:
            report["refused"][f"{name} {trust}"] = repr(error)
        else:
            report["refused"][f"{name} {trust}"] = False

processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (40, 30), "red"), text=prompt, return_tensors="pt")
for name in heads:
    model = getattr(transformers, name).from_pretrained(source, trust_remote_code=True).eval()
    report["logits"][name] = model(**inputs).logits.tolist()
    report[name] = [type(model).__name__, type(model).__module__]
answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1]:]
report["answer"] = processor.batch_decode(answer)
talk = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}]}]
talk[0]["content"].append({"type": "text", "text": "What is it?"})
pipe = transformers.pipeline("image-text-to-text", model=source, trust_remote_code=True)
report["pipeline"] = pipe(text=talk, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
base = transformers.AutoModel.from_pretrained(source, trust_remote_code=True).eval()
report["base"] = [type(base).__name__, base(**inputs).last_hidden_state.tolist()]
config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
report["config"] = [type(config).__name__, config.image_seq_length]
report["processor"] = type(processor).__name__
model.save_pretrained(target)
processor.save_pretrained(target)
print("REPORT" + json.dumps(report))
"""


def stranger(folder, source):
    """The report of a fresh process in `folder` that loads `source` and saves it again to `folder/resaved`."""
    folder.mkdir(exist_ok=True)
    program = folder / "stranger.py"
    program.write_text(STRANGER)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS"))}
    own = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, str(program), str(source), str(folder / "resaved"), PROMPT, *HEADS],
        cwd=folder,
        env=kept | own,
        stdin=subprocess.DEVNULL,  # nobody answers the question whether to trust
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.rpartition("REPORT")[2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with model and processor, and the logits, states and answer that they give here."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=300)
    processor = build_processor(config, train_tokenizer(["What is in the picture?", "a red square"], 300))
    config.image_token_id = processor.image_token_id
    model = MoeVlmForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (40, 30), "red"), text=PROMPT, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    talk = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}]}]
    talk[0]["content"].append({"type": "text", "text": "What is it?"})
    form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = processor.apply_chat_template(talk, **form)
    reply = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return {
        "folder": folder,
        "reply": processor.decode(reply, skip_special_tokens=True),
        "logits": model(**inputs).logits,
        "states": model.model(**inputs).last_hidden_state,
        "answer": processor.batch_decode(answer),
    }


@pytest.fixture(scope="module", params=["folder", "hub"])
def loaded(request, saved, tmp_path_factory):
    """What a stranger saw who loaded from a folder or from the Hub's cache, and where it was saved again."""
    place, source = tmp_path_factory.mktemp(request.param), saved["folder"]
    if request.param == "hub":
        cache = place / "home" / "hub" / "models--acme--tiny"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(REVISION)
        shutil.copytree(saved["folder"], cache / "snapshots" / REVISION)
        source = "acme/tiny"
    return stranger(place, source), place / "resaved"


def assert_same_numbers(report, saved):
    for name in HEADS:
        # The same code, weights and number of threads, in another process: a few roundings at most.
        torch.testing.assert_close(torch.tensor(report["logits"][name]), saved["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(report["base"][1]), saved["states"], rtol=1e-5, atol=1e-5)
    assert report["answer"] == saved["answer"]


def test_the_stranger_has_no_checkout(loaded):
    report, _ = loaded
    assert report["checkout"] is False
    assert str(ROOT) not in report["path"] and "" not in report["path"]


def test_every_auto_class_gives_our_class_from_the_remote_code(loaded):
    report, _ = loaded
    for name in HEADS:
        class_name, module = report[name]
        assert class_name == "MoeVlmForConditionalGeneration" and module.startswith("transformers_modules.")
    assert report["base"][0] == "MoeVlmModel"
    assert report["config"] == ["MoeVlmConfig", 4]
    assert report["processor"] == "MoeVlmProcessor"


def test_remote_numbers_and_answers_equal_ours(loaded, saved):
    assert_same_numbers(loaded[0], saved)


def test_a_pipeline_answers_as_generate_does(loaded, saved):
    assert loaded[0]["pipeline"] == saved["reply"] and saved["reply"]


def test_nothing_loads_without_trust(loaded):
    refused = loaded[0]["refused"]
    assert len(refused) == 2 * (3 + len(HEADS))
    assert all(value is True for value in refused.values()), refused


def assert_complete(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["MoeVlmForConditionalGeneration"]
    assert {path.name for path in folder.glob("*.py")} == {f"{name}_moevlm.py" for name in SHIPPED}
    for name in SHIPPED:
        file = f"{name}_moevlm.py"
        assert (folder / file).read_text(encoding="utf-8") == (ROOT / file).read_text(encoding="utf-8"), file
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert (folder / name).is_file(), name
    assert "AutoProcessor" in json.loads((folder / "processor_config.json").read_text())["auto_map"]


def test_saving_writes_the_whole_map_and_all_the_code(saved):
    assert_complete(saved["folder"])


def test_saving_a_remotely_loaded_model_writes_the_same_map_code_and_weights(loaded, saved):
    _, resaved = loaded
    assert_complete(resaved)
    first, second = (load_file(folder / "model.safetensors") for folder in (saved["folder"], resaved))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# From the Hub only: there the map that was loaded names the repository, which a folder's does not.
@pytest.mark.parametrize("loaded", ["hub"], indirect=True)
def test_what_was_saved_again_loads_again(loaded, saved, tmp_path):
    _, resaved = loaded
    assert_same_numbers(stranger(tmp_path / "next", resaved), saved)
