"""Steps on rows of images: loss and gradients are those of models that transformers runs on the processor's output.

Covers: shoal.data.image_rows.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import FAMILIES, image_model
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.image_rows import ImageReader, RowsWithImages, training_images
from shoal.data.packing import IGNORED, IMAGES, PackedRows
from shoal.data.streams import Layout, pack
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, watched
from shoal.models.load import load_model
from shoal.recipe.distill import TrainingSource
from shoal.recipe.losses import CrossEntropy, ForwardKL, HiddenStates
from shoal.recipe.section import ImageQuestion
from shoal.train.objective.host_batch import on_host, stacked
from shoal.train.objective.layer_losses import StateLosses
from shoal.train.objective.objective import Objective, to_logits
from shoal.train.student.trainable import Trained, train_only
from shoal.train.teacher.signals import LiveTeacher

SIZES = [(40, 30), (30, 70), (64, 64)]
DROP = (2, 3)
LENGTH = 96


def questions(folder: Path) -> TrainingSource:
    """Three rows with images of several sizes."""
    generator = np.random.default_rng(0)
    rows = []
    for number, size in enumerate(SIZES):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"picture": f"{number}.png", "question": f"what is {number}?", "reply": "it is " + "x" * number})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainingSource(
        str(folder / "rows.jsonl"), column=ImageQuestion(prompt="question", completion="reply", image="picture")
    )


def packed(source: TrainingSource, reader: ImageReader, tokenizer: Any, folder: Path) -> PackedRows:
    rows = pack(
        [(source, reader.rows[source])],
        tokenizer,
        sequence_length=LENGTH,
        num_tokens=3 * LENGTH,
        seed=0,
        layout=Layout(folder, encode_image=reader.tokens, rows_per_step=3),
    )
    return RowsWithImages.of(rows, reader)


def plain_inputs(name: str, processor: Any, source: TrainingSource) -> list[tuple[dict[str, Tensor], int]]:
    """What the processor gives for every row by itself, and how many tokens at its end are the answer."""
    found = []
    for line in Path(source.path).read_text().splitlines():
        row = json.loads(line)
        image = Image.open(Path(source.path).parent / row["picture"]).convert("RGB")
        if name == "gemma3":
            prompt = f"<s>user: <start_of_image>{row['question']}</s>\n<s>assistant: "
        else:
            prompt = f"{processor.image_token}{row['question']}"
        starts = {"add_special_tokens": False} if prompt.startswith("<s>") else {}
        text = f"{prompt}{row['reply']}</s>"
        inputs = processor(text=text, images=[image], return_tensors="pt", **starts)
        answer = len(processor.tokenizer(f"{row['reply']}</s>", add_special_tokens=False)["input_ids"])
        found.append(({key: value for key, value in inputs.items() if isinstance(value, Tensor)}, answer))
    return found


def run_plain(model: PreTrainedModel, inputs: dict[str, Tensor], num_answer: int) -> tuple[Tensor, dict[int, Tensor]]:
    """The model's own logits where the next token is an answer's, and every layer's output there."""
    states: dict[int, Tensor] = {}
    places = slice(-num_answer - 1, -1)

    def after(layer: int, args: Any, kwargs: Any, output: Any) -> None:
        states[layer] = (output[0] if isinstance(output, tuple) else output)[0, places]

    own = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with watched(decoder_layers(model), after=after):
        return model(**own, use_cache=False).logits[0, places], states


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_plain_forwards_row_by_row(name: str, tmp_path: Path) -> None:
    processor, whole = image_model(name)
    cut_model(whole, DROP).save_pretrained(tmp_path / "student")
    whole.save_pretrained(tmp_path / "teacher")
    student, teacher = (load_model(tmp_path / role).double() for role in ("student", "teacher"))
    source = questions(tmp_path)
    reader = ImageReader(processor, teacher.config, training_images([source]))
    (tmp_path / "packed").mkdir()
    rows = packed(source, reader, processor.tokenizer, tmp_path / "packed")
    train_only(student, Trained(tuple(range(4)), norm=True, embeddings=True, head=True, rest=True))
    student.train()

    plan = Plan(Provenance({}), 6, DROP, reason="")
    states = StateLosses([HiddenStates(distance="mse")], plan, student, teacher)
    terms = (ForwardKL(), CrossEntropy(weight=0.5), HiddenStates(distance="mse"))
    objective = Objective(student, to_logits(teacher), terms=terms, chunk=7, states=states)
    batch = stacked([rows[row] for row in range(3)])
    lengths = [int((rows.position_ids_NS[row] == 0).nonzero()[-1]) for row in range(3)]
    assert batch["input_ids"].shape[1] == max(lengths) < LENGTH
    assert len({*lengths}) > 1, "padding is what this is about"
    objective.install()
    signals = LiveTeacher(teacher, reads_logits=True, states=states, prefix=None)(batch)
    planes = {plane: batch[plane] for plane in ("input_ids", "position_ids", "labels")}
    loss, sums = student(**planes, signals=signals, on_host=on_host(batch), images=batch[IMAGES])
    objective.uninstall()
    loss.backward()
    found = {key: weight.grad for key, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()

    expected = torch.zeros(3, dtype=torch.float64)
    num_learnt = 0
    for inputs, num_answer in plain_inputs(name, processor, source):
        targets = inputs["input_ids"][0, -num_answer:]
        with torch.no_grad():
            teacher_NV, theirs = run_plain(teacher, inputs, num_answer)
        student_NV, ours = run_plain(student, inputs, num_answer)
        p, q = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
        pairs = {1: 3, 2: 4, 3: 5}
        distances = [
            ((ours[own] - theirs[target]).square().sum(-1) / theirs[target].square().sum(-1)).sum()
            for own, target in pairs.items()
        ]
        expected = expected + torch.stack(
            [(p.exp() * (p - q)).sum(), -q[range(num_answer), targets].sum(), torch.stack(distances).mean()]
        )
        num_learnt += num_answer
    assert int((batch["labels"] != IGNORED).sum()) == num_learnt
    (expected * torch.tensor([1, 0.5, 1])).sum().backward()
    torch.testing.assert_close(sums[:3], expected.detach(), rtol=1e-7, atol=1e-9)
    reference = {key: weight.grad for key, weight in student.named_parameters() if weight.grad is not None}
    assert found.keys() == reference.keys()
    assert not [key for key in found if "vision" in key or "visual" in key or "projector" in key or "connector" in key]
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, reference[key], rtol=1e-5, atol=1e-7, msg=lambda text, key=key: key + text)
    shuffled = {**batch, IMAGES: {**batch[IMAGES], "pixel_values": batch[IMAGES]["pixel_values"].flip(-1)}}
    other = LiveTeacher(teacher, reads_logits=True, states=states, prefix=None)(shuffled)
    assert signals.hidden_BSD is not None
    assert other.hidden_BSD is not None
    assert (signals.hidden_BSD - other.hidden_BSD).abs().max() > 1e-9, "the image counts"


@pytest.fixture(scope="module")
def gemma3() -> tuple[Any, Any]:
    processor, model = image_model("gemma3")
    return processor, model.config


def test_an_answer_ends_as_the_chat_template_ends_it_and_nothing_else_is_learnt(
    gemma3: tuple[Any, Any], tmp_path: Path
) -> None:
    processor, config = gemma3
    source = questions(tmp_path)
    reader = ImageReader(processor, config, training_images([source]))
    ids, learnt = reader.tokens(reader.rows[source][2])
    assert processor.tokenizer.decode(np.array(ids)[learnt]) == "it is xx</s>"
    assert processor.image_token_id not in np.array(ids)[learnt]
    assert processor.image_token_id in ids
    processor.chat_template, kept = processor.chat_template.replace("assistant: ", "helper: "), processor.chat_template
    try:
        with pytest.raises(UserError, match=r"row 2 of .*: the processor's chat template does not write the answer"):
            reader.tokens(reader.rows[source][2])
    finally:
        processor.chat_template = kept
    spoilt = dataclasses.replace(reader.rows[source][0], answer="<soft>")
    with pytest.raises(UserError, match=r"row 0 of .*: the answer holds a token that stands for an image; change"):
        reader.tokens(spoilt)
