"""Rewards: the same whatever the batch looks like, and the same as the model's own."""

import copy

import pytest
import torch
from peft import HRAConfig, LoraConfig, OFTConfig
from transformers import AutoModelForSequenceClassification

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.errors import InputError
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig
from rotopo.rotation import RotationConfig
from tests.models.families import FLOAT32_INSIDE, VOCABULARY, WITH_ATTENTION, make, make_scorer

LAYOUTS = ("padded", "shared_prompt", "packed")
PAD, BOS, EOS = 0, 1, 2


def some_rows(n: int = 5, bos: bool = False, end: int = EOS) -> list[TokenizedRow]:
    """Rows as a reward model's: each response ends with the end of turn, and a token behind it."""
    generator = torch.Generator().manual_seed(0)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    roles = [Role.CHOSEN, Role.REJECTED]
    return [
        TokenizedRow(
            [BOS] * bos + tokens(1, 12), [[*tokens(0, 13), end, PAD] for _ in roles], roles, i
        )
        for i in range(n)
    ]


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)


def scorer_of(family: str, adapter=None, dtype=torch.float64, **settings) -> Scorer:
    torch.manual_seed(1)
    return Scorer.build(make_scorer(family, dtype, **settings), BackboneConfig(adapter=adapter))


def trained(scorer: Scorer) -> dict[str, torch.Tensor]:
    return {n: p for n, p in scorer.named_parameters() if p.requires_grad}


def by_definition(scorer: Scorer, rows: list[TokenizedRow]) -> torch.Tensor:
    """Each response on its own through the Hugging Face model, no batch and no padding."""
    model = scorer.language_model
    sequences = [row.prompt + response[:-1] for row in rows for response in row.responses]
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in sequences])


def assert_batches_do_not_matter(scorer: Scorer, rows: list[TokenizedRow], tolerance: float):
    expected = by_definition(scorer, rows)
    weights = torch.linspace(-1, 1, len(expected), dtype=expected.dtype)
    names = trained(scorer)
    expected_grads = torch.autograd.grad((weights * expected).sum(), names.values())
    largest = max(g.abs().max() for g in expected_grads)
    assert largest > 0
    for layout in LAYOUTS:
        # Another order, batches of other sizes, and with them other padding.
        for split in ([[0, 1, 2, 3, 4]], [[4, 2], [0, 3, 1]], [[1], [0], [4], [3], [2]]):
            found = torch.empty_like(expected)
            for part in split:
                batch = collate([rows[i] for i in part], PAD, layout, 1.0)
                index = [2 * i + k for i in part for k in range(2)]
                found = found.index_copy(0, torch.tensor(index), scorer(batch))
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            grads = torch.autograd.grad((weights * found).sum(), names.values())
            for a, b in zip(grads, expected_grads, strict=True):
                assert (a - b).abs().max() <= tolerance * largest


@pytest.mark.parametrize(("family", "attention"), WITH_ATTENTION)
def test_layouts_orders_and_padding_give_the_models_own_rewards(family, attention):
    loose = family in FLOAT32_INSIDE or attention == "eager"
    scorer = scorer_of(family, lora(), attn_implementation=attention)
    assert_batches_do_not_matter(scorer, some_rows(), 1e-5 if loose else 1e-10)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_so_they_do_with_pad_as_eos_and_with_or_without_bos(bos, pad_is_eos, dtype):
    """Also where eos ends responses, and the model's own way would read before it."""
    scorer = scorer_of("llama", lora(), dtype, pad_token_id=EOS if pad_is_eos else PAD)
    rows = some_rows(bos=bos)
    if pad_is_eos:
        scorer.language_model.config.pad_token_id = None  # one by one, nothing is padded
    assert_batches_do_not_matter(scorer, rows, 1e-5 if dtype == torch.float32 else 1e-10)
    if pad_is_eos:
        with torch.no_grad():
            by_pad = scorer(collate(rows, EOS, "padded", 1.0))
            torch.testing.assert_close(by_pad, scorer(collate(rows, PAD, "packed", 1.0)))


@pytest.mark.parametrize("adapter", ["rotation", "oft", "hra", None])
def test_so_they_do_with_other_adapters_and_without(adapter):
    modules = ["q_proj", "v_proj"]
    config = {
        "rotation": lambda: RotationConfig(target_modules=modules),
        "oft": lambda: OFTConfig(oft_block_size=8, target_modules=modules),
        "hra": lambda: HRAConfig(r=2, target_modules=modules),
        None: lambda: None,
    }[adapter]()
    scorer = scorer_of("llama", config)
    with torch.no_grad():
        for parameter in trained(scorer).values():
            parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
    assert_batches_do_not_matter(scorer, some_rows(), 1e-10)


def test_the_rewards_are_those_of_the_last_token():
    """The token behind it has no say, and the end of turn has."""
    scorer = scorer_of("llama", lora())
    rows = some_rows()

    def rewards(of):
        return scorer(collate(of, PAD, "packed", 1.0))

    def ending(*tokens):
        changed = copy.deepcopy(rows)
        for row in changed:
            row.responses[:] = [[*r[:-2], *tokens] for r in row.responses]
        return rewards(changed)

    assert torch.equal(ending(EOS, 7), rewards(rows))
    assert (ending(8, PAD) - rewards(rows)).abs().min() > 1e-3


