"""Prints the lower bound of every dependency in pyproject.toml as what pip has to install."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
for requirement in project["dependencies"]:
    name, bound = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\w.]+)(?:,.*)?", requirement).groups()
    print(f"{name}=={bound}")
