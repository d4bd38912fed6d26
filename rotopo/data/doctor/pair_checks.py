"""The data doctor's checks of pairs: what they are as data to learn from."""

import itertools
from collections.abc import Iterator

import numpy as np

from rotopo.data.doctor import limits
from rotopo.data.doctor.examination import Examination, Finding, Severity, found, graded
from rotopo.intervals import wilson_interval

_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}


def roles(examined: Examination) -> Iterator[Finding]:
    """Prompts whose turns are in an unusual order, on a sample."""
    odd: dict[str, list[int]] = {
        "begin with the assistant": [],
        "with a late system turn": [],
        "with two user turns in a row": [],
        "with an unknown role": [],
    }
    for s in examined.sample:
        roles = [message["role"] for message in s.preference.prompt]
        for rows, is_odd in zip(
            odd.values(),
            (
                roles[0] == "assistant",
                "system" in roles[1:],
                ("user", "user") in itertools.pairwise(roles),
                not set(roles) <= _ROLES,
            ),
            strict=True,
        ):
            if is_odd:
                rows.append(s.row)
    first = min((rows[0] for rows in odd.values() if rows), default=0)
    n = len(examined.sample)
    yield found(
        "roles",
        graded(False, any(len(rows) > limits.ODD_ROLES * n for rows in odd.values())),
        {"prompts sampled": n, **{name: len(rows) for name, rows in odd.items()}},
        f"data.format: see whether it reads the turns as they are meant (row {first} of train)",
    )


def short_prompts(examined: Examination) -> Iterator[Finding]:
    """Prompts of which the template writes all but a token at most."""
    encoder, template = examined.encoder, len(examined.opening) - 1
    # A prompt that is cut has lost what the template writes in front of the content, but for one
    # leading BOS.
    other = encoder.encode_prompt([{"role": "user", "content": "b"}])
    behind = 0
    while examined.opening[-1 - behind] == other[-1 - behind]:
        behind += 1
    bos = examined.bos
    kept = behind + (examined.opening[0] == bos and examined.dialogue.count(bos) == 1)
    short = {
        split: columns["prompt"].lengths <= np.where(examined.at_limit(split), kept, template) + 1
        for split, columns in examined.columns.items()
    }
    count, total = (sum(map(f, short.values())) for f in (np.count_nonzero, len))
    yield found(
        "short prompts",
        graded(False, count > limits.SHORT_PROMPTS * total),
        {"prompts": total, "of a token or none": count, "share": count / total},
        f"see whether data.source has its prompts ({examined.first_row(short)}), and that "
        "data.max_length leaves them room",
    )


def truncation(examined: Examination) -> Iterator[Finding]:
    """What max_length takes away; tokens lost are measured on a sample of the rows at the limit."""
    outcomes, encoder = examined.patient.outcomes, examined.encoder
    total = sum(outcomes.values())
    prompts, responses, too_long = (
        outcomes[name] / total for name in ("prompt_cut", "response_cut", "too_long")
    )
    bad = outcomes["bad"] / total
    numbers: dict[str, int | float | str] = {
        "rows": total,
        "prompts cut": outcomes["prompt_cut"],
        "responses cut": outcomes["response_cut"],
        "dropped as too long": outcomes["too_long"],
        "dropped as bad": outcomes["bad"],
    }
    sample = examined.sampled(examined.at_limit("train"))
    if outcomes["prompt_cut"] + outcomes["response_cut"] and sample:
        for name, parts in (
            ("prompt", [(len(s.whole.prompt), len(s.stored.prompt)) for s in sample]),
            (
                "response",
                [
                    (
                        len(s.whole.chosen + s.whole.rejected),
                        len(s.stored.chosen + s.stored.rejected),
                    )
                    for s in sample
                ],
            ),
        ):
            before, after = (sum(lengths) for lengths in zip(*parts, strict=True))
            numbers[f"share of {name} tokens lost there"] = 1 - after / before
    kept = total - outcomes["too_long"] - outcomes["bad"]
    everything = outcomes["response_cut"] == kept
    yield found(
        "truncation",
        graded(
            everything,
            prompts > limits.PROMPTS_CUT
            or responses > limits.RESPONSES_CUT
            or too_long > limits.TOO_LONG
            or bad > limits.BAD_ROWS,
        ),
        numbers,
        "data.on_bad_row: set it to 'error' to see what is wrong with the rows"
        if bad > limits.BAD_ROWS and not everything
        else f"data.max_length: {encoder.max_length} tokens are few for these rows: raise it"
        + (" (every response is cut, so that none ends)" if everything else ""),
    )


