"""The systems that are timed: their training steps on the same pairs and weights."""

import copy
import math
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.integrations.liger import apply_liger_kernel
from trl import DPOConfig, DPOTrainer

from rotopo.data.batch import Layout, PairBatch, TokenizedRow, collate
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.objectives import DPO
from rotopo.rotation import RotationConfig
from tools.bench.setting import Setting

BETA = 0.1
LEARNING_RATE = 1e-4
CLIP = 1.0
# What a profile calls clipping, AdamW and the removal of gradients.
OPTIMISER = "optimiser"

_MODULES = ["q_proj", "v_proj"]
LORA = "LoRA r=8"
ROTATION = "rotation"
FULL = "full"
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    LORA: partial(LoraConfig, r=8, lora_alpha=16, target_modules=_MODULES),
    ROTATION: partial(RotationConfig, target_modules=_MODULES),
    "OFT": partial(OFTConfig, target_modules=_MODULES),
    "OFT, exact Cayley": partial(OFTConfig, use_cayley_neumann=False, target_modules=_MODULES),
    "BOFT": partial(BOFTConfig, boft_block_size=8, target_modules=_MODULES),
    "HRA r=8": partial(HRAConfig, r=8, target_modules=_MODULES),
}


class Entry(NamedTuple):
    """A row of a table; the first row is what the others are compared with.

    ``attention`` is that of a rotopo row, None for the one that the command line or the default
    names.
    """

    peer: str
    adapter: str = LORA
    reference: str = "online"
    attention: str | None = None


class Peer(ABC):
    """One system's training step.

    Attributes:
        model: what trains.
        frozen: the reference's copy of the model, where the system keeps one.
        batches: the setting's, as the system takes them; with the reference's log-probs if cached.
    """

    model: nn.Module
    frozen: nn.Module | None
    optimizer: torch.optim.Optimizer
    batches: list[Any]

    @abstractmethod
    def prepare(self, rows: list[TokenizedRow]) -> Any:
        """The batch, on its device, with the reference's log-probs if cached; not timed.

        For the log-probs, the model still has to be the reference.
        """

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """Tokens of one forward pass over the batch, padding included."""

    @abstractmethod
    def backward(self, batch: Any) -> Tensor:
        """Add the gradients of the pairs' mean DPO loss; returns the loss."""

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, batch: Any) -> float:
        loss = self.backward(batch)
        with record_function(OPTIMISER):
            nn.utils.clip_grad_norm_(self.trained().values(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()  # on a GPU this waits for the whole step


class Rotopo(Peer):
    def __init__(self, setting: Setting, entry: Entry, layout: Layout) -> None:
        adapter = None if entry.adapter == FULL else ADAPTERS[entry.adapter]()
        config = PolicyConfig(setting.model, adapter, setting.dtype, **setting.policy)
        if entry.attention:
            config = replace(config, attention=entry.attention)
        if "compiled" in entry.peer:
            config = replace(config, compile=True)
        adamw = partial(torch.optim.AdamW, lr=LEARNING_RATE)
        self.module = DPO(BETA, policy=config, optimizer=adamw)
        model = setting.load_model(config.attention)
        self.policy = Policy.build(model, config, needs_reference=True).to(setting.device).train()
        self.module.policy, self.model = self.policy, self.policy.model
        self.frozen = self.policy.reference
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.setting, self.layout, self.folder = setting, layout, None
        if entry.reference == "cached":
            self.folder = tempfile.TemporaryDirectory()
            self.policy.open_cache(self.folder.name)

    def prepare(self, rows: list[TokenizedRow]) -> PairBatch:
        batch = collate(rows, self.setting.pad_id, self.layout, loss_scale=1 / len(rows))
        if self.folder is not None:
            self.policy.cache_reference([batch])
        return batch.to(self.setting.device)

    def tokens(self, batch: PairBatch) -> int:
        return batch.input_ids.numel()

    def backward(self, batch: PairBatch) -> Tensor:
        loss = self.module.training_step(batch, 0)["loss"]
        loss.backward()
        return loss.detach()


class Plain(Peer):
    """DPO as one writes it by hand: chosen and rejected in one padded batch, whole logits."""

    def __init__(self, setting: Setting, entry: Entry) -> None:
        self.setting, self.cached = setting, entry.reference == "cached"
        self.model = setting.load_model()
        self.frozen = None
        if entry.adapter != FULL:
            self.model = get_peft_model(self.model, ADAPTERS[entry.adapter]())
        elif not self.cached:
            self.frozen = copy.deepcopy(self.model).requires_grad_(False)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.trained().values(), lr=LEARNING_RATE)

    def prepare(self, rows: list[TokenizedRow]) -> dict[str, Tensor]:
        lines = [(row.prompt, row.responses[k]) for k in (0, 1) for row in rows]
        T = max(len(prompt) + len(response) for prompt, response in lines)
        ids = torch.full((len(lines), T), self.setting.pad_id)
        attention = torch.zeros(len(lines), T, dtype=torch.long)
        response_mask = torch.zeros(len(lines), T, dtype=torch.bool)
        for i, (prompt, response) in enumerate(lines):
            end = len(prompt) + len(response)
            ids[i, :end] = torch.tensor(prompt + response)
            attention[i, :end] = 1
            response_mask[i, len(prompt) : end] = True
        batch = {"ids": ids, "attention": attention, "response": response_mask}
        batch = {name: tensor.to(self.setting.device) for name, tensor in batch.items()}
        return batch | ({"reference": self.reference(batch)} if self.cached else {})

    @torch.no_grad()
    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                return self.log_probs(self.model, batch)
        return self.log_probs(self.frozen or self.model, batch)

    def tokens(self, batch: dict[str, Tensor]) -> int:
        return batch["ids"].numel()

    def log_probs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["ids"], attention_mask=batch["attention"]).logits
        log_p = logits[:, :-1].float().log_softmax(-1)
        tokens = log_p.gather(2, batch["ids"][:, 1:, None]).squeeze(2)
        return (tokens * batch["response"][:, 1:]).sum(1)

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        reference = batch["reference"] if self.cached else self.reference(batch)
        chosen, rejected = (self.log_probs(self.model, batch) - reference).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        return loss.detach()


