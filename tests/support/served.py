# SPDX-License-Identifier: Apache-2.0
"""Prompts for the trained small models, as engines and transformers are given them, and their answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Prompt:
    """A question of the synthetic benchmark as vLLM is given it, and as transformers is."""

    ids: list[int]  # one placeholder per picture
    images: list
    inputs: dict

    def request(self, spec: object) -> dict:
        options = {} if spec is None else {"mm_processor_kwargs": {"vlmprune": spec}}
        return {"prompt_token_ids": self.ids, "multi_modal_data": {"image": self.images}, **options}


NEW = 4  # tokens of an answer


class Twin:
    """A trained small model in transformers."""

    def __init__(self, name: str = "tiny") -> None:
        import vlmprune

        self.model, self.processor = vlmprune.load(name)
        self.image = self.model.config.image_token_id

    def prompts(self, each: int) -> list[Prompt]:
        """``each`` questions of every family about one picture, and as many about two of these pictures."""
        from vlmprune import example
        from vlmprune.evaluation.tasks.shapes import shapes
        from vlmprune.evaluation.tasks.shapes.example import _SEVERAL

        families = [family for family in shapes().families if family not in _SEVERAL]
        asked = [example(family, number) for family in families for number in range(each)]
        pairs = list(zip(asked[::2], asked[1::2], strict=False))[: 2 * each]
        return [self.prompt([one.picture], one.question) for one in asked] + [
            self.prompt([one.picture, two.picture], one.question) for one, two in pairs
        ]

    def prompt(self, images: list, question: str) -> Prompt:
        from vlmprune.models.loading import prompt

        token = self.processor.image_token
        text = prompt(self.processor, question).replace(token, token * len(images), 1)
        inputs = dict(self.processor(images=images, text=text, return_tensors="pt"))
        return Prompt(self.once(inputs["input_ids"][0].tolist(), len(images)), images, inputs)

    def once(self, ids: list[int], images: int) -> list[int]:
        """A prompt with one placeholder per picture, for vLLM to fill in."""
        first = ids.index(self.image)
        last = len(ids) - ids[::-1].index(self.image)
        return [*ids[:first], *[self.image] * images, *ids[last:]]

    def answer(self, prompt: Prompt, spec: str) -> list[int]:
        import vlmprune

        with vlmprune.prune(self.model, spec):
            out = self.model.generate(**prompt.inputs, max_new_tokens=NEW, do_sample=False)
        return out[0, prompt.inputs["input_ids"].shape[1] :].tolist()
