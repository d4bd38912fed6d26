"""The geometry of a model in training."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rotopo.metrics.geometry import effective_rank, hyperspherical_energy, merged_weights
from tests.models.families import make
from tests.small_run import save_config
from tests.test_training import EXACT, fit

GEOMETRY = ["--trainer.callbacks+=Geometry", "--trainer.callbacks.every_n_steps=2"]
ROTATION = ["--model.policy.adapter=rotopo.rotation.RotationConfig", "--model.policy.dtype=float64"]
ROTATION += ["--model.policy.adapter.target_modules=[q_proj]"]
FULL = ["--model.policy={adapter: null}", "--model.policy.dtype=float64"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def measured(cli) -> pd.DataFrame:
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    log = log.dropna(subset=["geometry/effective_rank/00"]).set_index("step")
    return log[[c for c in log if c.startswith("geometry/")]].rename(columns=lambda c: c[9:])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("adapter", [EXACT, ROTATION, FULL])
def test_hidden_states_are_the_models_own(config, adapter, layout):
    cli = fit(config, "run", *adapter, *GEOMETRY, f"--data.layout={layout}")
    table = measured(cli)
    assert list(table.index) == [0, 2, 4, 6]
    data, policy = cli.datamodule, cli.model.policy.eval()
    (batch,) = data.batches(data.rows("validation"), range(8))
    states: dict[bool, list[torch.Tensor]] = {}
    for reference in (False, True):
        parts = []
        for pair in range(8):
            row = data.rows("validation")[pair]
            shared = layout == "packed"
            for k, response in enumerate(row.responses):
                ids = torch.tensor([row.prompt + response[:-1]])
                with torch.no_grad():
                    if reference:
                        with policy.reference_model() as model:
                            hidden = model(ids, output_hidden_states=True).hidden_states
                    else:
                        hidden = policy.language_model(ids, output_hidden_states=True).hidden_states
                own = len(row.prompt) if shared and k else 0
                parts.append([h[0, own:] for h in hidden])
        states[reference] = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    for layer, (state, base) in enumerate(zip(states[False], states[True], strict=True)):
        last = table.iloc[-1]
        rank = float(effective_rank(state))
        assert last[f"effective_rank/{layer:02}"] == pytest.approx(rank, rel=1e-6)
        distance = float(((state - base).norm(dim=1) / base.norm(dim=1)).mean())
        assert last[f"distance/{layer:02}"] == pytest.approx(distance, rel=1e-6, abs=1e-12)
        assert table.iloc[0][f"distance/{layer:02}"] == pytest.approx(0, abs=1e-12)
    assert table.iloc[-1]["distance/02"] > 0
    assert batch.n_pairs == 8


def test_a_rotation_keeps_angles_between_neurons_and_lora_does_not(config):
    rotated, tuned = (measured(fit(config, "run", *a, *GEOMETRY)) for a in (ROTATION, EXACT))
    for name in ("neuron_cosine", "hyperspherical_energy"):
        assert rotated[name].to_numpy() == pytest.approx(rotated[name].iloc[0], rel=1e-6)
        assert tuned[name].iloc[-1] != pytest.approx(tuned[name].iloc[0], rel=1e-5)
    assert rotated["hyperspherical_energy"].iloc[0] == 1
    assert rotated["neuron_cosine"].iloc[0] == pytest.approx(tuned["neuron_cosine"].iloc[0])


def test_merged_weights_are_what_the_layers_compute_with(config):
    for adapter in (EXACT, ROTATION):
        cli = fit(config, "run", *adapter)
        model = cli.model.eval().language_model
        layers = [layer.self_attn.q_proj for layer in model.model.layers]
        for layer, weight in zip(layers, merged_weights(model), strict=True):
            x = torch.randn(3, weight.shape[1], dtype=torch.float64)
            torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-6, atol=1e-9)
    cli = fit(config, "run", *FULL)
    assert len(list(merged_weights(cli.model.language_model))) == 2 * 7


def test_merged_weights_of_layers_that_keep_them_transposed():
    """GPT-2's, which are [in, out]; neurons are rows of the merged weight."""
    model = get_peft_model(make("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    layers = [block.attn.c_attn for block in model.get_base_model().transformer.h]
    weights = list(merged_weights(model.get_base_model()))
    for layer, weight in zip(layers, weights, strict=True):
        x = torch.randn(3, 32, dtype=torch.float64)
        assert weight.shape == (96, 32)
        torch.testing.assert_close(layer(x) - layer(x * 0), x @ weight.T)
    full = list(merged_weights(make("gpt2")))
    assert [tuple(w.shape) for w in full[:4]] == [(96, 32), (32, 32), (128, 32), (32, 128)]


def test_a_resumed_run_keeps_the_energy_before_training(config):
    untrained = fit(config, "untrained", *EXACT, "--trainer.max_steps=0").model.language_model
    options = [*EXACT, *GEOMETRY, "--model.scheduler.total_steps=6"]
    trained = fit(config, "part", *options, "--trainer.max_epochs=1").model.language_model
    energies = [
        float(sum(hyperspherical_energy(w) for w in merged_weights(model)))
        for model in (untrained, trained)
    ]
    (checkpoint,) = (config.parent / "part").rglob("*.ckpt")
    resumed = measured(fit(config, "part", *options, f"--ckpt_path={checkpoint}"))
    assert energies[0] != energies[1]
    expected = energies[1] / energies[0]
    assert resumed["hyperspherical_energy"].iloc[0] == pytest.approx(expected, rel=1e-6)
