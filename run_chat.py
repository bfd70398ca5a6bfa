# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Talk with a checkpoint about pictures, over several turns.

    python run_chat.py --model_name_or_path outputs/demo --image photo.png
    python run_chat.py --model_name_or_path outputs/demo --question "tell me what color the star is."

Without a picture one is drawn. At the prompt, `/image PATH` shows another picture, `/new` starts again without one, an
empty line ends. `--question` asks one question after the other and exits. `--web` serves a page on this machine,
to which pictures can be dragged; it needs gradio: `pip install gradio==5.49.1`, on transformers 5 `gradio==6.31.0`.
"""

import importlib.util
import inspect
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from transformers import AutoProcessor, GenerationConfig, HfArgumentParser, TextStreamer

from moevlm import AutoModelForVision2Seq
from moevlm.processing_moevlm import open_image, to_rgb
from moevlm.scenes_moevlm import captions, picture, scenes

PICTURE_ALONE = "Describe the picture."


@dataclass
class ChatArguments:
    """What to talk with, and about what."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub id."})
    image: list[str] = field(default_factory=list, metadata={"help": "Pictures of the first turn; drawn if absent."})
    question: list[str] = field(default_factory=list, metadata={"help": "Ask these and exit, instead of a prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer at most."})
    temperature: float = field(default=0.0, metadata={"help": "0 always takes the likeliest token."})
    web: bool = field(default=False, metadata={"help": "Serve a page with a chat on this machine (needs gradio)."})
    port: int = field(default=7860, metadata={"help": "Of the page."})
    seed: int = field(default=0, metadata={"help": "Of the drawn picture and of sampling."})
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16", "float16"]})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, mps, ..."})


def main():
    (args,) = HfArgumentParser(ChatArguments).parse_args_into_dataclasses()
    if args.web and importlib.util.find_spec("gradio") is None:
        raise ImportError("--web needs gradio; run: pip install gradio==5.49.1 (transformers 5: gradio==6.31.0)")
    torch.manual_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    model = AutoModelForVision2Seq.from_pretrained(args.model_name_or_path, dtype=args.dtype).to(args.device).eval()
    if args.web:
        Page(lambda: Conversation(model, processor, args)).launch(args.port)
        return
    conversation = Conversation(model, processor, args)
    conversation.show(args.image or [drawn_picture(args.seed)])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for question in args.question:
        print(f"> {question}")
        conversation.ask(question, streamer)
    if not args.question:
        answer_the_keyboard(conversation, streamer)


def drawn_picture(seed):
    """A picture that no training run has seen; its true caption is printed."""
    (scene,) = scenes("test", 1, seed)
    print(f"(A drawn picture: {captions(scene)[0]}.)")
    return picture(scene)


def answer_the_keyboard(conversation, streamer=None):
    """Answer questions and carry out commands, up to an empty line or the end of the input."""
    with suppress(EOFError):
        while line := input("> ").strip():
            try:
                command, _, path = line.partition(" ")
                if command == "/new":
                    conversation.messages, conversation.waiting = [], []
                elif command == "/image":
                    conversation.show([path.strip()])
                else:
                    conversation.ask(line, streamer)
            except ValueError as error:  # a slip of the hand does not end the conversation
                print(error)


class Conversation:
    """Messages so far, the pictures waiting for the next question, and the model that answers."""

    def __init__(self, model, processor, args):
        self.model, self.processor = model, processor
        self.generation_config = GenerationConfig.from_model_config(model.config)
        ends, tokenizer = model.generation_config.eos_token_id, processor.tokenizer
        self.generation_config.update(
            max_new_tokens=args.max_new_tokens,
            do_sample=args.temperature > 0,
            temperature=args.temperature or None,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.messages, self.waiting = [], []

    def show(self, images):
        """Put pictures (paths or PIL) in front of the next question.

        Raises:
            ValueError: One does not open; none is put there.
        """
        self.waiting += [{"type": "image", "image": to_rgb(open_image(image))} for image in images]

    def ask(self, question, streamer=None):
        """The answer, which is remembered; a `streamer` gets its words as they come."""
        messages = [*self.messages, {"role": "user", "content": [*self.waiting, {"type": "text", "text": question}]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(messages, **options).to(self.model.device)
        output = self.model.generate(**inputs, generation_config=self.generation_config, streamer=streamer)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.waiting = []
        return answer


class Page:
    """A page with a chat; each visitor has a [`Conversation`] of their own, a new one from `begin()`."""

    def __init__(self, begin):
        self.begin, self.conversations = begin, {}

    def answer(self, message, history, visitor):
        """The answer to a message `{"text", "files"}` after the history: what was undone on the page is forgotten."""
        if visitor not in self.conversations:
            self.conversations[visitor] = self.begin()
        conversation, turns = self.conversations[visitor], sum(turn["role"] == "assistant" for turn in history)
        conversation.messages, conversation.waiting = conversation.messages[: 2 * turns], []
        conversation.show(message["files"])
        return conversation.ask(message["text"] or PICTURE_ALONE)

    def launch(self, port):
        """Serve the page until interrupted."""
        import gradio

        def answer(message, history, request: gradio.Request):
            return self.answer(message, history, request.session_hash)

        # gradio 6 knows no other form and no such argument.
        form = {"type": "messages"} if "type" in inspect.signature(gradio.ChatInterface).parameters else {}
        gradio.ChatInterface(answer, multimodal=True, title="MoeVlm", **form).launch(server_port=port)


if __name__ == "__main__":
    main()
