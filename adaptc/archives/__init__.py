"""Read what ``.pt2`` files hold as bytes, and check it: the archive and its seal, JSON, names, and trees of inputs.

Nothing here makes a program: ``safe_pt2`` does, of files from strangers.
"""
