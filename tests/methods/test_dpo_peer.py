"""DPO beside PyTorch: the loss of the paper by its autograd, on the same logits."""

import numpy as np
import pytest

from tests.methods import pairs
from tests.methods.test_dpo import with_gradient

torch = pytest.importorskip("torch", reason="make peers")
pytestmark = pytest.mark.peer


def log_probabilities(logits, batch):
    """Of each answer, chosen and rejected: what an independent implementation sums over its own rows."""
    targets = torch.tensor(batch["targets"], dtype=torch.long)
    each = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    each = each * torch.tensor(batch["weights"], dtype=logits.dtype)
    found = [[each[row, at].sum() for at in both] for row, *both in pairs.answers(batch)]
    return torch.stack([torch.stack(both) for both in found]).T


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_rewards_are_torchs(beta, smoothing, seed):
    batch, rng = pairs.rows(seed), np.random.default_rng(seed)
    shape = (pairs.ROWS, pairs.SEQ, pairs.VOCAB)
    values = [(3 * rng.standard_normal(shape)).astype(np.float32) for _ in range(2)]
    logits, reference = (torch.tensor(each, dtype=torch.float64) for each in values)
    logits.requires_grad_(True)
    policy, under = log_probabilities(logits, batch), log_probabilities(reference, batch)
    rewards = beta * (policy - under)
    margins = rewards[0] - rewards[1]
    losses = -(1 - smoothing) * torch.nn.functional.logsigmoid(margins)
    losses = losses - smoothing * torch.nn.functional.logsigmoid(-margins)
    losses.sum().backward()
    terms, grad = with_gradient(*values, batch, beta, smoothing)
    assert float(terms.objective.sum()) == pytest.approx(losses.sum().item(), rel=1e-5)
    np.testing.assert_allclose(grad, logits.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert float(terms.chosen.sum()) == pytest.approx(rewards[0].sum().item(), rel=1e-4)
    assert float(terms.rejected.sum()) == pytest.approx(rewards[1].sum().item(), rel=1e-4)
    assert float(terms.right.sum()) == (margins > 0).sum().item()
