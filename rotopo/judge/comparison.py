"""What scores say of a policy beside a baseline, and of the judges beside each other."""

from itertools import combinations

import numpy as np

from rotopo.errors import InputError
from rotopo.judge.judgement import Verdict
from rotopo.judge.length_control import length_controlled_interval, length_controlled_win_rate
from rotopo.judge.scores import Scores
from rotopo.metrics.bootstrap import mean_interval
from rotopo.metrics.texts import distinct, self_bleu, words


def verdict(
    own: Scores, base: Scores, tie: float, level: float, resamples: int, seed: int
) -> Verdict:
    """A policy beside the baseline under one judge; arguments of ``rotopo judge``."""

    def interval(values: np.ndarray) -> list[float]:
        return list(mean_interval(values, level=level, resamples=resamples, seed=seed))

    difference = own.scores - base.scores
    preference = preferences(own, base, tie)
    longer = own.tokens - base.tokens
    controlled = length_controlled_interval(preference, longer, level, resamples, seed)
    return {
        "mean_score": float(own.scores.mean()),
        "score_interval": interval(own.scores),
        "mean_difference": float(difference.mean()),
        "difference_interval": interval(difference),
        "win_rate": float(preference.mean()),
        "interval": interval(preference),
        "wins": int((preference == 1).sum()),
        "ties": int((preference == 0.5).sum()),
        "losses": int((preference == 0).sum()),
        "length_controlled_win_rate": length_controlled_win_rate(preference, longer),
        "length_controlled_interval": controlled and list(controlled),
    }


def preferences(own: Scores, base: Scores, tie: float = 0.0) -> np.ndarray:
    """1 where a policy's response beats the baseline's, 0 where it loses, one half for ties [n].

    A tie is a difference of at most ``tie``, or the same text: two scores of one text differ by
    rounding alone.
    """
    difference = own.scores - base.scores
    same = np.array([a == b for a, b in zip(own.responses, base.responses, strict=True)])
    return np.where(same | (np.abs(difference) <= tie), 0.5, (difference > 0).astype(float))


def agreement(
    preference: tuple[np.ndarray, np.ndarray], difference: tuple[np.ndarray, np.ndarray]
) -> dict[str, float | None]:
    """How far two judges agree; None where it is undefined.

    - ``agree``: the share of comparisons in which both prefer the same response, or both see a tie.
    - ``kappa``: Cohen's κ of the three outcomes, the agreement beyond chance.
    - ``spearman``: rank correlation of the differences of the scores.

    Args:
        preference: each judge's, as :func:`preferences` gives them [n].
        difference: each judge's score of the policy less that of the baseline [n].

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from scipy.stats import spearmanr
        from sklearn.metrics import cohen_kappa_score
    except ImportError as error:
        raise InputError("judging takes scikit-learn: pip install 'rotopo[report]'.") from error

    outcomes = [(2 * p).astype(int) for p in preference]
    # With a single outcome or a single difference there is nothing to compare by chance.
    several = len(np.unique(outcomes)) > 1
    varied = all(np.ptp(d) > 0 for d in difference)
    return {
        "agree": float((outcomes[0] == outcomes[1]).mean()),
        "kappa": float(cohen_kappa_score(*outcomes)) if several else None,
        "spearman": float(spearmanr(*difference).statistic) if varied else None,
    }


def agreements(
    table: dict[str, dict[str, Scores]], baseline: str, tie: float
) -> dict[str, dict[str, float | None]]:
    """Of each two judges, over all prompts and all policies but the baseline."""
    others = [by_judge for policy, by_judge in table.items() if policy != baseline]
    base = table[baseline]
    if not others:
        return {}
    preference = {
        name: np.concatenate([preferences(own[name], base[name], tie) for own in others])
        for name in base
    }
    difference = {
        name: np.concatenate([own[name].scores - base[name].scores for own in others])
        for name in base
    }
    return {
        f"{a}|{b}": agreement((preference[a], preference[b]), (difference[a], difference[b]))
        for a, b in combinations(base, 2)
    }


def diversity(scores: Scores) -> dict[str, float | None]:
    """How long and how diverse a policy's responses are."""
    split = [words(response) for response in scores.responses]
    return {
        "mean_tokens": float(scores.tokens.mean()),
        "distinct_1": distinct(split, 1),
        "distinct_2": distinct(split, 2),
        "self_bleu": self_bleu(split),
    }
