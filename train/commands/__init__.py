"""Sub-commands of ``xdistil`` that need the extra ``train``.

Each module offers ``add_parser(subparsers)`` and ``run(args) -> int``.
"""
