"""The pages of the documentation that are made from the code while the site is built.

One module a page, each a function without arguments that returns Markdown; :mod:`tools.docs.hooks`
puts them into the site. Nothing here is committed as text, so nothing can fall behind the code.
"""
