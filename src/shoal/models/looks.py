"""What is wrong with a checkpoint as far as its files and transformers' source tell: to import it takes seconds.

Whatever a file leaves open passes: transformers says more of it later on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.atomic_files import read_text
from shoal.errors import UserError
from shoal.installed import names, source
from shoal.models import checkpoint_files as files

MODELS = "models/auto/modeling_auto.py"
WRITES = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
"""Tables of transformers of the model types that write text."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""Keys of config.json that name a function."""
TOKENIZERS = ("BPE", "Unigram", "WordPiece", "WordLevel")
"""Kinds of the library tokenizers."""
OTHERS = (*files.OTHER_VOCABULARIES, "tekken*", "*.py")
"""Names of files of vocabularies and code beside them."""
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizers of no family, which know only what lies in files."""
SPECIAL = ("eos_token", "pad_token", "bos_token")
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (bool, str, list, dict)}
KINDS |= {"int": int | float, "float": int | float, "None": type(None)}
"""Words of transformers' configurations for types -> those of JSON."""
LAYER = re.compile(r"(.*?)\.(\d+)\.(.*)")
PLAIN_WEIGHT = re.compile(r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(self_attn\.)?\w+norm)\.(weight|bias)")
"""Weights of a layer in families whose layers of one kind have the same."""
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""What torch.compile, DistributedDataParallel and PEFT put before names of weights."""


def refuse_config(name: str, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a config.json, of the model ``name``, of no causal language model that transformers knows, or with a word
    that it does not know."""
    kind, code = config.get("model_type"), config.get("auto_map")
    known = source("transformers", "models/auto/*.py")
    if not known or (code and trust_remote_code):
        return
    if kind is None and not code:
        raise UserError(f"{name}: config.json has no model_type; correct it, or {files.DOWNLOAD_AGAIN}")
    if f'"{kind}"' not in known:
        raise UserError(f"{name}: {files.NEEDS_CODE if code else files.UNKNOWN_TYPE}")
    writes = [names("transformers", MODELS, part) for part in WRITES]
    if all(writes) and not any(kind in own for own in writes):
        raise UserError(f"{kind}: {files.NOT_CAUSAL}")
    text = files.text_part(dict(config))
    modules = {re.sub(r"\W", "_", str(each)).removesuffix("_text") for each in (kind, text.get("model_type", kind))}
    own = "".join(source("transformers", f"models/{module}/*.py") for module in modules)
    words = own + source("transformers", "activations.py") + source("transformers", "modeling_rope_utils.py")
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    said = {"rope_type": rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None}
    said |= {key: text.get(key) for key in ACTIVATIONS}
    wrong = {key: word for key, word in said.items() if isinstance(word, str) and f'"{word}"' not in words}
    dtype, types = config.get("dtype", config.get("torch_dtype")), source("torch", "_C/__init__.pyi")
    is_named = types and isinstance(dtype, str) and "float" in dtype
    if is_named and f"\n{dtype.removeprefix('torch.')}: dtype" not in types:
        wrong["dtype"] = dtype
    for each in () if code else config.get("architectures") or ():
        if f'"{each}"' not in known:
            wrong["architectures"] = each
    declared = own + source("transformers", "configuration_utils.py")
    inner = config.get("text_config")
    said = {"dtype": (dtype, str | dict), "text_config": (inner, dict), "rope_parameters": (rope, dict)}
    wrong |= {key: repr(value) for key, (value, kind) in said.items() if not isinstance(value, kind | None)}
    for lacking in filter(None, map(_lacking, files.ropes(text))):
        wrong["rope_parameters"] = lacking
    wrong |= {key: repr(text[key]) for key in text if not _is_of_its_type(text[key], key, declared)}
    layers, count = text.get("layer_types"), text.get("num_hidden_layers")
    if isinstance(layers, list) and (strange := [kind for kind in layers if f'"{kind}"' not in words + declared]):
        wrong["layer_types"] = str(strange[0])
    is_own = re.search(r"self\.layer_types\[|validate_layer_type", own)
    if isinstance(layers, list) and type(count) is int and len(layers) != count and not is_own:
        wrong["layer_types"] = f"{len(layers)} of them next to num_hidden_layers {count}"
    window = text.get("sliding_window")
    if isinstance(layers, list) and "sliding_attention" in layers and isinstance(window, int) and window < 1:
        wrong["sliding_window"] = f"{window} next to layers of sliding_attention"
    for key, word in wrong.items() if own else ():
        told = f"config.json has {key}: {word}, which transformers does not know"
        raise UserError(f"{name}: {told}; correct it, or {files.DOWNLOAD_AGAIN}")


