"""Checkpoint folders as files: whole or damaged, how large, and what identifies them. Loads no model."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shoal.atomic_files import read_json, read_text, refuse_endless
from shoal.errors import UserError
from shoal.installed import names
from shoal.model_names import ADAPTER_CONFIG, model_within
from shoal.yaml_text import own_yaml

DOWNLOAD_AGAIN = "create or download the checkpoint again"
_KNOWN = own_yaml(__file__)
MOST = {name: number for words, number in _KNOWN["most"].items() for name in words.split()}
"""Numbers of a config.json and a generation_config.json that have to be above 0 -> no model has more."""
MAY_BE_0 = _KNOWN["may_be_0"].split()
"""Those that may be 0 as well."""
METHODS = ("utils/quantization_config.py", "class QuantizationMethod")
"""Where transformers lists the methods that weights are quantised by."""
DIVIDE = (("num_key_value_heads", "num_attention_heads"), ("num_attention_heads", "hidden_size"))
"""Whole numbers of which the first has to divide the second; the last pair only if no key names the size of a head."""
NO_DECODERS = ("ForMaskedLM", "ForPreTraining", "Classification", "ForQuestionAnswering", "ForMultipleChoice")
"""Ends of the names of architectures that read text and write none."""
NO_TOKENIZER = "no usable tokenizer ({}); copy the base model's tokenizer files there"
NO_END = "the tokenizer has neither a pad nor an end token; set pad_token in tokenizer_config.json"
NOT_CAUSAL = "is not a causal language model of transformers (one that writes text from left to right); give one"
NEEDS_CODE = _KNOWN["needs_code"]
UNKNOWN_TYPE = "this version of transformers does not know the architecture; upgrade it, or give another model"
WRONG_SHAPES = f"the weights do not have the shapes that config.json gives; {DOWNLOAD_AGAIN}"
OWN_FOLDER = "is the teacher's own folder, or contains it; choose another folder for the student"
LONGEST_TEMPLATE = 200_000
"""Characters of a chat template; those of models have some thousands."""
SAMPLE_BYTES = 64 * 1024
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
OTHER_VOCABULARIES = ("*.model", "*.tiktoken", "vocab.txt")
"""Names of files that hold a vocabulary where there is no tokenizer.json."""
TOKENIZER_PATTERNS = _KNOWN["tokenizer_files"].split()
"""Names of all files that a tokenizer may be stored in."""
WITH_TOKENIZER = (*TOKENIZER_PATTERNS, "chat_template*", "additional_chat_templates")
PROCESSOR = ("*processor_config.json", "chat_template.json")
"""Names of files that say what inputs are made of images, and of text beside them."""
WITH_MODEL = (*PROCESSOR[:1], "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Names of files that go with a tokenizer or a model wherever its weights change."""
TOKENIZER_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "unk_token")
"""Keys of tokenizer_config.json that shape tokens; the rest are paths, versions, and the pad token, which is masked."""
WRITING = "generation_config.json"
"""What says how a model writes by itself; also the name of what identifies that among the inputs of scores."""
KEPT_LAYERS = "shoal_kept_layers"
"""Configuration key that names, for every layer of a student, the layer of the uncut model it was; of a new
layer that below it."""
CLOSED_GAPS = "shoal_closed_gaps"
"""Configuration key that says how a student makes up for dropped layers: fields of ClosedGap, layers of the uncut
model."""
TIED = "tie_word_embeddings"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    dtype: str
    """As the format spells it, `BF16` for instance."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int
    """One past the last byte."""

    @property
    def bits(self) -> int:
        """Bits of one number; 0 where there is none."""
        return 8 * (self.end - self.start) // max(1, math.prod(self.shape))


@dataclass(frozen=True)
class Shard:
    """The header of a safetensors file, checked."""

    file: Path
    tensors: dict[str, StoredTensor]
    """Tensors in the order of their bytes, without gap from the header to the end of the file."""
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size


def is_mtp(name: str) -> bool:
    """Whether a tensor or module belongs to multi-token prediction, which the model itself does not run."""
    return any(part.startswith("mtp") for part in name.split("."))


def mtp_names(names: Iterable[str], num_layers: int) -> list[str]:
    """Those of multi-token prediction: named so, or in a module `layers.N` behind the last of ``num_layers`` layers."""

    def is_behind(name: str) -> bool:
        return any(int(number) >= num_layers for number in re.findall(r"(?:^|\.)layers\.(\d+)\.", name)[:1])

    return [name for name in names if is_mtp(name) or is_behind(name)]


def checkpoint_bytes(folder: Path) -> int:
    """Size of the weights on disk."""
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: model.safetensors, else those the index names. Others may lie beside them.

    Raises:
        UserError: neither is there, or the index is damaged.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (index := folder / INDEX_FILE).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if elsewhere := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{elsewhere[0]!r} is not a file of this folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: is damaged ({error!r}); {DOWNLOAD_AGAIN}") from error
        return [folder / name for name in names]
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5")
    others = sorted(file.name for file in folder.iterdir() if file.suffix in kinds)
    found = f"only {', '.join(others)}" if others else "nor any other weights"
    raise UserError(
        f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there, {found}; give a complete checkpoint in "
        "safetensors (shoal opens no pickled weights, GGUF or TensorFlow's; save_pretrained of transformers converts)"
    )


def read_shards(folder: Path) -> list[Shard]:
    """The headers of all weight files, in the order of their names.

    Raises:
        UserError: a file is missing or damaged, or two have a tensor of one name.
    """
    shards = [read_header(file) for file in weight_files(folder)]
    names = [name for shard in shards for name in shard.tensors]
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise UserError(f"{folder}: {twice[0]} is in two files; {DOWNLOAD_AGAIN}")
    return shards


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder whose weights are absent, pickled or damaged, in milliseconds and before anything loads them.

    A safetensors file says in its header how long it must be, so that a torn file shows without reading its data.
    """
    check_config(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        json_or_empty(folder / name)
    _refuse_other_weights(folder, shards := read_shards(folder))
    shapes = [(name, tensor.shape) for shard in shards for name, tensor in shard.tensors.items()]
    widths = {shape[-1] for name, shape in shapes if len(shape) == 1 or (shape and ("emb" in name or "wte" in name))}
    if widths and text_part(json_or_empty(folder / "config.json")).get("hidden_size") not in [*widths, None]:
        raise UserError(f"{folder}: {WRONG_SHAPES}")


def _refuse_other_weights(folder: Path, shards: Iterable[Shard]) -> None:
    """Refuse weights of more decoder layers than config.json counts, but for those of multi-token prediction, and a
    head of its own where it says that this is the embeddings; many checkpoints store both, alike."""
    whole = json_or_empty(folder / "config.json")
    stored = {name: (shard.file, own) for shard in shards for name, own in shard.tensors.items()}
    told = (config := text_part(whole)).get("num_hidden_layers")
    layers = {int(found[1]) for name in stored if (found := re.match(r"model\.layers\.(\d+)\.self_attn\.", name))}
    if type(told) is int and max(layers, default=-1) >= told and not re.search("nextn|mtp", f"{[*config]}"):
        problem = f"num_hidden_layers: {told}, but the weights have {max(layers) + 1} layers"
        raise UserError(f"{folder}: config.json has {problem}; correct it, or {DOWNLOAD_AGAIN}")
    is_tied = whole.get(TIED, config.get(TIED)) is True
    heads = [own for name, own in stored.items() if is_tied and name.endswith("lm_head.weight")]
    tables = [own for name, own in stored.items() if heads and re.search(r"(emb|wte)[^.]*\.weight$", name)]
    alike = [own for own in tables if (own[1].dtype, own[1].shape) == (heads[0][1].dtype, heads[0][1].shape)]
    if alike and _sample(*heads[0]) not in [_sample(*own) for own in alike]:
        told = f"config.json has {TIED}: true, but the weights have an lm_head of their own"
        raise UserError(f"{folder}: {told}; set it to false")


def refuse_incomplete(folder: Path, family: str, missing: Collection[str], mismatched: Collection[str] = ()) -> None:
    """Refuse weights that lack tensors or have them in other shapes than config.json says."""
    if missing:
        raise UserError(
            f"{folder}: the weights of {min(missing)} are missing ({len(missing)} tensors in all, for the "
            f"{family} architecture that config.json names); {DOWNLOAD_AGAIN}"
        )
    if mismatched:
        raise UserError(f"{folder}: {WRONG_SHAPES}")


def by_layer(shards: Iterable[Shard], num_layers: int, amount: Callable[[StoredTensor], int]) -> list[int]:
    """Sums of ``amount`` over the tensors outside the layers, then over those of each layer; empty if their names do
    not tell, as with two stacks of layers."""
    sums, stacks = [0] * (1 + num_layers), set[str]()
    for name, tensor in (item for shard in shards for item in shard.tensors.items()):
        stack, layer = found.groups() if (found := re.match(r"(.*?)\.(\d+)\.", name)) else ("", -1)
        if int(layer) >= num_layers:
            return []
        sums[1 + int(layer)] += amount(tensor)
        stacks.add(stack)
    return sums if len(stacks - {""}) == 1 and all(sums) else []


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint's config.json that describes its text decoder."""
    part = config.get("text_config", config)
    return part if isinstance(part, dict) else {}


def refuse_long_rows(positions: int | None, sequence_length: int, setting: str, remedy: str = "lower it") -> None:
    """Refuse rows longer than the ``positions`` that a model has; None = any number."""
    if positions is not None and sequence_length > positions:
        raise UserError(f"{setting}: {sequence_length} is more than the {positions} positions of the model; {remedy}")


def check_config(folder: Path) -> None:
    """Refuse an adapter, and a folder without config.json, or with one that can describe no causal language model."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder}: is a LoRA adapter ({ADAPTER_CONFIG}), not a complete model; merge it into its base with peft "
            "(merge_and_unload, then save_pretrained), and give the merged folder"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: config.json is missing, so this is not a Hugging Face checkpoint; give "
            + (model_within(folder) or "a folder with config.json")
        )
    for file in folder.iterdir():
        refuse_endless(file)
        if file.name in TOKENIZER_FILES:
            _refuse_pointer(file)
        if file.suffix == ".jinja" and file.is_file() and file.stat().st_size > LONGEST_TEMPLATE:
            raise UserError(f"{file}: has {file.stat().st_size:,} bytes, which take minutes to read; {DOWNLOAD_AGAIN}")
    config = json_or_empty(folder / "config.json")
    _check_numbers(folder, text_part(config))
    _check_classes(folder, config)


def _check_numbers(folder: Path, text: Mapping[str, Any]) -> None:
    """Refuse numbers, tokens and sizes that no model can have; ``text`` describes the text decoder."""
    for file in ("config.json", WRITING):
        whole = json_or_empty(folder / file)
        said = text_part(whole)
        for section in (whole, said, *ropes(whole), *ropes(said)):
            if name := wrong_number(section) or (section is said and wrong_token(said, text.get("vocab_size"))):
                raise UserError(f"{folder}: {file} has {name}: {section[name]!r}; correct it, or {DOWNLOAD_AGAIN}")
    has_head_size = any(text[key] and re.search("head_dim|head_size|kv_channels|d_kv", key) for key in text)
    for name, other in DIVIDE[: 2 - has_head_size]:
        part, whole = text.get(name), text.get(other)
        if type(part) is int and type(whole) is int and whole % part:
            problem = f"{name}: {part}, which does not divide {other}: {whole}"
            raise UserError(f"{folder}: config.json has {problem}; correct it, or {DOWNLOAD_AGAIN}")


def _check_classes(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse the class of another kind of model, and a quantisation that is unknown."""
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{folder}: config.json has architectures: {classes!r}; set it to a list with the class's name")
    if classes and classes[0].endswith(NO_DECODERS):
        raise UserError(f"{folder}: {classes[0]} {NOT_CAUSAL}")
    how, methods = config.get("quantization_config"), names("transformers", *METHODS)
    named = how if isinstance(how, dict) and not any(key.startswith("load_in") for key in how) else None
    if named is not None and methods and named.get("quant_method") not in methods:  # which would be passed over
        told = f"quant_method {named.get('quant_method')!r} is unknown to this version of transformers"
        raise UserError(f"{folder}: {told}; correct it in config.json, or upgrade transformers")


def ropes(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a part of config.json says of rotary positions, of all layers or of each kind."""
    said = (rope for rope in map(section.get, ("rope_parameters", "rope_scaling")) if isinstance(rope, dict))
    return [each for rope in said for each in (rope, *rope.values()) if isinstance(each, dict)]


def wrong_number(section: Mapping[str, Any]) -> str | None:
    """Which key of a part of config.json or generation_config.json has a number that no model has, or none."""
    for name, most in MOST.items():
        number = section.get(name)  # some families have a list, one for each layer
        is_half = isinstance(number, float) and type(most) is int and most > 1
        is_below = isinstance(number, int | float) and not (0 < number <= most or (number == 0 and name in MAY_BE_0))
        if isinstance(number, str | bool) or is_half or is_below:
            return name
    return None


def wrong_token(said: Mapping[str, Any], vocabulary: Any) -> str | None:
    """Which key of ``said`` names a token that is none of the ``vocabulary``, where that is a number; a pad token of -1
    is none. Of the first token a model's own tokenizer decides."""
    most = vocabulary if type(vocabulary) is int else sys.maxsize
    for name, least in _KNOWN["tokens"].items():
        own = said.get(name)
        for token in own if isinstance(own, list | tuple) else [own]:
            if token is not None and not (type(token) is int and (least is None or least <= token < most)):
                return name
    return None


def model_fingerprint(folder: Path) -> str:
    """Content hash of configuration, tokenizer, weights and what makes images into inputs, whatever the folder and
    however the weights are split.

    A tensor of up to 256 KiB is hashed whole, any other by four evenly spaced blocks of 64 KiB: seconds for any size,
    and a training step, a requantisation or other weights show.
    """
    digest = hashlib.sha256()
    config = json_or_empty(folder / "config.json")
    for volatile in ("_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(tokenizer_fingerprint(folder).encode())
    for file in sorted(file for pattern in PROCESSOR for file in folder.glob(pattern)):
        digest.update(file.name.encode() + file.read_bytes())
    if "auto_map" in config or "auto_map" in json_or_empty(folder / "tokenizer_config.json"):  # code of its own
        for file in sorted(folder.glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    stored = {name: (file, own) for file in weight_files(folder) for name, own in read_header(file).tensors.items()}
    for name in sorted(stored):
        digest.update(name.encode() + _sample(*stored[name]))
    return digest.hexdigest()[:16]


def writing_settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of how a model writes (where a text ends, penalties, sampling) and config.json
    does not say too."""
    settings, config = (json_or_empty(folder / name) for name in (WRITING, "config.json"))
    own = settings.keys() - {"transformers_version", "_from_model_config", "use_cache"}
    own -= {key for key in own if key.startswith("output_") or config.get(key) == settings[key]}
    return {key: settings[key] for key in sorted(own)}


def _sample(file: Path, tensor: StoredTensor) -> bytes:
    """Hash of a tensor in a safetensors file."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    with file.open("rb") as handle:
        for offset, size in sampled_ranges(tensor.start, tensor.end):
            handle.seek(offset)
            digest.update(handle.read(size))
    return digest.digest()


def sampled_ranges(start: int, end: int) -> list[tuple[int, int]]:
    """(offset, size) of what stands for the bytes ``start`` to ``end``: all of 256 KiB, else four blocks of 64 KiB."""
    if end - start > 4 * SAMPLE_BYTES:
        return [(start + (end - SAMPLE_BYTES - start) * quarter // 3, SAMPLE_BYTES) for quarter in range(4)]
    return [(offset, min(SAMPLE_BYTES, end - offset)) for offset in range(start, end, SAMPLE_BYTES)]


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer lies there."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_PATTERNS)


def refuse_no_tokenizer(folder: Path) -> None:
    """Refuse a folder in which no file of a tokenizer lies."""
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: {NO_TOKENIZER.format('FileNotFoundError: the tokenizer files are missing')}")


def tokenizer_fingerprint(folder: Path) -> str:
    """Content hash of the tokenizer's vocabulary, rules and chat template."""
    digest = hashlib.sha256()
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if TOKENIZER_FILES[0] not in names:  # which has all of it
        others = {file.name for pattern in OTHER_VOCABULARIES for file in folder.glob(pattern)}
        names += sorted(others - {*names})
    for name in names:
        digest.update(name.encode() + (folder / name).read_bytes())
    settings = json_or_empty(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    chat = read_text(template) if template.is_file() else settings.get("chat_template")
    own = {key: value for key in TOKENIZER_SETTINGS if (value := settings.get(key))}
    tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in own.items()}
    digest.update(json.dumps([tokens, chat], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def copy_beside(source: Path, folder: Path, patterns: Iterable[str] = (*WITH_TOKENIZER, *WITH_MODEL)) -> None:
    """Copy into ``folder`` what lies beside the weights in ``source`` under these names, byte for byte, and of folders
    the files. Permissions stay behind: a read-only source must not make a read-only copy."""
    for entry in (entry for pattern in patterns for entry in sorted(source.glob(pattern))):
        if entry.is_dir():
            (folder / entry.name).mkdir(exist_ok=True)
            copy_beside(entry, folder / entry.name, ("*",))
        else:
            shutil.copyfile(entry, folder / entry.name)


def json_or_empty(file: Path) -> dict[str, Any]:
    """The content of a settings file of a checkpoint; empty where there is none."""
    return read_json(file, DOWNLOAD_AGAIN)


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as handle:
        if handle.read(100).startswith(b"version https://git-lfs"):
            raise UserError(f"{file}: is a git-lfs pointer; run `git lfs pull` there")


def read_header(file: Path) -> Shard:
    """The header of a safetensors file: every tensor's dtype, shape and place, in bytes.

    Raises:
        UserError: no such file, or one that the library refuses: of another size than its header says, or with a header
            that contradicts itself.
    """
    if not file.is_file():
        raise UserError(f"{file}: is listed in the checkpoint's index but missing; download the checkpoint again")
    _refuse_pointer(file)
    with file.open("rb") as handle:  # first: of one that may not be read the library says that there is none
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file}: is damaged ({error}); {DOWNLOAD_AGAIN}") from error
        (num_bytes,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(num_bytes))
    metadata, begin = header.pop("__metadata__", None) or {}, 8 + num_bytes
    entries = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *(begin + place for place in entry["data_offsets"]))
        for name, entry in header.items()
    }
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    return Shard(file, tensors, metadata)
