"""What tests of conditioners are about: a prediction with features, and blocks of which something is masked."""

import pytest
from contextual_cases import random_block, random_prediction


@pytest.fixture
def said(generator):
    return random_prediction(generator)


@pytest.fixture
def block(generator):
    return random_block(generator)
