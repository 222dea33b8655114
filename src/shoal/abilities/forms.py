"""All forms of the abilities that text trains."""

from shoal.abilities import knowledge, reasoning, retrieval
from shoal.abilities.item import Form

FORMS: dict[str, tuple[Form, ...]] = {
    "retrieval": retrieval.FORMS,
    "knowledge": knowledge.FORMS,
    "reasoning": reasoning.FORMS,
}
