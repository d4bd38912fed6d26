"""``rotopo report``: one page of reward models, trainings, generations and judgements."""

import warnings
from pathlib import Path

from rotopo.errors import InputError
from rotopo.files import write_whole
from rotopo.judge.judgement import read_judgement
from rotopo.metrics.runs import read_test, read_training
from rotopo.report.glance import at_a_glance
from rotopo.report.inputs import Inputs, read_embeddings, read_responses
from rotopo.report.page import render
from rotopo.report.sections import all_sections


def report(
    output: Path,
    title: str = "Alignment report",
    about: str = "",
    reward_models: dict[str, Path] | None = None,
    reward_training: dict[str, Path] | None = None,
    policies: dict[str, Path] | None = None,
    policy_tests: dict[str, Path] | None = None,
    responses: dict[str, Path] | None = None,
    judge: Path | None = None,
    embeddings: Path | None = None,
    published: bool = False,
    samples: int = 6,
    smoothing: int = 5,
    tsne_perplexity: float = 30.0,
    seed: int = 0,
) -> None:
    """Make one self-contained HTML page of runs and judgements.

    Every part is optional: a single training makes a page too, and what nothing was given for is
    not on it. Names are what the page calls things; give a policy one name throughout.

    Args:
        output: the HTML file to write; an existing one is replaced.
        title: of the page.
        about: what the data and the models are; blank lines separate paragraphs.
        reward_models: the folder of a ``rotopo test`` run for each reward model: {NAME: FOLDER}.
        reward_training: the folder of a ``rotopo fit`` run for each reward model.
        policies: the folder of a ``rotopo fit`` run for each policy.
        policy_tests: the folder of a ``rotopo test`` run for each policy.
        responses: the responses.jsonl of ``rotopo predict`` for each policy, the base included.
        judge: the folder that ``rotopo judge`` wrote to.
        embeddings: embeddings of responses for a map: an .npz file with the arrays x [n, D] and
            labels [n], or a .csv file of numbers with a column ``label``.
        published: put the alignment report's own figures beside the reward models'.
        samples: sample pairs and sample prompts to show, evenly spaced over the rows.
        smoothing: logged steps that the drawn curves average over.
        tsne_perplexity: of the map, about how many neighbours a point has; lowered to (n − 1)/3
            for few points.
        seed: of t-SNE and the word clouds.

    Raises:
        InputError: no input at all, a folder or file that lacks what it should hold, a bad
            setting, or the libraries of ``rotopo[report]`` are not installed.
    """
    if samples < 0:
        raise InputError(f"samples is {samples}: it has to be at least 0.")
    if smoothing < 1:
        raise InputError(f"smoothing is {smoothing}: it has to be at least 1.")
    if tsne_perplexity <= 0:
        raise InputError(f"tsne_perplexity is {tsne_perplexity}: it has to be above 0.")
    if output.is_dir():
        raise InputError(f"output: {output} is a folder: name the HTML file.")
    try:
        import rotopo.report.text_plots  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a report takes {error.name}, which is not installed: pip install 'rotopo[report]'."
        ) from error

    rewards = [read_test("reward_models", *item) for item in (reward_models or {}).items()]
    reward_fits = [
        read_training("reward_training", *item) for item in (reward_training or {}).items()
    ]
    fits = [read_training("policies", *item) for item in (policies or {}).items()]
    tests = [read_test("policy_tests", *item) for item in (policy_tests or {}).items()]
    answers = {n: read_responses("responses", n, f) for n, f in (responses or {}).items()}
    verdicts = None if judge is None else read_judgement(judge)
    if published and not rewards:
        raise InputError("published: there are no reward_models to put the figures beside.")
    inputs = Inputs(
        reward_tests=rewards,
        reward_fits=reward_fits,
        fits=fits,
        tests=tests,
        answers=answers,
        verdicts=verdicts,
        embeddings=None if embeddings is None else read_embeddings(embeddings),
        published=published,
        samples=samples,
        smoothing=smoothing,
        tsne_perplexity=tsne_perplexity,
        seed=seed,
    )
    with warnings.catch_warnings():
        # Signs that the pictures' font lacks are in the reader's.
        warnings.filterwarnings("ignore", "Glyph")
        sections = all_sections(inputs)
        page = render(title, about, at_a_glance(inputs), sections)
    if not sections:
        raise InputError(
            "nothing to report on: give at least one of reward_models, reward_training, policies, "
            "policy_tests, responses, judge and embeddings."
        )
    write_whole(output, page)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
