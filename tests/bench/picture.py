"""bars(): medians as a picture (SVG), a group of bars for each operation."""

from __future__ import annotations

from html import escape

# Told apart by people who see few colours, on light and on dark pages (Okabe and Ito).
COLOURS = ("#999999", "#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#009e73")
LABEL = 110
WIDTH = 620
BAR = 13
GAP = 14


def bars(values: dict[str, dict[str, float]], unit: str) -> str:
    """Return the picture of {operation: {column: value}}; each operation has its own scale."""
    columns = list(dict.fromkeys(name for row in values.values() for name in row))
    lines = []
    y = 26
    x = float(LABEL)
    for column, colour in zip(columns, COLOURS, strict=False):
        lines.append(f'<rect x="{x:g}" y="8" width="10" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{x + 14:g}" y="17">{escape(column)}</text>')
        x += 26 + 7 * len(column)
    for operation, row in values.items():
        y += GAP
        middle = y + BAR * len(row) / 2 + 4
        lines.append(
            f'<text x="{LABEL - 8}" y="{middle:g}" text-anchor="end">{escape(operation)}</text>'
        )
        most = max(row.values())
        for column, colour in zip(columns, COLOURS, strict=False):
            if column not in row:
                continue
            length = (WIDTH - LABEL - 70) * row[column] / most
            lines.append(
                f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR - 2}" '
                f'fill="{colour}"><title>{escape(column)}</title></rect>'
            )
            lines.append(
                f'<text x="{LABEL + length + 5:.1f}" y="{y + BAR - 4}" class="n">'
                f"{row[column]:.1f} {unit}</text>"
            )
            y += BAR
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 20} {y + GAP}" '
        'font-family="sans-serif" font-size="12">\n'
        "<style>text{fill:#444}.n{font-size:10px}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}}</style>\n"
    )
    return head + "\n".join(lines) + "\n</svg>\n"
