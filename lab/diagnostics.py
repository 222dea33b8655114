"""How a model uses its depth: what layers write, what they already know, and who reads it later (arXiv:2512.14064):
diagnostics.json.

B batch, S sequence, D hidden, L layers, T = B * S tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.compress.edits.sublayers import probing
from shoal.data.packing import PackedRows
from shoal.data.sources import sources_fingerprint
from shoal.errors import UserError
from shoal.launch.verbs.measure import packed_rows
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import decoder_layers
from shoal.progress import each, progress

from .depth.interventions import MIN_TOKENS, SITES, DepthEffects, cut_positions, measure_effects
from .depth.residual_flow import LayerFlow, ResidualSums, add_batch, layer_flows
from .depth.runs import (
    DepthRuns,
    Readout,
    batches_of_rows,
    documents,
    lens_terms,
    readout_refusal,
    require_finite,
    require_one_path,
    run_body,
    states_at,
)
from .part import identity, made, model_of, told
from .settings import Diagnostics as Settings

log = logging.getLogger(__name__)

KL_SHARE = 0.5
"""Effective depth by KL: the first layer whose input is nearer to the output than this share of the largest KL."""
MIN_OVERLAP = 0.3
"""Effective depth by overlap: the first layer whose input has more of the top-5 tokens than this."""
LENS_TOKENS = 256
"""Tokens for the logit lens, evenly spaced over all; the head costs more than the layers for small models."""
NUM_PROMPTS, PROMPT_TOKENS, NUM_POSITIONS = 10, 64, 4
"""Prompts for the effects on later layers, tokens and cut positions of each."""


def diagnostics(run: Run, settings: Settings) -> Diagnostics:
    """diagnostics.json of the run's model, made where it is not there yet."""
    measure = run.recipe.measure
    sizes = {"num_tokens": measure.num_tokens, "sequence_length": measure.sequence_length}
    return made(
        run,
        Diagnostics,
        identity(run, settings, data=sources_fingerprint(measure.data), **sizes),
        lambda provenance: diagnose(
            model_of(run), packed_rows(run), provenance=provenance, batch_size=measure.batch_size, seed=run.recipe.seed
        ),
    )


def work(run: Run, settings: Settings) -> str:
    """The effective depth, in words."""
    return told(run, diagnostics(run, settings))


@dataclass(frozen=True)
class EffectiveDepth:
    """One rule's last layer of the first phase, 0-based."""

    layer: int | None
    ratio: float | None
    """Depth as a share: (layer + 1) / L."""
    reason: str = ""
    """Reason why there is none; empty = there is one."""


@dataclass(frozen=True)
class Diagnostics(Artifact):
    """diagnostics.json: how a model uses its depth. L layers; curves have one number per layer."""

    FILE: ClassVar[str] = "diagnostics.json"

    num_layers: int
    num_tokens: int
    """Real tokens in the means of ``cosines`` and ``sizes``."""
    cosines: dict[str, tuple[float, ...]]
    """Mean cosine of what layer, attention or mlp writes and what it has read. Negative = erases, near 0 =
    new features, positive = amplifies."""
    sizes: dict[str, tuple[float, ...]]
    """Mean size of what is written over the size of what was read, by the same names."""
    parallel: tuple[bool, ...]
    """Whether a layer's attention and MLP both read its input; empty = unknown, see ``halves_refusal``."""
    halves_refusal: str
    """Reason why there are no curves of attention and MLP; empty = there are."""
    lens_tokens: int
    lens_kl: tuple[float, ...]
    """Mean KL(p_l || p_final) in nats of what the head makes of layer l's input."""
    lens_overlap: tuple[float, ...]
    """Mean share of the top-5 tokens in common with the output's."""
    lens_refusal: str
    """Reason why states cannot be read through the head (no lens, no effect on the output)."""
    num_cuts: int
    """Number of prompts times cut positions, over which the effects are the largest."""
    skip_effect: tuple[tuple[float, ...], ...]
    """Effect [s][l]: relative change of later layer l's update from the cut on, when layer s is skipped at the
    tokens before it; 0 where l <= s."""
    skip_output: tuple[float, ...]
    """Euclidean distance of the next-token probabilities, by skipped layer."""
    erasure_output: tuple[float, ...]
    """Change of the next-token probabilities behind a token whose state before layer l became the mean state."""
    effects_refusal: str
    """Reason why there are no effects."""
    effective_depth: dict[str, EffectiveDepth]
    """Effective depth by rule: cosine, kl, overlap."""

    def in_words(self) -> str:
        """A few lines for the log."""
        lines = [f"depth of {self.num_layers} layers over {self.num_tokens:,} tokens"]
        for rule, depth in self.effective_depth.items():
            place = f"layer {depth.layer} ({depth.ratio:.0%})" if depth.ratio is not None else f"none: {depth.reason}"
            lines.append(f"  effective depth by {rule}: {place}")
        for subject, reason in (
            ("attention and MLP", self.halves_refusal),
            ("the lens", self.lens_refusal),
            ("effects on later layers", self.effects_refusal),
        ):
            if reason:
                lines.append(f"  nothing about {subject}: {reason}")
        return "\n".join(lines)


