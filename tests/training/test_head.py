import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anabranch.training.head import Head, token_nll


def both(head: Head, chunk: int | None):
    """Losses and gradients of weighted rows: in chunks, and by autograd on all logits."""
    torch.manual_seed(0)
    hidden = torch.randn(11, 8)
    targets = torch.randint(13, (11,))
    weights = torch.randn(11)
    results = []
    for nll in (
        lambda h: token_nll(head, h, targets, chunk),
        lambda h: F.cross_entropy(head.logits(h), targets, reduction="none"),
    ):
        leaf = hidden.clone().requires_grad_()
        head.project.zero_grad()
        losses = nll(leaf)
        (losses * weights).sum().backward()
        results.append((losses.detach(), leaf.grad, [p.grad for p in head.project.parameters()]))
    return results


@pytest.mark.parametrize("chunk", [1, 4, 11, 100, None])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"softcap": 2.0}])
def test_equal_to_full_autograd(chunk, frozen, extra):
    head = Head(nn.Linear(8, 13, bias=False).requires_grad_(not frozen), **extra)
    (losses, inner, outer), (losses_, inner_, outer_) = both(head, chunk)
    torch.testing.assert_close(losses, losses_, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inner, inner_, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(outer, outer_, strict=True):
        assert (found is None) == (wanted is None) == frozen
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_bias_is_not_forgotten():
    head = Head(nn.Linear(8, 13).requires_grad_(False))
    assert head.frozen is None
    (losses, inner, _), (losses_, inner_, _) = both(head, 4)
    torch.testing.assert_close(losses, losses_)
    torch.testing.assert_close(inner, inner_)


def test_gradient_by_finite_differences():
    head = Head(nn.Linear(4, 7, bias=False).double().requires_grad_(False))
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3])
    # Losses are float32, so steps must be coarse.
    assert torch.autograd.gradcheck(
        lambda h: token_nll(head, h, targets, 2).double(), hidden, eps=1e-2, atol=1e-2
    )


def test_no_rows():
    head = Head(nn.Linear(4, 7, bias=False).requires_grad_(False))
    hidden = torch.zeros(0, 4, requires_grad=True)
    losses = token_nll(head, hidden, torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()


def test_the_logits_never_exist_whole():
    class Watched(nn.Linear):
        largest = 0

        def forward(self, rows):
            Watched.largest = max(Watched.largest, len(rows))
            return super().forward(rows)

    head = Head(Watched(8, 13, bias=False))
    token_nll(head, torch.randn(50, 8), torch.zeros(50, dtype=torch.int64), 16).sum().backward()
    assert Watched.largest == 16


def test_autocast_computes_in_the_lower_precision():
    head = Head(nn.Linear(64, 13, bias=False).requires_grad_(False))
    hidden = torch.randn(5, 64, requires_grad=True)
    targets = torch.randint(13, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        lower = token_nll(head, hidden, targets)
        expected = F.cross_entropy(head.logits(hidden), targets, reduction="none")
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(lower, token_nll(head, hidden, targets))
