"""Whether a checkpoint is of the model that a module has loaded."""

from collections.abc import Mapping
from typing import Any

from rotopo.errors import InputError
from rotopo.run.adapters import other_places, refuse_another
from rotopo.run.settings import adapter_of
from rotopo.run.steps import works_in_steps_only


def refuse_another_model(module: Any, ours: Mapping[str, Any], fits: bool) -> None:
    """Refuse a checkpoint of another base model or adapter, or of other parameters.

    Args:
        module: a :class:`rotopo.training.PairwiseModule`, loaded.
        ours: what a checkpoint holds of rotopo's.
        fits: whether training goes on.

    Raises:
        InputError: it is; the message names the setting.
    """
    config, model = module.model_config, module.backbone.model
    here, there = module.base_fingerprint, ours["base_fingerprint"]
    if here != there:
        raise InputError(
            f"ckpt_path: {config.setting}.path is {config.path}, which is another base model than "
            f"this checkpoint was trained on (fingerprint {here} here, {there} in the checkpoint): "
            f"give the path of that one, {adapter_of(ours) or 'quantised as it was'}."
        )
    reference, theirs = module.backbone.base.reference, ours.get("base", {}).get("reference")
    if reference and theirs and reference != theirs:
        raise InputError(
            f"ckpt_path: policy.reference_path {config.reference_path} is another model than the "
            "one that this checkpoint was trained against: its weights have changed since."
        )
    setting, knows = f"{config.setting}.adapter", "adapter" in ours  # older ones do not
    if knows:
        refuse_another(ours["adapter"], model, setting, fits)
    shapes, state = ours["shapes"], module.state_dict()
    saved = module.saved_names()
    wrong = shapes.keys() ^ saved
    if not works_in_steps_only(module.trainer):  # FSDP1's shares are flat
        wrong |= {k for k in shapes.keys() & saved if list(state[k].shape) != shapes[k]}
    if wrong:
        places = other_places(ours["adapter"], model, setting) if knows else ""
        raise InputError(
            f"ckpt_path: checkpoint and module train different parameters ({len(wrong)} of them, "
            f"{min(wrong)} for one): {places or 'check the settings of the adapter'}."
        )
