"""How a model uses its depth: what layers write, what they already know, and who reads it later (arXiv:2512.14064).

B batch, S sequence, D hidden, L layers, T = B * S tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.depth import Attribution, Diagnostics, EffectiveDepth
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.progress import each, progress

from ..edits.sublayers import probing, sublayers
from .effects import MIN_TOKENS, DepthEffects, cut_positions, measure_effects
from .logit_lens import lens_terms
from .path_gradients import SITES, integrated_gradients, single_module
from .residual_flow import LayerFlow, ResidualSums, add_batch, layer_flows
from .runs import (
    DepthRuns,
    Prompt,
    Readout,
    TokenBatch,
    batch_of_prompts,
    batches_of_rows,
    documents,
    readout_refusal,
    require_one_path,
    run_body,
    states_at,
)

log = logging.getLogger(__name__)

KL_SHARE = 0.5
"""Effective depth by KL: the first layer whose input is nearer to the output than this share of the largest KL."""
MIN_OVERLAP = 0.3
"""Effective depth by overlap: the first layer whose input has more of the top-5 tokens than this."""


@dataclass(frozen=True)
class Effort:
    """How much of the text each diagnosis looks at."""

    lens_tokens: int = 256
    """Tokens for the logit lens, evenly spaced over all; the head costs more than the layers for small models."""
    num_prompts: int = 10
    """Prompts for the effects on later layers; 0 = none, nor for integrated gradients."""
    prompt_tokens: int = 64
    """Tokens of each prompt."""
    num_positions: int = 4
    """Cut positions in each prompt."""
    gradient_prompts: int = 0
    """Prompts that integrated gradients look at; they cost more than everything else together."""
    gradient_tokens: int = 32
    gradient_sites: tuple[str, ...] = SITES
    steps: int = 256
    """Points on the path from the baseline."""
    answer_tokens: int = 8
    """Last tokens that count as the answer, where prompts are documents."""


def diagnose(
    model: PreTrainedModel,
    rows: PackedRows | Sequence[Prompt],
    *,
    provenance: Provenance,
    batch_size: int,
    prompts: Sequence[Prompt] = (),
    effort: Effort | None = None,
    seed: int = 0,
    attention_mask_NS: Tensor | None = None,
) -> Diagnostics:
    """How ``model`` uses its depth over ``rows``; effects and gradients look at ``prompts``, else at documents of the
    rows.

    Cost, in tokens through the whole body: the rows once; for L layers and C = prompts x positions cuts of at most S
    tokens, C*S*L for skips and erasures together (each runs the upper part only) and as many tokens through the head;
    for integrated gradients about 1.5 * steps * S * L for every prompt and site. The lens takes lens_tokens * (L + 1)
    tokens through the head. Held in memory: the states of one batch before all layers, and of L variants at its tokens.
    Ranks do not share the work; let one do it.

    Raises:
        UserError: no token, no prompt long enough, states that are not finite, or a model in which depth is not one
            path through every layer.
    """
    effort = effort or Effort()
    batches = _batches(rows, batch_size, attention_mask_NS)
    num_tokens = sum(int(batch.real_BS.sum()) for batch in batches)
    if num_tokens == 0:
        raise UserError("diagnostics: there is no token to look at; name a data source that holds text")
    require_one_path(model)
    chosen = _prompts(rows, prompts, effort)
    log.info("diagnostics: %s tokens once through all layers; %s", f"{num_tokens:,}", _cost(model, chosen, effort))
    with probing(model):
        flows, halves_refusal = layer_flows(model)
        lens_refusal = readout_refusal(model)
        readout = None if lens_refusal else Readout(model)
        sums, lens_LT2 = _one_pass(model, readout, batches, flows, num_tokens, effort.lens_tokens)
        _require_finite(model, *sums.cosines.values(), *sums.sizes.values(), lens_LT2)
        assert sums.states_LD is not None
        means_LD = sums.states_LD / num_tokens  # what an erased state becomes
        effects, attributions, num_cuts, refusal = _interventions(
            model, readout, chosen, means_LD, flows, effort, batch_size, seed
        )
    cosines, (kl, overlap) = sums.mean(sums.cosines), (tuple(part.mean(1).tolist()) for part in lens_LT2.unbind(-1))
    return Diagnostics(
        provenance,
        num_layers=len(decoder_layers(model)),
        num_tokens=num_tokens,
        cosines=cosines,
        sizes=sums.mean(sums.sizes),
        parallel=tuple(flow.parallel for flow in flows),
        halves_refusal=halves_refusal,
        lens_tokens=lens_LT2.shape[1],
        lens_kl=kl if readout else (),
        lens_overlap=overlap if readout else (),
        lens_refusal=lens_refusal,
        num_cuts=num_cuts,
        skip_effect=tuple(map(tuple, effects.skip_LL.tolist())) if effects else (),
        skip_output=tuple(effects.skip_output_L.tolist()) if effects and readout else (),
        erasure_output=tuple(effects.erasure_output_L.tolist()) if effects and readout else (),
        effects_refusal=refusal,
        gradient_steps=effort.steps if attributions else 0,
        attributions=attributions,
        effective_depth=effective_depths(cosines, kl if readout else (), overlap if readout else ()),
    )


def effective_depths(
    cosines: dict[str, tuple[float, ...]], kl: Sequence[float], overlap: Sequence[float]
) -> dict[str, EffectiveDepth]:
    """The layer at which the model turns from collecting to deciding, by the three rules of arXiv:2512.14064.

    cosine: the last l at which the mean of the three curves is negative and no longer at l + 1; kl: the first l whose
    divergence is below half the largest; overlap: the first l whose overlap exceeds 0.3. Curves that are empty give
    none.
    """
    depths: dict[str, EffectiveDepth] = {}
    if missing := {"layer", "attention", "mlp"} - cosines.keys():
        depths["cosine"] = EffectiveDepth(None, None, f"needs the curves of {' and '.join(sorted(missing))}")
    else:
        mean = [sum(values) / 3 for values in zip(*(cosines[name] for name in SITES), strict=True)]
        turns = [layer for layer, (cosine, following) in enumerate(itertools.pairwise(mean)) if cosine < 0 <= following]
        depths["cosine"] = _depth(turns[-1:], len(mean), "the mean cosine never turns from negative to positive")
    for name, values, reached, reason in (
        ("kl", kl, lambda value: value < KL_SHARE * max(kl), "no divergence is below half the largest"),
        ("overlap", overlap, lambda value: value > MIN_OVERLAP, f"no overlap exceeds {MIN_OVERLAP}"),
    ):
        layers = [layer for layer, value in enumerate(values) if reached(value)]
        depths[name] = _depth(layers[:1], len(values), reason if values else "needs the logit lens")
    return depths


def _depth(layers: Sequence[int], num_layers: int, reason: str) -> EffectiveDepth:
    return EffectiveDepth(layers[0], (layers[0] + 1) / num_layers) if layers else EffectiveDepth(None, None, reason)


def _batches(rows: PackedRows | Sequence[Prompt], batch_size: int, mask_NS: Tensor | None) -> list[TokenBatch]:
    if isinstance(rows, PackedRows):
        return batches_of_rows(rows, batch_size, mask_NS) if len(rows) else []
    non_empty = [prompt for prompt in rows if prompt.input_ids]
    return [batch_of_prompts(non_empty[start : start + batch_size]) for start in range(0, len(non_empty), batch_size)]


def _prompts(rows: PackedRows | Sequence[Prompt], prompts: Sequence[Prompt], effort: Effort) -> list[Prompt]:
    if not prompts and isinstance(rows, PackedRows):
        return documents(
            rows,
            num_prompts=effort.num_prompts,
            max_tokens=effort.prompt_tokens,
            min_tokens=max(MIN_TOKENS, effort.answer_tokens + 1),
            num_answer=effort.answer_tokens,
        )
    candidates = prompts or (() if isinstance(rows, PackedRows) else rows)
    for number, prompt in enumerate(candidates):
        if not 0 < prompt.num_answer < len(prompt.input_ids):
            raise UserError(
                f"diagnostics: prompt {number}: has {len(prompt.input_ids)} tokens of which {prompt.num_answer} are "
                "the answer; leave at least one for each"
            )
    return [prompt for prompt in candidates if len(prompt.input_ids) >= MIN_TOKENS][: effort.num_prompts]


def _cost(model: PreTrainedModel, prompts: Sequence[Prompt], effort: Effort) -> str:
    """Cost of the runs beside the one pass, in words."""
    num_layers, tokens = len(decoder_layers(model)), sum(len(prompt.input_ids) for prompt in prompts)
    effects = effort.num_positions * tokens * num_layers
    paths = min(effort.gradient_prompts, len(prompts)) * len(effort.gradient_sites)
    gradients = round(1.5 * effort.steps * effort.gradient_tokens * num_layers * paths)
    return f"effects cost about as much as {effects:,} tokens more, integrated gradients {gradients:,}"


@torch.no_grad()
def _one_pass(
    model: PreTrainedModel,
    readout: Readout | None,
    batches: Sequence[TokenBatch],
    flows: tuple[LayerFlow, ...],
    num_tokens: int,
    lens_tokens: int,
) -> tuple[ResidualSums, Tensor]:
    """Sums over all tokens, and (L, T, 2) divergence and overlap of the tokens that the lens looks at."""
    sums, seen = ResidualSums(), 0
    every = max(1, math.ceil(num_tokens / lens_tokens))
    # begins with an empty (L, 0, 2), so that there is something to join where no lens can be had
    lens: list[Tensor] = [torch.zeros(len(decoder_layers(model)), 0, 2, dtype=torch.float64)]
    for batch in each(batches, "diagnostics: one pass", unit="batches"):
        places_T2 = batch.real_BS.nonzero()  # row and column of every real token
        # every n-th real token of all batches, so that batches of another size choose the same ones
        chosen_T2 = places_T2[(seen + torch.arange(len(places_T2))) % every == 0].to(model.device)
        seen += len(places_T2)
        with states_at(model, *chosen_T2.unbind(1)) as states, add_batch(model, flows, batch, sums):
            run_body(model, batch)
        if readout is not None and len(chosen_T2):
            lens.append(torch.stack(lens_terms(readout, states), dim=-1))
    return sums, torch.cat(lens, dim=1)


def _interventions(
    model: PreTrainedModel,
    readout: Readout | None,
    prompts: list[Prompt],
    means_LD: Tensor,
    flows: tuple[LayerFlow, ...],
    effort: Effort,
    batch_size: int,
    seed: int,
) -> tuple[DepthEffects | None, tuple[Attribution, ...], int, str]:
    """Effects, attributions, number of cuts, and why there are none."""
    if effort.num_prompts == 0:
        return None, (), 0, "not asked for"
    try:
        runs = DepthRuns(model)
    except UserError as error:
        return None, (), 0, str(error)
    if not prompts:
        raise UserError(
            f"diagnostics: no document has {MIN_TOKENS} tokens, so nothing can be skipped before a later token; "
            "name a data source with longer texts, or a longer sequence_length"
        )
    cuts = cut_positions(prompts, effort.num_positions, seed=seed)
    # per batch L - 1 skips, and with a readout L erasures
    num_runs = math.ceil(len(cuts) / batch_size) * (runs.num_layers * (1 if readout is None else 2) - 1)
    with progress("diagnostics: skips", total=num_runs, unit="runs") as step:
        effects = measure_effects(runs, readout, cuts, means_LD, batch_size=batch_size, progress=step)
    _require_finite(model, effects.skip_LL, effects.skip_output_L, effects.erasure_output_L)
    attributions = _attributions(model, runs, readout, prompts, flows, effort, batch_size) if readout else ()
    return effects, attributions, len(cuts), ""


def _attributions(
    model: PreTrainedModel,
    runs: DepthRuns,
    readout: Readout,
    prompts: Sequence[Prompt],
    flows: tuple[LayerFlow, ...],
    effort: Effort,
    batch_size: int,
) -> tuple[Attribution, ...]:
    """Attributions of the first prompts at the sites that every layer has."""
    modules: dict[str, tuple[str, ...]] = {"layer": ("",) * runs.num_layers}
    for site in ("attention", "mlp") if flows else ():
        halves = zip(sublayers(model), decoder_layers(model), strict=True)
        names = tuple(single_module(layer_halves, layer, site) for layer_halves, layer in halves)
        if all(names):
            modules[site] = names
    sites = [site for site in effort.gradient_sites if site in modules]
    chosen = [_shortened(prompt, effort.gradient_tokens) for prompt in prompts[: effort.gradient_prompts]]
    pairs = [(prompt, site) for prompt in chosen for site in sites]
    with progress("diagnostics: gradients", total=len(pairs) * runs.num_layers, unit="layers") as step:
        return tuple(
            integrated_gradients(
                runs,
                readout,
                prompt,
                site,
                modules[site],
                steps=effort.steps,
                batch_size=batch_size,
                progress=step,
            )
            for prompt, site in pairs
        )


def _shortened(prompt: Prompt, max_tokens: int) -> Prompt:
    """The end of the prompt, where the answer is."""
    length = max(max_tokens, prompt.num_answer + 1)
    return Prompt(prompt.input_ids[-length:], prompt.num_answer)


def _require_finite(model: PreTrainedModel, *values: Tensor) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise UserError(
            f"diagnostics: the model's states overflow in {model.dtype}; set dtype: bfloat16 or dtype: float32 in the "
            "recipe"
        )
