"""Which parameters are trained, and which stay as they are."""

import contextlib
from dataclasses import replace

import architectures
import pytest
import torch
from cut_students import names, plan
from tiny import tiny_model

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import KeptWidth, Plan, PlannedChange
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers
from shoal.train.objective.layer_losses import capturing
from shoal.train.objective.objective import SharedPrefix, final_hidden, output_head
from shoal.train.student.trainable import Trained, parts_of, shares_prefix, train_only, trained_parts

MERGE = PlannedChange("merge", "", (2,), runs=((2, 3),))
SKIP = PlannedChange("skip", "", (1,))
NARROWED = replace(plan(4, 7), width=KeptWidth(num_key_value_heads=1))
SWAP = PlannedChange("swap", "", (0, 4))  # other embeddings than the teacher's


@pytest.mark.parametrize(
    ("trainable", "changes", "layers", "norm", "shared"),
    [
        ("all", plan(4), range(9), True, 0),
        ("layers", plan(4), range(9), True, 0),
        ("from_first_cut", plan(4, 7), range(4, 8), True, 4),
        ("from_first_cut", plan(7, changes=(SKIP,)), range(1, 9), True, 1),
        ("near_gaps", plan(4), (3, 4), False, 3),
        ("near_gaps", plan(3, 4, 7), (2, 3, 4, 5), False, 2),
        ("near_gaps", plan(2, 4, 5), (1, 2, 3), False, 1),
        ("near_gaps", plan(0, 1), (0,), False, 0),
        ("near_gaps", plan(8, 9), (7,), True, 7),
        ("near_gaps", plan(3, changes=(MERGE,)), (2, 3), False, 2),  # the merged layer, and the one above it
        ("near_gaps", plan(7, changes=(SKIP,)), (1, 6, 7), False, 1),
        ("near_gaps", plan(7, changes=(SWAP,)), (0, 4, 6, 7), False, 0),
        ("from_first_cut", NARROWED, range(8), True, 0),
        ("near_gaps", NARROWED, range(8), False, 0),
        ("norm_and_head", NARROWED, (), True, 0),
        ("norm_and_head", plan(4), (), True, 4),
    ],
)
def test_what_is_trained_and_what_runs_once(trainable, changes, layers, norm, shared) -> None:
    trained = trained_parts(trainable, changes)
    assert (trained.layers, trained.norm) == (tuple(layers), norm)
    assert shares_prefix(trained, changes) == shared


def test_a_tied_head_is_trained_with_the_embeddings_and_leaves_no_prefix() -> None:
    trained = trained_parts("norm_and_head", plan(4), tied=True)
    assert trained == Trained((), norm=True, embeddings=True, head=True)
    assert shares_prefix(trained, plan(4)) == 0


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl", "idefics3", "mllama"])
@pytest.mark.parametrize("trainable", ["all", "layers"])
def test_what_turns_an_image_into_tokens_stays_as_it_is(name: str, trainable: str) -> None:
    student = architectures.tiny_model(name)
    train_only(student, parts_of(student, trainable, Plan(Provenance({}), 7, (3,), "as the test wants")))
    moving = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    parts = anatomy(student)
    outside = {name for name in moving if not name.startswith(parts.layers_name.removesuffix("layers"))}
    assert outside == ({"lm_head.weight"} if trainable == "all" else set())
    assert parts.embeddings is not None
    assert parts.final_norm is not None
    assert all(weight.requires_grad for weight in parts.embeddings.parameters()) == (trainable == "all")
    assert all(weight.requires_grad for weight in parts.final_norm.parameters())
    assert sum(name.startswith(parts.layers_name) for name in moving) == len([*parts.layers.parameters()])


def test_what_a_plan_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"from_first_cut .* drops the last layers; choose near_gaps"):
        trained_parts("from_first_cut", plan(8, 9))


