"""Contract 2, first part: the same log-probs and gradients whatever the batch looks like."""

import pytest
import torch
import transformers.integrations.flex_attention
from peft import HRAConfig, LoraConfig, OFTConfig
from torch.nn.attention.flex_attention import flex_attention

from rotopo.data import batch as batch_module
from rotopo.data.batch import Role, TokenizedRow, collate, collate_prompts
from rotopo.errors import InputError
from rotopo.models import segment_attention, segments
from rotopo.models.log_probs import PairLogProbs
from rotopo.models.policy import Policy, PolicyConfig, Sampling
from rotopo.rotation import RotationConfig
from tests.models.families import FLOAT32_INSIDE, VOCABULARY, WITH_ATTENTION, make


def some_rows(n: int = 5, seed: int = 0) -> list[TokenizedRow]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        TokenizedRow(tokens(1, 12), [tokens(1, 14), tokens(1, 14)], [Role.CHOSEN, Role.REJECTED], i)
        for i in range(n)
    ]


def lora(family: str, **settings) -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)


def policy_of(family: str, adapter=None, **settings) -> Policy:
    torch.manual_seed(1)
    config = PolicyConfig(path="", adapter=adapter)
    policy = Policy.build(make(family, **settings), config, needs_reference=True)
    policy.start = None  # as if the adapter had been trained to its random values
    return policy


def dpo_loss(log_probs: PairLogProbs) -> torch.Tensor:
    ratio = log_probs.chosen_log_ratio - log_probs.rejected_log_ratio
    return -torch.nn.functional.logsigmoid(0.1 * ratio).sum()


def trained(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


def by_definition(policy: Policy, rows: list[TokenizedRow]) -> dict[str, torch.Tensor]:
    """Each response on its own through the Hugging Face model, no batch and no padding."""

    def log_prob(model, row, response):
        tokens = torch.tensor([row.prompt + response])
        logits = model(input_ids=tokens).logits[0, len(row.prompt) - 1 : -1].double()
        return logits.log_softmax(-1)[range(len(response)), response].sum()

    out = {}
    for k, name in ((0, "chosen"), (1, "rejected")):
        out[name] = torch.stack([log_prob(policy.model, r, r.responses[k]) for r in rows])
        with torch.no_grad(), policy.model.disable_adapter():
            out[f"reference_{name}"] = torch.stack(
                [log_prob(policy.model, r, r.responses[k]) for r in rows]
            )
    return out


@pytest.mark.parametrize(("family", "attention"), WITH_ATTENTION)
def test_layouts_orders_and_padding_give_the_models_own_numbers(family, attention):
    policy = policy_of(family, lora(family), attn_implementation=attention)
    assert_batches_do_not_matter(policy, family, attention)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "minicpm3"])
def test_large_blocks_go_through_the_fused_kernel(family, monkeypatch):
    monkeypatch.setattr(segments, "_KEPT_SCORES", 0)
    fused, calls = segment_attention._fused, []
    monkeypatch.setattr(
        segment_attention, "_fused", lambda *inputs: calls.append(1) or fused(*inputs)
    )
    monkeypatch.setattr(batch_module, "_STRETCH", 5)
    policy = policy_of(family, lora(family), attn_implementation="segments")
    assert_batches_do_not_matter(policy, family, "segments")
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral-window", "minicpm3"])
def test_flex_attention_follows_the_same_rule(family, monkeypatch):
    """Its values, uncompiled; torch has no backward pass of it on a processor."""
    monkeypatch.setattr(
        transformers.integrations.flex_attention,
        "compile_friendly_flex_attention",
        lambda query, key, value, training, **settings: flex_attention(
            query, key, value, **settings
        ),
    )
    policy = policy_of(family, lora(family), attn_implementation="flex_attention")
    eager = policy_of(family, lora(family), attn_implementation="eager")
    for layout in ("shared_prompt", "packed"):
        batch = collate(some_rows(), 0, layout, 1.0)
        with torch.no_grad():
            found, expected = policy(batch), eager(batch)
        for name in ("chosen", "rejected", "reference_chosen", "reference_rejected"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5
            )
    with pytest.raises(InputError, match="trains on a GPU only"):
        policy(batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["shared_prompt", "packed"])
