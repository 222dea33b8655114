"""What becomes of the output, and of later layers, when something along the depth is changed: a layer skipped, a state
erased at earlier tokens, or the output of a layer or half moved towards its mean (integrated gradients: how much each
token's output contributes to the probability of the answer).

R rows (a prompt with one cut position each), N steps on the path, S sequence, D hidden, V vocabulary, A answer tokens,
L layers, T chosen tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.compress.edits.sublayers import Sublayers, takes_residual
from shoal.compress.variants.layerwise import Call
from shoal.models.anatomy import state_of, with_state

from .residual_flow import MIN_NORM
from .runs import DepthRuns, Intact, Prompt, Readout, TokenBatch, batch_of_prompts, output_changes

SITES = ("layer", "attention", "mlp")
POSITION_STEP = 8
"""Cut positions are multiples of this."""
MIN_TOKENS = POSITION_STEP + 2
"""A shorter prompt has no position with a token before and behind it."""


@dataclass
class DepthEffects:
    """Largest effects over prompts and cut positions."""

    skip_LL: Tensor
    """[s, l]: relative change of layer l's update at tokens from the cut on, when layer s is skipped before it."""
    skip_output_L: Tensor
    """Change of the next-token probabilities from the cut on; 0 for the last layer, behind which nothing mixes."""
    erasure_output_L: Tensor
    """Change of the next-token probabilities behind the one token whose state before layer l is erased."""


@dataclass(frozen=True)
class _Rows:
    """Prompts cut at one position each."""

    batch: TokenBatch
    intact: Intact
    before_RS: Tensor
    """Tokens 1 to t - 1; the first token is never touched."""
    at_RS: Tensor
    """Token t."""
    from_RS: Tensor
    """Real tokens from t on."""


def cut_positions(prompts: Sequence[Prompt], num_positions: int, *, seed: int) -> list[tuple[Prompt, int]]:
    """Every prompt with up to ``num_positions`` cuts t, drawn from 8, 16, ... so that a token lies behind each."""
    drawn = random.Random(seed)
    cuts = []
    for prompt in prompts:
        candidates = range(POSITION_STEP, len(prompt.input_ids) - 1, POSITION_STEP)
        chosen = sorted(drawn.sample(candidates, min(num_positions, len(candidates))))
        cuts += [(prompt, position) for position in chosen]
    return cuts


