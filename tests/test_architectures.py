"""Contract 1 for every family: cutting in memory and on disk equals skipping, or is refused with the reason."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, NOT_CUT
from exactness import examine
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cuts_of_a_family_are_exact_or_refused(name: str) -> None:
    found = examine(name)
    assert found.num_exact or ARCHITECTURES[name].refuses


def test_every_causal_model_type_of_transformers_has_a_row_or_a_reason() -> None:
    known = NOT_CUT.keys() | {row.model_type or name for name, row in ARCHITECTURES.items()}
    missing = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - known)
    assert not missing, f"add a row to ARCHITECTURES in tests/architectures.py for {missing}, or a reason to NOT_CUT"
