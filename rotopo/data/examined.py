"""A run's pairs as the data doctor looks at them."""

from rotopo.data.doctor.examination import Patient
from rotopo.data.one_source import left_out, outcomes
from rotopo.data.pairs import Pairs
from rotopo.pretrained import Positions, vocabulary_size


def patient(pairs: Pairs, positions: Positions | None, ends: bool) -> Patient:
    """What there is to examine.

    Args:
        pairs: divided into splits.
        positions: the model's, if they have a limit.
        ends: whether the model also reads the last token of a response, as reward models do.

    Raises:
        InputError: there is no pair to train on.
    """
    train = pairs.training()
    assert pairs.labelled is not None
    return Patient(
        pairs.encoder,
        {**pairs.of, "train": pairs.labelled},
        train,
        lambda split, row: pairs.preference(split, row, pairs.extra_responses),
        outcomes(pairs.all_sources),
        vocabulary_size(pairs.tokenizer_path),
        next((g for one in pairs.sources if (g := one.settings.group_by)), None),
        positions,
        ends,
        left_out(pairs.all_sources),
        pairs.on_unwritten == "warn",
        pairs.unread_columns(),
    )
