"""Final states of a model whose layers are loaded one by one, against the model as a whole."""

from __future__ import annotations

import pytest
import torch
from packed_rows import packed
from tiny import tiny_checkpoint

from shoal.compress.variants.final_states import final_states
from shoal.compress.variants.streamed_model import StreamedModel
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.models.load import load_model
from shoal.train.objective.objective import output_head

ROWS = packed([[5, 4, 3], [12], [1, 11]])


@pytest.mark.parametrize("kind", ["llama_tied", "gemma3"])
def test_packed_rows_give_the_states_and_logits_of_the_whole_model(tmp_path, kind):
    folder = tiny_checkpoint(tmp_path, kind)
    streamed = StreamedModel(folder, dtype="float32")
    hidden = final_states(streamed, ROWS.input_ids_NS, ROWS.position_ids_NS)
    whole = load_model(folder, dtype="float32")
    with torch.no_grad():
        expected = whole(input_ids=ROWS.input_ids_NS, position_ids=ROWS.position_ids_NS, use_cache=False)
        logits = output_head(streamed.model)(hidden)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    assert next(decoder_layers(streamed.model)[0].parameters()).is_meta, "the layers are gone again"


def test_what_cannot_be_loaded_layer_by_layer_is_refused_with_the_remedy_of_who_asks(tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(UserError, match=r"is quantised; only plain weights are taken layer by layer: do that$"):
        StreamedModel(folder, whole="do that")
