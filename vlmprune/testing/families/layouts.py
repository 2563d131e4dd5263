# SPDX-License-Identifier: Apache-2.0
"""Ways of laying pictures out: placeholder ids in the prompt and tensors beside it, without a processor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from .shared import BOS_ID, GRID, IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE, VIDEO_ID

FRAMES = 3  # of a clip
Size = tuple[int, int]


class Layout:
    """Every picture is one square crop of GRID x GRID tokens, each made of ``merge`` x ``merge`` patches."""

    sizes: tuple[Size, ...] = ((IMAGE_SIZE, IMAGE_SIZE),)  # of pictures 0, 1, 2, ... of a batch
    video: tuple[int, int] | None = None  # (placeholders per frame, placeholders after the last one)
    mixes = True  # whether images and clips may stand in one call

    def __init__(
        self, merge: int = 1, video: tuple[int, int] | None = None, patch_size: int = PATCH_SIZE
    ) -> None:
        self.merge = merge
        self.video = video
        self.pixels = GRID * patch_size * merge  # along a side of a crop

    @property
    def patches(self) -> int:
        """What the tower reads of the first picture of a batch, or of each of its crops."""
        return (GRID * self.merge) ** 2

    def block(self, size: Size, alone: bool) -> list[int]:
        """Ids that stand in the prompt for one picture; ``alone`` in its row or not."""
        return [IMAGE_ID] * GRID**2

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Tensors of all pictures of a batch, ``images`` of them in every row."""
        pixels = [torch.randn(1, 3, self.pixels, self.pixels, generator=random) for _ in sizes]
        return {"pixel_values": torch.cat(pixels)} if pixels else {}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        """The tensors of ``count`` pictures from number ``first`` on, as a row of them alone has them."""
        return {"pixel_values": inputs["pixel_values"][first : first + count]} if count else {}

    def clip(self, frames: int) -> list[int]:
        """Ids that stand in the prompt for one clip."""
        each, behind = self.video or (0, 0)
        return [VIDEO_ID] * (each * frames + behind)

    def videos(self, rows: int, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        """Tensors of one clip per row."""
        return {
            "pixel_values_videos": torch.randn(rows, frames, 3, self.pixels, self.pixels, generator=random)
        }

    def video_row(self, inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return {"pixel_values_videos": inputs["pixel_values_videos"][i : i + 1]}

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        """Tensors of the shape of the ids (B, L) that the family wants as well."""
        return {}


class Tiled(Layout):
    """LLaVA-NeXT and its children: an overview and tiles, un-padded, with newlines.

    Args:
        points: (height, width) of the canvases.
        one: as OneVision: several pictures of a row are overviews only, and big ones are scaled down.
    """

    # flat, tall, nearly square, very flat, and a single crop
    sizes = ((100, 190), (190, 100), (168, 160), (70, 250), (84, 84))

    def __init__(
        self, points: list[list[int]], video: tuple[int, int] | None = None, one: bool = False
    ) -> None:
        super().__init__(video=video)
        self.points = points
        self.one = one

    def tiles(self, sizes: Sequence[Size], images: Sequence[int]) -> list[int]:
        """Crops that each picture is cut into, the overview included."""
        # of every picture, whether it is the only one of its row
        alone = [count == 1 for count in images for _ in range(count)]
        # tiles of the canvas that suits a picture best, and the overview
        whole = [
            math.prod(side // IMAGE_SIZE for side in select_best_resolution(tuple(s), self.points)) + 1
            for s in sizes
        ]
        return [n if single or not self.one else 1 for n, single in zip(whole, alone, strict=True)]

    def block(self, size: Size, alone: bool) -> list[int]:
        if self.one and not alone:
            return [IMAGE_ID] * (GRID**2 + 1)  # one newline
        height, width = size
        # patches of the canvas
        rows, cols = (side // PATCH_SIZE for side in select_best_resolution(tuple(size), self.points))
        if (
            width * rows > cols * height
        ):  # the image is flatter than its canvas: bands above and below were padding
            rows -= (rows - height * cols // width) // 2 * 2
        else:
            cols -= (cols - width * rows // height) // 2 * 2
        # anyres_max_9: features of more than nine crops are scaled down; 1.1 is the bound of transformers
        ratio = math.sqrt(rows * cols / (9 * GRID**2))
        if self.one and ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
        # the overview, and rows that each end in a newline
        return [IMAGE_ID] * (GRID**2 + rows * (cols + 1))

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        pixels = [
            torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random) for n in self.tiles(sizes, images)
        ]
        if not pixels:
            return {}
        found = {
            # (pictures, most crops, 3, H, W)
            "pixel_values": nn.utils.rnn.pad_sequence(pixels, batch_first=True),
            "image_sizes": torch.tensor(sizes),
        }
        if self.one:
            found["batch_num_images"] = torch.tensor(
                [n for n in images if n]
            )  # no entry for rows without images
        return found

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        sizes, pixels = (inputs[key][first : first + count] for key in ("image_sizes", "pixel_values"))
        # a row alone is filled up to its own largest picture
        found = {"image_sizes": sizes, "pixel_values": pixels[:, : max(self.tiles(sizes.tolist(), [count]))]}
        return found | ({"batch_num_images": torch.tensor([count])} if self.one else {})


class Packed(Layout):
    """Qwen: patches of all pictures in one sequence, block by block of ``merge`` x ``merge``; their grids.

    Args:
        clip_frames: the frames of a clip stand apart, a time before each.
        patch: shape of the pixels of a patch, by default of two frames.
        clips: whether the family reads some.
        marks: ids in front of a picture and behind it.
        typed: whether it asks what kind of token each is.
    """

    sizes = ((168, 168), (112, 280), (280, 112))  # 6 x 6, 4 x 10 and 10 x 4 tokens of 28 pixels a side

    def __init__(
        self,
        clip_frames: bool = False,
        *,
        patch: tuple[int, ...] = (3 * 2 * PATCH_SIZE**2,),
        clips: bool = True,
        typed: bool = True,
        marks: tuple[tuple[int, ...], tuple[int, ...]] = ((BOS_ID,), ()),
    ) -> None:
        super().__init__(MERGE, (GRID**2, 0) if clips else None)
        self.clip_frames = clip_frames
        self.patch = patch
        self.typed = typed
        self.marks = marks

    def grid(self, size: Size) -> tuple[int, int]:
        rows, cols = (side // PATCH_SIZE for side in size)
        return rows, cols

    def block(self, size: Size, alone: bool) -> list[int]:
        start, end = self.marks
        return [*start, *[IMAGE_ID] * (math.prod(self.grid(size)) // MERGE**2), *end]

    def _packed(
        self, grids: Sequence[Sequence[int]], random: torch.Generator, kind: str
    ) -> dict[str, Tensor]:
        # (patches of all pictures, *patch)
        pixels = torch.randn(sum(map(math.prod, grids)), *self.patch, generator=random)
        name, of = ("pixel_values", "image") if kind == "image" else ("pixel_values_videos", "video")
        return {name: pixels, f"{of}_grid_thw": torch.tensor(grids)}

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        return self._packed([(1, *self.grid(size)) for size in sizes], random, "image") if sizes else {}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        return self._slice(inputs, first, count, "pixel_values", "image_grid_thw") if count else {}

    def _slice(
        self, inputs: dict[str, Tensor], first: int, count: int, pixels: str, grid: str
    ) -> dict[str, Tensor]:
        lengths = inputs[grid].prod(dim=1).tolist()
        own = slice(sum(lengths[:first]), sum(lengths[: first + count]))
        return {pixels: inputs[pixels][own], grid: inputs[grid][first : first + count]}

    def clip(self, frames: int) -> list[int]:
        start, end = self.marks
        if not self.clip_frames:
            return [*start, *[VIDEO_ID] * (GRID**2 * frames), *end]
        # frame + 1 is the id of some byte, in place of the text of a time
        return [i for frame in range(frames) for i in [frame + 1, BOS_ID, *[VIDEO_ID] * GRID**2]]

    def videos(self, rows: int, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        return self._packed([(frames, GRID * MERGE, GRID * MERGE)] * rows, random, "video")

    def video_row(self, inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return self._slice(inputs, i, 1, "pixel_values_videos", "video_grid_thw")

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        if not self.typed:
            return {}
        # 0 text, 1 image, 2 clip
        return {"mm_token_type_ids": (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()}


class Typed(Layout):
    """PaliGemma and Gemma 3: tokens have types, by which some attend both ways.

    Args:
        whole: a whole prompt does, not the tokens of one image.
    """

    def __init__(self, merge: int = 1, *, whole: bool) -> None:
        super().__init__(merge)
        self.whole = whole

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        # PaliGemma: 0 is the prefix, which holds all; Gemma 3: 1 is a token of an image
        return {"token_type_ids": torch.zeros_like(ids) if self.whole else (ids == IMAGE_ID).long()}


class Nested(Layout):
    """Idefics3 and SmolVLM: (rows, most pictures of a row, 3, H, W), filled up with pictures of zeros."""

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        pixels = torch.zeros(len(images), max(images), 3, self.pixels, self.pixels)
        for row, count in enumerate(images):
            for number in range(count):
                pixels[row, number] = torch.randn(self.pixels, self.pixels, 3, generator=random).permute(
                    2, 0, 1
                )
        return {"pixel_values": pixels} if sizes else {}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:  # a batch without pictures has no pixels either
            return {}
        # numbers of the pictures that are more than filling, as they follow each other in the batch
        real = inputs["pixel_values"].flatten(2).any(dim=2).flatten().nonzero()[:, 0]
        return {"pixel_values": inputs["pixel_values"].flatten(0, 1)[real[first : first + count]][None]}


class Sized(Layout):
    """Pixtral: pictures of any size, filled up to the largest of a batch, with their sizes beside."""

    sizes = ((168, 168), (112, 280), (280, 112))

    def __init__(self) -> None:
        super().__init__(MERGE)

    def block(self, size: Size, alone: bool) -> list[int]:
        height, width = (side // (PATCH_SIZE * MERGE) for side in size)
        return [IMAGE_ID] * (height * width)

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        if not sizes:
            return {}
        pixels = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
        for number, (height, width) in enumerate(sizes):
            pixels[number, :, :height, :width] = torch.randn(3, height, width, generator=random)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        sizes = inputs["image_sizes"][first : first + count]
        # a row alone is filled up to its own largest picture
        height, width = sizes.amax(dim=0).tolist()
        pixels = inputs["pixel_values"][first : first + count, :, :height, :width]
        return {"pixel_values": pixels, "image_sizes": sizes}


class Filled(Sized):
    """SigLIP 2: patches of every picture, filled up to the most of a batch; their grids and masks."""

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        if not sizes:
            return {}
        shapes = torch.tensor(sizes) // PATCH_SIZE  # (pictures, 2)
        counts = shapes.prod(dim=1)
        width = int(counts.max())
        # (pictures, most patches)
        mask = torch.arange(width)[None] < counts[:, None]
        pixels = torch.randn(len(sizes), width, 3 * PATCH_SIZE**2, generator=random) * mask[..., None]
        return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.long()}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
        found = {name: inputs[name][first : first + count] for name in names}
        width = int(found["spatial_shapes"].prod(dim=1).max())
        # the shapes have no axis of patches
        return {name: value if name == names[1] else value[:, :width] for name, value in found.items()}


def words(count: int, random: torch.Generator) -> list[int]:
    """Random ids of bytes."""
    # 0 is <pad>, and the other special ids begin at BOS_ID
    return torch.randint(1, BOS_ID, (count,), generator=random).tolist()
