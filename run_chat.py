# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Talk with a checkpoint about pictures, over several turns.

    python run_chat.py --model_name_or_path outputs/demo --image photo.png
    python run_chat.py --model_name_or_path outputs/demo --question "Describe the picture." "how many shapes are there?"

Without a picture one is drawn. At the prompt, `/image PATH` shows another picture, `/new` starts again, an empty line
ends. `--question` asks one question after the other and exits.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoProcessor, GenerationConfig, HfArgumentParser, TextStreamer

from moevlm import AutoModelForVision2Seq
from moevlm.scenes_moevlm import captions, picture, scenes


@dataclass
class ChatArguments:
    """What to talk with, and about what."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub id."})
    image: list[str] = field(default_factory=list, metadata={"help": "Pictures of the first turn; drawn if absent."})
    question: list[str] = field(default_factory=list, metadata={"help": "Ask these and exit, instead of a prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer at most."})
    temperature: float = field(default=0.0, metadata={"help": "0 always takes the likeliest token."})
    seed: int = field(default=0, metadata={"help": "Of the drawn picture and of sampling."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, mps, ..."})


def main():
    (args,) = HfArgumentParser(ChatArguments).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    model = AutoModelForVision2Seq.from_pretrained(args.model_name_or_path).to(args.device).eval()
    conversation = Conversation(model, processor, args)
    conversation.show(args.image or [drawn_picture(args.seed)])
    for question in args.question or typed_lines(conversation):
        if args.question:
            print(f"> {question}")
        conversation.ask(question)


def drawn_picture(seed):
    """A picture that no training run has seen; its true caption is printed."""
    (scene,) = scenes("test", 1, seed)
    print(f"(A drawn picture: {captions(scene)[0]}.)")
    return picture(scene)


def typed_lines(conversation):
    """Questions from the keyboard; commands are carried out here."""
    while line := read_line():
        if line == "/new":
            conversation.messages.clear()
        elif line.startswith("/image "):
            conversation.show([line.removeprefix("/image ").strip()])
        else:
            yield line


def read_line():
    try:
        return input("> ").strip()
    except EOFError:
        return ""


class Conversation:
    """Messages so far, the pictures waiting for the next question, and the model that answers."""

    def __init__(self, model, processor, args):
        self.model, self.processor = model, processor
        self.generation_config = GenerationConfig.from_model_config(model.config)
        self.generation_config.update(
            max_new_tokens=args.max_new_tokens,
            do_sample=args.temperature > 0,
            temperature=args.temperature or None,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        self.messages, self.waiting = [], []

    def show(self, images):
        """Put pictures (paths or PIL) in front of the next question."""
        self.waiting += [{"type": "image", "image": image} for image in images]

    def ask(self, question):
        """Stream the answer to standard output and remember it."""
        content = [*self.waiting, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [*self.messages, {"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs, generation_config=self.generation_config, streamer=streamer)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        self.waiting = []


if __name__ == "__main__":
    main()
