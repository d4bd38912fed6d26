"""Preference losses: pure functions of log-probs, one value per pair.

No module, no configuration and no state, so that training, studies and tests use the same code.
Notation (all [B], nats): z = β·h is the margin of the implicit rewards, h = Δw − Δl with
Δw = log π_θ(y_w|x) − log π_ref(y_w|x) and Δl the same for the rejected response.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo(margin: Tensor) -> Tensor:
    """DPO, Rafailov et al. 2023, eq. 7: −log σ(z).

    Args:
        margin: z = β·h [B], nats.
    """
    return -F.logsigmoid(margin)
