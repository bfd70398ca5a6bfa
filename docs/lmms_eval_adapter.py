# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Our checkpoints in the lmms-eval harness (written for its version 0.7, which it needs installed).

    python docs/lmms_eval_adapter.py --model moevlm --model_args pretrained=outputs/demo --tasks mme --batch_size 16
    torchrun --nproc_per_node 8 docs/lmms_eval_adapter.py --model moevlm --model_args pretrained=org/name --tasks gqa

All other flags are the harness's own. A checkpoint brings its code along, so this file works without the rest of the
repository: copy it anywhere.
"""

import sys
from collections import defaultdict

import torch
import transformers
from accelerate import PartialState

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(f"the lmms-eval harness cannot be loaded ({error}); install it: pip install lmms-eval") from error

NAME = "moevlm"
# Where a task sets no limit; most answers end far earlier, at the end token.
MAX_NEW_TOKENS = 256
# What the harness asks `generate` for, and what it means for us.
GENERATION = ("temperature", "top_p", "num_beams", "do_sample")


class MoeVlmAdapter(lmms):
    """A checkpoint that answers the harness's requests.

    Args:
        pretrained: Folder or Hub id.
        device: Such as "cpu" or "cuda:0"; by default each process takes the best it has.
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: Requests at a time; those with the same settings and number of pictures share a batch.
        system_prompt: A system message before each question.

    Raises:
        TypeError: An argument that is not known.
    """

    is_simple = True

    def __init__(self, pretrained, device=None, dtype="auto", batch_size=1, system_prompt=None):
        super().__init__()
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self._device = torch.device(device or state.device)
        self.batch_size, self.system_prompt = int(batch_size), system_prompt
        load = {"pretrained_model_name_or_path": pretrained, "trust_remote_code": True}
        self.processor = transformers.AutoProcessor.from_pretrained(**load)
        self.processor.tokenizer.padding_side = "left"
        model = transformers.AutoModelForImageTextToText.from_pretrained(**load, dtype=dtype)
        self.model = model.to(self._device).eval()

    @property
    def device(self):
        return self._device

    def generate_until(self, requests):
        """The answers in the order of the requests, each cut before the first of its stop strings."""
        asked = [request.args for request in requests]
        groups = defaultdict(list)
        for place, (context, settings, doc_to_visual, *document) in enumerate(asked):
            pictures = self._pictures(doc_to_visual, *document)
            groups[repr(sorted(settings.items())), len(pictures)].append(
                (self._prompt(context, pictures), pictures, place)
            )
        answers = {}
        for (_, _), group in sorted(groups.items()):
            group.sort(key=lambda one: -len(one[0]))
            for start in range(0, len(group), self.batch_size):
                texts, pictures, places = zip(*group[start : start + self.batch_size])
                said = self._generate(texts, pictures, dict(asked[places[0]][1]))
                answers.update(zip(places, said))
        for place, answer in answers.items():
            self.cache_hook.add_partial("generate_until", asked[place][:2], answer)
        return [answers[place] for place in range(len(asked))]

    def loglikelihood(self, requests):
        """The mean negative log-likelihood of each continuation, and whether greedy decoding would say it.

        The harness calls the number a log-likelihood but takes the smallest for the best, so it gets the loss.
        """
        results = []
        for context, target, doc_to_visual, *document in (request.args for request in requests):
            pictures = self._pictures(doc_to_visual, *document)
            continuation = target if isinstance(target, str) else target(self._document(*document))
            prompt = self._prompt(context, pictures)
            # To say nothing is to say the end token.
            said = continuation.strip() or self.processor.tokenizer.eos_token
            results.append(self._loss(prompt, said, pictures))
        return results

    def generate_until_multi_round(self, requests):
        """Not there: such tasks write their next question from the last answer; `run_eval.py` scores dialogues."""
        raise NotImplementedError("this adapter answers single rounds; score dialogues with run_eval.py --tasks chat")

    def _document(self, doc_id, task, split):
        return self.task_dict[task][split][doc_id]

    def _pictures(self, doc_to_visual, *document):
        return list(doc_to_visual(self._document(*document)) or [])

    def _prompt(self, context, pictures):
        """The rendered chat; the pictures stand before the words, whatever markers the task put among them."""
        words = {"type": "text", "text": context.replace("<image>", "").strip()}
        messages = [{"role": "user", "content": [{"type": "image"}] * len(pictures) + [words]}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _inputs(self, texts, pictures):
        images = pictures if any(pictures) else None
        inputs = self.processor(text=list(texts), images=images, padding=True, return_tensors="pt")
        dtypes = {name: self.model.dtype if value.is_floating_point() else None for name, value in inputs.items()}
        return {name: value.to(self._device, dtypes[name]) for name, value in inputs.items()}

    def _generate(self, texts, pictures, settings):
        until = settings.pop("until", [])
        until = [until] if isinstance(until, str) else until
        given = {name: settings[name] for name in GENERATION if settings.get(name) is not None}
        given["do_sample"] = given.get("do_sample", True) and given.get("temperature", 0) > 0
        if not given["do_sample"]:
            # None silences a checkpoint's sampling settings, which greedy decoding would warn about.
            given |= {"temperature": None, "top_p": None, "top_k": None}
        given["max_new_tokens"] = settings.get("max_new_tokens") or MAX_NEW_TOKENS
        inputs = self._inputs(texts, pictures)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **given, pad_token_id=self.processor.tokenizer.pad_token_id)
        said = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in filter(None, until):
            said = [text.split(stop)[0] for text in said]
        return [text.strip() for text in said]

    def _loss(self, prompt, continuation, pictures):
        # One sequence, so that a word is cut into tokens as in training: the prompt's length is that of its own tokens.
        length = self._inputs([prompt], [pictures])["input_ids"].shape[1]
        inputs = self._inputs([prompt + continuation], [pictures])
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, length - 1 : -1].float()  # (T, vocabulary)
        targets = inputs["input_ids"][0, length:]  # (T,)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return loss.item(), bool((logits.argmax(-1) == targets).all())


def main():
    """Make the model known to the harness, then be its command line."""
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{'lmms_eval_adapter' if __name__ == '__main__' else __name__}.{MoeVlmAdapter.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(model_id=NAME, simple_class_path=path), overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
