# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture: one image, four methods, the same budget.

    python docs/gallery.py docs/gallery.png

The model has the geometry of LLaVA-1.5 (24 x 24 patches) and random weights, so where the [CLS] token looks means nothing; how
the methods spread their budget is real.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from vlmprune.testing.picture import picture

METHODS = ("random", "uniform", "divprune", "fastervlm")
KEEP, SIDE, PATCH, GAP, TITLE = 64, 24, 14, 12, 34


def model() -> LlavaForConditionalGeneration:
    """LLaVA-1.5's visual geometry at a small width, random weights."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    with torch.no_grad():  # fan-in scaled weights: differences between patches survive the tower
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5 * (2.0 if "_proj" in name else 1.0))
    return made.eval()


def main(path: str) -> None:
    image = picture(size=(SIDE * PATCH, SIDE * PATCH))
    pixels = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, *image.size, 3).permute(0, 3, 1, 2) / 127.5 - 1
    )
    ids = torch.tensor([[1] + [63] * SIDE * SIDE + [2, 3]])
    lava = model()
    width = len(METHODS) * (image.width + GAP) - GAP
    sheet = Image.new("RGB", (width, image.height + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    for number, method in enumerate(METHODS):
        with vlmprune.prune(lava, f"{method}@{KEEP}") as run, torch.no_grad():
            lava(input_ids=ids, pixel_values=pixels)
        left = number * (image.width + GAP)
        sheet.paste(run.last.keep[0].draw(image), (left, TITLE))
        pen.text((left + 4, 6), f"{method}@{KEEP}", fill="black", font=ImageFont.load_default(20))
    sheet.save(path)


if __name__ == "__main__":
    main(sys.argv[1])
