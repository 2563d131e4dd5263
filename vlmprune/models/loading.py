# SPDX-License-Identifier: Apache-2.0
"""From a name to a model and a processor, and from a picture and a question to model inputs.

What cannot be pruned is refused by its config.json, before any weight is read and before any code of a
checkpoint runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checks import one_of
from ..errors import SpecError, UnsupportedError, VlmPruneError
from ..hooks.adapter import ModalityName
from ..spec import Spec
from ..viz.overlay import open_picture
from . import adapter_for, check_family
from .shrink import shrink_for
from .tiny import BUNDLED, load_tiny

TINY = "tiny"
_TICKS = 100  # a second, in which processors are told when frames come
DTYPES = ("auto", "float32", "bfloat16", "float16")
BUNDLED_NOTE = (
    "{} was trained on the drawn pictures of this package alone: about other pictures its answers mean "
    "nothing"
)


def load(
    name: str, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """``(model, processor)``, the model in eval mode.

    Args:
        name: ``"tiny"``, ``"natural"`` or ``"video"``, the trained models of the package, a folder written by
            ``save_pretrained``, or an HF id.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        dtype: one of ``DTYPES``; "auto" is what the checkpoint says.
        trust_remote_code: let processor and tokenizer run Python code that comes with them. The model is
            always that of transformers, so no supported family needs it.
    """
    one_of("dtype", dtype, DTYPES)
    check_device(device)
    if name in BUNDLED:
        return load_tiny(device, torch.float32 if dtype == "auto" else getattr(torch, dtype), BUNDLED[name])

    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if not name:
        raise VlmPruneError(f"the model name is empty; expected {TINY!r}, a folder or an HF id")
    # small files first, in order of size: what is wrong with them is said before gigabytes are read
    check_config(name)
    config = read_pretrained(name, "config", AutoConfig.from_pretrained)
    processor = read_pretrained(
        name, "processor", AutoProcessor.from_pretrained, trust_remote_code=trust_remote_code
    )
    if getattr(processor, "patch_size", 0) is None:
        raise UnsupportedError(
            f"the processor of {name!r} has no patch_size; set it in processor_config.json"
        )
    model, info = read_pretrained(
        name,
        "weights",
        AutoModelForImageTextToText.from_pretrained,
        config=config,
        dtype=dtype,
        # the other format is a pickle, which can run code when it is read
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would draw them at random
        raise VlmPruneError(
            f"the weights of {name!r} lack {len(missing)} tensors, such as {missing[0]!r}; save it whole"
        )
    return model.to(device).eval(), processor


def check_config(name: str) -> None:
    """Raise unless config.json names a supported family; reads this one file and runs no code."""
    from transformers import PretrainedConfig

    config, _ = read_pretrained(name, "config", PretrainedConfig.get_config_dict)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or not model_type:
        raise VlmPruneError(
            f"the config of {name!r} cannot be read: it names no model_type; expected a model of transformers"
        )
    try:
        check_family(model_type, config)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name!r}: {error}") from error


def check_device(device: str) -> None:
    """Raise unless tensors can be made on this device."""
    expected = "expected cpu, cuda (any NVIDIA or AMD GPU), cuda:1 or mps"
    try:
        torch.device(device)
    except RuntimeError as error:  # its message lists twenty kinds of device
        raise VlmPruneError(
            f"device {device!r} cannot be used, since torch knows none of this name; {expected}"
        ) from error
    try:
        # torch.device() takes any number of a GPU: only work on it tells whether it is there
        torch.empty(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise VlmPruneError(f"device {device!r} cannot be used ({reason}); {expected}") from error


def prompt(processor: Any, question: str, images: int = 1, kind: ModalityName = "image") -> str:
    """Text with one image, or several, or clips, and a question: the chat template of the processor, or the
    LLaVA-1.5 prompt where it has none.

    PaliGemma has no dialogue: its question is a task, such as "answer en What is this?".
    """
    if not isinstance(question, str):
        raise SpecError(
            f"the question is a {type(question).__name__}; expected one text, behind the picture: "
            "encode(model, processor, image, question)"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in question):  # as JSON or a file name can hold them
        raise SpecError(
            f"the question {question!r} holds half of a character (a surrogate), which no tokenizer takes; "
            "read the text as UTF-8"
        )
    image = getattr(processor, f"{kind}_token", f"<{kind}>")
    for token in (getattr(processor, "image_token", "<image>"), getattr(processor, "video_token", None)):
        if token and token in question:
            raise SpecError(
                f"the question holds {token!r}; leave it out: the picture is put in its place by itself"
            )
    if getattr(processor, "chat_template", None):
        content = [{"type": str(kind)}] * images + [{"type": "text", "text": question}]
        try:
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        except Exception as error:  # a template is a program that comes with the checkpoint
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise VlmPruneError(
                f"the chat template of the model fails ({reason}); give the model another one"
            ) from error
        return text
    if type(processor).__name__ == "PaliGemmaProcessor":
        return f"{image * images}{question}"
    places = "\n".join([image] * images)
    return f"USER: {places}\n{question} ASSISTANT:"


def encode(model: Any, processor: Any, image: Any, question: str, prune: str | Spec | None = None) -> Any:
    """Inputs of ``model.generate`` for one picture and one question, on the device and in the dtype of the
    model.

    Args:
        model, processor: as ``load`` gives them, or as transformers loads them.
        image: PIL image of any mode, or the path of a picture; the model is shown what maps are drawn on.
        question: plain text; the place of the picture and the turns of a dialogue are added.
        prune: a spec that changes the picture, such as ``"downsample@64"``; all others act inside the model.
    """
    text, image = prompt(processor, question), open_picture(image)
    options: Mapping[str, Any] = {}
    if prune is not None:
        made = shrink_for(adapter_for(model), processor, prune)([image])
        (image,), options = made.images, made.options
    inputs = processor(images=image, text=text, return_tensors="pt", **options)
    return inputs.to(model.device, model.dtype)


def encode_clip(
    model: Any, processor: Any, frames: Sequence[Any], question: str, times: Sequence[float] = ()
) -> tuple[Any, bool]:
    """Inputs of ``model.generate`` for one clip and one question, and whether the frames are images to the
    model, which ``prune`` must then be told by ``frames=True``.

    Args:
        frames: PIL images of one size, in order.
        times: seconds at which they come, for models that read times; evenly spaced ones, half a second apart
            by default.
    """
    adapter = adapter_for(model)
    if all(modality.name != "video" for modality in adapter.modalities) or not _reads_clips(processor):
        text = prompt(processor, question, len(frames))
        inputs = processor(images=list(frames), text=text, return_tensors="pt", **adapter.of_frames)
        return inputs.to(model.device, model.dtype), True
    import numpy as np

    moments = list(times) or [number / 2 for number in range(len(frames))]
    step = (moments[-1] - moments[0]) / (len(moments) - 1) if len(moments) > 1 else 1.0
    inputs = processor(
        videos=[np.stack([np.asarray(frame) for frame in frames])],
        text=prompt(processor, question, 1, "video"),
        return_tensors="pt",
        do_sample_frames=False,  # they were chosen already
        video_metadata=[
            {
                "total_num_frames": round(step * len(frames) * _TICKS),
                "fps": float(_TICKS),
                "duration": step * len(frames),
                "frames_indices": [round(moment * _TICKS) for moment in moments],
            }
        ],
    )
    return inputs.to(model.device, model.dtype), False


def _reads_clips(processor: Any) -> bool:
    return getattr(processor, "video_processor", None) is not None


def read_pretrained(name: str, what: str, read: Callable[..., Any], **options: Any) -> Any:
    """Call one from_pretrained; what can be wrong with a name or a folder becomes one clear error."""
    # an HF id has one slash at most, and never begins with a dot or a tilde
    path = Path(name).expanduser()
    if not path.is_dir() and (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or "\\" in name  # of Windows
        or path.is_file()
    ):
        state = "is a file" if path.is_file() else "does not exist"
        raise VlmPruneError(
            f"the folder {name!r} {state}; expected {TINY!r}, a folder written by save_pretrained, or an HF "
            "id"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise VlmPruneError(f"the folder {name!r} holds no config.json; expected what save_pretrained writes")
    try:
        return read(str(path) if path.is_dir() else name, **options)
    # a file of another shape than expected fails where transformers reads it: TypeError, AttributeError,
    # RecursionError
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        if isinstance(error, ImportError):
            todo = "install what is missing"
        elif path.is_dir():
            todo = (
                "expected the files that save_pretrained of model and processor write, weights as "
                "*.safetensors"
            )
        else:
            todo = (
                "no folder of this name is here, so it was looked up as an HF id: check spelling and "
                "network, log in if the model is gated, or give a folder"
            )
        raise VlmPruneError(f"the {what} of {name!r} cannot be read: {reason} ({todo})") from error