def test_parameters_follow_the_choice_whatever_was_chosen_before() -> None:
    student = tiny_model("llama")
    everything = {name for name, _ in student.named_parameters()}
    in_layers = {name for name in everything if ".layers." in name}
    cut = plan(2, num_layers=7)
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    for trainable, expected in (
        ("layers", everything - ends),
        ("norm_and_head", {"model.norm.weight", "lm_head.weight"}),
        ("near_gaps", {name for name in in_layers if name.startswith(("model.layers.1.", "model.layers.2."))}),
        (
            "from_first_cut",
            everything - ends - {n for n in in_layers if n.startswith(("model.layers.0.", "model.layers.1."))},
        ),
        ("all", everything),
    ):
        train_only(student, parts_of(student, trainable, cut))
        assert names(student) == expected, trainable
    tied = tiny_model("llama_tied")
    assert parts_of(tied, "norm_and_head", cut).embeddings
    train_only(tied, parts_of(tied, "norm_and_head", cut))
    assert names(tied) == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize("trainable", ["near_gaps", "norm_and_head"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_shared_prefix_of_each_choice_gives_the_gradients_of_the_unshared_run(trainable, checkpointed) -> None:
    teacher, cut, results = tiny_model("llama", num_hidden_layers=7).requires_grad_(False), plan(3, num_layers=7), []
    ids, positions = torch.arange(20).view(2, 10), torch.arange(10).repeat(2, 1)
    for way in ("unshared", "live", "recorded"):
        student = tiny_model("llama").train()
        for mine, kept in zip(decoder_layers(student), cut.keep, strict=True):
            mine.load_state_dict(decoder_layers(teacher)[kept].state_dict())
        student.get_input_embeddings().load_state_dict(teacher.get_input_embeddings().state_dict())
        trained = parts_of(student, trainable, cut)
        train_only(student, trained)
        if checkpointed:
            student.activation_checkpointing_enable({"use_reentrant": False})
        count = shares_prefix(trained, cut)
        assert count == (2 if trainable == "near_gaps" else 3)
        prefix = SharedPrefix(student, teacher if way == "live" else None, first_change=count)
        replaying = prefix.replaying(torch.float32)
        recording = prefix.recording() if way == "live" else contextlib.nullcontext()
        with torch.no_grad(), recording, capturing(teacher, (count - 1,)) as seen:
            final_hidden(teacher, ids, positions)
        if way == "recorded":
            prefix.take(seen.states[count - 1])
        with contextlib.nullcontext() if way == "unshared" else replaying:
            hidden = final_hidden(student, ids, positions)
        output_head(student)(hidden).square().mean().backward()
        results.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    unshared, *shared = results
    assert unshared.keys() == names(student)
    for found in shared:
        assert found.keys() == unshared.keys()
        assert all(torch.equal(found[name], unshared[name]) for name in found)


@pytest.mark.parametrize("family", ["bloom", "mixtral"])
def test_a_recorded_state_is_gone_on_from_whatever_layers_return(family) -> None:
    """Some families' layers return a tuple, which nothing but running one tells; after that no layer below runs."""
    from architectures import tiny_model as tiny_architecture

    model = tiny_architecture(family)
    layers = decoder_layers(model)
    count = len(layers) - 1
    ids, positions = torch.arange(20).view(2, 10), torch.arange(10).repeat(2, 1)
    with torch.no_grad(), capturing(model, (count - 1,)) as seen:
        expected = final_hidden(model, ids, positions)
    state = seen.states[count - 1].clone()
    prefix = SharedPrefix(model, None, first_change=count)
    calls: list[int] = []
    for index, layer in enumerate(layers[:count]):
        child = next(layer.children())
        child.register_forward_hook(lambda *_, i=index: calls.append(i))
    for _ in range(3):
        prefix.take(state)
        with torch.no_grad(), prefix.replaying(torch.float32):
            # other tokens: what comes out depends on the state alone
            assert torch.equal(final_hidden(model, ids + 1, positions), expected)
    assert calls == [0]
    with torch.no_grad():
        assert torch.equal(final_hidden(model, ids, positions), expected)
    assert calls == [0, *range(count)]