class Trl(Peer):
    """TRL's own trainer and training step, with the settings of the others."""

    def __init__(self, setting: Setting, entry: Entry) -> None:
        self.folder = tempfile.TemporaryDirectory()
        cached, full = entry.reference == "cached", entry.adapter == FULL
        args = DPOConfig(
            output_dir=self.folder.name,
            beta=BETA,
            bf16=False,  # the weights are in the dtype asked for; this would add autocast
            use_cpu=setting.device == "cpu",
            gradient_checkpointing=False,
            precompute_ref_log_probs=cached,
            max_length=None,
            optim="adamw_torch",
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            report_to="none",
            disable_tqdm=True,
            **setting.trl,
        )
        self.trainer = DPOTrainer(
            model=setting.load_model(),
            # By itself it would load it again from the model's name, which a random shape lacks.
            ref_model=setting.load_model() if full and not cached else None,
            args=args,
            # It insists on tokenising a text; the batches come through its collator from our ids.
            train_dataset=Dataset.from_dict(
                {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}
            ),
            processing_class=setting.tokenizer,
            peft_config=None if full else ADAPTERS[entry.adapter](),
        )
        self.trainer.current_gradient_accumulation_steps = 1  # as its loop would set it
        if args.use_liger_kernel:  # likewise
            apply_liger_kernel(self.trainer.model, args.liger_kernel_config)
        self.model, self.frozen = self.trainer.model, self.trainer.ref_model
        if "compiled" in entry.peer:
            self.model.compile()
        self.optimizer = self.trainer.create_optimizer()

    def prepare(self, rows: list[TokenizedRow]) -> dict[str, Tensor]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [dict(zip(names, (r.prompt, *r.responses), strict=True)) for r in rows]
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(examples))
        if self.trainer.precompute_ref_logps:
            chosen, rejected = self.trainer.compute_ref_log_probs(self.model, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return inputs

    def tokens(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].numel()

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.trainer.training_step(self.model, batch)


def build(entry: Entry, setting: Setting) -> Peer:
    """A peer with its batches, a little away from its reference.

    Adapters of one kind, and full models, have the same weights in all peers.
    """
    built: Peer
    if entry.peer.startswith("trl"):
        built = Trl(setting, entry)
    elif entry.peer == "plain":
        built = Plain(setting, entry)
    else:
        built = Rotopo(setting, entry, "padded" if "padded" in entry.peer else setting.layout)
    built.batches = [built.prepare(rows) for rows in setting.batches]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(built.trained().items()):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if entry.adapter in (LORA, ROTATION):  # they start at random, in each peer elsewhere
                parameter.copy_(0.05 * noise)
            elif entry.adapter == FULL:
                parameter.mul_(1 + 0.02 * noise)
            else:
                parameter.add_(0.05 * noise)
    return built


def check_losses(peers: dict[Entry, Peer]) -> None:
    """Stop unless all peers compute the same loss to float32's rounding, and not merely ln 2.

    Raises:
        SystemExit: they do not.
    """
    losses = {}
    for entry, peer in peers.items():
        losses[entry] = peer.backward(peer.batches[0]).item()
        peer.optimizer.zero_grad()
    spread = max(losses.values()) - min(losses.values())
    if not spread <= 1e-4 or not abs(max(losses.values()) - math.log(2)) > 1e-3:
        sys.exit(f"The peers do not compute the same loss, or only ln 2: {losses}")


def checked(entry: Entry, setting: Setting) -> Peer:
    """A rotopo row by itself; in float32 its first loss is that of the plain step."""
    if setting.dtype == "float32":
        first = replace(setting, batches=setting.batches[:1])
        check_losses({e: build(e, first) for e in (entry, entry._replace(peer="plain"))})
    return build(entry, setting)
