"""Tiny models that read images with their processors, and files of images and questions for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import ARCHITECTURES, CLIP, LLAMA, tiny_model
from PIL import Image
from tiny import VOCAB_SIZE, tiny_tokenizer
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def llava_checkpoint(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = None
    settings: dict[str, Any] = {
        "text_config": {**LLAMA, "vocab_size": VOCAB_SIZE},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_config": CLIP,
    }
    tiny_model("llava", **settings).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


CHAT = (
    "{% for turn in messages %}<s>{{ turn.role }}: {% for part in turn.content %}"
    "{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
"""A chat template whose turns end with </s> and a line break; IMAGE is what stands for one."""


def _llava() -> Any:
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        _tokenizer(image_token="<image>"),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next() -> Any:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        _tokenizer(image_token="<image>"),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen() -> Any:
    tokenizer = _tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    processor: Any = object.__new__(Qwen2_5_VLProcessor)  # its constructor wants what reads videos, and torchvision
    processor.image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1024
    )
    processor.tokenizer, processor.video_processor, processor.chat_template = tokenizer, None, None
    for kind in ("image", "video"):
        setattr(processor, f"{kind}_token", f"<|{kind}_pad|>")
        setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    return processor


def _gemma3() -> Any:
    tokenizer = _tokenizer(image_token="<soft>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4
    )
    processor.chat_template = CHAT.replace("IMAGE", "'<start_of_image>'")
    return processor


def _idefics3() -> Any:
    tiles = {f"tile_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}
    tokenizer = _tokenizer(
        image_token="<image>", fake="<fake_token_around_image>", whole="<global-img>", end="<end_of_utterance>", **tiles
    )
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=1)


def _mllama() -> Any:
    image_processor = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    return MllamaProcessor(image_processor, _tokenizer(image_token="<|image|>"))


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llava": (_llava, {}),
    "llava_next": (_llava_next, {"image_grid_pinpoints": PINPOINTS}),
    "qwen2_5_vl": (_qwen, {}),
    "qwen3_vl": (_qwen, {}),
    "gemma3": (_gemma3, {}),
    "idefics3": (_idefics3, {}),
    "mllama": (_mllama, {}),
}
"""Family -> its processor, whose first added token stands for an image, and settings that go with it."""


def image_model(name: str) -> tuple[Any, PreTrainedModel]:
    """A family's processor, and a tiny random model of it."""
    make, settings = FAMILIES[name]
    processor, own = make(), ARCHITECTURES[name].settings
    image_token = "image_token_id" if "image_token_id" in own else "image_token_index"
    text = {**own.get("text_config", {}), "vocab_size": VOCAB_SIZE}
    token = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.image_token)
    model = tiny_model(name, **settings, text_config=text, **{image_token: token})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if not parameter.any():  # Gemma 3's projector begins with zeros, through which no image is seen
                parameter.normal_(std=0.1)
    return processor, model


def _tokenizer(**named: str) -> Any:
    """The tiny tokenizer with these tokens more."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens([*named.values()], special_tokens=True)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, extra_special_tokens=named, **ends)


def image_rows(folder: Path, num_rows: int = 3) -> Path:
    """A file of rows that name images in a folder beside it."""
    (folder / "pictures").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        pixels = generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
        prompt, answer = f"what is {number}?", f" it is {number * 7}"
        rows.append({"image": f"pictures/{number}.png", "prompt": prompt, "answer": answer})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
