"""What a checkpoint gives back is computed with as if it had never been on disk."""

import torch

import circuits as ct


def test_an_optimizer_that_adds_up_its_state_resumes_to_the_last_bit(tmp_path):
    """L-BFGS sums over its history; sums of tensors that lie askew in memory are rounded differently."""
    circuit = ct.structures.hmm(3, 2, 4)
    x = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(0))

    def fitted(num_epochs, path):
        pc = ct.compile(circuit, seed=0)
        ct.learning.fit(
            pc,
            x,
            optimizer=lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
            num_epochs=num_epochs,
            batch_size=16,
            checkpoint_path=path,
            progress=False,
        )
        return pc

    fitted(2, tmp_path / "run.safetensors")
    resumed, whole = fitted(5, tmp_path / "run.safetensors"), fitted(5, None)
    for name, parameter in whole.bank.items():
        assert torch.equal(resumed.bank[name], parameter)
