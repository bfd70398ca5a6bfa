# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The adapter for the lmms-eval harness against a stand-in for its base class: no network, no package."""

import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from PIL import Image

from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer

ADAPTER = Path(__file__).resolve().parent.parent / "docs" / "lmms_eval_adapter.py"
WORDS = ["What colour is it?", "Describe the picture.", "red green blue grey", "yes no"]


class Lmms:
    """What the harness's base class gives: a cache, the documents by task and split, one process."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cached = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *row: self.cached.append(row))


@pytest.fixture
def module(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    spec = importlib.util.spec_from_file_location("lmms_eval_adapter", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    torch.manual_seed(0)
    config = tiny_config(vocab_size=300)
    processor = build_processor(config, train_tokenizer(WORDS, 300))
    config.image_token_id = processor.image_token_id
    MoeVlmForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(module, folder):
    adapter = module.MoeVlmAdapter(folder, device="cpu", batch_size="4")
    colours = ["red", "green", "blue", None, "grey"]
    pictures = [[Image.new("RGB", (9, 9), colour)] if colour else [] for colour in colours]
    adapter.task_dict["task"] = {"test": [{"pictures": each, "answer": "red"} for each in pictures]}
    return adapter


def request(context, second, document=0):
    return SimpleNamespace(args=(context, second, lambda row: row["pictures"], document, "task", "test"))


def test_answers_come_in_the_order_of_the_requests(adapter):
    limits = [{"max_new_tokens": 5}, {"max_new_tokens": 2}]
    questions = ["What?", "What colour is it?", "Is it a long question about a thing?", "Say yes", "Who?"]
    requests = [request(text, limits[at % 2], at) for at, text in enumerate(questions)]
    together = adapter.generate_until(requests)
    assert together == [adapter.generate_until([one])[0] for one in requests]
    assert len(set(together)) > 1 and all(isinstance(answer, str) for answer in together)
    first = [row for row in adapter.cached if row[0] == "generate_until"][:5]
    assert sorted(first, key=lambda row: row[1][0]) == sorted(
        (("generate_until", one.args[:2], answer) for one, answer in zip(requests, together, strict=True)),
        key=lambda row: row[1][0],
    )


def test_the_harness_keeps_its_settings(adapter):
    settings = {"max_new_tokens": 3, "until": ["\n"], "temperature": 0, "top_p": None, "num_beams": 1}
    before = dict(settings)
    adapter.generate_until([request("What?", settings)])
    assert settings == before


def test_an_answer_ends_before_its_stop_string(adapter):
    (whole,) = adapter.generate_until([request("What?", {"max_new_tokens": 12})])
    stop = whole[len(whole) // 2]
    (cut,) = adapter.generate_until([request("What?", {"max_new_tokens": 12, "until": [stop]})])
    assert cut == whole.split(stop)[0].strip() and len(cut) < len(whole)


def test_pictures_stand_first_whatever_the_task_writes(adapter):
    same = [adapter._prompt(text, [None]) for text in ("What?", "<image>What?", "<image>\nWhat?", "What? <image>")]
    assert len(set(same)) == 1 and same[0].count("<image>") == 1
    assert adapter._prompt("What?", []).count("<image>") == 0
    adapter.system_prompt = "Be brief."
    assert "Be brief." in adapter._prompt("What?", [])


def test_the_loss_is_the_mean_over_the_continuations_tokens(adapter):
    pictures, prompt = adapter.task_dict["task"]["test"][0]["pictures"], adapter._prompt("What?", [None])
    results = adapter.loglikelihood([request("What?", " yes"), request("What?", "no way")])
    for said, (loss, sure) in zip(("yes", "no way"), results, strict=True):
        count = len(adapter.processor.tokenizer(said)["input_ids"])
        inputs = adapter._inputs([prompt + said], [pictures])
        with torch.no_grad():
            whole = adapter.model(**inputs).logits[0].log_softmax(-1)
        tokens = inputs["input_ids"][0, -count:].tolist()
        steps = whole[-count - 1 : -1]
        by_hand = -sum(steps[at, token].item() for at, token in enumerate(tokens)) / count
        assert loss == pytest.approx(by_hand, rel=1e-4)
        assert sure == (steps.argmax(-1).tolist() == tokens)


def test_what_greedy_decoding_would_say_is_known(adapter):
    class Prophet(torch.nn.Module):
        """Is almost sure of whatever comes next."""

        dtype = torch.float32

        def forward(self, input_ids, **inputs):
            following = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), 300)
            return SimpleNamespace(logits=20.0 * following)

    adapter.model = Prophet()
    ((loss, sure),) = adapter.loglikelihood([request("What?", "no way")])
    assert sure is True and loss == pytest.approx(0.0, abs=1e-4)


def test_nothing_to_say_is_the_end_token(adapter):
    end = adapter.processor.tokenizer.eos_token
    nothing, last = adapter.loglikelihood([request("What?", " "), request("What?", end)])
    assert nothing == last and nothing[0] > 0


def test_a_continuation_may_be_a_function_of_the_document(adapter):
    first, second = adapter.loglikelihood([request("What?", lambda row: row["answer"]), request("What?", "red")])
    assert first == second


def test_what_it_does_not_do_it_says(adapter, module, folder):
    with pytest.raises(NotImplementedError, match="score dialogues with run_eval.py --tasks chat"):
        adapter.generate_until_multi_round([])
    with pytest.raises(TypeError, match="max_pixels"):
        module.MoeVlmAdapter(folder, max_pixels=3)


def test_without_the_harness_it_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    spec = importlib.util.spec_from_file_location("lmms_eval_adapter", ADAPTER)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_harness_that_lacks_a_package_of_its_own_names_it(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    spec = importlib.util.spec_from_file_location("lmms_eval_adapter", ADAPTER)
    with pytest.raises(ImportError, match="lmms_eval.api.model"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_command_makes_the_model_known_and_runs_the_harness(module, monkeypatch):
    known, ran = {}, []
    names = ("lmms_eval.__main__", "lmms_eval.models", "lmms_eval.models.registry_v2")
    main, models, registry = (types.ModuleType(name) for name in names)
    main.cli_evaluate = lambda: ran.append(True)
    models.MODEL_REGISTRY_V2 = SimpleNamespace(
        register_manifest=lambda manifest, overwrite: known.update({manifest.model_id: manifest.simple_class_path})
    )
    registry.ModelManifest = SimpleNamespace
    for name, stand_in in zip(names, (main, models, registry), strict=True):
        monkeypatch.setitem(sys.modules, name, stand_in)
    module.main()
    assert known == {"moevlm": "lmms_eval_adapter.MoeVlmAdapter"} and ran
