"""Conformance kit: subclass a test case, supply a constructor, and inherit the tests.

Needs the packages ``hypothesis`` and ``pytest`` (extra ``[test]``).
"""

from circuits.testing.conformance._cases import law
from circuits.testing.conformance.class_structure import ClassStructureTestCase
from circuits.testing.conformance.direct_family import DirectFamilyTestCase
from circuits.testing.conformance.family import FamilyTestCase
from circuits.testing.conformance.semiring import SemiringTestCase
from circuits.testing.conformance.structure import StructureTestCase

__all__ = [
    "ClassStructureTestCase",
    "DirectFamilyTestCase",
    "FamilyTestCase",
    "SemiringTestCase",
    "StructureTestCase",
    "law",
]
