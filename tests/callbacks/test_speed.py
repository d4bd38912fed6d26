"""What the speed callback counts: by hand, and against torch's own counter of operations."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from rotopo.callbacks.arithmetic import Decoder, is_known, peak_flops
from rotopo.callbacks.speed import Speed, count
from rotopo.cli import run
from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.rotation import RotationConfig
from tests.models.families import FAMILIES, MIXTURES, make
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config

PAIR = [Role.CHOSEN, Role.REJECTED]
# Prompts of 3 and 2 tokens; responses of 4 and 2, and of 2 and 3: one less goes in.
ROWS = [
    TokenizedRow([5, 6, 7], [[8, 9, 8, 2], [9, 2]], PAIR, 0),
    TokenizedRow([5, 6], [[8, 2], [9, 9, 2]], PAIR, 1),
]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # Tokens that are there; each prompt once; 4 lines of 3 + 3; targets; what they see:
        # the prompts 1+2+3 and 1+2, the responses 4+5+6, 4, 3 and 3+4; the same, 4 at most.
        ("shared_prompt", [12, 12, 24, 11, 38, 35]),
        # The prompts twice.
        ("padded", [17, 12, 24, 11, 47, 44]),
    ],
)
def test_a_batch_by_hand(layout, expected):
    batch = collate(ROWS, pad_id=0, layout=layout, loss_scale=1.0)
    assert count(batch, [None, 4]).tolist() == expected


def test_rows_on_one_line_without_padding_count_as_on_lines_of_their_own():
    """Also where a row has no response token that goes in, and the next prompt follows at once."""
    rows = [TokenizedRow([5, 6], [[8], [9]], PAIR, 2), *ROWS]
    batch = collate(rows, pad_id=0, layout="shared_prompt", loss_scale=1.0)
    real = batch.segment_ids >= 0
    line = replace(
        batch,
        **{
            name: getattr(batch, name)[real][None]
            for name in ("input_ids", "position_ids", "segment_ids")
        },
    )
    assert count(line, [None, 4]).equal(count(batch, [None, 4]))
    assert line.input_ids.numel() == 14


def test_single_responses_take_the_same_in_both_layouts():
    rows = [TokenizedRow([5] * n, [[6] * (7 - n)], [Role.CHOSEN], n) for n in (1, 3, 6)]
    padded, shared = (
        count(collate(rows, pad_id=0, layout=layout, loss_scale=1.0), [None])
        for layout in ("padded", "shared_prompt")
    )
    assert padded.equal(shared)
    assert padded.tolist() == [18, 18, 18, 11, 3 * 21]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deepseek_v3", *MIXTURES}))
def test_operations_are_those_that_torch_counts(family, trained):
    """Eager attention computes the scores of all pairs of positions, seen or not."""
    B, T = 2, 9
    model = make(family, torch.float32, attn_implementation="eager").requires_grad_(trained)
    decoder = Decoder.of(model)
    embedded = torch.randn(B, T, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    scores = [B * T * T for _ in decoder.windows]
    expected = decoder.flops(B * T, B * T, scores, reference=False)
    # Rotary angles are a product of positions and frequencies there: next to nothing.
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    assert decoder.trained == trained
    assert is_known(model)


@pytest.mark.parametrize(
    "adapter",
    [LoraConfig(target_modules=["q_proj", "v_proj"]), RotationConfig()],
    ids=["lora", "rotation"],
)
def test_an_adapter_leaves_the_model_what_it_is(adapter):
    plain = Decoder.of(make("llama").requires_grad_(False))
    assert Decoder.of(get_peft_model(make("llama"), adapter).get_base_model()) == plain
    assert plain.passes(reference=False) == 2
    assert plain.passes(reference=True) == 3
    assert Decoder.of(make("llama")).passes(reference=False) == 3


@pytest.mark.parametrize(
    ("settings", "trained", "head_trained"),
    [
        ({"modules_to_save": ["lm_head"]}, 0, True),
        ({"modules_to_save": ["layers.1.mlp"]}, 3 * 32 * 48 / (2 * (3 * 32 * 48 + 3072)), False),
        ({"trainable_token_indices": {"lm_head": [5]}}, 0, True),
        ({"trainable_token_indices": [5]}, 0, False),
    ],
    ids=["head", "mlp", "rows of the head", "rows of the embedding"],
)
def test_what_an_adapter_trains_whole_is_counted_once_and_as_trained(
    settings, trained, head_trained
):
    """As torch counts it; the adapter's own layers, which are left out, are tiny beside it."""
    B, T = 2, 9
    adapter = LoraConfig(r=1, target_modules=["q_proj"], **settings)
    base = make("llama", torch.float32, attn_implementation="eager")
    model = get_peft_model(base, adapter).get_base_model()
    decoder = Decoder.of(model)
    assert (decoder.linear, decoder.head) == (2 * (3 * 32 * 48 + 3072), 32 * 96)
    assert decoder.trained == pytest.approx(trained)
    assert decoder.head_trained == head_trained
    assert decoder.passes(reference=False) == 2 + decoder.trained
    assert is_known(model)
    embedded = torch.randn(B, T, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    lora = 2 * 2 * B * T * (32 + 32) * 3
    expected = decoder.flops(B * T, B * T, [B * T * T], reference=False) + lora
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


def test_windows_are_counted_by_layer():
    assert Decoder.of(make("gemma3_text")).windows == {6: 2, None: 1}
    assert Decoder.of(make("mistral-window")).windows == {5: 2}


@pytest.mark.parametrize("family", ["deepseek_v3", *MIXTURES])
def test_a_mixture_of_experts_is_not_known(family):
    assert not is_known(make(family))


def test_what_is_no_plain_attention_over_linear_layers_is_not_known():
    """Weights in no linear layer; another's quantised weights; a configuration that does not name
    its heads."""
    for change in (
        lambda model: setattr(model.model, "mixer", torch.nn.Conv1d(2, 2, 3)),
        lambda model: setattr(model.config, "quantization_config", {"quant_method": "gptq"}),
        lambda model: vars(model.config).update(num_attention_heads=[4, 2]),
    ):
        model = make("llama")
        assert is_known(model)
        change(model)
        assert not is_known(model)
        assert Decoder.of(model).linear  # which is all that most statistics hang on


def test_only_peaks_from_a_data_sheet():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.float32) is None
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None
    assert peak_flops("Imaginary 1", torch.bfloat16) is None


