"""Every objective that TRL 1.16 has beside TRL's own, on the same weights and token ids.

Loss and the gradients of every weight are compared. Where ours differs on purpose, a test of its
own shows that it agrees where the two should, and that the difference is the one that we state.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.models.log_probs import PairLogProbs
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.objectives import (
    AOT,
    APO,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    LDDPO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    TPO,
    AlphaPO,
    DiscoPOP,
    Mixture,
    RobustDPO,
    SimPO,
    SLiC,
)
from rotopo.objectives.base import PreferenceModule
from tests.models.families import make
from tests.objectives.cases import baseline, losses_of, rewards_of
from tests.objectives.trl_side import (
    LAYOUTS,
    PAIRS,
    difference,
    encode,
    gradients,
    largest,
    lora,
    moved_policy,
    real_model_and_pairs,
    trl_inputs,
    trl_trainer,
)

B = 0.3

# TRL's settings, and ours.
DPO_LOSSES: dict[str, tuple[dict[str, Any], PreferenceModule]] = {
    "sigmoid": ({"loss_type": ["sigmoid"]}, DPO(B)),
    "hinge": ({"loss_type": ["hinge"]}, SLiC(B)),
    "ipo": ({"loss_type": ["ipo"]}, IPO(B)),
    "exo_pair": ({"loss_type": ["exo_pair"], "label_smoothing": 0.01}, EXO(B, 0.01)),
    "nca_pair": ({"loss_type": ["nca_pair"]}, NCA(B)),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.2}, RobustDPO(B, 0.2)),
    "bco_pair": ({"loss_type": ["bco_pair"]}, BCO(B, reward_shift=False)),
    "sppo_hard": ({"loss_type": ["sppo_hard"]}, SPPO(B)),
    "aot": ({"loss_type": ["aot"], "label_smoothing": 0.2}, AOT(B, label_smoothing=0.2)),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"]}, AOT(B, paired=False)),
    "apo_zero": ({"loss_type": ["apo_zero"]}, APO(B)),
    "apo_down": ({"loss_type": ["apo_down"]}, APO(B, "down")),
    # Ten times the default τ: the gradient has the rounding of TRL's float32 log-probs over τ.
    "discopop": ({"loss_type": ["discopop"], "discopop_tau": 0.5}, DiscoPOP(B, 0.5)),
    "sigmoid_norm": ({"loss_type": ["sigmoid_norm"]}, DPO(B, normalise_length=True)),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, DPO(B, divergence="forward_kl")),
    "js": ({"f_divergence_type": "js_divergence"}, DPO(B, divergence="js")),
    "alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
        DPO(B, divergence="alpha", divergence_alpha=0.6),
    ),
    "alpha-1": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        DPO(B, divergence="alpha", divergence_alpha=1.0),
    ),
    "js-normalised": (
        {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid_norm"]},
        DPO(B, divergence="js", normalise_length=True),
    ),
    "ld_alpha": ({"ld_alpha": 0.4}, LDDPO(B, 0.4)),
    "ld_alpha-0": ({"ld_alpha": 0.0}, LDDPO(B, 0.0)),
    "wpo": ({"use_weighting": True}, DPO(B, wpo=True, wpo_clamp=False)),
    "mixture": (
        {"loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.2, 0.1]},
        Mixture([DPO(B), BCO(B, reward_shift=False), IPO(B)], [0.8, 0.2, 0.1]),
    ),
}
CPO_LOSSES: dict[str, tuple[dict[str, Any], PreferenceModule]] = {
    "cpo": ({"loss_type": "sigmoid", "beta": B, "cpo_alpha": 0.0}, CPO(B, likelihood_weight=0.0)),
    "slic": (
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.0},
        SLiC(reference=False),
    ),
    "simpo": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
        SimPO(2.0, 0.8),
    ),
    "alphapo": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0, "alpha": 0.2},
        AlphaPO(2.0, 0.8, 0.2),
    ),
}
# Where TRL's likelihood is a mean over the batch's tokens: its weight comes third.
LIKELIHOODS: dict[str, tuple[str, dict[str, Any], PreferenceModule, float]] = {
    "sft": ("dpo", {"loss_type": ["sft"]}, SFT(), 1.0),
    "mpo": (
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5], "beta": B},
        Mixture([DPO(B), SFT()], [0.8, 0.5]),
        0.5,
    ),
    "cpo": ("cpo", {"loss_type": "sigmoid", "beta": B, "cpo_alpha": 0.7}, CPO(B, 0.7), 0.7),
    "slic": (
        "cpo",
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.7},
        SLiC(reference=False, likelihood_weight=0.7),
        0.7,
    ),
    "cpo-simpo": (
        "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.7},
        Mixture([SimPO(2.0, 0.8), SFT()], [1.0, 0.7]),
        0.7,
    ),
    "tpo": ("tpo", {"loss_type": "sigmoid", "beta": B, "tpo_alpha": 0.7}, TPO(B, 0.7), 0.7),
    "tpo-l": (
        "tpo",
        {"loss_type": "tpo-l", "beta": 2.0, "tpo_alpha": 0.7, "tpo_l_gamma": 0.8},
        TPO(2.0, 0.7, "mean", 0.8),
        0.7,
    ),
}

MeanLoss = Callable[[PreferenceModule, PairLogProbs], Tensor]


def mean_loss(objective: PreferenceModule, log_probs: PairLogProbs) -> Tensor:
    return losses_of(objective, log_probs).mean()


@dataclass
class Bench:
    """A policy, the model that it comes from, and a place for TRL."""

    model: PreTrainedModel
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    rows: list[TokenizedRow]
    folder: Path
    adapter: Any = None

    def trainer(self, kind: str, **settings: Any) -> Trainer:
        return trl_trainer(
            kind, self.policy, self.model, self.adapter, self.tokenizer, self.folder, **settings
        )

    def log_probs(self, objective: PreferenceModule, rows, layout="packed") -> PairLogProbs:
        batch = collate(rows, self.tokenizer.pad_token_id, layout, 1.0)
        return self.policy(batch, objective.needs)

    def compare(
        self,
        trainer: Trainer,
        objective: PreferenceModule,
        rows: list[TokenizedRow],
        loss: MeanLoss = mean_loss,
    ) -> None:
        """Loss and all gradients, ours in both layouts."""
        theirs = loss_and_gradients(trainer, rows)
        for layout in LAYOUTS:
            ours = loss(objective, self.log_probs(objective, rows, layout))
            ours.backward()
            assert_same((ours.item(), gradients(self.policy.model)), theirs)


LossAndGradients = tuple[float, dict[str, Tensor]]


def loss_and_gradients(trainer: Trainer, rows: list[TokenizedRow]) -> LossAndGradients:
    loss = trainer.compute_loss(trainer.model, trl_inputs(trainer, rows))
    loss.backward()
    return loss.item(), gradients(trainer.model)


def assert_same(
    ours: LossAndGradients, theirs: LossAndGradients, of_gradients: float = 1e-5
) -> None:
    assert abs(ours[0] - theirs[0]) <= 1e-5 * max(1, abs(theirs[0]))
    size = largest(theirs[1].values())
    assert size > 1e-4
    assert difference(ours[1], theirs[1]) <= of_gradients * size


def cut(rows: list[TokenizedRow], tokens: int) -> list[TokenizedRow]:
    """Responses of so many tokens at most."""
    return [
        replace(row, responses=[response[:tokens] for response in row.responses]) for row in rows
    ]


@pytest.fixture
def bench(tiny_tokenizer, tmp_path) -> Bench:
    """Every weight of a tiny model trains."""
    model = make("llama", torch.float64, vocab_size=len(tiny_tokenizer))
    # TRL takes log-probs in float32 whatever the model's type, and adds them up: short responses
    # keep its rounding small.
    rows = cut(encode(PAIRS, tiny_tokenizer), 12)
    return Bench(model, moved_policy(model, None), tiny_tokenizer, rows, tmp_path)


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_losses_of_dpotrainer(name, bench):
    settings, objective = DPO_LOSSES[name]
    bench.compare(bench.trainer("dpo", beta=B, **settings), objective, bench.rows)


@pytest.mark.parametrize("name", CPO_LOSSES)
def test_losses_of_cpotrainer(name, bench):
    settings, objective = CPO_LOSSES[name]
    bench.compare(bench.trainer("cpo", **settings), objective, bench.rows)


def with_mismatched(rows: list[TokenizedRow], unpaired: bool) -> list[TokenizedRow]:
    """Each row brings the responses of the row before along; unpaired, rows 1 and 4 are bad."""
    if unpaired:
        rows = [
            replace(row, responses=[row.responses[i in (1, 4)]], roles=[Role(i in (1, 4))])
            for i, row in enumerate(rows)
        ]
    before = [rows[i - 1].responses for i in range(len(rows))]
    return [
        replace(
            row,
            responses=row.responses + others,
            roles=row.roles + [Role.MISMATCHED] * len(others),
        )
        for row, others in zip(rows, before, strict=True)
    ]


def other_way_round(bench: Bench) -> Bench:
    """Policy and reference exchanged, which turns the sign of every log-ratio."""
    model = copy.deepcopy(bench.policy.language_model)
    policy = Policy.build(copy.deepcopy(model), PolicyConfig(), needs_reference=True)
    policy.model.load_state_dict(bench.model.state_dict())
    return replace(bench, model=model, policy=policy)


@pytest.mark.parametrize("unpaired", [False, True])
def test_kto(unpaired, bench):
    """With a baseline above zero, and with one that is clamped."""
    objective = KTO(B, desirable_weight=1.3, undesirable_weight=0.8)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    rows = with_mismatched(bench.rows, unpaired)
    clamped = []
    for side in (bench, other_way_round(bench)):
        clamped.append(baseline(objective, side.log_probs(objective, rows)).item() == 0)
        trainer = side.trainer("kto", beta=B, per_device_train_batch_size=2, **weights)
        side.compare(trainer, objective, rows)
    assert sorted(clamped) == [False, True]


def test_apo_zero_of_unpaired_rows(bench):
    rows = with_mismatched(bench.rows, unpaired=True)
    trainer = bench.trainer("kto", beta=B, loss_type="apo_zero_unpaired")
    bench.compare(trainer, APO(B), rows)


# Where ours differs, see the objectives' docstrings.


def with_gold(rows: list[TokenizedRow], kind: str) -> list[TokenizedRow]:
    """TPO's third response: that of the row before."""
    if kind != "tpo":
        return rows
    return [
        replace(row, responses=[*row.responses, rows[i - 1].responses[0]],
                roles=[*row.roles, Role.GOLD])
        for i, row in enumerate(rows)
    ]  # fmt: skip


