"""What the tests of the transformations share."""

import torch

import circuits as ct

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def compiled(circuit, seed=0):
    return ct.compile(circuit, dtype=torch.float64, seed=seed)


def joint_of(pc):
    return ct.testing.enumerate_joint(pc)


def assert_same(joint, expected):
    torch.testing.assert_close(joint.exp(), expected.exp(), **CLOSE)
    assert torch.equal(joint == -torch.inf, expected == -torch.inf)
    possible = expected > -torch.inf
    torch.testing.assert_close(joint[possible], expected[possible], **CLOSE)


def small_circuits(**options):
    return ct.testing.circuits(max_vars=4, max_units=3, max_categories=3, **options)