def test_an_adapter_trains_with_the_head_and_nothing_else():
    for adapter in (lora(), RotationConfig(target_modules=["q_proj"])):
        names = trained(scorer_of("llama", adapter, torch.bfloat16))
        (head,) = [n for n in names if n.endswith("score.weight")]
        assert all("lora_" in n or "rotation_" in n for n in names if n != head)
        assert all(p.dtype == torch.float32 for p in names.values())
    every = scorer_of("llama").state_dict()
    assert trained(scorer_of("llama")).keys() == every.keys()


def test_a_half_types_rewards_are_float32_and_near_the_whole_ones():
    rows = some_rows()
    whole = scorer_of("llama", lora(), torch.float32)
    half = scorer_of("llama", lora(), torch.bfloat16)
    half.load_state_dict(whole.state_dict())
    for layout in LAYOUTS:
        batch = collate(rows, PAD, layout, 1.0)
        found, expected = half(batch), whole(batch)
        assert found.dtype == torch.float32
        assert (found - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["score"]}, "score head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["score"]}, "score head"),
        ({"target_modules": ["nothing_like_this"]}, "nothing_like_this"),
    ],
)
def test_adapters_that_cannot_work_are_refused_by_their_setting(settings, named):
    with pytest.raises(InputError, match=rf"backbone\.adapter.*{named}"):
        scorer_of("llama", LoraConfig(**settings))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapters_task_changes_nothing(task):
    batch = collate(some_rows(), PAD, "packed", 1.0)
    plain, named = (scorer_of("llama", lora(**t)) for t in ({}, {"task_type": task}))
    assert trained(plain).keys() == trained(named).keys()
    assert torch.equal(plain(batch), named(batch))


def test_activation_checkpointing_changes_no_gradient():
    batch = collate(some_rows(), PAD, "packed", 1.0)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = BackboneConfig(adapter=lora(), activation_checkpointing=checkpointing)
        scorer = Scorer.build(make_scorer("llama"), config)
        loss = scorer(batch).square().sum()
        grads.append(torch.autograd.grad(loss, trained(scorer).values()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_language_model_gets_a_head_by_the_runs_seed(tmp_path, caplog):
    make("qwen2", torch.float32).save_pretrained(tmp_path)
    capture = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        torch.randn(len(capture))  # what was drawn before does not count
        scorer = Scorer.load(BackboneConfig(str(tmp_path), lora(), "float32"))
        capture.append(scorer.language_model.score.weight.detach())
    first, again, other = capture
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() == pytest.approx(0.02, rel=0.5)  # Qwen2's initializer_range
    assert first.shape == (1, 32)
    assert not [r for r in caplog.records if "score.weight" in r.getMessage()]


def test_what_tells_base_models_apart_is_the_decoder():
    one, other = make_scorer("llama"), make_scorer("llama")
    with torch.no_grad():
        other.score.weight.add_(1)
    fingerprints = [Scorer.build(m, BackboneConfig()).base_fingerprint for m in (one, other)]
    assert fingerprints[0] == fingerprints[1]
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    assert Scorer.build(other, BackboneConfig()).base_fingerprint != fingerprints[0]


def test_somebody_elses_reward_model_keeps_its_head(tmp_path):
    theirs = make_scorer("llama", torch.float32).eval()
    theirs.save_pretrained(tmp_path)
    scorer = Scorer.load(BackboneConfig(str(tmp_path), dtype="float32"))
    rows = some_rows()
    sequences = [row.prompt + response[:-1] for row in rows for response in row.responses]
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in sequences])
        for layout in LAYOUTS:
            found = scorer(collate(rows, PAD, layout, 1.0))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_classifiers_are_refused(tmp_path):
    config = BackboneConfig(str(tmp_path / "two"))
    make("llama", auto=AutoModelForSequenceClassification, num_labels=2).save_pretrained(
        config.path
    )
    with pytest.raises(InputError, match=r"backbone\.path.*2 classes"):
        Scorer.load(config)
    from transformers import BertConfig, BertForSequenceClassification

    bert = BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="only decoders are supported"):
        Scorer.load(BackboneConfig(str(tmp_path / "bert")))
    with pytest.raises(InputError, match=r"no file or folder.*nowhere"):
        Scorer.load(BackboneConfig("./nowhere"))
    make_scorer("llama").save_pretrained(tmp_path / "one")
    with pytest.raises(InputError, match=r"backbone\.attention 'telepathy'"):
        Scorer.load(BackboneConfig(str(tmp_path / "one"), attention="telepathy"))


def test_a_family_that_does_not_follow_the_mask_is_refused():
    from transformers import BloomConfig, BloomForSequenceClassification

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=PAD
    )
    scorer = Scorer.build(BloomForSequenceClassification(config), BackboneConfig(adapter=lora()))
    scorer(collate(some_rows(), PAD, "padded", 1.0))
    with pytest.raises(InputError, match=r"bloom.*data\.layout to 'padded'"):
        scorer(collate(some_rows(), PAD, "packed", 1.0))


@pytest.mark.slow
def test_compiled_layers_give_the_same_rewards():
    torch._dynamo.reset()
    batch = collate(some_rows(), PAD, "packed", 1.0)
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        config = BackboneConfig(adapter=lora(), compile=compiled)
        scorer = Scorer.build(make_scorer("llama", torch.float32), config)
        rewards = scorer(batch)
        grads = torch.autograd.grad(rewards.square().sum(), trained(scorer).values())
        found.append([rewards, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
