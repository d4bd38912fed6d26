"""The data doctor's checks of tokens: do they say what the rows say, and nothing else?"""

import unicodedata
from collections.abc import Callable, Iterator

import numpy as np

from rotopo.data.doctor import limits
from rotopo.data.doctor.examination import Examination, Finding, Severity, found, graded


def _total(by_split: dict[str, np.ndarray]) -> int:
    """In how many rows of all splits it is so."""
    return sum(map(np.count_nonzero, by_split.values()))


def bos(examined: Examination) -> Iterator[Finding]:
    """Exactly one BOS where the template or the tokenizer writes one, and no other."""
    bos, encoder = examined.bos, examined.encoder
    if bos is None:
        yield Finding("bos", Severity.OK, {"bos token": "none"})
        return
    written = examined.opening.count(bos)
    # Some templates write it at every turn, ChatML's <|im_start|> for one: then only two at once
    # are wrong.
    every_turn = examined.dialogue.count(bos) > written
    names = "rows without", "rows with several", "rows with one inside"
    wrong: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for split, columns in examined.columns.items():
        prompt = columns["prompt"]
        count, twice = prompt.counts[bos], (prompt.first == bos).all(1)
        none = np.zeros(len(count), dtype=bool)
        missing = none if every_turn or not written else prompt.first[:, 0] != bos
        stray = none if every_turn or written else count == 1
        if not every_turn and bos != encoder.end_of_turn_id:
            for column in examined.responses(split).values():
                stray = stray | (column.counts[bos] > 0)
        several = twice if every_turn else count > 1
        for name, rows in zip(names, (missing, several, stray), strict=True):
            wrong[name][split] = rows
    counts = {name: _total(by_split) for name, by_split in wrong.items()}
    where = next((examined.first_row(wrong[name]) for name in names if counts[name]), "")
    yield found(
        "bos",
        graded(any(counts.values()), False),
        {
            "written": "every turn" if every_turn else written,
            **counts,
        },
        "data.chat_template: have it write bos_token once, in front of the first turn, and not "
        f"where the tokenizer adds one; and no text may spell it ({where})",
    )


def end_of_turn(examined: Examination) -> Iterator[Finding]:
    """Every response that is not cut ends with one end of turn, and has no other inside."""
    encoder = examined.encoder
    end = encoder.end_of_turn_id
    total = missing = inside = 0
    wrong: dict[str, np.ndarray] = {}
    for split, columns in examined.columns.items():
        wrong[split] = np.zeros(len(examined.rows[split]), dtype=bool)
        for name, column in examined.responses(split).items():
            there, ended = column.lengths > 0, column.last == end
            whole = columns["prompt"].lengths + column.lengths < encoder.max_length
            unended = there & whole & ~ended
            several = column.counts[end] - ended > 0
            for place in np.flatnonzero(several):
                # A response of several turns has one behind each.
                preference = examined.patient.read(split, int(examined.rows[split][place]))
                turns = {
                    "chosen": preference.chosen,
                    "rejected": preference.rejected,
                    **preference.extra,
                }[name]
                several[place] = column.counts[end][place] > len(turns or [])
            total += int(there.sum())
            missing += int(unended.sum())
            inside += int(several.sum())
            wrong[split] |= unended | several
    yield found(
        "end of turn",
        graded(missing + inside > 0, False),
        {"responses": total, "without": missing, "with more inside": inside},
        "data.chat_template: have it write one end of turn behind every assistant turn, and none "
        f"elsewhere ({examined.first_row(wrong)})",
    )


