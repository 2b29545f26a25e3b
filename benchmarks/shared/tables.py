"""Tables in Markdown, and where they go in a page."""


def markdown(rows):
    """A table; the first row is its header."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def fill_in(path, name, text):
    """Replaces what stands between the two marks of a name in a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    path.write_text(
        f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8"
    )
