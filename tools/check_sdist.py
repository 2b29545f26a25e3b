"""Checks that the README of an sdist is whole, with its pictures and links.

`python tools/check_sdist.py dist/keras_srlora-0.1.0.tar.gz` renders README.md
as PyPI does, and looks up each file and heading that it links to.
"""

import posixpath
import re
import sys
import tarfile
from html.parser import HTMLParser

from readme_renderer.markdown import render

# First bytes of the pictures that browsers show.
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"<svg", b"<?xml")
SHIPPED = ("LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml")
SHIPPED += ("constraints.txt", "noxfile.py", "keras_srlora/py.typed")


# What the renderer puts before the names of headings.
PREFIX = "user-content-"


class Page(HTMLParser):
    """A rendered page: its pictures, its links, and its headings' names."""

    def __init__(self, markdown):
        super().__init__()
        self.pictures, self.links, self.headings = [], [], set()
        self.feed(render(markdown) or "")

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs.get("src", ""))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"].replace(f"#{PREFIX}", "#"))
        if "id" in attrs:
            self.headings.add(attrs["id"].removeprefix(PREFIX))


def is_elsewhere(address):
    return re.match(r"[a-z]+:", address) is not None


def missing(files):
    """What is wrong with the files of an sdist, a dict from name to bytes."""
    for name in SHIPPED:
        if name not in files:
            yield f"{name} is not in the sdist"
    readme = files["README.md"].decode()
    page = Page(readme)
    if not page.headings:
        yield "README.md does not render"
    written = len(re.findall(r"!\[[^\]]*\]\(|<img\b", readme))
    if len(page.pictures) != written:
        yield (
            f"README.md has {written} pictures, "
            f"{len(page.pictures)} of them render"
        )
    for address in page.pictures:
        if is_elsewhere(address):
            yield f"the picture {address} is not part of the project"
        elif address not in files:
            yield f"the picture {address} is not in the sdist"
        elif not files[address].startswith(PICTURES):
            yield f"{address} is no picture"
    for address in filter(lambda a: not is_elsewhere(a), page.links):
        name, _, fragment = address.partition("#")
        name = posixpath.normpath(name) if name else "README.md"
        inside = any(f == name or f.startswith(f"{name}/") for f in files)
        if not inside:
            yield f"README.md links to {name}, which is not in the sdist"
        elif fragment and fragment not in Page(files[name].decode()).headings:
            yield f"README.md links to {address}: there is no such heading"


def read(path):
    """The files of an sdist, by their paths below its only folder."""
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive
            if member.isfile()
        }


if __name__ == "__main__":
    files = read(sys.argv[1])
    problems = list(missing(files))
    size = sum(map(len, files.values()))
    print(f"{sys.argv[1]}: {len(files)} files, {size / 2**20:.1f} MiB")
    sys.exit("\n".join(problems) or 0)
