"""Rows with one response beside pairs; KTO's baseline and BCO's shift."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed

from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import BCO, KTO, SFT
from tests.objectives.cases import OBJECTIVES, baseline, log_probs, losses_of, some

UNPAIRED = ["KTO", "BCO", "NCA", "SPPO", "APO-zero"]


def values(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def split(pairs: PairLogProbs) -> PairLogProbs:
    """Every pair as two rows of one response, the chosen ones first; 0 for what is missing."""
    B, zero = len(pairs.chosen), torch.zeros_like(pairs.chosen)

    def first(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, zero])

    def last(tensor: Tensor) -> Tensor:
        return torch.cat([zero, tensor])

    return log_probs(
        first(pairs.chosen),
        last(pairs.rejected),
        first(pairs.reference_chosen),
        last(pairs.reference_rejected),
        pairs.chosen_length.tolist() + [0] * B,
        [0] * B + pairs.rejected_length.tolist(),
        mismatched_log_ratio=pairs.mismatched_log_ratio,
    )


def test_only_these_take_unpaired_rows():
    assert {name for name, objective in OBJECTIVES.items() if not objective.needs.pairs} == {
        *UNPAIRED,
        "SFT",
    }


@pytest.mark.parametrize("name", UNPAIRED)
def test_a_split_pair_is_worth_the_pair(name):
    """KTO takes the mean over a row's responses, the others their sum, as TRL's pairs."""
    pairs = some()
    objective = OBJECTIVES[name]
    whole, halves = losses_of(objective, pairs), losses_of(objective, split(pairs))
    chosen, rejected = halves.chunk(2)
    total = chosen + rejected
    torch.testing.assert_close(whole, total / 2 if name == "KTO" else total)
    if name == "KTO":
        torch.testing.assert_close(whole.mean(), halves.mean())


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize(("w", "l"), [([2, 3], [0, 0]), ([0, 0], [2, 3])])
def test_a_missing_response_has_no_gradient(name, w, l):  # noqa: E741
    there, missing = values([-3, -4]), values([0, 0])
    base, none = there - 1, torch.zeros_like(there)
    c, r, c0, r0 = (there, missing, base, none) if w[0] else (missing, there, none, base)
    c.requires_grad_()
    r.requires_grad_()
    ratios = values([3, -1, 4])
    found = losses_of(OBJECTIVES[name], log_probs(c, r, c0, r0, w, l, mismatched_log_ratio=ratios))
    found.sum().backward()
    assert there.grad.all()
    assert not missing.grad.any()


def test_sft_does_not_count_rows_without_a_chosen_response():
    one, none = values([-3]), values([0])
    assert SFT().losses(log_probs(none, one, none, one, [0], [2])).item() == 0


def test_ktos_baseline_is_the_clamped_mean_of_other_prompts_log_ratios():
    objective = KTO(0.3)
    for ratios, expected in (([10, -4], 0.3 * 3), ([-10, 4], 0), ([0], 0), ([1, 2, 6], 0.9)):
        one = values([-3])
        pairs = log_probs(one, one, one, one, mismatched_log_ratio=values(ratios))
        assert baseline(objective, pairs).item() == pytest.approx(expected)


def test_ktos_baseline_has_no_gradient():
    ratios = values([1, 4]).requires_grad_()
    c = values([-3]).requires_grad_()
    one = c.detach()
    found = losses_of(KTO(0.3), log_probs(c, one, one, one, mismatched_log_ratio=ratios))
    to_chosen, to_ratios = torch.autograd.grad(found.sum(), (c, ratios), allow_unused=True)
    assert to_ratios is None
    sigma = torch.sigmoid(values([-0.75]))
    torch.testing.assert_close(to_chosen, -0.3 * sigma * (1 - sigma) / 2)


def test_ktos_value_function_is_that_of_gains_and_losses_around_the_baseline():
    """λ_y − v of the paper's eq. 7; at the baseline both kinds are worth half."""
    one, at = values([-3]), values([-3 + 0.6 / 0.3])
    pairs = log_probs(at, at, one, one, mismatched_log_ratio=values([2]))
    objective = KTO(0.3, desirable_weight=1.4, undesirable_weight=0.6)
    assert losses_of(objective, pairs).item() == pytest.approx((1.4 / 2 + 0.6 / 2) / 2)


def pairs_with(chosen: list[float], rejected: list[float]) -> PairLogProbs:
    """Log-ratios as given, over a reference at −5."""
    base = torch.full((len(chosen),), -5.0, dtype=torch.float64)
    return log_probs(base + values(chosen), base + values(rejected), base, base)