def _lacking(rope: Mapping[str, Any]) -> str:
    """A kind of rotary positions and what transformers needs of it that ``rope`` does not give; empty if it has all."""
    kind, rules = rope.get("rope_type", rope.get("type")), source("transformers", "modeling_rope_utils.py")
    rule = re.search(rf"_validate_{re.escape(str(kind))}_rope_parameters\([^{{]*required_keys = {{([^}}]*)}}", rules)
    needed = re.findall(r'"(\w+)"', rule[1]) if rule else []
    outside = ("rope_type", "rope_theta", "original_max_position_embeddings")  # the rest of config.json gives them
    missing = [key for key in needed if key not in (*rope, *outside)]
    return f"{kind} without {', '.join(missing)}" if missing else ""


def _is_of_its_type(value: Any, key: str, declared: str) -> bool:
    """Whether ``value`` is of a type that classes of configurations, ``declared`` so, give ``key``; where one of them
    is no plain type, too."""
    hints = re.findall(rf"(?m)^    {re.escape(key)}: ([^=\n]+)", declared)
    kinds = {kind.strip() for hint in hints for kind in re.sub(r"\[.*\]", "", hint).split("|")}
    return not kinds or not kinds <= KINDS.keys() or isinstance(value, tuple(KINDS[kind] for kind in kinds))


