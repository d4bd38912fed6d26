"""How to load what was written: the code on the model card."""

from rotopo.export.job import Kind


def loading_code(
    name: str, kind: Kind, template: str | None, base: str, adapter: str | None
) -> str:
    """Python that loads an export and uses it.

    Args:
        name: of the export's folder.
        kind: what it is.
        template: the name of the chat template, where the tokenizer has several.
        base: path of the base model.
        adapter: class of the adapter, if there is one.
    """
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)"
    named = "" if template in (None, "default") else f"chat_template={template!r}, "
    prompt = 'messages = [{"role": "user", "content": "..."}]'
    if kind == "reward":
        return f"""from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = {name!r}
model = AutoModelForSequenceClassification.from_pretrained(folder)
{tokenizer}
messages = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, {named}return_tensors="pt", return_dict=True)
reward = model(**inputs).logits.item()"""
    generation = f"""{tokenizer}
{prompt}
inputs = tokenizer.apply_chat_template(
    messages, {named}add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    if kind == "merged":
        return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {name!r}
model = AutoModelForCausalLM.from_pretrained(folder)
{generation}"""
    imports, base_model = "", repr(base)
    if base.startswith("package:") or base.endswith(".gguf"):  # which only rotopo reads
        imports, base_model = (
            "from rotopo.pretrained import pretrained_folder\n",
            f"pretrained_folder({base!r})",
        )
    if adapter is not None and adapter.startswith("rotopo."):
        imports = "import rotopo.rotation  # makes the adapter known to PEFT\n" + imports
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
{imports}
folder = {name!r}
base = AutoModelForCausalLM.from_pretrained({base_model})
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)
{generation}"""