def by_hand(rows: list[TokenizedRow], layout: str) -> tuple[int, int, int, int]:
    """Of a micro-batch: tokens, tokens at least, laid out, and in the plain layout."""
    inputs = [(len(row.prompt), [len(r) - 1 for r in row.responses]) for row in rows]
    least = sum(prompt + sum(responses) for prompt, responses in inputs)
    longest = max(prompt + max(responses) for prompt, responses in inputs)
    plain = 2 * len(rows) * longest
    if layout == "padded":
        return sum(2 * p + sum(r) for p, r in inputs), least, plain, plain
    longest = max(prompt + sum(responses) for prompt, responses in inputs)
    return least, least, len(rows) * longest, plain


@pytest.mark.parametrize(
    ("layout", "accumulation", "options", "passes", "plain_passes"),
    [
        ("shared_prompt", 1, [], 3, 3),
        ("shared_prompt", 3, ["--model.policy.reference=cached"], 2, 3),
        ("padded", 2, [], 3, 3),
        ("padded", 1, ["--model.policy.activation_checkpointing=true"], 4, 4),
        ("shared_prompt", 2, ["--model=SimPO"], 2, 2),
        ("shared_prompt", 1, ["--model.policy={adapter: null}"], 4, 4),
    ],
)
def test_a_run_logs_what_its_steps_took(
    tmp_path,
    tiny_tokenizer,
    monkeypatch,
    layout,
    accumulation,
    options,
    passes,
    plain_passes,
):
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path / "cache"))
    start = Speed.on_train_start

    def with_a_peak(self, trainer, module):
        start(self, trainer, module)
        assert self.peak is None  # of a CPU
        self.peak = 1e15

    monkeypatch.setattr(Speed, "on_train_start", with_a_peak)
    cli = run(
        [
            *("fit", "--config", str(save_config(tmp_path, tiny_tokenizer)), *options),
            f"--data.layout={layout}",
            f"--trainer.accumulate_grad_batches={accumulation}",
            "--trainer.max_epochs=1",
            "--trainer.limit_val_batches=0",
            "--trainer.log_every_n_steps=2",
        ]
    )
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv").dropna(
        subset=["speed/pairs_per_second"]
    )
    assert log["step"].tolist() == [1]  # the second of three

    loader = cli.datamodule.train_dataloader()
    parts = list(loader.batch_sampler)[accumulation : 2 * accumulation]
    rows = [[loader.dataset[i] for i in part] for part in parts]
    counts = [by_hand(part, layout) for part in rows]
    tokens, least, laid_out, plain = (sum(column) for column in zip(*counts, strict=True))
    found = {
        name.removeprefix("speed/"): float(log[name].iloc[0]) for name in log if "speed" in name
    }
    seconds = 6 / found["pairs_per_second"]
    trains_model = "adapter: null" in " ".join(options)
    assert found["tokens_computed"] == laid_out * passes
    assert found["tokens_avoided"] == plain * plain_passes - laid_out * passes
    assert found["floor_share"] == pytest.approx(least * (2 + trains_model) / (laid_out * passes))
    assert found["tokens_per_second"] * seconds == pytest.approx(tokens)
    assert 0.05 < found["memory_gib"] < 64
    # Visible scores and targets as in a batch, which have been counted by hand above.
    decoder = Decoder.of(cli.model.language_model)
    batches = [collate(part, 0, layout, 1.0) for part in rows]
    _, _, _, targets, scores = sum(count(batch, [None]) for batch in batches).tolist()
    online = passes - decoder.trained - decoder.recomputed == 3
    flops = decoder.flops(tokens, targets, [scores], reference=online)
    assert found["mfu"] * seconds * 1e15 == pytest.approx(flops)


