"""What ``rotopo test`` finds out about pairs: metrics, and every pair with its scores."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rotopo.callbacks.yardstick import yardstick_rows
from rotopo.data.batch import PairBatch, Role
from rotopo.data.formats import PLACE
from rotopo.data.messages import Message, text_of
from rotopo.devices import for_float64
from rotopo.files import to_json, to_jsonl, write_whole
from rotopo.metrics.rewards import RewardMetrics
from rotopo.metrics.yardstick import COLUMNS, columns
from rotopo.models.log_probs import sum_of_role
from rotopo.run.folder import folder_of
from rotopo.run.lightning import data_of

_TITLES = {
    "accuracy": "accuracy",
    "reward_mean": "reward mean",
    "reward_std": "reward standard deviation",
    "chosen_mean": "chosen mean",
    "rejected_mean": "rejected mean",
    "auroc": "AUROC",
    "ece": "calibration error (ECE)",
    "length_correlation": "length-reward correlation",
    "length_rank_correlation": "the same, of ranks",
    "length_matched_accuracy": "accuracy at matched lengths",
}
# What the table has by other names: of rewards, and of log-ratios to the reference.
_SAME = (
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracy")),
    *(f"yardstick/{name}" for name in ("margin", "accuracy", "displaced")),
    *(
        f"yardstick/log_ratio{per}/{name}"
        for per in ("", "_per_token")
        for name in ("chosen", "rejected")
    ),
    "displacement/chosen_up",
    "displacement/rejected_down",
    *(f"yardstick/kl_per_token/on_data/{name}" for name in ("forward", "reverse")),
)
_SHOWN = 60  # characters of a text in the printed sample


class PairScores(Callback):
    """Metrics of the rewards of all test pairs, for reward models and preference objectives.

    In the run's folder it writes ``test.json`` (see
    :func:`rotopo.metrics.rewards.reward_metrics`, and of policies under ``yardstick``
    :func:`rotopo.metrics.yardstick.yardstick`) and ``test_pairs.jsonl``, a line for each
    pair with its scores, lengths in tokens and texts; each appears only when it is whole. It logs
    the single numbers as ``test/accuracy``, ``test/auroc`` and so on, and prints a table and some
    pairs. Of several sets all numbers are also each set's own. Accuracy is also taken by the groups
    of ``data.accuracy_by``, and the interval over those of ``data.group_by``. Silent where no row
    holds a pair.

    Args:
        samples: how many pairs to print, evenly spaced over the split.

    Attributes:
        told: names of metrics that the table has, whoever has logged them.
    """

    def __init__(self, samples: int = 4) -> None:
        self.samples = samples
        self.metrics: RewardMetrics | None = None
        self.told: set[str] = set()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        data = data_of(trainer)

        def texts(column: str | None, setting: str) -> dict[int, str] | None:
            if column is None:
                return None
            values = data.pairs.column("test", column, f"data.{setting}")
            return {row: str(value) for row, value in values.items()}

        rows, parts = data.pairs.of["test"]["row"][:], data.pairs.parts["test"]
        metrics = RewardMetrics(
            texts(data.pairs.accuracy_by, "accuracy_by"),
            parts.groups(rows),
            parts.labels(rows),
            pl_module.compared,
            parts.known(rows, PLACE),
        )
        self.metrics = metrics.to(for_float64(pl_module.device))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        pairs = outputs["pairs"]
        lengths = pl_module.response_lengths(batch)
        chosen_tokens, rejected_tokens = (
            sum_of_role(lengths, role, batch.roles, batch.pairs, batch.n_pairs)
            for role in (Role.CHOSEN, Role.REJECTED)
        )
        assert self.metrics is not None
        beside = columns(pairs.log_probs) if self.metrics.beside else []
        scores = pairs.chosen, pairs.rejected
        values = (batch.rows, *scores, chosen_tokens, rejected_tokens, *beside)
        self.metrics.update(*(value[pairs.is_pair] for value in values))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.metrics is not None
        self.told = set()
        found = self.metrics.compute()
        if not found:
            return
        self.told = {f"test/{name}" for name in (*_TITLES, *_SAME)}
        named = {"": found} | {f"{name}/": one for name, one in found.get("sets", {}).items()}
        for prefix, values in named.items():
            for name in (name for name in _TITLES if values[name] is not None):
                pl_module.log(f"test/{prefix}{name}", values[name])
        folder = folder_of(trainer)  # asked on every rank
        lines = self._lines(trainer)
        if trainer.is_global_zero:
            write_whole(folder / "test_pairs.jsonl", to_jsonl(lines))
            write_whole(folder / "test.json", to_json(found))
            print(_table(found), _sample(lines, self.samples), sep="\n\n")
            print(f"\n{len(lines)} pairs in {folder / 'test_pairs.jsonl'}\n")

    def _lines(self, trainer: Trainer) -> list[dict[str, Any]]:
        """What is written of all ranks' pairs."""
        metrics, data = self.metrics, data_of(trainer)
        assert metrics is not None
        with metrics.sync_context():
            pairs = metrics.pairs()
        lines = []
        for i, row in enumerate(pairs.rows.tolist() if trainer.is_global_zero else []):
            preference = data.pairs.preference("test", row)
            lines.append(
                {
                    "row": row,
                    **({"set": metrics.sets[row]} if metrics.sets else {}),
                    **({} if metrics.groups is None else {"group": metrics.groups[row]}),
                    "chosen_score": float(pairs.chosen[i]),
                    "rejected_score": float(pairs.rejected[i]),
                    "chosen_tokens": int(pairs.chosen_tokens[i]),
                    "rejected_tokens": int(pairs.rejected_tokens[i]),
                    **{name: float(pairs.beside[name][i]) for name in COLUMNS[:2] if pairs.beside},
                    "prompt": preference.prompt,
                    **preference.inputs.columns,
                    "chosen": _text(preference.chosen),
                    "rejected": _text(preference.rejected),
                }
            )
        return lines


