"""AntiBERTy's real weights decode, score and are evaluated with a head, where they are; see benchmarks/barrier.py."""

import os
import sys
from pathlib import Path

import pytest
import torch

import circuits as ct
import diffusion as df

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))  # scripts, that import what lies beside them

import _antibody_data as antibody

FOLDER = Path(os.environ.get("UNFACTOR_BARRIER", Path.home() / ".cache" / "unfactor" / "barrier")) / "antibody"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model" / "config.json").is_file() and not any(FOLDER.glob("antiberty-*.whl")),
    reason=f"AntiBERTy is not in {FOLDER}: run benchmarks/barrier.py --bed antibody, or set UNFACTOR_BARRIER",
)
CHAINS = (
    "ASVKVSCKASGGTFSSYTFSWVRQAPGQGLEWVGRIIPILDIVRYPQKFQGRVTITADESTSTVYMDLSSLRSEDAAVYYCASGRYWSGYRPVPFDYWGQGTLVTVSS",
    "ASVKVSCKASGYTFTDYDVNWVRQAPGQGLEWMGWMIPNSRDSGYAQKFQGRLTFTWNTSTSTVYMEMTSLRSEDTAVYYCARTGGGSFSGHGFDIWGQGTVVTVSS",
    "ASVKVSCKSSGYVFSNYGISWVRQAPGQGLEWMGWISSYNGNTNYARKFQGRLSITTDTSASITYLDLRSLTSDDTAVFFCARAPEGGYDFSHDYWGQGTLVTVSS",
    "RSPRAASGFTFNIYTMNWVRQAPGKGLEWVSSISSSGTSIYYADSVKGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCARDLSEPLPSHYFDYWGRGSLVTVSS",
)
WINDOWS = torch.tensor([[antibody.VOCABULARY.index(one) for one in chain[-100:]] for chain in CHAINS])
AMINO_ACIDS = tuple(range(5, 25))


class TestAntiBERTy(df.testing.DenoiserTestCase):
    length = 24
    tolerance = 1e-3

    def make_denoiser(self):
        return df.load_denoiser(antibody.prepare_model(FOLDER))

    def examples(self):
        return WINDOWS[:, -24:]


@pytest.fixture(scope="module")
def denoiser():
    return df.load_denoiser(antibody.prepare_model(FOLDER))


@pytest.fixture(scope="module")
def head():
    return df.CoupledHead(ct.compile(ct.structures.hmm(8, 4, 20), seed=0), vocabulary=AMINO_ACIDS)


def test_it_knows_the_tokens_of_its_vocabulary(denoiser):
    assert (denoiser.spec.vocab_size, denoiser.spec.mask_id, denoiser.spec.max_length) == (25, 4, 510)
    assert denoiser.spec.forbidden_ids == (0, 1, 2, 3, 4)
    found = df.infill(denoiser, WINDOWS[:, :50].clone().index_fill_(1, torch.tensor([30, 33]), 4), num_steps=2).tokens
    assert (found == WINDOWS[:, :50]).float().mean() > 0.97  # frameworks hardly vary


def test_batches_and_padding_change_nothing_with_a_head(denoiser, head):
    prompts = [row[: 20 + 3 * number].tolist() for number, row in enumerate(WINDOWS)]
    options = {"gen_length": 8, "num_steps": 2, "head": head, "temperature": 1.0}
    together = df.generate(denoiser, prompts, seeds=range(4), **options).generated
    answers = [WINDOWS[row, len(prompt) :][:8].tolist() for row, prompt in enumerate(prompts)]
    scores = df.log_likelihood(denoiser, prompts, answers, head=head, strategy="entropy", num_steps=2)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert torch.equal(df.generate(denoiser, [prompt], seeds=[row], **options).generated[0], together[row])
        alone = df.log_likelihood(denoiser, [prompt], [answer], head=head, strategy="entropy", num_steps=2)
        assert alone.item() == pytest.approx(scores[row].item(), abs=1e-3)
    assert set(together.flatten().tolist()) <= set(AMINO_ACIDS)


def test_one_step_is_worse_than_one_residue_at_a_time(denoiser, head):
    (row,) = df.evaluation.misspecification_gap(denoiser, head, WINDOWS[:, 60:76], mask_ratios=(1.0,)).rows
    assert 1 < row.sequential.value < row.one_step.value