def test_flex_attention_trains_on_a_gpu(layout):
    grads = []
    for attention in ("flex_attention", "segments", "sdpa"):
        policy = policy_of("llama", lora("llama"), attn_implementation=attention).float().cuda()
        loss = dpo_loss(policy(collate(some_rows(), 0, layout, 1.0).to("cuda")))
        grads.append(torch.autograd.grad(loss, trained(policy).values()))
    for found in grads[1:]:
        for a, b in zip(found, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_soft_capped_scores_are_refused():
    policy = policy_of("gemma2", lora(""), attn_implementation="segments")
    with pytest.raises(InputError, match=r"set 'eager'.*'shared_prompt'"):
        policy(collate(some_rows(), 0, "padded", 1.0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["rotation", "oft", "hra"])
def test_so_they_do_with_other_adapters(family, adapter):
    """A rotation is folded into the weight or applied to activations by the batch's size."""
    modules = ["q_proj", "v_proj"] if family == "llama" else ["c_attn"]
    if adapter != "rotation" and family == "gpt2":
        pytest.skip("PEFT's OFT and HRA take no Conv1D")
    config = {
        "rotation": lambda: RotationConfig(target_modules=modules),
        "oft": lambda: OFTConfig(oft_block_size=8, target_modules=modules),
        "hra": lambda: HRAConfig(r=2, target_modules=modules),
    }[adapter]()
    policy = policy_of(family, config)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert_batches_do_not_matter(policy, family, "segments")


def assert_batches_do_not_matter(policy: Policy, family: str, attention: str) -> None:
    loose = family in FLOAT32_INSIDE or attention == "eager"
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if loose else {"rtol": 1e-10, "atol": 1e-10}
    rows = some_rows()
    expected = by_definition(policy, rows)
    reference = PairLogProbs(
        **expected, chosen_length=torch.empty(0), rejected_length=torch.empty(0)
    )
    expected_loss = dpo_loss(reference)
    names = trained(policy)
    expected_grads = torch.autograd.grad(expected_loss, names.values())
    largest = max(g.abs().max() for g in expected_grads)

    for layout in ("padded", "shared_prompt", "packed"):
        # Another order, batches of other sizes, and with them other padding.
        for split in ([[0, 1, 2, 3, 4]], [[4, 2], [0, 3, 1]], [[1], [0], [4], [3], [2]]):
            found: dict[int, tuple] = {}
            total = torch.zeros((), dtype=torch.float64)
            for part in split:
                batch = collate([rows[i] for i in part], 0, layout, loss_scale=1.0)
                log_probs = policy(batch)
                total = total + dpo_loss(log_probs)
                for j, i in enumerate(part):
                    found[i] = tuple(getattr(log_probs, name)[j] for name in expected)
            for i in range(len(rows)):
                for name, value in zip(expected, found[i], strict=True):
                    torch.testing.assert_close(value, expected[name][i], **tolerance)
            torch.testing.assert_close(total, expected_loss, **tolerance)
            grads = torch.autograd.grad(total, names.values())
            for a, b in zip(grads, expected_grads, strict=True):
                assert (a - b).abs().max() <= tolerance["rtol"] * largest


def test_the_matrix_would_notice_a_missing_window():
    """The windowed families differ from their unwindowed selves on these rows."""
    rows = some_rows()
    batch = collate(rows, 0, "padded", 1.0)
    windowed = policy_of("mistral-window", lora(""))(batch).chosen
    whole = policy_of("mistral", lora(""))(batch).chosen
    assert (windowed - whole).abs().max() > 1e-3


def test_a_frozen_copy_is_the_reference_of_full_fine_tuning():
    policy = policy_of("llama")
    batch = collate(some_rows(), 0, "packed", 1.0)
    before = policy(batch)
    torch.testing.assert_close(before.chosen, before.reference_chosen, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = policy(batch)
    torch.testing.assert_close(after.reference_chosen, before.reference_chosen, rtol=0, atol=0)
    assert (after.chosen - before.chosen).abs().min() > 1e-3
    assert not any(p.requires_grad for p in policy.reference.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_an_identity_adapter_gives_the_reference_exactly(dtype, layout):
    policy = policy_of("llama", LoraConfig(r=2, target_modules=["q_proj"]), dtype=dtype)
    log_probs = policy(collate(some_rows(), 0, layout, 1.0))
    assert torch.equal(log_probs.chosen, log_probs.reference_chosen)
    assert torch.equal(log_probs.rejected, log_probs.reference_rejected)


def test_adapter_dropout_touches_the_policy_only():
    policy = policy_of("llama", lora("", lora_dropout=0.5))
    batch = collate(some_rows(), 0, "padded", 1.0)
    policy.train()
    policy(batch)  # the first pass checks the layout
    first, second = policy(batch), policy(batch)
    assert not torch.equal(first.chosen, second.chosen)
    assert torch.equal(first.reference_chosen, second.reference_chosen)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_activation_checkpointing_changes_no_gradient(layout):
    batch = collate(some_rows(), 0, layout, 1.0)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = PolicyConfig(path="", adapter=lora(""), activation_checkpointing=checkpointing)
        policy = Policy.build(make("llama"), config, needs_reference=True).train()
        grads.append(torch.autograd.grad(dpo_loss(policy(batch)), trained(policy).values()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_family_that_does_not_follow_the_mask_is_refused():
    """Bloom's positions come from the 2-D mask, so a 4-D mask cannot express them."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    )
    policy = Policy.build(model, PolicyConfig(path="", adapter=lora("")), needs_reference=True)
    policy(collate(some_rows(), 0, "padded", 1.0))
    with pytest.raises(InputError, match=r"bloom.*data\.layout to 'padded'"):
        policy(collate(some_rows(), 0, "packed", 1.0))


def test_a_mask_without_its_blocks_is_refused():
    """What a strategy that casts inputs, or a model that slices masks, would leave of it."""
    policy = policy_of("llama", lora(""), attn_implementation="segments")
    layer = policy.language_model.model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            kwargs | {"attention_mask": kwargs["attention_mask"].clone()},
        ),
        with_kwargs=True,
    )
    policy._checked.add("packed")
    with pytest.raises(InputError, match=r"changes the mask.*data\.layout to 'padded'"):
        policy(collate(some_rows(), 0, "packed", 1.0))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_autocast_is_no_reason_to_refuse_a_family(layout):
    policy = policy_of("llama", lora(""), dtype=torch.float32, initializer_range=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        policy(collate(some_rows(), 0, layout, 1.0))


def test_adapters_that_cannot_work_are_refused_by_their_setting():
    from peft import PromptTuningConfig

    with pytest.raises(InputError, match=r"policy\.adapter.*nothing_like_this"):
        policy_of("llama", LoraConfig(target_modules=["nothing_like_this"]))
    with pytest.raises(InputError, match=r"policy\.adapter.*output head"):
        policy_of("llama", LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match=r"policy\.adapter.*also trains"):
        policy_of("qwen2", LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    with pytest.raises(InputError, match=r"policy\.adapter.*adds tokens"):
        policy_of("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_flash_attention_and_shared_lines_are_refused_together():
    policy = policy_of("llama", lora(""))
    policy.language_model.config._attn_implementation = "flash_attention_2"
    policy._checked.add("packed")  # whose own forward pass would need a GPU
    with pytest.raises(InputError, match=r"data\.layout to 'padded'"):
        policy(collate(some_rows(), 0, "packed", 1.0))


def test_generation_stops_where_it_should_and_ignores_padding():
    policy = policy_of("llama", lora(""))
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    together = policy.generate(
        collate_prompts(prompts, 0, [0, 1]), Sampling(max_new_tokens=8), stop_ids=[2]
    )
    alone = [
        policy.generate(collate_prompts([p], 0, [0]), Sampling(max_new_tokens=8), [2])[0]
        for p in prompts
    ]
    assert together == alone
    assert all(1 <= len(response) <= 8 for response in together)
    stop = together[0][2]
    shorter = policy.generate(
        collate_prompts(prompts, 0, [0, 1]), Sampling(max_new_tokens=8), [stop]
    )
    assert shorter[0] == together[0][: together[0].index(stop)]
