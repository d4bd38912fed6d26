"""Pictures of the desiderata study."""

import math

import matplotlib
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from rotopo.report.figures import STYLE, grid, legend_below, lines, new
from rotopo.studies.tabular import Convention, Prompt

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_POLICY, _REFERENCE = r"$\pi_\theta$", r"$\pi_{ref}$"
_HIGHEST_KL = 0.6  # nats; beyond it nothing differs that matters
_ARROWS = 4  # every how many points of a surface there is an arrow
_PANEL = 3.1  # inches of a panel's width
_ACROSS = 12.8  # inches of the losses


@matplotlib.rc_context(STYLE)
def interpolation(table: pd.DataFrame, prompt: Prompt, samples: pd.DataFrame | None) -> Figure:
    """π_θ over λ, a panel for each objective, with π_ref and π* as lines.

    Where an objective has no single minimiser there is a gap.

    Args:
        table: of :func:`rotopo.studies.desiderata_tables.interpolation`.
        prompt: whose.
        samples: of :func:`rotopo.studies.desiderata_tables.samples_of`, drawn as dots, or None.
    """
    names = table.objective.unique()
    figure, panels = _panels(len(names), 4, _PANEL, 2.7)
    for axes, name in zip(panels, names, strict=True):
        rows = table[table.objective == name]
        unsure = rows.remark.str.contains("apart|no fixed point")
        for i, (true, reference) in enumerate(
            zip(prompt.true.tolist(), prompt.reference.tolist(), strict=True)
        ):
            colour, column = _COLOURS[i % 10], f"pi_{i + 1}"
            certain = rows[column].mask(unsure)
            axes.plot(rows["lambda"], certain, color=colour, label=f"response {i + 1}")
            axes.axhline(true, color=colour, linestyle=":", linewidth=1)
            axes.axhline(reference, color=colour, linestyle="--", linewidth=0.8, alpha=0.6)
            if samples is not None:
                drawn = samples[(samples.objective == name) & (samples.seed >= 0)]
                axes.plot(drawn["lambda"], drawn[column], ".", color=colour, alpha=0.35, ms=4)
        axes.set(ylim=(-0.03, 1.03), title=lines(name, _PANEL - 0.6, 9.5))
        if unsure.any():
            said = axes.get_title(loc="left") + "\n(gap: no single minimiser)"
            axes.set_title(said, fontweight="normal")
        _log_lambda(axes, rows["lambda"])
    panels[0].set_ylabel(_POLICY)
    _legend(figure, panels[0], [(":", r"$\pi^*$"), ("--", _REFERENCE)], samples is not None)
    return figure


@matplotlib.rc_context(STYLE)
def preservation(
    table: pd.DataFrame, reference_kl: float, convention: Convention = "ordered_pairs"
) -> Figure:
    """KL(π*‖π_θ) over λ on the good and on the bad prompt, a panel for each objective.

    Args:
        table: of :func:`rotopo.studies.desiderata_tables.preservation`.
        reference_kl: KL(π*‖π_ref) on the bad prompt, of the convention; on the good one it is 0.
        convention: of the table; ``official`` divides every KL by the number of responses.
    """
    names = table.objective.unique()
    figure, panels = _panels(len(names), 4, _PANEL, 2.7)
    for axes, name in zip(panels, names, strict=True):
        rows = table[table.objective == name]
        strengths = rows["log_lambda"].map(math.exp)
        for which, colour, label, reference in (
            ("good", _COLOURS[0], r"good prompt: $\pi_{ref} = \pi^*$", 0.0),
            ("bad", _COLOURS[1], r"bad prompt: $\pi_{ref} \neq \pi^*$", reference_kl),
        ):
            axes.plot(strengths, rows[f"kl_{which}"], color=colour, label=label)
            axes.axhline(reference, color=colour, linewidth=0.8, linestyle="--", alpha=0.6)
        axes.set(ylim=(-0.02 * _HIGHEST_KL, _HIGHEST_KL), title=lines(name, _PANEL - 0.6, 9.5))
        if (rows[["kl_good", "kl_bad"]] > _HIGHEST_KL).all(axis=None):
            axes.text(0.5, 0.5, "higher everywhere", ha="center", transform=axes.transAxes)
        _log_lambda(axes, strengths)
    divided = " / responses" if convention == "official" else ""
    panels[0].set_ylabel(rf"KL($\pi^*$‖$\pi_\theta$){divided}, nats")
    _legend(figure, panels[0], [("--", _REFERENCE)], samples=False)
    return figure


