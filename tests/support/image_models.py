"""A tiny LLaVA with a tokenizer and a processor, and files of images and questions for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from architectures import CLIP, LLAMA, tiny_model
from PIL import Image
from tiny import VOCAB_SIZE, tiny_tokenizer
from transformers import LlavaProcessor
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
