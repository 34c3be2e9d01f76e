"""A seeded random search for wrong numbers: norms, shapes, dtypes, masks, options and transformations against NumPy.

    python -m tests.search --cases 5000 --seed 0        native kernels and XLA against the float64 truth
    python -m tests.search --devices --cases 200        layouts and `sync` over eight host devices, likewise

A failure is printed as a line of Python that reproduces it, after simpler values of each dimension were tried. What is
drawn is in `case.py`, what is run in `run.py`, what is right and how far from it a result may be in `truth.py`.
"""
