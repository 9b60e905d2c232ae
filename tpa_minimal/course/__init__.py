"""The classroom: checkers, the looks of figures, diagrams, and the explorer."""
