"""A mixture is the weighted sum of its parts, in every step of their lives."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.policy import PolicyConfig
from rotopo.objectives import BCO, DPO, KTO, SFT, TPO, TYPO, Mixture, SamPO, SimPO
from tests.objectives.cases import OBJECTIVES, losses_of, rewards_of, some


def test_the_loss_is_the_weighted_sum_of_all_objectives_and_the_rewards_are_the_firsts():
    parts = [part for name, part in OBJECTIVES.items() if name != "Mixture"]
    weights = [0.1 * (i + 1) for i in range(len(parts))]
    mixture = Mixture(parts, weights)
    values = some()
    expected = sum(w * losses_of(part, values) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(losses_of(mixture, values), expected)
    for ours, firsts in zip(rewards_of(mixture, values), rewards_of(parts[0], values), strict=True):
        assert torch.equal(ours, firsts)


def test_weights_are_1_when_not_given():
    values = some()
    plain = losses_of(Mixture([DPO(0.3), SFT()]), values)
    torch.testing.assert_close(plain, DPO(0.3).losses(values) + SFT().losses(values))


def test_needs_are_the_union_of_the_parts():
    assert Mixture([SFT(), SimPO()]).needs == Needs(reference=False)
    assert Mixture([SFT(), BCO()]).needs == Needs(pairs=False)
    assert Mixture([SFT(), DPO(wpo=True)]).needs == Needs(moments=True)
    roles = (Role.MISMATCHED, Role.REFERENCE_SAMPLE, Role.GOLD)
    assert Mixture([TPO(), KTO(), TYPO()]).needs == Needs(roles=roles)


def test_running_values_of_a_part_move_and_are_saved():
    part = BCO()
    mixture = Mixture([DPO(), part])
    mixture.observe(some().detach(), step_ended=True)
    assert part.shift != 0
    (name,) = [name for name in mixture.state_dict() if name.endswith("reward_sums")]
    assert name in mixture.saved_names()


def test_a_part_observes_with_what_it_was_handed():
    class Sees(BCO):
        def observe(self, log_probs, step_ended):
            self.seen = self.losses(log_probs)

    part, values = Sees(), some()
    mixture = Mixture([KTO(), part])
    mixture.observe(mixture.complete(values).detach(), step_ended=True)
    assert torch.equal(part.seen, losses_of(part, values))


def test_a_part_knows_the_epoch():
    """SamPO draws afresh in each."""
    part = SamPO(0.3)
    mixture = Mixture([SFT(), Mixture([part])])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    mixture.trainer = trainer
    values = some()
    first = losses_of(part, values)
    trainer.fit_loop.epoch_progress.current.completed = 1
    assert part.current_epoch == mixture.current_epoch == 1
    assert not torch.equal(losses_of(part, values), first)


def test_what_a_part_refuses_the_mixture_refuses():
    mixture = Mixture([SFT(), KTO()])
    trainer = Trainer(
        accelerator="cpu",
        accumulate_grad_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.datamodule = SimpleNamespace(batching=SimpleNamespace(pairs_per_step=4))
    mixture.trainer = trainer
    with pytest.raises(InputError, match="z0"):
        mixture.on_train_start()


def test_parts_with_a_policy_or_an_optimiser_of_their_own_are_refused():
    for part in (DPO(policy=PolicyConfig(path="x")), DPO(optimizer=torch.optim.SGD)):
        with pytest.raises(InputError, match="belong to the mixture"):
            Mixture([part])
