"""Models that read images, given text: the language model alone says what the whole model says, padded and cached."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model

from shoal.errors import UserError
from shoal.inference.decoder import Decoder

ROWS = [[*range(3, 15)], [*range(20, 26)]]
NEXT = [7, 9]


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.images and name != "paligemma"])
def test_text_is_scored_as_the_whole_model_scores_it(name: str) -> None:
    model = tiny_model(name)
    decoder, cache = Decoder(model), None
    if decoder.can_branch:
        cache = decoder.new_cache()
    ids_BS, mask_BS, positions_BS = decoder.left_padded(ROWS)
    found = decoder.hidden(ids_BS, mask=mask_BS, position_ids_BS=positions_BS, cache=cache)[:, -1]
    expected = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in ROWS])
    torch.testing.assert_close(decoder.logits(found), expected, atol=5e-5, rtol=0)
    if cache is None:
        assert name == "mllama"
        return
    longer_BS = torch.cat([mask_BS, torch.ones(2, 1, dtype=mask_BS.dtype)], dim=1)
    new_BS = torch.tensor(NEXT)[:, None]
    found = decoder.hidden(new_BS, mask=longer_BS, position_ids_BS=positions_BS[:, -1:] + 1, cache=cache)[:, -1]
    whole = [torch.tensor([[*row, token]]) for row, token in zip(ROWS, NEXT, strict=True)]
    expected = torch.stack([model(input_ids=ids).logits[0, -1] for ids in whole])
    torch.testing.assert_close(decoder.logits(found), expected, atol=5e-5, rtol=0)
    assert decoder.cache_bytes > 0


def test_a_model_that_reads_text_in_both_directions_is_not_scored() -> None:
    with pytest.raises(UserError, match=r"paligemma: its language model reads text in both directions"):
        Decoder(tiny_model("paligemma"))
