"""The LOGO objective (arXiv 2410.18533, Sec. 3.2.1): floats in, floats out.

    r(y)   = beta / |y| * sum_t log pi(y_t | x, y_<t)                      beta times the mean log-prob of y
    L_pref = -log sigmoid( r(y_w) - 1/M * sum_j r(y_l_j) - gamma )         Eq. 2; M = 1 is SimPO, Eq. 1
    L      = L_pref + sft_weight * ( -1/|y_w| * log pi(y_w | x) )          Eq. 3, with the sign that its text means

Eq. 3 as printed adds the log-likelihood; minimised literally it would push the chosen answer away. Each answer is
normalised by its own length (Eq. 2 prints one |y_l|). gamma stands outside beta: it is a margin on rewards.
"""
import torch.nn.functional as F


def logo_loss(chosen, rejected, beta, gamma, sft_weight=0.0):
    """Loss, a scalar (the mean over N groups), and detached metrics, each a mean over N groups.

    chosen: (N,) mean log-prob of each chosen answer. rejected: (N, M), M >= 1, of the rejected ones.
    beta, gamma: as in Eq. 2. sft_weight: lambda of Eq. 3.
    """
    if chosen.ndim != 1 or rejected.ndim != 2 or len(chosen) != len(rejected) or rejected.shape[1] < 1:
        raise ValueError(f"chosen is {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}: expected (N,) and (N, M)")
    margin = beta * (chosen - rejected.mean(dim=1))
    preference = -F.logsigmoid(margin - gamma)
    sft = -chosen
    metrics = {
        "preference": preference,       # L_pref; names with a stroke are TRL's
        "nll": sft,
        "rewards/margins": margin,
        "rewards/accuracies": chosen > rejected.mean(dim=1),                   # above the mean of the rejected
        "rewards/accuracies_all": (chosen[:, None] > rejected).all(dim=1),     # above every one of them
        "logps/chosen": chosen,
        "logps/rejected": rejected.mean(dim=1),
    }
    loss = (preference + sft_weight * sft).mean()
    return loss, {name: value.detach().to(chosen.dtype).mean() for name, value in metrics.items()}
