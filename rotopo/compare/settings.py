"""What a comparison's file says."""

from dataclasses import dataclass, field
from pathlib import Path

from rotopo.errors import InputError

# Without types for what is in it, of which the parser would make objects wherever it names a class.
Settings = dict

# Outcomes that can be read off a measured run.
OUTCOMES = {
    "accuracy": "held-out pairs with h > 0 (ties count half)",
    "margin": "h, the chosen's log-ratio less the rejected's, nats",
    "displacement": "log-ratio of the chosen response, nats a token",
    "score": "the judge's score of drawn responses",
    "length": "tokens of drawn responses",
    "distinct_2": "distinct pairs of words by all pairs of words in drawn responses",
    "self_bleu": "BLEU-4 of each drawn response against the others",
    "effective_rank": "of the last layer's hidden states of held-out pairs",
    "neuron_cosine": "mean |cos| between two neurons of an adapted weight",
    "perplexity": "of the held-out text",
}


@dataclass(frozen=True)
class Choice:
    """How an arm's learning rate is chosen, from the tuning runs.

    Args:
        best: the outcome, of the points within the cap the highest.
        kl_cap: KL(π_θ ‖ π_ref) of the points that count at most, in nats a response; None counts
            all.
    """

    best: str = "accuracy"
    kl_cap: float | None = None


@dataclass(frozen=True)
class Measures:
    """What is measured at each point; see :class:`rotopo.compare.measuring.Measuring`.

    Args:
        points: how many after the one before training.
        prompts: held-out prompts that are responded to.
        samples: responses to each.
        max_new_tokens: tokens of a response at most.
        geometry_pairs: held-out pairs whose hidden states are measured; 0 leaves out effective rank
            and neuron cosine.
        text: a file of held-out text for the perplexity; None leaves it out.
        judge: gives responses their scores: a dotted path, or a class path with its settings.
    """

    points: int = 6
    prompts: int = 50
    samples: int = 2
    max_new_tokens: int = 64
    geometry_pairs: int = 8
    text: str | None = None
    judge: str | Settings | None = None


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        settings: laid over the base, as another file of settings is.
        rates: learning rates to try; None takes the comparison's.
    """

    settings: Settings = field(default_factory=dict)
    rates: list[float] | None = None


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Args:
        base: files for ``rotopo fit``, in their order.
        arms: by name. The first is the one that the others are compared with.
        rates: learning rates to try, the same number for every arm.
        seeds: of the runs that are compared.
        settings: of all arms, laid over the base.
        tuning_seed: of the runs that choose a rate, which is none of the seeds.
        outcome: what the arms are compared by.
        choose: how a rate is chosen.
        measure: what is measured.
        at_once: runs side by side.

    Raises:
        InputError: a setting out of its range, by its name in the file.
    """

    base: list[Path]
    arms: dict[str, Arm]
    rates: list[float]
    seeds: list[int]
    settings: Settings = field(default_factory=dict)
    tuning_seed: int = 0
    outcome: str = "accuracy"
    choose: Choice = field(default_factory=Choice)
    measure: Measures = field(default_factory=Measures)
    at_once: int = 1

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise InputError("arms: a comparison takes two of them at least.")
        if self.tuning_seed in self.seeds:
            raise InputError(
                f"tuning_seed is {self.tuning_seed}, which is one of the seeds: a rate that was "
                "chosen on a run would be judged by it."
            )
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {self.seeds}: name two different ones at least, better 5.")
        for name, value in (("outcome", self.outcome), ("choose.best", self.choose.best)):
            if value not in OUTCOMES:
                raise InputError(f"{name} is {value!r}: it is one of {', '.join(OUTCOMES)}.")
            if value == "score" and self.measure.judge is None:
                raise InputError(f"{name} is 'score': name a judge in measure.judge.")
            if value == "perplexity" and self.measure.text is None:
                raise InputError(f"{name} is 'perplexity': name a file in measure.text.")
        for file in self.base:
            if not file.is_file():
                raise InputError(f"base: there is no file {file}.")
        tries = {len(self.rates_of(name)) for name in self.arms}
        if len(tries) > 1 or 0 in tries:
            raise InputError(
                "rates: every arm is to have as many learning rates to try, 1 or more."
            )
        if self.at_once < 1:
            raise InputError(f"at_once is {self.at_once}: it has to be at least 1.")

    def rates_of(self, arm: str) -> list[float]:
        """The learning rates that an arm is tried with."""
        own = self.arms[arm].rates
        return self.rates if own is None else own
