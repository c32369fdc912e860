"""mkdocs: what a code host does with a link to a folder, a page that lists its files."""

from __future__ import annotations

import posixpath
import re
from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\(([^)#:\s]+)\)")
PAGE = "---\nsearch: {{exclude: true}}\n---\n# {folder}\n\n{links}\n"
FRONTS = ("README.md", "index.md")  # a folder's own page
fronts: dict[str, str] = {}  # folder -> that page's name


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every folder that has no page of its own gets a list of what it holds."""
    entries: dict[str, set[str]] = {}
    for file in files:
        if file.inclusion.is_excluded() or file.src_uri.startswith("assets/"):  # the theme's own
            continue
        path = PurePosixPath(file.src_uri)
        for child, parent in zip([path, *path.parents], path.parents, strict=False):
            entries.setdefault(str(parent), set()).add(child.name)
    for folder, names in entries.items():
        fronts[folder] = next((name for name in FRONTS if name in names), "index.md")
    for folder, names in entries.items():
        if fronts[folder] in names:
            continue
        links = []
        for name in sorted(names):
            front = fronts.get(posixpath.join(folder, name))
            links.append(f"- [{name}/]({name}/{front})" if front else f"- [{name}]({name})")
        text = PAGE.format(folder=folder, links="\n".join(links))
        files.append(File.generated(config, f"{folder}/index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to a folder go to its page."""
    here = posixpath.dirname(page.file.src_uri)

    def to_page(link: re.Match[str]) -> str:
        folder = posixpath.normpath(posixpath.join(here, link[1]))
        return f"]({link[1].rstrip('/')}/{fronts[folder]})" if folder in fronts else link[0]

    return LINK.sub(to_page, markdown)
