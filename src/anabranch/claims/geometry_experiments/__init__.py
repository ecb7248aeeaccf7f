"""The experiments of the geometry claims, apart from them because they import torch.

Listing the claims imports no module of this package.
"""
