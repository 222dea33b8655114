"""launch/api/settings.py says of the settings in Python what the sections say; run this file to write it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from shoal.recipe.distill import Distill
from shoal.recipe.evaluate import Eval
from shoal.recipe.measure import Measure
from shoal.recipe.section import Section

FILE = Path(__file__).parents[3] / "launch/api/settings.py"
FUNCTIONS: dict[str, tuple[type, str, str]] = {
    "MeasureSettings": (Measure, "measure", "num_tokens sequence_length batch_size sweep"),
    "DistillSettings": (
        Distill,
        "distill",
        "num_tokens sequence_length batch_size packing lora on_policy stop_on_spike precision trainer",
    ),
    "EvalSettings": (
        Eval,
        "eval",
        "batch_size num_fewshot apply_chat_template include_path data_dir perplexity_tokens",
    ),
}
HEAD = '''"""Keys of a recipe's sections that functions of the Python API take too. Written from the sections by
tests/launch/api/test_settings.py; run that file after a change of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict
'''


def words(hint: Any) -> str:
    """A type as a caller writes values of it."""
    if get_origin(hint) is Annotated:
        return words(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(words, get_args(hint))))
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(quoted, get_args(hint)))}]"
    if get_origin(hint) is dict or (isinstance(hint, type) and issubclass(hint, Section)):
        return "Mapping[str, Any]"
    return "None" if hint is types.NoneType else hint.__name__


def quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def written() -> str:
    text = HEAD
    for name, (section, place, keys) in FUNCTIONS.items():
        hints = get_type_hints(section, include_extras=True)
        lines = [f"    {key}: {words(hints[key])}\n" for key in keys.split()]
        text += f'\n\nclass {name}(TypedDict, total=False):\n    """Of the section `{place}`."""\n\n' + "".join(lines)
    return text


def test_it_says_what_the_sections_say() -> None:
    assert FILE.read_text(encoding="utf-8") == written()


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
