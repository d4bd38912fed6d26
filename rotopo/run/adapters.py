"""The adapter of a checkpoint: its PEFT configuration, and whether a module has the same."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from rotopo.errors import InputError
from rotopo.run.changed import row_of
from rotopo.run.settings import plain, shown

# Which layers it is on: known better by the parameters that train.
PLACES = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


def configuration(model: Any) -> dict[str, Any] | None:
    """The PEFT configuration of what is on a model, in plain values; None without an adapter.

    Args:
        model: with or without an adapter.
    """
    configs = getattr(model, "peft_config", None)
    return None if configs is None else plain(configs["default"].to_dict())


def refuse_another(there: Mapping[str, Any] | None, model: Any, setting: str, fits: bool) -> None:
    """Refuse a checkpoint of another adapter; which layers it is on is left to others.

    Args:
        there: the checkpoint's configuration.
        model: with the adapter that is to take the checkpoint's weights.
        setting: that names the adapter, ``policy.adapter``.
        fits: whether training goes on; else what only training looks at may differ.

    Raises:
        InputError: an entry differs on which the function depends.
    """
    here = configuration(model)
    if here is None or there is None:
        if here != there:
            raise InputError(
                f"ckpt_path: {setting} is {_kind(here)} here and {_kind(there)} in the checkpoint."
            )
        return
    defaults = {field.name: _default(field) for field in fields(model.peft_config["default"])}
    names = ["peft_type", *(here.keys() | there.keys()) - {"peft_type", *PLACES}]
    for name in sorted(names, key=lambda name: (name != "peft_type", name)):
        # A release of PEFT that does not know an entry has it as the other's default.
        ours, theirs = (one.get(name, defaults.get(name)) for one in (here, there))
        row = row_of(f"model.policy.adapter.{name}")
        assert row is not None
        fate = "refused" if name == "peft_type" else row.fit if fits else row.use
        if ours != theirs and fate == "refused":
            raise InputError(
                f"ckpt_path: {setting}.{name} is {shown(ours)} here and {shown(theirs)} in the "
                "checkpoint: the adapter is what the checkpoint holds, so set it as there."
            )


def other_places(there: Mapping[str, Any] | None, model: Any, setting: str) -> str:
    """How two adapters differ in the settings of their layers, for a message."""
    here = configuration(model) or {}
    found = [
        f"{setting}.{name} is {shown(here.get(name))} here and {shown((there or {}).get(name))} in "
        "the checkpoint"
        for name in PLACES
        if here.get(name) != (there or {}).get(name)
    ]
    return "; ".join(found)


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return plain(field.default_factory())
    return None if field.default is MISSING else plain(field.default)


def _kind(configuration: Mapping[str, Any] | None) -> str:
    return "null" if configuration is None else str(configuration.get("peft_type"))
