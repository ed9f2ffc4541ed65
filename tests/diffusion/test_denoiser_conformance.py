"""The library's own denoisers pass the conformance kit."""

import torch
from torch import nn

import diffusion as df
from diffusion.testing import DenoiserTestCase, worlds

CONFIG = df.TransformerConfig(
    vocab_size=12, mask_id=1, pad_id=0, eos_id=2, forbidden_ids=(3,), context_length=6, block_length=4, max_length=40,
    width=16, num_layers=2, num_heads=2,
)  # fmt: skip


class TestTransformer(DenoiserTestCase):
    """Untrained: what its logits may depend on is tested, not what they predict."""

    window_sees = "up to its end"
    test_logits_predict_the_token_at_their_own_position = None
    test_the_cache_changes_nothing = None  # it has none

    def make_denoiser(self):
        model = df.TransformerDenoiser(CONFIG, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # larger than at initialisation, so that every part of the model matters
            for parameter in model.parameters():
                parameter.mul_(2).add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model


class TestTrainedTransformer(DenoiserTestCase):
    """Sixty steps on eight texts: now the logits predict something."""

    length = 6
    window_sees = "up to its end"
    test_the_cache_changes_nothing = None  # it has none

    def make_denoiser(self):
        model = df.TransformerDenoiser(CONFIG, seed=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            texts = self.examples()
            hidden = torch.rand(texts.shape, generator=generator) < 0.5
            logits = model.logits(texts.masked_fill(hidden, CONFIG.mask_id))
            loss = nn.functional.cross_entropy(logits[hidden], texts[hidden])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    def examples(self):
        return 4 + (torch.arange(8).unsqueeze(1) + torch.arange(6)) % 8


class TestBayesDenoiser(DenoiserTestCase):
    test_the_cache_changes_nothing = None  # it has none
    test_gradients_reach_the_parameters = None  # nor parameters
    test_a_call_leaves_the_module_as_it_is = None
    world = worlds.hidden_markov(5, seed=1)

    def make_denoiser(self):
        return self.world.denoiser()

    def examples(self):
        return self.world.sample(32, generator=torch.Generator().manual_seed(0))


class TestBayesDenoiserOfSums(TestBayesDenoiser):
    world = worlds.sums(4)


class TestBayesDenoiserOfCities(TestBayesDenoiser):
    world = worlds.cities(3)
    test_padding_at_the_left_changes_nothing = None  # texts of two words leave no room
    test_tokens_that_are_not_valid_are_not_read = None
    test_arguments_are_left_as_they_are = None
    test_a_window_may_come_with_padding = None


class TestBayesDenoiserOfEndings(TestBayesDenoiser):
    world = worlds.endings(4)


class TestUniformDenoiser(TestBayesDenoiser):
    test_logits_predict_the_token_at_their_own_position = None  # they predict nothing

    def make_denoiser(self):
        return self.world.uniform_denoiser()