def refuse_weights(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of these ``shapes``, by name, that lack a layer or what all others of one kind have, or of which
    none fits the vocabulary or the heads of config.json; all may be right that have several stacks of layers."""
    text = files.text_part(dict(config))
    numbers = [text.get(key) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")]
    count, heads, groups = (number if type(number) is int and number > 0 else 0 for number in numbers)
    places = [place for place in map(LAYER.match, shapes) if place]
    stacks, there = {place[1] for place in places}, {int(place[2]) for place in places}
    if wrapper := next((each for each in WRAPPERS if all(name.startswith(each) for name in shapes or [""])), None):
        told = f"names of weights begin with {wrapper!r}, as of a model that was saved inside a wrapper"
        raise UserError(f"{folder}: {told}; save the model that is inside")
    if len(stacks) != 1 or "quantization_config" in config or "auto_map" in config:
        return
    if (missing := {*range(count)} - there) and count % len(there):  # some families count the halves of layers
        told = f"the weights of {min(stacks)}.{min(missing)} are missing, and config.json has {count} layers"
        raise UserError(f"{folder}: {told}; {files.DOWNLOAD_AGAIN}")
    often, kinds = Counter(place[3] for place in places), text.get("layer_types")
    is_mixed = isinstance(kinds, list) and kinds != kinds[:1] * len(kinds)
    if not is_mixed and all(map(PLAIN_WEIGHT.fullmatch, often)):
        of_all_but_one = [name for name, times in often.items() if 1 < times == len(there) - 1]
        whole = {f"{min(stacks)}.{layer}.{name}" for layer in there for name in of_all_but_one}
        files.refuse_incomplete(folder, str(config.get("model_type")), whole - shapes.keys())
    rows = {shape[0] for name, shape in shapes.items() if len(shape) == 2 and not LAYER.match(name)}
    ends = [(name, name.replace("q_proj", "k_proj")) for name in shapes if name.endswith("q_proj.weight")]
    both = [(shapes[query][0], shapes[key][0]) for query, key in ends if key in shapes and heads and groups]
    fits = [q % heads == k % groups == 0 and q // heads in (k // groups, 2 * k // groups) for q, k in both]
    sizes = {k // groups for _, k in both}
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("mlp.down_proj.weight")}
    stored = {"head_dim": sizes, "intermediate_size": widths}
    is_other = any(own and type(text.get(key)) is int and text[key] not in own for key, own in stored.items())
    if is_other or (rows and text.get("vocab_size", min(rows)) not in rows) or (fits and not any(fits)):
        raise UserError(f"{folder}: {files.WRONG_SHAPES}")


def refuse_tokenizer(folder: Path, rows: int = 0) -> None:
    """Refuse files of a tokenizer that no library reads, in which no token ends a text, or with numbers beyond the
    ``rows`` of the model's embeddings; 0 = not known."""
    files.refuse_no_tokenizer(folder)
    settings, problem = files.json_or_empty(folder / "tokenizer_config.json"), ""
    is_plain, ends = settings.get("tokenizer_class") in PLAIN, [settings.get(name, "") for name in SPECIAL[:2]]
    if is_plain and ends == [None, None] and not (folder / "special_tokens_map.json").is_file():
        raise UserError(f"{folder}: {files.NO_END}")
    if not isinstance(longest := settings.get("model_max_length"), int | float | None):
        problem = f"TypeError: model_max_length is {longest!r}"
    file, others = folder / files.TOKENIZER_FILES[0], (*files.TOKENIZER_FILES[1:], *OTHERS)
    if (is_plain or file.is_file()) and not any(any(folder.glob(pattern)) for pattern in others):
        try:
            whole = json.loads(file.read_bytes())
            if (kind := (own := whole["model"]).get("type", TOKENIZERS[0])) not in TOKENIZERS:
                problem = f"ValueError: {file.name} has a model of type {kind!r}"
            elif not own["vocab"]:
                problem = f"ValueError: {file.name} has no vocabulary"
            elif isinstance(own["vocab"], dict) and rows:  # the model may lack special tokens, which no text holds
                special = {token["content"] for token in whole.get("added_tokens") or ()}
                words = ((number, word) for word, number in own["vocab"].items() if word not in special)
                if (largest := max(words, default=(0, "")))[0] >= rows:
                    problem = f"{largest[1]!r} has the number {largest[0]:,}, and the model only {rows:,} embeddings"
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {file.name} is missing or damaged, {error}"
    added = [settings.get("added_tokens_decoder"), files.json_or_empty(folder / "added_tokens.json")]
    for name in SPECIAL if file.is_file() and "auto_map" not in settings and not problem else ():
        # transformers would give it a number of its own, which the model has not learnt; to look for the word takes a
        # hundredth of the time that it takes to parse a large vocabulary
        told = file.read_bytes() + json.dumps(added, ensure_ascii=False).encode()
        own = token.get("content") if isinstance(token := settings.get(name), dict) else token
        spelt = [json.dumps(own, ensure_ascii=is_ascii).encode() for is_ascii in (False, True)]
        if own and isinstance(own, str) and b'"vocab"' in told and not any(word in told for word in spelt):
            problem = f"ValueError: {name} {own!r} of tokenizer_config.json is not in the vocabulary"
    if problem:
        raise UserError(f"{folder}: {files.NO_TOKENIZER.format(problem)}")


def token_counter(folder: Path) -> Callable[[str], int]:
    """What counts the tokens of a text with the tokenizer in ``folder``; it counts none if tokenizer.json is no use."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / files.TOKENIZER_FILES[0]))
    except Exception:  # the library raises no other
        return lambda _: 0
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def chat_template(folder: Path) -> str | None:
    """The chat template in ``folder``; empty if there is none, and None if there are several, or none for certain."""
    file, others = folder / "chat_template.jinja", [*folder.glob("*template*")]
    said = files.json_or_empty(folder / "tokenizer_config.json").get("chat_template") or ""
    if len(str(said)) > files.LONGEST_TEMPLATE:
        raise UserError(f"{folder}: tokenizer_config.json has a chat_template of {len(str(said)):,} characters; cut it")
    if file.is_file() and not said and others == [file]:
        return read_text(file)
    return said if isinstance(said, str) and not others else None
