"""How far models count: by the configuration alone, and by running them past it."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rotopo.data.batch import PromptBatch
from rotopo.errors import InputError
from rotopo.models.policy import Policy
from rotopo.models.settings import Sampling
from rotopo.pretrained import Positions, positions, positions_of
from tests.models.families import make

LIMIT = 40
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "settings", "count", "end"),
    [
        ("gpt2", {}, 1024, True),
        ("gpt_bigcode", {"n_positions": 8192}, 8192, True),
        ("opt", {}, 2048, True),
        ("mpt", {}, 2048, True),
        ("gptj", {}, 2048, True),
        ("xglm", {}, 2048, False),
        ("llama", {"max_position_embeddings": 8192}, 8192, False),
        ("gpt_neox", {}, 2048, False),
        ("falcon", {"alibi": False}, 2048, False),
        # Scaled before it is written: DeepSeek, Llama 3.1, Gemma 3.
        (
            "deepseek_v3",
            {
                "max_position_embeddings": 163840,
                "rope_scaling": YARN | {"factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
            False,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 131072,
                "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
            },
            131072,
            False,
        ),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 131072, False),
        # And after: Qwen2.5's advice for long texts, Vicuna 1.5 16k.
        (
            "qwen2",
            {
                "max_position_embeddings": 32768,
                "rope_scaling": YARN | {"original_max_position_embeddings": 32768},
            },
            131072,
            False,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            16384,
            False,
        ),
    ],
)
def test_positions_of_configurations(family, settings, count, end, tmp_path):
    config = AutoConfig.for_model(family, **settings)
    assert positions_of(config) == Positions(count, end)
    config.save_pretrained(tmp_path)
    assert positions(str(tmp_path)) == Positions(count, end)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("bloom", {}), ("falcon", {"alibi": True}), ("mamba", {}), ("nemotron_h", {}), ("jamba", {})],
)
def test_no_limit(family, settings):
    assert positions_of(AutoConfig.for_model(family, **settings)) is None


def test_a_model_within_another_and_none_at_all(tmp_path):
    config = AutoConfig.for_model("gemma3")
    config.text_config.max_position_embeddings = 77
    config.save_pretrained(tmp_path / "nested")
    assert positions(str(tmp_path / "nested")) == Positions(77, end=False)
    assert positions(str(tmp_path)) is None


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_generation_stays_within_a_table(family):
    policy = Policy(make(family, torch.float32))
    prompts = PromptBatch(
        torch.full((1, 100), 9), torch.ones(1, 100, dtype=torch.long), torch.zeros(1)
    )
    sampling = Sampling(max_new_tokens=29, temperature=0)
    (response,) = policy.generate(prompts, sampling, [])  # the last new token is not read
    assert len(response) == 29
    sampling = Sampling(max_new_tokens=30, temperature=0)
    if family == "llama":
        assert len(policy.generate(prompts, sampling, [])[0]) == 30
        return
    with pytest.raises(InputError, match=r"100 tokens and 30 new ones .* 128 positions"):
        policy.generate(prompts, sampling, [])


# By all the names that families have for them; each takes those that it knows.
SIZES = {
    32: "hidden_size n_embd d_model emb_dim embedding_size attention_hidden_size "
    "word_embed_proj_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_key_value_heads num_experts eos_token_id",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
    "rotary_dim",
    LIMIT: "n_positions n_ctx max_position_embeddings max_target_positions max_seq_len "
    "context_length",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "vocab_size": 96,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "is_decoder": True,
    "causal": True,
    "attention_types": [[["global", "local"], 1]],
    "axial_pos_shape": [5, 8],
    "axial_pos_embds_dim": [8, 24],
    "attn_layers": ["local", "local"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_family_reads_as_far_as_is_said(family):
    """Those that a policy takes fail right past a table's end; others, and of no limit, do not."""
    torch.manual_seed(0)
    try:
        default = AutoConfig.for_model(family)
        known = default.to_dict()
        if getattr(default.get_text_config(), "rope_parameters", None):
            limit = positions_of(default.get_text_config())
            assert limit is None or not limit.end
            return
        config = AutoConfig.for_model(family, **{k: v for k, v in SMALL.items() if k in known})
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    except (AttributeError, KeyError, StrictDataclassError, ValueError) as error:
        pytest.skip(f"no small one can be made so: {error}")
    try:
        Policy(model)._check_once("padded")
    except (AssertionError, InputError, RuntimeError, ValueError) as error:
        pytest.skip(f"a policy does not take it: {error}")
    limit = positions_of(model.config.get_text_config())

    @torch.no_grad()
    def reads(tokens: int) -> bool:
        try:
            model(input_ids=torch.randint(3, 90, (1, tokens)), use_cache=False)
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    assert reads(LIMIT)
    assert reads(LIMIT + 1) is not (limit is not None and limit.end)
    assert limit is None or limit.count == LIMIT
