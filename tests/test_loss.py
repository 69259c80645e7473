"""loss.py against Eq. 2 and 3 written out in numpy, against TRL's SimPO, and against arithmetic by hand."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loss import logo_loss

SETTINGS = [(10.0, 3.0, 0.1), (3.0, 0.6, 0.1), (2.5, 0.25, 0.0)]  # beta, gamma, lambda; the first two from the paper


def answers(N, M, seed=0):
    """Mean log-probs (N,) and (N, M) in float64, near enough to each other that no sigmoid saturates."""
    rng = torch.Generator().manual_seed(seed)
    return -torch.rand(N, generator=rng, dtype=torch.float64), -torch.rand(N, M, generator=rng, dtype=torch.float64)


def equations(chosen, rejected, beta, gamma, sft_weight):
    """Eq. 2 and Eq. 3, a group at a time, in plain numpy."""
    total = 0.0
    for y_w, y_l in zip(chosen, rejected):
        r_w, r_l = beta * y_w, [beta * y for y in y_l]
        l_pref = -np.log(1 / (1 + np.exp(-(r_w - sum(r_l) / len(r_l) - gamma))))
        total += l_pref + sft_weight * -y_w
    return total / len(chosen)


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("beta, gamma, sft_weight", SETTINGS)
def test_loss_equals_the_equations(M, beta, gamma, sft_weight):
    chosen, rejected = answers(5, M)
    loss, _ = logo_loss(chosen, rejected, beta, gamma, sft_weight)
    assert loss.item() == pytest.approx(equations(chosen.numpy(), rejected.numpy(), beta, gamma, sft_weight), abs=1e-12)


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("beta, gamma, sft_weight", SETTINGS)
def test_gradient_equals_finite_differences(M, beta, gamma, sft_weight):
    chosen, rejected = (x.requires_grad_() for x in answers(2, M))
    logo_loss(chosen, rejected, beta, gamma, sft_weight)[0].backward()
    for x in (chosen, rejected):
        for i in np.ndindex(*x.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = {id(x): x.detach().numpy().copy()}
                moved[id(x)][i] += step
                sides.append(equations(*(moved.get(id(y), y.detach().numpy()) for y in (chosen, rejected)),
                                       beta, gamma, sft_weight))
            assert x.grad[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_by_hand_one_group():
    # margin 2 * (-1 - (-1.5 - 2.5) / 2) = 2; gamma 2 brings it to log sigmoid(0) = -log 2; lambda 0.5 * 1 on top
    loss, metrics = logo_loss(torch.tensor([-1.0]), torch.tensor([[-1.5, -2.5]]), beta=2.0, gamma=2.0, sft_weight=0.5)
    assert loss.item() == pytest.approx(np.log(2) + 0.5)
    assert metrics["rewards/margins"].item() == pytest.approx(2.0)  # before gamma: what a plot of rewards shows


def test_gamma_stands_outside_beta():
    chosen, rejected = torch.tensor([-0.5]), torch.tensor([[-1.0]])
    for beta in (1.0, 10.0):  # at gamma = beta * 0.5 the two rewards are exactly gamma apart, whatever beta is
        assert logo_loss(chosen, rejected, beta, gamma=beta * 0.5)[0].item() == pytest.approx(np.log(2))


def test_one_step_downhill_raises_the_chosen_answer_and_lowers_the_rejected():
    chosen, rejected = (x.requires_grad_() for x in answers(3, 2))
    logo_loss(chosen, rejected, beta=10.0, gamma=3.0, sft_weight=0.1)[0].backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    sft = torch.autograd.grad(logo_loss(chosen, rejected, beta=0.0, gamma=0.0, sft_weight=1.0)[0], chosen)[0]
    assert (sft < 0).all()  # the SFT term alone too, though Eq. 3 prints the other sign


def test_rejected_answers_count_alike_in_any_order():
    chosen, rejected = answers(4, 3)
    rejected.requires_grad_()
    loss = logo_loss(chosen, rejected, 10.0, 3.0, 0.1)[0]
    loss.backward()
    assert torch.allclose(rejected.grad, rejected.grad[:, :1].expand(4, 3))
    assert logo_loss(chosen, rejected.flip(1), 10.0, 3.0, 0.1)[0].item() == pytest.approx(loss.item())


def test_far_apart_answers_give_finite_loss_and_gradient():
    for rejected in (-1e4, 1e4):
        chosen = torch.zeros(1, requires_grad=True)
        loss, _ = logo_loss(chosen, torch.tensor([[rejected]]), 10.0, 3.0, 0.1)
        loss.backward()
        assert loss.isfinite() and chosen.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta, gamma", [(10.0, 3.0), (2.5, 0.25)])
def test_one_rejected_answer_equals_trl_simpo(beta, gamma):
    cpo = pytest.importorskip("trl.experimental.cpo", reason="trl is not installed")
    settings = SimpleNamespace(loss_type="simpo", beta=beta, simpo_gamma=gamma, label_smoothing=0.0, alpha=0.0,
                               accelerator=SimpleNamespace(device="cpu"))  # TRL divides gamma by beta, then multiplies
    chosen, rejected = answers(6, 1)
    theirs, chosen_rewards, rejected_rewards = cpo.CPOTrainer.cpo_loss(settings, chosen, rejected[:, 0])
    ours, metrics = logo_loss(chosen, rejected, beta, gamma)
    assert ours.item() == pytest.approx(theirs.mean().item(), abs=1e-12)
    assert metrics["rewards/margins"].item() == pytest.approx((chosen_rewards - rejected_rewards).mean().item(), abs=1e-12)


def test_metrics_by_hand():
    chosen = torch.tensor([-1.0, -2.0, -3.0, -1.0], requires_grad=True)
    rejected = torch.tensor([[-2.0, -3.0],    # beaten by the chosen answer, both
                             [-1.0, -4.0],    # beaten on average (-2.5) only
                             [-1.0, -4.0],    # above one of them, below their average
                             [-1.0, -1.0]])   # a tie is no win
    loss, metrics = logo_loss(chosen, rejected, beta=2.0, gamma=1.0, sft_weight=0.5)
    margins = np.array([3.0, 1.0, -1.0, 0.0])  # 2 * (chosen - mean of rejected)
    preference = np.log1p(np.exp(-(margins - 1.0))).mean()
    expected = {"preference": preference, "nll": 1.75, "rewards/margins": 0.75,
                "rewards/accuracies": 0.5, "rewards/accuracies_all": 0.25,
                "logps/chosen": -1.75, "logps/rejected": -2.125}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(preference + 0.5 * 1.75)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("chosen, rejected", [((4,), (4,)), ((4,), (3, 2)), ((4, 1), (4, 2)), ((4,), (4, 0))])
def test_wrong_shapes_are_named(chosen, rejected):
    with pytest.raises(ValueError, match=r"expected \(N,\) and \(N, M\)"):
        logo_loss(torch.zeros(chosen), torch.zeros(rejected), 1.0, 0.0)
