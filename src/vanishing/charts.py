"""Charts for pages that need no network."""

from __future__ import annotations

try:
    from plotly import graph_objects
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise ImportError("the report needs plotly: pip install 'vanishing[demo]'") from error

__all__ = ["get_plotlyjs", "graph_objects", "to_html"]


def to_html(figure: graph_objects.Figure, *, xaxis: str) -> str:
    """Return a figure as a part of a page that holds plotly's script.

    Args:
        figure: the figure, which is changed.
        xaxis: title of its horizontal axis.
    """
    figure.update_layout(
        template="plotly_white",
        font={"size": 13},
        margin={"l": 50, "r": 15, "t": 15, "b": 45},
        legend={"orientation": "h", "y": -0.22},
        # A finger that scrolls the page must not zoom a chart.
        dragmode=False,
        hovermode="x unified",
    )
    figure.update_xaxes(title=xaxis)
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            default_height="360px",
            config={"displayModeBar": False, "responsive": True},
        )
    )
