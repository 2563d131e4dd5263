# SPDX-License-Identifier: Apache-2.0
"""Methods on a bare vision tower of timm, without any language model."""

# %% [markdown]
# # Towers of timm
#
# Many methods read nothing but the vision tower, so they work on a bare ViT of
# [timm](https://github.com/huggingface/pytorch-image-models) as well: CLIP, DINOv2, SigLIP. This needs `pip
# install timm`.
#
# Usually you would write `timm.create_model("vit_base_patch16_clip_224", pretrained=True)`. This notebook
# runs offline, so it puts the trained tower of the bundled model into timm's class. Both are the CLIP ViT:
# the same layers under other names.

# %%
import re

import timm
import torch

import vlmprune
from vlmprune.viz.notebook import beside

model, processor = vlmprune.load("tiny")
config = model.config.vision_config
tower = timm.models.vision_transformer.VisionTransformer(
    img_size=config.image_size,
    patch_size=config.patch_size,
    embed_dim=config.hidden_size,
    depth=config.num_hidden_layers,
    num_heads=config.num_attention_heads,
    mlp_ratio=config.intermediate_size / config.hidden_size,
    num_classes=0,
    pre_norm=True,
    norm_layer=torch.nn.LayerNorm,
    act_layer="quick_gelu",
).eval()

NAMES = {  # of transformers -> of timm
    r".*patch_embedding\.": "patch_embed.proj.",
    r".*pre_layrnorm\.": "norm_pre.",
    r".*post_layernorm\.": "norm.",
    r".*layers\.(\d+)\.layer_norm(\d)\.": r"blocks.\1.norm\2.",
    r".*layers\.(\d+)\.self_attn\.out_proj\.": r"blocks.\1.attn.proj.",
    r".*layers\.(\d+)\.mlp\.": r"blocks.\1.mlp.",
}


def renamed(name):
    for pattern, new in NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return None


given = {
    name.partition("vision_tower.")[2]: value
    for name, value in model.state_dict().items()
    if "vision_tower." in name
}
state = {renamed(name): value for name, value in given.items() if renamed(name)}
for layer in range(config.num_hidden_layers):  # timm keeps queries, keys and values in one matrix
    for kind in ("weight", "bias"):
        parts = [
            next(
                value
                for name, value in given.items()
                if name.endswith(f"layers.{layer}.self_attn.{one}_proj.{kind}")
            )
            for one in "qkv"
        ]
        state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
state["cls_token"] = next(v for n, v in given.items() if n.endswith("class_embedding")).reshape(1, 1, -1)
state["pos_embed"] = next(v for n, v in given.items() if n.endswith("position_embedding.weight"))[None]
missing, unexpected = tower.load_state_dict(state, strict=False)
print("missing:", missing, "unexpected:", unexpected)

# %% [markdown]
# ## Score a picture
#
# `score` takes the tower and pixels.

# %%
picture, question, _ = vlmprune.example()
pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]  # (1, 3, H, W)
(alone,) = vlmprune.score(tower, pixels, "fastervlm(layer=-2)", image=picture)
alone

# %% [markdown]
# It is the map that the whole model gives:

# %%
inputs = vlmprune.encode(model, processor, picture, question)
(inside,) = vlmprune.score(model, inputs, "fastervlm", image=picture)
print("the same kept set:", alone.keep(18).overlap(inside.keep(18)) == 1.0)
print(f"largest difference of a score: {(alone.scores - inside.scores).abs().max():.1e}")
beside([alone.keep(18), inside.keep(18)], ["timm", "transformers"])

# %% [markdown]
# ## Choose
#
# `select` gives indices for all methods that read the tower alone, also those that choose sets.

# %%
for method in ("fastervlm", "hiprune", "divprune", "scope", "vispruner", "uniform"):
    try:
        kept = vlmprune.select(method, keep=8, tower=tower, pixels=pixels)
        print(f"{method:10} {kept[0].tolist()}")
    except vlmprune.VlmPruneError as error:
        print(f"{method:10} {error}")
