"""A tiny builder of HTML and SVG elements; what is not markup is escaped, so no name can break the page."""

from __future__ import annotations

from html import escape

_VOID = frozenset(("meta", "br", "hr"))


class Markup(str):
    """Text that is already safe HTML."""

    __slots__ = ()


Content = str | Markup | None
Attribute = str | float | None


def el(tag: str, *children: Content, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        tag: element name.
        children: escaped unless ``Markup``; ``None`` is left out.
        attributes: ``class_`` is ``class``, other underscores become hyphens (``font_size``);
            ``None`` is left out, numbers are printed short.
    """
    head = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{head}>")
    return Markup(f"<{tag}{head}>{join(*children)}</{tag}>")


def join(*children: Content) -> Markup:
    """Children one after the other; plain text is escaped."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))


def svg(width: float, height: float, *children: Content, label: str) -> Markup:
    """A drawing of that many units that shrinks with the page; ``label`` is its text for screen readers."""
    return el(
        "svg",
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


def text(x: float, y: float, content: str, **attributes: Attribute) -> Markup:
    """SVG text with its baseline at y."""
    return el("text", content, x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """SVG line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def number(value: float) -> str:
    """A coordinate with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def fit(content: str, width: float, size: float = 12.0) -> str:
    """Text cut with an ellipsis to about ``width`` pixels at that font size; empty if nothing fits."""
    room = int(width / text_width("n", size))
    if len(content) <= room:
        return content
    return content[: room - 1].rstrip() + "…" if room >= 3 else ""


def text_width(content: str, size: float = 12.0) -> float:
    """About how wide the text is in a system sans font: a little too much rather than too little."""
    return 0.58 * size * len(content)


def _value(value: str | float) -> str:
    return escape(value, quote=True) if isinstance(value, str) else number(float(value))
