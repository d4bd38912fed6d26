"""tools/bench on a tiny random model: that it measures what it says it measures."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rotopo.errors import InputError
from tools.bench import __main__ as bench
from tools.bench import compare, generation, peers, profile, setting
from tools.bench.peers import Entry
from tools.bench.setting import Load

TINY = ["--model", "random:tiny", "--dtype", "float32", "--rounds", "2", "--context", "24"]


def of_random_pairs(*loads):
    vocabulary = setting.SHAPES["tiny"]["vocab_size"]
    return setting.Setting(
        "random:tiny",
        "float32",
        "cpu",
        "shared_prompt",
        {},
        setting._no_tokenizer(),
        list(setting._random_batches(vocabulary, loads)),
    )


@pytest.mark.slow
def test_the_tables(tmp_path, capsys):
    file = tmp_path / "rows.json"
    tables = ["--table", "peers", "attention", "growth", "profile", "--reference", "online"]
    growth = ["--growth-contexts", "16", "32", "--growth-pairs", "1", "2"]
    bench.main([*TINY, *tables, *growth, "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["peer"] for row in rows] == [
        *("rotopo", "rotopo, padded", "plain", "trl"),
        *("rotopo, segments", "rotopo, sdpa"),
    ]
    for row in rows:
        assert tuple(row) == compare.KEYS
        assert row["max_loss_difference"] < 1e-5
        assert 0 < row["floor_share"] <= 1
        assert row["memory_ratio"] > 0
        assert row["speed_ratio"] > 0
    assert rows[0]["speed_ratio"] == rows[0]["memory_ratio"] == 1
    # An online reference is a third pass; the prompt twice for padded lines, and their padding.
    shared, padded = rows[0]["floor_share"], rows[1]["floor_share"]
    assert padded < shared <= 2 / 3 < rows[4]["floor_share"]

    printed = capsys.readouterr().out
    assert printed.count("MiB per 1000 tokens") == 2
    kinds = printed.partition("Share of the step's time")[2].splitlines()[1:]
    assert len(kinds) == len(profile.KINDS)
    assert sum(float(line.split()[-2]) for line in kinds) == pytest.approx(100, abs=0.5)


@pytest.mark.slow
def test_generation_beside_transformers_own():
    tiny = ["--model", "random:tiny", "--dtype", "float32", "--rounds", "2", "--responses", "4"]
    (row,) = generation.main([*tiny, "--samples", "2", "--adapter", "rotation"])
    assert (row["samples"], row["adapter"]) == (2, "rotation")
    assert row["ratio"] == sorted(row["ratio"])
    assert min(row["plain"], row["ours"]) > 0


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("adapter", [peers.LORA, peers.ROTATION, peers.FULL])
def test_peers_take_the_same_step(adapter, reference):
    here = of_random_pairs(Load(2, 24, 1.0))
    built = {
        entry: peers.build(entry, here)
        for entry in (Entry(name, adapter, reference) for name in ("rotopo", "plain", "trl"))
    }
    peers.check_losses(built)
    for peer in built.values():
        peer.step(peer.batches[0])
    ours, *others = (peer.trained() for peer in built.values())
    for theirs in others:
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            # AdamW's first step is the rate, 1e-4, times the gradient's sign, which rounding may
            # turn where the gradient is all but 0. TRL does not decay the norms' weights: 1e-6.
            apart = (parameter - theirs[name]).abs()
            assert (apart < 2e-6).float().mean() > 0.95, name


def test_other_losses_end_the_run():
    here = of_random_pairs(Load(2, 24, 1.0))
    built = {e: peers.build(e, here) for e in (Entry("rotopo"), Entry("plain"))}
    with torch.no_grad():
        next(iter(built[Entry("plain")].trained().values())).add_(1.0)
    with pytest.raises(SystemExit, match="same loss"):
        peers.check_losses(built)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_the_prompt_ratio_leaves_the_context(ratio):
    (rows,) = of_random_pairs(Load(200, 100, ratio)).batches
    prompts = [len(row.prompt) for row in rows]
    responses = [len(response) for row in rows for response in row.responses]
    prompt, response = sum(prompts) / len(prompts), sum(responses) / len(responses)
    assert prompt + response == pytest.approx(100, rel=0.03)
    assert prompt / response == pytest.approx(ratio, rel=0.06)


def test_a_pair_by_itself_makes_the_floors_passes_only():
    here = of_random_pairs(Load(1, 40, 1.0))
    peer = peers.build(Entry("rotopo", reference="cached"), here)
    products = profile.Products(here, full=False)
    assert products.parts["layers"][1] == peer.tokens(peer.batches[0])


@pytest.mark.parametrize("full", [False, True])
def test_the_products_do_the_arithmetic_that_they_count(full):
    products = profile.Products(of_random_pairs(Load(3, 400, 1.0)), full)
    for part in products.parts:
        with FlopCounterMode(display=False) as counter:
            products.run(part)
        assert counter.get_total_flops() == pytest.approx(1e9 * products.gflop(part), rel=1e-9)


class _Busy(torch.autograd.Function):
    """The identity, with a backward pass that takes far longer than a tiny model's step."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        for _ in range(20):
            torch.ones(512, 512) @ torch.ones(512, 512)
        return gradient


def _busy_output(module, inputs, output):
    return _Busy.apply(output)


def _busy_attention(function):
    def attention(*args, **kwargs):
        output, weights = function(*args, **kwargs)
        return _Busy.apply(output), weights

    return attention


@pytest.mark.parametrize("place", ["attention", "the product behind it"])
def test_backward_passes_count_where_their_forward_passes_were(place, monkeypatch):
    peer = peers.build(Entry("rotopo"), of_random_pairs(Load(2, 24, 1.0)))
    peer.step(peer.batches[0])
    if place == "attention":
        functions = profile.ALL_ATTENTION_FUNCTIONS
        slow = _busy_attention(functions["segments"])
        monkeypatch.setitem(functions._global_mapping, "segments", slow)
        kind = "attention"
    else:
        for name, module in peer.model.named_modules():
            if name.endswith("o_proj") and isinstance(module, nn.Linear):
                module.register_forward_hook(_busy_output)
        kind = "layers' matrix products"
    shares = profile.profile_step(peer, peer.batches[0])
    assert set(shares) == set(profile.KINDS)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    assert max(shares, key=shares.get) == kind


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rounds", "1"], "--rounds"),
        (["--model", "random:huge"], "random:tiny"),
        (["--policy", "path=x"], "activation_checkpointing"),
        (["--policy", "attention"], "NAME=VALUE"),
        (["--prompt-ratio", "0"], "--prompt-ratio"),
        (["--context", "1"], "--context"),
    ],
)
def test_settings_that_do_not_work(args, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(args)
    assert message in capsys.readouterr().err


def test_an_unknown_attention_is_refused_before_anything_is_timed():
    with pytest.raises(InputError, match="'nothing'"):
        bench.main(["--table", "peers", "attention", "--attention", "sdpa", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_the_gpu_preset_says_that_it_needs_one(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--preset", "gpu"])
    assert "CUDA" in capsys.readouterr().err


def test_a_presets_defaults_give_way_to_what_is_named():
    given = ["--device", "cpu", "--context", "24", "--policy", "attention=sdpa"]
    arguments = bench._arguments(["--preset", "gpu", *given, "--attention", "sdpa"])
    assert (arguments.device, arguments.context) == ("cpu", [24])
    assert arguments.policy == {"attention": "sdpa"}
    assert arguments.model == bench.PRESETS["gpu"]["model"]
