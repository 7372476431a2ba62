"""TEAL's method: calibrate, allocate, plan; its histograms, thresholds and greedy search."""
