"""What the report is made from."""

import zipfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from rotopo.data.schemas import Message
from rotopo.errors import InputError
from rotopo.judge.judgement import Judgement
from rotopo.metrics.reading import lines_with, need
from rotopo.metrics.runs import Test, Training
from rotopo.report import figures

_RESPONSE_FIELDS = {"row": int, "prompt": list, "response": str, "tokens": int}


@dataclass(frozen=True)
class Response:
    """A line of a policy's responses: the prompt, the text, and its length in tokens."""

    prompt: list[Message]
    text: str
    tokens: int


@dataclass(frozen=True)
class Inputs:
    """What was given to ``rotopo report``, read.

    Attributes:
        reward_tests: tests of reward models.
        reward_fits: trainings of reward models.
        fits: trainings of policies.
        tests: tests of policies.
        answers: responses by policy and by the row of their prompt.
        verdicts: what ``rotopo judge`` wrote.
        embeddings: x [n, D] and their labels [n].
        published: whether the alignment report's own figures are beside the reward models'.
        samples: how many pairs and prompts to show.
        smoothing: logged steps that curves average over.
        tsne_perplexity: of the map.
        seed: of t-SNE and the word clouds.
    """

    reward_tests: list[Test]
    reward_fits: list[Training]
    fits: list[Training]
    tests: list[Test]
    answers: dict[str, dict[int, Response]]
    verdicts: Judgement | None
    embeddings: tuple[np.ndarray, np.ndarray] | None
    published: bool
    samples: int
    smoothing: int
    tsne_perplexity: float
    seed: int

    @property
    def colours(self) -> dict[str, str]:
        """A policy has one colour on the whole page; the baseline is grey."""
        baseline = None if self.verdicts is None else self.verdicts.baseline
        judged = [] if self.verdicts is None else self.verdicts.policies
        runs = (run.name for run in [*self.fits, *self.tests])
        named = dict.fromkeys(chain(runs, self.answers, judged))
        others = [name for name in named if name != baseline]
        colours = {name: figures.SERIES[i % len(figures.SERIES)] for i, name in enumerate(others)}
        return colours if baseline is None else colours | {baseline: figures.GREY}


def read_responses(setting: str, name: str, file: Path) -> dict[int, Response]:
    """Responses of a policy by the row of their prompt.

    Raises:
        InputError: no such file, or a line that is no response.
    """
    if not file.is_file():
        raise InputError(f"{setting}.{name}: there is no file {file}.")
    lines = lines_with(file, _RESPONSE_FIELDS)
    return {
        line["row"]: Response(line["prompt"], line["response"], line["tokens"]) for line in lines
    }


def read_embeddings(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings x [n, D] and their labels [n], of an .npz with these two arrays or of a .csv
    with a column ``label`` among columns of numbers.

    Raises:
        InputError: no such file, no such arrays, or values that are not finite numbers.
    """
    if not file.is_file():
        raise InputError(f"embeddings: there is no file {file}.")
    if file.suffix == ".npz":
        try:
            with np.load(file) as arrays:  # without what has to be unpickled
                need(arrays, ("x", "labels"), file)
                x, labels = arrays["x"], arrays["labels"].astype(str)
        except InputError:
            raise
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"embeddings: {file}: {error}") from error
    elif file.suffix == ".csv":
        table = pd.read_csv(file, dtype={"label": str}, keep_default_na=False)
        need(table, ("label",), file)
        labels = table.pop("label").to_numpy(dtype=str)
        x = table.to_numpy()
    else:
        raise InputError(f"embeddings: {file} is neither an .npz nor a .csv file.")
    try:
        x = x.astype(float)
    except ValueError as error:
        raise InputError(f"embeddings: {file}: {error}") from error
    if x.ndim != 2 or labels.shape != x.shape[:1] or len(x) < 4:
        raise InputError(
            f"embeddings: {file} holds x {list(x.shape)} and labels {list(labels.shape)}: x has to "
            "be [n, D] and labels [n], n at least 4."
        )
    if not np.isfinite(x).all():
        raise InputError(f"embeddings: {file}: not all of the values are finite.")
    return x, labels