def _text(response: list[Message] | None) -> str:
    assert response is not None  # of a pair
    return "\n".join(map(text_of, response))


def _table(found: dict[str, Any]) -> str:
    """The metrics as lines of a name and a number."""
    rows, yardstick = [("pairs", str(found["pairs"]))], found.get("yardstick")
    for name, title in _TITLES.items():
        value = found[name]
        text = "undefined" if value is None else f"{value:.4f}"
        if name == "accuracy":
            text = _accuracy(found)
        if name == "length_matched_accuracy":
            text += f"  ({found['length_matched_pairs']} pairs)"
        rows.append((title, text))
        if name == "accuracy" and found["ties"]:
            rows.append(("ties, which count as wrong", str(found["ties"])))
        if name == "accuracy" and yardstick is not None:
            rows.append(("accuracy by the yardstick (h > 0)", _accuracy(yardstick)))
    if yardstick is not None:
        rows += yardstick_rows(yardstick)
    for group, values in found["groups"].items():
        rows.append((f"accuracy, {group}", f"{values['accuracy']:.4f}  ({values['pairs']} pairs)"))
    for name, values in found.get("sets", {}).items():
        rows.append((f"accuracy, {name}", f"{_accuracy(values)}  ({values['pairs']} pairs)"))
    for section, value in found.get("sections", {}).items():
        rows.append((f"RewardBench, {section}", f"{value:.4f}"))
    rows += _second_version(found["reward_bench_2"]) if "reward_bench_2" in found else []
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:<{width}}  {text}" for title, text in rows)


def _accuracy(found: dict[str, Any]) -> str:
    low, high = found["accuracy_interval"]
    return f"{found['accuracy']:.4f}  (95 % interval {low:.4f} to {high:.4f})"


def _second_version(found: dict[str, Any]) -> list[tuple[str, str]]:
    """RewardBench 2's scores, as names and numbers."""
    rows = []
    for name, value in found["scores"].items():
        prompts = found["prompts"].get(name)
        count = "" if prompts is None else f"  ({prompts} prompts)"
        rows.append((f"RewardBench 2, {name}", f"{value:.4f}{count}"))
    if found["left_out"]:
        rows.append(("RewardBench 2, left out", f"{found['left_out']} prompts lack responses"))
    return rows


def _sample(lines: list[dict[str, Any]], n: int) -> str:
    """Some pairs with their scores, the higher one marked, or both."""
    shown = []
    for line in lines[:: max(1, -(-len(lines) // max(1, n)))][:n]:
        shown.append(f"row {line['row']}: {_short(text_of(line['prompt'][-1]))}")
        higher = max(line["chosen_score"], line["rejected_score"])
        for name in ("chosen", "rejected"):
            score = line[f"{name}_score"]
            mark = ">" if score == higher else " "
            shown.append(f"  {mark} {name:<8} {score:>+9.3f}  {_short(line[name])}")
    return "\n".join(shown)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