@matplotlib.rc_context(STYLE)
def constraint(table: pd.DataFrame) -> Figure:
    """π_θ under DPO and under the RLHF loss, over α.

    Args:
        table: of :func:`rotopo.studies.desiderata_tables.constraint`.
    """
    figure, panels = _panels(1, 1, 5.2, 3.4)
    axes = panels[0]
    for name, style in (("DPO", "-"), ("RLHF", "--")):
        rows = table[table.loss_name == name]
        for i, column in enumerate(c for c in table if c.startswith("pi_")):
            axes.plot(
                rows.alpha,
                rows[column],
                style,
                color=_COLOURS[i % 10],
                marker=".",
                label=f"{name}, response {i + 1}",
            )
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    axes.set(xlabel="α", ylabel=_POLICY, ylim=(0, None), title="α‖θ‖² added, λ = 1")
    axes.set_xticks(sorted(set(table.alpha)), minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def losses(asked: dict[str, Tensor], others: dict[str, Tensor], log_ratios: Tensor) -> Figure:
    """Each loss over (Δw, Δl) as colour, and the direction of its descent as arrows.

    Args:
        asked: of :func:`rotopo.studies.surfaces.surface`, by name, each [3, n, n]; they come first
            and large.
        others: the same, of what they are compared with, small.
        log_ratios: Δ, nats [n].
    """
    kinds = [(asked, 4, 9.5)] + ([(others, 8, 7)] if others else [])
    heights = [
        math.ceil(len(own) / min(len(own), columns)) * (_ACROSS / max(columns, 4) + 0.25) + 0.3
        for own, columns, _ in kinds
    ]
    figure = new(_ACROSS, sum(heights) + 0.6)
    parts = figure.subfigures(len(kinds), 1, squeeze=False, height_ratios=heights).flatten()
    for part, (own, columns, size) in zip(parts, kinds, strict=True):
        _surfaces(grid(part, len(own), columns), own, log_ratios, size, columns)
    figure.suptitle(
        "Loss (dark is low, each panel on its own scale) and descent, over the log-ratios of the "
        "chosen (Δw) and the rejected (Δl); λ = 1 where there is one",
        fontsize=9.5,
    )
    return figure


def _surfaces(
    panels: list[Axes], surfaces: dict[str, Tensor], log_ratios: Tensor, size: float, columns: int
) -> None:
    x = log_ratios.numpy()
    some = torch.arange(len(x))[_ARROWS // 2 :: _ARROWS]
    large = columns <= 4
    for i, (axes, (name, values)) in enumerate(zip(panels, surfaces.items(), strict=True)):
        axes.contourf(x, x, values[0].numpy(), levels=24, cmap="viridis")
        down = -values[1:][:, some][:, :, some]
        length = down.norm(dim=0)
        # The square root keeps short arrows visible beside long ones.
        down = down / length.clamp(min=1e-300) * (length / length.max()).sqrt()
        axes.quiver(
            x[some],
            x[some],
            *down.numpy(),
            color="white",
            edgecolor="black",
            linewidth=0.4,
            scale=9,
            width=0.012,
            pivot="mid",
        )
        axes.plot(x, x, color="white", linewidth=0.6, linestyle=":")
        title = lines(name, _ACROSS / columns - 0.4, size, most=3, bold=large)
        axes.set_title(title, fontsize=size, fontweight="bold" if large else "normal")
        axes.set(xticks=[-4, 0, 4], yticks=[-4, 0, 4])
        axes.tick_params(labelsize=size - 1)
        axes.set_aspect("equal")
        if i % columns == 0:
            axes.set_ylabel("Δl, nats", fontsize=size)
        if i >= len(surfaces) - columns:
            axes.set_xlabel("Δw, nats", fontsize=size)


def _panels(n: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of n panels in rows of so many columns, and its axes."""
    columns = min(columns, n)
    figure = new(width * columns + 0.6, height * math.ceil(n / columns) + 0.2)
    return figure, grid(figure, n, columns)


def _log_lambda(axes: Axes, strengths: pd.Series) -> None:
    """λ on a logarithmic axis over all of its values, named at powers of ten only."""
    axes.set(xscale="log", xlabel="λ", xlim=(strengths.min() / 1.4, strengths.max() * 1.4))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, kinds: list[tuple[str, str]], samples: bool) -> None:
    """One legend below all panels: the responses, and what the kinds of lines are."""
    handles, labels = axes.get_legend_handles_labels()
    for style, name in kinds:
        handles += axes.plot([], [], color="grey", linestyle=style)
        labels.append(name)
    if samples:
        handles += axes.plot([], [], ".", color="grey")
        labels.append("samples")
    legend_below(figure, handles, labels)
