"""Pictures of texts: their lengths, their words, and a map of their embeddings."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from sklearn.manifold import TSNE
from wordcloud import WordCloud

from rotopo.metrics.runs import Test
from rotopo.report.figures import (
    CHOSEN,
    GREY,
    HEIGHT,
    REJECTED,
    STYLE,
    font_file,
    legend_below,
    new,
    panel,
)
from rotopo.report.plots import histogram
from rotopo.report.score_plots import boxes

_CLOUD_WORDS = 70


@matplotlib.rc_context(STYLE)
def pair_lengths(test: Test) -> list[Figure]:
    """Lengths of chosen and rejected responses, and their difference pair by pair."""
    first, axes = panel("Lengths")
    samples = {
        "chosen": test.pairs.chosen_tokens.to_numpy(),
        "rejected": test.pairs.rejected_tokens.to_numpy(),
    }
    histogram(axes, samples, {"chosen": CHOSEN, "rejected": REJECTED})
    axes.set(xlabel="length (tokens)", ylabel="responses")
    axes.legend()
    second, axes = panel("Chosen less rejected")
    difference = samples["chosen"] - samples["rejected"]
    histogram(axes, {"pairs": difference}, {"pairs": CHOSEN})
    mean = float(difference.mean())
    axes.axvline(0, color=GREY, linewidth=0.9)
    axes.axvline(
        mean,
        color=REJECTED,
        linewidth=1,
        linestyle="--",
        label=f"mean {mean:+.1f}".replace("-", "−"),
    )
    axes.set(xlabel="difference of lengths (tokens)", ylabel="pairs")
    axes.legend()
    return [first, second]


@matplotlib.rc_context(STYLE)
def response_lengths(tokens: dict[str, np.ndarray], colours: dict[str, str]) -> list[Figure]:
    """Lengths of the policies' responses: boxes, and cumulative shares."""
    first, axes = panel("Lengths", height=1.0 + 0.42 * len(tokens))
    boxes(axes, tokens, colours)
    axes.set_xlabel("length (tokens)")
    figure, axes = panel("Share of responses up to a length")
    styles = ("-", "--", "-.", ":")
    for i, (name, values) in enumerate(tokens.items()):
        axes.ecdf(values, color=colours[name], linestyle=styles[i % 4], label=name)
    axes.set(xlabel="length (tokens)", ylabel="share of responses")
    legend_below(figure)
    return [first, figure]


@matplotlib.rc_context(STYLE)
def embedding_map(
    x: np.ndarray, labels: np.ndarray, colours: dict[str, str], perplexity: float, seed: int
) -> Figure:
    """t-SNE of embeddings x [n, D] (van der Maaten and Hinton 2008), a colour for each label."""
    # Pairwise distances are what t-SNE sees; 50 principal components keep them in little time.
    if x.shape[1] > 50 and len(x) > 50:
        from sklearn.decomposition import PCA

        x = PCA(50, random_state=seed).fit_transform(x)
    flat = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    figure = new(height=HEIGHT + 0.9)
    axes = figure.subplots()
    for name, marker in zip(colours, "o^sDvX<>" * 9, strict=False):
        own = flat[labels == name]
        axes.scatter(
            own[:, 0],
            own[:, 1],
            s=9,
            marker=marker,
            color=colours[name],
            alpha=0.65,
            linewidth=0,
            label=name,
            rasterized=len(flat) > 600,
        )
    axes.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    legend_below(figure)
    return figure


def word_cloud(name: str, texts: list[str], colour: str, seed: int) -> tuple[Figure | None, int]:
    """The most frequent words of two letters or more, the larger the more frequent, without English
    stop words.

    Returns:
        The picture, None where no words are left; and how many different words were left out
        because the font has no signs for them.
    """
    cloud = WordCloud(
        width=710,
        height=430,
        mode="RGBA",
        background_color=None,
        color_func=lambda *_, **__: colour,
        font_path=str(font_file()),
        max_words=_CLOUD_WORDS,
        collocations=False,
        prefer_horizontal=1.0,
        random_state=seed,
        max_font_size=86,
        min_font_size=16,
        min_word_length=2,
    )
    counts = cloud.process_text("\n".join(texts))
    signs = get_font(font_file()).get_charmap()
    known = {word: n for word, n in counts.items() if all(ord(sign) in signs for sign in word)}
    if not known:
        return None, len(counts)
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(name, 2.5)
        axes.imshow(cloud.generate_from_frequencies(known).to_array())
        axes.axis("off")
    return figure, len(counts) - len(known)
