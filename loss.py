"""The LOGO objective (arXiv 2410.18533, Sec. 3.2.1): floats in, floats out.

    r(y)   = beta / |y| * sum_t log pi(y_t | x, y_<t)                beta times the mean log-prob
    L_pref = -log sigmoid( r(y_w) - 1/M * sum_j r(y_l_j) - gamma )   Eq. 2; M = 1 is SimPO, Eq. 1
    L      = L_pref + sft_weight * ( -1/|y_w| * log pi(y_w | x) )    Eq. 3, with the sign it means

Eq. 3 as printed adds the log-likelihood; minimised literally it would push the chosen answer away.
Each answer is normalised by its own length (Eq. 2 prints one |y_l|): of two sums of log-probs the
longer answer's is the lower one, and the model would learn lengths.
"""
import torch.nn.functional as F
from torch import Tensor


def logo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, sft_weight: float = 0.0
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, a scalar (the mean over N groups), and detached metrics, each a mean over N groups.

    chosen: (N,) mean log-prob of each chosen answer. rejected: (N, M), M >= 1, of the rejected.
    beta, gamma: as in Eq. 2. sft_weight: lambda of Eq. 3.
    """
    well_shaped = chosen.ndim == 1 and rejected.ndim == 2 and len(chosen) == len(rejected)
    if not well_shaped or rejected.shape[1] < 1:
        raise ValueError(f"chosen is {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}: "
                         "expected (N,) and (N, M)")
    margin = beta * (chosen - rejected.mean(dim=1))
    # gamma: how far ahead the chosen reward must be before the pull fades to one half. It stands
    # outside beta, a margin on rewards; the public code's gamma_beta_ratio is gamma / beta.
    preference = -F.logsigmoid(margin - gamma)
    # Margins grow also while both log-probs fall. This term alone holds the chosen answer up.
    sft = -chosen
    metrics = {
        "preference": preference,       # L_pref; names with a stroke are TRL's
        "nll": sft,
        "rewards/margins": margin,      # before gamma, as rewards are plotted
        "rewards/accuracies": chosen > rejected.mean(dim=1),                # above their mean
        "rewards/accuracies_all": (chosen[:, None] > rejected).all(dim=1),  # above each of them
        "logps/chosen": chosen,
        "logps/rejected": rejected.mean(dim=1),
    }
    loss = (preference + sft_weight * sft).mean()
    return loss, {name: value.detach().to(chosen.dtype).mean() for name, value in metrics.items()}
