"""The table of methods as text, as Markdown and as a drawing (the paper's Figure 3)."""

from simsiam.config.method import SECOND_ENCODER_TARGETS, Method
from simsiam.config.methods import METHODS, SIMSIAM

COLUMNS = (
    "method",
    "projector",
    "predictor",
    "target",
    "gradient",
    "D",
    "pairs",
    "batch norm",
    "optimizer",
)
PANEL_WIDTH, PANEL_HEIGHT = 168, 250  # pixels
PANELS_PER_ROW = 5
DEFAULT_COLOR = "#24292f"
# Targets that no trained encoder computes from this step's view.
RIGHT_BOXES = {
    "labels": "labels",
    "teacher": "teacher",
    "kmeans": "k-means",
    "moving_average": "memory bank",
}
HIGHLIGHT_COLOR = "#cf222e"  # red, as in the paper, for components that SimSiam does not have


def table_cells(row: Method) -> tuple[str, ...]:
    """Describe a method by one text for each of COLUMNS.

    Args:
        row: The method.

    Returns:
        The texts.
    """
    decay = {"momentum": f" {row.decay:g}", "moving_average": f" {row.decay:g}"}.get(row.target, "")
    hidden = f"{row.proj_hidden}, " * (row.proj_layers - 1)
    return (
        row.name,
        f"{hidden}{row.dim}",
        row.predictor if row.predictor == "none" else f"{row.pred_dim}, {row.dim}",
        row.target + decay,
        "stopped" if row.stop_gradient else "flows",
        row.criterion,
        row.pairs,
        row.bn,
        f"{row.optimizer} {row.base_lr:g}, decay {row.weight_decay:g}",
    )


def format_methods_table(width: int) -> str:
    """Make the table of all methods as plain text.

    Args:
        width: Characters in a line. What does not fit beside the names of the methods follows
            below, as another table.
    """
    rows = [COLUMNS, *map(table_cells, METHODS.values())]
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in zip(*rows)]
    names, *rest = columns
    tables = [[names]]
    for column in rest:
        if sum(len(other[0]) + 2 for other in tables[-1]) + len(column[0]) > width:
            tables.append([names])
        tables[-1].append(column)
    return "\n\n".join(
        "\n".join("  ".join(row).rstrip() for row in zip(*table)) for table in tables
    )


def format_methods_markdown() -> str:
    """Make the table of all methods as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(table_cells, METHODS.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_methods_svg() -> str:
    """Draw Figure 3 as an SVG, with a panel for each method.

    A dashed line is the path of a gradient; a bar in its place is the stop-gradient.
    """
    rows = list(METHODS.values())
    lines = -(-len(rows) // PANELS_PER_ROW)
    size = f'width="{PANEL_WIDTH * PANELS_PER_ROW}" height="{PANEL_HEIGHT * lines}"'
    panels = []
    for i, row in enumerate(rows):
        x, y = i % PANELS_PER_ROW * PANEL_WIDTH, i // PANELS_PER_ROW * PANEL_HEIGHT
        panels.append(f'<g transform="translate({x} {y})">{draw_panel(row)}</g>')
    style = 'font-family="sans-serif" font-size="11" text-anchor="middle" stroke-width="1.2"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', ground, *panels, "</svg>"]
    )


def draw_panel(row: Method) -> str:
    """Draw the panel of one method: p on the left, t on the right, the loss D above them.

    Args:
        row: The method.

    Returns:
        SVG elements.
    """
    left, right = 44, 124
    # What stands between the right encoder and D.
    between = {"swapped": "Sinkhorn", "info_nce": "queue"}.get(row.criterion, "")
    second = RIGHT_BOXES.get(row.target, "encoder")
    if row.target in SECOND_ENCODER_TARGETS:
        second = f"{row.target} encoder"
    if row.target == "moving_average":  # which is the queue
        between = ""
    from_image = row.target not in RIGHT_BOXES or row.target == "teacher"
    second_color = DEFAULT_COLOR if second == "encoder" else HIGHLIGHT_COLOR
    loss_color = DEFAULT_COLOR if row.criterion == SIMSIAM.criterion else HIGHLIGHT_COLOR
    parts = [
        _text(84, 18, row.name, DEFAULT_COLOR, "bold"),
        _text(84, 224, "image", DEFAULT_COLOR),
        _dashed_line(left - 14),
    ]
    parts += [_stop_gradient_bar(right)] if row.stop_gradient else [_dashed_line(right + 14)]
    parts += [_arrow(left, 206, 182)] + [_arrow(right, 206, 182)] * from_image
    parts += [_arrow(left, 154, 62), _arrow(right, 154, 62)]
    parts += [
        _box(left, 168, "encoder", DEFAULT_COLOR),
        _box(right, 168, second, second_color),
    ]
    parts += [_box(left, 108, "predictor", DEFAULT_COLOR)] * (row.predictor != "none")
    parts += [_box(right, 108, between, HIGHLIGHT_COLOR)] * bool(between)
    parts += [_box(84, 48, row.criterion, loss_color, 150)]
    return "".join(parts)


def _text(x: int, y: int, text: str, color: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" fill="{color}" font-weight="{weight}">{text}</text>'


def _box(x: int, y: int, label: str, color: str, width: int = 76) -> str:
    outline = (
        f'<rect x="{x - width // 2}" y="{y - 14}" width="{width}" height="28" rx="4" '
        f'fill="white" stroke="{color}"/>'
    )
    if len(label) > 12 and " " in label and width < 100:
        first, second = label.split(" ", 1)
        return outline + _text(x, y - 2, first, color) + _text(x, y + 10, second, color)
    return outline + _text(x, y + 4, label, color)


def _arrow(x: int, start: int, stop: int) -> str:
    return f'<path d="M{x} {start}V{stop}m-4 6l4 -6l4 6" fill="none" stroke="{DEFAULT_COLOR}"/>'


def _dashed_line(x: int) -> str:
    return f'<path d="M{x} 62V154" fill="none" stroke="{DEFAULT_COLOR}" stroke-dasharray="4 3"/>'


def _stop_gradient_bar(x: int) -> str:
    return f'<path d="M{x - 8} 80h16" stroke="{DEFAULT_COLOR}" stroke-width="3"/>'
