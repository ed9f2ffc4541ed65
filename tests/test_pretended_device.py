"""The device that the tests pretend refuses what a GPU refuses, and computes what the CPU computes."""

import pytest
import torch


def numbers(elsewhere):
    return torch.arange(6.0).reshape(2, 3).to(elsewhere.device)


def test_tensors_say_where_they_are_and_keep_their_numbers(elsewhere):
    x = numbers(elsewhere)
    assert x.device == torch.ones(1, device=elsewhere.device).device != torch.device("cpu")
    assert (x.t() @ x).sum().item() == 153.0
    assert torch.tensor([[1, 2]], device=elsewhere.device).tolist() == [[1, 2]]
    x[[0]] += 1
    x[:, x[0] > 2.5] = -1.0
    assert x.cpu().tolist() == [[1.0, 2.0, -1.0], [3.0, 4.0, -1.0]]


def test_gradients(elsewhere):
    x = numbers(elsewhere).requires_grad_()
    x.square().sum().backward()
    assert x.grad.device == x.device
    assert torch.equal(x.grad.cpu(), 2 * x.detach().cpu())


def test_devices_are_not_mixed(elsewhere):
    x = numbers(elsewhere)
    assert (x + torch.tensor(1.0)).device == x[torch.tensor([0, 1])].device == x.device  # both of which CUDA takes
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(1, 3)]),
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.ones(2)[torch.zeros(1, dtype=torch.int64, device=elsewhere.device)],
    ):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_generators_stay_on_their_device(elsewhere):
    x = numbers(elsewhere)
    drawn = [torch.rand(3, device=elsewhere.device, generator=elsewhere.generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].cpu(), drawn[1].cpu())
    assert not torch.equal(drawn[0].cpu(), drawn[2].cpu())
    with pytest.raises(RuntimeError):
        x.exponential_(generator=torch.Generator("cpu"))
    with pytest.raises(RuntimeError):
        torch.ones(3).exponential_(generator=elsewhere.generator())


def test_waits_are_counted(elsewhere):
    if elsewhere.pretended is None:
        pytest.skip("only the pretended device counts")
    x = numbers(elsewhere)
    assert elsewhere.pretended.num_waits == 0
    y = torch.logsumexp(x @ x.t(), 1)
    assert elsewhere.pretended.num_waits == 0
    for wait in (lambda: bool((y > 0).all()), y.nonzero, lambda: x[x > 1], y.cpu, y.tolist):
        before = elsewhere.pretended.num_waits
        wait()
        assert elsewhere.pretended.num_waits == before + 1