def diagnose(
    model: PreTrainedModel, rows: PackedRows, *, provenance: Provenance, batch_size: int, seed: int = 0
) -> Diagnostics:
    """How ``model`` uses its depth over ``rows``; effects look at single documents of them.

    Cost, in tokens through the whole body: the rows once; for L layers and C = prompts x positions cuts of at most S
    tokens, C*S*L for skips and erasures together (each runs the upper part only) and as many tokens through the head.
    The lens takes LENS_TOKENS * (L + 1) tokens through the head. Held in memory: the states of one batch before all
    layers, and of L variants at its tokens.

    Raises:
        UserError: no token, no prompt long enough, states that are not finite, or a model in which depth is not one
            path through every layer.
    """
    if not rows.input_ids_NS.numel():
        raise UserError("diagnostics: there is no token to look at; name a data source that holds text")
    require_one_path(model)
    with probing(model):
        lens_refusal = readout_refusal(model)
        readout = None if lens_refusal else Readout(model)
        study = _Study(model, batch_size, seed, *layer_flows(model), readout, lens_refusal)
        sums, lens_LT2 = study.one_pass(rows)
        require_finite(model, "diagnostics", *sums.cosines.values(), *sums.sizes.values(), lens_LT2)
        effects, num_cuts, refusal = study.interventions(rows, sums.state_means)
    cosines = sums.mean(sums.cosines)
    kl, overlap = (tuple(part.mean(1).tolist()) if readout else () for part in lens_LT2.unbind(-1))
    return Diagnostics(
        provenance,
        num_layers=len(decoder_layers(model)),
        num_tokens=sums.num_tokens,
        cosines=cosines,
        sizes=sums.mean(sums.sizes),
        parallel=tuple(flow.parallel for flow in study.flows),
        halves_refusal=study.halves_refusal,
        lens_tokens=lens_LT2.shape[1],
        lens_kl=kl,
        lens_overlap=overlap,
        lens_refusal=study.lens_refusal,
        num_cuts=num_cuts,
        skip_effect=tuple(map(tuple, effects.skip_LL.tolist())) if effects else (),
        skip_output=tuple(effects.skip_output_L.tolist()) if effects and readout else (),
        erasure_output=tuple(effects.erasure_output_L.tolist()) if effects and readout else (),
        effects_refusal=refusal,
        effective_depth=effective_depths(cosines, kl, overlap),
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


@dataclass(frozen=True)
class _Study:
    """One model under study, and what can be told of it."""

    model: PreTrainedModel
    batch_size: int
    seed: int
    flows: tuple[LayerFlow, ...]
    halves_refusal: str
    readout: Readout | None
    lens_refusal: str

    @torch.no_grad()
    def one_pass(self, rows: PackedRows) -> tuple[ResidualSums, Tensor]:
        """Sums over all tokens, and (L, T, 2) divergence and overlap of the tokens that the lens looks at."""
        model, sums, seen = self.model, ResidualSums(), 0
        every = max(1, math.ceil(rows.input_ids_NS.numel() / LENS_TOKENS))
        # begins with an empty (L, 0, 2), so that there is something to join where no lens can be had
        lens: list[Tensor] = [torch.zeros(len(decoder_layers(model)), 0, 2, dtype=torch.float64)]
        for batch in each(batches_of_rows(rows, self.batch_size), "diagnostics: one pass", unit="batches"):
            places_T2 = batch.real_BS.nonzero()  # row and column of every token
            # every n-th token of all batches, so that batches of another size choose the same ones
            chosen_T2 = places_T2[(seen + torch.arange(len(places_T2))) % every == 0].to(model.device)
            seen += len(places_T2)
            with (
                states_at(decoder_layers(model), chosen_T2.unbind(1)) as states,
                add_batch(model, self.flows, batch, sums),
            ):
                run_body(model, batch)
            if self.readout is not None and len(chosen_T2):
                lens.append(torch.stack(lens_terms(self.readout, states), dim=-1))
        return sums, torch.cat(lens, dim=1)

    def interventions(self, rows: PackedRows, means_LD: Tensor) -> tuple[DepthEffects | None, int, str]:
        """Effects, number of cuts, and why there are none."""
        try:
            runs = DepthRuns(self.model)
        except UserError as error:
            return None, 0, str(error)
        prompts = documents(rows, num_prompts=NUM_PROMPTS, max_tokens=PROMPT_TOKENS, min_tokens=MIN_TOKENS)
        if not prompts:
            raise UserError(
                f"diagnostics: no document has {MIN_TOKENS} tokens, so nothing can be skipped before a later token; "
                "name a data source with longer texts, or a longer measure.sequence_length"
            )
        cuts, readout = cut_positions(prompts, NUM_POSITIONS, seed=self.seed), self.readout
        # per batch L - 1 skips, and with a readout L erasures
        num_runs = math.ceil(len(cuts) / self.batch_size) * (runs.num_layers * (1 if readout is None else 2) - 1)
        with progress("diagnostics: skips", total=num_runs, unit="runs") as step:
            effects = measure_effects(runs, readout, cuts, means_LD, batch_size=self.batch_size, progress=step)
        require_finite(self.model, "diagnostics", effects.skip_LL, effects.skip_output_L, effects.erasure_output_L)
        return effects, len(cuts), ""
