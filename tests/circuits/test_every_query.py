"""Every query on one random circuit after the other; `pytest --hypothesis-profile=thorough` on this file is the soak.

Its property tries all query laws of the conformance kit on a case, so that 10,000 circuits take one run and not thirty.
"""

from hypothesis import settings
from hypothesis import strategies as st

import circuits as ct
from circuits.testing.conformance._cases import law
from circuits.testing.conformance._further_queries import FurtherQueryLaws
from circuits.testing.conformance._queries import QueryLaws

SAMPLERS = {
    "test_samples_follow_the_posterior",
    "test_samples_follow_the_joint",
}  # chi-square tests, in their own files
LAWS = [
    vars(method)["law"]
    for laws in (QueryLaws, FurtherQueryLaws)
    for name, method in vars(laws).items()
    if name.startswith("test_") and name not in SAMPLERS
]


class _EveryQuery(QueryLaws, FurtherQueryLaws):
    @law
    def test_every_query_is_the_enumerated_one(self, case):
        for check in LAWS:
            check(self, case)

    def circuit(self, draw):
        return draw(ct.testing.circuits(max_vars=draw(st.integers(1, 4)), max_units=2, max_categories=3))


def test_every_query_is_the_enumerated_one():
    assert len(LAWS) >= 20
    assert settings.default.max_examples >= 60
    _EveryQuery().test_every_query_is_the_enumerated_one()
