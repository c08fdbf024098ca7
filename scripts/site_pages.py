"""Which files the site of the documents has: a hook of MkDocs (`mkdocs.yml`).

A page stands on the site where it stands in the repository, and so does each file that a page links
to. So a relative link leads to the same thing on a forge, in a checkout and on the site, and MkDocs
itself finds those that lead nowhere.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from documents import linked_files, pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the files of the repository in place of those of `docs_dir`; the theme's stay."""
    root = Path(config.config_file_path).parent.resolve()
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({*pages(root), *linked_files(root)}):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files
