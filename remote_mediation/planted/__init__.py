"""Models whose mechanism we know, and the check of the instrument on them."""