def pad_and_eos(examined: Examination) -> Iterator[Finding]:
    """The pad token, and an eos that ends no turn, are in no row unless the template writes them.

    What relies on it is other software: ours goes by positions.
    """
    encoder, eos = examined.encoder, examined.eos
    pad = encoder.pad_id
    masks = {
        token: {
            split: np.sum([c.counts[token] for c in columns.values()], axis=0) > 0
            for split, columns in examined.columns.items()
        }
        for token in {pad, pad if eos is None else eos} - {encoder.end_of_turn_id}
    }
    counts = {token: _total(by_split) for token, by_split in masks.items()}
    # The template's own are in every dialogue.
    stray = [t for t, count in counts.items() if count and t not in examined.dialogue]
    numbers: dict[str, int | float | str] = {
        "pad": str(encoder.tokenizer.pad_token),
        "end of turn": str(encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id)),
        "rows with pad": counts[pad],
    }
    if eos is not None and eos not in (pad, encoder.end_of_turn_id):
        numbers["rows with eos"] = counts[eos]
    if pad == eos:
        numbers["pad is eos"] = "yes"
    where = examined.first_row(masks[(stray or [pad])[0]])
    yield found(
        "pad and eos",
        graded(bool(stray), counts[pad] > 0),
        numbers,
        f"data.pad_token: name a token that is in no row ({where}): software that masks the pad "
        "token would leave it out there"
        if not stray or stray == [pad]
        else f"the token eos is inside of turns ({where}): clean the rows",
    )


def empty_responses(examined: Examination) -> Iterator[Finding]:
    """Responses without a token beside the end of turn, and those that show nothing."""
    tokenizer, end = examined.encoder.tokenizer, examined.encoder.end_of_turn_id
    nothing: dict[str, np.ndarray] = {}
    invisible: dict[str, np.ndarray] = {}
    shows: dict[int, bool] = {}
    for split in examined.columns:
        nothing[split] = np.zeros(len(examined.rows[split]), dtype=bool)
        invisible[split] = nothing[split].copy()
        for name, column in examined.responses(split).items():
            nothing[split] |= (column.lengths == 1) & (column.last == end)
            # Nobody writes nothing in many tokens. Each text is decoded once.
            short = (column.lengths > 0) & (column.lengths <= 8) & ~nothing[split]
            for place in np.flatnonzero(short).tolist():
                text = int(column.texts[place])
                if text not in shows:
                    ids = examined.patient.pairs[split][place][name]
                    shows[text] = _visible(str(tokenizer.decode(ids, skip_special_tokens=True)))
                invisible[split][place] |= not shows[text]
    empty, unseen = _total(nothing), _total(invisible)
    yield found(
        "empty responses",
        graded(empty > 0, unseen > 0),
        {"rows with no token": empty, "rows with nothing visible": unseen},
        f"remove these rows ({examined.first_row(nothing if empty else invisible)}), or mend "
        "data.chat_template if it leaves the text out",
    )


def _visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def equal_responses(examined: Examination) -> Iterator[Finding]:
    """Chosen and rejected are the same tokens."""
    same = {
        split: (c["chosen"].texts == c["rejected"].texts) & (c["chosen"].lengths > 0)
        for split, c in examined.columns.items()
    }
    count = _total(same)
    yield found(
        "equal responses",
        graded(count > 0, False),
        {"pairs": count},
        f"remove these rows ({examined.first_row(same)}): there is no preference in them",
    )


def vocabulary(examined: Examination) -> Iterator[Finding]:
    """No token is beyond the model's embedding."""
    encoder, size = examined.encoder, examined.patient.vocabulary
    largest = max(
        *(int(c.largest.max()) for columns in examined.columns.values() for c in columns.values()),
        encoder.pad_id,
        *encoder.stop_ids,
    )
    yield found(
        "vocabulary",
        graded(size is not None and largest >= size, False),
        {
            "model": "not at hand" if size is None else size,
            "tokenizer": len(encoder.tokenizer),
            "largest id": largest,
        },
        "model.policy.path (of a reward model, model.backbone.path): its tokenizer has tokens that "
        "its embedding has no row for: enlarge the embedding, or take the tokenizer it was "
        "trained with",
    )


def positions(examined: Examination) -> Iterator[Finding]:
    """Every row's tokens are at positions that the model has.

    A response's last token is predicted and not read, but for reward models.
    """
    limit = examined.patient.positions
    read = {s: examined.lengths(s) - (not examined.patient.ends) for s in examined.columns}
    if limit is None:
        beyond = {split: np.zeros(len(lengths), dtype=bool) for split, lengths in read.items()}
    else:
        beyond = {split: lengths > limit.count for split, lengths in read.items()}
    count, first = _total(beyond), examined.first_row(beyond)
    yield found(
        "positions",
        graded(limit is not None and limit.end and count > 0, count > 0),
        {
            "model": "no limit known" if limit is None else limit.count,
            "longest row": max(int(lengths.max()) for lengths in read.values()),
            "rows beyond": count,
        },
        ""
        if limit is None
        else f"data.max_length: set it to {limit.count} at most, since the model has no position "
        f"past that ({first})"
        if limit.end
        else f"data.max_length: {limit.count} is as far as the model was made for; past that it "
        f"extrapolates ({first})",
    )


