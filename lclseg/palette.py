"""Colours of the classes 1, 2, ... wherever they are shown."""

# Okabe and Ito's, told apart with any colour vision, as they are for use over grey images.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")
