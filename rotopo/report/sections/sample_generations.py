"""Sample prompts with every policy's response, and its scores."""

from rotopo.errors import InputError
from rotopo.report.inputs import Inputs
from rotopo.report.page import Answer, Comparison, Comparisons, Section, with_minus
from rotopo.report.parts import prompt_text, spread

ORDER = 80


def section(inputs: Inputs) -> Section:
    answers, verdicts = inputs.answers, inputs.verdicts
    if not answers:
        return Section("Sample generations", [])
    shared = sorted(set.intersection(*(set(own) for own in answers.values())))
    scores = {}
    if verdicts is not None:
        known = verdicts.scores
        keys = zip(known.row, known.policy, known.judge, strict=True)
        scores = dict(zip(keys, known.score, strict=True))
    items = []
    for i in spread(len(shared), inputs.samples):
        row = shared[i]
        prompts = [own[row].prompt for own in answers.values()]
        if any(prompt != prompts[0] for prompt in prompts):
            raise InputError(
                f"responses: row {row} has different prompts in the files of "
                f"{', '.join(answers)}: give responses to the same data."
            )
        cards = []
        for name, own in answers.items():
            notes = [f"{own[row].tokens} tokens"]
            for judge in [] if verdicts is None else verdicts.judges:
                if (row, name, judge) in scores:
                    notes.append(f"{judge} {with_minus(scores[row, name, judge], 2)}")
            cards.append(Answer(name, notes, own[row].text))
        items.append(Comparison(f"Prompt of row {row}", prompt_text(prompts[0]), cards))
    if not items:
        return Section("Sample generations", [])
    caption = f"{len(items)} of {len(shared):,} prompts, evenly spaced over the rows, not picked."
    return Section("Sample generations", [Comparisons(caption, items)])