def test_without_a_peak_no_mfu_is_made_up(tmp_path, tiny_tokenizer):
    cli = run(["fit", "--config", str(save_config(tmp_path, tiny_tokenizer))])
    assert "speed/floor_share" in cli.trainer.callback_metrics
    assert "speed/mfu" not in cli.trainer.callback_metrics


@pytest.mark.slow
def test_two_ranks_count_what_one_does_in_twice_as_many_micro_batches(tmp_path, tiny_tokenizer):
    config = save_config(tmp_path, tiny_tokenizer)
    command = ["fit", f"--config={config}", *strategy("ddp")]
    on_ranks(2, *command, f"--trainer.default_root_dir={tmp_path / '2'}")
    twice = "--trainer.accumulate_grad_batches=2"
    on_ranks(1, *command, twice, f"--trainer.default_root_dir={tmp_path / '1'}")
    logs = [pd.read_csv(next((tmp_path / n).rglob("metrics.csv"))) for n in "12"]
    one, two = (log.dropna(subset=["speed/floor_share"]) for log in logs)
    assert len(one) == 6
    one["tokens"], two["tokens"] = (
        log["speed/tokens_per_second"] / log["speed/pairs_per_second"] for log in (one, two)
    )
    counts = ["speed/tokens_computed", "speed/tokens_avoided", "speed/floor_share", "tokens"]
    pd.testing.assert_frame_equal(one[counts], two[counts], rtol=1e-5)
