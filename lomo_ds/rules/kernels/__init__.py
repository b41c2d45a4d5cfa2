"""Triton kernels of the update rules: each reads gradient and parameter once and writes once.

``dispatch`` says where they run, ``operations`` what each reads and writes, ``launch`` calls them with a
shard, ``steps`` and ``sums`` are the kernels themselves, made of the device functions in ``elements``,
``noise``, ``eight_bits`` and ``tiles``. What a kernel computes is what the torch function of the same name
computes.
"""
