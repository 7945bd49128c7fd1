"""The five claims, put to the test by joint and direct effects on held-out pairs, harm and placebo side by side."""
