"""TYPO: a supervised term on the policy itself, and a KL from the reference on its own samples."""

from typing import Any

from torch import Tensor

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.models.log_probs import PairLogProbs, given
from rotopo.objectives import losses
from rotopo.objectives.base import PreferenceModule, positive


class TYPO(PreferenceModule):
    """TYPO (arXiv 2407.09072; EXPO in 2506.07492): log(1 + π_θ(y_l)/π_θ(y_w)) + λ·KL(π_ref ‖ π_θ).

    No log-ratio in the first term, so that with λ → 0 the preferences themselves are learnt and
    not their mode, and the KL runs from the reference to the policy: maximum likelihood on the
    reference's responses. Rewards are the log-probs c and r.

    On language models [ours]: the KL is summed over the tokens of a response y ~ π_ref of each
    prompt, Σ_t KL(π_ref(·|x, y_<t) ‖ π_θ(·|x, y_<t)), which is unbiased for the KL of responses cut
    to ``sample_tokens``, and of lower variance than the log-ratio of y. The responses come from a
    column (``data.extra_responses: {reference_sample: COLUMN}``); where there is none they are
    drawn once, at temperature 1, and kept in the cache.

    This is EXPO's *composite* loss, by its official code; its regression form could not be read.
    That code takes the mean over its three arms in the KL, so that its λ weighs a third of what
    this one does.

    Args:
        kl_weight: λ.
        sample_tokens: tokens of a drawn response at most.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = Needs(roles=(Role.REFERENCE_SAMPLE,))
    strength = "kl_weight"

    def __init__(self, kl_weight: float = 0.1, sample_tokens: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kl_weight = positive("kl_weight", kl_weight)
        self.sample_tokens = int(positive("sample_tokens", sample_tokens))

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        kl = given(log_probs.reference_kl, "reference_kl")
        return losses.typo(log_probs.chosen, log_probs.rejected) + self.kl_weight * kl

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return log_probs.chosen, log_probs.rejected