def imitated(kind: str, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """Log-probs and lengths of the responses whose likelihood is raised."""
    if kind == "tpo":
        return log_probs.gold, log_probs.gold_length
    return log_probs.chosen, log_probs.chosen_length


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_agree_where_lengths_are_equal(name, bench):
    kind, settings, objective, _ = LIKELIHOODS[name]
    bench.compare(bench.trainer(kind, **settings), objective, with_gold(cut(bench.rows, 3), kind))


def over_tokens(kind: str, weight: float) -> MeanLoss:
    """Ours with TRL's likelihood: a mean over the batch's tokens, not over its responses."""

    def loss(objective: PreferenceModule, log_probs: PairLogProbs) -> Tensor:
        total, length = imitated(kind, log_probs)
        difference = (total / length).mean() - total.sum() / length.sum()
        assert abs(difference) > 1e-3
        return mean_loss(objective, log_probs) + weight * difference

    return loss


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_elsewhere_trl_weighs_tokens_alike_and_ours_responses(name, bench):
    kind, settings, objective, weight = LIKELIHOODS[name]
    rows = with_gold(bench.rows, kind)
    bench.compare(bench.trainer(kind, **settings), objective, rows, over_tokens(kind, weight))


def over_prompts_too(bench: Bench) -> MeanLoss:
    """ORPO with TRL's likelihood: of all tokens that follow another, the prompts' among them."""
    whole = [
        TokenizedRow(row.prompt[:1], [row.prompt[1:] + row.responses[0]], [Role.CHOSEN], row.row)
        for row in bench.rows
    ]

    def loss(objective: PreferenceModule, log_probs: PairLogProbs) -> Tensor:
        ratio = mean_loss(objective, log_probs) + log_probs.chosen_mean.mean()
        everything = bench.log_probs(objective, whole)
        return ratio - everything.chosen.sum() / everything.chosen_length.sum()

    return loss


def test_orpos_ratio_term_is_trls_whose_likelihood_also_covers_the_prompt(bench):
    bench.compare(bench.trainer("orpo", beta=0.4), ORPO(0.4), bench.rows, over_prompts_too(bench))


def test_trls_sigmoid_does_not_read_label_smoothing(bench):
    trainer = bench.trainer("dpo", beta=B, label_smoothing=0.2)
    bench.compare(trainer, DPO(B), bench.rows)
    smoothed = mean_loss(DPO(B, 0.2), bench.log_probs(DPO(), bench.rows))
    plain = mean_loss(DPO(B), bench.log_probs(DPO(), bench.rows))
    assert abs(smoothed - plain) > 1e-2


def test_cdpo_is_trls_smoothed_aot_of_a_single_pair(bench):
    trainer = bench.trainer("dpo", beta=B, label_smoothing=0.2, loss_type=["aot"])
    for row in bench.rows:
        bench.compare(trainer, DPO(B, label_smoothing=0.2), [row])


def test_ipo_of_sums_is_trls_of_n_tokens_at_n_beta_n_squared_times(bench):
    """(n·h̄ − 1/(2β))² = n²(h̄ − 1/(2nβ))²; of unequal lengths they have nothing in common."""
    n = 3
    trainer = bench.trainer("dpo", beta=n * B, loss_type=["ipo"])
    bench.compare(
        trainer, IPO(B, "sum"), cut(bench.rows, n), lambda *given: mean_loss(*given) / n**2
    )
    both = [
        mean_loss(IPO(B, normalise), bench.log_probs(IPO(), bench.rows)).item()
        for normalise in ("sum", "mean")
    ]
    assert abs(both[0] - both[1]) > 1e-2


def test_bco_is_trls_until_its_shift_has_moved(bench):
    trainer = bench.trainer("dpo", beta=B, loss_type=["bco_pair"])
    objective = BCO(B)
    bench.compare(trainer, objective, bench.rows)
    log_probs = bench.log_probs(objective, bench.rows).detach()
    objective.observe(log_probs, step_ended=True)
    chosen, rejected = rewards_of(objective, log_probs)
    shift = (chosen.mean() + rejected.mean()) / 2
    moved = replace(
        log_probs, chosen=log_probs.chosen - shift / B, rejected=log_probs.rejected - shift / B
    )
    assert abs(shift) > 1e-2
    without = BCO(B, reward_shift=False)
    torch.testing.assert_close(losses_of(objective, log_probs), losses_of(without, moved))


def likely(bench: Bench, row: TokenizedRow) -> TokenizedRow:
    """With the responses that follow the policy's two favourite first tokens."""
    responses = []
    for place in range(2):
        ids = list(row.prompt)
        for step in range(4):
            with torch.no_grad():
                logits = bench.policy.language_model(torch.tensor([ids])).logits[0, -1]
            ids.append(logits.topk(2).indices[0 if step else place].item())
        responses.append(ids[len(row.prompt) :])
    return replace(row, responses=responses)


def test_wpos_clamp_is_where_trls_weights_pass_1(bench):
    """Elsewhere the clamped loss is TRL's too; there TRL's is the weight times ours."""
    rows = [likely(bench, row) if i % 2 else row for i, row in enumerate(bench.rows)]
    log_probs = bench.log_probs(DPO(wpo=True), rows).detach()
    plain = DPO(B).losses(log_probs)
    weights = DPO(B, wpo=True, wpo_clamp=False).losses(log_probs) / plain
    above = weights > 1
    assert above.any()
    assert not above.all()
    trainer = bench.trainer("dpo", beta=B, use_weighting=True)
    clamped = DPO(B, wpo=True).losses(log_probs)
    for row, mine, own, is_above in zip(rows, clamped, plain, above, strict=True):
        theirs, _ = loss_and_gradients(trainer, [row])
        if is_above:
            torch.testing.assert_close(mine, own)
            assert theirs > mine.item() * 1.001
        else:
            assert theirs == pytest.approx(mine.item(), rel=1e-5)


@pytest.mark.slow
def test_all_of_them_of_a_real_model_on_real_pairs(tmp_path):
    """In float64: the rounding of a real vocabulary's log-probs does not cancel in all losses."""
    model, tokenizer, rows = real_model_and_pairs(1500)
    model, rows = model.double(), rows[:2]
    adapter = lora(layers_to_transform=[28, 29])
    torch.manual_seed(1)
    bench = Bench(model, moved_policy(model, adapter), tokenizer, rows, tmp_path, adapter)
    unpaired, golden = with_mismatched(rows, unpaired=True), with_gold(rows, "tpo")
    # The weights stay as they are, so ours are computed once.
    of_pairs = bench.log_probs(DPO(wpo=True), rows)
    of_unpaired, of_golden = bench.log_probs(KTO(), unpaired), bench.log_probs(TPO(), golden)

    def compare(
        kind: str,
        settings: dict[str, Any],
        objective: PreferenceModule,
        loss: MeanLoss = mean_loss,
    ) -> None:
        trl_rows, log_probs = {
            "kto": (unpaired, of_unpaired),
            "tpo": (golden, of_golden),
        }.get(kind, (rows, of_pairs))
        theirs = loss_and_gradients(bench.trainer(kind, **settings), trl_rows)
        gc.collect()  # TRL's trainers refer to themselves, and each holds a model
        ours = loss(objective, log_probs)
        ours.backward(retain_graph=True)
        # TRL takes log-probs in float32, and how that rounds is the processor's affair: 1.3e-5 on
        # one with AMX.
        assert_same((ours.item(), gradients(bench.policy.model)), theirs, of_gradients=5e-5)

    for settings, objective in DPO_LOSSES.values():
        compare("dpo", {"beta": B} | settings, objective)
    compare("kto", {"beta": B, "per_device_train_batch_size": 2}, KTO(B))
    compare("kto", {"beta": B, "loss_type": "apo_zero_unpaired"}, APO(B))
    for settings, objective in CPO_LOSSES.values():
        compare("cpo", settings, objective)
    for kind, settings, objective, weight in LIKELIHOODS.values():
        compare(kind, settings, objective, over_tokens(kind, weight))
    compare("orpo", {"beta": 0.4}, ORPO(0.4), over_prompts_too(bench))
