# SPDX-License-Identifier: Apache-2.0
"""The files of a plug-in for a family: its adapter, a small model of it, and a test that runs all checks."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote
from string import Template

from ..errors import SpecError
from ..models import GROUP, families
from .scaffold import ENTRY_POINT, Draft, Scaffold, offered, require_folder, write

# templates, not f-strings: braces of the code stand as they are
_ADAPTER = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""Where the parts of $name are. TODO: replace the paths by those of your model."""

from __future__ import annotations

from vlmprune.models.declared import declare_family

# one square crop per image, one token per patch; for tiles, merged patches or clips write a subclass of
# vlmprune.models.Adapter
Adapter = declare_family(
    "$name",  # model_type of its config
    tower="vision_tower",  # these are attributes of the multimodal model, which is model.model
    projector="multi_modal_projector",
    language_model="language_model",
    encode="get_image_features",  # pixels to features, one (tokens, width) per image
    pixels="pixel_values",
    token="image_token_id",  # attribute of the config
)
''')
_TINY = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""A small random $name, which the checks run on. TODO: build one of your class in place of the LLaVA."""

from __future__ import annotations

from typing import Any

from vlmprune.testing.families import llava
from vlmprune.testing.families.base import Family
from vlmprune.testing.families.layouts import Layout
from vlmprune.testing.tiny import tiny_model


def build(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> Any:
    """A model with so many decoder layers; its weights are drawn anew."""
    model = tiny_model("llava", layers=layers, **overrides)
    model.config.model_type = "$name"
    return model


# Layout says which ids stand in the prompt for a picture, and which tensors beside it
FAMILY = Family("$name", "", Layout(), (("clip", "llama"),), llava.config, build=build)
''')
_TEST = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""The checks that every family of vlmprune passes, on a small $name."""

from __future__ import annotations

import pytest
import vlmprune
from vlmprune.testing.conformance import run_checks
from vlmprune.testing.families import add_family
from vlmprune.testing.tiny import tiny_inputs, tiny_model

from $module import Adapter
from $tiny import FAMILY

vlmprune.register_family("$name")(Adapter)
add_family(FAMILY)


def test_as_many_tokens_stay_as_were_asked_for():
    model, inputs = tiny_model("$name"), tiny_inputs("$name", images=(1, 2))
    with vlmprune.prune(model, "divprune@9") as run:
        model.generate(**inputs, max_new_tokens=2)
    assert run.last.realised_tokens == [9, 9, 9]


@pytest.mark.parametrize("spec", ["fastervlm@0.25", "fastv@0.25"])
def test_conformance(spec):
    results = run_checks(spec, families=["$name"])
    assert results
    assert [f"{r.check}: {r.detail}" for r in results if r.status == "fail"] == []
''')


def scaffold_family(name: str, folder: Path) -> Scaffold:
    """Write a plug-in for models whose config has this model type."""
    # the name becomes a part of modules and files
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise SpecError(
            f"{name!r} is no model type for a plug-in; expected lower case letters, digits and _, as in "
            "'my_vlm', the model_type of the config"
        )
    if name in families():
        raise SpecError(
            f"{name!r} has an adapter already (`vlmprune list --families` shows all); give yours to one "
            "call, as in prune(model, spec, adapter=...)"
        )
    require_folder(folder)
    if (folder / "vlmprune" / "models").is_dir():
        raise SpecError(
            f"{str(folder)!r} is a checkout of vlmprune, and --family writes a plug-in; choose a folder of "
            "your own, or see 'Add a model family' in CONTRIBUTING.md"
        )
    module, tiny, test = f"vlmprune_{name}", f"vlmprune_{name}_tiny", f"test_{name}.py"
    # file -> text; side by side, so that the test imports both as they are
    texts = {
        f"{module}.py": _ADAPTER.substitute(name=name),
        f"{tiny}.py": _TINY.substitute(name=name),
        test: _TEST.substitute(name=name, module=module, tiny=tiny),
    }
    steps = (
        f"pip install pytest -e {quote(str(folder))}",
        f"say in {folder / module}.py where the parts of your model are",
        f"build a small one of it in {folder / tiny}.py, with random weights",
        f"pytest {quote(str(folder / test))}",
        f"vlmprune verify fastervlm --adapter {module}:Adapter --tiny {tiny}:FAMILY",
    )
    # vlmprune finds the adapter by this entry point once it is installed
    entry_point = ENTRY_POINT.substitute(group=GROUP, name=name, module=module, cls="Adapter")
    plan = Draft({Path(path): text for path, text in texts.items()}, {}, steps)
    return write(offered(plan, name, (module, tiny), entry_point, folder), folder)