def tokens_as_stored(examined: Examination) -> Iterator[Finding]:
    """Stored tokens are those that the rows give now, on a sample."""
    wrong = []
    for s in examined.sample:
        cut, _ = examined.encoder.truncate(s.whole)
        if (cut.prompt, cut.chosen, cut.rejected) != (
            s.stored.prompt,
            s.stored.chosen,
            s.stored.rejected,
        ):
            wrong.append(s.row)
    yield found(
        "tokens as stored",
        graded(bool(wrong), False),
        {"rows sampled": len(examined.sample), "with other tokens": len(wrong)},
        "data.cache_dir: remove its folder 'tokens', which holds others than the rows give"
        + (f" (row {wrong[0]} of train)" if wrong else ""),
    )


def tokenised_as_a_whole(examined: Examination) -> Iterator[Finding]:
    """What it changes that prompt and response are tokenised apart, on a sample.

    A model generates behind the prompt's own tokens, so ours are those of generation; trainers that
    tokenise the conversation at once may have others.
    """
    encoder, decode = examined.encoder, _decoder(examined)
    responses = prompts = spaces = 0
    splits: list[int] = []
    texts: list[int] = []
    for s in examined.sample:
        written = encoder.write(s.preference)
        for name, _, ids in s.responses:
            responses += 1
            ours = s.whole.prompt + ids
            whole = encoder.encode_whole(written.prompt + written.responses[name])
            if whole == ours:
                continue
            splits.append(s.row)
            prompts += whole[: len(s.whole.prompt)] != s.whole.prompt
            if (a := decode(ours)) != (b := decode(whole)):
                if "".join(a.split()) == "".join(b.split()):
                    spaces += 1
                else:
                    texts.append(s.row)
    first = (texts or splits or [0])[0]
    yield found(
        "tokenised as a whole",
        graded(bool(texts), len(splits) > limits.OTHER_SPLIT * responses or spaces > 0),
        {
            "responses sampled": responses,
            "with other tokens": len(splits),
            "of the prompt": prompts,
            "with other white space": spaces,
            "with another text": len(texts),
        },
        "data.chat_template: end the generation prompt in a special token or a line feed, so that "
        f"no token spans prompt and response (row {first} of train)",
    )


def round_trip(examined: Examination) -> Iterator[Finding]:
    """Tokens spell what the template writes, and the template writes the responses; on a sample."""
    encoder, decode = examined.encoder, _decoder(examined)
    normal = encoder.tokenizer.backend_tokenizer.normalizer

    def normalised(text: str) -> str:
        text = text if normal is None else normal.normalize_str(text)
        return text.strip("▁ \n\t")  # what SentencePiece's put in front goes

    responses = 0
    unspelled: list[int] = []
    unwritten: list[int] = []
    for s in examined.sample:
        written = encoder.write(s.preference)
        for name, turns, ids in s.responses:
            responses += 1
            text = written.prompt + written.responses[name]
            if normalised(text) not in normalised(decode(s.whole.prompt + ids)):
                unspelled.append(s.row)
            elif any(
                normalised(turn.get("content", "")) not in normalised(decode(ids)) for turn in turns
            ):
                unwritten.append(s.row)
    first = (unspelled + unwritten or [0])[0]
    yield found(
        "round trip",
        graded(False, len(unspelled) + len(unwritten) > limits.TEXT_LOST * responses),
        {
            "responses sampled": responses,
            "not spelled by their tokens": len(unspelled),
            "changed by the template": len(unwritten),
        },
        "model.policy.path: its tokenizer cannot spell these texts: take one that can "
        f"(row {first} of train)"
        if unspelled
        else "data.chat_template: it leaves out or changes what responses say "
        f"(row {first} of train)",
    )


def _decoder(examined: Examination) -> Callable[[list[int]], str]:
    tokenizer = examined.encoder.tokenizer
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
