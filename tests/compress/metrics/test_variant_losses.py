"""Losses under variants against float64 loops over really cut models, and what they must not depend on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from calibrations import DOCUMENT_LENGTHS, architecture, calibration, loss_without, measured, plain_loss
from packed_rows import ROWS, packed
from tiny import KINDS, tiny_model

from shoal.compress.metrics.variant_losses import VariantLosses
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.variants.variants import INTACT, without
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_really_cut_models_document_by_document(kind: str) -> None:
    model = tiny_model(kind)
    losses = VariantLosses(model, calibration())
    drops = [(), (0,), (3,), (1, 4), (2, 3, 5)]
    expected = [loss_without(model, drop) if drop else plain_loss(copy.deepcopy(model)) for drop in drops]
    assert losses([without(drop) for drop in drops]) == pytest.approx(expected, abs=2e-6)
    assert losses.num_tokens == sum(length - 1 for length in DOCUMENT_LENGTHS)


def test_an_architecture_that_runs_as_a_whole_gives_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, variants = tiny_model("gemma3"), [INTACT, without([2]), without([1, 4])]
    layer_by_layer = VariantLosses(model, calibration())(variants)
    monkeypatch.setattr("shoal.compress.metrics.variant_losses.layerwise_or_none", lambda _: None)
    assert VariantLosses(model, calibration())(variants) == pytest.approx(layer_by_layer, abs=1e-6)


def test_losses_that_are_not_finite_are_refused_by_variant_and_row() -> None:
    model = tiny_model("llama")
    model.get_parameter("model.embed_tokens.weight").data[77] = torch.nan
    ids = ROWS.input_ids_NS.masked_fill(ROWS.input_ids_NS == 77, 5)
    ids[2, 12] = 77
    message = r"the loss of the model without layer 0 is not finite .* in batch 1 \(row 2 of the calibration data\)"
    with pytest.raises(UserError, match=message):
        measured(model, "single_drop_perplexity", rows=PackedRows(ids, ROWS.position_ids_NS))
    ids[2, 12], ids[1, 3] = 5, 77
    with pytest.raises(UserError, match=r"in batch 0 \(row 1 of the calibration data\)"):
        measured(model, "sleb", rows=PackedRows(ids, ROWS.position_ids_NS), batch_size=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_documents_stay_apart_where_the_model_knows_no_positions(name: str) -> None:
    model, rows = architecture(name), packed([[12], [5, 7], [9, 3]], below=90)
    found = measured(model, "single_drop_perplexity", rows=rows)["single_drop_perplexity"]
    expected = [math.exp(plain_loss(cut_model(model, [layer]), rows)) for layer in range(len(decoder_layers(model)))]
    assert found == pytest.approx(expected, rel=3e-6)
