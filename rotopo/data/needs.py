"""What an objective asks of data and policy."""

from dataclasses import dataclass

from rotopo.data.batch import Role


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the policy and of the data.

    Attributes:
        reference: log-probs under the reference.
        pairs: both responses in every row; objectives without it also take rows with one.
        moments: Σp² of every next-token distribution (WPO's weights).
        roles: responses beside the chosen and the rejected. With ``REFERENCE_SAMPLE`` comes
            KL(π_ref ‖ π_θ) along that response.
        ends: the hidden state of every response's last token (reward models), for which a token
            is put behind it that is never read.
        margins: takes what the chosen has to be better by (``data.margin``).
    """

    reference: bool = True
    pairs: bool = True
    moments: bool = False
    roles: tuple[Role, ...] = ()
    ends: bool = False
    margins: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.reference or other.reference,
            self.pairs or other.pairs,
            self.moments or other.moments,
            tuple(sorted({*self.roles, *other.roles})),
            self.ends or other.ends,
            self.margins or other.margins,
        )
