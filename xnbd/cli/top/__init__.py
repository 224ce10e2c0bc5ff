"""``xnbd-bgctl --top``: several servers at once, live."""