def difference_left(examined: Examination) -> Iterator[Finding]:
    """Pairs with a cut response whose two responses hardly differ in what is left."""
    end, columns = examined.encoder.end_of_turn_id, examined.columns["train"]
    chosen, rejected = columns["chosen"], columns["rejected"]
    paired = (chosen.lengths > 0) & (rejected.lengths > 0)
    if not paired.any():
        return
    cut = paired & examined.at_limit("train") & ((chosen.last != end) | (rejected.last != end))
    little = np.zeros(len(cut), dtype=bool)
    for place in np.flatnonzero(cut).tolist():
        pair = examined.patient.pairs["train"][place]
        shared = 0
        for a, b in zip(pair["chosen"], pair["rejected"], strict=False):
            if a != b:
                break
            shared += 1
        little[place] = (
            max(len(pair["chosen"]), len(pair["rejected"])) - shared <= limits.FEW_TOKENS
        )
    share = little.sum() / paired.sum()
    yield found(
        "difference left",
        graded(share >= limits.NO_DIFFERENCE, share > limits.LITTLE_DIFFERENCE),
        {
            "pairs": int(paired.sum()),
            "with a cut response": int(cut.sum()),
            f"of these with {limits.FEW_TOKENS} tokens of difference at most": int(little.sum()),
            "share": float(share),
        },
        "data.max_length: raise it; responses that begin alike are cut before they differ "
        f"({examined.first_row({'train': little})})",
    )


def duplicates(examined: Examination) -> Iterator[Finding]:
    """Training pairs that come again, and those that also come with the other label.

    Of unpaired rows: a response that is called desirable and undesirable.
    """
    pairs, swapped = _triples(examined, "train")
    known = set(pairs)
    again = len(pairs) - len(known)
    contradictory = np.array([pair in known for pair in swapped])
    yield found(
        "duplicates",
        graded(False, again > limits.DUPLICATES * len(pairs) or bool(contradictory.any())),
        {
            "pairs": len(pairs),
            "copies of another": again,
            "also there with the other label": int(contradictory.sum()),
        },
        "data.source: remove copies"
        if not contradictory.any()
        else "data.source: choose a label, or train with an objective for noisy pairs (ROPO, rDPO) "
        f"({examined.first_row({'train': contradictory})})",
    )


def leakage(examined: Examination) -> Iterator[Finding]:
    """Held-out prompts and pairs that are also trained on, token by token."""
    trained = set(_triples(examined, "train")[0])
    prompts = set(examined.prompts["train"].tolist())
    for split in examined.columns:
        if split == "train":
            continue
        pairs, swapped = _triples(examined, split)
        shared = np.array([prompt in prompts for prompt, _, _ in pairs])
        same = sum(pair in trained for pair in pairs)
        other = sum(pair in trained for pair in swapped)
        group_by = examined.patient.group_by
        yield found(
            f"leakage to {split}",
            graded(False, shared.sum() > limits.SHARED_PROMPTS * len(pairs) or same + other > 0),
            {
                "pairs": len(pairs),
                "with a prompt of train": int(shared.sum()),
                "that are in train": same,
                "with the other label in train": other,
            },
            (
                "data.group_by: name a column that is the same for the same prompt"
                if group_by is None
                else f"data.group_by: {group_by} differs for the same prompt: name another column"
            )
            + "; it works with fractions in data.validation and data.test, not with splits of "
            f"the source ({examined.first_row({split: shared})})",
        )


def _triples(
    examined: Examination, split: str
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Prompt, chosen and rejected of each pair, by number; and the same with the other label."""
    columns, prompt = examined.columns[split], examined.prompts[split].tolist()
    chosen, rejected = (columns[name].texts.tolist() for name in ("chosen", "rejected"))
    return (
        list(zip(prompt, chosen, rejected, strict=True)),
        list(zip(prompt, rejected, chosen, strict=True)),
    )


def _drawn_lengths(examined: Examination) -> tuple[np.ndarray, np.ndarray]:
    from rotopo.data.rows import pair_lengths

    return pair_lengths(examined.patient.drawn)


def labels(examined: Examination) -> Iterator[Finding]:
    """How unpaired rows divide, and what noise has flipped."""
    chosen, rejected = _drawn_lengths(examined)
    desirable, undesirable = int((rejected == 0).sum()), int((chosen == 0).sum())
    if desirable + undesirable:
        share = desirable / (desirable + undesirable)
        low, high = limits.DESIRABLE
        yield found(
            "label balance",
            graded(False, not low <= share <= high),
            {"desirable": desirable, "undesirable": undesirable, "share desirable": share},
            "model.desirable_weight and model.undesirable_weight (KTO): make them balance the two",
        )
    if "flipped" in examined.patient.drawn.column_names:
        flipped = np.asarray(examined.patient.drawn.with_format("numpy")["flipped"][:])
        yield Finding(
            "label noise",
            Severity.OK,
            {"labels": len(flipped), "flipped": int(flipped.sum()), "share": float(flipped.mean())},
        )


def length_bias(examined: Examination) -> Iterator[Finding]:
    """How well "the longer response is the better one" does, on pairs of unequal length."""
    chosen, rejected = _drawn_lengths(examined)
    paired = (chosen > 0) & (rejected > 0)
    if not paired.any():
        return
    difference = (chosen - rejected)[paired]
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    share = longer / max(1, longer + shorter)
    low, high = wilson_interval(share, longer + shorter)
    lowest, highest = limits.LONGER_IS_BETTER
    yield found(
        "length bias",
        graded(False, low > highest or high < lowest),
        {
            "pairs": len(difference),
            "chosen longer": longer,
            "chosen shorter": shorter,
            "mean difference": float(difference.mean()),
            "accuracy of the longer": share,
            "from": low,
            "to": high,
        },
        "data.balance_lengths, or an objective that takes length out (SimPO, SamPO, LDDPO, "
        "LengthRegularizedDPO; of a reward model length_alpha or length_penalty)",
    )
