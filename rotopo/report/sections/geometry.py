"""RoPO's diagnosis: what training did to hidden states and neurons."""

from collections.abc import Iterable, Mapping

from rotopo.metrics.runs import Training
from rotopo.report import figures, plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Picture, Section

ORDER = 50


def section(inputs: Inputs) -> Section:
    runs: list[Training] = []
    palette = dict(inputs.colours)
    for run in [*inputs.fits, *inputs.reward_fits]:
        if any(column.startswith("geometry/") for column in run.metrics):
            taken = {other.name for other in runs}
            name = f"reward model {run.name}" if run.name in taken else run.name
            runs.append(Training(name, run.folder, run.settings, run.facts, run.metrics))
            palette.setdefault(name, figures.SERIES[(len(palette) + 1) % len(figures.SERIES)])
    panels, captions = [], []
    names = tuple(run.name for run in runs)
    ranks = {run.name: _layers(run, "geometry/effective_rank/") for run in runs}
    with_ranks = [run for run in runs if ranks[run.name]]
    if with_ranks:
        ends = {name: {c[0]: ":", c[-1]: "-"} for name, c in ranks.items() if c}
        figure = plots.over_training(with_ranks, ends, palette, "Effective rank (dimensions)")
        panels.append(Panel(figure, _last_values("Effective rank", with_ranks, ends), names))
        captions.append(
            "Effective rank of the hidden states of all tokens: dotted after the embeddings, full "
            "after the last layer."
        )
    distances = {run.name: _layers(run, "geometry/distance/") for run in runs}
    with_distances = [run for run in runs if distances[run.name]]
    if with_distances:
        figure = plots.over_layers(
            with_distances, distances, palette, "Relative distance to the reference"
        )
        alt = _last_values("Distance to the reference by layer", with_distances, distances)
        panels.append(Panel(figure, alt, names))
        captions.append(
            "Relative distance: mean over tokens of ‖h − h_ref‖ / ‖h_ref‖ at each layer, as last "
            "logged."
        )
    for column, title, said in (
        ("geometry/neuron_cosine", "Mean |cos| between neurons", "Mean |cos|"),
        (
            "geometry/hyperspherical_energy",
            "Hyperspherical energy / at the start",
            "Hyperspherical energy",
        ),
    ):
        own = [run for run in runs if len(run.logged(column))]
        if own:
            columns = {run.name: {column: "-"} for run in own}
            figure = plots.over_training(own, columns, palette, title)
            panels.append(Panel(figure, _last_values(title, own, columns), names))
            captions.append(
                f"{said}: of the adapted weights' neurons, adapter merged; under a rotation it "
                "cannot change, by construction."
            )
    if not panels:
        return Section("Geometry", [])
    caption = " ".join(["Measured on a fixed batch of pairs.", *captions])
    return Section("Geometry", [Picture("Hidden states and neurons", panels, caption)])


def _layers(run: Training, prefix: str) -> list[str]:
    """The columns of a measure of each hidden layer that were logged, by layer."""
    return sorted(c for c in run.metrics if c.startswith(prefix) and len(run.logged(c)))


def _last_values(what: str, runs: list[Training], columns: Mapping[str, Iterable[str]]) -> str:
    """A picture's alternative text: where each run ended."""
    ends = [f"{run.name} {run.logged(list(columns[run.name])[-1]).iloc[-1]:.3g}" for run in runs]
    return f"{what}, last values: {', '.join(ends)}."
