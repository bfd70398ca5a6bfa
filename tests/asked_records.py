# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Records to ask about, for the tests of answering, scoring and reporting."""

from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def message(role, text, images=0):
    return {"role": role, "content": [{"type": "image", "text": None}] * images + [{"type": "text", "text": text}]}


def vqa(name, question, answer, colour="red", **more):
    turns = [message("user", question, images=1), message("assistant", answer)]
    picture = Image.new("RGB", (20, 12), COLOURS[colour])
    return {"id": name, "task": "vqa", "images": [picture], "messages": turns, "answers": [answer] * 10, **more}


def chat(name, *texts, refers_back=None):
    turns = [message("user" if at % 2 == 0 else "assistant", text, at == 0) for at, text in enumerate(texts)]
    picture = Image.new("RGB", (8, 8))
    return {"id": name, "task": "chat", "images": [picture], "messages": turns, "refers_back": refers_back}


def caption(name, references):
    turns = [message("user", "Describe the picture.", images=1), message("assistant", references[0])]
    return {"id": name, "task": "caption", "images": [Image.new("RGB", (8, 8))], "messages": turns} | {
        "references": references
    }
