"""Small finished trainings to export, and what export says when it refuses."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from rotopo.cli import run
from rotopo.errors import InputError
from rotopo.export.command import export

QUICK = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
ROTATION = "--model.policy.adapter=rotopo.rotation.RotationConfig"
OFT = "--model.policy.adapter=OFTConfig"


@dataclass
class Run:
    """A finished training, with its module still in memory."""

    cli: object
    folder: Path
    conversations: list[tuple[list[int], list[int]]]  # prompt and response, of held-out pairs

    @property
    def module(self):
        return self.cli.model.eval()

    @torch.no_grad()
    def trained(self) -> list[torch.Tensor]:
        """What the module in memory says, adapter unmerged, each conversation by itself."""
        return answers(self.module.backbone.model, self.conversations)

    def close(self, model) -> None:
        """A model says what was trained, and not what there was before."""
        found = answers(model.eval(), self.conversations)
        for a, b in zip(found, self.trained(), strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.no_grad()
def answers(model, conversations) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([p + r])).logits[0] for p, r in conversations]


def fit(config: Path, *options: str) -> Run:
    cli = run(["fit", f"--config={config}", *options])
    rows = cli.datamodule.rows("test")
    pairs = [rows[i] for i in range(3)]
    ends = -1 if cli.model.needs.ends else None  # behind a response a token that is not its own
    conversations = [(row.prompt, ids[:ends]) for row in pairs for ids in row.responses]
    return Run(cli, Path(cli.trainer.log_dir), conversations)


def tie_embeddings(folder: Path) -> None:
    config = LlamaForCausalLM.from_pretrained(folder).config
    assert not config.tie_word_embeddings
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def refused(*arguments, **settings) -> str:
    with pytest.raises(InputError) as error:
        export(*arguments, **settings)
    return str(error.value)


def copied(one: Run, folder: Path, change=lambda config: None) -> Path:
    """A run's folder with changed settings."""
    folder.mkdir()
    for name in ("hparams.yaml", "metrics.csv"):
        (folder / name).write_bytes((one.folder / name).read_bytes())
    (folder / "checkpoints").symlink_to(one.folder / "checkpoints")
    config = yaml.safe_load((one.folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")
