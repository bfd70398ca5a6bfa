"""The chat: what it remembers, whom it mixes up with nobody, and its page."""

import sys
from copy import deepcopy

import pytest
import torch
from conftest import tiny_config
from PIL import Image

import run_chat
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer
from run_chat import ChatArguments, Conversation, Page

TURN = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a red circle"}]


@pytest.fixture(scope="module")
def begin():
    """A function that begins a conversation with one tiny model."""
    config = tiny_config(vocab_size=300)
    tokenizer = train_tokenizer(["what is it? a red circle"], 300)
    for part in (config, config.text_config):
        part.pad_token_id, part.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = MoeVlmForConditionalGeneration(config).eval()
    processor = build_processor(config, tokenizer)
    arguments = ChatArguments(model_name_or_path="", max_new_tokens=4)
    return lambda: Conversation(model, processor, arguments)


@pytest.mark.parametrize("flags, dtype", [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)])
def test_the_weights_are_loaded_as_they_were_saved_or_as_asked(begin, tmp_path, monkeypatch, capsys, flags, dtype):
    conversation, loaded = begin(), []
    deepcopy(conversation.model).to(torch.bfloat16).save_pretrained(tmp_path)
    conversation.processor.save_pretrained(tmp_path)

    class Kept(Conversation):
        def __init__(self, model, *rest):
            super().__init__(model, *rest)
            loaded.append(model)

    monkeypatch.setattr(run_chat, "Conversation", Kept)
    monkeypatch.setattr(sys, "argv", f"run_chat.py --model_name_or_path {tmp_path} --question eh?".split() + flags)
    run_chat.main()
    assert loaded[0].dtype == dtype
    assert "> eh?" in capsys.readouterr().out


def test_an_unknown_dtype_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "run_chat.py --model_name_or_path nowhere --dtype half".split())
    with pytest.raises(SystemExit):
        run_chat.main()
    assert "invalid choice: 'half' (choose from" in capsys.readouterr().err


def roles_and_parts(conversation):
    return [(message["role"], [part["type"] for part in message["content"]]) for message in conversation.messages]


def test_a_conversation_remembers_pictures_questions_and_answers(begin):
    conversation = begin()
    conversation.show([Image.new("RGB", (32, 32), "red")])
    first, second = conversation.ask("what is it?"), conversation.ask("is it red?")
    assert roles_and_parts(conversation) == [
        ("user", ["image", "text"]), ("assistant", ["text"]), ("user", ["text"]), ("assistant", ["text"])
    ]  # fmt: skip
    assert [message["content"][0]["text"] for message in conversation.messages[1::2]] == [first, second]


def test_each_visitor_of_the_page_has_a_conversation_and_an_empty_history_starts_anew(begin, tmp_path):
    picture = str(tmp_path / "red.png")
    Image.new("RGB", (32, 32), "red").save(picture)
    page = Page(begin)
    page.answer({"text": "", "files": [picture]}, [], "ann")
    page.answer({"text": "what is it?", "files": []}, [], "bob")
    page.answer({"text": "is it red?", "files": []}, TURN, "ann")
    ann, bob = page.conversations["ann"], page.conversations["bob"]
    assert [kinds for _, kinds in roles_and_parts(ann)] == [["image", "text"], ["text"], ["text"], ["text"]]
    assert ann.messages[0]["content"][1]["text"] == run_chat.PICTURE_ALONE
    assert len(bob.messages) == 2
    page.answer({"text": "what is it?", "files": []}, [], "ann")
    assert len(page.conversations["ann"].messages) == 2


def test_the_prompt_shows_pictures_survives_slips_and_starts_again(begin, monkeypatch, capsys, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    typed = iter([f"/image {tmp_path}/rad.png", f"/image {tmp_path}/red.png", "what is <image>?", "what is it?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    conversation = begin()
    run_chat.answer_the_keyboard(conversation)
    printed = capsys.readouterr().out
    assert "rad.png' is no picture file" in printed and "2 <image> placeholders but 1 images" in printed
    assert roles_and_parts(conversation) == [("user", ["image", "text"]), ("assistant", ["text"])]
    assert conversation.messages[0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
    typed = iter([f"/image {tmp_path}/red.png", "/new", ""])
    run_chat.answer_the_keyboard(conversation)
    assert conversation.messages == [] and conversation.waiting == []


def test_turns_taken_back_on_the_page_are_forgotten(begin, tmp_path):
    page, picture = Page(begin), str(tmp_path / "red.png")
    Image.new("RGB", (32, 32), "red").save(picture)
    page.answer({"text": "one", "files": []}, [], "ann")
    page.answer({"text": "two", "files": []}, TURN, "ann")
    with pytest.raises(ValueError, match="placeholders"):
        page.answer({"text": "<image>?", "files": [picture]}, TURN, "ann")
    page.answer({"text": "three", "files": [picture]}, TURN, "ann")
    messages = page.conversations["ann"].messages
    assert [message["content"][-1]["text"] for message in messages[::2]] == ["one", "three"]
    assert roles_and_parts(page.conversations["ann"])[2] == ("user", ["image", "text"])


def test_answers_end_where_the_checkpoint_says(begin):
    conversation = begin()
    model = deepcopy(conversation.model)
    model.generation_config.eos_token_id = [5, 7]
    arguments = ChatArguments(model_name_or_path="")
    assert Conversation(model, conversation.processor, arguments).generation_config.eos_token_id == [5, 7]
    model.generation_config.eos_token_id = None
    ends = conversation.processor.tokenizer.eos_token_id
    assert Conversation(model, conversation.processor, arguments).generation_config.eos_token_id == ends


def test_a_picture_that_does_not_open_leaves_the_page_as_it_was(begin, tmp_path):
    page, broken = Page(begin), tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.answer({"text": "what is it?", "files": []}, [], "ann")
    with pytest.raises(ValueError, match="broken.png' is no picture file"):
        page.answer({"text": "and this?", "files": [str(broken)]}, TURN, "ann")
    page.answer({"text": "what is it?", "files": []}, TURN, "ann")
    assert [kinds for _, kinds in roles_and_parts(page.conversations["ann"])] == [["text"]] * 4


def test_the_page_without_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_chat.py", "--model_name_or_path", "nowhere", "--web"])
    monkeypatch.setattr(run_chat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--web needs gradio; run: pip install"):
        run_chat.main()
