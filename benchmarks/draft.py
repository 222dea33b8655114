"""Tokens of a round in speculative decoding: those that `eval.draft` predicts, and those that transformers makes.

    python benchmarks/draft.py OUT [--drop 13 14 21] [--ways greedy sampled] [--drafted 2 4] [--prompts 16]

The demo model without a few of its layers, untrained, drafts for the whole one. The teacher alone goes on from the
beginnings of held-out documents; acceptance is taken of that text, as `shoal eval` does it, and with it tokens per
round, by the formula and counted along the text. Then transformers' assisted generation goes on from the same
beginnings, and its rounds are counted, those left out that the limit of new tokens cut short. What is there is not done
again, so that pieces can be run one by one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from side_by_side import run_shoal, write_recipe
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from shoal.data.sources import load_texts
from shoal.eval.draft import acceptance, overlaps
from shoal.inference.decoder import Decoder
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.recipe.section import DataSource
from shoal.stats.drafting import tokens_per_round
from shoal.stats.paired import bootstrap_mean

MODEL = "demo:smollm2-135m"
PROMPT_TOKENS = 64
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--drop", type=int, nargs="+", default=[13, 14, 21])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--drafted", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    run_dir = arguments.out / f"drop-{'-'.join(map(str, arguments.drop))}"
    if not (run_dir / "student").is_dir():
        settings = {"model": MODEL, "run_dir": str(run_dir), "prune": {"drop": arguments.drop, "proof": "files"}}
        run_shoal("prune", write_recipe(settings))
    teacher, draft = (load_model(folder, dtype="float32") for folder in (resolve_model(MODEL), run_dir / "student"))
    prompts = beginnings(run_dir / "student", arguments.prompts)
    print("| way | g | accepted | by formula | counted | measured |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for way in arguments.ways:
        file = run_dir / f"{way}.json"
        rates = json.loads(file.read_text()) if file.is_file() else predicted(teacher, draft, prompts, way, arguments)
        for g in arguments.drafted:
            if str(g) not in rates["measured"]:
                rates["measured"][str(g)] = measured(teacher, draft, prompts, way, g, arguments.new_tokens)
            file.write_text(json.dumps(rates))
            print(row(way, g, rates), flush=True)
        file.write_text(json.dumps(rates))


def row(way: str, g: int, rates: dict[str, Any]) -> str:
    """What is predicted of rounds of ``g`` drafted tokens, and what was measured."""
    share = rates["share"]
    formula, counted = tokens_per_round(share[0], g), 1 + rates["accepted"][g - 1]
    value, low, high = rates["measured"][str(g)]
    apart = [f"{own:.3f} ({100 * (own / value - 1):+.1f} %)" for own in (formula, counted)]
    accepted = f"{share[0]:.3f} [{share[1]:.3f}, {share[2]:.3f}]"
    return f"| {way} | {g} | {accepted} | {' | '.join(apart)} | {value:.3f} [{low:.3f}, {high:.3f}] |"


def beginnings(folder: Path, count: int) -> torch.Tensor:
    """The first tokens of ``count`` held-out documents."""
    tokenizer: Any = load_tokenizer(folder)
    texts = [tokenizer(text)["input_ids"] for text in load_texts(DataSource("python_docs_heldout"))]
    rows = [ids[start : start + PROMPT_TOKENS] for start in range(0, 4096, 512) for ids in texts]
    return torch.tensor([ids for ids in rows if len(ids) == PROMPT_TOKENS][:count])


def predicted(
    teacher: Any, draft: Any, prompts: torch.Tensor, way: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Acceptance on what the teacher writes after the prompts, and the tokens that rounds accept along it."""
    torch.manual_seed(1)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    texts = teacher.generate(**inputs, max_new_tokens=arguments.new_tokens, **WAYS[way])
    written = texts[:, PROMPT_TOKENS:].tolist()
    end = teacher.generation_config.eos_token_id
    texts = [
        (prompt, text[: text.index(end) + 1] if end in text else text)
        for prompt, text in zip(prompts.tolist(), written, strict=True)
    ]
    shares = overlaps(Decoder(teacher), Decoder(draft), texts, batch_size=4)
    accepted = acceptance([own[way == "greedy"].tolist() for own in shares])
    share = accepted.share
    return {"share": [share.value, share.ci_low, share.ci_high], "accepted": accepted.accepted, "measured": {}}


def measured(teacher: Any, draft: Any, prompts: torch.Tensor, way: str, g: int, new_tokens: int) -> list[float]:
    """Tokens of a whole round of assisted generation, with their 95 % interval over the prompts."""
    draft.generation_config.update(
        num_assistant_tokens=g, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    torch.manual_seed(2)
    means, weights = [], []
    for prompt in prompts:
        with counted_rounds() as rounds:
            inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
            teacher.generate(**inputs, max_new_tokens=new_tokens, assistant_model=draft, **WAYS[way])
        whole = [1 + matches for matches, drafted in rounds if drafted == g]
        means.append(sum(whole) / len(whole))
        weights.append(float(len(whole)))
    mean = sum(own * weight for own, weight in zip(means, weights, strict=True)) / sum(weights)
    return [mean, *bootstrap_mean(means, weights)]


@contextmanager
def counted_rounds() -> Iterator[list[tuple[int, int]]]:
    """Accepted and drafted tokens of every round of assisted generation from now on."""
    rounds: list[tuple[int, int]] = []
    original = AssistedCandidateGenerator.update_candidate_strategy

    def counting(self: Any, input_ids: Any, scores: Any, num_matches: Any) -> None:
        rounds.append((int(num_matches), scores.shape[1] - 1))
        original(self, input_ids, scores, num_matches)

    AssistedCandidateGenerator.update_candidate_strategy = counting
    try:
        yield rounds
    finally:
        AssistedCandidateGenerator.update_candidate_strategy = original


if __name__ == "__main__":
    main()
