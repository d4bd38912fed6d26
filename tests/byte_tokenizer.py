"""Small tokenizers whose tokens are bytes."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    special: list[str],
    chat_template: str | None,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """The special tokens first, then bytes, then a few merges."""
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate([*special, *pieces])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if adds_bos:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """265 byte-level tokens: pad 0, bos 1, eos 2; ChatML (3, 4) behind one bos; as loaded again."""
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(special, CHATML, bos="<|bos|>", eos="<|eos|>", pad="<|pad|>")
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
