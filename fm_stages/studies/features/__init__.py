"""Networks by which images are compared, and ``fm-stages features``, which trains one."""
