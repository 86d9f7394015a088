"""``fm-stages diagnose``: regular loss, gap and floor by t of trained checkpoints."""