@torch.no_grad()
def measure_effects(
    runs: DepthRuns,
    readout: Readout | None,
    cuts: Sequence[tuple[Prompt, int]],
    means_LD: Tensor,
    *,
    batch_size: int,
    progress: Callable[[], object],
) -> DepthEffects:
    """The largest effects over ``cuts``; without a readout only those on later layers, and 0 for those on the output.

    ``means_LD`` is what an erased state becomes: the mean state before every layer. Skipping layer s at tokens 1 to
    t - 1 leaves its other outputs as they are, so the run starts behind s with its input in the place of its output.
    ``progress`` is called once per run.
    """
    num_layers = runs.num_layers
    shapes = ((num_layers, num_layers), num_layers, num_layers)
    effects = DepthEffects(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    cuts = sorted(cuts, key=lambda cut: len(cut[0].input_ids))  # little padding
    for start in range(0, len(cuts), batch_size):
        rows = _rows(runs, cuts[start : start + batch_size])
        # not the last layer: nothing behind it mixes tokens, so later ones never see that it was skipped
        skipped = [_skip(runs, rows, layer, effects.skip_LL[layer], progress) for layer in range(num_layers - 1)]
        final_TD = rows.intact.states[-1][rows.from_RS]
        if readout is None:
            continue
        behind_T = (rows.from_RS & ~rows.at_RS)[rows.from_RS].cpu()  # of the tokens in final_TD, those after the cut
        erased = [_erase(runs, rows, layer, means_LD[layer], progress) for layer in range(num_layers)]
        changes = output_changes(readout, final_TD, [*skipped, *erased])
        _keep_largest(effects.skip_output_L[:-1], changes[: num_layers - 1])
        _keep_largest(effects.erasure_output_L, changes[num_layers - 1 :][:, behind_T])
    return effects


def _rows(runs: DepthRuns, cuts: Sequence[tuple[Prompt, int]]) -> _Rows:
    batch = batch_of_prompts([prompt for prompt, _ in cuts])
    cut_R1 = torch.tensor([[position] for _, position in cuts])
    index_S = torch.arange(batch.real_BS.shape[1])
    masks = ((index_S >= 1) & (index_S < cut_R1), index_S == cut_R1, (index_S >= cut_R1) & batch.real_BS)
    return _Rows(batch, runs.intact(batch), *(mask.to(runs.model.device) for mask in masks))


def _skip(runs: DepthRuns, rows: _Rows, layer: int, largest_L: Tensor, progress: Callable[[], object]) -> Tensor:
    """Adds to ``largest_L``; returns the last layer's output at the tokens from the cut on, (T, D)."""
    states = rows.intact.states
    # what leaves the skipped layer: its input at tokens before the cut, its real output elsewhere
    entering_RSD = torch.where(rows.before_RS[..., None], states[layer], states[layer + 1])

    def compare(later: int, before_RSD: Tensor, after_RSD: Tensor) -> None:
        intact_TD = _update(states[later], states[later + 1], rows.from_RS)
        change_T = (_update(before_RSD, after_RSD, rows.from_RS) - intact_TD).norm(dim=-1)
        relative_T = change_T / intact_TD.norm(dim=-1).clamp_min(MIN_NORM)
        _keep_largest(largest_L[later], relative_T.cpu().double())

    final_RSD = runs.run_from(layer + 1, entering_RSD, rows.intact.calls, compare)
    progress()
    return final_RSD[rows.from_RS]


def _erase(runs: DepthRuns, rows: _Rows, layer: int, mean_D: Tensor, progress: Callable[[], object]) -> Tensor:
    state_RSD = rows.intact.states[layer]
    entering_RSD = torch.where(rows.at_RS[..., None], mean_D.to(state_RSD), state_RSD)
    final_RSD = runs.run_from(layer, entering_RSD, rows.intact.calls)
    progress()
    return final_RSD[rows.from_RS]


def _update(before_RSD: Tensor, after_RSD: Tensor, chosen_RS: Tensor) -> Tensor:
    return after_RSD[chosen_RS].float() - before_RSD[chosen_RS].float()


def _keep_largest(largest: Tensor, candidates: Tensor) -> None:
    """Over the last dimension; not a number stays not a number."""
    largest.copy_(torch.maximum(largest, candidates.amax(-1)))


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients of one prompt at one site of every layer."""

    site: str
    """Part whose output it is: layer, attention or mlp."""
    input_ids: tuple[int, ...]
    num_answer: int
    gradients: tuple[tuple[float, ...], ...]
    """Gradients by layer and token; a row adds up to ``change`` as steps grow (completeness)."""
    change: tuple[float, ...]
    """F(x) - F(x0) by layer: F is the sum of the answer tokens' probabilities, x the intact output, x0 its mean over
    the sequence at every token."""


def single_module(halves: Sublayers, layer: nn.Module, site: str) -> str:
    """The one module of ``layer`` whose output is the half ``site``; empty where there is none.

    A module that returns the whole stream with the half added has no output of its own.
    """
    names = getattr(halves, site)
    if len(names) != 1 or takes_residual(layer.get_submodule(names[0])):
        return ""
    return names[0]


def integrated_gradients(
    runs: DepthRuns,
    readout: Readout,
    prompt: Prompt,
    place: tuple[str, tuple[str, ...]],
    *,
    steps: int,
    batch_size: int,
    progress: Callable[[], object],
) -> Attribution:
    """The left Riemann sum over ``steps`` points from the baseline to the output, ``batch_size`` points at a time.

    Sundararajan et al. 2017, arXiv:1703.01365, with the baseline and the F of arXiv:2512.14064. ``place`` is the
    site and every layer's module for a half; for whole layers they are not read. ``progress`` is called once per layer.
    """
    (site, modules), batch = place, batch_of_prompts([prompt])
    gradients, change = [], []
    with torch.no_grad():
        intact = runs.intact(batch)
    calls_of: dict[int, tuple[Call, ...]] = {}
    for layer in range(runs.num_layers):
        probability = _Probability(runs, readout, prompt, layer, site, modules[layer], intact, calls_of)
        output_SD = probability.output()
        baseline_SD = output_SD.mean(0, keepdim=True).expand_as(output_SD)
        total_SD = torch.zeros(output_SD.shape, dtype=torch.float64, device=output_SD.device)
        # the left sum: points 0, 1/N, ... (N-1)/N of the way, N steps in all
        for first in range(0, steps, batch_size):
            share_N = torch.arange(first, min(first + batch_size, steps), device=output_SD.device) / steps
            total_SD += probability.gradient(baseline_SD + share_N[:, None, None] * (output_SD - baseline_SD))
        gradients.append(((output_SD - baseline_SD).double() * total_SD / steps).sum(-1).cpu())
        # F(output) - F(baseline), which the contributions of all tokens add up to if the steps are fine enough
        ends_2 = probability(torch.stack([output_SD, baseline_SD]))
        change.append(float(ends_2[0] - ends_2[1]))
        progress()
    rows = tuple(tuple(row.tolist()) for row in gradients)
    return Attribution(site, prompt.input_ids, prompt.num_answer, rows, tuple(change))


@dataclass
class _Probability:
    """F as a function of one layer's (or half's) output over the prompt."""

    runs: DepthRuns
    readout: Readout
    prompt: Prompt
    layer: int
    site: str
    module: str
    intact: Intact
    calls_of: dict[int, tuple[Call, ...]]
    """Number of rows -> calls of all layers: masks and positions have as many."""

    def output(self) -> Tensor:
        """The intact output, (S, D) in float32."""
        if self.site == "layer":
            return self.intact.states[self.layer + 1][0].float()
        caught: list[Tensor] = []
        layer = self.runs.layerwise.layers[self.layer]
        with layer.get_submodule(self.module).register_forward_hook(
            lambda *hook_args: caught.append(state_of(hook_args[-1]))
        ):
            self.runs.layerwise.run(self.layer, self.intact.states[self.layer], self.intact.calls[self.layer])
        length = len(self.prompt.input_ids)
        return caught[0].reshape(length, -1).float()

    def gradient(self, points_NSD: Tensor) -> Tensor:
        """(S, D) Sum over the points of dF/dx, float64."""
        points_NSD = points_NSD.detach().requires_grad_()
        with torch.enable_grad():
            answers_NAD = self._answer_states(points_NSD)
            # dF/dx = dF/da * da/dx: first through the head to the answers' states a, part by part, so that logits of
            # few rows exist at a time; then once through the layers
            leaves = [part.detach().requires_grad_() for part in self._parts(answers_NAD)]
            slopes = [torch.autograd.grad(self._probabilities(leaf).sum(), leaf)[0] for leaf in leaves]
            (gradient_NSD,) = torch.autograd.grad(answers_NAD, points_NSD, torch.cat(slopes))
        return gradient_NSD.sum(0, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, points_NSD: Tensor) -> Tensor:
        """(N,) F with each of the points as the output."""
        return torch.cat([self._probabilities(part) for part in self._parts(self._answer_states(points_NSD))])

    def _answer_states(self, points_NSD: Tensor) -> Tensor:
        """(N, A, D) The states from which the answer's tokens are predicted."""
        rows = len(points_NSD)
        if rows not in self.calls_of:
            self.calls_of[rows] = self.runs.calls(batch_of_prompts([self.prompt] * rows))
        calls, outputs_NSD = self.calls_of[rows], points_NSD.to(self.runs.model.dtype)
        if self.site == "layer":
            final_NSD = self.runs.run_from(self.layer + 1, outputs_NSD, calls)
        else:
            # the layer runs on its intact input, and the hook puts the points in the place of the half's output
            entering_NSD = self.intact.states[self.layer].expand(rows, -1, -1)
            module = self.runs.layerwise.layers[self.layer].get_submodule(self.module)
            with module.register_forward_hook(
                # a copy goes in: some layers add to it in place
                lambda _, __, output: with_state(output, outputs_NSD.reshape(state_of(output).shape).clone())
            ):
                final_NSD = self.runs.run_from(self.layer, entering_NSD, calls)
        return final_NSD[:, -self.prompt.num_answer - 1 : -1]  # each predicts the token after it

    def _parts(self, answers_NAD: Tensor) -> tuple[Tensor, ...]:
        entries = self.prompt.num_answer * self.readout.vocab_size
        return answers_NAD.split(max(1, self.readout.max_logits // entries))

    def _probabilities(self, answers_NAD: Tensor) -> Tensor:
        """(N,) Sum over the answer of each token's probability."""
        answer_A = torch.tensor(self.prompt.input_ids[-self.prompt.num_answer :], device=answers_NAD.device)
        log_NAV = self.readout(answers_NAD).log_softmax(-1)
        return log_NAV.gather(-1, answer_A.expand(len(log_NAV), -1)[..., None]).exp().sum((1, 2))
