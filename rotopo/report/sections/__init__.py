"""The sections of the report: one module here for each, and nothing else.

A module has ``ORDER``, where the section stands among the others, and ``section(inputs)``, which
makes it; without parts, it is left out. To add one, add its file.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from rotopo.report.inputs import Inputs
from rotopo.report.page import Section


def modules() -> list[ModuleType]:
    """The modules here, in the order of their sections."""
    found = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return sorted(found, key=lambda module: module.ORDER)


def all_sections(inputs: Inputs) -> list[Section]:
    """Every section that the inputs fill, in their order."""
    made = [module.section(inputs) for module in modules()]
    return [section for section in made if section.parts]
