"""The site of the guides and the API reference, which ``make docs`` builds into build/docs.

It lies beside the other checks of the project, since building it is one: ``mkdocs build --strict`` fails on a broken
link, and the pages are not written where a public name lacks part of its docstring.
"""
