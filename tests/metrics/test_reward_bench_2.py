"""RewardBench 2's scores, worked out by hand, and of a real test of a tiny reward model."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch

from rotopo.callbacks import PairScores
from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.formats import PLACE
from rotopo.data.reward_bench_2 import pairs
from rotopo.errors import InputError
from rotopo.metrics.reward_bench_2 import reward_bench_2
from rotopo.models.settings import BackboneConfig
from rotopo.reward import RewardModule
from tests.callbacks.test_pair_scores import run_test
from tests.small_run import save_model

# Prompts as (subset, id, rewards of the right responses, of the wrong ones).
BEST_OF_FOUR = [
    ("Math", "0", [2.0], [1.0, 1.5, -3.0]),  # right: 1
    ("Math", "1", [2.0], [2.0, 1.0, 2.0]),  # shared by three: 1/3
    ("Math", "2", [0.0], [1.0, -1.0, -2.0]),  # wrong: 0
    ("Focus", "3", [0.5], [0.5, 0.0, 0.0]),  # shared by two: 1/2
]
TIES = [
    ("Ties", "tied:0", [4.0, 3.0, 3.5], [1.0, 0.0, -1.0, -2.0]),  # spread 1, gap 2
    ("Ties", "ref:0", [3.0], [1.5]),  # gap 1.5
    ("Ties", "tied:1", [4.0, 3.0], [1.0, 0.5, 0.0]),  # spread 1, gap 2
    ("Ties", "ref:1", [1.0], [1.5, 0.0]),  # gap -0.5
    ("Ties", "tied:2", [1.0, 5.0], [2.0]),  # spread 4, gap -1
    ("Ties", "ref:2", [3.0], [0.0]),  # gap 3
    ("Ties", "tied:3", [2.0, 2.0], [1.0]),  # spread 0, gap 1
    ("Ties", "ref:3", [1.0], [0.0]),  # gap 1
    ("Ties", "tied:4", [2.0, 2.0], [2.0]),  # spread 0, gap 0
    ("Ties", "ref:4", [1.0], [0.0]),  # gap 1
    ("Ties", "ref:5", [1.0], [0.0]),  # of which no tied prompt is there
]


def scored(prompts, left_out=()) -> dict:
    """What the pairs of prompts give, with a number of pairs each that hold all responses."""
    places, chosen, rejected = [], [], []
    for number, (subset, name, right, wrong) in enumerate(prompts):
        for k in range(max(len(right), len(wrong))):
            i, j = k % len(right), k % len(wrong)
            place = {
                "subset": subset,
                "id": name,
                "prompt": str(number),
                "chosen": i,
                "rejected": j,
            }
            if (number, k) not in left_out:
                places.append(place | {"correct": len(right), "incorrect": len(wrong)})
                chosen.append(right[i])
                rejected.append(wrong[j])
    return reward_bench_2(places, chosen, rejected)


def test_best_of_four():
    found = scored(BEST_OF_FOUR)
    assert found["scores"] == {"Math": pytest.approx((1 + 1 / 3 + 0) / 3), "Focus": 0.5}
    assert found["prompts"] == {"Math": 3, "Focus": 1}
    assert "ties" not in found


def test_ties():
    found = scored(TIES)
    parts = {
        "tied_accuracy": 3 / 5,  # questions 0, 1 and 3
        "reference_accuracy": 5 / 6,  # all but question 1's
        "preferred": 3 / 5,  # 2 > 1, 2 > 1, 1 > 0
        "preferred_hard": 2 / 5,  # 1.5 > 1 and 1 > 0
        # tanh(1.5 - 1), tanh(-.5 - 1), tanh(-1/4 - 1), tanh(1/0 - 1) = 1, and 0/0 counts 0.
        "margin": (math.tanh(0.5) + math.tanh(-1.5) + math.tanh(-1.25) + 1 + 0) / 5,
    }
    assert found["ties"] == pytest.approx(parts)
    score = 0.3 * (3 / 5 + 5 / 6) + 0.2 * (3 / 5 + 2 / 5) + 0.01 * parts["margin"]
    assert found["scores"] == {"Ties": pytest.approx(score)}


def test_overall_is_of_the_whole_benchmark_only():
    one = [(subset, "0", [1.0], [0.0, 2.0, 0.0]) for subset in ("Factuality", "Precise IF")]
    one += [(subset, "0", [1.0], [0.0] * 3) for subset in ("Math", "Safety", "Focus")]
    whole = [*one, *TIES[:2]]
    ties = 1 + 0.01 * math.tanh(0.5)  # all accuracies and preferences are 1
    found = scored(whole)
    assert found["scores"]["overall"] == pytest.approx((0 + 0 + 1 + 1 + 1 + ties) / 6)
    assert list(found["scores"]) == [
        *("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"),
        "overall",
    ]
    assert "overall" not in scored(one)["scores"]
    # A prompt without one of its responses is left out, and said.
    partly = scored([*whole, ("Math", "1", [1.0], [0.0, 0.0])], left_out=[(7, 1)])
    assert partly["left_out"] == 1
    assert partly["prompts"]["Math"] == 1
    assert "overall" not in partly["scores"]


@pytest.mark.parametrize("name", ["0", "tied:", "other:3", "tied:3"])
def test_ties_of_another_form_are_refused(name):
    with pytest.raises(InputError, match="ids are tied:QUESTION"):
        scored([("Ties", name, [1.0], [0.0])])


def benchmark() -> list[dict]:
    """Rows as the data set has them."""
    words = ("a film", "wit", "no heart", "all of it", "twice", "see", "some", "or not")
    rows = []
    for number, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus") * 2):
        texts = [f"{words[(k + number) % 8]} {number}" for k in range(4)]
        rows.append((subset, str(number), texts[:1], texts[1:]))
    for number in range(2):
        texts = [f"{word} and {number}" for word in words]
        rows.append(("Ties", f"tied:{number}", texts[: 2 + number], texts[4 - number :]))
        rows.append(("Ties", f"ref:{number}", texts[:1], texts[2:5]))
    return [
        {
            "id": name,
            "prompt": f"What of {name} in {subset}?",
            "chosen": chosen,
            "rejected": rejected,
            "num_correct": len(chosen),
            "num_incorrect": len(rejected),
            "total_completions": len(chosen) + len(rejected),
            "models": [""] * (len(chosen) + len(rejected)),
            "subset": subset,
            "additional_metadata": {"category": None},
        }
        for subset, name, chosen, rejected in rows
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "benchmark.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in benchmark()))
    return file


def test_pairs_hold_every_response_and_no_more_than_that_takes(source):
    found = pairs(str(source))
    for number, row in enumerate(benchmark()):
        own = [pair for pair in found if pair[PLACE]["prompt"].endswith(f" {number}")]
        assert len(own) == max(len(row["chosen"]), len(row["rejected"]))
        for name in ("chosen", "rejected"):
            assert {pair[name] for pair in own} == set(row[name])
            assert all(row[name][pair[PLACE][name]] == pair[name] for pair in own)
        assert all(pair["prompt"] == row["prompt"] for pair in own)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "a"}, "field 'chosen': expected a list"),
        ({"rejected": []}, "field 'rejected': expected a list"),
        ({"subset": None}, "there is no 'subset'"),
        ({"chosen": ["a", "b"]}, "only the Ties"),
    ],
)
def test_rows_that_are_not_the_benchmarks_are_named(source, change, reason):
    source.write_text(json.dumps(benchmark()[0] | change) + "\n")
    with pytest.raises(InputError, match=f"row 0 .*{reason}"):
        pairs(str(source))


def test_a_reward_models_test(source, tmp_path, tiny_tokenizer, capsys):
    """Against every response's reward by itself, compared as the benchmark says."""
    model = save_model(tmp_path / "model", tiny_tokenizer)
    torch.manual_seed(0)
    module = RewardModule(BackboneConfig(path=str(model), dtype="float64"))
    module.configure_model()
    source = f"python:rotopo.data.reward_bench_2.pairs:{source}"
    folder, _ = run_test(
        module, model, source, tmp_path / "runs", PairScores(), validation=0.0, test=1.0
    )
    found = json.loads((folder / "test.json").read_text())["reward_bench_2"]

    def reward(prompt: str, response: str) -> float:
        turns = [{"role": "user", "content": prompt}]
        ids = tiny_tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        end = tiny_tokenizer(f"{response}<|im_end|>", add_special_tokens=False)["input_ids"]
        row = TokenizedRow(ids, [[*end, 0]], [Role.CHOSEN], 0)
        with torch.no_grad():
            return module.scorer.eval()(collate([row], 0, "padded", 1.0)).item()

    won: dict[str, list[bool]] = {}
    ties = {}
    for row in benchmark():
        right, wrong = (
            [reward(row["prompt"], text) for text in row[name]] for name in ("chosen", "rejected")
        )
        gap = min(r - w for r, w in product(right, wrong))
        won.setdefault(row["subset"], []).append(gap > 0)
        ties[row["id"]] = gap, max(right) - min(right)
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        assert found["scores"][subset] == sum(won[subset]) / 2
    assert 0 < sum(sum(own) for own in won.values()) < len(benchmark())
    hard = [min(ties[f"tied:{n}"][0], ties[f"ref:{n}"][0]) / ties[f"tied:{n}"][1] for n in (0, 1)]
    preferred = [ties[f"tied:{n}"][0] > ties[f"tied:{n}"][1] for n in (0, 1)]
    score = (
        0.3 * sum(won["Ties"][::2]) / 2
        + 0.3 * sum(won["Ties"][1::2]) / 2
        + 0.1 * sum(preferred)
        + 0.1 * sum(h > 1 for h in hard)
        + 0.005 * sum(math.tanh(h - 1) for h in hard)
    )
    assert found["scores"]["Ties"] == pytest.approx(score, abs=1e-9)
    six = [value for name, value in found["scores"].items() if name != "overall"]
    assert found["scores"]["overall"] == pytest.approx(sum(six) / 6)
    assert found["prompts"]["Ties"] == 4
    shown = capsys.readouterr().out
    assert f"RewardBench 2, Ties {' ' * 2}" in shown
    assert f"RewardBench 2, overall {' ' * 2}" in shown
    assert "columns that nothing reads" not in shown