def test_bcos_shift_is_the_mean_of_both_kinds_mean_rewards_over_steps():
    objective = BCO(0.5)
    assert objective.shift == 0
    objective.observe(pairs_with([1, 3], [-2, 0]), step_ended=True)
    assert objective.shift.item() == pytest.approx(0.5 * (2 - 1) / 2)
    objective.observe(pairs_with([8], [4]), step_ended=True)
    assert objective.shift.item() == pytest.approx(0.5 * (4 + 2 / 3) / 2)
    shifted = losses_of(objective, pairs_with([2], [1])).item()
    delta = 0.5 * (4 + 2 / 3) / 2
    expected = -torch.nn.functional.logsigmoid(values([0.5 * 2 - delta, delta - 0.5])).sum()
    assert shifted == pytest.approx(expected.item())


def test_bcos_shift_does_not_depend_on_how_a_step_is_cut_and_moves_only_between_steps():
    whole, cut = BCO(0.5), BCO(0.5)
    start = some(9)
    for step in range(3):
        rows = [split(some(9, seed=step)), pairs_with([1, 2, step], [0, -1, -2])]
        # One micro-batch that is both, or three that are its parts.
        everything = log_probs(
            *(
                torch.cat([getattr(part, name) for part in rows]).detach()
                for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")
            ),
            torch.cat([part.chosen_length for part in rows]).tolist(),
            torch.cat([part.rejected_length for part in rows]).tolist(),
        )
        whole.observe(everything, step_ended=True)
        before = cut.shift.clone()
        cut.observe(rows[1].detach(), step_ended=False)
        assert cut.shift == before
        cut.observe(rows[0].detach(), step_ended=True)
        assert cut.shift != before
        torch.testing.assert_close(whole.shift, cut.shift)
        torch.testing.assert_close(losses_of(whole, start), losses_of(cut, start))


def test_bcos_shift_moves_with_the_optimisers_steps():
    objective = BCO(0.5)
    objective.trainer = Trainer(
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    batches = iter([some(seed=i) for i in range(4)])

    def policy(batch, needs, compared):
        return next(batches)

    policy.router = None
    policy.starts_at_reference = False
    objective.policy = policy
    shifts = []
    for i in range(4):
        objective.training_step(SimpleNamespace(loss_scale=1.0), i)
        shifts.append(objective.shift.item())
    assert shifts[0] == 0
    assert shifts[1] == shifts[2] != 0
    assert shifts[3] != shifts[2]


def test_bcos_missing_responses_do_not_count_in_the_shift():
    objective = BCO(0.5)
    objective.observe(split(pairs_with([1, 3], [-2, 0])), step_ended=True)
    assert objective.shift.item() == pytest.approx(0.5 * (2 - 1) / 2)
    only_chosen = BCO(0.5)
    one, zero = values([-3]), values([0])
    only_chosen.observe(log_probs(one, zero, one - 2, zero, [2], [0]), step_ended=True)
    assert only_chosen.shift.item() == pytest.approx(0.5 * 2 / 2)


def test_bcos_shift_has_no_gradient_and_can_be_left_out():
    plain = BCO(0.5, reward_shift=False)
    plain.observe(pairs_with([5], [5]), step_ended=True)
    assert plain.shift == 0
    assert "reward_sums" in BCO().state_dict()  # a checkpoint has it
    objective = BCO(0.5)
    objective.observe(some(), step_ended=True)
    assert not objective.shift.requires_grad


def _on_a_rank(rank: int, file: str, results) -> None:
    distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    one = torch.full((1,), -3.0, dtype=torch.float64)
    ratios = [values([8, 6]), values([-2])][rank]
    pairs = log_probs(one, one, one, one, mismatched_log_ratio=ratios)
    shifted = BCO(0.5)
    shifted.observe(pairs_with(*[([1, 3], [-2, 0]), ([8], [4])][rank]), step_ended=True)
    results.put((baseline(KTO(0.3), pairs).item(), shifted.shift.item()))
    distributed.destroy_process_group()


def test_baseline_and_shift_are_over_the_responses_of_all_ranks(tmp_path: Path):
    """Not the mean of the ranks' means: ranks may hold different numbers of them."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_on_a_rank, args=(rank, str(tmp_path / "store"), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    for z0, shift in found:
        assert z0 == pytest.approx(0.3 * 4)
        assert shift == pytest.approx(0.5 * (4 + 2 / 3) / 2)
