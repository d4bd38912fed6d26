"""The judge: win rates and agreement, from files to files."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from rotopo.cli import main
from rotopo.errors import InputError
from rotopo.files import to_jsonl
from rotopo.judge.command import judge
from rotopo.judge.comparison import agreement, preferences
from rotopo.judge.scores import Scores
from rotopo.report.command import report


def scored(responses: list[str], scores: list[float]) -> Scores:
    tokens = np.array([len(text.split()) for text in responses])
    return Scores(list(range(len(scores))), responses, tokens, np.array(scores))


def test_preferences_with_ties():
    own = scored(["a", "b", "c", "same", "e"], [1.0, 0.5, 0.0, 9.0, 0.3])
    base = scored(["v", "w", "x", "same", "z"], [0.0, 0.5, 1.0, 2.0, 0.2])
    assert preferences(own, base).tolist() == [1, 0.5, 0, 0.5, 1]
    assert preferences(own, base, tie=0.2).tolist() == [1, 0.5, 0, 0.5, 0.5]


def test_agreement_by_hand():
    # Wins, ties, losses: 3 of 5 the same; by chance .4·.6 + .2·.2 + .4·.2 = .36.
    one, other = np.array([1, 1, 0.5, 0, 0]), np.array([1, 1, 1, 0, 0.5])
    differences = np.array([2.0, 1, 0, -1, -2]), np.array([20.0, 10, 1, -30, 0])
    found = agreement((one, other), differences)
    assert found["agree"] == pytest.approx(0.6)
    assert found["kappa"] == pytest.approx((0.6 - 0.36) / (1 - 0.36))
    # Ranks 5 4 3 2 1 and 5 4 3 1 2: 1 - 6·2 / (5·24).
    assert found["spearman"] == pytest.approx(0.9)


def test_agreement_where_there_is_nothing_to_compare():
    same = np.ones(3)
    assert agreement((same, same), (same, same)) == {"agree": 1, "kappa": None, "spearman": None}
    never = agreement((same, 0 * same), (same, np.arange(3)))
    assert never == {"agree": 0, "kappa": 0, "spearman": None}


N = 30


def write_scores(folder: Path) -> dict[str, dict[str, Path]]:
    """Two judges and three policies; B says the same as base to a third of the prompts."""
    generator = np.random.default_rng(0)
    responses = {
        policy: [
            f"{policy} says {i} " + "very " * int(generator.integers(6)) + "well" for i in range(N)
        ]
        for policy in ("base", "A", "B")
    }
    responses["B"][:10] = responses["base"][:10]
    scores: dict[str, dict[str, Path]] = {}
    for policy, texts in responses.items():
        quality = generator.normal(size=N) + (policy == "A")
        for name, noise in (("one", 0.1), ("two", 1.0)):
            values = quality + noise * generator.normal(size=N)
            lines = [
                {
                    "row": 2 * i,
                    "prompt": [{"role": "user", "content": f"question {i}"}],
                    "response": text,
                    "tokens": len(text.split()),
                    "score": float(values[i]),
                }
                for i, text in enumerate(texts)
            ]
            file = folder / f"{policy}.{name}.jsonl"
            file.write_text(to_jsonl(lines), "utf-8")
            scores.setdefault(policy, {})[name] = file
    return scores


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def values(file: Path, field: str) -> np.ndarray:
    return np.array([line[field] for line in read(file)])


def test_the_whole_comparison(tmp_path, capsys):
    scores = write_scores(tmp_path)
    (tmp_path / "perplexity.json").write_text('{"perplexity": 12.5}')
    judge(
        scores=scores,
        baseline="base",
        output=tmp_path / "out",
        perplexity={"A": tmp_path / "perplexity.json"},
    )
    found = json.loads((tmp_path / "out" / "judge.json").read_text("utf-8"))
    assert found["baseline"] == "base"
    assert found["prompts"] == N
    assert found["judges"] == ["one", "two"]
    assert list(found["policies"]) == ["base", "A", "B"]
    for policy, by_judge in scores.items():
        for name, file in by_judge.items():
            result = found["policies"][policy]["judges"][name]
            own, base = values(file, "score"), values(scores["base"][name], "score")
            same = values(file, "response") == values(scores["base"][name], "response")
            wins, losses = (own > base) & ~same, (own < base) & ~same
            assert result["wins"] == wins.sum()
            assert result["losses"] == losses.sum()
            assert result["ties"] == same.sum()
            assert result["win_rate"] == pytest.approx((wins.sum() + same.sum() / 2) / N)
            assert result["mean_score"] == pytest.approx(own.mean())
            assert result["mean_difference"] == pytest.approx((own - base).mean())
            for value, interval in (
                ("mean_score", "score_interval"),
                ("mean_difference", "difference_interval"),
                ("win_rate", "interval"),
                ("length_controlled_win_rate", "length_controlled_interval"),
            ):
                low, high = result[interval]
                assert low <= result[value] <= high
    a = found["policies"]["A"]["judges"]["one"]
    # A paired interval is near 1.96 standard errors of the mean of the differences.
    difference = values(scores["A"]["one"], "score") - values(scores["base"]["one"], "score")
    low, high = a["difference_interval"]
    assert high - low == pytest.approx(2 * 1.96 * difference.std() / math.sqrt(N), rel=0.1)
    same = found["policies"]["base"]["judges"]["two"]
    assert (same["win_rate"], same["length_controlled_win_rate"], same["ties"]) == (0.5, 0.5, N)
    assert same["interval"] == same["length_controlled_interval"] == [0.5, 0.5]
    settings = {name: found[name] for name in ("level", "tie", "resamples", "seed")}
    assert settings == {"level": 0.95, "tie": 0.0, "resamples": 2000, "seed": 0}
    texts = found["policies"]["A"]["texts"]
    assert texts["mean_tokens"] == pytest.approx(values(scores["A"]["one"], "tokens").mean())
    assert texts["perplexity"] == 12.5
    assert 0 < texts["distinct_1"] < texts["distinct_2"] < 1
    assert 0 < texts["self_bleu"] < 1
    assert "perplexity" not in found["policies"]["B"]["texts"]
    outcomes = {
        name: np.concatenate(
            [
                np.where(
                    values(scores[p][name], "response") == values(scores["base"][name], "response"),
                    0,
                    np.sign(
                        values(scores[p][name], "score") - values(scores["base"][name], "score")
                    ),
                )
                for p in ("A", "B")
            ]
        ).astype(int)
        for name in ("one", "two")
    }
    assert found["agreement"].keys() == {"one|two"}
    expected = cohen_kappa_score(outcomes["one"], outcomes["two"])
    assert found["agreement"]["one|two"]["kappa"] == pytest.approx(expected)
    with (tmp_path / "out" / "judge_scores.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 * N
    assert {(t["row"], t["tokens"]) for t in table if t["policy"] == "A"} == {
        (str(line["row"]), str(line["tokens"])) for line in read(scores["A"]["one"])
    }
    assert sum(float(t["score"]) for t in table) == pytest.approx(
        sum(values(file, "score").sum() for files in scores.values() for file in files.values())
    )
    printed = capsys.readouterr().out
    assert "30 prompts, win rates against base, 95% intervals" in printed
    assert f"{a['win_rate']:.3f}" in printed
    low, high = a["length_controlled_interval"]
    below = f"{a['length_controlled_win_rate']:.3f}\n *{low:.3f} to {high:.3f}\n"
    assert re.search(below, printed)
    assert "No win rate at equal length" not in printed


def test_a_policy_that_is_always_longer_has_a_dash(tmp_path, capsys):
    scores = write_scores(tmp_path)
    for file in scores["A"].values():
        lines = [line | {"tokens": 20 + i} for i, line in enumerate(read(file))]
        file.write_text(to_jsonl(lines), "utf-8")
    out = tmp_path / "out"
    judge(scores=scores, baseline="base", output=out, level=0.9, resamples=50, seed=3)
    found = json.loads((out / "judge.json").read_text("utf-8"))
    assert [found[name] for name in ("level", "resamples", "seed")] == [0.9, 50, 3]
    verdict = found["policies"]["A"]["judges"]["one"]
    assert verdict["length_controlled_win_rate"] is None
    assert verdict["length_controlled_interval"] is None
    printed = capsys.readouterr().out
    assert "win rates against base, 90% intervals" in printed
    assert len(re.findall(r"^A .* –$", printed, re.MULTILINE)) == 2
    assert "No win rate at equal length (–) where a policy's responses are all longer" in printed
    report(tmp_path / "page.html", judge=out)


@pytest.mark.slow
def test_the_order_of_lines_does_not_count(tmp_path):
    scores = write_scores(tmp_path)
    judge(scores=scores, baseline="base", output=tmp_path / "before")
    for file in scores["A"].values():
        file.write_text(to_jsonl(read(file)[::-1]), "utf-8")
    judge(scores=scores, baseline="base", output=tmp_path / "after")
    for name in ("judge.json", "judge_scores.csv"):
        assert (tmp_path / "before" / name).read_text() == (tmp_path / "after" / name).read_text()


def test_prompts_as_text_are_the_users_turn(tmp_path):
    scores = write_scores(tmp_path)
    for file in scores["A"].values():
        lines = [line | {"prompt": line["prompt"][0]["content"]} for line in read(file)]
        file.write_text(to_jsonl(lines), "utf-8")
    judge(scores=scores, baseline="base", output=tmp_path / "out")


@pytest.mark.slow
def test_from_the_command_line_and_from_a_file(tmp_path):
    scores = write_scores(tmp_path)
    arguments = ["--baseline=base", f"--output={tmp_path / 'out'}", "--tie=0.1"]
    for policy, files in scores.items():
        inner = ", ".join(f"{name}: {file}" for name, file in files.items())
        arguments += [f"--scores.{policy}", f"{{{inner}}}"]
    main(["judge", *arguments])
    config = {
        "scores": {p: {j: str(f) for j, f in files.items()} for p, files in scores.items()},
        "baseline": "base",
        "output": str(tmp_path / "other"),
        "tie": 0.1,
    }
    (tmp_path / "judge.yaml").write_text(json.dumps(config))
    main(["judge", "--config", str(tmp_path / "judge.yaml")])
    first, second = (
        json.loads((tmp_path / d / "judge.json").read_text()) for d in ("out", "other")
    )
    assert first == second
    assert set(first["policies"]) == {"base", "A", "B"}


def test_bad_input_ends_the_command_with_its_message(tmp_path, capsys):
    file = tmp_path / "torn.jsonl"
    file.write_text('{"row": 0, "prom')
    with pytest.raises(SystemExit) as ended:
        main(["judge", f"--scores.A={{one: {file}}}", "--baseline=A", f"--output={tmp_path}"])
    assert ended.value.code == 2
    assert f"{file}, line 1: torn off in the middle" in capsys.readouterr().err


def drop_line(lines):
    del lines[4]


def other_prompt(lines):
    lines[4]["prompt"] = "another"


def other_response(lines):
    lines[4]["response"] = "another"


def twice(lines):
    lines.append(lines[4])


def no_score(lines):
    del lines[4]["score"]


def infinite(lines):
    lines[4]["score"] = math.inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_line, r"A\.two\.jsonl: 1 prompts are missing, row 8 .*base\.one\.jsonl, line 5"),
        (other_prompt, r"A\.two\.jsonl, line 5: row 8 has another prompt than .*line 5"),
        (other_response, r"A\.two\.jsonl, line 5: another response than .*A\.one\.jsonl, line 5"),
        (twice, r"A\.two\.jsonl, line 31: row 8 stands in .*line 5 already"),
        (no_score, r"A\.two\.jsonl, line 5: field 'score' has to be a number"),
        (infinite, r"A\.two\.jsonl, line 5: .*Infinity is no finite number"),
    ],
)
def test_unsuitable_files_are_named_with_their_line(tmp_path, spoil, message):
    scores = write_scores(tmp_path)
    lines = read(scores["A"]["two"])
    spoil(lines)
    scores["A"]["two"].write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with pytest.raises(InputError, match=message):
        judge(scores=scores, baseline="base", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda t: t[:-20], r"line 30: torn off in the middle"),
        (lambda t: t.replace('"row": 8,', '"row": 8', 1), r"line 5: not JSON"),
        (lambda t: t + "3\n", r"line 31: a JSON object is needed"),
        (lambda t: "", r"holds no line"),
    ],
)
def test_torn_and_broken_files(tmp_path, text, message):
    scores = write_scores(tmp_path)
    file = scores["base"]["one"]
    file.write_text(text(file.read_text("utf-8")), "utf-8")
    with pytest.raises(InputError, match=message):
        judge(scores=scores, baseline="base", output=tmp_path / "out")


def test_settings_that_do_not_fit(tmp_path):
    scores = write_scores(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="baseline: 'C' is none of the policies base, A, B"):
        judge(scores=scores, baseline="C", output=out)
    with pytest.raises(InputError, match="tie is -1"):
        judge(scores=scores, baseline="base", output=out, tie=-1)
    with pytest.raises(InputError, match="level is 95"):
        judge(scores=scores, baseline="base", output=out, level=95)
    with pytest.raises(InputError, match="perplexity: 'C'"):
        judge(scores=scores, baseline="base", output=out, perplexity={"C": out})
    with pytest.raises(InputError, match="not what the Perplexity callback writes"):
        judge(scores=scores, baseline="base", output=out, perplexity={"A": scores["A"]["one"]})
    with pytest.raises(InputError, match="none: cannot be read"):
        judge(
            scores={**scores, "A": {**scores["A"], "two": tmp_path / "none"}},
            baseline="base",
            output=out,
        )
    with pytest.raises(InputError, match=r"scores\.A has the judges one, and"):
        judge(scores={**scores, "A": {"one": scores["A"]["one"]}}, baseline="base", output=out)
