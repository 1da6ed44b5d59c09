"""The distillation layer: corpora, teachers, students and the reports on them.

Lives in ``train/`` of the source tree and is installed as ``xdistil_fast.train``.
It needs the extra ``train`` (torch, transformers).
"""

if __name__ != "xdistil_fast.train":
    raise ImportError(
        f"import this package as 'xdistil_fast.train', not as {__name__!r}: "
        "its modules refer to each other by that name"
    )
