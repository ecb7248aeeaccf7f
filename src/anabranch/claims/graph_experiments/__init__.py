"""The experiments of the graph claims, apart from them because they need the extra ``graphs``.

Listing the claims imports no module of this package.
"""
