"""Plots for Bokeh: its script, and for each plot the JSON that the script draws."""

from typing import Any

from gold_jax.reporting.curves import Plot

# Okabe and Ito's colours for colour-blind readers, then text and grid, with their replacements in dark mode.
DARK = {"#0072b2": "#56a9dc", "#d55e00": "#ee8742", "#009e73": "#35c79a", "#565e69": "#a6aeb9", "#d9dde2": "#343a42"}
*_LINES, _TEXT, _GRID = DARK
_DASHES = ("solid", "dashed", "dotted")


def require_bokeh() -> Any:
    """Bokeh; ImportError with what to install."""
    try:
        import bokeh

        return bokeh
    except ImportError:
        raise ImportError("a report draws its curves with Bokeh: pip install 'gold_jax[report]'") from None


def script() -> str:
    """Bokeh's JavaScript for drawing plots."""
    require_bokeh()
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True, log_level="error").js_raw)


def draw(plot: Plot, target: str, runs: int) -> dict[str, Any]:
    """A plot as `Bokeh.embed.embed_item` takes it, for the element with the id `target`."""
    require_bokeh()
    from bokeh.embed import json_item
    from bokeh.models import HoverTool, Legend, NumeralTickFormatter
    from bokeh.plotting import figure

    fig = figure(
        height=240, sizing_mode="stretch_width", toolbar_location=None, tools="", background_fill_alpha=0,
        border_fill_alpha=0, outline_line_color=None, min_border_right=12,
    )  # fmt: skip
    drawn = []
    for line in plot.lines:
        several = len({other.label for other in plot.lines if (other.run, other.kind) == (line.run, line.kind)}) > 1
        index = line.run if runs > 1 else plot.lines.index(line) if several else line.kind
        style: dict[str, Any] = {"name": line.label, "color": _LINES[index % len(_LINES)]}
        dash = _DASHES[(line.kind if runs > 1 else index) % len(_DASHES)]
        renderers = [fig.line(line.steps, line.values, line_width=2, line_dash=dash, **style)]
        if len(line.steps) <= 40:
            renderers.append(fig.scatter(line.steps, line.values, size=5, **style))
        drawn.append((line.label, renderers))
    tips = [("", "$name"), ("update", "@x"), (plot.unit or plot.title, "@y{%.6g}")]  # digits of small numbers too
    hover = HoverTool(tooltips=tips, formatters={"@y": "printf"})
    hover.renderers = [renderers[-1] for _, renderers in drawn]
    fig.add_tools(hover)
    if len(drawn) > 1:
        style = {"orientation": "horizontal", "ncols": 2, "glyph_width": 28, "border_line_color": None}
        fig.add_layout(
            Legend(items=drawn, click_policy="hide", background_fill_alpha=0, label_text_color=_TEXT, **style), "below"
        )
    fig.xaxis.axis_label, fig.xaxis.ticker.min_interval = "update", 1
    fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
    fig.grid.grid_line_color, fig.axis.minor_tick_line_color = _GRID, None
    fig.axis.axis_line_color = fig.axis.major_tick_line_color = fig.axis.major_label_text_color = _TEXT
    fig.axis.axis_label_text_color, fig.axis.axis_label_text_font_style = _TEXT, "normal"
    return json_item(fig, target)
