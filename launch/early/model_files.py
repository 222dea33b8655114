"""The model's files: whether they are a checkpoint, and have the layers, lengths and sizes that are asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shoal.components import require_layers
from shoal.compress import free_layers
from shoal.errors import UserError
from shoal.model_names import DEMO_PREFIX
from shoal.models import checkpoint_files as files
from shoal.models.looks import PLAIN_WEIGHT, chat_template, refuse_config, refuse_tokenizer, refuse_weights
from shoal.recipe.distill import Recorded
from shoal.recipe.losses import NO_GRADIENT, HiddenStates
from shoal.recipe.prune import CutThese, Target, Width
from shoal.recipe.recipe import Recipe

from .asked import CUT, SCORE, TRAIN, Asked


def refuse_layers(asked: Asked) -> None:
    """Refuse files that are no checkpoint, and layers and lengths that the model does not have."""
    num_layers, prune, distill = asked.number("num_hidden_layers"), asked.recipe.prune, asked.recipe.distill
    target = None if isinstance(prune, CutThese) else prune.target
    lengths = {"measure.sequence_length": asked.recipe.measure.sequence_length} if asked.measures else {}
    if asked.verb in CUT and num_layers is not None:
        free_layers.refuse_impossible_layers(prune, num_layers, target and _goals(asked, target, num_layers))
    for change in prune.changes if asked.verb in CUT else ():
        if isinstance(change, Width):
            change.refuse_more(asked.config)
    if asked.verb in CUT and target is not None and target.sequence_length is not None:
        lengths["prune.target.sequence_length"] = target.sequence_length
    if asked.verb in TRAIN:
        lengths["distill.sequence_length"] = distill.sequence_length
        if isinstance(distill.teacher, Recorded):
            distill.teacher.refuse_all(asked.number("vocab_size"))
        written = [(source.path, source.generate) for source in distill.data if source.generate is not None]
        setting = "data {!r}: generate.prompt_tokens and max_new_tokens together"
        lengths |= {setting.format(path): how.prompt_tokens + how.max_new_tokens for path, how in written}
        terms = (term for term in distill.terms if num_layers and isinstance(term, HiddenStates))
        wrong = [layer for term in terms for layer in term.layers or () if not 0 <= layer < (num_layers or 0)]
        require_layers(wrong, num_layers or -1, "distill.losses: hidden_states: layers")
        _frozen(asked)
    for setting, length in lengths.items():
        files.refuse_long_rows(asked.number("max_position_embeddings"), length, setting)


def _frozen(asked: Asked) -> None:
    """Refuse losses on states and adapters of what is frozen or not there, as far as config.json, the recipe and plain
    names of weights tell."""
    prune, distill, num_layers = asked.recipe.prune, asked.recipe.distill, asked.number("num_hidden_layers")
    terms = [term for term in distill.terms if isinstance(term, HiddenStates)]
    is_untied = asked.config.get("tie_word_embeddings") is False
    if distill.trainable == "norm_and_head" and is_untied and any(term.weight for term in terms):
        raise UserError(NO_GRADIENT)
    if distill.trainable in ("from_first_cut", "near_gaps") and isinstance(prune, CutThese) and not prune.changes:
        lowest, stay = min(prune.drop) - (distill.trainable == "near_gaps"), (num_layers or 0) - len({*prune.drop})
        for term in terms if lowest < stay else ():
            term.refuse_frozen(term.layers or (lowest,), lowest, stay)
    stored = (item for shard in asked.shards for item in shard.tensors.items())
    linear = sorted(name for name, tensor in stored if ".layers." in name and len(tensor.shape) == 2)
    if distill.lora is not None and linear and all(map(PLAIN_WEIGHT.search, linear)):
        distill.lora.chosen([name.removesuffix(".weight") for name in linear])


def _goals(asked: Asked, target: Target, num_layers: int) -> free_layers.Goals | None:
    """What ``target`` asks, as far as the headers of the files tell; None where they do not.

    Of a cache they tell nothing. So memory is that of the weights alone, and a speed-up at most the number of layers to
    those that stay: weights outside of layers lower it, and every layer takes as much time where all are alike.
    """
    sizes = by_layer(asked, num_layers, lambda tensor: math.prod(tensor.shape))
    if not sizes:
        return None
    goals = [] if target.params is None else [free_layers.goal_of_parameters(target.params, sum(sizes), sizes[1:])]
    if not (target.memory_gb or target.speedup):
        return free_layers.goals_asked(goals)
    if target.memory_gb is not None:
        whole, *layers = by_layer(asked, num_layers, lambda tensor: tensor.end - tensor.start)
        words = " for the weights alone"
        goals.append(free_layers.goal_of_memory(target.memory_gb, whole + sum(layers), layers, words))
    kinds = asked.config.get("layer_types") or (["sliding"] if any("sliding" in key for key in asked.config) else [])
    if target.speedup is not None and len({*sizes[1:]}) == 1 and {*kinds} <= {"full_attention"}:
        most, text = math.floor(num_layers / target.speedup), lambda stay: f"{num_layers / stay:.4g} x"
        goals.append(
            free_layers.Goal("speedup", target.speedup, num_layers, most, (1,) * num_layers, text, " at the most")
        )
    return free_layers.Goals(tuple(goals))


def refuse_checkpoint(asked: Asked) -> None:
    """Refuse a model of a family that transformers does not know, weights that are not those of config.json, and a
    damaged tokenizer."""
    config, folder = asked.described
    if asked.recipe.model.startswith(DEMO_PREFIX):
        return
    refuse_config(str(folder or asked.recipe.model), config, trust_remote_code=asked.recipe.trust_remote_code)
    if folder is not None:
        shapes = {name: tensor.shape for shard in asked.shards for name, tensor in shard.tensors.items()}
        refuse_weights(folder, config, shapes)
        chat_template(folder)
        if asked.plain is not None and (asked.measures or asked.verb in (*TRAIN, *SCORE)):
            largest = max((shape[0] for shape in shapes.values() if len(shape) == 2), default=0)
            refuse_tokenizer(asked.plain, largest and max(largest, asked.number("vocab_size") or 0))


def refuse_model(verb: str, recipe: Recipe, name: str, revision: str | None = None) -> None:
    """Refuse a model ``name`` that ``verb`` takes beside that of ``recipe``."""
    refuse_checkpoint(Asked(verb, replace(recipe, model=name, revision=revision)))


def by_layer(asked: Asked, num_layers: int, amount: Callable[[Any], int]) -> list[int]:
    """Sums of ``amount`` over the stored tensors outside the layers, then over those of each layer; empty if names and
    shapes do not tell, or not for certain."""
    stored = [name for shard in asked.shards for name in shard.tensors]
    is_odd = "quantization_config" in asked.config or not all(name.endswith((".weight", ".bias")) for name in stored)
    is_tied = "lm_head.weight" in stored and asked.config.get("tie_word_embeddings") is not False
    return [] if is_odd or is_tied else files.by_layer(asked.shards, num_layers, amount)
