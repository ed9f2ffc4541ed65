"""The test case that whoever writes a new structure subclasses."""

from __future__ import annotations

from circuits.testing.conformance._further_queries import FurtherQueryLaws
from circuits.testing.conformance._gradients import GradientLaws
from circuits.testing.conformance._learning import LearningLaws
from circuits.testing.conformance._numerics import NumericLaws
from circuits.testing.conformance._queries import QueryLaws
from circuits.testing.conformance._state import StateLaws
from circuits.testing.conformance._transforms import TransformLaws


class StructureTestCase(QueryLaws, FurtherQueryLaws, GradientLaws, LearningLaws, TransformLaws, NumericLaws, StateLaws):
    """Tests a structure against enumeration: every query, gradient, learning step, transformation, and limit.

    Subclass it in a test module, under a name that pytest collects, and supply :meth:`circuit`::

        class TestMyStructure(ct.testing.StructureTestCase):
            def circuit(self, draw):
                return my_structure(num_vars=draw(st.integers(1, 4)), num_units=draw(st.integers(1, 3)))

    All inherited tests then run on circuits of all sizes that ``draw`` gives, with random weights, under hard, missing,
    soft and sparse evidence. A failing case is shrunk by Hypothesis and printed as the code that rebuilds it. To leave
    a test out, set it to None in the subclass and say why.

    Structures with ``num_classes`` are tested by :class:`ClassStructureTestCase`.

    Methods to override:
        circuit: required; keep the circuits small (some hundred assignments), everything is enumerated.
        log_joint: the structure's own formula as a dense oracle; by default the circuit is enumerated.
        log_best_explanation: the same for the most probable explanation.

    Attributes to override:
        max_examples: how many cases a test tries; None: as many as the Hypothesis profile says.
        checks_torch_compile: also trace circuits by ``torch.compile``.
    """
